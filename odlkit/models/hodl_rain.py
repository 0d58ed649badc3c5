"""HODL for rain streaks: a scene and its streaks split by an augmented Lagrangian, after a network that knows both.

    ``min 1/2 ||u_b + u_r - b||^2 + kappa_b ||v_b||_1 + kappa_r ||v_r||_1``  subject to  ``v_b = W_b u_b, v_r = W_r u_r``,

the background u_b in colour, the streaks u_r one layer for all channels.  In print ``W_b = I`` and ``W_r = grad``; both are
parameters here, since the two priors look exchanged.  W_r ends with u_r itself, whose v is kept >= 0: in W_r = grad the mean
of u_r would be free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.nn.utils import parametrize

from odlkit.linear import Operator
from odlkit.models.hodl import Map, averaged, compose
from odlkit.networks.nonexpansive import soft
from odlkit.networks.normalize import OperatorNorm, conv_norm_bound
from odlkit.problem import sum_items

REACH = 4  # rows between the two pixels of a difference along the streaks
SLOPES = range(-3, 4)  # the columns between them that are tried: up to 37 degrees from the vertical
MARGIN = 2 * REACH  # pixels added on each side, so that the circular operators join no opposite sides
SPEED = 4.0  # of the learned logarithms, against the weights of a network
Shift = tuple[int, int | Sequence[int]]


class Shifts(Operator):
    """``W x``: circular differences ``x(p + shift) - x(p)``, ``(B, C, H, W) -> (B, N C, H, W)``; shift (0, 0) is x itself.

    A shift is (rows, columns), the columns a number or one for each item.
    """

    convolution = True

    def __init__(self, *shifts: Shift):
        self.shifts, self.widening = shifts, len(shifts)

    @staticmethod
    def moved(x: Tensor, shift: Shift, sign: int) -> Tensor:
        rows, columns = shift
        if isinstance(columns, int):
            return x.roll((sign * rows, sign * columns), (-2, -1))
        return torch.stack([item.roll((sign * rows, sign * c), (-2, -1)) for item, c in zip(x, columns, strict=True)])

    def A(self, x: Tensor) -> Tensor:
        return torch.cat([x if s == (0, 0) else self.moved(x, s, -1) - x for s in self.shifts], 1)

    def A_adjoint(self, y: Tensor) -> Tensor:
        parts = zip(self.shifts, y.chunk(self.widening, 1), strict=True)
        return torch.stack([part if s == (0, 0) else self.moved(part, s, 1) - part for s, part in parts]).sum(0)

    def gram(self, x: Tensor) -> Tensor:
        impulse = torch.zeros_like(x[:, :1])
        impulse[..., 0, 0] = 1
        return torch.fft.rfft2(self.A_adjoint(self.A(impulse))).real


def slopes(y: Tensor) -> list[int]:
    """The one of `SLOPES` along which the bright detail of each picture ``(B, C, H, W)`` changes least."""
    gray = y.mean(1, keepdim=True)
    detail = (gray - nnf.avg_pool2d(gray, 15, 1, 7, count_include_pad=False)).clamp_min(0)
    change = torch.stack([Shifts((REACH, s)).A(detail).abs().sum((1, 2, 3)) for s in SLOPES])
    return [SLOPES[i] for i in change.argmin(0).tolist()]


def reading(name: str, b: Tensor) -> tuple[Shifts, Shifts]:
    """``(W_b, W_r)``: "printed" ``I, grad``; "exchanged" ``grad, I``; "directional" across the streaks, along them.

    Raises ``ValueError`` for another name.
    """
    same, gradient = (0, 0), ((0, 1), (1, 0))
    match name:
        case "printed":
            return Shifts(same), Shifts(*gradient, same)
        case "exchanged":
            return Shifts(*gradient), Shifts(same)
        case "directional":
            return Shifts((0, 1)), Shifts((REACH, slopes(b)), same)
    raise ValueError(f"reading: expected printed, exchanged or directional, got {name!r}")


@dataclass
class Split:
    """The problem for data ``b`` ``(B, 3, H, W)`` and its augmented Lagrangian step, firmly non-expansive in l2.

    ``kappa_b`` and ``kappa_r`` hold one weight for each shift of W_b and of W_r, ``(N,)``, or one a pixel, ``(B, N, H, W)``.
    The Lagrangian is minimised over u and v in turns, with ``gamma/2 ||u - u^k||^2`` added, u exactly by Fourier transform.
    With ``s = v - lambda / beta``:

        u+ = argmin 1/2 ||u_b + u_r - b||^2 + beta/2 ||W u - s||^2 + gamma/2 ||u - u^k||^2
        v+ = prox_{kappa ||.||_1 / beta}(2 W u+ - s),    s+ = s + v+ - W u+

    (lambda before v, as in the proximal point form of ADMM), firmly non-expansive in ``gamma ||u||^2 + beta ||s||^2`` for
    any beta, gamma > 0: a convex f + g, no step size.  The state is ``z = (u_b, u_r, t_b, t_r)``, channels, with
    ``t = (beta / gamma)^(1/2) s``: in it the metric is gamma I, and what a network may do to u is measured in l2.
    Eq: HODL (8), Table 2.  Source: HODL section 4.3, rain streak removal.
    """

    b: Tensor
    W_b: Shifts
    W_r: Shifts
    kappa_b: Tensor
    kappa_r: Tensor
    beta: Any = 1.0
    gamma: Any = 1.0

    def __post_init__(self) -> None:
        self.gram_b, self.gram_r = self.W_b.gram(self.b), self.W_r.gram(self.b)
        self.kappa_b, self.kappa_r = (k.view(1, -1, 1, 1) if k.dim() == 1 else k for k in (self.kappa_b, self.kappa_r))
        if self.kappa_b.shape[1] != self.W_b.widening or self.kappa_r.shape[1] != self.W_r.widening:
            got = f"{self.kappa_b.shape[1]} and {self.kappa_r.shape[1]}"
            raise ValueError(f"kappa: expected {self.W_b.widening} and {self.W_r.widening} weights, got {got}")

    def parts(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``u_b`` (3 channels), ``u_r`` (1), ``t_b`` and ``t_r``."""
        c = self.b.shape[1]
        u_b, u_r, t_b, t_r = z.split([c, 1, c * self.W_b.widening, self.W_r.widening], 1)
        return u_b, u_r, t_b, t_r

    @property
    def scale(self) -> Any:
        return (self.beta / self.gamma) ** 0.5

    def start(self) -> Tensor:
        """``u_b = b``, no streaks, ``v = W u`` and no multiplier."""
        none = torch.zeros_like(self.b[:, :1])
        return torch.cat([self.b, none, self.scale * self.W_b.A(self.b), self.scale * self.W_r.A(none)], 1)

    def quadratic(self, u_b: Tensor, u_r: Tensor, s_b: Tensor, s_r: Tensor) -> tuple[Tensor, Tensor]:
        """u+: with ``p = 1 + gamma + beta |W_b|^2`` the background is ``(q_b - u_r) / p`` at each frequency."""
        beta, gamma, c = self.beta, self.gamma, self.b.shape[1]
        right_b = self.b + beta * self.W_b.A_adjoint(s_b) + gamma * u_b
        right_r = self.b.sum(1, keepdim=True) + beta * self.W_r.A_adjoint(s_r) + gamma * u_r
        q = torch.fft.rfft2(torch.cat([right_b, right_r], 1))
        p = 1 + gamma + beta * self.gram_b
        new_r = (q[:, c:] - q[:, :c].sum(1, keepdim=True) / p) / (c + gamma + beta * self.gram_r - c / p)
        new = torch.fft.irfft2(torch.cat([(q[:, :c] - new_r) / p, new_r], 1), s=self.b.shape[-2:])
        return new[:, :c], new[:, c:]

    def shrink(self, v_b: Tensor, v_r: Tensor) -> tuple[Tensor, Tensor]:
        """The prox of ``kappa ||.||_1 / beta``, the last channel of v_r kept >= 0."""
        at_b, at_r = self.kappa_b.repeat_interleave(self.b.shape[1], 1) / self.beta, self.kappa_r / self.beta
        streaks = (v_r[:, -1:] - at_r[:, -1:]).clamp_min(0)
        return soft(v_b, at_b), torch.cat([soft(v_r[:, :-1], at_r[:, :-1]), streaks], 1)

    def step(self, z: Tensor, params: Any = None, k: int = 0) -> Tensor:
        """D_num."""
        u_b, u_r, t_b, t_r = self.parts(z)
        s_b, s_r = t_b / self.scale, t_r / self.scale
        u_b, u_r = self.quadratic(u_b, u_r, s_b, s_r)
        Wb, Wr = self.W_b.A(u_b), self.W_r.A(u_r)
        v_b, v_r = self.shrink(2 * Wb - s_b, 2 * Wr - s_r)
        return torch.cat([u_b, u_r, self.scale * (s_b + v_b - Wb), self.scale * (s_r + v_r - Wr)], 1)

    def energy(self, z: Tensor) -> Tensor:
        """The objective at ``(u_b, max(u_r, 0))`` with ``v = W u``, ``(B,)``."""
        u_b, u_r = self.parts(z)[:2]
        u_r = u_r.clamp_min(0)
        kappa_b = self.kappa_b.repeat_interleave(self.b.shape[1], 1)
        sparse = sum_items(kappa_b * self.W_b.A(u_b).abs()) + sum_items(self.kappa_r * self.W_r.A(u_r).abs())
        return sum_items((u_b + u_r - self.b).square()) / 2 + sparse


KAPPA = ("kappa_b", "along", "sparse")
RANGE = 3.0  # of the logarithm of a factor of kappa
START = {"kappa_b": 0.01, "along": 0.015, "sparse": 0.008, "beta": 0.3, "gamma": 0.5}


def conv(inputs: int, outputs: int, dilation: int = 1, bias: bool = True) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size, zeros around."""
    return nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation, bias=bias)


class Prior(nn.Module):
    """What the picture says of scene and streaks, once for all iterations: ``(B, 3, H, W) -> (B, outputs, H, W)``.

    Sides are even.  A few dilated convolutions at half the size.  No iterate enters, so no bound is asked of it.
    Source: HODL section 6.2, "some prior information of u_r is employed as input".
    """

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.head, self.tail = conv(12, width), conv(width // 4 + 3, outputs)
        self.blocks = nn.ModuleList(nn.Sequential(nn.ReLU(), conv(width, width, d), nn.ReLU(), conv(width, width))
                                    for d in (1, 2, 4))  # fmt: skip

    def forward(self, b: Tensor) -> Tensor:
        h = self.head(nnf.pixel_unshuffle(b, 2))
        for block in self.blocks:
            h = h + block(h)
        return self.tail(torch.cat([nnf.pixel_shuffle(h, 2), b], 1))


class Streaks(nn.Module):
    """``T = I + alpha (D_num o D_net - I)`` of `Split`, directional, with D_net on ``(u_b, u_r)``; s passes it unchanged.

        u_b <- b + c A_2 relu(A_1 u_r + P_1(b)),    u_r <- c B_3 relu(B_2 relu(B_1 (u_b, u_r) + P_2(b)))

    at once, with convolutions A, B and P of `Prior`.  Each is non-expansive in u when its convolutions are, but both see
    u_r: together they may have the constant sqrt(2), hence ``c = 1 / sqrt(2)``.  With ``bounded=False`` the convolutions
    are free and c = 1: no theorem.  ``P_1, P_2`` are free in any case, and so is the factor from 1/20 to 20 by which the
    network of the data multiplies each kappa at each pixel: weights that depend on the data alone leave the split convex.
    With ``width=0`` D_net is the identity: the numbers of D_num are all that is learned (UNH).
    kappa, beta and gamma are learned as logarithms.  What is restored is u_b after ``depth`` steps.
    Eq: HODL (3).  Source: HODL section 6.2, a two-layer network for u_b, a three-layer one for u_r.
    """

    def __init__(self, width: int = 12, prior: int = 32, depth: int = 5, bounded: bool = True, alpha: float = 0.95,
                 start: dict[str, float] | None = None):  # fmt: skip
        super().__init__()
        self.start = START | (start or {})
        self.config: dict[str, Any] = {"width": width, "prior": prior, "depth": depth, "bounded": bounded, "alpha": alpha,
                                       "start": self.start}  # fmt: skip
        self.depth, self.alpha, self.bounded, self.share = depth, alpha, bounded, 0.5**0.5 if bounded else 1.0
        sizes = [(1, width), (width, 3)], [(4, width), (width, width), (width, 1)]
        self.prior = Prior(prior, 2 * width + len(KAPPA)) if width else nn.Identity()
        self.scene, self.rain = (nn.ModuleList(conv(*pair, bias=False) for pair in pairs if width) for pairs in sizes)
        self.logs = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in START})

    def number(self, name: str) -> Tensor:
        """kappa_b, along and sparse (kappa_r), beta or gamma."""
        return self.start[name] * (SPEED * self.logs[name]).exp()

    def split(self, b: Tensor, weigh: Tensor | None = None) -> Split:
        """The problem for data ``b`` ``(B, 3, H, W)`` with the numbers learned; ``weigh`` is what the data say of kappa."""
        kappa = torch.stack([self.number(name) for name in KAPPA]).view(1, -1, 1, 1)
        if weigh is not None:
            kappa = kappa * (RANGE * weigh.tanh()).exp()
        return Split(b, *reading("directional", b), kappa[:, :1], kappa[:, 1:], self.number("beta"), self.number("gamma"))

    def network(self, split: Split, seen_b: Tensor, seen_r: Tensor) -> Map:
        """D_net on the state of ``split``, ``seen_b`` and ``seen_r`` being P_1 and P_2 of its data."""

        def step(z: Tensor, params: Any = None, k: int = 0) -> Tensor:
            u_b, u_r, *rest = split.parts(z)
            new_b = split.b + self.share * self.scene[1]((self.scene[0](u_r) + seen_b).relu())
            hidden = self.rain[1]((self.rain[0](torch.cat([u_b, u_r], 1)) + seen_r).relu())
            return torch.cat([new_b, self.share * self.rain[2](hidden.relu()), *rest], 1)

        return step

    def map(self, b: Tensor) -> tuple[Map, Split]:
        """T, and the problem, which has the start and takes the state apart."""
        if not self.scene:
            split = self.split(b)
            return averaged(split.step, self.alpha), split
        width = self.config["width"]
        seen_b, seen_r, weigh = self.prior(b).split([width, width, len(KAPPA)], 1)
        split = self.split(b, weigh)
        return averaged(compose(split.step, self.network(split, seen_b, seen_r)), self.alpha), split

    def forward(self, y: Tensor, steps: int | None = None) -> list[Tensor]:
        """``u_b^1 ... u_b^K`` for pictures ``(B, 3, H, W)`` in [0, 1] of any size."""
        b = padded(y)
        T, split = self.map(b)
        z, found = split.start(), []
        for k in range(steps or self.depth):
            z = T(z, None, k)
            found.append(cropped(split.parts(z)[0], y))
        return found


def padded(y: Tensor) -> Tensor:
    """`MARGIN` pixels more on each side, sides even."""
    height, width = y.shape[-2:]
    return nnf.pad(y, (MARGIN, MARGIN + width % 2, MARGIN, MARGIN + height % 2), mode="replicate")


def cropped(x: Tensor, y: Tensor) -> Tensor:
    """The part of ``x`` that `padded` made of ``y``."""
    return x[..., MARGIN : MARGIN + y.shape[-2], MARGIN : MARGIN + y.shape[-1]]


def iterated(net: Streaks) -> list[tuple[nn.Conv2d, int]]:
    """The convolutions that an iterate passes, and how many of their channels see it: all."""
    layers: Any = (*net.scene, *net.rain)
    return [(layer, layer.in_channels) for layer in layers]


def normalized(net: Streaks) -> Streaks:
    """Keep `iterated` at norm 1 in training where ``bounded`` asks for it; `certified` has the last word.

    Changes and returns ``net``.
    """
    for layer, channels in iterated(net) if net.bounded else ():
        parametrize.register_parametrization(layer, "weight", OperatorNorm(layer.weight, channels, 1.0))
    return net


def certified(net: Streaks, margin: float = 0.0) -> Streaks:
    """A copy with plain weights, where ``bounded`` asks for it every norm at most ``1 - margin``: ``lipschitz(copy) <= 1``.

    The margin is for rounding that comes later, to half precision in a file, say.
    """
    plain = Streaks(**net.config).to(net.logs["beta"])
    layers = [layer for layer, _ in iterated(net)]
    with torch.no_grad():
        for name in ("prior", "logs"):
            getattr(plain, name).load_state_dict(getattr(net, name).state_dict())
        for old, (new, _) in zip(layers, iterated(plain), strict=True):
            slack = 1 - margin - 32 * torch.finfo(new.weight.dtype).eps
            factor = min(1.0, slack / conv_norm_bound(old.weight)) if net.bounded else 1.0
            new.weight.copy_(old.weight * factor)
    return plain


def lipschitz(net: Streaks) -> float:
    """A Lipschitz constant of D_net in l2, from the weights, in float64.

    With constants L_b of the first network and L_r of the second, ``max(1, sqrt(L_b^2 + L_r^2))``: both see u_r, and what
    passes unchanged has 1.  Source: HODL section 6.2, Assumption 3.2.
    """
    norms = [net.share if net.scene else 0.0] * 2
    parts: Any = (net.scene, net.rain)
    for i, part in enumerate(parts):
        for layer in part:
            norms[i] *= conv_norm_bound(layer.weight)
    return max(1.0, (norms[0] ** 2 + norms[1] ** 2) ** 0.5)
