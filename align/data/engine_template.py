"""A chat template for engines that read special tokens in whatever it renders: contents are data to it.

vLLM renders a chat to one text and finds special tokens all over it, so that a content could close its own turn. This
template takes the spellings apart in contents, by a zero-width space behind their first letter, and goes on as the one
that was trained with. Contents that spell out none are rendered as in training.
"""

from __future__ import annotations

import json
from typing import Any

from align.data.tokens import special_texts

APART = "\u200b"

PRELUDE = """
{#- Special tokens that a content spells out are text: a zero-width space takes them apart. Then the chat template. -#}
{%- macro apart(text) -%}
  {%- set result = namespace(text=text) -%}
  {%- for whole, parts in SPELLINGS -%}{%- set result.text = result.text | replace(whole, parts) -%}{%- endfor -%}
  {{- result.text -}}
{%- endmacro -%}
{%- macro each_apart(parts, result) -%}
  {%- for part in parts -%}
    {%- set escaped = dict(part, text=apart(part.text)) if part.text is string else part -%}
    {%- set result.parts = result.parts + [escaped] -%}
  {%- endfor -%}
{%- endmacro -%}
{%- set as_text = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- set result = namespace(parts=[]) -%}
  {%- if message.content is string -%}
    {%- set escaped = dict(message, content=apart(message.content)) -%}
  {%- elif message.content -%}
    {%- set nothing = each_apart(message.content, result) -%}
    {%- set escaped = dict(message, content=result.parts) -%}
  {%- else -%}
    {%- set escaped = message -%}
  {%- endif -%}
  {%- set as_text.messages = as_text.messages + [escaped] -%}
{%- endfor -%}
{%- set messages = as_text.messages %}
"""
# The lists are passed to a macro: vLLM hands contents over in parts to a template that says `for` of `message.content`.


def contents_as_text(tokenizer: Any) -> str:
    """The chat template behind a prelude that takes special tokens in contents apart; empty where there is none.

    The line break at the end of the prelude belongs to it: templates are rendered with `trim_blocks`.
    """
    if not tokenizer.chat_template:
        return ""
    spellings = ", ".join(f"({quoted(text)}, {quoted(taken_apart(text))})" for text in special_texts(tokenizer))
    return PRELUDE.lstrip().replace("SPELLINGS", f"[{spellings}]") + tokenizer.chat_template


def taken_apart(text: str) -> str:
    """A spelling that is no more than text; a special token of one letter is left out."""
    return text[0] + APART + text[1:] if len(text) > 1 else ""


def quoted(text: str) -> str:
    """A string as Jinja reads it, whatever it holds."""
    return json.dumps(text, ensure_ascii=False)
