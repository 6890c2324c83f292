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
from benches import Evaluations, kept, lines, results
from chat_server import ChatServer, Reply, chatting, error, said
from processes import Forks
from ranked import ranked
from searched import everything_in
from waiting import settles

from align.run import read_manifest


class Place(Evaluations):
    """Evaluations of files of answers, which nobody has to make."""

    def judged(self, judge: str, new: Sequence[str], *others: Sequence[str], more: Sequence[str] = ()) -> list[str]:
        """Return the words of an evaluation.

        Args:
            judge: the keys of the judge.
            new, others: the systems' answers.
        """
        asked = self.file("asked.jsonl", [{"id": i, "prompt": f"Say {i}."} for i in range(len(new))])
        systems = []
        for name, texts in zip(("new", "old", "base"), (new, *others), strict=False):
            rows = [{"id": str(i), "answer": text} for i, text in enumerate(texts)]
            systems.append(f"{name}: {{file: {self.file(f'{name}.jsonl', rows)}}}")
        tasks = f"eval.tasks=[{{name: asked, path: {asked}}}]"
        ours = ["stage=eval", f"stage.systems={{{', '.join(systems)}}}", tasks, f"stage.judge={{{judge}}}"]
        return [*ours, f"run.root={self.root}", "device=cpu", *more]


@pytest.fixture
def place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Place:
    return Place(tmp_path / "runs", tmp_path, capsys)


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chatting(lambda _: said("[[A]]")) as server:
        yield server


def at(server: ChatServer, *more: str) -> str:
    return ", ".join([f"url: '{server.url}'", "model: judge", *more])


def shown(body: dict[str, Any]) -> tuple[str, str]:
    """The two answers of a question, as the marks with its code part them."""
    text = body["messages"][0]["content"]
    code = re.findall(r"^<<<end of answer B ([0-9a-f]{16})>>>$", text, re.MULTILINE)[-1]
    start, end = "^<<<answer {} {}>>>\n(.*)\n", "<<<end of answer {} {}>>>$"
    parts = [(start + end).format(letter, code, letter, code) for letter in "AB"]
    a, b = (re.search(part, text, re.MULTILINE | re.DOTALL) for part in parts)
    assert a is not None
    assert b is not None
    return a[1], b[1]


def prefers(score: Callable[[str], float]) -> Callable[[dict[str, Any]], Reply]:
    """A judge who likes what scores higher, and says how sure it is."""

    def says(body: dict[str, Any]) -> Reply:
        a, b = map(score, shown(body))
        letter, odds = ("C" if a == b else "A" if a > b else "B"), 1 / (1 + math.exp(b - a))
        likely = {"A": math.log(0.9 * odds), "B": math.log(0.9 * (1 - odds)), "C": math.log(0.1)}
        return said(f"Because.\n[[{letter}]]", ("[[", {"[[": 0.0}), (letter, likely), ("]]", {"]]": 0.0}))

    return says


def test_a_judge_of_its_own_answers_is_noted(place: Place, server: ChatServer):
    words = place.judged(at(server), ["yes"] * 3, ["no"] * 3)
    systems = f"{{new: {{file: {place.folder / 'new.jsonl'}}}, own: {{url: '{server.url}/', model: judge}}}}"
    run = place.run(*words, f"stage.systems={systems}")
    assert f"judge at {server.url} judges itself: it is the system own" in results(run)["notes"]


def test_a_judge_that_always_says_a_decides_nothing(place: Place, server: ChatServer):
    run = place.run(*place.judged(at(server), ["yes"] * 20, ["no"] * 20))
    found = results(run)["tasks"]["asked"]["against"]["old"]
    assert (found["win_rate"]["value"], found["difference"]["value"]) == (0.5, 0)
    assert (found["swap"]["consistency"]["value"], found["swap"]["shown_first"]["value"]) == (0, 1)
    rows = Counter((row["order"], row["verdict"]) for row in lines(run, "verdicts"))
    assert rows == {("first", 1.0): 20, ("second", 0.0): 20}
    page = (run / "report.html").read_text()
    assert "the report could not be made" not in (run / "log.txt").read_text()
    assert "No difference between new and old was shown." in page


def test_the_figures_are_what_the_judge_said(place: Place, server: ChatServer):
    """Of a judge who likes what is long: 8 wins, 3 ties and 1 loss, and probabilities beside them."""
    server.says = prefers(len)
    new = [*["yes, of course"] * 8, *["same"] * 3, "no"]
    run = place.run(*place.judged(at(server), new, [*["no"] * 8, *["same"] * 3, "certainly"], ["yes"] * 12))
    task = results(run)["tasks"]["asked"]
    old = task["against"]["old"]
    assert (task["by"], task["role"]) == (f"judge at {server.url}", "gold")
    assert old["win_rate"]["value"] == pytest.approx(9.5 / 12)
    assert old["difference"]["value"] == pytest.approx(7 / 12)
    assert (old["swap"]["consistency"]["value"], old["no_verdict"]) == (1.0, 0)
    assert [one["id"] for one in task["regressions"]["old"]] == ["11"]
    rows = [row for row in lines(run, "verdicts") if row["against"] == "old"]
    orders = [(row["prompt"], row["order"]) for row in rows]
    assert orders == [(str(i), order) for i in range(12) for order in ("first", "second")]
    assert all((row["p"] > 0.5) == (row["verdict"] == 1) for row in rows if row["verdict"] != 0.5)
    manifest = read_manifest(run)
    assert manifest.inputs["judge"].ref == f"judge at {server.url}"
    assert manifest.metrics["win_rate"]["value"] == pytest.approx(9.5 / 12)


def test_bad_answers_are_ties_and_are_counted(place: Place, server: ChatServer):
    """A request that times out for good, and prose. What else is no verdict is tested in `test_llm_judge`."""

    def says(body: dict[str, Any]) -> Reply:
        a, b = shown(body)
        kind = max(a, b, key=len)
        late = said("[[A]]")._replace(wait_s=1.5)
        replies = {"takes its time": late, "prose": said("Both are good.")}
        return replies.get(kind, said("[[A]]" if a == kind else "[[B]]"))

    server.says = says
    kinds = ["takes its time", "prose", "fine answer", "good one"]
    run = place.run(*place.judged(at(server, "timeout_s: 0.5", "at_once: 16"), kinds, ["-"] * len(kinds)))
    found = results(run)["tasks"]["asked"]["against"]["old"]
    assert (found["no_verdict"], found["win_rate"]["value"]) == (4, (2 + 0.5 * 2) / 4)
    assert found["swap"]["consistency"] == found["swap"]["consistency"] | {"value": 1.0, "n": 2}
    errors = {row["prompt"]: row["error"] for row in lines(run, "verdicts") if "error" in row}
    assert "0.5 seconds" in errors["0"]
    assert errors["1"] == "the judge gives no verdict"
    [note] = results(run)["notes"]
    assert note.startswith(f"asked: 4 of 8 verdicts by judge at {server.url} are errors and count as ties (most often:")
    assert "(n=2, fewer than" in (run / "report.html").read_text(), "how many verdicts a consistency of 1.0 is of"


def test_a_judge_that_never_answers_ends_the_run(place: Place, server: ChatServer):
    server.says = lambda _: error(400, "logprobs are not supported")
    told = place.refused(*place.judged(at(server), ["yes"] * 60, ["no"] * 60))
    assert f"stage.judge.url={server.url}: answers by status 400" in told
    assert len(server.asked) < 100


def test_a_run_that_is_killed_asks_nothing_twice(place: Place, server: ChatServer, forks: Forks):
    """What was answered by then. Of what was on its way nobody got the answer."""
    hold = threading.Event()

    def says(_: dict[str, Any]) -> Reply:
        if len(server.answered) >= 9:
            hold.wait(60)
        return said("[[A]]")

    server.says = says
    words = place.judged(at(server, "at_once: 1"), ["yes"] * 12, ["no"] * 12, more=("run.name=killed",))
    child = forks.start(place.folder, *words)
    assert settles(lambda: len(server.asked) == 10 and kept(place) == 9)
    child.send_signal(signal.SIGKILL)
    child.ended()
    hold.set()
    before = [json.dumps(body) for body in server.asked]
    place.run(*words)
    after = [json.dumps(body) for body in server.asked[10:]]
    assert {*before[:9]} & {*after} == set()
    assert (len(after), len({*before, *after})) == (15, 24)
    place.run(*words[:-1], "run.name=again")
    assert len(server.asked) == 25
    prompt = place.folder / "prompt.txt"
    prompt.write_text("{conversation} {answer_a} {answer_b} [[A]] [[B]] [[C]]")
    place.run(*words[:-1], f"stage.judge={{{at(server)}, prompt: {prompt}}}")
    assert len(server.asked) == 49, "another prompt is another judge"


def test_of_two_ranks_one_asks(place: Place, server: ChatServer, forks: Forks):
    words = place.judged(at(server), ["yes"] * 5, ["no"] * 5, more=("run.name=two",))
    ended = ranked(forks, place.folder, *words)
    assert [each.status for each in ended] == [0, 0], [each.err for each in ended]
    assert len(server.asked) == 10


def test_the_key_of_a_judge_stands_nowhere(place: Place, server: ChatServer, monkeypatch: pytest.MonkeyPatch):
    key = "pl4nted-of-the-judges"
    words = place.judged(at(server, "key_env: JUDGE"), ["yes"] * 3, ["no"] * 3)
    assert "stage.judge.key_env=JUDGE: is not set" in place.refused(*words)
    monkeypatch.setenv("JUDGE", key)
    place.run(*words)
    assert {heard["authorization"] for heard in server.heard} == {f"Bearer {key}"}
    server.says = lambda _: error(403, f"{key} is no key of mine")
    assert "*** is no key of mine" in place.refused(*words, "stage.judge.model=other")
    assert not [path for path, text in everything_in(place.root).items() if key in text]


def test_what_is_refused_before_anybody_is_asked(place: Place, server: ChatServer):
    words = place.judged(at(server), ["yes"] * 3, ["no"] * 3)
    (place.folder / "prompt.txt").write_text("Who is better? {answer_a} {answer_b} [[A]] [[B]] [[C]]")
    for judge, problem in (
        (f"{{{at(server)}, prompt: {place.folder / 'prompt.txt'}}}", "has the place {conversation} 0 times"),
        (f"{{{at(server)}, prompt: nowhere.txt}}", "stage.judge.prompt=nowhere.txt: there is no such file"),
        ("nobody", "stage.judge=nobody: is no judge"),
        ("{url: localhost, model: x}", "stage.judge.url=localhost"),
        ("{url: 'http://h/v1'}", "stage.judge.model"),
    ):
        assert problem in place.refused(*words, f"stage.judge={judge}"), judge
    gate = "eval.gates=[{name: g, task: asked, against: old, is: superior}]"
    assert "eval.gates" in place.refused(*words, gate) or "gates are about" in place.refused(*words, gate)
    assert "stage.judge" in place.refused("stage=eval", f"stage.judge={{{at(server)}}}", f"run.root={place.root}")
    assert server.asked == []


def test_the_tokens_that_a_judge_took_are_in_the_metrics(place: Place, server: ChatServer):
    reply = said("[[A]]")
    reply.body["usage"] = {"prompt_tokens": 100, "completion_tokens": 7}
    server.says = lambda _: reply
    run = place.run(*place.judged(at(server), ["a", "b"], ["c", "d"]))
    usage = {"asked": 4, "prompt_tokens": 400, "completion_tokens": 28, "uncounted": 0}
    assert read_manifest(run).metrics["judge_usage"] == usage
    server.says = lambda _: said("[[A]]")
    again = place.run(*place.judged(at(server), ["a", "e"], ["c", "d"]))  # one pair is known, and is not asked again
    usage = {"asked": 2, "prompt_tokens": 0, "completion_tokens": 0, "uncounted": 2}
    assert read_manifest(again).metrics["judge_usage"] == usage
