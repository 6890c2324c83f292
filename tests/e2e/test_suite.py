"""Several systems on the tasks of a suite: what comes of it, what is made once, and what is refused."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from benches import ROWS, SYSTEMS, Bench, lines, results
from processes import Forks
from ranked import ranked

from align.__main__ import main
from align.registry.gates import decide_verdict
from align.rollout.answer_cache import AnswerStore
from align.run import read_manifest


def prompts_of(run: Path) -> int:
    """How many different ones it asked."""
    return len({json.dumps(row["prompt"]) for row in lines(run)})


def said(run: Path) -> dict[tuple[str, str, str], str]:
    return {(row["task"], row["id"], who): one["text"] for row in lines(run) for who, one in row["answers"].items()}


def test_the_figures_follow_from_the_answers(bench: Bench):
    """Recomputed from the evidence by means that share nothing with the code."""
    tasks = bench.tasks(*ROWS).replace("eval.tasks=[", "eval.tasks=[{name: judged, prompts: 10}, ")
    run = bench.run(SYSTEMS, tasks, "run.name=all")
    found, rows = results(run), lines(run)
    judged = [row["answers"] for row in rows if row["task"] == "judged"]
    scores = {who: [float("e" in answers[who]["text"]) for answers in judged] for who in ("new", "old", "base")}
    for who, expected in scores.items():
        assert [answers[who]["score"] for answers in judged] == expected
        assert found["tasks"]["judged"]["systems"][who]["score"]["value"] == pytest.approx(statistics.mean(expected))
    for other in ("old", "base"):
        d = [new - old for new, old in zip(scores["new"], scores[other], strict=True)]
        told = found["tasks"]["judged"]["against"][other]
        assert told["difference"]["value"] == pytest.approx(statistics.mean(d))
        assert told["win_rate"]["value"] == pytest.approx(statistics.mean((x > 0) + (x == 0) / 2 for x in d))
    checked = {row["id"]: row["answers"]["new"] for row in rows if row["task"] == "asked"}
    assert checked["two"]["score"] == float("e" in checked["two"]["text"])
    assert checked["5"]["score"] == float("," not in checked["5"]["text"] and checked["5"]["text"] != "")
    clusters = [checked[id]["score"] for id in ("one", "two", "5")]
    clusters.append((checked["three"]["score"] + checked["four"]["score"]) / 2)  # of one source
    score = found["tasks"]["asked"]["systems"]["new"]["score"]
    assert (score["value"], score["n"]) == (pytest.approx(statistics.mean(clusters)), 4)
    assert [*found["tasks"]["asked"]["categories"]] == ["vowels"]
    manifest = read_manifest(run)
    assert manifest.inputs["systems.new"].digest == found["systems"][0]["digest"]
    assert manifest.metrics["tasks"]["judged"]["against"]["old"]["win_rate"]["n"] == 10
    page = (run / "report.html").read_text()
    assert "the report could not be made" not in (run / "log.txt").read_text()
    verdict = page[page.index('class="verdict') : page.index("What it was made of")]
    assert "No difference between new and old or base was shown." in verdict or "on asked." in verdict


def test_answers_are_made_once(bench: Bench):
    first = read_manifest(bench.run("stage.systems={a: sft:s, b: base}", "run.name=first", "seed=3")).metrics
    assert first["answers_made"] > 10
    again = bench.run("stage.systems={b: base, p: ppo:p, a: sft:s}", "run.name=second", "seed=3")
    assert read_manifest(again).metrics["answers_made"] == first["answers_made"] / 2
    rescored = bench.run(
        "stage.systems={a: sft:s, b: base}", "eval.tasks=[{name: x, check: {kind: regex, pattern: e}}]", "seed=3"
    )
    assert read_manifest(rescored).metrics["answers_made"] == 0
    assert {key[1:]: text for key, text in said(rescored).items()}.items() <= {
        key[1:]: text for key, text in said(again).items()
    }.items()


@pytest.mark.parametrize("more", ["rollout.batch_size=1", "rollout=bank"])
def test_answers_are_the_same_in_any_batch_and_beside_anybody(bench: Bench, more: str):
    beside = said(bench.run(SYSTEMS, "rollout.batch_size=32", "run.name=beside", "seed=5", "dtype=float32"))
    (bench.root / "answers.db").unlink()
    words = ("stage.systems={new: ppo:p, base: base}", more, "resume=never", "seed=5", "dtype=float32")
    alone = bench.run(*words, f"run.name=alone-{more.replace('=', '-')}")
    assert read_manifest(alone).metrics["answers_made"] == 2 * prompts_of(alone)
    assert all(text == beside[key] for key, text in said(alone).items())


def test_a_run_that_was_cut_off_makes_nothing_twice(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    words = ("stage.systems={new: ppo:p, base: base}", "run.name=cut", "seed=7", "rollout.batch_size=2")
    add, chunks = AnswerStore.add, list[int]()

    def cut(store: AnswerStore, answers: Sequence[Any]) -> None:
        add(store, answers)
        chunks.append(len(answers))
        if len(chunks) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(AnswerStore, "add", cut)
    assert main(bench.words(*words)) == 130
    assert chunks == [4, 4]
    run = bench.run(*words)
    assert sum(chunks) == 2 * prompts_of(run)
    assert read_manifest(run).metrics["answers_made"] == sum(chunks) - 8


def test_two_ranks_make_the_same_answers(bench: Bench, forks: Forks, tmp_path: Path):
    one = said(bench.run(SYSTEMS, "run.name=one", "seed=9"))
    (bench.root / "answers.db").unlink()
    ended = ranked(forks, tmp_path, *bench.words(SYSTEMS, "run.name=two", "seed=9"))
    assert [each.status for each in ended] == [0, 0], [each.err for each in ended]
    assert said(bench.root / "eval" / "two") == one


def test_a_file_of_answers_is_a_system(bench: Bench):
    path = bench.file("theirs.jsonl", [{"id": "one", "answer": "e"}, {"id": "two", "answer": "xyz"}])
    systems = f"stage.systems={{theirs: {{file: {path}}}, s: sft:s}}"
    theirs = results(bench.run(systems, bench.tasks(*ROWS[:2]), "run.name=filed"))["tasks"]["asked"]["systems"][
        "theirs"
    ]
    assert (theirs["score"]["value"], theirs["cut"]) == (0.5, None)
    assert "lacks 1 of 3 answers, such as to item three of task asked" in bench.refused(systems, bench.tasks(*ROWS[:3]))
    one = {"id": "one", "answer": "e"}
    for rows, problem in (
        ([one, {"id": "one", "answer": "f"}], "stands there twice"),
        ([{"id": "one", "text": "e"}], "row 1, answer=None: is no text"),
    ):
        bench.file("theirs.jsonl", rows)
        assert problem in bench.refused(systems, bench.tasks(*ROWS[:2]))
    first, other = bench.tasks(ROWS[0]), bench.tasks({**ROWS[0], "prompt": "Another?"}, name="other")
    both = f"{first[:-1]}, {other.removeprefix('eval.tasks=[')}"
    bench.file("theirs.jsonl", [one])
    assert "is an id in several tasks, whose prompts differ" in bench.refused(systems, both)
    named = [{"id": "one", "task": task, "answer": answer} for task, answer in (("asked", "e"), ("other", "x"))]
    bench.file("theirs.jsonl", named)
    found = results(bench.run(systems, both, "run.name=two-tasks"))["tasks"]
    assert [found[task]["systems"]["theirs"]["score"]["value"] for task in ("asked", "other")] == [1.0, 0.0]


def test_gates_decide_and_say_so_each_time(bench: Bench):
    gates = (
        "eval.gates=[{name: clear, task: asked, is: superior, margin: 0.99}, "
        "{name: close, task: asked, against: s, is: superior}]"
    )
    both = "stage.systems={p: ppo:p, s: sft:s}"
    words = (both, bench.tasks(*ROWS), gates, "run.name=gated")
    run = bench.run(*words, status=3)
    assert "gate close: undecided" in bench.said
    digest = read_manifest(run).inputs["systems.p"].digest
    for name in ("clear", "close"):
        verdict = json.loads((run / "artifact" / "verdicts" / f"{name}.json").read_text())
        assert verdict["inputs"]["artifact"] == digest
        assert decide_verdict(bench.root, name, digest)[0] is False
    assert (run / "artifact" / "junit.xml").read_text().count("<failure") == 2
    bench.run(*words, status=3)  # a finished run says the same
    easy = [{"id": i, "prompt": f"Say {i}.", "check": {"kind": "regex", "pattern": "^"}} for i in range(8)]
    passes = "eval.gates=[{name: easy, task: easy, is: superior, margin: 0.5}]"
    run = bench.run(both, bench.tasks(*easy, name="easy"), passes, "run.name=passed")
    assert read_manifest(run).metrics["gates"] == {"easy": "pass"}
    assert decide_verdict(bench.root, "easy", digest)[0] is True
    judged = bench.refused(both, "eval.gates=[{name: x, task: judged, against: s, is: superior}]")
    assert "is decided by rules (regex), and nothing says how often that is right" in judged


def test_prompts_that_do_not_fit_are_counted_and_asked_of_nobody(bench: Bench):
    long = {"id": "long", "prompt": "word " * 4000, "check": {"kind": "regex", "pattern": "e"}}
    run = bench.run("stage.systems={a: sft:s, b: base}", bench.tasks(*ROWS, long), "run.name=long")
    task = results(run)["tasks"]["asked"]
    assert (task["items"], task["dropped"]) == (5, 1)
    assert "data.max_length" in bench.refused("stage.systems={a: sft:s, b: base}", bench.tasks(long))


def test_a_judge_that_is_not_asked_refuses_nobody(bench: Bench):
    """A policy that was optimised against the judge, on checks alone; beside them, a prompt of that judge."""
    more = ("stage.systems={p: ppo:p, b: base}", "reward=learned", "reward.ref=reward:a")
    run = bench.run(*more, bench.tasks(*ROWS), "run.name=unasked")
    assert not [note for note in results(run)["notes"] if "proxy" in note]
    assert "was optimised against it" in bench.refused(*more, bench.tasks(*ROWS)[:-1] + ", {name: judged}]")


def test_what_was_evaluated_so_can_be_exported(bench: Bench):
    bench.run(SYSTEMS, bench.tasks(*ROWS), "run.name=before-export")
    assert main(["stage=export", "artifact=ppo:p", f"run.root={bench.root}", "run.name=after-eval"]) == 0


def test_prompts_that_training_saw_are_left_out_before_the_first_are_taken(bench: Bench):
    asked = [turn for turn in (json.loads(line)["messages"][0]["content"] for line in bench.chats()) if turn]
    rows = [{"id": i, "prompt": text, "check": {"kind": "regex", "pattern": "^"}} for i, text in enumerate(asked)]
    new = [{"id": f"new {i}", "prompt": f"Number {i}?", "check": {"kind": "regex", "pattern": "^"}} for i in range(4)]
    run = bench.run("stage.systems={s: sft:s, b: base}", bench.tasks(*rows, *new, prompts=4), "run.name=seen")
    assert read_manifest(run).metrics["dropped_seen"] > 0
    assert len(lines(run)) == 4


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "a", "chek": {"kind": "regex", "pattern": "e"}}, "nearly called check"),
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
def test_rows_that_are_refused(bench: Bench, row: Mapping[str, Any], problem: str):
    assert problem in bench.refused("stage.systems={a: sft:s, b: base}", bench.tasks(row))


def test_several_answers_to_a_prompt_are_one_piece_of_evidence(bench: Bench):
    tasks = bench.tasks(*ROWS[:2])
    run = bench.run(SYSTEMS, tasks, "run.name=often", "stage.answers=3")
    rows = lines(run)
    assert [row["id"] for row in rows] == ["one", "one~2", "one~3", "two", "two~2", "two~3"]
    assert all(len({row["answers"][name]["text"] for row in rows[:3]}) == 3 for name in ("new", "old"))
    found = results(run)["tasks"]["asked"]
    assert (found["items"], found["against"]["old"]["difference"]["n"]) == (6, 2)
    once = bench.run(SYSTEMS, tasks, "run.name=once")
    assert read_manifest(once).metrics["answers_made"] == 0  # the first answer is the one that is asked alone
