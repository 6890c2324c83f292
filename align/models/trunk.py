"""A causal language model in two halves: the trunk that makes hidden states, and the head that makes logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from align.ops.logprobs import linear_logprobs, token_logprobs
from align.types import Rollout


def base_model(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself. Its adapters stay in force."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def hidden_size(model: Any) -> int:
    """D."""
    return int(base_model(model).config.get_text_config().hidden_size)


def hidden_states(model: Any, tokens_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Final hidden states [B, S, D], positions counted over real tokens, no logits made."""
    positions = (mask_BS.long().cumsum(-1) - 1).clamp_min(0)
    out = base_model(model).get_decoder()(
        input_ids=tokens_BS, attention_mask=mask_BS.long(), position_ids=positions, use_cache=False
    )
    return out.last_hidden_state


def lm_head(model: Any) -> Callable[[Tensor], Tensor]:
    """Hidden states → logits, with what some architectures do behind the projection: Gemma 2 caps, Cohere and Granite
    scale. Without it these models' logprobs are quietly another distribution's."""
    base = base_model(model)
    head, config = base.get_output_embeddings(), base.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    if cap is None and scale == 1.0:
        return head

    def logits(hidden: Tensor) -> Tensor:
        scaled = head(hidden) * scale
        return scaled if cap is None else torch.tanh(scaled / cap) * cap

    return logits


def pad(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> Tensor:
    """Rows of ids as one int64 tensor [B, S], padded on the right unless `left`."""
    width = max(map(len, rows))
    padded = [[value] * (width - len(r)) + list(r) if left else list(r) + [value] * (width - len(r)) for r in rows]
    return torch.tensor(padded, dtype=torch.long)


def answered(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], filler: int, device: Any) -> Rollout:
    """Given answers to prompts, as if they had been sampled."""
    sides = ((prompts, True), (answers, False))
    tokens = torch.cat([pad(rows, filler, left) for rows, left in sides], 1)
    mask = torch.cat([pad([[1] * len(r) for r in rows], 0, left) for rows, left in sides], 1).bool()
    ended = torch.ones(len(prompts), dtype=torch.bool)
    return Rollout(tokens.to(device), mask.to(device), max(map(len, prompts)), ended.to(device))


def scattered(values_N: Tensor, mask_BT: Tensor) -> Tensor:
    """Values back at their places in the rectangle, 0 elsewhere; gradients flow through."""
    out = torch.zeros(mask_BT.shape, dtype=values_N.dtype, device=values_N.device)
    return out.masked_scatter(mask_BT, values_N)


def states_before(model: Any, rollout: Rollout) -> Tensor:
    """The hidden state that each response token is predicted from [B, T, D], under whatever adapter is active."""
    # The state at column S−1 predicts column S: the response's predictors start one column before it.
    return hidden_states(model, rollout.tokens_BS, rollout.mask_BS)[:, rollout.prompt_width - 1 : -1]


def logprobs_of(model: Any, states_BTD: Tensor, rollout: Rollout, temperature: float) -> tuple[Tensor, Tensor]:
    """log p of each response token given the states before them, and the entropies: two [B, T], 0 outside the response
    mask. Logits are made for response tokens only, a chunk at a time.

    Under autocast a head is taken as it is, frozen or not: the logprobs that a policy is trained on must be rounded as
    those were that it is compared with.
    """
    mask = rollout.response_mask_BT
    states_ND, targets_N, head = states_BTD[mask], rollout.response_BT[mask], lm_head(model)
    plain = type(head) is nn.Linear and head.bias is None and not head.weight.requires_grad
    if plain and not torch.is_autocast_enabled(states_ND.device.type):
        picked, entropy = linear_logprobs(states_ND, targets_N, head.weight, temperature)
    else:
        picked, entropy = token_logprobs(states_ND, targets_N, head, temperature)
    return scattered(picked, mask), scattered(entropy, mask)


def response_logprobs(model: Any, rollout: Rollout, temperature: float) -> tuple[Tensor, Tensor]:
    """log p of each response token under whatever adapter is active, and the entropies: two [B, T], 0 outside the
    response mask."""
    return logprobs_of(model, states_before(model, rollout), rollout, temperature)
