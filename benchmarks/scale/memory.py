"""Compare predicted memory with the bytes of live tensors in one step of each stage, on rows of full length.

Usage: python benchmarks/scale/memory.py [--save memory.json] [--only WORD,…] [--device cpu|cuda] [--threads 1]

Needs no network: `pocket` is the built-in model, `smollm2` has the shape of SmolLM2-135M and random weights. On a CPU
without bf16 products, bf16 is measured on pocket only, because it is too slow on larger models. On a CPU, tensors are
counted as they are made and freed; on a GPU the figures are its allocator's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from align.models.base import find_base, find_pocket_folder
from align.ops.linear import has_bf16_products
from align.planning.memory import Workload, predict_footprint
from align.planning.shapes import read_shape
from align.ppo.measured_update import measure_update
from align.run import Base, environment
from align.trainers.common import Training
from align.trainers.measured_steps import measure_steps

PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes")
SMOLLM2 = LlamaConfig(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
PPO = Workload("ppo", "qlora", "float32", False, 16, 64, step=16, prompt=40, rewards=1, from_adapter=True)
PPO = replace(PPO, rollout_rows=32)
ROWS = Workload("sft", "qlora", "float32", False, 4, 128, step=4)
LARGE = replace(PPO, micro_batch=4, step=4, length=48, rollout_rows=4)
BF16 = {"dtype": "bfloat16"}
CASES: dict[str, tuple[str, Workload]] = {
    "PPO": ("pocket", PPO),
    "PPO in bf16": ("pocket", replace(PPO, **BF16)),
    "PPO, two micro-batches": ("pocket", replace(PPO, micro_batch=8)),
    "PPO, one pass": ("pocket", replace(PPO, whole_batch=True)),
    "PPO, every weight": ("pocket", replace(PPO, method="full", from_adapter=False)),
    "PPO, rows beyond the fast path": ("pocket", replace(PPO, micro_batch=2, step=2, prompt=560, length=568)),
    "SFT": ("pocket", ROWS),
    "SFT, dropout": ("pocket", replace(ROWS, dropout=0.05)),
    "SFT in bf16, recomputed": ("pocket", replace(ROWS, recompute=True, **BF16)),
    "reward": ("pocket", replace(ROWS, stage="reward", texts=4)),
    "DPO": ("pocket", replace(ROWS, stage="dpo", texts=2, reference=True)),
    "full": ("pocket", replace(ROWS, stage="full", method="full")),
    "PPO on NF4": ("smollm2", LARGE),
    "PPO on NF4, recomputed": ("smollm2", replace(LARGE, recompute=True)),
    "PPO on NF4, value on the policy": ("smollm2", replace(LARGE, value_backbone="policy")),
    "PPO by LoRA": ("smollm2", replace(LARGE, method="lora")),
    "PPO on NF4 in bf16": ("smollm2", replace(LARGE, **BF16)),
    "SFT on NF4": ("smollm2", replace(ROWS, micro_batch=2, step=2)),
}


def create_smollm2(folder: Path) -> Base:
    """Write a model of SmolLM2's shape with random weights, and the built-in model's tokenizer."""
    AutoModelForCausalLM.from_config(SMOLLM2, dtype=torch.bfloat16).save_pretrained(folder)
    for path in (*find_pocket_folder().glob("*token*"), *find_pocket_folder().glob("chat_template*")):
        shutil.copy(path, folder / path.name)
    return find_base(str(folder))


def build_training_settings(work: Workload) -> Training:
    return Training(
        lr=0.0,
        epochs=1.0,
        batch_size=work.step,
        micro_batch=work.micro_batch,
        warmup=0.0,
        schedule="constant",
        max_grad_norm=1.0,
        save_every=10,
        gradient_checkpointing="true" if work.recompute else "false",
        seed=0,
    )


def measure_row(base: Base, work: Workload, device: torch.device) -> dict[str, object]:
    """Return the predicted and the measured peak, and both by phase, in MB."""
    start = time.perf_counter()
    prediction = predict_footprint(read_shape(base), work)
    if work.stage == "ppo":
        measured = measure_update(base, work, device)
    else:
        measured = measure_steps(base, work, build_training_settings(work), device)
    predicted_mb = prediction.peak / 1e6
    measured_mb = max(measured.values()) / 1e6
    return {
        "predicted_mb": round(predicted_mb, 1),
        "measured_mb": round(measured_mb, 1),
        "off": round(predicted_mb / measured_mb - 1, 3),
        "phases_mb": {
            phase: [round(prediction.get_phase_bytes(phase) / 1e6, 1), round(size / 1e6, 1)]
            for phase, size in measured.items()
        },
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument(
        "--only",
        default="",
        help="words in the names of the cases to measure, separated by commas; the file keeps other rows",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    machine = {
        "system": platform.platform(),
        "cpu": environment.describe_processor(environment.describe_machine()),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "versions": [f"{name}=={version(name)}" for name in PACKAGES],
    }
    rows: dict[str, object] = {}
    if options.only and options.save.is_file():  # keep the rows that the same machine measured before
        previous = json.loads(options.save.read_text(encoding="utf-8"))
        rows = previous.get("rows", {}) if previous.get("machine") == machine else {}
    print("| model | case | predicted | measured | off by |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        bases: dict[str, Base] = {"pocket": find_base()}
        for name, (model, work) in CASES.items():
            slow = device.type == "cpu" and model == "smollm2" and work.dtype == "bfloat16" and not has_bf16_products()
            selected = any(word in f"{model}: {name}" for word in options.only.split(","))
            if slow or not selected:
                continue
            if model not in bases:
                bases[model] = create_smollm2(Path(folder))
            row = measure_row(bases[model], replace(work, cuda=device.type == "cuda"), device)
            rows[f"{model}: {name}"] = row
            figures = f"{row['predicted_mb']} MB | {row['measured_mb']} MB | {row['off']:+.1%}"
            print(f"| {model} | {name} | {figures} |", flush=True)
            options.save.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
