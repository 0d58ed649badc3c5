"""Rules that keep a proposal or send it back.  A rule sees numbers, never a network.

A control is any callable ``(problem, candidate) -> accepted`` with ``candidate`` a `Candidate` and ``accepted`` a boolean
tensor ``(B,)``: each image of a batch is judged on its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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


class MonotoneEnergy:
    """Accept iff ``F(x+) <= F(x) - margin ||x+ - x||^2``.

    Eq: GDC Algorithm 1 with the sufficient decrease that makes the whole sequence converge (``margin > 0``).
    """

    def __init__(self, margin: float = 0.0):
        self.margin = margin

    def __call__(self, problem: Problem, candidate: Candidate) -> Tensor:
        drop = problem.energy(candidate.old) - problem.energy(candidate.corrected)
        return drop >= self.margin * norm_items(candidate.corrected - candidate.old).square()


class AlwaysAccept:
    """No control: what most unrolled networks do, and the violating experiment of several certificates."""

    def __call__(self, problem: Problem, candidate: Candidate) -> Tensor:
        return torch.ones(len(candidate.old), dtype=torch.bool, device=candidate.old.device)


class NeverAccept:
    """Reject everything: the propagation is its numerical fallback."""

    def __call__(self, problem: Problem, candidate: Candidate) -> Tensor:
        return torch.zeros(len(candidate.old), dtype=torch.bool, device=candidate.old.device)
