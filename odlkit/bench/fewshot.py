"""Few-shot learning on Omniglot: the shipped features, and the methods of Table 9 trained alike for a short while."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from odlkit import weights
from odlkit.bench import each, provenance
from odlkit.training import fewshot as fs

PAPER = {  # HODL Table 9, Omniglot, 5- and 20-way 1-shot
    "rhg": [98.60, 95.50],
    "trhg": [98.74, 95.82],
    "cg": [98.96, 94.46],
    "ns": [98.40, 96.06],
    "HODL": [99.04, 96.50],
}
WHY = (
    "four convolutions of stride 2, 20-way tasks, minutes of training; the paper does not say which network and split it has"
)
WAYS, EPISODES = (5, 20), 600
SHORT, WIDTH, SEEDS = 250, 24, (0, 1, 2)  # steps and network with which the methods are compared


def measured(features: nn.Module, classes: torch.Tensor, ways: int, episodes: int) -> dict[str, float]:
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
        "paper": PAPER,
        "why_they_differ": WHY,
    } | provenance("fewshot-omniglot", ("omniglot",), (0,), ("hodl-fewshot", "first-order-fewshot"))


def methods(progress: bool = False) -> dict[str, Any]:
    """All methods with equal networks, data, optimiser and steps; spread over seeds."""
    background, classes = fs.omniglot("background"), fs.omniglot("evaluation")
    train, held = fs.turned(background[: -fs.HELD_OUT]), background[-fs.HELD_OUT :]
    rows = []
    for method, about in each(fs.METHODS.items(), "methods", progress, len(fs.METHODS)):
        scores, seconds = [], []
        for seed in SEEDS:
            torch.manual_seed(seed)
            net = fs.Features(WIDTH)
            with tempfile.TemporaryDirectory() as out:
                record = fs.train(net, train, held, Path(out), method=method, steps=SHORT, seed=seed)
            seconds.append(record["seconds"])
            scores.append([measured(net, classes, ways, 200)["accuracy"] for ways in WAYS])
        table = torch.tensor(scores)
        rows.append({
            "method": method,
            "what": about.what,
            "five_way": [round(v, 2) for v in (table[:, 0].mean().item(), table[:, 0].std().item())],
            "twenty_way": [round(v, 2) for v in (table[:, 1].mean().item(), table[:, 1].std().item())],
            "seconds_a_run": round(sum(seconds) / len(seconds)),
            "paper": PAPER.get(method, PAPER["HODL"] if "hodl" in method else None),
        })  # fmt: skip
    return {
        "claim": f"Omniglot 1-shot after {SHORT} steps of a network of width {WIDTH}: mean accuracy in "
        f"percent and standard deviation over {len(SEEDS)} seeds",
        "rows": rows,
        "paper": PAPER,
        "why_they_differ": WHY,
    } | provenance("fewshot-methods", ("omniglot",), SEEDS)
