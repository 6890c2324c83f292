"""An append-only hash chain over salted digests, without I/O.

Link `n` is hashed together with the hash of link `n - 1`, so that altering, reordering or removing one breaks every
hash after it. A cut *tail* breaks nothing inside the chain: only a head that was stored elsewhere reveals it (Schneier
and Kelsey, "Secure Audit Logs", 1999, section 3).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from align.core.errors import CorruptFile

ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
GENESIS = "0" * 64
"""The `prev_hash` of the first link."""


@dataclass(frozen=True, slots=True)
class ChainHead:
    """The number and the hash of the last link of a hash chain.

    Attributes:
        seq: number of the last link; 0 for an empty chain.
        hash: that link's hash, 64 hex digits.
    """

    seq: int
    hash: str


class Link(Protocol):
    """A row of a table or a file that is a link of a hash chain."""

    @property
    def seq(self) -> int:
        """Number of the row: 1, 2, 3, … without gaps."""
        ...

    @property
    def prev_hash(self) -> str:
        """Hash of the link before this one, or `GENESIS` for the first."""
        ...

    @property
    def hash(self) -> str:
        """Hash of this row's `hashed` fields and `prev_hash`, as `hash_link` computes it."""
        ...

    @property
    def hashed(self) -> Sequence[Any]:
        """Values of the fields that are hashed, in a fixed order: all, including `seq`, except the two hashes."""
        ...


def to_canonical_json(value: Any) -> str:
    """Return the canonical JSON text of a value: keys sorted, no spaces, ASCII."""
    return ENCODER.encode(value)


def hash_with_salt(salt: str, content: Any) -> str:
    """Return the `sha256` of the canonical JSON of the list `[salt, content]`, 64 hex digits."""
    return hashlib.sha256(to_canonical_json([salt, content]).encode()).hexdigest()


def hash_link(hashed: Sequence[Any], prev_hash: str) -> str:
    """Return a link's hash, 64 hex digits: the `sha256` of the canonical JSON list of its fields and `prev_hash`."""
    return hashlib.sha256(to_canonical_json([*hashed, prev_hash]).encode()).hexdigest()


def verify_successor(head: ChainHead, link: Link, field: str, remedy: str) -> ChainHead:
    """Check that `link` directly follows the end of a chain, and return the new end, or raise CorruptFile.

    Args:
        field, remedy: of the error.

    Raises:
        CorruptFile: the link has another number, another predecessor or another hash. The error's `value` is the
            number of the altered or missing row.
    """
    seq = link.seq
    problem = ""
    if link.seq != head.seq + 1:
        seq = head.seq + 1
        problem = f"the row is missing (seq {link.seq} follows seq {head.seq})"
    elif link.prev_hash != head.hash:
        problem = "the row does not follow the one before it"
    elif hash_link(link.hashed, link.prev_hash) != link.hash:
        problem = "the row is not the one that was written"
    if problem:
        raise CorruptFile(field, seq, problem, remedy)
    return ChainHead(link.seq, link.hash)
