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
