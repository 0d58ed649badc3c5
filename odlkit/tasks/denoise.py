"""Noise: of a camera, unknown in level and correlated between neighbours, or Gaussian and white.

DGUNet saw both, and needs no level.  The others are made for white Gaussian noise of a level ``sigma``; they take the one
that is given, or estimate it from the finest details, where the noise of a camera hides.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from odlkit import weights
from odlkit.operators import Identity
from odlkit.priors import TV
from odlkit.problem import LeastSquares, Problem
from odlkit.propagate import propagate
from odlkit.solvers import ProximalGradient
from odlkit.tasks.deblur import at_levels
from odlkit.tasks.dgunet import blind
from odlkit.tasks.report import Model, Outcome, check_image, check_model, check_sigma, recorded, report, unproved
from odlkit.tasks.tiles import in_parts

WAVELET, WAVELET_LEVELS = "db4", 4
MARGIN = 8  # pixels continued by the border, where total variation would join opposite sides
TV_FACTOR = 0.65  # lambda = 0.65 sigma: between what is best for sigma = 15 and 25 on the last pictures of train400
TV_TOLERANCE = 1e-3  # of the distance to the minimiser, root mean square, for a picture of mean 1


def denoise(
    y: Tensor, sigma: float | None = None, model: str = "dgunet", *, tile: int | None = None, progress: bool = False
) -> tuple[Tensor, dict[str, Any]]:
    """Remove noise from ``y`` ``(B, C, H, W)`` in [0, 1], C = 1 or 3: an image of its shape, and a report of the run.

    ``model`` is one of `MODELS`; ``sigma`` in [0, 1) is the standard deviation for those that ask for it, estimated from
    each picture if it is ``None``.  ``tile`` restores squares one by one, as `odlkit.tasks.tiles.in_parts` has it.  Raises
    ``ValueError`` for bad arguments.
    """
    clock = time.monotonic()
    check_model(model, MODELS)
    check_image(y, (1, 3))
    check_sigma(sigma)
    notes: list[str] = []
    level: Any  # one for all, or one for each image

    def restore(item: Tensor, level: Any) -> tuple[Tensor, list[Outcome]]:
        return in_parts(lambda z: MODELS[model].run(z, level), item, tile, progress=progress)

    if model == "dgunet":
        level, (x, outcomes) = sigma, restore(y, None)
        notes += [] if sigma is None else ["sigma: not used, this network takes noise as it comes"]
    else:
        x, outcomes, level = at_levels(restore, y, sigma, notes)
        notes = [f"{note}; too low where neighbours have the same noise" for note in notes]
    return x, report("denoise", model, clock, outcomes, y, x, settings={"sigma": level, "tile": tile}, notes=notes)


# The models: each gets the picture and the level.


def _dgunet(y: Tensor, sigma: float | None) -> Outcome:
    return blind("dgunet-denoise", y, None, "fine texture may go with the noise, and noise it has not seen may stay")


def _network(y: Tensor, sigma: float) -> Outcome:
    with torch.no_grad():
        planes = weights.load("podm-denoiser").to(y)(y.reshape(-1, 1, *y.shape[-2:]), max(sigma, 1e-3))
    return _formula(planes.reshape(y.shape), y, "a network trained on white Gaussian noise in gray; nothing is checked")


def _tv(y: Tensor, sigma: float) -> Outcome:
    """One proximal step is the minimiser, up to what the duality gap of its own iteration leaves.

    That iteration stops relative to the norm of its input, so every item is moved to mean 1, which moves its minimiser.
    """
    z = nnf.pad(y, 4 * [MARGIN], mode="replicate")
    lift = 1 - z.mean((1, 2, 3), keepdim=True)
    problem = Problem(LeastSquares(Identity(), z + lift), TV(TV_FACTOR * sigma, tol=TV_TOLERANCE))
    result = propagate(ProximalGradient(1.0), problem, z + lift, steps=1)
    words = {
        "guarantee": "the duality gap of the strongly convex energy ||x - y||^2 / 2 + lambda TV(x)",
        "statement": f"within {TV_TOLERANCE * (z + lift).square().mean().sqrt().item():.2g}, root mean square, of the only "
        "minimiser, up to round-off",
        "holds": True,  # otherwise the proximal map has raised NotConverged
    }
    return Outcome((result.x - lift)[..., MARGIN:-MARGIN, MARGIN:-MARGIN], result, words)


def _wavelet(y: Tensor, sigma: float) -> Outcome:
    import pywt
    from skimage.restoration import denoise_wavelet

    colour, levels = y.shape[1] == 3, max(min(WAVELET_LEVELS, pywt.dwt_max_level(min(y.shape[-2:]), WAVELET)), 1)
    items = [
        denoise_wavelet(item.permute(1, 2, 0).numpy(), sigma, WAVELET, "soft", levels, colour, channel_axis=-1)
        for item in y.detach().cpu().clamp(0, 1)
    ]
    x = torch.stack([torch.as_tensor(item).permute(2, 0, 1) for item in items]).to(y)
    return _formula(x, y, "soft thresholds for each band of detail (BayesShrink); nothing is iterated")


def _formula(x: Tensor, y: Tensor, statement: str) -> Outcome:
    return Outcome(x, recorded([x], y), unproved(statement))


MODELS = {  # each run as run(y, sigma)
    "dgunet": Model(
        _dgunet, "DGUNet trained on the noise of cameras and on Gaussian noise, no level needed; nothing is checked"
    ),
    "network": Model(_network, "PODM's denoising network for white noise, channel by channel; nothing is checked"),
    "tv": Model(_tv, "total variation, channel by channel, to a known distance from the minimiser"),
    "wavelet": Model(_wavelet, "BayesShrink: soft thresholds for the wavelet coefficients of luminance and colours"),
}
