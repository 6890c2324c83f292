"""Helpers for tests of GGUF: tiny models with the built-in tokenizer, which llama.cpp can read, and their export."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from align.export.adapter import write_adapter
from align.export.converters import find_converters
from align.export.gguf import GgufSource, write_adapter_as_gguf, write_missing_bases
from align.export.trained_model import TrainedModel
from align.models.base import find_builtin_folder
from align.models.dequantised import DEQUANTISED, dequantise_in_place
from align.models.load import cast_to_fp32, load_base
from align.run import Base, model_digest

BASE = {"id": "org/tiny", "revision": "abc123", "digest": "00ff" * 16}


def make_model(folder: Path, architecture: str = "Llama") -> Base:
    """Save a model with random weights, whose spread is wide enough to show errors of quantisation and rounding."""
    pocket = find_builtin_folder("pocket")
    tokenizer = AutoTokenizer.from_pretrained(pocket)
    torch.manual_seed(0)
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "initializer_range": 0.1,
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = getattr(transformers, f"{architecture}Config")(**shape)
    getattr(transformers, f"{architecture}ForCausalLM")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copy(pocket / "tokenizer.model", folder)
    return Base(architecture, str(folder), None, model_digest(folder))


def build_gguf_source(trained: TrainedModel, into: str = DEQUANTISED) -> GgufSource:
    def load() -> Any:
        if into == DEQUANTISED:
            model = load_base(trained.base, "qlora", trained.device, trained.dtype)
            return dequantise_in_place(model, torch.float32)
        return cast_to_fp32(load_base(trained.base, "lora", trained.device, trained.dtype))

    return GgufSource(BASE, into, load, Path(trained.base.path), trained.tokenizer, find_converters(None))


def export_gguf(
    trained: TrainedModel,
    root: Path,
    into: str = DEQUANTISED,
    quantised: tuple[str, ...] = (),
    python: str | None = None,
    bases: Path | None = None,
) -> Path:
    """Export base and adapter as GGUF. Returns the folder of both.

    Args:
        bases: the folder of bases that other exports may have written; by default a folder below `root`.
    """
    source = build_gguf_source(trained, into)
    folder = root / "out"
    adapter_folder = root / "plain"
    for path in (folder, adapter_folder):
        path.mkdir(parents=True)
    write_adapter(
        adapter_folder, trained.adapter, BASE, tokenizer=trained.tokenizer, base_folder=Path(trained.base.path)
    )
    write_adapter_as_gguf(
        folder, write_missing_bases(bases or root / "bases", source, quantised, python), adapter_folder, source
    )
    return folder
