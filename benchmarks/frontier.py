"""How much of the gold score each method buys with how much KL: SFT, DPO and PPO on the same pairs, on the built-in
model. The table and the plot of docs/choosing.md (the frontier of Gao, Schulman and Hilton, 2022).

    python benchmarks/frontier.py [--root runs/frontier] [--save benchmarks/frontier.json] [--plot docs/frontier.svg]
        [--dtype bfloat16]

One simulated annotator ranks four answers of the supervised model to each prompt. DPO reads these pairs; a reward model
is trained on them for PPO. Each method is run at several prices of KL, each policy is evaluated on prompts that nothing
trained on, by the sentiment that ranked the pairs without its noise. Finished runs are not made again. About 25 minutes
on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from align.evals.comparison import read_samples
from align.ops.intervals import mean
from align.report.plots import axes, render
from align.run import read_manifest

PAIRS = (
    "stage=sft method.lr=2e-3 data.max_length=256 stage.max_steps=80",
    "stage=sample stage.prompts=1000 rollout.batch_size=512",
    "stage=annotate stage.action=simulate stage.annotators=1",
    "stage=reward data.allow_simulated=true stage.epochs=2 stage.batch_size=8",
)
DPO = {
    "beta 1": "stage.beta=1",
    "beta 0.3": "stage.beta=0.3",
    "beta 0.1": "stage.beta=0.1",
    "beta 0.03": "stage.beta=0.03",
    "beta 0.01": "stage.beta=0.01",
}
PPO = {
    "kl_coef 0.2": "stage.kl_coef=0.2",
    "kl_coef 0.1": "stage.kl_coef=0.1",
    "kl_coef 0.05": "stage.kl_coef=0.05",
    "kl_coef 0.02": "stage.kl_coef=0.02",
}
COMMON = {
    "dpo": "stage=dpo data=annotations data.allow_simulated=true stage.lr=5e-4",
    "ppo": "stage=ppo stage.updates=36 stage.epochs=1 stage.minibatches=4 stage.micro_batch=16 stage.lr=1e-3",
}


def slug(method: str, setting: str) -> str:
    return f"{method}-{setting}".replace(",", "").replace(" ", "-")


def commands(root: Path, more: str = "") -> list[str]:
    """Every line of the batch: the pairs, then each policy and its evaluation. `more` goes into each."""
    shared = f"seed=0 'run.root={root}' project=frontier rollout.max_new_tokens=24 {more}".strip()
    lines = [f"{shared} {line}" for line in PAIRS]
    for method, settings in (("dpo", DPO), ("ppo", PPO)):
        for setting, words in settings.items():
            name = slug(method, setting)
            lines.append(f"{shared} {COMMON[method]} {words} run.name={name}")
            lines.append(f"{shared} stage=eval artifact={method}:{name} run.name={name}")
    return lines


def points(root: Path) -> list[dict[str, Any]]:
    """KL in nats a response and the gold score with its interval, of SFT and of each policy."""
    found: list[dict[str, Any]] = []
    for method, settings in (("dpo", DPO), ("ppo", PPO)):
        for setting in settings:
            folder = root / "eval" / slug(method, setting)
            samples, metrics = read_samples(folder / "artifact" / "samples.jsonl"), read_manifest(folder).metrics
            if not found:
                found.append(
                    {
                        "method": "sft",
                        "setting": "",
                        "kl": 0.0,
                        "win_rate": None,
                        "distinct2": metrics["distinct2"]["ref"],
                        **gold([s.score_ref for s in samples]),
                    }
                )
            found.append(
                {"method": method, "setting": setting, "kl": metrics["kl"], "win_rate": metrics["win_rate"]["value"],
                 "distinct2": metrics["distinct2"]["policy"], **gold([s.score_policy for s in samples])}
            )  # fmt: skip
    return found


def gold(scores: list[float]) -> dict[str, float]:
    interval = mean(scores)
    assert interval.low is not None, "all prompts have one score"
    assert interval.high is not None
    return {"gold": interval.value, "low": interval.low, "high": interval.high}


def markdown(found: list[dict[str, Any]]) -> str:
    lines = ["| method | KL, nats a response | gold score | win rate over SFT | distinct-2 |", "|---|---|---|---|---|"]
    for p in found:
        won = "–" if p["win_rate"] is None else f"{p['win_rate']:.2f}"
        name, interval = f"{p['method'].upper()} {p['setting']}".strip(), f"[{p['low']:.2f}, {p['high']:.2f}]"
        lines.append(f"| {name} | {p['kl']:.2f} | {p['gold']:.2f} {interval} | {won} | {p['distinct2']:.2f} |")
    return "\n".join(lines) + "\n"


def plot(found: list[dict[str, Any]]) -> bytes:
    figure, ax = axes("KL to the supervised model, nats a response", "gold score")
    start = found[0]
    for method, marker in (("dpo", "s"), ("ppo", "o")):
        mine = sorted((p for p in found if p["method"] == method), key=lambda p: p["kl"])
        line = [start, *mine]
        spread = [[p["gold"] - p["low"] for p in line], [p["high"] - p["gold"] for p in line]]
        ax.errorbar(
            [p["kl"] for p in line], [p["gold"] for p in line], spread, marker=marker, capsize=2, label=method.upper()
        )
    ax.annotate("SFT", (start["kl"], start["gold"]), textcoords="offset points", xytext=(6, -12))
    ax.legend()
    return render(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/frontier"))
    parser.add_argument("--save", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--dtype", default="auto", help="bfloat16 where the machine multiplies it by itself")
    given = parser.parse_args()
    lines = commands(given.root, f"dtype={given.dtype}")
    subprocess.run([sys.executable, "-m", "align", "-"], input="\n".join(lines), text=True, check=True)
    found = points(given.root)
    print("\n" + markdown(found))
    if given.save:
        given.save.write_text(
            json.dumps([{k: round(v, 4) if isinstance(v, float) else v for k, v in p.items()} for p in found], indent=2)
            + "\n"
        )
    if given.plot:
        given.plot.write_bytes(plot(found))


if __name__ == "__main__":
    main()
