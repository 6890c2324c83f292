"""Log-likelihoods of continuations under a model, without logits of the whole batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad as widened

from align.data.chat.encode import IGNORED, Encoded
from align.models import plain_path
from align.models.backbone import hidden_states, lm_head, pad
from align.models.fastpath.llama import attention_by_width
from align.models.plain_path import route_of
from align.ops.logprobs import rows_for

LEAST = 32
"""Tokens of a pass's width, and of a product with the head, at least. Libraries compute others in another order of
addition, and a row's last bits would depend on the rows beside it."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely the scored tokens of a row are.

    Attributes:
        logprob: log p of all of them, each given the tokens before it, in nats: their sum in float64.
        greedy: whether each is the likeliest in its place.
    """

    logprob: float
    greedy: bool

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Likelihood:
        """The inverse of `asdict`. Raises: KeyError, TypeError, ValueError: it is none."""
        return cls(float(record["logprob"]), bool(record["greedy"]))


def likelihoods(model: Any, rows: Sequence[Encoded], pad_id: int, context: int) -> list[Likelihood]:
    """The likelihood of each row, under whatever adapter is active. The width of the pass that a row is in follows from
    its own length, so that in fp32 no bit of it depends on the other rows.

    Args:
        rows: each with a token that is scored, and at most as long as the model's context.
        pad_id: fills the rectangle.
        context: the most tokens of a row.
    """
    widths = [width_of(len(row.input_ids), context) for row in rows]
    found: dict[int, Likelihood] = {}
    for width in {*widths}:
        places = [i for i, one in enumerate(widths) if one == width]
        found |= zip(places, of_width(model, [rows[i] for i in places], pad_id, width), strict=True)
    return [found[i] for i in range(len(rows))]


def width_of(tokens: int, context: int) -> int:
    """The width of the pass for a row of so many tokens: `LEAST`, doubled as often as it takes."""
    width = LEAST
    while width < tokens:
        width *= 2
    return max(tokens, min(width, context))


@torch.no_grad()
def of_width(model: Any, rows: Sequence[Encoded], pad_id: int, width: int) -> list[Likelihood]:
    """The likelihoods of rows in one pass of this width, which a row of padding gives it."""
    device = next(model.parameters()).device
    ids, labels = [row.input_ids for row in rows], [row.labels for row in rows]
    if max(map(len, ids)) < width:
        ids, labels = [*ids, [pad_id] * width], [*labels, [IGNORED] * width]
    tokens, mask = pad(ids, pad_id).to(device), pad([[1] * len(row) for row in ids], 0).bool().to(device)
    picked = (pad(labels, IGNORED) != IGNORED).to(device)
    picked[:, 0] = False  # nothing stands before a first token
    logprobs, greedy = picked_likelihoods(model, tokens, mask, picked)
    counts = [row.trained for row in rows]
    parts = zip(logprobs.double().split(counts), greedy.split(counts), strict=True)
    return [Likelihood(of_row.sum().item(), bool(likeliest.all())) for of_row, likeliest in parts]


def picked_likelihoods(model: Any, tokens_BS: Tensor, mask_BS: Tensor, picked_BS: Tensor) -> tuple[Tensor, Tensor]:
    """log p of each picked token given the real tokens before it in its row, and whether it is the likeliest there: two
    [N], row by row.

    Args:
        picked_BS: real tokens, none of them a row's first.
    """
    targets_N = tokens_BS[picked_BS]
    if route_of(model).fast:
        with attention_by_width():
            states = hidden_states(model, tokens_BS, mask_BS)[:, :-1][picked_BS[:, 1:]]
        head = lm_head(model)
    else:
        _, logits_NV, places_N = plain_path.states_and_logits(model, tokens_BS, mask_BS, picked_BS)
        states, head = logits_NV[places_N.argsort()], torch.nn.Identity()
    chunk = rows_for(head(states[:1]).shape[-1], states.device)
    found = list[tuple[Tensor, Tensor]]()
    for part, targets in zip(states.split(chunk), targets_N.split(chunk), strict=True):
        logits = head(widened(part, (0, 0, 0, max(0, LEAST - len(part)))))[: len(part)].float()
        logprobs = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
        found.append((logprobs, logits.argmax(-1) == targets))
    logprobs, greedy = zip(*found, strict=True)
    return torch.cat(logprobs), torch.cat(greedy)
