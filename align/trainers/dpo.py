"""DPO and its kin on TRL's trainers, fed with our own tokens; where there is a reference, it is a frozen copy of the
adapter on the same base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import Trainer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from align.data.pairs import Pair
from align.models.backbone import pad
from align.trainers.available import EXPERIMENTAL
from align.trainers.common import build_trainer
from align.trainers.dealt import DealtTokenRows

REFERENCE = "ref"
"""TRL copies the adapter as it starts under this name."""
REFERENCED_FIGURES = {
    "loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin", "logps/chosen": "chosen_logprob",
    "logps/rejected": "rejected_logprob", "grad_norm": "grad_norm", "learning_rate": "lr",
}  # fmt: skip


def figures_of(loss: str) -> Mapping[str, str]:
    """TRL's name of a figure → ours."""
    if loss not in EXPERIMENTAL:
        return REFERENCED_FIGURES
    named = {"logps/chosen": "chosen_token_logprob", "logps/rejected": "rejected_token_logprob"}  # means over tokens
    return {**REFERENCED_FIGURES, **named}


def dpo_trainer(
    model: Any, tokenizer: Any, pairs: Sequence[Pair], arguments: dict[str, Any],
    *, beta: float, loss: str, label_smoothing: float = 0.0, simpo_gamma: float = 0.0,
) -> Trainer:  # fmt: skip
    """A loss on pairs, which trains the adapter `default` of `model`.

    With `sigmoid` and `ipo` the model has a second adapter from here on: `REFERENCE`, what it started from. `orpo` and
    `simpo` need none.
    """
    dataset = Dataset.from_list(
        [
            {
                "rows": [p.chosen_ids, p.rejected_ids], "starts": [p.chosen_start, p.rejected_start],
                "length": max(len(p.chosen_ids), len(p.rejected_ids)),
            }
            for p in pairs
        ]
    )  # fmt: skip
    keywords: dict[str, Any] = {**arguments, "disable_dropout": True}
    collate = partial(collated_pairs, filler=tokenizer.pad_token_id)
    if loss in EXPERIMENTAL:
        from align.trainers.unreferenced import unreferenced_trainer

        return unreferenced_trainer(
            model, tokenizer, dataset, keywords, collate, beta=beta, loss=loss, simpo_gamma=simpo_gamma
        )
    settings = DPOConfig(**keywords, **loss_settings(loss, label_smoothing), max_length=None, beta=beta)
    return build_trainer(PairTrainer, model, settings, dataset, tokenizer, collate)


def loss_settings(loss: str, label_smoothing: float) -> dict[str, Any]:
    """TRL's settings for a loss. Its `sigmoid` takes no label smoothing ε, so cDPO is made of two of its losses. With
    a = −log σ(βh) and b = −log σ(−βh), its `robust` is ((1 − ε) a − ε b) / (1 − 2ε), and

        (1 − ε) a + ε b = 2 (1 − ε) a − (1 − 2ε) robust
    """
    if not label_smoothing:
        return {"loss_type": [loss]}
    return {
        "loss_type": [loss, "robust"], "label_smoothing": label_smoothing,
        "loss_weights": [2 * (1 - label_smoothing), 2 * label_smoothing - 1],
    }  # fmt: skip


class PairTrainer(DealtTokenRows, DPOTrainer):
    """TRL's trainer on token rows of ours."""


def collated_pairs(rows: Sequence[dict[str, Any]], filler: int) -> dict[str, Tensor]:
    """A batch of M pairs as 2M rows [2M, S] padded on the right: all chosen, then all rejected."""
    texts = [row["rows"][side] for side in (0, 1) for row in rows]
    starts = [row["starts"][side] for side in (0, 1) for row in rows]
    return padded_answers(texts, starts, filler)


def padded_answers(
    texts: Sequence[Sequence[int]], starts: Sequence[int], filler: int, prefix: str = ""
) -> dict[str, Tensor]:
    """Rows of tokens [N, S] padded on the right, with their masks: `completion_mask` is 1 on the answers.

    Args:
        starts: where the answers begin.
        prefix: of each name.
    """
    answers = [[0] * start + [1] * (len(ids) - start) for ids, start in zip(texts, starts, strict=True)]
    return {
        f"{prefix}input_ids": pad(texts, filler),
        f"{prefix}attention_mask": pad([[1] * len(ids) for ids in texts], 0),
        f"{prefix}completion_mask": pad(answers, 0),
    }
