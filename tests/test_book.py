"""Each stored notebook is its text, was executed, checks something, describes its figures; the executor repeats itself."""

import copy
from pathlib import Path

import nbformat
import pytest
import yaml
from execute import BOOK, ROOT, changed, chapters, execute, name_of, outputs_hash, read, rewrite
from guards import CHECKED, same_cells, unasserted, unchecked, undescribed, unexecuted
from stamps import sentence

CHAPTERS = [pytest.param(path, id=name_of(path)) for path in chapters()]


def stored(source: Path):
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def faults(notebook, text) -> list[str]:
    return same_cells(notebook, text) + [f for g in (unexecuted, unchecked, unasserted, undescribed) for f in g(notebook)]


@pytest.mark.parametrize("source", CHAPTERS)
def test_chapter(source):
    assert source.with_suffix(".ipynb").exists(), f"{source.name} was never executed: run make execute"
    found = faults(stored(source), read(source))
    assert not found, f"{name_of(source)}: " + "; ".join(found)


@pytest.mark.parametrize("source", CHAPTERS)
def test_stamp(source):
    why = changed(source)
    assert not why, sentence(name_of(source), why)


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
    about = {"tags": [CHECKED, "certificate"]}
    cell = nbformat.v4.new_code_cell("assert 1\nprint(1)", execution_count=1, metadata=about, id="a")
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="1\n")]
    figure = nbformat.v4.new_code_cell("draw()", execution_count=4)
    figure.metadata["mystnb"] = {"image": {"alt": "Energy falling over forty steps"}}
    figure.outputs = [nbformat.v4.new_output("display_data", data={"image/png": "AAAA"})]
    several = [nbformat.from_dict({**cell, "execution_count": count, "id": f"a{count}"}) for count in (1, 2, 3)]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title"), *several, figure])
    notebook.metadata["odlkit"] = {"outputs": outputs_hash(notebook)}
    return notebook


def test_guards_see_each_fault(good):
    """Each guard passes the good notebook and reports the one made bad for it."""
    assert faults(good, good) == []

    def spoilt(change, seal=True) -> nbformat.NotebookNode:
        notebook = copy.deepcopy(good)
        change(notebook)
        if seal:  # so that the guard itself is asked, not the hash of the outputs
            notebook.metadata["odlkit"] = {"outputs": outputs_hash(notebook)}
        return notebook

    assert same_cells(spoilt(lambda n: n.cells[0].update(source="# Other")), good)
    assert same_cells(spoilt(lambda n: n.cells[1].metadata.update(tags=[])), good)
    assert same_cells(spoilt(lambda n: n.cells.pop()), good)
    assert unexecuted(spoilt(lambda n: n.cells[1].update(execution_count=None)))
    assert unexecuted(spoilt(lambda n: n.cells[1].outputs[0].update(name="stderr")))
    assert unexecuted(spoilt(lambda n: n.cells[1].outputs[0].update(text="2\n"), seal=False))
    assert unchecked(spoilt(lambda n: n.cells[1].metadata.update(tags=[])))
    assert unchecked(spoilt(lambda n: n.cells[1].update(outputs=[])))
    assert unasserted(spoilt(lambda n: n.cells[1].update(source="print(1)")))
    assert undescribed(spoilt(lambda n: n.cells[4].metadata.clear()))
    assert undescribed(spoilt(lambda n: n.cells[4].update(outputs=[])))
    html = {"text/html": '<img alt="" src="x">'}
    assert undescribed(spoilt(lambda n: n.cells[4].outputs.append(nbformat.v4.new_output("display_data", data=html))))
    frame = {"state": {"a": {"state": {"value": '<img src="data:x">'}}}}
    assert undescribed(spoilt(lambda n: n.metadata.update(widgets={"application/vnd.jupyter.widget-state+json": frame})))


HEADER = "---\njupytext:\n  text_representation:\n    extension: .md\n    format_name: myst\n---\n\n# Tiny\n\n"
WIDGETS = "import ipywidgets as w\nw.VBox([w.IntSlider(), w.HTML('a')])"


def test_executor_repeats_itself_byte_for_byte(tmp_path):
    source = tmp_path / "tiny.md"
    source.write_text(f"{HEADER}```{{code-cell}}\n{WIDGETS}\n```\n\n```{{code-cell}}\nprint(2 + 2)\n```\n")
    assert changed(source) == ["it was never executed"]
    about = execute(source)
    assert about["certificates"] == [0, 0] and about["device"] == "CPU"
    first = source.with_suffix(".ipynb").read_bytes()
    assert not changed(source) and not rewrite(source)
    assert unexecuted(stored(source)) == []
    assert same_cells(stored(source), read(source)) == []
    execute(source)
    assert source.with_suffix(".ipynb").read_bytes() == first
    source.write_text(source.read_text().replace("# Tiny", "# Small"))
    assert not changed(source) and same_cells(stored(source), read(source))
    assert rewrite(source)  # prose alone: written again with the outputs it had
    assert same_cells(stored(source), read(source)) == unexecuted(stored(source)) == []
    source.write_text(source.read_text().replace("2 + 2", "2 + 3"))
    assert changed(source) == ["its code"]


def test_executor_stores_nothing_when_a_cell_fails(tmp_path):
    source = tmp_path / "tiny.md"
    source.write_text(f"{HEADER}```{{code-cell}}\nassert 1 == 2, 'not equal'\n```\n")
    with pytest.raises(Exception, match="not equal"):
        execute(source)
    assert not source.with_suffix(".ipynb").exists()
