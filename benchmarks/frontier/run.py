"""How much gold each method buys with how much KL: SFT, best-of-n, DPO, KTO, PPO, RLOO and GRPO on the quickstart's
pairs, on the built-in model. The table and the plot of docs/choosing.md (the frontier of Gao, Schulman and Hilton,
2022).

    python benchmarks/frontier/run.py [--root runs/frontier] [--save benchmarks/frontier/results.json]
        [--plot docs/frontier.svg] [--dtype bfloat16] [--jobs 1]

Four simulated annotators rank four answers of the supervised model to each prompt. DPO and KTO read these pairs; a
reward model is trained on them for the others. Every run of a method takes about three minutes of one processor. Three
learning rates of each method are tried once, on a seed of their own; the best one is run at two prices of KL on three
other seeds. Each policy is evaluated on prompts that nothing trained on, by the sentiment that ranked
the pairs without its noise. Finished runs are not made again. About four hours of one processor.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compared import METHODS, REPORTED, TUNED_ON, common
from outcomes import (
    BEST_OF,
    Figures,
    Point,
    cell,
    measured_on,
    of_best,
    of_policy,
    of_start,
    pooled,
    proxies,
    worth,
)
from runs import BEST, RECIPE, Runs, arguments, rounded, side_by_side

from align.report.plots import axes, render

LONGER = "PPO, twice as long"
"""The row of the recipe's own PPO."""


def tuned(runs: Runs, jobs: int) -> dict[str, dict[str, float]]:
    """Method → learning rate → what it is worth on the seed that tunes."""
    tries = [(TUNED_ON, method, rate, method.prices[-1]) for method in METHODS for rate in method.rates]
    side_by_side(jobs, runs.policy, tries)
    apart = set[str]().union(*(measured_on(common(runs.root, seed, runs.dtype)) for seed in REPORTED))
    folder = runs.root / str(TUNED_ON)
    return {
        method.name: {rate: worth(folder, method.run_name(rate, method.prices[-1]), apart) for rate in method.rates}
        for method in METHODS
    }


def measured(runs: Runs, rates: dict[str, str], seeds: Sequence[int]) -> dict[str, list[Point]]:
    """Row of the table → its point of each seed."""
    found = dict[str, list[Point]]()
    for seed in seeds:
        root, samples = runs.root / str(seed), runs.samples(seed)
        points = {"SFT": of_start(root, RECIPE)}
        points |= {f"best-of-{n}": of_best(root, BEST, samples, n) for n in BEST_OF}
        for method in METHODS:
            for price in method.prices:
                point = of_policy(root, method.run_name(rates[method.name], price))
                point.figures["live_mb"] = json.loads((runs.root / "alive" / f"{method.name}.json").read_text())
                points[method.row(price)] = point
        points[LONGER] = of_policy(root, RECIPE)
        for name, proxy in proxies(root, points, runs.dtype).items():
            points[name].figures["proxy"] = proxy
        for name, point in points.items():
            found.setdefault(name, []).append(point)
    return found


COLUMNS = {
    "kl": "KL, nats a response", "gold": "gold score", "proxy": "proxy", "distinct2": "distinct-2",
    "risen": "most risen word", "minutes": "minutes", "live_mb": "live MB",
}  # fmt: skip


def format_table(found: dict[str, Any]) -> str:
    """The table of docs/choosing.md."""
    rows = found["rows"]
    lines = [f"| method | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(cell(row, key) for key in COLUMNS)} |" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def plot(rows: dict[str, Figures]) -> bytes:
    """A line for each method, from the supervised model on."""
    figure, ax = axes("KL to the supervised model, nats a response", "gold score")
    start = rows["SFT"]
    lines = {method.name: [method.row(price) for price in method.prices] for method in METHODS}
    lines = {"best-of-n (its bound)": [f"best-of-{n}" for n in BEST_OF], **lines}
    lines[LONGER] = [LONGER]
    for (name, points), marker in zip(lines.items(), "*sdo^vP", strict=True):
        line = [start, *sorted((rows[point] for point in points), key=lambda row: row["kl"])]
        spread = [[row["gold"] - row["low"] for row in line], [row["high"] - row["gold"] for row in line]]
        ax.errorbar(
            [row["kl"] for row in line], [row["gold"] for row in line], spread, marker=marker, capsize=2, label=name
        )
    ax.annotate("SFT", (start["kl"], start["gold"]), textcoords="offset points", xytext=(6, -12))
    ax.set_xlim(right=1.6 * ax.get_xlim()[1])
    ax.legend(loc="lower right")
    return render(figure)


def main() -> None:
    parser = arguments(__doc__, REPORTED)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    runs = Runs(given.root, given.dtype)
    side_by_side(given.jobs, runs.first, [(seed,) for seed in (TUNED_ON, *given.seeds)])
    side_by_side(given.jobs, runs.recipe, [(seed,) for seed in given.seeds])
    worths = tuned(runs, given.jobs)
    rates = {name: max(tried, key=lambda rate: tried[rate]) for name, tried in worths.items()}
    side_by_side(1, runs.alive, [(method,) for method in METHODS])
    side_by_side(given.jobs, runs.best, [(seed,) for seed in given.seeds])
    chosen = [(seed, m, rates[m.name], price) for m in METHODS for price in m.prices for seed in given.seeds]
    side_by_side(given.jobs, runs.policy, chosen)
    rows = {name: pooled(points) for name, points in measured(runs, rates, given.seeds).items()}
    found = rounded({"seeds": list(given.seeds), "tried": worths, "rates": rates, "rows": rows})
    print("\n" + format_table(found))
    if given.save:
        given.save.write_text(json.dumps(found, indent=2) + "\n")
    if given.plot:
        given.plot.write_bytes(plot(rows))


if __name__ == "__main__":
    main()
