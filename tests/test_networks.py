"""Networks: shapes, the bound of PADNet's Condition 2, gradients, and batch normalization folded away."""

import pytest
import torch

from odlkit.networks import ConvUnit, RBFUnit, ResidualNet, clip_to_ball, fold_batch_norm


def items(x):
    return x.flatten(1).norm(dim=1)


@pytest.mark.parametrize("size", [(7, 9), (8, 8), (1, 5), (16, 3)])
def test_conv_unit_keeps_any_size(size, device, dtype):
    unit = ConvUnit(width=4, depth=3).to(device, dtype)
    v = torch.rand(2, 1, *size, device=device, dtype=dtype)
    out = unit(v, 0.1)
    assert out.shape == v.shape and out.dtype == dtype and out.device == v.device
    levels = torch.tensor([0.1, 30.0], device=device, dtype=dtype).view(2, 1, 1, 1)
    torch.testing.assert_close(unit(v, levels)[:1], unit(v[:1], 0.1))  # each item has its own noise level
    assert not torch.allclose(unit(v, levels)[1:], unit(v[1:], 0.1))


def test_folded_batch_norm_is_the_same_function():
    unit = ConvUnit(width=6, depth=5, batch_norm=True).double()
    for layer in unit.layers:  # statistics and scales that are not the initial 0 and 1
        if isinstance(layer, torch.nn.BatchNorm2d):
            for tensor in (layer.running_mean, layer.weight.data, layer.bias.data):
                tensor.normal_()
            layer.running_var.uniform_(0.2, 3.0)
    unit.eval()
    folded = fold_batch_norm(unit)
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in folded.layers)
    v = torch.randn(2, 1, 9, 11, dtype=torch.float64)
    expected = unit(v, 0.2)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(folded(v, 0.2), expected, rtol=1e-10, atol=1e-12 * expected.abs().max().item())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("kind", ["conv", "rbf", "wild"])
def test_bounded_net_meets_condition_2_for_any_input(kind, scale, device, dtype):
    """Eq: PADNet Condition 2."""

    class Wild(torch.nn.Module):
        def forward(self, v, alpha):
            return -50 * v.square() - 1e3

    conv, rbf = (lambda: ConvUnit(channels=2, width=4, depth=3)), (lambda: RBFUnit(filters=3, size=3))
    unit = {"conv": conv, "rbf": rbf, "wild": Wild}[kind]()
    net = ResidualNet([unit, unit], bound=0.05).to(device, dtype)
    v = scale * torch.randn(3, 2, 6, 5, device=device, dtype=dtype)
    alpha = torch.tensor([0.5, 0.1, 1e-3], device=device, dtype=dtype).view(3, 1, 1, 1)
    with torch.no_grad():
        move = items(net(v, alpha) - v)
        free = items(ResidualNet([unit, unit]).to(device, dtype)(v, alpha) - v)
    rounding = 4 * torch.finfo(dtype).eps * items(v)
    radius = 0.05 * alpha.flatten() * v[0].numel() ** 0.5
    assert (move <= radius * (1 + 1e-5) + rounding).all()
    if kind == "wild":
        assert (free > radius).all()  # without the clip the condition fails, so the clip is what makes it true


def test_clip_leaves_short_moves_alone(dtype):
    move = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], dtype=dtype)
    out = clip_to_ball(move, 1.0)
    torch.testing.assert_close(out, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]], dtype=dtype))


def test_rbf_unit_is_bounded_by_its_own_constant(device, dtype):
    """Eq: PADNet Condition 2."""
    generator = torch.Generator().manual_seed(3)
    unit = RBFUnit(filters=4, size=3, centres=9)
    unit.weights.data.normal_(generator=generator)
    unit = unit.to(device, dtype)
    largest = 0.0
    for scale in (1e-2, 0.3, 1.0, 3.0, 1e4):
        v = scale * torch.randn(2, 2, 9, 7, generator=generator).to(device, dtype)
        with torch.no_grad():
            largest = max(largest, items(unit(v, 0.5)).max().item() / v[0].numel() ** 0.5)
    assert largest <= unit.bound()
    with torch.no_grad():  # reached within a factor by the worst constant input of one filter, so the bound says something
        z = torch.linspace(-7, 7, 500, device=device, dtype=dtype).view(1, 1, 1, -1).expand(1, 4, 1, -1)
        curve = unit.phi(z.contiguous()).abs().amax((0, 2, 3))
    limit = torch.minimum(unit.weights.abs().sum(1), 2.5067 * unit.weights.abs().amax(1))
    assert (curve <= limit).all() and (curve > 0.2 * limit).any()


def test_rbf_functions_are_the_sum_of_gaussians(dtype):
    unit = RBFUnit(filters=2, size=3, centres=5, reach=2.0).to(dtype)
    unit.weights.data.copy_(torch.tensor([[1.0, -2.0, 0.5, 0.0, 3.0], [0.0, 0.0, 1.0, 0.0, 0.0]]))
    z = torch.linspace(-3, 3, 12, dtype=dtype).reshape(1, 2, 2, 3)
    centres = torch.linspace(-2, 2, 5, dtype=dtype)
    expected = (unit.weights.view(1, 2, 1, 1, 5) * torch.exp(-0.5 * (z[..., None] - centres) ** 2)).sum(-1)
    torch.testing.assert_close(unit.phi(z), expected)


def finite_difference(function, tensor, direction, step=1e-5):
    with torch.no_grad():
        tensor.add_(direction, alpha=step)
        high = function().item()
        tensor.sub_(direction, alpha=2 * step)
        low = function().item()
        tensor.add_(direction, alpha=step)
    return (high - low) / (2 * step)


@pytest.mark.parametrize("kind", ["conv", "rbf"])
def test_gradients_against_finite_differences(kind):
    unit = (ConvUnit(channels=2, width=4, depth=3) if kind == "conv" else RBFUnit(filters=3, size=3, centres=7)).double()
    net = ResidualNet([unit, unit], bound=0.02)  # the clip is active, and differentiated too
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(2, 2, 5, 7, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(2, 2, 5, 7, dtype=torch.float64, generator=generator)

    def value():
        return (weight * net(v, 0.4)).sum()

    targets = [v, *net.parameters()]
    for target, gradient in zip(targets, torch.autograd.grad(value(), targets), strict=True):
        direction = torch.randn(target.shape, dtype=torch.float64, generator=generator)
        expected = finite_difference(value, target, direction)
        assert (gradient * direction).sum().item() == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("arguments", [{"size": 4}, {"centres": 1}, {"reach": 0.0}])
def test_rbf_unit_names_the_bad_argument(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        RBFUnit(**arguments)
