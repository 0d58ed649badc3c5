"""A rough blur kernel from a blurred photograph alone, for runs with an estimated kernel; it is not part of PODM.

Coarse to fine, in turns: the picture's strong edges by an l0 penalty on the gradient, then the kernel by ridge regression of
the blurred gradient on these edges (Xu, Zheng and Jia, 2013).  It can fail; `whiteness` tells some of the failures.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as nnf

from odlkit.operators import Blur, Gradient, ValidBlur
from odlkit.priors import GroupLp
from odlkit.problem import LeastSquares, Problem
from odlkit.propagate import propagate
from odlkit.solvers import HQS
from odlkit.tasks.deblur import extend

RATIO, TURNS = 2**-0.5, 5  # between scales, and turns at each
EDGES, DECAY, LEAST = 4e-3, 1.1, 1e-4  # lambda of the l0 penalty: first, divided at each turn, never below
RIDGE, TAIL = 1.0, 0.05  # weight of ||k||^2, and the part of the maximum below which the kernel is 0


def estimate_kernel(y: Tensor, size: int) -> Tensor:
    """The kernel ``(size, size)``, size odd, non-negative, sum 1, of the blurred gray picture ``y`` ``(1, 1, H, W)``."""
    sides = [size]
    while sides[-1] > 5:
        sides.append(int(sides[-1] * RATIO) // 2 * 2 + 1)
    kernel, weight = y.new_zeros(3, 3), EDGES
    kernel[1, 1:] = 0.5  # any start that is not a point: a point explains everything
    for side in reversed(sides):
        scale = side / size
        z = y if side == size else nnf.interpolate(y, scale_factor=scale, mode="bicubic", antialias=True)
        kernel = clean(nnf.interpolate(kernel[None, None], (side, side), mode="bicubic")[0, 0])
        for _ in range(TURNS):
            kernel = regress(edges(z, kernel, weight), z, side)
            weight = max(weight / DECAY, LEAST)
    return kernel


def edges(z: Tensor, kernel: Tensor, weight: float) -> Tensor:
    """``argmin ||k * x - z||^2 + weight ||D x||_0``, roughly: half-quadratic splitting with a penalty that doubles."""
    data, window = extend(z, kernel)
    problem = Problem(LeastSquares(Blur(kernel), data, 2.0), GroupLp(0, weight), Gradient())
    return propagate(HQS(4 * weight, 2.0), problem, data, steps=22, energy=False).x[(..., *window)]


def regress(x: Tensor, z: Tensor, side: int) -> Tensor:
    """``argmin_k ||D x * k - D z||^2 + RIDGE ||k||^2`` without constraints, then `clean`; borders are faded out."""
    height, width = x.shape[-2:]
    fade = torch.hann_window(height, periodic=False)[:, None].sqrt() * torch.hann_window(width, periodic=False).sqrt()
    of, to = (torch.fft.rfft2(fade.to(x) * Gradient().A(v)) for v in (x, z))
    spectrum = (of.conj() * to).sum(1) / (of.abs().square().sum(1) + RIDGE)
    kernel = torch.fft.irfft2(spectrum, s=(height, width))[0].roll((side // 2, side // 2), (0, 1))
    return clean(kernel[:side, :side])


def clean(kernel: Tensor) -> Tensor:
    """No negative and no small values, its centroid in the middle pixel, sum 1."""
    kernel = torch.where(kernel < TAIL * kernel.max(), torch.zeros_like(kernel), kernel)
    kernel = kernel / kernel.sum()
    rows = torch.arange(len(kernel), dtype=kernel.dtype) - len(kernel) // 2
    moves = [-round((rows @ kernel.sum(axis)).item()) for axis in (1, 0)]
    return kernel.roll(moves, (0, 1))


def whiteness(x: Tensor, y: Tensor, kernel: Tensor, reach: int = 5) -> tuple[float, float]:
    """Of ``r = k * x - y`` inside the frame: its standard deviation, and the rms of its autocorrelation near lag 0.

    White noise of n pixels has about ``n^(-1/2)`` for the second, structure that was not explained has more.
    """
    valid = ValidBlur(kernel)
    r = (valid.A(x) - valid.crop(y))[0, 0]
    r = r - r.mean()
    spectrum = torch.fft.rfft2(r, s=(2 * r.shape[0], 2 * r.shape[1])).abs().square()
    lags = torch.fft.irfft2(spectrum, s=(2 * r.shape[0], 2 * r.shape[1])).roll((reach, reach), (0, 1))
    lags = lags[: 2 * reach + 1, : 2 * reach + 1] / lags[reach, reach]
    return r.std().item(), ((lags.square().sum() - 1) / (lags.numel() - 1)).sqrt().item()
