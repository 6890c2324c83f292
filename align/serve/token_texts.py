"""The bytes that a token stands for, as `logprobs` tell them: a token may be a part of a character."""

from __future__ import annotations

import json
import re
from functools import cached_property
from typing import Any

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A byte, as SentencePiece writes one that no other piece holds."""


class TokenTexts:
    """Bytes of each token of a tokenizer, computed once a token."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}

    def bytes_of(self, id: int) -> bytes:
        if id not in self._bytes:
            self._bytes[id] = self._find(id)
        return self._bytes[id]

    def text(self, id: int) -> str:
        """With a replacement character for what is no whole character."""
        return self.bytes_of(id).decode("utf-8", "replace")

    def _find(self, id: int) -> bytes:
        piece = self.tokenizer.convert_ids_to_tokens(id)
        if piece is None:  # a row of the embedding that the tokenizer has no token for
            return b""
        if id in self.tokenizer.added_tokens_decoder:
            return str(piece).encode()
        if "ByteLevel" in self._decoders and all(letter in BYTES for letter in piece):
            return bytes(BYTES[letter] for letter in piece)
        if "ByteFallback" in self._decoders and (byte := BYTE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        if "\u2581" in piece:  # SentencePiece's blank, which decoding strips from the first token
            return piece.replace("\u2581", " ").encode()
        return self.tokenizer.decode([id], clean_up_tokenization_spaces=False).encode()

    @cached_property
    def _decoders(self) -> set[str]:
        """The kinds of decoder in the tokenizer."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        decoder = json.loads(backend.to_str())["decoder"] if backend is not None else None
        parts = (decoder or {}).get("decoders", [decoder] if decoder else [])
        return {part["type"] for part in parts}


def byte_letters() -> dict[str, int]:
    """The letters by which byte-level BPE writes bytes (Radford et al., 2019): a printable byte by its own letter, each
    other one by the next letter from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES = byte_letters()
