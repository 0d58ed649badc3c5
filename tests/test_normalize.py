"""The norm of a convolution is that of an operator: bounds against exact values, training, refusals, Proposition 3."""

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.nn.utils import parametrize

from odlkit.instances import blurred, gaussian, picture
from odlkit.networks import ConvUnit, fold_batch_norm
from odlkit.networks.normalize import (
    OperatorNorm,
    certified,
    certify_norms,
    circular_norm,
    conv_norm_bound,
    gradient_bound,
    kernels,
    lipschitz_bound,
    local_norm,
    normalized,
    random_step_norm,
    reshaped_bound,
    reshaped_norm,
    share,
    weighted,
)
from odlkit.propagate import Trace
from odlkit.propositions import normalization as prop
from odlkit.training.kernels import random_kernel

SHAPES = [(1, 1, 3, 3), (4, 3, 3, 3), (3, 5, 5, 5), (2, 4, 3, 5), (3, 3, 2, 2), (4, 4, 1, 1)]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def conv(weight, **options):
    """A convolution without bias whose weights are given."""
    layer = nn.Conv2d(*weight.shape[1::-1], weight.shape[2:], bias=False, dtype=torch.float64, **options)
    layer.weight.data.copy_(weight)
    return layer.requires_grad_(False)


def dense_norm(function, x):
    """The largest singular value of the whole Jacobian matrix."""
    jacobian = torch.func.jacrev(function)(x)
    return torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), 2).item()


def exact_norm(layer, channels, size):
    """A layer's operator norm at one size: by FFT where the padding is circular, by power iteration otherwise."""
    weight = kernels(layer.weight.detach(), channels).double()
    if layer.padding_mode == "circular":
        return circular_norm(weight, size)
    return local_norm(conv(weight, padding=layer.padding), randn(1, channels, size, size), steps=150)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_norms_are_ordered(shape):
    """Eq: GDC (10), (11)."""
    w = randn(*shape)
    steps = [random_step_norm(w, torch.Generator().manual_seed(seed)) for seed in range(20)]
    exact = circular_norm(w, 24, 17)
    assert max(steps) <= reshaped_norm(w) * (1 + 1e-12) and reshaped_norm(w) <= exact * (1 + 1e-12)
    assert exact <= conv_norm_bound(w) * (1 + 1e-12) and exact <= reshaped_bound(w) * (1 + 1e-12)
    assert conv_norm_bound(w, 64) <= circular_norm(w, 64) * 1.01  # and it is close


def test_random_step_is_the_printed_formula():
    """Eq: GDC (11)."""
    w = randn(4, 3, 3, 3).flatten(1)
    z = randn(4, seed=7)
    printed = z @ (w @ w.T) @ (w @ w.T) @ z / ((w.T @ z).norm() * (w @ w.T @ z).norm())
    assert random_step_norm(w.view(4, 3, 3, 3), torch.Generator().manual_seed(7)) == pytest.approx(printed.item(), rel=1e-12)


def test_errata_eq_11_is_no_bound_for_a_convolution():
    """The 3x3 box filter leaves a constant image as it is, and its reshaped norm is 1/3.  Eq: GDC (10), (11)."""
    box = torch.full((1, 1, 3, 3), 1 / 9, dtype=torch.float64)
    assert random_step_norm(box) == pytest.approx(1 / 3) and reshaped_norm(box) == pytest.approx(1 / 3)
    flat = torch.ones(1, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(conv(box, padding=1, padding_mode="circular")(flat), flat)
    assert circular_norm(box, 8) == pytest.approx(1) and reshaped_bound(box) == pytest.approx(1)
    w = randn(16, 1, 3, 3)
    draws = torch.tensor([random_step_norm(w, torch.Generator().manual_seed(seed)) for seed in range(50)])
    assert draws.min() < 0.8 * reshaped_norm(w) and draws.std() > 0.05 * reshaped_norm(w)  # low and random


@pytest.mark.parametrize("shape", SHAPES[:4] + SHAPES[5:], ids=str)
def test_circular_norm_is_that_of_the_matrix(shape):
    w = randn(*shape)
    padding = tuple(side // 2 for side in shape[2:])
    layer = conv(w, padding=padding, padding_mode="circular")
    for height, width in ((5, 6), (4, 4), (2, 3)):
        x = torch.zeros(1, shape[1], height, width, dtype=torch.float64)
        assert circular_norm(w, height, width) == pytest.approx(dense_norm(layer, x), rel=1e-10)
    x = randn(1, shape[1], 9, 9)
    assert local_norm(layer, x, steps=500) == pytest.approx(circular_norm(w, 9), rel=1e-3)


@pytest.mark.parametrize("options", [
    {"padding": 1}, {"padding": 2}, {"padding": 1, "stride": 2}, {"padding": 2, "dilation": 2}, {},
    {"padding": 1, "padding_mode": "circular"}, {"padding": "same", "padding_mode": "circular", "dilation": 2},
    {"padding": 1, "padding_mode": "circular", "stride": 2},
], ids=str)  # fmt: skip
def test_the_bound_holds_for_every_size_padding_and_stride(options):
    """Eq: GDC (10)."""
    for seed in range(3):
        w = randn(2, 2, 3, 3, seed=seed)
        for size in (5, 6, 9):
            x = torch.zeros(1, 2, size, size, dtype=torch.float64)
            assert dense_norm(conv(w, **options), x) <= conv_norm_bound(w, 16)


def test_the_cosine_is_needed_and_enough():
    """On a coarse grid the largest value may be far below the norm at another size; the factor makes up for it."""
    grid, bound, truth = [], [], []
    for seed in range(40):
        w = randn(1, 1, 5, 5, seed=seed)
        grid.append(circular_norm(w, 6))
        bound.append(conv_norm_bound(w, 6))
        truth.append(circular_norm(w, 120))
    assert all(t <= b for t, b in zip(truth, bound, strict=True))
    assert sum(g < 0.97 * t for g, t in zip(grid, truth, strict=True)) > 5


def circular_net(activation=nn.ReLU, width=6):
    torch.manual_seed(0)
    wrap = {"padding": 1, "padding_mode": "circular"}
    return nn.Sequential(
        nn.Conv2d(1, width, 3, **wrap),
        activation(),
        nn.Conv2d(width, width, 3, **wrap),
        activation(),
        nn.Conv2d(width, 1, 3, **wrap),
    ).double()


def unit():
    torch.manual_seed(0)
    return ConvUnit(width=8, depth=4).double()


NETS = {"unit, zero padding": unit, "sequence, circular padding": circular_net, "smooth kernels": prop.smooth_network}


def call(net, u):
    return net(u, 0.1) if isinstance(net, ConvUnit) else net(u)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("delta", [1.0, 0.3])
def test_a_normalized_network_keeps_its_bound_at_three_sizes(name, delta):
    """The exact norm of every layer, and the Jacobian of the whole at images.  Eq: GDC (10)."""
    raw = NETS[name]()
    for layer, _ in weighted(raw):
        layer.weight.data *= 3
    net = certified(normalized(copy.deepcopy(raw), delta), delta)
    assert lipschitz_bound(net) <= delta < lipschitz_bound(raw)
    part = share(net, delta)
    for size in (8, 15, 32):
        norms = [exact_norm(layer, channels, size) for layer, channels in weighted(net)]
        before = [exact_norm(layer, channels, size) for layer, channels in weighted(raw)]
        assert max(norms) <= part * (1 + 1e-3) and math.prod(norms) <= delta * (1 + 1e-3)
        assert math.prod(before) > 3 * math.prod(norms)
    for size in (8, 16, 32):
        u = picture("camera", size)
        assert local_norm(lambda v: call(net, v), u) <= delta
        assert (call(net, u) - call(net, u + 1)).norm() <= delta * size


def test_parametrization_has_the_gradient_of_the_norm():
    w = randn(3, 2, 3, 3).requires_grad_()
    op = OperatorNorm(w.detach(), 2, 0.5, size=6, start=400).eval()
    assert gradcheck(op, (w,))
    # at the singular vector the derivative is that of the norm itself: along w the normalized weights do not change
    torch.testing.assert_close(op(w).detach(), op(2 * w.detach()))
    assert circular_norm(op(w), 6) == pytest.approx(0.5, rel=1e-4)
    direction, eps = randn(3, 2, 3, 3, seed=5), 1e-5
    (slope,) = torch.autograd.grad(0.5 / (op(w) / w)[0, 0, 0, 0], w)  # d ||conv|| / d w
    plus, minus = (circular_norm(w + sign * eps * direction, 6) for sign in (1, -1))
    assert (slope * direction).sum().item() == pytest.approx((plus - minus) / (2 * eps), rel=1e-2)


def test_the_power_iteration_is_carried_through_training():
    net = normalized(circular_net(nn.ELU), 0.5)
    ops = [layer.parametrizations.weight[0] for layer, _ in weighted(net)]
    optimiser, u = torch.optim.Adam(net.parameters(), lr=3e-3), picture("camera", 16)
    for step in range(40):
        noise = 0.1 * randn(4, 1, 16, 16, seed=step)
        before = [op.x for op in ops]
        optimiser.zero_grad()
        (net(u + noise) - noise).square().mean().backward()
        optimiser.step()
        assert all(not torch.equal(op.x, x) for op, x in zip(ops, before, strict=True))
    net.eval()
    held = [op.x.clone() for op in ops]
    norms = [circular_norm(layer.weight, 16) for layer, _ in weighted(net)]
    assert all(share(net, 0.5) <= norm * (1 + 1e-9) and norm <= 1.05 * share(net, 0.5) for norm in norms)
    assert all(torch.equal(op.x, x) for op, x in zip(ops, held, strict=True))  # evaluation does not move it
    assert all(f"{i}.parametrizations.weight.0.x" in net.state_dict() for i in (0, 2, 4))
    proved = certified(net, 0.5)
    assert lipschitz_bound(proved) <= 0.5 and all(type(layer) is nn.Conv2d for layer, _ in weighted(proved))
    assert all(parametrize.is_parametrized(layer) for layer, _ in weighted(net))  # the original stays as it was
    torch.testing.assert_close(proved(u), net(u), rtol=0.15, atol=0.02)


def test_noise_level_and_bias_do_not_count():
    net = certified(unit(), 0.5)
    norms = certify_norms(net)
    first = next(weighted(net))[0]
    first.weight.data[:, -1] *= 100
    first.bias.data += 5
    assert certify_norms(net) == norms
    u = picture("camera", 16)
    assert local_norm(lambda v: net(v, 0.1), u) <= 0.5


def test_float32_weights_are_certified_too():
    net = certified(ConvUnit(width=8, depth=4), 0.7)
    assert lipschitz_bound(net) <= 0.7 and next(net.parameters()).dtype == torch.float32


@pytest.mark.parametrize(("net", "message"), [
    (ConvUnit(width=4, depth=3, batch_norm=True), "fold_batch_norm"),
    (nn.Sequential(nn.Conv2d(2, 2, 3, groups=2)), "one group"),
    (nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")), "zero or circular padding"),
    (nn.Sequential(nn.Conv2d(1, 1, 3, padding=2, padding_mode="circular")), "half the kernel"),
    (nn.Sequential(nn.MaxPool2d(2)), "known activations, got MaxPool2d|at least one"),
    (nn.Sequential(nn.Conv2d(1, 1, 3), nn.MaxPool2d(2)), "known activations, got MaxPool2d"),
    (nn.Conv2d(1, 1, 3), "nn.Sequential, got Conv2d"),
    (nn.Sequential(nn.ReLU()), "at least one"),
])  # fmt: skip
def test_what_the_bound_does_not_cover_is_refused(net, message):
    with pytest.raises(ValueError, match=message):
        normalized(net, 0.5)


def test_arguments_are_checked():
    for delta in (0.0, 1.5, -1.0):
        with pytest.raises(ValueError, match=r"delta: expected a number in \(0, 1\]"):
            certified(circular_net(), delta)
    with pytest.raises(ValueError, match="n: expected a grid of more than 4 points"):
        conv_norm_bound(randn(1, 1, 5, 5), 4)
    assert lipschitz_bound(certified(fold_batch_norm(ConvUnit(width=4, depth=3, batch_norm=True)), 0.5)) <= 0.5


def classifier(activation):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        activation(),
        nn.Conv2d(4, 4, 3, padding=1),
        activation(),
        nn.Flatten(),
        nn.Linear(64, 1),
    ).double()
    return certified(net, 1.0)


def slope(net):
    """The gradient of a classifier's output, as a function of the image."""
    return torch.func.grad(lambda u: net(u).sum())


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Softplus, nn.SiLU, nn.ELU, nn.Sigmoid])
def test_gradient_of_a_smooth_classifier_is_lipschitz(activation):
    """Eq: GDC Proposition 3."""
    net = classifier(activation)
    sharp = gradient_bound(net)
    for seed in range(5):
        u = 3 * randn(1, 1, 4, 4, seed=seed)
        assert local_norm(slope(net), u) <= sharp
        assert local_norm(slope(net), u) <= gradient_bound(net, summed=True)
    if activation is nn.Tanh:  # kappa S sum prod s_j
        s = certify_norms(net)
        assert sharp == pytest.approx(4 / 27**0.5 * math.prod(s) * (s[0] + s[0] * s[1]), rel=1e-12)


def test_sum_over_positions_has_a_bound_that_does_not_grow_with_the_image():
    net = circular_net(nn.Tanh)
    sharp = gradient_bound(net, summed=True)
    for size in (4, 8, 16):
        assert local_norm(slope(net), 0.5 + randn(1, 1, size, size)) <= sharp


def test_errata_normalization_does_not_bound_the_discriminative_module_with_relu():
    """All layer norms are at most 1, so ``||D|| <= 1``; but D jumps.  Eq: GDC (10), Proposition 3."""
    net = classifier(nn.ReLU)
    a, b = randn(1, 1, 4, 4), -randn(1, 1, 4, 4)
    gradient = slope(net)
    assert lipschitz_bound(net) <= 1 and max(gradient(a).norm(), gradient(b).norm()) <= 1
    for _ in range(40):  # towards a kink
        middle = (a + b) / 2
        jump_left = (gradient(a) - gradient(middle)).norm()
        a, b = (a, middle) if jump_left > (gradient(b) - gradient(middle)).norm() else (middle, b)
    assert (gradient(a) - gradient(b)).norm() > 1e6 * (a - b).norm()
    with pytest.raises(ValueError, match="smooth activations .* got ReLU: its gradient jumps"):
        gradient_bound(net)


# Proposition 3


def test_interval_and_factors():
    """Eq: GDC Proposition 3."""
    low, high = prop.interval(1.3, 0.42, 1.0)
    assert (round(low, 3), round(high, 3)) == (0.565, 1.820)
    for gamma in (low, high):
        assert prop.contraction(1.3, gamma, 0.42, 1.0) == pytest.approx(1, rel=1e-12)
    for gamma in torch.linspace(0.711, 2.5, 50).tolist():
        assert prop.contraction(1.3, gamma, 0.42, 1.0) <= prop.contraction_printed(1.3, gamma, 0.42, 1.0) + 1e-12
    with pytest.raises(ValueError, match="expected less than"):
        prop.interval(2.46, 0.42, 1.0)
    assert prop.interval(2.44, 0.42, 1.0)[0] < prop.interval(2.44, 0.42, 1.0)[1]


def test_errata_at_the_closed_end_of_the_interval_the_factor_is_one():
    """Eq: GDC Proposition 3."""
    p, m, big = 1.3, 0.42, 1.0
    end = 2 * m * big / (m + big) * (1 + 1 / (p**2 - 1))
    assert prop.contraction_printed(p, end, m, big) == pytest.approx(1, rel=1e-12)
    assert prop.contraction(p, end, m, big) < 1  # and the sharper interval goes on


def test_errata_no_deblurring_kernel_meets_the_condition():
    """``rho = 2 min |k^|^2`` and L = 2 leave no room for any network.  Eq: GDC Proposition 3."""
    for size in (15, 19):
        kernel = random_kernel(torch.Generator().manual_seed(2), size).double()
        problem = prop.problem_of(prop.Blur(kernel), picture("camera", 128))
        with pytest.raises(ValueError, match="expected less than"):
            prop.interval(1.001, problem.strong_convexity, problem.lipschitz)


@pytest.fixture(scope="module")
def report():
    return prop.proposition_3(size=32)


def test_proposition_3_holds_for_normalized_networks(report):
    """Eq: GDC Proposition 3."""
    assert report["holds"] and report["instances"] == 3 and len(report["details"]) == 9
    for run in report["details"]:
        assert run["holds"] and run["ratio"] <= run["factor"] < 1, run
    assert max(run["ratio"] / run["factor"] for run in report["details"]) > 0.5  # not vacuous
    json.dumps(report, allow_nan=False)


def test_proposition_3_controls_expand(report):
    assert len(report["controls"]) == 3 and all(control["violates"] for control in report["controls"])
    assert report["controls"][0]["largest_ratio"] > 100  # Eq. 11 at the same delta
    assert 1.2 < report["controls"][2]["largest_ratio"] <= 1 + prop.DELTA_D + prop.DELTA_G + 0.1


def test_the_networks_of_proposition_3_are_normalized_and_move():
    u = picture("camera", 16)
    for net in prop.networks().values():
        assert lipschitz_bound(net) <= prop.DELTA_G
        assert (prop.move(net)(u, prop.LEVEL) - u).norm() > 1e-4 * u.norm()
    step = prop.discriminative()
    pull = lambda v: step.step * step.direction(v, 0)  # noqa: E731
    assert pull(u).norm() > 0
    eps = 1e-4 * randn(1, 1, 16, 16)
    assert 0 < (pull(u + eps) - pull(u)).norm() <= prop.DELTA_D * eps.norm()
    mean = lambda v: nn.functional.avg_pool2d(v, 3, 1, 1, count_include_pad=False)  # noqa: E731
    assert local_norm(lambda v: v - mean(v), u) <= prop.HIGH_PASS


def test_contraction_checks_notice_a_tampered_trace():
    trace = Trace()
    trace.rows = [
        {"change": torch.full((2,), 0.5**k), "norm": torch.ones(2), "distance": torch.tensor([4 * 0.5**k])}
        for k in range(1, 6)
    ]
    assert all(check.holds for check in prop.contraction_checks(trace, 0.5, 4.0))
    assert not prop.contraction_checks(trace, 0.49, 4.0)[0].holds and not prop.contraction_checks(trace, 0.49, 4.0)[1].holds
    assert not prop.contraction_checks(trace, 1.0, 4.0)[2].margin > 0
    assert not prop.contraction_checks(trace, 0.5, 3.9)[0].holds
    trace.rows[3]["distance"] = torch.tensor([1.0])
    assert not prop.contraction_checks(trace, 0.5, 4.0)[0].holds


def test_ridge_gives_a_blur_its_strong_convexity():
    problem, _, gamma = prop.instances(32)["astronaut, blur and ridge"]
    blur, y = blurred("astronaut", 32, gaussian())
    low, high = prop.problem_of(blur, y).fidelity.bounds
    assert problem.fidelity.bounds == pytest.approx((low + 0.3, high + 0.3), rel=1e-6)
    assert gamma == pytest.approx((low + high) / 2 + 0.3, rel=1e-6)
