"""A project's votes as files that others train on, each row traced to the vote that it comes from.

preferences.jsonl      TRL's conversational pairs: prompt, chosen, rejected, margin
implicit.jsonl         the same as whole conversations
rankings.jsonl         every ranking, ties and all: prompt, answers with rank (1 the best; equal ranks are a tie)
unpaired.jsonl         prompt, completion, label, for KTO
demonstrations.jsonl   conversations with the answer that an annotator wrote, for SFT
ledger.jsonl           the rows of the ledger as they are hashed
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from align.types import Message, Preference
from annotate.store import Item, Store, Vote
from annotate.store.pairs import pairs_of

PAIRS = ("preferences.jsonl", "implicit.jsonl")


def export(store: Store, project: str, folder: Path) -> dict[str, int]:
    """Writes all of the files above; the number of rows by file. Gold items and repeats are in the ledger alone.

    Raises:
        InputError: unknown project.
    """
    votes = [vote for vote in store.rankings(project) if vote.purpose == "work"]
    items = {item.id: item for item in store.items(project)}
    votes = [vote for vote in votes if vote.item in items]  # one erased between the two reads is gone
    kinds = {
        "preferences.jsonl": (explicit(pair, vote, items[vote.item]) for vote, pair in paired(votes, items)),
        "implicit.jsonl": (implicit(pair, vote, items[vote.item]) for vote, pair in paired(votes, items)),
        "rankings.jsonl": (ranking(vote, items[vote.item]) for vote in votes),
        "unpaired.jsonl": (row for vote in votes for row in unpaired(vote, items[vote.item])),
        "demonstrations.jsonl": (demonstration(v, items[v.item]) for v in votes if v.demonstration),
        "ledger.jsonl": store.entries(project),
    }
    return {name: write_rows(folder / name, rows) for name, rows in kinds.items()}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    with path.open("w", encoding="utf-8") as file:
        return sum(1 for row in rows if file.write(json.dumps(row, ensure_ascii=False) + "\n"))


def paired(votes: Iterable[Vote], items: dict[str, Item]) -> Iterator[tuple[Vote, Preference]]:
    return ((vote, pair) for vote in votes for pair in pairs_of(vote, items[vote.item]))


def explicit(pair: Preference, vote: Vote, item: Item) -> dict[str, Any]:
    return {"prompt": dicts(pair.prompt), "chosen": dicts(pair.chosen), "rejected": dicts(pair.rejected)} | (
        pair_trace(pair, vote, item)
    )


def implicit(pair: Preference, vote: Vote, item: Item) -> dict[str, Any]:
    sides = {side: dicts((*pair.prompt, *getattr(pair, side))) for side in ("chosen", "rejected")}
    return sides | pair_trace(pair, vote, item)


def pair_trace(pair: Preference, vote: Vote, item: Item) -> dict[str, Any]:
    """Where a pair comes from, and what it weighs: all pairs of one ranking weigh 1 together."""
    better, worse = pair.id.partition(":")[2].split(">")
    k = len(item.candidates)
    said = {} if pair.margin is None else {"margin": pair.margin}
    return said | {
        "id": pair.id, "group_id": pair.group_id, "weight": 2 / (k * (k - 1)), "strength": vote.strength,
        "chosen_from": origin(item, better), "rejected_from": origin(item, worse),
    } | trace(vote)  # fmt: skip


def ranking(vote: Vote, item: Item) -> dict[str, Any]:
    rank = {id: place for place, tier in enumerate(vote.tiers, start=1) for id in tier}
    answers = [
        {"answer": c.text, "rank": rank[c.id], "id": c.id, "flagged": c.id in vote.flagged, **origin(item, c.id)}
        | ({"ratings": dict(vote.ratings[c.id])} if c.id in vote.ratings else {})
        for c in item.candidates
    ]
    said = {"quality": vote.quality, "rationale": vote.rationale, "prompt_flagged": item.id in vote.flagged}
    return {"prompt": dicts(item.prompt.messages), "answers": answers, "strength": vote.strength} | said | trace(vote)


def unpaired(vote: Vote, item: Item) -> Iterator[dict[str, Any]]:
    """The best tier is good and the worst is not, unless the annotator said that all are the one or the other."""
    last = len(vote.tiers) - 1
    for place, tier in enumerate(vote.tiers):
        if vote.quality:
            label = vote.quality == "good"
        elif last > 0 and place in (0, last):
            label = place == 0
        else:
            continue
        for candidate in (c for c in item.candidates if c.id in tier):
            completion = dicts((Message("assistant", candidate.text),))
            row = {"prompt": dicts(item.prompt.messages), "completion": completion, "label": label}
            yield row | {"id": f"{vote.seq}:{candidate.id}", **origin(item, candidate.id)} | trace(vote)


def demonstration(vote: Vote, item: Item) -> dict[str, Any]:
    return {"messages": item.prompt.answered(vote.demonstration).as_dicts()} | trace(vote)


def trace(vote: Vote) -> dict[str, Any]:
    return {
        "vote": vote.seq, "item": vote.item, "annotator": vote.annotator, "source": vote.source,
        "guideline_version": vote.guideline_version, "created_at": vote.created_at,
    }  # fmt: skip


def origin(item: Item, id: str) -> dict[str, str]:
    candidate = next(c for c in item.candidates if c.id == id)
    return {"model": candidate.model_digest, "adapter": candidate.adapter_digest}


def dicts(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    return [message.as_dict() for message in messages]
