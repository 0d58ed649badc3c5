"""Exercises of the GDC part."""

from __future__ import annotations

import functools

import torch

from odlkit.check.base import blur_of, draws, exercise, like
from odlkit.operators import Identity
from odlkit.problem import LeastSquares, norm_items


@exercise
def gdc_an_1(norm):
    """``norm(w, size)``: the norm of circular convolution with w (C_out, C_in, h, h) on size x size images, a number."""
    for randn, size in zip(draws(), (5, 6, 7), strict=True):
        w = randn(3, 2, 3, 3)
        got, symbol = float(norm(w, size)), torch.fft.fft2(w, s=(size, size)).permute(2, 3, 0, 1)
        best = torch.linalg.matrix_norm(symbol, 2).max().item()
        yield "no image gains more", got >= best * (1 - 1e-9), f"Some image gains {best:.3f}, not {got:.3f}."
        yield "some image gains as much", got <= best * (1 + 1e-9), f"{got:.3f} is a bound; the largest gain is {best:.3f}."


@exercise
def gdc_an_2(steps):
    """``steps(P, m, L)``: the open interval (low, high) of steps with ``P max(|1 - tau m|, |1 - tau L|) < 1``; or None."""
    for randn in draws():
        for more, m, wider in (randn(60, 3).abs() + 0.05).tolist():
            P, L = 1 + more, m * (1 + wider)
            said, case = steps(P, m, L), f"P {P:.2f}, m {m:.2f}, L {L:.2f}"
            none = (L + m) / (L - m) <= P
            yield "says when none works", (said is None) == none, f"{case}: some step contracts iff P < (L + m)/(L - m)."
            if said is not None:
                low, high = said
                ends = [P * max(abs(1 - tau * m), abs(1 - tau * L)) for tau in (low, high)]
                yield "contracts inside", max(ends) <= 1 + 1e-9, f"{case}: near an end the factor is {max(ends):.3f}."
                yield "not shorter", min(ends) >= 1 - 1e-9, f"{case}: beyond an end the factor is still {min(ends):.3f}."


@exercise
def gdc_1(direction):
    """``direction(d, x)``: minus the gradient of each picture's ``d(x)``, which is ``(B,)``; like ``x``."""
    for randn in draws():
        weight, x = randn(1, 1, 4, 5).abs(), randn(3, 1, 4, 5)
        with torch.no_grad():
            got = direction(lambda v, weight=weight: (weight * v.square()).flatten(1).sum(1) / 2, x)
        yield like(got, x)
        yield (
            "each picture's own gradient",
            (got + weight * x).abs().max() < 1e-9,
            "Mind the sign, and sum the batch.",
        )
        yield "its argument is left alone", not x.requires_grad, "x requires a gradient now: detach it first."


@exercise
def gdc_2(ideal):
    """``ideal(x, s, alpha, q)``: ``G`` and ``D`` for ``p = N(0, s^2)`` and q corrupted pictures for each clean one."""
    for randn in draws():
        x, (s, alpha, q) = randn(2, 1, 3, 3), (randn(3).abs() + 0.3).tolist()
        (G, D), (_, other) = ideal(x, s, alpha, q), ideal(x, s, alpha, 2 * q)
        yield like(G, x)
        wide = s**2 + alpha**2
        yield "Tweedie's formula", (G + alpha**2 * x / wide).abs().max() < 1e-9, "p_alpha is N(0, s^2 + alpha^2)."
        yield "numbers do not matter", (D - other).abs().max() < 1e-9, "q adds a constant to the logit."
        yield (
            "sum of both",
            (G + alpha**2 * (D + x / s**2)).abs().max() < 1e-9,
            "It should be alpha^2 grad log p.",
        )


@exercise
def gdc_pcm_1(step):
    """``step(f, T, x, rho, M, c)``: one iteration of Algorithm 2 with the clip, for the modules T; like ``x``."""
    for randn in draws():
        x, y, (rho, c) = randn(2, 1, 6, 6), randn(2, 1, 6, 6), (randn(2).abs() + 0.5).tolist()
        f, push, M = LeastSquares(Identity(), y, 2.0), randn(1, 1, 6, 6), 60.0
        near, far = functools.partial(torch.add, 1e-3 * push), functools.partial(torch.add, 10 * push)
        got = step(f, near, x, rho, 1e9, c)
        yield like(got, x)
        yield "short moves are kept", (got - f.prox(near(x), 1 / rho)).abs().max() < 1e-9, "They are not scaled."
        yield "closed gate", torch.equal(step(f, far, x, rho, 0.0, c), x), "With M = 0 every proposal is rejected."
        mixed = torch.cat([x[:1], 100 + x[1:]])  # the second gradient is beyond M
        both, parts = step(f, far, mixed, rho, M, c), [LeastSquares(Identity(), part, 2.0) for part in y.split(1)]
        alone = torch.cat([step(g, far, z, rho, M, c) for g, z in zip(parts, mixed.split(1), strict=True)])
        yield "each picture by itself", (both - alone).abs().max() < 1e-9, "One picture's gate must not close another's."
        leap = norm_items(step(f, far, x, 1e3, 1e9, c) - x)
        radius = (c / 1e3) ** 0.5
        bound = radius + (norm_items(f.grad(x)) + 2 * radius) / 1e3  # the data step moves by |grad f| / rho
        yield "bounded step", (leap <= bound * (1 + 1e-9)).all(), "Clip the move of T to sqrt(c / rho)."


@exercise
def gdc_pcm_2(constant):
    """``constant(tau, L, convex)``: the best kappa of Algorithm 1's last step, for a convex prior or for any."""
    for randn in draws():
        for tau, L in (randn(50, 2).abs() + 0.05).tolist():
            general, best, case = (1 / tau - L) / 2, 1 / tau - L / 2, f"tau {tau:.2f}, L {L:.2f}"
            yield "any prior", abs(constant(tau, L, False) - general) < 1e-9, f"{case}: expected {general:.3f}."
            yield "convex: proved", constant(tau, L, True) <= best + 1e-9, f"{case}: this is more than is proved."
            yield "convex: best", constant(tau, L, True) >= best - 1e-9, f"{case}: the prox objective is strongly convex."


@exercise
def gdc_joint_1(sweep):
    """``sweep(stages, x0, p)``: the list ``p^0, ..., p^T``: ``p^T = p``, ``p^t`` = (Jacobian of T_t at x^t)^T p^(t+1)."""
    for randn in draws():
        A, b, x0, p = blur_of(randn), randn(2, 1, 8, 10), randn(2, 1, 8, 10), randn(2, 1, 8, 10)
        stages = [lambda x, b=b: x + b * x.square(), torch.tanh, A.A]
        got = list(sweep(stages, x0, p))
        yield "one more than stages", len(got) == 4, f"Expected p^0 to p^3, got {len(got)} of them."
        yield like(got[0], x0)
        yield "ends with p", torch.equal(got[-1], p), "The list is in the order of the stages: p^T stands last."
        yield "adjoint of the last stage", torch.allclose(got[2], A.A_adjoint(p)), "The sweep begins at the last stage."
        u = x0 + b * x0.square()  # x^1
        own = (1 - u.tanh().square()) * got[2]
        yield "each at its own picture", torch.allclose(got[1], own), "The Jacobian of T_t belongs at x^t, not at x^0."


@exercise
def gdc_joint_2(gain):
    """``gain(a, sigma, rho)``: the factor g of least mean ``(g z - x)^2``, z the data step of ``y = a x + n`` from 0."""
    for randn in draws():
        for a, sigma, rho in (randn(30, 3).abs() + 0.05).tolist():
            exact, case = gain(a, sigma, 2 * sigma**2), f"a {a:.2f}, sigma {sigma:.2f}, rho {rho:.2f}"
            yield "1 where rho = 2 sigma^2", abs(exact - 1) < 1e-9, "There the data step is the posterior mean by itself."
            g, k = gain(a, sigma, rho), 2 * a / (2 * a**2 + rho)
            slope = k**2 * g * (a**2 + sigma**2) - k * a
            yield "least error", abs(slope) < 1e-9 * (1 + k**2), f"{case}: the derivative of the error is {slope:.2g} there."


@exercise
def gdc_tasks_1(data_step):
    """``data_step(v, y, mask, rho)``: ``argmin_u ||mask u - y||^2 + (rho / 2) ||u - v||^2``, y unused where mask is 0."""
    for randn in draws():
        v, y, mask, rho = randn(2, 3, 6, 8), randn(2, 3, 6, 8), (randn(2, 1, 6, 8) > 0).double(), randn(1).abs().item() + 0.1
        u = data_step(v, y, mask, rho)
        yield like(u, v)
        yield "unknown pixels keep v", ((1 - mask) * (u - v)).abs().max() < 1e-12, "There the data say nothing."
        slope = 2 * mask * (u - y) + rho * (u - v)
        yield "zero gradient", slope.abs().max() < 1e-9, "2 mask (u - y) + rho (u - v) is not zero: count the factor 2."


@exercise
def gdc_tasks_2(removed):
    """``removed(x, y, edges, texture)``: the share of y's texture gone in x, not counting a lower contrast; a number."""
    for randn in draws():
        y, edges, texture = randn(1, 1, 12, 10), torch.zeros(1, 1, 12, 10).double(), torch.zeros(1, 1, 12, 10).double()
        edges[..., :4, :], texture[..., 5:11, :] = 1, 1
        yield "unchanged picture gives 0", abs(removed(y, y, edges, texture)) < 1e-9, "Nothing was removed."
        pale = 0.2 + (0.3 + randn(1).abs()) * y
        yield "contrast alone gives 0", abs(removed(pale, y, edges, texture)) < 1e-9, "Compare with what the edges keep."
        flat = torch.cat([y[..., :4, :], torch.full_like(y[..., 4:, :], 0.5)], 2)
        yield "flat texture gives 1", abs(removed(flat, y, edges, texture) - 1) < 1e-9, "All texture is gone there."
