"""Shared by the scripts of this folder: options, random adapters on one base, the engine that serves them, and the
record of results with the machine that they were measured on."""

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
FIRST_ID = 10
LAST_ID = 4000
"""Range of the token ids of random prompts. Both models have them, and none is a special token."""


def create_parser(description: str | None, rounds: int, save: Path) -> argparse.ArgumentParser:
    """Return a parser with the options of every script.

    Args:
        rounds: default of `--rounds`.
        save: default of `--save`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="pocket,smollm2", help="built-in models or folders, separated by commas")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=rounds, help="each case is measured once a round, by turns")
    parser.add_argument("--save", type=Path, default=save, help="the JSON file of the results")
    return parser


def create_random_adapters(base: Base, count: int, ranks: Sequence[int], parent: Path) -> list[Path]:
    """Write random adapters on every linear layer except the head, and return their folders.

    Args:
        ranks: given to the adapters by turns.
        parent: the folder in which the adapters' folders are made.
    """
    shapes = find_linear_shapes(base)
    return [create_random_adapter(base, shapes, seed, ranks[seed % len(ranks)], parent) for seed in range(count)]


def create_random_adapter(
    base: Base, shapes: Mapping[str, tuple[int, int]], seed: int, rank: int, parent: Path
) -> Path:
    """Write an adapter whose random weights are large enough to change the sampled tokens. Returns its folder."""
    folder = parent / f"{Path(base.id).name}-{seed}-rank{rank}"
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, (outputs, inputs) in shapes.items():
        prefix = f"base_model.model.{name}"
        weights[f"{prefix}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) / inputs**0.5
        weights[f"{prefix}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * 0.02
    modules = sorted({name.rpartition(".")[2] for name in shapes})
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=modules,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.path,
        inference_mode=True,
    )
    config.save_pretrained(folder)
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def find_linear_shapes(base: Base) -> dict[str, tuple[int, int]]:
    """Return the name of each linear layer except the head, with its numbers of output and input features."""
    model = build_skeleton(base)
    head = model.get_output_embeddings()
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def create_decoder(
    base: Base, dtype: torch.dtype, slots: int, columns: int, resident: int = 16, max_rank: int = 64
) -> MixedDecoder:
    """Return a decoder on the CPU for `slots` rows of up to `columns` tokens, with a bank of `resident` adapters."""
    model = load_base(base, "lora", torch.device("cpu"), dtype)
    return MixedDecoder(model, slots, columns, resident, max_rank)


def create_engine(base: Base, dtype: torch.dtype, slots: int, columns: int, **bank: int) -> ContinuousBatch:
    """Return the serving engine on the CPU, with a queue that is never full.

    Args:
        bank: `resident` and `max_rank` of the decoder's adapter bank.
    """
    return ContinuousBatch(create_decoder(base, dtype, slots, columns, **bank), columns, queue=1 << 20)


def find_bases(models: str) -> dict[str, Base]:
    """Return the base of each model in a list separated by commas."""
    return {name: find_base(name) for name in models.split(",")}


def read_load_average() -> float:
    """Return how many threads of the machine ran or waited for a core, averaged over the last minute."""
    return round(os.getloadavg()[0], 1)


class BenchmarkRecord:
    """Results, the machine that they were measured on, and its load average before and after each row.

    On a machine without other work, the load is at most the number of threads.
    """

    def __init__(self, options: argparse.Namespace, more_versions: Sequence[str] = ()) -> None:
        torch.set_num_threads(options.threads)
        self.path: Path = options.save
        machine = {
            "system": platform.platform(),
            "cpu": environment.describe_processor(environment.describe_machine()),
            "cores": os.cpu_count(),
            "threads": options.threads,
            "rounds": options.rounds,
            "versions": [f"{name}=={version(name)}" for name in PACKAGES] + list(more_versions),
        }
        self.results: dict[str, Any] = {"machine": machine, "load": {}, "rows": {}}
        self._load = read_load_average()

    def add(self, name: str, row: Any) -> None:
        """Add a row, write the file and print the row."""
        self.results["rows"][name] = row
        load_before = self._load
        self._load = read_load_average()
        self.results["load"][name] = (load_before, self._load)
        self.path.write_text(json.dumps(self.results, indent=2) + "\n")
        print(f"{name}: {json.dumps(row)}", flush=True)


def round_median(values: Sequence[float], digits: int = 2) -> float:
    return round(statistics.median(values), digits)


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which this share of the values lies, without interpolation."""
    ranked = sorted(values)
    return ranked[min(int(share * len(ranked)), len(ranked) - 1)]


def format_rows(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"
