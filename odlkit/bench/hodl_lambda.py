"""Weights of a regulariser by the bilevel engine, against a grid and a golden-section search, on pictures held out.

Deblurring (a Levin kernel, 1% noise) and inpainting (half of the pixels, 2% noise), both circular; each seed has its own
training crops of train400, noise and mask.  The test crops are the centres of Set5's pictures and of five of BSD68.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from odlkit import data
from odlkit.bench import each, provenance
from odlkit.images import centre
from odlkit.linear import Operator
from odlkit.metrics import psnr
from odlkit.operators import Blur, Mask
from odlkit.training.banded import Lower
from odlkit.training.regulariser import DECIBEL, Learned, learn_weights

SEEDS, TRAIN, TEST, NOISE = (0, 1, 2), 48, 64, {"deblurring": 0.01, "inpainting": 0.02}
MODELS = {  # name -> regulariser, one weight in all
    "TV": ("tv", True),
    "wavelet, one weight": ("wavelet", True),
    "wavelet, one a band": ("wavelet", False),
    "DCT filters, one weight": ("dct", True),
    "DCT filters, one a filter": ("dct", False),
}
GRID, SPAN = 20, (1e-4, 1e-1)  # weights of the grid, equally spaced in their logarithm
TOLERANCE = 0.05  # dB a factor e in the weights, below which a slope counts as flat
SURE = 1e-3  # root mean square distance to u* that the rivals' and the test's solves are sure to keep


def operator(task: str, size: int, seed: int) -> Operator:
    """A Levin kernel's blur, or a mask of that seed that keeps half of the pixels."""
    if task == "deblurring":
        return Blur(data.levin_kernels()[0].double())
    generator = torch.Generator().manual_seed(100 + seed)
    return Mask((torch.rand(1, 1, size, size, generator=generator) < 0.5).double())


def observe(A: Operator, x: Tensor, noise: float, seed: int) -> Tensor:
    """The data with Gaussian noise of that seed."""
    y = A.A(x)
    return y + noise * torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype)


def pictures(seed: int) -> tuple[Tensor, Tensor]:
    """Four training crops of that seed, and the ten test crops, in float64."""
    train, test = data.images("train400")[97 * seed :: 23][:4], [*data.images("set5"), *data.images("bsd68")[6::14][:5]]
    return torch.cat([centre(x, TRAIN) for x in train]).double(), torch.cat([centre(x, TEST) for x in test]).double()


class Scalar:
    """The rivals' view of the training problem: the error at one weight, by a solve that starts from the last one."""

    def __init__(self, lower: Lower, truth: Tensor):
        self.lower, self.truth = lower, truth
        self.seen: dict[float, float] = {}
        self.u: Tensor | None = None

    def __call__(self, logarithm: float) -> float:
        w = torch.full((1,), logarithm, dtype=torch.float64)
        self.u = self.lower.solve(w, self.u, SURE * self.lower.mu * math.sqrt(self.truth[0].numel()))
        self.seen[logarithm] = (self.u - self.truth).square().mean().item()
        return self.seen[logarithm]


def grid(loss: Callable[[float], float]) -> None:
    """Try them all, from the smallest weight up, each from the last solution."""
    low, high = map(math.log, SPAN)
    for i in range(GRID):
        loss(low + (high - low) * i / (GRID - 1))


def golden(loss: Callable[[float], float]) -> None:
    """Brent's bounded search, to 5% of the weight: what a careful person does without a gradient."""
    from scipy.optimize import minimize_scalar

    minimize_scalar(loss, bounds=tuple(map(math.log, SPAN)), method="bounded", options={"xatol": 0.05})


def searched(search: Callable, A: Operator, y: Tensor, x: Tensor, like: Learned) -> tuple[Learned, Scalar]:
    """The best weight that a search has seen, for the regulariser of ``like``, and what it has seen."""
    loss = Scalar(Lower(A, y, like.bands, like.ridge, like.delta), x)
    search(loss)
    best = min(loss.seen, key=lambda w: loss.seen[w])
    weights = torch.full((1,), math.exp(best), dtype=torch.float64)
    return Learned(weights, "grid", [], math.nan, like.bands, like.ridge, like.delta), loss


def run(progress: bool = False) -> dict[str, Any]:
    """PSNR on the test crops, training error and work: learned, by a grid of 20 and by golden section."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    cases = [(task, seed) for task in NOISE for seed in SEEDS]
    for task, seed in each(cases, "hodl-lambda", progress):
        train, test = pictures(seed)
        A, noise = operator(task, TRAIN, seed), NOISE[task]
        y, B = observe(A, train, noise, seed), operator(task, TEST, seed)
        held = observe(B, test, noise, 1000 + seed)
        common: Tensor | None = None  # the best weight in all, from which many weights start
        for name, (regulariser, shared) in MODELS.items():
            start = None if shared else common
            learned = learn_weights(
                A, train, noise, regulariser, shared=shared, start=start, measured=y, tol=TOLERANCE, progress=False
            )
            common, last = learned.weights, learned.history[-1]
            row = {"train": -DECIBEL * math.log(last["mse"]), "solves": last["solves"], "applied": last["applied"]}
            add(found, task, name, learned, B, held, test, row | {"last": last, "status": learned.status})
            if name != "TV":
                continue
            for rival, search in (("TV, grid of 20", grid), ("TV, golden section", golden)):
                chosen, loss = searched(search, A, y, train, learned)
                row = {"train": -DECIBEL * math.log(min(loss.seen.values())), "solves": len(loss.seen)}
                add(found, task, rival, chosen, B, held, test, row | {"applied": loss.lower.applied})
    lasts = [r["last"] for runs in found.values() for r in runs if "last" in r]
    pairs = [zip(found[t, "TV"], found[t, "TV, grid of 20"], strict=True) for t in NOISE]
    gains = [r["train"] - g["train"] for pair in pairs for r, g in pair]
    return {
        "claim": f"Weights learned on four crops of {TRAIN}x{TRAIN}, tested on ten of {TEST}x{TEST} held out: PSNR in dB. "
        "The work of many weights comes on top of that of the common weight they start from",
        "rows": [summary(*key, runs) for key, runs in found.items()],
        "all_converged": all(r.get("status", "converged") == "converged" for runs in found.values() for r in runs),
        "worst_proved_relative_error_of_the_loss": f"{max(r['mse_error'] / r['mse'] for r in lasts):.1e}",
        "worst_proved_slope_at_the_end_dB_a_factor_e": round(max(r["slope"] + r["slope_error"] for r in lasts), 4),
        "worst_proved_root_mean_square_distance": f"{max(r['distance'] for r in lasts) / (2 * TRAIN):.1e}",
        "least_gain_over_the_grid_on_the_training_crops_dB": round(min(gains), 4),
    } | provenance("hodl-lambda", ("train400", "set5", "bsd68", "levin09_kernels"), SEEDS)


def add(found: dict, task: str, name: str, learned: Learned, B: Operator, held: Tensor, test: Tensor, row: dict) -> None:
    """Restore the test crops with these weights and note their PSNR."""
    x, _ = learned.restore(B, held, SURE)
    pooled = -DECIBEL * math.log((x - test).square().mean().item())
    row |= {"test": psnr(x, test).mean().item(), "pooled": pooled, "weights": learned.weights.tolist()}
    found.setdefault((task, name), []).append(row)


def summary(task: str, name: str, runs: list[dict]) -> dict[str, Any]:
    """A row of the record: means over the seeds, and the spread of the test's PSNR."""
    mean = lambda key: sum(r[key] for r in runs) / len(runs)  # noqa: E731
    return {
        "task": task,
        "method": name,
        "weights": len(runs[0]["weights"]),
        "psnr": round(mean("test"), 3),
        "spread_over_seeds": round(torch.tensor([r["test"] for r in runs]).std().item(), 3),
        "psnr_of_the_mean_error": round(mean("pooled"), 3),
        "psnr_of_the_mean_error_training": round(mean("train"), 3),
        "solves": round(mean("solves"), 1),
        "applications_of_A": round(mean("applied")),
        "first_weights": [round(r["weights"][0], 5) for r in runs],
    }
