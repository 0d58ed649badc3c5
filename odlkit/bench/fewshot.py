"""Few-shot learning on Omniglot: the shipped features, and the methods of Table 9 trained alike for a short while."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from odlkit import weights
from odlkit.bench import each, provenance
from odlkit.training import fewshot as fs

PAPER = {  # HODL Table 9: Omniglot, 5- and 20-way 1-shot, and MiniImageNet, 5-way 1-shot
    "rhg": [98.60, 95.50, 48.89],
    "trhg": [98.74, 95.82, 47.67],
    "cg": [98.96, 94.46, 48.42],
    "ns": [98.40, 96.06, 48.61],
    "HODL": [99.04, 96.50, 49.08],
}
TABLE_9 = {name: row[:2] for name, row in PAPER.items()}
WHY = (
    "four convolutions of stride 2, 20-way tasks, minutes of training; the paper does not say which network and split it has"
)
WAYS, EPISODES = (5, 20), 600
SHORT, WIDTH, SEEDS = 1000, 24, (0, 1, 2)  # steps and network with which the methods are compared


def measured(features: nn.Module, classes: Tensor, ways: int, episodes: int) -> dict[str, float]:
    """Mean accuracy in percent over tasks and its 95% interval."""
    found = 100 * fs.accuracies(features.eval(), fs.draws(classes, ways, episodes))
    return {"accuracy": round(found.mean().item(), 2), "interval_95": round(1.96 * found.std().item() / episodes**0.5, 2)}


def omniglot(progress: bool = False) -> dict[str, Any]:
    """The shipped features on the evaluation classes, beside first order, pixels and random features."""
    classes = fs.omniglot("evaluation")
    torch.manual_seed(0)
    random = fs.Features(weights.card("hodl-fewshot")["network"]["width"])
    with torch.no_grad():  # normalization needs the statistics of some pictures
        for _ in range(20):
            random(classes[:50].flatten(0, 1))
    learned = {"hodl": weights.load("hodl-fewshot"), "first order": weights.load("first-order-fewshot")}
    nets = learned | {"random": random, "pixels": nn.Flatten()}
    rows = [
        {"ways": ways, "features": name, **measured(net, classes, ways, EPISODES)}
        for ways in each(WAYS, "ways", progress)
        for name, net in nets.items()
    ]
    score = {row["ways"]: row["accuracy"] for row in rows if row["features"] == "hodl"}
    return {
        "claim": "Omniglot, 659 evaluation classes that training never saw, 1 shot, 600 tasks: accuracy in percent",
        "rows": rows,
        "five_way_at_least_96": score[5] >= 96,
        "twenty_way_at_least_88": score[20] >= 88,
        "paper": TABLE_9,
        "why_they_differ": WHY,
    } | provenance("fewshot-omniglot", ("omniglot",), (0,), ("hodl-fewshot", "first-order-fewshot"))


def compared(train: Tensor, held: Tensor, classes: Tensor, asked: Sequence[int], progress: bool, **run: Any) -> list[dict]:
    """A row for each method, equal networks, data, optimiser and steps: mean and standard deviation over `SEEDS`."""
    rows = []
    for method, about in each(fs.METHODS.items(), "methods", progress, len(fs.METHODS)):
        scores, seconds = [], []
        for seed in SEEDS:
            torch.manual_seed(seed)
            net = fs.Features(WIDTH, channels=train.shape[2])
            clock = time.process_time()
            with tempfile.TemporaryDirectory() as out:
                fs.train(net, train, held, Path(out), method=method, steps=SHORT, seed=seed, **run)
            seconds.append(time.process_time() - clock)
            scores.append([measured(net, classes, n, 200)["accuracy"] for n in asked])
        spread = [[round(f(column), 2) for f in (mean, stdev)] for column in zip(*scores, strict=True)]
        named = {5: "five_way", 20: "twenty_way"}
        rows.append({
            "method": method,
            "what": about.what,
            **{named[n]: pair for n, pair in zip(asked, spread, strict=True)},
            "cpu_seconds_a_run": round(mean(seconds)),
            "paper": PAPER.get(method, PAPER["HODL"] if "hodl" in method else None),
        })  # fmt: skip
    return rows


def methods(progress: bool = False) -> dict[str, Any]:
    """All methods on Omniglot."""
    background, classes = fs.omniglot("background"), fs.omniglot("evaluation")
    rows = compared(fs.turned(background[: -fs.HELD_OUT]), background[-fs.HELD_OUT :], classes, WAYS, progress)
    return {
        "claim": f"Omniglot 1-shot after {SHORT} steps of a network of width {WIDTH}: mean accuracy in "
        f"percent and standard deviation over {len(SEEDS)} seeds",
        "rows": [row | {"paper": row["paper"] and row["paper"][:2]} for row in rows],
        "paper": TABLE_9,
        "why_they_differ": WHY,
    } | provenance("fewshot-methods", ("omniglot",), SEEDS)


def mini(progress: bool = False, side: int = 84) -> dict[str, Any]:
    """All methods on MiniImageNet, for who has it."""
    train, held, classes = (fs.mini(part, side) for part in ("train", "val", "test"))
    queries = min(15, train.shape[1] - 1)
    rows = compared(train, held, classes, (5,), progress, ways=5, tasks=4, queries=queries)
    told = provenance("fewshot-mini", (), SEEDS)
    told["data"] = {"mini-imagenet": hashlib.sha256(classes.numpy().tobytes()).hexdigest()}  # of the test classes, as read
    return {
        "claim": f"MiniImageNet 5-way 1-shot after {SHORT} steps of a network of width {WIDTH}: mean accuracy in "
        f"percent and standard deviation over {len(SEEDS)} seeds",
        "rows": [row | {"paper": row["paper"] and row["paper"][2]} for row in rows],
        "paper": {name: row[2] for name, row in PAPER.items()},
        "why_they_differ": "a small network after a short training; the paper does not say which network it has",
    } | told
