"""Each proposition as inequalities over a `Trace`, on instances of real images, with controls that must break it.

The check functions take the trace of any run, so they certify your own propagation as well as the ones here.  `run` plays
each proposition on pictures that ship inside scikit-image, with a trained, an untrained and an adversarial network; a
theorem that holds for every network must hold for all three.  An inequality that holds on instances proves no theorem; one
that fails refutes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from odlkit.instances import (
    BOUND,
    IMAGES,
    IMPLICIT,
    WEIGHT,
    alternating,
    deblur_run,
    haar_band,
    implicit_run,
    networks,
    pushing,
    run_to_the_end,
    two_cycle,
    unchecked_run,
)  # fmt: skip
from odlkit.models.padnet import Constants, Schedule
from odlkit.problem import Problem, norm_items
from odlkit.propagate import Result, Status, Trace, propagate


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


def descent(trace: Trace, kappa: float, slack: float = 1e-13) -> Check:
    """``F(x^k) - F(x^{k+1}) >= kappa ||x^{k+1} - x^k||^2`` up to ``slack |F|``; the margin is relative to ``|F|``.

    (A floor for energies that stay away from 0; near 0 the round-off of ``||A x - y||`` is relative to ``||y||``.)
    Eq: PADNet (21), repaired: ``kappa = mu - 1 / (2 tau) - C_E`` for convex f and any prior (`Constants.kappa`).
    """
    energy = trace.with_start("energy")
    scale = energy[:-1].abs()
    return inequality("descent", kappa * trace["change"].square(), energy[:-1] - energy[1:], slack * scale, scale)


def error_condition(trace: Trace, tolerance: float, slack: float = 1e-13) -> Check:
    """``||e^{k+1}|| <= C_E ||x^{k+1} - x^k||``, round-off relative to ``||x||``.  Eq: PADNet Condition 1, with (12)."""
    return inequality("error condition", trace["residual"], tolerance * trace["change"], slack * tolerance * trace["norm"])


def subgradient_bound(trace: Trace, bound: float, slack: float = 1e-13) -> Check:
    """``||s^{k+1}|| <= bound ||x^{k+1} - x^k||`` with the recorded ``s^{k+1}`` in ``dF(x^{k+1})``.

    Eq: PADNet (24), ``bound = mu + C_E``.
    """
    return inequality("subgradient", trace["subgradient"], bound * trace["change"], slack * bound * trace["norm"])


def rate(trace: Trace, kappa: float, slack: float = 1e-13) -> Check:
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


def bounded_moves(trace: Trace, bound: float, schedule: Schedule, printed: bool = False, slack=1e-12) -> list[Check]:
    """The inequalities behind Theorem 2 for a run of `Implicit`, with ``C_N = bound`` and the measured ``M_k``.

    Eq: PADNet (31) ``||nu^{k+1}|| <= C_N alpha_k``; (32) ``||v^{k+1} - v^k|| <= C_N alpha_k + M_k / rho_k``; (33) corrected,
    ``||nu^{k+1} - nu^k|| <= C_N (1 + sqrt(g)) alpha_k``; (34) corrected, for k >= 1,
    ``||u^{k+1} - u^k|| <= (C_N (2 + 2 sqrt(g) + g) + M / sqrt(rho_0)) alpha_k``; and, for a growth g > 1, the tail
    ``sum_{j >= k} ||v^{j+1} - v^j|| <= C_N alpha_k / (1 - g^{-1/2}) + M / (rho_k (1 - 1/g))``.  ``printed`` puts
    the paper's ``2 C_N`` and ``(3 + 2 g) C_N + M / rho_0`` into (33) and (34).  ``alpha_k = rho_k^{-1/2}`` is that of
    ``schedule``, ``M_k`` the trace's ``gradient_fk`` (`measure_gradient`), else what the step recorded from u's optimality.
    """
    g, rho0 = float(schedule.growth), float(schedule.rho0)
    rho = torch.tensor([schedule(k)[0] for k in range(len(trace))], dtype=torch.float64)[:, None]
    alpha, floor = rho**-0.5, slack * trace["norm"]
    gradient = trace["gradient_fk"] if "gradient_fk" in trace else trace["fidelity_gradient"]
    sup = gradient.amax(0)
    c33, c34, m34 = bound * (1 + g**0.5), bound * (2 + 2 * g**0.5 + g), sup / rho0**0.5
    if printed:
        c33, c34, m34 = 2 * bound, bound * (3 + 2 * g), sup / rho0
    checks = [
        inequality("dual (31)", trace["dual"], bound * alpha, floor),
        inequality("move of v (32)", trace["change_v"], bound * alpha + gradient / rho, floor),
        inequality("move of nu (33)", trace["change_nu"], c33 * alpha, floor),
        inequality("move of u (34)", trace["change_u"][1:], ((c34 + m34) * alpha)[1:], floor[1:]),
    ]
    if g > 1:
        tail = trace["change_v"].flip(0).cumsum(0).flip(0)
        right = bound * alpha / (1 - g**-0.5) + sup / rho / (1 - 1 / g)
        checks.append(inequality("tail of v", tail, right, len(trace) * floor))
    return checks


def theorem_1_checks(trace: Trace, constants: Constants) -> list[Check]:
    """All inequalities of the repaired Theorem 1 for a run of `Explicit` with these constants.  Eq: PADNet Theorem 1."""
    return [
        descent(trace, constants.kappa),
        error_condition(trace, constants.tolerance),
        subgradient_bound(trace, constants.moreau + constants.tolerance),
        rate(trace, constants.kappa),
    ]


def _row(instance: str, network: str, checks: list[Check], result: Result) -> dict:
    rate_ = result.trace.acceptance_rate()
    return {"instance": instance, "network": network, "holds": all(c.holds for c in checks),
            "margin": min(c.margin for c in checks), "iterations": result.iterations,
            "acceptance_rate": None if rate_ != rate_ else rate_, "checks": [asdict(c) for c in checks]}  # fmt: skip


def padnet_theorem_1(size: int = 128) -> dict:
    """EPADNet, repaired: descent, Condition 1, subgradient bound and rate for p = 1, 0.8, 0; then criticality.

    Eq: PADNet Theorem 1.
    """
    rows, ends = [], []
    for (p, name), (kind, network) in product(zip(WEIGHT, IMAGES, strict=True), networks("rbf").items()):
        constants, result = deblur_run(name, size, p, network)
        rows.append(_row(f"{name}, p = {p:g}", kind, theorem_1_checks(result.trace, constants), result))
    for p, (kind, network) in product((1.0, 0.0), networks("rbf").items()):
        problem, constants, result = run_to_the_end(p, network, size // 2)
        checks = [*theorem_1_checks(result.trace, constants), critical(problem, result, constants.step_size)]
        end = _row(f"well-conditioned blur, p = {p:g}", kind, checks, result)
        ends.append(end | {"energy": result.trace["energy"][-1].item()})

    problem, constants, free = unchecked_run(size // 2)
    lost = critical(problem, free, constants.step_size)
    _, _, diverged = unchecked_run(size // 2, step_size=1.0)
    a = haar_band(size)
    cycle_problem, step = two_cycle(a, 0.008)
    cycle = propagate(step, cycle_problem, torch.zeros_like(a), steps=50)
    mu, c = step.constants.moreau, step.constants.tolerance
    fall, condition = descent(cycle.trace, mu / 4 - c**2 / mu), error_condition(cycle.trace, c)
    energies = cycle.trace["energy"][-2:, 0].tolist()
    return _entry(rows, ends, [
        {"what": "no error condition and no fallback, constant penalty: the iterates settle at a point that is not critical",
         "violates": settled(free.trace, 1e-7).holds and not lost.holds, "relative_change": free.residual,
         "subgradient": free.trace["subgradient"][-1].item()},
        {"what": "the unit step of Eq. 7 at L = 1, unchecked: divergence",
         "violates": diverged.status is Status.DIVERGED, "iterations": diverged.iterations},
        {"what": "mu tau < 1 and the linear network A(x) = -5x: Condition 1 holds with e = 0, Eq. 21 fails, a two-cycle",
         "violates": condition.holds and not fall.holds and not settled(cycle.trace).holds,
         "coefficients": a.numel(), "energies": energies, "error": cycle.trace["residual"].max().item()},
    ])  # fmt: skip


def printed_constants(size: int) -> dict[str, list[Check]]:
    """The two constants that the paper printed too small, next to the corrected ones, on runs that tell them apart."""
    flip, slow = Schedule(25.0, 4.0), Schedule(100.0, 1.1)
    shape = (1, 1, size, size)
    third = implicit_run("camera", size, alternating(pushing(BOUND, shape)), flip, 20).trace
    fourth = implicit_run("camera", size, pushing(1e-3, shape), slow, 20).trace
    return {"33": [bounded_moves(third, BOUND, flip, printed)[2] for printed in (True, False)],
            "34": [bounded_moves(fourth, 1e-3, slow, printed)[3] for printed in (True, False)]}  # fmt: skip


def padnet_theorem_2(size: int = 128) -> dict:
    """IPADNet, repaired: the bounds behind the Cauchy sequence, with corrected constants and networks that are clipped.

    Eq: PADNet Theorem 2.
    """
    rows = []
    for name, (kind, network) in product(IMAGES, networks("conv", BOUND).items()):
        result = implicit_run(name, size, network)
        rows.append(_row(name, kind, [*bounded_moves(result.trace, BOUND, IMPLICIT), settled(result.trace)], result))
    small, net = size // 2, networks("conv", BOUND)
    constant = implicit_run("camera", small, alternating(net["untrained"]), Schedule(25.0, 1.0), 100)
    loose = implicit_run("camera", small, net["adversary"], lambda k: (IMPLICIT(k)[0], 0.2), 100)
    constants = printed_constants(small)
    return _entry(rows, [], [
        {"what": "constant penalty, weights of alternating sign: Condition 2 holds at every step, the iterates never settle",
         "violates": not settled(constant.trace).holds, "last_move": constant.trace["change_v"][-1].item()},
        {"what": "alpha held constant while rho grows: the moves no longer shrink with rho_k^(-1/2)",
         "violates": not settled(loose.trace).holds and not bounded_moves(loose.trace, BOUND, IMPLICIT)[0].holds,
         "last_move": loose.trace["change_v"][-1].item()},
        *({"what": f"the constant of Eq. {number} as printed", "violates": not printed.holds and right.holds,
           "ratio_to_printed": 1 - printed.margin, "ratio_to_corrected": 1 - right.margin}
          for number, (printed, right) in constants.items()),
    ])  # fmt: skip


def _entry(rows: list[dict], ends: list[dict], controls: list[dict]) -> dict:
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


PROPOSITIONS: dict[str, Callable[[], dict]] = {"padnet-theorem-1": padnet_theorem_1, "padnet-theorem-2": padnet_theorem_2}
NAMES = tuple(PROPOSITIONS)


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
        report.append({"name": name, **PROPOSITIONS[name](), "seconds": round(time.perf_counter() - begun, 1)})
    return report
