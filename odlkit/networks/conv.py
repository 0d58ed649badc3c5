"""The convolution units on the image domain: PADNet's seven layers with ReLU and batch norm, PODM's six with ELU."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf


class ConvUnit(nn.Module):
    """Estimate the noise in ``v`` in units of its standard deviation, ``G(v; W) ~ (v - x) / alpha``.

    Seven 3x3 convolutions, ReLU between them, batch normalization after the second to the sixth (PADNet, "Explicit /
    Implicit PADNet on Image Domain"); with ``depth=6, activation="elu"`` the network A of relaxed PODM.  With ``fold = 2``
    the image is first rearranged into four half-size channels, which doubles the receptive field and quarters the cost;
    the noise level enters as one constant channel.

    Shapes: ``v`` is ``(B, C, H, W)`` with values around [0, 1]; ``alpha`` is a float or a tensor that broadcasts to
    ``(B, 1, 1, 1)``; the result has the shape of ``v``.  Odd sizes are padded inside and cropped again.
    """

    def __init__(
        self,
        channels: int = 1,
        width: int = 64,
        depth: int = 7,
        fold: int = 2,
        batch_norm: bool = False,
        activation: str = "relu",
    ):
        super().__init__()
        self.config: dict[str, Any] = {"channels": channels, "width": width, "depth": depth, "fold": fold}
        self.config |= {"batch_norm": batch_norm, "activation": activation}
        bend = partial({"relu": nn.ReLU, "elu": nn.ELU}[activation], inplace=True)
        inside = channels * fold**2
        self.fold = fold
        layers: list[nn.Module] = [nn.Conv2d(inside + 1, width, 3, padding=1), bend()]
        for _ in range(depth - 2):
            layers.append(nn.Conv2d(width, width, 3, padding=1, bias=not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm2d(width))
            layers.append(bend())
        layers.append(nn.Conv2d(width, inside, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, v: Tensor, alpha: Tensor | float) -> Tensor:
        height, width = v.shape[-2:]
        pad = (-width % self.fold, -height % self.fold)
        z = nnf.pad(v, (0, pad[0], 0, pad[1]), mode="replicate") if any(pad) else v
        z = nnf.pixel_unshuffle(z, self.fold)  # (B, C fold^2, H / fold, W / fold)
        level = torch.as_tensor(alpha, dtype=v.dtype, device=v.device).expand(len(v), 1, 1, 1)
        z = torch.cat([z, level.expand(-1, 1, *z.shape[-2:])], dim=1)
        z = self.layers(z.contiguous(memory_format=torch.channels_last))
        return nnf.pixel_shuffle(z, self.fold)[..., :height, :width].to(v.dtype)


def fold_batch_norm(unit: ConvUnit) -> ConvUnit:
    """Return the same function without batch normalization, its running statistics folded into the convolutions.

    ``BN(Wx) = (s / sqrt(var + eps)) (Wx - mean) + b`` is affine per channel, so the result is equal up to round-off.  A
    network used at every iteration of a propagation sees inputs whose statistics drift with ``k``; folding fixes them.
    """
    folded = ConvUnit(**(unit.config | {"batch_norm": False})).to(next(unit.parameters()))
    merged: list[nn.Module] = []
    for layer in unit.layers:
        if isinstance(layer, nn.BatchNorm2d):
            convolution = copy.deepcopy(merged[-1]).eval()
            assert isinstance(convolution, nn.Conv2d)
            merged[-1] = nn.utils.fusion.fuse_conv_bn_eval(convolution, copy.deepcopy(layer).eval())
        else:
            merged.append(layer)
    folded.layers.load_state_dict(nn.Sequential(*merged).state_dict())
    return folded
