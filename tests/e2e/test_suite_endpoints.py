"""Models behind servers as systems of an evaluation: a server of `stage=serve`, and servers that are busy or gone."""

from __future__ import annotations

import itertools
import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from chat_server import Reply, build_chat_reply, build_error_reply, run_chat_server
from file_search import read_all_text
from processes import Forks
from rank_processes import run_on_ranks
from serving import run_serve_stage, write_adapters
from suite_evaluations import Evaluations, count_cached_answers, read_artifact_rows, read_results
from waiting import becomes_true

from align.__main__ import main
from align.run import read_manifest

CHECK = {"kind": "regex", "pattern": "e"}
FAST = ("device=cpu", "rollout.max_new_tokens=12")


class EndpointEvaluations(Evaluations):
    """Evaluations of a server together with a file of answers."""

    def build_words(self, url: str, count: int = 12, *more: str, system: str = "model: m", **rows: Any) -> list[str]:
        path = self.file(
            "asked.jsonl", [{"id": i, "prompt": f"Say {i}.", "check": CHECK, **rows} for i in range(count)]
        )
        answers = [{"id": str(i), "answer": "yes" if i % 3 else "no"} for i in range(count)]
        systems = f"{{far: {{url: '{url}', {system}}}, file: {{file: {self.file('theirs.jsonl', answers)}}}}}"
        tasks = f"[{{name: asked, path: {path}}}]"
        return ["stage=eval", f"stage.systems={systems}", f"eval.tasks={tasks}", f"run.root={self.root}", *FAST, *more]


@pytest.fixture
def place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> EndpointEvaluations:
    return EndpointEvaluations(tmp_path / "runs", tmp_path, capsys)


def read_answers(run: Path, system: str) -> dict[str, Any]:
    return {row["id"]: row["answers"][system] for row in read_artifact_rows(run)}


def test_a_server_of_ours_says_what_its_model_says_here(forks: Forks, place: EndpointEvaluations):
    """A second evaluation of the same prompts sends no request."""
    adapters_folder = write_adapters(place.folder / "adapters", "one")
    rows = [{"id": str(i), "prompt": f"Tell me about the number {i}.", "check": CHECK} for i in range(6)]
    rows.append({"id": "long", "prompt": "word " * 30_000, "check": CHECK})
    path = place.file("asked.jsonl", rows)
    settings = "model=pocket", "method=lora", f"stage.adapters={{one: {adapters_folder / 'one'}}}"
    with run_serve_stage(forks, place.folder, *settings) as server:
        served_models = (("far", "pocket"), ("other", "one"))
        remote_systems = [f"{name}: {{url: '{server.api}', model: {model}}}" for name, model in served_models]
        command = ["stage=eval", f"run.root={place.root}", "model=pocket", "method=lora", "dtype=float32", *FAST]
        command += [f"stage.systems={{here: base, {', '.join(remote_systems)}}}", "rollout.temperature=0.001"]
        command.append("data.max_length=1000000")
        run = place.run(*command, f"eval.tasks=[{{name: asked, path: {path}}}]", "run.name=a")
        local_answers = read_answers(run, "here")
        remote_answers = read_answers(run, "far")
        texts = [
            {id: (answer["text"].lstrip(), answer["ended"]) for id, answer in system_answers.items()}
            for system_answers in (local_answers, remote_answers)
        ]
        assert texts[0] == texts[1], "but for the blank that a decoder leaves out before the first word"
        assert [answer["text"] for answer in read_answers(run, "other").values()] != [
            answer["text"] for answer in local_answers.values()
        ]
        assert read_results(run)["tasks"]["asked"]["dropped"] == 1
        requests_before = len(server.log)
        assert requests_before == 12, "the long one was no question for anybody: it is too long for the model here"
        assert read_results(run)["systems"][1]["ref"] == f"pocket at {server.api}"
        second_task = f"eval.tasks=[{{name: again, path: {path}, check: {{kind: regex, pattern: a}}}}]"
        assert read_manifest(place.run(*command, second_task, "run.name=b")).metrics["answers_made"] == 0
        assert len(server.log) == requests_before
        judged_path = place.file("judged.jsonl", [{"id": str(i), "prompt": f"Say {i}."} for i in range(3)])
        files = [place.file(f"{name}.jsonl", [{"id": str(i), "answer": name} for i in range(3)]) for name in ("x", "y")]
        systems = f"stage.systems={{x: {{file: {files[0]}}}, y: {{file: {files[1]}}}}}"
        judge = f"stage.judge={{url: '{server.api}', model: pocket, max_tokens: 6}}"
        tasks = f"eval.tasks=[{{name: judged, path: {judged_path}}}]"
        judged_run = place.run("stage=eval", systems, tasks, judge, f"run.root={place.root}", "run.name=judged", *FAST)
        assert [request["status"] for request in server.log[requests_before:]] == [200] * 6  # logprobs included
        # The model gives no verdict.
        assert read_results(judged_run)["tasks"]["judged"]["against"]["y"]["win_rate"]["value"] == 0.5


def test_a_busy_server_and_what_it_is_asked(place: EndpointEvaluations):
    seeds = list[int]()

    def answer_or_refuse(body: dict[str, Any]) -> Reply:
        seeds.append(body["seed"])
        return (
            build_error_reply(429, "busy", retry_after="0.1")
            if len(seeds) in (2, 5)
            else build_chat_reply("e" * len(seeds))
        )

    with run_chat_server(answer_or_refuse) as server:
        command = place.build_words(server.url, 6, system="model: m, at_once: 1")
        task = read_results(place.run(*command))["tasks"]["asked"]
        assert len(server.requests) == 8
        assert len({*seeds}) == 6, "each prompt has a seed of its own"
        assert {body["max_tokens"] for body in server.requests} == {12}
        assert task["systems"]["far"]["score"]["value"] == 1.0
        place.run(*command, "resume=never", "run.name=again")
        assert len(server.requests) == 8
        trace = "stage=registry", "stage.action=trace", "artifact=eval:again", "stage.verify=full"
        assert main([*trace, f"run.root={place.root}"]) == 0
        assert f"systems.far: server m at {server.url}" in place.capsys.readouterr().out


def test_reasoning_is_hidden_where_it_is_of_others(place: EndpointEvaluations):
    with run_chat_server(lambda _: build_chat_reply("no", reasoning_content="e")) as server:
        command = place.build_words(server.url, 2)
        hidden_run = place.run(*command, "rollout.reasoning=hide", "run.name=hidden")
        assert {answer["text"] for answer in read_answers(hidden_run, "far").values()} == {"no"}
        assert {answer["reasoning"] for answer in read_answers(hidden_run, "far").values()} == {"e"}
        shown_run = place.run(*command, "run.name=shown")
        assert read_results(shown_run)["tasks"]["asked"]["systems"]["far"]["score"]["value"] == 1.0
        assert len(server.requests) == 2


def test_a_run_that_is_killed_asks_nothing_twice(place: EndpointEvaluations, forks: Forks):
    """Only the request in progress is sent again, because its answer was lost."""
    hold = threading.Event()

    def answer_or_hang(body: dict[str, Any]) -> Reply:
        if len(server.answered_requests) >= 7:
            hold.wait(60)
        return build_chat_reply("e")

    with run_chat_server(answer_or_hang) as server:
        command = place.build_words(server.url, 20, "run.name=killed", system="model: m, at_once: 1")
        child = forks.start(place.folder, *command)
        assert becomes_true(lambda: len(server.requests) == 8 and count_cached_answers(place) == 7)
        child.send_signal(signal.SIGKILL)
        child.wait()
        hold.set()
        assert becomes_true(lambda: server.at_once == 0)
        before = [json.dumps(body) for body in server.requests]
        assert read_manifest(place.run(*command)).metrics["answers_made"] == 13
        after = [json.dumps(body) for body in server.requests[8:]]
        assert {*before[:7]} & {*after} == set()
        assert (len(after), len({*before, *after})) == (13, 20)


def test_a_run_that_is_interrupted_ends_at_once_and_goes_on(place: EndpointEvaluations, forks: Forks):
    hold = threading.Event()
    numbers = itertools.count()

    def answer_or_hang(_: dict[str, Any]) -> Reply:
        if next(numbers) >= 4:
            hold.wait(60)
        return build_chat_reply("e")

    with run_chat_server(answer_or_hang) as server:
        command = place.build_words(server.url, 12, "run.name=stopped")
        child = forks.start(place.folder, *command)
        assert becomes_true(lambda: len(server.requests) >= 8 and count_cached_answers(place) == 4)
        child.send_signal(signal.SIGINT)
        exited = child.wait(20)
        assert exited.status == 130
        assert "Traceback" not in exited.err
        hold.set()
        assert becomes_true(lambda: server.at_once == 0)
        assert read_manifest(place.run(*command)).metrics["answers_made"] == 8


def test_of_two_ranks_one_asks(place: EndpointEvaluations, forks: Forks):
    with run_chat_server(lambda _: build_chat_reply("e")) as server:
        processes = run_on_ranks(forks, place.folder, *place.build_words(server.url, 5, "run.name=two"))
        assert [process.status for process in processes] == [0, 0], [process.err for process in processes]
        assert len(server.requests) == 5


def test_prompts_that_are_too_long_for_a_server_are_counted(place: EndpointEvaluations):
    def answer_or_refuse(body: dict[str, Any]) -> Reply:
        is_long = body["messages"][-1]["content"] in ("Say 1.", "Say 4.")
        return (
            build_error_reply(400, "This model's maximum context length is 10 tokens.")
            if is_long
            else build_chat_reply("e")
        )

    with run_chat_server(answer_or_refuse) as server:
        task = read_results(place.run(*place.build_words(server.url, 6)))["tasks"]["asked"]
        assert (task["items"], task["dropped"]) == (4, 2)
        assert task["systems"]["file"]["score"]["value"] == 0.5, "of the items that are left"
        server.says = lambda _: build_error_reply(400, "the prompt is too long, or so")
        stderr = place.expect_error(*place.build_words(server.url, 6, system="model: n"))
        assert "data.max_length=asked: is longer than what a prompt may have, for all 6 items of asked" in stderr
        server.says = lambda _: build_error_reply(400, "max_tokens is not supported in this context")
        stderr = place.expect_error(*place.build_words(server.url, 6, system="model: o"))
        assert f"far.url={server.url}: answers by status 400 (max_tokens is not supported in this context)" in stderr


def test_a_server_that_does_not_answer_ends_the_run(place: EndpointEvaluations):
    """Other replies of a server are tested in `test_endpoint`."""
    with run_chat_server(lambda _: build_error_reply(401, "who are you?")) as server:
        stderr = place.expect_error(*place.build_words(server.url, 6))
        assert "stage.systems.far.key_env=(none): is rejected" in stderr
        assert len(server.requests) <= 6


def test_the_key_stands_nowhere(place: EndpointEvaluations, monkeypatch: pytest.MonkeyPatch):
    key = "pl4nted-of-the-judges"
    monkeypatch.setenv("THEIR_SECRET_WORD", key)
    with run_chat_server(lambda _: build_chat_reply(f"e {key}")) as server:
        command = place.build_words(server.url, 3, system="model: m, key_env: THEIR_SECRET_WORD")
        place.run(*command)
        assert {headers["authorization"] for headers in server.request_headers} == {f"Bearer {key}"}
        server.says = lambda _: build_error_reply(400, f"I know {key}")
        stderr = place.expect_error(*command, "seed=9")
        assert "I know ***" in stderr
        monkeypatch.delenv("THEIR_SECRET_WORD")
        assert "is not set in the environment" in place.expect_error(*command, "seed=10")
        key_in_settings = place.build_words(server.url, 3, system=f"model: m, key_env: {key}")
        assert key not in place.expect_error(*key_in_settings)
    assert not [path for path, text in read_all_text(place.root).items() if key in text or key in path]


def test_a_server_is_no_artifact_for_a_gate_and_calls_no_tools(place: EndpointEvaluations):
    with run_chat_server(lambda _: build_chat_reply("e")) as server:
        gate = "eval.gates=[{name: g, task: asked, is: superior, margin: 0.5}]"
        assert "is no artifact, and gates decide about an artifact" in place.expect_error(
            *place.build_words(server.url, 3, gate)
        )
        tool = {"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}
        assert "would call the tools of item 0" in place.expect_error(*place.build_words(server.url, 3, tools=[tool]))
        duplicated = place.build_words(server.url, 3)
        duplicated[1] = f"stage.systems={{a: {{url: '{server.url}', model: m}}, b: {{url: '{server.url}/', model: m}}}}"
        assert "is the same as a" in place.expect_error(*duplicated)
        assert server.requests == []


JUDGE = ("reward=rules", "reward.rules=[{rule: regex, pattern: e}]")


WORDS = ("alpha", "bravo", "delta", "golf", "hotel", "kilo", "lima", "oscar", "sierra", "tango")
TOPICS = ("tea", "rain", "chess", "tides", "bread", "owls", "moss", "glass", "maps", "salt")


def build_unique_answer(number: int) -> str:
    """Return an answer that differs from those of the other numbers."""
    return " ".join(WORDS[index % 10] for index in (number // 10, number, number // 100, number * 7))


def judge_collapse(place: EndpointEvaluations, url: str, more: str = "") -> dict[str, Any]:
    """Evaluate a server and a file of answers on 100 prompts, and return the verdict on each of the two.

    Args:
        more: further keys of the server's system.
    """
    questions = [f"What is {first} to {second}?" for first, second in itertools.product(TOPICS, TOPICS)]
    path = place.file("asked.jsonl", [{"id": i, "prompt": question} for i, question in enumerate(questions)])
    answers_path = place.file("theirs.jsonl", [{"id": str(i), "answer": build_unique_answer(i)} for i in range(100)])
    systems = f"{{far: {{url: '{url}', model: m{more}}}, file: {{file: {answers_path}}}}}"
    tasks = f"eval.tasks=[{{name: asked, path: {path}}}]"
    run = place.run("stage=eval", f"stage.systems={systems}", tasks, f"run.root={place.root}", *FAST, *JUDGE)
    return read_manifest(run).metrics["collapse"]["systems"]


def test_a_server_that_says_one_thing_at_temperature_0_collapsed(place: EndpointEvaluations):
    numbers = itertools.count()

    def answer(body: dict[str, Any]) -> Reply:
        return build_chat_reply("I love it!" if body["temperature"] == 0 else build_unique_answer(next(numbers)))

    with run_chat_server(answer) as chat:
        verdicts = judge_collapse(place, chat.url)
        assert sum(body["temperature"] == 0 for body in chat.requests) == 108
    assert verdicts["far"]["verdict"] == "collapsed"
    assert "of its greedy answers are alike: “I love it!” (file: 1% for its commonest)" in verdicts["far"]["reasons"][0]
    assert verdicts["file"] == {"verdict": "not measured", "reasons": ["no answers at temperature 0: a file has none"]}


@pytest.mark.parametrize(
    ("refuses_zero", "more", "reason"),
    [
        (False, "", "its server answers differently each time"),
        (True, "", "its server answers by status 400 (temperature must be 1)"),
        (False, ", extra_body: {temperature: 1.5}", "stage.systems.far.extra_body sets the temperature"),
    ],
    ids=["ignored", "refused", "overruled"],
)
def test_a_server_without_answers_at_temperature_0(
    place: EndpointEvaluations, refuses_zero: bool, more: str, reason: str
):
    numbers = itertools.count()

    def answer(body: dict[str, Any]) -> Reply:
        if refuses_zero and body["temperature"] == 0:
            return build_error_reply(400, "temperature must be 1")
        return build_chat_reply(build_unique_answer(next(numbers)))

    with run_chat_server(answer) as chat:
        verdicts = judge_collapse(place, chat.url, more)
        assert sum(body["temperature"] == 0 for body in chat.requests) <= 16
    assert verdicts["far"] == {"verdict": "not measured", "reasons": [f"no answers at temperature 0: {reason}"]}
