"""Recipes for PODM: its network trained greedily as a denoiser, and relaxed PODM end to end, for two tasks.

Greedy, as section 4.1 has it, trains theta_A only; end to end, as section 4.2, theta_A and theta_H of all stages together.
Data: train400 only, degraded at random; no benchmark image and no benchmark kernel is seen.
"""

from __future__ import annotations

from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from odlkit.metrics import psnr
from odlkit.models.podm import Relaxed, RelaxedNet
from odlkit.networks import ConvUnit, ResidualNet
from odlkit.operators import BlurDecimate, Operator
from odlkit.priors import Box
from odlkit.problem import LeastSquares, Problem
from odlkit.propagate import iterate
from odlkit.solvers import tikhonov
from odlkit.tasks.sr import SMOOTH, bicubic_kernel
from odlkit.training.loop import fit, log_error, patches, ship
from odlkit.training.machine import autocast, best_device, times
from odlkit.training.padnet import (
    DATA,
    deblurring_loss,
    deblurring_score,
    degrade,
    pictures,
    train_denoiser,
)

UNITS, FIRST = 6, 0.2  # networks of deblurring, neighbouring stages share one; the level of the first stage
START = 100.0  # the smooth start weighs ||D x||^2 with 100 sigma^2: slopes of about 0.1
LEVEL = 0.01  # sigma that super-resolution of noise-free data is told: the last level, and its trust in the data
BOX = Box(0.0, 1.0)  # Omega with s = n: no photograph has black pixels to count on


def denoiser(out: Path, resume: bool = False, steps: int = 4000, width: int = 64) -> ResidualNet:
    """Train A, six convolutions with ELU, to estimate noise of every level alpha in [0.003, 0.25]."""
    torch.manual_seed(0)
    net = ResidualNet([ConvUnit(width=width, depth=6, activation="elu")])
    what = "PODM's network A, trained greedily as a denoiser for every noise level: six convolutions with ELU"
    levels = (0.003, 0.25)
    return train_denoiser(net, "conv", levels, what, steps=steps, lr=1e-3, out=out, name="podm-denoiser", resume=resume)


def start(out: Path, resume: bool, stages: int, first: float, last: float | None, width: int) -> RelaxedNet:
    """Relaxed PODM whose stages all begin as the greedily trained network."""
    greedy = denoiser(out, resume=resume or (out / "podm-denoiser.pt").exists(), width=width)
    torch.manual_seed(0)
    net = RelaxedNet([greedy.units[0].config] * stages, first, last)  # type: ignore[list-item]
    for network in net.networks:
        network.load_state_dict(greedy.units[0].state_dict())
    return net.to(best_device())


def unroll(net: RelaxedNet, operator: Operator, y: Tensor, x0: Tensor, sigma: Tensor, scale: float = 1.0) -> list[Tensor]:
    """``x^1 ... x^L`` of relaxed PODM on ``||A x - y||^2`` over the box, each ``(B, 1, H, W)``."""
    problem = Problem(LeastSquares(operator, y, 2.0), BOX)
    return [state.x for state, _ in islice(iterate(Relaxed(net, sigma, scale), problem, x0), len(net))]


def _finish(net: RelaxedNet, out: Path, name: str, record: dict, what: str, data: str) -> None:
    network = {"kind": "relaxed", **net.config}
    schedule = {"first": network["first"], "last": network["last"], "depth": len(net)}
    ship(net, out, name, record, what=what, data=data, network=network, schedule=schedule)


PHASES = (  # of deblurring: for `fit`; the stages, by their places before; whether the start is smooth; side of the crops
    ({"steps": 10000, "stop": 7200, "lr": 5e-4}, (0, 1, 2, 3, 4, 5), False, 96),  # from the data, as in the paper
    ({"steps": 6000, "stop": 4200, "lr": 4e-4}, (0, 1, 2, 3, 4, 5), True, 96),  # the smooth start spares the first stages
    ({"steps": 4000, "lr": 3e-4}, (0, 0, 1, 2, 3, 3, 4, 5), True, 96),
    ({"steps": 1500, "lr": 2e-4}, (0, 1, 2, 3, 4, 5, 6, 7), True, 128),
    ({"steps": 2000, "lr": 3e-4}, (0, 1, 2, 3, 5, 6, 7), True, 96),  # one stage less, for speed
)


def deblur(out: Path, resume: bool = False, width: int = 64) -> None:
    """RPODM for deblurring with a known kernel, in `PHASES`: random kernels, 0.3 to 3% noise."""
    net, device = start(out, resume, UNITS, FIRST, None, width), best_device()
    train, held = pictures()

    def restore(x: Tensor, kernel: Tensor, sigma: Tensor, generator: torch.Generator) -> list[Tensor]:
        blur, y = degrade(x, kernel, sigma, generator)
        with torch.autocast(device.type, enabled=False):
            x0 = tikhonov(blur, y, START * sigma.square()) if smooth else y
        return unroll(net, blur, y, x0, sigma)

    record: dict = {}
    for number, (plan, places, smooth, side) in enumerate(PHASES, 1):  # noqa: B007
        net, name = net.rearranged(places), f"rpodm-deblur-{number}"
        loss, score = partial(deblurring_loss, restore, train, side), partial(deblurring_score, restore, held)
        run: Any = plan | {"out": out, "name": name, "resume": resume, "seed": number - 1}
        record = fit(net, loss, **run, validate=score, compiled=net.networks)
    record |= {"phases": [list(phase) for phase in PHASES]}
    what = f"relaxed PODM for deblurring: {len(net)} stages, {UNITS} networks of six ELU convolutions"
    _finish(net, out, "rpodm-deblur", record, what, f"{DATA}; random blur kernels")


def super_resolution(out: Path, resume: bool = False, steps: int = 10000, width: int = 64, stages: int = 5) -> None:
    """RPODM for super-resolution by 2, 3 and 4, of bicubic and of plainly decimated images, without noise."""
    net, device = start(out, resume, stages, 0.1, LEVEL, width), best_device()
    train, held = pictures()

    def restore(x: Tensor, scale: int, bicubic: bool) -> list[Tensor]:
        kernel = bicubic_kernel(scale).to(x) if bicubic else torch.ones(1, 1).to(x)
        operator = BlurDecimate(kernel, scale)
        y = operator.A(x)
        with torch.autocast(device.type, enabled=False):
            x0 = tikhonov(operator, y, SMOOTH)
        return unroll(net, operator, y, x0, torch.full((len(x), 1, 1, 1), LEVEL).to(x), scale)

    def loss(generator: torch.Generator) -> Tensor:
        x = patches(train, times(4), 96, generator).to(device)
        scale = 2 + int(torch.randint(3, (), generator=generator))
        bicubic = bool(torch.rand((), generator=generator) < 0.6)
        with autocast():
            outputs = restore(x, scale, bicubic)
        return log_error(outputs, x)

    def validate() -> float:
        with torch.no_grad():
            cut = [x[..., :168, :168].to(device) for x in held]
            return sum(psnr(restore(x, s, True)[-1], x).item() for x in cut for s in (2, 3, 4)) / (3 * len(cut))

    record = fit(net, loss, steps=steps, lr=5e-4, out=out, name="rpodm-sr", resume=resume, validate=validate,
                 compiled=net.networks)  # fmt: skip
    what = f"relaxed PODM for super-resolution by 2, 3 and 4: {stages} stages, bicubic or plain decimation, no noise"
    _finish(net, out, "rpodm-sr", record, what, DATA)
