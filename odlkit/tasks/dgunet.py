"""DGUNet in the tasks: its stages as a run that is recorded, one network for three known operators, and unknown blur.

The network that is given A deblurs, interpolates and super-resolves; it begins where its training began.  Blur of an unknown
kernel has a network of its own, which learned A.  Channels are restored one by one.  No theorem covers any of it.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from odlkit import weights
from odlkit.linear import LinearMap, Operator
from odlkit.models.dgunet import DGUNet
from odlkit.operators import Blur, BlurDecimate, Mask
from odlkit.problem import norm_items
from odlkit.propagate import PropagationError, Status
from odlkit.solvers import tikhonov
from odlkit.tasks.report import Outcome, recorded, report, unproved
from odlkit.tasks.tiles import in_parts

KNOWN, MOTION = "dgunet-known", "dgunet-deblur"  # the shipped networks
START = 100.0  # the smooth start of known blur weighs ||D x||^2 with 100 sigma^2: slopes of about 0.1
SMOOTH = 1e-3  # the same weight where a picture is enlarged, without noise
PLAIN = "trained stages, run unchecked: nothing makes an energy fall, and no theorem applies"
UNKNOWN = PLAIN + "; nobody knows the blur, so what looks sharp may be wrong"


def staged(
    net: DGUNet, y: Tensor, operator: LinearMap | None = None, x0: Tensor | None = None, stages: int | None = None
) -> Outcome:
    """All stages as a recorded run: ``change``, ``norm`` and, of a known A, ``misfit`` ``||A x^k - y||`` of each.

    Raises `PropagationError` when an image is not finite.
    """
    with torch.no_grad():
        images = net(y, operator, x0, stages)
    result = recorded(images, x0 if x0 is not None else y if operator is None else operator.A_adjoint(y))
    if result.status is Status.NOT_FINITE:
        raise PropagationError(f"DGUNet: {result.status.value} after {len(images)} stages", result)
    if operator is not None:
        for row, image in zip(result.trace.rows, images, strict=True):
            row["misfit"] = norm_items(operator.A(image) - y)
    return Outcome(result.x, result, unproved(PLAIN))


def blind(name: str, y: Tensor, stages: int | None, more: str) -> Outcome:
    """A network of three channels on ``y``; gray is three equal ones, averaged back.  ``more`` is what it says of itself."""
    net: Any = weights.load(name).to(y)
    outcome = staged(net, y.expand(-1, 3, -1, -1), stages=stages)
    outcome.x = outcome.x.mean(1, keepdim=True) if y.shape[1] == 1 else outcome.x
    outcome.certificate["statement"] = f"{PLAIN}; {more}"
    return outcome


# Known A: each as the tasks call their models.


def normalized(operator: Operator, y: Tensor, x: Tensor) -> tuple[Operator, Tensor]:
    """``A / ||A||`` and ``y / ||A||`` on images like ``x``: the learned step sizes belong to a norm of 1."""
    norm = operator.eigenvalue_range(x)[1] ** 0.5
    return 1 / norm * operator, y / norm


def deblur(z: Tensor, blur: Blur, sigma: float, steps: int | None, progress: bool) -> Outcome:
    """Known blur on a periodic grid, from the smooth image that explains the data."""
    net: Any = weights.load(KNOWN).to(z)
    block = 2 ** (net.setting.scales - 1)
    if any(side % block for side in z.shape[-2:]):
        raise ValueError(f"boundary: expected sides that are multiples of {block} with circular, got {tuple(z.shape[-2:])}")
    x0 = tikhonov(blur, z, START * sigma**2)
    A, y = normalized(blur, z, x0)
    return staged(net, y, A, x0, steps)


def inpaint(y: Tensor, mask: Tensor, start: Tensor, steps: int | None, progress: bool) -> Outcome:
    """Unknown pixels, from the bent plate through the known ones."""
    net: Any = weights.load(KNOWN).to(y)
    shape = y.shape
    y, start = (t.reshape(-1, 1, *shape[-2:]) for t in (y, start))
    outcome = staged(net, y, Mask(mask.repeat_interleave(shape[1], 0)), start, steps)
    outcome.x = outcome.x.reshape(shape)
    return outcome


def super_resolve(operator: BlurDecimate, y: Tensor, scale: int, steps: int | None, progress: bool) -> Outcome:
    """Enlarged, from the smooth image that explains the data."""
    net: Any = weights.load(KNOWN).to(y)
    x0 = tikhonov(operator, y, SMOOTH)
    A, y = normalized(operator, y, x0)
    return staged(net, y, A, x0, steps)


# Unknown A.


def motion(
    y: Tensor, *, steps: int | None = None, tile: int | None = None, progress: bool = False
) -> tuple[Tensor, dict[str, Any]]:
    """Deblur ``y`` ``(B, C, H, W)`` in [0, 1] whose kernel nobody knows: the image, of the shape of ``y``, and a report.

    What undoes blur was learned from motion within 13 pixels; more is not undone.  ``tile`` restores squares one by one, as
    `odlkit.tasks.tiles.in_parts` has it.
    """
    clock = time.monotonic()
    net: Any = weights.load(MOTION).to(y)

    def run(z: Tensor) -> Outcome:
        outcome = staged(net, z, stages=steps)
        outcome.certificate["statement"] = UNKNOWN
        return outcome

    x, outcomes = in_parts(run, y.reshape(-1, 1, *y.shape[-2:]), tile, progress=progress)
    settings = {"sigma": None, "boundary": "unknown", "tile": tile}
    notes = ["kernel: not given, so the blur is unknown; what undoes it was learned"]
    told = report("deblur", "dgunet", clock, outcomes, y, x.reshape(y.shape), settings=settings, notes=notes)
    return x.reshape(y.shape), told
