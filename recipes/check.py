"""The figures of a finished quickstart beside the bars that it must reach; exits 1 where one on
learning or memory is missed.

Usage: python recipes/quickstart/check.py RUN_ROOT [SEED] [--save FILE]
`markdown(json.loads(FILE))` is the table of README.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from align.run import read_manifest

STAGES = ("sft", "sample", "annotate", "reward", "ppo", "eval", "export")
BARS = {  # figure: (at least or at most, bar)
    "sft_loss_drop": (">=", 0.05),
    "reward_accuracy": (">=", 0.72),
    "win_rate": (">=", 0.80),
    "win_rate_low": (">=", 0.72),
    "kl": ("<=", 10.0),
    "distinct2_kept": (">=", 0.75),
    "minutes": ("<=", 10.0),
    "peak_rss_mb": ("<=", 2048.0),
}


def manifests(root: Path, seed: int) -> dict[str, dict[str, Any]]:
    """The newest finished run of each stage with this seed; `export` is the merged one."""
    found: dict[str, dict[str, Any]] = {}
    for path in root.glob("*/*/manifest.json"):
        manifest = read_manifest(path.parent)
        if manifest["status"] != "done" or manifest["seed"] != seed:
            continue
        stage = manifest["stage"]
        if stage == "export" and manifest["identity"]["config"]["export"]["name"] != "merged":
            continue
        if stage not in found or manifest["times"]["finished"] > found[stage]["times"]["finished"]:
            found[stage] = manifest
    missing = [stage for stage in STAGES if stage not in found]
    if missing:
        sys.exit(f"{root} has no finished {', '.join(missing)} with seed {seed}: run recipes/quickstart/run.sh first")
    return found


def figures(root: Path, seed: int) -> dict[str, Any]:
    """What one seed reached. Minutes run from the first stage's start to the last one's end, imports included."""
    runs = manifests(root, seed)
    metrics = {stage: runs[stage]["metrics"] for stage in STAGES}
    times = [datetime.fromisoformat(runs[s]["times"][k]) for s in STAGES for k in ("started", "finished")]
    evaluation, reward = metrics["eval"], metrics["reward"]
    return {
        "seed": seed,
        "sft_loss_before": metrics["sft"]["loss_before"],
        "sft_loss_after": metrics["sft"]["loss_after"],
        "sft_loss_drop": metrics["sft"]["loss_before"] - metrics["sft"]["loss_after"],
        "annotator_agreement": metrics["annotate"]["agreement"],
        "reward_accuracy": reward["accuracy_noiseless"]["value"],
        "reward_accuracy_noisy": reward["accuracy"]["value"],
        "reward_ceiling_noisy": reward["ceiling"]["value"],
        "win_rate": evaluation["win_rate"]["value"],
        "win_rate_low": evaluation["win_rate"]["low"],
        "win_rate_high": evaluation["win_rate"]["high"],
        "prompts": evaluation["win_rate"]["n"],
        "gold_sft": evaluation["gold"]["ref"],
        "gold_ppo": evaluation["gold"]["policy"],
        "kl": evaluation["kl"],
        "distinct2_sft": evaluation["distinct2"]["ref"],
        "distinct2_ppo": evaluation["distinct2"]["policy"],
        "distinct2_kept": evaluation["distinct2"]["policy"] / evaluation["distinct2"]["ref"],
        "risen_word": evaluation["most_risen_word"]["word"],
        "risen_word_sft": evaluation["most_risen_word"]["ref"],
        "risen_word_ppo": evaluation["most_risen_word"]["policy"],
        "repetition_sft": evaluation["repetition"]["ref"],
        "repetition_ppo": evaluation["repetition"]["policy"],
        "length_sft": evaluation["length"]["ref"],
        "length_ppo": evaluation["length"]["policy"],
        "eos_rate_sft": evaluation["eos_rate"]["ref"],
        "eos_rate_ppo": evaluation["eos_rate"]["policy"],
        "nf4_layers": metrics["ppo"]["quantised_layers"],
        "merged_kl": metrics["export"]["kl"],
        "minutes": (max(times) - min(times)).total_seconds() / 60,
        "peak_rss_mb": max(m["peak_rss_mb"] for m in metrics.values() if "peak_rss_mb" in m),
    }


SHOWN = (  # README's rows: what, how its figures are put, the bar
    ("held-out loss, base → SFT", "{sft_loss_before:.2f} → {sft_loss_after:.2f}", "falls"),
    ("reward model against the noiseless order", "{reward_accuracy:.3f}", "0.720"),
    ("… against the noisy labels, of a ceiling", "{reward_accuracy_noisy:.3f} of {reward_ceiling_noisy:.3f}", ""),
    ("win rate over SFT, gold score", "{win_rate:.2f} [{win_rate_low:.2f}, {win_rate_high:.2f}]", "0.80, low end 0.72"),
    ("gold score, SFT → PPO", "{gold_sft:.2f} → {gold_ppo:.2f}", ""),
    ("KL to the reference, nats a response", "{kl:.1f}", "below 10"),
    ("distinct-2, SFT → PPO", "{distinct2_sft:.2f} → {distinct2_ppo:.2f}", "¾ kept"),
    ("tokens an answer, SFT → PPO", "{length_sft:.1f} → {length_ppo:.1f}", ""),
    ("the word that rose most", "“{risen_word}” {risen_word_sft:.0%} → {risen_word_ppo:.0%}", ""),
    ("merged against NF4 + adapter, KL a token", "{merged_kl:.0e}", ""),
    ("peak memory, MB", "{peak_rss_mb:.0f}", "2048"),
    ("minutes", "{minutes:.1f}", "10"),
)  # fmt: skip


def markdown(rows: list[dict[str, Any]]) -> str:
    """Saved figures as README's table, one column a seed."""
    names = [f"seed {row['seed']}" for row in rows]
    lines = [("", *names, "bar"), ("---",) * (len(rows) + 2)]
    lines += [(what, *(figure.format(**row) for row in rows), bar) for what, figure, bar in SHOWN]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--save", type=Path, help="append the figures to the list in this JSON file")
    given = parser.parse_args()
    found = figures(given.root, given.seed)
    missed = []
    print(f"\nquickstart, seed {given.seed}")
    for name, value in found.items():
        sign, bar = BARS.get(name, ("", 0.0))
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        held = not sign or (value >= bar if sign == ">=" else value <= bar)
        verdict = "" if held else "slower than on the machine of README" if name == "minutes" else "MISSED"
        print(f"  {name:<22}{shown:>10}  {f'{sign} {bar:g}' if sign else '':<9}{verdict}".rstrip())
        missed += [] if held or name == "minutes" else [name]  # a slow machine learns no worse
    if given.save:
        before = json.loads(given.save.read_text()) if given.save.is_file() else []
        rows = [row for row in before if row["seed"] != given.seed] + [found]
        rounded = [{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]
        given.save.write_text(json.dumps(sorted(rounded, key=lambda r: r["seed"]), indent=2) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
