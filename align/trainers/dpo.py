"""DPO and related losses by TRL's trainers, on pairs that are tokenized already. The reference is a frozen copy of the
adapter on the same base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from datasets import Dataset
from torch import Tensor, tensor
from transformers import Trainer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from align.data.pairs import TokenizedPair
from align.models.forward import pad_rows
from align.trainers import EXPERIMENTAL
from align.trainers.common import build_trainer
from align.trainers.multi_rank import TokenRowsTrainer

REFERENCE = "ref"
"""Name of the reference adapter that TRL creates as a copy of the policy's start."""
SOFT_LOSS: Mapping[str, Any] = {"loss_type": ["sigmoid", "robust"], "loss_weights": [2.0, -1.0]}
"""Keyword arguments of DPOConfig that give the loss of soft labels, (1 − q) a + q b, where q = 1 − label,
a = −log σ(βh) and b = −log σ(−βh). TRL's `sigmoid` is a, and with the label smoothing ε = q / (1 + 2q) its `robust` is

    ((1 − ε) a − ε b) / (1 − 2ε) = (1 + q) a − q b
"""


def get_figure_names(loss: str) -> Mapping[str, str]:
    """Return the names of TRL's logged metrics for a loss, mapped to the names in `metrics.jsonl`."""
    per_token = "token_" if loss in EXPERIMENTAL else ""  # means over tokens
    return {
        "loss": "loss",
        "rewards/accuracies": "accuracy",
        "rewards/margins": "margin",
        "logps/chosen": f"chosen_{per_token}logprob",
        "logps/rejected": f"rejected_{per_token}logprob",
        "grad_norm": "grad_norm",
        "learning_rate": "lr",
    }


def build_dpo_trainer(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[TokenizedPair],
    arguments: dict[str, Any],
    *,
    beta: float,
    loss: str,
    simpo_gamma: float = 0.0,
) -> Trainer:
    """Build TRL's trainer of the preference loss `loss` for the adapter `default` of `model`. Only `sigmoid` reads the
    pairs' labels.

    With `sigmoid` and `ipo` the trainer adds a second adapter, `REFERENCE`, which is a copy of the start. `orpo` and
    `simpo` need no reference.
    """
    dataset = Dataset.from_list(
        [
            {
                "rows": [pair.chosen_ids, pair.rejected_ids],
                "starts": [pair.chosen_start, pair.rejected_start],
                "length": max(len(pair.chosen_ids), len(pair.rejected_ids)),
                "label": pair.label,
            }
            for pair in pairs
        ]
    )
    keywords: dict[str, Any] = {**arguments, "disable_dropout": True, "beta": beta}
    collate = partial(collate_pairs, filler=tokenizer.pad_token_id)
    if loss in EXPERIMENTAL:
        from align.trainers.experimental import build_reference_free_trainer

        return build_reference_free_trainer(model, tokenizer, dataset, keywords, collate, loss, simpo_gamma)
    has_soft_labels = loss == "sigmoid" and any(pair.label != 1 for pair in pairs)
    settings = DPOConfig(**keywords, **(SOFT_LOSS if has_soft_labels else {"loss_type": [loss]}), max_length=None)
    return build_trainer(PairTrainer, model, settings, dataset, tokenizer, collate)


class PairTrainer(TokenRowsTrainer, DPOTrainer):
    """TRL's DPOTrainer on pairs that are tokenized already, with soft labels if the loss is `SOFT_LOSS`."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        swapped_M = 1 - inputs.pop("pair_labels")
        self.label_smoothing: Any = swapped_M / (1 + 2 * swapped_M)  # TRL's loss computes with it row by row
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def collate_pairs(rows: Sequence[dict[str, Any]], filler: int) -> dict[str, Tensor]:
    """Collate M pairs to right-padded rows [2M, S], all chosen answers and then all rejected ones, and the pairs' soft
    labels `pair_labels` [M]."""
    texts = [row["rows"][side] for side in (0, 1) for row in rows]
    starts = [row["starts"][side] for side in (0, 1) for row in rows]
    return {**pad_answers(texts, starts, filler), "pair_labels": tensor([row["label"] for row in rows])}


def pad_answers(
    texts: Sequence[Sequence[int]], starts: Sequence[int], filler: int, prefix: str = ""
) -> dict[str, Tensor]:
    """Pad rows of token ids on the right to [N, S], and build their masks; `completion_mask` is 1 at the answers.

    Args:
        starts: position in each row at which the answer starts.
        prefix: prefix of the keys.
    """
    answers = [[0] * start + [1] * (len(ids) - start) for ids, start in zip(texts, starts, strict=True)]
    return {
        f"{prefix}input_ids": pad_rows(texts, filler),
        f"{prefix}attention_mask": pad_rows([[1] * len(ids) for ids in texts], 0),
        f"{prefix}completion_mask": pad_rows(answers, 0),
    }
