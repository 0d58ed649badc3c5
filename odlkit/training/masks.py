"""Masks to train and test interpolation on, 1 = known: pixels missing at random, and text."""

from __future__ import annotations

import string

import numpy as np
import torch
from torch import Tensor


def missing_at_random(share: float, height: int, width: int, generator: torch.Generator) -> Tensor:
    """``(1, 1, height, width)`` with the share of zeros given, the same pixels in all channels."""
    return (torch.rand(1, 1, height, width, generator=generator) >= share).float()


def text(height: int, width: int, generator: torch.Generator) -> Tensor:
    """``(1, 1, height, width)``: lines of random letters, zero where the ink is; the font is Pillow's own."""
    from PIL import Image, ImageDraw, ImageFont

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    page = Image.new("L", (width, height), 255)
    pen, size = ImageDraw.Draw(page), round(uniform(12, 26))
    font, letters = ImageFont.load_default(size), string.ascii_letters + string.digits + "    "
    line = uniform(-size, 0)
    while line < height:
        draw = torch.randint(len(letters), (width // 4,), generator=generator).tolist()
        pen.text((uniform(-size, 0), line), "".join(letters[i] for i in draw), font=font, fill=0)
        line += size * uniform(1.1, 1.6)
    return torch.from_numpy(np.array(page) > 127).float()[None, None]


def random_mask(height: int, width: int, generator: torch.Generator) -> Tensor:
    """One mask: 75% pixels missing at random, a share between 0.1 and 0.9; 25% text."""
    kind, share = torch.rand(2, generator=generator).tolist()
    return text(height, width, generator) if kind < 0.25 else missing_at_random(0.1 + 0.8 * share, height, width, generator)
