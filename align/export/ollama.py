"""An Ollama `Modelfile`. Ollama renders chats by Go templates and reads no Jinja: what a chat template does to each
kind of turn is found by rendering, said again in Go's words, and compared on whole conversations."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from align.core.errors import InputError
from align.core.types import Conversation, Message
from align.data.chat.encode import render, stop_token_ids

Turns = Sequence[tuple[str, str]]
"""(role, text)."""
Render = Callable[[Turns, bool], str | None]
"""Turns, and whether an answer is due, as text; None where the template refuses them."""

SYSTEM, ASKED, ANSWERED, AGAIN = (f"\ue000{i}\ue001" for i in range(4))  # in no text, and no template trims them


@dataclass(frozen=True, slots=True)
class Pieces:
    """What stands around each turn.

    Attributes:
        head: in front of everything, where no system turn is given.
        head_of_system: in front of the system's text; None where the template has no system turns.
        tail_of_system: behind it.
        user, assistant: (before, behind) their texts.
        due: the header of the answer that is to be written.
    """

    head: str
    head_of_system: str | None
    tail_of_system: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    due: str

    def text(self, turns: Turns) -> str:
        """A conversation whose answer is due."""
        system, rest = "", list(turns)
        if rest and rest[0][0] == "system" and self.head_of_system is not None:
            system = rest.pop(0)[1]
            system = self.head_of_system + system + self.tail_of_system
        else:
            system = self.head
        around = {"user": self.user, "assistant": self.assistant}
        return system + "".join(around[role][0] + text + around[role][1] for role, text in rest) + self.due


def pieces_of(render: Render) -> Pieces | None:
    """The pieces of a chat template; None where it is not made of such, as one that trims, dates or counts turns."""
    one = render([("user", ASKED)], False)
    two = render([("user", ASKED), ("assistant", ANSWERED)], False)
    three = render([("user", ASKED), ("assistant", ANSWERED), ("user", AGAIN)], False)
    due = render([("user", ASKED)], True)
    if one is None or two is None or three is None or due is None:
        return None
    if not (two.startswith(one) and three.startswith(two) and due.startswith(one)):
        return None
    start, _, user_tail = one.partition(ASKED)
    before_answer, _, assistant_tail = two[len(one) :].partition(ANSWERED)
    user_head, _, tail_again = three[len(two) :].partition(AGAIN)
    if tail_again != user_tail or not start.endswith(user_head):
        return None
    head, head_of_system, tail_of_system = start[: len(start) - len(user_head)], None, ""
    given = render([("system", SYSTEM), ("user", ASKED)], False)
    if given is not None and SYSTEM in given and given.endswith(user_head + ASKED + user_tail):
        head_of_system, _, behind = given.partition(SYSTEM)
        tail_of_system = behind[: len(behind) - len(user_head + ASKED + user_tail)]
    found = Pieces(
        head, head_of_system, tail_of_system, (user_head, user_tail), (before_answer, assistant_tail), due[len(one) :]
    )
    long = [("user", "a b"), ("assistant", "c\nd"), ("user", " e"), ("assistant", "f"), ("user", "g?")]
    for turns in (long, [("system", "s"), *long]):
        wanted = render(turns, True)
        if turns[0][0] == "system" and (head_of_system is None or wanted is None):
            continue
        if found.text(turns) != wanted:
            return None
    return found


def go_template(pieces: Pieces, bos: str) -> str:
    """The pieces in Go's `text/template`, over Ollama's `.System` and `.Messages`.

    Args:
        bos: what the engine puts in front of every prompt by itself, to be left out here.
    """
    head = literal(pieces.head.removeprefix(bos))
    if pieces.head_of_system is not None:
        given = literal(pieces.head_of_system.removeprefix(bos)) + "{{ .System }}" + literal(pieces.tail_of_system)
        head = f"{{{{ if .System }}}}{given}{{{{ else }}}}{head}{{{{ end }}}}"
    (user, user_tail), (assistant, assistant_tail) = pieces.user, pieces.assistant
    return (
        f'{head}{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{literal(user)}{{{{ .Content }}}}'
        f'{literal(user_tail)}{{{{ else if eq .Role "assistant" }}}}{literal(assistant)}{{{{ .Content }}}}'
        f"{literal(assistant_tail)}{{{{ end }}}}{{{{ end }}}}{literal(pieces.due)}"
    )


def literal(text: str) -> str:
    """As both files say it: what may begin an action in Go, or end the Modelfile's string, and what that file's parser
    drops are written as a string inside an action."""
    return re.sub(r".", lambda found: found[0] if printable(found[0]) else in_go(found[0]), text)


def printable(letter: str) -> bool:
    return letter.isprintable() and letter not in '{"'


def in_go(letter: str) -> str:
    return f'{{{{ "\\U{ord(letter):08x}" }}}}'


def quotable(stop: str) -> bool:
    """Whether a Modelfile's parser reads it between quotes: it knows no escapes, and drops what is not printed."""
    return stop.isprintable() and '"' not in stop


READ = (
    "# Ollama reads special tokens in whatever a content spells out, and its templates cannot take them apart:",
    "# remove such spellings from text that you do not trust.",
)


def ollama_file(folder: Path, tokenizer: Any, begins_with_bos: bool, base: str, adapter: str | None) -> str:
    """The text of a Modelfile.

    Args:
        folder: of the export, with its generation config.
        begins_with_bos: whether llama.cpp puts that token in front of every prompt.
        base, adapter: names of GGUF files in the folder; of a whole model one alone.
    """

    def rendered(turns: Turns, due: bool) -> str | None:
        conversation = Conversation(tuple(Message(role, text) for role, text in turns))
        with suppress(InputError):
            return render(tokenizer, conversation, answer_due=due)

    lines = ["# ollama create NAME -f Modelfile && ollama run NAME", *READ, f"FROM ./{base}"]
    if adapter is not None:
        lines.append(f"ADAPTER ./{adapter}")
    if (pieces := pieces_of(rendered)) is not None:
        template = go_template(pieces, (tokenizer.bos_token or "") if begins_with_bos else "")
        lines.append(f'TEMPLATE """{template}"""')
    else:
        lines.append("# No TEMPLATE: the chat template is more than what stands around each turn. Ollama guesses one.")
    generation = None
    if (folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(folder)
    stops = [tokenizer.convert_ids_to_tokens(id) for id in stop_token_ids(tokenizer, generation)]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if quotable(stop)]
    lines += [f"# No stop for {stop!a}, which this file cannot say." for stop in stops if not quotable(stop)]
    return "\n".join(lines) + "\n"
