"""Rules, functions, ensembles and sums: scores computed by hand, and messages on a user's mistakes."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, tensor

from align.config.compose import build_config, compose_tree
from align.config.scorers import SumReward, parse_reward_parts
from align.core.errors import InputError
from align.core.functions import find_module_file, load_function
from align.core.types import Conversation, Message, Rollout
from align.reward.combined import Ensemble, StandardisedScorer, Sum, standardise_members, standardise_scorer
from align.reward.function import FIELD, FunctionReward
from align.reward.rules import Rules, build_rule, has_tags, is_json_object_or_array, score_word_count


def build_chats(*answers: str) -> list[Conversation]:
    return [Conversation((Message("user", "?"), Message("assistant", a))) for a in answers]


class Fixed:
    """A scorer that returns the scores it was created with."""

    def __init__(self, scores: Sequence[float], name: str = "learned") -> None:
        self.scores = tensor(scores)
        self.name = name

    def score(self, conversations: Sequence[Conversation], rollout: Rollout | None = None) -> Tensor:
        return self.scores[: len(conversations)]


# Rules.


def test_length_is_one_inside_and_a_slope_outside():
    assert [score_word_count("a " * n, 4, 8) for n in (0, 2, 4, 6, 8, 16)] == [0, 0.5, 1, 1, 1, 0.5]
    assert score_word_count("", 0, 3) == 1


@pytest.mark.parametrize(
    ("text", "holds"), [('{"a": [1]}', True), (" [1, 2]\n", True), ("12", False), ("{a: 1}", False)]
)
def test_json(text: str, holds: bool):
    assert is_json_object_or_array(text) is holds


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("<think>why\nso</think> <answer>42</answer>\n", True),
        ("<answer>42</answer><think>why</think>", False),
        ("<think>why</think><answer>42</answer> and more", False),
        ("<think>a<think>b</think></think><answer>42</answer>", False),
        ("<think>a</think><answer>4</answer><answer>2</answer>", False),
        ("<think>why</think>", False),
    ],
)
def test_tags(text: str, holds: bool):
    assert has_tags(text, ["think", "answer"]) is holds


def test_rules_are_weighed_and_added():
    settings = [{"rule": "regex", "pattern": r"\d"}, {"rule": "length", "low": 2, "high": 2}, {"rule": "sentiment"}]
    rules = Rules([(w, build_rule(s)) for w, s in zip((2.0, -1.0, 1.0), settings, strict=True)])
    scores_B = rules.score(build_chats("7 tables", "tables", "good"))
    # A digit and two words; one word of two; the same, and 1.9 / sqrt(1.9² + 15) of sentiment.
    assert scores_B.tolist() == pytest.approx([2 - 1, -0.5, -0.5 + 0.4404])


# A user's function.


def test_a_function_gets_messages_and_gives_numbers():
    function = FunctionReward(lambda chats: [len(c[-1]["content"]) + (c[0]["role"] == "user") for c in chats], "m:f")
    assert function.score(build_chats("ab", "")).tolist() == [3, 1]


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda chats: [1.0], "1 numbers for 2"),
        (lambda chats: 3.0, "float, not a number for each"),
        (lambda chats: ["a", "b"], "not a number for each"),
        (lambda chats: [1.0, float("nan")], "nan for the answer 'second'"),
        (lambda chats: [1 / 0], "raised ZeroDivisionError"),
        (lambda chats: sys.exit(0), "raised SystemExit"),
        (lambda chats: [1.0, 1e39], "1e.39 for the answer 'second'"),
        (lambda chats: [1.0, None], "not a number for each"),
        (lambda chats: None, "NoneType, not a number for each"),
    ],
)
def test_a_function_that_is_wrong(returned: object, said: str):
    with pytest.raises(InputError, match=said) as error:
        FunctionReward(returned, "m:f").score(build_chats("first", "second"))  # pyright: ignore[reportArgumentType]
    assert str(error.value).startswith("reward.fn=m:f")


FUNCTIONS = {
    "exit with a message": "def score(c):\n    raise SystemExit('done')",
    "exit later": "import sys\ndef score(c):\n    yield sys.exit(0)",
    "exit as a number": "class N:\n    def __float__(self): raise SystemExit\ndef score(c): return [N() for _ in c]",
    "a generator ends": "def score(c):\n    raise GeneratorExit",
    "cancelled": "import asyncio\ndef score(c):\n    raise asyncio.CancelledError",
    "its own": "class Stop(BaseException): pass\ndef score(c):\n    raise Stop('enough')",
    "its own at import": "class Stop(BaseException): pass\nraise Stop('enough')",
    "half a character": "def score(c):\n    raise ValueError('a\\ud83d')",
    "far too large": "def score(c):\n    return [10**400 for _ in c]",
    "raised while counted": "def score(c):\n    for _ in c:\n        yield 1.0\n    raise KeyError('late')",
    "recursion": "def score(c):\n    return score(c)",
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_what_a_function_raises_is_its_own(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec = f"mine_{list(FUNCTIONS).index(kind)}:score"
    (tmp_path / f"{spec.partition(':')[0]}.py").write_text(FUNCTIONS[kind] + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError) as refused:
        FunctionReward(load_function(spec, FIELD), spec).score(build_chats("first", "second"))
    assert (refused.value.field, refused.value.value) == (FIELD, spec)
    str(refused.value).encode()  # can be written


def swallows(chats: list[Any]) -> list[float]:
    while True:
        try:
            time.sleep(30)
        except Exception:
            continue


def scores_what_is_late(chats: list[Any]) -> list[float]:
    scores = []
    for _ in chats:
        try:
            time.sleep(30)
            scores.append(1.0)
        except:  # noqa: E722
            scores.append(0.0)
    return scores


def yields_late(chats: list[Any]) -> Iterator[float]:
    yield 1.0
    time.sleep(30)


@pytest.mark.parametrize("slow", [lambda chats: time.sleep(30), swallows, yields_late, scores_what_is_late])
def test_a_function_that_does_not_answer(slow: Any):
    """The time limit interrupts functions that catch every exception. The earlier signal handler is restored."""
    before = signal.getsignal(signal.SIGALRM)
    began = time.monotonic()
    with pytest.raises(InputError, match=r"reward\.timeout=0\.1: m:f did not return"):
        FunctionReward(slow, "m:f", 0.1).score(build_chats("first", "second"))
    assert time.monotonic() - began < 20
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_function_in_time_and_in_another_thread():
    quick = FunctionReward(lambda chats: [1.0 for _ in chats], "m:f", 5.0)
    assert quick.score(build_chats("a")).tolist() == [1]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(quick.score, build_chats("a")).result().tolist() == [1]
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_where_a_function_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "judge_of_mine.py").write_text("def brief(chats):\n    return [0.0 for _ in chats]\n")
    (tmp_path / "broken_of_mine.py").write_text("import nothing_of_that_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    function = load_function("judge_of_mine:brief", FIELD)
    assert function([1, 2]) == [0.0, 0.0]
    assert find_module_file("judge_of_mine:brief", FIELD) == tmp_path / "judge_of_mine.py"
    for spec, message in (("judge_of_mine:long", "It has: brief"), ("broken_of_mine:f", "nothing_of_that_name")):
        with pytest.raises(InputError, match=message):
            load_function(spec, FIELD)
    sys.modules.pop("judge_of_mine")


# Combinations.


@pytest.mark.parametrize(
    ("combine", "expected"), [("mean", [2.0, 3.0]), ("min", [1.0, 3.0]), ("mean_minus_std", [0.0, 3.0])]
)
def test_an_ensemble(combine: str, expected: list[float]):
    ensemble = Ensemble((Fixed([1.0, 3.0]), Fixed([3.0, 3.0])), combine, deviations=2.0)
    assert ensemble.score(build_chats("a", "b")).tolist() == expected
    assert ensemble.member_scores(build_chats("a", "b")).tolist() == [[1, 3], [3, 3]]


def test_a_sum():
    assert Sum(((0.5, Fixed([2.0, 4.0])), (-1.0, Fixed([1.0, 0.0])))).score(build_chats("a", "b")).tolist() == [0, 2]


def test_standardised_is_mean_0_and_variance_1_there():
    scorer = standardise_scorer(Fixed([1.0, 3.0]), build_chats("a", "b"))
    assert scorer.score(build_chats("a", "b")).tolist() == [-1, 1]
    assert (scorer.shift, scorer.scale) == (2, 1)
    for dead in ([2.0, 2.0], [0.1] * 256):  # fp32's own mean of the second is off by its rounding
        with pytest.raises(InputError, match="the same score"):
            standardise_scorer(Fixed(dead), build_chats(*"a" * len(dead)))


def test_members_on_scales_of_their_own_become_comparable():
    """One member's scale is a hundred times the other's, so that it alone would decide the minimum."""
    small = Fixed([-1.0, 1.0, 1.0, -1.0])
    large = Fixed([100.0, -100.0, 100.0, -100.0])
    chats = build_chats(*"abcd")
    scorer = standardise_members(Ensemble((small, large), "min"), chats)
    assert scorer.score(chats).tolist() == [-1, -1, 1, -1]
    rule = Fixed([5.0, 5.0, 5.0, 6.0], "rules")
    total = standardise_members(Sum(((1.0, Ensemble((small, large))), (1.0, rule))), chats)
    assert isinstance(total, Sum)
    assert total.parts[1][1] is rule  # in its own units
    assert isinstance(total.parts[0][1], StandardisedScorer)
    expected = tensor([0.0, 0.0, 2**0.5, -(2**0.5)]) + tensor([5.0, 5.0, 5.0, 6.0])
    torch.testing.assert_close(total.score(chats), expected)


# Configurations.

ENSEMBLE = ["reward=ensemble", "reward.refs=['reward:a','reward:b']"]
SUM = "{name: learned, weight: 2}, {name: rules, rules: [{rule: json}], weight: -0.5}"


@pytest.mark.parametrize(
    "good",
    [
        ["reward=fn", "reward.fn=my.module:name"],
        ["reward=rules", "reward.rules=[{rule: length, low: 3, high: 9}, {rule: sentiment, weight: 2}]"],
        [*ENSEMBLE, "reward.combine=mean_minus_std", "reward.deviations=0.5"],
        ["reward=sum", f"reward.parts=[{SUM}]"],
        ["reward.ref=reward:x"],
    ],
)
def test_a_reward_that_is_right(good: list[str]):
    assert build_config(compose_tree(["stage=ppo", *good])).reward.name == (
        good[0][7:] if "=" in good[0][:7] else "learned"
    )


@pytest.mark.parametrize(
    ("wrong", "field", "said"),
    [
        (["reward=fn"], "reward.fn", "names no function"),
        (["reward=fn", "reward.fn=module"], "reward.fn", "names no function"),
        (["reward=fn", "reward.ref=reward:x"], "reward.ref", "is not a key"),
        (["reward=rules"], "reward.rules", "no list"),
        (["reward=rules", "reward.rules=[{rule: joy}]"], "reward.rules[0].rule", "sentiment"),
        (["reward=rules", "reward.rules=[{rule: length, low: 9, high: 3}]"], "reward.rules[0].low", "range"),
        (["reward=rules", "reward.rules=[{rule: length, low: 9}]"], "reward.rules[0].high", "needs it"),
        (["reward=rules", "reward.rules=[{rule: json, low: 9}]"], "reward.rules[0].low", "no setting"),
        (["reward=rules", "reward.rules=[{rule: regex, pattern: '('}]"], "reward.rules[0].pattern", "expression"),
        (["reward=rules", "reward.rules=[{rule: tags, tags: think}]"], "reward.rules[0].tags", "list"),
        (["reward=rules", "reward.rules=[{rule: json, weight: much}]"], "reward.rules[0].weight", "number"),
        (["reward=ensemble", "reward.refs=['reward:a']"], "reward.refs", "two members"),
        ([*ENSEMBLE, "reward.combine=most"], "reward.combine", "mean_minus_std"),
        (["reward=sum"], "reward.parts", "no list"),
        (["reward=sum", "reward.parts=[{name: luck}]"], "reward.parts[0].name", "learned"),
        (["reward=sum", "reward.parts=[{name: fn, fn: x}]"], "reward.parts[0].fn", "names no function"),
        (["reward=sum", "reward.parts=[{name: fn, ref: x}]"], "reward.parts[0].ref", "Its settings: fn"),
    ],
)
def test_a_reward_that_is_wrong(wrong: list[str], field: str, said: str):
    with pytest.raises(InputError) as error:
        build_config(compose_tree(["stage=ppo", *wrong]))
    assert error.value.field == field
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (["stage.kl_control=adaptive", "stage.kl_horizon=10"], "stage.kl_horizon"),
        (["stage.kl_control=adaptive", "stage.kl_coef=0"], "stage.kl_coef"),
        (["dtype=float16"], "dtype"),
        (["stage.tripwires.disagreement=0.5"], "stage.tripwires.disagreement"),
        (["stage.shown=99"], "stage.shown"),
        (["stage.tripwires.action=shout"], "stage.tripwires.action"),
        (["stage.schedule=steps"], "stage.schedule"),
    ],
)
def test_ppo_settings_that_are_wrong(wrong: list[str], field: str):
    with pytest.raises(InputError) as error:
        build_config(compose_tree(["stage=ppo", *wrong]))
    assert error.value.field == field


def test_the_parts_of_a_sum():
    config = build_config(compose_tree(["stage=ppo", "reward=sum", f"reward.parts=[{SUM}]"])).reward
    assert isinstance(config, SumReward)
    assert [(weight, part.name) for weight, part in parse_reward_parts(config)] == [(2, "learned"), (-0.5, "rules")]


def test_a_pattern_that_takes_forever_ends_and_has_not_matched(caplog: pytest.LogCaptureFixture) -> None:
    rule = build_rule({"rule": "regex", "pattern": r"(a+)+$"})
    assert rule("a" * 4000 + "b") == 0
    assert "(a+)+$" in caplog.text
    assert rule("aa") == 1
