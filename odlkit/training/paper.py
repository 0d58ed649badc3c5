"""DGUNet at the paper's scale, for a GPU: Rain13K, GoPro and SIDD, the released settings, days of training.

The folder that ``ODLKIT_DATA`` names holds the pairs as ``Rain13K/train/input`` and ``Rain13K/train/target``, pictures of
equal names, and so on; or GoPro as it was released, a folder a scene with ``blur`` and ``sharp``.  No weights from these
recipes are shipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from odlkit import data
from odlkit.images import centre
from odlkit.models.dgunet import SETTINGS
from odlkit.training.dgunet import restorer
from odlkit.training.loop import patches
from odlkit.training.machine import times

HELD_OUT = 16  # pairs, evenly spaced, that validate; no test set is looked at
FOLDERS = {"derain": "Rain13K", "deblur": "GoPro", "denoise": "SIDD"}
PLANS: dict[str, dict[str, Any]] = {  # iterations and batch are the text's; what else is here is the released models'
    "derain": {"steps": 400_000, "batch": 16, "size": 256, "lr": 2e-4, "final": 5e-3, "edges": 0.05},
    "deblur": {"steps": 400_000, "batch": 16, "size": 256, "lr": 1e-4, "final": 1e-2, "edges": 0.05},
    "denoise": {"steps": 400_000, "batch": 16, "size": 128, "lr": 1e-4, "final": 1e-2, "edges": 0.0},
}


def training_pairs(folder: Path) -> list[tuple[Path, Path]]:
    """The pairs of ``folder``: `odlkit.data.pairs`, or those of its scenes where each has ``blur`` and ``sharp``."""
    scenes = [] if (folder / "input").is_dir() else sorted(place.parent for place in folder.glob("*/sharp"))
    return [pair for scene in scenes for pair in data.pairs(scene, "blur", "sharp")] or data.pairs(folder)


def read_pair(degraded: Path, clean: Path, size: int = 0) -> Tensor:
    """``(1, 6, H, W)``: clean, then degraded, in colour; sides below ``size`` are continued by their border.

    Raises ``ValueError`` when the two differ in size.
    """
    x, y = (data.image(path).expand(-1, 3, -1, -1) for path in (clean, degraded))
    if x.shape != y.shape:
        sizes = f"{tuple(y.shape[-2:])} and {tuple(x.shape[-2:])}"
        raise ValueError(f"pair: expected {degraded} and {clean} of one size, got {sizes}")
    height, width = x.shape[-2:]
    return nnf.pad(torch.cat([x, y], 1), (0, max(size - width, 0), 0, max(size - height, 0)), mode="replicate")


def drawn(pairs: Sequence[tuple[Path, Path]], batch: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``(x, y)``: random patches of random pairs, read when they are drawn, turned and flipped together."""
    chosen = torch.randint(len(pairs), (batch,), generator=generator).tolist()
    both = torch.cat([patches([read_pair(*pairs[int(i)], size)], 1, size, generator) for i in chosen])
    return both[:, :3], both[:, 3:]


def train(out: Path, resume: bool = False, *, task: str, **changes: Any) -> None:
    """Train the released setting of ``task``, one of `PLANS`; ``changes`` go over the plan and then to `Setting`."""
    plan = PLANS[task] | {key: changes.pop(key) for key in list(changes) if key in PLANS[task]}
    batch, size = plan.pop("batch"), plan.pop("size")
    pairs = training_pairs(data.root() / FOLDERS[task] / "train")
    held = pairs[:: -(-len(pairs) // HELD_OUT)]
    seen = [pair for pair in pairs if pair not in held] or held
    middles = [centre(read_pair(*pair, size), size) for pair in held]
    restorer(
        out, resume, name=f"dgunet-{task}-paper", setting=task, held=[(z[:, :3], z[:, 3:]) for z in middles],
        sample=lambda generator: drawn(seen, times(batch), size, generator),
        what=f"DGUNet for {FOLDERS[task]}, the released setting",
        data=f"{FOLDERS[task]}, {len(seen)} pairs; {len(held)} more validate",
        warmup=2500, **plan, **(asdict(SETTINGS[task]) | changes),
    )  # fmt: skip


derain, deblur, denoise = (partial(train, task=task) for task in PLANS)
