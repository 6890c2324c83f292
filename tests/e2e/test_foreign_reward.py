"""A reward model on another base than the policy's: other widths, another vocabulary, another chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from stage_commands import Ready
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from align.__main__ import main
from align.core.errors import InputError
from align.core.types import Conversation, Message, Rollout
from align.reward.build import load_reward_model
from align.reward.learned import LearnedReward
from align.run import load_artifact, read_manifest

CONTEXT = 192


class ForeignModel(NamedTuple):
    """A base, and the run of a reward model on it."""

    base: Path
    reward: Path


@pytest.fixture(scope="module")
def other(ready: Ready, other_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> ForeignModel:
    """A reward model on another base, `reward:other` among the runs that all tests share."""
    base = tmp_path_factory.mktemp("models") / "other"
    torch.manual_seed(5)
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    end = other_tokenizer.eos_token_id
    config = LlamaConfig(vocab_size=384, max_position_embeddings=CONTEXT, eos_token_id=end, **sizes)
    LlamaForCausalLM(config).save_pretrained(base)
    other_tokenizer.save_pretrained(base)
    arguments = [f"run.root={ready.root}", "run.name=other", "method=lora", "stage.lr=1e-2"]
    sft = ["stage=sft", "model=hub", f"model.path={base}", "stage.max_steps=2", "stage.eval_size=2"]
    assert main([*sft, *ready.data, *arguments]) == 0
    reward = ["stage=reward", "init=sft:other", "data.allow_simulated=true", "stage.batch_size=8", "stage.held_out=0.3"]
    assert main([*reward, *arguments]) == 0
    return ForeignModel(base, ready.root / "reward" / "other")


def compute_plain_scores(
    foreign: ForeignModel, conversations: Sequence[Conversation], end_flags: Sequence[bool]
) -> Tensor:
    """Compute scores as a user of the downloaded model does: with its own tokenizer and template, one row at a time, up
    to the token that ends the answer, or to the last token of a cut answer."""
    tokenizer = AutoTokenizer.from_pretrained(foreign.base)
    model = AutoModelForSequenceClassification.from_pretrained(foreign.base, num_labels=1)
    model = PeftModel.from_pretrained(model, str(foreign.reward / "artifact")).eval()
    scores = []
    for conversation, has_end in zip(conversations, end_flags, strict=True):
        text = tokenizer.apply_chat_template(conversation.as_dicts(), tokenize=False).removesuffix("\n")
        text = text if has_end else text.removesuffix("</s>")
        with torch.no_grad():
            scores.append(model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, 0])
    return torch.stack(scores)


def test_ppo_scores_by_the_reward_models_own_tokenizer_and_template(
    ready: Ready, other: ForeignModel, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    score = LearnedReward.score
    calls = []

    def record_score(
        self: LearnedReward, conversations: Sequence[Conversation], rollout: Rollout | None = None
    ) -> Tensor:
        scores = score(self, conversations, rollout)
        assert rollout is not None
        calls.append((self, conversations, rollout.ended_B.tolist(), scores))
        return scores

    monkeypatch.setattr(LearnedReward, "score", record_score)
    arguments = [f"run.root={ready.root}", "init=sft:s", "reward.ref=reward:other", "stage.value_backbone=policy"]
    assert main([*ready.ppo, *arguments]) == 0
    folder = Path(capfd.readouterr().out.splitlines()[-1])
    assert len(calls) == 3  # the reference's answers, and those of two updates
    for scorer, conversations, end_flags, scores in calls:
        expected = compute_plain_scores(other, conversations, end_flags)
        assert expected.std() > 0.05
        assert_close(scores, expected, atol=1e-5, rtol=0)
        assert not all(end_flags)
        full_scores = compute_plain_scores(other, conversations, [True] * len(end_flags))
        assert_close(score(scorer, conversations), full_scores, atol=1e-5, rtol=0)
        assert (full_scores - expected).abs().max() > 1e-3

    policy = read_manifest(ready.root / "sft" / "s").base.digest
    assert read_manifest(folder).base.digest == policy != read_manifest(other.reward).base.digest


def test_a_conversation_longer_than_the_reward_models_context(other: ForeignModel):
    scorer = load_reward_model(
        load_artifact(other.reward / "artifact", "reward:other"), torch.device("cpu"), torch.float32, 4
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(other.base)
    answer_length = CONTEXT - len(tokenizer("<ask>Hello?<say></s>")["input_ids"])

    def build_conversation(letters: int) -> Conversation:
        return Conversation((Message("user", "Hello?"), Message("assistant", "z" * letters)))

    assert scorer.score([build_conversation(answer_length), build_conversation(1)]).isfinite().all()
    with pytest.raises(InputError, match=f"reward.ref=reward:other: reads {CONTEXT} tokens.*has {CONTEXT + 1}"):
        scorer.score([build_conversation(1), build_conversation(answer_length + 1)])
