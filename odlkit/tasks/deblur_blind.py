"""Deblurring when nobody knows the kernel: it is estimated from the luminance, coarse to fine, then `deblur` restores.

Before that step every level alternates between the two halves of `odlkit.models.blind`: image gradients by GDC's
Algorithm 1 with the kernel fixed, the kernel by least squares with the gradients fixed.  Proposition 1 is about the first
half, of each alternation by itself; no theorem says that the alternation finds the true kernel.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from odlkit import weights
from odlkit.models.blind import D, Settings, Sharpen, Sweep, gradients, inside, kernel_step, pyramid, resized, tidy
from odlkit.models.gdc import Corrective, Generative
from odlkit.models.padnet import Schedule
from odlkit.propagate import Result
from odlkit.tasks.deblur import check as check_step
from odlkit.tasks.deblur import deblur, estimate_noise, extend
from odlkit.tasks.deblur_gdc import proposition_1
from odlkit.tasks.report import Outcome, check_finite, check_model, report, weakest

SIZE = 27  # pixels a side of the kernel, unless told otherwise
NOISE = 0.02  # the least noise level of the last step, whose kernel is only an estimate
WINDOW = 400  # pixels a side that the kernel is estimated from: more cost time and hardly help
LUMA = (0.299, 0.587, 0.114)


def deblur_blind(
    y: Tensor,
    size: int = SIZE,
    sigma: float | None = None,
    model: str = "gdc",
    *,
    final: str = "ipadnet",
    tile: int | None = None,
    settings: Settings | None = None,
    progress: bool = False,
) -> tuple[Tensor, dict[str, Any]]:
    """Restore ``y = k * x + noise`` with k unknown: the image, of the shape of ``y``, and a report with the kernel.

    ``y`` is ``(1, C, H, W)`` in [0, 1], C = 1 or 3, one kernel for all channels and places; ``size`` is odd, at least the
    extent of the blur in pixels and at most half the shorter side.  ``model`` is one of `MODELS`; ``final`` the non-blind
    model of `odlkit.tasks.deblur` that restores, for noise ``sigma`` (estimated if ``None``, and not below `NOISE`);
    ``tile`` is that step's.  ``report["kernel"]`` has ``size`` rows of numbers with sum 1.  An unknown kernel is known up to
    a shift only: it is centred, so the image may be moved by pixels.  Raises ``ValueError`` for bad arguments.
    """
    clock = time.monotonic()
    check(y, size, sigma, model)
    check_step(y, torch.ones(size, size), sigma, final, "unknown", tile)
    luminance = y if y.shape[1] == 1 else (y * torch.tensor(LUMA).to(y).view(1, 3, 1, 1)).sum(1, keepdim=True)
    kernel, runs = estimate(luminance, size, model, settings, progress)
    level = estimate_noise(luminance) if sigma is None else float(sigma)
    x, told = deblur(y, kernel, max(level, NOISE), final, tile=tile, progress=progress)
    judged = [[proposition_1(run) for run in level_runs] for level_runs in runs]
    about = {"size": size, "sigma": level, "sigma_used": max(level, NOISE), "final": final, "tile": tile}
    return x, report(
        "deblur-blind",
        model,
        clock,
        [Outcome(run.x, run, words) for level in zip(runs, judged, strict=True) for run, words in zip(*level, strict=True)],
        y,
        x,
        settings=about,
        notes=[] if sigma is not None else [f"sigma: not given, estimated as {level:.4f}"],
        iterations=sum(map(len, runs)),
        kernel=kernel.double().tolist(),
        certificate=certificate(judged) if MODELS[model].checked else NO_THEOREM,
        final={key: told[key] for key in ("model", "status", "iterations", "certificate", "seconds")},
    )


def certificate(judged: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Proposition 1 in every alternation, and by level how many proposals the control let pass and the least margin."""
    flat, levels = [one for level in judged for one in level], []
    for level in judged:
        of = weakest(level)
        levels.append({"alternations": len(level), "acceptance_rate": of["acceptance_rate"], "margin": of["margin"]})
    return {
        "guarantee": flat[0]["guarantee"],
        "statement": "with the kernel fixed the energy of the gradients falls, in every alternation; nothing is known of "
        "the kernel",
        "of": "the gradients on the larger periodic grid, the unseen part of the data filled in, one kernel at a time",
        **weakest(flat),
        "levels": levels,
    }


NO_THEOREM = {"guarantee": "none", "statement": "every proposal is taken: no theorem", "holds": None}


def check(y: Tensor, size: int, sigma: Any, model: str) -> None:
    """Raise ``ValueError`` naming the first bad argument."""
    check_model(model, MODELS)
    if y.dim() != 4 or not y.is_floating_point() or len(y) != 1 or y.shape[1] not in (1, 3):
        raise ValueError(f"input: expected a floating point tensor (1, 1 or 3, H, W), got {tuple(y.shape)} of {y.dtype}")
    check_finite(y)
    if not (isinstance(size, int) and size % 2 == 1 and 3 <= size <= min(y.shape[-2:]) // 2):
        most = min(y.shape[-2:]) // 2
        raise ValueError(f"size: expected an odd number from 3 to half the shorter side, {most}, got {size}")
    if sigma is not None and not 0 <= float(sigma) < 1:
        raise ValueError(f"sigma: expected a number in [0, 1), the noise level for values in [0, 1], got {sigma}")


def learned(like: Tensor) -> Sweep:
    """Data steps (7), and the networks of PADNet's Algorithm 2 on gradients as generative modules, one a stage."""
    card, stages = weights.card("padnet-gradient"), weights.load("padnet-gradient").to(like)
    plan, sigma = card["schedule"], card["energy"]["sigma"]
    rho = Schedule(plan["first"] ** -2, plan["growth"])
    # the networks saw (1 / (4 sigma^2)) ||k * g - d||^2 + (rho / 2) ||g - v||^2; here the first weight is 1
    data = Corrective(lambda t: 4 * sigma**2 * rho(t)[0], partial=True)
    return Sweep([data, Generative(stages.nets, lambda t: rho(t)[1])], plan["stages"])  # type: ignore[arg-type]


def estimate(
    y: Tensor, size: int, model: str = "gdc", settings: Settings | None = None, progress: bool = False
) -> tuple[Tensor, list[list[Result]]]:
    """The kernel ``(size, size)`` of a gray picture ``(1, 1, H, W)``, and the runs of Algorithm 1 of each level.

    It sees the middle of a picture larger than `WINDOW`.  The last of the levels are the alternations at full size.
    """
    from tqdm import tqdm

    at, about, levels = settings or Settings(), MODELS[model], pyramid(size)
    n, lam, runs = levels[0][0], at.lam, []
    top, left = (max(side - WINDOW, 0) // 2 for side in y.shape[-2:])
    y = y[..., top : top + WINDOW, left : left + WINDOW]
    kernel, mu = torch.zeros(n, n).to(y), at.error**2 * y.numel()
    kernel[n // 2, n // 2 - 1 : n // 2 + 1] = 0.5
    counts = [at.alternations] * len(levels) + [at.refine]
    bar = tqdm(total=sum(counts), desc="kernel", leave=False, disable=not progress)
    for i, count in enumerate(counts):
        if i < len(levels):
            n, scale = levels[i]
            sides = [max(round(side * scale), n, 8) for side in y.shape[-2:]]
            small = nnf.interpolate(y, sides, mode="bicubic", antialias=True) if scale < 1 else y
            kernel = resized(kernel, n, scale / levels[i - 1][1]) if i else kernel
            z, window = extend(small, kernel)
            seen = torch.zeros_like(z, dtype=torch.bool)
            seen[(..., *window)] = True
            usable = inside(seen, n)
        level = []
        for _ in range(count):
            edges = Sharpen(z, seen, lam)
            sweep = learned(y) if about.learned and i == len(levels) else edges
            run = gradients(sweep, z, kernel, at.prior * lam, at.gamma, about.checked)
            z = edges.z
            if run.trace["accepted"].all():  # gradients that the control refused teach the kernel nothing
                kernel = tidy(kernel_step(run.x, D.A(z), kernel, mu, usable), at.least, at.share).to(y)
            lam = max(lam / at.decay, at.floor) if i < len(levels) else lam * (at.last / at.floor) ** (1 / at.refine)
            level.append(run)
            bar.update()
        runs.append(level)
    bar.close()
    return kernel, runs


@dataclass(frozen=True)
class Alternation:
    """One way to propose gradients: ``learned`` modules at full size or edges throughout, under the control or not."""

    what: str
    learned: bool = False
    checked: bool = True


MODELS = {
    "gdc": Alternation("GDC's Algorithm 1 on an l0.8 energy of gradients, edges proposed; descent by Proposition 1"),
    "gdc-learned": Alternation("the same, trained modules on gradients propose in the alternations at full size", True),
    "l0": Alternation("edges by l0 splitting, every proposal taken, nothing checked", checked=False),
}
