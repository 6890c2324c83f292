"""Reward models exported for other libraries: a rendered chat equals the training row, and its last token is scored."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_templates import FAMILIES, make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import logsigmoid
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from align.core.types import Conversation, Message
from align.data.chat.encode import encode_prompt, find_turn_end_token, render
from align.data.chat.fixed_prompts import LONGEST
from align.data.chat.template import CHATML, build_escaping_template
from align.data.chat.tokens import copy_tokenizer_for_export
from align.export.engines import compute_choices, scores_as_choices, set_pad_token
from align.export.reward import (
    REASONED,
    encode_as_chats,
    encode_as_trained,
    make_scoring_tokenizer,
    make_test_conversations,
)
from align.models.base import find_builtin_folder
from align.models.load import save_tokenizer
from align.ops.divergence import compute_divergence

NAMES = [*FAMILIES, "qwen3-words", "chatml", "pocket"]
BEHIND = {"qwen2.5", "qwen3", "qwen3-words", "gemma", "phi3", "marked", "marked-wide", "chatml"}
"""Templates that write something after the token that ends the last answer."""


def make_named_tokenizer(name: str) -> Any:
    if name == "pocket":
        return AutoTokenizer.from_pretrained(find_builtin_folder("pocket"))
    if name == "qwen3-words":  # added tokens that are not special, as in Qwen's tokenizer
        return make_tokenizer(FAMILIES["qwen3"].template, FAMILIES["qwen3"].eos, ("<think>", "</think>"))
    family = FAMILIES["llama3" if name == "chatml" else name]
    return make_tokenizer(CHATML if name == "chatml" else family.template, family.eos)


@pytest.mark.parametrize("name", NAMES)
def test_whoever_renders_a_chat_reads_what_training_read(name: str) -> None:
    tokenizer = make_named_tokenizer(name)
    conversations = make_test_conversations(tokenizer)
    assert len(conversations) >= 12
    assert [c.messages[-1].content for c in conversations[-2:]] == list(REASONED)
    scoring_tokenizer = make_scoring_tokenizer(tokenizer, conversations)
    rows = encode_as_trained(tokenizer, conversations)
    assert encode_as_chats(scoring_tokenizer, conversations) == rows
    assert (encode_as_chats(tokenizer, conversations) != rows) == (name in BEHIND)
    for conversation in conversations:  # prompts are rendered as before
        prompt = Conversation(conversation.messages[:-1])
        assert render(scoring_tokenizer, prompt, add_generation_prompt=True) == render(
            tokenizer, prompt, add_generation_prompt=True
        )
        assert render(scoring_tokenizer, prompt) == render(tokenizer, prompt)
    served = copy.deepcopy(scoring_tokenizer)  # as vLLM's launch file has it
    served.chat_template = build_escaping_template(scoring_tokenizer)
    assert encode_as_chats(served, conversations) == rows


def test_an_answer_that_looks_like_the_templates_end_keeps_its_end() -> None:
    tokenizer = make_named_tokenizer("qwen2.5")
    scoring_tokenizer = make_scoring_tokenizer(tokenizer, make_test_conversations(tokenizer))
    for answer in ("a\n", "\n", "a<|im_end|>\n", ""):
        conversation = Conversation((Message("user", "q"), Message("assistant", answer)))
        assert render(scoring_tokenizer, conversation) == render(tokenizer, conversation).removesuffix("\n")


def test_a_policys_export_reads_earlier_reasoning_as_training_did(tmp_path: Path) -> None:
    """The saved tokenizer is called as its model card says. Without `chat_control_tokens` the text would differ."""
    tokenizer = make_named_tokenizer("qwen3-words")
    turns = [("user", "q"), ("assistant", "<think>\na\n</think>\n\nb"), ("user", "and?")]
    prompt = Conversation(tuple(Message(*turn) for turn in turns))
    save_tokenizer(copy_tokenizer_for_export(tokenizer), tmp_path)
    for read_tokenizer, same in ((AutoTokenizer.from_pretrained(tmp_path), True), (tokenizer, False)):
        options: dict[str, Any] = {"sanitize_control_tokens": True, "add_generation_prompt": True}
        input_ids = read_tokenizer.apply_chat_template(prompt.as_dicts(), return_dict=True, **options)["input_ids"]
        assert (input_ids == encode_prompt(tokenizer, prompt)) == same


def test_the_pad_token_ends_no_answer() -> None:
    tokenizer = make_named_tokenizer("llama3")
    conversations = make_test_conversations(tokenizer)
    end = find_turn_end_token(tokenizer)
    assert make_scoring_tokenizer(tokenizer, conversations).pad_token == tokenizer.pad_token != end
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end)  # as for a model without a pad token
    assert make_scoring_tokenizer(tokenizer, conversations).pad_token_id not in (end, tokenizer.eos_token_id, None)


def test_where_no_special_token_is_left_there_is_no_pad_token() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*alphabet, "<eos>"])}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = CHATML
    conversations = make_test_conversations(tokenizer, max_tokens=LONGEST)
    scoring_tokenizer = make_scoring_tokenizer(tokenizer, conversations)
    assert (scoring_tokenizer.pad_token, scoring_tokenizer.eos_token) == (None, "<eos>")
    assert encode_as_chats(scoring_tokenizer, conversations) == encode_as_trained(tokenizer, conversations)


def test_scores_as_choices() -> None:
    choices = scores_as_choices(torch.tensor([1.0, -2.0]))
    assert choices.tolist() == [[1.0, -2.0], [1.0, 0.0], [-2.0, 0.0]]
    same = compute_divergence([choices], [scores_as_choices(torch.tensor([1.0, -2.0]))])
    assert (same.kl, same.top1, same.max_logprob, same.tokens) == (0, 1, 0, 3)
    # log σ(3) − log σ(3.5) and the like: the largest is of the choice that is least likely.
    moved = compute_divergence([choices], [scores_as_choices(torch.tensor([1.5, -2.0]))])
    least = math.log1p(math.exp(3.5)) - math.log1p(math.exp(3.0))
    assert moved.max_logprob == pytest.approx(least, abs=1e-6)
    shifted = compute_divergence([choices], [scores_as_choices(torch.tensor([1.0, -2.0]) + 0.5)])
    assert shifted.kl > 1e-3  # though no pair has changed
    turned = compute_divergence([choices], [scores_as_choices(torch.tensor([-2.0, 1.0]))])
    assert turned.top1 == 0


def test_padded_rows_are_scored_as_they_are_alone(tiny_model: Any, tiny_tokenizer: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32).eval()
    rows = encode_as_trained(tiny_tokenizer, make_test_conversations(tiny_tokenizer))
    assert len({len(row) for row in rows}) > 3
    pad = tiny_tokenizer.pad_token_id
    end = rows[0][-1]
    alone = compute_choices(model, rows, None)
    assert compute_divergence(alone, compute_choices(model, rows, pad)).max_logprob < 1e-5
    assert compute_divergence(alone, compute_choices(model, rows, end)).max_logprob > 1e-3  # read one token early
    set_pad_token(model, 7)
    compute_choices(model, rows, pad)
    assert model.config.pad_token_id == 7  # the pad token is restored


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2.5", "phi3", "llama3"])
def test_trls_trainer_reads_the_same(name: str, tmp_path: Path) -> None:
    """TRL's rows equal our training rows, and its loss is that of the scores at their last tokens."""
    from datasets import Dataset
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer

    tokenizer = make_named_tokenizer(name)
    chosen_conversations = make_test_conversations(tokenizer)
    rejected_conversations = [
        Conversation((*c.messages[:-1], Message("assistant", "No."))) for c in chosen_conversations
    ]
    rows = [encode_as_trained(tokenizer, side) for side in (chosen_conversations, rejected_conversations)]
    scoring_tokenizer = make_scoring_tokenizer(tokenizer, chosen_conversations)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(scoring_tokenizer), num_labels=1, pad_token_id=scoring_tokenizer.pad_token_id, **shape
    )
    model = LlamaForSequenceClassification(config).eval()
    data = Dataset.from_list(
        [
            {"prompt": a.as_dicts()[:-1], "chosen": a.as_dicts()[-1:], "rejected": b.as_dicts()[-1:]}
            for a, b in zip(chosen_conversations, rejected_conversations, strict=True)
        ]
    )
    settings = RewardConfig(str(tmp_path), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False)
    trainer = RewardTrainer(model, settings, train_dataset=data, eval_dataset=data, processing_class=scoring_tokenizer)
    eval_rows = trainer.eval_dataset
    assert [list(eval_rows[f"{side}_ids"]) for side in ("chosen", "rejected")] == rows
    with torch.no_grad():
        scores = [torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in side]) for side in rows]
    expected_loss = float(-logsigmoid(scores[0] - scores[1]).mean())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected_loss, abs=1e-5)
