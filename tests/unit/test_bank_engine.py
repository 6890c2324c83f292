"""Rollouts by the bank engine equal those of the training model, from snapshots of its adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from serving_engines import draw_prompt, run_requests
from tiny_roles import FP32, PAD, PROMPTS, STOPS, World, add_noise
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

from align.core.errors import InputError
from align.core.types import Rollout
from align.models.actors import AdapterPool, ModelActor
from align.models.adapters import add_new_adapter
from align.models.base import find_base
from align.models.forward import compute_response_logprobs
from align.models.lora import Lora
from align.rollout.hf import HfEngine
from align.rollout.multi_adapter import BankEngine
from align.rollout.serving_engine import Request, SamplingParams
from align.run import Base

SEEDS = range(len(PROMPTS))


@pytest.fixture(params=["lora", "qlora"])
def method(request: pytest.FixtureRequest) -> str:
    return request.param


def load_engine(world: World, method: str, **options: Any) -> BankEngine:
    engine = BankEngine(STOPS, PAD, 12, **options)
    engine.load(world.base, method, FP32)
    return engine


def create_actor(world: World, method: str) -> tuple[Any, ModelActor]:
    model = add_new_adapter(world.load(method), Lora(4, 8)).eval()
    torch.manual_seed(5)
    add_noise(model)
    return model, ModelActor(model, "default")


def test_it_samples_what_the_model_samples(world: World, method: str):
    model, actor = create_actor(world, method)
    bank = load_engine(world, method, batch_size=4, temperature=0.7)
    try:
        bank.sync(actor)
        rollout = bank.generate(PROMPTS, actor, SEEDS)
        expected = HfEngine(STOPS, PAD, 12, 0.7).generate(PROMPTS, actor, SEEDS)
        for name in ("tokens_BS", "mask_BS", "ended_B"):
            assert torch.equal(getattr(rollout, name), getattr(expected, name))
        assert_close(rollout.logprobs_BT, expected.logprobs_BT, atol=1e-4, rtol=0)
        assert_close(rollout.logprobs_BT, compute_response_logprobs(model, rollout, 0.7)[0].detach(), atol=1e-4, rtol=0)
        # A row's logprobs do not depend on the rows beside it, to the bit.
        reversed_rollout = bank.generate(PROMPTS[::-1], actor, SEEDS[::-1])
        for row, reversed_row in zip(range(len(PROMPTS)), reversed(range(len(PROMPTS))), strict=True):
            count = int(rollout.response_mask_BT[row].sum())
            assert rollout.logprobs_BT is not None
            assert reversed_rollout.logprobs_BT is not None
            assert torch.equal(rollout.logprobs_BT[row, :count], reversed_rollout.logprobs_BT[reversed_row, :count])
    finally:
        bank.close()


def test_it_answers_with_the_weights_of_the_last_sync(world: World):
    model, actor = create_actor(world, "lora")
    bank = load_engine(world, "lora")
    try:
        bank.sync(actor)
        rollout_before = bank.generate(PROMPTS, actor, SEEDS)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    weight.mul_(1.5)
        assert torch.equal(bank.generate(PROMPTS, actor, SEEDS).tokens_BS, rollout_before.tokens_BS)
        bank.sync(actor)
        rollout_after = bank.generate(PROMPTS, actor, SEEDS)
        expected = HfEngine(STOPS, PAD, 12).generate(PROMPTS, actor, SEEDS)
        assert torch.equal(rollout_after.tokens_BS, expected.tokens_BS)
        assert not torch.equal(rollout_after.tokens_BS, rollout_before.tokens_BS)
        bank.batch.step()
        assert len(bank.batch.decoder.bank.units) == 1  # the old snapshot is evicted
        bank.sync(actor)
        assert len(bank.batch.known.by_digest) == 1
    finally:
        bank.close()
    assert not Path(bank.folder.name).exists()


def test_each_row_is_answered_by_whom_it_names(world: World, tmp_path: Path):
    pool = AdapterPool(world.load("lora"))
    actors = [pool.actor(), pool.actor(pool.add(world.init))]
    _, third_actor = create_actor(world, "lora")
    third_actor.save(tmp_path / "c", world.base)
    actors.append(pool.actor(pool.add(tmp_path / "c")))
    row_actors = [actors[i % 3] for i in range(len(PROMPTS))]
    bank = load_engine(world, "lora", resident=2)
    try:
        rollout = bank.generate(PROMPTS, row_actors, SEEDS)
        expected = HfEngine(STOPS, PAD, 12).generate(PROMPTS, row_actors, SEEDS)
        assert torch.equal(rollout.tokens_BS, expected.tokens_BS)
        with pytest.raises(ValueError, match="5 actors for 6 prompts"):
            bank.generate(PROMPTS, row_actors[:5], SEEDS)
    finally:
        bank.close()


def test_a_model_off_the_fast_path_is_refused(tmp_path: Path, tiny_tokenizer: Any):
    GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=2)).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(InputError, match=r"rollout\.engine=bank: gpt2 is not on the fast path"):
        BankEngine(STOPS, PAD, 12).load(replace(find_base(str(tmp_path / "gpt2")), id="gpt2"), "lora", FP32)


def test_a_policy_of_every_weight_is_refused(world: World):
    class Whole(ModelActor):
        @property
        def is_bare_base(self) -> bool:
            return False

        def save(self, folder: Path, base: Base) -> None:
            self.model.save_pretrained(folder)

    bank = load_engine(world, "lora")
    try:
        with pytest.raises(InputError, match=r"rollout\.engine=bank: answers by adapters alone"):
            bank.sync(Whole(world.load("lora")))
    finally:
        bank.close()


@pytest.mark.parametrize("length", [3, 64, 100])
def test_a_reward_model_scores_as_where_it_was_trained(world: World, method: str, length: int):
    bank = load_engine(world, method)
    try:
        digest = bank.batch.register(world.reward)
        policy = bank.batch.register(world.init)
        ids = draw_prompt(length)
        (scored_output,) = run_requests(bank.batch, [Request(ids, SamplingParams(0), digest, scored=True)])
        roles = world.roles(method)
        tokens = torch.tensor([ids])
        rollout = Rollout(tokens, torch.ones_like(tokens, dtype=torch.bool), length - 1, torch.tensor([True]))
        assert scored_output.outputs[0].score == pytest.approx(float(roles.scores(rollout, 0)), abs=1e-4)
        assert (scored_output.reason, scored_output.ids) == ("length", [])
        policy_requests = [Request(draw_prompt(9, i), SamplingParams(4), policy) for i in range(3)]
        second_output = run_requests(
            bank.batch, [*policy_requests, Request(ids, SamplingParams(0), digest, scored=True)], every=1
        )[-1]
        assert second_output.outputs[0].score == scored_output.outputs[0].score
        for adapter, scored, problem in ((policy, True, "is no reward model"), (digest, False, "generates no answers")):
            (refused,) = run_requests(bank.batch, [Request(ids, SamplingParams(2), adapter, scored=scored)])
            assert isinstance(refused.error, InputError)
            assert problem in str(refused.error)
    finally:
        bank.close()
