"""Tokenizers of adapters: cached only as long as a version or a request refers to the adapter."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
from transformers import AutoTokenizer

from align.serve.adapter_folders import Version
from align.serve.answers import percent_encode
from align.serve.prompts import ChatFormat, Formats


@pytest.fixture
def formats(tiny_tokenizer: Any) -> Formats:
    return Formats(lambda folder: ChatFormat(AutoTokenizer.from_pretrained(folder) if folder else tiny_tokenizer, ()))


def version(tokenizer: Any, folder: Path, template: str = "") -> Version:
    tokenizer.save_pretrained(folder)
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return Version(folder.name, folder)


def test_a_tokenizer_goes_with_the_last_version_that_reads_it(formats: Formats, tiny_tokenizer: Any, tmp_path: Path):
    first, second = (version(tiny_tokenizer, tmp_path / name) for name in ("one", "two"))
    assert formats(first) is formats(second) is formats(first)
    assert formats(first) is not formats(None)
    weak_tokenizer = ref(formats(first).tokenizer)
    del first
    gc.collect()
    assert weak_tokenizer() is formats(second).tokenizer
    requested_format = formats(second)  # held by a request in progress
    del second
    gc.collect()
    assert weak_tokenizer() is requested_format.tokenizer
    del requested_format
    gc.collect()
    assert weak_tokenizer() is None


def test_other_templates_are_other_formats_and_one_is_read_anew(formats: Formats, tiny_tokenizer: Any, tmp_path: Path):
    version_1 = version(tiny_tokenizer, tmp_path / "one")
    version_2 = version(tiny_tokenizer, tmp_path / "two", "{{ 2 }}")
    chat_format = formats(version_1)
    assert (chat_format is formats(version_2), formats(version_2).tokenizer.chat_template) == (False, "{{ 2 }}")
    (tmp_path / "one" / "chat_template.jinja").write_text("{{ 3 }}")
    assert formats(version_1) is chat_format
    formats.forget(version_1)
    assert formats(version_1).tokenizer.chat_template == "{{ 3 }}"


def test_an_adapter_without_a_tokenizer_speaks_as_the_base(formats: Formats, tmp_path: Path):
    assert formats(Version("a", tmp_path)) is formats(None)


def test_the_label_of_any_arm_stands_in_a_header():
    assert percent_encode("ppo:a b/c") == "ppo:a b/c"
    assert percent_encode("模型 é%\r\nx") == "%E6%A8%A1%E5%9E%8B %C3%A9%25%0D%0Ax"
