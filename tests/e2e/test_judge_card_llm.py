"""The card of a language model: both orders, what is asked once, and a judge that goes by place before any gate."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, Reply, chatting, error, said
from workshop import Ready

from align.__main__ import main
from align.run import read_manifest

ROWS = 110
GATES = [
    "{name: g, task: chat, against: old, is: superior}",
    "{name: g, task: chat, against: old, is: not_worse, margin: 0.9}",
    "{name: g, task: chat, against: old, is: at_most, margin: 0.9}",
]


class Bench:
    """Cards of one language model in one root."""

    def __init__(self, ready: Ready, server: ChatServer, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.ready, self.server, self.folder, self.capsys = ready, server, folder, capsys

    def words(self, *more: str) -> list[str]:
        judge = f"stage.judge={{url: '{self.server.url}', model: judge}}"
        return ["stage=eval", judge, f"run.root={self.ready.root}", *more]

    def card(self, name: str, *more: str) -> dict[str, Any]:
        path = self.folder / "pairs.jsonl"
        rows = [{"prompt": f"{i}?", "chosen": f"It is good, number {i}.", "rejected": f"{i} " * 9} for i in range(ROWS)]
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        assert main(self.words("eval=judge", "data=jsonl", f"data.path={path}", f"run.name={name}", *more)) == 0
        self.said = self.capsys.readouterr().out
        return json.loads((self.ready.root / "eval" / name / "artifact" / "card.json").read_text())

    def suite(self, gate: str, card: str) -> list[str]:
        systems, tasks = "stage.systems={new: sft:s, old: base}", "eval.tasks=[{name: chat, prompts: 4}]"
        more = [systems, tasks, f"eval.gates=[{gate}]", f"stage.card=eval:{card}", "rollout.max_new_tokens=8"]
        return self.words(*self.ready.data, *more)


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chatting(lambda _: said("[[A]]")) as server:
        yield server


@pytest.fixture
def bench(ready: Ready, server: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    return Bench(ready, server, tmp_path, capsys)


def likes(what: Callable[[str], float], sure: float = 0.9) -> Callable[[dict[str, Any]], Reply]:
    """A judge who likes what scores higher, as sure as it says."""

    def says(body: dict[str, Any]) -> Reply:
        parts = re.findall(r"^<<<answer [AB] \w+>>>\n(.*?)\n<<<end", body["messages"][0]["content"], re.M | re.S)
        a, b = map(what, parts)
        letter, p = ("A", sure) if a > b else ("B", 1 - sure) if b > a else ("C", 0.5)
        likely = {"A": math.log(p), "B": math.log(1 - p)}
        return said(f"[[{letter}]]", ("[[", {"[[": 0.0}), (letter, likely), ("]]", {"]]": 0.0}))

    return says


def test_a_judge_that_always_says_a_is_refused_by_every_gate(bench: Bench):
    card = bench.card("a")
    assert card["swap"]["consistency"]["value"] == 0
    assert card["swap"]["shown_first"]["value"] == 1
    assert card["agreement"]["raw"]["value"] == 0
    assert card["swap"]["win_rate"]["value"] == 0.5
    assert "too little to decide gates: no verdict of it survives a swap" in bench.said
    asked = len(bench.server.asked)
    assert asked == 2 * ROWS
    for gate in GATES:
        assert main(bench.suite(gate, "a")) == 2
        assert "no verdict of it survives a swap of the two answers" in bench.capsys.readouterr().err
    assert len(bench.server.asked) == asked


def test_a_judge_that_agrees_decides(bench: Bench):
    bench.server.says = likes(lambda text: "good" in text)
    card = bench.card("good")
    assert card["agreement"]["raw"]["value"] == card["swap"]["consistency"]["value"] == 1
    assert card["calibration"]["log_loss"]["value"] == pytest.approx(-math.log(0.9))
    assert card["calibration"]["brier"]["value"] == pytest.approx(0.01)
    assert {name: found["n"] for name, found in card["by_length"].items()} == {"longer": 10, "shorter": 100}
    asked = len(bench.server.asked)
    assert bench.card("again") | {"judge": None} == card | {"judge": None}
    assert len(bench.server.asked) == asked, "what it said before is not asked again"
    assert main(bench.suite(GATES[1], "good")) in (0, 3)
    run = Path(bench.capsys.readouterr().out.strip().splitlines()[-1])
    found = json.loads((run / "artifact" / "verdicts" / "g.json").read_text())
    assert found["judge"] == f"judge at {bench.server.url}"
    assert found["card"] == read_manifest(run).inputs["card"].digest
    assert read_manifest(run).inputs["judge"].ref == found["judge"]


def test_verdicts_that_are_none_count_as_wrong(bench: Bench):
    """One pair has prose in both orders, one prose where the better answer stands second, and one a refusal."""
    right = likes(lambda text: "good" in text)

    def says(body: dict[str, Any]) -> Reply:
        text = body["messages"][0]["content"]
        if "number 3." in text or ("number 5." in text and text.index("5 5 5") < text.index("number 5.")):
            return said("I like both.")
        return error(400, "no") if "number 7." in text else right(body)

    bench.server.says = says
    card = bench.card("some")
    assert card["errors"] == 3
    assert card["agreement"]["raw"]["value"] == card["accuracy"]["value"] == (ROWS - 3) / ROWS
    assert card["swap"]["consistency"]["value"] == (ROWS - 3) / ROWS
    assert card["ties"] == {"pairs": 0, "judge": 0, "both": 0}
    assert "it gives no verdict, or one in one order alone, on 3 pairs: counted as wrong" in bench.said
    assert f"5 of {2 * ROWS} verdicts by judge at {bench.server.url} are errors and count as wrong" in bench.said
    run = bench.ready.root / "eval" / "some"
    rows = [json.loads(line) for line in (run / "artifact" / "verdicts.jsonl").read_text().splitlines()]
    assert sum("error" in row for row in rows) == 3
    assert "on 3 pairs: counted as wrong" in (run / "report.html").read_text()
    asked = len(bench.server.asked)
    bench.server.says = right
    assert bench.card("mended")["errors"] == 0
    assert len(bench.server.asked) == asked + 5


def test_a_judge_that_says_nothing_has_a_card(bench: Bench):
    """On ties as well, with which an error is no agreement."""
    bench.server.says = lambda _: said("I like both.")
    card = bench.card("prose")
    assert (card["errors"], card["agreement"]["raw"]["value"], card["ties"]["judge"]) == (ROWS, 0, 0)
    assert "too little to decide gates: it gives no verdict" in bench.said
    assert "with so many, its card says nothing" in bench.said


def test_another_prompt_is_another_judge(bench: Bench, tmp_path: Path):
    bench.server.says = likes(lambda text: "good" in text)
    bench.card("plain")
    path = tmp_path / "mine.txt"
    path.write_text("{conversation}{answer_a}{answer_b} [[A]] [[B]] [[C]]")
    mine = f"stage.judge={{url: '{bench.server.url}', model: judge, prompt: {path}}}"
    assert main([*bench.suite(GATES[1], "plain"), mine]) == 2
    assert "this card is of another judge" in bench.capsys.readouterr().err


def test_people_are_no_judge_to_be_measured(bench: Bench):
    assert main(["stage=eval", "eval=judge", "stage.judge=people", "data=annotations"]) == 2
    assert "are whom a judge is measured against" in bench.capsys.readouterr().err
