"""Which judge may decide a gate: one whose card says that it agrees with people, or with another reference, on enough
pairs. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import CorruptFile, InputError, require
from align.evals.judge_identity import JudgeIdentity, difference
from align.report.words import in_words
from align.run import Input, file_digest, json_object, resolve

FIELD = "stage.card"
FILE = "card.json"
SCHEMA = 1
LEAST_VERDICTS = 100
"""Verdicts behind an agreement that lets a judge decide."""
MIN_AGREEMENT = 0.6
LEVEL = 0.95
"""The least level of the interval of an agreement that lets a judge decide."""
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
        level: of the interval.
    """

    judge: JudgeIdentity
    digest: str
    reference: str
    agreement: dict[str, Any]
    chance: float | None
    verdicts: int
    consistency: float | None
    level: float

    @property
    def words(self) -> str:
        """Its agreement, for people."""
        return f"agrees with {self.reference} on {in_words(self.agreement, '.2f')} of {self.verdicts:,} verdicts"

    def as_dict(self) -> dict[str, Any]:
        """As a verdict file has it."""
        return {"judge": self.judge.title, "card": self.digest, "agreement": {**self.agreement, "with": self.reference}}


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
        InputError: a later version wrote it.
    """
    found = json_object(path, FIELD, MEASURE)
    version = found.get("schema_version")
    if isinstance(version, int) and version > SCHEMA:
        problem = f"was written by a later version, this one reads {SCHEMA}"
        raise InputError(FIELD, str(path), problem, "Use the version of align that wrote it.")
    try:
        judge, swap = JudgeIdentity(str(found["judge"]["title"]), found["judge"]["made_of"]), found["swap"]
        verdicts, kappa = int(found["agreement"]["verdicts"]), found["agreement"]["kappa"]
        chance = None if kappa is None or kappa["low"] is None else float(kappa["low"])
        agreement = {key: float(found["agreement"]["raw"][key]) for key in ("value", "low", "high", "n")}
        card = Card(
            judge, file_digest(path), str(found["reference"]), {**agreement, "n": int(agreement["n"])},
            chance, verdicts, swap and float(swap["consistency"]["value"]), float(found["level"]),
        )  # fmt: skip
        numbers = [*agreement.values(), card.level, card.consistency or 0.0, chance or 0.0]
        whole = version == SCHEMA and found["judge"]["identity"] == judge.digest and all(map(math.isfinite, numbers))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CorruptFile(FIELD, str(path), "is no card of a judge", MEASURE) from None
    if not whole:
        raise CorruptFile(FIELD, str(path), "is no card of a judge, or is of none that it names", MEASURE)
    return card


def shortfall(card: Card, least: float = MIN_AGREEMENT) -> str:
    """Why a judge with this card decides nothing; empty where it may.

    Args:
        least: what the agreement has to be above.
    """
    agreement = in_words(card.agreement, ".2f")
    if card.consistency == 0:
        return "no verdict of it survives a swap of the two answers: it goes by their place"
    if card.verdicts < LEAST_VERDICTS:
        return f"its card has {card.verdicts:,} verdicts, and {LEAST_VERDICTS} are needed"
    if card.level < LEVEL:
        return f"its agreement has an interval at level {card.level:g}, and {LEVEL:g} is needed"
    if card.agreement["low"] <= least:
        return f"its agreement with {card.reference} is {agreement}, whose lower end is not above {least:g}"
    if card.chance is None or card.chance <= 0:  # a judge that calls everything equal agrees with each tie
        return f"its agreement with {card.reference} is {agreement}, and chance would do as well: see kappa in its card"
    return ""


def admit(gate: str, judge: JudgeIdentity, card: Card | None, ref: str, least: float = MIN_AGREEMENT) -> None:
    """Refuse a judge that may not decide a gate.

    Args:
        gate: its name.
        judge: that would decide it.
        card: the one that is named; None where none is.
        ref: by which it is named.
        least: what its agreement has to be above.

    Raises:
        InputError: there is no card, it is another judge's, or it says too little.
    """
    asks = f"gate {gate} is decided by {judge.title}"
    if card is None:
        problem = f"{asks}, and nothing says how often that is right"
        raise InputError(FIELD, "(none)", problem, f"{MEASURE} Then name its run.")
    if card.judge.digest != judge.digest:
        problem = f"{asks}, and this card is of another judge, {card.judge.title}: {difference(judge, card.judge)}"
        raise InputError(FIELD, ref, problem, MEASURE)
    if why := shortfall(card, least):
        raise InputError(FIELD, ref, f"{asks}: {why}", "Measure it on more pairs, or name another judge.")
