"""`stage.judge=people`, asked again: what changed meanwhile is kept or refused, and ties count as votes come in."""

from __future__ import annotations

from pathlib import Path

import pytest
from blind import Bench, against, artifact, better, evaluation, store_of, verdicts, written

from align.annotate.store import Settings
from align.annotate.store.projects import settings_of


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    return Bench(tmp_path, capsys)


def settings(bench: Bench, project: str) -> Settings:
    with store_of(bench.folder) as store, store.reading() as db:
        return settings_of(db, project)


def wanted(bench: Bench, project: str) -> int:
    with store_of(bench.folder) as store:
        ids = [item.id for item in store.items(project)]
    return sum(map(settings(bench, project).wanted, ids))


def configured(bench: Bench, project: str, values: str) -> None:
    bench.run([*bench.annotate("configure"), f"project={project}", f"stage.settings={values}"])


def test_the_same_answer_twice_counts_as_often_as_the_other_pairs_are_judged(bench: Bench) -> None:
    words = [*evaluation(bench.folder, items=200, same=100), "stage.votes=6"]
    before = bench.run(words)
    assert "100 pairs of the same answer twice: a tie, without a question; 0 of them count" in bench.said
    assert "nobody has judged zebra against okapi yet" in bench.said
    assert (against(before), verdicts(before)) == ({}, [])
    assert artifact(before, "people.json")["same_text_counted"] == 0
    with bench.served() as served:
        served.voter("ann").votes(better("!"), 4)
    found = bench.run(words)
    figure = against(found)["okapi"]
    assert (figure["items"], figure["win_rate"]["value"]) == (8, 0.75)  # four won and four ties, as of all 200
    people = artifact(found, "people.json")
    assert (people["same_text"], people["same_text_counted"]) == (100, 4)
    assert sorted(row["order"] for row in verdicts(found))[:4] == [""] * 4


def test_where_all_answers_are_the_same_all_count(bench: Bench) -> None:
    words = evaluation(bench.folder, items=4, same=4)
    written(bench.folder / "okapi.jsonl", [{"id": f"p{i}", "answer": f"Reply {i}?\n"} for i in range(4)])
    found = bench.run(words)
    assert "4 pairs of the same answer twice: a tie, without a question\n" in bench.said
    assert against(found)["okapi"]["items"] == 4


def test_another_prompt_under_the_same_name_is_refused(bench: Bench) -> None:
    words = [*evaluation(bench.folder, items=4), "project=mine"]
    bench.run(words)
    changed = [{"id": f"p{i}", "prompt": f"Question {i}{' or not' if i == 3 else ''}?"} for i in range(4)]
    written(bench.folder / "asked.jsonl", changed)
    assert bench.status(*words) == 2
    assert "project=mine: item p3 of task chat has another prompt or other answers there" in bench.said
    assert "Name another project: project=NAME." in bench.said
    bench.run([*words, "project=second"])


def test_a_named_run_is_told_to_take_another_name(bench: Bench) -> None:
    words = evaluation(bench.folder, items=4)
    bench.run([*words, "run.name=first"])
    assert "this command, given again with another run.name, reads them" in bench.said
    with bench.served() as served:
        served.voter("ann").votes(better("!"), 2)
    assert bench.status(*words, "run.name=first") == 2
    bench.run([*words, "run.name=second"])
    assert "people: 2 of 5 votes" in bench.said


def test_an_overlap_that_was_changed_stays_until_more_is_asked_for(bench: Bench) -> None:
    words = [*evaluation(bench.folder, items=10), "project=mine", "resume=never"]
    bench.run(words)
    assert (settings(bench, "mine").overlap, wanted(bench, "mine")) == (2, 12)
    configured(bench, "mine", "{overlap: 1}")
    for more in ((), ("stage.votes=12",)):
        bench.run([*words, *more])
        assert (settings(bench, "mine").overlap, wanted(bench, "mine")) == (1, 10)
    with store_of(bench.folder) as store:
        store.erase_content("mine", next(store.items("mine")).id)
    bench.run(words)
    assert (settings(bench, "mine").overlap, wanted(bench, "mine")) == (1, 9)
    bench.run([*words, "stage.votes=15"])
    assert wanted(bench, "mine") == 15
    configured(bench, "mine", "{title: Which?}")
    bench.run([*words, "stage.votes=27"])
    assert (settings(bench, "mine").title, wanted(bench, "mine")) == ("Which?", 27)


def test_new_pairs_set_the_overlap(bench: Bench) -> None:
    words = [*evaluation(bench.folder, items=10), "project=mine", "resume=never"]
    bench.run([*words, "stage.votes=6"])
    configured(bench, "mine", "{overlap: 1, title: Which?}")
    bench.run([*words, "stage.votes=12"])
    assert (settings(bench, "mine").title, wanted(bench, "mine")) == ("Which?", 12)


@pytest.mark.parametrize("project", ["is-my-new-good", "Is My_New good", "my.new"])
def test_a_project_does_not_name_a_system_of_several_words(bench: Bench, project: str) -> None:
    words = [word.replace("zebra:", "my-new:") for word in evaluation(bench.folder, items=4)]
    assert bench.status(*words, f"project={project}") == 2
    assert f"project={project}: the people who judge can read it, and it names the system my-new" in bench.said
    bench.run([*words, "project=my-newest"])


def test_an_erased_project_is_asked_again_under_another_name(bench: Bench) -> None:
    words = evaluation(bench.folder, items=4)
    bench.run(words)
    bench.run([*bench.annotate("erase"), "stage.whole=true", f"project={bench.project}"])
    assert bench.status(*words) == 2
    assert f"project={bench.project}: it was erased" in bench.said
    assert "; without project=, this evaluation always has this name" in bench.said
    assert "Name another project: project=NAME." in bench.said
    bench.run([*words, "project=again"])
    assert bench.project == "again"


def test_the_same_evaluation_in_another_project_has_another_order_and_other_sides(bench: Bench) -> None:
    """Whoever knows the settings and this source, but no project's key, can predict neither."""
    words = [*evaluation(bench.folder, items=40), "stage.votes=80"]  # two votes on each: sides are one sequence
    seen = []
    for project in ("one", "two"):
        bench.run([*words, f"project={project}"])
        with store_of(bench.folder) as store:
            items = list(store.items(project))
        sides = tuple(item.candidates[0].text.endswith("!") for item in items)
        assert sum(sides) == 20
        seen.append((sides, tuple(item.prompt.messages[0].content for item in items)))
    (sides, order), (other_sides, other_order) = seen
    assert sides != other_sides
    assert order != other_order
