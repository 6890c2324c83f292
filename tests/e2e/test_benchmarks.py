"""Benchmarks that no other test runs still run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from processes import Forks

from align.__main__ import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_gpu_benchmark_runs_without_a_gpu():
    sizes = ["--sizes", "tiny", "--device", "cpu", "--batch", "4", "--micro-batch", "2", "--tokens", "4"]
    sizes += ["--stages", "sft"]  # all stages take a quarter of an hour
    command = [str(ROOT / "benchmarks" / "gpu.sh"), *sizes]
    process = subprocess.run(
        command, env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    table = {line.split()[0]: line.split()[1:] for line in process.stdout.splitlines() if line}
    assert all(float(figure) >= 0 for figure in table["tiny"])
    assert float(table["tiny"][0]) > 0
    assert len(table["sft"]) == 2, process.stdout  # seconds, memory
    assert all(float(figure) > 0 for figure in table["sft"])


SERVING = {
    "decode_step": ("--sizes", "8", "--rounds", "1"),
    "batch_exactness": ("--dtypes", "float32", "--counts", "1", "--requests", "12"),
    "batching": ("--clients", "1,2", "--seconds", "0.5", "--rounds", "1"),
    "adapter_capacity": ("--adapters", "16", "--registered", "20", "--seconds", "1", "--rounds", "1"),
    "over_http": ("--clients", "1,2", "--seconds", "0.5", "--rounds", "1"),
    "flood": ("--clients", "8", "--flood", "16", "--slots", "8", "--seconds", "1", "--rounds", "1"),
    "rollouts": ("--rows", "8", "--tokens", "4", "--rounds", "1", "--dtypes", "float32"),
}
FEW_PROGRAMS = "import os; os.environ['PATH'] = '/usr/bin:/bin'"


@pytest.mark.slow
@pytest.mark.parametrize("script", SERVING)
def test_a_benchmark_of_the_engine_that_serves(script: str, forks: Forks, tmp_path: Path):
    """A short run on the built-in model exits with status 0, saves every figure and prints the table."""
    results_path = tmp_path / "found.json"
    script_path = ROOT / "benchmarks" / "serve" / f"{script}.py"
    arguments = ["--models", "pocket", "--save", str(results_path), *SERVING[script]]
    process = forks.run(tmp_path, *arguments, before=FEW_PROGRAMS, script=script_path)
    assert process.status == 0, process.out + process.err
    results = json.loads(results_path.read_text(encoding="utf-8"))
    assert results["machine"]["threads"] == 1
    assert results["rows"]
    assert all(re.search(rf"^\| {re.escape(name)} \|", process.out, re.MULTILINE) for name in results["rows"])
    times = re.findall(r'"\w*_(?:s|ms|per_s)": ([-\d.]+)', json.dumps(results["rows"]))
    assert all(float(figure) > 0 for figure in times)


PPO = ROOT / "benchmarks" / "ppo"


@pytest.mark.slow
def test_grpo_stands_beside_trls_own(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    """Both sides of a row do as many updates of as many answers, and are timed by both clocks."""
    monkeypatch.syspath_prepend(PPO)
    run = import_module("run")
    work = import_module("work")
    workload = work.Work(str(tiny_model), 4, 6, 1, 3, "float32", advantage="grpo", group=2, value_backbone="none")
    row = run.Row(workload, workload, 2.0, 0.5, (run.TRL_GRPO, run.ALIGN_PPO))
    trl, align = (run.compute_median([run.measure_script(script, workload)]) for script in row.scripts)
    for side in (trl, align):
        assert side["samples_per_s"] == pytest.approx(4 / side["s_per_update"], rel=0.01)
        assert 0 < side["cpu_s_per_update"] < 60
    comparison = run.compare_sides(trl, align, row)
    assert comparison["ratio"]["processor"] == round(trl["cpu_s_per_update"] / align["cpu_s_per_update"], 2)
    table_lines = run.format_table({"rows": {"tiny, GRPO": comparison}}).splitlines()
    assert table_lines[0].count("|") == table_lines[1].count("|") == table_lines[2].count("|") == 11


@pytest.mark.slow
def test_supervised_tuning_stands_beside_trainer_and_trl(tiny_model: Path, tmp_path: Path):
    """All three train on the same tokens with the same losses, and the table has their rates, ratios and bars."""
    results_path = tmp_path / "results.json"
    sizes = ["--distributions", "chat-like", "--rounds", "1", "--steps", "2", "--batch", "2", "--micro-batch", "1"]
    command = [sys.executable, str(ROOT / "benchmarks" / "sft" / "run.py"), "--model", str(tiny_model), *sizes]
    command += ["--warm-up", "2", "--held-out", "1", "--dtype", "float32", "--save", str(results_path)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr  # it fails if the losses differ
    report = json.loads(results_path.read_text(encoding="utf-8"))
    assert set(report["rows"]) == {"chat-like"}
    row = report["rows"]["chat-like"]
    rates = row["tokens_per_cpu_s"]
    assert list(rates) == ["align", "Trainer", "TRL"]
    assert all(rate > 0 for rate in rates.values())
    assert row["ratio"] == {peer: round(rates["align"] / rates[peer], 2) for peer in ("Trainer", "TRL")}
    assert row["bar"] == {"Trainer": 1.3, "TRL": 1.8}
    assert row["steps"] == 2
    assert row["losses_differ_by"] < 1e-3
    before, after = row["held_out_loss"]["align"]
    assert after != before
    table = process.stdout.splitlines()
    assert any(line.startswith("| chat-like |") and line.count("|") == 9 for line in table)


@pytest.mark.slow
def test_an_update_without_a_critic_keeps_fewer_bytes_alive(tiny_model: Path, tmp_path: Path):
    results_path = tmp_path / "live.json"
    command = [sys.executable, str(PPO / "live.py"), str(tiny_model), "--rows", "8", "--dtype", "float32"]
    process = subprocess.run([*command, "--save", str(results_path)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    rows = json.loads(results_path.read_text(encoding="utf-8"))["rows"]
    own_critic, shared_critic, *without_critic = rows.values()
    for row in without_critic:
        assert row["trained"] < shared_critic["trained"] < own_critic["trained"]
        assert row["weights_mb"] < own_critic["weights_mb"]
        assert row["weights_mb"] < row["peak_mb"] < own_critic["peak_mb"]
    assert all(re.search(rf"^\| {re.escape(name)} \|", process.stdout, re.MULTILINE) for name in rows)


@pytest.mark.slow
def test_a_reward_model_stands_beside_trls_own(chats: Path, tiny_model: Path, tmp_path: Path):
    """`recipes/hh/compare_with_trl.py` on pairs that a model of two layers can tell apart."""
    turns = [json.loads(line)["messages"] for line in chats.read_text(encoding="utf-8").splitlines()]
    rejected_turns = [{"role": "assistant", "content": "No."}]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(json.dumps({"chosen": t[:2], "rejected": [*t[:1], *rejected_turns]}) + "\n" for t in turns),
        encoding="utf-8",
    )
    run = ["stage=reward", "init=base", "model=hub", f"model.path={tiny_model}", "method=lora", "device=cpu"]
    data = ["data=jsonl", f"data.path={pairs}", "data.held_out=0", "stage.held_out=0.3", "stage.lr=1e-2"]
    steps = ["stage.batch_size=4", "stage.micro_batch=2", "stage.epochs=4"]
    assert main([*run, *data, *steps, f"run.root={tmp_path}", "run.name=pairs"]) == 0
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "recipes" / "hh" / "compare_with_trl.py"), str(tmp_path / "reward" / "pairs")]
    process = subprocess.run(command, env=threads, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    accuracies = re.findall(r"^\| (?:`stage=reward`|TRL.*) \| ([\d.]+) \[", process.stdout, re.MULTILINE)
    assert len(accuracies) == 2
    assert min(map(float, accuracies)) > 0.7
    assert turns[0][0]["content"] not in process.stdout + process.stderr
