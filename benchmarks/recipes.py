"""A training step of three recipes as `odlkit train` can be told to run it: precision, compilation, batch, memory.

HODL's deconvolution through seven iterations, DGUNet's deraining, few-shot features under twenty-way tasks; random pictures,
the recipes' own networks, sizes and losses.  The floor is float32 without anything.  Compilation itself is not timed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import arguments, compare, finish, fresh, rise, row
from torch import Tensor

from odlkit.models.dgunet import DGUNet
from odlkit.models.hodl_deblur import Deconvolution
from odlkit.networks import Features
from odlkit.training import fewshot, hodl, machine
from odlkit.training.dgunet import SMALL, charbonnier
from odlkit.training.loop import patches
from odlkit.training.machine import Machine

MEMORY = ("full", "checkpointed", "rebuilt")
PROGRAMS: dict[str, dict[str, Any]] = {  # options of `Machine`, and ``memory`` for the recipe that has it
    "float32": {"precision": "float32"},
    "bf16": {},
    "float32, compiled": {"precision": "float32", "backend": "inductor"},
    "bf16, compiled": {"backend": "inductor"},
    "float32, 4 times the batch, an item": {"precision": "float32", "times": 4},
}
BY_PARTS = {f"float32, by parts, {name}": {"precision": "float32", "memory": name} for name in MEMORY}


def pictures(channels: int) -> list[Tensor]:
    """Two pictures to cut patches from."""
    return list(torch.rand(2, 1, channels, 128, 128, generator=torch.Generator().manual_seed(1)))


def deblur(memory: str | None = None) -> tuple[torch.nn.Module, list[torch.nn.Module], Callable]:
    """HODL's deconvolution: the model, its networks, the loss."""
    net = Deconvolution({"widths": hodl.WIDTHS}).train()
    net.mixed = machine.mixed()
    return net, [net.unit], partial(hodl.hierarchical_loss, net, pictures(1), 96, memory=memory)


def derain() -> tuple[torch.nn.Module, list[torch.nn.Module], Callable]:
    """DGUNet's deraining."""
    net, images = DGUNet("derain", **SMALL), pictures(3)

    def loss(generator: torch.Generator) -> Tensor:
        x = patches(images, machine.times(8), 64, generator).to(machine.best_device())
        with machine.autocast():
            return charbonnier(net((x + 0.1).clamp(max=1)), x, 0.05)

    return net, [net], loss


def features() -> tuple[torch.nn.Module, list[torch.nn.Module], Callable]:
    """Features for few-shot learning, which have no bfloat16."""
    net, classes = Features(64), fewshot.glyphs(40, 6)

    def loss(generator: torch.Generator) -> Tensor:
        task = fewshot.episode(classes, 20, 1, 5, machine.times(2), generator)
        return fewshot.task_loss(net, fewshot.Episode(*(part.to(machine.best_device()) for part in task)))

    return net, [net], loss


RECIPES: dict[str, Callable] = {"hodl-deblur": deblur, "dgunet-derain": derain, "hodl-fewshot": features}
ITEMS = {"hodl-deblur": 4, "dgunet-derain": 8, "hodl-fewshot": 2}


def step(recipe: str, memory: str | None = None, **how: Any) -> Callable[[], None]:
    """One step: draw, loss, gradient, Adam.  It waits for the GPU where there is one."""
    chosen = Machine(**how)
    with machine.on(chosen):
        torch.manual_seed(0)
        net, parts, loss = RECIPES[recipe](**({} if memory is None else {"memory": memory}))
        net.to(machine.best_device())
        machine.prepare(parts)
    optimiser, generator = torch.optim.Adam(net.parameters(), 1e-6), torch.Generator().manual_seed(2)

    def call() -> None:
        with machine.on(chosen):
            optimiser.zero_grad()
            loss(generator).backward()
            optimiser.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return call


def probe(recipe: str, program: str) -> None:
    """In a fresh process: print the peak in MiB of one step above what weights, gradients and moments take."""
    call = step(recipe, **(PROGRAMS | BY_PARTS)[program])
    if torch.cuda.is_available():
        call()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        print((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    small = step(recipe, **(PROGRAMS | BY_PARTS)[program])
    small()  # loads what is loaded once; its blocks go back to the system
    del small
    print(rise(call))


def main() -> None:
    """All recipes and programs."""
    if sys.argv[1:2] == ["--probe"]:
        torch.set_num_threads(1)
        return probe(*sys.argv[2:])
    options, rows = arguments(__doc__.splitlines()[0], rounds=5), []
    for recipe in RECIPES:
        programs = PROGRAMS | (BY_PARTS if recipe == "hodl-deblur" else {})
        if recipe == "hodl-fewshot":
            programs = {name: how for name, how in programs.items() if "bf16" not in name}
        times = compare({name: step(recipe, **how) for name, how in programs.items()}, options.rounds)
        for name, how in programs.items():
            times[name] = [seconds / how.get("times", 1) for seconds in times[name]]
        for name, how in programs.items():
            line = row(f"{recipe}, a step of {ITEMS[recipe]} items", name, times)
            rows.append(line | {"MiB": None if how.get("backend") else round(fresh(__file__, "--probe", recipe, name), 1)})
            print(rows[-1], flush=True)
    finish(rows, options.json)


if __name__ == "__main__":
    main()
