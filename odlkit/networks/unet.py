"""A compact U-shaped network in the manner of DRUNet, every sum an average, so that a Lipschitz bound is a short product."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.nn.utils import parametrizations, parametrize

from odlkit.networks.normalize import OperatorNorm, conv_norm_bound, kernels, reshaped_norm


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


def convolutions(net: UNet) -> Iterator[tuple[Any, int | None]]:
    """Every convolution, with how many of its input channels depend on the image: of the first all but the noise level."""
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            yield layer, layer.in_channels - 1 if layer is net.head else None


def norm_bound(layer: Any, channels: int | None = None, n: int = 32) -> float:
    """A bound on a convolution's norm; exact where blocks do not overlap (2x2, stride 2), and for the transpose."""
    if layer.stride == layer.kernel_size:
        return reshaped_norm(layer.weight)
    return conv_norm_bound(kernels(layer.weight, channels or layer.in_channels), n)


def lipschitz(net: UNet, n: int = 32) -> float:
    """A number L with ``||G(u; alpha) - G(v; alpha)|| <= L ||u - v||``, sides being multiples of ``fold 2^(scales - 1)``.

    ReLU and the rearrangement of pixels have slope 1.  A block has ``(1 - theta) + theta s_1 s_2``, a scale
    ``dec (1 + up inner down) / 2 enc``: at most 1 when every norm is.  Source: HODL Assumption 3.2, spectral normalization.
    """
    norm = {layer: norm_bound(layer, channels, n) for layer, channels in convolutions(net)}

    def chain(blocks: Any) -> float:
        return math.prod(1 - b.theta + b.theta * norm[b.first] * norm[b.second] for b in blocks)

    bound = chain(net.encoders[-1])
    for i in reversed(range(len(net.downs))):
        bound = chain(net.decoders[i]) * (1 + norm[net.ups[i]] * bound * norm[net.downs[i]]) / 2 * chain(net.encoders[i])
    return norm[net.head] * bound * norm[net.tail]


def as_identity(net: UNet, offset: float = 1.0) -> UNet:
    """Weights with which ``net`` maps an image to itself, every norm 1; changes and returns ``net``.

    A random isometry carries the image into the channels, another one at each change of scale, its transpose back.  ReLU
    works on values shifted by ``offset``, so the identity is exact while they stay above ``-offset``.  From random weights
    of norm 1 an image would leave such a network as a faint blur of itself, and training spends its time undoing that.
    Raises ``ValueError`` unless each scale has four times the channels that the scale above it needs.
    """
    used = net.head.in_channels - 1
    widths = net.config["widths"]
    if any(width < used * 4**i for i, width in enumerate(widths)):
        raise ValueError(f"widths: expected at least {[used * 4**i for i in range(len(widths))]}, got {widths}")

    def isometry(rows: int, columns: int) -> Tensor:
        return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64))[0]

    with torch.no_grad():
        for layer, _ in convolutions(net):
            layer.weight.zero_()
            layer.bias.zero_()
        basis = isometry(widths[0], used)  # the channels' values are its combinations
        net.head.weight[:, :used, 1, 1] = basis.to(net.head.weight)
        net.tail.weight[:, :, 1, 1] = basis.T.to(net.tail.weight)
        changes: Any = zip(net.downs, net.ups, strict=True)
        for down, up in changes:
            spread = torch.einsum("cj,tu->cjtu", basis, torch.eye(4, dtype=torch.float64)).permute(0, 2, 1, 3).flatten(2)
            basis = isometry(down.out_channels, spread.shape[2])
            matrix = torch.einsum("bj,ctj->bct", basis, spread).unflatten(2, (2, 2))
            down.weight.copy_(matrix)
            up.weight.copy_(matrix)
        blocks: Any = (m for m in net.modules() if isinstance(m, Block))
        for block in blocks:
            for layer, shift in ((block.first, offset), (block.second, -offset)):
                nn.init.dirac_(layer.weight)
                layer.bias.fill_(shift)
    return net


def normalized(net: UNet, size: int = 16) -> UNet:
    """Keep every convolution of ``net`` at norm 1 while it is trained (`OperatorNorm`); changes and returns ``net``.

    Estimates from below, so `certified` has the last word.  Source: HODL section 4.2, spectral normalization.
    """
    for layer, channels in convolutions(net):
        if layer.stride == layer.kernel_size:
            parametrizations.spectral_norm(layer, dim=0)
        else:
            count = channels or layer.in_channels
            parametrize.register_parametrization(layer, "weight", OperatorNorm(layer.weight, count, 1.0, size))
    return net


def certified(net: UNet, n: int = 32, margin: float = 0.0) -> UNet:
    """A copy with plain weights and every norm at most ``1 - margin``, so ``lipschitz(copy, n) <= 1``; biases stay.

    The margin is for rounding that comes later, to half precision in a file, say.
    """
    plain = UNet(**net.config).to(net.head.weight)
    with torch.no_grad():
        for (old, channels), (new, _) in zip(convolutions(net), convolutions(plain), strict=True):
            new.bias.copy_(old.bias)
            new.weight.copy_(old.weight)
            slack = 1 - margin - 32 * torch.finfo(new.weight.dtype).eps  # the rounding of the product below
            new.weight.mul_(min(1.0, slack / norm_bound(new, channels, n)))
    return plain
