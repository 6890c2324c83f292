"""The selection of votes to train on: the annotators whose votes count, and the minimum accuracy on gold items."""

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
from align.core.names import normalise_name

Tiers = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class VoteSelection:
    """The annotators whose votes count. Annotators in quarantine never count.

    Attributes:
        allow_simulated: whether simulated annotators are among them.
        annotators: names or pseudonyms of the annotators whose votes alone count; empty for all.
        exclude_annotators: names or pseudonyms of annotators whose votes do not count, also if `annotators` has them.
        min_gold_accuracy: smallest share of the pairs of gold items that an annotator orders as in the known answer.
            Annotators without votes on gold items do not count then. None for no minimum.
    """

    allow_simulated: bool = False
    annotators: tuple[str, ...] = ()
    exclude_annotators: tuple[str, ...] = ()
    min_gold_accuracy: float | None = None

    @classmethod
    def from_settings(cls, settings: Any) -> VoteSelection:
        """Build the selection from an object whose attributes are the settings of the config group `data`.

        The configuration of a run of an older version has `allow_simulated` alone.
        """
        return cls(
            settings.allow_simulated,
            tuple(getattr(settings, "annotators", ())),
            tuple(getattr(settings, "exclude_annotators", ())),
            getattr(settings, "min_gold_accuracy", None),
        )


DEFAULT_SELECTION = VoteSelection()
"""All annotators. Votes of simulated ones are refused."""


def select_votes(
    store: Store, project: str, votes: Sequence[Vote], selection: VoteSelection, through: int | None = None
) -> list[Vote]:
    """Return the votes of the annotators that a selection counts and who are not in quarantine, in the same order.

    Args:
        votes: standing votes of the project, with votes on gold items.
        through: number of the last row of the ledger that counts; None for all.

    Raises:
        InputError: a name is no annotator of the project.
    """
    reasons = find_exclusion_reasons(store, project, votes, selection, through)
    return [vote for vote in votes if vote.annotator not in reasons]


def find_exclusion_reasons(
    store: Store, project: str, votes: Sequence[Vote], selection: VoteSelection, through: int | None = None
) -> dict[str, str]:
    """Return annotator → the reason why their votes do not count, of the annotators of `votes` to whom one applies.

    Takes and raises the same as `select_votes`.
    """
    with store.reading() as connection:
        pseudonyms = read_pseudonyms(connection, project)
        quarantined = read_quarantined(connection, project, through)
        known_answers = {} if selection.min_gold_accuracy is None else read_known_answers(connection, project)
    selected = find_pseudonyms(pseudonyms, project, "data.annotators", selection.annotators)
    excluded = find_pseudonyms(pseudonyms, project, "data.exclude_annotators", selection.exclude_annotators)
    minimum = selection.min_gold_accuracy
    accuracies = compute_gold_accuracies(votes, known_answers)
    reasons = {}
    for annotator in dict.fromkeys(vote.annotator for vote in votes):
        if annotator in quarantined:
            reasons[annotator] = "in quarantine"
        elif annotator in excluded:
            reasons[annotator] = "in data.exclude_annotators"
        elif selection.annotators and annotator not in selected:
            reasons[annotator] = "not in data.annotators"
        elif minimum is not None and annotator not in accuracies:
            reasons[annotator] = "without votes on gold items, which data.min_gold_accuracy needs"
        elif minimum is not None and accuracies[annotator] < minimum:
            reasons[annotator] = f"under data.min_gold_accuracy={minimum}"
    return reasons


def compute_gold_accuracies(votes: Sequence[Vote], known_answers: Mapping[str, Tiers]) -> dict[str, float]:
    """Return annotator → the share of the pairs of gold items that their rankings order as in the known answer.

    Annotators without rankings of gold items are left out.
    """
    right_pairs = Counter[str]()
    gold_pairs = Counter[str]()
    for vote in votes:
        if vote.purpose == "gold" and vote.kind == "ranking" and vote.item in known_answers:
            right_pairs[vote.annotator] += count_right_pairs(vote, known_answers[vote.item])
            gold_pairs[vote.annotator] += len(Judgement(known_answers[vote.item]).pairs)
    return {annotator: right_pairs[annotator] / total for annotator, total in gold_pairs.items() if total}


def count_right_pairs(vote: Vote, known_answer: Tiers) -> int:
    """Return the number of pairs that a vote orders as the known answer does. A tie counts as wrong."""
    return len({*Judgement(known_answer).pairs} & {*vote.pairs})


def read_identities(connection: Connection, project: str) -> dict[str, str]:
    """Return pseudonym → name of a project's annotators, without erased ones."""
    columns = select(annotators.c.pseudonym, annotators.c.identity).where(annotators.c.project == project)
    return {row.pseudonym: row.identity for row in connection.execute(columns)}


def read_pseudonyms(connection: Connection, project: str) -> dict[str, str]:
    """Return name or pseudonym → pseudonym of a project's annotators. Erased annotators have only their pseudonym.

    A name that equals the pseudonym of another annotator is left out, because runs record pseudonyms.
    """
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
        names: names or pseudonyms. The case of a name does not matter if it was given to an account.

    Raises:
        InputError: the project has no such annotator.
    """
    found = {name: pseudonyms.get(name) or pseudonyms.get(normalise_name(name)) for name in names}
    for name, pseudonym in found.items():
        remedy = "Check the spelling. The names of erased annotators are no longer known."
        require(pseudonym is not None, field, name, f"project {project} knows no such annotator", remedy)
    return frozenset(filter(None, found.values()))
