"""Records and rows as training reads them, for somebody who looks: decoded from the very tokens, and never rendered
again; or turn by turn, if no model says how."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from align.core.errors import InputError
from align.core.types import Conversation, Feedback, Preference, Record
from align.data.chat.encode import IGNORED, Encoded, encode_conversation, encode_text
from align.data.chat.tokens import special_ids
from align.data.pairs import TokenizedAnswer, TokenizedPair
from align.data.read.content import join_trained_answer
from align.run.files import write_text
from align.track import format_row, format_turn

WHOLE = 10**9
"""Tokens of a text that is not parted."""
FILE = "trained_on.jsonl"
ROWS = 3
"""Of supervised training, that are shown."""
Render = Callable[[Record], list[dict[str, Any]]]
"""A record as lines: `what` it is (`chosen` or `rejected` of a pair), its `parts` (`{text, trained, special}`), and
where a template rendered it, its `tokens` and how many are `trained`; `refused` says why it did not."""


def sides(record: Record) -> Iterator[tuple[str, str | Conversation]]:
    """Yield what training reads of a record: of a pair its prompt with either answer, on which the loss is."""
    if isinstance(record, Preference):
        for side in ("chosen", "rejected"):
            yield side, join_trained_answer(record, getattr(record, side))
    elif isinstance(record, Feedback):
        yield "wanted" if record.label else "not wanted", join_trained_answer(record, record.completion)
    else:
        yield "", record


def spoken(document: str | Conversation) -> list[Mapping[str, Any]]:
    """Return the parts of a document, turn by turn."""
    if isinstance(document, str):
        return [part(document, trained=True)]
    tools = [part(f"tools: {', '.join(tool.name for tool in document.tools)}\n")] if document.tools else []
    turns = list[Mapping[str, Any]]()
    for turn in document.messages:
        trained = turn.role == "assistant" and turn.trained
        turns += [part(f"{turn.role}: "), part(format_turn(turn.as_dict()), trained), part("\n")]
    return [*tools, *turns[:-1]]


def part(text: str, trained: bool = False) -> Mapping[str, Any]:
    return {"text": text, "trained": trained, "special": False}


def render_tokens(tokenizer: Any | None, record: Record) -> list[dict[str, Any]]:
    """Return a record as a chat template writes it, decoded from the very tokens; each turn with who speaks if there is
    no tokenizer or the template refuses it."""
    lines = []
    for what, document in sides(record):
        line = {"what": what, "parts": spoken(document)}
        try:
            if tokenizer is None:
                lines.append(line)
            elif isinstance(document, str):
                lines += [row_line(tokenizer, what, row) for row in encode_text(tokenizer, document, WHOLE)]
            else:
                lines.append(row_line(tokenizer, what, encode_conversation(tokenizer, document)))
        except InputError as error:
            lines.append({**line, "refused": error.problem})
    return lines


def write_rows(folder: Path, tokenizer: Any, rows: Sequence[Encoded]) -> None:
    """Write `trained_on.jsonl` of supervised training: its first rows."""
    write(folder, (row_line(tokenizer, f"row {i}", row) for i, row in enumerate(rows[:ROWS], 1)))


def write_pair(folder: Path, tokenizer: Any, pair: TokenizedPair, answers: bool) -> None:
    """Write `trained_on.jsonl` of a stage that learns from pairs: its first one.

    Args:
        answers: the loss reads all tokens of the answers; without, the last one, where the score is.
    """
    sides = ("chosen", pair.chosen_ids, pair.chosen_start), ("rejected", pair.rejected_ids, pair.rejected_start)
    write(
        folder,
        (answer_line(tokenizer, what, ids, start if answers else len(ids) - 1) for what, ids, start in sides),
    )


def write_labelled(folder: Path, tokenizer: Any, rows: Sequence[TokenizedAnswer]) -> None:
    """Write `trained_on.jsonl` of a stage that learns from answers with a label, of both kinds: the first one of
    each."""
    firsts = {row.wanted: row for row in reversed(rows)}
    named = (("wanted", firsts[True]), ("unwanted", firsts[False]))
    write(folder, (answer_line(tokenizer, what, row.ids, row.start) for what, row in named))


def write(folder: Path, rows: Iterator[dict[str, Any]]) -> None:
    write_text(folder / FILE, "".join(map(format_row, rows)))


def row_line(tokenizer: Any, what: str, row: Encoded) -> dict[str, Any]:
    """Return the line of a row. Nothing predicts the first token, so there is no loss on it."""
    return tokens_line(
        tokenizer, what, row.input_ids, [i > 0 and label != IGNORED for i, label in enumerate(row.labels)]
    )


def answer_line(tokenizer: Any, what: str, ids: Sequence[int], start: int) -> dict[str, Any]:
    """Return the line of an answer of which the loss reads the tokens from a place on."""
    return tokens_line(tokenizer, what, ids, [i >= start for i in range(len(ids))])


def tokens_line(tokenizer: Any, what: str, ids: Sequence[int], counts: Sequence[bool]) -> dict[str, Any]:
    """Return one line of the file.

    Args:
        counts: whether the loss reads each token.

    Returns:
        `what` the row is, how many `tokens` it has, on how many of them (`trained`) there is a loss, and its text in
        `parts`: `{text, trained, special}`. A special token is one whoever spelled it out, a text is none.
    """
    special = special_ids(tokenizer)
    kinds = [(counted, i in special) for i, counted in zip(ids, counts, strict=True)]
    parts = []
    before = ""
    for (trained, marks), places in groupby(range(len(ids)), kinds.__getitem__):
        first, *others = places
        end = (others or [first])[-1] + 1
        # A tokenizer drops the blank that a text begins with, so each part is what it adds to the text before it.
        text = decode(tokenizer, ids[:end])
        added = text[len(before) :] if text.startswith(before) else decode(tokenizer, ids[first:end])
        parts.append({"text": added, "trained": trained, "special": marks})
        before = text
    return {"what": what, "tokens": len(ids), "trained": sum(counts), "parts": parts}


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
