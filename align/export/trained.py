"""The model that was trained, and how far each loaded export lies from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from align.data.fixed_prompts import fixed_prompts
from align.errors import CorruptFile, require
from align.export.engines import VERSION, free_memory, logits_of
from align.export.verdicts import ALONE, Bound, Check, pooled_divergence
from align.models.adapters import attach
from align.models.load import OWN_TOKENIZER, context_length, in_fp32, load_base, name_of
from align.ops.divergence import Divergence
from align.rollout.engine_process import TRANSFORMERS
from align.run import Base


@dataclass(frozen=True, slots=True)
class Trained:
    """Base and adapter as they were trained.

    Attributes:
        base: where the base lies.
        adapter: the folder of the adapter.
        method: `qlora` or `lora`.
        dtype: in which the base was read for training; NF4 was quantised out of it.
        rows: token ids of the fixed prompts.
        logits: what it says on them, in fp32: [S, V] a prompt.
        alone: how far the base without the adapter lies from that: the yardstick of all other differences.
    """

    base: Base
    adapter: Path
    method: str
    device: torch.device
    dtype: torch.dtype
    tokenizer: Any
    rows: Sequence[Sequence[int]]
    logits: Sequence[Tensor]
    alone: Divergence

    @property
    def without(self) -> Check:
        return Check(TRANSFORMERS, ALONE, self.kind, name_of(self.dtype), VERSION, self.alone)

    @property
    def kind(self) -> str:
        """The base that the adapter knows."""
        return "nf4" if self.method == "qlora" else "original"

    def beside(self, loaded: Sequence[Tensor], what: str, base: str, weights: str, bound: Bound | None) -> Check:
        """A check by transformers."""
        return Check(TRANSFORMERS, what, base, weights, VERSION, pooled_divergence(self.logits, loaded), bound)


def trained_model(
    base: Base, adapter: Path, method: str, device: torch.device, dtype: torch.dtype, tokenizer: Any
) -> Trained:
    """Loads what was trained and asks it.

    Raises:
        CorruptFile, InputError: base or adapter do not load, or do not fit each other.
    """
    model = attach(in_fp32(load_base(base, method, device, dtype)), adapter, "policy", alone=True)
    rows = fixed_prompts(tokenizer, context_length(model))
    rooms = model.get_input_embeddings().weight.shape[0]
    beyond = f"has ids beyond the {rooms} rows of the base's embedding"
    require(max(map(max, rows)) < rooms >= len(tokenizer), "tokenizer", len(tokenizer), beyond, OWN_TOKENIZER)
    logits = logits_of(model, rows)
    finite = all(bool(part.isfinite().all()) for part in logits)
    require(finite, "artifact", adapter.name, "what was trained says nan or infinity", "Train it again.")
    with model.disable_adapter():
        alone = pooled_divergence(logits, logits_of(model, rows))
    del model
    free_memory()
    return Trained(base, adapter, method, device, dtype, tokenizer, rows, logits, alone)


def check_tokenizer(trained: Trained, folder: Path) -> None:
    """Raises: CorruptFile: the tokenizer or chat template in an export does not read the prompts as the trained one."""
    exported = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    longest = max(map(len, trained.rows))
    if fixed_prompts(exported, longest) != [list(row) for row in fixed_prompts(trained.tokenizer, longest)]:
        problem = "its tokens of the fixed prompts are others than in training"
        raise CorruptFile("tokenizer", folder.name, problem, "Export it again.")
