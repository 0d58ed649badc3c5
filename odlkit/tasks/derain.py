"""Rain: bright streaks, much the same in every channel, over a scene that nobody saw without them.

``y = x + r`` with ``r >= 0``.  DGUNet has learned what undoes it.  The classical model splits the two by direction, after
Deng et al. (2018): streaks change little along their direction, the scene little across it.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from odlkit.models.hodl_rain import MARGIN, REACH, Shifts, slopes
from odlkit.operators import Identity
from odlkit.problem import LeastSquares, Problem, sum_items
from odlkit.propagate import propagate
from odlkit.solvers import ADMM
from odlkit.tasks.derain_gdc import gdc_searched
from odlkit.tasks.derain_hodl import hodl
from odlkit.tasks.dgunet import blind
from odlkit.tasks.report import Model, Outcome, check_image, check_model, report
from odlkit.tasks.tiles import in_parts

NETWORK = "dgunet-derain"
# Chosen on scenes under drawn rain that no training saw (`odlkit.training.rain.scenes`), not on Rain100L.
TRUST, ALONG, SPARSE, PENALTY, STEPS = 0.01, 0.5, 0.2, 10.0, 40


def derain(
    y: Tensor, model: str = "dgunet", *, tile: int | None = None, steps: int | None = None, progress: bool = False
) -> tuple[Tensor, dict[str, Any]]:
    """Remove rain from ``y`` ``(B, C, H, W)`` in [0, 1], C = 1 or 3: an image of its shape, and a report of the run.

    ``model`` is one of `MODELS`; a gray picture is restored as one of three equal channels.  ``tile`` restores squares one
    by one, as `odlkit.tasks.tiles.in_parts` has it.  Raises ``ValueError`` for bad arguments.
    """
    clock = time.monotonic()
    check_model(model, MODELS)
    check_image(y, (1, 3))
    x, outcomes = in_parts(lambda z: MODELS[model].run(z, steps, progress and tile is None), y, tile, progress=progress)
    return x, report("derain", model, clock, outcomes, y, x, settings={"tile": tile})


# The models: each gets the picture.


def _dgunet(y: Tensor, steps: int | None, progress: bool) -> Outcome:
    more = "learned from drawn streaks, so other bright lines may go and other rain may stay"
    return blind(NETWORK, y, steps, more)


class Directional:
    """``||D_x x||_1 + along ||D_s (x - y)||_1 + sparse ||x - y||_1`` of ``W x = (D_x x, D_s x, x)``, ``centre = W y``.

    Differences across the streaks and along them, over `REACH` rows and the columns of their slope.
    """

    convex = True

    def __init__(self, centre: Tensor, along: float, sparse: float):
        self.centre = centre * torch.tensor([0.0, 1.0, 1.0]).to(centre).view(1, 3, 1, 1)
        self.weight = torch.tensor([1.0, along, sparse]).to(centre).view(1, 3, 1, 1)

    def value(self, q: Tensor) -> Tensor:
        return sum_items(self.weight * (q - self.centre).abs())

    def prox(self, z: Tensor, step: Tensor | float) -> Tensor:
        t = z - self.centre
        return self.centre + t.sign() * (t.abs() - step * self.weight).clamp_min(0)


def _directional(y: Tensor, steps: int | None, progress: bool) -> Outcome:
    """The mean of the channels is split, by ADMM; every channel loses the same streaks."""
    gray = nnf.pad(y.mean(1, keepdim=True), 4 * [MARGIN], mode="replicate")
    streaks, outcomes = [], []
    for item in gray.split(1):
        operator = Shifts((0, 1), (REACH, slopes(item)[0]), (0, 0))
        problem = Problem(LeastSquares(Identity(), item, TRUST), Directional(operator.A(item), ALONG, SPARSE), operator)
        result = propagate(ADMM(PENALTY), problem, item, steps=steps or STEPS, progress=progress)
        outcomes.append(result)
        streaks.append((item - result.x).clamp_min(0)[..., MARGIN:-MARGIN, MARGIN:-MARGIN])
    words = {
        "guarantee": "ADMM on a convex energy, any penalty (known theory)",
        "statement": "converges to a minimiser; how near this run came is not checked, nor whether what it takes is rain",
        "holds": None,
    }
    worst = max(outcomes, key=lambda result: result.residual)
    return Outcome(y - torch.cat(streaks), worst, words)


MODELS = {  # each run as run(y, steps, progress)
    "dgunet": Model(_dgunet, "DGUNet, which learned what undoes rain; nothing is checked"),
    "hodl": Model(hodl, "HODL: that split by an augmented Lagrangian, after networks that do not expand"),
    "gdc-searched": Model(gdc_searched, "GDC's Algorithm 2, its two modules made of searched cells; every step is bounded"),
    "directional": Model(_directional, "a convex split of scene and streaks by their direction, by ADMM"),
}
