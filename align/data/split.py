"""Which rows of a file are trained on and which are measured on: one rule, by what a row asks, for every stage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from align.core.errors import require
from align.core.types import Conversation, Document, Feedback, Preference, Record
from align.data.dedup.arrays import components
from align.data.read.content import asked
from align.data.read.drops import tally

IN_EVAL = "dropped_in_eval"
"""Counts what is not trained on because `data.eval_path` asks the same."""


def question(document: Document) -> Conversation | None:
    """Return the conversation up to where an answer is due: the user's last turn, or the results of tools behind it.
    Returns None for plain text or where no user speaks."""
    return None if isinstance(document, str) else ending_with(document, ("user", "tool"))


def ending_with(conversation: Conversation, roles: tuple[str, ...]) -> Conversation | None:
    """Return the conversation up to the last turn of one of these roles; None where the user says nothing in it."""
    messages = conversation.messages
    while messages and messages[-1].role not in roles:
        messages = messages[:-1]
    return replace(conversation, messages=messages) if any(turn.role == "user" for turn in messages) else None


def question_key(record: Record) -> str:
    """Return the SHA-256 of what a record asks, or says if it is plain text, in hex: two records of one key ask the
    same. What a user asks last is the same question whichever tools are called for it, and whatever these return."""
    document = asked(record)
    if isinstance(document, str):
        content = document
    else:  # as messages were written when they had these two fields: a file keeps its split
        turns = list[str]()
        for turn in (ending_with(document, ("user",)) or document).messages:
            calls = [(call.name, call.arguments) for call in turn.tool_calls]
            fields = f"role={turn.role!r}, content={turn.content!r}{f', tool_calls={calls}' if calls else ''}"
            turns.append(f"Message({fields})")
        content = f"({', '.join(turns)}{',' if len(turns) == 1 else ''})"
    return hashlib.sha256(content.encode()).hexdigest()


def divided(documents: list[Document], held_out: float) -> tuple[list[Document], list[Document]]:
    """Return the documents of a file to train on, and those to measure on. Equal questions never stand on both sides.
    Where the share `held_out` is too small for a file, one question is held out all the same, and then nothing trains
    on it."""
    keys = [*map(question_key, documents)]
    tested = held_back(keys, held_out)
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document, key in zip(documents, keys, strict=True):
        sides[key in tested].append(document)
    return sides


def held_back(keys: list[str], held_out: float) -> set[str]:
    """Return the questions of a file that are measured on, by the keys of all that it asks: a key's first 32 bits are
    a number in [0, 1), and the questions below `held_out` are held back."""
    shares = {key: int(key[:8], 16) / 2**32 for key in keys}
    least = min(shares.values()) if held_out > 0 and len(set(shares.values())) > 1 else -1.0
    return {key for key, share in shares.items() if share < held_out or share == least}


def unasked(records: Sequence[T], test: Sequence[Record], rows: str) -> list[T]:
    """Return the records whose questions no record of `test` asks, and print how many are left out.

    Args:
        rows: what the records are called.
    """
    keys = {*map(question_key, test)}
    kept = [record for record in records if question_key(record) not in keys]
    tally(IN_EVAL, len(records) - len(kept))
    if len(kept) < len(records):
        print(f"{len(records) - len(kept)} {rows} ask what data.eval_path asks, and are left out of training")
    return kept


T = TypeVar("T", bound=Record)
Judged = TypeVar("Judged", Preference, Feedback)


def split_by_group(prefs: Sequence[Judged], held_out: float, seed: int) -> tuple[list[Judged], list[Judged]]:
    """Split into (train, test) so that neither a group nor a prompt has pairs on both sides; order is kept. Answers
    with a label have no group.

    Groups that share a prompt (one prompt ranked by two people, or listed twice) are joined; without a `group_id` the
    prompt alone joins. The joined groups with the lowest hashes of `(seed, prompt)` are held out, so that a pair's side
    depends on neither its place in the file nor, but for those at the border, on what else is there.

    Args:
        held_out: the share of joined groups to hold out, in (0, 1); at least one on either side.

    Raises:
        InputError: `held_out` out of range, or fewer than two groups.
    """
    require(0 < held_out < 1, "held_out", held_out, "it must lie between 0 and 1", "Hold out 0.1, for instance.")
    prompts = [
        hashlib.sha256(json.dumps([seed, *([m.role, m.content] for m in p.prompt)]).encode()).hexdigest() for p in prefs
    ]
    groups = [f"group {getattr(pref, 'group_id', '') or prompt}" for pref, prompt in zip(prefs, prompts, strict=True)]
    numbers = {name: i for i, name in enumerate(dict.fromkeys([*prompts, *groups]))}
    a, b = (np.array([numbers[name] for name in names], np.int64) for names in (prompts, groups))
    joined = components(len(numbers), a, b)[a].tolist()
    hash_of: dict[int, str] = {}
    for unit, prompt in zip(joined, prompts, strict=True):
        hash_of[unit] = min(prompt, hash_of.get(unit, prompt))
    what = "answers" if prefs and isinstance(prefs[0], Feedback) else "pairs"
    remedy = f"Gather more prompts, or give the test {what} in a file of their own."
    few = "too few prompts to split" if what == "answers" else "too few groups of pairs to split"
    problem = f"{few}: the {len(prefs)} {what} are on {len(hash_of)} prompt"
    require(len(hash_of) >= 2, "stage.held_out", held_out, problem, remedy)
    size = min(max(1, round(held_out * len(hash_of))), len(hash_of) - 1)
    test = set(sorted(hash_of, key=hash_of.__getitem__)[:size])
    sides: tuple[list[Judged], list[Judged]] = ([], [])
    for pref, unit in zip(prefs, joined, strict=True):
        sides[unit in test].append(pref)
    return sides
