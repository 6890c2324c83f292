"""A context and what continues it as token ids, for log-likelihoods. Texts are split into tokens by lm-eval's rules, so
that a model gets the same figures here and there: https://github.com/EleutherAI/lm-evaluation-harness.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align.core.errors import require
from align.core.types import Conversation
from align.data.chat.encode import IGNORED, Encoded, render
from align.data.chat.tokens import text_ids, tokenised
from align.data.chat.tools import veiled


def behind(context: Sequence[int], ids: Sequence[int]) -> Encoded:
    """Tokens that are scored, behind tokens that are given."""
    return Encoded([*context, *ids], [*[IGNORED] * len(context), *ids])


def prefix_id(tokenizer: Any) -> int:
    """The token in front of a text that nothing precedes: BOS, or EOS of a tokenizer that has none.

    Raises:
        InputError: it has neither.
    """
    found = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    remedy = "Name one in the model's tokenizer_config.json."
    require(found is not None, "bos_token", None, "stands in front of a text, and this model has no EOS either", remedy)
    return int(found)


def encoded(tokenizer: Any, text: str) -> list[int]:
    """A text with the special tokens that the tokenizer puts around texts; without them where it begins with the prefix
    token already. A special token that the text spells out is one."""
    begun = text.startswith(tokenizer.decode([prefix_id(tokenizer)]))
    return list(tokenizer.encode(text, add_special_tokens=False) if begun else tokenizer.encode(text))


def following(tokenizer: Any, context: str) -> list[int]:
    """What an answer to a plain text stands behind: the text as it is, or the prefix token of one without tokens."""
    return encoded(tokenizer, context) or [prefix_id(tokenizer)]


def continued(tokenizer: Any, context: str, continuation: str) -> Encoded:
    """A text and its continuation. White space at the end of the context is the continuation's, and the continuation is
    what the tokens of both have more than those of the context. Nothing is cut.

    Raises:
        InputError: the continuation has no token of its own.
    """
    kept = context.rstrip()
    continuation, context = context[len(kept) :] + continuation, kept
    if not context:  # behind the prefix token, or behind the first token if it is that
        ids = list(tokenizer.encode(continuation, add_special_tokens=False))
        first = prefix_id(tokenizer)
        return scored([first], ids[1:] if ids[:1] == [first] else ids, tokenizer.decode(ids))
    given = encoded(tokenizer, context)
    return scored(given, encoded(tokenizer, context + continuation)[len(given) :], continuation)


def answered(tokenizer: Any, prompt: Conversation, answer: str) -> Encoded:
    """An answer behind the rendered chat and the header of the assistant's turn, without the token that ends the turn.

    Raises:
        InputError: the chat template refuses the prompt; the answer has no token of its own.
    """
    whole, veil = veiled(tokenizer, prompt.with_answer(answer))
    asked = render(tokenizer, whole.turns(len(prompt.messages)), answer_due=True)
    given = tokenised(tokenizer, asked, veil).ids
    both = tokenised(tokenizer, asked + whole.messages[-1].content, veil).ids
    return scored(given, both[len(given) :], answer)


def scored(context: Sequence[int], ids: Sequence[int], text: str) -> Encoded:
    """Raises: InputError: there is nothing to score."""
    problem, remedy = "has no token of its own behind what precedes it", "Divide the two elsewhere."
    require(bool(ids), "continuation", text, problem, remedy)
    return behind(context, ids)


def windows(tokenizer: Any, text: str, most: int) -> list[Encoded]:
    """A text in windows of at most `most` tokens. Every token of the text is scored once; a window's context is the
    last token of the window before, and the prefix token for the first one. Special tokens that the text spells out
    are text.

    Args:
        most: at least 2.
    """
    ids = [prefix_id(tokenizer), *text_ids(tokenizer, text)]
    starts = range(1, len(ids), most - 1)
    return [behind([ids[start - 1]], ids[start : start + most - 1]) for start in starts]
