"""A chapter's exercises as one notebook for a class, in nbgrader's or Otter's format: the teacher's version.

`python tools/export.py book/foundations/inverse-problems.md --format nbgrader -o out.ipynb`.  Each exercise becomes
its text, its stub with the solution between the marks that `nbgrader generate_assignment` and `otter assign` take away, and
a test that calls `odlkit.check`.  Neither program is needed here.  CONTRIBUTING.md says what an exercise looks like.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FENCE = r"^(`{3,}|:{3,})"
OTTER = "# ASSIGNMENT CONFIG\ninit_cell: true\nexport_cell: false\ncheck_all_cell: true\ntests:\n    ok_format: false"
CODE = re.compile(FENCE + r"\{code-cell\}[^\n]*\n(.*?)^\1[ ]*$", re.M | re.S)
STUB = re.compile(r"^```python\n(.*?)^```[ ]*$", re.M | re.S)


@dataclass(frozen=True)
class Exercise:
    """One exercise with a checker: what a reader is asked, the code to begin with, and the code that passes."""

    label: str  # inv-ex-1
    level: str  # ●, ●● or ●●●
    text: str  # Markdown, without the stub
    stub: str  # both end with the call of the checker
    solution: str

    @property
    def checker(self) -> str:
        """The name in `odlkit.check`: ``podm-thm-ex-1`` is ``podm_thm_1``."""
        return self.label.replace("-ex-", "_").replace("-", "_")

    @property
    def points(self) -> int:
        """One for each dot."""
        return max(self.level.count("●"), 1)


def _options_off(cell: str) -> str:
    """A code cell without its header, which is a run of ``:key: value`` or a block between ``---``."""
    return re.sub(r"\A(---\n.*?^---\n|(:[\w-]+:[^\n]*\n)+)", "", cell, flags=re.M | re.S).strip("\n")


def code_cells(text: str) -> list[str]:
    """The code of every cell of a chapter, or of a part of it."""
    return [_options_off(match[2]) for match in CODE.finditer(text)]


def imports(text: str) -> str:
    """Every top-level import of the chapter: all that a stub or a solution may lean on besides its arguments."""
    nodes = [node for cell in code_cells(text) for node in ast.parse(cell).body]
    lines = [ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    return "\n".join(dict.fromkeys(lines))


def exercises(text: str) -> list[Exercise]:
    """The exercises with a checker, in order.  Raises ``ValueError`` when stub, solution or the right name is missing."""
    found = []
    head = FENCE + r"\{exercise-start\} *(?P<level>●*)[^\n]*\n(?P<options>.*?)^\1 *$\n"
    block = re.compile(head + r"(?P<body>.*?)^[`:]{3,}\{exercise-end\}", re.M | re.S)
    for match in block.finditer(text):
        label, stub = re.search(r":label: *(\S+)", match["options"]), STUB.search(match["body"])
        if label is None or "check." not in match["body"]:
            continue
        answer = r"\{solution-start\} *" + re.escape(label[1]) + r"\n(.*?)\{solution-end\}"
        solved = re.search(answer, text, re.S)
        cells = code_cells(solved[1]) if solved else []
        if stub is None or not cells:
            raise ValueError(f"{label[1]}: an exercise with a checker needs a ```python stub and a solution with code")
        asked = STUB.sub("", match["body"]).strip()
        exercise = Exercise(label[1], match["level"], asked, stub[1].strip("\n"), "\n\n\n".join(cells))
        for part, code in (("stub", exercise.stub), ("solution", exercise.solution)):
            if f"check.{exercise.checker}(" not in code:
                raise ValueError(f"{label[1]}: the {part} does not call check.{exercise.checker}")
        found.append(exercise)
    return found


def without_check(exercise: Exercise, code: str) -> tuple[str, str]:
    """The code and its call of the checker, apart."""
    call = re.search(rf"^check\.{exercise.checker}\(.*\)$", code, re.M)
    if call is None:
        raise ValueError(f"{exercise.label}: expected check.{exercise.checker}(...) on a line of its own")
    return code.replace(call[0], "").strip("\n"), call[0]


def _nbgrader(exercise: Exercise, new) -> list:
    def marked(cell, what: str, **flags):
        known = {"grade": False, "solution": False, "locked": False, "task": False, "schema_version": 3}
        cell.metadata["nbgrader"] = {**known, "grade_id": f"{exercise.label}-{what}", **flags}
        return cell

    stub, call = without_check(exercise, exercise.stub)
    solution, _ = without_check(exercise, exercise.solution)
    text = f"**{exercise.label}** {exercise.level}\n\n{exercise.text}"
    answer = f"{stub}\n\n\n### BEGIN SOLUTION\n{solution}\n### END SOLUTION"  # nbgrader strips the part between
    return [
        marked(new.new_markdown_cell(text), "text", locked=True),
        marked(new.new_code_cell(answer), "answer", solution=True),
        marked(new.new_code_cell(call), "test", grade=True, locked=True, points=exercise.points),
    ]


def _otter(exercise: Exercise, new) -> list:
    stub, call = without_check(exercise, exercise.stub)
    solution, _ = without_check(exercise, exercise.solution)
    text = f"**{exercise.label}** {exercise.level}\n\n{exercise.text}"
    prompt = f'""" # BEGIN PROMPT\n{stub}\n"""; # END PROMPT\n# BEGIN SOLUTION\n{solution}\n# END SOLUTION'
    raw, names = new.new_raw_cell, re.findall(r"\((\w+)", call)  # a test takes from the notebook what it names
    test = f"def test_{exercise.checker}(check, {', '.join(names)}):\n    {call}"
    return [
        raw(f"# BEGIN QUESTION\nname: {exercise.checker}\npoints: {exercise.points}"),
        new.new_markdown_cell(text),
        raw("# BEGIN SOLUTION"), new.new_code_cell(prompt), raw("# END SOLUTION"),
        raw("# BEGIN TESTS"), new.new_code_cell(test), raw("# END TESTS"),
        raw("# END QUESTION"),
    ]  # fmt: skip


def export(text: str, kind: str):
    """The notebook, for ``kind`` nbgrader or otter.  Raises ``ValueError`` when no exercise of the chapter has a checker."""
    import nbformat
    from nbformat import v4 as new

    chosen = exercises(text)
    if not chosen:
        raise ValueError("chapter: it has no exercise with a checker")
    heading = re.search(r"^# (.+)$", text, re.M)
    name = heading[1] if heading else "Exercises"
    title = new.new_markdown_cell(f"# {name}\n\nEach check prints one line when it passes.")
    cells = [title, new.new_code_cell(imports(text))]
    if kind == "otter":
        cells.insert(0, new.new_raw_cell(OTTER))
    for exercise in chosen:
        cells += (_otter if kind == "otter" else _nbgrader)(exercise, new)
    for number, cell in enumerate(cells):
        cell["id"] = f"c{number:03d}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = new.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.validate(notebook)
    return notebook


def main() -> int:
    """Write the notebook; 2 and one line on standard error for bad input."""
    import nbformat

    parser = argparse.ArgumentParser(description="Export a chapter's exercises for nbgrader or Otter.")
    parser.add_argument("chapter", type=Path, help="the chapter's text, such as book/foundations/inverse-problems.md")
    parser.add_argument("--format", choices=["nbgrader", "otter"], default="nbgrader")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the notebook to write")
    args = parser.parse_args()
    try:
        notebook = export(args.chapter.read_text(encoding="utf-8"), args.format)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    args.output.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
