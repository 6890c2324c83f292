"""Chats as token ids and labels: rendering, the loss mask, where an answer stops, and what is left out.

The mask is ours. A template's `{% generation %}` markers say what the assistant wrote where they exist; elsewhere an
assistant turn is what rendering it adds to the rendering of everything before it. Both are found in characters of the
rendered text and carried to tokens by the tokenizer's offsets, so that no token boundary is assumed. Whatever becomes
token ids is `veiled` first: see `align.data.chat.tokens`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any

from align.core.errors import InputError, require
from align.core.types import Conversation, Document, Message
from align.data.chat.reasoning import OPEN, answer_alone, lost_reasoning, reasoning_length
from align.data.chat.render_deadline import RenderDeadline, render_deadline
from align.data.chat.tokens import (
    CHARACTERS,
    Span,
    behind_an_answer,
    longer_than,
    special_ids,
    special_texts,
    text_ids,
    tokenised,
)
from align.data.chat.tools import check_keeps, common_beginning, span_of_calls, veiled, written
from align.track import format_turn, truncate_text

IGNORED = -100  # the label that losses pass over


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids and labels of one document, of equal length; `IGNORED` where no loss is taken."""

    input_ids: list[int]
    labels: list[int]

    @property
    def trained(self) -> int:
        """Tokens that a loss is taken on (the first token has no prediction)."""
        return sum(label != IGNORED for label in self.labels[1:])


def render(tokenizer: Any, conversation: Conversation, answer_due: bool = False) -> str:
    """The conversation as text, by the tokenizer's template.

    Args:
        answer_due: end with the header of an assistant turn.

    Raises:
        InputError: the template refuses it (roles out of order, no system turn).
    """
    with refusals(tokenizer, conversation):
        return written(tokenizer, conversation.as_dicts(), conversation.tool_dicts(), answer_due)


@contextmanager
def refusals(tokenizer: Any, conversation: Conversation) -> Iterator[None]:
    """What a chat template raises, as the user's error: it is a program of the model's, which may divide by zero as
    well as refuse."""
    try:
        yield
    except MemoryError:
        raise
    except RenderDeadline as error:
        longest = max(len(message.content) for message in conversation.messages)
        size = f"{len(conversation.messages):,} turns, the longest of {longest:,} characters"
        remedy = "Add data.template=chatml, or take another model."
        raise InputError(conversation.id or "conversation", size, f"the chat template: {error}", remedy) from error
    except Exception as error:
        remedy = "Use the roles in the order the template wants, or data.template=chatml."
        if conversation.uses_tools:
            remedy = (
                "It may take no tools, or no such calls: use data.template=chatml, or a model that was made for them."
            )
        if not renders(tokenizer, (Message("user", "a"),)):
            remedy = "It takes no conversation at all: mend the model's chat template, or take data.template=chatml."
        elif conversation.messages[0].role == "system" and renders(tokenizer, conversation.messages[1:]):
            remedy = (
                "It takes no system turn: put its text in front of the first question (if it comes from data.system, "
                "leave that out), or take data.template=chatml."
            )
        raise InputError(
            f"{conversation.id or 'conversation'}, roles",
            ", ".join(m.role for m in conversation.messages[:6]),
            f"the chat template refuses it ({type(error).__name__}: {error})",
            remedy,
        ) from error


def renders(tokenizer: Any, messages: Sequence[Message]) -> bool:
    """Whether the template takes these turns."""
    try:
        with render_deadline():
            return bool(tokenizer.apply_chat_template([message.as_dict() for message in messages], tokenize=False))
    except Exception:  # it is a program of the model's
        return False


def marked_spans(tokenizer: Any, conversation: Conversation) -> tuple[str, list[Span]]:
    """The rendered text and the spans that the template's own markers give to the assistant."""
    from transformers.utils.chat_template_utils import render_jinja_template

    tools: Any = conversation.tool_dicts()
    with refusals(tokenizer, conversation), render_deadline():
        made: Any = render_jinja_template(
            [conversation.as_dicts()],
            tools=tools,
            chat_template=tokenizer.chat_template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    (text,), (spans,) = made
    return text, spans


def assistant_spans(tokenizer: Any, conversation: Conversation, answers_alone: bool = False) -> tuple[str, list[Span]]:
    """The rendered text and the character spans [start, end) that the assistant wrote.

    A span begins where the answer's header ends (as sampling will see it), and covers the answer and the token that
    ends the turn, not the line break or the end of text that a template puts after it.

    Args:
        answers_alone: without the reasoning that an answer begins with.
    """
    text = render(tokenizer, conversation)
    specials = special_texts(tokenizer)
    spans = []
    for i, message in enumerate(conversation.messages):
        if message.role != "assistant" or not message.trained:
            continue
        if message.tool_calls:
            found = span_of_calls(
                partial(render, tokenizer), conversation, i, text, behind_an_answer(tokenizer), specials
            )
        else:
            found = span_of_answer(tokenizer, conversation, i, text, specials)
        said = answer_alone(message.content).strip() if message.tool_calls else ""
        if found is None or said not in text[slice(*found)]:  # some write it behind the results
            raise unlocated(conversation, i)
        start, end = found
        if answers_alone:
            start += reasoning_length(text[start:end], opened=text[:start].rstrip().endswith(OPEN))
        spans.append((start, end))
    return text, spans


def span_of_answer(
    tokenizer: Any, conversation: Conversation, i: int, text: str, specials: Sequence[str]
) -> Span | None:
    """Return where the assistant wrote turn `i`, which calls no tool; None if what is written before the content
    depends on the content.

    The content is found by rendering a stand-in in its place: whatever a template trims, moves or leaves out when other
    turns follow, both renderings have the same text around the content.

    Args:
        text: the conversation as the template writes it.
        specials: the texts of the special tokens, longest first.

    Raises:
        InputError: the content does not stand in the text exactly once.
    """
    # Private-use characters, which no template trims.
    stand_in = next(mark for n in count() if (mark := f"\ue000answer {n}\ue001") not in text)
    turns = conversation.messages
    standing = replace(conversation, messages=(*turns[:i], Message("assistant", stand_in), *turns[i + 1 :]))
    head, found, rest = render(tokenizer, standing).partition(stand_in)
    if not found or stand_in in rest or not text.endswith(rest):
        raise unlocated(conversation, i)
    alone = render(tokenizer, standing.turns(i + 1)).rpartition(stand_in)[2]
    end = len(text) - len(rest)
    start = len(head) if text.startswith(head) and len(head) <= end else None
    before = render(tokenizer, conversation.turns(i), answer_due=True) if i else text
    if len(before) <= end and text.startswith(before):
        start = len(before)
    return None if start is None else (start, end + turn_end(rest, alone, specials))


def unlocated(conversation: Conversation, i: int) -> InputError:
    return InputError(
        f"{conversation.id or 'conversation'}, messages[{i}]",
        truncate_text(format_turn(conversation.messages[i].as_dict())),
        "the chat template rewrites this turn, so its loss mask is not known",
        "Give one assistant turn a row, or use data.template=chatml.",
    )


def turn_end(rest: str, alone: str, specials: Sequence[str]) -> int:
    """Return how many characters behind an answer end its turn: up to the special token there; if the template writes
    none, what it writes whether or not turns follow.

    Args:
        rest: the rendered text from the end of the answer.
        alone: the same if nothing follows the turn.
        specials: the texts of the special tokens, longest first.
    """
    closed = rest.lstrip()
    for special in specials:
        if closed.startswith(special) and alone.lstrip().startswith(special):
            return len(rest) - len(closed) + len(special)
    return len(common_beginning(rest, alone).rstrip())


def encode_conversation(tokenizer: Any, conversation: Conversation, mask_reasoning: bool = False) -> Encoded:
    """Tokens of a whole conversation, with a loss on what the assistant wrote and on the tokens that end its turns.

    Args:
        mask_reasoning: no loss on the reasoning that an answer begins with.
    """
    marked = "{% generation %}" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template
    # Markers do not say whose turn they mark, and many leave calls out.
    marked &= all(message.trained and not message.tool_calls for message in conversation.messages)
    masked = mask_reasoning and any(reasoning_length(message.content) for message in conversation.messages)
    check_keeps(tokenizer, conversation)
    conversation, veil = veiled(tokenizer, conversation)
    if marked and not masked:
        text, spans = marked_spans(tokenizer, conversation)
    else:
        text, spans = assistant_spans(tokenizer, conversation, masked)
    made = tokenised(tokenizer, text, veil)
    ids = made.ids
    special = special_ids(tokenizer)
    mask = [  # a header's token may take the blanks that an answer begins with, and is a header's all the same
        any(a < end and start < b and (start <= a or i not in special) for start, end in spans)
        for i, (a, b) in zip(ids, made.spans, strict=True)
    ]
    if marked and not masked:
        mask = with_turn_ends(ids, without_line_breaks(tokenizer, ids, mask), special)
    return Encoded(ids, [i if m else IGNORED for i, m in zip(ids, mask, strict=True)])


def with_turn_ends(ids: Sequence[int], mask: list[bool], special: frozenset[int]) -> list[bool]:
    """`mask`, widened by the special token right behind each span: some templates close the turn outside their
    generation markers, and a model that never trains on it never stops."""
    return [
        m or (i > 0 and mask[i - 1] and ids[i] in special and ids[i - 1] not in special) for i, m in enumerate(mask)
    ]


def without_line_breaks(tokenizer: Any, ids: Sequence[int], mask: list[bool]) -> list[bool]:
    """`mask` less the line breaks behind a turn's last special token, which some templates put inside their markers:
    sampling stops at that token, so nothing behind it is ever sampled."""
    kept, special = list(mask), special_ids(tokenizer)
    for end, inside in enumerate(mask):
        if inside and not any(mask[end + 1 : end + 2]):
            last = end
            while last > 0 and mask[last] and ids[last] not in special and not tokenizer.decode([ids[last]]).strip():
                last -= 1
            if mask[last] and ids[last] in special:
                kept[last + 1 : end + 1] = [False] * (end - last)
    return kept


def surely_too_long(tokenizer: Any, conversation: Conversation, most: int) -> bool:
    """Whether a conversation surely has more than `most` tokens, at a price that does not grow with its length. Only
    long ones are rendered for it: a template may leave out some of what was said."""
    characters = sum(len(message.content) for message in conversation.messages)
    characters += sum(len(call.arguments) for message in conversation.messages for call in message.tool_calls)
    return characters > CHARACTERS * most and longer_than(tokenizer, render(tokenizer, conversation), most)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation and its tokens, the header of the answer included."""

    conversation: Conversation
    input_ids: list[int]


def prompt_ids(tokenizer: Any, conversation: Conversation) -> list[int]:
    """A conversation whose answer is due, its header included."""
    check_keeps(tokenizer, conversation)
    conversation, veil = veiled(tokenizer, conversation)
    return tokenised(tokenizer, render(tokenizer, conversation, answer_due=True), veil).ids


def prompt_room(context: int, max_length: int, max_new_tokens: int) -> int:
    """Tokens that a prompt may have.

    Args:
        context: tokens that the model was made for.

    Raises:
        InputError: the answer leaves none.
    """
    require(
        max_new_tokens < context,
        "rollout.max_new_tokens",
        max_new_tokens,
        f"leaves no room for a prompt: the model's context is {context} tokens",
        f"Set it well below {context}.",
    )
    return min(max_length, context - max_new_tokens)


def encode_prompts(tokenizer: Any, conversations: Sequence[Conversation], max_tokens: int) -> tuple[list[Prompt], int]:
    """Prompts that fit, and how many did not.

    Raises:
        InputError: none fits.
    """
    found = []
    for conversation in conversations:
        if surely_too_long(tokenizer, conversation, max_tokens):
            continue
        ids = prompt_ids(tokenizer, conversation)
        if len(ids) <= max_tokens:
            found.append(Prompt(conversation, ids))
    dropped = len(conversations) - len(found)
    if not found:
        raise InputError(
            "data.max_length",
            max_tokens,
            f"every one of the {dropped} prompts is longer",
            "Raise data.max_length, lower rollout.max_new_tokens, or give shorter prompts.",
        )
    return found, dropped


def eos_token_ids(tokenizer: Any, generation_config: Any = None) -> tuple[int, ...]:
    """Every token that ends a plain text: the tokenizer's EOS and the checkpoint's list.

    Raises:
        InputError: the checkpoint lists what is no token.
    """
    listed = getattr(generation_config, "eos_token_id", None)
    found = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if strange := [stop for stop in found if type(stop) is not int or not 0 <= stop < len(tokenizer)]:
        raise InputError(
            "generation_config.json, eos_token_id", strange[0], "is no token of this tokenizer", "Correct it."
        )
    stops = set(found)
    if tokenizer.eos_token_id is not None:
        stops.add(tokenizer.eos_token_id)
    return tuple(sorted(stops))


def stop_token_ids(tokenizer: Any, generation_config: Any = None) -> tuple[int, ...]:
    """Every token that ends an answer: those that end a plain text, and what the template closes an assistant turn
    with."""
    stops = {*eos_token_ids(tokenizer, generation_config)}
    if tokenizer.chat_template:
        probe = encode_conversation(tokenizer, Conversation((Message("user", "a"), Message("assistant", "b"))))
        last = next((label for label in reversed(probe.labels) if label != IGNORED), None)
        if last in special_ids(tokenizer):
            stops.add(last)
    return tuple(sorted(stops))


def encode_judged(
    tokenizer: Any, prompt: Conversation, answer: str | Message, ended: bool, stops: Sequence[int]
) -> list[int]:
    """A conversation as a reward model reads it: up to the token that ends the answer's turn and no further (a
    template's trailing line break would move the score to it); without that token where the answer was cut.

    Args:
        prompt: ends where the answer is due.
        answer: its text, or the turn, which may call tools.
        ended: False where sampling hit its length limit.
        stops: the tokens that end a turn.
    """
    judged = prompt.with_answer(answer)
    check_keeps(tokenizer, judged)
    conversation, veil = veiled(tokenizer, judged)
    text, spans = assistant_spans(tokenizer, conversation)
    text = text[: spans[-1][1]]
    ids = tokenised(tokenizer, text, veil).ids
    prompt_text = render(tokenizer, conversation.turns(len(prompt.messages)), answer_due=True)
    given = tokenised(tokenizer, prompt_text, veil).ids
    # A merge across the border, which sampling cannot make:
    if ids[: len(given)] != given and text.startswith(prompt_text):
        ids = [*given, *tokenised(tokenizer, text[len(prompt_text) :], veil).ids]
    while not ended and ids and ids[-1] in stops:
        ids.pop()
    return ids


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token that a reward model's rows end with, whichever token ended the answer; None where the template
    writes none behind an answer."""
    ids = encode_judged(tokenizer, Conversation((Message("user", "a"),)), "b", True, ())
    return ids[-1] if ids[-1] in special_ids(tokenizer) else None


def prompt_length(tokenizer: Any, prompt: Conversation, ids: Sequence[int]) -> int:
    """How many tokens of a judged conversation stand before its last answer."""
    given = prompt_ids(tokenizer, prompt)
    same = (a == b for a, b in zip(given, ids, strict=False))
    return next((i for i, equal in enumerate(same) if not equal), min(len(given), len(ids)))


def encode_text(tokenizer: Any, text: str, max_length: int) -> list[Encoded]:
    """Plain text in pieces of at most `max_length` tokens, each token trained, closed by EOS.

    Raises:
        InputError: the tokenizer has none.
    """
    remedy = "Name eos_token in the model's tokenizer_config.json, or give conversations."
    require(tokenizer.eos_token_id is not None, "eos_token", None, "closes plain text, and this model has none", remedy)
    ids = [*text_ids(tokenizer, text), tokenizer.eos_token_id]
    if tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    pieces = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
    return [Encoded(piece, list(piece)) for piece in pieces if len(piece) > 1]


@dataclass(frozen=True, slots=True)
class Encoding:
    """Encoded documents, and what was left out.

    Attributes:
        rows: what is trained on.
        too_long: conversations longer than the context, dropped whole: a cut answer would teach to stop nowhere.
        unanswered: conversations without a token to train on.
        cut: conversations longer than the context that are among the rows, cut there.
        unreasoned: conversations whose last answer lost its reasoning to the chat template.
        unreasoned_earlier: conversations of which an earlier trained answer did.
        places: of each row, which of the documents it comes from.
    """

    rows: list[Encoded]
    too_long: int
    unanswered: int
    cut: int = 0
    unreasoned: int = 0
    unreasoned_earlier: int = 0
    places: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(len(r.input_ids) for r in self.rows)

    @property
    def given(self) -> int:
        """Rows there would be, had none been left out."""
        return len(self.rows) + self.too_long + self.unanswered


def encode(
    tokenizer: Any,
    documents: Sequence[Document],
    max_length: int,
    truncate: bool = False,
    mask_reasoning: bool = False,
    left: str = "leaves nothing to train on",
) -> Encoding:
    """Every document as token ids and labels.

    Args:
        mask_reasoning: see `encode_conversation`.
        truncate: a conversation longer than `max_length` is cut there; without, it is left out.
        left: what is wrong where every document was dropped.

    Raises:
        InputError: nothing is left; the message counts what was dropped and why.
    """
    rows, places = list[Encoded](), list[int]()
    too_long = unanswered = cut = unreasoned = unreasoned_earlier = 0
    for place, document in enumerate(documents):
        if isinstance(document, str):
            pieces = encode_text(tokenizer, document, max_length)
            rows += pieces
            places += [place] * len(pieces)
            continue
        if not truncate and surely_too_long(tokenizer, document, max_length):
            too_long += 1
            continue
        encoded = encode_conversation(tokenizer, document, mask_reasoning)
        longer = len(encoded.input_ids) > max_length
        if longer and truncate:
            encoded = Encoded(encoded.input_ids[:max_length], encoded.labels[:max_length])
        if longer and not truncate:
            too_long += 1
        elif encoded.trained == 0:
            unanswered += 1
        else:
            rows.append(encoded)
            places.append(place)
            cut += longer
            if any(reasoning_length(turn.content) for turn in document.messages if turn.role == "assistant"):
                last, earlier = lost_reasoning(document, render(tokenizer, document))
                unreasoned, unreasoned_earlier = unreasoned + last, unreasoned_earlier + earlier
    if documents and not rows:
        raise InputError(
            "data.max_length",
            max_length,
            f"{left}: {too_long} conversations are longer and {unanswered} have no assistant turn",
            "Raise data.max_length, or give conversations with an assistant's answer.",
        )
    return Encoding(rows, too_long, unanswered, cut, unreasoned, unreasoned_earlier, places)


def token_count(tokenizer: Any, said: Document) -> int:
    """Tokens that training reads of a conversation, or of plain text."""
    if isinstance(said, str):
        return len(text_ids(tokenizer, said)) + 1
    return len(encode_conversation(tokenizer, said).input_ids)
