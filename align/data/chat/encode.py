"""Encoding of conversations: rendering, token ids, loss masks and the tokens that end an answer.

A template's `{% generation %}` markers give the text of the assistant where they exist. Otherwise an assistant turn is
the text by which the rendering grows when the turn is added. Both are spans of characters in the rendered text, which
the tokenizer's offsets map to tokens, so that no token boundary is assumed. Special tokens in the messages are escaped
first, see `align.data.chat.tokens`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any, NamedTuple

from align.core.errors import InputError, require
from align.core.types import Conversation, Document, Message
from align.data.chat.reasoning import OPEN, find_lost_reasoning, measure_reasoning, strip_reasoning
from align.data.chat.render_deadline import RenderDeadline, render_deadline
from align.data.chat.tokens import (
    CHARACTERS,
    Span,
    get_special_texts,
    get_special_token_ids,
    is_longer_than,
    render_answer_end,
    tokenize_rendered,
    tokenize_text,
)
from align.data.chat.tools import (
    apply_template,
    check_tools_rendered,
    escape_conversation,
    find_calls_span,
    find_common_prefix,
)
from align.track import format_turn, truncate_text

IGNORE_INDEX = -100
"""Label of tokens without a loss."""


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """Token ids and labels of one document, of equal length. Tokens without a loss have the label `IGNORE_INDEX`."""

    input_ids: list[int]
    labels: list[int]

    @property
    def trained(self) -> int:
        """Number of tokens with a loss. The first token has none, since nothing predicts it."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


def render(tokenizer: Any, conversation: Conversation, add_generation_prompt: bool = False) -> str:
    """Return a conversation as text, rendered with the tokenizer's chat template.

    Args:
        add_generation_prompt: add the generation prompt, the header of the next assistant turn.

    Raises:
        InputError: the template refuses the conversation, for instance for the order of its roles.
    """
    with convert_template_errors(tokenizer, conversation):
        return apply_template(tokenizer, conversation.as_dicts(), conversation.tool_dicts(), add_generation_prompt)


@contextmanager
def convert_template_errors(tokenizer: Any, conversation: Conversation) -> Iterator[None]:
    """Convert any exception of a chat template inside the block, except MemoryError, to an InputError that suggests a
    remedy.

    A template is a program that comes with the model. It may refuse a conversation, or fail with any other exception.
    """
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
        if not can_render(tokenizer, (Message("user", "a"),)):
            remedy = (
                "It renders no conversation at all: correct the model's chat template, or use data.template=chatml."
            )
        elif conversation.messages[0].role == "system" and can_render(tokenizer, conversation.messages[1:]):
            remedy = (
                "It takes no system turn: put its text in front of the first question (if it comes from data.system, "
                "leave that out), or take data.template=chatml."
            )
        raise InputError(
            f"{conversation.id or 'conversation'}, roles",
            ", ".join(message.role for message in conversation.messages[:6]),
            f"the chat template refuses it ({type(error).__name__}: {error})",
            remedy,
        ) from error


def can_render(tokenizer: Any, messages: Sequence[Message]) -> bool:
    """Return whether the tokenizer's chat template renders these messages in time and without an exception."""
    try:
        with render_deadline():
            return bool(tokenizer.apply_chat_template([message.as_dict() for message in messages], tokenize=False))
    except Exception:  # a template may raise anything
        return False


def render_with_marked_spans(tokenizer: Any, conversation: Conversation) -> tuple[str, list[Span]]:
    """Render a conversation, and return the text and the character spans inside the template's `{% generation %}`
    markers."""
    from transformers.utils.chat_template_utils import render_jinja_template

    tools: Any = conversation.tool_dicts()
    with convert_template_errors(tokenizer, conversation), render_deadline():
        rendering: Any = render_jinja_template(
            [conversation.as_dicts()],
            tools=tools,
            chat_template=tokenizer.chat_template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    (text,), (spans,) = rendering
    return text, spans


def render_with_assistant_spans(
    tokenizer: Any, conversation: Conversation, exclude_reasoning: bool = False
) -> tuple[str, list[Span]]:
    """Render a conversation, and return the text and the character spans of the assistant turns that are trained on.

    A span begins after the generation prompt. It covers the answer and the token that ends the turn, but not a line
    break or an end-of-text token that the template writes after it.

    Args:
        exclude_reasoning: leave out the reasoning at the beginning of each answer.

    Raises:
        InputError: an assistant turn is not found in the rendered text.
    """
    text = render(tokenizer, conversation)
    specials = get_special_texts(tokenizer)
    spans = []
    for i, message in enumerate(conversation.messages):
        if message.role != "assistant" or not message.trained:
            continue
        if message.tool_calls:
            span = find_calls_span(
                partial(render, tokenizer), conversation, i, text, render_answer_end(tokenizer), specials
            )
        else:
            span = find_answer_span(tokenizer, conversation, i, text, specials)
        if span is None:
            raise build_turn_not_found_error(conversation, i)
        start, end = span
        # Some templates move the text beside a call behind the results.
        if message.tool_calls and strip_reasoning(message.content).strip() not in text[start:end]:
            raise build_turn_not_found_error(conversation, i)
        if exclude_reasoning:
            start += measure_reasoning(text[start:end], begins_in_reasoning=text[:start].rstrip().endswith(OPEN))
        spans.append((start, end))
    return text, spans


def find_answer_span(
    tokenizer: Any, conversation: Conversation, turn_index: int, rendered: str, special_texts: Sequence[str]
) -> Span | None:
    """Return the character span, in the rendered text, of the assistant turn `turn_index`, which calls no tool. The
    token that ends the turn is part of the span.

    The content is located by rendering a placeholder in its place. Even if a template trims, moves or leaves out text
    when other turns follow, both renderings have the same text around the content. Returns None if the text before the
    content depends on the content.

    Args:
        rendered: the rendered conversation.
        special_texts: the texts of the special tokens, longest first.

    Raises:
        InputError: the content is not in the text exactly once.
    """
    # Private-use characters, which no template trims.
    placeholder = next(mark for n in count() if (mark := f"\ue000answer {n}\ue001") not in rendered)
    turns = conversation.messages
    placeholder_turn = Message("assistant", placeholder)
    marked = replace(conversation, messages=(*turns[:turn_index], placeholder_turn, *turns[turn_index + 1 :]))
    head, separator, tail = render(tokenizer, marked).partition(placeholder)
    if not separator or placeholder in tail or not rendered.endswith(tail):
        raise build_turn_not_found_error(conversation, turn_index)
    last_tail = render(tokenizer, marked.turns(turn_index + 1)).rpartition(placeholder)[2]
    end = len(rendered) - len(tail)
    start = len(head) if rendered.startswith(head) and len(head) <= end else None
    prompt = render(tokenizer, conversation.turns(turn_index), add_generation_prompt=True) if turn_index else rendered
    if len(prompt) <= end and rendered.startswith(prompt):
        start = len(prompt)
    return None if start is None else (start, end + measure_turn_end(tail, last_tail, special_texts))


def build_turn_not_found_error(conversation: Conversation, turn_index: int) -> InputError:
    """Return the InputError for an assistant turn whose text is not found in the rendered conversation."""
    return InputError(
        f"{conversation.id or 'conversation'}, messages[{turn_index}]",
        truncate_text(format_turn(conversation.messages[turn_index].as_dict())),
        "the chat template rewrites this turn, so its loss mask is not known",
        "Give one assistant turn a row, or use data.template=chatml.",
    )


def measure_turn_end(tail: str, last_tail: str, special_texts: Sequence[str]) -> int:
    """Return the number of characters after an answer that end its turn, such as `<|im_end|>`.

    They reach to the end of the special token there. If the template writes no special token, they are the text that it
    writes whether or not turns follow.

    Args:
        tail: the rendered text from the end of the answer.
        last_tail: the same if the turn is the last one.
        special_texts: the texts of the special tokens, longest first.
    """
    stripped = tail.lstrip()
    for special in special_texts:
        if stripped.startswith(special) and last_tail.lstrip().startswith(special):
            return len(tail) - len(stripped) + len(special)
    return len(find_common_prefix(tail, last_tail).rstrip())


def encode_conversation(tokenizer: Any, conversation: Conversation, mask_reasoning: bool = False) -> EncodedRow:
    """Return token ids and labels of a conversation, with a loss on the assistant's text and on the tokens that end its
    turns.

    Args:
        mask_reasoning: take no loss on the reasoning at the beginning of each answer.
    """
    has_markers = "{% generation %}" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template
    # Markers do not tell which turns are not trained on, and many templates have none around tool calls.
    has_markers &= all(message.trained and not message.tool_calls for message in conversation.messages)
    exclude_reasoning = mask_reasoning and any(measure_reasoning(message.content) for message in conversation.messages)
    check_tools_rendered(tokenizer, conversation)
    conversation, escapes = escape_conversation(tokenizer, conversation)
    use_markers = has_markers and not exclude_reasoning
    if use_markers:
        text, spans = render_with_marked_spans(tokenizer, conversation)
    else:
        text, spans = render_with_assistant_spans(tokenizer, conversation, exclude_reasoning)
    tokens = tokenize_rendered(tokenizer, text, escapes)
    special = get_special_token_ids(tokenizer)
    # A special token of the header may cover the blanks that an answer begins with. It stays without a loss.
    mask = [
        any(
            token_start < end and start < token_end and (start <= token_start or token_id not in special)
            for start, end in spans
        )
        for token_id, (token_start, token_end) in zip(tokens.ids, tokens.spans, strict=True)
    ]
    if use_markers:
        mask = include_turn_ends(tokens.ids, exclude_line_breaks(tokenizer, tokens.ids, mask), special)
    labels = [token_id if is_trained else IGNORE_INDEX for token_id, is_trained in zip(tokens.ids, mask, strict=True)]
    return EncodedRow(tokens.ids, labels)


def include_turn_ends(ids: Sequence[int], mask: list[bool], special_token_ids: frozenset[int]) -> list[bool]:
    """Return a copy of the loss mask that also includes the special token right after each span that is trained on.

    Some templates end the turn outside their generation markers, and a model that never trains on the token never
    stops.
    """
    return [
        is_trained or (i > 0 and mask[i - 1] and ids[i] in special_token_ids and ids[i - 1] not in special_token_ids)
        for i, is_trained in enumerate(mask)
    ]


def exclude_line_breaks(tokenizer: Any, ids: Sequence[int], mask: list[bool]) -> list[bool]:
    """Return a copy of the loss mask without the line breaks after the last special token of each span that is trained
    on.

    Some templates have them inside their generation markers, but sampling stops at the special token.
    """
    trimmed = list(mask)
    special = get_special_token_ids(tokenizer)
    for end, is_trained in enumerate(mask):
        is_last_of_span = is_trained and not any(mask[end + 1 : end + 2])
        if is_last_of_span:
            last = end
            while last > 0 and mask[last] and ids[last] not in special and not tokenizer.decode([ids[last]]).strip():
                last -= 1
            if mask[last] and ids[last] in special:
                trimmed[last + 1 : end + 1] = [False] * (end - last)
    return trimmed


def is_surely_too_long(tokenizer: Any, conversation: Conversation, max_tokens: int) -> bool:
    """Return True if a conversation certainly has more than `max_tokens` tokens, found by tokenizing only its
    beginning.

    Only long conversations are rendered for it, since a template may leave out some of the text.
    """
    characters = sum(len(message.content) for message in conversation.messages)
    characters += sum(len(call.arguments) for message in conversation.messages for call in message.tool_calls)
    return characters > CHARACTERS * max_tokens and is_longer_than(
        tokenizer, render(tokenizer, conversation), max_tokens
    )


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation whose answer is to be sampled, and its token ids with the generation prompt."""

    conversation: Conversation
    input_ids: list[int]


def encode_prompt(tokenizer: Any, conversation: Conversation) -> list[int]:
    """Return the token ids of a conversation rendered with the generation prompt at its end."""
    check_tools_rendered(tokenizer, conversation)
    conversation, escapes = escape_conversation(tokenizer, conversation)
    return tokenize_rendered(tokenizer, render(tokenizer, conversation, add_generation_prompt=True), escapes).ids


def compute_max_prompt_tokens(context_length: int, max_length: int, max_new_tokens: int) -> int:
    """Return the maximum number of prompt tokens: `max_length`, or less if the model's context could not hold
    `max_new_tokens` more.

    Args:
        context_length: of the model, in tokens.

    Raises:
        InputError: the answer alone fills the context.
    """
    require(
        max_new_tokens < context_length,
        "rollout.max_new_tokens",
        max_new_tokens,
        f"leaves no room for a prompt: the model's context is {context_length} tokens",
        f"Set it well below {context_length}.",
    )
    return min(max_length, context_length - max_new_tokens)


class EncodedPrompts(NamedTuple):
    """Encoded prompts, and the number of prompts that were left out for their length."""

    prompts: list[Prompt]
    too_long: int


def encode_prompts(tokenizer: Any, conversations: Sequence[Conversation], max_tokens: int) -> EncodedPrompts:
    """Encode conversations as prompts with token ids. Conversations of more than `max_tokens` tokens are left out and
    counted.

    Raises:
        InputError: all prompts are longer.
    """
    prompts = []
    for conversation in conversations:
        if is_surely_too_long(tokenizer, conversation, max_tokens):
            continue
        ids = encode_prompt(tokenizer, conversation)
        if len(ids) <= max_tokens:
            prompts.append(Prompt(conversation, ids))
    dropped = len(conversations) - len(prompts)
    if not prompts:
        raise InputError(
            "data.max_length",
            max_tokens,
            f"every one of the {dropped} prompts is longer",
            "Raise data.max_length, lower rollout.max_new_tokens, or give shorter prompts.",
        )
    return EncodedPrompts(prompts, dropped)


def find_eos_token_ids(tokenizer: Any, generation_config: Any = None) -> tuple[int, ...]:
    """Return the sorted ids of all tokens that end a plain text: the tokenizer's EOS and the EOS tokens of the
    generation config.

    Raises:
        InputError: the generation config lists an id that is not in the vocabulary.
    """
    configured = getattr(generation_config, "eos_token_id", None)
    if configured is None:
        configured = []
    elif not isinstance(configured, list):
        configured = [configured]
    if unknown := [stop for stop in configured if type(stop) is not int or not 0 <= stop < len(tokenizer)]:
        raise InputError(
            "generation_config.json, eos_token_id", unknown[0], "is no token of this tokenizer", "Correct it."
        )
    stops = set(configured)
    if tokenizer.eos_token_id is not None:
        stops.add(tokenizer.eos_token_id)
    return tuple(sorted(stops))


def find_stop_token_ids(tokenizer: Any, generation_config: Any = None) -> tuple[int, ...]:
    """Return the sorted ids of all tokens that end an answer: all EOS tokens, and the token with which the chat
    template ends an assistant turn."""
    stops = {*find_eos_token_ids(tokenizer, generation_config)}
    if tokenizer.chat_template:
        probe = encode_conversation(tokenizer, Conversation((Message("user", "a"), Message("assistant", "b"))))
        last = next((label for label in reversed(probe.labels) if label != IGNORE_INDEX), None)
        if last in get_special_token_ids(tokenizer):
            stops.add(last)
    return tuple(sorted(stops))


def encode_for_reward_model(
    tokenizer: Any, prompt: Conversation, answer: str | Message, has_end_token: bool, stop_token_ids: Sequence[int]
) -> list[int]:
    """Return the token ids of a prompt and its answer for a reward model, up to the token that ends the answer's turn.

    No line break follows that token, since the score is read at the last token. A truncated answer ends without it.

    Args:
        prompt: conversation that ends before the answer.
        answer: its text, or the assistant message, which may call tools.
        has_end_token: False if sampling stopped at the length limit.
        stop_token_ids: the tokens that end a turn.
    """
    conversation = prompt.with_answer(answer)
    check_tools_rendered(tokenizer, conversation)
    conversation, escapes = escape_conversation(tokenizer, conversation)
    text, spans = render_with_assistant_spans(tokenizer, conversation)
    text = text[: spans[-1][1]]
    ids = tokenize_rendered(tokenizer, text, escapes).ids
    prompt_text = render(tokenizer, conversation.turns(len(prompt.messages)), add_generation_prompt=True)
    prompt_token_ids = tokenize_rendered(tokenizer, prompt_text, escapes).ids
    # The tokenizer may merge across the end of the prompt, which sampling cannot.
    if ids[: len(prompt_token_ids)] != prompt_token_ids and text.startswith(prompt_text):
        ids = [*prompt_token_ids, *tokenize_rendered(tokenizer, text[len(prompt_text) :], escapes).ids]
    while not has_end_token and ids and ids[-1] in stop_token_ids:
        ids.pop()
    return ids


def find_turn_end_token(tokenizer: Any) -> int | None:
    """Return the id of the special token that ends an answer, at which a reward model reads the score. Returns None if
    the chat template writes no special token after an answer."""
    ids = encode_for_reward_model(tokenizer, Conversation((Message("user", "a"),)), "b", True, ())
    return ids[-1] if ids[-1] in get_special_token_ids(tokenizer) else None


def count_prompt_tokens(tokenizer: Any, prompt: Conversation, ids: Sequence[int]) -> int:
    """Return the number of leading tokens of an encoded conversation that belong to the prompt before its last answer.

    Args:
        ids: the whole conversation, see `encode_for_reward_model`.
    """
    prompt_token_ids = encode_prompt(tokenizer, prompt)
    differing = (i for i, (a, b) in enumerate(zip(prompt_token_ids, ids, strict=False)) if a != b)
    return next(differing, min(len(prompt_token_ids), len(ids)))


def encode_text(tokenizer: Any, text: str, max_length: int) -> list[EncodedRow]:
    """Encode plain text in rows of at most `max_length` tokens, with EOS at the end and a loss on every token. BOS
    comes first if the tokenizer has it. A last row of one token is left out.

    Raises:
        InputError: the tokenizer has no EOS.
    """
    remedy = "Name eos_token in the model's tokenizer_config.json, or give conversations."
    require(tokenizer.eos_token_id is not None, "eos_token", None, "closes plain text, and this model has none", remedy)
    ids = [*tokenize_text(tokenizer, text), tokenizer.eos_token_id]
    if tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    pieces = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
    return [EncodedRow(piece, list(piece)) for piece in pieces if len(piece) > 1]


@dataclass(frozen=True, slots=True)
class EncodingResult:
    """Encoded documents, and the numbers of conversations that were left out or changed.

    Attributes:
        rows: the rows to train on.
        too_long: conversations dropped for their length. Truncated, they would teach the model not to stop.
        unanswered: conversations dropped because no token has a loss.
        cut: conversations that were truncated instead.
        unreasoned: conversations whose last answer has reasoning that the chat template left out.
        unreasoned_earlier: conversations with such an answer before the last one.
        places: index of the document that each row comes from.
    """

    rows: list[EncodedRow]
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
    def total_rows(self) -> int:
        """Number of encoded rows, plus the conversations that were left out."""
        return len(self.rows) + self.too_long + self.unanswered


def encode_documents(
    tokenizer: Any,
    documents: Sequence[Document],
    max_length: int,
    truncate: bool = False,
    mask_reasoning: bool = False,
    problem: str = "leaves nothing to train on",
) -> EncodingResult:
    """Encode conversations and plain texts as rows of token ids and labels for supervised training, and count the
    conversations left out.

    Args:
        truncate: truncate conversations longer than `max_length` instead of leaving them out.
        mask_reasoning: see `encode_conversation`.
        problem: the problem to report if every document was dropped.

    Raises:
        InputError: every document was dropped. The message counts the reasons.
    """
    rows: list[EncodedRow] = []
    places: list[int] = []
    too_long = 0
    unanswered = 0
    cut = 0
    unreasoned = 0
    unreasoned_earlier = 0
    for place, document in enumerate(documents):
        if isinstance(document, str):
            pieces = encode_text(tokenizer, document, max_length)
            rows += pieces
            places += [place] * len(pieces)
            continue
        if not truncate and is_surely_too_long(tokenizer, document, max_length):
            too_long += 1
            continue
        encoded = encode_conversation(tokenizer, document, mask_reasoning)
        is_longer = len(encoded.input_ids) > max_length
        if is_longer and truncate:
            encoded = EncodedRow(encoded.input_ids[:max_length], encoded.labels[:max_length])
        if is_longer and not truncate:
            too_long += 1
        elif encoded.trained == 0:
            unanswered += 1
        else:
            rows.append(encoded)
            places.append(place)
            cut += is_longer
            if any(measure_reasoning(turn.content) for turn in document.messages if turn.role == "assistant"):
                lost_last, lost_earlier = find_lost_reasoning(document, render(tokenizer, document))
                unreasoned += lost_last
                unreasoned_earlier += lost_earlier
    if documents and not rows:
        raise InputError(
            "data.max_length",
            max_length,
            f"{problem}: {too_long} conversations are longer and {unanswered} have no assistant turn",
            "Raise data.max_length, or give conversations with an assistant's answer.",
        )
    return EncodingResult(rows, too_long, unanswered, cut, unreasoned, unreasoned_earlier, places)


def count_document_tokens(tokenizer: Any, document: Document) -> int:
    """Return the number of tokens of a document in training. BOS, if the tokenizer has one, and EOS of a plain text are
    counted."""
    if isinstance(document, str):
        return len(tokenize_text(tokenizer, document)) + 1 + (tokenizer.bos_token_id is not None)
    return len(encode_conversation(tokenizer, document).input_ids)
