"""How nbval compares a chapter: what a reader sees printed, not the sixteen digits that `glue` hands to the prose.

Glued numbers are shown rounded; their last digits differ from one processor to the next, and assertions carry tolerances.
"""

GLUED = ("application/papermill.record/text/plain", "application/papermill.record/text/html")


def pytest_itemcollected(item):
    """Leave glued values out of the comparison of every notebook."""
    notebook = item.parent
    if not set(GLUED) <= set(notebook.skip_compare):
        notebook.skip_compare = (*notebook.skip_compare, *GLUED)
