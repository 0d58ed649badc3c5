"""DGUNet's gradient step with a known A: with a proximal map it is proximal gradient, and what that is known for holds.

No theorem covers the learned step or the network; `learned_norm` measures the learned one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from odlkit.certify import Check, descent, entry, inequality, row
from odlkit.instances import blurred, gaussian, picture
from odlkit.models.dgunet import GradientStep
from odlkit.networks.normalize import local_norm
from odlkit.operators import BlockSampling, Mask, Wavelet
from odlkit.priors import Analysis, Lp, Zero
from odlkit.problem import LeastSquares, Prior, Problem, norm_items
from odlkit.propagate import Record, Result, State, Trace, propagate

FACTORS = (0.5, 1.0, 1.9)  # rho ||A||^2 of the instances
BEYOND = 2.1  # of the controls


@dataclass
class Stage:
    """``x+ = prox_{rho J}(v)``, ``v`` of `GradientStep`; records how far it is from proximal gradient by differentiation.

    Eq: DGUNet (3), (4), (5), with ``rho J`` where the paper has ``J``.
    """

    gradient: GradientStep

    def init(self, problem: Problem, x0: Tensor) -> State:
        return State(x0)

    def __call__(self, problem: Problem, state: State) -> tuple[State, Record]:
        f, rho = problem.fidelity, self.gradient.rho.item()
        x = problem.prox_prior(self.gradient(state.x, f.y, f.operator), rho)  # type: ignore[attr-defined]
        with torch.enable_grad():
            z = state.x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(f.value(z).sum(), z)
        return state.next(x), {"error": norm_items(x - problem.prox_prior(state.x - rho * slope, rho))}


def instances(size: int = 64) -> dict[str, tuple[LeastSquares, Prior]]:
    """Name -> data term and prior: a blur, known pixels, and random measurements of blocks; the l1 norm and none."""
    generator = torch.Generator().manual_seed(0)
    blur, y = blurred("camera", size, gaussian())
    mask = Mask((torch.rand(1, 1, size, size, generator=generator) < 0.5).double())
    phi = torch.randn(64, 256, generator=generator, dtype=torch.float64) / 16  # no orthonormal rows: ||A|| > 1
    blocks = BlockSampling(phi)
    return {
        "camera, blur": (LeastSquares(blur, y), Analysis(Wavelet("haar", 3), Lp(1, 2e-3))),
        "coins, known pixels": (
            LeastSquares(mask, mask.A(picture("coins", size))),
            Analysis(Wavelet("haar", 3), Lp(1, 2e-3)),
        ),
        "astronaut, measured blocks": (LeastSquares(blocks, blocks.A(picture("astronaut", size))), Zero()),
    }


def two_runs(problem: Problem, rho: float, steps: int) -> tuple[Result, float]:
    """The stage from ``A^T y`` and from there along the largest eigenvector of ``A^T A``; records their ``distance``."""
    f = problem.fidelity
    start = f.operator.A_adjoint(f.y)  # type: ignore[attr-defined]
    v = torch.randn(start.shape, generator=torch.Generator().manual_seed(1), dtype=start.dtype)
    for _ in range(50):
        v = f.operator.normal(v / v.norm())  # type: ignore[attr-defined]
    step = GradientStep(1, known=True).double().requires_grad_(False)
    step.rho.fill_(rho)
    measure = {"distance": lambda state: norm_items(state.x[:1] - state.x[1:])}
    result = propagate(Stage(step), problem, torch.cat([start, start + v]), steps=steps, measure=measure, raises=False)
    return result, v.norm().item()


def checks(trace: Trace, start: float, kappa: float, slack: float = 1e-13) -> list[Check]:
    """The stage is proximal gradient, shrinks distances, and lowers ``F`` by ``kappa ||x+ - x||^2``, up to round-off."""
    distance, floor = trace["distance"][:, :1], slack * trace["norm"].amax(1, keepdim=True)
    before = torch.cat([torch.full_like(distance[:1], start), distance[:-1]])
    return [
        inequality("proximal gradient", trace["error"], 1e-12 * trace["norm"], 0 * trace["norm"]),
        inequality("distances", distance, before, floor),
        descent(trace, kappa, slack),
    ]


def gradient_step(size: int = 64, steps: int = 30) -> dict:
    """Known A, ``rho <= 2 / ||A||^2``: on three problems, with three rho; the controls take a longer one.

    ``kappa = 1 / rho - ||A||^2 / 2``, zero at the end of the interval.  Eq: DGUNet (6).
    """
    rows, controls = [], []
    for name, (fidelity, prior) in instances(size).items():
        problem = Problem(fidelity, prior)
        L = problem.lipschitz
        for factor in FACTORS:
            result, start = two_runs(problem, factor / L, steps)
            made = checks(result.trace, start, L / factor - L / 2)
            rows.append(row(name, f"rho = {factor} / ||A||^2", made, result) | {"norm_squared": L})
        result, start = two_runs(Problem(fidelity, Zero()), BEYOND / L, 2 * steps)
        trace = result.trace
        same, distances, falls = checks(trace, start, 0.0)
        grown = trace["distance"][-1, 0].item() / start
        controls.append({"what": f"{name}, rho = {BEYOND} / ||A||^2", "iterations": result.iterations, "grown": grown,
                         "violates": same.holds and not distances.holds and not falls.holds and grown > 2})  # fmt: skip
    return entry(rows, [], controls)


def learned_norm(step: GradientStep, x: Tensor, y: Tensor, steps: int = 30) -> float:
    """The norm of the derivative of ``x -> v`` at ``x``, with the learned maps: above 1, distances grow there.

    A bound from below on the Lipschitz constant, measured by power steps.  Eq: DGUNet (7).
    """
    return local_norm(lambda v: step(v, y.to(v), None), x, steps)
