"""Who is judged: the first of the systems, which is part of what a run is."""

from __future__ import annotations

import pytest
from benches import Bench, results

from align.__main__ import main
from align.run import read_manifest


def test_another_first_system_is_another_run(bench: Bench):
    one = bench.run("stage.systems={new: ppo:p, old: sft:s}")
    other = bench.run("stage.systems={old: sft:s, new: ppo:p}")
    assert one != other
    again = bench.run("stage.systems={old: sft:s, new: ppo:p}", "stage.first=new")
    assert again == one
    assert [*results(one)["tasks"]["judged"]["against"]] == ["old"]
    assert [*results(other)["tasks"]["judged"]["against"]] == ["new"]
    assert [system["name"] for system in read_manifest(other).metrics["systems"]] == ["old", "new"]
    kept = [results(run)["tasks"]["judged"]["against"] for run in (one, other)]
    assert kept[0]["old"]["win_rate"]["value"] + kept[1]["new"]["win_rate"]["value"] == pytest.approx(1)


def test_who_is_first_is_one_of_them(bench: Bench):
    assert "stage.first=base" in bench.refused("stage.systems={new: ppo:p, old: sft:s}", "stage.first=base")
    assert main(bench.words("stage.first=new")) == 2
