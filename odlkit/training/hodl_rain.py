"""Recipes for HODL's rain streaks: everything is trained together through the K steps of T (sHODL).

The upper loss is the logarithm of the squared error of u_b, mostly that of u_b^K.  Data and scenes to validate with as in
`odlkit.training.rain`: drawn rain, and no scene of Rain100L.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from odlkit.metrics import psnr
from odlkit.models.hodl_rain import Streaks, certified, lipschitz, normalized
from odlkit.training.loop import fit, log_error, ship
from odlkit.training.machine import best_device, times
from odlkit.training.rain import COLOUR, HELD_OUT, rainy, scenes

BATCH, SIDE, HEAVY = 4, 80, 0.1
PRIOR = 32


def held_out() -> list[tuple[Tensor, Tensor]]:
    """Scenes that no training sees, clean and under light drawn rain, ``(1, 3, 192, 192)`` each."""
    seeds = torch.Generator().manual_seed(1)
    return [rainy([x], 1, 192, seeds, heavy=0.0) for x in scenes()[1]]


def train(name: str, about: str, out: Path, resume: bool = False, steps: int = 1200, **changes: Any) -> None:
    """Train `Streaks` on drawn rain, a tenth of it heavy, and write the weights and their card.

    ``changes`` go to `Streaks`.
    """
    torch.manual_seed(0)
    device = best_device()
    net = normalized(Streaks(**{"prior": PRIOR} | changes)).to(device)
    images, tests = scenes()[0], held_out()

    def loss(generator: torch.Generator) -> Tensor:
        x, y = (t.to(device) for t in rainy(images, times(BATCH), SIDE, generator, HEAVY))
        with parametrize.cached():
            return log_error(net(y), x)

    def validate() -> float:
        net.eval()
        with torch.no_grad():
            scores = [psnr(net(y.to(device))[-1].cpu().clamp(0, 1), x).item() for x, y in tests]
        net.train()
        return sum(scores) / len(scores)

    record = fit(net, loss, steps=steps, lr=2e-3, out=out, name=name, resume=resume, validate=validate)
    stored = certified(net.cpu(), margin=1e-3)
    ship(
        stored,
        out,
        name,
        record,
        what=f"HODL's split of scene and streaks, {net.depth} steps of one map trained hierarchically; {about}",
        data=f"colour images of {', '.join(COLOUR)}, no scene of Rain100L, under drawn rain, {HEAVY:.0%} of it heavy; "
        f"{HELD_OUT} scenes under light rain are the validation set",
        network={"kind": "streaks", **net.config},
        schedule={"depth": net.depth},
        dtype=None,
        lipschitz_bound=lipschitz(stored),
    )


bounded = partial(train, "hodl-rain", "networks normalized, so that T is non-expansive")
free = partial(train, "hodl-rain-free", "nothing bounds the networks' Lipschitz constants", bounded=False)
numbers = partial(train, "hodl-rain-numbers", "no network, the numbers of the solver alone (UNH)", steps=200, width=0)
