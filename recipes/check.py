"""Compare the figures of a finished recipe with its bars and with what other processors measured.

Usage: python recipes/check.py RECIPE RUN_ROOT [SEED] [--save FILE]

`bars.json` holds the limits that a run must reach; the exit status is 1 if one on learning or memory is missed.
`expected.json` holds one row of figures for each seed and processor. Processors add in different orders and so draw
different tokens, so the rows span a band: a figure far outside of it is marked and fails nothing. Only on one processor
do the same seed and versions give the same digits. `format_table(RECIPE)` is the table in docs/recipes.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

from align.report import note_small_sample
from align.report.figure_text import FEW
from align.run import Manifest, read_manifest
from align.run.environment import describe_processor

Row = dict[str, Any]
"""The figures of one seed on one processor."""
STAGES = ("sft", "sample", "annotate", "reward", "ppo", "eval", "export")
RECIPES = Path(__file__).resolve().parent
MACHINE_FIGURES = ("minutes", "peak_rss_mb")
"""Figures of the machine and its load, for which other machines set no band."""


def read_json(recipe: str, name: str) -> Any:
    return json.loads((RECIPES / recipe / name).read_text(encoding="utf-8"))


def meets_bar(value: float, sign: str, bar: float) -> bool:
    return value >= bar if sign == ">=" else value <= bar


def find_newest_runs(root: Path, seed: int) -> dict[str, Manifest]:
    """Return the newest finished run of each stage with this seed. `export` is the merged export. `annotate` is the
    simulated annotators' run if there is one, because a user may have opened the page of the demo afterwards."""
    newest: dict[str, Manifest] = {}
    for path in root.glob("*/*/manifest.json"):
        manifest = read_manifest(path.parent)
        if manifest.status != "done" or manifest.seed != seed:
            continue
        config = manifest.config
        stage = manifest.stage
        if stage == "annotate" and config["stage"].get("action") not in ("simulate", "serve"):
            continue
        if stage == "export" and config["export"]["name"] != "merged":
            continue
        if stage not in newest or sort_key(manifest) > sort_key(newest[stage]):
            newest[stage] = manifest
    missing = [stage for stage in STAGES if stage not in newest]
    if missing:
        sys.exit(f"{root} has no finished {', '.join(missing)} with seed {seed}: run the recipe first")
    return newest


def sort_key(manifest: Manifest) -> tuple[bool, tuple[int, str]]:
    return manifest.config["stage"].get("action") == "simulate", manifest.publication


def run_seconds(run: Manifest) -> float:
    started, finished = (datetime.fromisoformat(run.times[key]) for key in ("started", "finished"))
    return (finished - started).total_seconds()


def measure_recipe(root: Path, seed: int) -> Row:
    """Return the figures that one seed reached. `minutes` is the time of the stages together."""
    runs = find_newest_runs(root, seed)
    metrics = {stage: runs[stage].metrics for stage in STAGES}
    evaluation = metrics["eval"]
    return {
        "seed": seed,
        "processor": describe_processor(runs["ppo"].hardware),
        "sft_loss_before": metrics["sft"]["loss_before"],
        "sft_loss_after": metrics["sft"]["loss_after"],
        "sft_loss_drop": metrics["sft"]["loss_before"] - metrics["sft"]["loss_after"],
        **measure_reward_model(metrics["annotate"], metrics["reward"]),
        "win_rate": evaluation["win_rate"]["value"],
        "win_rate_low": evaluation["win_rate"]["low"],
        "win_rate_high": evaluation["win_rate"]["high"],
        "prompts": evaluation["win_rate"]["n"],
        "collapse": evaluation["collapse"]["verdict"],
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
        "merged_kl": next(file["kl"] for name, file in metrics["export"]["receipt"].items() if "/merged/" in name),
        "minutes": sum(run_seconds(run) for run in runs.values()) / 60,
        "peak_rss_mb": max(m["peak_rss_mb"] for m in metrics.values() if "peak_rss_mb" in m),
    }


def measure_reward_model(votes: Mapping[str, Any], reward: Mapping[str, Any]) -> Row:
    """Return the reward model's accuracy on held-out pairs. Only simulated annotators have an order without noise."""
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


class TableRow(NamedTuple):
    """A row of the table in docs/recipes.md: its label, the format of its cells, and the figures that have bars."""

    label: str
    cell: str
    barred: tuple[str, ...] = ()


TABLE = (
    TableRow("processor", "{processor}"),
    TableRow("held-out loss, base → SFT", "{sft_loss_before:.2f} → {sft_loss_after:.2f}", ("sft_loss_drop",)),
    TableRow("reward model against the noiseless order", "{reward_accuracy:.3f}", ("reward_accuracy",)),
    TableRow("… against the noisy labels, of a ceiling", "{reward_accuracy_noisy:.3f} of {reward_ceiling_noisy:.3f}"),
    TableRow(
        "reward model on held-out pairs",
        "{reward_held_out:.2f} [{reward_held_out_low:.2f}, {reward_held_out_high:.2f}]",
    ),
    TableRow(
        "win rate over SFT, gold score",
        "{win_rate:.2f} [{win_rate_low:.2f}, {win_rate_high:.2f}]",
        ("win_rate", "win_rate_low"),
    ),
    TableRow("greedy answers", "{collapse}"),
    TableRow("gold score, SFT → PPO", "{gold_sft:.2f} → {gold_ppo:.2f}"),
    TableRow("KL to the reference, nats a response", "{kl:.1f}", ("kl",)),
    TableRow("distinct-2, SFT → PPO", "{distinct2_sft:.2f} → {distinct2_ppo:.2f}", ("distinct2_kept",)),
    TableRow("tokens an answer, SFT → PPO", "{length_sft:.1f} → {length_ppo:.1f}"),
    TableRow("the word that rose most", "“{risen_word}” {risen_word_sft:.0%} → {risen_word_ppo:.0%}"),
    TableRow("merged against NF4 + adapter, KL a token", "{merged_kl:.0e}"),
    TableRow("peak memory, MB", "{peak_rss_mb:.0f}", ("peak_rss_mb",)),
    TableRow("minutes", "{minutes:.1f}", ("minutes",)),
)
COUNTS = {"reward_held_out": "reward_held_out_rankings", "win_rate": "prompts"}
"""Figures with an interval, and the figure that counts their observations."""
BAR_PREFIXES = {"sft_loss_drop": "falls by ", "win_rate_low": "low end ", "distinct2_kept": "share kept "}
NOT_MEASURED = "—"
"""The cell of a figure that a row lacks, because an older version of the recipe did not measure it."""


def format_table(recipe: str) -> str:
    """Return the figures in a recipe's `expected.json` as a Markdown table with its bars: one column a seed and
    processor."""
    rows = read_json(recipe, "expected.json")
    bars = read_json(recipe, "bars.json")
    headings = [f"seed {row['seed']}" for row in rows]
    lines = [["", *headings, "bar"], ["---"] * (len(rows) + 2)]
    for label, cell, barred in TABLE:
        if all(format_cell(row, cell) == NOT_MEASURED for row in rows):
            continue  # a figure of the other kind of annotators
        limits = [
            f"{BAR_PREFIXES.get(name, '')}{'≥' if bars[name][0] == '>=' else '≤'} {bars[name][1]:g}"
            for name in barred
            if name in bars
        ]
        lines.append([label, *(format_cell(row, cell) for row in rows), ", ".join(limits)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def format_cell(row: Row, cell: str) -> str:
    names = [name for _, name, _, _ in Formatter().parse(cell) if name]
    if not all(name in row for name in names):
        return NOT_MEASURED
    return f"{cell.format(**row)}{''.join(describe_few(row, name) for name in names)}"


def describe_few(row: Row, name: str) -> str:
    """Return the mark of a figure with an interval over few observations; empty for other figures."""
    count = row.get(COUNTS.get(name, ""), FEW)
    return f" (n={count}{note_small_sample(count)})" if note_small_sample(count) else ""


def describe_band(value: Any, name: str, rows: Sequence[Row]) -> str:
    """Return the lowest and highest of the expected figures, marked if `value` lies further outside than they are
    apart, and than a hundredth of them."""
    expected = [row[name] for row in rows if name in row]
    if isinstance(value, str) or name in ("seed", *MACHINE_FIGURES) or not expected:
        return ""
    low = min(expected)
    high = max(expected)
    margin = max(high - low, 0.01 * abs(high), 0.01 * abs(low))
    is_inside = low - margin <= value <= high + margin
    return f"{low:.4g} to {high:.4g}{'' if is_inside else '  outside'}"


def print_comparison(row: Row, bars: Mapping[str, tuple[str, float]], expected: Sequence[Row]) -> list[str]:
    """Print each figure with its bar and its band, and return the names of the bars that are missed. A slow machine
    misses none: it learns the same."""
    missed = []
    processors = {run["processor"] for run in expected}
    print(f"{'':<38}{'bar':<9}  expected: {len(expected)} runs on {len(processors)} kinds of processor")
    for name, value in row.items():
        value_text = f"{value:.4g}" if isinstance(value, float) else str(value)
        sign, bar = bars.get(name, ("", 0.0))
        verdict = ""
        if sign and not meets_bar(value, sign, bar):
            verdict = "slower than the bar" if name == "minutes" else "MISSED"
        if verdict == "MISSED":
            missed.append(name)
        limit = f"{sign} {bar:g}" if sign else ""
        notes = "  ".join(filter(None, (describe_band(value, name, expected), verdict)))
        print(f"  {name:<24}{value_text:>10}  {limit:<9}  {notes}{describe_few(row, name)}".rstrip())
    return missed


def save_row(file: Path, row: Row) -> None:
    """Put the row into the list of a JSON file, in place of one of the same seed and processor."""
    rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    key = (row["processor"], row["seed"])
    rounded = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in row.items()}
    rows = [saved for saved in rows if (saved["processor"], saved["seed"]) != key] + [rounded]
    rows.sort(key=lambda saved: (saved["processor"], saved["seed"]))
    file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recipes = {path.parent.name for path in RECIPES.glob("*/bars.json")} - {"demo"}  # which has seeds.py
    parser.add_argument("recipe", choices=sorted(recipes))
    parser.add_argument("root", type=Path)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--save", type=Path, help="put the figures into the list in this JSON file")
    arguments = parser.parse_args()
    row = measure_recipe(arguments.root, arguments.seed)
    print(f"\n{arguments.recipe}, seed {arguments.seed}, {row['processor']}")
    missed = print_comparison(
        row, read_json(arguments.recipe, "bars.json"), read_json(arguments.recipe, "expected.json")
    )
    if row["collapse"] == "collapsed":
        print("The policy COLLAPSED: its greedy answers are nearly alike, so the win rate is no success.")
    if arguments.save:
        save_row(arguments.save, row)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
