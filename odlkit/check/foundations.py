"""Exercises of the foundations."""

from __future__ import annotations

import torch

from odlkit.check.base import blur_of, draws, exercise, inner, like, problem_of
from odlkit.operators import Decimation, Gradient
from odlkit.priors import Lp
from odlkit.problem import Problem, norm_items
from odlkit.propagate import propagate
from odlkit.solvers import HQS, GradientDescent, PlugAndPlay, ProximalGradient


@exercise
def inv_1(adjoint):
    """``adjoint(v, K, S)``: the adjoint of ``S K``, blur K then decimation S, at ``v``."""
    for randn in draws():
        K, S, u, v = blur_of(randn), Decimation(2), randn(2, 1, 8, 12), randn(2, 1, 4, 6)
        back = adjoint(v, K, S)
        yield like(back, u)
        gap = (inner(S.A(K.A(u)), v) - inner(u, back)).abs() / (u.norm() * v.norm())
        yield "adjoint identity", gap < 1e-12, "<S K u, v> and <u, adjoint(v)> differ: adjoints reverse the order."
        yield like(adjoint(v.float(), K, S), u.float())


@exercise
def inv_5(tikhonov):
    """``tikhonov(A, y, weight)``: the minimiser of ``||A x - y||^2 / 2 + (weight / 2) ||D x||^2``, D = Gradient()."""
    for randn in draws():
        A, D, y = blur_of(randn), Gradient(), randn(2, 1, 8, 10)
        for weight in (0.01, 2.0):
            x = tikhonov(A, y, weight)
            yield like(x, y)
            slope = A.A_adjoint(A.A(x) - y) + weight * D.A_adjoint(D.A(x))
            yield "zero gradient", slope.norm() < 1e-7 * y.norm(), "A^T (A x - y) + weight D^T D x is not 0 at your x."


@exercise
def prox_1(prox):
    """``prox(z, weight, step)``: the proximal map of ``(weight / 2) ||x||^2``."""
    for randn in draws():
        z, w, weight, step = randn(2, 1, 6, 6), randn(2, 1, 6, 6), *(randn(2).abs() + 0.1).tolist()
        p, q = prox(z, weight, step), prox(w, weight, step)
        yield like(p, z)
        yield "firmly non-expansive", inner(p - q, p - q) <= inner(p - q, z - w), "It stretches some distance."
        moved = [p, *(p + t * randn(*p.shape) for t in (1e-4, 1e-2, 1.0) for _ in range(5))]
        best, *others = (weight / 2 * norm_items(x) ** 2 + norm_items(x - z) ** 2 / (2 * step) for x in moved)
        yield "minimiser", all((e >= best).all() for e in others), "A random move lowers the energy of the map."


@exercise
def prox_4(asymmetry):
    """``asymmetry(N, z)``: a number, 0 (to 1e-6) where the Jacobian of ``N`` at ``z`` is symmetric, else above 1e-3."""
    for randn in draws():
        z, M = randn(1, 1, 4, 4), randn(16, 16) / 4
        symmetric, skew = ((lambda x, m=m: (m @ x.flatten()).view_as(x)) for m in (M + M.T, M - M.T))
        yield "symmetric maps give 0", abs(asymmetry(symmetric, z)) < 1e-6, "N(x) = (M + M^T) x: <J a, b> = <a, J b>."
        yield "proximal maps give 0", abs(asymmetry(torch.tanh, z)) < 1e-6, "tanh acts pixel by pixel: its J is diagonal."
        yield "rotations are seen", abs(asymmetry(skew, z)) > 1e-3, "N(x) = (M - M^T) x is no gradient."
        curved = asymmetry(lambda x: x * x.roll(1, -1), z)
        yield "nonlinear maps are seen", abs(curved) > 1e-3, "N(x) = x roll(x): take J at z."


@exercise
def solvers_1(step):
    """``step()``: a step for `propagate`: gradient descent on ``f + 0.005 ||D x||^2``, step size from the problem's L."""
    for randn in draws():
        problem, x0 = problem_of(randn)
        f, D = problem.fidelity, Gradient()

        def energy(state, f=f, D=D):
            return f.value(state.x) + 0.005 * norm_items(D.A(state.x)) ** 2

        run = propagate(step(), Problem(f), x0, steps=400, measure={"F": energy}, raises=False)
        yield "descent", (run.trace["F"].diff(dim=0) <= 1e-12 * run.trace["F"][0]).all(), "Check tau and the gradient."
        yield "keeps moving", run.iterations > 9, "It stood still: return state.next(x) with a new x."
        slope = f.grad(run.x) + 0.01 * D.A_adjoint(D.A(run.x))
        yield "minimiser", slope.norm() < 1e-6 * x0.norm(), "It moves too slowly, or down another energy."


@exercise
def solvers_3(admm):
    """``admm(problem, x0, rho, steps)``: ``(u, v, nu)`` after so many ADMM iterations from v = x0, nu = 0."""
    for randn in draws():
        problem, x0 = problem_of(randn)
        best = propagate(ProximalGradient(), problem, x0, steps=600).trace["energy"][-1]
        for rho in (0.5, 3.0):
            u, v, nu = admm(problem, x0, rho, 300)
            yield like(v, x0)
            yield "copies agree", (u - v).norm() < 1e-5 * v.norm(), "u - v does not go to 0: nu adds up the disagreement."
            force = problem.fidelity.grad(u)
            yield "rho nu = -grad f(u)", (rho * nu + force).norm() < 1e-4, "Check signs and factors: u uses v - nu."
            yield "minimum", (problem.energy(v) <= best * (1 + 1e-6)).all(), "The limit is that of another energy."


@exercise
def pnp_1(denoiser):
    """``denoiser(prior)``: a function ``(v, alpha)`` with which plug-and-play is HQS for that prior; alpha = rho^(-1/2)."""
    for randn in draws():
        problem, x0 = problem_of(randn)
        for rho, growth in ((0.2, 1.0), (1.0, 1.5)):
            ours = propagate(PlugAndPlay(denoiser(problem.prior), rho, growth), problem, x0, steps=8).x
            yield like(ours, x0)
            same = torch.allclose(ours, propagate(HQS(rho, growth), problem, x0, steps=8).x)
            yield "equals HQS", same, "HQS takes the proximal step 1 / rho, which is alpha^2."


@exercise
def pnp_2(gate):
    """``gate(problem, x, v)``: per image, v if ``F(v) <= F(x)``, else a proximal-gradient step from x with step 0.99 / L."""
    for randn, p in zip(draws(), (1, 0.5, 0), strict=True):
        problem, x = problem_of(randn, p)
        good, safe = (propagate(ProximalGradient(), problem, x, steps=steps).x for steps in (20, 1))
        bad = x + 10 * randn(*x.shape)
        yield like(gate(problem, x, bad), x)
        yield "keeps a good proposal", torch.equal(gate(problem, x, good), good), "F(v) <= F(x): v itself should come back."
        yield "falls back", torch.allclose(gate(problem, x, bad), safe), "F(v) > F(x): expected the proximal-gradient step."
        one = torch.allclose(gate(problem, x, torch.stack([good[0], bad[1]])), torch.stack([good[0], safe[1]]))
        yield "judges each image", one, "One bad image must not spoil the other."
        yield "refuses NaN", torch.allclose(gate(problem, x, bad * torch.nan), safe), "NaN is not <= F(x): do not ask for >."


@exercise
def cert_1(largest):
    """``largest(problem, x0)``: the largest multiple of 1/L, to two digits, with which f falls at every gradient step."""
    for randn in draws():
        problem, x0 = problem_of(randn)
        factor = float(largest(Problem(problem.fidelity, Lp(1, 0.0)), x0))
        yield "not too long", factor < 2.03, f"At {factor:.2f} / L the energy rises, if you wait: take 200 steps."
        yield "not too short", factor > 1.97, f"{factor:.2f} / L is not the limit. Is your unit the problem's own 1/L?"


@exercise
def cert_2(certificate):
    """``certificate(trace, kappa)``: whether ``F(x^k) - F(x^{k+1}) >= kappa ||x^{k+1} - x^k||^2`` for all k and images."""
    for randn in draws():
        problem, x0 = problem_of(randn)
        smooth, kappa = Problem(problem.fidelity, Lp(1, 0.0)), problem.lipschitz / 2
        short, long = (propagate(GradientDescent(), smooth, x0, steps=steps).trace for steps in (12, 600))
        yield "accepts a true run", certificate(short, kappa), "The inequality holds on it."
        yield "forgives round-off", certificate(long, kappa), "Energies agree to 15 digits: allow about 1e-13 of the first."
        yield "uses kappa", not certificate(short, 20 * kappa), "No run has 20 times that decrease."
        last = short.rows[-1]["energy"]
        for value, name in ((1.001, "sees a raised energy"), (torch.nan, "sees NaN"), (torch.inf, "sees infinity")):
            short.rows[-1]["energy"] = torch.stack([last[0], value * short.start["energy"][1]])
            yield name, not certificate(short, kappa), "The last energy of the second image is false, and it passed."
