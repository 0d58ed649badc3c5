"""Generative adversarial networks on a ring of Gaussians, the discriminator being the lower level of the generator.

Five ways to train one pair of networks with one optimiser.  Networks are stacks: every parameter has a leading dimension of
seeds, so that ten trainings run as one; no seed sees another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import softplus

from odlkit.bilevel import descent, hypergradient
from odlkit.training.machine import best_device

Stack = list[Tensor]  # weights (S, in, out) and biases (S, 1, out) in turn, S seeds
MODES, RADIUS, SIGMA = 8, 2.0, 0.05
LATENT, HIDDEN = 16, (64, 64)


def centres(like: Tensor) -> Tensor:
    """The means ``(8, 2)`` of the Gaussians."""
    angle = torch.arange(MODES, dtype=like.dtype, device=like.device) * (2 * math.pi / MODES)
    return RADIUS * torch.stack([angle.cos(), angle.sin()], -1)


def normal(generators: Sequence[torch.Generator], *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers ``(S, *shape)``, from one generator a seed."""
    return torch.stack([torch.randn(shape, generator=g, dtype=dtype) for g in generators])


def ring(generators: Sequence[torch.Generator], count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Samples ``(S, count, 2)`` of eight Gaussians (standard deviation 0.05) on a circle of radius 2."""
    noise = SIGMA * normal(generators, count, 2, dtype=dtype)
    which = torch.stack([torch.randint(MODES, (count,), generator=g) for g in generators])
    return centres(noise)[which] + noise


def network(generators: Sequence[torch.Generator], inputs: int, outputs: int, dtype: torch.dtype = torch.float32) -> Stack:
    """Weights and biases, uniform in ``+-1/sqrt(in)`` as torch draws them, one network a seed."""
    sizes, stack = (inputs, *HIDDEN, outputs), []
    for a, b in zip(sizes, sizes[1:], strict=False):
        for rows in (a, 1):
            drawn = torch.stack([torch.rand(rows, b, generator=g, dtype=dtype) for g in generators])
            stack.append((2 * drawn - 1) / math.sqrt(a))
    return stack


def apply(stack: Stack, x: Tensor) -> Tensor:
    """The networks on ``x`` ``(S, B, in)``: affine, tanh, ..., affine."""
    layers = list(zip(stack[::2], stack[1::2], strict=True))
    for weight, bias in layers[:-1]:
        x = torch.baddbmm(bias, x, weight).tanh()
    return torch.baddbmm(layers[-1][1], x, layers[-1][0])


@dataclass(frozen=True)
class Batch:
    """Data ``x`` ``(S, B, 2)``, latent ``z`` ``(S, B, 16)``, and the discriminators the outer step began with."""

    x: Tensor
    z: Tensor
    anchor: Stack


@dataclass(frozen=True)
class Method:
    """How the discriminator is trained, and through how many of its steps the generator looks.

    Losses are means over the batch, summed over seeds; those of the discriminator are ``(d, g, batch)``.
    """

    loss: Callable[[Stack, Stack, Batch], Tensor]
    upper: Callable[[Tensor], Tensor]  # of the discriminator's outputs on generated points
    critics: int = 1  # Adam steps of the discriminator an outer step
    clip: float = math.inf  # bound on its weights
    look: int = 0  # K differentiable gradient steps of it
    through: bool = True  # False: take the K steps, and no gradient through them


def logistic(d: Stack, g: Stack, batch: Batch) -> Tensor:
    """``-E log s(D(x)) - E log(1 - s(D(G(z))))``, s the logistic function."""
    return (softplus(-apply(d, batch.x)) + softplus(apply(d, apply(g, batch.z)))).mean((1, 2)).sum()


def wasserstein(d: Stack, g: Stack, batch: Batch) -> Tensor:
    """``E D(G(z)) - E D(x)``, a distance where D is Lipschitz: hence WGAN's clipping."""
    return (apply(d, apply(g, batch.z)) - apply(d, batch.x)).mean((1, 2)).sum()


def slope(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``E ||d function/dx||^2``, with a graph."""
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    return grad.square().sum(-1).mean(1).sum()


def proximal(d: Stack, g: Stack, batch: Batch, weight: float = 0.1) -> Tensor:
    """``logistic + weight E ||grad (D - D_0)||^2`` on data and generated points, ``D_0`` the start of the outer step."""
    points = torch.cat([batch.x, apply(g, batch.z)], 1)
    return logistic(d, g, batch) + weight * slope(lambda p: apply(d, p) - apply(batch.anchor, p), points)


def penalised(d: Stack, g: Stack, batch: Batch, weight: float = 0.1) -> Tensor:
    """``logistic + weight/2 E ||grad D(x)||^2``, R1, which keeps D flat where the data are."""
    return logistic(d, g, batch) + weight / 2 * slope(lambda p: apply(d, p), batch.x)


def fooled(scores: Tensor) -> Tensor:
    """The generator's non-saturating loss ``-E log s(D(G(z)))``."""
    return softplus(-scores).mean((1, 2)).sum()


METHODS = {
    "VGAN": Method(logistic, fooled),
    "WGAN": Method(wasserstein, lambda scores: -scores.mean((1, 2)).sum(), critics=5, clip=0.1),
    "ProxGAN": Method(proximal, fooled, critics=5),
    "R1, stands in for LCGAN": Method(penalised, fooled),
    "HODL": Method(logistic, fooled, look=5),
    "HODL, first order": Method(logistic, fooled, look=5, through=False),
}


def generator_gradient(method: Method, d: Stack, g: Stack, batch: Batch, rate: float = 0.02) -> Stack:
    """``dphi/dg`` of ``phi(g) = upper(D_{d^K}(G_g(z)))``, ``d^{k+1} = d^k - rate dloss/dd (d^k, g)``, ``d^0 = d``.

    K = ``method.look``.  At K = 0 this is the gradient at a fixed discriminator, the usual one.  Nothing keeps the inner
    steps non-expansive: HODL's theorems do not cover this use of it.  HODL's step with ``mu = 0`` and ``alpha`` is
    this one with ``rate`` times ``alpha``.  Source: HODL Section 5, Metz et al., ICLR 2017.
    """
    lower = descent(lambda u, w: method.loss(u, w, batch), rate)
    upper = lambda u, w: method.upper(apply(u, apply(w, batch.z)))  # noqa: E731
    if method.through:
        return hypergradient(lower, upper, g, d, steps=method.look).gradient
    for k in range(method.look):
        with torch.no_grad():
            d = lower(d, g, k)
    return hypergradient(lower, upper, g, d, steps=0).gradient


@dataclass
class Trained:
    """The generators after training, and at the asked steps what they generate."""

    generator: Stack
    discriminator: Stack
    frames: dict[int, Tensor] = field(default_factory=dict)  # step -> (S, count, 2)


def train(
    method: Method,
    seeds: Sequence[int],
    steps: int = 1500,
    batch: int = 128,
    lr: float = 1e-3,
    optimiser: str = "adam",
    look_at: Sequence[int] = (),
    progress: str = "",
) -> Trained:
    """Alternate ``method.critics`` steps of the discriminators and one of the generators, ``steps`` times.

    On the best device.  ``optimiser``: ``"adam"``, betas (0.5, 0.999), or ``"sgd"``, for both networks.  ``look_at``: steps
    at which 500 points are generated and kept.  Raises `odlkit.bilevel.LowerLevelError` where the inner steps diverge.
    """
    from tqdm import trange

    if optimiser not in ("adam", "sgd"):
        raise ValueError(f"optimiser: expected 'adam' or 'sgd', got {optimiser!r}")
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    where = best_device()
    g, d = ([p.to(where) for p in network(draws, *ends)] for ends in ((LATENT, 2), (2, 1)))
    latent = normal(draws, 500, LATENT).to(where)
    both = [p.requires_grad_() for p in (*g, *d)]
    make = torch.optim.SGD if optimiser == "sgd" else lambda p, lr: torch.optim.Adam(p, lr, (0.5, 0.999))
    of_g, of_d = make(both[: len(g)], lr=lr), make(both[len(g) :], lr=lr)
    done = Trained(g, d)

    def watch(step: int) -> None:
        if step in look_at:
            with torch.no_grad():
                done.frames[step] = apply(g, latent).cpu()

    for step in trange(steps, desc=progress, disable=not progress):
        watch(step)
        anchor = [p.detach().clone() for p in d]
        for _ in range(method.critics):
            seen = Batch(ring(draws, batch).to(where), normal(draws, batch, LATENT).to(where), anchor)
            frozen = [p.detach() for p in g]
            of_d.zero_grad()
            method.loss(d, frozen, seen).backward()
            of_d.step()
            if method.clip < math.inf:
                with torch.no_grad():
                    for p in d:
                        p.clamp_(-method.clip, method.clip)
        for p, gradient in zip(g, generator_gradient(method, d, g, seen), strict=True):
            p.grad = gradient
        of_g.step()
    watch(steps)
    return done


@torch.no_grad()
def coverage(points: Tensor, least: int = 20) -> tuple[Tensor, Tensor]:
    """Of points ``(S, N, 2)``: modes with at least ``least`` points within 3 sigma ``(S,)``, fraction of such points."""
    away, nearest = torch.cdist(points, centres(points).expand(len(points), -1, -1)).min(-1)
    good = away < 3 * SIGMA
    counts = torch.stack([((nearest == m) & good).sum(1) for m in range(MODES)], 1)
    return (counts >= least).sum(1), good.float().mean(1)


@torch.no_grad()
def sample(generator: Stack, count: int = 2500, seed: int = 10_000) -> Tensor:
    """Generated points ``(S, count, 2)``, of fresh latent draws."""
    draws = [torch.Generator().manual_seed(seed)] * len(generator[0])
    return apply(generator, normal(draws, count, LATENT).to(generator[0])).cpu()
