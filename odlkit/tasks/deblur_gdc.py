"""GDC's two models of the deblurring task: the jointly trained cascade, and Algorithm 1 on an l1 energy of wavelets.

Both take ``f(u) = ||A u - z||^2`` and ``phi(u) = lambda ||B^T u||_1`` (Table I).  A model is
``run(z, blur, sigma, steps, progress) -> Outcome`` on a periodic grid (`odlkit.tasks.deblur`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from odlkit import weights
from odlkit.certify import inequality
from odlkit.models.gdc import Cascade, Corrective, FullyDefined, Levels, Module, scheme
from odlkit.models.gdc_joint import CascadeNet
from odlkit.models.padnet import Schedule
from odlkit.operators import Blur
from odlkit.priors import details
from odlkit.problem import LeastSquares, Problem
from odlkit.propagate import Result, propagate
from odlkit.tasks.report import ROUND_OFF, Outcome, unproved

HAAR, FACTOR = 3, 36.0  # levels of the wavelets; lambda = FACTOR sigma^2
START, FIRST, TRUST = 8, 0.2, 0.25  # stages of the start, the level of its first, and the factor of its gamma
STOP, STEPS = 1e-3, 30  # relative change at which Algorithm 1 stops, and its most stages


def cascaded(
    net: CascadeNet, z: Tensor, blur: Blur, sigma: float, steps: int | None = None, progress: bool = False
) -> Result:
    """Run a joint cascade from the data, nothing checked."""
    level = torch.full((len(z), 1, 1, 1), sigma).to(z)
    problem, step = net.problem(blur, z, level), Cascade(net.modules_for(level))
    return propagate(step, problem, z, steps=steps or net.stages, energy=False, progress=progress)


def gdc(z: Tensor, blur: Blur, sigma: float, steps: int | None, progress: bool) -> Outcome:
    """The cascade of all three modules, trained jointly (GDC, Table IV)."""
    net: Any = weights.load("gdc-deblur-gdc").to(z)
    result = cascaded(net, z, blur, sigma, steps, progress)
    return Outcome(result.x, result, unproved("stages trained jointly and run unchecked: no theorem"))


def gdc_pcm(z: Tensor, blur: Blur, sigma: float, steps: int | None, progress: bool) -> Outcome:
    """Algorithm 1 with the greedily trained modules, from where they lead unchecked.  Eq: GDC Algorithm 1, Proposition 1.

    From the data themselves hardly a proposal lowers this energy, so what the modules know has to be in the start.
    """
    network, classifier = (weights.load(name).to(z) for name in ("gdc-generator", "gdc-classifier"))
    problem = Problem(LeastSquares(blur, z, 2.0), details(z, FACTOR * sigma**2, levels=HAAR))
    schedule = Schedule.between(max(FIRST, sigma), sigma, START)
    step = weights.card("gdc-classifier")["schedule"]["step"]

    def modules(level: Levels) -> list[Module]:
        return scheme("GD", network, classifier.potential, level, lambda t: 2 * TRUST * (sigma / level(t)) ** 2, step)

    start = propagate(Cascade(modules(lambda stage: schedule(stage)[1])), problem, z, steps=START, energy=False).x
    correction = Corrective(lambda stage: 1.05 * problem.lipschitz)  # with the data step's gamma, (6) would diverge
    control = FullyDefined([*modules(lambda stage: sigma), correction])
    control.check(problem)
    result = propagate(control, problem, start, steps=steps or STEPS, tol=STOP, progress=progress)
    return Outcome(result.x, result, proposition_1(result))


def proposition_1(result: Result) -> dict[str, Any]:
    """GDC's Proposition 1 on this run: ``Psi(v) - Psi(u+) >= ((gamma - L) / 2) ||u+ - v||^2`` at every stage."""
    trace = result.trace
    start = trace.with_start("energy")[:-1]
    slack, before = ROUND_OFF * start.abs(), trace["energy_v"]
    fall = inequality("descent", trace["kappa"] * trace["distance"], before - trace["energy"], slack, start.abs())
    kept = inequality("control", before, start, slack)
    return {
        "guarantee": "GDC, Proposition 1 with the right sign: the energy decides, then a proximal-gradient step, gamma > L",
        "statement": "the energy falls by ((gamma - L) / 2) ||u+ - v||^2 or more at every stage; limits are critical",
        "holds": fall.holds and kept.holds,
        "margin": min(fall.margin, kept.margin),
        "kappa": trace["kappa"].min().item(),
        "acceptance_rate": trace.acceptance_rate(),
        "subgradient_norm": trace["subgradient"][-1].max().item(),
    }
