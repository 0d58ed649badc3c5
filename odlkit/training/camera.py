"""Noise as a camera makes it, real pairs of noisy and clean pictures, and the recipe of DGUNet's blind denoiser.

A sensor counts photons: in linear light the variance grows with the signal (shot noise) over a floor (read noise).  White
balance multiplies red and blue; demosaicing and smoothing spread each error over its neighbours and its colours; the
gamma curve lifts the shadows and their noise; JPEG compression comes last.

Every camera of the test pairs, Nikon D800 and D600 and Canon 5D Mark III, is absent from training, and so are their scenes.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as nnf

from odlkit import data
from odlkit.training.dgunet import restorer
from odlkit.training.loop import patches
from odlkit.training.machine import times
from odlkit.training.padnet import pictures

SIDE = 48  # of the patches: noise is local
HELD = ("Canon5D2_5_160_6400_circuit_8", "Canon80D_8_8_6400_comproom_12")  # validation pairs, never trained on
MOST = 55 / 255  # the strongest Gaussian noise drawn


class Pair(NamedTuple):
    """A photograph with its noise, and the mean of many photographs of the same scene, each ``(1, 3, H, W)`` in [0, 1]."""

    name: str
    clean: Tensor
    noisy: Tensor


def real_pairs(name: str, test: bool) -> list[Pair]:
    """The pairs of ``polyu_subset`` or ``cc15_subset`` to test on, or those that training may see.

    Tested are the Nikon D800 of PolyU and all of CC15.
    """
    real = [path for path in data.files(name) if path.stem.endswith("_real")]
    mean = [path.with_name(path.name.replace("_real", "_mean")) for path in real]
    pairs = [Pair(n.stem.removesuffix("_real"), data.image(c), data.image(n)) for c, n in zip(mean, real, strict=True)]
    return [pair for pair in pairs if (name == "cc15_subset" or pair.name.startswith("NikonD800")) == test]


def statistics(noise: Tensor) -> dict[str, float]:
    """Of noise ``(B, 3, H, W)``: its ``level`` (standard deviation), and mean correlations.

    ``near`` and ``far`` are between pixels one and two apart in a row or column, ``colour`` between the channels.
    """

    def correlation(a: Tensor, b: Tensor) -> Tensor:
        a, b = (t - t.mean((-2, -1), keepdim=True) for t in (a, b))
        return ((a * b).mean((-2, -1)) / (a.square().mean((-2, -1)) * b.square().mean((-2, -1))).sqrt()).mean()

    def apart(d: int) -> float:
        rows, columns = correlation(noise[..., d:, :], noise[..., :-d, :]), correlation(noise[..., d:], noise[..., :-d])
        return ((rows + columns) / 2).item()

    colour = torch.stack([correlation(noise[:, i], noise[:, j]) for i, j in ((0, 1), (1, 2), (0, 2))]).mean().item()
    return {"level": noise.std().item(), "near": apart(1), "far": apart(2), "colour": colour}


def linear(x: Tensor) -> Tensor:
    """Light from the values of a picture: the inverse of the sRGB curve, any shape, [0, 1] to [0, 1]."""
    return torch.where(x <= 0.04045, x / 12.92, ((x.clamp_min(0.04045) + 0.055) / 1.055) ** 2.4)


def display(x: Tensor) -> Tensor:
    """Values of a picture from light, clipped to [0, 1]: the sRGB curve."""
    x = x.clamp(0, 1)
    return torch.where(x <= 0.0031308, 12.92 * x, 1.055 * x.clamp_min(0.0031308) ** (1 / 2.4) - 0.055)


def spread(noise: Tensor, width: float) -> Tensor:
    """Smooth white noise ``(B, C, H, W)`` by a Gaussian of ``width`` pixels and keep its variance."""
    t = torch.arange(-9.0, 10.0)
    k = torch.exp(-0.5 * (t / max(width, 0.05)) ** 2)
    k = (k / k.norm()).to(noise)
    channels = noise.shape[1]
    padded = nnf.pad(noise, (9, 9, 9, 9), mode="circular")
    rows = nnf.conv2d(padded, k.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return nnf.conv2d(rows, k.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


def compressed(x: Tensor, quality: int, sampling: int = 2) -> Tensor:
    """Through JPEG and back, item by item; ``sampling=2`` halves the resolution of the colours, 0 does not."""
    from PIL import Image

    out = []
    for item in x:
        memory = io.BytesIO()
        levels = item.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(levels).save(memory, "JPEG", quality=quality, subsampling=sampling)
        out.append(data.to_tensor(np.array(Image.open(memory))))
    return torch.cat(out)


def camera_noise(x: Tensor, generator: torch.Generator) -> Tensor:
    """What a camera of random gain, white balance, smoothing and compression makes of clean pictures ``(B, 3, H, W)``.

    In linear light ``l``: ``l + sqrt(w (a l + b)) n``, w the gains of white balance, a shot and b read noise, n of unit
    variance, correlated between neighbours (a fine and a coarse part) and colours.  Three quarters go through JPEG.
    """

    def draw(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    out = []
    for item in x.split(1):
        light = linear(item)
        shot, read = 10 ** draw(-4.0, -2.1), 10 ** draw(-7.5, -5.0)
        white = torch.tensor([draw(1.2, 2.4), 1.0, draw(1.2, 2.4)]).view(1, 3, 1, 1)
        white, shared, coarse = white / white.mean(), draw(0.1, 0.9), draw(0.0, 0.5)
        own, common = torch.randn(2, *item.shape, generator=generator).unbind()
        n = (1 - shared) ** 0.5 * own + shared**0.5 * common[:, :1]
        rough = torch.randn(item.shape, generator=generator)
        n = (1 - coarse) ** 0.5 * spread(n, draw(0.4, 1.0)) + coarse**0.5 * spread(rough, draw(1.0, 2.5))
        y = display(light + (white * (shot * light + read)).sqrt() * n)
        if draw(0, 1) < 0.75:
            y = compressed(y, 75 if draw(0, 1) < 0.5 else int(draw(70, 99)), 2 if draw(0, 1) < 0.7 else 0)
        out.append(y)
    return torch.cat(out)


def scenes() -> list[Tensor]:
    """Clean colour pictures: Set14 and Set5, the clear ones of the haze and the bright ones of the low-light pairs.

    Without baboon, which CC15 photographed from print, and what is gray.
    """
    sets = {name: data.files(name) for name in ("set14", "set5", "sots_outdoor", "sots_indoor", "lol")}
    wanted = [p for name, paths in sets.items() for p in paths if name in ("set14", "set5") or _clean(p)]
    every = [data.image(path) for path in wanted if path.stem != "baboon"]
    return [x for x in every if x.shape[1] == 3]


def _clean(path: Path) -> bool:
    return path.parent.name in ("clear", "high") and "eval15" not in path.parts


def tinted(gray: Tensor, other: Tensor, generator: torch.Generator) -> Tensor:
    """Colour pictures ``(B, 3, H, W)`` from two gray ones: mostly the first, in shares that differ between the channels."""
    share = 0.7 + 0.3 * torch.rand(len(gray), 3, 1, 1, generator=generator)
    return (0.6 + 0.4 * torch.rand(share.shape, generator=generator)) * (share * gray + (1 - share) * other)


class Mixture:
    """``mixture(generator) -> (x, y)``: patches of real pairs, of camera noise and of Gaussian noise, some gray."""

    def __init__(self) -> None:
        self.counts = (3, 2, 2, 1)  # of a batch, in this order
        self.gray, self.held = pictures()
        pairs = real_pairs("polyu_subset", test=False)
        self.pairs = [torch.cat([p.clean, p.noisy], 1) for p in pairs if p.name not in HELD]
        self.colour = scenes() + [pair[:, :3] for pair in self.pairs]
        self.validation = [p for p in pairs if p.name in HELD]

    def clean(self, count: int, generator: torch.Generator) -> Tensor:
        """Colour patches, each a photograph or a tinted gray one."""
        photographs = patches(self.colour, count, SIDE, generator)
        first, second = patches(self.gray, 2 * count, SIDE, generator).chunk(2)
        own = torch.rand(count, 1, 1, 1, generator=generator) < 0.6
        return torch.where(own, photographs, tinted(first, second, generator))

    def __call__(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        real, camera, colour, gray = map(times, self.counts)
        clean, noisy = patches(self.pairs, real, SIDE, generator).split(3, dim=1)
        x = self.clean(camera + colour, generator)
        plain = patches(self.gray, gray, SIDE, generator)
        level = MOST * torch.rand(colour + gray, 1, 1, 1, generator=generator)
        white = torch.randn(colour, 3, SIDE, SIDE, generator=generator)
        flat = torch.randn(gray, 1, SIDE, SIDE, generator=generator)
        y = [noisy, camera_noise(x[:camera], generator), x[camera:] + level[:colour] * white]
        y.append((plain + level[colour:] * flat).expand(-1, 3, -1, -1))
        return torch.cat([clean, x, plain.expand(-1, 3, -1, -1)]), torch.cat(y)

    def to_validate(self) -> list[tuple[Tensor, Tensor]]:
        """The held real pairs, and gray pictures with Gaussian noise of 25/255."""
        real = [(p.clean[..., 128:384, 128:384], p.noisy[..., 128:384, 128:384]) for p in self.validation]
        x = [image.expand(-1, 3, -1, -1)[..., :160, :160] for image in self.held[:4]]
        noise = [torch.randn(1, 1, 160, 160, generator=torch.Generator().manual_seed(i)) for i in range(len(x))]
        return real + [(clean, clean + 25 / 255 * n) for clean, n in zip(x, noise, strict=True)]


def denoise(out: Path, resume: bool = False) -> None:
    """One blind network for real and for Gaussian noise, colour or gray (as three equal channels).

    After 2600 steps the rate rises again, and most of a batch is real pairs: their noise is the one that is hard to draw.
    """
    mixture = Mixture()
    for mixture.counts, steps in (((3, 2, 2, 1), 2600), ((5, 1, 1, 1), 4000)):
        restorer(
            out,
            resume or steps > 2600,
            name="dgunet-denoise",
            what="DGUNet for blind denoising, real and Gaussian noise; 5 stages",
            data="11 pairs of polyu_subset (2 more validate; Nikon D800 left out), train400 without its last 12, set14 "
            "without baboon, set5, clear pictures of sots_outdoor and sots_indoor, bright training pictures of lol",
            sample=mixture,
            held=mixture.to_validate(),
            setting="denoise",
            edges=0.0,
            steps=steps,
        )
