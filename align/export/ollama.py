"""Ollama `Modelfile`s for GGUF exports, with the Jinja chat template converted to a Go template. Ollama renders chats
by Go templates and reads no Jinja.

The text that a chat template puts around each kind of turn is found by rendering, written as a Go template, and
compared on whole conversations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from align.core.errors import InputError
from align.core.types import Conversation, Message
from align.data.chat.encode import find_stop_token_ids, render

Turns = Sequence[tuple[str, str]]
"""A conversation as a sequence of (role, text)."""
Render = Callable[[Turns, bool], str | None]
"""A function that renders a conversation, with the header of the next answer if the flag is True. Returns None if the
template refuses them."""

SYSTEM, ASKED, ANSWERED, AGAIN = (f"\ue000{i}\ue001" for i in range(4))
"""Placeholders of private-use characters, which occur in no text and which no template trims."""


@dataclass(frozen=True, slots=True)
class TemplatePieces:
    """The fixed texts that a chat template puts before and after each turn of a conversation.

    Attributes:
        head: text at the start if there is no system turn.
        head_of_system: text before the system's; None if the template has no system turns.
        tail_of_system: text behind the system's.
        user, assistant: (before, behind) their texts.
        due: header of the answer to be written.
    """

    head: str
    head_of_system: str | None
    tail_of_system: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    due: str

    def text(self, turns: Turns) -> str:
        """Render a conversation from the pieces, followed by the header of the next answer."""
        text = self.head
        if turns and turns[0][0] == "system" and self.head_of_system is not None:
            text = self.head_of_system + turns[0][1] + self.tail_of_system
            turns = turns[1:]
        for role, content in turns:
            before, behind = self.user if role == "user" else self.assistant
            text += before + content + behind
        return text + self.due


def split_chat_template(render: Render) -> TemplatePieces | None:
    """Split a chat template into the fixed texts around each turn, or return None if it does more, such as trimming or
    dates."""
    question = render([("user", ASKED)], False)
    answered = render([("user", ASKED), ("assistant", ANSWERED)], False)
    continued = render([("user", ASKED), ("assistant", ANSWERED), ("user", AGAIN)], False)
    due = render([("user", ASKED)], True)
    if question is None or answered is None or continued is None or due is None:
        return None
    if not (answered.startswith(question) and continued.startswith(answered) and due.startswith(question)):
        return None
    start, _, user_tail = question.partition(ASKED)
    before_answer, _, assistant_tail = answered[len(question) :].partition(ANSWERED)
    user_head, _, tail_again = continued[len(answered) :].partition(AGAIN)
    if tail_again != user_tail or not start.endswith(user_head):
        return None
    head = start[: len(start) - len(user_head)]
    head_of_system = None
    tail_of_system = ""
    with_system = render([("system", SYSTEM), ("user", ASKED)], False)
    if with_system is not None and SYSTEM in with_system and with_system.endswith(user_head + ASKED + user_tail):
        head_of_system, _, tail = with_system.partition(SYSTEM)
        tail_of_system = tail[: len(tail) - len(user_head + ASKED + user_tail)]
    pieces = TemplatePieces(
        head,
        head_of_system,
        tail_of_system,
        (user_head, user_tail),
        (before_answer, assistant_tail),
        due[len(question) :],
    )
    long = [("user", "a b"), ("assistant", "c\nd"), ("user", " e"), ("assistant", "f"), ("user", "g?")]
    for turns in (long, [("system", "s"), *long]):
        rendered = render(turns, True)
        if turns[0][0] == "system" and (head_of_system is None or rendered is None):
            continue
        if pieces.text(turns) != rendered:
            return None
    return pieces


def build_go_template(pieces: TemplatePieces, bos: str) -> str:
    """Return a Go `text/template` for Ollama, with `.System` and `.Messages`, that renders like the pieces of a chat
    template.

    Args:
        bos: text that the engine itself puts before every prompt, which is left out here.
    """
    head = escape_literal(pieces.head.removeprefix(bos))
    if pieces.head_of_system is not None:
        system = (
            escape_literal(pieces.head_of_system.removeprefix(bos))
            + "{{ .System }}"
            + escape_literal(pieces.tail_of_system)
        )
        head = f"{{{{ if .System }}}}{system}{{{{ else }}}}{head}{{{{ end }}}}"
    user, user_tail = pieces.user
    assistant, assistant_tail = pieces.assistant
    return (
        f'{head}{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{escape_literal(user)}{{{{ .Content }}}}'
        f'{escape_literal(user_tail)}{{{{ else if eq .Role "assistant" }}}}'
        f"{escape_literal(assistant)}{{{{ .Content }}}}"
        f"{escape_literal(assistant_tail)}{{{{ end }}}}{{{{ end }}}}{escape_literal(pieces.due)}"
    )


def escape_literal(text: str) -> str:
    """Escape a text for a Go template inside a Modelfile.

    Characters that begin an action in Go, end the Modelfile's string or are dropped by its parser become a string
    inside an action.
    """
    escaped = []
    for letter in text:
        is_plain = letter == "\n" or (letter.isprintable() and letter not in '{"')
        escaped.append(letter if is_plain else f'{{{{ "\\U{ord(letter):08x}" }}}}')
    return "".join(escaped)


def is_quotable(stop: str) -> bool:
    """Return whether a text can stand between quotes in a Modelfile, which has no escapes: it is printable and has no
    `"`."""
    return stop.isprintable() and '"' not in stop


READ = (
    "# Ollama reads special tokens in whatever a content spells out, and its templates cannot take them apart:",
    "# remove such spellings from text that you do not trust.",
)


def build_modelfile(folder: Path, tokenizer: Any, begins_with_bos: bool, base: str, adapter: str | None) -> str:
    """Return the text of an Ollama Modelfile for a GGUF export, with its files, chat template and stop tokens.

    Args:
        folder: folder of the export, with its generation config.
        begins_with_bos: llama.cpp puts the BOS token before every prompt.
        base, adapter: names of GGUF files in the folder; a whole model has no adapter.
    """

    def render_turns(turns: Turns, due: bool) -> str | None:
        conversation = Conversation(tuple(Message(role, text) for role, text in turns))
        with suppress(InputError):
            return render(tokenizer, conversation, add_generation_prompt=due)

    lines = ["# ollama create NAME -f Modelfile && ollama run NAME", *READ, f"FROM ./{base}"]
    if adapter is not None:
        lines.append(f"ADAPTER ./{adapter}")
    if (pieces := split_chat_template(render_turns)) is not None:
        template = build_go_template(pieces, (tokenizer.bos_token or "") if begins_with_bos else "")
        lines.append(f'TEMPLATE """{template}"""')
    else:
        lines.append("# No TEMPLATE: the chat template is more than what stands around each turn. Ollama guesses one.")
    generation = None
    if (folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(folder)
    stops = [tokenizer.convert_ids_to_tokens(id) for id in find_stop_token_ids(tokenizer, generation)]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if is_quotable(stop)]
    lines += [f"# No stop for {stop!a}, which this file cannot express." for stop in stops if not is_quotable(stop)]
    return "\n".join(lines) + "\n"
