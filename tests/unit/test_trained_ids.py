"""Ids of the rows that a run trains on equal those computed with `hashlib` and `json` alone."""

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

SYSTEM = Message("system", "Be brief.")
HELLO = Message("user", "Hello")
REPLY = Message("assistant", "Hi")
AGAIN = Message("user", "And now?")
LAST = Message("assistant", "Bye", trained=False)
OTHER = Message("assistant", "No")
CALL = Message("assistant", "", tool_calls=(ToolCall("clock", "{}", "call_7"),))
RESULT = Message("tool", "12:04", tool_call_id="call_7", name="clock")


def hash_json(value: Any) -> bytes:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).digest()


def hash_turns(*turns: Message) -> bytes:
    lines = [json.dumps({"role": t.role, "content": t.content}, sort_keys=True, separators=(",", ":")) for t in turns]
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).digest()


CALLED = hashlib.sha256(
    b'{"content":"Hello","role":"user"}\n'
    b'{"content":"","role":"assistant","tool_calls":[{"arguments":{},"name":"clock"}]}\n'
    b'{"content":"12:04","role":"tool"}\n'
).digest()
CASES: dict[str, tuple[Record, list[bytes]]] = {
    "each answer's question": (
        Conversation((HELLO, REPLY, AGAIN, LAST)),
        [hash_turns(HELLO), hash_turns(HELLO, REPLY, AGAIN)],
    ),
    "a question without an answer": (
        Conversation((HELLO, REPLY, AGAIN)),
        [hash_turns(HELLO), hash_turns(HELLO, REPLY, AGAIN)],
    ),
    "its own system prompt": (Conversation((SYSTEM, HELLO, REPLY)), [hash_turns(SYSTEM, HELLO)]),
    "an answer to a system prompt alone": (Conversation((SYSTEM, REPLY, HELLO)), [hash_turns(SYSTEM, REPLY, HELLO)]),
    "an answer to nothing": (Conversation((REPLY, HELLO, REPLY)), [hash_turns(REPLY, HELLO)]),
    "plain text": ("Hello", []),
    "a pair's prompt": (Preference((SYSTEM, HELLO), (REPLY,), (OTHER,)), [hash_turns(SYSTEM, HELLO)]),
    "a longer pair's prompt": (
        Preference((HELLO, REPLY, AGAIN), (OTHER,), (LAST,)),
        [hash_turns(HELLO), hash_turns(HELLO, REPLY, AGAIN)],
    ),
    "a pair whose answers call a tool": (
        Preference((HELLO,), (CALL, RESULT, REPLY), (OTHER,)),
        [hash_turns(HELLO), CALLED],
    ),
    "an answer behind its reasoning": (
        Conversation((HELLO, Message("assistant", "<think>\nHm\n</think>\n\nHi"), AGAIN)),
        [hash_turns(HELLO), hash_turns(HELLO, REPLY, AGAIN)],
    ),
    "a labelled answer's prompt": (Feedback((HELLO,), (REPLY,), True), [hash_turns(HELLO)]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_questions_of_a_record(case: str):
    record, expected = CASES[case]
    assert [*hash_questions(record)] == expected


def compute_merkle_root(leaves: list[bytes]) -> bytes:
    """Compute the Merkle root of RFC 9162, section 2.1.1."""
    if len(leaves) < 2:
        return hashlib.sha256(b"\0" + leaves[0] if leaves else b"").digest()
    half = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\1" + compute_merkle_root(leaves[:half]) + compute_merkle_root(leaves[half:])).digest()


def test_the_file_and_its_roots(tmp_path: Path):
    """A row that is trained on twice has two rows in the file, and one leaf that counts both."""
    rows: list[Record] = [Conversation((HELLO, REPLY)), "text", Conversation((AGAIN, REPLY)), "text"]
    roots = write_trained_ids(tmp_path, rows)
    turns = [[{"role": m.role, "content": m.content} for m in row.messages] for row in (rows[0], rows[2])]  # type: ignore[union-attr]
    first_id = hash_json({"messages": turns[0]})
    text_id = hash_json({"text": "text"})
    last_id = hash_json({"messages": turns[1]})
    assert pq.read_table(tmp_path / FILE)["content_id"].to_pylist() == [first_id, text_id, last_id, text_id]
    leaves = [first_id + (1).to_bytes(4, "big"), text_id + (2).to_bytes(4, "big"), last_id + (1).to_bytes(4, "big")]
    assert roots == {
        "data_root": compute_merkle_root(leaves).hex(),
        "data_ids_root": compute_merkle_root(sorted([first_id, text_id, last_id])).hex(),
    }
    shuffled = write_trained_ids(tmp_path, rows[::-1])
    assert shuffled["data_root"] != roots["data_root"]
    assert shuffled["data_ids_root"] == roots["data_ids_root"]


def test_what_was_written_is_seen(tmp_path: Path):
    write_trained_ids(tmp_path, [record for record, _ in CASES.values()])
    question_ids: dict[Any, set[bytes]] = defaultdict(set)
    assert add_question_ids(question_ids, tmp_path / FILE, file_digest(tmp_path / FILE)) == (0, 1)  # a plain text
    assert question_ids == {SHA256: {id for _, ids in CASES.values() for id in ids}}
    questions = TrainedQuestions({None: question_ids[SHA256]})
    assert questions.asks([HELLO])
    assert not questions.asks([Message("system", "Be long."), HELLO])  # another system prompt makes another question
    # `data.system` adds this system prompt.
    questions_with_system = TrainedQuestions(questions.questions, system="Be long.")
    assert questions_with_system.asks([Message("system", "Be long."), HELLO])
    assert not questions.asks([AGAIN])
    assert not questions.asks([Message("user", "Hello ")])


def test_rows_of_a_project_have_ids_under_its_key_and_none_without_it(tmp_path: Path):
    pair = Preference((HELLO,), (REPLY,), (OTHER,))
    key = bytes(range(32))
    kind = build_hmac_kind("support", key)

    def get_kind(record: Record) -> Any:
        return kind if isinstance(record, Preference) else SHA256

    roots = write_trained_ids(tmp_path, [pair, "text"], IdScheme(get_kind, lambda id_kind: {kind: key}[id_kind]))
    pair_row, text_row = pq.read_table(tmp_path / FILE).to_pylist()
    assert pair_row["question_ids"] == [hmac.digest(key, hash_turns(HELLO), "sha256")]
    assert (pair_row["project"], pair_row["key_fingerprint"], text_row["project"]) == ("support", kind.key, None)
    assert roots
    unkeyed_folder = tmp_path / "plainly"
    unkeyed_folder.mkdir()
    write_trained_ids(unkeyed_folder, [pair])
    assert pq.read_table(unkeyed_folder / FILE)["content_id"].to_pylist() != [pair_row["content_id"]]
    assert key.hex() not in (tmp_path / FILE).read_bytes().hex()
    assert TrainedQuestions({key: set(pair_row["question_ids"])}).asks([HELLO])
    assert not TrainedQuestions({None: set(pair_row["question_ids"])}).asks([HELLO])

    assert write_trained_ids(tmp_path, [pair, "text"], IdScheme(get_kind)) == {}  # without the key there is no root
    pair_without_id, text_row = pq.read_table(tmp_path / FILE).to_pylist()
    assert pair_without_id["content_id"] is None
    assert pair_without_id["question_ids"] is None
    assert text_row["content_id"] is not None
    question_ids: dict[Any, set[bytes]] = defaultdict(set)
    assert add_question_ids(question_ids, tmp_path / FILE, file_digest(tmp_path / FILE)) == (1, 1)


@pytest.mark.parametrize("change", [lambda path: path.write_bytes(path.read_bytes() + b"\0"), Path.unlink])
def test_other_ids_than_those_that_were_published(tmp_path: Path, change: Any):
    write_trained_ids(tmp_path, ["text"])
    published = file_digest(tmp_path / FILE)
    change(tmp_path / FILE)
    with pytest.raises(CorruptFile, match=FILE):
        add_question_ids(defaultdict(set), tmp_path / FILE, published)
