"""The task as an energy ``F(x) = f(x) + R(x)``: fidelity, prior, and the constants that theorems need.

A fidelity has ``value``, ``grad``, ``prox`` and ``bounds``; a prior (see `odlkit.priors`) has ``value`` and ``prox``.  A
problem without a prior is *partially defined*: its ``energy`` is not known and asking for it raises.

Values are one float64 number for each item of the batch, shape ``(B,)``, because certificates compare differences that
float32 sums would lose.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from odlkit.operators import BlurDecimate, LinearMap, Operator, as_operator, conjugate_gradient


def sum_items(x: Tensor) -> Tensor:
    """Sum each item of the batch in float64: ``(B, ...) -> (B,)``."""
    return x.flatten(1).sum(1, dtype=torch.float64)


def norm_items(x: Tensor) -> Tensor:
    """Euclidean norm of each item, without a gradient (it is a record): ``(B, ...) -> (B,)`` in float64."""
    return torch.linalg.vector_norm(x.detach().flatten(1), dim=1).to(torch.float64)


def square_items(x: Tensor) -> Tensor:
    """Squared norm of each item, summed in float64: ``(B, ...) -> (B,)``."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.float64).square()


def add_scaled(x: Tensor, y: Tensor, factor: Tensor | float) -> Tensor:
    """``x + factor y``, in one pass over the memory where the factor is a number."""
    return x + factor * y if isinstance(factor, Tensor) else torch.add(x, y, alpha=factor)


def _definite(spectrum: Tensor) -> bool:
    """Whether one may divide by it (a gradient's vanishes at the constant)."""
    return bool(spectrum.min() > 100 * torch.finfo(spectrum.dtype).eps * spectrum.max())


class Prior(Protocol):
    """A regulariser ``R`` with a computable proximal map."""

    def value(self, x: Tensor) -> Tensor: ...
    def prox(self, z: Tensor, step: Tensor | float) -> Tensor: ...


class Fidelity(Protocol):
    """A differentiable data term ``f``."""

    def value(self, x: Tensor) -> Tensor: ...
    def grad(self, x: Tensor) -> Tensor: ...
    def prox(self, z: Tensor, step: Tensor | float) -> Tensor: ...

    @property
    def bounds(self) -> tuple[float, float]: ...


class LeastSquares:
    """``f(x) = (weight / 2) ||A x - y||^2``.

    ``grad f = weight A^T (A x - y)``; ``bounds = weight (m, L)`` with ``m I <= A^T A <= L I``; ``prox`` solves
    ``argmin f(x) + ||x - z||^2 / (2 step)`` through the operator's regularised solve, and with ``through=W`` the splitting
    step ``argmin f(x) + ||W x - z||^2 / (2 step)``.  With ``weight = 1 / sigma^2`` this is the negative log-likelihood of
    Gaussian noise.  ``weight`` is a float or ``(B, 1, 1, 1)``.
    """

    def __init__(self, operator: LinearMap, y: Tensor, weight: Tensor | float = 1.0):
        self.operator, self.y, self.weight = as_operator(operator), y, weight
        self.back = self.operator.A_adjoint(y)  # A^T y, once
        self._filter: tuple = (None, None)  # (what for, 1 / (H W (|A|^2 + rho |W|^2))): a fixed penalty divides once

    def value(self, x: Tensor) -> Tensor:
        weight = self.weight.flatten() if isinstance(self.weight, Tensor) else self.weight
        return 0.5 * weight * square_items(self.operator.A(x) - self.y)

    def grad(self, x: Tensor) -> Tensor:
        unweighted = self.operator.normal(x) - self.back
        return self.weight * unweighted if isinstance(self.weight, Tensor) or self.weight != 1 else unweighted

    def prox(self, z: Tensor, step: Tensor | float, through: Operator | None = None) -> Tensor:
        rho = 1.0 / (self.weight * step)
        return self._solve(add_scaled(self.back, z if through is None else through.A_adjoint(z), rho), rho, through)

    def nearest(self, x: Tensor, penalty: Tensor | float, through: Operator | None = None) -> Tensor:
        """``argmin_u f(u) + (penalty / 2) ||W (u - x)||^2``, W the operator ``through`` (default I).

        ``(w A^T A + penalty W^T W) u = w A^T y + penalty W^T W x``.  Eq: PODM (3), with ``H = (penalty / 2) W^T W``.
        """
        rho = penalty / self.weight
        gram = self.operator.gram(x)
        other = None if gram is None or through is None else through.gram(x)
        if gram is not None and other is not None:  # both circulant: one transform there, one back
            weighted = rho * other
            spectrum = (self._spectrum + weighted * torch.fft.rfft2(x)) / (gram + weighted)
            return torch.fft.irfft2(spectrum, s=x.shape[-2:])
        return self._solve(add_scaled(self.back, x if through is None else through.normal(x), rho), rho, through)

    def _solve(self, rhs: Tensor, rho: Tensor | float, through: Operator | None) -> Tensor:
        """``(A^T A + rho W^T W)^-1 rhs``, in the Fourier domain where both spectra allow it."""
        made_for = (rho, through) if isinstance(rho, float) else None
        if made_for is not None and self._filter[0] == made_for:
            return torch.fft.irfft2(torch.fft.rfft2(rhs).mul_(self._filter[1]), s=rhs.shape[-2:], norm="forward")
        if through is None and self.operator.unitary:
            return self.operator.solve(rhs, rho)
        gram = self.operator.gram(rhs)
        other = torch.ones((), dtype=rhs.dtype, device=rhs.device) if through is None else through.gram(rhs)
        if gram is None or other is None:
            if through is None:
                return self.operator.solve(rhs, rho)
            if isinstance(self.operator, BlurDecimate) and other is not None and _definite(other):
                return self.operator.solve(rhs, rho, other)
            return conjugate_gradient(lambda x: self.operator.normal(x) + rho * through.normal(x), rhs)
        # with the 1 / (H W) of the inverse transform, which saves a pass over the image
        scaled = 1.0 / (rhs.shape[-2] * rhs.shape[-1]) / (gram + rho * other)
        if made_for is not None:
            self._filter = (made_for, scaled)
        return torch.fft.irfft2(torch.fft.rfft2(rhs) * scaled, s=rhs.shape[-2:], norm="forward")

    @cached_property
    def _spectrum(self) -> Tensor:
        return torch.fft.rfft2(self.back)

    @cached_property
    def bounds(self) -> tuple[float, float]:
        low, high = self.operator.eigenvalue_range(self.back)
        weight = torch.as_tensor(self.weight, dtype=torch.float64)
        return low * weight.min().item(), high * weight.max().item()


class LinkedGradient:
    """Fidelity of an image gradient ``g``: ``f(g) = inf_x (weight / 2) (||A x - y||^2 + beta ||D x - g||^2)``.

    Eq: PADNet (15), (16), with the factor 1/2 of (15).  The minimiser over x is the *link layer*
    ``x(g) = (A^T A + beta D^T D)^-1 (A^T y + beta D^T g)``, solved in the Fourier domain; by the envelope theorem
    ``grad f(g) = weight beta (g - D x(g))``, and ``0 <= f'' <= weight beta``.
    """

    def __init__(self, operator: LinearMap, gradient: LinearMap, y: Tensor, beta: float, weight: float = 1.0):
        self.operator, self.gradient, self.y = as_operator(operator), as_operator(gradient), y
        self.beta, self.weight = beta, weight
        self.back = self.operator.A_adjoint(y)

    def image(self, g: Tensor, beta: float | None = None) -> Tensor:
        """The link layer ``x(g)``: ``(B, 2C, H, W) -> (B, C, H, W)``."""
        beta = self.beta if beta is None else beta
        left, right = self.operator.gram(self.back), self.gradient.gram(self.back)  # kept by the operators
        if left is None or right is None:
            raise TypeError("operator: the link layer needs circulant operators (Blur, Gradient, Identity)")
        rhs = self.back + beta * self.gradient.A_adjoint(g)
        return torch.fft.irfft2(torch.fft.rfft2(rhs) / (left + beta * right), s=rhs.shape[-2:])

    def value(self, g: Tensor) -> Tensor:
        x = self.image(g)
        fit = square_items(self.operator.A(x) - self.y)
        return 0.5 * self.weight * (fit + self.beta * square_items(self.gradient.A(x) - g))

    def grad(self, g: Tensor) -> Tensor:
        return self.weight * self.beta * (g - self.gradient.A(self.image(g)))

    def prox(self, z: Tensor, step: Tensor | float) -> Tensor:
        # eliminate g = (beta D x + c z) / (beta + c), c = 1 / (weight step): a link layer with a softer beta
        c = 1.0 / (self.weight * float(step))
        x = self.image(z, self.beta * c / (self.beta + c))
        return (self.beta * self.gradient.A(x) + c * z) / (self.beta + c)

    @property
    def bounds(self) -> tuple[float, float]:
        return 0.0, self.weight * self.beta


@dataclass(frozen=True)
class Problem:
    """``F(x) = f(x) + R(W x)``; ``prior = None`` makes it partially defined, ``transform = None`` means ``W = I``.

    Eq: PADNet (1).

    ``lipschitz`` and ``strong_convexity`` are those of ``grad f`` and ``f``, computed from the operator.  With a transform
    (a discrete gradient, say) ``R(W .)`` has no closed-form prox: use a splitting method, which never asks for it.
    """

    fidelity: Fidelity
    prior: Prior | None = None
    transform: Operator | None = None

    @property
    def lipschitz(self) -> float:
        return self.fidelity.bounds[1]

    @property
    def strong_convexity(self) -> float:
        return self.fidelity.bounds[0]

    def energy(self, x: Tensor) -> Tensor:
        """``F(x)``, float64, ``(B,)``.  Raises ``TypeError`` for a partially defined problem."""
        return self.fidelity.value(x) + self._prior.value(x if self.transform is None else self.transform.A(x))

    def prox_prior(self, z: Tensor, step: Tensor | float) -> Tensor:
        """``argmin R(x) + ||x - z||^2 / (2 step)``, on ``W x`` when there is a transform."""
        return self._prior.prox(z, step)

    def prox_fidelity(self, z: Tensor, step: Tensor | float) -> Tensor:
        """``argmin f(x) + ||W x - z||^2 / (2 step)``."""
        if self.transform is None:
            return self.fidelity.prox(z, step)
        return self.fidelity.prox(z, step, through=self.transform)  # type: ignore[call-arg]

    def residual(self, x: Tensor, step: float | None = None) -> Tensor:
        """``||x - prox_{step R}(x - step grad f(x))|| / step`` at a fixed step (default 1/L): 0 if critical, ``(B,)``.

        Measured at a step that does not depend on the iteration, so that no schedule can hide a lack of criticality.
        """
        if self.transform is not None:
            raise TypeError("problem: with a transform its proximal map, hence this residual, has no closed form")
        step = step if step is not None else 1.0 / self.lipschitz
        return norm_items(x - self.prox_prior(x - step * self.fidelity.grad(x), step)) / step

    @property
    def _prior(self) -> Prior:
        if self.prior is None:
            raise TypeError("problem: it has no prior, so its energy and its proximal map are not defined")
        return self.prior
