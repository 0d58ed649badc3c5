"""PADNet's theorems: their inequalities, the runs that check them and the controls that break them."""

from __future__ import annotations

from itertools import product

import torch

from odlkit.certify import (
    Check,
    critical,
    descent,
    entry,
    error_condition,
    inequality,
    rate,
    row,
    settled,
    subgradient_bound,
)
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
from odlkit.propagate import Status, Trace, propagate


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


def theorem_1(size: int = 128) -> dict:
    """EPADNet, repaired: descent, Condition 1, subgradient bound and rate for p = 1, 0.8, 0; then criticality.

    Eq: PADNet Theorem 1.
    """
    rows, ends = [], []
    for (p, name), (kind, network) in product(zip(WEIGHT, IMAGES, strict=True), networks("rbf").items()):
        constants, result = deblur_run(name, size, p, network)
        rows.append(row(f"{name}, p = {p:g}", kind, theorem_1_checks(result.trace, constants), result))
    for p, (kind, network) in product((1.0, 0.0), networks("rbf").items()):
        problem, constants, result = run_to_the_end(p, network, size // 2)
        checks = [*theorem_1_checks(result.trace, constants), critical(problem, result, constants.step_size)]
        end = row(f"well-conditioned blur, p = {p:g}", kind, checks, result)
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
    return entry(rows, ends, [
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


def theorem_2(size: int = 128) -> dict:
    """IPADNet, repaired: the bounds behind the Cauchy sequence, with corrected constants and networks that are clipped.

    Eq: PADNet Theorem 2.
    """
    rows = []
    for name, (kind, network) in product(IMAGES, networks("conv", BOUND).items()):
        result = implicit_run(name, size, network)
        rows.append(row(name, kind, [*bounded_moves(result.trace, BOUND, IMPLICIT), settled(result.trace)], result))
    small, net = size // 2, networks("conv", BOUND)
    constant = implicit_run("camera", small, alternating(net["untrained"]), Schedule(25.0, 1.0), 100)
    loose = implicit_run("camera", small, net["adversary"], lambda k: (IMPLICIT(k)[0], 0.2), 100)
    constants = printed_constants(small)
    return entry(rows, [], [
        {"what": "constant penalty, weights of alternating sign: Condition 2 holds at every step, the iterates never settle",
         "violates": not settled(constant.trace).holds, "last_move": constant.trace["change_v"][-1].item()},
        {"what": "alpha held constant while rho grows: the moves no longer shrink with rho_k^(-1/2)",
         "violates": not settled(loose.trace).holds and not bounded_moves(loose.trace, BOUND, IMPLICIT)[0].holds,
         "last_move": loose.trace["change_v"][-1].item()},
        *({"what": f"the constant of Eq. {number} as printed", "violates": not printed.holds and right.holds,
           "ratio_to_printed": 1 - printed.margin, "ratio_to_corrected": 1 - right.margin}
          for number, (printed, right) in constants.items()),
    ])  # fmt: skip
