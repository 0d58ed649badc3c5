"""PODM against its definitions: F, psi, xi, the two descent constants, for scalar, filtered and general H."""

import pytest
import torch

from odlkit import certify, instances
from odlkit.control import AlwaysAccept, NeverAccept
from odlkit.models import podm
from odlkit.models.padnet import Constants as PADNetConstants
from odlkit.models.padnet import Explicit
from odlkit.models.podm import PODM, Constants
from odlkit.operators import Blur, BlurDecimate, FilterBank, Mask
from odlkit.priors import Lp, SparseBox, Zero
from odlkit.problem import LeastSquares, Problem, norm_items
from odlkit.propagate import Trace, propagate
from odlkit.propositions import podm as propositions


def randn(*shape: int, seed: int = 0, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def metric(kind: str):
    """W of a random H: None, a filter bank, a diagonal, or any matrix on 8 x 8 images; not far from the identity."""
    if kind == "scalar":
        return None
    if kind == "filtered":
        one = torch.zeros(3, 3, 3, dtype=torch.float64)
        one[0, 1, 1] = 1.0
        return FilterBank(one + 0.01 * randn(3, 3, 3, seed=2))
    if kind == "diagonal":
        return Mask(1 + 0.1 * randn(8, 8, seed=3))
    return Dense(torch.eye(64, dtype=torch.float64) + 0.01 * randn(64, 64, seed=4))


class Dense(Mask):
    """``W = M`` on images read as vectors: H is any symmetric positive semidefinite matrix."""

    def A(self, x):
        return (x.flatten(1) @ self._mask(x).T).view_as(x)

    def A_adjoint(self, y):
        return (y.flatten(1) @ self._mask(y)).view_as(y)

    def eigenvalue_range(self, x):
        values = torch.linalg.eigvalsh(self.mask.T @ self.mask)
        return values[0].item(), values[-1].item()


KINDS = ("scalar", "filtered", "diagonal", "dense")
CONSTANTS = Constants(penalty=3.0, step_size=0.25, tolerance=0.5, feedback=0.4)


def problem_of(p: float = 1.0, dtype=torch.float64, device="cpu", weight: float = 0.05):
    operator = Blur(instances.gaussian(5))
    y = operator.A(randn(2, 1, 8, 8, seed=5, dtype=dtype, device=device))
    return Problem(LeastSquares(operator, y, 2.0), Lp(p, weight))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "operator", [Blur(instances.gaussian(5)), BlurDecimate(instances.gaussian(5), 2)], ids=["blur", "sr"]
)
def test_eq_3_the_propagation_has_zero_gradient(kind, operator, device):
    """``grad f(x_F) + 2 H (x_F - x_A) = 0``; with ``2 H = 2 mu W^T W``, as the closed form is printed, it has not."""
    x_a, W = randn(2, 1, 8, 8, seed=6, device=device), metric(kind)
    f = LeastSquares(operator, operator.A(randn(2, 1, 8, 8, seed=5, device=device)), 2.0)
    step = PODM([], CONSTANTS, metric=W)
    x_f = step.propagation(Problem(f, Zero()), x_a)
    scale = norm_items(f.grad(x_a))
    assert (norm_items(f.grad(x_f) + 2 * step.h(x_f - x_a)) < 1e-8 * scale).all()
    printed = f.nearest(x_a, 2 * CONSTANTS.penalty, W)  # (A^T A + mu W^T W)^-1 (A^T y + mu W^T W x_A)
    assert (norm_items(f.grad(printed) + 2 * step.h(printed - x_a)) > 1e-2 * scale).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [1.0, 0.5, 0.0])
def test_eq_5_psi_is_its_definition_from_the_error_of_eq_4(kind, p):
    """``epsilon = grad f(x_G) + 2 H (x_G - x_A) + u``, ``psi = epsilon + mu (x_G - x) / 2 - H (x + x_G - 2 x_A)``, any x_A.

    Eq: PODM (2), (4), (5), (7).
    """
    problem, step, mu, gamma = (
        problem_of(p),
        PODM([], CONSTANTS, metric=metric(kind)),
        CONSTANTS.penalty,
        CONSTANTS.step_size,
    )
    x, x_f, x_a = (randn(2, 1, 8, 8, seed=s) for s in (7, 8, 9))
    x_g, psi = step.optimality(problem, x, x_f)
    w = x_f - gamma * (problem.fidelity.grad(x_f) + mu * (x_f - x))
    torch.testing.assert_close(x_g, problem.prox_prior(w, gamma))
    u = (w - x_g) / gamma  # in the subdifferential of g at x_G
    epsilon = problem.fidelity.grad(x_g) + 2 * step.h(x_g - x_a) + u
    torch.testing.assert_close(psi, epsilon + mu / 2 * (x_g - x) - step.h(x + x_g - 2 * x_a), rtol=1e-11, atol=1e-12)
    intermediate = w + 0 * x  # "prox(x_G - gamma (grad f(x_G) + mu (x_G - x_A)) + gamma epsilon)" is the same input iff
    other = x_g - gamma * (problem.fidelity.grad(x_g) + mu * (x_g - x_a)) + gamma * epsilon  # H = mu I / 2
    assert torch.allclose(intermediate, other, rtol=0, atol=1e-10) == (kind == "scalar")


def test_psi_is_the_error_of_padnet_for_the_scalar_metric():
    """Eq: PODM (5); PADNet (12)."""
    problem, x, v = problem_of(0.5), randn(2, 1, 8, 8, seed=7), randn(2, 1, 8, 8, seed=8)
    ours = PODM([], CONSTANTS).optimality(problem, x, v)
    theirs = Explicit([], PADNetConstants(CONSTANTS.penalty, CONSTANTS.step_size, 1.0)).correct(problem, x, v)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_momentum_takes_a_share_of_the_network_s_residual():
    """``x_G = prox(x_F - gamma mu (x_A - x))`` for ``H = mu I / 2``; at ``gamma mu = 1``, ``prox(x - gamma grad f(x_F))``.

    Eq: PODM (7).
    """
    problem, x, x_a = problem_of(0.0), randn(2, 1, 8, 8, seed=7), randn(2, 1, 8, 8, seed=9)
    for gamma in (0.25, 1 / 3):
        step = PODM([], Constants(3.0, gamma, 0.5, 0.4))
        x_f = step.propagation(problem, x_a)
        x_g, _ = step.optimality(problem, x, x_f)
        torch.testing.assert_close(x_g, problem.prox_prior(x_f - gamma * 3.0 * (x_a - x), gamma))
    torch.testing.assert_close(x_g, problem.prox_prior(x - gamma * problem.fidelity.grad(x_f), gamma))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("branch", [AlwaysAccept(), NeverAccept()], ids=["accepted", "feedback"])
def test_xi_is_a_subgradient(kind, branch, monkeypatch):
    """At p = 1: ``xi - grad f`` is ``lambda sign`` on the support and within lambda elsewhere, in both branches.

    Eq: PODM (6), Theorem 1.
    """
    lam, seen = 2.0, []
    problem, x = problem_of(weight=lam), randn(2, 1, 8, 8, seed=7)
    monkeypatch.setattr(podm, "norm_items", lambda z: (seen.append(z), norm_items(z))[1])
    step = PODM([lambda z, level: 0.3 * z], CONSTANTS, metric=metric(kind), control=branch)
    state, record = step(problem, step.init(problem, x))
    xi = seen[-1]
    torch.testing.assert_close(record["subgradient"], norm_items(xi))
    slope = xi - problem.fidelity.grad(state.x)
    torch.testing.assert_close(slope[state.x != 0], lam * state.x[state.x != 0].sign())
    assert (state.x == 0).any() and (state.x != 0).any() and (slope.abs() <= lam * (1 + 1e-9)).all()
    if isinstance(branch, NeverAccept):
        back = problem.prox_prior(x - CONSTANTS.feedback * problem.fidelity.grad(x), CONSTANTS.feedback)
        assert torch.equal(state.x, back)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [1.0, 0.5, 0.0])
def test_proposition_1_accepted_steps_fall_by_the_repaired_constant(kind, p):
    """For random points, ``c = ||psi|| / ||Delta||`` of each: the inequality needs no network and no x_A.

    Eq: PODM Proposition 1.
    """
    problem, W = problem_of(p), metric(kind)
    used = 0.0  # the largest share of the promise in the fall: a constant too large would be refuted
    for seed in range(60):
        mu, gamma, size = (randn(3, seed=seed).abs() + 0.1).tolist()
        step = PODM([], Constants(mu, gamma, 0.0, 0.4), metric=W)
        x = randn(2, 1, 8, 8, seed=seed + 100)
        x_f = step.propagation(problem, x + 0.1 * size * randn(2, 1, 8, 8, seed=seed + 200))
        x_g, psi = step.optimality(problem, x, x_f)
        change = norm_items(x_g - x)
        kappa = step.init(problem, x).aux["kappa"][0] - norm_items(psi) / change
        fall = problem.energy(x) - problem.energy(x_g)
        assert (fall >= kappa * change.square() - 1e-10 * fall.abs()).all()
        used = max([used, *(kappa * change.square() / fall)[fall > 0].tolist()])
    assert used > 0.1


@pytest.mark.parametrize("p", [1.0, 0.5, 0.0])
def test_proposition_1_feedback(p):
    """``Phi`` falls by ``(1 / (2 gamma) - L / 2) ||Delta||^2``.  Eq: PODM Proposition 1."""
    problem, x = problem_of(p), randn(2, 1, 8, 8, seed=7)
    step = PODM([], CONSTANTS)
    trace = propagate(step, problem, x, steps=30).trace
    kappa = CONSTANTS.fed_back(problem.lipschitz)
    assert (trace["kappa"] == kappa).all() and kappa == pytest.approx(1 / 0.8 - 1.0)
    energy = trace.with_start("energy")
    assert (energy[:-1] - energy[1:] >= kappa * trace["change"].square() - 1e-13 * energy[:-1]).all()


def test_constants_are_the_extreme_eigenvalues():
    problem, x, W = problem_of(), randn(2, 1, 8, 8, seed=7), metric("dense")
    aux = PODM([], CONSTANTS, metric=W).init(problem, x).aux
    h = 1.5 * torch.linalg.eigvalsh(W.mask.T @ W.mask)
    assert aux["kappa"][0] == pytest.approx(1.5 + h[0].item() - 2.0 - 0.5)
    assert aux["bound"] == pytest.approx((0.5 + 1.5 + h[-1].item(), 2.5))
    assert PODM([], CONSTANTS).init(problem, x).aux["kappa"][0] == pytest.approx(3.0 - 2.0 - 0.5)


def test_recorded_constants_are_those_of_the_branch_in_full_precision():
    problem, x = problem_of(), randn(2, 1, 8, 8, seed=7)
    constants = Constants.for_lipschitz(problem.lipschitz)
    for rule, branch in ((AlwaysAccept(), 0), (NeverAccept(), 1)):
        step = PODM([lambda z, level: z], constants, control=rule)
        state = step.init(problem, x)
        record = step(problem, state)[1]
        for name in ("kappa", "bound"):
            assert record[name].dtype == torch.float64 and (record[name] == state.aux[name][branch]).all()


def test_check_asks_for_positive_constants():
    Constants.for_lipschitz(2.0).check(2.0)
    with pytest.raises(ValueError, match="expected a positive number"):
        Constants(0.1, 1.0, 0.04, 1.0).check(0.4)  # the two-cycle
    Constants(0.1, 1.0, 0.04, 1.0).check(0.4, least=1.0)  # a metric with H >= I / (2 gamma) repairs it
    with pytest.raises(ValueError, match=r"expected a step in \(0, 1/L\)"):
        Constants(6.0, 1 / 7, 2.0, 0.5).check(2.0)


def test_each_image_of_a_batch_is_judged_on_its_own(dtype, device):
    """Eq: PODM (6)."""
    problem = problem_of(0.5, dtype, device)
    x = randn(2, 1, 8, 8, seed=7, dtype=dtype, device=device)

    def network(z, level):  # near for the first image, far for the second
        return torch.stack([z[0], z[1] + 50.0]) if len(z) == 2 else z

    constants = Constants.for_lipschitz(problem.lipschitz)
    step = PODM([network], constants)
    state, record = step(problem, step.init(problem, x))
    assert state.x.dtype == dtype and state.x.device.type == device.type
    assert record["accepted"].tolist() == [1.0, 0.0] and record["kappa"][0] != record["kappa"][1]
    for i in range(2):
        f = LeastSquares(problem.fidelity.operator, problem.fidelity.y[i : i + 1], 2.0)
        alone = PODM([lambda z, level, i=i: z + 50.0 * i], constants)
        one = Problem(f, problem.prior)
        x_one, r = alone(one, alone.init(one, x[i : i + 1]))
        torch.testing.assert_close(x_one.x[0], state.x[i])
        assert r["accepted"].item() == record["accepted"][i].item()


def test_halving_stops_at_the_first_accepted_try():
    problem, x = problem_of(), randn(2, 1, 8, 8, seed=7)
    moves = []

    def control(problem, candidate):
        moves.append(candidate.proposal)
        return torch.tensor([len(moves) > 1, len(moves) > 2])

    step = PODM([lambda z, level: z + 1], CONSTANTS, control=control, halvings=4)
    state, record = step(problem, step.init(problem, x))
    assert len(moves) == 3 and record["tries"].tolist() == [2, 3] and record["accepted"].tolist() == [1, 1]
    for i, tries in enumerate((1, 2)):
        x_g, _ = step.optimality(problem, x, step.propagation(problem, x + 0.5**tries))
        torch.testing.assert_close(state.x[i], x_g[i], rtol=1e-12, atol=1e-12)


# What no accepted step can do.


def test_where_neither_data_nor_prior_pull_no_move_is_accepted():
    """On null(A) without a prior ``psi = mu Delta``: kept iff ``c >= mu``, and kappa > 0 is ``c < mu - 1 / (2 gamma)``.

    Eq: PODM (5), Proposition 1.
    """
    hole = (randn(8, 8, seed=3) > 0).double()
    operator = Mask(1 - hole)
    problem = Problem(LeastSquares(operator, operator.A(randn(1, 1, 8, 8, seed=5)), 2.0), Zero())
    x = propagate(PODM([], CONSTANTS), problem, randn(1, 1, 8, 8, seed=7), steps=200, tol=1e-14).x
    for gamma in (0.25, 0.3, 0.6):  # gamma mu < 1 and > 1
        for size in (1e-6, 1e-2, 10.0):
            step = PODM([], Constants(3.0, gamma, 0.0, 0.4))
            x_g, psi = step.optimality(problem, x, step.propagation(problem, x + size * hole))
            move = x_g - x
            torch.testing.assert_close(move, (1 - 3 * gamma) * size * hole + 0 * move, rtol=1e-6, atol=1e-12)
            assert (norm_items(psi) / norm_items(move)).item() == pytest.approx(3.0, rel=1e-4)
    step = PODM([], Constants(3.0, 1 / 3, 0.0, 0.4))  # gamma mu = 1: the momentum takes all of it back
    assert norm_items(step.optimality(problem, x, step.propagation(problem, x + hole))[0] - x) < 1e-10


def test_the_share_of_an_accepted_move_that_nothing_pulls():
    """``mu ||P Delta|| <= ||psi||``, P onto null(A), no prior there: of an accepted move at most ``c / mu`` lies there.

    Eq: PODM (5).
    """
    hole = (randn(8, 8, seed=3) > 0).double()
    operator = Mask(1 - hole)
    problem = Problem(LeastSquares(operator, operator.A(randn(1, 1, 8, 8, seed=5)), 2.0), Lp(0.5, 0.05 * (1 - hole)))
    constants, kept = Constants.for_lipschitz(problem.lipschitz), 0
    step = PODM([], constants)
    for seed in range(60):
        x, x_a = randn(1, 1, 8, 8, seed=seed), randn(1, 1, 8, 8, seed=seed + 100)
        scale = seed / 10
        x_g, psi = step.optimality(problem, x, step.propagation(problem, x + scale * x_a))
        move = x_g - x
        assert norm_items(psi) >= constants.penalty * norm_items(hole * move) * (1 - 1e-9)
        if norm_items(psi) <= constants.tolerance * norm_items(move):
            kept += 1
            assert norm_items(hole * move) <= constants.tolerance / constants.penalty * norm_items(move)
    assert 5 < kept < 60


def test_errata_the_printed_constants_ask_for_more_than_the_paper_says():
    """``mu / 4 - c^2 / mu`` is negative from ``c = mu / 2`` on; it is never above ``mu / 2 - c`` below that.

    Eq: PODM Proposition 1.
    """
    c = torch.linspace(0, 2, 50, dtype=torch.float64)
    printed, sharp = 0.25 - c.square(), 0.5 - c  # mu = 1
    assert (printed[c > 0.5] < 0).all() and (printed[c < 0.5] > 0).all() and (printed[c < 0.5] <= sharp[c < 0.5]).all()


def test_errata_the_feedback_needs_a_step_below_1_over_l():
    """The paper bounds no gamma; at 2.2 / L the energy of a least-squares problem rises.  Eq: PODM (6), Proposition 1."""
    problem, x = problem_of(), randn(2, 1, 8, 8, seed=7)
    energy = propagate(PODM([], Constants(3.0, 0.25, 0.5, 1.1)), problem, x, steps=100, raises=False).trace["energy"]
    assert (energy[-1] > 1e3 * energy[0]).any() or (energy.diff(dim=0) > 0).any()
    assert Constants(3.0, 0.25, 0.5, 1.1).fed_back(2.0) < 0


def test_errata_omega_is_empty_when_the_least_value_is_positive():
    """``a = min o > 0`` forbids zeros: s < n nonzeros within [a, b] are impossible, and `SparseBox` refuses a > 0."""
    o = 0.1 + 0.9 * instances.picture("camera", 64)  # no black pixel
    assert o.min() > 0
    clamped = torch.zeros_like(o).clamp(o.min().item(), o.max().item())
    assert (clamped != 0).all()  # every point of the box has n nonzeros, so s < n leaves none
    with pytest.raises(ValueError, match="zeros must be allowed"):
        SparseBox(o.min().item(), o.max().item(), o.numel() - 1)


def test_errata_a_threshold_after_the_clamp_is_not_the_projection():
    """u = (-3, 0.5), s = 1, [-0.1, 1]: clamped to (-0.1, 0.5), whose larger entry is the wrong one to keep."""
    u = torch.tensor([-3.0, 0.5], dtype=torch.float64).view(1, 1, 1, 2)
    exact, clamped = SparseBox(-0.1, 1.0, 1).prox(u, 1.0), u.clamp(-0.1, 1.0)
    printed = torch.where(clamped.abs() == clamped.abs().max(), clamped, 0.0)
    costs = [(u - x).square().sum().item() for x in (printed, exact)]
    assert costs == pytest.approx([9.0, 8.66])


def test_errata_proposition_1_two_cycle_of_a_linear_network():
    """``A(x) = -5 x`` in one dimension: kept at every stage with ``psi = 0``, and 0, 2, 0, 2 ... for ever.

    Eq: PODM Proposition 1, Theorem 1.
    """
    a = torch.full((1, 1, 1, 1), 2.5, dtype=torch.float64)
    problem, step = propositions.two_cycle(a, 0.9)
    c = step.constants
    assert c.tolerance < c.penalty / 2 and c.feedback < 1 / problem.lipschitz  # what the paper does not even ask for
    trace = propagate(step, problem, 0 * a, steps=40).trace
    assert trace.acceptance_rate() == 1 and trace["residual"].max() < 1e-15
    torch.testing.assert_close(trace["energy"][:, 0], torch.tensor([0.95, 1.25], dtype=torch.float64).repeat(20))
    assert not certify.descent(trace, c.penalty / 4 - c.tolerance**2 / c.penalty).holds
    assert certify.descent(trace, trace["kappa"]).holds and trace["kappa"].max() < 0  # true, and promises no descent
    assert problem.fidelity.grad(0.8 * a).item() == pytest.approx(-0.2)  # the cluster point 2 is not critical


def test_the_repaired_constants_cure_the_two_cycle():
    """The same network and energy with ``mu gamma = 1``, and the feedback where (5) fails.  Eq: PODM Theorem 1."""
    a = instances.haar_band()
    problem, step = propositions.two_cycle(a, 0.008)
    mu = 3 * problem.lipschitz
    constants = Constants(mu, 1 / mu, 0.475 * mu, 0.95 / problem.lipschitz)
    result = propagate(PODM(step.networks, constants), problem, 0.8 * a, steps=300, tol=1e-12)
    assert certify.descent(result.trace, result.trace["kappa"]).holds
    assert certify.critical(problem, result, constants.feedback).holds


@pytest.mark.parametrize("p", [1.0, 0.0])
def test_errata_acceptance_depends_on_mu(p):
    """Nothing is kept at mu = 0.01, everything at a large mu, where the energy falls less."""
    network = propositions.networks()["untrained"]
    (_, none, low), (_, all_, high) = propositions.acceptance(network, (0.005, 30.0), p, 32, 15, halvings=0)
    assert none == 0 and all_ == 1 and high > 1.2 * low


def test_proposition_2_bounds_the_gap_to_any_point():
    """The inequality of a stage holds for every z, not only for the limit.

    Eq: PODM Proposition 2.
    """
    problem, x0 = propositions.coefficient_problem("camera", 16, 0.0)
    step, kept = PODM([lambda x, level: x], Constants.for_lipschitz(problem.lipschitz)), []
    trace = propagate(step, problem, x0, steps=10, measure={"x": lambda s: kept.append(s.x)}).trace
    for seed in range(20):
        z = kept[-1] * (randn(*x0.shape, seed=seed) > -1)
        for row, x in enumerate(kept):
            d, s = norm_items(x - z), trace["subgradient"][row]
            tau = step.constants.step_size if trace["accepted"][row] > 0 else step.constants.feedback
            gap = problem.energy(x) - problem.energy(z)
            assert gap <= s * d + d**2 / (2 * tau) + 1e-12


def test_halving_sees_a_tail_that_does_not_shrink():
    trace = Trace()
    for row in range(120):
        trace.rows.append({"change": torch.tensor([0.9**row]), "norm": torch.ones(1)})
    assert propositions.halving(trace).holds
    trace.rows[-1]["change"] = torch.tensor([0.1])
    assert not propositions.halving(trace).holds
