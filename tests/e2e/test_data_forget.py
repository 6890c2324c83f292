"""Forgotten rows of a data set: no file keeps their text, and a kill at any moment leaves one complete data set."""

from __future__ import annotations

import hashlib
import json
import random
import signal
from collections import Counter
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from data_sets import build_data_set, build_question_row, draw_sentence
from json_lines import write_rows
from stage_commands import Workshop, run_in_fork
from vote_data import (
    SECRET,
    build_forget_command,
    compute_merkle_leaves,
    compute_merkle_root,
    find_files_with,
    find_secret_ids,
    read_artifact_pairs,
)

from align.annotate.store import Candidate, Store
from align.core.errors import CorruptFile
from align.core.types import Conversation, Message
from align.data.sets.published import build_row_proof, load_data_set, verify_row_proof


def test_forgotten_rows_are_gone_and_the_others_are_where_they_were(
    vote_store: Store, words: list[str], tmp_path: Path, tiny_model: Path
) -> None:
    repeat_settings = ("stage.mix.repeat=2", "stage.mix.total=100")  # some rows appear twice
    old, old_data, _ = build_data_set(tmp_path, *words, *repeat_settings, "run.name=old")
    old_leaves = {side: compute_merkle_leaves(old / "artifact", side) for side in ("train", "test")}
    ids = find_secret_ids(old)
    assert ids
    shop = Workshop(tmp_path / "runs", tmp_path, *words[2:4])
    reward = [
        "stage=reward",
        "init=base",
        "model=hub",
        f"model.path={tiny_model}",
        "method=lora",
        "data=manifest",
        "stage.epochs=1",
    ]
    assert shop.status(*reward, "data.path=data:old", "run.name=saw") == 0, shop.output
    trained_rows = pq.read_table(tmp_path / "runs" / "reward" / "saw" / "trained_ids.parquet").to_pylist()
    published = {row["content_id"]: row["source"] for row in read_artifact_pairs(old)}
    for row in trained_rows:
        assert row["project"] == (None if published[row["content_id"].hex()] == "file" else "greetings")

    listing = f"stage.forget=[{', '.join(ids)}]"
    new, new_data, stdout = build_data_set(tmp_path, *build_forget_command(words, "old", listing, "run.name=new"))
    assert "reward/saw" in stdout
    assert new_data["replaces"].items() >= {"root": old_data["root"], "count": len({*ids})}.items()
    assert find_files_with(tmp_path / "runs" / "data", SECRET, *ids) == []
    remaining_files = {str(path.relative_to(old)) for path in old.rglob("*") if path.is_file()}
    run_files = {"manifest.json", "config.yaml", "metrics.json", "metrics.jsonl", "timing.jsonl"}
    assert remaining_files == {*run_files, "artifact/data.json", "artifact/replaced.json"}
    roots = []
    for side, leaves in old_leaves.items():
        new_leaves = compute_merkle_leaves(new / "artifact", side)
        changed = [(a, b) for a, b in zip(leaves, new_leaves, strict=True) if a != b]
        assert {a[:32].hex() for a, _ in changed} <= {*ids}
        assert all(len(b) == 32 for _, b in changed)
        roots.append(compute_merkle_root(new_leaves))
        assert roots[-1].hex() == new_data["splits"][side]["root"]
    assert compute_merkle_root(roots).hex() == new_data["root"] != old_data["root"]
    copies = Counter(
        row["content_id"] for row in read_artifact_pairs(new)
    )  # which rows are repeated follows from the store's key
    kept_ids = sorted(copies)
    assert compute_merkle_root([bytes.fromhex(id) for id in kept_ids]).hex() == new_data["ids_root"]

    for command in (
        [*reward, "data.path=data:old", "run.name=again"],
        build_forget_command(words, "old", f"stage.forget=[{kept_ids[0]}]"),
    ):
        shop.refuses(*command, says="was replaced by data:new")
    assert shop.run_command(*words, *repeat_settings, "run.name=old") == 2  # the command that made it
    assert "was replaced by data:new" in shop.output
    assert shop.status(*reward, "data.path=data:new", "run.name=unknowing") == 0, shop.output
    manifest = json.loads((tmp_path / "runs" / "reward" / "unknowing" / "manifest.json").read_text())
    assert manifest["inputs"]["data"]["root"] == new_data["root"]
    loaded = datasets.load_dataset(str(new / "artifact"), cache_dir=str(tmp_path / "cache"))
    assert {side: len(loaded[side]) for side in loaded} == {s: new_data["splits"][s]["rows"] for s in ("train", "test")}

    assert (
        "finished already" in build_data_set(tmp_path, *build_forget_command(words, "old", listing, "run.name=new"))[2]
    )
    shop.refuses(*build_forget_command(words, "new", listing), says="belong to no row")
    newest, newest_data, stdout = build_data_set(
        tmp_path, *build_forget_command(words, "new", f"stage.forget=[{kept_ids[0]}]", "run.name=newest")
    )
    assert "reward/saw" in stdout
    assert "reward/unknowing" in stdout
    assert newest_data["replaces"]["replaces"]["root"] == old_data["root"]
    forgotten_count = sum(len(newest_data["splits"][side].get("forgotten", [])) for side in ("train", "test"))
    assert forgotten_count == len(ids) + copies[kept_ids[0]]
    assert load_data_set(newest / "artifact").load_records("train")


def test_what_the_store_erased_is_forgotten(
    vote_store: Store, store_url: str, words: list[str], tmp_path: Path
) -> None:
    old, _, _ = build_data_set(tmp_path, *words, "run.name=old")
    shop = Workshop(tmp_path / "runs", tmp_path)
    shop.refuses(*build_forget_command(words, "old", "stage.forget=erased"), says="There is nothing to forget")
    item = [item.id for item in vote_store.items("greetings")][4]
    vote = next(vote for vote in vote_store.rankings("greetings") if vote.item != item)
    erase = ["stage=annotate", "project=greetings", "stage.action=erase", *words[2:4]]
    assert shop.run_command(*erase, f"stage.item={item}") == 0, shop.output
    assert "data/old" in shop.output
    vote_store.retract("greetings", vote.seq)
    old_ids = {row["content_id"] for row in read_artifact_pairs(old)}
    erased_ids = [row["content_id"] for row in read_artifact_pairs(old) if row["group_id"] == item]
    erased_ids += [
        row["content_id"] for row in read_artifact_pairs(old) if (row["id"] or "").startswith(f"{vote.seq}:")
    ]
    new, new_data, _ = build_data_set(
        tmp_path, *build_forget_command(words, "old", "stage.forget=erased", "run.name=new")
    )
    assert old_ids - {*erased_ids} == {row["content_id"] for row in read_artifact_pairs(new)}
    assert new_data["replaces"]["count"] == len(erased_ids)
    assert find_files_with(tmp_path / "runs" / "data", SECRET) == []
    with Store.open(f"sqlite:///{tmp_path / 'other.db'}") as other_store:  # a different project with the same name
        item_id = other_store.add_item(
            "greetings", "x", Conversation((Message("user", "?"),)), [Candidate("a"), Candidate("b")]
        )
        assert item_id
    other_words = [
        word if "store.url" not in word else f"store.url=sqlite:///{tmp_path / 'other.db'}" for word in words
    ]
    shop.refuses(
        *build_forget_command(other_words, "new", "stage.forget=erased"), says="a different project with the same name"
    )


def test_killed_at_any_moment_one_of_the_two_is_whole(tmp_path: Path) -> None:
    """After SIGKILL at random moments, the old data set is readable, or the same command ends with the new one."""
    rows = [
        build_question_row(f"{SECRET}?" if i == 7 else f"question {i}?", draw_sentence(random.Random(i), i))
        for i in range(400)
    ]
    arguments = [
        "stage=data",
        f"stage.sources=[{write_rows(tmp_path / 'rows.jsonl', rows)}]",
        f"run.root={tmp_path / 'runs'}",
    ]
    old, _, _ = build_data_set(tmp_path, *arguments, "run.name=old", "stage.duplicates.near=null")
    old_records = load_data_set(old / "artifact").load_records("train")
    [id] = find_secret_ids(old)
    command = build_forget_command(arguments, "old", f"stage.forget=[{id}]", "run.name=new")
    draw = random.Random(0)
    kills = 0
    new = tmp_path / "runs" / "data" / "new"
    while True:
        step, times = (draw.choice([*STEPS]), draw.randrange(12)) if kills else ("write_json", 0)
        status = run_in_fork(command, deadly=STEPS[step], times=times)
        replaced = (old / "artifact" / "replaced.json").is_file()
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
        assert kills < 60
        if replaced:
            assert load_data_set(new / "artifact").load_records("train")
        else:
            assert load_data_set(old / "artifact").load_records("train") == old_records
    assert replaced
    assert kills
    assert find_files_with(tmp_path / "runs", SECRET, id) == []
    assert not [*new.glob(".*part*")]
    expected_records = [record for record in old_records if SECRET not in str(record)]
    assert load_data_set(new / "artifact").load_records("train") == expected_records


STEPS = {
    "write_json": ["align.data.sets.forget.write_json"],
    "unlink": ["pathlib.Path.unlink"],
    "rmtree": ["align.data.sets.forget.shutil.rmtree"],
    "replace": ["os.replace", "pathlib.Path.replace"],
}
"""File system calls of forgetting, at which it is killed."""


def test_a_proof_shows_a_row_to_somebody_who_has_the_root_alone(
    vote_store: Store, words: list[str], tmp_path: Path
) -> None:
    folder, data, _ = build_data_set(tmp_path, *words)
    data_set = load_data_set(folder / "artifact")
    for side in ("train", "test"):
        for row in [row for table in data_set.iter_tables(side) for row in table.to_pylist()]:
            id = bytes.fromhex(row["content_id"])
            proof = build_row_proof(data_set, side, id)
            assert verify_row_proof(proof, id, data["root"])
            assert not verify_row_proof(proof, bytes(32), data["root"])
            assert not verify_row_proof(proof, id, data["ids_root"])
    with pytest.raises(ValueError, match="not in list"):
        build_row_proof(data_set, "train", bytes(32))


def test_what_cannot_be_forgotten(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [build_question_row(f"question {i}?", f"answer {i}") for i in range(30)])
    arguments = ["stage=data", f"stage.sources=[{path}]", f"run.root={tmp_path / 'runs'}"]
    old, _, _ = build_data_set(tmp_path, *arguments, "run.name=old")
    for settings, says in (
        (["stage.forget=[abc]"], "is no content id"),
        (["stage.forget=nowhere.txt"], "is neither an id nor a file of ids"),
        (["stage.forget=erased"], "none of its sources is an annotation project"),
        ([f"stage.forget=[{'0' * 63}1]"], "1 of 1 ids belong to no row"),
        ([], "goes with stage.action=forget, and with no other action"),
        (["stage.forget=erased", "stage.clean=[unicode]"], "is not read by stage.action=forget"),
    ):
        Workshop(tmp_path / "runs", tmp_path).refuses(*build_forget_command(arguments, "old", *settings), says=says)
    assert [path.name for path in (tmp_path / "runs" / "data").iterdir()] == ["old"]
    assert load_data_set(old / "artifact").load_records("train")


def test_no_row_is_left_out_by_calling_its_leaf_a_tombstone(tmp_path: Path) -> None:
    """The roots match, but a row's leaf is longer than a tombstone, and is refused."""
    path = write_rows(tmp_path / "rows.jsonl", [build_question_row(f"question {i}?", f"answer {i}") for i in range(30)])
    folder, data, _ = build_data_set(tmp_path, "stage=data", f"stage.sources=[{path}]", f"run.root={tmp_path / 'runs'}")
    artifact = folder / "artifact"
    [shard] = artifact.glob("train-*.parquet")
    hidden_leaf = compute_merkle_leaves(artifact, "train")[0]
    table = pq.read_table(shard)
    pq.write_table(table.slice(1), shard)
    data["splits"]["train"]["forgotten"] = [[0, hidden_leaf.hex()]]
    data["shards"][shard.name] = hashlib.sha256(shard.read_bytes()).hexdigest()
    (artifact / "data.json").write_text(json.dumps(data))
    assert compute_merkle_root(compute_merkle_leaves(artifact, "train")).hex() == data["splits"]["train"]["root"]
    with pytest.raises(CorruptFile, match="an invalid tombstone"):
        load_data_set(artifact).load_records("train")
