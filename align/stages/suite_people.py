"""People as the judge of a suite: their project in the annotation app, opened and read."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

from sqlalchemy import Connection

from align import ranks
from align.annotate.exchange.importing import Row, add
from align.annotate.figures.estimates import as_json
from align.annotate.figures.people import consistency, gold_accuracy
from align.annotate.figures.project import figures_of
from align.annotate.figures.view import View, read
from align.annotate.store import Item, Store, configure
from align.annotate.store.items import id_of
from align.annotate.store.preference_pairs import counted_rankings
from align.annotate.store.projects import MOST_PEOPLE, history, overlap_for, settings_of
from align.config.root import Config
from align.errors import InputError, require
from align.evals.people import Question, chosen, drawn_sides, order_key, sides_key, verdicts_of, votes_asked
from align.evals.results import Scored
from align.evals.verdicts import Verdict
from align.files import user_path
from align.redaction import masked
from align.report import in_words
from align.report.words import counted
from align.run import Run, write_json
from align.stages.rows import open_store
from align.stages.suite_people_inputs import PEOPLE, known_answers
from align.stages.suite_scores import Judge, Told, pairs_of

FILE = "people.json"
"""Of a run's artifact: how many votes there are, and how far they can be believed."""
OPENED_WITH = {
    "title": "Two answers", "order": "priority", "turned_by_item": True, "gold_share": 0.1, "repeat_share": 0.1,
}  # fmt: skip
"""Settings of a project that is opened. Whoever changes them afterwards is not overruled; see also `wants_more`."""


# The judge


def judge_of_people(run: Run, config: Config, tolds: Sequence[Told]) -> Judge:
    """People, of whose votes those count that the run has for an input. Opens their project where it is not there, and
    adds what they have not been asked."""
    found = ranks.from_main(people_asked(run, config, tolds) if ranks.is_main() else None)
    assert found is not None
    return Judge(partial(by_people, found.verdicts), found.notes)


def by_people(verdicts: Mapping[tuple[str, str], Sequence[Verdict]], told: Told) -> tuple[Scored, Sequence[str]]:
    """What people say of a task's answers."""
    others = [name for name in told.answers if name != told.first]
    of_task = {other: verdicts.get((told.task, other), ()) for other in others}
    return Scored(told.task, PEOPLE, PEOPLE, told.items, told.answers, of_task), ()


class Heard(NamedTuple):
    """
    Attributes:
        verdicts: by task and other system.
        notes: what is to be said of them.
    """

    verdicts: Mapping[tuple[str, str], Sequence[Verdict]]
    notes: Sequence[str]


def people_asked(run: Run, config: Config, tolds: Sequence[Told]) -> Heard:
    """
    Raises:
        InputError: the project was erased, or holds items, prompts or answers of something else.
    """
    votes, hides = run.inputs["votes"], config.rollout.reasoning == "hide"
    every = [question for told in tolds for question in questions_of(told, hides)]
    shown = [question for question in every if not question.pair.prompt.uses_tools]
    questions = [question for question in shown if not question.alike]
    gold = known_answers(user_path(config.stage.gold, "stage.gold")) if config.stage.gold else []
    about = {"pairs": len(every), "same_text": len(shown) - len(questions), "with_tools": len(every) - len(shown)}
    if not questions:
        found = verdicts_of(shown, {}, (), b"")  # all of them count, whatever their order
        return Heard(found, [*kept_back(about, about["same_text"]), "no pair is left to ask people about"])
    with open_store(config) as store:
        configure(store, votes.project)
        secret = store.key(votes.project)
        assert secret is not None, "configure() lets no erased project pass"
        asked = opened(store, votes.project, secret, questions, config.stage.votes, gold, config.seed)
        with store.reading():  # one view for all of it
            view = read(store, votes.project).through(votes.seq)
            rankings = counted_rankings(store, votes.project, config.data.allow_simulated, votes.seq)
    found = verdicts_of(shown, asked, rankings, order_key(secret, config.seed))
    ties = sum(not verdict.by for verdicts in found.values() for verdict in verdicts)
    about |= {"same_text_counted": ties, "asked": len(asked)}
    figures = {"project": votes.project, **about, **heard(view, votes.project)}
    write_json(run.artifact / FILE, figures)
    return Heard(found, [*kept_back(about, ties), *in_lines(figures, config)])


def questions_of(told: Told, hides: bool) -> Iterator[Question]:
    """The pairs of a task: the first system's answers beside those of each other one."""
    for other in told.answers:
        if other != told.first:
            pairs = pairs_of(told, other, hides)
            for pair, first, second in zip(pairs, told.answers[told.first], told.answers[other], strict=True):
                yield Question(told.task, other, pair, (first.ended is not False, second.ended is not False))


def opened(
    store: Store, project: str, secret: bytes, questions: Sequence[Question], votes: int | None, gold: Sequence[Row],
    seed: int,
) -> dict[str, tuple[Question, str]]:  # fmt: skip
    """Open the project where it is not there, and add the pairs that so many votes are to be on.

    All is added in one transaction: a run that is cut off leaves nothing half done. Items that are there keep the order
    of their two answers.

    Args:
        secret: the project's key.
        votes: that are asked for; None for one of each pair and some more.

    Returns:
        Item of the project → its question, and the id of the first system's answer.
    """
    by_item = {id_of(project, question.key(secret)): question for question in questions}
    there = {item.id: item for item in store.items(project)}
    check_ours(project, there.keys() - by_item.keys() - read(store, project).expected.keys())
    before = {id: first_of(project, by_item[id], item) for id, item in there.items() if id in by_item}

    wanted = votes_asked(votes, len(by_item))
    most = MOST_PEOPLE * len(by_item)
    remedy = f"Ask for up to {most:,}, or about more prompts."
    require(wanted <= most, "stage.votes", votes, f"are too many on {counted(len(by_item), 'pair')}", remedy)
    order = order_key(secret, seed)
    absent = [id for id in chosen(by_item, before, wanted, order) if id not in before]
    erased = [id for id in absent if store.first_row(project, item=id) is not None]
    new = [id for id in absent if id not in erased]
    fresh_gold = [row for row in gold if id_of(project, row.key) not in there]
    with store.transaction() as db:
        if not before and not erased:
            configure(store, project, OPENED_WITH)
        if new or wants_more(db, project, before, erased, wanted):
            configure(store, project, overlap_for([*before, *new], wanted))
        settings = settings_of(db, project)
        ahead = sum(1 if first.endswith("-0") else -1 for first in before.values())
        groups = [(by_item[id].other, settings.wanted(id)) for id in new]
        for id, side in zip(new, drawn_sides(groups, sides_key(secret, seed, len(before)), ahead), strict=True):
            question = by_item[id]
            priority = 1 - question.draw(order)
            store.add_item(project, question.key(secret), question.prompt, question.candidates(side), priority=priority)
        for row in fresh_gold:
            add(store, project, row)
    ours = ((item, by_item[item.id]) for item in store.items(project) if item.id in by_item)
    return {item.id: (question, first_of(project, question, item)) for item, question in ours}


def wants_more(db: Connection, project: str, there: Collection[str], erased: Collection[str], votes: int) -> bool:
    """Whether more votes are asked for than the items want that a project has, and than an evaluation asked for before:
    settings that somebody changed since are not overruled.

    Args:
        there: ids of its items.
        erased: those that it had.
    """
    if not there or sum(map(settings_of(db, project).wanted, there)) >= votes:
        return False
    ours = overlap_for([*there, *erased], votes).items()
    return not any(ours <= asdict(settings).items() for _, settings in history(db, project))


def check_ours(project: str, strangers: Collection[str]) -> None:
    """Raises: InputError: the project has items of something else, whose votes would be counted as wanted."""
    problem = f"it holds {counted(len(strangers), 'item')} that this evaluation does not ask"
    require(not strangers, "project", project, problem, "Name another project: project=NAME.")


def first_of(project: str, question: Question, item: Item) -> str:
    """The id of the first system's answer. Raises: InputError: the item holds another prompt or other answers."""
    first = question.first_in(item)
    if first is None:
        problem = f"item {question.pair.id} of task {question.task} has another prompt or other answers there"
        raise InputError("project", project, problem, "Name another project: project=NAME.")
    return first


# What came of it


def heard(view: View, project: str) -> dict[str, Any]:
    """How many votes there are, and how far they can be believed, as JSON. People have no names here."""
    found, whole = figures_of(view, project), read_of(view)
    people = [
        {
            "pseudonym": one["pseudonym"], "votes": one["rankings"], "skips": sum(one["skips"].values()),
            **{key: one[key] for key in ("ties", "gold", "gold_votes", "gold_right", "repeats")},
            "shown_first": one["position"]["share"],
        }
        for one in found["people"]
        if one["rankings"] or sum(one["skips"].values())  # not of those whose votes were all taken back
    ]  # fmt: skip
    return {
        "votes": len(view.work), "wanted": sum(view.wanted.values()), "skips": len(view.skips),
        "settled": len(view.settled), "agreement": found["agreement"],
        "shown_first": found["position"]["share"], "longer": found["length"]["share"], **whole, "people": people,
    }  # fmt: skip


def read_of(view: View) -> dict[str, Any]:
    """Of everybody together: known answers met, and repeats said the same."""
    gold, gold_votes, gold_right = gold_accuracy(view.rankings, view.expected)
    found = {"gold": gold, "gold_votes": gold_votes, "gold_right": gold_right, "repeats": consistency(view.rankings)}
    return as_json(found)


def kept_back(about: Mapping[str, int], ties: int) -> list[str]:
    """What is to be said of pairs that nobody is asked about.

    Args:
        ties: how many pairs of the same answer twice count.
    """
    lines = []
    if same := about["same_text"]:
        some = "" if ties == same else f"; {ties:,} of them count, in proportion to the pairs that were judged"
        lines.append(f"{counted(same, 'pair')} of the same answer twice: a tie, without a question{some}")
    if about["with_tools"]:
        lines.append(f"{counted(about['with_tools'], 'pair')} with tools, which the page does not show: not asked")
    return lines


def in_lines(figures: Mapping[str, Any], config: Config) -> Iterator[str]:
    """What people said so far, and how to ask them."""
    votes, wanted, people = figures["votes"], figures["wanted"], len(figures["people"])
    by = {0: "", 1: ", by 1 person"}.get(people, f", by {people:,} people")
    yield f"people: {votes:,} of {counted(wanted, 'vote')} on {counted(figures['asked'], 'pair')}{by}"
    if votes:
        agreement = figures["agreement"]
        told = {
            "the same on a pair": agreement["raw"], "Krippendorff's alpha": agreement["alpha"],
            "known answers met": figures["gold"], "the same on a repeat": figures["repeats"],
            "the answer shown first preferred": figures["shown_first"],
        }  # fmt: skip
        yield f"people: {', '.join(f'{name} {words_of(value)}' for name, value in told.items())}"
    if votes < wanted:
        yield f"to ask for the votes: {served_by(config, figures['project'])}"
        yield f"this command, given again{' with another run.name' if config.run.name else ''}, reads them"


def words_of(figure: Any) -> str:
    return figure if isinstance(figure, str) else in_words(figure)


def served_by(config: Config, project: str) -> str:
    """The command that serves the project to people."""
    words = ["python", "-m", "align", "stage=annotate", f"project={project}"]
    if config.run.root != Config().run.root:
        words.append(f"run.root={config.run.root}")
    if (url := config.store.url) and masked(url) == url:  # one with a password is in the environment
        words.append(f"store.url={url}")
    return shlex.join(words)
