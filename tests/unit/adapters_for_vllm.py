"""Adapters on the built-in model for tests of serving by vLLM, and the probes that they must reproduce."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tiny_roles import add_noise

from align.export.vllm_adapters import VllmAdapters
from align.models.adapters import save_adapter
from align.models.base import find_base
from align.models.load import load_base, load_tokenizer
from align.rollout.probes import Probes
from align.run.weights import adapter_digest

CPU = torch.device("cpu")
MODULES = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 8, "lora_alpha": 16},
    "scaled": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {"r": 8, "rank_pattern": {"down_proj": 12}, "alpha_pattern": {"q_proj": 5}},
}


def save_vllm_adapters(root: Path) -> dict[str, Path]:
    """Save adapters of the kinds that engines read wrongly unless they are lowered."""
    base = find_base("pocket")
    for seed, (name, kind) in enumerate(KINDS.items()):
        torch.manual_seed(seed)
        model = get_peft_model(
            load_base(base, "lora", CPU, torch.float32),
            LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **kind),
        )
        add_noise(model, 0.05)
        save_adapter(model, root / name, base)
    return {name: root / name for name in KINDS}


def build_vllm_adapters(folder: Path, must_say: dict[str, Probes] | None = None) -> VllmAdapters:
    base = find_base("pocket")
    return VllmAdapters(base, "lora", CPU, torch.float32, load_tokenizer(base), folder, {**(must_say or {})})


def learn_short_probes(folders: dict[str, Path]) -> tuple[Probes, dict[str, Probes]]:
    """Return the probes of the base and of the adapters, for three prompts only: the stand-in is slow."""
    vllm_adapters = build_vllm_adapters(Path("nowhere"))
    base_probes = vllm_adapters.load_probes({adapter_digest(folder): folder for folder in folders.values()})

    def take_three_rows(probes: Probes) -> Probes:
        return Probes(probes.rows[:3], probes.adapter[:3], probes.base[:3])

    return take_three_rows(base_probes), {
        digest: take_three_rows(probes) for digest, probes in vllm_adapters.pending_probes.items()
    }
