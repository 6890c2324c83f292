"""KTO by TRL's KTOTrainer, on rows that are tokenized already. The reference is a frozen copy of the adapter on the
same base."""

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
"""Names of TRL's logged metrics, mapped to the names in `metrics.jsonl`."""


def build_kto_trainer(
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
    """Build TRL's KTO trainer for the adapter `default` of `model`. The trainer adds a second adapter, `ref`, which is
    a copy of the start.

    Args:
        max_length: tokens to which a prompt with an answer to another prompt is cut.
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
    """TRL's KTOTrainer on rows that are tokenized already, in the row order of `EpochSampler`. TRL fixes the batches
    beforehand, because each row needs an answer to another prompt of its batch; here `choose_mismatched_answers` finds
    one for any batch. Rows have weights of their own."""

    def __init__(self, *given: Any, args: KTOConfig, **more: Any) -> None:
        super().__init__(*given, args=args, **more)
        self.kind_weights = (args.desirable_weight, args.undesirable_weight)

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        weights_N = inputs.pop("row_weights")
        is_desirable_N = inputs["label"]
        desirable_weight, undesirable_weight = self.kind_weights
        # TRL multiplies them with the losses of the rows of each kind, in the rows' order.
        self.desirable_weight: Any = desirable_weight * weights_N[is_desirable_N]
        self.undesirable_weight: Any = undesirable_weight * weights_N[~is_desirable_N]
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def collate_answers(
    batch: Sequence[dict[str, Any]], rows: Sequence[TokenizedAnswer], filler: int, max_length: int
) -> dict[str, Tensor]:
    """Collate N labelled answers to right-padded rows [N, S], with their weights `row_weights` [N], and under keys
    `KL_…` each prompt with an answer to another prompt."""
    places = [entry["place"] for entry in batch]
    labelled = [rows[place] for place in places]
    starts = [row.start for row in labelled]
    answers = choose_mismatched_answers(places, rows)
    mixed = [(row.prompt + answer)[:max_length] for row, answer in zip(labelled, answers, strict=True)]
    return {
        **pad_answers([row.ids for row in labelled], starts, filler),
        **pad_answers(mixed, starts, filler, "KL_"),
        "label": tensor([row.wanted for row in labelled]),
        "row_weights": tensor([row.weight for row in labelled]),
    }
