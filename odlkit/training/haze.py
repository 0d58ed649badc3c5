"""PADNet's network for haze: seventeen convolutions, greedily on one move from the guidance, then through the iteration.

The haze is made here: clear photographs, transmissions that a depth could have, airlights near white.  A depth is a mixture
of a plane, a smooth bump and segments that follow the picture's edges; depth in a real scene knows what is ground and what
is sky, this one does not.  The network is told an airlight that is off by a few percent, as an estimate is.
Data: CBSD68 and six photographs of LOL's training part; no picture of the benchmark of haze is seen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from odlkit import data
from odlkit.metrics import psnr
from odlkit.models.padnet import Implicit, Schedule
from odlkit.networks import ConvUnit, ResidualNet, fold_batch_norm
from odlkit.propagate import iterate
from odlkit.tasks.dehaze import guidance, haze, radiance, seeing, transmission_problem
from odlkit.training.loop import fit, log_error, patches, ship
from odlkit.training.machine import best_device, times
from odlkit.training.padnet import log_uniform

LAYERS, FOLD = 17, 4  # of the paper; folded four times four, so that a pixel is seen with 70 others on each side
FIRST, LAST, DEPTH = 0.5, 0.1, 3  # alpha of the iterations
BOUND = 3.0  # Condition 2's constant per pixel
BATCH, SIDE, HELD_OUT = 8, 128, 8
THIN = 0.5  # share of the batches with thin haze


def pictures() -> tuple[list[Tensor], list[Tensor]]:
    """Clear colour photographs: to train on, and the last `HELD_OUT` of CBSD68 to validate with."""
    every = data.images("cbsd68", gray=False)
    bright = [path for path in data.files("lol") if "our485_subset/high" in path.as_posix()]
    return every[:-HELD_OUT] + [data.image(path) for path in bright], every[-HELD_OUT:]


def depths(scene: Tensor, generator: torch.Generator) -> Tensor:
    """Random depths ``(B, 1, H, W)`` from 0 to 1 for scenes: a plane, a smooth bump and segments, mixed at random."""
    count, _, height, width = scene.shape

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(scene)

    rows, columns = torch.linspace(0, 1, height).to(scene)[:, None], torch.linspace(0, 1, width).to(scene)
    angle = 6.2832 * uniform(count, 1, 1, 1)
    plane = angle.sin() * rows + angle.cos() * columns
    bump = nnf.interpolate(uniform(count, 1, 5, 5), (height, width), mode="bicubic", align_corners=True)
    tone = (scene * (2 * uniform(count, 3, 1, 1) - 1)).sum(1, keepdim=True)  # a random mixture of the colours
    tone = unit_range(nnf.avg_pool2d(tone, 5, 1, 2, count_include_pad=False))
    edges = uniform(count, 4, 1, 1).sort(1).values
    levels = uniform(count, 5, 1, 1)
    segment = (tone > edges).sum(1, keepdim=True)  # 0 to 4, which of the five levels
    segments = levels.expand(-1, -1, height, width).gather(1, segment)
    shares = -uniform(count, 3, 1, 1).clamp_min(1e-6).log()
    parts = torch.cat([unit_range(plane), unit_range(bump), segments], 1)
    return unit_range((shares * parts).sum(1, keepdim=True))


def unit_range(x: Tensor) -> Tensor:
    """Each item ``(C, H, W)`` mapped affinely onto [0, 1]; a constant becomes 0."""
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    return (x - low) / (high - low).clamp_min(1e-6)


def hazy_scenes(scene: Tensor, generator: torch.Generator, thin: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Haze for scenes ``(B, 3, H, W)``: ``(I, t, A)``, A an estimate that is off by 3% and each channel by 1%.

    ``t = t_0 (t_1 / t_0)^d`` for a depth d, as the law of Beer and Lambert has it, with t_0 in [0.5, 1] and t_1 in
    [0.15, 0.9] t_0; where haze may be ``thin``, t_0 is mostly near 1 and t_1 up to t_0.  The airlight is 0.7 to 1 with a
    tint of up to 4%; the noise of 0.5% stands for 8 bits and JPEG.
    """
    count = len(scene)

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(count, channels, 1, 1, generator=generator).to(scene)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(scene)

    near = 1 - 0.5 * uniform(0, 1).square() if thin else uniform(0.5, 1)
    far = uniform(0.15, 1 if thin else 0.9) * near
    t = near * (far / near) ** depths(scene, generator)
    light = (uniform(0.7, 1) + uniform(-0.04, 0.04, 3)).clamp(max=1)
    seen = (haze(scene, t, light) + 0.005 * normal(*scene.shape)).clamp(0, 1)
    off = 1 + 0.03 * normal(count, 1, 1, 1) + 0.01 * normal(count, 3, 1, 1)
    return seen, t, (light * off).clamp(0.5, 1)


def unroll(net: ResidualNet, seen: Tensor, light: Tensor) -> list[Tensor]:
    """``v^1 ... v^DEPTH`` of IPADNet from the guidance, each ``(B, 1, H, W)``."""
    start = guidance(seen, light)
    step = Implicit(seeing(net, seen / light), Schedule.between(FIRST, LAST, DEPTH))
    return [state.x for state, _ in islice(iterate(step, transmission_problem(start), start), DEPTH)]


def one_move(net: ResidualNet, seen: Tensor, light: Tensor, t: Tensor, generator: torch.Generator) -> list[Tensor]:
    """One move of the network from the guidance, whose error is shrunk by alpha / alpha_0 for a random level alpha."""
    alpha = log_uniform(LAST, FIRST, len(t), generator).to(t)
    start = t + alpha / FIRST * (guidance(seen, light) - t)
    return [seeing(net, seen / light)(start, alpha)]


def loss_of(move: Callable[..., list[Tensor]], train: list[Tensor], generator: torch.Generator) -> Tensor:
    """`log_error` of the transmissions and of the scenes that follow from them, on random crops with random haze.

    A share of `THIN` of the batches has thin haze.  The scenes are made brighter or darker, each channel for itself a
    little, as rooms are brighter than landscapes and lamps have a colour.
    """
    thin = torch.rand((), generator=generator).item() < THIN
    batch = times(BATCH)
    scene = patches(train, batch, SIDE, generator).to(best_device())
    tone = log_uniform(0.5, 1.5, batch, generator) * log_uniform(0.9, 1.1, 3 * batch, generator).view(batch, 3, 1, 1)
    scene = scene ** tone.to(scene)
    seen, t, light = hazy_scenes(scene, generator, thin)
    found = move(seen, light, t, generator)
    return log_error(found, t) + log_error([radiance(seen, v, light) for v in found], scene)


def score(net: ResidualNet, held: list[Tensor]) -> float:
    """Mean PSNR in dB of the validation pictures' centres, hazed by the i-th seed."""
    net.eval()
    total = 0.0
    with torch.no_grad():
        for i, picture in enumerate(held):
            scene = picture[..., 32:288, 32:288].to(best_device())
            seen, _, light = hazy_scenes(scene, torch.Generator().manual_seed(i))
            total += psnr(radiance(seen, unroll(net, seen, light)[-1], light).cpu(), scene.cpu()).item()
    net.train()
    return total / len(held)


def greedy(out: Path, resume: bool = False, steps: int = 4000, width: int = 32) -> ResidualNet:
    """Train seventeen convolutions with batch normalization on one move; the picture's channels stay as they are."""
    torch.manual_seed(0)
    unit = ConvUnit(channels=4, width=width, depth=LAYERS, fold=FOLD, batch_norm=True)
    last: Any = unit.layers[-1]
    with torch.no_grad():  # no loss sees them, so they stay zero
        last.weight[FOLD**2 :] = 0
        last.bias[FOLD**2 :] = 0
    net = ResidualNet([unit]).to(best_device())
    train, held = pictures()
    loss = partial(loss_of, partial(one_move, net), train)
    fit(
        net,
        loss,
        validate=partial(score, net, held),
        steps=steps,
        lr=2e-3,
        out=out,
        name="padnet-haze-greedy",
        resume=resume,
        compiled=net.units,
    )
    return ResidualNet([fold_batch_norm(unit.eval())], bound=BOUND)


def joint(out: Path, resume: bool = False, steps: int = 3000, width: int = 32) -> None:
    """Fine-tune through the iteration after `greedy`, and write the weights and their card."""
    net = greedy(out, resume=True, width=width).to(best_device())
    train, held = pictures()
    loss = partial(loss_of, lambda seen, light, t, generator: unroll(net, seen, light), train)
    validate = partial(score, net, held)
    record = fit(net, loss, validate=validate, steps=steps, lr=5e-4, out=out, name="padnet-haze", resume=resume,
                 compiled=net.units)  # fmt: skip
    ship(
        net,
        out,
        "padnet-haze",
        record,
        what="IPADNet's network N_alpha on transmissions, shown the picture: one unit of seventeen convolutions",
        data=f"CBSD68 without its last {HELD_OUT} images, which are the validation set, and six photographs of LOL's "
        "training part; synthetic haze",
        network={"kind": "conv", "units": [unit.config for unit in net.units], "bound": BOUND},
        schedule={"first": FIRST, "last": LAST, "depth": DEPTH},
    )
