"""The discriminative network of GDC: a small smooth classifier whose gradient is a descent direction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf


class Classifier(nn.Module):
    """The logit ``d(u; omega_d)`` of "this image is corrupted at level alpha": label 1 for corrupted, 0 for clean.

    3x3 convolutions of stride 2 with softplus, one logit a position, averaged.  What they see is the image minus its 3x3
    mean, in units of alpha, and the logarithm of alpha as a constant channel: fine structure counts, brightness does not.
    Softplus has ``0 < phi' < 1`` and ``0 < phi'' <= 1/4``: the gradient is Lipschitz, which with ReLU it is not, and its own
    derivative, which joint training needs, does not vanish.

    Shapes: ``u`` is ``(B, C, H, W)`` with values around [0, 1] and any size; each channel is judged by itself; ``alpha`` is
    a float or a tensor that broadcasts to ``(B, 1, 1, 1)``; the result is ``(B,)``.  Eq: GDC (3).
    """

    def __init__(self, widths: Sequence[int] = (32, 64, 64)):
        super().__init__()
        self.config = {"widths": list(widths)}
        layers: list[nn.Module] = []
        for inside, outside in zip((2, *widths), widths, strict=False):
            layers += [nn.Conv2d(inside, outside, 3, stride=2, padding=1), nn.Softplus()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 1))

    def logits(self, u: Tensor, alpha: Tensor | float) -> Tensor:
        """The logits of all positions of all channels, ``(B, n)``."""
        level = torch.as_tensor(alpha, dtype=u.dtype, device=u.device).expand(len(u), 1, 1, 1)
        planes = u.reshape(-1, 1, *u.shape[-2:])  # (B C, 1, H, W)
        level = level.repeat_interleave(u.shape[1], 0)
        fine = (planes - nnf.avg_pool2d(planes, 3, 1, 1, count_include_pad=False)) / level
        with torch.autocast(u.device.type, enabled=False):  # its gradient is differentiated again: not in half precision
            z = torch.cat([fine.to(u.dtype), (level.log10() + 1.5).expand_as(planes)], 1)
            return self.layers(z).reshape(len(u), -1)

    def forward(self, u: Tensor, alpha: Tensor | float) -> Tensor:
        return self.logits(u, alpha).mean(1)

    def potential(self, u: Tensor, alpha: Tensor | float) -> Tensor:
        """``alpha^2 sum logits``, ``(B,)``: the same direction as d, but ``|grad|`` is of the order alpha at every size.

        The logits are functions of ``u / alpha``, so their gradient is of the order ``1 / alpha``, and a mean over n
        positions would divide it by n.  As the classifier of `odlkit.models.gdc.Discriminative` it makes a step a number.
        """
        level = torch.as_tensor(alpha, dtype=u.dtype, device=u.device).reshape(-1)
        return level.square() * self.logits(u, alpha).sum(1)
