"""Write the table of docs/sizes.md: the memory of models of usual sizes on a GPU, as `stage=plan` predicts it.

Usage: python benchmarks/scale/sizes.py [--write]

Shapes are those of the published configurations. Nothing is downloaded, and torch is not imported.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from align.planning.memory import Workload, count_base_bytes, predict_footprint
from align.planning.shapes import Shape, compute_llama_shape

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sizes.md"
BEGIN = "<!-- made by benchmarks/scale/sizes.py -->"
END = "<!-- end -->"
COLUMNS = ("model", "qlora SFT", "lora SFT", "full SFT", "qlora DPO", "qlora PPO", "four bf16 models, weights alone")
SFT = Workload("sft", "qlora", "bfloat16", True, 8, 512, step=16, recompute=True, moments=2)
DPO = replace(SFT, stage="dpo", micro_batch=4, texts=2, step=16, from_adapter=True, reference=True)
PPO = replace(
    SFT, stage="ppo", prompt=256, step=32, rewards=1, from_adapter=True, rollout_rows=32, keeps_best=False, moments=8
)


def build_config(
    hidden_size: int, layers: int, mlp_size: int, heads: int, kv_heads: int, vocabulary_size: int, **more: Any
) -> dict[str, Any]:
    """Return a model's config.json. `more` are further keys."""
    return {
        "model_type": "llama",
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "intermediate_size": mlp_size,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary_size,
        "max_position_embeddings": 4096,
        **more,
    }


QWEN: dict[str, Any] = {"model_type": "qwen2", "tie_word_embeddings": True}
MODELS = {
    "0.5B (Qwen2.5)": build_config(896, 24, 4864, 14, 2, 151_936, **QWEN),
    "1.5B (Qwen2.5)": build_config(1536, 28, 8960, 12, 2, 151_936, **QWEN),
    "7B (Llama-2)": build_config(4096, 32, 11_008, 32, 32, 32_000),
    "8B (Llama-3)": build_config(4096, 32, 14_336, 32, 8, 128_256),
    "13B (Llama-2)": build_config(5120, 40, 13_824, 40, 40, 32_000),
    "70B (Llama-3)": build_config(8192, 80, 28_672, 64, 8, 128_256),
}


def build_row(name: str, shape: Shape) -> tuple[str, ...]:
    """Return the cells of a model: its name, the peak of each workload, and the weights of four models in bf16."""
    workloads = (SFT, replace(SFT, method="lora"), replace(SFT, stage="full", method="full"), DPO, PPO)
    peaks = [predict_footprint(shape, workload).peak for workload in workloads]
    four_models = 4 * count_base_bytes(shape, "lora", 2)
    return name, *(f"{size / 1e9:.1f} GB" for size in (*peaks, four_models))


def build_table_lines() -> list[str]:
    rows = [build_row(name, compute_llama_shape(config)) for name, config in MODELS.items()]
    return [f"| {' | '.join(cells)} |" for cells in (COLUMNS, ("---",) * len(COLUMNS), *rows)]


def update_page(text: str) -> str:
    """Return the page's text with the table replaced by the present predictions."""
    before_table, _, remainder = text.partition(BEGIN)
    after_table = remainder.partition(END)[2]
    return "\n".join([f"{before_table}{BEGIN}", *build_table_lines(), f"{END}{after_table}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table into docs/sizes.md")
    if parser.parse_args().write:
        PAGE.write_text(update_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n".join(build_table_lines()))


if __name__ == "__main__":
    main()
