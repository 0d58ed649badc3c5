"""GDC: the modules are the paper's formulas, the two controls do what they say, and what is printed fails where said."""

import pytest
import torch
from torch import nn

from odlkit import instances, weights
from odlkit.control import AlwaysAccept, BoundedGradient, Candidate, ErrorCondition, MonotoneEnergy, NeverAccept
from odlkit.models.gdc import (
    Cascade,
    Corrective,
    Discriminative,
    FullyDefined,
    Generative,
    PartiallyDefined,
    Penalty,
    cascade,
    scheme,
)
from odlkit.models.padnet import Constants, Explicit
from odlkit.networks import Classifier, ConvUnit, ResidualNet
from odlkit.operators import Identity
from odlkit.priors import Lp, Zero
from odlkit.problem import LeastSquares, Problem, norm_items
from odlkit.propagate import Status, iterate, propagate
from odlkit.propositions import gdc

SIZE = 32


def level(stage):
    return 0.1


def small_classifier() -> Classifier:
    torch.manual_seed(3)
    return Classifier((4, 4)).double()


def small_network() -> ResidualNet:
    torch.manual_seed(4)
    return ResidualNet([ConvUnit(width=4, depth=3)]).double()


def scalar(value: float) -> torch.Tensor:
    return torch.full((1, 1, 1, 1), value, dtype=torch.float64)


@pytest.fixture
def problem() -> Problem:
    return gdc.defined("blur", "camera", SIZE, 1.0)


@pytest.fixture
def batch(problem) -> torch.Tensor:
    return torch.rand(3, 1, SIZE, SIZE, dtype=torch.float64)


def test_the_generative_module_adds_the_networks_residual(problem, batch):
    """Eq: GDC (2)."""
    net = small_network()
    residual = -0.1 * net.units[0](batch, 0.1)
    torch.testing.assert_close(Generative(net, level)(problem, batch, 0), batch + residual)


def test_networks_of_their_own_for_every_stage(problem, batch):
    nets = nn.ModuleList([small_network(), small_network().requires_grad_(False)])
    nets[1].units[0].layers[0].weight.zero_()
    module = Generative(nets, level)
    for stage, net in ((0, nets[0]), (1, nets[1]), (7, nets[1])):
        assert torch.equal(module(problem, batch, stage), net(batch, 0.1))


def test_the_discriminative_module_descends_the_logit_of_each_image(problem, batch):
    """D against central differences of d, image by image, although the batch is judged in one call.

    Eq: GDC (3), (4).
    """
    net = small_classifier()
    module = Discriminative(net.potential, level, 0.5)
    with torch.no_grad():  # as in `propagate`
        direction, moved = module.direction(batch, 0), module(problem, batch, 0)
        assert not moved.requires_grad
        h, probe = 1e-5, torch.randn_like(batch)
        difference = (net.potential(batch + h * probe, 0.1) - net.potential(batch - h * probe, 0.1)) / (2 * h)
        torch.testing.assert_close(-(direction * probe).flatten(1).sum(1), difference, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(moved, batch + 0.5 * direction)
        for i in range(3):
            torch.testing.assert_close(module.direction(batch[i : i + 1], 0), direction[i : i + 1])
        assert (net.potential(batch + 1e-3 * direction, 0.1) < net.potential(batch, 0.1)).all()


def test_the_step_may_depend_on_the_stage(problem, batch):
    module = Discriminative(small_classifier().potential, level, lambda stage: float(stage))
    with torch.no_grad():
        assert torch.equal(module(problem, batch, 0), batch)
        torch.testing.assert_close(module(problem, batch, 2), batch + 2 * module.direction(batch, 2))


def test_the_discriminative_module_is_differentiable_again():
    """By u and by the weights, against finite differences: joint training needs both.  Eq: GDC (4)."""
    net = small_classifier()
    u = torch.rand(2, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    module = Discriminative(net.potential, level, 0.7)
    assert torch.autograd.gradcheck(lambda u: module(None, u, 0), (u,))
    first = net.layers[0]

    def by_weight(weight):
        play = Discriminative(lambda v, a: torch.func.functional_call(net, {"layers.0.weight": weight}, (v, a)), level)
        return play(None, u.detach(), 0)

    assert torch.autograd.gradcheck(by_weight, (first.weight.detach().clone().requires_grad_(),))


def test_the_corrective_module_is_optimal_in_its_subproblem(problem, batch):
    """(6) minimises the prior plus the linearised fidelity; (7) has a zero gradient; no prior means (7).

    Eq: GDC (5), (6), (7), (8), (9).
    """
    gamma, f = 3.0, problem.fidelity
    new = Corrective(lambda stage: gamma)(problem, batch, 0)
    torch.testing.assert_close(new, problem.prox_prior(batch - f.grad(batch) / gamma, 1 / gamma))

    def model(x):
        return (
            problem.prior.value(x) + (f.grad(batch) * (x - batch)).flatten(1).sum(1) + gamma / 2 * norm_items(x - batch) ** 2
        )

    assert all((model(new) <= model(new + s * torch.randn_like(new))).all() for s in (1e-3, 1e-2, 0.1))
    solved = Corrective(lambda stage: gamma, partial=True)(problem, batch, 0)
    assert norm_items(f.grad(solved) + gamma * (solved - batch)).max() < 1e-12 * norm_items(batch).max()
    torch.testing.assert_close(Corrective(lambda stage: gamma)(Problem(f), batch, 0), solved)
    raised = torch.tensor([0.1, 3.0, 0.1]).view(3, 1, 1, 1)
    for i, used in enumerate((2 * problem.lipschitz, 3.0, 2 * problem.lipschitz)):
        got = Corrective(lambda stage: raised, least=2.0)(problem, batch, 0)[i]
        torch.testing.assert_close(got, Corrective(Penalty(max(used, 2 * problem.lipschitz)))(problem, batch, 0)[i])


def test_penalties_grow_up_to_their_cap():
    """Eq: GDC (5), footnote 1."""
    assert [Penalty(2.0, 1.5)(t) for t in range(3)] == [2.0, 3.0, 4.5]
    assert Penalty(2.0, 1.5)(10**6) == 1e12
    tensor = Penalty(torch.tensor([1.0, 4.0]).view(2, 1, 1, 1), 2.0, 6.0)(1)
    assert tensor.flatten().tolist() == [2.0, 6.0]


@pytest.mark.parametrize("name, kinds", [("GM", "CG"), ("GD", "CGD"), ("GC", "CGC"), ("GDC", "CGDC")])
def test_the_schemes_are_the_data_step_and_the_modules_of_their_name(problem, batch, name, kinds):
    """Eq: GDC (2), (4), (7), (9)."""
    modules = scheme(name, small_network(), small_classifier().potential, level, Penalty(0.1, 2.0))
    assert "".join(type(module).__name__[0] for module in modules) == kinds
    assert modules[0].partial and not any(getattr(m, "partial", False) for m in modules[1:])
    expected = batch
    for module in modules:
        expected = module(problem, expected, 1)
    assert torch.equal(cascade(modules, problem, batch, 1), expected)
    with pytest.raises(ValueError, match="expected GM, GD, GC or GDC, got 'GX'"):
        scheme("GX", None, None, level, Penalty(1.0))


def test_a_cascade_trains_every_module(problem):
    """Two stages, end to end, with the library's own loop: every weight of both networks gets a gradient."""
    network, classifier, step = small_network(), small_classifier(), nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    modules = scheme("GDC", network, classifier.potential, level, Penalty(0.1, 2.0), step)
    states = [state for (state, _), _ in zip(iterate(Cascade(modules), problem, problem.fidelity.y), range(2), strict=False)]
    (states[-1].x ** 2).sum().backward()
    last_bias = list(classifier.layers[-1].parameters())[1]  # a constant in d: no influence on its gradient
    for p in (step, *network.parameters(), *classifier.parameters()):
        assert p is last_bias or (p.grad is not None and p.grad.abs().max() > 0)


def lines_of_algorithm_1(problem, modules, u, gamma, a):
    u_c = cascade(modules, problem, u, 0)
    v = u_c if problem.energy(u_c) <= problem.energy(u) - a * (u_c - u).square().sum() else u
    return problem.prox_prior(v - problem.fidelity.grad(v) / gamma, 1 / gamma)


def test_algorithm_1_line_by_line_each_image_by_itself(problem):
    """One image whose cascade is kept and one whose is not, in one batch.  Eq: GDC Algorithm 1."""
    y, lipschitz = problem.fidelity.y, problem.lipschitz
    modules = [lambda p, u, t: u - p.fidelity.grad(u) / lipschitz * torch.tensor([1.0, -3.0]).view(2, 1, 1, 1)]
    step, both = FullyDefined(modules), y.repeat(2, 1, 1, 1)
    state, record = step(problem, step.init(problem, both))
    assert record["accepted"].tolist() == [1, 0]
    for i, sign in enumerate((1.0, -3.0)):
        one = [lambda p, u, t, s=sign: u - s * p.fidelity.grad(u) / lipschitz]
        torch.testing.assert_close(
            state.x[i : i + 1], lines_of_algorithm_1(problem, one, y, 1.05 * lipschitz, 1e-3 * lipschitz)
        )
    xi = record["subgradient"]
    assert record["kappa"] == pytest.approx(0.025 * lipschitz) and (xi <= 2.05 * lipschitz * record["distance"].sqrt()).all()


def test_the_recorded_subgradient_is_one():
    """With a plain l1 prior, xi - grad f lies in the subdifferential of lambda ||.||_1.  Eq: GDC Proposition 1."""
    y = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    problem = Problem(LeastSquares(Identity(), y, 2.0), Lp(1, 0.8))
    x, gamma = torch.randn_like(y), 2.1
    new = propagate(FullyDefined([]), problem, x, steps=1)
    xi = -gamma * (new.x - x) - problem.fidelity.grad(x) + problem.fidelity.grad(new.x)
    assert norm_items(xi).item() == pytest.approx(new.trace["subgradient"].item())
    s, away = xi - problem.fidelity.grad(new.x), new.x != 0
    torch.testing.assert_close(s[away], 0.8 * new.x.sign()[away])
    assert s.abs().max() <= 0.8 * (1 + 1e-12) and (~away).any()


def test_check_refuses_what_proposition_1_does_not_cover(problem):
    FullyDefined([]).check(problem)
    for step, message in (
        (FullyDefined([], penalty=0.9 * problem.lipschitz), "penalty: expected more than L = 2"),
        (FullyDefined([], penalty=Penalty(3.0, 1.1)), "penalty: expected a constant"),
        (FullyDefined([], margin=0.0), "margin: expected a positive number, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            step.check(problem)


def test_algorithm_2_line_by_line_each_image_by_itself(problem):
    """A short move that is kept as it is, a long one that is clipped, and one whose gradient closes the gate.

    Eq: GDC Algorithm 2, (7), Proposition 2.
    """
    f, y, gamma, c = problem.fidelity, problem.fidelity.y, 2.0, 4.0
    pushes = torch.tensor([0.01, 1.0, 1.0], dtype=torch.float64).view(3, 1, 1, 1)
    u = torch.cat([y, y, y + 3])
    step = PartiallyDefined([lambda p, u, t: u + pushes], lambda stage: gamma, 40.0, c)
    state, record = step(problem, step.init(problem, u))
    assert record["within"].tolist() == [1, 0, 0] and record["accepted"].tolist() == [1, 1, 0]
    scale = torch.tensor([1.0, 2**0.5 / 32, 2**0.5 / 32], dtype=torch.float64).view(3, 1, 1, 1)
    u_c = f.prox(u + scale * pushes, 1 / gamma)
    torch.testing.assert_close(state.x, torch.cat([u_c[:2], u[2:]]))
    torch.testing.assert_close(record["gradient"], norm_items(f.grad(u_c)))
    torch.testing.assert_close(gamma * record["data_step"], record["gradient"], rtol=1e-10, atol=0)
    torch.testing.assert_close(record["move"], norm_items(pushes.expand(u.shape)))


def test_a_rejected_step_is_not_the_end():
    """The gate refuses the first step, which moves nothing; the loop goes on, and later ones are accepted."""
    problem = Problem(LeastSquares(Identity(), scalar(0.0), 2.0))
    step = PartiallyDefined([], lambda t: 10.0 if t == 0 else 1.0, 1.0, 1.0)
    run = propagate(step, problem, scalar(1.0), steps=3)
    assert run.status is Status.STEP_LIMIT and run.trace["accepted"].flatten().tolist() == [0, 1, 1]
    shut = propagate(PartiallyDefined([], lambda t: 10.0, 0.1, 1.0), problem, scalar(1.0), steps=3)
    assert shut.status is Status.STEP_LIMIT and shut.residual == 0 and not shut.trace["accepted"].any()
    pair = propagate(step, problem, torch.cat([scalar(1.0), scalar(0.0)]), steps=1, tol=1e-9)
    assert pair.trace["held"].tolist() == [[1, 0]] and pair.status is Status.STEP_LIMIT  # one of a batch is enough


def test_a_refused_step_that_falls_back_may_converge():
    """Refused for ever, PADNet's step is the proximal gradient, which stops at a minimiser."""
    problem = Problem(LeastSquares(Identity(), scalar(0.0), 2.0), Zero())
    step = Explicit([lambda v, alpha: v], Constants.for_lipschitz(2.0), control=NeverAccept())
    run = propagate(step, problem, scalar(0.0), steps=3)
    assert run.status is Status.CONVERGED and run.iterations == 1 and not run.trace["accepted"].any()


def test_the_controls_fit_other_papers_steps(problem):
    """PADNet's step under GDC's two rules, GDC's step under none: a control sees numbers, not papers."""
    constants = Constants.for_lipschitz(problem.lipschitz)
    network = instances.networks("conv")["adversary"]
    for control in (BoundedGradient(1e-9), MonotoneEnergy(1e-3)):
        run = propagate(Explicit([network], constants, control=control), problem, problem.fidelity.y, steps=5)
        energy = run.trace.with_start("energy")
        assert run.trace.acceptance_rate() < 0.5 and (energy[1:] < energy[:-1]).all()
    u = problem.fidelity.y
    norm = norm_items(problem.fidelity.grad(u)).item()
    candidate = Candidate(u, u, u, u)
    assert BoundedGradient(norm)(problem, candidate).tolist() == [True]
    assert BoundedGradient(0.99 * norm)(problem, candidate).tolist() == [False]
    for control, rate in ((AlwaysAccept(), 1), (ErrorCondition(1e9), 0)):  # no error is computed: NaN is no proof
        step = FullyDefined([Generative(network, level)], control=control)
        assert propagate(step, problem, u, steps=3, raises=False).trace.acceptance_rate() == rate


def test_errata_proposition_1_printed_constant(problem):
    """Between (gamma - L) / 2, which holds, and (gamma + L) / 2, which is printed.  Eq: GDC Proposition 1, (13), (14)."""
    denoise = gdc.defined("denoise", "camera", SIZE, 1.0)
    gamma, lipschitz = 2.1, denoise.lipschitz
    run = propagate(FullyDefined([]), denoise, denoise.fidelity.y, steps=5)
    assert gdc.decrease(run.trace, (gamma - lipschitz) / 2).holds
    assert not gdc.decrease(run.trace, (gamma + lipschitz) / 2).holds


def test_errata_descent_lemma_has_a_plus():
    """f = u^2 from v = 1 to 0: Eq. 14 as printed claims 0 <= 1 - 2 - 1.  Eq: GDC (14)."""
    f = LeastSquares(Identity(), scalar(0.0), 2.0)
    v, new, lipschitz = scalar(1.0), scalar(0.0), 2.0
    linear = f.value(v) + (f.grad(v) * (new - v)).sum()
    assert f.value(new) <= linear + lipschitz / 2 and f.value(new) > linear - lipschitz / 2


def test_errata_a_growing_gamma_freezes_at_a_point_that_is_not_critical():
    """f = x^2 / 2 and gamma_t = 1.1 eta^t: the limits 0.030 and 0.0088 are not 0, while d is.  Eq: GDC Proposition 1."""
    problem = Problem(LeastSquares(Identity(), scalar(0.0)), Zero())
    for growth, limit in ((2.0, 0.0303), (1.5, 0.00884)):
        step = FullyDefined([], penalty=Penalty(1.1, growth, cap=float("inf")))
        run = propagate(step, problem, scalar(1.0), steps=400)
        assert run.x.item() == pytest.approx(limit, rel=0.01) and run.trace["distance"][-1].item() == 0
        assert problem.residual(run.x).item() == pytest.approx(limit, rel=0.01)


class DoubleWell:
    """``f = (x^2 - 1)^2``, for ``|x| <= 1``: L = 8."""

    bounds = (-4.0, 8.0)

    def value(self, x):
        return (x.square() - 1).square().flatten(1).sum(1).double()

    def grad(self, x):
        return 4 * x * (x.square() - 1)


def test_errata_without_sufficient_decrease_the_sequence_oscillates():
    """The module u -> -u keeps Psi: accepted for ever with a = 0, refused with a > 0.  Eq: GDC Algorithm 1."""
    problem = Problem(DoubleWell(), Zero())
    for margin, values in ((0.0, [-1.0, 1.0, -1.0, 1.0]), (1e-3, [1.0])):
        run = propagate(
            FullyDefined([lambda p, u, t: -u], margin=margin), problem, scalar(1.0), steps=4, measure={"x": lambda s: s.x}
        )
        assert run.trace["x"].flatten().tolist() == values


def test_errata_plain_networks_leave_the_assumption_of_proposition_2():
    """As gamma grows the plain network's move exceeds sqrt(c / gamma); the clipped one cannot.  Eq: GDC Condition 2."""
    network = instances.networks("conv", trained="podm-denoiser")["trained"]
    step, run = gdc.partially_run("denoise", "camera", SIZE, [Generative(network, lambda stage: 0.02)])
    assert run.trace["within"][0].item() == 1 and run.trace["within"][-1].item() == 0
    assert all(c.holds for c in gdc.proposition_2_checks(run.trace, step.gate, step.c, 1.5))


def test_errata_a_gate_that_is_too_small_freezes_at_the_start():
    """The proposition holds, and says nothing: every point is rejected.  Eq: GDC Proposition 2."""
    network = instances.networks("conv", trained="podm-denoiser")["trained"]
    step, run = gdc.partially_run("denoise", "camera", SIZE, [Generative(network, level)], gate=1e-3)
    assert run.trace.acceptance_rate() < 0.1
    assert all(c.holds for c in gdc.proposition_2_checks(run.trace, step.gate, step.c, 1.5))


def test_errata_a_constant_gamma_does_not_settle():
    """eta > 1 is needed for the sum, and not stated: each step within its bound, for ever.  Eq: GDC Proposition 2, (15)."""
    network = instances.alternating(instances.networks("conv", trained="podm-denoiser")["trained"])
    step, run = gdc.partially_run("denoise", "camera", SIZE, [Generative(network, level)], growth=1.0, steps=60)
    assert gdc.proposition_2_checks(run.trace, step.gate, step.c, 1.0)[1].holds
    assert run.trace["change"][-10:].min() > 0.5 * run.trace["change"][1:].max() > 0.1


def test_every_kind_of_network_keeps_the_certificates():
    """Eq: GDC (1), Proposition 1, Proposition 2."""
    assert "podm-denoiser" in weights.cards()
    for kind, network in instances.networks("conv", trained="podm-denoiser").items():
        problem = gdc.defined("blur", "coins", SIZE, 0.8)
        step, run = gdc.fully_run(problem, gdc.whole(problem, gdc.learned(kind, network)), 10)
        assert all(c.holds for c in gdc.checks_of(problem, step, run))
        step, run = gdc.partially_run("inpaint", "coins", SIZE, gdc.learned(kind, network), steps=10)
        assert all(c.holds for c in gdc.proposition_2_checks(run.trace, step.gate, step.c, 1.5))
