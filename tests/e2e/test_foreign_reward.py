"""A reward model on another base than the policy's: other widths, another vocabulary, another chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from workshop import Ready

from align.__main__ import main
from align.core.errors import InputError
from align.core.types import Conversation, Message, Rollout
from align.reward.build import load_reward_model
from align.reward.learned import LearnedReward
from align.run import load_artifact, read_manifest

CONTEXT = 192


class Other(NamedTuple):
    """The base, and the reward model's run on it."""

    base: Path
    reward: Path


@pytest.fixture(scope="module")
def other(ready: Ready, other_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Other:
    """Called `reward:other` among the runs that all tests share."""
    base = tmp_path_factory.mktemp("models") / "other"
    torch.manual_seed(5)
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    end = other_tokenizer.eos_token_id
    config = LlamaConfig(vocab_size=384, max_position_embeddings=CONTEXT, eos_token_id=end, **sizes)
    LlamaForCausalLM(config).save_pretrained(base)
    other_tokenizer.save_pretrained(base)
    words = [f"run.root={ready.root}", "run.name=other", "method=lora", "stage.lr=1e-2"]
    sft = ["stage=sft", "model=hub", f"model.path={base}", "stage.max_steps=2", "stage.eval_size=2"]
    assert main([*sft, *ready.data, *words]) == 0
    reward = ["stage=reward", "init=sft:other", "data.allow_simulated=true", "stage.batch_size=8", "stage.held_out=0.3"]
    assert main([*reward, *words]) == 0
    return Other(base, ready.root / "reward" / "other")


def plain_scores(other: Other, conversations: Sequence[Conversation], whole: Sequence[bool]) -> Tensor:
    """As whoever downloads the model would have it score: its own tokenizer and template, one row at a time, up to the
    token that ends the answer, or to its last one where it was cut."""
    tokenizer = AutoTokenizer.from_pretrained(other.base)
    model = AutoModelForSequenceClassification.from_pretrained(other.base, num_labels=1)
    model = PeftModel.from_pretrained(model, str(other.reward / "artifact")).eval()
    scores = []
    for conversation, ended in zip(conversations, whole, strict=True):
        text = tokenizer.apply_chat_template(conversation.as_dicts(), tokenize=False).removesuffix("\n")
        text = text if ended else text.removesuffix("</s>")
        with torch.no_grad():
            scores.append(model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, 0])
    return torch.stack(scores)


def test_ppo_scores_by_the_reward_models_own_tokenizer_and_template(
    ready: Ready, other: Other, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    score, calls = LearnedReward.score, []

    def noted(self: LearnedReward, conversations: Sequence[Conversation], rollout: Rollout | None = None) -> Tensor:
        scores = score(self, conversations, rollout)
        assert rollout is not None
        calls.append((self, conversations, rollout.ended_B.tolist(), scores))
        return scores

    monkeypatch.setattr(LearnedReward, "score", noted)
    words = [f"run.root={ready.root}", "init=sft:s", "reward.ref=reward:other", "stage.value_backbone=policy"]
    assert main([*ready.ppo, *words]) == 0
    folder = Path(capfd.readouterr().out.splitlines()[-1])
    assert len(calls) == 3  # the reference's answers, and those of two updates
    for scorer, conversations, ended, scores in calls:
        expected = plain_scores(other, conversations, ended)
        assert expected.std() > 0.05
        assert_close(scores, expected, atol=1e-5, rtol=0)
        assert not all(ended)
        whole = plain_scores(other, conversations, [True] * len(ended))
        assert_close(score(scorer, conversations), whole, atol=1e-5, rtol=0)
        assert (whole - expected).abs().max() > 1e-3

    policy = read_manifest(ready.root / "sft" / "s").base.digest
    assert read_manifest(folder).base.digest == policy != read_manifest(other.reward).base.digest


def test_a_conversation_longer_than_the_reward_models_context(other: Other):
    scorer = load_reward_model(
        load_artifact(other.reward / "artifact", "reward:other"), torch.device("cpu"), torch.float32, 4
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(other.base)
    room = CONTEXT - len(tokenizer("<ask>Hello?<say></s>")["input_ids"])

    def told(letters: int) -> Conversation:
        return Conversation((Message("user", "Hello?"), Message("assistant", "z" * letters)))

    assert scorer.score([told(room), told(1)]).isfinite().all()
    with pytest.raises(InputError, match=f"reward.ref=reward:other: reads {CONTEXT} tokens.*has {CONTEXT + 1}"):
        scorer.score([told(1), told(room + 1)])
