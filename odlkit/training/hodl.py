"""Recipes for HODL's deconvolution: a U-shaped denoiser, then training through the iteration.

Data: train400 only, blurred by random kernels; no benchmark image and no benchmark kernel is seen.
"""

from __future__ import annotations

from pathlib import Path

import torch

from odlkit.networks import ResidualNet, UNet
from odlkit.training.loop import save_weights
from odlkit.training.padnet import HELD_OUT, fit_denoiser

LEVELS = (0.003, 0.25)  # noise of the denoiser: what plug-and-play asks for in its first and last steps
WIDTHS = (32, 64, 128)


def denoiser(out: Path, resume: bool = False, steps: int = 5000) -> ResidualNet:
    """Train the U-shaped network to estimate noise of every level in `LEVELS`."""
    torch.manual_seed(0)
    net = ResidualNet([UNet(widths=WIDTHS)])
    record = fit_denoiser(net, LEVELS, steps=steps, lr=1e-3, out=out, name="hodl-denoiser", resume=resume)
    card = {
        "name": "hodl-denoiser",
        "what": "the U-shaped network of HODL's deconvolution as a plain denoiser of every noise level, for plug-and-play",
        "recipe": "odlkit train hodl-denoiser",
        "data": f"train400 without its last {HELD_OUT} images, which are the validation set",
        "network": {"kind": "unet", "units": [net.units[0].config], "bound": None},
        "schedule": {"first": LEVELS[1], "last": LEVELS[0]},
    }
    save_weights(net, out / "hodl-denoiser.safetensors", card | record, torch.float16)
    return net
