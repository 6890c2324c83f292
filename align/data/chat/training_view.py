"""Views of training rows for people: decoded from the token ids that are trained on, with the trained tokens marked.

Without a tokenizer, a record is shown turn by turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from align.core.errors import InputError
from align.core.types import Conversation, Feedback, Preference, Record
from align.data.chat.encode import IGNORE_INDEX, EncodedRow, encode_conversation, encode_text
from align.data.chat.tokens import get_special_token_ids
from align.data.pairs import TokenizedAnswer, TokenizedPair
from align.data.read.content import join_trained_answer
from align.run.files import write_text
from align.track import format_row, format_turn

WHOLE = 10**9
"""A `max_length` that no text reaches."""
FILE = "trained_on.jsonl"
ROWS = 3
"""Number of rows that supervised training writes."""
Render = Callable[[Record], list[dict[str, Any]]]
"""Function that converts a record to lines of `trained_on.jsonl`: `what` it is (such as `chosen` of a pair), and its
`parts` (`{text, trained, special}`). If a template rendered it, also its number of `tokens` and how many are `trained`;
otherwise `refused` says why not."""


def iter_trained_texts(record: Record) -> Iterator[tuple[str, str | Conversation]]:
    """Yield (label, document) for each text or conversation of a record that is trained on. A pair has two: its prompt
    with the `chosen` and with the `rejected` answer."""
    if isinstance(record, Preference):
        for label in ("chosen", "rejected"):
            yield label, join_trained_answer(record, getattr(record, label))
    elif isinstance(record, Feedback):
        yield "wanted" if record.label else "not wanted", join_trained_answer(record, record.completion)
    else:
        yield "", record


def split_turns(document: str | Conversation) -> list[Mapping[str, Any]]:
    """Return a document as the `parts` of a line of `trained_on.jsonl`: the role and the text of each turn. Plain text
    is one part."""
    if isinstance(document, str):
        return [build_part(document, is_trained=True)]
    tools = [build_part(f"tools: {', '.join(tool.name for tool in document.tools)}\n")] if document.tools else []
    turns: list[Mapping[str, Any]] = []
    for turn in document.messages:
        is_trained = turn.role == "assistant" and turn.trained
        turns += [build_part(f"{turn.role}: "), build_part(format_turn(turn.as_dict()), is_trained), build_part("\n")]
    return [*tools, *turns[:-1]]


def build_part(text: str, is_trained: bool = False) -> Mapping[str, Any]:
    """Return one part of a line of `trained_on.jsonl`: its text, with `trained` as given and `special` False."""
    return {"text": text, "trained": is_trained, "special": False}


def render_tokens(tokenizer: Any | None, record: Record) -> list[dict[str, Any]]:
    """Return the lines of `trained_on.jsonl` for a record: its decoded text, in parts with and without a loss.

    Without a tokenizer, or if its chat template refuses the record, the record is shown turn by turn with its roles.
    """
    lines = []
    for label, document in iter_trained_texts(record):
        line = {"what": label, "parts": split_turns(document)}
        try:
            if tokenizer is None:
                lines.append(line)
            elif isinstance(document, str):
                lines += [build_row_line(tokenizer, label, row) for row in encode_text(tokenizer, document, WHOLE)]
            else:
                lines.append(build_row_line(tokenizer, label, encode_conversation(tokenizer, document)))
        except InputError as error:
            lines.append({**line, "refused": error.problem})
    return lines


def write_first_rows(folder: Path, tokenizer: Any, rows: Sequence[EncodedRow]) -> None:
    """Write the first `ROWS` rows of supervised training to `trained_on.jsonl` in a folder, decoded and with the loss
    marked."""
    write_view(folder, (build_row_line(tokenizer, f"row {i}", row) for i, row in enumerate(rows[:ROWS], 1)))


def write_first_pair(folder: Path, tokenizer: Any, pair: TokenizedPair, has_loss_on_answers: bool) -> None:
    """Write the two answers of a preference pair to `trained_on.jsonl` in a folder, decoded and with the loss marked.
    Stages that learn from pairs call it with their first pair.

    Args:
        has_loss_on_answers: whether the loss is computed on all tokens of the answers, or only on the last one, for the
            score.
    """
    chosen_start = pair.chosen_start if has_loss_on_answers else len(pair.chosen_ids) - 1
    rejected_start = pair.rejected_start if has_loss_on_answers else len(pair.rejected_ids) - 1
    chosen = build_answer_line(tokenizer, "chosen", pair.chosen_ids, chosen_start)
    rejected = build_answer_line(tokenizer, "rejected", pair.rejected_ids, rejected_start)
    write_view(folder, [chosen, rejected])


def write_first_labelled_answers(folder: Path, tokenizer: Any, rows: Sequence[TokenizedAnswer]) -> None:
    """Write the first wanted and the first unwanted answer (KTO) to `trained_on.jsonl` in a folder, decoded and with
    the loss marked.

    Args:
        rows: answers with both labels.
    """
    first_rows = {row.wanted: row for row in reversed(rows)}
    labelled = (("wanted", first_rows[True]), ("unwanted", first_rows[False]))
    write_view(folder, [build_answer_line(tokenizer, label, row.ids, row.start) for label, row in labelled])


def write_view(folder: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text(folder / FILE, "".join(map(format_row, rows)))


def build_row_line(tokenizer: Any, label: str, row: EncodedRow) -> dict[str, Any]:
    """Return the line of `trained_on.jsonl` for an encoded row: its decoded text, in parts with and without a loss. The
    first token has no loss, since nothing predicts it."""
    has_loss = [i > 0 and token_label != IGNORE_INDEX for i, token_label in enumerate(row.labels)]
    return build_tokens_line(tokenizer, label, row.input_ids, has_loss)


def build_answer_line(tokenizer: Any, label: str, ids: Sequence[int], start: int) -> dict[str, Any]:
    """Return the line of `trained_on.jsonl` for token ids of a prompt and answer, with a loss on the tokens from
    `start` on."""
    return build_tokens_line(tokenizer, label, ids, [i >= start for i in range(len(ids))])


def build_tokens_line(tokenizer: Any, label: str, ids: Sequence[int], has_loss: Sequence[bool]) -> dict[str, Any]:
    """Return one line of `trained_on.jsonl`: the decoded text of a row, in parts with and without a loss.

    Args:
        label: what the row is.
        has_loss: whether each token has a loss.

    Returns:
        `what` the row is, the number of its `tokens`, the number of `trained` ones, which have a loss, and its text in
        `parts`: `{text, trained, special}`. Only tokens with a special id are special, not text that spells them.
    """
    special = get_special_token_ids(tokenizer)
    kinds = [(is_trained, token_id in special) for token_id, is_trained in zip(ids, has_loss, strict=True)]
    parts = []
    previous_text = ""
    for (is_trained, is_special), group in groupby(range(len(ids)), kinds.__getitem__):
        positions = list(group)
        start = positions[0]
        end = positions[-1] + 1
        # A tokenizer drops a blank at the beginning of a text, so a part is what its tokens add to the text so far.
        text = decode(tokenizer, ids[:end])
        is_longer = text.startswith(previous_text)
        part_text = text[len(previous_text) :] if is_longer else decode(tokenizer, ids[start:end])
        parts.append({"text": part_text, "trained": is_trained, "special": is_special})
        previous_text = text
    return {"what": label, "tokens": len(ids), "trained": sum(has_loss), "parts": parts}


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Decode token ids to text, with their special tokens and without changes to blanks."""
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
