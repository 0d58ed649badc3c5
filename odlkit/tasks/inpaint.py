"""Interpolation: a picture of which only some pixels are known, without noise, as under text or a dead sensor.

Known pixels come back as they are.  The grid is the picture, padded by unknown pixels to sides that the wavelets divide.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from odlkit import weights
from odlkit.certify import descent
from odlkit.linear import conjugate_gradient
from odlkit.models.gdc import Cascade
from odlkit.operators import Gradient, Mask
from odlkit.priors import GroupLp, details
from odlkit.problem import LeastSquares, Problem
from odlkit.propagate import Result, State, Status, Trace, propagate
from odlkit.solvers import ADMM, ProximalGradient
from odlkit.tasks import dgunet
from odlkit.tasks.report import ROUND_OFF, Model, Outcome, check_model, good_size, report, unproved

LEVEL = 5e-4  # sigma that stands for data without noise: known pixels count as exact beside the levels of the network
HAAR = 3  # levels of the wavelet baseline
HAAR_WEIGHT, HAAR_STEPS = 1e-4, 200  # lambda of (1/2) ||M u - y||^2 + lambda ||B^T u||^0.8; no larger one is better
TV_WEIGHT, TV_PENALTY, TV_STEPS = 0.002, 0.02, 60
TOLERANCE = 1e-4  # relative change at which proximal gradient stops


def inpaint(
    y: Tensor, mask: Tensor, model: str = "gdc", *, steps: int | None = None, progress: bool = False
) -> tuple[Tensor, dict[str, Any]]:
    """Restore ``y = M x``: the image, of the shape of ``y`` and equal to it where it is known, and a report of the run.

    ``y`` is ``(B, C, H, W)`` in [0, 1]; what it holds at unknown pixels is not used.  ``mask`` is ``(H, W)``,
    ``(1, 1, H, W)`` or ``(B, 1, H, W)``, above 0.5 = known, the same for all channels.  ``model`` is one of `MODELS`.
    Raises ``ValueError`` for bad arguments and `PropagationError` when a run diverges.
    """
    clock = time.monotonic()
    mask = check(y, mask, model)
    height, width = y.shape[-2:]
    pad = (0, good_size(width) - width, 0, good_size(height) - height)
    start = nnf.pad(thin_plate(y, mask), pad, mode="replicate")
    known = nnf.pad(mask, pad)
    outcome = MODELS[model].run(known * start, known, start, steps, progress)
    x = torch.where(mask > 0, y, outcome.x[..., :height, :width])
    return x, report("inpaint", model, clock, [outcome], y, x, input={"known": round(mask.mean().item(), 4)})


def check(y: Tensor, mask: Tensor, model: str) -> Tensor:
    """The mask as ``(B, 1, H, W)`` zeros and ones like ``y``.  Raises ``ValueError`` naming the first bad argument."""
    check_model(model, MODELS)
    if y.dim() != 4 or not y.is_floating_point():
        raise ValueError(f"input: expected a floating point tensor (B, C, H, W), got {tuple(y.shape)} of {y.dtype}")
    full = mask[None, None] if mask.dim() == 2 else mask
    if full.dim() != 4 or full.shape[0] not in (1, len(y)) or full.shape[1] != 1 or full.shape[-2:] != y.shape[-2:]:
        raise ValueError(f"mask: expected one value for each pixel of {tuple(y.shape)}, got shape {tuple(mask.shape)}")
    known = (full > 0.5).to(y).expand(len(y), 1, *y.shape[-2:])
    if not bool(known.flatten(1).any(1).all()):
        raise ValueError("mask: expected known pixels (above 0.5, white), got none")
    if not bool(torch.isfinite(torch.where(known > 0, y, 0)).all()):
        raise ValueError("input: expected finite numbers where the mask says known, got NaN or infinity")
    return known


def fill(y: Tensor, mask: Tensor) -> Tensor:
    """Known pixels as they are, unknown ones from the means of known pixels in ever larger squares (pull and push).

    ``y`` is ``(B, C, H, W)``, ``mask`` ``(B or 1, 1, H, W)`` with 1 = known, at least one pixel known.  The smallest square
    with a known pixel counts, and what comes from a coarser grid is interpolated bilinearly.
    """
    height, width = y.shape[-2:]
    mask = mask.to(y).expand(len(y), 1, height, width)
    if bool((mask > 0).all()) or max(height, width) == 1:
        return y
    odd = (0, width % 2, 0, height % 2)
    count = nnf.avg_pool2d(nnf.pad(mask, odd), 2)
    mean = nnf.avg_pool2d(nnf.pad(torch.where(mask > 0, y, 0), odd), 2) / count.clamp_min(1e-6)
    coarse = fill(mean, (count > 0).to(y))
    fine = nnf.interpolate(coarse, size=(height + odd[3], width + odd[1]), mode="bilinear")[..., :height, :width]
    return torch.where(mask > 0, y, fine)


def thin_plate(y: Tensor, mask: Tensor, rtol: float = 0.03) -> Tensor:
    """Known pixels as they are, unknown ones ``argmin ||Laplacian u||^2``, by a few conjugate gradients from `fill`.

    The energy of a bent plate, whose solution inside each hole is the biharmonic one; differences across the picture's
    border are zero.  Shapes as in `fill`, each channel by itself; ``rtol`` is relative to the energy's gradient at `fill`.
    """
    channels = y.shape[1]
    if channels > 1:
        single = mask.expand(len(y), 1, *y.shape[-2:]).repeat_interleave(channels, 0)
        return thin_plate(y.reshape(-1, 1, *y.shape[-2:]), single, rtol).reshape(y.shape)

    def gradient(u: Tensor) -> Tensor:
        for _ in range(2):
            v = nnf.pad(u, (1, 1, 1, 1), mode="replicate")
            u = 4 * u - v[..., 1:-1, 2:] - v[..., 1:-1, :-2] - v[..., 2:, 1:-1] - v[..., :-2, 1:-1]
        return u

    start, hole = fill(y, mask), 1 - mask.to(y)
    if not bool(hole.any()):
        return start
    move = conjugate_gradient(lambda p: hole * gradient(hole * p) + mask * p, -hole * gradient(start), rtol=rtol)
    return start + hole * move


# The models: each gets the data, the mask and the filled start on the grid.


def _gdc(y: Tensor, mask: Tensor, start: Tensor, steps: int | None, progress: bool) -> Outcome:
    """The jointly trained cascade, each channel as a picture of its own."""
    net, shape = weights.load("gdc-inpaint").to(y), y.shape
    y, start = (t.reshape(-1, 1, *shape[-2:]) for t in (y, start))
    mask = mask.repeat_interleave(shape[1], 0)
    sigma = torch.full((len(y), 1, 1, 1), LEVEL).to(y)
    problem = net.problem(Mask(mask), y, sigma)  # type: ignore[operator]
    step = Cascade(net.modules_for(sigma, mask))  # type: ignore[operator]
    result = propagate(step, problem, start, steps=steps or net.stages, progress=progress)  # type: ignore[arg-type]
    words = unproved("stages trained jointly and run unchecked; no theorem covers them")
    return Outcome(result.x.reshape(shape), result, words)


def _haar(y: Tensor, mask: Tensor, start: Tensor, steps: int | None, progress: bool) -> Outcome:
    problem = Problem(LeastSquares(Mask(mask), y), details(y, HAAR_WEIGHT, 0.8, levels=HAAR))
    step = ProximalGradient(0.99)
    result = propagate(step, problem, start, steps=steps or HAAR_STEPS, tol=TOLERANCE, progress=progress)
    fall = descent(result.trace, 0.5 / 0.99 - 0.5, slack=ROUND_OFF)
    words = {
        "guarantee": "proximal gradient with a step below 1 / L, any prior (known theory)",
        "statement": "the energy falls by (1 / (2 tau) - L / 2) ||change||^2 or more at every step; limits are critical",
        "holds": fall.holds,
        "margin": fall.margin,
        "residual": problem.residual(result.x).max().item(),
    }
    return Outcome(result.x, result, words)


def _tv(y: Tensor, mask: Tensor, start: Tensor, steps: int | None, progress: bool) -> Outcome:
    problem = Problem(LeastSquares(Mask(mask), y), GroupLp(1, TV_WEIGHT), Gradient())
    # no tolerance: from a start that fits the data ADMM's first step stays where it is, far from a minimiser
    result = propagate(ADMM(TV_PENALTY), problem, start, steps=steps or TV_STEPS, progress=progress)
    words = {
        "guarantee": "ADMM on a convex energy, any penalty, its linear systems solved to a tolerance (known theory)",
        "statement": "converges to a minimiser; how near this run came is not checked",
        "holds": None,
    }
    return Outcome(result.x, result, words)


def _biharmonic(y: Tensor, mask: Tensor, start: Tensor, steps: int | None, progress: bool) -> Outcome:
    """scikit-image's ``inpaint_biharmonic``: the solution of a biharmonic equation in each hole, no energy of ours."""
    from skimage.restoration import inpaint_biharmonic

    filled = [
        inpaint_biharmonic(item.permute(1, 2, 0).cpu().numpy(), known[0].cpu().numpy() == 0, channel_axis=-1)
        for item, known in zip(y, mask, strict=True)
    ]
    x = torch.stack([torch.as_tensor(item).permute(2, 0, 1) for item in filled]).to(y)
    words = unproved("a linear system in each hole, solved by scikit-image")
    return Outcome(x, Result(x, Status.CONVERGED, 1, 0.0, Trace(), State(x)), words)


MODELS = {  # each run as run(y, mask, start, steps, progress)
    "gdc": Model(_gdc, "GDC's cascade of generative and corrective modules, trained jointly"),
    "dgunet": Model(dgunet.inpaint, "DGUNet that is given A, one network for three tasks; nothing is checked"),
    "haar-l08": Model(_haar, "l0.8 on Haar coefficients, GDC's Table I, by proximal gradient"),
    "tv": Model(_tv, "isotropic total variation by ADMM"),
    "biharmonic": Model(_biharmonic, "scikit-image's biharmonic inpainting"),
}
