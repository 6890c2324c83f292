"""Votes as a source of a data set, and rows of one forgotten: ids under the project's key, nothing left of what was to
go, and no half of anything whatever kills it."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
from data_sets import chat, made, sentence, write
from sqlalchemy import create_engine, text
from workshop import Workshop

from align.data.pairs import read_pairs
from align.data.sets import overlap
from align.data.sets.proofs import holds, proof_of
from align.data.sets.published import data_set
from align.data.sets.votes import key_in, votes_of
from align.data.sources import DataSource
from align.errors import CorruptFile, InputError
from align.types import Conversation, Message, Preference
from annotate.store import Candidate, Judgement, Store

SECRET = "Ottilie Grünberg lives at the old mill"
"""A text of one person."""


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    """Thirty items that ann ranked, every third by bob too; the fourth one holds `SECRET`."""
    with Store.open(store_url) as store:
        draw = random.Random(5)
        for i in range(30):
            said = SECRET if i == 4 else sentence(draw, i)
            prompt = Conversation((Message("user", f"What of day {i}?"),))
            answers = [Candidate(said), Candidate(f"no {i}", ended=False)] + [Candidate(f"maybe {i}")] * (i % 2)
            item = store.add_item("greetings", f"run/{i}", prompt, answers)
            tiers = tuple((f"{item}-{k}",) for k in range(len(answers)))
            for who in ("ann@example.org", "bob")[: 1 + (i % 3 == 0)]:
                judgement = Judgement(tiers if who != "bob" else tiers[::-1], strength=2 if len(answers) == 2 else 0)
                store.record("greetings", item, judgement, annotator=who, key=f"{len(who)}/{i}")
        yield store


@pytest.fixture
def words(tmp_path: Path, store_url: str) -> list[str]:
    """The command that makes a data set of votes and of pairs in a file."""
    rows = [{"prompt": f"file {i}?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(40)]
    path = write(tmp_path / "pairs.jsonl", rows)
    listed = f"[{{annotations: greetings}}, {{path: {path}, name: file}}]"
    return [
        "stage=data", f"stage.sources={listed}", f"store.url={store_url}", f"run.root={tmp_path / 'runs'}",
        "data.held_out=0.2",
    ]  # fmt: skip


def rows_of(folder: Path) -> list[dict[str, Any]]:
    tables = [pq.read_table(path) for path in sorted((folder / "artifact").glob("*.parquet"))]
    return [row for table in tables for row in table.to_pylist()]


def by_json(row: dict[str, Any]) -> bytes:
    """The canonical row of a pair as docs/data.md says it, written out again."""
    content = {part: row[part] for part in ("prompt", "chosen", "rejected")}
    content |= {name: False for name in ("chosen_ended", "rejected_ended") if row.get(name) is False}
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def files_with(where: Path, *needles: str) -> list[str]:
    """The files below a folder that hold one of these texts, packed Parquet among them."""
    found = []
    for path in where.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            if path.suffix == ".parquet":
                data += json.dumps(pq.read_table(path).to_pylist(), ensure_ascii=False).encode()
            forms = [form for needle in needles for form in (needle, json.dumps(needle)[1:-1])]
            if any(form.encode() in data for form in forms):
                found.append(str(path.relative_to(where)))
    return found


def dumped(url: str) -> str:
    """All that a database holds."""
    engine = create_engine(url)
    with engine.connect() as connection:
        listing = "SELECT name FROM sqlite_master WHERE type = 'table'"
        if "postgresql" in url:
            listing = "SELECT table_name FROM information_schema.tables WHERE table_schema = current_schema()"
        names = connection.execute(text(listing)).scalars().all()
        found = "\n".join(str(row) for name in names for row in connection.execute(text(f"SELECT * FROM {name}")))
    engine.dispose()
    return found


def test_votes_are_the_pairs_that_training_reads_with_ids_under_the_key(
    store: Store, store_url: str, words: list[str], tmp_path: Path
) -> None:
    folder, data, _ = made(tmp_path, *words)
    rows, key = rows_of(folder), store.key("greetings")
    assert key is not None
    votes = [row for row in rows if row["source"] == "greetings"]
    for row in rows:
        mine = row["source"] == "greetings"
        expected = hmac.new(key, by_json(row), "sha256") if mine else hashlib.sha256(by_json(row))
        assert row["content_id"] == expected.hexdigest()
        turns = [f"Message(role={m['role']!r}, content={m['content']!r})" for m in row["prompt"]]
        plain = hashlib.sha256(f"({turns[0]},)".encode())
        asked = hmac.new(key, plain.digest(), "sha256") if mine else plain
        assert row["question_id"] == asked.hexdigest()
    found = data_set(folder / "artifact")
    pairs = [record for side in ("train", "test") for record in found.records(side)]
    read = read_pairs(DataSource("annotations"), store_url, "greetings", allow_simulated=False)
    assert {p for p in pairs if isinstance(p, Preference) and p.group_id} == {*read}
    assert len(votes) == len(read) > 40
    told = {source["name"]: source for source in data["sources"]}
    print_ = hmac.new(key, b"fingerprint of the key", "sha256").hexdigest()[:16]
    expected = {"content_id": "hmac", "project": "greetings", "key_fingerprint": print_}
    assert expected.items() <= told["greetings"].items()
    assert told["file"]["content_id"] == "sha256"
    manifest = json.loads((folder / "manifest.json").read_text())
    read_head = manifest["inputs"]["sources.greetings"]
    assert (read_head["project"], read_head["seq"]) == ("greetings", store.head("greetings").seq)
    assert files_with(tmp_path / "runs", key.hex()) == []
    assert not any(key in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_vote_that_a_file_has_too_is_a_copy_and_one_question_is_on_one_side(
    store: Store, words: list[str], tmp_path: Path
) -> None:
    rows = [{"prompt": f"What of day {i}?", "chosen": f"other {i}", "rejected": f"bad {i}"} for i in range(30)]
    first = next(iter(store.items("greetings")))
    texts = [candidate.text for candidate in first.candidates]
    copy = {"prompt": "What of day 0?", "chosen": texts[0], "rejected": texts[1], "rejected_ended": False}
    path = write(tmp_path / "more.jsonl", [*rows, copy])
    listed = f"stage.sources=[{{annotations: greetings}}, {{path: {path}, name: file}}]"
    folder, data, _ = made(tmp_path, words[0], listed, *words[2:])
    assert {source["name"]: source["counts"]["no copies"] for source in data["sources"]}["file"] == 30
    assert data["found"]["shared_with_test"] == 0  # nothing had to be taken away from beside its own question
    sides: dict[str, set[str]] = {}
    for side in ("train", "test"):
        for record in data_set(folder / "artifact").records(side):
            assert isinstance(record, Preference)
            sides.setdefault(record.prompt[0].content, set()).add(side)
    assert {len(found) for found in sides.values()} == {1}
    assert {"train", "test"} == {side for found in sides.values() for side in found}


def test_simulated_votes_unknown_projects_and_other_keys_are_refused(
    store: Store, words: list[str], tmp_path: Path
) -> None:
    item = store.add_item("greetings", "more", Conversation((Message("user", "?"),)), [Candidate("a"), Candidate("b")])
    store.record("greetings", item, Judgement(((f"{item}-0",), (f"{item}-1",)), source="simulated"),
                 annotator="vader", key="v")  # fmt: skip
    shop = Workshop(tmp_path / "runs", tmp_path)
    assert shop.ended(*words) == 2
    assert "data.allow_simulated=true" in shop.said
    assert shop.ended(*words, "data.allow_simulated=true") == 0, shop.said
    for listed, says in (
        ("[{annotations: nobody}]", "the store has no such project"),
        ("[{annotations: greetings, path: a.jsonl}]", "two kinds of them"),
        ("[{annotations: greetings, columns: {prompt: q}}]", "votes have none"),
        ("[{annotations: greetings, votes: 1}]", "is no key of a source"),
        ("[{annotations: ''}]", "is no project"),
    ):
        assert shop.ended(words[0], f"stage.sources={listed}", *words[2:]) == 2
        assert says in shop.said
        assert "Traceback" not in shop.said


def forget(words: list[str], name: str, *more: str) -> list[str]:
    where = [word for word in words if word.startswith(("run.root", "store.url"))]
    return ["stage=data", "stage.action=forget", f"data.path=data:{name}", *where, *more]


def root_by_hand(leaves: list[bytes]) -> bytes:
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    k = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\x01" + root_by_hand(leaves[:k]) + root_by_hand(leaves[k:])).digest()


def leaves_by_hand(folder: Path, side: str) -> list[bytes]:
    """The leaves of a side from its files: rows, and tombstones where `data.json` has them."""
    data = json.loads((folder / "data.json").read_text())
    tables = [pq.read_table(path) for path in sorted(folder.glob(f"{side}-*.parquet"))]
    leaves = [
        bytes.fromhex(row["content_id"]) + row["exposure"].to_bytes(4, "big")
        for table in tables for row in table.to_pylist()
    ]  # fmt: skip
    for place, tombstone in data["splits"][side].get("forgotten", []):
        leaves.insert(place, bytes.fromhex(tombstone))
    return leaves


def secret_rows(folder: Path) -> list[str]:
    return [row["content_id"] for row in rows_of(folder) if SECRET in json.dumps(row, ensure_ascii=False)]


def test_forgotten_rows_are_gone_and_the_others_are_where_they_were(
    store: Store, words: list[str], tmp_path: Path, tiny_model: Path
) -> None:
    old, before, _ = made(tmp_path, *words, "run.name=old")
    was = {side: leaves_by_hand(old / "artifact", side) for side in ("train", "test")}
    ids = secret_rows(old)
    assert ids
    assert any(name.endswith(".parquet") for name in files_with(old, SECRET))
    shop = Workshop(tmp_path / "runs", tmp_path)
    reward = [
        "stage=reward", "init=base", "model=hub", f"model.path={tiny_model}", "method=lora", "device=cpu",
        "data=manifest", "stage.epochs=1", words[3],
    ]  # fmt: skip
    assert shop.ended(*reward, "data.path=data:old", "run.name=saw") == 0, shop.said

    listing = f"stage.forget=[{', '.join(ids)}]"
    new, after, said = made(tmp_path, *forget(words, "old", listing, "run.name=new"))
    assert "reward/saw" in said
    assert f"root {after['root'][:12]} replaces {before['root'][:12]}" in said
    assert after["replaces"].items() >= {"root": before["root"], "count": len(ids)}.items()
    assert files_with(tmp_path / "runs" / "data", SECRET, *ids) == []
    left = {str(path.relative_to(old)) for path in old.rglob("*") if path.is_file()}
    assert left == {
        "manifest.json", "config.yaml", "metrics.jsonl", "timing.jsonl", "artifact/data.json", "artifact/replaced.json",
    }  # fmt: skip
    roots = []
    for side, leaves in was.items():
        now = leaves_by_hand(new / "artifact", side)
        assert len(now) == len(leaves)
        changed = [(a, b) for a, b in zip(leaves, now, strict=True) if a != b]
        assert {a[:32].hex() for a, _ in changed} <= {*ids}
        assert all(len(b) == 32 for _, b in changed)
        assert root_by_hand(now).hex() == after["splits"][side]["root"]
        roots.append(root_by_hand(now))
    assert root_by_hand(roots).hex() == after["root"] != before["root"]
    kept = sorted({row["content_id"] for row in rows_of(new)})
    assert root_by_hand([bytes.fromhex(id) for id in kept]).hex() == after["ids_root"]
    for source in after["sources"]:
        assert source["splits"]["train"]["rows"] == sum(
            row["source"] == source["name"] for path in (new / "artifact").glob("train-*")
            for row in pq.read_table(path).to_pylist()
        )  # fmt: skip

    assert shop.ended(*reward, "data.path=data:old", "run.name=again") == 2
    assert "was replaced by data:new" in shop.said
    assert shop.ended(*words, "run.name=old") == 2
    assert "was replaced by data:new" in shop.said
    assert shop.ended(*reward, "data.path=data:new", "run.name=unknowing") == 0, shop.said
    manifest = json.loads((tmp_path / "runs" / "reward" / "unknowing" / "manifest.json").read_text())
    assert manifest["inputs"]["data"]["root"] == after["root"]
    found = datasets.load_dataset(str(new / "artifact"), cache_dir=str(tmp_path / "cache"))
    assert {side: len(found[side]) for side in found} == {s: after["splits"][s]["rows"] for s in ("train", "test")}

    assert shop.ended(*forget(words, "old", listing, "run.name=new")) == 0, shop.said  # again: it has ended
    assert "finished already" in shop.said
    assert shop.ended(*forget(words, "old", f"stage.forget=[{kept[0]}]")) == 2
    assert "was replaced by data:new" in shop.said
    assert shop.ended(*forget(words, "new", listing)) == 2
    assert "of no row" in shop.said
    newest, last, said = made(tmp_path, *forget(words, "new", f"stage.forget=[{kept[0]}]", "run.name=newest"))
    assert "reward/saw" in said
    assert "reward/unknowing" in said
    assert last["replaces"]["replaces"]["root"] == before["root"]
    buried = sum(len(last["splits"][side].get("forgotten", [])) for side in ("train", "test"))
    assert buried == len(ids) + 1
    assert data_set(newest / "artifact").records("train")


def test_what_the_store_erased_is_forgotten(store: Store, store_url: str, words: list[str], tmp_path: Path) -> None:
    old, _, _ = made(tmp_path, *words, "run.name=old")
    shop = Workshop(tmp_path / "runs", tmp_path)
    assert shop.ended(*forget(words, "old", "stage.forget=erased")) == 2
    assert "There is nothing to forget" in shop.said
    item = [item.id for item in store.items("greetings")][4]
    vote = next(vote for vote in store.rankings("greetings") if vote.item != item)
    erase = ["stage=annotate", "project=greetings", "stage.action=erase", *words[2:4]]
    assert shop.ended(*erase, f"stage.item={item}") == 0, shop.said
    assert "data/old" in shop.said
    store.retract("greetings", vote.seq)
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
    assert shop.ended(*forget(wrong, "new", "stage.forget=erased")) == 2
    assert "another project of that name" in shop.said


def test_an_erased_project_takes_its_key_along(store: Store, store_url: str, words: list[str], tmp_path: Path) -> None:
    """The words that were in it are nowhere, and whether a row was among its rows nobody can say."""
    key = store.key("greetings")
    assert key is not None
    old, data, _ = made(tmp_path, *words, "run.name=votes")
    names = ("prompt", "chosen", "rejected", "chosen_ended", "rejected_ended")
    rows = [{name: row[name] for name in names} for row in rows_of(old)]
    path = write(tmp_path / "copies.jsonl", rows)
    made(
        tmp_path,
        "stage=data",
        f"stage.sources=[{path}]",
        "run.name=copies",
        "stage.contamination.test=false",
        *words[2:],
    )
    ours, theirs = (
        overlap.content(data_set(tmp_path / "runs" / "data" / name / "artifact")) for name in ("votes", "copies")
    )
    everything = {bytes.fromhex(row["content_id"]) for row in rows_of(old)}

    def read(kind: Any) -> bytes | None:
        return key_in(store_url, kind)

    for a, b in ((ours, theirs), (theirs, ours)):
        assert overlap.shared(a, b, read).count == len(everything)
    assert overlap.shared(ours, theirs, read).ids == everything
    shop = Workshop(tmp_path / "runs", tmp_path)
    assert key.hex() in dumped(store_url)
    erase = ["stage=annotate", "project=greetings", "stage.action=erase", "stage.whole=true", *words[2:4]]
    assert shop.ended(*erase) == 0, shop.said
    assert "data/votes" in shop.said
    left = dumped(store_url)
    assert key.hex() not in left
    assert SECRET not in left
    assert "ann@example.org" not in left
    if "sqlite" in store_url:
        assert files_with(tmp_path, key.hex()) == []
    store.verify()
    for a, b in ((ours, theirs), (theirs, ours)):
        found = overlap.shared(a, b, read)
        assert found.count is None
        assert found.unknown
        assert len(found.ids) == 40  # those of the file are known as ever
    for act in (
        lambda: store.add_item("greetings", "new", Conversation((Message("user", "?"),)), [Candidate("a")] * 2),
        lambda: made(tmp_path, *words, "run.name=more"),
    ):
        with pytest.raises((InputError, AssertionError), match="it was erased"):
            act()
    new, after, _ = made(tmp_path, *forget(words, "votes", "stage.forget=erased", "run.name=left"))
    assert {row["source"] for row in rows_of(new)} == {"file"}
    assert after["replaces"]["count"] == len(rows) - 40
    assert files_with(tmp_path / "runs" / "data" / "votes", SECRET) == []
    guess = hmac.new(os.urandom(32), by_json({**rows[0]}), "sha256").hexdigest()
    assert guess not in json.dumps(data)


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_moment_one_of_the_two_is_whole(tmp_path: Path, seed: int) -> None:
    """SIGKILL at random moments: the old data set is read as ever, or the same command ends with the new one."""
    rows = [chat(f"{SECRET}?" if i == 7 else f"question {i}?", sentence(random.Random(i), i)) for i in range(400)]
    path = write(tmp_path / "rows.jsonl", rows)
    root = f"run.root={tmp_path / 'runs'}"
    old, _, _ = made(
        tmp_path, "stage=data", f"stage.sources=[{path}]", "run.name=old", "stage.duplicates.near=null", root
    )
    whole = data_set(old / "artifact").records("train")
    [id] = secret_rows(old)
    command = ["stage=data", "stage.action=forget", "data.path=data:old", f"stage.forget=[{id}]", "run.name=new", root]
    draw, kills, replaced = random.Random(seed), 0, False
    steps = ("write_json", "unlink", "rmtree", "replace")
    while True:
        status = killed_in(command, draw.choice(steps), draw.randrange(12))
        replaced = (old / "artifact" / "replaced.json").is_file()
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
        assert kills < 60
        if not replaced:
            assert data_set(old / "artifact").records("train") == whole
        else:
            assert data_set(tmp_path / "runs" / "data" / "new" / "artifact").records("train")
    assert replaced
    assert files_with(tmp_path / "runs", SECRET, id) == []
    new = tmp_path / "runs" / "data" / "new"
    assert not [*new.glob(".*part*")]
    assert len(data_set(new / "artifact").records("train")) in (len(whole) - 1, len(whole))


def killed_in(command: list[str], step: str, after: int) -> int:
    """The exit status of a child that runs a command and is killed before a step of the file system that it takes for
    the so-many-th time, if it takes it so often."""
    if (child := os.fork()) == 0:
        from align.data.sets import forget as forgetting

        count = [after]

        def deadly(act: Any) -> Any:
            def acts(*given: Any, **named: Any) -> Any:
                if count[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                count[0] -= 1
                return act(*given, **named)

            return acts

        if step == "write_json":
            forgetting.write_json = deadly(forgetting.write_json)  # type: ignore[assignment]
        elif step == "unlink":
            Path.unlink = deadly(Path.unlink)  # type: ignore[method-assign]
        elif step == "rmtree":
            forgetting.shutil.rmtree = deadly(forgetting.shutil.rmtree)  # type: ignore[assignment]
        else:
            os.replace = deadly(os.replace)
            Path.replace = deadly(Path.replace)  # type: ignore[method-assign]
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        from align.__main__ import main

        os._exit(main(command))
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def test_a_proof_shows_a_row_to_somebody_who_has_the_root_alone(store: Store, words: list[str], tmp_path: Path) -> None:
    folder, data, _ = made(tmp_path, *words)
    found = data_set(folder / "artifact")
    for side in ("train", "test"):
        for row in [row for table in found.tables(side) for row in table.to_pylist()]:
            id, seen = bytes.fromhex(row["content_id"]), row["exposure"]
            proof = proof_of(found, side, id, seen)
            assert holds(proof, id, seen, data["root"])
            assert not holds(proof, id, seen + 1, data["root"])
            assert not holds(proof, bytes(32), seen, data["root"])
            assert not holds(proof, id, seen, data["ids_root"])
    with pytest.raises(ValueError, match="not in list"):
        proof_of(found, "train", bytes(32), 1)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["stage.forget=[abc]"], "is no content id"),
        (["stage.forget=nowhere.txt"], "is neither an id nor a file of ids"),
        (["stage.forget=erased"], "none of its sources is an annotation project"),
        ([f"stage.forget=[{'0' * 63}1]"], "1 of 1 ids are of no row"),
        ([], "names the rows of stage.action=forget"),
        (["stage.forget=erased", "stage.clean=[unicode]"], "is not read by stage.action=forget"),
    ],
)
def test_what_cannot_be_forgotten(tmp_path: Path, words: list[str], says: str) -> None:
    path = write(tmp_path / "rows.jsonl", [chat(f"question {i}?", f"answer {i}") for i in range(30)])
    root = f"run.root={tmp_path / 'runs'}"
    old, _, _ = made(tmp_path, "stage=data", f"stage.sources=[{path}]", "run.name=old", root)
    shop = Workshop(tmp_path / "runs", tmp_path)
    assert shop.ended("stage=data", "stage.action=forget", "data.path=data:old", root, *words) == 2
    assert says in shop.said
    assert "Traceback" not in shop.said
    assert [path.name for path in (tmp_path / "runs" / "data").iterdir()] == ["old"]
    assert data_set(old / "artifact").records("train")


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
    with pytest.raises(CorruptFile, match="a tombstone that is none"):
        data_set(artifact).records("train")


def test_votes_are_read_as_they_were_when_the_run_began(store: Store, store_url: str) -> None:
    votes = votes_of(store_url, "greetings", allow_simulated=False)
    before = [*votes.reads()]
    item = store.add_item("greetings", "late", Conversation((Message("user", "?"),)), [Candidate("a"), Candidate("b")])
    store.record("greetings", item, Judgement(((f"{item}-0",), (f"{item}-1",))), annotator="late", key="late")
    assert [*votes.reads()] == before
    assert len([*votes_of(store_url, "greetings", allow_simulated=False).reads()]) == len(before) + 1
    assert [read.number for read in before] == [*range(1, len(before) + 1)]
    assert [*votes.reads(7)] == before[7:]  # a run that goes on
    assert repr(votes.key) not in repr(votes)
    assert votes.key.hex() not in repr(votes)
