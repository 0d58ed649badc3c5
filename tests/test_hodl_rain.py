"""HODL's rain streaks: the split and its minimiser, what bounds the networks, gradients, the recipe, the task."""

import pytest
import torch
from scipy.optimize import minimize

from odlkit import data
from odlkit.metrics import psnr
from odlkit.models.hodl_deblur import Iteration
from odlkit.models.hodl_rain import (
    MARGIN,
    SLOPES,
    Shifts,
    Split,
    Streaks,
    certified,
    cropped,
    iterated,
    lipschitz,
    normalized,
    padded,
    reading,
    slopes,
)
from odlkit.networks.normalize import conv_norm_bound, local_norm
from odlkit.operators import Gradient, Identity
from odlkit.problem import LeastSquares, Problem
from odlkit.propagate import propagate
from odlkit.training.rain import smear, streaks

READINGS = ("printed", "exchanged", "directional")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=seeded(seed), dtype=torch.float64)


def split(b: torch.Tensor, name: str = "directional", beta: float = 0.7, gamma: float = 0.3, size: float = 0.05) -> Split:
    W_b, W_r = reading(name, b)
    return Split(b, W_b, W_r, *(size * (1 + rand(W.widening, seed=5)) for W in (W_b, W_r)), beta, gamma)


def network(bounded: bool = True, **options) -> Streaks:
    torch.manual_seed(0)
    net = Streaks(width=4, prior=8, depth=2, bounded=bounded, **options).double()
    return certified(normalized(net)) if bounded else net


# The operators.


@pytest.mark.parametrize("shifts", [((0, 1),), ((4, [-2, 3]), (0, 0)), ((0, 1), (1, 0), (0, 0))])
def test_shifts_have_their_adjoint_and_spectrum(shifts, dtype):
    W, x = Shifts(*shifts), rand(2, 3, 7, 10).to(dtype)
    y = rand(2, 3 * len(shifts), 7, 10, seed=1).to(dtype)
    assert abs(((W.A(x) * y).sum() - (x * W.A_adjoint(y)).sum()).item()) < 1e-5
    assert (W.normal(x) - W.A_adjoint(W.A(x))).abs().max() < 1e-5
    each = torch.cat([Shifts(*((r, c if isinstance(c, int) else c[i]) for r, c in shifts)).A(x[i : i + 1]) for i in (0, 1)])
    assert torch.equal(W.A(x), each)


def test_two_shifts_are_the_gradient():
    x = rand(1, 2, 6, 5)
    assert torch.equal(Shifts((0, 1), (1, 0)).A(x), Gradient().A(x))


@pytest.mark.parametrize("slope", SLOPES)
def test_the_slope_is_found_for_each_picture(slope):
    angle = torch.tensor(slope / 4).atan().rad2deg().item()
    seeds = (torch.rand(2, 1, 96, 96, generator=seeded()) < 0.004).float()
    streaks = torch.nn.functional.conv2d(seeds, smear(24, angle, 0.5, 0.3), padding="same")
    streaks[1] = streaks[1].flip(-1)
    assert slopes(0.3 + 0.4 * streaks.expand(-1, 3, -1, -1)) == [slope, -slope]


# The split.


@pytest.mark.parametrize("name", READINGS)
def test_the_step_is_that_of_the_augmented_lagrangian_with_its_multiplier(name):
    """With v and lambda apart, u by a gradient that vanishes, lambda before v.  Eq: HODL (8)."""
    b = rand(2, 3, 9, 12)
    one = split(b, name)
    z = one.start() + 0.1 * torch.randn(one.start().shape, generator=seeded(3), dtype=torch.float64)
    u_b, u_r, t_b, t_r = one.parts(z)
    v_b, v_r = rand(*t_b.shape, seed=8), rand(*t_r.shape, seed=9)
    s_b, s_r = t_b / one.scale, t_r / one.scale
    lam_b, lam_r = one.beta * (v_b - s_b), one.beta * (v_r - s_r)  # any v: the state is v - lambda / beta
    new = one.parts(one.step(z))

    x, r = (part.clone().requires_grad_() for part in new[:2])
    Wb, Wr = one.W_b.A(x), one.W_r.A(r)
    lagrangian = (x + r - b).square().sum() / 2 + (lam_b * (Wb - v_b)).sum() + (lam_r * (Wr - v_r)).sum()
    lagrangian = lagrangian + one.beta / 2 * ((Wb - v_b).square().sum() + (Wr - v_r).square().sum())
    lagrangian = lagrangian + one.gamma / 2 * ((x - u_b).square().sum() + (r - u_r).square().sum())
    assert all(slope.abs().max() < 1e-10 for slope in torch.autograd.grad(lagrangian, (x, r)))

    lam_b, lam_r = lam_b + one.beta * (Wb - v_b), lam_r + one.beta * (Wr - v_r)
    at_b, at_r = one.kappa_b.repeat_interleave(3, 1), one.kappa_r
    q_b, q_r = Wb + lam_b / one.beta, Wr + lam_r / one.beta
    v_b = q_b.sign() * (q_b.abs() - at_b / one.beta).clamp_min(0)
    v_r = q_r.sign() * (q_r.abs() - at_r / one.beta).clamp_min(0)
    v_r = torch.cat([v_r[:, :-1], v_r[:, -1:].clamp_min(0)], 1)
    assert (new[2] / one.scale - (v_b - lam_b / one.beta)).abs().max() < 1e-10
    assert (new[3] / one.scale - (v_r - lam_r / one.beta)).abs().max() < 1e-10


@pytest.mark.parametrize("name", READINGS)
def test_the_fixed_point_is_the_minimiser(name):
    """Against a solver for smooth problems with inequalities, on one channel of twenty pixels."""
    b = 0.2 + 0.6 * rand(1, 1, 5, 4)
    one = split(b, name, beta=0.3, gamma=0.01)
    z = one.start()
    for _ in range(4000):
        z = one.step(z)
    W_b, W_r = (torch.stack([W.A(e.view(1, 1, 5, 4)).flatten() for e in torch.eye(20).double()], 1).numpy()
                for W in (one.W_b, one.W_r))  # fmt: skip
    n, m_b, m_r = 20, len(W_b), len(W_r)
    cost = torch.cat([one.kappa_b.flatten(), one.kappa_r.flatten()]).repeat_interleave(n).numpy()
    data = b.flatten().numpy()

    def value(q):
        return ((q[:n] + q[n : 2 * n] - data) ** 2).sum() / 2 + cost @ q[2 * n :]

    def slope(q):
        miss = q[:n] + q[n : 2 * n] - data
        return torch.cat([torch.tensor(v) for v in (miss, miss, cost)]).numpy()

    eye = torch.eye(m_b + m_r).double()
    wide = torch.block_diag(
        torch.tensor(W_b), torch.tensor(W_r)
    )  # bounds t >= |W u|, so that the absolute values are linear
    rows = torch.cat([torch.cat([-wide, eye], 1), torch.cat([wide, eye], 1)]).numpy()
    start = torch.cat([b.flatten(), torch.zeros(n).double(), torch.tensor(abs(W_b @ data)), torch.zeros(m_r).double()])
    found = minimize(value, start.numpy(), jac=slope, method="SLSQP", options={"maxiter": 500, "ftol": 1e-12},
                     bounds=[(None, None)] * n + [(0, None)] * (n + m_b + m_r),
                     constraints={"type": "ineq", "fun": lambda q: rows @ q, "jac": lambda q: rows})  # fmt: skip
    assert found.success
    energy = one.energy(z).item()
    assert abs(energy - found.fun) < 1e-6 * max(1, abs(found.fun))
    assert energy < one.energy(one.start()).item()
    u_r, v_r = one.parts(z)[1], one.shrink(*(2 * W.A(u) - t / one.scale for W, u, t in zip(
        (one.W_b, one.W_r), one.parts(z)[:2], one.parts(z)[2:], strict=True)))[1]  # fmt: skip
    assert (u_r - v_r[:, -1:]).abs().max() < 1e-5 and u_r.min() > -1e-5


@pytest.mark.parametrize(("beta", "gamma"), [(0.01, 1.0), (0.7, 0.3), (30.0, 0.02)])
def test_the_step_is_firmly_non_expansive_for_every_penalty(beta, gamma):
    """``||D z - D w||^2 <= <D z - D w, z - w>`` in l2.  Control: other weights of u against s are another metric."""
    one = split(rand(2, 3, 8, 9), beta=beta, gamma=gamma)
    one.kappa_b, one.kappa_r = one.kappa_b * rand(2, 1, 8, 9, seed=6), one.kappa_r * rand(2, 1, 8, 9, seed=7)  # by pixel
    for seed in range(5):
        z, w = (one.start() + s * torch.randn(one.start().shape, generator=seeded(10 * seed + s)).double() for s in (1, 2))
        d, e = one.step(z) - one.step(w), z - w
        assert d.square().sum() <= (d * e).sum() + 1e-9
    wrong = torch.ones(one.start().shape[1]).double()
    wrong[:4] = 30.0 if beta >= gamma else 0.03  # as if s entered by itself, not (beta / gamma)^(1/2) s
    step = local_norm(lambda z: wrong.view(-1, 1, 1) * one.step(z / wrong.view(-1, 1, 1)), one.start())
    assert local_norm(one.step, one.start()) <= 1 + 1e-9 < step


def test_bad_weights_and_names_are_refused():
    b = rand(1, 3, 8, 8)
    with pytest.raises(ValueError, match="reading: expected printed"):
        reading("upside down", b)
    with pytest.raises(ValueError, match="kappa: expected 1 and 2 weights"):
        Split(b, *reading("directional", b), torch.ones(2), torch.ones(2))


# The networks.


def test_two_networks_that_share_an_input_have_the_constant_root_two_until_they_are_divided():
    """Both pass u_r on: without the division a step lengthens by exactly sqrt(2).  Source: HODL section 6.2."""
    net = network()
    with torch.no_grad():
        for layer, _ in iterated(net):
            layer.weight.zero_()
        for layer, into in ((net.scene[0], 0), (net.scene[1], 0), (net.rain[0], 3), (net.rain[1], 0), (net.rain[2], 0)):
            layer.weight[0, into, 1, 1] = 1
    one = net.split(rand(1, 3, 12, 12))
    seen = torch.full((1, 4, 12, 12), 10.0).double()  # everything active
    z, move = one.start(), torch.zeros_like(one.start())
    move[:, 3] = 1e-3 * rand(12, 12)
    for share, expected in ((0.5**0.5, 1.0), (1.0, 2**0.5)):
        net.share = share
        D_net = net.network(one, seen, seen)
        moved = (D_net(z + move) - D_net(z)).norm() / move.norm()
        assert abs(moved.item() - expected) < 1e-9 and moved <= lipschitz(net) * (1 + 1e-9)


def test_the_bound_holds_and_the_iteration_settles_where_it_holds():
    """Assumption 3.2 for T; beyond it, the same network ten times as steep.  Eq: HODL (3)."""
    net, y = network(), rand(1, 3, 14, 17)
    assert lipschitz(net) <= 1 and all(conv_norm_bound(layer.weight) <= 1 for layer, _ in iterated(net))
    T, one = net.map(padded(y))
    seen_b, seen_r, _ = net.prior(padded(y)).split([4, 4, 3], 1)
    D_net = net.network(one, seen_b, seen_r)
    assert local_norm(lambda z: D_net(z), one.start()) <= lipschitz(net) + 1e-9
    run = propagate(Iteration(T, one.energy), Problem(LeastSquares(Identity(), one.b)), one.start(), steps=60)
    moves = run.trace["change"]
    assert (moves[1:] <= moves[:-1] * (1 + 1e-12)).all() and moves[-1] < 0.1 * moves[0]
    for layer, _ in iterated(net):
        layer.weight.data *= 10
    assert lipschitz(net) > 1 and local_norm(lambda z: D_net(z), one.start()) > 1


def test_training_keeps_the_norms_and_the_certified_copy_is_the_same_network():
    torch.manual_seed(0)
    net = normalized(Streaks(width=4, prior=8, depth=2).double())
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    for i in range(10):
        optimiser.zero_grad()
        (net(rand(2, 3, 16, 16, seed=i))[-1] - 0.5).square().mean().backward()
        optimiser.step()
    copy, y = certified(net.eval()), rand(1, 3, 15, 16)
    norms = [conv_norm_bound(layer.weight) for layer, _ in iterated(copy)]
    assert min(norms) > 0.9 and lipschitz(copy) <= 1
    assert (copy(y)[-1] - net(y)[-1]).abs().max() < 0.02 * net(y)[-1].abs().max()
    free = Streaks(width=4, prior=8, bounded=False)
    assert all(
        torch.equal(a.weight, b.weight) for (a, _), (b, _) in zip(iterated(free), iterated(certified(free)), strict=True)
    )


@pytest.mark.parametrize("bounded", [True, False])
def test_the_hypergradient_is_that_of_differences(bounded):
    """Through two steps, in every number and in weights of all three networks, float64."""
    net, x, y = network(bounded), rand(1, 3, 10, 12), rand(1, 3, 10, 12, seed=1)

    def loss():
        return (net(y)[-1] - x).square().sum()

    names = [*(f"logs.{name}" for name in net.logs), "scene.0.weight", "rain.1.weight", "prior.head.weight"]
    weights = dict(net.named_parameters())
    slopes_found = torch.autograd.grad(loss(), [weights[name] for name in names])
    for name, slope in zip(names, slopes_found, strict=True):
        direction = torch.randn(slope.shape, generator=seeded(7), dtype=torch.float64)
        values = []
        with torch.no_grad():
            for sign in (1, -2, 1):
                weights[name].add_(sign * 1e-6 * direction)
                values.append(loss().item())
        difference = (values[0] - values[1]) / 2e-6
        assert abs(difference - (slope * direction).sum().item()) <= 1e-4 * max(1e-2, abs(difference)), name


@pytest.mark.parametrize("size", [(16, 16), (15, 22), (9, 33)])
def test_every_size_is_restored_alone_as_in_a_batch(size, dtype):
    torch.manual_seed(0)
    net, y = Streaks(width=4, prior=8, depth=3).to(dtype), rand(2, 3, *size).to(dtype)
    found = net(y)
    assert len(found) == 3 and all(u.shape == y.shape and u.dtype == dtype for u in found)
    assert torch.allclose(found[-1], torch.cat([net(item)[-1] for item in y.split(1)]), atol=1e-5)
    b = padded(y)
    assert (
        b.shape[-1] % 2 == b.shape[-2] % 2 == 0 and torch.equal(cropped(b, y), y) and b.shape[-1] >= y.shape[-1] + 2 * MARGIN
    )


def test_without_a_network_it_is_the_solver():
    y = rand(1, 3, 12, 14)
    net = Streaks(width=0, depth=3, alpha=1.0).double()
    one, z = net.split(padded(y)), None
    for _ in range(3):
        z = one.step(one.start() if z is None else z)
    assert torch.equal(net(y)[-1], cropped(one.parts(z)[0], y))
    assert sum(p.numel() for p in net.parameters()) == 5 and lipschitz(net) == 1


@pytest.mark.parametrize("kappa_r", [0.01, 0.1])
@pytest.mark.parametrize("kappa_b", [0.003, 0.01])
def test_errata_the_priors_as_printed_make_the_scene_black(kappa_b, kappa_r):
    """``kappa_b ||u_b||_1 + kappa_r ||grad u_r||_1`` against the two exchanged.  Source: HODL section 4.3."""
    x = data.sample("astronaut", (96, 96), gray=False)
    y = (x + streaks((1, 96, 96), seeded(3), heavy=0.0)).clamp(0, 1)

    def restored(name: str, *kappa: list[float]) -> torch.Tensor:
        one = Split(padded(y), *reading(name, y), *map(torch.tensor, kappa), 0.3, 1e-3)
        z = one.start()
        for _ in range(150):
            z = one.step(z)
        return cropped(one.parts(z)[0], y)

    printed = restored("printed", [kappa_b], [kappa_r, kappa_r, 0.0])
    exchanged = restored("exchanged", [0.01, 0.01], [0.04])
    assert printed.mean() < 0.3 * y.mean() and psnr(printed, x) < psnr(y, x) - 5
    assert exchanged.mean() > 0.9 * y.mean() and psnr(exchanged, x) > psnr(y, x)
