"""How many modules a stage reaches, so that a change that couples packages is seen.

What is found by name counts only where it is named here: engines (`align.rollout.registry.ENGINES`), kinds of checks
(`align.reward.checkers.build.KINDS`), and the page of a data set, a judge or a suite (`align.report.run_view`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

from align.config.stages import STAGES
from align.reward.checkers import KINDS
from align.rollout.registry import ENGINES
from align.stages import load_stage

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs"))
from floors import MODULES, imports, name_of

PATHS = {name_of(path): path for path in MODULES}
RUNNER = "align.stages.runner"
BESIDE = {"ppo": ("align.rollout.hf",)}
"""Stage → modules that it finds by name."""
BUDGETS = {
    "data": 200,
    "sft": 170,
    "sample": 175,
    "annotate": 195,
    "reward": 185,
    "ppo": 190,
    "dpo": 190,
    "kto": 190,
    "eval": 230,
    "export": 175,
    "serve": 225,
    "verify": 195,
    "registry": 150,
    "plan": 170,
}
"""Module of a stage → the most modules that it may reach together with the runner. Packages count too."""
NEVER_IN_PPO = ("align.serve", "align.annotate.accounts", "align.annotate.web", "align.export", "align.registry")


@cache
def imported_by(module: str) -> frozenset[str]:
    """Return the modules that a module imports anywhere, inside functions too, and the packages that they are in."""
    source = PATHS[module].read_text(encoding="utf-8")
    found: set[str] = set()
    for name in imports(source, module, PATHS[module].name == "__init__.py"):
        parts = name.split(".")
        found |= {".".join(parts[: i + 1]) for i in range(len(parts))}
    return frozenset(found & PATHS.keys())


def reachable_from(modules: Iterable[str]) -> set[str]:
    reached: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += imported_by(module)
    return reached


def reached_by(stage: str) -> set[str]:
    runner = (RUNNER,) if STAGES[stage].runs else ()
    return reachable_from((f"align.stages.{STAGES[stage].module}", *BESIDE.get(stage, ()), *runner))


@pytest.mark.parametrize("stage", BUDGETS)
def test_a_stage_reaches_few_modules(stage: str):
    reached = reached_by(stage)
    assert len(reached) <= BUDGETS[stage], sorted(reached)


def test_every_stage_has_a_budget():
    assert BUDGETS.keys() == {stage.module for stage in STAGES.values()}


def test_ppo_reaches_nothing_of_other_products():
    assert not [name for name in reached_by("ppo") if name.startswith(NEVER_IN_PPO)]


def test_imports_inside_functions_count():
    assert "align.ppo.loop" in imported_by("align.stages.ppo")
    assert {"align.ppo", "align.ppo.update"} <= reachable_from(["align.ppo.loop"])


def test_what_is_found_by_name_exists():
    named = [engine.partition(":")[0] for engine in ENGINES.values()]
    named += [f"align.reward.checkers.{module}" for module in KINDS.values()]
    named += [name for stage in STAGES for name in getattr(load_stage(stage), "PRELOAD", ())]
    named += [f"align.report.{page}" for page in ("data_set_page", "judge_page", "suite_page")]
    assert set(named) <= PATHS.keys()
