"""Steps of `stage=data` that removed much of a source, with examples of what they removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from align.data.sets.account import LEFT_OUT
from align.data.sets.evidence import row_text, shown_rows
from align.data.sets.funnel import Funnel
from align.data.sets.spool import Rows

MUCH = 0.2
"""The share of a source from which on a step's removals are a loss."""
EXAMPLES = 3
"""Rows that are shown of each loss."""

Loss = dict[str, Any]
"""`source`, `step`, `removed` and `of` (rows of the source that came to the step), and `examples` (texts)."""


def find_read_losses(
    names: Sequence[str], accounts: Sequence[Mapping[str, Any]], hide: Callable[[str], str]
) -> list[Loss]:
    """Return the losses of reading and cleaning.

    Args:
        accounts: of the sources, see `align.data.sets.gather`.
        hide: masks personal data in a text.
    """
    losses = list[Loss]()
    for name, account in zip(names, accounts, strict=True):
        counts = account["counts"]
        read = counts["read"] + sum(counts.get(key, 0) for key in LEFT_OUT)
        causes = [f"{cause['field']}={cause['value']}: {cause['problem']}" for cause in account["bad_rows"]]
        steps: list[tuple[str, int, int, list[str]]] = [
            ("refused", counts.get("skipped_rows", 0), read, [hide(cause) for cause in causes]),
            ("undecided", counts.get("dropped_undecided", 0), read, []),
        ]
        for step in account["clean"]:
            texts = [row_text(example["before"]) for example in step["examples"] if example["after"] is None]
            steps.append((f"clean: {step['step']}", step["dropped"], step["seen"], texts))
        losses += [
            {"source": name, "step": step, "removed": removed, "of": of, "examples": texts[:EXAMPLES]}
            for step, removed, of, texts in steps
            if removed > MUCH * of
        ]
    return losses


def find_funnel_losses(funnel: Funnel, step: str, rows: Rows, kind: str, hide: Callable[[str], str]) -> Iterator[Loss]:
    """Yield the losses of the step of the funnel that ended last.

    Args:
        hide: masks personal data in a text.
    """
    before = funnel.before
    after = funnel.steps[step]
    for number, (of, left) in enumerate(zip(before, after, strict=True)):
        if of - left <= MUCH * of:
            continue
        removed = funnel.removed[funnel.source[funnel.removed] == number]
        shown = shown_rows(rows, kind, funnel.names, removed[:EXAMPLES].astype(np.int64), hide)
        yield {
            "source": funnel.names[number],
            "step": step,
            "removed": of - left,
            "of": of,
            "examples": [row["text"] for row in shown],
        }
