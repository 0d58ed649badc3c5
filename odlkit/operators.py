"""Linear operators ``A``: forward, adjoint, exact spectral constants and the regularised solve ``(A^T A + rho I)^-1``.

Every operator maps ``(B, C, H, W)`` tensors of any float dtype on any device; what it needs (spectra, masks) is moved to
the input's dtype and device once and kept.  Operators that are diagonal in the Fourier basis say so through ``gram``, the
eigenvalues of ``A^T A`` on the half-plane of ``rfft2``; scaling, stacking and composing them keep that, so their solves
stay closed form.  Everything else solves by conjugate gradients, to a tolerance, and raises when it misses it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as nnf


@runtime_checkable
class LinearMap(Protocol):
    """What odlkit asks of an operator: ``A`` and ``A_adjoint`` (DeepInverse's linear physics have both)."""

    def A(self, x: Tensor) -> Tensor: ...
    def A_adjoint(self, y: Tensor) -> Tensor: ...


class NotConverged(RuntimeError):
    """An inner solve stopped above its tolerance."""


def conjugate_gradient(matvec, rhs: Tensor, *, x0: Tensor | None = None, rtol: float | None = None, max_iter: int = 500):
    """Solve ``M x = rhs`` for a symmetric positive definite ``matvec``, each item of the batch on its own.

    Stops when ``||rhs - M x|| <= rtol ||rhs||`` for all items (default: ``1e-10`` in float64, ``1e-5`` in float32) and
    raises `NotConverged` when ``max_iter`` steps do not get there.  Shapes: ``(B, ...)`` in and out.
    """
    rtol = rtol if rtol is not None else (1e-10 if rhs.dtype == torch.float64 else 1e-5)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(1).view(-1, *[1] * (a.dim() - 1))

    x = torch.zeros_like(rhs) if x0 is None else x0.clone()
    r = rhs - matvec(x) if x0 is not None else rhs.clone()
    p, rr, target = r.clone(), dot(r, r), rtol**2 * dot(rhs, rhs)
    for _ in range(max_iter):
        if bool((rr <= target).all()):
            return x
        q = matvec(p)
        step = rr / dot(p, q).clamp_min(torch.finfo(rhs.dtype).tiny)
        step = torch.where(rr <= target, torch.zeros_like(step), step)  # finished items stand still
        x, r = x + step * p, r - step * q
        rr, old = dot(r, r), rr
        p = r + rr / old.clamp_min(torch.finfo(rhs.dtype).tiny) * p
    if bool((rr <= target).all()):
        return x
    worst = (rr / dot(rhs, rhs).clamp_min(torch.finfo(rhs.dtype).tiny)).max().sqrt().item()
    raise NotConverged(f"conjugate gradients: relative residual {worst:.1e} after {max_iter} steps, wanted {rtol:.0e}")


class Operator:
    """Base class: a subclass gives ``A`` and ``A_adjoint`` and, where it has them, ``gram`` or ``eigenvalue_range``."""

    def A(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def A_adjoint(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def __call__(self, x: Tensor) -> Tensor:
        return self.A(x)

    def gram(self, x: Tensor) -> Tensor | None:
        """Eigenvalues of ``A^T A`` for inputs like ``x`` on the ``rfft2`` half-plane, or ``None`` if not circulant."""
        return None

    def normal(self, x: Tensor) -> Tensor:
        """``A^T A x``, by two transforms where ``gram`` is known."""
        gram = self.gram(x)
        if gram is None:
            return self.A_adjoint(self.A(x))
        return torch.fft.irfft2(gram * torch.fft.rfft2(x), s=x.shape[-2:])

    def eigenvalue_range(self, x: Tensor) -> tuple[float, float]:
        """Bounds ``(m, L)`` with ``m I <= A^T A <= L I`` for inputs like ``x``; L is ``||A||^2``.

        Exact where the operator has a closed form.  The fallback runs Lanczos in float64, returns the largest Ritz value
        plus its residual (so an upper bound on the nearest eigenvalue) and 0, which is always a valid lower bound.
        """
        gram = self.gram(x)
        if gram is not None:
            return max(gram.min().item(), 0.0), gram.max().item()
        return 0.0, largest_eigenvalue(lambda z: self.A_adjoint(self.A(z)), x)

    def solve(self, rhs: Tensor, rho: Tensor | float) -> Tensor:
        """``(A^T A + rho I)^-1 rhs`` for ``rho > 0`` (a float or ``(B, 1, 1, 1)``)."""
        gram = self.gram(rhs)
        if gram is not None:
            return torch.fft.irfft2(torch.fft.rfft2(rhs) / (gram + rho), s=rhs.shape[-2:])
        return conjugate_gradient(lambda z: self.A_adjoint(self.A(z)) + rho * z, rhs)

    def __matmul__(self, other: Operator) -> Operator:
        return Compose(self, other)

    def __rmul__(self, factor: float) -> Operator:
        return Scaled(self, factor)


def largest_eigenvalue(matvec, x: Tensor, steps: int = 60, seed: int = 0) -> float:
    """Largest eigenvalue of a symmetric positive semidefinite ``matvec`` on tensors like ``x[:1]``, by Lanczos.

    With full re-orthogonalisation in float64; the returned value is the top Ritz value plus its residual norm.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (1, *x.shape[1:])
    q = torch.randn(shape, generator=generator, dtype=torch.float64).to(x.device)
    basis, alphas, betas = [q / q.norm()], [], []
    for _ in range(min(steps, q.numel())):
        w = matvec(basis[-1].to(x.dtype)).to(torch.float64)
        alphas.append((w * basis[-1]).sum().item())
        for _ in range(2):
            for b in basis:
                w = w - (w * b).sum() * b
        beta = w.norm().item()
        betas.append(beta)
        if beta < 1e-12 * max(map(abs, alphas)) or beta == 0.0:
            break
        basis.append(w / beta)
    tri = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    off = torch.tensor(betas[: len(alphas) - 1], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(tri + torch.diag(off, 1) + torch.diag(off, -1))
    return values[-1].item() + abs(betas[len(alphas) - 1] * vectors[-1, -1].item())


class Identity(Operator):
    """``A x = x``."""

    def A(self, x: Tensor) -> Tensor:
        return x

    A_adjoint = A

    def gram(self, x: Tensor) -> Tensor:
        return torch.ones(x.shape[-2], x.shape[-1] // 2 + 1, dtype=x.dtype, device=x.device)


class _Cache:
    """Tensors made once per (size, dtype, device), so that no iteration recomputes a spectrum."""

    def __init__(self) -> None:
        self.kept: dict[Any, Tensor] = {}

    def __call__(self, key: Any, make) -> Tensor:
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

    def __init__(self, kernel: Tensor):
        if kernel.dim() not in (2, 4):
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

    ``A = M K``: circular convolution on the large grid, then the crop where no wrap-around is felt.  ``||A|| <= max |k_hat|``
    is used as its bound; there is no closed-form solve, so conjugate gradients run.
    """

    def __init__(self, kernel: Tensor):
        self.blur = Blur(kernel)
        h, w = kernel.shape[-2:]
        self.before, self.after = (h // 2, w // 2), (h - 1 - h // 2, w - 1 - w // 2)

    def extend(self, y: Tensor, mode: str = "replicate") -> Tensor:
        """Pad an image of the seen size to the scene's size."""
        (top, left), (bottom, right) = self.before, self.after
        return nnf.pad(y, (right, left, bottom, top), mode=mode) if mode != "constant" else nnf.pad(y, (right, left, bottom, top))

    def crop(self, x: Tensor) -> Tensor:
        """The seen part of an image of the scene's size."""
        (top, left), (bottom, right) = self.before, self.after
        return x[..., bottom : x.shape[-2] - top, right : x.shape[-1] - left]

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

    A_adjoint = A

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
        return (rhs - self.A_adjoint(self.A(rhs)) / (1 + rho)) / rho  # Woodbury with A A^T = I


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

    def solve(self, rhs: Tensor, rho: Tensor | float) -> Tensor:
        small = self.A(rhs)
        inner = torch.fft.irfft2(torch.fft.rfft2(small) / (self._small_gram(rhs) + rho), s=small.shape[-2:])
        return (rhs - self.A_adjoint(inner)) / rho


class Gradient(Operator):
    """Circular forward differences: ``(B, C, H, W) -> (B, 2C, H, W)``, horizontal channels first, ``||A||^2 <= 8``."""

    def A(self, x: Tensor) -> Tensor:
        return torch.cat([x.roll(-1, -1) - x, x.roll(-1, -2) - x], dim=1)

    def A_adjoint(self, y: Tensor) -> Tensor:
        dx, dy = y.chunk(2, dim=1)
        return dx.roll(1, -1) - dx + dy.roll(1, -2) - dy

    def __init__(self) -> None:
        self._cache = _Cache()

    def gram(self, x: Tensor) -> Tensor:
        def make() -> Tensor:
            def half(n: int, m: int) -> Tensor:  # |exp(i w) - 1|^2 = 4 sin^2(w / 2)
                return 4 * torch.sin(math.pi * torch.arange(m, dtype=torch.float64, device=x.device) / n).square()

            height, width = x.shape[-2:]
            return (half(height, height)[:, None] + half(width, width // 2 + 1)[None]).to(x.dtype)

        return self._cache(_key(x), make)


class Wavelet(Operator):
    """Orthonormal periodic wavelet analysis ``A x`` with ``A^T A = A A^T = I``; coefficients laid out as one image.

    Uses PyWavelets for the filters (``haar``, ``db2`` ... , any orthogonal family).  Both sides must be multiples of
    ``2 ** levels``.  The coarse band is the top left corner of the result.
    """

    def __init__(self, name: str = "haar", levels: int = 3):
        import pywt

        wavelet = pywt.Wavelet(name)
        if not wavelet.orthogonal:
            raise ValueError(f"wavelet: expected an orthogonal family such as 'haar' or 'db4', got {name!r}")
        self.name, self.levels = name, levels
        self.filters = (torch.tensor(wavelet.dec_lo, dtype=torch.float64), torch.tensor(wavelet.dec_hi, dtype=torch.float64))
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
        out = x.clone()
        height, width = x.shape[-2:]
        bank = self._bank(x)
        taps = bank.shape[-1]
        for _ in range(self.levels):
            block = out[..., :height, :width].reshape(-1, 1, height, width)
            bands = nnf.conv2d(_wrap(block, taps - 2, before=False), bank, stride=2)  # (BC, 4, h/2, w/2)
            height, width = height // 2, width // 2
            ll, lh, hl, hh = bands.reshape(*x.shape[:2], 4, height, width).unbind(2)
            out[..., : 2 * height, : 2 * width] = torch.cat([torch.cat([ll, lh], -1), torch.cat([hl, hh], -1)], -2)
        return out

    def A_adjoint(self, y: Tensor) -> Tensor:
        self._check(y)
        out = y.clone()
        bank = self._bank(y)
        taps = bank.shape[-1]
        for level in reversed(range(self.levels)):
            height, width = y.shape[-2] >> (level + 1), y.shape[-1] >> (level + 1)
            c = out[..., : 2 * height, : 2 * width]
            top, bottom = c[..., :height, :], c[..., height:, :]
            bands = torch.stack([top[..., :width], top[..., width:], bottom[..., :width], bottom[..., width:]], 2)
            z = nnf.conv_transpose2d(bands.reshape(-1, 4, height, width), bank, stride=2)  # (BC, 1, 2h + n - 2, ...)
            out[..., : 2 * height, : 2 * width] = _unwrap(z, 2 * height, 2 * width).reshape(*y.shape[:2], 2 * height, 2 * width)
        return out

    def gram(self, x: Tensor) -> Tensor:
        return torch.ones(x.shape[-2], x.shape[-1] // 2 + 1, dtype=x.dtype, device=x.device)


def _wrap(x: Tensor, extra: int, before: bool) -> Tensor:
    """Periodic extension by ``extra`` rows and columns (``extra`` may exceed the size)."""
    if extra == 0:
        return x
    rows = torch.arange(x.shape[-2] + extra, device=x.device) % x.shape[-2]
    cols = torch.arange(x.shape[-1] + extra, device=x.device) % x.shape[-1]
    return x[..., rows[:, None], cols]


def _unwrap(x: Tensor, height: int, width: int) -> Tensor:
    """Adjoint of `_wrap`: add what lies outside ``height x width`` back periodically."""
    out = x[..., :height, :width].clone()
    rows = torch.arange(x.shape[-2], device=x.device) % height
    cols = torch.arange(x.shape[-1], device=x.device) % width
    out.zero_()
    folded = out.new_zeros(*x.shape[:-1], width).index_add_(-1, cols, x)
    return out.index_add_(-2, rows, folded)


class BlockSampling(Operator):
    """Compressive sensing of non-overlapping blocks: ``y = Phi vec(block)`` for every ``size x size`` block.

    ``phi`` is ``(M, size^2)``; the result is ``(B, C M, H / size, W / size)``.  The solve uses the ``M x M`` matrix
    ``Phi Phi^T`` once (Woodbury).  Raises ``ValueError`` unless both sides are multiples of the block.
    """

    def __init__(self, phi: Tensor):
        self.size = math.isqrt(phi.shape[1])
        if phi.dim() != 2 or self.size**2 != phi.shape[1]:
            raise ValueError(f"phi: expected shape (M, size^2), got {tuple(phi.shape)}")
        self.phi = phi
        self._cache = _Cache()

    def _phi(self, x: Tensor) -> Tensor:
        return self._cache((x.dtype, x.device), lambda: self.phi.to(x))

    def A(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        if height % self.size or width % self.size:
            raise ValueError(f"image: both sides must be multiples of {self.size}, got {(height, width)}")
        blocks = nnf.pixel_unshuffle(x, self.size).reshape(batch, channels, self.size**2, height // self.size, -1)
        return torch.einsum("mn,bcnhw->bcmhw", self._phi(x), blocks).reshape(batch, -1, height // self.size, width // self.size)

    def A_adjoint(self, y: Tensor) -> Tensor:
        phi = self._phi(y)
        codes = y.reshape(len(y), -1, len(phi), *y.shape[-2:])
        blocks = torch.einsum("mn,bcmhw->bcnhw", phi, codes)
        return nnf.pixel_shuffle(blocks.reshape(len(y), -1, *y.shape[-2:]), self.size)

    def eigenvalue_range(self, x: Tensor) -> tuple[float, float]:
        singular = torch.linalg.svdvals(self.phi.double())
        return (singular[-1].item() ** 2 if len(self.phi) >= self.phi.shape[1] else 0.0), singular[0].item() ** 2

    def solve(self, rhs: Tensor, rho: Tensor | float) -> Tensor:
        values, vectors = torch.linalg.eigh(self._phi(rhs) @ self._phi(rhs).T)  # M x M
        small = self.A(rhs)
        codes = small.reshape(len(rhs), -1, len(values), *small.shape[-2:])
        rho_codes = torch.as_tensor(rho, dtype=rhs.dtype, device=rhs.device).reshape(-1, 1, 1, 1, 1)
        inner = torch.einsum("mk,bcmhw->bckhw", vectors, codes) / (values.view(-1, 1, 1) + rho_codes)
        inner = torch.einsum("mk,bckhw->bcmhw", vectors, inner).reshape(small.shape)
        return (rhs - self.A_adjoint(inner)) / rho


class Scaled(Operator):
    """``factor * A``."""

    def __init__(self, operator: LinearMap, factor: float):
        self.operator, self.factor = as_operator(operator), factor

    def A(self, x: Tensor) -> Tensor:
        return self.factor * self.operator.A(x)

    def A_adjoint(self, y: Tensor) -> Tensor:
        return self.factor * self.operator.A_adjoint(y)

    def gram(self, x: Tensor) -> Tensor | None:
        gram = self.operator.gram(x)
        return None if gram is None else self.factor**2 * gram

    def eigenvalue_range(self, x: Tensor) -> tuple[float, float]:
        low, high = self.operator.eigenvalue_range(x)
        return self.factor**2 * low, self.factor**2 * high

    def solve(self, rhs: Tensor, rho: Tensor | float) -> Tensor:
        square = self.factor**2
        return self.operator.solve(rhs, rho / square) / square if square else rhs / rho


class Compose(Operator):
    """``A x = outer(inner(x))``; closed-form solve where both are circulant or the outer one is an isometry."""

    def __init__(self, outer: LinearMap, inner: LinearMap):
        self.outer, self.inner = as_operator(outer), as_operator(inner)

    def A(self, x: Tensor) -> Tensor:
        return self.outer.A(self.inner.A(x))

    def A_adjoint(self, y: Tensor) -> Tensor:
        return self.inner.A_adjoint(self.outer.A_adjoint(y))


class Stack(Operator):
    """``A x = (A_1 x, A_2 x, ...)`` concatenated along channels, so ``A^T A = sum_i A_i^T A_i``.

    All parts must return images of one size.  ``gram`` is the sum of the parts', so a stack of blurs and gradients keeps
    the Fourier solve, which is what half-quadratic splitting needs.
    """

    def __init__(self, *operators: LinearMap):
        self.operators = [as_operator(op) for op in operators]
        self.channels: list[int] = []

    def A(self, x: Tensor) -> Tensor:
        parts = [op.A(x) for op in self.operators]
        self.channels = [part.shape[1] for part in parts]
        return torch.cat(parts, dim=1)

    def A_adjoint(self, y: Tensor) -> Tensor:
        pieces = y.split(self.channels, dim=1)
        return sum((op.A_adjoint(p) for op, p in zip(self.operators, pieces, strict=True)), torch.zeros(()).to(y))

    def gram(self, x: Tensor) -> Tensor | None:
        grams = [op.gram(x) for op in self.operators]
        return None if any(g is None for g in grams) else sum(grams[1:], grams[0])  # type: ignore[arg-type, return-value]


class Adapted(Operator):
    """A foreign object with ``A`` and ``A_adjoint`` (a DeepInverse physics, say) behind odlkit's interface."""

    def __init__(self, operator: LinearMap):
        self.operator = operator

    def A(self, x: Tensor) -> Tensor:
        return self.operator.A(x)

    def A_adjoint(self, y: Tensor) -> Tensor:
        return self.operator.A_adjoint(y)


def as_operator(operator: LinearMap) -> Operator:
    """Return odlkit operators as they are and wrap anything else that has ``A`` and ``A_adjoint``."""
    if isinstance(operator, Operator):
        return operator
    if isinstance(operator, LinearMap):
        return Adapted(operator)
    raise TypeError(f"operator: expected an object with A and A_adjoint, got {type(operator).__name__}")


__all__: Sequence[str] = [
    "Adapted", "Blur", "BlockSampling", "BlurDecimate", "Compose", "Decimation", "Gradient", "Identity", "LinearMap", "Mask",
    "NotConverged", "Operator", "Scaled", "Stack", "ValidBlur", "Wavelet", "as_operator", "conjugate_gradient",
]  # fmt: skip
