"""The generative module of optical flow: pyramid features, warping, correlation, and a residual of the flow a level."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from odlkit.flow import correlation, resized, warp


class FlowNet(nn.Module):
    """``G(u)`` at the levels 1 to ``levels`` of a pyramid, level l having ``2^-l`` of the pixels a side; one for all levels.

    `features` of both frames; then from coarse to fine `residual`: the second frame's features are warped by the flow so
    far, correlated with the first's within ``radius`` pixels, and three dilated layers turn that, the first frame's
    features and the flow into a correction.  Frames are ``(B, 3, H, W)`` with sides that are multiples of ``2^levels``.
    Source: GDC, section VIII-B.
    """

    def __init__(self, width: int = 16, hidden: int = 32, radius: int = 3, levels: int = 4):
        super().__init__()
        self.config = {"width": width, "hidden": hidden, "radius": radius, "levels": levels}
        self.radius, self.levels = radius, levels
        stages, channels = [], 12  # of the first level: the four pixels of a 2 x 2 square
        for level in range(levels):
            first = nn.Conv2d(channels, width, 3, padding=1, stride=1 if level == 0 else 2)
            stages.append(nn.Sequential(first, nn.LeakyReLU(0.1), nn.Conv2d(width, width, 3, padding=1)))
            channels = width
        self.encoder = nn.ModuleList(stages)
        layers: list[nn.Module] = []
        channels = (2 * radius + 1) ** 2 + width + 2
        for dilation in (1, 2, 4, 1):
            layers += [nn.Conv2d(channels, hidden, 3, padding=dilation, dilation=dilation), nn.LeakyReLU(0.1)]
            channels = hidden
        self.estimator = nn.Sequential(*layers, nn.Conv2d(hidden, 2, 3, padding=1))

    def features(self, frame: Tensor) -> list[Tensor]:
        """The features of the levels 1, 2, ..., each ``(B, width, H / 2^l, W / 2^l)`` and of unit length at each pixel."""
        z, found = nnf.pixel_unshuffle(frame - 0.5, 2), []
        for stage in self.encoder:
            z = stage(z)
            found.append(z / (z.square().sum(1, keepdim=True) + 1e-4).sqrt())
            z = nnf.leaky_relu(z, 0.1)
        return found

    def residual(self, first: Tensor, second: Tensor, flow: Tensor) -> Tensor:
        """``u + G(u)`` on one level: features ``(B, width, h, w)`` and a flow ``(B, 2, h, w)`` in pixels of that level."""
        cost = correlation(first, warp(second, flow, "bilinear"), self.radius)
        return flow + self.estimator(torch.cat([nnf.leaky_relu(cost, 0.1), first, flow], 1))

    def forward(self, first: Tensor, second: Tensor) -> list[Tensor]:
        """The flows of all levels from coarse to fine, each in pixels of its level and blind to the loss of the next."""
        one, two = self.features(first), self.features(second)
        flow, found = torch.zeros_like(one[-1][:, :2]), list[Tensor]()
        for a, b in zip(reversed(one), reversed(two), strict=True):
            flow = resized(flow, a.shape[-2:]) if found else flow
            flow = self.residual(a, b, flow.detach())
            found.append(flow)
        return found
