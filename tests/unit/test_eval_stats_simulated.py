"""The bars of `benchmarks/evals/coverage.py` on fewer draws, and that the known wrong methods miss them."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "evals"))

import simulated  # noqa: E402

DRAWS = 400


def error(share: float, draws: int = DRAWS) -> float:
    return 3 * math.sqrt(share * (1 - share) / draws)


@pytest.mark.parametrize("case", simulated.cases(64), ids=lambda case: case.name)
def test_intervals_cover_what_they_claim(case: simulated.Case) -> None:
    found = simulated.covered(case, DRAWS)
    assert simulated.within_bar(found["coverage"], DRAWS), found
    assert found["without"] == 0


@pytest.mark.parametrize("figure", simulated.equals(64).values(), ids=simulated.equals(64))
def test_superior_seldom_passes_equal_systems(figure) -> None:
    passed = simulated.passed_wrongly(figure, DRAWS, simulated.Rule("superior"))
    assert passed <= simulated.WRONGLY + error(simulated.WRONGLY), passed


@pytest.mark.parametrize(("margin", "figure"), simulated.at_the_bound(64).values(), ids=simulated.at_the_bound(64))
def test_not_worse_seldom_passes_what_is_worse_by_the_margin(margin: float, figure) -> None:
    passed = simulated.passed_wrongly(figure, DRAWS, simulated.Rule("not_worse", margin))
    assert passed <= simulated.WRONGLY + error(simulated.WRONGLY), passed


@pytest.mark.parametrize("world", simulated.worlds(), ids=lambda world: world.name)
def test_a_detectable_difference_is_found(world: simulated.World) -> None:
    found = simulated.found_at_detectable(world, 64, DRAWS)
    assert found >= simulated.FOUND - error(simulated.FOUND), found


@pytest.mark.parametrize("judge", simulated.JUDGES)
def test_a_length_loving_judge_between_equals(judge: str) -> None:
    """200 sets of 512 verdicts: raw above 0.6, controlled 0.50 ± 0.01, covered in 92 to 98.5 %."""
    found = simulated.length_control(judge, 200)
    assert found["raw"] > 0.6
    assert found["controlled"] == pytest.approx(0.5, abs=0.01)
    assert simulated.LOWEST <= found["coverage"] <= simulated.HIGHEST


@pytest.mark.parametrize("icc", simulated.ICCS)
def test_flips_of_signs_reject_equals_in_one_of_twenty(icc: float) -> None:
    assert simulated.null_p(16, icc, DRAWS) <= 0.05 + error(0.05)


@pytest.mark.parametrize(("name", "case"), simulated.wrong_cases().items(), ids=simulated.wrong_cases())
def test_the_wrong_intervals_miss_the_bar(name: str, case: simulated.Case) -> None:
    """What these tests would say of a percentile bootstrap, of answers counted as prompts, and of an unpaired z."""
    found = simulated.covered(case, DRAWS)
    assert not simulated.within_bar(found["coverage"], DRAWS), found


def test_an_unpaired_test_does_not_find_what_a_paired_one_finds() -> None:
    powers = [simulated.power_of(of, 400, DRAWS) for of in (simulated.paired, simulated.unpaired)]
    assert powers[0] > 0.85
    assert powers[1] < 0.25


def test_the_saved_figures_missed_no_bar() -> None:
    saved = json.loads((ROOT / "benchmarks" / "evals" / "coverage.json").read_text(encoding="utf-8"))
    assert saved["missed"] == []
    assert saved["draws"] >= 2000
    assert {row["name"] for row in saved["coverage"]} >= {
        case.name for n in (32, 64, 256) for case in simulated.cases(n)
    }
    assert not any(row["holds"] for row in saved["alternatives"] if "coverage" in row)
