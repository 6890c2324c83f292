"""What the scripts here share: random adapters on one base, the engine that serves them, the machine that it ran on."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from align.models.base import find_base
from align.models.fastpath.mixed import MixedDecoder
from align.models.load import build_skeleton, load_base
from align.rollout.continuous import ContinuousBatch
from align.run import Base, environment

PPO = Path(__file__).resolve().parents[1] / "ppo"
sys.path.append(str(PPO))  # for its `work`
PACKAGES = ("torch", "transformers", "peft", "safetensors")
MANY_RANKS = (16, 8, 64, 32)
FIRST_ID, LAST_ID = 10, 4000
"""Token ids that prompts are drawn of: both models have them, and none is special."""


def options(doc: str | None, rounds: int, save: Path) -> argparse.ArgumentParser:
    """What every script can be told."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="pocket,smollm2", help="built-in models or folders, parted by commas")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=rounds, help="each case is measured once a round, by turns")
    parser.add_argument("--save", type=Path, default=save, help="the JSON file of the figures")
    return parser


def random_adapters(base: Base, count: int, ranks: Sequence[int], into: Path) -> list[Path]:
    """Folders of adapters on every linear layer, the ranks by turns, with weights that change what is said."""
    shapes = linear_shapes(base)
    return [random_adapter(base, shapes, seed, ranks[seed % len(ranks)], into) for seed in range(count)]


def random_adapter(base: Base, shapes: Mapping[str, tuple[int, int]], seed: int, rank: int, into: Path) -> Path:
    folder = into / f"{Path(base.id).name}-{seed}-rank{rank}"
    draw = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, (outputs, inputs) in shapes.items():
        prefix = f"base_model.model.{name}"
        weights[f"{prefix}.lora_A.weight"] = torch.randn(rank, inputs, generator=draw) / inputs**0.5
        weights[f"{prefix}.lora_B.weight"] = torch.randn(outputs, rank, generator=draw) * 0.02
    modules = sorted({name.rpartition(".")[2] for name in shapes})
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=modules, task_type="CAUSAL_LM",
        base_model_name_or_path=base.path, inference_mode=True,
    )  # fmt: skip
    config.save_pretrained(folder)
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def linear_shapes(base: Base) -> dict[str, tuple[int, int]]:
    """Features out of and into each linear layer but the head, by the layer's name."""
    model = build_skeleton(base)
    head = model.get_output_embeddings()
    found = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head)
    return {name: (m.out_features, m.in_features) for name, m in found}


def decoder_on(
    base: Base, dtype: torch.dtype, slots: int, columns: int, resident: int = 16, max_rank: int = 64
) -> MixedDecoder:
    model = load_base(base, "lora", torch.device("cpu"), dtype)
    return MixedDecoder(model, slots, columns, resident, max_rank)


def engine_on(base: Base, dtype: torch.dtype, slots: int, columns: int, **bank: int) -> ContinuousBatch:
    return ContinuousBatch(decoder_on(base, dtype, slots, columns, **bank), columns, queue=1 << 20)


def bases(models: str) -> dict[str, Base]:
    return {name: find_base(name) for name in models.split(",")}


def load() -> float:
    """How many threads of the whole machine computed or wanted to, in the minute before."""
    return round(os.getloadavg()[0], 1)


class Record:
    """Figures, the machine that they were taken on, and its load before and after each row. With no other work it is at
    most the number of threads."""

    def __init__(self, given: argparse.Namespace, more: Sequence[str] = ()) -> None:
        torch.set_num_threads(given.threads)
        self.path: Path = given.save
        machine = {
            "system": platform.platform(),
            "cpu": environment.describe_processor(environment.describe_machine()),
            "cores": os.cpu_count(),
            "threads": given.threads,
            "rounds": given.rounds,
            "versions": [f"{name}=={version(name)}" for name in PACKAGES] + list(more),
        }
        self.found: dict[str, Any] = {"machine": machine, "load": {}, "rows": {}}
        self._load = load()

    def add(self, name: str, row: Any) -> None:
        """A row; it is written at once."""
        self.found["rows"][name] = row
        before, self._load = self._load, load()
        self.found["load"][name] = (before, self._load)
        self.path.write_text(json.dumps(self.found, indent=2) + "\n")
        print(f"{name}: {json.dumps(row)}", flush=True)


def median(of: Sequence[float], digits: int = 2) -> float:
    return round(statistics.median(of), digits)


def quantile(of: Sequence[float], share: float) -> float:
    """The value that this share of all lies below; of few values, one that is there."""
    ranked = sorted(of)
    return ranked[min(int(share * len(ranked)), len(ranked) - 1)]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"
