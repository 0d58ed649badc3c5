"""Guards on the book: each stored notebook is its text, was executed, checks something, and describes its figures.

nbval compares outputs only where there are some, so an unexecuted notebook would pass it; these tests close that hole.
"""

import copy
import json
import re
from pathlib import Path

import nbformat
import pytest
import yaml
from execute import BOOK, ROOT, chapters, execute, is_stale, read

CHAPTERS = [pytest.param(path, id=path.relative_to(BOOK).with_suffix("").as_posix()) for path in chapters()]
CHECKED = "nbval-check-output"


def stored(source: Path):
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def same_cells(notebook, text) -> list[str]:
    """The stored cells must be those of the text: kind, source, metadata."""
    ours, theirs = ([(c.cell_type, c.source, dict(c.metadata)) for c in n.cells] for n in (notebook, text))
    if len(ours) != len(theirs):
        return [f"{len(ours)} stored cells, {len(theirs)} in the text"]
    return [f"cell {i} differs from the text" for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]


def unexecuted(notebook) -> list[str]:
    """Every code cell with content ran, in order, and nothing failed or wrote to standard error."""
    counts = [cell.execution_count for cell in code_cells(notebook)]
    faults = [] if counts == list(range(1, len(counts) + 1)) else [f"execution counts are {counts}"]
    for cell in code_cells(notebook):
        for out in cell.outputs:
            if out.output_type == "error" or (out.output_type == "stream" and out.name == "stderr"):
                faults.append(f"error output after: {cell.source.splitlines()[0]}")
    return faults


def unchecked(notebook) -> list[str]:
    """At least one cell is compared by nbval, and every such cell has text to compare (pictures are never compared)."""
    checked = [cell for cell in code_cells(notebook) if CHECKED in cell.metadata.get("tags", [])]
    if not checked:
        return [f"no cell is tagged {CHECKED}"]

    def has_text(cell) -> bool:
        return any(out.output_type == "stream" or "text/plain" in out.get("data", {}) for out in cell.outputs)

    return [f"nothing to compare after: {cell.source.splitlines()[0]}" for cell in checked if not has_text(cell)]


def undescribed(notebook) -> list[str]:
    """Every picture has an alternative text, whether drawn, written as HTML, or a frame of a widget."""
    faults = []
    for cell in code_cells(notebook):
        data = [out.get("data", {}) for out in cell.outputs]
        drawn = any(kind.startswith("image/") for bundle in data for kind in bundle)
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        if drawn and len(alt.strip()) < 10:
            faults.append(f"no alt text (mystnb: image: alt) for the figure of: {cell.source.splitlines()[0]}")
        faults += [tag for bundle in data for tag in _bare_images("".join(bundle.get("text/html", "")))]
    return faults + _bare_images(json.dumps(notebook.metadata.get("widgets", {})).replace('\\"', '"'))


def _bare_images(html: str) -> list[str]:
    tags = re.findall(r"<img\b[^>]*>", html)
    return [f"no alt text: {tag[:60]}" for tag in tags if not re.search(r"""\balt=(["'])(?!\1).{9,}?\1""", tag)]


@pytest.mark.parametrize("source", CHAPTERS)
def test_chapter(source):
    assert source.with_suffix(".ipynb").exists(), f"{source.name} was never executed: run make execute"
    notebook = stored(source)
    faults = same_cells(notebook, read(source)) + unexecuted(notebook) + unchecked(notebook) + undescribed(notebook)
    assert not faults, f"{source.name}: " + "; ".join(faults)


@pytest.mark.parametrize("source", CHAPTERS)
def test_stamp(source):
    assert not is_stale(source), f"{source.name} is stale: its text or odlkit changed since it ran; run make execute"
    pin = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
    assert stored(source).metadata.odlkit.torch == pin, f"{source.name} was executed with another torch: run make execute"


def test_toc_lists_every_page_once():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    listed = [toc["root"], *(entry["file"] for part in toc["parts"] for entry in part["chapters"])]
    pages = [path.relative_to(ROOT).with_suffix("").as_posix() for path in BOOK.rglob("*.md")]
    assert sorted(listed) == sorted(p for p in pages if ".ipynb_checkpoints" not in p)
    assert len(set(listed)) == len(listed)
    assert len(CHAPTERS) >= 8


def test_every_notebook_has_a_text():
    """No orphan: a stored notebook without its text could never be rebuilt."""
    sources = {path.with_suffix(".ipynb") for path in chapters()}
    assert {p for p in BOOK.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts} == sources


@pytest.fixture
def good():
    """A small stored notebook without fault."""
    cell = nbformat.v4.new_code_cell("print(1)", execution_count=1, metadata={"tags": [CHECKED]})
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="1\n")]
    figure = nbformat.v4.new_code_cell("draw()", execution_count=2)
    figure.metadata["mystnb"] = {"image": {"alt": "Energy falling over forty steps"}}
    figure.outputs = [nbformat.v4.new_output("display_data", data={"image/png": "AAAA"})]
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title"), cell, figure])


def test_guards_see_each_fault(good):
    """Each guard passes the good notebook and reports the one made bad for it."""
    for guard in (unexecuted, unchecked, undescribed):
        assert guard(good) == []
    assert same_cells(good, good) == []

    def spoilt(change) -> nbformat.NotebookNode:
        notebook = copy.deepcopy(good)
        change(notebook)
        return notebook

    assert same_cells(spoilt(lambda n: n.cells[0].update(source="# Other")), good)
    assert same_cells(spoilt(lambda n: n.cells[1].metadata.update(tags=[])), good)
    assert same_cells(spoilt(lambda n: n.cells.pop()), good)
    assert unexecuted(spoilt(lambda n: n.cells[1].update(execution_count=None)))
    assert unexecuted(spoilt(lambda n: n.cells[1].outputs[0].update(name="stderr")))
    assert unchecked(spoilt(lambda n: n.cells[1].metadata.update(tags=[])))
    assert unchecked(spoilt(lambda n: n.cells[1].update(outputs=[])))
    assert undescribed(spoilt(lambda n: n.cells[2].metadata.clear()))
    html = {"text/html": '<img alt="" src="x">'}
    assert undescribed(spoilt(lambda n: n.cells[2].outputs.append(nbformat.v4.new_output("display_data", data=html))))
    frame = {"state": {"a": {"state": {"value": '<img src="data:x">'}}}}
    assert undescribed(spoilt(lambda n: n.metadata.update(widgets={"application/vnd.jupyter.widget-state+json": frame})))


HEADER = "---\njupytext:\n  text_representation:\n    extension: .md\n    format_name: myst\n---\n\n# Tiny\n\n"
WIDGETS = "import ipywidgets as w\nw.VBox([w.IntSlider(), w.HTML('a')])"


def test_executor_repeats_itself_byte_for_byte(tmp_path):
    source = tmp_path / "tiny.md"
    source.write_text(f"{HEADER}```{{code-cell}}\n{WIDGETS}\n```\n\n```{{code-cell}}\nprint(2 + 2)\n```\n")
    assert is_stale(source)
    execute(source)
    first = source.with_suffix(".ipynb").read_bytes()
    assert not is_stale(source)
    assert unexecuted(stored(source)) == []
    assert same_cells(stored(source), read(source)) == []
    execute(source)
    assert source.with_suffix(".ipynb").read_bytes() == first
    source.write_text(source.read_text().replace("2 + 2", "2 + 3"))
    assert is_stale(source)


def test_executor_stores_nothing_when_a_cell_fails(tmp_path):
    source = tmp_path / "tiny.md"
    source.write_text(f"{HEADER}```{{code-cell}}\nassert 1 == 2, 'not equal'\n```\n")
    with pytest.raises(Exception, match="not equal"):
        execute(source)
    assert not source.with_suffix(".ipynb").exists()
