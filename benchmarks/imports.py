"""What `import odlkit` costs over `import torch`: fresh processes in turn."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from statistics import median

from measure import arguments, finish, orders, row

ALL = "control, linear, metrics, models.padnet, networks, operators, priors, propagate, solvers, tasks.deblur, weights"
PROGRAMS = {
    "import torch": "torch",
    "import odlkit": "odlkit",  # loads nothing by itself
    "all its modules": ", ".join(f"odlkit.{name}" for name in ALL.split(", ")),
}


def seconds(modules: str) -> tuple[float, float]:
    """(CPU, wall) seconds of a new interpreter that imports ``modules``, its own start included."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {modules}"], check=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, wall


def main() -> None:
    """CPU time decides; wall time stands beside it."""
    options = arguments(__doc__, rounds=15)
    cpu: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    wall: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for name in PROGRAMS:  # the first import reads the disk
        seconds(PROGRAMS[name])
    for order in orders(list(PROGRAMS), options.rounds):
        for name in order:
            spent = seconds(PROGRAMS[name])
            cpu[name].append(spent[0])
            wall[name].append(spent[1])
    rows = [
        row(f"import, {kind} time", name, times, bar=1.1 if name != "import torch" and kind == "CPU" else None)
        for kind, times in (("CPU", cpu), ("wall", wall))
        for name in PROGRAMS
    ]
    finish(rows, options.json, median_cpu_seconds={name: round(median(t), 3) for name, t in cpu.items()})


if __name__ == "__main__":
    main()
