"""Cards of judges: the pairs that they are measured on, their figures, whose they are, and whom they let decide."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from align.config.scorers import CHOICES, build_reward_spec
from align.core.errors import CorruptFile, InputError
from align.core.types import Message, Preference
from align.evals.judges.identity import JudgeIdentity, describe_difference, identify_scorer
from align.evals.judges.report import (
    JudgeOpinions,
    JudgeReport,
    PairExample,
    build_pair_examples,
    choose_report,
    digest_examples,
    drop_trained_pairs,
    explain_shortfall,
    find_best_answers,
    measure_judge_on_pairs,
    read_report,
)
from align.run.manifest import parse_input


def pref(prompt: str, chosen: str, rejected: str, **more: Any) -> Preference:
    return Preference(
        (Message("user", prompt),), (Message("assistant", chosen),), (Message("assistant", rejected),), **more
    )


def texts(pair: PairExample) -> tuple[str, str]:
    return pair.first[0].content, pair.second[0].content


def better(pair: PairExample) -> str:
    return texts(pair)[0 if pair.verdict == 1 else 1]


def test_either_place_has_better_answers_and_the_seed_draws_them():
    prefs = [pref(f"q{i}", "good", "bad", id=str(i)) for i in range(200)]
    found = build_pair_examples(prefs)
    assert all(better(pair) == "good" for pair in found)
    assert 70 < sum(pair.verdict for pair in found) < 130
    assert build_pair_examples(prefs) == found
    assert [pair.verdict for pair in build_pair_examples(prefs, seed=1)] != [pair.verdict for pair in found]


def test_a_pair_counts_once_and_most_people_decide():
    a, b = "one answer", "another"
    votes = [pref("q", a, b, id="1"), pref("q", a, b, id="2"), pref("q", b, a, id="3")]
    (pair,) = build_pair_examples(votes)
    assert better(pair) == a
    assert sorted(pair.votes) in ([0.0, 0.0, 1.0], [0.0, 1.0, 1.0])
    (pair,) = build_pair_examples(votes[1:])
    assert pair.is_tied
    (pair,) = build_pair_examples(votes[:1], [pref("q", b, a, id="4"), pref("q", a, b, id="5")])
    assert better(pair) == a, "two say equal, one says better"
    assert pair.votes.count(0.5) == 2
    assert len(build_pair_examples([*votes, pref("q", a, "a third", id="1")])) == 2
    same = build_pair_examples([pref("q", a, b, id="x"), pref("r", a, b, id="x"), pref("s", a, b)])
    assert [pair.item.id for pair in same] == ["x", "x#2", "pair 3"]


def test_what_shares_a_prompt_or_a_ranking_is_one_cluster():
    found = build_pair_examples([
        pref("q", "a", "b", id="1"), pref("q", "a", "c", id="2"), pref("r", "a", "b", id="3", group_id="g"),
        pref("s", "a", "b", id="4", group_id="g"), pref("t", "a", "b", id="5"),
    ])  # fmt: skip
    clusters = [pair.item.cluster for pair in found]
    assert clusters[0] == clusters[1]
    assert clusters[2] == clusters[3]
    assert len({*clusters}) == 3


def test_a_pair_keeps_its_sides_with_what_ended_them():
    for i in range(8):
        (pair,) = build_pair_examples([pref("q", "good", "bad", id=str(i), rejected_ended=False)])
        assert dict(zip(texts(pair), pair.ended, strict=True)) == {"good": True, "bad": False}
        made = pair.to_preference()
        assert (made.chosen[0].content, made.chosen_ended, made.rejected_ended) == ("good", True, False)
        first, second = pair.conversations
        assert [turn.content for turn in first.messages] == ["q", texts(pair)[0]]
        assert [turn.content for turn in second.messages] == ["q", texts(pair)[1]]


def test_the_digest_is_of_what_was_said_and_not_of_its_order():
    prefs = [pref("q", "a", "b", id="1"), pref("r", "c", "d", id="2")]
    digest = digest_examples(build_pair_examples(prefs))
    assert digest == digest_examples(build_pair_examples(prefs[::-1], seed=5))
    assert digest == digest_examples(build_pair_examples([pref("q", "a", "b", id="9"), prefs[1]]))
    others = [
        [pref("q", "b", "a", id="1"), prefs[1]], [pref("q!", "a", "b", id="1"), prefs[1]],
        [pref("q", "a", "b!", id="1"), prefs[1]], prefs[:1],
    ]  # fmt: skip
    found = {digest_examples(build_pair_examples(other)) for other in others} | {
        digest_examples(build_pair_examples(prefs[1:], prefs[:1]))
    }
    assert len(found | {digest}) == 6


class Learned:
    """Stands in for `Seen`: the prompts that a judge learned from."""

    def __init__(self, *prompts: str) -> None:
        self.prompts = prompts

    def asks(self, turns: Sequence[Message]) -> bool:
        return turns[-1].content in self.prompts


def test_pairs_that_any_part_of_the_judge_learned_from_are_left_out():
    found = build_pair_examples([pref(q, "a", "b", id=q) for q in "pqrs"])
    kept = drop_trained_pairs(found, [Learned("p"), Learned("r", "x")])  # pyright: ignore[reportArgumentType]
    assert [pair.item.id for pair in kept] == ["q", "s"]


def test_the_best_of_several_is_who_was_preferred_to_each():
    ranking = [pref("q", "a", "b"), pref("q", "a", "c"), pref("q", "b", "c")]
    pair, chain = [pref("r", "a", "b")], [pref("s", "a", "b"), pref("s", "c", "d")]
    tied = [pref("t", "a", "b"), pref("t", "a", "c")]
    found = find_best_answers(build_pair_examples([*ranking, *pair, *chain, tied[0]], tied[1:]))
    assert len(found) == 1
    ((won),) = found.values()
    assert [texts(p)[0 if first else 1] for p, first in won] == ["a", "a"]


def measure(
    pairs: Sequence[PairExample],
    verdicts: Sequence[float],
    swapped: Sequence[float] | None = None,
    log_odds: Sequence[float | None] | None = None,
    failed: Sequence[bool] = (),
) -> dict[str, Any]:
    errors = ["no verdict" if bad else "" for bad in failed] or [""] * len(pairs)
    return measure_judge_on_pairs(pairs, JudgeOpinions(verdicts, swapped, log_odds or [None] * len(pairs), errors))


def judged(pairs: Sequence[PairExample], says: Mapping[str, float]) -> list[float]:
    """By prompt how far a judge is for the better answer; of a tie, how far for the first."""
    found = (says[pair.item.prompt.messages[0].content] for pair in pairs)
    return [1 - said if pair.verdict == 0 else said for pair, said in zip(pairs, found, strict=True)]


def test_the_figures_of_ten_pairs_by_hand():
    """Eight decided: five right, two wrong, one tie of the judge. Two ties, of which the judge sees one."""
    decided = [pref(f"q{i}", "long answer" if i < 4 else "s", "rest", source="xy"[i % 2], id=f"{i}") for i in range(8)]
    ties = [pref(f"t{i}", "some", "more", id=f"t{i}") for i in range(2)]
    pairs = build_pair_examples(decided, ties)
    says = {f"q{i}": 1.0 for i in range(5)} | {"q5": 0.0, "q6": 0.0, "q7": 0.5, "t0": 0.5, "t1": 1.0}
    found = measure(pairs, judged(pairs, says))
    assert found["agreement"]["raw"]["value"] == pytest.approx(6 / 10)
    assert found["agreement"]["verdicts"] == 10
    assert (found["accuracy"]["value"], found["accuracy"]["n"]) == (5 / 8, 8)
    assert found["by_length"]["longer"]["value"] == 1.0
    assert found["by_length"]["shorter"]["value"] == 1 / 4
    assert {name: one["value"] for name, one in found["by_source"].items()} == {"x": 3 / 4, "y": 2 / 4}
    assert found["ties"] == {"pairs": 2, "judge": 2, "both": 1}
    assert found["swap"] is None
    assert "calibration" not in found
    assert "between_people" not in found
    json.dumps(found, allow_nan=False)


def test_a_judge_that_goes_by_place_agrees_on_nothing():
    pairs = build_pair_examples([pref(f"q{i}", "good", "bad", id=str(i)) for i in range(120)])
    always_a = measure(pairs, [1.0] * 120, swapped=[0.0] * 120)
    assert always_a["swap"]["consistency"]["value"] == 0
    assert always_a["swap"]["shown_first"]["value"] == 1
    assert always_a["agreement"]["raw"]["value"] == 0
    assert always_a["accuracy"]["value"] == 0


def test_calibration_is_of_the_pairs_that_were_decided():
    pairs = build_pair_examples(
        [pref(f"q{i}", "good", "bad", id=str(i)) for i in range(4)], [pref("t", "a", "b", id="t")]
    )
    odds = [math.log(3) * (1 if pair.verdict == 1 else -1) for pair in pairs[:4]] + [9.0]
    found = measure(pairs, [float(o > 0) for o in odds], log_odds=odds)["calibration"]
    assert found["log_loss"]["value"] == pytest.approx(-math.log(0.75))
    assert found["brier"]["value"] == pytest.approx(1 / 16)
    assert found["ece"] == pytest.approx(0.25), "each is sure by 0.75, and right"


def test_people_beside_each_other():
    votes = [pref("q", "a", "b", id="1"), pref("q", "a", "b", id="2"), pref("q", "b", "a", id="3")]
    pairs = build_pair_examples([*votes, pref("r", "a", "b", id="4"), pref("r", "a", "b", id="5"), pref("s", "a", "b")])
    found = measure(pairs, [pair.verdict for pair in pairs])
    assert (found["between_people"]["value"], found["between_people"]["n"]) == (pytest.approx((1 / 3 + 1) / 2), 2)


def test_a_judge_that_calls_everything_equal_agrees_with_ties_and_is_no_better_than_chance():
    """As a server whose answers nobody can read does: no verdict is a tie."""
    ties = [pref(f"t{i}", "some", "more", id=f"t{i}") for i in range(90)]
    pairs = build_pair_examples([pref(f"q{i}", "a", "b", id=f"q{i}") for i in range(30)], ties)
    found = measure(pairs, [0.5] * 120, swapped=[0.5] * 120)
    assert found["agreement"]["raw"]["low"] > 0.6
    kappa = found["agreement"]["kappa"]
    assert kappa is None or kappa["low"] is None or kappa["low"] <= 0
    raw = found["agreement"]["raw"]
    low = None if kappa is None else kappa["low"]
    assert "chance would do as well" in explain_shortfall(JudgeReport(JUDGE, "c", "people", raw, low, 120, 1.0, 0.95))


def test_a_pair_without_a_verdict_is_wrong_and_no_tie():
    """Six decided and two ties, all right but for a failure on one of each."""
    decided = [pref(f"q{i}", "good", "bad", id=str(i)) for i in range(6)]
    pairs = build_pair_examples(decided, [pref(f"t{i}", "some", "more", id=f"t{i}") for i in range(2)])
    which = {"0", "t0"}
    failed = [pair.item.id in which for pair in pairs]
    first = [0.5 if bad else pair.verdict for pair, bad in zip(pairs, failed, strict=True)]
    second = [pair.verdict for pair in pairs]  # the other order is there, and right
    found = measure(pairs, first, second, failed=failed)
    assert found["errors"] == 2
    assert found["agreement"]["raw"]["value"] == 6 / 8
    assert found["agreement"]["verdicts"] == 8
    assert found["accuracy"]["value"] == 5 / 6
    assert found["swap"]["consistency"]["value"] == 6 / 8
    assert found["ties"] == {"pairs": 2, "judge": 1, "both": 1}
    assert measure(pairs, second, second)["errors"] == 0
    json.dumps(found, allow_nan=False)


def test_a_judge_that_fails_on_one_of_three_has_not_found_the_best():
    pairs = build_pair_examples([pref("q", "a", "b", id="1"), pref("q", "a", "c", id="2")])
    says = [pair.verdict for pair in pairs]
    assert measure(pairs, says, says)["best_of"]["3"]["value"] == 1
    assert measure(pairs, [0.5, 0.5], [0.5, 0.5])["best_of"]["3"]["value"] == pytest.approx(1 / 3)
    found = measure(pairs, [0.5, says[1]], [0.5, says[1]], failed=[True, False])
    assert found["best_of"]["3"]["value"] == 0


def identity(inputs: Mapping[str, Any] | None = None, **reward: Any) -> JudgeIdentity:
    known = {name: parse_input(given, Path()) for name, given in (inputs or {}).items()}
    name = reward.pop("name")
    return identify_scorer(build_reward_spec(CHOICES[name](name=name, **reward)), known)


A = {"ref": "reward:a", "digest": "a" * 64}
B = {"ref": "reward:b", "digest": "b" * 64}
LEARNED = {"name": "learned", "ref": "reward:a"}
RULE = {"rule": "length", "low": 1, "high": 9}
FN = {"ref": "mine:score", "digest": "f" * 64, "defined": [f"{'f' * 64}:score", "/m/mine.py:score"]}
SUM = [{**LEARNED, "weight": 1.0}, {"name": "learned", "ref": "reward:b", "weight": 0.5}]
SAME = [
    (identity({"reward": A}, **LEARNED), identity({"reward": {**A, "ref": "/r/a"}}, name="learned", ref="/r/a")),
    (identity(name="rules", rules=[RULE]), identity(name="rules", rules=[{**RULE, "weight": 1}])),
    (identity({"reward.fn": FN}, name="fn", fn="mine:score"),
     identity({"reward.fn": {**FN, "ref": "theirs:score", "defined": [f"{'f' * 64}:score", "/x/theirs.py:score"]}},
              name="fn", fn="theirs:score", timeout=3.0)),
    (identity({"reward": A, "reward.1": B}, name="sum", parts=SUM),
     identity({"reward": A, "reward.1": B}, name="sum", parts=[{"name": "learned", "ref": "reward:a"}, SUM[1]])),
]  # fmt: skip
UNLIKE = [
    identity({"reward": A}, **LEARNED), identity({"reward": B}, **LEARNED),
    identity({"reward": {**A, "tokenizer": "t" * 64}}, **LEARNED),
    identity(name="rules", rules=[RULE]), identity(name="rules", rules=[{**RULE, "high": 8}]),
    identity(name="rules", rules=[{**RULE, "weight": 2.0}]), identity(name="rules", rules=[RULE, {"rule": "json"}]),
    identity(name="sentiment"),
    identity({"reward.fn": FN}, name="fn", fn="mine:score"),
    identity({"reward.fn": {**FN, "digest": "e" * 64}}, name="fn", fn="mine:score"),
    identity({"reward.fn": {**FN, "ref": "mine:other"}}, name="fn", fn="mine:other"),
    identity({"reward": A, "reward.1": B}, name="ensemble", refs=["reward:a", "reward:b"]),
    identity({"reward": A, "reward.1": B}, name="ensemble", refs=["reward:a", "reward:b"], combine="min"),
    identity({"reward": A, "reward.1": B}, name="sum", parts=SUM),
    identity({"reward": B, "reward.1": A}, name="sum", parts=SUM),
]  # fmt: skip


def test_a_judge_is_what_changes_its_verdicts():
    assert all(one.digest == other.digest for one, other in SAME)
    assert len({judge.digest for judge in UNLIKE}) == len(UNLIKE)
    for one in UNLIKE:
        for other in UNLIKE:
            assert bool(describe_difference(one, other)) == (one is not other), (one, other)
    assert describe_difference(UNLIKE[0], UNLIKE[1]) == "model [aaaaaaaaaaaa] and [bbbbbbbbbbbb]"
    assert describe_difference(UNLIKE[11], UNLIKE[12]) == "combine mean and min"


JUDGE, ANOTHER = identity(name="sentiment"), identity(name="rules", rules=[RULE])


def card(
    low: float = 0.61, verdicts: int = 100, consistency: float | None = None, level: float = 0.95,
    chance: float | None = 0.2, errors: int = 0,
) -> JudgeReport:  # fmt: skip
    agreement = {"value": 0.7, "low": low, "high": 0.8, "n": verdicts}
    return JudgeReport(JUDGE, "c" * 64, "people", agreement, chance, verdicts, consistency, level, errors=errors)


@pytest.mark.parametrize(
    ("given", "least", "why"),
    [
        (card(), 0.6, ""),
        (card(consistency=0.01), 0.6, ""),
        (card(consistency=0.0), 0.6, "no verdict of it survives a swap"),
        (card(verdicts=1), 0.6, "its card has 1 verdict, and 100 are needed"),
        (card(consistency=0.0, errors=100), 0.6, "it gives no verdict"),
        (card(errors=99), 0.6, ""),
        (card(verdicts=99), 0.6, "its card has 99 verdicts, and 100 are needed"),
        (card(low=0.6), 0.6, "its agreement with people is 0.70 [0.60, 0.80], whose lower end is not above 0.6"),
        (card(), 0.65, "is not above 0.65"),
        (card(low=0.55), 0.5, ""),
        (card(level=0.9), 0.6, "has an interval at level 0.9, and 0.95 is needed"),
        (card(level=0.99), 0.6, ""),
        (card(chance=0.0), 0.6, "chance would do as well"),
        (card(chance=None), 0.6, "chance would do as well"),
    ],
)
def test_how_good_a_card_has_to_be(given: JudgeReport, least: float, why: str):
    found = explain_shortfall(given, least)
    assert bool(found) == bool(why)
    assert why in found
    if not why:
        assert choose_report("g", JUDGE, [given], "eval:c", least) is given
        return
    with pytest.raises(InputError, match=r"stage\.card=eval:c: gate g is decided by vader: "):
        choose_report("g", JUDGE, [given], "eval:c", least)


def test_a_card_of_another_judge_says_what_differs():
    with pytest.raises(InputError) as caught:
        choose_report("g", ANOTHER, [card()], "eval:c")
    assert caught.value.problem == (
        "gate g is decided by rules (length), and this card is of another judge, vader: name rules and sentiment, "
        "rules [{rule: length, low: 1, high: 9, weight: 1.0}] and none"
    )
    with pytest.raises(InputError, match="nothing says how often that is right"):
        choose_report("g", JUDGE, [], "")


WHOLE: dict[str, Any] = {
    "schema_version": 1, "judge": JUDGE.as_dict(), "reference": "people", "level": 0.95, "swap": None, "errors": 0,
    "agreement": {"raw": {"value": 0.8, "low": 0.7, "high": 0.9, "n": 120}, "kappa": {"low": 0.4}, "verdicts": 130},
}  # fmt: skip


def test_a_card_is_read_again(tmp_path: Path):
    path = tmp_path / "card.json"
    path.write_text(json.dumps(WHOLE))
    found = read_report(path)
    assert (found.judge.digest, found.verdicts, found.consistency) == (JUDGE.digest, 130, None)
    assert found.chance == 0.4
    assert found.summary == "agrees with people on 0.80 [0.70, 0.90] of 130 verdicts"
    assert found.errors == 0
    path.write_text(json.dumps({**WHOLE, "errors": 3, "swap": {"consistency": {"value": 0.0}}}))
    assert (read_report(path).consistency, read_report(path).errors) == (0.0, 3)


@pytest.mark.parametrize(
    "change",
    [
        {"judge": {**JUDGE.as_dict(), "made_of": ANOTHER.made_of}},
        {"judge": {**JUDGE.as_dict(), "identity": ANOTHER.digest}},
        {"judge": "vader"},
        {"judge": {}},
        {
            "agreement": {
                "raw": {"value": 0.8, "low": float("nan"), "high": 0.9, "n": 120},
                "kappa": None,
                "verdicts": 130,
            }
        },
        {"agreement": {"raw": {"value": 0.8, "low": None, "high": 0.9, "n": 120}, "kappa": None, "verdicts": 130}},
        {"agreement": []},
        {"agreement": {**WHOLE["agreement"], "kappa": {"low": float("nan")}}},
        {"agreement": {key: value for key, value in WHOLE["agreement"].items() if key != "kappa"}},
        {"level": None},
        {"errors": None},
        {"swap": [1]},
    ],
)
def test_what_is_no_card(tmp_path: Path, change: dict[str, Any]):
    path = tmp_path / "card.json"
    path.write_text(json.dumps(WHOLE | change))
    with pytest.raises(CorruptFile, match="is no card of a judge"):
        read_report(path)


@pytest.mark.parametrize("version", [2, "1", None, True])
def test_a_card_of_another_version(tmp_path: Path, version: Any):
    path = tmp_path / "card.json"
    path.write_text(json.dumps(WHOLE | {"schema_version": version}))
    with pytest.raises(InputError, match="this version of align reads 1"):
        read_report(path)
