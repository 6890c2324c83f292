"""KTO on TRL's KTOTrainer, with our own tokens. The reference is a frozen copy of the adapter on the same base."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from datasets import Dataset
from torch import Tensor, tensor
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from align.data.pairs import TokenizedAnswer, choose_mismatched_answers
from align.trainers.common import build_trainer
from align.trainers.dpo import pad_answers
from align.trainers.multi_rank import TokenRowsTrainer

FIGURES = {
    "loss": "loss",
    "kl": "kl",
    "rewards/margins": "margin",
    "rewards/chosen": "wanted_reward",
    "rewards/rejected": "unwanted_reward",
    "grad_norm": "grad_norm",
    "learning_rate": "lr",
}
"""TRL's name of a figure → ours."""


def kto_trainer(
    model: Any,
    tokenizer: Any,
    rows: Sequence[TokenizedAnswer],
    arguments: dict[str, Any],
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    max_length: int,
) -> KTOTrainer:
    """Build the trainer of KTO on the adapter `default` of `model`. It adds a second adapter: `ref`, a copy of the
    start.

    Args:
        max_length: tokens of a prompt with an answer to another one; more are cut.
    """
    dataset = Dataset.from_dict({"place": list(range(len(rows))), "length": [len(row.ids) for row in rows]})
    config = KTOConfig(
        **arguments,
        max_length=None,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        disable_dropout=True,
        router_aux_loss_coef=0.0,
    )
    collate = partial(collate_answers, rows=rows, filler=tokenizer.pad_token_id, max_length=max_length)
    return build_trainer(LabelTrainer, model, config, dataset, tokenizer, collate)


class LabelTrainer(TokenRowsTrainer, KTOTrainer):
    """TRL's trainer on our token rows, in our order. TRL decides beforehand which rows share a batch, because each
    needs an answer to another prompt there; here `choose_mismatched_answers` finds one for any batch."""


def collate_answers(
    batch: Sequence[dict[str, Any]], rows: Sequence[TokenizedAnswer], filler: int, max_length: int
) -> dict[str, Tensor]:
    """Return a batch of N answers [N, S], padded on the right, with their labels; and under `KL_…` each prompt with an
    answer to another one."""
    places = [entry["place"] for entry in batch]
    labelled = [rows[place] for place in places]
    starts = [row.start for row in labelled]
    others = choose_mismatched_answers(places, rows)
    mixed = [(row.prompt + other)[:max_length] for row, other in zip(labelled, others, strict=True)]
    return {
        **pad_answers([row.ids for row in labelled], starts, filler),
        **pad_answers(mixed, starts, filler, "KL_"),
        "label": tensor([row.wanted for row in labelled]),
    }
