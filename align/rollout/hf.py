"""The rollout engine `hf`, which samples from the training model itself in this process.

One key-value cache is reserved, from which finished rows are dropped. Architectures that this cache does not fit use
transformers' own `generate` with its cache and inputs; only the sampling is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

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
from align.models.forward import get_decoder, get_lm_head, get_route, ignore_generation_config, pad_rows, unwrap_model
from align.ops.philox import draw_tokens, draw_uniforms, gather_probabilities
from align.rollout.engine import concatenate_rollouts, group_rows_by_actor
from align.run import Base


class DrawnToken(LogitsProcessor):
    """A logits processor for transformers that sets all logits to -inf except the token chosen by `draw`."""

    def __init__(self, draw: Callable[[Tensor, int], Tensor], prompt_width: int) -> None:
        self.draw = draw
        self.prompt_width = prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token_ids = self.draw(scores, input_ids.shape[1] - self.prompt_width)
        return torch.full_like(scores, float("-inf")).scatter(1, token_ids[:, None], 0.0)


class RowEnds(StoppingCriteria):
    """A stopping criterion for transformers that ends a row at a stop token, or if its function in `ends` returns True.

    Attributes:
        at: row → position of its last token in the response.
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


class GeneratedResponses(NamedTuple):
    """A batch of sampled responses, padded on the right.

    Attributes:
        tokens_BT: sampled token ids, the pad id after the end of a row.
        mask_BT: True up to the token that ends the row.
        ended_B: True if the row ended before the length limit.
    """

    tokens_BT: Tensor
    mask_BT: Tensor
    ended_B: Tensor


def generate_with_transformers(
    model: Any,
    tokens_BP: Tensor,
    mask_BP: Tensor,
    choose_tokens: Callable[[Tensor, int], Tensor],
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    ends: Sequence[Callable[[int], bool]] = (),
) -> GeneratedResponses:
    """Generate responses with transformers' `generate`, with `choose_tokens` in place of its sampling.

    Args:
        choose_tokens: (logits [B, V] of the next token, its position in the response) → token ids [B].
        ends: for each row a function that is called with each of its tokens, and returns True to end the row with it;
            empty if only `stop_ids` end rows.
    """
    base = unwrap_model(model)
    plain = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(stop_ids) or None, pad_token_id=pad_id
    )
    row_ends = RowEnds(ends, stop_ids, tokens_BP.shape[1])
    with ignore_generation_config(base):
        sequences = base.generate(
            tokens_BP,
            attention_mask=mask_BP.long(),
            generation_config=plain,
            logits_processor=LogitsProcessorList([DrawnToken(choose_tokens, tokens_BP.shape[1])]),
            stopping_criteria=StoppingCriteriaList([row_ends] if ends else []),
        )
    response = sequences[:, tokens_BP.shape[1] :]
    stops = torch.isin(response, torch.tensor(stop_ids, device=response.device, dtype=response.dtype))
    for row, at in row_ends.at.items():
        stops[row, at] = True
    stopped_before = stops.cumsum(1) - stops.long()
    real = stopped_before == 0
    return GeneratedResponses(response.masked_fill(~real, pad_id), real, (stops & real).any(1))


def split_by_length(order: Tensor, lengths: Tensor, size: int) -> list[Tensor]:
    """Split sorted rows into chunks of at most `size` rows, each with prompts of one length.

    Args:
        order: rows sorted by length.
        lengths: length of each row.
    """
    counts = lengths[order].unique_consecutive(return_counts=True)[1].tolist()
    return [chunk for equal_rows in order.split(counts) for chunk in equal_rows.split(size)]


NO_NUMBERS = "its logits are nan or infinite"
Ends = Callable[[int], bool]
"""Function that is called with each token of a response, and returns True to end the response with it."""
DROP_BELOW = 0.8
"""Share of unfinished rows at or below which finished ones are dropped from the batch: dropping copies the cache."""


@dataclass
class HfEngine:
    """The rollout engine `hf`, which samples from the actor's own model in this process.

    Rows of one actor are decoded together.

    Attributes:
        stop_ids: tokens that end a response, which includes them.
        pad_id: token id for padding, which is masked.
        max_new_tokens: maximum T.
        temperature: divisor of the logits; 0 is greedy decoding.
        batch_size: rows decoded at once; prompts are sorted by length, so that there is little padding.
    """

    stop_ids: tuple[int, ...]
    pad_id: int
    max_new_tokens: int
    temperature: float = 1.0
    batch_size: int = 128

    def load(self, base: Base, method: str, dtype: torch.dtype) -> None:
        """Do nothing: the actor's own model is used."""

    def sync(self, actor: Actor) -> None:
        """Do nothing: the actor's own weights are used."""

    def close(self) -> None:
        """Do nothing: `load` has loaded nothing."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        actor: Actor | Sequence[Actor],
        seeds: Sequence[int],
        ends: Sequence[Ends] = (),
    ) -> Rollout:
        """Sample one response for each prompt from the actors' own models.

        Args:
            ends: one function for each prompt; empty if only `stop_ids` end a response.
        """
        lengths = torch.tensor([len(p) for p in prompts])
        uniform_BT = draw_uniforms(torch.tensor(seeds), self.max_new_tokens)
        parts = []
        orders = []
        for each, rows in group_rows_by_actor(actor, len(prompts)).items():
            actor_rows = torch.tensor(rows)
            order = actor_rows[torch.argsort(lengths[actor_rows], stable=True)]
            orders.append(order)
            with each.use() as model, use_evaluation_mode(model):
                may_pad = get_route(model).can_pad
                chunks = order.split(self.batch_size) if may_pad else split_by_length(order, lengths, self.batch_size)
                for chunk in chunks:
                    chunk_prompts = [prompts[int(i)] for i in chunk]
                    chunk_ends = [ends[int(i)] for i in chunk] if ends else []
                    parts.append(self._generate_batch(model, chunk_prompts, uniform_BT[chunk], chunk_ends))
        return concatenate_rollouts(parts, torch.cat(orders), self.pad_id)

    @torch.no_grad()
    def _generate_batch(
        self, model: Any, prompts: Sequence[Sequence[int]], uniform_BT: Tensor, ends: Sequence[Ends]
    ) -> Rollout:
        device = next(model.parameters()).device
        uniform_BT = uniform_BT.to(device)
        tokens = pad_rows(prompts, self.pad_id, pad_left=True).to(device)
        mask = pad_rows([[1] * len(p) for p in prompts], 0, pad_left=True).bool().to(device)
        rows, width = tokens.shape
        if not get_route(model).has_fast_path:
            return self._generate_plain(model, tokens, mask, uniform_BT, ends)
        stops = torch.tensor(self.stop_ids, device=device)
        response = torch.full((rows, self.max_new_tokens), self.pad_id, device=device)
        real = torch.zeros(rows, self.max_new_tokens, dtype=torch.bool, device=device)
        chance_BT = torch.ones(rows, self.max_new_tokens, device=device)  # log(1) = 0 where no token is sampled
        ended_B = torch.zeros(rows, dtype=torch.bool, device=device)

        broken = torch.zeros((), dtype=torch.bool, device=device)
        rows_left = torch.arange(rows, device=device)
        live = torch.ones(rows, dtype=torch.bool, device=device)
        cache = ReservedCache(width + self.max_new_tokens)
        positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
        hidden = compute_next_states(model, tokens, mask, positions, cache)
        last = positions[:, -1]
        mask_left = mask
        for t in range(self.max_new_tokens):
            token_ids, chances = self._sample_next_tokens(get_lm_head(model)(hidden), uniform_BT[rows_left, t])
            broken |= (chances[:, 0].isnan() & live).any()  # a single nan or infinity makes all of softmax nan
            response[rows_left, t] = token_ids.where(live, self.pad_id)
            real[rows_left, t] = live
            chance_BT[rows_left, t] = gather_probabilities(token_ids, chances).where(live, 1.0)
            stopped_B = live & torch.isin(token_ids, stops)
            if ends:
                stopped_B |= mark_ended_rows(ends, rows_left, token_ids, live)
            ended_B[rows_left] |= stopped_B
            live = live & ~stopped_B
            live_count = int(live.sum())  # the only synchronisation with the device for each token
            if t + 1 == self.max_new_tokens or not live_count:
                break
            mask_left = torch.cat([mask_left, torch.ones_like(mask_left[:, :1])], dim=1)
            last = last + 1
            if live_count <= DROP_BELOW * len(rows_left):
                keep = live.nonzero().squeeze(-1)
                rows_left = rows_left[keep]
                token_ids = token_ids[keep]
                last = last[keep]
                mask_left = mask_left[keep]
                live = live[keep]
                cache.batch_select_indices(keep)
            hidden = compute_next_states(model, token_ids[:, None], mask_left, last[:, None], cache)
        if bool(broken):  # checked once: at each token it would be another synchronisation with the device
            raise NonFiniteLogits(NO_NUMBERS)
        longest = int(real.any(0).sum())
        tokens = torch.cat([tokens, response[:, :longest]], dim=1)
        mask = torch.cat([mask, real[:, :longest]], dim=1)
        return Rollout(tokens, mask, width, ended_B, chance_BT[:, :longest].log())

    def _generate_plain(
        self, model: Any, tokens: Tensor, mask: Tensor, uniform_BT: Tensor, ends: Sequence[Ends]
    ) -> Rollout:
        """Sample a batch of responses with transformers' own `generate`, for architectures without the fast path."""
        broken_BT = torch.zeros_like(uniform_BT, dtype=torch.bool)
        chance_BT = torch.ones_like(uniform_BT, dtype=torch.float32)

        def draw(logits_BV: Tensor, t: int) -> Tensor:
            token_ids, chances = self._sample_next_tokens(logits_BV, uniform_BT[:, t])
            broken_BT[:, t] = chances[:, 0].isnan()
            chance_BT[:, t] = gather_probabilities(token_ids, chances)
            return token_ids

        response, real, ended_B = generate_with_transformers(
            model,
            tokens,
            mask,
            draw,
            stop_ids=self.stop_ids,
            pad_id=self.pad_id,
            max_new_tokens=self.max_new_tokens,
            ends=ends,
        )
        if bool((broken_BT[:, : real.shape[1]] & real).any()):
            raise NonFiniteLogits(NO_NUMBERS)
        logprobs = chance_BT[:, : real.shape[1]].log().masked_fill(~real, 0.0)
        return Rollout(torch.cat([tokens, response], 1), torch.cat([mask, real], 1), tokens.shape[1], ended_B, logprobs)

    def _sample_next_tokens(self, logits_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
        """Sample the next tokens [B], and return them with the probabilities softmax(logits / temperature) [B, V].

        At temperature 0 they are the argmax, with the softmax of the unscaled logits.
        """
        if self.temperature not in (0.0, 1.0):
            logits_BV = logits_BV.float() / self.temperature
        chances_BV = logits_BV.softmax(-1, dtype=torch.float32)
        if self.temperature == 0:  # argmax of the logits: two probabilities may round to the same number
            return logits_BV.argmax(-1), chances_BV
        return draw_tokens(chances_BV, uniform_B), chances_BV


def mark_ended_rows(ends: Sequence[Ends], rows: Tensor, drawn_B: Tensor, live_B: Tensor) -> Tensor:
    """Pass each row's new token to its function in `ends`, and return a bool tensor [B] of the rows that end with it.

    Rows that ended before are skipped.

    Args:
        rows: index in `ends` of each row [B].
        drawn_B: the new token of each row.
        live_B: False for rows that ended before.
    """
    drawn_tokens = zip(rows.tolist(), drawn_B.tolist(), live_B.tolist(), strict=True)
    return torch.tensor([live and ends[row](id) for row, id, live in drawn_tokens], device=drawn_B.device)


@contextmanager
def use_evaluation_mode(model: Any) -> Iterator[None]:
    """Set a model to evaluation mode during the block, and restore its mode at the end.

    A model already in it is left alone: setting the mode of every module takes as long as generating a token.
    """
    was_training = model.training
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


def compute_next_states(model: Any, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
    """Run the decoder on new tokens, extend the cache, and return the hidden state of each row's last token [B, D]."""
    out = get_decoder(model)(
        input_ids=tokens, attention_mask=mask.long(), position_ids=positions, cache=cache, use_cache=True
    )
    return out.last_hidden_state[:, -1]
