"""HODL for deconvolution: wavelet proximal gradient after a U-shaped network, one map for every iteration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from odlkit.linear import LinearMap
from odlkit.models.gdc_joint import HAAR, REFERENCE, SPEED
from odlkit.models.hodl import Map, averaged, compose, half_quadratic, proximal_gradient
from odlkit.networks import UNet
from odlkit.operators import Wavelet
from odlkit.priors import Analysis, Lp
from odlkit.problem import LeastSquares, Problem
from odlkit.propagate import Record, State

START = {"level": (0.04, 1.0), "rho": (0.15, 0.7), "kappa": (1e-4, 2.0)}  # c and p of c (sigma / 0.02)^p


class Deconvolution(nn.Module):
    """``T = I + alpha (D_num o D_net - I)`` for ``min_z ||Q W^T z - b||^2 + kappa ||z||_1``, ``u = W^T z``, W Haar.

    W is orthonormal, so a step on z is a step on u.  With the Moreau envelope of the data term,
    ``f_rho(u) = min_v ||Q v - b||^2 + (rho / 2) ||v - u||^2``, whose gradient has the Lipschitz constant rho,

        D_num(u) = W^T soft(W (u - grad f_rho(u) / rho), kappa / rho)

    is proximal gradient at step ``1 / rho``, non-expansive for every rho.  ``envelope=False`` takes the data term itself at
    step ``1 / ||Q||^2``, half the largest that is non-expansive: many more iterations.

        D_net(u) = u - s G(u; s),  or, given theta,  (1 - theta) u + theta N(u; s)

    The second is non-expansive when N is 1-Lipschitz (`odlkit.networks.unet.lipschitz`).  The noise level s, rho and kappa
    are learned, each as ``c (sigma / 0.02)^p exp(4 (a + b log10(sigma / 0.02)))``; ``start`` has c and p.  What is restored
    is ``D_net(u^K)``.  Raises ``ValueError`` for a theta outside (0, 1) and unknown names in ``start``.
    Eq: HODL (3), Table 2.  Source: HODL section 4.3.
    """

    def __init__(
        self,
        unit: dict,
        depth: int = 6,
        theta: float | None = None,
        alpha: float = 0.9,
        start: dict | None = None,
    ):
        super().__init__()
        start = START | (start or {})
        if start.keys() != START.keys():
            raise ValueError(f"start: expected only {', '.join(START)}, got {', '.join(start)}")
        if theta is not None and not 0 < theta < 1:
            raise ValueError(f"theta: expected None or a number in (0, 1), got {theta}")
        self.config: dict[str, Any] = {"unit": unit, "depth": depth, "theta": theta, "alpha": alpha, "start": start}
        self.depth, self.theta, self.alpha, self.unit = depth, theta, alpha, UNet(**unit)
        self.numbers = nn.ParameterDict({name: nn.Parameter(torch.zeros(2)) for name in START})

    def number(self, name: str, sigma: Tensor) -> Tensor:
        """One of the learned numbers at the noise level ``sigma`` ``(B, 1, 1, 1)``, of that shape."""
        (c, p), (a, b), ratio = self.config["start"][name], self.numbers[name], sigma / REFERENCE
        return c * ratio**p * (SPEED * (a + b * ratio.log10())).exp()

    def denoise(self, u: Tensor, sigma: Tensor) -> Tensor:
        """``D_net(u)`` for data of the noise level ``sigma``; in training mode the network computes in bfloat16."""
        level = self.number("level", sigma)
        with torch.autocast(u.device.type, torch.bfloat16, enabled=self.training):
            out = self.unit(u, level)
        return u - level * out.to(u) if self.theta is None else torch.lerp(u, out.to(u), self.theta)

    def numerical(self, operator: LinearMap, b: Tensor, sigma: Tensor, envelope: bool = True) -> Map:
        """``D_num(u, params, k)``, params unused: wavelet proximal gradient for the data ``b``, its coarse band free."""
        fidelity, details = LeastSquares(operator, b, 2.0), torch.ones_like(b[:1, :1])
        details[..., : b.shape[-2] >> HAAR, : b.shape[-1] >> HAAR] = 0
        prior = Analysis(Wavelet("haar", HAAR), Lp(1, self.number("kappa", sigma) * details))

        def prox_f(v: Tensor, size: Any, params: Any) -> Tensor:
            return fidelity.prox(v, size)

        def prox_g(v: Tensor, size: Any, params: Any) -> Tensor:
            return prior.prox(v, size)

        if envelope:
            return half_quadratic(prox_f, prox_g, self.number("rho", sigma))
        return proximal_gradient(lambda u, params: fidelity.grad(u), prox_g, 2 / fidelity.bounds[1])

    def map(self, operator: LinearMap, b: Tensor, sigma: Tensor, envelope: bool = True) -> Map:
        """``T(u, params, k)``, params unused.  Eq: HODL (3)."""
        D_num = self.numerical(operator, b, sigma, envelope)
        return averaged(compose(D_num, lambda u, params, k: self.denoise(u, sigma)), self.alpha)


@dataclass
class Iteration:
    """``u^{k+1} = T(u^k)`` as a step of `odlkit.propagate.propagate`."""

    T: Map

    def init(self, problem: Problem, x0: Tensor) -> State:
        return State(x0)

    def __call__(self, problem: Problem, state: State) -> tuple[State, Record]:
        return state.next(self.T(state.x, None, state.k)), {}


def plugged(unit: UNet, **start: tuple[float, float]) -> Deconvolution:
    """A trained denoiser, plug-and-play in the same T; ``start`` sets the numbers, each c and p of ``c (sigma / 0.02)^p``.

    Source: HODL section 4.3, the networks trained beforehand of ENA.
    """
    net = Deconvolution(unit.config, start=start).to(unit.head.weight)
    net.unit.load_state_dict(unit.state_dict())
    return net.eval().requires_grad_(False)
