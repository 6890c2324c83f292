"""Answers with a label to train on, as a stage meets them: given as such or taken from preference pairs, divided by
prompt, and encoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.data.chat import surely_too_long
from align.data.labelled import answers_in, answers_of_file
from align.data.labelled import prepared as prepared_answer
from align.data.pairs import Kind, Pair, divided_pairs, drawn, judged_ids, prepared, read_pairs
from align.data.read.content import FEEDBACK, PREFERENCES
from align.data.read.drops import BadRows
from align.data.read.records import grouped_rows
from align.data.read.shapes import recognised
from align.data.sets.published import data_set
from align.data.sources import FILES, MANIFEST, DataSource
from align.errors import InputError, require
from align.types import Conversation, Feedback, Preference

ANSWERS = Kind("answers", answers_of_file, answers_in)
Judgements = Sequence[Preference] | Sequence[Feedback]


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


def divided_judgements(
    data: DataSource, store: str, project: str, allow_simulated: bool, held_out: float, seed: int
) -> tuple[Judgements, Judgements]:
    """Answers with a label to train on and to measure on, or pairs where the data has these, see `divided_pairs`."""
    if not holds_labels(data):
        pairs = read_pairs(data, store, project, allow_simulated, seed)
        train, test = divided_pairs(pairs, data, held_out, seed)
        return [prepared(one, data) for one in train], [prepared(one, data) for one in test]
    whole = data.name == MANIFEST
    found = (
        answers_in(data, "train") if whole else answers_of_file(data.path or "", "data.path", data.skips, data.rules)
    )
    sides = divided_pairs(drawn(found, data.limit, seed), data, held_out, seed, ANSWERS)
    check_labels([one.label for one in sides[0]], [one.prompt for one in sides[0]], data.path)
    train, test = ([prepared_answer(one, data) for one in side] for side in sides)
    return train, test


def holds_labels(data: DataSource) -> bool:
    """Whether the data has answers with a label: a data set by its kind, a file by the columns of its first row that
    has those of some shape. A label or an answer that is wrong there is then an error of this kind."""
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


def labelled(pairs: Sequence[Pair]) -> Iterator[Labelled]:
    """Both answers of each pair: the chosen one was wanted, the other was not."""
    for pair in pairs:
        yield Labelled(pair.chosen_ids, pair.chosen_start, True)
        yield Labelled(pair.rejected_ids, pair.rejected_start, False)


def encoded_answers(
    tokenizer: Any, found: Sequence[Feedback], stops: tuple[int, ...], max_length: int
) -> tuple[list[tuple[Feedback, Labelled]], int]:
    """Answers as token rows, and how many were longer than the context.

    Raises:
        InputError: none fits.
    """
    kept = []
    for one in found:
        if surely_too_long(tokenizer, Conversation((*one.prompt, *one.completion), one.id, one.tools), max_length):
            continue
        ids, start = judged_ids(tokenizer, Conversation(one.prompt, one.id, one.tools), one.completion, True, stops)
        if len(ids) <= max_length:
            kept.append((one, Labelled(ids, start, one.label)))
    problem = f"all {len(found)} answers are longer"
    require(bool(kept), "data.max_length", max_length, problem, "Raise it, or give shorter answers.")
    return kept, len(found) - len(kept)


def check_labels(labels: Sequence[bool], prompts: Sequence[Any], path: str | None) -> None:
    """
    Args:
        labels: of the answers to train on.
        prompts: what each of them answers.

    Raises:
        InputError: all have one label, or all answer one prompt.
    """
    wanted = sum(labels)
    if wanted in (0, len(labels)):
        which, other = ("wanted", "false") if wanted else ("unwanted", "true")
        problem = f"labels all {len(labels)} answers to train on as {which}: KTO learns from both kinds"
        raise InputError("data.path", path, problem, f"Add answers with label {other}; stage=sft imitates answers.")
    problem = "has answers to one prompt alone to train on, and KTO compares them with answers to others"
    require(any(prompt != prompts[0] for prompt in prompts), "data.path", path, problem, "Give more prompts.")


def other_answers(batch: Sequence[int], rows: Sequence[Labelled]) -> list[list[int]]:
    """For each row of a batch, an answer to another prompt: that of the row before it, of the last one for the first,
    as TRL pairs them; rows of its own prompt are passed over. A row that has no other prompt beside it gets an answer
    from the rest of the data.

    Args:
        batch: places in `rows`.
        rows: all there are, of more than one prompt.
    """
    found = []
    for i, place in enumerate(batch):
        beside = [*reversed(batch[:i]), *reversed(batch[i + 1 :])]
        elsewhere = ((place - step) % len(rows) for step in range(1, len(rows)))
        other = next(
            other for part in (beside, elsewhere) for other in part if rows[other].prompt != rows[place].prompt
        )
        found.append(rows[other].ids[rows[other].start :])
    return found
