"""How far a restoration is from the truth, measured the way the papers measure it.

Conventions.  Images are ``(B, C, H, W)`` with data range 1, so 255 in the 8-bit papers is 1 here and no decibel changes.
The mean square error runs over all channels and pixels of an item, after ``border`` pixels are cut from every side.
Nothing is clamped or rounded: papers that score saved 8-bit files need ``x.clamp(0, 1).mul(255).round().div(255)`` first.
Super-resolution and deraining tables score ``luminance(x)`` instead of RGB, super-resolution with ``border`` = scale; tables
on the pairs of Levin et al. score up to a shift.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as nnf

SSIM_WINDOW = 11  # pixels: the Gaussian of sigma 1.5 cut at 3.5 sigma


def psnr(x: Tensor, truth: Tensor, border: int = 0, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio ``10 log10(data_range^2 / mean((x - truth)^2))`` in dB, ``(B,)`` float64.

    ``x`` and ``truth`` are ``(B, C, H, W)``; infinite where they are equal.  Raises ``ValueError`` when the shapes differ,
    an image is not floating point, ``border`` leaves nothing, or ``data_range`` is not positive.
    """
    x, truth = _pair(x, truth, border)
    if not data_range > 0:
        raise ValueError(f"data_range: expected a positive number, got {data_range}")
    return 10 * torch.log10(data_range**2 / (x - truth).square().flatten(1).mean(1))


def ssim(x: Tensor, truth: Tensor, border: int = 0, data_range: float = 1.0) -> Tensor:
    """Structural similarity with the settings of Wang et al. (2004), ``(B,)`` float64, computed by scikit-image on the CPU.

    Gaussian window of sigma 1.5 (11 x 11), population covariances, K1 = 0.01, K2 = 0.03, mean over the channels and over the
    pixels whose window lies inside the image.  Raises ``ValueError`` as `psnr` does, and when a side is below 11 pixels.
    """
    from skimage.metrics import structural_similarity

    x, truth = _pair(x, truth, border)
    if not data_range > 0:
        raise ValueError(f"data_range: expected a positive number, got {data_range}")
    if min(x.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"x: SSIM needs sides of {SSIM_WINDOW} pixels or more inside the border, got {tuple(x.shape[-2:])}")
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    scores = [
        structural_similarity(reference, item, data_range=data_range, channel_axis=0, **window)
        for item, reference in zip(x.cpu().numpy(), truth.cpu().numpy(), strict=True)
    ]
    return torch.tensor(scores, dtype=torch.float64, device=x.device)


def gmsd(x: Tensor, truth: Tensor) -> Tensor:
    """Gradient magnitude similarity deviation, ``(B,)`` float64: a perceptual distance, 0 for equal pictures.

    On luma in [0, 255], halved by means of 2 x 2: gradient magnitudes g (Prewitt), similarity
    ``s = (2 g_x g_truth + 170) / (g_x^2 + g_truth^2 + 170)`` at each pixel, and the standard deviation of s over them.  It
    sees structure, not exposure or colour, and has no weights: it is not LPIPS, whose network would have to be downloaded.
    Raises ``ValueError`` as `psnr` does, for channels that are neither 1 nor 3, and when a side is below 6 pixels.
    Source: Xue et al., Gradient Magnitude Similarity Deviation (2014), section II.
    """
    x, truth = _pair(x, truth, 0)
    if x.shape[1] not in (1, 3) or min(x.shape[-2:]) < 6:
        raise ValueError(f"x: expected 1 or 3 channels and sides of 6 pixels or more, got {tuple(x.shape)}")
    luma = torch.tensor([[0.299, 0.587, 0.114]] if x.shape[1] == 3 else [[1.0]]).to(x).view(1, -1, 1, 1)
    prewitt = torch.tensor([[1.0, 0.0, -1.0]]).to(x).expand(3, 3) / 3

    def gradient(image: Tensor) -> Tensor:
        small = nnf.avg_pool2d(255 * (luma * image).sum(1, keepdim=True), 2)
        both = nnf.conv2d(small, torch.stack([prewitt, prewitt.mT])[:, None], padding=1)
        return both.square().sum(1).sqrt()

    a, b = gradient(x), gradient(truth)
    return ((2 * a * b + 170) / (a.square() + b.square() + 170)).flatten(1).std(1, correction=0)


def luminance(rgb: Tensor) -> Tensor:
    """BT.601 luma in studio swing, ``Y = (16 + 65.481 R + 128.553 G + 24.966 B) / 255``: ``(B, 3, H, W) -> (B, 1, H, W)``.

    MATLAB's ``rgb2ycbcr``, which the super-resolution and deraining tables score: black is 16/255 and white 235/255, the
    data range stays 1, so these PSNRs lie ``20 log10(255 / 219) = 1.3`` dB above those of full-range luma.  (MATLAB also
    rounds to 8 bit when the input is.)  Raises ``ValueError`` unless there are three channels.
    """
    if rgb.dim() != 4 or rgb.shape[1] != 3:
        raise ValueError(f"rgb: expected shape (B, 3, H, W), got {tuple(rgb.shape)}")
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=rgb.dtype, device=rgb.device).view(1, 3, 1, 1)
    return (16 + (weights * rgb).sum(1, keepdim=True)) / 255


def best_shift(x: Tensor, truth: Tensor, reach: int = 5, border: int = 15, step: float = 1.0) -> Tensor:
    """The shift ``(dy, dx)`` of ``x``, each at most ``reach``, with the least square error: ``(B, 2)`` float64.

    The error is that of ``x[i - dy, j - dx] - truth[i, j]`` over the pixels at least ``border`` from every side.  Whole
    pixels are searched first; with ``step`` < 1 then the fractions within one pixel of the winner, by bilinear interpolation
    of ``x``.  Among equals the smallest shift wins.  Raises ``ValueError`` for shapes that differ, a border below the reach
    or beyond the image, or a step that is not 1 / n.  Source: comp_upto_shift of Levin et al. (2009), where reach, border
    and step are 5, 15 and 0.25.  Interpolation smooths, so it can raise the score of a noisy ``x`` by itself: hence whole
    pixels by default.
    """
    if not 0 <= reach <= border:
        raise ValueError(f"border: expected at least the reach, {reach}, and a reach of at least 0, got border {border}")
    if not (0 < step <= 1 and (1 / step).is_integer()):
        raise ValueError(f"step: expected 1 or a fraction 1 / n of a pixel, got {step}")
    _pair(x, truth, border)
    found = []
    for item, reference in zip(x.detach().double(), truth.detach().double(), strict=True):
        inside = _crop(reference, border)

        def error(shift: tuple[float, ...], item: Tensor = item, inside: Tensor = inside) -> tuple[float, float]:
            return (_shifted(item, shift, border) - inside).square().mean().item(), shift[0] ** 2 + shift[1] ** 2

        best: tuple[float, ...] = min(product(range(-reach, reach + 1), repeat=2), key=error)
        if step < 1:
            fractions = [i * step for i in range(1 - round(1 / step), round(1 / step))]
            near = product(*([c + f for f in fractions if abs(c + f) <= reach] for c in best))
            best = min(near, key=error)
        found.append(best)
    return torch.tensor(found, dtype=torch.float64, device=x.device)


def align(x: Tensor, truth: Tensor, reach: int = 5, border: int = 15, step: float = 1.0) -> tuple[Tensor, Tensor]:
    """``x`` moved by its `best_shift` and ``truth``, both without ``border`` pixels on every side: ``(B, C, H', W')``.

    Deblurring with an estimated or off-centre kernel returns a shifted image that is no worse for it.  The pixels that a
    shift brings in from outside lie in the border.  Raises ``ValueError`` as `best_shift` does.
    """
    shifts = best_shift(x, truth, reach, border, step).tolist()
    moved = torch.stack([_shifted(item, shift, border) for item, shift in zip(x, shifts, strict=True)])
    return moved, _crop(truth, border)


def psnr_up_to_shift(x: Tensor, truth: Tensor, reach: int = 5, border: int = 15, step: float = 1.0) -> Tensor:
    """`psnr` after `align`, ``(B,)`` float64."""
    return psnr(*align(x, truth, reach, border, step))


def ssim_up_to_shift(x: Tensor, truth: Tensor, reach: int = 5, border: int = 15, step: float = 1.0) -> Tensor:
    """`ssim` after `align`, ``(B,)`` float64."""
    return ssim(*align(x, truth, reach, border, step))


def _crop(x: Tensor, border: int) -> Tensor:
    return x[..., border : x.shape[-2] - border, border : x.shape[-1] - border]


def _shifted(x: Tensor, shift: tuple[float, ...], border: int) -> Tensor:
    """``x[i - dy, j - dx]`` on the pixels inside the border, bilinear between pixels."""
    for dim, distance in zip((-2, -1), shift, strict=True):
        whole = int(distance // 1)
        fraction, length = distance - whole, x.shape[dim] - 2 * border
        moved = x.narrow(dim, border - whole, length)
        x = moved if fraction == 0 else (1 - fraction) * moved + fraction * x.narrow(dim, border - whole - 1, length)
    return x


def _pair(x: Tensor, truth: Tensor, border: int) -> tuple[Tensor, Tensor]:
    """Both images checked, cropped and in float64 (on their device)."""
    if x.shape != truth.shape or x.dim() != 4:
        raise ValueError(f"x, truth: expected one shape (B, C, H, W), got {tuple(x.shape)} and {tuple(truth.shape)}")
    if not (x.is_floating_point() and truth.is_floating_point()):
        raise ValueError(f"x, truth: expected floating point images, got {x.dtype} and {truth.dtype}")
    if border < 0 or 2 * border >= min(x.shape[-2:]):
        raise ValueError(f"border: expected 0 to less than half the shorter side of {tuple(x.shape[-2:])}, got {border}")
    return _crop(x.detach(), border).double(), _crop(truth.detach(), border).double()
