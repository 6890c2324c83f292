"""Shared prefixes of rows: they are computed once, and outputs and gradients stay the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_fastpath import FAMILIES, assert_same, build_noisy_model, fat, outcome
from test_fastpath_layers import attend_token_by_token, random
from tiny_roles import PAD, PROMPTS, STOPS, UnchangedModelActor
from torch import Tensor
from torch.autograd import gradcheck
from torch.testing import assert_close

from align.core.types import Rollout
from align.models.fastpath import llama, packed
from align.models.fastpath.layers import causal_attention, causal_attention_by_row
from align.models.fastpath.packed import LEAST_SHARED, PackedIndex
from align.models.forward import rollout_from_answers
from align.rollout.hf import HfEngine

CPU = torch.device("cpu")


def draw_token_rows(seed: int) -> tuple[Tensor, Tensor]:
    """Draw rows of two token ids, so that many share a prefix, with padding at random positions."""
    generator = torch.Generator().manual_seed(seed)
    shape = tuple(int(torch.randint(1, limit, (), generator=generator)) for limit in (9, 7))
    mask = torch.rand(shape, generator=generator) < 0.3 + 0.7 * torch.rand((), generator=generator)
    mask[:, 0] |= ~mask.any(1)
    return torch.randint(0, 2, shape, generator=generator), mask


def list_prefixes(tokens: Tensor, mask: Tensor) -> list[tuple[int, ...]]:
    """Return the prefix of each real token: the real tokens of its row up to itself."""
    rows = [row[real_tokens].tolist() for row, real_tokens in zip(tokens, mask, strict=True)]
    return [tuple(row[: t + 1]) for row in rows for t in range(len(row))]


@pytest.mark.parametrize("seed", range(200))
def test_tokens_with_the_same_before_them_are_one(seed: int):
    tokens, mask = draw_token_rows(seed)
    places = PackedIndex.build(mask, tokens)
    token_prefixes = list_prefixes(tokens, mask)
    real_count = len(token_prefixes)
    saved = real_count - len(set(token_prefixes))
    if places.shared is None:
        assert saved < LEAST_SHARED * real_count
        assert torch.equal(places.real(tokens), tokens[mask])
        return
    assert saved >= LEAST_SHARED * real_count
    distinct_ids, first_places = places.shared
    assert len({(prefix, int(number)) for prefix, number in zip(token_prefixes, distinct_ids, strict=True)}) == len(
        set(token_prefixes)
    )
    assert torch.equal(distinct_ids[first_places], torch.arange(len(set(token_prefixes))))
    x = random(len(first_places), 2, 3)
    assert torch.equal(places.rectangle(x)[mask], x[distinct_ids])
    assert not places.rectangle(x)[~mask].any()
    assert torch.equal(places.real(places.rectangle(x[:, 0, 0])), x[:, 0, 0])
    assert torch.equal(places.reduce(places.from_groups(places.to_groups(places.expand(x), 2), 2)), x)
    grouped = places.to_groups(places.expand(x), 2)
    y = random(*grouped.shape, seed=1)
    flat = places.from_groups(y, 2)
    assert_close((grouped * y).sum(), (x * places.reduce_by_sum(flat)).sum())
    grouped_once = places.to_groups(places.expand_once(x), 2)
    assert_close((grouped_once * y).sum(), (x * places.reduce(flat)).sum())


def test_what_differs_in_anything_that_is_told_is_not_shared():
    mask = torch.ones(2, 4, dtype=torch.bool)
    ids = torch.tensor([[7, 7, 7, 1], [7, 7, 7, 2]])
    assert PackedIndex.build(mask).shared is None
    assert PackedIndex.build(mask, ids, torch.tensor([[0, 1, 2, 3], [3, 4, 5, 6]])).shared is None
    shared = PackedIndex.build(mask, ids, torch.tensor([[0, 1, 2, 3], [0, 1, 5, 6]])).shared
    assert shared is not None
    assert len(shared.first_N) == 6  # two tokens of eight


@pytest.mark.parametrize("seed", [3, 5, 8])
@pytest.mark.parametrize("groups", [1, 2])
def test_attention_over_shared_rows(seed: int, groups: int):
    tokens, mask = draw_token_rows(seed)
    places = PackedIndex.build(mask, tokens)
    assert places.shared is not None, "this seed tests nothing"
    distinct_ids, first_places = places.shared
    shapes = ((4, 6), (groups, 6), (groups, 6))
    q, k, v = (random(len(first_places), *shape, seed=i).requires_grad_() for i, shape in enumerate(shapes))
    with torch.no_grad():
        expected = attend_token_by_token(q[distinct_ids], k[distinct_ids], v[distinct_ids], mask.sum(1).tolist(), 0.3)[
            first_places
        ]
        assert_close(causal_attention(q, k, v, places, 0.3), expected)
        assert_close(causal_attention_by_row(q, k, v, places, 0.3), expected)
    assert gradcheck(lambda a, b, c: causal_attention(a, b, c, places, 0.3), (q, k, v))
    assert gradcheck(lambda a, b, c: causal_attention_by_row(a, b, c, places, 0.3), (q, k, v))


# Whole decoders.


def build_grouped_rollout() -> Rollout:
    """Build four answers to each of two prompts. The prompts share a prefix, and one answer is a prefix of another."""
    prompts = [[11, 12, 13, 14, 15]] * 4 + [[11, 12, 13, 21, 22, 23, 24]] * 4
    answers = [[31], [31, 32, 33], [34, 35, 36, 37], [31, 32], [41, 42], [43], [41, 42], [44, 45, 46, 47, 48]]
    return rollout_from_answers(prompts, answers, PAD, CPU)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens that each layer computes, in order of the calls."""
    counts = list[int]()
    causal = llama.causal_attention
    monkeypatch.setattr(llama, "causal_attention", lambda *args: counts.append(len(args[0])) or causal(*args))
    return counts


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_is_that_of_transformers_where_rows_begin_alike(family: str, computed: list[int]):
    assert_same(build_noisy_model(FAMILIES[family]), build_grouped_rollout())
    distinct = set(list_prefixes(build_grouped_rollout().tokens_BS, build_grouped_rollout().mask_BS))
    assert computed[:2] == [len(distinct)] * 2
    assert len(distinct) < build_grouped_rollout().mask_BS.sum() / 2


def test_every_weight_may_train_where_rows_begin_alike():
    assert_same(build_noisy_model(FAMILIES["qwen3"]).unload().requires_grad_(), build_grouped_rollout())


def test_equal_ids_at_other_positions_are_other_tokens():
    decoder = build_noisy_model(FAMILIES["qwen2"]).get_base_model().get_decoder()
    ids = torch.tensor([[11, 12, 13, 14]] * 3)
    mask = torch.ones(3, 4, dtype=torch.long)
    positions = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3], [0, 5, 9, 30]])
    with torch.no_grad():
        kwargs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}
        hidden = decoder(**kwargs).last_hidden_state
        expected = fat(decoder)(**kwargs).last_hidden_state
    assert_close(hidden, expected, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(hidden[0], hidden[2], atol=1e-3)


def test_layers_that_are_made_again_share_too():
    model = build_noisy_model(FAMILIES["qwen2"])
    expected, gradients = outcome(model, build_grouped_rollout())
    for layer in model.get_base_model().get_decoder().layers:
        layer.gradient_checkpointing = True
    logprobs, recomputed_gradients = outcome(model, build_grouped_rollout())
    assert torch.equal(logprobs, expected)
    assert all(torch.equal(gradients[name], recomputed_gradients[name]) for name in gradients)


def test_a_prompt_is_read_once_for_all_its_answers(computed: list[int]):
    """Each answer is also the one that is sampled for its prompt alone."""
    model = build_noisy_model(FAMILIES["llama, grouped keys"])
    prompts = [prompt for prompt in PROMPTS for _ in range(5)]
    rollout = HfEngine(STOPS, PAD, 9).generate(prompts, UnchangedModelActor(model), range(len(prompts)))
    tokens = {tuple(prompt[: t + 1]) for prompt in PROMPTS for t in range(len(prompt))}
    assert computed[0] == len(tokens) < sum(map(len, prompts)) / 4
    for i, prompt in enumerate(prompts):
        single_rollout: Any = HfEngine(STOPS, PAD, 9).generate([prompt], UnchangedModelActor(model), [i])
        answer = rollout.tokens_BS[i, rollout.prompt_width :][rollout.response_mask_BT[i]]
        assert (
            answer.tolist() == single_rollout.tokens_BS[0, len(prompt) :][single_rollout.response_mask_BT[0]].tolist()
        )


@pytest.mark.parametrize("family", ["llama, grouped keys", "qwen3"])
def test_in_bf16_many_rows_that_share_add_their_gradients_up_as_well_as_rows_by_themselves(
    family: str, monkeypatch: pytest.MonkeyPatch
):
    """Equal answers: every token is shared by all rows, and each row adds to its gradient."""
    model = build_noisy_model(FAMILIES[family])
    rows = 400
    rollout = rollout_from_answers([[11, 12, 13]] * rows, [[31, 32, 33]] * rows, PAD, CPU)
    exact = outcome(model, rollout)[1]
    model.bfloat16()
    shared = outcome(model, rollout)[1]
    monkeypatch.setattr(packed, "LEAST_SHARED", 2)
    unshared = outcome(model, rollout)[1]

    def relative_error(gradients: dict[str, Tensor]) -> float:
        """Return the relative error against the gradient in fp32."""
        square = sum(float((gradients[name].float() - exact[name]).square().sum()) for name in exact)
        return (square / sum(float(exact[name].square().sum()) for name in exact)) ** 0.5

    assert 0 < relative_error(unshared) < 0.05
    assert relative_error(shared) < 1.5 * relative_error(unshared)


def test_under_several_threads_a_gradient_has_the_same_bits_each_time():
    """Several threads add to the gradient of a prefix that many rows share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ids = torch.cat([torch.arange(60).expand(16, -1), torch.arange(320).view(16, 20) + 100], 1)
        places = packed.PackedIndex.build(torch.ones_like(ids, dtype=torch.bool), ids)
        assert places.shared is not None
        output_gradient = random(16, 80, 256, dtype=torch.float32)
        gradient_bytes = set[bytes]()
        for _ in range(50):
            x = torch.zeros(len(places.shared.first_N), 256, requires_grad=True)
            places.rectangle(x).backward(output_gradient)
            assert x.grad is not None
            gradient_bytes.add(x.grad.numpy().tobytes())
    finally:
        torch.set_num_threads(threads)
    assert len(gradient_bytes) == 1
