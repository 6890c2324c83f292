"""Bytes of tensors that are alive in an update by PPO, RLOO and GRPO: what a critic costs.

    python benchmarks/ppo/live.py [MODEL_FOLDER] [--rows 16] [--save live.json]      (by default what run.py makes)

Each row is a process of its own, which makes two updates of `ours.py`; the peak is that of the second, where the
optimiser has its moments. The bytes are counted as tensors are made and freed, so neighbours on the machine and what
imports take do not change them. Peak memory of the whole process stands beside them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from ours import roles_on, updates
from work import RESULT, Work, result_of

from align.planning.live_bytes import LiveBytes
from align.track import get_peak_rss_mb

HERE = Path(__file__).resolve().parent
RESPONSE = 32
ROWS: dict[str, dict[str, Any]] = {
    "PPO, value backbone of its own": {},
    "PPO, value on the policy": {"value_backbone": "policy"},
    "RLOO": {"advantage": "rloo", "group": 8, "value_backbone": "none"},
    "GRPO": {"advantage": "grpo", "group": 8, "value_backbone": "none"},
}


def live(work: Work) -> dict[str, float]:
    """MB in the second update of one process."""
    with tempfile.TemporaryDirectory() as folder:
        roles = roles_on(work, Path(folder))
    modules = roles.model, roles.value_head, *roles.score_heads
    with LiveBytes(module for module in modules if module is not None) as count:
        count.lap()
        weights = count.now
        one = updates(work, roles)
        one(0)
        count.lap()
        one(1)
        peak = count.lap()
    trained = sum(p.numel() for role in roles.trainable for p in roles.parameters_of(role))
    return {"weights_mb": weights / 1e6, "peak_mb": peak / 1e6, "trained": trained, "peak_rss_mb": get_peak_rss_mb()}


def format_table(found: dict[str, Any]) -> str:
    """The table of README.md."""
    lines = ["| an update by | weights, MB | most alive, MB | trained parameters | peak of the process, MB |"]
    lines.append("|---|---|---|---|---|")
    for name, row in found["rows"].items():
        cells = f"{row['weights_mb']:.0f} | {row['peak_mb']:.0f} | {row['trained']:,} | {row['peak_rss_mb']:.0f}"
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(HERE / ".models" / "smollm2"))
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--child", metavar="WORK", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(RESULT + json.dumps(live(Work.of(given.child))))
        return
    found: dict[str, Any] = {"model": Path(given.model).name, "dtype": given.dtype, "responses": given.rows, "rows": {}}
    for name, more in ROWS.items():
        work = Work(given.model, given.rows, RESPONSE, 1, 2, given.dtype, **more)
        found["rows"][name] = result_of([sys.executable, str(Path(__file__)), "--child", work.text()])
        print(format_table({"rows": {name: found["rows"][name]}}).splitlines()[-1], flush=True)
    print("\n" + format_table(found))
    if given.save:
        given.save.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
