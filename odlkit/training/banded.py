"""A regulariser with a weight for each band, the minimiser it leads to, and how far computed values are from the true ones.

Lower level, for data ``y`` and log-weights ``w`` (one for each band j of ``W u``, or one in all):

    ``u*(w) = argmin_u E(u, w)``,
    ``E(u, w) = 1/2 ||A u - y||^2 + ridge/2 ||u - 1/2||^2 + sum_j exp(w_j) sum_{i in j} h((W u)_i)``,

``h(t) = sqrt(t^2 + delta^2) - delta``, a smooth l1, or ``t^2 / 2`` for an infinite delta.  E is ``mu``-strongly convex with
``mu = lambda_min(A^T A) + ridge`` and twice differentiable, as HODL's Theorem 3.2 asks.  The upper level is the mean square
error ``phi(w)`` of ``u*(w)`` on some pictures; `odlkit.training.regulariser` minimises it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from odlkit.bilevel import Implicit, descent, hypergradient
from odlkit.linear import LinearMap, NotConverged, Operator, as_operator, conjugate_gradient
from odlkit.operators import FilterBank, Gradient, Wavelet
from odlkit.problem import norm_items, sum_items

THIRD = 48 / (25 * math.sqrt(5))  # max |h'''| delta^2, for the length of a group too: along any line it is such an h


class _Linear(torch.autograd.Function):
    """``A x`` whose derivative is the operator's own ``A^T``, so that a user's code need not be differentiable."""

    @staticmethod
    def forward(ctx, x, A, At):
        ctx.pair = (At, A)
        return A(x)

    @staticmethod
    def backward(ctx, g):
        return _Linear.apply(g, *ctx.pair), None, None


def dct_filters(size: int = 3) -> FilterBank:
    """The ``size^2 - 1`` orthonormal DCT filters of ``size x size`` pixels without the constant one."""
    i = torch.arange(size, dtype=torch.float64)
    rows = torch.cos(math.pi * (2 * i + 1) * i[:, None] / (2 * size))
    rows = rows / rows.norm(dim=1, keepdim=True)
    return FilterBank(torch.einsum("ai,bj->abij", rows, rows).flatten(0, 1)[1:])


@dataclass(frozen=True)
class Bands:
    """Which coefficients of ``W u`` share a weight: ``index(c)`` broadcasts to c; ``count`` stands for "not penalised".

    With ``groups = 2``, h takes the length of the pairs that `Gradient` makes: isotropic total variation, smoothed.
    """

    W: Operator
    count: int
    index: Callable[[Tensor], Tensor]
    groups: int = 1

    @classmethod
    def of(cls, regulariser: str | LinearMap, shared: bool = False) -> Bands:
        """``"tv"``, ``"wavelet"`` (db2, three levels), ``"dct"`` (3 x 3 filters), or an operator: a weight a filter of a
        `FilterBank`, a subband of a `Wavelet` (none for the coarse one), one for any other.  ``shared``: one weight in all.

        Raises ``ValueError`` for another name, ``TypeError`` for an object without ``A`` and ``A_adjoint``.
        """
        if isinstance(regulariser, str):
            makers: dict[str, Callable[[], Operator]] = {
                "tv": Gradient, "wavelet": lambda: Wavelet("db2", 3), "dct": dct_filters}  # fmt: skip
            if regulariser not in makers:
                raise ValueError(f"regulariser: expected an operator or one of {', '.join(makers)}, got {regulariser!r}")
            regulariser = makers[regulariser]()
        W = as_operator(regulariser)
        count, index = 1, lambda c: torch.zeros((), dtype=torch.long)
        if isinstance(W, FilterBank):
            count, index = W.widening, lambda c: torch.arange(count).repeat_interleave(c.shape[1] // count)[:, None, None]
        elif isinstance(W, Wavelet):
            count, index = 3 * W.levels, lambda c: _subbands(c.shape[-2:], W.levels)
        if shared and count > 1:
            apart = index
            return cls(W, 1, lambda c: (apart(c) == count).long())
        return cls(W, count, index, 2 if isinstance(W, Gradient) else 1)

    def lengths(self, c: Tensor) -> Tensor:
        """``|c_i|^2``, of each group where there are groups; broadcasts to ``c``, and counts a group once in a sum."""
        return c.square() if self.groups == 1 else c.unflatten(1, (self.groups, -1)).square().sum(1)

    def weights(self, w: Tensor, c: Tensor) -> Tensor:
        """``exp(w_j)`` for each coefficient, 0 where nothing is penalised; broadcasts to ``c``."""
        return torch.cat([w.exp(), w.new_zeros(1)])[self.index(c).to(w.device)]

    def sums(self, values: Tensor) -> Tensor:
        """Sum over each band: coefficients ``(B, ...)`` to ``(count,)``."""
        where = self.index(values).to(values.device).expand_as(values)
        return values.new_zeros(self.count + 1).index_add(0, where.flatten(), values.flatten())[: self.count]


def _subbands(size: Sequence[int], levels: int) -> Tensor:
    index = torch.full(tuple(size), 3 * levels)
    for level in range(levels):
        h, w = size[0] >> (level + 1), size[1] >> (level + 1)
        index[:h, w : 2 * w], index[h : 2 * h, :w], index[h : 2 * h, w : 2 * w] = 3 * level, 3 * level + 1, 3 * level + 2
    return index


class Lower:
    """The energy E of the module's head for a batch of data ``y``, its minimiser, and the constants of the bounds."""

    def __init__(self, operator: LinearMap, y: Tensor, bands: Bands, ridge: float, delta: float):
        self.operator, self.y, self.bands, self.ridge, self.delta = as_operator(operator), y, bands, ridge, delta
        like = self.operator.A_adjoint(y)
        self.start = torch.full_like(like, 0.5)
        self.mu = self.operator.eigenvalue_range(like)[0] + ridge
        self.norm = math.sqrt(bands.W.eigenvalue_range(like)[1])  # ||W||
        self.applied = 0  # how often A and A^T were

    def _counted(self, f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def counting(x: Tensor) -> Tensor:
            self.applied += 1
            return f(x)

        return counting

    def energies(self, u: Tensor, w: Tensor, delta: float | None = None) -> Tensor:
        """``E(u, w)`` of each picture, ``(B,)``, differentiable in both."""
        delta, c = delta or self.delta, self.bands.W.A(u)
        Au = _Linear.apply(u, self._counted(self.operator.A), self._counted(self.operator.A_adjoint))
        square = self.bands.lengths(c)
        size = square / 2 if math.isinf(delta) else (square + delta**2).sqrt() - delta
        fit = 0.5 * sum_items((Au - self.y).square()) + 0.5 * self.ridge * sum_items((u - 0.5).square())
        return fit + sum_items(self.bands.weights(w, c) * size)

    def gradient(self, u: Tensor, w: Tensor, delta: float | None = None) -> tuple[Tensor, Tensor, Callable]:
        """``(E, dE/du, H)``: energies, their gradient, and the product ``v -> (d^2 E / du^2) v``."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            value = self.energies(u, w.detach(), delta)
            (g,) = torch.autograd.grad(value.sum(), u, create_graph=True)
        return value.detach(), g.detach(), lambda v: torch.autograd.grad(g, u, v, retain_graph=True)[0]

    def solve(self, w: Tensor, u: Tensor | None = None, tol: float = 1e-4, steps: int = 100) -> Tensor:
        """The minimiser to ``||dE/du|| <= tol`` on every picture, so to a distance of ``tol / mu``: Newton's method.

        Systems by conjugate gradients, to a residual that shrinks with the gradient; steps halved until E falls.  Without a
        start ``u`` from grey, delta lowered in stages.  Raises `NotConverged` after ``steps``.
        """
        if u is None:
            u = self.start
            for factor in (64, 16, 4):
                u = self._newton(w, u, max(tol, 0.1), steps, factor * self.delta)
        return self._newton(w, u, tol, steps, self.delta)

    def _newton(self, w: Tensor, u: Tensor, tol: float, steps: int, delta: float) -> Tensor:
        value, g, H = self.gradient(u, w, delta)
        for _ in range(steps):
            size = norm_items(g)
            if bool((size <= tol).all()):
                return u
            rtol = min(0.1, max(0.3 * tol / size.max().item(), size.max().item() / math.sqrt(u[0].numel())))
            p = conjugate_gradient(H, -g, rtol=rtol, max_iter=5000)
            slope, t = sum_items(g * p), torch.ones(len(u), 1, 1, 1, dtype=u.dtype, device=u.device)
            for _ in range(30):
                new, new_g, new_H = self.gradient(u + t * p, w, delta)
                short = new > value + 1e-4 * t.flatten() * slope + 1e-12 * value.abs()  # round-off must not halve
                if not bool(short.any()):
                    break
                t = torch.where(short.view(-1, 1, 1, 1), t / 2, t)
            u, value, g, H = u + t * p, new, new_g, new_H
        worst = norm_items(g).max().item()
        raise NotConverged(f"lower level: gradient {worst:.1e} after {steps} Newton steps, wanted {tol:.0e}")


@dataclass
class Certified:
    """The upper level at ``w`` by an inexact lower level, and proved bounds on what is missing (up to round-off).

    ``|loss - phi(w)| <= loss_error``,  ``||gradient - dphi/dw|| <= gradient_error``,  ``||u - u*(w)|| <= distance``.
    """

    u: Tensor
    distance: float
    loss: float
    loss_error: float
    gradient: Tensor = field(default_factory=lambda: torch.empty(0))
    gradient_error: float = math.nan
    adjoint: Tensor | None = None
    estimate: float | None = None  # the engine's estimate of the gradient's relative error, where asked for


def certify(lower: Lower, w: Tensor, u: Tensor, truth: Tensor) -> Certified:
    """The mean square error at ``u`` in place of ``u*(w)``, and how far both may be from what they stand for.

    ``||u - u*|| <= ||dE/du|| / mu = e``;  ``|l(u) - l(u*)| <= ||l'(u)|| e + e^2 / N``, N the number of pixels.
    """
    distance = lower.gradient(u, w)[1].norm().item() / lower.mu
    gap, pixels = u - truth, truth.numel()
    error = (2 * gap.norm().item() * distance + distance**2) / pixels
    return Certified(u, distance, gap.square().mean().item(), error)


def certify_gradient(
    lower: Lower, w: Tensor, u: Tensor, truth: Tensor, tol: float = 1e-6, warm: Tensor | None = None, estimate: bool = False
) -> Certified:
    """`certify`, with the hypergradient by conjugate gradients to a residual of ``tol`` and the bound on its error.

    ``H q = l'(u)`` up to a residual r, ``g_j = -<W q, exp(w_j) h'(W u)>`` over band j.  With ``e`` from `certify`,
    ``||H(u) q - H(u*) q|| <= M e``, ``M = ||W||^2 max_i exp(w_i) |(W q)_i| 0.86 / delta^2``, so
    ``||q - q*|| <= d = (2 e / N + ||r|| + M e) / mu``, and, because h' has Lipschitz constant ``1 / delta``,
    ``|g_j - dphi/dw_j| <= ||W|| (||exp(w_j) h'(W u)||_j d + exp(w_j) e / delta (||W q||_j + ||W|| d))``.
    Raises `odlkit.bilevel.LowerLevelError` when the tolerance is missed.
    """
    found, bands = certify(lower, w, u, truth), lower.bands
    result = hypergradient(
        descent(lambda v, w: lower.energies(v, w).sum(), 1.0), lambda v, w: (v - truth).square().mean(), w, u,
        steps=0, way=Implicit("cg", tol=tol, max_iter=5000), warm=warm, error=estimate,
    )  # fmt: skip
    assert result.warm is not None
    q, e = result.warm.view_as(u), found.distance
    rest = (lower.gradient(u, w)[2](q) - 2 * (u - truth) / u.numel()).norm().item()
    c, Wq = bands.W.A(u), bands.W.A(q)
    weight = bands.weights(w, c)
    bend = lower.norm**2 * (weight * bands.lengths(Wq).sqrt()).max().item() * THIRD / lower.delta**2
    d = (2 * e / u.numel() + rest + bend * e) / lower.mu
    square, quadratic = bands.lengths(c), math.isinf(lower.delta)
    slope = square if quadratic else square / (square + lower.delta**2)  # |h'|^2
    pull = bands.sums(weight.square() * slope).sqrt()  # ||exp(w_j) h'(W u)|| over band j
    reach = bands.sums((weight > 0) * bands.lengths(Wq)).sqrt() + lower.norm * d  # >= ||W q*|| over band j
    bent = w.exp() * e / (1 if quadratic else lower.delta) * reach
    found.gradient, found.gradient_error = result.gradient, (lower.norm * (pull * d + bent)).norm().item()
    found.adjoint, found.estimate = result.warm, result.error
    return found
