"""Rows of a data set forgotten: nothing left of what was to go, and no half of anything whatever kills it."""

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
from data_of_votes import (
    SECRET,
    files_with,
    forget,
    leaves_by_hand,
    root_by_hand,
    rows_of,
    secret_rows,
)
from data_sets import chat, made, sentence, write
from workshop import Workshop, in_a_fork

from align.annotate.store import Candidate, Store
from align.core.errors import CorruptFile
from align.core.types import Conversation, Message
from align.data.sets.published import build_row_proof, load_data_set, verify_row_proof


def test_forgotten_rows_are_gone_and_the_others_are_where_they_were(
    vote_store: Store, words: list[str], tmp_path: Path, tiny_model: Path
) -> None:
    again = ("stage.mix.repeat=2", "stage.mix.total=100")  # rows that are seen twice
    old, before, _ = made(tmp_path, *words, *again, "run.name=old")
    was = {side: leaves_by_hand(old / "artifact", side) for side in ("train", "test")}
    ids = secret_rows(old)
    assert ids
    shop = Workshop(tmp_path / "runs", tmp_path, *words[2:4])
    reward = [
        "stage=reward", "init=base", "model=hub", f"model.path={tiny_model}", "method=lora", "data=manifest",
        "stage.epochs=1",
    ]  # fmt: skip
    assert shop.status(*reward, "data.path=data:old", "run.name=saw") == 0, shop.said
    given = pq.read_table(tmp_path / "runs" / "reward" / "saw" / "trained_ids.parquet").to_pylist()
    published = {row["content_id"]: row["source"] for row in rows_of(old)}
    for row in given:
        assert row["project"] == (None if published[row["content_id"].hex()] == "file" else "greetings")

    listing = f"stage.forget=[{', '.join(ids)}]"
    new, after, said = made(tmp_path, *forget(words, "old", listing, "run.name=new"))
    assert "reward/saw" in said
    assert after["replaces"].items() >= {"root": before["root"], "count": len({*ids})}.items()
    assert files_with(tmp_path / "runs" / "data", SECRET, *ids) == []
    left = {str(path.relative_to(old)) for path in old.rglob("*") if path.is_file()}
    of_run = {"manifest.json", "config.yaml", "metrics.json", "metrics.jsonl", "timing.jsonl"}
    assert left == {*of_run, "artifact/data.json", "artifact/replaced.json"}
    roots = []
    for side, leaves in was.items():
        now = leaves_by_hand(new / "artifact", side)
        changed = [(a, b) for a, b in zip(leaves, now, strict=True) if a != b]
        assert {a[:32].hex() for a, _ in changed} <= {*ids}
        assert all(len(b) == 32 for _, b in changed)
        roots.append(root_by_hand(now))
        assert roots[-1].hex() == after["splits"][side]["root"]
    assert root_by_hand(roots).hex() == after["root"] != before["root"]
    copies = Counter(row["content_id"] for row in rows_of(new))  # which rows are repeated follows from the store's key
    kept = sorted(copies)
    assert root_by_hand([bytes.fromhex(id) for id in kept]).hex() == after["ids_root"]

    for line in ([*reward, "data.path=data:old", "run.name=again"], forget(words, "old", f"stage.forget=[{kept[0]}]")):
        shop.refuses(*line, says="was replaced by data:new")
    assert shop.ended(*words, *again, "run.name=old") == 2  # the very command that made it
    assert "was replaced by data:new" in shop.said
    assert shop.status(*reward, "data.path=data:new", "run.name=unknowing") == 0, shop.said
    manifest = json.loads((tmp_path / "runs" / "reward" / "unknowing" / "manifest.json").read_text())
    assert manifest["inputs"]["data"]["root"] == after["root"]
    found = datasets.load_dataset(str(new / "artifact"), cache_dir=str(tmp_path / "cache"))
    assert {side: len(found[side]) for side in found} == {s: after["splits"][s]["rows"] for s in ("train", "test")}

    assert "finished already" in made(tmp_path, *forget(words, "old", listing, "run.name=new"))[2]
    shop.refuses(*forget(words, "new", listing), says="of no row")
    newest, last, said = made(tmp_path, *forget(words, "new", f"stage.forget=[{kept[0]}]", "run.name=newest"))
    assert "reward/saw" in said
    assert "reward/unknowing" in said
    assert last["replaces"]["replaces"]["root"] == before["root"]
    buried = sum(len(last["splits"][side].get("forgotten", [])) for side in ("train", "test"))
    assert buried == len(ids) + copies[kept[0]]
    assert load_data_set(newest / "artifact").records("train")


def test_what_the_store_erased_is_forgotten(
    vote_store: Store, store_url: str, words: list[str], tmp_path: Path
) -> None:
    old, _, _ = made(tmp_path, *words, "run.name=old")
    shop = Workshop(tmp_path / "runs", tmp_path)
    shop.refuses(*forget(words, "old", "stage.forget=erased"), says="There is nothing to forget")
    item = [item.id for item in vote_store.items("greetings")][4]
    vote = next(vote for vote in vote_store.rankings("greetings") if vote.item != item)
    erase = ["stage=annotate", "project=greetings", "stage.action=erase", *words[2:4]]
    assert shop.ended(*erase, f"stage.item={item}") == 0, shop.said
    assert "data/old" in shop.said
    vote_store.retract("greetings", vote.seq)
    kept = {row["content_id"] for row in rows_of(old)}
    going = [row["content_id"] for row in rows_of(old) if row["group_id"] == item]
    going += [row["content_id"] for row in rows_of(old) if (row["id"] or "").startswith(f"{vote.seq}:")]
    new, after, _ = made(tmp_path, *forget(words, "old", "stage.forget=erased", "run.name=new"))
    assert kept - {*going} == {row["content_id"] for row in rows_of(new)}
    assert after["replaces"]["count"] == len(going)
    assert files_with(tmp_path / "runs" / "data", SECRET) == []
    with Store.open(f"sqlite:///{tmp_path / 'other.db'}") as other:  # another project of that name
        made_up = other.add_item("greetings", "x", Conversation((Message("user", "?"),)),
                                 [Candidate("a"), Candidate("b")])  # fmt: skip
        assert made_up
    wrong = [word if "store.url" not in word else f"store.url=sqlite:///{tmp_path / 'other.db'}" for word in words]
    shop.refuses(*forget(wrong, "new", "stage.forget=erased"), says="another project of that name")


def test_killed_at_any_moment_one_of_the_two_is_whole(tmp_path: Path) -> None:
    """SIGKILL at random moments: the old data set is read as ever, or the same command ends with the new one."""
    rows = [chat(f"{SECRET}?" if i == 7 else f"question {i}?", sentence(random.Random(i), i)) for i in range(400)]
    words = ["stage=data", f"stage.sources=[{write(tmp_path / 'rows.jsonl', rows)}]", f"run.root={tmp_path / 'runs'}"]
    old, _, _ = made(tmp_path, *words, "run.name=old", "stage.duplicates.near=null")
    whole = load_data_set(old / "artifact").records("train")
    [id] = secret_rows(old)
    command = forget(words, "old", f"stage.forget=[{id}]", "run.name=new")
    draw, kills, new = random.Random(0), 0, tmp_path / "runs" / "data" / "new"
    while True:
        step, times = (draw.choice([*STEPS]), draw.randrange(12)) if kills else ("write_json", 0)
        status = in_a_fork(command, deadly=STEPS[step], times=times)
        replaced = (old / "artifact" / "replaced.json").is_file()
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
        assert kills < 60
        if replaced:
            assert load_data_set(new / "artifact").records("train")
        else:
            assert load_data_set(old / "artifact").records("train") == whole
    assert replaced
    assert kills
    assert files_with(tmp_path / "runs", SECRET, id) == []
    assert not [*new.glob(".*part*")]
    left = [record for record in whole if SECRET not in str(record)]
    assert load_data_set(new / "artifact").records("train") == left


STEPS = {
    "write_json": ["align.data.sets.forget.write_json"],
    "unlink": ["pathlib.Path.unlink"],
    "rmtree": ["align.data.sets.forget.shutil.rmtree"],
    "replace": ["os.replace", "pathlib.Path.replace"],
}
"""Steps of the file system that forgetting takes."""


def test_a_proof_shows_a_row_to_somebody_who_has_the_root_alone(
    vote_store: Store, words: list[str], tmp_path: Path
) -> None:
    folder, data, _ = made(tmp_path, *words)
    found = load_data_set(folder / "artifact")
    for side in ("train", "test"):
        for row in [row for table in found.tables(side) for row in table.to_pylist()]:
            id = bytes.fromhex(row["content_id"])
            proof = build_row_proof(found, side, id)
            assert verify_row_proof(proof, id, data["root"])
            assert not verify_row_proof(proof, bytes(32), data["root"])
            assert not verify_row_proof(proof, id, data["ids_root"])
    with pytest.raises(ValueError, match="not in list"):
        build_row_proof(found, "train", bytes(32))


def test_what_cannot_be_forgotten(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [chat(f"question {i}?", f"answer {i}") for i in range(30)])
    words = ["stage=data", f"stage.sources=[{path}]", f"run.root={tmp_path / 'runs'}"]
    old, _, _ = made(tmp_path, *words, "run.name=old")
    for more, says in (
        (["stage.forget=[abc]"], "is no content id"),
        (["stage.forget=nowhere.txt"], "is neither an id nor a file of ids"),
        (["stage.forget=erased"], "none of its sources is an annotation project"),
        ([f"stage.forget=[{'0' * 63}1]"], "1 of 1 ids are of no row"),
        ([], "goes with stage.action=forget, and with no other action"),
        (["stage.forget=erased", "stage.clean=[unicode]"], "is not read by stage.action=forget"),
    ):
        Workshop(tmp_path / "runs", tmp_path).refuses(*forget(words, "old", *more), says=says)
    assert [path.name for path in (tmp_path / "runs" / "data").iterdir()] == ["old"]
    assert load_data_set(old / "artifact").records("train")


def test_no_row_is_left_out_by_calling_its_leaf_a_tombstone(tmp_path: Path) -> None:
    """The roots would hold: a row's leaf is longer than a tombstone, which gives it away."""
    path = write(tmp_path / "rows.jsonl", [chat(f"question {i}?", f"answer {i}") for i in range(30)])
    folder, data, _ = made(tmp_path, "stage=data", f"stage.sources=[{path}]", f"run.root={tmp_path / 'runs'}")
    artifact = folder / "artifact"
    [shard] = artifact.glob("train-*.parquet")
    hidden, table = leaves_by_hand(artifact, "train")[0], pq.read_table(shard)
    pq.write_table(table.slice(1), shard)
    data["splits"]["train"]["forgotten"] = [[0, hidden.hex()]]
    data["shards"][shard.name] = hashlib.sha256(shard.read_bytes()).hexdigest()
    (artifact / "data.json").write_text(json.dumps(data))
    assert root_by_hand(leaves_by_hand(artifact, "train")).hex() == data["splits"]["train"]["root"]
    with pytest.raises(CorruptFile, match="an invalid tombstone"):
        load_data_set(artifact).records("train")
