"""The learned reward as a scorer: of sampled tokens on the policy's own base, of text on any other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from align import ranks
from align.core.errors import require
from align.core.types import Conversation, Rollout
from align.data.chat.encode import encode_judged
from align.models.forward import compute_in_chunks, hidden_states, pad
from align.models.load import context_length
from align.models.roles import Roles, last_real_states


class RoleReward:
    """A reward model that is an adapter on the policy's own base. It reads the very tokens that were sampled, for
    decoding and tokenising them again could change them; but for the token that ended an answer. A checkpoint may list
    several of those, and the reward was trained at one.

    Args:
        roles: hold it.
        member: which of their reward adapters it is.
        size: rows a pass.
        end: the token that its training rows end with; None reads what was sampled.
    """

    name = "learned"

    def __init__(self, roles: Roles, member: int, size: int, end: int | None) -> None:
        self.roles, self.member, self.size, self.end = roles, member, size, end

    def score(self, conversations: Sequence[Conversation], rollout: Rollout | None = None) -> Tensor:
        """Raises:
        ValueError: there is no rollout.
        """
        if rollout is None:
            raise ValueError("a reward on the policy's base reads sampled tokens")
        read = rollout if self.end is None else closed(rollout, self.end)
        return compute_in_chunks(lambda part: self.roles.scores(part, self.member), read, self.size).cpu()


def closed(rollout: Rollout, end: int) -> Rollout:
    """A rollout with `end` as the last token of each response that ended, whichever token it ended with."""
    mask = rollout.mask_BS
    last_BS = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)  # of each row the last real column
    return replace(rollout, tokens_BS=torch.where(last_BS & rollout.ended_B[:, None], end, rollout.tokens_BS))


class LearnedReward:
    """A base with a reward adapter and its `score` head, read exactly where training read it.

    Args:
        model: a model whose active adapter is the reward's.
        score_head: hidden → score.
        stops: the tokens that end a turn.
        ref: what the user calls it.
    """

    name = "learned"

    def __init__(
        self,
        model: Any,
        score_head: nn.Module,
        tokenizer: Any,
        stops: Sequence[int],
        batch_size: int = 32,
        ref: str = "(a model)",
    ) -> None:
        self.model, self.score_head, self.tokenizer = model, score_head, tokenizer
        self.stops, self.batch_size, self.ref = tuple(stops), batch_size, ref

    def score(self, conversations: Sequence[Conversation], rollout: Rollout | None = None) -> Tensor:
        """Scores [B] of conversations that end with an assistant turn.

        Args:
            rollout: says which of these turns were cut; without it, none was.

        Raises:
            ValueError: a conversation does not end with an assistant turn.
            InputError: one is longer than the model's context. The sampler counts in tokens of its own, so that this
                is not known before the answer is.
        """
        ended = [True] * len(conversations) if rollout is None else rollout.ended_B.tolist()
        rows = [self.encoded(one, whole) for one, whole in zip(conversations, ended, strict=True)]
        room, longest = context_length(self.model), max(map(len, rows), default=0)
        require(
            longest <= room, "reward.ref", self.ref, f"reads {room} tokens, and a prompt with its answer has {longest}",
            "Lower data.max_length or rollout.max_new_tokens, or name a reward model with a longer context.",
        )  # fmt: skip
        return score_rows(self.model, self.score_head, rows, self.tokenizer.pad_token_id, self.batch_size)

    def encoded(self, conversation: Conversation, ended: bool = True) -> list[int]:
        """A conversation as it is read. Raises: ValueError: it does not end with an assistant turn."""
        *before, last = conversation.messages
        if last.role != "assistant" or not before:
            raise ValueError(f"conversation {conversation.id or '(no id)'} does not end with an answer")
        prompt = replace(conversation, messages=tuple(before))
        return encode_judged(self.tokenizer, prompt, last, ended, self.stops)

    def fits(self, conversation: Conversation) -> bool:
        """Whether a conversation that ends with an assistant turn is no longer than the model's context."""
        return len(self.encoded(conversation)) <= context_length(self.model)


@torch.no_grad()
def score_rows(
    model: Any, score_head: nn.Module, rows: Sequence[Sequence[int]], pad_id: int, batch_size: int = 32
) -> Tensor:
    """Scores [N] of token rows, fp32 on the CPU, in the order given; batched by length, a share of the batches on each
    rank."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    device = next(model.parameters()).device
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def scored(chosen: list[int]) -> list[float]:
        tokens = pad([rows[i] for i in chosen], pad_id).to(device)
        mask = pad([[1] * len(rows[i]) for i in chosen], 0).bool().to(device)
        last = last_real_states(hidden_states(model, tokens, mask), mask)
        return score_head(last.float()).squeeze(-1).float().tolist()

    scores = torch.empty(len(rows))
    found = ranks.gather_shares([scored(batch) for batch in ranks.own_share(batches)], len(batches))
    for batch, each in zip(batches, found, strict=True):
        scores[torch.tensor(batch)] = torch.tensor(each)
    return scores
