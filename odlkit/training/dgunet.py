"""Recipes for DGUNet at a size that a processor trains: what they share, and compressive sensing with a learned matrix.

As the paper: Adam with a warm-up and a cosine, the loss over the images of all stages.  Patches of 64 hold four blocks, so
that the borders of blocks are seen in training; the released models add that as a second run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from odlkit.metrics import psnr
from odlkit.models.dgunet import DGUNet, Sensing
from odlkit.training.loop import fit, patches, save_weights
from odlkit.training.padnet import HELD_OUT, best_device, pictures

SMALL = {"width": 16, "step": 8, "tail": 8, "stages": 5, "scales": 3, "fused": 2}


def all_stages(images: Sequence[Tensor], x: Tensor) -> Tensor:
    """The mean over stages of ``||x^k - x||^2`` a pixel.  Eq: DGUNet (10)."""
    return torch.stack([(image.float() - x).square().mean() for image in images]).mean()


def charbonnier(images: Sequence[Tensor], x: Tensor, edges: float = 0.0) -> Tensor:
    """Mean over stages and pixels of ``c(x^k - x) + edges c(L x^k - L x)``, ``c(t) = sqrt(t^2 + 1e-6)``, L the Laplacian.

    The loss of the released models, ``edges = 0.05`` for deraining and deblurring; the paper's text has `all_stages`.
    """

    def laplacian(z: Tensor) -> Tensor:
        z = nnf.pad(z, (1, 1, 1, 1), mode="replicate")
        return z[..., 1:-1, 2:] + z[..., 1:-1, :-2] + z[..., 2:, 1:-1] + z[..., :-2, 1:-1] - 4 * z[..., 1:-1, 1:-1]

    def c(t: Tensor) -> Tensor:
        return (t.square() + 1e-6).sqrt().mean()

    errors = [image.float() - x for image in images]
    return torch.stack([c(e) + (edges * c(laplacian(e)) if edges else 0.0) for e in errors]).mean()


Pair = tuple[Any, ...]  # (x, y), and for a network that is given it A: (x, y, A), (x, y, A, x0)


def restorer(
    out: Path,
    resume: bool = False,
    *,
    name: str,
    what: str,
    data: str,
    sample: Callable[[torch.Generator], Pair],
    held: Sequence[Pair],
    setting: str = "derain",
    edges: float = 0.05,
    steps: int = 3000,
    lr: float = 1e-3,
    **changes: Any,
) -> None:
    """Train a DGUNet on what ``sample`` draws, ``(B, C, H, W)`` in [0, 1], and write its weights and card.

    A draw is ``(x, y)``, or ``(x, y, A)`` or ``(x, y, A, x0)`` for a network that is given A.  ``held`` are draws to
    validate on; ``changes`` go to `Setting`, over `SMALL`.
    """
    torch.manual_seed(0)
    device = best_device()
    net = DGUNet(setting, **(SMALL | changes)).to(device)

    def restore(given: Sequence[Any]) -> list[Tensor]:
        return net(*(t.to(device) if isinstance(t, Tensor) else t for t in given))

    def loss(generator: torch.Generator) -> Tensor:
        x, *given = sample(generator)
        with torch.autocast(device.type, torch.bfloat16):
            return charbonnier(restore(given), x.to(device), edges)

    def validate() -> float:
        with torch.no_grad():
            scores = [psnr(restore(given)[-1].cpu().clamp(0, 1), x).mean().item() for x, *given in held]
        return sum(scores) / len(scores)

    record = fit(net, loss, steps=steps, lr=lr, out=out, name=name, resume=resume, validate=validate)
    card = {
        "name": name,
        "what": what,
        "recipe": f"odlkit train {name}",
        "data": data,
        "network": {"kind": "dgunet", **net.config},
        "schedule": {},
    }
    save_weights(net, out / f"{name}.safetensors", card | record, torch.float16)


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
