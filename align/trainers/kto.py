"""KTO on TRL's KTOTrainer, fed with our own tokens; the reference is a frozen copy of the adapter on the same base."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from datasets import Dataset
from torch import Tensor, tensor
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from align.data.pairs import Labelled, other_answers
from align.trainers.common import build_trainer
from align.trainers.dealt import DealtTokenRows
from align.trainers.dpo import padded_answers

FIGURES = {
    "loss": "loss", "kl": "kl", "rewards/margins": "margin", "rewards/chosen": "wanted_reward",
    "rewards/rejected": "unwanted_reward", "grad_norm": "grad_norm", "learning_rate": "lr",
}  # fmt: skip


def kto_trainer(
    model: Any, tokenizer: Any, rows: Sequence[Labelled], arguments: dict[str, Any],
    *, beta: float, desirable_weight: float, undesirable_weight: float, max_length: int,
) -> KTOTrainer:  # fmt: skip
    """The loss of KTO on the adapter `default` of `model`, which has a second adapter from here on: `ref`, what it
    started from.

    Args:
        max_length: tokens of a prompt with an answer to another one; more are cut.
    """
    dataset = Dataset.from_dict({"place": list(range(len(rows))), "length": [len(row.ids) for row in rows]})
    settings = KTOConfig(
        **arguments, max_length=None, beta=beta, desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight, disable_dropout=True, router_aux_loss_coef=0.0,
    )  # fmt: skip
    collate = partial(collated_answers, rows=rows, filler=tokenizer.pad_token_id, max_length=max_length)
    return build_trainer(LabelTrainer, model, settings, dataset, tokenizer, collate)


class LabelTrainer(DealtTokenRows, KTOTrainer):
    """TRL's trainer on token rows of ours, in our order. TRL fixes beforehand which rows share a batch, for each needs
    an answer to another prompt there; here the batch itself decides that, see `other_answers`."""


def collated_answers(
    batch: Sequence[dict[str, Any]], rows: Sequence[Labelled], filler: int, max_length: int
) -> dict[str, Tensor]:
    """A batch of N answers [N, S], padded on the right, with their labels; and under `KL_…` each prompt with an answer
    to another one."""
    places = [one["place"] for one in batch]
    here = [rows[place] for place in places]
    others = other_answers(places, rows)
    mixed = [(row.prompt + other)[:max_length] for row, other in zip(here, others, strict=True)]
    starts = [row.start for row in here]
    return {
        **padded_answers([row.ids for row in here], starts, filler), **padded_answers(mixed, starts, filler, "KL_"),
        "label": tensor([row.wanted for row in here]),
    }  # fmt: skip
