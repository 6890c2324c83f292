"""DPO on TRL's DPOTrainer, fed with our own tokens; the reference is a frozen copy of the adapter on the same base."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from datasets import Dataset
from torch import Tensor
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from align.data.pairs import Pair
from align.models.backbone import pad
from align.trainers.common import on_one_gpu
from align.trainers.dealt import Dealt

REFERENCE = "ref"
"""TRL copies the adapter as it starts under this name."""
FIGURES = {
    "loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin", "logps/chosen": "chosen_logprob",
    "logps/rejected": "rejected_logprob", "grad_norm": "grad_norm", "learning_rate": "lr",
}  # fmt: skip


def dpo_trainer(
    model: Any, tokenizer: Any, pairs: Sequence[Pair], arguments: dict[str, Any], *, beta: float, loss: str
) -> DPOTrainer:
    """The loss of DPO, or of IPO, on the adapter `default` of `model`, which has a second adapter from here on:
    `REFERENCE`, what it started from."""
    dataset = Dataset.from_list(
        [
            {
                "rows": [p.chosen_ids, p.rejected_ids], "starts": [p.chosen_start, p.rejected_start],
                "length": max(len(p.chosen_ids), len(p.rejected_ids)),
            }
            for p in pairs
        ]
    )  # fmt: skip
    # The sampler reads `length`, which the trainer would otherwise drop as unknown to the model.
    keywords: dict[str, Any] = {**arguments, "remove_unused_columns": False}
    settings = DPOConfig(**keywords, max_length=None, beta=beta, loss_type=[loss], disable_dropout=True)
    on_one_gpu(settings, model)
    return PairTrainer(
        model=model, args=settings, train_dataset=dataset, processing_class=tokenizer,
        data_collator=partial(collated_pairs, filler=tokenizer.pad_token_id),
    )  # fmt: skip


class PairTrainer(Dealt, DPOTrainer):
    """TRL's trainer on token rows of ours."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset  # it holds token rows already


def collated_pairs(rows: Sequence[dict[str, Any]], filler: int) -> dict[str, Tensor]:
    """A batch of M pairs as 2M rows [2M, S] padded on the right: all chosen, then all rejected. `completion_mask` is 1
    on the answers."""
    texts = [row["rows"][side] for side in (0, 1) for row in rows]
    starts = [row["starts"][side] for side in (0, 1) for row in rows]
    answers = [[0] * start + [1] * (len(ids) - start) for ids, start in zip(texts, starts, strict=True)]
    return {
        "input_ids": pad(texts, filler),
        "attention_mask": pad([[1] * len(ids) for ids in texts], 0),
        "completion_mask": pad(answers, 0),
    }
