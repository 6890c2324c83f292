"""`recipes/demo`: its questions, its rubric on answers such as small models give, its null policies and its guards."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "demo"


@pytest.fixture(scope="module")
def recipe() -> Iterator[dict[str, ModuleType]]:
    """Import the modules of the recipe as its scripts do, and forget them afterwards: their names are common ones."""
    names = ("prompts", "rubric", "null_policies", "guards")
    sys.path.insert(0, str(RECIPE))
    try:
        yield {name: __import__(name) for name in names}
    finally:
        sys.path.remove(str(RECIPE))
        for name in names:
            sys.modules.pop(name, None)


def test_no_topic_is_in_two_files(recipe, tmp_path: Path) -> None:
    recipe["prompts"].main(tmp_path)
    questions = {
        path.stem: [json.loads(line)["prompt"] for line in path.read_text().splitlines()] for path in tmp_path.iterdir()
    }
    assert {name: len(rows) for name, rows in questions.items()} == {"training": 864, "tuning": 128, "measured": 256}
    topics = recipe["prompts"].list_topics()
    names = [topic.name.lower().removeprefix("a ").removeprefix("an ").removeprefix("the ") for topic in topics]
    assert len({name.removesuffix("s") for name in names}) == len(names)
    owners: dict[str, set[str]] = {}
    for file, rows in questions.items():
        for topic in topics:
            if {template.format(topic.name) for template in topic.templates} & {*rows}:
                owners.setdefault(topic.name, set()).add(file)
    assert len(owners) == len(topics)
    assert all(len(files) == 1 for files in owners.values())


def test_every_question_has_a_topic_that_its_templates_lack(recipe) -> None:
    for topic in recipe["prompts"].list_topics():
        for question in recipe["prompts"].iter_all_questions([topic]):
            assert recipe["rubric"].find_topic_stem(question) is not None, question


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("How much time a week does swimming take?", "Swim three times a week with a coach."),
        ("What do owls eat?", "An owl eats mice."),
        ("How do I grow daisies?", "A daisy needs sun and water."),
        ("What is the atom?", "Atoms are tiny building blocks."),
        ("Who invented the telephone?", "Alexander Graham Bell invented the telephone in 1876."),
        ("Where do penguins live?", "Penguins live in Antarctica."),
        ("How do I grow roses?", 'My neighbor says: "Roses need sun."'),
    ],
)
def test_short_answers_about_the_topic_are_answers(recipe, question: str, answer: str) -> None:
    assert recipe["rubric"].is_answer(question, answer)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Who invented the internet?", "That is an interesting topic which many people find useful."),
        ("What does a personal trainer do all day?", "Every person should know what they want from life."),
        ("How do I clean a cast iron pan?", "A mattress needs fresh air and some sun."),
        ("How do I grow roses?", "Roses need sun, water and"),
        ("How do I grow roses?", "Roses need a lot of sun..."),
        ("How do I grow roses?", "How do I grow roses? Would you like to know more about it?"),
        ("How do I grow roses?", "Roses."),
        ("How do I grow roses?", ""),
    ],
)
def test_cut_texts_and_those_about_something_else_meet_no_item(recipe, question: str, answer: str) -> None:
    assert not any(recipe["rubric"].check_items(question, answer).values())


GOOD = "Plant roses in a sunny spot with rich soil. Water their roots deeply every week. Cut old branches in spring."


@pytest.mark.parametrize(
    ("answer", "missed"),
    [
        (GOOD, set()),
        (f"{GOOD} Feed them in May.", {"brief"}),
        ("Roses like a pH between 6 and 7. Water them each morning, feed them monthly, and cut dead flowers.", set()),
        (
            "Roses have vitamin C. They need sun, rich soil, water, patience, mulch, sharp scissors etc. Good luck.",
            set(),
        ),
        ("Water roses at 6 a.m. or 7 p.m. in dry months. The U.S. climate suits most garden varieties well.", set()),
        (
            "Roses want six hours of sun and rich soil and water in the morning and mulch on their roots in winter.",
            {"plain"},
        ),
        (
            "Roses need rich soil and sun. Roses need rich soil and sun. Add water, mulch, patience, food.",
            {"unrepeated"},
        ),
        ("Here are some tips to grow roses, which need sun, water, mulch, soil, food, scissors, patience.", {"prose"}),
        ("As an AI language model, I think roses need sun, water, mulch, soil, food and patience.", {"prose"}),
        ("Great question! Roses need sun, water, mulch, soil, food, patience and scissors.", {"prose"}),
        ("Grow roses in **full sun**, with water, mulch, soil, food, patience and scissors.", {"prose"}),
        ("To grow roses:\n- give them sun, water and mulch\n- give them soil, food, space and patience.", {"prose"}),
        ("Do it so: 1. Plant roses in sun and soil. 2. Water and feed them with patience.", {"brief", "prose"}),
        ("Roses need sun.", {"useful"}),
    ],
)
def test_items(recipe, answer: str, missed: set[str]) -> None:
    items = recipe["rubric"].check_items("How do I grow roses?", answer)
    assert {item for item, is_met in items.items() if not is_met} == missed


def test_annotators_with_other_preferences_score_the_same_items(recipe) -> None:
    rubric = recipe["rubric"]
    chats = [
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "How do I grow roses?"}, answer]
        for answer in ({"role": "assistant", "content": text} for text in (GOOD, f"{GOOD} Feed them.", "Rose"))
    ]
    assert rubric.score_by_rubric(chats) == [1, 0.8, 0]
    assert rubric.score_as_concise_reader(chats) == [1, pytest.approx(5 / 7), 0]
    assert rubric.score_as_curious_reader(chats) == [1, pytest.approx(6 / 7), 0]


def test_null_policies_that_do_not_answer_score_below_real_answers(recipe) -> None:
    null_policies = recipe["null_policies"]
    topics = recipe["prompts"].list_topics()[:40]
    answers = [
        null_policies.Answer(topic.templates[0].format(topic.name), f"About {topic.name} people say a few true things.")
        for topic in topics
    ]
    scores = {
        name: sum(null_policies.score_answers(given)) / len(given)
        for name, given in {"untouched": answers, **null_policies.build_null_answers(answers)}.items()
    }
    assert all(scores[name] < 0.1 < scores["untouched"] for name in null_policies.MUST_LOSE), scores
    assert null_policies.score_answers([answers[0]._replace(is_finished=False)]) == [0]


def test_figures_of_texts(recipe) -> None:
    guards = recipe["guards"]
    assert guards.match_lengths("a b c", "d e") == ("a b", "d e")
    assert guards.compute_repeated_share("a b c d a b c d") == pytest.approx(1 / 5)
    assert guards.compute_repeated_share("a b") == 0
    assert guards.compute_copied_share("How do I grow roses?", "Grow roses well") == pytest.approx(2 / 3)
    assert guards.compute_copied_share("How?", "") == 0
    assert guards.count_grammar_findings(["They is good. The the cat sat."]) > 10
    questions = [f"What is item{i}?" for i in range(20)]
    answers = [f"Well item{i} is lovely. It has {i} parts." for i in range(20)]
    assert guards.find_commonest_sentence(questions, answers)[1] == 1
    assert guards.find_commonest_sentence(questions, [f"{i}." for i in range(20)]) == ("", 0)


def test_likelihoods_are_compared_at_positions_that_both_answers_reach(recipe) -> None:
    before = [np.array([-1.0, -1.0, -9.0]), np.array([-2.0]), np.array([])]
    after = [np.array([-2.0, -2.0]), np.array([-1.0, -8.0]), np.array([-1.0])]
    assert recipe["guards"].compute_matched_means(before, after) == ([-1.0, -2.0], [-2.0, -1.0])
