"""Haze: its formation, airlight, the guidance as a bound, the dark channel prior, reports, refusals, training."""

import json
from functools import partial

import pytest
import torch
from torch import nn

from odlkit import data, weights
from odlkit.tasks.dehaze import (
    CUBE,
    KEPT,
    MODELS,
    airlight,
    dark_channel,
    dark_prior,
    dehaze,
    guidance,
    guided_filter,
    haze,
    highest,
    radiance,
    seeing,
    transmission_problem,
)
from odlkit.training import haze as training

NAMES = [name for name in MODELS if name != "ipadnet" or "padnet-haze" in weights.cards()]
LIGHT = torch.tensor([0.85, 0.9, 0.95], dtype=torch.float64).view(1, 3, 1, 1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def colourful(height: int, width: int, low: float = CUBE[0]) -> torch.Tensor:
    """A scene ``(2, 3, H, W)`` of independent pixels from ``low`` to 1."""
    return low + (1 - low) * torch.rand(2, 3, height, width, generator=seeded(), dtype=torch.float64)


def test_radiance_inverts_the_formation_of_haze_above_the_floor(device, dtype):
    """Eq: PADNet (17)."""
    scene, t = colourful(9, 14).to(device, dtype), torch.rand(2, 1, 9, 14, generator=seeded(1)).to(device, dtype)
    light = LIGHT.to(device, dtype)
    seen = haze(scene, 0.1 + 0.9 * t, light)
    found = radiance(seen, 0.1 + 0.9 * t, light)
    assert found.dtype == dtype and torch.allclose(found, scene, atol=1e-9 if dtype == torch.float64 else 1e-4)
    thick = radiance(haze(scene, 0.02 * torch.ones_like(t), light), 0.02 * torch.ones_like(t), light)
    assert torch.allclose(thick, (0.2 * scene + 0.8 * light).clamp(0, 1), atol=1e-4)  # 0.02 / 0.1 of the contrast


def test_the_fidelity_is_half_the_squared_distance_to_the_guidance():
    """Eq: PADNet (18)."""
    g, t = (torch.rand(2, 1, 5, 6, generator=seeded(i), dtype=torch.float64) for i in range(2))
    f = transmission_problem(g).fidelity
    assert torch.allclose(f.value(t), (t - g).square().sum((1, 2, 3)) / 2)
    assert torch.allclose(f.prox(t, 0.25), (g + 4 * t) / 5)  # (g + rho v) / (1 + rho) with rho = 4


def test_the_guidance_is_a_lower_bound_for_scenes_in_the_cube_and_none_for_darker_ones():
    t = 0.1 + 0.9 * torch.rand(2, 1, 21, 30, generator=seeded(1), dtype=torch.float64)
    seen = haze(colourful(21, 30), t, LIGHT)
    assert (guidance(seen, LIGHT, 1) <= t + 1e-12).all()  # pixel by pixel, any transmission
    closed = -highest(-highest(t, 3), 3)
    assert (guidance(seen, LIGHT) <= closed + 1e-12).all() and (guidance(seen, LIGHT) >= guidance(seen, LIGHT, 1)).all()
    assert (guidance(haze(colourful(21, 30), t * 0 + 0.4, LIGHT), LIGHT) <= 0.4 + 1e-12).all()
    dark = haze(colourful(21, 30, low=0.0), t, LIGHT)
    assert (guidance(dark, LIGHT, 1) > t + 0.01).any()  # the control: a scene that leaves the cube


def test_the_guidance_is_the_least_transmission_whose_scene_is_in_the_cube():
    seen = haze(colourful(8, 9), 0.6 * torch.ones(2, 1, 8, 9, dtype=torch.float64), LIGHT)
    bound = guidance(seen, LIGHT, 1)
    for t, inside in ((bound, True), (0.99 * bound, False)):
        scene = (seen - LIGHT) / t + LIGHT
        within = ((scene >= CUBE[0] - 1e-9) & (scene <= CUBE[1] + 1e-9)).all(1)
        assert within.all() if inside else not within.any()


def test_the_airlight_is_found_where_the_haze_is_opaque_and_stays_above_its_least():
    scene, t = colourful(60, 80), torch.full((2, 1, 60, 80), 0.7, dtype=torch.float64)
    t[..., :24, :] = 0
    scene[..., 40, 40] = 1  # a white spot outside the sky is brighter than A; its dark channel is not
    assert torch.allclose(airlight(haze(scene, t, LIGHT)), LIGHT.expand(2, -1, -1, -1), atol=1e-12)
    assert (airlight(haze(scene, t * 0 + 0.7, LIGHT)) - LIGHT).abs().max() > 0.01  # the control: no opaque part
    assert (airlight(torch.zeros(1, 3, 5, 4)) == 0.2).all()


def test_the_dark_channel_prior_is_exact_where_the_dark_channel_is_nought():
    scene = colourful(33, 20)
    scene[:, 1] = 0  # one channel is dark everywhere
    assert dark_channel(scene).abs().max() == 0
    t = torch.full((2, 1, 33, 20), 0.35, dtype=torch.float64)
    assert torch.allclose(dark_prior(haze(scene, t, LIGHT), LIGHT), 1 - KEPT * (1 - t))
    white = torch.ones(1, 3, 33, 20, dtype=torch.float64)  # the control: a white wall is taken for haze
    assert (dark_prior(haze(white, t[:1], LIGHT), LIGHT) < 0.2).all()


def test_windows_are_cut_off_at_the_border_and_equal_brute_force():
    x = torch.rand(1, 1, 7, 9, generator=seeded())
    brute = torch.stack([
        torch.stack([x[0, 0, max(i - 2, 0) : i + 3, max(j - 2, 0) : j + 3].max() for j in range(9)]) for i in range(7)
    ])  # fmt: skip
    assert torch.equal(highest(x, 5)[0, 0], brute)


def test_the_guided_filter_keeps_what_is_affine_in_its_guide():
    guide = torch.rand(1, 1, 40, 50, generator=seeded(), dtype=torch.float64)
    x = 0.3 * guide + 0.2
    assert torch.allclose(guided_filter(guide, x, 5, 1e-12), x, atol=1e-9)
    assert torch.allclose(guided_filter(guide, 0 * x + 0.4, 5), 0 * x + 0.4)
    noise = torch.rand(1, 1, 40, 50, generator=seeded(1), dtype=torch.float64)
    assert guided_filter(torch.zeros_like(guide), noise, 5).std() < 0.2 * noise.std()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 3, 33, 47), (2, 1, 20, 31), (1, 3, 3, 5)])
def test_any_size_gray_or_colour_and_the_report_is_whole(name, shape, report_keys):
    scene = torch.rand(shape, generator=seeded())
    seen = haze(scene, torch.full((shape[0], 1, *shape[2:]), 0.5), torch.full((1, 1, 1, 1), 0.9))
    x, told = dehaze(seen, name)
    assert x.shape == seen.shape and x.dtype == seen.dtype and x.min() >= 0 and x.max() <= 1
    assert set(told) >= report_keys and len(told["airlight"]) == shape[0]
    assert bool(told["notes"]) == (shape[1] == 1)
    assert told["certificate"]["holds"] is (True if name == "ipadnet" else None)
    json.dumps(told)


@pytest.mark.parametrize("name", NAMES)
def test_each_picture_of_a_batch_is_dehazed_by_itself(name):
    scene = torch.stack([data.sample("coffee", 48, gray=False)[0], data.sample("chelsea", 48, gray=False)[0]])
    t, light = torch.tensor([0.4, 0.8]).view(2, 1, 1, 1), torch.tensor([0.8, 0.95]).view(2, 1, 1, 1)
    seen = haze(scene, t, light)
    both = dehaze(seen, name)[0]
    alone = torch.cat([dehaze(item, name)[0] for item in seen.split(1)])
    assert torch.allclose(both, alone, atol=1e-5)


def test_bad_input_is_named():
    y = torch.rand(1, 3, 16, 16)
    with pytest.raises(ValueError, match="model: expected one of ipadnet, dcp, guidance"):
        dehaze(y, "magic")
    for wrong in (y[0], y[:, :2], (255 * y).to(torch.uint8)):
        with pytest.raises(ValueError, match="input: expected a floating point tensor"):
            dehaze(wrong, "dcp")
    with pytest.raises(ValueError, match="input: expected finite numbers"):
        dehaze(y * float("nan"), "dcp")


# The network and its training.


@pytest.fixture
def few_pictures(monkeypatch):
    scenes = [data.sample(name, 160, gray=False) for name in ("coffee", "chelsea")]
    monkeypatch.setattr(training, "pictures", lambda: (scenes, scenes[:1]))


def test_the_recipe_makes_seventeen_convolutions_that_leave_the_picture_alone(tmp_path, few_pictures, monkeypatch):
    """And says so in a card."""
    monkeypatch.setattr(training, "greedy", partial(training.greedy, steps=2))
    training.joint(tmp_path, steps=2, width=4)
    card = json.loads((tmp_path / "padnet-haze.json").read_text())
    assert card["network"]["units"][0]["depth"] == 17 and card["network"]["units"][0]["channels"] == 4
    net = training.greedy(tmp_path, resume=True, width=4)
    assert sum(isinstance(part, nn.Conv2d) for part in net.modules()) == 17
    x = torch.rand(2, 4, 19, 22, generator=seeded())
    out = net(x, 0.3)
    assert torch.equal(out[:, 1:], x[:, 1:]) and not torch.equal(out[:, :1], x[:, :1])


@pytest.mark.skipif("padnet-haze" not in weights.cards(), reason="the weights are not installed")
def test_the_shipped_network_has_the_papers_count_and_meets_condition_2():
    card, net = weights.card("padnet-haze"), weights.load("padnet-haze")
    assert sum(isinstance(part, nn.Conv2d) for part in net.modules()) == 17
    assert "cbsd68" in card["data"].lower() and "sots" not in card["data"].lower()
    v = 5 * torch.randn(2, 1, 24, 28, generator=seeded())
    picture = torch.rand(2, 3, 24, 28, generator=seeded(1))
    for alpha in (0.5, 0.01):
        move = (seeing(net, picture)(v, alpha) - v).flatten(1).norm(dim=1)
        assert (move <= card["network"]["bound"] * alpha * (4 * v[0].numel()) ** 0.5 * (1 + 1e-5)).all() and (move > 0).all()


def test_synthetic_haze_has_the_ranges_that_its_docstring_says():
    scene = torch.cat([data.sample(name, 64, gray=False) for name in ("coffee", "chelsea", "rocket", "astronaut")])
    depth = training.depths(scene, seeded())
    assert (depth.amin((1, 2, 3)) == 0).all() and torch.allclose(depth.amax((1, 2, 3)), torch.ones(4))
    seen, t, light = training.hazy_scenes(scene, seeded(1))
    assert seen.shape == scene.shape and t.shape == (4, 1, 64, 64) and light.shape == (4, 3, 1, 1)
    assert seen.min() >= 0 and seen.max() <= 1 and t.min() >= 0.5 * 0.15 and t.max() <= 1 and light.min() >= 0.5
    again = training.hazy_scenes(scene, seeded(1))
    assert all(torch.equal(a, b) for a, b in zip((seen, t, light), again, strict=True))
    assert not torch.equal(training.hazy_scenes(scene, seeded(2))[1], t)
    true = radiance(seen, t, light)
    assert (true - scene).abs().mean() < 0.5 * (seen - scene).abs().mean()  # the airlight it tells is off, but not by much


def test_depths_follow_the_edges_of_the_picture():
    """The segments: a depth jumps more often where the picture does."""
    scene = torch.full((64, 3, 32, 32), 0.2)
    scene[..., 16:] = torch.rand(64, 3, 1, 1, generator=seeded())
    jumps = (training.depths(scene, seeded(1)).diff(dim=-1)).abs().mean((0, 1, 2))
    assert jumps[12:19].max() > 2 * jumps.median()
