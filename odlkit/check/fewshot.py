"""Checkers of the chapter on few-shot learning."""

from __future__ import annotations

import torch

from odlkit.check.base import draws, exercise, like


@exercise
def few_1(curvature):
    """``curvature(f, ridge)``: for features (T, n, D) a bound (T,) of ``||F F^T||_2 / (2 n) + ridge``, by row sums."""
    for randn in draws():
        f = randn(3, 6, 9)
        got = curvature(f, 0.1)
        exact = 0.5 * torch.linalg.matrix_norm(f @ f.transpose(1, 2), 2) / 6 + 0.1
        yield like(got, exact)
        yield "a bound", (got >= exact - 1e-12).all(), "Some task's curvature is larger: features are not orthogonal."
        rows = 0.5 * (f @ f.transpose(1, 2)).abs().sum(2).amax(1) / 6 + 0.1
        yield "no looser than the row sums", (got <= rows + 1e-9).all(), "A bound, but the largest row sum is smaller."


@exercise
def few_2(head):
    """``head(F, Y, ridge)``: the minimiser (T, D, N) of ``||F u - Y||^2 + ridge ||u||^2``, F (T, n, D), Y (T, n, N)."""
    for randn in draws():
        F, Y, ridge = randn(2, 4, 11), randn(2, 4, 3), 0.2
        got = head(F, Y, ridge)
        yield like(got, torch.zeros(2, 11, 3, dtype=F.dtype))
        slope = F.transpose(1, 2) @ (F @ got - Y) + ridge * got
        yield "zero gradient", slope.abs().max() < 1e-9, "The gradient of the energy does not vanish at this head."
