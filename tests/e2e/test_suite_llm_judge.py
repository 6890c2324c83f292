"""A language model as the judge of an evaluation, from the command line to the figures."""

from __future__ import annotations

import json
import math
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, Reply, build_chat_reply, build_error_reply, run_chat_server
from file_search import read_all_text
from processes import Forks
from rank_processes import run_on_ranks
from suite_evaluations import Evaluations, count_cached_answers, read_artifact_rows, read_results
from waiting import becomes_true

from align.run import read_manifest


class LlmJudgeEvaluations(Evaluations):
    """Evaluations of ready-made files of answers."""

    def build_words(
        self, judge: str, new: Sequence[str], *others: Sequence[str], more: Sequence[str] = ()
    ) -> list[str]:
        """Return the words of an evaluation.

        Args:
            judge: the keys of the judge.
            new, others: the systems' answers.
        """
        path = self.file("asked.jsonl", [{"id": i, "prompt": f"Say {i}."} for i in range(len(new))])
        systems = []
        for name, texts in zip(("new", "old", "base"), (new, *others), strict=False):
            rows = [{"id": str(i), "answer": text} for i, text in enumerate(texts)]
            systems.append(f"{name}: {{file: {self.file(f'{name}.jsonl', rows)}}}")
        tasks = f"eval.tasks=[{{name: asked, path: {path}}}]"
        settings = ["stage=eval", f"stage.systems={{{', '.join(systems)}}}", tasks, f"stage.judge={{{judge}}}"]
        return [*settings, f"run.root={self.root}", "device=cpu", *more]


@pytest.fixture
def place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> LlmJudgeEvaluations:
    return LlmJudgeEvaluations(tmp_path / "runs", tmp_path, capsys)


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with run_chat_server(lambda _: build_chat_reply("[[A]]")) as server:
        yield server


def format_judge(server: ChatServer, *more: str) -> str:
    return ", ".join([f"url: '{server.url}'", "model: judge", *more])


def parse_answers(body: dict[str, Any]) -> tuple[str, str]:
    """Return the two answers in a question to the judge, separated by the marks with its code."""
    text = body["messages"][0]["content"]
    code = re.findall(r"^<<<end of answer B ([0-9a-f]{16})>>>$", text, re.MULTILINE)[-1]
    start = "^<<<answer {} {}>>>\n(.*)\n"
    end = "<<<end of answer {} {}>>>$"
    parts = [(start + end).format(letter, code, letter, code) for letter in "AB"]
    a, b = (re.search(part, text, re.MULTILINE | re.DOTALL) for part in parts)
    assert a is not None
    assert b is not None
    return a[1], b[1]


def build_judge_server(score: Callable[[str], float]) -> Callable[[dict[str, Any]], Reply]:
    """Return a judge that prefers the higher score and gives the probabilities of its verdict."""

    def judge(body: dict[str, Any]) -> Reply:
        a, b = map(score, parse_answers(body))
        letter = "C" if a == b else "A" if a > b else "B"
        odds = 1 / (1 + math.exp(b - a))
        logprobs = {"A": math.log(0.9 * odds), "B": math.log(0.9 * (1 - odds)), "C": math.log(0.1)}
        return build_chat_reply(f"Because.\n[[{letter}]]", ("[[", {"[[": 0.0}), (letter, logprobs), ("]]", {"]]": 0.0}))

    return judge


def test_a_judge_of_its_own_answers_is_noted(place: LlmJudgeEvaluations, server: ChatServer):
    command = place.build_words(format_judge(server), ["yes"] * 3, ["no"] * 3)
    systems = f"{{new: {{file: {place.folder / 'new.jsonl'}}}, own: {{url: '{server.url}/', model: judge}}}}"
    run = place.run(*command, f"stage.systems={systems}")
    assert f"judge at {server.url} judges itself: it is the system own" in read_results(run)["notes"]


def test_a_judge_that_always_says_a_decides_nothing(place: LlmJudgeEvaluations, server: ChatServer):
    run = place.run(*place.build_words(format_judge(server), ["yes"] * 20, ["no"] * 20))
    comparison = read_results(run)["tasks"]["asked"]["against"]["old"]
    assert (comparison["win_rate"]["value"], comparison["difference"]["value"]) == (0.5, 0)
    assert (comparison["swap"]["consistency"]["value"], comparison["swap"]["shown_first"]["value"]) == (0, 1)
    rows = Counter((row["order"], row["verdict"]) for row in read_artifact_rows(run, "verdicts"))
    assert rows == {("first", 1.0): 20, ("second", 0.0): 20}
    page = (run / "report.html").read_text()
    assert "the report could not be made" not in (run / "log.txt").read_text()
    assert "No difference between new and old was shown." in page


def test_the_figures_are_what_the_judge_said(place: LlmJudgeEvaluations, server: ChatServer):
    """A judge that likes long answers gives 8 wins, 3 ties and 1 loss, and probabilities that agree."""
    server.says = build_judge_server(len)
    new = [*["yes, of course"] * 8, *["same"] * 3, "no"]
    run = place.run(
        *place.build_words(format_judge(server), new, [*["no"] * 8, *["same"] * 3, "certainly"], ["yes"] * 12)
    )
    task = read_results(run)["tasks"]["asked"]
    comparison = task["against"]["old"]
    assert (task["by"], task["role"]) == (f"judge at {server.url}", "gold")
    assert comparison["win_rate"]["value"] == pytest.approx(9.5 / 12)
    assert comparison["difference"]["value"] == pytest.approx(7 / 12)
    assert (comparison["swap"]["consistency"]["value"], comparison["no_verdict"]) == (1.0, 0)
    assert [item["id"] for item in task["regressions"]["old"]] == ["11"]
    rows = [row for row in read_artifact_rows(run, "verdicts") if row["against"] == "old"]
    orders = [(row["prompt"], row["order"]) for row in rows]
    assert orders == [(str(i), order) for i in range(12) for order in ("first", "second")]
    assert all((row["p"] > 0.5) == (row["verdict"] == 1) for row in rows if row["verdict"] != 0.5)
    manifest = read_manifest(run)
    assert manifest.inputs["judge"].ref == f"judge at {server.url}"
    assert manifest.metrics["win_rate"]["value"] == pytest.approx(9.5 / 12)


def test_bad_answers_are_ties_and_are_counted(place: LlmJudgeEvaluations, server: ChatServer):
    """A request that always times out, and prose. Other invalid verdicts are tested in `test_llm_judge`."""

    def judge_badly(body: dict[str, Any]) -> Reply:
        a, b = parse_answers(body)
        kind = max(a, b, key=len)
        late_reply = build_chat_reply("[[A]]")._replace(wait_s=1.5)
        replies = {"takes its time": late_reply, "prose": build_chat_reply("Both are good.")}
        return replies.get(kind, build_chat_reply("[[A]]" if a == kind else "[[B]]"))

    server.says = judge_badly
    kinds = ["takes its time", "prose", "fine answer", "good one"]
    run = place.run(
        *place.build_words(format_judge(server, "timeout_s: 0.5", "at_once: 16"), kinds, ["-"] * len(kinds))
    )
    comparison = read_results(run)["tasks"]["asked"]["against"]["old"]
    assert (comparison["no_verdict"], comparison["win_rate"]["value"]) == (4, (2 + 0.5 * 2) / 4)
    assert comparison["swap"]["consistency"] == comparison["swap"]["consistency"] | {"value": 1.0, "n": 2}
    errors = {row["prompt"]: row["error"] for row in read_artifact_rows(run, "verdicts") if "error" in row}
    assert "0.5 seconds" in errors["0"]
    assert errors["1"] == "the judge gives no verdict"
    [note] = read_results(run)["notes"]
    assert note.startswith(f"asked: 4 of 8 verdicts by judge at {server.url} are errors and count as ties (most often:")
    assert "(n=2, fewer than" in (run / "report.html").read_text(), "how many verdicts a consistency of 1.0 is of"


def test_a_judge_that_never_answers_ends_the_run(place: LlmJudgeEvaluations, server: ChatServer):
    server.says = lambda _: build_error_reply(400, "logprobs are not supported")
    stderr = place.expect_error(*place.build_words(format_judge(server), ["yes"] * 60, ["no"] * 60))
    assert f"stage.judge.url={server.url}: answers by status 400" in stderr
    assert len(server.requests) < 100


def test_a_run_that_is_killed_asks_nothing_twice(place: LlmJudgeEvaluations, server: ChatServer, forks: Forks):
    """Only the request in progress is sent again, because its answer was lost."""
    hold = threading.Event()

    def answer_or_hang(_: dict[str, Any]) -> Reply:
        if len(server.answered_requests) >= 9:
            hold.wait(60)
        return build_chat_reply("[[A]]")

    server.says = answer_or_hang
    command = place.build_words(
        format_judge(server, "at_once: 1"), ["yes"] * 12, ["no"] * 12, more=("run.name=killed",)
    )
    child = forks.start(place.folder, *command)
    assert becomes_true(lambda: len(server.requests) == 10 and count_cached_answers(place) == 9)
    child.send_signal(signal.SIGKILL)
    child.wait()
    hold.set()
    before = [json.dumps(body) for body in server.requests]
    place.run(*command)
    after = [json.dumps(body) for body in server.requests[10:]]
    assert {*before[:9]} & {*after} == set()
    assert (len(after), len({*before, *after})) == (15, 24)
    place.run(*command[:-1], "run.name=again")
    assert len(server.requests) == 25
    prompt = place.folder / "prompt.txt"
    prompt.write_text("{conversation} {answer_a} {answer_b} [[A]] [[B]] [[C]]")
    place.run(*command[:-1], f"stage.judge={{{format_judge(server)}, prompt: {prompt}}}")
    assert len(server.requests) == 49, "another prompt is another judge"


def test_of_two_ranks_one_asks(place: LlmJudgeEvaluations, server: ChatServer, forks: Forks):
    command = place.build_words(format_judge(server), ["yes"] * 5, ["no"] * 5, more=("run.name=two",))
    processes = run_on_ranks(forks, place.folder, *command)
    assert [process.status for process in processes] == [0, 0], [process.err for process in processes]
    assert len(server.requests) == 10


def test_the_key_of_a_judge_stands_nowhere(
    place: LlmJudgeEvaluations, server: ChatServer, monkeypatch: pytest.MonkeyPatch
):
    key = "pl4nted-of-the-judges"
    command = place.build_words(format_judge(server, "key_env: JUDGE"), ["yes"] * 3, ["no"] * 3)
    assert "stage.judge.key_env=JUDGE: is not set" in place.expect_error(*command)
    monkeypatch.setenv("JUDGE", key)
    place.run(*command)
    assert {headers["authorization"] for headers in server.request_headers} == {f"Bearer {key}"}
    server.says = lambda _: build_error_reply(403, f"{key} is no key of mine")
    assert "*** is no key of mine" in place.expect_error(*command, "stage.judge.model=other")
    assert not [path for path, text in read_all_text(place.root).items() if key in text]


def test_what_is_refused_before_anybody_is_asked(place: LlmJudgeEvaluations, server: ChatServer):
    command = place.build_words(format_judge(server), ["yes"] * 3, ["no"] * 3)
    (place.folder / "prompt.txt").write_text("Who is better? {answer_a} {answer_b} [[A]] [[B]] [[C]]")
    for judge, problem in (
        (f"{{{format_judge(server)}, prompt: {place.folder / 'prompt.txt'}}}", "has the place {conversation} 0 times"),
        (f"{{{format_judge(server)}, prompt: nowhere.txt}}", "stage.judge.prompt=nowhere.txt: there is no such file"),
        (f"{{{format_judge(server)}, price: {{prompt: 1}}}}", "stage.judge.price"),
        (f"{{{format_judge(server)}, price: {{prompt: 1, completion: -1}}}}", "stage.judge.price.completion=-1"),
        ("nobody", "stage.judge=nobody: is no judge"),
        ("{url: localhost, model: x}", "stage.judge.url=localhost"),
        ("{url: 'http://h/v1'}", "stage.judge.model"),
    ):
        assert problem in place.expect_error(*command, f"stage.judge={judge}"), judge
    gate = "eval.gates=[{name: g, task: asked, against: old, is: superior}]"
    assert "eval.gates" in place.expect_error(*command, gate) or "gates decide about" in place.expect_error(
        *command, gate
    )
    assert "stage.judge" in place.expect_error(
        "stage=eval", f"stage.judge={{{format_judge(server)}}}", f"run.root={place.root}"
    )
    assert server.requests == []


def test_the_tokens_that_a_judge_took_are_in_the_metrics(place: LlmJudgeEvaluations, server: ChatServer):
    reply = build_chat_reply("[[A]]")
    reply.body["usage"] = {"prompt_tokens": 100, "completion_tokens": 7}
    server.says = lambda _: reply
    price = "price: {prompt: 2, completion: 10}"
    run = place.run(*place.build_words(f"{format_judge(server)}, {price}", ["a", "b"], ["c", "d"]))
    usage = {"asked": 4, "prompt_tokens": 400, "completion_tokens": 28, "uncounted": 0, "cost": 0.00108}
    assert read_manifest(run).metrics["judge_usage"] == pytest.approx(usage)
    server.says = lambda _: build_chat_reply("[[A]]")
    # The verdict on one pair is reused.
    second_run = place.run(*place.build_words(format_judge(server), ["a", "e"], ["c", "d"]))
    usage = {"asked": 2, "prompt_tokens": 0, "completion_tokens": 0, "uncounted": 2}
    assert read_manifest(second_run).metrics["judge_usage"] == usage
