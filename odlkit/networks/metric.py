"""The learned distance of relaxed PODM: filters in a DCT basis and a small perceptron for their weight."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, nn


@cache
def dct_atoms(size: int) -> Tensor:
    """The orthonormal DCT-II basis of ``size x size`` patches: ``(size^2, size, size)``, constant atom first."""
    n = torch.arange(size, dtype=torch.float64, device="cpu")  # kept, whatever device is the default
    rows = torch.cos(math.pi * (n + 0.5) * n[:, None] / size) * (2 / size) ** 0.5
    rows[0] /= 2**0.5
    return torch.einsum("ih,jw->ijhw", rows, rows).reshape(size**2, size, size)


class LearnedMetric(nn.Module):
    """``H = (mu / 2) sum_n F_n^T F_n`` with ``f_n = sum_m c_nm d_m`` over DCT atoms and ``log mu`` from a perceptron.

    ``mu = 2 (sigma / alpha)^2 exp(MLP(log sigma, log scale))``: an untrained perceptron gives about the weight that
    Gaussian noise of level alpha in ``x_A`` asks for beside ``f = ||A x - y||^2`` with noise of level sigma.  The filters
    start as the atoms themselves, higher frequencies weighted more.
    Eq: PODM (3), "DCT basis" and "multilayer perceptron" of section 5.2.
    """

    def __init__(self, size: int = 5, width: int = 16):
        super().__init__()
        self.size = size
        frequency = torch.arange(size).float()
        start = 0.2 + 0.2 * (frequency[:, None].square() + frequency.square()).sqrt().flatten()
        self.mix = nn.Parameter(torch.diag(start) / size)  # (N, N); sum_n d_n^T d_n = size^2 I, hence the division
        self.mlp = nn.Sequential(nn.Linear(2, width), nn.ELU(), nn.Linear(width, 1))

    def filters(self) -> Tensor:
        """The filters ``(N, size, size)``."""
        return torch.einsum("nm,mhw->nhw", self.mix, dct_atoms(self.size).to(self.mix))

    def penalty(self, sigma: Tensor, alpha: Tensor, scale: float = 1.0) -> Tensor:
        """``mu`` for noise levels ``sigma`` and network levels ``alpha``, ``(B, 1, 1, 1)`` each, and a magnification."""
        logs = sigma.reshape(-1, 1).log()
        features = torch.cat([logs / 2 + 2, torch.full_like(logs, math.log(scale))], dim=1)  # roughly centred
        return 2 * (sigma / alpha).square() * self.mlp(features).exp().view(-1, 1, 1, 1)
