"""Smoothing: constants and edges stay, texture goes, the split energy's constants and closed forms, report, refusals."""

import json

import pytest
import torch

from odlkit import data, weights
from odlkit.bench.gdc import structure, texture_removed
from odlkit.linear import largest_eigenvalue
from odlkit.operators import Gradient
from odlkit.problem import norm_items
from odlkit.tasks.smooth import MODELS, Split, alternate, betas, smooth, split_problem

trained = {"gdc-generator", "gdc-classifier"} <= set(weights.cards())
NAMES = [name for name in MODELS if name != "gdc" or trained]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cartoon(size: tuple[int, int], channels: int = 1) -> torch.Tensor:
    """A bright rectangle on a dark ground."""
    x = torch.full((1, channels, *size), 0.2)
    x[..., size[0] // 4 : -size[0] // 4, size[1] // 4 : -size[1] // 4] = 0.8
    return x


@pytest.mark.parametrize("beta", [0.04, 1.0, 300.0])
def test_the_split_operator_has_its_adjoint_and_its_eigenvalues(beta, device, dtype):
    operator = Split(beta)
    x, y = (torch.randn(2, 6, 12, 15, generator=seeded(i), dtype=torch.float64).to(device, dtype) for i in range(2))
    left, right = (operator.A(x) * y).sum().item(), (x * operator.A_adjoint(y)).sum().item()
    assert abs(left - right) < (1e-12 if dtype == torch.float64 else 1e-4) * (1 + abs(left)) * max(1, beta)
    low, high = operator.eigenvalue_range(x)
    u = torch.randn(1, 3, 12, 14, generator=seeded(), dtype=torch.float64)
    found = largest_eigenvalue(operator.normal, u, steps=2000, rtol=1e-12)
    assert 0.97 * high < found <= high * (1 + 1e-9)
    rest = largest_eigenvalue(lambda z: high * z - operator.normal(z), u, steps=5000, rtol=1e-13)
    assert low * (1 - 1e-6) - 1e-9 * high <= high - rest <= 1.1 * low + 1e-7 * high


def test_the_alternation_minimises_the_split_energy_in_each_part(dtype):
    y, strength, beta = torch.rand(2, 3, 16, 17, generator=seeded(), dtype=torch.float64).to(dtype), 0.3, 0.5
    problem = split_problem(y, strength, beta)
    new = alternate(y, strength, beta)(problem, torch.cat([y, Gradient().A(y)], 1), 0)
    energy = problem.energy(new)
    for seed in range(4):
        move = 1e-2 * torch.randn(y.shape, generator=seeded(seed), dtype=torch.float64).to(dtype)
        moved = torch.cat([new[:, :3] + move, new[:, 3:]], 1)  # S is a minimiser given h
        assert (problem.energy(moved) > energy).all()
    h, slopes = new[:, 3:], Gradient().A(y)
    kept = (h != 0).any(1)
    assert torch.equal(kept, slopes.square().sum(1) > strength / beta) and 0.01 < kept.double().mean() < 0.99


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(33, 47), (40, 64)])
@pytest.mark.parametrize("channels", [1, 3])
def test_constants_stay_noise_goes_and_the_report_is_whole(name, size, channels, report_keys):
    flat = torch.full((1, channels, *size), 0.4)
    assert torch.allclose(smooth(flat, 0.02, name)[0], flat, atol=1e-3)
    x = cartoon(size, channels)
    y = x + 0.03 * torch.randn(x.shape, generator=seeded())
    smoothed, report = smooth(y, 0.02, name)
    assert smoothed.shape == y.shape
    assert (norm_items(smoothed - x) < 0.6 * norm_items(y - x)).all()
    assert report["certificate"]["holds"] is True and set(report) >= report_keys
    json.dumps(report)


def test_half_quadratic_splitting_keeps_an_edge_and_flattens_the_rest():
    x = cartoon((40, 40))
    y = x + 0.02 * torch.randn(x.shape, generator=seeded())
    smoothed = smooth(y, 0.02, "l0")[0]
    assert smoothed[0, 0, 20, 20] - smoothed[0, 0, 3, 3] > 0.55
    inside = Gradient().A(smoothed)[..., 14:26, 14:26].abs().max()
    assert inside < 0.2 * Gradient().A(y)[..., 14:26, 14:26].abs().max()


def test_stronger_smoothing_removes_more_texture():
    y = data.sample("brick", 96)
    gone = [texture_removed(smooth(y, strength, "l0")[0], y)[0] for strength in (1e-4, 1e-3, 1e-2)]
    assert gone[0] < gone[1] < gone[2] and gone[2] > 0.5
    edges, texture = structure(y)
    assert not bool((edges & texture).any()) and texture_removed(y, y) == (0.0, 1.0)


@pytest.mark.skipif(not trained, reason="GDC's greedy networks are not installed")
def test_the_learned_modules_are_used_and_every_energy_falls():
    y = data.sample("coffee", (64, 80), gray=False)
    smoothed, report = smooth(y, 0.01)
    assert report["certificate"]["margin"] >= 0 and 0 < report["certificate"]["acceptance_rate"] <= 1
    assert report["iterations"] == 2 * len(betas(0.01))
    assert not torch.allclose(smoothed, smooth(y, 0.01, "l0")[0], atol=1e-3)


def test_what_does_not_fit_is_refused():
    y = torch.rand(1, 1, 16, 16)
    with pytest.raises(ValueError, match="^model: expected one of"):
        smooth(y, model="bilateral")
    with pytest.raises(ValueError, match="^strength: expected a number in"):
        smooth(y, 0.0)
    with pytest.raises(ValueError, match="^input: expected finite numbers"):
        smooth(y / 0)
    with pytest.raises(ValueError, match="^input: expected a floating point tensor"):
        smooth(y[0])
