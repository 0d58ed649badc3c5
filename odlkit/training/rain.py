"""Rain to train on: streaks that odlkit draws, scenes that no test set shows, and the recipe of DGUNet's deraining.

``y = min(x + r, 1)`` with a layer ``r >= 0`` that is the same in all channels, as in Rain100L and Rain100H.  Nothing of
the two is trained on or validated with: their clean images only say which scenes to leave out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as nnf

from odlkit import data
from odlkit.images import centre
from odlkit.training.dgunet import SMALL, restorer
from odlkit.training.loop import patches
from odlkit.training.machine import times

COLOUR = ("cbsd68", "sots_outdoor", "sots_indoor", "set14", "set5", "set3c", "polyu_subset", "lol")
DEGRADED = {"hazy", "low", "real", "rain"}  # the folder or the end of the name of a file that is no clean scene
HEAVY = 0.2  # the share of heavy rain
HELD_OUT = 8  # scenes to validate with


def streaks(shape: Sequence[int], generator: torch.Generator, heavy: float = HEAVY) -> Tensor:
    """Rain layers ``(B, 1, H, W)`` in [0, 1] for ``shape = (B, H, W)``, each light, or heavy with probability ``heavy``.

    A layer is one to three falls of rain.  A fall is sparse seeds of random brightness, smeared along one direction near
    the vertical; heavy falls are dense, long and flat, and brighter in some regions than in others.
    """
    batch, height, width = shape
    return torch.cat([_layer(height, width, generator, heavy) for _ in range(batch)])


def _layer(height: int, width: int, generator: torch.Generator, heavy: float) -> Tensor:
    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    def log_uniform(low: float, high: float) -> float:
        return low * (high / low) ** uniform(0, 1)

    layer, dense = torch.zeros(1, 1, height, width), uniform(0, 1) < heavy
    angle = uniform(-30, 30)
    for _ in range(1 + int(uniform(0, 3))):
        length, spread = log_uniform(15, 90) if dense else log_uniform(10, 60), uniform(0.3, 1.4 if dense else 0.9)
        kernel = smear(length, angle + uniform(-8, 8), spread, taper=uniform(0.05, 1))
        cover = log_uniform(0.1, 0.7) if dense else log_uniform(0.02, 0.3)  # streaks over a pixel, on average
        margin = kernel.shape[-1] - 1
        size = (1, 1, height + margin, width + margin)
        seeds = (torch.rand(size, generator=generator) < cover / kernel.sum()) * torch.rand(size, generator=generator)
        if dense:  # flat: overlapping streaks are no brighter, and some regions get more
            field = torch.rand(1, 1, 4, 4, generator=generator) * uniform(0, 1)
            field = nnf.interpolate(field, (height, width), mode="bicubic", align_corners=True).clamp(0, 1)
            fall = (_convolved(seeds, kernel) * uniform(1, 4)).clamp(max=1) * uniform(0.15, 0.9) * (1 - field)
            layer = torch.maximum(layer, fall)
        else:  # most streaks are faint
            layer = layer + _convolved(seeds.square(), kernel) * log_uniform(0.25, 0.9)
    return layer.clamp(0, 1)


def _convolved(seeds: Tensor, kernel: Tensor) -> Tensor:
    """The part of the convolution that sees no border."""
    margin, (height, width) = kernel.shape[-1] - 1, seeds.shape[-2:]
    s = [n + -n % 32 for n in (height, width)]  # a size that the transform is quick at
    product = torch.fft.rfft2(seeds, s=s) * torch.fft.rfft2(kernel, s=s)
    return torch.fft.irfft2(product, s=s)[..., margin:height, margin:width].clamp(min=0)


def smear(length: float, angle: float, width: float, taper: float) -> Tensor:
    """A streak ``(1, 1, n, n)`` of peak 1: ``length`` pixels at ``angle`` degrees from the vertical, Gaussian across.

    ``width`` is its standard deviation in pixels; the share ``taper`` of the half length fades out at each end.
    """
    half = math.ceil(length / 2 + 3 * width)
    rows, cols = torch.meshgrid(*2 * [torch.arange(-half, half + 1.0)], indexing="ij")
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    along, across = (rows * c + cols * s).abs() / (length / 2), cols * c - rows * s
    kernel = ((1 - along) / taper).clamp(0, 1) * torch.exp(-across.square() / (2 * max(width, 0.3) ** 2))
    return (kernel / kernel.max())[None, None]


def rainy(
    images: Sequence[Tensor], batch: int, size: int, generator: torch.Generator, heavy: float = HEAVY
) -> tuple[Tensor, Tensor]:
    """Clean patches ``x`` and rainy ones ``y``, ``(batch, C, size, size)`` in [0, 1], from ``(1, C, H, W)`` images."""
    x = patches(images, batch, size, generator)
    return x, (x + streaks((batch, size, size), generator, heavy)).clamp(0, 1)


def likeness(scene: Tensor, others: tuple[Tensor, ...]) -> float:
    """The largest normalised correlation of the middle of ``scene`` with any window of ``others``, in [-1, 1].

    ``(1, C, H, W)`` images; gray, a quarter of the size, 128 x 128 pixels of the scene, in all four orientations.
    """
    middle = _small(centre(scene, 128))
    best = -1.0
    turned = torch.cat([middle.rot90(k, (-2, -1)) for k in range(4)])
    turned = turned - turned.mean((2, 3), keepdim=True)
    turned = turned / turned.square().sum((2, 3), keepdim=True).sqrt().clamp(min=1e-6)
    for picture, spread in _windows(others):
        best = max(best, (nnf.conv2d(picture, turned) / spread).max().item())
    return best


def _small(image: Tensor) -> Tensor:
    return nnf.interpolate(image.mean(1, keepdim=True), scale_factor=0.25, mode="area")


@cache
def _windows(others: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
    """Each image at a quarter of its size, and the root of the energy of its 32 x 32 windows about their means."""
    result = []
    for image in map(_small, others):
        energy = nnf.avg_pool2d(image.square(), 32, 1) - nnf.avg_pool2d(image, 32, 1).square()
        result.append((image, (1024 * energy).clamp(min=1e-3).sqrt()))
    return result


@cache
def scenes() -> tuple[list[Tensor], list[Tensor]]:
    """Colour images to train on, and `HELD_OUT` to validate with; none shows a scene of Rain100L or Rain100H."""
    found = [data.image(path) for name in COLOUR for path in _clean(name)]
    keep = unseen([x for x in found if x.shape[1] == 3])
    return keep[HELD_OUT:], keep[:HELD_OUT]


def _clean(name: str) -> list[Path]:
    """The clean images of a set: no hazy, dark, noisy or rainy ones."""
    pictures = (path for path in data.files(name) if path.suffix.lower() in data.PICTURES)
    return [path for path in pictures if not {path.parent.name, path.stem.split("_")[-1]} & DEGRADED]


def unseen(images: Sequence[Tensor], bar: float = 0.95) -> list[Tensor]:
    """The images that are not like any clean one of Rain100L, whose scenes are Rain100H's too; see `likeness`."""
    tests = _tests()
    return [image for image in images if likeness(image, tests) < bar]


@cache
def _tests() -> tuple[Tensor, ...]:
    return tuple(data.image(path, gray=True) for path in _clean("rain100l"))


@cache
def heavy_pairs() -> list[Tensor]:
    """The pairs of rain_jorder whose scene is in no test, each clean and rainy as ``(1, 6, H, W)``."""
    folder = data.files("rain_jorder")[0].parent.parent
    every = [torch.cat([data.image(clean), data.image(rain)], 1) for rain, clean in data.pairs(folder, "rain", "clean")]
    return [pair for pair in every if unseen([pair[:, :3]])]


def mixed(batch: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``(x, y)``: patches under rain that is drawn here, and one of eight of a pair of rain_jorder."""
    real = max(batch // 8, 1)
    x, y = rainy(scenes()[0], batch - real, size, generator)
    pair = patches(heavy_pairs(), real, size, generator)
    return torch.cat([x, pair[:, :3]]), torch.cat([y, pair[:, 3:]])


def derain(out: Path, resume: bool = False, steps: int = 1100) -> None:
    """DGUNet for rain at a size that a processor trains, on patches of 64; the first 600 steps are those of a longer run."""
    seeds = torch.Generator().manual_seed(1)
    train = partial(
        restorer, out, name="dgunet-derain", held=[rainy([x], 1, 192, seeds, heavy=0.0) for x in scenes()[1]],
        sample=partial(mixed, times(8), 64), what=f"DGUNet for rain, {SMALL['stages']} stages",
        data=f"colour images of {', '.join(COLOUR)}, no scene of Rain100L, under drawn rain, {HEAVY:.0%} of it heavy, "
        f"one patch in eight of rain_jorder; {HELD_OUT} scenes under light rain are the validation set",
    )  # fmt: skip
    train(resume, steps=3000, stop=600)
    train(True, steps=steps)
