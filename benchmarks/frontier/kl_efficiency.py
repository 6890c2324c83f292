"""Measure three ways to reach the same gold score with less KL than the quickstart's PPO and best-of-n. Makes the
second table of docs/choosing.md.

    python benchmarks/frontier/kl_efficiency.py [--root runs/frontier] [--save benchmarks/frontier/spend.json]
        [--dtype bfloat16] [--jobs 1]

The first way distils best-of-n: SFT trains on the best of 16 answers to each of 1,000 prompts, and PPO starts from the
result. The second takes larger batches: RLOO on 512 answers an update, where the quickstart has 64. The third is the
mean of the weights of that policy and of the quickstart's. Their settings were chosen on seed 3. Seeds, held-out
prompts and the gold score are those of `run.py`, whose finished runs are used.

Goals, fixed beforehand: gold no worse than the quickstart's PPO and than best-of-16 (paired by prompt, margin 0.03); at
most two thirds of that PPO's KL on each seed; the most risen word no more frequent than in best-of-64's answers;
distinct-2 no lower than that PPO's. About 40 minutes of one processor a seed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from average_adapters import average_adapters
from outcomes import (
    Figures,
    Point,
    format_cell,
    load_best_of_point,
    load_policy_point,
    pool_seeds,
    read_minutes,
)
from runs import BEST_OF_RUN, RECIPE_RUN, Runs, build_parser, round_figures, run_in_parallel
from training_methods import PPO_OVERRIDES, REPORTED_SEEDS

from align.ops.intervals import mean_interval

PPO_ROW = "PPO, the quickstart's"
BEST_OF_16_ROW = "best-of-16"
BEST_OF_64_ROW = "best-of-64"
DISTILLED_ROW = "distilled, then PPO"
LARGE_BATCH_ROW = "RLOO, 512 answers an update"
AVERAGED_ROW = "mean of RLOO's and PPO's weights"
LARGE_BATCH_RUN = "rloo-512"
AVERAGED_RUN = "averaged"
LINES = {
    "best": "stage=sample stage.best_of=16 reward=learned stage.prompts=1000 rollout.batch_size=512",
    "sft": "stage=sft data=files data.max_length=256 stage.max_steps=80 method.lr=1e-3",
    "ppo": f"{PPO_OVERRIDES} stage.updates=44 stage.lr=1e-3 stage.kl_coef=0.1",
    "more": f"{PPO_OVERRIDES.replace('micro_batch=16', 'micro_batch=64')} stage.batch_size=512 stage.advantage=rloo "
    "stage.group_size=8 stage.updates=50 stage.lr=1e-3 stage.kl_coef=0.08",
}
"""Overrides of the stages of the first two ways; `more` is RLOO on 512 answers."""


def train_distilled_policy(runs: Runs, seed: int) -> None:
    """Train SFT on the winners of best-of-16, then PPO from it, and evaluate it against the seed's supervised model."""
    distilled_runs = runs.subfolder("distilled")
    root = distilled_runs.root / str(seed)
    init = f"init={runs.latest_run_path(seed, 'sft')}"
    reward = f"reward.ref={runs.latest_run_path(seed, 'reward')}"
    distilled_runs.run_stage(seed, *LINES["best"].split(), reward, init, name="best")
    winners_path = root / "sample" / "best" / "artifact" / "winners.jsonl"
    distilled_runs.run_stage(seed, *LINES["sft"].split(), f"data.path={winners_path}", init, name="sft")
    distilled_runs.run_stage(seed, *LINES["ppo"].split(), reward, "init=sft:sft", name="ppo")
    # As a run's artifact the policy would be compared with the distilled model, from which its training started.
    adapter_path = root / "policy"
    shutil.copytree(root / "ppo" / "ppo" / "artifact", adapter_path, dirs_exist_ok=True)
    distilled_runs.evaluate(seed, str(adapter_path), "ppo", init, "model.path=pocket")


def train_large_batch_policy(runs: Runs, seed: int) -> None:
    runs.run_stage(seed, *LINES["more"].split(), name=LARGE_BATCH_RUN)
    runs.evaluate(seed, f"ppo:{LARGE_BATCH_RUN}", LARGE_BATCH_RUN)


def average_policies(runs: Runs, seed: int) -> None:
    """Average the recipe's policy and the one of `train_large_batch_policy`, which must be there, and evaluate the
    mean.

    A bare adapter folder has no record of its training rows, so a few of the evaluation's prompts are training prompts.
    """
    root = runs.root / str(seed)
    adapter_path = root / AVERAGED_RUN
    average_adapters([root / "ppo" / name / "artifact" for name in (RECIPE_RUN, LARGE_BATCH_RUN)], adapter_path)
    init = f"init={runs.latest_run_path(seed, 'sft')}"
    runs.evaluate(seed, str(adapter_path), AVERAGED_RUN, init, "model.path=pocket")


def load_points(runs: Runs, seed: int) -> dict[str, Point]:
    """Load the points of a seed. Returns row of the table → point."""
    root = runs.root / str(seed)
    samples = runs.load_samples(seed)
    distilled_root = runs.subfolder("distilled").root / str(seed)
    distilled_minutes = sum(read_minutes(distilled_root, name) for name in ("best", "sft", "ppo"))
    averaged_minutes = sum(read_minutes(root, name) for name in (RECIPE_RUN, LARGE_BATCH_RUN))
    return {
        BEST_OF_16_ROW: load_best_of_point(root, BEST_OF_RUN, samples, 16),
        BEST_OF_64_ROW: load_best_of_point(root, BEST_OF_RUN, samples, 64),
        PPO_ROW: load_policy_point(root, RECIPE_RUN),
        LARGE_BATCH_ROW: load_policy_point(root, LARGE_BATCH_RUN),
        DISTILLED_ROW: load_policy_point(distilled_root, "ppo", distilled_minutes),
        AVERAGED_ROW: load_policy_point(root, AVERAGED_RUN, averaged_minutes),
    }


def compare_gold(points: Sequence[Point], baseline_points: Sequence[Point]) -> dict[str, Any]:
    """Compare gold scores on the prompts that both policies answered.

    Args:
        points: of each seed.
        baseline_points: of the same seeds.

    Returns:
        `all`: mean difference, and its interval over prompts, which ignores that trainings differ; `seeds`: the mean
        difference of each seed; `prompts`: how many pairs of answers there are.
    """
    differences_by_seed = []
    for point, baseline_point in zip(points, baseline_points, strict=True):
        baseline_scores = scores_by_prompt(baseline_point)
        differences_by_seed.append(
            [
                score - baseline_scores[prompt]
                for prompt, score in scores_by_prompt(point).items()
                if prompt in baseline_scores
            ]
        )
    interval = mean_interval([difference for differences in differences_by_seed for difference in differences])
    return {
        "all": [interval.value, interval.low, interval.high],
        "seeds": [sum(differences) / len(differences) for differences in differences_by_seed],
        "prompts": sum(map(len, differences_by_seed)),
    }


def scores_by_prompt(point: Point) -> dict[Any, float]:
    return {
        conversation.messages[:-1]: score for conversation, score in zip(point.conversations, point.scores, strict=True)
    }


def summarize_rows(points: Mapping[str, Sequence[Point]]) -> dict[str, Figures]:
    """Return the figures of each row. Those of the three ways include comparisons with PPO and best-of-16."""
    rows = {name: pool_seeds(row_points) for name, row_points in points.items()}
    for name in (DISTILLED_ROW, LARGE_BATCH_ROW, AVERAGED_ROW):
        kls = [point.figures["kl"] for point in points[name]]
        ppo_kls = [point.figures["kl"] for point in points[PPO_ROW]]
        rows[name] |= {
            "to_ppo": compare_gold(points[name], points[PPO_ROW]),
            "to_best": compare_gold(points[name], points[BEST_OF_16_ROW]),
            "kls": kls,
            "of_kl": [kl / ppo_kl for kl, ppo_kl in zip(kls, ppo_kls, strict=True)],
        }
    return rows


COLUMNS = {
    "kl": "KL, nats a response",
    "gold": "gold score",
    "distinct2": "distinct-2",
    "risen": "most risen word",
    "minutes": "minutes",
}


def format_table(report: Mapping[str, Any]) -> str:
    """Return the table of docs/choosing.md."""
    headings = ["", *COLUMNS.values(), "of PPO's KL, each seed", "gold − PPO's", "gold − best-of-16's"]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for name, row in report["rows"].items():
        cells = [format_cell(row, key) for key in COLUMNS]
        if "of_kl" in row:
            kl_shares = ", ".join(f"{share:.2f}" for share in row["of_kl"])
            cells += [kl_shares, format_difference(row["to_ppo"]), format_difference(row["to_best"])]
        else:
            cells += ["–"] * 3
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def format_difference(comparison: Mapping[str, Any]) -> str:
    """Format what `compare_gold` returned."""
    value, low, high = comparison["all"]
    seeds = ", ".join(f"{difference:+.2f}" for difference in comparison["seeds"])
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}] ({seeds})"


def main() -> None:
    options = build_parser(__doc__, REPORTED_SEEDS).parse_args()
    runs = Runs(options.root, options.dtype)
    for make_runs in (runs.run_shared_stages, runs.train_recipe_policy, runs.sample_best_of_n):
        run_in_parallel(options.jobs, make_runs, [(seed,) for seed in options.seeds])
    trainings = [
        (train, runs, seed) for seed in options.seeds for train in (train_distilled_policy, train_large_batch_policy)
    ]
    run_in_parallel(options.jobs, lambda train, *arguments: train(*arguments), trainings)
    run_in_parallel(options.jobs, average_policies, [(runs, seed) for seed in options.seeds])
    points = dict[str, list[Point]]()
    for seed in options.seeds:
        for name, point in load_points(runs, seed).items():
            points.setdefault(name, []).append(point)
    report = round_figures({"seeds": list(options.seeds), "lines": LINES, "rows": summarize_rows(points)})
    print("\n" + format_table(report))
    if options.save:
        options.save.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
