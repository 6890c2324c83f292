"""Several systems on the tasks of a suite: what comes of it, what is made once, and what is refused."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from benches import ROWS, SYSTEMS, Bench, lines, results
from processes import Forks
from ranked import ranked

from align.__main__ import main
from align.registry.gates import verdict_on
from align.rollout.answer_cache import AnswerStore
from align.run import read_manifest


def prompts_of(run: Path) -> int:
    """How many different ones it asked."""
    return len({json.dumps(row["prompt"]) for row in lines(run)})


def said(run: Path) -> dict[tuple[str, str, str], str]:
    return {(row["task"], row["id"], who): one["text"] for row in lines(run) for who, one in row["answers"].items()}


def test_the_figures_follow_from_the_answers(bench: Bench):
    """Recomputed from the evidence by means that share nothing with the code."""
    asked = bench.tasks(*ROWS)
    tasks = asked.replace("eval.tasks=[", "eval.tasks=[{name: judged, prompts: 10}, ")
    run = bench.run(SYSTEMS, tasks, "run.name=all")
    found, rows = results(run), lines(run)
    assert [system["name"] for system in found["systems"]] == ["new", "old", "base"]
    assert {row["task"] for row in rows} == {"judged", "asked"}

    judged = [row["answers"] for row in rows if row["task"] == "judged"]
    for who in ("new", "old", "base"):
        scores = [answers[who]["score"] for answers in judged]
        assert scores == [float("e" in answers[who]["text"]) for answers in judged]
        assert found["tasks"]["judged"]["systems"][who]["score"]["value"] == pytest.approx(statistics.mean(scores))
    for other in ("old", "base"):
        d = [answers["new"]["score"] - answers[other]["score"] for answers in judged]
        told = found["tasks"]["judged"]["against"][other]
        assert told["difference"]["value"] == pytest.approx(statistics.mean(d))
        assert told["win_rate"]["value"] == pytest.approx(statistics.mean((x > 0) + (x == 0) / 2 for x in d))
        assert (told["better"], told["worse"]) == (sum(x > 0 for x in d), sum(x < 0 for x in d))

    checked = {row["id"]: row["answers"]["new"] for row in rows if row["task"] == "asked"}
    assert checked["two"]["score"] == float("e" in checked["two"]["text"])
    assert checked["5"]["score"] == float("," not in checked["5"]["text"] and checked["5"]["text"] != "")
    task = found["tasks"]["asked"]
    clusters = [
        *(checked[id]["score"] for id in ("one", "two", "5")),
        (checked["three"]["score"] + checked["four"]["score"]) / 2,
    ]
    assert task["systems"]["new"]["score"]["value"] == pytest.approx(statistics.mean(clusters))
    assert task["systems"]["new"]["score"]["n"] == 4
    assert task["systems"]["new"]["prompt_strict"] == pytest.approx(
        statistics.mean(one["score"] for one in checked.values())
    )
    assert [*task["categories"]] == ["vowels"]
    assert all(0 < told["p_holm"] <= 1 for t in found["tasks"].values() for told in t["against"].values())
    manifest = read_manifest(run)
    assert manifest.inputs["systems.new"].digest == found["systems"][0]["digest"]
    assert manifest.metrics["tasks"]["judged"]["against"]["old"]["win_rate"]["n"] == 10


def test_items_of_one_prompt_count_once(bench: Bench):
    same = [{**ROWS[0], "id": id} for id in "abc"]
    run = bench.run("stage.systems={a: sft:s, b: base}", bench.tasks(*same, ROWS[1]), "run.name=same")
    task = results(run)["tasks"]["asked"]
    assert (task["items"], task["against"]["b"]["difference"]["n"]) == (4, 2)
    assert read_manifest(run).metrics["answers_made"] <= 4


def test_the_page_says_who_is_better_first(bench: Bench):
    run = bench.run(SYSTEMS, bench.tasks(*ROWS), "run.name=page")
    page = (run / "report.html").read_text()
    assert "the report could not be made" not in (run / "log.txt").read_text()
    verdict = page[page.index('class="verdict') : page.index("What it was made of")]
    assert "No difference between new and old or base was shown." in verdict or "on asked." in verdict
    assert verdict.index("new against old and base") < verdict.index("asked: the first against others")
    assert page.index("What it was made of") < page.index("Task asked") < page.index("asked: systems")
    assert "{&#39;" not in page, "a mapping as Python writes it"
    lost = [one["id"] for one in results(run)["tasks"]["asked"]["regressions"]["old"]]
    assert ("Where new lost most against old" in page) == bool(lost)


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


@pytest.mark.parametrize("more", [("rollout.batch_size=1",), ("rollout.batch_size=8",), ("rollout=bank",)])
def test_answers_are_the_same_in_any_batch_and_beside_anybody(bench: Bench, more: tuple[str, ...], tmp_path: Path):
    beside = said(bench.run(SYSTEMS, "rollout.batch_size=32", "run.name=beside", "seed=5", "dtype=float32"))
    (bench.ready.root / "answers.db").unlink()
    alone = bench.run(
        "stage.systems={new: ppo:p, base: base}", *more, "resume=never", "seed=5", "dtype=float32",
        f"run.name=alone-{more[0].replace('=', '-')}",
    )  # fmt: skip
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
    (bench.ready.root / "answers.db").unlink()
    ended = ranked(forks, tmp_path, *bench.words(SYSTEMS, "run.name=two", "seed=9"))
    assert [each.status for each in ended] == [0, 0], [each.err for each in ended]
    assert said(bench.ready.root / "eval" / "two") == one


def test_a_file_of_answers_is_a_system(bench: Bench):
    path, rows = bench.folder / "theirs.jsonl", [{"id": "one", "answer": "e"}, {"id": "two", "answer": "xyz"}]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    systems = f"stage.systems={{theirs: {{file: {path}}}, s: sft:s}}"
    found = results(bench.run(systems, bench.tasks(*ROWS[:2]), "run.name=filed"))
    assert found["tasks"]["asked"]["systems"]["theirs"]["score"]["value"] == 0.5
    assert found["tasks"]["asked"]["systems"]["theirs"]["cut"] is None
    assert "lacks 1 of 3 answers, such as to item three of task asked" in bench.refused(systems, bench.tasks(*ROWS[:3]))
    path.write_text('{"id": "one", "answer": "e"}\n{"id": "one", "answer": "f"}\n')
    assert "stands there twice" in bench.refused(systems, bench.tasks(*ROWS[:2]))
    path.write_text('{"id": "one", "text": "e"}\n')
    assert "row 1, answer=None: is no text" in bench.refused(systems, bench.tasks(*ROWS[:2]))
    path.write_text("id,answer\none,e\ntwo,\n")
    found = results(bench.run(systems, bench.tasks(*ROWS[:2]), "run.name=empty-cell"))
    assert found["tasks"]["asked"]["systems"]["theirs"]["empty"] == 0.5


def test_one_answer_is_not_taken_for_two_prompts(bench: Bench):
    path = bench.folder / "theirs.jsonl"
    path.write_text('{"id": "one", "answer": "e"}\n')
    first, other = bench.tasks(ROWS[0]), bench.tasks({**ROWS[0], "prompt": "Another?"}, name="other")
    both = f"{first[:-1]}, {other.removeprefix('eval.tasks=[')}"
    systems = f"stage.systems={{theirs: {{file: {path}}}, s: sft:s}}"
    assert "is an id in several tasks, whose prompts differ" in bench.refused(systems, both)
    path.write_text(
        "".join(f'{{"id": "one", "task": "{task}", "answer": "{a}"}}\n' for task, a in (("asked", "e"), ("other", "x")))
    )
    found = results(bench.run(systems, both, "run.name=two-tasks"))["tasks"]
    assert [found[task]["systems"]["theirs"]["score"]["value"] for task in ("asked", "other")] == [1.0, 0.0]


def test_gates_decide_and_say_so_each_time(bench: Bench, forks: Forks, tmp_path: Path):
    gates = (
        "eval.gates=[{name: clear, task: asked, is: superior, margin: 0.99}, "
        "{name: close, task: asked, against: s, is: superior}]"
    )
    words = ("stage.systems={p: ppo:p, s: sft:s}", bench.tasks(*ROWS), gates)
    assert main(bench.words(*words, "run.name=gated")) == 3
    printed = bench.capsys.readouterr().out
    assert "gate close: undecided" in printed
    run = bench.ready.root / "eval" / "gated"
    digest = read_manifest(run).inputs["systems.p"].digest
    for name in ("clear", "close"):
        verdict = json.loads((run / "artifact" / "verdicts" / f"{name}.json").read_text())
        assert verdict["inputs"]["artifact"] == digest
        assert verdict_on(bench.ready.root, name, digest)[0] is False
    assert (run / "artifact" / "junit.xml").read_text().count("<failure") == 2
    assert main(bench.words(*words, "run.name=gated")) == 3, "a finished run says the same"
    bench.capsys.readouterr()
    ended = ranked(forks, tmp_path, *bench.words(*words, "run.name=gated-on-two"))
    assert [each.status for each in ended] == [3, 3], [each.err for each in ended]
    easy = [{"id": i, "prompt": f"Say {i}.", "check": {"kind": "regex", "pattern": "^"}} for i in range(8)]
    passes = "eval.gates=[{name: easy, task: easy, is: superior, margin: 0.5}]"
    run = bench.run("stage.systems={p: ppo:p, s: sft:s}", bench.tasks(*easy, name="easy"), passes, "run.name=passed")
    assert read_manifest(run).metrics["gates"] == {"easy": "pass"}
    assert verdict_on(bench.ready.root, "easy", digest)[0] is True
    judged = bench.refused("stage.systems={p: ppo:p, s: sft:s}", "eval.gates=[{name: x, task: judged, is: superior}]")
    assert "asks for a mean score of a judge" in judged
    against = "eval.gates=[{name: x, task: judged, against: s, is: superior}]"
    judged = bench.refused("stage.systems={p: ppo:p, s: sft:s}", against)
    assert "is decided by rules (regex), and nothing says how often that is right" in judged


def test_prompts_that_do_not_fit_are_counted_and_asked_of_nobody(bench: Bench):
    long = {"id": "long", "prompt": "word " * 4000, "check": {"kind": "regex", "pattern": "e"}}
    run = bench.run("stage.systems={a: sft:s, b: base}", bench.tasks(*ROWS, long), "run.name=long")
    task = results(run)["tasks"]["asked"]
    assert (task["items"], task["dropped"]) == (5, 1)
    assert "data.max_length" in bench.refused("stage.systems={a: sft:s, b: base}", bench.tasks(long))


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("stage.systems={a: sft:s}",), "are not two"),
        (("stage.systems={}",), "are not two"),
        (("stage.systems=sft:s",), "is no mapping"),
        (("stage.systems={a: sft:s, b: sft:s}",), "is the same as a"),
        (("stage.systems={a: base, b: sft:s, c: base}",), "is the same as a"),
        (("stage.systems={a: sft:s, b: nobody:x}",), "stage.systems.b"),
        (("stage.systems={a: sft:s, b: sft:nobody}",), "stage.systems.b"),
        (("stage.systems={a: sft:s, b: reward:a}",), "is a reward model"),
        (("stage.systems={a: sft:s, _b: base}",), "cannot be a name"),
        (("stage.systems={a: sft:s, b: {file: nothing.jsonl}}",), "stage.systems.b.file"),
        (("stage.systems={a: sft:s, b: {folder: x}}",), "names no system"),
        (("stage.systems={a: sft:s, b: base}", "eval.tasks=[]"), "is no list of tasks"),
        (("stage.systems={a: sft:s, b: base}", "eval.tasks=[{path: x.jsonl}]"), "eval.tasks[0].name"),
        (("stage.systems={a: sft:s, b: base}", "eval.tasks=[{name: x, prompt: 3}]"), "is not a key here"),
        (("stage.systems={a: sft:s, b: base}", "eval.tasks=[{name: x, prompts: 0}]"), "eval.tasks[0].prompts"),
        (("stage.systems={a: sft:s, b: base}", "eval.tasks=[{name: x},{name: x}]"), "stands there twice"),
        (("stage.systems={a: sft:s, b: base}", "eval.tasks=[{name: x, check: {kind: magic}}]"), "eval.tasks[0].check"),
        (("stage.systems={a: sft:s, b: base}", "eval.tasks=[{name: x, path: nothing.jsonl}]"), "eval.tasks, x"),
        (("stage.systems={a: ppo:p, b: base}", "reward=learned", "reward.ref=reward:a"), "was optimised against it"),
    ],
)  # fmt: skip
def test_what_is_refused(bench: Bench, words: tuple[str, ...], problem: str):
    assert problem in bench.refused(*words)


def test_settings_that_would_be_passed_over_are_refused(bench: Bench):
    for words, problem in (
        (("eval.gates=[{name: g, task: t, is: superior}]",), "eval.gates"),
        (("eval.tasks=[{name: t, path: nothing.jsonl}]",), "eval.tasks"),
        (("stage.systems={a: sft:s, b: base}", "artifact=sft:s"), "artifact=sft:s"),
        (("stage.systems={a: sft:s, b: base}", "init=base"), "init=base"),
        (("stage.answers=2",), "stage.answers=2"),
        (("stage.systems={a: sft:s, b: base}", "stage.seen=report"), "stage.seen=report"),
    ):
        assert f"align: {problem}" in bench.refused(*words)


def test_a_judge_that_is_not_asked_refuses_nobody(bench: Bench):
    """A policy that was optimised against the judge, on checks alone; beside them, a prompt of that judge."""
    more = ("stage.systems={p: ppo:p, b: base}", "reward=learned", "reward.ref=reward:a")
    run = bench.run(*more, bench.tasks(*ROWS), "run.name=unasked")
    assert not [note for note in results(run)["notes"] if "proxy" in note]
    assert "was optimised against it" in bench.refused(*more, bench.tasks(*ROWS)[:-1] + ", {name: judged}]")


def test_what_was_evaluated_so_can_be_exported(bench: Bench):
    bench.run(SYSTEMS, bench.tasks(*ROWS), "run.name=before-export")
    assert main(["stage=export", "artifact=ppo:p", f"run.root={bench.ready.root}", "run.name=after-eval"]) == 0


def test_prompts_that_training_saw_are_left_out_before_the_first_are_taken(bench: Bench):
    asked = [turn for turn in (json.loads(line)["messages"][0]["content"] for line in bench.chats()) if turn]
    rows = [{"id": i, "prompt": text, "check": {"kind": "regex", "pattern": "^"}} for i, text in enumerate(asked)]
    new = [{"id": f"new {i}", "prompt": f"Number {i}?", "check": {"kind": "regex", "pattern": "^"}} for i in range(4)]
    run = bench.run("stage.systems={s: sft:s, b: base}", bench.tasks(*rows, *new, prompts=4), "run.name=seen")
    assert read_manifest(run).metrics["dropped_seen"] > 0
    assert len(lines(run)) == 4


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ((), "holds no row"),
        (({"prompt": "a", "checks": [None, {"kind": "regex", "pattern": "e"}]},), "nearly called check"),
        (({"prompt": "a", "chek": {"kind": "regex", "pattern": "e"}},), "nearly called check"),
        (({"prompt": "a", "check": {}},), "check.kind"),
        (({"prompt": "a", "check": False},), "is no mapping"),
        (({"prompt": "a", "instruction_id_list": "punctuation:no_comma", "kwargs": [{}]},), "is no list of names"),
        (({"prompt": "a", "instruction_id_list": ["punctuation:no_comma"]},), "as many mappings"),
        (({"prompt": "a", "instruction_id_list": ["punctuation:no_comma"], "kwargs": ["x"]},), "as many mappings"),
        (({"text": "plain"},), "asks nothing"),
        (({"id": 1, "prompt": "a"}, {"id": 1, "prompt": "b"}), "stands there twice"),
        (({"prompt": "a", "check": {"kind": "regex", "pattern": "("}},), "is no regular expression"),
        (({"prompt": "a", "check": {"kind": "regex", "pattern": "e"}}, {"prompt": "b"}), "has no check"),
        (({"prompt": "a", "category": ["x"]},), "is no text"),
        (({"prompt": "a", "check": {"kind": "code", "tests": ["assert True"]}},), "stage.allow_code=true"),
    ],
)
def test_rows_that_are_refused(bench: Bench, rows: tuple[Mapping[str, Any], ...], problem: str):
    assert problem in bench.refused("stage.systems={a: sft:s, b: base}", bench.tasks(*rows))


def test_a_check_that_raises_scores_nothing_and_is_shown(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    from align.reward.checkers import pattern

    def raises(answer: str) -> Any:
        raise ZeroDivisionError(answer)

    def build(spec: Any, field: str) -> Any:
        made = real(spec, field)
        return type(made)(made.kind, made.asks, raises)

    real = pattern.build
    monkeypatch.setattr(pattern, "build", build)
    run = bench.run("stage.systems={a: sft:s, b: base}", bench.tasks(ROWS[0]), "run.name=raises")
    assert results(run)["tasks"]["asked"]["systems"]["a"]["errors"] == 1
    assert "ZeroDivisionError" in lines(run)[0]["answers"]["a"]["error"]
    assert not math.isnan(results(run)["tasks"]["asked"]["systems"]["a"]["score"]["value"])


def test_several_answers_to_a_prompt_are_one_piece_of_evidence(bench: Bench):
    tasks = bench.tasks(*ROWS[:2])
    run = bench.run(SYSTEMS, tasks, "run.name=often", "stage.answers=3")
    rows = [json.loads(line) for line in (run / "artifact" / "answers.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["one", "one~2", "one~3", "two", "two~2", "two~3"]
    assert [row["cluster"] for row in rows] == ["one"] * 3 + ["two"] * 3
    assert all(len({row["answers"][name]["text"] for row in rows[:3]}) == 3 for name in ("new", "old"))
    found = json.loads((run / "artifact" / "results.json").read_text())["tasks"]["asked"]
    assert (found["items"], found["against"]["old"]["difference"]["n"]) == (6, 2)
    once = bench.run(SYSTEMS, tasks, "run.name=once")
    assert read_manifest(once).metrics["answers_made"] == 0  # the first answer is the one that is asked alone
    asked = bench.tasks(*ROWS[:1], {**ROWS[1], "id": "one~2"}, name="named")
    assert "is what answer 2 to one is called" in bench.refused(SYSTEMS, asked, "stage.answers=2")
