"""Exercises of the HODL part."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from odlkit.check.base import blur_of, draws, exercise, like
from odlkit.problem import LeastSquares, norm_items


@exercise
def agg_1(aggregate):
    """``aggregate(u, v, slope, d, mu, s, k)``: HODL (4) with ``v = T(u)``, ``G = diag(d)``, after k steps; like ``u``."""
    for randn in draws():
        u, v, slope, d = randn(3, 4), randn(3, 4), randn(3, 4), randn(4).exp()
        mu, s = 0.5, 0.7
        got, plain = aggregate(u, v, slope, d, mu, s, 0), mu * u + (1 - mu) * v
        yield like(got, u)
        yield "mu = 0 is T", torch.allclose(aggregate(u, v, slope, d, 0.0, s, 0), v), "Without aggregation v is left."
        halved = aggregate(u, v, slope, 2 * d, mu, s, 0) - plain
        yield "the metric", torch.allclose(2 * halved, got - plain), "Twice the metric, half the step: G^-1 times the slope."
        yield (
            "first step s / 2",
            torch.allclose(plain - got, mu * s / 2 * slope / d),
            "The paper's k is one more than yours.",
        )
        later = plain - aggregate(u, v, slope, d, mu, s, 8)
        yield "fades like 1 / k", torch.allclose(5 * later, plain - got), "After eight steps a fifth of the first is left."


@exercise
def agg_2(largest):
    """``largest(gamma, L, network)``: the largest alpha with ``I + alpha (D - I)`` non-expansive, f convex, L-smooth."""
    for randn in draws():
        for L, share in (randn(20, 2).abs() + 0.05).tolist():
            gamma = min(share, 1.0) * 2 / L
            alpha, case = largest(gamma, L, False), f"gamma {gamma:.2f}, L {L:.2f}"
            yield "safe alone", abs(1 - alpha * gamma * L) <= 1 + 1e-9, f"{case}: for the steepest f, T has norm above 1."
            yield "largest alone", alpha * gamma * L >= 2 - 1e-9, f"{case}: a larger alpha is still non-expansive."
            beside = largest(gamma, L, True)
            yield "safe after a network", abs(1 - 2 * beside) <= 1 + 1e-9, "The network may be -I, and f may be 0."
            yield "largest after a network", beside >= 1 - 1e-9, "A product of non-expansive maps is non-expansive."


@exercise
def spc_1(project):
    """``project(W)``: the nearest matrix (Frobenius) to a square W with no singular value above 1; like ``W``."""
    for randn in draws():
        W = randn(6, 6)
        P = project(W)
        yield like(P, W)
        yield "norm at most 1", torch.linalg.matrix_norm(P, 2) <= 1 + 1e-9, "Its largest singular value is above 1."
        small = W / (2 * torch.linalg.matrix_norm(W, 2))
        yield "keeps what fits", torch.allclose(project(small), small), "A matrix of norm 1/2 was changed."
        least = (torch.linalg.svdvals(W) - 1).clamp_min(0).norm()
        yield "nearest", (W - P).norm() <= least + 1e-9, "There is a nearer one: only values above 1 have to change."


@exercise
def spc_2(least):
    """``least(q, beta, joint)``: the least tau with ``tau I >= beta B^T B``, B = [q I] if joint, else q; a number."""
    for randn in draws():
        q, beta = randn(4, 7), randn(1).abs().item() + 0.1
        for joint in (False, True):
            name, B = ("jointly" if joint else "in u"), torch.cat([q, torch.eye(4).double()], 1) if joint else q
            rest = torch.linalg.eigvalsh(beta * B.mT @ B)[-1] - float(least(q, beta, joint))
            yield f"enough {name}", rest <= 1e-9, "The matrix has a negative eigenvalue."
            yield f"least {name}", rest >= -1e-9, "A smaller tau is enough."


@exercise
def hdec_1(envelope_gradient):
    """``envelope_gradient(f, x, rho)``: of ``min_v f(v) + (rho / 2) ||v - x||^2``, f has ``prox(x, step)``; like ``x``."""
    for randn in draws():
        x, y, d, rho = randn(2, 1, 8, 10), randn(2, 1, 8, 10), randn(2, 1, 8, 10), 0.1 + randn(1).abs().item()
        f = LeastSquares(blur_of(randn), y, 2.0)

        def value(z: Tensor, f: LeastSquares = f, rho: float = rho) -> Tensor:
            v = f.prox(z, 1 / rho)
            return f.value(v) + rho / 2 * norm_items(v - z).square()

        got = envelope_gradient(f, x, rho)
        yield like(got, x)
        slope = (value(x + 1e-5 * d) - value(x - 1e-5 * d)) / 2e-5
        error = ((got * d).flatten(1).sum(1) - slope).abs().max()
        yield "derivative", error < 1e-6 * (1 + slope.abs().max()), "The minimiser v moves too, but that costs nothing."


@exercise
def hdec_2(bound):
    """``bound(enc, down, inner, up, dec, mean)``: of ``dec(skip + up(inner(down(skip))))``, halved if mean; a number."""
    for randn in draws():
        enc, down, inner, up, dec = (randn(5).abs() + 0.1).tolist()
        both = dec * (1 + up * inner * down) * enc
        yield "sums", abs(bound(enc, down, inner, up, dec, False) - both) < 1e-9, "Two ways lead to the sum: add them."
        yield "means", abs(bound(enc, down, inner, up, dec, True) - both / 2) < 1e-9, "A mean halves the sum."


@exercise
def one_1(depth):
    """``depth(m, L, gamma, tol)``: the least K after which gradient descent has cut every distance to ``tol``; or None."""
    for randn in draws():
        for m, wider, share in (randn(20, 3).abs() + 0.05).tolist():
            L, gamma, tol = m * (1 + wider), min(share, 1.5) / m / (1 + wider) * 2, 0.01
            K, q = depth(m, L, gamma, tol), max(abs(1 - gamma * m), abs(1 - gamma * L))
            case = f"m {m:.2f}, L {L:.2f}, gamma {gamma:.2f}"
            yield "says when it never comes", (K is None) == (q >= 1), f"{case}: it contracts iff 0 < gamma < 2 / L."
            if K is not None:
                yield "enough", q**K <= tol * (1 + 1e-9), f"{case}: after {K} steps some distance is left {q**K:.2g}."
                yield "no more than needed", q ** (K - 1) >= tol * (1 - 1e-9), f"{case}: {K - 1} steps are enough."


@exercise
def one_2(matrix):
    """``matrix()``: a non-expansive 2 x 2 matrix whose powers do not converge, while those of its mean with I go to 0."""
    M = matrix()
    yield "two by two", isinstance(M, Tensor) and M.shape == (2, 2), "Expected a tensor of shape (2, 2)."
    M = M.double()
    radius = torch.linalg.eigvals((M + torch.eye(2).double()) / 2).abs().max()
    yield "its average converges", radius < 1 - 1e-6, f"(I + M) / 2 has an eigenvalue of size {radius:.3f}."
    yield "non-expansive", torch.linalg.matrix_norm(M, 2) <= 1 + 1e-6, "Some vector becomes longer."
    yield (
        "does not converge",
        torch.linalg.eigvals(M).abs().max() >= 1 - 1e-6,
        "Its powers go to 0: all eigenvalues are below 1.",
    )


@exercise
def hyper_1(neumann):
    """``neumann(T, u, w, b, terms)``: ``(dT/dw)^T`` times the sum of ``terms`` terms ``((dT/du)^T)^j b``; like ``w``."""
    for randn in draws():
        M, N, u, w, b = randn(6, 6) / 6, randn(6, 3), randn(6), randn(3), randn(6)
        T = functools.partial(lambda M, N, u, w: torch.tanh(M @ u + N @ w), M, N)
        J, P = torch.func.jacrev(T, argnums=(0, 1))(u, w)
        got = neumann(T, u, w, b, 1)
        yield like(got, w)
        yield "one term", torch.allclose(got, P.T @ b), "With one term it is (dT/dw)^T b."
        yield "two terms", torch.allclose(neumann(T, u, w, b, 2), P.T @ (b + J.T @ b)), "The terms are added up."
        limit = P.T @ torch.linalg.solve((torch.eye(6).double() - J).T, b)
        yield "solves the system", torch.allclose(neumann(T, u, w, b, 200), limit), "Each term is (dT/du)^T the one before."


@exercise
def hyper_2(exact):
    """``exact(M, N, b)``: the hypergradient for a loss of gradient b at the fixed point of ``u <- M u + N w``."""
    for randn in draws():
        M, N, b = randn(5, 5) / 6, randn(5, 3), randn(5)
        got = exact(M, N, b)
        yield like(got, randn(3))
        by_w = torch.linalg.solve(torch.eye(5).double() - M, N)  # du/dw, a column for each entry of w
        symmetric = (M + M.T) / 2
        ours = exact(symmetric, N, b)
        right = torch.linalg.solve(torch.eye(5).double() - symmetric, N).T @ b
        yield "symmetric M", torch.allclose(ours, right), "Solve (I - M) v = b, then N^T v."
        yield "any M", torch.allclose(got, by_w.T @ b), "du/dw = (I - M)^-1 N, and the gradient is its transpose times b."


@exercise
def lambda_1(slope):
    """``slope(M, P, b, x, w)``: derivative in w of ``||u - x||^2 / 2``, ``(M + e^w P) u = b``; like ``w``."""
    for randn in draws():
        J, K, b, x, w = randn(8, 6), randn(7, 6), randn(6), randn(6), randn(1)[0]
        M, P = J.T @ J, K.T @ K

        def loss(w: Tensor, M: Tensor = M, P: Tensor = P, b: Tensor = b, x: Tensor = x) -> Tensor:
            return (torch.linalg.solve(M + w.exp() * P, b) - x).square().sum() / 2

        got, exact = slope(M, P, b, x, w), torch.func.grad(loss)(w)
        yield like(got, exact)
        yield "sign", got * exact > 0, "The prior's force is taken off: mind the minus."
        yield "derivative", torch.allclose(got, exact), f"Automatic differentiation gives {exact:.4f}: solve for q with H."


@exercise
def lambda_2(tolerance):
    """``tolerance(epsilon, gap, N, mu)``: the largest gradient norm at which the bound is at most epsilon."""
    for randn in draws():
        for epsilon, gap, N, mu in (randn(30, 4).abs() + 0.05).tolist():
            got = tolerance(epsilon, gap, N, mu)
            e = got / mu
            bound, case = (2 * gap * e + e * e) / N, f"epsilon {epsilon:.2f}, gap {gap:.2f}, N {N:.2f}, mu {mu:.2f}"
            yield "proves it", bound <= epsilon * (1 + 1e-9), f"{case}: the bound is {bound:.3f}; mind its square."
            yield "largest", bound >= epsilon * (1 - 1e-6), f"{case}: the bound is {bound:.3f}, more is allowed."


@exercise
def hthm_1(constant):
    """``constant(residual)``: the least C of HODL's Theorem 3.1 for squared residuals ``(K + 1, B)``, one number."""
    for randn in draws():
        k = torch.arange(1, 40, dtype=torch.float64)[:, None]
        bound, scale = (1 + (1 + k).log()).sqrt() / k**0.25, randn(5).abs() + 0.1
        exact = torch.cat([scale[None], scale * bound])
        got = torch.as_tensor(constant(exact))
        yield "one number", got.numel() == 1, "One C has to do for all omega: take the largest."
        yield (
            "attained",
            abs(got.item() - scale.max().item()) < 1e-9,
            "Here every residual of the worst omega meets its bound.",
        )
        early = exact.clone()
        early[0] *= 1e6
        yield "begins at 1", abs(float(constant(early)) - scale.max().item()) < 1e-9, "Row 0 is the start, before any step."
        noisy = exact * randn(40, 5).abs()
        quotient = (noisy[1:] / bound).max().item()
        yield "every step", abs(float(constant(noisy)) - quotient) < 1e-9 * quotient, "The worst step may be any."


@exercise
def hthm_2(factor):
    """``factor(alpha, rho, mu)``: by what a step of aHODL contracts if D contracts by rho and the upper slope is 0 at p."""
    for randn in draws():
        for alpha, rho, mu in torch.sigmoid(randn(30, 3)).tolist():
            q, attained = factor(alpha, rho, mu), mu + (1 - mu) * (1 + alpha * (rho - 1))  # D = rho I, constant loss
            case = f"alpha {alpha:.2f}, rho {rho:.2f}, mu {mu:.2f}"
            yield "proved", q >= attained - 1e-9, f"{case}: D = rho I contracts by {attained:.3f} only. What does mu do?"
            yield "best", q <= attained + 1e-9, f"{case}: a smaller factor is proved."
