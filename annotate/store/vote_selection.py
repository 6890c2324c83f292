"""The selection of votes to train on: whose votes count, and how well an annotator has to do on gold items."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, select

from align.annotate.store.database import Store
from align.annotate.store.ledger import read_quarantined
from align.annotate.store.records import Judgement, Vote
from align.annotate.store.tables import annotators, ledger
from align.core.errors import require

Tiers = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class VoteSelection:
    """The annotators whose votes count.

    Attributes:
        allow_simulated: whether simulated annotators are among them.
        annotators: names or pseudonyms of the only ones who count; empty for all.
        exclude_annotators: names or pseudonyms of annotators who do not count.
        min_gold_accuracy: smallest share of the pairs of gold items that an annotator orders as in the known answer.
            Annotators without votes on gold items do not count then. None for no minimum.
    """

    allow_simulated: bool = False
    annotators: tuple[str, ...] = ()
    exclude_annotators: tuple[str, ...] = ()
    min_gold_accuracy: float | None = None

    @classmethod
    def from_settings(cls, settings: Any) -> VoteSelection:
        """Build the selection from an object whose attributes are the settings of the config group `data`. Runs of
        older versions have only the first of them."""
        return cls(
            settings.allow_simulated,
            tuple(getattr(settings, "annotators", ())),
            tuple(getattr(settings, "exclude_annotators", ())),
            getattr(settings, "min_gold_accuracy", None),
        )


PEOPLE = VoteSelection()
"""All annotators but simulated ones."""


def select_votes(
    store: Store, project: str, votes: Sequence[Vote], selection: VoteSelection, through: int | None = None
) -> list[Vote]:
    """Return the votes of the annotators that a selection counts and who are not in quarantine, in the same order.

    Args:
        votes: standing votes of the project, with votes on gold items.
        through: number of the last row of the ledger that counts; None for all.

    Raises:
        InputError: a name is no annotator of the project, or no vote is left.
    """
    with store.reading() as connection:
        pseudonyms = read_pseudonyms(connection, project)
        quarantined = read_quarantined(connection, project, through)
    selected = find_pseudonyms(pseudonyms, project, "data.annotators", selection.annotators)
    excluded = find_pseudonyms(pseudonyms, project, "data.exclude_annotators", selection.exclude_annotators)
    were_any = bool(votes)
    votes = [vote for vote in votes if vote.annotator not in quarantined]
    remedy = "Release one with stage=annotate stage.action=release."
    require(bool(votes) or not were_any, "project", project, "all who voted in it are in quarantine", remedy)
    counted = [
        vote
        for vote in votes
        if (not selection.annotators or vote.annotator in selected) and vote.annotator not in excluded
    ]
    if votes:
        setting = "data.annotators" if selection.annotators else "data.exclude_annotators"
        names = selection.annotators or selection.exclude_annotators
        require(bool(counted), setting, [*names], f"leaves no vote of project {project}", "Count more annotators.")
    least = selection.min_gold_accuracy
    if least is None:
        return counted
    with store.reading() as connection:
        accuracies = compute_gold_accuracies(counted, read_known_answers(connection, project))
    accurate = {annotator for annotator, accuracy in accuracies.items() if accuracy >= least}
    highest = f"the highest is {max(accuracies.values()):.3f}" if accuracies else "they have no votes on gold items"
    problem = f"no annotator of project {project} reaches it: {highest}"
    require(bool(accurate) or not counted, "data.min_gold_accuracy", least, problem, "Lower it, or leave it out.")
    return [vote for vote in counted if vote.annotator in accurate]


def compute_gold_accuracies(votes: Sequence[Vote], known_answers: Mapping[str, Tiers]) -> dict[str, float]:
    """Return annotator → the share of the pairs of gold items that their votes order as in the known answer.

    Annotators without votes on gold items are left out.
    """
    right_pairs = Counter[str]()
    gold_pairs = Counter[str]()
    for vote in votes:
        if vote.purpose == "gold":
            right_pairs[vote.annotator] += count_right_pairs(vote, known_answers[vote.item])
            gold_pairs[vote.annotator] += len(Judgement(known_answers[vote.item]).pairs)
    return {annotator: right_pairs[annotator] / total for annotator, total in gold_pairs.items() if total}


def count_right_pairs(vote: Vote, known_answer: Tiers) -> int:
    """Return the number of pairs that a vote orders as the known answer does. A tie of such a pair is wrong."""
    return len({*Judgement(known_answer).pairs} & {*vote.pairs})


def read_identities(connection: Connection, project: str) -> dict[str, str]:
    """Return pseudonym → name of a project's annotators, without erased ones."""
    columns = select(annotators.c.pseudonym, annotators.c.identity).where(annotators.c.project == project)
    return {row.pseudonym: row.identity for row in connection.execute(columns)}


def read_pseudonyms(connection: Connection, project: str) -> dict[str, str]:
    """Return name or pseudonym → pseudonym of a project's annotators. Erased annotators have only their pseudonym."""
    identities = read_identities(connection, project)
    voters = select(ledger.c.annotator).where(ledger.c.project == project, ledger.c.annotator.is_not(None)).distinct()
    pseudonyms = {*identities, *connection.execute(voters).scalars()}
    return {name: pseudonym for pseudonym, name in identities.items()} | {name: name for name in pseudonyms}


def read_known_answers(connection: Connection, project: str) -> dict[str, Tiers]:
    """Return gold item → its known answer: tiers of candidate ids, best first."""
    is_gold = ledger.c.payload.contains('"expected":')
    rows = select(ledger.c.item, ledger.c.payload).where(
        ledger.c.project == project, ledger.c.kind == "candidates", is_gold
    )
    return {
        row.item: tuple(tuple(tier) for tier in json.loads(row.payload)["expected"]) for row in connection.execute(rows)
    }


def find_pseudonyms(pseudonyms: Mapping[str, str], project: str, field: str, names: Sequence[str]) -> frozenset[str]:
    """Return the pseudonyms of annotators.

    Args:
        pseudonyms: name or pseudonym → pseudonym.

    Raises:
        InputError: the project has no such annotator.
    """
    for name in names:
        remedy = "Check the spelling. The names of erased annotators are no longer known."
        require(name in pseudonyms, field, name, f"project {project} knows no such annotator", remedy)
    return frozenset(pseudonyms[name] for name in names)
