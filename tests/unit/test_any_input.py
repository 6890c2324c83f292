"""Readers of random files return records, or raise an error with field, value and remedy."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from record_reads import read_records

from align.core.errors import InputError
from align.core.types import ROLES, Conversation, Preference
from align.data.read.content import encode_content_row
from align.data.read.drops import BadRows
from align.data.read.messages import (
    CALL_FIELDS,
    REASONING_FIELDS,
    SYSTEM_COLUMNS,
    TOOL_COLUMNS,
    TRAIN_FLAGS,
    UNSUPPORTED_COLUMNS,
    UNSUPPORTED_FIELDS,
)
from align.data.read.records import read_documents, read_preferences
from align.data.read.shapes import CONTENT_COLUMNS, CONVERSATION_ANSWERS
from align.data.sets.ids import compute_content_id
from align.data.sources import DataSource, read_divided_documents, read_source_prompts
from align.models.adapters import read_adapter_config
from align.models.lora import read_saved_settings
from align.run import model_config, read_manifest

LIMITS = settings(max_examples=150, suppress_health_check=list(HealthCheck))

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def build_objects(keys: Any, values: Any = json_values) -> Any:
    """Build objects with keys that a reader knows and random keys."""
    return st.dictionaries(st.sampled_from(sorted(keys)) | st.text(max_size=8), values, max_size=6)


texts = st.text(max_size=30) | st.just("<think>\nHm.\n</think>\n\nYes.")
named = st.fixed_dictionaries({"name": st.just("f") | texts}, optional={"arguments": st.just("{}") | json_values})
calls = st.lists(st.fixed_dictionaries({"function": named}, optional={"id": json_values}) | named, max_size=2)
turn = st.fixed_dictionaries(
    {"role": st.sampled_from([*ROLES, "tool", "bot"]), "content": texts | json_values},
    optional=dict.fromkeys(
        (*UNSUPPORTED_FIELDS, *REASONING_FIELDS, *TRAIN_FLAGS, *CALL_FIELDS, "tool_call_id", "name"),
        json_values | calls,
    ),
)
turns = st.lists(turn, max_size=5)
fields = {
    "messages",
    "prompt",
    "text",
    "rejected",
    "margin",
    *CONVERSATION_ANSWERS,
    *SYSTEM_COLUMNS,
    *UNSUPPORTED_COLUMNS,
    *TRAIN_FLAGS,
    *TOOL_COLUMNS,
}
likely = st.fixed_dictionaries({}, optional=dict.fromkeys(sorted(fields), turns | texts | json_values | calls))
conversation_row = st.fixed_dictionaries(
    {"messages": st.lists(st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": texts}), max_size=4)},
    optional={"system": texts},
)
rows = st.lists(conversation_row | likely | build_objects(fields), min_size=1, max_size=4)


def write_temporary_rows(contents: list[Any]) -> Path:
    path = Path(tempfile.mkdtemp()) / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in contents), encoding="utf-8")
    return path


def read_or_none(read: Callable[[], Any]) -> Any:
    """Return what a reader returns, or None after an error with field, problem and a remedy of one line."""
    refusal = None
    try:
        return read()
    except InputError as error:
        refusal = error
    assert all((refusal.field, refusal.problem, refusal.remedy))
    assert "\n" not in refusal.remedy
    str(refusal).encode()
    return None


@LIMITS
@given(rows)
def test_rows_are_documents_or_refused(found: list[Any]) -> None:
    path = write_temporary_rows(found)
    documents = read_or_none(lambda: read_documents(path))
    for document, row in zip(documents or (), found, strict=bool(documents)):
        if isinstance(document, Conversation):
            assert all(m.role in ROLES for m in document.messages)
            given_messages = row.get("messages")
            if given_messages is not None:  # every given text, in order, after a column's system turn
                last_messages = document.messages[len(document.messages) - len(given_messages) :]
                assert all(m.content.endswith(g["content"]) for m, g in zip(last_messages, given_messages, strict=True))
        else:
            assert document == row["text"]


@LIMITS
@given(rows, st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([None, "Be brief."]), st.booleans())
def test_sides_never_share_a_question(found: list[Any], held_out: float, system: str | None, hide: bool) -> None:
    data = DataSource("jsonl", str(write_temporary_rows(found)), held_out=held_out, system=system, hide_reasoning=hide)
    sides = read_or_none(lambda: read_divided_documents(data))
    if sides:
        train, test = ({extract_question(d) for d in side} for side in sides)
        assert not train & test
    for split in ("train", "test"):
        for conversation in read_or_none(lambda s=split: read_source_prompts(data, s)) or ():
            assert conversation.messages[-1].role == "user"


def extract_question(document: Any) -> str:
    if isinstance(document, str):
        return document
    messages = document.messages
    last_user = max((i for i, m in enumerate(messages) if m.role == "user"), default=len(messages) - 1)
    return repr([(m.role, m.content) for m in messages[: last_user + 1]])


@LIMITS
@given(rows)
def test_pairs_are_preferences_or_refused(found: list[Any]) -> None:
    path = write_temporary_rows(found)
    for pref in read_or_none(lambda: read_preferences(path)) or ():
        assert isinstance(pref, Preference)
        assert pref.chosen != pref.rejected


shaped = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(sorted(CONTENT_COLUMNS), turns | texts | json_values)
    | {"label": st.booleans() | json_values},
)
trees = st.lists(
    st.fixed_dictionaries(
        {
            "message_id": st.sampled_from("abcd"),
            "parent_id": st.sampled_from(["a", "b", "c", None]),
            "text": texts,
            "role": st.sampled_from(["prompter", "assistant"]),
        },
        optional={"message_tree_id": st.sampled_from("xy"), "deleted": st.booleans(), "replies": json_values},
    ),
    min_size=1,
    max_size=5,
)


@LIMITS
@given(trees | st.lists(shaped | conversation_row | likely, min_size=1, max_size=3))
def test_rows_of_any_kind_are_records_or_refused(found: list[Any]) -> None:
    bad_rows = BadRows(skips=True)
    numbered_records = list(read_records(str(write_temporary_rows(found)), bad_rows=bad_rows))
    read_or_none(lambda: bad_rows.report_refused_rows("d", len(numbered_records)))
    numbers = [numbered_record.number for numbered_record in numbered_records]
    assert numbers == sorted(numbers)
    assert all(
        len(compute_content_id(encode_content_row(record))) == 32
        for record in (numbered_record.record for numbered_record in numbered_records)
    )
    assert all(
        isinstance(value, str | int | float)
        for numbered_record in numbered_records
        for value in numbered_record.extra.values()
    )


@pytest.mark.parametrize(
    ("name", "read", "keys"),
    [
        (
            "manifest.json",
            read_manifest,
            (
                "stage",
                "name",
                "status",
                "seed",
                "config",
                "inputs",
                "base",
                "outputs",
                "schema_version",
                "metrics",
                "times",
                "published",
            ),
        ),
        (
            "adapter_config.json",
            read_adapter_config,
            (
                "peft_type",
                "r",
                "lora_alpha",
                "target_modules",
                "use_dora",
                "init_lora_weights",
                "layer_replication",
                "rank_pattern",
            ),
        ),
        (
            "adapter_config.json",
            read_saved_settings,
            ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules"),
        ),
        (
            "config.json",
            model_config,
            (
                "model_type",
                "num_hidden_layers",
                "quantization_config",
                "text_config",
                "transformers_weights",
                "vocab_size",
                "quantization",
            ),
        ),
    ],
    ids=["manifest", "adapter", "adapter's settings", "model"],
)
def test_configurations_are_read_or_refused(name: str, read: Callable[[Path], Any], keys: tuple[str, ...]) -> None:
    kind = st.sampled_from(["LORA", "llama", "done", True, False, 1, 2, 10**30])

    @LIMITS
    @given(build_objects(keys, kind | json_values) | json_values)
    def check_value(value: Any) -> None:
        folder = Path(tempfile.mkdtemp())
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
        read_or_none(lambda: read(folder))

    check_value()
