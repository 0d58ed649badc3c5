"""Quizzes: from book/data/quizzes.yml into the chapters, between two comments, with every answer folded.

A chapter that wants its quiz holds the lines <!-- quiz --> and <!-- /quiz -->; `python tools/quizzes.py` writes what stands
between them, and a test fails when a chapter and the data differ.  No script and no server: the reader opens the answer.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "book" / "data" / "quizzes.yml"
PLACE = re.compile(r"(?<=^<!-- quiz -->\n).*?(?=^<!-- /quiz -->$)", re.M | re.S)


def quizzes() -> dict[str, list[dict]]:
    """All questions: chapter (``foundations/inverse-problems``) to its list."""
    import yaml

    return yaml.safe_load(DATA.read_text(encoding="utf-8"))


def quiz_block(chapter: str) -> str:
    """The Markdown of one chapter's quiz.  Raises ``ValueError`` for a chapter without questions."""
    known = quizzes()
    if chapter not in known:
        raise ValueError(f"chapter: expected one of {', '.join(known)}, got {chapter!r}")
    blocks = []
    for number, entry in enumerate(known[chapter], start=1):
        choices = "\n".join(f"- ({letter}) {text}" for letter, text in zip("abcd", entry["choices"], strict=False))
        answer = f":::{{dropdown}} Answer to question {number}\n**({entry['correct']})** {entry['explanation']}\n:::"
        blocks.append(f"**{number}.** {entry['question']}\n\n{choices}\n\n{answer}\n")
    return "\n" + "\n".join(blocks) + "\n"


def with_quiz(text: str, chapter: str) -> str:
    """The chapter's text with its quiz as the data have it; without the two comments, the text itself."""
    return PLACE.sub(lambda _: quiz_block(chapter), text)


def main() -> int:
    """Write every quiz that has a place; name what changed."""
    for chapter in quizzes():
        path = (ROOT / "book" / chapter).with_suffix(".md")
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        new = with_quiz(text, chapter)
        if new != text:
            path.write_text(new, encoding="utf-8", newline="\n")
            print(f"{path.relative_to(ROOT)}: quiz written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
