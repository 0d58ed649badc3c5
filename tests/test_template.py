"""Every chapter has the parts that a reader may rely on, in one order, and stays within its budgets."""

import json
import re
import statistics

import nbformat
import pytest
from execute import BOOK, RUNTIMES, chapters, name_of, read
from guards import CHECKED

SECTIONS = {
    "what one can do afterwards": r"^\*\*After this chapter you can\*\*$",
    "the study time": r"^\*\*Study time\*\* \w",
    "what one needs": r"\*\*You need\*\* \S",
    "the box of notation": r"^:::\{admonition\} In the (?:paper|literature) this is written…$",
    "the fine print": r"^(?::::\{admonition\}|##) Fine print$",
    "exercises": r"^## Exercises$",
    "the quiz": r"^## Quiz$",
    "the take-away": r"^## Take-away$",
    "references": r"^## References$",
}
SECONDS, BYTES, LONGEST, MEDIAN, CELLS = 60, 1_000_000, 20, 6, (10, 18)
# Chapters that are allowed more than the budget: (budget, chapter) -> how much, and why.
ALLOWED = {
    ("median", "foundations/proximal-toolbox"): (7, "a cell checks one map, for every exponent, by brute force"),
    ("median", "foundations/unrolling-and-plug-and-play"): (9, "a cell is one experiment: network, run, what it shows"),
    ("median", "padnet/padnet"): (8, "the lines of an algorithm stay together, in the paper's order"),
    ("median", "podm/podm"): (9, "a cell is one module or one experiment, with its assertion"),
    ("median", "gdc/controls"): (8, "a cell is an algorithm in its own lines, or one experiment with its verdict"),
    ("median", "gdc/training"): (10, "a cell is a loop to be trained, or one experiment with its verdict"),
    ("median", "gdc/tasks"): (8, "a cell is one task's run, or one comparison with its verdict"),
    ("cells", "gdc/training"): (20, "a cascade is written, differentiated, trained, and taken apart"),
    ("median", "dgunet/inter-stage-pathway"): (9, "a cell is one measurement of what passes, or one part"),
    ("median", "dgunet/what-is-not-guaranteed"): (8, "a cell is one run or one measurement with its verdict"),
    ("median", "dgunet/compressive-sensing"): (7, "a cell is one matrix, one recovery, or one experiment with its verdict"),
    ("median", "dgunet/deraining-and-denoising"): (7, "a cell is one degradation, one comparison or one table of a record"),
    ("median", "pipelines/low-light"): (8, "a cell is one bound or one experiment, with its assertion"),
    ("median", "pipelines/architecture-search"): (8, "a cell is one graph, one gradient or one experiment with verdict"),
    ("cells", "pipelines/architecture-search"): (21, "a search space, its gradient, what was found, the model of it"),
    ("median", "hodl/sparse-coding"): (8, "a cell is one training or one experiment with its verdict"),
    ("median", "hodl/one-problem"): (9, "a cell is one map, its training, or one experiment with its verdict"),
    ("median", "hodl/hypergradients"): (10, "a cell is one way in full, with the assertion that it equals odlkit's"),
    ("median", "hodl/choosing-lambda"): (9, "a cell is one formula with its assertion, or one experiment with its verdict"),
    ("median", "pipelines/rain-streaks"): (7, "a cell is the step in its own lines, one run with its verdict, or one table"),
    ("median", "beyond/hyper-cleaning"): (7, "a cell is one comparison of the methods, or one table of the record"),
    ("median", "beyond/few-shot"): (7, "a cell is one part of the bilevel problem, or one table of a record"),
    ("cells", "foundations/inverse-problems"): (19, "four operators and three runs, in short cells"),
}
MARKS = {"certificate": "asserts what the theory promises", "control": "breaks a hypothesis and fails"}


def allowed(budget: str, name: str, normal: float) -> float:
    return ALLOWED.get((budget, name), (normal, ""))[0]


def misplaced(text: str) -> list[str]:
    """The sections that are missing, or that stand before the one they should follow."""
    found = {name: re.search(pattern, text, re.M) for name, pattern in SECTIONS.items()}
    faults = [f"it lacks {name}: add {SECTIONS[name]}" for name, match in found.items() if not match]
    there = [(name, match.start()) for name, match in found.items() if match]
    pairs = zip(there, there[1:], strict=False)
    return faults + [f"{b} should come after {a}: move it" for (a, at), (b, next_at) in pairs if at > next_at]


def counted(text: str) -> list[str]:
    """At most five abilities, five rows of notation."""
    abilities = re.search(r"^\*\*After this chapter you can\*\*\n\n((?:- .*\n(?:  .*\n)*)+)", text, re.M)
    items = len(re.findall(r"^- ", abilities[1], re.M)) if abilities else 0
    box = re.search(r"^:::\{admonition\} In the .*?^:::$", text, re.M | re.S)
    rows = len(re.findall(r"^\| (?!---)", box[0], re.M)) - 1 if box else 0
    faults = [] if 1 <= items <= 5 else [f"{items} abilities: list one to five"]
    return faults + ([] if rows == 5 else [f"{rows} rows of notation: the box has five"])


def exercises(text: str) -> list[str]:
    """Three to five exercises of all three levels, each with a folded solution."""
    options = r"((?:^:[a-z]+:.*\n)*)"
    found = re.findall(r"^`{3,}\{exercise(?:-start)?\} *(●*).*\n" + options, text, re.M)
    solved = dict(re.findall(r"^`{3,}\{solution(?:-start)?\} *(\S+).*\n" + options, text, re.M))
    faults = [] if 3 <= len(found) <= 5 else [f"{len(found)} exercises: give three to five"]
    missing = [level for level in ("●", "●●", "●●●") if level not in {level for level, _ in found}]
    faults += [f"no exercise of level {level}: code, change a hypothesis, open" for level in missing]
    labels = [(re.findall(r":label: (\S+)", about) or ["(no label)"])[0] for _, about in found]
    faults += [f"{label} has no solution" for label in labels if label not in solved]
    return faults + [f"{label}: fold its solution, :class: dropdown" for label, o in solved.items() if "dropdown" not in o]


def quiz(text: str) -> list[str]:
    """Three questions, each with an answer that is folded."""
    part = re.search(r"^## Quiz$(.*?)(?=^## |\Z)", text, re.M | re.S)
    questions = len(re.findall(r"^\*\*\d\.\*\*", part[1], re.M)) if part else 0
    answers = len(re.findall(r"^:{3,}\{dropdown\}", part[1], re.M)) if part else 0
    if questions == answers == 3:
        return []
    told = f"{questions} quiz questions, {answers} folded answers"
    return [f"{told}: write three in book/data/quizzes.yml and run python tools/quizzes.py"]


def cells(notebook, name: str) -> list[str]:
    """Short cells, neither few nor many, three of them compared, a certificate and a control among them."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    lengths = [sum(bool(line.strip()) for line in cell.source.splitlines()) for cell in code]
    tags = [tag for cell in code for tag in cell.metadata.get("tags", [])]
    solutions = sum("solution-start" in cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    shown, most = len(code) - solutions, allowed("cells", name, CELLS[1])
    faults = [] if CELLS[0] <= shown <= most else [f"{shown} code cells outside solutions: {CELLS[0]} to {most}"]
    median, limit = statistics.median(lengths or [0]), allowed("median", name, MEDIAN)
    faults += [] if median <= limit else [f"its code cells have {median:g} lines in the median: at most {limit}, split some"]
    faults += [f"a code cell of {n} lines: at most {LONGEST}, split it" for n in lengths if n > LONGEST]
    faults += [] if tags.count(CHECKED) >= 3 else [f"{tags.count(CHECKED)} cells are tagged {CHECKED}: at least three"]
    return faults + [f"no cell is tagged {tag}: tag the one that {does}" for tag, does in MARKS.items() if tag not in tags]


def costs(name: str, size: int, runs: dict) -> list[str]:
    """Recorded seconds and stored bytes."""
    faults = [] if size < BYTES else [f"its notebook has {size} bytes: under {BYTES}, draw smaller or fewer pictures"]
    if name not in runs:
        return [*faults, "no run of it is recorded: run make execute and commit book/runtimes.json"]
    lacking = {"cpu_seconds", "cores", "device", "date", "version", "certificates"} - set(runs[name])
    if lacking:
        return [*faults, f"its record lacks {', '.join(sorted(lacking))}: run python tools/execute.py book/{name}.md"]
    seconds = runs[name]["cpu_seconds"]
    faults += [] if seconds <= SECONDS else [f"it takes {seconds} s of CPU: at most {SECONDS}, make it smaller"]
    held, tried = runs[name]["certificates"]
    return faults + ([] if held == tried else [f"{held} of {tried} certificates held: mend it and run make execute"])


CHAPTERS = [pytest.param(path, id=name_of(path)) for path in chapters()]


def report(source, faults: list[str]) -> None:
    assert not faults, f"book/{name_of(source)}.md: " + "; ".join(faults)


@pytest.mark.parametrize("source", CHAPTERS)
def test_sections(source):
    text = source.read_text(encoding="utf-8")
    report(source, misplaced(text) + counted(text) + exercises(text) + quiz(text))


@pytest.mark.parametrize("source", CHAPTERS)
def test_cells(source):
    report(source, cells(read(source), name_of(source)))


@pytest.mark.parametrize("source", CHAPTERS)
def test_costs(source):
    runs = json.loads(RUNTIMES.read_text(encoding="utf-8")) if RUNTIMES.exists() else {}
    report(source, costs(name_of(source), source.with_suffix(".ipynb").stat().st_size, runs))


def test_exceptions_are_needed():
    """An exception whose chapter keeps the normal budget is taken away again."""
    for (budget, name), (_, why) in ALLOWED.items():
        notebook = read(BOOK / f"{name}.md")
        assert why and any("median" in f if budget == "median" else "code cells outside" in f for f in cells(notebook, ""))


EXERCISE = """```{{exercise-start}} {0}
:label: x-ex-{1}
```
Do it.
```{{exercise-end}}
```

```{{solution-start}} x-ex-{1}
:class: dropdown
```
Done.
```{{solution-end}}
```
"""
ROWS = "\n".join(f"| ${letter}$ | ${letter}'$ | a letter |" for letter in "abcde")
TEXT = f"""# A chapter

**After this chapter you can**

- do one thing;
- do another, which takes
  two lines to say.

**Study time** about an hour. **You need** nothing.

:::{{admonition}} In the paper this is written…
:class: note

| here | in the paper | meaning |
| --- | --- | --- |
{ROWS}
:::

## Fine print

- Not much was shown.

## Exercises

{"".join(EXERCISE.format("●" * number, number) for number in (1, 2, 3))}
## Quiz

## Take-away

## References
"""
QUESTION = "**{}.** Which?\n\n- (a) this\n- (b) that\n\n:::{{dropdown}} Answer to question {}\n**(a)** So it is.\n:::\n\n"
QUIZ = "## Quiz\n\n" + "".join(QUESTION.format(i, i) for i in (1, 2, 3)) + "## Take-away\n"


@pytest.mark.parametrize("name", SECTIONS)
def test_a_missing_section_is_found(name):
    without = re.sub(SECTIONS[name], "", TEXT, count=1, flags=re.M)
    assert f"it lacks {name}: add {SECTIONS[name]}" in misplaced(without)


def test_a_section_out_of_place_is_found():
    moved = TEXT.replace("## Exercises", "## Later").replace("## Fine print", "## Exercises\n\n## Fine print")
    assert misplaced(moved)[-1] == "exercises should come after the fine print: move it"


def test_faults_of_the_parts_are_found():
    assert misplaced(TEXT) == counted(TEXT) == exercises(TEXT) == []
    assert counted(TEXT.replace("- do one thing;\n", 5 * "- do one thing;\n"))[0].startswith("6 abilities")
    assert counted(TEXT.replace("- do", "do"))[0].startswith("0 abilities")
    assert counted(TEXT.replace("| $a$ | $a'$ | a letter |\n", ""))[0].startswith("4 rows of notation")
    assert "x-ex-1: fold its solution" in exercises(TEXT.replace(":class: dropdown", "", 1))[0]
    assert exercises(TEXT.replace("{solution-start} x-ex-1", "{solution-start} other")) == ["x-ex-1 has no solution"]
    assert exercises(TEXT.replace("●●●", "●●")) == ["no exercise of level ●●●: code, change a hypothesis, open"]
    assert "0 exercises" in exercises("")[0]
    assert quiz(QUIZ) == [] and quiz("")
    assert "2 quiz questions, 3 folded answers" in quiz(QUIZ.replace("**3.**", ""))[0]
    assert "3 quiz questions, 2 folded answers" in quiz(QUIZ.replace("{dropdown}", "{note}", 1))[0]


def test_faults_of_cells_and_costs_are_found():
    def chapter(number: int = 12, lines: int = 3, **tags: int):
        made = [nbformat.v4.new_code_cell("\n".join(["x = 1"] * lines), metadata={"tags": []}) for _ in range(number)]
        for tag, several in {CHECKED: 3, "certificate": 1, "control": 1, **tags}.items():
            for cell in made[:several]:
                cell.metadata["tags"].append(tag)
        return nbformat.v4.new_notebook(cells=made)

    assert cells(chapter(), "x") == []
    assert "8 code cells" in cells(chapter(8), "x")[0] and "19 code cells" in cells(chapter(19), "x")[0]
    assert "7 lines in the median" in cells(chapter(lines=7), "x")[0]
    assert "a code cell of 21 lines" in cells(chapter(lines=21), "x")[1]
    assert "2 cells are tagged" in cells(chapter(**{CHECKED: 2}), "x")[0]
    for tag in MARKS:
        assert f"no cell is tagged {tag}" in cells(chapter(**{tag: 0}), "x")[0]

    run = {"cpu_seconds": 12.0, "cores": 2, "device": "CPU", "date": "2026-01-01", "version": "0.1", "certificates": [2, 2]}
    assert costs("x", 1000, {"x": run}) == []
    assert "under 1000000" in costs("x", BYTES, {"x": run})[0]
    assert "make execute" in costs("x", 1000, {})[0]
    assert "its record lacks date" in costs("x", 1000, {"x": {key: value for key, value in run.items() if key != "date"}})[0]
    assert "61 s of CPU" in costs("x", 1000, {"x": run | {"cpu_seconds": 61}})[0]
    assert "1 of 2 certificates" in costs("x", 1000, {"x": run | {"certificates": [1, 2]}})[0]
