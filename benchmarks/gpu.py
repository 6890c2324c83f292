"""PPO on one GPU: peak memory and samples a second on random weights in the real configuration of 0.5B, 1.5B and 7B.

    python benchmarks/gpu.py [--sizes 0.5B,1.5B,7B] [--save gpu.json] [--device cuda]

Needs no network: the weights are drawn here (the 7B take 13.5 GB of disk while it is measured), the tokenizer is the
built-in model's. NF4 base with four adapters of rank 8 (policy, reference, reward, value), bf16 compute, recomputed
layers, one minibatch: `stage=ppo stage.minibatches=1 stage.micro_batch=8`. `--sizes tiny --device cpu` shows that the
script itself works.
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
from ours import loaded, make_adapters, updates
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config
from work import RESULT, Work, result_of

from align.models.base import pocket_folder
from align.track import get_peak_rss_mb

CONFIGS: dict[str, PreTrainedConfig] = {
    "tiny": LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    ),
    "0.5B": Qwen2Config(  # Qwen2.5-0.5B
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=32_768, tie_word_embeddings=True,
    ),
    "1.5B": Qwen2Config(  # Qwen2.5-1.5B
        vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, max_position_embeddings=32_768, tie_word_embeddings=True,
    ),
    "7B": LlamaConfig(  # Llama-2-7B
        vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32,
        max_position_embeddings=4096, tie_word_embeddings=False,
    ),
}  # fmt: skip
GB = 1e9


def make_model(name: str, folder: Path, device: str) -> None:
    """Random weights of a configuration, in bf16, with the built-in model's tokenizer."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="2GB")
    for path in pocket_folder().glob("*token*"):
        shutil.copy(path, folder / path.name)
    for path in pocket_folder().glob("chat_template*"):
        shutil.copy(path, folder / path.name)


def measure(work: Work, adapters: Path) -> dict[str, float]:
    roles = loaded(work, adapters)
    roles.recompute_layers()
    one = updates(work, roles)
    laps = [one(number) for number in range(work.updates)]
    seconds = statistics.median(sum(lap.values()) for lap in laps[1:])
    on_cuda = work.device.startswith("cuda")
    memory = torch.cuda.max_memory_reserved() / GB if on_cuda else get_peak_rss_mb() / 1e3
    phases = {name: statistics.median(lap[name] for lap in laps[1:]) for name in laps[0]}
    return {"samples_per_s": work.batch / seconds, "peak_gb": memory, "s_per_update": seconds, **phases}


def child(step: str, name: str, work: Work, folder: Path) -> dict[str, Any]:
    """One step in a process of its own, whose memory ends with it."""
    return result_of([sys.executable, __file__, "--child", step, name, work.text(), str(folder)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="0.5B,1.5B,7B")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_known_args()[0]  # gpu_stages.py has others
    if given.child:
        step, name, text, where = given.child
        work, folder = Work.of(text), Path(where)
        steps = {
            "model": lambda: make_model(name, folder / "model", work.device),
            "adapters": lambda: make_adapters(work, folder),
            "measure": lambda: measure(work, folder),
        }
        print(RESULT + json.dumps(steps[step]() or {}))
        return
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; `--sizes tiny --device cpu` tries the script without one")
    card = torch.cuda.get_device_name() if given.device.startswith("cuda") else "CPU"
    print(f"{card}: {given.batch} prompts × {given.tokens} new tokens an update, micro-batch {given.micro_batch}, NF4")
    print(f"{'model':<8}{'samples/s':>10}{'peak GB':>9}{'rollout s':>11}{'estimate s':>12}{'update s':>10}")
    rows = {}
    for name in given.sizes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            work = Work(
                str(Path(folder) / "model"), given.batch, given.tokens, 1, 3, "nf4", value_backbone="own",
                micro_batch=given.micro_batch, device=given.device,
            )  # fmt: skip
            for step in ("model", "adapters"):
                child(step, name, work, Path(folder))
            r = rows[name] = child("measure", name, work, Path(folder))
        times = f"{r['rollout_s']:>11.1f}{r['estimate_s']:>12.1f}{r['update_s']:>10.1f}"
        print(f"{name:<8}{r['samples_per_s']:>10.2f}{r['peak_gb']:>9.1f}{times}", flush=True)
    if given.save:
        given.save.write_text(json.dumps({"card": card, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
