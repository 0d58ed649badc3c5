"""Architecture normalization: networks of convolutions whose Lipschitz constant is at most delta by construction.

A convolution is a linear operator on images, and its norm is not that of its weights reshaped to a matrix.  With the symbol
``W(t) = sum_pq w[:, :, p, q] exp(-i (p t_1 + q t_2))``, a matrix for each frequency, the norm is at most
``sup_t sigma_max(W(t))`` for zero padding and for circular padding of every size, and `conv_norm_bound` bounds that.

`normalized` divides every layer by a running estimate of its norm while a network is trained; `certified` then rescales once
by the bound and returns plain weights, of which `lipschitz_bound` says what was proved, up to round-off.
Source: GDC (10), (11), corrected.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.nn.utils import parametrize

from odlkit.networks.conv import ConvUnit

ISOMETRIES = (nn.Identity, nn.Flatten, nn.PixelShuffle, nn.PixelUnshuffle)


def random_step_norm(weight: Tensor, generator: torch.Generator | None = None) -> float:
    """The paper's ``z^T (w w^T)^2 z / (||w^T z|| ||w w^T z||) = ||w x|| / ||x||`` at ``x = w^T z``, z Gaussian.

    ``weight`` is ``(C_out, C_in, h, w)``, reshaped to a matrix.  One power step from a fresh vector: at most
    `reshaped_norm`, and random.  Eq: GDC (11).
    """
    matrix = weight.detach().flatten(1).double()
    x = matrix.mT @ torch.randn(len(matrix), generator=generator, dtype=torch.float64).to(matrix)
    return ((matrix @ x).norm() / x.norm()).item()


def reshaped_norm(weight: Tensor) -> float:
    """``sigma_max`` of the weights as a ``C_out x (C_in h w)`` matrix; the convolution's norm is at least that."""
    return torch.linalg.matrix_norm(weight.detach().flatten(1).double(), 2).item()


def reshaped_bound(weight: Tensor) -> float:
    """``sqrt(h w) sigma_max(reshaped)``, at least the convolution's norm: a pixel is in at most ``h w`` patches."""
    return math.prod(weight.shape[2:]) ** 0.5 * reshaped_norm(weight)


def circular_norm(weight: Tensor, height: int, width: int | None = None) -> float:
    """The exact norm of circular convolution with ``weight`` (C_out, C_in, h, w) on images of one size.

    ``max sigma_max(W(t))`` over the frequencies of the ``height x width`` grid, in float64.
    """
    w, (h, k) = weight.detach().double(), weight.shape[2:]
    sides = (height, height if width is None else width)
    folded = nnf.pad(w, (0, -k % sides[1], 0, -h % sides[0]))  # a kernel larger than the image wraps around
    folded = folded.unflatten(3, (-1, sides[1])).sum(3).unflatten(2, (-1, sides[0])).sum(2)
    symbol = torch.fft.rfft2(folded).flatten(2).permute(2, 0, 1)  # (frequencies, C_out, C_in)
    gram = symbol.mH @ symbol if symbol.shape[1] > symbol.shape[2] else symbol @ symbol.mH
    return torch.linalg.eigvalsh(gram)[:, -1].max().clamp_min(0).sqrt().item()


def conv_norm_bound(weight: Tensor, n: int = 32) -> float:
    """A bound on the norm of convolution with ``weight`` (C_out, C_in, h, w): zero or circular padding, every image size.

    ``max_{n x n grid} sigma_max(W(t)) / (cos(pi [h/2] / n) cos(pi [w/2] / n))``: a trigonometric polynomial of degree m
    exceeds its maximum on n > 2m points by at most ``1 / cos(pi m / n)``: 1% for 3x3 and n = 32, which costs 0.3 s for
    64 channels.  Strides and dilations do not make the norm larger.
    Raises ``ValueError`` for ``n <= 2 max([h/2], [w/2])``.  Eq: GDC (10).
    """
    degrees = [side // 2 for side in weight.shape[2:]]
    if n <= 2 * max(degrees):
        raise ValueError(f"n: expected a grid of more than {2 * max(degrees)} points for this kernel, got {n}")
    if max(degrees) == 0:
        return reshaped_norm(weight)  # 1x1: the symbol is constant
    return circular_norm(weight, n) / math.prod(math.cos(math.pi * m / n) for m in degrees)


def local_norm(function: Callable[[Tensor], Tensor], x: Tensor, steps: int = 50, seed: int = 0) -> float:
    """The largest singular value of the Jacobian of ``function`` at ``x`` (B, ...), by power iteration from below."""
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(x)
    pull = torch.func.vjp(function, x)[1]
    size = 0.0
    for _ in range(steps):
        out = torch.func.jvp(function, (x,), (v / v.norm(),))[1]
        size, (v,) = out.norm().item(), pull(out)
        if size == 0:
            break
    return size


def slope_and_bend(layer: nn.Module) -> tuple[float, float]:
    """``sup |phi'|`` and the Lipschitz constant of ``phi'`` for an activation (inf at a kink); 1 and 0 for an isometry.

    Raises ``ValueError`` for a layer with which the bound says nothing, batch normalization for one.
    """
    match layer:
        case _ if isinstance(layer, ISOMETRIES):
            return 1.0, 0.0
        case nn.ReLU():
            return 1.0, math.inf
        case nn.LeakyReLU():
            return max(1.0, abs(layer.negative_slope)), math.inf
        case nn.ELU():
            return max(1.0, abs(layer.alpha)), (1.0 if layer.alpha == 1 else math.inf)
        case nn.Tanh():
            return 1.0, 4 / 27**0.5
        case nn.Sigmoid():
            return 0.25, 1 / 108**0.5
        case nn.Softplus():
            return 1.0, layer.beta / 4
        case nn.SiLU():
            return 1.1, 0.5
        case nn.AdaptiveAvgPool2d(output_size=1 | (1, 1)):
            return 1.0, 0.0  # the mean of n values: 1 / sqrt(n)
        case nn.BatchNorm2d():
            raise ValueError("net: expected no batch normalization, whose gain changes with the data; fold_batch_norm first")
    raise ValueError(f"net: expected convolutions, linear layers and known activations, got {type(layer).__name__}")


def layers(net: nn.Module) -> Iterator[tuple[nn.Module, int | None]]:
    """The layers of a sequential network in order, each with how many of its input channels depend on the image.

    ``None`` means all of them.  The last input channel of a `ConvUnit` is the noise level, held constant; its (un)shuffling
    of pixels is an isometry, if the sides are multiples of ``fold``.  Raises ``ValueError`` for what is not sequential.
    """
    if isinstance(net, ConvUnit):
        inside = net.config["channels"] * net.fold**2
        yield from ((layer, inside if i == 0 else None) for i, (layer, _) in enumerate(layers(net.layers)))
    elif isinstance(net, nn.Sequential):
        for part in net:
            yield from layers(part) if isinstance(part, nn.Sequential) else [(part, None)]
    else:
        raise ValueError(f"net: expected a ConvUnit or an nn.Sequential, got {type(net).__name__}")


def weighted(net: nn.Module) -> Iterator[tuple[nn.Conv2d | nn.Linear, int]]:
    """The convolutions and linear layers among `layers`; raises ``ValueError`` for one that the bound does not cover."""
    for layer, channels in layers(net):
        if isinstance(layer, nn.Conv2d):
            if layer.groups != 1 or layer.padding_mode not in ("zeros", "circular"):
                got = f"groups = {layer.groups}, padding_mode = {layer.padding_mode!r}"
                raise ValueError(f"net: expected convolutions with one group and zero or circular padding, got {got}")
            padding = (0, 0) if isinstance(layer.padding, str) else layer.padding  # "same" is half the kernel
            sides = zip(layer.kernel_size, layer.dilation, padding, strict=True)
            if layer.padding_mode == "circular" and any(2 * p > d * (k - 1) for k, d, p in sides):
                raise ValueError("net: expected circular padding of at most half the kernel, got wider (pixels count twice)")
            yield layer, channels or layer.in_channels
        elif isinstance(layer, nn.Linear):
            yield layer, channels or layer.in_features


def share(net: nn.Module, delta: float) -> float:
    """What each of the K weighted layers may have: ``delta^(1/K)``, activations steeper than 1 taken off.  Eq: GDC (10)."""
    if not 0 < delta <= 1:
        raise ValueError(f"delta: expected a number in (0, 1], got {delta}")
    count = sum(1 for _ in weighted(net))
    if count == 0:
        raise ValueError("net: expected at least one convolution or linear layer, got none")
    slopes = math.prod(slope_and_bend(m)[0] for m, _ in layers(net) if not isinstance(m, nn.Conv2d | nn.Linear))
    return (delta / max(slopes, 1.0)) ** (1 / count)


def kernels(weight: Tensor, channels: int) -> Tensor:
    """The part of a layer's weights that meets the image, ``(C_out, channels, h, w)``; a matrix is a 1x1 convolution."""
    return (weight if weight.dim() == 4 else weight[:, :, None, None])[:, :channels]


class OperatorNorm(nn.Module):
    """``w -> share w / ||conv_w||`` by power iterations whose vectors are carried from one training step to the next.

    A circular convolution acts on each frequency by itself, so each of the ``size x size`` grid has a vector ``x_t`` (C_in)
    and ``norm = max_t ||W(t) x_t||``.  (One image for all would forget the frequencies that do not lead, and miss the next
    leader.)  One use in training mode is one iteration, ``x_t <- W(t)^* W(t) x_t``, normalized; gradients pass through the
    norm with x held fixed, as in spectral normalization.  In evaluation mode x stays.  A cascade that uses a network often
    in a step iterates once under ``parametrize.cached()``.
    """

    x: Tensor
    waves: Tensor

    def __init__(self, weight: Tensor, channels: int, share: float, size: int = 16, start: int = 30):
        super().__init__()
        self.channels, self.share = channels, share
        height, width = weight.shape[2:] if weight.dim() == 4 else (1, 1)
        size = size if max(height, width) > 1 else 1
        rows, columns = torch.meshgrid(
            torch.arange(size), torch.arange(size // 2 + 1), indexing="ij"
        )  # the other half: conjugate
        p, q = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
        angle = -2 * math.pi / size * (p.reshape(-1, 1, 1) * rows.flatten() + q.reshape(-1, 1, 1) * columns.flatten())
        self.register_buffer(
            "waves", torch.stack([angle.cos(), angle.sin()], -1).to(weight), persistent=False
        )  # (taps, 1, t, 2)
        x = torch.randn(channels, rows.numel(), 2, generator=torch.Generator().manual_seed(0))
        self.register_buffer("x", (x / torch.linalg.vector_norm(x, dim=(0, 2), keepdim=True)).to(weight))
        with torch.no_grad():
            for _ in range(start):
                self(weight)

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            w = kernels(weight, self.channels).flatten(2).permute(2, 0, 1)  # (taps, C_out, C_in)
            with torch.no_grad():
                v = self.respond(w, self.x, self.waves)  # (C_out, t)
                leader = torch.view_as_real(v).square().sum((0, 2)).argmax()
            norm = self.respond(w, self.x[:, leader, None], self.waves[:, :, leader, None]).norm()
            if self.training:
                with torch.no_grad():
                    spread = torch.view_as_real(v * torch.view_as_complex(self.waves).conj()).flatten(
                        0, 1
                    )  # (taps C_out, t, 2)
                    x = (w.flatten(0, 1).mT @ spread.flatten(1)).view_as(self.x)
                    least = torch.finfo(x.dtype).tiny
                    self.x = x * x.square().sum((0, 2), keepdim=True).clamp_min(least).rsqrt()  # faster than vector_norm
            return weight * (self.share / norm)

    @staticmethod
    def respond(w: Tensor, x: Tensor, waves: Tensor) -> Tensor:
        """``W(t) x_t`` for each frequency, ``(C_out, t)`` complex: real products, then the sum over the taps."""
        parts = (w @ x.flatten(1)).unflatten(-1, x.shape[1:])  # (taps, C_out, t, 2)
        return (torch.view_as_complex(parts) * torch.view_as_complex(waves)).sum(0)


def normalized(net: nn.Module, delta: float = 1.0, size: int = 16) -> nn.Module:
    """Keep every convolution of ``net`` at the norm ``delta^(1/K)`` while it is trained; changes and returns ``net``.

    ``w~ = delta^(1/K) w / ||conv_w||`` at every use, the norm from `OperatorNorm`: close, from below, so `certified` has the
    last word.  (The paper's ``w / rho(w)`` has no delta.)  Raises ``ValueError`` for a delta outside (0, 1] and for networks
    without a bound: see `layers`, `weighted`, `slope_and_bend`.  Eq: GDC (10), (11), corrected.
    """
    part = share(net, delta)
    for layer, channels in weighted(net):
        parametrize.register_parametrization(layer, "weight", OperatorNorm(layer.weight, channels, part, size))
    return net


def certified(net: nn.Module, delta: float = 1.0, n: int = 32) -> nn.Module:
    """A copy of ``net`` with plain weights and ``lipschitz_bound(copy, n) <= delta``.

    Every layer whose bound exceeds ``delta^(1/K)`` is scaled down to it; after `normalized` that is a per cent or so.
    Biases stay: they move the output, not distances.  Eq: GDC (10).
    """
    net = copy.deepcopy(net)
    part = share(net, delta)
    for layer, channels in weighted(net):
        if parametrize.is_parametrized(layer, "weight"):
            weight = layer.weight.detach()
            layer.__class__ = type(layer).__bases__[0]  # torch's removal would break the original, which shares the class
            del layer.parametrizations
            layer.weight = nn.Parameter(weight)
        slack = 1 - 32 * torch.finfo(layer.weight.dtype).eps  # the rounding of the product below
        bound = conv_norm_bound(kernels(layer.weight, channels), n)
        with torch.no_grad():
            layer.weight *= min(1.0, slack * part / bound)
    return net


def certify_norms(net: nn.Module, n: int = 32) -> list[float]:
    """`conv_norm_bound` of each weighted layer in order, with respect to the image, from the weights as they are."""
    return [conv_norm_bound(kernels(layer.weight, channels), n) for layer, channels in weighted(net)]


def lipschitz_bound(net: nn.Module, n: int = 32) -> float:
    """A number delta with ``||N(u) - N(v)|| <= delta ||u - v||`` for all images: norms times slopes.  Eq: GDC (10)."""
    return _bounds(net, n)[0]


def gradient_bound(net: nn.Module, n: int = 32, summed: bool = False) -> float:
    """A Lipschitz constant of the gradient (Jacobian) of a sequential ``net``, so of the discriminative module ``-grad d``.

    With ``|phi'| <= 1`` and a ``kappa``-Lipschitz ``phi'`` between layers of norms ``s_k`` it is
    ``kappa S sum_{k < K} prod_{j <= k} s_j``, ``S = prod s_j``.  The norm of d's layers alone bounds ``||grad d||``, not how
    fast it turns.  ``summed``: d is the sum of all outputs, of logits at every position, say; then it is
    ``kappa sum_{k < K} prod_{j <= k} s_j^2 prod_{j > k} a_j``, ``a_j = max_c sum |w_j[:, c]|``, for images of every size.
    Raises ``ValueError`` for ReLU and other kinks, across which the gradient jumps.  Eq: GDC Proposition 3.
    """
    for layer, _ in layers(net):
        if not isinstance(layer, nn.Conv2d | nn.Linear) and slope_and_bend(layer)[1] == math.inf:
            kind = type(layer).__name__
            raise ValueError(f"net: expected smooth activations (Tanh, Softplus, SiLU, ELU), got {kind}: its gradient jumps")
    return _bounds(net, n, summed)[1]


def _bounds(net: nn.Module, n: int, summed: bool = False) -> tuple[float, float]:
    """Lipschitz constants of the network and of its Jacobian: a linear layer multiplies both, ``(phi g)' = phi'(g) g'``."""
    norms = zip(certify_norms(net, n), weighted(net), strict=True)
    lipschitz, bent = 1.0, 0.0
    for layer, _ in layers(net):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            norm, (_, channels) = next(norms)
            largest = kernels(layer.weight, channels).detach().abs().sum((0, 2, 3)).max().item()
            lipschitz, bent = norm * lipschitz, (largest if summed else norm) * bent
        else:
            slope, bend = slope_and_bend(layer)
            lipschitz, bent = slope * lipschitz, slope * bent + (bend * lipschitz**2 if bend else 0.0)
    return lipschitz, bent
