"""Arguments of a chat template: settings that travel with the tokenizer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from templates import QWEN3, make_tokenizer
from transformers import AutoTokenizer

from align.data.chat import render
from align.data.template import use_template
from align.errors import InputError
from align.types import Conversation, Message

THINKS = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% if enable_thinking is defined and enable_thinking is false %} <none>"
    "{% else %} <think>{% endif %}{{ style | default('') }}{% endif %}"
)


def asked(tokenizer: Any) -> str:
    return render(tokenizer, Conversation((Message("user", "Hi"),)), answer_due=True)


@pytest.mark.parametrize(
    ("kwargs", "end"),
    [
        ({}, "assistant: <think>"), ({"enable_thinking": True}, "assistant: <think>"),
        ({"enable_thinking": False}, "assistant: <none>"),
        ({"style": "a \"q\" {{ x }} é\n'"}, "assistant: <think>a \"q\" {{ x }} é\n'"),
        ({"style": 1.5, "enable_thinking": False}, "assistant: <none>1.5"),
    ],
)  # fmt: skip
def test_arguments_of_a_template_travel_with_the_tokenizer(
    tiny_tokenizer: Any, tmp_path: Path, kwargs: dict[str, Any], end: str
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = THINKS
    use_template(tokenizer, None, {"enable_thinking": True})  # what stood there is replaced
    tokenizer.chat_template = THINKS if not kwargs else tokenizer.chat_template
    use_template(tokenizer, None, kwargs)
    assert asked(tokenizer).endswith(end)
    tokenizer.save_pretrained(tmp_path)
    assert asked(AutoTokenizer.from_pretrained(tmp_path)) == asked(tokenizer)
    whole = Conversation((Message("user", "Hi"), Message("assistant", "Ho")))
    assert render(tokenizer, whole).count(tokenizer.eos_token) == 1


def test_an_argument_that_the_template_does_not_read_is_refused(tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = THINKS
    for kwargs, part in (
        ({"enable_thinkin": False}, "It reads: enable_thinking, style."), ({"messages": "x"}, "It reads"),
        ({"style": [1]}, "Give text"), ({"style": None}, "Give text"),
    ):  # fmt: skip
        with pytest.raises(InputError) as error:
            use_template(tokenizer, None, kwargs)
        assert error.value.field == f"data.template_kwargs.{next(iter(kwargs))}"
        assert part in error.value.remedy
        assert tokenizer.chat_template == THINKS
    with pytest.raises(InputError, match="It reads none"):
        use_template(tokenizer, "chatml", {"enable_thinking": False})
    tokenizer.chat_template = "{% for %}"
    with pytest.raises(InputError, match="is no Jinja"):
        use_template(tokenizer, None, {"enable_thinking": False})


def test_beside_a_template_that_trims_its_blocks() -> None:
    quiet = "{%- if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}\n"
    tokenizer = make_tokenizer(QWEN3 + quiet + "{{- '<think>\\n\\n</think>\\n\\n' }}\n{%- endif %}")
    before = asked(tokenizer)
    use_template(tokenizer, None, {"enable_thinking": False})
    assert asked(tokenizer) == before + "<think>\n\n</think>\n\n"
    use_template(tokenizer, None, {"enable_thinking": True})
    assert asked(tokenizer) == before
