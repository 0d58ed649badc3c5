"""The gradient-domain unit of PADNet: convolution, radial basis functions, convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RBFUnit(nn.Module):
    """A descent direction ``G(v) = K2 phi(K1 v / alpha)`` with a learned scalar function ``phi_i`` for each filter.

    ``phi_i(z) = sum_j w_ij exp(-(z - m_j)^2 / (2 s^2))`` on a fixed grid ``m_j`` (Schmidt and Roth 2014, as in PADNet,
    "Convergence Behaviors on Gradient Domain").  Because every ``phi_i`` is bounded, so is ``G``: the unit satisfies
    Condition 2 of PADNet by construction, with ``max |phi_i| <= sum_j |w_ij|``.

    Shapes: ``(B, channels, H, W)`` in and out, unit scale after division by ``alpha``.
    """

    def __init__(self, channels: int = 2, filters: int = 16, size: int = 5, centres: int = 21, reach: float = 6.0):
        super().__init__()
        self.config = {"channels": channels, "filters": filters, "size": size, "centres": centres, "reach": reach}
        self.analysis = nn.Conv2d(channels, filters, size, padding=size // 2, padding_mode="circular", bias=False)
        self.synthesis = nn.Conv2d(filters, channels, size, padding=size // 2, padding_mode="circular", bias=False)
        self.register_buffer("grid", torch.linspace(-reach, reach, centres))
        self.spacing = 2 * reach / (centres - 1)
        # phi starts as an odd, saturating curve (a soft shrinkage residual), so that the first step already denoises
        self.weights = nn.Parameter((0.15 * torch.tanh(self.grid)).repeat(filters, 1))

    def phi(self, z: Tensor) -> Tensor:
        """Apply the learned functions to filter responses ``(B, filters, H, W)``."""
        total = torch.zeros_like(z)
        for weight, centre in zip(self.weights.T, self.grid, strict=True):  # a loop: no (B, filters, H, W, centres) tensor
            total = total + weight[:, None, None] * torch.exp(-0.5 * ((z - centre) / self.spacing) ** 2)
        return total

    def forward(self, v: Tensor, alpha: Tensor | float) -> Tensor:
        return self.synthesis(self.phi(self.analysis(v / alpha)))

