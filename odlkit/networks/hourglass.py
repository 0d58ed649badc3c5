"""The parts of DGUNet's proximal mapping: attention, an hourglass of scales, and what passes from a stage to the next.

``text=True`` builds what the paper's text says, ``text=False`` what the released models are; the two differ in almost every
part (see the errata).  A part does not know which stage it is in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf


class Features(NamedTuple):
    """What one stage hands to the next: encoder and decoder features, finest scale first, ``(B, w, H / 2^n, W / 2^n)``."""

    encoder: list[Tensor]
    decoder: list[Tensor]


class ChannelAttention(nn.Module):
    """``x + a(r) r``, ``r`` two convolutions of ``x`` and ``a`` in (0, 1) a weight a channel, from the means of ``r``.

    DGUNet's CAB, on ``(B, C, H, W)``.  Source: DGUNet section 3.2.
    """

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.PReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False)
        )
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(width, width // 4, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(width // 4, width, 1, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        r = self.body(x)
        return x + self.attention(r) * r


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions from ``inside`` to ``outside`` channels around a shortcut, no batch normalization.

    Released: leaky ReLU after each, the shortcut a 1x1 convolution and, with ``norm``, instance normalization of half of the
    channels.  Text: PReLU between them, the shortcut the identity where the widths agree.
    """

    def __init__(self, inside: int, outside: int, norm: bool = False, text: bool = False):
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, padding=1)
        self.second = nn.Conv2d(outside, outside, 3, padding=1)
        self.shortcut = nn.Identity() if text and inside == outside else nn.Conv2d(inside, outside, 1)
        self.norm = nn.InstanceNorm2d(outside // 2, affine=True) if norm and not text else None
        self.bend: nn.Module = nn.PReLU() if text else nn.LeakyReLU(0.2, inplace=True)
        self.end: nn.Module = nn.Identity() if text else nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        if self.norm is not None:
            half, rest = z.chunk(2, dim=1)
            z = torch.cat([self.norm(half), rest], dim=1)
        return self.end(self.second(self.bend(z))) + self.shortcut(x)


class Fusion(nn.Module):
    """ISFF: the features of the previous stage change those of this one, where and how much they say.

    ``F = F^ * alpha + beta`` with ``alpha, beta`` computed from ``H = e(F_enc) + d(F_dec)`` of the previous stage.
    Released: 3x3 convolutions, a leaky ReLU on H, ``alpha = 1 + sigmoid``; text: 1x1 convolutions.  ``plain`` is the
    released compressive sensing: ``F^ + e(F_enc) + d(F_dec)``, and the paper's "without spatial modulation".
    Eq: DGUNet (8).
    """

    def __init__(self, encoder: int, decoder: int, text: bool = False, plain: bool = False):
        super().__init__()
        size = 1 if text else 3
        self.text, self.plain = text, plain
        self.e = nn.Conv2d(encoder, encoder, size, padding=size // 2)
        self.d = nn.Conv2d(decoder, encoder, size, padding=size // 2)
        if not plain:
            self.alpha = nn.Conv2d(encoder, encoder, size, padding=size // 2)
            self.beta = nn.Conv2d(encoder, encoder, size, padding=size // 2)

    def forward(self, f: Tensor, encoder: Tensor, decoder: Tensor) -> Tensor:
        h = self.e(encoder) + self.d(decoder)
        if self.plain:
            return f + h
        if self.text:
            return f * self.alpha(h) + self.beta(h)
        h = nnf.leaky_relu_(h, 0.1)  # in place: the backward pass needs one of the two
        return f + f * self.alpha(h).sigmoid() + self.beta(h)


class Up(nn.Module):
    """Twice the size: a 2x2 transposed convolution (released) or bilinear interpolation and a 3x3 convolution (text)."""

    def __init__(self, inside: int, outside: int, text: bool = False):
        super().__init__()
        self.text = text
        self.change: nn.Module
        if text:
            self.change = nn.Conv2d(inside, outside, 3, padding=1)
        else:
            self.change = nn.ConvTranspose2d(inside, outside, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.change(nnf.interpolate(x, scale_factor=2, mode="bilinear") if self.text else x)


class Hourglass(nn.Module):
    """``widths[0]`` channels through ``len(widths)`` scales and back, with skip connections; fused with ``Features``.

    Encoder block j turns ``widths[j]`` channels into ``widths[j + 1]``, before each halving of the size; the last scale
    keeps its width and is not fused.  ``fused`` scales, from the finest, take in the previous stage's features.  Both sides
    must be multiples of ``2^(len(widths) - 1)``.
    """

    def __init__(self, widths: list[int], fused: int = 0, text: bool = False, plain: bool = False):
        super().__init__()
        pairs = list(zip(widths, widths[1:], strict=False))
        self.encoders = nn.ModuleList(ResidualBlock(w, v, True, text) for w, v in pairs)
        self.bottom = ResidualBlock(widths[-1], widths[-1], True, text)
        self.downs = nn.ModuleList(
            nn.MaxPool2d(2) if text else nn.Conv2d(v, v, 4, stride=2, padding=1, bias=False) for _, v in pairs
        )
        self.ups = nn.ModuleList(Up(v, w, text) for w, v in pairs)
        self.skips = nn.ModuleList(nn.Conv2d(v, w, 3, padding=1) for w, v in pairs)
        self.decoders = nn.ModuleList(ResidualBlock(2 * w, w, False, text) for w, _ in pairs)
        self.fusions = nn.ModuleList(Fusion(v, w, text, plain) for w, v in pairs[:fused])

    def forward(self, x: Tensor, before: Features | None = None) -> tuple[Tensor, Features]:
        encoder: list[Tensor] = []
        for j, (block, down) in enumerate(zip(self.encoders, self.downs, strict=True)):
            f = block(x)
            if before is not None and j < len(self.fusions):
                f = self.fusions[j](f, before.encoder[j], before.decoder[j])
            encoder.append(f)
            x = down(f)
        x = self.bottom(x)
        decoder: list[Tensor] = []
        for j in reversed(range(len(self.ups))):
            x = self.decoders[j](torch.cat([self.ups[j](x), self.skips[j](encoder[j])], dim=1))
            decoder.insert(0, x)
        return x, Features(encoder, decoder)


class Supervised(nn.Module):
    """SAM: the stage's image, and the features that go on: ``image = v + c(f)``, ``f + m(image) b(f)``.

    The mask ``m`` is a sigmoid of the image (text, and the released compressive sensing) or 1 (released restoration).
    Where nothing follows (``ends``) there are no features to make.  Source: DGUNet section 3.2, after MPRNet.
    """

    def __init__(self, width: int, channels: int, mask: bool, ends: bool = False):
        super().__init__()
        self.b = nn.Conv2d(width, width, 1, bias=False) if not ends else None
        self.c = nn.Conv2d(width, channels, 1, bias=False)
        self.m = nn.Conv2d(channels, width, 1, bias=False) if mask and not ends else None

    def forward(self, f: Tensor, v: Tensor) -> tuple[Tensor | None, Tensor]:
        image = v + self.c(f)
        if self.b is None:
            return None, image
        mask = self.m(image).sigmoid() if self.m is not None else 1
        return f + mask * self.b(f), image


class Projection(nn.Module):
    """Project the previous stage's features ``g`` on ``rank`` maps found in both, then merge: ``x + c(x, V V^+ g)``.

    ``V`` is a convolution of ``(x, g)``, each map divided by its l1 norm; ``V^+ = (V^T V + r I)^-1 V^T`` with a ridge ``r``
    of ``ridge`` times the mean of the diagonal, without which maps that are alike make the system singular.
    Source: DGUNet section 3.2, after NBNet.
    """

    def __init__(self, width: int, rank: int = 16, ridge: float = 1e-4):
        super().__init__()
        self.basis = nn.Conv2d(2 * width, rank, 3, padding=1)
        self.merge = nn.Conv2d(2 * width, width, 3, padding=1)
        self.ridge = ridge

    def project(self, x: Tensor, g: Tensor) -> Tensor:
        """``V V^+ g``, the shape of ``g``; the small system is solved in float32 whatever the autocast."""
        v = self.basis(torch.cat([x, g], dim=1)).flatten(2)  # (B, rank, H W)
        with torch.autocast(g.device.type, enabled=False):
            v = v if v.dtype == torch.float64 else v.float()
            v = v / (1e-6 + v.abs().sum(2, keepdim=True))
            gram = v @ v.mT  # (B, rank, rank)
            scale = gram.diagonal(dim1=1, dim2=2).mean(1).view(-1, 1, 1)
            eye = torch.eye(v.shape[1], dtype=v.dtype, device=v.device)
            right = v @ g.flatten(2).to(v.dtype).mT  # (B, rank, C)
            codes = torch.linalg.solve(gram / scale + self.ridge * eye, right / scale)
            return (codes.mT @ v).reshape(g.shape)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        return x + self.merge(torch.cat([x, self.project(x, g).to(x.dtype)], dim=1))
