"""Preference pairs as a stage meets them: read from a file or the annotation store, divided by prompt, and encoded."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from align.annotate.store import Store, preferences, verdicts_of_people
from align.data.chat import encode_judged, prompt_length, surely_too_long
from align.data.read.columns import ColumnRules
from align.data.read.content import PREFERENCES
from align.data.read.drops import tally
from align.data.read.messages import with_default_system
from align.data.read.records import read_preferences
from align.data.reasoning import without_reasoning
from align.data.sets.published import data_set
from align.data.sources import FILES, MANIFEST, DataSource, data_records
from align.data.split import IN_EVAL, Judged, held_back, question_key, split_by_group
from align.errors import InputError, require
from align.run import Input
from align.types import Conversation, Message, Preference


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


def pairs_records(data: DataSource, store: str, project: str) -> dict[str, Input]:
    """What a run's manifest says of its pairs: the head of the project's ledger, or the files.

    Args:
        store: URL of the annotation store.
    """
    if data.name != "annotations":
        return data_records(data)
    with Store.open(store, create=False) as votes:
        head = votes.head(project)
    return {"data": Input(head.hash, project=project, seq=head.seq)}


def read_pairs(data: DataSource, store: str, project: str, allow_simulated: bool, seed: int = 0) -> list[Preference]:
    """Pairs of the annotation store's project, of a file, or those of a data set that are to train on."""
    if data.name == "annotations":
        with Store.open(store, create=False) as votes:
            found = preferences(votes, project, allow_simulated)
    elif data.name == MANIFEST:
        found = pairs_in(data, "train")
    else:
        found = read_preferences(data.path or "", "data.path", data.skips, data.rules)
    return drawn(found, data.limit, seed)


def read_verdicts(
    data: DataSource, store: str, project: str, allow_simulated: bool
) -> tuple[list[Preference], list[Preference]]:
    """Pairs with a known verdict, on which a judge is measured: those in which one answer is preferred, and those that
    people called equal, of which a file has none. Of a data set those that are held out.

    Raises:
        InputError: there is none.
    """
    if data.name == "annotations":
        with Store.open(store, create=False) as votes:
            return verdicts_of_people(votes, project, allow_simulated)
    if data.name == MANIFEST:
        found = pairs_in(data, "test")
        remedy = "Make it with data.held_out above 0."
        require(bool(found), "data.path", data.path, "has no pair to measure on", remedy)
        return found, []
    return read_preferences(data.path or "", "data.path", data.skips, data.rules), []


def pairs_in(data: DataSource, side: str) -> list[Preference]:
    """The pairs of one side of a data set.

    Raises:
        InputError: it holds none.
    """
    found = data_set(Path(data.path or ""))
    problem = f"holds {found.kind}, and preference pairs are read"
    remedy = "Name a data set that was made of pairs."
    require(found.kind == PREFERENCES, "data.path", data.path, problem, remedy)
    return [record for record in found.records(side) if isinstance(record, Preference)]


T = TypeVar("T")


def drawn(found: list[T], limit: int | None, seed: int) -> list[T]:
    """So many of the pairs, drawn at random, in their order; all where there is no limit."""
    if limit is None or limit >= len(found):
        return found
    return [found[i] for i in sorted(random.Random(seed).sample(range(len(found)), limit))]


def prepared(pref: Preference, data: DataSource) -> Preference:
    """A pair with the system turn that its prompt lacks, and without the reasoning that is to be hidden; the very same
    one where nothing changes.

    Raises:
        InputError: nothing but their reasoning tells its answers apart.
    """
    if data.hide_reasoning:
        sides = {name: without_reasoning(getattr(pref, name)) for name in ("prompt", "chosen", "rejected")}
        require(
            sides["chosen"] != sides["rejected"], "data.reasoning", "hide",
            f"nothing else tells the answers of pair {pref.id} apart", "Leave the pair out, or keep the reasoning.",
        )  # fmt: skip
        if any(sides[name] != getattr(pref, name) for name in sides):
            pref = replace(pref, **sides)
    prompt = with_default_system(pref.prompt, data.system)
    return pref if prompt == pref.prompt else replace(pref, prompt=prompt)


class Kind(NamedTuple):
    """How records of one kind are called and read.

    Attributes:
        called: `pairs` or `answers`.
        of_file: path, what the user calls it, whether rows that are refused are left out, what the user says of
            columns → its records.
        of_set: a data set, `train` or `test` → its records.
    """

    called: str
    of_file: Callable[[str, str, bool, ColumnRules], list[Any]]
    of_set: Callable[[DataSource, str], list[Any]]


def divided_pairs(
    prefs: Sequence[Judged], data: DataSource, held_out: float, seed: int, kind: Kind | None = None
) -> tuple[list[Judged], list[Judged]]:
    """Pairs to train on and pairs to measure on, divided by prompt so that no ranking has a pair on both sides; or
    measured on a file of their own (`data.eval_path`). A data set has sides of its own. Of a file, what `stage=eval`
    will ask must not have taught anything either.

    Args:
        kind: of records that are no pairs.

    Raises:
        InputError: there is nothing to train on.
    """
    called, of_file, of_set = kind or Kind("pairs", read_preferences, pairs_in)
    one = called.removesuffix("s")
    if data.eval_path:
        test = drawn(of_file(data.eval_path, "data.eval_path", data.skips, data.rules), data.limit, seed)
        asked = {question_key(Conversation(pref.prompt)) for pref in test}
        train = [pref for pref in prefs if question_key(Conversation(pref.prompt)) not in asked]
        problem = f"asks everything that {data.path} asks, which leaves no {one} to train on"
        require(bool(train), "data.eval_path", data.eval_path, problem, f"Give other {called} to measure on.")
        tally(IN_EVAL, len(prefs) - len(train))
        if len(train) < len(prefs):
            print(f"{len(prefs) - len(train)} {called} ask what data.eval_path asks, and are left out of training")
        return train, test
    if data.name == MANIFEST:  # it is divided already
        test = drawn(of_set(data, "test"), data.limit, seed)
        remedy = f"Make it with data.held_out above 0, or name {called} in data.eval_path."
        require(bool(test), "data.path", data.path, f"has no {one} to measure on", remedy)
        return list(prefs), test
    train, test = split_by_group(prefs, held_out, seed)
    if data.name == FILES:
        asked = held_back([question_key(Conversation(pref.prompt)) for pref in prefs], data.held_out)
        sides: dict[bool, list[Judged]] = {True: test, False: []}
        for pref in train:
            sides[question_key(Conversation(pref.prompt)) in asked].append(pref)
        train = sides[False]
        require(bool(train), "data.held_out", data.held_out, f"leaves no {one} to train on", "Lower it.")
    return train, test


def encoded_sides(
    tokenizer: Any, sides: Sequence[Sequence[Preference]], stops: tuple[int, ...], max_length: int
) -> tuple[list[tuple[Preference, Pair]], list[tuple[Preference, Pair]], dict[str, int]]:
    """The pairs to train on and those to measure on, see `encoded_pairs`; and what a run's metrics count of them."""
    (train, dropped), (test, dropped_test) = (encoded_pairs(tokenizer, side, stops, max_length) for side in sides)
    counts = {"pairs": len(train), "held_out_pairs": len(test), "dropped": dropped, "held_out_dropped": dropped_test}
    return train, test, counts


def encoded_pairs(
    tokenizer: Any, prefs: Sequence[Preference], stops: tuple[int, ...], max_length: int
) -> tuple[list[tuple[Preference, Pair]], int]:
    """Pairs as token rows, and how many were longer than the context.

    Raises:
        InputError: none fits, or an answer is not one assistant turn.
    """
    kept = []
    known: dict[tuple[Any, ...], tuple[list[int], int]] = {}  # an answer stands in many pairs

    def answer(pref: Preference, side: str) -> tuple[list[int], int]:
        text = (pref.prompt, pref.tools, getattr(pref, side), getattr(pref, f"{side}_ended"))
        if text not in known:
            asked = Conversation(pref.prompt, pref.id, pref.tools)
            known[text] = judged_ids(tokenizer, asked, getattr(pref, side), getattr(pref, f"{side}_ended"), stops)
        return known[text]

    for pref in prefs:
        sides = (Conversation((*pref.prompt, *side), pref.id, pref.tools) for side in (pref.chosen, pref.rejected))
        if any(surely_too_long(tokenizer, conversation, max_length) for conversation in sides):
            continue
        (chosen, chosen_start), (rejected, rejected_start) = (answer(pref, side) for side in ("chosen", "rejected"))
        if max(len(chosen), len(rejected)) <= max_length:
            kept.append((pref, Pair(chosen, rejected, chosen_start, rejected_start)))
    if not kept:
        raise InputError(
            "data.max_length", max_length, f"all {len(prefs)} pairs are longer", "Raise it, or give shorter pairs."
        )
    return kept, len(prefs) - len(kept)


def judged_ids(
    tokenizer: Any, asked: Conversation, turns: Sequence[Message], ended: bool, stops: tuple[int, ...]
) -> tuple[list[int], int]:
    """An answer as it is judged, and where it begins.

    Args:
        asked: ends where the answer is due.
        turns: the answer, with the turns before its last one.
        ended, stops: see `encode_judged`.
    """
    *before, last = turns
    prompt = replace(asked, messages=(*asked.messages, *before))
    ids = encode_judged(tokenizer, prompt, replace(last, trained=True), ended, stops)
    return ids, prompt_length(tokenizer, prompt, ids)
