"""One decode step of many rows: the base, one adapter, eight adapters mixed, eight of ranks 8 to 64.

    python benchmarks/serve/step.py [--models pocket,smollm2] [--sizes 8,32] [--rounds 20]

Beside it, on the same weights: transformers' own step, PEFT with one adapter and with `adapter_names`, and the step of
`rollout.engine=hf`. Each round takes every case by turns, a step that warms up and one that is timed, at the same
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
from common import FIRST_ID, LAST_ID, MANY_RANKS, Record, bases, decoder_on, median, options, random_adapters, table
from peft import PeftModel
from transformers import AutoModelForCausalLM, DynamicCache

from align.models.fastpath.decoder import ReservedCache
from align.models.fastpath.mixed import Piece
from align.models.forward import get_lm_head
from align.models.load import load_base
from align.rollout.hf import next_states
from align.run import Base
from align.run.weights import adapter_digest

HERE = Path(__file__).resolve().parent
PROMPT, ADAPTERS = 64, 8
Step = Callable[[int], object]
"""A decode step, given the position of the token that it reads. Positions come in order, none is left out."""

PLAIN, ROLLOUT, BASE = "transformers", "rollout.engine=hf", "base"
BARS = {"one adapter": (1.3, 1.3), "8 mixed": (1.6, 1.35), "8 of ranks 8–64": (2.0, 2.0)}
"""At 8 rows and at 32."""


def engine_steps(
    base: Base, size: int, adapters: Sequence[Path], ranks: Sequence[Path], columns: int
) -> dict[str, Step]:
    decoder = decoder_on(base, torch.float32, size, columns)
    even, uneven = ([adapter_digest(folder) for folder in folders] for folders in (adapters, ranks))
    for digest, folder in zip((*even, *uneven), (*adapters, *ranks), strict=True):
        decoder.bank.load(digest, folder, set())

    def step_of(rows: Sequence[str | None]) -> Step:
        def step(position: int) -> object:
            pieces = [Piece(slot, digest, (FIRST_ID + slot,), position) for slot, digest in enumerate(rows)]
            return decoder.logits(torch.cat(decoder.step(pieces)))

        return step

    def mixed(digests: Sequence[str]) -> list[str]:
        return [digests[row % len(digests)] for row in range(size)]

    rows = {
        BASE: [None] * size,
        "one adapter": even[:1] * size,
        "8 mixed": mixed(even),
        "8 of ranks 8–64": mixed(uneven),
    }
    return {name: step_of(each) for name, each in rows.items()}


def rollout_step(base: Base, ids: torch.Tensor, columns: int) -> Step:
    """What `rollout.engine=hf` does between two draws, without an adapter."""
    model = load_base(base, "lora", torch.device("cpu"), torch.float32)
    size, width = ids.shape
    cache = ReservedCache(columns)
    next_states(model, ids, torch.ones_like(ids).bool(), torch.arange(width).expand(size, -1), cache)

    def step(position: int) -> object:
        seen = torch.ones(size, position + 1, dtype=torch.bool)
        return get_lm_head(model)(next_states(model, ids[:, :1], seen, torch.full((size, 1), position), cache))

    return step


def peer_steps(base: Base, ids: torch.Tensor, adapters: Sequence[Path]) -> dict[str, Step]:
    def plain() -> Any:
        return AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).eval()

    adapted = PeftModel.from_pretrained(plain(), adapters[0], adapter_name="0")
    for number, folder in enumerate(adapters[1:], 1):
        adapted.load_adapter(folder, str(number))
    adapted.set_adapter("0")
    adapted.eval()

    def step_of(model: Any, **more: Any) -> Step:
        cache = DynamicCache(config=model.config)
        model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1, **more)
        return lambda position: model(input_ids=ids[:, :1], cache=cache, use_cache=True, **more).logits

    names = [str(row % len(adapters)) for row in range(len(ids))]
    return {
        PLAIN: step_of(plain()),
        "PEFT, one adapter": step_of(adapted),
        "PEFT, 8 mixed": step_of(adapted, adapter_names=names),
    }


@torch.inference_mode()
def timed(base: Base, size: int, rounds: int, folder: Path) -> dict[str, float]:
    """Milliseconds of a step, by case."""
    adapters = random_adapters(base, ADAPTERS, (16,), folder / "even")
    ranks = random_adapters(base, ADAPTERS, MANY_RANKS, folder / "uneven")
    columns = PROMPT + 2 * rounds
    ids = torch.randint(FIRST_ID, LAST_ID, (size, PROMPT), generator=torch.Generator().manual_seed(0))
    steps = peer_steps(base, ids, adapters) | {ROLLOUT: rollout_step(base, ids, columns)}
    steps |= engine_steps(base, size, adapters, ranks, columns)
    took: dict[str, list[float]] = {name: [] for name in steps}
    for position in range(PROMPT, columns, 2):
        for name, step in steps.items():
            step(position)
            began = time.perf_counter()
            step(position + 1)
            took[name].append(1e3 * (time.perf_counter() - began))
    return {name: median(each) for name, each in took.items()}


def format_table(found: dict[str, Any]) -> str:
    """The table of README.md."""
    cases = ("PEFT, one adapter", "PEFT, 8 mixed", *BARS)
    rows = []
    for name, ms in found["rows"].items():
        place = 0 if name.endswith("B=8") else 1
        cells = [name, *(f"{ms[each]:.1f}" for each in (PLAIN, ROLLOUT, BASE))]
        for case in cases:
            own = ms[case] / ms[PLAIN if case.startswith("PEFT") else BASE]
            bar = f" (≤ {BARS[case][place]:g})" if case in BARS else ""
            cells.append(f"{ms[case]:.1f}: {own:.2f}{bar}, {ms[case] / ms[ROLLOUT]:.2f}")
        rows.append(cells)
    return table(("ms", "transformers, base", "`rollout.engine=hf`, base", "engine, base", *cases), rows)


def main() -> None:
    parser = options(__doc__, 20, HERE / "step.json")
    parser.add_argument("--sizes", default="8,32", help="rows of a step, parted by commas")
    given = parser.parse_args()
    record = Record(given)
    for name, base in bases(given.models).items():
        for size in map(int, given.sizes.split(",")):
            with tempfile.TemporaryDirectory() as folder:
                record.add(f"{Path(name).name} B={size}", timed(base, size, given.rounds, Path(folder)))
            gc.collect()
    print("\n" + format_table(record.found))


if __name__ == "__main__":
    sys.exit(main())
