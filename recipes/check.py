"""The figures of a finished recipe beside the bars that it must reach, which stand in its `bars.json`; exits 1 where
one on learning or memory is missed.

Usage: python recipes/check.py RECIPE RUN_ROOT [SEED] [--save FILE]
`markdown(RECIPE)` is the table of its `expected.json`, as docs/recipes.md shows it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from string import Formatter
from typing import Any

from align.ops.few import FEW
from align.report import few
from align.run import Manifest, read_manifest

STAGES = ("sft", "sample", "annotate", "reward", "ppo", "eval", "export")
RECIPES = Path(__file__).resolve().parent


def read(recipe: str, name: str) -> Any:
    return json.loads((RECIPES / recipe / name).read_text(encoding="utf-8"))


def held(value: float, sign: str, bar: float) -> bool:
    return value >= bar if sign == ">=" else value <= bar


def manifests(root: Path, seed: int) -> dict[str, Manifest]:
    """The newest finished run of each stage with this seed. `export` is the merged one; `annotate` made the votes: a
    simulated annotator's, else a browser's, for the demo's user may have opened the page afterwards."""
    found: dict[str, Manifest] = {}
    for path in root.glob("*/*/manifest.json"):
        manifest = read_manifest(path.parent)
        if manifest.status != "done" or manifest.seed != seed:
            continue
        config, stage = manifest.config, manifest.stage
        if stage == "annotate" and config["stage"].get("action") not in ("simulate", "serve"):
            continue
        if stage == "export" and config["export"]["name"] != "merged":
            continue
        if stage not in found or rank(manifest) > rank(found[stage]):
            found[stage] = manifest
    missing = [stage for stage in STAGES if stage not in found]
    if missing:
        sys.exit(f"{root} has no finished {', '.join(missing)} with seed {seed}: run the recipe first")
    return found


def rank(manifest: Manifest) -> tuple[bool, tuple[int, str]]:
    return manifest.config["stage"].get("action") == "simulate", manifest.publication


def seconds(run: Manifest) -> float:
    started, finished = (datetime.fromisoformat(run.times[key]) for key in ("started", "finished"))
    return (finished - started).total_seconds()


def figures(root: Path, seed: int) -> dict[str, Any]:
    """What one seed reached. Minutes are those of the stages together, whatever was done between them."""
    runs = manifests(root, seed)
    metrics = {stage: runs[stage].metrics for stage in STAGES}
    evaluation = metrics["eval"]
    return {
        "seed": seed,
        "sft_loss_before": metrics["sft"]["loss_before"],
        "sft_loss_after": metrics["sft"]["loss_after"],
        "sft_loss_drop": metrics["sft"]["loss_before"] - metrics["sft"]["loss_after"],
        **judged(metrics["annotate"], metrics["reward"]),
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
        "merged_kl": next(found["kl"] for name, found in metrics["export"]["receipt"].items() if "/merged/" in name),
        "minutes": sum(seconds(run) for run in runs.values()) / 60,
        "peak_rss_mb": max(m["peak_rss_mb"] for m in metrics.values() if "peak_rss_mb" in m),
    }


def judged(votes: Mapping[str, Any], reward: Mapping[str, Any]) -> dict[str, float]:
    """The reward model on held-out pairs; only of a simulated annotator the order without the noise is known."""
    accuracy = reward["accuracy"]
    if "agreement" not in votes:
        ends = {"": "value", "_low": "low", "_high": "high", "_rankings": "n"}
        return {f"reward_held_out{end}": accuracy[key] for end, key in ends.items()}
    return {
        "annotator_agreement": votes["agreement"],
        "reward_accuracy": reward["accuracy_noiseless"]["value"],
        "reward_accuracy_noisy": accuracy["value"],
        "reward_ceiling_noisy": reward["ceiling"]["value"],
    }


SHOWN = (  # the rows of a table: what, how its figures are put, the figures that have bars
    ("held-out loss, base → SFT", "{sft_loss_before:.2f} → {sft_loss_after:.2f}", ("sft_loss_drop",)),
    ("reward model against the noiseless order", "{reward_accuracy:.3f}", ("reward_accuracy",)),
    ("… against the noisy labels, of a ceiling", "{reward_accuracy_noisy:.3f} of {reward_ceiling_noisy:.3f}", ()),
    (
        "reward model on held-out pairs",
        "{reward_held_out:.2f} [{reward_held_out_low:.2f}, {reward_held_out_high:.2f}]", (),
    ),
    (
        "win rate over SFT, gold score", "{win_rate:.2f} [{win_rate_low:.2f}, {win_rate_high:.2f}]",
        ("win_rate", "win_rate_low"),
    ),
    ("gold score, SFT → PPO", "{gold_sft:.2f} → {gold_ppo:.2f}", ()),
    ("KL to the reference, nats a response", "{kl:.1f}", ("kl",)),
    ("distinct-2, SFT → PPO", "{distinct2_sft:.2f} → {distinct2_ppo:.2f}", ("distinct2_kept",)),
    ("tokens an answer, SFT → PPO", "{length_sft:.1f} → {length_ppo:.1f}", ()),
    ("the word that rose most", "“{risen_word}” {risen_word_sft:.0%} → {risen_word_ppo:.0%}", ()),
    ("merged against NF4 + adapter, KL a token", "{merged_kl:.0e}", ()),
    ("peak memory, MB", "{peak_rss_mb:.0f}", ("peak_rss_mb",)),
    ("minutes", "{minutes:.1f}", ("minutes",)),
)  # fmt: skip
OBSERVATIONS = {"reward_held_out": "reward_held_out_rankings", "win_rate": "prompts"}
"""Figures with an interval, and where it stands what that is over."""
MEANT = {"sft_loss_drop": "falls by ", "win_rate_low": "low end ", "distinct2_kept": "share kept "}


def markdown(recipe: str) -> str:
    """The figures in a recipe's `expected.json` as a table, one column a seed, beside its bars."""
    rows, bars = read(recipe, "expected.json"), read(recipe, "bars.json")
    names = [f"seed {row['seed']}" for row in rows]
    lines = [("", *names, "bar"), ("---",) * (len(rows) + 2)]
    for what, figure, barred in SHOWN:
        if not all(name in rows[0] for _, name, _, _ in Formatter().parse(figure) if name):
            continue  # of the other kind of annotator
        said = (f"{MEANT.get(n, '')}{'≥' if bars[n][0] == '>=' else '≤'} {bars[n][1]:g}" for n in barred if n in bars)
        cells = (f"{figure.format(**row)}{scarce(row, figure)}" for row in rows)
        lines.append((what, *cells, ", ".join(said)))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def scarce(row: dict[str, Any], figure: str) -> str:
    """What a figure with an interval over few observations is marked with; `figure` is its name, or puts it."""
    over = (row.get(n, FEW) for name, n in OBSERVATIONS.items() if name == figure or f"{{{name}_low" in figure)
    return "".join(f" (n={n}{few(n)})" for n in over if few(n))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=sorted(p.parent.name for p in RECIPES.glob("*/bars.json")))
    parser.add_argument("root", type=Path)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--save", type=Path, help="append the figures to the list in this JSON file")
    given = parser.parse_args()
    found, bars = figures(given.root, given.seed), read(given.recipe, "bars.json")
    missed = []
    print(f"\n{given.recipe}, seed {given.seed}")
    for name, value in found.items():
        sign, bar = bars.get(name, ("", 0.0))
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        met = not sign or held(value, sign, bar)
        verdict = "" if met else "slower than on the machine of the docs" if name == "minutes" else "MISSED"
        print(f"  {name:<24}{shown:>10}  {f'{sign} {bar:g}' if sign else '':<9}{verdict}{scarce(found, name)}".rstrip())
        missed += [] if met or name == "minutes" else [name]  # a slow machine learns no worse
    if given.save:
        before = json.loads(given.save.read_text()) if given.save.is_file() else []
        rows = [row for row in before if row["seed"] != given.seed] + [found]
        rounded = [{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]
        given.save.write_text(json.dumps(sorted(rounded, key=lambda r: r["seed"]), indent=2) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
