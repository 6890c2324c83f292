"""The table of docs/sizes.md: what models of usual sizes take on a GPU, as `stage=plan` predicts it.

Usage: python benchmarks/scale/sizes.py [--write]

Shapes are those of the published configurations; nothing is downloaded, and no torch is imported.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from align.planning.memory import Workload, count_base_bytes, predict_footprint
from align.planning.shapes import Shape, compute_llama_shape

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sizes.md"
BEGIN, END = "<!-- made by benchmarks/scale/sizes.py -->", "<!-- end -->"
COLUMNS = ("model", "qlora SFT", "lora SFT", "full SFT", "qlora DPO", "qlora PPO", "four bf16 models, weights alone")
ROW = Workload("sft", "qlora", "bfloat16", True, 8, 512, step=16, recompute=True, moments=2)
PAIR = replace(ROW, stage="dpo", micro_batch=4, texts=2, step=16, from_adapter=True, reference=True)
ANSWER = replace(
    ROW, stage="ppo", prompt=256, step=32, rewards=1, from_adapter=True, rollout_rows=32, keeps_best=False, moments=8
)


def config(width: int, layers: int, mlp: int, heads: int, groups: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": width, "num_hidden_layers": layers, "intermediate_size": mlp,
        "num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": vocabulary,
        "max_position_embeddings": 4096, **more,
    }  # fmt: skip


QWEN: dict[str, Any] = {"model_type": "qwen2", "tie_word_embeddings": True}
MODELS = {
    "0.5B (Qwen2.5)": config(896, 24, 4864, 14, 2, 151_936, **QWEN),
    "1.5B (Qwen2.5)": config(1536, 28, 8960, 12, 2, 151_936, **QWEN),
    "7B (Llama-2)": config(4096, 32, 11_008, 32, 32, 32_000),
    "8B (Llama-3)": config(4096, 32, 14_336, 32, 8, 128_256),
    "13B (Llama-2)": config(5120, 40, 13_824, 40, 40, 32_000),
    "70B (Llama-3)": config(8192, 80, 28_672, 64, 8, 128_256),
}


def row(name: str, shape: Shape) -> tuple[str, ...]:
    works = (ROW, replace(ROW, method="lora"), replace(ROW, stage="full", method="full"), PAIR, ANSWER)
    taken = [predict_footprint(shape, work).peak for work in works]
    return name, *(f"{one / 1e9:.1f} GB" for one in (*taken, 4 * count_base_bytes(shape, "lora", 2)))


def lines() -> list[str]:
    rows = [row(name, compute_llama_shape(of)) for name, of in MODELS.items()]
    return [f"| {' | '.join(cells)} |" for cells in (COLUMNS, ("---",) * len(COLUMNS), *rows)]


def page(text: str) -> str:
    """The page with the table as it is now."""
    before, _, rest = text.partition(BEGIN)
    return "\n".join([f"{before}{BEGIN}", *lines(), f"{END}{rest.partition(END)[2]}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table into docs/sizes.md")
    if parser.parse_args().write:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n".join(lines()))


if __name__ == "__main__":
    main()
