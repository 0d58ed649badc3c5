"""Choosing the weights of a regulariser for one's own imaging problem, from a few pictures, without a grid.

`learn_weights` minimises the mean square error over the log-weights of `odlkit.training.banded`.  Every accepted step is a
proved descent, up to round-off: the bounds of `certify` decide how accurately the lower level is solved, so that no
tolerance has to be guessed.  Pedregosa (2016, HOAG) lowers the tolerance on a schedule; Salehi et al. (2025, MAID) by what a
line search with inexact values needs, as here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from odlkit.bilevel import LowerLevelError
from odlkit.linear import LinearMap, as_operator
from odlkit.metrics import psnr
from odlkit.problem import norm_items
from odlkit.training.banded import Bands, Certified, Lower, certify, certify_gradient

DECIBEL = 10 / math.log(10)  # dPSNR / d log(mean square error)


@dataclass
class Learned:
    """What `learn_weights` returns: ``weights`` (count,), why it stopped, and a row for each point.

    A row has ``weights``, ``mse`` and ``mse_error``, ``slope`` and ``slope_error`` (norm of the hypergradient, bound on its
    error, in dB of PSNR a factor e in the weights), ``distance`` (the bound on ``||u - u*||``), ``solves`` (points at
    which the lower level was solved), ``applied`` (of A and A^T), with validation pictures their mean PSNR ``validation``.
    ``estimate`` is the engine's own estimate of the last hypergradient's relative error, NaN where round-off hides it.
    """

    weights: Tensor
    status: str  # "converged", "step limit" or "no descent"
    history: list[dict[str, Any]]
    estimate: float
    bands: Bands
    ridge: float
    delta: float

    def restore(self, operator: LinearMap, y: Tensor, accuracy: float = 1e-3) -> tuple[Tensor, Tensor]:
        """``u`` like ``A^T y``, and ``(B,)`` proved bounds on ``||u - u*|| / sqrt(n)``, at most ``accuracy``.

        Computes in float64 and returns the precision of ``y``.
        """
        lower = Lower(operator, y.double(), self.bands, self.ridge, self.delta)
        w, root = self.weights.to(lower.start).log(), math.sqrt(lower.start[0].numel())
        u = lower.solve(w, tol=accuracy * root * lower.mu)
        return u.to(y.dtype), norm_items(lower.gradient(u, w)[1]) / (lower.mu * root)


class _Upper:
    """The mean square error and its gradient, with tolerances that fall as far as the bounds ask, and warm starts."""

    def __init__(self, lower: Lower, truth: Tensor, accuracy: float, tol: float):
        self.lower, self.truth, self.accuracy, self.tol = lower, truth, accuracy, tol
        self.inner, self.adjoint = 1e-2 * lower.mu * math.sqrt(truth[0].numel()), 1e-3
        self.warm: Tensor | None = None
        self.points = 0

    def value(self, w: Tensor, u: Tensor | None) -> Certified:
        self.points += 1
        return certify(self.lower, w, self.lower.solve(w, u, self.inner), self.truth)

    def flat(self, c: Certified) -> bool:
        """Whether the slope is proved to be below the tolerance."""
        return (c.gradient.norm().item() + c.gradient_error) * DECIBEL / c.loss <= self.tol

    def row(self, w: Tensor, c: Certified) -> dict[str, Any]:
        scale = DECIBEL / c.loss
        return {
            "weights": w.exp().tolist(), "mse": c.loss, "mse_error": c.loss_error, "distance": c.distance,
            "slope": scale * c.gradient.norm().item(), "slope_error": scale * c.gradient_error,
            "solves": self.points, "applied": self.lower.applied,
        }  # fmt: skip

    def gradient(self, w: Tensor, u: Tensor) -> Certified:
        """`certify_gradient`, the tolerances lowered until its bound is a small part of the gradient, or both are small."""
        while True:
            u = self.lower.solve(w, u, self.inner)
            c = certify_gradient(self.lower, w, u, self.truth, self.adjoint, self.warm)
            self.warm, norm = c.adjoint, c.gradient.norm().item()
            if c.gradient_error <= self.accuracy * norm or self.flat(c):
                return c
            shrink = min(0.3, max(1e-3, self.accuracy * norm / (2 * c.gradient_error)))
            self.inner, self.adjoint = shrink * self.inner, max(shrink * self.adjoint, 1e-13)

    def descend(self, w: Tensor, c: Certified, p: Tensor) -> tuple[float, Certified] | None:
        """A step length along ``p`` with a proved descent, and the point there; None where none is found."""
        slope, t = (p.dot(c.gradient) + p.norm() * c.gradient_error).item(), 1.0
        while t > 1e-6:
            new = self.value(w + t * p, c.u)
            if new.loss + new.loss_error <= c.loss - c.loss_error + 1e-4 * t * slope:
                return t, new
            if new.loss_error + c.loss_error > -0.1 * t * slope:  # too blurred to judge
                self.inner *= 0.1
                again = self.value(w, c.u)
                c.u, c.loss, c.loss_error = again.u, again.loss, again.loss_error
            else:
                t *= min(0.5, max(0.1, -slope * t / (2 * (new.loss - c.loss - slope * t))))
        return None


def learn_weights(
    operator: LinearMap,
    images: Tensor | Sequence[Tensor],
    noise: float = 0.01,
    regulariser: str | LinearMap = "wavelet",
    *,
    shared: bool = False,
    measured: Tensor | None = None,
    start: Tensor | float | None = None,
    ridge: float = 1e-3,
    delta: float = 0.01,
    accuracy: float = 0.1,
    tol: float = 0.02,
    steps: int = 50,
    validation: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Learned:
    """Weights for which ``argmin E`` comes nearest, in mean square, to the training pictures.

    ``images`` is ``(B, C, H, W)`` in [0, 1] or a list of one size; the data are ``A x + noise randn`` from ``seed``, or
    ``measured``.  ``regulariser`` and ``shared`` as in `Bands.of`.  ``start``: weights to begin with (default
    ``noise^2 / mean |W_j x|``, those of a Laplace prior, divided by the coefficients a pixel; for many
    weights the best common one, learned first, is a start that cannot end above it).  ``validation`` is a pair
    (data, pictures).

    BFGS on the log-weights.  At each point the lower level and the adjoint are solved until the proved error of the
    hypergradient is at most ``accuracy`` of its norm; a step is accepted when the proved upper bound on the new error lies
    far enough below the proved lower bound on the old.  Stops where another factor e in the weights is proved to change the
    PSNR by less than ``tol`` dB: the approximate stationary point of HODL's Theorem 3.2.  Everything runs in float64.

    Raises ``ValueError`` for bad arguments, an ``A_adjoint`` that is not the adjoint of ``A`` among them, and
    `odlkit.linear.NotConverged` or `odlkit.bilevel.LowerLevelError` when a solve fails.
    """
    from tqdm import tqdm

    truth = _pictures(images)
    _check_numbers(noise=noise, ridge=ridge, delta=delta, tol=tol, accuracy=accuracy)
    if steps < 0:
        raise ValueError(f"steps: expected at least 0, got {steps}")
    generator = torch.Generator().manual_seed(seed)
    A = as_operator(operator)
    _check_adjoint(A, truth, generator)
    y = A.A(truth)
    if measured is not None and measured.shape != y.shape:
        raise ValueError(f"measured: expected data like A x, {tuple(y.shape)}, got {tuple(measured.shape)}")
    drawn = y + noise * torch.randn(y.shape, generator=generator, dtype=y.dtype).to(y)
    y = drawn if measured is None else measured.double()
    for name, values in (("images", truth), ("measured", y)):
        if not bool(values.isfinite().all()):
            raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    bands = Bands.of(regulariser, shared)
    w = _first(bands, truth, noise, start)
    lower, watch = Lower(A, y, bands, ridge, delta), validation and Lower(A, validation[0].double(), bands, ridge, delta)
    upper, seen = _Upper(lower, truth, accuracy, tol), None
    B, before = torch.zeros(len(w), len(w)).to(w), None
    history: list[dict[str, Any]] = []
    status, c = "step limit", upper.value(w, None)
    with tqdm(total=steps, desc="weights", disable=not progress, leave=False) as bar:
        for step in range(steps + 1):
            c = upper.gradient(w, c.u)
            row = upper.row(w, c)
            if watch and validation:
                seen = watch.solve(w, seen, tol=1e-3 * watch.mu * math.sqrt(watch.start[0].numel()))
                row["validation"] = psnr(seen, validation[1].double()).mean().item()
            history.append(row)
            bar.set_postfix(psnr=f"{-DECIBEL * math.log(c.loss):.2f}", slope=f"{row['slope']:.3f}")
            if upper.flat(c):
                status = "converged"
            if upper.flat(c) or step == steps:
                break
            if before is not None:
                B = _bfgs(B, w - before[0], c.gradient - before[1], first=len(history) == 2)
            p = -B @ c.gradient
            if not p.dot(c.gradient) < -p.norm() * c.gradient_error:  # not proved to descend, or the first
                p = -c.gradient / c.gradient.abs().max()
            p = p * min(1.0, 2 / p.abs().max().item())
            found = upper.descend(w, c, p)
            if found is None:
                status = "no descent"
                break
            before, (t, new) = (w, c.gradient), found
            w, c = w + t * p, new
            bar.update()
    try:
        estimate = certify_gradient(lower, w, c.u, truth, upper.adjoint, upper.warm, estimate=True).estimate
    except LowerLevelError:  # at round-off no better point is found to compare with
        estimate = None
    return Learned(w.exp(), status, history, math.nan if estimate is None else estimate, bands, ridge, delta)


def _bfgs(B: Tensor, s: Tensor, y: Tensor, first: bool) -> Tensor:
    """The inverse Hessian after a step ``s`` that changed the gradient by ``y``; as it was where that shows no curvature."""
    sy = s.dot(y)
    if not sy > 1e-10 * s.norm() * y.norm():
        return B
    identity = torch.eye(len(s)).to(s)
    left = identity - torch.outer(s, y) / sy
    return left @ (identity * sy / y.dot(y) if first or not B.any() else B) @ left.T + torch.outer(s, s) / sy


def _first(bands: Bands, truth: Tensor, noise: float, start: Tensor | float | None) -> Tensor:
    """The logarithms of the weights to begin with."""
    if start is None:
        size = bands.lengths(bands.W.A(truth)).sqrt()
        number = bands.sums(torch.ones_like(size))
        mean, redundancy = bands.sums(size) / number, max(number.sum().item() / truth.numel(), 1.0)
        return 2 * math.log(max(noise, 1e-3)) - math.log(redundancy) - mean.clamp_min(1e-6).log()
    given = torch.as_tensor(start, dtype=torch.float64, device=truth.device)
    if given.numel() not in (1, bands.count) or not bool((given > 0).all()):
        raise ValueError(f"start: expected positive weights, one or {bands.count}, got {start}")
    return given.flatten().expand(bands.count).log()


def _pictures(images: Tensor | Sequence[Tensor]) -> Tensor:
    sizes = {tuple(x.shape[-3:]) for x in images} if len(images) else set()
    truth = images if isinstance(images, Tensor) else torch.cat(list(images)) if len(sizes) == 1 else torch.empty(0)
    if truth.dim() != 4 or not truth.is_floating_point():
        raise ValueError(f"images: expected floating point (B, C, H, W), or a list of one size, got {sizes or 'none'}")
    if truth.numel() and 10 < truth.abs().max() < math.inf:
        raise ValueError(f"images: expected values around [0, 1], got up to {truth.abs().max().item():.3g}")
    return truth.double()


def _check_numbers(**numbers: float) -> None:
    for name, value in numbers.items():
        low, high = (0.0, 1.0) if name == "accuracy" else (-1e-300 if name == "noise" else 0.0, math.inf)
        if not low < value <= high or (name == "accuracy" and value == 1):
            raise ValueError(f"{name}: expected a number {'between 0 and 1' if high == 1 else 'above 0'}, got {value}")


def _check_adjoint(A, x: Tensor, generator: torch.Generator) -> None:
    """Raise unless ``<A u, v> = <u, A^T v>`` for a random pair, and A takes float64."""
    u = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x)
    Au = A.A(u)
    v = torch.randn(Au.shape, generator=generator, dtype=Au.dtype).to(Au)
    back = A.A_adjoint(v)
    if back.shape != u.shape or Au.dtype != u.dtype:
        raise ValueError(f"operator: expected A^T A to keep {tuple(u.shape)} {u.dtype}, got {tuple(back.shape)} {Au.dtype}")
    left, right = (Au * v).sum().item(), (u * back).sum().item()
    if not abs(left - right) <= 1e-6 * (Au.norm() * v.norm() + u.norm() * back.norm()).item():
        raise ValueError(f"operator: expected <A u, v> = <u, A_adjoint v>, got {left:.6g} and {right:.6g}")
