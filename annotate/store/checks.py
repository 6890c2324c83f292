"""The checks that say no before anything is written: what is in the ledger cannot be corrected."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, select

from align.annotate.store.projects import history
from align.annotate.store.queries import check_item, erasure_of, stands
from align.annotate.store.records import (
    SKIPS,
    Candidate,
    Judgement,
    candidate_row,
    check_text,
    item_payload,
    prompt_row,
)
from align.annotate.store.tables import candidates, ledger, prompts
from align.core.errors import InputError, require
from align.core.types import Conversation

QUALITIES = ("", "good", "bad")
SOURCES = ("human", "simulated")
PURPOSES = ("work", "gold", "repeat", "review")


class AlreadyJudged(InputError):
    """The annotator has judged the item, and that judgement stands."""


def check_same_item(
    connection: Connection, before: Row[Any], prompt: Conversation, answers: Sequence[Candidate], known: dict[str, Any]
) -> None:
    """Raises unless the row's item holds just this content; an erased one is left in peace."""
    here = (candidates.c.project == before.project, candidates.c.prompt_id == before.item)
    kept = connection.execute(select(candidates.c.position, candidates.c.salt).where(*here))
    salts = {row.position: row.salt for row in kept}
    where = (prompts.c.project == before.project, prompts.c.id == before.item)
    salt = connection.execute(select(prompts.c.salt).where(*where)).scalar()
    if salt is None and erasure_of(connection, before.project, before.item) is not None:
        return
    first = prompt_row(before.project, before.item, prompt, salt or "")
    rows = [candidate_row(before.project, before.item, k, a, salts.get(k, "")) for k, a in enumerate(answers)]
    if item_payload(first, rows) | known != json.loads(before.payload):
        raise InputError("key", before.key, "it was used for other content", "Give every prompt and run its own key.")


def check_expected(item: str, k: int, expected: Sequence[Sequence[int]] | None) -> dict[str, Any]:
    """What the ledger keeps of a gold item's known answer: its tiers of candidate ids; of another item nothing."""
    if expected is None:
        return {}
    named = [position for tier in expected for position in tier]
    good = all(type(n) is int for n in named) and sorted(named) == list(range(k)) and all(expected)
    require(good, "expected", [list(t) for t in expected], "it is no order of the answers", "Name 0 … K-1 once each.")
    return {"expected": [sorted(f"{item}-{position}" for position in tier) for tier in expected]}


def check_judgement(connection: Connection, project: str, item: str, judgement: Judgement) -> None:
    """Raises unless the item is there and the judgement is one that its project can have."""
    check_item(connection, project, item)
    where = (candidates.c.project == project, candidates.c.prompt_id == item)
    known = set(connection.execute(select(candidates.c.id).where(*where)).scalars())
    require(bool(known), "item", item, "it was erased", "Rank another.")
    named = {"ratings": set(judgement.ratings), "flagged": set(judgement.flagged) - {item}}
    for name, ids in (*named.items(), ("display_order", set(judgement.display_order))):
        strange = sorted(ids - known)
        require(not strange, name, strange, f"no candidates of item {item}", f"There are {', '.join(sorted(known))}.")
    for name, choices in (
        ("skipped", ("", *SKIPS)),
        ("quality", QUALITIES),
        ("source", SOURCES),
        ("purpose", PURPOSES),
    ):
        value = getattr(judgement, name)
        require(
            value in choices, name, value, "is no choice here", f"Choose one of: {', '.join(filter(None, choices))}."
        )
    for name, most in (("rationale", 100_000), ("demonstration", 100_000), ("guideline_version", 20), ("scorer", 100)):
        check_text(name, getattr(judgement, name), most)
    person = judgement.source != "simulated" and bool(judgement.scorer)
    require(not person, "scorer", judgement.scorer, "a person has none", "Say source=simulated, or leave it out.")
    strength, seconds = judgement.strength, judgement.seconds
    good = strength is None or (type(strength) is int and 0 <= strength <= 3)
    require(good, "strength", strength, "it is none", "Give 0 to 3, or nothing.")
    good = seconds is None or (type(seconds) in (int, float) and 0 <= seconds < math.inf)
    require(good, "seconds", seconds, "it is no time", "Give a number of seconds.")
    check_ratings(judgement, *asked_of(connection, project, judgement.project_version))
    if judgement.skipped:
        nothing = not judgement.tiers
        require(nothing, "tiers", judgement.tiers, "a skipped item has no ranking", "Skip it or rank it.")
    else:
        check_tiers(item, known, judgement.tiers)


def asked_of(connection: Connection, project: str, version: int | None) -> tuple[tuple[str, ...], int]:
    """The attributes and the highest rating of a version of the project; None: all that it ever had, for a judgement
    may have been made under any of them."""
    versions = dict(history(connection, project))
    known = version is None or version in versions
    require(known, "project_version", version, "the project had no such version", "Give the one that was shown.")
    meant = list(versions.values()) if version is None else [versions[version]]
    names = dict.fromkeys(name for settings in meant for name in settings.attributes)
    return tuple(names), max(settings.scale for settings in meant)


def check_ratings(judgement: Judgement, attributes: Sequence[str], scale: int) -> None:
    for attribute, rated in (pair for rating in judgement.ratings.values() for pair in rating.items()):
        names = ", ".join(attributes) or "nothing"
        require(attribute in attributes, "ratings", attribute, "nobody asked for it", f"Rate {names}.")
        fits = type(rated) is int and 1 <= rated <= scale
        require(fits, f"ratings.{attribute}", rated, "it is not on the scale", f"Give 1 to {scale}.")


def check_tiers(item: str, known: set[str], tiers: Sequence[Sequence[str]]) -> None:
    """Raises unless the tiers hold every candidate, each once."""
    ranked = [id for tier in tiers for id in tier]
    unknown, missing = sorted(set(ranked) - known), sorted(known - set(ranked))
    twice = sorted({id for id in ranked if ranked.count(id) > 1})
    require(not unknown, "tiers", unknown, f"no candidates of item {item}", f"Rank {', '.join(sorted(known))}.")
    require(
        not missing, "tiers", missing, f"candidates of item {item} are not ranked", "Rank every one; ties share a tier."
    )
    require(not twice, "tiers", twice, "ranked more than once", "Name every candidate once.")
    require(all(tiers), "tiers", [list(t) for t in tiers], "it has an empty tier", "Leave empty tiers out.")


def check_first(connection: Connection, project: str, item: str, annotator: str, judgement: Judgement) -> None:
    """Raises where the annotator's judgement of the item stands; a repeat needs one, and there is one repeat. A review
    is a reviewer's second judgement of what they may have judged as others did."""
    mine = select(ledger.c.seq, ledger.c.payload).where(stands(project), ledger.c.item == item)
    rows = connection.execute(mine.where(ledger.c.annotator == annotator).order_by(ledger.c.seq)).all()
    kinds: dict[str, list[int]] = {"first": [], "repeat": [], "review": []}
    for seq, payload in rows:
        purpose = json.loads(payload).get("purpose")
        kinds[purpose if purpose in kinds else "first"].append(seq)
    if judgement.purpose == "repeat":
        require(bool(kinds["first"]), "item", item, "this annotator has not judged it", "Judge it first.")
    earlier = kinds[judgement.purpose if judgement.purpose in kinds else "first"]
    if earlier:
        problem = f"this annotator's judgement of it stands (seq {earlier[0]})"
        raise AlreadyJudged("item", item, problem, "Retract that one first.")
