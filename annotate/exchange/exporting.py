"""A project's votes as files that others train on, each row traced to the vote that it comes from.

preferences.jsonl      TRL's conversational pairs: prompt, chosen, rejected, margin
implicit.jsonl         the same as whole conversations
rankings.jsonl         what the pairs come from: prompt, answers with rank (1 the best; equal ranks are a tie)
unpaired.jsonl         prompt, completion, label, for KTO
demonstrations.jsonl   conversations with the answer that an annotator wrote, for SFT
votes.jsonl            all that was said, whatever became of it: rankings and skips, settled items, gold and repeats
ledger.jsonl           the rows of the ledger as they are hashed
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from align.annotate.store import Item, Store, Vote
from align.annotate.store.preference_pairs import pairs_of, training_rankings
from align.core.errors import InputError
from align.core.outputs import atomic_file
from align.core.types import Message, Preference


def export(store: Store, project: str, folder: Path, allow_simulated: bool = False) -> dict[str, int]:
    """Writes all of the files above; the number of rows by file.

    What is trained on is `training_rankings`'s: of an item that was settled the review alone, of gold items and repeats
    nothing. The words of a vote outlive that choice: demonstrations are taken from every vote that stands, and
    `votes.jsonl` holds each whole.

    Raises:
        InputError: unknown project, nothing ranked, or rankings by the stand-in for a person that were not asked for.
    """
    with store.reading():  # one view for all of it
        votes = training_rankings(store, project, allow_simulated)
        items = {item.id: item for item in store.items(project)}
        ledger = store.entries(project)
        everything = [
            v for v in (*store.rankings(project), *store.skips(project)) if allow_simulated or v.source == "human"
        ]
    everything.sort(key=lambda vote: vote.seq)
    pairs = [(vote, pair) for vote in votes for pair in pairs_of(vote, items[vote.item])]
    # Trainers take a column of margins that is full, or none.
    margins = all(pair.margin is not None for _, pair in pairs)
    learned = {vote.seq for vote in votes}
    kinds = {
        "preferences.jsonl": (explicit(pair) | traced(pair, vote, items[vote.item], margins) for vote, pair in pairs),
        "implicit.jsonl": (implicit(pair) | traced(pair, vote, items[vote.item], margins) for vote, pair in pairs),
        "rankings.jsonl": (ranking(vote, items[vote.item]) for vote in votes),
        "unpaired.jsonl": (row for vote in votes for row in unpaired(vote, items[vote.item])),
        "demonstrations.jsonl": (demonstration(vote, items[vote.item]) for vote in everything if vote.demonstration),
        "votes.jsonl": (whole(vote, items[vote.item], vote.seq in learned) for vote in everything),
        "ledger.jsonl": iter(ledger),
    }
    return {name: write_rows(folder / name, rows) for name, rows in kinds.items()}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write a new file of rows and return how many they are. Raises InputError if something has its name."""
    count = 0
    try:
        with atomic_file(path, replace=False) as file:
            for row in rows:
                file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
                count += 1
    except FileExistsError as error:
        raise InputError("folder", str(path), "there is such a file already", "Name an empty folder.") from error
    return count


def explicit(pair: Preference) -> dict[str, Any]:
    return {name: dicts(getattr(pair, name)) for name in ("prompt", "chosen", "rejected")}


def implicit(pair: Preference) -> dict[str, Any]:
    return {side: dicts((*pair.prompt, *getattr(pair, side))) for side in ("chosen", "rejected")}


def traced(pair: Preference, vote: Vote, item: Item, margins: bool) -> dict[str, Any]:
    """Where a pair comes from, and what it weighs: K(K-1)/2 pairs of one ranking weigh 1 together."""
    better, worse = pair.id.partition(":")[2].split(">")
    k = len(item.candidates)
    margin = {"margin": pair.margin} if margins else {}
    return margin | {
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
    more = {"quality": vote.quality, "rationale": vote.rationale, "prompt_flagged": item.id in vote.flagged}
    return {"prompt": dicts(item.prompt.messages), "answers": answers, "strength": vote.strength} | more | trace(vote)


def unpaired(vote: Vote, item: Item) -> Iterator[dict[str, Any]]:
    """The best tier is good and the worst is not, unless the annotator said that all are the one or the other. A text
    that would be both, for sampling gave it twice, is neither."""
    last = len(vote.tiers) - 1
    labels = {}
    for place, tier in enumerate(vote.tiers):
        if vote.quality:
            labels |= dict.fromkeys(tier, vote.quality == "good")
        elif last > 0 and place in (0, last):
            labels |= dict.fromkeys(tier, place == 0)
    judged = [candidate for candidate in item.candidates if candidate.id in labels]
    labelled = {(candidate.text, labels[candidate.id]) for candidate in judged}
    for candidate in judged:
        label = labels[candidate.id]
        if (candidate.text, not label) not in labelled:
            completion = dicts((Message("assistant", candidate.text),))
            row = {"prompt": dicts(item.prompt.messages), "completion": completion, "label": label}
            yield row | {"id": f"{vote.seq}:{candidate.id}", **origin(item, candidate.id)} | trace(vote)


def demonstration(vote: Vote, item: Item) -> dict[str, Any]:
    return {"messages": item.prompt.answered(vote.demonstration).as_dicts()} | trace(vote)


def whole(vote: Vote, item: Item, learned: bool) -> dict[str, Any]:
    """A vote with all that was said in it. Its answers are called `candidates`: the file is a record, and a reader of
    rankings must not train on what a review replaced."""
    answers = [
        {
            "answer": c.text, "id": c.id, "flagged": c.id in vote.flagged, "ratings": dict(vote.ratings.get(c.id, {})),
            **origin(item, c.id),
        }
        for c in item.candidates
    ]  # fmt: skip
    names = ("strength", "quality", "skipped", "seconds", "rationale", "demonstration")
    return {
        "prompt": dicts(item.prompt.messages), "candidates": answers, "kind": vote.kind, "purpose": vote.purpose,
        "tiers": [list(tier) for tier in vote.tiers], "shown": list(vote.display_order),
        "prompt_flagged": item.id in vote.flagged, "trained_on": learned,
    } | {name: getattr(vote, name) for name in names} | trace(vote)  # fmt: skip


def trace(vote: Vote) -> dict[str, Any]:
    return {
        "vote": vote.seq, "item": vote.item, "annotator": vote.annotator, "source": vote.source,
        "guideline_version": vote.guideline_version, "project_version": vote.project_version,
        "created_at": vote.created_at, **({"scorer": vote.scorer} if vote.scorer else {}),
    }  # fmt: skip


def origin(item: Item, id: str) -> dict[str, str]:
    candidate = next(c for c in item.candidates if c.id == id)
    return {"model": candidate.model_digest, "adapter": candidate.adapter_digest}


def dicts(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    return [message.as_dict() for message in messages]
