"""Measure how fast the registry answers, over run folders that are written for it.

    python benchmarks/registry.py [--runs 10000] [--rounds 3] [--save benchmarks/registry.json]

The folders are written by the code that writes runs: one supervised run in ten, each with a reward model, six PPO runs,
and an evaluation and an export of the first of these. Configurations and metrics have realistic lengths. Each command
is a process of its own, and its start and imports are included. The page is opened in Chromium (playwright, in the
extra `dev`) without a cache, until its first table is visible.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from align.config.compose import build_config, compose_tree
from align.config.root import to_plain_dict
from align.registry.index import INDEX
from align.run.digests import file_digest
from align.run.figures import FILE as METRICS
from align.run.figures import write_figures
from align.run.manifest import Base, Input, Manifest, write_manifest

BASE = Base("smollm2", "/models/smollm2", "0" * 40, sha256(b"base").hexdigest())
ADAPTER = {
    "base_model_name_or_path": "smollm2",
    "lora_alpha": 32,
    "peft_type": "LORA",
    "r": 16,
    "use_dora": False,
    "use_rslora": False,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"],
}
BARS = {
    "rebuild": 30.0,
    "list": 1.0,
    "filter": 1.0,
    "sort": 1.0,
    "show": 1.0,
    "trace": 2.0,
    "compare": 2.0,
    "ten runs": 0.6,
    "page": 2.0,
}
"""Goals, in seconds."""
FILES = ("config.yaml", "metrics.jsonl", "report.html", "trained_ids.parquet", "artifact/adapter_config.json")
PROJECT_STAGES = ("sft", "reward", *["ppo"] * 6, "eval", "export")
"""Stages of the ten runs of a project."""


def compute_digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


class RunWriter:
    """Writes run folders under a root.

    Attributes:
        root: the runs' root.
        random: draws metrics and failures, the same in each writer.
        configs: stage → its default configuration.
        last_start: when the last written run started.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.random = Random(0)
        self.configs = {
            stage: to_plain_dict(build_config(compose_tree([f"stage={stage}"]))) for stage in {*PROJECT_STAGES}
        }
        self.last_start = datetime(2026, 1, 1, tzinfo=UTC)

    def build_input(self, ref: str) -> Input:
        """Return a run `STAGE:NAME` as the input of another."""
        stage, _, name = ref.partition(":")
        return Input(compute_digest(ref), ref, str(self.root / stage / name / "artifact"), stage, name, whole=False)

    def draw_metrics(self, stage: str) -> dict[str, Any]:
        share = self.random.uniform(0.3, 0.9)
        interval = {"value": share, "low": share - 0.05, "high": share + 0.05, "n": 200}
        metrics_by_stage = {
            "sft": {"loss_after": 2 + share, "loss_before": 4.0, "loss_change": interval, "train_rows": 9000},
            "reward": {"accuracy": interval, "loss": 0.6, "pairs": 4000},
            "ppo": {"last_score": share, "last_kl": 5 * share, "last_length": 80.0, "updates": 44},
            "eval": {
                "win_rate": interval,
                "kl": 5 * share,
                "kl_interval": interval,
                "judge_is": "gold",
                "length": {"ref": 80.0, "policy": 85.0},
                "gold": {"ref": 0.1, "policy": 0.4, "difference": interval},
            },
            "export": {"kl": 1e-6, "top1": 1.0},
        }
        return {
            "peak_rss_mb": 700 + 100 * share,
            "data_root": compute_digest(f"{share}"),
            **metrics_by_stage[stage],
        }

    def write_run(self, stage: str, name: str, inputs: dict[str, Input], status: str = "done") -> None:
        """Write the folder of a run that started 25 minutes after the last one."""
        self.last_start += timedelta(minutes=25)
        times = {
            "started": self.last_start.isoformat(),
            "finished": (self.last_start + timedelta(minutes=20)).isoformat(),
        }
        folder = self.root / stage / name
        (folder / "artifact").mkdir(parents=True)
        has_adapter = stage in ("sft", "reward", "ppo")
        if has_adapter:
            (folder / "artifact" / "adapter_config.json").write_text(json.dumps(ADAPTER))
        metrics = self.draw_metrics(stage)
        write_figures(folder, metrics)
        outputs = {path: compute_digest(f"{stage}{name}{path}") for path in FILES}
        outputs[METRICS] = file_digest(folder / METRICS)
        manifest = Manifest(
            stage,
            name,
            self.random.randrange(3),
            self.configs[stage],
            inputs,
            BASE,
            status,
            outputs,
            compute_digest(f"{stage}:{name}") if has_adapter else "",
            metrics,
            times,
            hardware={"device": "cpu", "dtype": "float32", "cpus": 2},
            error="" if status == "done" else "data.path=rows.jsonl: there is no such file.",
            packages={"torch": "2.13.0", "transformers": "5.24.0"},
            code=compute_digest("code"),
            commit="0" * 40,
        )
        write_manifest(folder, manifest)

    def write_project(self, number: int) -> None:
        """Write ten runs that start from each other. One in ten of the further PPO runs has failed."""
        init = self.build_input(f"sft:line-{number}")
        reward = self.build_input(f"reward:line-{number}")
        first_policy = self.build_input(f"ppo:line-{number}-0")
        inputs_by_stage: dict[str, dict[str, Input]] = {
            "sft": {},
            "reward": {"init": init},
            "ppo": {"init": init, "reward": reward},
            "eval": {"artifact": first_policy, "init": init},
            "export": {"artifact": first_policy, "init": init},
        }
        policies = 0
        for stage in PROJECT_STAGES:
            name = f"line-{number}" + (f"-{policies}" if stage == "ppo" else "")
            policies += stage == "ppo"
            has_failed = stage == "ppo" and policies > 1 and self.random.random() < 0.1
            self.write_run(stage, name, inputs_by_stage[stage], "failed" if has_failed else "done")


def time_command(root: Path, *overrides: str) -> tuple[float, str]:
    """Run a command of the registry. Returns its seconds and its output."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "align", "stage=registry", f"run.root={root}", *overrides]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return time.perf_counter() - started, output


def time_commands(root: Path, rounds: int, runs: int) -> dict[str, list[float]]:
    """Run every command in each round and check its output. Returns name → seconds of each round.

    Args:
        runs: number of runs under the root.
    """
    overrides_by_name = {
        "list": ["stage.limit=100"],
        "filter": ["stage.where={stage: ppo, metrics.win_rate.low: '>=0.7'}"],
        "sort": ["stage.sort=-score.value", "stage.format=json", "stage.limit=100"],
        "show": ["stage.action=show", "stage.run=ppo:line-7-0"],
        "trace": ["stage.action=trace", "artifact=export:line-7"],
        "compare": ["stage.action=compare", "stage.where={stage: ppo, name: 'line-7-*'}"],
    }
    times: dict[str, list[float]] = {"rebuild": [], **{name: [] for name in overrides_by_name}}
    for _ in range(rounds):
        times["rebuild"].append(time_command(root, "stage.action=rebuild")[0])
        for name, overrides in overrides_by_name.items():
            seconds, output = time_command(root, *overrides)
            times[name].append(seconds)
            assert "line-" in output, (name, output)
    _, output = time_command(root, "stage.format=csv", "stage.columns=[run]")
    assert len(output.splitlines()) == runs + 1
    return times


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def time_page(root: Path, rounds: int) -> list[float]:
    """Return the seconds in each round from opening the page of a running server to its first table."""
    from playwright.sync_api import sync_playwright

    port = find_free_port()
    command = [sys.executable, "-m", "align", "stage=registry", "stage.action=serve", f"run.root={root}"]
    server = subprocess.Popen([*command, f"stage.port={port}"], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    server.stdout.readline()
    times = []
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            for _ in range(rounds + 1):
                page = browser.new_context().new_page()
                started = time.perf_counter()
                page.goto(f"http://127.0.0.1:{port}/")
                page.wait_for_selector("#align-registry tbody tr")
                times.append(time.perf_counter() - started)
                assert page.locator("#align-registry tbody tr").count() == 100
                page.context.close()
            browser.close()
    finally:
        server.terminate()
        server.wait()
    return times[1:]  # the first one includes the server's start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    load = [round(os.getloadavg()[0], 1)]
    with tempfile.TemporaryDirectory() as folder:
        large_root = Path(folder) / "many"
        small_root = Path(folder) / "few"
        writer = RunWriter(large_root)
        for number in range(options.runs // len(PROJECT_STAGES)):
            writer.write_project(number)
        RunWriter(small_root).write_project(0)
        times = time_commands(large_root, options.rounds, options.runs)
        times["ten runs"] = [time_command(small_root)[0] for _ in range(options.rounds)]
        times["page"] = time_page(large_root, options.rounds)
        index_bytes = (large_root / INDEX).stat().st_size
    load.append(round(os.getloadavg()[0], 1))
    for name, seconds in times.items():
        rounds = ", ".join(f"{value:.2f}" for value in seconds)
        print(f"{name}: {median(seconds):.2f} s ({rounds}); asked {BARS[name]:g} s")
    print(f"{options.runs:,} runs; index {index_bytes / 1e6:.0f} MB; load {load}")
    if options.save:
        machine = {
            "processor": platform.machine(),
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            "load": load,
        }
        report = {"machine": machine, "runs": options.runs, "seconds": times}
        options.save.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
