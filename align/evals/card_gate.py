"""Which judge may decide a gate: one whose card says that it agrees with people, or with another reference, on enough
pairs; of a grader, on enough answers, on those labelled yes as well as on those labelled no. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.errors import CorruptFile, InputError, require, require_schema_version
from align.evals.judge_identity import JudgeIdentity, difference, differing
from align.report.words import counted, in_words
from align.run import Input, file_digest, json_object, resolve

FIELD = "stage.card"
FILE = "card.json"
SCHEMA = 1
LEAST_VERDICTS = 100
"""Verdicts behind an agreement that lets a judge decide."""
MIN_AGREEMENT = 0.6
LEVEL = 0.95
"""The least level of the interval of an agreement that lets a judge decide."""
LABELS = ("yes", "no")
MEASURE_GRADER = (
    "Measure the judge: python -m align stage=eval eval=judge eval.asks=… stage.judge=… data=files data.path=LABELLED."
)
MEASURE = "Measure the judge: python -m align stage=eval eval=judge reward=… data=annotations project=NAME."


@dataclass(frozen=True, slots=True)
class Card:
    """A judge's card, as far as gates ask.

    Attributes:
        judge: whose it is.
        digest: SHA-256 of the file.
        reference: whom it was compared with, for people.
        agreement: `{value, low, high, n}`.
        chance: the lower end of kappa, the agreement beyond chance; None where it has none.
        verdicts: that were compared.
        consistency: the share of verdicts that survive a swap of the answers; None where the judge sees no order.
        level: of the intervals.
        sides: of a grader, `yes` and `no` → its agreement on the answers with this label.
        errors: how many of `verdicts` the judge did not give.
    """

    judge: JudgeIdentity
    digest: str
    reference: str
    agreement: dict[str, Any]
    chance: float | None
    verdicts: int
    consistency: float | None
    level: float
    sides: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    errors: int = 0

    @property
    def words(self) -> str:
        """Its agreement, for people."""
        agreed = in_words(self.agreement, ".2f")
        return f"agrees with {self.reference} on {agreed} of {counted(self.verdicts, 'verdict')}"

    def as_dict(self) -> dict[str, Any]:
        """As a verdict file has it."""
        found = {
            "judge": self.judge.title, "card": self.digest, "agreement": {**self.agreement, "with": self.reference}
        }  # fmt: skip
        return found | ({"asks": self.judge.asks, "agreement_by_label": {**self.sides}} if self.sides else {})


def found_cards(given: Any, root: Path) -> tuple[Sequence[Card], dict[str, Input]]:
    """The cards that `stage.card` names, and what a run that reads them says of them.

    Raises:
        InputError: it names no runs.
        MissingArtifact, CorruptFile, InputError: see `found_card`.
    """
    listed = isinstance(given, list | tuple)
    refs = [*given] if listed else [given]
    for ref in refs:
        right = isinstance(ref, str) and (bool(ref) or not listed)
        require(right, FIELD, given, "names no run", "Write eval:NAME, or a list of such.")
    found = [found_card(ref, root) for ref in refs if ref]
    names = ["card"] if len(found) == 1 else [f"card.{i}" for i in range(len(found))]
    return [card for card, _ in found], dict(zip(names, (read for _, read in found), strict=True))


def found_card(ref: str, root: Path) -> tuple[Card, Input]:
    """The card that a reference names, and what a run that reads it says of it.

    Raises:
        MissingArtifact: there is no such run.
        CorruptFile: a file of it is not the one that was published.
        InputError: it measured no judge.
    """
    artifact = resolve(ref, root, field_name=FIELD)
    path = artifact.path / FILE
    require(path.is_file(), FIELD, ref, "is no run of eval=judge: it has no card", MEASURE)
    card, made = read_card(path), artifact.manifest
    stage, name = (made.stage, made.name) if made else ("", "")
    return card, Input(card.digest, artifact.ref, str(artifact.path.absolute()), stage, name)


def read_card(path: Path) -> Card:
    """
    Raises:
        CorruptFile: it is no card.
        InputError: another version wrote it.
    """
    found = json_object(path, FIELD, MEASURE)
    require_schema_version(found.get("schema_version"), SCHEMA, FIELD, str(path), MEASURE)
    try:
        judge, swap = JudgeIdentity(str(found["judge"]["title"]), found["judge"]["made_of"]), found["swap"]
        verdicts, kappa = int(found["agreement"]["verdicts"]), found["agreement"]["kappa"]
        chance = None if kappa is None or kappa["low"] is None else float(kappa["low"])
        agreement, by_label = interval_in(found["agreement"]["raw"]), found["by_label"] if judge.asks else {}
        sides = {label: interval_in(by_label[label]) for label in LABELS} if judge.asks else {}
        card = Card(
            judge, file_digest(path), str(found["reference"]), agreement, chance, verdicts,
            swap and float(swap["consistency"]["value"]), float(found["level"]), sides,
            int(found["errors"]),
        )  # fmt: skip
        every = [value for one in (agreement, *sides.values()) for value in one.values()]
        numbers = [*every, card.level, card.consistency or 0.0, chance or 0.0]
        whole = found["judge"]["identity"] == judge.digest and all(map(math.isfinite, numbers))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CorruptFile(FIELD, str(path), "is no card of a judge", MEASURE) from None
    if not whole:
        raise CorruptFile(FIELD, str(path), "is no card of a judge, or is of none that it names", MEASURE)
    return card


def interval_in(found: Mapping[str, Any]) -> dict[str, Any]:
    """Raises: KeyError, TypeError, ValueError: it is none."""
    return {**{key: float(found[key]) for key in ("value", "low", "high")}, "n": int(found["n"])}


def shortfall(card: Card, least: float = MIN_AGREEMENT) -> str:
    """Why a judge with this card decides nothing; empty where it may.

    Args:
        least: what the agreement has to be above.
    """
    agreement = in_words(card.agreement, ".2f")
    if card.errors >= card.verdicts:
        return "it gives no verdict"
    if card.consistency == 0:
        return "no verdict of it survives a swap of the two answers: it goes by their place"
    if card.verdicts < LEAST_VERDICTS:
        return f"its card has {counted(card.verdicts, 'verdict')}, and {LEAST_VERDICTS} are needed"
    if card.level < LEVEL:
        return f"its agreement has an interval at level {card.level:g}, and {LEVEL:g} is needed"
    for label, found in card.sides.items():
        said = f"its agreement with {card.reference} on answers labelled {label} is {in_words(found, '.2f')}"
        if found["value"] == 0:
            return f"{said}: it never says {label} where it should"
        if found["low"] <= least:
            return f"{said}, whose lower end is not above {least:g}"
    if not card.sides and card.agreement["low"] <= least:
        return f"its agreement with {card.reference} is {agreement}, whose lower end is not above {least:g}"
    if card.chance is None or card.chance <= 0:  # a judge that calls everything equal agrees with each tie
        return f"its agreement with {card.reference} is {agreement}, and chance would do as well: see kappa in its card"
    return ""


def admitted(gate: str, judge: JudgeIdentity, cards: Sequence[Card], given: Any, least: float = MIN_AGREEMENT) -> Card:
    """The card by which a judge may decide a gate.

    Args:
        gate: its name.
        judge: that would decide it.
        cards: those that are named.
        given: how they are named.
        least: what its agreement has to be above.

    Raises:
        InputError: there is no card, none is this judge's, two are, or it says too little.
    """
    asks, measure = f"gate {gate} is decided by {judge.title}", MEASURE_GRADER if judge.asks else MEASURE
    if not cards:
        problem = f"{asks}, and nothing says how often that is right"
        raise InputError(FIELD, "(none)", problem, f"{measure} Then name its run.")
    own = [card for card in cards if card.judge.digest == judge.digest]
    if not own:
        card = min(cards, key=lambda card: len(differing(judge, card.judge)))
        which = "this card is" if len(cards) == 1 else f"of these {len(cards)} cards even the nearest is"
        problem = f"{asks}, and {which} of another judge, {card.judge.title}: {difference(judge, card.judge)}"
        raise InputError(FIELD, given, problem, measure)
    require(len(own) == 1, FIELD, given, f"names {len(own)} cards of {judge.title}", "Name one of them.")
    if why := shortfall(own[0], least):
        more = "answers" if judge.asks else "pairs"
        raise InputError(FIELD, given, f"{asks}: {why}", f"Measure it on more {more}, or name another judge.")
    return own[0]
