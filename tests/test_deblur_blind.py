"""Blind deblurring: the simplex, the kernel step, kernels as pictures, scores up to a shift, the task, its refusals."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from odlkit import data, images
from odlkit.bench.gdc_blind import error_ratio, likeness, packed, unpacked
from odlkit.cli import main
from odlkit.metrics import align, psnr, psnr_up_to_shift
from odlkit.models.blind import D, Settings, Sharpen, centred, inside, kernel_step, pyramid, resized, tidy, to_simplex
from odlkit.operators import Blur, ValidBlur
from odlkit.priors import Lp
from odlkit.problem import LeastSquares, Problem
from odlkit.tasks.deblur_blind import MODELS, deblur_blind
from odlkit.training.kernels import random_kernel

QUICK = Settings(alternations=2, refine=1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shake(n: int = 9, seed: int = 6) -> torch.Tensor:
    """A crooked kernel ``(n, n)`` with its centroid in the middle."""
    return tidy(random_kernel(seeded(seed), n).double(), 0.03, 0.0)


def test_projection_onto_the_simplex_is_the_nearest_point(device, dtype):
    from scipy.optimize import brentq

    for seed in range(4):
        v = torch.randn(5, 7, generator=seeded(seed), dtype=torch.float64)
        shift = brentq(lambda c, v=v: np.maximum(v.numpy() - c, 0).sum() - 1, v.min().item() - 1, v.max().item())
        found = to_simplex(v.to(device, dtype)).cpu().double()
        assert torch.allclose(found, (v - shift).clamp_min(0), atol=1e-9 if dtype == torch.float64 else 1e-5)
        assert abs(found.sum().item() - 1) < 1e-5 and found.min() >= 0


def test_a_point_of_the_simplex_stays():
    k = shake()
    assert torch.allclose(to_simplex(k), k, atol=1e-12)


def test_kernel_step_finds_the_true_kernel_from_a_sharp_picture():
    g, k = D.A(data.sample("camera", 64).double()), shake()
    found = kernel_step(g, Blur(k).A(g), torch.full((9, 9), 1 / 81), 0.0, steps=3000)
    assert (found - k).abs().sum() < 0.03 and found.min() >= 0 and abs(found.sum() - 1) < 1e-9


def test_kernel_step_with_a_mask_reads_the_seen_part_only():
    x, k = data.sample("camera", 72).double(), shake()
    d, seen = D.A(Blur(k).A(x)), torch.zeros(1, 1, 72, 72, dtype=torch.bool)
    seen[..., 8:-8, 8:-8] = True
    spoiled = torch.where(inside(seen, 9), d, 0.3 * torch.randn(d.shape, generator=seeded(), dtype=d.dtype))
    start = torch.full((9, 9), 1 / 81)
    good = kernel_step(D.A(x), spoiled, start, 0.0, inside(seen, 9), rounds=20, steps=300)
    bad = kernel_step(D.A(x), spoiled, start, 0.0, steps=3000)
    assert (good - k).abs().sum() < 0.1 < 0.3 < (bad - k).abs().sum()


def test_kernel_step_lowers_the_energy_more_than_the_closed_form_and_its_projection():
    """The projection of the unconstrained solution is not the constrained one."""
    g, k, mu = D.A(data.sample("coins", 48).double()), shake(), 0.5
    y = Blur(k).A(g) + 0.05 * torch.randn(g.shape, generator=seeded(), dtype=g.dtype)

    def energy(kernel):
        return (0.5 * (Blur(kernel).A(g) - y).square().sum() + mu * kernel.square().sum()).item()

    G, Y = torch.fft.rfft2(g), torch.fft.rfft2(y)
    closed = torch.fft.irfft2((G.conj() * Y).sum(1) / (G.abs().square().sum(1) + 2 * mu), s=g.shape[-2:])[0]
    cut = to_simplex(closed.roll((4, 4), (0, 1))[:9, :9])
    assert energy(kernel_step(g, y, cut, mu, steps=2000)) < 0.999 * energy(cut)


def test_variance_of_the_gradients_is_a_penalty_on_the_kernel():
    """White errors e in N pixels' differences: (1/2) E ||k * e||^2 = N error^2 ||k||^2."""
    k, error = shake(), Settings().error
    e = error * torch.randn(1, 2, 256, 256, generator=seeded(), dtype=torch.float64)
    raised = 0.5 * Blur(k).A(e).square().sum()
    assert raised == pytest.approx((256**2 * error**2 * k.square().sum()).item(), rel=0.05)


def test_tidy_drops_dust_and_islands_and_centres():
    k = torch.zeros(11, 11, dtype=torch.float64)
    k[1:5, 2] = 1.0
    k[9, 9], k[2, 3] = 0.05, 0.01  # an island, and dust beside the line
    found = tidy(k, 0.03, 0.03)
    assert int((found > 0).sum()) == 4 and abs(found.sum() - 1) < 1e-12
    row, column = ((found * torch.arange(11.0).view(shape)).sum() for shape in ((-1, 1), (1, -1)))
    assert abs(row - 5) <= 0.5 and abs(column - 5) <= 0.5


def test_resizing_keeps_the_centroid_and_the_pyramid_ends_at_full_size():
    k = shake(15, 2)
    big = resized(k, 21, 2**0.5)
    places = [torch.arange(n, dtype=torch.float64) - n // 2 for n in (15, 21)]
    for axis in (0, 1):
        small_at, big_at = (q.sum(axis) @ p for q, p in zip((k, big), places, strict=True))
        assert abs(big_at - 2**0.5 * small_at) < 0.2
    assert abs(big.sum() - 1) < 1e-12
    levels = pyramid(27)
    assert levels[-1] == (27, 1.0) and levels[0][0] == 3 and all(n % 2 for n, _ in levels)


def test_sharpen_finds_few_edges_and_fills_the_unseen():
    x, k, lam = data.sample("camera", 64).double(), shake(), 2e-3
    z = Blur(k).A(x)
    seen = torch.ones_like(z, dtype=torch.bool)
    seen[..., :6] = False
    broken = torch.where(seen, z, 0.5)
    module = Sharpen(broken, seen, lam)
    problem = Problem(LeastSquares(Blur(k), D.A(broken), 2.0), Lp(0.8, lam))
    g = module(problem, D.A(broken), 0)
    assert torch.equal(torch.where(seen, module.z, 0), torch.where(seen, z, 0))
    assert (module.z - z)[..., :6].square().mean() < 0.95 * (broken - z)[..., :6].square().mean()
    assert (g.abs() < 1e-3).double().mean() > (D.A(z).abs() < 1e-3).double().mean()


def test_scores_do_not_change_with_a_shift():
    x = data.sample("camera", 96)
    y = x + 0.05 * torch.randn(x.shape, generator=seeded())
    moved, better = y.roll((2, -3), (-2, -1)), x + 0.02 * torch.randn(x.shape, generator=seeded(1))
    assert torch.allclose(psnr_up_to_shift(moved, x), psnr(*align(y, x)), atol=1e-6)
    assert error_ratio(moved, better, x) == pytest.approx(error_ratio(y, better.roll((1, 1), (-2, -1)), x), rel=1e-6)
    assert error_ratio(y, better, x, 1.0) == pytest.approx(6.25, rel=0.1)
    half = (x + x.roll(1, -1)) / 2  # moved by half a pixel, and smoothed by that
    assert error_ratio(half, better, x) < 0.7 * error_ratio(half, better, x, 1.0)
    k = shake()
    assert likeness(k, centred(k)) == pytest.approx(1) and likeness(k, k.roll((1, 1), (0, 1))) == pytest.approx(1)
    assert likeness(k, k.mT) < 0.95 and likeness(k, unpacked(packed(k))) > 0.999


def test_a_shaken_scene_comes_back_sharper_with_its_kernel():
    """End to end, small: edges in plenty, a kernel of 9 pixels."""
    kernel = shake(9, 3).float()
    frame = ValidBlur(kernel)
    scene = data.sample("page", (128, 152))
    y, x = frame.A(scene), frame.crop(scene)
    found, told = deblur_blind(y, 11, 0.003)
    assert told["certificate"]["holds"] and told["certificate"]["acceptance_rate"] > 0.5
    assert likeness(torch.tensor(told["kernel"]), kernel) > 0.8
    assert psnr_up_to_shift(found, x) > psnr_up_to_shift(y, x) + 2


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shape", [(1, 1, 37, 50), (1, 3, 46, 33)])
def test_every_model_restores_odd_sizes_in_gray_and_colour(model, shape):
    y = data.sample("astronaut", shape[-2:], gray=shape[1] == 1)
    x, told = deblur_blind(y, 7, model=model, settings=QUICK)
    kernel = torch.tensor(told["kernel"])
    assert x.shape == y.shape and kernel.shape == (7, 7)
    assert abs(kernel.sum() - 1) < 1e-5 and kernel.min() >= 0
    assert told["certificate"]["holds"] is (True if MODELS[model].checked else None)
    assert told["accepted"] + told["rejected"] == told["iterations"] == 2 * len(pyramid(7)) + 1
    json.dumps(told)


def test_bad_input_is_named():
    y = data.sample("camera", 40)
    for arguments, words in (
        ((y, 8), "size: expected an odd number from 3 to half the shorter side, 20, got 8"),
        ((y, 21), "size: expected an odd"),
        ((y, 7, 1.5), "sigma: expected a number in"),
        ((y, 7, None, "sharp"), "model: expected one of gdc, gdc-learned, l0, got 'sharp'"),
        ((torch.cat([y, y]), 7), "input: expected a floating point tensor"),
        ((y * torch.nan, 7), "input: expected finite numbers"),
    ):
        with pytest.raises(ValueError, match=words):
            deblur_blind(*arguments)
    for refused, words in (({"tile": 3}, "tile: expected at least 16"), ({"final": "sharp"}, "model: expected one of")):
        with pytest.raises(ValueError, match=words):
            deblur_blind(y, 7, **refused)


def test_command_line_writes_image_kernel_and_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("odlkit.tasks.deblur_blind.Settings", lambda: QUICK)
    images.write("y.png", data.sample("astronaut", (40, 47), gray=False), images.Picture(torch.zeros(0)))
    for target in ("k.npy", "k.png"):
        words = f"restore deblur-blind y.png --size 7 -o x.png --kernel-out {target} --report r.json"
        assert CliRunner().invoke(main, words.split()).exit_code == 0
        told = json.loads((tmp_path / "r.json").read_text())
        kernel = images.read_kernel(target)
        assert kernel.shape == (7, 7) and likeness(kernel, torch.tensor(told["kernel"])) > 0.999
    for words, expected in (
        ("deblur-blind y.png -o x.png --size 7 --kernel-out k.txt", "kernel_out: expected a file name that ends in .npy"),
        ("deblur-blind y.png -o x.png --kernel k.npy", "kernel: expected no value, the task deblur-blind does not use it"),
        ("smooth y.png -o x.png --kernel-out k.npy", "kernel_out: expected no value"),
    ):
        done = CliRunner().invoke(main, ["restore", *words.split()])
        assert done.exit_code == 2 and expected in done.output
