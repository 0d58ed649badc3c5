"""DGUNet beside the officially released model: forward pass, training step and memory, in one run.

The released model is no dependency: ``--released FOLDER`` names a clone of MC-E/Deep-Generalized-Unfolding-Networks-for-
Image-Restoration.  Its deblurring and denoising models are one class with default widths; the deraining model is the same
class with the widths of its own file.  Random weights; the training step is Charbonnier over all stages, then Adam.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from measure import compare, finish, fresh, rise, row
from torch import Tensor, nn

from odlkit.models.dgunet import DGUNet
from odlkit.training.dgunet import charbonnier

WIDTHS = {  # what the released class is called with
    "derain": {"n_feat": 40, "scale_unetfeats": 20, "scale_orsnetfeats": 16},
    "deblur": {"n_feat": 80, "scale_unetfeats": 48, "scale_orsnetfeats": 32},
}
TIMED = {"derain": (128, 64), "deblur": (64, 32)}  # sides of the picture: forward, training step
HELD = {"derain": (256, 128), "deblur": (96, 128)}  # the same, where memory is measured
PROGRAMS = ("released", "odlkit", "odlkit, checkpointed")


def network(program: str, setting: str, folder: Path) -> nn.Module:
    """The model with random weights."""
    torch.manual_seed(0)
    if program != "released":
        return DGUNet(setting, checkpoint="checkpointed" in program)
    path = folder / "Deblurring" / "DGUNet.py"
    spec = importlib.util.spec_from_file_location("released_dgunet", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SystemExit(f"released: expected a clone of the released code, got {folder}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.DGUNet(**WIDTHS[setting])


def forward(net: nn.Module, side: int) -> Callable[[], object]:
    """One picture without gradients."""
    y = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    net.eval()

    def call() -> list[Tensor]:
        with torch.no_grad():
            return net(y)

    return call


def training(net: nn.Module, side: int) -> Callable[[], object]:
    """One picture, the gradient of all weights, one step of Adam."""
    x, y = torch.rand(2, 1, 3, side, side, generator=torch.Generator().manual_seed(1))
    optimiser = torch.optim.Adam(net.train().parameters(), 1e-6)

    def call() -> None:
        optimiser.zero_grad()
        charbonnier(net(y), x).backward()
        optimiser.step()

    return call


TASKS = {"forward": forward, "training step": training}


def probe(task: str, program: str, setting: str, side: int, folder: Path) -> None:
    """In a fresh process: print the peak of resident memory in MiB above what the model and its optimiser take.

    A call on the smallest picture comes first: it loads what is loaded once, and makes gradients and Adam's moments.
    """
    net = network(program, setting, folder)
    TASKS[task](net, 16)()
    call = TASKS[task](net, side)
    print(rise(call))


def rows_of(setting: str, folder: Path, rounds: int) -> list[dict]:
    """Times and memory of one setting."""
    rows = []
    for task, side, held in zip(TASKS, TIMED[setting], HELD[setting], strict=True):
        names = PROGRAMS[:2] if task == "forward" else PROGRAMS
        nets = {name: network(name, setting, folder) for name in names}
        times = compare({name: TASKS[task](net, side) for name, net in nets.items()}, rounds)
        for name, net in nets.items():
            line = row(f"{setting}, {task}", name, times, bar=1.0 if name == "odlkit" else None)
            line |= {"parameters": sum(p.numel() for p in net.parameters()), "side": side, "side_memory": held}
            line["MiB"] = fresh(__file__, "--probe", task, name, setting, str(held), str(folder.resolve()))
            rows.append(line)
            print(line, flush=True)
    return rows


def verdicts(rows: list[dict]) -> list[dict]:
    """What the rows say of the bars."""
    claims = []
    for name in dict.fromkeys(r["task"] for r in rows):
        mine = {r["program"]: r for r in rows if r["task"] == name}
        ours, held = mine["odlkit"], mine["released"]["MiB"]
        claims += [(f"{name}: time over the released model's", ours["ratio"], 1.0)]
        claims += [(f"{name}: memory over the released model's", ours["MiB"] / held, 1.0)]
        if "odlkit, checkpointed" in mine:
            claims += [(f"{name}: memory checkpointed over stored", mine["odlkit, checkpointed"]["MiB"] / ours["MiB"], 0.5)]
    return [{"claim": claim, "value": value, "bar": bar, "met": value <= bar} for claim, value, bar in claims]


def main() -> None:
    """Both settings, or those that are named."""
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--probe"]:
        task, program, setting, side, folder = sys.argv[2:]
        return probe(task, program, setting, int(side), Path(folder))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--released", type=Path, required=True, metavar="FOLDER", help="a clone of the released code")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--settings", nargs="+", choices=list(WIDTHS), default=list(WIDTHS))
    options = parser.parse_args()
    rows = [line for setting in options.settings for line in rows_of(setting, options.released, options.rounds)]
    finish(rows, options.json, claims=verdicts(rows))


if __name__ == "__main__":
    main()
