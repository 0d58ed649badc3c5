"""PADNet: Eq. 12 against its definition, the fallback, decisions per item, the implicit recursion and its schedule."""

from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from odlkit.control import AlwaysAccept, Candidate, ErrorCondition, NeverAccept
from odlkit.models.padnet import Constants, Explicit, Implicit, Schedule
from odlkit.networks import clip_to_ball
from odlkit.operators import Blur
from odlkit.priors import Lp
from odlkit.problem import LeastSquares, Problem, norm_items
from odlkit.propagate import iterate, propagate

POWERS = [0.0, 0.5, 0.8, 1.0]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def blur_problem(p: float = 1.0, weight: float = 1.0, seed: int = 0, batch: int = 2, device="cpu", dtype=torch.float64):
    kernel = draw(seed, 3, 3).abs()
    y = draw(seed + 1, batch, 1, 8, 9)
    return Problem(LeastSquares(Blur((kernel / kernel.sum()).to(device, dtype)), y.to(device, dtype), weight), Lp(p, 0.05))


def wild(v, alpha):
    return -8 * v + 0.3 * torch.sin(40 * v)


@given(st.floats(0.05, 3.0), st.floats(0.05, 5.0), st.integers(0, 100))
@pytest.mark.parametrize("p", POWERS)
def test_eq_12_is_a_subgradient_of_the_moreau_energy(p, step_size, moreau, seed):
    """e - grad f_k(x+) lies in dR(x+): it equals (z - x+) / tau, and R's subgradient where x+ is not 0.

    Eq: PADNet (2), (7), (11), (12).
    """
    problem = blur_problem(p, seed=seed)
    x, v = draw(seed + 2, 2, 1, 8, 9), draw(seed + 3, 2, 1, 8, 9)
    new, e = Explicit([], Constants(moreau, step_size, 1.0)).correct(problem, x, v)
    subgradient = e - problem.fidelity.grad(new) - moreau * (new - x)
    z = v - step_size * (problem.fidelity.grad(v) + moreau * (v - x))
    torch.testing.assert_close(subgradient, (z - new) / step_size, rtol=1e-9, atol=1e-9)
    on = new != 0
    slope = 0.05 * p * new[on].sign() * new[on].abs() ** (p - 1)  # derivative of 0.05 |x|^p
    torch.testing.assert_close(subgradient[on], slope, rtol=1e-6, atol=1e-7)
    if p == 1:
        assert (subgradient.abs() <= 0.05 + 1e-9).all()


def test_eq_12_as_printed_at_unit_step():
    problem = blur_problem()
    x, v, mu = draw(5, 2, 1, 8, 9), draw(6, 2, 1, 8, 9), 0.7
    new, e = Explicit([], Constants(mu, 1.0, 1.0)).correct(problem, x, v)
    printed = (mu - 1) * (new - v) - problem.fidelity.grad(v) + problem.fidelity.grad(new)
    torch.testing.assert_close(e, printed, rtol=0, atol=1e-14)


@given(st.floats(0.1, 4.0), st.integers(0, 1000), st.sampled_from(POWERS))
def test_the_fallback_always_meets_condition_1(weight, seed, p):
    """v = x, for the constants of both recipes, from any x: this is what closes Algorithm 2's hole."""
    problem = blur_problem(p, weight, seed)
    x, level = 3 * draw(seed + 2, 2, 1, 8, 9), problem.lipschitz
    recipes = [Constants.for_lipschitz(level), Constants(3 * level, 1 / (3.5 * level), 1.1 * level)]
    for constants in recipes:
        constants.check(level)
        new, e = Explicit([], constants).correct(problem, x, x)
        assert (norm_items(e) <= constants.tolerance * norm_items(new - x) * (1 + 1e-9) + 1e-12).all()
        drop = problem.energy(x) - problem.energy(new)
        assert (drop >= constants.kappa * norm_items(new - x).square() * (1 - 1e-9) - 1e-12).all()


def test_a_tolerance_below_the_recipe_is_refused_and_would_fail():
    problem = blur_problem()
    tight = Constants(3 * problem.lipschitz, 1 / (3 * problem.lipschitz), 0.05 * problem.lipschitz)
    with pytest.raises(ValueError, match="fallback needs"):
        tight.check(problem.lipschitz)
    x = 3 * draw(7, 2, 1, 8, 9)
    new, e = Explicit([], tight).correct(problem, x, x)
    assert (norm_items(e) > tight.tolerance * norm_items(new - x)).any()
    with pytest.raises(ValueError, match="expected a positive number"):
        Constants(0.1, 1.0, 0.04).check(0.4)  # the two-cycle's: mu tau < 1


@pytest.mark.parametrize("p", POWERS)
def test_condition_and_descent_hold_at_every_step_for_a_wild_network(p, device):
    problem = blur_problem(p, device=device)
    constants = Constants.for_lipschitz(problem.lipschitz)
    result = propagate(Explicit([wild], constants, halvings=2), problem, problem.fidelity.y, steps=30)
    trace = result.trace
    assert (trace["residual"] <= constants.tolerance * trace["change"] + 1e-12).all()
    energy = trace.with_start("energy")
    assert (energy[:-1] - energy[1:] >= constants.kappa * trace["change"].square() - 1e-12).all()


def test_without_fallback_the_last_proposal_stays_and_can_raise_the_energy():
    """Eq: PADNet Algorithm 2."""
    problem = blur_problem()
    constants = Constants.for_lipschitz(problem.lipschitz)
    result = propagate(Explicit([wild], constants, fallback=False), problem, problem.fidelity.y, steps=5, raises=False)
    trace = result.trace
    assert (trace["residual"] > constants.tolerance * trace["change"]).any()
    assert trace["energy"].max() > trace.start["energy"].max()


def test_never_accept_is_the_proximal_gradient_method():
    """At mu tau = 1 the fallback is a proximal-gradient step of length tau.  Eq: PADNet (7)."""
    problem = blur_problem(0.8)
    constants = Constants.for_lipschitz(problem.lipschitz)
    result = propagate(Explicit([wild], constants, control=NeverAccept()), problem, problem.fidelity.y, steps=4)
    x, tau = problem.fidelity.y, constants.step_size
    for _ in range(4):
        x = problem.prox_prior(x - tau * problem.fidelity.grad(x), tau)
    torch.testing.assert_close(result.x, x, rtol=0, atol=1e-13)
    assert result.trace.acceptance_rate() == 0


def test_every_item_of_a_batch_is_judged_on_its_own(device, dtype):
    """A network that is good for the first item and bad for the second: one is accepted, the other falls back."""
    problem = blur_problem(1.0, device=device, dtype=dtype)
    y = problem.fidelity.y
    constants = Constants.for_lipschitz(problem.lipschitz)
    factor = torch.tensor([1.0, -50.0], device=device, dtype=dtype).view(2, 1, 1, 1)
    step = Explicit([lambda w, alpha: factor * w], constants, Schedule(100.0, 1.5))
    state, record = step(problem, step.init(problem, y))
    assert record["accepted"].tolist() == [1.0, 0.0]
    assert (state.aux["nu"][1] == 0).all() and (state.aux["v"][1] == y[1]).all()  # the fallback resets the duals
    for i in range(2):  # the same as each alone
        alone = Problem(LeastSquares(problem.fidelity.operator, y[i : i + 1]), problem.prior)
        single = Explicit([lambda w, alpha, i=i: factor[i : i + 1] * w], constants, Schedule(100.0, 1.5))
        x = single(alone, single.init(alone, y[i : i + 1]))[0].x
        torch.testing.assert_close(state.x[i : i + 1], x)


def test_networks_are_tried_in_order_then_half_moves():
    problem = blur_problem(batch=1)
    seen = []

    def control(problem, candidate: Candidate):
        seen.append(candidate.proposal)
        return torch.tensor([len(seen) == 4])

    networks = [lambda w, a: w + 1, lambda w, a: w + 2]
    step = Explicit(networks, Constants.for_lipschitz(problem.lipschitz), halvings=3, control=control)
    x = problem.fidelity.y
    state, record = step(problem, step.init(problem, x))
    assert record["tries"].tolist() == [4.0] and record["accepted"].tolist() == [1.0]
    torch.testing.assert_close(seen[1] - seen[0], torch.ones_like(x))
    torch.testing.assert_close(seen[3] - x, (seen[1] - x) / 4)
    torch.testing.assert_close(state.aux["v"], seen[3])


def test_the_error_condition_is_the_default_control():
    """Eq: PADNet Condition 1; PODM (5)."""
    problem = blur_problem()
    constants = Constants.for_lipschitz(problem.lipschitz)
    runs = [propagate(Explicit([wild], constants, control=c), problem, problem.fidelity.y, steps=6)
            for c in (None, ErrorCondition(constants.tolerance))]  # fmt: skip
    assert torch.equal(runs[0].x, runs[1].x)
    free = Explicit([wild], constants, control=AlwaysAccept())
    always = propagate(free, problem, problem.fidelity.y, steps=6, raises=False)
    assert not torch.equal(runs[0].x, always.x)


def test_schedule():
    """Eq: PADNet Algorithm 2."""
    rho, alpha = Schedule(25.0, 2.0)(3)
    assert rho == 200.0 and alpha == pytest.approx(200.0**-0.5)
    between = Schedule.between(0.2, 0.01, 8)
    assert between(0)[1] == pytest.approx(0.2) and between(7)[1] == pytest.approx(0.01)
    ends = torch.tensor([0.01, 0.02]).view(2, 1, 1, 1)
    last = Schedule.between(0.2, ends, 8)(7)[1]
    torch.testing.assert_close(last, ends)
    assert Schedule(1.0, 10.0)(10_000)[0] < float("inf")


def test_the_implicit_recursion_is_algorithm_1_without_step_4():
    """Every line of the algorithm, written out, and u's optimality as the identity rho (u - v + nu) = -grad f_k(u).

    Eq: PADNet (2), (3), (5), (29), (30), (31), Algorithm 1.
    """
    problem, mu, schedule = Problem(blur_problem().fidelity), 0.5, Schedule(2.0, 1.5)
    y = problem.fidelity.y

    def network(v, alpha):
        return v + clip_to_ball(wild(v, alpha) - v, 3 * alpha)

    x, v, nu = y, y, torch.zeros_like(y)
    for k, (state, record) in enumerate(islice(iterate(Implicit(network, schedule, mu), problem, y), 6)):
        rho, alpha = schedule(k)
        u = state.aux["u"]
        gradient = problem.fidelity.grad(u) + mu * (u - x)
        torch.testing.assert_close(rho * (u - (v - nu)), -gradient, rtol=1e-11, atol=1e-11)  # (3)
        torch.testing.assert_close(record["fidelity_gradient"], norm_items(gradient), rtol=1e-11, atol=0)
        new_v = network(u + nu, alpha)  # (6)
        torch.testing.assert_close(state.aux["v"], new_v)
        torch.testing.assert_close(state.aux["nu"], nu + u - new_v)  # (5)
        torch.testing.assert_close(record["dual"], norm_items(network(u + nu, alpha) - (u + nu)))  # (31)
        assert torch.equal(state.x, state.aux["v"])
        x, v, nu = state.x, state.aux["v"], state.aux["nu"]


def test_implicit_needs_no_prior_and_explicit_does():
    problem = Problem(blur_problem().fidelity)
    y = problem.fidelity.y
    assert "energy" not in propagate(Implicit(lambda v, a: v), problem, y, steps=2).trace
    with pytest.raises(TypeError, match="prior"):
        propagate(Explicit([wild], Constants.for_lipschitz(1.0)), problem, y, steps=1)
