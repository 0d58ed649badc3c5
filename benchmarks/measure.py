"""Compare programs inside one process: rotating, reversing order, process CPU time, ratios round by round."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from odlkit.training.loop import commit, hardware

Program = Callable[[], object]


def orders(names: list[str], rounds: int) -> list[list[str]]:
    """The order of each round: rotated by one place, every other round reversed, so that no program keeps a place."""
    turned = [names[r // 2 % len(names) :] + names[: r // 2 % len(names)] for r in range(rounds)]
    return [order[::-1] if r % 2 else order for r, order in enumerate(turned)]


def compare(programs: dict[str, Program], rounds: int, repeats: int = 1) -> dict[str, list[float]]:
    """Seconds of ``repeats`` calls of each program in each round; one call of each goes before, untimed.

    CPU time; with a GPU wall time, since there the processor only waits.
    """
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    times: dict[str, list[float]] = {name: [] for name in programs}
    for program in programs.values():
        program()
    for order in orders(list(programs), rounds):
        for name in order:
            start = clock()
            for _ in range(repeats):
                programs[name]()
            times[name].append((clock() - start) / repeats)
    return times


def resident(key: str) -> float:
    """MiB of this process: ``VmRSS`` now, ``VmHWM`` at the peak."""
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) / 1024


def rise(call: Program) -> float:
    """MiB by which a call raises the peak of resident memory."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    call()
    return resident("VmHWM") - before


def fresh(*arguments: str) -> float:
    """The last number that a fresh Python prints; there freed blocks of 64 KiB and more go back to the system at once."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    call = [sys.executable, "-W", "ignore", *arguments]
    run = subprocess.run(call, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return float(run.stdout.split()[-1])


def row(task: str, program: str, times: dict[str, list[float]], calls: int = 1, bar: float | None = None) -> dict:
    """One line of a table: median ms a call, median over rounds of (program / floor), and the quartiles of that ratio."""
    floor = times[next(iter(times))]
    ratios = sorted(mine / base for mine, base in zip(times[program], floor, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "task": task,
        "program": program,
        "milliseconds": round(1e3 * statistics.median(times[program]) / calls, 4),
        "ratio": round(middle, 3),
        "quartiles": [round(low, 3), round(high, 3)],
        "range": [round(ratios[0], 3), round(ratios[-1], 3)],
        "rounds": len(ratios),
        "bar": bar,
    }


def markdown(rows: list[dict]) -> str:
    """The rows as a table, with a column for each further measurement that some row has."""
    more = [key for key in ("MiB", "error", "to exact") if any(key in r for r in rows)]
    titles = ["task", "program", "ms", "ratio to floor", "middle half", "bar", *more]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for r in rows:
        bar = f"{r['bar']:g}" if r["bar"] else ""
        low, high = r["quartiles"]
        cells = [r["task"], r["program"], f"{r['milliseconds']:.3g}", f"{r['ratio']:.2f}", f"{low:.2f} to {high:.2f}", bar]
        cells += [f"{r[key]:.2g}" if r.get(key) is not None else "" for key in more]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def arguments(description: str, **extra: int) -> argparse.Namespace:
    """``--json FILE`` and whole-number options with their defaults; one torch thread."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    for name, default in extra.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    torch.set_num_threads(1)
    return parser.parse_args()


def finish(rows: list[dict], path: Path | None, **notes: object) -> None:
    """Print the table; write the record with its provenance if a file was asked for."""
    print(markdown(rows))
    if path is None:
        return
    record = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "hardware": hardware(),
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        **notes,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
