"""Exercises of the PADNet part."""

from __future__ import annotations

import torch

from odlkit.check.base import blur_of, draws, exercise, like, problem_of
from odlkit.models.padnet import Constants, Explicit, Implicit, Schedule
from odlkit.operators import Identity
from odlkit.priors import Lp
from odlkit.problem import LeastSquares, Problem
from odlkit.propagate import propagate


@exercise
def padnet_1(iteration):
    """``iteration(f, network, v, nu, rho)``: ``(u, v, nu)`` after one pass of IPADNet (mu = 0), alpha = rho^(-1/2)."""
    for randn in draws():
        problem, v = problem_of(randn)
        f, schedule, nu, seen = problem.fidelity, Schedule(2.0, 1.5), 0 * v, [(v, 0.0)]

        def network(w, alpha, seen=seen):
            seen.append((w, alpha))
            return w - alpha * torch.tanh(w / alpha)

        state = propagate(Implicit(network, schedule), problem, v, steps=3).state
        for k in range(3):
            (rho, alpha), target = schedule(k), v - nu
            u, v, nu = iteration(f, network, v, nu, rho)
            yield like(u, v)
            yield "u is optimal", (f.grad(u) + rho * (u - target)).norm() < 1e-7, "u = prox_{f / rho}(v - nu): check signs."
            yield "calls the network at alpha", seen[-1][1] == alpha, "alpha = rho^(-1/2)."
            yield "dual is the network's move", torch.allclose(nu, seen[-1][0] - v), "nu+ = nu + u+ - v+ = w - N(w)."
        yield "equals odlkit", torch.allclose(v, state.x), "After three passes v differs: the network sees u+ + nu."


@exercise
def padnet_2(passes):
    """``passes(mu, tau, tolerance, L)``: whether kappa > 0 and the fallback v = x meets Condition 1 by itself."""
    for randn in draws():
        for mu, tau, tolerance, L in (randn(300, 4).abs() * torch.tensor([2.0, 1.0, 1.0, 0.5])).tolist():
            said, case = bool(passes(mu, tau, tolerance, L)), f"mu {mu:.2f}, tau {tau:.2f}, C_E {tolerance:.2f}, L {L:.2f}"
            falls, slope = Constants(mu, tau, tolerance).kappa > 0, mu - 1 / tau
            safe = tolerance >= max(abs(slope), abs(slope + L))
            yield "descent", falls or not said, f"{case}: mu - 1/(2 tau) - C_E is not positive."
            yield "fallback", safe or not said, f"{case}: C_E is below |mu - 1/tau| or |mu - 1/tau + L|."
            yield "not stricter", said or not (safe and falls), f"{case}: both conditions hold; why refuse?"


@exercise
def thm_1(make):
    """``make()``: a network ``(w, alpha) -> c w``, the number c may change at every call, with the orbit 2, 0, 2, 0 ..."""
    a = torch.full((1, 1, 1, 1), 2.5, dtype=torch.float64)
    toy, step = Problem(LeastSquares(Identity(), a, 0.4), Lp(0, 0.9)), Explicit([make()], Constants(0.1, 1.0, 0.04))
    trace = propagate(step, toy, 0 * a, steps=10, measure={"x": lambda s: s.x}).trace
    yield "every move is kept", trace.acceptance_rate() == 1, "Condition 1 refused one: e is not 0 there."
    orbit = trace["x"][:, 0] - torch.tensor([2.0, 0.0] * 5)
    yield "orbit 2, 0, 2, 0", orbit.abs().max() < 1e-6, "Odd calls should give 2, even calls 0."


@exercise
def thm_2(constant):
    """``constant(mu, tau, tolerance, convex)``: the best kappa that is proved for a convex prior, or for any."""
    for randn in draws():
        for mu, tau, tolerance in (randn(50, 3).abs() + 0.05).tolist():
            general, case = Constants(mu, tau, tolerance).kappa, f"mu {mu:.2f}, tau {tau:.2f}, C_E {tolerance:.2f}"
            got, best = constant(mu, tau, tolerance, True), max(general, mu / 2 - tolerance)
            yield "any prior", abs(constant(mu, tau, tolerance, False) - general) < 1e-9, f"{case}: expected {general:.3f}."
            yield "convex: proved", got <= best + 1e-9, f"{case}: {got:.3f} is more than is proved."
            yield "convex: best", got >= best - 1e-9, f"{case}: two constants hold; which is larger?"


@exercise
def deconv_1(noise_level):
    """``noise_level(y)``: the standard deviation of the white noise on a smooth picture ``(1, 1, H, W)``, as a number."""
    grid = torch.linspace(0, 6.28, 64, dtype=torch.float64)
    smooth = 0.5 + 0.2 * grid.sin()[:, None] * grid.cos() + 0.3 * (grid > 3)  # an edge is not noise
    for randn, sigma in zip(draws(), (0.005, 0.02, 0.1), strict=True):
        y = (smooth + sigma * randn(64, 64))[None, None]
        found, triple = float(noise_level(y)), float(noise_level(3 * y))
        yield "within 15%", abs(found / sigma - 1) < 0.15, f"It is {sigma}, found {found:.4f}: a median of fine details?"
        yield "scales with y", abs(triple - 3 * found) < 1e-6 * found, "Three times the picture has three times the noise."


@exercise
def deconv_3(discrepancy):
    """``discrepancy(A, x, y, sigma)``: ``||A x - y||^2 / (n sigma^2)``, one number an image, n values in each."""
    for randn in draws():
        A, x, sigma = blur_of(randn), randn(2, 1, 48, 48), float(randn(1).abs()) + 0.01
        exact = A.A(x)
        noisy = exact + sigma * randn(*x.shape)
        d = discrepancy(A, x, noisy, sigma)
        yield "one number an image", d.shape == (2,), f"Expected shape (2,), got {tuple(d.shape)}."
        yield "near 1 at the truth", ((d - 1).abs() < 0.15).all(), f"Got {d.tolist()}: divide by n sigma^2, n of one image."
        mixed = discrepancy(A, x, torch.stack([noisy[0], exact[1]]), sigma)
        yield "0 for exact data", mixed[1] < 1e-12, "The second image has no noise, the first one has: do not mix images."
