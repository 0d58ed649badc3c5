"""The certificates hold, their controls violate, and a tampered trace is caught: a check that cannot fail is no check."""

import copy
import json
from pathlib import Path

import pytest
import torch

from odlkit import certify, instances
from odlkit.models.padnet import Constants, Explicit, Schedule
from odlkit.networks import ConvUnit, ResidualNet
from odlkit.problem import Problem, norm_items
from odlkit.propagate import Status, Trace, propagate
from odlkit.propositions import padnet

SIZE = 64


@pytest.fixture(scope="session")
def report() -> dict[str, dict]:
    """The whole of `certify.run`, once."""
    return {entry["name"]: entry for entry in certify.run()}


@pytest.fixture(scope="session")
def explicit():
    """One run of EPADNet, p = 0.8, with the adversary: (constants, result)."""
    return instances.deblur_run("camera", SIZE, 0.8, instances.networks("rbf")["adversary"], 25)


@pytest.fixture(scope="session")
def implicit():
    return instances.implicit_run("camera", SIZE, instances.networks("conv", instances.BOUND)["adversary"])


def tampered(trace: Trace, row: int, **values) -> Trace:
    changed = copy.copy(trace)
    changed.rows = [dict(r) for r in trace.rows]
    changed.rows[row] |= {name: torch.as_tensor([v], dtype=torch.float64) for name, v in values.items()}
    return changed


def test_run_reports_what_the_command_line_promises(report):
    assert list(report) == list(certify.NAMES) and {"padnet-theorem-1", "padnet-theorem-2"} <= set(report)
    for entry in report.values():
        assert {"name", "holds", "margin", "instances", "acceptance_rate", "control", "dtype", "seconds"} <= set(entry)
        assert entry["holds"] is True and entry["margin"] >= 0 and entry["instances"] >= 3
        assert entry["control"]["violates"] is True and entry["control"]["what"]
        assert entry["dtype"] == "float64"
        json.dumps(entry, allow_nan=False)
    with pytest.raises(ValueError, match="expected one of padnet-theorem-1"):
        certify.run(["padnet-theorem-3"])


def test_theorem_1_holds_for_every_network_and_the_networks_are_used(report):
    """Eq: PADNet Theorem 1."""
    entry = report["padnet-theorem-1"]
    rows = entry["details"] + entry["to_the_end"]
    assert all(row["holds"] for row in rows)
    assert {row["instance"] for row in entry["details"]} == {"camera, p = 1", "coins, p = 0.8", "astronaut, p = 0"}
    assert {"untrained", "adversary"} <= {row["network"] for row in rows}
    assert 0.3 < entry["acceptance_rate"] <= 1  # not vacuous: the network's step is kept often
    assert all(row["acceptance_rate"] > 0.1 for row in entry["details"] if row["network"] == "untrained")


def test_criticality_and_the_unique_minimum_of_the_convex_energy(report):
    ends = report["padnet-theorem-1"]["to_the_end"]
    assert all(row["checks"][-1]["name"] == "critical" and row["checks"][-1]["holds"] for row in ends)
    convex = [row["energy"] for row in ends if row["instance"].endswith("p = 1")]
    rest = [row["energy"] for row in ends if row["instance"].endswith("p = 0")]
    assert max(convex) - min(convex) < 1e-12 * convex[0]
    assert max(rest) - min(rest) > 1e-4 * rest[0]  # different critical points: critical is all that is promised


def test_the_record_in_the_book_is_that_of_this_code(report):
    """The certificates page shows what this code computes: same runs, verdicts and acceptance, margins to a few per cent."""
    path = Path(__file__).resolve().parent.parent / "book" / "results" / "certificates.json"
    recorded = {entry["name"]: entry for entry in json.loads(path.read_text(encoding="utf-8"))["certificates"]}
    assert list(recorded) == list(report), "run make certificates"
    for name, entry in report.items():
        for kind in ("details", "to_the_end"):
            runs, stored = ([(r["instance"], r["network"], r["holds"]) for r in e[kind]] for e in (entry, recorded[name]))
            assert runs == stored, f"{name}: book/results/certificates.json is of other runs: run make certificates"
        kept, before = entry["acceptance_rate"], recorded[name]["acceptance_rate"]
        assert kept == before or abs(kept - before) < 0.03, "run make certificates"
        if entry["margin"] > 1e-8:  # not one that ends at round-off
            assert entry["margin"] == pytest.approx(recorded[name]["margin"], rel=0.1), "run make certificates"


@pytest.mark.parametrize("name", certify.NAMES)
def test_each_control_violates(report, name):
    controls = report[name]["controls"]
    assert len(controls) >= 3 and all(control["violates"] for control in controls)


def test_a_small_change_proves_nothing(report):
    free = report["padnet-theorem-1"]["controls"][0]
    assert free["relative_change"] < 1e-7 and free["subgradient"] > 0.1


def test_theorem_2_holds_for_every_network(report):
    """Eq: PADNet Theorem 2, (31), (32), (33), (34)."""
    rows = report["padnet-theorem-2"]["details"]
    assert len(rows) >= 6 and all(row["holds"] for row in rows)
    assert {c["name"] for c in rows[0]["checks"]} == {
        "dual (31)", "move of v (32)", "move of nu (33)", "move of u (34)", "tail of v", "settled"}  # fmt: skip


def test_errata_printed_constants_of_eq_33_and_eq_34_are_too_small():
    """Eq: PADNet (33), (34)."""
    checks = padnet.printed_constants(SIZE)
    for printed, corrected in checks.values():
        assert not printed.holds and corrected.holds
    assert 1 - checks["33"][0].margin == pytest.approx(1.5, abs=1e-6)  # (1 + sqrt(4)) / 2
    assert 1 - checks["33"][1].margin == pytest.approx(1.0, abs=1e-6)  # the corrected constant is attained
    assert 1 - checks["34"][0].margin > 5


def test_errata_theorem_1_two_cycle_in_one_dimension():
    """f = 0.2 (x - 2.5)^2, R = 0.9 [x != 0], mu = 0.1, unit step: 0, 2, 0, 2, ... with e = 0 to the last bit.

    Eq: PADNet Theorem 1, (21).
    """
    problem, step = instances.two_cycle(torch.full((1, 1, 1, 1), 2.5, dtype=torch.float64), 0.9)
    result = propagate(step, problem, torch.zeros(1, 1, 1, 1, dtype=torch.float64), steps=40)
    trace, c = result.trace, step.constants
    assert c.moreau > 2 * c.tolerance  # the only requirement that Algorithm 2 states
    assert trace["residual"].max() == 0 and trace.acceptance_rate() == 1
    torch.testing.assert_close(trace["energy"][:, 0], torch.tensor([0.95, 1.25], dtype=torch.float64).repeat(20))
    assert certify.error_condition(trace, c.tolerance).holds
    assert not certify.descent(trace, c.moreau / 4 - c.tolerance**2 / c.moreau).holds  # Eq. 21 as printed
    assert certify.descent(trace, c.kappa).holds and c.kappa < 0  # the repaired bound is true, and promises no descent
    x = torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64)
    assert problem.fidelity.grad(x).item() == pytest.approx(-0.2)  # the cluster point 2 is not critical


def test_errata_theorem_1_two_cycle_on_a_photograph():
    a = instances.haar_band()
    problem, step = instances.two_cycle(a, 0.008)
    trace = propagate(step, problem, torch.zeros_like(a), steps=60).trace
    energy = trace["energy"][:, 0]
    assert a.numel() > 300
    assert (energy[2:] - energy[:-2]).abs().max() < 1e-14 and energy[1] - energy[0] > 0.01
    assert (trace["residual"] <= 1e-15 * trace["change"]).all() and trace.acceptance_rate() == 1
    with pytest.raises(ValueError, match="expected a positive number"):
        step.constants.check(problem.lipschitz)


def test_the_repaired_constants_cure_the_two_cycle():
    """The same network and start, mu tau = 1: the error condition rejects the jump and the run ends at a critical point.

    Eq: PADNet Theorem 1, (21).
    """
    a = instances.haar_band()
    problem, step = instances.two_cycle(a, 0.008)
    constants = Constants.for_lipschitz(problem.lipschitz)
    result = propagate(instances.OnIterate(step.networks, constants), problem, 0.8 * a, steps=200, tol=1e-12)
    assert result.status is Status.CONVERGED and all(c.holds for c in padnet.theorem_1_checks(result.trace, constants))
    assert certify.critical(problem, result, constants.step_size).holds
    assert result.trace["energy"][-1] < result.trace.start["energy"]


def test_algorithm_1_itself_runs_the_cycle_with_two_scalar_weights():
    """Not an artefact of a network that sees x: v = c_k (u + nu) with one weight a step gives the same orbit."""
    a, weight = torch.full((1, 1, 1, 1), 2.5, dtype=torch.float64), 0.9
    problem, step = instances.two_cycle(a, weight)
    calls = []

    def scalar(w, alpha):
        calls.append(w)
        return w * (0.8 * a / w).mean() if len(calls) % 2 else 0 * w

    result = propagate(Explicit([scalar], step.constants, Schedule(1.0, 1.5)), problem, torch.zeros_like(a), steps=20)
    assert result.trace.acceptance_rate() == 1 and result.trace["residual"].max() < 1e-15
    torch.testing.assert_close(result.trace["energy"][:, 0], torch.tensor([0.95, 1.25], dtype=torch.float64).repeat(10))


def test_descent_catches_one_raised_energy(explicit):
    """Eq: PADNet (21)."""
    constants, result = explicit
    trace = result.trace
    before = certify.descent(trace, constants.kappa)
    broken = certify.descent(tampered(trace, 7, energy=trace["energy"][6, 0] * (1 + 1e-9)), constants.kappa)
    assert before.holds and before.margin > 1e-5
    assert not broken.holds and broken.worst == 7


def test_error_condition_and_subgradient_catch_one_row(explicit):
    """Eq: PADNet Condition 1, (24)."""
    constants, result = explicit
    trace, bound = result.trace, constants.moreau + constants.tolerance
    assert certify.error_condition(trace, constants.tolerance).holds and certify.subgradient_bound(trace, bound).holds
    residual = 1.001 * constants.tolerance * trace["change"][3, 0]
    broken = certify.error_condition(tampered(trace, 3, residual=residual), constants.tolerance)
    assert not broken.holds and broken.worst == 3
    subgradient = 1.001 * bound * trace["change"][5, 0]
    broken = certify.subgradient_bound(tampered(trace, 5, subgradient=subgradient), bound)
    assert not broken.holds and broken.worst == 5


def test_rate_catches_a_run_that_never_slows_down(explicit):
    """Eq: PADNet (22)."""
    constants, result = explicit
    assert certify.rate(result.trace, constants.kappa).holds
    steady = tampered(result.trace, 0)
    steady.rows = [row | {"change": 2 * result.trace["change"][0]} for row in steady.rows]
    assert not certify.rate(steady, constants.kappa).holds
    assert not certify.rate(result.trace, 100 * constants.kappa).holds


def test_not_finite_counts_as_violated(explicit):
    constants, result = explicit
    for bad in (torch.nan, torch.inf):
        assert not certify.descent(tampered(result.trace, 4, energy=bad), constants.kappa).holds
        assert not certify.error_condition(tampered(result.trace, 4, residual=bad), constants.tolerance).holds


@pytest.mark.parametrize("name, index", [("dual", 0), ("change_v", 1), ("change_nu", 2), ("change_u", 3), ("change_v", 4)])
def test_bounded_moves_catch_one_row(implicit, name, index):
    """Eq: PADNet (31), (32), (33), (34)."""
    trace, schedule = implicit.trace, instances.IMPLICIT
    before = padnet.bounded_moves(trace, instances.BOUND, schedule)
    assert all(check.holds for check in before)
    room = 1 - before[index].margin  # left / right at the worst row
    row = before[index].worst + (index == 3)
    factor = 1.001 / room if index < 4 else 100
    broken = padnet.bounded_moves(tampered(trace, row, **{name: factor * trace[name][row, 0]}), instances.BOUND, schedule)
    assert not broken[index].holds


def test_the_recorded_fidelity_gradient_is_the_gradient(implicit):
    """rho ||u - v + nu|| = ||grad f_k(u)||, Eq. 29, while rho (u - v + nu) still has digits.  Eq: PADNet (29)."""
    trace = implicit.trace
    torch.testing.assert_close(trace["fidelity_gradient"], trace["gradient_fk"], rtol=1e-9, atol=1e-12)


def test_an_unbounded_network_breaks_condition_2():
    """Eq: PADNet Condition 2."""
    result = instances.implicit_run("camera", SIZE, instances.networks("conv")["adversary"], steps=4)
    loose = padnet.bounded_moves(result.trace, 1e-3, instances.IMPLICIT)
    assert not loose[0].holds and not loose[2].holds


def test_critical_fails_where_the_run_has_not_ended(explicit):
    constants, result = explicit
    problem, _ = instances.gradient_problem("camera", SIZE, 0.8, instances.gaussian())
    assert not certify.critical(problem, result, constants.step_size).holds
    assert not certify.settled(result.trace, 1e-6).holds and certify.settled(result.trace, 0.1).holds


def test_networks_are_repeatable_and_clipped():
    v = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    state = torch.get_rng_state()
    for name, network in instances.networks("conv", 2.0).items():
        again = instances.networks("conv", 2.0)[name]
        assert torch.equal(network(v, 0.1), again(v, 0.1))
        assert (norm_items(network(v, 0.1) - v) <= 0.2 * (1 + 1e-12)).all()
    assert torch.equal(state, torch.get_rng_state())  # the global generator is left alone


def test_the_checks_take_any_trace():
    """Gradient descent: F falls by at least (1/tau - L/2) ||step||^2 for tau < 2/L, and the check sees it."""
    from odlkit.priors import Zero
    from odlkit.solvers import GradientDescent

    problem, data = instances.gradient_problem("camera", SIZE, 1.0, instances.gaussian())
    smooth = Problem(problem.fidelity, Zero())
    trace = propagate(GradientDescent(1.0), smooth, 0 * data, steps=20).trace
    assert certify.descent(trace, 1.0 - 0.5).holds and not certify.descent(trace, 1.0 - 0.5 + 0.6).holds


def test_errata_convolution_networks_do_not_satisfy_condition_2():
    """The move of a ReLU network without a bounded output grows with its input, so no C_N serves every v.

    Eq: PADNet Condition 2.
    """
    v = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit = ConvUnit(width=16).double()
    free, clipped = (ResidualNet([unit], bound) for bound in (None, 1.0))
    assert norm_items(free(1e6 * v, 0.1) - 1e6 * v) > 100 * norm_items(free(v, 0.1) - v)
    assert norm_items(clipped(1e6 * v, 0.1) - 1e6 * v) <= 0.1 * 32 * (1 + 1e-6)


def test_errata_the_l0_energy_is_not_coercive_when_a_has_a_null_space():
    """A kernel (1/2, 1/2) does not see the pattern +1 -1 +1 ...: F stays put while ||x|| goes to infinity."""
    from odlkit.operators import Blur
    from odlkit.priors import Lp
    from odlkit.problem import LeastSquares

    pattern = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(4).view(1, 1, 1, 8)
    fidelity = LeastSquares(Blur(torch.full((1, 2), 0.5, dtype=torch.float64)), 0 * pattern)
    energies = [[Problem(fidelity, Lp(p, 1.0)).energy(t * pattern).item() for t in (1.0, 1e6)] for p in (0, 0.8)]
    assert energies[0][1] == pytest.approx(energies[0][0]) and energies[1][1] > 1e4 * energies[1][0]


def test_gdc_ends_at_critical_points_that_differ_where_the_prior_is_not_convex(report):
    """Eq: GDC Proposition 1, Algorithm 1."""
    ends = report["gdc-proposition-1"]["to_the_end"]
    assert all(row["checks"][-1]["name"] == "critical" and row["checks"][-1]["holds"] for row in ends)
    convex, rest = ([row["energy"] for row in ends if row["instance"].endswith(f"blur, p = {p}")] for p in (1, 0))
    assert max(convex) - min(convex) < 1e-12 * convex[0] and max(rest) - min(rest) > 1e-3 * rest[0]
    free, _, frozen, _ = report["gdc-proposition-1"]["controls"]
    assert free["subgradient"] > 0.1 and frozen["residual"] > 0.1 and frozen["distance"] < 1e-20


def test_gdc_trained_modules_are_kept_and_the_clip_is_needed(report):
    """Not vacuous: trained proposals are accepted on every blur, and plain networks leave Condition 2 somewhere."""
    rows = report["gdc-proposition-1"]["details"]
    assert all(row["acceptance_rate"] > 0 for row in rows if row["network"] == "trained")
    rows = report["gdc-proposition-2"]["details"]
    assert all(row["acceptance_rate"] == 1 and row["within"] < 1 for row in rows)


@pytest.mark.parametrize("name, index", [("distance", 0), ("subgradient", 1), ("distance", 2)])
def test_proposition_1_of_gdc_catches_one_row(name, index):
    """Eq: GDC Proposition 1, (13), (14)."""
    from odlkit.propositions import gdc

    problem = gdc.defined("blur", "camera", 32, 1.0)
    step, run = gdc.fully_run(problem, [], 8)
    assert all(c.holds for c in gdc.checks_of(problem, step, run))
    values = dict.fromkeys(range(8) if index == 2 else [5], 1e4 * run.trace[name].max())  # the rate: no step is ever short
    trace = run.trace
    for row, value in values.items():
        trace = tampered(trace, row, **{name: value})
    run.trace = trace
    assert not gdc.checks_of(problem, step, run)[index].holds


@pytest.mark.parametrize("name, factor, index", [("data_step", 1.001, 0), ("change", 1.001, 1), ("change", 100, 2)])
def test_proposition_2_of_gdc_catches_one_row(name, factor, index):
    """Eq: GDC Proposition 2, (15)."""
    from odlkit.propositions import gdc

    network = instances.networks("conv")["adversary"]
    step, run = gdc.partially_run("denoise", "camera", 32, gdc.learned("adversary", network), steps=12)
    before = gdc.proposition_2_checks(run.trace, step.gate, step.c, 1.5)
    assert all(c.holds for c in before)
    bound = step.gate / run.trace["penalty"][4, 0] + (step.c / run.trace["penalty"][4, 0]) ** 0.5
    value = factor * (bound if name == "change" else run.trace[name][4, 0])
    assert not gdc.proposition_2_checks(tampered(run.trace, 4, **{name: value}), step.gate, step.c, 1.5)[index].holds
