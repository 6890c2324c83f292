"""Votes as a source of a data set: the pairs that training reads, ids under the project's key, and no trace of a
project after its erasure."""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import replace
from pathlib import Path

import pytest
from data_sets import build_data_set
from json_lines import write_rows
from stage_commands import Workshop
from vote_data import (
    SECRET,
    build_forget_command,
    dump_database,
    encode_pair_canonically,
    find_files_with,
    read_artifact_pairs,
)

from align.annotate.posteriors import load_soft_preferences
from align.annotate.store import Candidate, Judgement, Store
from align.annotate.store.vote_selection import DEFAULT_SELECTION
from align.core.errors import InputError
from align.core.types import Conversation, Message, Preference
from align.data.pairs import VoteSource, read_divided_preferences, read_pairs
from align.data.sets.ids import SHA256, read_id_kinds
from align.data.sets.published import load_data_set
from align.data.sets.source import load_vote_snapshot
from align.data.sources import DataSource
from align.data.trained_ids import find_store_key


def test_votes_are_the_pairs_that_training_reads_with_ids_under_the_key(
    vote_store: Store, store_url: str, words: list[str], tmp_path: Path
) -> None:
    folder, data, _ = build_data_set(tmp_path, *words)
    rows = read_artifact_pairs(folder)
    key = vote_store.key("greetings")
    assert key is not None
    votes = [row for row in rows if row["source"] == "greetings"]
    for row in rows:
        is_vote = row["source"] == "greetings"
        expected = (
            hmac.new(key, encode_pair_canonically(row), "sha256")
            if is_vote
            else hashlib.sha256(encode_pair_canonically(row))
        )
        assert row["content_id"] == expected.hexdigest()
        turns = [f"Message(role={m['role']!r}, content={m['content']!r})" for m in row["prompt"]]
        plain_hash = hashlib.sha256(f"({turns[0]},)".encode())
        question_hash = hmac.new(key, plain_hash.digest(), "sha256") if is_vote else plain_hash
        assert row["question_id"] == question_hash.hexdigest()
    data_set = load_data_set(folder / "artifact")
    pairs = [record for side in ("train", "test") for record in data_set.load_records(side)]
    expected_pairs = read_pairs(DataSource("annotations"), VoteSource(store_url, "greetings", DEFAULT_SELECTION))
    assert {p for p in pairs if isinstance(p, Preference) and p.group_id} == {*expected_pairs}
    assert len(votes) == len(expected_pairs) > 40
    source_by_name = {source["name"]: source for source in data["sources"]}
    fingerprint = hmac.new(key, b"fingerprint of the key", "sha256").hexdigest()[:16]
    expected = {"content_id": "hmac", "project": "greetings", "key_fingerprint": fingerprint}
    assert expected.items() <= source_by_name["greetings"].items()
    assert source_by_name["file"]["content_id"] == "sha256"
    manifest = json.loads((folder / "manifest.json").read_text())
    read_head = manifest["inputs"]["sources.greetings"]
    assert (read_head["project"], read_head["seq"]) == ("greetings", vote_store.head("greetings").seq)
    assert find_files_with(tmp_path / "runs", key.hex()) == []
    assert not any(key in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_vote_that_a_file_has_too_is_a_copy_and_one_question_is_on_one_side(
    vote_store: Store, words: list[str], tmp_path: Path
) -> None:
    rows = [{"prompt": f"What of day {i}?", "chosen": f"other {i}", "rejected": f"bad {i}"} for i in range(30)]
    first = next(iter(vote_store.items("greetings")))
    texts = [candidate.text for candidate in first.candidates]
    copied_vote = {"prompt": "What of day 0?", "chosen": texts[0], "rejected": texts[1], "rejected_ended": False}
    path = write_rows(tmp_path / "more.jsonl", [*rows, copied_vote])
    sources = f"stage.sources=[{{annotations: greetings}}, {{path: {path}, name: file}}]"
    folder, data, _ = build_data_set(tmp_path, words[0], sources, *words[2:])
    assert {source["name"]: source["counts"]["after_exact_dedup"] for source in data["sources"]}["file"] == 30
    assert data["found"]["shared_with_test"] == 0  # each question was on one side already
    sides: dict[str, set[str]] = {}
    for side in ("train", "test"):
        for record in load_data_set(folder / "artifact").load_records(side):
            assert isinstance(record, Preference)
            sides.setdefault(record.prompt[0].content, set()).add(side)
    assert {len(question_sides) for question_sides in sides.values()} == {1}
    assert {"train", "test"} == {side for question_sides in sides.values() for side in question_sides}


def test_votes_of_excluded_annotators_are_in_no_data_set(
    vote_store: Store, store_url: str, words: list[str], tmp_path: Path
) -> None:
    pseudonym = vote_store.pseudonym("greetings", "bob")
    folder, _, _ = build_data_set(tmp_path, *words, "data.exclude_annotators=[bob]")
    config = (folder / "config.yaml").read_text(encoding="utf-8")
    assert pseudonym in config
    assert "bob" not in config
    pairs = [row for row in read_artifact_pairs(folder) if row["source"] == "greetings"]
    by_ann = [vote for vote in vote_store.rankings("greetings") if vote.annotator != pseudonym]
    assert len(pairs) == sum(len(vote.pairs) for vote in by_ann)
    assert len(pairs) < sum(len(vote.pairs) for vote in vote_store.rankings("greetings"))


def test_pairs_of_votes_have_posteriors_if_labels_are_soft(
    vote_store: Store, store_url: str, words: list[str], tmp_path: Path
) -> None:
    sources = "stage.sources=[{annotations: greetings}]"
    folder, _, _ = build_data_set(tmp_path, words[0], sources, *words[2:], "data.soft_labels=true")
    soft = DataSource("manifest", str(folder / "artifact"), soft_labels=True)
    pairs = read_pairs(soft, VoteSource("", "greetings", DEFAULT_SELECTION))
    votes = VoteSource(store_url, "greetings", DEFAULT_SELECTION, load_pairs=load_soft_preferences)
    posteriors = {pair.id: pair.posterior for pair in read_pairs(DataSource("annotations"), votes)}
    assert len(pairs) > 30
    assert all(pair.posterior == posteriors[pair.id] for pair in pairs)
    hard, _, _ = build_data_set(tmp_path, words[0], sources, *words[2:])
    with pytest.raises(InputError, match=r"has no posterior.*data.soft_labels=true"):
        read_divided_preferences(
            replace(soft, path=str(hard / "artifact")), VoteSource("", "greetings", DEFAULT_SELECTION), 0.2, 0
        )


def test_simulated_votes_unknown_projects_and_other_keys_are_refused(
    vote_store: Store, words: list[str], tmp_path: Path
) -> None:
    item = vote_store.add_item(
        "greetings", "more", Conversation((Message("user", "?"),)), [Candidate("a"), Candidate("b")]
    )
    vote_store.record(
        "greetings", item, Judgement(((f"{item}-0",), (f"{item}-1",)), source="simulated"), annotator="vader", key="v"
    )
    shop = Workshop(tmp_path / "runs", tmp_path)
    shop.refuses(*words, says="data.allow_simulated=true")
    assert shop.run_command(*words, "data.allow_simulated=true") == 0, shop.output
    for sources, says in (
        ("[{annotations: nobody}]", "the store has no such project"),
        ("[{annotations: greetings, path: a.jsonl}]", "two kinds of them"),
        ("[{annotations: greetings, columns: {prompt: q}}]", "which only files have"),
        ("[{annotations: greetings, votes: 1}]", "is no key of a source"),
        ("[{annotations: ''}]", "is no project"),
    ):
        shop.refuses(words[0], f"stage.sources={sources}", *words[2:], says=says)


def test_votes_are_read_as_they_were_when_the_run_began(vote_store: Store, store_url: str) -> None:
    votes = load_vote_snapshot(store_url, "greetings", DEFAULT_SELECTION)
    before = [*votes.iter_pairs()]
    item = vote_store.add_item(
        "greetings", "late", Conversation((Message("user", "?"),)), [Candidate("a"), Candidate("b")]
    )
    vote_store.record("greetings", item, Judgement(((f"{item}-0",), (f"{item}-1",))), annotator="late", key="late")
    assert [*votes.iter_pairs()] == before
    assert len([*load_vote_snapshot(store_url, "greetings", DEFAULT_SELECTION).iter_pairs()]) == len(before) + 1
    assert [pair.number for pair in before] == [*range(1, len(before) + 1)]
    assert [*votes.iter_pairs(7)] == before[7:]  # a run that goes on
    assert repr(votes.key) not in repr(votes)
    assert votes.key.hex() not in repr(votes)


def test_an_erased_project_takes_its_key_along(
    vote_store: Store, store_url: str, words: list[str], tmp_path: Path
) -> None:
    """No file keeps the project's texts, and its ids cannot be matched with guessed rows."""
    key = vote_store.key("greetings")
    assert key is not None
    old, data, _ = build_data_set(tmp_path, *words, "run.name=votes")
    [kind] = {*read_id_kinds(data).values()} - {SHA256}
    assert find_store_key(store_url, kind) == key
    rows = read_artifact_pairs(old)
    guesses = [hashlib.sha256(encode_pair_canonically(row)).hexdigest() for row in rows if row["source"] == "greetings"]
    assert guesses
    assert find_files_with(old, *guesses) == []  # no file confirms a guessed text
    shop = Workshop(tmp_path / "runs", tmp_path)
    assert key.hex() in dump_database(store_url)
    erase = ["stage=annotate", "project=greetings", "stage.action=erase", "stage.whole=true", *words[2:4]]
    assert shop.run_command(*erase) == 0, shop.output
    assert "data/votes" in shop.output
    store_dump = dump_database(store_url)
    assert key.hex() not in store_dump
    assert SECRET not in store_dump
    assert "ann@example.org" not in store_dump
    if "sqlite" in store_url:
        assert find_files_with(tmp_path, key.hex()) == []
    vote_store.verify()
    assert find_store_key(store_url, kind) is None  # unknown from now on
    for write_again in (
        lambda: vote_store.add_item("greetings", "new", Conversation((Message("user", "?"),)), [Candidate("a")] * 2),
        lambda: build_data_set(tmp_path, *words, "run.name=more"),
    ):
        with pytest.raises((InputError, AssertionError), match="it was erased"):
            write_again()
    new, forgotten_data, _ = build_data_set(
        tmp_path, *build_forget_command(words, "votes", "stage.forget=erased", "run.name=left")
    )
    assert {row["source"] for row in read_artifact_pairs(new)} == {"file"}
    assert forgotten_data["replaces"]["count"] == len(rows) - 40
    assert find_files_with(tmp_path / "runs" / "data" / "votes", SECRET) == []
