"""Where gold turns: a policy climbs reward models of few rankings, and nothing holds it back.

    python benchmarks/frontier/turn.py [--root runs/frontier] [--save benchmarks/frontier/turn.json]
        [--plot docs/turn.svg] [--dtype bfloat16] [--jobs 1]

For each number of rankings a reward model learns from the first ones of a seed's store, and RLOO climbs it with
kl_coef=0. Every few updates the policy answers held-out prompts. The run notes what its reward model says of them and
how far it has moved; this script adds gold (the sentiment that ranked the pairs, without its noise). Whether gold has
turned is read off two halves of the prompts: one half says at which update gold was highest, the other half how much of
it is left at the end (a maximum over many updates is too high on the half that chose it). Finished runs are not made
again. The interval is over prompts. About eight minutes of one processor a run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from outcomes import with_answer
from runs import Runs, arguments, rounded, side_by_side

from align.annotate.store import Store
from align.annotate.store.preference_pairs import preferences
from align.core.types import Message
from align.data.read.records import write_preferences
from align.ops.intervals import mean_interval
from align.report.plots import axes, render
from align.reward.rules import Sentiment
from align.track import read_rows

RANKINGS = (25, 100, 400)
"""The quickstart has 8,800."""
SEEDS = (0,)
UPDATES, MEASURED_EVERY, PROMPTS = 80, 5, 128
LEARNS = "stage=reward data=files stage.lr=5e-4 stage.batch_size=8"
CLIMB = (
    "stage=ppo stage.advantage=rloo stage.group_size=4 stage.lr=1e-3 stage.kl_coef=0 stage.epochs=1 "
    f"stage.minibatches=4 stage.micro_batch=16 stage.updates={UPDATES} stage.eval_every={MEASURED_EVERY} "
    f"stage.eval_prompts={PROMPTS} stage.shown={PROMPTS} stage.publish=last"
)


def climbed(runs: Runs, seed: int, rankings: int) -> None:
    """A reward model of so many rankings, and a policy that climbs it."""
    place, name, init = runs.apart("turn"), f"rankings-{rankings}", f"init={runs.latest(seed, 'sft')}"
    pairs = place.root / str(seed) / f"{name}.jsonl"
    if not pairs.exists():
        write_preferences(pairs, list(first_rankings(runs.root / str(seed), rankings)))
    epochs = max(2, 400 // rankings)  # about 50 steps at least
    place.make(seed, *LEARNS.split(), f"stage.epochs={epochs}", f"data.path={pairs}", init, name=name)
    place.make(seed, *CLIMB.split(), f"reward.ref=reward:{name}", init, name=f"climbs-{name}")


def first_rankings(root: Path, count: int) -> Iterator[Any]:
    """Pairs of the first rankings of a seed's store, in the order in which they were made."""
    with Store.open(f"sqlite:///{root / 'annotations.db'}", create=False) as store:
        found = preferences(store, "quickstart", allow_simulated=True)
    for i, (_, pairs) in enumerate(groupby(found, lambda pair: (pair.group_id, pair.annotator))):
        if i == count:
            return
        yield from pairs


def measured(runs: Runs, seed: int, rankings: int) -> dict[str, list[Any]]:
    """Of each measured update: `step`, `kl`, `gold` and `proxy`, the last two of each prompt."""
    folder = runs.apart("turn").root / str(seed) / "ppo" / f"climbs-rankings-{rankings}"
    kl = {row["step"]: row["held_out_kl"] for row in read_rows(folder / "metrics.jsonl") if "held_out_kl" in row}
    judge, found = Sentiment(), dict[str, list[Any]]()
    for step, rows in groupby(read_rows(folder / "samples.jsonl"), lambda row: row["step"]):
        answers = list(rows)
        told = [with_answer(tuple(Message(**m) for m in row["prompt"]), row["answer"]) for row in answers]
        of = {"step": step, "kl": kl[step], "gold": judge.score(told).tolist(), "proxy": [r["score"] for r in answers]}
        for key, value in of.items():
            found.setdefault(key, []).append(value)
    return found


def turned(points: Sequence[Mapping[str, list[Any]]]) -> dict[str, Any]:
    """Where gold was highest and what was left at the end, over seeds.

    Args:
        points: of each seed, see `measured`.
    """
    lost, best, at = [], [], []
    for point in points:
        gold = np.array(point["gold"])  # [updates, prompts]
        for chooses, measures in ((0, 1), (1, 0)):
            peak = int(gold[:, chooses::2].mean(1).argmax())
            lost += (gold[-1, measures::2] - gold[peak, measures::2]).tolist()
            best += gold[peak, measures::2].tolist()
            at.append(point["kl"][peak])
    left, proxy = mean_interval(lost), [in_deviations(point["proxy"]) for point in points]
    return {
        "start": average(np.mean(p["gold"][0]) for p in points), "peak": average(best), "peak_kl": average(at),
        "end": average(np.mean(p["gold"][-1]) for p in points), "end_kl": average(p["kl"][-1] for p in points),
        "lost": [left.value, left.low, left.high], "end_proxy": average(each[-1] for each in proxy),
    }  # fmt: skip


def in_deviations(scores: Sequence[Sequence[float]]) -> list[float]:
    """Means, in standard deviations of the first scores and from their mean."""
    start = np.array(scores[0])
    return [float((np.mean(each) - start.mean()) / start.std(ddof=1)) for each in scores]


def average(values: Any) -> float:
    return float(np.mean(list(values)))


def format_table(found: Mapping[str, Any]) -> str:
    """The table of docs/choosing.md."""
    lines = [
        "| rankings | gold at the start | at its peak | KL there | at the end | KL there | proxy there | end − peak |"
    ]
    lines.append("|---" * 8 + "|")
    for rankings, row in found["rows"].items():
        numbers = (row[key] for key in ("start", "peak", "peak_kl", "end", "end_kl", "end_proxy"))
        lost, low, high = row["lost"]
        spread = "" if low is None else f" [{low:+.2f}, {high:+.2f}]"  # where every peak is the end
        lines.append(f"| {int(rankings):,} | {' | '.join(f'{x:.2f}' for x in numbers)} | {lost:+.2f}{spread} |")
    return "\n".join(lines) + "\n"


def plot(curves: Mapping[int, Sequence[Mapping[str, list[Any]]]]) -> bytes:
    """Gold by the update, a line for each number of rankings: means over the seeds."""
    figure, ax = axes("updates", "gold score")
    for (rankings, points), marker in zip(curves.items(), "osd^v", strict=False):
        gold = np.mean([np.mean(point["gold"], 1) for point in points], 0)
        ax.plot(points[0]["step"], gold, marker=marker, markersize=3, label=f"{rankings:,} rankings")
    ax.legend(loc=(0.62, 0.41))
    return render(figure)


def main() -> None:
    parser = arguments(__doc__, SEEDS)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--rankings", type=int, nargs="+", default=RANKINGS)
    given = parser.parse_args()
    runs = Runs(given.root, given.dtype)
    side_by_side(given.jobs, runs.first, [(seed,) for seed in given.seeds])
    side_by_side(given.jobs, climbed, [(runs, seed, n) for seed in given.seeds for n in given.rankings])
    curves = {n: [measured(runs, seed, n) for seed in given.seeds] for n in given.rankings}
    rows = {str(n): turned(points) for n, points in curves.items()}
    found = rounded({"seeds": list(given.seeds), "rows": rows})
    print("\n" + format_table(found))
    if given.save:
        given.save.write_text(json.dumps(found, indent=2) + "\n")
    if given.plot:
        given.plot.write_bytes(plot(curves))


if __name__ == "__main__":
    main()
