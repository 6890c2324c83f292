"""Measure reward overoptimisation: how far a policy's gold score falls from its peak in training without a KL penalty,
on a reward model of few rankings.

    python benchmarks/frontier/overoptimisation.py [--root runs/frontier] [--save benchmarks/frontier/turn.json]
        [--plot docs/turn.svg] [--dtype bfloat16] [--jobs 1]

For each number of rankings a reward model trains on the first ones of a seed's store, and RLOO trains on it with
kl_coef=0. Every few updates the policy answers held-out prompts. The run records its reward model's scores and the KL;
this script adds gold scores (the sentiment that ranked the pairs, without its noise). The prompts are split in halves:
one half chooses the update of the peak, the other half measures how much gold is lost from there to the end, because a
maximum over many updates is biased upwards on the prompts that chose it. Intervals are over prompts. Finished runs are
not made again. About eight minutes of one processor a run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from outcomes import append_answer
from runs import Runs, build_parser, round_figures, run_in_parallel

from align.annotate.store import Store
from align.annotate.store.preference_pairs import load_preferences
from align.core.types import Message
from align.data.read.preferences import write_preferences
from align.ops.intervals import mean_interval
from align.report.plots import create_axes, render_figure
from align.reward.rules import Sentiment
from align.track import read_rows

RANKINGS = (25, 100, 400)
"""The quickstart has 8,800."""
SEEDS = (0,)
UPDATES = 80
EVALUATION_INTERVAL = 5
"""Updates."""
HELD_OUT_PROMPTS = 128
REWARD_OVERRIDES = "stage=reward data=files stage.lr=5e-4 stage.batch_size=8"
POLICY_OVERRIDES = (
    "stage=ppo stage.advantage=rloo stage.group_size=4 stage.lr=1e-3 stage.kl_coef=0 stage.epochs=1 "
    f"stage.minibatches=4 stage.micro_batch=16 stage.updates={UPDATES} stage.eval_every={EVALUATION_INTERVAL} "
    f"stage.eval_prompts={HELD_OUT_PROMPTS} stage.shown={HELD_OUT_PROMPTS} stage.publish=last"
)

Curve = dict[str, list[Any]]
"""`step`, `kl`, `gold` and `proxy` of each evaluated update; `gold` and `proxy` hold a score for each prompt."""


def train_on_rankings(runs: Runs, seed: int, rankings: int) -> None:
    """Train a reward model on so many rankings, and a policy on it."""
    overoptimised_runs = runs.subfolder("turn")
    name = f"rankings-{rankings}"
    init = f"init={runs.latest_run_path(seed, 'sft')}"
    pairs_path = overoptimised_runs.root / str(seed) / f"{name}.jsonl"
    if not pairs_path.exists():
        write_preferences(pairs_path, list(read_first_rankings(runs.root / str(seed), rankings)))
    epochs = max(2, 400 // rankings)  # about 50 steps at least
    overoptimised_runs.run_stage(
        seed, *REWARD_OVERRIDES.split(), f"stage.epochs={epochs}", f"data.path={pairs_path}", init, name=name
    )
    overoptimised_runs.run_stage(
        seed, *POLICY_OVERRIDES.split(), f"reward.ref=reward:{name}", init, name=f"climbs-{name}"
    )


def read_first_rankings(root: Path, count: int) -> Iterator[Any]:
    """Yield the pairs of the oldest rankings of a seed's store, in their order."""
    with Store.open(f"sqlite:///{root / 'annotations.db'}", create_if_missing=False) as store:
        pairs = load_preferences(store, "quickstart", allow_simulated=True)
    for i, (_, ranking_pairs) in enumerate(groupby(pairs, lambda pair: (pair.group_id, pair.annotator))):
        if i == count:
            return
        yield from ranking_pairs


def load_curve(runs: Runs, seed: int, rankings: int) -> Curve:
    """Load the evaluations of a run and score its answers."""
    folder = runs.subfolder("turn").root / str(seed) / "ppo" / f"climbs-rankings-{rankings}"
    kl_by_step = {
        row["step"]: row["held_out_kl"] for row in read_rows(folder / "metrics.jsonl") if "held_out_kl" in row
    }
    sentiment = Sentiment()
    curve: Curve = {"step": [], "kl": [], "gold": [], "proxy": []}
    for step, step_rows in groupby(read_rows(folder / "samples.jsonl"), lambda row: row["step"]):
        answers = list(step_rows)
        conversations = [
            append_answer(tuple(Message(**message) for message in row["prompt"]), row["answer"]) for row in answers
        ]
        curve["step"].append(step)
        curve["kl"].append(kl_by_step[step])
        curve["gold"].append(sentiment.score(conversations).tolist())
        curve["proxy"].append([row["score"] for row in answers])
    return curve


def summarize_peak(curves: Sequence[Mapping[str, list[Any]]]) -> dict[str, Any]:
    """Return gold, KL and proxy at the start, at gold's peak and at the end, as means over seeds.

    Each half of the prompts chooses the peak once, and the other half measures gold there.

    Args:
        curves: of each seed, see `Curve`.
    """
    losses = []
    peak_scores = []
    peak_kls = []
    for curve in curves:
        gold = np.array(curve["gold"])  # [updates, prompts]
        for choosing_half, measuring_half in ((0, 1), (1, 0)):
            peak = int(gold[:, choosing_half::2].mean(1).argmax())
            losses += (gold[-1, measuring_half::2] - gold[peak, measuring_half::2]).tolist()
            peak_scores += gold[peak, measuring_half::2].tolist()
            peak_kls.append(curve["kl"][peak])
    loss = mean_interval(losses)
    return {
        "start": compute_mean(np.mean(curve["gold"][0]) for curve in curves),
        "peak": compute_mean(peak_scores),
        "peak_kl": compute_mean(peak_kls),
        "end": compute_mean(np.mean(curve["gold"][-1]) for curve in curves),
        "end_kl": compute_mean(curve["kl"][-1] for curve in curves),
        "lost": [loss.value, loss.low, loss.high],
        "end_proxy": compute_mean(standardise_means(curve["proxy"])[-1] for curve in curves),
    }


def standardise_means(scores: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean of each list of scores, standardised by mean and standard deviation of the first list."""
    first_scores = np.array(scores[0])
    return [float((np.mean(step_scores) - first_scores.mean()) / first_scores.std(ddof=1)) for step_scores in scores]


def compute_mean(values: Any) -> float:
    return float(np.mean(list(values)))


def format_table(report: Mapping[str, Any]) -> str:
    """Return the table of docs/choosing.md."""
    lines = [
        "| rankings | gold at the start | at its peak | KL there | at the end | KL there | proxy there | end − peak |"
    ]
    lines.append("|---" * 8 + "|")
    for rankings, row in report["rows"].items():
        figures = (row[key] for key in ("start", "peak", "peak_kl", "end", "end_kl", "end_proxy"))
        loss, low, high = row["lost"]
        interval = "" if low is None else f" [{low:+.2f}, {high:+.2f}]"  # none if every peak is at the end
        cells = " | ".join(f"{figure:.2f}" for figure in figures)
        lines.append(f"| {int(rankings):,} | {cells} | {loss:+.2f}{interval} |")
    return "\n".join(lines) + "\n"


def plot_gold(curves: Mapping[int, Sequence[Mapping[str, list[Any]]]]) -> bytes:
    """Plot gold by update as SVG, averaged over seeds, a line for each number of rankings."""
    figure, ax = create_axes("updates", "gold score")
    for (rankings, seed_curves), marker in zip(curves.items(), "osd^v", strict=False):
        gold = np.mean([np.mean(curve["gold"], 1) for curve in seed_curves], 0)
        ax.plot(seed_curves[0]["step"], gold, marker=marker, markersize=3, label=f"{rankings:,} rankings")
    ax.legend(loc=(0.62, 0.41))
    return render_figure(figure)


def main() -> None:
    parser = build_parser(__doc__, SEEDS)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--rankings", type=int, nargs="+", default=RANKINGS)
    options = parser.parse_args()
    runs = Runs(options.root, options.dtype)
    run_in_parallel(options.jobs, runs.run_shared_stages, [(seed,) for seed in options.seeds])
    trainings = [(runs, seed, rankings) for seed in options.seeds for rankings in options.rankings]
    run_in_parallel(options.jobs, train_on_rankings, trainings)
    curves = {rankings: [load_curve(runs, seed, rankings) for seed in options.seeds] for rankings in options.rankings}
    rows = {str(rankings): summarize_peak(seed_curves) for rankings, seed_curves in curves.items()}
    report = round_figures({"seeds": list(options.seeds), "rows": rows})
    print("\n" + format_table(report))
    if options.save:
        options.save.write_text(json.dumps(report, indent=2) + "\n")
    if options.plot:
        options.plot.write_bytes(plot_gold(curves))


if __name__ == "__main__":
    main()
