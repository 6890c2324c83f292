"""`recipes/demo`: its questions, its rubric on answers such as small models give, its null policies and its guards."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "demo"


@pytest.fixture(scope="module")
def recipe() -> Iterator[dict[str, ModuleType]]:
    """Import the modules of the recipe as its scripts do, and forget them afterwards: their names are common ones."""
    names = ("prompts", "rubric", "null_policies", "guards", "seeds", "readers")
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


def build_figures(seed: int = 1, change: float = 0.25, **figures: Any) -> dict[str, Any]:
    """Build the figures of one seed as guards.py saves them. They reach all goals unless `figures` say otherwise."""
    return {
        "seed": seed,
        "processor": "Xeon",
        "questions_file": "measured",
        "questions": 300,
        "rubric": {"before": 0.5, "after": 0.5 + change},
        "rubric_change": {"value": change, "low": change - 0.05, "high": change + 0.05, "n": 300},
        "over_cut": {"value": 0.1, "low": 0.02, "high": 0.18, "n": 300},
        "kl": 4.0 + seed,
        "guards": [{"name": "finished answers", "before": 0.8, "after": 1.0, "limit": "no fewer", "is_met": True}],
        "collapse": "varied",
        "topic": build_topic(lambda i: (i % 20 == 0) - (i % 20 == 10)),
        **figures,
    }


def build_topic(change: Callable[[int], int]) -> list[dict[str, Any]]:
    """Build the hits of 300 questions whose change is a function of the question's number."""
    return [
        {"question": f"Question {i}?", "before": int(change(i) < 0), "after": int(change(i) > 0)} for i in range(300)
    ]


BARS = {"rubric_change": (">=", 0.15), "kl": ("<=", 7.0)}


def list_missed(recipe, *seeds: dict[str, Any]) -> list[str]:
    verdicts = recipe["seeds"].list_verdicts([recipe["seeds"].build_row(seed) for seed in seeds], BARS)
    return [verdict.text for verdict in verdicts if not verdict.is_met]


def test_bars_are_three_standard_deviations_from_the_mean_of_the_tuning_seeds(recipe) -> None:
    rows = [recipe["seeds"].build_row(build_figures(seed, change)) for seed, change in ((0, 0.2), (1, 0.25), (2, 0.3))]
    bars = recipe["seeds"].compute_bars(rows)
    assert bars == {"rubric_change": (">=", 0.1), "over_cut": (">=", 0.1), "kl": ("<=", 8.0)}


@pytest.mark.parametrize(
    ("figures", "missed"),
    [
        ({}, []),
        ({"change": 0.1}, ["mean over the seeds", "lowest low end", "seed 2, change of the rubric"]),
        ({"over_cut": {"value": 0.1, "low": -0.01, "high": 0.2, "n": 300}}, ["over the null policy"]),
        ({"kl": 9.0}, ["seed 2, KL"]),
        ({"guards": [{"name": "grammar", "before": 1, "after": 2, "limit": "", "is_met": False}]}, ["guards: grammar"]),
        ({"collapse": "collapsed"}, ["collapsed"]),
        ({"topic": build_topic(lambda i: -(i % 2))}, ["topic"]),
    ],
)
def test_each_goal_of_the_seeds_can_be_missed(recipe, figures: dict[str, Any], missed: list[str]) -> None:
    texts = list_missed(recipe, build_figures(1, 0.25), build_figures(2, **{"change": 0.21, **figures}))
    assert len(texts) == len(missed)
    assert all(name in text for name, text in zip(missed, texts, strict=True)), texts


def test_the_mean_change_and_the_topic_are_judged_over_all_seeds(recipe) -> None:
    assert list_missed(recipe, build_figures(1, 0.3), build_figures(2, 0.16)) == []
    worse = build_topic(lambda i: -(i % 10 == 0))
    better = build_topic(lambda i: int(i % 10 == 1))
    assert "topic" in " ".join(list_missed(recipe, build_figures(1, topic=worse), build_figures(2, topic=worse)))
    assert list_missed(recipe, build_figures(1, topic=worse), build_figures(2, topic=better)) == []
    unchanged = build_topic(lambda i: 0)
    assert list_missed(recipe, build_figures(1, topic=unchanged), build_figures(2, topic=unchanged)) == []


def test_seeds_that_are_missing_or_on_other_questions_are_an_error(
    recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds = recipe["seeds"]

    def save(seed: int, **figures: Any) -> None:
        (tmp_path / str(seed)).mkdir(exist_ok=True)
        (tmp_path / str(seed) / "figures.json").write_text(json.dumps(build_figures(seed, **figures)))

    monkeypatch.setattr(sys, "argv", ["seeds.py", "measured", str(tmp_path)])
    monkeypatch.setattr(seeds, "BARS", tmp_path / "bars.json")
    save(0)
    save(1)
    with pytest.raises(SystemExit, match=r"2/figures.json is missing: run recipes/demo/seeds.sh measured"):
        seeds.main()
    save(2, questions_file="tuning")
    with pytest.raises(SystemExit, match="holds seed 2 on the tuning questions"):
        seeds.main()
    save(2)
    with pytest.raises(SystemExit, match=r"bars.json is missing"):
        seeds.main()
    (tmp_path / "bars.json").write_text(json.dumps(BARS))
    assert seeds.main() == 0
    assert "| rubric, before → after | 0.500 → 0.750 |" in capsys.readouterr().out
    save(2, change=0.0)
    assert seeds.main() == 1
    assert "MISSED" in capsys.readouterr().out


def build_sides(recipe, **after: Any) -> dict[str, Any]:
    """Build both sides of an evaluation on 20 questions. The policy's answers are the start's unless `after` says
    otherwise."""
    Answer = recipe["null_policies"].Answer
    texts = [f"It has a part {word}." for word in "abcdefghijklmnopqrst"]

    def build(texts: list[str], finished: bool = True, greedy: list[str] | None = None) -> Any:
        sampled = [Answer(f"What about roses {i}?", text, finished) for i, text in enumerate(texts)]
        return recipe["guards"].Side(
            sampled, greedy or [f"Some {word}{word} words." for word in "abcdefghijklmnopqrst"]
        )

    return {"before": build(texts), "after": build(**{"texts": texts, **after})}


@pytest.mark.parametrize(
    ("after", "shift", "kl", "missed"),
    [
        ({}, 0.29, 8.0, []),
        ({}, -0.31, 1.0, ["log-likelihood of a token, nats"]),
        ({}, 0.31, 1.0, ["log-likelihood of a token, nats"]),
        ({}, 0.0, 8.1, ["KL, nats an answer"]),
        ({"finished": False}, 0.0, 1.0, ["finished answers"]),
        ({"texts": ["a b c d a b c d."] * 20}, 0.0, 1.0, ["repeated 4-grams"]),
        ({"texts": ["The the cat sat. They is."] * 20}, 0.0, 1.0, ["grammar findings in 100 words"]),
        ({"texts": ["About roses here."] * 20}, 0.0, 1.0, ["words copied from the question"]),
        (
            {"greedy": ["It is so good."] * 5 + [f"{c}." for c in "abcdefghijklmno"]},
            0,
            1,
            ["greedy answers with the commonest sentence"],
        ),
    ],
)
def test_each_guard_can_be_missed(recipe, after: dict[str, Any], shift: float, kl: float, missed: list[str]) -> None:
    sides = build_sides(recipe, **after)
    sides["before"].sampled[0] = sides["before"].sampled[0]._replace(text="w x y z w x y. It have a parts part part.")
    questions = [answer.question for answer in sides["before"].sampled]
    guards = recipe["guards"].list_guards(questions, sides, [[-2.0] * 20, [-2.0 + shift] * 20], {"kl": kl})
    assert [guard.name for guard in guards if not guard.is_met] == missed, guards


def test_a_policy_that_says_nothing_misses_guards_without_a_crash(recipe) -> None:
    sides = build_sides(recipe, texts=[""] * 20)
    questions = [answer.question for answer in sides["before"].sampled]
    guards = recipe["guards"].list_guards(questions, sides, [[], []], {"kl": 1.0})
    assert "log-likelihood of a token, nats" in [guard.name for guard in guards if not guard.is_met]


def test_the_page_of_readers_shows_both_answers_without_their_names(recipe) -> None:
    readers = recipe["readers"]
    Answer = recipe["null_policies"].Answer
    texts = {"before": "start", "after": "policy"}
    sides = {
        side: recipe["guards"].Side([Answer(f"Q{i}?", f"{text} {i}.", is_finished=i != 3) for i in range(8)], [])
        for side, text in texts.items()
    }
    pairs = readers.draw_pairs(sides, 8, seed=3)
    assert pairs != readers.draw_pairs(sides, 8, seed=4)
    assert [pair["A"] for pair in pairs].count("after") == 4
    assert sorted(pair["question"] for pair in pairs) == [f"Q{i}?" for i in range(8)]
    page = readers.format_page(pairs)
    for number, pair in enumerate(pairs, 1):
        i = pair["question"][1]
        end = "." if i != "3" else ". […]"
        a, b = ("policy", "start") if pair["A"] == "after" else ("start", "policy")
        assert f"## {number}. Q{i}?\n\n**A:** {a} {i}{end}\n\n**B:** {b} {i}{end}\n" in page
    assert "before" not in page
    assert "after" not in page
    assert readers.format_table(pairs).count("\n") == 2 + 8


def test_readers_votes_are_counted_by_what_each_letter_stood_for(recipe, tmp_path: Path, capsys) -> None:
    readers = recipe["readers"]
    pairs = [{"question": f"Q{i}?", "before": "b", "after": "a", "A": ("after", "before")[i % 2]} for i in range(30)]
    after = ["AB"[i % 2] for i in range(30)]
    before = ["BA"[i % 2] for i in range(30)]
    votes = {
        "ann": [*after[:21], *before[21:27], "=", "=", after[29]],
        "bob": [*after[:20], "=", *before[21:27], "=", after[28], before[29]],
        "cyd": [*after[:21], *after[21:27], after[27], before[28], "="],
    }
    key = tmp_path / "key.json"
    key.write_text(json.dumps(pairs))
    files = []
    for name, letters in votes.items():
        files.append(tmp_path / f"{name}.txt")
        files[-1].write_text("".join(f"{i}. {letter.lower()}\n" for i, letter in enumerate(letters, 1)))
    assert readers.main("count", key, *map(str, files)) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:5] == [
        ["ann", "22", "6", "2"],
        ["bob", "21", "7", "2"],
        ["cyd", "28", "1", "1"],
        ["majority", "21", "6", "3"],
    ]
    files[2].write_text(files[1].read_text())
    files[0].write_text(files[1].read_text().replace(f"1. {after[0].lower()}\n", "1. =\n", 1))
    files[1].write_text(files[0].read_text())
    assert readers.main("count", key, *map(str, files)) == 1
    assert "after is preferred in 20 of 30 pairs (bar: >= 21)  MISSED" in capsys.readouterr().out
    files[0].write_text(f"{files[1].read_text()}1 B\n31 A\n")
    with pytest.raises(SystemExit, match=r"without exactly one vote: \[1\]; unknown pairs: \[31\]"):
        readers.main("count", key, *map(str, files))
    with pytest.raises(SystemExit, match="name those of 3 readers"):
        readers.main("count", key, str(files[0]))
    with pytest.raises(SystemExit, match="readers may have voted"):
        readers.main("draw", key, str(tmp_path / "page.md"), str(tmp_path))


def test_the_readers_bar_is_the_binomial_probability(recipe) -> None:
    readers = recipe["readers"]
    assert readers.compute_p_value(readers.MIN_PREFERRED, readers.PAIRS) == pytest.approx(0.0214, abs=1e-4)
