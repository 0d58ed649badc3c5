"""Linear solves ``A x = b`` with a given product ``A(v)``: conjugate gradients, Neumann series, GMRES, fixed point.

``b`` is one vector; a tree of tensors is laid end to end by `ravel`.  `solve` returns value, status, residual and iterations
and never raises: what a failure means is for the caller to say.  The solvers it calls take ``||b|| = 1``.
(`odlkit.linear.conjugate_gradient` is for operators known to be positive definite, one system an image; here definiteness
is in question, and the same iteration is watched.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor
from torch.linalg import vector_norm

from odlkit.linear import conjugate_directions

Product = Callable[[Tensor], Tensor]


class Status(StrEnum):
    """How a lower-level iteration or a linear solve ended; the first four are the words of `odlkit.propagate.Status`."""

    CONVERGED = "converged"  # the tolerance was met
    STEP_LIMIT = "step limit"  # all steps were taken; a failure only where a tolerance was asked for
    DIVERGED = "diverged"
    NOT_FINITE = "not finite"
    NOT_DEFINITE = "not positive definite"  # a direction of zero or negative curvature
    NOT_SYMMETRIC = "not symmetric"
    STAGNATED = "stagnated"  # the residual no longer falls: the system is singular, or out of reach


@dataclass
class Solve:
    """The end of a linear solve; ``residual`` is ``||b - A x|| / ||b||``, ``iterations`` counts products with ``A``."""

    value: Tensor
    status: Status
    residual: float
    iterations: int


def ravel(leaves: list[Tensor]) -> Tensor:
    """All entries as one vector; a view when there is a single contiguous leaf."""
    return leaves[0].reshape(-1) if len(leaves) == 1 else torch.cat([leaf.reshape(-1) for leaf in leaves])


def unravel(vector: Tensor, like: list[Tensor]) -> list[Tensor]:
    """The inverse of `ravel`, with the shapes and precisions of ``like``."""
    parts = vector.split([leaf.numel() for leaf in like])
    return [part.view(leaf.shape).to(leaf.dtype) for part, leaf in zip(parts, like, strict=True)]


def size(vector: Tensor) -> float:
    """The Euclidean norm as a number."""
    return vector_norm(vector).item()


def begin(A: Product, b: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """The start, its residual and the products it took: ``x`` if it has a smaller residual than zero has."""
    if x is not None:
        r = b - A(x)
        if size(r) < size(b):
            return x, r, 1
        return torch.zeros_like(b), b, 1
    return torch.zeros_like(b), b, 0


def conjugate_gradient(A: Product, b: Tensor, x: Tensor | None, tol: float, max_iter: int) -> Solve:
    """Conjugate gradients for a symmetric positive definite ``A``, from ``x``.

    Ends as ``NOT_DEFINITE`` at the first direction with ``<p, A p> <= eps ||A|| ||p||^2`` (``||A||`` is the largest
    curvature met): there the system is singular or indefinite, and what follows would be noise.
    """
    steepest, failure = 0.0, None

    def stop(curvature: Tensor, pp: Tensor) -> bool:
        nonlocal steepest, failure
        along, square = curvature.item(), pp.item()
        steepest = max(steepest, abs(along) / square)
        if not along > torch.finfo(b.dtype).eps * steepest * square:
            failure = Status.NOT_DEFINITE if math.isfinite(along) else Status.NOT_FINITE
        return failure is not None

    x, r, used = begin(A, b, x)
    x, rr, taken = conjugate_directions(lambda v: A(v[0])[None], x[None], r[None], tol**2, max_iter, stop)
    norm = rr.sqrt().item()
    return Solve(x[0], failure or ended(norm, tol), norm, used + taken)


def ended(norm: float, tol: float) -> Status:
    """The status of a solve that ended with this residual and no other failure."""
    if not math.isfinite(norm):
        return Status.NOT_FINITE
    return Status.STEP_LIMIT if norm > tol else Status.CONVERGED


def fixed_point(A: Product, b: Tensor, x: Tensor | None, tol: float, max_iter: int) -> Solve:
    """``x <- x + (b - A x)``, from ``x``; converges when ``I - A`` has spectral radius below 1.

    From zero these are the partial sums of the Neumann series ``sum_j (I - A)^j b``.  The residual obeys ``r <- (I - A) r``,
    so that it needs no product of its own.
    """
    x, r, used = begin(A, b, x)
    norm, first, failure, flat = size(r), size(r), None, 1 - 10 * torch.finfo(b.dtype).eps
    still = 0  # products in a row that kept the norm; a few a delay makes too
    for _ in range(max_iter):
        if failure or not norm > tol:
            break
        x, r = x + r, r - A(r)
        used, old, norm = used + 1, norm, size(r)
        still = still + 1 if flat * old <= norm <= old / flat else 0
        if not norm <= 1e6 * first:
            failure = Status.DIVERGED if math.isfinite(norm) else Status.NOT_FINITE
        elif still == 20:
            failure = Status.STAGNATED
    return Solve(x, failure or ended(norm, tol), norm, used)


def gmres(A: Product, b: Tensor, x: Tensor | None, tol: float, max_iter: int, restart: int = 50) -> Solve:
    """GMRES for any invertible ``A``, restarted after ``restart`` steps; holds ``restart + 1`` vectors."""
    x, r, used = begin(A, b, x)
    norm, failure, taken = size(r), None, 0
    while norm > tol and taken < max_iter:
        V = b.new_zeros(restart + 1, b.numel())
        H = torch.zeros(restart + 1, restart, dtype=torch.float64)
        V[0] = r / norm
        for j in range(min(restart, max_iter - taken)):
            w, basis = A(V[j]), V[: j + 1]
            for _ in range(2):  # Gram-Schmidt twice: as stable as the modified one, and two matrix products
                h = basis @ w
                w = w - h @ basis
                H[: j + 1, j] += h.double().cpu()
            H[j + 1, j], taken, used = size(w), taken + 1, used + 1
            rhs = torch.zeros(j + 2, 1, dtype=torch.float64)
            rhs[0] = norm
            if not H[: j + 2, : j + 1].isfinite().all():
                return Solve(x, Status.NOT_FINITE, math.nan, used)
            y = torch.linalg.lstsq(H[: j + 2, : j + 1], rhs, driver="gelsd").solution
            left = size(rhs - H[: j + 2, : j + 1] @ y)
            if left <= tol or H[j + 1, j] <= torch.finfo(b.dtype).eps * H[: j + 1, j].norm():
                break
            V[j + 1] = w / H[j + 1, j].item()
        x = x + y[:, 0].to(b) @ V[: len(y)]
        r, old, used = b - A(x), norm, used + 1
        norm = size(r)
        if norm > tol and norm > 0.999 * old:
            failure = Status.STAGNATED
            break
    return Solve(x, failure or ended(norm, tol), norm, used)


SOLVERS = {"cg": conjugate_gradient, "neumann": fixed_point, "gmres": gmres, "fixed point": fixed_point}


def solve(solver: str, A: Product, b: Tensor, x: Tensor | None = None, *, tol: float = 1e-6, max_iter: int = 500) -> Solve:
    """Solve ``A x = b`` by one of `SOLVERS` from ``x``, to ``||b - A x|| <= max(tol, eps) ||b||``."""
    scale = size(b)
    if scale == 0 or not math.isfinite(scale):
        return Solve(torch.zeros_like(b), Status.CONVERGED if scale == 0 else Status.NOT_FINITE, scale, 0)
    x = None if x is None or solver == "neumann" else x / scale  # the series starts from zero
    found = SOLVERS[solver](A, b / scale, x, max(tol, torch.finfo(b.dtype).eps), max_iter)
    found.value = found.value * scale
    return found


def asymmetry(A: Product, like: Tensor, seed: int = 0) -> float:
    """About ``||(A - A^T) y|| / ||A y||``, from one random pair: ``sqrt(n) |<x, A y> - <A x, y>| / (||x|| ||A y||)``."""
    noise = torch.randn(2, like.numel(), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x, y = noise.to(like)
    Ay = A(y)
    return math.sqrt(like.numel()) * abs((x.dot(Ay) - A(x).dot(y)).item()) / max(size(x) * size(Ay), 1e-300)
