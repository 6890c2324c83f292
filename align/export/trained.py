"""The trained model: the reference that each loaded export is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from align.core.errors import CorruptFile, require
from align.core.files import check_folder
from align.data.chat.fixed_prompts import fixed_prompts
from align.data.chat.tokens import for_others
from align.export.engines import VERSION, Asked, choices_of, free_memory, logits_of, picked
from align.export.receipt_rows import ALONE, Bound, Check
from align.export.reward import as_chats, fixed_conversations, for_scoring, judged
from align.models.adapters import attach
from align.models.base import frozen_method
from align.models.load import OWN_TOKENIZER, context_length, in_fp32, load_base, load_classifier, name_of
from align.ops.divergence import Divergence, compute_divergence
from align.rollout.engine_process import TRANSFORMERS
from align.run import Base


@dataclass(frozen=True, slots=True)
class Trained:
    """A model as it was trained: a base with an adapter, or a model whose weights were all trained.

    Attributes:
        base: base of the adapter; a whole model itself.
        adapter: folder of the adapter; None for a whole model.
        method: `qlora`, `lora`, or `full` for a whole model.
        dtype: dtype in which the base was read for training; NF4 was quantised from it.
        tokenizer: the tokenizer as an export has it.
        asked: prompts that it and its exports are compared on.
        logits: its fp32 logits on these, [S, V] for each prompt; for a reward model choices, see `as_choices`.
        base_logprobs: logprobs of the tokens of `rows` by the base without the adapter, see `picked`; None if `alone`
            is.
        alone: difference of the base without the adapter from the trained model, the yardstick of all others; None for
            a whole model, and for a reward model, whose base has no scores.
        origin: the model that it grew from, which a card names.
    """

    base: Base
    adapter: Path | None
    method: str
    device: torch.device
    dtype: torch.dtype
    tokenizer: Any
    asked: Asked
    logits: Sequence[Tensor]
    base_logprobs: Sequence[Sequence[float]] | None
    alone: Divergence | None
    origin: Base

    @property
    def rows(self) -> Sequence[Sequence[int]]:
        """Token ids of the prompts."""
        return self.asked.rows

    @property
    def without(self) -> list[Check]:
        if self.alone is None:
            return []
        return [Check(TRANSFORMERS, ALONE, self.kind, name_of(self.dtype), VERSION, self.alone)]

    @property
    def kind(self) -> str:
        """The base weights that the adapter was trained on: `nf4` or `original`."""
        return "nf4" if self.method == "qlora" else "original"

    def beside(self, loaded: Sequence[Tensor], what: str, base: str, weights: str, bound: Bound | None) -> Check:
        """Return a check by transformers: the difference of an export's logits from the trained model's."""
        return Check(TRANSFORMERS, what, base, weights, VERSION, compute_divergence(self.logits, loaded), bound)

    def load(self, method: str) -> Any:
        """Load the base in fp32 with `method`. A reward model's has a score head, to be filled by the adapter."""
        loader = load_classifier if self.asked.scores else load_base
        return in_fp32(loader(self.base, method, self.device, self.dtype))


def trained_model(
    base: Base,
    adapter: Path | None,
    method: str,
    device: torch.device,
    dtype: torch.dtype,
    tokenizer: Any,
    scores: bool = False,
    origin: Base | None = None,
) -> Trained:
    """Load a trained model and compute its logits on the fixed prompts.

    Args:
        adapter: folder of the adapter; None if every weight of `base` was trained.
        scores: it is a reward model.
        origin: see `Trained`; by default the base.

    Raises:
        CorruptFile, InputError: Base or adapter do not load, or do not fit each other.
    """
    loader = load_classifier if scores else load_base
    model = in_fp32(loader(base, frozen_method(method), device, dtype))
    if adapter is not None:
        model = attach(model, adapter, "policy", alone=True)
    asked, export_tokenizer = questions(tokenizer, context_length(model), scores)
    size = model.get_input_embeddings().weight.shape[0]
    problem = f"has ids beyond the {size} rows of the base's embedding"
    require(max(map(max, asked.rows)) < size >= len(tokenizer), "tokenizer", len(tokenizer), problem, OWN_TOKENIZER)
    logits = choices_of(model, asked.rows, None) if scores else logits_of(model, asked.rows)
    is_finite = all(bool(part.isfinite().all()) for part in logits)
    name = base.id if adapter is None else adapter.name
    require(is_finite, "artifact", name, "what was trained says nan or infinity", "Train it again.")
    base_logprobs = None
    alone = None
    if adapter is not None and not scores:
        with model.disable_adapter():
            base_logits = logits_of(model, asked.rows)
        base_logprobs = picked(base_logits, asked.rows)
        alone = compute_divergence(logits, base_logits)
    del model
    free_memory()
    return Trained(
        base,
        adapter,
        method,
        device,
        dtype,
        export_tokenizer,
        asked,
        logits,
        base_logprobs,
        alone,
        origin or base,
    )


def questions(tokenizer: Any, longest: int, scores: bool) -> tuple[Asked, Any]:
    """Return the prompts for a model, and the tokenizer of its exports.

    Args:
        longest: number of the model's positions.

    Raises:
        InputError: A reward model's chat template accepts no fixed conversation.
    """
    if not scores:
        return Asked(fixed_prompts(tokenizer, longest)), for_others(tokenizer)
    conversations = fixed_conversations(tokenizer, longest)
    problem = "takes none of the conversations that a reward model is asked about"
    require(bool(conversations), "chat_template", "(the model's)", problem, "Train it with data.template=chatml.")
    export_tokenizer = for_scoring(tokenizer, conversations)
    return Asked(
        judged(tokenizer, conversations), True, as_chats(export_tokenizer, conversations), export_tokenizer.pad_token_id
    ), export_tokenizer


def check_tokenizer(trained: Trained, folder: Path) -> None:
    """Raise CorruptFile if an export's tokenizer or chat template gives the prompts other tokens than in training."""
    check_folder(folder, "export.path")
    exported = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    longest = max(map(len, trained.rows))
    are_equal = fixed_prompts(exported, longest) == fixed_prompts(trained.tokenizer, longest)
    if trained.asked.scores:
        conversations = fixed_conversations(trained.tokenizer, longest)
        are_equal &= as_chats(exported, conversations) == as_chats(trained.tokenizer, conversations)
        are_equal &= exported.pad_token_id == trained.asked.pad
    if not are_equal:
        problem = "its tokens of the fixed prompts are others than in training"
        raise CorruptFile("tokenizer", folder.name, problem, "Export it again.")
