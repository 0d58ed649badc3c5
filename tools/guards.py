"""Guards on a stored notebook: each returns its faults as sentences, and none for a notebook that may be published.

nbval compares outputs only where there are some, so an unexecuted notebook would pass it; these guards close that hole.
"""

from __future__ import annotations

import json
import re

from execute import asserts, outputs_hash

CHECKED = "nbval-check-output"


def code_cells(notebook) -> list:
    """The code cells that are not empty."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def same_cells(notebook, text) -> list[str]:
    """The stored cells must be those of the text: kind, source, metadata."""
    ours, theirs = ([(c.cell_type, c.source, dict(c.metadata)) for c in n.cells] for n in (notebook, text))
    if len(ours) != len(theirs):
        return [f"{len(ours)} stored cells, {len(theirs)} in the text: run make execute"]
    pairs = enumerate(zip(ours, theirs, strict=True))
    return [f"cell {i} differs from the text: run make execute" for i, (a, b) in pairs if a != b]


def unexecuted(notebook) -> list[str]:
    """Every code cell with content ran, in order, nothing failed or wrote to standard error, and no output was edited."""
    counts = [cell.execution_count for cell in code_cells(notebook)]
    ran = counts == list(range(1, len(counts) + 1))
    faults = [] if ran else [f"execution counts are {counts}: run make execute"]
    for cell in code_cells(notebook):
        for out in cell.outputs:
            if out.output_type == "error" or (out.output_type == "stream" and out.name == "stderr"):
                faults.append(f"error output after: {cell.source.splitlines()[0]}; mend the cell and run make execute")
    if notebook.metadata.get("odlkit", {}).get("outputs") != outputs_hash(notebook):
        faults.append("its stored outputs are not those of its last run, they were edited: run make execute")
    return faults


def unchecked(notebook) -> list[str]:
    """At least three cells are compared by nbval, and every such cell has text to compare (pictures are never compared)."""
    checked = [cell for cell in code_cells(notebook) if CHECKED in cell.metadata.get("tags", [])]
    faults = [] if len(checked) >= 3 else [f"{len(checked)} cells are tagged {CHECKED}: print results and tag three or more"]

    def has_text(cell) -> bool:
        return any(out.output_type == "stream" or "text/plain" in out.get("data", {}) for out in cell.outputs)

    silent = [cell.source.splitlines()[0] for cell in checked if not has_text(cell)]
    return faults + [f"nothing to compare after: {line}; print a number, or drop the tag" for line in silent]


def unasserted(notebook) -> list[str]:
    """A cell tagged ``certificate`` asserts that its inequalities hold; one tagged ``control`` asserts or is compared."""
    faults = []
    for cell in code_cells(notebook):
        tags = cell.metadata.get("tags", [])
        enough = asserts(cell.source) or ("certificate" not in tags and CHECKED in tags)
        if {"certificate", "control"} & set(tags) and not enough:
            faults.append(f"a {'certificate' if 'certificate' in tags else 'control'} that asserts nothing: "
                          f"{cell.source.splitlines()[0]}; assert what holds, or what fails")  # fmt: skip
    return faults


def undescribed(notebook) -> list[str]:
    """Every picture has an alternative text, drawn, as HTML, or a frame of a widget; and every such text has a picture."""
    faults = []
    for cell in code_cells(notebook):
        data = [out.get("data", {}) for out in cell.outputs]
        drawn = any(kind.startswith("image/") for bundle in data for kind in bundle)
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        if drawn and len(alt.strip()) < 10:
            line = cell.source.splitlines()[0]
            faults.append(f"no alt text: describe the figure in the header (mystnb: image: alt) of the cell {line}")
        if alt and not drawn and not any("text/html" in bundle for bundle in data):
            faults.append(f"no figure: end with plt.show() the cell {cell.source.splitlines()[0]}")
        faults += [tag for bundle in data for tag in _bare_images("".join(bundle.get("text/html", "")))]
    return faults + _bare_images(json.dumps(notebook.metadata.get("widgets", {})).replace('\\"', '"'))


def _bare_images(html: str) -> list[str]:
    tags = re.findall(r"<img\b[^>]*>", html)
    bare = [tag for tag in tags if not re.search(r"""\balt=(["'])(?!\1).{9,}?\1""", tag)]
    return [f"no alt text: describe the picture (alt=...) of {tag[:60]}" for tag in bare]
