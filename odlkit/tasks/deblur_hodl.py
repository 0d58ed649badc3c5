"""HODL's two models of the deblurring task: one map after another, its network free or non-expansive.

A model is ``run(z, blur, sigma, steps, progress) -> Outcome`` on a periodic grid (`odlkit.tasks.deblur`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from odlkit import weights
from odlkit.certify import Check, inequality
from odlkit.models.hodl_deblur import Deconvolution, Iteration
from odlkit.operators import Blur
from odlkit.problem import LeastSquares, Problem
from odlkit.propagate import Result, propagate
from odlkit.tasks.report import ROUND_OFF, Outcome, unproved

NAMES = {"hodl": "hodl-deblur", "hodl-nonexpansive": "hodl-deblur-nonexpansive"}


def iterated(
    net: Deconvolution, z: Tensor, blur: Blur, sigma: float, steps: int | None = None, progress: bool = False
) -> tuple[Tensor, Result]:
    """Run T as often as in training or ``steps`` times: ``D_net(u^K)`` and the run."""
    level = torch.full((len(z), 1, 1, 1), sigma).to(z)
    T, start = net.map(blur, z, level)
    problem = Problem(LeastSquares(blur, z, 2.0))
    result = propagate(Iteration(T), problem, start, steps=steps or net.depth, progress=progress)
    return net.denoise(result.x, level, result.iterations), result


def hodl(z: Tensor, blur: Blur, sigma: float, steps: int | None, progress: bool) -> Outcome:
    """HODL with a network whose Lipschitz constant nothing holds to 1: no theorem."""
    net: Any = weights.load(NAMES["hodl"]).to(z)
    x, result = iterated(net, z, blur, sigma, steps, progress)
    why = "trained hierarchically; nothing holds the network's Lipschitz constant to 1, so no theorem applies"
    return Outcome(x, result, unproved(why))


def nonexpansive(z: Tensor, blur: Blur, sigma: float, steps: int | None, progress: bool) -> Outcome:
    """HODL with ``D_net = (I + N) / 2``, N of Lipschitz constant at most 1.  Eq: HODL Assumption 3.2."""
    name = NAMES["hodl-nonexpansive"]
    net: Any = weights.load(name).to(z)
    x, result = iterated(net, z, blur, sigma, steps, progress)
    return Outcome(x, result, krasnoselskii_mann(result, weights.card(name)["lipschitz_bound"]))


def growth(result: Result) -> float:
    """``max ||u^{k+1} - u^k|| / ||u^k - u^{k-1}||`` over the run, at most 1 for a non-expansive T; 0 for a single step.

    Without moves of the size of round-off, whose ratios say nothing.
    """
    moves, size = result.trace["change"], result.trace["norm"]
    ratios = (moves[1:] / moves[:-1])[moves[:-1] > ROUND_OFF * size[:-1]]
    return ratios.max().item() if ratios.numel() else 0.0


def krasnoselskii_mann(result: Result, bound: float) -> dict[str, Any]:
    """The hypothesis on this run: ``||u^{k+1} - u^k||`` never grows, as with every non-expansive T."""
    moves, size = result.trace["change"], result.trace["norm"]
    check = Check("moves", True, 0.0, 0)  # a single step has nothing to compare
    if len(moves) > 1:
        check = inequality("moves", moves[1:], moves[:-1], ROUND_OFF * size[1:], size[1:])
    return {
        "guarantee": "Krasnoselskii and Mann, under HODL's Assumption 3.2: D_num and D_net non-expansive, alpha < 1",
        "statement": "if T has a fixed point, the iterates converge to one; which image that is, no theorem says",
        "holds": check.holds and bound <= 1,
        "margin": check.margin,
        "lipschitz_bound": bound,
        "largest_ratio_of_moves": growth(result),
    }
