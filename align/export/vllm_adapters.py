"""Preparation of adapters and bases for vLLM: plain LoRA, dequantised weights, and probes that check vLLM's
logprobs."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from align.core.errors import CorruptFile
from align.data.chat.fixed_prompts import encode_fixed_prompts
from align.export.adapter import write_adapter
from align.export.engines import compute_logits, free_memory, gather_token_logprobs
from align.models.actors import AdapterPool
from align.models.base import to_public_base
from align.models.dequantised import get_or_write_dequantised_base
from align.models.load import cast_to_fp32, get_context_length, load_base
from align.rollout.probes import Probes, read_probes
from align.rollout.vllm_server import ServedAdapter, build_adapter_name
from align.run import Base
from align.run.atomic import publish_folder
from align.run.weights import adapter_digest


@dataclass
class VllmAdapters:
    """A converter of one base model's adapters for vLLM: it writes plain LoRA, and computes the logprobs that vLLM must
    return.

    Args:
        base: base that the adapters were trained on.
        method: `qlora` if they were trained on NF4 weights, `lora` otherwise.
        device, trained_dtype: device and dtype in which the base is loaded to compute probes; NF4 is quantised from
            this dtype. The device may change.
        tokenizer: tokenizer of the base.
        folder: folder for the prepared adapters.

    Attributes:
        pending_probes: digest → probes of the adapters that have probes and are not prepared yet.
    """

    base: Base
    method: str
    device: torch.device
    trained_dtype: torch.dtype
    tokenizer: Any
    folder: Path
    pending_probes: dict[str, Probes] = field(default_factory=dict)

    def prepare_base_folder(self, bases: Path, dtype: torch.dtype) -> Path:
        """Return the folder of the base model for vLLM, after writing a dequantised base into `bases` if it is needed
        and missing."""
        if self.method != "qlora":
            return Path(self.base.path)
        name = to_public_base(self.base)
        return get_or_write_dequantised_base(
            bases, self.base, name, self.trained_dtype, dtype, self.device, self.tokenizer
        )

    def load_probes(self, adapters: Mapping[str, Path]) -> Probes:
        """Store the expected logprobs (probes) of adapters in `pending_probes`, from their exports or computed, and
        return the base's.

        The base model is loaded once if any probes are missing.

        Args:
            adapters: digest → folder.
        """
        missing: dict[str, Path] = {}
        for digest, folder in adapters.items():
            probes = read_probes(folder, digest, self.base.digest)
            if probes is None:
                missing[digest] = folder
            else:
                self.pending_probes[digest] = probes
        if missing or not adapters:
            return self._compute_probes(missing)
        first = next(iter(self.pending_probes.values()))
        return Probes.from_base(first.rows, first.base)

    def _compute_probes(self, adapters: Mapping[str, Path]) -> Probes:
        model = cast_to_fp32(load_base(self.base, self.method, self.device, self.trained_dtype))
        rows = encode_fixed_prompts(self.tokenizer, get_context_length(model))
        pool = AdapterPool(model)
        base = gather_token_logprobs(compute_logits(model, rows), rows)
        for digest, folder in adapters.items():
            pool.add(folder)
            with pool.actor(digest).use() as actor:
                self.pending_probes[digest] = Probes(
                    rows, gather_token_logprobs(compute_logits(actor, rows), rows), base
                )
            pool.remove(digest)
        del model, pool
        free_memory()
        return Probes.from_base(rows, base)

    def __call__(self, folder: Path, digest: str) -> ServedAdapter:
        """Write an adapter as plain LoRA to a folder named by its digest, and return it with its name and probes for
        vLLM.

        Raises:
            CorruptFile, InputError: vLLM cannot serve the adapter, or its files have changed.
        """
        if digest not in self.pending_probes:
            self.load_probes({digest: folder})
        target = self.folder / digest
        shutil.rmtree(target, ignore_errors=True)  # left by a server that was killed
        with publish_folder(target) as scratch:
            write_adapter(
                scratch, folder, to_public_base(self.base), tokenizer=self.tokenizer, base_folder=Path(self.base.path)
            )
        if adapter_digest(folder) != digest:
            shutil.rmtree(target)
            problem = "its files were changed while it was loaded"
            raise CorruptFile("adapter", digest[:12], problem, "Load it again, once it is written whole.")
        return ServedAdapter(build_adapter_name(digest), target, self.pending_probes.pop(digest))
