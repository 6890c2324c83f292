"""Rollouts by transformers' own `generate`: its cache, its inputs, whatever the architecture. Only the draw is ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from align.models.plain_path import base_model, without_settings


class Drawn(LogitsProcessor):
    """Leaves of the logits one token a row, which `draw` chose."""

    def __init__(self, draw: Callable[[Tensor, int], Tensor], prompt_width: int) -> None:
        self.draw, self.prompt_width = draw, prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn = self.draw(scores, input_ids.shape[1] - self.prompt_width)
        return torch.full_like(scores, float("-inf")).scatter(1, drawn[:, None], 0.0)


class Told(StoppingCriteria):
    """Tells each row's `ends` its tokens, up to the one that ends it.

    Attributes:
        at: row → the place of that token in the response.
    """

    def __init__(self, ends: Sequence[Callable[[int], bool]], stop_ids: Sequence[int], prompt_width: int) -> None:
        self.ends, self.stop_ids, self.prompt_width = ends, stop_ids, prompt_width
        self.at = dict[int, int]()

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Any:
        last = input_ids.shape[1] - 1 - self.prompt_width
        for row, id in enumerate(input_ids[:, -1].tolist()):
            if row not in self.at and (id in self.stop_ids or self.ends[row](id)):
                self.at[row] = last
        return torch.tensor([row in self.at for row in range(len(self.ends))], device=input_ids.device)


def continued(
    model: Any, tokens_BP: Tensor, mask_BP: Tensor, draw: Callable[[Tensor, int], Tensor], *,
    stop_ids: Sequence[int], pad_id: int, max_new_tokens: int, ends: Sequence[Callable[[int], bool]] = (),
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Continue prompts until they stop.

    Args:
        draw: logits [B, V] of the next token, and its place in the response → one token a row [B].
        ends: one a row, is told each of its tokens; True ends the row with it. None where only `stop_ids` do.

    Returns:
        the new tokens [B, T], which of them count [B, T] (the one that stops does), and which rows stopped [B].
    """
    base = base_model(model)
    plain = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(stop_ids) or None, pad_token_id=pad_id
    )
    told = Told(ends, stop_ids, tokens_BP.shape[1])
    with without_settings(base):
        whole = base.generate(
            tokens_BP, attention_mask=mask_BP.long(), generation_config=plain,
            logits_processor=LogitsProcessorList([Drawn(draw, tokens_BP.shape[1])]),
            stopping_criteria=StoppingCriteriaList([told] if ends else []),
        )  # fmt: skip
    response = whole[:, tokens_BP.shape[1] :]
    stops = torch.isin(response, torch.tensor(stop_ids, device=response.device, dtype=response.dtype))
    for row, at in told.at.items():
        stops[row, at] = True
    stopped_before = stops.cumsum(1) - stops.long()
    real = stopped_before == 0
    return response.masked_fill(~real, pad_id), real, (stops & real).any(1)


def of_one_length(order: Tensor, lengths: Tensor, size: int) -> list[Tensor]:
    """Rows in chunks of at most `size`, each of one length.

    Args:
        order: rows by length.
    """
    counts = lengths[order].unique_consecutive(return_counts=True)[1].tolist()
    return [chunk for same in order.split(counts) for chunk in same.split(size)]
