"""Log-likelihoods equal those of the model's logits, and do not depend on the other rows of a batch."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from align.data.chat.continuations import build_scored_row
from align.data.chat.encode import IGNORE_INDEX, EncodedRow
from align.evals.suite.likelihoods import choose_pass_width, compute_likelihoods
from align.models.base import find_base
from align.models.load import load_base

CPU = torch.device("cpu")
CONTEXT = 1200


def draw_scored_rows(vocabulary: int, count: int, longest: int) -> list[EncodedRow]:
    draw = random.Random(0)

    def draw_ids(max_length: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(draw.randint(1, max_length))]

    return [build_scored_row(draw_ids(longest), draw_ids(6)) for _ in range(count)]


@pytest.fixture(scope="module")
def pocket() -> Any:
    return load_base(find_base("pocket"), "lora", CPU, torch.float32).eval()


@pytest.fixture(scope="module")
def gpt2() -> Any:
    """A model on the plain path with learned positions."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=90, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("name", ["pocket", "gpt2"])
def test_they_are_what_the_models_own_logits_say(name: str, request: pytest.FixtureRequest) -> None:
    model: Any = request.getfixturevalue(name)
    rows = draw_scored_rows(90, 12, 30)
    likely = [int(model(torch.tensor([row.input_ids], device=CPU)).logits[0, -1].argmax()) for row in rows[:3]]
    rows += [build_scored_row(row.input_ids, [id]) for row, id in zip(rows, likely, strict=False)]
    rows.append(EncodedRow([1, 2, 3, 4, 5], [1, 2, IGNORE_INDEX, IGNORE_INDEX, 5]))
    for row, likelihood in zip(rows, compute_likelihoods(model, rows, 0, 64), strict=True):
        with torch.no_grad():
            logprobs = model(torch.tensor([row.input_ids], device=CPU)).logits[0].double().log_softmax(-1)
        places = [i for i in range(1, len(row.labels)) if row.labels[i] != IGNORE_INDEX]
        assert likelihood.logprob == pytest.approx(sum(float(logprobs[i - 1, row.labels[i]]) for i in places), abs=1e-4)
        assert likelihood.greedy == all(int(logprobs[i - 1].argmax()) == row.labels[i] for i in places)
    assert [likelihood.greedy for likelihood in compute_likelihoods(model, rows, 0, 64)[12:15]] == [True] * 3


def test_a_row_is_the_same_beside_any_others(pocket: Any) -> None:
    """Results are equal to the last bit in fp32."""
    rows = [
        *draw_scored_rows(4000, 56, 90),
        *(build_scored_row([7] * length, [9, 11]) for length in (300, 500, 511, 520, 700, 1000, 1100, 1197)),
    ]
    expected = [compute_likelihoods(pocket, [row], 0, CONTEXT)[0] for row in rows]
    for size in (2, 8, 32, 64):
        likelihoods = [
            likelihood
            for first in range(0, 64, size)
            for likelihood in compute_likelihoods(pocket, rows[first : first + size], 0, CONTEXT)
        ]
        assert likelihoods == expected, size


def test_the_width_of_a_pass_follows_from_the_rows_own_length() -> None:
    assert [choose_pass_width(tokens, 1000) for tokens in (1, 32, 33, 600, 1000)] == [32, 32, 64, 1000, 1000]
    assert choose_pass_width(5, 20) == 20  # a context may be short
