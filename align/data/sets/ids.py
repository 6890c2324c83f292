"""How the rows of a data set are named: by a hash of what they say, which anybody can compute, or by one under the key
of an annotation project.

A content id is the SHA-256 of a row as canonical JSON (`align.data.read.content`). Of a short text of one person it
could be guessed. Rows of the annotation store therefore have the HMAC-SHA-256 (RFC 2104) of the same bytes under their
project's key. An erasure of the project destroys the key, and then nobody can say of any text whether it was a row.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from align.core.types import Record
from align.data.split import compute_question_key

FINGERPRINT = b"fingerprint of the key"
"""What is hashed under a key to tell it from others: no row, for rows begin with a brace."""


class IdKind(NamedTuple):
    """How ids are made.

    Attributes:
        project: the annotation project under whose key; empty for SHA-256.
        key: the fingerprint of the key; empty for SHA-256.
    """

    project: str = ""
    key: str = ""

    def as_json(self) -> dict[str, str]:
        """Return what `data.json` says of a source."""
        if not self.key:
            return {"content_id": "sha256"}
        return {"content_id": "hmac", "project": self.project, "key_fingerprint": self.key}


SHA256 = IdKind()
KeyOf = Callable[[IdKind], bytes | None]
"""The key of a kind of ids; None if it cannot be read. It is asked for HMAC alone."""


def kind_under(project: str, key: bytes) -> IdKind:
    """Return the kind of ids under a project's key, with what tells the key from others and nothing else of it."""
    return IdKind(project, hmac.digest(key, FINGERPRINT, "sha256").hex()[:16])


def kinds_in(data: Mapping[str, Any]) -> dict[str, IdKind]:
    """Return how the ids of the rows of each source of a data set (`data.json`) are made."""
    return {
        source["name"]: IdKind(source["project"], source["key_fingerprint"])
        if source.get("content_id") == "hmac"
        else SHA256
        for source in data["sources"]
    }


def id_of(row: bytes, key: bytes | None = None) -> bytes:
    """Return the content id of a row, 32 bytes.

    Args:
        row: see `align.data.read.content.encode_content_row`.
        key: of the project; None for SHA-256.
    """
    return hashlib.sha256(row).digest() if key is None else hmac.digest(key, row, "sha256")


def question_id(record: Record, key: bytes | None = None) -> bytes:
    """Return the id of what a record asks, 32 bytes: its `compute_question_key`; under a key, the HMAC of that."""
    return under(bytes.fromhex(compute_question_key(record)), key)


def under(plain: bytes, key: bytes | None) -> bytes:
    """Return an id that is made without a key, under one; the id itself if there is none."""
    return plain if key is None else hmac.digest(key, plain, "sha256")
