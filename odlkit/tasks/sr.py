"""Super-resolution by 2, 3 and 4: an image from its low-resolution version ``y = (k * x) decimated``, without noise.

The low-resolution picture is continued on all sides to a larger periodic grid (`extend`), so that every closed form in the
Fourier domain applies and Haar's blocks fit; what a certificate says, it says about the problem on that grid.  Of a colour
picture the luminance is restored by the model and the two chrominances by bicubic interpolation, as the tables score it.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as nnf

from odlkit import weights
from odlkit.metrics import luminance
from odlkit.models.padnet import Network, Schedule
from odlkit.models.podm import PODM, Constants, Relaxed
from odlkit.operators import BlurDecimate, Wavelet
from odlkit.priors import Analysis, Box, Lp
from odlkit.problem import LeastSquares, Problem
from odlkit.propagate import Record, Result, State, Trace, propagate
from odlkit.solvers import FISTA, PlugAndPlay, tikhonov
from odlkit.tasks import dgunet
from odlkit.tasks.deblur_podm import proposition_1
from odlkit.tasks.report import Model, Outcome, check_image, check_model, formula, good_size, report, unit_kernel, unproved

SCALES = (2, 3, 4)
SMOOTH = 1e-3  # weight of the smoothness in the interpolation that relaxed PODM starts from
MARGIN = 8  # low-resolution pixels that the grid is larger than the picture, at least, on each side

# Settings, chosen on the last pictures of train400 (`odlkit bench podm-sr-weights`).
POWER, LEVELS = 0.8, 3  # of the energy: p, and the levels of Haar's wavelet
LAMBDA = 1e-6  # its weight where a blur goes before decimation: the best for FISTA, and the smallest tried
LAMBDA_PLAIN = {2: 1e-5, 3: 1e-4, 4: 1e-4}  # where none does
STEPS = 16  # of FISTA, and of PODM with its start
START_STAGES, START_PENALTY, START_LEVELS = 8, 0.01, (0.02, 0.01)  # PODM's learned start
PENALTY, SHARE, LENGTH, HALVINGS = 3.0, 0.95, 1e-2, 2  # mu / L, c's share, part of the network's move, half-moves
NETWORK_LEVEL = 0.003  # alpha of the controlled stages
PNP_STAGES, PNP_SIGMA, PNP_LEVELS = 8, 0.003, (0.05, 0.01)
RPODM_SIGMA = 0.01  # the noise level that the network was trained to be told


def super_resolve(
    y: Tensor,
    scale: int,
    model: str = "rpodm",
    kernel: Tensor | None = None,
    *,
    steps: int | None = None,
    progress: bool = False,
) -> tuple[Tensor, dict[str, Any]]:
    """Enlarge ``y``, the decimation of ``k * x`` from the first pixel on: ``(B, C, s H, s W)``, and a report of the run.

    ``y`` is ``(B, C, H, W)`` in [0, 1], C = 1 or 3; of three channels the luminance is restored by ``model``, one of
    `MODELS`, and the rest is bicubic.  ``scale`` is 2, 3 or 4.  ``kernel`` ``(h, w)``, centre at ``(h // 2, w // 2)``, is
    scaled to sum 1; ``None`` is the antialiased bicubic reduction of MATLAB and Pillow, one pixel is plain decimation.
    Raises ``ValueError`` for bad arguments and `PropagationError` when a run diverges.
    """
    clock = time.monotonic()
    kernel, notes = check(y, scale, model, kernel)
    gray = y if y.shape[1] == 1 else luma(y)
    z, window = extend(gray, scale, kernel)
    operator = BlurDecimate(kernel, scale)
    outcome = MODELS[model].run(operator, z, scale, steps, progress)
    x = outcome.x[(..., *window)]
    if y.shape[1] == 3:
        colours = enlarge(y, scale, kernel)
        x = colours + (x - luma(colours))  # the same change of all channels keeps both chrominances
    settings = {"scale": scale, "lambda": default_weight(operator) if model in ("fista", "podm") else None}
    about = {"input": {"kernel": list(kernel.shape)}, "settings": settings, "notes": notes}
    told = report("sr", model, clock, [outcome], y, x, **about)
    told["certificate"]["of"] = "the problem for the luminance, on the larger periodic grid"
    return x, told


def check(y: Tensor, scale: int, model: str, kernel: Tensor | None) -> tuple[Tensor, list[str]]:
    """The kernel scaled to sum 1, and notes.  Raises ``ValueError`` naming the first bad argument."""
    check_model(model, MODELS)
    if scale not in SCALES:
        raise ValueError(f"scale: expected 2, 3 or 4, got {scale}")
    check_image(y, (1, 3))
    if kernel is None:
        return bicubic_kernel(scale).to(y), []
    limit = (scale * y.shape[-2], scale * y.shape[-1])
    kernel, notes = unit_kernel(kernel.to(y.device), limit, "the enlarged image")
    if model in ("rpodm", "dgunet") and kernel.numel() > 1:
        notes.append(f"kernel: {model} was trained for bicubic reduction and plain decimation, not for this one")
    return kernel.to(y.dtype), notes


def bicubic_kernel(scale: int) -> Tensor:
    """The kernel of MATLAB's and Pillow's antialiased bicubic reduction, ``(4 s + 3, 4 s + 3)`` float64, sum 1.

    ``w(t) = c((t - (s - 1) / 2) / s)`` with the cubic of parameter -1/2; convolved and decimated from the first pixel on,
    it gives their result exactly away from the border.
    """
    offset = torch.arange(2 * scale + 1, -2 * scale - 2, -1, dtype=torch.float64)  # a convolution weighs x[n - m] by k[m]
    t = ((offset - (scale - 1) / 2) / scale).abs()
    near = 1.5 * t**3 - 2.5 * t**2 + 1
    far = -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    weights = torch.where(t < 1, near, torch.where(t < 2, far, torch.zeros_like(t)))
    kernel = weights[:, None] * weights
    return kernel / kernel.sum()


def luma(rgb: Tensor) -> Tensor:
    """``0.299 R + 0.587 G + 0.114 B``: `odlkit.metrics.luminance` in full swing, ``(B, 1, H, W)``."""
    return (255 * luminance(rgb) - 16) / 219


def enlarge(y: Tensor, scale: int, kernel: Tensor) -> Tensor:
    """Pillow's bicubic interpolation, ``(B, C, s H, s W)``, placed where the kernel took its samples from.

    Pixel i of ``y`` saw the scene around ``s i + o``, o the centroid of the mirrored kernel: ``(s - 1) / 2`` for the
    bicubic reduction, 0 for plain decimation.
    """
    from PIL import Image

    (height, width), edge = y.shape[-2:], 3
    total = kernel.sum()
    rows, columns = (torch.arange(n, device=kernel.device) - n // 2 for n in kernel.shape)
    corner = [  # left, top of the window of y that the result shows; pixel i has its centre at i + 1/2 + edge
        edge + 0.5 - (0.5 - (kernel.sum(dim) * place).sum().item() / total.item()) / scale
        for dim, place in ((0, columns), (1, rows))
    ]
    box = (corner[0], corner[1], corner[0] + width, corner[1] + height)
    padded = nnf.pad(y.detach().float().cpu(), (edge,) * 4, mode="replicate").flatten(0, 1).numpy()
    size = (width * scale, height * scale)
    planes = [np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC, box=box)) for p in padded]
    return torch.from_numpy(np.stack(planes)).to(y).view(*y.shape[:2], size[1], size[0])


def bicubic(operator: BlurDecimate, y: Tensor) -> Tensor:
    """`enlarge` for this operator: where the classical iterations, plug-and-play and certified PODM start."""
    return enlarge(y, operator.decimation.factor, operator.blur.kernel)


def extend(y: Tensor, scale: int, kernel: Tensor) -> tuple[Tensor, tuple[slice, slice]]:
    """``y`` continued by its border pixels to a periodic grid; and the window of the picture on the enlarged grid.

    The enlarged grid has sides of `good_size`, multiples of ``2 ** LEVELS`` and of the scale.
    """
    margin, block = max(MARGIN, -(-max(kernel.shape) // scale)), math.lcm(2**LEVELS, scale)
    pads, window = [], []
    for n in y.shape[-2:]:
        total = good_size(scale * (n + 2 * margin), block) // scale
        before = (total - n) // 2
        pads.append((before, total - n - before))
        window.append(slice(scale * before, scale * (before + n)))
    return nnf.pad(y, (*pads[1], *pads[0]), mode="replicate"), (window[0], window[1])


# The models: each runs on a periodic grid.


def default_weight(operator: BlurDecimate) -> float:
    """lambda as it was tuned for FISTA."""
    return LAMBDA_PLAIN[operator.decimation.factor] if operator.blur.kernel.numel() == 1 else LAMBDA


def energy(operator: BlurDecimate, y: Tensor, weight: float | None = None) -> Problem:
    """``||A x - y||^2 + weight ||W x||_0.8^0.8`` with Haar's orthonormal W, three levels.

    In the coefficients ``a = W x`` it is ``||D a - y||^2 + weight ||a||_p^p`` with ``D = A W^T``: the same iterates.
    Source: PODM section 5.1.
    """
    weight = default_weight(operator) if weight is None else weight
    return Problem(LeastSquares(operator, y, 2.0), Analysis(Wavelet("haar", LEVELS), Lp(POWER, weight)))


@dataclass
class LearnedStart:
    """Some stages ``x+ = F(A(x))`` without a check, levels falling, then the controlled solver.  All of them are counted.

    The optimality error allows moves of about the length of a proximal-gradient step; what the network knows enters here.
    Eq: PODM (2), (3).
    """

    solver: PODM
    network: Network
    schedule: Schedule
    stages: int = START_STAGES
    penalty: float = START_PENALTY

    def init(self, problem: Problem, x0: Tensor) -> State:
        return self.solver.init(problem, x0)

    def __call__(self, problem: Problem, state: State) -> tuple[State, Record]:
        if state.k >= self.stages:
            return self.solver(problem, state)
        x_a = self.network(state.x, self.schedule(state.k)[1])
        return state.next(problem.fidelity.prox(x_a, 1 / self.penalty)), {}


def shortened(network: Network, length: float) -> Network:
    """``x + length (A(x) - x)``: the part of the network's move that the optimality error can accept."""
    return lambda x, level: torch.lerp(x, network(x, level), length)


def podm_setup(operator: BlurDecimate, y: Tensor, weight: float | None = None) -> tuple[LearnedStart, Problem, Tensor]:
    """Certified PODM with its learned start, its energy, and the bicubic interpolation that it begins from."""
    network, problem = weights.load("podm-denoiser").to(y), energy(operator, y, weight)
    constants = Constants.for_lipschitz(problem.lipschitz, PENALTY, SHARE)
    constants.check(problem.lipschitz)
    solver = PODM([shortened(network, LENGTH)], constants, lambda stage: NETWORK_LEVEL, halvings=HALVINGS)
    schedule = Schedule.between(*START_LEVELS, START_STAGES)
    return LearnedStart(solver, network, schedule), problem, bicubic(operator, y)


def controlled(trace: Trace, stages: int) -> Trace:
    """The trace from the end of the start on: what was checked."""
    rest = Trace()
    rest.rows = trace.rows[stages:]
    rest.start = {"energy": trace.rows[stages - 1]["energy"]} if stages else dict(trace.start)
    return rest


def _podm(operator: BlurDecimate, y: Tensor, scale: int, steps: int | None, progress: bool) -> Outcome:
    step, problem, start = podm_setup(operator, y)
    result = propagate(step, problem, start, steps=max(steps or STEPS, step.stages + 1), progress=progress)
    return Outcome(result.x, result, judged(result, step))


def judged(result: Result, step: LearnedStart) -> dict[str, Any]:
    """Proposition 1 on the controlled stages of a run."""
    checked = replace(result, trace=controlled(result.trace, step.stages))
    about = {"unchecked_stages": step.stages, "share_of_the_networks_move": LENGTH}
    return proposition_1(checked, step.solver.constants) | about


def _rpodm(operator: BlurDecimate, y: Tensor, scale: int, steps: int | None, progress: bool) -> Outcome:
    net: Any = weights.load("rpodm-sr").to(y)
    problem = Problem(LeastSquares(operator, y, 2.0), Box(0.0, 1.0))
    start, count = tikhonov(operator, y, SMOOTH), steps or len(net)
    result = propagate(Relaxed(net, RPODM_SIGMA, scale), problem, start, steps=count, energy=False, progress=progress)
    return Outcome(result.x, result, unproved("relaxed PODM keeps every proposal: no theorem covers it"))


def _pnp(operator: BlurDecimate, y: Tensor, scale: int, steps: int | None, progress: bool) -> Outcome:
    network, schedule = weights.load("podm-denoiser").to(y), Schedule.between(*PNP_LEVELS, PNP_STAGES)
    problem = Problem(LeastSquares(operator, y, PNP_SIGMA**-2))
    step = PlugAndPlay(network, schedule.rho0, schedule.growth)
    result = propagate(step, problem, bicubic(operator, y), steps=steps or PNP_STAGES, progress=progress)
    return Outcome(result.x, result, unproved("plug-and-play has no energy and no check"))


def _fista(operator: BlurDecimate, y: Tensor, scale: int, steps: int | None, progress: bool) -> Outcome:
    problem, start = energy(operator, y), bicubic(operator, y)
    result = propagate(FISTA(), problem, start, steps=steps or STEPS, progress=progress)
    return Outcome(result.x, result, unproved("the theory of FISTA is for convex energies, and this one (p = 0.8) is not"))


def _bicubic(operator: BlurDecimate, y: Tensor, scale: int, steps: int | None, progress: bool) -> Outcome:
    x = bicubic(operator, y)
    return formula(x, "a formula, nothing is iterated")


MODELS = {
    "rpodm": Model(_rpodm, "relaxed PODM, trained end to end, five stages; nothing is checked"),
    "dgunet": Model(dgunet.super_resolve, "DGUNet that is given A, one network for three tasks; nothing is checked"),
    "podm": Model(_podm, "PODM on the l0.8 energy of Haar coefficients, a learned start, then descent by Proposition 1"),
    "fista": Model(_fista, "the same l0.8 energy by FISTA"),
    "pnp": Model(_pnp, "half-quadratic splitting with PODM's denoiser for the prior (plug-and-play)"),
    "bicubic": Model(_bicubic, "bicubic interpolation"),
}
