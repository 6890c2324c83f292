"""Measure PPO on one GPU: peak memory and samples a second of models of 0.5B, 1.5B and 7B with random weights.

    python benchmarks/gpu.py [--sizes 0.5B,1.5B,7B] [--save gpu.json] [--device cuda]

Needs no network: the configurations are real ones, the weights are random (those of 7B take 13.5 GB of disk while it is
measured), and the tokenizer is the built-in model's. NF4 base with four adapters of rank 8 (policy, reference, reward,
value), bf16 compute, gradient checkpointing, one minibatch: `stage=ppo stage.minibatches=1 stage.micro_batch=8`.
`--sizes tiny --device cpu` tries the script without a GPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "ppo"))

import torch
from align_ppo import build_update, load_roles, save_new_adapters
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config
from work import RESULT, Work, result_of

from align.models.base import find_pocket_folder
from align.track import get_peak_rss_mb

CONFIGS: dict[str, PreTrainedConfig] = {
    "tiny": LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    ),
    "0.5B": Qwen2Config(  # Qwen2.5-0.5B
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
    ),
    "1.5B": Qwen2Config(  # Qwen2.5-1.5B
        vocab_size=151_936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
    ),
    "7B": LlamaConfig(  # Llama-2-7B
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    ),
}
GB = 1e9


def save_random_model(size: str, folder: Path, device: str) -> None:
    """Save random bf16 weights of a configuration, with the built-in model's tokenizer.

    Args:
        size: a key of `CONFIGS`.
    """
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(CONFIGS[size], dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="2GB")
    for pattern in ("*token*", "chat_template*"):
        for path in find_pocket_folder().glob(pattern):
            shutil.copy(path, folder / path.name)


def measure_updates(work: Work, adapters_path: Path) -> dict[str, float]:
    """Run updates in this process and return the medians of all but the first. Memory is of the GPU if one is used."""
    roles = load_roles(work, adapters_path)
    roles.enable_gradient_checkpointing()
    run_update = build_update(work, roles)
    phases_by_update = [run_update(number) for number in range(work.updates)]
    seconds = statistics.median(sum(phases.values()) for phases in phases_by_update[1:])
    uses_cuda = work.device.startswith("cuda")
    peak_gb = torch.cuda.max_memory_reserved() / GB if uses_cuda else get_peak_rss_mb() / 1e3
    phase_medians = {
        name: statistics.median(phases[name] for phases in phases_by_update[1:]) for name in phases_by_update[0]
    }
    return {
        "samples_per_s": work.batch / seconds,
        "peak_gb": peak_gb,
        "s_per_update": seconds,
        **phase_medians,
    }


def run_in_child(step: str, size: str, work: Work, folder: Path) -> dict[str, Any]:
    """Run a step in a process of its own, so that its memory is free again, and return its figures."""
    return result_of([sys.executable, __file__, "--child", step, size, work.text(), str(folder)])


def run_step(step: str, size: str, work: Work, folder: Path) -> dict[str, Any]:
    """Run a step in this process. Only `measure` returns figures."""
    if step == "model":
        save_random_model(size, folder / "model", work.device)
        return {}
    if step == "adapters":
        save_new_adapters(work, folder)
        return {}
    return measure_updates(work, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="0.5B,1.5B,7B")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_known_args()[0]  # gpu.sh gives gpu_stages.py's options to this script too
    if options.child:
        step, size, work_text, folder = options.child
        print(RESULT + json.dumps(run_step(step, size, Work.from_text(work_text), Path(folder))))
        return
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; `--sizes tiny --device cpu` tries the script without one")
    gpu_name = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    print(
        f"{gpu_name}: {options.batch} prompts × {options.tokens} new tokens an update, "
        f"micro-batch {options.micro_batch}, NF4"
    )
    print(f"{'model':<8}{'samples/s':>10}{'peak GB':>9}{'rollout s':>11}{'estimate s':>12}{'update s':>10}")
    rows = {}
    for size in options.sizes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            work = Work(
                str(Path(folder) / "model"),
                options.batch,
                options.tokens,
                1,
                3,
                "nf4",
                value_backbone="own",
                micro_batch=options.micro_batch,
                device=options.device,
            )
            for step in ("model", "adapters"):
                run_in_child(step, size, work, Path(folder))
            row = run_in_child("measure", size, work, Path(folder))
        rows[size] = row
        phases = f"{row['rollout_s']:>11.1f}{row['estimate_s']:>12.1f}{row['update_s']:>10.1f}"
        print(f"{size:<8}{row['samples_per_s']:>10.2f}{row['peak_gb']:>9.1f}{phases}", flush=True)
    if options.save:
        options.save.write_text(json.dumps({"card": gpu_name, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
