"""Architecture search for rain removal: the bilevel problem (12), discretisation, and what the result is compared with.

    min_alpha L_val(w*(alpha), alpha),  w*(alpha) = argmin_w L_train(w, alpha)

Each turn moves alpha by one hypergradient of `odlkit.bilevel`, then w by one step of Adam.  Second order: w* is taken to be
``w - xi dL_train/dw``, one unrolled step of descent, and is differentiated.  First order: w* is taken to be w, a constant.
All rain is drawn here; the scenes of L_train, of L_val and those that validate are three sets.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from odlkit import weights
from odlkit.bilevel import descent, hypergradient
from odlkit.images import atomic
from odlkit.metrics import psnr
from odlkit.models.gdc_rain import RainNet
from odlkit.networks.cells import HAND_MADE, Genotype, discretise, random_genotype
from odlkit.training.loop import fit, log_error, save_weights, ship
from odlkit.training.machine import best_device, times
from odlkit.training.rain import COLOUR, rainy, scenes

SEARCH = {"steps": 100, "before": 30, "batch": 4, "size": 48, "lr": 3e-3, "alpha_lr": 3e-2, "xi": 1e-2}
SMALLER: dict[str, Any] = {"stages": 1, "cells": (2, 1)}  # what is searched with, as DARTS searches with fewer cells
SEEDS, STEPS = 3, (200, 400)  # of the comparison
DATA = f"colour images of {', '.join(COLOUR)}, no scene of Rain100L, under drawn rain, light after the search; 8 validate"

Weights = dict[str, Tensor]


def split(net: nn.Module) -> tuple[Weights, Weights]:
    """The network's parameters ``(w, alpha)`` by name, detached."""
    parts: tuple[Weights, Weights] = {}, {}
    for name, value in net.named_parameters():
        parts[name.endswith("alpha")][name] = value.detach()
    return parts


def architecture_gradient(
    net: nn.Module, train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], xi: float, order: int
) -> tuple[Weights, float]:
    """``d/dalpha L_val(w - xi dL_train/dw(w, alpha), alpha)`` (order 2) or ``d/dalpha L_val(w, alpha)`` (1), and L_val.

    ``train`` and ``val`` are clean and rainy pictures ``(x, y)``; ``net(y)`` is the list of the stages' pictures.
    Eq: GDC (12).
    """
    w, alpha = split(net)

    def loss(pair: tuple[Tensor, Tensor], w: Weights, alpha: Weights) -> Tensor:
        return log_error(functional_call(net, w | alpha, (pair[1],)), pair[0])

    result = hypergradient(descent(partial(loss, train), xi), partial(loss, val), alpha, w, steps=order - 1)
    return result.gradient, result.value.item()


def search(
    out: Path, resume: bool, order: int, width: int = 8, steps: int | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Search G's and d's cells together: ``{"G.alpha", "d.alpha"}``, ``(10, 8)`` each.  A checkpoint every 20 turns."""
    from tqdm import tqdm

    name, at = f"gdc-search-order-{order}", SEARCH | ({"steps": steps} if steps else {})
    torch.manual_seed(seed)
    device, generator = best_device(), torch.Generator().manual_seed(seed)
    net = RainNet(width=width, **SMALLER).to(device)
    alphas = [net.G.alpha, net.d.alpha]
    rest = [p for p in net.parameters() if all(p is not a for a in alphas)]
    optimisers = [
        torch.optim.Adam(rest, lr=at["lr"], betas=(0.9, 0.99)),
        torch.optim.Adam(alphas, lr=at["alpha_lr"], betas=(0.5, 0.99)),
    ]
    images = scenes()[0]
    batch, size = times(int(at["batch"])), int(at["size"])
    sample = [partial(rainy, part, batch, size, generator) for part in (images[::2], images[1::2])]
    first, history, seconds = 0, [], 0.0
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / f"{name}.pt"
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location="cpu")
        net.load_state_dict(state["net"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        generator.set_state(state["generator"])
        first, history, seconds = state["step"], state["history"], state["seconds"]
    clock = time.monotonic()
    for step in tqdm(range(first, int(at["steps"])), initial=first, total=int(at["steps"]), desc=name, mininterval=5):
        train, val = ((x.to(device), y.to(device)) for x, y in (draw() for draw in sample))
        if step >= at["before"]:
            gradient, value = architecture_gradient(net, train, val, at["xi"], order)
            for key, parameter in net.named_parameters():
                parameter.grad = gradient.get(key)
            optimisers[1].step()
            history.append(value)
        net.zero_grad(set_to_none=True)
        loss = log_error(net(train[1]), train[0])
        loss.backward()
        nn.utils.clip_grad_norm_(rest, 1.0)
        optimisers[0].step()
        if (step + 1) % 20 == 0 or step + 1 == at["steps"]:
            state = {"net": net.state_dict(), "optimisers": [o.state_dict() for o in optimisers], "step": step + 1}
            state |= {"generator": generator.get_state(), "history": history, "seconds": seconds + time.monotonic() - clock}
            with atomic(checkpoint) as handle:
                torch.save(state, handle)
    found = {key: alpha.cpu().round(decimals=4) for key, alpha in split(net)[1].items()}
    about = {"order": order, "seconds": round(seconds + time.monotonic() - clock), "validation_losses": history}
    about |= {"alpha": {key: [[round(v, 4) for v in row] for row in a.tolist()] for key, a in found.items()}}
    (out / f"{name}.json").write_text(json.dumps(about) + "\n")
    return found


def held_score(net: RainNet, held: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Mean PSNR in dB of the last stage."""
    with torch.no_grad():
        return sum(psnr(net(y.to(best_device()))[-1].cpu().clamp(0, 1), x).item() for x, y in held) / len(held)


def held_pairs() -> list[tuple[Tensor, Tensor]]:
    """Scenes that nothing was trained on, under light rain, ``(1, 3, 192, 192)``."""
    seeds = torch.Generator().manual_seed(1)
    return [rainy([x], 1, 192, seeds, heavy=0.0) for x in scenes()[1]]


def retrain(
    out: Path, resume: bool, name: str, genotypes: tuple[Genotype, Genotype], *, steps: Sequence[int], seed: int = 0,
    size: int = 48, **options: Any,
) -> tuple[RainNet, dict]:  # fmt: skip
    """Train a discrete architecture from the beginning, through the stages of Algorithm 2; its network and its record.

    Under light rain: a few hundred steps on heavy rain as well leave the light one nearly as it was.  ``steps`` are the ends
    of phases, each with a cosine of its own from step 0, whose part before the phase is left out.
    """
    torch.manual_seed(seed)
    net, draw = RainNet(*genotypes, **options).to(best_device()), partial(rainy, scenes()[0], times(8), size, heavy=0.0)

    def loss(generator: torch.Generator) -> Tensor:
        x, y = (t.to(best_device()) for t in draw(generator))
        return log_error(net(y), x)

    score: Callable[[], float] = partial(held_score, net, held_pairs())
    record: dict = {}
    for n in steps:
        record = fit(net, loss, steps=n, lr=3e-3, out=out, name=name, seed=seed, resume=resume, validate=score, warmup=50)
        resume = True
    return net, record


def architectures(out: Path, resume: bool, steps: int | None = None) -> dict[str, tuple[Genotype, Genotype]]:
    """The one of the second-order search, the hand-made one and three random ones, as many edges each.

    The first-order search is run for its ``alpha``.
    """
    alpha = [search(out, resume, order, steps=steps) for order in (1, 2)][1]
    found = {"searched": (discretise(alpha["G.alpha"]), discretise(alpha["d.alpha"])), "hand-made": (HAND_MADE, HAND_MADE)}
    generator = torch.Generator().manual_seed(0)
    return found | {f"random-{k}": (random_genotype(generator), random_genotype(generator)) for k in (1, 2, 3)}


def compare(
    out: Path, resume: bool = False, steps: Sequence[int] = STEPS, seeds: int = SEEDS, turns: int | None = None
) -> None:
    """Search, discretise, train every architecture alike from each seed; one file of weights for all of them."""
    clock, nets, about, total = time.monotonic(), nn.ModuleDict(), {}, 0
    chosen = architectures(out, resume, turns)
    for seed in range(seeds):
        for name, genotypes in chosen.items():
            key = f"{name}-{seed}"
            nets[key], record = retrain(out, resume, f"gdc-search-{key}", genotypes, steps=steps, seed=seed)
            about[key] = {"validation_psnr": record["validation_psnr"], "seconds": record["seconds"]}
            total += record["seconds"]
    searches = {n: json.loads((out / f"gdc-search-order-{n}.json").read_text()) for n in (1, 2)}
    card = {
        "name": "gdc-search",
        "what": "GDC for rain, architectures searched, made by hand and drawn at random, trained alike",
        "recipe": "odlkit train gdc-search",
        "data": DATA,
        "network": {"kind": "cells", "networks": {key: net.config for key, net in nets.items()}},
        "schedule": {},
        "search": SEARCH | {"width": 8, "stages": 1, "cells": [2, 1], "orders": searches},
        "trained": about,
    } | record
    card |= {"seconds": total + sum(one["seconds"] for one in searches.values()), "validation_psnr": None, "history": []}
    card["seconds_of_this_run"] = round(time.monotonic() - clock)
    save_weights(nets, out / "gdc-search.safetensors", card, torch.float16)


def derain(out: Path, resume: bool = False, steps: Sequence[int] = (1000, 1300, 2200), width: int = 12) -> None:
    """What is shipped: the second-order architecture, wider and trained longer, on larger patches."""
    here = out / "gdc-search-order-2.json"
    found = json.loads(here.read_text()) if here.exists() else weights.card("gdc-search")["search"]["orders"]["2"]
    generative, discriminative = (discretise(torch.tensor(found["alpha"][key])) for key in ("G.alpha", "d.alpha"))
    pair = generative, discriminative
    net, record = retrain(out, resume, "gdc-derain", pair, steps=steps, size=64, width=width)
    ship(
        net,
        out,
        "gdc-derain",
        record,
        what=f"GDC for rain by Algorithm 2, {net.stages} stages, searched cells: four generative, two discriminative",
        data=DATA,
        network={"kind": "cells", **net.config},
    )
