"""Learned weights: hypergradients against closed forms and differences, bounds against tight solves, what breaks them."""

import math

import numpy as np
import pytest
import torch

from odlkit import data
from odlkit.linear import NotConverged
from odlkit.operators import Blur, Decimation, FilterBank, Gradient, Identity, Mask, Wavelet
from odlkit.training.banded import Bands, Lower, certify, certify_gradient, dct_filters
from odlkit.training.regulariser import learn_weights

NAMES = ("camera", "coins")
KERNEL = torch.tensor([[0.0, 1, 2], [1, 3, 1], [2, 1, 0]], dtype=torch.float64) / 11


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(size: int = 16, count: int = 2) -> torch.Tensor:
    return torch.cat([data.sample(name, 8 * size)[..., :size, :size] for name in NAMES[:count]]).double()


def operator(task: str, size: int = 16):
    mask = (torch.rand(1, 1, size, size, generator=generator(3)) < 0.6).double()
    return {"blur": Blur(KERNEL), "inpaint": Mask(mask), "decimate": Decimation(2), "denoise": Identity()}[task]


def instance(task: str, regulariser="dct", delta: float = 0.02) -> tuple[Lower, torch.Tensor, torch.Tensor]:
    """A lower level, the pictures, and log-weights that are not all alike."""
    A, x = operator(task), pictures()
    y = A.A(x)
    y = y + 0.02 * torch.randn(y.shape, generator=generator(1), dtype=y.dtype)
    bands = Bands.of(regulariser)
    w = math.log(3e-3) + 0.3 * torch.randn(bands.count, generator=generator(2)).double()
    return Lower(A, y, bands, 1e-2, delta), x, w


def dense(function, like: torch.Tensor) -> torch.Tensor:
    units = torch.eye(like.numel(), dtype=like.dtype).view(-1, *like.shape[1:])
    return function(units).flatten(1).T


@pytest.mark.parametrize("task", ["blur", "inpaint", "decimate"])
def test_hypergradient_of_quadratic_weights_against_its_closed_form(task):
    """R_j = |W_j u|^2 / 2: u* and its derivative are linear algebra."""
    lower, x, w = instance(task, dct_filters(3), math.inf)
    found = certify_gradient(lower, w, lower.solve(w, tol=1e-12), x, tol=1e-13)
    A, W = dense(lower.operator.A, x[:1]), dense(lower.bands.W.A, x[:1])
    parts = [w[j].exp() * Wj.T @ Wj for j, Wj in enumerate(W.split(x[0].numel()))]
    M = A.T @ A + lower.ridge * torch.eye(A.shape[1], dtype=A.dtype) + sum(parts)
    u = torch.linalg.solve(M, A.T @ lower.y.flatten(1).T + lower.ridge / 2)  # (n, B)
    gap = u - x.flatten(1).T
    exact = torch.stack([-(torch.linalg.solve(M, 2 * gap / gap.numel()) * (part @ u)).sum() for part in parts])
    assert (found.u.flatten(1).T - u).abs().max() < 1e-10
    assert abs(found.loss - gap.square().mean()) < 1e-12
    assert (found.gradient - exact).norm() < 1e-9 * exact.norm()
    assert (found.gradient - exact).norm() <= found.gradient_error < 1e-6 * exact.norm()


@pytest.mark.parametrize("regulariser", ["tv", "wavelet", "dct"])
@pytest.mark.parametrize("task", ["blur", "inpaint", "decimate"])
def test_hypergradient_of_smooth_l1_against_differences(task, regulariser):
    lower, x, w = instance(task, regulariser)
    u = lower.solve(w, tol=1e-11)
    gradient = certify_gradient(lower, w, u, x, tol=1e-12).gradient
    for j in {0, len(w) - 1}:
        step = torch.zeros_like(w)
        step[j] = 1e-4
        ends = [certify(lower, w + s * step, lower.solve(w + s * step, u, 1e-11), x).loss for s in (1, -1)]
        assert abs((ends[0] - ends[1]) / 2e-4 - gradient[j]) < 1e-5 * gradient.norm() + 1e-10


def errors(lower, x, w, tol: float):
    """What `certify_gradient` says at a loose tolerance, and the true errors, from a tight one."""
    exact = certify_gradient(lower, w, lower.solve(w, tol=1e-11), x, tol=1e-13)
    found = certify_gradient(lower, w, lower.solve(w, tol=tol), x, tol=min(tol, 1e-2))
    true = ((found.u - exact.u).norm(), abs(found.loss - exact.loss), (found.gradient - exact.gradient).norm())
    return found, (found.distance, found.loss_error, found.gradient_error), [float(t) for t in true], exact


@pytest.mark.parametrize("regulariser", ["tv", "wavelet", "dct"])
@pytest.mark.parametrize("task", ["blur", "inpaint", "denoise"])
def test_bounds_hold_at_every_tolerance_and_shrink_with_it(task, regulariser):
    lower, x, w = instance(task, regulariser)
    before = [math.inf] * 3
    for tol in (1e-1, 1e-3, 1e-5, 1e-9):
        _, bounds, true, exact = errors(lower, x, w, tol)
        assert all(t <= b for t, b in zip(true, bounds, strict=True)), (tol, true, bounds)
        assert all(b <= a for a, b in zip(before, bounds, strict=True))
        before = list(bounds)
    assert before[2] < 1e-2 * exact.gradient.norm()  # tight enough to be of use


def test_without_strong_convexity_the_bound_fails():
    """Claim mu = 1, as for an invertible A, where pixels are missing: the same solve is then farther away than its bound."""
    lower, x, w = instance("inpaint", "tv")
    lower.mu = 1.0
    _, bounds, true, _ = errors(lower, x, w, 1e-1)
    assert true[0] > bounds[0]


def test_a_loose_lower_level_gives_the_wrong_sign_and_the_bound_says_so():
    """Between the minimisers of phi and of its inexact version the sign is wrong, and there the bound exceeds the slope."""
    lower, x, _ = instance("inpaint", "tv")
    wrong = []
    for value in torch.linspace(-7, -3, 9).tolist():
        w = torch.tensor([value], dtype=torch.float64)
        found, bounds, _, exact = errors(lower, x, w, 0.3)
        if found.gradient * exact.gradient < 0:
            wrong.append(bounds[2] > found.gradient.norm())
    assert wrong and all(wrong)


def test_one_weight_is_the_best_of_a_fine_grid():
    A, x = operator("blur"), pictures()
    y = A.A(x) + 0.02 * torch.randn(x.shape, generator=generator(), dtype=x.dtype)
    found = learn_weights(A, x, 0.02, "tv", measured=y, tol=0.01, progress=False)
    assert found.status == "converged" and len(found.history) < 15
    lower = Lower(A, y, found.bands, found.ridge, found.delta)
    grid, u = [], None
    for w in torch.linspace(-8, -3, 26).double()[:, None]:
        u = lower.solve(w, u, tol=1e-6)
        grid.append((u - x).square().mean().item())
    assert found.history[-1]["mse"] <= min(grid) * (1 + 1e-3)


def test_every_step_is_a_proved_descent_and_the_end_is_proved_flat():
    found = learn_weights(operator("inpaint"), pictures(), 0.02, "dct", progress=False)
    rows = found.history
    assert found.status == "converged"
    for a, b in zip(rows, rows[1:], strict=False):
        assert b["mse"] + b["mse_error"] < a["mse"] - a["mse_error"]
        assert a["slope_error"] <= 0.1 * a["slope"]
    assert rows[-1]["slope"] + rows[-1]["slope_error"] <= 0.02
    assert found.estimate < rows[-1]["slope_error"] / rows[-1]["slope"]
    shared = learn_weights(operator("inpaint"), pictures(), 0.02, "dct", shared=True, progress=False)
    assert len(shared.weights) == 1 and rows[-1]["mse"] < shared.history[-1]["mse"]


class Foreign:
    """Somebody's operator: no autograd through it."""

    def A(self, x):
        return torch.from_numpy(np.roll(x.numpy(), 1, -1) + 0.5 * x.numpy())

    def A_adjoint(self, y):
        return torch.from_numpy(np.roll(y.numpy(), -1, -1) + 0.5 * y.numpy())


class Same(Foreign):
    def A(self, x):
        return x.roll(1, -1) + 0.5 * x


def test_a_foreign_operator_and_given_data():
    x = pictures()
    y = Foreign().A(x) + 0.02 * torch.randn(x.shape, generator=generator(), dtype=x.dtype)
    options = {"regulariser": "tv", "measured": y, "progress": False}
    first, second = (learn_weights(A, list(x[:, None]), **options) for A in (Foreign(), Same()))
    assert torch.allclose(first.weights, second.weights, rtol=1e-6)
    u, bound = first.restore(Foreign(), y.float())
    exact, _ = first.restore(Foreign(), y.float(), 1e-9)
    assert u.dtype == torch.float32 and (bound <= 1e-3).all()
    assert ((u - exact).square().mean((1, 2, 3)).sqrt() <= bound + 1e-6).all()
    assert (u - x).square().mean() < (y / 1.5 - x).square().mean()


def test_the_same_seed_gives_the_same_weights_and_validation_is_watched():
    A, x = operator("denoise"), pictures()
    held = (x[:1].flip(-1) + 0.05, x[:1].flip(-1))
    runs = [learn_weights(A, x, 0.05, "wavelet", shared=True, validation=held, seed=7, progress=False) for _ in range(2)]
    assert torch.equal(runs[0].weights, runs[1].weights)
    assert all(math.isfinite(row["validation"]) for row in runs[0].history)


def test_bands():
    c = torch.randn(2, 1, 16, 16, generator=generator()).double()
    subbands = Bands.of(Wavelet("haar", 2))
    values = Wavelet("haar", 2).A(c)
    weight = subbands.weights(torch.zeros(6).double(), values).expand_as(values)
    assert weight.sum() == 2 * (256 - 16) and (weight[..., :4, :4] == 0).all()  # not the coarse band
    assert torch.allclose(subbands.sums(values)[0], values[..., :8, 8:].sum())
    filters = dct_filters(3).filters.flatten(1)
    assert torch.allclose(filters @ filters.T, torch.eye(8).double()) and filters.sum(1).abs().max() < 1e-12
    colour = FilterBank(dct_filters(3).filters).A(c.view(1, 2, 16, 16))
    assert torch.allclose(Bands.of("dct").sums(colour)[1], colour[:, 2:4].sum())
    assert Bands.of(Gradient()).groups == 2 and Bands.of(Identity()).count == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"images": torch.rand(16, 16)}, "images: expected floating point"),
        ({"images": [torch.rand(1, 1, 8, 8), torch.rand(1, 1, 16, 16)]}, "of one size"),
        ({"images": []}, "images: expected"),
        ({"images": 255 * torch.rand(2, 1, 16, 16)}, "images: expected values around"),
        ({"regulariser": "sparse"}, "regulariser: expected an operator or one of tv, wavelet, dct"),
        ({"ridge": 0.0}, "ridge: expected a number above 0"),
        ({"noise": -1.0}, "noise: expected"),
        ({"accuracy": 1.0}, "accuracy: expected a number between 0 and 1"),
        ({"start": -1.0}, "start: expected positive weights"),
        ({"start": torch.ones(5)}, "start: expected"),
        ({"measured": torch.rand(2, 1, 4, 4)}, "measured: expected data like A x"),
        ({"measured": torch.full((2, 1, 16, 16), math.nan)}, "measured: expected finite numbers"),
        ({"images": torch.full((2, 1, 16, 16), math.inf)}, "images: expected finite numbers"),
        ({"steps": -1}, "steps: expected at least 0"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    call = {"operator": Identity(), "images": torch.rand(2, 1, 16, 16), "regulariser": "tv", "progress": False} | arguments
    with pytest.raises(ValueError, match=words):
        learn_weights(**call)


def test_an_adjoint_that_is_none_and_a_solve_that_fails_are_named():
    class Wrong(Same):
        def A_adjoint(self, y):
            return self.A(y)

    with pytest.raises(ValueError, match="operator: expected <A u, v> = <u, A_adjoint v>"):
        learn_weights(Wrong(), pictures(), progress=False)
    lower, _, w = instance("inpaint", "tv")
    with pytest.raises(NotConverged, match="lower level: gradient .* after 1 Newton steps"):
        lower.solve(w, tol=1e-9, steps=1)
