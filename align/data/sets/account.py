"""What became of every row of every source, for `data.json`, a run's metrics and whoever reads its lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from align.data.sets.contamination import Leaks
from align.data.sets.duplicates import Duplicates
from align.data.sets.funnel import Funnel
from align.data.sets.mix import Mixed
from align.data.sets.source import Source
from align.run import Input

LEFT_OUT = ("skipped_rows", "dropped_undecided")
"""Counts of rows that were read and gave no record, as plain files count them."""


def account_of(
    sources: Sequence[Source], inputs: Mapping[str, Input], shapes: Sequence[Mapping[str, Any]],
    accounts: Sequence[Mapping[str, Any]], funnel: Funnel, test: np.ndarray, train: Mixed,
) -> dict[str, Any]:  # fmt: skip
    """What `data.json` says of the sources and the mixture.

    Args:
        shapes: of each source, see `align.data.sets.recognised`.
        accounts: of each source, see `align.data.sets.gather`.
        test: whether each row is measured on.
        train: how often each row stands there that is trained on.
    """
    said = []
    for i, (source, account) in enumerate(zip(sources, accounts, strict=True)):
        of_it = funnel.source == i
        times = train.times[of_it]
        measured = int((funnel.kept & test & of_it).sum())
        sides = {
            "train": {"rows": int(times.sum()), "distinct": int((times > 0).sum())},
            "test": {"rows": measured, "distinct": measured},
        }
        cleaned = [without_examples(step) for step in account["clean"]]
        said.append({
            "name": source.name, "given": source.given, "digest": inputs[f"sources.{source.name}"].digest,
            "read_as": dict(shapes[i]),
            **source.ids.as_json(), "licence": source.licence or ", ".join(account["licences"]) or None,
            "counts": {**account["counts"], **funnel.of(i)}, "clean": cleaned,
            "bad_rows": without_values(account["bad_rows"]), "metadata": account["metadata"],
            "weight": source.weight, "cap": source.cap,
            "asked": train.asked[i], "got": train.got[i], "splits": sides,
        })  # fmt: skip
    limit = train.limit
    return {"sources": said, "limited_by": None if limit is None else sources[limit].name}


def without_values(causes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was refused and why, without what stood there: a data set is handed on."""
    return [{key: cause[key] for key in ("field", "problem", "count")} for cause in causes]


def found_in(names: Sequence[str], leaks: Leaks) -> list[dict[str, Any]]:
    """Of each evaluation set how many rows were found, by rule."""
    return [
        {"set": name, "hits": dict(Counter(rule for rule, of in zip(leaks.rules, leaks.sets, strict=True) if of == i))}
        for i, name in enumerate(names)
    ]  # fmt: skip


def without_examples(step: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in step.items() if key != "examples"}


def found_of(duplicates: Duplicates, given_away: Leaks, leaks: Leaks) -> dict[str, int]:
    """How many rows were found, whether or not they were left out."""
    exact = int(duplicates.exact.sum())
    return {
        "exact_duplicates": exact, "near_duplicates": len(duplicates.dropped) - exact,
        "contaminated": len(given_away.rows), "shared_with_test": len(leaks.rows),
    }  # fmt: skip


def metrics_of(data: Mapping[str, Any]) -> dict[str, Any]:
    """The headline figures."""
    splits = data["splits"]
    counts = sum((Counter(source["counts"]) for source in data["sources"]), Counter[str]())
    left_out = {key: counts[key] for key in counts if key in LEFT_OUT}
    if scores := data.get("scores"):
        each = scores["sources"].values()
        left_out |= {"dropped_by_score": sum(of.get("dropped", 0) for of in each)}
        left_out |= {"unscored": sum(of["unscored"] for of in each)}
    return {
        "train_rows": splits["train"]["rows"], "train_distinct": splits["train"]["distinct"],
        "test_rows": splits["test"]["rows"],
        "read": counts["read"], **left_out, "dropped_in_cleaning": counts["read"] - counts["kept"],
        **data["found"], "unanswered": counts["unanswered"], "root": data["root"], "ids_root": data["ids_root"],
    }  # fmt: skip
