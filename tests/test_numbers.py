"""A number in a chapter's prose is glued from its run, or it is a constant of its code, the paper's, or excused below.

What can be detected: decimal numbers, and numbers before a unit (dB, %, iterations, seconds ...), that stand typed in the
prose although no code cell of the chapter has that number. Words ("a third") and whole numbers without a unit are not seen.
"""

import re

import nbformat
import pytest
from execute import ROOT, chapters, name_of, read

UNIT = r"dB|decibels?|\\?%|per ?cent|(?:more |further |inner )?(?:iterations?|steps?|epochs?)|s|seconds?|minutes?|times"
TYPED = re.compile(
    rf"(?<![\w.^_{{-])[-–−]?(?P<decimal>\d+\.\d+(?:[eE]-?\d+|\s*\\cdot\s*10\^\{{?-?\d+\}}?)?)(?![\w.]*\d)"
    rf"|(?<![\w.^_{{])(?P<whole>\d[\d,]*)(?:\$|\\,|~|\s)*(?:{UNIT})(?!\w)"
)
IN_CODE = re.compile(r"(?<![\w.])\d[\d_]*\.?\d*(?:[eE][-+]?\d+)?")
# Not prose: glued numbers and other roles, code, comments, addresses; and the tables in which a paper is quoted.
NOT_PROSE = re.compile(r"\{[\w:]+\}`[^`]*`|(?<!`)`[^`\n]+`(?!`)|<!--.*?-->|https?://\S+|Python 3\.\d+", re.S)
QUOTES = re.compile(r"^## Paper (?:and book|versus ours)$.*?(?=^## |\Z)", re.M | re.S)
STUDY = re.compile(r"^\*\*Study time\*\*.*$", re.M)
# (chapter, the words around the number) -> why it may be typed.
EXCUSED = {
    ("foundations/four-solvers", "step $0.99/L$"): "the exercise's instruction; the solution takes the solver's default",
    ("podm/theorems", "$\\mu=0.1$"): "the two-cycle's constants, `odlkit.propositions.podm.two_cycle`",
    ("podm/theorems", "F(x)=0.2"): "the two-cycle's energy, `odlkit.propositions.podm.two_cycle`",
    ("padnet/theorems", "C_E<0.05"): "a hypothesis: any such constant",
    ("padnet/theorems", "1.25\\sqrt{2\\lambda}<|a_i|<2.08"): "the definition of the band, `odlkit.instances.haar_band`",
}


def constants(notebook) -> set[float]:
    """The numbers in the code, also as percentages."""
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    numbers = {float(number.replace("_", "")) for number in IN_CODE.findall(code)}
    return numbers | {round(100 * number, 9) for number in numbers}


def unfenced(text: str) -> str:
    """The text without fenced listings; directives such as theorems and exercises are prose."""
    kept, fences = [], []
    for line in text.splitlines():
        fence = re.match(r"(`{3,}|:{3,})\s*(\S*)", line)
        if fence and fences and fence[1] == fences[-1][0] and not fence[2]:
            fences.pop()
        elif fence and fence[2]:
            fences.append((fence[1], fence[2].startswith("{")))
        elif all(directive for _, directive in fences):
            kept.append(line)
    return "\n".join(kept)


def prose(notebook) -> str:
    """Markdown cells, captions and alternative texts, without what is not prose and without the paper's tables."""
    parts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    for about in (cell.metadata.get("mystnb", {}) for cell in notebook.cells):
        parts += [about.get("image", {}).get("alt", ""), about.get("figure", {}).get("caption", "")]
    return NOT_PROSE.sub("", unfenced(STUDY.sub("", QUOTES.sub("", "\n\n".join(parts)))))


def typed(notebook) -> list[str]:
    """Each number typed in the prose that no code cell has, with the words around it."""
    known, text = constants(notebook), prose(notebook)
    found = []
    for match in TYPED.finditer(text):
        number = (match["decimal"] or match["whole"]).replace(",", "")
        power = re.fullmatch(r"([\d.]+)\s*\\cdot\s*10\^\{?(-?\d+)\}?", number)
        value = float(f"{power[1]}e{power[2]}" if power else number)
        if value not in known:
            found.append(" ".join(text[max(0, match.start() - 40) : match.end() + 40].split()))
    return found


@pytest.mark.parametrize("source", [pytest.param(path, id=name_of(path)) for path in chapters()])
def test_numbers_come_from_the_run(source):
    excuses = [words for chapter, words in EXCUSED if chapter == name_of(source)]
    found = [words for words in typed(read(source)) if not any(excuse in words for excuse in excuses)]
    told = f"book/{name_of(source)}.md: typed, not glued: " + "; ".join(f"“{words}”" for words in found)
    assert not found, f"{told}. Glue it from the run, or excuse it in tests/test_numbers.py with a reason"


@pytest.mark.parametrize("page", ["README.md", "book/intro.md", "book/how-to-use.md"])
def test_pages_without_code_have_no_number_of_their_own(page):
    found = typed(chapter((ROOT / page).read_text(encoding="utf-8")))
    assert not found, f"{page}: typed: {found}. Refer to the register of results instead"


def chapter(text: str, code: str = ""):
    cells = [nbformat.v4.new_markdown_cell(text), nbformat.v4.new_code_cell(code)]
    return nbformat.v4.new_notebook(cells=cells)


@pytest.mark.parametrize(
    "text",
    [
        "The network reaches 31.2 dB.",
        "It gains $2.25$ on average.",
        "after 37 iterations",
        "after $37$ further steps",
        "in 1,200 steps",
        "it takes 14 s on two cores",
        "accepted 93% of the time, 93\\% in TeX",
        "an error of $1.5\\cdot10^{-7}$",
        "```{exercise-start} ●\n:label: a\n```\nReach 31.2 dB.\n```{exercise-end}\n```",
        "````{prf:theorem}\nA gain of 0.7 dB.\n````",
        ":::{admonition} Fine print\n:class: fine-print\n- Only 0.7 dB.\n:::",
        "```bash\nodlkit 1.5\n```\n\nIt gives 31.2 dB.\n\n```python\nx = 2.5\n```",
    ],
)
def test_typed_numbers_are_found(text):
    assert len(typed(chapter(text, "steps = 40"))) == (2 if "TeX" in text else 1)


@pytest.mark.parametrize(
    "text",
    [
        "It reaches {glue:text}`a-psnr:.1f` dB after {glue:text}`a-steps` iterations.",
        "Forty steps of length 0.5, or 40 steps; the weight is $\\lambda = 0.01$, one per cent more is 1%.",
        "**Study time** about 90 minutes. **You need** 2.5 litres.",
        "## Paper and book\n\n| | paper | here |\n| PSNR | 29.3 dB | {glue:text}`x` |\n\n## Exercises",
        "the prior $\\ell_{0.8}$ and {eq}`a-1.5`, see https://example.org/3.25 and `x = 3.25`",
        "```python\nx = 3.25\n```",
        "Theorem 2, Eq. 12, three networks, 32 pairs",
    ],
)
def test_other_numbers_are_not(text):
    assert typed(chapter(text, "steps, tau, lam = 40, 0.5, 1e-2")) == []


def test_captions_count():
    notebook = chapter("", "draw()")
    notebook.cells[1].metadata["mystnb"] = {"figure": {"caption": "It ends at 31.2 dB."}, "image": {"alt": "after 37 steps"}}
    assert len(typed(notebook)) == 2


def test_excuses_are_needed():
    """An excuse whose number is gone, or glued by now, is taken away again."""
    sources = {name_of(path): path for path in chapters()}
    for (name, words), why in EXCUSED.items():
        assert why and any(words in found for found in typed(read(sources[name]))), f"{name}: {words} needs no excuse"
