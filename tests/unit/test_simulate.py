"""The simulated annotator: Bradley–Terry in the score gap, calibrated, repeatable, and marked as simulated."""

import math
import random
from collections import Counter
from itertools import combinations

import pytest
import torch

from align.annotate.simulate import calibrate_slope, draw_tiers, simulate_annotator
from align.annotate.store import Candidate, Store
from align.annotate.store.erasure import ANNOTATOR, erase_target, find_erasure_target
from align.annotate.store.preference_pairs import load_preferences
from align.annotate.store.vote_selection import VoteSelection
from align.core.errors import InputError
from align.core.types import Conversation, Message

torch.set_num_threads(1)


class Number:
    """A scorer whose score is the number that the answer consists of."""

    name = "number"

    def score(self, conversations):
        return torch.tensor([float(c.messages[-1].content) for c in conversations])


@pytest.fixture
def store(tmp_path):
    with Store.open(f"sqlite:///{tmp_path / 'annotations.db'}") as store:
        yield store


def fill(store: Store, items: int, first: int = 0) -> None:
    """Add items of four candidates in quarters from -1 to 1, so that some tie."""
    with store.transaction():
        for i in range(first, items):
            rng = random.Random(i)
            texts = [str(rng.randint(-4, 4) / 4) for _ in range(4)]
            prompt = Conversation((Message("user", f"question {i}"),))
            store.add_item("p", f"run/{i}", prompt, [Candidate(text) for text in texts])


def test_votes_name_the_scorer_that_they_were_made_by(store):
    fill(store, 3)
    simulate_annotator(store, "p", Number(), seed=0)
    assert {(r.source, r.scorer) for r in store.rankings("p")} == {("simulated", "number")}
    assert {p.scorer for p in load_preferences(store, "p", VoteSelection(allow_simulated=True))} == {"number"}


def read_tiers(store: Store) -> dict[str, tuple]:
    return {r.item: r.tiers for r in store.rankings("p")}


def test_calibration_inverts_the_sigmoid():
    # One untied pair: sigmoid(slope · 0.5) = 0.75 at slope = ln 3 / 0.5.
    assert calibrate_slope([[0.5, 0.0]]) == pytest.approx(2 * math.log(3), rel=1e-12)
    # The tied pair does not count; the order of the candidates does not either.
    assert calibrate_slope([[0.0, 0.5, 0.5][:2], [7, 7]]) == calibrate_slope([[0.5, 0.0]])
    assert calibrate_slope([[0.0, 1e-4]], 0.9) == pytest.approx(math.log(9) * 1e4, rel=1e-9)


def test_calibration_averages_over_all_untied_pairs():
    scores = [[0.0, 0.1, 0.9], [0.3, 0.3, -0.6]]
    slope = calibrate_slope(scores, 0.8)
    gaps = [0.1, 0.9, 0.8, 0.9, 0.9]
    assert sum(1 / (1 + math.exp(-slope * gap)) for gap in gaps) / 5 == pytest.approx(0.8, abs=1e-12)


@pytest.mark.parametrize(("scores", "agreement"), [([[1, 1], [2, 2]], 0.75), ([[0, 1]], 0.5), ([[0, 1]], 1.0)])
def test_calibration_refuses_what_no_slope_can_do(scores, agreement):
    with pytest.raises(InputError):
        calibrate_slope(scores, agreement)


def test_pairwise_marginals_are_bradley_terry():
    # 20,000 rankings of four: the standard error of a share is at most 0.0036; 4 of them are allowed.
    utilities = {"a": 0.0, "b": 0.6, "c": 1.8, "d": 0.6}
    rng = random.Random(0)
    n = 20_000
    above: Counter = Counter()
    for _ in range(n):
        tier_of = {id: t for t, tier in enumerate(draw_tiers(utilities, rng)) for id in tier}
        assert tier_of["b"] == tier_of["d"]  # equal utilities share one draw
        above.update((x, y) for x in utilities for y in utilities if tier_of[x] < tier_of[y])
    for x, y in combinations("abcd", 2):
        if utilities[x] != utilities[y]:
            expected = 1 / (1 + math.exp(utilities[y] - utilities[x]))
            assert above[x, y] / n == pytest.approx(expected, abs=4 * 0.0036)


def test_the_order_of_the_candidates_does_not_matter():
    utilities = {"a": 0.0, "b": 0.6, "c": 1.8, "d": 0.6}
    backwards = dict(reversed(utilities.items()))
    assert draw_tiers(utilities, random.Random(5)) == draw_tiers(backwards, random.Random(5))


def test_agreement_is_what_was_asked_for_and_grows_with_the_gap(store):
    fill(store, 800)
    report = simulate_annotator(store, "p", Number(), seed=0)
    # About 4,250 untied pairs, correlated within an item: a standard error near 0.008.
    assert report.agreement == pytest.approx(0.75, abs=0.02)
    assert (report.added, report.items, report.pairs) == (800, 800, 4800)
    assert report.tie_share == pytest.approx(1 / 9, abs=0.02)  # two of nine values equal

    text = {c.id: float(c.text) for item in store.items("p") for c in item.candidates}
    right: Counter = Counter()
    total: Counter = Counter()
    for ranking in store.rankings("p"):
        tier_of = {id: t for t, tier in enumerate(ranking.tiers) for id in tier}
        for a, b in combinations(tier_of, 2):
            gap = abs(text[a] - text[b])
            third = 0 if gap == 0 else 1 if gap <= 0.5 else 2 if gap <= 1 else 3
            total[third] += 1
            right[third] += (tier_of[a] < tier_of[b]) == (text[a] > text[b])
            assert (gap == 0) == (tier_of[a] == tier_of[b])
    shares = [right[third] / total[third] for third in (1, 2, 3)]
    assert shares == sorted(shares)
    assert shares[0] < 0.7
    assert shares[2] > 0.85


def test_a_position_bias_favours_the_answer_shown_first(store):
    with store.transaction():
        for i in range(2000):
            prompt = Conversation((Message("user", f"question {i}"),))
            store.add_item("p", f"run/{i}", prompt, [Candidate("1 "), Candidate("1"), Candidate("0")])
    summary = simulate_annotator(store, "p", Number(), seed=0, position_bias=1.0)
    with_bias = Counter()
    for ranking in store.rankings("p"):
        first = random.Random(f"0/{ranking.item}/first").choice([f"{ranking.item}-{k}" for k in range(3)])
        tier_of = {id: tier for tier, ids in enumerate(ranking.tiers) for id in ids}
        equal = {f"{ranking.item}-0": f"{ranking.item}-1", f"{ranking.item}-1": f"{ranking.item}-0"}.get(first)
        if equal is None:
            assert tier_of[f"{ranking.item}-0"] == tier_of[f"{ranking.item}-1"]
        else:
            with_bias[tier_of[first] < tier_of[equal]] += 1
    # sigmoid(1) = 0.731, with a standard error of 0.012 over about 1,333 items.
    assert with_bias[True] / with_bias.total() == pytest.approx(0.731, abs=0.05)
    assert summary.annotator == "simulated/number/0.75/0/bias 1.0"


def test_everything_it_says_is_marked_simulated(store):
    fill(store, 5)
    report = simulate_annotator(store, "p", Number(), seed=0)
    assert {r.source for r in store.rankings("p")} == {"simulated"}
    assert report.annotator == "simulated/number/0.75/0"
    store.verify()


def test_interrupted_and_continued_it_ranks_as_if_uninterrupted(store, tmp_path, monkeypatch):
    monkeypatch.setattr("align.annotate.simulate.COMMIT_EVERY", 4)
    fill(store, 20)
    record = store.record
    calls = []

    def fail_at_tenth_call(*args, **kwargs):
        calls.append(args)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return record(*args, **kwargs)

    monkeypatch.setattr(store, "record", fail_at_tenth_call)
    with pytest.raises(KeyboardInterrupt):
        simulate_annotator(store, "p", Number(), seed=3)
    assert len(store.rankings("p")) == 8  # two whole batches
    continued = simulate_annotator(store, "p", Number(), seed=3)

    with Store.open(f"sqlite:///{tmp_path / 'other.db'}") as other_store:
        fill(other_store, 20)
        straight = simulate_annotator(other_store, "p", Number(), seed=3)
        assert read_tiers(store) == read_tiers(other_store)
    assert (continued.added, straight.added) == (12, 20)
    assert (continued.agreement, continued.slope) == (straight.agreement, straight.slope)

    repeated = simulate_annotator(store, "p", Number(), seed=3)
    assert (repeated.added, repeated.items, repeated.agreement) == (0, 20, straight.agreement)


def test_another_seed_is_another_annotator(store):
    fill(store, 20)
    simulate_annotator(store, "p", Number(), seed=0)
    first = read_tiers(store)
    report = simulate_annotator(store, "p", Number(), seed=1)
    assert (report.added, report.items) == (20, 20)
    assert len(store.rankings("p")) == 40
    assert read_tiers(store) != first


def test_an_items_noise_does_not_depend_on_the_others(store, tmp_path, monkeypatch):
    monkeypatch.setattr("align.annotate.simulate.calibrate_slope", lambda scores, agreement: 1.0)
    fill(store, 6)
    simulate_annotator(store, "p", Number(), seed=0)
    with Store.open(f"sqlite:///{tmp_path / 'other.db'}") as other_store:
        fill(other_store, 6, first=3)
        simulate_annotator(other_store, "p", Number(), seed=0)
        other_tiers = read_tiers(other_store)
    assert len(other_tiers) == 3
    assert other_tiers == {item: tiers for item, tiers in read_tiers(store).items() if item in other_tiers}


def test_an_unknown_project_is_refused(store):
    with pytest.raises(InputError, match="no such project"):
        simulate_annotator(store, "nope", Number(), seed=0)


def test_an_erased_simulated_annotator_leaves_no_identity_in_the_store(tmp_path):
    """Every file of the store is searched, including the ledger's keys and the log."""
    with Store.open(f"sqlite:///{tmp_path / 'annotations.db'}") as store:
        fill(store, 30)
        erased_annotator = simulate_annotator(store, "p", Number(), seed=0).annotator
        other_annotator = simulate_annotator(store, "p", Number(), seed=1).annotator
        assert simulate_annotator(store, "p", Number(), seed=0).added == 0  # simulating again adds nothing
        assert erased_annotator.encode() in b"".join(path.read_bytes() for path in tmp_path.iterdir())
        erase_target(store, find_erasure_target(store, "p", ANNOTATOR, erased_annotator))
        store.verify()
    store_bytes = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert erased_annotator.encode() not in store_bytes
    assert other_annotator.encode() in store_bytes
