"""Records of the store (items, candidates, judgements, votes), their rows in the tables, and their hashed payloads."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from align.core.chain import hash_with_salt, to_canonical_json
from align.core.errors import require
from align.core.types import Conversation

if TYPE_CHECKING:
    from sqlalchemy import Row


@dataclass(frozen=True, slots=True)
class Candidate:
    """An answer to a prompt, and its origin.

    Attributes:
        text: the assistant's turn.
        model_digest: digest of the base model it was sampled from.
        adapter_digest: digest of the adapter; empty if there was none.
        sampling: temperature, seed and everything else needed to sample it again; JSON values.
        ended: whether it ended with EOS; False if it was cut at the length limit.
        id: set by the store, `<item>-<k>`.
    """

    text: str
    model_digest: str = ""
    adapter_digest: str = ""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    ended: bool = True
    id: str = ""


@dataclass(frozen=True, slots=True)
class AnnotationItem:
    """An item to be judged: a prompt and its K candidate answers, in the order added. The prompt's id is the item's."""

    id: str
    prompt: Conversation
    candidates: tuple[Candidate, ...]


MAX_ANSWERS = 9
"""Maximum number of candidates of an item, because each rank has a digit key."""
RESTORE_REMEDY = "Restore the store from a backup; do not export from it."
UNWRITABLE = re.compile("[\x00\ud800-\udfff]")


def check_text(field: str, text: str, max_length: int | None = None) -> None:
    """Raise InputError for a text with NUL or half a character, or with more than `max_length` characters."""
    displayed = text if len(text) <= 60 else f"{text[:60]}…"
    is_short = max_length is None or len(text) <= max_length
    require(is_short, field, displayed, f"it has {len(text)} characters", f"Give at most {max_length}.")
    unwritable = UNWRITABLE.search(text)
    problem = f"it holds U+{ord(unwritable[0]):04X}, which is no character" if unwritable else ""
    require(not unwritable, field, displayed.encode(errors="replace").decode(), problem, "Take it out.")


SKIP_REASONS = ("unsure", "language", "broken", "harmful", "other")
"""Reasons for a skip: a closed list, because the ledger keeps them for ever. Free text belongs in the rationale."""

DISPLAY_ORDER_KEY = "shown"
"""Name of `Judgement.display_order` in the ledger, which is hashed and cannot change."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """An annotator's judgement of an item: a ranking of its answers, or a skip.

    Attributes:
        tiers: candidate ids, best tier first; ids within a tier are tied. Empty for a skip.
        source: `human` or `simulated`.
        scorer: name of the scorer by which a simulated annotator ranks; empty for a person.
        strength: how much better the first tier of two answers is: 1 to 3, or 0 for a tie; None if not given.
        quality: `good` or `bad` if the annotator judged all answers so; else empty.
        ratings: candidate id → attribute → rating.
        flagged: ids of the candidates flagged as harmful; the item's own id if the prompt was flagged.
        skipped: reason of a skip, one of `SKIP_REASONS`; empty for a ranking.
        display_order: the candidate ids in their order on the screen; empty if there was no screen.
        seconds: time that the annotator looked at the item; None if not measured.
        purpose: `work`; `gold` for an item with a known answer; `repeat` for an item that the annotator had judged
            before; or `review` for a reviewer's decision on an item that others disagree on. Training uses work, and
            the newest review of an item in its place.
        guideline_version: version of the guidelines that the annotator saw; empty if there were none.
        project_version: version of the project's settings that applied, see `read_settings_version`; None if not given.
        rationale: the annotator's explanation. Erasable.
        demonstration: the answer that the annotator would have given. Erasable.
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
        """The kind of the judgement's row in the ledger: `skip` or `ranking`."""
        return "skip" if self.skipped else "ranking"

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The (better, worse) pairs of candidate ids across tiers; a tie yields none."""
        return tuple(
            (better, worse)
            for i, tier in enumerate(self.tiers)
            for better in tier
            for lower in self.tiers[i + 1 :]
            for worse in lower
        )

    def to_payload(self) -> dict[str, Any]:
        """Return the judgement's fields as JSON values for its ledger row, without erasable texts and empty fields."""
        required_fields = {
            "tiers": [sorted(tier) for tier in self.tiers],  # within a tier order means nothing
            "source": self.source,
            "strength": self.strength,
            "guideline_version": self.guideline_version,
        }
        optional_fields = {
            "quality": self.quality,
            "ratings": {id: dict(rated) for id, rated in self.ratings.items()},
            "flagged": sorted(self.flagged),
            "skipped": self.skipped,
            DISPLAY_ORDER_KEY: list(self.display_order),
            "seconds": self.seconds,
            "purpose": "" if self.purpose == "work" else self.purpose,
            "scorer": self.scorer,
            "project_version": self.project_version,
        }
        return required_fields | {
            name: value for name, value in optional_fields.items() if value not in ("", None, [], {})
        }

    def to_remark(self) -> str:
        """Return the annotator's texts, rationale and demonstration, as canonical JSON, or "" if none exist."""
        texts = {name: getattr(self, name) for name in ("rationale", "demonstration") if getattr(self, name)}
        return to_canonical_json(texts) if texts else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote(Judgement):
    """A judgement that was recorded in the ledger, with its row number, item, annotator and time.

    Attributes:
        seq: number of its row.
        item: id of the judged item.
        annotator: a pseudonym.
        created_at: UTC, ISO 8601.
    """

    seq: int
    item: str
    annotator: str
    created_at: str


def hash_to_fraction(name: str) -> float:
    """Return a hash of a name as a number that is uniform in [0, 1)."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:13], 16) / 16**13


def build_work_row(project: str, item: str, priority: float) -> dict[str, Any]:
    """Return the row of a new item for the table `work`, from which items are assigned, with all counters at 0."""
    counters = {"wanted": 0, "judged": 0, "leased": 0, "gold": False}
    return {"project": project, "item": item, "shuffle": hash_to_fraction(item), "priority": priority, **counters}


def replace_unwritable(text: str) -> str:
    """Return a text with U+FFFD in place of NUL and lone surrogates, which databases cannot store."""
    return UNWRITABLE.sub("\ufffd", text)


def build_prompt_row(project: str, item: str, prompt: Conversation, salt: str = "") -> dict[str, Any]:
    """Return the row of an item's prompt for the table `prompts`, with a random salt unless one is given."""
    salt = salt or secrets.token_hex(16)
    return {"project": project, "id": item, "messages": to_canonical_json(prompt.as_dicts()), "salt": salt}


def build_candidate_row(project: str, item: str, k: int, answer: Candidate, salt: str = "") -> dict[str, Any]:
    """Return the row of an item's answer at position `k` for the table `candidates`, with a random salt by default."""
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


def build_item_payload(prompt: Mapping[Any, Any], answers: Sequence[Mapping[Any, Any]]) -> dict[str, Any]:
    """Return the salted digests of an item's contents for its ledger row: `{prompt: digest, candidates: {id: digest}}`.

    Args:
        prompt: the item's row of the table `prompts`.
        answers: the item's rows of the table `candidates`.
    """
    hashed = ("position", "text", "model_digest", "adapter_digest", "sampling", "ended")
    return {
        "prompt": hash_with_salt(prompt["salt"], prompt["messages"]),
        "candidates": {row["id"]: hash_with_salt(row["salt"], [row[name] for name in hashed]) for row in answers},
    }


def build_item_from_rows(prompt: Mapping[Any, Any], answers: Sequence[Mapping[Any, Any]]) -> AnnotationItem:
    """Build an item from its rows of the tables `prompts` and `candidates`, with the candidates ordered by position."""
    ordered = sorted(answers, key=lambda row: row["position"])
    return AnnotationItem(
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


def parse_vote(row: Row[Any], remark: str | None) -> Vote:
    """Convert a ledger row of kind `ranking` or `skip`, and the annotator's texts on it, to a Vote.

    Args:
        remark: its erasable texts as JSON, if there are any.
    """
    payload = json.loads(row.payload)
    for digest in ("annotator_digest", "remark"):
        payload.pop(digest, None)
    payload |= {"tiers": tuple(tuple(tier) for tier in payload["tiers"])}
    payload["display_order"] = tuple(payload.pop(DISPLAY_ORDER_KEY, ()))
    payload["flagged"] = tuple(payload.get("flagged", ()))
    columns = {"seq": row.seq, "item": row.item, "annotator": row.annotator, "created_at": row.created_at}
    return Vote(**payload, **json.loads(remark or "{}"), **columns)
