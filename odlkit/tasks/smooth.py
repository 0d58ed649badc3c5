"""Edge-preserving smoothing: texture and noise go, edges stay, by l0 priors; nothing is degraded and nothing restored.

Two energies.  Gradient l0 (Xu et al. 2011, the prior that the paper cites), split so that its parts have closed forms:

    Psi(S, h) = ||S - y||^2 + beta ||D S - h||^2 + lambda #{i : h_i != 0},

h a pair a pixel that all channels share, beta growing from 2 lambda by factors of 2.  And Table I's l0 of an orthonormal
wavelet transform, whose global minimiser is a hard threshold: nothing to iterate, and blocky.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from odlkit import weights
from odlkit.certify import descent
from odlkit.linear import Operator
from odlkit.models.gdc import Cascade, Discriminative, FullyDefined, Generative, Module, cascade
from odlkit.operators import Gradient, Identity
from odlkit.priors import GroupLp, details
from odlkit.problem import LeastSquares, Problem
from odlkit.propagate import Step, propagate
from odlkit.solvers import ProximalGradient
from odlkit.tasks.report import ROUND_OFF, Model, Outcome, check_image, check_model, good_size, report

LAST = 1e4  # beta grows up to here, where D S and h differ by less than a gray level
WAVELET = 3  # levels of the Haar transform
GDC_STEPS = 2  # of Algorithm 1 at each beta: one with the learned modules, one without
MARGIN = 1e-8  # of the energy's decrease; L grows with beta, so a margin in units of L must be small


def smooth(
    y: Tensor, strength: float = 0.02, model: str = "gdc", *, steps: int | None = None, progress: bool = False
) -> tuple[Tensor, dict[str, Any]]:
    """Smooth ``y``: an image of its shape, and a report of the run.

    ``y`` is ``(B, C, H, W)`` in [0, 1]; ``strength`` is lambda: a pixel may have a gradient where that lowers the energy by
    lambda or more.  ``model`` is one of `MODELS`; ``steps`` are those at each beta.  The picture is continued by reflection
    to sides that the transforms like.  Raises ``ValueError`` for bad arguments and `PropagationError` when a run diverges.
    """
    clock = time.monotonic()
    check_model(model, MODELS)
    check_image(y)
    if not 0 < strength < 1:
        raise ValueError(f"strength: expected a number in (0, 1), the price of an edge pixel, got {strength}")
    height, width = y.shape[-2:]
    grid = nnf.pad(y, (0, good_size(width) - width, 0, good_size(height) - height), mode="replicate")
    outcome = MODELS[model].run(grid, float(strength), steps, progress)
    x = outcome.x[..., :height, :width]
    return x, report("smooth", model, clock, [outcome], y, x, settings={"strength": float(strength)})


class Split(Operator):
    """``K (S, h) = (S, sqrt(beta) (D S - h))`` on ``(B, 3 C, H, W)``: S in the first C channels, then h.

    ``K^T K`` has the eigenvalues of ``[[1 + beta s, -beta sqrt s], [-beta sqrt s, beta]]``, s those of ``D^T D`` (0 to 8),
    and beta.  With ``T = 1 + 9 beta`` they lie between the roots ``(T -+ sqrt(T^2 - 4 beta)) / 2`` at s = 8.
    """

    def __init__(self, beta: float):
        self.beta, self.gradient = beta, Gradient()

    def A(self, x: Tensor) -> Tensor:
        s, h = x.split([x.shape[1] // 3, x.shape[1] - x.shape[1] // 3], 1)
        return torch.cat([s, self.beta**0.5 * (self.gradient.A(s) - h)], 1)

    def A_adjoint(self, y: Tensor) -> Tensor:
        s, h = y.split([y.shape[1] // 3, y.shape[1] - y.shape[1] // 3], 1)
        return torch.cat([s + self.beta**0.5 * self.gradient.A_adjoint(h), -(self.beta**0.5) * h], 1)

    def eigenvalue_range(self, x: Tensor) -> tuple[float, float]:
        trace = 1 + 9 * self.beta
        root = (trace**2 - 4 * self.beta) ** 0.5
        return 2 * self.beta / (trace + root), (trace + root) / 2


class SplitPrior:
    """``lambda #{i : h_i != 0}`` of the part h of ``(S, h)``, a pixel's h over all channels together; S is free."""

    convex = False

    def __init__(self, weight: float):
        self.weight = weight

    def _group(self, x: Tensor) -> tuple[Tensor, GroupLp]:
        h = x[:, x.shape[1] // 3 :]
        return h, GroupLp(0, self.weight, h.shape[1])

    def value(self, x: Tensor) -> Tensor:
        h, count = self._group(x)
        return count.value(h)

    def prox(self, z: Tensor, step: Tensor | float) -> Tensor:
        h, count = self._group(z)
        return torch.cat([z[:, : z.shape[1] // 3], count.prox(h, step)], 1)


def split_problem(y: Tensor, strength: float, beta: float) -> Problem:
    """``Psi(S, h)`` for one beta, with ``L`` in closed form."""
    data = torch.cat([y, torch.zeros_like(y).repeat(1, 2, 1, 1)], 1)
    return Problem(LeastSquares(Split(beta), data, 2.0), SplitPrior(strength))


def betas(strength: float) -> list[float]:
    """2 lambda, doubled as long as it stays at `LAST` or below."""
    found = [2 * strength]
    while 2 * found[-1] <= LAST:
        found.append(2 * found[-1])
    return found


def alternate(y: Tensor, strength: float, beta: float) -> Module:
    """Exact minimisation of Psi in h, then in S: keep ``D S`` where ``||D S||^2 > lambda / beta``, then a Fourier solve."""
    gradient = Gradient()

    def module(problem: Problem, u: Tensor, stage: int) -> Tensor:
        slopes = gradient.A(u[:, : y.shape[1]])
        h = GroupLp(0, strength, slopes.shape[1]).prox(slopes, 0.5 / beta)
        rhs = y + beta * gradient.A_adjoint(h)
        s = torch.fft.irfft2(torch.fft.rfft2(rhs) / (1 + beta * gradient.gram(y)), s=y.shape[-2:])
        return torch.cat([s, h], 1)

    return module


def _continue(y: Tensor, strength: float, step: Callable[[float], Step], steps: int, progress: bool) -> Outcome:
    """Run ``step(beta)`` on the energy of each beta in turn; the descent of each is certified by itself."""
    from tqdm import tqdm

    u, ladder, results = torch.cat([y, Gradient().A(y)], 1), betas(strength), []
    for beta in tqdm(ladder, desc="beta", delay=3, leave=False, disable=not progress):
        results.append(propagate(step(beta), split_problem(y, strength, beta), u, steps=steps))
        u = results[-1].x
    checks = [descent(result.trace, 0.0, slack=ROUND_OFF) for result in results]
    decided = [result.trace["accepted"] for result in results if "accepted" in result.trace]
    words = {
        "guarantee": "every step lowers the energy of its beta (exact minimisation, or GDC's Algorithm 1)",
        "statement": "each energy falls; nothing is known from one beta to the next, nor of a global minimum",
        "holds": all(check.holds for check in checks),
        "margin": min(check.margin for check in checks),
        "betas": len(ladder),
    }
    if decided:
        words["acceptance_rate"] = torch.cat(decided).mean().item()
    last, count = results[-1], sum(result.iterations for result in results)
    return Outcome(u[:, : y.shape[1]], replace(last, iterations=count), words)


def _l0(y: Tensor, strength: float, steps: int | None, progress: bool) -> Outcome:
    return _continue(y, strength, lambda beta: Cascade([alternate(y, strength, beta)]), steps or 1, progress)


def _gdc(y: Tensor, strength: float, steps: int | None, progress: bool) -> Outcome:
    """Algorithm 1 on each energy: G and D move S at the level sqrt(lambda / beta), the least edge, at even stages."""
    network, classifier = (weights.load(name).to(y) for name in ("gdc-generator", "gdc-classifier"))
    plan = weights.card("gdc-classifier")["schedule"]

    def step(beta: float) -> Step:
        level = min((strength / beta) ** 0.5, plan["first"])
        moves: list[Module] = [Generative(network, lambda stage: level)]
        moves.append(Discriminative(classifier.potential, lambda stage: level, plan["step"]))  # type: ignore[arg-type]

        def learned(problem: Problem, u: Tensor, stage: int) -> Tensor:
            if stage % 2 or level < plan["last"]:
                return u
            planes = u[:, : y.shape[1]].reshape(-1, 1, *y.shape[-2:])  # each channel by itself
            planes = cascade(moves, problem, planes, stage)
            return torch.cat([planes.reshape(y.shape), u[:, y.shape[1] :]], 1)

        return FullyDefined([learned, alternate(y, strength, beta)], margin=MARGIN)

    return _continue(y, strength, step, steps or GDC_STEPS, progress)


def _haar(y: Tensor, strength: float, steps: int | None, progress: bool) -> Outcome:
    """``||u - y||^2 + lambda ||B^T u||_0`` on all but the coarse band: one proximal step is its global minimiser."""
    problem = Problem(LeastSquares(Identity(), y, 2.0), details(y, strength, 0.0, levels=WAVELET))
    result = propagate(ProximalGradient(0.5), problem, y, steps=1)
    words = {
        "guarantee": "a closed form: hard thresholding of orthonormal coefficients at sqrt(lambda)",
        "statement": "the global minimiser",
        "holds": descent(result.trace, 0.0, slack=ROUND_OFF).holds,
    }
    return Outcome(result.x, result, words)


MODELS = {  # each run as run(y, strength, steps, progress)
    "gdc": Model(_gdc, "l0 of the gradient by GDC's Algorithm 1: learned modules propose, the energy decides"),
    "l0": Model(_l0, "l0 of the gradient by half-quadratic splitting"),
    "haar-l0": Model(_haar, "l0 of Haar coefficients, GDC's Table I, in closed form"),
}
