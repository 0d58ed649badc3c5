"""HODL's search space for a non-expansive network: seven operations, mixed so that no mixture is steeper than 1.

A convex combination of 1-Lipschitz maps is 1-Lipschitz.  The residual operations need an average: ``z + N(z)`` has the
Lipschitz constant 2, and no weight of the mixture repairs that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from odlkit.networks.nonexpansive import AveragedResidual, Chain, lipschitz
from odlkit.networks.normalize import OperatorNorm, conv_norm_bound


class Branch(nn.Module):
    """``z -> relu(W z + c)``: a convolution that keeps the size; ``c`` is anything that does not depend on z."""

    def __init__(self, width: int, side: int, dilation: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(width, width, side, padding=dilation * (side // 2), dilation=dilation, bias=False)
        with torch.no_grad():  # near the identity, which ReLU leaves alone where z >= 0
            self.conv.weight.mul_(0.1)
            self.conv.weight[..., side // 2, side // 2] += torch.eye(width)

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        return torch.relu(self.conv(z) + c)

    def bound(self) -> float:
        """A bound on ``||W||`` for images of every size."""
        return conv_norm_bound(self.conv.weight)


class Skip(nn.Module):
    """``z -> z``."""

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        return z

    def bound(self) -> float:
        return 1.0


OPERATIONS = {
    "conv 1x1": lambda width: Branch(width, 1),
    "conv 3x3": lambda width: Branch(width, 3),
    "residual 1x1": lambda width: AveragedResidual(Branch(width, 1)),
    "residual 3x3": lambda width: AveragedResidual(Branch(width, 3)),
    "dilated 3x3": lambda width: Branch(width, 3, 2),
    "residual dilated 3x3": lambda width: AveragedResidual(Branch(width, 3, 2)),
    "skip": lambda width: Skip(),
}


class Mixture(nn.Module):
    """``z -> sum_i softmax(alpha)_i O_i(z, c)`` over the named operations; ``z`` and ``c`` are ``(B, width, H, W)``.

    Raises ``ValueError`` for a name that is not in `OPERATIONS`.  Source: HODL section 6.2, low-light enhancement.
    """

    def __init__(self, width: int, names: Sequence[str] = tuple(OPERATIONS)):
        super().__init__()
        for name in names:
            if name not in OPERATIONS:
                raise ValueError(f"names: expected operations among {', '.join(OPERATIONS)}, got {name!r}")
        self.names = tuple(names)
        self.branches = nn.ModuleList(OPERATIONS[name](width) for name in names)
        self.alpha = nn.Parameter(torch.zeros(len(names)))

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        shares = self.alpha.softmax(0)
        return sum((share * branch(z, c) for share, branch in zip(shares, self.branches, strict=True)), torch.zeros_like(z))

    def bound(self) -> float:
        """``sum_i softmax(alpha)_i bound(O_i)``: at most 1 at any alpha if every operation is."""
        shares = self.alpha.detach().double().softmax(0).tolist()
        return sum(share * lipschitz(branch) for share, branch in zip(shares, self.branches, strict=True))


class Cells(nn.Module):
    """``D_net(v; c)``: one channel lifted to ``width``, a chain of mixtures, and read off again, ``(B, 1, H, W)``.

    ``N(v) = r^T M_J(... M_1(l v))`` with unit vectors ``l`` and ``r`` over the channels; ``c`` is ``(B, J width, H, W)``,
    what each mixture is given beside its input.  Each of ``cells`` names the operations of a mixture: all of them in a
    search, one of them after it.  With c = 0 and weights as they are made it is nearly the identity on ``v >= 0``.
    """

    def __init__(self, width: int, cells: Sequence[Sequence[str]]):
        super().__init__()
        self.lift, self.read = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.chain = Chain([Mixture(width, names) for names in cells])

    @property
    def mixtures(self) -> list[Any]:
        """The cells in order."""
        return list(self.chain.nets)

    def forward(self, v: Tensor, c: Tensor) -> Tensor:
        z = nn.functional.normalize(self.lift, dim=0).view(1, -1, 1, 1) * v
        for mixture, own in zip(self.mixtures, c.chunk(len(self.mixtures), 1), strict=True):
            z = mixture(z, own)
        return (nn.functional.normalize(self.read, dim=0).view(1, -1, 1, 1) * z).sum(1, keepdim=True)

    def bound(self) -> float:
        """The product of the mixtures' bounds."""
        return self.chain.bound()

    def alphas(self) -> list[list[float]]:
        """``softmax(alpha)`` of each mixture."""
        return [mixture.alpha.detach().softmax(0).tolist() for mixture in self.mixtures]

    def best(self) -> list[list[str]]:
        """The operation with the largest share in each mixture among those with weights: the network after the search.

        A skip needs no training and therefore leads in most searches of this kind; a chain of skips is the identity.
        """
        return [
            [max(zip(m.alpha.tolist(), m.names, strict=True), key=lambda s: (s[1] != "skip", s))[1]] for m in self.mixtures
        ]


def normalized(net: nn.Module, size: int = 16) -> nn.Module:
    """Hold the convolution of every `Branch` at the norm 1 while it is trained; changes and returns ``net``.

    The norm is `OperatorNorm`'s estimate, from below, so `certified` has the last word.
    """
    for part in net.modules():
        if isinstance(part, Branch):
            weight = part.conv.weight
            parametrize.register_parametrization(part.conv, "weight", OperatorNorm(weight, weight.shape[1], 1.0, size))
    return net


def certified(net: nn.Module) -> nn.Module:
    """Plain weights with ``bound() <= 1`` for every `Branch`, from those of `normalized`; changes and returns ``net``."""
    for part in net.modules():
        if isinstance(part, Branch):
            if parametrize.is_parametrized(part.conv):
                parametrize.remove_parametrizations(part.conv, "weight")
            with torch.no_grad():  # 1e-3 is for the rounding of weights in half precision
                part.conv.weight.mul_(min(1.0, (1 - 1e-3) / part.bound()))
    return net
