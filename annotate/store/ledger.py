"""The ledger's rows: links of a chain of hashes (`align.core.chain`). Pure; knows no database.

A cut tail of the ledger shows only against a head noted elsewhere, which is why a reward run records it.

Rows never hold a text or a name, only `sha256(salt, content)`. Content and salt lie in erasable tables: once both
are gone the digest can neither be reversed nor confirmed by guessing, and the chain still verifies.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from align.core.chain import link_hash
from align.core.errors import CorruptFile

FIELD = "ledger.seq"
"""What errors call the number of a row."""
RESTORE = "Restore the store from a backup; do not export from it."


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

    @property
    def hashed(self) -> tuple[Any, ...]:
        """See `align.core.chain.Link`."""
        return tuple(getattr(self, field.name) for field in fields(self) if field.name not in ("prev_hash", "hash"))


def entry_hash(entry: Entry) -> str:
    """`sha256` over the canonical JSON of every field but the hash itself, in order."""
    return link_hash(entry.hashed, entry.prev_hash)


def corrupt(seq: int, problem: str) -> CorruptFile:
    """The error that names the first bad row."""
    return CorruptFile(FIELD, seq, problem, RESTORE)
