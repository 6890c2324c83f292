"""Rows that begin alike are computed once up to where they part, and nothing else of them changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_fastpath import FAMILIES, assert_same, fat, made, outcome
from test_fastpath_layers import one_by_one, random
from tiny_roles import PAD, PROMPTS, STOPS, AsItStands
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


def drawn(seed: int) -> tuple[Tensor, Tensor]:
    """Rows of few words, so that many begin alike, with padding anywhere."""
    draw = torch.Generator().manual_seed(seed)
    shape = tuple(int(torch.randint(1, most, (), generator=draw)) for most in (9, 7))
    mask = torch.rand(shape, generator=draw) < 0.3 + 0.7 * torch.rand((), generator=draw)
    mask[:, 0] |= ~mask.any(1)
    return torch.randint(0, 2, shape, generator=draw), mask


def prefixes(tokens: Tensor, mask: Tensor) -> list[tuple[int, ...]]:
    """What each real token is: its row up to itself."""
    rows = [row[real].tolist() for row, real in zip(tokens, mask, strict=True)]
    return [tuple(row[: t + 1]) for row in rows for t in range(len(row))]


@pytest.mark.parametrize("seed", range(200))
def test_tokens_with_the_same_before_them_are_one(seed: int):
    tokens, mask = drawn(seed)
    places = PackedIndex.build(mask, tokens)
    found = prefixes(tokens, mask)
    real = len(found)
    saved = real - len(set(found))
    if places.shared is None:
        assert saved < LEAST_SHARED * real
        assert torch.equal(places.real(tokens), tokens[mask])
        return
    assert saved >= LEAST_SHARED * real
    of, first = places.shared
    assert len({(prefix, int(number)) for prefix, number in zip(found, of, strict=True)}) == len(set(found))
    assert torch.equal(of[first], torch.arange(len(set(found))))
    x = random(len(first), 2, 3)
    assert torch.equal(places.rectangle(x)[mask], x[of])
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
    tokens, mask = drawn(seed)
    places = PackedIndex.build(mask, tokens)
    assert places.shared is not None, "this seed tests nothing"
    of, first = places.shared
    shapes = ((4, 6), (groups, 6), (groups, 6))
    q, k, v = (random(len(first), *shape, seed=i).requires_grad_() for i, shape in enumerate(shapes))
    with torch.no_grad():
        expected = one_by_one(q[of], k[of], v[of], mask.sum(1).tolist(), 0.3)[first]
        assert_close(causal_attention(q, k, v, places, 0.3), expected)
        assert_close(causal_attention_by_row(q, k, v, places, 0.3), expected)
    assert gradcheck(lambda a, b, c: causal_attention(a, b, c, places, 0.3), (q, k, v))
    assert gradcheck(lambda a, b, c: causal_attention_by_row(a, b, c, places, 0.3), (q, k, v))


# Whole decoders.


def grouped_rollout() -> Rollout:
    """Four answers to each of two prompts, one of which begins as the other does; one answer is a prefix of another."""
    prompts = [[11, 12, 13, 14, 15]] * 4 + [[11, 12, 13, 21, 22, 23, 24]] * 4
    answers = [[31], [31, 32, 33], [34, 35, 36, 37], [31, 32], [41, 42], [43], [41, 42], [44, 45, 46, 47, 48]]
    return rollout_from_answers(prompts, answers, PAD, CPU)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens that go through each layer."""
    counts = list[int]()
    real = llama.causal_attention
    monkeypatch.setattr(llama, "causal_attention", lambda *given: counts.append(len(given[0])) or real(*given))
    return counts


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_is_that_of_transformers_where_rows_begin_alike(family: str, computed: list[int]):
    assert_same(made(FAMILIES[family]), grouped_rollout())
    distinct = set(prefixes(grouped_rollout().tokens_BS, grouped_rollout().mask_BS))
    assert computed[:2] == [len(distinct)] * 2
    assert len(distinct) < grouped_rollout().mask_BS.sum() / 2


def test_every_weight_may_train_where_rows_begin_alike():
    assert_same(made(FAMILIES["qwen3"]).unload().requires_grad_(), grouped_rollout())


def test_equal_ids_at_other_positions_are_other_tokens():
    decoder = made(FAMILIES["qwen2"]).get_base_model().get_decoder()
    ids = torch.tensor([[11, 12, 13, 14]] * 3)
    mask = torch.ones(3, 4, dtype=torch.long)
    positions = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3], [0, 5, 9, 30]])
    with torch.no_grad():
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}
        found = decoder(**given).last_hidden_state
        expected = fat(decoder)(**given).last_hidden_state
    assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(found[0], found[2], atol=1e-3)


def test_layers_that_are_made_again_share_too():
    model = made(FAMILIES["qwen2"])
    once, gradients = outcome(model, grouped_rollout())
    for layer in model.get_base_model().get_decoder().layers:
        layer.gradient_checkpointing = True
    logprobs, again = outcome(model, grouped_rollout())
    assert torch.equal(logprobs, once)
    assert all(torch.equal(gradients[name], again[name]) for name in gradients)


def test_a_prompt_is_read_once_for_all_its_answers(computed: list[int]):
    """And what is drawn is what is drawn of each by itself."""
    model = made(FAMILIES["llama, grouped keys"])
    prompts = [prompt for prompt in PROMPTS for _ in range(5)]
    found = HfEngine(STOPS, PAD, 9).generate(prompts, AsItStands(model), range(len(prompts)))
    tokens = {tuple(prompt[: t + 1]) for prompt in PROMPTS for t in range(len(prompt))}
    assert computed[0] == len(tokens) < sum(map(len, prompts)) / 4
    for i, prompt in enumerate(prompts):
        alone: Any = HfEngine(STOPS, PAD, 9).generate([prompt], AsItStands(model), [i])
        answer = found.tokens_BS[i, found.prompt_width :][found.response_mask_BT[i]]
        assert answer.tolist() == alone.tokens_BS[0, len(prompt) :][alone.response_mask_BT[0]].tolist()


@pytest.mark.parametrize("family", ["llama, grouped keys", "qwen3"])
def test_in_bf16_many_rows_that_share_add_their_gradients_up_as_well_as_rows_by_themselves(
    family: str, monkeypatch: pytest.MonkeyPatch
):
    """Equal answers: every token is shared by all rows, and each row adds to its gradient."""
    model = made(FAMILIES[family])
    rows = 400
    same = rollout_from_answers([[11, 12, 13]] * rows, [[31, 32, 33]] * rows, PAD, CPU)
    exact = outcome(model, same)[1]
    model.bfloat16()
    shared = outcome(model, same)[1]
    monkeypatch.setattr(packed, "LEAST_SHARED", 2)
    apart = outcome(model, same)[1]

    def off(found: dict[str, Tensor]) -> float:
        """Relative to the gradient in fp32."""
        square = sum(float((found[name].float() - exact[name]).square().sum()) for name in exact)
        return (square / sum(float(exact[name].square().sum()) for name in exact)) ** 0.5

    assert 0 < off(apart) < 0.05
    assert off(shared) < 1.5 * off(apart)


def test_under_several_threads_a_gradient_has_the_same_bits_each_time():
    """Many rows with one beginning: several threads add to its tokens."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ids = torch.cat([torch.arange(60).expand(16, -1), torch.arange(320).view(16, 20) + 100], 1)
        places = packed.PackedIndex.build(torch.ones_like(ids, dtype=torch.bool), ids)
        assert places.shared is not None
        given = random(16, 80, 256, dtype=torch.float32)
        found = set[bytes]()
        for _ in range(50):
            x = torch.zeros(len(places.shared.first_N), 256, requires_grad=True)
            places.rectangle(x).backward(given)
            assert x.grad is not None
            found.add(x.grad.numpy().tobytes())
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1
