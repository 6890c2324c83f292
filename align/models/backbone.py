"""A causal language model in two halves: the backbone that makes hidden states, and the head that makes logits.

Where `align.models.architectures` has not seen that the halves make the whole, the model's own forward is asked
(`align.models.plain_path`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from align.core.types import Rollout
from align.models import plain_path
from align.models.plain_path import base_model, decoder_of, route_of
from align.ops.logprobs import linear_logprobs, token_logprobs


def hidden_size(model: Any) -> int:
    """D."""
    return int(base_model(model).config.get_text_config().hidden_size)


def hidden_states(model: Any, tokens_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Final hidden states [B, S, D], positions counted over real tokens, no logits made."""
    if not route_of(model).fast:
        return plain_path.hidden_states(model, tokens_BS, mask_BS)
    positions = (mask_BS.long().cumsum(-1) - 1).clamp_min(0)
    out = decoder_of(model)(input_ids=tokens_BS, attention_mask=mask_BS.long(), position_ids=positions, use_cache=False)
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
    return before(hidden_states(model, rollout.tokens_BS, rollout.mask_BS), rollout)


def before(hidden_BSD: Tensor, rollout: Rollout) -> Tensor:
    """Of the states of all tokens, those that response tokens are predicted from [B, T, D]."""
    # The state at column S−1 predicts column S: the response's predictors start one column before it.
    return hidden_BSD[:, rollout.prompt_width - 1 : -1]


def picked_logprobs(
    model: Any, tokens_BS: Tensor, mask_BS: Tensor, picked_BS: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """log p of each picked token given the real tokens before it in its row, under whatever adapter is active.

    Logits are made for picked tokens only, a chunk at a time, where the model's halves are known. Under autocast a head
    is taken as it is, frozen or not: the logprobs that a policy is trained on must be rounded as those were that it is
    compared with.

    Args:
        picked_BS: real tokens, none of them a row's first.

    Returns:
        logprobs and entropies [N], row by row; the hidden states of all tokens [B, S, D].
    """
    targets_N = tokens_BS[picked_BS]
    if not route_of(model).fast:
        hidden, logits_NV, places_N = plain_path.states_and_logits(model, tokens_BS, mask_BS, picked_BS)
        picked, entropy = token_logprobs(logits_NV, tokens_BS.flatten()[places_N], lambda z: z, temperature)
        order = places_N.argsort()
        return picked[order], entropy[order], hidden
    hidden = hidden_states(model, tokens_BS, mask_BS)
    states_ND, head = hidden[:, :-1][picked_BS[:, 1:]], lm_head(model)
    simple = type(head) is nn.Linear and head.bias is None and not head.weight.requires_grad
    if simple and not torch.is_autocast_enabled(states_ND.device.type):
        return *linear_logprobs(states_ND, targets_N, head.weight, temperature), hidden
    return *token_logprobs(states_ND, targets_N, head, temperature), hidden


def read_response(model: Any, rollout: Rollout, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """log p of each response token under whatever adapter is active, and the entropies: two [B, T], 0 outside the
    response mask; and the states they are predicted from [B, T, D]."""
    mask_BT, picked_BS = rollout.response_mask_BT, rollout.mask_BS.clone()
    picked_BS[:, : rollout.prompt_width] = False
    picked, entropy, hidden = picked_logprobs(model, rollout.tokens_BS, rollout.mask_BS, picked_BS, temperature)
    return scattered(picked, mask_BT), scattered(entropy, mask_BT), before(hidden, rollout)


def response_logprobs(model: Any, rollout: Rollout, temperature: float) -> tuple[Tensor, Tensor]:
    """The logprobs and entropies of `read_response`."""
    return read_response(model, rollout, temperature)[:2]
