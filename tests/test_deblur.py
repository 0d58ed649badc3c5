"""Deblurring: the boundary, the gain on photographs, what the report says, and what is refused."""

import json

import pytest
import torch

from odlkit import data, weights
from odlkit.metrics import psnr
from odlkit.operators import Blur, ValidBlur
from odlkit.propagate import PropagationError
from odlkit.tasks import deblur as task
from odlkit.tasks.deblur import MODELS, deblur, estimate_noise, extend, good_size

NETWORKS = {"ipadnet": "padnet-image", "epadnet": "padnet-image", "rpodm": "rpodm-deblur", "podm": "podm-denoiser"}
NETWORKS |= {"gdc": "gdc-deblur-gdc", "gdc-pcm": "gdc-generator"}
NETWORKS |= {"hodl": "hodl-deblur", "hodl-nonexpansive": "hodl-deblur-nonexpansive", "dgunet": "dgunet-known"}
GAIN = dict.fromkeys(("podm", "gdc", "gdc-pcm", "hodl"), 5) | {"hodl-nonexpansive": 2.5, "dgunet": 4}  # in dB; the others 6
UNCHECKED = ("rpodm", "gdc", "hodl", "dgunet")  # no theorem
CLASSICAL = ["tv", "l08", "fista-wavelet"]


def needs(model):
    """Skip where the network of a model is not installed."""
    network = NETWORKS.get(model)
    return pytest.mark.skipif(bool(network) and network not in weights.cards(), reason=f"{network} is not installed")


trained = needs("ipadnet")


def motion(height: int, width: int) -> torch.Tensor:
    """A straight streak from corner to corner."""
    kernel = torch.zeros(height, width)
    for t in torch.linspace(0, 1, 200).tolist():
        kernel[round(t * (height - 1)), round(t * (width - 1))] += 1
    return kernel / kernel.sum()


def photograph(name: str, kernel: torch.Tensor, size: int = 160, sigma: float = 0.01, gray: bool = True):
    """A picture and its blurred, noisy photograph, whose borders show what lies outside the picture too."""
    blur, scene = ValidBlur(kernel), data.sample(name, (size, size + 5), gray)
    x, y = blur.crop(scene), blur.A(scene)
    return x, y + sigma * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(31, 44), (40, 33)])
@pytest.mark.parametrize("kernel", [motion(5, 8), motion(6, 3), torch.ones(1, 1)])
def test_extension_keeps_the_data_and_explains_them(size, kernel, device, dtype):
    scene = data.sample("camera", (80, 80)).to(device, dtype)
    y = ValidBlur(kernel).A(scene)[..., : size[0], : size[1]]
    z, window = extend(y, kernel.to(y))
    assert torch.equal(z[(..., *window)], y) and z.dtype == dtype and z.device.type == device.type
    for side, seen, reach in zip(z.shape[-2:], size, kernel.shape, strict=True):
        assert side == good_size(side) >= seen + reach - 1
    restored = Blur(kernel.to(y)).solve(Blur(kernel.to(y)).A_adjoint(z), 1e-3)  # a periodic model of the whole grid
    fit = (Blur(kernel.to(y)).A(restored) - z)[(..., *window)].square().mean()
    wrapped = Blur(kernel.to(y)).solve(Blur(kernel.to(y)).A_adjoint(y), 1e-3)
    assert kernel.numel() == 1 or fit < 0.5 * (Blur(kernel.to(y)).A(wrapped) - y).square().mean()


def test_good_sizes_are_smooth_multiples_of_eight():
    assert [good_size(n) for n in (1, 8, 9, 49, 57, 105, 337)] == [8, 8, 16, 64, 64, 120, 360]


def test_noise_is_estimated_on_a_blurred_picture():
    _, y = photograph("camera", motion(9, 14), sigma=0.02)
    assert abs(estimate_noise(y) - 0.02) < 0.003
    assert estimate_noise(0 * y) == 0
    assert estimate_noise(torch.cat([y, 0 * y], 1)) == pytest.approx(estimate_noise(y) / 2)
    with pytest.raises(ValueError, match="^input: expected one image"):
        estimate_noise(torch.cat([y, y]))


def test_each_photograph_of_a_batch_has_the_noise_level_of_its_own():
    kernel = motion(5, 8)
    y = torch.cat([photograph("camera", kernel, 64, sigma)[1] for sigma in (0.01, 0.05)])
    x, report = deblur(y, kernel, model="tv")
    parts = [deblur(item, kernel, model="tv") for item in y.split(1)]
    assert torch.equal(x, torch.cat([image for image, _ in parts]))
    assert report["settings"]["sigma"] == [told["settings"]["sigma"] for _, told in parts]
    assert report["settings"]["sigma"][1] > 2 * report["settings"]["sigma"][0] > 0


@pytest.mark.parametrize("model, gain", [pytest.param(name, GAIN.get(name, 6), marks=needs(name)) for name in NETWORKS])
@pytest.mark.parametrize("name", ["camera", "astronaut"])
def test_restoring_gains_six_decibels(name, model, gain):
    """(Less where networks were trained for denoising alone, for much noise, or held to a Lipschitz constant.)"""
    x, y = photograph(name, motion(9, 14), 200)
    restored, report = deblur(y, motion(9, 14), 0.01, model)
    assert psnr(restored, x).item() >= psnr(y, x).item() + gain
    assert report["certificate"]["holds"] is (None if model in UNCHECKED else True)


@trained
@pytest.mark.skipif("levin09_kernels" not in data.available(), reason="ODLKIT_DATA has no levin09_kernels")
def test_restoring_gains_six_decibels_on_measured_kernels():
    gains = []
    for kernel in data.levin_kernels():
        x, y = photograph("coffee", kernel, 160)
        gains.append((psnr(deblur(y, kernel, 0.01)[0], x) - psnr(y, x)).item())
    assert sum(gains) / len(gains) >= 6


@pytest.mark.parametrize("model", [pytest.param(name, marks=needs(name)) for name in MODELS])
def test_every_model_sharpens_and_reports(model, device, report_keys):
    x, y = photograph("astronaut", motion(5, 8), 96)
    restored, report = deblur(y.to(device), motion(5, 8), 0.01, model)
    assert restored.shape == y.shape and restored.device.type == device.type and restored.dtype == y.dtype
    assert psnr(restored.cpu(), x).item() > psnr(y, x).item() + 2
    assert report.keys() >= report_keys and report["task"] == "deblur" and report["model"] == model
    assert report["device"].startswith(device.type) and report["iterations"] >= 1
    assert report["status"] in ("converged", "step limit")
    assert report["certificate"].keys() >= {"guarantee", "statement", "holds", "of"}
    assert "larger periodic grid" in report["certificate"]["of"]
    json.dumps(report, allow_nan=False)
    if model == "ipadnet":
        assert report["energies"] == [] and report["accepted"] is None and report["certificate"]["margin"] > 0
    elif model == "rpodm":
        assert report["energies"] == [] and report["accepted"] is None and report["certificate"]["holds"] is None
        assert restored.min() >= 0 and restored.max() <= 1  # what the box guarantees
    elif model in ("gdc", "hodl", "hodl-nonexpansive", "dgunet"):
        assert report["energies"] == [] and report["accepted"] is None
        assert report["certificate"]["holds"] is (None if model in UNCHECKED else True)
    else:
        assert len(report["energies"]) == report["iterations"] + 1 and report["energies"][-1] < report["energies"][0]


@pytest.mark.parametrize("model", [pytest.param(name, marks=needs(name)) for name in ("epadnet", "podm", "gdc-pcm")])
def test_a_controlled_model_counts_its_decisions_and_descends(model):
    _, y = photograph("camera", motion(5, 8), 96, gray=True)
    _, report = deblur(y, motion(5, 8), 0.01, model, steps=12)
    assert report["accepted"] + report["rejected"] == report["iterations"] <= 12
    assert report["certificate"]["holds"] and report["certificate"]["margin"] >= 0 and report["certificate"]["kappa"] > 0
    assert all(b <= a for a, b in zip(report["energies"], report["energies"][1:], strict=False))


def test_channels_are_restored_each_by_itself():
    _, y = photograph("astronaut", motion(4, 5), 72, gray=False)
    together, _ = deblur(y, motion(4, 5), 0.01, "tv", steps=20)
    alone, _ = deblur(y[:, 1:2], motion(4, 5), 0.01, "tv", steps=20)
    assert torch.allclose(together[:, 1:2], alone, atol=2e-4)  # the fill's stopping rule looks at all channels
    assert not torch.allclose(together[:, :1], together[:, 1:2], atol=1e-2)


@pytest.mark.parametrize("kernel", [motion(5, 8), motion(8, 5), motion(7, 7), torch.ones(1, 1), motion(5, 5) * 17])
def test_circular_data_are_restored_on_their_own_grid(kernel):
    x = data.sample("camera", (57, 63))
    y = Blur(kernel / kernel.sum()).A(x)
    y = y + 0.002 * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    restored, report = deblur(y, kernel, 0.003, "tv", "circular")
    assert psnr(restored, x) > min(psnr(y, x).item() + 6, 38)
    assert "of" not in report["certificate"] and bool(report["notes"]) == (kernel.sum() > 2)


@trained
def test_tiles_agree_with_the_whole():
    x, y = photograph("camera", motion(5, 8), 150)
    whole, _ = deblur(y, motion(5, 8), 0.01)
    tiled, report = deblur(y, motion(5, 8), 0.01, tile=80)
    assert report["certificate"]["runs"] == 4
    assert psnr(tiled, whole) > 40 and psnr(tiled, x) > psnr(whole, x) - 0.2


@trained
def test_the_blow_up_of_a_network_is_an_error(monkeypatch):
    monkeypatch.setattr(task.weights, "load", lambda name: _Exploding())
    _, y = photograph("camera", motion(5, 8), 64)
    with pytest.raises(PropagationError, match="diverged|not finite"):
        deblur(y, motion(5, 8), 0.01)


class _Exploding(torch.nn.Module):
    def forward(self, v, alpha):
        return 1e5 * v


@trained
def test_certificate_fails_for_a_network_beyond_its_bound(monkeypatch):
    class Pushing(torch.nn.Module):
        def forward(self, v, alpha):
            return v + 10 * alpha

    monkeypatch.setattr(task.weights, "load", lambda name: Pushing())
    _, y = photograph("camera", motion(5, 8), 64)
    assert deblur(y, motion(5, 8), 0.01)[1]["certificate"]["holds"] is False


NAN, SMALL = float("nan"), torch.full((3, 3), 1 / 9)
BAD = {
    "input: .* finite": (torch.full((1, 1, 20, 20), NAN), SMALL, {}),
    "input: .* floating": (torch.zeros(1, 1, 20, 20, dtype=torch.uint8), SMALL, {}),
    "input: expected a": (torch.zeros(20, 20), SMALL, {}),
    "kernel: .* no larger": (torch.zeros(1, 1, 20, 20), torch.ones(21, 3), {}),
    "kernel: .* positive sum": (torch.zeros(1, 1, 20, 20), -SMALL, {}),
    "kernel: .*sum of 0": (torch.zeros(1, 1, 20, 20), 0 * SMALL, {}),
    "kernel: .* finite": (torch.zeros(1, 1, 20, 20), SMALL * NAN, {}),
    "kernel: .* two-dim": (torch.zeros(1, 1, 20, 20), SMALL[None], {}),
    "sigma: .* got -0.1": (torch.zeros(1, 1, 20, 20), SMALL, {"sigma": -0.1}),
    "sigma: .* got nan": (torch.zeros(1, 1, 20, 20), SMALL, {"sigma": NAN}),
    "sigma: .* got 2.55": (torch.zeros(1, 1, 20, 20), SMALL, {"sigma": 2.55}),
    "model: .* got 'none'": (torch.zeros(1, 1, 20, 20), SMALL, {"model": "none"}),
    "boundary: .* got 'zero'": (torch.zeros(1, 1, 20, 20), SMALL, {"boundary": "zero"}),
    "tile: .* got 3": (torch.zeros(1, 1, 20, 20), SMALL, {"tile": 3}),
    **{f"boundary: {model}": (torch.zeros(1, 1, 20, 20), SMALL, {"sigma": 0.1, "model": model, "boundary": "circular"})
       for model in ("fista-wavelet", "podm")},
    "boundary: rpodm": (torch.zeros(1, 1, 8, 20), SMALL, {"sigma": 0.1, "model": "rpodm", "boundary": "circular"}),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    y, kernel, arguments = BAD[message]
    if NETWORKS.get(arguments.get("model"), "padnet-image") not in weights.cards():
        pytest.skip("its network is not installed")
    with pytest.raises(ValueError, match=f"^{message}"):
        deblur(y, kernel, **arguments)


def test_degenerate_pictures_come_back_finite():
    for y in (torch.zeros(1, 1, 3, 3), torch.ones(1, 1, 5, 40), torch.full((1, 3, 9, 4), 0.5)):
        for model in [name for name in MODELS if NETWORKS.get(name, "") in {"", *weights.cards()}]:
            restored, _ = deblur(y, SMALL, 0.01, model, steps=8)
            assert restored.shape == y.shape and (restored - y).abs().max() < 0.3


def test_weights_are_checked(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="^weights: expected one of"):
        weights.load("no-such-network")
    with pytest.raises(ValueError, match="^weights: expected one of"):
        weights.load("../registry")
    for name, card in weights.cards().items():
        assert sum(p.numel() for p in weights.load(name).parameters()) == card["parameters"]
        (tmp_path / f"{name}.json").write_text(json.dumps(card))
        (tmp_path / f"{name}.safetensors").write_bytes((weights.FOLDER / f"{name}.safetensors").read_bytes() + b" ")
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="SHA-256"):
            patch.setattr(weights, "FOLDER", tmp_path)
            weights.load(name)


def test_the_first_model_is_the_default():
    assert next(iter(MODELS)) == "ipadnet" == deblur.__defaults__[2]
