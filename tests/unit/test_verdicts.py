"""Reports begin with a summary sentence, list the origins of a run, and have a table of metrics."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from run_views import build_interval, build_run_view, summarize_view

from align.config.stages import WITH_RUNS
from align.report.figure_labels import FIGURES, build_figure_table, describe_small_samples
from align.report.headlines import SUMMARIZERS
from align.report.live import TITLES, build_finished_page
from align.report.origins import describe_code, describe_rendering, describe_row_counts, list_origins
from align.report.page import Code, Link, Report
from align.report.run_view import RunView
from align.report.stages import add_curves, add_latest_figures, compute_reliability_bins
from align.run import Base, Input, Manifest


def build_sft_metrics(change: dict[str, Any] | None, after: float = 4.36, rows: int = 256) -> dict[str, Any]:
    metrics = {"loss_before": 4.78, "loss_after": after, "held_out_rows": rows}
    return metrics | ({"loss_change": change} if change else {})


def test_every_stage_has_a_verdict_and_a_title():
    assert {*SUMMARIZERS, "data"} == TITLES.keys() == {*WITH_RUNS}


@pytest.mark.parametrize(
    ("metrics", "sentence"),
    [
        (
            build_sft_metrics(build_interval(-0.42, -0.45, -0.39, 256)),
            "Held-out loss fell from 4.78 to 4.36 nats a token, by 0.42 [0.39, 0.45], over 256 rows.",
        ),
        (
            build_sft_metrics(build_interval(0.22, 0.1, 0.34, 256), 5.0),
            "Held-out loss rose from 4.78 to 5.00 nats a token, by 0.22 [0.10, 0.34], over 256 rows.",
        ),
        (
            build_sft_metrics(build_interval(-0.01, -0.03, 0.01, 256), 4.77),
            (
                "Held-out loss fell from 4.78 to 4.77 nats a token, by 0.01 [−0.01, 0.03], over 256 rows. The interval "
                "holds 0: no change was shown."
            ),
        ),
        (
            build_sft_metrics(build_interval(-0.42, -0.6, -0.2, 11), rows=11),
            (
                "Held-out loss fell from 4.78 to 4.36 nats a token, by 0.42 [0.20, 0.60], over 11 rows. Fewer than 20 "
                "rows were measured: too few for a reliable result."
            ),
        ),
        (build_sft_metrics(None), "Held-out loss fell from 4.78 to 4.36 nats a token over 256 rows."),
        (build_sft_metrics(None, 4.7831), "Held-out loss rose from 4.780 to 4.783 nats a token over 256 rows."),
        (build_sft_metrics(None, 4.78), "Held-out loss stayed at 4.78 nats a token over 256 rows."),
    ],
)
def test_supervised_tuning(metrics: dict[str, Any], sentence: str):
    assert summarize_view("sft", metrics) == summarize_view("full", metrics) == sentence


def build_eval_metrics(value: float, low: float, high: float, n: int = 256, judge_is: str = "gold") -> dict[str, Any]:
    return {
        "win_rate": build_interval(value, low, high, n),
        "judge": "vader",
        "judge_is": judge_is,
        "kl": 4.83,
        "collapse": {"verdict": "varied", "reasons": []},
    }


@pytest.mark.parametrize(
    ("metrics", "sentence"),
    [
        (
            build_eval_metrics(0.8164, 0.7654, 0.866),
            (
                "The policy wins 82 % [77, 87] of 256 held-out prompts against what it started from, by VADER's "
                "sentiment, and moved 4.8 nats from it."
            ),
        ),
        (
            build_eval_metrics(0.3, 0.25, 0.36, judge_is="proxy") | {"judge": "reward:a"},
            (
                "The policy wins 30 % [25, 36] of 256 held-out prompts against what it started from, by reward:a, a "
                "proxy that it was optimised against, and moved 4.8 nats from it. It loses more often than it wins."
            ),
        ),
        (
            build_eval_metrics(0.6, 0.3, 0.85, 8),
            (
                "The policy wins 60 % [30, 85] of 8 held-out prompts against what it started from, by VADER's "
                "sentiment, and moved 4.8 nats from it. The interval holds 50 %: no difference was shown. Fewer than "
                "20 prompts were measured: too few for a reliable result."
            ),
        ),
    ],
)
def test_evaluation(metrics: dict[str, Any], sentence: str):
    assert summarize_view("eval", metrics) == sentence


def test_pairs():
    metrics = {"accuracy": build_interval(0.741, 0.71, 0.77, 440)}
    assert summarize_view("reward", metrics) == (
        "The better answer scores higher in 74 % [71, 77] of the held-out pairs of 440 prompts; guessing gives 50 %."
    )
    noisy = {
        "accuracy": build_interval(0.52, 0.45, 0.6, 19),
        "ceiling": build_interval(0.75, 0.7, 0.8, 19),
        "simulated_by": ["v"],
    }
    assert summarize_view("dpo", noisy) == (
        "Compared with its start, the policy raised the better answer in 52 % [45, 60] of the held-out pairs of 19 "
        "prompts (ranked by a simulated annotator, v); guessing gives 50 %. The interval holds 50 %: it was not "
        "shown to be better than guessing. Fewer than 20 prompts were measured: too few for a reliable result. "
        "The noise in the labels limits it to 75 %."
    )


def test_what_was_sampled_exported_and_proven(tmp_path: Path):
    metrics = {"answers": 512, "prompts": 128, "eos_rate": 0.96, "mean_length": 14.44, "empty_rate": 0.0}
    metrics |= {"all_empty": 0, "all_equal": 0}
    assert summarize_view("sample", metrics) == (
        "512 answers to 128 prompts in project p: 14.4 tokens long on average, 4 % of them were cut at 24 tokens."
    )
    assert "every one ended by itself" in summarize_view("sample", metrics | {"eos_rate": 1.0})
    assert summarize_view("sample", metrics | {"empty_rate": 0.5, "all_empty": 2, "all_equal": 1}).endswith(
        "50 % of them are empty. The answers to 3 prompts are not handed out: all empty, or all equal."
    )
    check = {
        "engine": "transformers",
        "name": "transformers/merged",
        "bound": ["kl", 0.01],
        "verdict": "pass",
        "weights": "bfloat16",
        "shipped": True,
    }
    check_before_cast = check | {"name": "transformers/merge-before-cast", "weights": "float32", "shipped": False}
    unchecked = {"engine": "vLLM", "bound": None, "verdict": "not checked"}
    distance = (
        "transformers loaded its files back (bfloat16), and on fixed prompts they lie 8e-07 nats a token (KL) from the "
        "trained model."
    )
    cast_summary = summarize_view("export", {"checks": [check_before_cast, check], "kl": 8e-7, "kl_before_cast": 2e-13})
    assert cast_summary.startswith(
        f"The export is the trained model: {distance} Before the weights were cast, this distance was 2e-13."
    )
    assert summarize_view("export", {"checks": [check, unchecked], "kl": 8e-7}) == (
        f"The export is the trained model: {distance} Not checked, or only in part: vLLM; the receipt says why."
    )
    summary = summarize_view("export", {"checks": [check, check | {"verdict": "accepted"}], "kl": 8e-7})
    assert summary.startswith(f"The export differs from the trained model: {distance}")
    assert summary.endswith("Bounds missed, and accepted by export.accept: transformers/merged.")
    assert "All 2 checks kept their bounds." in summarize_view("export", {"checks": [check, check], "kl": 8e-7})
    assert summarize_view("export", {"checks": [unchecked]}).startswith("No engine was available to load the export")
    (tmp_path / "artifact").mkdir()
    anchors = [{"name": "closed form", "holds": True}, {"name": "gae", "holds": True}]
    (tmp_path / "artifact/anchors.json").write_text(json.dumps(anchors))
    assert summarize_view("verify", {}, tmp_path) == "All 2 checks of PPO pass on org/tiny with method qlora."


def test_a_table_says_nothing_twice_and_leaves_nothing_blank():
    metrics = {
        "win_rate": build_interval(0.8, 0.7, 0.9, 12),
        "gold": {"ref": 0.1, "policy": 0.7, "difference": build_interval(0.6, 0.5, 0.7, 12)},
        "kl": 4.8,
        "kl_interval": build_interval(4.8, 4.1, 5.5, 12),
        "most_risen_word": {"word": "haha", "ref": 0.06, "policy": 0.61},
        "tripped": [],
        "dropped": 3,
        "judge": "vader",
        "judge_notes": [],
        "odd_thing": 7,
        "peak_rss_mb": 1336.0,
    }
    rows = [(label, value.replace("\u00a0", " "), how) for label, value, how in build_figure_table(metrics)]
    assert [(label, value) for label, value, _ in rows] == [
        ("Win rate", "80 % [70, 90] (n=12, fewer than 20)"),
        ("Gold score", "0.1 → 0.7"),
        ("Gain in gold score", "0.6 [0.5, 0.7] (n=12, fewer than 20)"),
        ("KL from the start", "4.8 [4.1, 5.5] nats an answer (n=12, fewer than 20)"),
        ("Word that rose most", "“haha”, 6 % → 61 %"),
        ("Tripwires", "none"),
        ("Peak memory", "1,336 MiB"),
        ("Odd thing", "7"),
    ]
    assert all(cell.strip() for row in rows for cell in row)
    assert [row[0] for row in rows if row[0] not in {figure.label for figure in FIGURES}] == ["Odd thing"]
    assert describe_small_samples(metrics).endswith(": Win rate (12), Gain in gold score (12), KL from the start (12).")


def test_labels_and_readings_are_whole():
    assert all(f.label and f.reading.endswith(".") and f.keys for f in FIGURES)
    assert len({f.keys for f in FIGURES}) == len(FIGURES)


def test_what_a_run_was_made_of(tmp_path: Path):
    folder = tmp_path / "ppo" / "mine"
    (tmp_path / "sft" / "a (b)#1").mkdir(parents=True)
    (tmp_path / "sft" / "a (b)#1" / "report.html").write_text("")
    view = build_run_view(
        "ppo",
        {"prompts": 1200, "dropped": 4},
        folder,
        inputs={
            "init": Input("i" * 64, "sft:latest", stage="sft", name="a (b)#1"),
            "reward": Input("r" * 64, "reward:x", stage="reward", name="x"),
            "data": Input("d" * 64, path="/data/chats.jsonl"),
        },
        settings={
            "lr": 5e-4,
            "value_lr": 1e-3,
            "schedule": "linear",
            "warmup": 0.05,
            "batch_size": 64,
            "micro_batch": 32,
            "updates": 60,
        },
        times={"started": "2026-11-07T04:05:06+00:00", "finished": "2026-11-07T04:17:06+00:00"},
        packages={"python": "3.11.7", "torch": "2.13"},
        hardware={"device": "cpu", "dtype": "float32", "cpus": 2},
        git={"commit": "c" * 40, "diff": "+"},
    )
    origins = {term: list(parts) for term, parts in list_origins(view)}
    assert origins["Command"] == [Code("python -m align stage=…")]
    assert origins["Base"] == [f"org/tiny, revision 0123456789ab, sha256 {'b' * 12}…"]
    assert origins["Started from"] == [Link("sft:a (b)#1", "../../sft/a%20%28b%29%231/report.html")]
    assert origins["Reward"] == ["reward:x"]  # no link, because its report is not in this folder
    assert origins["Data"] == [
        f"chats.jsonl, sha256 {'d' * 12}…",
        "1,200 of 1,204 prompts; dropped 4 for being longer than 512 tokens",
    ]
    assert origins["Learning rate"] == [
        "0.0005, linear schedule, warmed up over 5\u00a0% of the steps",
        "0.001 for the value",
    ]
    assert origins["Batch"] == ["64 answers an update, 32 at once"]
    assert origins["Seed"] == ["3"]
    assert origins["Started"] == ["7 November 2026, 04:05 UTC"]
    assert origins["Took"] == ["12 minutes"]
    assert origins["Computed on"] == ["cpu, float32, 2 processors"]
    assert origins["Versions"] == ["python 3.11.7, torch 2.13"]
    assert origins["Code"] == [
        f"run in a folder at git commit {'c' * 12}, with changes that were not committed (they are in manifest.json)"
    ]
    assert all(parts and all(parts) for parts in origins.values())


def test_answers_with_a_label_are_counted_and_pairs_that_best_of_n_makes_are_not_its_data():
    data = {"data": Input("d" * 64, path="/data/labels.jsonl")}
    kto_metrics = {"wanted": 3, "unwanted": 2, "dropped": 1, "held_out_answers": 4, "held_out_dropped": 0}
    assert dict(list_origins(build_run_view("kto", kto_metrics, inputs=data)))["Data"][1:] == [
        "3 wanted and 2 unwanted answers to train on; dropped 1 for being longer than 512 tokens",
        "4 answers held out",
    ]
    best_of_view = build_run_view(
        "sample", {"prompts": 24, "dropped": 0, "pairs": 20}, inputs=data, settings={"best_of": 16}
    )
    assert dict(list_origins(best_of_view))["Data"][1:] == ["24 prompts"]


def test_what_was_left_out_of_either_side_is_said():
    metrics = {
        "train_rows": 1285,
        "dropped_too_long": 8,
        "dropped_unanswered": 0,
        "dropped_in_eval": 6,
        "cut": 0,
        "held_out_rows": 40,
        "held_out_too_long": 1,
        "held_out_unanswered": 0,
        "held_out_cut": 2,
        "reasoning_lost_last": 1,
        "reasoning_lost_earlier": 45,
    }
    train_line, *other_lines = describe_row_counts(metrics, 1024)
    dropped = "dropped 8 for being longer than 1,024 tokens and 6 that data.eval_path asks too"
    assert train_line == f"1,285 of 1,293 rows to train on; {dropped}"
    assert other_lines == [
        "40 of 41 rows held out; dropped 1 for being longer than 1,024 tokens; cut 2 at 1,024 tokens",
        "the chat template left out the reasoning of the last answer in 1 row and of earlier answers in 45 rows",
    ]
    pair_metrics = {"pairs": 9, "dropped": 0, "held_out_pairs": 1, "held_out_dropped": 1, "dropped_in_eval": 2}
    pair_metrics["dropped_undecided"] = 22
    assert list(describe_row_counts(pair_metrics, None)) == [
        "9 pairs to train on; dropped 2 that data.eval_path asks too",
        "1 of 2 pairs held out; dropped 1 for their length",
        "left out 22 pairs whose answers are equal, tied or alone",
    ]
    assert list(describe_row_counts({"win_rate": build_interval(0.8, 0.7, 0.9, 12), "dropped": 0}, 99)) == [
        "12 prompts"
    ]


def test_how_rows_became_text_is_said_where_it_is_not_the_default():
    assert (
        list(describe_rendering({"template": None, "template_kwargs": {}, "system": None, "reasoning": "keep"})) == []
    )
    settings = {"template": "chatml", "template_kwargs": {"think": False}, "system": "Be <brief>. " * 99}
    template, arguments, system, reasoning = describe_rendering({**settings, "reasoning": "mask"})
    assert template == "chat template chatml, in place of the model's own"
    assert arguments == "arguments of the chat template: think=False"
    assert system.startswith("system turn where a row has none: Be <brief>. Be")
    assert len(system) < 250
    assert "data.reasoning=mask" in reasoning


def test_one_point_is_no_curve_and_the_newest_figures_are_there_at_once(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 64, "eos_rate": 0.5, "mean_length": 38.03}\n')
    view = build_run_view("sample", {}, tmp_path)
    report = Report("")
    add_curves(report, view)
    assert report.blocks == []
    add_latest_figures(report, view)
    assert "<td>Answer length (tokens)</td><td>38.03 at prompt 64</td>" in report.blocks[0]


@pytest.mark.parametrize("measured", [True, False])
def test_the_held_out_loss_is_one_curve_from_the_start_on(tmp_path: Path, measured: bool):
    rows = [{"step": step, "loss": 3.0} | ({"held_out_loss": 4.0 - step} if measured else {}) for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = Report("")
    add_curves(
        report,
        build_run_view("sft", {"loss_before": 4.0, "loss_after": 2.0, "published_step": 2, "steps": 2}, tmp_path),
    )
    alt = re.search(r'alt="(Loss over steps[^"]*)"', report.blocks[0])
    assert alt is not None
    assert alt[1].count("held out") == 1
    assert "held out: from 4 at step 0 to 2 at step 2" in alt[1]


def test_the_code_is_known_by_its_commit_where_it_has_one():
    def describe(**values: Any) -> list[str]:
        return list(describe_code(Manifest("sft", "a", 0, {}, {}, None, code="d" * 64, **values)))

    digest = f"sha256 {'d' * 12}…"
    commit = "a" * 40
    assert describe() == [digest]
    assert describe(commit=commit) == [f"align at git commit {'a' * 12}, {digest}"]
    same_commit = describe(commit=f"{commit}+", git={"commit": commit, "diff": "+"})
    assert same_commit == [f"align at git commit {'a' * 12}, with changes that were not committed, {digest}"]
    other_commit = describe(commit=commit, git={"commit": "b" * 40})
    assert other_commit[1:] == [f"run in a folder at git commit {'b' * 12}"]


def test_a_base_that_a_run_made_is_a_parent(tmp_path: Path):
    (tmp_path / "full" / "whole").mkdir(parents=True)
    (tmp_path / "full" / "whole" / "report.html").write_text("")
    base = Base("whole", str(tmp_path / "full" / "whole" / "artifact"), None, "w" * 64)
    view = build_run_view("ppo", {}, tmp_path / "ppo" / "mine")
    view = RunView(view.folder, Manifest("ppo", "mine", 0, view.config, {}, base), "")
    assert Link("full:whole", "../../full/whole/report.html") in dict(list_origins(view))["Base"]


def build_pair_rows(count: int, odds: float) -> list[dict[str, Any]]:
    return [
        {
            "id": str(i),
            "group": str(i),
            "prompt": [{"role": "user", "content": f"{i}?"}],
            "chosen": f"good {i}",
            "rejected": "<b>bad</b>",
            "margin": odds if i % 4 else -odds * i,
            "log_odds": odds if i % 4 else -odds,
            "score_chosen": odds,
            "score_rejected": 0.0,
        }
        for i in range(count)
    ]


def test_the_order_within_a_pair_is_drawn_without_looking_at_the_label():
    bins = compute_reliability_bins(build_pair_rows(400, 1.1))
    assert len(bins) == 2  # P = 0.25 and 0.75: the order does not depend on the label
    assert all(abs(b.predicted - b.observed) < 0.08 for b in bins)  # three in four are right, as predicted
    assert sum(b.count for b in bins) == 400


def test_pairs_are_shown_from_both_ends(tmp_path: Path):
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in build_pair_rows(40, 1.0)))
    html = build_finished_page(
        build_run_view("reward", {"accuracy": build_interval(0.75, 0.6, 0.9, 40)}, tmp_path)
    ).html()
    assert "Judged right, by the widest margin" in html
    assert html.index("good 36") > html.index("Judged wrong, by the widest margin")  # the widest wrong margin
    assert "good 32" in html
    assert "&lt;b&gt;bad&lt;/b&gt;" in html
    assert html.count("<img") == 2  # scores, calibration
