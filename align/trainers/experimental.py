"""ORPO and SimPO by the trainers of `trl.experimental`, on pairs that are tokenized already. They have no reference,
which saves its memory and a second pass over each batch.

`align.trainers.dpo` imports this module only for these losses, because some versions of TRL lack it (see
`align.trainers.require_trl_trainer`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from torch import Tensor
from trl.import_utils import TRLExperimentalWarning
from trl.trainer.utils import add_fused_lm_head

from align.ops.losses import CERTAIN
from align.trainers.common import build_trainer
from align.trainers.multi_rank import MultiRankTrainer

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TRLExperimentalWarning)  # docs/methods.md has the warning
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer


class TokenDataset(Dataset):
    """A dataset of token rows whose `map` does nothing, so that the trainer does not tokenize them."""

    def map(self, *given: Any, **more: Any) -> TokenDataset:
        return self


class FusedLogprobs(MultiRankTrainer):
    """A trainer mixin that computes log-probabilities by TRL's fused LM head, without the logits of a whole batch in
    memory."""

    _stored_metrics: Any

    @property
    def _metrics(self) -> Any:
        return self._stored_metrics

    def concatenated_forward(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Return the mean token logprobs of the chosen and of the rejected answers [pairs], the same two again where
        TRL expects logits, and the supervised loss. TRL logs the mean of the logits. The supervised loss of the chosen
        answers is a mean over answers as in the paper; TRL's own is a mean over all tokens, including the prompts'."""
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logprobs = model(**inputs, labels=labels, use_cache=False, fused_lm_head=True).log_probs.sum(-1)
        chosen_logprobs, rejected_logprobs = (logprobs / batch["completion_mask"].sum(-1)).chunk(2)
        return chosen_logprobs, rejected_logprobs, chosen_logprobs, rejected_logprobs, -chosen_logprobs.mean()


class OrpoTrainer(FusedLogprobs, ORPOTrainer):
    """TRL's ORPOTrainer on pairs that are tokenized already."""

    def odds_ratio_loss(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, ...]:
        """Return TRL's odds-ratio loss after the logprobs are clamped so that their odds are finite."""
        return super().odds_ratio_loss(chosen.clamp(max=CERTAIN), rejected.clamp(max=CERTAIN))  # type: ignore[arg-type]


class SimpoTrainer(FusedLogprobs, CPOTrainer):
    """TRL's CPOTrainer with SimPO's loss, on pairs that are tokenized already."""


def build_reference_free_trainer(
    model: Any,
    tokenizer: Any,
    rows: Dataset,
    keywords: dict[str, Any],
    collate: Callable[..., Any],
    loss: str,
    simpo_gamma: float,
) -> FusedLogprobs:
    """Build TRL's trainer of `orpo` or `simpo` for the adapter `default` of `model`.

    Args:
        rows, keywords, collate: see `align.trainers.dpo`.
    """
    common = {**keywords, "max_length": max(rows["length"])}  # TRL warns without a length
    if loss == "orpo":
        kind = OrpoTrainer
        settings = ORPOConfig(**common)
    else:
        kind = SimpoTrainer
        settings = CPOConfig(**common, loss_type="simpo", cpo_alpha=0.0, simpo_gamma=simpo_gamma)
    trainer = build_trainer(kind, model, settings, TokenDataset(rows.data), tokenizer, collate)
    trainer.aux_loss_enabled = False  # no router loss for mixture-of-experts models: the paper's loss has none
    add_fused_lm_head(model.get_base_model())
    return trainer
