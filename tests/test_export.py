"""Exported exercises: valid notebooks in each format; the teacher's version passes, the student's begins by failing."""

import re
import subprocess
import sys

import nbformat
import pytest
from export import ROOT, code_cells, exercises, export, imports

from odlkit import check

FIXTURE = ROOT / "tests" / "exercises.md"
TEXT = FIXTURE.read_text(encoding="utf-8")
KNOWN = exercises(TEXT)
SHORT = {"inv-ex-1", "padnet-ex-1", "thm-ex-2", "deconv-ex-3"}  # enough to play


def test_text_is_read_as_jupytext_reads_it():
    """Stub, solution, points and imports come from the text without a parser of its own going astray."""
    import jupytext

    cells = [cell.source for cell in jupytext.reads(TEXT, fmt="md:myst").cells if cell.cell_type == "code"]
    assert code_cells(TEXT) == cells and len(cells) == len(KNOWN) + 1
    headed = "```{code-cell} ipython3\n---\nmystnb:\n  image:\n    alt: text\n---\nx = 1\n```\n"
    tagged = "```{code-cell} ipython3\n:tags: [hide-input]\nx = {':a': 2}\n```\n"
    assert code_cells(headed + "\nwords\n\n" + tagged) == ["x = 1", "x = {':a': 2}"]
    assert imports(headed + tagged) == "" and "from odlkit import check" in imports(TEXT)
    levels = {e.label: (e.level, e.points) for e in KNOWN}
    assert levels["inv-ex-1"] == ("●", 1) and levels["cert-ex-2"] == ("●●", 2) and levels["deconv-ex-3"] == ("●●●", 3)
    assert all("```" not in e.text and "def " not in e.text and len(e.text) > 40 for e in KNOWN)


def test_nbgrader_cells():
    notebook = export(TEXT, "nbgrader")
    nbformat.validate(notebook)
    marked = [cell for cell in notebook.cells if "nbgrader" in cell.metadata]
    assert len(marked) == 3 * len(KNOWN) and len({cell.metadata.nbgrader.grade_id for cell in marked}) == len(marked)
    for e, (text, answer, test) in zip(KNOWN, zip(*[iter(marked)] * 3, strict=True), strict=True):
        flags = [[c.metadata.nbgrader[f] for f in ("grade", "solution", "locked", "task")] for c in (text, answer, test)]
        assert flags == [[False, False, True, False], [False, True, False, False], [True, False, True, False]]
        assert test.metadata.nbgrader.points == e.points and "points" not in answer.metadata.nbgrader
        assert all(c.metadata.nbgrader.schema_version == 3 for c in (text, answer, test))
        assert test.source.startswith(f"check.{e.checker}(") and "check." not in answer.source
        assert answer.source.count("### BEGIN SOLUTION") == answer.source.count("### END SOLUTION") == 1


def test_otter_cells():
    notebook = export(TEXT, "otter")
    nbformat.validate(notebook)
    raw = [cell.source for cell in notebook.cells if cell.cell_type == "raw"]
    assert raw[0].startswith("# ASSIGNMENT CONFIG") and "ok_format: false" in raw[0]
    marks = ["# BEGIN QUESTION", "# BEGIN SOLUTION", "# END SOLUTION", "# BEGIN TESTS", "# END TESTS", "# END QUESTION"]
    assert [text.splitlines()[0] for text in raw[1:]] == marks * len(KNOWN)
    questions = [text for text in raw if text.startswith("# BEGIN QUESTION")]
    assert questions == [f"# BEGIN QUESTION\nname: {e.checker}\npoints: {e.points}" for e in KNOWN]
    prompts = [cell.source for cell in notebook.cells if "# BEGIN PROMPT" in cell.source]
    assert len(prompts) == len(KNOWN) and all('"""; # END PROMPT' in p and "check." not in p for p in prompts)


@pytest.mark.parametrize("e", [e for e in KNOWN if e.label in SHORT], ids=lambda e: e.label)
def test_teachers_version_passes_and_students_fails(e):
    """What nbgrader does with the marks: the part between them goes, the stub stays."""
    cells = export(TEXT, "nbgrader").cells
    at = next(i for i, c in enumerate(cells) if c.metadata.get("nbgrader", {}).get("grade_id") == f"{e.label}-answer")
    setup, teacher, test = (cells[i].source for i in (1, at, at + 1))
    exec("\n".join([setup, teacher, test]), {})
    student = re.sub(r"### BEGIN.*### END SOLUTION", "", teacher, flags=re.S)
    assert student != teacher
    with pytest.raises(check.NotYet, match=e.checker):
        exec("\n".join([setup, student, test]), {})


def test_otter_test_calls_the_checker():
    cells = export(TEXT, "otter").cells
    test = next(c.source for c in cells if c.source.startswith("def test_inv_1("))
    names: dict = {}
    exec(test, names)
    good, bad = (lambda v, K, S: K.A_adjoint(S.A_adjoint(v))), (lambda v, K, S: v)
    names["test_inv_1"](check, good)
    with pytest.raises(check.NotYet, match="inv_1"):
        names["test_inv_1"](check, bad)


def run(*args) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "tools" / "export.py", *args], capture_output=True, text=True)


def test_command_writes_the_same_bytes_and_refuses_in_one_line(tmp_path):
    for kind in ("nbgrader", "otter"):
        first, second = (tmp_path / f"{kind}{i}.ipynb" for i in range(2))
        assert all(run(FIXTURE, "--format", kind, "-o", path).returncode == 0 for path in (first, second))
        assert first.read_bytes() == second.read_bytes()
        assert nbformat.read(first, as_version=4) == export(TEXT, kind)
    plain = tmp_path / "plain.md"
    plain.write_text("# No exercises\n")
    for chapter in (plain, tmp_path / "absent.md"):
        refused = run(chapter, "-o", tmp_path / "out.ipynb")
        assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1 and not (tmp_path / "out.ipynb").exists()
