"""What the store takes and gives, how that lies in its tables, and what of it the ledger hashes."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from align.types import Conversation
from annotate.store.ledger import canonical, salted_digest


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


@dataclass(frozen=True, slots=True)
class Ranking:
    """One judgement as the ledger holds it.

    Attributes:
        seq: its row.
        item: the id of the item judged.
        tiers: candidate ids, best tier first; ids within a tier are tied.
        annotator: a pseudonym.
        source: `human` or `simulated`.
        strength: how sure or how much better, in the guideline's units; None where nobody said.
        guideline_version: the guideline that the annotator had read; empty where there was none.
        created_at: UTC, ISO 8601.
    """

    seq: int
    item: str
    tiers: tuple[tuple[str, ...], ...]
    annotator: str
    source: str
    strength: int | None
    guideline_version: str
    created_at: str

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


def prompt_row(project: str, item: str, prompt: Conversation, salt: str = "") -> dict[str, Any]:
    """The row of `prompts`, with a fresh salt unless one is given."""
    salt = salt or secrets.token_hex(16)
    return {"project": project, "id": item, "messages": canonical(prompt.as_dicts()), "salt": salt}


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
        "sampling": canonical(dict(answer.sampling)),
        "ended": bool(answer.ended),
        "salt": salt or secrets.token_hex(16),
    }


def item_payload(prompt: Mapping[Any, Any], answers: Sequence[Mapping[Any, Any]]) -> dict[str, Any]:
    """What the ledger keeps of an item's rows: `{prompt: digest, candidates: {id: digest}}`, all salted."""
    hashed = ("position", "text", "model_digest", "adapter_digest", "sampling", "ended")
    return {
        "prompt": salted_digest(prompt["salt"], prompt["messages"]),
        "candidates": {row["id"]: salted_digest(row["salt"], [row[name] for name in hashed]) for row in answers},
    }


def item_of(prompt: Mapping[Any, Any], answers: Sequence[Mapping[Any, Any]]) -> Item:
    """The record of an item's rows, candidates by position."""
    ordered = sorted(answers, key=lambda row: row["position"])
    return Item(
        prompt["id"],
        Conversation.of(json.loads(prompt["messages"]), prompt["id"]),
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


def ranking_of(row: Any) -> Ranking:
    """The record of a `ranking` row of the ledger."""
    judged = json.loads(row.payload)
    return Ranking(
        seq=row.seq,
        item=row.item,
        tiers=tuple(tuple(tier) for tier in judged["tiers"]),
        annotator=row.annotator,
        source=judged["source"],
        strength=judged["strength"],
        guideline_version=judged["guideline_version"],
        created_at=row.created_at,
    )
