"""A compact U-shaped network in the manner of DRUNet, every sum an average, so that a Lipschitz bound is a short product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf


class Block(nn.Module):
    """``x -> (1 - theta) x + theta W_2 relu(W_1 x)``, theta = 1/2: the residual block as an average."""

    theta = 0.5

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(x, self.second(nnf.relu_(self.first(x))), self.theta)


class UNet(nn.Module):
    """``G(v; alpha)``: an image rearranged into ``fold^2`` small channels, then one scale for each width.

    On the way down residual blocks and a 2x2 convolution of stride 2, on the way up its transpose and blocks; a skip
    connection takes the mean of what it joins.  The noise level ``alpha`` (a float or ``(B, 1, 1, 1)``) enters as one
    constant channel.  ``v`` and the result are ``(B, C, H, W)``; sides that are no multiples of ``fold 2^(scales - 1)``
    are padded inside and cropped again.  Source: HODL section 6.2, DRUNet, with averages in place of sums.
    """

    def __init__(self, channels: int = 1, widths: tuple[int, ...] = (32, 64, 96), blocks: int = 1, fold: int = 2):
        super().__init__()
        self.config: dict[str, Any] = {"channels": channels, "widths": list(widths), "blocks": blocks, "fold": fold}
        inside, self.fold = channels * fold**2, fold
        self.head = nn.Conv2d(inside + 1, widths[0], 3, padding=1)
        self.tail = nn.Conv2d(widths[0], inside, 3, padding=1)
        self.encoders = nn.ModuleList(nn.Sequential(*(Block(w) for _ in range(blocks))) for w in widths)
        self.decoders = nn.ModuleList(nn.Sequential(*(Block(w) for _ in range(blocks))) for w in widths[:-1])
        pairs = list(zip(widths, widths[1:], strict=False))
        self.downs = nn.ModuleList(nn.Conv2d(fine, coarse, 2, stride=2) for fine, coarse in pairs)
        self.ups = nn.ModuleList(nn.ConvTranspose2d(coarse, fine, 2, stride=2) for fine, coarse in pairs)

    def forward(self, v: Tensor, alpha: Tensor | float) -> Tensor:
        (height, width), block = v.shape[-2:], self.fold << len(self.downs)
        pad = (-width % block, -height % block)
        z = nnf.pad(v, (0, pad[0], 0, pad[1]), mode="replicate") if any(pad) else v
        z = nnf.pixel_unshuffle(z, self.fold)  # (B, C fold^2, H / fold, W / fold)
        level = torch.as_tensor(alpha, dtype=v.dtype, device=v.device).expand(len(v), 1, 1, 1)
        z = torch.cat([z, level.expand(-1, 1, *z.shape[-2:])], dim=1)
        z = self.tail(self.scale(self.head(z.contiguous(memory_format=torch.channels_last)), 0))
        return nnf.pixel_shuffle(z, self.fold)[..., :height, :width].to(v.dtype)

    def scale(self, z: Tensor, i: int) -> Tensor:
        """What happens at scale ``i`` and below it."""
        z = self.encoders[i](z)
        if i == len(self.downs):
            return z
        return self.decoders[i](torch.lerp(z, self.ups[i](self.scale(self.downs[i](z), i + 1)), 0.5))
