"""Run folders written without training, with manifests as a run writes them, and queries of the registry on them.

A thousand folders take a second.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

from align.registry.index import Index, query_index
from align.registry.query import find_runs
from align.registry.record import Record
from align.run.digests import file_digest
from align.run.figures import FILE as METRICS
from align.run.figures import write_figures
from align.run.manifest import Base, Input, Manifest, read_manifest, write_manifest

BASE = Base("pocket", "/models/pocket", None, sha256(b"pocket").hexdigest())
BEGAN = datetime(2026, 11, 1, tzinfo=UTC)
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["v_proj", "q_proj"], "use_dora": False, "use_rslora": False}
TRAINS = ("sft", "reward", "ppo", "dpo")


def compute_artifact_digest(ref: str) -> str:
    """Compute the digest that the manifest of the run `stage:name` has for its artifact."""
    return sha256(ref.encode()).hexdigest()


def build_run_input(root: Path, ref: str, digest: str = "") -> Input:
    """Build the input by which a later run's manifest names the artifact of a run."""
    stage, _, name = ref.partition(":")
    return Input(
        digest or compute_artifact_digest(ref), ref, str(root / stage / name / "artifact"), stage, name, whole=False
    )


def write_run_folder(root: Path, ref: str, inputs: Mapping[str, str | Input] | None = None, **known: Any) -> Path:
    """Write the folder of a run, which is done unless `known` has another status.

    Args:
        inputs: the name of an input → `stage:name` of the run that made it.
        known: fields of the manifest, and `day`, the day of its start counted from 1 November 2026.
    """
    stage, _, name = ref.partition(":")
    day = known.pop("day", 0)
    folder = root / stage / name
    read = {
        key: build_run_input(root, source) if isinstance(source, str) else source
        for key, source in (inputs or {}).items()
    }
    began = BEGAN + timedelta(days=day)
    times = {"started": began.isoformat(), "finished": (began + timedelta(minutes=30)).isoformat()}
    method = {"name": "qlora", "r": 8, "alpha": 16}
    config = {"stage": {"name": stage}, "data": {"name": "jsonl", "path": "rows.jsonl"}, "method": method}
    manifest = Manifest(
        **{
            "stage": stage,
            "name": name,
            "seed": 0,
            "config": config,
            "inputs": read,
            "base": BASE,
            "status": "done",
            "digest": compute_artifact_digest(ref) if stage in TRAINS else "",
            "times": times,
            "published": day + 1,
            "hardware": {"device": "cpu", "dtype": "float32"},
            **known,
        }
    )
    (folder / "artifact").mkdir(parents=True, exist_ok=True)
    if stage in TRAINS:
        (folder / "artifact" / "adapter_config.json").write_text(json.dumps(LORA))
    if manifest.done:
        write_figures(folder, manifest.metrics)
        hashed = {METRICS: file_digest(folder / METRICS)}
        manifest = replace(manifest, outputs={**manifest.outputs, **hashed})
    write_manifest(folder, manifest)
    return folder


def publish_file(folder: Path, name: str) -> None:
    """Add the digest of a file to the manifest of a run."""
    manifest = read_manifest(folder)
    hashed = {name: file_digest(folder / name)}
    write_manifest(folder, replace(manifest, outputs={**manifest.outputs, **hashed}))


def build_interval(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high, "n": 200}


def write_two_policies(root: Path) -> Path:
    """Write the runs of two policies with the same start. The first was evaluated and exported."""
    write_run_folder(
        root, "data:talk", metrics={"root": "r" * 64, "train_rows": 900}, base=None, outputs={"artifact/data.json": "d"}
    )
    write_run_folder(
        root,
        "sft:start",
        {"data": Input("x", "data:talk", details={"root": "r" * 64})},
        metrics={"loss_after": 2.5, "train_rows": 900, "data_root": "t" * 64},
        day=1,
    )
    write_run_folder(
        root, "reward:votes", {"init": "sft:start"}, metrics={"accuracy": build_interval(0.8, 0.7, 0.9)}, day=2
    )
    for i, name in enumerate(("first", "second")):
        write_run_folder(
            root,
            f"ppo:{name}",
            {"init": "sft:start", "reward": "reward:votes"},
            day=3 + i,
            metrics={"last_score": 0.5 + i, "last_kl": 3.0, "peak_rss_mb": 700.5},
        )
    part = Input("p" * 64, "reward:gone", stage="reward", name="gone")
    figures = {"win_rate": build_interval(0.81, 0.75, 0.87), "kl": 4.5, "judge_is": "gold", "by part/of": {"kl": 2}}
    write_run_folder(root, "eval:one", {"artifact": "ppo:first", "part.data": part}, day=6, metrics=figures)
    write_run_folder(root, "export:one", {"artifact": "ppo:first"}, day=7, metrics={"kl": 1e-7})
    return root


def query_records(root: Path, **where: Any) -> list[Record]:
    """Query the registry for the records of runs that meet conditions."""
    return query_index(root, lambda index: find_runs(index, where.items(), ["run"], 10_000)[0])


def find_record(root: Path, ref: str) -> Record:
    """Query the registry for the record of a run."""
    record = query_index(root, lambda index: index.record(ref))
    assert record is not None
    return record


def rebuild_records(root: Path) -> list[Record]:
    """Rebuild the index from the folders and return all its records."""
    with Index(root, rebuild=True) as index:
        return find_runs(index, {}, ["run"], 10_000)[0]


def query_refs(root: Path, where: Mapping[str, Any], *sort: str) -> list[str]:
    """Query the registry for the refs of runs that meet conditions."""
    return [
        record["run"]
        for record in query_index(root, lambda index: find_runs(index, where.items(), sort or ["run"], 10_000)[0])
    ]
