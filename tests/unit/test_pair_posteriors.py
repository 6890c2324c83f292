"""Soft labels of pairs: read from files and votes, kept in data sets, and refused where they are missing or wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from annotation_store import add_question, build_store_url, record_ranking

from align.annotate.posteriors import compute_pair_posteriors, load_soft_preferences
from align.annotate.store import Store
from align.annotate.store.preference_pairs import load_preferences, parse_candidate_ids
from align.annotate.store.vote_selection import DEFAULT_SELECTION, VoteSelection
from align.core.errors import InputError
from align.core.types import Message, Preference
from align.data.pairs import TokenizedPair, VoteSource, read_divided_preferences, read_pairs, smooth_labels
from align.data.read.preferences import write_preferences
from align.data.read.records import read_preferences
from align.data.sets.record_columns import columns_to_records, records_to_columns
from align.data.sources import DataSource

NO_VOTES = VoteSource("", "p", DEFAULT_SELECTION)


def build_pair(posterior: float | None, i: int = 0) -> Preference:
    prompt = (Message("user", f"Number {i}?"),)
    chosen, rejected = ((Message("assistant", text),) for text in ("yes", "no"))
    return Preference(prompt, chosen, rejected, id=f"p{i}", source="s", posterior=posterior)


def write_pairs(folder: Path, *posteriors: float | None) -> str:
    path = folder / "pairs.jsonl"
    write_preferences(path, [build_pair(posterior, i) for i, posterior in enumerate(posteriors)])
    return str(path)


def test_a_file_keeps_posteriors(tmp_path: Path) -> None:
    pairs = read_preferences(write_pairs(tmp_path, 0.25, None, 1.0), "data.path", False)
    assert [pair.posterior for pair in pairs] == [0.25, None, 1.0]
    table = tmp_path / "pairs.csv"
    table.write_text("prompt,chosen,rejected,posterior\nWhy?,because,no,0.75\nHow?,so,no,\n", encoding="utf-8")
    assert [pair.posterior for pair in read_preferences(str(table), "data.path", False)] == [0.75, None]


def test_the_columns_of_a_data_set_keep_posteriors() -> None:
    pairs = [build_pair(0.3), build_pair(None, 1)]
    table = pa.table(records_to_columns("preferences", pairs))
    assert columns_to_records("preferences", table, [pair.id for pair in pairs]) == pairs


@pytest.mark.parametrize("value", ["1.5", "-0.1", '"0.5"', "true", "NaN"])
def test_a_posterior_that_is_no_probability_is_refused(value: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(f'{{"prompt": "?", "chosen": "a", "rejected": "b", "posterior": {value}}}\n', encoding="utf-8")
    with pytest.raises(
        InputError, match=r"posterior=.*: not a probability from 0 to 1\. .*data\.metadata=\[posterior\]"
    ):
        read_preferences(str(path), "data.path", False)


def test_a_posterior_of_several_pairs_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    row = {"prompt": "?", "chosen": ["a", "c"], "rejected": ["b"], "posterior": 0.7}
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"posterior=0.7: one number for several pairs"):
        read_preferences(str(path), "data.path", False)


def test_a_posterior_of_another_shape_stays_metadata(tmp_path: Path) -> None:
    """A row of two answers and a verdict does not say of which order its `posterior` would be."""
    path = tmp_path / "judged.jsonl"
    row = {"prompt": "?", "response_a": "x", "response_b": "y", "winner": "b", "posterior": "of the annotator"}
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    (pair,) = read_preferences(str(path), "data.path", False)
    assert pair.posterior is None


def test_only_soft_labels_reach_the_tokenized_pairs(tmp_path: Path) -> None:
    path = write_pairs(tmp_path, *([0.25, 0.9] * 20))
    hard = read_divided_preferences(DataSource("files", path), NO_VOTES, 0.2, 0)
    assert {pair.posterior for split in hard for pair in split} == {None}
    soft = read_divided_preferences(DataSource("files", path, soft_labels=True), NO_VOTES, 0.2, 0)
    assert {pair.posterior for pair in soft.train} == {pair.posterior for pair in soft.test} == {0.25, 0.9}


def test_a_pair_without_a_posterior_is_refused(tmp_path: Path) -> None:
    path = write_pairs(tmp_path, *([0.25] * 20), None)
    with pytest.raises(InputError, match=r"data.soft_labels=True: pair p20 has no posterior"):
        read_divided_preferences(DataSource("files", path, soft_labels=True), NO_VOTES, 0.2, 0)


def test_pairs_to_measure_on_need_posteriors_too(tmp_path: Path) -> None:
    path = write_pairs(tmp_path, *([0.25] * 20))
    held_out = tmp_path / "held_out.jsonl"
    write_preferences(held_out, [build_pair(None, 99)])
    data = DataSource("files", path, eval_path=str(held_out), soft_labels=True)
    with pytest.raises(InputError, match=r"pair p99 has no posterior.*also in data.eval_path"):
        read_divided_preferences(data, NO_VOTES, 0.2, 0)


def test_one_vote_an_item_says_less_than_three_that_agree(tmp_path: Path) -> None:
    ranges = []
    for names in (("ann",), ("ann", "bea", "cem")):
        with Store.open(build_store_url(tmp_path / str(len(names)))) as store:
            for i in range(30):
                item = add_question(store, f"run/{i}", texts=("fine", "bad"))
                for name in names:
                    record_ranking(store, item, "0>1" if i % 2 else "1>0", name)
            posteriors = [pair.posterior or 0.0 for pair in load_soft_preferences(store, "p")]
        ranges.append((round(min(posteriors), 1), round(max(posteriors), 2)))
    (single_low, single_high), (agreed_low, _) = ranges
    assert 0.65 <= single_low <= single_high <= 0.76
    assert agreed_low >= 0.99


def test_smoothing_swaps_a_share_of_the_labels() -> None:
    pairs = [TokenizedPair([1], [2], label=label) for label in (1.0, 0.7)]
    assert [pair.label for pair in smooth_labels(pairs, 0.1)] == pytest.approx([0.9, 0.9 * 0.7 + 0.1 * 0.3])
    assert smooth_labels(pairs, 0.0) == pairs


def test_votes_become_pairs_with_posteriors(tmp_path: Path) -> None:
    url = build_store_url(tmp_path)
    with Store.open(url) as store:
        for i in range(12):
            item = add_question(store, f"run/{i}", texts=("fine", "bad", "worse"))
            for name in ("ann", "bea"):
                record_ranking(store, item, "0>1>2", name)
            record_ranking(store, item, "2>1>0", "cem")
        pairs = load_soft_preferences(store, "p")
        assert [pair.id for pair in pairs] == [pair.id for pair in load_preferences(store, "p")]
        posteriors = compute_pair_posteriors(store.rankings("p"))
        without_cem = load_soft_preferences(store, "p", VoteSelection(exclude_annotators=("cem",)))
    for pair in pairs:
        assert pair.posterior == posteriors[pair.group_id][parse_candidate_ids(pair)]
    by_text: dict[tuple[str, str], set[float | None]] = {}
    for pair in pairs:
        by_text.setdefault((pair.chosen[0].content, pair.rejected[0].content), set()).add(pair.posterior)
    assert all(value is not None and value > 0.5 for value in by_text["fine", "worse"])
    assert all(value is not None and value < 0.5 for value in by_text["worse", "fine"])
    assert len(without_cem) == 2 * len(pairs) / 3
    assert all(pair.posterior is not None and pair.posterior > 0.5 for pair in without_cem)
    soft_votes = VoteSource(url, "p", DEFAULT_SELECTION, load_pairs=load_soft_preferences)
    assert read_pairs(DataSource("annotations", soft_labels=True), soft_votes) == pairs
    votes = VoteSource(url, "p", DEFAULT_SELECTION)
    assert {pair.posterior for pair in read_pairs(DataSource("annotations"), votes)} == {None}
