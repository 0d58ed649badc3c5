"""The training loop resumes exactly, says when it fails, and differentiates through the iteration rightly."""

import json

import pytest
import torch

from odlkit.networks import ConvUnit, ResidualNet
from odlkit.training import RECIPES, recipe
from odlkit.training.kernels import random_kernel
from odlkit.training.loop import fit, patches, save_weights
from odlkit.training.padnet import log_uniform, unroll


def toy():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)

    def loss(generator):
        x = torch.randn(8, 3, generator=generator)
        return (model(x) - x.sum(1, keepdim=True)).square().mean()

    return model, loss


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole, loss = toy()
    fit(whole, loss, steps=20, lr=0.1, out=tmp_path / "a", name="toy", warmup=2, save_every=10)

    class Stop(Exception):
        pass

    broken, loss = toy()
    calls = 0

    def interrupted(generator):
        nonlocal calls
        calls += 1
        if calls > 13:
            raise Stop
        return loss(generator)

    with pytest.raises(Stop):
        fit(broken, interrupted, steps=20, lr=0.1, out=tmp_path / "b", name="toy", warmup=2, save_every=10)
    again, loss = toy()
    record = fit(again, loss, steps=20, lr=0.1, out=tmp_path / "b", name="toy", warmup=2, save_every=10, resume=True)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    assert [row[0] for row in record["history"]] == [10, 20]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model, _ = toy()
    with pytest.raises(FloatingPointError, match="step 0"):
        fit(model, lambda g: model.weight.sum() * torch.nan, steps=3, lr=0.1, out=tmp_path, name="toy")
    assert not list(tmp_path.glob("*.pt"))


def test_the_card_names_the_file_and_its_digest(tmp_path):
    model, _ = toy()
    save_weights(model, tmp_path / "toy.safetensors", {"name": "toy"})
    card = json.loads((tmp_path / "toy.json").read_text())
    assert card["parameters"] == 4 and len(card["sha256"]) == 64 and card["file"] == "toy.safetensors"


def test_random_kernels_are_kernels_and_vary():
    generator = torch.Generator().manual_seed(0)
    kernels = torch.stack([random_kernel(generator) for _ in range(40)])
    assert kernels.shape == (40, 31, 31)
    assert (kernels >= 0).all() and torch.allclose(kernels.sum((1, 2)), torch.ones(40), atol=1e-5)
    assert torch.cdist(kernels.flatten(1), kernels.flatten(1)).add(torch.eye(40)).min() > 1e-3
    rows = torch.arange(31.0) - 15
    assert ((kernels.sum(2) @ rows).abs() < 3).all() and ((kernels.sum(1) @ rows).abs() < 3).all()


def test_patches_are_crops_of_the_images():
    image = torch.arange(400.0).reshape(1, 1, 20, 20)
    batch = patches([image], 6, 8, torch.Generator().manual_seed(1))
    assert batch.shape == (6, 1, 8, 8)
    for crop in batch[:, 0]:  # in each of eight orientations neighbours differ by 1 along one axis, 20 along the other
        steps = {crop.diff(dim=0).abs().unique().tolist()[0], crop.diff(dim=1).abs().unique().tolist()[0]}
        assert steps == {1.0, 20.0}


def test_noise_levels_stay_in_their_range():
    levels = log_uniform(0.01, 0.1, 500, torch.Generator().manual_seed(0))
    assert levels.shape == (500, 1, 1, 1) and levels.min() >= 0.01 and levels.max() <= 0.1
    assert 0.025 < levels.median() < 0.04  # the middle of a log-uniform law is the geometric mean


def test_the_gradient_through_the_iteration_equals_a_finite_difference(device):
    torch.manual_seed(3)
    net = ResidualNet([ConvUnit(width=4, depth=3)], bound=3.0).double().to(device)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 1, 12, 12, generator=generator, dtype=torch.float64).to(device)
    kernel = torch.rand(2, 1, 5, 5, generator=generator, dtype=torch.float64).to(device)
    kernel = kernel / kernel.sum((-2, -1), keepdim=True)
    sigma = torch.tensor([0.02, 0.05], dtype=torch.float64).view(2, 1, 1, 1)

    def loss():
        outputs = unroll(net, x, kernel, sigma, torch.Generator().manual_seed(7), depth=4)
        return (outputs[-1] - x).square().sum()

    loss().backward()
    for parameter in net.parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(device)
        exact = (parameter.grad * direction).sum().item()
        h = 1e-6
        with torch.no_grad():
            parameter += h * direction
            above = loss().item()
            parameter -= 2 * h * direction
            below = loss().item()
            parameter += h * direction
        assert (above - below) / (2 * h) == pytest.approx(exact, rel=1e-4, abs=1e-7)


def test_recipes_exist_and_unknown_ones_are_named():
    for name in RECIPES:
        assert callable(recipe(name))
    with pytest.raises(ValueError, match="recipe: expected one of"):
        recipe("nonsense")
