"""The command line.  It reads files and words, calls the library, and writes files; no algorithm lives here.

Exit 0: done.  Exit 2: bad input, one line on standard error that names the argument.  Exit 3: a run diverged or a
certificate failed, one line.  Output files appear whole or not at all; ``--json -`` alone writes to standard output.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from textwrap import fill
from typing import Any

import click

from odlkit import __version__
from odlkit.bench import SUITES
from odlkit.training import RECIPES


class Commands(click.Group):
    """A group whose bad input ends in one line and exit 2, and whose failed runs end in one line and exit 3."""

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        """Run, with every refusal turned into its line and exit code."""
        try:
            value = super().main(*args, standalone_mode=False, **kwargs)  # type: ignore[call-overload]
            code = value if isinstance(value, int) else 0  # click hands back the code of `ctx.exit`, as after --help
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.ctx.get_help())
            code = 0
        except click.UsageError as error:
            code = _fail(2, _usage(error))
        except (click.ClickException, ValueError, OSError) as error:
            code = _fail(2, error.format_message() if isinstance(error, click.ClickException) else str(error))
        except (Failed, FloatingPointError) as error:
            code = _fail(3, str(error))
        except RuntimeError as error:
            from odlkit.linear import NotConverged  # imported late: --help need not wait for torch
            from odlkit.propagate import PropagationError
            from odlkit.training.distributed import LostProcess

            if not isinstance(error, (PropagationError, NotConverged, LostProcess)):
                raise
            code = _fail(3, str(error))
        except (click.Abort, KeyboardInterrupt):
            code = _fail(130, "interrupted")
        if standalone_mode:
            sys.exit(code)
        return code


class Failed(RuntimeError):
    """A command ran to its end and its answer is no."""


def _fail(code: int, message: str) -> int:
    click.echo("odlkit: " + " ".join(message.split()), err=True)
    return code


def _usage(error: click.UsageError) -> str:
    """Click's message in the house's form, ``argument: what was expected``."""
    if isinstance(error, click.MissingParameter) and error.param is not None:
        return f"{error.param.name}: expected a value, none was given"
    if isinstance(error, click.BadParameter) and error.param is not None:
        return f"{error.param.name}: {error.message}"
    return error.format_message()


def _emit(value: Any, target: str | None, lines: list[str]) -> None:
    """JSON to a file or, for ``-``, to standard output and nothing else there; readable lines otherwise."""
    from odlkit.images import atomic

    text = json.dumps(_finite(value), indent=1) + "\n"
    if target == "-":
        click.echo(text, nl=False)
        return
    for line in lines:
        click.echo(line)
    if target:
        with atomic(target) as handle:
            handle.write(text.encode())


def _finite(value: Any) -> Any:
    """NaN and infinities as null, which JSON has not."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_target(path: str | None, name: str) -> None:
    """Refuse a file that cannot be written before the work is done."""
    if path and path != "-" and (Path(path).is_dir() or not Path(path).resolve().parent.is_dir()):
        raise ValueError(f"{name}: expected a file name in a folder that exists, got {path}")


def _device(name: str):
    from odlkit.training.machine import Machine, best_device, on

    with on(Machine(name)):
        return best_device()


def _listed(title: str, names: Iterable[str]) -> str:
    """The names for the end of a help text, none of them broken."""
    return "\b\n" + fill(f"{title}: {', '.join(names)}", 76, break_on_hyphens=False)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="odlkit")
def main() -> None:
    """Optimization-derived learning for image restoration."""


# What a task may ask for beside the picture, as words for who leaves it out.
OPTIONS = {
    "kernel": "a .npy file or an image",
    "mask": "an image",
    "scale": "a magnification",
    "ratio": "a number in (0, 1]",
    "strength": "a number in (0, 1)",
    "sigma": "a noise level",
    "boundary": "unknown or circular",
    "tile": "a number of pixels",
    "size": "an odd number of pixels",
    "kernel_out": "a file name",
    "second": "an image",
}


def _options(name: str, task: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The options that were given; refuses those that the task does not use, and misses those that it needs."""
    for option, value in given.items():
        if value is not None and option not in task.needs + task.takes:
            raise ValueError(f"{option}: expected no value, the task {name} does not use it")
    for option in task.needs:
        if given[option] is None:
            raise ValueError(f"{option}: expected {OPTIONS[option]}, none was given")
    return {option: value for option, value in given.items() if value is not None}


@main.command()
@click.argument("task")
@click.argument("input")
@click.option("-o", "--output", required=True, help="Where the restored image goes: .png, .jpg, .bmp or .tif.")
@click.option("--model", default=None, help="One of `odlkit models` (default: the task's first).")
@click.option(
    "--kernel",
    default=None,
    help="Convolution kernel, .npy or image, centre at (h // 2, w // 2); dgunet can do without.",
)
@click.option("--sigma", type=float, default=None, help="Noise level for values in [0, 1]; estimated if left out.")
@click.option("--boundary", default=None, help="unknown (photographs, the default) or circular.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of whatever is drawn at random.")
@click.option("--tile", type=int, default=None, help="Restore squares this far apart, one by one, to bound the memory.")
@click.option("--mask", default=None, help="Known pixels (white), for tasks that need it.")
@click.option("--scale", type=int, default=None, help="Magnification, for tasks that need it.")
@click.option("--ratio", type=float, default=None, help="Sampling ratio, for tasks that need it.")
@click.option("--strength", type=float, default=None, help="How much smoothing: the price of an edge pixel.")
@click.option("--size", type=int, default=None, help="Pixels a side of the kernel to be estimated, odd.")
@click.option("--kernel-out", default=None, help="Where an estimated kernel goes: .npy, or a picture to look at.")
@click.option("--second", default=None, help="The frame that follows INPUT, for optical flow.")
@click.option("--report", default=None, help="Where a JSON report of the run goes.")
def restore(task, input, output, model, device, seed, report, **given) -> None:
    """Restore the image INPUT; TASK is one of `odlkit tasks`.

    Examples: odlkit restore deblur photo.png --kernel k.npy --sigma 0.01 -o sharp.png --report report.json

    odlkit restore sr small.png --scale 3 -o large.png

    odlkit restore inpaint holes.png --mask known.png -o whole.png

    odlkit restore deblur-blind shaken.jpg --size 31 -o sharp.png --kernel-out kernel.npy

    odlkit restore flow frame1.png --second frame2.png -o flow.png (or flow.flo)
    """
    from odlkit.tasks import TASKS

    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    options = _options(task, TASKS[task], given)
    _check_target(report, "report")

    import torch

    from odlkit import images

    torch.manual_seed(seed)
    where = _device(device)
    picture = images.read(input)
    as_numbers = task == "flow" and Path(output).suffix.lower() == ".flo"
    images.check_output(Path(output).with_suffix(".png") if as_numbers else output, picture)
    kernel_out = options.pop("kernel_out", None)
    if kernel_out is not None:
        images.check_kernel_output(kernel_out)
    if "kernel" in options:
        options["kernel"] = images.read_kernel(options["kernel"])
    if "mask" in options:
        options["mask"] = images.read(options["mask"], "mask").x.mean(1)[0].to(where)
    if "second" in options:
        options["second"] = images.read(options["second"], "second").x.to(where)
    chosen = {"model": model} if model is not None else {}
    restored, about = TASKS[task].function()(picture.x.to(where), progress=True, **options, **chosen)
    if task == "flow":
        from odlkit import flow

        vectors, restored = restored, flow.colours(restored)
    target = images.Picture(restored) if task == "flow" else images.matching(restored, picture)
    kept = {key: value for key, value in about["input"].items() if key != "shape"}
    about["input"] = {"path": str(input), **picture.describe(), **kept}
    about["output"] = {"path": str(output), **target.describe()}
    about["settings"]["seed"] = seed
    if as_numbers:
        flow.write_flo(output, vectors)
    else:
        images.write(output, restored, target)
    if kernel_out is not None:
        images.write_kernel(kernel_out, torch.tensor(about["kernel"], dtype=torch.float64))
    for note in about["notes"]:
        click.echo(note, err=True)
    held = {True: "holds", False: "fails", None: "no guarantee"}[about["certificate"]["holds"]]
    line = f"{output}: {about['model']}, {about['iterations']} iterations, {about['seconds']:.1f} s, certificate: {held}"
    _emit(about, report, [line])
    if about["certificate"]["holds"] is False:
        raise Failed(f"certificate: not as stated ({about['certificate']['guarantee']}); the image was written all the same")


@main.command()
@click.argument("names", nargs=-1)
@click.option("--json", "target", default=None, help="A file, or - for standard output.")
def certify(names, target) -> None:
    """Check propositions on instances of real images: NAME ... (default: all), each with the control that breaks it."""
    from odlkit import certify as rules

    for name in names:
        if name not in rules.NAMES:
            raise ValueError(f"name: expected propositions among {', '.join(rules.NAMES)}, got {name!r}")
    _check_target(target, "json")
    entries = rules.run(list(names) or None, True)
    _emit(entries, target, [_certificate_line(entry) for entry in entries])
    bad = [entry["name"] for entry in entries if not (entry["holds"] and entry["control"]["violates"])]
    if bad:
        raise Failed(f"certify: not as stated: {', '.join(bad)}")


def _certificate_line(entry: dict) -> str:
    control = entry["control"]
    seen = "violates" if control["violates"] else "does NOT violate"
    return (
        f"{entry['name']}: {'holds' if entry['holds'] else 'FAILS'}, margin {entry['margin']:.2e}, "
        f"{entry['instances']} instances; control ({control['what']}) {seen}"
    )


@main.command(epilog=_listed("Recipes", RECIPES))
@click.argument("recipe")
@click.option("--out", default="runs", show_default=True, help="Folder for checkpoints, weights and card.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in that folder.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--precision", type=click.Choice(["bf16", "float32"]), default="bf16", show_default=True, help="Of networks.")
@click.option("--compile", "backend", is_flag=True, help="Compile the networks with torch.compile; takes a minute first.")
@click.option("--batch", "times", type=int, default=1, show_default=True, help="So many times the recipe's batch.")
@click.option(
    "--memory",
    type=click.Choice(["full", "checkpointed", "rebuilt"]),
    default=None,
    help="How much of the unrolled iteration is kept, for recipes that offer it.",
)
@click.option("--timeout", default=300.0, show_default=True, help="Under torchrun: seconds to wait for another process.")
def train(recipe, out, resume, device, precision, backend, times, memory, timeout) -> None:
    """Train the network RECIPE, named as in `odlkit models`; needs its data in the folder that ODLKIT_DATA names.

    With `torchrun --nproc-per-node N -m odlkit train RECIPE`, N processes train it on N times the batch.
    """
    from inspect import signature

    from odlkit import training
    from odlkit.training import distributed, machine

    make = training.recipe(recipe)
    options = {} if memory is None else {"memory": memory}
    for name in options.keys() - signature(make).parameters.keys():
        raise ValueError(f"{name}: expected no value, the recipe {recipe} does not use it")
    how = machine.Machine(device, precision, "inductor" if backend else None, times)
    with machine.on(how), distributed.joined(timeout):
        make(Path(out), resume, **options)


@main.command(epilog=_listed("Suites", SUITES))
@click.argument("suite")
@click.option("--json", "target", default=None, help="A file, or - for standard output.")
def bench(suite, target) -> None:
    """Measure a paper's table on the data at hand, with provenance."""
    if suite not in SUITES:
        raise ValueError(f"suite: expected one of {', '.join(SUITES)}, got {suite!r}")
    _check_target(target, "json")
    record = SUITES[suite](progress=True)
    _emit(record, target, [json.dumps(_finite(record), indent=1)])


@main.group(cls=click.Group)
def data() -> None:
    """The benchmark data: where they come from, under which terms, and whether they are here unchanged."""


@data.command("list")
def data_list() -> None:
    """Every registered set: here or not, its task, its terms, its address."""
    from odlkit import data as sets

    here = set(sets.available())
    for name, entry in sets.registry().items():
        click.echo(f"{name}: {'here' if name in here else 'not here'}; {entry['task']}; {entry['terms']}; {entry['url']}")


@data.command("fetch")
@click.argument("name")
def data_fetch(name) -> None:
    """Check the set NAME if it is here; say where it comes from if it is not."""
    from odlkit import data as sets

    click.echo(f"{name}: {len(sets.fetch(name))} files, every SHA-256 as registered")


@data.command("check")
@click.argument("names", nargs=-1)
def data_check(names) -> None:
    """Compare every file of the sets that are here (or of NAMES) with its SHA-256."""
    from odlkit import data as sets

    for name in names or sets.available():
        click.echo(f"{name}: {sets.check(name)}")


@main.command()
def tasks() -> None:
    """What `odlkit restore` can do."""
    from odlkit.tasks import TASKS

    _table({name: task.what for name, task in TASKS.items()})


@main.command()
def models() -> None:
    """The models of each task, and the networks that are shipped."""
    from odlkit import weights
    from odlkit.tasks import TASKS

    for name, task in TASKS.items():
        click.echo(name)
        _table({"  " + model: about.what for model, about in task.models().items()})
    click.echo("networks")
    for name, card in weights.cards().items():
        click.echo(f"  {name}  {card['what']}; {card['parameters']:,} parameters; made by: {card['recipe']}")


def _table(rows: dict[str, str], show: Callable[[str], None] = click.echo) -> None:
    width = max(map(len, rows))
    for name, what in rows.items():
        show(f"{name:{width}}  {what}")
