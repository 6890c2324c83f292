"""Is what is computed here what the model says? Asked at load, and more of a configuration that nobody has measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from align.core.errors import InputError
from align.models.backbone import answered, picked_logprobs
from align.models.fastpath import without_fast_path
from align.models.plain_path import base_model, decoder_of, hidden_states, route_of, without_settings
from align.run import Base, out_of_memory

EXACT, ROUNDED = 1e-2, 0.25
"""Mean distance in nats that is taken for rounding, in fp32 and in half precision. Orders of addition make less than
1e-3 and 0.1 of it; a mask, a position or a scale that is passed over makes more, on weights that say something."""
ROWS = ((3, 17), (9, 11))
"""Tokens of each row's prompt, and of prompt and answer."""


@torch.no_grad()
def probe(model: Any, base: Base) -> None:
    """Two rows of unequal length, beside the model's own forward on each of them alone. A configuration that was not
    measured is also asked whether it reads ahead, and whether its cache agrees with its forward.

    Raises:
        InputError: the model reads ahead, contradicts itself, or what is computed here is not what it says.
    """
    causal = base_model(model).get_output_embeddings() is not None
    try:
        problem = of_logits(model) if causal else of_states(model)
    except InputError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        problem = f"it cannot be asked for logits of two rows ({type(error).__name__}: {first})"
    if problem:
        raise InputError(
            "model.path", base.id, f"its type {base_model(model).config.model_type} cannot be used here: {problem}",
            "Use a model of a type that docs/architectures.md has on the fast or the plain path.",
        )  # fmt: skip


def of_logits(model: Any) -> str:
    """What is wrong with a causal language model; empty where nothing is."""
    rows = random_rows(model)
    with without_fast_path(model):
        alone = [own_logprobs(model, row) for row in rows]
        if not route_of(model).proven and (problem := of_itself(model, rows, alone)):
            return problem
    cut = [(row[:p].tolist(), row[p:].tolist()) for row, (p, _) in zip(rows, ROWS, strict=True)]
    rollout = answered([prompt for prompt, _ in cut], [answer for _, answer in cut], 0, rows[0].device)
    picked_BS = rollout.mask_BS & (rollout.mask_BS.cumsum(1) > 1)
    found, _, _ = picked_logprobs(model, rollout.tokens_BS, rollout.mask_BS, picked_BS)
    right = torch.cat([a[:-1].gather(1, row[1:, None])[:, 0] for a, row in zip(alone, rows, strict=True)])
    good = apart(found, right) <= within(model)
    return "" if good else "rows beside each other are not what the model says of each alone"


def of_itself(model: Any, rows: list[Tensor], alone: list[Tensor]) -> str:
    """What is wrong with a model's own forward, whoever calls it; empty where nothing is.

    Args:
        alone: its logprobs of each row [S, V].
    """
    own, bound = base_model(model), within(model)
    shorter = [own_logprobs(model, row[:-2]) for row in rows]
    if max(apart(a[:-2], b) for a, b in zip(alone, shorter, strict=True)) > bound:
        return "it reads ahead, as encoders do: what follows a token changes what is predicted there"
    row = rows[0][None]
    with without_settings(own):
        greedy = GenerationConfig(
            do_sample=False, max_new_tokens=3, pad_token_id=0, output_logits=True, return_dict_in_generate=True
        )
        output = own.generate(row, attention_mask=torch.ones_like(row), generation_config=greedy)
    whole = own_logprobs(model, output.sequences[0, :-1])[row.shape[1] - 1 :]
    cached = torch.cat(output.logits).float().log_softmax(-1)
    return "" if apart(whole, cached) <= bound else "transformers' own cache gives other logits than its forward"


def own_logprobs(model: Any, row: Tensor) -> Tensor:
    """Of every token of the vocabulary behind each token of a row [S, V], by the model's own forward."""
    return base_model(model)(input_ids=row[None], use_cache=False).logits[0].float().log_softmax(-1)


def of_states(model: Any) -> str:
    """The same of a model without a head on its vocabulary, by its last hidden states."""
    rows, decoder = random_rows(model), decoder_of(model)
    with without_fast_path(model):
        shorter = [decoder(input_ids=row[None, :-2], use_cache=False).last_hidden_state[0] for row in rows]
    width = max(map(len, rows))
    tokens = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(width, device=row.device) >= width - len(row) for row in rows])
    found = hidden_states(model, tokens, mask)
    parts = [(found[i, width - len(row) : -2], shorter[i]) for i, row in enumerate(rows)]
    scale = max(float(x.float().abs().mean()) for x in shorter)
    off = max(apart(a.float(), b.float()) for a, b in parts) / scale
    return "" if off <= within(model) else "it reads ahead, or rows change each other"


def random_rows(model: Any) -> list[Tensor]:
    """Token rows of the lengths of `ROWS`, the same for every model of a vocabulary."""
    embedding = base_model(model).get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, embedding.weight.shape[0], (length,), generator=generator) for _, length in ROWS]
    return [row.to(embedding.weight.device) for row in ids]


def within(model: Any) -> float:
    """The distance that a dtype makes."""
    return EXACT if next(p for p in model.parameters() if p.is_floating_point()).dtype == torch.float32 else ROUNDED


def apart(a: Tensor, b: Tensor) -> float:
    """Mean distance; infinite where it is no number."""
    return float((a - b).abs().mean().nan_to_num(torch.inf))
