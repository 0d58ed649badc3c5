"""PADNet on image gradients: networks that change with the iteration, and an error correction that is repeated.

The problem is PADNet (14) over the gradient field g, ``min (weight / 2) ||k * g - D y||^2 + weight lambda ||g||_p^p``, with
``weight = 1 / (2 sigma^2)``, the inverse variance of the noise in ``D y``, so that penalties and noise levels are related by
``rho = alpha^{-2}`` as in Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from odlkit.control import Candidate, ErrorCondition, MonotoneEnergy
from odlkit.models.padnet import Constants, Explicit, Implicit, Schedule
from odlkit.networks import RBFUnit, ResidualNet
from odlkit.operators import Blur, Gradient
from odlkit.priors import Lp
from odlkit.problem import LeastSquares, Problem
from odlkit.propagate import Record, State, Step

BOUND = 3.0  # Condition 2's constant per value


def gradient_problem(y: Tensor, kernel: Tensor, sigma: float, p: float | None = None, lam: float = 0.0) -> Problem:
    """The energy above for a blurred image ``y`` ``(B, C, H, W)``, over ``(B, 2C, H, W)``; without a prior if p is None.

    Eq: PADNet (14), both terms times ``weight``.
    """
    weight = 0.5 / sigma**2
    prior = None if p is None else Lp(p, weight * lam)
    return Problem(LeastSquares(Blur(kernel), Gradient().A(y), weight), prior)


class Stages(nn.Module):
    """The networks ``N_{alpha_k}(.; W^k)``, one for each iteration k, as Algorithm 2 makes them."""

    def __init__(self, units: Sequence[Sequence[dict]] = (), bound: float | None = BOUND):
        super().__init__()
        self.nets = nn.ModuleList(ResidualNet([RBFUnit(**config) for config in stage], bound) for stage in units)
        self.bound = bound

    def __len__(self) -> int:
        return len(self.nets)

    def card(self) -> dict:
        """What rebuilds the shape of these networks: ``Stages(card["units"], card["bound"])``."""
        nets = cast(list[ResidualNet], list(self.nets))
        return {"kind": "rbf", "units": [[cast(RBFUnit, u).config for u in net.units] for net in nets], "bound": self.bound}


@dataclass
class Staged:
    """A step that changes with k: ``steps[k]``, and the last one for all later iterations."""

    steps: Sequence[Step]

    def init(self, problem: Problem, x0: Tensor) -> State:
        return self.steps[0].init(problem, x0)

    def __call__(self, problem: Problem, state: State) -> tuple[State, Record]:
        return self.steps[min(state.k, len(self.steps) - 1)](problem, state)


class BothConditions:
    """Accept iff Condition 1 holds and ``F(x+) <= F(x) - margin ||x+ - x||^2``.

    For a nonconvex prior Condition 1 alone does not make the energy fall (a two-cycle with zero error exists); with the
    second inequality it does, for any step size.  For a convex energy it follows from the first with
    ``margin = mu / 2 - C_E`` and is not evaluated.
    """

    def __init__(self, tolerance: float, margin: float):
        self.error, self.descent = ErrorCondition(tolerance), MonotoneEnergy(margin)

    def __call__(self, problem: Problem, candidate: Candidate) -> Tensor:
        small = self.error(problem, candidate)
        if getattr(problem.prior, "convex", False) or not bool(small.any()):
            return small
        return small & self.descent(problem, candidate)


@dataclass
class Repeated(Explicit):
    """EPADNet whose error correction (7) is applied up to ``corrections`` times to a proposal, until the control accepts.

    Each correction is a proximal-gradient step on ``F_k = F + (mu / 2) ||. - x^k||^2``, so the computable error shrinks
    however small mu is, and a small mu is what allows long steps.  The fallback is the same from ``x^k`` itself, without a
    limit but ``patience``: with ``tau <= 1 / (L + mu)`` every correction lowers ``F_k``, which gives
    ``F(x+) <= F(x^k) - (mu / 2) ||x+ - x^k||^2``.  With one correction this is `Explicit`.  Also recorded: ``corrections``,
    how many were computed.
    """

    corrections: int = 20
    patience: int = 500
    _count: int = field(default=0, repr=False)

    @staticmethod
    def constants_for(lipschitz: float, moreau: float = 0.3, tolerance: float = 0.45) -> Constants:
        """``mu = moreau L``, ``tau = 1 / (L + mu)``, ``C_E = tolerance mu`` with ``tolerance < 1/2``."""
        if not (moreau > 0 and 0 < tolerance < 0.5):
            raise ValueError(f"moreau, tolerance: expected moreau > 0 and 0 < tolerance < 1/2, got {moreau}, {tolerance}")
        return Constants(moreau * lipschitz, 1 / (lipschitz * (1 + moreau)), tolerance * moreau * lipschitz)

    def __post_init__(self) -> None:
        mu, tolerance = self.constants.moreau, self.constants.tolerance
        self.control = self.control or BothConditions(tolerance, max(mu / 2 - tolerance, 0.0))

    def correct(self, problem: Problem, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        limit = self.patience if v is x else self.corrections
        done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        kept, kept_e = v, v
        for _ in range(limit):
            candidate, e = super().correct(problem, x, v)
            open_ = (~done).view(-1, 1, 1, 1)  # an item that was accepted stays as it was
            kept, kept_e = torch.where(open_, candidate, kept), torch.where(open_, e, kept_e)
            done = done | self.control(problem, Candidate(x, v, candidate, e))  # type: ignore[misc]
            self._count += 1
            if bool(done.all()):
                break
            v = candidate
        return kept, kept_e

    def __call__(self, problem: Problem, state: State) -> tuple[State, Record]:
        self._count = 0
        following, record = super().__call__(problem, state)
        return following, {**record, "corrections": float(self._count)}


def implicit(stages: Stages, schedule: Schedule, moreau: float = 0.0) -> Staged:
    """IPADNet with one network for each iteration."""
    return Staged([Implicit(network, schedule, moreau) for network in stages.nets])


def explicit(stages: Stages, schedule: Schedule, constants: Constants, corrections: int = 20) -> Staged:
    """EPADNet with one network for each iteration; ``corrections = 1`` is the form of the paper."""
    return Staged([Repeated([network], constants, schedule, corrections=corrections) for network in stages.nets])
