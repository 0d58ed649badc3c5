"""Recipes for PADNet's networks: a unit trained greedily as a denoiser, then jointly through the iteration.

Greedy, as Algorithm 2 trains a unit (its target is the clean image, its input the image at noise level alpha); joint, as the
paper's "one may further jointly fine-tune parameters of the whole network".  Data: train400 only, blurred by random kernels;
no benchmark image and no benchmark kernel is seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from odlkit import data
from odlkit.metrics import psnr
from odlkit.models.padnet import Implicit, Schedule
from odlkit.networks import ConvUnit, ResidualNet, fold_batch_norm
from odlkit.operators import Blur
from odlkit.problem import LeastSquares, Problem
from odlkit.propagate import iterate
from odlkit.training.kernels import random_kernel
from odlkit.training.loop import fit, log_error, patches, ship
from odlkit.training.machine import autocast, best_device, times

DEPTH, FIRST, BOUND = 8, 0.2, 3.0  # iterations trained through, alpha_0, and Condition 2's constant per pixel
HELD_OUT = 12  # the last images of train400, for validation only
DATA = f"train400 without its last {HELD_OUT} images, which are the validation set"


def log_uniform(low: float, high: float, count: int, generator: torch.Generator) -> Tensor:
    """``count`` noise levels ``(count, 1, 1, 1)``, log-uniform between ``low`` and ``high``."""
    return low * (high / low) ** torch.rand(count, 1, 1, 1, generator=generator)


def pictures() -> tuple[list[Tensor], list[Tensor]]:
    """train400: to train on, and the last `HELD_OUT` to validate with."""
    every = data.images("train400")
    return every[:-HELD_OUT], every[-HELD_OUT:]


def fit_denoiser(net: ResidualNet, levels: tuple[float, float], **run: Any) -> dict:
    """Train a network of one unit to estimate noise of every level in ``levels``, validated at 0.05; returns the record.

    ``run`` goes to `fit`.
    """
    (train, held), device = pictures(), best_device()
    net.to(device)

    def loss(generator: torch.Generator) -> Tensor:
        x = patches(train, times(16), 64, generator)
        alpha = log_uniform(*levels, len(x), generator)
        noise = torch.randn(x.shape, generator=generator)
        x, alpha, noise = x.to(device), alpha.to(device), noise.to(device)
        with autocast():
            estimate = net.units[0](x + alpha * noise, alpha)
        return (estimate.float() - noise).square().mean()

    def validate() -> float:
        net.eval()
        with torch.no_grad():
            noisy = [x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) for i, x in enumerate(held)]
            score = sum(psnr(net(y.to(device), 0.05).cpu(), x).item() for y, x in zip(noisy, held, strict=True)) / len(held)
        net.train()
        return score

    return fit(net, loss, validate=validate, compiled=net.units, **run)


def train_denoiser(
    net: ResidualNet, kind: str, levels: tuple[float, float], what: str, *, out: Path, name: str, **run: Any
) -> ResidualNet:
    """`fit_denoiser`, and its weights with a card that says ``what`` they are; ``kind`` is the card's kind of unit."""
    record = fit_denoiser(net, levels, out=out, name=name, **run)
    network = {"kind": kind, "units": [net.units[0].config], "bound": None}
    schedule = {"first": levels[1], "last": levels[0]}
    ship(net, out, name, record, what=what, data=DATA, network=network, schedule=schedule)
    return net


def greedy(out: Path, resume: bool = False, steps: int = 3500, width: int = 64) -> ResidualNet:
    """Train one `ConvUnit` with batch normalization to estimate noise, for every level alpha in [0.005, 0.25]."""
    torch.manual_seed(0)
    unit = ConvUnit(width=width, batch_norm=True)
    fit_denoiser(ResidualNet([unit]), (0.005, 0.25), steps=steps, lr=2e-3, out=out, name="padnet-greedy", resume=resume)
    return ResidualNet([fold_batch_norm(unit.eval())], bound=BOUND)


def degrade(x: Tensor, kernel: Tensor, sigma: Tensor, generator: torch.Generator) -> tuple[Blur, Tensor]:
    """The circular blur with ``kernel`` and ``y = k * x + sigma noise``, shape of ``x``."""
    blur = Blur(kernel)
    y = blur.A(x)
    return blur, y + sigma.to(x) * torch.randn(y.shape, generator=generator).to(x)


Restore = Callable[[Tensor, Tensor, Tensor, torch.Generator], list[Tensor]]  # (x, kernel, sigma, generator) -> the stages


def crops(
    images: Sequence[Tensor],
    side: int,
    generator: torch.Generator,
    batch: int = 4,
    noise: tuple[float, float] = (0.003, 0.03),
) -> tuple[Tensor, Tensor, Tensor]:
    """Crops ``x`` of that side, a random kernel and a log-uniform level of noise for each."""
    device = best_device()
    x = patches(images, times(batch), side, generator).to(device)
    kernel = torch.stack([random_kernel(generator) for _ in x])[:, None].to(device)
    return x, kernel, log_uniform(noise[0], noise[1], len(x), generator).to(device)


def deblurring_loss(
    restore: Restore, images: Sequence[Tensor], side: int, generator: torch.Generator, *, mixed: bool = True, **draw: Any
) -> Tensor:
    """`log_error` of `crops` of that side; ``draw`` goes there.

    ``mixed``: in bfloat16 where torch finds that safe; a network that sees to this itself needs it not.
    """
    x, kernel, sigma = crops(images, side, generator, **draw)
    # convolutions only, FFTs and sums stay in float32; a disabled autocast would still share casts between the stages
    with autocast() if mixed else nullcontext():
        outputs = restore(x, kernel, sigma, generator)
    return log_error(outputs, x)


def deblurring_score(
    restore: Restore, images: Sequence[Tensor], levels: Sequence[float] = (0.01,), side: int | None = None
) -> float:
    """Mean PSNR in dB over the corners of that side of ``images``, image i with the i-th seed's kernel and noise.

    The noise has the ``levels`` in turn; ``side=None`` takes whole images.
    """
    device, scores = best_device(), []
    with torch.no_grad():
        for i, x in enumerate(images):
            generator = torch.Generator().manual_seed(i)
            kernel = random_kernel(generator)[None, None].to(device)
            sigma = torch.full((1, 1, 1, 1), levels[i % len(levels)], device=device)
            x = x[..., :side, :side]
            scores.append(psnr(restore(x.to(device), kernel, sigma, generator)[-1].cpu(), x).item())
    return sum(scores) / len(scores)


def unroll(
    net: ResidualNet, x: Tensor, kernel: Tensor, sigma: Tensor, generator: torch.Generator, depth: int = DEPTH
) -> list[Tensor]:
    """Blur, add noise, and run ``depth`` iterations of IPADNet: the list of ``v^1 ... v^depth``, each ``(B, 1, H, W)``."""
    (blur, y), sigma = degrade(x, kernel, sigma, generator), sigma.to(x)
    step = Implicit(net, Schedule.between(FIRST, sigma, depth))
    problem = Problem(LeastSquares(blur, y, sigma**-2))
    return [state.x for state, _ in islice(iterate(step, problem, y), depth)]


def joint(out: Path, resume: bool = False, steps: int = 5000, width: int = 64) -> None:
    """Fine-tune through the iteration at 0.3 to 3% noise: log mean squared error, mostly of the last v^k."""
    net = greedy(out, resume=True, width=width).to(best_device())
    train, held = pictures()
    restore = partial(unroll, net)
    record = fit(
        net, partial(deblurring_loss, restore, train, 96), validate=partial(deblurring_score, restore, held),
        steps=steps, lr=5e-4, out=out, name="padnet-image", resume=resume, compiled=net.units)  # fmt: skip
    assert math.isfinite(record["validation_psnr"])
    what = "IPADNet's network N_alpha on the image domain: one unit of seven convolutions, batch normalization folded"
    network = {"kind": "conv", "units": [unit.config for unit in net.units], "bound": BOUND}
    schedule = {"first": FIRST, "depth": DEPTH}  # the last alpha is the noise level
    ship(net, out, "padnet-image", record, what=what, data=f"{DATA}; random blur kernels", network=network,
         schedule=schedule, dtype=None)  # fmt: skip
