"""Tests of decoding an answer token by token: whole characters, no stop strings, and no lost text."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders
from transformers import AutoTokenizer

from align.models.base import POCKET_FOLDER
from align.rollout.detokenize import StopFinder, TextDecoder, TokenTexts, count_prefix_at_end
from align.rollout.serving_engine import Output, Token
from align.serve.answers import TextAnswers
from align.serve.prompts import ChatFormat, CompletionBody, Prompt
from align.serve.request_log import RequestRecord

POCKET = AutoTokenizer.from_pretrained(POCKET_FOLDER)
LETTERS = st.text(st.sampled_from("ab <|end>é€😀👩‍👩‍👧\n\t"), max_size=24)


def encode_text(text: str, tokenizer: Any = POCKET) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def decode_pieces(ids: list[int], *stops: str, tokenizer: Any = POCKET, **options: Any) -> list[str]:
    decoder = TextDecoder(tokenizer, stops, **options)
    return [*(decoder.add_token(id) for id in ids), decoder.finish()]


@settings(max_examples=300)
@given(text=LETTERS)
def test_the_deltas_are_the_text(text: str, tiny_tokenizer: Any):
    for tokenizer in (POCKET, tiny_tokenizer):
        ids = encode_text(text, tokenizer)
        pieces = decode_pieces(ids, tokenizer=tokenizer)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_tokenizer_that_decodes_in_its_own_way_does():
    class Loud(type(POCKET)):
        def _decode(self, *args: Any, **more: Any) -> str:
            return super()._decode(*args, **more).upper()

    assert (
        "".join(decode_pieces(encode_text("quiet words"), tokenizer=Loud.from_pretrained(POCKET_FOLDER)))
        == "QUIET WORDS"
    )


@settings(max_examples=300)
@given(text=LETTERS, stops=st.lists(st.text(st.sampled_from("ab é€😀"), min_size=1, max_size=3), max_size=4))
def test_the_text_ends_before_the_stop_string_that_is_whole_first(text: str, stops: list[str]):
    ids = encode_text(text)
    prefixes = list(accumulate(decode_pieces(ids)))
    text_with_stop = next((part for part in prefixes if any(stop in part for stop in stops)), "".join(prefixes[-1:]))
    # Where a token makes two of them whole, the text is cut before the one that begins first.
    end = min((place for place in map(text_with_stop.find, stops) if place >= 0), default=len(text_with_stop))
    pieces = decode_pieces(ids, *stops)
    assert "".join(pieces) == text_with_stop[:end]
    answer = ""
    for piece in pieces:
        answer += piece
        assert not any(stop in answer for stop in stops)


@settings(max_examples=200)
@given(ids=st.lists(st.integers(0, len(POCKET) - 1), max_size=40))
def test_whatever_tokens_come_each_piece_is_text(ids: list[int]):
    "".join(decode_pieces(ids)).encode()
    finder = StopFinder(TextDecoder(POCKET, ("a",)))
    has_ended = [finder(id) for id in ids]
    assert any(has_ended) == ("a" in "".join(decode_pieces(ids)))


def test_a_stop_string_over_several_tokens_ends_with_its_last():
    ids = encode_text("one 😀 two three")
    finder = StopFinder(TextDecoder(POCKET, ("😀 two",)))
    assert [finder(id) for id in ids].index(True) == len(encode_text("one 😀 two")) - 1


def test_a_character_that_never_ends_is_left_out():
    ids = encode_text("a 😀")[:-1]
    assert "".join(decode_pieces(ids)) == "a "
    bytes_alone = [POCKET.convert_tokens_to_ids("<0xF0>")] * 30
    assert "\ufffd" in "".join(decode_pieces([*bytes_alone, *encode_text("b")]))


@pytest.fixture(scope="module")
def stripping() -> Any:
    """A tokenizer like Llama 2's, whose decoder strips the first space."""
    tokenizer = AutoTokenizer.from_pretrained(POCKET_FOLDER)
    kinds = (decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0))
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(list(kinds))
    return tokenizer


def test_an_answer_that_goes_on_with_a_text_keeps_its_blank(stripping: Any):
    ids = encode_text("the cat sat", stripping)
    assert stripping.decode(ids[1:2]) == "cat"
    assert "".join(decode_pieces(ids[1:], tokenizer=stripping, before=ids[:1])) == " cat sat"
    prompts = [Prompt(tuple(ids[:1]), "the")]
    body = CompletionBody(model="m", echo=True)
    answers = TextAnswers(ChatFormat(stripping, ()), prompts, RequestRecord("req-1", "/"), body)
    for i, id in enumerate(ids[1:]):
        list(answers.add_output(0, Output((Token(id, 0.0),), "length" if i == len(ids) - 2 else None)))
    assert answers.to_response()["choices"][0]["text"] == "the cat sat"


@pytest.mark.parametrize(
    ("text", "sought", "size"), [("ab", "abc", 2), ("xa", "abc", 1), ("abc", "abc", 0), ("", "a", 0), ("aab", "abb", 2)]
)
def test_the_beginning_at_an_end(text: str, sought: str, size: int):
    assert count_prefix_at_end(text, sought) == size


def test_the_bytes_of_tokens_are_those_of_the_text(tiny_tokenizer: Any, other_tokenizer: Any):
    texts_by_tokenizer = {tokenizer: TokenTexts(tokenizer) for tokenizer in (POCKET, tiny_tokenizer, other_tokenizer)}

    @settings(max_examples=200)
    @given(text=LETTERS)
    def compare(text: str) -> None:
        for tokenizer, texts in texts_by_tokenizer.items():
            ids = [id for id in encode_text(text, tokenizer) if id not in tokenizer.all_special_ids]
            assert b"".join(map(texts.bytes_of, ids)) == tokenizer.decode(ids).encode()

    compare()


def test_half_a_character_has_its_byte():
    texts = TokenTexts(POCKET)
    first = encode_text("€")[-3]
    assert (texts.bytes_of(first), texts.text(first)) == (b"\xe2", "\ufffd")
    assert texts.text(encode_text("a cat")[-1]) == " cat"
    assert texts.bytes_of(POCKET.eos_token_id) == b"<|end|>"
