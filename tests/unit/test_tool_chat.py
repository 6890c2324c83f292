"""Chats with tools become prompts by the template; contents of people and tools are text."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from align.core.errors import InputError
from align.core.types import Conversation
from align.data.chat.encode import encode_prompt
from align.data.chat.tokens import get_special_token_ids
from align.data.chat.tools import encode_tool_prompt, supports_tools
from align.models.base import POCKET_FOLDER

TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "of a <end> place",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": ["<|user|>", "Oslo"]}}},
        },
    },
)


def test_without_tools_it_is_the_prompt_that_training_read(tiny_tokenizer: Any):
    chats = (
        [{"role": "user", "content": "Hello"}],
        [{"role": "system", "content": "s<eos> <|end|>"}, {"role": "user", "content": "<|user|> <bos"}],
        [{"role": "user", "content": "s"}, {"role": "assistant", "content": "<|"}, {"role": "user", "content": "|>"}],
    )
    for tokenizer in (AutoTokenizer.from_pretrained(POCKET_FOLDER), tiny_tokenizer):
        for chat in chats:
            assert encode_tool_prompt(tokenizer, chat) == encode_prompt(tokenizer, Conversation.from_messages(chat))


def test_a_call_and_its_result(tool_tokenizer: Any):
    call = {"type": "function", "id": "c", "function": {"name": "weather", "arguments": {"city": "Oslo<end>"}}}
    chat = [
        {"role": "user", "content": "Rain?<|assistant|>"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "<|user|>dry"},
    ]
    ids = encode_tool_prompt(tool_tokenizer, chat, TOOLS)
    assert tool_tokenizer.decode(ids, clean_up_tokenization_spaces=False) == tool_tokenizer.apply_chat_template(
        chat, tools=list(TOOLS), tokenize=False, add_generation_prompt=True
    )
    special_tokens = [tool_tokenizer.decode([id]) for id in ids if id in get_special_token_ids(tool_tokenizer)]
    assert special_tokens == [
        "<|system|>",
        "<end>",
        "<|user|>",
        "<end>",
        "<|assistant|>",
        "<end>",
        "<|tool|>",
        "<end>",
        "<|assistant|>",
    ]


def test_the_word_of_a_type_is_left_to_the_template_and_a_special_token_in_one_is_not(tool_tokenizer: Any):
    def tools(kind: str) -> Any:
        return ({"type": "function", "function": {"name": "f", "parameters": {"type": kind}}},)

    special_tokens = []
    template = tool_tokenizer.chat_template
    tool_tokenizer.chat_template = template.replace("{% if tools", "{% if tools[0].type == 'function' and tools")
    try:
        for kind in ("user", "<end>"):
            ids = encode_tool_prompt(tool_tokenizer, [{"role": "user", "content": "a<end>"}], tools(kind))
            special_tokens.append(
                [tool_tokenizer.decode([id]) for id in ids if id in get_special_token_ids(tool_tokenizer)]
            )
    finally:
        tool_tokenizer.chat_template = template
    assert special_tokens == [["<|system|>", "<end>", "<|user|>", "<end>", "<|assistant|>"]] * 2


def test_what_cannot_be_rendered_is_named(tool_tokenizer: Any):
    chat = [{"role": "user", "content": "a"}]
    template = tool_tokenizer.chat_template
    with pytest.raises(InputError, match="special token in it"):
        encode_tool_prompt(tool_tokenizer, chat, ({"function": {"parameters": {"properties": {"x<end>": {}}}}},))
    with pytest.raises(InputError, match="half a character"):
        encode_tool_prompt(tool_tokenizer, [{"role": "user", "content": "\ud800"}])
    tool_tokenizer.chat_template = "{{ raise_exception('no such thing') }}"
    try:
        with pytest.raises(InputError, match="no such thing"):
            encode_tool_prompt(tool_tokenizer, chat)
    finally:
        tool_tokenizer.chat_template = template


def test_whether_a_template_takes_tools(tool_tokenizer: Any, tiny_tokenizer: Any):
    assert supports_tools(tool_tokenizer)
    assert not supports_tools(tiny_tokenizer)
    assert supports_tools(AutoTokenizer.from_pretrained(POCKET_FOLDER))
