"""Sampling: the right distribution, rows independent of their batch, and complete responses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, tensor
from torch.testing import assert_close
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from align.core.types import Rollout
from align.models.actors import ModelActor
from align.models.architectures import FAST, Route
from align.models.forward import compute_response_logprobs, pad_rows
from align.ppo.experience import Estimator, assemble_experience
from align.rollout.engine import decode_responses, derive_row_seeds, extract_response_ids
from align.rollout.hf import HfEngine, draw_tokens

PAD = 0
EOS = 2
PROMPTS = [[1, 40, 41, 42, 43, 44, 45], [1, 50], [1, 60, 61, 62], [1, 50], [1, 70, 71]]
PLAIN = Route(False, False, False)
STOPS = tuple(range(100, 150))  # enough of them that some rows stop early and some do not


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    """The tiny model with larger weights, whose distributions are far from uniform."""
    model = LlamaForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(8)
    return model.requires_grad_(False).eval()


def make_sampler(model: Any, **changes: Any) -> Callable[..., Rollout]:
    """Return a function from prompts and a seed to a rollout."""
    hf_engine = HfEngine(**({"stop_ids": STOPS, "pad_id": PAD, "max_new_tokens": 12} | changes))
    return lambda prompts, seed=0: hf_engine.generate(
        prompts, ModelActor(model), derive_row_seeds(range(len(prompts)), seed)
    )


def compute_next_logits(model: Any, ids: list[int]) -> Tensor:
    return model(torch.tensor([ids])).logits[0, -1]


def test_cold_samples_are_those_of_generate(model: Any):
    """At a temperature near 0 both take the likeliest token: this checks padding, positions, cache and stops."""
    tokens = pad_rows(PROMPTS, PAD, pad_left=True)
    mask = pad_rows([[1] * len(p) for p in PROMPTS], 0, pad_left=True)
    free = model.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=12, eos_token_id=None)
    stops = tuple(sorted({int(free[0, 7 + 3]), int(free[2, 7 + 6])}))
    expected = model.generate(
        tokens, attention_mask=mask, do_sample=False, max_new_tokens=12, eos_token_id=list(stops), pad_token_id=PAD
    )
    rollout = make_sampler(model, stop_ids=stops, temperature=1e-5)(PROMPTS)
    assert rollout.prompt_width == 7
    assert set(rollout.ended_B.tolist()) == {True, False}  # else this proves little
    assert torch.equal(rollout.tokens_BS, expected)


def test_samples_come_from_the_whole_softmax(model: Any):
    """E log p = −H only for samples of p itself: top-k, top-p or another temperature move the mean by far more."""
    prompt = PROMPTS[0]
    count = 4000
    rollout = make_sampler(model, max_new_tokens=1, temperature=0.7, batch_size=1000)([prompt] * count)
    log_p = (compute_next_logits(model, prompt) / 0.7).log_softmax(-1)
    sample_logprobs = log_p[rollout.response_BT[:, 0]]
    entropy = -(log_p.exp() * log_p).sum()
    assert abs(sample_logprobs.mean() + entropy) < 4 * sample_logprobs.std() / count**0.5
    frequency = rollout.response_BT.flatten().bincount(minlength=len(log_p)) / count
    assert (frequency - log_p.exp()).abs().max() < 4 * 0.5 / count**0.5
    assert rollout.response_BT.unique().numel() > 100


def test_generation_settings_of_the_checkpoint_have_no_influence(model: Any, monkeypatch: pytest.MonkeyPatch):
    plain = make_sampler(model)(PROMPTS)
    settings = GenerationConfig(do_sample=True, top_k=1, top_p=0.1, repetition_penalty=5.0, temperature=0.01)
    monkeypatch.setattr(model, "generation_config", settings)
    assert torch.equal(make_sampler(model)(PROMPTS).tokens_BS, plain.tokens_BS)


@pytest.mark.parametrize(("batch_size", "rows"), [(1, 20), (3, 20), (128, 20), (128, 7), (2, 7)])
def test_what_a_row_draws_is_a_function_of_its_seed_and_the_position(model: Any, batch_size: int, rows: int):
    """The draws at temperature 1 do not depend on the batch size, the order of rows or the other rows."""
    prompts = PROMPTS * 4
    seeds = derive_row_seeds(range(20), 3)
    responses = extract_response_ids(make_sampler(model)(prompts, 3))
    assert len({tuple(ids) for ids in responses}) > 15
    row_indices = torch.randperm(20, generator=torch.Generator().manual_seed(rows))[:rows].tolist()
    hf_engine = HfEngine(STOPS, PAD, 12, batch_size=batch_size)
    subset = hf_engine.generate([prompts[i] for i in row_indices], ModelActor(model), [seeds[i] for i in row_indices])
    assert extract_response_ids(subset) == [responses[i] for i in row_indices]
    shorter = HfEngine(STOPS, PAD, 5).generate(prompts, ModelActor(model), seeds)
    assert extract_response_ids(shorter) == [ids[:5] for ids in responses]


@pytest.mark.parametrize("pad_id", [PAD, STOPS[0]])
def test_a_row_ends_with_its_stop_token(model: Any, pad_id: int):
    rollout = make_sampler(model, pad_id=pad_id)(PROMPTS * 8)
    lengths = rollout.lengths_B.tolist()
    assert 1 < len(set(lengths)) <= 12
    assert set(rollout.ended_B.tolist()) == {True, False}
    for ids, mask, length, has_ended in zip(
        rollout.response_BT.tolist(), rollout.response_mask_BT.tolist(), lengths, rollout.ended_B.tolist(), strict=True
    ):
        assert mask == [t < length for t in range(len(mask))]  # False right behind the stop token
        assert [i in STOPS for i in ids[:length]] == [False] * (length - 1) + [has_ended]
        assert ids[length:] == [pad_id] * (len(ids) - length)
        assert has_ended or length == 12


def test_no_column_is_empty(model: Any):
    rollout = make_sampler(model, stop_ids=tuple(range(320)), max_new_tokens=9)(PROMPTS)
    assert rollout.response_BT.shape == (5, 1)
    assert rollout.ended_B.all()


def test_the_mode_of_the_model_is_left_as_it_was(model: Any):
    model.train()
    make_sampler(model, max_new_tokens=1)(PROMPTS[:1])
    assert model.training
    model.eval()
    make_sampler(model, max_new_tokens=1)(PROMPTS[:1])
    assert not model.training


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_do_not_depend_on_padding_or_company(model: Any, temperature: float):
    rollout = make_sampler(model, temperature=temperature)(PROMPTS)
    together, entropy = compute_response_logprobs(model, rollout, temperature)
    wide = Rollout(
        torch.nn.functional.pad(rollout.tokens_BS, (5, 3), value=7),
        torch.nn.functional.pad(rollout.mask_BS, (5, 3), value=False),
        rollout.prompt_width + 5,
        rollout.ended_B,
    )
    padded, _ = compute_response_logprobs(model, wide, temperature)
    assert_close(padded[:, :-3], together, atol=1e-5, rtol=0)
    assert (padded[:, -3:] == 0).all()
    for i, (prompt, response) in enumerate(zip(PROMPTS, extract_response_ids(rollout), strict=True)):
        log_p = (model(torch.tensor([prompt + response])).logits[0] / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
        count = len(response)
        assert_close(together[i, :count], log_p[torch.arange(count), response], atol=1e-5, rtol=0)
        assert_close(entropy[i, :count], -(log_p.exp() * log_p).sum(-1), atol=1e-5, rtol=0)
        assert (together[i, count:] == 0).all()
        alone, _ = compute_response_logprobs(model, rollout.rows(tensor([i])), temperature)
        assert_close(alone[0], together[i, :count], atol=1e-5, rtol=0)


@pytest.mark.parametrize("path", [FAST, PLAIN], ids=["fast", "plain"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_sampler_says_what_the_learner_finds(
    model: Any, monkeypatch: pytest.MonkeyPatch, temperature: float, path: Route
):
    """The sampler's logprobs equal those of a pass over the whole row, in row order for any batches."""
    monkeypatch.setattr(model, "align_route", path, raising=False)
    rollout = make_sampler(model, temperature=temperature, batch_size=3)(PROMPTS * 2)
    assert rollout.logprobs_BT is not None
    assert rollout.logprobs_BT.dtype == torch.float32
    assert (rollout.logprobs_BT[~rollout.response_mask_BT] == 0).all()
    learner, _ = compute_response_logprobs(model, rollout, temperature)
    assert learner.min() < -3
    assert_close(rollout.logprobs_BT, learner, atol=2e-5, rtol=0)
    assert abs(compute_sampler_kl(rollout, learner)) < 1e-9


def compute_sampler_kl(rollout: Rollout, learner_BT: Tensor) -> float:
    """Compute the KL to the sampler as PPO logs it."""
    zero_B = torch.zeros(len(rollout.ended_B))
    zero_BT = torch.zeros_like(learner_BT)
    _, figures = assemble_experience(
        rollout,
        zero_B,
        learner_BT,
        learner_BT,
        zero_BT,
        estimator=Estimator(),
        kl_coef=0.0,
        kl_estimator="k1",
        kl_in_reward=True,
    )
    return figures["sampler_kl"]


def test_the_distance_to_a_sampler_that_is_off_is_its_kl(model: Any):
    """A sampler at another temperature than the learner's: the mean is KL(sampler ‖ learner), known exactly here."""
    prompt = PROMPTS[0]
    count = 4000
    rollout = make_sampler(model, max_new_tokens=1, temperature=0.7, batch_size=1000)([prompt] * count)
    sampler, learner = ((compute_next_logits(model, prompt) / t).log_softmax(-1) for t in (0.7, 1.0))
    exact = float((sampler.exp() * (sampler - learner)).sum())
    learner_logprobs = learner[rollout.response_BT]
    log_ratio = sampler[rollout.response_BT] - learner_logprobs
    spread = float(((-log_ratio).expm1() + log_ratio).std()) / count**0.5
    assert exact > 0.05
    assert spread < exact / 20
    assert compute_sampler_kl(rollout, learner_logprobs) == pytest.approx(exact, abs=4 * spread)


def test_positions_count_real_tokens_only():
    """Rotary positions are relative and would hide a shift: this model has learned, absolute ones."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=64, n_embd=32, n_layer=1, n_head=2)).eval()
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(50)
        rollout = make_sampler(model, temperature=1e-5)(PROMPTS)
        together, _ = compute_response_logprobs(model, rollout, 1.0)
        for i, prompt in enumerate(PROMPTS):
            single = make_sampler(model, temperature=1e-5)([prompt])
            assert extract_response_ids(rollout)[i] == extract_response_ids(single)[0]
            alone, _ = compute_response_logprobs(model, rollout.rows(tensor([i])), 1.0)
            assert_close(together[i, : alone.shape[1]], alone[0], atol=1e-5, rtol=0)


# Columns: two of padding, P = 3; the responses have 3, 1 and 2 tokens.
TOKENS = tensor([[0, 0, 5, 6, 7, 2], [0, 3, 4, 2, 0, 0], [8, 9, 5, 6, 7, 0]])
MASK = tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]).bool()
ROLLOUT = Rollout(TOKENS, MASK, 3, tensor([True, True, False]))


@pytest.mark.parametrize(
    ("index", "columns", "width"),
    [
        (tensor([0]), slice(2, 6), 1),
        (tensor([1]), slice(1, 4), 2),
        (tensor([2, 1]), slice(0, 5), 3),
        (slice(0, 2), slice(1, 6), 2),
    ],
)
def test_rows_lose_the_columns_that_only_pad_the_others(index: Any, columns: slice, width: int):
    selected = ROLLOUT.rows(index)
    assert torch.equal(selected.tokens_BS, TOKENS[index][:, columns])
    assert torch.equal(selected.mask_BS, MASK[index][:, columns])
    assert torch.equal(selected.ended_B, ROLLOUT.ended_B[index])
    assert selected.prompt_width == width
    assert torch.equal(selected.lengths_B, ROLLOUT.lengths_B[index])
    assert selected.logprobs_BT is None
    logprobs = replace(ROLLOUT, logprobs_BT=TOKENS[:, 3:].float()).rows(index).logprobs_BT
    assert logprobs is not None
    assert torch.equal(logprobs, selected.response_BT.float())


def test_logprobs_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="logprobs"):
        replace(ROLLOUT, logprobs_BT=torch.zeros(3, 6))


def test_texts_lose_the_stop_token_and_nothing_else(tiny_tokenizer: Any):
    hello = tiny_tokenizer("hello!", add_special_tokens=False)["input_ids"]
    bang = tiny_tokenizer("!", add_special_tokens=False)["input_ids"]
    rows = [[*hello, EOS], hello, [*hello, *bang]]
    tokens = pad_rows([[1, *row] for row in rows], PAD)
    mask = pad_rows([[1] * (1 + len(row)) for row in rows], 0).bool()
    # `!` stops the third row: an ordinary token may be what ends a turn.
    rollout = Rollout(tokens, mask, 1, tensor([True, False, True]))
    assert decode_responses(rollout, tiny_tokenizer) == ["hello!"] * 3


def test_draws_by_blocks_are_draws_by_the_whole_sum():
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(400, 1000, generator=generator) ** 8 * (torch.rand(400, 1000, generator=generator) < 0.3)
    rows[0] = 0
    rows[1] = 0
    rows[0, 999] = 1
    rows[1, 64] = 1
    cumulative = rows.double().cumsum(-1)
    uniform = torch.rand(400, generator=generator, dtype=torch.double)
    expected = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).squeeze(-1)
    token_ids = draw_tokens(rows, uniform)
    assert torch.equal(token_ids, expected)
    assert (rows.gather(1, token_ids[:, None]) > 0).all()


@pytest.mark.parametrize("drop_below", [0.0, 0.5, 1.0])
def test_when_finished_rows_are_dropped_changes_nothing(model: Any, monkeypatch: pytest.MonkeyPatch, drop_below: float):
    """The cache keeps the unfinished rows in order if finished rows are dropped never, at half or at once."""
    monkeypatch.setattr("align.rollout.hf.DROP_BELOW", drop_below)
    free = make_sampler(model, stop_ids=(), temperature=1e-5)(PROMPTS).response_BT
    stops = tuple({int(free[0, 3]), int(free[2, 6]), int(free[4, 8])})
    together = make_sampler(model, stop_ids=stops, temperature=1e-5)(PROMPTS)
    assert len(set(together.lengths_B.tolist())) >= 3
    for row, prompt in enumerate(PROMPTS):
        alone = make_sampler(model, stop_ids=stops, temperature=1e-5)([prompt])
        assert extract_response_ids(alone)[0] == extract_response_ids(together)[row]
        assert alone.ended_B[0] == together.ended_B[row]
