"""Measure PPO with vLLM's rollouts: the distance of their logprobs from the policy, and the check for a lost adapter.

    benchmarks/scale/vllm.sh VENV                                    # makes an environment with vLLM, and runs this
    python benchmarks/scale/vllm_rollouts.py --python VENV/bin/python [--updates 4]
        [--cases float32,bfloat16,ahead,unloaded]

Each case is a run of the built-in model from its base. In `unloaded`, an adapter is unloaded in update 3 without the
run's knowledge, between the run's check and the answers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from io import StringIO
from pathlib import Path
from typing import Any

from align.__main__ import main as align
from align.rollout.engine_process import VLLM, read_engine_version
from align.rollout.vllm_sampler import VllmSampler
from align.track import read_rows

HERE = Path(__file__).resolve().parent
CASES = {
    "float32": ["method=qlora", "dtype=float32"],
    "bfloat16": ["method=qlora", "dtype=bfloat16"],
    "ahead": ["method=qlora", "dtype=float32", "stage.max_staleness=1"],
    "unloaded": ["method=qlora", "dtype=float32"],
}
BARS = {"float32": ("gap", 1e-4), "ahead": ("gap", 1e-4), "bfloat16": ("ratio_off", 0.005)}
"""Case → the figure that has a limit, and the limit."""
MESSAGES = (("user", "Hello, what is number {}?"), ("assistant", "A number like another."))


def run_case(name: str, options: Any, root: Path) -> dict[str, Any]:
    """Run one case. Returns its figures, and for `unloaded` also the error message."""
    data = root / "chats.jsonl"
    chats = [[{"role": role, "content": text.format(i)} for role, text in MESSAGES] for i in range(64)]
    data.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    arguments = [
        *("stage=ppo", "model=pocket", "init=base", "reward=rules", "reward.rules=[{rule: length, low: 2, high: 9}]"),
        *("data=files", f"data.path={data}", "data.max_length=96", f"stage.updates={options.updates}"),
        *("stage.batch_size=16", "stage.micro_batch=8", "stage.normalise_on=16", "stage.lr=0.005", "rollout=vllm"),
        *(f"rollout.python={options.python}", "rollout.args={enforce-eager: true}", "rollout.max_new_tokens=24"),
        *("rollout.temperature=0.9", "device=cpu", f"run.root={root}", f"run.name={name}"),
        *CASES[name],
    ]
    start = time.monotonic()
    errors = StringIO()
    with redirect_stderr(errors):
        status = align(arguments)
    print(errors.getvalue(), end="")
    rows = read_rows(root / "ppo" / name / "metrics.jsonl") if status == 0 or name == "unloaded" else []
    figures: dict[str, Any] = {"status": status, "updates": len(rows), "seconds": round(time.monotonic() - start, 1)}
    if rows:
        figures["gap"] = max(row["rollout_gap"] for row in rows)
        figures["ratio_off"] = max(abs(row["rollout_ratio"] - 1) for row in rows)
        figures["staleness"] = [row["staleness"] for row in rows]
    if name == "unloaded":
        figures["said"] = errors.getvalue().strip().splitlines()[-1].replace(str(options.python), "PYTHON")
    return figures


@contextmanager
def unload_before_update(update: int) -> Iterator[None]:
    """Unload the policy's adapter from vLLM just before the answers of an update are sampled."""
    complete = VllmSampler._complete
    calls = iter(range(99))

    def unload_and_complete(self: VllmSampler, rows: Any) -> Any:
        if next(calls) == update:  # the first call samples the reference's answers
            for adapter in self.adapters.values():
                self.servers[0].client.unload(adapter.name)
        return complete(self, rows)

    VllmSampler._complete = unload_and_complete
    try:
        yield
    finally:
        VllmSampler._complete = complete


def main() -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--python", required=True, help="the Python of an environment with vLLM")
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--cases", default=",".join(CASES), help="separated by commas")
    parser.add_argument("--save", type=Path, default=HERE / "vllm.json")
    options = parser.parse_args()
    record: dict[str, Any] = {"machine": platform.processor() or platform.machine()}
    record |= {"cores": os.cpu_count(), "vllm": read_engine_version(VLLM, options.python, "--python"), "cases": {}}
    with suppress(OSError, ValueError):
        record |= json.loads(options.save.read_text()) | {"vllm": record["vllm"]}
    for name in options.cases.split(","):
        fault = unload_before_update(3) if name == "unloaded" else nullcontext()
        with fault, tempfile.TemporaryDirectory() as work:
            figures = run_case(name, options, Path(work))
        figures["load"] = round(os.getloadavg()[0], 1)
        if name in BARS:
            key, bar = BARS[name]
            figures["holds"] = figures.get(key, bar + 1) <= bar
        if name == "unloaded":
            figures["holds"] = figures["status"] == 2 and "update 3" in figures["said"]
        print(name, figures, flush=True)
        record["cases"][name] = figures
        options.save.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
