"""Every solver against a reference: a closed form, a minimiser found another way, a rate; and how `propagate` reports."""

import math

import pytest
import torch

from odlkit.operators import Blur, Gradient, Wavelet
from odlkit.priors import Analysis, GroupLp, Lp
from odlkit.problem import LeastSquares, Problem
from odlkit.propagate import PropagationError, Status, iterate, propagate
from odlkit.solvers import ADMM, FISTA, HQS, GradientDescent, PlugAndPlay, ProximalGradient

DOUBLE = torch.float64


def blur(device, share: float = 0.5) -> Blur:
    """A crooked kernel; ``share`` of the light is not blurred, so that ``A^T A`` is well conditioned."""
    kernel = (1 - share) * torch.tensor([[0.0, 0.1, 0.3], [0.0, 0.2, 0.2], [0.2, 0.0, 0.0]], dtype=DOUBLE)
    kernel[1, 1] += share
    return Blur(kernel.to(device))


def fidelity(device, batch: int = 1, share: float = 0.5, size: int = 24) -> LeastSquares:
    generator = torch.Generator().manual_seed(3)
    x = torch.rand((batch, 1, size, size), generator=generator, dtype=DOUBLE).to(device)
    x[..., size // 4 : size // 2, size // 3 :] += 1
    operator = blur(device, share)
    return LeastSquares(operator, operator.A(x) + 0.05 * torch.randn(x.shape, generator=generator, dtype=DOUBLE).to(device))


def lasso(device, batch: int = 1, share: float = 0.5) -> Problem:
    return Problem(fidelity(device, batch, share), Analysis(Wavelet("haar", 2), Lp(1, 0.05)))


@pytest.fixture
def problem(device) -> Problem:
    return lasso(device)


@pytest.fixture
def start(problem):
    return problem.fidelity.y


@pytest.fixture
def solution(problem, start):
    """The lasso's minimiser, by proximal gradient alone: m > 0, so it converges linearly. Certified by its residual."""
    x = propagate(ProximalGradient(), problem, start, steps=5000, tol=1e-15, every=50).x
    assert problem.residual(x).item() < 1e-12
    return x


def test_gradient_descent_reaches_the_closed_form(device):
    f = fidelity(device)
    result = propagate(GradientDescent(), Problem(f), f.y, steps=2000, tol=1e-14)
    normal = torch.fft.rfft2(f.operator.A_adjoint(f.y)) / f.operator.gram(f.y)
    assert result.status is Status.CONVERGED
    torch.testing.assert_close(result.x, torch.fft.irfft2(normal, s=f.y.shape[-2:]), rtol=0, atol=1e-10)


def test_gradient_descent_contracts_at_its_rate_and_no_faster(device):
    f = fidelity(device)
    m, L = f.bounds
    best = torch.fft.irfft2(torch.fft.rfft2(f.operator.A_adjoint(f.y)) / f.operator.gram(f.y), s=f.y.shape[-2:])
    start = best + torch.randn(best.shape, generator=torch.Generator().manual_seed(0), dtype=DOUBLE).to(device)
    distance = lambda state: (state.x - best).flatten(1).norm(dim=1)  # noqa: E731
    d = propagate(GradientDescent(2 / (m + L)), Problem(f), start, steps=40, measure={"d": distance}).trace["d"][:, 0]
    factor = (L - m) / (L + m)
    assert (d[1:] / d[:-1]).max() <= factor * (1 + 1e-9)
    assert (d[-1] / d[-2]) > 0.9 * factor


@pytest.mark.parametrize("step", [FISTA(), ADMM(0.05), ADMM(0.5), ADMM(5.0), ADMM(0.5, growth=1.01)], ids=str)
def test_convex_solvers_reach_one_minimiser(step, problem, start, solution):
    """Eq: PADNet (4)."""
    result = propagate(step, problem, start, steps=1500, tol=1e-13)
    torch.testing.assert_close(result.x, solution, rtol=0, atol=1e-6 if isinstance(step, FISTA) else 1e-8)


def test_hqs_reaches_the_minimiser_as_the_penalty_grows_and_not_before(problem, start, solution):
    far, near = (propagate(HQS(rho), problem, start, steps=60_000, tol=1e-13, every=100).x for rho in (0.1, 100.0))
    assert (far - solution).norm() > 100 * (near - solution).norm()
    assert (near - solution).norm() < 1e-2 * solution.norm()
    grown = propagate(HQS(0.05, growth=1.02), problem, start, steps=600).x
    assert (grown - solution).norm() < (far - solution).norm() / 50  # the growth freezes it a little short


def test_hqs_is_proximal_gradient_on_the_envelope(problem, start):
    rho, v = 0.3, start
    for _ in range(15):
        envelope_gradient = rho * (v - problem.fidelity.prox(v, 1 / rho))
        v = problem.prior.prox(v - envelope_gradient / rho, 1 / rho)
    torch.testing.assert_close(propagate(HQS(rho), problem, start, steps=15).x, v)


@pytest.mark.parametrize("share", [0.5, 0.0], ids=["well conditioned", "blur only"])
def test_rates_of_ista_and_fista(device, share):
    problem = lasso(device, share=share)
    start, L = problem.fidelity.y, problem.lipschitz
    best = propagate(ADMM(0.2), problem, start, steps=3000, tol=1e-13, every=20)
    distance = (start - best.x).square().sum().cpu()
    k = torch.arange(1, 121, dtype=DOUBLE)
    bounds = [(ProximalGradient(1 / L), L * distance / (2 * k)), (FISTA(), 2 * L * distance / (k + 1) ** 2)]
    gaps = []
    for step, bound in bounds:
        gap = propagate(step, problem, start, steps=120).trace["energy"][:, 0] - problem.energy(best.x).item()
        assert (gap >= -1e-12).all() and (gap <= bound + 1e-12).all()
        gaps.append(gap)
    if share == 0:
        assert gaps[1][60] < gaps[0][60]  # where it is hard, acceleration pays


@pytest.mark.parametrize("p", [1, 0.5, 0])
def test_proximal_gradient_descends_for_every_prior(p, device):
    problem = Problem(fidelity(device), Analysis(Wavelet("haar", 2), Lp(p, 0.05)))
    energy = propagate(ProximalGradient(), problem, problem.fidelity.y, steps=60).trace.with_start("energy")
    assert (energy.diff(dim=0) <= 1e-12 * energy[0]).all()


def test_admm_for_total_variation_agrees_with_a_long_run_and_is_optimal(device):
    f, weight, rho = fidelity(device), 0.1, 0.5
    problem = Problem(f, GroupLp(1, weight), transform=Gradient())
    short = propagate(ADMM(rho), problem, f.y, steps=100)
    long, other = (propagate(ADMM(r), problem, f.y, steps=4000, every=100) for r in (rho, 3.0))
    lowest = long.trace["energy"].min()
    assert 0 <= short.trace["energy"][-1] - lowest < 1e-3 * lowest < 1e-2 * (problem.energy(f.y).cpu() - lowest)
    assert (other.trace["energy"].min() - lowest).abs() < 1e-6 * lowest
    force = rho * long.state.aux["nu"]  # in dR(D x): pairs no longer than the weight, and D^T of it balances grad f
    assert torch.hypot(*force.chunk(2, dim=1)).max() <= weight * (1 + 1e-9)
    assert (f.grad(long.x) + Gradient().A_adjoint(force)).norm() < 1e-4 * f.grad(torch.zeros_like(long.x)).norm()
    # the same test at the start, where it must fail
    assert f.grad(f.y).norm() > 1e-2 * f.grad(torch.zeros_like(long.x)).norm()


def test_plug_and_play_with_a_prox_is_hqs_and_admm(problem, start):
    plugged = lambda v, alpha: problem.prior.prox(v, alpha**2)  # noqa: E731
    for dual, twin in ((False, HQS(0.7, 1.1)), (True, ADMM(0.7, 1.1))):
        mine = propagate(PlugAndPlay(plugged, 0.7, 1.1, dual=dual), problem, start, steps=12).x
        torch.testing.assert_close(mine, propagate(twin, problem, start, steps=12).x)


def test_a_growing_penalty_does_not_overflow(problem, start):
    for step in (HQS(1.0, 2.0), ADMM(1.0, 2.0)):
        assert torch.isfinite(propagate(step, problem, start, steps=1200, energy=False).x).all()


# How a propagation ends


def test_converged_and_step_limit(problem, start):
    done = propagate(ProximalGradient(), problem, start, steps=5000, tol=1e-8)
    assert done.status is Status.CONVERGED and done.iterations == len(done.trace) < 5000 and done.residual <= 1e-8
    short = propagate(ProximalGradient(), problem, start, steps=3, tol=1e-8)
    assert short.status is Status.STEP_LIMIT and short.iterations == len(short.trace) == 3 and short.residual > 1e-8


def test_divergence_raises_and_carries_the_trace(device):
    f = fidelity(device)
    problem = Problem(f)
    bad = GradientDescent(2.2 / problem.lipschitz)
    start = torch.rand(f.y.shape, dtype=DOUBLE).to(device)
    with pytest.raises(PropagationError, match="diverged") as caught:
        propagate(bad, problem, start, steps=2000)
    result = caught.value.result
    assert result.status is Status.DIVERGED and len(result.trace) == result.iterations < 2000
    assert result.trace["norm"][-1] > 1e5 * start.norm().cpu() and torch.isfinite(result.trace["norm"]).all()
    told = propagate(bad, problem, start, steps=2000, raises=False)
    assert told.status is Status.DIVERGED and told.iterations == result.iterations
    # inside the bound the same run does not diverge
    assert propagate(GradientDescent(1.99 / problem.lipschitz), problem, start, steps=2000).status is Status.STEP_LIMIT


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_non_finite_values_raise(poison, problem, start):
    step = PlugAndPlay(lambda v, alpha: v + poison, penalty=1.0)
    with pytest.raises(PropagationError, match="not finite") as caught:
        propagate(step, problem, start, steps=10)
    assert caught.value.result.status is Status.NOT_FINITE and caught.value.result.iterations == 1
    assert propagate(step, problem, start, steps=10, raises=False).status is Status.NOT_FINITE


def test_every_looks_at_each_nth_and_the_last(problem, start):
    full, sparse = (propagate(FISTA(), problem, start, steps=23, every=n) for n in (1, 5))
    rows = [4, 9, 14, 19, 22]
    torch.testing.assert_close(sparse.trace["energy"], full.trace["energy"][rows])
    torch.testing.assert_close(sparse.trace["change"], full.trace["change"][rows])
    assert torch.equal(sparse.x, full.x) and sparse.iterations == 23


def test_start_and_measures_are_recorded(problem, start):
    seen = propagate(ProximalGradient(), problem, start, steps=4, truth=start, measure={"k": lambda state: state.k}).trace
    assert seen["k"][:, 0].tolist() == [1, 2, 3, 4]
    assert seen.with_start("error")[0].item() == 0 and len(seen.with_start("energy")) == 5
    with pytest.raises(KeyError, match="not recorded"):
        seen["nothing"]


@pytest.mark.parametrize("step", [GradientDescent(), ProximalGradient(), FISTA(), ADMM(0.5), HQS(0.5, 1.1)], ids=str)
def test_items_of_a_batch_do_not_see_each_other(step, device):
    together = lasso(device, batch=3)
    y = together.fidelity.y
    result = propagate(step, together, y, steps=12)
    for i in range(3):
        alone = Problem(LeastSquares(together.fidelity.operator, y[i : i + 1]), together.prior)
        single = propagate(step, alone, y[i : i + 1], steps=12)
        torch.testing.assert_close(result.x[i : i + 1], single.x)
        torch.testing.assert_close(result.trace["energy"][:, i], single.trace["energy"][:, 0])


def test_tolerance_waits_for_the_slowest_item(device):
    problem = lasso(device, batch=2)
    y = problem.fidelity.y
    at_rest = propagate(ProximalGradient(), problem, y, steps=5000, tol=1e-15, every=50).x[:1]
    x0 = torch.cat([at_rest, y[1:]])
    result = propagate(ProximalGradient(), problem, x0, steps=5000, tol=1e-10)
    relative = result.trace["change"] / result.trace["norm"]
    assert relative[0, 0] < 1e-10 < relative[0, 1] and result.iterations > 5
    assert relative[-1].max() <= 1.001e-10


def test_iterate_is_differentiable(problem, start):
    weight = torch.tensor(1.0, dtype=DOUBLE, device=start.device, requires_grad=True)
    path = iterate(GradientDescent(0.5), problem, weight * start)
    state = [next(path)[0] for _ in range(5)][-1]
    state.x.sum().backward()
    m = problem.fidelity.operator.gram(start)  # x^5 = (I - A^T A / 2)^5 w y + ...
    slope = torch.fft.irfft2((1 - 0.5 * m) ** 5 * torch.fft.rfft2(start), s=start.shape[-2:]).sum()
    torch.testing.assert_close(weight.grad, slope)


def test_solvers_keep_dtype(device):
    f = fidelity(device)
    single = Problem(LeastSquares(blur(device), f.y.float()), Analysis(Wavelet("haar", 2), Lp(1, 0.05)))
    double = lasso(device)
    for step in (GradientDescent(), ProximalGradient(), FISTA(), ADMM(0.5), HQS(0.5)):
        low, high = propagate(step, single, f.y.float(), steps=10).x, propagate(step, double, f.y, steps=10).x
        assert low.dtype == torch.float32
        torch.testing.assert_close(low.double(), high, rtol=0, atol=1e-5)
