"""GDC's Propositions 1 and 2: their inequalities, the runs that check them and the controls that break them."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from odlkit import weights
from odlkit.certify import Check, critical, entry, inequality, row, settled
from odlkit.control import AlwaysAccept
from odlkit.instances import alternating, blurred, gaussian, networks, picture
from odlkit.models.gdc import (
    Corrective,
    Discriminative,
    FullyDefined,
    Generative,
    Module,
    Network,
    PartiallyDefined,
    Penalty,
)
from odlkit.networks import Classifier
from odlkit.operators import Identity, Mask, Wavelet
from odlkit.priors import Analysis, Lp
from odlkit.problem import LeastSquares, Problem
from odlkit.propagate import Result, Status, Trace, propagate

WEIGHT = {1.0: 3e-3, 0.8: 2e-3, 0.0: 5e-4}  # of ||Haar u||_p^p beside ||A u - y||^2
GATE, CLIP = 0.23, 2.2e-3  # M / sqrt(n) and c / n for n pixels


def data(task: str, name: str, size: int, delta: float = 0.0) -> LeastSquares:
    """``f = ||A u - y||^2`` for ``blur`` (1% noise), ``denoise`` (5%) or ``inpaint`` (half of the pixels, none)."""
    if task == "blur":
        return LeastSquares(*blurred(name, size, gaussian(delta=delta)), 2.0)
    x, generator = picture(name, size), torch.Generator().manual_seed(0)
    if task == "denoise":
        return LeastSquares(Identity(), x + 0.05 * torch.randn(x.shape, generator=generator, dtype=x.dtype), 2.0)
    mask = (torch.rand(x.shape, generator=generator, dtype=x.dtype) < 0.5).to(x)
    return LeastSquares(Mask(mask), mask * x, 2.0)


def defined(task: str, name: str, size: int, p: float, delta: float = 0.0) -> Problem:
    """``Psi(u) = ||A u - y||^2 + lambda ||W u||_p^p`` with the three-level Haar transform W.  Eq: GDC (1)."""
    return Problem(data(task, name, size, delta), Analysis(Wavelet("haar", 3), Lp(p, WEIGHT[p])))


def falling(stage: int) -> float:
    """Noise levels of the modules: 0.1, 0.08, ... down to 0.005."""
    return max(0.1 * 0.8**stage, 0.005)


def restoring(stage: int) -> float:
    """gamma of the data step (7) that goes with `falling`: 0.001 / alpha^2."""
    return 1e-3 / falling(stage) ** 2


def learned(kind: str, network: Network) -> list[Module]:
    """G and D of one of the three kinds; the adversary's D climbs, eight times as far.

    D is the shipped classifier's where ``kind`` is trained and it is installed, an untrained one's otherwise.
    """
    if kind == "trained" and "gdc-classifier" in weights.cards():
        net = weights.load("gdc-classifier").double()
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = Classifier((8, 8)).double().requires_grad_(False)
    step = -8.0 if kind == "adversary" else 1.0
    return [Generative(network, falling), Discriminative(net.potential, falling, step)]  # type: ignore[arg-type]


def whole(problem: Problem, modules: list[Module]) -> list[Module]:
    """The stage of GDC: the data step (7), G, D, and C (6), whose gamma may grow."""
    return [Corrective(restoring, partial=True), *modules, Corrective(Penalty(1.05 * problem.lipschitz, 1.1))]


def decrease(trace: Trace, kappa: float | Tensor, margin: float = 0.0, slack: float = 1e-13) -> Check:
    """``Psi(u^t) - Psi(u^{t+1}) >= kappa d_t + margin ||v^t - u^t||^2`` up to ``slack |Psi|``; the margin is relative to it.

    Eq: GDC Proposition 1 (1), corrected: ``kappa = (gamma - L) / 2``, and with the control's sufficient decrease.
    """
    energy = trace.with_start("energy")
    scale = energy[:-1].abs()
    left = kappa * trace["distance"] + margin * trace["moved"].square()
    return inequality("decrease", left, energy[:-1] - energy[1:], slack * scale, scale)


def proposition_1_checks(trace: Trace, gamma: float, lipschitz: float, margin: float, slack: float = 1e-13) -> list[Check]:
    """The inequalities behind Proposition 1 for a run of `FullyDefined` with a constant gamma.

    The decrease; ``||xi|| <= (gamma + L) ||u^{t+1} - v^t||`` for xi in dPsi(u^{t+1}); and the rate that follows,
    ``min_{t < T} d_t <= (Psi(u^0) - Psi(u^T)) / (kappa T)``.  Eq: GDC Proposition 1, (13), (14) corrected.
    """
    kappa, energy = (gamma - lipschitz) / 2, trace.with_start("energy")
    count = torch.arange(1, len(trace) + 1, dtype=torch.float64)[:, None]
    step, floor = trace["distance"].sqrt(), slack * (gamma + lipschitz) * trace["norm"]
    best, scale = trace["distance"].cummin(0).values, kappa * count
    return [
        decrease(trace, kappa, margin, slack),
        inequality("subgradient", trace["subgradient"], (gamma + lipschitz) * step, floor),
        inequality("rate", best, (energy[0] - energy[1:]) / scale, slack * energy[0].abs() / scale),
    ]


def proposition_2_checks(trace: Trace, gate: float, c: float, growth: float, slack: float = 1e-12) -> list[Check]:
    """The inequalities behind Proposition 2 for a run of `PartiallyDefined` with ``gamma_{t+1} = growth gamma_t``.

    ``gamma_t ||u_c - u_d|| = ||grad f(u_c)||`` to eight digits; ``||u^{t+1} - u^t|| <= M / gamma_t + sqrt(c / gamma_t)``,
    also where the gate rejects; and for growth > 1 the tail
    ``sum_{j >= t} ||u^{j+1} - u^j|| <= M / (gamma_t (1 - 1 / growth)) + sqrt(c / gamma_t) / (1 - growth^{-1/2})``.
    Eq: GDC Proposition 2, (15).
    """
    gamma, floor = trace["penalty"], slack * trace["norm"]
    radius, slope = (c / gamma).sqrt(), trace["gradient"] / gamma
    checks = [
        inequality("data step (7)", (trace["data_step"] - slope).abs(), 1e-8 * slope, floor),
        inequality("step (15)", trace["change"], gate / gamma + radius, floor),
    ]
    if growth > 1:
        tail = trace["change"].flip(0).cumsum(0).flip(0)
        right = gate / gamma / (1 - 1 / growth) + radius / (1 - growth**-0.5)
        checks.append(inequality("tail", tail, right, len(trace) * floor))
    return checks


def fully_run(problem: Problem, modules: list[Module], steps: int = 40, **options: object) -> tuple[FullyDefined, Result]:
    """Algorithm 1 from the observation."""
    step = FullyDefined(modules, **options)  # type: ignore[arg-type]
    return step, propagate(step, problem, problem.fidelity.y, steps=steps, raises=False)  # type: ignore[attr-defined]


def checks_of(problem: Problem, step: FullyDefined, result: Result) -> list[Check]:
    """`proposition_1_checks` with the run's own constants."""
    gamma, lipschitz = step.gamma(problem, 0), problem.lipschitz
    return proposition_1_checks(result.trace, gamma, lipschitz, step.margin * lipschitz)


def fully_to_the_end(problem: Problem, modules: list[Module]) -> tuple[FullyDefined, Result]:
    """30 stages with the modules, then without them until nothing moves."""
    step, first = fully_run(problem, modules, 30)
    last = propagate(FullyDefined([]), problem, first.x, steps=600, tol=1e-9)
    last.trace.rows, last.trace.start = first.trace.rows + last.trace.rows, first.trace.start
    last.iterations += first.iterations
    return step, last


def proposition_1(size: int = 64) -> dict:
    """Algorithm 1: the decrease with the corrected constant, the subgradient, the rate; then criticality at a fixed step.

    Eq: GDC Proposition 1, Algorithm 1.
    """
    rows, ends = [], []
    nets = networks("conv", trained="podm-denoiser")
    instances = (("blur", "camera", 1.0), ("blur", "coins", 0.8), ("blur", "astronaut", 0.0), ("inpaint", "coins", 1.0))
    for (task, name, p), (kind, network) in product(instances, nets.items()):
        problem = defined(task, name, size, p)
        step, result = fully_run(problem, whole(problem, learned(kind, network)))
        step.check(problem)
        rows.append(row(f"{task}, {name}, p = {p:g}", kind, checks_of(problem, step, result), result))
    last = {f"well-conditioned blur, p = {p:g}": defined("blur", "camera", size, p, delta=0.5) for p in (1.0, 0.0)}
    last["denoise, astronaut, p = 0"] = defined("denoise", "astronaut", size, 0.0)
    for (name, problem), (kind, network) in product(last.items(), nets.items()):
        step, result = fully_to_the_end(problem, whole(problem, learned(kind, network)))
        checks = [*checks_of(problem, step, result), critical(problem, result, 1 / step.gamma(problem, 0))]
        ends.append(row(name, kind, checks, result) | {"energy": result.trace["energy"][-1].item()})

    problem = defined("blur", "camera", size, 1.0)
    lipschitz = problem.lipschitz
    _, free = fully_run(problem, [Generative(nets["trained"], lambda stage: 0.1)], 100, control=AlwaysAccept())
    lost = critical(problem, free, 1 / lipschitz, 1e-3)
    _, long = fully_run(problem, [], 400, penalty=0.3 * lipschitz)
    _, frozen = fully_run(problem, [], 100, penalty=Penalty(1.05 * lipschitz, 1.5, cap=float("inf")))
    residual = problem.residual(frozen.x).item()
    denoise = defined("denoise", "camera", size, 1.0)
    step, plain = fully_run(denoise, [])
    gamma, smooth = step.gamma(denoise, 0), denoise.lipschitz
    printed, right = (decrease(plain.trace, kappa) for kappa in ((gamma + smooth) / 2, (gamma - smooth) / 2))
    return entry(rows, ends, [
        {"what": "no control, step 11 kept: the energy rises, and the iterates settle where nothing is critical",
         "violates": not decrease(free.trace, 0.0).holds and settled(free.trace, 1e-6).holds and not lost.holds,
         "subgradient": free.trace["subgradient"][-1].item(), "energy": free.trace["energy"][-1].item()},
        {"what": "gamma = 0.3 L in step 11: divergence", "violates": long.status is Status.DIVERGED,
         "iterations": long.iterations},
        {"what": "gamma growing in step 11 (footnote 1): it freezes at a point that is not critical, with d = 0",
         "violates": frozen.trace["distance"][-1].item() < 1e-20 and residual > 1e-2,
         "distance": frozen.trace["distance"][-1].item(), "residual": residual},
        {"what": "the constant (gamma + L) / 2 as printed", "violates": not printed.holds and right.holds,
         "margin_printed": printed.margin, "margin_corrected": right.margin},
    ])  # fmt: skip


def partially_run(
    task: str, name: str, size: int, modules: list[Module], growth: float = 1.5, steps: int = 40, gate: float = GATE
) -> tuple[PartiallyDefined, Result]:
    """Algorithm 2 without a prior from the observation: ``gamma_0 = 1``, ``M = gate sqrt(n)``, ``c = CLIP n`` for n pixels.

    An infinite gate drops the control: nothing is clipped and nothing rejected.
    """
    problem = Problem(data(task, name, size))
    step = PartiallyDefined(modules, Penalty(1.0, growth), gate * size, CLIP * size**2 if gate < torch.inf else None)
    start = problem.fidelity.y  # type: ignore[attr-defined]
    return step, propagate(step, problem, start, steps=steps, raises=False)


def proposition_2(size: int = 64) -> dict:
    """Algorithm 2 with the clip: the step, its tail, and the identity behind them.  Eq: GDC Proposition 2, Algorithm 2."""
    rows, nets = [], networks("conv", trained="podm-denoiser")
    instances = (("blur", "camera"), ("inpaint", "coins"), ("denoise", "astronaut"))
    for (task, name), (kind, network) in product(instances, nets.items()):
        step, result = partially_run(task, name, size, learned(kind, network))
        checks = [*proposition_2_checks(result.trace, step.gate, step.c or 0.0, 1.5), settled(result.trace)]
        met = result.trace["within"].mean().item()  # how often the plain networks met the assumption
        rows.append(row(f"{task}, {name}", kind, checks, result) | {"within": met})

    def constant(network: Network) -> list[Module]:
        return [Generative(network, lambda stage: 0.1)]

    def bound(trace: Trace, growth: float) -> bool:
        return proposition_2_checks(trace, GATE * size, CLIP * size**2, growth)[1].holds

    controls = []
    for kind in ("trained", "adversary"):
        _, free = partially_run("denoise", "camera", size, constant(nets[kind]), 1.1, 100, gate=torch.inf)
        controls.append({
            "what": f"neither clip nor gate, {kind} network: steps exceed their bound and do not die out",
            "violates": not settled(free.trace).holds and not bound(free.trace, 1.1),
            "last_move": free.trace["change"][-1].item()})  # fmt: skip
    _, flat = partially_run("denoise", "camera", size, constant(alternating(nets["trained"])), 1.0, 100)
    controls.append({
        "what": "gamma constant, weights of alternating sign: every step keeps its bound, the iterates never settle",
        "violates": bound(flat.trace, 1.0) and not settled(flat.trace).holds,
        "last_move": flat.trace["change"][-1].item()})  # fmt: skip
    return entry(rows, [], controls)
