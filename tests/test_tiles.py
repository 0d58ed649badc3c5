"""Tiles: what is local in a network leaves no trace, no seam is seen in what is not, and what cannot be is refused."""

import pytest
import torch

from odlkit import weights
from odlkit.data import sample
from odlkit.models.dgunet import DGUNet
from odlkit.tasks.tiles import tiled


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (65, 200), (129, 300)])
@pytest.mark.parametrize(("tile", "overlap", "multiple"), [(64, 32, 8), (71, 50, 8), (64, 0, 8), (33, 32, 1), (96, 33, 32)])
def test_tiles_of_the_identity_are_the_picture(size, tile, overlap, multiple):
    y, parts = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)), []

    def run(part):
        parts.append(part.shape[-2:])
        return part

    assert torch.equal(tiled(run, y, tile, overlap, multiple=multiple), y)
    assert max(max(part) for part in parts) <= tile
    assert (len(parts) == 1) == (max(size) <= tile)


def test_every_square_begins_at_a_multiple():
    """A map that depends on the position modulo 8, as a network with three halvings does, is the same in tiles."""

    def run(part):
        rows, columns = (torch.arange(n) % 8 for n in part.shape[-2:])
        return part + rows[:, None] + 10 * columns

    y = torch.rand(1, 1, 150, 203, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(tiled(run, y, 64, 30), run(y), atol=1e-5)
    assert not torch.allclose(tiled(run, y, 64, 30, multiple=1), run(y), atol=1e-5)


def test_the_weights_add_to_one_and_change_slowly():
    """Squares that differ by a level, the worst a global mean can do: steps without overlap, a slope with it."""
    levels = iter(torch.arange(100.0))
    y = torch.zeros(1, 1, 60, 300)
    x = tiled(lambda part: part + next(levels), y, 60, 32, multiple=4)
    assert (x[..., 1:] - x[..., :-1]).abs().max() < 1.6 / 32  # 1.5 / overlap is the steepest slope of the cubic
    assert x.min() == 0 and x.max() == next(levels) - 1 and bool((x.diff() >= 0).all())


def test_what_does_not_fit_is_refused():
    y = torch.zeros(1, 1, 100, 100)
    with pytest.raises(ValueError, match="^tile: expected at least 40 pixels, .* got 39"):
        tiled(lambda part: part, y, 39)
    with pytest.raises(ValueError, match="^overlap: expected at least 0"):
        tiled(lambda part: part, y, 64, -1)
    with pytest.raises(ValueError, match="^run: expected images"):
        tiled(lambda part: part[..., 1:], y, 64)


def jumps(x, columns) -> torch.Tensor:
    """Mean absolute difference between each of the columns and the one before."""
    return torch.stack([(x[..., c] - x[..., c - 1]).abs().mean() for c in columns])


@pytest.mark.parametrize("name", ["untrained", "dgunet-derain", "dgunet-denoise"])
def test_seams_of_dgunet_are_invisible(name):
    """Its instance norm and attention take means over the square, so squares differ; seams show without overlap only."""
    torch.manual_seed(0)
    if name == "untrained":
        net = DGUNet("derain", width=8, step=4, tail=4, stages=3, scales=3, fused=2).eval()
    elif name in weights.cards():
        net = weights.load(name)
    else:
        pytest.skip(f"no weights {name}")
    channels, size = net.setting.channels, 64
    y = sample("astronaut", 192).mT[..., 32:104, :] + 0.1 * torch.randn(1, 3, 72, 192)
    y = (y if channels == 3 else y.mean(1, keepdim=True)).contiguous()

    def run(part):
        with torch.no_grad():
            return net(part)[-1]

    whole, found = run(y), {}
    for overlap, starts in ((0, (0, 64, 128)), (32, (0, 32, 64, 96, 128))):
        error = tiled(run, y, size, overlap) - whole
        borders = sorted({*starts[1:]} | {s + size for s in starts if s + size < 192})
        rest = [c for c in range(4, 188) if min(abs(c - b) for b in borders) > 4]
        found[overlap] = jumps(error, borders).max(), jumps(error, rest).median()
    seam, elsewhere = found[32]
    assert seam < 0.2 * jumps(whole, borders).mean() and seam < 3 * elsewhere
    assert found[0][0] > 3 * seam
