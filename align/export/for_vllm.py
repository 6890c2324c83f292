"""What vLLM is given of a portfolio, a base and adapters as plain LoRA, and what it must say by them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from align.core.errors import CorruptFile
from align.data.chat.fixed_prompts import fixed_prompts
from align.export.adapter import write_adapter
from align.export.engines import free_memory, logits_of, picked
from align.models.actors import AdapterPool
from align.models.base import named_base
from align.models.dequantised import dequantised_beside
from align.models.load import context_length, in_fp32, load_base
from align.rollout.probes import Probes, read_probes
from align.rollout.vllm_server import ServedAdapter, adapter_name
from align.run import Base
from align.run.atomic import publish
from align.run.weights import adapter_digest


@dataclass
class ForVllm:
    """See the module.

    Args:
        base: that the adapters were trained on.
        method: `qlora`, on its dequantised NF4 weights, or `lora`.
        device, trained: where and in which dtype it is loaded to be asked; NF4 is quantised out of that dtype. The
            device may change.
        tokenizer: of the base.
        folder: for the adapters.

    Attributes:
        must_say: digest → what the adapter must say, of those that were asked and not prepared yet.
    """

    base: Base
    method: str
    device: torch.device
    trained: torch.dtype
    tokenizer: Any
    folder: Path
    must_say: dict[str, Probes] = field(default_factory=dict)

    def base_folder(self, bases: Path, dtype: torch.dtype) -> Path:
        """Where vLLM finds the base; the dequantised one is written into `bases`, where it is not there yet."""
        if self.method != "qlora":
            return Path(self.base.path)
        named = named_base(self.base)
        return dequantised_beside(bases, self.base, named, self.trained, dtype, self.device, self.tokenizer)

    def learn(self, adapters: Mapping[str, Path]) -> Probes:
        """Find what adapters must say: by what stage=export wrote beside them, or by loading the base once and asking
        it. Returns what the base must say.

        Args:
            adapters: digest → folder.
        """
        known = {digest: read_probes(folder, digest, self.base.digest) for digest, folder in adapters.items()}
        self.must_say |= {digest: probes for digest, probes in known.items() if probes is not None}
        missing = {digest: adapters[digest] for digest, probes in known.items() if probes is None}
        if missing or not known:
            return self._ask(missing)
        first = next(iter(self.must_say.values()))
        return Probes.of_base(first.rows, first.base)

    def _ask(self, adapters: Mapping[str, Path]) -> Probes:
        model = in_fp32(load_base(self.base, self.method, self.device, self.trained))
        rows, pool = fixed_prompts(self.tokenizer, context_length(model)), AdapterPool(model)
        base = picked(logits_of(model, rows), rows)
        for digest, folder in adapters.items():
            pool.add(folder)
            with pool.actor(digest).use() as actor:
                self.must_say[digest] = Probes(rows, picked(logits_of(actor, rows), rows), base)
            pool.remove(digest)
        del model, pool
        free_memory()
        return Probes.of_base(rows, base)

    def __call__(self, folder: Path, digest: str) -> ServedAdapter:
        """The adapter in a folder, for vLLM.

        Raises:
            CorruptFile, InputError: it is no adapter that vLLM can serve, or its files have changed.
        """
        if digest not in self.must_say:
            self.learn({digest: folder})
        target = self.folder / digest
        shutil.rmtree(target, ignore_errors=True)  # of a server that was killed
        with publish(target) as part:
            write_adapter(part, folder, named_base(self.base), tokenizer=self.tokenizer, beside=Path(self.base.path))
        if adapter_digest(folder) != digest:
            shutil.rmtree(target)
            problem = "its files were changed while it was loaded"
            raise CorruptFile("adapter", digest[:12], problem, "Load it again, once it is written whole.")
        return ServedAdapter(adapter_name(digest), target, self.must_say.pop(digest))
