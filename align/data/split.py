"""Division of rows into those to train on and those to measure on, by their question, for every stage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from align.core.errors import require
from align.core.types import Conversation, Document, Feedback, Preference, Record
from align.data.dedup.arrays import label_components
from align.data.read.content import extract_prompt
from align.data.read.drops import count_dropped

DROPPED_IN_EVAL = "dropped_in_eval"
"""Name of the metric that counts rows left out of training because `data.eval_path` has their question."""

Item = TypeVar("Item")


class TrainTest(NamedTuple, Generic[Item]):
    """Items to train on, and held-out items to measure on."""

    train: list[Item]
    test: list[Item]


def truncate_to_question(document: Document) -> Conversation | None:
    """Return the conversation up to its last user or tool turn, or None for plain text and for conversations without a
    user turn."""
    return None if isinstance(document, str) else truncate_to_roles(document, ("user", "tool"))


def truncate_to_roles(conversation: Conversation, roles: tuple[str, ...]) -> Conversation | None:
    """Return the conversation up to its last turn with one of these roles, or None if that part has no user turn."""
    messages = conversation.messages
    while messages and messages[-1].role not in roles:
        messages = messages[:-1]
    return replace(conversation, messages=messages) if any(turn.role == "user" for turn in messages) else None


def compute_question_key(record: Record) -> str:
    """Return the SHA-256 in hex of a record's turns up to the last user turn, or of its plain text. Records with equal
    keys have the same question, regardless of the tools called for it and their results."""
    document = extract_prompt(record)
    if isinstance(document, str):
        content = document
    else:  # the repr of messages when these were all their fields: changing it would change splits
        turns = list[str]()
        for turn in (truncate_to_roles(document, ("user",)) or document).messages:
            calls = [(call.name, call.arguments) for call in turn.tool_calls]
            fields = f"role={turn.role!r}, content={turn.content!r}{f', tool_calls={calls}' if calls else ''}"
            turns.append(f"Message({fields})")
        content = f"({', '.join(turns)}{',' if len(turns) == 1 else ''})"
    return hashlib.sha256(content.encode()).hexdigest()


def split_documents(documents: list[Document], held_out: float) -> TrainTest[Document]:
    """Divide documents by the hash of their question into a train and a test split, so that equal questions stay
    together. If the share `held_out` is too small for the file, one question is held out all the same, which may leave
    no row to train on."""
    keys = [*map(compute_question_key, documents)]
    held_out_keys = select_held_out_keys(keys, held_out)
    splits = TrainTest[Document]([], [])
    for document, key in zip(documents, keys, strict=True):
        splits[key in held_out_keys].append(document)
    return splits


def select_held_out_keys(keys: list[str], held_out: float) -> set[str]:
    """Return the question keys to hold out, which are the keys below `held_out` if their first 32 bits are read as a
    number in [0, 1). If `held_out` is above 0 and the numbers differ, the key with the lowest number is held out in any
    case.

    Args:
        keys: keys of all questions of the file.
        held_out: share to hold out.
    """
    shares = {key: int(key[:8], 16) / 2**32 for key in keys}
    lowest = min(shares.values()) if held_out > 0 and len(set(shares.values())) > 1 else -1.0
    return {key for key, share in shares.items() if share < held_out or share == lowest}


def exclude_test_questions(records: Sequence[T], test: Sequence[Record], label: str) -> list[T]:
    """Return the records whose questions are not in `test`, and count and print the number of records left out.

    Args:
        records: the records to train on.
        test: the records to measure on.
        label: the printed name of the records.
    """
    keys = {*map(compute_question_key, test)}
    remaining = [record for record in records if compute_question_key(record) not in keys]
    count_dropped(DROPPED_IN_EVAL, len(records) - len(remaining))
    if len(remaining) < len(records):
        print(f"{len(records) - len(remaining)} {label} have questions of data.eval_path, and are left out of training")
    return remaining


T = TypeVar("T", bound=Record)
Judged = TypeVar("Judged", Preference, Feedback)


def split_by_group(prefs: Sequence[Judged], held_out: float, seed: int) -> TrainTest[Judged]:
    """Split pairs or feedback into (train, test) so that no ranking (group) and no prompt is in both. The order is
    kept. Feedback has no groups.

    Groups that share a prompt are joined, such as a prompt ranked by two people; pairs without a `group_id` are grouped
    by prompt. The joined groups with the lowest hashes of `(seed, prompt)` are held out. So the split of a pair does
    not depend on its place in the file, and on other pairs only close to the border.

    Args:
        prefs: the records.
        held_out: the share of joined groups to hold out, in (0, 1); at least one group is in either split.
        seed: changes the groups that are held out.

    Raises:
        InputError: `held_out` is out of range, or there are fewer than two groups.
    """
    require(0 < held_out < 1, "held_out", held_out, "it must lie between 0 and 1", "Hold out 0.1, for instance.")
    prompts = list[str]()
    for pref in prefs:
        content = json.dumps([seed, *([message.role, message.content] for message in pref.prompt)])
        prompts.append(hashlib.sha256(content.encode()).hexdigest())
    groups = [f"group {getattr(pref, 'group_id', '') or prompt}" for pref, prompt in zip(prefs, prompts, strict=True)]
    number_of_name = {name: i for i, name in enumerate(dict.fromkeys([*prompts, *groups]))}
    prompt_numbers = np.array([number_of_name[name] for name in prompts], np.int64)
    group_numbers = np.array([number_of_name[name] for name in groups], np.int64)
    component_of_record = label_components(len(number_of_name), prompt_numbers, group_numbers)[prompt_numbers].tolist()
    hash_of_component: dict[int, str] = {}
    for component, prompt in zip(component_of_record, prompts, strict=True):
        hash_of_component[component] = min(prompt, hash_of_component.get(component, prompt))
    noun = "answers" if prefs and isinstance(prefs[0], Feedback) else "pairs"
    remedy = f"Gather more prompts, or give the test {noun} in a file of their own."
    summary = "too few prompts to split" if noun == "answers" else "too few groups of pairs to split"
    problem = f"{summary}: the {len(prefs)} {noun} are on {len(hash_of_component)} prompt"
    require(len(hash_of_component) >= 2, "stage.held_out", held_out, problem, remedy)
    held_out_count = min(max(1, round(held_out * len(hash_of_component))), len(hash_of_component) - 1)
    test = set(sorted(hash_of_component, key=hash_of_component.__getitem__)[:held_out_count])
    splits = TrainTest[Judged]([], [])
    for pref, component in zip(prefs, component_of_record, strict=True):
        splits[component in test].append(pref)
    return splits
