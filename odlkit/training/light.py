"""HODL's network for low light: first its operations are searched, then the network found is trained, through T.

The dark pictures are made here from clear ones, in linear light: a gain, then the noise of a camera and 8 bits; a third of
every batch are the six training pairs of LOL.  What is compared is means over blocks, in which noise hardly counts: u cannot
remove noise.  Data: CBSD68 without its last pictures, LOL's training part; no evaluation pair is seen.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf
from torch.nn.utils import parametrize

from odlkit import data
from odlkit.metrics import psnr
from odlkit.models.hodl_light import Illumination, coarse
from odlkit.networks.lipschitz_cell import OPERATIONS, certified, normalized
from odlkit.training.camera import display, linear
from odlkit.training.loop import fit, log_error, ship
from odlkit.training.machine import best_device, times

HELD_OUT, SIDE = 8, (320, 480)
ALPHA_RATE = 0.01
Pair = tuple[Tensor, Tensor]


def lol(part: str) -> list[tuple[str, Tensor, Tensor]]:
    """``(name, dark, bright)`` of LOL's ``our485_subset`` or ``eval15``, pictures ``(1, 3, H, W)``."""
    bright = [path for path in data.files("lol") if f"{part}/high" in path.as_posix()]
    return [(p.stem, data.image(p.parent.parent / "low" / p.name), data.image(p)) for p in bright]


def darkened(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures ``(B, 3, H, W)`` as a camera sees them with too little light: ``display(g l + sqrt(a g l + b) n)``, 8 bits.

    In linear light l; the gain g is 0.5 to 15%, which is what the training pairs of LOL have.
    """

    def draw(low: float, high: float) -> Tensor:
        return 10 ** (low + (high - low) * torch.rand(len(x), 1, 1, 1, generator=generator))

    light = draw(-2.3, -0.8) * linear(x)
    noise = (draw(-4.0, -2.7) * light + draw(-7.5, -5.5)).sqrt() * torch.randn(x.shape, generator=generator)
    return display(light + noise).mul(255).round().div(255)


def landscape(x: Tensor) -> Tensor:
    """A picture ``(1, 3, H, W)`` lying, the middle ``SIDE`` pixels of it, after resizing where it is larger."""
    x = x.mT if x.shape[-2] > x.shape[-1] else x
    if x.shape[-1] > 1.2 * SIDE[1]:
        x = nnf.interpolate(x, scale_factor=SIDE[0] / x.shape[-2], mode="area")
    top, left = (x.shape[-2] - SIDE[0]) // 2, (x.shape[-1] - SIDE[1]) // 2
    return x[..., top : top + SIDE[0], left : left + SIDE[1]]


class Pictures:
    """``sample(generator) -> (dark, bright)``, each ``(batch, 3, h, w)``: windows of all sizes from 5/8 of `SIDE` on.

    ``clear`` pictures are darkened at random; of ``pairs``, a share ``real`` of all, the dark one gets another gain.
    """

    def __init__(self, clear: Sequence[Tensor], pairs: Sequence[Pair], real: float = 0.35, batch: int = 2):
        self.clear, self.pairs, self.real, self.batch = clear, pairs, real, batch

    def __call__(self, generator: torch.Generator) -> Pair:
        sides = [8 * int(side / 8 * (0.625 + 0.375 * torch.rand((), generator=generator).item())) for side in SIDE]
        out = []
        for _ in range(self.batch):
            real, which, gain, *places = torch.rand(7, generator=generator).tolist()
            real = real < self.real
            y, x = self.pairs[int(which * len(self.pairs))] if real else 2 * (self.clear[int(which * len(self.clear))],)
            (h, w), (top, left) = sides, (int(p * (n - s + 1)) for p, n, s in zip(places, SIDE, sides, strict=False))
            y, x = y[..., top : top + h, left : left + w], x[..., top : top + h, left : left + w]
            y = display(linear(y) * 10 ** (0.6 * gain - 0.3)) if real else darkened(x, generator)
            turn = [dim for dim, t in ((-1, places[2] > 0.5), (-2, places[3] > 0.75)) if t]
            out.append((y.flip(turn), x.flip(turn)))
        return torch.cat([y for y, _ in out]), torch.cat([x for _, x in out])


def split() -> tuple[list[Tensor], list[Tensor], list[Pair]]:
    """Clear pictures to train on and to validate with, and LOL's training pairs."""
    every = [landscape(x) for x in data.images("cbsd68", gray=False)]
    pairs = [(landscape(y), landscape(x)) for _, y, x in lol("our485_subset")]
    return every[:-HELD_OUT], every[-HELD_OUT:], pairs


def unroll(net: Illumination, y: Tensor) -> list[Tensor]:
    """The pictures that ``u^1 ... u^K`` give, on the coarse grid."""
    seen = net.given(y)
    T, u = net.map(seen)
    out = []
    for k in range(net.depth):
        u = T(u, None, k)
        out.append(seen.colours / u.clamp_min(1 / 255))
    return out


def fitting(v: Tensor, x: Tensor) -> Tensor:
    """``v`` times the factor of each item that brings it nearest to ``x``: what is left is no matter of exposure."""
    return v * ((v * x).sum((1, 2, 3), keepdim=True) / v.square().sum((1, 2, 3), keepdim=True))


def loss_of(net: Illumination, sample: Pictures, share: float, generator: torch.Generator) -> Tensor:
    """`log_error` on the coarse grid; where ``share`` < 1 only so much of it, beside that after the best factor.

    No network can know the exposure, and its errors would drown all others.
    """
    y, x = (t.to(best_device()) for t in sample(generator))
    with parametrize.cached():
        found, x = unroll(net, y), coarse(x, net.block)
    error = share * log_error(found, x)
    return error + log_error([fitting(v, x) for v in found], x) if share < 1 else error


def score(net: Illumination, held: Sequence[Pair]) -> float:
    """Mean PSNR in dB after the best factor, on the coarse grid."""
    net.eval()
    with torch.no_grad():
        there = [[t.to(best_device()) for t in pair] for pair in held]
        pairs = [(unroll(net, y)[-1], coarse(x, net.block)) for y, x in there]
    net.train()
    return sum(psnr(fitting(v, x), x).item() for v, x in pairs) / len(pairs)


def search(out: Path, resume: bool = False, steps: tuple[int, int] = (200, 600)) -> list[list[str]]:
    """Choose the operation of each cell: alpha on pictures that the weights do not see, in turn with the weights.

    First order: alpha's gradient takes the weights as they are, so each is a step of Adam on a loss of its own.  The weights
    go first, since a skip needs none and would win before the others have learned.  On coarser means and with fewer steps
    of T than in training; what is found is written to ``out / hodl-light-search.json``.
    """
    torch.manual_seed(0)
    clear, held, pairs = split()
    net = Illumination(width=8, depth=3, block=8).to(best_device())
    normalized(net)
    lower, upper = (Pictures(clear[i::2], pairs[i::2], 0.2, times(2)) for i in (0, 1))
    alphas = [mixture.alpha.requires_grad_(False) for mixture in net.net.mixtures]
    optimiser = torch.optim.Adam(alphas, lr=ALPHA_RATE, betas=(0.5, 0.999))

    def loss(generator: torch.Generator) -> Tensor:
        for alpha in alphas:
            alpha.requires_grad_(True)
        gradients = torch.autograd.grad(loss_of(net, upper, 1.0, generator), alphas)
        for alpha, gradient in zip(alphas, gradients, strict=True):
            alpha.requires_grad_(False).grad = gradient
        optimiser.step()
        optimiser.zero_grad()
        return loss_of(net, lower, 1.0, generator)

    run: dict[str, Any] = {"lr": 4e-3, "out": out, "resume": resume}
    fit(net, partial(loss_of, net, lower, 1.0), steps=steps[0], final=1.0, name="hodl-light-warm", **run)
    record = fit(net, loss, steps=steps[1], name="hodl-light-search", **run)
    found = {"best": net.net.best(), "shares": net.net.alphas(), "names": list(OPERATIONS)} | record
    (out / "hodl-light-search.json").write_text(json.dumps(found, indent=1))
    return net.net.best()


def light(out: Path, resume: bool = False, steps: int = 600) -> None:
    """Search, train what was found through T, and write the weights and their card."""
    cells = search(out, resume)
    torch.manual_seed(0)
    clear, held, pairs = split()
    net = Illumination(cells=cells, block=8).to(best_device())
    normalized(net)
    darks = [(darkened(x, torch.Generator().manual_seed(i)), x) for i, x in enumerate(held)]
    run: dict[str, Any] = {"lr": 3e-3, "out": out, "name": "hodl-light", "resume": resume}
    loss = partial(loss_of, net, Pictures(clear, pairs, batch=times(4)), 0.25)
    record = fit(net, loss, validate=partial(score, net, darks), steps=steps, **run)
    certified(net)
    stored = copy.deepcopy(net.cpu()).half().float()
    found = json.loads((out / "hodl-light-search.json").read_text())
    ship(
        net,
        out,
        "hodl-light",
        record,
        what=f"HODL's illumination for low light: one map trained through {net.depth} steps, its operations searched",
        data=f"CBSD68, darkened, without its last {HELD_OUT} images, the validation set (PSNR at the best exposure); "
        "LOL's training pairs",
        network={"kind": "illumination", **net.config},
        schedule={"depth": net.depth},
        search={key: found[key] for key in ("best", "shares", "names", "steps", "seconds")},
        lipschitz_bound=stored.net.bound(),
    )
