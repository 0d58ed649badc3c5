"""Too little light: Retinex, ``y = x u`` per pixel, with a clear picture x and an illumination u in (0, 1] for all channels.

u is estimated and x = y / u follows, noise and all: where u is a tenth, the noise is ten times what it was.
Source: HODL section 4.3, low-light enhancement.
"""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from odlkit import weights
from odlkit.certify import inequality
from odlkit.models.hodl_deblur import Iteration
from odlkit.models.hodl_light import LEAST, Illumination, radiance, smoothed
from odlkit.networks.normalize import local_norm
from odlkit.operators import Identity
from odlkit.problem import LeastSquares, Problem
from odlkit.propagate import propagate
from odlkit.tasks.denoise import denoise
from odlkit.tasks.report import ROUND_OFF, Model, Outcome, check_finite, check_model, formula, report

WEIGHTS = "hodl-light"
STEPS, TOLERANCE = 60, 1e-5  # of the fixed point: relative change
POWER, RADIUS = 0.8, 15  # LIME's gamma, and the radius of the filter that smooths the channel maximum
GAIN = 8  # a mean gain above which the report speaks of noise


def enhance(
    y: Tensor, model: str = "hodl", *, steps: int | None = None, progress: bool = False
) -> tuple[Tensor, dict[str, Any]]:
    """Brighten ``y``: a picture of its shape as if it had had enough light, and a report of the run.

    ``y`` is ``(B, 3, H, W)`` or gray ``(B, 1, H, W)`` in [0, 1], of any size; ``model`` is one of `MODELS`, ``steps`` the
    iterations (by default until nothing moves).  Raises ``ValueError`` for bad arguments and `PropagationError` when a run
    diverges.
    """
    clock = time.monotonic()
    check_model(model, MODELS)
    if y.dim() != 4 or y.shape[1] not in (1, 3) or not y.is_floating_point():
        raise ValueError(f"input: expected a floating point tensor (B, 1 or 3, H, W), got {tuple(y.shape)} of {y.dtype}")
    check_finite(y)
    if steps is not None and steps < 1:
        raise ValueError(f"steps: expected None or a positive number, got {steps}")
    dark = y.clamp(0, 1).expand(-1, 3, -1, -1)
    outcome = MODELS[model].run(dark, steps, progress)
    x, u = outcome.x[:, : y.shape[1]], outcome.result.x.flatten(1)
    gain = (1 / u.clamp_min(LEAST)).mean().item()
    hint = "" if model == "hodl-denoised" else "; --model hodl-denoised takes it away"
    notes = [f"noise: everything was multiplied by {gain:.0f} on average, noise too{hint}"] if gain > GAIN else []
    told = report("lowlight", model, clock, [outcome], y, x, notes=notes,
                  illumination={"mean": u.mean(1).tolist(), "least": u.amin(1).tolist()})  # fmt: skip
    told["certificate"]["of"] = "the illumination; how bright the scene was, one picture cannot say"
    return x, told


def illumination(net: Illumination, y: Tensor, steps: int | None = None, progress: bool = False) -> Outcome:
    """The fixed point of T for ``y`` ``(B, 3, H, W)``, from phi; ``x`` of the outcome is the picture, its result has u.

    The certificate is the contraction's: with the factor r of `Illumination.rate` no move is longer than r times the one
    before, and the fixed point is at most ``r / (1 - r)`` last moves away.  Eq: HODL Theorem 3.2.
    """
    seen = net.given(y)
    T, start = net.map(seen)
    problem = Problem(LeastSquares(Identity(), seen.phi, 2.0))
    result = propagate(
        Iteration(T), problem, start, steps=steps or STEPS, tol=0.0 if steps else TOLERANCE, progress=progress
    )
    moves, size, rate = result.trace["change"], result.trace["norm"], net.rate()
    check = inequality("moves", moves[1:], rate * moves[:-1], ROUND_OFF * size[1:], size[1:]) if len(moves) > 1 else None
    words = {
        "guarantee": "Banach's theorem: T is a contraction, as HODL's Theorem 3.2 asks",
        "statement": "the iterates converge to the only fixed point from every start; what it looks like, no theorem says",
        "holds": (check is None or check.holds) and rate < 1,
        "margin": check.margin if check else 0.0,
        "contraction": rate,
        "lipschitz_bound": net.net.bound(),
        "local_lipschitz": local_norm(lambda u: T(u, None, 0), result.x, 20),
        "distance_to_fixed_point": (rate / (1 - rate) * moves[-1] / size[-1]).max().item() if rate < 1 else None,
    }
    return Outcome(radiance(y, result.x, net.block), result, words)


def _hodl(y: Tensor, steps: int | None, progress: bool) -> Outcome:
    net: Any = weights.load(WEIGHTS).to(y)
    return illumination(net, y, steps, progress)


def _denoised(y: Tensor, steps: int | None, progress: bool) -> Outcome:
    outcome = _hodl(y, steps, progress)
    outcome.x = denoise(outcome.x)[0].clamp(0, 1)
    outcome.certificate["statement"] += "; the network that denoises afterwards has no certificate"
    return outcome


def _retinex(y: Tensor, steps: int | None, progress: bool) -> Outcome:
    """The channel maximum, smoothed and to the power 0.8.  Source: LIME (Guo et al. 2017), with a guided filter."""
    bright = y.amax(1, keepdim=True)
    u = smoothed(bright, RADIUS, 1e-3).maximum(bright).clamp(LEAST, 1) ** POWER
    return formula(radiance(y, u), "a formula: the light is what the brightest channel shows", u)


MODELS = {  # each run as run(y, steps, progress)
    "hodl": Model(_hodl, "HODL: the illumination as a fixed point, its non-expansive network searched; noise stays"),
    "hodl-denoised": Model(_denoised, "the same, then the denoising network of `restore denoise`"),
    "retinex": Model(_retinex, "the channel maximum as illumination, smoothed; no network"),
}
