"""Denoising: real pairs of cameras and scenes that training never saw, and Gaussian noise on BSD; DGUNet and its rivals.

The rivals want a noise level.  They get the one that is estimated from the picture, and, which no user can have, the best
of that one and of one, two and three times the true standard deviation, judged by the truth: the noise of a camera is not
white, and methods for white noise need a larger level to see it.
"""

from __future__ import annotations

import statistics as stats
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from odlkit import data
from odlkit.bench import each, provenance
from odlkit.images import centre
from odlkit.metrics import psnr, ssim
from odlkit.tasks.deblur import estimate_noise
from odlkit.tasks.denoise import denoise
from odlkit.training import camera

SIDE, EVERY = 160, 2  # of the centres that are scored; every second picture of BSD
LEVELS = (15, 25, 50)  # of Gaussian noise, in 1/255
REAL = ("polyu_subset", "cc15_subset")
BSD = {"bsd68": 1, "cbsd68": 3}
LITERATURE = {  # the averages over whole pictures that Table II of DnCNN (Zhang et al., 2017) prints
    15: {"BM3D": 31.07, "DnCNN-B": 31.61},
    25: {"BM3D": 28.57, "DnCNN-B": 29.16},
    50: {"BM3D": 25.62, "DnCNN-B": 26.23},
}
TABLE_3 = {
    "SIDD": {"DGUNet": [39.88, 0.959], "BM3D": [25.65, 0.685]},
    "DND": {"DGUNet": [40.04, 0.956], "BM3D": [34.51, 0.851]},
}


def bm3d(y: Tensor, sigma: float) -> Tensor:
    """BM3D of Makinen, Azzari and Foi, in the colours of its authors, for ``(1, 1 or 3, H, W)``; needs ``pip install bm3d``.

    A dependency of one suite only, under a licence for research without profit, so no extra of odlkit installs it.
    """
    from bm3d import bm3d as gray
    from bm3d import bm3d_rgb

    z = y[0].permute(1, 2, 0).numpy()
    x = bm3d_rgb(z, sigma) if z.shape[2] == 3 else gray(z[..., 0], sigma)[..., None]
    return torch.as_tensor(x, dtype=y.dtype).permute(2, 0, 1)[None]


def _task(model: str, y: Tensor, sigma: float) -> Tensor:
    return denoise(y, sigma, model)[0]


Method = Callable[[Tensor, float], Tensor]
CLASSICAL: dict[str, Method] = {name: partial(_task, name) for name in ("tv", "wavelet", "network")} | {"bm3d": bm3d}


def real(name: str) -> list[camera.Pair]:
    """The centres of the test pairs of a set."""
    return [camera.Pair(p.name, centre(p.clean, SIDE), centre(p.noisy, SIDE)) for p in camera.real_pairs(name, test=True)]


def gaussian(name: str) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """``(level, image, x, y)`` for the centres of every second picture, the noise of picture i from seed i, unclipped."""
    pictures = data.images(name, gray=BSD[name] == 1)[::EVERY]
    for level in LEVELS:
        for i, picture in enumerate(pictures):
            x = centre(picture, SIDE)
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
            yield level, i, x, x + level / 255 * noise


def scores(x: Tensor, truth: Tensor) -> tuple[float, float]:
    """PSNR and SSIM of what a file would hold, without rounding."""
    x = x.clamp(0, 1)
    return psnr(x, truth).item(), ssim(x, truth).item()


def summary(found: list[tuple[float, float]], before: list[tuple[float, float]]) -> dict[str, Any]:
    """Mean PSNR and SSIM, the mean gain over ``before``, its spread over the pictures and its least."""
    gains = [a[0] - b[0] for a, b in zip(found, before, strict=True)]
    return {
        "psnr": round(stats.mean(a[0] for a in found), 2),
        "ssim": round(stats.mean(a[1] for a in found), 3),
        "gain": round(stats.mean(gains), 2),
        "gain_spread": round(stats.stdev(gains), 2),
        "least_gain": round(min(gains), 2),
    }


def real_rows(methods: dict[str, Method], blind: bool, progress: bool) -> list[dict[str, Any]]:
    """For each set and both together, a row for each method; those that are not ``blind`` with estimated and best level."""
    table: dict[tuple[str, str, str | None], list[tuple[float, float]]] = {}
    for name in REAL:
        for pair in each(real(name), name, progress):
            true, estimated = (pair.noisy - pair.clean).std().item(), estimate_noise(pair.noisy)
            rows: dict[tuple[str, str | None], tuple[float, float]] = {("noisy", None): scores(pair.noisy, pair.clean)}
            for method, run in methods.items():
                levels = (estimated,) if blind else (estimated, true, 2 * true, 3 * true)
                tried = [scores(run(pair.noisy, level), pair.clean) for level in levels]
                rows[method, None if blind else "estimated"] = tried[0]
                if not blind:
                    rows[method, "best"] = max(tried)
            for (method, level), score in rows.items():
                for place in (name, "both"):
                    table.setdefault((place, method, level), []).append(score)
    return [
        {"data": place, "method": method, "level": level, "pairs": len(found)} | summary(found, table[place, "noisy", None])
        for (place, method, level), found in sorted(table.items(), key=lambda item: (*REAL, "both").index(item[0][0]))
    ]


def gaussian_rows(methods: dict[str, Method], progress: bool) -> list[dict[str, Any]]:
    """Mean PSNR for each set, level and method, which is told the level."""
    table: dict[tuple[str, int, str], list[float]] = {}
    for name in BSD:
        for level, _, x, y in each(gaussian(name), name, progress, 34 * len(LEVELS)):
            for method, run in methods.items():
                table.setdefault((name, level, method), []).append(scores(run(y, level / 255), x)[0])
    return [
        {"data": name, "level": level, "method": method, "psnr": round(stats.mean(found), 2)}
        | {"literature": LITERATURE[level] if name == "bsd68" else None}
        for (name, level, method), found in table.items()
    ]


WORDS = (
    "Nikon D800 of polyu_subset and all of cc15_subset, whose cameras and scenes no training saw, and Gaussian noise on "
    f"every second picture of BSD68 and CBSD68; centres of {SIDE} x {SIDE}, mean PSNR in dB and SSIM; gain over the noisy "
    "picture, its standard deviation over the pictures and the least"
)
OTHERS = "the printed figures are for all pictures whole, ours for the centres of every second"
TABLE_3_WORDS = (
    "; Table 3 of the paper (in the record) has other data, SIDD and DND, and a network trained on 320 SIDD pairs"
)


def classical(progress: bool = False) -> dict[str, Any]:
    """What others than DGUNet make of the same pictures: total variation, wavelets, a network for white noise, BM3D."""
    return {
        "claim": f"denoising without DGUNet (BM3D on real noise only): {WORDS}",
        "rows": real_rows(CLASSICAL, False, progress)
        + gaussian_rows({name: run for name, run in CLASSICAL.items() if name != "bm3d"}, progress),
        "why_they_differ": OTHERS,
    } | provenance("denoise-classical", (*REAL, *BSD), range(34), ("podm-denoiser",))


def run(progress: bool = False) -> dict[str, Any]:
    """DGUNet, one network that is told nothing, on the same pictures; and the noise it was trained on beside real noise."""
    method: dict[str, Method] = {"dgunet": partial(_task, "dgunet")}
    rows = real_rows(method, True, progress) + gaussian_rows(method, progress)
    both = next(row for row in rows if row["method"] == "dgunet" and row["data"] == "both")
    return {
        "claim": f"denoising by one DGUNet that is told no level: {WORDS}",
        "rows": rows,
        "real_noise": noise_rows(),
        "table_3": TABLE_3,
        "gain_on_real_pairs": both["gain"],
        "three_decibels_above_noisy": both["gain"] >= 3,
        "why_they_differ": OTHERS + TABLE_3_WORDS,
    } | provenance("dgunet-denoise", (*REAL, *BSD), range(34), ("dgunet-denoise",))


def noise_rows() -> list[dict[str, Any]]:
    """`camera.statistics` of the training pairs and of drawn noise: the mean, the least and the largest of each."""
    generator, mixture = torch.Generator().manual_seed(0), camera.Mixture()
    clean = [mixture.clean(1, generator) for _ in range(200)]
    noises = {
        "training pairs": [pair[:, 3:] - pair[:, :3] for pair in mixture.pairs],
        "drawn": [camera.camera_noise(x, generator) - x for x in clean],
    }
    rows = []
    for kind, noise in noises.items():
        found = [camera.statistics(n) for n in noise]
        for key in found[0]:
            values = [255 * item[key] if key == "level" else item[key] for item in found]
            rows.append({"noise": kind, "quantity": key, "mean": round(stats.mean(values), 3)}
                        | {"least": round(min(values), 3), "largest": round(max(values), 3)})  # fmt: skip
    return rows
