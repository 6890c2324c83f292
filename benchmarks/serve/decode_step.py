"""Measure one decode step of many rows: the base, one adapter, eight adapters mixed, eight of ranks 8 to 64.

    python benchmarks/serve/decode_step.py [--models pocket,smollm2] [--sizes 8,32] [--rounds 20]

Compared on the same weights: transformers' own step, PEFT with one adapter and with `adapter_names`, and the step of
`rollout.engine=hf`. Each round runs every case by turns, a step that warms up and one that is timed, at the same
position.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import (
    FIRST_ID,
    LAST_ID,
    MANY_RANKS,
    BenchmarkRecord,
    create_decoder,
    create_parser,
    create_random_adapters,
    find_bases,
    format_rows,
    round_median,
)
from peft import PeftModel
from transformers import AutoModelForCausalLM, DynamicCache

from align.models.fastpath.decoder import ReservedCache
from align.models.fastpath.mixed import RequestTokens
from align.models.forward import get_lm_head
from align.models.load import load_base
from align.rollout.hf import compute_next_states
from align.run import Base
from align.run.weights import adapter_digest

HERE = Path(__file__).resolve().parent
PROMPT_TOKENS = 64
ADAPTERS = 8
Step = Callable[[int], object]
"""A decode step. Its argument is the position of the token that it reads; positions are consecutive."""

PLAIN = "transformers"
ROLLOUT = "rollout.engine=hf"
BASE = "base"
BARS = {"one adapter": (1.3, 1.3), "8 mixed": (1.6, 1.35), "8 of ranks 8–64": (2.0, 2.0)}
"""Case → largest ratio to the engine's base, for 8 rows and for 32."""


def create_engine_steps(
    base: Base, size: int, adapters: Sequence[Path], mixed_rank_adapters: Sequence[Path], columns: int
) -> dict[str, Step]:
    """Return the serving engine's step by case. `size` is the number of rows."""
    decoder = create_decoder(base, torch.float32, size, columns)
    digests = [adapter_digest(folder) for folder in adapters]
    mixed_rank_digests = [adapter_digest(folder) for folder in mixed_rank_adapters]
    all_folders = (*adapters, *mixed_rank_adapters)
    for digest, folder in zip((*digests, *mixed_rank_digests), all_folders, strict=True):
        decoder.bank.load(digest, folder, set())

    def create_step(rows: Sequence[str | None]) -> Step:
        def step(position: int) -> object:
            pieces = [RequestTokens(slot, digest, (FIRST_ID + slot,), position) for slot, digest in enumerate(rows)]
            return decoder.logits(torch.cat(decoder.step(pieces)))

        return step

    def cycle_rows(digests: Sequence[str]) -> list[str]:
        return [digests[row % len(digests)] for row in range(size)]

    return {
        BASE: create_step([None] * size),
        "one adapter": create_step(digests[:1] * size),
        "8 mixed": create_step(cycle_rows(digests)),
        "8 of ranks 8–64": create_step(cycle_rows(mixed_rank_digests)),
    }


def create_rollout_step(base: Base, ids: torch.Tensor, columns: int) -> Step:
    """Return the step of `rollout.engine=hf` without an adapter and without sampling."""
    model = load_base(base, "lora", torch.device("cpu"), torch.float32)
    size, width = ids.shape
    cache = ReservedCache(columns)
    compute_next_states(model, ids, torch.ones_like(ids).bool(), torch.arange(width).expand(size, -1), cache)

    def step(position: int) -> object:
        mask = torch.ones(size, position + 1, dtype=torch.bool)
        return get_lm_head(model)(compute_next_states(model, ids[:, :1], mask, torch.full((size, 1), position), cache))

    return step


def create_peer_steps(base: Base, ids: torch.Tensor, adapters: Sequence[Path]) -> dict[str, Step]:
    """Return the steps of transformers and of PEFT."""

    def load_model() -> Any:
        return AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).eval()

    adapted = PeftModel.from_pretrained(load_model(), adapters[0], adapter_name="0")
    for number, folder in enumerate(adapters[1:], 1):
        adapted.load_adapter(folder, str(number))
    adapted.set_adapter("0")
    adapted.eval()

    def create_step(model: Any, **arguments: Any) -> Step:
        cache = DynamicCache(config=model.config)
        model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1, **arguments)
        return lambda position: model(input_ids=ids[:, :1], cache=cache, use_cache=True, **arguments).logits

    names = [str(row % len(adapters)) for row in range(len(ids))]
    return {
        PLAIN: create_step(load_model()),
        "PEFT, one adapter": create_step(adapted),
        "PEFT, 8 mixed": create_step(adapted, adapter_names=names),
    }


@torch.inference_mode()
def time_steps(base: Base, size: int, rounds: int, folder: Path) -> dict[str, float]:
    """Return the median milliseconds of a step, by case."""
    adapters = create_random_adapters(base, ADAPTERS, (16,), folder / "even")
    mixed_rank_adapters = create_random_adapters(base, ADAPTERS, MANY_RANKS, folder / "uneven")
    columns = PROMPT_TOKENS + 2 * rounds
    ids = torch.randint(FIRST_ID, LAST_ID, (size, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    steps = create_peer_steps(base, ids, adapters) | {ROLLOUT: create_rollout_step(base, ids, columns)}
    steps |= create_engine_steps(base, size, adapters, mixed_rank_adapters, columns)
    milliseconds: dict[str, list[float]] = {name: [] for name in steps}
    for position in range(PROMPT_TOKENS, columns, 2):
        for name, step in steps.items():
            step(position)
            start = time.perf_counter()
            step(position + 1)
            milliseconds[name].append(1e3 * (time.perf_counter() - start))
    return {name: round_median(samples) for name, samples in milliseconds.items()}


def format_table(results: dict[str, Any]) -> str:
    """Return the results as the Markdown table of README.md."""
    cases = ("PEFT, one adapter", "PEFT, 8 mixed", *BARS)
    rows = []
    for name, ms in results["rows"].items():
        bar_index = 0 if name.endswith("B=8") else 1
        cells = [name, *(f"{ms[case]:.1f}" for case in (PLAIN, ROLLOUT, BASE))]
        for case in cases:
            base_ratio = ms[case] / ms[PLAIN if case.startswith("PEFT") else BASE]
            bar = f" (≤ {BARS[case][bar_index]:g})" if case in BARS else ""
            cells.append(f"{ms[case]:.1f}: {base_ratio:.2f}{bar}, {ms[case] / ms[ROLLOUT]:.2f}")
        rows.append(cells)
    return format_rows(("ms", "transformers, base", "`rollout.engine=hf`, base", "engine, base", *cases), rows)


def main() -> None:
    parser = create_parser(__doc__, 20, HERE / "step.json")
    parser.add_argument("--sizes", default="8,32", help="rows of a step, separated by commas")
    options = parser.parse_args()
    record = BenchmarkRecord(options)
    for name, base in find_bases(options.models).items():
        for size in map(int, options.sizes.split(",")):
            with tempfile.TemporaryDirectory() as folder:
                record.add(f"{Path(name).name} B={size}", time_steps(base, size, options.rounds, Path(folder)))
            gc.collect()
    print("\n" + format_table(record.results))


if __name__ == "__main__":
    sys.exit(main())
