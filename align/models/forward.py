"""Forward passes of a causal language model: hidden states, logits, and logprobs of chosen tokens.

On the fast path the backbone computes hidden states, and the head computes logits of selected tokens only. The plain
path is for architectures whose logits are more than a head on hidden states, or whose rows depend on padding: it uses
the model's own forward on rows of equal length, without padding, mask or positions. It is slower, and correct for every
causal model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from align import ranks
from align.core.types import Rollout
from align.models.architectures import FAST, Route, find_route
from align.ops.logprobs import linear_logprobs, token_logprobs


def unwrap_model(model: Any) -> Any:
    """Return the transformers model inside a PEFT wrapper, or the model itself. Its adapters stay active."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def get_decoder(model: Any) -> Any:
    """Return the module of a causal language model that computes its hidden states, without the language head.

    The model's own method `get_decoder` is not enough: for some models it returns the whole model, or a head that is
    named `decoder`.
    """
    base = unwrap_model(model)
    decoder = base.get_decoder()
    if isinstance(decoder, nn.Linear):
        return base.base_model
    return decoder.model if getattr(decoder, "lm_head", None) is not None else decoder


def get_route(model: Any) -> Route:
    """Return whether a model is computed on the fast path and allows padding and packing, from its configuration. The
    result is stored on the model."""
    base = unwrap_model(model)
    if "align_route" not in vars(base):
        config = getattr(base, "config", None)
        base.align_route = find_route(config) if hasattr(config, "model_type") else FAST
    return base.align_route


def get_hidden_size(model: Any) -> int:
    """Return the width D of a model's hidden states."""
    return int(unwrap_model(model).config.get_text_config().hidden_size)


def group_rows(model: Any, tokens_BS: Tensor, mask_BS: Tensor) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield groups of rows that can share one forward pass: all rows if the model allows padding, else the rows of each
    length.

    Yields:
        The flat indices of the group's tokens [R, L] in `tokens_BS`, and the arguments of the model.
    """
    places_BS = torch.arange(tokens_BS.numel(), device=tokens_BS.device).view(tokens_BS.shape)
    if get_route(model).can_pad:
        positions = (mask_BS.long().cumsum(-1) - 1).clamp_min(0)
        yield places_BS, {"input_ids": tokens_BS, "attention_mask": mask_BS.long(), "position_ids": positions}
        return
    lengths_B = mask_BS.sum(-1)
    for length in lengths_B.unique():
        rows = lengths_B == length
        places_RL = places_BS[rows][mask_BS[rows]].view(int(rows.sum()), -1)
        yield places_RL, {"input_ids": tokens_BS.flatten()[places_RL]}


def scatter_rows(groups: Sequence[tuple[Tensor, Tensor]], mask_BS: Tensor) -> Tensor:
    """Scatter the hidden states of groups of rows back into one tensor [B, S, D], with 0 at padding."""
    first = groups[0][1]
    if first.shape[:2] == mask_BS.shape:
        return first
    hidden = first.new_zeros(mask_BS.numel(), first.shape[-1])
    for places_RL, states_RLD in groups:
        hidden = hidden.index_copy(0, places_RL.flatten(), states_RLD.flatten(0, 1))
    return hidden.view(*mask_BS.shape, -1)


def compute_hidden_states(model: Any, tokens_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Return the last hidden states [B, S, D] of a batch whose rows may have padding anywhere. Positions count tokens
    without padding. On models that allow no padding, the states at padding are 0."""
    decoder = get_decoder(model)
    groups = group_rows(model, tokens_BS, mask_BS)
    states = [(places, decoder(**inputs, use_cache=False).last_hidden_state) for places, inputs in groups]
    return scatter_rows(states, mask_BS)


class StatesAndLogits(NamedTuple):
    """The hidden states of a batch and the logits of its picked tokens, from the model's own forward.

    Attributes:
        states_BSD: the decoder's last hidden states.
        logits_NV: logits that predict the picked tokens, one group of rows after another.
        token_indices_N: flat indices of these tokens in `tokens_BS`.
    """

    states_BSD: Tensor
    logits_NV: Tensor
    token_indices_N: Tensor


def compute_states_and_logits(model: Any, tokens_BS: Tensor, mask_BS: Tensor, picked_BS: Tensor) -> StatesAndLogits:
    """Compute the hidden states of all tokens and the logits of the picked tokens by the model's own forward.

    Args:
        picked_BS: bool mask of the tokens to be scored, without padding and without a row's first token.
    """
    captured: list[Tensor] = []
    hook = get_decoder(model).register_forward_hook(
        lambda _module, _inputs, out: captured.append(out[0] if isinstance(out, tuple) else out.last_hidden_state)
    )
    states = []
    logits = []
    places = []
    try:
        for places_RL, inputs in group_rows(model, tokens_BS, mask_BS):
            out = unwrap_model(model)(**inputs, use_cache=False).logits
            picked = picked_BS.flatten()[places_RL][:, 1:]
            logits.append(out[:, :-1][picked])
            places.append(places_RL[:, 1:][picked])
            states.append((places_RL, captured[-1]))
    finally:
        hook.remove()
    return StatesAndLogits(scatter_rows(states, mask_BS), torch.cat(logits), torch.cat(places))


@contextmanager
def ignore_generation_config(model: Any) -> Iterator[None]:
    """Replace a model's generation config by an empty one while the `with` block runs, because `generate` would use its
    settings as defaults."""
    config = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = config


def get_lm_head(model: Any) -> Callable[[Tensor], Tensor]:
    """Return the function from hidden states to logits: the language head with any scaling or capping after the
    projection. Gemma 2 caps logits, Cohere and Granite scale them."""
    base = unwrap_model(model)
    head = base.get_output_embeddings()
    config = base.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    if cap is None and scale == 1.0:
        return head

    def logits(hidden: Tensor) -> Tensor:
        scaled = head(hidden) * scale
        return scaled if cap is None else torch.tanh(scaled / cap) * cap

    return logits


def pad_rows(rows: Sequence[Sequence[int]], value: int, pad_left: bool = False) -> Tensor:
    """Pad rows of token ids with `value` to one int64 tensor [B, S], on the right unless `pad_left`."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    side = "left" if pad_left else "right"
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


def rollout_from_answers(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], filler: int, device: Any
) -> Rollout:
    """Build a Rollout from the token ids of prompts and existing answers, which all count as ended.

    Args:
        filler: token id for padding.
    """
    tokens = torch.cat([pad_rows(prompts, filler, pad_left=True), pad_rows(answers, filler)], 1)
    prompt_mask = pad_rows([[1] * len(row) for row in prompts], 0, pad_left=True)
    answer_mask = pad_rows([[1] * len(row) for row in answers], 0)
    mask = torch.cat([prompt_mask, answer_mask], 1).bool()
    ended_B = torch.ones(len(prompts), dtype=torch.bool)
    return Rollout(tokens.to(device), mask.to(device), max(map(len, prompts)), ended_B.to(device))


def scatter_tokens(values_N: Tensor, mask_BT: Tensor) -> Tensor:
    """Place the values at the True positions of a mask, in order, and return them as a tensor [B, T] with 0 elsewhere.
    Gradients flow through."""
    return values_N.new_zeros(mask_BT.shape).masked_scatter(mask_BT, values_N)


def select_predicting_states(hidden_BSD: Tensor, rollout: Rollout) -> Tensor:
    """Return the hidden states from which the response tokens are predicted [B, T, D]: those of the tokens before
    them."""
    # The state at column S−1 predicts column S: the response's predictors start one column before it.
    return hidden_BSD[:, rollout.prompt_width - 1 : -1]


class PickedLogprobs(NamedTuple):
    """Logprobs and entropies of a batch's picked tokens in row order, and the hidden states of all tokens."""

    logprobs_N: Tensor
    entropies_N: Tensor
    states_BSD: Tensor


def compute_picked_logprobs(
    model: Any, tokens_BS: Tensor, mask_BS: Tensor, picked_BS: Tensor, temperature: float = 1.0
) -> PickedLogprobs:
    """Compute logprobs and entropies of picked tokens given the previous tokens of their row, under the active adapter.

    On the fast path logits are computed for picked tokens only, in chunks. Under autocast a frozen head is computed
    like a trained one, so that the policy's logprobs are rounded in the same way as those that they are compared with.

    Args:
        picked_BS: bool mask of the tokens to be scored, without padding and without a row's first token.
    """
    if not get_route(model).has_fast_path:
        hidden, logits_NV, places_N = compute_states_and_logits(model, tokens_BS, mask_BS, picked_BS)
        picked, entropy = token_logprobs(logits_NV, tokens_BS.flatten()[places_N], lambda logits: logits, temperature)
        order = places_N.argsort()
        return PickedLogprobs(picked[order], entropy[order], hidden)
    hidden = compute_hidden_states(model, tokens_BS, mask_BS)
    states_ND = hidden[:, :-1][picked_BS[:, 1:]]
    targets_N = tokens_BS[picked_BS]
    head = get_lm_head(model)
    is_plain_frozen_head = type(head) is nn.Linear and head.bias is None and not head.weight.requires_grad
    if is_plain_frozen_head and not torch.is_autocast_enabled(states_ND.device.type):
        return PickedLogprobs(*linear_logprobs(states_ND, targets_N, head.weight, temperature), hidden)
    return PickedLogprobs(*token_logprobs(states_ND, targets_N, head, temperature), hidden)


class ResponseLogprobs(NamedTuple):
    """Logprobs and entropies of response tokens, 0 outside their mask, and the hidden states that predict them."""

    logprobs_BT: Tensor
    entropy_BT: Tensor
    states_BTD: Tensor


def score_response(model: Any, rollout: Rollout, temperature: float) -> ResponseLogprobs:
    """Compute logprobs, entropies and hidden states for a rollout's response tokens, under the active adapter."""
    picked_BS = rollout.mask_BS.clone()
    picked_BS[:, : rollout.prompt_width] = False
    picked, entropy, hidden = compute_picked_logprobs(model, rollout.tokens_BS, rollout.mask_BS, picked_BS, temperature)
    mask_BT = rollout.response_mask_BT
    return ResponseLogprobs(
        scatter_tokens(picked, mask_BT), scatter_tokens(entropy, mask_BT), select_predicting_states(hidden, rollout)
    )


def compute_response_logprobs(model: Any, rollout: Rollout, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the logprobs and entropies of a rollout's response tokens [B, T], 0 outside the response mask."""
    return score_response(model, rollout, temperature)[:2]


def split_by_length(rollout: Rollout, size: int) -> list[Tensor]:
    """Split the row indices of a rollout into chunks of at most `size`, sorted by length, so that chunks need little
    padding."""
    return list(torch.argsort(rollout.mask_BS.sum(-1), stable=True).split(size))


def compute_in_chunks(function: Callable[[Rollout], Tensor], rollout: Rollout, size: int) -> Tensor:
    """Apply a function to a rollout in chunks of at most `size` rows, and return the result in the original order of
    the rows.

    Rows of similar length share a chunk, so that there is little padding. Each rank computes its share of the chunks,
    and all ranks get the whole result.

    Args:
        function: rollout → a tensor with a number for each row [B] or each response token [B, T].
    """
    return compute_several_in_chunks(lambda part: (function(part),), rollout, size)[0]


def compute_several_in_chunks(
    function: Callable[[Rollout], tuple[Tensor, ...]], rollout: Rollout, size: int
) -> tuple[Tensor, ...]:
    """Apply a function that returns several tensors to a rollout in chunks of at most `size` rows. Returns the tensors
    in the original order of the rows, padded to the rollout's width. The ranks share the chunks, and each gets the
    whole result."""
    width = rollout.response_mask_BT.shape[1]
    indices = split_by_length(rollout, size)
    chunks = [function(rollout.rows(index)) for index in ranks.select_own_share(indices)]
    if not ranks.is_alone():
        on_cpu = [tuple(x.detach().cpu().clone() for x in chunk) for chunk in chunks]
        gathered = ranks.gather_shares(on_cpu, len(indices))
        chunks = [tuple(x.to(rollout.tokens_BS.device) for x in chunk) for chunk in gathered]
    order = torch.argsort(torch.cat(indices))

    def pad_to_width(x: Tensor) -> Tensor:
        return nn.functional.pad(x, (0, width - x.shape[1])) if x.dim() == 2 else x

    return tuple(torch.cat([pad_to_width(x) for x in parts])[order] for parts in zip(*chunks, strict=True))
