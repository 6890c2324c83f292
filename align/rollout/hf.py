"""Rollouts with the training model itself: one key-value cache, and little work for rows that have finished. Where that
cache does not fit the architecture, transformers' own `generate`: its cache, its inputs; only the draw is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from align.core.errors import NonFiniteLogits
from align.core.types import Rollout
from align.models.actors import Actor
from align.models.fastpath.decoder import ReservedCache
from align.models.forward import base_model, decoder_of, lm_head, pad, route_of, without_generation_config
from align.ops.philox import draw_tokens, draw_uniforms, gather_probabilities
from align.rollout.engine import joined, rows_by_actor
from align.run import Base


class DrawnToken(LogitsProcessor):
    """Leaves of the logits one token a row, which `draw` chose."""

    def __init__(self, draw: Callable[[Tensor, int], Tensor], prompt_width: int) -> None:
        self.draw = draw
        self.prompt_width = prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn = self.draw(scores, input_ids.shape[1] - self.prompt_width)
        return torch.full_like(scores, float("-inf")).scatter(1, drawn[:, None], 0.0)


class RowEnds(StoppingCriteria):
    """Tells each row's `ends` its tokens, up to the one that ends it.

    Attributes:
        at: row → the place of that token in the response.
    """

    def __init__(self, ends: Sequence[Callable[[int], bool]], stop_ids: Sequence[int], prompt_width: int) -> None:
        self.ends = ends
        self.stop_ids = stop_ids
        self.prompt_width = prompt_width
        self.at = dict[int, int]()

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Any:
        last = input_ids.shape[1] - 1 - self.prompt_width
        for row, id in enumerate(input_ids[:, -1].tolist()):
            if row not in self.at and (id in self.stop_ids or self.ends[row](id)):
                self.at[row] = last
        return torch.tensor([row in self.at for row in range(len(self.ends))], device=input_ids.device)


def generate_by(
    model: Any,
    tokens_BP: Tensor,
    mask_BP: Tensor,
    draw: Callable[[Tensor, int], Tensor],
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    ends: Sequence[Callable[[int], bool]] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Continue prompts until they stop.

    Args:
        draw: logits [B, V] of the next token, and its place in the response → one token a row [B].
        ends: one a row, takes each of its tokens; True ends the row with it. None where only `stop_ids` do.

    Returns:
        the new tokens [B, T], which of them count [B, T] (the one that stops does), and which rows stopped [B].
    """
    base = base_model(model)
    plain = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(stop_ids) or None, pad_token_id=pad_id
    )
    told = RowEnds(ends, stop_ids, tokens_BP.shape[1])
    with without_generation_config(base):
        sequences = base.generate(
            tokens_BP,
            attention_mask=mask_BP.long(),
            generation_config=plain,
            logits_processor=LogitsProcessorList([DrawnToken(draw, tokens_BP.shape[1])]),
            stopping_criteria=StoppingCriteriaList([told] if ends else []),
        )
    response = sequences[:, tokens_BP.shape[1] :]
    stops = torch.isin(response, torch.tensor(stop_ids, device=response.device, dtype=response.dtype))
    for row, at in told.at.items():
        stops[row, at] = True
    stopped_before = stops.cumsum(1) - stops.long()
    real = stopped_before == 0
    return response.masked_fill(~real, pad_id), real, (stops & real).any(1)


def split_by_length(order: Tensor, lengths: Tensor, size: int) -> list[Tensor]:
    """Rows in chunks of at most `size`, each of one length.

    Args:
        order: rows by length.
    """
    counts = lengths[order].unique_consecutive(return_counts=True)[1].tolist()
    return [chunk for same in order.split(counts) for chunk in same.split(size)]


NO_NUMBERS = "its logits are nan or infinite"
Ends = Callable[[int], bool]
"""Is told each token of one response; True ends the response with it."""
DROP_BELOW = 0.8
"""Finished rows are dropped once no more than this share of a batch goes on: dropping copies the cache."""


@dataclass
class HfEngine:
    """Samples from the actor's own model, in this process, as it stands. Rows of one actor are decoded together.

    Attributes:
        stop_ids: tokens that end a response; kept as its last token.
        pad_id: fills the rectangle; never looked at, masks are kept.
        max_new_tokens: T at the most.
        temperature: divides the logits; 0 takes the likeliest token.
        batch_size: rows decoded at once; prompts are sorted by length first, so little padding is computed.
    """

    stop_ids: tuple[int, ...]
    pad_id: int
    max_new_tokens: int
    temperature: float = 1.0
    batch_size: int = 128

    def load(self, base: Base, method: str, dtype: torch.dtype) -> None:
        """Do nothing: the actor brings its model."""

    def sync(self, actor: Actor) -> None:
        """Do nothing: the actor's own weights are sampled from."""

    def close(self) -> None:
        """Do nothing: `load` took nothing."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        actor: Actor | Sequence[Actor],
        seeds: Sequence[int],
        ends: Sequence[Ends] = (),
    ) -> Rollout:
        """See `align.rollout.engine.Engine`.

        Args:
            ends: one a prompt; none where only `stop_ids` end a response.
        """
        lengths = torch.tensor([len(p) for p in prompts])
        drawn_BT = draw_uniforms(torch.tensor(seeds), self.max_new_tokens)
        parts = []
        orders = []
        for each, rows in rows_by_actor(actor, len(prompts)).items():
            actor_rows = torch.tensor(rows)
            order = actor_rows[torch.argsort(lengths[actor_rows], stable=True)]
            orders.append(order)
            with each.use() as model, evaluating(model):
                padded = route_of(model).padding
                chunks = order.split(self.batch_size) if padded else split_by_length(order, lengths, self.batch_size)
                for chosen in chunks:
                    told = [ends[int(i)] for i in chosen] if ends else []
                    parts.append(self._batch(model, [prompts[int(i)] for i in chosen], drawn_BT[chosen], told))
        return joined(parts, torch.cat(orders), self.pad_id)

    @torch.no_grad()
    def _batch(self, model: Any, prompts: Sequence[Sequence[int]], uniform_BT: Tensor, ends: Sequence[Ends]) -> Rollout:
        device = next(model.parameters()).device
        uniform_BT = uniform_BT.to(device)
        tokens = pad(prompts, self.pad_id, left=True).to(device)
        mask = pad([[1] * len(p) for p in prompts], 0, left=True).bool().to(device)
        rows, width = tokens.shape
        if not route_of(model).fast:
            return self._continued(model, tokens, mask, uniform_BT, ends)
        stops = torch.tensor(self.stop_ids, device=device)
        response = torch.full((rows, self.max_new_tokens), self.pad_id, device=device)
        real = torch.zeros(rows, self.max_new_tokens, dtype=torch.bool, device=device)
        chance_BT = torch.ones(rows, self.max_new_tokens, device=device)  # its logarithm is 0 where nothing is drawn
        ended = torch.zeros(rows, dtype=torch.bool, device=device)

        broken = torch.zeros((), dtype=torch.bool, device=device)
        held = torch.arange(rows, device=device)
        live = torch.ones(rows, dtype=torch.bool, device=device)
        cache = ReservedCache(width + self.max_new_tokens)
        positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
        hidden = next_states(model, tokens, mask, positions, cache)
        last = positions[:, -1]
        mask_held = mask
        for t in range(self.max_new_tokens):
            drawn, chances = self._drawn(lm_head(model)(hidden), uniform_BT[held, t])
            broken |= (chances[:, 0].isnan() & live).any()  # of one nan or infinity softmax makes a row of nan
            response[held, t], real[held, t] = drawn.where(live, self.pad_id), live
            chance_BT[held, t] = gather_probabilities(drawn, chances).where(live, 1.0)
            stopped = live & torch.isin(drawn, stops)
            if ends:
                stopped |= find_ended(ends, held, drawn, live)
            ended[held] |= stopped
            live = live & ~stopped
            going = int(live.sum())  # the one thing that the host waits for at each token
            if t + 1 == self.max_new_tokens or not going:
                break
            mask_held = torch.cat([mask_held, torch.ones_like(mask_held[:, :1])], dim=1)
            last = last + 1
            if going <= DROP_BELOW * len(held):
                keep = live.nonzero().squeeze(-1)
                held = held[keep]
                drawn = drawn[keep]
                last = last[keep]
                mask_held = mask_held[keep]
                live = live[keep]
                cache.batch_select_indices(keep)
            hidden = next_states(model, drawn[:, None], mask_held, last[:, None], cache)
        if bool(broken):  # asked once, for at each token the host would wait for the device
            raise NonFiniteLogits(NO_NUMBERS)
        used = int(real.any(0).sum())
        tokens = torch.cat([tokens, response[:, :used]], dim=1)
        mask = torch.cat([mask, real[:, :used]], dim=1)
        return Rollout(tokens, mask, width, ended, chance_BT[:, :used].log())

    def _continued(self, model: Any, tokens: Tensor, mask: Tensor, uniform_BT: Tensor, ends: Sequence[Ends]) -> Rollout:
        """Sample a batch through transformers' own `generate`."""
        broken_BT = torch.zeros_like(uniform_BT, dtype=torch.bool)
        chance_BT = torch.ones_like(uniform_BT, dtype=torch.float32)

        def chosen(logits_BV: Tensor, t: int) -> Tensor:
            drawn, chances = self._drawn(logits_BV, uniform_BT[:, t])
            broken_BT[:, t] = chances[:, 0].isnan()
            chance_BT[:, t] = gather_probabilities(drawn, chances)
            return drawn

        response, real, ended = generate_by(
            model,
            tokens,
            mask,
            chosen,
            stop_ids=self.stop_ids,
            pad_id=self.pad_id,
            max_new_tokens=self.max_new_tokens,
            ends=ends,
        )
        if bool((broken_BT[:, : real.shape[1]] & real).any()):
            raise NonFiniteLogits(NO_NUMBERS)
        logprobs = chance_BT[:, : real.shape[1]].log().masked_fill(~real, 0.0)
        return Rollout(torch.cat([tokens, response], 1), torch.cat([mask, real], 1), tokens.shape[1], ended, logprobs)

    def _drawn(self, logits_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
        """A token a row [B], and softmax(logits / temperature) [B, V]; at temperature 0 the softmax of the logits
        as they are."""
        if self.temperature not in (0.0, 1.0):
            logits_BV = logits_BV.float() / self.temperature
        chances_BV = logits_BV.softmax(-1, dtype=torch.float32)
        if self.temperature == 0:  # of the logits, for two chances may round to one number
            return logits_BV.argmax(-1), chances_BV
        return draw_tokens(chances_BV, uniform_B), chances_BV


def find_ended(ends: Sequence[Ends], rows: Tensor, drawn_B: Tensor, live_B: Tensor) -> Tensor:
    """Return which responses end with their new token [B]. Rows that ended before are not asked.

    Args:
        rows: whose tokens they are, as places in `ends` [B].
    """
    drawn_tokens = zip(rows.tolist(), drawn_B.tolist(), live_B.tolist(), strict=True)
    return torch.tensor([live and ends[row](id) for row, id, live in drawn_tokens], device=drawn_B.device)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Keep a model in evaluation mode. One that is in it already is left alone: entering every module takes as long as
    a token."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


def next_states(model: Any, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
    """Hidden states of the last column [B, D]; the cache grows."""
    out = decoder_of(model)(
        input_ids=tokens, attention_mask=mask.long(), position_ids=positions, cache=cache, use_cache=True
    )
    return out.last_hidden_state[:, -1]
