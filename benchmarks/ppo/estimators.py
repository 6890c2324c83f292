"""GRPO and RLOO in place of PPO on the quickstart, in the same time: what each has learned, and what it took.

    recipes/quickstart/seeds.sh runs/gold
    python benchmarks/ppo/estimators.py runs/gold [--save benchmarks/ppo/estimators.json] [--dtype bfloat16]

All start from the quickstart's supervised model, on its prompts, against its reward model, with the settings of its
PPO; an update of each samples as many answers. Without a critic an update costs less, so RLOO and GRPO make more of
them: `CHANGES` has what is theirs. PPO's settings were tuned on this very task, theirs were not. All are judged by
`stage=eval` on prompts that nothing trained on. Finished runs are not made again. The time is that of the processor,
which neighbours on the machine change less than the time on the wall.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from gold import quickstart

from align.evals.comparison import read_samples
from align.ops import intervals
from align.run import read_manifest

CHANGES = {
    "PPO": "",
    "RLOO": "stage.advantage=rloo stage.group_size=4 stage.updates=60",
    "GRPO": "stage.advantage=grpo stage.group_size=8 stage.updates=60 stage.kl_coef=0.125",
}
"""Words that take the place of the recipe's. With `grpo` the price of KL is in the loss, where advantages have variance
1: 0.125 there is what 0.05 is beside PPO's scores, whose standard deviation is 0.4."""
FIGURES = {"gold": 2, "win_rate": 2, "kl": 1, "distinct2": 2, "minutes": 1, "peak_rss_mb": 0}
Figures = dict[str, float]


def words(change: str) -> list[str]:
    """The recipe's words for its PPO, with some of them changed."""
    given = dict(word.split("=", 1) for word in [*quickstart("ppo"), *change.split()])
    return [f"{key}={value}" for key, value in given.items()]


def run(root: Path, dtype: str, *more: str) -> Path:
    """The folder of a run, made unless it is there: the last line that a stage prints. What it took of the processor
    is noted beside the runs, of one that was killed and goes on what the rest took."""
    common = [f"seed={root.name}", f"run.root={root}", "project=quickstart", f"dtype={dtype}"]
    command = [sys.executable, "-m", "align", *common, "rollout.max_new_tokens=24", *more]
    before = processor_seconds()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    folder = Path(done.stdout.splitlines()[-1])
    noted = root / "estimators" / f"{folder.name}.json"
    if not noted.exists():
        noted.parent.mkdir(exist_ok=True)
        noted.write_text(json.dumps(processor_seconds() - before))
    return folder


def processor_seconds() -> float:
    """Of all children that have ended."""
    took = os.times()
    return took.children_user + took.children_system


def learned(root: Path, dtype: str, name: str) -> Figures:
    """What the policy of an estimator is worth, and what it took. The runs have names of their own: the recipe's PPO,
    which is there already, was not timed."""
    folder = run(root, dtype, *words(CHANGES[name]), f"run.name=timed-{name.lower()}")
    judged = run(root, dtype, "stage=eval", f"artifact=ppo:{folder.name}")
    gold = intervals.mean([s.score_policy for s in read_samples(judged / "artifact" / "samples.jsonl")])
    found = read_manifest(judged).metrics
    took = json.loads((root / "estimators" / f"{folder.name}.json").read_text())
    return {
        "gold": gold.value, "low": gold.low or gold.value, "high": gold.high or gold.value,
        "win_rate": found["win_rate"]["value"], "kl": found["kl"], "distinct2": found["distinct2"]["policy"],
        "minutes": took / 60, "peak_rss_mb": read_manifest(folder).metrics["peak_rss_mb"],
    }  # fmt: skip


def compare(roots: list[Path], dtype: str) -> dict[str, Any]:
    """Figures of each seed, and the settings that gave them, by estimator."""
    return {
        "settings": {name: " ".join(words(change)) for name, change in CHANGES.items()},
        "figures": {name: [learned(root, dtype, name) for root in roots] for name in CHANGES},
    }


def cell(rows: list[Figures], key: str, digits: int) -> str:
    """Mean and standard deviation over the seeds; of one seed the gold score's interval over the prompts."""
    values = [row[key] for row in rows]
    told = f"{mean(values):.{digits}f}"
    if len(rows) > 1:
        return f"{told} ± {stdev(values):.{digits}f}"
    return f"{told} [{rows[0]['low']:.2f}, {rows[0]['high']:.2f}]" if key == "gold" else told


def markdown(found: dict[str, Any]) -> str:
    """The table of README.md."""
    columns = "estimator|gold score|win rate over SFT|KL, nats a response|distinct-2|processor minutes|peak memory, MB"
    lines = [f"| {columns.replace('|', ' | ')} |", "|---|---|---|---|---|---|---|"]
    for name, rows in found["figures"].items():
        lines.append(f"| {name} | {' | '.join(cell(rows, key, digits) for key, digits in FIGURES.items())} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the runs of each seed, as recipes/quickstart/seeds.sh makes it")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--dtype", default="auto", help="bfloat16 where the machine multiplies it by itself")
    given = parser.parse_args()
    roots = sorted(path.resolve() for path in given.folder.iterdir() if path.name.isdigit())
    if not roots:
        sys.exit(f"{given.folder} holds no runs: run recipes/quickstart/seeds.sh {given.folder} first")
    found = compare(roots, given.dtype)
    print("\n" + markdown(found))
    if given.save:
        given.save.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
