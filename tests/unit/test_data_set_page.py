"""The page of a data set, made from the description that a run publishes."""

from __future__ import annotations

from typing import Any

import pytest

from align.report import Report
from align.report.data_set_page import add_sources


def build_source(name: str, weight: float, train: int, test: int) -> dict[str, Any]:
    splits = {side: {"rows": rows, "distinct": rows} for side, rows in (("train", train), ("test", test))}
    counts = {"read": 10, "kept": 10}
    return {"name": name, "weight": weight, "counts": counts, "splits": splits, "clean": []}


def test_a_source_that_is_only_measured_on_has_a_column_beside_others(monkeypatch: pytest.MonkeyPatch):
    tables = []
    monkeypatch.setattr(Report, "table", lambda self, headers, rows, name: tables.append((headers, rows)))
    add_sources(Report("A data set"), [build_source("chats", 1.0, 6, 2), build_source("probes", 0.0, 0, 7)])
    headers, rows = tables[-1]
    assert headers == ("rows", "chats", "probes")
    cells = {row[0]: row[1:] for row in rows}
    assert cells["read"] == (10, 10)
    assert cells["not in the mixture"] == (-2, 0)
    assert cells["only measured on"] == (0, -3)
