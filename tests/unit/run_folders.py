"""A configuration, short helpers that open and publish a run, and its manifest, for tests of runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.run import Base, Input, Run

BASE = Base("org/tiny", "/models/tiny", None, "b" * 64)
INPUTS = {"data": Input("d1", path="a.jsonl")}


def build_run_config(root: Path, name: str | None = None, **changes: Any) -> dict[str, Any]:
    settings = {"stage": {"name": "sft", "lr": 0.1}, "seed": 0, "resume": "auto", "track": {"name": "none"}}
    groups: dict[str, Any] = {"data": {"name": "jsonl"}, "method": {"name": "qlora"}}
    return {**settings, **groups, "run": {"root": str(root), "name": name}, **changes}


def open_run(
    root: Path, name: str | None = None, inputs: Mapping[str, Any] = INPUTS, resume: str = "auto", **more
) -> Run:
    return Run.open(build_run_config(root, name, **more), inputs, more.get("base", BASE), "tiny-qlora", resume)


def publish_run(
    root: Path,
    name: str,
    stage: str = "sft",
    base: Base = BASE,
    weights: str = "w",
    inputs: Mapping[str, Any] = INPUTS,
) -> Path:
    """Publish a run whose artifact is an adapter. Returns its folder."""
    values = build_run_config(root, name, stage={"name": stage, "lr": 0.1})
    with Run.open(values, inputs, base, "tiny") as run:
        run.begin("a: 1\n")
        (run.artifact / "adapter_config.json").write_text("{}")
        (run.artifact / "adapter_model.safetensors").write_text(weights)
        run.publish({"loss": 1.5})
    return run.folder


def load_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
