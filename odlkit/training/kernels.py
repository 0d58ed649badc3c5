"""Random blur kernels to train on: hand-shake trajectories, Gaussians and discs, never a benchmark's own kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def random_kernel(generator: torch.Generator, size: int = 31) -> Tensor:
    """One kernel ``(size, size)``, non-negative, sum 1, centred on its centroid: 80% motion, 10% Gaussian, 10% disc."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    half = size // 2
    rows, cols = torch.meshgrid(*2 * [torch.arange(-half, half + 1.0)], indexing="ij")
    kind = uniform(0, 1)
    if kind < 0.1:
        width = uniform(0.4, 3.0)
        kernel = torch.exp(-(rows.square() + cols.square()) / (2 * width**2))
    elif kind < 0.2:
        kernel = torch.sigmoid(4 * (uniform(0.8, 5.0) - (rows.square() + cols.square()).sqrt()))
    else:
        path = _trajectory(generator, reach=uniform(2.0, half - 2.0), turn=uniform(0.02, 0.5))  # (n, 2)
        spread = uniform(0.35, 0.75)
        distance = (rows[..., None] - path[:, 0]).square() + (cols[..., None] - path[:, 1]).square()
        kernel = torch.exp(-distance / (2 * spread**2)).sum(-1)
    kernel = kernel / kernel.sum()
    kernel = torch.where(kernel < 1e-3 * kernel.max(), torch.zeros_like(kernel), kernel)
    return kernel / kernel.sum()


def _trajectory(generator: torch.Generator, reach: float, turn: float, samples: int = 160) -> Tensor:
    """A smooth random path ``(samples, 2)`` centred at 0 that stays within ``reach`` pixels: a walk of the heading."""
    headings = torch.cumsum(turn * torch.randn(samples, generator=generator), 0)
    headings = headings + math.tau * torch.rand((), generator=generator)
    speed = torch.exp(0.5 * torch.cumsum(0.15 * torch.randn(samples, generator=generator), 0))
    if torch.rand((), generator=generator) < 0.3:  # an abrupt reversal, as hands make them
        headings[torch.randint(samples, (), generator=generator) :] += math.pi * 0.8
    path = torch.cumsum(speed[:, None] * torch.stack([headings.sin(), headings.cos()], 1), 0)
    path = path - path.mean(0)
    return path * (reach / path.abs().max())
