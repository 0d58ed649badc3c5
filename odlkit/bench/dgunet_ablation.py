"""DGUNet's ablations (Tables 5 and 6) at a size that a processor trains: one change each, the same steps, several seeds.

As in the paper every change is made on DGUNet+, whose stages share nothing, but of five stages instead of seven.  The task
is deraining of gray patches under drawn rain; a seed draws the patches, the rain and the first weights.  What a change
costs is the mean over seeds of the difference to the full network of that seed.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from odlkit import data
from odlkit.bench import each, provenance
from odlkit.images import centre
from odlkit.metrics import psnr
from odlkit.models.dgunet import DGUNet
from odlkit.networks.hourglass import Fusion, Projection
from odlkit.training.dgunet import charbonnier
from odlkit.training.loop import commit, fit
from odlkit.training.rain import rainy, streaks

SEEDS, STEPS, BATCH, PATCH, CROP = (0, 1, 2), 120, 4, 32, 96
SIZE = {"channels": 1, "width": 8, "step": 4, "tail": 4, "stages": 5}


class Nothing(nn.Module):
    """In the place of the gradient step: ``v = x``."""

    def forward(self, x: Tensor, y: Tensor, operator: Any) -> Tensor:
        return x


def stages(net: DGUNet) -> list[Any]:
    """The first, those in the middle, the last."""
    return [net.first, *net.middle, net.last]


def without_gradient(net: DGUNet) -> None:
    """The paper's "w/o FGDM": a cascade of hourglasses."""
    for stage in stages(net):
        stage.gradient = Nothing()


def without_modulation(net: DGUNet) -> None:
    """The paper's "w/o SP": features are added, no alpha and beta."""
    for stage in stages(net):
        for j, old in enumerate(stage.hourglass.fusions if not stage.short else []):
            stage.hourglass.fusions[j] = Fusion(old.e.in_channels, old.d.in_channels, plain=True)


def without_projection(net: DGUNet) -> None:
    """A convolution in the place of the subspace projection; not in the paper."""
    for stage in stages(net):
        if isinstance(stage.merge, Projection):
            width = stage.merge.merge.out_channels
            stage.merge = nn.Conv2d(2 * width, width, 3, padding=1, bias=False)


VARIANTS: dict[str, tuple[dict[str, Any], Callable[[DGUNet], None] | None, float | None]] = {
    # changes of the setting, surgery, what the paper's PSNR on Rain100H changes by (stages: from five to three)
    "full": ({}, None, 0.0),
    "3 stages": ({"stages": 3}, None, -0.76),
    "fusion on 1 scale": ({"fused": 1}, None, -0.38),
    "no fusion": ({"fused": 0}, None, -0.97),
    "no gradient step": ({}, without_gradient, -0.55),
    "no modulation": ({}, without_modulation, -0.14),
    "no projection": ({}, without_projection, None),
    "shared stages": ({"shared": True}, None, -0.40),  # Table 1
    "loss on the last stage": ({}, None, None),
}


def built(name: str) -> DGUNet:
    """The network of a variant, from the seed that torch has."""
    changes, surgery, _ = VARIANTS[name]
    net = DGUNet("derain+", **(SIZE | changes))
    if surgery:
        surgery(net)
    return net


def one(name: str, seed: int, out: Path, train: list[Tensor], x: Tensor, y: Tensor, steps: int = STEPS) -> dict[str, Any]:
    """Train a variant, or take up its checkpoint in ``out``; PSNR on ``x``, parameters, seconds."""
    torch.manual_seed(seed)
    net = built(name)
    last = -1 if name == "loss on the last stage" else None

    def loss(generator: torch.Generator) -> Tensor:
        clean, rained = rainy(train, BATCH, PATCH, generator, heavy=0.0)
        return charbonnier(net(rained)[last:], clean, 0.05)

    def validate() -> float:
        with torch.no_grad():
            return psnr(net(y)[-1].clamp(0, 1), x).mean().item()

    file = f"{name}-{seed}".replace(" ", "-")
    record = fit(net, loss, steps=steps, lr=2e-3, out=out, name=file, seed=seed, resume=True, warmup=30, validate=validate)
    count = sum(p.numel() for p in net.parameters())
    return {"psnr": record["validation_psnr"], "parameters": count, "seconds": record["seconds"]}


def run(progress: bool = False) -> dict[str, Any]:
    """PSNR on Set14 under drawn rain, every variant and seed; after a stop it goes on from what the temporary folder has."""
    train = data.images("train400")
    x = torch.cat([centre(image, CROP) for image in data.images("set14")])
    y = (x + streaks((len(x), CROP, CROP), torch.Generator().manual_seed(100), heavy=0.0)).clamp(0, 1)
    out = Path(tempfile.gettempdir()) / f"odlkit-dgunet-ablation-{commit()}"
    jobs = [(name, seed) for seed in SEEDS for name in VARIANTS]
    found = {(n, seed): one(n, seed, out, train, x, y) for n, seed in each(jobs, "dgunet-ablation", progress)}
    rows = []
    for name, (_, _, printed) in VARIANTS.items():
        runs = [found[name, seed] for seed in SEEDS]
        gaps = [found[name, seed]["psnr"] - found["full", seed]["psnr"] for seed in SEEDS]
        rows.append({
            "variant": name,
            "psnr": round(statistics.fmean(r["psnr"] for r in runs), 2),
            "spread_over_seeds": round(statistics.stdev(r["psnr"] for r in runs), 2),
            "change": round(statistics.fmean(gaps), 2),
            "spread_of_the_change": round(statistics.stdev(gaps), 2),
            "same_sign_in_every_seed": all(g > 0 for g in gaps) or all(g < 0 for g in gaps),
            "parameters": runs[0]["parameters"],
            "seconds_of_a_run": round(statistics.fmean(r["seconds"] for r in runs)),
            "paper_change": printed,
        })  # fmt: skip
    return {
        "claim": f"DGUNet+ of {SIZE['width']} channels, 4 scales, {STEPS} steps on {BATCH} patches of {PATCH}x{PATCH}, "
        f"deraining of gray pictures, {len(SEEDS)} seeds: PSNR in dB on {CROP}x{CROP} crops of Set14 under light rain; "
        "a change is from the full network of the same seed",
        "rows": rows,
        "rainy_psnr": round(psnr(y, x).mean().item(), 2),
        "why_they_differ": "the paper trains 400,000 steps on 16 patches of 256x256 in colour, five times as wide and of "
        "seven stages, once, and tests on Rain100H; here nothing is trained to its end, which favours what learns quickly",
        "settings": SIZE | {"steps": STEPS, "batch": BATCH, "patch": PATCH, "learning rate": 2e-3},
    } | provenance("dgunet-ablation", ("train400", "set14"), SEEDS)
