"""Supervised fine-tuning by TRL's SFTTrainer, on rows that are tokenized and labelled already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from trl.data_utils import pack_dataset
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from align.data.chat.encode import IGNORE_INDEX, EncodedRow
from align.models.forward import get_decoder, get_lm_head, get_route
from align.models.sharded import is_sharded
from align.ops.logprobs import linear_predictions
from align.trainers.common import build_trainer
from align.trainers.multi_rank import MultiRankTrainer

FIGURES = {"loss": "loss", "grad_norm": "grad_norm", "learning_rate": "lr", "mean_token_accuracy": "accuracy"}


def build_sft_trainer(
    model: Any, tokenizer: Any, rows: Sequence[EncodedRow], arguments: dict[str, Any], *, max_length: int, packing: bool
) -> SFTTrainer:
    """Build TRL's SFT trainer, whose loss is the cross-entropy on the labels of `rows`.

    Packing concatenates rows up to `max_length`; positions restart at each row, and attention does not cross rows.
    """
    settings = SFTConfig(
        **{**arguments, "remove_unused_columns": True},
        max_length=max_length,
        packing=packing,
        packing_strategy="bfd",
        eos_token=None,
        router_aux_loss_coef=0.0,  # no router loss, which some mixture-of-experts models fail to compute
    )
    kind = RowTrainer if get_route(model).has_separate_head else OwnLogitsTrainer
    return build_trainer(kind, model, settings, to_dataset(rows), tokenizer)


class RowTrainer(MultiRankTrainer, SFTTrainer):
    """TRL's SFTTrainer with our order of rows, and on a CPU with a loss that computes the logits of trained tokens
    only.

    Without Triton, TRL's fused loss computes the logits of every position, including prompts and padding, computes all
    of them again in the backward pass, and multiplies their gradient by the head in fp32.
    """

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        head_weight = find_frozen_head(model)
        if return_outputs or head_weight is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels_BS = inputs["labels"][:, 1:]
        trained_BS = labels_BS != IGNORE_INDEX
        targets_N = labels_BS[trained_BS]
        with self.accelerator.autocast():
            options = {key: value for key, value in inputs.items() if key != "labels"}
            hidden_BSD = get_decoder(model)(**options, use_cache=False).last_hidden_state
        states_ND = hidden_BSD[:, :-1][trained_BS].to(head_weight.dtype)
        logprobs_N, _, likeliest_N = linear_predictions(states_ND, targets_N, head_weight)
        correct = int((likeliest_N == targets_N).sum())
        self._metrics["train"]["mean_token_accuracy"].append(correct / max(1, len(targets_N)))
        count = torch.as_tensor(
            len(targets_N) if num_items_in_batch is None else num_items_in_batch, device=logprobs_N.device
        )
        return -logprobs_N.sum() / count.clamp_min(1)


def find_frozen_head(model: Any) -> Tensor | None:
    """Return the weight of the model's LM head if it is a frozen linear layer without bias on a CPU, else None."""
    if is_sharded(model) or not get_route(model).has_fast_path:
        return None
    head = get_lm_head(model)
    if type(head) is not nn.Linear or head.bias is not None or head.weight.requires_grad:
        return None
    return head.weight if head.weight.device.type == "cpu" else None


class OwnLogitsTrainer(RowTrainer):
    """An SFT trainer whose loss uses the logits that the model itself returns. TRL's loss uses hidden states and the
    head's weight, which do not give the logits of every model."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False)
        targets = inputs["labels"][:, 1:]
        picked = targets != IGNORE_INDEX
        logits_BSV = outputs.logits[:, :-1]
        loss = cross_entropy(logits_BSV.flatten(0, 1).float(), targets.flatten(), reduction="sum")
        count = torch.as_tensor(picked.sum() if num_items_in_batch is None else num_items_in_batch, device=loss.device)
        loss = loss / count.clamp_min(1)
        is_correct = (logits_BSV.detach().argmax(-1) == targets)[picked]
        self._metrics["train"]["mean_token_accuracy"].append(float(is_correct.sum() / picked.sum().clamp_min(1)))
        return (loss, outputs) if return_outputs else loss


def to_dataset(rows: Sequence[EncodedRow]) -> Dataset:
    return Dataset.from_dict({"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]})


def pack_rows(rows: Sequence[EncodedRow], max_length: int) -> Dataset:
    """Pack rows into sequences of `max_length` in the same way as the trainer, to compute the number of steps
    beforehand."""
    return pack_dataset(to_dataset(rows), max_length, "bfd")
