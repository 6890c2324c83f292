"""Build votes without a store, for tests of the figures."""

from itertools import count

from annotation_store import build_judgement

from align.annotate.store import Vote

SEQS = count(1)


def build_vote(item: str, order: str, annotator: str = "ann", **more) -> Vote:
    """Build a vote; `order` as in `build_judgement`. `screen="10"` says that candidate 1 was shown first, then 0."""
    if "screen" in more:
        more["display_order"] = tuple(f"{item}-{k}" for k in more.pop("screen"))
    tiers = build_judgement(item, order).tiers
    return Vote(tiers, seq=next(SEQS), item=item, annotator=annotator, created_at="2026-01-01T00:00:00+00:00", **more)


def collect_candidate_ids(votes: list[Vote]) -> dict[str, tuple[str, ...]]:
    """Return the candidate ids of each item, by position."""
    return {vote.item: tuple(sorted(id for tier in vote.tiers for id in tier)) for vote in votes}
