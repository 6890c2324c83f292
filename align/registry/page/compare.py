"""Runs side by side, as `stage.action=compare` writes them to a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from align.core.errors import require
from align.registry.comparison import comparison
from align.registry.index import Index
from align.registry.page.run import record_in
from align.registry.page.templating import render

MOST = 60
"""Runs that one view compares; the command line takes more."""


def compare_view(index: Index, root: Path, runs: Sequence[str]) -> Markup:
    """The table, the score against its prices, the curves over each other.

    Raises:
        InputError: there are too few or too many, one is unknown, or one cannot be read.
    """
    from align.registry.comparison_page import page_of  # matplotlib takes a second

    runs = list(dict.fromkeys(runs))
    require(len(runs) > 1, "runs", runs, "are fewer than two", "Choose two or more in the list of runs.")
    remedy = "Choose fewer, or use stage.action=compare."
    require(len(runs) <= MOST, "runs", f"{len(runs)} runs", f"are more than {MOST}", remedy)
    report = page_of(comparison(root, [record_in(index, run) for run in runs]), root)
    return render("compare.html", report=report, runs=runs)
