"""Which rows of a spool give an evaluation set away, by rules that are asked one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from align.data.records.content import DOCUMENTS
from align.data.sets import contamination
from align.data.sets.columns import columns_of, texts_of
from align.data.sets.contamination import COMMON, Evaluations, leaks_of
from align.data.sets.evaluations import Texts
from align.data.sets.spool import Rows, Spool
from align.types import Conversation, Message, Record

LONG = "the quick brown fox jumps over the lazy dog and then sleeps until the next morning comes"
PHRASE = "thank you for your message we will come back to you within one working day"


def chat(asked: str, answer: str, system: str = "") -> Conversation:
    turns = [Message("system", system)] if system else []
    return Conversation((*turns, Message("user", asked), Message("assistant", answer)))


def spooled(folder: Path, records: Sequence[Record]) -> Rows:
    folder.mkdir(exist_ok=True)
    batch = pa.RecordBatch.from_pydict(columns_of(DOCUMENTS, records))
    halves = [batch.slice(0, len(records) // 2), batch.slice(len(records) // 2)]
    spool = Spool(folder)
    spool.write("000", iter(half for half in halves if half.num_rows), [batch.schema], {})
    return Rows(spool)


def against(records: Sequence[Record], near: float | None = 0.7) -> Evaluations:
    table = pa.table(columns_of(DOCUMENTS, records))
    said, asked = (pa.chunked_array([texts_of(DOCUMENTS, table, over)]) for over in ("both", "prompts"))
    return Evaluations([Texts.of_rows(said, asked)], near)


@pytest.mark.parametrize(
    ("row", "evaluation", "rule"),
    [
        (chat("What did it do?", f"Well, {LONG}, I think."), chat("Tell me a story", LONG), "ngram"),
        (chat("What is  2 + 2?", "Four, I think"), chat("what is 2 + 2?", "4"), "question"),
        (chat("hello there", "hi you"), chat("hello", "there hi you"), "exact"),
        (chat("a b c d e f", "g h i j k"), chat("a b c d e f", "g h i j x"), "question"),
        (chat("a b c d e f", "g h i j k l"), chat("z b c d e f", "g h i j k l"), "near"),
        ("plain text of six words here", "Plain text of six words here", "question"),
        (chat("What did it do?", "Nothing"), chat("Tell me", "Nothing at all"), None),
        (chat("one", "two", system=LONG), chat("three", "four", system=LONG), None),
        (Conversation((Message("assistant", "hi"),)), Conversation((Message("assistant", "good day"),)), None),
    ],
)  # fmt: skip
def test_a_rule(tmp_path: Path, row: Record, evaluation: Record, rule: str | None) -> None:
    rows = spooled(tmp_path, [chat("other", "thing"), row, chat("and", "another")])
    found = against([chat("unlike", "anything"), evaluation]).leaks(rows, DOCUMENTS, np.ones(3, bool))
    expected = ([1], [0], [1], [rule]) if rule else ([], [], [], [])
    assert (found.rows.tolist(), found.sets.tolist(), found.where.tolist(), found.rules) == expected


def test_near_is_looked_for_only_where_it_is_asked_for(tmp_path: Path) -> None:
    rows = spooled(tmp_path, [chat("a b c d e f", "g h i j k l")])
    near = [chat("z b c d e f", "g h i j k l")]
    assert against(near, None).leaks(rows, DOCUMENTS, np.ones(1, bool)).rules == []


@pytest.mark.parametrize("sharing", [COMMON, COMMON + 1])
def test_a_phrase_that_many_rows_share_is_no_leak(tmp_path: Path, sharing: int) -> None:
    said = [chat(f"question {i}", f"answer number {i} {i * 7} {i * 13}. {PHRASE}") for i in range(sharing)]
    told = chat("What did it do?", LONG)
    rows = spooled(tmp_path, [*said, told])
    evaluations = against([chat("something else", PHRASE), chat("A story!", f"{LONG} again")], None)
    everything = np.ones(sharing + 1, bool)
    assert evaluations.leaks(rows, DOCUMENTS, everything).rows.tolist() == [*range(sharing + 1)]
    found = evaluations.leaks(rows, DOCUMENTS, everything, phrases=True)
    assert found.rows.tolist() == [*(range(sharing) if sharing <= COMMON else []), sharing]


def test_rows_that_are_not_wanted_are_not_looked_at(tmp_path: Path) -> None:
    rows = spooled(tmp_path, [chat("q", LONG), chat("r", LONG), chat("s", LONG)])
    wanted = np.array([False, True, False])
    assert against([chat("x", LONG)]).leaks(rows, DOCUMENTS, wanted).rows.tolist() == [1]


def test_rows_of_the_spool_itself(tmp_path: Path) -> None:
    rows = spooled(tmp_path, [chat("q", LONG), chat("something else", "entirely"), chat("s", f"Once {LONG}")])
    measured = np.array([True, False, False])
    found = leaks_of(rows, DOCUMENTS, measured, ~measured, 0.7)
    assert (found.rows.tolist(), found.where.tolist()) == ([2], [0])
    assert leaks_of(rows, DOCUMENTS, np.zeros(3, bool), ~measured, 0.7).rules == []


@pytest.mark.parametrize("near", [0.7, None])
def test_slices_find_what_the_whole_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, near: float | None) -> None:
    draw = np.random.default_rng(0)
    base = [" ".join(draw.choice([f"w{i}" for i in range(40)], draw.integers(1, 30))) for _ in range(60)]
    records = []
    for _ in range(450):
        words = base[draw.integers(60)].split()
        words[draw.integers(len(words))] = f"w{draw.integers(40)}"
        asked = base[draw.integers(60)] if draw.random() < 0.1 else f"q {draw.random()}"
        records.append(chat(asked, " ".join(words)))
        said, at = base[draw.integers(60)].split(), draw.integers(1, 3)
        records.append(chat(" ".join(said[:at]), " ".join(said[at:])))
    rows = spooled(tmp_path, records)
    measured = draw.random(900) < 0.2
    monkeypatch.setattr(Rows, "batches", lambda rows, columns: in_pieces(rows.take(np.arange(900), columns), 50))
    whole = leaks_of(rows, DOCUMENTS, measured, ~measured, near)
    monkeypatch.setattr(contamination, "SLICE", 1000)
    assert len([*contamination.slices(rows, DOCUMENTS, measured)]) > 9
    parts = leaks_of(rows, DOCUMENTS, measured, ~measured, near)
    assert {*whole.rules} == {"question", "ngram", "exact", *(["near"] if near else [])}
    assert whole.rules == parts.rules
    for name in ("rows", "sets", "where"):
        assert getattr(whole, name).tolist() == getattr(parts, name).tolist()


def in_pieces(table: pa.Table, most: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    first = 0
    for batch in table.to_batches(most):
        yield first, batch
        first += batch.num_rows
