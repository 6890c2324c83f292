"""Budgets for the number of modules that each stage reaches, so that coupling of packages fails a test.

Modules that are loaded by name count only if they are listed here: engines (`align.rollout.registry.ENGINES`), kinds of
checks (`align.reward.checkers.build.KINDS`), and the page of a data set, a judge or a suite (`align.report.run_view`).
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
"""Stage → modules that it loads by name."""
BUDGETS = {
    "data": 200,
    "sft": 170,
    "sample": 175,
    "annotate": 200,
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
def list_imports(module: str) -> frozenset[str]:
    """Return the modules that a module imports, also inside functions, and the packages that contain them."""
    source = PATHS[module].read_text(encoding="utf-8")
    imported_names: set[str] = set()
    for name in imports(source, module, PATHS[module].name == "__init__.py"):
        parts = name.split(".")
        imported_names |= {".".join(parts[: i + 1]) for i in range(len(parts))}
    return frozenset(imported_names & PATHS.keys())


def list_reachable(modules: Iterable[str]) -> set[str]:
    reached: set[str] = set()
    pending = list(modules)
    while pending:
        module = pending.pop()
        if module not in reached:
            reached.add(module)
            pending += list_imports(module)
    return reached


def list_reached_by_stage(stage: str) -> set[str]:
    runner = (RUNNER,) if STAGES[stage].runs else ()
    return list_reachable((f"align.stages.{STAGES[stage].module}", *BESIDE.get(stage, ()), *runner))


@pytest.mark.parametrize("stage", BUDGETS)
def test_a_stage_reaches_few_modules(stage: str):
    reached = list_reached_by_stage(stage)
    assert len(reached) <= BUDGETS[stage], sorted(reached)


def test_every_stage_has_a_budget():
    assert BUDGETS.keys() == {stage.module for stage in STAGES.values()}


def test_ppo_reaches_nothing_of_other_products():
    assert not [name for name in list_reached_by_stage("ppo") if name.startswith(NEVER_IN_PPO)]


def test_imports_inside_functions_count():
    assert "align.ppo.loop" in list_imports("align.stages.ppo")
    assert {"align.ppo", "align.ppo.update"} <= list_reachable(["align.ppo.loop"])


def test_what_is_found_by_name_exists():
    module_names = [engine.partition(":")[0] for engine in ENGINES.values()]
    module_names += [f"align.reward.checkers.{module}" for module in KINDS.values()]
    module_names += [name for stage in STAGES for name in getattr(load_stage(stage), "PRELOAD", ())]
    module_names += [f"align.report.{page}" for page in ("data_set_page", "judge_page", "suite_page")]
    assert set(module_names) <= PATHS.keys()
