"""Optical flow: where each pixel of one frame has gone in the next.

The flow u has ``I_1(x + u(x)) = I_0(x)`` where both frames show x.  The paper warps I_1, although it says I_0, and calls the
energy convex, which it is not; see `odlkit.models.flow`.  Source: GDC, section VIII-B.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from odlkit import weights
from odlkit.models.flow import Estimate, Settings, estimate
from odlkit.problem import norm_items
from odlkit.tasks.deblur_gdc import proposition_1
from odlkit.tasks.report import Outcome, check_finite, check_model, formula, report, weakest

ALONE = Settings(warps=0)


def optical_flow(y: Tensor, model: str = "gdc", *, second: Tensor, progress: bool = False) -> tuple[Tensor, dict[str, Any]]:
    """The flow ``(B, 2, H, W)`` in pixels from the frame ``y`` to the frame ``second``, and a report of the run.

    Frames are ``(B, 3, H, W)`` or gray ``(B, 1, H, W)`` in [0, 1], of any and the same size; ``model`` is one of `MODELS`.
    Raises ``ValueError`` for bad arguments.
    """
    clock = time.monotonic()
    check_model(model, MODELS)
    for name, frame in (("input", y), ("second", second)):
        if frame.dim() != 4 or frame.shape[1] not in (1, 3) or not frame.is_floating_point():
            raise ValueError(f"{name}: expected floating point (B, 1 or 3, H, W), got {tuple(frame.shape)} of {frame.dtype}")
    if (len(y), *y.shape[2:]) != (len(second), *second.shape[2:]):
        sizes = ("x".join(map(str, frame.shape[2:])) for frame in (y, second))
        raise ValueError("second: expected a frame of the size of the input, {}, got {}".format(*sizes))
    check_finite(y)
    if not bool(torch.isfinite(second).all()):
        raise ValueError("second: expected finite numbers, got NaN or infinity")
    found = MODELS[model].run(y.expand(-1, 3, -1, -1), second.to(y).expand(-1, 3, -1, -1), progress)
    length = norm_items(found.flow.movedim(1, -1).flatten(0, -2)).view(len(y), -1)
    ends = {"mean": length.mean(1).tolist(), "largest": length.amax(1).tolist()}
    warps = outcomes(found)
    return found.flow, report("flow", model, clock, warps, y, found.flow, **told(found, warps), flow=ends)


def outcomes(found: Estimate) -> list[Outcome]:
    """One for each warp; a single one without a guarantee for a method that has no control."""
    warps = [Outcome(run.x, run, proposition_1(run)) for runs in found.runs for run in runs]
    return warps or [formula(found.flow, "nothing is checked: no theorem")]


def told(found: Estimate, warps: list[Outcome]) -> dict[str, Any]:
    """Entries of the report: Proposition 1 in every warp, each level's energies, what became of the network's moves."""
    if not any(found.runs):
        return {}
    proved, levels = [one.certificate for one in warps], []
    for energies, kept, runs in zip(found.energies, found.kept, found.runs, strict=True):
        names = ("start", "end") if len(energies) == 2 else ("start", "network", "end")
        level: dict[str, Any] = {name: value.tolist() for name, value in zip(names, energies, strict=True)}
        levels.append(level | {"warps": len(runs), "network_kept": None if kept is None else kept.tolist()})
    moves = [kept for kept in found.kept if kept is not None]
    return {
        "iterations": len(proved),
        "levels": levels,
        "network": {"kept": int(sum(k.sum() for k in moves)), "refused": int(sum((~k).sum() for k in moves))},
        "certificate": {
            "guarantee": proved[0]["guarantee"],
            "statement": "the energy linearised at a warp's start falls in every warp; the energy itself is not convex, and "
            "neither the median between warps nor the next level is covered",
            "of": "one warp at a time",
            **weakest(proved),
            "kappa": min(one["kappa"] for one in proved),
        },
    }


def _network(like: Tensor) -> Any:
    return weights.load("gdc-flow").to(like)


def _gdc(first: Tensor, second: Tensor, progress: bool) -> Estimate:
    return estimate(first, second, _network(first), progress=progress)


def _corrective(first: Tensor, second: Tensor, progress: bool) -> Estimate:
    return estimate(first, second, progress=progress)


def _generative(first: Tensor, second: Tensor, progress: bool) -> Estimate:
    return estimate(first, second, _network(first), ALONE, checked=False, progress=progress)


def tv_l1(first: Tensor, second: Tensor, progress: bool = False, **settings: Any) -> Estimate:
    """TV-L1 of scikit-image on gray values, with its defaults or other ``settings``."""
    from skimage.registration import optical_flow_tvl1

    grays = [frame.mean(1).cpu().double().numpy() for frame in (first, second)]
    parts = [torch.from_numpy(optical_flow_tvl1(a, b, dtype=float, **settings)).flip(0) for a, b in zip(*grays, strict=True)]
    return Estimate(torch.stack(parts).to(first), [], [], [])


@dataclass(frozen=True)
class Method:
    """One way to estimate a flow: ``run(first, second, progress)`` on frames ``(B, 3, H, W)``."""

    run: Callable[[Tensor, Tensor, bool], Estimate]
    what: str


MODELS = {
    "gdc": Method(_gdc, "GDC: a network proposes on every level, TV corrects; both under the control of Algorithm 1"),
    "gdc-tv": Method(_corrective, "the corrective module alone, coarse to fine; descent in every warp by Proposition 1"),
    "network": Method(_generative, "the generative module alone: features, warping, correlation; nothing checked"),
    "tvl1": Method(tv_l1, "TV-L1 of scikit-image, its defaults"),
}
