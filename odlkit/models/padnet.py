"""PADNet: proximal alternating direction networks (AAAI 2018), explicit and implicit.

Both propagate ``u`` (fidelity), ``v`` (network) and the scaled dual ``nu`` (the paper's lambda) by ADMM on the Moreau-Yosida
regularised energy: ``u+ = argmin f(u) + (mu/2)||u - x||^2 + (rho/2)||u - (v - nu)||^2``, ``v+ = N_alpha(u+ + nu)``,
``nu+ = nu + u+ - v+`` (PADNet 3, 5, 6).  The explicit form adds the error correction of Step 4 and, here, the fallback that
closes Algorithm 2's hole, so that the error condition holds at every iteration whatever the network does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from odlkit.control import Candidate, ErrorCondition
from odlkit.problem import Problem, norm_items
from odlkit.propagate import Record, State

Network = Callable[[Tensor, float], Tensor]  # N_alpha: (v, alpha) -> v


@dataclass
class Schedule:
    """``rho_k = growth^k rho_0`` and ``alpha_k = rho_k^{-1/2}``.  Eq: PADNet Algorithm 2, "Require"."""

    rho0: Any = 25.0
    growth: Any = 2.0

    def __call__(self, k: int) -> tuple[Any, Any]:
        try:
            rho = self.rho0 * self.growth**k
        except OverflowError:  # floats raise where tensors give infinity
            rho = 1e24
        rho = rho.clamp(max=1e24) if isinstance(rho, Tensor) else min(rho, 1e24)  # no overflow; far beyond any effect
        return rho, rho**-0.5

    @staticmethod
    def between(first: Any, last: Any, depth: int) -> Schedule:
        """Step sizes alpha falling geometrically from ``first`` to ``last`` over ``depth`` iterations.

        The ends are floats, or ``(B, 1, 1, 1)`` tensors for a batch of noise levels.
        """
        return Schedule(first**-2, (first / last) ** (2 / max(depth - 1, 1)))


@dataclass
class Implicit:
    """IPADNet: Algorithm 1 without Step 4, ``x^{k+1} = v^{k+1}``.  The prior lives in the network only.

    Eq: PADNet (2), (3), (5), (29), (30), Algorithm 1 (implicit reading).  ``network`` is called as ``network(v, alpha)``;
    Theorem 2 needs ``||network(v, alpha) - v|| <= C_N alpha``, which `ResidualNet` with a ``bound`` guarantees.  ``moreau``
    is mu.  Each step records what Theorem 2's constants are made of.
    """

    network: Network
    schedule: Schedule = field(default_factory=Schedule)
    moreau: float = 0.0

    def init(self, problem: Problem, x0: Tensor) -> State:
        return State(x0, aux={"u": x0, "v": x0, "nu": torch.zeros_like(x0)})

    def __call__(self, problem: Problem, state: State) -> tuple[State, Record]:
        rho, alpha = self.schedule(state.k)
        old, mu = state.aux, self.moreau
        target = old["v"] - old["nu"]
        u = problem.fidelity.prox((mu * state.x + rho * target) / (mu + rho) if mu else target, 1 / (mu + rho))  # (3)
        w = u + old["nu"]
        v = self.network(w, alpha)  # (6)
        nu = w - v  # (5)
        record = {
            "alpha": alpha,
            "dual": norm_items(nu),  # = ||N(w) - w||, Condition 2
            "fidelity_gradient": norm_items(rho * (u - target)),  # = ||grad f_k(u)||, because u is optimal in (3)
            "change_u": norm_items(u - old["u"]),
            "change_v": norm_items(v - old["v"]),
            "change_nu": norm_items(nu - old["nu"]),
        }
        return state.next(v, u=u, v=v, nu=nu), record


@dataclass(frozen=True)
class Constants:
    """The constants of Theorem 1 in its repaired form, for a convex L-smooth f and any prior.  Eq: PADNet Theorem 1.

    Descent holds with ``kappa = moreau - 1 / (2 step_size) - tolerance`` and must be positive; the fallback ``v = x`` meets
    Condition 1 by itself iff ``tolerance >= max(|moreau - 1/step_size|, |moreau - 1/step_size + L|)``.
    """

    moreau: float
    step_size: float
    tolerance: float

    @property
    def kappa(self) -> float:
        """The descent constant: ``F(x^k) - F(x^{k+1}) >= kappa ||x^{k+1} - x^k||^2``."""
        return self.moreau - 0.5 / self.step_size - self.tolerance

    def check(self, lipschitz: float) -> None:
        """Raise ``ValueError`` unless the constants make the repaired theorem true for this L."""
        if self.kappa <= 0:
            kappa = "moreau - 1/(2 step_size) - tolerance"
            raise ValueError(f"constants: {kappa} = {self.kappa:.3g}, expected a positive number")
        slope = self.moreau - 1 / self.step_size
        needed = max(abs(slope), abs(slope + lipschitz))
        if self.tolerance < needed * (1 - 1e-12):
            raise ValueError(f"constants: tolerance is {self.tolerance:.3g}, the fallback needs at least {needed:.3g}")

    @staticmethod
    def for_lipschitz(lipschitz: float, moreau: float = 3.0, tolerance: float = 1.2) -> Constants:
        """``step_size = 1 / mu`` with ``mu = moreau L`` and ``C_E = tolerance L``: kappa = (moreau / 2 - tolerance) L."""
        return Constants(moreau * lipschitz, 1 / (moreau * lipschitz), tolerance * lipschitz)


@dataclass
class Explicit:
    """EPADNet: Algorithms 1 and 2 with error correction, the error condition, and a fallback that always meets it.

    For a proposal v:  ``x+ = prox_{tau R}(v - tau grad f_k(v))``,  ``f_k = f + (mu/2) ||. - x^k||^2``  (PADNet 7), whose
    computable error is ``e = (mu - 1/tau)(x+ - v) - grad f(v) + grad f(x+)``, an element of ``dR(x+) + grad f_k(x+)``
    (PADNet 12 at tau = 1).  Proposals are tried in order: each network of ``networks`` (Algorithm 2's growing number of
    units), then ``halvings`` half-moves of the last towards ``x^k``.  The first that ``control`` accepts is kept; else
    ``v = x^k, nu = 0``, a proximal-gradient step.  ``fallback=False`` keeps the last proposal instead, as Algorithm 2
    prints it.  Every image of a batch is judged on its own.

    Recorded: ``accepted``, ``tries``, ``residual`` = ||e||, ``subgradient`` = ||e - mu (x+ - x)||, the norm of an element of
    dF(x+), which certifies criticality by itself.

    Eq: PADNet (2), (3), (5), (23), Algorithm 1 (explicit reading), Algorithm 2 without the training.
    """

    networks: Sequence[Network]
    constants: Constants
    schedule: Schedule = field(default_factory=Schedule)
    halvings: int = 0
    control: Callable[[Problem, Candidate], Tensor] | None = None
    fallback: bool = True

    def init(self, problem: Problem, x0: Tensor) -> State:
        return State(x0, aux={"u": x0, "v": x0, "nu": torch.zeros_like(x0)})

    def correct(self, problem: Problem, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The error correction of one proposal and its computable error: ``(x+, e)``.  Eq: PADNet (7), (11), (12)."""
        mu, tau = self.constants.moreau, self.constants.step_size
        slope = problem.fidelity.grad(v)
        corrected = problem.prox_prior(v - tau * (slope + mu * (v - x)), tau)
        return corrected, (mu - 1 / tau) * (corrected - v) - slope + problem.fidelity.grad(corrected)

    def proposals(self, x: Tensor, w: Tensor, alpha: float) -> Iterator[Tensor]:
        """Algorithm 2's inner loop: networks in order, then half-moves towards ``x``."""
        v = x
        for network in self.networks:
            v = network(w, alpha)
            yield v
        for _ in range(self.halvings):
            v = x + 0.5 * (v - x)
            yield v

    def __call__(self, problem: Problem, state: State) -> tuple[State, Record]:
        rho, alpha = self.schedule(state.k)
        control = self.control or ErrorCondition(self.constants.tolerance)
        x, nu, mu = state.x, state.aux["nu"], self.constants.moreau
        target = state.aux["v"] - nu
        u = problem.fidelity.prox((mu * x + rho * target) / (mu + rho), 1 / (mu + rho))
        w = u + nu

        kept_x, kept_v, kept_e, kept_nu = x, x, x, torch.zeros_like(nu)
        done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        tries = torch.zeros(len(x), device=x.device)
        for v in self.proposals(x, w, alpha):
            corrected, e = self.correct(problem, x, v)
            tries = tries + ~done
            new = control(problem, Candidate(x, v, corrected, e)) & ~done
            keep = (new | (~done & (not self.fallback))).view(-1, 1, 1, 1)  # without fallback the last proposal stays
            kept_x, kept_v = torch.where(keep, corrected, kept_x), torch.where(keep, v, kept_v)
            kept_e, kept_nu = torch.where(keep, e, kept_e), torch.where(keep, w - v, kept_nu)
            done = done | new
            if bool(done.all()):
                break
        if self.fallback and not bool(done.all()):
            corrected, e = self.correct(problem, x, x)
            keep = done.view(-1, 1, 1, 1)
            kept_x, kept_e = torch.where(keep, kept_x, corrected), torch.where(keep, kept_e, e)
        record = {
            "accepted": done.to(torch.float64),
            "tries": tries,
            "residual": norm_items(kept_e),
            "subgradient": norm_items(kept_e - mu * (kept_x - x)),
        }
        return state.next(kept_x, u=u, v=kept_v, nu=kept_nu), record
