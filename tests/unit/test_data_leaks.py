"""Which rows of a spool give an evaluation set away, by rules that are asked one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from align.core.types import Conversation, Message, Record
from align.data.dedup.evaluation_overlap import MAX_RUN_ROWS, RULES, HashCounter
from align.data.dedup.questions import EvaluationTexts
from align.data.read.content import DOCUMENTS
from align.data.sets import contamination
from align.data.sets.contamination import LeakFinder, find_split_leaks, prefilter_rows
from align.data.sets.record_columns import join_record_texts, records_to_columns
from align.data.sets.spool import Spool, SpoolRows

LONG = "the quick brown fox jumps over the lazy dog and then sleeps until the next morning comes"
PHRASE = "thank you for your message we will come back to you within one working day"


def chat(asked: str, answer: str, system: str = "") -> Conversation:
    turns = [Message("system", system)] if system else []
    return Conversation((*turns, Message("user", asked), Message("assistant", answer)))


def spooled(folder: Path, records: Sequence[Record], most: int = 1000) -> SpoolRows:
    folder.mkdir(exist_ok=True)
    batch = pa.RecordBatch.from_pydict(records_to_columns(DOCUMENTS, records))
    half, spool = len(records) // 2, Spool(folder)
    for i, some in enumerate((batch.slice(0, half), batch.slice(half))):
        spool.write(f"{i:03d}", iter(pa.Table.from_batches([some]).to_batches(most)), [batch.schema], {})
    return SpoolRows(spool)


def against(records: Sequence[Record], near: float | None = 0.7) -> LeakFinder:
    table = pa.table(records_to_columns(DOCUMENTS, records))
    said, asked = ([join_record_texts(DOCUMENTS, table, over)] for over in ("both", "prompts"))
    return LeakFinder([EvaluationTexts.from_rows(said, asked)], near)


@pytest.mark.parametrize(
    ("row", "evaluation", "rule"),
    [
        (chat("What did it do?", f"Well, {LONG}, I think."), chat("Tell me a story", LONG), "ngram"),
        (chat("What is  2 + 2?", "Four, I think"), chat("what is 2 + 2?", "4"), "question"),
        (chat("hello there", "hi you"), chat("hello", "there hi you"), "exact"),
        (chat("that is 2 + 2", "so it is"), chat("that is", "2 + 2 so it is"), "exact"),
        (chat("that is 2 + 2", "so it is"), chat("that is", "2 - 2 so it is"), None),
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
    found = against([chat("unlike", "anything"), evaluation]).find_leaks(rows, np.ones(3, bool))
    expected = [[1], [0], [1], [RULES.index(rule)]] if rule else [[], [], [], []]
    assert [column.tolist() for column in found] == expected


def test_near_is_looked_for_only_where_it_is_asked_for(tmp_path: Path) -> None:
    rows = spooled(tmp_path, [chat("a b c d e f", "g h i j k l")])
    near = [chat("z b c d e f", "g h i j k l")]
    assert against(near, None).find_leaks(rows, np.ones(1, bool)).rule.tolist() == []


@pytest.mark.parametrize("sharing", [MAX_RUN_ROWS, MAX_RUN_ROWS + 1])
def test_a_phrase_that_many_rows_to_train_on_share_is_no_leak(tmp_path: Path, sharing: int) -> None:
    said = [chat(f"question {i}", f"answer number {i} {i * 7} {i * 13}. {PHRASE}") for i in range(sharing)]
    measured = [chat("something else", PHRASE), chat("A story!", f"{LONG} again"), chat("And you?", f"Oh. {PHRASE}")]
    rows = spooled(tmp_path, [*said, chat("What did it do?", LONG), *measured])
    held_out = np.arange(sharing + 4) > sharing
    found = find_split_leaks(rows, held_out, ~held_out, None)
    assert found.text.tolist() == [*(range(sharing) if sharing <= MAX_RUN_ROWS else []), sharing]


@pytest.mark.parametrize("sharing", [MAX_RUN_ROWS, MAX_RUN_ROWS + 1])
@pytest.mark.parametrize("own", [6, 7])
def test_a_run_that_is_mostly_text_of_many_rows_is_no_leak(tmp_path: Path, sharing: int, own: int) -> None:
    """A row shares the last words of an instruction and some words behind it with a row to measure on."""
    instruction = "answer as a sailor of the old times would"
    words = [*instruction.split()[own - 13 :], *["red", "lamp", "under", "seven", "narrow", "bridges", "once"][:own]]
    others = [chat(f"{i} {instruction}", f"nothing {i} {i * 7} {i * 13}") for i in range(sharing - 1)]
    shared = " ".join(words)
    rows = spooled(tmp_path, [*others, chat(f"one {shared}", "fine day"), chat(f"two {shared}", "good night")])
    held_out = np.arange(sharing + 1) >= sharing
    found = find_split_leaks(rows, held_out, ~held_out, None)
    leaked = sharing == MAX_RUN_ROWS or own == 7
    assert found.text.tolist() == ([sharing - 1] if leaked else [])


def test_rows_that_are_not_wanted_are_not_looked_at(tmp_path: Path) -> None:
    rows = spooled(tmp_path, [chat("q", LONG), chat("r", LONG), chat("s", LONG)])
    wanted = np.array([False, True, False])
    assert against([chat("x", LONG)]).find_leaks(rows, wanted).text.tolist() == [1]


def test_rows_of_the_spool_itself(tmp_path: Path) -> None:
    rows = spooled(tmp_path, [chat("q", LONG), chat("something else", "entirely"), chat("s", f"Once {LONG}")])
    measured = np.array([True, False, False])
    found = find_split_leaks(rows, measured, ~measured, 0.7)
    assert (found.text.tolist(), found.row.tolist()) == ([2], [0])
    assert find_split_leaks(rows, np.zeros(3, bool), ~measured, 0.7).rule.tolist() == []


def letters_of(number: int) -> str:
    return "".join("abcdefghij"[int(digit)] for digit in str(number))


def by_hand(said: list[list[str]], asked: list[str], test: np.ndarray, near: float | None) -> dict[int, str]:
    """Row to train on → the first rule by which it is found, by sets of strings."""

    def runs(words: list[str], width: int) -> set[tuple[str, ...]]:
        return {tuple(words[i : i + width]) for i in range(len(words) - width + 1)}

    train, measured = np.flatnonzero(~test).tolist(), np.flatnonzero(test).tolist()
    many = Counter(run for row in train for run in runs(said[row], 13))
    questions, exact = {asked[row] for row in measured}, {(*said[row],) for row in measured if len(said[row]) < 13}
    parts = Counter(run for row in train for run in runs(said[row], 7))
    shared = {run for run in parts if parts[run] > MAX_RUN_ROWS}
    grams = {run for row in measured for run in runs(said[row], 13) if many[run] <= MAX_RUN_ROWS}
    grams = {run for run in grams if shared.isdisjoint(runs([*run], 7))}
    sets, found = [runs(said[row], 3) for row in measured], dict[int, str]()
    for row in train:
        own = runs(said[row], 3)
        if asked[row] in questions:
            found[row] = "question"
        elif (*said[row],) in exact:
            found[row] = "exact"
        elif runs(said[row], 13) & grams:
            found[row] = "ngram"
        elif near and any(own and len(own & other) / len(own | other) >= near for other in sets):
            found[row] = "near"
    return found


@pytest.mark.parametrize("near", [0.7, None])
def test_however_it_is_sliced_what_is_found_is_what_a_search_by_hand_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, near: float | None
) -> None:
    draw = np.random.default_rng(0)
    vocabulary = [f"w{chr(97 + i // 10)}{chr(97 + i % 10)}" for i in range(40)]  # other digits make other texts
    base = [" ".join(draw.choice(vocabulary, draw.integers(1, 30))) for _ in range(90)]
    asked, answers = list[str](), list[str]()
    for _ in range(450):
        words = base[draw.integers(60)].split()
        words[draw.integers(len(words))] = vocabulary[draw.integers(40)]
        asked.append(base[draw.integers(60)] if draw.random() < 0.1 else f"q {letters_of(int(draw.integers(1 << 60)))}")
        answers.append(" ".join(words))
        said, at = base[draw.integers(60)].split(), draw.integers(1, 3)
        asked.append(" ".join(said[:at]))
        answers.append(" ".join(said[at:]))
    rows = spooled(tmp_path, [chat(*both) for both in zip(asked, answers, strict=True)], 50)
    measured, words = draw.random(900) < 0.2, [f"{q} {a}".split() for q, a in zip(asked, answers, strict=True)]
    expected = by_hand(words, asked, measured, near)
    assert {*expected.values()} == {"question", "ngram", "exact", *(["near"] if near else [])}
    assert any(
        many > MAX_RUN_ROWS for many in Counter(run[:13] for run in map(tuple, words) if len(run) >= 13).values()
    )
    whole = find_split_leaks(rows, measured, ~measured, near)
    assert {row: RULES[rule] for row, rule in zip(whole.text.tolist(), whole.rule.tolist(), strict=True)} == expected
    monkeypatch.setattr(contamination, "SLICE_BYTES", 1000)
    monkeypatch.setattr(HashCounter, "LEAST", 100)
    assert len([*contamination.iter_text_slices(rows, measured)]) > 9
    parts = find_split_leaks(rows, measured, ~measured, near)
    assert [column.tolist() for column in whole] == [column.tolist() for column in parts]


def test_of_rows_that_have_nothing_in_common_with_those_to_measure_on_few_are_asked_about(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    texts = [" ".join(f"w{n}" for n in draw.integers(1 << 40, size=60)) for _ in range(600)]
    said = [
        chat(f"q{i}", text) if i % 2 else Conversation((Message("assistant", text),)) for i, text in enumerate(texts)
    ]
    rows, measured = spooled(tmp_path, [*said, said[0]]), np.arange(601) < 300
    phrases, asked = prefilter_rows(rows, measured, ~measured, 0.7)
    assert asked[600]
    assert asked.sum() < 12
    assert not len(phrases)
