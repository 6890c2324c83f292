"""The posterior of a pair follows the number and the ability of those who prefer an answer, and exports carry it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from annotation_store import add_question, build_store_url, record_ranking

from align.annotate import posteriors
from align.annotate.exchange.exporting import export_votes
from align.annotate.posteriors import compute_pair_posteriors
from align.annotate.store import Store

ATTENTIVE = ("ann", "bea", "cem")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Items that three attentive annotators rank alike and `coin` at random, and two items on which they differ."""
    draw = random.Random(0)
    with Store.open(build_store_url(tmp_path)) as store, store.transaction():
        for i in range(60):
            item = add_question(store, f"run/{i}", texts=("fine", "bad"))
            for name in ATTENTIVE:
                record_ranking(store, item, "0>1", name)
            record_ranking(store, item, draw.choice(("0>1", "1>0")), "coin")
        divided = add_question(store, "divided", texts=("fine", "bad"))
        record_ranking(store, divided, "0>1", "ann")
        record_ranking(store, divided, "1>0", "coin")
        tied = add_question(store, "tied")
        record_ranking(store, tied, "01>2", "bea")
        yield store


def find_item(store: Store, question: str) -> str:
    return next(item.id for item in store.items("p") if question in item.prompt.messages[0].content)


def test_the_posterior_follows_votes_and_abilities(store: Store) -> None:
    pairs = compute_pair_posteriors(store.rankings("p"))
    first = find_item(store, "run/0")
    divided = find_item(store, "divided")
    tied = find_item(store, "tied")
    assert pairs[first][f"{first}-0", f"{first}-1"] > 0.95
    assert 0.6 < pairs[divided][f"{divided}-0", f"{divided}-1"] < 0.95
    assert pairs[tied][f"{tied}-0", f"{tied}-1"] == pytest.approx(0.5, abs=0.02)
    assert pairs[tied][f"{tied}-0", f"{tied}-2"] > 0.6
    for orders in pairs.values():
        for (better, worse), probability in orders.items():
            assert probability + orders[worse, better] == pytest.approx(1)


def test_blocks_do_not_change_the_posterior(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = compute_pair_posteriors(store.rankings("p"))
    monkeypatch.setattr(posteriors, "BLOCK_SUBSETS", 40)
    pairs = compute_pair_posteriors(store.rankings("p"))
    assert pairs.keys() == expected.keys()
    for item, orders in pairs.items():
        assert orders == pytest.approx(expected[item], abs=1e-6)


def test_exported_pairs_carry_the_posterior(store: Store, tmp_path: Path) -> None:
    pairs = compute_pair_posteriors(store.rankings("p"))
    (tmp_path / "export").mkdir()
    export_votes(store, "p", tmp_path / "export")
    rows = [json.loads(line) for line in (tmp_path / "export" / "preferences.jsonl").read_text("utf-8").splitlines()]
    assert rows
    for row in rows:
        better, worse = row["id"].partition(":")[2].split(">")
        assert row["posterior"] == pytest.approx(pairs[row["item"]][better, worse], abs=1e-4)
    implicit = [json.loads(line) for line in (tmp_path / "export" / "implicit.jsonl").read_text("utf-8").splitlines()]
    assert [row["posterior"] for row in implicit] == [row["posterior"] for row in rows]
