"""The classical solvers, as steps for `odlkit.propagate`: each is its update rule and nothing else.

Step sizes left at ``None`` are taken from the problem's own Lipschitz constant, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from odlkit.operators import FilterBank, Operator
from odlkit.problem import LeastSquares, Problem, add_scaled
from odlkit.propagate import Record, State


def tikhonov(operator: Operator, y: Tensor, weight: Tensor | float) -> Tensor:
    """``argmin_x ||A x - y||^2 + weight (||D x||^2 + 0.0009 ||x||^2)``, D the forward differences, in closed form.

    The smooth image that explains the data, aligned with A by construction: where iterations may start.  ``weight`` is a
    float or ``(B, 1, 1, 1)``; the small multiple of ``||x||^2`` keeps the problem definite where A has no constant part.
    """
    d = torch.zeros(3, 3, 3)
    d[0, 1, 0], d[1, 0, 1], d[:2, 1, 1], d[2, 1, 1] = 1.0, 1.0, -1.0, 0.03
    fidelity = LeastSquares(operator, y)
    return fidelity.nearest(torch.zeros_like(fidelity.back), weight, FilterBank(d.to(y)))


@dataclass
class GradientDescent:
    """``x+ = x - tau grad f(x)``, ``tau < 2 / L`` (default ``1 / L``).  Ignores the prior."""

    step_size: float | None = None

    def init(self, problem: Problem, x0: Tensor) -> State:
        return State(x0, aux={"step": self.step_size or 1 / problem.lipschitz})

    def __call__(self, problem: Problem, state: State) -> tuple[State, Record]:
        return state.next(add_scaled(state.x, problem.fidelity.grad(state.x), -state.aux["step"])), {}


@dataclass
class ProximalGradient:
    """``x+ = prox_{tau R}(x - tau grad f(x))`` (ISTA for l1).

    ``F`` falls for ``tau < 2 / L`` if R is convex and for ``tau < 1 / L`` whatever R is (default ``0.99 / L``).
    """

    step_size: float | None = None

    def init(self, problem: Problem, x0: Tensor) -> State:
        return State(x0, aux={"step": self.step_size or 0.99 / problem.lipschitz})

    def __call__(self, problem: Problem, state: State) -> tuple[State, Record]:
        tau = state.aux["step"]
        return state.next(problem.prox_prior(add_scaled(state.x, problem.fidelity.grad(state.x), -tau), tau)), {}


@dataclass
class FISTA:
    """``x+ = prox_{tau R}(z - tau grad f(z))``, ``z+ = x+ + ((t - 1) / t+) (x+ - x)``, ``t+ = (1 + sqrt(1 + 4 t^2)) / 2``.

    ``F(x^k) - F* <= 2 L ||x^0 - x*||^2 / (k + 1)^2`` for convex R (Beck and Teboulle 2009); default ``tau = 1 / L``.
    """

    step_size: float | None = None

    def init(self, problem: Problem, x0: Tensor) -> State:
        return State(x0, aux={"step": self.step_size or 1 / problem.lipschitz, "z": x0, "t": 1.0})

    def __call__(self, problem: Problem, state: State) -> tuple[State, Record]:
        tau, z, t = state.aux["step"], state.aux["z"], state.aux["t"]
        x = problem.prox_prior(add_scaled(z, problem.fidelity.grad(z), -tau), tau)
        t_next = (1 + (1 + 4 * t * t) ** 0.5) / 2
        return state.next(x, z=torch.lerp(state.x, x, 1 + (t - 1) / t_next), t=t_next), {}


def grown(first: float, growth: float, k: int) -> float:
    """``first growth^k``, held at 1e24: far beyond any effect, and before floats overflow."""
    try:
        return min(first * growth**k, 1e24)
    except OverflowError:
        return 1e24


@dataclass
class Splitting:
    """Alternate the fidelity and the prior on ``v = W x``, with a scaled dual ``nu`` or without.

    ``x+ = argmin f(x) + (rho/2) ||W x - (v - nu)||^2``,  ``v+ = prox_{R / rho}(W x+ + nu)``,  ``nu+ = nu + W x+ - v+``.

    With the dual this is ADMM; without it, half-quadratic splitting (HQS), which needs a growing ``rho`` to close the gap
    between ``W x`` and ``v``.  With a ``denoiser`` called as ``denoiser(z, rho^{-1/2})`` in place of the prox it is
    plug-and-play, which is the gradient of no known energy.  ``x`` is the image; without a transform it is ``v``, which is
    exactly sparse.  The unscaled dual ``rho nu`` is carried over when ``rho`` grows.

    Eq: PADNet (4), the step that its network replaces.
    """

    penalty: float
    growth: float = 1.0
    dual: bool = True
    denoiser: Callable[[Tensor, float], Tensor] | None = None

    def init(self, problem: Problem, x0: Tensor) -> State:
        v = x0 if problem.transform is None else problem.transform.A(x0)
        return State(x0, aux={"v": v, "nu": torch.zeros_like(v)})

    def __call__(self, problem: Problem, state: State) -> tuple[State, Record]:
        rho, v, nu = grown(self.penalty, self.growth, state.k), state.aux["v"], state.aux["nu"]
        x = problem.prox_fidelity(v - nu if self.dual else v, 1 / rho)
        t = x if problem.transform is None else problem.transform.A(x)
        t = t + nu if self.dual else t
        v = problem.prox_prior(t, 1 / rho) if self.denoiser is None else self.denoiser(t, rho**-0.5)
        if self.dual:
            nu = (t - v) / self.growth if self.growth != 1.0 else t - v
        return state.next(v if problem.transform is None else x, v=v, nu=nu), {}


def ADMM(penalty: float, growth: float = 1.0) -> Splitting:
    """The alternating direction method of multipliers: `Splitting` with the dual."""
    return Splitting(penalty, growth, dual=True)


def HQS(penalty: float, growth: float = 1.0) -> Splitting:
    """Half-quadratic splitting: `Splitting` without the dual."""
    return Splitting(penalty, growth, dual=False)


Denoiser = Callable[[Tensor, float], Tensor]  # (z, noise level) -> z


def PlugAndPlay(denoiser: Denoiser, penalty: float, growth: float = 1.0, dual: bool = False) -> Splitting:
    """Naive plug-and-play: a denoiser takes the prior's place, with no condition on it and no guarantee."""
    return Splitting(penalty, growth, dual=dual, denoiser=denoiser)
