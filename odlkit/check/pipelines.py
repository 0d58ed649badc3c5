"""Exercises of the harder pipelines."""

from __future__ import annotations

import torch

from odlkit.check.base import draws, exercise, like


@exercise
def haze_1(bound):
    """``bound(y, a, low, high)``: the least t (B, 1, H, W) for which ``(y - a) / t + a`` lies in [low, high] everywhere."""
    for randn in draws():
        low, high, a = 0.1, 1.1, 0.6 + 0.3 * randn(1, 3, 1, 1).sigmoid()
        x, t = low + (high - low) * randn(2, 3, 6, 8).sigmoid(), 0.1 + 0.9 * randn(2, 1, 6, 8).sigmoid()
        y = t * x + (1 - t) * a
        got = bound(y, a, low, high)
        yield like(got, t)
        fits, less = ((y - a) / got + a, (y - a) / (0.99 * got) + a)
        inside = ((fits > low - 1e-9) & (fits < high + 1e-9)).all()
        yield "the scene fits", inside, "With this t some channel leaves [low, high]; it has two ends."
        out = ((less < low) | (less > high)).any(1).all()
        yield "no smaller t does", out, "A t that is 1% smaller still fits at some pixel."


@exercise
def haze_2(bound):
    """``bound(y, a, w, low)``: the least t (B, 1, H, W) for which ``(y - a) / t^w + a >= low``, w and a (1, 3, 1, 1)."""
    for randn in draws():
        low, a, w = 0.1, 0.7 + 0.2 * randn(1, 3, 1, 1).sigmoid(), torch.tensor([1.2, 1.6, 2.0]).double().view(1, 3, 1, 1)
        x, t = low + (1 - low) * randn(2, 3, 6, 8).sigmoid(), 0.1 + 0.9 * randn(2, 1, 6, 8).sigmoid()
        x[..., :1] = 0.15  # a dark column, and a bright one that bounds nothing
        x[..., 1:2] = 1.0
        y = t**w * x + (1 - t**w) * a
        got = bound(y, a, w, low)
        yield like(got, t)
        yield "a bound", (got <= t + 1e-9).all(), "The true t is smaller somewhere."
        dark = ((y - a) / got**w + a)[..., :1]
        yield "the best one", (dark.amin(1) - low).abs().max() < 1e-9, "At a dark pixel a larger t is still a bound."


@exercise
def blind_1(project):
    """``project(v)``: the nearest point of the simplex, entries at least 0 with sum 1, to ``v`` of any shape."""
    for randn in draws():
        v = randn(5, 7)
        got = project(v)
        yield like(got, v)
        yield "no negative entry", got.min() >= -1e-12, "An entry is negative."
        yield "sum 1", abs(got.sum() - 1) < 1e-9, f"The entries sum to {got.sum():.4f}."
        others = torch.eye(35, dtype=v.dtype).view(35, 5, 7)  # the corners
        nearest = ((v - got) * (others - got)).sum((1, 2)).max() < 1e-9
        yield "nearest", nearest, "Some corner of the simplex makes an acute angle with v at this point: move towards it."


@exercise
def blind_2(kernel):
    """``kernel(g, d, mu)``: the minimiser (H, W) of ``||k * g - d||^2 / 2 + mu ||k||^2``, ``*`` circular, g (1, C, H, W)."""
    for randn in draws():
        g, k, mu = randn(1, 2, 6, 9), randn(6, 9), 0.3
        blurred = torch.fft.ifft2(torch.fft.fft2(k) * torch.fft.fft2(g)).real
        d = blurred + 0.1 * randn(1, 2, 6, 9)
        got = kernel(g, d, mu)
        yield like(got, k)
        exact = (kernel(g, blurred, 1e-12) - k).abs().max() < 1e-6
        yield "exact without noise", exact, "Without noise and with mu near 0 the true kernel should come back."
        rest = torch.fft.fft2(torch.fft.ifft2(torch.fft.fft2(got) * torch.fft.fft2(g)).real - d)
        slope = torch.fft.ifft2((torch.fft.fft2(g).conj() * rest).sum((0, 1))).real + 2 * mu * got
        yield "zero gradient", slope.abs().max() < 1e-8, "The gradient of the energy does not vanish at this kernel."


@exercise
def rain_1(pair):
    """``pair(b, p, q, t)``: the (u_b, u_r), u_r >= 0, least in ``(u_b + u_r - b)^2 + t (u_b - p)^2 + t (u_r - q)^2``."""
    for randn in draws():
        b, p, q, t = randn(2, 3, 5), randn(2, 3, 5), randn(2, 3, 5), 0.7
        u_b, u_r = pair(b, p, q, t)
        yield like(u_b, b)
        yield like(u_r, b)
        yield "only light", u_r.min() >= 0, "Some u_r is negative."
        miss = u_b + u_r - b
        flat = (miss + t * (u_b - p)).abs().max() < 1e-9
        yield "u_b is best for its u_r", flat, "The slope in u_b does not vanish: it has to follow where u_r was changed."
        slope = miss + t * (u_r - q)
        best = (torch.where(u_r > 0, slope.abs(), (-slope).clamp(min=0))).max() < 1e-9
        yield "u_r is best", best, "The slope in u_r has to vanish where u_r > 0, and to be at least 0 where u_r = 0."


@exercise
def rain_2(constant):
    """``constant(L_b, L_r)``: that of ``(u_b, u_r) -> (N_b(u_r), N_r(N_b(u_r), u_r))``, the networks having L_b and L_r."""
    for randn in draws():
        for L_b, L_r in ((1.0, 1.0), (0.5, 2.0), (float(randn(1).abs()), float(randn(1).abs()))):
            got, most = constant(L_b, L_r), 0.0
            for pull in torch.linspace(0, 1, 41).double().tolist():  # N_r = L_r (pull u_b + (1 - pull^2)^(1/2) u_r)
                rain = L_r * (pull * L_b + (1 - pull**2) ** 0.5)
                most = max(most, (L_b**2 + rain**2) ** 0.5)
            yield "a bound", got >= most - 1e-9, f"Linear networks with {L_b:.3g} and {L_r:.3g} reach {most:.4f}."
            yield "reached", got <= most + 1e-3 * (1 + most), f"No pair with {L_b:.3g} and {L_r:.3g} reaches {got:.4f}."


@exercise
def light_1(mix):
    """``mix(z, maps, a)``: ``sum_i softmax(a)_i maps_i(z)`` for a list of maps and ``a`` (count,), of the shape of ``z``."""
    for randn in draws():
        z, v, a = randn(2, 3, 6, 8), randn(2, 3, 6, 8), 2 * randn(3)
        turns = [lambda t: t, lambda t: t.flip(-1), lambda t: t.roll(1, -2)]
        got = mix(z, turns, a)
        yield like(got, z)
        hint = "Equal maps should mix to that map, so the shares must sum to 1."
        yield "shares sum to 1", (mix(z, [turns[1]] * 3, a) - turns[1](z)).abs().max() < 1e-9, hint
        apart = (got - mix(v, turns, a)).norm() / (z - v).norm()
        yield "non-expansive", apart <= 1 + 1e-9, f"Two inputs come out {apart:.2f} times as far apart: is a share negative?"
        first = mix(z, turns, torch.tensor([30.0, 0, 0]).to(z))
        yield "a large entry wins", (first - z).abs().max() < 1e-6, "With a = (30, 0, 0) the first map alone should be left."


@exercise
def light_2(best):
    """``best(w)``: ``(tau, factor)``, the step for which ``u - 2 tau w (u - phi)`` contracts most, for w (H, W) > 0."""
    for randn in draws():
        w = 0.2 + randn(5, 7).abs()
        tau, factor = (torch.as_tensor(part).item() for part in best(w))
        steep = lambda t: (1 - 2 * t * w).abs().max().item()  # noqa: E731, B023
        yield "a contraction", 0 < steep(tau) < 1, f"With this step a distance can grow by {steep(tau):.3f}."
        yield "its factor", abs(factor - steep(tau)) < 1e-9, f"The factor of this step is {steep(tau):.4f}."
        other = min(steep(tau * (1 + s)) for s in (-0.1, -0.01, 0.01, 0.1))
        yield "no other step is better", other >= factor - 1e-9, f"A step nearby has the factor {other:.4f}."


@exercise
def search_1(kept):
    """``kept(a, targets)``: for each node in rising order ``(edge, operator)`` of the largest share of ``softmax(a)``."""
    for randn in draws():
        targets = [1, 2, 2, 3, 3, 3]
        a, fair = randn(6, 5), True
        got = kept(a, targets)
        yield "one edge a node", [targets[e] for e, _ in got] == [1, 2, 3], "Expected one edge into each of nodes 1, 2, 3."
        p = a.softmax(1)
        strongest = all(p[e, k] == p[[t == targets[e] for t in targets]].max() for e, k in got)
        yield "the largest share", strongest, "Some edge into the same node has an operator with a larger share."
        for e in range(6):
            shifted = a.clone()
            shifted[e] += 9
            fair = fair and kept(shifted, targets) == got
        yield "shares only", fair, "A constant added to a row changes no share, and here it changes the choice."


@exercise
def search_2(gradient):
    """``gradient(train, val, w, a, xi)``: ``d/da val(w - xi d train/dw(w, a), a)``, like a, of losses of (w, a)."""
    for randn in draws():
        M, N, w, a = randn(4, 4), randn(4, 3), randn(4), randn(3)

        def train(w, a, M=M, N=N):
            return (M @ w - (N @ a).tanh()).square().sum() + (w * (N @ a)).sum()

        def val(w, a, M=M):
            return (M.T @ w).tanh().square().sum() + a.square().sum() * w.sum()

        def exact(a, xi, w=w, train=train, val=val):
            return val(w - xi * torch.func.grad(train)(w, a), a)

        got = gradient(train, val, w, a, 0.05)
        yield like(got, a)
        first = gradient(train, val, w, a, 0.0)
        yield (
            "first order at xi = 0",
            torch.allclose(first, torch.func.grad(val, 1)(w, a)),
            "At xi = 0 only the direct term is left.",
        )
        fits = torch.allclose(got, torch.func.grad(exact)(a, 0.05), rtol=1e-5, atol=1e-6)
        yield "second order", fits, "It is not the derivative through the step; both derivatives of val belong after it."


@exercise
def flow_1(prox):
    """``prox(r, a, u_0, z, tau)``: u (B, 2, H, W) least in ``(r + a . (u - u_0))^2 + |u - z|^2 / (2 tau)``, r gray."""
    for randn in draws():
        r, a, u_0, z, tau = randn(2, 1, 4, 5), randn(2, 2, 4, 5), randn(2, 2, 4, 5), randn(2, 2, 4, 5), 0.7
        got = prox(r, a, u_0, z, tau)
        yield like(got, z)
        slope = 2 * a * (r + (a * (got - u_0)).sum(1, keepdim=True)) + (got - z) / tau
        yield "zero gradient", slope.abs().max() < 1e-9, "The slope does not vanish: the residual at u is not that at z."


@exercise
def flow_2(prox):
    """``prox(r, a, u_0, z, tau, kappa)``: as `flow_1` for ``min over e of (r + a . (u - u_0) - e)^2 + kappa e^2``."""
    for randn in draws():
        r, a, u_0, z, tau = randn(2, 1, 4, 5), randn(2, 2, 4, 5), randn(2, 2, 4, 5), randn(2, 2, 4, 5), 0.7
        for kappa in (0.2, 3.0):
            got = prox(r, a, u_0, z, tau, kappa)
            yield like(got, z)
            rest = r + (a * (got - u_0)).sum(1, keepdim=True)
            slope = 2 * a * (rest - rest / (1 + kappa)) + (got - z) / tau  # at the best e
            yield "zero gradient", slope.abs().max() < 1e-9, f"With kappa = {kappa} the slope at the best e is not 0."
