"""Rows far beyond the limit are recognised by their beginning, and rows that fit are never dropped."""

from __future__ import annotations

import random
from typing import Any

import pytest

from align.core.types import Conversation, Message
from align.data.chat.encode import encode_documents, encode_prompts
from align.data.chat.tokens import CHARACTERS, MARGIN, is_longer_than

TEXTS = {
    "words": lambda n: "some plain words " * (n // 17),
    "blanks": lambda n: " " * n,
    "one letter": lambda n: "a" * n,
    "emoji": lambda n: "\U0001f600" * (n // 4),
    "mixed": lambda n: "".join(random.Random(n).choices("ab \n\u00e9", k=n)),
}


class Counting:
    """A tokenizer that records the length of its longest input."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.longest = 0

    def __call__(self, text: str, **options: Any) -> Any:
        self.longest = max(self.longest, len(text))
        return self.tokenizer(text, **options)

    def apply_chat_template(self, messages: Any, tokenize: bool = True, **options: Any) -> Any:
        if tokenize:
            self.longest = max(self.longest, sum(len(m["content"]) for m in messages))
        return self.tokenizer.apply_chat_template(messages, tokenize=tokenize, **options)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


@pytest.mark.parametrize("kind", TEXTS)
def test_it_is_right_whenever_it_says_so(tiny_tokenizer: Any, kind: str):
    for n in (1, 100, 1000, 3000, 20_000):
        text = TEXTS[kind](n)
        length = len(tiny_tokenizer(text, add_special_tokens=False)["input_ids"])
        for limit in (1, 16, 100, length - 1, length, length + 1):
            is_longer = is_longer_than(tiny_tokenizer, text, limit)
            assert not is_longer or length > limit, (n, limit)
            assert is_longer or length <= limit + 2 * MARGIN or len(text) <= CHARACTERS * (limit + MARGIN), (n, limit)


def test_a_text_of_long_tokens_that_fits_is_kept():
    def encode_wide(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [0] * -(-len(text) // 20)}

    for limit in (100, 200, 1000):
        assert not is_longer_than(encode_wide, "a" * 20 * limit, limit)
        assert is_longer_than(encode_wide, "a" * 1000 * limit, limit)


@pytest.mark.parametrize("kind", TEXTS)
def test_a_row_of_megabytes_is_dropped_by_its_beginning(tiny_tokenizer: Any, kind: str):
    counting = Counting(tiny_tokenizer)
    prompt = Conversation((Message("user", TEXTS[kind](5_000_000)),))
    long = prompt.with_answer("ok")
    short = Conversation((Message("user", "a"),)).with_answer("b")
    encoded = encode_documents(counting, [long, short], 128)
    assert (encoded.too_long, len(encoded.rows)) == (1, 1)
    prompts, dropped = encode_prompts(counting, [prompt, Conversation((Message("user", "a"),))], 128)
    assert (len(prompts), dropped) == (1, 1)
    assert counting.longest < 20_000
