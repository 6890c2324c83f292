"""Export of a project's votes as training files. Each row names the vote that it comes from.

preferences.jsonl      TRL's conversational pairs: prompt, chosen, rejected, margin
implicit.jsonl         the same pairs as whole conversations
rankings.jsonl         the rankings: prompt, answers with rank (1 is the best; equal ranks are a tie)
unpaired.jsonl         prompt, completion, label, for KTO
demonstrations.jsonl   conversations with the answer that an annotator wrote, for SFT
votes.jsonl            all rankings and skips that stand, including gold items, repeats and those replaced by a review
ledger.jsonl           the rows of the ledger as they are hashed
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from align.annotate.posteriors import add_posteriors
from align.annotate.store import AnnotationItem, Store, Vote
from align.annotate.store.ledger import read_quarantined
from align.annotate.store.preference_pairs import build_pairs, load_training_rankings, parse_candidate_ids
from align.annotate.store.vote_selection import DEFAULT_SELECTION, VoteSelection, select_votes
from align.core.types import Message, Preference


def export_votes(
    store: Store, project: str, folder: Path, selection: VoteSelection = DEFAULT_SELECTION
) -> dict[str, int]:
    """Write a project's votes as JSON Lines files into a folder, and return file name → number of rows.

    Training rows come from `load_training_rankings`: an item's newest review replaces its other rankings, and gold
    items and repeats are left out. Demonstrations are taken from every vote of the selected annotators that stands, and
    `votes.jsonl` holds the votes of all.

    Raises:
        InputError: unknown project, no rankings, or simulated rankings without `selection.allow_simulated`.
    """
    with store.reading() as connection:  # all reads see the same state
        quarantined = read_quarantined(connection, project)
        votes = load_training_rankings(store, project, selection)
        items = {item.id: item for item in store.items(project)}
        ledger = store.entries(project)
        standing_votes = [
            vote
            for vote in (*store.rankings(project), *store.skips(project))
            if selection.allow_simulated or vote.source == "human"
        ]
    standing_votes.sort(key=lambda vote: vote.seq)
    vote_of_pair = [(pair, vote) for vote in votes for pair in build_pairs(vote, items[vote.item])]
    pairs = add_posteriors([pair for pair, _ in vote_of_pair], votes)
    # Trainers accept a column of margins only if every row has one.
    has_margins = all(pair.margin is not None for pair in pairs)
    pairs_with_provenance = [
        (pair, provenance_fields(pair, vote, items[vote.item], has_margins))
        for pair, (_, vote) in zip(pairs, vote_of_pair, strict=True)
    ]
    trained_seqs = {vote.seq for vote in votes}
    rows_by_file = {
        "preferences.jsonl": (
            {name: to_dicts(getattr(pair, name)) for name in ("prompt", "chosen", "rejected")} | provenance
            for pair, provenance in pairs_with_provenance
        ),
        "implicit.jsonl": (
            {side: to_dicts((*pair.prompt, *getattr(pair, side))) for side in ("chosen", "rejected")} | provenance
            for pair, provenance in pairs_with_provenance
        ),
        "rankings.jsonl": (build_ranking_row(vote, items[vote.item]) for vote in votes),
        "unpaired.jsonl": (row for vote in votes for row in iter_unpaired_rows(vote, items[vote.item])),
        "demonstrations.jsonl": (
            {"messages": items[vote.item].prompt.with_answer(vote.demonstration).as_dicts()} | vote_fields(vote)
            for vote in select_votes(store, project, standing_votes, selection)
            if vote.demonstration
        ),
        "votes.jsonl": (
            build_vote_row(vote, items[vote.item], vote.seq in trained_seqs, vote.annotator in quarantined)
            for vote in standing_votes
        ),
        "ledger.jsonl": ledger,
    }
    return {name: write_rows(folder / name, rows) for name, rows in rows_by_file.items()}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows to a new JSON Lines file, and return their number. Raises FileExistsError if the file exists."""
    count = 0
    with open(path, "x", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def provenance_fields(pair: Preference, vote: Vote, item: AnnotationItem, has_margins: bool) -> dict[str, Any]:
    """Return the fields of a preference pair's row besides its texts, such as ids, weight, posterior and vote.

    The K(K-1)/2 pairs of one ranking weigh 1 together.

    Args:
        pair: with its posterior.
    """
    assert pair.posterior is not None
    better, worse = parse_candidate_ids(pair)
    k = len(item.candidates)
    margin = {"margin": pair.margin} if has_margins else {}
    return {
        **margin,
        "id": pair.id,
        "group_id": pair.group_id,
        "weight": 2 / (k * (k - 1)),
        "strength": vote.strength,
        "posterior": round(pair.posterior, 4),
        "chosen_from": origin_fields(item, better),
        "rejected_from": origin_fields(item, worse),
        **vote_fields(vote),
    }


def build_ranking_row(vote: Vote, item: AnnotationItem) -> dict[str, Any]:
    """Return a ranking as a row of `rankings.jsonl`: the prompt, and its answers with their ranks (1 is the best)."""
    rank = {id: number for number, tier in enumerate(vote.tiers, start=1) for id in tier}
    answers = [
        {"answer": c.text, "rank": rank[c.id], "id": c.id, "flagged": c.id in vote.flagged, **origin_fields(item, c.id)}
        | ({"ratings": dict(vote.ratings[c.id])} if c.id in vote.ratings else {})
        for c in item.candidates
    ]
    return {
        "prompt": to_dicts(item.prompt.messages),
        "answers": answers,
        "strength": vote.strength,
        "quality": vote.quality,
        "rationale": vote.rationale,
        "prompt_flagged": item.id in vote.flagged,
        **vote_fields(vote),
    }


def iter_unpaired_rows(vote: Vote, item: AnnotationItem) -> Iterator[dict[str, Any]]:
    """Yield a row of unpaired preference data (as for KTO) for each answer that a ranking labels as good or bad.

    The best tier is good and the worst is bad, unless the annotator called all answers good or bad. A text that was
    sampled twice and would get both labels is left out.
    """
    last = len(vote.tiers) - 1
    labels = {}
    for position, tier in enumerate(vote.tiers):
        if vote.quality:
            labels |= dict.fromkeys(tier, vote.quality == "good")
        elif last > 0 and position in (0, last):
            labels |= dict.fromkeys(tier, position == 0)
    labelled_candidates = [candidate for candidate in item.candidates if candidate.id in labels]
    labels_of_texts = {(candidate.text, labels[candidate.id]) for candidate in labelled_candidates}
    for candidate in labelled_candidates:
        label = labels[candidate.id]
        if (candidate.text, not label) not in labels_of_texts:
            yield {
                "prompt": to_dicts(item.prompt.messages),
                "completion": to_dicts((Message("assistant", candidate.text),)),
                "label": label,
                "id": f"{vote.seq}:{candidate.id}",
                **origin_fields(item, candidate.id),
                **vote_fields(vote),
            }


def build_vote_row(vote: Vote, item: AnnotationItem, is_trained_on: bool, is_quarantined: bool) -> dict[str, Any]:
    """Return a vote, a ranking or a skip, as a row of `votes.jsonl` with all its fields and the item's texts.

    Its answers are called `candidates` rather than `answers`, so that a reader of rankings does not train on rankings
    that a review replaced.
    """
    answers = [
        {
            "answer": c.text,
            "id": c.id,
            "flagged": c.id in vote.flagged,
            "ratings": dict(vote.ratings.get(c.id, {})),
            **origin_fields(item, c.id),
        }
        for c in item.candidates
    ]
    names = ("strength", "quality", "skipped", "seconds", "rationale", "demonstration")
    return {
        "prompt": to_dicts(item.prompt.messages),
        "candidates": answers,
        "kind": vote.kind,
        "purpose": vote.purpose,
        "tiers": vote.tiers,
        "shown": vote.display_order,
        "prompt_flagged": item.id in vote.flagged,
        "trained_on": is_trained_on,
        "quarantined": is_quarantined,
        **{name: getattr(vote, name) for name in names},
        **vote_fields(vote),
    }


def vote_fields(vote: Vote) -> dict[str, Any]:
    """Return the fields of an exported row about its vote: ledger row, item, annotator, source, versions and time."""
    return {
        "vote": vote.seq,
        "item": vote.item,
        "annotator": vote.annotator,
        "source": vote.source,
        "guideline_version": vote.guideline_version,
        "project_version": vote.project_version,
        "created_at": vote.created_at,
        **({"scorer": vote.scorer} if vote.scorer else {}),
    }


def origin_fields(item: AnnotationItem, id: str) -> dict[str, str]:
    """Return the digests of the `model` and `adapter` that an item's answer was sampled from, given the answer's id."""
    candidate = next(c for c in item.candidates if c.id == id)
    return {"model": candidate.model_digest, "adapter": candidate.adapter_digest}


def to_dicts(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    return [message.as_dict() for message in messages]
