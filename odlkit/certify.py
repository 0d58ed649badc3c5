"""Each proposition as inequalities over a `Trace`, on instances of real images, with controls that must break it.

The check functions take the trace of any run, so they certify your own propagation as well as the ones here.  `run` plays
each proposition on pictures that ship inside scikit-image, with a trained, an untrained and an adversarial network; a
theorem that holds for every network must hold for all three.  An inequality that holds on instances proves no theorem; one
that fails refutes it.  What is particular to a paper is in `odlkit.propositions`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from odlkit.problem import Problem, norm_items
from odlkit.propagate import Result, Trace

PROPOSITIONS = {  # name -> the function that plays it, imported when it is played
    "padnet-theorem-1": "odlkit.propositions.padnet:theorem_1",
    "padnet-theorem-2": "odlkit.propositions.padnet:theorem_2",
    "podm-proposition-1": "odlkit.propositions.podm:proposition_1",
    "podm-proposition-2": "odlkit.propositions.podm:proposition_2",
    "podm-theorem-1": "odlkit.propositions.podm:theorem_1",
    "gdc-proposition-1": "odlkit.propositions.gdc:proposition_1",
    "gdc-proposition-2": "odlkit.propositions.gdc:proposition_2",
    "gdc-proposition-3": "odlkit.propositions.normalization:proposition_3",
    "dgunet-gradient-step": "odlkit.propositions.dgunet:gradient_step",
    "hodl-theorem-3-1": "odlkit.propositions.hodl:theorem_3_1",
    "hodl-theorem-3-2": "odlkit.propositions.hodl:theorem_3_2",
    "hodl-proposition-3-1": "odlkit.propositions.hodl:proposition_3_1",
}
NAMES = tuple(PROPOSITIONS)


@dataclass(frozen=True)
class Check:
    """One inequality over a run: ``holds`` iff ``margin >= 0``, the least relative room, found at row ``worst``."""

    name: str
    holds: bool
    margin: float
    worst: int


def inequality(name: str, left: Tensor, right: Tensor, floor: Tensor, scale: Tensor | None = None) -> Check:
    """``left <= right + floor`` for all rows and items ``(K, B)``, with room ``(right + floor - left) / scale``.

    ``floor`` is the round-off allowed; ``scale`` defaults to ``right + floor``, so the best margin is 1.  Anything not
    finite counts as violated.
    """
    scale = (right + floor if scale is None else scale).clamp_min(torch.finfo(torch.float64).tiny)
    room = (right + floor - left) / scale  # 0 / 0, a step that stood still, is room 0
    room = torch.where(torch.isfinite(room), room, -torch.inf)
    margin = room.min().item()
    return Check(name, margin >= 0, margin, int(room.min(dim=1).values.argmin()))


def descent(trace: Trace, kappa: float | Tensor, slack: float = 1e-13) -> Check:
    """``F(x^k) - F(x^{k+1}) >= kappa ||x^{k+1} - x^k||^2`` up to ``slack |F|``; the margin is relative to ``|F|``.

    ``kappa`` is a number, or ``(K, B)`` where each step has its own (``trace["kappa"]``).

    (A floor for energies that stay away from 0; near 0 the round-off of ``||A x - y||`` is relative to ``||y||``.)
    Eq: PADNet (21), repaired: ``kappa = mu - 1 / (2 tau) - C_E`` for convex f and any prior (`Constants.kappa`).
    """
    energy = trace.with_start("energy")
    scale = energy[:-1].abs()
    return inequality("descent", kappa * trace["change"].square(), energy[:-1] - energy[1:], slack * scale, scale)


def error_condition(trace: Trace, tolerance: float, slack: float = 1e-13) -> Check:
    """``||e^{k+1}|| <= C_E ||x^{k+1} - x^k||``, round-off relative to ``||x||``.  Eq: PADNet Condition 1, with (12)."""
    return inequality("error condition", trace["residual"], tolerance * trace["change"], slack * tolerance * trace["norm"])


def subgradient_bound(trace: Trace, bound: float | Tensor, slack: float = 1e-13) -> Check:
    """``||s^{k+1}|| <= bound ||x^{k+1} - x^k||`` for the recorded ``s^{k+1}`` in ``dF(x^{k+1})``; ``bound`` like kappa.

    Eq: PADNet (24), ``bound = mu + C_E``; PODM Theorem 1, ``bound`` of `odlkit.models.podm.Constants.bounds`.
    """
    return inequality("subgradient", trace["subgradient"], bound * trace["change"], slack * bound * trace["norm"])


def rate(trace: Trace, kappa: Tensor | float, slack: float = 1e-13) -> Check:
    """``min_{k < K} ||x^{k+1} - x^k||^2 <= (F(x^0) - F(x^K)) / (kappa K)`` for every K up to the run's length.

    Eq: PADNet (22), summed.
    """
    energy = trace.with_start("energy")
    count = torch.arange(1, len(trace) + 1, dtype=torch.float64)[:, None]
    best = trace["change"].square().cummin(0).values
    return inequality("rate", best, (energy[0] - energy[1:]) / (kappa * count), slack * energy[0].abs() / (kappa * count))


def settled(trace: Trace, tol: float = 1e-3) -> Check:
    """``||x^K - x^{K-1}|| <= tol ||x^K||``: what every Cauchy sequence does in the end, and no proof of convergence."""
    return inequality("settled", trace["change"][-1:], tol * trace["norm"][-1:], 0 * trace["norm"][-1:])


def critical(problem: Problem, result: Result, step: float, tol: float = 1e-6) -> Check:
    """The recorded subgradient and the prox residual at the fixed ``step`` are at most ``tol ||x||``.

    For a nonconvex prior the residual says more than a subgradient does (0 is critical for every ``|x|^p``, p < 1), and the
    more the larger the step: the limit of a propagation is a fixed point at its own step, not always at 1/L.
    """
    left = torch.maximum(problem.residual(result.x, step).cpu(), result.trace["subgradient"][-1])[None]
    right = tol * norm_items(result.x).cpu()[None]
    return inequality("critical", left, right, 0 * right)


def row(instance: str, network: str, checks: list[Check], result: Result) -> dict:
    """One run of a report: where, with which network, whether every check holds, the least margin, the acceptance."""
    rate_ = result.trace.acceptance_rate()
    return {"instance": instance, "network": network, "holds": all(c.holds for c in checks),
            "margin": min(c.margin for c in checks), "iterations": result.iterations,
            "acceptance_rate": None if rate_ != rate_ else rate_, "checks": [asdict(c) for c in checks]}  # fmt: skip


def entry(rows: list[dict], ends: list[dict], controls: list[dict]) -> dict:
    """One proposition's report from its runs, those driven until nothing moves, and its controls; see `run`."""
    judged = [row["acceptance_rate"] for row in rows if row["acceptance_rate"] is not None]
    return {
        "holds": all(row["holds"] for row in rows + ends),
        "margin": min(row["margin"] for row in rows),
        "instances": len({row["instance"] for row in rows}),
        "acceptance_rate": sum(judged) / len(judged) if judged else None,
        "control": {"what": "; ".join(c["what"] for c in controls), "violates": all(c["violates"] for c in controls)},
        "dtype": "float64",
        "details": rows,
        "to_the_end": ends,
        "controls": controls,
    }


def run(names: Iterable[str] | None = None, progress: bool = False) -> list[dict]:
    """Play each proposition (default: all) and report, one dictionary each, in plain numbers fit for JSON.

    ``name``, ``holds`` (every inequality on every instance and network), ``margin`` (least relative room of the main runs),
    ``instances``, ``acceptance_rate`` (share of network steps kept; ``None`` where nothing is judged), ``control`` (``what``
    was dropped, ``violates``: whether every control broke), ``dtype``, ``seconds``; and each run in ``details``,
    ``to_the_end`` (driven until nothing moves: their margins end at round-off) and ``controls``.
    Raises ``ValueError`` for a name that is not in `NAMES`.
    """
    chosen: Any = list(NAMES if names is None else names)
    for name in chosen:
        if name not in PROPOSITIONS:
            raise ValueError(f"name: expected one of {', '.join(NAMES)}, got {name!r}")
    if progress:
        from tqdm import tqdm

        chosen = tqdm(chosen, desc="certify")
    report = []
    for name in chosen:
        begun = time.perf_counter()
        module, function = PROPOSITIONS[name].split(":")
        played = getattr(import_module(module), function)()
        report.append({"name": name, **played, "seconds": round(time.perf_counter() - begun, 1)})
    return report
