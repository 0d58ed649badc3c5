"""Run the chapters and store their outputs: ``book/**/name.md`` -> ``book/**/name.ipynb``, never the other way.

The text is the source; the notebook beside it is made here and only here, and comes out byte for byte the same when
nothing changed: cell ids are numbers, and there are no times, no random widget names and no patch versions in it. Each
notebook records what its outputs were made from (`stamps`); a chapter is run when one of these changed, and only written
again, with its outputs, when nothing but its prose did. How a run went (seconds, cores, device, day, version, certificates)
goes to ``book/runtimes.json``, from which `odlbook` draws the badges under the title.

    python tools/execute.py [--all] [-j 2] [chapter.md ...]
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import date
from pathlib import Path

from stamps import ROOT, changes, short, stamp

BOOK = ROOT / "book"
RUNTIMES = BOOK / "runtimes.json"
TIMEOUT = 300  # seconds a cell; the aim is 60 for a whole chapter
# Run last in the kernel and not stored. The time of the processor, because it does not depend on what else the machine did.
MEASURE = """import json, os, sys
torch = sys.modules.get("torch")
print(json.dumps({"cpu_seconds": round(sum(os.times()[:4]), 1), "cores": os.cpu_count(),
                  "device": "GPU" if torch and torch.cuda.is_initialized() else "CPU"}))"""


def chapters() -> list[Path]:
    """The sources of executed pages: Markdown files under book/ with a jupytext header."""
    header = re.compile(r"---\n(?:(?!---).*\n)*?jupytext:")
    return sorted(path for path in BOOK.rglob("*.md") if header.match(path.read_text(encoding="utf-8")))


def name_of(source: Path) -> str:
    """A chapter's name: part and file, ``padnet/theorems``."""
    return source.relative_to(BOOK).with_suffix("").as_posix()


def changed(source: Path) -> list[str]:
    """What changed since the chapter was executed; empty when its stored outputs are those it would have now."""
    return changes(source.with_suffix(".ipynb"), read(source))


def read(source: Path):
    """The chapter as an unexecuted notebook with numbered cells."""
    import jupytext

    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"c{number:03d}"
    return notebook


def execute(source: Path) -> dict:
    """Run one chapter in its own folder, write the notebook beside it, return the record of the run."""
    import nbformat
    from nbclient import NotebookClient

    notebook, begun = read(source), time.perf_counter()
    made_from = stamp(notebook, source.parent)
    # No data folder: a chapter runs on what ships with the packages, so that every reader gets the same outputs.
    env = {k: v for k, v in os.environ.items() if k != "ODLKIT_DATA"} | {"OMP_NUM_THREADS": "1"}
    notebook.cells.append(nbformat.v4.new_code_cell(MEASURE))
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": source.parent}},
        record_timing=False,
        coalesce_streams=True,  # prints that come in two pieces are one output
        extra_arguments=["--log-level=ERROR"],
    )
    client.execute(env=env)
    seconds = time.perf_counter() - begun
    measured = json.loads(notebook.cells.pop().outputs[0].text)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stderr":
                raise RuntimeError(f"a cell wrote to standard error: {output.text.strip().splitlines()[-1]}")
    notebook = _numbered_widgets(notebook)
    about = {"made_from": made_from, "outputs": outputs_hash(notebook), "torch": _torch_version()}
    notebook.metadata["odlkit"] = about
    _write(source, notebook)
    return record(notebook) | {"seconds": round(seconds, 1)} | measured


def rewrite(source: Path) -> bool:
    """Write the prose, titles and tags of a chapter whose outputs are up to date; whether that changed the notebook."""
    import nbformat

    old, notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4), read(source)
    outputs = iter([cell for cell in old.cells if cell.cell_type == "code"])
    for cell in notebook.cells:
        if cell.cell_type == "code":
            stored = next(outputs)
            cell.update(outputs=stored.outputs, execution_count=stored.execution_count)
    notebook.metadata = old.metadata
    before = source.with_suffix(".ipynb").read_bytes()
    _write(source, notebook)
    return source.with_suffix(".ipynb").read_bytes() != before


def _write(source: Path, notebook) -> None:
    import nbformat

    text = nbformat.writes(_plain(notebook))
    source.with_suffix(".ipynb").write_text(text + "\n", encoding="utf-8", newline="\n")


def outputs_hash(notebook) -> str:
    """A hash of all outputs and widgets, by which an edited one is found."""
    cells = [[cell.outputs, cell.execution_count] for cell in notebook.cells if cell.cell_type == "code"]
    return short(json.dumps([cells, notebook.metadata.get("widgets", {})], sort_keys=True))


def certificates(notebook) -> list[int]:
    """How many cells tagged ``certificate`` asserted and ran, and how many there are."""
    cells = [c for c in notebook.cells if c.cell_type == "code" and "certificate" in c.metadata.get("tags", [])]
    held = [c for c in cells if asserts(c.source) and c.execution_count and all(o.output_type != "error" for o in c.outputs)]
    return [len(held), len(cells)]


def asserts(code: str) -> bool:
    """Whether a cell asserts something, by the statement or by a function such as ``assert_close``."""
    tree = list(ast.walk(ast.parse(code)))
    calls = [node.func for node in tree if isinstance(node, ast.Call)]
    named = any(getattr(f, "attr", getattr(f, "id", "")).startswith("assert") for f in calls)
    return named or any(isinstance(node, ast.Assert) for node in tree)


def record(notebook) -> dict:
    """What the badges say besides what was measured."""
    from odlkit import __version__

    return {"date": date.today().isoformat(), "version": __version__, "certificates": certificates(notebook)}


def note(name: str, about: dict) -> None:
    """Put the record of one run into the file of all; chapters that are no more leave it."""
    known = {name_of(path) for path in chapters()}
    runs = json.loads(RUNTIMES.read_text(encoding="utf-8")) if RUNTIMES.exists() else {}
    runs = {key: value for key, value in sorted((runs | {name: about}).items()) if key in known and isinstance(value, dict)}
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in runs.items()]  # one line a chapter
    new = RUNTIMES.with_suffix(f".{os.getpid()}.tmp")  # another run may be reading
    new.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8", newline="\n")
    new.replace(RUNTIMES)


def _plain(notebook):
    """Without what differs from one machine to the next: the interpreter's patch version, the tool's own version."""
    notebook.metadata.get("language_info", {}).pop("version", None)
    notebook.metadata.get("jupytext", {}).get("text_representation", {}).pop("jupytext_version", None)
    return notebook


def _numbered_widgets(notebook):
    """Replace the random widget ids by numbers in order of creation (writing sorts the keys, so this comes before)."""
    import nbformat

    states = notebook.metadata.get("widgets", {}).values()
    names = [name for state in states for name in state["state"]]
    if not names:
        return notebook
    numbers = {name: f"{number:032d}" for number, name in enumerate(names)}
    text = re.sub("|".join(names), lambda match: numbers[match[0]], json.dumps(notebook))
    return nbformat.from_dict(json.loads(text))


def _torch_version() -> str:
    from importlib.metadata import version

    return version("torch").split("+")[0]


def main() -> int:
    """Execute the stale chapters (or the named, or all), several at once; 1 if any failed."""
    parser = argparse.ArgumentParser(description="Run the chapters and store their outputs.")
    parser.add_argument("sources", nargs="*", type=Path, help="chapters to run; default: the stale ones")
    parser.add_argument("--all", action="store_true", help="run every chapter")
    parser.add_argument("-j", "--jobs", type=int, default=2, help="chapters at the same time")
    args = parser.parse_args()
    named, everything = [path.resolve() for path in args.sources], chapters()
    sources = named or [path for path in everything if args.all or changed(path)]
    for source in set(named or everything) - set(sources):
        if rewrite(source):
            print(f"{name_of(source)}: its prose was written again, its outputs stay")
    print(f"{len(sources)} of {len(everything)} chapters to run")
    failed = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        pending = {pool.submit(execute, source): name_of(source) for source in sources}
        for done, future in enumerate(as_completed(pending), start=1):
            name = pending[future]
            try:
                about = future.result()
                note(name, about)
                print(f"[{done}/{len(sources)}] {name}: {about['seconds']} s, {about['cpu_seconds']} s of CPU", flush=True)
            except Exception as error:  # one bad chapter must not hide the others
                failed += 1
                message = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
                print(f"[{done}/{len(sources)}] {name} FAILED\n{message}", file=sys.stderr, flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
