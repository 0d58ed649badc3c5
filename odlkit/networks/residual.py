"""The built-in network N_alpha of PADNet: residual units and, where a theorem needs it, a bound on their move."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def clip_to_ball(move: Tensor, radius: Tensor | float) -> Tensor:
    """Scale each item of ``move`` (B, ...) into the ball of the given radius: ``m min(1, radius / ||m||)``.

    This makes PADNet's Condition 2, ``||N_alpha(v) - v|| <= C_N alpha``, true for every network when the radius is
    ``C_N alpha``; plain convolution networks do not satisfy it.  Eq: PADNet Condition 2.
    """
    norm = move.flatten(1).norm(dim=1).clamp_min(torch.finfo(move.dtype).tiny)
    scale = (torch.as_tensor(radius, dtype=move.dtype, device=move.device) / norm).clamp_max(1.0)
    return move * scale.view(-1, *[1] * (move.dim() - 1))


class ResidualNet(nn.Module):
    """``N_alpha(v_0; W) = v_0 - alpha sum_t G(v_t; W_t)`` with ``v_{t+1} = v_t - alpha G(v_t; W_t)``.

    Eq: PADNet (6).  ``bound`` is the constant of Condition 2 per pixel: the whole move is clipped to the ball of radius
    ``bound * alpha * sqrt(n)`` with ``n`` the number of values in one item; ``None`` leaves it unbounded.

    Shapes: ``v`` is ``(B, C, H, W)``; ``alpha`` a float or ``(B, 1, 1, 1)``, the step size, which is also the noise level
    that the units expect.
    """

    def __init__(self, units: Sequence[nn.Module], bound: float | None = None):
        super().__init__()
        self.units = nn.ModuleList(units)
        self.bound = bound

    def forward(self, v: Tensor, alpha: Tensor | float) -> Tensor:
        out = v
        for unit in self.units:
            out = out - alpha * unit(out, alpha)
        if self.bound is None:
            return out
        radius = torch.as_tensor(alpha, dtype=v.dtype, device=v.device).reshape(-1) * self.bound * v[0].numel() ** 0.5
        return v + clip_to_ball(out - v, radius)
