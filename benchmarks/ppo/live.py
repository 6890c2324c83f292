"""Count the bytes of live tensors in an update by PPO, RLOO and GRPO, to show what a critic costs.

    python benchmarks/ppo/live.py [MODEL_FOLDER] [--rows 16] [--save live.json]      (by default what run.py makes)

Each row is measured in a process of its own that takes two updates of `align_ppo.py`. The peak is that of the second,
when the optimiser has its moments. Bytes are counted when tensors are created and freed, so the figures depend neither
on other processes nor on the memory of imports. The table has the peak memory of the whole process too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from align_ppo import build_roles, build_update
from work import RESULT, Work, result_of

from align.planning.live_bytes import LiveBytes
from align.track import get_peak_rss_mb

HERE = Path(__file__).resolve().parent
RESPONSE_TOKENS = 32
ROWS: dict[str, dict[str, Any]] = {
    "PPO, value backbone of its own": {},
    "PPO, value on the policy": {"value_backbone": "policy"},
    "RLOO": {"advantage": "rloo", "group": 8, "value_backbone": "none"},
    "GRPO": {"advantage": "grpo", "group": 8, "value_backbone": "none"},
}
"""Name → fields of its `Work`."""


def measure_live_bytes(work: Work) -> dict[str, float]:
    """Take two updates in this process and return the figures of the second, in MB."""
    with tempfile.TemporaryDirectory() as folder:
        roles = build_roles(work, Path(folder))
    modules = (roles.model, roles.value_head, *roles.score_heads)
    with LiveBytes(module for module in modules if module is not None) as live_bytes:
        live_bytes.lap()
        weights = live_bytes.now
        run_update = build_update(work, roles)
        run_update(0)
        live_bytes.lap()
        run_update(1)
        peak = live_bytes.lap()
    trained = sum(parameter.numel() for role in roles.trainable for parameter in roles.parameters_of(role))
    return {"weights_mb": weights / 1e6, "peak_mb": peak / 1e6, "trained": trained, "peak_rss_mb": get_peak_rss_mb()}


def format_table(report: dict[str, Any]) -> str:
    """Return the table of README.md."""
    lines = ["| an update by | weights, MB | most alive, MB | trained parameters | peak of the process, MB |"]
    lines.append("|---|---|---|---|---|")
    for name, row in report["rows"].items():
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
    options = parser.parse_args()
    if options.child:
        print(RESULT + json.dumps(measure_live_bytes(Work.from_text(options.child))))
        return
    report: dict[str, Any] = {
        "model": Path(options.model).name,
        "dtype": options.dtype,
        "responses": options.rows,
        "rows": {},
    }
    for name, fields in ROWS.items():
        work = Work(options.model, options.rows, RESPONSE_TOKENS, 1, 2, options.dtype, **fields)
        report["rows"][name] = result_of([sys.executable, str(Path(__file__)), "--child", work.text()])
        print(format_table({"rows": {name: report["rows"][name]}}).splitlines()[-1], flush=True)
    print("\n" + format_table(report))
    if options.save:
        options.save.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
