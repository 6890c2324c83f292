"""Chat templates: selection by the configuration, arguments, checks that they terminate, and the exported template."""

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
from align.data.chat.tokens import get_special_texts

PATIENCE_S = 20
"""Maximum seconds of a script that probes a template or a tokenizer's patterns. It usually takes milliseconds."""
MEMORY_MB = 512
"""Maximum memory of the script that probes a template."""

# For base models without a template. A turn ends with the tokenizer's own EOS, which the model knows already: new
# tokens would need embeddings that an adapter does not train.
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
"""A chat template in which a turn is a header, a text and an end.

Tools have the format of Hermes and Qwen, which servers parse: schemas in the system turn, one per line; calls after the
text of an answer; and consecutive results in one user turn.
"""


def build_house_template(**expressions: str) -> str:
    """Return the chat template `HOUSE` with its placeholders, such as `BEGIN` and `HEAD`, replaced by Jinja
    expressions.

    Args:
        expressions: `BEGIN` is the beginning of the text, `HEAD` the header of a turn of `role`. `CLOSE` ends the turns
            of all roles but the assistant, and `ANSWERED` an answer, where sampling stops. `BEHIND` follows either.
    """
    return re.sub(r"\b[A-Z]{4,}\b", lambda match: expressions.get(match[0], match[0]), HOUSE).strip()


CHATML = build_house_template(
    BEGIN="''", HEAD=r"'<|im_start|>' + role + '\n'", CLOSE="'<|im_end|>'", ANSWERED="eos_token", BEHIND=r"'\n'"
)
POCKET = build_house_template(
    BEGIN="bos_token", HEAD="'<|' + role + '|>'", CLOSE="'<|end|>'", ANSWERED="'<|end|>'", BEHIND="''"
)
"""Template of the built-in model."""

KWARGS = re.compile(r"\A\{#- arguments -#\}.*?\{#- end #\}\n?", re.DOTALL)
"""The text that `set_template_kwargs` puts in front of a template."""
RENDER_VARIABLES = {
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
"""Variables of a template that the renderer sets, and not the user."""
MARKERS = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
"""Markers of the assistant's text, an extension of Jinja by transformers."""


def set_chat_template(tokenizer: Any, template: str | None, kwargs: Mapping[str, Any] | None = None) -> None:
    """Set `tokenizer.chat_template` as configured, and raise InputError if the template or a pattern of the tokenizer
    does not terminate.

    Args:
        template: `chatml`; None for the tokenizer's own.
        kwargs: arguments of the template, such as `enable_thinking`. They are set inside the template, so that they are
            saved with the tokenizer, and engines render the text that was trained on.

    Raises:
        InputError: the tokenizer has no template and none is configured, the template reads no such argument, or the
            template (`check_template_terminates`) or a pattern of the tokenizer (`check_patterns_terminate`) does not
            terminate.
    """
    check_patterns_terminate(tokenizer)
    if template == "chatml":
        if tokenizer.chat_template not in (None, CHATML):
            print("data.template=chatml replaces the model's own chat template, which it was trained with")
        tokenizer.chat_template = CHATML
    if not tokenizer.chat_template:
        raise InputError(
            "data.template", template, "this model has no chat template", "Add data.template=chatml for a base model."
        )
    if not isinstance(tokenizer.chat_template, str | dict):
        kind = type(tokenizer.chat_template).__name__
        raise InputError("tokenizer_config.json, chat_template", kind, "is no template", "Add data.template=chatml.")
    if kwargs:
        tokenizer.chat_template = set_template_kwargs(tokenizer.chat_template, kwargs)
    special = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    for template in get_named_templates(tokenizer.chat_template).values():
        check_template_terminates(template, special)


def check_template_terminates(template: str, special: Mapping[str, str]) -> None:
    """Raise InputError unless a chat template renders test conversations within limits of time and memory. It is
    rendered in a subprocess.

    Args:
        special: the tokenizer's special tokens by name, such as `eos_token`.

    Raises:
        InputError: the template exceeds a limit, or it computes a power, which may take for ever and cannot be
            interrupted.
    """
    remedy = "Add data.template=chatml, or take another model."
    powers: list[nodes.Pow] = []
    with suppress(InputError):  # invalid Jinja is reported where the template renders
        powers += parse_template(template).find_all(nodes.Pow)
    computed_powers = [power for power in powers if not isinstance(power.right, nodes.Const)]
    require(
        not computed_powers, "chat_template", "(the model's)", "it raises a number to a power that it computes", remedy
    )
    request = {"template": MARKERS.sub("", template), "special": dict(special), "megabytes": MEMORY_MB}
    process = run_probe_script("probe_template.py", request)
    problem = f"it did not render a few conversations, short and long, within {PATIENCE_S} s"
    if process is not None:
        problems = {0: "", 3: f"it needs more than {MEMORY_MB} MB for a few conversations"}
        reason = (process.stderr.strip().splitlines() or ["no word"])[-1]
        failure = f"the process that tried it ended with {process.returncode}: {reason}"
        problem = problems.get(process.returncode, failure)
    require(not problem, "chat_template", "(the model's)", problem, remedy)


def run_probe_script(script: str, request: Mapping[str, Any]) -> subprocess.CompletedProcess[str] | None:
    """Run a Python script of this folder in a subprocess, and return the process, or None if it does not end within
    `PATIENCE_S` seconds.

    Args:
        request: JSON that the script reads from its standard input.
    """
    command = [sys.executable, "-P", str(Path(__file__).with_name(script))]
    with suppress(subprocess.TimeoutExpired):
        return subprocess.run(command, input=json.dumps(request), text=True, capture_output=True, timeout=PATIENCE_S)
    return None


def set_template_kwargs(template: Any, kwargs: Mapping[str, Any]) -> Any:
    """Return a chat template with the arguments `kwargs`, such as `enable_thinking`, set at its beginning. Arguments
    that were set before are removed.

    Args:
        template: Jinja, or a mapping of names to Jinja. In a mapping, each template gets the arguments that it reads.

    Raises:
        InputError: no template reads a variable of that name.
    """
    templates = {name: KWARGS.sub("", text) for name, text in get_named_templates(template).items()}
    variables = {name: find_template_variables(text) for name, text in templates.items()}
    all_variables = set[str]().union(*variables.values())
    remedy = "It reads none: leave data.template_kwargs out."
    if all_variables:
        remedy = f"It reads: {', '.join(sorted(all_variables))}."
    for name, value in kwargs.items():
        problem = "is no argument of this model's chat template"
        require(name in all_variables, f"data.template_kwargs.{name}", value, problem, remedy)
    for name, text in templates.items():
        values = {key: value for key, value in kwargs.items() if key in variables[name]}
        templates[name] = prepend_set_statements(text, values)
    return templates if isinstance(template, Mapping) else templates[""]


def get_named_templates(template: Any) -> Mapping[str, str]:
    """Return a tokenizer's chat templates as a mapping of names to Jinja. A single template has an empty name."""
    return template if isinstance(template, Mapping) else {"": template}


def parse_template(template: str) -> nodes.Template:
    """Parse a chat template into a Jinja syntax tree.

    Raises:
        InputError: it is not valid Jinja.
    """
    try:
        return Environment(extensions=["jinja2.ext.loopcontrols"]).parse(MARKERS.sub("", template))
    except (TemplateError, RecursionError) as error:
        problem = f"is no Jinja ({type(error).__name__}: {error})"
        raise InputError("chat_template", "(the model's)", problem, "Add data.template=chatml.") from error


def find_template_variables(template: str) -> set[str]:
    """Return the names of the variables that a template expects from the user, such as `enable_thinking`. Variables
    that the template or the renderer sets are left out."""
    tree = parse_template(template)
    assigned = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "store"}
    return meta.find_undeclared_variables(tree) - RENDER_VARIABLES - assigned


def prepend_set_statements(template: str, values: Mapping[str, Any]) -> str:
    """Return a chat template with Jinja `set` statements in front, which set variables to `values`."""
    # JSON strings, numbers and booleans are valid Jinja.
    lines = (f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} %}}" for name, value in sorted(values.items()))
    # The line break belongs to the comment (`trim_blocks`), so that the template still begins a line.
    return f"{{#- arguments -#}}{''.join(lines)}{{#- end #}}\n{template}" if values else template


LENGTH = 300
"""Repetitions in a text. A pattern that tries every way to divide them has 2^300 ways."""
RUNS = ("a", "A", "1", " ", "\n", "_", ".", "-", "\u00e9", "\u4e2d", "\u0e01", "a ", "a1", "aA", " \n", "a.", "ab")
"""Texts to repeat: a character of each class that is common in patterns, and pairs of them."""
ENDINGS = ("", "!", "\u2603", "\x00", "a", "1", " ", "!1", "!a", "! ")
"""Texts after the repetitions, which make a pattern backtrack. `!` with each character of the pattern is added to them,
because the library skips a text that lacks a character which every match needs."""


def check_patterns_terminate(tokenizer: Any) -> None:
    """Raise InputError if a tokenizer's regular expressions do not end in time on texts that make careless patterns
    backtrack. They run in a subprocess.

    Raises:
        InputError: they do not end in time.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    parts = {name: getattr(backend, name) for name in ("normalizer", "pre_tokenizer")}
    steps = {name: None if part is None else json.loads(part.__getstate__()) for name, part in parts.items()}
    patterns = [pattern for step in steps.values() for pattern in iter_regex_patterns(step)]
    if not patterns:
        return
    characters = sorted({character for pattern in patterns for character in pattern})[:64]
    letters = [character for character in characters if character.isalnum()]
    endings = [*ENDINGS, *(f"!{character}" for character in characters if not character.isalnum())]
    texts = [run * LENGTH + ending for run in (*RUNS, *letters) for ending in endings]
    process = run_probe_script("probe_pattern.py", {**steps, "texts": texts})
    has_ended = process is not None and process.returncode != GAVE_UP
    steps_with_patterns = " or ".join(name for name, step in steps.items() if any(iter_regex_patterns(step)))
    problem = f"a pattern in its {steps_with_patterns} does not end on short texts"
    remedy = "Take another model, or correct the pattern: it may not nest repetitions, as in (a+)+."
    excerpt = " and ".join(pattern if len(pattern) <= 80 else f"{pattern[:79]}…" for pattern in patterns[:3])
    require(has_ended, "tokenizer.json", excerpt, problem, remedy)


def iter_regex_patterns(step: Any) -> Iterator[str]:
    """Yield the regular expressions in a tokenizer's normalizer or pre-tokenizer, given as JSON, and in the steps
    inside it."""
    if isinstance(step, dict):
        if isinstance(step.get("Regex"), str):
            yield step["Regex"]
        for inner in step.values():
            yield from iter_regex_patterns(inner)
    elif isinstance(step, list):
        for inner in step:
            yield from iter_regex_patterns(inner)


ZERO_WIDTH_SPACE = "\u200b"
"""Character that breaks up the text of a special token."""

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
# Lists are passed to a macro, since vLLM passes contents in parts to templates with a `for` over `message.content`.


def build_escaping_template(tokenizer: Any) -> str:
    """Return the tokenizer's chat template with a prelude that breaks up special tokens in the contents of messages.

    Returns an empty string if the tokenizer has no template. The line break at the end of the prelude is not rendered,
    since templates are rendered with `trim_blocks`.
    """
    if not tokenizer.chat_template:
        return ""
    spellings = ", ".join(
        f"({quote_jinja(text)}, {quote_jinja(break_up_special_token(text))})" for text in get_special_texts(tokenizer)
    )
    return PRELUDE.lstrip().replace("SPELLINGS", f"[{spellings}]") + tokenizer.chat_template


def break_up_special_token(text: str) -> str:
    """Return a special token's text with a zero-width space in it, so that it is not tokenized as the special token. A
    token of one letter becomes empty."""
    return text[0] + ZERO_WIDTH_SPACE + text[1:] if len(text) > 1 else ""


def quote_jinja(text: str) -> str:
    """Return a text as a Jinja string literal in double quotes."""
    return json.dumps(text, ensure_ascii=False)
