"""Scorers that need no training: rules written down by somebody."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from align.types import Conversation


class Sentiment:
    """How friendly the last assistant message is: VADER's compound score, from -1 (hostile) to 1 (warm), 0 neutral.

    A lexicon and a few rules on negation and emphasis (Hutto and Gilbert, 2014). The lexicon lies inside the package:
    nothing is fetched. It stands in for a person's taste in the demonstration, and shows as well how a reward is
    hacked: a string of kind words outscores every honest answer.
    """

    name = "vader"

    def __init__(self) -> None:
        self._analyzer = SentimentIntensityAnalyzer()

    def score(self, conversations: Sequence[Conversation]) -> Tensor:
        """Compound scores, rounded to 4 digits by VADER: shape [B], fp32, on the CPU.

        Raises:
            ValueError: a conversation has no assistant message.
        """
        compound = [self._analyzer.polarity_scores(last_answer(c))["compound"] for c in conversations]
        return torch.tensor(compound, dtype=torch.float32)


def last_answer(conversation: Conversation) -> str:
    """The text of the last assistant message.

    Raises:
        ValueError: there is none.
    """
    for message in reversed(conversation.messages):
        if message.role == "assistant":
            return message.content
    raise ValueError(f"conversation {conversation.id or '(no id)'} has no assistant message to score")
