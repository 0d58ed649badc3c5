"""Recipes of DGUNet for blur: one that learns what undoes motion, one that is given A and serves three tasks.

Data: train400 only, degraded at random; no benchmark image and no benchmark kernel is seen.  Pictures in colour are
restored channel by channel, so gray ones are enough to train on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from odlkit.operators import Blur, BlurDecimate, Mask, Operator, ValidBlur
from odlkit.solvers import tikhonov
from odlkit.tasks.dgunet import SMOOTH, START, normalized
from odlkit.tasks.inpaint import thin_plate
from odlkit.tasks.sr import SCALES, bicubic_kernel
from odlkit.training.dgunet import restorer
from odlkit.training.kernels import random_kernel
from odlkit.training.loop import patches
from odlkit.training.machine import times
from odlkit.training.masks import random_mask
from odlkit.training.padnet import DATA, log_uniform, pictures

KERNEL, WIDE = 13, 19  # side of the unknown kernels, paths within 4 pixels, and of those that training begins with
NOISE = (0.001, 0.01)  # beside unknown blur
KNOWN_NOISE = (0.003, 0.03)  # beside known blur


def blurred(scene: Tensor, generator: torch.Generator, side: int = KERNEL) -> tuple[Tensor, Tensor]:
    """``(x, y)``: each item of ``scene`` under a kernel of its own, with noise; what lies outside the picture blurs in.

    Both are smaller than the scene by ``side - 1`` pixels, ``side`` that of the kernels.
    """
    kernels = torch.stack([random_kernel(generator, side) for _ in scene])[:, None]
    blur = ValidBlur(kernels)
    y = blur.A(scene)
    sigma = log_uniform(*NOISE, len(scene), generator)
    return blur.crop(scene), y + sigma * torch.randn(y.shape, generator=generator)


Known = tuple[Tensor, Tensor, Operator, Tensor]  # x, y, A and the start of the iteration


def blur_known(x: Tensor, generator: torch.Generator) -> Known:
    """Circular blur, a kernel for each item, and noise; from the smooth image that explains the data."""
    blur = Blur(torch.stack([random_kernel(generator, 25) for _ in x])[:, None])
    sigma = log_uniform(*KNOWN_NOISE, len(x), generator)
    y = blur.A(x)
    y = y + sigma * torch.randn(y.shape, generator=generator)
    return x, y, blur, tikhonov(blur, y, START * sigma.square())


def mask_known(x: Tensor, generator: torch.Generator) -> Known:
    """Missing pixels and text, no noise; from the bent plate through the known pixels."""
    mask = torch.cat([random_mask(x.shape[-2], x.shape[-1], generator) for _ in x])
    y = mask * x
    return x, y, Mask(mask), thin_plate(y, mask)


def scale_known(x: Tensor, generator: torch.Generator, scale: int | None = None) -> Known:
    """Bicubic (60%) or plain decimation by 2, 3 or 4, no noise; of norm 1, as the other operators."""
    scale = scale or SCALES[int(torch.randint(len(SCALES), (), generator=generator))]
    bicubic = bool(torch.rand((), generator=generator) < 0.6)
    operator = BlurDecimate(bicubic_kernel(scale).to(x) if bicubic else torch.ones(1, 1), scale)
    y = operator.A(x)
    x0 = tikhonov(operator, y, SMOOTH)
    A, y = normalized(operator, y, x0)
    return x, y, A, x0


KINDS = (blur_known, mask_known, scale_known)


def motion(out: Path, resume: bool = False, steps: int = 1500, slow: tuple[int, int] = (2400, 800)) -> None:
    """Blur of an unknown random kernel and a little noise: A and its adjoint are learned.

    First kernels of `WIDE` pixels, for the first 800 steps of a cosine of 2400; from there those of `KERNEL` pixels.
    """
    train, held = pictures()

    def sample(generator: torch.Generator, side: int) -> tuple[Tensor, Tensor]:
        return blurred(patches(train, times(4), 72 + side - 1, generator), generator, side)

    run = partial(
        restorer, out, name="dgunet-deblur", setting="deblur", channels=1,
        held=[blurred(x[..., :172, :172], torch.Generator().manual_seed(i)) for i, x in enumerate(held)],
        what="DGUNet for motion blur of an unknown kernel, gray or channel by channel; 5 stages, A learned",
        data=f"{DATA}; random kernels within {KERNEL}x{KERNEL} pixels, 80% of them motion, and noise of 0.1 to 1%",
    )  # fmt: skip
    run(resume, sample=partial(sample, side=WIDE), steps=slow[0], stop=slow[1])
    run(True, sample=partial(sample, side=KERNEL), steps=steps)


def known(out: Path, resume: bool = False, steps: int = 2200) -> None:
    """Each step one of three operators, which the network is given: blur, mask, decimation."""
    train, held = pictures()

    def sample(generator: torch.Generator) -> Known:
        kind = KINDS[int(torch.randint(len(KINDS), (), generator=generator))]
        return kind(patches(train, times(5), 72, generator), generator)

    restorer(
        out, resume, name="dgunet-known", sample=sample, held=known_pairs(held), setting="deblur", edges=0.0,
        channels=1, known=True, steps=steps,
        what="one DGUNet that is given A and deblurs, interpolates and super-resolves; gray or channel by channel; 5 stages",
        data=f"{DATA}; random kernels with noise of 0.3 to 3%, missing pixels and text, decimation by 2, 3 and 4",
    )  # fmt: skip


def known_pairs(images: Sequence[Tensor]) -> list[Known]:
    """The corners of 144 pixels of ``images``, the three kinds in turn."""
    seeded = [torch.Generator().manual_seed(i) for i in range(len(images))]
    return [KINDS[i % 3](x[..., :144, :144], seeded[i]) for i, x in enumerate(images)]
