"""Rows of a data set as its report shows them: by a chat template with the loss mask, or turn by turn."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.core.types import Conversation, Feedback, Message, Preference, Record
from align.data.chat.encode import IGNORE_INDEX, encode_conversation
from align.data.chat.template import set_chat_template
from align.data.chat.training_view import render_tokens
from align.data.sets.report import MAX_RENDERED, ExampleWriter
from align.data.sets.spool import Spool, SpoolRows
from align.models.base import find_base
from align.models.load import load_tokenizer

MUTED = Conversation(
    (
        Message("user", "Hi"),
        Message("assistant", "Not this.", trained=False),
        Message("user", "And?"),
        Message("assistant", "This."),
    )
)
PAIR = Preference((Message("user", "Hi"),), (Message("assistant", "Good day"),), (Message("assistant", "What"),))


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    loaded_tokenizer = load_tokenizer(find_base(str(tiny_model)))
    set_chat_template(loaded_tokenizer, None)
    return loaded_tokenizer


def join_trained_text(line: dict[str, Any]) -> str:
    return "".join(part["text"] for part in line["parts"] if part["trained"])


def join_text(line: dict[str, Any]) -> str:
    return "".join(part["text"] for part in line["parts"])


def test_what_is_coloured_is_what_the_loss_is_taken_on(tokenizer: Any) -> None:
    [line] = render_tokens(tokenizer, MUTED)
    row = encode_conversation(tokenizer, MUTED)
    assert join_text(line) == tokenizer.decode(row.input_ids)
    assert join_trained_text(line) == tokenizer.decode(
        [i for i, label in zip(row.input_ids, row.labels, strict=True) if label != IGNORE_INDEX]
    )
    assert "This." in join_trained_text(line)
    assert "Not this." not in join_trained_text(line)
    assert (line["tokens"], line["trained"]) == (len(row.input_ids), row.trained)
    assert any(part["special"] for part in line["parts"])


@pytest.mark.parametrize("by", ["template", "turns"])
@pytest.mark.parametrize(
    ("record", "said"),
    [
        (MUTED, {"": "This."}),
        ("plain text", {"": "plain text"}),
        (PAIR, {"chosen": "Good day", "rejected": "What"}),
        (Feedback(PAIR.prompt, PAIR.chosen, False), {"not wanted": "Good day"}),
        (Conversation((Message("user", "Nobody answers"),)), {"": ""}),
    ],
)
def test_each_kind_of_record(tokenizer: Any, by: str, record: Record, said: dict[str, str]) -> None:
    lines = render_tokens(tokenizer if by == "template" else None, record)
    assert [line["what"] for line in lines] == [*said]
    for line, text in zip(lines, said.values(), strict=True):
        assert join_trained_text(line).startswith(text)
        assert ("tokens" in line) == (by == "template")
        assert bool(text) == bool(join_trained_text(line))


def test_a_template_that_refuses_a_row_is_told_beside_it(tokenizer: Any) -> None:
    refusing = load_tokenizer(find_base("pocket"))
    refusing.chat_template = "{{ raise_exception('no such roles') }}"
    [line] = render_tokens(refusing, MUTED)
    assert "no such roles" in line["refused"]
    assert join_text(line) == join_text(render_tokens(None, MUTED)[0])


def test_what_is_hidden_is_hidden_before_anything_is_cut(tokenizer: Any, tmp_path: Path) -> None:
    def hide(text: str) -> str:
        return text.replace("secret", "[ID]")

    conversation = Conversation((Message("user", "the secret"), Message("assistant", "a secret too")))
    examples = ExampleWriter(tmp_path, SpoolRows(Spool(tmp_path)), np.zeros(0, np.int64), hide)
    for render in (partial(render_tokens, tokenizer), partial(render_tokens, None)):
        [line] = examples.render_record(conversation, render)
        assert "secret" not in join_text(line)
        assert "a [ID] too" in join_trained_text(line)
    [line] = examples.render_record("x" * 390 + "secret" + "y" * MAX_RENDERED, partial(render_tokens, tokenizer))
    assert "sec" not in join_text(line)
    assert len(join_text(line)) < 500
    assert "too long" in line["refused"]
