"""What the store takes and gives, how that lies in its tables, and what of it the ledger hashes."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from align.core.chain import hash_with_salt, to_canonical_json
from align.core.errors import require
from align.core.types import Conversation


@dataclass(frozen=True, slots=True)
class Candidate:
    """One answer to a prompt, and where it came from.

    Attributes:
        text: the assistant's turn.
        model_digest: digest of the base it was sampled from.
        adapter_digest: digest of the adapter upon it; empty where there was none.
        sampling: temperature, seed and whatever else a repetition needs; JSON values.
        ended: True where it ended with EOS, False where it was cut at the length limit.
        id: given by the store, `<item>-<k>`.
    """

    text: str
    model_digest: str = ""
    adapter_digest: str = ""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    ended: bool = True
    id: str = ""


@dataclass(frozen=True, slots=True)
class Item:
    """What an annotator is shown: a prompt (its id is the item's) and its K candidates, in the order added."""

    id: str
    prompt: Conversation
    candidates: tuple[Candidate, ...]


MOST_ANSWERS = 9
"""Of an item: what one key each can place."""
RESTORE = "Restore the store from a backup; do not export from it."
UNWRITABLE = re.compile("[\x00\ud800-\udfff]")


def check_text(field: str, text: str, most: int | None = None) -> None:
    """Raises for what one of the databases could not keep, or a file not be written with."""
    displayed = text if len(text) <= 60 else f"{text[:60]}…"
    fits = most is None or len(text) <= most
    require(fits, field, displayed, f"it has {len(text)} characters", f"Give at most {most}.")
    bad = UNWRITABLE.search(text)
    problem = f"it holds U+{ord(bad[0]):04X}, which is no character" if bad else ""
    require(not bad, field, displayed.encode(errors="replace").decode(), problem, "Take it out.")


SKIPS = ("unsure", "language", "broken", "harmful", "other")
"""Why an item may be skipped: a closed list, for the ledger keeps it for ever. Words go into the rationale."""


SHOWN = "shown"
"""What the ledger calls `Judgement.display_order`: it is hashed, and so its name stays."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What an annotator said of an item: a ranking of its answers, or why they skipped it.

    Attributes:
        tiers: candidate ids, best tier first; ids within a tier are tied. Empty where the item was skipped.
        source: `human` or `simulated`.
        scorer: the name of what a simulated annotator ranks by; empty of a person.
        strength: of two answers, how much better the first tier is: 1 to 3, 0 of a tie; None where nobody said.
        quality: `good` or `bad` where that was said of all answers together; else empty.
        ratings: by candidate id, a number for every attribute that was rated.
        flagged: ids of the candidates that were called harmful; the item's own id where the prompt was.
        skipped: why the item was skipped, one of `SKIPS`; empty for a ranking.
        display_order: the candidate ids in the order on the screen; empty where there was no screen.
        seconds: that the annotator looked at it; None where nobody measured.
        purpose: `work`; `gold`, an item with a known answer; `repeat`, one that the annotator had judged before; or
            `review`, what a reviewer settles of an item that others disagree on. Work is trained on, and in its place
            the newest review of an item.
        guideline_version: of the guidelines that the annotator had before them; empty where there were none.
        project_version: of the project's settings that they judged under, see `version_of`; None where nobody said.
        rationale: why, in the annotator's words. Erasable.
        demonstration: the answer that they would have given. Erasable.
    """

    tiers: tuple[tuple[str, ...], ...] = ()
    source: str = "human"
    strength: int | None = None
    quality: str = ""
    ratings: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    flagged: tuple[str, ...] = ()
    skipped: str = ""
    display_order: tuple[str, ...] = ()
    seconds: float | None = None
    purpose: str = "work"
    guideline_version: str = ""
    project_version: int | None = None
    rationale: str = ""
    demonstration: str = ""
    scorer: str = ""

    @property
    def kind(self) -> str:
        """Of its row in the ledger."""
        return "skip" if self.skipped else "ranking"

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Every (better, worse) pair of candidate ids across tiers; a tie yields none."""
        return tuple(
            (better, worse)
            for i, tier in enumerate(self.tiers)
            for better in tier
            for lower in self.tiers[i + 1 :]
            for worse in lower
        )

    def payload(self) -> dict[str, Any]:
        """What the ledger keeps of it: everything but the remark; what nobody said is left out."""
        always = {
            "tiers": [sorted(tier) for tier in self.tiers],  # within a tier order means nothing
            "source": self.source,
            "strength": self.strength,
            "guideline_version": self.guideline_version,
        }
        more = {
            "quality": self.quality,
            "ratings": {id: dict(rated) for id, rated in self.ratings.items()},
            "flagged": sorted(self.flagged),
            "skipped": self.skipped,
            SHOWN: list(self.display_order),
            "seconds": self.seconds,
            "purpose": "" if self.purpose == "work" else self.purpose,
            "scorer": self.scorer,
            "project_version": self.project_version,
        }
        return always | {name: value for name, value in more.items() if value not in ("", None, [], {})}

    def remark(self) -> str:
        """The erasable part as canonical JSON; empty where there is none."""
        words = {name: getattr(self, name) for name in ("rationale", "demonstration") if getattr(self, name)}
        return to_canonical_json(words) if words else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote(Judgement):
    """A judgement as the ledger holds it.

    Attributes:
        seq: its row.
        item: the id of the item judged.
        annotator: a pseudonym.
        created_at: UTC, ISO 8601.
    """

    seq: int
    item: str
    annotator: str
    created_at: str


def shuffle_of(name: str) -> float:
    """A number in [0, 1) that a name alone decides."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:13], 16) / 16**13


def work_row(project: str, item: str, priority: float) -> dict[str, Any]:
    """Return a row of `work` without a vote."""
    counters = {"wanted": 0, "judged": 0, "leased": 0, "gold": False}
    return {"project": project, "item": item, "shuffle": shuffle_of(item), "priority": priority, **counters}


def storable(text: str) -> str:
    """A model's text without what no database keeps: NUL and lone surrogates become U+FFFD."""
    return UNWRITABLE.sub("\ufffd", text)


def prompt_row(project: str, item: str, prompt: Conversation, salt: str = "") -> dict[str, Any]:
    """The row of `prompts`, with a fresh salt unless one is given."""
    salt = salt or secrets.token_hex(16)
    return {"project": project, "id": item, "messages": to_canonical_json(prompt.as_dicts()), "salt": salt}


def candidate_row(project: str, item: str, k: int, answer: Candidate, salt: str = "") -> dict[str, Any]:
    """The row of `candidates` at position k, with a fresh salt unless one is given."""
    return {
        "project": project,
        "id": f"{item}-{k}",
        "prompt_id": item,
        "position": k,
        "text": answer.text,
        "model_digest": answer.model_digest,
        "adapter_digest": answer.adapter_digest,
        "sampling": to_canonical_json(dict(answer.sampling)),
        "ended": bool(answer.ended),
        "salt": salt or secrets.token_hex(16),
    }


def item_payload(prompt: Mapping[Any, Any], answers: Sequence[Mapping[Any, Any]]) -> dict[str, Any]:
    """What the ledger keeps of an item's rows: `{prompt: digest, candidates: {id: digest}}`, all salted."""
    hashed = ("position", "text", "model_digest", "adapter_digest", "sampling", "ended")
    return {
        "prompt": hash_with_salt(prompt["salt"], prompt["messages"]),
        "candidates": {row["id"]: hash_with_salt(row["salt"], [row[name] for name in hashed]) for row in answers},
    }


def item_of(prompt: Mapping[Any, Any], answers: Sequence[Mapping[Any, Any]]) -> Item:
    """The record of an item's rows, candidates by position."""
    ordered = sorted(answers, key=lambda row: row["position"])
    return Item(
        prompt["id"],
        Conversation.from_messages(json.loads(prompt["messages"]), prompt["id"]),
        tuple(
            Candidate(
                row["text"],
                row["model_digest"],
                row["adapter_digest"],
                json.loads(row["sampling"]),
                row["ended"],
                row["id"],
            )
            for row in ordered
        ),
    )


def vote_of(row: Any, remark: str | None) -> Vote:
    """The record of a `ranking` or `skip` row of the ledger, with its remark where there is one."""
    payload = json.loads(row.payload)
    for digest in ("annotator_digest", "remark"):
        payload.pop(digest, None)
    payload |= {"tiers": tuple(tuple(tier) for tier in payload["tiers"])}
    payload["display_order"] = tuple(payload.pop(SHOWN, ()))
    payload["flagged"] = tuple(payload.get("flagged", ()))
    who = {"seq": row.seq, "item": row.item, "annotator": row.annotator, "created_at": row.created_at}
    return Vote(**payload, **json.loads(remark or "{}"), **who)
