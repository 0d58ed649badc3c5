"""Which function implements which equation of which paper, and which test covers it: read from the docstrings.

A docstring says ``Eq: PADNet (7), Algorithm 1; PODM (5).``: a paper, then its items, up to the end of the sentence.  A test
says so in its docstring, or in its name where its file is named after the paper (``test_eq_12_...`` in ``test_padnet.py``).
What a paper numbers is listed in ``book/data/equations.yml``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PAPERS = ("PADNet", "PODM", "GDC", "DGUNet", "HODL")
KINDS = "Algorithm|Assumption|Condition|Definition|Figure|Lemma|Proposition|Table|Theorem"
TOKEN = re.compile(rf"\b({'|'.join(PAPERS)})\b|(\(\d+\w?\))|\b((?:{KINDS}) \d+(?:\.\d+)?)\b")
IN_NAME = re.compile(rf"(?:^|_)(eq|{KINDS.lower()})_(\d+)(?=_|$)")
REGISTER = "book/data/equations.yml"


class Mark(NamedTuple):
    """One item named by one docstring: ``item`` is ``(7)`` or ``Theorem 1``; ``name`` is dotted, ``place`` a file."""

    paper: str
    item: str
    name: str
    place: str

    @property
    def key(self) -> str:
        return f"{self.paper} {self.item}"


def tags(docstring: str) -> Iterator[tuple[str, str]]:
    """The ``(paper, item)`` pairs of every ``Eq:`` line; an empty string stands for what a line lacks."""
    for start in re.finditer(r"\bEq:\s", docstring):
        paragraph = re.split(r"\n[ \t]*\n", docstring[start.end() :])[0]
        sentence = re.split(r"\.(?=\s|$)", re.sub(r"(`+).*?\1", "", paragraph, flags=re.S))[0]
        paper, found = "", False
        for name, number, kind in TOKEN.findall(" ".join(sentence.split())):
            paper = name or paper
            if number or kind:
                found = True
                yield paper, number or kind
        if not found:
            yield paper, ""


def documented(path: Path) -> Iterator[tuple[str, str]]:
    """Name and docstring of the module (name empty), its functions, its classes and their methods."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield "", ast.get_docstring(tree) or ""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name, ast.get_docstring(node) or ""
        for inner in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(inner, ast.FunctionDef):
                yield f"{node.name}.{inner.name}", ast.get_docstring(inner) or ""


def in_code(root: Path) -> list[Mark]:
    """The marks of the package under ``root``, by file and order."""
    marks = []
    for path in sorted((root / "odlkit").rglob("*.py")):
        place = path.relative_to(root)
        module = ".".join(place.with_suffix("").parts).removesuffix(".__init__")
        for name, text in documented(path):
            marks += [Mark(*tag, f"{module}.{name}" if name else module, place.as_posix()) for tag in tags(text)]
    return list(dict.fromkeys(marks))


def in_tests(root: Path) -> list[Mark]:
    """The marks of the tests: from docstrings, and from names in files named after a paper."""
    marks = []
    for path in sorted((root / "tests").glob("test_*.py")):
        place = path.relative_to(root).as_posix()
        paper = next((p for p in PAPERS if re.match(rf"test_{p.lower()}(_|\.)", path.name)), None)
        for name, text in documented(path):
            if not name.startswith("test_"):
                continue
            found = list(tags(text))
            for kind, number in IN_NAME.findall(name) if paper else ():
                found.append((paper, f"({number})" if kind == "eq" else f"{kind.capitalize()} {number}"))
            marks += [Mark(*tag, name, place) for tag in found]
    return list(dict.fromkeys(marks))


def faults(register: dict, code: list[Mark], tests: list[Mark]) -> list[str]:
    """Everything that keeps the map from being true, each as a sentence that says what to do."""
    known = {f"{paper} {entry['item']}" for paper, part in register.items() for entry in part["items"]}
    found = []
    for mark in [*code, *tests]:
        where = f"{mark.place}: {mark.name or 'the module'}"
        if not mark.paper or not mark.item:
            found.append(f"{where} has an `Eq:` line without {'a paper' if not mark.paper else 'a number'}: write it as "
                         "`Eq: PADNet (7), Algorithm 1.`, or use another word than Eq:")  # fmt: skip
        elif mark.key not in known:
            found.append(f"{where} names {mark.key}, which {REGISTER} does not list: correct the `Eq:` line or the name, "
                         "or add the item to the list")  # fmt: skip
    for mark in code:
        if any(part.startswith("_") for part in mark.name.split(".")):
            found.append(f"{mark.place}: {mark.name} is private and has no page: move its `Eq:` line to a public name")
    implemented, tested = ({mark.key for mark in marks} for marks in (code, tests))
    for paper, part in register.items():
        for entry in part["items"]:
            key, reason = f"{paper} {entry['item']}", entry.get("reason")
            if key not in implemented and not reason:
                found.append(f"{key} is in {REGISTER} and nothing implements it: write `Eq: {key}` into the docstring of "
                             "the function that does, or a `reason` into the list")  # fmt: skip
            if key in implemented and reason:
                found.append(f"{key} has a function and a `reason` why there is none: remove one of them")
            if key in implemented and key not in tested:
                found.append(f"{key} has a function and no test: write `Eq: {key}` into the docstring of the test that "
                             "would fail if the function were wrong")  # fmt: skip
    return found
