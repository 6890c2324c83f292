"""VADER as a scorer: the paper's formula by hand, and the message that is scored."""

import math

import pytest
import torch

from align.core.types import Conversation, Message
from align.reward.rules import Sentiment


def conversation(*contents: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(tuple(Message(roles[i % 2], text) for i, text in enumerate(contents)))


def test_compound_is_valence_over_root_of_its_square_plus_15():
    # The lexicon gives "good" 1.9 and "terrible" -2.1; compound = v / sqrt(v² + 15), rounded to 4 digits.
    scores_B = Sentiment().score([conversation("?", "good"), conversation("?", "terrible"), conversation("?", "table")])
    expected = [round(v / math.sqrt(v * v + 15), 4) for v in (1.9, -2.1)]
    assert scores_B.tolist() == pytest.approx([*expected, 0.0], abs=1e-7)
    assert scores_B.dtype == torch.float32
    assert scores_B.device.type == "cpu"


def test_only_the_last_assistant_message_counts():
    plain = conversation("hello", "good")
    surrounded = conversation("terrible", "horrible", "awful", "good", "terrible")
    scores_B = Sentiment().score([plain, surrounded])
    assert scores_B[0] == scores_B[1] > 0


def test_an_empty_answer_is_neutral_and_no_conversations_score_nothing():
    assert Sentiment().score([conversation("hello", "")]).tolist() == [0.0]
    assert Sentiment().score([]).shape == (0,)


def test_a_conversation_without_an_answer_is_refused():
    with pytest.raises(ValueError, match="no assistant message"):
        Sentiment().score([conversation("hello")])
