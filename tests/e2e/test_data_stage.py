"""`stage=data` from files to a data set, and from there into training: nothing is lost uncounted, and roots are the
same whatever interrupts or divides the work."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_sets import made, sources, three_sources, write
from workshop import Workshop

from align.core.types import Conversation, Preference
from align.data.sets import gather, published
from align.data.sets.published import data_set
from align.data.sets.spool import Spool
from align.report.data_set_page import list_losses


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return three_sources(tmp_path)


def test_every_row_is_in_or_counted(here: Path) -> None:
    table = "{path: %s, name: table, columns: {prompt: question, completion: answer}}" % (here / "table.csv")
    words = [*sources(here, table), f"stage.contamination.against=[{here / 'evals.jsonl'}]", "data.held_out=0.2"]
    folder, data, said = made(here, *words)
    for source in data["sources"]:
        kept = sum(source["splits"][side]["rows"] for side in ("train", "test"))
        assert source["counts"]["read"] == kept + sum(
            n for why, n in list_losses(source) if why not in ("refused", "undecided")
        ), said
    by_name = {source["name"]: dict(list_losses(source)) for source in data["sources"]}
    expected = {"refused": 0, "dropped in cleaning": 0, "exact duplicates": 12, "near-duplicates": 8, "over the cap": 0}
    assert expected.items() <= by_name["support"].items()
    assert by_name["general"]["like evaluation rows"] == by_name["table"]["like evaluation rows"] == 1
    assert {of["set"]: sum(of["hits"].values()) for of in data["evaluations"][:1]} == {str(here / "evals.jsonl"): 2}
    assert "exact duplicates 12, near-duplicates 8" in said
    report = (folder / "report.html").read_text()
    assert "Where every row went" in report
    assert "The largest clusters of duplicates" in report
    assert "Traceback" not in (folder / "log.txt").read_text()


def by_hand(table: pa.Table) -> str:
    """The Merkle root of a side, from its file alone."""

    def root(leaves: list[bytes]) -> bytes:
        if len(leaves) == 1:
            return leaves[0]
        k = 1 << (len(leaves) - 1).bit_length() - 1
        return hashlib.sha256(b"\x01" + root(leaves[:k]) + root(leaves[k:])).digest()

    return root([
        hashlib.sha256(b"\x00" + bytes.fromhex(row["content_id"]) + (1).to_bytes(4, "big")).digest()
        for row in table.to_pylist()
    ]).hex()  # fmt: skip


def test_the_fingerprint_is_that_of_the_rows(here: Path) -> None:
    folder, data, _ = made(here, *sources(here))
    for side in ("train", "test"):
        [path] = (folder / "artifact").glob(f"{side}-*.parquet")
        table = pq.read_table(path)
        assert data["splits"][side]["root"] == by_hand(table)
        for row in table.to_pylist():
            content = json.dumps({"messages": row["messages"]}, sort_keys=True, separators=(",", ":"))
            assert hashlib.sha256(content.encode()).hexdigest() == row["content_id"]


def test_it_is_read_by_datasets(here: Path) -> None:
    folder, data, _ = made(here, *sources(here))
    found = datasets.load_dataset(str(folder / "artifact"), cache_dir=str(here / "cache"))
    assert {side: len(found[side]) for side in found} == {s: data["splits"][s]["rows"] for s in ("train", "test")}
    assert set(found["train"].column_names) == {
        "messages", "content_id", "question_id", "source", "row", "cluster", "metadata",
    }  # fmt: skip


@pytest.mark.parametrize(("batch", "part", "shard"), [(1, 7, 10), (13, 50, 33), (4096, 10**6, 10**6)])
def test_the_same_roots_however_the_work_is_divided(
    here: Path, monkeypatch: pytest.MonkeyPatch, batch: int, part: int, shard: int
) -> None:
    whole = made(here, *sources(here), "run.name=whole")[1]
    for module, name, value in ((gather, "BATCH", batch), (gather, "PART", part), (published, "SHARD", shard)):
        monkeypatch.setattr(module, name, value)
    divided = made(here, *sources(here), "run.name=divided")[1]
    for key in ("root", "ids_root", "splits", "sources", "lengths"):
        assert divided[key] == whole[key]


def test_the_same_by_workers_and_a_run_is_the_same_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers in this process stand in for Daft's, which `benchmarks/data/engines.py` starts."""
    words, asked = [*sources(here), f"stage.contamination.against=[{here / 'evals.jsonl'}]"], []
    whole = made(here, *words, "run.name=whole")[1]

    class Workers:
        def __init__(self, on_ray: bool, workers: int, address: str | None) -> None:
            self.workers = workers
            asked.append((on_ray, workers, address))

        def __call__(self, do: Callable[[Any], Any], tasks: list[Any]) -> Any:
            asked.append(len(tasks))
            return reversed([(i, do(task)) for i, task in enumerate(tasks)])

    monkeypatch.setattr("align.stages.data.DaftRunner", Workers)
    monkeypatch.setattr(gather, "PART", 40)
    folder, divided, _ = made(here, *words, "stage.engine=ray", "stage.workers=3", "stage.ray=auto")
    assert asked == [(True, 3, "auto"), 2, 9, 6]  # files, pieces of them, packs of near-duplicates
    for key in ("root", "ids_root", "splits", "sources", "lengths", "found", "evaluations"):
        assert divided[key] == whole[key]
    again = made(here, *words)
    assert (again[0], len(asked)) == (folder, 4)
    assert "finished already" in again[2]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["stage.workers=2"], "stage.workers=2: is for other processes, and stage.engine=embedded has none"),
        (["stage.engine=daft", "stage.ray=auto"], "stage.ray=auto: is a cluster, and stage.engine=daft does not ask"),
        (["stage.engine=spark"], "Choose one of: embedded, daft, ray"),
    ],
)  # fmt: skip
def test_engines_that_are_none(here: Path, words: list[str], says: str) -> None:
    shop = Workshop(here / "runs", here)
    assert shop.ended(*sources(here), *words) == 2
    assert says in shop.said


def killed(act: Callable[[], object]) -> int:
    """The exit status of a child that `act`s; -9 where it was killed."""
    if (child := os.fork()) == 0:
        act()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


@pytest.mark.parametrize("place", ["in a part", "behind a part"])
def test_killed_while_it_reads_it_goes_on(here: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """At each attempt two parts are passed."""
    words, write = sources(here), Spool.write
    whole = made(here, *words, "run.name=whole")[1]
    monkeypatch.setattr(gather, "PART", 40)
    passed = count()

    def writes(self: Spool, name: str, batches: Any, groups: Any, account: Any) -> None:
        last = next(passed) == 1
        if last and place == "in a part":
            (self.folder / f"{name}.0.arrow").write_bytes(b"ARROW1 and no more")
            os.kill(os.getpid(), 9)
        write(self, name, batches, groups, account)
        if last:
            os.kill(os.getpid(), 9)

    kills = 0
    with monkeypatch.context() as patch:
        patch.setattr(Spool, "write", writes)
        while killed(lambda: Workshop(here / "runs", here).ended(*words, "run.name=killed")) == -9:
            kills += 1
            assert kills < 20
    assert kills >= 4
    same(here, whole)


@pytest.mark.parametrize("place", ["before", "behind"])
def test_killed_while_it_publishes_it_goes_on(here: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    words, publish = sources(here), published.publish
    whole = made(here, *words, "run.name=whole")[1]

    def publishes(*given: Any) -> None:
        if place == "behind":
            publish(*given)
        os.kill(os.getpid(), 9)

    with monkeypatch.context() as patch:
        patch.setattr("align.stages.data.publish", publishes)
        assert killed(lambda: Workshop(here / "runs", here).ended(*words, "run.name=killed")) == -9
    assert "continues" in made(here, *words, "run.name=killed")[2]
    same(here, whole)


def test_an_engine_that_is_not_there_costs_no_part(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = sources(here)
    whole = made(here, *words, "run.name=whole")[1]
    monkeypatch.setitem(sys.modules, "daft", None)
    with monkeypatch.context() as patch:
        patch.setattr("align.stages.data.publish", lambda *given: os.kill(os.getpid(), 9))
        assert killed(lambda: Workshop(here / "runs", here).ended(*words, "run.name=killed")) == -9
    parts = sorted(path.name for path in (here / "runs" / "data" / "killed" / "checkpoints").iterdir())
    shop = Workshop(here / "runs", here)
    assert shop.ended(*words, "run.name=killed", "stage.engine=daft") == 2
    assert "is not installed here" in shop.said
    assert sorted(path.name for path in (here / "runs" / "data" / "killed" / "checkpoints").iterdir()) == parts != []
    with monkeypatch.context() as patch:
        patch.setattr(Spool, "write", None)  # every part is there
        assert "continues" in made(here, *words, "run.name=killed")[2]
    same(here, whole)


def same(here: Path, whole: dict[str, Any]) -> None:
    again = data_set(here / "runs" / "data" / "killed" / "artifact").data
    assert (again["root"], again["ids_root"], again["sources"]) == (whole["root"], whole["ids_root"], whole["sources"])


def test_training_reads_it(here: Path, tiny_model: Path) -> None:
    _, data, _ = made(here, *sources(here), "data.held_out=0.2")
    shop = Workshop(here / "runs", here)
    sft = [
        "stage=sft", "model=hub", f"model.path={tiny_model}", "data=manifest", "data.path=data:latest",
        "stage.max_steps=1", "data.too_long=truncate", f"run.root={here / 'runs'}", "device=cpu", "stage.eval_size=3",
    ]  # fmt: skip
    assert shop.ended(*sft) == 0, shop.said
    manifest = json.loads((Path(shop.said.splitlines()[-1]) / "manifest.json").read_text())
    assert manifest["inputs"]["data"]["root"] == data["root"]
    assert manifest["metrics"]["train_rows"] == data["splits"]["train"]["rows"]
    again = Workshop(here / "runs", here)
    assert again.ended(*sft) == 0
    assert "finished already" in again.said


def test_rows_come_back_as_they_were_read_each_as_often_as_it_is_seen(here: Path) -> None:
    folder, data, _ = made(
        here, "stage=data", f"run.root={here / 'runs'}", "stage.mix.repeat=4", "data.held_out=0.1",
        f"stage.sources=[{here / 'general.parquet'}, {{path: {here / 'support.jsonl'}, cap: 20, weight: 0.5}}]",
    )  # fmt: skip
    found = data_set(folder / "artifact")
    train, test = found.records("train"), found.records("test")
    assert len(train) == data["splits"]["train"]["rows"] > data["splits"]["train"]["distinct"]
    assert len(test) == data["splits"]["test"]["rows"]
    assert all(isinstance(record, Conversation) for record in train)
    asked = [
        {record.messages[0].content for record in side if isinstance(record, Conversation)} for side in (train, test)
    ]
    assert not asked[0] & asked[1]
    shares = {source["name"]: source["got"] for source in data["sources"]}
    assert shares["support"] == pytest.approx(0.5, abs=0.02)


def test_pairs_keep_all_that_is_known_of_them(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": f"question {i}?", "chosen": f"yes {i}", "rejected": f"no {i}", "margin": i / 4,
            "group_id": f"g{i // 2}", "annotator": "a1", "source": "human", "created_at": "2026-11-01",
        }
        for i in range(40)
    ]  # fmt: skip
    path = write(tmp_path / "pairs.jsonl", rows)
    folder, data, _ = made(
        tmp_path, "stage=data", f"stage.sources=[{path}]", f"run.root={tmp_path / 'runs'}", "data.held_out=0.3"
    )
    found = data_set(folder / "artifact")
    sides = [found.records(side) for side in ("train", "test")]
    assert data["kind"] == "preferences"
    groups = [{pair.group_id for pair in side if isinstance(pair, Preference)} for side in sides]
    assert not groups[0] & groups[1]
    pairs = {pair.prompt[0].content: pair for side in sides for pair in side if isinstance(pair, Preference)}
    assert len(pairs) == 40
    pair = pairs["question 7?"]
    assert (pair.margin, pair.annotator, pair.source, pair.created_at) == (1.75, "a1", "human", "2026-11-01")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["stage=data"], "stage.sources=None: names nothing to make a data set of"),
        (["stage=data", "stage.sources=[{path: nowhere.jsonl}]"], "nowhere.jsonl"),
        (["stage=data", "stage.sources=[{pth: a}]"], "pth=a: is no key of a source. Did you mean path?"),
        (["stage=data", "stage.sources=[{path: SUPPORT, weight: -1}]"], "weight=-1: is no share"),
        (["stage=data", "stage.sources=[SUPPORT, {path: GENERAL, weight: 1}]"], "leave nothing of 1"),
        (["stage=data", "stage.sources=[SUPPORT]", "stage.mix.total=100000"], "stage.mix.repeat="),
        (["stage=data", "stage.sources=[SUPPORT]", "stage.duplicates.prefer=[other]"], "prefer=other: is no source"),
        (["stage=data", "stage.sources=[SUPPORT]", "stage.clean=[{length: {least: 999}}]"], "is empty after cleaning"),
        (["stage=data", "stage.sources=[SUPPORT]", "stage.split.by=time"], "stage.split.since=None"),
        (["stage=data", "stage.sources=[SUPPORT]", "stage.split.by=column"], "split: is a column that no row has"),
        (["stage=data", "stage.sources=[SUPPORT]", "data=jsonl", "data.path=SUPPORT"], "is given beside stage.sources"),
        (["stage=data", "data=annotations"], "is no source of a data set"),
        (["stage=sft", "data=manifest", "data.path=data:latest", "model=pocket"], "no finished data run"),
        (["stage=sft", "data=manifest", "data.path=nowhere", "model=pocket"], "data.path=nowhere"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_and_leaves_no_folder(here: Path, words: list[str], says: str) -> None:
    shop = Workshop(here / "runs", here)
    names = {"SUPPORT": str(here / "support.jsonl"), "GENERAL": str(here / "general.parquet")}
    for name, path in names.items():
        words = [word.replace(name, path) for word in words]
    assert shop.ended(*words, f"run.root={here / 'runs'}") == 2, shop.said
    assert says in shop.said
    assert "Traceback" not in shop.said
    assert not [*(here / "runs").glob("*/*")]


def test_a_shard_that_was_changed_is_refused(here: Path) -> None:
    folder, _, _ = made(here, *sources(here))
    [path] = (folder / "artifact").glob("train-*.parquet")
    path.chmod(0o644)
    path.write_bytes(path.read_bytes() + b" ")
    shop = Workshop(here / "runs", here)
    assert (
        shop.ended("stage=sft", "model=pocket", "data=manifest", f"data.path={folder}", f"run.root={here / 'runs'}")
        == 2
    )
    assert "is not the file that was published" in shop.said


def test_evaluation_and_preferences_read_it(here: Path, tiny_model: Path) -> None:
    """`sample` takes its questions, `dpo` its pairs; each refuses the other kind with a remedy."""
    shop = Workshop(here / "runs", here)
    rows = [{"prompt": f"q{i}?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(30)]
    path = write(here / "pairs.jsonl", rows)
    root = f"run.root={here / 'runs'}"
    made(here, "stage=data", f"stage.sources=[{path}]", "run.name=pairs", "data.held_out=0.3", root)
    made(here, *sources(here), "run.name=chats")
    common = ["init=base", "model=hub", f"model.path={tiny_model}", "method=lora", root, "device=cpu", "data=manifest"]
    dpo = ["stage=dpo", *common, "stage.epochs=1", "stage.batch_size=16"]
    assert shop.ended(*dpo, "data.path=data:pairs") == 0, shop.said
    assert shop.ended(*dpo, "data.path=data:chats") == 2
    assert "holds documents, and this stage reads preferences" in shop.said
    sample = ["stage=sample", *common, "stage.prompts=2", "rollout.max_new_tokens=2"]
    assert shop.ended(*sample, "data.path=data:pairs", "run.name=s") in (0, 2), shop.said
    assert "holds" not in shop.said
    assert shop.ended("stage=sft", *common[1:], "data.path=data:pairs") == 2
    assert "holds preferences, and conversations or texts are imitated" in shop.said
