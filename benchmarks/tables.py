"""Write the recorded tables into this folder's README."""

from __future__ import annotations

import json
from pathlib import Path

from measure import markdown

MARK = "<!-- tables -->"


def main() -> None:
    """One section a record, below the mark."""
    here = Path(__file__).parent
    text = (here / "README.md").read_text(encoding="utf-8").split(MARK)[0] + MARK + "\n"
    for path in sorted((here / "results").glob("*.json")):
        record = json.loads(path.read_text())
        rows, torch = record["rows"], record["versions"]["torch"]
        where = f"{record['hardware']}, load {record['load_average'][0]}, torch {torch}, commit {record['commit']}"
        text += f"\n## {path.stem}\n\n`{record['command']}`: {where}, {rows[0]['rounds']} rounds.\n\n{markdown(rows)}\n"
        if "claims" in record:
            lines = [f"| {c['claim']} | {c['value']:.3g} | {c['bar']:g} | {c['met']} |" for c in record["claims"]]
            text += "\n" + "\n".join(["| claim | value | bar | met |", "|---|---|---|---|", *lines]) + "\n"
    (here / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
