"""Rows to imitate as token ids and labels, and the account of what was left out of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from align.data.chat import Encoded, encode_conversation, render, surely_too_long
from align.data.reasoning import lost_reasoning, reasoning_length
from align.data.tokens import text_ids
from align.errors import InputError, require
from align.types import Document


def encode_text(tokenizer: Any, text: str, max_length: int) -> list[Encoded]:
    """Plain text in pieces of at most `max_length` tokens, each token trained, closed by EOS.

    Raises:
        InputError: the tokenizer has none.
    """
    remedy = "Name eos_token in the model's tokenizer_config.json, or give conversations."
    require(tokenizer.eos_token_id is not None, "eos_token", None, "closes plain text, and this model has none", remedy)
    ids = [*text_ids(tokenizer, text), tokenizer.eos_token_id]
    if tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    pieces = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
    return [Encoded(piece, list(piece)) for piece in pieces if len(piece) > 1]


@dataclass(frozen=True, slots=True)
class Encoding:
    """Encoded documents, and what was left out.

    Attributes:
        rows: what is trained on.
        too_long: conversations longer than the context, dropped whole: a cut answer would teach to stop nowhere.
        unanswered: conversations without a token to train on.
        cut: conversations longer than the context that are among the rows, cut there.
        unreasoned: conversations whose last answer lost its reasoning to the chat template.
        unreasoned_earlier: conversations of which an earlier trained answer did.
        places: of each row, which of the documents it comes from.
    """

    rows: list[Encoded]
    too_long: int
    unanswered: int
    cut: int = 0
    unreasoned: int = 0
    unreasoned_earlier: int = 0
    places: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(len(r.input_ids) for r in self.rows)

    @property
    def given(self) -> int:
        """Rows there would be, had none been left out."""
        return len(self.rows) + self.too_long + self.unanswered


def encode(
    tokenizer: Any, documents: Sequence[Document], max_length: int, truncate: bool = False,
    mask_reasoning: bool = False, left: str = "leaves nothing to train on",
) -> Encoding:  # fmt: skip
    """Every document as token ids and labels.

    Args:
        mask_reasoning: see `encode_conversation`.
        truncate: a conversation longer than `max_length` is cut there; without, it is left out.
        left: what is wrong where every document was dropped.

    Raises:
        InputError: nothing is left; the message counts what was dropped and why.
    """
    rows, places = list[Encoded](), list[int]()
    too_long = unanswered = cut = unreasoned = unreasoned_earlier = 0
    for place, document in enumerate(documents):
        if isinstance(document, str):
            pieces = encode_text(tokenizer, document, max_length)
            rows += pieces
            places += [place] * len(pieces)
            continue
        if not truncate and surely_too_long(tokenizer, document, max_length):
            too_long += 1
            continue
        encoded = encode_conversation(tokenizer, document, mask_reasoning)
        longer = len(encoded.input_ids) > max_length
        if longer and truncate:
            encoded = Encoded(encoded.input_ids[:max_length], encoded.labels[:max_length])
        if longer and not truncate:
            too_long += 1
        elif encoded.trained == 0:
            unanswered += 1
        else:
            rows.append(encoded)
            places.append(place)
            cut += longer
            if any(reasoning_length(turn.content) for turn in document.messages if turn.role == "assistant"):
                last, earlier = lost_reasoning(document, render(tokenizer, document))
                unreasoned, unreasoned_earlier = unreasoned + last, unreasoned_earlier + earlier
    if documents and not rows:
        raise InputError(
            "data.max_length", max_length,
            f"{left}: {too_long} conversations are longer and {unanswered} have no assistant turn",
            "Raise data.max_length, or give conversations with an assistant's answer.",
        )  # fmt: skip
    return Encoding(rows, too_long, unanswered, cut, unreasoned, unreasoned_earlier, places)


def token_count(tokenizer: Any, said: Document) -> int:
    """Tokens that training reads of a conversation, or of plain text."""
    if isinstance(said, str):
        return len(text_ids(tokenizer, said)) + 1
    return len(encode_conversation(tokenizer, said).input_ids)
