"""Priors ``R``: a value, and the proximal map ``prox(z, step) = argmin_x R(x) + ||x - z||^2 / (2 step)``.

``value`` returns one float64 number for each item, ``(B,)``; ``prox`` keeps shape, dtype and device.  ``step`` is a float
or ``(B, 1, 1, 1)``; a ``weight`` is a float or a tensor that broadcasts to the image, 0 where nothing is penalised (the
coarse band of a wavelet, say).  ``convex`` says whether ``R`` is convex; where it is not, the prox returns one global
minimiser of its subproblem, and 0 where 0 and another point tie.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softshrink

from odlkit.linear import LinearMap, NotConverged, as_operator
from odlkit.operators import Gradient, Operator, Wavelet
from odlkit.problem import Prior, sum_items

Weight = Tensor | float


def _check_weight(weight: Weight) -> Weight:
    lowest = weight.min().item() if isinstance(weight, Tensor) else weight
    if not lowest >= 0:
        raise ValueError(f"weight: expected numbers >= 0, got {lowest}")
    return weight


def _check_power(p: float) -> float:
    if not 0 <= p <= 1:
        raise ValueError(f"p: expected a number in [0, 1], got {p}")
    return p


def shrink(size: Tensor, weight: Weight, p: float, steps: int = 5) -> Tensor:
    """``argmin_{x >= 0} weight x^p + (x - size)^2 / 2`` for ``size >= 0``, elementwise, with exact zeros.

    p = 1: soft threshold; p = 0: hard threshold.  0 < p < 1: zero up to ``tau = t + weight p t^(p-1)``, where
    ``t = (2 weight (1 - p))^(1/(2-p))`` is the height of the jump, and above it the root of
    ``x - size + weight p x^(p-1)`` right of t, by Newton steps from ``x = size`` (they decrease to it).
    Eq: PADNet (14), the prior; generalised iterated shrinkage (Zuo et al., 2013).
    """
    weight = torch.as_tensor(weight, dtype=size.dtype, device=size.device)
    if p == 1:
        return (size - weight).clamp_min(0)
    if p == 0:
        return torch.where(size > (2 * weight).sqrt(), size, torch.zeros_like(size))
    t = (2 * weight.detach() * (1 - p)) ** (1 / (2 - p))  # it picks a branch; its derivative at weight 0 is infinite
    tau = t * (2 - p) / (2 * (1 - p))  # = t + weight p t^(p-1), finite at weight = 0
    floor = t.clamp_min(1e-12)  # the root lies right of t; weight 0 must not meet 0^(p-2)
    x = torch.maximum(size, floor)
    for _ in range(steps):
        slope = weight * p * x ** (p - 2)
        x = torch.maximum(x - (x - size + slope * x) / (1 - (1 - p) * slope), floor)
    return torch.where(size > tau, size - weight * p * x ** (p - 1), torch.zeros_like(size))


class Zero:
    """``R = 0``: the prox is the identity."""

    convex = True

    def value(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), dtype=torch.float64, device=x.device)

    def prox(self, z: Tensor, step: Tensor | float) -> Tensor:
        return z


class Lp:
    """``R(x) = sum_i weight_i |x_i|^p`` for p in [0, 1]; p = 0 counts the nonzeros.  Prox: `shrink` on ``|z|``."""

    def __init__(self, p: float, weight: Weight = 1.0):
        self.p, self.weight, self.convex = _check_power(p), _check_weight(weight), p == 1

    def value(self, x: Tensor) -> Tensor:
        if self.p == 1 and not isinstance(self.weight, Tensor):
            return self.weight * sum_items(x.abs())
        size = x.abs().to(torch.float64)
        return sum_items(self.weight * ((size != 0).to(size) if self.p == 0 else size**self.p))

    def prox(self, z: Tensor, step: Tensor | float) -> Tensor:
        weight = self.weight * step
        if self.p == 1:  # the soft threshold; in two passes where the weight is not a number
            if not isinstance(weight, Tensor):
                return softshrink(z, weight)
            weight = weight.to(z)
            return z - z.clamp(-weight, weight)
        return torch.copysign(shrink(z.abs(), weight, self.p), z)


class GroupLp:
    """``R(x) = sum_i weight_i ||(x_{i,1}, ..., x_{i,groups})||^p``: the members of a group live or die together.

    ``x`` is ``(B, groups C, H, W)`` and channel c goes with c + C, c + 2C, ...: with ``groups = 2``, the pair ``(dx, dy)``
    of each pixel as `odlkit.operators.Gradient` lays it out.  p = 1 is isotropic TV in split form, p = 0 counts the pixels
    where the gradient is not zero.  ``weight`` broadcasts to ``(B, C, H, W)``.
    """

    def __init__(self, p: float, weight: Weight = 1.0, groups: int = 2):
        self.p, self.weight, self.groups, self.convex = _check_power(p), _check_weight(weight), groups, p == 1

    def _split(self, x: Tensor) -> Tensor:
        if x.shape[1] % self.groups:
            raise ValueError(f"x: expected a multiple of {self.groups} channels, got {x.shape[1]}")
        return x.unflatten(1, (self.groups, -1))

    def value(self, x: Tensor) -> Tensor:
        if self.p == 0:
            return sum_items(self.weight * (self._split(x) != 0).any(1).to(torch.float64))
        # squares and a root are 20 times as fast as a norm along the channels; clamped because of the derivative at 0
        squares = self._split(x).to(torch.float64).square().sum(1)
        size = squares.clamp_min(torch.finfo(torch.float64).tiny) ** (self.p / 2)
        return sum_items(self.weight * torch.where(squares > 0, size, 0))

    def prox(self, z: Tensor, step: Tensor | float) -> Tensor:
        parts = self._split(z)
        # clamped before the root: its derivative at 0 is infinite
        size = parts.square().sum(1).clamp_min(torch.finfo(z.dtype).tiny).sqrt()
        return (parts * (shrink(size, self.weight * step, self.p) / size).unsqueeze(1)).flatten(1, 2)


class TV:
    """Isotropic total variation ``R(x) = weight sum_i ||(D x)_i||``, D the circular forward differences, channel by channel.

    Prox by accelerated projected gradients on the dual, ``x = z - lam D^T q`` with ``|q_i| <= 1``, ``lam = weight step``,
    dual step ``1 / 8`` because ``||D||^2 <= 8``, restarted when the momentum points uphill.  It stops when the duality gap
    ``lam sum_i (|(D x)_i| - <(D x)_i, q_i>)`` is at most ``(tol ||z||)^2 / 2`` for every item, which guarantees
    ``||x - prox|| <= tol ||z||``; the subproblem's value is then within ``gap / step`` of its minimum.  Raises
    `NotConverged` after ``max_iter`` steps (in float32 also where a large lam puts round-off above a small ``tol``).
    ``warm_start`` keeps q for the next call on an input of the same shape.  ``gradient`` is another D with
    ``||D||^2 <= 8``, and ``least`` the root mean square of z below which ``||z||`` is not made a smaller goal.
    """

    convex = True

    def __init__(
        self,
        weight: float = 1.0,
        tol: float = 1e-3,
        max_iter: int = 5000,
        warm_start: bool = False,
        gradient: Operator | None = None,
        least: float = 0.0,
    ):
        self.weight, self.tol, self.max_iter, self.warm_start = _check_weight(weight), tol, max_iter, warm_start
        self.gradient, self.least = gradient or Gradient(), least
        self.dual: Tensor | None = None

    def value(self, x: Tensor) -> Tensor:
        return GroupLp(1, self.weight).value(self.gradient.A(x.to(torch.float64)))

    def prox(self, z: Tensor, step: Tensor | float) -> Tensor:
        fits = self.warm_start and self.dual is not None and self.dual.shape == (len(z), 2 * z.shape[1], *z.shape[2:])
        x, dual, _, _ = self.solve(z, step, self.dual.to(z) if fits and self.dual is not None else None)
        if self.warm_start:
            self.dual = dual.detach()
        return x

    def solve(self, z: Tensor, step: Tensor | float, dual: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, int]:
        """``(x, dual, gap, iterations)`` for the prox at ``z``, from ``dual`` (default 0); ``gap`` is float64, ``(B,)``."""
        lam = torch.as_tensor(self.weight * step, dtype=z.dtype, device=z.device)
        floor = self.least**2 * z[0].numel()
        target = 0.5 * self.tol**2 * sum_items(z.to(torch.float64).square()).clamp_min(floor)
        q = torch.zeros_like(self.gradient.A(z)) if dual is None else dual
        r, t = q, torch.ones(len(z), 1, 1, 1, dtype=z.dtype, device=z.device)
        rate = 1 / (8 * lam.clamp_min(1e-12))  # an item with lam = 0 stays at z whatever its dual does
        for iteration in range(self.max_iter + 1):
            if iteration % 10 == 0:
                x = z - lam * self.gradient.A_adjoint(q)
                gap = self._gap(x, q, lam)
                if bool((gap <= target).all()):
                    return x, q, gap, iteration
            ahead = r + rate * self.gradient.A(z - lam * self.gradient.A_adjoint(r))
            new = ahead / self._norms(ahead).clamp_min(1)
            uphill = ((r - new) * (new - q)).flatten(1).sum(1).view(-1, 1, 1, 1) > 0
            t = torch.where(uphill, torch.ones_like(t), t)
            t_new = (1 + (1 + 4 * t.square()).sqrt()) / 2
            r, q, t = new + (t - 1) / t_new * (new - q), new, t_new
        worst = (2 * gap / sum_items(z.to(torch.float64).square())).max().sqrt().item()
        raise NotConverged(f"TV prox: distance bound {worst:.1e} ||z|| after {self.max_iter} steps, wanted {self.tol:.0e}")

    @staticmethod
    def _norms(q: Tensor) -> Tensor:
        """Length of each pixel's pair, repeated for both members: like ``q``."""
        dx, dy = q.chunk(2, dim=1)
        return torch.hypot(dx, dy).repeat(1, 2, 1, 1)

    def _gap(self, x: Tensor, q: Tensor, lam: Tensor) -> Tensor:
        slopes = self.gradient.A(x)
        dx, dy = slopes.chunk(2, dim=1)
        return sum_items(lam * torch.hypot(dx, dy)) - sum_items(lam * slopes * q)


class Analysis:
    """``R(W x)`` for an orthonormal W, so that ``prox = W^T prox_R(W z)``.

    Raises ``ValueError`` at its first use on a size when ``W^T W`` or ``W W^T`` is not the identity there.  In ``value``,
    coefficients below round-off of the largest count as zero: W after W^T turns the exact zeros of a prox into 1e-17s,
    and ``sum |c|^p`` sees them when p is small.
    """

    def __init__(self, operator: LinearMap, prior: Prior):
        self.operator, self.prior = as_operator(operator), prior
        self.convex = getattr(prior, "convex", False)
        self._checked: set = set()

    def _coefficients(self, x: Tensor) -> Tensor:
        key = (tuple(x.shape[1:]), x.dtype, x.device)
        coefficients = self.operator.A(x)
        if key not in self._checked:
            for first, second, like in (
                (self.operator.A, self.operator.A_adjoint, x[:1]),
                (self.operator.A_adjoint, self.operator.A, coefficients[:1]),
            ):
                probe = torch.randn(like.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like)
                if not torch.allclose(second(first(probe)), probe, rtol=0, atol=1e3 * torch.finfo(x.dtype).eps):
                    raise ValueError("operator: expected an orthonormal one (W^T W = W W^T = I), such as Wavelet")
            self._checked.add(key)
        return coefficients

    def value(self, x: Tensor) -> Tensor:
        c = self._coefficients(x)
        noise = 64 * torch.finfo(c.dtype).eps * c.abs().amax(dim=tuple(range(1, c.dim())), keepdim=True)
        return self.prior.value(torch.where(c.abs() > noise, c, torch.zeros_like(c)))

    def prox(self, z: Tensor, step: Tensor | float) -> Tensor:
        return self.operator.A_adjoint(self.prior.prox(self._coefficients(z), step))


class Box:
    """Indicator of ``low <= x <= high``: 0 inside (up to round-off), inf outside.  Prox: clamp."""

    convex = True

    def __init__(self, low: float = 0.0, high: float = 1.0):
        if not low <= high:
            raise ValueError(f"low, high: expected low <= high, got {low} and {high}")
        self.low, self.high = low, high

    def value(self, x: Tensor) -> Tensor:
        slack = 8 * torch.finfo(x.dtype).eps * max([1.0, *(abs(b) for b in (self.low, self.high) if math.isfinite(b))])
        inside = ((x >= self.low - slack) & (x <= self.high + slack)).flatten(1).all(1)
        return torch.where(inside, 0.0, math.inf).to(torch.float64)

    def prox(self, z: Tensor, step: Tensor | float) -> Tensor:
        return z.clamp(self.low, self.high)


class SparseBox:
    """Indicator of ``low <= x <= high`` with at most ``sparsity`` nonzeros in each item; needs ``low <= 0 <= high``.

    The exact projection, unlike a threshold before or after the clamp P: keep ``P(z_i)`` at the ``sparsity`` largest gains
    ``z_i^2 - (z_i - P(z_i))^2`` and put 0 elsewhere.  This is the set Omega of relaxed PODM.
    """

    convex = False

    def __init__(self, low: float, high: float, sparsity: int):
        if not low <= 0 <= high:
            raise ValueError(f"low, high: expected low <= 0 <= high (zeros must be allowed), got {low} and {high}")
        if sparsity < 0:
            raise ValueError(f"sparsity: expected a count >= 0, got {sparsity}")
        self.box, self.sparsity = Box(low, high), sparsity

    def value(self, x: Tensor) -> Tensor:
        few = (x != 0).flatten(1).sum(1) <= self.sparsity
        return torch.where(few, self.box.value(x), math.inf)

    def prox(self, z: Tensor, step: Tensor | float) -> Tensor:
        clamped = self.box.prox(z, step).flatten(1)
        flat = z.flatten(1)
        gain = clamped * (2 * flat - clamped)  # = z^2 - (z - P)^2, without its cancellation
        best = gain.topk(min(self.sparsity, flat.shape[1]), dim=1).indices
        return torch.zeros_like(flat).scatter(1, best, clamped.gather(1, best)).view_as(z)


def details(z: Tensor, weight: Tensor | float, p: float = 1.0, wavelet: str = "haar", levels: int = 3) -> Analysis:
    """``weight ||W x||_p^p`` on all but the coarse band of an orthonormal wavelet transform, for images like ``z``.

    ``z`` is ``(B, C, H, W)`` with sides that ``2 ** levels`` divides, ``weight`` a number or ``(B, 1, 1, 1)``.
    """
    fine = torch.ones_like(z[:1, :1])
    fine[..., : z.shape[-2] >> levels, : z.shape[-1] >> levels] = 0
    return Analysis(Wavelet(wavelet, levels), Lp(p, weight * fine))
