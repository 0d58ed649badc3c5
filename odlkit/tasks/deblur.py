"""Deblurring with a known kernel, of photographs as they are: not periodic, in gray or colour, with noise of level sigma.

The scene continues outside the picture.  `extend` puts the picture on a larger periodic grid and fills what was not seen
with the blur of a smooth solution that explains the seen data, so that every closed form in the Fourier domain applies and
the data inside stay as they were.  What a certificate says, it says about the problem on that grid.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from odlkit import weights
from odlkit.linear import conjugate_gradient
from odlkit.models.padnet import Constants, Explicit, Implicit, Schedule
from odlkit.operators import Blur, Gradient
from odlkit.priors import Analysis, GroupLp, Lp, details
from odlkit.problem import LeastSquares, LinkedGradient, Problem, norm_items
from odlkit.propagate import Result, propagate
from odlkit.propositions.padnet import bounded_moves
from odlkit.solvers import ADMM, FISTA
from odlkit.tasks import dgunet
from odlkit.tasks.deblur_gdc import gdc, gdc_pcm
from odlkit.tasks.deblur_hodl import hodl, nonexpansive
from odlkit.tasks.deblur_podm import podm, rpodm
from odlkit.tasks.report import (
    FISTA_WORDS,
    ROUND_OFF,
    Model,
    Outcome,
    certified_descent,
    check_image,
    check_model,
    check_sigma,
    good_size,
    report,
    unit_kernel,
    unproved,
)
from odlkit.tasks.tiles import in_parts

# Settings, chosen on BSD68 with random kernels.  The classical energies are (1/2)||A x - y||^2 + lambda R with
# lambda = factor * sigma^2, as maximum a posteriori estimation has it: a prior that is fixed, noise of variance sigma^2.
FLOOR = 0.003  # the least noise level used: the networks saw none below, and rounding to 8 bits alone makes 0.001
FILL = 0.01  # weight of the smoothness in the fill outside the picture
TOLERANCE, CLASSICAL_STEPS = 1e-4, 150  # relative change at which the classical solvers stop, and the most steps they take
TV_FACTOR, TV_PENALTY = 10.0, 20.0  # penalty rho = 20 lambda
L08_FACTOR, L08_PENALTY = 4.5, 300.0
WAVELET, LEVELS, WAVELET_FACTOR = "db4", 3, 18.0
EPADNET_BETA, EPADNET_FACTOR = 0.05, 4.5  # by ADMM's result, so that no comparison favours EPADNet
EPADNET_MOREAU, EPADNET_STEP, EPADNET_TOLERANCE = 3.0, 1 / 3.5, 1.1  # mu / L, tau L, C_E / L: kappa = 0.15 L
EPADNET_HALVINGS, EPADNET_STOP, EPADNET_STEPS = 4, 0.02, 30


def deblur(
    y: Tensor,
    kernel: Tensor | None = None,
    sigma: float | None = None,
    model: str = "ipadnet",
    boundary: str = "unknown",
    *,
    steps: int | None = None,
    tile: int | None = None,
    progress: bool = False,
) -> tuple[Tensor, dict[str, Any]]:
    """Restore ``y = k * x + noise``: the image, of the shape of ``y``, and a report of the run.

    ``y`` is ``(B, C, H, W)`` in [0, 1], each channel restored by itself with the same kernel; ``kernel`` is ``(h, w)`` with
    its centre at ``(h // 2, w // 2)`` and is scaled to sum 1; ``sigma`` is the standard deviation of the noise in [0, 1),
    estimated from each picture if it is ``None``.  Without a kernel, which only ``dgunet`` does, the blur is unknown, and
    neither ``sigma`` nor ``boundary`` is used (`odlkit.tasks.dgunet.motion`).  ``model`` is one of `MODELS`.
    ``boundary="unknown"`` is for photographs, ``"circular"`` for periodic data.  ``tile`` restores squares one by one, as
    `odlkit.tasks.tiles.in_parts` has it, which overlap by a kernel and 32 pixels.  Raises ``ValueError`` for bad
    arguments and `PropagationError` when a run diverges.
    """
    clock = time.monotonic()
    kernel, notes = check(y, kernel, sigma, model, boundary, tile)
    if kernel is None:
        return dgunet.motion(y, steps=steps, tile=tile, progress=progress)

    def restore(item: Tensor, level: float) -> tuple[Tensor, list[Outcome]]:
        channels = item.reshape(-1, 1, *y.shape[-2:])  # every channel is an item of the batch
        run = partial(_on_grid, kernel, max(level, FLOOR), model, boundary, steps, progress and tile is None)
        x, outcomes = in_parts(run, channels, tile, max(kernel.shape) + 32, progress, multiple=1)
        return x.reshape(item.shape), outcomes

    x, outcomes, level = at_levels(restore, y, sigma, notes)
    used = [max(one, FLOOR) for one in level] if isinstance(level, list) else max(level, FLOOR)
    settings = {"sigma": level, "sigma_used": used, "boundary": boundary, "tile": tile}
    about = {"input": {"kernel": list(kernel.shape)}, "settings": settings, "notes": notes}
    told = report("deblur", model, clock, outcomes, y, x, **about)
    if boundary == "unknown":
        told["certificate"]["of"] = "the problem on the larger periodic grid, the unseen part of its data filled in"
    return x, told


def check(
    y: Tensor, kernel: Tensor | None, sigma: Any, model: str, boundary: str, tile: int | None
) -> tuple[Tensor | None, list[str]]:
    """The kernel, if any, scaled to sum 1, and notes.  Raises ``ValueError`` naming the first bad argument."""
    check_model(model, MODELS)
    if boundary not in ("unknown", "circular"):
        raise ValueError(f"boundary: expected unknown or circular, got {boundary!r}")
    check_image(y)
    check_sigma(sigma)
    if tile is not None and (tile < 16 or boundary == "circular"):
        raise ValueError(f"tile: expected at least 16 pixels and boundary unknown, got {tile} and {boundary}")
    if kernel is None:
        if model != "dgunet":
            raise ValueError(f"kernel: expected one for {model}, only dgunet does without, none was given")
        if sigma is not None or boundary != "unknown":
            raise ValueError("sigma and boundary: expected none without a kernel, the network for unknown blur uses neither")
        return None, []
    kernel, notes = unit_kernel(kernel.to(y.device), (y.shape[-2], y.shape[-1]), "the image")
    return kernel.to(y.dtype), notes


def estimate_noise(y: Tensor) -> float:
    """The noise level of one image ``(1, C, H, W)``: the median absolute deviation of its finest wavelet details.

    The mean over channels; one without details, such as a black one, counts as free of noise.  Raises ``ValueError`` for a
    batch, whose images have levels of their own.
    """
    import warnings

    import numpy as np
    from skimage.restoration import estimate_sigma

    if len(y) != 1:
        raise ValueError(f"input: expected one image (1, C, H, W), got {tuple(y.shape)}")
    planes = y[0].detach().cpu().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the median of no details is NaN
        levels = estimate_sigma(planes, channel_axis=0)
    return float(np.nan_to_num(levels).mean())


def at_levels(
    run: Callable[[Tensor, float], tuple[Tensor, list[Outcome]]], y: Tensor, sigma: float | None, notes: list[str]
) -> tuple[Tensor, list[Outcome], float | list[float]]:
    """``run(y, sigma)`` and sigma; where none is given, each image with its own estimate, and a note of that."""
    if sigma is not None:
        return *run(y, float(sigma)), float(sigma)
    levels = [estimate_noise(item) for item in y.split(1)]
    notes.append("sigma: not given, estimated as " + ", ".join(f"{level:.4f}" for level in levels))
    parts = [run(item, level) for item, level in zip(y.split(1), levels, strict=True)]
    outcomes = [outcome for _, found in parts for outcome in found]
    return torch.cat([x for x, _ in parts]), outcomes, levels[0] if len(levels) == 1 else levels


# The boundary.


def extend(y: Tensor, kernel: Tensor, fill: float = FILL) -> tuple[Tensor, tuple[slice, slice]]:
    """Put ``y`` ``(B, 1, H, W)`` on a periodic grid a kernel larger, or more: the new data, and the window of the picture.

    The fill solves ``argmin_u (1/2)||M (k * u) - y||^2 + (fill/2)||D u||^2`` on the grid, M the mask of what was seen, by
    conjugate gradients; outside the picture the new data are ``k * u``, inside they are ``y``.
    """
    (height, width), (h, w) = y.shape[-2:], kernel.shape
    tall, wide = (good_size(max(n, 16)) for n in (height + h - 1, width + w - 1))  # 16: room for a learned metric
    top, left = (tall - height) // 2, (wide - width) // 2
    window = (slice(top, top + height), slice(left, left + width))
    start = nnf.pad(y, (left, wide - width - left, top, tall - height - top), mode="replicate")
    mask = torch.zeros_like(start[:1])
    mask[(..., *window)] = 1
    blur, gradient = Blur(kernel), Gradient()
    u = conjugate_gradient(
        lambda v: blur.A_adjoint(mask * blur.A(v)) + fill * gradient.A_adjoint(gradient.A(v)),
        blur.A_adjoint(mask * start),
        x0=start,
        rtol=1e-2,
    )
    return torch.where(mask > 0, start, blur.A(u)), window


def _on_grid(
    kernel: Tensor, sigma: float, model: str, boundary: str, steps: int | None, progress: bool, y: Tensor
) -> Outcome:
    """The model on ``y`` ``(B, 1, H, W)``, which is periodic or has first to be put on a periodic grid."""
    z, window = extend(y, kernel) if boundary == "unknown" else (y, (slice(None), slice(None)))
    outcome = MODELS[model].run(z, Blur(kernel), sigma, steps, progress)
    outcome.x = outcome.x[(..., *window)]
    return outcome


# The models: each runs on a periodic grid.


def _ipadnet(z: Tensor, blur: Blur, sigma: float, steps: int | None, progress: bool) -> Outcome:
    card, network = weights.card("padnet-image"), weights.load("padnet-image").to(z)
    plan = card["schedule"]
    schedule = Schedule.between(plan["first"], sigma, plan["depth"])
    problem = Problem(LeastSquares(blur, z, 1 / sigma**2))
    result = propagate(Implicit(network, schedule), problem, z, steps=steps or plan["depth"], progress=progress)
    return Outcome(result.x, result, theorem_2(result, schedule, card["network"]["bound"] * z[0].numel() ** 0.5))


def theorem_2(result: Result, schedule: Schedule, allowed: float) -> dict[str, Any]:
    """PADNet's Theorem 2 on this run: its inequalities, with C_N as the network's clipping allows it, and the path left.

    Were the schedule continued, v would move at most ``sum_j C_N alpha_j + M / rho_j`` further, C_N and M as measured here.
    """
    checks = bounded_moves(result.trace, allowed, schedule, slack=ROUND_OFF)
    alpha, slope = result.trace["alpha"], result.trace["fidelity_gradient"].amax(0)
    moves, last, growth = (result.trace["dual"] / alpha).amax(0), alpha[-1], float(schedule.growth)
    rest = moves * last / (growth**0.5 - 1) + slope * last**2 / (growth - 1) if growth > 1 else last * torch.inf
    return {
        "guarantee": "PADNet, Theorem 2 with corrected constants: bounded network, geometric step sizes, convex fidelity",
        "statement": "the iterates stop; the point where they stop minimises no known energy",
        "holds": all(check.holds for check in checks) and growth > 1,
        "margin": min(check.margin for check in checks),
        "C_N_allowed": allowed,
        "C_N": moves.max().item(),
        "M": slope.max().item(),
        "growth": growth,
        "remaining_path_at_most": rest.max().item(),
    }


def epadnet_setup(z: Tensor, blur: Blur, sigma: float) -> tuple[Explicit, Problem, Tensor]:
    """The step, the energy (PADNet 15, p = 0.8) and the start of explicit PADNet: the gradient of the implicit one's image.

    The start carries what the network knows: error correction moves at most like a gradient step of F, so from the data's
    own gradient no proposal, however good, could be followed in one step.
    """
    network, gradient = weights.load("padnet-image").to(z), Gradient()
    fidelity = LinkedGradient(blur, gradient, z, EPADNET_BETA)
    problem = Problem(fidelity, Lp(0.8, EPADNET_FACTOR * sigma**2))
    lipschitz = problem.lipschitz
    constants = Constants(EPADNET_MOREAU * lipschitz, EPADNET_STEP / lipschitz, EPADNET_TOLERANCE * lipschitz)
    constants.check(lipschitz)

    def proposal(g: Tensor, alpha: float) -> Tensor:  # the image network between the link layer and the gradient
        return gradient.A(network(fidelity.image(g), alpha))

    step = Explicit([proposal], constants, Schedule(sigma**-2, 1.0), halvings=EPADNET_HALVINGS)
    return step, problem, gradient.A(_ipadnet(z, blur, sigma, None, False).x)


def _epadnet(z: Tensor, blur: Blur, sigma: float, steps: int | None, progress: bool) -> Outcome:
    """Explicit PADNet on the gradient domain."""
    step, problem, start = epadnet_setup(z, blur, sigma)
    result = propagate(step, problem, start, steps=steps or EPADNET_STEPS, tol=EPADNET_STOP, progress=progress)
    return Outcome(problem.fidelity.image(result.x), result, _theorem_1(result, step.constants))  # type: ignore[attr-defined]


def _theorem_1(result: Result, constants: Constants) -> dict[str, Any]:
    """PADNet's Theorem 1 on this run: the descent that each step must reach, and the error condition."""
    words = {
        "guarantee": "PADNet, Theorem 1 repaired: error condition or fallback at each step, convex fidelity, kappa > 0",
        "statement": "the energy falls by kappa ||change||^2 or more at every step; cluster points are critical points",
    }
    return certified_descent(result, constants.kappa, constants.tolerance, words)


def _tv(z: Tensor, blur: Blur, sigma: float, steps: int | None, progress: bool) -> Outcome:
    weight = TV_FACTOR * sigma**2
    words = {
        "guarantee": "ADMM on a convex energy, any penalty (known theory)",
        "statement": "converges to a minimiser",
        "holds": True,
    }
    return _admm(z, blur, GroupLp(1, weight), TV_PENALTY * weight, words, steps, progress)


def _l08(z: Tensor, blur: Blur, sigma: float, steps: int | None, progress: bool) -> Outcome:
    weight = L08_FACTOR * sigma**2
    words = unproved("no theorem covers ADMM on this nonconvex energy as it is run")
    return _admm(z, blur, Lp(0.8, weight), L08_PENALTY * weight, words, steps, progress)


def _admm(z: Tensor, blur: Blur, prior: Any, penalty: float, words: dict, steps: int | None, progress: bool) -> Outcome:
    problem = Problem(LeastSquares(blur, z), prior, Gradient())
    result = propagate(ADMM(penalty), problem, z, steps=steps or CLASSICAL_STEPS, tol=TOLERANCE, progress=progress)
    gap = norm_items(Gradient().A(result.x) - result.state.aux["v"]).max().item()
    return Outcome(result.x, result, words | {"splitting_gap": gap})


def wavelet_prior(z: Tensor, weight: float) -> Analysis:
    """``weight ||W x||_1`` on all but the coarse band, for images like ``z``."""
    return details(z, weight, wavelet=WAVELET, levels=LEVELS)


def _fista(z: Tensor, blur: Blur, sigma: float, steps: int | None, progress: bool) -> Outcome:
    if any(side % 2**LEVELS for side in z.shape[-2:]):
        raise ValueError(f"boundary: fista-wavelet with circular expects sides that are multiples of {2**LEVELS}")
    problem = Problem(LeastSquares(blur, z), wavelet_prior(z, WAVELET_FACTOR * sigma**2))
    result = propagate(FISTA(), problem, z, steps=steps or CLASSICAL_STEPS, tol=TOLERANCE, progress=progress)
    words = FISTA_WORDS | {"L": problem.lipschitz, "residual": problem.residual(result.x).max().item()}
    return Outcome(result.x, result, words)


MODELS = {  # each run as run(z, blur, sigma, steps, progress)
    "ipadnet": Model(_ipadnet, "implicit PADNet on the image domain, the prior in the network; stops by Theorem 2"),
    "epadnet": Model(_epadnet, "explicit PADNet on the gradient domain, l0.8 energy, error-corrected; descent by Theorem 1"),
    "rpodm": Model(rpodm, "relaxed PODM, networks and metrics trained end to end, nothing checked"),
    "podm": Model(podm, "PODM on an l0.8 energy of Haar coefficients, error-corrected; descent by Proposition 1"),
    "gdc": Model(gdc, "GDC's cascade of data step, generative, discriminative and corrective module, trained jointly"),
    "gdc-pcm": Model(gdc_pcm, "GDC's Algorithm 1 on an l1 energy of Haar coefficients; descent by Proposition 1"),
    "hodl": Model(hodl, "HODL: wavelet proximal gradient after a network, one map for all steps, trained through them"),
    "hodl-nonexpansive": Model(nonexpansive, "the same with a network of Lipschitz constant 1: converges, restores less"),
    "dgunet": Model(dgunet.deblur, "DGUNet, one network for three tasks; without a kernel one that learned motion blur"),
    "tv": Model(_tv, "isotropic total variation by ADMM"),
    "l08": Model(_l08, "l0.8 on the gradient by ADMM"),
    "fista-wavelet": Model(_fista, "l1 on orthonormal wavelet coefficients by FISTA"),
}
