"""What someone might do to a chapter, on purpose or not: each is found, and the message says what to do about it."""

import shutil
import subprocess
import sys
from types import SimpleNamespace

import execute as executor
import nbformat
import odlbook
import pytest
import stamps
from docutils import nodes
from docutils.utils import new_document
from execute import BOOK, changed, execute, read
from guards import CHECKED, same_cells, undescribed, unexecuted

TINY = f"""---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
---

# Tiny

Nothing much.

```{{code-cell}}
:tags: [{CHECKED}, certificate]
total = sum(range(5))
assert total == 10
print(total)
```

```{{code-cell}}
---
mystnb:
  image:
    alt: A line that rises from nought to four
---
from IPython.display import Image
Image(b"\\x89PNG\\r\\n\\x1a\\n", format="png")
```
"""
THEOREMS, PROBLEMS = (BOOK / part for part in ("padnet/theorems.md", "foundations/inverse-problems.md"))


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """A folder with a small chapter that was executed once for all tests."""
    source = tmp_path_factory.mktemp("book") / "tiny.md"
    source.write_text(TINY)
    assert execute(source)["certificates"] == [1, 1]
    return source.parent


@pytest.fixture
def chapter(executed, tmp_path):
    """A copy of it, to be spoilt."""
    source = shutil.copytree(executed, tmp_path / "chapter") / "tiny.md"
    assert not changed(source) and not unexecuted(stored(source)) and not undescribed(stored(source))
    return source


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of odlkit whose stamps are taken instead of the library's."""
    shutil.copytree(stamps.ROOT / "odlkit", tmp_path / "odlkit", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(stamps.ROOT / "constraints.txt", tmp_path)
    monkeypatch.setattr(stamps, "ROOT", tmp_path)
    return tmp_path / "odlkit"


def stored(source):
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def edit(path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def made_from(source) -> dict[str, str]:
    return stamps.stamp(read(source), source.parent)


def nbval(source) -> subprocess.CompletedProcess:
    words = ["-m", "pytest", "--nbval-lax", "--nbval-current-env", "-q", "-p", "no:cacheprovider", "--rootdir"]
    command = [sys.executable, *words, source.parent, source.with_suffix(".ipynb")]
    return subprocess.run(command, capture_output=True, text=True, cwd=source.parent)


def test_a_number_edited_in_a_stored_output(chapter):
    edit(chapter.with_suffix(".ipynb"), '"10\\n"', '"11\\n"')
    again = nbval(chapter)  # what `make test` runs: the cell is compared with a fresh run
    assert again.returncode == 1 and "Cell outputs differ" in again.stdout and "1 failed, 1 passed" in again.stdout
    (fault,) = unexecuted(stored(chapter))  # and without a run: the outputs are not those that were sealed
    assert "edited" in fault and "run make execute" in fault


def test_a_text_edited_without_executing(chapter):
    edit(chapter, "Nothing much.", "Something else.")
    (fault,) = same_cells(stored(chapter), read(chapter))
    assert "differs from the text" in fault and "run make execute" in fault
    edit(chapter, "range(5)", "range(1, 5)")
    assert stamps.sentence("tiny", changed(chapter)) == "tiny is stale: its code changed; run make execute"


def test_an_alt_text_dropped(chapter):
    edit(chapter, "alt: A line that rises from nought to four", "alt: ''")
    execute(chapter)
    (fault,) = undescribed(stored(chapter))
    assert "no alt text: describe the figure" in fault


def test_an_alt_text_dropped_from_a_chapter():
    notebook = stored(THEOREMS)
    drawn = next(c for c in notebook.cells if c.cell_type == "code" and c.metadata.get("mystnb", {}).get("image"))
    assert undescribed(notebook) == []
    del drawn.metadata["mystnb"]["image"]
    assert "describe the figure" in undescribed(notebook)[0]


def test_a_function_edited_makes_those_stale_that_import_it(copied):
    before = {source: made_from(source) for source in (THEOREMS, PROBLEMS)}
    edit(copied / "certify.py", "margin >= 0", "margin >= -1")
    after = made_from(THEOREMS)
    assert [name for name in after if after[name] != before[THEOREMS][name]] == ["odlkit/certify.py"]
    assert made_from(PROBLEMS) == before[PROBLEMS]  # it imports no certificate
    edit(copied / "problem.py", "import torch\n", "import torch\n\nUNUSED = 1\n")
    assert made_from(PROBLEMS) != before[PROBLEMS]


def test_a_task_edited_makes_those_stale_that_run_the_command(copied, tmp_path):
    cells = [nbformat.v4.new_code_cell('subprocess.run([sys.executable, "-m", "odlkit", *words.split()])')]
    command = nbformat.v4.new_notebook(cells=cells)
    before = stamps.stamp(command, tmp_path), made_from(THEOREMS)
    edit(copied / "tasks/smooth.py", "import torch\n", "import torch\n\nUNUSED = 1\n")
    after = stamps.stamp(command, tmp_path)
    assert [name for name in after if after[name] != before[0][name]] == ["odlkit/tasks/smooth.py"]
    assert made_from(THEOREMS) == before[1]


def test_weights_count_where_they_may_be_loaded(copied):
    before = {source: made_from(source) for source in (THEOREMS, PROBLEMS)}
    (card,) = list((copied / "weights").glob("padnet-image.json"))
    card.write_text(card.read_text() + " ")
    assert made_from(THEOREMS) != before[THEOREMS]
    assert made_from(PROBLEMS) == before[PROBLEMS]


def test_the_message_names_the_file(chapter, copied, monkeypatch):
    edit(chapter, "total = sum", "import odlkit.problem\ntotal = sum")
    execute(chapter)
    assert changed(chapter) == []
    edit(copied / "problem.py", "import torch\n", "import torch\n\nUNUSED = 1\n")
    assert stamps.sentence("tiny", changed(chapter)) == "tiny is stale: odlkit/problem.py changed; run make execute"
    monkeypatch.setattr(executor, "_torch_version", lambda: "1.0")
    execute(chapter)
    assert changed(chapter) == ["torch"]


def test_comments_and_docstrings_do_not_count():
    code = '"""One."""\nimport torch  # two\n\n\ndef f(x):\n    """Three.\n\n    Four."""\n    # five\n    return "# six"\n'
    same = 'import torch\ndef f(x):\n    """Another."""\n    return "# six"\n'
    assert stamps.bare(code) == stamps.bare(same) == 'import torch\ndef f(x):\n    return "# six"'
    assert stamps.bare(code.replace("six", "seven")) != stamps.bare(code)
    assert stamps.bare('def f(): "doc"; return 1') == 'def f(): "doc"; return 1'  # nothing is lost on the line of a def


def test_imports_are_followed(copied):
    (copied / "late.py").write_text("def f():\n    from odlkit import control\n    return control\n")
    (copied / "sub").mkdir()
    (copied / "sub" / "__init__.py").write_text("from odlkit.late import f\n")
    (copied / "sub" / "inner.py").write_text("X = 1\n")
    names = stamps.modules("from odlkit.sub.inner import X")
    assert {"odlkit.sub.inner", "odlkit.sub", "odlkit.late", "odlkit.control", "odlkit"} <= set(names)
    assert "odlkit.certify" not in names
    played = stamps.modules('run([sys.executable, "-m", "odlkit"])')  # the command plays what its tables name
    assert {"odlkit.tasks.deblur", "odlkit.tasks.smooth", "odlkit.propositions.gdc"} <= set(played)
    assert not {"odlkit.tasks.smooth", "odlkit.cli"} & set(stamps.modules("from odlkit.tasks.deblur import deblur"))
    assert "odlkit.propositions.gdc" not in stamps.modules("from odlkit.certify import settled")
    with pytest.raises(ValueError, match="relative"):
        stamps.imported("from . import control")


def test_records_that_a_chapter_reads(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "results").mkdir()
    record = tmp_path / "results" / "one.json"
    record.write_text("{}")
    (tmp_path / "results" / "two.json").write_text("{}")
    for code in ('all_of("../results")["one"]', 'open("../results/one.json")'):
        assert stamps.named_files(code, tmp_path / "part") == [record.resolve()]
    assert len(stamps.named_files('all_of("../results")', tmp_path / "part")) == 2


def test_badges_come_from_the_record(chapter):
    """The row under the title says what was recorded, and a page without a record has none."""
    run = {"cpu_seconds": 11.6, "cores": 2, "device": "CPU", "date": "2026-01-02", "version": "0.1", "certificates": [3, 3]}

    def row(name: str, about: dict) -> list[str]:
        tree, title = new_document("page"), nodes.title(text="Title")
        tree += nodes.section("", title, nodes.paragraph(text="First."))
        config = SimpleNamespace(odlbook_runs={"padnet/theorems": about})
        odlbook._insert(SimpleNamespace(env=SimpleNamespace(docname=name), config=config), tree)
        assert tree[0][0] is title
        return [badge.astext() for badge in tree.findall(nodes.inline) if "odl-badge" in badge["classes"]]

    first, *others = row("book/padnet/theorems", run)
    assert first == "CPU time on 2 cores12 s"
    assert others == ["deviceCPU", "certificates3/3", "last executed2026-01-02", "odlkit0.1"]
    assert len(row("book/padnet/theorems", run | {"certificates": [0, 0]})) == 4
    assert row("book/intro", run) == []
    assert set(execute(chapter)) == {*run, "seconds"}  # what the executor records
