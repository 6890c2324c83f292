"""The ledger's arithmetic: an append-only chain of hashes over salted digests. Pure; knows no database.

Row `n` is hashed together with the hash of row `n - 1`, so that altering, reordering or removing a row breaks
every hash after it. A cut *tail* breaks nothing inside the chain: it shows only against a head noted elsewhere,
which is why a reward run records the ledger's head (Schneier and Kelsey, "Secure Audit Logs", 1999, section 3).

Rows never hold a text or a name, only `sha256(salt, content)`. Content and salt lie in erasable tables: once both
are gone the digest can neither be reversed nor confirmed by guessing, and the chain still verifies.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from typing import Any

from align.errors import CorruptFile

GENESIS = "0" * 64
"""What stands where the first row would name its predecessor's hash."""

RESTORE = "Restore the store from a backup; do not export from it."


@dataclass(frozen=True, slots=True)
class Head:
    """How far a ledger had grown: what a run records of the store that it read.

    Attributes:
        seq: number of the last row, 0 before the first.
        hash: that row's hash, 64 hex digits.
    """

    seq: int
    hash: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the ledger.

    Attributes:
        seq: 1, 2, 3, … over the whole store, without gaps.
        project: whose row it is.
        kind: `candidates`, `ranking`, `retraction` or `erasure`.
        item: the item concerned; None where an annotator was erased.
        annotator: the pseudonym concerned; None where there is none.
        key: the idempotency key, unique within project and kind; None where the act is idempotent by itself.
        retracts: the ranking that a retraction takes back; None elsewhere.
        created_at: UTC, ISO 8601.
        payload: canonical JSON, kept as the very text that was hashed.
        prev_hash: hash of row `seq - 1`, or `GENESIS`.
        hash: `entry_hash` of all the above.
    """

    seq: int
    project: str
    kind: str
    item: str | None
    annotator: str | None
    key: str | None
    retracts: int | None
    created_at: str
    payload: str
    prev_hash: str
    hash: str = ""


def canonical(value: Any) -> str:
    """The one JSON text of a value: keys sorted, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def salted_digest(salt: str, content: Any) -> str:
    """`sha256` over the canonical JSON of `[salt, content]`, 64 hex digits."""
    return hashlib.sha256(canonical([salt, content]).encode()).hexdigest()


def entry_hash(entry: Entry) -> str:
    """`sha256` over the canonical JSON of every field but the hash itself, in order."""
    hashed = [getattr(entry, field.name) for field in fields(entry) if field.name != "hash"]
    return hashlib.sha256(canonical(hashed).encode()).hexdigest()


def advance(head: Head, entry: Entry) -> Head:
    """The head after `entry`, the row that should follow `head`.

    Raises:
        CorruptFile: the row is not the next one, does not name its predecessor, or is not what was hashed.
    """
    if entry.seq != head.seq + 1:
        raise corrupt(head.seq + 1, f"the row is missing (seq {entry.seq} follows seq {head.seq})")
    if entry.prev_hash != head.hash:
        raise corrupt(entry.seq, "the row does not follow the one before it")
    if entry_hash(entry) != entry.hash:
        raise corrupt(entry.seq, "the row is not the one that was written")
    return Head(entry.seq, entry.hash)


def corrupt(seq: int, problem: str) -> CorruptFile:
    """The error that names the first bad row."""
    return CorruptFile("ledger.seq", seq, problem, RESTORE)
