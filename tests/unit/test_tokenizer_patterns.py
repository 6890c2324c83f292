"""Patterns of downloaded tokenizers that would never end are refused."""

from __future__ import annotations

import time

import pytest
from chat_templates import make_tokenizer
from tokenizers import Regex, normalizers, pre_tokenizers

from align.core.errors import InputError
from align.data.chat import template as tokenizer_patterns
from align.data.chat.template import check_patterns_terminate, set_chat_template

GPT2 = r"'(?i:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|"
    r"\s+"
)
CARELESS = [r"(a+)+$", r"(\w+\s?)+$", r"([a-z]+)*[0-9]", r"(x+x+)+y", r"(\p{L}+)+\?"]
"""Patterns whose time doubles with every character."""


def make_splitting_tokenizer(pattern: str) -> object:
    tokenizer = make_tokenizer("{{ messages }}")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    return tokenizer


@pytest.mark.parametrize("pattern", [GPT2, LLAMA3, r"\d{1,3}(?=(?:\d{3})*\b)"])
def test_a_sound_pattern_passes(pattern: str) -> None:
    check_patterns_terminate(make_splitting_tokenizer(pattern))


@pytest.mark.parametrize("pattern", CARELESS)
def test_a_careless_pattern_is_refused_by_name(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_patterns, "PATIENCE_S", 1.5)
    with pytest.raises(InputError, match="a pattern in its pre_tokenizer does not end on short texts") as caught:
        set_chat_template(make_splitting_tokenizer(pattern), None)
    assert (caught.value.field, caught.value.value) == ("tokenizer.json", pattern)


def test_a_pattern_of_the_normalizer_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_patterns, "PATIENCE_S", 1.5)
    tokenizer = make_tokenizer("{{ messages }}")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(r"(a+)+$"), "b")
    with pytest.raises(InputError, match="a pattern in its normalizer does not end"):
        check_patterns_terminate(tokenizer)


def test_a_tokenizer_without_patterns_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_patterns.subprocess, "run", None)
    start = time.perf_counter()
    check_patterns_terminate(make_tokenizer("{{ messages }}"))
    assert time.perf_counter() - start < 1
