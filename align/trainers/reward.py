"""The reward model on TRL's RewardTrainer, fed with our own token rows."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from align.errors import InputError
from align.models.adapters import read_tensors
from align.trainers.common import fit


@dataclass(frozen=True, slots=True)
class Pair:
    """One judged pair as token rows, each ending where the score is read."""

    chosen_ids: list[int]
    rejected_ids: list[int]


def score_head(model: Any) -> nn.Module:
    """The trained copy of the `score` head inside a PEFT model.

    Raises:
        AssertionError: PEFT does not train one, and the reward would be the random projection it started as.
    """
    wrapper = model.get_base_model().score
    trained = getattr(wrapper, "modules_to_save", None)
    assert trained is not None, "PEFT neither trains nor saves the score head"
    head = trained["default"]
    assert type(head) is nn.Linear, "the score head is quantised"
    assert head.weight.requires_grad, "the score head is frozen"
    return head


def start_from(model: Any, adapter: Path | None) -> int:
    """Copy the LoRA tensors of a supervised adapter into the reward model's; the head starts at 0.

    Returns:
        the number of tensors copied.

    Raises:
        InputError: the two adapters do not have the same shape.
    """
    nn.init.zeros_(score_head(model).weight)  # pyright: ignore[reportArgumentType]
    if adapter is None:
        return 0
    own = {n: p for n, p in model.named_parameters() if "lora_" in n}
    given = {k.replace(".weight", ".default.weight"): v for k, v in read_tensors(adapter).items() if "lora_" in k}
    if own.keys() != given.keys() or any(own[k].shape != given[k].shape for k in own):
        differ = sorted(own.keys() ^ given.keys())
        raise InputError(
            "init", str(adapter), f"its tensors do not fit a reward model ({differ[0] if differ else 'another rank'})",
            "Train the SFT adapter on all linear layers of the same base.",
        )  # fmt: skip
    with torch.no_grad():
        for name, tensor in given.items():
            own[name].copy_(tensor)
    return len(given)


def train_reward(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    arguments: dict[str, Any],
    *,
    callback: TrainerCallback,
    checkpoint: Path | None,
) -> int:
    """Minimise −log σ(r(chosen) − r(rejected)) over `pairs`, in place. Returns the number of trained weights."""
    dataset = Dataset.from_dict(
        {
            "chosen_ids": [p.chosen_ids for p in pairs],
            "rejected_ids": [p.rejected_ids for p in pairs],
            "length": [max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs],
        }
    )
    # The sampler reads `length`, which the trainer would otherwise drop as unknown to the model.
    keywords: dict[str, Any] = {**arguments, "remove_unused_columns": False}
    settings = RewardConfig(**keywords, max_length=None, disable_dropout=True)
    padder = copy.deepcopy(tokenizer)  # rows are padded by it, nothing else
    padder.pad_token = tokenizer.convert_ids_to_tokens(filler_id(pairs, tokenizer.pad_token_id))

    def trainer() -> RewardTrainer:
        return RewardTrainer(
            model=model, args=settings, train_dataset=dataset, processing_class=padder, callbacks=[callback]
        )

    return fit(trainer, model, checkpoint)


def filler_id(pairs: Sequence[Pair], pad_id: int) -> int:
    """A token to pad with that no row ends with: `pad_id` if it will do.

    transformers takes the score at the last token that is not the pad token. Where EOS is that too, an answer would be
    read one token early. The padding itself is masked, so that any other token serves.
    """
    ends = {ids[-1] for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)}
    return next(i for i in (pad_id, *range(len(ends) + 1)) if i not in ends)
