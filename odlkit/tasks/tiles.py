"""Pictures that do not fit into memory: restored square by square, the squares overlapping and blended."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from odlkit.tasks.report import Outcome

OVERLAP = 64  # pixels that the squares of a network share


def in_parts(
    run: Callable[[Tensor], Outcome],
    y: Tensor,
    tile: int | None,
    overlap: int = OVERLAP,
    progress: bool = False,
    multiple: int = 8,
) -> tuple[Tensor, list[Outcome]]:
    """What ``run`` restores of ``y`` ``(B, C, H, W)`` and its outcomes: as a whole, or in `tiled` squares.

    Each square is ``overlap`` pixels larger than ``tile``, which is how far it may be from the next.  Raises ``ValueError``
    for a tile below 16 pixels or below ``multiple``.
    """
    outcomes: list[Outcome] = []

    def part(z: Tensor) -> Tensor:
        outcomes.append(run(z))
        return outcomes[-1].x

    if tile is None:
        return part(y), outcomes
    if tile < max(16, multiple):
        raise ValueError(f"tile: expected at least {max(16, multiple)} pixels, got {tile}")
    return tiled(part, y, tile + overlap, overlap, progress, multiple), outcomes


def tiled(
    run: Callable[[Tensor], Tensor], y: Tensor, tile: int, overlap: int = 32, progress: bool = False, multiple: int = 8
) -> Tensor:
    """``run`` on squares of ``tile`` pixels of ``y`` ``(B, C, H, W)``, each overlapping the next by ``overlap`` or more.

    Where squares overlap, the weight of the new one rises smoothly from 0 to 1 while that of the old one falls to 0 (a
    partition of unity): what is local in ``run`` leaves no seam, and a mean over the square, as in instance norm, a slope.
    Squares begin at multiples of ``multiple``, the block of the coarsest scale or of a measurement; ``tile`` is rounded
    down to it, ``overlap`` up.  ``run`` maps ``(B, C, h, w)`` to the same shape, ``h, w <= tile``.  Raises ``ValueError``
    where it does not, and for a tile that the overlap fills.
    """
    from tqdm import tqdm

    if overlap < 0 or multiple < 1:
        raise ValueError(f"overlap: expected at least 0 pixels and multiple at least 1, got {overlap} and {multiple}")
    overlap = -(-overlap // multiple) * multiple
    if tile < overlap + multiple:
        raise ValueError(f"tile: expected at least {overlap + multiple} pixels, more than the squares overlap, got {tile}")
    tile = tile // multiple * multiple
    rows, columns = (_starts(size, tile, overlap, multiple) for size in y.shape[-2:])
    x, told = torch.empty_like(y), tqdm(desc="tiles", delay=3, leave=False, disable=not progress)
    for i in rows:
        band = torch.empty_like(y[..., i : i + tile, :])
        for j in columns:
            part = y[..., i : i + tile, j : j + tile]
            restored = run(part)
            if restored.shape != part.shape:
                raise ValueError(f"run: expected images {tuple(part.shape)}, got {tuple(restored.shape)}")
            _paste(band, restored, j, columns, tile)
            told.update()
        _paste(x.mT, band.mT, i, rows, tile)  # rows are the columns of the transpose
    return x


def _starts(size: int, tile: int, overlap: int, multiple: int) -> list[int]:
    """Where squares begin along a side: evenly spread, at multiples of ``multiple``, the last one reaching the end."""
    count = max(-(-(size - tile) // (tile - overlap)), 0)
    return [0] + [-(-(k * (size - tile)) // (count * multiple)) * multiple for k in range(1, count + 1)]


def _paste(x: Tensor, part: Tensor, start: int, starts: list[int], tile: int) -> None:
    """Write ``part`` into the columns of ``x`` from ``start`` on, blending it with what is there."""
    before = starts.index(start)
    known = starts[before - 1] + tile - start if before else 0  # columns that the part before has written
    t = (torch.arange(known, device=x.device, dtype=x.dtype) + 0.5) / max(known, 1)
    ramp = t * t * (3 - 2 * t)
    old = x[..., start : start + known]
    x[..., start : start + part.shape[-1]] = torch.cat([old.lerp(part[..., :known], ramp), part[..., known:]], dim=-1)
