"""Greedy decoding up to a stop token or a stop condition: on the fast path and through `generate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from align.core.errors import NonFiniteLogits
from align.models.actors import ModelActor
from align.models.architectures import FAST, Route
from align.rollout import hf
from align.rollout.engine import extract_response_ids
from align.rollout.hf import HfEngine

PAD = 0
PROMPTS = [[1, 40, 41, 42, 43, 44, 45], [1, 50], [1, 60, 61, 62], [1, 50, 51], [1, 70, 71]] * 2
PLAIN = Route(False, False, False)


@pytest.fixture(params=[FAST, PLAIN], ids=["fast", "plain"])
def model(tiny_model: Path, request: pytest.FixtureRequest) -> Any:
    """The tiny model with larger weights, so that its answers do not repeat one token."""
    model: Any = LlamaForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(8)
    model.align_route = request.param
    return model.requires_grad_(False).eval()


def generate_without_stops(model: Any, tokens: int = 12) -> list[list[int]]:
    """Return the likeliest tokens by transformers alone, row by row, without a stop token."""
    completions = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, eos_token_id=None
        )
        completions.append(output[0, len(prompt) :].tolist())
    return completions


def generate_greedy_answers(
    model: Any, stop_ids: tuple[int, ...], ends: Any = (), size: int = 128
) -> tuple[list[list[int]], Any]:
    engine = HfEngine(stop_ids, PAD, 12, 0.0, size)
    rollout = engine.generate(PROMPTS, ModelActor(model), [0] * len(PROMPTS), ends)
    return extract_response_ids(rollout), rollout.ended_B.tolist()


class StopAfter:
    """A stop condition that ends a row after `most` tokens, and records the tokens that it was called with."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.ids = list[int]()

    def __call__(self, id: int) -> bool:
        self.ids.append(id)
        return len(self.ids) == self.most


@pytest.mark.parametrize("size", [1, 2, 128])
def test_at_temperature_0_each_token_is_the_likeliest(model: Any, size: int) -> None:
    expected = generate_without_stops(model)
    assert len({id for row in expected for id in row}) > 10
    assert generate_greedy_answers(model, (), size=size) == (expected, [False] * 10)


@pytest.mark.parametrize("size", [1, 2, 128])
def test_each_row_ends_where_it_is_told_to_and_hears_no_more(model: Any, size: int) -> None:
    expected = generate_without_stops(model)
    stops = [StopAfter(most) for most in (1, 4, 12, 99, 2, *[99] * 5)]  # a row that ends stays in its batch for a while
    stop = expected[3][6]
    cut_rows = [row[: stop_after.most] for row, stop_after in zip(expected, stops, strict=True)]
    expected_ids = [row[: row.index(stop) + 1] if stop in row else row for row in cut_rows]
    ids, ended_flags = generate_greedy_answers(model, (stop,), stops, size)
    assert ids == expected_ids
    assert [stop_after.ids for stop_after in stops] == [
        row if row[-1] != stop else stop_after.ids for row, stop_after in zip(ids, stops, strict=True)
    ]
    assert ended_flags == [
        stop in row or len(row) == stop_after.most for row, stop_after in zip(ids, stops, strict=True)
    ]
    assert ended_flags.count(True) >= 4


def test_no_step_is_made_behind_the_last_end(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_model).eval()
    steps = list[int]()
    states: Callable[..., Any] = hf.compute_next_states

    def count_rows(model: Any, tokens: Any, *more: Any) -> Any:
        steps.append(len(tokens))
        return states(model, tokens, *more)

    monkeypatch.setattr(hf, "compute_next_states", count_rows)
    generate_greedy_answers(model, (), [StopAfter(most) for most in (1, 2, 2, 3, 3) * 2])
    assert steps == [10, 8, 4]


def test_a_model_without_a_likeliest_token_says_so(tiny_model: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_model).eval()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteLogits):
        generate_greedy_answers(model, ())
