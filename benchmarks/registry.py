"""How fast the registry answers, over run folders that no run made.

    python benchmarks/registry.py [--runs 10000] [--rounds 3] [--save benchmarks/registry.json]

Writes the folders with the writer of runs: one supervised run in ten, each with a reward model, six PPO runs, an
evaluation and an export of the first of these; configurations and figures are of real length. Each command is a process
of its own, its start and its imports counted. The page is opened in Chromium (playwright, as the extra `dev` has it)
with nothing kept from before, until its first table stands.
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
    "base_model_name_or_path": "smollm2", "lora_alpha": 32, "peft_type": "LORA", "r": 16, "use_dora": False,
    "use_rslora": False,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"],
}  # fmt: skip
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
FILES = ("config.yaml", "metrics.jsonl", "report.html", "trained_ids.parquet", "artifact/adapter_config.json")
PROJECT = ("sft", "reward", *["ppo"] * 6, "eval", "export")
"""Ten runs that belong together."""


def digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


class Portfolio:
    """Writes run folders under a root."""

    def __init__(self, root: Path) -> None:
        self.root, self.draw = root, Random(0)
        self.configs = {stage: to_plain_dict(build_config(compose_tree([f"stage={stage}"]))) for stage in {*PROJECT}}
        self.at = datetime(2026, 1, 1, tzinfo=UTC)

    def given(self, ref: str) -> Input:
        stage, _, name = ref.partition(":")
        return Input(digest(ref), ref, str(self.root / stage / name / "artifact"), stage, name, whole=False)

    def metrics(self, stage: str) -> dict[str, Any]:
        share = self.draw.uniform(0.3, 0.9)
        between = {"value": share, "low": share - 0.05, "high": share + 0.05, "n": 200}
        known = {
            "sft": {"loss_after": 2 + share, "loss_before": 4.0, "loss_change": between, "train_rows": 9000},
            "reward": {"accuracy": between, "loss": 0.6, "pairs": 4000},
            "ppo": {"last_score": share, "last_kl": 5 * share, "last_length": 80.0, "updates": 44},
            "eval": {"win_rate": between, "kl": 5 * share, "kl_interval": between, "judge_is": "gold",
                     "length": {"ref": 80.0, "policy": 85.0},
                     "gold": {"ref": 0.1, "policy": 0.4, "difference": between}},
            "export": {"kl": 1e-6, "top1": 1.0},
        }  # fmt: skip
        return {"peak_rss_mb": 700 + 100 * share, "data_root": digest(f"{share}"), **known[stage]}

    def write(self, stage: str, name: str, inputs: dict[str, Input], status: str = "done") -> None:
        self.at += timedelta(minutes=25)
        times = {"started": self.at.isoformat(), "finished": (self.at + timedelta(minutes=20)).isoformat()}
        folder = self.root / stage / name
        (folder / "artifact").mkdir(parents=True)
        made = stage in ("sft", "reward", "ppo")
        if made:
            (folder / "artifact" / "adapter_config.json").write_text(json.dumps(ADAPTER))
        metrics = self.metrics(stage)
        write_figures(folder, metrics)
        outputs = {path: digest(f"{stage}{name}{path}") for path in FILES}
        outputs[METRICS] = file_digest(folder / METRICS)
        write_manifest(folder, Manifest(
            stage, name, self.draw.randrange(3), self.configs[stage], inputs, BASE, status,
            outputs, digest(f"{stage}:{name}") if made else "",
            metrics, times, hardware={"device": "cpu", "dtype": "float32", "cpus": 2},
            error="" if status == "done" else "data.path=rows.jsonl: there is no such file.",
            packages={"torch": "2.13.0", "transformers": "5.24.0"}, code=digest("code"), commit="0" * 40,
        ))  # fmt: skip

    def project(self, number: int) -> None:
        """Ten runs of one line of work, some of which failed."""
        policies = 0
        for stage in PROJECT:
            name = f"line-{number}" + (f"-{policies}" if stage == "ppo" else "")
            start, reward = self.given(f"sft:line-{number}"), self.given(f"reward:line-{number}")
            inputs = {"sft": {}, "reward": {"init": start}, "ppo": {"init": start, "reward": reward}}
            first = {"artifact": self.given(f"ppo:line-{number}-0"), "init": start}
            policies += stage == "ppo"
            status = "failed" if stage == "ppo" and policies > 1 and self.draw.random() < 0.1 else "done"
            self.write(stage, name, inputs.get(stage, first), status)


def asked(root: Path, *words: str) -> tuple[float, str]:
    """Seconds that a command took, and what it printed."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "align", "stage=registry", f"run.root={root}", *words]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return time.perf_counter() - began, out


def measured(root: Path, rounds: int, runs: int) -> dict[str, list[float]]:
    questions = {
        "list": ["stage.limit=100"],
        "filter": ["stage.where={stage: ppo, metrics.win_rate.low: '>=0.7'}"],
        "sort": ["stage.sort=-score.value", "stage.format=json", "stage.limit=100"],
        "show": ["stage.action=show", "stage.run=ppo:line-7-0"],
        "trace": ["stage.action=trace", "artifact=export:line-7"],
        "compare": ["stage.action=compare", "stage.where={stage: ppo, name: 'line-7-*'}"],
    }
    found: dict[str, list[float]] = {"rebuild": [], **{name: [] for name in questions}}
    for _ in range(rounds):
        found["rebuild"].append(asked(root, "stage.action=rebuild")[0])
        for name, words in questions.items():
            took, out = asked(root, *words)
            found[name].append(took)
            assert "line-" in out, (name, out)
    out = asked(root, "stage.format=csv", "stage.columns=[run]")[1]
    assert len(out.splitlines()) == runs + 1
    return found


def opened(root: Path, rounds: int) -> list[float]:
    """Seconds from an address in a browser to the page's first table, of a server that runs already."""
    from playwright.sync_api import sync_playwright

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "align", "stage=registry", "stage.action=serve", f"run.root={root}"]
    server = subprocess.Popen([*command, f"stage.port={port}"], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    server.stdout.readline()
    took = []
    try:
        with sync_playwright() as running:
            browser = running.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            for _ in range(rounds + 1):
                page = browser.new_context().new_page()
                began = time.perf_counter()
                page.goto(f"http://127.0.0.1:{port}/")
                page.wait_for_selector("#align-registry tbody tr")
                took.append(time.perf_counter() - began)
                assert page.locator("#align-registry tbody tr").count() == 100
                page.context.close()
            browser.close()
    finally:
        server.terminate()
        server.wait()
    return took[1:]  # the first one waits for the port, too


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    load = [round(os.getloadavg()[0], 1)]
    with tempfile.TemporaryDirectory() as work:
        many, few = Path(work) / "many", Path(work) / "few"
        writer = Portfolio(many)
        for number in range(given.runs // len(PROJECT)):
            writer.project(number)
        Portfolio(few).project(0)
        found = measured(many, given.rounds, given.runs)
        found["ten runs"] = [asked(few)[0] for _ in range(given.rounds)]
        found["page"] = opened(many, given.rounds)
        size = (many / INDEX).stat().st_size
    load.append(round(os.getloadavg()[0], 1))
    for name, times in found.items():
        print(f"{name}: {median(times):.2f} s ({', '.join(f'{one:.2f}' for one in times)}); asked {BARS[name]:g} s")
    print(f"{given.runs:,} runs; index {size / 1e6:.0f} MB; load {load}")
    if given.save:
        machine = {
            "processor": platform.machine(),
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            "load": load,
        }
        given.save.write_text(json.dumps({"machine": machine, "runs": given.runs, "seconds": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
