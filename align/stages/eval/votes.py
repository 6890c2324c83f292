"""People as the judge of a suite, through a project of the annotation app."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import Connection

from align.annotate.exchange.importing import ImportRow, add_row, read_item_rows
from align.annotate.figures.estimates import as_json
from align.annotate.figures.people import compute_gold_accuracy, compute_repeat_consistency
from align.annotate.figures.project import ProjectView, compute_view_figures, read_view
from align.annotate.store import AnnotationItem as ProjectItem
from align.annotate.store import Store, configure_project
from align.annotate.store.database import make_item_id
from align.annotate.store.ledger import find_project_tombstone, read_ledger_head, read_quarantined
from align.annotate.store.preference_pairs import load_counted_rankings
from align.annotate.store.projects import MAX_OVERLAP, compute_overlap, read_settings, read_settings_history
from align.annotate.store.vote_selection import VoteSelection
from align.config.identity import select_identity
from align.config.root import Config, find_store_url, to_plain_dict
from align.core.errors import InputError, require
from align.core.files import parse_user_path
from align.core.redaction import drop_masks, mask_secrets
from align.data.sources import build_files_input
from align.evals.judges.judge_verdict import JudgeVerdict
from align.evals.suite.people import (
    PairQuestion,
    ProjectQuestion,
    choose_items,
    count_votes_to_ask,
    derive_display_key,
    derive_order_key,
    describe_pairs_not_asked,
    describe_votes,
    draw_display_orders,
    votes_to_verdicts,
)
from align.report.figure_text import pluralize
from align.run import Input, Run, json_digest, write_json
from align.stages.runner import format_annotate_command, open_store

if TYPE_CHECKING:
    from align.evals.suite.answers import TaskAnswers

ANSWER_SETTINGS = ("seed", "device", "dtype", "model", "method", "data", "rollout")
"""Parts of the configuration on which the sampled answers depend, from which a project name is derived."""
WORD = re.compile(r"[^\W_]+")
GOLD_HELP = 'Write {"prompt": "…", "answers": ["…", "…"], "expected": [[0], [1]]}.'
VOTES = "people.json"
"""Name of the file in a run's artifact with the number of people's votes and their reliability."""
PROJECT_SETTINGS = {
    "title": "Two answers",
    "order": "priority",
    "turned_by_item": True,
    "gold_share": 0.1,
    "repeat_share": 0.1,
}
"""Settings of a new annotation project. Changes that people make to them later stay, see also `needs_more_votes`."""


def build_vote_inputs(config: Config, records: Mapping[str, Input], systems: Sequence[str]) -> dict[str, Input]:
    """Return the run's inputs for people as the judge: the annotation project up to its last vote, and the gold pairs.

    Args:
        records: the other inputs of the run.
        systems: names of the systems, which people must not read.

    Raises:
        InputError: the project's name contains a system's, the project was erased, or `stage.gold` is no file of gold
            pairs.
    """
    stage = config.stage
    project = choose_project_name(config, records)

    def to_words(name: str) -> str:
        return f" {' '.join(WORD.findall(name.lower()))} "

    revealed = next((name for name in systems if to_words(name) in to_words(project)), None)
    problem = f"its name contains the system's name {revealed}, and annotators see it: they would not judge blindly"
    require(revealed is None, "project", project, problem, "Choose a project name without names of systems.")
    gold_record = {}
    if stage.gold is not None:
        read_gold_pairs(parse_user_path(stage.gold, "stage.gold"))
        gold_record = {"gold": build_files_input(stage.gold, "stage.gold")}
    with open_store(config) as store, store.reading() as db:
        row = find_project_tombstone(db, project)
        problem = f"it was erased (row {row} of the ledger), and its name is not used again"
        if config.project == Config().project:
            problem += "; without project=, this evaluation always has this name"
        require(row is None, "project", project, problem, "Name another project: project=NAME.")
        head = read_ledger_head(db, project, votes_only=True)
    # A project without votes is identified by its store and name.
    place = json_digest([drop_masks(mask_secrets(find_store_url(config))), project])
    return {"votes": Input(head.hash if head.seq else place, project=project, seq=head.seq), **gold_record}


def choose_project_name(config: Config, records: Mapping[str, Input]) -> str:
    """Return the name of the annotation project for people's votes: `project=`, or by default `people-` with a digest.

    The digest is over the models, the tasks and the settings of sampling.
    """
    if config.project != Config().project:
        return config.project
    settings = select_identity("eval", to_plain_dict(config), records)
    digests = {
        key: record.digest for key, record in records.items() if key.partition(".")[0] in ("data", "systems", "tasks")
    }
    tasks = [{key: value for key, value in task.items() if key != "path"} for task in config.eval.tasks or ()]
    answer_settings = {key: settings.get(key) for key in ANSWER_SETTINGS}
    identity = [answer_settings, tasks, config.stage.prompts, config.stage.answers, digests]
    return f"people-{json_digest(identity)[:8]}"


def read_gold_pairs(path: Path) -> list[ImportRow]:
    """Read answer pairs with a known better answer from a file, which are shown among others to test annotators.

    Raises:
        InputError: a row has no expected order, or not two answers.
    """
    rows = read_item_rows(path, "gold", "stage.gold")
    for row in rows:
        is_valid = row.expected is not None and len(row.answers) == 2
        require(is_valid, row.where, row.id, "is no pair with a known order", GOLD_HELP)
    return rows


class ProjectVotes(NamedTuple):
    """The verdicts of people on the answer pairs of an evaluation, and notes about them.

    Attributes:
        verdicts: (task, name of the second system) → the verdicts.
        notes: notes on the verdicts.
    """

    verdicts: Mapping[tuple[str, str], Sequence[JudgeVerdict]]
    notes: Sequence[str]


def fill_project_and_read_votes(run: Run, config: Config, tasks: Sequence[TaskAnswers]) -> ProjectVotes:
    """Add the answer pairs of an evaluation to its annotation project, as far as missing, and read people's votes on
    them.

    Creates the project if it does not exist. Writes `people.json` into the artifact.

    Raises:
        InputError: the project was erased, or has items of something else.
    """
    from align.evals.suite.scores import iter_pair_questions

    project = run.inputs["votes"].project
    last_seq = run.inputs["votes"].seq
    hides_reasoning = config.rollout.reasoning == "hide"
    pairs = [question for task in tasks for question in iter_pair_questions(task, hides_reasoning)]
    displayable = [question for question in pairs if not question.pair.prompt.uses_tools]
    questions = [question for question in displayable if not question.is_tie]
    gold = read_gold_pairs(parse_user_path(config.stage.gold, "stage.gold")) if config.stage.gold else []
    counts = {
        "pairs": len(pairs),
        "same_text": len(displayable) - len(questions),
        "with_tools": len(pairs) - len(displayable),
    }
    if not questions:
        verdicts = votes_to_verdicts(displayable, {}, (), b"")  # without a key: all of them count, in any order
        notes = describe_pairs_not_asked(counts, counts["same_text"])
        return ProjectVotes(verdicts, [*notes, "no pair is left to ask people about"])
    with open_store(config) as store:
        configure_project(store, project)
        secret = store.key(project)
        assert secret is not None, "configure() raises InputError for an erased project"
        project_items = fill_project(store, project, secret, questions, config.stage.votes, gold, config.seed)
        with store.reading() as db:  # one transaction, so that both see the same votes
            view = read_view(store, project).through(last_seq)
            view = replace(view, quarantined=read_quarantined(db, project, last_seq))
            rankings = load_counted_rankings(store, project, VoteSelection(config.data.allow_simulated), last_seq)
    verdicts = votes_to_verdicts(displayable, project_items, rankings, derive_order_key(secret, config.seed))
    # Pairs with the same text are ties without a vote, and so without a voter.
    ties = sum(not verdict.by for pair_verdicts in verdicts.values() for verdict in pair_verdicts)
    counts |= {"same_text_counted": ties, "asked": len(project_items)}
    figures = {"project": project, **counts, **summarize_votes(view, project)}
    write_json(run.artifact / VOTES, figures)
    command = format_annotate_command(config, project)
    vote_notes = describe_votes(figures, command, bool(config.run.name))
    return ProjectVotes(verdicts, [*describe_pairs_not_asked(counts, ties), *vote_notes])


def fill_project(
    store: Store,
    project: str,
    secret: bytes,
    questions: Sequence[PairQuestion],
    votes: int | None,
    gold: Sequence[ImportRow],
    seed: int,
) -> dict[str, ProjectQuestion]:
    """Add answer pairs to the annotation project until it can collect `votes` votes, and return them by item id.

    Creates the project if it does not exist. All pairs are added in one transaction, so that an interrupted run adds
    none. Items that exist keep the order of their two answers.

    Args:
        secret: the project's key.
        votes: number of votes to collect; None for one vote on each pair and some more.
        gold: gold pairs to add.

    Raises:
        InputError: the project has items of something else, or too many votes are requested.
    """
    question_of = {make_item_id(project, question.key(secret)): question for question in questions}
    items = {item.id: item for item in store.items(project)}
    foreign = items.keys() - question_of.keys() - read_view(store, project).expected.keys()
    problem = f"it holds {pluralize(len(foreign), 'item')} of something other than this evaluation"
    require(not foreign, "project", project, problem, "Name another project: project=NAME.")
    existing = {
        id: find_first_answer_id(project, question_of[id], item) for id, item in items.items() if id in question_of
    }

    vote_count = count_votes_to_ask(votes, len(question_of))
    limit = MAX_OVERLAP * len(question_of)
    remedy = f"Ask for up to {limit:,}, or about more prompts."
    require(
        vote_count <= limit,
        "stage.votes",
        votes,
        f"are too many votes for {pluralize(len(question_of), 'pair')}",
        remedy,
    )
    order = derive_order_key(secret, seed)
    absent = [id for id in choose_items(question_of, existing, vote_count, order) if id not in existing]
    erased = [id for id in absent if store.find_first_row(project, item=id) is not None]
    new = [id for id in absent if id not in erased]
    new_gold = [row for row in gold if make_item_id(project, row.key) not in items]
    with store.transaction() as db:
        if not existing and not erased:
            configure_project(store, project, PROJECT_SETTINGS)
        if new or needs_more_votes(db, project, existing, erased, vote_count):
            configure_project(store, project, compute_overlap([*existing, *new], vote_count))
        settings = read_settings(db, project)
        # Items with the first system's answer first, minus items with it second.
        ahead = sum(1 if answer_id.endswith("-0") else -1 for answer_id in existing.values())
        groups = [(question_of[id].other, settings.count_wanted_votes(id)) for id in new]
        shows_first = draw_display_orders(groups, derive_display_key(secret, seed, len(existing)), ahead)
        for id, first_is_shown_first in zip(new, shows_first, strict=True):
            question = question_of[id]
            priority = 1 - question.draw(order)
            candidates = question.candidates(first_is_shown_first)
            store.add_item(project, question.key(secret), question.prompt, candidates, priority=priority)
        for row in new_gold:
            add_row(store, project, row)
    questions_and_items = [(question_of[item.id], item) for item in store.items(project) if item.id in question_of]
    return {
        item.id: ProjectQuestion(question, find_first_answer_id(project, question, item))
        for question, item in questions_and_items
    }


def needs_more_votes(
    db: Connection, project: str, existing: Collection[str], erased: Collection[str], votes: int
) -> bool:
    """Return whether a project's overlap, its number of votes per item, has to be raised to collect `votes` votes.

    It is not raised if an earlier run of this evaluation has set the same overlap: then a person has changed it since.

    Args:
        existing: ids of the project's items.
        erased: ids of its erased items.
        votes: number of votes to collect.
    """
    if not existing or sum(map(read_settings(db, project).count_wanted_votes, existing)) >= votes:
        return False
    overlap = compute_overlap([*existing, *erased], votes).items()
    return not any(overlap <= asdict(settings).items() for _, settings in read_settings_history(db, project))


def find_first_answer_id(project: str, question: PairQuestion, item: ProjectItem) -> str:
    """Return the id of the candidate in an annotation item that is the answer of the evaluation's first model.

    Raises:
        InputError: the item has another prompt or other answers than the question.
    """
    answer_id = question.find_first_answer(item)
    if answer_id is None:
        problem = f"item {question.pair.id} of task {question.task} has another prompt or other answers in this project"
        raise InputError("project", project, problem, "Name another project: project=NAME.")
    return answer_id


def summarize_votes(view: ProjectView, project: str) -> dict[str, Any]:
    """Return the number of people's votes in an annotation project and their reliability, as a JSON object.

    It lists the annotators by pseudonym.
    """
    project_figures = compute_view_figures(view, project)
    gold, gold_votes, gold_right = compute_gold_accuracy(view.counted_rankings, view.expected)
    repeats = compute_repeat_consistency(view.counted_rankings)
    people = [
        {
            "pseudonym": person["pseudonym"],
            "votes": person["rankings"],
            "skips": sum(person["skips"].values()),
            **{key: person[key] for key in ("quarantined", "ties", "gold", "gold_votes", "gold_right", "repeats")},
            "shown_first": person["position"]["share"],
        }
        for person in project_figures["people"]
        if person["rankings"] or sum(person["skips"].values())  # without people whose votes were all taken back
    ]
    return {
        "votes": len(view.work),
        "wanted": sum(view.votes_wanted.values()),
        "skips": sum(vote.annotator not in view.quarantined for vote in view.skips),
        "settled": len(view.reviewed_items),
        "agreement": project_figures["agreement"],
        "shown_first": project_figures["position"]["share"],
        "longer": project_figures["length"]["share"],
        **as_json({"gold": gold, "gold_votes": gold_votes, "gold_right": gold_right, "repeats": repeats}),
        "people": people,
    }
