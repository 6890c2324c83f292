"""The structure of well-known chat templates, and a tokenizer that knows their special tokens.

They are written for these tests. Each has the properties of its family (roles, spaces, the end of a turn, changes to
other turns), not its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from align.core.types import Conversation
from align.data.chat.encode import IGNORE_INDEX, encode_conversation

RAISE = "{{ raise_exception('system role is not known here') }}"

LLAMA3 = """
{{- bos_token }}
{%- for m in messages %}
  {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
"""

# A default system turn if the messages have none; a line break behind every turn.
QWEN25 = """
{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}
"""

# Answers behind the last question have a think block, which may be empty; earlier answers lose theirs.
QWEN3 = """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
  {%- if m.role == 'assistant' %}
    {%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
    {%- if '</think>' not in m.content %}{% set thought = '' %}{% endif %}
    {%- set said = m.content.split('</think>')[-1].lstrip('\n') %}
    {%- if loop.index0 > ns.last %}
      {{- '<|im_start|>assistant\n<think>\n' + thought + '\n</think>\n\n' + said }}
    {%- else %}
      {{- '<|im_start|>assistant\n' + said }}
    {%- endif %}
  {%- else %}
    {{- '<|im_start|>' + m.role + '\n' + m.content }}
  {%- endif %}
  {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}
"""

# No system turn: it is written into the *last* question, so an earlier turn changes when another follows.
MISTRAL = """
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}
{%- else %}{% set turns = messages %}{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in turns %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{{- bos_token }}
{%- for m in turns %}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
  {%- if m.role == 'user' and system is defined and loop.index0 == ns.last %}
    {{- '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}
  {%- elif m.role == 'user' %}
    {{- '[INST] ' + m.content + '[/INST]' }}
  {%- else %}
    {{- ' ' + m.content + eos_token }}
  {%- endif %}
{%- endfor %}
"""

GEMMA = (
    """
{{- bos_token }}
{%- if messages[0].role == 'system' %}"""
    + RAISE
    + """{% endif %}
{%- for m in messages %}
  {%- set role = 'model' if m.role == 'assistant' else m.role %}
  {{- '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{% endif %}
"""
)

# The end of text is written unless an answer is due, so the rendering of a conversation is never a prefix of a longer
# one's.
PHI3 = """
{%- for m in messages %}{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{% else %}{{- eos_token }}{% endif %}
"""

PHI4 = """
{%- for m in messages %}{{- '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant<|im_sep|>' }}{% endif %}
"""

# Markers around the answer alone: the token that ends the turn is outside them.
MARKED = """
{%- for m in messages %}
  {{- '<|im_start|>' + m.role + '\n' }}
  {%- if m.role == 'assistant' %}{% generation %}{{- m.content }}{% endgeneration %}
  {%- else %}{{- m.content }}{% endif %}
  {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}
"""

# Markers around everything, the line break behind the turn included.
MARKED_WIDE = """
{%- for m in messages %}
  {{- '<|im_start|>' + m.role + '\n' }}
  {%- if m.role == 'assistant' %}{% generation %}{{- m.content + '<|im_end|>\n' }}{% endgeneration %}
  {%- else %}{{- m.content + '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}
"""

# A turn ends with a line break, not with a token.
PLAIN = """
{%- for m in messages %}{{- m.role + ': ' + m.content + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- 'assistant: ' }}{% endif %}
"""


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        end: the token that ends a turn.
        eos: the tokenizer's EOS, which may differ from `end`.
        system: True if the template accepts a system turn.
        header: what the template writes at the start of the last answer, beyond what it writes when an answer is due.
    """

    template: str
    end: str
    eos: str
    system: bool = True
    header: str = ""


FAMILIES = {
    "llama3": Family(LLAMA3, "<|eot_id|>", "<|end_of_text|>"),
    "qwen2.5": Family(QWEN25, "<|im_end|>", "<|im_end|>"),
    "qwen3": Family(QWEN3, "<|im_end|>", "<|im_end|>", header="<think>\n\n</think>\n\n"),
    "mistral": Family(MISTRAL, "</s>", "</s>"),
    "gemma": Family(GEMMA, "<end_of_turn>", "<eos>", system=False),
    "phi3": Family(PHI3, "<|end|>", "<|endoftext|>"),
    "phi4": Family(PHI4, "<|im_end|>", "<|im_end|>"),
    "marked": Family(MARKED, "<|im_end|>", "<|endoftext|>"),
    "marked-wide": Family(MARKED_WIDE, "<|im_end|>", "<|endoftext|>"),
}
SPECIAL = [
    "<pad>",
    "<s>",
    "</s>",
    "<eos>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|im_start|>",
    "<|im_sep|>",
    "<|im_end|>",
    "[INST]",
    "[/INST]",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
]


def make_tokenizer(template: str | None, eos: str = "</s>", words: Sequence[str] = ()) -> Any:
    """Build a byte-level BPE whose merges cross borders: a space and a letter, two line breaks, a period and a break.

    Args:
        words: added tokens that are not special.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [("Ġ", "a"), ("Ġ", "b"), ("Ċ", "Ċ"), (".", "Ċ"), (":", "Ġ")]
    symbols += ["".join(pair) for pair in merges]
    bpe = Tokenizer(models.BPE({s: i for i, s in enumerate(symbols)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(list(SPECIAL))
    bpe.add_tokens(list(words))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token=eos,
        pad_token="<pad>",
        chat_template=template and template.strip(),
    )


# The format of Hermes and Qwen: tools as JSON in front, calls between marks, results as turns with the role `tool`.
TOOL_TEMPLATE = (
    "{% if tools %}<|system|>{{ tools | tojson }}<end>{% endif %}"
    "{% for message in messages %}{{ '<|' + message.role + '|>' }}{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}</tool_call>{% endfor %}"
    "<end>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def decode_trained_spans(tokenizer: Any, conversation: Conversation) -> list[str]:
    """Decode each span of tokens that have a loss."""
    encoded = encode_conversation(tokenizer, conversation)
    spans: list[list[int]] = []
    previous = IGNORE_INDEX
    for label in encoded.labels:
        if label != IGNORE_INDEX:
            spans += [[]] if previous == IGNORE_INDEX else []
            spans[-1].append(label)
        previous = label
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))
    return [tokenizer.decode(span) for span in spans]
