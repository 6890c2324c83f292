"""Encoding of contexts with continuations, whose log-likelihoods are computed.

Texts are tokenized by the rules of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness), so that a model gets
the same scores from both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align.core.errors import require
from align.core.types import Conversation
from align.data.chat.encode import IGNORE_INDEX, EncodedRow, render
from align.data.chat.tokens import tokenize_rendered, tokenize_text
from align.data.chat.tools import escape_conversation


def build_scored_row(context_ids: Sequence[int], scored_ids: Sequence[int]) -> EncodedRow:
    """Concatenate context tokens, labelled `IGNORE_INDEX`, and tokens to score, labelled with their own ids, into one
    row."""
    return EncodedRow([*context_ids, *scored_ids], [*[IGNORE_INDEX] * len(context_ids), *scored_ids])


def get_prefix_token_id(tokenizer: Any) -> int:
    """Return the id of the token that stands for an empty context: BOS, or EOS if the tokenizer has no BOS.

    Raises:
        InputError: the tokenizer has neither.
    """
    token_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    problem = "would have to start the text, but this model has neither BOS nor EOS"
    require(token_id is not None, "bos_token", None, problem, "Name one in the model's tokenizer_config.json.")
    return int(token_id)


def encode_with_special_tokens(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text with the tokenizer's special tokens added, unless the text already begins with the
    prefix token (BOS, else EOS).

    Special tokens that the text spells out become special tokens.
    """
    has_prefix = text.startswith(tokenizer.decode([get_prefix_token_id(tokenizer)]))
    return list(tokenizer.encode(text, add_special_tokens=False) if has_prefix else tokenizer.encode(text))


def encode_context(tokenizer: Any, context: str) -> list[int]:
    """Return the token ids of the context of a generated answer, or only the prefix token (BOS, else EOS) if it has no
    tokens."""
    return encode_with_special_tokens(tokenizer, context) or [get_prefix_token_id(tokenizer)]


def encode_continuation(tokenizer: Any, context: str, continuation: str) -> EncodedRow:
    """Encode a context and the continuation to score as one row, without truncation.

    White space at the end of the context is moved to the continuation. The tokens of the continuation are the
    tokens that both together have more than the context.

    Raises:
        InputError: the continuation has no token of its own.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if not stripped:  # the prefix token is the context, even if the continuation begins with it
        ids = list(tokenizer.encode(continuation, add_special_tokens=False))
        prefix = get_prefix_token_id(tokenizer)
        return build_continuation_row([prefix], ids[1:] if ids[:1] == [prefix] else ids, tokenizer.decode(ids))
    context_ids = encode_with_special_tokens(tokenizer, stripped)
    ids = encode_with_special_tokens(tokenizer, stripped + continuation)
    return build_continuation_row(context_ids, ids[len(context_ids) :], continuation)


def encode_answer(tokenizer: Any, prompt: Conversation, answer: str) -> EncodedRow:
    """Encode a chat prompt and the answer to score as one row, without the token that ends the turn.

    Raises:
        InputError: the chat template refuses the prompt, or the answer has no token of its own.
    """
    conversation, escapes = escape_conversation(tokenizer, prompt.with_answer(answer))
    context = render(tokenizer, conversation.turns(len(prompt.messages)), add_generation_prompt=True)
    context_ids = tokenize_rendered(tokenizer, context, escapes).ids
    ids = tokenize_rendered(tokenizer, context + conversation.messages[-1].content, escapes).ids
    return build_continuation_row(context_ids, ids[len(context_ids) :], answer)


def build_continuation_row(context_ids: Sequence[int], continuation_ids: Sequence[int], text: str) -> EncodedRow:
    """Build a row of context tokens and continuation tokens to score, or raise InputError if there are no continuation
    tokens.

    Args:
        text: the continuation, for the error.

    Raises:
        InputError: the continuation has no tokens.
    """
    problem = "has no tokens of its own after the text before it"
    require(
        bool(continuation_ids), "continuation", text, problem, "Split context and continuation at another position."
    )
    return build_scored_row(context_ids, continuation_ids)


def split_windows(tokenizer: Any, text: str, max_tokens: int) -> list[EncodedRow]:
    """Split a text into rows of at most `max_tokens` tokens, in which each token of the text is scored exactly once.

    The context of a window is the last token of the window before; that of the first one is the prefix token. Special
    tokens that the text spells out are tokenized as plain text.

    Args:
        max_tokens: at least 2.
    """
    ids = [get_prefix_token_id(tokenizer), *tokenize_text(tokenizer, text)]
    starts = range(1, len(ids), max_tokens - 1)
    return [build_scored_row([ids[start - 1]], ids[start : start + max_tokens - 1]) for start in starts]
