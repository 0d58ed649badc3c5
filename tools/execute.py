"""Run the chapters and store their outputs: ``book/**/name.md`` -> ``book/**/name.ipynb``, never the other way.

The text is the source; the notebook beside it is made here and only here, and comes out byte for byte the same when
nothing changed: cell ids are numbers, and there are no times, no random widget names and no patch versions in it. Each
notebook carries a stamp, a hash of its text and of odlkit; a chapter is run when its stamp is stale. How long each chapter
took goes to ``book/runtimes.json``.

    python tools/execute.py [--all] [-j 2] [chapter.md ...]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
RUNTIMES = BOOK / "runtimes.json"
TIMEOUT = 300  # seconds a cell; the aim is 90 for a whole chapter


def chapters() -> list[Path]:
    """The sources of executed pages: Markdown files under book/ with a jupytext header."""
    header = re.compile(r"---\n(?:(?!---).*\n)*?jupytext:")
    return sorted(path for path in BOOK.rglob("*.md") if header.match(path.read_text(encoding="utf-8")))


@cache
def library_hash() -> str:
    """What a chapter's outputs depend on besides its text: odlkit's code and weights."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "odlkit").rglob("*.py"), *(ROOT / "odlkit" / "weights").glob("*.*")]):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()


def stamp(source: Path) -> str:
    """The state of a chapter's text and of the library, as one short hash."""
    text = source.read_bytes().replace(b"\r\n", b"\n")
    return hashlib.sha256(text + library_hash().encode()).hexdigest()[:16]


def is_stale(source: Path) -> bool:
    """Whether the stored notebook is missing or was made from another text or another library."""
    stored = source.with_suffix(".ipynb")
    if not stored.exists():
        return True
    return json.loads(stored.read_text(encoding="utf-8"))["metadata"].get("odlkit", {}).get("stamp") != stamp(source)


def read(source: Path):
    """The chapter as an unexecuted notebook with numbered cells."""
    import jupytext

    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"c{number:03d}"
    return notebook


def execute(source: Path) -> float:
    """Run one chapter in its own folder, write the notebook beside it, return the seconds it took."""
    import nbformat
    from nbclient import NotebookClient

    notebook, begun, mark = read(source), time.perf_counter(), stamp(source)
    # No data folder: a chapter runs on what ships with the packages, so that every reader gets the same outputs.
    env = {k: v for k, v in os.environ.items() if k != "ODLKIT_DATA"} | {"OMP_NUM_THREADS": "1"}
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
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stderr":
                raise RuntimeError(f"a cell wrote to standard error: {output.text.strip().splitlines()[-1]}")
    notebook.metadata["odlkit"] = {"stamp": mark, "torch": _torch_version()}
    text = nbformat.writes(_numbered_widgets(_plain(notebook)))
    source.with_suffix(".ipynb").write_text(text + "\n", encoding="utf-8", newline="\n")
    return time.perf_counter() - begun


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
    sources = [path.resolve() for path in args.sources] or [p for p in chapters() if args.all or is_stale(p)]
    print(f"{len(sources)} of {len(chapters())} chapters to run")
    seconds = json.loads(RUNTIMES.read_text()) if RUNTIMES.exists() else {}
    failed = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        pending = {pool.submit(execute, source): source.relative_to(BOOK) for source in sources}
        for done, future in enumerate(as_completed(pending), start=1):
            name = pending[future].with_suffix("").as_posix()
            try:
                seconds[name] = round(future.result(), 1)
                print(f"[{done}/{len(sources)}] {name}: {seconds[name]} s", flush=True)
            except Exception as error:  # one bad chapter must not hide the others
                failed += 1
                message = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
                print(f"[{done}/{len(sources)}] {name} FAILED\n{message}", file=sys.stderr, flush=True)
    known = {path.relative_to(BOOK).with_suffix("").as_posix() for path in chapters()}
    if sources:
        RUNTIMES.write_text(json.dumps({k: v for k, v in sorted(seconds.items()) if k in known}, indent=1) + "\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
