"""Quizzes: complete data, text without scripts, and chapters that hold what the data say."""

import re

import pytest
from execute import BOOK, chapters
from quizzes import DATA, PLACE, quiz_block, quizzes, with_quiz

QUIZZES = quizzes()
CHAPTERS = {path.relative_to(BOOK).with_suffix("").as_posix(): path.read_text(encoding="utf-8") for path in chapters()}


@pytest.mark.parametrize("chapter", QUIZZES)
def test_data(chapter):
    """Three questions of three choices, one right, each explained; and no two alike."""
    assert chapter in CHAPTERS and len(QUIZZES[chapter]) == 3
    for entry in QUIZZES[chapter]:
        assert set(entry) == {"question", "choices", "correct", "explanation"}
        assert len(entry["choices"]) == len(set(entry["choices"])) == 3 and entry["correct"] in "abc"
        assert entry["question"].count("?") == 1 and len(entry["explanation"].split()) >= 8
        for text in (entry["question"], entry["explanation"], *entry["choices"]):
            assert text.count("$") % 2 == 0 and text.count("`") % 2 == 0 and "\n" not in text and "\x07" not in text


def test_all_questions_differ_and_no_letter_is_a_good_guess():
    entries = [entry for quiz in QUIZZES.values() for entry in quiz]
    assert len({entry["question"] for entry in entries}) == len(entries)
    letters = [entry["correct"] for entry in entries]
    assert max(letters.count(letter) for letter in "abc") <= len(letters) / 2
    assert all(len({entry["correct"] for entry in quiz}) >= 2 for quiz in QUIZZES.values())


def test_block_folds_every_answer_and_needs_no_script():
    block = quiz_block("foundations/four-solvers")
    assert re.findall(r"^:::.*$", block, re.M) == [f":::{{dropdown}} Answer to question {n}" if i == 0 else ":::"
                                                   for n in (1, 2, 3) for i in range(2)]  # fmt: skip
    shown = re.sub(r"^:::\{dropdown\}.*?^:::$", "", block, flags=re.M | re.S)
    for entry in QUIZZES["foundations/four-solvers"]:
        assert entry["question"] in shown and all(choice in shown for choice in entry["choices"])
        assert entry["explanation"] in block and entry["explanation"] not in shown
    assert not re.search(r"<[a-zA-Z/!]|http|\{(raw|code-cell)", block)
    with pytest.raises(ValueError, match="chapter: expected one of .*, got 'none'"):
        quiz_block("none")


def test_writing_is_repeatable_and_touches_nothing_else():
    chapter = "padnet/padnet"
    text = "# Title\n\n## Quiz\n\n<!-- quiz -->\nold\n<!-- /quiz -->\n\n## Take-away\n"
    once = with_quiz(text, chapter)
    assert once.startswith("# Title\n\n## Quiz\n\n<!-- quiz -->\n\n**1.** ")
    assert once.endswith(":::\n\n<!-- /quiz -->\n\n## Take-away\n")
    assert with_quiz(once, chapter) == once and "old" not in once
    assert with_quiz("# No quiz here\n", chapter) == "# No quiz here\n"
    empty = "<!-- quiz -->\n<!-- /quiz -->\n"
    assert quiz_block(chapter) in with_quiz(empty, chapter)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter_holds_its_quiz_as_the_data_have_it(chapter):
    text = CHAPTERS[chapter]
    assert text.count("<!-- quiz -->") == text.count("<!-- /quiz -->") == len(PLACE.findall(text)) <= 1
    if PLACE.search(text):
        assert with_quiz(text, chapter) == text, f"{chapter}: its quiz is not that of {DATA.name}: run tools/quizzes.py"
