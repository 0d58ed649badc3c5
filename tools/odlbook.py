"""Sphinx extension of the book: under each chapter's title the badges of its recorded run, from ``book/runtimes.json``; and
the page at the first address, which leads to the landing page.

Nothing here is typed into a chapter, and nothing is written into its notebook, which stays the same byte for byte.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from docutils import nodes

RUNTIMES = Path(__file__).resolve().parent.parent / "book" / "runtimes.json"


def badges(about: dict[str, Any]) -> list[tuple[str, str]]:
    """``(what, value)`` of a recorded run, in the order of the page; certificates only where a chapter has some."""
    held, all_of_them = about["certificates"]
    shown = [(f"CPU time on {about['cores']} cores", f"{about['cpu_seconds']:.0f} s"), ("device", about["device"])]
    shown += [("certificates", f"{held}/{all_of_them}")] if all_of_them else []
    return [*shown, ("last executed", about["date"]), ("odlkit", about["version"])]


def _insert(app, doctree: nodes.document) -> None:
    name = app.env.docname.removeprefix("book/")
    about = app.config.odlbook_runs.get(name)
    title = next(iter(doctree.findall(nodes.title)), None)
    if about is None or title is None:
        return
    row = nodes.container(classes=["odl-badges"])
    for what, value in badges(about):
        row += nodes.inline("", "", nodes.inline(text=what), nodes.strong(text=value), classes=["odl-badge"])
    title.parent.insert(title.parent.index(title) + 1, row)


INDEX = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<link rel="icon" href="_static/{icon}">
<meta http-equiv="refresh" content="0; url={page}">
<p><a href="{page}">{title}</a></p>
</html>
"""


def _first_address(app, exception: Exception | None) -> None:
    """Write ``index.html`` with its icon named, or a browser asks the server's root for one and logs that it is missing."""
    if exception is None and app.builder.format == "html":
        page, icon = f"{app.config.master_doc}.html", Path(app.config.html_favicon).name
        text = INDEX.format(title=app.config.html_title, icon=icon, page=page)
        Path(app.outdir, "index.html").write_text(text, encoding="utf-8")


def setup(app) -> dict[str, Any]:
    """Called by Sphinx."""
    runs = json.loads(RUNTIMES.read_text(encoding="utf-8")) if RUNTIMES.exists() else {}
    app.add_config_value("odlbook_runs", runs, "env")  # pages are read again when a run was recorded
    app.connect("doctree-read", _insert)
    app.connect("build-finished", _first_address, priority=100)  # before the redirect that is made where there is no index
    return {"parallel_read_safe": True, "parallel_write_safe": True}
