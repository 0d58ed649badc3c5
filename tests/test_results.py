"""The register of results: the page is what the records say, and every record says where it comes from."""

import copy
import json
import math
import re

import pytest
from results_page import PAGE, PROVENANCE, page, records, section, table

from odlkit.bench import SUITES

FOUND = records()
SMALL = {
    "claim": "A claim",
    "rows": [{"method": "a", "psnr": 30.25, "paper": [29.5, 0.9]}, {"method": "b", "psnr": None, "paper": None}],
    "why_they_differ": "other data",
    "acceptance_rate": 0.5,
    "seconds": 3,
    "command": "odlkit bench small --json book/results/small.json",
    "commit": "0123abc",
    "seeds": [0, 1],
    "versions": {"torch": "2.13.0"},
    "hardware": "two cores",
    "data": {"set": "f" * 64},
}


def faults(name: str, record: dict) -> list[str]:
    """What a record lacks."""
    found = [f"no {key}" for key in ("claim", "rows", "seconds", *PROVENANCE) if key not in record]
    found += [f"{key} is empty" for key in ("claim", "rows", "command", "commit", "versions", "hardware")
              if key in record and not record[key]]  # fmt: skip
    drawn = bool(record.get("seeds"))  # data that are drawn at random need their seeds, and no file
    found += ["data is empty"] if not record.get("data", True) and not drawn else []
    found += [] if name in str(record.get("command")) else ["the command names another suite"]
    prints = "paper" in record or any(row.get("paper") for row in record.get("rows", []))
    found += ["a figure of the paper, and no word on why they differ"] if prints and "why_they_differ" not in record else []
    for kind in ("data", "weights"):
        sums = record.get(kind, {}).items()
        found += [f"{kind}: {key} has no SHA-256" for key, value in sums if not re.fullmatch("[0-9a-f]{64}", value)]
    return found + _not_finite(record)


def _not_finite(value, place: str = "record") -> list[str]:
    if isinstance(value, dict):
        return [fault for key, item in value.items() for fault in _not_finite(item, f"{place}.{key}")]
    if isinstance(value, list):
        return [fault for i, item in enumerate(value) for fault in _not_finite(item, f"{place}[{i}]")]
    return [f"{place} is not finite"] if isinstance(value, float) and not math.isfinite(value) else []


@pytest.mark.parametrize("name", FOUND)
def test_record(name):
    assert name in SUITES
    assert not faults(name, FOUND[name])


def test_the_page_is_made_from_the_records():
    assert PAGE.read_text(encoding="utf-8") == page(FOUND), "book/results.md is stale: run make pages"
    assert page(json.loads(json.dumps(FOUND))) == page(FOUND)


def test_every_row_and_figure_of_a_record_is_on_the_page():
    text = section("small", SMALL)
    assert "| a | 30.25 | 29.5 / 0.9 |" in text
    assert "| b | – | – |" in text
    assert "other data" in text and "acceptance rate: 0.5" in text
    for key in PROVENANCE:
        assert f"\n{key}\n: " in text


def test_a_table_of_the_paper_is_put_beside_ours():
    rows: list[dict] = [
        {"p": 1, "method": "ADMM", "error": 1.0},
        {"p": 0, "method": "ADMM", "error": 2.0},
        {"p": None, "method": "net"},
    ]
    paper = [{"p": 1, "ADMM": [29, 1.3], "net": [6, 0.4]}, {"p": 0, "ADMM": [40, 1.7], "net": [6, 0.4]}]
    text = section("small", {**SMALL, "rows": rows, "paper": paper})
    assert "| 1 | ADMM | 1.0 | 29 / 1.3 |" in text
    assert "| 0 | ADMM | 2.0 | 40 / 1.7 |" in text
    assert "| – | net | – | 6 / 0.4 |" in text
    assert "29 / 1.3" not in section("small", {**SMALL, "rows": [{"data": "set3c", **rows[0]}], "paper": paper})


def test_cells_cannot_break_the_table():
    assert table([{"a": "x|y", "b": {"c": [1, None]}}]).splitlines()[-1] == "| x\\|y | c: 1 / – |"


def test_faults_are_found():
    assert not faults("small", SMALL)
    for key in PROVENANCE:
        record = copy.deepcopy(SMALL)
        del record[key]
        assert faults("small", record), key
    spoilt = [
        ("other", SMALL),
        ("small", SMALL | {"rows": []}),
        ("small", SMALL | {"rows": [{"psnr": math.nan}]}),
        ("small", SMALL | {"data": {"set": "abc"}}),
        ("small", {key: value for key, value in SMALL.items() if key != "why_they_differ"}),
    ]
    assert all(faults(name, record) for name, record in spoilt)
