"""Learned reward models as scorers: of sampled tokens on the policy's base, and of text on any other base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from align import ranks
from align.core.errors import require
from align.core.types import Conversation, Rollout
from align.data.chat.encode import encode_for_reward_model
from align.models.forward import compute_hidden_states, compute_in_chunks, pad_rows
from align.models.load import get_context_length
from align.models.roles import Roles, select_last_states


class RoleReward:
    """A scorer by a reward model that is an adapter on the policy's base model.

    It reads the sampled tokens, because decoding and tokenizing them again could change them. Only the token that ends
    an answer is replaced: a checkpoint may list several such tokens, and the reward model was trained with one.

    Args:
        roles: holds the adapter.
        adapter_index: index of the adapter among the reward adapters of `roles`.
        batch_size: rows of a forward pass.
        end_token_id: the token that ended the training rows. With None the sampled token stays.
    """

    name = "learned"

    def __init__(self, roles: Roles, adapter_index: int, batch_size: int, end_token_id: int | None) -> None:
        self.roles = roles
        self.adapter_index = adapter_index
        self.batch_size = batch_size
        self.end_token_id = end_token_id

    def score(self, conversations: Sequence[Conversation], rollout: Rollout | None = None) -> Tensor:
        """Return the reward model's scores of a rollout's sampled tokens, [B] fp32 on the CPU.

        Raises:
            ValueError: there is no rollout.
        """
        if rollout is None:
            raise ValueError("a reward on the policy's base reads sampled tokens")
        if self.end_token_id is not None:
            rollout = replace_end_token(rollout, self.end_token_id)
        return compute_in_chunks(
            lambda chunk: self.roles.scores(chunk, self.adapter_index), rollout, self.batch_size
        ).cpu()


def replace_end_token(rollout: Rollout, end_token_id: int) -> Rollout:
    """Return a rollout in which the last token of each response that was not cut is replaced by `end_token_id`."""
    mask = rollout.mask_BS
    last_BS = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)  # the last real column of each row
    return replace(rollout, tokens_BS=torch.where(last_BS & rollout.ended_B[:, None], end_token_id, rollout.tokens_BS))


class LearnedReward:
    """A scorer by a reward model with a base model of its own: base, reward adapter and `score` head.

    Args:
        model: a model whose active adapter is the reward's.
        score_head: maps hidden states to scores.
        stops: the tokens that end a turn.
        ref: the user's reference to the model, for errors.
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
        self.model = model
        self.score_head = score_head
        self.tokenizer = tokenizer
        self.stops = tuple(stops)
        self.batch_size = batch_size
        self.ref = ref

    def score(self, conversations: Sequence[Conversation], rollout: Rollout | None = None) -> Tensor:
        """Return the reward model's scores [B] of conversations that end with an assistant turn.

        Args:
            rollout: has the turns that were cut; without it, all turns count as complete.

        Raises:
            ValueError: a conversation does not end with an assistant turn.
            InputError: a conversation is longer than the model's context. The policy may have another tokenizer, so
                that the length is known only once the answer is.
        """
        complete = [True] * len(conversations) if rollout is None else rollout.ended_B.tolist()
        rows = [
            self.encode(conversation, is_complete)
            for conversation, is_complete in zip(conversations, complete, strict=True)
        ]
        context = get_context_length(self.model)
        longest = max(map(len, rows), default=0)
        require(
            longest <= context,
            "reward.ref",
            self.ref,
            f"reads {context} tokens, and a prompt with its answer has {longest}",
            "Lower data.max_length or rollout.max_new_tokens, or name a reward model with a longer context.",
        )
        return score_rows(self.model, self.score_head, rows, self.tokenizer.pad_token_id, self.batch_size)

    def encode(self, conversation: Conversation, has_end_token: bool = True) -> list[int]:
        """Return the token ids of a conversation with its answer, as the reward model read them in training.

        Raises:
            ValueError: it does not end with an assistant turn.
        """
        *prompt_messages, answer = conversation.messages
        if answer.role != "assistant" or not prompt_messages:
            raise ValueError(f"conversation {conversation.id or '(no id)'} does not end with an answer")
        prompt = replace(conversation, messages=tuple(prompt_messages))
        return encode_for_reward_model(self.tokenizer, prompt, answer, has_end_token, self.stops)

    def fits(self, conversation: Conversation) -> bool:
        """Return whether a conversation that ends with an assistant turn fits into the reward model's context."""
        return len(self.encode(conversation)) <= get_context_length(self.model)


@torch.no_grad()
def score_rows(
    model: Any, score_head: nn.Module, rows: Sequence[Sequence[int]], pad_id: int, batch_size: int = 32
) -> Tensor:
    """Return a reward model's scores of N rows of token ids, [N] fp32 on the CPU, in the rows' order.

    Rows are batched by length, and each rank scores its share of the batches.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    device = next(model.parameters()).device
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def score_batch(indices: list[int]) -> list[float]:
        tokens = pad_rows([rows[i] for i in indices], pad_id).to(device)
        mask = pad_rows([[1] * len(rows[i]) for i in indices], 0).bool().to(device)
        last = select_last_states(compute_hidden_states(model, tokens, mask), mask)
        return score_head(last.float()).squeeze(-1).float().tolist()

    scores = torch.empty(len(rows))
    scores_of_batches = ranks.gather_shares(
        [score_batch(batch) for batch in ranks.select_own_share(batches)], len(batches)
    )
    for indices, batch_scores in zip(batches, scores_of_batches, strict=True):
        scores[torch.tensor(indices)] = torch.tensor(batch_scores)
    return scores
