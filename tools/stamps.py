"""What the outputs of a chapter were made from, file by file, so that a stale chapter is named together with the reason.

A chapter depends on its own code, on the modules of odlkit that this code imports (transitively; imports inside functions
count; so does, where odlkit's command is started, what its tables name as ``module:function``), on the shipped weights if
odlkit.weights is among them, on the files of the book that it names, and on torch. The comments and docstrings of odlkit
change no output and do not count, nor does the chapter's prose.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import re
import tokenize
from collections.abc import Iterable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "odlkit"
COMMAND = {f"{PACKAGE}.__main__", f"{PACKAGE}.cli"}
WEIGHTS = f"{PACKAGE}.weights"  # the one module that reads files beside it which a chapter's outputs depend on


def short(data: str | bytes) -> str:
    """A short hash; line ends do not count."""
    data = data.encode() if isinstance(data, str) else data
    return hashlib.sha256(data.replace(b"\r\n", b"\n")).hexdigest()[:12]


@cache
def bare(code: str) -> str:
    """The code without comments, docstrings and empty lines, as text: the same for every version of Python."""
    lines = code.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            lines[line - 1] = lines[line - 1][:column]
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
            text = node.body[0]
            if lines[text.lineno - 1][: text.col_offset].strip():
                continue  # on the line of its def
            lines[text.lineno - 1 : text.end_lineno] = [""] * (text.end_lineno - text.lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def module_file(name: str) -> Path | None:
    """The file of a module of odlkit, None if there is no such module."""
    path = ROOT.joinpath(*name.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


@cache
def imported(code: str) -> frozenset[str]:
    """The names under odlkit that some line of the code imports, and odlkit's command where it is started."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError("relative imports are not followed; write them out")
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.List | ast.Tuple) and PACKAGE in [getattr(item, "value", None) for item in node.elts]:
            names.add(f"{PACKAGE}.__main__")  # [sys.executable, "-m", "odlkit", ...]
    return frozenset(name for name in names if name.split(".")[0] == PACKAGE)


@cache
def places(code: str) -> frozenset[str]:
    """The modules in the strings ``module:function`` by which the tables of tasks, certificates and so on name theirs."""
    strings = (n.value for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    return frozenset(text.partition(":")[0] for text in strings if re.fullmatch(rf"{PACKAGE}(\.\w+)+:\w+", text))


def modules(code: str) -> dict[str, Path]:
    """Every module of odlkit that the code imports, with its file: directly, through another, or as a parent package.

    The command plays whatever a table names, so its places count.  They do not where a table's module is imported for
    something else: the inequalities of `odlkit.certify` lead to no proposition, nor does one task lead to the others.  But
    whoever loads weights may build any of the networks that `odlkit.weights` names.
    """
    found: dict[str, Path] = {}
    todo = set(imported(code))
    plays = not COMMAND.isdisjoint(todo)
    while todo:
        name = todo.pop()
        file = module_file(name)
        if file is None or name in found:  # an object of a module, or done
            continue
        found[name] = file
        text = file.read_text(encoding="utf-8")
        named = places(text) if plays or name == f"{PACKAGE}.weights" else set()
        todo |= imported(text) | named | ({name.rpartition(".")[0]} - {""})
    return found


def named_files(code: str, folder: Path) -> list[Path]:
    """Records and data of the book that a chapter in this folder names in a string: ``../data/x.csv``.

    Of the records in a folder, ``../results``, those whose name is a string of the code too; all, where none is.
    """
    strings = {n.value for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    paths = [folder / text for text in strings if re.fullmatch(r"\.\./[\w./-]+", text)]
    files = {path for path in paths if path.is_file()}
    for inside in (list(path.glob("*.json")) for path in paths if path.is_dir()):
        files |= {file for file in inside if file.stem in strings} or set(inside)
    return sorted(file.resolve() for file in files)


def code_of(cells: Iterable) -> str:
    """The code cells, one after the other; IPython's own lines (``%``, ``!``) stay as comments."""
    text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "code")
    return re.sub(r"^([%!])", r"# \1", text, flags=re.M)


def stamp(notebook, folder: Path) -> dict[str, str]:
    """File -> short hash, for all that the outputs of this chapter depend on; its own code is ``code``."""
    code = code_of(notebook.cells)
    used = modules(code)
    stamps = {"code": short(code)}
    stamps |= {path.relative_to(ROOT).as_posix(): short(bare(path.read_text(encoding="utf-8"))) for path in used.values()}
    weights = sorted((ROOT / PACKAGE / "weights").glob("*.*")) if WEIGHTS in used else []
    stamps |= {p.relative_to(ROOT).as_posix(): short(p.read_bytes()) for p in [*weights, *named_files(code, folder)]}
    return dict(sorted(stamps.items()))


def changes(stored: Path, notebook) -> list[str]:
    """What changed since the stored notebook was executed: files, ``its code``, ``torch``; empty when it is up to date."""
    if not stored.exists():
        return ["it was never executed"]
    recorded = json.loads(stored.read_text(encoding="utf-8"))["metadata"].get(PACKAGE, {})
    made_from, now = recorded.get("made_from"), stamp(notebook, stored.parent)
    if made_from is None:
        return ["it was stored without a record of what it was made from"]
    names = sorted(name for name in made_from.keys() | now.keys() if made_from.get(name) != now.get(name))
    pin = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    other_torch = ["torch"] if pin and recorded.get("torch") != pin[1] else []
    return ["its code" if name == "code" else name for name in names] + other_torch


def sentence(name: str, changed: list[str]) -> str:
    """The message for a stale chapter: which, why, what to do."""
    shown = ", ".join(changed[:4]) + (f" and {len(changed) - 4} more" if len(changed) > 4 else "")
    why = shown if changed[0].startswith("it was") else f"{shown} changed"
    return f"{name} is stale: {why}; run make execute"
