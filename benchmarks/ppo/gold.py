"""What each side has learned after the same number of updates: the gold score on the quickstart's task.

    recipes/quickstart/seeds.sh runs/gold
    python benchmarks/ppo/gold.py runs/gold [--save benchmarks/ppo/gold.json] [--dtype bfloat16]

Ours is the quickstart's PPO with 36 updates at a constant rate, as it was when this was measured, the value on a
backbone of its own and on the policy's. The peer, TRL 1.12.0 in fp32, starts from the same supervised model (merged;
its LoRA is a fresh one), with the same reward model (merged; standardised and scaled as ours is), the same prompts and
the same settings, at the best of four learning rates on the first seed: its value model trains every weight at the
rate of the policy's adapter. All are judged by `stage=eval` on prompts that nothing trained on. Finished runs are not
made again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from run import HERE, peer_python

from align.__main__ import compose_config
from align.config.root import Config
from align.data.chat.encode import encode_prompts
from align.data.sources import read_source_prompts
from align.export.merged import merge_adapter
from align.models.load import load_base, load_classifier, load_tokenizer
from align.run import Artifact, Base, read_manifest, resolve

BACKBONES = ("own", "policy")
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
QUICKSTART = HERE.parents[1] / "recipes" / "quickstart" / "run.sh"
RESET = ("stage.updates=", "stage.schedule=")
"""What the recipe has changed since this was measured."""
Figures = dict[str, float]


def quickstart(stage: str) -> list[str]:
    """The words of the recipe's line for a stage."""
    lines = QUICKSTART.read_text(encoding="utf-8").splitlines()
    return shlex.split(next(line for line in lines if f" stage={stage} " in line).removeprefix("$common"))


OURS = [*(word for word in quickstart("ppo") if not word.startswith(RESET)), "stage.updates=36"]


class Seed:
    """One finished quickstart.

    Attributes:
        root: its runs.
        common: the words that its runs share.
        config: of its PPO.
    """

    def __init__(self, root: Path, dtype: str) -> None:
        self.root = root
        self.common = [f"seed={root.name}", f"run.root={root}", "project=quickstart", f"dtype={dtype}"]
        self.config: Config = compose_config([*self.common, *OURS])

    def run(self, *words: str) -> Path:
        """The folder of a run, made unless it is there: the last line that a stage prints."""
        command = [sys.executable, "-m", "align", *self.common, *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return Path(done.stdout.splitlines()[-1])

    def judged(self, *words: str) -> Figures:
        found = read_manifest(self.run("stage=eval", *words)).metrics
        return {"gold": found["gold"]["policy"], "win_rate": found["win_rate"]["value"], "kl": found["kl"]}

    def ours(self, backbone: str) -> tuple[Figures, Path]:
        folder = self.run(*OURS, f"stage.value_backbone={backbone}")
        return self.judged(f"artifact=ppo:{folder.name}"), folder

    def peer(self, rate: float, moments: dict[str, float]) -> Figures:
        stage = self.config.stage
        given = {key: getattr(stage, key) for key in ("updates", "batch_size", "minibatches", "epochs", "kl_coef")}
        given |= {
            "lam": stage.lam,
            "gamma": stage.gamma,
            "penalty": stage.missing_eos_penalty,
            "seed": self.config.seed,
        }
        given |= {
            "tokens": self.config.rollout.max_new_tokens,
            "rank": self.config.method.r,
            "lr": rate,
            "alpha": self.config.method.alpha,
        }
        given |= {"scale": stage.score_scale / moments["score_std"], "mean": moments["score_mean"]}
        given["models"] = str(self.whole_models())
        out = self.root / "peer" / sha256(json.dumps(given).encode()).hexdigest()[:8]
        if not (out / "adapter_config.json").is_file():
            work = json.dumps(given | {"out": str(out)})
            subprocess.run([str(peer_python()), str(HERE / "gold_peer.py"), work], check=True)
        where = (f"model.path={given['models']}/policy", "model=hub", "method=lora", "init=base")
        return self.judged(f"artifact={out}", *where)

    def whole_models(self) -> Path:
        """The supervised model and the reward model, merged, and the prompts that PPO asks, as token rows."""
        sft, reward = (resolve(f"{stage}:latest", self.root) for stage in ("sft", "reward"))
        folder = self.root / "peer" / f"{sft.digest[:8]}-{reward.digest[:8]}"
        if (folder / "prompts.json").is_file():
            return folder
        base, cpu = sft.base, torch.device("cpu")
        tokenizer = load_tokenizer(as_base(sft))
        for name, load, adapter in (("policy", load_base, sft.path), ("reward", load_classifier, reward.path)):
            merge_adapter(load(base, "qlora", cpu, torch.float32), adapter, torch.float32).save_pretrained(
                folder / name
            )
            tokenizer.save_pretrained(folder / name)
        rows = encode_prompts(tokenizer, read_source_prompts(self.config.data, "train", self.config.seed), 512)[0]
        (folder / "prompts.json").write_text(json.dumps([list(row.input_ids) for row in rows]))
        return folder


def as_base(artifact: Artifact) -> Base:
    """An artifact's folder, to load the tokenizer from that lies in it."""
    return Base(artifact.ref, str(artifact.path), None, "")


def compare(seeds: list[Seed]) -> dict[str, Any]:
    """Figures a seed, by what was trained; and the peer's gold score at each rate, on the seed that chose it."""
    found: dict[str, Any] = {}
    moments: list[dict[str, float]] = []
    for backbone in BACKBONES:
        made = [seed.ours(backbone) for seed in seeds]
        found[f"ours, `value_backbone={backbone}`"] = [figures for figures, _ in made]
        moments = moments or [read_manifest(folder).metrics for _, folder in made]
    tried = {rate: seeds[0].peer(rate, moments[0]) for rate in RATES}
    best = max(tried, key=lambda rate: tried[rate]["gold"])
    found[f"TRL 1.12.0, lr {best:g}"] = [s.peer(best, m) for s, m in zip(seeds, moments, strict=True)]
    return {"figures": found, "tried": {f"{rate:g}": figures["gold"] for rate, figures in tried.items()}}


def spread(values: list[float], digits: int) -> str:
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}" if len(values) > 1 else f"{values[0]:.{digits}f}"


def format_table(found: dict[str, Any]) -> str:
    """The table: mean and standard deviation over the seeds."""
    lines = ["| after 36 updates | gold score | win rate over SFT | KL, nats a response |", "|---|---|---|---|"]
    for name, rows in found["figures"].items():
        cells = (spread([row[key] for row in rows], n) for key, n in (("gold", 2), ("win_rate", 2), ("kl", 1)))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the runs of each seed, as recipes/quickstart/seeds.sh makes it")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--dtype", default="auto", help="ours; bfloat16 where the machine multiplies it by itself")
    given = parser.parse_args()
    roots = sorted(path.resolve() for path in given.folder.iterdir() if path.name.isdigit())
    if not roots:
        sys.exit(f"{given.folder} holds no runs: run recipes/quickstart/seeds.sh {given.folder} first")
    found = compare([Seed(root, given.dtype) for root in roots])
    print("\n" + format_table(found))
    if given.save:
        given.save.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
