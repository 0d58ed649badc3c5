"""PODM: propagation and optimization based deep model (NeurIPS 2018), controlled and relaxed.

A stage proposes ``x_A = A(x^{l-1})`` by a network, propagates ``x_F = F(x_A) = argmin f + ||. - x_A||_H^2`` (3), and takes
the proximal step with momentum ``x_G = prox_{gamma g}(x_F - gamma (grad f(x_F) + mu (x_F - x^{l-1})))`` (7).  The controlled
form keeps ``x_G`` where the optimality error (5) allows it and otherwise feeds back a proximal-gradient step (6); the
relaxed form keeps it always, and learns A and H end to end.

``H = (mu / 2) W^T W`` with an operator W, which covers every symmetric positive semidefinite H: W = I is the scalar
``mu I / 2`` of section 5.1, a `FilterBank` the filtered distance of section 5.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from odlkit.control import Candidate, ErrorCondition, distance_operator, optimality_error
from odlkit.models.padnet import Network, Schedule
from odlkit.networks import ConvUnit, LearnedMetric
from odlkit.operators import FilterBank, Operator
from odlkit.problem import Problem, norm_items
from odlkit.propagate import Record, State


@dataclass(frozen=True)
class Constants:
    """mu, gamma and c of one stage, and the descent constants that they buy.  Eq: PODM Proposition 1.

    ``least`` and ``greatest`` are the extreme eigenvalues of H (both ``penalty / 2`` for the scalar H).  The constants are
    the repaired ones, for an L-smooth convex f and any lower semicontinuous prior.
    """

    penalty: float
    step_size: float
    tolerance: float
    feedback: float  # step of the proximal gradient, < 1 / L

    def accepted(self, least: float | None = None) -> float:
        """kappa of an accepted stage: ``mu / 2 + lambda_min(H) - 1 / (2 gamma) - c``."""
        least = self.penalty / 2 if least is None else least
        return self.penalty / 2 + least - 0.5 / self.step_size - self.tolerance

    def fed_back(self, lipschitz: float) -> float:
        """kappa of a feedback stage: ``1 / (2 gamma) - L / 2``."""
        return 0.5 / self.feedback - lipschitz / 2

    def bounds(self, greatest: float | None = None) -> tuple[float, float]:
        """b with ``||xi|| <= b ||x^l - x^{l-1}||``: ``c + mu / 2 + lambda_max(H)`` accepted, ``1 / gamma`` fed back.

        Eq: PODM Theorem 1.
        """
        greatest = self.penalty / 2 if greatest is None else greatest
        return self.tolerance + self.penalty / 2 + greatest, 1 / self.feedback

    def check(self, lipschitz: float, least: float | None = None) -> None:
        """Raise ``ValueError`` unless both descent constants are positive for this L."""
        if self.accepted(least) <= 0:
            text = f"mu/2 + lambda_min(H) - 1/(2 gamma) - c = {self.accepted(least):.3g}"
            raise ValueError(f"constants: {text}, expected a positive number")
        if not 0 < self.feedback < 1 / lipschitz:
            text = f"feedback is {self.feedback:.3g}"
            raise ValueError(f"constants: {text}, expected a step in (0, 1/L) = (0, {1 / lipschitz:.3g})")

    @staticmethod
    def for_lipschitz(lipschitz: float, penalty: float = 3.0, share: float = 0.95) -> Constants:
        """``mu = penalty L``, ``1 / gamma = mu + L / 2``, c the given share of what leaves kappa positive (scalar H)."""
        mu = penalty * lipschitz
        return Constants(mu, 1 / (mu + lipschitz / 2), share * (mu / 2 - lipschitz / 4), 0.95 / lipschitz)


@dataclass
class PODM:
    """The solver: networks propose, the optimality error decides, the proximal gradient feeds back.

    ``psi = (1/gamma)(x_F - x_G) - (mu/2)(2 x_F - x_G - x^{l-1}) + H (x_G - x^{l-1}) + grad f(x_G) - grad f(x_F)``; a stage
    is kept iff ``||psi|| <= c ||x_G - x^{l-1}||`` (5).  ``networks[l]`` is the l-th stage's A, called with a noise level;
    the last serves all later stages.  ``halvings`` half-moves of x_A towards ``x^{l-1}`` are tried before the feedback.
    ``metric`` is W, None for the identity.  ``feedback=False`` keeps the last proposal instead: nothing is controlled.
    Every image of a batch is judged on its own.

    Recorded: ``accepted``, ``tries``, ``residual`` = ||psi|| (0 after a feedback), ``kappa`` and ``bound``, the constants of
    the branch taken, and ``subgradient``, the norm of an element of dPhi(x^l), which certifies criticality by itself.

    Eq: PODM (2), (3), (4), (5), (6), (7).
    """

    networks: Sequence[Network]
    constants: Constants
    levels: Callable[[int], Any] = field(default_factory=lambda: lambda stage: 0.02)
    metric: Operator | None = None
    halvings: int = 0
    control: Callable[[Problem, Candidate], Tensor] | None = None
    feedback: bool = True

    def init(self, problem: Problem, x0: Tensor) -> State:
        c = self.constants
        extremes = (1.0, 1.0) if self.metric is None else self.metric.eigenvalue_range(x0)
        least, greatest = (c.penalty / 2 * m for m in extremes)
        kappas, bounds = (c.accepted(least), c.fed_back(problem.lipschitz)), c.bounds(greatest)
        return State(x0, aux={"kappa": kappas, "bound": bounds})  # of an accepted stage, of a feedback

    def propagation(self, problem: Problem, x_a: Tensor) -> Tensor:
        """``x_F = F(x_A)``.  Eq: PODM (3)."""
        mu = self.constants.penalty
        return problem.fidelity.prox(x_a, 1 / mu) if self.metric is None else problem.fidelity.nearest(x_a, mu, self.metric)  # type: ignore[attr-defined]

    def optimality(self, problem: Problem, x: Tensor, x_f: Tensor) -> tuple[Tensor, Tensor]:
        """``x_G`` and ``psi`` for the old iterate and a propagated point.  Eq: PODM (7), (5)."""
        mu, gamma = self.constants.penalty, self.constants.step_size
        slope = problem.fidelity.grad(x_f)
        x_g = problem.prox_prior(x_f - gamma * (slope + mu * (x_f - x)), gamma)
        return x_g, optimality_error(problem, x, x_f, x_g, gamma, mu, self.metric, slope)

    def h(self, x: Tensor) -> Tensor:
        """``H x``."""
        return distance_operator(x, self.constants.penalty, self.metric)

    def proposals(self, x: Tensor, stage: int) -> Iterator[Tensor]:
        """``x_A`` of this stage's network, then half-moves towards ``x``."""
        if not self.networks:
            return
        x_a = self.networks[min(stage, len(self.networks) - 1)](x, self.levels(stage))
        yield x_a
        for _ in range(self.halvings):
            x_a = x + 0.5 * (x_a - x)
            yield x_a

    def __call__(self, problem: Problem, state: State) -> tuple[State, Record]:
        control = self.control or ErrorCondition(self.constants.tolerance)
        x, mu = state.x, self.constants.penalty
        kept, error = x, torch.zeros_like(x)
        done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        tries = torch.zeros(len(x), device=x.device)
        for x_a in self.proposals(x, state.k):
            x_f = self.propagation(problem, x_a)
            x_g, psi = self.optimality(problem, x, x_f)
            tries = tries + ~done
            new = control(problem, Candidate(x, x_f, x_g, psi)) & ~done
            keep = (new | (~done & (not self.feedback))).view(-1, 1, 1, 1)  # without feedback the last proposal stays
            kept, error = torch.where(keep, x_g, kept), torch.where(keep, psi, error)
            done = done | new
            if bool(done.all()):
                break
        move = kept - x
        xi = error - mu / 2 * move - self.h(move)  # in dPhi(x_G), by the definitions of epsilon and psi
        back = ~done & self.feedback
        if bool(back.any()):
            gamma = self.constants.feedback
            slope = problem.fidelity.grad(x)
            x_b = problem.prox_prior(x - gamma * slope, gamma)
            chosen = back.view(-1, 1, 1, 1)
            xi = torch.where(chosen, (x - x_b) / gamma + problem.fidelity.grad(x_b) - slope, xi)
            kept = torch.where(chosen, x_b, kept)
        record = {
            "accepted": done.to(torch.float64),
            "tries": tries,
            "residual": norm_items(error),
            "subgradient": norm_items(xi),
        }
        for name in ("kappa", "bound"):  # in float64: torch.where of two numbers would round them to float32
            both = torch.tensor(state.aux[name], dtype=torch.float64, device=x.device)
            record[name] = both[back.long()]
        return state.next(kept), record


class RelaxedNet(nn.Module):
    """The weights of relaxed PODM: for each stage a network A, a metric H and the step gamma of its optimality module.

    With more ``stages`` than ``units``, neighbouring stages share a network; each keeps its own metric and step.
    ``x_A = x - alpha A(x, alpha)`` with levels alpha falling from ``first`` to ``last`` (None: the noise level itself).
    Source: PODM section 4.2, theta_A and theta_H.
    """

    def __init__(self, units: Sequence[dict], first: float = 0.2, last: float | None = None, size: int = 5, stages: int = 0):
        super().__init__()
        stages = stages or len(units)
        self.networks = nn.ModuleList(ConvUnit(**config) for config in units)
        self.metrics = nn.ModuleList(LearnedMetric(size) for _ in range(stages))
        self.log_steps = nn.Parameter(torch.full((stages,), -3.0))
        self.config: dict[str, Any] = {"units": list(units), "first": first, "last": last, "size": size, "stages": stages}

    def __len__(self) -> int:
        return len(self.metrics)

    def network(self, stage: int) -> nn.Module:
        """A of one stage."""
        return self.networks[stage * len(self.networks) // len(self)]

    def rearranged(self, places: Sequence[int]) -> RelaxedNet:
        """The same networks for another number of stages: stage l takes metric and step of the present ``places[l]``."""
        net = RelaxedNet(**(self.config | {"stages": len(places)})).to(self.log_steps)
        net.networks.load_state_dict(self.networks.state_dict())
        for metric, place in zip(net.metrics, places, strict=True):
            metric.load_state_dict(self.metrics[place].state_dict())
        net.log_steps.data.copy_(self.log_steps.data[list(places)])
        return net


@dataclass
class Relaxed:
    """RPODM: ``x^l = G(F(A(x^{l-1}; theta_A^l); theta_H^l))``, one stage a step, nothing checked.

    ``sigma`` is the noise level, a float or ``(B, 1, 1, 1)``; ``scale`` the magnification of super-resolution.  There are as
    many steps as ``net`` has stages; the last stage would serve further ones.  The problem's prior is the indicator of the
    set Omega (`SparseBox`, or `Box` where every pixel may be nonzero).
    Source: PODM section 4.2, with the corrected factor 2 of the closed form.
    """

    net: RelaxedNet
    sigma: Any
    scale: float = 1.0

    def init(self, problem: Problem, x0: Tensor) -> State:
        sigma = torch.as_tensor(self.sigma, dtype=x0.dtype, device=x0.device).expand(len(x0), 1, 1, 1)
        first, last = self.net.config["first"], self.net.config["last"]
        return State(x0, aux={"sigma": sigma, "alpha": Schedule.between(first, last or sigma, len(self.net))})

    def __call__(self, problem: Problem, state: State) -> tuple[State, Record]:
        x, sigma = state.x, state.aux["sigma"]
        stage = min(state.k, len(self.net) - 1)
        network, metric = self.net.network(stage), self.net.metrics[stage]
        alpha = torch.as_tensor(state.aux["alpha"](stage)[1], dtype=x.dtype, device=x.device).expand(len(x), 1, 1, 1)
        gamma = self.net.log_steps[stage].exp()
        x_a = (x - alpha * network(x, alpha)).to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):  # mixed precision is for the network: H must stay definite
            mu = metric.penalty(sigma, alpha, self.scale)  # type: ignore[operator]
            x_f = problem.fidelity.nearest(x_a, mu, FilterBank(metric.filters().to(x)))  # type: ignore[attr-defined,operator]
            slope = problem.fidelity.grad(x_f) + mu * (x_f - x)
            x_g = problem.prox_prior(x_f - gamma * slope, gamma)
        return state.next(x_g), {"penalty": mu.detach().flatten(), "level": alpha.flatten()}
