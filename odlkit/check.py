"""Checkers for the book's exercises: properties on random inputs; the first that fails is named, with a hint.

The exercise labelled ``inv-ex-1`` is checked by ``odlkit.check.inv_1(your_function)``, whose docstring says what the
function takes and returns; tensors are ``(B, C, H, W)``.  It prints one line when every property holds and raises `NotYet`,
an ``AssertionError``, when one does not.  Passing says that no draw refuted a property, not that the function is proved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from odlkit.models import podm
from odlkit.models.padnet import Constants, Explicit, Implicit, Schedule
from odlkit.operators import Blur, Decimation, FilterBank, Gradient, Identity
from odlkit.priors import Lp, SparseBox
from odlkit.problem import LeastSquares, Problem, norm_items
from odlkit.propagate import propagate
from odlkit.solvers import HQS, GradientDescent, PlugAndPlay, ProximalGradient

Property = tuple[str, Any, str]  # name, whether it held, hint


class NotYet(AssertionError):
    """A property of an exercise's function does not hold yet."""


def exercise(properties: Callable[[Any], Iterator[Property]]) -> Callable[[Any], None]:
    """Make a checker of a generator of properties; an error inside the checked function fails the property *runs*."""
    label = properties.__name__

    @functools.wraps(properties)
    def checker(function: Any) -> None:
        held: dict[str, None] = {}
        try:
            for name, holds, hint in properties(function):
                if not bool(holds):
                    raise NotYet(f"{label}: {name}: not yet. {hint}")
                held[name] = None
        except NotYet:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise NotYet(f"{label}: runs: not yet. It raised {what} Expected {properties.__doc__}") from error
        print(f"{label} passed: {', '.join(held)}")

    return checker


def draws(count: int = 3) -> Iterator[Callable[..., Tensor]]:
    """``randn(*shape)`` in float64, from a few fixed seeds."""
    for seed in range(count):
        yield functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """``<a, b>`` over everything."""
    return (a * b).sum()


def like(result: Any, expected: Tensor) -> Property:
    """The result is a finite tensor of this shape, dtype and device."""
    got = f"{tuple(result.shape)} {result.dtype}" if isinstance(result, Tensor) else type(result).__name__
    fits = got == f"{tuple(expected.shape)} {expected.dtype}" and result.device == expected.device
    hint = f"Expected a finite tensor {tuple(expected.shape)} {expected.dtype}, got {got}."
    return "shape and dtype", fits and bool(result.isfinite().all()), hint


def blur_of(randn: Callable[..., Tensor]) -> Blur:
    """A well-conditioned blur whose kernel no reflection leaves as it is."""
    kernel = randn(3, 5).abs() + torch.arange(15).view(3, 5)
    kernel *= 0.5 / kernel.sum()
    kernel[1, 2] += 0.5
    return Blur(kernel)


def problem_of(randn: Callable[..., Tensor], p: float = 1) -> tuple[Problem, Tensor]:
    """``1.5 ||A x - y||^2 + 0.05 ||x||_p^p`` for two images of 8 x 10, and a start."""
    A = blur_of(randn)
    return Problem(LeastSquares(A, A.A(randn(2, 1, 8, 10)), 3.0), Lp(p, 0.05)), randn(2, 1, 8, 10)


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
