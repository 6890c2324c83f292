"""A reward model on the policy's base: scores equal those of training, and a chat template that differs is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_templates import PLAIN
from peft import PeftModel
from tiny_roles import CPU, FP32, World
from torch import Tensor
from torch.testing import assert_close

from align.config.compose import build_config, compose_tree
from align.config.scorers import LearnedReward, build_reward_spec
from align.core.errors import InputError
from align.core.types import Conversation, Message, Rollout
from align.data.chat.encode import Prompt, encode_prompts, find_stop_token_ids
from align.data.chat.template import CHATML
from align.models.forward import rollout_from_answers
from align.models.load import load_classifier, load_tokenizer
from align.reward.build import build_scorer_for_policy, require_same_template
from align.reward.scorer import Scorer
from align.run import Artifact

ASKED = [Conversation((Message("user", text),)) for text in ("Hello?", "I am tired. What about the rain?", "Why?")]
SAID = ("yes!", "I like the rain when you are tired!", "no")
OTHER = 300
"""A second token that the checkpoint lists as its EOS, as Llama 3 and Qwen 2.5 do."""


@pytest.fixture(scope="module")
def tokenizer(world: World) -> Any:
    return load_tokenizer(world.base)


def make_artifact(folder: Path) -> Artifact:
    return Artifact("reward:it", folder, "", None, whole=False)


def build_reward(world: World, tokenizer: Any) -> Scorer:
    models = [make_artifact(world.reward)]
    return build_scorer_for_policy(
        build_reward_spec(LearnedReward()), models, world.roles(), world.base, 2, FP32, tokenizer
    )


def make_rollout(tokenizer: Any, *ends: int) -> Rollout:
    """Build a rollout of the answers, each ended by one of these tokens."""
    prompts: list[Prompt] = encode_prompts(tokenizer, ASKED, 200)[0]
    answer_ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in SAID]
    rows = [[*ids, end] for ids, end in zip(answer_ids, ends, strict=True)]
    return rollout_from_answers([p.input_ids for p in prompts], rows, tokenizer.pad_token_id, CPU)


def compute_classifier_scores(world: World, rows: list[list[int]]) -> Tensor:
    """Compute the scores of the classifier that the reward was trained as, one row at a time."""
    model = PeftModel.from_pretrained(load_classifier(world.base, "qlora", CPU, FP32), str(world.reward)).eval()
    model.config.pad_token_id = None
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row])).logits[:, 0] for row in rows])


def test_whichever_token_ended_an_answer_the_score_is_that_of_the_training_row(world: World, tokenizer: Any):
    generation = type("Generation", (), {"eos_token_id": [tokenizer.eos_token_id, OTHER]})
    assert find_stop_token_ids(tokenizer, generation) == (tokenizer.eos_token_id, OTHER)
    conversations = [c.with_answer(text) for c, text in zip(ASKED, SAID, strict=True)]
    texts = [tokenizer.apply_chat_template(c.as_dicts(), tokenize=False) for c in conversations]
    expected = compute_classifier_scores(world, [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts])
    assert expected.std() > 0.1
    reward = build_reward(world, tokenizer)
    for ends in ([tokenizer.eos_token_id] * 3, [OTHER] * 3, [OTHER, tokenizer.eos_token_id, OTHER]):
        rollout = make_rollout(tokenizer, *ends)
        before = rollout.tokens_BS.clone()
        assert_close(reward.score(conversations, rollout), expected, atol=1e-5, rtol=0)
        assert torch.equal(rollout.tokens_BS, before)  # the sampled tokens are unchanged


def test_an_answer_that_was_cut_is_read_as_it_was_sampled(world: World, tokenizer: Any):
    cut = replace(make_rollout(tokenizer, OTHER, OTHER, OTHER), ended_B=torch.tensor([True, False, False]))
    rows = [t[m].tolist() for t, m in zip(cut.tokens_BS, cut.mask_BS, strict=True)]
    rows[0][-1] = tokenizer.eos_token_id
    assert_close(
        build_reward(world, tokenizer).score([], cut), compute_classifier_scores(world, rows), atol=1e-5, rtol=0
    )


def test_where_the_template_ends_no_turn_what_was_sampled_is_read(world: World):
    plain = load_tokenizer(world.base)
    plain.chat_template = PLAIN
    rollout = make_rollout(plain, OTHER, OTHER, OTHER)
    rows = [t[m].tolist() for t, m in zip(rollout.tokens_BS, rollout.mask_BS, strict=True)]
    assert_close(
        build_reward(world, plain).score([], rollout), compute_classifier_scores(world, rows), atol=1e-5, rtol=0
    )


# The same template.


@pytest.fixture
def folder(world: World, tokenizer: Any, tmp_path: Path) -> Path:
    """A reward model with the tokenizer that it was trained with."""
    folder = shutil.copytree(world.reward, tmp_path / "reward")
    tokenizer.save_pretrained(folder)
    return folder


def test_a_reward_model_of_another_template_is_refused(world: World, tokenizer: Any, folder: Path):
    config = build_config(
        compose_tree(["stage=ppo", "reward=ensemble", "reward.refs=['reward:a','reward:it']", "init=sft:s"])
    )
    reward = build_reward_spec(config.reward)
    require_same_template(reward, [make_artifact(folder)] * 2, world.base, tokenizer, config.init)
    chatml_tokenizer = load_tokenizer(world.base)
    chatml_tokenizer.chat_template = CHATML
    chatml_tokenizer.save_pretrained(shutil.copytree(folder, folder.with_name("other")))
    models = [make_artifact(folder), make_artifact(folder.with_name("other"))]
    with pytest.raises(InputError, match=r"reward\.refs\[1\]=reward:it: .*a chat template that differs.*init=sft:s"):
        require_same_template(reward, models, world.base, tokenizer, config.init)
    model_on_other_base = replace(models[1], base=replace(world.base, digest="another"))
    # A reward model on another base reads text by its own template.
    require_same_template(reward, [models[0], model_on_other_base], world.base, tokenizer, config.init)
    with pytest.raises(InputError, match=r"reward\.refs\[0\]"):
        require_same_template(
            reward, models, world.base, chatml_tokenizer, config.init
        )  # the policy's template decides


@pytest.mark.parametrize("kept", ["nothing", "no template"])
def test_a_folder_that_says_nothing_of_a_template_is_believed(world: World, tokenizer: Any, folder: Path, kept: str):
    for file in folder.glob("*chat_template*" if kept == "no template" else "*token*"):
        file.unlink()
    assert (folder / "tokenizer_config.json").is_file() == (kept == "no template")
    require_same_template(
        build_reward_spec(LearnedReward()), [make_artifact(folder)], world.base, tokenizer, "sft:latest"
    )
