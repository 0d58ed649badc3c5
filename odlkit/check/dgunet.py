"""Exercises of the DGUNet part."""

from __future__ import annotations

import torch
from torch.nn.functional import conv2d

from odlkit.check.base import draws, exercise, inner, like, problem_of
from odlkit.operators import BlockSampling


@exercise
def dgu_1(adjoint):
    """``adjoint(w)``: the weight of the adjoint of ``conv2d(x, w, padding=1)``, w of shape (D, C, 3, 3); (C, D, 3, 3)."""
    for randn in draws():
        w, x, z = randn(2, 3, 3, 3), randn(1, 3, 7, 8), randn(1, 2, 7, 8)
        back = adjoint(w)
        yield like(back, w.transpose(0, 1))
        gap = inner(conv2d(x, w, padding=1), z) - inner(x, conv2d(z, back, padding=1))
        yield "adjoint identity", gap.abs() < 1e-9, "<W x, z> differs from <x, W^T z>: what does a shift become?"


@exercise
def dgu_2(pg):
    """``pg(x, A, y, weight, rho)``: a proximal-gradient step for ``||A x - y||^2 / 2 + weight ||x||_1``; like ``x``."""
    for randn in draws():
        A, y, weight = torch.cat([torch.eye(4).double(), 0.3 * randn(4, 4)]), randn(8), 0.3
        norm, limits = torch.linalg.matrix_norm(A, 2).item() ** 2, []
        for share in (0.4, 1.2):
            x = randn(4)
            yield like(pg(x, A, y, weight, share / norm), x)
            for _ in range(600):
                x = pg(x, A, y, weight, share / norm)
            limits.append(x)
        yield (
            "one limit",
            torch.allclose(limits[0], limits[1], atol=1e-6),
            "Two steps, two limits: what depends on rho?",
        )
        slope = A.T @ (A @ x - y)
        off = torch.where(x == 0, (slope.abs() - weight).relu(), slope + weight * x.sign())
        yield "zero subgradient", off.abs().max() < 1e-6, "The limit does not minimise the energy."


@exercise
def path_1(project):
    """``project(v, g)``: the maps g (C, N) projected orthogonally on the span of the maps v (r, N); like ``g``."""
    for randn in draws():
        v, g = randn(3, 20), randn(5, 20)
        p = project(v, g)
        yield like(p, g)
        inside = randn(5, 3) @ v
        yield "keeps the span", torch.allclose(project(v, inside), inside), "A mixture of the maps of v was changed."
        yield "orthogonal", ((g - p) @ v.T).abs().max() < 1e-9, "What is left out is not orthogonal to the maps of v."


@exercise
def path_2(passed):
    """``passed(widths, fused, height, width)``: numbers from stage to stage beside the image: SAM's features, E_n, D_n."""
    for randn in draws():
        first, step, rows, columns = (8 * randn(4).abs()).ceil().int().tolist()
        widths, height, width = [first + n * step for n in range(4)], 8 * rows, 8 * columns
        plain = passed(widths, 0, height, width)
        yield "without fusion", plain == first * height * width, "SAM hands on as many channels as the finest scale has."
        pixels = height * width
        one = passed(widths, 1, height, width) - plain
        yield "finest scale", one == (widths[0] + widths[1]) * pixels, "E_0 has already the channels of the next scale."
        more = passed(widths, 3, height, width) - passed(widths, 2, height, width)
        yield "coarser scales", more == (widths[2] + widths[3]) * pixels // 16, "Each scale has a quarter of the pixels."


@exercise
def dgn_1(norm):
    """``norm(T, x)``: the largest factor by which T stretches small changes of x, to one per cent; a number."""
    for randn in draws():
        M, x = randn(6, 6), randn(6)
        true = torch.linalg.matrix_norm(M, 2).item()
        got = float(norm(lambda z, M=M: M @ z, x))
        yield "never more", got <= true * (1 + 1e-6), "No direction is stretched that much."
        yield (
            "within a per cent",
            got >= 0.99 * true,
            "There is a direction that is stretched more; T need not be symmetric.",
        )
        bent = float(norm(lambda z, M=M: M @ z.sin(), x))
        here = torch.linalg.matrix_norm(M * x.cos(), 2).item()
        yield "at x", abs(bent - here) <= 0.01 * here, "T bends: the factor belongs to the point x."


@exercise
def dgn_2(guard):
    """``guard(F, x, proposal, safe)``: the proposal where its energy is at most that of ``safe``; like ``x``."""
    for randn in draws():
        problem, x = problem_of(randn)
        F, safe = problem.energy, x - 0.1 / problem.lipschitz * problem.fidelity.grad(x)
        good = x - 0.5 / problem.lipschitz * problem.fidelity.grad(x)
        mixed = torch.stack([good[0], x[1] + 10])
        got = guard(F, x, mixed, safe)
        yield like(got, x)
        yield "keeps a good proposal", torch.equal(guard(F, x, good, safe), good), "It had less energy and was sent back."
        yield "never worse than safe", bool((F(got) <= F(safe)).all()), "A proposal with more energy was kept."
        yield "each picture by itself", torch.equal(got, torch.stack([good[0], safe[1]])), "One was good, one was not."


@exercise
def dgcs_1(adjoint):
    """``adjoint(y, phi)``: pictures ``(B, 1, h n, w n)`` from ``(B, M, h, w)`` by the adjoint of measuring in blocks."""
    for randn in draws():
        phi, x = randn(5, 16), randn(2, 1, 8, 12)
        y = BlockSampling(phi).A(x)
        v = randn(*y.shape)
        back = adjoint(v, phi)
        yield like(back, x)
        one = torch.zeros_like(v)
        one[0, :, 1, 2] = v[0, :, 1, 2]
        yield "stays in its block", not adjoint(one, phi)[0, 0, :4].any(), "Numbers of a lower block reached an upper one."
        yield "adjoint identity", (inner(y, v) - inner(x, back)).abs() < 1e-9, "<A x, v> differs from <x, adjoint(v)>."


@exercise
def dgcs_2(whiten):
    """``whiten(phi, y)``: ``(Q, z)``, Q with orthonormal rows that span those of phi; ``z = Q x``, ``y = phi x`` (M, B)."""
    for randn in draws():
        phi, x = randn(4, 9), randn(9, 3)
        q, z = whiten(phi, phi @ x)
        yield like(q, phi)
        yield "orthonormal rows", torch.allclose(q @ q.T, torch.eye(4).double(), atol=1e-9), "Q Q^T is not the identity."
        yield "same row space", torch.allclose(phi @ q.T @ q, phi, atol=1e-9), "A row of phi is no mixture of rows of Q."
        yield "same measurements", torch.allclose(z, q @ x, atol=1e-9), "z differs from Q x: solve for it with y."
