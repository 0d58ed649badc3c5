"""HODL's Theorems 3.1 and 3.2 and Proposition 3.1 on instances: a whole grid of omega runs as one batch; and the controls.

Theorem 3.1 is certified with a constant that is computed.  With ``p`` the best fixed point, ``l(p, w) = phi(w)``, T averaged
and ``s_k <= lambda_min(G) / L_l``, each step of aHODL satisfies, with norms in G,

    ||u+ - p||^2 <= ||u - p||^2 - 2 mu s_k (l(u) - phi) + mu s_k^2 ||G^-1 l'(u)||^2 - (1-mu) (1-alpha)/alpha ||u - T u||^2,

and summing it bounds the residuals: see `rate_constant`.  Everything is float64.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from odlkit.bilevel import Implicit, LowerLevelError, hypergradient
from odlkit.certify import Check, entry, inequality
from odlkit.models import hodl
from odlkit.models.hodl import Diagonal
from odlkit.networks.nonexpansive import soft
from odlkit.propositions.hodl_cases import (
    ROTATION,
    SHARE,
    Case,
    column,
    conjugated_network,
    continuum,
    cubic,
    linear,
    mosaic,
    phi,
    scalar,
    settle,
    slope_of_best,
    smooth_deblurring,
    turning,
    wavelet_deblurring,
    wide,
)  # fmt: skip

# -- Theorem 3.1


def play(case: Case, mu: float, steps: int, s: Any = None) -> dict[str, Tensor]:
    """A run of aHODL: rows k = 0 ... K of the squared residual, the squared distance to p, l, the slope ||G^-1 l'||; s_k."""
    step, T, metric = case.map(mu, s), case.map(), case.metric
    number = hodl.outer_step(metric, case.smooth, SHARE) if s is None else s
    u, rows = case.start, []
    with torch.no_grad():
        for k in range(steps + 1):
            slope = metric.inverse(torch.func.grad(case.upper)(u, case.omega))
            residual, distance = metric.norm(u - T(u, case.omega, k)), metric.norm(u - case.best)
            size = torch.as_tensor(number(k) if callable(number) else number / (k + 2), dtype=torch.float64)
            rows.append(torch.stack([residual**2, distance**2, case.loss(u, case.omega), metric.norm(slope),
                                     size.expand(len(u)), metric.norm(u) ** 2]))  # fmt: skip
            u = step(u, case.omega, k)
    names = ("residual", "distance", "value", "slope", "s", "norm")
    return dict(zip(names, torch.stack(rows, 1), strict=True))


def rate_constant(case: Case, mu: float) -> Tensor:
    """C of ``||u^k - T u^k||_G^2 <= C sqrt(1 + ln(1 + k)) / k^(1/4)``, k >= 1, for each omega: from the start and p alone.

    With ``a = (1 - mu)(1 - alpha)/alpha``, ``c = mu / (1 - mu)``, ``R_K^2 = ||u^0 - p||^2 + 2 mu s phi ln(1 + K)``, l >= 0:
    the inequality of one step bounds ``||u^k - p||`` by R_K, the sum of the squared residuals by ``R_K^2 / a``, and so the
    slopes ``||G^-1 l'(u^k)||`` by ``M_K = ||G^-1 l'(p)|| + R_K L_l / lambda_min(G)``.  Since ``||u^{k+1} - u^k||`` grows
    only by the change of s, ``||u^K - T u^K|| <= ||u^j - T u^j|| + 2 c M_K s_j`` for j < K.  Squared and summed over j,
    ``K ||u^K - T u^K||^2 <= 2 R_K^2 / a + 8 c^2 M_K^2 sum s_j^2 <= A + B ln(1 + K)``, with ``sum s_j^2 <= 0.645 s^2``.
    Eq: HODL Theorem 3.1.
    """
    metric, steep = case.metric, case.smooth / case.metric.least
    s, a, c = SHARE / steep, (1 - mu) * (1 - case.alpha) / case.alpha, mu / (1 - mu)
    start = metric.norm(case.start - case.best) ** 2
    slope = metric.norm(metric.inverse(torch.func.grad(case.upper)(case.best, case.omega)))
    factor = 2 / a + 16 * 0.645 * (c * s * steep) ** 2  # of R_K^2; M_K^2 is at most 2 (slope^2 + steep^2 R_K^2)
    constant = factor * start + 16 * 0.645 * (c * s * slope) ** 2
    return math.sqrt(1 + math.log(2)) * torch.maximum(constant, factor * 2 * mu * s * phi(case))


def step_check(case: Case, run: dict[str, Tensor], mu: float, slack: float = 1e-13) -> Check:
    """The inequality of one step, at the head of this module.  Eq: HODL Theorem 3.1, (4)."""
    gap, s, before = run["value"] - phi(case), run["s"], run["distance"][:-1]
    gain = -2 * mu * s * gap + mu * s**2 * run["slope"] ** 2 - (1 - mu) * (1 - case.alpha) / case.alpha * run["residual"]
    scale = slack * (run["norm"][:-1] + case.metric.norm(case.best) ** 2)
    return inequality("one step", run["distance"][1:], before + gain[:-1], scale, before + scale)


def rate_check(case: Case, run: dict[str, Tensor], mu: float) -> Check:
    """``sup_w ||u^k - T u^k||^2 k^(1/4) / sqrt(1 + ln(1 + k)) <= C`` for k >= 1, one C for all omega.

    Eq: HODL Theorem 3.1.
    """
    k = torch.arange(1, len(run["residual"]), dtype=torch.float64)[:, None]
    scaled = (run["residual"][1:] * k**0.25 / (1 + (1 + k).log()).sqrt()).amax(1, keepdim=True)
    bound = rate_constant(case, mu).amax().expand_as(scaled)
    return inequality("rate", scaled, bound, 0 * bound)


def value_checks(case: Case, last: Tensor, first: Tensor) -> list[Check]:
    """``sup |phi_K - phi|``, ``phi(w_K) - min phi`` with ``w_K = argmin phi_K``, and ``|min phi_K - min phi|``, on the grid.

    Each at most ``tol sup |phi_0 - phi|``; ``last`` and ``first`` are phi_K and phi_0, ``(B,)``.  Eq: HODL Theorem 3.1, (7).
    """
    exact = phi(case)
    room = case.tol * (first - exact).abs().amax()[None, None]
    chosen = exact[last.argmin()] - exact.amin()
    return [inequality("values", (last - exact).abs().amax()[None, None], room, 0 * room),
            inequality("minimiser", chosen[None, None], room, 0 * room),
            inequality("minimum", (last.amin() - exact.amin()).abs()[None, None], room, 0 * room)]  # fmt: skip


def theorem_3_1_checks(case: Case, run: dict[str, Tensor], mu: float) -> list[Check]:
    """Both parts.  Eq: HODL Theorem 3.1."""
    values = value_checks(case, run["value"][-1], run["value"][0])
    return [step_check(case, run, mu), rate_check(case, run, mu), *values]


def line(case: Case, mu: float, checks: list[Check], steps: int, **more: Any) -> dict:
    """One run of a report; nothing is judged, so there is no acceptance rate."""
    return {"instance": case.name, "network": f"mu = {mu:g}", "holds": all(c.holds for c in checks),
            "margin": min(c.margin for c in checks), "iterations": steps, "acceptance_rate": None,
            "checks": [asdict(c) for c in checks], **more}  # fmt: skip


def learned(mu: float, steps: int, s: Any = None, extra: float = 0.0, start: float = 0.0) -> tuple[Tensor, Tensor]:
    """``argmin_w phi_K`` and ``min phi_K`` of `continuum`, exact: phi_K is a parabola, so three omega tell it.

    ``s`` may be a function of k that returns ``(S, 1)``: S schedules at once, ``(S,)`` each.
    """
    count = len(s(0)) if callable(s) else 1
    case = continuum(torch.tensor([0.0, 1.0, 2.0]).repeat(count), extra, start)
    step, u = case.map(mu, (lambda k: s(k).repeat_interleave(3, 0)) if callable(s) else s), case.start
    with torch.no_grad():
        for k in range(steps):
            u = step(u, case.omega, k)
    f = case.loss(u, case.omega).view(count, 3)
    bend = (f[:, 2] - 2 * f[:, 1] + f[:, 0]) / 2
    slope = f[:, 1] - f[:, 0] - bend
    return -slope / (2 * bend), f[:, 0] - slope**2 / (4 * bend)


def schedules(k: int) -> Tensor:
    """s_k as Theorem 3.1 has it; constant, large and small; summable.  ``(4, 1)``, the paper's k one more than ours."""
    return column([SHARE / (k + 2), SHARE, 0.1, SHARE / (k + 2) ** 2])


def broken_maps(mu: float) -> list[dict]:
    """Controls that drop what T has to be: an expansive D, no averaging, no conjugation."""
    metric = Diagonal(torch.tensor([1.0, 100.0]).double())
    net, rotation = linear(ROTATION), 0.75**0.5 * torch.eye(2).double() + 0.5 * ROTATION
    cases = {
        "an expansive D: a gradient step of 12 / L": (wide(12.0), 60),
        "an expansive D: a rotation by 30 degrees times 2": (turning("", linear(2 * rotation), 0.5), 100),
        "alpha = 1: a rotation by a right angle never settles": (turning("", net, 1.0), 400),
        "no conjugation: a network that is non-expansive in l2 before a step that is so in G":
            (turning("", hodl.compose(hodl.conjugated(net, metric), net), 0.5, metric), 40),
    }  # fmt: skip
    found = []
    for what, (case, steps) in cases.items():
        mixed = 0.0 if case.alpha == 1 else mu
        run = play(case, mixed, steps)
        judged = replace(case, alpha=min(case.alpha, 0.5))  # alpha = 1 leaves no constant: that of 1/2
        found.append({"what": what, "violates": not rate_check(judged, run, mixed).holds, "iterations": steps,
                      "last": run["residual"][-1].max().item(),
                      "constant": rate_constant(judged, mixed).max().item()})  # fmt: skip
    return found


def theorem_3_1() -> dict:
    """Five problems, two of them continua of fixed points on a grid of omega; what happens without each hypothesis.

    Eq: HODL Theorem 3.1.
    """
    rows = []
    for case, mu, steps in ((continuum(torch.linspace(0, 2, 21)), 0.5, 1000), (wide(), 0.5, 1500), (mosaic(), 0.5, 400),
                            (wavelet_deblurring(), 0.5, 400), (wavelet_deblurring(), 0.1, 300)):  # fmt: skip
        run = play(case, mu, steps)
        k = torch.arange(1, steps + 1, dtype=torch.float64)[:, None]
        measured = (run["residual"][1:] * k**0.25 / (1 + (1 + k).log()).sqrt()).max().item()
        known = {
            "measured": measured,
            "constant": rate_constant(case, mu).max().item(),
            "gap": (run["value"][-1] - phi(case)).abs().max().item(),
        }
        rows.append(line(case, mu, theorem_3_1_checks(case, run, mu), steps, **known))
    plain, value = learned(0.0, 500)
    chosen, reached = learned(0.5, 2000, schedules, extra=1.0)
    right = (chosen[0] - 1.5).abs().item()
    kinds = ("", "s_k = 0.99, constant", "s_k = 0.1, constant", "s_k = 0.99 / (k + 1)^2, summable")
    return entry(rows, [], [
        {"what": "no aggregation: plain unrolling keeps u_2 and learns 1/2 instead of 1",
         "violates": (plain - 1).abs().item() > 0.4 and value.item() > 0.2, "omega": plain.item(), "phi_K": value.item()},
        *({"what": f"{kind}: another omega than 1.5", "violates": (w - 1.5).abs().item() > 0.05 > 10 * right,
           "omega": w.item(), "phi_K": v.item(), "aggregated": chosen[0].item()}
          for kind, w, v in list(zip(kinds, chosen, reached, strict=True))[1:]),
        *broken_maps(0.5),
    ])  # fmt: skip


# -- Theorem 3.2


def play_derivative(case: Case, mu: float, steps: int) -> dict[str, Tensor]:
    """A run with ``J^k = du^k/dw`` in forward mode: rows k = 0 ... K of distances to p and dp/dw, and ``phi_k' - phi'``.

    ``bent`` is ``||dT/du J* + dT/dw - J*||`` at u^k, ``J* = dp/dw``: zero at the fixed point.
    """
    step, T, metric, p, slope = case.map(mu), case.map(), case.metric, case.best, slope_of_best(case)
    one, number = torch.ones_like(case.omega), hodl.outer_step(metric, case.smooth, SHARE)
    grad = torch.func.grad(case.upper)
    exact = torch.func.jvp(case.loss, (p, case.omega), (slope, one))[1]
    pull, turn = metric.inverse(grad(p, case.omega)), metric.inverse(torch.func.jvp(grad, (p, case.omega), (slope, one))[1])
    u, j, rows = case.start, torch.zeros_like(case.start), []
    for k in range(steps + 1):
        bent = torch.func.jvp(lambda u, w: T(u, w, 0), (u, case.omega), (slope, one))[1] - slope
        gap = torch.func.jvp(case.loss, (u, case.omega), (j, one))[1] - exact
        rows.append(torch.stack([metric.norm(u - p), metric.norm(j - slope), metric.norm(bent), gap]))
        u, j = torch.func.jvp(lambda u, w, k=k: step(u, w, k), (u, case.omega), (j, one))  # type: ignore[misc]
    run = dict(zip(("distance", "derivative", "bent", "gap"), torch.stack(rows, 1), strict=True))
    size = number / torch.arange(2, steps + 2, dtype=torch.float64)[:, None]
    return run | {"pull": mu * size * metric.norm(pull), "turn": mu * size * metric.norm(turn), "exact": exact,
                  "norm": metric.norm(p), "slope": metric.norm(slope)}  # fmt: skip


def derivative_checks(case: Case, run: dict[str, Tensor], mu: float, tol: float = 0.05, slack: float = 1e-13) -> list[Check]:
    """``sup_w |phi_K' - phi'|`` is small at the end, and each step that makes it so, for an l that is quadratic in u.

    With ``q = mu + (1 - mu)(1 - alpha (1 - rho))``, rho the contraction of D:
    ``||u+ - p|| <= q ||u - p|| + mu s_k ||G^-1 l'(p)||``,
    ``||J+ - J*|| <= q ||J - J*|| + mu s_k ||G^-1 (l'(p))'|| + (1 - mu) bend ||u - p||``, where ``bend`` is the Lipschitz
    constant in u of ``dT/du J* + dT/dw``.  Eq: HODL Theorem 3.2.
    """
    q = mu + (1 - mu) * (1 - case.alpha * (1 - case.contraction))
    bend = case.bend if case.bend is not None else torch.zeros_like(run["norm"])
    near, turned = run["distance"], run["derivative"]
    floor, steep = slack * (near[:-1] + run["norm"].amax()), slack * (turned[:-1] + run["slope"])
    room = (tol * run["gap"][0].abs().amax() + slack * run["exact"].abs().amax())[None, None]
    return [
        inequality("contraction", near[1:], q * near[:-1] + run["pull"], floor),
        inequality("smoothness", run["bent"], bend * near, slack * (run["slope"] + near)),
        inequality("derivative", turned[1:], q * turned[:-1] + run["turn"] + (1 - mu) * bend * near[:-1], steep),
        inequality("gradients", run["gap"][-1].abs().amax()[None, None], room, 0 * room),
    ]


def engine_check(case: Case, mu: float, steps: int, tol: float = 1e-10) -> Check:
    """`odlkit.bilevel`, unrolled for all omega at once, against forward mode; implicit at p against ``phi'``.

    Relative to ``sup |phi'|``.  Eq: HODL (7).
    """
    run = play_derivative(case, mu, steps)
    unrolled = hypergradient(case.map(mu), case.upper, case.omega, case.start, steps=steps).gradient.flatten()
    implicit = hypergradient(
        case.map(), case.upper, case.omega, case.best, steps=0, way=Implicit("gmres", 1e-12)
    ).gradient.flatten()
    scale = run["exact"].abs().amax()
    off = torch.stack([unrolled - run["gap"][-1] - run["exact"], implicit - run["exact"]]).abs() / scale
    return inequality("hypergradient", off, torch.full_like(off, tol), 0 * off)


def stationary(
    case: Case, mu: float, depths: tuple[int, ...] = (20, 80, 320), tol: float = 1e-8
) -> tuple[Check, list[float]]:
    """``|phi'(w_K)|`` at a stationary point w_K of phi_K falls to half, or further, when K is four times as large.

    w_K by the secant method on hypergradients of `odlkit.bilevel`, to ``|phi_K'| <= tol``.  Eq: HODL Theorem 3.2.
    """
    found, w = [], 0.2
    for steps in depths:
        old, slope_old = w + 0.01, None
        for _ in range(20):
            at = replace(case, omega=column([w]), start=column([0.0]))
            slope = hypergradient(case.map(mu), case.upper, at.omega, at.start, steps=steps).gradient.item()
            if abs(slope) <= tol:
                break
            ahead = w - (slope * (w - old) / (slope - slope_old) if slope_old is not None else slope)
            old, slope_old, w = w, slope, ahead
        at = replace(at, best=settle(at, 300))
        exact = torch.func.jvp(at.loss, (at.best, at.omega), (slope_of_best(at), column([1.0])))[1]
        found.append(exact.abs().item())
    left = torch.tensor(found, dtype=torch.float64)[:, None]
    return inequality("stationary", left[1:], left[:-1] / 2, 0 * left[1:]), found


def singular_hypergradient(omega: float = 0.7) -> dict:
    """Control: `continuum` has ``phi'(0.7) = -0.3``; plain unrolling and the pseudo-inverse say +0.4."""
    case = continuum([omega])
    unrolled = hypergradient(case.map(), case.upper, case.omega, case.start, steps=200).gradient.item()
    jacobian = torch.func.jacrev(lambda u: case.map()(u[None], case.omega, 0)[0])(case.best[0])
    u = torch.tensor([[omega, 0.0]], dtype=torch.float64)  # where plain iteration ends
    by_u, by_w = torch.func.grad(case.upper, argnums=(0, 1))(u, case.omega)
    v = torch.linalg.pinv(torch.eye(2).double() - jacobian.mT) @ by_u[0]
    implicit = (by_w + 0.5 * v[0]).item()  # dT/dw = (1/2, 0)
    try:
        refused = hypergradient(case.map(), case.upper, case.omega, u, steps=0, way=Implicit("gmres")).gradient.item()
    except LowerLevelError as failure:
        refused = str(failure)
    exact = omega - 1
    return {"what": "a continuum of fixed points, no aggregation: unrolled and implicit gradients have the wrong sign",
            "violates": unrolled > 0 and implicit > 0 > exact, "unrolled": unrolled, "implicit": implicit,
            "exact": exact, "engine": refused}  # fmt: skip


def kink(depths: tuple[int, ...] = (10, 20, 40)) -> dict:
    """Control: a soft threshold in a contraction.  ``D(u) = soft((u + w) / 2, 1/2)``, so ``p = soft(w, 1)``, from u = 1.

    At ``w = 1 - 2^-(K+2)`` the run has not met the kink after K steps: ``phi_K' = -1`` or so, ``phi' = 0``.
    """
    gaps = []
    for steps in depths:
        w = column([1 - 2.0 ** -(steps + 2)])
        case = Case("", lambda u, w, k: soft((u + w) / 2, 0.5), lambda u, w: (u[:, 0] - 1) ** 2 / 2, w,
                    torch.ones_like(w), torch.zeros_like(w), alpha=1.0)  # fmt: skip
        gaps.append(abs(hypergradient(case.map(), case.upper, w, case.start, steps=steps).gradient.item()))
    return {"what": "a contraction with a kink: near it the slope of phi_K stays one away from that of phi, at every K",
            "violates": min(gaps) > 0.5, "gaps": gaps}  # fmt: skip


def one_fixed_point() -> dict:
    """Control: `cubic`, started at the fixed point of one omega, where ``dT/du = 1``: J^k stays 0, ``dp/dw = 1``."""
    case = cubic()
    case = replace(case, start=torch.full_like(case.start, -0.5))
    gradient = hypergradient(case.map(), case.upper, case.omega, case.start, steps=1000).gradient
    gap = (gradient - (case.omega - 0.5)).abs().max().item()
    return {"what": "one fixed point, D no contraction: where the run starts at the fixed point its derivative stays 0",
            "violates": gap > 0.9, "gap": gap}  # fmt: skip


def smooth_rows(runs: list[tuple[Case, float, int]]) -> list[dict]:
    """Rows of Theorem 3.2 for these cases, mu and depths; hypergradients of the engine at 30 steps."""
    rows = []
    for case, mu, steps in runs:
        run = play_derivative(case, mu, steps)
        checks = [*derivative_checks(case, run, mu), engine_check(case, mu, 30)]
        gaps = {str(k): run["gap"][k].abs().max().item() for k in (10, 100, steps) if k <= steps}
        rows.append(line(case, mu, checks, steps, gaps=gaps))
    return rows


def theorem_3_2() -> dict:
    """Smooth contractions: ``phi_K' -> phi'`` uniformly in omega, with and without aggregation.  Eq: HODL Theorem 3.2."""
    rows = smooth_rows(
        [(scalar(), 0.5, 500), (scalar(), 0.1, 300), (conjugated_network(), 0.1, 200), (smooth_deblurring(), 0.1, 120)]
    )
    check, found = stationary(scalar(), 0.1)
    return entry(
        rows, [line(scalar(), 0.1, [check], 320, stationary=found)], [singular_hypergradient(), kink(), one_fixed_point()]
    )


# -- Proposition 3.1


def value_bound(case: Case, run: dict[str, Tensor], slack: float = 1e-13) -> list[Check]:
    """mu = 0: the distance to p does not grow, and ``|l(u^k) - phi| <= max(||l'(u^k)||, ||l'(p)||) ||u^k - p||``.

    Slopes are ``||G^-1 l'||_G``, the dual norm; l is convex.  Eq: HODL Proposition 3.1.
    """
    distance, metric = run["distance"].sqrt(), case.metric
    at_p = metric.norm(metric.inverse(torch.func.grad(case.upper)(case.best, case.omega)))
    floor = slack * (run["norm"].sqrt() + metric.norm(case.best))
    return [inequality("distance", distance[1:], distance[:-1], floor[1:]),
            inequality("loss", (run["value"] - phi(case)).abs(), torch.maximum(run["slope"], at_p) * distance,
                       slack * (run["value"] + phi(case)))]  # fmt: skip


def proposition_3_1() -> dict:
    """Without aggregation, mu = 0: values where T has one fixed point, gradients where it is a smooth contraction.

    Eq: HODL Proposition 3.1, (5).
    """
    rows = []
    for case, steps in ((cubic(), 3000), (wavelet_deblurring(), 200), (scalar(), 100)):
        run = play(case, 0.0, steps)
        rows.append(line(case, 0.0, [*theorem_3_1_checks(case, run, 0.0), *value_bound(case, run)], steps))
    rows += smooth_rows([(scalar(), 0.0, 100), (conjugated_network(), 0.0, 100), (smooth_deblurring(), 0.0, 100)])
    plain, value = learned(0.0, 500)
    return entry(rows, [], [
        {"what": "many fixed points: unrolling learns 1/2 instead of 1",
         "violates": (plain - 1).abs().item() > 0.4 and value.item() > 0.2, "omega": plain.item(), "phi_K": value.item()},
        singular_hypergradient(), kink(), *broken_maps(0.0),
    ])  # fmt: skip
