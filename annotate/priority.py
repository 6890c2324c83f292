"""What annotators are asked next: the items of which the reward model itself is least sure."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from align.annotate.store import Store
from align.data.chat.encode import encode_judged
from align.reward.learned import score_rows


def answers_of(
    store: Store, project: str, tokenizer: Any, stops: tuple[int, ...], max_length: int
) -> dict[str, list[list[int]]]:
    """The answers of each item of a project as token rows, but of items with one of more than `max_length` tokens."""
    rows: dict[str, list[list[int]]] = {}
    for item in store.items(project):
        answers = [encode_judged(tokenizer, item.prompt, c.text, c.ended, stops) for c in item.candidates]
        if max(map(len, answers)) <= max_length:
            rows[item.id] = answers
    return rows


def uncertainties(
    model: Any, score_head: nn.Module, rows: Mapping[str, list[list[int]]], pad_id: int
) -> dict[str, float]:
    """The `uncertainty` of each item: its priority, which orders a project whose `order` is `priority`.

    Args:
        rows: see `answers_of`.
    """
    scores = score_rows(model, score_head, [row for part in rows.values() for row in part], pad_id)
    by_item = torch.split(scores, [len(part) for part in rows.values()])
    return {item: uncertainty(part) for item, part in zip(rows, by_item, strict=True)}


def uncertainty(scores_K: Tensor) -> float:
    """How unsure a reward model is of an item's K answers, from 0 to 1: 4·p·(1 − p), p being the probability (Bradley
    and Terry) that one answer of a pair is preferred, averaged over the pairs. 1: a toss of a coin.

    Source: uncertainty sampling, Lewis and Gale 1994, "A sequential algorithm for training text classifiers".
    """
    p = torch.tensor([torch.sigmoid(a - b) for a, b in combinations(scores_K.double(), 2)])
    return float((4 * p * (1 - p)).mean())
