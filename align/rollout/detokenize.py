"""Incremental detokenisation: the bytes of single tokens, complete characters, and stop strings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""Pattern of a SentencePiece token for a single byte, such as `<0x0A>`."""


class TokenTexts:
    """A cache of the bytes and texts of a tokenizer's single tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}

    def bytes_of(self, id: int) -> bytes:
        if id not in self._bytes:
            self._bytes[id] = self._find(id)
        return self._bytes[id]

    def text(self, id: int) -> str:
        """Return a token's text, with U+FFFD for bytes that are no whole character."""
        return self.bytes_of(id).decode("utf-8", "replace")

    def _find(self, id: int) -> bytes:
        piece = self.tokenizer.convert_ids_to_tokens(id)
        if piece is None:  # a row of the embedding without a token
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
        """Type names of the tokenizer's decoders, such as `ByteLevel`; empty for a slow tokenizer."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        decoder = json.loads(backend.to_str())["decoder"] if backend is not None else None
        parts = (decoder or {}).get("decoders", [decoder] if decoder else [])
        return {part["type"] for part in parts}


BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}
"""Letter → the byte that it represents in byte-level BPE (Radford et al., 2019)."""
REPLACEMENT = "\ufffd"
LONGEST = 8
"""Maximum tokens to wait for the end of a character, which has at most 4 bytes in UTF-8. Invalid bytes are then
returned as replacement characters."""


class TextDecoder:
    """A decoder that turns an answer into text token by token, and ends it before a stop string.

    The texts that `add_token` and `finish` return add up to the whole text, cut before the first complete stop string.
    Each is the difference of two decodings that start at the same token: a single token may be half a character, or
    lose the space before it. Text that may be the beginning of a stop string is held back.

    Args:
        stops: stop strings.
        before: the last tokens before the answer, if it continues a text. Their text is not returned.
        special: whether special tokens are decoded to text.

    Attributes:
        stopped: whether a stop string was found.
    """

    def __init__(
        self, tokenizer: Any, stops: Sequence[str] = (), before: Sequence[int] = (), special: bool = False
    ) -> None:
        self.stops = tuple(stops)
        self.stopped = False
        self._decode = build_decode(tokenizer, special)
        self._ids = list(before[-LONGEST:])
        self._decoded_count = len(self._ids)  # tokens whose text was returned
        self._decoded = self._decode(self._ids)
        self._held = ""
        self._texts = dict[tuple[int, ...], str]()

    def add_token(self, id: int) -> str:
        """Add a token, and return the new text that is complete and cannot be part of a stop string, maybe empty."""
        if self.stopped:
            return ""
        self._ids.append(id)
        text = self._decode(self._ids)
        new_count = len(self._ids) - self._decoded_count
        if len(text) <= len(self._decoded) or (text.endswith(REPLACEMENT) and new_count < LONGEST):
            return ""
        new_text = text[len(self._decoded) :]
        self._ids = self._ids[self._decoded_count :]
        self._decoded_count = len(self._ids)
        self._decoded = self._decode_cached(self._ids)
        return self._hold_back_stops(new_text)

    def finish(self) -> str:
        """Return the text that was held back as a possible stop string, at the end of the answer.

        An incomplete character is dropped.
        """
        held_text = self._held
        self._held = ""
        return held_text

    def _decode_cached(self, ids: list[int]) -> str:
        """Decode token ids to text, or take it from a cache.

        Mostly it is a single token, which occurs many times in an answer.
        """
        key = tuple(ids)
        if key not in self._texts:
            self._texts[key] = self._decode(ids)
        return self._texts[key]

    def _hold_back_stops(self, new_text: str) -> str:
        if not self.stops:
            return new_text
        text = self._held + new_text
        positions = [position for position in map(text.find, self.stops) if position >= 0]
        if positions:
            self.stopped = True
            self._held = ""
            return text[: min(positions)]
        pending = max(count_prefix_at_end(text, stop) for stop in self.stops)
        self._held = text[len(text) - pending :]
        return text[: len(text) - pending]


def build_decode(tokenizer: Any, special: bool) -> Callable[[list[int]], str]:
    """Return a function that converts token ids to text as the tokenizer's `decode` does, but faster if possible.

    If `decode` only calls the library `tokenizers`, the function calls that directly: `decode` checks whether each
    token is a tensor, which takes three times as long.

    Args:
        special: whether special tokens are decoded to text.
    """
    decode = tokenizer.decode
    kind = type(tokenizer)
    if (
        issubclass(kind, PreTrainedTokenizerFast)
        and kind.decode is PreTrainedTokenizerBase.decode
        and kind._decode is PreTrainedTokenizerFast._decode
    ):
        direct = tokenizer.backend_tokenizer.decode
        return lambda ids: direct(ids, skip_special_tokens=not special)
    return lambda ids: decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)


def count_prefix_at_end(text: str, stop_text: str) -> int:
    """Return the length of the longest end of `text` that is a proper prefix of `stop_text`, or 0 without one."""
    sizes = range(min(len(text), len(stop_text) - 1), 0, -1)
    return next((size for size in sizes if stop_text.startswith(text[-size:])), 0)


class StopFinder:
    """A callable that is given each token of an answer, and returns True once a stop string was found.

    It is used as `align.rollout.serving_engine.Request.ends`. It needs its own decoder, because the engine's thread
    calls it.
    """

    def __init__(self, decoder: TextDecoder) -> None:
        self.decoder = decoder

    def __call__(self, id: int) -> bool:
        self.decoder.add_token(id)
        return self.decoder.stopped
