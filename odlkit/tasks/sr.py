"""Super-resolution: an image from its low-resolution version ``y = (k * x) decimated + noise``, by a factor 2, 3 or 4."""

from __future__ import annotations

import torch
from torch import Tensor

from odlkit.operators import BlurDecimate, FilterBank
from odlkit.problem import LeastSquares

SMOOTH = 1e-3  # weight of the smoothness in the interpolation that everything starts from


def bicubic_kernel(scale: int) -> Tensor:
    """The kernel of MATLAB's and Pillow's antialiased bicubic reduction, ``(4 s + 3, 4 s + 3)`` float64, sum 1.

    ``w(t) = c((t - (s - 1) / 2) / s)`` with the cubic of parameter -1/2; convolved and decimated from the first pixel on,
    it gives their result exactly away from the border.
    """
    offset = torch.arange(2 * scale + 1, -2 * scale - 2, -1, dtype=torch.float64)  # a convolution weighs x[n - m] by k[m]
    t = ((offset - (scale - 1) / 2) / scale).abs()
    near = 1.5 * t**3 - 2.5 * t**2 + 1
    far = -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    weights = torch.where(t < 1, near, torch.where(t < 2, far, torch.zeros_like(t)))
    kernel = weights[:, None] * weights
    return kernel / kernel.sum()


def interpolate(operator: BlurDecimate, y: Tensor, weight: float = SMOOTH) -> Tensor:
    """``argmin_x ||A x - y||^2 + weight ||D x||^2``: the smooth image that explains the data, aligned with A by construction.

    (With ``weight / 1000`` times ``||x||^2``, which the closed form needs.)
    """
    d = torch.zeros(3, 3, 3)
    d[0, 1, 0], d[1, 0, 1], d[:2, 1, 1], d[2, 1, 1] = 1.0, 1.0, -1.0, 0.03
    fidelity = LeastSquares(operator, y)
    return fidelity.nearest(torch.zeros_like(fidelity.back), weight, FilterBank(d.to(y)))
