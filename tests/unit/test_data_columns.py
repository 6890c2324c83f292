"""Tests that records survive a round trip through Arrow columns."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.core.types import Conversation, Feedback, Message, Preference, Record
from align.data.read.content import DOCUMENTS, FEEDBACK, PREFERENCES
from align.data.sets.record_columns import columns_to_records, count_turns, join_record_texts, records_to_columns

TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
TURN = st.builds(Message, st.sampled_from(["system", "user", "assistant"]), TEXT, st.booleans())
TURNS = st.lists(TURN, min_size=1, max_size=4).map(tuple)
PAIRS = st.builds(
    Preference,
    TURNS,
    TURNS,
    TURNS,
    id=TEXT,
    group_id=TEXT,
    margin=st.none() | st.floats(-9, 9),
    annotator=TEXT,
    source=TEXT,
    strength=st.none() | st.integers(0, 9),
    created_at=TEXT,
    chosen_ended=st.booleans(),
    rejected_ended=st.booleans(),
    scorer=TEXT,
)
SAID = Conversation((Message("system", "S"), Message("user", "u"), Message("assistant", "a"), Message("user", "v")))


def pair_or_none(make: object) -> object:
    return make


def build_table(kind: str, records: list[Record]) -> pa.Table:
    return pa.table(records_to_columns(kind, records))


@given(st.lists(TURNS | TEXT, max_size=6), st.integers(0, 6))
def test_documents_come_back(said: list[tuple[Message, ...] | str], start: int):
    records: list[Record] = [
        document if isinstance(document, str) else Conversation(document, f"x:{i}") for i, document in enumerate(said)
    ]
    columns = build_table(DOCUMENTS, records)
    names = [f"x:{i}" for i in range(len(records))]
    assert columns_to_records(DOCUMENTS, columns, names) == records
    assert columns_to_records(DOCUMENTS, columns.slice(start), names[start:]) == records[start:]


@given(st.lists(st.tuples(TURNS, TURNS, st.booleans(), TEXT.filter(bool)), max_size=4))
def test_feedback_comes_back(said: list[tuple[tuple[Message, ...], tuple[Message, ...], bool, str]]):
    records: list[Record] = [Feedback(*fields) for fields in said]
    assert columns_to_records(FEEDBACK, build_table(FEEDBACK, records), ["?"] * len(records)) == records


@given(st.lists(TURNS.flatmap(lambda _: st.deferred(lambda: VALID)), max_size=4))
def test_pairs_come_back(records: list[Record]):
    assert columns_to_records(PREFERENCES, build_table(PREFERENCES, records), ["?"] * len(records)) == records


VALID = (
    st.tuples(TURNS, TURNS, TURNS)
    .filter(lambda turns: turns[1] != turns[2])
    .flatmap(
        lambda turns: st.builds(
            Preference,
            st.just(turns[0]),
            st.just(turns[1]),
            st.just(turns[2]),
            id=TEXT,
            group_id=TEXT,
            margin=st.none() | st.floats(-9, 9),
            annotator=TEXT,
            source=TEXT,
            strength=st.none() | st.integers(0, 9),
            guideline_version=TEXT,
            created_at=TEXT,
            chosen_ended=st.booleans(),
            rejected_ended=st.booleans(),
            scorer=TEXT,
        )
    )
)


@pytest.mark.parametrize(("over", "said"), [("both", "u\na\nv"), ("prompts", "u\nv"), ("answers", "a")])
def test_what_is_compared(over: str, said: str):
    records: list[Record] = [SAID, "plain\ntext"]
    assert join_record_texts(DOCUMENTS, build_table(DOCUMENTS, records), over).to_pylist() == [said, "plain\ntext"]
    assert join_record_texts(DOCUMENTS, build_table(DOCUMENTS, records).slice(1), over).to_pylist() == ["plain\ntext"]


def test_a_pair_is_compared_as_a_whole():
    pair = Preference(
        (Message("system", "S"), Message("user", "q")), (Message("assistant", "y"),), (Message("assistant", "n"),)
    )
    assert join_record_texts(PREFERENCES, build_table(PREFERENCES, [pair])).to_pylist() == ["q\ny\nn"]
    assert count_turns(PREFERENCES, build_table(PREFERENCES, [pair])).tolist() == [4]


def test_turns_are_counted():
    counts = count_turns(DOCUMENTS, build_table(DOCUMENTS, [SAID, "plain"]).slice(0))
    assert counts.dtype.kind == "i"
    assert np.array_equal(counts, [4, 1])
