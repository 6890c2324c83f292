"""Published checkpoints: the table's rows, a sample that is measured again, and the package's look-up."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from align.models import architectures
from align.models.architectures import find_route, select_deciding_settings

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from architectures import DOC, count_checkpoints, measure_in_fork  # noqa: E402
from checkpoints import PUBLISHED, build_full_config, measure_checkpoint, shrink_config  # noqa: E402

ROWS: dict[str, Any] = json.loads(architectures.TABLE.read_text(encoding="utf-8"))["checkpoints"]
CONFIGS: dict[str, Any] = json.loads(PUBLISHED.read_text(encoding="utf-8"))
SAMPLE = ("microsoft/Phi-3.5-mini-instruct", "LiquidAI/LFM2-700M", "Qwen/Qwen3-30B-A3B")
"""LongRoPE positions; layers of two kinds, one of which keeps a state; experts."""
MEASURED = {name: row for name, row in ROWS.items() if row["path"] in ("fast", "plain")}


def test_every_published_configuration_has_a_row_and_a_source():
    assert ROWS.keys() == CONFIGS.keys()
    assert len(ROWS) >= 60
    for name, row in ROWS.items():
        assert row["source"] == CONFIGS[name]["source"]
        assert row["source"].startswith("https://")
        assert row["path"] == "fast" or row["cause"]


@pytest.mark.parametrize("name", SAMPLE)
def test_a_row_is_what_a_measurement_gives(name: str):
    row = measure_in_fork(lambda: measure_checkpoint(CONFIGS[name]["config"]))
    assert row | {"off": None} == {k: v for k, v in ROWS[name].items() if k != "source"} | {"off": None}


@pytest.mark.parametrize("name", sorted(MEASURED))
def test_a_published_configuration_takes_the_path_that_was_measured(name: str):
    config = build_full_config(CONFIGS[name]["config"])
    assert select_deciding_settings(config) == ROWS[name]["settings"] == select_deciding_settings(shrink_config(config))
    route = find_route(config)
    assert route.is_measured
    assert (route.has_fast_path, route.can_pad, route.can_pack) == (
        ROWS[name]["path"] == "fast",
        ROWS[name]["padding"],
        ROWS[name]["packing"],
    )


def test_one_more_flag_is_not_proven():
    config = build_full_config(CONFIGS["microsoft/Phi-3.5-mini-instruct"]["config"])
    config.hidden_act = "gelu"
    assert not find_route(config).is_measured


def test_readme_counts_the_checkpoints():
    counts = count_checkpoints(ROWS)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    page = DOC.read_text(encoding="utf-8")
    assert f"Of {counts['checkpoints']} published checkpoints, {counts['fast']} take align's fast path" in readme
    assert f"{counts['plain']} more take" in readme
    assert all(f"[{name}]({row['source']})" in page for name, row in ROWS.items())
