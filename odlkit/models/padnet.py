"""PADNet: proximal alternating direction networks (AAAI 2019), explicit and implicit.

Both propagate ``u`` (fidelity), ``v`` (network) and the scaled dual ``nu`` (the paper's lambda) by ADMM on the
Moreau-Yosida regularised energy; the explicit form adds the error correction of Step 4 and, here, the fallback that closes
Algorithm 2's hole, so that the error condition holds at every iteration whatever the network does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        rho = self.rho0 * self.growth**k
        rho = rho.clamp(max=1e24) if isinstance(rho, Tensor) else min(rho, 1e24)  # no overflow; far beyond any effect
        return rho, rho**-0.5

    @staticmethod
    def between(first: Any, last: Any, depth: int) -> Schedule:
        """Step sizes alpha falling geometrically from ``first`` to ``last`` over ``depth`` iterations.

        The ends are floats, or ``(B, 1, 1, 1)`` tensors for a batch of noise levels.
        """
        return Schedule(first**-2, (first / last) ** (2 / max(depth - 1, 1)))


def alternate(problem: Problem, state: State, network: Network, rho: Any, alpha: Any, moreau: float) -> dict[str, Tensor]:
    """Steps 2 and 3 of Algorithm 1 and the dual step: the preliminary estimate, the network, the scaled dual.

    ``u+ = argmin f(u) + (moreau/2)||u - x||^2 + (rho/2)||u - (v - nu)||^2``,  ``v+ = N_alpha(u+ + nu)``,
    ``nu+ = nu + u+ - v+``.  Eq: PADNet (3), (5), (6).
    """
    v, nu = state.aux["v"], state.aux["nu"]
    target = v - nu
    mixed = (moreau * state.x + rho * target) / (moreau + rho) if moreau else target
    u = problem.fidelity.prox(mixed, 1 / (moreau + rho))
    w = u + nu
    v_next = network(w, alpha)
    return {"u": u, "w": w, "v": v_next, "nu": w - v_next, "target": target}


@dataclass
class Implicit:
    """IPADNet: Algorithm 1 without Step 4, ``x^{k+1} = v^{k+1}``.  The prior lives in the network only.

    Eq: PADNet Algorithm 1 (implicit reading), Theorem 2.  ``network`` is called as ``network(v, alpha)``; the theorem
    needs ``||network(v, alpha) - v|| <= C_N alpha``, which `ResidualNet` with a ``bound`` guarantees.  ``moreau`` is mu.
    Each step records what Theorem 2's constants are made of.
    """

    network: Network
    schedule: Schedule = field(default_factory=Schedule)
    moreau: float = 0.0

    def init(self, problem: Problem, x0: Tensor) -> State:
        return State(x0, aux={"u": x0, "v": x0, "nu": torch.zeros_like(x0)})

    def __call__(self, problem: Problem, state: State) -> tuple[State, Record]:
        rho, alpha = self.schedule(state.k)
        new = alternate(problem, state, self.network, rho, alpha, self.moreau)
        record = {
            "move": norm_items(new["v"] - new["w"]),  # ||N(w) - w||
            "dual": norm_items(new["nu"]),
            "fidelity_gradient": norm_items(rho * (new["u"] - new["target"])),  # ||grad f_k(u+)|| by optimality of u+
            "change_u": norm_items(new["u"] - state.aux["u"]),
            "change_v": norm_items(new["v"] - state.aux["v"]),
            "change_nu": norm_items(new["nu"] - state.aux["nu"]),
        }
        return state.next(new["v"], u=new["u"], v=new["v"], nu=new["nu"]), record


__all__: Sequence[str] = ["Explicit", "Implicit", "Schedule", "alternate"]
