"""Linear operators: blur, mask, decimation, gradient, wavelet, block sampling, with exact spectra and closed-form solves.

Every operator maps ``(B, C, H, W)`` tensors of any float dtype on any device; what it needs (spectra, masks) is moved to
the input's dtype and device once and kept.  The contract, the solvers and the compositions are in `odlkit.linear` and can
be imported from here too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from odlkit.linear import (
    Adapted,
    Adjoint,
    Compose,
    LinearMap,
    NotConverged,
    Operator,
    Scaled,
    Stack,
    as_operator,
    conjugate_gradient,
    largest_eigenvalue,
)

__all__ = [
    "Adapted", "Adjoint", "Blur", "BlockSampling", "BlurDecimate", "Compose", "Decimation", "FilterBank", "Gradient",
    "Identity", "LinearMap", "Mask", "NotConverged", "Operator", "Scaled", "Stack", "ValidBlur", "Wavelet", "as_operator",
    "conjugate_gradient", "largest_eigenvalue",
]  # fmt: skip


class Identity(Operator):
    """``A x = x``."""

    unitary = convolution = True

    def A(self, x: Tensor) -> Tensor:
        return x

    def A_adjoint(self, y: Tensor) -> Tensor:
        return self.A(y)

    def gram(self, x: Tensor) -> Tensor:
        return torch.ones((), dtype=x.dtype, device=x.device)


class _Cache:
    """Tensors made once per (size, dtype, device), so that no iteration recomputes a spectrum."""

    def __init__(self) -> None:
        self.kept: dict[Any, Any] = {}

    def __call__(self, key: Any, make) -> Any:
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]


def _key(x: Tensor) -> tuple:
    return (tuple(x.shape[-2:]), x.dtype, x.device)


class Blur(Operator):
    """Circular convolution with a kernel whose centre is at ``(h // 2, w // 2)``: ``A x = F^-1(k_hat * F x)``.

    ``kernel`` is ``(h, w)`` or, one for each item, ``(B, 1, h, w)``; it is used as given (normalise it yourself).
    ``||A||^2 = max |k_hat|^2``, exactly.  Raises ``ValueError`` if the kernel is larger than the image.
    """

    convolution = True

    def __init__(self, kernel: Tensor):
        if kernel.dim() != 2 and (kernel.dim() != 4 or kernel.shape[1] != 1):
            raise ValueError(f"kernel: expected shape (h, w) or (B, 1, h, w), got {tuple(kernel.shape)}")
        self.kernel = kernel
        self._cache = _Cache()

    def spectrum(self, x: Tensor) -> Tensor:
        """``k_hat`` on the half-plane for images like ``x``: complex ``(H, W // 2 + 1)`` or ``(B, 1, H, W // 2 + 1)``."""

        def make() -> Tensor:
            h, w = self.kernel.shape[-2:]
            height, width = x.shape[-2:]
            if h > height or w > width:
                raise ValueError(f"kernel: {h}x{w} is larger than the image, {height}x{width}")
            k = nnf.pad(self.kernel.to(x), (0, width - w, 0, height - h))
            return torch.fft.rfft2(k.roll((-(h // 2), -(w // 2)), dims=(-2, -1)))

        return self._cache(("k", *_key(x)), make)

    def gram(self, x: Tensor) -> Tensor:
        return self._cache(("g", *_key(x)), lambda: self.spectrum(x).abs().square())

    def A(self, x: Tensor) -> Tensor:
        return torch.fft.irfft2(self.spectrum(x) * torch.fft.rfft2(x), s=x.shape[-2:])

    def A_adjoint(self, y: Tensor) -> Tensor:
        spectrum = self._cache(("a", *_key(y)), lambda: self.spectrum(y).conj().resolve_conj())
        return torch.fft.irfft2(spectrum * torch.fft.rfft2(y), s=y.shape[-2:])


class ValidBlur(Operator):
    """Blur of a scene that continues outside the photograph: ``(H + h - 1, W + w - 1)`` in, the seen ``(H, W)`` out.

    ``A = M K``: circular convolution on the large grid, then the crop where no wrap-around is felt.  Its bound is
    ``||A|| <= max |k_hat|``; there is no closed-form solve, so conjugate gradients run.
    """

    def __init__(self, kernel: Tensor):
        self.blur = Blur(kernel)
        h, w = kernel.shape[-2:]
        # seen pixel i weighs scene pixels i - (h - 1 - h // 2) ... i + h // 2, in coordinates of the seen frame
        self.margins = (w - 1 - w // 2, w // 2, h - 1 - h // 2, h // 2)  # left, right, top, bottom

    def extend(self, y: Tensor, mode: str = "replicate") -> Tensor:
        """Pad an image of the seen size to the scene's size; ``mode`` as in ``torch.nn.functional.pad``."""
        return nnf.pad(y, self.margins, mode=mode)

    def crop(self, x: Tensor) -> Tensor:
        """The seen part of an image of the scene's size."""
        left, right, top, bottom = self.margins
        return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]

    def A(self, x: Tensor) -> Tensor:
        return self.crop(self.blur.A(x))

    def A_adjoint(self, y: Tensor) -> Tensor:
        return self.blur.A_adjoint(self.extend(y, "constant"))

    def eigenvalue_range(self, x: Tensor) -> tuple[float, float]:
        return 0.0, self.blur.eigenvalue_range(x)[1]


class Mask(Operator):
    """Pixelwise product ``A x = m * x`` with ``m`` broadcastable to the image, 1 = known, 0 = missing (or any weights)."""

    def __init__(self, mask: Tensor):
        self.mask = mask
        self._cache = _Cache()

    def _mask(self, x: Tensor) -> Tensor:
        return self._cache((x.dtype, x.device), lambda: self.mask.to(x))

    def A(self, x: Tensor) -> Tensor:
        return self._mask(x) * x

    def A_adjoint(self, y: Tensor) -> Tensor:
        return self.A(y)

    def eigenvalue_range(self, x: Tensor) -> tuple[float, float]:
        square = self._mask(x).square()
        return square.min().item(), square.max().item()

    def solve(self, rhs: Tensor, rho: Tensor | float) -> Tensor:
        return rhs / (self._mask(rhs).square() + rho)


class Decimation(Operator):
    """Keep every ``factor``-th pixel, starting at the first: ``A x = x[..., ::s, ::s]``, so ``A A^T = I``.

    Raises ``ValueError`` unless both sides are multiples of the factor.
    """

    def __init__(self, factor: int):
        self.factor = factor

    def A(self, x: Tensor) -> Tensor:
        if x.shape[-2] % self.factor or x.shape[-1] % self.factor:
            raise ValueError(f"image: both sides must be multiples of {self.factor}, got {tuple(x.shape[-2:])}")
        return x[..., :: self.factor, :: self.factor]

    def A_adjoint(self, y: Tensor) -> Tensor:
        x = y.new_zeros(*y.shape[:-2], y.shape[-2] * self.factor, y.shape[-1] * self.factor)
        x[..., :: self.factor, :: self.factor] = y
        return x

    def eigenvalue_range(self, x: Tensor) -> tuple[float, float]:
        return (1.0 if self.factor == 1 else 0.0), 1.0

    def solve(self, rhs: Tensor, rho: Tensor | float) -> Tensor:
        kept = self.A_adjoint(self.A(rhs))  # A^T A is a 0-1 mask
        return (rhs - kept) / rho + kept / (1 + rho)


class BlurDecimate(Operator):
    """Blur, then keep every ``factor``-th pixel: the super-resolution operator, with its closed-form solve.

    ``A A^T`` is circulant on the small grid with eigenvalues equal to the mean of ``|k_hat|^2`` over the ``s^2`` aliases, so
    ``(A^T A + rho I)^-1 z = (z - A^T (A A^T + rho I)^-1 A z) / rho``.
    """

    def __init__(self, kernel: Tensor, factor: int):
        self.blur, self.decimation = Blur(kernel), Decimation(factor)
        self._cache = _Cache()

    def A(self, x: Tensor) -> Tensor:
        return self.decimation.A(self.blur.A(x))

    def A_adjoint(self, y: Tensor) -> Tensor:
        return self.blur.A_adjoint(self.decimation.A_adjoint(y))

    def _small_gram(self, x: Tensor) -> Tensor:
        def make() -> Tensor:
            s, (height, width) = self.decimation.factor, x.shape[-2:]
            autocorrelation = torch.fft.irfft2(self.blur.gram(x), s=(height, width))
            return torch.fft.rfft2(autocorrelation[..., ::s, ::s]).real  # sampling a kernel averages its aliases

        return self._cache(_key(x), make)

    def eigenvalue_range(self, x: Tensor) -> tuple[float, float]:
        return 0.0, self._small_gram(x).max().item()

    def solve(self, rhs: Tensor, rho: Tensor | float, gram: Tensor | None = None) -> Tensor:
        """``(A^T A + rho W^T W)^-1 rhs``; ``gram`` is the spectrum of ``W^T W``, positive (default: W = I)."""
        if gram is None:
            small = self.A(rhs)
            inner = torch.fft.irfft2(torch.fft.rfft2(small) / (self._small_gram(rhs) + rho), s=small.shape[-2:])
            return (rhs - self.A_adjoint(inner)) / rho
        # with C = rho W^T W: C^-1 rhs - C^-1 A^T (I + A C^-1 A^T)^-1 A C^-1 rhs, and A C^-1 A^T circulant on the small grid
        s, size = self.decimation.factor, rhs.shape[-2:]
        c = rho * gram
        first = torch.fft.irfft2(torch.fft.rfft2(rhs) / c, s=size)
        small, kernel = self.A(first), torch.fft.irfft2(self.blur.gram(rhs) / c, s=size)
        aliases = torch.fft.rfft2(kernel[..., ::s, ::s]).real
        inner = torch.fft.irfft2(torch.fft.rfft2(small) / (1 + aliases), s=small.shape[-2:])
        return first - torch.fft.irfft2(torch.fft.rfft2(self.A_adjoint(inner)) / c, s=size)


class Gradient(Operator):
    """Circular forward differences: ``(B, C, H, W) -> (B, 2C, H, W)``, horizontal channels first, ``||A||^2 <= 8``."""

    convolution, widening = True, 2

    def __init__(self) -> None:
        self._cache = _Cache()

    def A(self, x: Tensor) -> Tensor:
        return torch.cat([x.roll(-1, -1).sub_(x), x.roll(-1, -2).sub_(x)], dim=1)  # roll is a copy

    def A_adjoint(self, y: Tensor) -> Tensor:
        dx, dy = y.chunk(2, dim=1)
        return dx.roll(1, -1).sub_(dx).add_(dy.roll(1, -2)).sub_(dy)

    def gram(self, x: Tensor) -> Tensor:
        def make() -> Tensor:
            def half(n: int, m: int) -> Tensor:  # |exp(i w) - 1|^2 = 4 sin^2(w / 2)
                return 4 * torch.sin(math.pi * torch.arange(m, dtype=torch.float64, device=x.device) / n).square()

            height, width = x.shape[-2:]
            return (half(height, height)[:, None] + half(width, width // 2 + 1)[None]).to(x.dtype)

        return self._cache(_key(x), make)


class FilterBank(Operator):
    """Circular convolutions with N small filters: ``(B, C, H, W) -> (B, N C, H, W)``, ``A^T A = sum_n F_n^T F_n``.

    ``filters`` is ``(N, h, w)`` with odd sides and centres at ``(h // 2, w // 2)``; the first C channels belong to the first
    filter.  ``gram`` comes from the autocorrelation of the whole bank, one transform whatever N is.  Raises ``ValueError``
    for another shape and when the filters are larger than the image.
    """

    convolution = True

    def __init__(self, filters: Tensor):
        if filters.dim() != 3 or not (filters.shape[-2] % 2 and filters.shape[-1] % 2):
            raise ValueError(f"filters: expected shape (N, h, w) with odd sides, got {tuple(filters.shape)}")
        self.filters, self.widening = filters, len(filters)
        self._cache = _Cache()

    @property
    def autocorrelation(self) -> Tensor:
        """The kernel of ``A^T A``: ``(2 h - 1, 2 w - 1)``."""
        h, w = self.filters.shape[-2:]
        size = (2 * h - 1, 2 * w - 1)  # large enough that nothing wraps around
        spectrum = torch.fft.rfft2(self.filters, s=size).abs().square().sum(0)
        return torch.fft.irfft2(spectrum, s=size).roll((h - 1, w - 1), (0, 1))

    def gram(self, x: Tensor) -> Tensor:
        return self._cache(_key(x), lambda: Blur(self.autocorrelation).spectrum(x).real)

    def A(self, x: Tensor) -> Tensor:
        h, w = self.filters.shape[-2:]
        if h > x.shape[-2] or w > x.shape[-1]:
            raise ValueError(f"filters: {h}x{w} is larger than the image, {x.shape[-2]}x{x.shape[-1]}")
        padded = nnf.pad(x, (w // 2, w // 2, h // 2, h // 2), mode="circular").flatten(0, 1)[:, None]
        bank = self.filters.to(x).flip((-2, -1))[:, None]  # conv2d correlates
        return nnf.conv2d(padded, bank).unflatten(0, x.shape[:2]).transpose(1, 2).flatten(1, 2)

    def A_adjoint(self, y: Tensor) -> Tensor:
        h, w = self.filters.shape[-2:]
        parts = y.unflatten(1, (self.widening, -1)).transpose(1, 2)  # (B, C, N, H, W)
        padded = nnf.pad(parts.flatten(0, 1), (w // 2, w // 2, h // 2, h // 2), mode="circular")
        bank = self.filters.to(y).flip((-2, -1))[:, None]
        # as a transposed one: conv2d to one channel is slow on a processor
        out = nnf.conv_transpose2d(padded, bank, padding=(h - 1, w - 1))
        return out.view(*parts.shape[:2], *y.shape[-2:])


class Wavelet(Operator):
    """Orthonormal periodic wavelet analysis ``A x`` with ``A^T A = A A^T = I``; coefficients laid out as one image.

    Uses PyWavelets for the filters (``haar``, ``db2`` ... , any orthogonal family).  Both sides must be multiples of
    ``2 ** levels``.  Same numbers as ``pywt.wavedec2(mode="periodization")`` in the layout of ``pywt.coeffs_to_array``: the
    coarse band is the top left corner, ``H / 2 ** levels`` by ``W / 2 ** levels``.
    """

    unitary = True

    def __init__(self, name: str = "haar", levels: int = 3):
        import pywt

        wavelet = pywt.Wavelet(name)
        if not wavelet.orthogonal:
            raise ValueError(f"wavelet: expected an orthogonal family such as 'haar' or 'db4', got {name!r}")
        self.name, self.levels = name, levels
        # conv2d correlates, so the analysis filters are reversed
        self.filters = [torch.tensor(f[::-1], dtype=torch.float64) for f in (wavelet.dec_lo, wavelet.dec_hi)]
        self._cache = _Cache()

    def _bank(self, x: Tensor) -> Tensor:
        def make() -> Tensor:
            low, high = self.filters
            rows = [a[:, None] * b[None] for a, b in ((low, low), (low, high), (high, low), (high, high))]
            return torch.stack(rows)[:, None].to(x)  # (4, 1, n, n)

        return self._cache((x.dtype, x.device), make)

    def _check(self, x: Tensor) -> None:
        block = 2**self.levels
        if x.shape[-2] % block or x.shape[-1] % block:
            raise ValueError(f"image: both sides must be multiples of {block}, got {tuple(x.shape[-2:])}")

    def A(self, x: Tensor) -> Tensor:
        self._check(x)
        bank = self._bank(x)
        coarse, details = x.reshape(-1, 1, *x.shape[-2:]), []
        for _ in range(self.levels):
            coarse, *rest = nnf.conv2d(_wrap(coarse, bank.shape[-1] // 2 - 1), bank, stride=2).split(1, dim=1)
            details.append(rest)
        for lh, hl, hh in reversed(details):
            coarse = torch.cat([torch.cat([coarse, lh], -1), torch.cat([hl, hh], -1)], -2)
        return coarse.reshape(x.shape)

    def A_adjoint(self, y: Tensor) -> Tensor:
        self._check(y)
        bank, c = self._bank(y), y.reshape(-1, 1, *y.shape[-2:])
        coarse = c[..., : y.shape[-2] >> self.levels, : y.shape[-1] >> self.levels]
        for level in reversed(range(self.levels)):
            h, w = y.shape[-2] >> (level + 1), y.shape[-1] >> (level + 1)
            lh, hl, hh = c[..., :h, w : 2 * w], c[..., h : 2 * h, :w], c[..., h : 2 * h, w : 2 * w]
            z = nnf.conv_transpose2d(torch.cat([coarse, lh, hl, hh], 1), bank, stride=2)  # (BC, 1, 2h + n - 2, 2w + n - 2)
            coarse = _unwrap(z, bank.shape[-1] // 2 - 1, 2 * h, 2 * w)
        return coarse.reshape(y.shape)

    def gram(self, x: Tensor) -> Tensor:
        return torch.ones((), dtype=x.dtype, device=x.device)


def _wrap(x: Tensor, extra: int) -> Tensor:
    """Periodic extension by ``extra`` rows and columns on every side (``extra`` may exceed the size)."""
    if extra == 0:
        return x
    rows, cols = ((torch.arange(n + 2 * extra, device=x.device) - extra) % n for n in x.shape[-2:])
    return x[..., rows[:, None], cols]


def _unwrap(x: Tensor, extra: int, height: int, width: int) -> Tensor:
    """Adjoint of `_wrap`: add what lies outside ``height x width`` back periodically."""
    if extra == 0:
        return x
    rows = (torch.arange(x.shape[-2], device=x.device) - extra) % height
    cols = (torch.arange(x.shape[-1], device=x.device) - extra) % width
    folded = x.new_zeros(*x.shape[:-1], width).index_add_(-1, cols, x)
    return x.new_zeros(*x.shape[:-2], height, width).index_add_(-2, rows, folded)


class BlockSampling(Operator):
    """Compressive sensing of non-overlapping blocks: ``y = Phi vec(block)`` for every ``size x size`` block.

    ``phi`` is ``(M, size^2)`` and acts on blocks read row by row; the result is ``(B, C M, H / size, W / size)``.  The solve
    uses the eigenvectors of ``Phi^T Phi``, found once in float64.  Raises ``ValueError`` unless both sides are multiples of
    the block.
    """

    def __init__(self, phi: Tensor):
        self.size = math.isqrt(phi.shape[-1])
        if phi.dim() != 2 or self.size**2 != phi.shape[1]:
            raise ValueError(f"phi: expected shape (M, size^2), got {tuple(phi.shape)}")
        self.phi, self.widening = phi, len(phi)
        self._cache = _Cache()

    def _apply(self, matrix: Tensor, codes: Tensor) -> Tensor:
        """``matrix`` on every code: ``(B, C n, h, w) -> (B, C m, h, w)``."""
        split = codes.unflatten(1, (-1, matrix.shape[1]))
        return torch.einsum("mn,bcnhw->bcmhw", matrix, split).flatten(1, 2)

    def _eigen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        def make() -> tuple[Tensor, Tensor]:
            values, vectors = torch.linalg.eigh(self.phi.double().T @ self.phi.double())
            return values.clamp_min(0).to(x), vectors.to(x)

        return self._cache(("eigen", x.dtype, x.device), make)

    def _phi(self, x: Tensor) -> Tensor:
        return self._cache(("phi", x.dtype, x.device), lambda: self.phi.to(x))

    def A(self, x: Tensor) -> Tensor:
        if x.shape[-2] % self.size or x.shape[-1] % self.size:
            raise ValueError(f"image: both sides must be multiples of {self.size}, got {tuple(x.shape[-2:])}")
        return self._apply(self._phi(x), nnf.pixel_unshuffle(x, self.size))

    def A_adjoint(self, y: Tensor) -> Tensor:
        return nnf.pixel_shuffle(self._apply(self._phi(y).T, y), self.size)

    def eigenvalue_range(self, x: Tensor) -> tuple[float, float]:
        phi, full = self.phi.double(), len(self.phi) >= self.phi.shape[1]
        values = torch.linalg.eigvalsh(phi.T @ phi if full else phi @ phi.T)  # the smaller of the two
        return (max(values[0].item(), 0.0) if full else 0.0), values[-1].item()

    def solve(self, rhs: Tensor, rho: Tensor | float) -> Tensor:
        values, vectors = self._eigen(rhs)
        codes = self._apply(vectors.T, nnf.pixel_unshuffle(rhs, self.size))
        codes = codes / (values.repeat(rhs.shape[1]).view(-1, 1, 1) + rho)
        return nnf.pixel_shuffle(self._apply(vectors, codes), self.size)
