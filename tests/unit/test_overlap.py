"""Which rows two data sets share: against a look at the rows themselves, and never zero where nobody can know."""

from __future__ import annotations

import hashlib
import hmac
import json

from hypothesis import given
from hypothesis import strategies as st

from align.data.records.content import row_bytes
from align.data.sets.ids import SHA256, IdKind, fingerprint, id_of, kind_under, kinds_in, question_id
from align.data.sets.overlap import Content, shared
from align.types import Message, Preference

KEYS = {"": None, "p": b"p" * 32, "q": b"q" * 32}
"""Project → its key; of files none."""


def kind(project: str) -> IdKind:
    key = KEYS[project]
    return SHA256 if key is None else kind_under(project, key)


def id_by_hand(project: str, row: bytes) -> bytes:
    key = KEYS[project]
    return hmac.new(key, row, "sha256").digest() if key else hashlib.sha256(row).digest()


def content(rows: dict[str, set[str]]) -> Content:
    """Rows by project."""
    named = {kind(project): {(id_by_hand(project, row.encode()), row.encode()) for row in of}
             for project, of in rows.items()}  # fmt: skip
    return Content({kind: {id for id, _ in of} for kind, of in named.items()}, lambda kind: named[kind])


def reader(readable: set[str]):
    return lambda kind: KEYS[kind.project] if kind.project in readable else None


holdings = st.dictionaries(st.sampled_from(["", "p", "q"]), st.sets(st.sampled_from("abcdef"), min_size=1))


@given(holdings, holdings, st.sets(st.sampled_from(["p", "q"])))
def test_against_the_rows_themselves(ours: dict[str, set[str]], theirs: dict[str, set[str]], readable: set[str]):
    found = shared(content(ours), content(theirs), reader(readable))
    known, unknown = set[bytes](), set[bytes]()
    for project, rows in ours.items():
        for other, there in theirs.items():
            ids = {id_by_hand(project, row.encode()) for row in rows}
            if project == other or {project, other} & readable:
                known |= {id_by_hand(project, row.encode()) for row in rows & there}
            else:
                unknown |= ids
    assert found.ids == known
    assert found.unknown == unknown - known
    assert found.count == (None if unknown - known else len(known))


def test_a_key_that_is_gone_is_not_zero():
    ours, theirs = content({"": {"a"}}), content({"p": {"b"}})
    assert shared(ours, theirs, reader({"p"})).count == 0
    assert shared(ours, theirs, reader(set())).count is None
    assert shared(theirs, ours, reader(set())).count is None
    assert shared(theirs, theirs, reader(set())).count == 1  # one kind needs no key
    assert shared(ours, content({}), reader(set())).count == 0


def test_ids_by_hand():
    pair = Preference((Message("user", "ü?"),), (Message("assistant", "a"),), (Message("assistant", "b"),),
                      rejected_ended=False)  # fmt: skip
    row = {
        "prompt": [{"role": "user", "content": "ü?"}], "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}], "rejected_ended": False,
    }  # fmt: skip
    text = json.dumps(row, sort_keys=True, separators=(",", ":")).encode()
    assert row_bytes(pair) == text
    assert id_of(text) == hashlib.sha256(text).digest()
    assert id_of(text, b"k" * 32) == hmac.new(b"k" * 32, text, "sha256").digest()
    plain = hashlib.sha256("(Message(role='user', content='ü?'),)".encode()).digest()
    assert question_id(pair) == plain
    assert question_id(pair, b"k" * 32) == hmac.new(b"k" * 32, plain, "sha256").digest()


def test_what_a_data_set_says_of_its_ids():
    under = kind_under("p", b"p" * 32)
    said = {"sources": [{"name": "a", **under.as_json()}, {"name": "b", **SHA256.as_json()}, {"name": "older"}]}
    assert kinds_in(said) == {"a": under, "b": SHA256, "older": SHA256}
    assert (under.project, under.key) == ("p", fingerprint(b"p" * 32))
    assert under.key not in (b"p" * 32).hex()
    assert kind_under("p", b"x" * 32) != under
