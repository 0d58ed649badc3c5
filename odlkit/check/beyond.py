"""Exercises beyond vision."""

from __future__ import annotations

import functools

import torch

from odlkit.check.base import draws, exercise, like


@exercise
def gan_1(ahead):
    """``ahead(step, upper, w, u, K)``: gradient in w of ``upper(u^K, w)``, ``u^0 = u``, ``u^{k+1} = step(u^k, w)``."""
    for randn in draws():
        M, N, c, w, u = randn(4, 4), randn(4, 3), randn(4), randn(3), randn(4)
        step = functools.partial(lambda M, N, u, w: u - 0.3 * torch.tanh(M @ u + N @ w), M, N)
        upper = functools.partial(lambda c, u, w: (c * u).sum() + u[:3] @ w + w.square().sum(), c)
        for K in (0, 1, 4):

            def phi(v: torch.Tensor, K: int = K, u: torch.Tensor = u, step=step, upper=upper) -> torch.Tensor:
                for _ in range(K):
                    u = step(u, v)
                return upper(u, v)

            got = ahead(step, upper, w, u, K)
            yield like(got, w)
            slope = torch.stack([phi(w + 1e-5 * e) - phi(w - 1e-5 * e) for e in torch.eye(3).double()]) / 2e-5
            name = "derivative" if K else "K = 0"
            yield name, torch.allclose(got, slope, atol=1e-6), f"K = {K}: a finite difference of the whole of phi differs."


@exercise
def gan_2(matrix):
    """``matrix(a, gamma, eta, K)``: of one round on (u, w), (2, 2): ``u' = (1 - a) u + gamma w``, w looks K steps ahead."""
    for randn in draws():
        for K in (0, 1, 4):
            a, gamma, eta = (0.3 * randn(3).sigmoid()).tolist()
            got = matrix(a, gamma, eta, K)
            yield like(got, randn(2, 2))
            u, w = randn(2).unbind()
            new = (1 - a) * u + gamma * w
            v = w.clone().requires_grad_()
            far = new
            for _ in range(K):
                far = (1 - a) * far + gamma * v
            (slope,) = torch.autograd.grad(v * far, v)
            round_ = torch.stack([new, w - eta * slope])
            name = "look ahead" if K else "no look ahead"
            hint = (
                f"a = {a:.2f}, K = {K}: played by hand, the round ends elsewhere; every step of u is lazy, also the first."
            )
            yield name, torch.allclose(got @ torch.stack([u, w]), round_), hint


@exercise
def clean_1(implicit):
    """``implicit(slopes, H, b, w)``: gradient (n,) by the logits w of the samples' weights, at the lower minimiser."""
    for randn in draws():
        A, y, t, w, ridge = randn(6, 3), randn(6), randn(3), randn(6), 0.1

        def minimiser(v: torch.Tensor, A=A, y=y, ridge=ridge) -> tuple[torch.Tensor, torch.Tensor]:
            s = v.sigmoid()[:, None]
            H = (s * A).T @ A / 6 + ridge * torch.eye(3).double()
            return torch.linalg.solve(H, (s * A).T @ y / 6), H

        u, H = minimiser(w)
        got = implicit((A @ u - y)[:, None] * A, H, u - t, w)
        yield like(got, w)
        ends = [[(minimiser(w + h * e)[0] - t).square().sum() / 2 for h in (1e-5, -1e-5)] for e in torch.eye(6).double()]
        slope = torch.stack([(a - b) / 2e-5 for a, b in ends])
        yield "descent", (got * slope).sum() > 0, "A step against it makes the upper loss larger: look at the sign."
        yield "derivative", torch.allclose(got, slope, atol=1e-6), "A finite difference of the upper loss differs."


@exercise
def clean_2(blind):
    """``blind(c)``: the largest F1 that flagging at random reaches, entry by entry, where a share c is wrong."""
    for randn in draws():
        c = randn(20).sigmoid()
        got = blind(c)
        yield like(got, c)
        q = torch.linspace(0.01, 1, 100).double()[:, None]
        reached = 1 / ((1 / c + 1 / q) / 2)  # harmonic mean of precision c and recall q
        yield "no rule is better", (got >= reached.amax(0) - 1e-9).all(), "Some other share of flags has a larger F1."
        yield "a rule reaches it", (got <= reached.amax(0) + 1e-9).all(), "No share of flags has such an F1."
