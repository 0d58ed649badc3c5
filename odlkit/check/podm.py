"""Exercises of the PODM part."""

from __future__ import annotations

import torch

from odlkit.check.base import blur_of, draws, exercise, like, problem_of
from odlkit.models import podm
from odlkit.models.padnet import Constants, Explicit
from odlkit.operators import Decimation, FilterBank, Identity
from odlkit.priors import Lp, SparseBox
from odlkit.problem import LeastSquares, Problem, norm_items


@exercise
def podm_1(psi):
    """``psi(f, H, x, x_f, x_g, mu, tau)``: PODM's optimality error, like ``x``; H, a function, is any symmetric map."""
    for randn in draws():
        problem, x = problem_of(randn)
        f, (mu, tau), x_f = problem.fidelity, (randn(2).abs() + 0.2).tolist(), randn(*x.shape)
        x_g, e = Explicit([], Constants(mu, tau, 1.0)).correct(problem, x, x_f)
        scalar = psi(f, lambda z, mu=mu: mu / 2 * z, x, x_f, x_g, mu, tau)
        yield like(scalar, x)
        yield "PADNet's error for H = mu I / 2", torch.allclose(scalar, e), "Count the factors 1/2 of mu."

        def H(z):
            return 0.7 * z - z.roll(1, -1) - z.roll(-1, -1)

        u = psi(f, H, x, x_f, x_g, mu, tau) - f.grad(x_g) - mu / 2 * (x_g - x) - H(x_g - x)
        gap = (u - 0.05 * x_g.sign())[x_g != 0].abs().max()
        yield "subgradient", gap < 1e-9, "psi - grad f(x_G) - (mu/2 I + H)(x_G - x) is no subgradient of R: where is H?"


@exercise
def podm_2(feedback):
    """``feedback(problem, x, x_g, psi, c, tau)``: the next iterates, x_G where (5) holds, else proximal gradient from x."""
    for randn in draws():
        problem, x = problem_of(randn)
        tau, x_g, c = 0.5 / problem.lipschitz, randn(*x.shape), 0.7
        back = problem.prox_prior(x - tau * problem.fidelity.grad(x), tau)
        small, large = 0.6 * (x_g - x), 0.8 * (x_g - x)
        kept = feedback(problem, x, x_g, small, c, tau)
        yield like(kept, x)
        yield "keeps x_G", torch.equal(kept, x_g), "||psi|| = 0.6 ||x_G - x|| and c = 0.7: keep it."
        fed = feedback(problem, x, x_g, large, c, tau)
        yield (
            "feeds back",
            torch.allclose(fed, back),
            "||psi|| = 0.8 ||x_G - x||: step from x, not from x_G.",
        )
        mixed = feedback(problem, x, x_g, torch.stack([10 * large[0], small[1]]), c, tau)
        yield "judges each image", torch.allclose(mixed, torch.stack([back[0], x_g[1]])), "One image is refused, one kept."
        lost = feedback(problem, x, x_g * torch.nan, small * torch.nan, c, tau)
        yield "refuses NaN", torch.allclose(lost, back), "A comparison with NaN is false: ask for <=, do not negate >."


@exercise
def podm_3(choose):
    """``choose(L)``: numbers ``(mu, tau, c, tau_0)`` for which both branches of PODM descend, H = mu I / 2."""
    for randn in draws():
        for L in (randn(20).abs() + 0.1).tolist():
            values = [float(value) for value in choose(L)]
            yield "four positive numbers", len(values) == 4 and min(values) > 0, f"L = {L:.2f}: got {values}."
            constants = podm.Constants(*values)
            kept, fed = constants.accepted(), constants.fed_back(L)
            yield "kept stages descend", kept > 0, f"L = {L:.2f}: mu - 1/(2 tau) - c = {kept:.3g} is not positive."
            yield "fed-back stages descend", fed > 0, f"L = {L:.2f}: 1/(2 tau_0) - L/2 = {fed:.3g} is not positive."
            yield "tolerant", constants.tolerance >= constants.penalty / 4, f"L = {L:.2f}: c is below mu / 4."


@exercise
def podm_thm_1(gap):
    """``gap(x_new, s, z, tau)``: an upper bound of ``F(x_new) - F(z)``, one an image; ``x_new`` left a prox of step tau."""
    for randn, p in zip(draws(), (0, 0.5, 1), strict=True):
        problem, x = problem_of(randn, p)
        for tau in (0.05, 0.3, 2.0, 1.0):
            if tau == 1:  # an l0 energy just above its threshold, where s is about 0 and a step to 0 still pays
                x = 1.01 * 0.1**0.5 * x.sign()
                problem = Problem(LeastSquares(Identity(), 0 * x, 1e-9), Lp(0, 0.05))
            new = problem.prox_prior(x, tau)
            s = problem.fidelity.grad(new) + (x - new) / tau
            for z in (x, new + 0.1 * randn(*x.shape), 0 * x):
                got, d = gap(new, s, z, tau), new - z
                yield like(got, problem.energy(new))
                above = problem.energy(new) - problem.energy(z)
                yield "bounds the gap", (got >= above - 1e-9).all(), "A nonconvex prior costs a square of the distance."
                most = norm_items(s) * norm_items(d) + norm_items(d) ** 2 / (2 * tau)
                yield "not too large", (got <= most * (1 + 1e-9)).all(), "It is <s, d> + ||d||^2 / (2 tau), d = x_new - z."


@exercise
def sr_1(propagate_plain):
    """``propagate_plain(S, y, x_a, mu)``: ``argmin_z ||S z - y||^2 + (mu / 2) ||z - x_a||^2`` for plain decimation S."""
    for randn in draws():
        S, x_a, y, mu = Decimation(2), randn(2, 1, 8, 6), randn(2, 1, 4, 3), float(randn(1).abs()) + 0.1
        z = propagate_plain(S, y, x_a, mu)
        yield like(z, x_a)
        slope = 2 * S.A_adjoint(S.A(z) - y) + mu * (z - x_a)
        yield "zero gradient", slope.abs().max() < 1e-9, "2 S^T (S z - y) + mu (z - x_a) is not zero."


@exercise
def sr_3(unseen):
    """``unseen(A, x)``: the projection of ``x`` onto what A maps to 0, for ``A A^T = I``; like ``x``."""
    for randn in draws():
        A, x = Decimation(3), randn(2, 1, 9, 12)
        u, w = unseen(A, x), randn(2, 1, 9, 12)
        yield like(u, x)
        yield "the data do not see it", A.A(u).abs().max() < 1e-12, "A of the result is not zero."
        w = w - A.A_adjoint(A.A(w))
        yield "keeps what is hidden", (unseen(A, w) - w).abs().max() < 1e-12, "Where A x = 0, all of x is unseen."


@exercise
def rpodm_1(project):
    """``project(u, low, high, s)``: the nearest point with ``low <= x <= high`` and at most s nonzeros in each image."""
    for randn in draws():
        u = 2 * randn(2, 1, 3, 4)
        for low, high, s in ((-0.1, 1.0, 3), (-2.0, 0.5, 1), (0.0, 1.0, 12)):
            x = project(u, low, high, s)
            yield like(x, u)
            yield "inside the box", x.min() >= low and x.max() <= high, f"Some value is not in [{low}, {high}]."
            few = ((x != 0).flatten(1).sum(1) <= s).all()
            yield "at most s nonzeros", few, f"Some image has more than {s}."
            gap = norm_items(x - u) - norm_items(SparseBox(low, high, s).prox(u, 1.0) - u)
            yield "nearest", (gap < 1e-12).all(), "Another point is nearer: compare what each kept pixel gains."


@exercise
def rpodm_3(trust):
    """``trust(K, W, mu, x)``: the share of x_A in x_F for ``f = ||K u - y||^2``, on the half-plane of frequencies."""
    for randn in draws():
        K, x, y, mu = blur_of(randn), randn(2, 1, 8, 10), randn(2, 1, 8, 10), 0.3 + randn(1).abs().item()
        W = FilterBank(randn(2, 3, 3))
        t = trust(K, W, mu, x)
        yield like(t, K.gram(x))
        yield "between 0 and 1", t.min() >= 0 and t.max() <= 1, "It is a share: what is divided by the whole?"
        mixed = t * torch.fft.rfft2(x) + (1 - t) * torch.fft.rfft2(y) / K.spectrum(x)
        x_f = torch.fft.irfft2(mixed, s=x.shape[-2:])
        exact = LeastSquares(K, y, 2.0).nearest(x, mu, W)
        yield "mixes to x_F", (x_f - exact).abs().max() < 1e-9, "The mixture is not the minimiser: check factors."
