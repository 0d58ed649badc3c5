"""The rules that keep a proposal, on candidates made for them."""

import pytest
import torch

from odlkit.certify import descent
from odlkit.control import Candidate, ErrorCondition, MonotoneEnergy, OptimalityError
from odlkit.models import padnet, podm
from odlkit.networks.metric import dct_atoms
from odlkit.operators import Blur, FilterBank, Identity
from odlkit.priors import Lp, Zero
from odlkit.problem import LeastSquares, Problem, norm_items
from odlkit.propagate import propagate


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


def small_problem() -> tuple[Problem, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    kernel = torch.rand(3, 3, generator=generator, dtype=torch.float64)
    y = torch.rand(2, 1, 12, 12, generator=generator, dtype=torch.float64)
    return Problem(LeastSquares(Blur(kernel / kernel.sum()), y, 2.0), Lp(0.8, 0.01)), y


BANK = FilterBank(dct_atoms(3) * torch.linspace(1, 1.5, 9, dtype=torch.float64).sqrt()[:, None, None] / 3)


@pytest.mark.parametrize("metric", [None, BANK])
def test_optimality_error_is_the_one_that_each_model_computes(metric):
    """Both papers correct a proposal by one step; with H = mu I / 2 the errors agree.  Eq: PODM (5), (7), PADNet (12)."""
    problem, x = small_problem()
    proposal = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    c = podm.Constants.for_lipschitz(problem.lipschitz)
    x_g, psi = podm.PODM([], c, metric=metric).optimality(problem, x, proposal)
    control = OptimalityError(c.tolerance, c.step_size, c.penalty, metric)
    torch.testing.assert_close(control.psi(problem, Candidate(x, proposal, x_g, 0 * x)), psi)

    step = padnet.Explicit([], padnet.Constants(c.penalty, c.step_size, c.tolerance))
    corrected, e = step.correct(problem, x, proposal)
    torch.testing.assert_close(corrected, x_g)
    assert torch.allclose(e, psi) == (metric is None)  # another H is another error


@pytest.mark.parametrize("scale, kept", [(1.001, True), (0.999, False)])
def test_optimality_error_is_an_inequality_of_norms(scale, kept):
    """Accepted at a tolerance just above the ratio, refused just below it, each image by its own numbers."""
    problem, x = small_problem()
    new = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    candidate = Candidate(x, x + 0.3, new, 0 * x)
    ratio = norm_items(OptimalityError(1.0, 0.2, 3.0, BANK).psi(problem, candidate)) / norm_items(new - x)
    verdict = OptimalityError(scale * ratio[0].item(), 0.2, 3.0, BANK)(problem, candidate)
    assert verdict.tolist() == [kept, bool(scale * ratio[0] >= ratio[1])]


def test_the_control_of_one_paper_guards_the_propagation_of_the_other():
    """PODM's psi with a filtered H on PADNet's proposals, and PADNet's error on PODM's: descent with each rule's kappa."""
    problem, y = small_problem()
    c = podm.Constants.for_lipschitz(problem.lipschitz)
    kappa = c.accepted(c.penalty / 2 * BANK.eigenvalue_range(y)[0])
    still = [lambda v, alpha: v]
    filtered = OptimalityError(c.tolerance, c.step_size, c.penalty, BANK)
    ours = padnet.Constants(c.penalty, c.step_size, c.tolerance)
    swapped = padnet.Explicit(still, ours, padnet.Schedule(25.0, 1.2), halvings=4, control=filtered)
    back = podm.PODM(still, c, metric=BANK, halvings=4, control=OptimalityError(c.tolerance, c.step_size, c.penalty))
    for step, constant in ((swapped, min(kappa, ours.kappa)), (back, c.accepted())):
        trace = propagate(step, problem, y, steps=20).trace
        assert constant > 0 and trace.acceptance_rate() > 0
        fed_back = 1 / (2 * c.feedback) - problem.lipschitz / 2
        assert descent(trace, min(constant, fed_back)).holds
