"""Algorithm 2 on small problems: it stops by its own rule, the fallback keeps Condition 1, unit counts, exact resumption."""

import pytest
import torch

from odlkit import data, weights
from odlkit.bench import padnet_table_1 as table
from odlkit.control import AlwaysAccept
from odlkit.models.padnet import Constants, Explicit, Implicit, Schedule
from odlkit.models.padnet_gradient import Repeated, Stages, explicit, gradient_problem, implicit
from odlkit.operators import Blur, Gradient
from odlkit.propagate import Result, Status, Trace, propagate
from odlkit.training.padnet_gradient import design, fit_network

SIGMA = 0.02
UNIT = {"channels": 2, "filters": 3, "size": 3, "centres": 7, "reach": 4.0}
SCHEDULE = Schedule(0.2**-2, 4.0)


def toy(p, lam=1e-3, dtype=torch.float32, device="cpu"):
    """Two crops of a photograph under a mild blur: ``(problem, truth, x0)``."""
    x = torch.cat([data.sample("camera", 32), data.sample("coins", 32)]).to(device, dtype)
    t = torch.arange(-2.0, 3.0)
    kernel = torch.exp(-(t[:, None] ** 2 + t**2) / 2)
    kernel = (kernel / kernel.sum()).to(device, dtype)
    y = Blur(kernel).A(x)
    y = y + SIGMA * torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return gradient_problem(y, kernel, SIGMA, p, lam), Gradient().A(x), Gradient().A(y)


class Adversary(torch.nn.Module):
    """A network that nobody should follow."""

    def forward(self, v, alpha):
        return -8 * v + 0.3 * torch.sin(40 * v)


def stages_of(*nets):
    stages = Stages()
    stages.nets.extend(nets)
    return stages


def run_design(p, **changes):
    problem, truth, x0 = toy(p)
    constants = Repeated.constants_for(problem.lipschitz)
    make = (lambda net: Implicit(net, SCHEDULE)) if p is None else (lambda net: Repeated([net], constants, SCHEDULE))
    settings = {"check": p is not None, "unit": UNIT, "steps": 4, "k_max": 5, "t_max": 2, "progress": False} | changes
    return design(problem, truth, x0, make, SCHEDULE, **settings)


@pytest.mark.parametrize("p", [None, 1.0, 0.0])
def test_design_stops_by_its_own_rule(p):
    """Eq: PADNet Algorithm 2, line 12."""
    stages, log = run_design(p, epsilon=0.2, k_max=40, steps=1)
    assert len(stages) == len(log) < 40
    assert log[-1]["change"] <= 0.2 and all(row["change"] > 0.2 for row in log[:-1])
    assert len(run_design(p, epsilon=0.0, k_max=2, steps=1)[0]) == 2  # never met: K is the limit


def test_units_are_added_only_while_the_condition_fails():
    """Eq: PADNet Algorithm 2, line 7."""
    for t_max in (1, 3):
        _, log = run_design(1.0, epsilon=0.0, k_max=3, t_max=t_max, share=1.01)  # cannot be met
        assert [row["units"] for row in log] == [t_max] * 3
    stages, log = run_design(1.0, epsilon=0.0, k_max=3, t_max=3, share=0.0)  # always met
    assert [row["units"] for row in log] == [1] * 3 == [len(net.units) for net in stages.nets]
    assert all(row["units"] == 2 and row["accepted"] is None for row in run_design(None, epsilon=0.0, k_max=2)[1])


def test_an_interrupted_design_ends_with_the_same_weights(tmp_path):
    whole, log = run_design(0.8, epsilon=0.0, k_max=3, share=1.01)
    run_design(0.8, epsilon=0.0, k_max=1, share=1.01, checkpoint=tmp_path / "a.pt")  # stopped after the first iteration
    resumed, again = run_design(0.8, epsilon=0.0, k_max=3, share=1.01, checkpoint=tmp_path / "a.pt")
    assert log == again
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))
    other = run_design(0.8, epsilon=0.0, k_max=3, share=1.01, seed=1)[0]
    assert not all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), other.state_dict().values(), strict=True))


def test_training_lowers_the_error_and_the_card_rebuilds_the_network(device):
    problem, truth, x0 = toy(None, device=device)
    stages = Stages([[UNIT, UNIT]]).to(device)
    before = (stages.nets[0](x0, 0.2) - truth).norm()
    assert fit_network(stages.nets[0], x0, 0.2, truth, steps=60, lr=2e-2, seed=0, batch=2) < 1.0
    assert (stages.nets[0](x0, 0.2) - truth).norm() < 0.9 * before
    card = stages.card()
    copy = Stages(card["units"], card["bound"]).to(device)
    copy.load_state_dict(stages.state_dict())
    assert torch.equal(copy.nets[0](x0, 0.2), stages.nets[0](x0, 0.2))


@pytest.mark.parametrize("p", [1.0, 0.8, 0.0])
@pytest.mark.parametrize("kind", ["adversary", "rbf", "truth"])
@pytest.mark.parametrize("corrections", [1, 20])
def test_condition_1_and_descent_hold_for_any_network(p, kind, corrections, device):
    problem, truth, x0 = toy(p, dtype=torch.float64, device=device)
    net = {"adversary": Adversary(), "rbf": Stages([[UNIT]]).nets[0], "truth": lambda v, alpha: truth}[kind]
    net = net.double().to(device) if isinstance(net, torch.nn.Module) else net
    lipschitz = problem.lipschitz
    constants = Repeated.constants_for(lipschitz) if corrections > 1 else Constants.for_lipschitz(lipschitz)
    step = Repeated([net], constants, SCHEDULE, corrections=corrections)
    trace = propagate(step, problem, x0, steps=8).trace
    mu, tolerance = constants.moreau, constants.tolerance
    change, energy = trace["change"], trace.with_start("energy")
    assert (trace["residual"] <= tolerance * change * (1 + 1e-9)).all()
    assert (energy[:-1] - energy[1:] >= (mu / 2 - tolerance) * change**2 - 1e-12 * energy[:-1]).all()
    assert (trace["subgradient"] <= (mu + tolerance) * change * (1 + 1e-9)).all()
    assert (change > 0).all()


def test_repeating_the_correction_is_what_lets_a_far_proposal_in():
    problem, truth, x0 = toy(1.0, dtype=torch.float64)
    shares = []
    for corrections in (1, 30):
        step = Repeated([lambda v, a: truth], Repeated.constants_for(problem.lipschitz), SCHEDULE, corrections=corrections)
        shares.append(propagate(step, problem, x0, steps=4).trace.acceptance_rate())
    assert shares[0] < 0.5 and shares[1] == 1.0


def test_as_printed_the_unit_step_violates_condition_1():
    problem, _, x0 = toy(1.0, dtype=torch.float64)
    lipschitz = problem.lipschitz
    constants = Constants(1.9 * lipschitz, 1 / lipschitz, 0.9 * lipschitz)
    with pytest.raises(ValueError, match="tolerance"):
        constants.check(lipschitz)
    step = Explicit([Adversary()], constants, SCHEDULE, fallback=False)
    result = propagate(step, problem, x0, steps=40, raises=False)
    assert result.status in (Status.DIVERGED, Status.NOT_FINITE)
    trace = result.trace
    assert (trace["residual"] > constants.tolerance * trace["change"]).any()


def test_one_correction_is_explicit_padnet():
    problem, _, x0 = toy(1.0, dtype=torch.float64)
    net, constants = Stages([[UNIT]]).nets[0].double(), Constants.for_lipschitz(problem.lipschitz)
    ours = propagate(explicit(stages_of(net), SCHEDULE, constants, corrections=1), problem, x0, steps=5)
    theirs = propagate(Explicit([net], constants, SCHEDULE), problem, x0, steps=5)
    assert torch.equal(ours.x, theirs.x)


def test_each_iteration_uses_its_own_network_and_the_last_one_stays():
    problem, _, x0 = toy(None)
    seen = []
    nets = [Stages([[UNIT]]).nets[0] for _ in range(3)]
    for i, net in enumerate(nets):
        net.register_forward_hook(lambda *_, i=i: seen.append(i))
    propagate(implicit(stages_of(*nets), SCHEDULE), problem, x0, steps=5)
    assert seen == [0, 1, 2, 2, 2]


def test_accept_always_is_not_certified():
    problem, _, x0 = toy(1.0, dtype=torch.float64)
    constants = Repeated.constants_for(problem.lipschitz)
    step = Repeated([Adversary()], constants, SCHEDULE, corrections=1, control=AlwaysAccept())
    trace = propagate(step, problem, x0, steps=6, raises=False).trace
    assert (trace["residual"] > constants.tolerance * trace["change"]).any()


@pytest.mark.parametrize("arguments", [{"moreau": 0.0}, {"tolerance": 0.5}])
def test_constants_are_checked(arguments):
    with pytest.raises(ValueError, match="moreau, tolerance"):
        Repeated.constants_for(1.0, **arguments)


def test_the_stopping_iteration_is_the_first_that_meets_the_rule():
    trace = Trace()
    changes = [(5.0, 5.0), (0.2, 0.05), (0.05, 0.5), (0.5, 0.5)]
    errors = [(0.9, 0.8), (0.7, 0.6), (0.5, 0.4), (0.3, 0.2)]
    for change, error in zip(changes, errors, strict=True):
        row = {"change": change, "norm": (10.0, 10.0), "error": error}
        trace.rows.append({name: torch.tensor(values, dtype=torch.float64) for name, values in row.items()})
    count, error = table.stops(Result(torch.zeros(2), Status.STEP_LIMIT, 4, 0.05, trace, None))
    assert count.tolist() == [3, 2] and error.tolist() == [0.5, 0.6]  # epsilon = 0.01: 0.05 <= 0.1 at k = 3 and k = 2
    for row in trace.rows:
        row["change"] = torch.full((2,), 5.0, dtype=torch.float64)
    count, error = table.stops(Result(torch.zeros(2), Status.STEP_LIMIT, 4, 0.5, trace, None))
    assert count.tolist() == [table.LIMIT] * 2 and error.tolist() == [0.3, 0.2]  # never: the limit, and the last error


@pytest.mark.parametrize("p", [None, *table.GRID])
def test_shipped_networks_certify_on_a_picture_they_never_saw(p):
    name = "padnet-gradient" if p is None else table.network_name(p)
    if name not in weights.cards():
        pytest.skip("not trained yet")
    card, stages = weights.card(name), weights.load(name)
    assert [len(units) for units in card["network"]["units"]] == [row["units"] for row in card["history"]]
    assert card["history"][-1]["change"] <= 0.01 or len(stages.nets) == 12  # Algorithm 2's rule, or its limit
    problem, truth, x0 = toy(p, card["energy"]["lambda"])
    schedule = Schedule(card["schedule"]["first"] ** -2, card["schedule"]["growth"])
    constants = Repeated.constants_for(problem.lipschitz)
    step = implicit(stages, schedule) if p is None else explicit(stages, schedule, constants)
    trace = propagate(step, problem, x0, steps=len(stages), truth=truth).trace
    assert (trace["error"][-1] < trace.start["error"]).all()
    if p is not None:
        assert (trace["residual"] <= constants.tolerance * trace["change"] * (1 + 1e-5)).all()
