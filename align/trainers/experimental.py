"""ORPO and SimPO on the trainers of `trl.experimental`, with our own tokens. They need no reference: none is in memory,
and no batch is read twice.

`align.trainers.dpo` imports this module for these two losses only (`align.trainers.check_trainer` says what TRL has).
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
    warnings.simplefilter("ignore", TRLExperimentalWarning)  # docs/methods.md says it
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer


class TokenDataset(Dataset):
    """Rows of tokens, which a trainer is not to render again."""

    def map(self, *given: Any, **more: Any) -> TokenDataset:
        return self


class FusedLogprobs(MultiRankTrainer):
    """Logprobs as TRL's DPO computes them: the logits of a whole batch are never in memory at once."""

    _stored_metrics: Any

    @property
    def _metrics(self) -> Any:
        return self._stored_metrics

    def concatenated_forward(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Return the mean logprob of each answer's tokens, of the chosen [M] and of the rejected ones; both again in
        place of logits, of which TRL logs the mean; and the supervised loss of the chosen ones, a mean over answers as
        in the paper, and not over all tokens, the prompt's too."""
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logprobs = model(**inputs, labels=labels, use_cache=False, fused_lm_head=True).log_probs.sum(-1)
        chosen, rejected = (logprobs / batch["completion_mask"].sum(-1)).chunk(2)
        return chosen, rejected, chosen, rejected, -chosen.mean()


class OrpoTrainer(FusedLogprobs, ORPOTrainer):
    """ORPO."""

    def odds_ratio_loss(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, ...]:
        """Return TRL's loss of logprobs whose odds are finite."""
        return super().odds_ratio_loss(chosen.clamp(max=CERTAIN), rejected.clamp(max=CERTAIN))  # type: ignore[arg-type]


class SimpoTrainer(FusedLogprobs, CPOTrainer):
    """SimPO."""


def reference_free_trainer(
    model: Any,
    tokenizer: Any,
    rows: Dataset,
    keywords: dict[str, Any],
    collate: Callable[..., Any],
    loss: str,
    simpo_gamma: float,
) -> FusedLogprobs:
    """Build the trainer of ORPO or of SimPO on the adapter `default` of `model`.

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
    trainer.aux_loss_enabled = False  # the loss is that of the paper, for models of experts too
    add_fused_lm_head(model.get_base_model())
    return trainer
