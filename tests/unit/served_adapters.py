"""Adapters on disk for a server to load: published by a run, written by stage=export, or made elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from run_folders import BASE, build_run_config
from safetensors.numpy import save_file

from align.run import Base, Run

METHOD = "qlora"


def write_adapter_files(folder: Path, value: float = 1.0, **more: object) -> Path:
    """Write PEFT's two files and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, **more}))
    tensors = {f"base_model.model.q_proj.lora_{side}.weight": np.full((8, 8), value, np.float32) for side in "AB"}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def write_exported_adapter(
    folder: Path, base: str = BASE.digest, into: str = "nf4-dequantised", value: float = 1.0, id: str = "tiny"
) -> Path:
    """Write an adapter with the two files in which stage=export describes its base."""
    write_adapter_files(folder, value)
    (folder / "base.json").write_text(json.dumps({"id": id, "revision": "", "digest": base}))
    (folder / "receipt.json").write_text(json.dumps({"into": into}))
    return folder


def publish_adapter_run(
    root: Path, name: str, base: Base = BASE, method: str = METHOD, value: float = 1.0, stage: str = "sft"
) -> Path:
    """Publish a run whose artifact is an adapter. Returns its folder."""
    values = build_run_config(root, name, stage={"name": stage, "lr": 0.1}, method={"name": method})
    with Run.open(values, {}, base, "tiny") as run:
        run.begin("a: 1\n")
        write_adapter_files(run.artifact, value)
        run.publish({})
    return run.folder
