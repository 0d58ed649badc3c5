"""The contract of a linear operator ``A``, its solvers, and the ways to combine operators.

An operator has ``A`` and ``A_adjoint``.  It may know its spectrum: ``gram`` gives the eigenvalues of ``A^T A`` on the
half-plane of ``rfft2`` when ``A^T A`` is a circular convolution.  Scaling, stacking and composing keep that where it is
true, so that the regularised solve ``(A^T A + rho I)^-1`` stays closed form.  Everything else solves by conjugate
gradients, to a tolerance, and raises when it misses it.  Concrete operators are in `odlkit.operators`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class LinearMap(Protocol):
    """What odlkit asks of an operator: ``A`` and ``A_adjoint`` (DeepInverse's linear physics have both)."""

    def A(self, x: Tensor) -> Tensor: ...
    def A_adjoint(self, y: Tensor) -> Tensor: ...


class NotConverged(RuntimeError):
    """An inner solve stopped above its tolerance."""


def conjugate_gradient(matvec, rhs: Tensor, *, x0: Tensor | None = None, rtol: float | None = None, max_iter: int = 500):
    """Solve ``M x = rhs`` for a symmetric positive definite ``matvec``, each item of the batch on its own.

    Stops when the residual carried by the recursion is ``<= rtol ||rhs||`` for all items (default: ``1e-10`` in float64,
    ``1e-5`` in float32; the true residual differs by round-off, about ``eps ||M|| ||x||``) and raises `NotConverged` when
    ``max_iter`` steps do not get there.  Shapes: ``(B, ...)`` in and out.
    """
    rtol = rtol if rtol is not None else (1e-10 if rhs.dtype == torch.float64 else 1e-5)
    target = rtol**2 * _dot(rhs, rhs)
    start = torch.zeros_like(rhs) if x0 is None else x0
    x, rr, _ = conjugate_directions(matvec, start, rhs if x0 is None else rhs - matvec(x0), target, max_iter)
    if bool((rr <= target).all()):
        return x
    worst = (rr / _dot(rhs, rhs).clamp_min(torch.finfo(rhs.dtype).tiny)).max().sqrt().item()
    raise NotConverged(f"conjugate gradients: relative residual {worst:.1e} after {max_iter} steps, wanted {rtol:.0e}")


def conjugate_directions(
    matvec, x: Tensor, r: Tensor, target: Tensor | float, max_iter: int, stop: Callable[[Tensor, Tensor], bool] | None = None
) -> tuple[Tensor, Tensor, int]:
    """Conjugate gradients from ``x`` with residual ``r`` until no ``||r||^2 > target``: x, ``||r||^2``, products taken.

    ``stop(<p, M p>, <p, p>)`` may end it before a step along p.
    """
    p, rr, tiny = r, _dot(r, r), torch.finfo(r.dtype).tiny
    for taken in range(max_iter):
        if not bool((rr > target).any()):
            return x, rr, taken
        q = matvec(p)
        curvature = _dot(p, q)
        if stop is not None and stop(curvature, _dot(p, p)):
            return x, rr, taken + 1
        step = torch.where(rr > target, rr / curvature.clamp_min(tiny), 0)  # finished items stand still
        x, r = x + step * p, r - step * q
        rr, old = _dot(r, r), rr
        p = r + rr / old.clamp_min(tiny) * p
    return x, rr, max_iter


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1).view(-1, *[1] * (a.dim() - 1))


class Operator:
    """Base class: a subclass gives ``A`` and ``A_adjoint`` and, where it has them, ``gram`` or ``eigenvalue_range``.

    Three facts let compositions keep closed forms: ``unitary`` says ``A^T A = A A^T = I``; ``convolution`` says that ``A``
    commutes with circular shifts, the same way for all channels; ``widening`` counts output channels per image channel.
    """

    unitary: bool = False
    convolution: bool = False
    widening: int = 1

    def A(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def A_adjoint(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def __call__(self, x: Tensor) -> Tensor:
        return self.A(x)

    def gram(self, x: Tensor) -> Tensor | None:
        """Eigenvalues of ``A^T A`` for inputs like ``x`` on the ``rfft2`` half-plane, or ``None`` if not circulant."""
        return None

    def normal(self, x: Tensor) -> Tensor:
        """``A^T A x``, by two transforms where ``gram`` is known."""
        if self.unitary:
            return x
        gram = self.gram(x)
        if gram is None:
            return self.A_adjoint(self.A(x))
        return torch.fft.irfft2(gram * torch.fft.rfft2(x), s=x.shape[-2:])

    def eigenvalue_range(self, x: Tensor) -> tuple[float, float]:
        """Bounds ``(m, L)`` with ``m I <= A^T A <= L I`` for inputs like ``x``, all items of the batch together.

        From the spectrum where it is known.  The fallback is 0, always a valid lower bound, and `largest_eigenvalue`, which
        is an upper bound for almost every random start vector, not a proof.
        """
        if self.unitary:
            return 1.0, 1.0
        gram = self.gram(x)
        if gram is not None:
            return max(gram.min().item(), 0.0), gram.max().item()
        return 0.0, largest_eigenvalue(lambda z: self.A_adjoint(self.A(z)), x)

    def solve(self, rhs: Tensor, rho: Tensor | float) -> Tensor:
        """``(A^T A + rho I)^-1 rhs`` for ``rho > 0``, a float or ``(B, 1, 1, 1)`` in the dtype of ``rhs``."""
        if self.unitary:
            return rhs / (1 + rho)
        gram = self.gram(rhs)
        if gram is not None:
            return torch.fft.irfft2(torch.fft.rfft2(rhs) / (gram + rho), s=rhs.shape[-2:])
        return conjugate_gradient(lambda z: self.A_adjoint(self.A(z)) + rho * z, rhs)

    def __matmul__(self, other: Operator) -> Operator:
        return Compose(self, other)

    def __rmul__(self, factor: float) -> Operator:
        return Scaled(self, factor)


def largest_eigenvalue(matvec, x: Tensor, steps: int = 100, rtol: float = 1e-6, seed: int = 0) -> float:
    """Upper estimate of the largest eigenvalue of a symmetric positive semidefinite ``matvec`` on tensors like ``x``.

    Lanczos with its sums in float64, until the residual of the top Ritz pair is below ``rtol`` or for ``steps`` products;
    the Ritz value plus its residual norm plus the round-off of ``x``'s dtype.  The Ritz value never exceeds the eigenvalue,
    and the residual covers what is missing unless the start vector is nearly orthogonal to the top eigenvector.
    """
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
    q, before, beta, top, missing = q / q.norm(), torch.zeros_like(q), 0.0, 0.0, 0.0
    diagonal: list[float] = []
    off: list[float] = []
    for _ in range(min(steps, q.numel())):
        w = matvec(q.to(x.dtype)).to(torch.float64) - beta * before
        diagonal.append((w * q).sum().item())
        w = w - diagonal[-1] * q
        beta = w.norm().item()
        middle, side = (torch.tensor(v, dtype=torch.float64) for v in (diagonal, off))
        ritz, vectors = torch.linalg.eigh(middle.diag() + side.diag(1) + side.diag(-1))
        top, missing = ritz[-1].item(), beta * abs(vectors[-1, -1].item())
        if missing <= rtol * top:
            break
        off.append(beta)
        before, q = q, w / beta
    return top * (1 + 8 * torch.finfo(x.dtype).eps) + missing


class Scaled(Operator):
    """``factor * A``."""

    def __init__(self, operator: LinearMap, factor: float):
        self.operator, self.factor = as_operator(operator), factor
        self.convolution, self.widening = self.operator.convolution, self.operator.widening
        self.unitary = self.operator.unitary and factor**2 == 1

    def A(self, x: Tensor) -> Tensor:
        return self.factor * self.operator.A(x)

    def A_adjoint(self, y: Tensor) -> Tensor:
        return self.factor * self.operator.A_adjoint(y)

    def gram(self, x: Tensor) -> Tensor | None:
        gram = self.operator.gram(x)
        return None if gram is None else self.factor**2 * gram

    def eigenvalue_range(self, x: Tensor) -> tuple[float, float]:
        low, high = self.operator.eigenvalue_range(x)
        return self.factor**2 * low, self.factor**2 * high

    def solve(self, rhs: Tensor, rho: Tensor | float) -> Tensor:
        square = self.factor**2
        return self.operator.solve(rhs, rho / square) / square if square else rhs / rho


class Compose(Operator):
    """``A x = outer(inner(x))``, with a closed form where the parts allow one and conjugate gradients elsewhere.

    - outer unitary: ``A^T A = inner^T inner``;
    - inner unitary: ``(A^T A + rho I)^-1 = inner^T (outer^T outer + rho I)^-1 inner``;
    - inner a convolution, ``outer^T outer`` circulant: they commute, the spectra multiply.  (A transform such as `Wavelet`
      is not a convolution, though its own ``A^T A`` is circulant: ``gram`` of the inner part alone would be wrong.)
    """

    def __init__(self, outer: LinearMap, inner: LinearMap):
        self.outer, self.inner = as_operator(outer), as_operator(inner)
        self.unitary = self.outer.unitary and self.inner.unitary
        self.convolution = self.outer.convolution and self.inner.convolution
        self.widening = self.outer.widening * self.inner.widening

    def A(self, x: Tensor) -> Tensor:
        return self.outer.A(self.inner.A(x))

    def A_adjoint(self, y: Tensor) -> Tensor:
        return self.inner.A_adjoint(self.outer.A_adjoint(y))

    def gram(self, x: Tensor) -> Tensor | None:
        if self.outer.unitary:
            return self.inner.gram(x)
        left = self.outer.gram(x) if self.inner.convolution else None
        right = self.inner.gram(x) if left is not None else None
        return None if left is None or right is None else left * right

    def eigenvalue_range(self, x: Tensor) -> tuple[float, float]:
        if self.outer.unitary:
            return self.inner.eigenvalue_range(x)
        return self.outer.eigenvalue_range(self.inner.A(x)) if self.inner.unitary else super().eigenvalue_range(x)

    def solve(self, rhs: Tensor, rho: Tensor | float) -> Tensor:
        if self.outer.unitary:
            return self.inner.solve(rhs, rho)
        if self.inner.unitary:
            return self.inner.A_adjoint(self.outer.solve(self.inner.A(rhs), rho))
        return super().solve(rhs, rho)


class Adjoint(Operator):
    """``A = W^T`` as an operator: ``Blur(k) @ Adjoint(Wavelet())`` blurs the image that has the given coefficients."""

    def __init__(self, operator: LinearMap):
        self.operator = as_operator(operator)
        self.unitary = self.operator.unitary

    def A(self, x: Tensor) -> Tensor:
        return self.operator.A_adjoint(x)

    def A_adjoint(self, y: Tensor) -> Tensor:
        return self.operator.A(y)

    def gram(self, x: Tensor) -> Tensor | None:
        return self.operator.gram(x) if self.unitary else None


class Stack(Operator):
    """``A x = (A_1 x, A_2 x, ...)`` concatenated along channels, so ``A^T A = sum_i A_i^T A_i``.

    All parts must return images of one size.  ``gram`` is the sum of the parts', so a stack of blurs and gradients keeps
    the Fourier solve, which is what half-quadratic splitting needs.
    """

    def __init__(self, *operators: LinearMap):
        self.operators = [as_operator(op) for op in operators]
        self.convolution = all(op.convolution for op in self.operators)
        self.widening = sum(op.widening for op in self.operators)

    def A(self, x: Tensor) -> Tensor:
        return torch.cat([op.A(x) for op in self.operators], dim=1)

    def A_adjoint(self, y: Tensor) -> Tensor:
        channels = y.shape[1] // self.widening
        pieces = y.split([op.widening * channels for op in self.operators], dim=1)
        first, *rest = (op.A_adjoint(piece) for op, piece in zip(self.operators, pieces, strict=True))
        return sum(rest, first)

    def gram(self, x: Tensor) -> Tensor | None:
        grams = [op.gram(x) for op in self.operators]
        known = [g for g in grams if g is not None]
        return sum(known[1:], known[0]) if len(known) == len(grams) else None


class Adapted(Operator):
    """A foreign object with ``A`` and ``A_adjoint`` (a DeepInverse physics, say) behind odlkit's interface.

    Inside a `Stack` it counts as returning one channel for each image channel, unless it has an attribute ``widening``.
    """

    def __init__(self, operator: LinearMap):
        self.operator, self.widening = operator, getattr(operator, "widening", 1)

    def A(self, x: Tensor) -> Tensor:
        return self.operator.A(x)

    def A_adjoint(self, y: Tensor) -> Tensor:
        return self.operator.A_adjoint(y)


def as_operator(operator: LinearMap) -> Operator:
    """Return odlkit operators as they are and wrap anything else that has ``A`` and ``A_adjoint``."""
    if isinstance(operator, Operator):
        return operator
    if isinstance(operator, LinearMap):
        return Adapted(operator)
    raise TypeError(f"operator: expected an object with A and A_adjoint, got {type(operator).__name__}")
