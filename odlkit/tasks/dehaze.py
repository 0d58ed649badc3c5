"""Haze removal: ``I = t J + (1 - t) A`` per pixel, with airlight A, transmission t in (0, 1] and the clear scene J.

A is estimated first, then t, and J follows.  PADNet's energy is in t alone: ``f(t) = (1/2)||t - g||^2`` with the guidance g
of Meng et al. (2013), a lower bound of t that follows from J being a picture, and a prior that a network holds.
Source: PADNet "Single Image Haze Removal", from Eq. 17 on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from odlkit import weights
from odlkit.models.padnet import Implicit, Schedule
from odlkit.operators import Identity
from odlkit.problem import LeastSquares, Problem
from odlkit.propagate import propagate
from odlkit.tasks.deblur import theorem_2
from odlkit.tasks.report import Model, Outcome, check_finite, check_model, formula, report

CUBE = (20 / 255, 300 / 255)  # C_0 and C_1 of Meng et al.: no scene is darker or brighter
PATCH, CLOSING = 15, 3  # sides of the dark channel's window and of the guidance's
KEPT, RADIUS, RIDGE = 0.95, 40, 1e-3  # dark channel prior: omega, and the guided filter that refines it
FLOOR = 0.1  # the least t that the scene is divided by, as He et al.
DIMMEST = 0.2  # the least airlight: a picture darker than this has no haze that one could see


def dehaze(
    y: Tensor, model: str = "ipadnet", *, steps: int | None = None, progress: bool = False
) -> tuple[Tensor, dict[str, Any]]:
    """Remove the haze of ``y``: the clear scene, of its shape, and a report of the run.

    ``y`` is ``(B, 3, H, W)`` or gray ``(B, 1, H, W)`` in [0, 1], of any size; ``model`` is one of `MODELS`, ``steps`` the
    iterations of an iterative one.  Gray has no colour to tell haze from a white wall, and the network has seen none: the
    report says so.  Raises ``ValueError`` for bad arguments and `PropagationError` when a run diverges.
    """
    clock = time.monotonic()
    check_model(model, MODELS)
    if y.dim() != 4 or y.shape[1] not in (1, 3) or not y.is_floating_point():
        raise ValueError(f"input: expected a floating point tensor (B, 1 or 3, H, W), got {tuple(y.shape)} of {y.dtype}")
    check_finite(y)
    hazy = y.expand(-1, 3, -1, -1)
    light = airlight(hazy)
    outcome = MODELS[model].run(hazy, light, steps, progress)
    x = radiance(hazy, outcome.x, light)[:, : y.shape[1]]
    gray = ["gray: no colour to tell haze from white things, and a network trained on colour"] if y.shape[1] == 1 else []
    t = outcome.x.flatten(1)
    ends = {"mean": t.mean(1).tolist(), "least": t.amin(1).tolist()}
    told = report("dehaze", model, clock, [outcome], y, x, notes=gray,
                  airlight=light.flatten(1).tolist(), transmission=ends)  # fmt: skip
    told["certificate"]["of"] = "the transmission; the airlight and the model of haze are taken as they are"
    return x, told


def haze(scene: Tensor, t: Tensor, light: Tensor) -> Tensor:
    """``I = t J + (1 - t) A``: J ``(B, C, H, W)``, t ``(B, 1, H, W)``, A ``(B, C, 1, 1)``.  Eq: PADNet (17)."""
    return t * scene + (1 - t) * light


def radiance(hazy: Tensor, t: Tensor, light: Tensor, floor: float = FLOOR) -> Tensor:
    """The scene ``J = (I - A) / max(t, floor) + A``, clamped to [0, 1]; t is clamped to at most 1.

    Below the floor noise and the rounding to 8 bits would be raised more than tenfold.  Eq: PADNet (17).
    """
    return ((hazy - light) / t.clamp(floor, 1) + light).clamp(0, 1)


def highest(x: Tensor, side: int) -> Tensor:
    """The maximum over ``side x side`` windows (odd), those at the border cut off there: the shape of ``x``."""
    rows = nnf.max_pool2d(x, (side, 1), 1, (side // 2, 0))
    return nnf.max_pool2d(rows, (1, side), 1, (0, side // 2))


def dark_channel(x: Tensor, side: int = PATCH) -> Tensor:
    """The least value over the channels and a window: ``(B, C, H, W) -> (B, 1, H, W)``; near 0 in a clear scene."""
    return -highest(-x.amin(1, keepdim=True), side)


def airlight(hazy: Tensor) -> Tensor:
    """A ``(B, C, 1, 1)``: the brightest of the thousandth of the pixels whose dark channel is highest, but at least 0.2.

    Where the haze is thickest t is smallest and I nearest to A.  Source: He et al. (2011), section 4.3.
    """
    dark = dark_channel(hazy).flatten(1)
    places = dark.topk(max(dark.shape[1] // 1000, 1)).indices[:, None].expand(-1, hazy.shape[1], -1)
    candidates = hazy.flatten(2).gather(2, places)  # (B, C, K)
    best = candidates.sum(1, keepdim=True).argmax(2, keepdim=True).expand(-1, hazy.shape[1], -1)
    return candidates.gather(2, best)[..., None].clamp_min(DIMMEST)


def guidance(hazy: Tensor, light: Tensor, side: int = CLOSING) -> Tensor:
    """The boundary constraint of Meng et al., ``(B, 1, H, W)``: the least t for which J lies in the cube, closed.

    ``J = (I - A) / t + A`` lies in ``[C_0, C_1]`` iff ``t >= max_c max((A - I) / (A - C_0), (I - A) / (C_1 - A))``, so for a
    scene in the cube this is a lower bound of t.  The closing, a minimum of maxima over windows, makes it constant over
    them; it bounds the closing of t, which is t itself where t is constant over a window.  Source: PADNet, Eq. 18, guidance.
    """
    low, high = (light - hazy) / (light - CUBE[0]), (hazy - light) / (CUBE[1] - light)
    bound = torch.maximum(low, high).amax(1, keepdim=True).clamp(0, 1)
    return -highest(-highest(bound, side), side)


def dark_prior(hazy: Tensor, light: Tensor) -> Tensor:
    """``t = 1 - omega dark_channel(I / A)``, before refinement: exact up to omega where the scene's dark channel is 0.

    Source: He et al. (2011), Eq. 12.
    """
    return 1 - KEPT * dark_channel(hazy / light)


def guided_filter(guide: Tensor, x: Tensor, radius: int = RADIUS, ridge: float = RIDGE) -> Tensor:
    """Smooth ``x`` ``(B, 1, H, W)`` but for the edges of ``guide`` ``(B, 1, H, W)``: locally affine in the guide.

    Source: He et al., Guided Image Filtering (2013), Eq. 5, 6 and 8.
    """

    def mean(z: Tensor) -> Tensor:
        rows = nnf.avg_pool2d(z, (2 * radius + 1, 1), 1, (radius, 0), count_include_pad=False)
        return nnf.avg_pool2d(rows, (1, 2 * radius + 1), 1, (0, radius), count_include_pad=False)

    mean_g, mean_x = mean(guide), mean(x)
    slope = (mean(guide * x) - mean_g * mean_x) / (mean(guide * guide) - mean_g.square() + ridge)
    return mean(slope) * guide + mean(mean_x - slope * mean_g)


def seeing(network: Callable[[Tensor, Any], Tensor], picture: Tensor) -> Callable[[Tensor, Any], Tensor]:
    """``N_alpha`` on transmissions from a network on four channels: ``v -> network((v, I / A), alpha)``'s first channel.

    A network that moves four channels by at most ``C_N alpha`` moves one by no more, so Condition 2 holds with its constant.
    """
    return lambda v, alpha: network(torch.cat([v, picture], 1), alpha)[:, :1]


def transmission_problem(start: Tensor) -> Problem:
    """``f(t) = (1/2)||t - g||^2`` for a guidance g; the prior is the network's.  Eq: PADNet (18), its fidelity."""
    return Problem(LeastSquares(Identity(), start))


# The models: each gets the picture (B, 3, H, W) and the airlight, and hands back t.


def _ipadnet(hazy: Tensor, light: Tensor, steps: int | None, progress: bool) -> Outcome:
    card, network = weights.card("padnet-haze"), weights.load("padnet-haze").to(hazy)
    plan, start = card["schedule"], guidance(hazy, light)
    schedule = Schedule.between(plan["first"], plan["last"], plan["depth"])
    step = Implicit(seeing(network, hazy / light), schedule)
    result = propagate(step, transmission_problem(start), start, steps=steps or plan["depth"], progress=progress)
    allowed = card["network"]["bound"] * (4 * start[0].numel()) ** 0.5
    return Outcome(result.x, result, theorem_2(result, schedule, allowed))


def _dcp(hazy: Tensor, light: Tensor, steps: int | None, progress: bool) -> Outcome:
    t = guided_filter(hazy.mean(1, keepdim=True), dark_prior(hazy, light))
    return formula(t, "a formula: the dark channel of the scene is taken for 0")


def _guidance(hazy: Tensor, light: Tensor, steps: int | None, progress: bool) -> Outcome:
    return formula(guidance(hazy, light), "a formula: a lower bound of the transmission is taken for it")


MODELS = {  # each run as run(hazy, light, steps, progress)
    "ipadnet": Model(_ipadnet, "implicit PADNet on the transmission, the prior in a network that sees the picture"),
    "dcp": Model(_dcp, "dark channel prior, refined by a guided filter"),
    "guidance": Model(_guidance, "the boundary constraint alone, PADNet's guidance"),
}
