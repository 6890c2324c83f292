"""Win rates by people (`stage.judge=people`): answers of two systems become an annotation project."""

from __future__ import annotations

import json
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blind_voting import (
    NAMES,
    BlindEvaluations,
    open_vote_store,
    prefer_answer_with,
    read_artifact,
    read_comparison,
    read_verdicts,
    strip_html,
    write_blind_evaluation,
)
from json_lines import write_rows
from processes import Forks
from stage_commands import Ready
from starlette.testclient import TestClient

from align.annotate.store import Judgement, ProjectSettings, Store
from align.annotate.store.projects import read_settings
from align.run import read_manifest
from align.stages.eval import votes

TABLES = ("People: each of them", "p after Holm")
"""Headings of the page that need at least one vote."""


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> BlindEvaluations:
    return BlindEvaluations(tmp_path, capsys)


def test_votes_over_http_become_the_win_rate(bench: BlindEvaluations) -> None:
    gold = [{"prompt": f"Sum {i}?", "answers": ["right", "wrong"], "expected": [[0], [1]]} for i in range(6)]
    words = write_blind_evaluation(bench.folder, items=22, same=2)
    words += [f"stage.gold={write_rows(bench.folder / 'gold.jsonl', gold)}", "stage.votes=30"]
    first = bench.run(words)
    assert "people: 0 of 30 votes on 20 pairs" in bench.output
    assert "2 pairs of the same answer twice: a tie, without a question" in bench.output
    with open_vote_store(bench.folder) as store:
        assert len(list(store.items(bench.project))) == 20 + len(gold)
    # With the default share of 0.1, one run in 25 draws no gold item.
    bench.run([*bench.annotate("configure"), f"project={bench.project}", "stage.settings={gold_share: 1.0}"])

    lost = {f"Question {i}?" for i in range(2, 8)}

    def choose_answer(prompt: str, first_text: str, second_text: str) -> int:
        return prefer_answer_with("right" if "Sum" in prompt else "." if prompt in lost else "!")(
            prompt, first_text, second_text
        )

    with bench.start_server() as served:
        ann = served.voter("ann")
        bob = served.voter("bob")
        for _ in range(40):
            ann.votes(choose_answer, 1)
            bob.votes(choose_answer, 1)
        rankings = served.store.rankings(served.project)
        votes = [vote for vote in rankings if vote.purpose == "work"]
        gold_votes = [vote for vote in rankings if vote.purpose == "gold"]
    assert len(votes) == 30

    second = bench.run(words)
    assert second != first
    assert "people: 30 of 30 votes on 20 pairs, by 2 people" in bench.output
    assert "stage=annotate" not in bench.output  # all votes are there
    figures = read_comparison(second)["okapi"]
    assert figures["win_rate"]["value"] == pytest.approx((14 + 2 * 0.5) / 22)
    assert figures["difference"]["value"] == pytest.approx((14 - 6) / 22)
    rows = read_verdicts(second)
    assert [row["order"] for row in rows].count("") == 2
    assert abs([row["order"] for row in rows].count("first") - [row["order"] for row in rows].count("second")) <= 1
    assert {row["by"] for row in rows if row["order"]} == {vote.annotator for vote in votes}

    people = read_artifact(second, "people.json")
    assert (people["votes"], people["wanted"], people["agreement"]["items"]) == (30, 30, 10)
    assert people["agreement"]["raw"]["value"] == people["gold"]["value"] == 1.0
    assert people["gold_votes"] == people["gold_right"] == len(gold_votes) == 2 * len(gold)
    published = json.dumps([people, rows]) + (second / "report.html").read_text()
    assert "ann" not in json.dumps([people, rows]).replace("annotat", "")
    assert all(person["pseudonym"] in published for person in people["people"])

    inputs = read_manifest(second).inputs["votes"]
    assert (inputs.project, inputs.seq) == (
        served.project,
        max(vote.seq for vote in rankings),
    )
    bodies = "\n".join([*ann.seen, *bob.seen]).lower()
    for name in (*NAMES, first.name, second.name, "jsonl", str(bench.folder), *read_input_digests(second)):
        assert name.lower() not in bodies, name
    assert bench.run(words) == second  # the same votes are the same run

    export = bench.run([*bench.annotate("export"), f"project={served.project}"])
    files = {path.name: path.read_text() for path in (export / "artifact").iterdir()}
    assert "ledger.jsonl" in files
    for name in (*NAMES, first.name, second.name, *read_input_digests(second)):
        assert name not in "".join(files.values()), name


def read_input_digests(run: Path) -> list[str]:
    """Return the digests of what was evaluated. The votes' digest is in the project's own ledger."""
    return [read.digest[:12] for name, read in read_manifest(run).inputs.items() if name != "votes"]


def test_votes_that_arrive_during_a_run_count_in_the_next(
    bench: BlindEvaluations, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*write_blind_evaluation(bench.folder, items=4), "project=mine"]
    open_project = votes.fill_project

    def open_and_vote(store: Store, project: str, *more: Any) -> Any:
        items = open_project(store, project, *more)
        item = next(store.items(project))
        tiers = ((item.candidates[0].id,), (item.candidates[1].id,))
        store.record(project, item.id, Judgement(tiers), annotator="ann", key="k")
        return items

    with monkeypatch.context() as patch:
        patch.setattr(votes, "fill_project", open_and_vote)
        first = bench.run(words)
    assert read_verdicts(first) == []
    assert read_artifact(first, "people.json")["votes"] == 0
    second = bench.run(words)
    assert second != first
    assert len(read_verdicts(second)) == 1
    assert read_artifact(second, "people.json")["votes"] == 1


def test_ties_of_the_same_text_count_in_the_share_of_judged_pairs(bench: BlindEvaluations) -> None:
    words = [*write_blind_evaluation(bench.folder, items=200, same=100), "stage.votes=6"]
    before = bench.run(words)
    assert "100 pairs of the same answer twice: a tie, without a question; 0 of them count" in bench.output
    assert "zebra has not been judged against okapi yet" in bench.output
    assert read_comparison(before) == {}
    assert read_verdicts(before) == []
    assert read_artifact(before, "people.json")["same_text_counted"] == 0
    with bench.start_server() as served:
        served.voter("ann").votes(prefer_answer_with("!"), 4)
    after = bench.run(words)
    figures = read_comparison(after)["okapi"]
    assert figures["items"] == 8  # four wins and four ties, the ratio of all 200 pairs
    assert figures["win_rate"]["value"] == 0.75
    people = read_artifact(after, "people.json")
    assert people["same_text"] == 100
    assert people["same_text_counted"] == 4
    assert [row["order"] for row in read_verdicts(after)].count("") == 4


def test_all_ties_count_if_all_answers_are_the_same(bench: BlindEvaluations) -> None:
    words = write_blind_evaluation(bench.folder, items=4, same=4)
    write_rows(bench.folder / "okapi.jsonl", [{"id": f"p{i}", "answer": f"Reply {i}?\n"} for i in range(4)])
    run = bench.run(words)
    assert "4 pairs of the same answer twice: a tie, without a question\n" in bench.output
    assert read_comparison(run)["okapi"]["items"] == 4
    assert "no pair is left to ask people about" in bench.output


def test_each_project_has_its_own_order_and_sides(bench: BlindEvaluations) -> None:
    """The settings of an evaluation do not predict either: both depend on the project's key."""
    words = [
        *write_blind_evaluation(bench.folder, items=40),
        "stage.votes=80",
    ]  # two votes on each pair: sides are one sequence
    sides = list[list[bool]]()
    prompts = list[list[str]]()
    for project in ("one", "two"):
        bench.run([*words, f"project={project}"])
        with open_vote_store(bench.folder) as store:
            items = list(store.items(project))
        sides.append([item.candidates[0].text.endswith("!") for item in items])
        prompts.append([item.prompt.messages[0].content for item in items])
    assert [sum(project_sides) for project_sides in sides] == [20, 20]
    assert sides[0] != sides[1]
    assert prompts[0] != prompts[1]


@pytest.mark.parametrize("project", ["one", "two", "three", "four"])  # each has another key, and so other sides
def test_more_votes_add_pairs_and_keep_the_sides_of_the_others(bench: BlindEvaluations, project: str) -> None:
    words = [*write_blind_evaluation(bench.folder, items=20), f"project={project}"]
    bench.run([*words, "stage.votes=6"])
    with open_vote_store(bench.folder) as store:
        first_candidates = {item.id: item.candidates for item in store.items(project)}
    assert len(first_candidates) == 5
    bench.run([*words, "stage.votes=30"])
    assert "people: 0 of 30 votes on 20 pairs" in bench.output
    with open_vote_store(bench.folder) as store:
        all_candidates = {item.id: item.candidates for item in store.items(project)}
    assert len(all_candidates) == 20
    assert first_candidates.items() <= all_candidates.items()
    assert sum(candidates[0].text.endswith("!") for candidates in all_candidates.values()) == 10


def test_fewer_votes_than_asked_are_said_and_decide_no_gate(bench: BlindEvaluations) -> None:
    words = write_blind_evaluation(bench.folder, items=10)
    gate = "eval.gates=[{name: better, task: chat, against: okapi, is: superior, least_n: 8}]"
    # a gate is about an artifact, and these are files: so the figures alone
    bench.refuses(*words, gate, says="gate")
    first = bench.run(words)
    assert read_comparison(first) == {}
    assert "zebra has not been judged against okapi yet" in bench.output
    page = (first / "report.html").read_text()
    assert not any(text in page for text in TABLES)  # which would be empty
    assert bench.run(words) == first
    with bench.start_server() as served:
        assert served.voter("ann").votes(prefer_answer_with("!"), 3) == 3
    part = bench.run(words)
    assert "people: 3 of 12 votes on 10 pairs, by 1 person" in bench.output
    assert "this command, given again, reads them" in bench.output
    assert (read_comparison(part)["okapi"]["win_rate"]["value"], read_comparison(part)["okapi"]["items"]) == (1.0, 3)
    assert all(text in (part / "report.html").read_text() for text in TABLES)
    with open_vote_store(bench.folder) as store:
        assert len(list(store.items(bench.project))) == 10  # two runs, one project


def test_the_command_that_is_printed_serves_the_project(
    bench: BlindEvaluations, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.run(write_blind_evaluation(bench.folder, items=4))
    [line] = [line for line in bench.output.splitlines() if "stage=annotate" in line]
    pages = list[str]()

    def read_login_page(app: Any, host: str, port: int, report_ready: Callable[[], None]) -> None:
        report_ready()
        client = TestClient(app, base_url=f"http://127.0.0.1:{port}")
        pages.append(client.get("/login").text)

    monkeypatch.setattr("align.web.server.serve_app", read_login_page)
    words = shlex.split(line.partition(": ")[2])
    assert words[:3] == ["python", "-m", "align"]
    bench.run(words[3:])
    assert len(pages) == 1
    assert "/invite?token=" in bench.output
    assert "zebra" not in pages[0]


def test_what_cannot_be_asked_is_refused(bench: BlindEvaluations) -> None:
    words = write_blind_evaluation(bench.folder, items=4)
    rows = [{"id": f"p{i}", "prompt": f"Question {i}?", "check": {"kind": "regex", "pattern": "R"}} for i in range(4)]
    checked = f"eval.tasks=[{{name: chat, path: {write_rows(bench.folder / 'checked.jsonl', rows)}}}]"
    gold = write_rows(bench.folder / "gold.jsonl", [{"id": "g", "prompt": "2 + 2?", "answers": ["4", "5"]}])
    for more, says in (
        (["stage.votes=401"], "stage.votes=401: are too many votes for 4 pairs"),
        (["stage.judge=reward", "stage.votes=4"], "stage.votes=4: applies only if people judge"),
        ([checked], "stage.judge=people: has nothing to judge"),
        (["stage.gold=none.jsonl"], "stage.gold=none.jsonl"),
        ([f"stage.gold={gold}"], "is no pair with a known order"),
    ):
        bench.refuses(*words, *more, says=says)
    bench.refuses("stage=eval", "stage.judge=people", says="applies to several systems, and stage.systems is not set")

    bench.run([*words, "project=mine"])
    items = write_rows(bench.folder / "items.jsonl", [{"prompt": "else?", "answers": ["a", "b"]}])
    bench.run([*bench.annotate("import"), f"stage.path={items}", "project=other"])
    bench.refuses(
        *words, "project=other", says="project=other: it holds 1 item of something other than this evaluation"
    )
    write_rows(bench.folder / "okapi.jsonl", [{"id": f"p{i}", "answer": f"another {i}"} for i in range(4)])
    bench.refuses(*words, "project=mine", says="of task chat has another prompt or other answers in this project")
    bench.run([*bench.annotate("erase"), "stage.whole=true", "project=mine"])
    bench.refuses(*words, "project=mine", says="it was erased")


def test_simulated_votes_are_no_peoples(bench: BlindEvaluations) -> None:
    words = [*write_blind_evaluation(bench.folder, items=4), "project=mine"]
    bench.run(words)
    with open_vote_store(bench.folder) as store:
        for item in store.items("mine"):
            tiers = tuple((candidate.id,) for candidate in item.candidates)
            store.record("mine", item.id, Judgement(tiers, source="simulated"), annotator="s", key=item.id)
    bench.refuses(*words, says="are simulated, not a person's")
    bench.run([*words, "data.allow_simulated=true"])
    assert "4 of" in bench.output


def test_known_answers_repeats_skips_reviews_and_who_is_forgotten(bench: BlindEvaluations) -> None:
    """Annotators who fail the known answers are shown and count. Votes of a forgotten annotator are gone."""
    gold = [{"prompt": f"Sum {i}?", "answers": ["right", "wrong"], "expected": [[0], [1]]} for i in range(4)]
    words = write_blind_evaluation(bench.folder, items=24)
    words += [f"stage.gold={write_rows(bench.folder / 'gold.jsonl', gold)}", "stage.votes=48", "project=mine"]
    bench.run(words)
    bench.run([*bench.annotate("configure"), "project=mine", "stage.settings={gold_share: 0.5, repeat_share: 0.5}"])
    with bench.start_server() as served:
        ann = served.voter("ann")
        bob = served.voter("bob", "reviewer")
        ann.votes(lambda prompt, a, b: prefer_answer_with("right" if "Sum" in prompt else "!")(prompt, a, b))
        bob.votes(lambda prompt, a, b: prefer_answer_with("wrong" if "Sum" in prompt else ".")(prompt, a, b))
        pseudonyms = {name: served.store.pseudonym("mine", name) for name in ("ann", "bob")}
        rankings = served.store.rankings("mine")
    by_both = bench.run(words)
    assert read_comparison(by_both)["okapi"]["win_rate"]["value"] == 0.5  # they contradict each other on every pair
    people = read_artifact(by_both, "people.json")
    by_pseudonym = {person["pseudonym"]: person for person in people["people"]}
    assert by_pseudonym[pseudonyms["ann"]]["gold"]["value"] == 1.0
    assert by_pseudonym[pseudonyms["bob"]]["gold"]["value"] == 0.0
    assert people["gold"]["value"] == 0.5
    assert people["repeats"]["value"] == 1.0
    assert people["agreement"]["raw"]["value"] == 0.0
    assert people["agreement"]["alpha"]["value"] < 0
    assert len(read_verdicts(by_both)) == 48 == sum(vote.purpose == "work" for vote in rankings) < len(rankings)
    orders = [row["order"] for row in read_verdicts(by_both)]
    assert orders.count("first") == orders.count("second") == 24  # each pair was shown either way

    with bench.start_server() as served:
        task = served.voter("cem", "reviewer")
        step = task.ask("GET", "/api/review")
        prompt = strip_html(step["task"]["prompt"][-1]["written"])
        task.ask("POST", "/api/vote", json=task.vote(step, prefer_answer_with("!")))
    reviewed = bench.run(words)
    assert read_artifact(reviewed, "people.json")["settled"] == 1
    settled = [row for row in read_verdicts(reviewed) if row["prompt"] == f"p{prompt.split()[1][:-1]}"]
    assert [row["verdict"] for row in settled] == [1.0]  # the review in place of both votes
    assert read_comparison(reviewed)["okapi"]["win_rate"]["value"] == pytest.approx((23 * 0.5 + 1) / 24)

    bench.run([*bench.annotate("quarantine"), "project=mine", "stage.annotator=Bob"])
    without_bob = bench.run(words)
    assert "24 of 48 votes on 24 pairs, by 2 people" in bench.output
    assert read_comparison(without_bob)["okapi"]["win_rate"]["value"] == 1.0
    people = read_artifact(without_bob, "people.json")
    assert (people["gold"]["value"], people["agreement"]["items"]) == (1.0, 0)
    assert {person["pseudonym"] for person in people["people"] if person["quarantined"]} == {pseudonyms["bob"]}
    bench.run([*bench.annotate("release"), "project=mine", f"stage.annotator={pseudonyms['bob']}"])
    released = bench.run(words)
    assert read_verdicts(released) == read_verdicts(reviewed)

    forget = ["stage=registry", "stage.action=forget", "stage.annotator=bob", "project=mine", "stage.apply=true"]
    assert bench.status(*forget, f"run.root={bench.folder / 'runs'}") == 0, bench.output
    assert f"eval:{by_both.name}" in bench.output  # it read bob's votes
    by_ann = bench.run(words)
    assert "24 of 48 votes" in bench.output
    assert read_comparison(by_ann)["okapi"]["win_rate"]["value"] == 1.0
    assert pseudonyms["bob"] not in json.dumps([read_verdicts(by_ann), read_artifact(by_ann, "people.json")])


def test_killed_while_pairs_are_added_it_asks_about_each_pair_once(bench: BlindEvaluations, forks: Forks) -> None:
    words = write_blind_evaluation(bench.folder, items=12)
    before = (
        "import os, signal, align.stages.eval\nfrom align.annotate.store import Store\n"
        "real, calls = Store.add_item, []\n"
        "def dies(*given, **more):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*given, **more)\n"
        "Store.add_item = dies\n"
    )
    killed = forks.start(bench.folder, *words, before=before).wait()
    assert killed.status == -signal.SIGKILL, killed
    with Store.open(f"sqlite:///{bench.folder / 'runs' / 'annotations.db'}") as store:
        assert not any(list(store.items(project)) for project in store.projects())  # all of them or none
    run = bench.run(words)
    with open_vote_store(bench.folder) as store:
        items = list(store.items(bench.project))
        store.verify()
    assert len(items) == len({item.prompt for item in items}) == 12
    assert abs(2 * sum(item.candidates[0].text.endswith("!") for item in items) - 12) <= 1
    assert [path.name for path in (bench.folder / "runs" / "eval").iterdir()] == [run.name]


def test_the_votes_are_read_without_a_new_answer(
    ready: Ready, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The second command generates no answers, and people's votes decide the gate."""
    gate = "eval.gates=[{name: better, task: judged, against: base, is: superior, least_n: 4}]"
    words = ["stage=eval", *ready.data, "stage.systems={tuned: sft:s, base: base}", gate, "stage.judge=people"]
    words += ["stage.prompts=8", "project=both", "rollout.max_new_tokens=12", f"run.root={ready.root}"]
    bench = BlindEvaluations(tmp_path, capsys)
    first = bench.run(words, 3)
    assert "gate better: undecided" in bench.output
    assert read_manifest(first).metrics["answers_made"] > 0
    rows = map(json.loads, (first / "artifact" / "answers.jsonl").open())
    tuned = {row["answers"]["tuned"]["text"].strip() for row in rows}
    with Store.open(f"sqlite:///{ready.root / 'annotations.db'}") as store:
        items = list(store.items("both"))
    runs = []
    for part in (items[:2], items[2:]):
        with Store.open(f"sqlite:///{ready.root / 'annotations.db'}") as store:
            for item in part:
                best = sorted(item.candidates, key=lambda candidate: candidate.text.strip() not in tuned)
                tiers = tuple((candidate.id,) for candidate in best)
                store.record("both", item.id, Judgement(tiers), annotator="ann", key=item.id)
        assert bench.status(*words) in (0, 3)
        runs.append(Path(bench.output.strip().splitlines()[-1]))
    assert read_manifest(runs[1]).metrics["answers_made"] == 0
    results = read_artifact(runs[1], "results.json")["tasks"]["judged"]
    assert (results["role"], results["by"]) == ("people", "people")
    assert results["against"]["base"]["win_rate"]["value"] > 0.5
    verdicts = [read_artifact(run, "verdicts/better.json") for run in runs]
    plan = {"task": "judged", "is": "superior", "level": 0.95, "least_n": 4, "max_n": None}
    assert all(plan.items() <= verdict["plan"].items() for verdict in verdicts)
    assert [verdict["verdict"] for verdict in verdicts] == ["undecided", "undecided"]
    looks = verdicts[1]["looks"]
    assert [look["n"] for look in looks] == [n for verdict in verdicts if (n := verdict["figure"]["n"]) >= 4]
    assert looks
    changed = [word.replace("least_n: 4", "least_n: 5") for word in words]
    bench.refuses(*changed, "run.name=other", says="with another plan")


# The same command again: settings that changed since are kept or refused.


def read_project_settings(bench: BlindEvaluations, project: str) -> ProjectSettings:
    with open_vote_store(bench.folder) as store, store.reading() as db:
        return read_settings(db, project)


def count_wanted_votes(bench: BlindEvaluations, project: str) -> int:
    with open_vote_store(bench.folder) as store:
        ids = [item.id for item in store.items(project)]
    return sum(map(read_project_settings(bench, project).count_wanted_votes, ids))


def configure_project(bench: BlindEvaluations, project: str, values: str) -> None:
    bench.run([*bench.annotate("configure"), f"project={project}", f"stage.settings={values}"])


def test_a_named_run_is_told_to_take_another_name(bench: BlindEvaluations) -> None:
    words = write_blind_evaluation(bench.folder, items=4)
    bench.run([*words, "run.name=first"])
    assert "this command, given again with another run.name, reads them" in bench.output
    with bench.start_server() as served:
        served.voter("ann").votes(prefer_answer_with("!"), 2)
    bench.refuses(*words, "run.name=first", says="run.name")
    bench.run([*words, "run.name=second"])
    assert "people: 2 of 5 votes" in bench.output


def test_an_overlap_that_was_changed_stays_until_more_is_asked_for(bench: BlindEvaluations) -> None:
    words = [*write_blind_evaluation(bench.folder, items=10), "project=mine", "resume=never"]
    bench.run(words)
    assert (read_project_settings(bench, "mine").overlap, count_wanted_votes(bench, "mine")) == (2, 12)
    configure_project(bench, "mine", "{overlap: 1}")
    for more in ((), ("stage.votes=12",)):
        bench.run([*words, *more])
        assert (read_project_settings(bench, "mine").overlap, count_wanted_votes(bench, "mine")) == (1, 10)
    with open_vote_store(bench.folder) as store:
        store.erase_content("mine", next(store.items("mine")).id)
    bench.run(words)
    assert (read_project_settings(bench, "mine").overlap, count_wanted_votes(bench, "mine")) == (1, 9)
    bench.run([*words, "stage.votes=15"])
    assert count_wanted_votes(bench, "mine") == 15
    configure_project(bench, "mine", "{title: Which?}")
    bench.run([*words, "stage.votes=27"])
    assert (read_project_settings(bench, "mine").title, count_wanted_votes(bench, "mine")) == ("Which?", 27)


def test_a_project_does_not_name_a_system_of_several_words(bench: BlindEvaluations) -> None:
    words = [word.replace("zebra:", "my-new:") for word in write_blind_evaluation(bench.folder, items=4)]
    for project in ("is-my-new-good", "Is My_New good"):
        message = f"project={project}: its name contains the system's name my-new"
        bench.refuses(*words, f"project={project}", says=message)
    bench.run([*words, "project=my-newest"])
