"""The pages made from data are current, and the data are true: tests exist, terms occur, equations have code and tests."""

import ast
import copy
import json
import re
from pathlib import Path

import pages
import pytest
import yaml
from equation_map import Mark, faults, in_code, in_tests, tags

from odlkit import certify, data

ROOT, BOOK = pages.ROOT, pages.BOOK
KEYS = ("paper", "place", "printed", "should_read", "status")
STATUS = ("verified by test", "by inspection", "only seen in the extracted text")


@pytest.mark.parametrize("name", pages.PAGES)
def test_page_is_current(name):
    stored = (BOOK / f"{name}.md").read_text(encoding="utf-8")
    assert stored == pages.PAGES[name](), f"book/{name}.md is stale: run make pages"


@pytest.mark.parametrize("path", pages.chapters(), ids=lambda path: path.relative_to(BOOK).with_suffix("").as_posix())
def test_notation_boxes_are_current(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("<!-- notation-box ") == text.count("<!-- /notation-box -->") == len(pages.BOX.findall(text))
    assert pages.with_boxes(text, path.name) == text, f"the notation box of {path.name} is stale: run make pages"


def pages_of_the_book() -> set[str]:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    return {toc["root"], *(entry["file"] for part in toc["parts"] for entry in part["chapters"])}


# -- errata


def functions(file: Path) -> set[str]:
    return {node.name for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}


def erratum_faults(entry: dict) -> list[str]:
    where = f"book/data/errata.yml, {entry.get('place')}: "
    found = [f"no {key}" for key in KEYS if not entry.get(key)]
    found += [f"unknown {key}" for key in set(entry) - {*KEYS, "note", "evidence"}]
    if entry.get("status") not in STATUS:
        found.append(f"status {entry.get('status')!r}, expected one of {STATUS}")
    if entry.get("status") == "verified by test" and not entry.get("evidence"):
        found.append("verified by test, and no test is named")
    for place in entry.get("evidence", []):
        file, name = (place.split("::") + [""])[:2]
        name = re.sub(r"\[.*\]$", "", name)
        path = (ROOT / "tests" if file.endswith(".py") else BOOK) / file
        if not path.is_file():
            found.append(f"evidence {place}: there is no file {file}")
        elif file.endswith(".py") and not (name.startswith("test_") and name in functions(path)):
            found.append(f"evidence {place}: {file} has no test of that name; name one that fails if we are wrong")
        elif file.endswith(".md") and f":label: {name}\n" not in path.read_text(encoding="utf-8"):
            found.append(f"evidence {place}: {file} has nothing labelled {name}")
    return [where + fault for fault in found]


def test_every_erratum_has_its_evidence():
    entries = pages.load("errata")
    assert len(entries) >= 14
    found = [fault for entry in entries for fault in erratum_faults(entry)]
    assert not found, "\n".join(found)
    labels = re.findall(r"^\((erratum-.*)\)=$", (BOOK / "errata.md").read_text(encoding="utf-8"), re.M)
    assert len(set(labels)) == len(entries)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"evidence": ["test_certify.py::test_that_nobody_wrote"]}, "has no test of that name"),
        ({"evidence": ["test_certify.py"]}, "has no test of that name"),
        ({"evidence": ["test_nothing.py::test_a"]}, "there is no file"),
        ({"evidence": ["padnet/theorems.md::thm-ex-99"]}, "nothing labelled"),
        ({"evidence": []}, "no test is named"),
        ({"status": "surely"}, "expected one of"),
        ({"should_read": ""}, "no should_read"),
        ({"comment": "a"}, "unknown comment"),
    ],
)
def test_a_tampered_erratum_is_refused(change, message):
    good = next(entry for entry in pages.load("errata") if entry["status"] == "verified by test")
    assert erratum_faults(good) == []
    (fault,) = erratum_faults(good | change)
    assert message in fault and good["place"] in fault


# -- notation


def test_notation_is_complete():
    entries = pages.load("notation")
    allowed = {"key", "symbol", "code", "meaning", "range", "literature", *pages.PAPERS}
    assert len({entry["key"] for entry in entries}) == len(entries) >= 30
    for entry in entries:
        assert {"key", "symbol", "code", "meaning", "range"} <= set(entry) <= allowed, entry["key"]
        assert entry["symbol"] and entry["meaning"], entry["key"]
        assert set(entry) & {"literature", *pages.PAPERS}, f"{entry['key']}: nobody writes it otherwise"
        assert not any("|" in (value or "") for value in entry.values()), f"{entry['key']}: a stroke would break the box"


def test_code_names_of_the_notation_exist():
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "odlkit").rglob("*.py"))
    for entry in pages.load("notation"):
        for word in re.findall(r"[A-Za-z_]+", (entry["code"] or "").split(" (")[0]):
            assert re.search(rf"\b{word}\b", text), f"book/data/notation.yml, {entry['key']}: odlkit has no {word}"


def test_a_box_is_written_between_its_comments_and_only_there():
    text = "# A\n\n<!-- notation-box PADNet: R, nu -->\n\nold\n\n<!-- /notation-box -->\n\nafter old\n"
    new = pages.with_boxes(text)
    assert new.startswith("# A\n\n<!-- notation-box PADNet: R, nu -->\n\n:::{admonition}")
    assert new.endswith("\n\nafter old\n")
    assert "| $R$ | $r$ | prior |\n| $\\nu$ | $\\lambda$ | scaled dual" in new and new.count("old") == 1
    assert pages.with_boxes(new) == new
    assert pages.with_boxes(text.replace("\n\nold", "")) == new


@pytest.mark.parametrize("request_", ["PADNet: nonsense", "DGUNet: nu", "Nobody: x"])
def test_a_box_that_asks_for_what_is_not_there_is_refused(request_):
    with pytest.raises(ValueError, match=r"a\.md: the notation box asks for .* which book/data/notation.yml does not have"):
        pages.with_boxes(f"<!-- notation-box {request_} -->\n\n<!-- /notation-box -->\n", "a.md")


# -- glossary


def test_glossary_terms_occur_where_they_are_introduced():
    entries = pages.load("glossary")
    assert len({entry["term"] for entry in entries}) == len(entries) >= 50
    for entry in entries:
        text = " ".join((BOOK / f"{entry['at']}.md").read_text(encoding="utf-8").lower().split())
        assert {"term", "at", "means"} <= set(entry) <= {"term", "at", "means", "as"}, entry
        word = entry.get("as", entry["term"]).lower()
        assert word in text, f"book/data/glossary.yml: {entry['at']} has no {word!r}: correct `at`, or name the word in `as`"


def test_terms_used_in_chapters_are_in_the_glossary():
    known = {entry["term"].lower() for entry in pages.load("glossary")}
    for path in pages.chapters():
        for term in re.findall(r"\{term\}`(?:[^`<]*<)?([^`<>]+)>?`", path.read_text(encoding="utf-8")):
            assert term.strip().lower() in known, f"{path.name}: {{term}}`{term}` is not in book/data/glossary.yml"


# -- certificates


RECORD = json.loads(pages.RECORD.read_text(encoding="utf-8"))


def test_every_proposition_is_on_the_page_with_every_inequality():
    words = pages.load("certificates")
    assert [entry["name"] for entry in RECORD["certificates"]] == list(certify.NAMES) == list(words), "run make certificates"
    for entry in RECORD["certificates"]:
        names = {c["name"] for run in (*entry["details"], *entry["to_the_end"]) for c in run["checks"]}
        assert names == set(words[entry["name"]]["checks"]), f"book/data/certificates.yml: correct {entry['name']}"
        chapter = (BOOK / f"{words[entry['name']]['chapter']}.md").read_text(encoding="utf-8")
        assert f":label: {words[entry['name']]['statement']}\n" in chapter
        assert entry["holds"] and all(control["violates"] for control in entry["controls"])


def test_the_record_says_where_it_comes_from():
    assert all(RECORD[key] for key in ("command", "commit", "versions", "hardware", "threads"))
    assert not RECORD["commit"].endswith("+"), "recorded with changes that no commit holds: commit, then make certificates"


def test_a_failure_would_be_seen_on_the_page():
    entry = copy.deepcopy(RECORD["certificates"][0])
    words = pages.load("certificates")[entry["name"]]
    bad = ("**fails on some run**", "**does not fail**")
    assert not any(sign in pages.proposition(entry, words) for sign in bad)
    entry["holds"] = entry["controls"][0]["violates"] = False
    assert all(sign in pages.proposition(entry, words) for sign in bad)


# -- equations


REGISTER, CODE, TESTS = pages.load("equations"), in_code(ROOT), in_tests(ROOT)


def test_every_equation_has_code_and_a_test_or_a_reason():
    found = faults(REGISTER, CODE, TESTS)
    assert not found, "\n".join(found)


def test_the_register_of_padnet_has_every_number():
    items = [entry["item"] for entry in REGISTER["PADNet"]["items"]]
    assert len(set(items)) == len(items)
    assert {f"({n})" for n in range(1, 35)} <= set(items)
    assert {"Theorem 1", "Theorem 2", "Condition 1", "Condition 2", "Algorithm 1", "Algorithm 2"} <= set(items)
    for part in REGISTER.values():
        for entry in part["items"]:
            assert {"item", "what", "place"} <= set(entry) <= {"item", "what", "place", "reason"}, entry
            assert all(entry.values()), entry


def test_tags_are_read_to_the_end_of_the_sentence():
    text = "One.  Eq: PADNet (7), (12) at ``tau = (9)``, Algorithm 1; PODM (5),\n    repaired.  Not (99).\n\n    Theorem 3."
    assert list(tags(text)) == [("PADNet", "(7)"), ("PADNet", "(12)"), ("PADNet", "Algorithm 1"), ("PODM", "(5)")]
    assert list(tags("Eq: (7).")) == [("", "(7)")] and list(tags("Eq: PADNet.")) == [("PADNet", "")]
    assert list(tags("Eq. 7")) == []


def small(tmp_path: Path, code: str, test: str = "") -> tuple[list[Mark], list[Mark]]:
    """A package with one function and one test, with these docstrings."""
    for folder in ("odlkit", "tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / "odlkit" / "a.py").write_text(f'"""A."""\n\n\ndef f():\n    """{code}"""\n\n\ndef _g():\n    """G."""\n')
    (tmp_path / "tests" / "test_a.py").write_text(f'def test_f():\n    """{test}"""\n')
    return in_code(tmp_path), in_tests(tmp_path)


LIST = {"PADNet": {"items": [{"item": "(7)"}, {"item": "(8)", "reason": "a definition"}]}}


@pytest.mark.parametrize(
    "code, test, message",
    [
        ("Eq: PADNet (7).", "Eq: PADNet (7).", None),
        ("Eq: PADNet (7), (99).", "Eq: PADNet (7).", "f names PADNet (99), which book/data/equations.yml does not list"),
        ("Eq: PADNet (7).", "Eq: PADNet (7), (98).", "test_f names PADNet (98), which book/data/equations.yml does not"),
        ("F.", "", "nothing implements it: write `Eq: PADNet (7)` into the docstring of the function"),
        ("Eq: PADNet (7).", "", "PADNet (7) has a function and no test: write `Eq: PADNet (7)` into"),
        ("Eq: PADNet (7), (8).", "Eq: PADNet (7), (8).", "remove one of them"),
        ("Eq: PADNet (7). Eq: the set Omega.", "Eq: PADNet (7).", "has an `Eq:` line without a paper"),
    ],
)
def test_a_broken_tag_is_refused(tmp_path, code, test, message):
    found = faults(LIST, *small(tmp_path, code, test))
    assert found == [] if message is None else len(found) == 1 and message in found[0]


def test_a_private_function_cannot_be_linked(tmp_path):
    marks, _ = small(tmp_path, "F.")
    (tmp_path / "odlkit" / "a.py").write_text('"""A."""\n\n\ndef _g():\n    """Eq: PADNet (7)."""\n')
    assert any("is private" in fault for fault in faults(LIST, in_code(tmp_path), []))


def test_links_of_the_map_lead_into_the_reference():
    """Every function on the map is documented by name, so that the reference and its listing have a target for it."""
    text = "".join(path.read_text(encoding="utf-8") for path in BOOK.glob("api*.md"))
    listed = re.findall(r"automodule:: ([\w.]+)", text)
    for mark in CODE:
        assert any(mark.name.startswith(f"{module}.") for module in listed), f"book/api*.md do not document {mark.name}"


# -- data cards


def test_every_set_that_the_code_reads_has_a_card():
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "odlkit").rglob("*.py"))
    read = {name for name in data.registry() if f'"{name}"' in code}
    cards = pages.load("data-cards")
    assert read == set(cards) - {"samples"}, "book/data/data-cards.yml and the sets that odlkit names are not the same"
    assert set(cards["samples"]) == set(data.SAMPLES)
    text = pages.data_cards()
    for name in data.registry():
        assert f"### {name}\n" in text if name in read else f"`{name}`" in text
    assert all(data.checksum(name)[:16] in text for name in read)
