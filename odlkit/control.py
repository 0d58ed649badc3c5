"""Rules that keep a proposal or send it back.  A rule sees numbers, never a network.

A control is any callable ``(problem, candidate) -> accepted`` with ``candidate`` a `Candidate` and ``accepted`` a boolean
tensor ``(B,)``: each image of a batch is judged on its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from odlkit.operators import Operator
from odlkit.problem import Problem, norm_items


@dataclass
class Candidate:
    """What a control may look at: the old iterate, the learned move ``v``, the corrected point, its computable error."""

    old: Tensor
    proposal: Tensor
    corrected: Tensor
    error: Tensor  # e with e in dR(x+) + grad f_k(x+)


class ErrorCondition:
    """Accept iff ``||e|| <= tolerance ||x+ - x||``.

    Eq: PADNet Condition 1; PODM (5), the same rule for another error.  ``tolerance`` is the constant C_E (or c).
    """

    def __init__(self, tolerance: float):
        self.tolerance = tolerance

    def __call__(self, problem: Problem, candidate: Candidate) -> Tensor:
        return norm_items(candidate.error) <= self.tolerance * norm_items(candidate.corrected - candidate.old)


def distance_operator(x: Tensor, penalty: float, metric: Operator | None = None) -> Tensor:
    """``H x`` with ``H = (mu / 2) W^T W``, ``mu = penalty`` and ``W = metric``, None for the identity."""
    return penalty / 2 * (x if metric is None else metric.normal(x))


def optimality_error(
    problem: Problem,
    old: Tensor,
    proposal: Tensor,
    new: Tensor,
    step_size: float,
    penalty: float,
    metric: Operator | None = None,
    slope: Tensor | None = None,
) -> Tensor:
    """``psi = (x~ - x+)/tau - (mu/2)(2 x~ - x+ - x) + H (x+ - x) + grad f(x+) - grad f(x~)``, like ``x``.

    ``x~`` is a proposal that was corrected to ``x+`` with ``tau = step_size`` and ``mu = penalty`` (PADNet 7 and PODM 7 are
    the same step), ``H`` is that of `distance_operator`; with ``metric=None`` psi is PADNet's error (12).  ``slope`` is
    ``grad f(x~)`` where it is known.  Eq: PODM (5), PADNet (12).
    """
    slope = problem.fidelity.grad(proposal) if slope is None else slope
    move = (proposal - new) / step_size - penalty / 2 * (2 * proposal - new - old)
    return move + distance_operator(new - old, penalty, metric) + problem.fidelity.grad(new) - slope


class OptimalityError:
    """Accept iff ``||psi|| <= tolerance ||x+ - x||`` with `optimality_error`, whatever propagation made the points.

    Eq: PODM (5), PADNet (12).
    """

    def __init__(self, tolerance: float, step_size: float, penalty: float, metric: Operator | None = None):
        self.tolerance, self.step_size, self.penalty, self.metric = tolerance, step_size, penalty, metric

    def psi(self, problem: Problem, candidate: Candidate) -> Tensor:
        """The optimality error of a candidate, like ``x``."""
        points = candidate.old, candidate.proposal, candidate.corrected
        return optimality_error(problem, *points, self.step_size, self.penalty, self.metric)

    def __call__(self, problem: Problem, candidate: Candidate) -> Tensor:
        return norm_items(self.psi(problem, candidate)) <= self.tolerance * norm_items(candidate.corrected - candidate.old)


class MonotoneEnergy:
    """Accept iff ``F(x+) <= F(x) - margin ||x+ - x||^2``.

    Eq: GDC Algorithm 1 with the sufficient decrease that makes the whole sequence converge (``margin > 0``).
    """

    def __init__(self, margin: float = 0.0):
        self.margin = margin

    def __call__(self, problem: Problem, candidate: Candidate) -> Tensor:
        drop = problem.energy(candidate.old) - problem.energy(candidate.corrected)
        return drop >= self.margin * norm_items(candidate.corrected - candidate.old).square()


class BoundedGradient:
    """Accept iff ``||grad f(x+)|| <= bound``, ``bound`` a number or ``(B,)``.

    It needs no prior.  ``bound`` is the paper's L, which is also its name for a Lipschitz constant; the two are unrelated.
    Eq: GDC Algorithm 2, line 6.
    """

    def __init__(self, bound: Tensor | float):
        self.bound = bound

    def __call__(self, problem: Problem, candidate: Candidate) -> Tensor:
        return norm_items(problem.fidelity.grad(candidate.corrected)) <= self.bound


class AlwaysAccept:
    """No control: what most unrolled networks do, and the violating experiment of several certificates."""

    def __call__(self, problem: Problem, candidate: Candidate) -> Tensor:
        return torch.ones(len(candidate.old), dtype=torch.bool, device=candidate.old.device)


class NeverAccept:
    """Reject everything: the propagation is its numerical fallback."""

    def __call__(self, problem: Problem, candidate: Candidate) -> Tensor:
        return torch.zeros(len(candidate.old), dtype=torch.bool, device=candidate.old.device)
