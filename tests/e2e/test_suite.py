"""Several systems on the tasks of a suite: their figures, the reuse of answers, and refused settings."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from processes import Forks
from rank_processes import run_on_ranks
from suite_evaluations import ROWS, SYSTEMS, RuleEvaluations, read_artifact_rows, read_results

from align.__main__ import main
from align.registry.gates import decide_verdict
from align.rollout.answer_cache import AnswerStore
from align.run import read_manifest


def count_prompts(run: Path) -> int:
    """Count the different prompts of a run."""
    return len({json.dumps(row["prompt"]) for row in read_artifact_rows(run)})


def read_texts(run: Path) -> dict[tuple[str, str, str], str]:
    return {
        (row["task"], row["id"], system): answer["text"]
        for row in read_artifact_rows(run)
        for system, answer in row["answers"].items()
    }


def test_the_figures_follow_from_the_answers(bench: RuleEvaluations):
    """Recompute the figures from the answers, independently of the code."""
    tasks = bench.tasks(*ROWS).replace("eval.tasks=[", "eval.tasks=[{name: judged, prompts: 10}, ")
    run = bench.run(SYSTEMS, tasks, "run.name=all")
    summary = read_results(run)
    rows = read_artifact_rows(run)
    judged_answers = [row["answers"] for row in rows if row["task"] == "judged"]
    scores = {
        system: [float("e" in answers[system]["text"]) for answers in judged_answers]
        for system in ("new", "old", "base")
    }
    for system, expected in scores.items():
        assert [answers[system]["score"] for answers in judged_answers] == expected
        assert summary["tasks"]["judged"]["systems"][system]["score"]["value"] == pytest.approx(
            statistics.mean(expected)
        )
    for opponent in ("old", "base"):
        differences = [new - old for new, old in zip(scores["new"], scores[opponent], strict=True)]
        comparison = summary["tasks"]["judged"]["against"][opponent]
        assert comparison["difference"]["value"] == pytest.approx(statistics.mean(differences))
        assert comparison["win_rate"]["value"] == pytest.approx(
            statistics.mean((x > 0) + (x == 0) / 2 for x in differences)
        )
    answers_by_id = {row["id"]: row["answers"]["new"] for row in rows if row["task"] == "asked"}
    assert answers_by_id["two"]["score"] == float("e" in answers_by_id["two"]["text"])
    assert answers_by_id["5"]["score"] == float(
        "," not in answers_by_id["5"]["text"] and answers_by_id["5"]["text"] != ""
    )
    clusters = [answers_by_id[id]["score"] for id in ("one", "two", "5")]
    # Three and four are of one source.
    clusters.append((answers_by_id["three"]["score"] + answers_by_id["four"]["score"]) / 2)
    score = summary["tasks"]["asked"]["systems"]["new"]["score"]
    assert (score["value"], score["n"]) == (pytest.approx(statistics.mean(clusters)), 4)
    assert [*summary["tasks"]["asked"]["categories"]] == ["vowels"]
    manifest = read_manifest(run)
    assert manifest.inputs["systems.new"].digest == summary["systems"][0]["digest"]
    assert manifest.metrics["tasks"]["judged"]["against"]["old"]["win_rate"]["n"] == 10
    page = (run / "report.html").read_text()
    assert "the report could not be made" not in (run / "log.txt").read_text()
    verdict = page[page.index('class="verdict') : page.index("Inputs and settings")]
    assert "No difference between new and old or base was shown." in verdict or "on asked." in verdict


def test_one_system_gets_the_scores_that_it_has_beside_others(bench: RuleEvaluations):
    tasks = bench.tasks(*ROWS).replace("eval.tasks=[", "eval.tasks=[{name: judged, prompts: 10}, ")
    gate = "eval.gates=[{name: enough, task: asked, is: superior, margin: 0.99}]"
    run = bench.run("stage.systems={only: ppo:p}", tasks, gate, "run.name=single", status=3)
    assert "asked: only scores 0." in bench.output
    page = (run / "report.html").read_text()
    assert "the report could not be made" not in (run / "log.txt").read_text()
    assert "only scores" in page[page.index('class="verdict') : page.index("Inputs and settings")]
    assert "not been judged" not in page
    assert " against " not in page[page.index('class="verdict') : page.index("Variety of the answers")]
    two = read_results(bench.run("stage.systems={only: ppo:p, base: base}", tasks, "run.name=pair"))
    alone = read_results(run)
    assert alone["tasks"]["asked"]["against"] == {}
    for task in ("judged", "asked"):
        assert alone["tasks"][task]["systems"]["only"] == two["tasks"][task]["systems"]["only"]
    error = bench.expect_error("stage.systems={only: ppo:p}", tasks, "stage.judge=people")
    assert "stage.systems=only: is one system, and stage.judge=people compares two on task judged" in error
    assert "are not one to" in bench.expect_error("stage.systems={}", tasks)


def test_answers_are_made_once(bench: RuleEvaluations):
    first = read_manifest(bench.run("stage.systems={a: sft:s, b: base}", "run.name=first", "seed=3")).metrics
    assert first["answers_made"] > 10
    second_run = bench.run("stage.systems={b: base, p: ppo:p, a: sft:s}", "run.name=second", "seed=3")
    assert read_manifest(second_run).metrics["answers_made"] == first["answers_made"] / 2
    rescored = bench.run(
        "stage.systems={a: sft:s, b: base}", "eval.tasks=[{name: x, check: {kind: regex, pattern: e}}]", "seed=3"
    )
    assert read_manifest(rescored).metrics["answers_made"] == 0
    assert {key[1:]: text for key, text in read_texts(rescored).items()}.items() <= {
        key[1:]: text for key, text in read_texts(second_run).items()
    }.items()


def test_greedy_answers_are_those_that_collapse_is_judged_by(bench: RuleEvaluations):
    rows = [
        {"id": str(i), "prompt": f"What is {i} + {i}?", "check": {"kind": "regex", "pattern": "e"}} for i in range(64)
    ]
    settings = ("stage.systems={new: sft:s, old: base}", bench.tasks(*rows, name="doubled"), "rollout.max_new_tokens=4")
    sampled = read_manifest(bench.run(*settings, "run.name=sampled")).metrics
    assert sampled["answers_made"] == 2 * 2 * 64
    run = bench.run(*settings, "rollout.temperature=0", "run.name=greedy")
    assert read_manifest(run).metrics["answers_made"] == 0
    shares = [
        read_results(bench.root / "eval" / name)["collapse"]["doubled"]["new"]["variety"]["greedy"]["policy"][
            "distinct"
        ]
        for name in ("sampled", "greedy")
    ]
    texts = {text for (_, _, system), text in read_texts(run).items() if system == "new"}
    assert shares == [len(texts)] * 2
    assert read_texts(bench.run(*settings, "rollout.temperature=0", "rollout=bank", "run.name=bank")) == read_texts(run)
    assert "would all be equal" in bench.expect_error(*settings, "rollout.temperature=0", "stage.answers=2")
    assert "only stage=eval with stage.systems" in bench.expect_error("artifact=sft:s", "rollout.temperature=0")


@pytest.mark.parametrize("more", ["rollout.batch_size=1", "rollout=bank"])
def test_answers_are_the_same_in_any_batch_and_beside_anybody(bench: RuleEvaluations, more: str):
    expected = read_texts(bench.run(SYSTEMS, "rollout.batch_size=32", "run.name=beside", "seed=5", "dtype=float32"))
    (bench.root / "answers.db").unlink()
    settings = ("stage.systems={new: ppo:p, base: base}", more, "resume=never", "seed=5", "dtype=float32")
    alone = bench.run(*settings, f"run.name=alone-{more.replace('=', '-')}")
    assert read_manifest(alone).metrics["answers_made"] == 2 * count_prompts(alone)
    assert all(text == expected[key] for key, text in read_texts(alone).items())


def test_a_run_that_was_cut_off_makes_nothing_twice(bench: RuleEvaluations, monkeypatch: pytest.MonkeyPatch):
    settings = ("stage.systems={new: ppo:p, base: base}", "run.name=cut", "seed=7", "rollout.batch_size=2")
    add = AnswerStore.add
    chunks = list[int]()

    def add_or_kill(store: AnswerStore, answers: Sequence[Any]) -> None:
        add(store, answers)
        chunks.append(len(answers))
        if len(chunks) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(AnswerStore, "add", add_or_kill)
    assert main(bench.words(*settings)) == 130
    assert chunks == [4, 4]
    run = bench.run(*settings)
    assert sum(chunks) == 2 * count_prompts(run)
    assert read_manifest(run).metrics["answers_made"] == sum(chunks) - 8


def test_two_ranks_make_the_same_answers(bench: RuleEvaluations, forks: Forks, tmp_path: Path):
    expected = read_texts(bench.run(SYSTEMS, "run.name=one", "seed=9"))
    (bench.root / "answers.db").unlink()
    processes = run_on_ranks(forks, tmp_path, *bench.words(SYSTEMS, "run.name=two", "seed=9"))
    assert [process.status for process in processes] == [0, 0], [process.err for process in processes]
    assert read_texts(bench.root / "eval" / "two") == expected


def test_a_file_of_answers_is_a_system(bench: RuleEvaluations):
    path = bench.file("theirs.jsonl", [{"id": "one", "answer": "e"}, {"id": "two", "answer": "xyz"}])
    systems = f"stage.systems={{theirs: {{file: {path}}}, s: sft:s}}"
    file_result = read_results(bench.run(systems, bench.tasks(*ROWS[:2]), "run.name=filed"))["tasks"]["asked"][
        "systems"
    ]["theirs"]
    assert (file_result["score"]["value"], file_result["cut"]) == (0.5, None)
    assert "lacks 1 of 3 answers, such as to item three of task asked" in bench.expect_error(
        systems, bench.tasks(*ROWS[:3])
    )
    answer_row = {"id": "one", "answer": "e"}
    for rows, problem in (
        ([answer_row, {"id": "one", "answer": "f"}], "is given twice"),
        ([{"id": "one", "text": "e"}], "row 1, answer=None: is no text"),
    ):
        bench.file("theirs.jsonl", rows)
        assert problem in bench.expect_error(systems, bench.tasks(*ROWS[:2]))
    first_task = bench.tasks(ROWS[0])
    other_task = bench.tasks({**ROWS[0], "prompt": "Another?"}, name="other")
    two_tasks = f"{first_task[:-1]}, {other_task.removeprefix('eval.tasks=[')}"
    bench.file("theirs.jsonl", [answer_row])
    assert "is an id in several tasks, whose prompts differ" in bench.expect_error(systems, two_tasks)
    named_rows = [{"id": "one", "task": task, "answer": answer} for task, answer in (("asked", "e"), ("other", "x"))]
    bench.file("theirs.jsonl", named_rows)
    task_results = read_results(bench.run(systems, two_tasks, "run.name=two-tasks"))["tasks"]
    assert [task_results[task]["systems"]["theirs"]["score"]["value"] for task in ("asked", "other")] == [1.0, 0.0]


def test_gates_decide_and_say_so_each_time(bench: RuleEvaluations):
    gates = (
        "eval.gates=[{name: clear, task: asked, is: superior, margin: 0.99}, "
        "{name: close, task: asked, against: s, is: superior}]"
    )
    systems = "stage.systems={p: ppo:p, s: sft:s}"
    settings = (systems, bench.tasks(*ROWS), gates, "run.name=gated")
    run = bench.run(*settings, status=3)
    assert "gate close: undecided" in bench.output
    digest = read_manifest(run).inputs["systems.p"].digest
    for name in ("clear", "close"):
        verdict = json.loads((run / "artifact" / "verdicts" / f"{name}.json").read_text())
        assert verdict["inputs"]["artifact"] == digest
        assert decide_verdict(bench.root, name, digest)[0] is False
    assert (run / "artifact" / "junit.xml").read_text().count("<failure") == 2
    bench.run(*settings, status=3)  # a finished run reports the same
    easy = [{"id": i, "prompt": f"Say {i}.", "check": {"kind": "regex", "pattern": "^"}} for i in range(8)]
    easy_gates = (
        "eval.gates=[{name: easy, task: easy, is: superior, margin: 0.5}, "
        "{name: hard, task: easy, is: superior, margin: 0.99}]"
    )
    bench.run(systems, bench.tasks(*easy, name="easy"), easy_gates, "run.name=every", status=3)
    one_is_enough = (easy_gates, "eval.gate_family=any")
    run = bench.run(systems, bench.tasks(*easy, name="easy"), *one_is_enough, "run.name=passed")
    assert read_manifest(run).metrics["gates"] == {"easy": "pass", "hard": "undecided"}
    levels = [
        json.loads((run / "artifact/verdicts" / f"{name}.json").read_text())["level"] for name in ("easy", "hard")
    ]
    assert levels == [0.975, 0.95]
    junit = (run / "artifact" / "junit.xml").read_text()
    assert (junit.count("<failure"), junit.count("<skipped")) == (0, 1)
    assert decide_verdict(bench.root, "easy", digest)[0] is True
    stderr = bench.expect_error(systems, "eval.gates=[{name: x, task: judged, against: s, is: superior}]")
    assert "is decided by rules (regex), and no card (stage.card) says how often it is right" in stderr


def test_prompts_that_do_not_fit_are_counted_and_asked_of_nobody(bench: RuleEvaluations):
    long_row = {"id": "long", "prompt": "word " * 4000, "check": {"kind": "regex", "pattern": "e"}}
    run = bench.run("stage.systems={a: sft:s, b: base}", bench.tasks(*ROWS, long_row), "run.name=long")
    task = read_results(run)["tasks"]["asked"]
    assert (task["items"], task["dropped"]) == (5, 1)
    assert "data.max_length" in bench.expect_error("stage.systems={a: sft:s, b: base}", bench.tasks(long_row))


def test_a_judge_that_is_not_asked_refuses_nobody(bench: RuleEvaluations):
    """A policy optimised against the judge is refused only if a task uses that judge."""
    settings = ("stage.systems={p: ppo:p, b: base}", "reward=learned", "reward.ref=reward:a")
    run = bench.run(*settings, bench.tasks(*ROWS), "run.name=unasked")
    assert not [note for note in read_results(run)["notes"] if "proxy" in note]
    assert "was optimised against it" in bench.expect_error(*settings, bench.tasks(*ROWS)[:-1] + ", {name: judged}]")


def test_what_was_evaluated_so_can_be_exported(bench: RuleEvaluations):
    bench.run(SYSTEMS, bench.tasks(*ROWS), "run.name=before-export")
    assert main(["stage=export", "artifact=ppo:p", f"run.root={bench.root}", "run.name=after-eval"]) == 0


def test_prompts_that_training_saw_are_left_out_before_the_first_are_taken(bench: RuleEvaluations):
    prompts = [turn for turn in (json.loads(line)["messages"][0]["content"] for line in bench.chats()) if turn]
    rows = [{"id": i, "prompt": text, "check": {"kind": "regex", "pattern": "^"}} for i, text in enumerate(prompts)]
    new = [{"id": f"new {i}", "prompt": f"Number {i}?", "check": {"kind": "regex", "pattern": "^"}} for i in range(4)]
    run = bench.run("stage.systems={s: sft:s, b: base}", bench.tasks(*rows, *new, prompts=4), "run.name=seen")
    assert read_manifest(run).metrics["dropped_seen"] > 0
    assert len(read_artifact_rows(run)) == 4


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "a", "chek": {"kind": "regex", "pattern": "e"}}, "its name is close to check"),
        ({"prompt": "a", "check": {}}, "check.kind"),
        ({"prompt": "a", "instruction_id_list": "punctuation:no_comma", "kwargs": [{}]}, "is no list of names"),
        ({"prompt": "a", "instruction_id_list": ["punctuation:no_comma"]}, "as many mappings"),
        ({"text": "plain"}, "asks nothing"),
        ({"prompt": "a", "check": {"kind": "regex", "pattern": "("}}, "is no regular expression"),
        ({"prompt": "a", "category": ["x"]}, "is no text"),
        ({"prompt": "a", "check": {"kind": "code", "tests": ["assert True"]}}, "stage.allow_code=true"),
        ({"turns": ["What?", " "]}, "is no list of questions"),
        ({"turns": ["What?"], "prompt": "Why?"}, "is given together with prompt"),
        ({"turns": ["What?", "Why?"], "check": [{"kind": "regex", "pattern": "e"}]}, "has 1 checks for 2 turns"),
        ({"turns": ["What?", "Why?"], "check": [None, {"kind": "exact"}]}, "check[1]"),
    ],
)
def test_rows_that_are_refused(bench: RuleEvaluations, row: Mapping[str, Any], problem: str):
    assert problem in bench.expect_error("stage.systems={a: sft:s, b: base}", bench.tasks(row))


def test_several_answers_to_a_prompt_are_one_piece_of_evidence(bench: RuleEvaluations):
    tasks = bench.tasks(*ROWS[:2])
    run = bench.run(SYSTEMS, tasks, "run.name=often", "stage.answers=3")
    rows = read_artifact_rows(run)
    assert [row["id"] for row in rows] == ["one", "one~2", "one~3", "two", "two~2", "two~3"]
    assert all(len({row["answers"][name]["text"] for row in rows[:3]}) == 3 for name in ("new", "old"))
    task = read_results(run)["tasks"]["asked"]
    assert (task["items"], task["against"]["old"]["difference"]["n"]) == (6, 2)
    once = bench.run(SYSTEMS, tasks, "run.name=once")
    # A single answer equals the first of several, so it is reused.
    assert read_manifest(once).metrics["answers_made"] == 0
