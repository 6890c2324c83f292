"""What a run was given to train on, by ids, against `hashlib` and `json` alone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from align.data.trained_ids import FILE, Seen, question_ids, questions_in, write_ids
from align.errors import CorruptFile
from align.run import file_digest
from align.types import Conversation, Feedback, Message, Preference, Record

SYSTEM, HELLO, REPLY = Message("system", "Be brief."), Message("user", "Hello"), Message("assistant", "Hi")
AGAIN, LAST = Message("user", "And now?"), Message("assistant", "Bye", trained=False)
OTHER = Message("assistant", "No")


def digest(value: Any) -> bytes:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).digest()


def asked(*turns: Message) -> bytes:
    return digest([{"role": t.role, "content": t.content, "train": None} for t in turns])


CASES: dict[str, tuple[Record, list[bytes]]] = {
    "each answer's question": (Conversation((HELLO, REPLY, AGAIN, LAST)), [asked(HELLO), asked(HELLO, REPLY, AGAIN)]),
    "a question without an answer": (Conversation((HELLO, REPLY, AGAIN)), [asked(HELLO), asked(HELLO, REPLY, AGAIN)]),
    "no system prompt": (Conversation((SYSTEM, HELLO, REPLY)), [asked(HELLO)]),
    "an answer to nothing": (Conversation((REPLY, HELLO, REPLY)), [asked(REPLY, HELLO)]),
    "plain text": ("Hello", []),
    "a pair's prompt": (Preference((SYSTEM, HELLO), (REPLY,), (OTHER,)), [asked(HELLO)]),
    "a longer pair's prompt": (
        Preference((HELLO, REPLY, AGAIN), (OTHER,), (LAST,)), [asked(HELLO), asked(HELLO, REPLY, AGAIN)]
    ),
    "a labelled answer's prompt": (Feedback((HELLO,), (REPLY,), True), [asked(HELLO)]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_questions_of_a_record(case: str):
    record, expected = CASES[case]
    assert question_ids(record) == expected


def root(leaves: list[bytes]) -> bytes:
    """RFC 9162, section 2.1.1, as it is written there."""
    if len(leaves) < 2:
        return hashlib.sha256(b"\0" + leaves[0] if leaves else b"").digest()
    half = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\1" + root(leaves[:half]) + root(leaves[half:])).digest()


def test_the_file_and_its_roots(tmp_path: Path):
    """A row that is given twice stands there twice, and is one leaf with its exposure."""
    rows: list[Record] = [Conversation((HELLO, REPLY)), "text", Conversation((AGAIN, REPLY)), "text"]
    roots = write_ids(tmp_path, rows)
    turns = [[{"role": m.role, "content": m.content} for m in row.messages] for row in (rows[0], rows[2])]  # type: ignore[union-attr]
    first, text, other = digest({"messages": turns[0]}), digest({"text": "text"}), digest({"messages": turns[1]})
    assert pq.read_table(tmp_path / FILE)["content_id"].to_pylist() == [first, text, other, text]
    leaves = [first + (1).to_bytes(4, "big"), text + (2).to_bytes(4, "big"), other + (1).to_bytes(4, "big")]
    assert roots == {"data_root": root(leaves).hex(), "data_ids_root": root(sorted([first, text, other])).hex()}
    shuffled = write_ids(tmp_path, rows[::-1])
    assert shuffled["data_root"] != roots["data_root"]
    assert shuffled["data_ids_root"] == roots["data_ids_root"]


def test_what_was_written_is_seen(tmp_path: Path):
    write_ids(tmp_path, [record for record, _ in CASES.values()])
    seen = Seen(frozenset(questions_in(tmp_path / FILE, file_digest(tmp_path / FILE))))
    assert seen.questions == {id for _, ids in CASES.values() for id in ids}
    assert seen.asks([HELLO])
    assert seen.asks([Message("system", "Be long."), HELLO])
    assert not seen.asks([AGAIN])
    assert not seen.asks([Message("user", "Hello ")])


@pytest.mark.parametrize("change", [lambda path: path.write_bytes(path.read_bytes() + b"\0"), Path.unlink])
def test_other_ids_than_those_that_were_published(tmp_path: Path, change: Any):
    write_ids(tmp_path, ["text"])
    published = file_digest(tmp_path / FILE)
    change(tmp_path / FILE)
    with pytest.raises(CorruptFile, match=FILE):
        questions_in(tmp_path / FILE, published)
