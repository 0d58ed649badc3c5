"""Problems: gradients, proximal maps, constants and residuals of the fidelities against autograd and dense algebra."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from odlkit.operators import BlockSampling, Blur, BlurDecimate, Gradient, Identity, Mask, Stack, ValidBlur, Wavelet
from odlkit.priors import GroupLp, Lp
from odlkit.problem import LeastSquares, LinkedGradient, Problem, norm_items, sum_items

seeds = st.integers(0, 1000)


def noise(*shape, dtype=torch.float64, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def kernel(h=3, w=4, seed=0):
    k = torch.rand(h, w, generator=torch.Generator().manual_seed(seed)).double()
    return k / k.sum()


OPERATORS = {
    "identity": Identity,
    "blur": lambda: Blur(kernel()),
    "valid blur": lambda: ValidBlur(kernel()),
    "mask": lambda: Mask((noise(1, 1, 6, 8) > 0).double()),
    "blur decimate": lambda: BlurDecimate(kernel(), 2),
    "wavelet": lambda: Wavelet("db2", 1),
    "block sampling": lambda: BlockSampling(noise(3, 4)),
    "blur of wavelet": lambda: Blur(kernel()) @ Wavelet("haar", 1),
    "stack": lambda: Stack(Blur(kernel()), Gradient()),
}
every_operator = pytest.mark.parametrize("name", OPERATORS)


def least_squares(name, weight=2.5, seed=0, dtype=torch.float64, device="cpu"):
    op, x = OPERATORS[name](), noise(2, 1, 6, 8, dtype=dtype, device=device, seed=seed)
    y = op.A(x) + noise(*op.A(x).shape, dtype=dtype, device=device, seed=seed + 1)
    return LeastSquares(op, y, weight), noise(*x.shape, dtype=dtype, device=device, seed=seed + 2)


def linked(seed=0, beta=0.7, weight=3.0):
    f = LinkedGradient(Blur(kernel()), Gradient(), noise(2, 2, 6, 8, seed=seed), beta, weight)
    return f, noise(2, 4, 6, 8, seed=seed + 1)


def autograd(f, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f.value(x).sum(), x)[0]


@every_operator
@given(seed=seeds, weight=st.sampled_from([0.1, 1.0, 40.0]))
def test_least_squares_gradient(name, seed, weight):
    """grad against autograd of value, and value against its definition."""
    f, x = least_squares(name, weight, seed)
    assert torch.allclose(f.grad(x), autograd(f, x), rtol=1e-9, atol=1e-9 * weight)
    assert torch.allclose(f.value(x), 0.5 * weight * (f.operator.A(x) - f.y).square().flatten(1).sum(1))


@every_operator
def test_least_squares_keeps_precision_and_device(name, device, dtype):
    f, x = least_squares(name, 2.0, dtype=dtype, device=device)
    exact, x64 = least_squares(name, 2.0)
    assert f.value(x).dtype == torch.float64 and f.value(x).shape == (2,)
    for mine, theirs in ((f.grad(x), exact.grad(x64)), (f.prox(x, 0.7), exact.prox(x64, 0.7))):
        assert mine.dtype == dtype and mine.device == x.device
        assert torch.allclose(mine.cpu().double(), theirs, atol=1e-4 if dtype == torch.float32 else 1e-8)


@every_operator
@given(seed=seeds, step=st.sampled_from([0.02, 0.5, 10.0]))
def test_least_squares_prox(name, seed, step):
    """grad f(x) + (x - z) / step = 0, for one step, one step per item and one weight per item."""
    f, z = least_squares(name, 2.5, seed)
    x = f.prox(z, step)
    assert torch.allclose(step * f.grad(x) + x - z, torch.zeros_like(z), atol=1e-7)
    per_item = torch.tensor([step, 2 * step]).double().view(2, 1, 1, 1)
    x = f.prox(z, per_item)
    assert torch.allclose(per_item * f.grad(x) + x - z, torch.zeros_like(z), atol=1e-7)
    f = LeastSquares(f.operator, f.y, torch.tensor([1.0, 9.0]).double().view(2, 1, 1, 1))
    x = f.prox(z, step)
    assert torch.allclose(step * f.grad(x) + x - z, torch.zeros_like(z), atol=1e-7)


@pytest.mark.parametrize("through", [Gradient, lambda: Wavelet("haar", 1), lambda: Mask(noise(1, 1, 6, 8).exp())])
@every_operator
def test_least_squares_prox_through_a_transform(name, through):
    """grad f(x) + W^T (W x - z) / step = 0; a second step size is not served the first one's filter."""
    f, x = least_squares(name)
    w = through()
    z = w.A(x) + noise(*w.A(x).shape, seed=9)
    for step in (0.3, 0.05, 0.3):
        x = f.prox(z, step, through=w)
        assert torch.allclose(f.grad(x) + w.A_adjoint(w.A(x) - z) / step, torch.zeros_like(x), atol=1e-6)


@every_operator
@given(seed=seeds)
def test_least_squares_bounds(name, seed):
    """m and L against the eigenvalues of the dense Hessian; a weight per item widens them."""
    f, x = least_squares(name, 2.5, seed)
    zero = LeastSquares(f.operator, torch.zeros_like(f.operator.A(noise(48, 1, 6, 8))), 2.5)
    hessian = zero.grad(torch.eye(48).double().view(48, 1, 6, 8)).flatten(1)
    eigenvalues = torch.linalg.eigvalsh(hessian)
    low, high = f.bounds
    assert low <= eigenvalues[0] + 1e-10 and eigenvalues[-1] <= high + 1e-10
    assert high <= eigenvalues[-1] * (1 + 1e-5) + 1e-10 or name == "valid blur"
    weights = torch.tensor([2.5, 10.0]).view(2, 1, 1, 1)
    assert LeastSquares(f.operator, f.y, weights).bounds == pytest.approx((low, 4 * high))
    problem = Problem(f)
    assert (problem.strong_convexity, problem.lipschitz) == (low, high)


@given(seed=seeds, beta=st.sampled_from([0.05, 1.0, 20.0]))
def test_linked_gradient_value_is_the_minimum_over_x(seed, beta):
    """Against dense normal equations for each image; no other x gives less.  Eq: PADNet (15), (16)."""
    f, g = linked(seed, beta)

    def inner(x):
        fit = sum_items((f.operator.A(x) - f.y).square()) + beta * sum_items((f.gradient.A(x) - g).square())
        return 0.5 * f.weight * fit

    eye = torch.eye(48).double().view(48, 1, 6, 8)
    a, d = f.operator.A(eye).flatten(1).T, f.gradient.A(eye).flatten(1).T
    best = torch.empty_like(f.y)
    for c in range(2):
        rhs = f.y[:, c].flatten(1) @ a + beta * g[:, [c, c + 2]].flatten(1) @ d
        best[:, c] = torch.linalg.solve(a.T @ a + beta * d.T @ d, rhs.T).T.view(2, 6, 8)
    assert torch.allclose(f.image(g), best, atol=1e-9)
    assert torch.allclose(f.value(g), inner(best), rtol=1e-10)
    assert (inner(best + 1e-2 * noise(2, 2, 6, 8, seed=seed)) > f.value(g)).all()


@given(seed=seeds, step=st.sampled_from([0.05, 1.0, 30.0]))
def test_linked_gradient_grad_and_prox(seed, step):
    """The envelope theorem's gradient against autograd through the link layer and against central differences.

    Eq: PADNet (16).
    """
    f, g = linked(seed)
    assert torch.allclose(f.grad(g), autograd(f, g), rtol=1e-9, atol=1e-10)
    direction = noise(*g.shape, seed=seed + 7)
    slope = (f.value(g + 1e-4 * direction) - f.value(g - 1e-4 * direction)) / 2e-4
    assert torch.allclose(slope, sum_items(f.grad(g) * direction), rtol=1e-6, atol=1e-6)
    x = f.prox(g, step)
    assert torch.allclose(step * f.grad(x) + x - g, torch.zeros_like(g), atol=1e-9)


def test_linked_gradient_bounds():
    """0 <= f'' <= weight beta; the upper end is attained, on fields that are no gradient."""
    f, _ = linked()
    zero = LinkedGradient(f.operator, f.gradient, torch.zeros(96, 1, 6, 8).double(), f.beta, f.weight)
    eigenvalues = torch.linalg.eigvalsh(zero.grad(torch.eye(96).double().view(96, 2, 6, 8)).flatten(1))
    low, high = f.bounds
    assert low <= eigenvalues[0] + 1e-12 and high == pytest.approx(eigenvalues[-1].item())


def test_link_layer_needs_circulant_operators():
    f = LinkedGradient(Mask(torch.ones(1, 1, 6, 8)), Gradient(), noise(1, 1, 6, 8), 1.0)
    with pytest.raises(TypeError, match="the link layer needs circulant operators"):
        f.image(noise(1, 2, 6, 8))


def test_partially_defined_problem():
    f, x = least_squares("blur")
    problem = Problem(f)
    for call in (lambda: problem.energy(x), lambda: problem.prox_prior(x, 1.0), lambda: problem.residual(x)):
        with pytest.raises(TypeError, match="problem: it has no prior, so its energy and its proximal map are not defined"):
            call()
    assert problem.lipschitz > 0  # what does not need the prior is there


def test_energy_with_a_transform():
    """F = f + R(W x); its residual is refused, since the prox of R(W .) is not that of R.  Eq: PADNet (1)."""
    f, x = least_squares("blur")
    problem = Problem(f, GroupLp(1, 0.2), Gradient())
    assert torch.allclose(problem.energy(x), f.value(x) + GroupLp(1, 0.2).value(Gradient().A(x)))
    with pytest.raises(TypeError, match="with a transform"):
        problem.residual(x)
    z = noise(2, 2, 6, 8)
    assert torch.equal(problem.prox_fidelity(z, 0.5), f.prox(z, 0.5, through=problem.transform))
    assert torch.equal(Problem(f).prox_fidelity(x, 0.5), f.prox(x, 0.5))


@pytest.mark.parametrize("name", ["identity", "wavelet", "block sampling", "blur of wavelet"])
def test_residual_vanishes_at_the_minimiser_of_a_lasso(name):
    """At the end of a long proximal gradient run, at every step size; and nowhere near it."""
    f, x = least_squares(name, 1.0)
    problem = Problem(f, Lp(1, 0.3))
    start, step = x.clone(), 1 / problem.lipschitz
    for iteration in range(20_000):
        x = problem.prox_prior(x - step * f.grad(x), step)
        if iteration % 200 == 0 and (problem.residual(x) < 1e-10).all():
            break
    assert problem.residual(x).shape == (2,) and (problem.residual(start) > 0.1).all()
    for tau in (None, 0.1 * step, 1.9 * step):
        assert (problem.residual(x, tau) < 1e-8).all()
    assert (problem.energy(x) < problem.energy(start)).all()
    if name == "identity":
        assert torch.allclose(x, f.y.sign() * (f.y.abs() - 0.3).clamp_min(0))


def test_norms_per_item(dtype):
    x = noise(3, 2, 4, 5, dtype=dtype).requires_grad_()
    assert norm_items(x).dtype == torch.float64 and not norm_items(x).requires_grad
    assert torch.allclose(norm_items(x), x.detach().double().flatten(1).norm(dim=1), rtol=1e-6)
    assert sum_items(x).dtype == torch.float64 and sum_items(x).requires_grad
