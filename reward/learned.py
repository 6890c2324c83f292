"""The learned reward as a scorer of text, and the rows that it is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from align.data.chat import encode_judged
from align.models.roles import last_real
from align.models.trunk import hidden_states, pad
from align.types import Conversation


class LearnedReward:
    """A base with a reward adapter and its `score` head, read exactly where training read it.

    Args:
        model: a model whose active adapter is the reward's.
        score_head: hidden → score.
        stops: the tokens that end a turn.
    """

    name = "learned"

    def __init__(
        self, model: Any, score_head: nn.Module, tokenizer: Any, stops: Sequence[int], batch_size: int = 32
    ) -> None:
        self.model, self.score_head, self.tokenizer = model, score_head, tokenizer
        self.stops, self.batch_size = tuple(stops), batch_size

    def score(self, conversations: Sequence[Conversation]) -> Tensor:
        """Scores [B] of conversations that end with an assistant turn which was not cut.

        Raises:
            ValueError: a conversation does not end with an assistant turn.
        """
        rows = []
        for conversation in conversations:
            *before, last = conversation.messages
            if last.role != "assistant" or not before:
                raise ValueError(f"conversation {conversation.id or '(no id)'} does not end with an answer")
            prompt = Conversation(tuple(before), conversation.id)
            rows.append(encode_judged(self.tokenizer, prompt, last.content, True, self.stops))
        return score_rows(self.model, self.score_head, rows, self.tokenizer.pad_token_id, self.batch_size)


@torch.no_grad()
def score_rows(
    model: Any, score_head: nn.Module, rows: Sequence[Sequence[int]], pad_id: int, batch_size: int = 32
) -> Tensor:
    """Scores [N] of token rows, fp32 on the CPU, in the order given; batched by length."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    device = next(model.parameters()).device
    scores = torch.empty(len(rows))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        tokens = pad([rows[i] for i in chosen], pad_id).to(device)
        mask = pad([[1] * len(rows[i]) for i in chosen], 0).bool().to(device)
        last = last_real(hidden_states(model, tokens, mask), mask)
        scores[torch.tensor(chosen)] = score_head(last.float()).squeeze(-1).float().cpu()
    return scores
