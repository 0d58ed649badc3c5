"""Interpolation: what is known stays, every size and number of channels, the gain, the report, and what is refused."""

import json

import pytest
import torch

from odlkit import data, weights
from odlkit.metrics import psnr
from odlkit.operators import Gradient, Mask
from odlkit.priors import GroupLp
from odlkit.problem import LeastSquares, Problem
from odlkit.tasks.inpaint import MODELS, TV_STEPS, TV_WEIGHT, fill, inpaint, thin_plate
from odlkit.training.masks import missing_at_random, text

NEEDS = {"gdc": "gdc-inpaint", "dgunet": "dgunet-known"}
trained = NEEDS["gdc"] in weights.cards()
NAMES = [name for name in MODELS if NEEDS.get(name, "gdc-inpaint") in weights.cards()]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [(1, 7), (16, 16), (31, 45)])
def test_the_fill_keeps_what_is_known_and_is_exact_on_constants(size, device, dtype):
    mask = missing_at_random(0.7, *size, seeded()).to(device, dtype)
    mask[..., 0, 0] = 1
    y = torch.rand(2, 3, *size, generator=seeded(1), dtype=torch.float64).to(device, dtype)
    filled = fill(torch.where(mask > 0, y, torch.nan), mask)
    assert torch.equal(torch.where(mask > 0, filled, y), y) and filled.dtype == dtype
    assert filled.min() >= y.min() - 1e-6 and filled.max() <= y.max() + 1e-6
    flat = torch.full_like(y, 0.3)
    assert torch.allclose(fill(flat * mask, mask), flat, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_known_stays_and_what_is_missing_gains(name, channels, report_keys):
    x = data.sample("astronaut", (95, 101), gray=channels == 1)
    mask = missing_at_random(0.6, 95, 101, seeded())
    y = torch.where(mask > 0, x, torch.rand(x.shape, generator=seeded(1)))  # nonsense where nothing is known
    restored, report = inpaint(y, mask[0, 0], name)
    assert restored.shape == x.shape and torch.equal(restored * mask, y * mask)
    if name == "haar-l08":  # a poor model of what is missing: it is certified to minimise, not to restore
        assert report["certificate"]["holds"] and report["energies"][-1] < 0.95 * report["energies"][0]
    else:
        assert psnr(restored, x).item() > psnr(fill(y, mask), x).item() + (0.1 if name == "tv" else 0.5)
    assert set(report) >= report_keys
    json.dumps(report)
    assert report["input"]["known"] == round(mask.mean().item(), 4)


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_total_variation_leaves_its_start_for_a_minimiser(share):
    x = data.sample("coffee", (96, 128), gray=False)
    mask = missing_at_random(share, 96, 128, seeded())
    problem = Problem(LeastSquares(Mask(mask), x * mask), GroupLp(1, TV_WEIGHT), Gradient())
    plate, (found, report), (far, _) = (
        thin_plate(x * mask, mask),
        inpaint(x * mask, mask, "tv"),
        inpaint(x, mask, "tv", steps=400),
    )
    energy = [problem.energy(image).item() for image in (plate, found, far)]
    assert report["iterations"] == TV_STEPS and energy[1] - energy[2] < 0.1 * (energy[0] - energy[2]), energy


@pytest.mark.skipif(not trained, reason="the network gdc-inpaint is not installed")
@pytest.mark.parametrize("kind", ["random", "text"])
def test_gdc_is_above_every_model_that_is_not_learned(kind):
    x = data.sample("coffee", (96, 120), gray=False)
    mask = text(96, 120, seeded()) if kind == "text" else missing_at_random(0.5, 96, 120, seeded())
    scores = {name: psnr(inpaint(x * mask, mask, name)[0], x).item() for name in MODELS if name != "dgunet"}
    assert scores["gdc"] >= 1 + max(score for name, score in scores.items() if name != "gdc"), scores


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_the_bent_plate_is_the_biharmonic_solution_and_keeps_what_is_known(share):
    x = data.sample("coffee", (48, 40), gray=False)
    mask = missing_at_random(share, 48, 40, seeded())
    plate = thin_plate(x * mask, mask, rtol=1e-4)
    assert torch.equal(plate * mask, x * mask)
    library = inpaint(x * mask, mask, "biharmonic")[0]
    inside = (slice(None), slice(None), slice(6, -6), slice(6, -6))  # the two differ at the picture's border
    assert (plate - library)[inside].abs().mean() < 0.1 * (fill(x * mask, mask) - library)[inside].abs().mean()
    assert torch.equal(thin_plate(x, torch.ones(1, 1, 48, 40)), x)


@pytest.mark.skipif(not trained, reason="the network gdc-inpaint is not installed")
def test_items_of_a_batch_do_not_meet_and_other_channel_counts_work():
    x = torch.cat([data.sample("coffee", 64, gray=False), data.sample("chelsea", 64, gray=False)])
    mask = torch.cat([missing_at_random(0.5, 64, 64, seeded(i)) for i in range(2)])
    both = inpaint(x * mask, mask)[0]
    assert torch.allclose(both[1:], inpaint((x * mask)[1:], mask[1:])[0], atol=1e-5)
    two = inpaint((x * mask)[:, :2], mask)[0]
    one = inpaint((x * mask)[:, :1], mask)[0]
    assert torch.allclose(two[:, :1], one, atol=1e-5)


def test_what_does_not_fit_is_refused():
    x, mask = torch.rand(1, 1, 16, 16), torch.ones(16, 16)
    with pytest.raises(ValueError, match="^model: expected one of"):
        inpaint(x, mask, "wiener")
    with pytest.raises(ValueError, match="^mask: expected one value for each pixel"):
        inpaint(x, torch.ones(16, 15))
    with pytest.raises(ValueError, match="^mask: expected known pixels"):
        inpaint(x, torch.zeros(16, 16))
    with pytest.raises(ValueError, match="^input: expected finite numbers where"):
        inpaint(x * torch.nan, mask)
    with pytest.raises(ValueError, match="^input: expected a floating point tensor"):
        inpaint(torch.ones(16, 16), mask)
