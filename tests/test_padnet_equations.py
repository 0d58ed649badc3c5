"""Equations of PADNet that no other test writes out: each against its definition, term by term."""

import pytest
import torch

from odlkit import instances
from odlkit.models.padnet import Constants, Explicit
from odlkit.models.padnet_gradient import gradient_problem
from odlkit.networks import RBFUnit, ResidualNet
from odlkit.operators import Blur, Gradient
from odlkit.problem import norm_items


def test_eq_6_every_unit_sees_the_output_of_the_one_before(device, dtype):
    """``N(v_0) = v_0 - alpha sum_t G(v_t; W_t)`` with ``v_{t+1} = v_t - alpha G(v_t; W_t)``, three units."""
    torch.manual_seed(1)
    units = [RBFUnit(filters=3, size=3).to(device, dtype) for _ in range(3)]
    v, alpha = torch.randn(2, 2, 6, 5, device=device, dtype=dtype), 0.3
    with torch.no_grad():
        first = units[0](v, alpha)
        second = units[1](v - alpha * first, alpha)
        third = units[2](v - alpha * first - alpha * second, alpha)
        torch.testing.assert_close(ResidualNet(units)(v, alpha), v - alpha * (first + second + third))
        assert not torch.allclose(first, second)


@pytest.mark.parametrize("p", [0.0, 0.8, 1.0])
def test_eq_14_is_the_energy_of_both_gradient_problems(p):
    """``||g * k - D y||^2 / 2 + lambda ||g||_p^p``, with the norm of p = 0 a count."""
    generator = torch.Generator().manual_seed(2)
    y = torch.rand(1, 1, 12, 10, generator=generator, dtype=torch.float64)
    g = torch.randn(1, 2, 12, 10, generator=generator, dtype=torch.float64)
    g = g * (torch.rand(g.shape, generator=generator) < 0.5)
    kernel, lam, sigma = instances.gaussian(5), 0.01, 0.1

    def printed(data):
        blurred = torch.cat([Blur(kernel).A(g[:, :1]), Blur(kernel).A(g[:, 1:])], dim=1)
        size = (g != 0).sum().double() if p == 0 else g.abs().pow(p).sum()
        return 0.5 * (blurred - data).square().sum(), size

    fit, size = printed(Gradient().A(y))
    weight = 0.5 / sigma**2  # the shipped networks were trained with noise in units of the data's
    torch.testing.assert_close(gradient_problem(y, kernel, sigma, p, lam).energy(g)[0], weight * (fit + lam * size))
    problem, data = instances.gradient_problem("camera", 16, p, kernel)
    g = data
    fit, size = printed(data)
    torch.testing.assert_close(problem.energy(data)[0], fit + instances.WEIGHT[p] * size)


def test_eq_23_the_recorded_subgradient_is_one():
    """At p = 1, ``e - mu (x+ - x) - grad f(x+)`` is a subgradient of lambda ||.||_1; that norm is recorded."""
    problem, x = instances.gradient_problem("coins", 24, 1.0, instances.gaussian())
    constants = Constants.for_lipschitz(problem.lipschitz)
    step = Explicit([lambda w, alpha: 0.5 * w], constants, halvings=3)
    state, record = step(problem, step.init(problem, x))
    v = state.aux["v"]
    new, e = step.correct(problem, x, v)
    torch.testing.assert_close(new, state.x)
    s = e - constants.moreau * (new - x)
    torch.testing.assert_close(record["subgradient"], norm_items(s))
    slope, lam = s - problem.fidelity.grad(new), instances.WEIGHT[1.0]
    torch.testing.assert_close(slope[new != 0], lam * new[new != 0].sign())
    assert (new == 0).any() and (slope.abs() <= lam * (1 + 1e-9)).all()
