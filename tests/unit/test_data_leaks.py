"""Tests of finding the rows of a spool that leak an evaluation set, by each rule."""

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


def build_exchange(question: str, answer: str, system: str = "") -> Conversation:
    turns = [Message("system", system)] if system else []
    return Conversation((*turns, Message("user", question), Message("assistant", answer)))


def write_spool(folder: Path, records: Sequence[Record], most: int = 1000) -> SpoolRows:
    folder.mkdir(exist_ok=True)
    batch = pa.RecordBatch.from_pydict(records_to_columns(DOCUMENTS, records))
    half = len(records) // 2
    spool = Spool(folder)
    for i, half_batch in enumerate((batch.slice(0, half), batch.slice(half))):
        spool.write(f"{i:03d}", iter(pa.Table.from_batches([half_batch]).to_batches(most)), [batch.schema], {})
    return SpoolRows(spool)


def create_finder(records: Sequence[Record], near: float | None = 0.7) -> LeakFinder:
    table = pa.table(records_to_columns(DOCUMENTS, records))
    texts, questions = ([join_record_texts(DOCUMENTS, table, over)] for over in ("both", "prompts"))
    return LeakFinder([EvaluationTexts.from_rows(texts, questions)], near)


@pytest.mark.parametrize(
    ("row", "evaluation", "rule"),
    [
        (
            build_exchange("What did it do?", f"Well, {LONG}, I think."),
            build_exchange("Tell me a story", LONG),
            "ngram",
        ),
        (build_exchange("What is  2 + 2?", "Four, I think"), build_exchange("what is 2 + 2?", "4"), "question"),
        (build_exchange("hello there", "hi you"), build_exchange("hello", "there hi you"), "exact"),
        (build_exchange("that is 2 + 2", "so it is"), build_exchange("that is", "2 + 2 so it is"), "exact"),
        (build_exchange("that is 2 + 2", "so it is"), build_exchange("that is", "2 - 2 so it is"), None),
        (build_exchange("a b c d e f", "g h i j k"), build_exchange("a b c d e f", "g h i j x"), "question"),
        (build_exchange("a b c d e f", "g h i j k l"), build_exchange("z b c d e f", "g h i j k l"), "near"),
        ("plain text of six words here", "Plain text of six words here", "question"),
        (build_exchange("What did it do?", "Nothing"), build_exchange("Tell me", "Nothing at all"), None),
        (build_exchange("one", "two", system=LONG), build_exchange("three", "four", system=LONG), None),
        (Conversation((Message("assistant", "hi"),)), Conversation((Message("assistant", "good day"),)), None),
    ],
)
def test_a_rule(tmp_path: Path, row: Record, evaluation: Record, rule: str | None) -> None:
    rows = write_spool(tmp_path, [build_exchange("other", "thing"), row, build_exchange("and", "another")])
    leaks = create_finder([build_exchange("unlike", "anything"), evaluation]).find_leaks(rows, np.ones(3, bool))
    expected = [[1], [0], [1], [RULES.index(rule)]] if rule else [[], [], [], []]
    assert [column.tolist() for column in leaks] == expected


def test_near_is_looked_for_only_where_it_is_asked_for(tmp_path: Path) -> None:
    rows = write_spool(tmp_path, [build_exchange("a b c d e f", "g h i j k l")])
    near = [build_exchange("z b c d e f", "g h i j k l")]
    assert create_finder(near, None).find_leaks(rows, np.ones(1, bool)).rule.tolist() == []


@pytest.mark.parametrize("sharing", [MAX_RUN_ROWS, MAX_RUN_ROWS + 1])
def test_a_phrase_that_many_rows_to_train_on_share_is_no_leak(tmp_path: Path, sharing: int) -> None:
    training_rows = [
        build_exchange(f"question {i}", f"answer number {i} {i * 7} {i * 13}. {PHRASE}") for i in range(sharing)
    ]
    evaluation_rows = [
        build_exchange("something else", PHRASE),
        build_exchange("A story!", f"{LONG} again"),
        build_exchange("And you?", f"Oh. {PHRASE}"),
    ]
    rows = write_spool(tmp_path, [*training_rows, build_exchange("What did it do?", LONG), *evaluation_rows])
    held_out = np.arange(sharing + 4) > sharing
    leaks = find_split_leaks(rows, held_out, ~held_out, None)
    assert leaks.text.tolist() == [*(range(sharing) if sharing <= MAX_RUN_ROWS else []), sharing]


@pytest.mark.parametrize("sharing", [MAX_RUN_ROWS, MAX_RUN_ROWS + 1])
@pytest.mark.parametrize("own", [6, 7])
def test_a_run_that_is_mostly_text_of_many_rows_is_no_leak(tmp_path: Path, sharing: int, own: int) -> None:
    """A training row shares the last words of an instruction and some words behind it with an evaluation row."""
    instruction = "answer as a sailor of the old times would"
    words = [*instruction.split()[own - 13 :], *["red", "lamp", "under", "seven", "narrow", "bridges", "once"][:own]]
    other_rows = [build_exchange(f"{i} {instruction}", f"nothing {i} {i * 7} {i * 13}") for i in range(sharing - 1)]
    shared = " ".join(words)
    rows = write_spool(
        tmp_path,
        [*other_rows, build_exchange(f"one {shared}", "fine day"), build_exchange(f"two {shared}", "good night")],
    )
    held_out = np.arange(sharing + 1) >= sharing
    leaks = find_split_leaks(rows, held_out, ~held_out, None)
    leaked = sharing == MAX_RUN_ROWS or own == 7
    assert leaks.text.tolist() == ([sharing - 1] if leaked else [])


def test_rows_that_are_not_wanted_are_not_looked_at(tmp_path: Path) -> None:
    rows = write_spool(tmp_path, [build_exchange("q", LONG), build_exchange("r", LONG), build_exchange("s", LONG)])
    is_wanted = np.array([False, True, False])
    assert create_finder([build_exchange("x", LONG)]).find_leaks(rows, is_wanted).text.tolist() == [1]


def test_rows_of_the_spool_itself(tmp_path: Path) -> None:
    rows = write_spool(
        tmp_path,
        [build_exchange("q", LONG), build_exchange("something else", "entirely"), build_exchange("s", f"Once {LONG}")],
    )
    is_measured = np.array([True, False, False])
    leaks = find_split_leaks(rows, is_measured, ~is_measured, 0.7)
    assert (leaks.text.tolist(), leaks.row.tolist()) == ([2], [0])
    assert find_split_leaks(rows, np.zeros(3, bool), ~is_measured, 0.7).rule.tolist() == []


def spell_digits(number: int) -> str:
    return "".join("abcdefghij"[int(digit)] for digit in str(number))


def search_by_hand(
    row_words: list[list[str]], prompts: list[str], test: np.ndarray, near: float | None
) -> dict[int, str]:
    """Return the first rule that finds each leaking training row, computed with sets of strings."""

    def list_runs(words: list[str], width: int) -> set[tuple[str, ...]]:
        return {tuple(words[i : i + width]) for i in range(len(words) - width + 1)}

    train_rows = np.flatnonzero(~test).tolist()
    test_rows = np.flatnonzero(test).tolist()
    run_counts = Counter(run for row in train_rows for run in list_runs(row_words[row], 13))
    test_prompts = {prompts[row] for row in test_rows}
    short_test_rows = {(*row_words[row],) for row in test_rows if len(row_words[row]) < 13}
    part_counts = Counter(run for row in train_rows for run in list_runs(row_words[row], 7))
    common_parts = {run for run in part_counts if part_counts[run] > MAX_RUN_ROWS}
    grams = {run for row in test_rows for run in list_runs(row_words[row], 13) if run_counts[run] <= MAX_RUN_ROWS}
    grams = {run for run in grams if common_parts.isdisjoint(list_runs([*run], 7))}
    test_sets = [list_runs(row_words[row], 3) for row in test_rows]
    rules = dict[int, str]()
    for row in train_rows:
        row_set = list_runs(row_words[row], 3)
        if prompts[row] in test_prompts:
            rules[row] = "question"
        elif (*row_words[row],) in short_test_rows:
            rules[row] = "exact"
        elif list_runs(row_words[row], 13) & grams:
            rules[row] = "ngram"
        elif near and any(
            row_set and len(row_set & test_set) / len(row_set | test_set) >= near for test_set in test_sets
        ):
            rules[row] = "near"
    return rules


@pytest.mark.parametrize("near", [0.7, None])
def test_however_it_is_sliced_what_is_found_is_what_a_search_by_hand_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, near: float | None
) -> None:
    draw = np.random.default_rng(0)
    vocabulary = [
        f"w{chr(97 + i // 10)}{chr(97 + i % 10)}" for i in range(40)
    ]  # texts with different digits are different
    base = [" ".join(draw.choice(vocabulary, draw.integers(1, 30))) for _ in range(90)]
    prompts = list[str]()
    answers = list[str]()
    for _ in range(450):
        words = base[draw.integers(60)].split()
        words[draw.integers(len(words))] = vocabulary[draw.integers(40)]
        prompts.append(
            base[draw.integers(60)] if draw.random() < 0.1 else f"q {spell_digits(int(draw.integers(1 << 60)))}"
        )
        answers.append(" ".join(words))
        base_words = base[draw.integers(60)].split()
        at = draw.integers(1, 3)
        prompts.append(" ".join(base_words[:at]))
        answers.append(" ".join(base_words[at:]))
    rows = write_spool(
        tmp_path, [build_exchange(*prompt_and_answer) for prompt_and_answer in zip(prompts, answers, strict=True)], 50
    )
    is_measured = draw.random(900) < 0.2
    words = [f"{q} {a}".split() for q, a in zip(prompts, answers, strict=True)]
    expected = search_by_hand(words, prompts, is_measured, near)
    assert {*expected.values()} == {"question", "ngram", "exact", *(["near"] if near else [])}
    assert any(
        count > MAX_RUN_ROWS for count in Counter(run[:13] for run in map(tuple, words) if len(run) >= 13).values()
    )
    leaks = find_split_leaks(rows, is_measured, ~is_measured, near)
    assert {row: RULES[rule] for row, rule in zip(leaks.text.tolist(), leaks.rule.tolist(), strict=True)} == expected
    monkeypatch.setattr(contamination, "SLICE_BYTES", 1000)
    monkeypatch.setattr(HashCounter, "LEAST", 100)
    assert len([*contamination.iter_text_slices(rows, is_measured)]) > 9
    sliced_leaks = find_split_leaks(rows, is_measured, ~is_measured, near)
    assert [column.tolist() for column in leaks] == [column.tolist() for column in sliced_leaks]


def test_of_rows_that_have_nothing_in_common_with_those_to_measure_on_few_are_asked_about(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    texts = [" ".join(f"w{n}" for n in draw.integers(1 << 40, size=60)) for _ in range(600)]
    records = [
        build_exchange(f"q{i}", text) if i % 2 else Conversation((Message("assistant", text),))
        for i, text in enumerate(texts)
    ]
    rows = write_spool(tmp_path, [*records, records[0]])
    is_measured = np.arange(601) < 300
    phrases, is_candidate = prefilter_rows(rows, is_measured, ~is_measured, 0.7)
    assert is_candidate[600]
    assert is_candidate.sum() < 12
    assert not len(phrases)
