"""GDC's generative module for optical flow, trained on synthetic motion of real photographs.

A scene is a background and up to three objects, each a piece of another photograph with a motion of its own: affine plus a
smooth deformation.  So flows have jumps, and things are hidden and come to sight.  The second frame is a little brighter or
darker, and both have noise.  Data: CBSD68; no frame of Middlebury is seen.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as nnf

from odlkit import data
from odlkit.flow import end_point_error, resized, warp
from odlkit.networks import FlowNet
from odlkit.training.loop import fit, patches, ship
from odlkit.training.machine import best_device, times

BATCH, SIDE, MARGIN, OBJECTS, HELD_OUT = 4, 128, 16, 3, 8


def pictures() -> tuple[list[Tensor], list[Tensor]]:
    """Colour photographs: to train on, and the last `HELD_OUT` of CBSD68 to validate with."""
    every = data.images("cbsd68", gray=False)
    return every[:-HELD_OUT], every[-HELD_OUT:]


def bumps(count: int, channels: int, side: int, cells: int, generator: torch.Generator) -> Tensor:
    """Smooth random fields ``(count, channels, side, side)``: normal numbers on ``cells x cells`` knots, bicubic between."""
    knots = torch.randn(count, channels, cells, cells, generator=generator)
    return nnf.interpolate(knots, (side, side), mode="bicubic", align_corners=True)


def motions(count: int, side: int, reach: float, generator: torch.Generator) -> Tensor:
    """Random backward motions ``(count, 2, side, side)`` of mostly less than ``reach`` pixels: affine plus a deformation."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, generator=generator)

    length, angle = reach * uniform(0, 1) ** 1.5, uniform(0, 6.2832)
    turn, zoom, shear = uniform(-0.05, 0.05), uniform(-0.04, 0.04), uniform(-0.03, 0.03)
    place = torch.arange(side) - side / 2
    x, y = place[None, None], place[None, :, None]
    across = length * angle.cos() + zoom * x + (shear - turn) * y
    down = length * angle.sin() + (shear + turn) * x + zoom * y
    strength = 1.2 * uniform(0, 1).square()[:, None]
    return torch.stack([across, down], 1) + strength * bumps(count, 2, side, 6, generator)


def forward_of(back: Tensor, rounds: int = 6) -> Tensor:
    """The u with ``u(x) = v(x + u(x))``: if frame 1 shows at y what frame 0 shows at ``y - v(y)``, u is frame 0's flow.

    A fixed point, which contracts where v changes by less than a pixel a pixel.
    """
    u = back
    for _ in range(rounds):
        u = warp(back, u, "bilinear")
    return u


def scenes(
    sources: list[Tensor], count: int, side: int, generator: torch.Generator, reach: float = 10.0
) -> tuple[Tensor, Tensor, Tensor]:
    """``(I_0, I_1, u)``: frames ``(count, 3, side, side)`` in [0, 1] and the flow from the first to the second.

    Rendered with a `MARGIN` of real picture on each side, from back to front.  An object is where a smooth random field is
    high, at most a third of the frame.
    """
    wide = side + 2 * MARGIN
    first = second = flow = torch.empty(0)
    for layer in range(1 + OBJECTS):
        texture = patches(sources, count, wide, generator)
        back = motions(count, wide, reach, generator)
        moved, u = warp(texture, -back).clamp(0, 1), forward_of(back)
        if layer == 0:
            first, second, flow = texture, moved, u
            continue
        field = bumps(count, 1, wide, int(torch.randint(3, 7, (), generator=generator)), generator)
        share = 0.33 * torch.rand(count, generator=generator)
        level = torch.stack([f.quantile(1 - s) for f, s in zip(field, share, strict=True)]).view(-1, 1, 1, 1)
        slope = (field.diff(dim=-1).square().mean() + field.diff(dim=-2).square().mean()).sqrt()
        mask = ((field - level) / slope + 0.5).clamp(0, 1)  # an edge of about a pixel
        first, flow = first.lerp(texture, mask), torch.where(mask > 0.5, u, flow)
        second = second.lerp(moved, warp(mask, -back, "bilinear"))
    inner = (..., slice(MARGIN, -MARGIN), slice(MARGIN, -MARGIN))
    first, second = seen(first[inner], generator, 0.0), seen(second[inner], generator, 1.0)
    return first, second, flow[inner].contiguous()


def seen(frame: Tensor, generator: torch.Generator, change: float) -> Tensor:
    """A frame with up to 2% noise and, by ``change``, up to 10% more or less contrast and 3% more or less light."""
    gain, shift, noise = (torch.rand(len(frame), 1, 1, 1, generator=generator) for _ in range(3))
    frame = (1 + 0.1 * change * (2 * gain - 1)) * frame + 0.03 * change * (2 * shift - 1)
    return (frame + 0.02 * noise.square() * torch.randn(frame.shape, generator=generator)).clamp(0, 1)


def loss_of(net: FlowNet, sources: list[Tensor], generator: torch.Generator) -> Tensor:
    """End-point error in pixels of the frame, of all levels; each coarser one counts half as much."""
    first, second, truth = (z.to(best_device()) for z in scenes(sources, times(BATCH), SIDE, generator))
    total, weight = torch.zeros((), device=truth.device), 1.0
    for flow in reversed(net(first, second)):
        scale = truth.shape[-1] / flow.shape[-1]
        wanted = nnf.adaptive_avg_pool2d(truth, flow.shape[-2:])
        total = total + weight * ((scale * flow - wanted).square().sum(1) + 1e-4).sqrt().mean()
        weight *= 0.5
    return total


def score(net: FlowNet, held: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    """Mean end-point error in pixels on the validation scenes."""
    net.eval()
    with torch.no_grad():
        errors = [
            end_point_error(resized(net(a.to(best_device()), b.to(best_device()))[-1].cpu(), u.shape[-2:]), u)
            for a, b, u in held
        ]
    net.train()
    return torch.cat(errors).mean().item()


def network(out: Path, resume: bool = False, steps: int = 2400) -> None:
    """Train `odlkit.networks.FlowNet` on the end-point error, and write the weights and their card."""
    torch.manual_seed(0)
    net = FlowNet().to(best_device())
    train, rest = pictures()
    held = [scenes(rest, 1, 256, torch.Generator().manual_seed(i)) for i in range(12)]
    record = fit(
        net,
        partial(loss_of, net, train),
        validate=partial(score, net, held),
        steps=steps,
        lr=1e-3,
        out=out,
        name="gdc-flow",
        resume=resume,
        compiled=[net],
    )
    record["validation_end_point_error"] = record.pop("validation_psnr")
    ship(
        net,
        out,
        "gdc-flow",
        record,
        what="GDC's generative module of optical flow: pyramid features, correlation and a residual, one for all levels",
        data=f"CBSD68 without its last {HELD_OUT} images, which are the validation set; synthetic motion",
        network={"kind": "flow", **net.config},
        schedule={"levels": net.levels},
    )
