"""Features for few-shot learning: a few convolutions, whatever the classes."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as nnf


class Features(nn.Sequential):
    """Four blocks of convolution with stride 2, normalization and ReLU: ``(B, C, h, w) -> (B, width h' w')``, of length 1.

    ``h' = ceil(h / 16)``.  Of length 1, so that the head's curvature does not depend on the scale of a layer.
    """

    def __init__(self, width: int = 64, channels: int = 1):
        def block(inside: int) -> list[nn.Module]:
            return [nn.Conv2d(inside, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]

        super().__init__(*block(channels), *block(width), *block(width), *block(width), nn.Flatten())
        self.config = {"width": width, "channels": channels}

    def forward(self, x: Tensor) -> Tensor:
        return nnf.normalize(super().forward(x), dim=1)
