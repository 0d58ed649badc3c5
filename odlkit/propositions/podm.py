"""PODM's propositions, repaired: the runs that check them, the controls that break them, acceptance against mu.

The energies are ``Phi(x) = ||K B x - y||^2 + lambda ||x||_p^p`` on Haar coefficients x of a blurred picture, with ``B`` the
inverse three-stage transform; the networks see the image ``B x``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

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
from odlkit.control import AlwaysAccept
from odlkit.instances import blurred, gaussian, haar_band
from odlkit.instances import networks as on_images
from odlkit.models.padnet import Network
from odlkit.models.podm import PODM, Constants
from odlkit.networks.metric import dct_atoms
from odlkit.operators import Adjoint, FilterBank, Identity, Mask, Operator, Wavelet
from odlkit.priors import Lp
from odlkit.problem import LeastSquares, Problem, norm_items
from odlkit.propagate import Record, Result, State, Trace, propagate

TRAINED = "podm-denoiser"
WEIGHT = {1.0: 3e-3, 0.8: 2e-3, 0.0: 5e-4}  # lambda for each p
INSTANCES = (("camera", 1.0, "scalar"), ("coins", 0.8, "filtered"), ("astronaut", 0.0, "general"))  # picture, p, H
HAAR = Wavelet("haar", 3)


def coefficient_problem(name: str, size: int, p: float, kernel: Tensor | None = None) -> tuple[Problem, Tensor]:
    """``||K B x - y||^2 + lambda ||x||_p^p`` for a sample picture, blurred with 1% noise, and the coefficients of y.

    Eq: PODM (1).
    """
    blur, y = blurred(name, size, gaussian() if kernel is None else kernel)
    return Problem(LeastSquares(blur @ Adjoint(HAAR), y, 2.0), Lp(p, WEIGHT[p])), HAAR.A(y)


def networks() -> dict[str, Network]:
    """`odlkit.instances.networks`, trained greedily as PODM's A, between coefficients."""

    def between(network: Network) -> Network:
        return lambda x, level: HAAR.A(network(HAAR.A_adjoint(x), level))

    return {name: between(network) for name, network in on_images("conv", trained=TRAINED).items()}


def metric(kind: str, size: int) -> Operator | None:
    """W of ``H = (mu / 2) W^T W``: scalar (None), filtered (weighted DCT atoms on the image), general (a diagonal on x).

    Both others have ``I <= W^T W <= 1.3 I``: high frequencies, or fine scales, weigh more.
    """
    if kind == "scalar":
        return None
    if kind == "general":
        fine = torch.arange(size, dtype=torch.float64) / (size - 1)
        return Mask((1 + 0.3 * torch.maximum(fine[:, None], fine)).sqrt())
    order = torch.arange(3, dtype=torch.float64)
    weight = (1 + 0.3 * (order[:, None] + order) / 4).sqrt().flatten() / 3  # the nine atoms' spectra add up to 9
    return FilterBank(weight[:, None, None] * dct_atoms(3)) @ Adjoint(HAAR)


LEVEL = 0.05  # the noise level that A is told


def solver(network: Network | None, problem: Problem, kind: str = "scalar", size: int = 0, **changes) -> PODM:
    """PODM with `Constants.for_lipschitz` and two half-moves; without a network it is the feedback alone."""
    constants = changes.pop("constants", Constants.for_lipschitz(problem.lipschitz))
    steps = [] if network is None else [network]
    return PODM(steps, constants, **{"levels": lambda l: LEVEL, "metric": metric(kind, size), "halvings": 2, **changes})


def stage_run(name: str, p: float, kind: str, network: Network, size: int = 64, steps: int = 40) -> tuple[Constants, Result]:
    """PODM on `coefficient_problem` with H of a kind."""
    problem, x0 = coefficient_problem(name, size, p)
    step = solver(network, problem, kind, size)
    return step.constants, propagate(step, problem, x0, steps=steps)


def run_to_the_end(p: float, network: Network, size: int = 64, kind: str = "scalar") -> tuple[Problem, Constants, Result]:
    """A well-conditioned blur; 40 stages with the network, then the feedback alone until nothing moves.

    The trace has ``distance``, ``||x^l - x*||`` to the last iterate.
    """
    problem, x0 = coefficient_problem("camera", size, p, gaussian(delta=0.5))
    seen: list[Tensor] = []
    keep = {"seen": lambda state: seen.append(state.x)}
    step = solver(network, problem, kind, size)
    first = propagate(step, problem, x0, steps=40, measure=keep)
    last = propagate(solver(None, problem), problem, first.x, steps=1000, tol=1e-10, measure=keep)
    rows = first.trace.rows + last.trace.rows
    last.trace.rows = [r | {"distance": norm_items(x - last.x)} for r, x in zip(rows, seen, strict=True)]
    last.trace.start, last.iterations = first.trace.start, len(rows)
    return problem, step.constants, last


def proposition_1_checks(trace: Trace, constants: Constants) -> list[Check]:
    """The descent of the branch taken, and (5) wherever a proposal was kept.  Eq: PODM Proposition 1, (5)."""
    return [descent(trace, trace["kappa"]), error_condition(trace, constants.tolerance)]


def energy_at_the_limit(trace: Trace, constants: Constants, limit: Tensor, slack: float = 1e-13) -> list[Check]:
    """``0 <= Phi(x^l) - Phi(x*) <= ||xi^l|| d + d^2 / (2 gamma)``, ``d = ||x^l - x*||``, gamma of the branch taken.

    Compare ``x^l`` with ``x*`` in the proximal subproblem that it minimises, for convex f; the right side goes to 0, which
    is what lower semicontinuity of the prior alone does not give.  ``limit`` is ``Phi(x*)``, ``trace["distance"]`` has d.
    Eq: PODM Proposition 2.
    """
    energy, d = trace["energy"], trace["distance"]
    gamma = torch.where(trace["accepted"] > 0, constants.step_size, constants.feedback)
    above, floor = energy - limit.cpu(), slack * energy.abs()
    bound = trace["subgradient"] * d + d.square() / (2 * gamma)
    return [
        inequality("not below the limit", -above, 0 * above, floor, energy.abs()),
        inequality("energy at the limit", above, bound, floor),
    ]


def theorem_1_checks(trace: Trace) -> list[Check]:
    """Descent, the bound on the subgradient of the branch taken, and the rate that both imply.  Eq: PODM Theorem 1."""
    kappa = trace["kappa"].amin(0)
    return [descent(trace, trace["kappa"]), subgradient_bound(trace, trace["bound"]), rate(trace, kappa)]


def halving(trace: Trace, window: int = 25) -> Check:
    """``||Delta^{l+window}|| <= ||Delta^l|| / 2`` in the last half of a run.

    Should this go on, the length still to come is at most that of the last ``window`` steps: the sum of all steps is finite.
    """
    moves, floor = trace["change"][len(trace) // 2 :], 1e-13 * trace["norm"][len(trace) // 2 :]
    return inequality("halving", moves[window:], moves[:-window] / 2, floor[window:])


@dataclass
class Fading(PODM):
    """A control: the step of the feedback halves at every stage, against ``inf gamma > 0``."""

    def __call__(self, problem: Problem, state: State) -> tuple[State, Record]:
        c = replace(self.constants, feedback=self.constants.feedback * 0.5**state.k)
        return PODM([], c)(problem, state)


class Shrinking:
    """A control: ``x -> x / 2``, with its gradient, a subgradient of an l0 energy; no proximal map on the way."""

    def init(self, problem: Problem, x0: Tensor) -> State:
        return State(x0)

    def __call__(self, problem: Problem, state: State) -> tuple[State, Record]:
        x = state.x / 2
        slope = norm_items(problem.fidelity.grad(x))
        return state.next(x), {"subgradient": slope, "accepted": torch.zeros(len(x)), "distance": norm_items(x)}


def two_cycle(a: Tensor, weight: float) -> tuple[Problem, PODM]:
    """PODM with the linear network ``A(x) = -5 x``: (5) holds with ``psi = 0`` and the iterates alternate for ever.

    ``Phi(x) = 0.2 ||x - a||^2 + weight ||x||_0``, ``H = mu I / 2``, ``mu = 0.1``, ``gamma = 1 < 1 / L``; from ``x = 0`` the
    orbit is 0, 0.8 a, 0, ... under the condition of `odlkit.instances.two_cycle`.
    """
    constants = Constants(penalty=0.1, step_size=1.0, tolerance=0.04, feedback=1.0)
    return Problem(LeastSquares(Identity(), a, 0.4), Lp(0, weight)), PODM([lambda x, level: -5 * x], constants)


def unchecked_run(network: Network, size: int = 64, steps: int = 200, p: float = 1.0) -> tuple[Problem, Constants, Result]:
    """Control: every proposal is kept, on the well-conditioned blur."""
    problem, x0 = coefficient_problem("camera", size, p, gaussian(delta=0.5))
    step = solver(network, problem, control=AlwaysAccept(), feedback=False, halvings=0)
    return problem, step.constants, propagate(step, problem, x0, steps=steps, raises=False)


def acceptance(network: Network, penalties: Iterable[float], p: float = 1.0, size: int = 64, steps: int = 40, **changes):
    """Share of stages kept, and the last energy, for each ``mu = penalty L`` with ``gamma mu = 1``, ``c = 0.475 mu``.

    Returns ``[(penalty, share, energy), ...]``.  ``changes`` go to `solver`.
    """
    problem, x0 = coefficient_problem("camera", size, p)
    curve = []
    for penalty in penalties:
        mu = penalty * problem.lipschitz
        constants = Constants(mu, 1 / mu, 0.475 * mu, 0.95 / problem.lipschitz)
        trace = propagate(solver(network, problem, constants=constants, **changes), problem, x0, steps=steps).trace
        curve.append((penalty, trace.acceptance_rate(), trace["energy"][-1].item()))
    return curve


def _describe(name: str, p: float, kind: str) -> str:
    return f"{name}, p = {p:g}, H {kind}"


def proposition_1(size: int = 64) -> dict:
    """Both branches of PODM fall by their own repaired constant, for three H, three priors, three networks.

    Eq: PODM Proposition 1.
    """
    rows = []
    for instance, (kind, network) in product(INSTANCES, networks().items()):
        constants, result = stage_run(*instance, network, size)
        rows.append(row(_describe(*instance), kind, proposition_1_checks(result.trace, constants), result))
    a = haar_band()
    problem, cycle = two_cycle(a, 0.008)
    c = cycle.constants
    trace = propagate(cycle, problem, torch.zeros_like(a), steps=60).trace
    printed = descent(trace, c.penalty / 4 - c.tolerance**2 / c.penalty)
    nets = networks()
    grown = {kind: unchecked_run(nets[kind], size)[2].trace for kind in ("untrained", "adversary")}
    problem, x0 = coefficient_problem("camera", size, 1.0)
    long = replace(Constants.for_lipschitz(problem.lipschitz), feedback=2.2 / problem.lipschitz)
    stretched = propagate(solver(None, problem, constants=long), problem, x0, steps=200, raises=False)
    return entry(rows, [], [
        *({"what": f"every proposal is kept, {kind} network: the energy rises", "violates": not descent(run, 0.0).holds,
           "increases": int((run.with_start("energy").diff(dim=0) > 0).sum())} for kind, run in grown.items()),
        {"what": "mu gamma < 1 and the linear network A(x) = -5x: (5) holds with an error of zero, the energy alternates",
         "violates": error_condition(trace, c.tolerance).holds and not printed.holds,
         "energies": trace["energy"][-2:, 0].tolist(), "error": trace["residual"].max().item()},
        {"what": "feedback alone, with the step 2.2 / L: the energy rises",
         "violates": not descent(stretched.trace, 0.0).holds, "iterations": stretched.iterations},
    ])  # fmt: skip


def _ends(size: int, checks: Callable[[Problem, Constants, Result], list[Check]], exponents=tuple(WEIGHT)) -> list[dict]:
    """One row for each run that is driven until nothing moves: the three H, every network."""
    rows = []
    cases = [(p, kind) for _, p, kind in INSTANCES if p in exponents]
    for (p, kind), (name, network) in product(cases, networks().items()):
        problem, constants, result = run_to_the_end(p, network, size, kind)
        end = row(f"well-conditioned blur, p = {p:g}, H {kind}", name, checks(problem, constants, result), result)
        rows.append(end | {"energy": result.trace["energy"][-1].item()})
    return rows


def proposition_2(size: int = 64) -> dict:
    """The energies fall to the energy of the limit, also where the prior is only lower semicontinuous.

    Eq: PODM Proposition 2.
    """

    def checks(problem: Problem, constants: Constants, result: Result) -> list[Check]:
        fall, limit = descent(result.trace, result.trace["kappa"]), problem.energy(result.x)
        return [fall, *energy_at_the_limit(result.trace, constants, limit), settled(result.trace, 1e-9)]

    problem, x0 = coefficient_problem("camera", size, 0.0)
    constants, zero = Constants.for_lipschitz(problem.lipschitz), problem.energy(0 * x0)
    small = propagate(Shrinking(), problem, x0, steps=60).trace
    above, still = small["energy"][-1].item() - zero.item(), small["energy"][-2:].diff(dim=0).abs().item()
    a = haar_band()
    toy, cycle = two_cycle(a, 0.008)
    energies = propagate(cycle, toy, torch.zeros_like(a), steps=60).trace["energy"][-2:, 0]
    grown = unchecked_run(networks()["untrained"], size)[2].trace
    return entry(_ends(size, checks), [], [
        {"what": "p = 0, a sequence shrinks to 0 without a proximal map: the energies converge, not to that of the limit",
         "violates": still < 1e-12 * above and not energy_at_the_limit(small, constants, zero)[1].holds,
         "distance": small["distance"][-1].item(), "gap": above},
        {"what": "mu gamma < 1 and the linear network A(x) = -5x: the energies have no limit",
         "violates": (energies[1] - energies[0]).abs().item() > 1e-3 * energies[0].item(), "energies": energies.tolist()},
        {"what": "every proposal is kept, untrained network: the energies do not fall",
         "violates": not descent(grown, 0.0).holds, "last": grown["energy"][-1].item()},
    ])  # fmt: skip


def theorem_1(size: int = 64) -> dict:
    """Bounded subgradients on every run; then finite length and criticality, where the blur lets one see the end.

    (At p = 0.8 coefficients still drop out late, each with a jump, so that no geometric tail is seen.)
    Eq: PODM Theorem 1.
    """
    rows, nets = [], networks()
    for instance, (kind, network) in product(INSTANCES, nets.items()):
        result = stage_run(*instance, network, size)[1]
        rows.append(row(_describe(*instance), kind, theorem_1_checks(result.trace), result))

    def checks(problem: Problem, constants: Constants, result: Result) -> list[Check]:
        tail = [halving(result.trace), settled(result.trace, 1e-9), critical(problem, result, constants.feedback)]
        return theorem_1_checks(result.trace) + tail

    controls = []
    for name in [n for n in nets if n != "adversary"]:
        problem, constants, free = unchecked_run(nets[name], size)
        lost = settled(free.trace, 1e-6).holds and not critical(problem, free, constants.feedback).holds
        what = f"every proposal is kept, {name} network: the iterates settle at a point that is not critical"
        last = free.trace["subgradient"][-1].item()
        controls.append({"what": what, "violates": lost, "relative_change": free.residual, "subgradient": last})
    problem, x0 = coefficient_problem("camera", size, 1.0, gaussian(delta=0.5))
    faded = propagate(Fading([], Constants.for_lipschitz(problem.lipschitz)), problem, x0, steps=60)
    a = haar_band()
    toy, cycle = two_cycle(a, 0.008)
    trace = propagate(cycle, toy, torch.zeros_like(a), steps=60).trace
    bounded = subgradient_bound(trace, trace["bound"]).holds
    return entry(rows, _ends(size, checks, (1.0, 0.0)), [
        *controls,
        {"what": "feedback alone, with a step that halves at every stage: the iterates settle where nothing is critical",
         "violates": settled(faded.trace, 1e-9).holds and not critical(problem, faded, 0.95 / problem.lipschitz).holds,
         "relative_change": faded.residual, "subgradient": faded.trace["subgradient"][-1].item()},
        {"what": "mu gamma < 1 and the linear network A(x) = -5x: bounded subgradients, and the moves do not go to 0",
         "violates": bounded and not settled(trace).holds, "last_move": trace["change"][-1].item()},
    ])  # fmt: skip
