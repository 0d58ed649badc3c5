"""Optical flow: reading and writing it, warping by it, measuring it, and seeing it in colours.

A flow is ``(B, 2, H, W)`` in pixels, horizontal part first, with I_1(x + u(x)) = I_0(x) where both frames show x.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as nnf

from odlkit.images import atomic

TAG, UNKNOWN = b"PIEH", 1e9  # of Middlebury's .flo: its first bytes, and what is beyond every flow
HUES = (15, 6, 4, 11, 13, 6)  # colours from red to yellow, green, cyan, blue, magenta and back to red


def read_flo(path: Path | str, name: str = "flow") -> Tensor:
    """The flow of a ``.flo`` file, ``(1, 2, H, W)`` float32, NaN where it is unknown.  Raises ``ValueError`` for others."""
    blob = Path(path).read_bytes()
    width, height = np.frombuffer(blob[4:12], "<i4").tolist() if len(blob) > 12 else (0, 0)
    if blob[:4] != TAG or min(width, height) < 1 or len(blob) != 12 + 8 * width * height:
        raise ValueError(f"{name}: expected a .flo file of Middlebury, {path} is not")
    flow = torch.from_numpy(np.frombuffer(blob[12:], "<f4").reshape(height, width, 2).copy()).permute(2, 0, 1)
    return torch.where((flow.abs() > UNKNOWN).any(0), torch.nan, flow)[None].contiguous()


def write_flo(path: Path | str, flow: Tensor) -> None:
    """Write ``(1, 2, H, W)`` as ``.flo``; NaN is written as unknown."""
    values = flow[0].detach().cpu().float().nan_to_num(nan=1.666666752e9).permute(1, 2, 0).contiguous().numpy()
    with atomic(path) as handle:
        handle.write(TAG + np.array(values.shape[1::-1], "<i4").tobytes())
        handle.write(values.astype("<f4").tobytes())


def warp(x: Tensor, flow: Tensor, mode: str = "bicubic") -> Tensor:
    """``x(p + u(p))``, ``(B, C, H, W)``: bicubic (or bilinear), the border repeated, differentiable in both arguments."""
    height, width = x.shape[-2:]
    across = torch.arange(width, dtype=x.dtype, device=x.device) + flow[:, 0]
    down = torch.arange(height, dtype=x.dtype, device=x.device)[:, None] + flow[:, 1]
    grid = torch.stack([across * (2 / max(width - 1, 1)) - 1, down * (2 / max(height - 1, 1)) - 1], -1)
    return nnf.grid_sample(x, grid, mode=mode, padding_mode="border", align_corners=True)


def inside(flow: Tensor) -> Tensor:
    """Where ``p + u(p)`` lies in the frame, ``(B, 1, H, W)`` of booleans."""
    height, width = flow.shape[-2:]
    across = torch.arange(width, dtype=flow.dtype, device=flow.device) + flow[:, :1]
    down = torch.arange(height, dtype=flow.dtype, device=flow.device)[:, None] + flow[:, 1:]
    return (across >= 0) & (across <= width - 1) & (down >= 0) & (down <= height - 1)


def resized(flow: Tensor, size: Sequence[int]) -> Tensor:
    """The flow on another grid of pixels ``(H, W)``, in pixels of that grid: bilinear."""
    scale = torch.tensor([size[1] / flow.shape[-1], size[0] / flow.shape[-2]]).to(flow)
    return nnf.interpolate(flow, tuple(size), mode="bilinear", align_corners=False) * scale.view(1, 2, 1, 1)


def correlation(first: Tensor, second: Tensor, radius: int) -> Tensor:
    """``<first(p), second(p + d)>`` for all ``|d_i| <= radius``: ``(B, C, H, W) -> (B, (2 radius + 1)^2, H, W)``.

    Outside the frame the features are 0.  Source: GDC, section VIII-B, the correlation layer (of FlowNet and PWC-Net).
    """
    height, width = first.shape[-2:]
    padded, side = nnf.pad(second, [radius] * 4), 2 * radius + 1
    moved = ((padded[..., i : i + height, j : j + width]) for i in range(side) for j in range(side))
    return torch.stack([(first * other).sum(1) for other in moved], 1)


# Measures: the mean over the pixels where the truth is known (not NaN), (B,) in float64.


def _mean_known(values: Tensor, truth: Tensor) -> Tensor:
    known = ~truth.isnan().any(1)
    return torch.where(known, values, 0).flatten(1).sum(1) / known.flatten(1).sum(1)


def end_point_error(flow: Tensor, truth: Tensor) -> Tensor:
    """Mean of ``||u - u*||`` in pixels."""
    return _mean_known((flow.double() - truth.double()).square().sum(1).sqrt(), truth)


def outliers(flow: Tensor, truth: Tensor, limit: float = 1.0) -> Tensor:
    """Share of the pixels whose end-point error exceeds ``limit`` pixels."""
    return _mean_known(((flow.double() - truth.double()).square().sum(1).sqrt() > limit).double(), truth)


def angular_error(flow: Tensor, truth: Tensor) -> Tensor:
    """Mean angle in degrees between ``(u, 1)`` and ``(u*, 1)``: a relative error that is finite where nothing moves."""
    u, v = (torch.cat([z.double(), torch.ones_like(z[:, :1], dtype=torch.float64)], 1) for z in (flow, truth))
    cosine = (u * v).sum(1) / (u.square().sum(1) * v.square().sum(1)).sqrt()
    return _mean_known(torch.rad2deg(torch.arccos(cosine.clamp(-1, 1))), truth)


def wheel() -> Tensor:
    """The 55 colours of Middlebury's wheel, ``(55, 3)`` in [0, 1]: six straight ramps from red round to red."""
    corners = torch.tensor(
        [[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1], [1, 0, 0]], dtype=torch.float32
    )
    ramps = [a.lerp(b, torch.arange(n)[:, None] / n) for a, b, n in zip(corners, corners[1:], HUES, strict=False)]
    return torch.cat(ramps).mul(255).floor() / 255


def colours(flow: Tensor, largest: float | None = None) -> Tensor:
    """The flow as a picture ``(B, 3, H, W)``: the hue is its direction, white is no motion, ``largest`` a full colour.

    ``largest`` is a number of pixels, by default the item's longest known flow; longer ones are darker, unknown ones black.
    Source: Baker et al. (2011), Figure 2 and its ``colorcode``.
    """
    known = ~flow.isnan().any(1, keepdim=True)
    flow = torch.where(known, flow, 0)
    length = flow.square().sum(1, keepdim=True).sqrt()
    top = length.amax((1, 2, 3), keepdim=True) if largest is None else torch.as_tensor(largest).to(flow)
    length = length / top.clamp_min(torch.finfo(flow.dtype).eps)
    table = wheel().to(flow)
    place = (torch.atan2(-flow[:, 1], -flow[:, 0]) / torch.pi + 1) / 2 * (len(table) - 1)
    low = place.floor().long()
    hue = table[low].lerp(table[(low + 1) % len(table)], (place - low)[..., None]).permute(0, 3, 1, 2)
    picture = torch.where(length <= 1 + 1e-6, 1 - length * (1 - hue), 0.75 * hue)
    return torch.where(known, picture, 0)
