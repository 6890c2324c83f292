"""Arguments of a chat template are settings that are saved with the tokenizer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from chat_templates import QWEN3, make_tokenizer
from transformers import AutoTokenizer

from align.config.groups import DataConfig
from align.core.errors import InputError
from align.core.types import Conversation, Message
from align.data.chat.encode import render
from align.data.chat.template import set_chat_template

THINKS = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% if enable_thinking is defined and enable_thinking is false %} <none>"
    "{% else %} <think>{% endif %}{{ style | default('') }}{% endif %}"
)


def render_prompt(tokenizer: Any) -> str:
    return render(tokenizer, Conversation((Message("user", "Hi"),)), add_generation_prompt=True)


@pytest.mark.parametrize(
    ("kwargs", "end"),
    [
        ({}, "assistant: <think>"),
        ({"enable_thinking": True}, "assistant: <think>"),
        ({"enable_thinking": False}, "assistant: <none>"),
        ({"style": 'a "q" {{ x }} é\n\''}, 'assistant: <think>a "q" {{ x }} é\n\''),
        ({"style": "🙂"}, "assistant: <think>🙂"),
        ({"style": 1.5, "enable_thinking": False}, "assistant: <none>1.5"),
    ],
)
def test_arguments_of_a_template_travel_with_the_tokenizer(
    tiny_tokenizer: Any, tmp_path: Path, kwargs: dict[str, Any], end: str
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = THINKS
    set_chat_template(tokenizer, None, {"enable_thinking": True})  # the second call replaces this argument
    tokenizer.chat_template = THINKS if not kwargs else tokenizer.chat_template
    set_chat_template(tokenizer, None, kwargs)
    assert render_prompt(tokenizer).endswith(end)
    tokenizer.save_pretrained(tmp_path)
    assert render_prompt(AutoTokenizer.from_pretrained(tmp_path)) == render_prompt(tokenizer)
    conversation = Conversation((Message("user", "Hi"), Message("assistant", "Ho")))
    assert render(tokenizer, conversation).count(tokenizer.eos_token) == 1


def test_an_argument_that_the_template_does_not_read_is_refused(tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = THINKS
    for kwargs, part in (
        ({"enable_thinkin": False}, "It reads: enable_thinking, style."),
        ({"messages": "x"}, "It reads"),
    ):
        with pytest.raises(InputError) as error:
            set_chat_template(tokenizer, None, kwargs)
        assert error.value.field == f"data.template_kwargs.{next(iter(kwargs))}"
        assert part in error.value.remedy
        assert tokenizer.chat_template == THINKS
    with pytest.raises(InputError, match="It reads none"):
        set_chat_template(tokenizer, "chatml", {"enable_thinking": False})
    tokenizer.chat_template = "{% for %}"
    with pytest.raises(InputError, match="is no Jinja"):
        set_chat_template(tokenizer, None, {"enable_thinking": False})


@pytest.mark.parametrize("beginning", ["\n", "  ", "\n  ", ""])
def test_a_template_begins_as_it_did(beginning: str) -> None:
    """A line break or an indented tag at the start renders the same with and without arguments."""
    template = beginning + "{% if think %}{% endif %}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    unchanged = make_tokenizer(template)
    configured = make_tokenizer(template)
    conversation = Conversation((Message("user", "a"),))
    for think in (False, True):
        set_chat_template(configured, None, {"think": think})
        assert render(configured, conversation) == render(unchanged, conversation)


def test_what_stands_before_the_arguments_stays() -> None:
    for start in ("\n\n  Hi", "  <|x|>\nHi", "\t{{ style }}", "", "{%- if style %}a{% endif %}\n"):
        tokenizer = make_tokenizer(start + "{% if style %}{% endif %}{{ messages[0]['content'] }}\n")
        before = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, style="s")
        set_chat_template(tokenizer, None, {"style": "s"})
        assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == before


def test_only_what_is_the_users_can_be_set() -> None:
    template = (
        "{% set a = 1 %}{% if date is defined %}{% set b = date %}{% endif %}{{ raise_exception('no') if b else '' }}"
        "{{ strftime_now('%Y') if mine else bos_token }}{{ messages[0]['content'] }}"
    )
    tokenizer = make_tokenizer(template)
    with pytest.raises(InputError, match=r"It reads: date, mine\."):
        set_chat_template(tokenizer, None, {"raise_exception": "x"})


def test_each_of_several_templates_has_the_arguments_that_it_reads(tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = {"default": THINKS, "tool_use": "{{ messages }}{{ tool_style }}"}
    set_chat_template(tokenizer, None, {"enable_thinking": False, "tool_style": "a"})
    assert render_prompt(tokenizer).endswith("assistant: <none>")
    assert "enable_thinking" not in tokenizer.chat_template["tool_use"]
    assert "tool_style" not in tokenizer.chat_template["default"]


@pytest.mark.parametrize("value", [float("inf"), float("nan"), [1], None, {"a": 1}, "a #} b"])
def test_a_value_that_no_template_can_be_given_is_refused_by_the_configuration(value: Any) -> None:
    with pytest.raises(InputError, match=r"data\.template_kwargs\.style"):
        DataConfig(template_kwargs={"style": value})
    with pytest.raises(InputError, match="is no name"):
        DataConfig(template_kwargs={"a b": 1})
    DataConfig(template_kwargs={"style": "a", "n": 1, "x": 1.5, "b": False})


def test_beside_a_template_that_trims_its_blocks() -> None:
    quiet = "{%- if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}\n"
    tokenizer = make_tokenizer(QWEN3 + quiet + "{{- '<think>\\n\\n</think>\\n\\n' }}\n{%- endif %}")
    before = render_prompt(tokenizer)
    set_chat_template(tokenizer, None, {"enable_thinking": False})
    assert render_prompt(tokenizer) == before + "<think>\n\n</think>\n\n"
    set_chat_template(tokenizer, None, {"enable_thinking": True})
    assert render_prompt(tokenizer) == before
