"""The gradient-domain unit of PADNet: convolution, radial basis functions, convolution."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def _bumps(z: Tensor, count: int) -> Iterator[Tensor]:
    """``exp(-(z - j)^2 / 2)`` for j = 0 ... count - 1, in one reused tensor.

    Below ``exp(-60)`` it stays there: an exponential that underflows takes ten times as long.
    """
    bump = torch.empty_like(z)
    for j in range(count):
        yield torch.sub(z, j, out=bump).square_().mul_(-0.5).clamp_min_(-60).exp_()


class _Mixture(torch.autograd.Function):
    """``sum_j w_ij exp(-(z_i - j)^2 / 2)``, ``(B, I, H, W)``; neither pass keeps a tensor for each centre.

    Written out because autograd's record of the sum, one tensor a centre, costs three times the time and twenty times the
    memory.  Differentiable once.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(z, weights)
        total = torch.zeros_like(z)
        for weight, bump in zip(weights.T, _bumps(z, weights.shape[1]), strict=True):
            total.addcmul_(weight.view(-1, 1, 1), bump)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        z, weights = ctx.saved_tensors
        slope, moments = torch.zeros_like(z), torch.empty_like(weights)
        scratch = torch.empty_like(z)
        for j, bump in enumerate(_bumps(z, weights.shape[1])):
            moments[:, j] = torch.mul(grad, bump, out=scratch).sum((0, 2, 3))
            scratch.copy_(z).neg_().add_(j)
            slope.addcmul_(weights[:, j].view(-1, 1, 1), bump.mul_(scratch))
        return grad * slope, moments


class RBFUnit(nn.Module):
    """A descent direction ``G(v) = K2 phi(K1 v / alpha)`` with a learned scalar function ``phi_i`` for each filter.

    ``phi_i(z) = sum_j w_ij exp(-(z - m_j)^2 / (2 s^2))`` on a fixed even grid ``m_j`` of spacing s (Schmidt and Roth 2014,
    as in PADNet, "Convergence Behaviors on Gradient Domain").  Because every ``phi_i`` is bounded, so is ``G``: see `bound`.

    Shapes: ``v`` is ``(B, channels, H, W)`` with sides of at least ``size // 2``; ``alpha`` a float or ``(B, 1, 1, 1)``, the
    scale of the noise in ``v``; the result has the shape of ``v`` and unit scale.
    """

    def __init__(self, channels: int = 2, filters: int = 16, size: int = 5, centres: int = 21, reach: float = 6.0):
        super().__init__()
        if size % 2 == 0:
            raise ValueError(f"size: expected an odd number, so that a filter has a centre, got {size}")
        if centres < 2 or reach <= 0:
            raise ValueError(f"centres, reach: expected at least 2 centres and a positive reach, got {centres}, {reach}")
        self.config = {"channels": channels, "filters": filters, "size": size, "centres": centres, "reach": reach}
        self.analysis = nn.Conv2d(channels, filters, size, padding=size // 2, padding_mode="circular", bias=False)
        self.synthesis = nn.Conv2d(filters, channels, size, padding=size // 2, padding_mode="circular", bias=False)
        self.reach, self.spacing = reach, 2 * reach / (centres - 1)
        # phi starts as an odd, saturating curve (a soft shrinkage residual), so that the first step already denoises
        grid = torch.linspace(-reach, reach, centres)
        self.weights = nn.Parameter((0.15 * torch.tanh(grid)).repeat(filters, 1))

    def phi(self, z: Tensor) -> Tensor:
        """Apply the learned functions to filter responses ``(B, filters, H, W)``."""
        return _Mixture.apply((z + self.reach) / self.spacing, self.weights)

    def forward(self, v: Tensor, alpha: Tensor | float) -> Tensor:
        return self.synthesis(self.phi(self.analysis(v / alpha)))

    def bound(self) -> float:
        """A constant C with ``||G(v)|| <= C sqrt(n)`` for every ``v`` of n values: PADNet's Condition 2 by construction.

        ``|phi_i| <= min(sum_j |w_ij|, sqrt(2 pi) (1 + 1e-8) max_j |w_ij|)``, since unit Gaussians at all integers sum to at
        most that; a filter then multiplies a supremum by its l1 norm at most.  Eq: PADNet Condition 2.
        """
        size = self.weights.detach().abs().double()
        curve = torch.minimum(size.sum(1), math.sqrt(2 * math.pi) * (1 + 1e-8) * size.amax(1))  # (filters,)
        channel = self.synthesis.weight.detach().abs().double().sum((2, 3)) @ curve  # (channels,)
        return channel.square().mean().sqrt().item()
