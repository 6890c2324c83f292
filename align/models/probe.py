"""Checks of a model after loading: the logits computed here are those of its own forward. Configurations that were not
measured get further checks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from align.core.errors import InputError, require
from align.models.fastpath import disable_fast_path
from align.models.forward import (
    compute_hidden_states,
    compute_picked_logprobs,
    get_decoder,
    get_route,
    ignore_generation_config,
    pad_rows,
    rollout_from_answers,
    unwrap_model,
)
from align.run import Base, is_out_of_memory

EXACT = 1e-2
ROUNDED = 0.25
"""Mean difference of logprobs in nats that counts as rounding, in fp32 (`EXACT`) and in half precision (`ROUNDED`).
Another order of addition gives less than 1e-3 and 0.1; a mask, a position or a scale that is ignored gives more, unless
the weights are random."""
ROWS = ((3, 17), (9, 11))
"""Length of the prompt, and of prompt and answer together, for each row of the checks."""


@torch.no_grad()
def require_consistent_logits(model: Any, base: Base) -> None:
    """Raise InputError unless two rows of different lengths in one batch have the same logits as each row alone in the
    model's own forward. For a configuration that was not measured, also check that the model is causal, and that its
    cache agrees with its forward.

    Raises:
        InputError: a check fails.
    """
    check = (
        find_problem_in_logits if unwrap_model(model).get_output_embeddings() is not None else find_problem_in_states
    )
    try:
        problem = check(model)
    except InputError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        problem = f"it cannot be asked for logits of two rows ({type(error).__name__}: {first})"
    model_type = unwrap_model(model).config.model_type
    remedy = "Use a model of a type that docs/architectures.md has on the fast or the plain path."
    require(not problem, "model.path", base.id, f"its type {model_type} cannot be used here: {problem}", remedy)


def find_problem_in_logits(model: Any) -> str:
    """Return a problem as text if a causal language model gives other logprobs for rows in a batch than for each row
    alone, else an empty string. Configurations that were not measured get further checks."""
    rows = draw_random_rows(model)
    with disable_fast_path(model):
        alone = [compute_own_logprobs(model, row) for row in rows]
        if not get_route(model).is_measured and (problem := find_contradiction(model, rows, alone)):
            return problem
    prompts = [row[:start].tolist() for row, (start, _) in zip(rows, ROWS, strict=True)]
    answers = [row[start:].tolist() for row, (start, _) in zip(rows, ROWS, strict=True)]
    rollout = rollout_from_answers(prompts, answers, 0, rows[0].device)
    picked_BS = rollout.mask_BS & (rollout.mask_BS.cumsum(1) > 1)
    together, _, _ = compute_picked_logprobs(model, rollout.tokens_BS, rollout.mask_BS, picked_BS)
    expected = torch.cat([a[:-1].gather(1, row[1:, None])[:, 0] for a, row in zip(alone, rows, strict=True)])
    agrees = compute_mean_distance(together, expected) <= choose_tolerance(model)
    return "" if agrees else "rows in a batch give other logits than each row alone"


def find_contradiction(model: Any, rows: list[Tensor], alone: list[Tensor]) -> str:
    """Return a problem as text if a model's own forward is not causal or contradicts its key-value cache, else an empty
    string.

    Args:
        alone: its logprobs of each row [S, V].
    """
    unwrapped = unwrap_model(model)
    bound = choose_tolerance(model)
    shorter = [compute_own_logprobs(model, row[:-2]) for row in rows]
    if max(compute_mean_distance(a[:-2], b) for a, b in zip(alone, shorter, strict=True)) > bound:
        return "it reads ahead, as encoders do: what follows a token changes what is predicted there"
    row = rows[0][None]
    with ignore_generation_config(unwrapped):
        greedy = GenerationConfig(
            do_sample=False, max_new_tokens=3, pad_token_id=0, output_logits=True, return_dict_in_generate=True
        )
        output = unwrapped.generate(row, attention_mask=torch.ones_like(row), generation_config=greedy)
    uncached = compute_own_logprobs(model, output.sequences[0, :-1])[row.shape[1] - 1 :]
    cached = torch.cat(output.logits).float().log_softmax(-1)
    agrees = compute_mean_distance(uncached, cached) <= bound
    return "" if agrees else "transformers' own cache gives other logits than its forward"


def compute_own_logprobs(model: Any, row: Tensor) -> Tensor:
    """Return the log-probabilities of all next tokens after each token of one row [S, V], by the model's own
    forward."""
    return unwrap_model(model)(input_ids=row[None], use_cache=False).logits[0].float().log_softmax(-1)


def find_problem_in_states(model: Any) -> str:
    """Return a problem as text if the hidden states of a model without a language head are not causal or depend on
    other rows, else an empty string."""
    rows = draw_random_rows(model)
    with disable_fast_path(model):
        shorter = [get_decoder(model)(input_ids=row[None, :-2], use_cache=False).last_hidden_state[0] for row in rows]
    device = rows[0].device
    tokens = pad_rows([row.tolist() for row in rows], 0, pad_left=True).to(device)
    mask = pad_rows([[1] * len(row) for row in rows], 0, pad_left=True).bool().to(device)
    together = compute_hidden_states(model, tokens, mask)
    scale = max(float(states.float().abs().mean()) for states in shorter)
    distance = max(
        compute_mean_distance(states[-len(row) : -2].float(), alone.float())
        for states, row, alone in zip(together, rows, shorter, strict=True)
    )
    return "" if distance / scale <= choose_tolerance(model) else "it reads ahead, or rows change each other"


def draw_random_rows(model: Any) -> list[Tensor]:
    """Return rows of random token ids with the lengths in `ROWS`, the same for every model with this vocabulary
    size."""
    embedding = unwrap_model(model).get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, embedding.weight.shape[0], (length,), generator=generator) for _, length in ROWS]
    return [row.to(embedding.weight.device) for row in ids]


def choose_tolerance(model: Any) -> float:
    """Return the difference of logprobs in nats that counts as rounding for a model's dtype."""
    return EXACT if next(p for p in model.parameters() if p.is_floating_point()).dtype == torch.float32 else ROUNDED


def compute_mean_distance(a: Tensor, b: Tensor) -> float:
    """Return the mean absolute difference of two tensors, or infinity if it is NaN."""
    return float((a - b).abs().mean().nan_to_num(torch.inf))
