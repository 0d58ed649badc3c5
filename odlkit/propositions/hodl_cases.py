"""Hierarchical problems with known best fixed points, on grids of omega: what HODL's theorems are played on.

Continua of fixed points, one fixed point without a contraction, smooth contractions, pictures that ship with scikit-image.
Everything is float64; a grid of omega is a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from odlkit.instances import blurred, gaussian, picture
from odlkit.models import hodl
from odlkit.models.hodl import Diagonal, Metric
from odlkit.networks.nonexpansive import AveragedResidual, soft
from odlkit.networks.normalize import certified
from odlkit.operators import Wavelet
from odlkit.propositions.normalization import smooth_network

SHARE = 0.99  # s = SHARE lambda_min(G) / L_l


def column(values: list[float] | Tensor, dims: int = 2) -> Tensor:
    """A grid of omega as a batch, ``(B, 1, ...)``, float64."""
    return torch.as_tensor(values, dtype=torch.float64).view(-1, *[1] * (dims - 1))


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Gaussian numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Case:
    """A hierarchical problem on a grid of omega: T = I + alpha (D - I), D non-expansive in ``||.||_G``, l >= 0 convex."""

    name: str
    D: hodl.Map
    loss: Callable[[Tensor, Tensor], Tensor]  # (B,) from u and omega
    omega: Tensor  # (B, 1, ...)
    start: Tensor  # (B, ...)
    best: Tensor  # p(omega): the fixed point with the least loss
    smooth: float = 1.0  # L_l
    alpha: float = 0.5
    metric: Metric = Diagonal()
    contraction: float = 1.0  # of D, in ||.||_G
    bend: Tensor | None = None  # of the derivative: see `derivative_checks`
    tol: float = 1e-2  # of `value_checks`: the theorems give no rate for values

    def upper(self, u: Tensor, omega: Tensor) -> Tensor:
        return self.loss(u, omega).sum()

    def map(self, mu: float = 0.0, s: Any = None) -> hodl.Map:
        """aHODL (4), or sHODL (5) at ``mu = 0``; ``s`` is as in `hodl.aggregated`, by default a share of the largest."""
        s = hodl.outer_step(self.metric, self.smooth, SHARE) if s is None else s
        return hodl.aggregated(hodl.averaged(self.D, self.alpha), self.upper, self.metric, mu, s)


def continuum(values: list[float] | Tensor, extra: float = 0.0, start: float = 0.0) -> Case:
    """``l = (w - u_2)^2 / 2 + (u_1 - 1)^2 / 2 (+ (w - 2)^2 / 2)``, ``D(u) = (w, u_2)``: every u_2 is a fixed point.

    ``phi(w) = (w - 1)^2 / 2``, so w = 1 is best, and 1.5 with ``extra = 1``; u_2 never moves without aggregation.
    """
    w = column(values)
    return Case(
        "a continuum of fixed points", lambda u, w, k: torch.cat([w, u[:, 1:]], 1),
        lambda u, w: ((w[:, 0] - u[:, 1]) ** 2 + (u[:, 0] - 1) ** 2 + extra * (w[:, 0] - 2) ** 2) / 2,
        w, torch.full((len(w), 2), start, dtype=torch.float64) * column([0, 1]).mT, torch.cat([w, w], 1),
    )  # fmt: skip


@cache
def wide(step: float = 1.9, m: int = 4, n: int = 20) -> Case:
    """``min ||u - a||^2 / 2`` over the least-squares solutions of ``Q u = w b``; gradient steps in a diagonal metric.

    G is the least multiple of ``diag(1, ..., 1.1)`` with ``Q^T Q <= G``.
    """
    q, a, b = draw(m, n), draw(1, n, seed=1), draw(1, m, seed=2)
    w, gram = column(torch.linspace(-1, 1, 21)), q.mT @ q
    d = torch.linspace(1, 1.1, n).double()
    metric = Diagonal(d * torch.linalg.eigvalsh(gram / d.sqrt() / d.sqrt()[:, None])[-1])
    best = a + (w * b - a @ q.mT) @ torch.linalg.pinv(q).mT
    D = hodl.gradient_descent(lambda u, w: (u @ q.mT - w * b) @ q, step, metric)
    start = torch.zeros_like(best)
    return Case(
        "wide least squares, diagonal metric",
        D,
        lambda u, w: (u - a).square().sum(1) / 2,
        w,
        start,
        best,
        alpha=0.9,
        metric=metric,
    )


@cache
def mosaic(size: int = 32) -> Case:
    """A third of camera's pixels is known up to a gain w; of all images that agree with them, the nearest to a blurred one.

    ``f = ||M (u - w y)||^2 / 2`` with the mask M, ``l = ||u - guess||^2 / 2``.
    """
    x, guess = picture("camera", size), blurred("camera", size, gaussian())[1]
    mask = (torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 1 / 3).double()
    w = column(torch.linspace(0.5, 1.5, 21), 4)
    D = hodl.gradient_descent(lambda u, w: mask * (u - w * x), 1.0)
    best = mask * w * x + (1 - mask) * guess
    loss = lambda u, w: (u - guess).flatten(1).square().sum(1) / 2  # noqa: E731
    return Case("camera, known pixels with a gain", D, loss, w, torch.zeros_like(best), best)


@cache
def wavelet_deblurring(size: int = 32) -> Case:
    """Camera, a mild blur: proximal gradient with threshold w on Haar coefficients after a certified network, alpha = 0.9.

    ``D_net(u) = u + (N(u) - u) / 2`` with N a network of convolutions of Lipschitz constant at most 1; D is a contraction
    by ``1 - gamma m``, not differentiable.  The fixed points are those of long runs.
    """
    blur, y = blurred("camera", size, gaussian(delta=0.65))
    x, wavelet = picture("camera", size), Wavelet("haar", 3)
    least, largest = blur.eigenvalue_range(x)
    gamma = 1 / largest
    net = AveragedResidual(certified(smooth_network(3, 4), 1.0)).requires_grad_(False)
    w = column(torch.linspace(0.0, 0.08, 5), 4)

    def prox(v: Tensor, step: float, w: Tensor) -> Tensor:
        return wavelet.A_adjoint(soft(wavelet.A(v), step * w))

    D = hodl.compose(hodl.proximal_gradient(lambda u, w: blur.A_adjoint(blur.A(u) - y), prox, gamma), lambda u, w, k: net(u))
    start = y.expand(len(w), -1, -1, -1).clone()
    loss = lambda u, w: (u - x).flatten(1).square().sum(1) / 2  # noqa: E731
    case = Case(
        "camera, wavelet deblurring with a network", D, loss, w, start, start, alpha=0.9, contraction=1 - gamma * least
    )
    return replace(case, best=settle(case, 400))


@cache
def cubic() -> Case:
    """``D(u) = u - (u - w)^3 / 10`` near w: one fixed point and no contraction; ``l = (u - 1/2)^2 / 2``."""
    w = column(torch.linspace(-1, 1, 21))
    return Case("one fixed point, no contraction", lambda u, w, k: u - (u - w) ** 3 / 10,
                lambda u, w: (u[:, 0] - 0.5) ** 2 / 2, w, torch.full_like(w, 0.95), w, tol=0.1)  # fmt: skip


@cache
def scalar() -> Case:
    """``D(u) = 0.8 tanh u + w``, ``l = (u - 1)^2 / 2 + w^2 / 20``, w in [-2, 2]: smooth and contractive."""
    w = column(torch.linspace(-2, 2, 41))
    case = Case("scalar tanh", lambda u, w, k: 0.8 * u.tanh() + w, lambda u, w: (u[:, 0] - 1) ** 2 / 2 + w[:, 0] ** 2 / 20,
                w, torch.zeros_like(w), w, contraction=0.8)  # fmt: skip
    case = replace(case, best=settle(case, 1000))
    slope = 1 / (1 - 0.8 / case.best.cosh() ** 2)  # dp/dw
    return replace(case, bend=0.5 * 0.8 * TANH_BEND * slope[:, 0].abs())


TANH_BEND = 4 / 27**0.5  # sup |tanh''|


@cache
def conjugated_network(n: int = 10) -> Case:
    """A strongly convex quadratic in a diagonal metric after a tanh network, conjugated; w scales the data.

    ``f = <u, H u> / 2 - w <c, u>``, ``D_net = G^(-1/2) tanh(R G^(1/2) u)`` with a rotation R.
    """
    scale = torch.logspace(0, 1.5, n).double()
    h = draw(n, n)
    h = (0.5 * torch.eye(n, dtype=torch.float64) + 0.5 * h.mT @ h / n) * scale.sqrt() * scale.sqrt()[:, None]
    d, c, rotation = 2 * h.abs().sum(0), draw(1, n, seed=1), torch.linalg.qr(draw(n, n, seed=2)).Q
    metric, values = Diagonal(d), torch.linalg.eigvalsh(h / d.sqrt() / d.sqrt()[:, None])
    q = (1 - 1.5 * values).abs().max().item()
    number = hodl.gradient_descent(lambda u, w: u @ h - w * c, 1.5, metric)
    D = hodl.compose(number, hodl.conjugated(lambda u, w, k: (u @ rotation.mT).tanh(), metric))
    w = column(torch.linspace(-2, 2, 8))
    case = Case("conjugated tanh network, diagonal metric", D, lambda u, w: (u - 0.1).square().sum(1) / 2, w,
                torch.zeros(len(w), n, dtype=torch.float64), w, metric=metric, alpha=0.8, contraction=q)  # fmt: skip
    case = replace(case, best=settle(case, 1500))
    return replace(case, bend=0.8 * q * TANH_BEND * metric.norm(slope_of_best(case)))


@cache
def smooth_deblurring(size: int = 32, width: float = 0.1) -> Case:
    """Coins, a mild blur: ``f = ||A u - y||^2 / 2 + e^w sum psi(W u)``, ``psi(t) = sqrt(t^2 + eps^2) - eps``, W Haar.

    The weight of the prior is learned; gradient steps contract by ``1 - gamma m``.
    """
    blur, y = blurred("coins", size, gaussian(delta=0.65))
    x, wavelet = picture("coins", size), Wavelet("haar", 3)
    w = column(torch.linspace(-6, -3, 7), 4)
    least, largest = blur.eigenvalue_range(x)
    gamma = 2 / (least + largest + math.exp(-3) / width)

    def slope(u: Tensor, w: Tensor) -> Tensor:
        z = wavelet.A(u)
        return blur.A_adjoint(blur.A(u) - y) + w.exp() * wavelet.A_adjoint(z / (z * z + width**2).sqrt())

    loss = lambda u, w: (u - x).flatten(1).square().sum(1) / 2  # noqa: E731
    start = y.expand(len(w), -1, -1, -1).clone()
    case = Case("coins, deblurring with a smooth prior", hodl.gradient_descent(slope, gamma), loss, w, start, start,
                alpha=0.9, contraction=1 - gamma * least)  # fmt: skip
    case = replace(case, best=settle(case, 600))
    third = 1.5 / 1.25**2.5 / width**2  # sup |psi'''|
    moved = wavelet.A(slope_of_best(case)).abs().flatten(1).amax(1)
    return replace(case, bend=0.9 * gamma * w.exp().flatten() * (third * moved + 1 / width))


def settle(case: Case, steps: int) -> Tensor:
    """The fixed points as limits of ``u <- D(u)``-averaged runs without aggregation."""
    step, u = case.map(), case.start
    with torch.no_grad():
        for k in range(steps):
            u = step(u, case.omega, k)
    return u


@cache
def slope_of_best(case: Case, steps: int = 1000) -> Tensor:
    """``dp/dw``, the fixed point of ``J <- dT/du J + dT/dw`` at the fixed point p."""
    step, slope = case.map(), torch.zeros_like(case.best)
    for _ in range(steps):
        slope, old = (
            torch.func.jvp(lambda u, w: step(u, w, 0), (case.best, case.omega), (slope, torch.ones_like(case.omega)))[1],
            slope,
        )
        if bool((slope - old).norm() <= 1e-15 * slope.norm()):
            break
    return slope


def phi(case: Case) -> Tensor:
    """``phi(w) = l(p(w), w)``, ``(B,)``.  Eq: HODL (6)."""
    return case.loss(case.best, case.omega)


def linear(matrix: Tensor) -> hodl.Map:
    """``u -> matrix u``, u (B, n)."""
    return lambda u, w, k: u @ matrix.mT


ROTATION = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)


def turning(name: str, D: hodl.Map, alpha: float, metric: Metric | None = None) -> Case:
    """A linear D on the plane whose only fixed point is 0, and ``l = ||u||^2 / 2``."""
    w = column([0.0])
    return Case(name, D, lambda u, w: u.square().sum(1) / 2, w, column([1.0, 0.0]).mT, torch.zeros(1, 2).double(),
                alpha=alpha, metric=metric or Diagonal())  # fmt: skip
