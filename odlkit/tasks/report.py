"""What every task needs: grids of a good size, what a model hands back, and the report of a run."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from odlkit.certify import descent, error_condition
from odlkit.problem import norm_items
from odlkit.propagate import Result, State, Status, Trace

ROUND_OFF = 1e-5  # relative, what certificates grant single precision


@dataclass
class Outcome:
    """What a model hands back: the restored grid, its propagation, and the words and numbers of its guarantee."""

    x: Tensor
    result: Result
    certificate: dict[str, Any]


@dataclass(frozen=True)
class Model:
    """One way to restore: what its task calls, which returns an `Outcome` on the task's grid, and what it is."""

    run: Callable[..., Outcome]
    what: str


FISTA_WORDS = {
    "guarantee": "FISTA on a convex energy, step size 1 / L (known theory)",
    "statement": "F(x^k) - min F <= 2 L ||x^0 - x*||^2 / (k + 1)^2",
    "holds": True,
}


def unproved(statement: str) -> dict[str, Any]:
    """The certificate of a run that no theorem covers."""
    return {"guarantee": "none", "statement": statement, "holds": None}


def unit_kernel(kernel: Tensor, limit: tuple[int, int], than: str) -> tuple[Tensor, list[str]]:
    """``kernel`` ``(h, w)`` scaled to sum 1 in float64, and notes.  Raises ``ValueError`` unless it can be a blur kernel.

    ``limit`` is the largest size, that of ``than`` ("the image", say).
    """
    if kernel.dim() != 2 or kernel.numel() == 0:
        raise ValueError(f"kernel: expected a two-dimensional array of real numbers, got shape {tuple(kernel.shape)}")
    kernel = kernel.detach().to(torch.float64)
    if not bool(torch.isfinite(kernel).all()):
        raise ValueError("kernel: expected finite numbers, got NaN or infinity")
    if kernel.shape[0] > limit[0] or kernel.shape[1] > limit[1]:
        sizes = f"{kernel.shape[0]}x{kernel.shape[1]} against {limit[0]}x{limit[1]}"
        raise ValueError(f"kernel: expected one no larger than {than}, got {sizes}")
    total = kernel.sum().item()
    if not total > 1e-9 * kernel.abs().sum().item():
        raise ValueError(f"kernel: expected numbers with a positive sum, got a sum of {total:.3g}")
    return kernel / total, [] if abs(total - 1) < 1e-3 else [f"kernel: its sum was {total:.6g}, normalised to 1"]


def good_size(n: int, block: int = 8) -> int:
    """The least multiple of ``block`` from ``n`` on with no prime factor above 5: fast transforms, whole wavelet levels."""

    def smooth(m: int) -> bool:
        for p in (2, 3, 5):
            while m % p == 0:
                m //= p
        return m == 1

    n = -(-n // block) * block
    while not smooth(n):
        n += block
    return n


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Status, iterations, energies, certificate and decisions; of several runs the sums, and the weakest guarantee."""
    worst = max(outcomes, key=lambda o: (o.certificate["holds"] is not True, o.result.residual))
    traces = [o.result.trace for o in outcomes]
    decided = torch.cat([t["accepted"].flatten() for t in traces if "accepted" in t] or [torch.empty(0)])
    decided = decided[~decided.isnan()]  # steps without a decision, such as a start
    energies = traces[0].with_start("energy").sum(1).tolist() if len(traces) == 1 and "energy" in traces[0] else []
    return {
        "status": worst.result.status.value,
        "relative_change": worst.result.residual,
        "iterations": max(o.result.iterations for o in outcomes),
        "energies": energies,  # of all channels together; none for a model without an energy, nor for several runs
        "certificate": dict(worst.certificate) | ({"runs": len(outcomes)} if len(outcomes) > 1 else {}),
        "accepted": int(decided.sum()) if len(decided) else None,
        "rejected": int((1 - decided).sum()) if len(decided) else None,
    }


def weakest(told: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One verdict on several certified runs: whether all hold, the least margin, and the mean share of accepted moves."""
    return {
        "holds": all(one["holds"] for one in told),
        "margin": min(one["margin"] for one in told),
        "acceptance_rate": sum(one["acceptance_rate"] for one in told) / len(told),
    }


def formula(x: Tensor, statement: str, found: Tensor | None = None) -> Outcome:
    """What a formula hands back: nothing is iterated or proved.  ``found`` is what it estimates, where that is not ``x``."""
    found = x if found is None else found
    return Outcome(x, Result(found, Status.CONVERGED, 0, 0.0, Trace(), State(found)), unproved(statement))


def recorded(images: Sequence[Tensor], x: Tensor) -> Result:
    """Images made one after the other from ``x``, not by `propagate`, as a run: ``change`` and ``norm`` of each."""
    trace, relative = Trace(), torch.inf
    for image in images:
        change = norm_items(image - x)
        trace.rows.append({"change": change, "norm": norm_items(image)})
        relative, x = (change / norm_items(x).clamp_min(1e-30)).max().item(), image
    status = Status.STEP_LIMIT if bool(torch.isfinite(x).all()) else Status.NOT_FINITE
    return Result(x, status, len(images), relative, trace, State(x, len(images)))


def report(
    task: str, model: str, clock: float, outcomes: list[Outcome], y: Tensor, x: Tensor, **more: Any
) -> dict[str, Any]:
    """The report of a run that began at ``clock`` (of ``time.monotonic``): `summary`, sizes, settings, notes, versions.

    ``more`` replaces or adds entries; what it holds under ``input`` is added to the shape of ``y``.
    """
    return summary(outcomes) | {
        "task": task,
        "model": model,
        "seconds": round(time.monotonic() - clock, 3),
        "device": str(y.device),
        "output": {"shape": list(x.shape)},
        "settings": {},
        "notes": [],
        "versions": versions(),
        **more,
        "input": {"shape": list(y.shape), **more.get("input", {})},
    }


def check_model(model: str, known: Iterable[str]) -> None:
    """Raise ``ValueError`` unless the model is one of the task's."""
    if model not in known:
        raise ValueError(f"model: expected one of {', '.join(known)}, got {model!r}")


def check_image(y: Tensor, channels: Sequence[int] | None = None) -> None:
    """Raise ``ValueError`` unless ``y`` is ``(B, C, H, W)``, C one of ``channels`` if these are given, and finite."""
    if y.dim() != 4 or not y.is_floating_point() or (channels and y.shape[1] not in channels):
        C = " or ".join(map(str, channels)) if channels else "C"
        raise ValueError(f"input: expected a floating point tensor (B, {C}, H, W), got {tuple(y.shape)} of {y.dtype}")
    check_finite(y)


def check_sigma(sigma: float | None) -> None:
    """Raise ``ValueError`` unless the noise level, if one is given, is in [0, 1)."""
    if sigma is not None and not 0 <= float(sigma) < 1:
        raise ValueError(f"sigma: expected a number in [0, 1), the noise level for values in [0, 1], got {sigma}")


def check_finite(y: Tensor) -> None:
    """Raise ``ValueError`` for NaN or infinity."""
    if not bool(torch.isfinite(y).all()):
        raise ValueError("input: expected finite numbers, got NaN or infinity")


def certified_descent(result: Result, kappa: Tensor | float, tolerance: float, words: dict[str, str]) -> dict[str, Any]:
    """That the energy fell by ``kappa ||change||^2`` at every step and the error condition held, up to round-off.

    ``kappa`` is one constant or ``(K, B)``, that of the branch taken; of several the smallest is reported.
    """
    fall = descent(result.trace, kappa, slack=ROUND_OFF)
    condition = error_condition(result.trace, tolerance, slack=ROUND_OFF)
    return words | {
        "holds": fall.holds and condition.holds,
        "margin": fall.margin,
        "kappa": kappa.min().item() if isinstance(kappa, Tensor) else kappa,
        "acceptance_rate": result.trace.acceptance_rate(),
        "subgradient_norm": result.trace["subgradient"][-1].max().item(),
    }


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    from odlkit import __version__

    return {"odlkit": __version__, "torch": torch.__version__, "python": platform.python_version()}
