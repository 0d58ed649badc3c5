"""GDC: generative, discriminative and corrective modules in any order, and the two controls that make them converge.

Each module is a map ``u -> u`` of one stage: ``T_G(u) = u + G(u)`` (2), ``T_D(u) = u - step grad d(u)`` (4), and the
correction ``T_C`` by the model (6)-(9).  A sequence of them is a stage.  `Cascade` runs the stages unchecked, which is what
joint training differentiates (`odlkit.propagate.iterate`); `FullyDefined` and `PartiallyDefined` are Algorithms 1 and 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from odlkit.control import BoundedGradient, Candidate, MonotoneEnergy
from odlkit.models.padnet import Schedule
from odlkit.networks import clip_to_ball
from odlkit.problem import Problem, norm_items, square_items
from odlkit.propagate import Record, State

Network = Callable[[Tensor, Any], Tensor]  # (u, alpha) -> u, or -> (B,) for a classifier
Module = Callable[[Problem, Tensor, int], Tensor]  # T: (problem, u, stage) -> u
Levels = Callable[[int], Any]  # stage -> alpha, a float or (B, 1, 1, 1)


@dataclass(frozen=True)
class Penalty:
    """``gamma_t = min(growth^t first, cap)``: the weight of ``(gamma_t / 2) ||u - u^t||^2`` in (5).

    ``first`` is a float or ``(B, 1, 1, 1)``.  The cap keeps ``gamma_t (u_c - u_d) = -grad f(u_c)`` above round-off.
    Eq: GDC (5), footnote 1.
    """

    first: Any
    growth: float = 1.0
    cap: float = 1e12

    def __call__(self, stage: int) -> Any:
        gamma = Schedule(self.first, self.growth)(stage)[0]
        return gamma.clamp(max=self.cap) if isinstance(gamma, Tensor) else min(gamma, self.cap)


def _of_stage(networks: Any, stage: int) -> Any:
    """One network for every stage, or the stage's own of a list whose last serves all later stages."""
    return networks[min(stage, len(networks) - 1)] if isinstance(networks, Sequence | nn.ModuleList) else networks


@dataclass
class Generative:
    """``T_G(u) = u + G(u)`` with the network called as ``network(u, alpha) -> u + G(u)``, as `ResidualNet` is.

    ``network`` may be a list, one a stage.  Eq: GDC (2).
    """

    network: Network | Sequence[Network] | nn.ModuleList
    levels: Levels

    def __call__(self, problem: Problem, u: Tensor, stage: int) -> Tensor:
        return _of_stage(self.network, stage)(u, self.levels(stage))


@dataclass
class Discriminative:
    """``T_D(u) = u + step D(u)``, ``D(u) = -grad_u d(u)``, d the logit of "this image is corrupted".

    ``classifier(u, alpha) -> (B,)`` has label 1 for corrupted and 0 for clean images, and must judge each image by itself;
    then every image gets its own gradient.  It works under ``torch.no_grad`` and, where gradients are recorded, can be
    differentiated again with respect to ``u`` and the classifier's weights.  Use a smooth activation: a ReLU classifier's D
    is piecewise constant in ``u``.  ``classifier`` may be a list, one a stage; ``step`` a function of the stage.
    Eq: GDC (3), (4).
    """

    classifier: Network | Sequence[Network] | nn.ModuleList
    levels: Levels
    step: Any = 1.0

    def direction(self, u: Tensor, stage: int) -> Tensor:
        """``D(u)``, shape of ``u``."""
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            v = u if again and u.requires_grad else u.detach().requires_grad_()
            d = _of_stage(self.classifier, stage)(v, self.levels(stage))
            (slope,) = torch.autograd.grad(d.sum(), v, create_graph=again)
        return -slope

    def __call__(self, problem: Problem, u: Tensor, stage: int) -> Tensor:
        step = self.step(stage) if callable(self.step) else self.step
        return u + step * self.direction(u, stage)


@dataclass
class Corrective:
    """``T_C``, the model's correction with weight ``gamma = penalty(stage)``.

    Fully defined: ``prox_{phi / gamma}(u - grad f(u) / gamma)`` (6).  Without a prior, or with ``partial=True``:
    ``argmin f + (gamma / 2) ||. - u||^2`` (7).  (7) is safe for every gamma, (6) expands where gamma < L / 2:
    ``least`` raises the gamma of (6) to ``least L``.  Eq: GDC (6), (7), (8), (9).
    """

    penalty: Callable[[int], Any]
    partial: bool = False
    least: float = 0.0

    def __call__(self, problem: Problem, u: Tensor, stage: int) -> Tensor:
        gamma = self.penalty(stage)
        if self.partial or problem.prior is None:
            return problem.fidelity.prox(u, 1 / gamma)
        if self.least:
            floor = self.least * problem.lipschitz
            gamma = gamma.clamp(min=floor) if isinstance(gamma, Tensor) else max(gamma, floor)
        return problem.prox_prior(u - problem.fidelity.grad(u) / gamma, 1 / gamma)


def cascade(modules: Sequence[Module], problem: Problem, u: Tensor, stage: int) -> Tensor:
    """One stage: the modules in their order."""
    for module in modules:
        u = module(problem, u, stage)
    return u


def scheme(
    name: str, network: Any, classifier: Any, levels: Levels, penalty: Callable[[int], Any], step: Any = 1.0
) -> list[Module]:
    """The stage of ``GM``, ``GD``, ``GC`` or ``GDC``: the data step (7), then G, then D and C as the name says.

    ``classifier`` is not used by GM and GC.  C is (6), with gamma at least L, where the problem has a prior.  The names are
    those of the paper's Table III.  Eq: GDC (2), (4), (7), (9).
    """
    if name not in ("GM", "GD", "GC", "GDC"):
        raise ValueError(f"name: expected GM, GD, GC or GDC, got {name!r}")
    modules: list[Module] = [Corrective(penalty, partial=True), Generative(network, levels)]
    if "D" in name:
        modules.append(Discriminative(classifier, levels, step))
    if "C" in name:
        modules.append(Corrective(penalty, least=1.0))
    return modules


@dataclass
class Cascade:
    """The stages one after another, nothing checked and nothing recorded.  Eq: GDC (9)."""

    modules: Sequence[Module]

    def init(self, problem: Problem, x0: Tensor) -> State:
        return State(x0)

    def __call__(self, problem: Problem, state: State) -> tuple[State, Record]:
        return state.next(cascade(self.modules, problem, state.x, state.k)), {}


@dataclass
class FullyDefined:
    """Algorithm 1: the modules propose ``u_c``, the energy decides on ``v``, a proximal-gradient step follows.

    ``v = u_c`` if ``Psi(u_c) <= Psi(u) - a ||u_c - u||^2``, else ``v = u``; then
    ``u+ = prox_{phi / gamma}(v - grad f(v) / gamma)``, with ``a = margin L`` and ``gamma`` = ``penalty``, 1.05 L by default.
    The paper has a = 0, which lets the sequence oscillate, and a growing gamma, which freezes it; needed is a constant
    ``gamma > L`` (that of the modules may grow).  Other penalties, also functions of the stage, are there to show this, and
    `check` refuses them.  Each image of a batch is judged by itself.  ``control`` gets NaN for a computable error.

    Recorded: ``accepted``; ``energy``, ``energy_v``; ``moved`` = ||v - u||; ``distance`` = d = ||u+ - v||^2; ``kappa`` =
    (gamma - L) / 2; ``subgradient``, the norm of ``-gamma (u+ - v) - grad f(v) + grad f(u+)`` in dPsi(u+).

    Eq: GDC Algorithm 1.
    """

    modules: Sequence[Module]
    penalty: float | Callable[[int], float] | None = None
    margin: float = 1e-3
    control: Callable[[Problem, Candidate], Tensor] | None = None

    def gamma(self, problem: Problem, stage: int) -> float:
        """gamma of step 11."""
        if self.penalty is None:
            return 1.05 * problem.lipschitz
        return self.penalty(stage) if callable(self.penalty) else self.penalty

    def check(self, problem: Problem) -> None:
        """Raise ``ValueError`` unless gamma is a constant above L and the margin positive: what Proposition 1 needs."""
        if callable(self.penalty):
            raise ValueError("penalty: expected a constant, got a function of the stage (gamma must stay bounded)")
        if not self.gamma(problem, 0) > problem.lipschitz:
            raise ValueError(f"penalty: expected more than L = {problem.lipschitz:.3g}, got {self.gamma(problem, 0):.3g}")
        if self.control is None and not self.margin > 0:
            raise ValueError(f"margin: expected a positive number, got {self.margin}")

    def init(self, problem: Problem, x0: Tensor) -> State:
        return State(x0)

    def __call__(self, problem: Problem, state: State) -> tuple[State, Record]:
        u, gamma = state.x, self.gamma(problem, state.k)
        control = self.control or MonotoneEnergy(self.margin * problem.lipschitz)
        u_c = cascade(self.modules, problem, u, state.k)
        accepted = control(problem, Candidate(u, u_c, u_c, torch.full_like(u, torch.nan))) & bool(self.modules)
        v = torch.where(accepted.view(-1, 1, 1, 1), u_c, u)
        slope = problem.fidelity.grad(v)
        new = problem.prox_prior(v - slope / gamma, 1 / gamma)  # step 11
        xi = -gamma * (new - v) - slope + problem.fidelity.grad(new)
        record = {
            "accepted": accepted.to(torch.float64),
            "energy": problem.energy(new),
            "energy_v": problem.energy(v),
            "moved": norm_items(v - u),
            "distance": square_items(new - v),
            "kappa": (gamma - problem.lipschitz) / 2,
            "subgradient": norm_items(xi),
        }
        return state.next(new), record


@dataclass
class PartiallyDefined:
    """Algorithm 2: the modules propose ``u_d`` close to ``u``, the data step corrects it, the gradient of f decides.

    ``u_d = u + r min(1, sqrt(c / gamma_t) / ||r||)`` with ``r = T(u) - u``, T the modules;
    ``u_c = argmin f + (gamma_t / 2) ||. - u_d||^2`` (7); ``u+ = u_c`` if ``||grad f(u_c)|| <= M``, else ``u``.
    The clip makes the assumption of Proposition 2 true for every network (``c=None``: no clip).  ``gate`` is M, a number of
    its own: the paper's L is also its Lipschitz constant.  Then ``||u+ - u|| <= M / gamma_t + sqrt(c / gamma_t)``, and the
    sequence converges if gamma_t grows geometrically.  Each image of a batch is judged by itself.

    Recorded: ``accepted``; ``held``, its opposite: the image did not move, and `odlkit.propagate.propagate` does not take
    that for convergence; ``gradient`` = ||grad f(u_c)||; ``penalty`` = gamma_t; ``move`` = ||r|| before the clip;
    ``radius`` = sqrt(c / gamma_t); ``within``, 1 where the network met the assumption without the clip; ``data_step`` =
    ||u_c - u_d||.

    Eq: GDC Algorithm 2, Condition 2, (7).
    """

    modules: Sequence[Module]
    penalty: Callable[[int], Any]
    gate: float
    c: float | None
    control: Callable[[Problem, Candidate], Tensor] | None = None

    def init(self, problem: Problem, x0: Tensor) -> State:
        return State(x0)

    def __call__(self, problem: Problem, state: State) -> tuple[State, Record]:
        u, gamma = state.x, self.penalty(state.k)
        control = self.control or BoundedGradient(self.gate)
        r = cascade(self.modules, problem, u, state.k) - u
        radius = torch.as_tensor(torch.inf if self.c is None else (self.c / gamma) ** 0.5, dtype=u.dtype, device=u.device)
        radius = radius.reshape(-1).expand(len(u))
        u_d = u + (r if self.c is None else clip_to_ball(r, radius))
        u_c = problem.fidelity.prox(u_d, 1 / gamma)
        accepted = control(problem, Candidate(u, u_d, u_c, torch.full_like(u, torch.nan)))
        move = norm_items(r)
        record = {
            "accepted": accepted.to(torch.float64),
            "held": (~accepted).to(torch.float64),
            "gradient": norm_items(problem.fidelity.grad(u_c)),
            "penalty": gamma,
            "move": move,
            "radius": radius,
            "within": (move <= radius).to(torch.float64),
            "data_step": norm_items(u_c - u_d),
        }
        return state.next(torch.where(accepted.view(-1, 1, 1, 1), u_c, u)), record
