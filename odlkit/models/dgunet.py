"""DGUNet: proximal gradient descent unfolded, its gradient learned where A is unknown, its stages joined by features.

A stage is ``v = x - rho A^T (A x - y)`` (6), or with learned ``A, A^T`` (7), then ``x+, F+ = prox(v, F)`` (9): an hourglass
network that sees the features F of the stage before.  (The paper's Algorithm 1 has (6) and (7) exchanged.)
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from odlkit.linear import LinearMap
from odlkit.networks.hourglass import ChannelAttention, Features, Hourglass, Projection, Supervised
from odlkit.operators import BlockSampling


@dataclass(frozen=True)
class Setting:
    """The numbers of a DGUNet: image ``channels``; ``width + step n`` channels at scale n; ``tail`` more before the last
    convolution; ``stages``, of which the middle ones share their weights if ``shared``; ``scales``; how many ``fused``.

    ``known`` = the operator is given, not learned.  ``sensing`` = the released compressive sensing: plain fusion and
    merging, a mask in SAM.  ``text`` = every part as the paper's text has it, the last stage a full one.
    """

    channels: int = 3
    width: int = 40
    step: int = 20
    tail: int = 16
    stages: int = 7
    shared: bool = True
    scales: int = 4
    fused: int = 3
    known: bool = False
    sensing: bool = False
    text: bool = False

    def __post_init__(self) -> None:
        if self.stages < 2:
            raise ValueError(f"stages: expected at least 2, got {self.stages}")
        if not 0 <= self.fused < self.scales:
            raise ValueError(f"fused: expected 0 to {self.scales - 1} (scales - 1), got {self.fused}")

    @property
    def widths(self) -> list[int]:
        """Channels at each scale, finest first."""
        return [self.width + n * self.step for n in range(self.scales)]


SETTINGS = {
    "derain": Setting(),
    "derain+": Setting(shared=False),
    "deblur": Setting(width=80, step=48, tail=32),
    "deblur+": Setting(width=96, step=48, shared=False),
    "denoise": Setting(width=80, step=48, tail=32),
    "denoise+": Setting(width=80, step=40, shared=False),
    "sensing": Setting(channels=1, width=32, step=16, tail=16, known=True, sensing=True),
    "sensing+": Setting(channels=1, width=32, step=16, shared=False, known=True, sensing=True),
    "text": Setting(scales=3, fused=2, text=True),
}


class LearnedMap(nn.Module):
    """``x + W_2 prelu(W_1 x)``: the stand-in for ``A`` or ``A^T``.  Eq: DGUNet (7)."""

    def __init__(self, channels: int, width: int = 64):
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.second = nn.Conv2d(width, channels, 3, padding=1)
        self.bend = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.bend(self.first(x)))


class GradientStep(nn.Module):
    """FGDM: ``v = x - rho A^T (A x - y)``, rho learned (from 1/2), with ``operator`` for A or two learned maps.

    A gradient step of ``||A x - y||^2 / 2``, which shrinks distances iff ``0 <= rho <= 2 / ||A||^2``.  Nothing keeps the
    learned rho there, and the learned maps are no adjoints of each other.  Eq: DGUNet (6), (7).
    """

    def __init__(self, channels: int, known: bool):
        super().__init__()
        self.rho = nn.Parameter(torch.tensor(0.5))
        self.A = None if known else LearnedMap(channels)
        self.At = None if known else LearnedMap(channels)

    def forward(self, x: Tensor, y: Tensor, operator: LinearMap | None) -> Tensor:
        if self.A is None or self.At is None:
            assert operator is not None
            return x - self.rho * operator.A_adjoint(operator.A(x) - y)
        return x - self.rho * self.At(self.A(x) - y)


class Stage(nn.Module):
    """``(x, F) -> (x+, F+)``: gradient step, shallow features, merged with what the stage before sends, the hourglass.

    ``place`` is "first" (nothing arrives), "middle", or "last" (released: no hourglass, one convolution makes the image).
    """

    def __init__(self, s: Setting, place: str):
        super().__init__()
        w = s.width
        self.gradient = GradientStep(s.channels, s.known)
        self.shallow = nn.Sequential(nn.Conv2d(s.channels, w, 3, padding=1, bias=False), ChannelAttention(w))
        self.merge: nn.Module | None = None
        self.short = place == "last" and not s.text
        plain = s.sensing or (self.short and s.shared)  # as released: DGUNet+ projects in its last stage too
        wide = w + s.tail if self.short and plain else w
        if place != "first":
            self.merge = nn.Conv2d(2 * w, wide, 3, padding=1, bias=False) if plain else Projection(w)
        if self.short:
            self.tail = nn.Conv2d(wide, s.channels, 3, padding=1, bias=False)
        else:
            self.hourglass = Hourglass(s.widths, s.fused if place != "first" else 0, s.text, s.sensing)
            self.supervised = Supervised(w, s.channels, s.sensing or s.text, place == "last")

    def forward(
        self, x: Tensor, y: Tensor, operator: LinearMap | None, sent: Tensor | None, before: Features | None
    ) -> tuple[Tensor, Tensor | None, Features | None]:
        v = self.gradient(x, y, operator)
        f = self.shallow(v)
        if self.merge is not None and sent is not None:
            f = self.merge(f, sent) if isinstance(self.merge, Projection) else self.merge(torch.cat([f, sent], dim=1))
        if self.short:
            return (v if operator is not None else y) + self.tail(f), None, None
        f, features = self.hourglass(f, before)
        sent, image = self.supervised(f, v)
        return image, sent, features


class DGUNet(nn.Module):
    """``stages`` stages; called as ``net(y)`` or ``net(y, operator)``: the images ``x^1 ... x^K``, the last is the answer.

    ``y`` is ``(B, C, H, W)`` in [0, 1], or what the operator measures; it starts at ``x^0 = y`` or ``x0``, by default ``A^T
    y``.  Sides of any size: they are padded by their border to multiples of ``2^(scales - 1)`` inside, where A is learned;
    a known operator fixes its sizes, and ``ValueError`` is raised for others.  ``checkpoint`` rebuilds each stage in the
    backward pass instead of storing it.  Eq: DGUNet (9), Algorithm 1 with (6) and (7) in their places.
    """

    def __init__(self, setting: Setting | str = "derain", checkpoint: bool = False, **changes: Any):
        super().__init__()
        if isinstance(setting, str):
            if setting not in SETTINGS:
                raise ValueError(f"setting: expected one of {', '.join(SETTINGS)}, got {setting!r}")
            setting = SETTINGS[setting]
        self.setting = s = replace(setting, **changes)
        self.config, self.checkpoint = asdict(s), checkpoint
        self.first, self.last = Stage(s, "first"), Stage(s, "last")
        middle = s.stages - 2
        self.middle = nn.ModuleList(Stage(s, "middle") for _ in range(min(1, middle) if s.shared else middle))

    def stage(self, k: int) -> Stage:
        """The stage that iteration k = 0, 1, ... runs; beyond the last but one of a shared network the middle again."""
        if k == 0:
            return self.first
        return self.middle[0 if self.setting.shared else min(k - 1, len(self.middle) - 1)]  # type: ignore[return-value]

    def forward(
        self, y: Tensor, operator: LinearMap | None = None, x0: Tensor | None = None, stages: int | None = None
    ) -> list[Tensor]:
        s, block = self.setting, 1 << (self.setting.scales - 1)
        if (operator is not None) != s.known:
            raise ValueError(f"operator: expected {'one' if s.known else 'none'} for this setting, got {operator}")
        count = s.stages if stages is None else stages
        if count < 2:
            raise ValueError(f"stages: expected at least 2, got {count}")
        if count > 2 and not self.middle:
            raise ValueError(f"stages: expected 2 of a network without a middle stage, got {count}")
        x = (y if operator is None else operator.A_adjoint(y)) if x0 is None else x0
        if x.dim() != 4 or x.shape[1] != s.channels:
            raise ValueError(f"y: expected images (B, C, H, W) of {s.channels} channels, got {tuple(x.shape)}")
        height, width = x.shape[-2:]
        single = operator is None and max(height, width) <= block  # whose instance norm would have one value
        pad = (0, -width % block + block * single, 0, -height % block)
        if any(pad):
            if operator is not None:
                raise ValueError(f"y: expected an image of sides that are multiples of {block}, got {(height, width)}")
            x, y = (nnf.pad(t, pad, mode="replicate") for t in (x, y))
        images = []
        sent: Tensor | None = None
        features: Features | None = None
        for k in range(count):
            stage = self.last if k == count - 1 else self.stage(k)
            if self.checkpoint and torch.is_grad_enabled():
                from torch.utils.checkpoint import checkpoint

                x, sent, features = checkpoint(stage, x, y, operator, sent, features, use_reentrant=False)
            else:
                x, sent, features = stage(x, y, operator, sent, features)
            images.append(x[..., :height, :width])
        return images


class Sensing(nn.Module):
    """Compressive sensing with a learned matrix: ``y = Phi vec(block)`` for each block, recovered by a `DGUNet`.

    ``Phi`` is ``(ceil(ratio size^2), size^2)``, trained with the network and shared by all blocks; it starts with
    orthonormal rows (the released models: Xavier normal) and nothing keeps them so.  The network sees the whole picture in
    every stage, so the borders of blocks are its business too.  Source: DGUNet section 4.5.
    """

    def __init__(self, ratio: float, size: int = 32, **changes: Any):
        super().__init__()
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio: expected a share of measurements in (0, 1], got {ratio}")
        self.net = DGUNet("sensing", **changes)
        rows = math.ceil(ratio * size**2)
        self.phi = nn.Parameter(torch.linalg.qr(torch.randn(size**2, rows, dtype=torch.float64))[0].T.float().contiguous())
        self.config = {"ratio": ratio, "size": size, **self.net.config}

    @property
    def operator(self) -> BlockSampling:
        """A, on pictures whose sides are multiples of the block."""
        return BlockSampling(self.phi)

    def check(self, y: Tensor) -> None:
        """Raise ``ValueError`` unless ``y`` has the shape of measurements, ``(B, M, H / size, W / size)``."""
        if y.dim() != 4 or y.shape[1] != len(self.phi) or 0 in y.shape:
            expected = f"measurements (B, {len(self.phi)}, h, w), {len(self.phi)} of each block"
            raise ValueError(f"y: expected {expected}, got {tuple(y.shape)}")

    def forward(self, y: Tensor) -> list[Tensor]:
        """``x^1 ... x^K`` from measurements ``(B, M, H / size, W / size)``; raises ``ValueError`` for other shapes."""
        self.check(y)
        return self.net(y, self.operator)
