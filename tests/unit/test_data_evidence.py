"""Tests that example rows of a report are masked before they are cut, so that no part of a secret is left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from align.data.read.content import DOCUMENTS
from align.data.sets.record_columns import records_to_columns
from align.data.sets.report import MAX_CHARACTERS, ExampleWriter
from align.data.sets.spool import Spool, SpoolRows


def test_a_long_row_is_cut_behind_what_is_hidden(tmp_path: Path) -> None:
    long_text = "x" * (MAX_CHARACTERS - 5) + "secret" + "y" * 5000
    columns = records_to_columns(DOCUMENTS, ["short", long_text])
    batch = pa.RecordBatch.from_pydict({**columns, "source": pa.array([0, 0]), "row": pa.array([1, 2])})
    Spool(tmp_path).write("000", iter([batch]), [batch.schema], {})
    rows = SpoolRows(Spool(tmp_path), DOCUMENTS, ["s"])
    writer = ExampleWriter(tmp_path, rows, np.zeros(2, np.int64), lambda text: text.replace("secret", "[ID]"))
    examples = writer.describe_rows(np.array([1, 0]))
    assert examples[0]["row"] == "s:2"
    assert len(examples[0]["text"]) == MAX_CHARACTERS
    assert "secr" not in examples[0]["text"]
    assert examples[1] == {"row": "s:1", "text": "short"}
