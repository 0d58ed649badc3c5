"""HODL's model of the deraining task: scene and streaks as the fixed point of one map, its networks non-expansive.

A model is ``run(y, steps, progress) -> Outcome`` (`odlkit.tasks.derain`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from odlkit import weights
from odlkit.models.hodl_deblur import Iteration
from odlkit.models.hodl_rain import Streaks, cropped, padded
from odlkit.operators import Identity
from odlkit.problem import LeastSquares, Problem
from odlkit.propagate import Result, propagate
from odlkit.tasks.deblur_hodl import krasnoselskii_mann
from odlkit.tasks.report import Outcome

NETWORK = "hodl-rain"


def iterated(net: Streaks, y: Tensor, steps: int | None = None, progress: bool = False) -> tuple[Tensor, Result]:
    """Run T as often as in training or ``steps`` times on ``y`` ``(B, 3, H, W)``: u_b, and the run with its energies."""
    T, split = net.map(padded(y))
    start = split.start()
    problem = Problem(LeastSquares(Identity(), split.b))  # of which the step needs nothing
    result = propagate(Iteration(T, split.energy), problem, start, steps=steps or net.depth, progress=progress)
    result.trace.start["energy"] = split.energy(start)
    return cropped(split.parts(result.x)[0], y), result


def hodl(y: Tensor, steps: int | None, progress: bool) -> Outcome:
    """Split a picture ``(B, 1 or 3, H, W)``; a gray one as one of three equal channels.  Eq: HODL Assumption 3.2."""
    net: Any = weights.load(NETWORK).to(y)
    x, result = iterated(net, y.expand(-1, 3, -1, -1), steps, progress)
    words = krasnoselskii_mann(result, weights.card(NETWORK)["lipschitz_bound"])
    return Outcome(x.mean(1, keepdim=True) if y.shape[1] == 1 else x, result, words)
