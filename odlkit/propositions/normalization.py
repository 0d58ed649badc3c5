"""GDC's Proposition 3: with normalized modules and a strongly convex fidelity, the cascade is a contraction; its controls.

The networks compute in float64 here: a float32 network puts a floor of round-off under every distance.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from odlkit.certify import Check, entry, inequality, row, settled
from odlkit.instances import blurred, gaussian, picture
from odlkit.models.gdc import Cascade, Corrective, Discriminative, Generative, Module, Penalty
from odlkit.models.padnet import Network
from odlkit.networks import Classifier, ConvUnit
from odlkit.networks.normalize import certified, gradient_bound, kernels, normalized, random_step_norm, share, weighted
from odlkit.operators import Blur, Identity, LinearMap, Stack, Wavelet
from odlkit.priors import Analysis, Lp, Zero
from odlkit.problem import LeastSquares, Prior, Problem, norm_items
from odlkit.propagate import Result, Trace, propagate
from odlkit.training.loop import patches

DELTA_G, DELTA_D = 0.3, 0.1  # bounds of the two modules
LEVEL = 0.05  # the noise level that the networks are told
HIGH_PASS = 13 / 6  # bounds ||I - M||, M the 3x3 mean at the border too: row sums 1, column sums (7/6)^2, so ||M|| <= 7/6


def contraction(expansion: float, gamma: float, strong: float, lipschitz: float) -> float:
    """``P max(|1 - rho / gamma|, |1 - L / gamma|)``, a Lipschitz constant of ``T_C T_D T_G``.

    ``P = expansion = (1 + delta_d)(1 + delta_g)``; a gradient step of length ``1 / gamma`` on a rho-strongly convex,
    L-smooth f has the other factor, and a convex prior's proximal map expands nothing.  Eq: GDC Proposition 3.
    """
    return expansion * max(abs(1 - strong / gamma), abs(1 - lipschitz / gamma))


def contraction_printed(expansion: float, gamma: float, strong: float, lipschitz: float) -> float:
    """``P sqrt(1 - 2 rho L / (gamma (rho + L)))``, the paper's, for ``gamma >= (rho + L) / 2``: never smaller.

    Eq: GDC Proposition 3.
    """
    return expansion * math.sqrt(1 - 2 * strong * lipschitz / (gamma * (strong + lipschitz)))


def interval(expansion: float, strong: float, lipschitz: float) -> tuple[float, float]:
    """The open interval ``L P / (P + 1) < gamma < rho P / (P - 1)`` on which `contraction` is below 1.

    Raises ``ValueError`` where it is empty, ``P >= (L + rho) / (L - rho)``.  Eq: GDC Proposition 3.
    """
    if expansion < 1:
        raise ValueError(f"expansion: expected (1 + delta_d)(1 + delta_g) >= 1, got {expansion}")
    low = lipschitz * expansion / (expansion + 1)
    high = strong * expansion / (expansion - 1) if expansion > 1 else math.inf
    if not low < high:
        limit = (lipschitz + strong) / (lipschitz - strong)
        raise ValueError(f"expansion: expected less than (L + rho) / (L - rho) = {limit:.7g}, got {expansion:.7g}")
    return low, high


def smooth_network(depth: int = 7, width: int = 16, seed: int = 0) -> nn.Sequential:
    """``depth`` circular convolutions with box kernels times positive mixing weights, ReLU between, no biases; float64.

    On positive images it is linear, and smooth images are what it amplifies: the case that a reshaped norm misses.
    """
    generator, parts = torch.Generator().manual_seed(seed), []
    sizes = [1, *[width] * (depth - 1), 1]
    for inside, outside in zip(sizes, sizes[1:], strict=False):
        convolution = nn.Conv2d(inside, outside, 3, padding=1, padding_mode="circular", bias=False, dtype=torch.float64)
        mix = torch.rand(outside, inside, 1, 1, generator=generator, dtype=torch.float64)
        convolution.weight.data.copy_(mix.expand(-1, -1, 3, 3) / 9)
        parts += [convolution, nn.ReLU()]
    return nn.Sequential(*parts[:-1]).requires_grad_(False)


def as_printed(net: nn.Module, delta: float, seed: int = 0) -> nn.Module:
    """A copy of ``net`` with ``w <- delta^(1/K) w / rho(w)``, rho the paper's one power step.  Eq: GDC (11)."""
    net, generator = copy.deepcopy(net), torch.Generator().manual_seed(seed)
    part = share(net, delta)
    for layer, channels in weighted(net):
        layer.weight.data *= part / random_step_norm(kernels(layer.weight, channels), generator)
    return net


@cache
def estimator(delta: float | None, steps: int = 400) -> nn.Module:
    """A `ConvUnit` of seven layers trained to estimate noise of level `LEVEL`, some seconds; float64.

    With a ``delta`` it is normalized in every step and then certified.  Kernels start near rotations of the channels: layers
    of norm 1 that mix at random let almost nothing through.
    """
    images = [picture(name, 128).float() for name in ("coffee", "chelsea", "rocket", "brick")]
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        net: nn.Module = ConvUnit(width=16)
        for layer, _ in weighted(net):
            layer.weight.data *= 0.3
            layer.weight.data[:, :, 1, 1] += nn.init.orthogonal_(torch.empty(layer.weight.shape[:2]))
        net = net if delta is None else normalized(net, delta)
        optimiser = torch.optim.Adam(net.parameters(), lr=2e-3)
        for _ in range(steps):
            x = patches(images, 8, 32, generator)
            noise = LEVEL * torch.randn(x.shape, generator=generator)
            optimiser.zero_grad()
            (net(x + noise, LEVEL) - noise).square().mean().div(LEVEL**2).backward()
            optimiser.step()
    net = net.double().eval()
    return (net if delta is None else certified(net, delta)).requires_grad_(False)


@cache
def raw_networks() -> dict[str, nn.Module]:
    """Networks that nobody normalized, float64: untrained, and smooth kernels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {"untrained": ConvUnit(width=16).double().requires_grad_(False), "smooth kernels": smooth_network()}


@cache
def networks(delta: float = DELTA_G) -> dict[str, nn.Module]:
    """Networks with ``lipschitz_bound <= delta``: the `estimator` trained so, and the `raw_networks` scaled down."""
    return {"trained": estimator(delta)} | {name: certified(net, delta) for name, net in raw_networks().items()}


def move(net: nn.Module) -> Network:
    """``T_G(u) = u + G(u)``; a `ConvUnit` estimates the noise, so it is subtracted."""
    if isinstance(net, ConvUnit):
        return lambda u, alpha: u - net(u, alpha)
    return lambda u, alpha: u + net(u)


@cache
def discriminative(delta: float = DELTA_D) -> Discriminative:
    """``T_D(u) = u - step grad d(u)`` with ``step`` so that ``Lip(step grad d) <= delta``, d an untrained classifier.

    d is the sum of a smooth network's outputs at ``(u - M u) / alpha``, times ``alpha^2``: alpha cancels.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = Classifier((16, 16)).double().requires_grad_(False)
    bound = HIGH_PASS**2 * gradient_bound(classifier.layers, summed=True)
    return Discriminative(classifier.potential, lambda stage: LEVEL, delta / bound)


def modules(net: nn.Module, gamma: float) -> list[Module]:
    """A stage ``T_C T_D T_G`` with a constant gamma.  Eq: GDC Proposition 3."""
    return [Generative(move(net), lambda stage: LEVEL), discriminative(), Corrective(Penalty(gamma))]


def problem_of(operator: LinearMap, y: Tensor, prior: Prior | None = None) -> Problem:
    """``f = ||A u - y||^2 / 2`` and the l1 norm of the Haar coefficients, or another prior."""
    return Problem(LeastSquares(operator, y), prior or Analysis(Wavelet("haar", 3), Lp(1, 2e-3)))


def instances(size: int) -> dict[str, tuple[Problem, Tensor, float]]:
    """Name -> problem, start, gamma: a mild blur, denoising, and a full Gaussian blur with ``0.15 ||u||^2`` added to f."""
    mild, y_mild = blurred("camera", size, gaussian(delta=0.65))
    full, y_full = blurred("astronaut", size, gaussian())
    noise = torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noisy, ridge = picture("coins", size) + 0.05 * noise, 0.3
    stacked = Stack(full, Blur(torch.full((1, 1), ridge**0.5, dtype=torch.float64)))
    made = {
        "camera, mild blur": (problem_of(mild, y_mild), y_mild),
        "coins, denoising": (problem_of(Identity(), noisy), noisy),
        "astronaut, blur and ridge": (problem_of(stacked, torch.cat([y_full, 0 * y_full], 1)), y_full),
    }
    # gamma = (rho + L) / 2 is best; for denoising it would make one step of everything
    return {
        name: (q, y, max((q.strong_convexity + q.lipschitz) / 2, 1.5 * q.strong_convexity)) for name, (q, y) in made.items()
    }


def two_starts(stage: Sequence[Module], problem: Problem, y: Tensor, steps: int) -> tuple[Result, float]:
    """Run the cascade from ``y`` and from ``y`` plus noise of standard deviation 2; records their ``distance``."""
    far = y + 2 * torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    measure = {"distance": lambda state: norm_items(state.x[:1] - state.x[1:])}
    both = torch.cat([y, far])
    result = propagate(Cascade(stage), problem, both, steps=steps, measure=measure, energy=False, raises=False)
    return result, norm_items(far - y).item()


def contraction_checks(trace: Trace, factor: float, start: float, slack: float = 1e-13) -> list[Check]:
    """``||u^{t+1} - v^{t+1}|| <= q ||u^t - v^t||`` for two starts, ``||u^{t+1} - u^t|| <= q ||u^t - u^{t-1}||``, and q < 1.

    The round-off allowed is ``slack ||u||``.  Eq: GDC Proposition 3.
    """
    distance, change, floor = trace["distance"][:, :1], trace["change"], slack * trace["norm"]
    before = torch.cat([torch.full_like(distance[:1], start), distance[:-1]])
    one, q = torch.ones(1, 1, dtype=torch.float64), torch.full((1, 1), factor, dtype=torch.float64)
    return [
        inequality("two starts", distance, factor * before, floor.amax(1, keepdim=True)),
        inequality("steps", change[1:], factor * change[:-1], floor[1:]),
        inequality("contraction", q, one, 0 * one),
    ]


def largest_ratio(trace: Trace, start: float) -> float:
    """The largest ``||u^{t+1} - v^{t+1}|| / ||u^t - v^t||`` while the distance is above 1e-8 of its start."""
    distance = torch.cat([torch.tensor([start], dtype=torch.float64), trace["distance"][:, 0]])
    above = distance[:-1] > 1e-8 * start
    return (distance[1:] / distance[:-1])[above].max().item()


def without_strong_convexity(size: int, steps: int) -> tuple[Result, float]:
    """Control: a blur that removes frequencies, no prior, and ``G = delta I``, whose bound is exact.  See `two_starts`."""
    blur, y = blurred("camera", size, gaussian())
    problem, scale = problem_of(blur, y, Zero()), nn.Sequential(nn.Conv2d(1, 1, 1, bias=False, dtype=torch.float64))
    scale[0].weight.data.fill_(DELTA_G)  # type: ignore[operator]
    return two_starts(modules(scale, (problem.strong_convexity + problem.lipschitz) / 2), problem, y, steps)


def control(what: str, factor: float, result: Result, start: float) -> dict:
    """A run that must not contract: its distance grows, and exceeds what ``factor`` allows."""
    held = contraction_checks(result.trace, factor, start)[0].holds
    last = result.trace["distance"][-1, 0].item()
    return {"what": what, "violates": not held and not last < start, "factor": factor, "iterations": result.iterations,
            "largest_ratio": largest_ratio(result.trace, start), "grown": last / start}  # fmt: skip


def proposition_3(size: int = 64, steps: int = 30) -> dict:
    """Three strongly convex problems, three normalized networks: two starts approach each other at the stated rate.

    Eq: GDC Proposition 3.
    """
    expansion, rows = (1 + DELTA_D) * (1 + DELTA_G), []
    problems = instances(size)
    for name, (problem, y, gamma) in problems.items():
        factor = contraction(expansion, gamma, problem.strong_convexity, problem.lipschitz)
        for kind, net in networks().items():
            result, start = two_starts(modules(net, gamma), problem, y, steps)
            checks = [*contraction_checks(result.trace, factor, start), settled(result.trace)]
            rows.append(row(name, kind, checks, result) | {"factor": factor, "ratio": largest_ratio(result.trace, start)})

    problem, y, gamma = problems["camera, mild blur"]
    factor = contraction(expansion, gamma, problem.strong_convexity, problem.lipschitz)
    raw = raw_networks()["smooth kernels"]
    short = lambda net: two_starts(modules(net, gamma), problem, y, 4)  # noqa: E731  (before it overflows)
    return entry(rows, [], [
        control("smooth kernels normalized by Eq. 11 at the same delta", factor, *short(as_printed(raw, DELTA_G))),
        control("smooth kernels, not normalized", factor, *short(raw)),
        control("a normalized network, a blur without strong convexity", 1.0, *without_strong_convexity(size, 40)),
    ])  # fmt: skip
