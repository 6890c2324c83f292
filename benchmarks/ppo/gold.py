"""Compare the gold scores that align's and TRL's PPO reach on the quickstart's task after the same number of updates.

    recipes/quickstart/seeds.sh runs/gold
    python benchmarks/ppo/gold.py runs/gold [--save benchmarks/ppo/gold.json] [--dtype bfloat16]

Align's side is the quickstart's PPO with 36 updates at a constant rate, which the recipe had when this was measured,
with a value backbone of its own and with the value on the policy. The peer, TRL 1.12.0 in fp32, starts from the same
supervised model (merged, with a new LoRA), with the same reward model (merged, standardised and scaled alike), prompts
and settings, at the best of four learning rates on the first seed: its value model trains all weights at the learning
rate of the policy's adapter. `stage=eval` evaluates all policies on prompts that no training used. Finished runs are
not made again.
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
from run import HERE, prepare_peer_python

from align.__main__ import compose_config
from align.config.root import Config
from align.data.chat.encode import encode_prompts
from align.data.sources import read_source_prompts
from align.export.merged import merge_adapter
from align.models.load import load_base, load_classifier, load_tokenizer
from align.run import Artifact, Base, read_manifest, resolve

BACKBONES = ("own", "policy")
PEER_LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
QUICKSTART = HERE.parents[1] / "recipes" / "quickstart" / "run.sh"
CHANGED_SETTINGS = ("stage.updates=", "stage.schedule=")
"""Settings that the recipe has changed since this was measured."""
Figures = dict[str, float]


def read_quickstart_overrides(stage: str) -> list[str]:
    """Return the overrides of the recipe's line for a stage."""
    lines = QUICKSTART.read_text(encoding="utf-8").splitlines()
    return shlex.split(next(line for line in lines if f" stage={stage} " in line).removeprefix("$common"))


PPO_OVERRIDES = [
    *(override for override in read_quickstart_overrides("ppo") if not override.startswith(CHANGED_SETTINGS)),
    "stage.updates=36",
]


class Seed:
    """One finished quickstart.

    Attributes:
        root: folder of its runs.
        shared_overrides: those of all its runs.
        config: of its PPO.
    """

    def __init__(self, root: Path, dtype: str) -> None:
        self.root = root
        self.shared_overrides = [f"seed={root.name}", f"run.root={root}", "project=quickstart", f"dtype={dtype}"]
        self.config: Config = compose_config([*self.shared_overrides, *PPO_OVERRIDES])

    def run_stage(self, *overrides: str) -> Path:
        """Run a stage, which does nothing if its run is finished, and return the run's folder."""
        command = [sys.executable, "-m", "align", *self.shared_overrides, *overrides]
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return Path(process.stdout.splitlines()[-1])

    def evaluate(self, *overrides: str) -> Figures:
        metrics = read_manifest(self.run_stage("stage=eval", *overrides)).metrics
        return {"gold": metrics["gold"]["policy"], "win_rate": metrics["win_rate"]["value"], "kl": metrics["kl"]}

    def train_with_align(self, backbone: str) -> tuple[Figures, Path]:
        """Train and evaluate align's policy. Returns its figures and the folder of its run."""
        folder = self.run_stage(*PPO_OVERRIDES, f"stage.value_backbone={backbone}")
        return self.evaluate(f"artifact=ppo:{folder.name}"), folder

    def train_with_trl(self, learning_rate: float, score_moments: dict[str, float]) -> Figures:
        """Train and evaluate the peer's policy.

        Args:
            score_moments: `score_mean` and `score_std` by which align's run standardised rewards.
        """
        stage = self.config.stage
        models_path = self.save_merged_models()
        # The folder of the result is named by the digest of these settings: their order matters.
        work = {
            "updates": stage.updates,
            "batch_size": stage.batch_size,
            "minibatches": stage.minibatches,
            "epochs": stage.epochs,
            "kl_coef": stage.kl_coef,
            "lam": stage.lam,
            "gamma": stage.gamma,
            "penalty": stage.missing_eos_penalty,
            "seed": self.config.seed,
            "tokens": self.config.rollout.max_new_tokens,
            "rank": self.config.method.r,
            "lr": learning_rate,
            "alpha": self.config.method.alpha,
            "scale": stage.score_scale / score_moments["score_std"],
            "mean": score_moments["score_mean"],
            "models": str(models_path),
        }
        adapter_path = self.root / "peer" / sha256(json.dumps(work).encode()).hexdigest()[:8]
        if not (adapter_path / "adapter_config.json").is_file():
            work_text = json.dumps(work | {"out": str(adapter_path)})
            subprocess.run([str(prepare_peer_python()), str(HERE / "trl_ppo_gold.py"), work_text], check=True)
        base = (f"model.path={models_path}/policy", "model=hub", "method=lora", "init=base")
        return self.evaluate(f"artifact={adapter_path}", *base)

    def save_merged_models(self) -> Path:
        """Save the supervised model and the reward model, both merged, and the token ids of PPO's prompts, unless they
        are there. Returns their folder."""
        sft, reward = (resolve(f"{stage}:latest", self.root) for stage in ("sft", "reward"))
        folder = self.root / "peer" / f"{sft.digest[:8]}-{reward.digest[:8]}"
        if (folder / "prompts.json").is_file():
            return folder
        base = sft.base
        cpu = torch.device("cpu")
        tokenizer = load_tokenizer(as_base(sft))
        for name, load, adapter_path in (("policy", load_base, sft.path), ("reward", load_classifier, reward.path)):
            merged = merge_adapter(load(base, "qlora", cpu, torch.float32), adapter_path, torch.float32)
            merged.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        rows = encode_prompts(tokenizer, read_source_prompts(self.config.data, "train", self.config.seed), 512)[0]
        (folder / "prompts.json").write_text(json.dumps([list(row.input_ids) for row in rows]))
        return folder


def as_base(artifact: Artifact) -> Base:
    """Return an artifact's folder as a base, to load the tokenizer that is in it."""
    return Base(artifact.ref, str(artifact.path), None, "")


def compare_policies(seeds: list[Seed]) -> dict[str, Any]:
    """Train all policies.

    Returns:
        `figures`: name of a policy → figures of each seed; `tried`: learning rate of the peer → gold score on the first
        seed, which chose it.
    """
    figures: dict[str, Any] = {}
    score_moments: list[dict[str, float]] = []
    for backbone in BACKBONES:
        trained = [seed.train_with_align(backbone) for seed in seeds]
        figures[f"ours, `value_backbone={backbone}`"] = [seed_figures for seed_figures, _ in trained]
        score_moments = score_moments or [read_manifest(folder).metrics for _, folder in trained]
    trials = {rate: seeds[0].train_with_trl(rate, score_moments[0]) for rate in PEER_LEARNING_RATES}
    best_rate = max(trials, key=lambda rate: trials[rate]["gold"])
    figures[f"TRL 1.12.0, lr {best_rate:g}"] = [
        seed.train_with_trl(best_rate, moments) for seed, moments in zip(seeds, score_moments, strict=True)
    ]
    return {"figures": figures, "tried": {f"{rate:g}": trial["gold"] for rate, trial in trials.items()}}


def format_mean(values: list[float], digits: int) -> str:
    """Format mean and standard deviation."""
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}" if len(values) > 1 else f"{values[0]:.{digits}f}"


def format_table(report: dict[str, Any]) -> str:
    """Return the table of README.md: mean and standard deviation over the seeds."""
    lines = ["| after 36 updates | gold score | win rate over SFT | KL, nats a response |", "|---|---|---|---|"]
    for name, rows in report["figures"].items():
        cells = (
            format_mean([row[key] for row in rows], digits) for key, digits in (("gold", 2), ("win_rate", 2), ("kl", 1))
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the runs of each seed, as recipes/quickstart/seeds.sh makes it")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--dtype", default="auto", help="ours; bfloat16 where the machine multiplies it by itself")
    options = parser.parse_args()
    roots = sorted(path.resolve() for path in options.folder.iterdir() if path.name.isdigit())
    if not roots:
        sys.exit(f"{options.folder} holds no runs: run recipes/quickstart/seeds.sh {options.folder} first")
    report = compare_policies([Seed(root, options.dtype) for root in roots])
    print("\n" + format_table(report))
    if options.save:
        options.save.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
