"""The plain path: a model's own forward, on rows as it would be given them alone.

For architectures whose logits are more than a head on hidden states, or whose rows change with the padding beside them.
Rows of one length are computed together, without padding, mask or positions, so nothing has to be honoured that a model
may ignore. Slower, and right for every causal model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from align.models.architectures import FAST, Route, route


def base_model(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself. Its adapters stay in force."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_of(model: Any) -> Any:
    """What makes a model's hidden states. `get_decoder` gives some models back whole, and of one the head, which is
    called `decoder` there."""
    base = base_model(model)
    found = base.get_decoder()
    if isinstance(found, nn.Linear):
        return base.base_model
    return found.model if getattr(found, "lm_head", None) is not None else found


def route_of(model: Any) -> Route:
    """How a model is computed; asked once and kept with it."""
    base = base_model(model)
    found = vars(base).get("align_route")
    if found is None:
        config = getattr(base, "config", None)
        found = base.align_route = route(config) if hasattr(config, "model_type") else FAST
    return found


class Group(NamedTuple):
    """Rows that go through a model together.

    Attributes:
        rows: their places in the batch [R].
        real_RS: their real tokens, L in each row.
        options: what the model is called with; `input_ids` are [R, L], or the rectangle with its mask.
    """

    rows: Tensor
    real_RS: Tensor
    options: dict[str, Tensor]

    def taken(self, x_BS: Tensor) -> Tensor:
        """What a rectangle holds of these rows, as they go through the model: [R, L]."""
        part = x_BS[self.rows]
        return part if self.padded else part[self.real_RS].view(len(part), -1)

    def put(self, into_BSD: Tensor, x_RLD: Tensor) -> Tensor:
        """A rectangle with these rows' part of it."""
        if self.padded:
            return into_BSD.index_copy(0, self.rows, x_RLD.to(into_BSD.dtype))
        places = torch.zeros(into_BSD.shape[:2], dtype=torch.bool, device=into_BSD.device)
        places[self.rows] = self.real_RS
        return into_BSD.masked_scatter(places[..., None], x_RLD.to(into_BSD.dtype))

    @property
    def padded(self) -> bool:
        return "attention_mask" in self.options


def groups(tokens_BS: Tensor, mask_BS: Tensor, padding: bool) -> Iterator[Group]:
    """Rows of one length together; all together where padding changes nothing."""
    if padding:
        every = torch.arange(len(tokens_BS), device=tokens_BS.device)
        positions = (mask_BS.long().cumsum(-1) - 1).clamp_min(0)
        options = {"input_ids": tokens_BS, "attention_mask": mask_BS.long(), "position_ids": positions}
        yield Group(every, mask_BS, options)
        return
    lengths_B = mask_BS.sum(-1)
    for length in lengths_B.unique():
        rows = (lengths_B == length).nonzero().squeeze(-1)
        real = mask_BS[rows]
        yield Group(rows, real, {"input_ids": tokens_BS[rows][real].view(len(rows), -1)})


def hidden_states(model: Any, tokens_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """The decoder's last hidden states [B, S, D], 0 on padding where rows go alone."""
    decoder, made = decoder_of(model), None
    for group in groups(tokens_BS, mask_BS, route_of(model).padding):
        states = decoder(**group.options, use_cache=False).last_hidden_state
        made = group.put(rectangle(states, mask_BS) if made is None else made, states)
    assert made is not None
    return made


def states_and_logits(
    model: Any, tokens_BS: Tensor, mask_BS: Tensor, picked_BS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass of the model's own forward.

    Args:
        picked_BS: real tokens, none of them a row's first.

    Returns:
        the decoder's last hidden states [B, S, D]; the logits that each picked token is predicted by [N, V], a group of
        rows after another; and where each of those tokens lies in the rectangle read row by row [N].
    """
    base, made = base_model(model), None
    places_BS = torch.arange(tokens_BS.numel(), device=tokens_BS.device).view(tokens_BS.shape)
    logits, places = [], []
    for group in groups(tokens_BS, mask_BS, route_of(model).padding):
        with captured_states(decoder_of(base)) as captured:
            out = base(**group.options, use_cache=False).logits
        picked = group.taken(picked_BS)[:, 1:]
        logits.append(out[:, :-1][picked])
        places.append(group.taken(places_BS)[:, 1:][picked])
        states = captured[-1]
        made = group.put(rectangle(states, mask_BS) if made is None else made, states)
    assert made is not None
    return made, torch.cat(logits), torch.cat(places)


@contextmanager
def captured_states(decoder: nn.Module) -> Iterator[list[Tensor]]:
    """The last hidden states that a decoder gives while a model calls it."""
    captured: list[Tensor] = []
    handle = decoder.register_forward_hook(lambda _m, _a, out: captured.append(last_of(out)))
    try:
        yield captured
    finally:
        handle.remove()


def last_of(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out.last_hidden_state


def rectangle(states: Tensor, mask_BS: Tensor) -> Tensor:
    return torch.zeros(*mask_BS.shape, states.shape[-1], dtype=states.dtype, device=states.device)


@contextmanager
def without_settings(model: Any) -> Iterator[None]:
    """With none of a checkpoint's generation settings, which `generate` would fill in where it is told nothing."""
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept
