"""The trained model of an export, with its logits on test prompts: the reference for each loaded export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from align.core.errors import CorruptFile, require
from align.core.files import require_readable_folder
from align.data.chat.fixed_prompts import encode_fixed_prompts
from align.data.chat.tokens import copy_tokenizer_for_export
from align.export.engines import (
    VERSION,
    ExportPrompts,
    compute_choices,
    compute_logits,
    free_memory,
    gather_token_logprobs,
)
from align.export.receipt_rows import ALONE, Bound, ReceiptCheck
from align.export.reward import encode_as_chats, encode_as_trained, make_scoring_tokenizer, make_test_conversations
from align.models.adapters import attach_adapter
from align.models.base import choose_frozen_method
from align.models.load import (
    OWN_TOKENIZER,
    cast_to_fp32,
    get_context_length,
    get_dtype_name,
    load_base,
    load_classifier,
)
from align.ops.divergence import Divergence, compute_divergence
from align.rollout.engine_process import TRANSFORMERS
from align.run import Base


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """A model as it was trained, with its logits: a base with an adapter, or a model whose weights were all trained.

    Attributes:
        base: base of the adapter; a whole model itself.
        adapter: folder of the adapter; None for a whole model.
        method: `qlora`, `lora`, or `full` for a whole model.
        dtype: dtype in which the base was read for training; NF4 was quantised from it.
        tokenizer: the tokenizer as an export has it.
        prompts: prompts that it and its exports are compared on.
        logits: its fp32 logits on these, [S, V] for each prompt; for a reward model choices, see `scores_as_choices`.
        base_logprobs: logprobs of the tokens of `rows` by the base without the adapter, see `gather_token_logprobs`;
            None if `base_divergence` is.
        base_divergence: difference of the base without the adapter from the trained model, the yardstick of all others;
            None for a whole model, and for a reward model, whose base has no scores.
        origin: the model that it grew from, which a card names.
    """

    base: Base
    adapter: Path | None
    method: str
    device: torch.device
    dtype: torch.dtype
    tokenizer: Any
    prompts: ExportPrompts
    logits: Sequence[Tensor]
    base_logprobs: Sequence[Sequence[float]] | None
    base_divergence: Divergence | None
    origin: Base

    @property
    def rows(self) -> Sequence[Sequence[int]]:
        """The token ids of the test prompts, as training read them."""
        return self.prompts.rows

    @property
    def base_checks(self) -> list[ReceiptCheck]:
        if self.base_divergence is None:
            return []
        return [ReceiptCheck(TRANSFORMERS, ALONE, self.kind, get_dtype_name(self.dtype), VERSION, self.base_divergence)]

    @property
    def kind(self) -> str:
        """The base weights that the model was trained on: `nf4` for QLoRA, otherwise `original`."""
        return "nf4" if self.method == "qlora" else "original"

    def compare(
        self, loaded: Sequence[Tensor], what: str, base: str, weights: str, bound: Bound | None
    ) -> ReceiptCheck:
        """Compare an export's logits with the trained model's, and return the difference as a check by transformers."""
        return ReceiptCheck(TRANSFORMERS, what, base, weights, VERSION, compute_divergence(self.logits, loaded), bound)

    def load(self, method: str) -> Any:
        """Load the base without its adapter, in fp32, as for training with `method`.

        A reward model's base has an untrained score head, to be filled by the adapter.
        """
        loader = load_classifier if self.prompts.is_reward_model else load_base
        return cast_to_fp32(loader(self.base, method, self.device, self.dtype))


def load_trained_model(
    base: Base,
    adapter: Path | None,
    method: str,
    device: torch.device,
    dtype: torch.dtype,
    tokenizer: Any,
    is_reward_model: bool = False,
    origin: Base | None = None,
) -> TrainedModel:
    """Load a trained model, compute its logits on the fixed test prompts, free it, and return the logits with its
    settings.

    Args:
        adapter: folder of the adapter; None if every weight of `base` was trained.
        is_reward_model: it is a reward model.
        origin: see `TrainedModel`; by default the base.

    Raises:
        CorruptFile, InputError: Base or adapter do not load, or do not fit each other.
    """
    loader = load_classifier if is_reward_model else load_base
    model = cast_to_fp32(loader(base, choose_frozen_method(method), device, dtype))
    if adapter is not None:
        model = attach_adapter(model, adapter, "policy", is_only_adapter=True)
    asked, export_tokenizer = build_prompts_and_tokenizer(tokenizer, get_context_length(model), is_reward_model)
    size = model.get_input_embeddings().weight.shape[0]
    problem = f"has ids beyond the {size} rows of the base's embedding"
    require(max(map(max, asked.rows)) < size >= len(tokenizer), "tokenizer", len(tokenizer), problem, OWN_TOKENIZER)
    logits = compute_choices(model, asked.rows, None) if is_reward_model else compute_logits(model, asked.rows)
    is_finite = all(bool(part.isfinite().all()) for part in logits)
    name = base.id if adapter is None else adapter.name
    require(is_finite, "artifact", name, "the trained model gives nan or infinity", "Train it again.")
    base_logprobs = None
    alone = None
    if adapter is not None and not is_reward_model:
        with model.disable_adapter():
            base_logits = compute_logits(model, asked.rows)
        base_logprobs = gather_token_logprobs(base_logits, asked.rows)
        alone = compute_divergence(logits, base_logits)
    del model
    free_memory()
    return TrainedModel(
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


def build_prompts_and_tokenizer(
    tokenizer: Any, context_length: int, is_reward_model: bool
) -> tuple[ExportPrompts, Any]:
    """Return the tokenized test prompts for a language or reward model, and the tokenizer to write into its exports.

    Args:
        context_length: number of the model's positions.

    Raises:
        InputError: A reward model's chat template accepts no fixed conversation.
    """
    if not is_reward_model:
        return ExportPrompts(encode_fixed_prompts(tokenizer, context_length)), copy_tokenizer_for_export(tokenizer)
    conversations = make_test_conversations(tokenizer, context_length)
    problem = "renders none of the conversations that a reward model is checked with"
    require(bool(conversations), "chat_template", "(the model's)", problem, "Train it with data.template=chatml.")
    export_tokenizer = make_scoring_tokenizer(tokenizer, conversations)
    return ExportPrompts(
        encode_as_trained(tokenizer, conversations),
        True,
        encode_as_chats(export_tokenizer, conversations),
        export_tokenizer.pad_token_id,
    ), export_tokenizer


def require_same_tokenization(trained: TrainedModel, folder: Path) -> None:
    """Raise CorruptFile if an export's tokenizer or chat template gives other token ids for the test prompts than in
    training."""
    require_readable_folder(folder, "export.path")
    exported = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    longest = max(map(len, trained.rows))
    are_equal = encode_fixed_prompts(exported, longest) == encode_fixed_prompts(trained.tokenizer, longest)
    if trained.prompts.is_reward_model:
        conversations = make_test_conversations(trained.tokenizer, longest)
        are_equal &= encode_as_chats(exported, conversations) == encode_as_chats(trained.tokenizer, conversations)
        are_equal &= exported.pad_token_id == trained.prompts.pad_id
    if not are_equal:
        problem = "its tokens of the fixed prompts are others than in training"
        raise CorruptFile("tokenizer", folder.name, problem, "Export it again.")
