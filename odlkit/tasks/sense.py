"""Compressive sensing: a picture from a few numbers for each block of 32x32, measured with a matrix that was learned.

`measure` and `recover` are the two halves; `sense` is a simulation: it measures a picture that is there and recovers it from
these numbers alone.  Each channel is a picture of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from odlkit import weights
from odlkit.models.dgunet import Sensing
from odlkit.operators import BlockSampling
from odlkit.priors import TV
from odlkit.problem import LeastSquares, Prior, Problem
from odlkit.propagate import Result, propagate
from odlkit.solvers import FISTA
from odlkit.tasks.deblur import wavelet_prior
from odlkit.tasks.dgunet import staged
from odlkit.tasks.report import FISTA_WORDS, Model, Outcome, check_finite, check_image, check_model, report
from odlkit.tasks.tiles import in_parts

# (1/2) ||A x - y||^2 + weight R: weight and steps, chosen on the validation part of train400 for the matrices at 10 and
# 25% together.  The minimisers are worse than where few steps lead, which counts most for the wavelets.
CHOSEN = {"fista-wavelet": (4e-3, 50), "fista-tv": (3e-3, 100)}
TOLERANCE = 1e-4  # relative change at which they stop


def networks() -> dict[float, str]:
    """Share of measurements -> name of the network for it, of those that are installed."""
    found = {name: card["network"] for name, card in weights.cards().items() if card["network"]["kind"] == "sensing"}
    return {about["ratio"]: name for name, about in found.items() if name == f"dgunet-cs-{round(100 * about['ratio'])}"}


def network(ratio: float) -> tuple[Sensing, str]:
    """The matrix with its network for that share, and their name.  Raises ``ValueError`` when there is none."""
    known = networks()
    if ratio not in known:
        raise ValueError(f"ratio: expected one of {', '.join(f'{r:g}' for r in sorted(known))}, got {ratio}")
    return weights.load(known[ratio]), known[ratio]  # type: ignore[return-value]


def measure(x: Tensor, operator: BlockSampling) -> Tensor:
    """``y = Phi vec(block)``: ``(B, C, H, W) -> (B C, M, h, w)``, the borders repeated to whole blocks."""
    height, width = x.shape[-2:]
    pad = (0, -width % operator.size, 0, -height % operator.size)
    return operator.A(nnf.pad(x.reshape(-1, 1, height, width), pad, mode="replicate"))


def sense(
    x: Tensor,
    ratio: float,
    model: str = "dgunet",
    *,
    tile: int | None = None,
    steps: int | None = None,
    progress: bool = False,
) -> tuple[Tensor, dict[str, Any]]:
    """Measure ``x`` ``(B, C, H, W)`` in [0, 1] and recover it: an image of its shape, and a report of the run.

    ``ratio`` is the share of measurements, one of `networks`; ``model`` is one of `MODELS`, all from the same measurements,
    without noise.  ``tile`` recovers squares one by one, as `odlkit.tasks.tiles.in_parts` has it, in whole blocks.  Raises
    ``ValueError`` for bad arguments.
    """
    check_image(x)
    return _run(x, True, ratio, model, tile, steps, progress)


def recover(
    y: Tensor,
    ratio: float,
    model: str = "dgunet",
    *,
    tile: int | None = None,
    steps: int | None = None,
    progress: bool = False,
) -> tuple[Tensor, dict[str, Any]]:
    """The image ``(B, 1, 32 h, 32 w)`` from measurements ``(B, M, h, w)`` by the matrix of that ratio, and a report.

    Raises ``ValueError`` as `sense` does, and for another number of measurements than the matrix has rows.
    """
    return _run(y, False, ratio, model, tile, steps, progress)


def _run(
    given: Tensor, picture: bool, ratio: float, model: str, tile: int | None, steps: int | None, progress: bool
) -> tuple[Tensor, dict[str, Any]]:
    """A picture, measured here, or measurements, recovered as a whole or in squares.

    For squares the numbers of a block are laid out in the place of its pixels.
    """
    clock = time.monotonic()
    check_model(model, MODELS)
    net, name = network(ratio)
    net = net.to(given)
    y = measure(given, net.operator) if picture else given
    net.check(y)
    check_finite(y)
    size, rows = net.operator.size, len(net.phi)

    def run(codes: Tensor) -> Outcome:
        part = nnf.pixel_unshuffle(codes, size)[:, :rows]
        return MODELS[model].run(net, part, steps, progress and tile is None)

    codes = nnf.pixel_shuffle(nnf.pad(y, (0, 0, 0, 0, 0, size**2 - rows)), size)
    x, outcomes = in_parts(run, codes, tile, progress=progress, multiple=size)
    about: dict[str, Any] = {"settings": {"ratio": ratio, "matrix": name, "tile": tile}}
    if picture:
        x = x[..., : given.shape[-2], : given.shape[-1]].reshape(given.shape)
        told = f"input: measured here, {y.numel()} numbers without noise for {x.numel()} values, each channel by itself"
        about |= {"input": {"measurements": list(y.shape)}, "notes": [told]}
    return x, report("cs", model, clock, outcomes, given, x, **about)


# The models: each gets the matrix with its network, of which the classical ones use the former only, and measurements.


PRIORS: dict[str, Callable[[Tensor, float], Prior]] = {
    "fista-wavelet": wavelet_prior,
    "fista-tv": lambda x, weight: TV(weight, tol=2e-3, warm_start=True),
}


def fista(
    operator: BlockSampling, y: Tensor, name: str, weight: float | None = None, steps: int | None = None, **run: Any
) -> Result:
    """Minimise ``||A x - y||^2 / 2 + weight R(x)``, R of that name in `PRIORS`, from ``A^T y / ||A||^2``.

    The start is one gradient step from 0.  ``weight`` and ``steps`` are those of `CHOSEN` by default; ``run`` goes to
    `odlkit.propagate.propagate`.
    """
    chosen = CHOSEN[name]
    back = operator.A_adjoint(y)
    problem = Problem(LeastSquares(operator, y), PRIORS[name](back[:1], chosen[0] if weight is None else weight))
    start = back / problem.lipschitz
    return propagate(FISTA(), problem, start, steps=steps or chosen[1], tol=TOLERANCE, **run)


def _classical(net: Sensing, y: Tensor, steps: int | None, progress: bool, name: str) -> Outcome:
    result = fista(net.operator, y, name, steps=steps, progress=progress)
    return Outcome(result.x, result, dict(FISTA_WORDS))


def _dgunet(net: Sensing, y: Tensor, steps: int | None, progress: bool) -> Outcome:
    return staged(net.net, y, net.operator, stages=steps)


def agree(operator: BlockSampling, x: Tensor, y: Tensor) -> Tensor:
    """``x + A^T (A A^T)^-1 (y - A x)``: the picture nearest to x that agrees with the measurements.

    Without noise the truth agrees too, so this brings no x farther from it.
    """
    phi = operator.phi.double()
    inverse = torch.linalg.solve(phi @ phi.T, phi)  # (Phi Phi^T)^-1 Phi: its transpose is the pseudo-inverse
    return x + BlockSampling(inverse.to(y)).A_adjoint(y - operator.A(x))


def _eightfold(net: Sensing, y: Tensor, steps: int | None, progress: bool) -> Outcome:
    """The mean over the symmetries T of the square of ``T^-1 net(T y, A T^-1)``, then `agree`.

    What A measures of x, ``A T^-1`` measures of T x: the same numbers, their blocks in other places.
    """
    from tqdm import tqdm

    outcomes, size = [], net.operator.size
    for turns, flip in tqdm(list(product(range(4), (False, True))), desc="dgunet-8", delay=3, disable=not progress):

        def T(z: Tensor, turns: int = turns, flip: bool = flip) -> Tensor:
            return torch.rot90(z.flip(-1) if flip else z, turns, (-2, -1))

        turned = BlockSampling(T(net.phi.view(-1, size, size)).reshape(net.phi.shape))
        outcomes.append(staged(net.net, T(y), turned, stages=steps))
        back = torch.rot90(outcomes[-1].x, -turns, (-2, -1))
        outcomes[-1].x = back.flip(-1) if flip else back
    outcomes[0].x = agree(net.operator, torch.stack([o.x for o in outcomes]).mean(0), y)
    return outcomes[0]


MODELS = {  # each run as run(net, y, steps, progress)
    "dgunet": Model(_dgunet, "DGUNet, trained together with the matrix"),
    "dgunet-8": Model(
        _eightfold, "DGUNet, the mean over the square's eight symmetries, made to agree with the measurements"
    ),
    "fista-wavelet": Model(
        partial(_classical, name="fista-wavelet"), "l1 on orthonormal wavelet coefficients by FISTA, the same measurements"
    ),
    "fista-tv": Model(partial(_classical, name="fista-tv"), "isotropic total variation by FISTA, the same measurements"),
}
