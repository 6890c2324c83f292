"""Preference pairs and answers with a label as a stage meets them: read from a file, a data set or the annotation
store, divided by prompt, and encoded."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from align.annotate.store import Store
from align.annotate.store.preference_pairs import preferences, verdicts_of_people
from align.core.errors import InputError, require
from align.core.types import Conversation, Feedback, Message, Preference
from align.data.chat.encode import encode_judged, prompt_length, surely_too_long
from align.data.read.columns import ColumnRules, recognised
from align.data.read.content import FEEDBACK, PREFERENCES, with_answer
from align.data.read.drops import BadRows
from align.data.read.records import answers_of_file, grouped_rows, read_preferences
from align.data.sets.published import data_set
from align.data.sources import FILES, MANIFEST, DataSource, data_records, prepared
from align.data.split import Judged, held_back, question_key, split_by_group, unasked
from align.run import Input

T = TypeVar("T")
Judgements = Sequence[Preference] | Sequence[Feedback]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt, as rows of tokens.

    Attributes:
        chosen_ids, rejected_ids: prompt and answer, each ending where a score is read.
        chosen_start, rejected_start: where the answer begins.
    """

    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_start: int = 0
    rejected_start: int = 0


@dataclass(frozen=True, slots=True)
class Labelled:
    """An answer and whether it was wanted, as a row of tokens.

    Attributes:
        ids: prompt and answer.
        start: where the answer begins.
    """

    ids: list[int]
    start: int
    wanted: bool

    @property
    def prompt(self) -> list[int]:
        return self.ids[: self.start]


class Kind(NamedTuple):
    """How records of one kind are called and read.

    Attributes:
        kind: see `align.data.read.content.kind_of`.
        called: `pairs` or `answers`.
        of_file: path, what the user calls it, whether rows that are refused are left out, what the user says of
            columns → its records.
    """

    kind: str
    called: str
    of_file: Callable[[str, str, bool, ColumnRules], list[Any]]


PAIRS = Kind(PREFERENCES, "pairs", read_preferences)
ANSWERS = Kind(FEEDBACK, "answers", answers_of_file)


def pairs_records(data: DataSource, store: str, project: str) -> dict[str, Input]:
    """Return what a run's manifest says of its pairs: the head of the project's ledger, or the files.

    Args:
        store: URL of the annotation store.
    """
    if data.name != "annotations":
        return data_records(data)
    with Store.open(store, create=False) as votes:
        head = votes.head(project)
    return {"data": Input(head.hash, project=project, seq=head.seq)}


def side_of(data: DataSource, side: str, kind: Kind, otherwise: str = "") -> list[Any]:
    """Return the records of one side of a data set.

    Args:
        otherwise: what else helps if the side is empty.

    Raises:
        InputError: it holds another kind, or nothing to measure on.
    """
    found = data_set(Path(data.path or ""))
    problem = f"holds {found.kind}, and this stage reads {kind.kind}"
    remedy = f"Name a data set that was made of {kind.called}."
    require(found.kind == kind.kind, "data.path", data.path, problem, remedy)
    records = found.records(side)
    one = kind.called.removesuffix("s")
    remedy = f"Make it with data.held_out above 0{otherwise}."
    require(side == "train" or bool(records), "data.path", data.path, f"has no {one} to measure on", remedy)
    return records


def read_pairs(data: DataSource, store: str, project: str, allow_simulated: bool, seed: int = 0) -> list[Preference]:
    """Return the pairs of the annotation store's project, of a file, or those of a data set that are to train on."""
    if data.name == "annotations":
        with Store.open(store, create=False) as votes:
            return drawn(preferences(votes, project, allow_simulated), data.limit, seed)
    return drawn(all_of(data, "train", PAIRS), data.limit, seed)


def all_of(data: DataSource, side: str, kind: Kind) -> list[Any]:
    """Return the records of a file, or those of one side of a data set."""
    if data.name == MANIFEST:
        return side_of(data, side, kind)
    return kind.of_file(data.path or "", "data.path", data.skips, data.rules)


def read_verdicts(
    data: DataSource, store: str, project: str, allow_simulated: bool
) -> tuple[list[Preference], list[Preference]]:
    """Return pairs with a known verdict, on which a judge is measured: those in which one answer is preferred, and
    those that people called equal, of which a file has none. Of a data set those that are held out.

    Raises:
        InputError: there is none.
    """
    if data.name == "annotations":
        with Store.open(store, create=False) as votes:
            return verdicts_of_people(votes, project, allow_simulated)
    return all_of(data, "test", PAIRS), []


def read_labelled(data: DataSource) -> list[Feedback]:
    """Return the answers with a label of a file, or those of a data set that are held out.

    Raises:
        InputError: there is none, or a row is something else.
        CorruptFile: a file was cut or is damaged.
    """
    return [prepared(answer, data) for answer in all_of(data, "test", ANSWERS)]


def drawn(found: list[T], limit: int | None, seed: int) -> list[T]:
    """Return so many of the records, drawn at random, in their order; all if there is no limit."""
    if limit is None or limit >= len(found):
        return found
    return [found[i] for i in sorted(random.Random(seed).sample(range(len(found)), limit))]


def divided_pairs(
    prefs: Sequence[Judged], data: DataSource, held_out: float, seed: int, kind: Kind = PAIRS
) -> tuple[list[Judged], list[Judged]]:
    """Return pairs to train on and pairs to measure on, divided by prompt so that no ranking has a pair on both sides;
    or measured on a file of their own (`data.eval_path`). A data set has sides of its own. Of a file, what `stage=eval`
    will ask must not have taught anything either.

    Raises:
        InputError: there is nothing to train on.
    """
    one = kind.called.removesuffix("s")
    if data.name == MANIFEST and not data.eval_path:  # it is divided already
        test = side_of(data, "test", kind, otherwise=f", or name {kind.called} in data.eval_path")
        return list(prefs), drawn(test, data.limit, seed)
    if data.eval_path:
        test = drawn(kind.of_file(data.eval_path, "data.eval_path", data.skips, data.rules), data.limit, seed)
        train = unasked(prefs, test, kind.called)
        problem = f"asks everything that {data.path} asks, which leaves no {one} to train on"
        require(bool(train), "data.eval_path", data.eval_path, problem, f"Give other {kind.called} to measure on.")
        return train, test
    train, test = split_by_group(prefs, held_out, seed)
    if data.name == FILES:
        tested = held_back([*map(question_key, prefs)], data.held_out)
        test += [pref for pref in train if question_key(pref) in tested]
        train = [pref for pref in train if question_key(pref) not in tested]
        require(bool(train), "data.held_out", data.held_out, f"leaves no {one} to train on", "Lower it.")
    return train, test


def divided_preferences(
    data: DataSource, store: str, project: str, allow_simulated: bool, held_out: float, seed: int
) -> tuple[list[Preference], list[Preference]]:
    """Return pairs to train on and to measure on, see `divided_pairs`."""
    sides = divided_pairs(read_pairs(data, store, project, allow_simulated, seed), data, held_out, seed)
    train, test = ([prepared(pref, data) for pref in side] for side in sides)
    return train, test


def divided_judgements(
    data: DataSource, store: str, project: str, allow_simulated: bool, held_out: float, seed: int
) -> tuple[Judgements, Judgements]:
    """Return answers with a label to train on and to measure on, or pairs if the data has these, see
    `divided_pairs`."""
    if not holds_labels(data):
        return divided_preferences(data, store, project, allow_simulated, held_out, seed)
    answers = drawn(all_of(data, "train", ANSWERS), data.limit, seed)
    sides = divided_pairs(answers, data, held_out, seed, ANSWERS)
    check_labels([answer.label for answer in sides[0]], [answer.prompt for answer in sides[0]], data.path)
    train, test = ([prepared(answer, data) for answer in side] for side in sides)
    return train, test


def holds_labels(data: DataSource) -> bool:
    """Return whether the data has answers with a label: a data set by its kind, a file by the columns of its first row
    that has those of some shape. A label or an answer that is wrong there is then an error of this kind."""
    if data.name == MANIFEST:
        return data_set(Path(data.path or "")).kind == FEEDBACK
    if data.name != FILES:
        return False
    there = False
    for group in grouped_rows(data.path or "", "data.path", BadRows(skips=True), data.rules):
        if shape := recognised(group[0].data):
            return shape.kind != PREFERENCES
        there = there or "label" in group[0].data
    return there


def check_labels(labels: Sequence[bool], prompts: Sequence[Any], path: str | None) -> None:
    """Raise InputError if all answers to train on have one label, or answer one prompt.

    Args:
        prompts: what each of them answers.
    """
    wanted = sum(labels)
    if wanted in (0, len(labels)):
        which, other = ("wanted", "false") if wanted else ("unwanted", "true")
        problem = f"labels all {len(labels)} answers to train on as {which}: KTO learns from both kinds"
        raise InputError("data.path", path, problem, f"Add answers with label {other}; stage=sft imitates answers.")
    problem = "has answers to one prompt alone to train on, and KTO compares them with answers to others"
    require(any(prompt != prompts[0] for prompt in prompts), "data.path", path, problem, "Give more prompts.")


def encoded_sides(
    tokenizer: Any, sides: Sequence[Sequence[Preference]], stops: tuple[int, ...], max_length: int
) -> tuple[list[tuple[Preference, Pair]], list[tuple[Preference, Pair]], dict[str, int]]:
    """Return the pairs to train on and those to measure on, see `encoded_pairs`; and what a run's metrics count of
    them."""
    (train, dropped), (test, dropped_test) = (encoded_pairs(tokenizer, side, stops, max_length) for side in sides)
    counts = {"pairs": len(train), "held_out_pairs": len(test), "dropped": dropped, "held_out_dropped": dropped_test}
    return train, test, counts


def encoded_pairs(
    tokenizer: Any, prefs: Sequence[Preference], stops: tuple[int, ...], max_length: int
) -> tuple[list[tuple[Preference, Pair]], int]:
    """Return pairs as token rows, and how many were longer than the context.

    Raises:
        InputError: none fits, or an answer is not one assistant turn.
    """
    kept = []
    known: dict[tuple[Any, ...], tuple[list[int], int]] = {}  # an answer stands in many pairs

    def encode(pref: Preference, side: str) -> tuple[list[int], int]:
        answer = getattr(pref, side)
        ended = getattr(pref, f"{side}_ended")
        key = (pref.prompt, pref.tools, answer, ended)
        if key not in known:
            known[key] = judged_ids(tokenizer, Conversation(pref.prompt, pref.id, pref.tools), answer, ended, stops)
        return known[key]

    for pref in prefs:
        if any(
            surely_too_long(tokenizer, with_answer(pref, side), max_length) for side in (pref.chosen, pref.rejected)
        ):
            continue
        (chosen, chosen_start), (rejected, rejected_start) = (encode(pref, side) for side in ("chosen", "rejected"))
        if max(len(chosen), len(rejected)) <= max_length:
            kept.append((pref, Pair(chosen, rejected, chosen_start, rejected_start)))
    return kept, count_longer(prefs, kept, max_length, "pairs")


def encoded_answers(
    tokenizer: Any, found: Sequence[Feedback], stops: tuple[int, ...], max_length: int
) -> tuple[list[tuple[Feedback, Labelled]], int]:
    """Return answers as token rows, and how many were longer than the context.

    Raises:
        InputError: none fits.
    """
    kept = []
    for answer in found:
        if surely_too_long(tokenizer, with_answer(answer, answer.completion), max_length):
            continue
        asked = Conversation(answer.prompt, answer.id, answer.tools)
        ids, start = judged_ids(tokenizer, asked, answer.completion, True, stops)
        if len(ids) <= max_length:
            kept.append((answer, Labelled(ids, start, answer.label)))
    return kept, count_longer(found, kept, max_length, "answers")


def count_longer(given: Sequence[Any], kept: Sequence[Any], max_length: int, called: str) -> int:
    """Return how many records were longer than the context. Raises InputError if all were."""
    problem = f"all {len(given)} {called} are longer"
    require(bool(kept), "data.max_length", max_length, problem, f"Raise it, or give shorter {called}.")
    return len(given) - len(kept)


def judged_ids(
    tokenizer: Any, asked: Conversation, turns: Sequence[Message], ended: bool, stops: tuple[int, ...]
) -> tuple[list[int], int]:
    """Return an answer as it is judged, and where it begins.

    Args:
        asked: ends where the answer is due.
        turns: the answer, with the turns before its last one.
        ended, stops: see `encode_judged`.
    """
    *before, last = turns
    prompt = replace(asked, messages=(*asked.messages, *before))
    ids = encode_judged(tokenizer, prompt, replace(last, trained=True), ended, stops)
    return ids, prompt_length(tokenizer, prompt, ids)


def labelled(pairs: Sequence[Pair]) -> Iterator[Labelled]:
    """Yield both answers of each pair: the chosen one was wanted, the other was not."""
    for pair in pairs:
        yield Labelled(pair.chosen_ids, pair.chosen_start, True)
        yield Labelled(pair.rejected_ids, pair.rejected_start, False)


def other_answers(batch: Sequence[int], rows: Sequence[Labelled]) -> list[list[int]]:
    """Return for each row of a batch an answer to another prompt: that of the row before it, of the last one for the
    first, as TRL pairs them; rows of its own prompt are passed over. A row that has no other prompt beside it gets an
    answer from the rest of the data.

    Args:
        batch: places in `rows`.
        rows: all there are, of more than one prompt.
    """
    answers = []
    for i, place in enumerate(batch):
        beside = [*reversed(batch[:i]), *reversed(batch[i + 1 :])]
        elsewhere = ((place - step) % len(rows) for step in range(1, len(rows)))
        other = next(
            other for part in (beside, elsewhere) for other in part if rows[other].prompt != rows[place].prompt
        )
        answers.append(rows[other].ids[rows[other].start :])
    return answers
