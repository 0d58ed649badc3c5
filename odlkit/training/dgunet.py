"""Recipes for DGUNet at a size that a processor trains: compressive sensing with a learned matrix.

As the paper: Adam with a warm-up and a cosine, the loss over the images of all stages.  Patches of 64 hold four blocks, so
that the borders of blocks are seen in training; the released models add that as a second run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from odlkit.metrics import psnr
from odlkit.models.dgunet import Sensing
from odlkit.training.loop import fit, patches, save_weights
from odlkit.training.padnet import HELD_OUT, best_device, pictures

SMALL = {"width": 16, "step": 8, "tail": 8, "stages": 5, "scales": 3, "fused": 2}


def all_stages(images: Sequence[Tensor], x: Tensor) -> Tensor:
    """The mean over stages of ``||x^k - x||^2`` a pixel.  Eq: DGUNet (10)."""
    return torch.stack([(image.float() - x).square().mean() for image in images]).mean()


def sensing(out: Path, resume: bool = False, *, ratio: float, steps: int = 5000) -> None:
    """Matrix and network together, for one ratio: gray patches of 64, blocks of 32, no noise."""
    torch.manual_seed(0)
    device, (train, held) = best_device(), pictures()
    net, name = Sensing(ratio, **SMALL).to(device), f"dgunet-cs-{round(100 * ratio)}"

    def loss(generator: torch.Generator) -> Tensor:
        x = patches(train, 8, 64, generator).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            return all_stages(net(net.operator.A(x)), x)

    def validate() -> float:
        x = torch.cat(held)[..., :160, :160].to(device)
        with torch.no_grad():
            return psnr(net(net.operator.A(x))[-1], x).mean().item()

    record = fit(net, loss, steps=steps, lr=1e-3, out=out, name=name, resume=resume, validate=validate)
    card = {
        "name": name,
        "what": f"DGUNet for compressive sensing at {ratio:.0%}, with its sampling matrix; {SMALL['stages']} stages",
        "recipe": f"odlkit train {name}",
        "data": f"train400 without its last {HELD_OUT} images, which are the validation set",
        "network": {"kind": "sensing", **net.config},
        "schedule": {},
    }
    save_weights(net, out / f"{name}.safetensors", card | record, torch.float16)


sensing_10, sensing_25 = (partial(sensing, ratio=ratio) for ratio in (0.10, 0.25))
