"""Priorities of items for annotators: the items that the reward model is least sure of come first."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from align.annotate.store import Store
from align.data.chat.encode import encode_for_reward_model
from align.reward.learned import score_rows


def tokenize_answers(
    store: Store, project: str, tokenizer: Any, stops: tuple[int, ...], max_length: int
) -> dict[str, list[list[int]]]:
    """Return the token ids of each item's prompt with each of its answers: item id → one list per answer.

    Items with an answer whose list is longer than `max_length` tokens are left out.

    Args:
        stops: the tokens that end a turn.
    """
    rows: dict[str, list[list[int]]] = {}
    for item in store.items(project):
        answers = [
            encode_for_reward_model(tokenizer, item.prompt, candidate.text, candidate.ended, stops)
            for candidate in item.candidates
        ]
        if max(map(len, answers)) <= max_length:
            rows[item.id] = answers
    return rows


def compute_uncertainties(
    model: Any, score_head: nn.Module, rows: Mapping[str, list[list[int]]], pad_id: int
) -> dict[str, float]:
    """Compute a reward model's uncertainty about the ranking of each item's answers: item id → 0 to 1.

    It is the item's priority in a project whose `order` is `priority`.

    Args:
        rows: token ids by item, see `tokenize_answers`.
    """
    scores = score_rows(model, score_head, [row for answers in rows.values() for row in answers], pad_id)
    scores_by_item = torch.split(scores, [len(answers) for answers in rows.values()])
    return {item: compute_uncertainty(item_scores) for item, item_scores in zip(rows, scores_by_item, strict=True)}


def compute_uncertainty(scores_K: Tensor) -> float:
    """Compute a reward model's uncertainty about the ranking of K answers from their scores, from 0 to 1.

    It is 4·p·(1 − p), where p is the probability (Bradley and Terry) that one answer of a pair is preferred, averaged
    over the pairs. At 1 the model is undecided.

    Source: uncertainty sampling, Lewis and Gale 1994, "A sequential algorithm for training text classifiers".
    """
    probabilities = torch.tensor([torch.sigmoid(a - b) for a, b in combinations(scores_K.double(), 2)])
    return float((4 * probabilities * (1 - probabilities)).mean())
