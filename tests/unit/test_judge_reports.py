"""Judge reports: the pairs of a measurement, its figures, the judge's identity, and the level that a gate requires."""

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
from align.evals.judges.examples import PairExample, build_pair_examples, digest_examples, drop_trained_pairs
from align.evals.judges.figures import (
    REWARD_BENCH,
    compute_reward_bench_scores,
    describe_reward_bench,
    find_pairs_with_best_answer,
    measure_judge_on_pairs,
)
from align.evals.judges.identity import JudgeIdentity, describe_judge_difference, identify_scorer
from align.evals.judges.opinions import JudgeOpinions
from align.evals.judges.report import JudgeReport, choose_report, explain_shortfall, read_report
from align.run.manifest import parse_input


def build_preference(prompt: str, chosen: str, rejected: str, **fields: Any) -> Preference:
    return Preference(
        (Message("user", prompt),), (Message("assistant", chosen),), (Message("assistant", rejected),), **fields
    )


def get_texts(pair: PairExample) -> tuple[str, str]:
    return pair.first[0].content, pair.second[0].content


def get_better_text(pair: PairExample) -> str:
    return get_texts(pair)[0 if pair.verdict == 1 else 1]


def test_either_place_has_better_answers_and_the_seed_draws_them():
    prefs = [build_preference(f"q{i}", "good", "bad", id=str(i)) for i in range(200)]
    examples = build_pair_examples(prefs)
    assert all(get_better_text(pair) == "good" for pair in examples)
    assert 70 < sum(pair.verdict for pair in examples) < 130
    assert build_pair_examples(prefs) == examples
    assert [pair.verdict for pair in build_pair_examples(prefs, seed=1)] != [pair.verdict for pair in examples]


def test_a_pair_counts_once_and_most_people_decide():
    a = "one answer"
    b = "another"
    votes = [
        build_preference("q", a, b, id="1"),
        build_preference("q", a, b, id="2"),
        build_preference("q", b, a, id="3"),
    ]
    (pair,) = build_pair_examples(votes)
    assert get_better_text(pair) == a
    assert sorted(pair.votes) in ([0.0, 0.0, 1.0], [0.0, 1.0, 1.0])
    (pair,) = build_pair_examples(votes[1:])
    assert pair.is_tied
    (pair,) = build_pair_examples(votes[:1], [build_preference("q", b, a, id="4"), build_preference("q", a, b, id="5")])
    assert get_better_text(pair) == a, "two say equal, one says better"
    assert pair.votes.count(0.5) == 2
    assert len(build_pair_examples([*votes, build_preference("q", a, "a third", id="1")])) == 2
    same = build_pair_examples(
        [build_preference("q", a, b, id="x"), build_preference("r", a, b, id="x"), build_preference("s", a, b)]
    )
    assert [pair.item.id for pair in same] == ["x", "x#2", "pair 3"]


def test_what_shares_a_prompt_or_a_ranking_is_one_cluster():
    examples = build_pair_examples(
        [
            build_preference("q", "a", "b", id="1"),
            build_preference("q", "a", "c", id="2"),
            build_preference("r", "a", "b", id="3", group_id="g"),
            build_preference("s", "a", "b", id="4", group_id="g"),
            build_preference("t", "a", "b", id="5"),
        ]
    )
    clusters = [pair.item.cluster for pair in examples]
    assert clusters[0] == clusters[1]
    assert clusters[2] == clusters[3]
    assert len({*clusters}) == 3


def test_a_pair_keeps_its_sides_with_what_ended_them():
    for i in range(8):
        (pair,) = build_pair_examples([build_preference("q", "good", "bad", id=str(i), rejected_ended=False)])
        assert dict(zip(get_texts(pair), pair.ended, strict=True)) == {"good": True, "bad": False}
        preference = pair.to_preference()
        assert (preference.chosen[0].content, preference.chosen_ended, preference.rejected_ended) == (
            "good",
            True,
            False,
        )
        first, second = pair.conversations
        assert [turn.content for turn in first.messages] == ["q", get_texts(pair)[0]]
        assert [turn.content for turn in second.messages] == ["q", get_texts(pair)[1]]


def test_the_digest_is_of_what_was_said_and_not_of_its_order():
    prefs = [build_preference("q", "a", "b", id="1"), build_preference("r", "c", "d", id="2")]
    digest = digest_examples(build_pair_examples(prefs))
    assert digest == digest_examples(build_pair_examples(prefs[::-1], seed=5))
    assert digest == digest_examples(build_pair_examples([build_preference("q", "a", "b", id="9"), prefs[1]]))
    changed_prefs = [
        [build_preference("q", "b", "a", id="1"), prefs[1]],
        [build_preference("q!", "a", "b", id="1"), prefs[1]],
        [build_preference("q", "a", "b!", id="1"), prefs[1]],
        prefs[:1],
    ]
    digests = {digest_examples(build_pair_examples(changed)) for changed in changed_prefs} | {
        digest_examples(build_pair_examples(prefs[1:], prefs[:1]))
    }
    assert len(digests | {digest}) == 6


class Learned:
    """A stub of `Seen`: the prompts that a judge learned from."""

    def __init__(self, *prompts: str) -> None:
        self.prompts = prompts

    def asks(self, turns: Sequence[Message]) -> bool:
        return turns[-1].content in self.prompts


def test_pairs_that_any_part_of_the_judge_learned_from_are_left_out():
    examples = build_pair_examples([build_preference(q, "a", "b", id=q) for q in "pqrs"])
    remaining = drop_trained_pairs(examples, [Learned("p"), Learned("r", "x")])  # pyright: ignore[reportArgumentType]
    assert [pair.item.id for pair in remaining] == ["q", "s"]


def test_the_best_of_several_is_who_was_preferred_to_each():
    ranking = [build_preference("q", "a", "b"), build_preference("q", "a", "c"), build_preference("q", "b", "c")]
    pair = [build_preference("r", "a", "b")]
    chain = [build_preference("s", "a", "b"), build_preference("s", "c", "d")]
    tied = [build_preference("t", "a", "b"), build_preference("t", "a", "c")]
    best_answers = find_pairs_with_best_answer(build_pair_examples([*ranking, *pair, *chain, tied[0]], tied[1:]))
    assert len(best_answers) == 1
    ((wins),) = best_answers.values()
    assert [get_texts(p)[0 if first else 1] for p, first in wins] == ["a", "a"]


def measure_judge(
    pairs: Sequence[PairExample],
    verdicts: Sequence[float],
    swapped: Sequence[float] | None = None,
    log_odds: Sequence[float | None] | None = None,
    failed: Sequence[bool] = (),
) -> dict[str, Any]:
    errors = ["no verdict" if has_failed else "" for has_failed in failed] or [""] * len(pairs)
    return measure_judge_on_pairs(pairs, JudgeOpinions(verdicts, swapped, log_odds or [None] * len(pairs), errors))


def judge_pairs(pairs: Sequence[PairExample], score_by_prompt: Mapping[str, float]) -> list[float]:
    """Return a judge's verdicts, from a score by prompt for the better answer, or for the first one of a tie."""
    scores = (score_by_prompt[pair.item.prompt.messages[0].content] for pair in pairs)
    return [1 - score if pair.verdict == 0 else score for pair, score in zip(pairs, scores, strict=True)]


def test_the_figures_of_ten_pairs_by_hand():
    """Eight decided pairs: five right, two wrong, one tie of the judge. Two tied pairs: the judge finds one."""
    decided = [
        build_preference(f"q{i}", "long answer" if i < 4 else "s", "rest", source="xy"[i % 2], id=f"{i}")
        for i in range(8)
    ]
    ties = [build_preference(f"t{i}", "some", "more", id=f"t{i}") for i in range(2)]
    pairs = build_pair_examples(decided, ties)
    score_by_prompt = {f"q{i}": 1.0 for i in range(5)} | {"q5": 0.0, "q6": 0.0, "q7": 0.5, "t0": 0.5, "t1": 1.0}
    figures = measure_judge(pairs, judge_pairs(pairs, score_by_prompt))
    assert figures["agreement"]["raw"]["value"] == pytest.approx(6 / 10)
    assert figures["agreement"]["verdicts"] == 10
    assert (figures["accuracy"]["value"], figures["accuracy"]["n"]) == (5 / 8, 8)
    assert figures["by_length"]["longer"]["value"] == 1.0
    assert figures["by_length"]["shorter"]["value"] == 1 / 4
    assert {name: interval["value"] for name, interval in figures["by_source"].items()} == {"x": 3 / 4, "y": 2 / 4}
    assert figures["ties"] == {"pairs": 2, "judge": 2, "both": 1}
    assert figures["swap"] is None
    assert "calibration" not in figures
    assert "between_people" not in figures
    json.dumps(figures, allow_nan=False)


def test_the_categories_of_reward_bench():
    """The pairs of a category count alike, Math and Code count alike, and a category with a missing subset is left
    out."""
    rights = {subset: [True] for subsets in REWARD_BENCH.values() for subset in subsets}
    assert len(rights) == 23
    rights["mt-bench-easy"] = [False] * 6  # Chat: 4 of 10
    rights["mt-bench-hard"] = [False, True]  # Chat Hard: 6 of 7
    rights["donotanswer"] = [False]  # Safety: 4 of 5
    rights["math-prm"] = [False, False, True, False]
    scores = compute_reward_bench_scores(rights)
    expected = {"Chat": 0.4, "Chat Hard": 6 / 7, "Safety": 0.8, "Reasoning": (1 / 4 + 1) / 2}
    assert scores == pytest.approx({**expected, "mean": sum(expected.values()) / 4})
    del rights["hep-go"]
    assert [*compute_reward_bench_scores(rights)] == ["Chat", "Chat Hard", "Safety"]
    assert compute_reward_bench_scores({"own": [True]}) == {}


def test_the_line_of_reward_bench():
    subsets = REWARD_BENCH["Safety"]
    decided = [build_preference(f"q{i}", "good", "bad", source=subset, id=f"{i}") for i, subset in enumerate(subsets)]
    pairs = build_pair_examples(decided)
    figures = measure_judge(pairs, judge_pairs(pairs, {f"q{i}": float(i > 0) for i in range(len(pairs))}))
    assert describe_reward_bench(figures) == ["RewardBench: Safety 0.800"]
    others = measure_judge(build_pair_examples([build_preference("q", "good", "bad", id="0")]), [1.0])
    assert describe_reward_bench(others) == []


def test_a_judge_that_goes_by_place_agrees_on_nothing():
    pairs = build_pair_examples([build_preference(f"q{i}", "good", "bad", id=str(i)) for i in range(120)])
    always_a = measure_judge(pairs, [1.0] * 120, swapped=[0.0] * 120)
    assert always_a["swap"]["consistency"]["value"] == 0
    assert always_a["swap"]["shown_first"]["value"] == 1
    assert always_a["agreement"]["raw"]["value"] == 0
    assert always_a["accuracy"]["value"] == 0


def test_calibration_is_of_the_pairs_that_were_decided():
    pairs = build_pair_examples(
        [build_preference(f"q{i}", "good", "bad", id=str(i)) for i in range(4)],
        [build_preference("t", "a", "b", id="t")],
    )
    odds = [math.log(3) * (1 if pair.verdict == 1 else -1) for pair in pairs[:4]] + [9.0]
    calibration = measure_judge(pairs, [float(o > 0) for o in odds], log_odds=odds)["calibration"]
    assert calibration["log_loss"]["value"] == pytest.approx(-math.log(0.75))
    assert calibration["brier"]["value"] == pytest.approx(1 / 16)
    assert calibration["ece"] == pytest.approx(0.25), "each is sure by 0.75, and right"


def test_people_beside_each_other():
    votes = [
        build_preference("q", "a", "b", id="1"),
        build_preference("q", "a", "b", id="2"),
        build_preference("q", "b", "a", id="3"),
    ]
    pairs = build_pair_examples(
        [
            *votes,
            build_preference("r", "a", "b", id="4"),
            build_preference("r", "a", "b", id="5"),
            build_preference("s", "a", "b"),
        ]
    )
    figures = measure_judge(pairs, [pair.verdict for pair in pairs])
    assert (figures["between_people"]["value"], figures["between_people"]["n"]) == (pytest.approx((1 / 3 + 1) / 2), 2)


def test_a_judge_that_calls_everything_equal_agrees_with_ties_and_is_no_better_than_chance():
    """A server with unreadable answers does so too: a missing verdict counts as a tie."""
    ties = [build_preference(f"t{i}", "some", "more", id=f"t{i}") for i in range(90)]
    pairs = build_pair_examples([build_preference(f"q{i}", "a", "b", id=f"q{i}") for i in range(30)], ties)
    figures = measure_judge(pairs, [0.5] * 120, swapped=[0.5] * 120)
    assert figures["agreement"]["raw"]["low"] > 0.6
    kappa = figures["agreement"]["kappa"]
    assert kappa is None or kappa["low"] is None or kappa["low"] <= 0
    raw = figures["agreement"]["raw"]
    low = None if kappa is None else kappa["low"]
    assert "not shown to be better than chance" in explain_shortfall(
        JudgeReport(JUDGE, "c", "people", raw, low, 120, 1.0, 0.95)
    )


def test_a_pair_without_a_verdict_is_wrong_and_no_tie():
    """Six decided pairs and two ties, all right except for a failure on one of each."""
    decided = [build_preference(f"q{i}", "good", "bad", id=str(i)) for i in range(6)]
    pairs = build_pair_examples(decided, [build_preference(f"t{i}", "some", "more", id=f"t{i}") for i in range(2)])
    failed_ids = {"0", "t0"}
    failed = [pair.item.id in failed_ids for pair in pairs]
    first = [0.5 if has_failed else pair.verdict for pair, has_failed in zip(pairs, failed, strict=True)]
    second = [pair.verdict for pair in pairs]  # the swapped order has verdicts, and is right
    figures = measure_judge(pairs, first, second, failed=failed)
    assert figures["errors"] == 2
    assert figures["agreement"]["raw"]["value"] == 6 / 8
    assert figures["agreement"]["verdicts"] == 8
    assert figures["accuracy"]["value"] == 5 / 6
    assert figures["swap"]["consistency"]["value"] == 6 / 8
    assert figures["ties"] == {"pairs": 2, "judge": 1, "both": 1}
    assert measure_judge(pairs, second, second)["errors"] == 0
    json.dumps(figures, allow_nan=False)


def test_a_judge_that_fails_on_one_of_three_has_not_found_the_best():
    pairs = build_pair_examples([build_preference("q", "a", "b", id="1"), build_preference("q", "a", "c", id="2")])
    verdicts = [pair.verdict for pair in pairs]
    assert measure_judge(pairs, verdicts, verdicts)["best_of"]["3"]["value"] == 1
    assert measure_judge(pairs, [0.5, 0.5], [0.5, 0.5])["best_of"]["3"]["value"] == pytest.approx(1 / 3)
    figures = measure_judge(pairs, [0.5, verdicts[1]], [0.5, verdicts[1]], failed=[True, False])
    assert figures["best_of"]["3"]["value"] == 0


def build_identity(inputs: Mapping[str, Any] | None = None, **reward: Any) -> JudgeIdentity:
    parsed_inputs = {name: parse_input(record, Path()) for name, record in (inputs or {}).items()}
    name = reward.pop("name")
    return identify_scorer(build_reward_spec(CHOICES[name](name=name, **reward)), parsed_inputs)


A = {"ref": "reward:a", "digest": "a" * 64}
B = {"ref": "reward:b", "digest": "b" * 64}
LEARNED = {"name": "learned", "ref": "reward:a"}
RULE = {"rule": "length", "low": 1, "high": 9}
FN = {"ref": "mine:score", "digest": "f" * 64, "defined": [f"{'f' * 64}:score", "/m/mine.py:score"]}
SUM = [{**LEARNED, "weight": 1.0}, {"name": "learned", "ref": "reward:b", "weight": 0.5}]
SAME = [
    (
        build_identity({"reward": A}, **LEARNED),
        build_identity({"reward": {**A, "ref": "/r/a"}}, name="learned", ref="/r/a"),
    ),
    (build_identity(name="rules", rules=[RULE]), build_identity(name="rules", rules=[{**RULE, "weight": 1}])),
    (
        build_identity({"reward.fn": FN}, name="fn", fn="mine:score"),
        build_identity(
            {"reward.fn": {**FN, "ref": "theirs:score", "defined": [f"{'f' * 64}:score", "/x/theirs.py:score"]}},
            name="fn",
            fn="theirs:score",
            timeout=3.0,
        ),
    ),
    (
        build_identity({"reward": A, "reward.1": B}, name="sum", parts=SUM),
        build_identity(
            {"reward": A, "reward.1": B}, name="sum", parts=[{"name": "learned", "ref": "reward:a"}, SUM[1]]
        ),
    ),
]
UNLIKE = [
    build_identity({"reward": A}, **LEARNED),
    build_identity({"reward": B}, **LEARNED),
    build_identity({"reward": {**A, "tokenizer": "t" * 64}}, **LEARNED),
    build_identity(name="rules", rules=[RULE]),
    build_identity(name="rules", rules=[{**RULE, "high": 8}]),
    build_identity(name="rules", rules=[{**RULE, "weight": 2.0}]),
    build_identity(name="rules", rules=[RULE, {"rule": "json"}]),
    build_identity(name="sentiment"),
    build_identity({"reward.fn": FN}, name="fn", fn="mine:score"),
    build_identity({"reward.fn": {**FN, "digest": "e" * 64}}, name="fn", fn="mine:score"),
    build_identity({"reward.fn": {**FN, "ref": "mine:other"}}, name="fn", fn="mine:other"),
    build_identity({"reward": A, "reward.1": B}, name="ensemble", refs=["reward:a", "reward:b"]),
    build_identity({"reward": A, "reward.1": B}, name="ensemble", refs=["reward:a", "reward:b"], combine="min"),
    build_identity({"reward": A, "reward.1": B}, name="sum", parts=SUM),
    build_identity({"reward": B, "reward.1": A}, name="sum", parts=SUM),
]


def test_a_judge_is_what_changes_its_verdicts():
    assert all(first.digest == second.digest for first, second in SAME)
    assert len({judge.digest for judge in UNLIKE}) == len(UNLIKE)
    for first in UNLIKE:
        for second in UNLIKE:
            assert bool(describe_judge_difference(first, second)) == (first is not second), (first, second)
    assert describe_judge_difference(UNLIKE[0], UNLIKE[1]) == "model [aaaaaaaaaaaa] and [bbbbbbbbbbbb]"
    assert describe_judge_difference(UNLIKE[11], UNLIKE[12]) == "combine mean and min"


JUDGE = build_identity(name="sentiment")
ANOTHER = build_identity(name="rules", rules=[RULE])


def build_report(
    low: float = 0.61,
    verdicts: int = 100,
    consistency: float | None = None,
    level: float = 0.95,
    chance: float | None = 0.2,
    errors: int = 0,
) -> JudgeReport:
    agreement = {"value": 0.7, "low": low, "high": 0.8, "n": verdicts}
    return JudgeReport(JUDGE, "c" * 64, "people", agreement, chance, verdicts, consistency, level, errors=errors)


@pytest.mark.parametrize(
    ("given", "least", "why"),
    [
        (build_report(), 0.6, ""),
        (build_report(consistency=0.01), 0.6, ""),
        (build_report(consistency=0.0), 0.6, "no verdict is the same in both orders of the two answers"),
        (build_report(verdicts=1), 0.6, "its card has 1 verdict, and 100 are needed"),
        (build_report(consistency=0.0, errors=100), 0.6, "it gives no verdict"),
        (build_report(errors=99), 0.6, ""),
        (build_report(verdicts=99), 0.6, "its card has 99 verdicts, and 100 are needed"),
        (
            build_report(low=0.6),
            0.6,
            "its agreement with people is 0.70 [0.60, 0.80], whose lower end is not above 0.6",
        ),
        (build_report(), 0.65, "is not above 0.65"),
        (build_report(low=0.55), 0.5, ""),
        (build_report(level=0.9), 0.6, "has an interval at level 0.9, and 0.95 is needed"),
        (build_report(level=0.99), 0.6, ""),
        (build_report(chance=0.0), 0.6, "not shown to be better than chance"),
        (build_report(chance=None), 0.6, "not shown to be better than chance"),
    ],
)
def test_how_good_a_card_has_to_be(given: JudgeReport, least: float, why: str):
    shortfall = explain_shortfall(given, least)
    assert bool(shortfall) == bool(why)
    assert why in shortfall
    if not why:
        assert choose_report("g", JUDGE, [given], "eval:c", least) is given
        return
    with pytest.raises(InputError, match=r"stage\.card=eval:c: gate g is decided by vader: "):
        choose_report("g", JUDGE, [given], "eval:c", least)


def test_a_card_of_another_judge_says_what_differs():
    with pytest.raises(InputError) as caught:
        choose_report("g", ANOTHER, [build_report()], "eval:c")
    assert caught.value.problem == (
        "gate g is decided by rules (length), and this card is of another judge, vader: name rules and sentiment, "
        "rules [{rule: length, low: 1, high: 9, weight: 1.0}] and none"
    )
    with pytest.raises(InputError, match="says how often it is right"):
        choose_report("g", JUDGE, [], "")


WHOLE: dict[str, Any] = {
    "schema_version": 1,
    "judge": JUDGE.as_dict(),
    "reference": "people",
    "level": 0.95,
    "swap": None,
    "errors": 0,
    "agreement": {"raw": {"value": 0.8, "low": 0.7, "high": 0.9, "n": 120}, "kappa": {"low": 0.4}, "verdicts": 130},
}


def test_a_card_is_read_again(tmp_path: Path):
    path = tmp_path / "card.json"
    path.write_text(json.dumps(WHOLE))
    report = read_report(path)
    assert (report.judge.digest, report.verdicts, report.consistency) == (JUDGE.digest, 130, None)
    assert report.chance == 0.4
    assert report.summary == "agrees with people on 0.80 [0.70, 0.90] of 130 verdicts"
    assert report.errors == 0
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
    with pytest.raises(CorruptFile, match="is not a judge's card"):
        read_report(path)


@pytest.mark.parametrize("version", [2, "1", None, True])
def test_a_card_of_another_version(tmp_path: Path, version: Any):
    path = tmp_path / "card.json"
    path.write_text(json.dumps(WHOLE | {"schema_version": version}))
    with pytest.raises(InputError, match="this version of align reads 1"):
        read_report(path)
