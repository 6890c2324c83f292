"""Ids of rows equal those that `hashlib`, `hmac` and `json` alone compute."""

from __future__ import annotations

import hashlib
import hmac
import json

from align.core.types import Message, Preference
from align.data.read.content import encode_content_row
from align.data.sets.ids import SHA256, build_hmac_kind, compute_content_id, compute_question_id, read_id_kinds


def test_ids_by_hand():
    pair = Preference(
        (Message("user", "ü?"),), (Message("assistant", "a"),), (Message("assistant", "b"),), rejected_ended=False
    )
    row = {
        "prompt": [{"role": "user", "content": "ü?"}],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
        "rejected_ended": False,
    }
    text = json.dumps(row, sort_keys=True, separators=(",", ":")).encode()
    assert encode_content_row(pair) == text
    assert compute_content_id(text) == hashlib.sha256(text).digest()
    assert compute_content_id(text, b"k" * 32) == hmac.new(b"k" * 32, text, "sha256").digest()
    plain = hashlib.sha256("(Message(role='user', content='ü?'),)".encode()).digest()
    assert compute_question_id(pair) == plain
    assert compute_question_id(pair, b"k" * 32) == hmac.new(b"k" * 32, plain, "sha256").digest()


def test_what_a_data_set_says_of_its_ids():
    project_kind = build_hmac_kind("p", b"p" * 32)
    data_set = {"sources": [{"name": "a", **project_kind.as_json()}, {"name": "b", **SHA256.as_json()}]}
    assert read_id_kinds(data_set) == {"a": project_kind, "b": SHA256}
    assert project_kind.project == "p"
    assert project_kind.key not in (b"p" * 32).hex()
    assert build_hmac_kind("p", b"x" * 32) != project_kind
