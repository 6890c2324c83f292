"""Three ways to buy the same gold with less KL, beside the quickstart's PPO and best-of-n: the second table of
docs/choosing.md.

    python benchmarks/frontier/spend.py [--root runs/frontier] [--save benchmarks/frontier/spend.json]
        [--dtype bfloat16] [--jobs 1]

One distils first: the best of 16 answers to each of 1,000 prompts become rows for SFT, and PPO goes on from there. The
second samples more: RLOO on 512 answers an update, where the quickstart has 64. The third is the mean of the weights
of that policy and the quickstart's. Settings follow from runs on seed 3; seeds, held-out prompts and judge are those of
`run.py`, whose runs are used where they are there.

To reach, fixed beforehand: gold no worse than the quickstart's PPO and than best-of-16 (paired by prompt, margin 0.03);
at most two thirds of that PPO's KL on each seed; the most risen word no more frequent than in best-of-64's answers;
distinct-2 no lower than that PPO's. About 40 minutes of one processor a seed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from averaged import average
from compared import REPORTED, SPLIT
from outcomes import Figures, Point, cell, of_best, of_policy, pooled, took
from runs import BEST, RECIPE, Runs, arguments, rounded, side_by_side

from align.ops.intervals import mean_interval

PPO, SAMPLED, WIDEST = "PPO, the quickstart's", "best-of-16", "best-of-64"
DISTILLED, MORE, MEAN = "distilled, then PPO", "RLOO, 512 answers an update", "mean of RLOO's and PPO's weights"
LINES = {
    "best": "stage=sample stage.best_of=16 reward=learned stage.prompts=1000 rollout.batch_size=512",
    "sft": "stage=sft data=files data.max_length=256 stage.max_steps=80 method.lr=1e-3",
    "ppo": f"{SPLIT} stage.updates=44 stage.lr=1e-3 stage.kl_coef=0.1",
    "more": f"{SPLIT.replace('micro_batch=16', 'micro_batch=64')} stage.batch_size=512 stage.advantage=rloo "
    "stage.group_size=8 stage.updates=50 stage.lr=1e-3 stage.kl_coef=0.08",
}  # fmt: skip
"""What the stages of the first two ways are told."""


def distil(runs: Runs, seed: int) -> None:
    """Winners of best-of-16 to SFT, then PPO; evaluated beside the model that all of a seed start from."""
    chain = runs.apart("distilled")
    root = chain.root / str(seed)
    init, scored = f"init={runs.latest(seed, 'sft')}", f"reward.ref={runs.latest(seed, 'reward')}"
    chain.make(seed, *LINES["best"].split(), scored, init, name="best")
    winners = root / "sample" / "best" / "artifact" / "winners.jsonl"
    chain.make(seed, *LINES["sft"].split(), f"data.path={winners}", init, name="sft")
    chain.make(seed, *LINES["ppo"].split(), scored, "init=sft:sft", name="ppo")
    # As a run's artifact it would be measured against the distilled model, which is what it started from.
    bare = root / "policy"
    shutil.copytree(root / "ppo" / "ppo" / "artifact", bare, dirs_exist_ok=True)
    chain.judged(seed, str(bare), "ppo", init, "model.path=pocket")


def more(runs: Runs, seed: int) -> None:
    runs.make(seed, *LINES["more"].split(), name="rloo-512")
    runs.judged(seed, "ppo:rloo-512", "rloo-512")


def averaged(runs: Runs, seed: int) -> None:
    """After `more`. A bare folder says nothing of its training, so a few prompts are asked that this saw."""
    root = runs.root / str(seed)
    average([root / "ppo" / name / "artifact" for name in (RECIPE, "rloo-512")], root / "averaged")
    init = f"init={runs.latest(seed, 'sft')}"
    runs.judged(seed, str(root / "averaged"), "averaged", init, "model.path=pocket")


def points_of(runs: Runs, seed: int) -> dict[str, Point]:
    """Row of the table → its point."""
    root, samples = runs.root / str(seed), runs.samples(seed)
    chain = runs.apart("distilled").root / str(seed)
    return {
        SAMPLED: of_best(root, BEST, samples, 16), WIDEST: of_best(root, BEST, samples, 64),
        PPO: of_policy(root, RECIPE), MORE: of_policy(root, "rloo-512"),
        DISTILLED: of_policy(chain, "ppo", sum(took(chain, name) for name in ("best", "sft", "ppo"))),
        MEAN: of_policy(root, "averaged", sum(took(root, name) for name in (RECIPE, "rloo-512"))),
    }  # fmt: skip


def beside(ours: Sequence[Point], theirs: Sequence[Point]) -> dict[str, Any]:
    """The difference in gold over the prompts that both answered: `all` is its mean with an interval over prompts,
    `seeds` the mean of each seed, by which trainings differ. The interval leaves that out.

    Args:
        ours, theirs: a point for each seed.
    """
    found = []
    for one, other in zip(ours, theirs, strict=True):
        known = by_prompt(other)
        found.append([score - known[prompt] for prompt, score in by_prompt(one).items() if prompt in known])
    interval = mean_interval([each for seed in found for each in seed])
    return {
        "all": [interval.value, interval.low, interval.high], "seeds": [sum(seed) / len(seed) for seed in found],
        "prompts": sum(map(len, found)),
    }  # fmt: skip


def by_prompt(point: Point) -> dict[Any, float]:
    return {answered.messages[:-1]: score for answered, score in zip(point.answered, point.scores, strict=True)}


def summed(points: Mapping[str, Sequence[Point]]) -> dict[str, Figures]:
    """The figures of each row, and of ours how they are beside what is to be reached."""
    rows = {name: pooled(of) for name, of in points.items()}
    for name in (DISTILLED, MORE, MEAN):
        kl = [(p.figures["kl"], q.figures["kl"]) for p, q in zip(points[name], points[PPO], strict=True)]
        rows[name] |= {
            "to_ppo": beside(points[name], points[PPO]), "to_best": beside(points[name], points[SAMPLED]),
            "kls": [ours for ours, _ in kl], "of_kl": [ours / theirs for ours, theirs in kl],
        }  # fmt: skip
    return rows


COLUMNS = {
    "kl": "KL, nats a response", "gold": "gold score", "distinct2": "distinct-2", "risen": "most risen word",
    "minutes": "minutes",
}  # fmt: skip


def format_table(found: Mapping[str, Any]) -> str:
    """The table of docs/choosing.md."""
    heads = ["", *COLUMNS.values(), "of PPO's KL, each seed", "gold − PPO's", "gold − best-of-16's"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, row in found["rows"].items():
        cells = [cell(row, key) for key in COLUMNS]
        if "of_kl" in row:
            shares = ", ".join(f"{share:.2f}" for share in row["of_kl"])
            cells += [shares, signed(row["to_ppo"]), signed(row["to_best"])]
        else:
            cells += ["–"] * 3
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def signed(found: Mapping[str, Any]) -> str:
    value, low, high = found["all"]
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}] ({', '.join(f'{seed:+.2f}' for seed in found['seeds'])})"


def main() -> None:
    given = arguments(__doc__, REPORTED).parse_args()
    runs, seeds = Runs(given.root, given.dtype), [(seed,) for seed in given.seeds]
    for task in (runs.first, runs.recipe, runs.best):
        side_by_side(given.jobs, task, seeds)
    tasks = [(task, runs, seed) for seed in given.seeds for task in (distil, more)]
    side_by_side(given.jobs, lambda task, *rest: task(*rest), tasks)
    side_by_side(given.jobs, averaged, [(runs, seed) for seed in given.seeds])
    points = dict[str, list[Point]]()
    for seed in given.seeds:
        for name, point in points_of(runs, seed).items():
            points.setdefault(name, []).append(point)
    found = rounded({"seeds": list(given.seeds), "lines": LINES, "rows": summed(points)})
    print("\n" + format_table(found))
    if given.save:
        given.save.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
