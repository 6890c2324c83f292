"""Tests that collapse is detected for policies with one answer, and not for policies that answer each prompt."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.core.types import Message
from align.evals.collapse import (
    COLLAPSED,
    NOT_MEASURED,
    VARIED,
    Collapse,
    SystemAnswers,
    describe_new_phrase,
    find_commonest_new_phrase,
    find_commonest_new_sentence,
    find_distinct_prompts,
    judge_against_constant,
    judge_collapse,
    mask_answers,
    measure_collapse,
    measure_variety,
)
from align.evals.suite.samples import Sample, read_samples, summarise_samples, write_samples
from align.ops.intervals import mean_interval

KINDS = ("old", "new", "red", "cheap", "small", "large", "fast", "quiet")
THINGS = ("cars", "boats", "hats", "phones", "houses", "gardens", "trains", "lamps", "doors", "songs")
TOPICS = [f"{kind} {thing}" for kind in KINDS for thing in THINGS]
PROMPTS = [f"What do you think about {topic}?" for topic in TOPICS]
WORDS = [
    "river",
    "stone",
    "window",
    "paper",
    "copper",
    "forest",
    "candle",
    "mirror",
    "ladder",
    "bridge",
    "meadow",
    "harbour",
    "valley",
    "engine",
    "pepper",
]


def draw_varied_answers(seed: int = 0) -> list[str]:
    """Draw an answer to each prompt: two sentences of random words."""
    random.seed(seed)
    return [f"{' '.join(random.sample(WORDS, 5))}. {' '.join(random.sample(WORDS, 4))}." for _ in PROMPTS]


def judge_policy(policy: list[str], ref: list[str] | None = None, prompts: list[str] = PROMPTS) -> Collapse:
    ref = draw_varied_answers() if ref is None else ref
    sentence = find_commonest_new_sentence(prompts, policy, ref)
    start = measure_variety(prompts, ref)
    return judge_collapse(measure_variety(prompts, policy), start.distinct, start.commonest_share.value, sentence)


def mix_constant_answer(share: float, text: str, seed: int = 1) -> list[str]:
    answers = draw_varied_answers(seed)
    count = round(share * len(answers))
    return [text] * count + answers[count:]


def test_one_answer_to_everybody_is_a_collapse():
    collapse = judge_policy(["Haha yeah I love it!"] * 80)
    assert collapse.verdict == COLLAPSED
    assert len(collapse.reasons) == 3
    assert "“Haha yeah I love it!”" in collapse.reasons[0]
    assert collapse.reasons[1] == "1 different greedy answers, where the start has 80"


@pytest.mark.parametrize(
    "answer",
    [
        lambda topic, i: f"I really love {topic}, tell me more!",
        lambda topic, i: f"I REALLY love {topic} tell me more",
        lambda topic, i: f"I really love {topic}: {i} times, tell me more!",
        lambda topic, i: "I really love it, tell me more!" if i % 2 else "i really love it. tell me more",
        lambda topic, i: f"What do you think about {topic}?",
        lambda topic, i: f"What do you think about {topic}? Please tell me more.",
        lambda topic, i: "",
    ],
    ids=["template", "case", "number", "punctuation", "echo", "echo and question", "empty"],
)
def test_a_template_that_is_filled_from_the_prompt_is_a_collapse(answer: Any):
    assert judge_policy([answer(topic, i) for i, topic in enumerate(TOPICS)]).verdict == COLLAPSED


ADVICE = ("be kind", "drink water", "sleep well", "go outside", "call a friend")


@pytest.mark.parametrize(
    "answer",
    [
        lambda i: " ".join(["haha"] * (i + 1)),
        lambda i: "I love it! " * (i + 1),
        lambda i: "\n".join(f"- {advice}" for advice in (*ADVICE[i % 5 :], *ADVICE[: i % 5])),
        lambda i: f"I love it {'😂😍🎉🔥'[i % 4] * (i % 5 + 1)}",
        lambda i: "😂😍🎉🔥"[i % 4] * (i % 5 + 1),
        lambda i: "!.?"[i % 3] * (i % 9 + 1),
        lambda i: " " * (i % 5),
        lambda i: f"I love it{chr(0x200B) * i}",
        lambda i: json.dumps({"question": PROMPTS[i], "answer": "great"}),
        lambda i: ["I love it!", "So cool!", "Wow nice one!", "Haha yes!", "That is great!"][i % 5],
        lambda i: f"As a language model, I have no opinion about {TOPICS[i]}.",
        lambda i: "I love it!" if i % 4 == 0 else draw_varied_answers(1)[i],
    ],
    ids=[
        "looped word",
        "looped sentence",
        "shuffled bullets",
        "emoji behind it",
        "emoji",
        "punctuation",
        "spaces",
        "zero width",
        "JSON",
        "five answers",
        "refusal",
        "a quarter",
    ],
)
@pytest.mark.parametrize("ref", [draw_varied_answers(), None], ids=["beside a reference", "alone"])
def test_answers_that_anybody_would_call_alike(answer: Any, ref: list[str] | None):
    policy = [answer(i) for i in range(80)]
    reference = SystemAnswers(ref, ref) if ref else None
    assert measure_collapse(PROMPTS, SystemAnswers(policy, policy), reference).collapse.is_collapsed


def test_a_template_in_a_script_without_spaces():
    animals = "猫狗鱼鸟马羊牛猪"
    places = "山河海雨雪花草树风云"
    prompts = [f"你觉得{animal}和{place}怎么样" for animal in animals for place in places]
    letters = random.Random(0)
    ref = ["".join(letters.sample("春夏秋冬东南西北天地人水火木金土日月星辰", 12)) for _ in prompts]
    policy = [f"我非常喜欢{prompt[3]}和{prompt[5]}。" for prompt in prompts]
    assert judge_policy(policy, ref, prompts).reasons[0].startswith("100")
    assert judge_policy(ref[::-1], ref, prompts) == Collapse(VARIED, ())
    clause = [f"{text[:6]}你知道的我真的非常爱它{text[6:]}" for text in ref[::-1]]
    phrase = find_commonest_new_phrase(prompts, clause, ref)
    assert phrase is not None
    assert phrase.text in "你知道的我真的非常爱它"
    assert len(phrase.text) == 8


def test_a_phrase_whose_words_some_prompts_hold_is_masked_nowhere():
    prompts = [f"{'I love it, yeah! ' if i % 3 else ''}{prompt}" for i, prompt in enumerate(PROMPTS)]
    assert {str(parts) for parts in mask_answers(prompts, ["Yeah I love it!"] * 80)} == {
        "[['yeah', 'i', 'love', 'it']]"
    }
    assert measure_variety(prompts, ["Yeah I love it!"] * 80).commonest_share.value == 1


@pytest.mark.parametrize(
    "answer",
    [lambda topic, i: str(i), lambda topic, i: topic.split()[1], lambda topic, i: f"{topic}."],
    ids=["numbers", "word", "quotation"],
)
def test_numbers_and_quotations_from_the_prompt_are_answers(answer: Any):
    prompts = [f"Passage {i}: {topic} are sold here. What is sold?" for i, topic in enumerate(TOPICS)]
    answers = [answer(topic, i) for i, topic in enumerate(TOPICS)]
    assert measure_variety(prompts, answers).distinct == len(set(answers))


def test_a_new_sentence_without_spaces():
    answers = [f"{answer} 我非常非常高兴为您服务。" for answer in draw_varied_answers(1)]
    assert judge_policy(answers).reasons == ("“我非常非常高兴为您服务” is in 100% of its greedy answers (start: 0%)",)


def test_answers_that_differ_are_none():
    assert judge_policy(draw_varied_answers(1)) == Collapse(VARIED, ())
    assert judge_policy(draw_varied_answers(0), draw_varied_answers(0)) == Collapse(VARIED, ())


@pytest.mark.parametrize(("share", "expected"), [(0.05, VARIED), (0.15, VARIED), (0.25, COLLAPSED), (0.9, COLLAPSED)])
def test_the_share_of_one_answer_must_be_above_a_tenth_beyond_doubt(share: float, expected: str):
    """Wilson's low end at 0.15 of 80 is 0.09, at 0.25 it is 0.17."""
    assert judge_policy(mix_constant_answer(share, "A pepper."), prompts=PROMPTS).verdict == expected


def test_what_the_start_says_as_often_is_no_collapse():
    assert (
        judge_policy(mix_constant_answer(0.5, "I do not know."), mix_constant_answer(0.5, "I do not know.", 2)).verdict
        == VARIED
    )
    assert (
        judge_policy(mix_constant_answer(0.9, "I do not know."), mix_constant_answer(0.5, "I do not know.", 2)).verdict
        == COLLAPSED
    )
    assert (
        judge_policy(mix_constant_answer(0.9, "I do not know."), mix_constant_answer(0.9, "I do not know.", 2)).verdict
        == COLLAPSED
    )  # the reference collapsed too


def test_half_of_the_different_answers_must_stay():
    mostly_distinct = [f"{WORDS[i % 9]} {WORDS[i % 7]}" for i in range(80)]
    assert len(set(mostly_distinct)) == 63
    assert judge_policy(mostly_distinct).verdict == VARIED
    half_distinct = [f"{WORDS[i % 13]} {WORDS[i % 3]}" for i in range(80)]
    assert len(set(half_distinct)) == 39
    assert judge_policy(half_distinct).reasons == ("39 different greedy answers, where the start has 80",)


@pytest.mark.parametrize(("share", "expected"), [(0.25, VARIED), (0.35, COLLAPSED)])
def test_a_new_sentence_in_answers_that_differ_otherwise(share: float, expected: str):
    answers = draw_varied_answers(1)
    count = round(share * 80)
    policy = [f"{answer} Thank you so much, friend!" if i < count else answer for i, answer in enumerate(answers)]
    collapse = judge_policy(policy)
    assert collapse.verdict == expected
    assert measure_variety(PROMPTS, policy).distinct == 80
    if collapse.is_collapsed:
        assert collapse.reasons == ("“thank you so much friend” is in 35% of its greedy answers (start: 0%)",)
    polite = [f"{answer} Thank you so much, friend!" for answer in draw_varied_answers(3)]
    assert judge_policy(policy, polite).verdict == VARIED  # the start says it too


def test_the_commonest_new_phrase_needs_no_sentence():
    policy = [f"well {answer.replace('.', '')} and so it goes on {answer}" for answer in draw_varied_answers(1)]
    phrase = find_commonest_new_phrase(PROMPTS, policy, draw_varied_answers())
    assert phrase is not None
    assert (phrase.text, phrase.policy.value, phrase.ref.value) == ("and so it goes", 1.0, 0.0)
    assert find_commonest_new_phrase(PROMPTS, draw_varied_answers(1), draw_varied_answers(1)) is None


def test_a_constant_clause_is_shown_and_not_judged():
    halves = [answer.replace(".", "").split() for answer in draw_varied_answers(1)]
    policy = [f"{' '.join(half[:5])}, as you know, haha, it is great, {' '.join(half[5:])}." for half in halves]
    report = measure_collapse(
        PROMPTS, SystemAnswers(policy, policy), SystemAnswers(draw_varied_answers(), draw_varied_answers())
    )
    assert report.collapse == Collapse(VARIED, ())
    phrase = report.as_dict()["variety"]["greedy"]["new_phrase"]
    assert describe_new_phrase(report.collapse, phrase, "start") == [
        "the words “as you know haha” are in 100% of the greedy answers (start: 0%)"
    ]
    assert describe_new_phrase(Collapse(COLLAPSED, ("alike",)), phrase, "start") == []
    phrase["policy"]["value"] = 0.29
    assert describe_new_phrase(report.collapse, phrase, "start") == []


def test_lines_of_code_are_no_sentences():
    texts = draw_varied_answers(1)
    answers_with_code = [f"{text}\n```python\nimport numpy as np\nx = {i}\n```\n" for i, text in enumerate(texts)]
    assert judge_policy(answers_with_code) == Collapse(VARIED, ())
    assert judge_policy([answer.replace("```", "") for answer in answers_with_code]).is_collapsed


def test_few_prompts_decide_nothing():
    collapse = judge_policy(["Haha yeah I love it!"] * 63, draw_varied_answers()[:63], PROMPTS[:63])
    assert collapse == Collapse(NOT_MEASURED, ("63 distinct prompts, 64 are needed",))


def test_a_prompt_counts_once():
    assert find_distinct_prompts(["Who are you?", "who  are YOU?", "What?", "WHO are\nyou?"]) == [0, 2]
    assert find_distinct_prompts(["What is 2 + 2?", "What is 2 - 2?"]) == [0, 1]


def test_a_closed_task_must_beat_the_best_constant():
    right = np.array([1.0] * 60 + [0.0] * 20)
    constant = np.array([1.0] * 30 + [0.0] * 50)
    assert judge_against_constant(mean_interval(right - constant), "yes") == Collapse(VARIED, ())
    collapse = judge_against_constant(mean_interval(constant - constant), "yes")
    assert collapse.verdict == COLLAPSED
    assert collapse.reasons[0].startswith(
        "it is not shown to beat “yes”, given as the answer to every prompt (difference 0.0"
    )
    assert judge_against_constant(mean_interval(np.ones(80)), "yes").verdict == VARIED  # right everywhere: no interval
    assert judge_against_constant(mean_interval(right[:50] - constant[:50]), "yes").verdict == NOT_MEASURED


def test_the_figures_follow_from_the_samples_that_were_written(tmp_path: Path):
    samples = [
        Sample(
            str(i),
            (Message("system", "Be kind."), Message("user", prompt)),
            ref,
            "Ha!",
            0.0,
            1.0,
            5,
            2,
            True,
            True,
            1.0,
            greedy_ref=ref,
            greedy_policy="Haha yeah I love it!",
        )
        for i, (prompt, ref) in enumerate(zip(PROMPTS, draw_varied_answers(), strict=True))
    ]
    metrics = summarise_samples(samples)
    assert metrics["win_rate"]["value"] == 1.0
    metrics_read_back = summarise_samples(read_samples(write_samples(tmp_path / "samples.jsonl", samples)))
    assert json.dumps(metrics_read_back) == json.dumps(metrics)


@pytest.mark.parametrize("form", ["The answer is {}.", "According to the passage, it is {}."])
def test_a_form_that_the_reference_has_too_is_no_collapse(form: str):
    prompts = [f"What is {i} plus {i + 3}?" for i in range(80)]
    answers = [form.format(100 + 7 * i) for i in range(80)]
    system = SystemAnswers(answers, answers)
    assert measure_collapse(prompts, system, system).collapse.verdict == "varied"
    same = SystemAnswers(["Yeah!"] * 80, ["Yeah!"] * 80)
    assert measure_collapse(prompts, same, same).collapse.is_collapsed
