"""Priors: each prox against brute force, optimality and non-expansiveness, on both precisions."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from odlkit.operators import Blur, Gradient, NotConverged, Scaled, Wavelet
from odlkit.priors import TV, Analysis, Box, GroupLp, Lp, SparseBox, Zero, shrink

POWERS = [0.0, 0.1, 0.3, 0.5, 0.8, 0.95, 1.0]
seeds = st.integers(0, 1000)
steps = st.sampled_from([0.05, 0.4, 2.0])


def noise(*shape, dtype=torch.float64, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


# every prior on (B, 2, 8, 8)
PRIORS = {
    **{f"l{p}": lambda p=p: Lp(p, 0.6) for p in POWERS},
    **{f"group l{p}": lambda p=p: GroupLp(p, 0.6) for p in POWERS},
    "l1 with free band": lambda: Lp(1, (torch.arange(64) > 9).double().view(1, 1, 8, 8)),
    "l0.5 with free band": lambda: Lp(0.5, (torch.arange(64) > 9).double().view(1, 1, 8, 8)),
    "tv": lambda: TV(0.3, tol=1e-4),
    "haar l1": lambda: Analysis(Wavelet("haar", 2), Lp(1, 0.5)),
    "db2 l0": lambda: Analysis(Wavelet("db2", 1), Lp(0, 0.5)),
    "box": lambda: Box(-0.2, 0.7),
    "sparse box": lambda: SparseBox(-0.2, 0.7, 40),
    "zero": Zero,
}
every_prior = pytest.mark.parametrize("name", PRIORS)
CONVEX = [name for name in PRIORS if PRIORS[name]().convex]


def objective(prior, x, z, step):
    return prior.value(x) + 0.5 / step * (x - z).double().square().flatten(1).sum(1)


def test_which_are_convex():
    assert set(CONVEX) == {"l1.0", "group l1.0", "l1 with free band", "tv", "haar l1", "box", "zero"}


@every_prior
@given(seed=seeds, step=steps)
def test_prox_is_optimal(name, device, dtype, seed, step):
    """No perturbation, small or large, dense or of one entry, towards 0 or towards z, lowers the prox objective."""
    prior, z = PRIORS[name](), noise(2, 2, 8, 8, dtype=dtype, device=device, seed=seed)
    if dtype == torch.float32 and name == "tv":
        prior.tol = 1e-3
    x = prior.prox(z, step)
    assert x.shape == z.shape and x.dtype == dtype and x.device == z.device
    assert prior.value(x).dtype == torch.float64 and prior.value(x).shape == (2,) and prior.value(x).isfinite().all()
    best = objective(prior, x, z, step)
    slack = (1e-10 if dtype == torch.float64 else 1e-5) * (1 + best)
    if name == "tv":  # the duality gap it stops at
        slack += 0.5 / step * prior.tol**2 * z.double().square().flatten(1).sum(1)
    generator = torch.Generator().manual_seed(seed + 1)
    others = [x + (z - x) * a for a in (0.01, 0.5, 1.0)] + [x * a for a in (0.0, 0.5, 0.99, 1.01)]
    for scale in (1e-3, 0.1, 1.0):
        direction = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        others += [x + scale * direction, x + scale * direction * (x != 0)]
        others += [torch.where(direction > 1.5, torch.zeros_like(x), x), torch.where(direction > 1.5, z, x)]
    for other in others:
        assert (objective(prior, other, z, step) >= best - slack).all()


@pytest.mark.parametrize("name", CONVEX)
@given(seed=seeds, step=steps, distance=st.sampled_from([1e-3, 0.3, 3.0]))
def test_convex_prox_is_firmly_nonexpansive(name, device, dtype, seed, step, distance):
    """||Pa - Pb||^2 <= <Pa - Pb, a - b>."""
    prior, a = PRIORS[name](), noise(1, 2, 8, 8, dtype=dtype, device=device, seed=seed)
    if name == "tv" and dtype == torch.float32:
        prior.tol = 1e-3
    b = a + distance * noise(1, 2, 8, 8, dtype=dtype, device=device, seed=seed + 1)
    pa, pb = prior.prox(a, step).double(), prior.prox(b, step).double()
    d, e = pa - pb, (a - b).double()
    # tv is exact up to tol ||z||; the others up to round-off of their entries
    error = (prior.tol if name == "tv" else 4 * torch.finfo(dtype).eps) * (a.norm() + b.norm()).item()
    assert d.square().sum() <= (d * e).sum() + 2 * error * (d.norm() + e.norm()) + error**2


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("weight", [1e-3, 0.05, 0.4, 2.0])
def test_shrink_is_never_worse_than_a_grid(p, weight, dtype):
    """The value at the prox against 20,001 candidates and 0, for sizes through the threshold and far above it.

    Eq: PADNet (14), the proximal map of its prior.
    """
    size = torch.cat([torch.linspace(0, 3, 40), torch.tensor([6.0, 20.0])]).to(dtype)
    if 0 < p < 1:  # a hair on either side of the jump
        t = (2 * weight * (1 - p)) ** (1 / (2 - p))
        tau = t * (2 - p) / (2 * (1 - p))
        size = torch.cat([size, torch.tensor([0.999 * tau, 1.001 * tau]).to(dtype)])
    x = shrink(size, weight, p).double()

    def value(x):
        return weight * ((x != 0).double() if p == 0 else x**p) + 0.5 * (x - size.double()) ** 2

    grid = size.double()[None] * torch.linspace(0, 1, 20_001).double()[:, None]
    slack = 1e-12 if dtype == torch.float64 else 1e-6
    assert (value(x) <= value(grid).min(0).values + slack * (1 + value(x))).all()
    assert (x >= 0).all() and (x <= size.double() * (1 + 1e-6)).all() and (x[size > 2.9 + weight] > 0).all() and x[0] == 0


@pytest.mark.parametrize("p", POWERS)
def test_shrink_solves_its_equation(p):
    """x - a + weight p x^(p-1) = 0 to round-off above the threshold; exact zeros and the jump t below it."""
    weight = torch.logspace(-4, 1, 6).double()[:, None]
    a = torch.logspace(-3, 3, 500).double()[None].expand(6, -1)
    x = shrink(a, weight, p)
    alive = x > 0
    if p > 0:
        root = (x - a + weight * p * x.clamp_min(1e-30) ** (p - 1))[alive]
        assert (root.abs() <= 1e-11 * a[alive]).all()
    assert alive.any() and (~alive).any()
    jump = (2 * weight * (1 - p)) ** (1 / (2 - p))
    assert (x >= jump - 1e-12)[alive].all()
    assert (torch.diff(x, dim=1) >= -1e-12).all()  # the prox is monotone


@pytest.mark.parametrize("p", POWERS)
def test_the_prox_has_a_derivative_where_the_weight_is_zero(p):
    """With a free band, and away from the jump of the threshold: with respect to the data and to the weight's factor."""
    free = torch.tensor([0.0, 0.0, 1.0, 1.0, 2.0], dtype=torch.float64).view(1, 1, 1, 5)
    z = torch.tensor([0.02, -1.5, 0.05, -1.5, 2.5], dtype=torch.float64).view(1, 1, 1, 5).requires_grad_()
    factor = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, factor: Lp(p, factor * free).prox(z, 0.7), (z, factor))


@pytest.mark.parametrize("p", POWERS)
def test_precisions_agree(p):
    """float32 against float64, away from the threshold, where a rounded input may fall on the other side of the jump."""
    z = noise(1, 2, 32, 32).float()
    for prior in (Lp(p, 0.2), GroupLp(p, 0.2)):
        low, high = prior.prox(z, 0.7).double(), prior.prox(z.double(), 0.7)
        same = (low != 0) == (high != 0)
        assert same.float().mean() > 0.998 and ((low - high).abs() <= 2e-6 * z.abs())[same].all()


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("make", [Lp, GroupLp])
def test_lp_weights_steps_and_zeros(p, make, dtype):
    """Free entries pass untouched to the bit, also 0 and tiny ones; a step per item equals one call per item; no NaN."""
    weight = torch.tensor([0.0, 1.0], dtype=dtype).view(1, 1, 1, 2)
    z = torch.tensor([0.0, 0.0, 1e-30, 1e-30, -2.0, -2.0, 0.3, 0.3], dtype=dtype).view(1, 1, 4, 2).repeat(3, 2, 1, 1)
    step = torch.tensor([1e-3, 0.1, 1.0], dtype=dtype).view(3, 1, 1, 1)
    x = make(p, weight).prox(z, step)
    assert x.isfinite().all() and torch.allclose(x[..., 0], z[..., 0], rtol=1e-6, atol=0) and (x[..., :2, 1] == 0).all()
    for b in range(3):
        assert torch.allclose(x[b : b + 1], make(p, weight).prox(z[b : b + 1], step[b].item()), rtol=1e-6)
    assert torch.equal(make(p, 0.3).prox(-z, 0.1), -make(p, 0.3).prox(z, 0.1))


def test_values():
    x = torch.tensor([3.0, -4.0, 0.0, 0.0]).view(1, 2, 1, 2)  # dx = (3, -4), dy = (0, 0)
    assert Lp(0, 2.0).value(x).item() == 4 and Lp(1, 2.0).value(x).item() == 14
    assert Lp(0.5).value(x).item() == pytest.approx(3**0.5 + 2)
    y = torch.tensor([3.0, 0.0, 4.0, 0.0]).view(1, 2, 1, 2)  # one pixel with gradient (3, 4)
    assert GroupLp(1, 2.0).value(y).item() == 10 and GroupLp(0, 2.0).value(y).item() == 2
    assert Lp(1, torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)).value(x).item() == 4
    step = torch.zeros(1, 1, 4, 6)
    step[..., 3:] = 0.5  # two edges of a circular image, four rows, height 1/2
    assert TV(3.0).value(step).item() == pytest.approx(3 * 2 * 4 * 0.5)


@pytest.mark.parametrize("p", POWERS)
def test_group_prox_is_the_scalar_prox_on_the_length(p):
    """Direction kept, length shrunk; with all channels in one group a colour pixel is kept or dropped as a whole."""
    z = noise(2, 6, 5, 4)
    x = GroupLp(p, 0.5, groups=6).prox(z, 0.8)
    size = z.norm(dim=1)
    assert torch.allclose(x.norm(dim=1), shrink(size, 0.4, p), atol=1e-12)
    assert torch.allclose(x * size[:, None], z * x.norm(dim=1)[:, None], atol=1e-12)
    pairs = GroupLp(p, 0.5).prox(z, 0.8)  # groups=2: channel c with c + 3
    assert torch.allclose(pairs[:, [1, 4]], GroupLp(p, 0.5).prox(z[:, [1, 4]], 0.8))
    with pytest.raises(ValueError, match="expected a multiple of 2 channels, got 5"):
        GroupLp(p).prox(z[:, :5], 1.0)


@pytest.mark.parametrize("p", POWERS)
def test_prox_can_be_differentiated(p):
    """Autograd through the prox gives finite numbers, also at zeros, and the derivative of the kept entries."""
    z = torch.tensor([0.0, 0.1, 2.0, -3.0]).double().view(1, 2, 1, 2).requires_grad_()
    for prior in (Lp(p, 0.3), GroupLp(p, 0.3), Lp(p, 0.0)):
        (grad,) = torch.autograd.grad(prior.prox(z, 1.0).sum(), z)
        assert grad.isfinite().all()
        bump = torch.zeros_like(z)
        bump[..., 1] = 1e-6
        plus, minus = prior.prox(z.detach() + bump, 1.0).sum(), prior.prox(z.detach() - bump, 1.0).sum()
        assert (grad * bump).sum().item() == pytest.approx((plus - minus).item() / 2, rel=1e-4, abs=1e-12)


def slow_tv(z, lam, iterations):
    """Plain projected gradients on the dual: no momentum, no restart, no stopping."""
    d, q = Gradient(), torch.zeros(1, 2, *z.shape[-2:]).double()
    for _ in range(iterations):
        q = q + d.A(z - lam * d.A_adjoint(q)) / (8 * lam)
        q = q / q.norm(dim=1, keepdim=True).clamp_min(1)
    return z - lam * d.A_adjoint(q)


@pytest.mark.parametrize(("lam", "iterations"), [(0.02, 2_000), (0.2, 30_000)])
def test_tv_prox_against_a_slow_reference(lam, iterations):
    z = noise(1, 1, 9, 8) * 0.3
    reference = slow_tv(z, lam, iterations)
    for tol in (1e-3, 1e-5):
        x, _, gap, taken = TV(2 * lam, tol=tol).solve(z, 0.5)
        assert (x - reference).norm() <= tol * z.norm() + 1e-6
        assert gap.item() >= -1e-14 and gap.item() <= 0.5 * tol**2 * z.square().sum() and taken > 0
        # the gap bounds how far the objective is from its minimum, which the reference nearly attains
        prior = TV(2 * lam)
        assert objective(prior, x, z, 0.5) - objective(prior, reference, z, 0.5) <= gap / 0.5 + 1e-12


def test_tv_prox_limits(dtype):
    """Weight 0 returns z; a large weight returns the mean of each channel; both in one batch."""
    z = noise(2, 3, 8, 7, dtype=dtype)
    tol = 1e-5 if dtype == torch.float64 else 5e-3
    x = TV(1.0, tol=tol).prox(z, torch.tensor([0.0, 20.0], dtype=dtype).view(2, 1, 1, 1))
    assert torch.equal(x[0], z[0])
    assert (x[1] - z[1].mean((-2, -1), keepdim=True)).norm() <= tol * z[1].norm()


def test_tv_prox_warm_start_and_failure():
    z = noise(1, 1, 16, 16)
    tv = TV(0.3, tol=1e-5, warm_start=True)
    x = tv.prox(z, 1.0)
    again, _, _, iterations = tv.solve(z, 1.0, tv.dual)
    assert iterations == 0 and torch.equal(again, x)
    assert torch.allclose(tv.prox(z[..., :12], 1.0), TV(0.3, tol=1e-5).prox(z[..., :12], 1.0))  # another shape: from 0
    with pytest.raises(NotConverged, match=r"TV prox: distance bound .* \|\|z\|\| after 10 steps, wanted 1e-06"):
        TV(5.0, tol=1e-6, max_iter=10).prox(z, 1.0)


@pytest.mark.parametrize("operator", [Gradient(), Blur(torch.full((3, 3), 1 / 9)), Scaled(Wavelet("haar", 1), 2.0)])
def test_analysis_refuses_what_is_not_orthonormal(operator, dtype):
    for method in (lambda x: Analysis(operator, Lp(1)).prox(x, 1.0), Analysis(operator, Lp(1)).value):
        with pytest.raises(ValueError, match="operator: expected an orthonormal one"):
            method(noise(1, 1, 8, 8, dtype=dtype))


def test_analysis_refuses_a_tight_frame():
    """W^T W = I is not enough: here W W^T is a projection and W^T prox W is not the prox."""

    class Twice:
        def A(self, x):
            return torch.cat([x, x], 1) * 0.5**0.5

        def A_adjoint(self, y):
            return (y[:, : y.shape[1] // 2] + y[:, y.shape[1] // 2 :]) * 0.5**0.5

    with pytest.raises(ValueError, match="orthonormal"):
        Analysis(Twice(), Lp(1)).prox(noise(1, 1, 8, 8), 1.0)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_analysis_counts_the_zeros_of_its_prox(p, dtype):
    """The value in the image domain equals the value on the coefficients that left the prox."""
    z, wavelet = noise(1, 1, 64, 64, dtype=dtype), Wavelet("db2", 3)
    coefficients = Lp(p, 1.0).prox(wavelet.A(z), 1.0)
    x = Analysis(wavelet, Lp(p, 1.0)).prox(z, 1.0)
    assert Lp(p, 1.0).value(wavelet.A(x)).item() > 1.01 * Lp(p, 1.0).value(coefficients).item()  # the trap is real
    assert Analysis(wavelet, Lp(p, 1.0)).value(x).item() == pytest.approx(Lp(p, 1.0).value(coefficients).item(), rel=1e-6)


def test_box(dtype):
    box, z = Box(-0.1, 0.9), 2 * noise(2, 1, 4, 4, dtype=dtype)
    assert torch.equal(box.prox(z, 3.0), z.clamp(-0.1, 0.9)) and (box.value(box.prox(z, 3.0)) == 0).all()
    assert torch.equal(box.value(torch.tensor([[0.9], [0.9001]], dtype=dtype)), torch.tensor([0.0, math.inf]).double())
    beside = torch.tensor([[0.9]], dtype=dtype) * (1 + torch.finfo(dtype).eps)
    assert box.value(beside).item() == 0  # round-off is not outside
    assert Box(0, math.inf).value(z.abs()).eq(0).all()
    assert Box(0, 1).value(torch.tensor([[math.nan]])).item() == math.inf


@given(seed=seeds, n=st.integers(1, 6), sparsity=st.integers(0, 7), low=st.sampled_from([0.0, -0.1, -2.0]),
       high=st.sampled_from([0.0, 0.4, 1.0]))  # fmt: skip
def test_sparse_box_is_the_projection(seed, n, sparsity, low, high, dtype):
    """Against every support of at most ``sparsity`` entries, on each of which the projection is a clamp."""
    prior, z = SparseBox(low, high, sparsity), 1.5 * noise(1, n, 1, 1, dtype=dtype, seed=seed)
    x = prior.prox(z, 1.0)
    assert prior.value(x).item() == 0
    costs = []
    for support in itertools.product([0, 1], repeat=n):
        if sum(support) <= sparsity:
            candidate = z.clamp(low, high) * torch.tensor(support, dtype=dtype).view(1, n, 1, 1)
            costs.append((candidate - z).double().square().sum().item())
    assert (x - z).double().square().sum().item() <= min(costs) * (1 + 1e-6) + 1e-12


def test_sparse_box_against_threshold_and_clamp():
    """u = (-3, 0.5), one nonzero, box [-0.1, 1]: the projection costs 8.66, thresholding the clamped vector 9.00."""
    u = torch.tensor([-3.0, 0.5]).double().view(1, 2, 1, 1)
    x = SparseBox(-0.1, 1.0, 1).prox(u, 1.0)
    clamped = u.clamp(-0.1, 1.0)
    thresholded = torch.where(clamped.abs() == clamped.abs().max(), clamped, torch.zeros_like(u))
    assert (x - u).square().sum().item() == pytest.approx(8.66)
    assert (thresholded - u).square().sum().item() == pytest.approx(9.0)
    assert SparseBox(-0.1, 1.0, 1).value(u.clamp(-0.1, 1.0)).item() == math.inf  # two nonzeros


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Lp(1.5), r"p: expected a number in \[0, 1\], got 1.5"),
        (lambda: GroupLp(-0.1), "p: expected a number"),
        (lambda: Lp(math.nan), "p: expected a number"),
        (lambda: Lp(1, -0.5), "weight: expected numbers >= 0, got -0.5"),
        (lambda: TV(math.nan), "weight: expected numbers >= 0"),
        (lambda: Lp(1, torch.tensor([1.0, -2.0])), "weight: expected numbers >= 0, got -2.0"),
        (lambda: Box(1, 0), "low, high: expected low <= high"),
        (lambda: SparseBox(0.1, 1, 3), "low <= 0 <= high"),
        (lambda: SparseBox(0, 1, -3), "sparsity: expected a count >= 0, got -3"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
