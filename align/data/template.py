"""The chat template that a tokenizer speaks by: the model's own, or one that the configuration asks for, with its
arguments set in it."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from jinja2 import Environment, TemplateError, meta

from align.errors import InputError, require
from align.types import Conversation, Message

PATIENCE_S = 20
"""That a template may take for one turn."""

# For base models without a template. The turn ends with the tokenizer's own EOS, a token the model already knows,
# since adding new tokens would need embeddings that an adapter does not train.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

KWARGS = re.compile(r"\A\{#- arguments -#\}.*?\{#- end -#\}", re.DOTALL)
"""What `with_kwargs` puts in front of a template."""
GIVEN = {"messages", "add_generation_prompt", "tools", "documents", "bos_token", "eos_token", "pad_token", "unk_token"}
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
        InputError: the model brings none and none was asked for, or the template reads no such argument.
    """
    if template == "chatml":
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
    # A template may loop as long as it likes. One turn is tried in a thread, which ends with the process.
    asked = Conversation((Message("user", "a"),))
    tried = threading.Thread(target=lambda: try_turn(tokenizer, asked), daemon=True)
    tried.start()
    tried.join(PATIENCE_S)
    if tried.is_alive():
        problem = f"it has not written one turn after {PATIENCE_S} s"
        raise InputError("chat_template", "(the model's)", problem, "Add data.template=chatml, or take another model.")


def with_kwargs(template: Any, kwargs: Mapping[str, Any]) -> Any:
    """A chat template that has these arguments set, in place of those that it had.

    Args:
        template: Jinja, or a mapping of names to Jinja.

    Raises:
        InputError: a name is no variable that the template reads, or a value is no text, number or truth value.
    """
    if isinstance(template, Mapping):
        return {name: with_kwargs(inner, kwargs) for name, inner in template.items()}
    own = KWARGS.sub("", template)
    parser = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        reads = meta.find_undeclared_variables(parser.parse(MARKERS.sub("", own))) - GIVEN
    except TemplateError as error:
        raise InputError(
            "chat_template", "(the model's)", f"is no Jinja ({error})", "Add data.template=chatml."
        ) from error
    for name, value in kwargs.items():
        key = f"data.template_kwargs.{name}"
        known = f"It reads: {', '.join(sorted(reads))}." if reads else "It reads none: leave data.template_kwargs out."
        require(name in reads, key, value, "is nothing that this model's chat template reads", known)
        plain = isinstance(value, str | int | float)
        require(plain, key, value, "is no value of a template's argument", "Give text, a number, true or false.")
    # JSON writes text, numbers and truth values as Jinja reads them.
    made = "".join(f"{{%- set {name} = {json.dumps(value)} %}}" for name, value in sorted(kwargs.items()))
    return f"{{#- arguments -#}}{made}{{#- end -#}}{own}"


def try_turn(tokenizer: Any, conversation: Conversation) -> None:
    with suppress(Exception):  # what it raises is said of the row that it refuses
        tokenizer.apply_chat_template(conversation.as_dicts(), tokenize=False, add_generation_prompt=True)
