"""GDC's search space: eight operators, a cell as a directed acyclic graph of them, its relaxation and its genotypes.

A genotype is the list of the edges ``[source, target, operator]`` of a cell: node 0 is the input, nodes 1 to 4 are inner
ones, and the output node sees all inner ones.  All cells of a network have the same genotype.  (GDC section V-B.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

NODES = 4  # inner nodes of a cell
Genotype = list[list[Any]]  # [source, target, operator]


def _convolution(inside: int, outside: int, side: int, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, side, padding=dilation * (side // 2), dilation=dilation)


def dilated(side: int, width: int) -> nn.Module:
    """A ``side x side`` convolution of dilation 2, then SiLU."""
    return nn.Sequential(_convolution(width, width, side, 2), nn.SiLU())


class Residual(nn.Module):
    """``x + W_2 s(W_1 x)``, s SiLU."""

    def __init__(self, side: int, width: int):
        super().__init__()
        convolution = partial(_convolution, width, width, side)
        self.body = nn.Sequential(convolution(), nn.SiLU(), convolution())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Dense(nn.Module):
    """``x_1 = s(W_1 x)``, ``x_2 = s(W_2 [x, x_1])``, each half as wide as x; then a 1x1 convolution of ``[x, x_1, x_2]``."""

    def __init__(self, side: int, width: int):
        super().__init__()
        growth = width // 2
        self.grow = nn.ModuleList(_convolution(width + k * growth, growth, side) for k in range(2))
        self.fuse = nn.Conv2d(width + 2 * growth, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        for convolution in self.grow:
            x = torch.cat([x, nnf.silu(convolution(x))], 1)
        return self.fuse(x)


class SpatialAttention(nn.Module):
    """``x`` times a map in (0, 1), made from the mean and the maximum over the channels by a 7x7 convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.gate = _convolution(2, 1, 7)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()


class ChannelAttention(nn.Module):
    """``x`` times one number in (0, 1) for each channel, made from the means over the whole picture by two layers."""

    def __init__(self, width: int):
        super().__init__()
        self.gate = nn.Sequential(nn.Conv2d(width, width // 2, 1), nn.SiLU(), nn.Conv2d(width // 2, width, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean((2, 3), keepdim=True))


OPERATORS: dict[str, Callable[[int], nn.Module]] = {  # name -> width -> module, (B, width, H, W) -> (B, width, H, W)
    "3-DC": partial(dilated, 3),
    "5-DC": partial(dilated, 5),
    "3-RB": partial(Residual, 3),
    "5-RB": partial(Residual, 5),
    "3-DB": partial(Dense, 3),
    "5-DB": partial(Dense, 5),
    "SA": SpatialAttention,
    "CA": ChannelAttention,
}
NAMES = list(OPERATORS)
ALL = [(source, target) for target in range(1, NODES + 1) for source in range(target)]  # the ten edges of a relaxed cell
HAND_MADE: Genotype = [[0, 1, "3-RB"], [1, 2, "3-DB"], [2, 3, "3-DC"], [3, 4, "SA"]]  # the paper's order


def discretise(alpha: Tensor, keep: int = 1) -> Genotype:
    """The strongest operator of each edge, and of these the ``keep`` strongest edges into each node.

    ``alpha`` is ``(10, 8)``, edges in the order of `ALL`; strength is ``softmax(alpha)``, edge by edge, as in DARTS.
    """
    strength, choice = alpha.softmax(1).max(1)
    kept: Genotype = []
    for node in range(1, NODES + 1):
        into = sorted((e for e, edge in enumerate(ALL) if edge[1] == node), key=lambda e: -strength[e].item())[:keep]
        kept += [[*ALL[e], NAMES[int(choice[e])]] for e in sorted(into)]
    return kept


def random_genotype(generator: torch.Generator, keep: int = 1) -> Genotype:
    """As many edges as `discretise` keeps: sources without repetition and operators drawn uniformly."""
    kept: Genotype = []
    for node in range(1, NODES + 1):
        for source in torch.randperm(node, generator=generator)[:keep].sort().values.tolist():
            kept.append([source, node, NAMES[int(torch.randint(len(NAMES), (), generator=generator))]])
    return kept


class Cell(nn.Module):
    """``x + W [n_1 ... n_4]``, ``n_j = sum_{i -> j} o_ij(n_i)``, ``n_0 = x``, W a 1x1 convolution.

    Relaxed (``genotype=None``) every one of the ten edges is ``o_ij = sum_k softmax(alpha_ij)_k o_k`` over the eight
    operators; else an edge is the one operator that the genotype names.  Source: GDC section V-B; DARTS, Eq. 2.
    """

    def __init__(self, width: int, genotype: Genotype | None = None):
        super().__init__()
        self.edges = ALL if genotype is None else [(i, j) for i, j, _ in genotype]
        named = [NAMES] * len(ALL) if genotype is None else [[name] for _, _, name in genotype]
        self.operators = nn.ModuleList(nn.ModuleList(OPERATORS[name](width) for name in names) for names in named)
        self.out = nn.Conv2d(NODES * width, width, 1)

    def forward(self, x: Tensor, mixture: Tensor | None = None) -> Tensor:
        """``mixture`` ``(10, 8)`` are the softmax weights of a relaxed cell."""
        nodes = [x, *[torch.zeros_like(x)] * NODES]
        for e, ((source, target), operators) in enumerate(zip(self.edges, self.operators, strict=True)):
            for k, operator in enumerate(operators):  # type: ignore[arg-type,var-annotated]
                value = operator(nodes[source])
                nodes[target] = nodes[target] + (value if mixture is None else mixture[e, k] * value)
        return x + self.out(torch.cat(nodes[1:], 1))


class CellNet(nn.Module):
    """``u + G(u)`` by cells in a row, or with ``logits=True`` a classifier: the sum of its logits, ``(B,)``.

    The picture is rearranged into four half-size ones, which doubles the receptive field and quarters the cost; the stage's
    level enters as a constant channel.  Odd sizes are padded inside.  The last convolution starts at zero: ``u + G(u) = u``.
    Relaxed, its parameter ``alpha`` ``(10, 8)`` is shared by all cells.

    Shapes: ``u`` is ``(B, C, H, W)``; ``level`` a float or ``(B, 1, 1, 1)``.
    """

    def __init__(
        self, cells: int, genotype: Genotype | None = None, width: int = 8, channels: int = 3, logits: bool = False
    ):
        super().__init__()
        self.logits = logits
        self.head = _convolution(4 * channels + 1, width, 3)
        self.cells = nn.ModuleList(Cell(width, genotype) for _ in range(cells))
        self.tail = _convolution(width, 1 if logits else 4 * channels, 3)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)  # type: ignore[arg-type]
        if genotype is None:
            self.alpha = nn.Parameter(torch.zeros(len(ALL), len(NAMES)))

    def forward(self, u: Tensor, level: Tensor | float) -> Tensor:
        height, width = u.shape[-2:]
        z = nnf.pixel_unshuffle(nnf.pad(u, (0, width % 2, 0, height % 2), mode="replicate"), 2)
        level = torch.as_tensor(level, dtype=u.dtype, device=u.device).expand(len(u), 1, *z.shape[-2:])
        z = self.head(torch.cat([z, level], 1))
        mixture = self.alpha.softmax(1) if hasattr(self, "alpha") else None
        for cell in self.cells:
            z = cell(z, mixture)
        z = self.tail(z)
        return z.sum((1, 2, 3)) if self.logits else u + nnf.pixel_shuffle(z, 2)[..., :height, :width]
