"""What the first rows of a source are taken for, before all of them are read."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

from align.data.read.records import ready_rows
from align.data.read.rows import placed_rows
from align.data.read.shapes import shape_of
from align.data.sets.source import Source
from align.errors import InputError

FIRST = 100
"""Rows that are looked at."""


def recognised(source: Source) -> dict[str, Any]:
    """How many of the first `rows` have which of the `shapes`, and the `columns` that hold something, as a source's
    `columns` name them. Rows that cannot be read are left to whoever reads all. Votes and the corpus have no columns.
    """
    if source.votes or not source.path:
        return {"rows": 0, "shapes": {}, "columns": []}
    shapes, columns = Counter[str](), dict[str, None]()
    try:
        for row in islice(ready_rows(placed_rows(source.path), source.rules), FIRST):
            if row.error is None and (name := shape_of(row.data)):
                shapes[name] += 1
                columns |= dict.fromkeys(str(name) for name, value in row.data.items() if value is not None)
    except InputError:  # it is told when all rows are read, with what was read before it
        pass
    return {"rows": shapes.total(), "shapes": dict(shapes.most_common()), "columns": [*columns]}
