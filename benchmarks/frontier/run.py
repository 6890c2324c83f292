"""Measure the gold score that each method reaches and the KL that it takes: SFT, best-of-n, DPO, KTO, PPO, RLOO and
GRPO on the quickstart's pairs, on the built-in model. Makes the table and the plot of docs/choosing.md (the frontier
of Gao, Schulman and Hilton, 2022).

    python benchmarks/frontier/run.py [--root runs/frontier] [--save benchmarks/frontier/results.json]
        [--plot docs/frontier.svg] [--dtype bfloat16] [--jobs 1]

Four simulated annotators rank four answers of the supervised model to each prompt. DPO and KTO train on these pairs.
The other methods use a reward model that is trained on them. Every run of a method takes about three minutes of one
processor. Three learning rates of each method are tried once, on a seed that is not reported. The best one is run with
two KL coefficients on three other seeds. Each policy is evaluated on prompts that no training used, by the sentiment
that ranked the pairs, without its noise. Finished runs are not made again. About four hours of one processor.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from outcomes import (
    BEST_OF,
    Figures,
    Point,
    compute_proxy_scores,
    compute_tuning_score,
    find_evaluation_prompts,
    format_cell,
    load_best_of_point,
    load_policy_point,
    load_sft_point,
    pool_seeds,
)
from runs import BEST_OF_RUN, RECIPE_RUN, Runs, build_parser, round_figures, run_in_parallel
from training_methods import METHODS, REPORTED_SEEDS, TUNING_SEED, build_shared_overrides

from align.report.plots import create_axes, render_figure

LONG_PPO_ROW = "PPO, twice as long"
"""The row of the recipe's own PPO."""


def tune_learning_rates(runs: Runs, jobs: int) -> dict[str, dict[str, float]]:
    """Try every learning rate on the tuning seed. Returns method → learning rate → score."""
    trials = [
        (TUNING_SEED, method, learning_rate, method.kl_values[-1])
        for method in METHODS
        for learning_rate in method.learning_rates
    ]
    run_in_parallel(jobs, runs.train_policy, trials)
    reported_prompts = set[str]()
    for seed in REPORTED_SEEDS:
        reported_prompts |= find_evaluation_prompts(build_shared_overrides(runs.root, seed, runs.dtype))
    folder = runs.root / str(TUNING_SEED)
    return {
        method.name: {
            learning_rate: compute_tuning_score(
                folder, method.run_name(learning_rate, method.kl_values[-1]), reported_prompts
            )
            for learning_rate in method.learning_rates
        }
        for method in METHODS
    }


def load_points(runs: Runs, learning_rates: dict[str, str], seeds: Sequence[int]) -> dict[str, list[Point]]:
    """Load the points of all finished runs. Returns row of the table → point of each seed."""
    points_by_row = dict[str, list[Point]]()
    for seed in seeds:
        root = runs.root / str(seed)
        samples = runs.load_samples(seed)
        points = {"SFT": load_sft_point(root, RECIPE_RUN)}
        points |= {f"best-of-{n}": load_best_of_point(root, BEST_OF_RUN, samples, n) for n in BEST_OF}
        for method in METHODS:
            for kl_value in method.kl_values:
                point = load_policy_point(root, method.run_name(learning_rates[method.name], kl_value))
                point.figures["live_mb"] = json.loads(runs.live_memory_path(method).read_text())
                points[method.row_name(kl_value)] = point
        points[LONG_PPO_ROW] = load_policy_point(root, RECIPE_RUN)
        for name, proxy_score in compute_proxy_scores(root, points, runs.dtype).items():
            points[name].figures["proxy"] = proxy_score
        for name, point in points.items():
            points_by_row.setdefault(name, []).append(point)
    return points_by_row


COLUMNS = {
    "kl": "KL, nats a response",
    "gold": "gold score",
    "proxy": "proxy",
    "distinct2": "distinct-2",
    "risen": "most risen word",
    "minutes": "minutes",
    "live_mb": "live MB",
}


def format_table(report: dict[str, Any]) -> str:
    """Return the table of docs/choosing.md."""
    lines = [f"| method | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in report["rows"].items():
        lines.append(f"| {name} | {' | '.join(format_cell(row, key) for key in COLUMNS)} |")
    return "\n".join(lines) + "\n"


def plot_frontier(rows: dict[str, Figures]) -> bytes:
    """Plot gold over KL as SVG, a line for each method that starts at the supervised model."""
    figure, ax = create_axes("KL to the supervised model, nats a response", "gold score")
    sft_row = rows["SFT"]
    row_names_by_line = {
        "best-of-n (its bound)": [f"best-of-{n}" for n in BEST_OF],
        **{method.name: [method.row_name(kl_value) for kl_value in method.kl_values] for method in METHODS},
        LONG_PPO_ROW: [LONG_PPO_ROW],
    }
    for (line_name, row_names), marker in zip(row_names_by_line.items(), "*sdo^vP", strict=True):
        line = [sft_row, *sorted((rows[name] for name in row_names), key=lambda row: row["kl"])]
        ax.errorbar(
            [row["kl"] for row in line],
            [row["gold"] for row in line],
            [[row["gold"] - row["low"] for row in line], [row["high"] - row["gold"] for row in line]],
            marker=marker,
            capsize=2,
            label=line_name,
        )
    ax.annotate("SFT", (sft_row["kl"], sft_row["gold"]), textcoords="offset points", xytext=(6, -12))
    ax.set_xlim(right=1.6 * ax.get_xlim()[1])
    ax.legend(loc="lower right")
    return render_figure(figure)


def main() -> None:
    parser = build_parser(__doc__, REPORTED_SEEDS)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    runs = Runs(options.root, options.dtype)
    run_in_parallel(options.jobs, runs.run_shared_stages, [(seed,) for seed in (TUNING_SEED, *options.seeds)])
    run_in_parallel(options.jobs, runs.train_recipe_policy, [(seed,) for seed in options.seeds])
    tuning_scores = tune_learning_rates(runs, options.jobs)
    learning_rates = {
        name: max(scores, key=lambda learning_rate: scores[learning_rate]) for name, scores in tuning_scores.items()
    }
    run_in_parallel(1, runs.measure_live_memory, [(method,) for method in METHODS])
    run_in_parallel(options.jobs, runs.sample_best_of_n, [(seed,) for seed in options.seeds])
    trainings = [
        (seed, method, learning_rates[method.name], kl_value)
        for method in METHODS
        for kl_value in method.kl_values
        for seed in options.seeds
    ]
    run_in_parallel(options.jobs, runs.train_policy, trainings)
    rows = {name: pool_seeds(points) for name, points in load_points(runs, learning_rates, options.seeds).items()}
    report = round_figures(
        {"seeds": list(options.seeds), "tried": tuning_scores, "rates": learning_rates, "rows": rows}
    )
    print("\n" + format_table(report))
    if options.save:
        options.save.write_text(json.dumps(report, indent=2) + "\n")
    if options.plot:
        options.plot.write_bytes(plot_frontier(rows))


if __name__ == "__main__":
    main()
