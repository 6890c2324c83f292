"""The model that was trained, and how far each loaded export lies from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from align.errors import CorruptFile, require
from align.export.adapter import OWN_TOKENIZER
from align.export.bases import DEQUANTISED
from align.export.engines import OTHERS, TRANSFORMERS, adapter_on, freed, logits_of, version_of, whole_model
from align.export.receipt import ALONE, Bound, Row, compared, fixed_prompts
from align.models.adapters import attach
from align.models.load import context_length, in_fp32, load_base, name_of
from align.ops.divergence import Divergence
from align.run import Base

EXACT: Bound = ("max_logprob", 1e-4)
"""Of the same numbers summed in fp32 by another loader."""
MERGED: Bound = ("kl", 1e-5)
"""Of a merge done and compared in fp32."""
ROUNDED: Bound = ("kl", 1e-2)
"""Of weights that lost bits when they were saved."""


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
    def without(self) -> Row:
        return Row(TRANSFORMERS, ALONE, self.kind, name_of(self.dtype), version_of(TRANSFORMERS), self.alone)

    @property
    def kind(self) -> str:
        """The base that the adapter knows."""
        return "nf4" if self.method == "qlora" else "original"

    def beside(self, loaded: Sequence[Tensor], what: str, base: str, weights: str, bound: Bound | None) -> Row:
        found = compared(self.logits, loaded)
        return Row(TRANSFORMERS, what, base, weights, version_of(TRANSFORMERS), found, bound)


def trained_model(
    base: Base, adapter: Path, method: str, device: torch.device, dtype: torch.dtype, tokenizer: Any
) -> Trained:
    """Loads what was trained and asks it.

    Raises:
        CorruptFile, InputError: base or adapter do not load, or do not fit each other.
    """
    model = attach(in_fp32(load_base(base, method, device, dtype)), adapter, "policy")
    rows = fixed_prompts(tokenizer, context_length(model))
    rooms = model.get_input_embeddings().weight.shape[0]
    beyond = f"has ids beyond the {rooms} rows of the base's embedding"
    require(max(map(max, rows)) < rooms >= len(tokenizer), "tokenizer", len(tokenizer), beyond, OWN_TOKENIZER)
    logits = logits_of(model, rows)
    finite = all(bool(part.isfinite().all()) for part in logits)
    require(finite, "artifact", adapter.name, "what was trained says nan or infinity", "Train it again.")
    with model.disable_adapter():
        alone = compared(logits, logits_of(model, rows))
    del model
    freed()
    return Trained(base, adapter, method, device, dtype, tokenizer, rows, logits, alone)


def adapter_rows(trained: Trained, folder: Path, dequantised: Path | None, kept: str) -> list[Row]:
    """An exported adapter on each base that somebody may put it on.

    Args:
        dequantised: the folder of that base, its weights in `kept`; None where it was not written.
    """
    base = Path(trained.base.path)
    on_own = adapter_on(
        base, folder, trained.rows, trained.device, trained.dtype, quantised=trained.kind == "nf4"
    )  # fmt: skip
    found = [trained.beside(on_own, "adapter", trained.kind, name_of(trained.dtype), EXACT)]
    if trained.kind == "nf4":
        if dequantised is None:
            found.append(Row(TRANSFORMERS, "adapter", DEQUANTISED, kept, note="that base does not lie beside the runs"))
        else:
            loaded = adapter_on(dequantised, folder, trained.rows, trained.device)
            found.append(trained.beside(loaded, "adapter", DEQUANTISED, kept, EXACT if kept == "float32" else ROUNDED))
        found.append(on_original(trained, folder))
    return [*found, trained.without, *unasked()]


def merged_rows(trained: Trained, folder: Path, into: str, kept: str, summed: Sequence[Tensor] | None) -> list[Row]:
    """A merged model as it lies on disk and, where `summed` are its logits then, before it was cast to `kept`.

    Merged into the original weights a QLoRA adapter makes another model: it is held to what the adapter says on these,
    and how far that lies from what was trained is told.
    """
    base, known = Path(trained.base.path), into in (trained.kind, DEQUANTISED)
    truth = trained.logits
    if not known:
        truth = adapter_on(base, trained.adapter, trained.rows, trained.device, trained.dtype)
    loaded = whole_model(folder, trained.rows, trained.device)
    found = []
    for what, weights, logits, bound in (
        ("merge", "float32", summed, MERGED),
        ("merged", kept, loaded, MERGED if kept == "float32" else ROUNDED),
    ):
        if logits is not None:
            divergence = compared(truth, logits)
            found.append(Row(TRANSFORMERS, what, into, weights, version_of(TRANSFORMERS), divergence, bound))
    if not known:
        found.append(trained.beside(loaded, "gap", into, kept, None))
    if trained.kind == "nf4":
        found.append(on_original(trained, trained.adapter))
    return [*found, trained.without, *unasked()]


def check_tokenizer(trained: Trained, folder: Path) -> None:
    """Raises: CorruptFile: the tokenizer or chat template in an export does not read the prompts as the trained one."""
    exported = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    longest = max(map(len, trained.rows))
    if fixed_prompts(exported, longest) != [list(row) for row in fixed_prompts(trained.tokenizer, longest)]:
        problem = "its tokens of the fixed prompts are others than in training"
        raise CorruptFile("tokenizer", folder.name, problem, "Export it again.")


def on_original(trained: Trained, adapter: Path) -> Row:
    """What most people will do with an adapter of QLoRA's. Told, and not held to a bound: it is another model."""
    base = Path(trained.base.path)
    loaded = adapter_on(base, adapter, trained.rows, trained.device, trained.dtype)
    return trained.beside(loaded, "adapter", "original", name_of(trained.dtype), None)


def unasked() -> list[Row]:
    return [Row(engine, note=why) for engine, why in OTHERS.items()]
