"""Write the pages that are made from data, and the notation boxes of the chapters: same data, same bytes.

errata, notation, glossary   from ``book/data/*.yml``
certificates                 from ``book/results/certificates.json``, the recorded output of ``odlkit certify``
equations                    from the ``Eq:`` lines of the docstrings and ``book/data/equations.yml``
data-cards                   from ``odlkit/registry.json``
results                      from the other records in ``book/results/`` (`results_page`)

    python tools/pages.py [--record]       --record runs ``odlkit certify`` and stores what it says

A chapter asks for a notation box with ``<!-- notation-box PADNet: energy, nu, tau -->``, a blank line and
``<!-- /notation-box -->``: what stands between the two is written here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import results_page
import yaml
from equation_map import PAPERS, Mark, faults, in_code, in_tests

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
DATA = BOOK / "data"
RECORD = BOOK / "results" / "certificates.json"
BOX = re.compile(r"<!-- notation-box (\w+): (.*?) -->\n.*?<!-- /notation-box -->", re.S)


def load(name: str) -> Any:
    """One of the files in ``book/data``."""
    return yaml.safe_load((DATA / f"{name}.yml").read_text(encoding="utf-8"))


def list_table(header: list[str], rows: Iterable[list[str]], widths: str = "") -> str:
    """A table whose cells may hold any inline Markdown."""
    lines = [":::{list-table}", ":header-rows: 1", *([f":widths: {widths}"] if widths else []), ""]
    for row in (header, *rows):
        cells = [cell or "–" for cell in row]
        lines += [f"* - {cells[0]}", *(f"  - {cell}" for cell in cells[1:])]
    return "\n".join([*lines, ":::"])


def code(name: str) -> str:
    """A long name as code that a narrow column may break at its underscores, without changing what is copied."""
    return f"<code>{name.replace('_', '_<wbr>')}</code>"


def fields(named: dict[str, str]) -> str:
    """A list with a bold name before each entry."""
    return "\n".join(f"- **{name}:** {text}" for name, text in named.items())


def dropdown(title: str, text: str) -> str:
    """A block that opens on a click; it may hold directives with three colons."""
    return f"::::{{dropdown}} {title}\n{text}\n::::"


def page(*parts: str) -> str:
    """The parts with a blank line between them."""
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


# -- errata ---------------------------------------------------------------------------------------------------------------


def evidence(entry: dict) -> str:
    """What an erratum rests on: its status, its note, its tests grouped by file, its exercises as links."""
    files: dict[str, list[str]] = {}
    for place in entry.get("evidence", []):
        file, name = place.split("::")
        files.setdefault(file, []).append(name)
    tests = [f"{code(file)}: " + ", ".join(map(code, names)) for file, names in files.items() if file.endswith(".py")]
    links = [f"{{ref}}`{name}`" for file, names in files.items() if file.endswith(".md") for name in names]
    return "; ".join([entry["status"], *([entry["note"]] if entry.get("note") else []), *links, *tests])


def errata() -> str:
    """``book/errata.md``."""
    entries, register = load("errata"), load("equations")
    sections = []
    for paper in dict.fromkeys(entry["paper"] for entry in entries):
        sections += [f"## {paper}", f"{{cite:t}}`{register[paper]['cite']}`; {register[paper]['reading']}"]
        for entry in (entry for entry in entries if entry["paper"] == paper):
            lines = {"Printed": entry["printed"], "Should read": entry["should_read"], "Evidence": evidence(entry)}
            label = re.sub(r"\W+", "-", f"erratum {paper} {entry['place']}".lower()).strip("-")
            sections.append(f"({label})=\n### {entry['place']}\n\n" + fields(lines))
    return page(
        "# Errata",
        "Places in the papers where what is printed differs from what can be proved or run, what it should read, and the "
        "evidence: the test that fails if we are wrong. A test can refute a statement; that the corrected one is true is "
        "proved on the page that is named, or noted below. *By inspection* means that two lines of algebra, or the "
        "paper's own text, decide it.",
        *sections,
    )


# -- notation -------------------------------------------------------------------------------------------------------------


def notation() -> str:
    """``book/notation.md``."""
    entries = load("notation")
    house = [
        [
            e["symbol"],
            f"`{e['code'].split(' (')[0]}`" + e["code"][len(e["code"].split(" (")[0]) :] if e["code"] else "",
            e["meaning"],
            e["range"] or "",
        ]
        for e in entries
    ]
    papers = [[e["symbol"], *(e.get(paper, "") for paper in (*PAPERS, "literature"))] for e in entries]
    cited = ", ".join(f"{{cite:t}}`{paper.lower()}`" for paper in PAPERS)
    return page(
        "# Notation",
        "The five papers use the same letters for different things: $\\gamma$ is a step, an inverse step and a growth "
        "factor, and $\\rho$ a penalty, a step and a constant of convexity. The book has one notation, and each chapter "
        "begins with a box that translates. Both come from one file. A dash: no such thing, or no letter for it that "
        "this edition needs.",
        "## The house",
        "What a symbol means, its name in the code, and its values. `(B, C, H, W)` is a batch of images.",
        list_table(["Symbol", "In odlkit", "Meaning", "Values"], house, "18 20 38 24"),
        "## The papers",
        f"The same things in {cited}, and elsewhere.",
        list_table(["Here", *PAPERS, "Also written"], papers),
    )


def box(paper: str, keys: str, where: str = "") -> str:
    """The translation table of a chapter; ``paper`` may be ``literature``.  Raises ``ValueError`` for an unknown key."""
    known = {entry["key"]: entry for entry in load("notation")}
    rows = []
    for key in (key.strip() for key in keys.split(",")):
        if paper not in (*PAPERS, "literature") or not known.get(key, {}).get(paper):
            raise ValueError(
                f"{where}: the notation box asks for {key!r} of {paper}, which book/data/notation.yml does not have: "
                "correct the comment, or add the symbol there"
            )
        rows.append(f"| {known[key]['symbol']} | {known[key][paper]} | {known[key]['meaning']} |")
    place, column = ("literature", "also written") if paper == "literature" else ("paper", paper)
    return "\n".join(
        [
            f":::{{admonition}} In the {place} this is written…",
            ":class: note",
            "",
            f"| here | {column} | meaning |",
            "| --- | --- | --- |",
            *rows,
            "",
            "All symbols: {doc}`/book/notation`.",
            ":::",
        ]
    )


def with_boxes(text: str, where: str = "") -> str:
    """A chapter with its notation boxes written anew."""

    def write(match: re.Match) -> str:
        return f"<!-- notation-box {match[1]}: {match[2]} -->\n\n{box(match[1], match[2], where)}\n\n<!-- /notation-box -->"

    return BOX.sub(write, text)


# -- glossary -------------------------------------------------------------------------------------------------------------


def glossary() -> str:
    """``book/glossary.md``."""
    entries = sorted(load("glossary"), key=lambda entry: entry["term"].lower())
    lines = [f"{entry['term']}\n  {entry['means']} Introduced in {{doc}}`{entry['at']}`.\n" for entry in entries]
    return page(
        "# Glossary",
        "The book's terms in plain language, and the page where each is introduced or first used in earnest.",
        "```{glossary}\n" + "\n".join(lines).rstrip("\n") + "\n```",
    )


# -- certificates ---------------------------------------------------------------------------------------------------------


def short(value: Any) -> str:
    """A number of a record: counts as they are, round-off and margins in two digits."""
    if value is None:
        return "–"
    if isinstance(value, (bool, int, str)):
        return results_page.cell(value)
    if isinstance(value, list):
        return " and ".join(map(short, value))
    if value == 0 or 0.01 <= abs(value) < 1e4:
        return f"{value:.3g}"
    digits, power = f"{value:.1e}".split("e")
    return f"${digits}\\cdot10^{{{int(power)}}}$"


def percent(value: float | None) -> str:
    """A share, or a dash where nothing is judged."""
    return "–" if value is None else f"{100 * value:.0f}%"


def greek(text: str) -> str:
    """Spelled Greek letters of a record, as maths."""
    text = re.sub(r"\b(rho)_k\^\(([^)]*)\)", r"$\\\1_k^{\2}$", text)
    return re.sub(r"\b(alpha|mu|nu|rho|tau)\b", r"$\\\1$", text)


def worst_of(entry: dict, check: str) -> float:
    """The least margin of one inequality over the main runs (over those driven to the end, if it is only checked there)."""
    for runs in (entry["details"], entry["to_the_end"]):
        margins = [c["margin"] for run in runs for c in run["checks"] if c["name"] == check]
        if margins:
            return min(margins)
    raise ValueError(f"{entry['name']}: no run was checked for {check!r}: correct book/data/certificates.yml")


def proposition(entry: dict, words: dict) -> str:
    """One proposition: what it says, the inequalities with their worst margins, the controls, and every run."""
    main = {c["name"] for run in entry["details"] for c in run["checks"]}
    last = {name: "" if name in main else " of the runs driven until nothing moves" for name in words["checks"]}
    sums = [
        f"**{name[0].upper() + name[1:]}**, worst margin {short(worst_of(entry, name))}{last[name]}\n\n$$\n{tex}\n$$"
        for name, tex in words["checks"].items()
    ]
    rows = []
    for control in entry["controls"]:
        seen = [
            f"{key.replace('_', ' ')} {short(value)}" for key, value in control.items() if key not in ("what", "violates")
        ]
        what = greek(control["what"])
        what = what[0].upper() + what[1:]
        rows.append([what, ("fails, as it must" if control["violates"] else "**does not fail**") + "; " + ", ".join(seen)])
    runs = [
        [
            run["instance"],
            run["network"],
            "yes" if run["holds"] else "**no**",
            short(run["margin"]),
            str(run["iterations"]),
            percent(run["acceptance_rate"]),
        ]
        for run in (*entry["details"], *entry["to_the_end"])
    ]
    header = ["Instance", "Network", "Holds", "Margin", "Iterations", "Network kept"]
    verdict = "holds on every run" if entry["holds"] else "**fails on some run**"
    kept = (
        f"; the network's move was kept in {percent(entry['acceptance_rate'])} of the steps"
        if entry["acceptance_rate"]
        else ""
    )
    return page(
        f"(certificate-{entry['name']})=\n## {words['title']}",
        f"{words['says']} Statement and proof: {{prf:ref}}`{words['statement']}`. {words.get('printed', '')}".rstrip(),
        f"On {entry['instances']} instances and {len({run['network'] for run in entry['details']})} networks it {verdict}, "
        f"worst margin {short(entry['margin'])}{kept}.",
        *sums,
        "**Controls.** One hypothesis is dropped; the inequality, or the conclusion, must be seen to fail.",
        list_table(["What is dropped", "What is seen"], rows, "60 40"),
        dropdown("Every run", list_table(header, runs)),
    )


def certificates() -> str:
    """``book/certificates.md``."""
    record, words = json.loads(RECORD.read_text(encoding="utf-8")), load("certificates")
    entries = record["certificates"]
    rows = [
        [
            f"[{words[e['name']]['title']}](certificate-{e['name']})",
            "yes" if e["holds"] else "**no**",
            short(e["margin"]),
            str(e["instances"]),
            percent(e["acceptance_rate"]),
            f"{sum(c['violates'] for c in e['controls'])} of {len(e['controls'])} fail",
            f"{{doc}}`{words[e['name']]['chapter']}`",
        ]
        for e in entries
    ]
    header = ["Proposition", "Holds", "Worst margin", "Instances", "Network kept", "Controls", "Chapter"]
    origin = {
        "command": f"`{record['command']}`",
        "commit": f"`{record['commit']}`",
        "versions": results_page.cell(record["versions"]),
        "hardware": record["hardware"],
        "threads": record["threads"],
        "precision": ", ".join(sorted({e["dtype"] for e in entries})),
        "seconds": round(sum(e["seconds"] for e in entries), 1),
    }
    made = "\n".join(f"{key}\n: {value}\n" for key, value in origin.items())
    return page(
        "# Certificates",
        "Each proposition as inequalities, evaluated at every step of recorded runs in double precision. The **margin** "
        "is the room left at the worst step, relative to the size of what is compared: negative means violated, 0 "
        "attained, and a few units of round-off above 0 is what an equality leaves. **Network kept** is the share of "
        "steps in which the control kept the network's move; a dash means that nothing is judged. A control that fails to "
        "fail would make `odlkit certify` fail. *Checked on these instances* is all that is claimed: "
        "{doc}`foundations/what-a-certificate-is`.",
        list_table(header, rows),
        *(proposition(entry, words[entry["name"]]) for entry in entries),
        "## How this was made",
        made + "\nThe whole record: {download}`results/certificates.json`",
    )


def record_certificates() -> None:
    """Run ``odlkit certify`` and store its output with where it comes from."""
    from odlkit.tasks.report import versions
    from odlkit.training.loop import commit, hardware

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "certificates.json"
        subprocess.run([sys.executable, "-m", "odlkit", "certify", "--json", str(target)], check=True, cwd=ROOT)
        entries = json.loads(target.read_text(encoding="utf-8"))
    import torch

    record = {
        "command": "odlkit certify --json FILE",
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "certificates": _rounded(entries),
    }
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


# -- equations ------------------------------------------------------------------------------------------------------------


def source(mark: Mark) -> str:
    """A name with a link to its reference, and its file with a link to the line in the listing of the built book."""
    module = mark.place.removesuffix(".py").removesuffix("/__init__")
    name = mark.name.removeprefix(module.replace("/", ".")).lstrip(".")
    listing = f'<a href="../_modules/{module}.html#{name}">{mark.place.removeprefix("odlkit/")}</a>'
    return f"{{py:obj}}`{name} <{mark.name}>` in {listing}"


def equations() -> str:
    """``book/equations.md``.  Raises ``ValueError`` with every fault of the map."""
    register, marks, tests = load("equations"), in_code(ROOT), in_tests(ROOT)
    wrong = faults(register, marks, tests)
    if wrong:
        raise ValueError("the map of equations:\n" + "\n".join(wrong))
    sections = []
    for paper, part in register.items():
        rows = []
        for entry in part["items"]:
            key = f"{paper} {entry['item']}"
            where = "<br>".join(source(mark) for mark in marks if mark.key == key) or f"*none:* {entry['reason']}"
            covered = "<br>".join(code(mark.name) for mark in tests if mark.key == key)
            rows.append([entry["item"], f"{entry['what']} ({entry['place']})", where, covered])
        extent = "Everything that the paper numbers" if part["complete"] else "Only what this edition uses"
        sections += [
            f"## {paper}",
            f"{extent}: {{cite:t}}`{part['cite']}`, {part['note']}.",
            list_table(["Item", "What it is", "Function", "Tests"], rows, "10 28 34 28"),
        ]
    names: dict[str, list[Mark]] = {}
    for mark in sorted(marks, key=lambda mark: mark.place):
        names.setdefault(mark.name, []).append(mark)
    back = [[source(found[0]), _by_paper(found)] for found in names.values()]
    return page(
        "# Equation map",
        "From an equation to the function that computes it, to its lines, to the tests that would fail if it were wrong; "
        "and back. The page is read off the docstrings, where a line `Eq: PADNet (7)` names what a function implements or "
        "a test covers; an equation in the list with neither a function nor a reason fails a test, and so does a name "
        "that is not in the list. What is *not* implemented is listed with the reason.",
        *sections,
        "## From functions to equations",
        list_table(["Function", "Implements"], back, "60 40"),
    )


def _by_paper(marks: list[Mark]) -> str:
    papers = dict.fromkeys(mark.paper for mark in marks)
    return "; ".join(f"{paper} " + ", ".join(mark.item for mark in marks if mark.paper == paper) for paper in papers)


# -- data cards -----------------------------------------------------------------------------------------------------------


def data_cards() -> str:
    """``book/data-cards.md``."""
    registry = json.loads((ROOT / "odlkit" / "registry.json").read_text(encoding="utf-8"))
    cards = load("data-cards")
    samples = [[f"`{name}`", card["what"], card["terms"]] for name, card in cards.pop("samples").items()]

    def home(entry: dict) -> str:
        return f"<{entry['url']}>" if entry["url"] else "no page of its own"

    sections = []
    for name in sorted(cards):
        entry = registry[name]
        digest = hashlib.sha256("\n".join(sorted(entry["files"].values())).encode()).hexdigest()
        cautions = " ".join(text for text in (entry.get("notes", ""), cards[name].get("cautions", "")) if text).replace(
            "*_", r"\*_"
        )
        card = {
            "what": f"{entry['task']}; {len(entry['files'])} files, {entry['size']}",
            "from": entry["paper"],
            "terms": entry["terms"],
            "home": home(entry),
            "used for": cards[name]["use"],
            "cautions": cautions or "none known",
            "checksum": f"`{digest[:16]}…`, of all files",
        }
        sections.append(f"### {name}\n\n" + fields(card))
    rest = [
        [
            f"`{name}`",
            f"{entry['task']}; {len(entry['files'])} files, {entry['size']}",
            entry["terms"],
            f"[home]({entry['url']})" if entry["url"] else "no page of its own",
            entry.get("notes", "").replace("*_", r"\*_"),
        ]
        for name, entry in sorted(registry.items())
        if name not in cards
    ]
    return page(
        "# Data cards",
        "Chapters run on photographs that ship inside scikit-image. Benchmarks and training use public sets that are "
        "**not** part of this project: `ODLKIT_DATA` names the folder that holds them, `odlkit data fetch NAME` says "
        "where one comes from, `odlkit data check` compares every file with its SHA-256. The terms are those of their "
        "owners, as far as they are stated; where none are stated we say so, and you should ask before you pass a set on.",
        "## Pictures in the chapters",
        "Loaded by `odlkit.data.sample`, cropped to a square and scaled to $[0,1]$.",
        list_table(["Name", "What", "Terms"], samples),
        "## Sets that this edition uses",
        *sections,
        "## Sets that are registered for later",
        "The registry knows these, so that `odlkit data check` can verify them; nothing in this edition reads them.",
        list_table(["Name", "What and how many", "Terms", "Home", "Cautions"], rest, "14 28 18 8 32"),
    )


PAGES: dict[str, Callable[[], str]] = {
    "errata": errata,
    "notation": notation,
    "glossary": glossary,
    "certificates": certificates,
    "equations": equations,
    "data-cards": data_cards,
    "results": lambda: results_page.page(results_page.records()),
}


def chapters() -> list[Path]:
    """The pages that may ask for a notation box: all that are not written here."""
    made = {BOOK / f"{name}.md" for name in PAGES}
    return [path for path in sorted(BOOK.rglob("*.md")) if path not in made and ".ipynb_checkpoints" not in path.parts]


def main() -> int:
    """Write every page and box that changed, and say which."""
    parser = argparse.ArgumentParser(description="Write the pages that are made from data.")
    parser.add_argument("--record", action="store_true", help="run odlkit certify first and store what it says")
    if parser.parse_args().record:
        record_certificates()
    wanted = {BOOK / f"{name}.md": make() for name, make in PAGES.items()}
    wanted |= {path: with_boxes(path.read_text(encoding="utf-8"), path.name) for path in chapters()}
    for path, text in wanted.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8", newline="\n")
            print("written:", path.relative_to(ROOT).as_posix())
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"pages: {error}")
