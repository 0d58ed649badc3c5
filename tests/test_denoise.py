"""Denoising: the noise of a camera as physics has it, pairs kept apart, the task with all its models, and its suites."""

import json

import pytest
import torch
from click.testing import CliRunner

from odlkit import data, weights
from odlkit.bench import dgunet_denoise as bench
from odlkit.cli import main
from odlkit.metrics import psnr
from odlkit.priors import TV
from odlkit.tasks.deblur import estimate_noise
from odlkit.tasks.denoise import MARGIN, MODELS, TV_FACTOR, TV_TOLERANCE, denoise
from odlkit.training import camera

NETWORKS = {"dgunet": "dgunet-denoise", "network": "podm-denoiser"}
HERE = {"polyu_subset", "cc15_subset"} <= set(data.available())


def named(name: str):
    network = NETWORKS.get(name)
    missing = network is not None and network not in weights.cards()
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=f"{network} is not installed"))


ALL = [named(name) for name in MODELS]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def white(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=seeded())


def photograph(channels: int = 3, size: tuple[int, int] = (96, 112)) -> torch.Tensor:
    return data.sample("astronaut" if channels == 3 else "camera", size, gray=channels == 1)


# The noise of a camera.


def test_the_two_curves_are_inverse_and_light_is_darker_than_what_is_displayed(dtype):
    x = torch.linspace(0, 1, 1001, dtype=dtype)
    light = camera.linear(x)
    assert (camera.display(light) - x).abs().max() < (1e-7 if dtype == torch.float64 else 1e-5)
    assert (light <= x).all() and light[0] == 0 and abs(light[-1] - 1) < 1e-6 and (light.diff() > 0).all()


@pytest.mark.parametrize("width", [0.05, 0.7, 1.5])
def test_spread_noise_keeps_its_variance_and_is_correlated_as_two_gaussians_overlap(width):
    noise = camera.spread(white(4, 3, 200, 200), width)
    found = camera.statistics(noise)
    assert found["level"] == pytest.approx(1, abs=0.03) and abs(found["colour"]) < 0.02
    for d, key in ((1, "near"), (2, "far")):  # the autocorrelation of a Gaussian kernel, by its sampled values
        t = torch.arange(-9.0, 10.0)
        k = torch.exp(-0.5 * (t / width) ** 2)
        assert found[key] == pytest.approx((k[d:] @ k[:-d] / (k @ k)).item(), abs=0.02)


def test_statistics_see_what_the_channels_share():
    own, shared = white(2, 3, 128, 128), torch.randn(2, 1, 128, 128, generator=seeded(1))
    assert camera.statistics(0.5**0.5 * (own + shared))["colour"] == pytest.approx(0.5, abs=0.03)
    assert camera.statistics(own)["near"] == pytest.approx(0, abs=0.02)


def test_in_light_the_variance_grows_with_the_signal_and_on_display_the_shadows_are_noisiest():
    """Shot noise; two flat pictures by the same draws differ in nothing else."""
    levels = {}
    for value in (0.2, 0.4, 0.8):
        x = torch.full((1, 3, 96, 96), value)
        noisy = torch.cat([camera.camera_noise(x, seeded(i)) for i in range(24)])
        light = camera.linear(noisy) - camera.linear(x)
        levels[value] = light.var((1, 2, 3)).mean().item(), (noisy - x).var((1, 2, 3)).mean().item()
    assert levels[0.2][0] < levels[0.4][0] < levels[0.8][0]
    light = {value: camera.linear(torch.tensor(value)).item() for value in levels}
    slopes = [(levels[b][0] - levels[a][0]) / (light[b] - light[a]) for a, b in ((0.2, 0.4), (0.4, 0.8))]
    assert slopes[0] == pytest.approx(slopes[1], rel=0.1)  # affine in the light
    assert levels[0.2][1] > levels[0.8][1]


def test_compression_without_loss_of_much_and_with_less_colour_than_light():
    x = photograph(size=(64, 64))
    fine, coarse = camera.compressed(x, 95, 0), camera.compressed(x, 30, 2)
    assert fine.shape == x.shape and psnr(fine, x) > psnr(coarse, x) + 5
    noise = 0.1 * white(1, 3, 64, 64)
    chroma = lambda z: (z - z.mean(1, keepdim=True)).var().item()  # noqa: E731
    half, full = (camera.compressed((x + noise).clamp(0, 1), 95, s) - x for s in (2, 0))
    assert chroma(half) < 0.6 * chroma(full)


def test_camera_noise_is_repeatable_and_differs_from_item_to_item():
    x = photograph(size=(48, 48)).repeat(3, 1, 1, 1)
    y = camera.camera_noise(x, seeded())
    assert torch.equal(y, camera.camera_noise(x, seeded())) and not torch.equal(y, camera.camera_noise(x, seeded(1)))
    errors = (y - x).square().mean((1, 2, 3)).sqrt()
    assert len(set(errors.tolist())) == 3 and y.min() >= 0 and y.max() <= 1


# Pairs and patches.


@pytest.mark.skipif(not HERE, reason="ODLKIT_DATA has no real pairs")
def test_cameras_and_scenes_of_the_test_pairs_are_not_trained_on():
    seen, tested = (
        [pair for name in ("polyu_subset", "cc15_subset") for pair in camera.real_pairs(name, test)]
        for test in (False, True)
    )
    assert len(seen) == 13 and len(tested) == 12
    brands = {pair.name.split("_")[0].lower() for pair in seen}
    assert brands == {"canon5d2", "canon600d", "canon80d", "sony"}
    assert not brands & {pair.name.split("_")[0].lower() for pair in tested}
    for pair in seen + tested:
        assert pair.clean.shape == pair.noisy.shape and 25 < psnr(pair.noisy, pair.clean) < 45
    small = [torch.nn.functional.avg_pool2d(pair.clean, 16).flatten() for pair in seen + tested]
    alike = torch.corrcoef(torch.stack(small))[: len(seen), len(seen) :]
    assert alike.max() < 0.9  # no tested frame is a trained one


@pytest.mark.skipif(
    not HERE or not {"train400", "set14", "set5", "lol", "sots_indoor", "sots_outdoor"} <= set(data.available()),
    reason="ODLKIT_DATA lacks training pictures",
)
def test_the_mixture_has_its_parts_and_leaves_out_what_is_tested():
    mixture = camera.Mixture()
    x, y = mixture(seeded())
    assert x.shape == y.shape == (8, 3, camera.SIDE, camera.SIDE)
    assert torch.equal(x[-1, 0], x[-1, 1]) and torch.equal(y[-1, 0], y[-1, 2]) and not torch.equal(x[0, 0], x[0, 1])
    assert not {pair.name for pair in camera.real_pairs("polyu_subset", True)} & set(camera.HELD)
    assert len(mixture.pairs) == 11 and len(mixture.to_validate()) == 6
    baboon = data.image(next(p for p in data.files("set14") if p.stem == "baboon"))
    assert not any(z.shape == baboon.shape and torch.equal(z, baboon) for z in mixture.colour)


# The task.


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("channels", [1, 3])
def test_noise_goes_and_the_report_is_whole(name, channels, report_keys):
    x = photograph(channels, (91, 110))
    y = x + 0.1 * white(*x.shape)
    restored, report = denoise(y, 0.1, name)
    assert restored.shape == y.shape and psnr(restored, x) > psnr(y, x) + 3
    assert set(report) >= report_keys and report["task"] == "denoise"
    assert report["certificate"]["holds"] is (True if name == "tv" else None)
    json.dumps(report)


@pytest.mark.parametrize("name", ALL)
def test_items_of_a_batch_do_not_meet(name):
    x = photograph(3, (48, 56)).repeat(2, 1, 1, 1)
    y = x + 0.1 * white(*x.shape)
    together = denoise(y, 0.1, name)[0]
    alone = torch.cat([denoise(item, 0.1, name)[0] for item in y.split(1)])
    assert (together - alone).abs().max() < (0.01 if name == "tv" else 1e-4)  # tv stops when the whole batch is near
    both = torch.cat([x[:1] + 0.05 * white(1, 3, 48, 56), y[1:]])
    found, report = denoise(both, None, name)
    parts = [denoise(item, None, name) for item in both.split(1)]
    assert (found - torch.cat([image for image, _ in parts])).abs().max() < 1e-4  # each at the level of its own
    levels = [told["settings"]["sigma"] for _, told in parts]
    assert report["settings"]["sigma"] == (None if name == "dgunet" else levels)


@pytest.mark.parametrize("name", ALL)
def test_tiles_leave_no_seam(name):
    x = photograph(1, (176, 200))
    y = x + 0.08 * white(*x.shape)
    whole, tiles = (denoise(y, 0.08, name, tile=tile)[0] for tile in (None, 64))
    error = (whole - tiles).abs()
    # attention and BayesShrink look at the whole square, so tiles differ a little; no line of pixels more than others
    assert error.mean() < 0.02
    jumps = (tiles - whole).diff(dim=-1).abs().mean((0, 1, 2))
    assert jumps.max() < 6 * jumps.mean() + 2e-3


def test_total_variation_is_as_near_the_minimiser_as_it_says():
    x = photograph(1, (40, 44))
    y = x + 0.1 * white(*x.shape)
    z = torch.nn.functional.pad(y, 4 * [MARGIN], mode="replicate").double()
    exact = TV(TV_FACTOR * 0.1, tol=1e-7, max_iter=100_000).prox(z, 1.0)[..., MARGIN:-MARGIN, MARGIN:-MARGIN]
    found = denoise(y, 0.1, "tv")[0]
    rms = lambda t: t.square().mean().sqrt().item()  # noqa: E731
    assert rms(found - exact) <= 1.2 * TV_TOLERANCE < 0.05 * rms(y - exact)  # and the bound says something
    dark = denoise(0.01 * y, 0.001, "tv")[0]  # the tolerance does not depend on the brightness
    assert rms(dark - 0.01 * exact) <= 1.2 * TV_TOLERANCE


def test_the_level_of_white_noise_is_estimated_and_that_of_a_camera_is_not():
    flat = torch.full((1, 3, 128, 128), 0.5)
    noise = 0.05 * white(1, 3, 128, 128)
    assert estimate_noise(flat + noise) == pytest.approx(0.05, rel=0.05)
    assert estimate_noise(flat + camera.spread(noise, 0.8)) < 0.02
    _, report = denoise(flat + noise, None, "wavelet")
    assert "sigma" in report["notes"][0] and report["settings"]["sigma"] == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize("name", ALL[:1])
def test_the_network_needs_no_level_and_says_that_a_given_one_is_not_used(name):
    y = photograph(3, (40, 48)) + 0.1 * white(1, 3, 40, 48)
    (told, first), (untold, second) = (denoise(y, sigma, name) for sigma in (0.3, None))
    assert torch.equal(told, untold) and "not used" in first["notes"][0] and not second["notes"]


@pytest.mark.parametrize("name", ALL[:1])
def test_the_network_removes_the_noise_of_a_camera_and_costs_a_clean_picture_its_finest_texture(name):
    """A fur as fine and as weak as the noise: little is gained, and a clean picture is not left as it is."""
    x = data.sample("chelsea", gray=False)[..., 60:220, 120:280]
    for seed in (0, 1, 4):
        noisy = camera.camera_noise(x, seeded(seed))
        assert psnr(denoise(noisy)[0], x) > psnr(noisy, x) + 0.3
    assert 34 < psnr(denoise(x)[0], x) < 45


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "bm3d"}, "model: expected one of dgunet"),
        ({"y": torch.rand(1, 2, 32, 32)}, "input: expected a floating point tensor"),
        ({"y": torch.rand(3, 32, 32)}, "input: expected a floating point tensor"),
        ({"y": torch.full((1, 1, 32, 32), torch.nan)}, "input: expected finite numbers"),
        ({"sigma": 25.0}, "sigma: expected a number in"),
        ({"tile": 8}, "tile: expected at least 16"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        denoise(**{"y": torch.rand(1, 1, 32, 32), "model": "tv"} | change)


def test_from_the_command_line(tmp_path):
    from PIL import Image

    y = (photograph(3, (40, 48)) + 0.1 * white(1, 3, 40, 48)).clamp(0, 1)
    Image.fromarray((255 * y[0].permute(1, 2, 0)).byte().numpy()).save(tmp_path / "noisy.png")
    words = ["restore", "denoise", str(tmp_path / "noisy.png"), "--model", "tv", "-o", str(tmp_path / "clean.png")]
    done = CliRunner().invoke(main, [*words, "--tile", "32"])
    assert done.exit_code == 0, done.output
    assert Image.open(tmp_path / "clean.png").size == (48, 40)
    assert CliRunner().invoke(main, [*words, "--sigma", "2"]).exit_code == 2


# The suites.


def test_a_suite_s_summary_counts_gains_picture_by_picture():
    row = bench.summary([(30.0, 0.9), (36.0, 0.8)], [(28.0, 0.5), (31.0, 0.5)])
    assert row == {"psnr": 33.0, "ssim": 0.85, "gain": 3.5, "gain_spread": pytest.approx(2.12), "least_gain": 2.0}


@pytest.mark.skipif(not HERE, reason="ODLKIT_DATA has no real pairs")
def test_the_best_level_of_a_suite_is_never_below_the_estimated_one(monkeypatch):
    monkeypatch.setattr(bench, "real", lambda name: camera.real_pairs(name, True)[:2])
    rows = bench.real_rows({"shrunk": lambda y, sigma: (1 - sigma) * y}, False, False)
    found = {(row["data"], row["method"], row["level"]): row for row in rows}
    for name in (*bench.REAL, "both"):
        assert found[name, "noisy", None]["gain"] == 0
        assert found[name, "shrunk", "best"]["psnr"] >= found[name, "shrunk", "estimated"]["psnr"]
    assert found["both", "noisy", None]["pairs"] == 4
