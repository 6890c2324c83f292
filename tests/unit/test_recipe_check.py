"""`recipes/check.py`: bars, the band of expected figures, and rows that are saved."""

from __future__ import annotations

import json
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BARS = {"win_rate": [">=", 0.8], "minutes": ["<=", 7]}


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = spec_from_file_location("recipe_check", ROOT / "recipes" / "check.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_row(processor: str, seed: int, win_rate: float, minutes: float = 5.0) -> dict[str, Any]:
    return {"seed": seed, "processor": processor, "win_rate": win_rate, "prompts": 256, "minutes": minutes}


EXPECTED = [make_row("A, avx512f", 0, 0.79), make_row("A, avx512f", 1, 0.87), make_row("B, amx_bf16", 0, 0.85)]


@pytest.mark.parametrize(
    ("win_rate", "minutes", "mark", "missed"),
    [
        (0.82, 5.0, "0.79 to 0.87", []),
        (0.75, 5.0, "0.79 to 0.87  MISSED", ["win_rate"]),  # nearer to the band than the band is wide
        (0.96, 5.0, "0.79 to 0.87  outside", []),
        (0.70, 50.0, "0.79 to 0.87  outside  MISSED", ["win_rate"]),
    ],
)
def test_figures_are_compared_with_the_band_of_all_processors(
    check: ModuleType,
    capsys: pytest.CaptureFixture[str],
    win_rate: float,
    minutes: float,
    mark: str,
    missed: list[str],
) -> None:
    row = make_row("C, avx2", 0, win_rate, minutes)
    assert check.print_comparison(row, BARS, EXPECTED) == missed
    lines = [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()[1:]]
    notes = {name: "  ".join(cells) for name, _value, *cells in lines}
    assert notes["win_rate"] == f">= 0.8  {mark}"
    assert notes["minutes"] == ("<= 7  slower than the bar" if minutes > 7 else "<= 7")
    assert notes["processor"] == notes["seed"] == ""


def test_a_saved_row_replaces_only_its_own_seed_and_processor(check: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "expected.json"
    for row in (*EXPECTED, make_row("A, avx512f", 1, 0.812345678)):
        check.save_row(file, row)
    rows = json.loads(file.read_text())
    assert [(row["processor"], row["seed"], row["win_rate"]) for row in rows] == [
        ("A, avx512f", 0, 0.79),
        ("A, avx512f", 1, 0.8123),
        ("B, amx_bf16", 0, 0.85),
    ]


@pytest.mark.parametrize(
    ("hardware", "label"),
    [
        ({"processor": "AMD EPYC", "instructions": "avx2 avx512f", "onednn_max_cpu_isa": ""}, "AMD EPYC, avx512f"),
        ({"processor": "AMD EPYC", "instructions": "avx2 avx512f", "onednn_max_cpu_isa": "AVX2"}, "AMD EPYC, AVX2"),
        ({"processor": "", "instructions": "", "onednn_max_cpu_isa": ""}, "unknown processor, arm64"),
    ],
)
def test_a_processor_is_named_by_model_and_instructions(
    check: ModuleType, hardware: dict[str, str], label: str
) -> None:
    assert check.describe_processor({"machine": "arm64", **hardware}) == label
