"""The chat template that a tokenizer speaks by: the model's own, or one that the configuration asks for, with its
arguments set in it; the checks that a template and a tokenizer's patterns end; and the template that engines get."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError, meta, nodes

from align.core.errors import InputError, require
from align.data.chat.probe_pattern import GAVE_UP
from align.data.chat.tokens import special_texts

PATIENCE_S, MEMORY_MB = 20, 512
"""That a template may take for the conversations of `align.data.chat.probe_template`, and a pattern for its texts. A
sound one needs milliseconds."""

# For base models without a template. The turn ends with the tokenizer's own EOS, a token the model already knows,
# since adding new tokens would need embeddings that an adapter does not train.
HOUSE = """
{{- BEGIN }}
{%- if tools %}
  {%- set role = 'system' %}
  {{- HEAD }}
  {%- if messages[0]['role'] == 'system' %}
    {{- messages[0]['content'] + '\\n\\n' }}
  {%- endif %}
  {{- 'Tools, a line each:\\n<tools>' }}
  {%- for tool in tools %}
    {{- '\\n' + (tool | tojson) }}
  {%- endfor %}
  {{- '\\n</tools>\\nA call of one:\\n' }}
  {{- '<tool_call>\\n{"name": NAME, "arguments": OBJECT}\\n</tool_call>' + CLOSE + BEHIND }}
{%- endif %}
{%- for message in messages %}
  {%- set role = message['role'] %}
  {%- if role == 'tool' %}
    {%- set role = 'user' %}
    {%- if loop.first or messages[loop.index0 - 1]['role'] != 'tool' %}
      {{- HEAD }}
    {%- else %}
      {{- '\\n' }}
    {%- endif %}
    {{- '<tool_response>\\n' + message['content'] + '\\n</tool_response>' }}
    {%- if loop.last or messages[loop.index0 + 1]['role'] != 'tool' %}
      {{- CLOSE + BEHIND }}
    {%- endif %}
  {%- elif role == 'assistant' %}
    {{- HEAD }}
    {%- generation %}
      {{- message['content'] or '' }}
      {%- for call in message['tool_calls'] or [] %}
        {{- ('\\n' if message['content'] or not loop.first else '') + '<tool_call>\\n{"name": ' }}
        {{- call['function']['name'] | tojson }}
        {{- ', "arguments": ' }}
        {%- if call['function']['arguments'] is string %}
          {{- call['function']['arguments'] }}
        {%- else %}
          {{- call['function']['arguments'] | tojson }}
        {%- endif %}
        {{- '}\\n</tool_call>' }}
      {%- endfor %}
      {{- ANSWERED }}
    {%- endgeneration %}
    {{- BEHIND }}
  {%- elif not (tools and loop.first and role == 'system') %}
    {{- HEAD }}
    {{- message['content'] + CLOSE + BEHIND }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {%- set role = 'assistant' %}
  {{- HEAD }}
{%- endif %}"""
"""A chat template in which a turn is a header, its text and an end. Tools are written as Hermes and Qwen write them,
and as servers read calls: schemas in the system turn, a line each; calls behind the text of an answer; results that
follow one another in one turn of the user."""


def house_template(**words: str) -> str:
    """`HOUSE` with expressions of Jinja for its words.

    Args:
        words: `BEGIN` the text; `HEAD` begins a turn of `role`; `CLOSE` ends what others than the assistant say, and
            `ANSWERED` an answer: sampling stops there; `BEHIND` stands behind either.
    """
    return re.sub(r"\b[A-Z]{4,}\b", lambda found: words.get(found[0], found[0]), HOUSE).strip()


CHATML = house_template(
    BEGIN="''", HEAD=r"'<|im_start|>' + role + '\n'", CLOSE="'<|im_end|>'", ANSWERED="eos_token", BEHIND=r"'\n'"
)
POCKET = house_template(
    BEGIN="bos_token", HEAD="'<|' + role + '|>'", CLOSE="'<|end|>'", ANSWERED="'<|end|>'", BEHIND="''"
)
"""The built-in model's own."""

KWARGS = re.compile(r"\A\{#- arguments -#\}.*?\{#- end #\}\n?", re.DOTALL)
"""What `with_kwargs` puts in front of a template."""
GIVEN = {
    "messages",
    "add_generation_prompt",
    "continue_final_message",
    "tools",
    "documents",
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "raise_exception",
    "strftime_now",
}
"""Variables that are not the user's to set: whoever renders gives them."""
MARKERS = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
"""Of what the assistant wrote: transformers' own extension of Jinja."""


def use_template(tokenizer: Any, template: str | None, kwargs: Mapping[str, Any] | None = None) -> None:
    """Give the tokenizer a chat template where the configuration asks for one.

    Args:
        template: `chatml`; None for the tokenizer's own.
        kwargs: arguments of the template, such as `enable_thinking`. They are set in the template itself, and so they
            travel with the tokenizer: whoever renders by it later, an engine too, renders what was trained on.

    Raises:
        InputError: the model brings none and none was asked for, the template reads no such argument, it does not end
            (`probe`), or a pattern of the tokenizer does not (`check_patterns`).
    """
    check_patterns(tokenizer)
    if template == "chatml":
        if tokenizer.chat_template not in (None, CHATML):
            print("data.template=chatml takes the place of the model's own chat template, which it was trained with")
        tokenizer.chat_template = CHATML
    if not tokenizer.chat_template:
        raise InputError(
            "data.template", template, "this model has no chat template", "Add data.template=chatml for a base model."
        )
    if not isinstance(tokenizer.chat_template, str | dict):
        kind = type(tokenizer.chat_template).__name__
        raise InputError("tokenizer_config.json, chat_template", kind, "is no template", "Add data.template=chatml.")
    if kwargs:
        tokenizer.chat_template = with_kwargs(tokenizer.chat_template, kwargs)
    for template in named(tokenizer.chat_template).values():
        probe(template, {k: str(v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)})


def probe(template: str, special: Mapping[str, str]) -> None:
    """Let a template write conversations of every length, in a process that is given a limit of time and of memory.

    Args:
        special: the tokenizer's special tokens by name, such as `eos_token`.

    Raises:
        InputError: it does not end, or wants more memory than a turn can need; or it computes a power, which may take
            for ever where nothing can end it.
    """
    remedy = "Add data.template=chatml, or take another model."
    powers = list[nodes.Pow]()
    with suppress(InputError):  # what is no Jinja is refused where it renders
        powers += parse_template(template).find_all(nodes.Pow)
    computed = [power for power in powers if not isinstance(power.right, nodes.Const)]
    require(not computed, "chat_template", "(the model's)", "it raises a number to a power that it computes", remedy)
    asked = {"template": MARKERS.sub("", template), "special": dict(special), "megabytes": MEMORY_MB}
    done = run_probe("probe_template.py", asked)
    problem = f"it has not written a few conversations, short and long, after {PATIENCE_S} s"
    if done is not None:
        problems = {0: "", 3: f"it wants more than {MEMORY_MB} MB for a few conversations"}
        why = (done.stderr.strip().splitlines() or ["no word"])[-1]
        problem = problems.get(done.returncode, f"the process that tried it ended with {done.returncode}: {why}")
    require(not problem, "chat_template", "(the model's)", problem, remedy)


def run_probe(script: str, asked: Mapping[str, Any]) -> subprocess.CompletedProcess[str] | None:
    """Run a script of this folder in a process of its own. Returns None if it does not end in time."""
    words = [sys.executable, "-P", str(Path(__file__).with_name(script))]
    with suppress(subprocess.TimeoutExpired):
        return subprocess.run(words, input=json.dumps(asked), text=True, capture_output=True, timeout=PATIENCE_S)
    return None


def with_kwargs(template: Any, kwargs: Mapping[str, Any]) -> Any:
    """A chat template that has these arguments set, in place of those that it had.

    Args:
        template: Jinja, or a mapping of names to Jinja, where each has those that it reads.

    Raises:
        InputError: a name is no variable that the template reads.
    """
    own = {name: KWARGS.sub("", text) for name, text in named(template).items()}
    reads = {name: variables_read(text) for name, text in own.items()}
    every = set[str]().union(*reads.values())
    for name, value in kwargs.items():
        known = f"It reads: {', '.join(sorted(every))}." if every else "It reads none: leave data.template_kwargs out."
        problem = "is nothing that this model's chat template reads"
        require(name in every, f"data.template_kwargs.{name}", value, problem, known)
    made = {
        name: with_variables(text, {k: v for k, v in kwargs.items() if k in reads[name]}) for name, text in own.items()
    }
    return made if isinstance(template, Mapping) else made[""]


def named(template: Any) -> Mapping[str, str]:
    return template if isinstance(template, Mapping) else {"": template}


def parse_template(template: str) -> nodes.Template:
    """Parse a chat template.

    Raises:
        InputError: it is no Jinja.
    """
    try:
        return Environment(extensions=["jinja2.ext.loopcontrols"]).parse(MARKERS.sub("", template))
    except (TemplateError, RecursionError) as error:
        problem = f"is no Jinja ({type(error).__name__}: {error})"
        raise InputError("chat_template", "(the model's)", problem, "Add data.template=chatml.") from error


def variables_read(template: str) -> set[str]:
    """The variables that a template reads, and neither sets itself nor is given by whoever renders."""
    tree = parse_template(template)
    set_there = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "store"}
    return meta.find_undeclared_variables(tree) - GIVEN - set_there


def with_variables(template: str, kwargs: Mapping[str, Any]) -> str:
    # JSON writes text, numbers and truth values as Jinja reads them.
    lines = (f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} %}}" for name, value in sorted(kwargs.items()))
    # The line break goes with the comment (`trim_blocks`): the template begins a line, as it did.
    return f"{{#- arguments -#}}{''.join(lines)}{{#- end #}}\n{template}" if kwargs else template


LENGTH = 300
"""Characters of a run: a pattern that tries every way to divide it has 2^300."""
RUNS = ("a", "A", "1", " ", "\n", "_", ".", "-", "\u00e9", "\u4e2d", "\u0e01", "a ", "a1", "aA", " \n", "a.", "ab")
"""What runs are made of: a character of each class that patterns name, and pairs of them."""
ENDINGS = ("", "!", "\u2603", "\x00", "a", "1", " ", "!1", "!a", "! ")
"""What ends a run, so that a pattern has to try again. There are more, of `!` and each character of the pattern: the
library does not look at a text that lacks one which every match needs."""


def check_patterns(tokenizer: Any) -> None:
    """Let the patterns of a tokenizer divide texts that send a careless one back and forth.

    Raises:
        InputError: they do not end in time.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    parts = {name: getattr(backend, name) for name in ("normalizer", "pre_tokenizer")}
    steps = {name: None if part is None else json.loads(part.__getstate__()) for name, part in parts.items()}
    patterns = [pattern for step in steps.values() for pattern in patterns_in(step)]
    if not patterns:
        return
    characters = sorted({character for pattern in patterns for character in pattern})[:64]
    letters = [character for character in characters if character.isalnum()]
    endings = [*ENDINGS, *(f"!{character}" for character in characters if not character.isalnum())]
    texts = [run * LENGTH + ending for run in (*RUNS, *letters) for ending in endings]
    done = run_probe("probe_pattern.py", {**steps, "texts": texts})
    ended = done is not None and done.returncode != GAVE_UP
    steps_with_patterns = " or ".join(name for name, step in steps.items() if any(patterns_in(step)))
    problem = f"a pattern in its {steps_with_patterns} does not end on short texts"
    remedy = "Take another model, or correct the pattern: it may not repeat what repeats, such as (a+)+."
    shown = " and ".join(pattern if len(pattern) <= 80 else f"{pattern[:79]}…" for pattern in patterns[:3])
    require(ended, "tokenizer.json", shown, problem, remedy)


def patterns_in(step: Any) -> Iterator[str]:
    """Yield the regular expressions of a step, and of the steps in it."""
    if isinstance(step, dict):
        if isinstance(step.get("Regex"), str):
            yield step["Regex"]
        for inner in step.values():
            yield from patterns_in(inner)
    elif isinstance(step, list):
        for inner in step:
            yield from patterns_in(inner)


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
