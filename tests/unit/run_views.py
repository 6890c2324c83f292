"""Run views for tests of reports, built from metrics without running a stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from align.report.headlines import summarize_run
from align.report.run_view import RunView
from align.run import Base, Manifest

BASE = Base("org/tiny", "/models/tiny", "0123456789abcdef", "b" * 64)


def build_interval(value: float, low: float | None, high: float | None, n: int) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "n": n}


def build_run_view(stage: str, metrics: dict[str, Any], folder: Path = Path("/nowhere"), **fields: Any) -> RunView:
    settings = {"name": stage, **fields.pop("settings", {})}
    config = {
        "stage": settings,
        "method": {"name": "qlora", "r": 16, "alpha": 32},
        "project": "p",
        "data": {"name": "jsonl", "path": "chats.jsonl", "max_length": 512},
        "rollout": {"max_new_tokens": 24},
        "device": "auto",
        "dtype": "auto",
    }
    manifest = Manifest(stage, "mine", 3, config, fields.pop("inputs", {}), BASE, metrics=metrics, **fields)
    return RunView(folder, manifest, "python -m align stage=…")


def summarize_view(*arguments: Any, **fields: Any) -> str:
    return summarize_run(build_run_view(*arguments, **fields)).replace("\u00a0", " ")


def write_ppo_metrics(folder: Path, scores: list[float], spread: float = 1.0) -> Path:
    rows = ({"step": i + 1, "score": score, "score_std": spread, "kl": 0.5 * i} for i, score in enumerate(scores))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
