"""ORPO and SimPO on the trainers of `trl.experimental`, fed with our own tokens. They compare the policy with nothing:
no reference is in memory, and no batch is read twice.

Nothing imports this module but who asks for one of the two losses (`align.trainers.available` says what TRL has).
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
from align.trainers.dealt import Dealt

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TRLExperimentalWarning)  # docs/methods.md says it
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer


class OwnRows(Dataset):
    """Rows of tokens, which a trainer is not to render again."""

    def map(self, *given: Any, **more: Any) -> OwnRows:
        return self


class OwnLogprobs(Dealt):
    """Logprobs as TRL's DPO computes them: the logits of a whole batch are never there at once."""

    _stored_metrics: Any

    @property
    def _metrics(self) -> Any:
        return self._stored_metrics

    def concatenated_forward(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The mean logprob of each answer's tokens, of the chosen [M] and of the rejected ones; both again in the place
        of logits, of which TRL logs the mean; and the supervised loss of the chosen ones, a mean over answers as in the
        paper, and not over all tokens, the prompt's too."""
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logprobs = model(**given, labels=labels, use_cache=False, fused_lm_head=True).log_probs.sum(-1)
        chosen, rejected = (logprobs / batch["completion_mask"].sum(-1)).chunk(2)
        return chosen, rejected, chosen, rejected, -chosen.mean()


class OrpoTrainer(OwnLogprobs, ORPOTrainer):
    """ORPO."""

    def odds_ratio_loss(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, ...]:
        """TRL's, of logprobs whose odds are finite."""
        return super().odds_ratio_loss(*(each.clamp(max=CERTAIN) for each in (chosen, rejected)))  # type: ignore[arg-type]


class SimpoTrainer(OwnLogprobs, CPOTrainer):
    """SimPO."""


def unreferenced_trainer(
    model: Any, tokenizer: Any, rows: Dataset, keywords: dict[str, Any], collate: Callable[..., Any],
    *, beta: float, loss: str, simpo_gamma: float,
) -> OwnLogprobs:  # fmt: skip
    """The loss of ORPO or of SimPO on the adapter `default` of `model`.

    Args:
        rows, keywords, collate: see `align.trainers.dpo`.
    """
    rows = OwnRows(rows.data)
    common = {**keywords, "max_length": max(rows["length"]), "beta": beta}  # TRL warns where no length is given
    if loss == "orpo":
        settings, kind = ORPOConfig(**common), OrpoTrainer
    else:
        settings, kind = CPOConfig(**common, loss_type="simpo", cpo_alpha=0.0, simpo_gamma=simpo_gamma), SimpoTrainer
    trainer = build_trainer(kind, model, settings, rows, tokenizer, collate)
    trainer.aux_loss_enabled = False  # the loss is that of the paper, for models of experts too
    add_fused_lm_head(model.get_base_model())
    return trainer
