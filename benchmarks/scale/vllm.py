"""PPO whose answers vLLM draws: how far these are from the policy, and whether a lost adapter is noticed.

    benchmarks/scale/vllm.sh VENV                           # makes an environment with vLLM for CPUs, and runs this
    python benchmarks/scale/vllm.py --python VENV/bin/python [--updates 4] [--cases float32,bfloat16,ahead,unloaded]

Each case is a run of the built-in model from its base. In `unloaded`, an adapter is unloaded in update 3, behind the
run's back, between its check and the answers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
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


def turns(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": "A number like another."}]


def run(name: str, given: Any, root: Path) -> dict[str, Any]:
    """The figures of one case; of `unloaded` what was said."""
    data = root / "chats.jsonl"
    turns = ("Hello, what is number {}?", "A number like another.")
    rows = [
        [{"role": r, "content": t.format(i)} for r, t in zip(("user", "assistant"), turns, strict=True)]
        for i in range(64)
    ]
    data.write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    words = [
        "stage=ppo", "model=pocket", "init=base", "reward=rules", "reward.rules=[{rule: length, low: 2, high: 9}]",
        "data=files", f"data.path={data}", "data.max_length=96", f"stage.updates={given.updates}",
        "stage.batch_size=16", "stage.micro_batch=8", "stage.normalise_on=16", "stage.lr=0.005", "rollout=vllm",
        f"rollout.python={given.python}", "rollout.args={enforce-eager: true}", "rollout.max_new_tokens=24",
        "rollout.temperature=0.9", "device=cpu",
        f"run.root={root}", f"run.name={name}", *CASES[name],
    ]  # fmt: skip
    began, errors = time.monotonic(), StringIO()
    with redirect_stderr(errors):
        status = align(words)
    print(errors.getvalue(), end="")
    rows = read_rows(root / "ppo" / name / "metrics.jsonl") if status == 0 or name == "unloaded" else []
    gaps, ratios = ([row[f"rollout_{key}"] for row in rows] for key in ("gap", "ratio"))
    figures: dict[str, Any] = {"status": status, "updates": len(rows), "seconds": round(time.monotonic() - began, 1)}
    if gaps:
        figures |= {"gap": max(gaps), "ratio_off": max(abs(ratio - 1) for ratio in ratios)}
        figures["staleness"] = [row["staleness"] for row in rows]
    if name == "unloaded":
        figures["said"] = errors.getvalue().strip().splitlines()[-1].replace(str(given.python), "PYTHON")
    return figures


def losing(update: int) -> Callable[[], None]:
    """Let somebody unload the policy's adapter before the answers of an update. Returns what puts that right again."""
    complete, calls = VllmSampler._complete, iter(range(99))

    def lost(self: VllmSampler, rows: Any) -> Any:
        if next(calls) == update:  # the first answers are the reference's
            for adapter in self.adapters.values():
                self.servers[0].client.unload(adapter.name)
        return complete(self, rows)

    VllmSampler._complete = lost

    def mended() -> None:
        VllmSampler._complete = complete

    return mended


def main() -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--python", required=True, help="that has vLLM")
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--cases", default=",".join(CASES), help="parted by commas")
    parser.add_argument("--save", type=Path, default=HERE / "vllm.json")
    given = parser.parse_args()
    record: dict[str, Any] = {"machine": platform.processor() or platform.machine()}
    record |= {"cores": os.cpu_count(), "vllm": read_engine_version(VLLM, given.python, "--python"), "cases": {}}
    with suppress(OSError, ValueError):
        record |= json.loads(given.save.read_text()) | {"vllm": record["vllm"]}
    for name in given.cases.split(","):
        mend = losing(3) if name == "unloaded" else lambda: None
        with tempfile.TemporaryDirectory() as work:
            figures = run(name, given, Path(work))
        mend()
        figures["load"] = round(os.getloadavg()[0], 1)
        if name in BARS:
            key, bar = BARS[name]
            figures["holds"] = figures.get(key, bar + 1) <= bar
        if name == "unloaded":
            figures["holds"] = figures["status"] == 2 and "update 3" in figures["said"]
        print(name, figures, flush=True)
        record["cases"][name] = figures
        given.save.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
