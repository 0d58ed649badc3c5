"""Blind deblurring: image gradients by GDC under its control, the kernel by least squares on the simplex, coarse to fine.

One alternation has a fixed kernel k and data z.  Gradients: Algorithm 1 on ``||k * g - D z||^2 + lambda ||g||_{0.8}^{0.8}``
(Table I), whose proposal is a sweep of `Sharpen` or of trained modules.  Kernel:
``argmin_{k on the simplex} (1/2)||k * g - D z||^2 + mu ||k||^2`` over the differences that were seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as nnf

from odlkit.models.gdc import FullyDefined, Module, cascade
from odlkit.operators import Blur, Gradient
from odlkit.priors import GroupLp, Lp
from odlkit.problem import LeastSquares, Problem
from odlkit.propagate import Result, propagate

D = Gradient()
RATIO = 2**0.5  # between two levels of the pyramid


# Kernels: (h, w) with odd sides and the centre in the middle.


def to_simplex(v: Tensor) -> Tensor:
    """The nearest point of ``{k : k >= 0, sum k = 1}``, any shape: ``max(v - c, 0)``, c from the sorted entries.

    Source: Held, Wolfe and Crowder (1974).
    """
    falling = v.flatten().sort(descending=True).values
    shifts = (falling.cumsum(0) - 1) / torch.arange(1, len(falling) + 1, device=v.device)
    return (v - shifts[(falling > shifts).sum() - 1]).clamp_min(0)


def kernel_step(
    g: Tensor, d: Tensor, kernel: Tensor, mu: float, seen: Tensor | None = None, rounds: int = 4, steps: int = 60
) -> Tensor:
    """``argmin_{k on the simplex} (1/2) ||M (k * g - d)||^2 + mu ||k||^2``, from ``kernel`` ``(n, n)``, in float64.

    ``g`` and ``d`` are ``(1, C, H, W)``; ``seen`` is the mask M, without it M = I.  Closed form and projection would not be
    the minimiser, so accelerated projected gradients run, on the ``n x n`` support alone: the normal equations are a
    convolution with the autocorrelation of g.  A mask breaks that, and is restored by ``rounds`` of filling the unseen data
    with ``k * g`` of the kernel so far, each of which lowers the masked energy.  Source: GDC, section VI-A, Blind Image
    Deblurring.
    """
    n, size = kernel.shape[-1], g.shape[-2:]
    half, wide = n // 2, 2 * n
    g, d, k = g.double(), d.double(), to_simplex(kernel.double())
    spectrum = torch.fft.rfft2(g)

    def near(correlation: Tensor, reach: int) -> Tensor:
        return correlation.roll((reach, reach), (-2, -1))[: 2 * reach + 1, : 2 * reach + 1]

    auto = near(torch.fft.irfft2(spectrum.abs().square().sum((0, 1)), s=size), n - 1)
    gram = torch.fft.rfft2(nnf.pad(auto, (0, 1, 0, 1)).roll((1 - n, 1 - n), (-2, -1))).real
    lipschitz = gram.max() + 2 * mu
    for _ in range(rounds if seen is not None else 1):
        data = d if seen is None else torch.where(seen, d, Blur(k).A(g))
        cross = near(torch.fft.irfft2((spectrum.conj() * torch.fft.rfft2(data)).sum((0, 1)), s=size), half)
        z, before, t = k, k, 1.0
        for _ in range(steps):
            slope = torch.fft.irfft2(gram * torch.fft.rfft2(z, s=(wide, wide)), s=(wide, wide))[:n, :n] - cross + 2 * mu * z
            new = to_simplex(z - slope / lipschitz)
            t = 1.0 if ((z - new) * (new - k)).sum() > 0 else t  # restart where the momentum points uphill
            later = (1 + (1 + 4 * t * t) ** 0.5) / 2
            moved = (new - k).norm()
            z, k, t = new + (t - 1) / later * (new - k), new, later
            if moved < 1e-4 * new.norm():
                break
        if (k - before).norm() < 1e-3 * k.norm():
            break
    return k


def tidy(kernel: Tensor, least: float, share: float) -> Tensor:
    """Without entries below ``least`` of the largest, nor islands that hold less than ``share``; sum 1, centroid centred."""
    from scipy.ndimage import label

    k = torch.where(kernel < least * kernel.max(), 0, kernel)
    islands = torch.as_tensor(label(k.cpu().numpy() > 0, structure=[[1] * 3] * 3)[0], device=k.device).long()
    held = islands.flatten().bincount(k.flatten()) / k.sum()
    k = torch.where((held < min(share, held.max().item()))[islands], 0, k)
    return centred(k / k.sum())


def centred(kernel: Tensor) -> Tensor:
    """Moved by whole pixels so that its centroid is nearest to its centre; what leaves the support is lost."""
    n = kernel.shape[-1]
    place = torch.arange(n, dtype=kernel.dtype, device=kernel.device) - n // 2
    dy, dx = (round((kernel.sum(axis) * place).sum().item() / kernel.sum().item()) for axis in (1, 0))
    moved = nnf.pad(kernel, (n, n, n, n)).roll((-dy, -dx), (0, 1))[n : 2 * n, n : 2 * n]
    return moved / moved.sum()


def resized(kernel: Tensor, n: int, scale: float) -> Tensor:
    """The kernel on a grid ``scale`` times as fine, ``(n, n)``, its centre kept; bilinear, sum 1."""
    place = (torch.arange(n, dtype=kernel.dtype, device=kernel.device) - n // 2) / scale / (kernel.shape[-1] / 2)
    grid = torch.stack(torch.meshgrid(place, place, indexing="xy"), -1)[None]
    k = nnf.grid_sample(kernel[None, None], grid, mode="bilinear", align_corners=False)[0, 0]
    return k / k.sum()


def pyramid(n: int) -> list[tuple[int, float]]:
    """``(kernel size, scale)`` from coarse to fine, sizes odd and at least 3, scales `RATIO` apart up to 1."""
    levels = [(n, 1.0)]
    while levels[-1][0] > 3:
        scale = levels[-1][1] / RATIO
        levels.append((max(round(n * scale) // 2 * 2 + 1, 3), scale))
    return levels[::-1]


# Gradients: modules T of GDC.


@dataclass
class Sharpen:
    """The gradients of a picture of few edges: half-quadratic splitting of ``||M (k * x - z)||^2 + lam ||D x||_0``.

    ``h = prox_0(D x)`` drops the gradients with ``|D x|^2 < lam / beta``, then ``x = argmin ||k * x - z||^2 +
    beta ||D x - h||^2``, beta doubled from ``2 lam`` to ``last``.  It starts from the data ``z`` ``(1, 1, H, W)``, whatever
    ``u`` is.  Where ``seen`` (the mask M) is false, ``z`` is replaced by ``k * x`` as x becomes known, and kept for the
    next call.  Source: Xu, Zheng and Jia (2013); Pan, Hu, Su and Yang (2014).
    """

    z: Tensor
    seen: Tensor
    lam: float
    last: float = 100.0

    def __call__(self, problem: Problem, u: Tensor, stage: int) -> Tensor:
        blur, prior, size = problem.fidelity.operator, GroupLp(0, self.lam), self.z.shape[-2:]  # type: ignore[attr-defined]
        k, gram, spread = blur.spectrum(self.z), blur.gram(self.z), D.gram(self.z)
        x, z, beta = self.z, self.z, 2 * self.lam
        while beta < self.last:
            h = prior.prox(D.A(x), 0.5 / beta)
            right = k.conj() * torch.fft.rfft2(z) + beta * torch.fft.rfft2(D.A_adjoint(h))
            spectrum = right / (gram + beta * spread)
            x = torch.fft.irfft2(spectrum, s=size)
            z = torch.where(self.seen, z, torch.fft.irfft2(k * spectrum, s=size))
            beta *= 2
        self.z = z
        return D.A(x)


@dataclass
class Sweep:
    """``T(u)``: ``stages`` stages of the modules in one proposal, from the data."""

    modules: Sequence[Module]
    stages: int

    def __call__(self, problem: Problem, u: Tensor, stage: int) -> Tensor:
        u = problem.fidelity.y  # type: ignore[attr-defined]
        for t in range(self.stages):
            u = cascade(self.modules, problem, u, t)
        return u


# The alternation.


@dataclass(frozen=True)
class Settings:
    """Chosen on pictures of train400 and BSD68 under random kernels.  ``lam`` is the price of an edge pixel in `Sharpen`.

    It falls by ``decay`` with each alternation, down to ``floor``; after the pyramid ``refine`` more at full size take it
    to ``last``.  The control's prior weighs ``prior lam``, its gamma is ``gamma L``; `tidy` gets ``least`` and ``share``.
    ``error`` is the standard deviation that the gradients are trusted to: white errors e of that size in the 2 N differences
    make ``(1/2) E ||k * (g + e) - d||^2`` larger by ``N error^2 ||k||^2``, so ``mu = N error^2`` in `kernel_step`.  N counts
    the pixels of the full picture on every level: coarse gradients are trusted less.
    """

    lam: float = 8e-3
    decay: float = 1.1
    floor: float = 2e-3
    alternations: int = 8
    refine: int = 6
    last: float = 5e-4
    prior: float = 3.0
    gamma: float = 20.0
    error: float = 0.025
    least: float = 0.03
    share: float = 0.03


def gradients(sweep: Module, z: Tensor, kernel: Tensor, lam: float, gamma: float, checked: bool = True) -> Result:
    """One stage of Algorithm 1 from the data ``D z`` on ``||k * g - D z||^2 + lam ||g||_{0.8}^{0.8}``.

    The step 11 has ``gamma L``: Proposition 1 asks for any gamma above 1, and a large one leaves an accepted proposal nearly
    as it was.  ``checked=False`` accepts every proposal.  Eq: GDC Algorithm 1.
    """
    problem = Problem(LeastSquares(Blur(kernel), D.A(z), 2.0), Lp(0.8, lam))
    control = None if checked else lambda problem, candidate: torch.ones(len(z), dtype=torch.bool, device=z.device)
    step = FullyDefined([sweep], penalty=gamma * problem.lipschitz, control=control)
    step.check(problem)
    return propagate(step, problem, D.A(z), steps=1)


def inside(seen: Tensor, n: int) -> Tensor:
    """Where ``k * g`` of an ``(n, n)`` kernel needs differences of seen pixels only."""
    reach = n // 2 + 1
    return -nnf.max_pool2d(-seen.float(), 2 * reach + 1, 1, reach) > 0
