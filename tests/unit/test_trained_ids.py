"""What a run was given to train on, by ids, against `hashlib` and `json` alone."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from align.core.errors import CorruptFile
from align.core.types import Conversation, Feedback, Message, Preference, Record, ToolCall
from align.data.sets.ids import SHA256, build_hmac_kind
from align.data.trained_ids import FILE, IdScheme, TrainedQuestions, add_question_ids, hash_questions, write_trained_ids
from align.run import file_digest

SYSTEM, HELLO, REPLY = Message("system", "Be brief."), Message("user", "Hello"), Message("assistant", "Hi")
AGAIN, LAST = Message("user", "And now?"), Message("assistant", "Bye", trained=False)
OTHER = Message("assistant", "No")
CALL = Message("assistant", "", tool_calls=(ToolCall("clock", "{}", "call_7"),))
RESULT = Message("tool", "12:04", tool_call_id="call_7", name="clock")


def digest(value: Any) -> bytes:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).digest()


def asked(*turns: Message) -> bytes:
    lines = [json.dumps({"role": t.role, "content": t.content}, sort_keys=True, separators=(",", ":")) for t in turns]
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).digest()


CALLED = hashlib.sha256(
    b'{"content":"Hello","role":"user"}\n'
    b'{"content":"","role":"assistant","tool_calls":[{"arguments":{},"name":"clock"}]}\n'
    b'{"content":"12:04","role":"tool"}\n'
).digest()
CASES: dict[str, tuple[Record, list[bytes]]] = {
    "each answer's question": (Conversation((HELLO, REPLY, AGAIN, LAST)), [asked(HELLO), asked(HELLO, REPLY, AGAIN)]),
    "a question without an answer": (Conversation((HELLO, REPLY, AGAIN)), [asked(HELLO), asked(HELLO, REPLY, AGAIN)]),
    "its own system prompt": (Conversation((SYSTEM, HELLO, REPLY)), [asked(SYSTEM, HELLO)]),
    "an answer to a system prompt alone": (Conversation((SYSTEM, REPLY, HELLO)), [asked(SYSTEM, REPLY, HELLO)]),
    "an answer to nothing": (Conversation((REPLY, HELLO, REPLY)), [asked(REPLY, HELLO)]),
    "plain text": ("Hello", []),
    "a pair's prompt": (Preference((SYSTEM, HELLO), (REPLY,), (OTHER,)), [asked(SYSTEM, HELLO)]),
    "a longer pair's prompt": (
        Preference((HELLO, REPLY, AGAIN), (OTHER,), (LAST,)), [asked(HELLO), asked(HELLO, REPLY, AGAIN)]
    ),
    "a pair whose answers call a tool": (
        Preference((HELLO,), (CALL, RESULT, REPLY), (OTHER,)), [asked(HELLO), CALLED]
    ),
    "an answer behind its reasoning": (
        Conversation((HELLO, Message("assistant", "<think>\nHm\n</think>\n\nHi"), AGAIN)),
        [asked(HELLO), asked(HELLO, REPLY, AGAIN)],
    ),
    "a labelled answer's prompt": (Feedback((HELLO,), (REPLY,), True), [asked(HELLO)]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_questions_of_a_record(case: str):
    record, expected = CASES[case]
    assert [*hash_questions(record)] == expected


def root(leaves: list[bytes]) -> bytes:
    """RFC 9162, section 2.1.1, as it is written there."""
    if len(leaves) < 2:
        return hashlib.sha256(b"\0" + leaves[0] if leaves else b"").digest()
    half = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\1" + root(leaves[:half]) + root(leaves[half:])).digest()


def test_the_file_and_its_roots(tmp_path: Path):
    """A row that is given twice stands there twice, and is one leaf with its exposure."""
    rows: list[Record] = [Conversation((HELLO, REPLY)), "text", Conversation((AGAIN, REPLY)), "text"]
    roots = write_trained_ids(tmp_path, rows)
    turns = [[{"role": m.role, "content": m.content} for m in row.messages] for row in (rows[0], rows[2])]  # type: ignore[union-attr]
    first, text, other = digest({"messages": turns[0]}), digest({"text": "text"}), digest({"messages": turns[1]})
    assert pq.read_table(tmp_path / FILE)["content_id"].to_pylist() == [first, text, other, text]
    leaves = [first + (1).to_bytes(4, "big"), text + (2).to_bytes(4, "big"), other + (1).to_bytes(4, "big")]
    assert roots == {"data_root": root(leaves).hex(), "data_ids_root": root(sorted([first, text, other])).hex()}
    shuffled = write_trained_ids(tmp_path, rows[::-1])
    assert shuffled["data_root"] != roots["data_root"]
    assert shuffled["data_ids_root"] == roots["data_ids_root"]


def test_what_was_written_is_seen(tmp_path: Path):
    write_trained_ids(tmp_path, [record for record, _ in CASES.values()])
    found: dict[Any, set[bytes]] = defaultdict(set)
    assert add_question_ids(found, tmp_path / FILE, file_digest(tmp_path / FILE)) == (0, 1)  # a plain text
    assert found == {SHA256: {id for _, ids in CASES.values() for id in ids}}
    seen = TrainedQuestions({None: found[SHA256]})
    assert seen.asks([HELLO])
    assert not seen.asks([Message("system", "Be long."), HELLO])  # the system prompt may be what it is about
    asked_under = TrainedQuestions(seen.questions, system="Be long.")  # data.system adds it
    assert asked_under.asks([Message("system", "Be long."), HELLO])
    assert not seen.asks([AGAIN])
    assert not seen.asks([Message("user", "Hello ")])


def test_rows_of_a_project_have_ids_under_its_key_and_none_without_it(tmp_path: Path):
    pair, key = Preference((HELLO,), (REPLY,), (OTHER,)), bytes(range(32))
    kind = build_hmac_kind("support", key)

    def kind_of(record: Record) -> Any:
        return kind if isinstance(record, Preference) else SHA256

    roots = write_trained_ids(tmp_path, [pair, "text"], IdScheme(kind_of, lambda asked: {kind: key}[asked]))
    first, other = pq.read_table(tmp_path / FILE).to_pylist()
    assert first["question_ids"] == [hmac.digest(key, asked(HELLO), "sha256")]
    assert (first["project"], first["key_fingerprint"], other["project"]) == ("support", kind.key, None)
    assert roots
    plainly = tmp_path / "plainly"
    plainly.mkdir()
    write_trained_ids(plainly, [pair])
    assert pq.read_table(plainly / FILE)["content_id"].to_pylist() != [first["content_id"]]
    assert key.hex() not in (tmp_path / FILE).read_bytes().hex()
    assert TrainedQuestions({key: set(first["question_ids"])}).asks([HELLO])
    assert not TrainedQuestions({None: set(first["question_ids"])}).asks([HELLO])

    assert write_trained_ids(tmp_path, [pair, "text"], IdScheme(kind_of)) == {}  # nobody can say what the set is
    without, other = pq.read_table(tmp_path / FILE).to_pylist()
    assert without["content_id"] is None
    assert without["question_ids"] is None
    assert other["content_id"] is not None
    found: dict[Any, set[bytes]] = defaultdict(set)
    assert add_question_ids(found, tmp_path / FILE, file_digest(tmp_path / FILE)) == (1, 1)


@pytest.mark.parametrize("change", [lambda path: path.write_bytes(path.read_bytes() + b"\0"), Path.unlink])
def test_other_ids_than_those_that_were_published(tmp_path: Path, change: Any):
    write_trained_ids(tmp_path, ["text"])
    published = file_digest(tmp_path / FILE)
    change(tmp_path / FILE)
    with pytest.raises(CorruptFile, match=FILE):
        add_question_ids(defaultdict(set), tmp_path / FILE, published)
