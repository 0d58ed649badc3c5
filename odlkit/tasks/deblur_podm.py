"""PODM's two models of the deblurring task: relaxed, trained end to end, and controlled, on an l0.8 energy of wavelets.

Both take ``f(x) = ||A x - z||^2``, as the paper writes it.  A model is ``run(z, blur, sigma, steps, progress) -> Outcome``
on a periodic grid (`odlkit.tasks.deblur`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from odlkit import weights
from odlkit.models.padnet import Schedule
from odlkit.models.podm import PODM, Constants, Relaxed
from odlkit.operators import Blur
from odlkit.priors import Box, details
from odlkit.problem import LeastSquares, Problem
from odlkit.propagate import Result, propagate
from odlkit.solvers import PlugAndPlay, tikhonov
from odlkit.tasks.report import Outcome, certified_descent

# Settings of the controlled model, chosen on the last twelve images of train400 with random kernels.
LEVELS, FACTOR = 3, 3.0  # Haar levels; lambda = FACTOR sigma^2
START, FIRST, TRUST = 8, 0.2, 0.25  # stages of the start, the noise level of the first, and their weight against the data
LATER, HALVINGS = 0.5, 4  # level of the controlled stages in units of sigma, half-moves tried before the feedback
STOP, STEPS = 5e-4, 12  # relative change at which it stops, and the most stages
RELAXED_START = 100.0  # as in training: the smooth solution with this times sigma^2 is where relaxed PODM begins


def rpodm(z: Tensor, blur: Blur, sigma: float, steps: int | None, progress: bool) -> Outcome:
    """Relaxed PODM.  Its set Omega is the box [0, 1], which is `SparseBox` with s = n: all pixels may be nonzero.

    (The paper's Omega, bounded by the extrema of the data, is empty where min z > 0 unless s = n.)
    Source: PODM section 5.2.
    """
    net: Any = weights.load("rpodm-deblur").to(z)
    least = 2 * net.config["size"] - 1  # side of the kernel of W^T W
    if min(z.shape[-2:]) < least:
        raise ValueError(f"boundary: rpodm with circular expects sides of at least {least} pixels")
    problem = Problem(LeastSquares(blur, z, 2.0), Box(0.0, 1.0))
    start = tikhonov(blur, z, RELAXED_START * sigma**2)
    result = propagate(Relaxed(net, sigma), problem, start, steps=steps or len(net), energy=False, progress=progress)
    words = {
        "guarantee": "none: PODM relaxed, no optimality error is checked",
        "statement": "every pixel lies in [0, 1]; the stages are a network, trained to be few, and minimise nothing known",
        "holds": None,
    }
    return Outcome(result.x, result, words)


def podm_setup(z: Tensor, blur: Blur, sigma: float, factor: float = FACTOR) -> tuple[PODM, Problem, Tensor]:
    """The step, the energy ``||A x - z||^2 + lambda ||W x||_0.8^0.8``, W the Haar transform, and the start.

    The coarse band is not penalised.  The optimality error accepts moves of about a proximal-gradient step's length, so
    what the network knows has to be in the start: stages ``x = A(F(x))`` at falling noise levels, nothing checked, whose F
    has the weight ``mu = 2 TRUST (sigma / alpha)^2``, a part of what noise of level alpha in ``x_A`` would ask for.
    """
    network = weights.load("podm-denoiser").to(z)
    problem = Problem(LeastSquares(blur, z, 2.0), details(z, factor * sigma**2, 0.8, levels=LEVELS))
    constants = Constants.for_lipschitz(problem.lipschitz)
    constants.check(problem.lipschitz)
    schedule = Schedule.between(max(FIRST, sigma), sigma, START)
    unchecked = PlugAndPlay(network, schedule.rho0, schedule.growth)
    likelihood = Problem(LeastSquares(blur, z, 1 / (TRUST * sigma**2)))
    start = propagate(unchecked, likelihood, z, steps=START).x
    return PODM([network], constants, levels=lambda stage: LATER * sigma, halvings=HALVINGS), problem, start


def podm(z: Tensor, blur: Blur, sigma: float, steps: int | None, progress: bool) -> Outcome:
    """PODM with its optimality error, and the proximal feedback where that refuses.  Eq: PODM (2) to (7)."""
    if any(side % 2**LEVELS for side in z.shape[-2:]):
        raise ValueError(f"boundary: podm with circular expects sides that are multiples of {2**LEVELS}")
    step, problem, start = podm_setup(z, blur, sigma)
    result = propagate(step, problem, start, steps=steps or STEPS, tol=STOP, progress=progress)
    return Outcome(result.x, result, proposition_1(result, step.constants))


def proposition_1(result: Result, constants: Constants) -> dict[str, Any]:
    """PODM's Proposition 1, repaired, on this run: the descent of each stage's branch, and the optimality error."""
    words = {
        "guarantee": "PODM, Proposition 1 repaired: optimality error or feedback at each stage, convex fidelity, kappa > 0",
        "statement": "the energy falls by kappa ||change||^2 or more at every stage; cluster points are critical points",
    }
    return certified_descent(result, result.trace["kappa"], constants.tolerance, words)
