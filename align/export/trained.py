"""The model that was trained, and how far each loaded export lies from it."""

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
from align.ops.divergence import Divergence, pooled_divergence
from align.rollout.engine_process import TRANSFORMERS
from align.run import Base


@dataclass(frozen=True, slots=True)
class Trained:
    """A model as it was trained: a base with an adapter on it, or one of which every weight was.

    Attributes:
        base: where the base lies; of a whole model, where that lies.
        adapter: the folder of the adapter; None of a whole model.
        method: `qlora`, `lora`, or `full` of a whole model.
        dtype: in which the base was read for training; NF4 was quantised out of it.
        tokenizer: as an export has it.
        asked: what it is asked, and what each export of it is.
        logits: what it says on that, in fp32: [S, V] a prompt; of a reward model choices, see `as_choices`.
        base_logprobs: of the tokens of `rows`, by the base without the adapter, see `picked`; None where `alone` is.
        alone: how far the base without the adapter lies from that: the yardstick of all other differences; None of a
            whole model, and of a reward model, whose base has no scores.
        origin: the model that it grew from, by which a card names it.
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
        """Token ids of what it is asked."""
        return self.asked.rows

    @property
    def without(self) -> list[Check]:
        if self.alone is None:
            return []
        return [Check(TRANSFORMERS, ALONE, self.kind, name_of(self.dtype), VERSION, self.alone)]

    @property
    def kind(self) -> str:
        """The base that the adapter knows."""
        return "nf4" if self.method == "qlora" else "original"

    def beside(self, loaded: Sequence[Tensor], what: str, base: str, weights: str, bound: Bound | None) -> Check:
        """A check by transformers."""
        return Check(TRANSFORMERS, what, base, weights, VERSION, pooled_divergence(self.logits, loaded), bound)

    def load(self, method: str) -> Any:
        """The base in fp32, by `method`; of a reward model with a score head, which the adapter brings."""
        load = load_classifier if self.asked.scores else load_base
        return in_fp32(load(self.base, method, self.device, self.dtype))


def trained_model(
    base: Base, adapter: Path | None, method: str, device: torch.device, dtype: torch.dtype, tokenizer: Any,
    scores: bool = False, origin: Base | None = None,
) -> Trained:  # fmt: skip
    """Loads what was trained and asks it.

    Args:
        adapter: None: every weight of `base` was trained.
        scores: it is a reward model.
        origin: see `Trained`; the base unless said.

    Raises:
        CorruptFile, InputError: base or adapter do not load, or do not fit each other.
    """
    load = load_classifier if scores else load_base
    model = in_fp32(load(base, frozen_method(method), device, dtype))
    if adapter is not None:
        model = attach(model, adapter, "policy", alone=True)
    asked, own = questions(tokenizer, context_length(model), scores)
    rooms = model.get_input_embeddings().weight.shape[0]
    beyond = f"has ids beyond the {rooms} rows of the base's embedding"
    require(max(map(max, asked.rows)) < rooms >= len(tokenizer), "tokenizer", len(tokenizer), beyond, OWN_TOKENIZER)
    logits = choices_of(model, asked.rows, None) if scores else logits_of(model, asked.rows)
    finite = all(bool(part.isfinite().all()) for part in logits)
    name = base.id if adapter is None else adapter.name
    require(finite, "artifact", name, "what was trained says nan or infinity", "Train it again.")
    base_logprobs = alone = None
    if adapter is not None and not scores:
        with model.disable_adapter():
            plain = logits_of(model, asked.rows)
        base_logprobs, alone = picked(plain, asked.rows), pooled_divergence(logits, plain)
    del model
    free_memory()
    return Trained(base, adapter, method, device, dtype, own, asked, logits, base_logprobs, alone, origin or base)


def questions(tokenizer: Any, longest: int, scores: bool) -> tuple[Asked, Any]:
    """What a model is asked, and the tokenizer that its exports have.

    Args:
        longest: tokens that the model has positions for.

    Raises:
        InputError: the chat template of a reward model takes none of the fixed conversations.
    """
    if not scores:
        return Asked(fixed_prompts(tokenizer, longest)), for_others(tokenizer)
    conversations = fixed_conversations(tokenizer, longest)
    problem = "takes none of the conversations that a reward model is asked about"
    require(bool(conversations), "chat_template", "(the model's)", problem, "Train it with data.template=chatml.")
    own = for_scoring(tokenizer, conversations)
    return Asked(judged(tokenizer, conversations), True, as_chats(own, conversations), own.pad_token_id), own


def check_tokenizer(trained: Trained, folder: Path) -> None:
    """Raises: CorruptFile: the tokenizer or chat template in an export does not read the prompts as the trained one."""
    check_folder(folder, "export.path")
    exported = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    longest = max(map(len, trained.rows))
    alike = fixed_prompts(exported, longest) == fixed_prompts(trained.tokenizer, longest)
    if trained.asked.scores:
        conversations = fixed_conversations(trained.tokenizer, longest)
        alike &= as_chats(exported, conversations) == as_chats(trained.tokenizer, conversations)
        alike &= exported.pad_token_id == trained.asked.pad
    if not alike:
        problem = "its tokens of the fixed prompts are others than in training"
        raise CorruptFile("tokenizer", folder.name, problem, "Export it again.")
