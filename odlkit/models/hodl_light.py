"""HODL for low light: Retinex ``y = x u`` with one illumination u for all channels, found as a fixed point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from odlkit.models.hodl import Map, averaged, compose, gradient_descent
from odlkit.networks.lipschitz_cell import OPERATIONS, Cells

LEAST = 1 / 255  # of a picture of 8 bits: what is darker counts as this


class Seen(NamedTuple):
    """What the iteration takes from a picture, on the coarse grid: ``(B, 1, h, w)``, ``scale`` ``(B, 1, 1, 1)``."""

    colours: Tensor  # (B, 3, h, w), the means of blocks
    floor: Tensor  # the channel maximum, below which u would make x exceed 1
    phi: Tensor
    scale: Tensor


def coarse(y: Tensor, block: int) -> Tensor:
    """Means over ``block x block`` pixels, the last of a row over what is left: ``(B, C, ceil(H / block), ...)``."""
    return nnf.avg_pool2d(y, block, ceil_mode=True, count_include_pad=False)


def smoothed(m: Tensor, radius: int, ridge: float = 0.01) -> Tensor:
    """The guided filter of ``m`` by itself: smooth within, not across, steps higher than ``sqrt(ridge)``."""

    def mean(x: Tensor) -> Tensor:
        return nnf.avg_pool2d(x, 2 * radius + 1, 1, radius, count_include_pad=False)

    average = mean(m)
    variance = (mean(m * m) - average.square()).clamp_min(0)
    slope = variance / (variance + ridge)
    return mean(slope) * m + mean(average - slope * average)


def radiance(y: Tensor, u: Tensor, block: int = 1) -> Tensor:
    """``x = y / max(u, 1/255)`` in [0, 1], ``(B, C, H, W)`` like ``y``; a coarse ``u`` is interpolated to its pixels."""
    if block > 1:
        size = [block * side for side in u.shape[-2:]]
        u = nnf.interpolate(u, size, mode="bilinear", align_corners=False)[..., : y.shape[-2], : y.shape[-1]]
    return (y / u.clamp_min(LEAST)).clamp(0, 1)


class Illumination(nn.Module):
    """``T = I + alpha (D_net o D_num - I)`` for ``min_u ||u - phi(y)||^2 + psi(u)``, ``max_c y <= u <= 1``.

        D_num(u) = u - 2 gamma (u - phi(y)),   D_net(u) = Proj_[max y, 1](s N(u / s; y))

    N (`Cells`) is 1-Lipschitz in u whatever it sees of y, projections are, D_num has ``|1 - 2 gamma|``: T is a contraction
    with ``1 - alpha (1 - |1 - 2 gamma|)``, as Theorem 3.2 asks: one fixed point from every start.  (The theorem also asks
    for smooth derivatives, which ReLU lacks, so what it says of hypergradients is not promised here.)
    ``phi = (s / t) (m / s)^p``, m the smoothed channel maximum, s its upper quartile: p flattens the light, t is the
    exposure, both learned; the channel maximum itself is p = t = 1.  u lives on means over ``block x block`` pixels.
    ``given`` is what T takes from y, ``map`` is T and its start.  Raises ``ValueError`` for a gamma outside (0, 1/2].
    Eq: HODL (3).  Source: HODL section 4.3, low-light enhancement.
    """

    def __init__(
        self,
        width: int = 12,
        cells: Sequence[Sequence[str]] = 3 * (tuple(OPERATIONS),),
        depth: int = 5,
        alpha: float = 0.9,
        gamma: float = 0.25,
        block: int = 4,
    ):
        super().__init__()
        if not 0 < gamma <= 0.5:
            raise ValueError(f"gamma: expected a number in (0, 1/2], for D_num to be non-expansive, got {gamma}")
        self.config: dict[str, Any] = {"width": width, "cells": [list(names) for names in cells], "depth": depth}
        self.config |= {"alpha": alpha, "gamma": gamma, "block": block}
        self.depth, self.alpha, self.gamma, self.block = depth, alpha, gamma, block
        self.power, self.exposure = nn.Parameter(torch.tensor(0.4)), nn.Parameter(torch.tensor(0.65))
        self.net = Cells(width, cells)
        self.look = nn.Sequential(  # what N sees of y, any function of it
            nn.Conv2d(9, 2 * width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=2, dilation=2), nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=4, dilation=4), nn.ReLU(),
            nn.Conv2d(2 * width, len(cells) * width, 1),
        )  # fmt: skip
        nn.init.zeros_(self.look[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.look[-1].bias)  # type: ignore[arg-type]

    def given(self, y: Tensor) -> Seen:
        """From a picture ``(B, 3, H, W)`` in [0, 1]."""
        colours = coarse(y, self.block)
        floor = colours.amax(1, keepdim=True).clamp(LEAST, 1)
        scale = floor.flatten(1).quantile(0.75, 1).view(-1, 1, 1, 1)
        m = smoothed(floor / scale, 4).clamp_min(0.02)
        return Seen(colours, floor, (scale / self.exposure * m**self.power).clamp(max=1).maximum(floor), scale)

    def context(self, seen: Seen) -> Tensor:
        """What the cells are given of the picture: colours and light relative to s, and four numbers of the whole."""
        bright = (seen.floor / seen.scale).log()
        whole = [seen.scale.log() + 3, bright.mean((2, 3), keepdim=True)]
        whole.append((bright.var((2, 3), correction=0, keepdim=True) + 1e-8).sqrt())
        whole.append((seen.colours.mean((2, 3), keepdim=True) / seen.scale).amin(1, keepdim=True))
        parts = [seen.colours / seen.scale, bright, seen.phi / seen.scale, *(w.expand_as(bright) for w in whole)]
        return self.look(torch.cat(parts, 1))

    def map(self, seen: Seen) -> tuple[Map, Tensor]:
        """``T(u, params, k)``, params unused, and ``u^0 = phi``.  Eq: HODL (3)."""
        context = self.context(seen)
        D_num = gradient_descent(lambda u, params: 2 * (u - seen.phi), self.gamma)

        def D_net(u: Tensor, params: Any, k: int) -> Tensor:
            return (seen.scale * self.net(u / seen.scale, context)).clamp(max=1).maximum(seen.floor)

        return averaged(compose(D_net, D_num), self.alpha), seen.phi

    def rate(self) -> float:
        """A Lipschitz constant of T: ``1 - alpha + alpha bound(N) |1 - 2 gamma|``."""
        return 1 - self.alpha + self.alpha * self.net.bound() * abs(1 - 2 * self.gamma)
