"""One token a row, each row by its own settings and its own random number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from align.ops.philox import draw_tokens, uniforms_of
from align.rollout.requests import SamplingParams, Token

if TYPE_CHECKING:
    import numpy as np

NAN = float("nan")


def drawn_numbers(sampling: SamplingParams) -> list[float]:
    """The uniform number of each position of an answer; none where nothing is drawn."""
    if sampling.temperature == 0:
        return []
    return uniforms_of(sampling.seed, sampling.max_tokens)


def next_tokens(
    logits_BV: Tensor,
    settings: Sequence[SamplingParams],
    numbers: Sequence[float],
    allowed: Sequence[np.ndarray | None],
) -> list[Token | None]:
    """The next token of each row; None where its logits are nan or infinite.

    Rows do not see each other: each step below is taken along a row, or by a row alone.

    Args:
        logits_BV: fp32.
        numbers: in [0, 1), one a row; of a row at temperature 0 it is not looked at.
        allowed: which tokens may come, a row [V]; None for all.
    """
    finite = logits_BV.isfinite().all(-1).tolist()
    masked = logits_BV
    if any(each is not None for each in allowed):
        masked = logits_BV.clone()
        for row, each in enumerate(allowed):
            if each is not None:
                masked[row, ~torch.from_numpy(each)] = float("-inf")
    ids = masked.argmax(-1)
    rows = [row for row, each in enumerate(settings) if each.temperature > 0 and finite[row]]
    if rows:
        at = torch.tensor(rows)
        scale = torch.tensor([settings[row].temperature for row in rows])[:, None]
        chances_BV = ((masked if len(rows) == len(masked) else masked[at]) / scale).softmax(-1)
        for place, row in enumerate(rows):
            if settings[row].top_p < 1:
                chances_BV[place] = nucleus(chances_BV[place], settings[row].top_p)
        ids[at] = draw_tokens(chances_BV, torch.tensor([numbers[row] for row in rows], dtype=torch.double))
    tokens: list[Token | None] = []
    for row, (id, each) in enumerate(zip(ids.tolist(), settings, strict=True)):
        if not finite[row]:
            tokens.append(None)
        elif each.logprobs is None:
            tokens.append(Token(id, NAN))
        else:
            logits_V = masked[row] / (each.temperature or 1.0) if each.processed_logprobs else logits_BV[row]
            tokens.append(with_logprobs(id, logits_V.log_softmax(-1), each.logprobs))
    return tokens


def nucleus(chances_V: Tensor, top_p: float) -> Tensor:
    """Nought but for the likeliest tokens whose chances add up to `top_p`: the smallest such set, ties by their
    place in the vocabulary (Holtzman et al., 2020)."""
    best, order = chances_V.sort(descending=True, stable=True)
    before = best.double().cumsum(0) - best
    return chances_V.index_fill(0, order[before >= top_p], 0.0)


def with_logprobs(id: int, logprobs_V: Tensor, number: int) -> Token:
    """Return a token with its logprob and the likeliest so many at its place."""
    best, where = logprobs_V.topk(number) if number else (logprobs_V[:0], logprobs_V[:0])
    top = tuple(zip((int(i) for i in where.tolist()), best.tolist(), strict=True))
    return Token(id, float(logprobs_V[id]), top)


def prompt_tokens(logits_NV: Tensor, ids_N: Sequence[int], number: int) -> list[Token]:
    """The prompt's tokens under what was predicted at the place before each.

    Args:
        logits_NV: at those places.
        number: of alternatives.
    """
    logprobs = logits_NV.log_softmax(-1)
    return [with_logprobs(id, row, number) for id, row in zip(ids_N, logprobs, strict=True)]
