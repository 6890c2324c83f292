"""Tests of encoding a context and its continuation by the rules of lm-eval, and of splitting a text into windows."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from align.core.errors import InputError
from align.core.types import Conversation, Message
from align.data.chat.continuations import encode_answer, encode_continuation, split_windows
from align.data.chat.encode import IGNORE_INDEX, EncodedRow
from align.models.base import find_base
from align.models.load import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(find_base("pocket"))


def split_row(row: EncodedRow) -> tuple[list[int], list[int]]:
    """Return the token ids of the context and those that are scored."""
    context_ids = [i for i, label in zip(row.input_ids, row.labels, strict=True) if label == IGNORE_INDEX]
    scored_ids = [label for label in row.labels if label != IGNORE_INDEX]
    assert row.input_ids == [*context_ids, *scored_ids], "what is scored stands last"
    return context_ids, scored_ids


def test_a_continuation_is_what_both_have_more_than_the_context(tokenizer: Any) -> None:
    context_ids, scored_ids = split_row(encode_continuation(tokenizer, "I like", " the rain"))
    assert context_ids == tokenizer.encode("I like")
    assert [*context_ids, *scored_ids] == tokenizer.encode("I like the rain")


@pytest.mark.parametrize("end", [" ", "  ", "\n", " \n\t "])
def test_white_space_at_the_end_of_a_context_is_the_continuations(tokenizer: Any, end: str) -> None:
    context_ids, scored_ids = split_row(encode_continuation(tokenizer, f"I like{end}", " it"))
    assert context_ids == tokenizer.encode("I like")
    assert [*context_ids, *scored_ids] == tokenizer.encode(f"I like{end} it")


@pytest.mark.parametrize("context", ["", " ", "\n"])
def test_without_a_context_the_prefix_token_stands_in_front(tokenizer: Any, context: str) -> None:
    context_ids, scored_ids = split_row(encode_continuation(tokenizer, context, " it"))
    assert context_ids == [tokenizer.bos_token_id]
    assert scored_ids == tokenizer.encode(f"{context} it", add_special_tokens=False)


def test_a_continuation_that_begins_with_the_prefix_token_has_it_as_its_context(tokenizer: Any) -> None:
    context_ids, scored_ids = split_row(encode_continuation(tokenizer, "", f"{tokenizer.bos_token}it"))
    assert (context_ids, scored_ids) == (
        [tokenizer.bos_token_id],
        tokenizer.encode(f"{tokenizer.bos_token}it", add_special_tokens=False)[1:],
    )


def test_special_tokens_of_the_tokenizer_stand_in_front_once() -> None:
    """The tokenizer puts BOS in front of texts, as Llama's does."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing

    word_level = Tokenizer(WordLevel({"<s>": 0, "a": 1, "b": 2, "c": 3, "?": 4}, unk_token="?"))
    word_level.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    word_level.post_processor = TemplateProcessing(single="<s> $0", special_tokens=[("<s>", 0)])  # pyright: ignore
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_level, bos_token="<s>", unk_token="?")
    assert split_row(encode_continuation(tokenizer, "a b", " c")) == ([0, 1, 2], [3])
    assert split_row(encode_continuation(tokenizer, "<s> a b", " c")) == ([0, 1, 2], [3])
    assert split_row(encode_continuation(tokenizer, "", " c")) == ([0], [3])
    assert split_row(split_windows(tokenizer, "a b c", 9)[0]) == ([0], [1, 2, 3])
    tokenizer.bos_token = None
    with pytest.raises(InputError, match="has neither BOS nor EOS"):
        encode_continuation(tokenizer, "", " c")


def test_what_has_no_token_of_its_own_is_refused(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="no tokens of its own"):
        encode_continuation(tokenizer, "I", "")


def test_an_answer_stands_behind_the_header_of_its_turn(tokenizer: Any) -> None:
    prompt = Conversation((Message("user", "How are you?"),))
    context_ids, scored_ids = split_row(encode_answer(tokenizer, prompt, "Fine."))
    prompt_ids = tokenizer.apply_chat_template(prompt.as_dicts(), add_generation_prompt=True, return_dict=False)
    assert context_ids == prompt_ids
    assert tokenizer.decode(scored_ids).strip() == "Fine."


def test_an_answer_that_spells_out_a_special_token_is_text(tokenizer: Any) -> None:
    prompt = Conversation((Message("user", f"Say {tokenizer.eos_token}"),))
    context_ids, scored_ids = split_row(encode_answer(tokenizer, prompt, f"{tokenizer.eos_token} now"))
    assert tokenizer.eos_token_id not in scored_ids
    assert context_ids.count(tokenizer.eos_token_id) == 1, "the one that ends the question's turn"


@pytest.mark.parametrize("most", [2, 3, 7, 100])
def test_windows_score_each_token_once(tokenizer: Any, most: int) -> None:
    text = "The river runs through the old town, and the people like to sit there in the evening."
    ids = tokenizer.encode(text, add_special_tokens=False)
    windows = split_windows(tokenizer, text, most)
    assert [id for row in windows for id in split_row(row)[1]] == ids
    assert all(len(row.input_ids) <= most for row in windows)
    all_ids = [tokenizer.bos_token_id, *ids]
    assert [split_row(row)[0] for row in windows] == [[all_ids[i]] for i in range(0, len(ids), most - 1)]
