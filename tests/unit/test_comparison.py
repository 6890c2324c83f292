"""Tests of comparing runs: the settings that differ, the runs that share a row, and the ranking of the rows."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import build_interval, query_records, write_run_folder

from align.core.errors import InputError, MissingArtifact
from align.registry.comparison import (
    Comparison,
    as_csv,
    as_lines,
    as_objects,
    compare,
    is_lower_better,
    list_sweep_runs,
)
from align.registry.comparison_page import average_lines, build_page, describe_best, make_labels, write_sweep_page
from align.report.plots import Point, find_pareto_front
from align.run.manifest import Input

T_975_DF2 = 4.302653


def build_config(stage: str = "ppo", **settings: Any) -> dict[str, Any]:
    return {"stage": {"name": stage, **settings}, "data": {"name": "chitchat"}, "method": {"name": "qlora"}, "seed": 0}


def write_scored_run(
    root: Path, name: str, seed: int = 0, score: float = 0.5, stage: str = "ppo", **options: Any
) -> Path:
    """Write a run with one score, its costs and a curve of three steps."""
    inputs = options.pop("inputs", {"init": "sft:s"})
    metrics = options.pop("metrics", {"last_score": score, "last_kl": 2.0 + score, "peak_rss_mb": 700.0, "updates": 4})
    fields = {key: options.pop(key) for key in ("code", "status", "error") if key in options}
    settings = build_config(stage, **options) | {"seed": seed}
    folder = write_run_folder(root, f"{stage}:{name}", inputs, metrics=metrics, seed=seed, config=settings, **fields)
    rows = [{"step": step, "score": score * step, "kl": step / 2} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def compare_runs(root: Path, **filters: Any) -> Comparison:
    return compare(root, query_records(root, **{"stage": "ppo", **filters}))


def test_seeds_are_one_row_and_other_settings_are_not(tmp_path: Path) -> None:
    for seed, score in enumerate((0.2, 0.4, 0.9)):
        write_scored_run(tmp_path, f"slow-{seed}", seed, score, lr=0.1)
        write_scored_run(tmp_path, f"fast-{seed}", seed, score + 1, lr=0.3)
    comparison = compare_runs(tmp_path)
    assert (comparison.keys, comparison.scores, comparison.left_out) == (
        ("stage.lr", "seed"),
        ("last_score", "last_kl"),
        0,
    )
    assert [(row.settings, row.seeds) for row in comparison.rows] == [
        ({"stage.lr": 0.3}, [0, 1, 2]),
        ({"stage.lr": 0.1}, [0, 1, 2]),
    ]
    slow = comparison.rows[1].figures["last_score"]
    half = T_975_DF2 * math.sqrt(((0.2 - 0.5) ** 2 + (0.4 - 0.5) ** 2 + (0.9 - 0.5) ** 2) / 2 / 3)
    assert slow["value"] == pytest.approx(0.5)
    assert (slow["low"], slow["high"]) == (pytest.approx(0.5 - half, rel=1e-5), pytest.approx(0.5 + half, rel=1e-5))
    table = [*as_lines(comparison)]
    assert table[0].split() == ["run", "stage.lr", "seed", "last_score", "last_kl"]
    assert table[2].startswith("ppo:slow-0 +2  0.1       0, 1, 2  0.5 [-0.3957, 1.396]")
    assert table[3] == "Of several seeds: the mean over them, with its 95 % interval."


def test_the_same_run_again_is_no_further_seed(tmp_path: Path) -> None:
    """Only the first run of a seed counts: a repetition would make the interval too narrow."""
    for name, seed, score in (("a", 0, 0.2), ("b", 0, 0.3), ("c", 1, 0.6)):
        write_scored_run(tmp_path, name, seed, score)
    (row,) = compare_runs(tmp_path).rows
    assert row.runs == ["ppo:a", "ppo:b", "ppo:c"]
    assert row.seeds == [0, 1]
    assert row.figures["last_score"]["value"] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("other", "key"),
    [
        ({"inputs": {"init": "sft:t"}}, "init"),
        ({"code": "c" * 64}, "code"),
        ({"lr": 0.9}, "stage.lr"),
        ({"inputs": {"init": "sft:s", "reward": "reward:r"}}, "reward"),
    ],
    ids=["input", "code", "setting", "an input of one"],
)
def test_what_makes_two_rows(tmp_path: Path, other: dict[str, Any], key: str) -> None:
    write_scored_run(tmp_path, "a", 0)
    write_scored_run(tmp_path, "b", 1, **other)
    comparison = compare_runs(tmp_path)
    assert len(comparison.rows) == 2
    assert {*comparison.keys} == {key, "seed"}


def test_runs_that_are_not_done_stand_alone(tmp_path: Path) -> None:
    write_scored_run(tmp_path, "a", 0)
    write_scored_run(tmp_path, "b", 1, status="failed", metrics={}, error="no")
    comparison = compare_runs(tmp_path)
    assert [row.records[0]["status"] for row in comparison.rows] == ["done", "failed"]
    head, _, second, *_ = as_lines(comparison)
    assert head.split()[:2] == ["run", "status"]
    assert second.split() == ["ppo:b", "failed", "1", "–", "–"]


def test_an_input_is_called_by_its_name_unless_two_have_it(tmp_path: Path) -> None:
    write_scored_run(tmp_path, "a", inputs={"init": "sft:s"})
    write_scored_run(tmp_path, "b", inputs={"init": "sft:t"})
    assert [line.split()[1] for line in as_lines(compare_runs(tmp_path))][:3] == ["init", "sft:s", "sft:t"]
    write_run_folder(tmp_path, "sft:s", digest="e" * 64)
    manifest = json.loads((tmp_path / "ppo/b/manifest.json").read_text())
    manifest["inputs"]["init"] |= {"name": "s", "digest": "e" * 64}
    (tmp_path / "ppo/b/manifest.json").write_text(json.dumps(manifest))
    lines = [*as_lines(compare_runs(tmp_path))]
    assert "sft:s (" in lines[1]
    assert f"sft:s ({'e' * 12})" in lines[2]


def test_runs_of_several_stages(tmp_path: Path) -> None:
    """Settings that all stages have are compared. Learning rates of different stages are not."""
    write_scored_run(tmp_path, "a", lr=0.1, gamma=0.9)
    write_scored_run(tmp_path, "b", stage="dpo", lr=0.2, metrics={"win_rate": build_interval(0.6, 0.5, 0.7)})
    comparison = compare(tmp_path, query_records(tmp_path, stage=["ppo", "dpo"]))
    assert comparison.keys == ("stage.name",)
    assert comparison.left_out == 2
    assert comparison.scores == ("win_rate", "last_score")
    assert [*as_lines(comparison)][
        -1
    ] == f"{comparison.left_out} settings left out, which only some of these stages have"
    assert "Learning rate" not in build_page(comparison, tmp_path).html()


def test_for_programs(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_scored_run(tmp_path, f"r{seed}", seed, 0.5 + seed / 4)
    report = as_objects(compare_runs(tmp_path))
    (row,) = report["rows"]
    assert (row["runs"], row["seeds"], row["settings"]) == (["ppo:r0", "ppo:r1"], [0, 1], {})
    head, line = (text.split(",") for text in as_csv(compare_runs(tmp_path)).splitlines())
    cells = dict(zip(head, line, strict=True))
    assert (cells["runs"], cells["last_score"], cells["updates"]) == ("ppo:r0 ppo:r1", "0.625", "4")
    assert float(cells["last_score.low"]) == row["figures"]["last_score"]["low"]


def test_what_cannot_be_read(tmp_path: Path) -> None:
    write_scored_run(tmp_path, "a")
    (write_scored_run(tmp_path, "b") / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="ppo:b: cannot be read"):
        compare_runs(tmp_path)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize(
    ("others", "sure"),
    [
        ([build_interval(0.6, 0.5, 0.7)], True),
        ([build_interval(0.6, 0.5, 0.76)], False),
        ([0.6], False),
        ([build_interval(0.6, 0.5, 0.7), build_interval(0.55, 0.2, 0.9)], False),
        ([{"value": 0.6, "low": None, "high": None}], False),
    ],
    ids=["apart", "overlap", "no interval", "the third may be as good", "an interval that is none"],
)
def test_which_is_best_is_said_with_its_doubt(tmp_path: Path, others: list[Any], sure: bool, low: bool) -> None:
    """The best row is compared with every other row. A loss is best where it is lowest."""
    figures = [build_interval(0.8, 0.75, 0.85), *others]
    if low:
        figures = [mirror_figure(figure) for figure in figures]
    name, stage = ("loss_after", "sft") if low else ("win_rate", "ppo")
    for i, figure in enumerate(figures):
        write_scored_run(tmp_path, f"r{i}", lr=i + 1, metrics={name: figure}, stage=stage)
    comparison = compare(tmp_path, query_records(tmp_path, stage=stage))
    sentence = describe_best(comparison, make_labels(comparison))
    assert sentence.startswith("Lowest loss_after: row 1 (lr 1), " if low else "Highest win_rate: row 1 (lr 1), ")
    assert ("larger than chance explains" in sentence) == sure, sentence
    assert ("The data do not show that it is better than row " in sentence) != sure


def mirror_figure(figure: Any) -> Any:
    if not isinstance(figure, dict):
        return 1 - figure
    low = figure["high"]
    high = figure["low"]
    ends = {"low": low if low is None else 1 - low, "high": high if high is None else 1 - high}
    return {**figure, "value": 1 - figure["value"], **ends}


def test_seeds_in_common_are_compared_seed_by_seed(tmp_path: Path) -> None:
    """The effect of a seed on both rows does not count. Each seed gains about the same here; the means overlap."""
    for seed, level in enumerate((0.1, 0.5, 0.9)):
        write_scored_run(tmp_path, f"a{seed}", seed, level, lr=0.1)
        write_scored_run(tmp_path, f"b{seed}", seed, level + 0.02 + seed / 1e4, lr=0.2)
    comparison = compare_runs(tmp_path)
    sentence = describe_best(comparison, make_labels(comparison))
    assert sentence.startswith("Highest last_score: row 2 (lr 0.2)")
    assert sentence.endswith("The difference from row 1 (lr 0.1) is larger than chance explains.")
    write_scored_run(tmp_path, "b2", 2, 0.85, lr=0.2)  # one seed the other way
    comparison = compare_runs(tmp_path)
    assert "The data do not show that it is better" in describe_best(comparison, make_labels(comparison))


def test_intervals_of_two_kinds_are_no_comparison(tmp_path: Path) -> None:
    """An interval over seeds is not compared with one over the prompts of a run, which ignores other seeds."""
    for seed in (0, 1):
        write_scored_run(
            tmp_path, f"a{seed}", seed, lr=0.1, metrics={"win_rate": build_interval(0.9 + seed / 1e3, 0.89, 0.91)}
        )
    write_scored_run(tmp_path, "b", 5, lr=0.2, metrics={"win_rate": build_interval(0.1, 0.09, 0.11)})
    comparison = compare_runs(tmp_path)
    assert "The data do not show that it is better" in describe_best(comparison, make_labels(comparison))


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"inputs": {"init": "sft:s", "data": Input("f" * 64, path="b.jsonl")}}, "data"),
        ({"inputs": {"init": "sft:s", "reward": "reward:r"}}, "reward"),
        ({"held_out": 0.5}, "stage.held_out"),
        ({"metrics": {"win_rate": build_interval(0.6, 0.5, 0.7), "judge": "vader"}}, "judge"),
    ],
    ids=["data", "reward", "share", "judge"],
)
def test_what_was_not_measured_alike_is_not_ranked(tmp_path: Path, other: dict[str, Any], why: str) -> None:
    shared_settings = {"metrics": {"win_rate": build_interval(0.8, 0.75, 0.85), "judge": "gold"}, "stage": "ppo"}
    data_inputs = {"data": Input("d" * 64, path="a.jsonl")} if why == "data" else {}
    write_scored_run(tmp_path, "a", inputs={"init": "sft:s", **data_inputs}, **shared_settings)
    write_scored_run(tmp_path, "b", **{**shared_settings, **({"metrics": shared_settings["metrics"]} | other)})
    comparison = compare_runs(tmp_path)
    assert (
        describe_best(comparison, make_labels(comparison))
        == f"Not ranked by win_rate: it was not measured in the same way ({why})."
    )


def test_of_figures_that_nobody_knows_nothing_is_said(tmp_path: Path) -> None:
    for i in (1, 2):
        write_scored_run(tmp_path, f"s{i}", stage="sample", prompts=i, metrics={"answers": i})
    comparison = compare(tmp_path, query_records(tmp_path, stage="sample"))
    assert describe_best(comparison, make_labels(comparison)) == "No figure here shows which of these is better."
    names = ("metrics.loss_after", "held_out_loss", "win_rate", "minutes", "updates")
    assert [is_lower_better(name) for name in names] == [True, None, False, True, None]


def test_columns_that_are_asked_for_have_their_direction_and_costs(tmp_path: Path) -> None:
    for i, name in enumerate("ab"):
        write_scored_run(
            tmp_path, name, stage="sft", lr=i + 1, metrics={"loss_after": 2.0 - i, "peak_rss_mb": 700.0 + i}
        )
    comparison = compare(tmp_path, query_records(tmp_path, stage="sft"), ["metrics.loss_after"])
    assert describe_best(comparison, make_labels(comparison)).startswith("Lowest metrics.loss_after: row 2 (lr 2)")
    assert "metrics.loss_after against peak memory, MB" in build_page(comparison, tmp_path).html()


def test_a_seed_without_a_figure_costs_the_others_nothing(tmp_path: Path) -> None:
    for seed, metrics in enumerate(({"win_rate": 0.5}, {"last_score": 1.0}, {"win_rate": 0.7, "last_score": 2.0})):
        write_scored_run(tmp_path, f"r{seed}", seed, metrics=metrics)
    (row,) = compare_runs(tmp_path).rows
    assert row.figures["win_rate"]["value"] == pytest.approx(0.6)
    assert (row.figures["win_rate"]["n"], row.figures["last_score"]["n"]) == (2, 2)


def test_shares_stay_shares_and_what_is_alike_is_a_number(tmp_path: Path) -> None:
    for seed, rate in enumerate((0.9, 1.0)):
        write_scored_run(
            tmp_path, f"r{seed}", seed, metrics={"win_rate": rate, "last_score": rate, "peak_rss_mb": 700.0}
        )
    (row,) = compare_runs(tmp_path).rows
    assert (row.figures["win_rate"]["high"], row.figures["peak_memory_mb"]) == (1.0, 700.0)
    assert row.figures["last_score"]["high"] > 1


def test_two_measures_of_how_far_runs_moved_are_not_mixed(tmp_path: Path) -> None:
    write_scored_run(tmp_path, "a", lr=1, metrics={"last_score": 0.1, "last_kl": 2.0, "kl": 9.0})
    write_scored_run(tmp_path, "b", lr=2, metrics={"last_score": 0.2, "last_kl": 3.0})
    assert compare_runs(tmp_path).scores == ("last_score", "last_kl")
    write_scored_run(tmp_path, "c", lr=3, metrics={"last_score": 0.2, "kl": 3.0})
    assert compare_runs(tmp_path).scores == ("last_score",)


def test_a_setting_that_is_no_number_is_json_all_the_same(tmp_path: Path) -> None:
    for i, name in enumerate("ab"):
        folder = write_scored_run(tmp_path, name, i, lr=0.5)
        text = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(text.replace('"lr": 0.5', '"lr": NaN'))
    comparison = compare_runs(tmp_path)
    assert len(comparison.rows) == 1  # two NaN settings do not differ
    json.dumps(as_objects(comparison), allow_nan=False)


def test_a_text_with_brackets_is_no_digest(tmp_path: Path) -> None:
    for i, note in enumerate(("rows (v1)", "talk (v2)")):
        write_scored_run(tmp_path, "ab"[i], note=note)
    assert ["rows (v1)" in line or "talk (v2)" in line for line in as_lines(compare_runs(tmp_path))][1:3] == [
        True,
        True,
    ]


def test_fewer_figures_where_they_do_not_fit(tmp_path: Path) -> None:
    for i, name in enumerate("ab"):
        figures = {f"figure_{k}_of_a_long_name": k + i for k in range(6)}
        write_scored_run(tmp_path, name, lr=i, metrics={**figures, "last_score": i})
    wide, narrow = ([*as_lines(compare_runs(tmp_path), width)] for width in (None, 80))
    assert wide[-1].startswith("2 figures more") or "figures more that differ" in wide[-1]
    assert max(map(len, narrow[:3])) <= 80 < max(map(len, wide[:3]))
    assert int(narrow[-1].split()[0]) > int(wide[-1].split()[0])


def test_curves_are_the_mean_over_seeds_each_once(tmp_path: Path) -> None:
    for name, seed, score in (("a", 0, 1.0), ("b", 1, 3.0), ("c", 1, 3.0)):
        write_scored_run(tmp_path, name, seed, score)
    html = build_page(compare_runs(tmp_path), tmp_path).html()
    assert "1 (ppo:a): from 2 at update 1 to 6 at update 3" in html


def test_a_stream_of_something_else_is_no_curve(tmp_path: Path) -> None:
    for i, name in enumerate("ab"):
        (write_scored_run(tmp_path, name, lr=i) / "metrics.jsonl").write_text('[1, 2]\n{"step": 1}\n' + "[" * 4000)
    build_page(compare_runs(tmp_path), tmp_path).html()


def test_the_page_has_curves_and_what_a_score_costs(tmp_path: Path) -> None:
    for i, name in enumerate("abc"):
        write_scored_run(tmp_path, name, score=0.2 + i / 4, lr=i + 1)
    html = build_page(compare_runs(tmp_path), tmp_path).html()
    assert "Score over updates. 1 (lr 1): from 0.2 at update 1 to 0.6 at update 3; 2 (lr 2): from" in html
    front_text = "of 3 rows. Not beaten in both:"
    assert f"last_score against KL from the start {front_text} 1 (lr 1), 2 (lr 2), 3 (lr 3)." in html
    assert f"last_score against peak memory, MB {front_text} 3 (lr 3)." in html
    assert html.count("<h1>") == 1


def test_seeds_are_drawn_as_their_mean_where_all_have_a_step() -> None:
    assert average_lines([[(1, 1.0), (2, 3.0), (4, 9.0)], [(1, 2.0), (2, 5.0), (3, 0.0)]]) == [(1, 1.5), (2, 4.0)]


def test_a_sweep_has_a_page_of_its_own(tmp_path: Path) -> None:
    folders = [write_scored_run(tmp_path, name, lr=i) for i, name in enumerate("ab")]
    assert write_sweep_page(folders[:1]) is None
    page = write_sweep_page(folders)
    assert page == write_sweep_page(folders[::-1])
    assert page is not None
    assert page.parent == tmp_path / "compare"
    assert "2 runs side by side" in page.read_text()
    assert write_sweep_page([*folders, write_scored_run(tmp_path / "elsewhere", "c")]) is None
    assert (
        sorted(list_sweep_runs(tmp_path, "latest"))
        == sorted(list_sweep_runs(tmp_path, page.stem))
        == ["ppo:a", "ppo:b"]
    )
    larger_page = write_sweep_page([*folders, write_scored_run(tmp_path, "c", lr=9)])
    assert larger_page is not None
    assert sorted(list_sweep_runs(tmp_path, "latest")) == ["ppo:a", "ppo:b", "ppo:c"]
    with pytest.raises(MissingArtifact, match=f"Did you mean {page.stem}"):
        list_sweep_runs(tmp_path, page.stem[:-1])


@pytest.mark.parametrize("note", ["{", "[]", '{"schema_version": 2, "runs": []}', '{"schema_version": 1, "runs": [3]}'])
def test_a_note_of_a_sweep_that_cannot_be_read(tmp_path: Path, note: str) -> None:
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare" / "ppo-x.json").write_text(note)
    with pytest.raises(InputError, match=r"stage\.sweep"):
        list_sweep_runs(tmp_path, "latest")


def test_the_best_points_are_what_the_definition_says() -> None:
    """The Pareto front agrees with its definition on random small sets of points with ties."""
    generator = random.Random(0)
    for _ in range(500):
        points = [(generator.randint(0, 4), generator.randint(0, 4)) for _ in range(generator.randint(0, 7))]
        beaten = {
            j
            for i, j in itertools.permutations(range(len(points)), 2)
            if points[i] != points[j] and points[i][0] <= points[j][0] and points[i][1] >= points[j][1]
        }
        plot_points = [Point(str(i), (x, x, x), (y, y, y)) for i, (x, y) in enumerate(points)]
        assert {int(point.label) for point in find_pareto_front(plot_points)} == {*range(len(points))} - beaten
