"""Scorers that need no training: rules from the configuration, and VADER's sentiment."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import regex
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from align.core.types import Conversation, Rollout
from align.reward.checkers.checked import LIMIT_S

if TYPE_CHECKING:
    from torch import Tensor


log = logging.getLogger(__name__)


class Rules:
    """A scorer that returns the weighted sum of rules, each a function of the last assistant message.

    Args:
        rules: (weight, rule) pairs.
    """

    name = "rules"

    def __init__(self, rules: Sequence[tuple[float, Callable[[str], float]]]) -> None:
        self.rules = tuple(rules)

    def score(self, conversations: Sequence[Conversation], rollout: Rollout | None = None) -> Tensor:
        import torch

        answers = map(get_last_answer, conversations)
        return torch.tensor(
            [sum(weight * rule(answer) for weight, rule in self.rules) for answer in answers], dtype=torch.float32
        )


def build_rule(settings: Mapping[str, Any]) -> Callable[[str], float]:
    """Return the function from an answer's text to a score that the settings `{rule: NAME, …}` describe.

    The settings were checked with the configuration.
    """
    match settings["rule"]:
        case "length":
            return lambda text: score_word_count(text, settings["low"], settings["high"])
        case "regex":
            pattern = regex.compile(str(settings["pattern"]))
            return lambda text: float(has_match(pattern, text))
        case "tags":
            return lambda text: float(has_tags(text, settings["tags"]))
        case "json":
            return lambda text: float(is_json_object_or_array(text))
        case "sentiment":
            return load_sentiment_scorer()
    raise ValueError(settings["rule"])


def score_word_count(text: str, low: int, high: int) -> float:
    """Return 1 for an answer of `low` to `high` words, and less the farther it is from this range.

    The score is `words / low` below and `high / words` above. A step at the bounds would give no gradient back to the
    range.
    """
    words = len(text.split())
    if words < low:
        return words / low
    return high / words if words > high else 1.0


def has_match(pattern: regex.Pattern[str], text: str) -> bool:
    """Return whether a regular expression matches somewhere in a text within `LIMIT_S` seconds.

    A search that takes longer is logged and counts as no match.
    """
    try:
        return pattern.search(text, timeout=LIMIT_S) is not None
    except TimeoutError:
        log.warning(
            "reward.rules: /%s/ took more than %s s on an answer, which counts as no match", pattern.pattern, LIMIT_S
        )
        return False


def is_json_object_or_array(text: str) -> bool:
    """Return whether the whole answer is one JSON object or array."""
    try:
        return isinstance(json.loads(text), dict | list)
    except ValueError:
        return False


def has_tags(text: str, tags: Sequence[str]) -> bool:
    """Return whether a text is `<a>…</a>` for each tag in order, each once, with nothing but whitespace between."""
    body = r"\s*".join(rf"<{tag}>(?:(?!</?{tag}>).)*</{tag}>" for tag in tags)
    return regex.fullmatch(rf"\s*{body}\s*", text, regex.DOTALL) is not None


def load_sentiment_scorer() -> Callable[[str], float]:
    """Return a function from a text to VADER's compound sentiment score, from -1 (hostile) to 1 (warm), of 4 digits."""
    analyzer = SentimentIntensityAnalyzer()
    return lambda text: analyzer.polarity_scores(text)["compound"]


class Sentiment:
    """A scorer by the sentiment of the last assistant message: VADER's compound score, from -1 (hostile) to 1 (warm).

    Neutral is 0. VADER is a lexicon with a few rules on negation and emphasis (Hutto and Gilbert, 2014); the lexicon is
    part of the package. In the demonstration it stands in for a person's taste. It is easily hacked: a string of kind
    words outscores every honest answer.
    """

    name = "vader"

    def __init__(self) -> None:
        self._compound = load_sentiment_scorer()

    def score(self, conversations: Sequence[Conversation], rollout: Rollout | None = None) -> Tensor:
        """Return VADER's compound score of each conversation's last assistant message, [B] fp32 on the CPU.

        Raises:
            ValueError: a conversation has no assistant message.
        """
        import torch

        return torch.tensor(
            [self._compound(get_last_answer(conversation)) for conversation in conversations], dtype=torch.float32
        )


BY_NAME: dict[str, type[Sentiment]] = {Sentiment.name: Sentiment}
"""Name that a simulated annotator's votes record as their scorer → class of the scorer."""


def get_last_answer(conversation: Conversation) -> str:
    """Return the text of a conversation's last assistant message, or raise ValueError if it has none.

    Raises:
        ValueError: the conversation has none.
    """
    for message in reversed(conversation.messages):
        if message.role == "assistant":
            return message.content
    raise ValueError(f"conversation {conversation.id or '(no id)'} has no assistant message to score")
