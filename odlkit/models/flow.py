"""Optical flow by GDC: at each level of a pyramid a network proposes, then TV corrects the flow under a monotone control.

The energy ``sum_x w ||I_1(x + u(x)) - I_0(x)||^2 + lam sum_x g ||(D u)(x)||`` is not convex in u.  What is certified is one
*warp*: the data term linearised at ``u_0`` is a convex quadratic, and Algorithm 1 decreases that energy.  The frames I may
have any channels: gray, colours, gradients, or a network's features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from odlkit.flow import inside, resized, warp
from odlkit.models.gdc import FullyDefined, Module
from odlkit.operators import Operator
from odlkit.priors import TV
from odlkit.problem import Problem, sum_items
from odlkit.propagate import Result, propagate


def derivatives(x: Tensor) -> Tensor:
    """``(d/dx, d/dy)`` by central differences of fourth order: ``(B, C, H, W) -> (B, 2, C, H, W)``, the border repeated."""
    stencil = torch.tensor([1.0, -8.0, 0.0, 8.0, -1.0]).to(x) / 12
    flat = nnf.pad(x.flatten(0, 1)[:, None], [2] * 4, mode="replicate")
    across, down = (
        nnf.conv2d(flat, stencil.view(1, 1, 1, 5))[..., 2:-2, :],
        nnf.conv2d(flat, stencil.view(1, 1, 5, 1))[..., 2:-2],
    )
    return torch.stack([across.view_as(x), down.view_as(x)], 1)


class Linearised:
    """``f(u) = sum_x w ||r + a (u - u_0)||^2``, ``r = I_1(x + u_0) - I_0`` and ``a`` the slopes of the warped frame.

    ``u`` is ``(B, 2, H, W)``; ``r`` ``(B, C, H, W)``, ``a`` ``(B, 2, C, H, W)``, ``w`` ``(B, 1, H, W)``.  In normal form
    ``<u - u_0, M (u - u_0)> + 2 <b, u - u_0> + c`` with ``M = w sum_c a a^T``, one 2 x 2 matrix a pixel.  Its prox has
    a closed form; for one channel ``z - 2 t a (r + a . (z - u_0)) / (1 + 2 t |a|^2)``, t the step.  ``L = 2 max ||M||``:
    where ``a`` has a single direction, the flow along the edge is unseen (the aperture problem).
    Source: GDC, section VIII-B, f(u), linearised.
    """

    def __init__(self, r: Tensor, a: Tensor, at: Tensor, w: Tensor):
        x, y = a[:, 0], a[:, 1]
        self.at, self.m = at, [(w * p * q).sum(1, keepdim=True) for p, q in ((x, x), (x, y), (y, y))]
        self.b = (w[:, None] * a * r[:, None]).sum(2)
        self.c = (w * r.square()).sum(1, keepdim=True)
        self._affine: tuple = (None, None, None)  # the prox is z -> P z + p, kept for one step

    def value(self, u: Tensor) -> Tensor:
        d = (u - self.at).double()
        return sum_items(d * (_times(self.m, d) + 2 * self.b)) + sum_items(self.c)

    def grad(self, u: Tensor) -> Tensor:
        return 2 * (_times(self.m, u - self.at) + self.b)

    def prox(self, z: Tensor, step: Tensor | float) -> Tensor:
        if self._affine[0] is not step:
            s = 2 * step
            xx, xy, yy = (s * m for m in self.m)
            determinant = (1 + xx) * (1 + yy) - xy * xy
            inverse = [(1 + yy) / determinant, -xy / determinant, (1 + xx) / determinant]
            self._affine = step, inverse, _times(inverse, s * (_times(self.m, self.at) - self.b))
        return self._affine[2] + _times(self._affine[1], z)

    @property
    def bounds(self) -> tuple[float, float]:
        xx, xy, yy = self.m
        largest = (xx + yy + ((xx - yy).square() + 4 * xy.square()).sqrt()).max().item()
        return 0.0, max(largest, 0.1)  # flat frames have no curvature, and step 11 divides by it


def _times(m: Sequence[Tensor], d: Tensor) -> Tensor:
    """The symmetric 2 x 2 matrices ``(xx, xy, yy)``, one a pixel, times the vectors ``d`` ``(B, 2, H, W)``."""
    xx, xy, yy = (entry.to(d) for entry in m)
    x, y = d[:, :1], d[:, 1:]
    return torch.cat([torch.addcmul(xx * x, xy, y), torch.addcmul(xy * x, yy, y)], 1)


class EdgeGradient(Operator):
    """``g D``: forward differences that stop at the border, weighted by ``g`` ``(B, 1, H, W)`` in [0, 1]; norm^2 <= 8."""

    def __init__(self, g: Tensor):
        self.across, self.down = g[..., :-1], g[..., :-1, :]

    def A(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x).repeat(1, 2, 1, 1)
        half = x.shape[1]
        out[:, :half, :, :-1] = self.across.to(x) * (x[..., 1:] - x[..., :-1])
        out[:, half:, :-1] = self.down.to(x) * (x[..., 1:, :] - x[..., :-1, :])
        return out

    def A_adjoint(self, y: Tensor) -> Tensor:
        dx, dy = y.chunk(2, 1)
        dx, dy, out = self.across.to(y) * dx[..., :-1], self.down.to(y) * dy[..., :-1, :], torch.zeros_like(dx)
        out[..., :-1] -= dx
        out[..., 1:] += dx
        out[..., :-1, :] -= dy
        out[..., 1:, :] += dy
        return out


@dataclass(frozen=True)
class Settings:
    """Chosen on synthetic scenes of pictures that no network saw.

    ``data`` is "l2", the paper's square, or "l1", ``sqrt(|r|^2 + eps^2)``, an extension.  The channels are the gray value,
    weighted by ``gray``, and its two derivatives; with ``features`` > 0 they are the network's features, so weighted, on
    the levels that have them.  ``tv`` weighs the variation, ``edges`` is beta of
    ``g = exp(-beta |D I_0|)``, 0 for g = 1.  A level has ``warps`` linearisations, each with ``sweeps`` steps of
    `PrimalDual` and a median filter; ``blend`` is the part that the first frame's slopes have in ``a``.
    """

    data: str = "l1"
    gray: float = 0.3
    features: float = 0.0
    tv: float = 0.02
    eps: float = 0.01
    edges: float = 20.0
    warps: int = 10
    sweeps: int = 30
    rate: float = 1.0
    median: int = 5
    blend: float = 0.5
    gamma: float = 1.05


@dataclass
class Level:
    """The frames of one level as channels ``(B, C, H, W)``, and the variation of the flow on it."""

    first: Tensor
    second: Tensor
    tv: TV
    how: Settings

    @classmethod
    def of(cls, first: Tensor, second: Tensor, how: Settings, features: Sequence[Tensor] = ()) -> Level:
        """From gray frames ``(B, 1, H, W)`` and, where ``how.features`` is not 0, features of both."""
        one, two = (torch.cat([how.gray * z, derivatives(z).flatten(1, 2)], 1) for z in (first, second))
        g = torch.exp(-how.edges * one[:, 1:].square().sum(1, keepdim=True).sqrt())
        if how.features and features:
            one, two = (how.features * z for z in features)
        return cls(one, two, TV(how.tv, tol=1e-5, warm_start=True, gradient=EdgeGradient(g), least=1.0), how)

    def energy(self, u: Tensor) -> Tensor:
        """The energy of this level that is not linearised, ``(B,)``: what decides on a move of the network."""
        squares = (warp(self.second, u) - self.first).square().sum(1).double()
        return sum_items(squares if self.how.data == "l2" else (squares + self.how.eps**2).sqrt()) + self.tv.value(u)

    def linearise(self, at: Tensor) -> Problem:
        """The convex energy around the flow ``at``; a pixel that leaves the frame has no data.

        For "l1" a pixel's square weighs ``1 / (2 sqrt(|r|^2 + eps^2))``, r its residual at ``at``: a quadratic that
        touches ``sqrt(|r|^2 + eps^2)`` from above, with the constant that makes it touch.
        """
        r = warp(self.second, at) - self.first
        slopes = derivatives(self.second)
        a = warp(slopes.flatten(1, 2), at).view_as(slopes).lerp(derivatives(self.first), self.how.blend)
        w = inside(at).to(r)
        if self.how.data == "l2":
            return Problem(Linearised(r, a, at, w), self.tv)
        size = (r.square().sum(1, keepdim=True) + self.how.eps**2).sqrt()
        f = Linearised(r, a, at, 0.5 * w / size)
        f.c = f.c + 0.5 * w * (size + self.how.eps**2 / size)
        return Problem(f, self.tv)


@dataclass
class PrimalDual:
    """``T_C`` in ``sweeps`` steps of Chambolle and Pock on f + TV from u: the corrective module's proposal.

    ``rate`` is the primal step, ``1 / (8 rate)`` the dual one.  It starts from the dual that the TV prior keeps, and leaves
    its own there, for the next warp and for the prox of step 11.
    """

    sweeps: int
    rate: float

    def __call__(self, problem: Problem, u: Tensor, stage: int) -> Tensor:
        tv: Any = problem.prior
        q = tv.gradient.A(u).zero_() if tv.dual is None else tv.weight * tv.dual
        ahead = u
        for _ in range(self.sweeps):
            q = q + tv.gradient.A(ahead) / (8 * self.rate)
            q = q * (tv.weight / lengths(q).clamp_min(tv.weight)).repeat(1, 2, 1, 1)
            new = problem.fidelity.prox(u - self.rate * tv.gradient.A_adjoint(q), self.rate)
            u, ahead = new, 2 * new - u
        tv.dual = q / tv.weight
        return u


def lengths(q: Tensor) -> Tensor:
    """The length of each part's pair of differences: ``(B, 4, H, W) -> (B, 2, H, W)``."""
    across, down = q.chunk(2, 1)
    return (across.square() + down.square()).sqrt()


def median(flow: Tensor, side: int) -> Tensor:
    """The median over ``side x side`` windows, each part by itself, the border repeated."""
    from scipy.ndimage import median_filter

    if side < 2:
        return flow
    return torch.as_tensor(median_filter(flow.cpu().numpy(), (1, 1, side, side), mode="nearest"), device=flow.device)


@dataclass
class Estimate:
    """A flow ``(B, 2, H, W)`` and how it came about, level by level from coarse to fine.

    ``energies[l]`` holds the level's energy at its start, after the network's move and at its end; ``kept[l]``, ``(B,)``,
    whether the network's move was kept (None where no network is); ``runs[l]`` its warps, each one stage of Algorithm 1.
    """

    flow: Tensor
    energies: list[list[Tensor]]
    kept: list[Tensor | None]
    runs: list[list[Result]]


@torch.no_grad()
def estimate(
    first: Tensor,
    second: Tensor,
    net: Any = None,
    how: Settings | None = None,
    *,
    levels: int = 5,
    checked: bool = True,
    progress: bool = False,
) -> Estimate:
    """The flow from the first frame to the second, ``(B, 3, H, W)`` in [0, 1], coarse to fine in ``levels`` levels.

    ``net`` is an `odlkit.networks.FlowNet`, which moves the flow of every level but the finest; without one only the
    corrective module works.  Where ``checked``, a move of the network is kept if it lowers the level's energy, and each warp
    is a stage of Algorithm 1; otherwise all moves are taken.  ``how.warps = 0`` leaves the network alone.
    Eq: GDC Algorithm 1.
    """
    from tqdm import tqdm

    how, size, block = how or Settings(), first.shape[-2:], 2 ** (levels - 1)
    pad = [0, -size[1] % block, 0, -size[0] % block]
    frames = [nnf.pad(frame, pad, mode="replicate") for frame in (first, second)]
    features = [net.features(frame) for frame in frames] if net is not None else []
    grays = [[frame.mean(1, keepdim=True)] for frame in frames]
    for gray in grays:
        gray += [nnf.avg_pool2d(gray[0], 2**level) for level in range(1, levels)]
    flow, found = torch.zeros_like(grays[0][-1]).repeat(1, 2, 1, 1), Estimate(first, [], [], [])
    bar = tqdm(total=levels * how.warps, desc="flow", delay=3, leave=False, disable=not progress)
    for level in reversed(range(levels)):
        one, two = (gray[level] for gray in grays)
        learned = [maps[level - 1] for maps in features if 1 <= level <= net.levels]
        flow, here = resized(flow, one.shape[-2:]), Level.of(one, two, how, learned)
        energies, kept, runs = [here.energy(flow)], None, list[Result]()
        if learned:
            moved = net.residual(*learned, flow)
            energies.append(here.energy(moved))
            kept = (energies[1] < energies[0]) | (not checked)
            flow = torch.where(kept.view(-1, 1, 1, 1), moved, flow)
        for _ in range(how.warps):
            runs.append(correct(here, flow, checked))
            flow = median(runs[-1].x, how.median)
            bar.update()
        energies.append(here.energy(flow))
        found.energies.append(energies)
        found.kept.append(kept)
        found.runs.append(runs)
    bar.close()
    found.flow = flow[..., : size[0], : size[1]].contiguous()
    return found


def correct(level: Level, flow: Tensor, checked: bool = True, module: Module | None = None) -> Result:
    """One warp: a stage of Algorithm 1 on the energy linearised at ``flow``, its module `PrimalDual` unless given."""
    problem, how = level.linearise(flow), level.how
    control = None if checked else lambda problem, candidate: torch.ones(len(flow), dtype=torch.bool, device=flow.device)
    step = FullyDefined([module or PrimalDual(how.sweeps, how.rate)], how.gamma * problem.lipschitz, control=control)
    step.check(problem)
    return propagate(step, problem, flow, steps=1)
