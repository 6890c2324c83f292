"""Reports on judges from the command line: their data, their figures, and the gates that they may decide."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from stage_commands import Ready
from suite_evaluations import Evaluations, read_artifact_rows

from align.registry.gates import decide_verdict
from align.run import file_digest, read_manifest

VOWEL = ("reward=rules", "reward.rules=[{rule: regex, pattern: e}]")
OTHER = ("reward=rules", "reward.rules=[{rule: regex, pattern: o}]")
SYSTEMS = "stage.systems={new: sft:s, old: base}"
GATE = "{name: g, task: chat, against: old, is: not_worse, margin: 0.9, least_n: 2}"
CHAT = "eval.tasks=[{name: chat, prompts: 8}]"


class JudgeReports(Evaluations):
    """Reports on judges and suites in one root."""

    def __init__(self, ready: Ready, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        super().__init__(ready.root, folder, capsys)
        self.data = ready.data

    def words(self, *more: str) -> list[str]:
        return ["stage=eval", *more, f"run.root={self.root}"]

    def pairs(self, rows: Sequence[dict[str, Any]], name: str = "pairs") -> list[str]:
        return ["eval=judge", "data=jsonl", f"data.path={self.file(f'{name}.jsonl', rows)}"]

    def card(self, name: str, *words: str, rows: int = 120, right: int | None = None) -> dict[str, Any]:
        """Return the report on a judge that prefers the better answer in `right` of `rows` pairs, by default in all."""
        right = rows if right is None else right
        pair_rows = [row(i, i < right) for i in range(rows)]
        return artifact(self.run(*self.pairs(pair_rows, name), *(words or VOWEL), f"run.name={name}"), "card.json")

    def suite(self, *words: str) -> list[str]:
        judge = () if any(word.startswith("reward=") for word in words) else VOWEL
        return [*self.data, "rollout.max_new_tokens=12", SYSTEMS, *judge, *words]


def row(i: int, right: bool) -> dict[str, Any]:
    """Build a pair that the judge gets right or wrong: it prefers the answer with an e."""
    better, worse = ("the answer", "rrr" * (1 + i % 7)) if right else ("rrr" * (1 + i % 7), "the answer")
    return {"id": f"p{i}", "prompt": f"Number {i}?", "chosen": better, "rejected": worse, "source": "ab"[i % 2]}


@pytest.fixture
def bench(ready: Ready, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> JudgeReports:
    return JudgeReports(ready, tmp_path, capsys)


def artifact(run: Path, name: str) -> dict[str, Any]:
    return json.loads((run / "artifact" / name).read_text())


def test_the_card_says_what_the_verdicts_say(bench: JudgeReports):
    """The figures are computed again from the verdicts, without the code under test."""
    card = bench.card("recomputed", rows=130, right=100)
    run = bench.root / "eval" / "recomputed"
    rows = read_artifact_rows(run, "verdicts")
    is_correct = [row["verdict"] == row["reference"] for row in rows]
    assert (len(rows), sum(is_correct)) == (130, 100)
    assert card["agreement"]["raw"]["value"] == pytest.approx(100 / 130)
    assert card["agreement"]["verdicts"] == card["n"] == card["data"]["pairs"] == 130
    assert 40 <= sum(row["reference"] for row in rows) <= 90, "either place has better answers"
    for row in rows:
        first, second = row["scores"]
        assert row["verdict"] == (first > second) + (first == second) / 2
    correct_if_longer = [correct for row, correct in zip(rows, is_correct, strict=True) if better_is_longer(row)]
    assert card["by_length"]["longer"]["value"] == pytest.approx(sum(correct_if_longer) / len(correct_if_longer))
    assert card["by_source"]["a"]["n"] == card["by_source"]["b"]["n"] == 65
    assert "calibration" not in card, "units of a rule are no odds"
    held_out_pairs = [json.loads(line) for line in (run / "held_out.jsonl").read_text().splitlines()]
    assert sum(pair["margin"] > 0 for pair in held_out_pairs) == 100
    assert "agrees with recomputed.jsonl on 77" in bench.output
    assert "It may decide gates." in bench.output
    assert "the report could not be made" not in (run / "log.txt").read_text()
    assert "It may decide gates." in (run / "report.html").read_text()


def test_lists_of_answers_are_one_ranking_of_four(bench: JudgeReports):
    rows = [
        {"prompt": "A?", "chosen": ["e"], "rejected": ["x", "y", "z"], "subset": "one"},  # finds the best
        {"prompt": "B?", "chosen": ["e"], "rejected": ["xe", "y", "z"], "subset": "one"},  # two are equal at the top
        {"prompt": "C?", "chosen": ["x"], "rejected": ["e", "y", "z"], "subset": "two"},  # finds another
        {"prompt": "D?", "chosen": ["x"], "rejected": ["w", "y", "z"], "subset": "two"},  # all are equal
        {"prompt": "E?", "chosen": ["e", "ee"], "rejected": ["w", "y"], "subset": "two"},  # has two best
    ]
    run = bench.run(*bench.pairs(rows, "four"), *VOWEL, "run.name=four")
    report = artifact(run, "card.json")
    assert report["best_of"]["4"]["value"] == (1 + 1 / 2 + 0 + 1 / 4) / 4
    assert report["best_of"]["4"]["n"] == 4
    assert [*report["by_source"]] == ["one", "two"]
    assert "best of 4 (chance has 0.25)" in (run / "report.html").read_text()


def better_is_longer(row: dict[str, Any]) -> bool:
    first, second = row["characters"]
    return (first > second) if row["reference"] == 1 else (second > first)


def test_a_reward_model_is_measured_on_what_it_did_not_learn_from(bench: JudgeReports):
    """The data are the model's held-out pairs, so its accuracy is the one that training measured."""
    votes = ("eval=judge", "data=annotations", "data.allow_simulated=true")
    run = bench.run(*votes, "reward=learned", "reward.ref=reward:a", "run.name=votes")
    card = artifact(run, "card.json")
    trained = read_manifest(bench.root / "reward" / "a").metrics
    assert card["data"]["left_out"] > 0
    assert card["data"]["pairs"] - card["ties"]["pairs"] == trained["held_out_pairs"]
    assert card["ties"]["pairs"] > 0, "pairs that were called equal are measured on, and never trained on"
    assert card["accuracy"] == pytest.approx(trained["accuracy"])
    assert card["calibration"]["log_loss"]["value"] == pytest.approx(trained["loss"], abs=1e-4), "all on one prompt"
    decided = [
        (row["scores"], row["reference"]) for row in read_artifact_rows(run, "verdicts") if row["reference"] != 0.5
    ]
    gaps = [(a - b) * (1 if won else -1) for (a, b), won in decided]
    assert sum(math.log1p(math.exp(-gap)) for gap in gaps) / len(gaps) == pytest.approx(trained["loss"], abs=1e-4)
    assert "left out: the judge was trained on their prompts" in bench.output
    assert "so it would be measured against itself" in bench.expect_error(*votes, "reward=sentiment")


def test_a_judge_with_a_card_decides_and_the_verdict_says_so(bench: JudgeReports):
    card = bench.card("good", right=100)
    run = bench.run(*bench.suite(CHAT, f"eval.gates=[{GATE}]", "stage.card=eval:good", "run.name=decided"))
    verdict = artifact(run, "verdicts/g.json")
    digest = file_digest(bench.root / "eval" / "good" / "artifact" / "card.json")
    assert verdict["judge"] == "rules (regex)" == card["judge"]["title"]
    assert verdict["card"] == digest == verdict["inputs"]["card"]
    assert verdict["agreement"] == {**card["agreement"]["raw"], "with": "good.jsonl"}
    manifest = read_manifest(run)
    assert (manifest.inputs["card"].digest, manifest.inputs["card"].run) == (digest, "eval:good")
    win_rate = artifact(run, "results.json")["tasks"]["chat"]["against"]["old"]["win_rate"]["value"]
    assert verdict["figure"]["value"] == pytest.approx(2 * win_rate - 1), "wins less losses"
    assert decide_verdict(bench.root, "g", manifest.inputs["systems.new"].digest)[0] is True
    assert run.name != bench.run(*bench.suite(CHAT)).name, "without a card it is another run"


def test_what_may_not_decide(bench: JudgeReports):
    """Cards that may not decide a gate are refused before anything is generated.

    `test_judge_reports` tests the other faults of a card.
    """
    sure = "stage.card=eval:sure"
    bench.card("sure")
    bench.card("weak", right=74)
    bench.card("other", *OTHER)
    answers = bench.root / "answers.db"
    before = answers.exists() and file_digest(answers)
    for words, problem in (
        (
            (),
            "gate g is decided by rules (regex), and no card (stage.card) says how often it is right",
        ),
        (("stage.card=eval:nobody",), "stage.card=eval:nobody: there is no such run"),
        (("stage.card=sft:s",), "is no run of eval=judge"),
        (("stage.card=eval:other",), "this card is of another judge, rules (regex): rules"),
        (("stage.card=eval:weak",), "its agreement with weak.jsonl is 0.62 [0.53, 0.70], whose lower end is not above"),
        (
            (sure, "eval.gates=[{name: g, task: chat, is: superior, margin: 0.5}]"),
            "[0].task=chat: is a bound on a judge's mean",
        ),
        ((sure, f"eval.gates=[{GATE[:-1]}, min_agreement: 0.98}}]"), "is not above 0.98"),
        ((sure, f"eval.gates=[{GATE[:-1]}, min_agreement: 1}}]"), "and no agreement can be above 1"),
        ((sure, "eval.gates=null"), "and no gate needs it"),
    ):
        assert problem in bench.expect_error(*bench.suite(CHAT, f"eval.gates=[{GATE}]", *words)), words
    assert (answers.exists() and file_digest(answers)) == before
    file = bench.root / "eval" / "sure" / "artifact" / "card.json"
    file.write_text(file.read_text().replace('"low"', ' "low"', 1))
    error = bench.expect_error(*bench.suite(CHAT, f"eval.gates=[{GATE}]", sure))
    assert "is not the file that was published (its sha256 differs)" in error


def test_what_a_system_was_optimised_against_decides_nothing(bench: JudgeReports, trained_by_ppo: Path):
    bench.run(
        *bench.pairs([row(i, right=True) for i in range(120)], "proxy"),
        "reward=learned",
        "reward.ref=reward:a",
        "run.name=proxy",
    )
    judge = ("reward=learned", "reward.ref=reward:a", "stage.allow_proxy=true", "stage.card=eval:proxy")
    systems = f"stage.systems={{new: '{trained_by_ppo}', old: base}}"
    error = bench.expect_error(*bench.suite(CHAT, f"eval.gates=[{GATE}]", *judge, systems))
    assert "optimised against it: such a proxy may not decide gates" in error
