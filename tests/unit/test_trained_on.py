"""Trained rows are shown decoded: the text is that of the tokens, and the marks are those of the labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_templates import FAMILIES
from test_chat import family, talk
from tokenizers import decoders
from transformers import AutoTokenizer

from align.data.chat.encode import IGNORE_INDEX, EncodedRow, encode_conversation, encode_text
from align.data.chat.training_view import (
    FILE,
    ROWS,
    build_row_line,
    build_tokens_line,
    write_first_pair,
    write_first_rows,
)
from align.data.pairs import TokenizedPair
from align.models.base import find_builtin_folder
from align.track import read_rows


def join_marked_parts(row: dict[str, Any], key: str) -> str:
    return "".join(part["text"] for part in row["parts"] if part[key])


def join_parts(row: dict[str, Any]) -> str:
    return "".join(part["text"] for part in row["parts"])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_parts_are_the_row_and_the_marks_are_its_labels(name: str) -> None:
    _, tokenizer = family(name)
    row = encode_conversation(tokenizer, talk("Hi </s> a.", "Größe 🙂 b.", "And?", "Fine."))
    line = build_row_line(tokenizer, "row 1", row)
    assert join_parts(line) == tokenizer.decode(row.input_ids)
    assert join_marked_parts(line, "trained") == tokenizer.decode(
        [label for label in row.labels if label != IGNORE_INDEX]
    )
    assert (line["tokens"], line["trained"]) == (len(row.input_ids), row.trained)
    assert "</s> a." in "".join(part["text"] for part in line["parts"] if not part["special"])  # the user typed these


def test_a_text_keeps_the_blank_that_it_begins_with() -> None:
    """Llama 2's tokenizer drops a blank at the start of a text, and so from each part that is decoded alone."""
    tokenizer = AutoTokenizer.from_pretrained(find_builtin_folder("pocket"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(steps)
    ids = tokenizer("one two three four", add_special_tokens=False).input_ids
    line = build_tokens_line(tokenizer, "row 1", ids, [i > 1 for i in range(len(ids))])
    assert join_parts(line) == "one two three four"
    assert join_marked_parts(line, "trained").startswith(" ")


def test_the_first_token_of_a_text_has_no_loss() -> None:
    _, tokenizer = family("llama3")
    (row,) = encode_text(tokenizer, "a b", 100)
    line = build_row_line(tokenizer, "row 1", row)
    assert join_marked_parts(line, "trained") == tokenizer.decode(row.input_ids[1:])
    assert line["trained"] == row.trained


def test_the_first_rows_are_written(tmp_path: Path) -> None:
    _, tokenizer = family("llama3")
    rows = [encode_conversation(tokenizer, talk("q", f"answer {i}")) for i in range(9)]
    write_first_rows(tmp_path, tokenizer, rows)
    lines = read_rows(tmp_path / FILE)
    assert [row["what"] for row in lines] == ["row 1", "row 2", "row 3"]
    assert [join_marked_parts(row, "trained") for row in lines] == [f"answer {i}<|eot_id|>" for i in range(ROWS)]
    cut = EncodedRow(rows[0].input_ids[:3], rows[0].labels[:3])
    write_first_rows(tmp_path, tokenizer, [cut])  # a truncated row is shown truncated
    assert join_parts(read_rows(tmp_path / FILE)[0]) == tokenizer.decode(cut.input_ids)


def test_a_pair_shows_what_the_loss_reads(tmp_path: Path) -> None:
    _, tokenizer = family("llama3")
    chosen_ids, rejected_ids = (
        [*tokenizer("q", add_special_tokens=False).input_ids, *answer] for answer in ([5, 6], [7])
    )
    pair = TokenizedPair(chosen_ids, rejected_ids, 1, 1)
    write_first_pair(tmp_path, tokenizer, pair, has_loss_on_answers=True)
    assert [row["trained"] for row in read_rows(tmp_path / FILE)] == [2, 1]
    write_first_pair(tmp_path, tokenizer, pair, has_loss_on_answers=False)
    lines = read_rows(tmp_path / FILE)
    assert [(row["what"], row["trained"]) for row in lines] == [("chosen", 1), ("rejected", 1)]
    assert join_marked_parts(lines[0], "trained") == tokenizer.decode([6])
