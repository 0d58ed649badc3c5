"""The rules that keep a proposal, on candidates made for them."""

import pytest
import torch

from odlkit.control import Candidate, ErrorCondition, MonotoneEnergy
from odlkit.operators import Identity
from odlkit.priors import Zero
from odlkit.problem import LeastSquares, Problem


def candidate(old: float, corrected: list[float], error: float = 0.0) -> Candidate:
    new = torch.tensor(corrected, dtype=torch.float64).view(-1, 1, 1, 1)
    old_ = torch.full_like(new, old)
    return Candidate(old_, old_, new, torch.full_like(new, error))


@pytest.mark.parametrize("margin, kept", [(0.0, [True, True, False]), (0.4, [True, False, False])])
def test_monotone_energy_asks_for_the_drop_and_its_margin(margin, kept):
    """F = x^2 / 2 from x = 2: to 0 the drop is 2 = 0.5 step^2, to -1.9 it is 0.195 = 0.013 step^2, to 3 it is negative.

    Eq: GDC Algorithm 1, line 6.
    """
    problem = Problem(LeastSquares(Identity(), torch.zeros(3, 1, 1, 1, dtype=torch.float64)), Zero())
    assert MonotoneEnergy(margin)(problem, candidate(2.0, [0.0, -1.9, 3.0])).tolist() == kept


def test_error_condition_is_an_inequality_of_norms():
    """Eq: PADNet Condition 1; PODM (5)."""
    assert ErrorCondition(0.5)(None, candidate(2.0, [0.0, 1.0, 2.0], error=0.75)).tolist() == [True, False, False]
