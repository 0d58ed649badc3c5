"""HODL for deconvolution: wavelet proximal gradient after a U-shaped network, one network for every iteration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from odlkit.linear import LinearMap
from odlkit.models.gdc_joint import HAAR, REFERENCE, SPEED
from odlkit.models.hodl import Map, averaged, compose, half_quadratic, proximal_gradient
from odlkit.networks import UNet
from odlkit.priors import details
from odlkit.problem import LeastSquares, Problem
from odlkit.propagate import Record, State

START = {"first": 0.2, "last": 1.0, "trust": 0.25, "kappa": 0.01}


class Deconvolution(nn.Module):
    """``T = I + alpha (D_num o D_net - I)`` for ``min_z ||Q W^T z - b||^2 + kappa ||z||_1``, ``u = W^T z``, W Haar.

    W is orthonormal, so a step on z is a step on u.  With the Moreau envelope of the data term,
    ``f_rho(u) = min_v ||Q v - b||^2 + (rho / 2) ||v - u||^2``, whose gradient has the Lipschitz constant rho,

        D_num(u) = W^T soft(W (u - grad f_rho(u) / rho), kappa / rho)

    is proximal gradient at step ``1 / rho``, non-expansive for every rho.

        D_net(u) = u - s G(u; s),  or, given theta,  (1 - theta) u + theta N(u; s)

    The second is non-expansive when N is 1-Lipschitz (`odlkit.networks.unet.lipschitz`).  The noise level s falls
    geometrically from ``first`` to ``last * sigma`` in ``depth`` steps and stays there, so T is one map from step ``depth``
    on, and what comes before chooses where it starts; ``first`` = None has it fixed from the beginning.
    ``rho_k = 2 trust (sigma / s_k)^2`` and ``kappa``, in units of sigma^2, are learned with s: factors
    ``exp(4 (a + b log10(sigma / 0.02)))``, of s and rho one for each step.  Step k is ``D_net`` at s_k, then ``D_num`` at
    rho_{k+1}; ``u^0 = D_num(b)`` at rho_0, and ``D_net(u^K)`` is what is restored.
    Raises ``ValueError`` for a theta outside (0, 1) and unknown names in ``start``.
    Eq: HODL (3), Table 2.  Source: HODL section 4.3.
    """

    def __init__(
        self, unit: dict, depth: int = 7, theta: float | None = None, alpha: float = 0.95, start: dict | None = None
    ):
        super().__init__()
        self.mixed = True
        start = START | (start or {})
        if start.keys() != START.keys():
            raise ValueError(f"start: expected only {', '.join(START)}, got {', '.join(start)}")
        if theta is not None and not 0 < theta < 1:
            raise ValueError(f"theta: expected None or a number in (0, 1), got {theta}")
        self.config: dict[str, Any] = {"unit": unit, "depth": depth, "theta": theta, "alpha": alpha, "start": start}
        self.depth, self.theta, self.alpha, self.unit = depth, theta, alpha, UNet(**unit)
        sizes = {"level": 1 if start["first"] is None else depth + 1, "kappa": 1}
        sizes["rho"] = sizes["level"]
        self.factors = nn.ParameterDict({name: nn.Parameter(torch.zeros(size, 2)) for name, size in sizes.items()})

    def factor(self, name: str, sigma: Tensor, k: int = 0) -> Tensor:
        """``exp(4 (a + b log10(sigma / 0.02)))`` of step k at the noise level ``sigma`` ``(B, 1, 1, 1)``."""
        a, b = self.factors[name][min(k, len(self.factors[name]) - 1)]
        return (SPEED * (a + b * (sigma / REFERENCE).log10())).exp()

    def plan(self, sigma: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """``s_k`` and ``rho_k``, of the shape of ``sigma``."""
        first, last = self.config["start"]["first"], self.config["start"]["last"] * sigma
        t = min(k / self.depth, 1.0)
        level = (last if first is None else first ** (1 - t) * last**t) * self.factor("level", sigma, k)
        return level, 2 * self.config["start"]["trust"] * (sigma / level).square() * self.factor("rho", sigma, k)

    def denoise(self, u: Tensor, sigma: Tensor, k: int) -> Tensor:
        """``D_net(u)`` of step k; in training mode the network computes in bfloat16, unless ``mixed`` is False."""
        level = self.plan(sigma, k)[0]
        with torch.autocast(u.device.type, torch.bfloat16, enabled=self.training and self.mixed):
            out = self.unit(u, level)
        return u - level * out.to(u) if self.theta is None else torch.lerp(u, out.to(u), self.theta)

    def numerical(self, operator: LinearMap, b: Tensor, sigma: Tensor, envelope: bool = True) -> Callable[[int], Map]:
        """``k -> D_num(u, params, k)``, params unused: wavelet proximal gradient at rho_k, the coarse band free.

        ``envelope=False`` takes ``||Q u - b||^2`` itself at step ``1 / (2 ||Q||^2)``, half the largest that is
        non-expansive: many more iterations.
        """
        kappa = self.config["start"]["kappa"] * sigma.square() * self.factor("kappa", sigma)
        fidelity, prior = LeastSquares(operator, b, 2.0), details(b, kappa, levels=HAAR)

        def prox_f(v: Tensor, size: Any, params: Any) -> Tensor:
            return fidelity.prox(v, size)

        def prox_g(v: Tensor, size: Any, params: Any) -> Tensor:
            return prior.prox(v, size)

        def of(k: int) -> Map:
            if envelope:
                return half_quadratic(prox_f, prox_g, self.plan(sigma, k)[1])
            return proximal_gradient(lambda u, params: fidelity.grad(u), prox_g, 1 / fidelity.bounds[1])

        return of

    def map(self, operator: LinearMap, b: Tensor, sigma: Tensor) -> tuple[Map, Tensor]:
        """``T(u, params, k)``, params unused, and ``u^0``.  Eq: HODL (3)."""
        D_num = self.numerical(operator, b, sigma)
        return self.step(D_num, sigma), D_num(0)(b, None, 0)

    def step(self, D_num: Callable[[int], Map], sigma: Tensor) -> Map:
        """``T(u, params, k)`` from `numerical`'s ``k -> D_num``."""

        def T(u: Tensor, params: Any, k: int) -> Tensor:
            D = compose(D_num(k + 1), lambda u, params, k: self.denoise(u, sigma, k))
            return averaged(D, self.alpha)(u, params, k)

        return T

    def forward(self, operator: LinearMap, b: Tensor, sigma: Tensor, u: Tensor, k: int) -> Tensor:
        """The k-th of the maps of a run: ``u^0`` from the data for k = 0, T for 1 ... depth, then ``D_net``.

        A run as one map of k, which `odlkit.bilevel` can differentiate in parts.
        """
        if k > self.depth:
            return self.denoise(u, sigma, self.depth)
        D_num = self.numerical(operator, b, sigma)
        return self.step(D_num, sigma)(u, None, k - 1) if k else D_num(0)(b, None, 0)


@dataclass
class Iteration:
    """``u^{k+1} = T(u^k)`` as a step of `odlkit.propagate.propagate`; ``energy(u)``, where there is one, is recorded."""

    T: Map
    energy: Callable[[Tensor], Tensor] | None = None

    def init(self, problem: Problem, x0: Tensor) -> State:
        return State(x0)

    def __call__(self, problem: Problem, state: State) -> tuple[State, Record]:
        u = self.T(state.x, None, state.k)
        return state.next(u), {"energy": self.energy(u)} if self.energy else {}


def plugged(unit: UNet, depth: int = 7, **start: Any) -> Deconvolution:
    """A trained denoiser, plug-and-play in the same T, with the numbers of ``start`` as in `Deconvolution`.

    Source: HODL section 4.3, the networks trained beforehand of ENA.
    """
    net = Deconvolution(unit.config, depth, start=start).to(unit.head.weight)
    net.unit.load_state_dict(unit.state_dict())
    return net.eval().requires_grad_(False)
