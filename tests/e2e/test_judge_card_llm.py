"""Reports on a language model as a judge: both orders, cached requests, and a judge that prefers a position."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, Reply, build_chat_reply, build_error_reply, run_chat_server
from stage_commands import Ready
from suite_evaluations import Evaluations, read_artifact_rows

from align.__main__ import main
from align.run import read_manifest

ROWS = 110
GATES = [
    "{name: g, task: chat, against: old, is: superior}",
    "{name: g, task: chat, against: old, is: not_worse, margin: 0.9}",
    "{name: g, task: chat, against: old, is: at_most, margin: 0.9}",
]


class LlmJudgeReports(Evaluations):
    """Reports on one language model as a judge, in one root."""

    def __init__(self, ready: Ready, folder: Path, capsys: pytest.CaptureFixture[str], server: ChatServer) -> None:
        super().__init__(ready.root, folder, capsys)
        self.data = ready.data
        self.server = server

    def words(self, *more: str) -> list[str]:
        judge = f"stage.judge={{url: '{self.server.url}', model: judge}}"
        return ["stage=eval", judge, f"run.root={self.root}", *more]

    def card(self, name: str) -> dict[str, Any]:
        rows = [{"prompt": f"{i}?", "chosen": f"It is good, number {i}.", "rejected": f"{i} " * 9} for i in range(ROWS)]
        path = self.file("pairs.jsonl", rows)
        run = self.run("eval=judge", "data=jsonl", f"data.path={path}", f"run.name={name}")
        return json.loads((run / "artifact" / "card.json").read_text())

    def suite(self, gate: str, card: str) -> list[str]:
        systems = "stage.systems={new: sft:s, old: base}"
        tasks = "eval.tasks=[{name: chat, prompts: 4}]"
        more = [systems, tasks, f"eval.gates=[{gate}]", f"stage.card=eval:{card}", "rollout.max_new_tokens=8"]
        return [*self.data, *more]


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with run_chat_server(lambda _: build_chat_reply("[[A]]")) as server:
        yield server


@pytest.fixture
def bench(ready: Ready, server: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> LlmJudgeReports:
    return LlmJudgeReports(ready, tmp_path, capsys, server)


def build_confident_judge(score_text: Callable[[str], float], sure: float = 0.9) -> Callable[[dict[str, Any]], Reply]:
    """Build a judge that prefers the answer with the higher score, and gives it the probability `sure`."""

    def answer_request(body: dict[str, Any]) -> Reply:
        parts = re.findall(r"^<<<answer [AB] \w+>>>\n(.*?)\n<<<end", body["messages"][0]["content"], re.M | re.S)
        a, b = map(score_text, parts)
        letter, p = ("A", sure) if a > b else ("B", 1 - sure) if b > a else ("C", 0.5)
        likely = {"A": math.log(p), "B": math.log(1 - p)}
        return build_chat_reply(f"[[{letter}]]", ("[[", {"[[": 0.0}), (letter, likely), ("]]", {"]]": 0.0}))

    return answer_request


def test_a_judge_that_always_says_a_is_refused_by_every_gate(bench: LlmJudgeReports):
    card = bench.card("a")
    assert (card["swap"]["consistency"]["value"], card["swap"]["shown_first"]["value"]) == (0, 1)
    assert (card["agreement"]["raw"]["value"], card["swap"]["win_rate"]["value"]) == (0, 0.5)
    assert "It decides no gate: no verdict is the same in both orders of the two answers" in bench.output
    assert len(bench.server.requests) == 2 * ROWS
    for gate in GATES:
        stderr = bench.expect_error(*bench.suite(gate, "a"))
        assert "no verdict is the same in both orders of the two answers" in stderr
    assert len(bench.server.requests) == 2 * ROWS


def test_a_judge_that_agrees_decides(bench: LlmJudgeReports):
    bench.server.says = build_confident_judge(lambda text: "good" in text)
    card = bench.card("good")
    assert card["agreement"]["raw"]["value"] == card["swap"]["consistency"]["value"] == 1
    assert card["calibration"]["log_loss"]["value"] == pytest.approx(-math.log(0.9))
    n_requests = len(bench.server.requests)
    assert bench.card("again") | {"judge": None} == card | {"judge": None}
    assert len(bench.server.requests) == n_requests, "what it said before is not asked again"
    assert main(bench.words(*bench.suite(GATES[1], "good"))) in (0, 3)
    run = Path(bench.capsys.readouterr().out.strip().splitlines()[-1])
    verdict = json.loads((run / "artifact" / "verdicts" / "g.json").read_text())
    inputs = read_manifest(run).inputs
    assert verdict["judge"] == f"judge at {bench.server.url}" == inputs["judge"].ref
    assert verdict["card"] == inputs["card"].digest


def test_verdicts_that_are_none_count_as_wrong(bench: LlmJudgeReports):
    """One pair gets prose in both orders, and one gets an HTTP error."""
    prefer_good = build_confident_judge(lambda text: "good" in text)

    def answer_request(body: dict[str, Any]) -> Reply:
        text = body["messages"][0]["content"]
        if "number 3." in text:
            return build_chat_reply("I like both.")
        return build_error_reply(400, "no") if "number 7." in text else prefer_good(body)

    bench.server.says = answer_request
    card = bench.card("some")
    assert card["errors"] == 2
    assert card["agreement"]["raw"]["value"] == card["accuracy"]["value"] == (ROWS - 2) / ROWS
    assert "gives no verdict, or one in one order alone, on 2 pairs: counted as wrong" in bench.output
    run = bench.root / "eval" / "some"
    assert sum("error" in row for row in read_artifact_rows(run, "verdicts")) == 2
    assert "on 2 pairs: counted as wrong" in (run / "report.html").read_text()
    n_requests = len(bench.server.requests)
    bench.server.says = prefer_good
    assert bench.card("mended")["errors"] == 0
    assert len(bench.server.requests) == n_requests + 4
