"""Whatever a file holds, its reader gives records or says what is wrong: field, value, remedy. Drawn at random."""

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
from align.data.read.columns import CONTENT_COLUMNS, CONVERSATION_ANSWERS
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
from align.data.sets.ids import compute_content_id
from align.data.sources import DataSource, read_divided_documents, read_source_prompts
from align.models.adapters import read_adapter_config
from align.models.lora import read_saved_settings
from align.run import model_config, read_manifest

LIMITS = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def objects(keys: Any, values: Any = json_values) -> Any:
    """Objects whose keys are those that a reader knows, or any."""
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
whole = st.fixed_dictionaries(
    {"messages": st.lists(st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": texts}), max_size=4)},
    optional={"system": texts},
)
rows = st.lists(whole | likely | objects(fields), min_size=1, max_size=4)


def written(found: list[Any]) -> Path:
    path = Path(tempfile.mkdtemp()) / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


def reads(read: Callable[[], Any]) -> Any:
    """What a reader gives; None where it refuses, which it does by name and in one line."""
    refused = None
    try:
        return read()
    except InputError as error:
        refused = error
    assert all((refused.field, refused.problem, refused.remedy))
    assert "\n" not in refused.remedy
    str(refused).encode()
    return None


@LIMITS
@given(rows)
def test_rows_are_documents_or_refused(found: list[Any]) -> None:
    path = written(found)
    documents = reads(lambda: read_documents(path))
    for document, row in zip(documents or (), found, strict=bool(documents)):
        if isinstance(document, Conversation):
            assert all(m.role in ROLES for m in document.messages)
            given = row.get("messages")
            if given is not None:  # every text that was given is there, in its order, behind a column's system turn
                said = document.messages[len(document.messages) - len(given) :]
                assert all(m.content.endswith(g["content"]) for m, g in zip(said, given, strict=True))
        else:
            assert document == row["text"]


@LIMITS
@given(rows, st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([None, "Be brief."]), st.booleans())
def test_sides_never_share_a_question(found: list[Any], held_out: float, system: str | None, hide: bool) -> None:
    data = DataSource("jsonl", str(written(found)), held_out=held_out, system=system, hide_reasoning=hide)
    both = reads(lambda: read_divided_documents(data))
    if both:
        train, test = ({asked(d) for d in side} for side in both)
        assert not train & test
    for split in ("train", "test"):
        for conversation in reads(lambda s=split: read_source_prompts(data, s)) or ():
            assert conversation.messages[-1].role == "user"


def asked(document: Any) -> str:
    if isinstance(document, str):
        return document
    messages = document.messages
    last = max((i for i, m in enumerate(messages) if m.role == "user"), default=len(messages) - 1)
    return repr([(m.role, m.content) for m in messages[: last + 1]])


@LIMITS
@given(rows)
def test_pairs_are_preferences_or_refused(found: list[Any]) -> None:
    path = written(found)
    for pref in reads(lambda: read_preferences(path)) or ():
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
            "message_id": st.sampled_from("abcd"), "parent_id": st.sampled_from(["a", "b", "c", None]), "text": texts,
            "role": st.sampled_from(["prompter", "assistant"]),
        },
        optional={"message_tree_id": st.sampled_from("xy"), "deleted": st.booleans(), "replies": json_values},
    ),
    min_size=1, max_size=5,
)  # fmt: skip


@LIMITS
@given(trees | st.lists(shaped | whole | likely, min_size=1, max_size=3))
def test_rows_of_any_kind_are_records_or_refused(found: list[Any]) -> None:
    bad_rows = BadRows(skips=True)
    read = list(read_records(str(written(found)), bad_rows=bad_rows))
    reads(lambda: bad_rows.report_refused_rows("d", len(read)))
    numbers = [one.number for one in read]
    assert numbers == sorted(numbers)
    assert all(len(compute_content_id(encode_content_row(record))) == 32 for record in (one.record for one in read))
    assert all(isinstance(value, str | int | float) for one in read for value in one.extra.values())


@pytest.mark.parametrize(
    ("name", "read", "keys"),
    [
        ("manifest.json", read_manifest, ("stage", "name", "status", "seed", "config", "inputs", "base", "outputs",
                                          "schema_version", "metrics", "times", "published")),
        ("adapter_config.json", read_adapter_config, ("peft_type", "r", "lora_alpha", "target_modules", "use_dora",
                                                 "init_lora_weights", "layer_replication", "rank_pattern")),
        (
            "adapter_config.json",
            read_saved_settings,
            ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules"),
        ),
        ("config.json", model_config, ("model_type", "num_hidden_layers", "quantization_config", "text_config",
                                       "transformers_weights", "vocab_size", "quantization")),
    ],
    ids=["manifest", "adapter", "adapter's settings", "model"],
)  # fmt: skip
def test_configurations_are_read_or_refused(name: str, read: Callable[[Path], Any], keys: tuple[str, ...]) -> None:
    kind = st.sampled_from(["LORA", "llama", "done", True, False, 1, 2, 10**30])

    @LIMITS
    @given(objects(keys, kind | json_values) | json_values)
    def any_value(value: Any) -> None:
        folder = Path(tempfile.mkdtemp())
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
        reads(lambda: read(folder))

    any_value()
