"""Token ids to text while they come: bytes of single tokens, whole characters, and stop strings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

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
        """Return a token's text, with a replacement character for what is no whole character."""
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


BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}
"""The letters by which byte-level BPE writes bytes (Radford et al., 2019)."""
REPLACEMENT = "\ufffd"
LONGEST = 8
"""Tokens that one character is waited for: UTF-8 has at most 4 bytes a character. Bytes that are none stay broken."""


class TextDecoder:
    """The text of an answer, a token at a time.

    What `take` and `rest` return, put together, is the whole text, cut before the stop string that was whole first.
    Each piece is the difference of two decodings that begin at the same token, for a token alone may be half a
    character, or lose the blank before it. Text that may be the beginning of a stop string is held back until it is
    known.

    Args:
        stops: strings that end the answer.
        before: the last tokens before the answer, where it goes on with a text. None of their text is returned.
        special: special tokens are text too.

    Attributes:
        stopped: a stop string was found.
    """

    def __init__(
        self, tokenizer: Any, stops: Sequence[str] = (), before: Sequence[int] = (), special: bool = False
    ) -> None:
        self.stops = tuple(stops)
        self.stopped = False
        self._decode = decoding(tokenizer, special)
        self._ids = list(before[-LONGEST:])
        self._known = ""
        self._read = len(self._ids)  # tokens whose text is known
        self._known = self._decode(self._ids)
        self._held = ""
        self._texts = dict[tuple[int, ...], str]()

    def take(self, id: int) -> str:
        """Return the text that is sure with this token."""
        if self.stopped:
            return ""
        self._ids.append(id)
        whole = self._decode(self._ids)
        waited = len(self._ids) - self._read
        if len(whole) <= len(self._known) or (whole.endswith(REPLACEMENT) and waited < LONGEST):
            return ""
        new = whole[len(self._known) :]
        self._ids = self._ids[self._read :]
        self._read, self._known = len(self._ids), self._known_text()
        return self._beyond_stops(new)

    def rest(self) -> str:
        """Return what was held back, at the end of the answer. A character that is still broken is left out."""
        held = self._held
        self._held = ""
        return held

    def _known_text(self) -> str:
        """The text of the tokens that are kept: mostly of one, which most answers have many times."""
        key = tuple(self._ids)
        if key not in self._texts:
            self._texts[key] = self._decode(self._ids)
        return self._texts[key]

    def _beyond_stops(self, new: str) -> str:
        if not self.stops:
            return new
        text = self._held + new
        stop_places = [at for at in map(text.find, self.stops) if at >= 0]
        if stop_places:
            self.stopped = True
            self._held = ""
            return text[: min(stop_places)]
        kept = max(beginning_at_end(text, stop) for stop in self.stops)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def decoding(tokenizer: Any, special: bool) -> Callable[[list[int]], str]:
    """Return the function from ids to their text, as the tokenizer's `decode` gives it. If that only calls the library
    `tokenizers`, it is called here: `decode` asks of every token whether it is a tensor, which takes three
    times as long.

    Args:
        special: special tokens are text too.
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


def beginning_at_end(text: str, sought: str) -> int:
    """Return how many characters at the end of a text are the beginning of `sought`, less than all of it."""
    sizes = range(min(len(text), len(sought) - 1), 0, -1)
    return next((size for size in sizes if sought.startswith(text[-size:])), 0)


class StopFinder:
    """Tells the engine whether an answer ends with a token, see `align.rollout.serving_engine.Request.ends`. It has a
    decoder of its own, for it is called by the engine's thread."""

    def __init__(self, decoder: TextDecoder) -> None:
        self.decoder = decoder

    def __call__(self, id: int) -> bool:
        self.decoder.take(id)
        return self.decoder.stopped
