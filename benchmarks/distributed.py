"""Throughput of two gloo processes over one: hypergradients with the data or the tasks split, and training steps.

Data hyper-cleaning of `hypergradient.py`, 100 unrolled gradient steps with gradients averaged at every step; several such
tasks, every other one a process; training steps of a small network. Wall time between two meetings, and the CPU time of the
busier process, which is what would be left of the wall time on processors with nothing else to do.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from hypergradient import Cleaning, K, cleaning
from measure import arguments, finish, row
from torch import Tensor, multiprocessing, nn

from odlkit.bilevel import descent, hypergradient
from odlkit.training.distributed import everywhere, gather, joined, mine, over_tasks
from odlkit.training.loop import backward

LARGE, SMALL, TASKS, BATCH, SIDE = (2000, 784, 10), (400, 100, 10), 8, 4, 48


def gradient(
    problem: Cleaning, psi: Tensor, share: Callable = lambda x: x, whole: Callable = lambda loss, value: loss
) -> Tensor:
    """The hypergradient of hyper-cleaning through all steps, this process seeing its share of the samples."""
    parts = {name: share(getattr(problem, name)) for name in ("x", "y", "x_clean", "y_clean")}
    part = replace(problem, **parts)
    step = descent(whole(lambda w, psi: part.lower(w, share(psi)), False), problem.step_size)
    return hypergradient(step, whole(part.upper, True), psi, problem.start(), steps=K).gradient


def works(rank: int, count: int) -> dict[str, Callable[[], object]]:
    """What is timed."""
    large, small = cleaning(*LARGE), cleaning(*SMALL)
    net = nn.Sequential(nn.Conv2d(1, 24, 3, padding=1), nn.Tanh(), nn.Conv2d(24, 24, 3, padding=1), nn.Tanh(),
                        nn.Conv2d(24, 1, 3, padding=1))  # fmt: skip
    streams = [torch.Generator().manual_seed(i) for i in range(2)][rank::count]  # the same batch, by one or by two
    loss = lambda stream: net(torch.randn(BATCH, 1, SIDE, SIDE, generator=stream)).square().mean()  # noqa: E731
    tasks = lambda: over_tasks(lambda i: gradient(small[0], small[1] + 0.1 * i), range(TASKS))  # noqa: E731
    return {
        "hypergradient, data split": lambda: gradient(*large, mine, everywhere),
        f"hypergradients of {TASKS} tasks": tasks,
        "4 training steps": lambda: [backward(net, loss, streams) for _ in range(4)],
    }


def worker(rank: int, count: int, folder: str, rounds: int) -> None:
    """Time each piece of work ``rounds`` times, one call before; the first process keeps the times."""
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {}  # "task, clock" -> seconds
    with joined(600, init_method=f"file://{folder}/{count}", rank=rank, world_size=count):
        for name, work in works(rank, count).items():
            work()
            for _ in range(rounds):
                gather([])
                wall, cpu = time.perf_counter(), time.process_time()
                work()
                busier = max(part[0] for part in gather([time.process_time() - cpu]))
                times.setdefault(f"{name}, wall time", []).append(time.perf_counter() - wall)
                times.setdefault(f"{name}, CPU time of the busier", []).append(busier)
    if rank == 0:
        torch.save(times, Path(folder) / f"{count}.pt")


def main() -> None:
    """Time one process, then two, and compare."""
    args = arguments(__doc__.splitlines()[0], rounds=5)
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 2):
            multiprocessing.spawn(worker, (count, folder, args.rounds), nprocs=count)
        one, two = (torch.load(Path(folder) / f"{count}.pt") for count in (1, 2))
    rows, throughput = [], {}
    for name in one:
        pair = {"one process": one[name], "two processes": two[name]}
        rows += [row(name, program, pair) for program in pair]
        throughput[name] = round(1 / rows[-1]["ratio"], 2)
    finish(rows, args.json, throughput_of_two_over_one=throughput)


if __name__ == "__main__":
    main()
