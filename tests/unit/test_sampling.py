"""Sampling one token per row: each row has its own settings and random number, independent of other rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_engines import build_sampling_params
from torch import Tensor
from torch.testing import assert_close

from align.ops.philox import draw_uniforms
from align.rollout.serving_engine import (
    SamplingParams,
    Token,
    draw_uniform_numbers,
    sample_tokens,
    score_prompt_tokens,
    zero_outside_nucleus,
)

V = 100


def draw_logits(seed: int, rows: int = 1) -> Tensor:
    return 3 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


def sample_token(
    row_V: Tensor, params: SamplingParams, number: float = 0.5, allowed: np.ndarray | None = None
) -> Token:
    (token,) = sample_tokens(row_V[None], [params], [number], [allowed])
    assert token is not None
    return token


def test_at_temperature_0_the_likeliest_is_taken():
    row = draw_logits(0)[0]
    assert sample_token(row, build_sampling_params(temperature=0)).id == int(row.argmax())
    tied = torch.zeros(V)
    assert (
        len({sample_token(tied, build_sampling_params(temperature=0), number).id for number in (0.0, 0.5, 0.99)}) == 1
    )


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8), (1.0, 0.3)])
def test_tokens_come_as_often_as_they_should(temperature: float, top_p: float):
    """Each token's share is its probability, up to two draws, if the random numbers are evenly spaced."""
    row = draw_logits(1)[0]
    count = 4000
    params = build_sampling_params(temperature=temperature, top_p=top_p)
    numbers = [(i + 0.5) / count for i in range(count)]
    tokens = sample_tokens(row.expand(count, V), [params] * count, numbers, [None] * count)
    share = torch.bincount(torch.tensor([token.id for token in tokens if token]), minlength=V) / count
    chances = (row / temperature).softmax(-1)
    kept = set()
    total = 0.0
    for id in chances.argsort(descending=True).tolist():  # by hand
        if total >= top_p:
            break
        kept.add(id)
        total += float(chances[id])
    expected = torch.tensor([float(chances[i]) / total if i in kept else 0.0 for i in range(V)])
    assert_close(share, expected, atol=2 / count, rtol=0)


def test_the_nucleus_is_the_smallest_set():
    chances = torch.tensor([0.1, 0.4, 0.3, 0.2])
    for top_p, kept in ((0.35, [1]), (0.4, [1]), (0.41, [1, 2]), (0.7, [1, 2]), (0.71, [1, 2, 3]), (1e-9, [1])):
        assert zero_outside_nucleus(chances, top_p).nonzero().flatten().tolist() == kept
    assert zero_outside_nucleus(torch.full((4,), 0.25), 0.5).nonzero().flatten().tolist() == [0, 1]  # ties by place


ROWS = st.tuples(st.integers(0, 9), st.sampled_from((0.0, 0.7, 1.0)), st.sampled_from((1.0, 0.9)), st.floats(0, 0.999))


@settings(max_examples=40)
@given(st.lists(ROWS, min_size=1, max_size=12))
def test_a_row_is_what_it_is_alone(rows: Sequence[tuple[int, float, float, float]]):
    table = torch.cat([draw_logits(seed) for seed, *_ in rows])
    params = [build_sampling_params(temperature=t, top_p=p, logprobs=3) for _, t, p, _ in rows]
    numbers = [number for *_, number in rows]
    allowed = [np.arange(V) % 3 == 0 if seed % 2 else None for seed, *_ in rows]
    tokens = sample_tokens(table, params, numbers, allowed)
    for i, token in enumerate(tokens):
        assert token == sample_tokens(table[i : i + 1], params[i : i + 1], numbers[i : i + 1], allowed[i : i + 1])[0]


def test_what_is_not_allowed_never_comes():
    row = draw_logits(2)[0]
    allowed = np.isin(np.arange(V), (7, 50, 99))
    for temperature in (0, 1):
        token_ids = {
            sample_token(row, build_sampling_params(temperature=temperature), i / 50, allowed).id for i in range(50)
        }
        assert token_ids <= {7, 50, 99}
    assert len(token_ids) > 1


def test_logprobs_are_the_models_own_or_those_that_were_drawn_from():
    row = draw_logits(3)[0]
    allowed = np.arange(V) < 20
    for temperature in (0, 0.5, 1):
        token = sample_token(row, build_sampling_params(temperature=temperature, logprobs=4), 0.3, allowed)
        assert token.logprob == pytest.approx(float(row.log_softmax(-1)[token.id]), abs=1e-6)
        best = row.log_softmax(-1).topk(4)
        assert [id for id, _ in token.top] == best.indices.tolist()
        assert [logprob for _, logprob in token.top] == pytest.approx(best.values.tolist(), abs=1e-6)
    processed_token = sample_token(
        row, build_sampling_params(temperature=0.5, logprobs=0, processed_logprobs=True), 0.3, allowed
    )
    assert processed_token.logprob == pytest.approx(
        float((row[:20] / 0.5).log_softmax(-1)[processed_token.id]), abs=1e-6
    )
    assert processed_token.top == ()
    assert math.isnan(sample_token(row, SamplingParams(3)).logprob)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_without_a_distribution_is_none_of_the_others(bad: float):
    table = draw_logits(4, 3)
    table[1, 5] = bad
    for temperature in (0, 1):
        tokens = sample_tokens(table, [build_sampling_params(temperature=temperature)] * 3, [0.5] * 3, [None] * 3)
        assert [token is None for token in tokens] == [False, True, False]


def test_numbers_are_of_the_seed_and_the_position():
    numbers = draw_uniform_numbers(build_sampling_params(20, seed=-5))
    assert numbers == draw_uniforms(torch.tensor([-5]), 20)[0].tolist()
    assert draw_uniform_numbers(build_sampling_params(5, seed=-5)) == numbers[:5]
    assert draw_uniform_numbers(build_sampling_params(20, temperature=0)) == []


def test_a_prompts_tokens_are_told_by_the_place_before():
    table = draw_logits(5, 4)
    tokens = score_prompt_tokens(table, [3, 1, 4, 1], 2)
    assert [token.id for token in tokens] == [3, 1, 4, 1]
    for token, row in zip(tokens, table, strict=True):
        assert token.logprob == pytest.approx(float(row.log_softmax(-1)[token.id]))
        assert len(token.top) == 2
