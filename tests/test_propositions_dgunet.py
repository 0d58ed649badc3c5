"""DGUNet's certificate holds, its controls violate and tampering is caught; what is measured of the learned step."""

import json

import pytest
import torch

from odlkit import certify
from odlkit.models.dgunet import GradientStep
from odlkit.problem import Problem
from odlkit.propositions import dgunet as prop
from odlkit.solvers import ProximalGradient


@pytest.fixture(scope="module")
def report():
    (entry,) = certify.run(["dgunet-gradient-step"])
    return entry


def test_the_known_step_is_certified_on_a_blur_a_mask_and_blocks(report):
    """Eq: DGUNet (6)."""
    assert report["holds"] and report["instances"] == 3 and report["dtype"] == "float64" and len(report["details"]) == 9
    assert min(c["margin"] for run in report["details"] for c in run["checks"] if c["name"] != "proximal gradient") < 0.2
    assert any(run["norm_squared"] > 2 for run in report["details"])  # where rho = 1 would already be too long
    json.dumps(report, allow_nan=False)


def test_a_longer_step_violates(report):
    assert len(report["controls"]) == 3 and all(c["violates"] and c["grown"] > 10 for c in report["controls"])


@pytest.mark.parametrize("name", prop.instances(16))
def test_a_stage_is_the_solvers_step(name):
    """Eq: DGUNet (3), (4), (5): with ``prox_(rho J)``, and not with ``prox_J``."""
    problem = Problem(*prop.instances(16)[name])
    step = GradientStep(1, known=True).double().requires_grad_(False)
    step.rho.fill_(0.7 / problem.lipschitz)
    solver, stage = ProximalGradient(step.rho.item()), prop.Stage(step)
    start = problem.fidelity.back
    one, two = solver.init(problem, start), stage.init(problem, start)
    for _ in range(5):
        before = two.x
        one, two = solver(problem, one)[0], stage(problem, two)[0]
    assert torch.allclose(one.x, two.x, atol=1e-12, rtol=0)
    wrong = problem.prox_prior(step(before, problem.fidelity.y, problem.fidelity.operator), 1.0)
    assert torch.allclose(wrong, two.x, atol=1e-6) == name.startswith("astronaut")  # which has no prior


def test_tampered_runs_are_noticed():
    fidelity, prior = prop.instances(16)["camera, blur"]
    result, start = prop.two_runs(Problem(fidelity, prior), 1.0, 5)
    assert all(check.holds for check in prop.checks(result.trace, start, 0.5))
    for name, value in (("error", 1e-6), ("distance", 2 * start), ("energy", 2 * result.trace.start["energy"])):
        result, start = prop.two_runs(Problem(fidelity, prior), 1.0, 5)
        result.trace.rows[3][name] = torch.zeros(2, dtype=torch.float64) + value
        assert not all(check.holds for check in prop.checks(result.trace, start, 0.5)), name


def test_the_norm_of_the_learned_step():
    """1 - rho where both maps are the identity, which they are up to small weights at the start.  Eq: DGUNet (7)."""
    torch.manual_seed(0)
    step, x = GradientStep(1, known=False).double().requires_grad_(False), torch.rand(1, 1, 12, 12, dtype=torch.float64)
    untrained = prop.learned_norm(step, x, x)
    assert 0.45 < untrained < 1 and abs(untrained - 0.5) > 1e-3
    for net in (step.A, step.At):
        net.second.weight.zero_()
    assert prop.learned_norm(step, x, x) == pytest.approx(0.5, abs=1e-12)
    step.rho.fill_(2.5)
    assert prop.learned_norm(step, x, x) == pytest.approx(1.5, abs=1e-12)  # nothing keeps rho below 2
