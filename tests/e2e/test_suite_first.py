"""`stage.first`: the system that is compared with the others, part of a run's identity."""

from __future__ import annotations

import pytest
from suite_evaluations import RuleEvaluations, read_results

from align.__main__ import main
from align.run import read_manifest


def test_another_first_system_is_another_run(bench: RuleEvaluations):
    run_of_new = bench.run("stage.systems={new: ppo:p, old: sft:s}")
    run_of_old = bench.run("stage.systems={old: sft:s, new: ppo:p}")
    assert run_of_new != run_of_old
    reordered = bench.run("stage.systems={old: sft:s, new: ppo:p}", "stage.first=new")
    assert reordered == run_of_new
    assert [*read_results(run_of_new)["tasks"]["judged"]["against"]] == ["old"]
    assert [*read_results(run_of_old)["tasks"]["judged"]["against"]] == ["new"]
    assert [system["name"] for system in read_manifest(run_of_old).metrics["systems"]] == ["old", "new"]
    comparisons = [read_results(run)["tasks"]["judged"]["against"] for run in (run_of_new, run_of_old)]
    assert comparisons[0]["old"]["win_rate"]["value"] + comparisons[1]["new"]["win_rate"]["value"] == pytest.approx(1)


def test_who_is_first_is_one_of_them(bench: RuleEvaluations):
    assert "stage.first=base" in bench.expect_error("stage.systems={new: ppo:p, old: sft:s}", "stage.first=base")
    assert main(bench.words("stage.first=new")) == 2
