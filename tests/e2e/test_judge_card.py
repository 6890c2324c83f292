"""The card of a judge from the command line: what it is measured on, what it says, and which gates it lets decide."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from workshop import Ready

from align.__main__ import main
from align.registry.gates import verdict_on
from align.run import file_digest, read_manifest

VOWEL = ("reward=rules", "reward.rules=[{rule: regex, pattern: e}]")
OTHER = ("reward=rules", "reward.rules=[{rule: regex, pattern: o}]")
SYSTEMS = "stage.systems={new: sft:s, old: base}"
GATE = "{name: g, task: chat, against: old, is: not_worse, margin: 0.9, least_n: 2}"
CHAT = "eval.tasks=[{name: chat, prompts: 8}]"


class Bench:
    """Cards and suites in one root."""

    def __init__(self, ready: Ready, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self.ready, self.capsys, self.folder = ready, capsys, folder

    def ended(self, *words: str) -> int:
        return main(["stage=eval", *words, f"run.root={self.ready.root}"])

    def run(self, *words: str, status: int = 0) -> Path:
        assert self.ended(*words) == status, self.capsys.readouterr()
        self.said = self.capsys.readouterr().out
        return Path(self.said.strip().splitlines()[-1])

    def refused(self, *words: str) -> str:
        assert self.ended(*words) == 2, self.capsys.readouterr()
        found = self.capsys.readouterr()
        assert "Traceback" not in found.err
        return found.err

    def pairs(self, rows: Sequence[dict[str, Any]], name: str = "pairs") -> list[str]:
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        return ["eval=judge", "data=jsonl", f"data.path={path}"]

    def card(self, name: str, *words: str, rows: int = 120, right: int | None = None) -> dict[str, Any]:
        """The card of a judge on pairs of which it gets so many right; all where nobody says."""
        right = rows if right is None else right
        found = [row(i, i < right) for i in range(rows)]
        self.run(*self.pairs(found, name), *(words or VOWEL), f"run.name={name}")
        return json.loads((self.ready.root / "eval" / name / "artifact" / "card.json").read_text())

    def suite(self, *words: str) -> list[str]:
        judge = () if any(word.startswith("reward=") for word in words) else VOWEL
        return [*self.ready.data, "rollout.max_new_tokens=12", SYSTEMS, *judge, *words]


def row(i: int, right: bool) -> dict[str, Any]:
    """A pair whose better answer has an e, or has none."""
    better, worse = ("the answer", "rrr" * (1 + i % 7)) if right else ("rrr" * (1 + i % 7), "the answer")
    return {"id": f"p{i}", "prompt": f"Number {i}?", "chosen": better, "rejected": worse, "source": "ab"[i % 2]}


@pytest.fixture
def bench(ready: Ready, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Bench:
    return Bench(ready, capsys, tmp_path)


def artifact(run: Path, name: str) -> dict[str, Any]:
    return json.loads((run / "artifact" / name).read_text())


def test_the_card_says_what_the_verdicts_say(bench: Bench):
    """Recomputed from the evidence by means that share nothing with the code."""
    card = bench.card("recomputed", rows=130, right=100)
    run = bench.ready.root / "eval" / "recomputed"
    rows = [json.loads(line) for line in (run / "artifact" / "verdicts.jsonl").read_text().splitlines()]
    same = [row["verdict"] == row["reference"] for row in rows]
    assert (len(rows), sum(same)) == (130, 100)
    assert card["agreement"]["raw"]["value"] == pytest.approx(100 / 130)
    assert card["agreement"]["verdicts"] == card["n"] == card["data"]["pairs"] == 130
    assert {row["reference"] for row in rows} == {0.0, 1.0}, "either place has better answers"
    assert 40 <= sum(row["reference"] for row in rows) <= 90
    for row in rows:
        first, second = row["scores"]
        assert row["verdict"] == (first > second) + (first == second) / 2
    longer = [s for row, s in zip(rows, same, strict=True) if better_is_longer(row)]
    assert card["by_length"]["longer"]["value"] == pytest.approx(sum(longer) / len(longer))
    assert card["by_source"]["a"]["n"] == card["by_source"]["b"]["n"] == 65
    assert card["swap"] is None
    assert "calibration" not in card, "units of a rule are no odds"
    shown = [json.loads(line) for line in (run / "held_out.jsonl").read_text().splitlines()]
    assert sum(pair["margin"] > 0 for pair in shown) == 100
    assert all(("e" in pair["chosen"]) == (pair["margin"] > 0) for pair in shown)
    assert card["reference"] == "recomputed.jsonl"
    assert "agrees with recomputed.jsonl on 77" in bench.said
    assert "It may decide gates." in bench.said
    page = (run / "report.html").read_text()
    assert "the report could not be made" not in (run / "log.txt").read_text()
    assert "It may decide gates." in page
    assert "accuracy where the better answer is the longer one" in page
    assert read_manifest(run).metrics["judge_agreement"]["value"] == pytest.approx(100 / 130)


def better_is_longer(row: dict[str, Any]) -> bool:
    first, second = row["characters"]
    return (first > second) if row["reference"] == 1 else (second > first)


def test_a_reward_model_is_measured_on_what_it_did_not_learn_from(bench: Bench):
    """Its own held-out pairs, so that its accuracy is the one that training found."""
    votes = ("eval=judge", "data=annotations", "data.allow_simulated=true", "reward=learned", "reward.ref=reward:a")
    card = artifact(run := bench.run(*votes, "run.name=votes"), "card.json")
    trained = read_manifest(bench.ready.root / "reward" / "a").metrics
    assert card["data"]["left_out"] > 0
    assert card["data"]["pairs"] - card["ties"]["pairs"] == trained["held_out_pairs"]
    assert card["ties"]["pairs"] > 0, "pairs that were called equal are measured on, and never trained on"
    assert card["accuracy"] == pytest.approx(trained["accuracy"])
    assert card["calibration"]["log_loss"]["value"] == pytest.approx(trained["loss"], abs=1e-4), "all on one prompt"
    rows = [json.loads(line) for line in (run / "artifact" / "verdicts.jsonl").read_text().splitlines()]
    decided = [(row["scores"], row["reference"]) for row in rows if row["reference"] != 0.5]
    gaps = [(a - b) * (1 if won else -1) for (a, b), won in decided]
    assert sum(math.log1p(math.exp(-gap)) for gap in gaps) / len(gaps) == pytest.approx(trained["loss"], abs=1e-4)
    assert card["reference"] == "a simulated annotator (vader)"
    assert "left out: the judge learned from their prompts" in bench.said
    assert "expected calibration error" in bench.said
    digest = read_manifest(run).inputs["data"]
    assert digest.project == "default"
    own = ("eval=judge", "data=annotations", "data.allow_simulated=true", "reward=sentiment")
    assert "would agree with itself" in bench.refused(*own)


def test_a_judge_with_a_card_decides_and_the_verdict_says_so(bench: Bench):
    card = bench.card("good", right=100)
    run = bench.run(*bench.suite(CHAT, f"eval.gates=[{GATE}]", "stage.card=eval:good", "run.name=decided"))
    said = artifact(run, "verdicts/g.json")
    file = bench.ready.root / "eval" / "good" / "artifact" / "card.json"
    assert said["judge"] == "rules (regex)" == card["judge"]["title"]
    assert said["card"] == file_digest(file) == said["inputs"]["card"]
    assert said["agreement"] == {**card["agreement"]["raw"], "with": "good.jsonl"}
    manifest = read_manifest(run)
    assert (manifest.inputs["card"].digest, manifest.inputs["card"].run) == (file_digest(file), "eval:good")
    won = artifact(run, "results.json")["tasks"]["chat"]["against"]["old"]["win_rate"]["value"]
    assert said["figure"]["value"] == pytest.approx(2 * won - 1), "wins less losses"
    assert verdict_on(bench.ready.root, "g", manifest.inputs["systems.new"].digest)[0] is True
    bench.card("newer", rows=110)
    other = bench.run(*bench.suite(CHAT, f"eval.gates=[{GATE}]", "stage.card=eval:newer"))
    assert other.name not in ("decided", bench.run(*bench.suite(CHAT)).name), "another card is another run"


def test_a_card_needs_a_hundred_verdicts(bench: Bench):
    gated = bench.suite(CHAT, f"eval.gates=[{GATE}]")
    bench.card("few", rows=99)
    assert "its card has 99 verdicts, and 100 are needed" in bench.refused(*gated, "stage.card=eval:few")
    assert "It decides no gate: its card has 99 verdicts" in bench.said
    bench.card("enough", rows=100)
    bench.run(*gated, "stage.card=eval:enough", "run.name=hundred")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ((), "stage.card=(none): gate g is decided by rules (regex), and nothing says how often that is right"),
        (("stage.card=eval:nobody",), "stage.card=eval:nobody: there is no such run"),
        (("stage.card=sft:s",), "is no run of eval=judge"),
        (("stage.card=eval:other",), "this card is of another judge, rules (regex): rules"),
        (("stage.card=eval:weak",), "its agreement with weak.jsonl is 0.62 [0.53, 0.70], whose lower end is not above"),
        (("stage.card=eval:wide",), "its agreement has an interval at level 0.6, and 0.95 is needed"),
        (("stage.card=eval:blind", "reward=rules", "reward.rules=[{rule: regex, pattern: Z}]"), "is 0.00 [0.00, 0.03]"),
        (("stage.card=eval:sure", "eval.gates=[{name: g, task: chat, is: superior}]"), "[0].task=chat: asks for"),
        (("stage.card=eval:sure", f"eval.gates=[{GATE[:-1]}, min_agreement: 0.98}}]"), "is not above 0.98"),
        (("stage.card=eval:sure", f"eval.gates=[{GATE[:-1]}, min_agreement: 0.4}}]"), "min_agreement=0.4"),
        (("stage.card=eval:sure", f"eval.gates=[{GATE[:-1]}, min_agreement: 1}}]"), "which no agreement is above"),
        (("stage.card=eval:sure", "eval.gates=null"), "and no gate is decided by one"),
        (
            ("eval.tasks=[{name: chat, prompts: 8, check: {kind: regex, pattern: e}}]",
             f"eval.gates=[{GATE[:-1]}, min_agreement: 0.7}}]"),
            "eval.gates[0].min_agreement=0.7: is of judges, and task chat has checks",
        ),
    ],
)  # fmt: skip
def test_what_may_not_decide(bench: Bench, words: tuple[str, ...], problem: str):
    if not (bench.ready.root / "eval" / "blind").exists():
        bench.card("sure")
        bench.card("weak", right=74)
        bench.card("other", *OTHER, rows=120)
        bench.card("wide", *VOWEL, "stage.level=0.6")
        bench.card("blind", "reward=rules", "reward.rules=[{rule: regex, pattern: Z}]")
    answers = bench.ready.root / "answers.db"
    before = answers.exists() and file_digest(answers)
    assert problem in bench.refused(*bench.suite(CHAT, f"eval.gates=[{GATE}]", *words))
    assert (answers.exists() and file_digest(answers)) == before, "it was refused before anything was generated"


def test_what_a_system_was_optimised_against_decides_nothing(bench: Bench):
    assert main([*bench.ready.ppo, "run.name=p", f"run.root={bench.ready.root}"]) == 0
    bench.run(*bench.pairs([row(i, right=True) for i in range(120)], "proxy"), "reward=learned", "reward.ref=reward:a",
              "run.name=proxy")  # fmt: skip
    judge = ("reward=learned", "reward.ref=reward:a", "stage.allow_proxy=true", "stage.card=eval:proxy")
    gated = bench.suite(CHAT, f"eval.gates=[{GATE}]", *judge, "stage.systems={new: ppo:p, old: base}")
    assert "optimised against it: a proxy decides nothing" in bench.refused(*gated)


def test_a_card_that_was_changed_is_refused(bench: Bench):
    bench.card("changed", right=70)
    file = bench.ready.root / "eval" / "changed" / "artifact" / "card.json"
    gated = bench.suite(CHAT, f"eval.gates=[{GATE}]", "stage.card=eval:changed")
    assert "whose lower end is not above" in bench.refused(*gated)
    found = json.loads(file.read_text())
    found["agreement"]["raw"]["low"] = 0.9
    file.write_text(json.dumps(found))
    assert "is not the file that was published (its sha256 differs)" in bench.refused(*gated)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("stage.systems={a: sft:s, b: base}",), "stage.systems="),
        (("stage.prompts=3",), "stage.prompts=3"),
        (("stage.seen=report",), "stage.seen=report"),
        (("stage.card=eval:x",), "stage.card=eval:x"),
        (("artifact=sft:s",), "artifact=sft:s"),
        (("init=base",), "init=base"),
        ((CHAT,), "eval.tasks="),
        ((f"eval.gates=[{GATE}]",), "eval.gates="),
        (("model=pocket",), "model.path="),
        (("method=lora",), "method=lora"),
        (("rollout.max_new_tokens=3",), "rollout.max_new_tokens=3"),
        (("data.eval_path=x.jsonl",), "data.eval_path=x.jsonl"),
        (("data=chitchat", "data.path=null"), "holds no preference pairs"),
        (("data.reasoning=mask",), "data.reasoning=mask"),
        (("reward=learned", "reward.ref=reward:nobody"), "there is no such run"),
    ],
)
def test_settings_that_measure_no_judge_are_refused(bench: Bench, words: tuple[str, ...], problem: str):
    assert problem in bench.refused(*bench.pairs([row(0, right=True)]), *words)


def test_best_of_four(bench: Bench):
    """One right answer and three wrong ones: all tell, two level at the top, the wrong one."""
    rows = [
        {"prompt": "A?", "chosen": ["e"], "rejected": ["x", "y", "z"], "subset": "one"},
        {"prompt": "B?", "chosen": ["e"], "rejected": ["xe", "y", "z"], "subset": "one"},
        {"prompt": "C?", "chosen": ["x"], "rejected": ["e", "y", "z"], "subset": "two"},
        {"prompt": "D?", "chosen": ["x"], "rejected": ["w", "y", "z"], "subset": "two"},
        {"prompt": "E?", "chosen": ["e", "ee"], "rejected": ["w", "y"], "subset": "two"},
    ]
    bench.run(*bench.pairs(rows, "four"), *VOWEL, "run.name=four")
    card = artifact(bench.ready.root / "eval" / "four", "card.json")
    assert (card["best_of"]["4"]["value"], card["best_of"]["4"]["n"]) == ((1 + 1 / 2 + 0 + 1 / 4) / 4, 4)
    assert [*card["by_source"]] == ["one", "two"]
    assert "best of 4 (chance has 0.25)" in bench.said
