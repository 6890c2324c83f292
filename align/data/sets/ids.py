"""Ids of the rows of a data set: a hash of the row's content, or a keyed hash for rows of an annotation project.

A content id is the SHA-256 of a row as canonical JSON (`align.data.read.content`). The id of a short personal text
could be guessed. Rows of the annotation store therefore have the HMAC-SHA-256 (RFC 2104) of the same bytes under their
project's key. Erasing the project destroys the key. After that, it is impossible to test whether a text was a row.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from align.core.types import Record
from align.data.split import compute_question_key

FINGERPRINT = b"fingerprint of the key"
"""Message whose HMAC under a key is that key's fingerprint. It cannot be a row, because rows begin with a brace."""


class IdKind(NamedTuple):
    """The hash function of row ids: SHA-256, or HMAC-SHA-256 with the key of an annotation project.

    Attributes:
        project: annotation project that the key belongs to; empty for SHA-256.
        key: fingerprint of the key; empty for SHA-256.
    """

    project: str = ""
    key: str = ""

    def as_json(self) -> dict[str, str]:
        """Return the hash function, and for HMAC the project and key fingerprint, as fields of a source in
        `data.json`."""
        if not self.key:
            return {"content_id": "sha256"}
        return {"content_id": "hmac", "project": self.project, "key_fingerprint": self.key}


SHA256 = IdKind()
FindKey = Callable[[IdKind], bytes | None]
"""A function that returns the secret key of an IdKind, or None if it cannot be read. It is only called for HMAC."""


def build_hmac_kind(project: str, key: bytes) -> IdKind:
    """Return the IdKind of ids under a project's key. It contains the key's fingerprint, not the key."""
    return IdKind(project, hmac.digest(key, FINGERPRINT, "sha256").hex()[:16])


def read_id_kinds(data: Mapping[str, Any]) -> dict[str, IdKind]:
    """Return a dictionary from source name to the kind of its rows' ids, from the content of a data set's
    `data.json`."""
    return {
        source["name"]: IdKind(source["project"], source["key_fingerprint"])
        if source.get("content_id") == "hmac"
        else SHA256
        for source in data["sources"]
    }


def compute_content_id(row: bytes, key: bytes | None = None) -> bytes:
    """Return the content id of a row, 32 bytes: its SHA-256, or its HMAC-SHA-256 if `key` is given.

    Args:
        row: see `align.data.read.content.encode_content_row`.
        key: key of the project; None for SHA-256.
    """
    return hashlib.sha256(row).digest() if key is None else hmac.digest(key, row, "sha256")


def compute_question_id(record: Record, key: bytes | None = None) -> bytes:
    """Return the id of a record's question, 32 bytes: its SHA-256, or the HMAC of that if `key` is given. See
    `compute_question_key`."""
    return apply_key(bytes.fromhex(compute_question_key(record)), key)


def apply_key(plain: bytes, key: bytes | None) -> bytes:
    """Return the HMAC-SHA-256 of an id that was computed without a key, or the id itself if `key` is `None`."""
    return plain if key is None else hmac.digest(key, plain, "sha256")
