"""Write ``book/results.md``, the register of results, from the records ``book/results/*.json``; no figure is typed.

A record is what ``odlkit bench SUITE --json FILE`` writes: a claim, rows, and where they come from. The page is a function
of the records alone: the same records give the same bytes.

    python tools/results_page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORDS, PAGE = ROOT / "book" / "results", ROOT / "book" / "results.md"
PROVENANCE = ("command", "commit", "seeds", "versions", "hardware", "data")  # what every record must carry
INTRO = """# Results

Every table on this page is made from a file that a command wrote; nothing was typed. Each entry says what was measured, what
the paper prints for it where it prints something, and why the two differ. Under *How this was made* are the command that
repeats it, the commit, the seeds, the versions, the machine, and one SHA-256 for each data set and each network (its first
digits; the record holds all). The data are public sets that are not part of this book: `odlkit data list` says where they
come from. `make pages` writes this page.
"""


def records(folder: Path = RECORDS) -> dict[str, dict[str, Any]]:
    """Suite -> record, in alphabetical order."""
    paths = (path for path in sorted(folder.glob("*.json")) if path.stem != "certificates")  # these have a page of their own
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def cell(value: Any) -> str:
    """One table cell: numbers as they are, lists with strokes, dictionaries as name: value, nothing as a dash."""
    if value is None or value == [] or value == {}:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {cell(item)}" for key, item in value.items())
    if isinstance(value, list):
        return " / ".join(map(cell, value))
    return str(value).replace("|", "\\|")


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table with a column for every key that some row fills."""
    names = list(dict.fromkeys(key for row in rows for key in row if any(r.get(key) is not None for r in rows)))
    lines = [names, ["---"] * len(names), *([cell(row.get(name)) for name in names] for row in rows)]
    lines[0] = [name.replace("_", " ").replace("psnr", "PSNR").replace("ssim", "SSIM") for name in names]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_paper(rows: list[dict[str, Any]], paper: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put a table of the paper, a row for each p and a column for each method, beside our rows of Levin's data."""

    def printed(row: dict[str, Any]) -> Any:
        if row.get("data", "levin") != "levin":
            return None
        fits = [line for line in paper if row.get("p") is None or line["p"] == row["p"]]  # no p: the same in every line
        return next((line[row["method"]] for line in fits if row["method"] in line), None)

    return [{**row, "paper": printed(row)} for row in rows]


def section(name: str, record: dict[str, Any]) -> str:
    """One record as a heading, its table, why it differs from the paper, its other numbers and its provenance."""
    paper = record.get("paper")
    rows = with_paper(record["rows"], paper) if isinstance(paper, list) else record["rows"]
    parts = [f"(result-{name})=\n## {name}", record["claim"][:1].upper() + record["claim"][1:] + ".", table(rows)]
    if "why_they_differ" in record:
        parts.append(f"**Why they differ:** {record['why_they_differ']}.")
    shown = {"name", "claim", "rows", "paper", "why_they_differ", "seconds", "threads", *PROVENANCE}
    rest = {key: value for key, value in record.items() if key not in shown}
    plain = {key.replace("_", " "): value for key, value in rest.items() if not isinstance(value, (dict, list))}
    numbers = [f"- {key}: {cell(value)}" for key, value in plain.items()]
    parts += ["\n".join(numbers)] if numbers else []
    origin = {key: record[key] for key in PROVENANCE} | {"seconds": record["seconds"]}
    origin |= {key: rest[key] for key in ("threads", "weights", "settings") if rest.get(key)}
    lines = "\n".join(f"{key}\n: {_origin(key, value)}\n" for key, value in origin.items())
    parts.append(f":::{{dropdown}} How this was made\n{lines}\nThe whole record: {{download}}`results/{name}.json`\n:::")
    return "\n\n".join(parts)


def _origin(key: str, value: Any) -> str:
    if key in ("data", "weights"):
        return "<br>".join(f"{name} `{digest[:16]}…`" for name, digest in value.items())
    return f"`{value}`" if key in ("command", "commit") else cell(value)


def page(found: dict[str, dict[str, Any]]) -> str:
    """The whole page."""
    return "\n\n".join([INTRO.rstrip(), *(section(name, record) for name, record in found.items())]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(records()), encoding="utf-8", newline="\n")
