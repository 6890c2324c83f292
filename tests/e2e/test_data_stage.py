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
import pytest
from data_of_votes import leaves_by_hand, root_by_hand, rows_of
from data_sets import made, sources, three_sources, write
from workshop import Workshop, in_a_fork

from align.data.sets import gather, published
from align.data.sets.published import load_data_set
from align.data.sets.spool import Spool
from align.report.data_set_page import iter_losses


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
            n for why, n in iter_losses(source) if why not in ("refused", "undecided")
        ), said
    by_name = {source["name"]: dict(iter_losses(source)) for source in data["sources"]}
    expected = {"refused": 0, "dropped in cleaning": 0, "exact duplicates": 12, "near-duplicates": 8, "over the cap": 0}
    assert expected.items() <= by_name["support"].items()
    assert by_name["general"]["like evaluation rows"] == by_name["table"]["like evaluation rows"] == 1
    assert {of["set"]: sum(of["hits"].values()) for of in data["evaluations"][:1]} == {str(here / "evals.jsonl"): 2}
    assert "exact duplicates 12, near-duplicates 8" in said
    report = (folder / "report.html").read_text()
    assert "Where every row went" in report
    assert "The largest clusters of duplicates" in report
    assert "Traceback" not in (folder / "log.txt").read_text()


def test_workers_make_the_same_data_set(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers in this process stand in for Daft's, which `benchmarks/data/engines.py` starts."""
    words = [*sources(here), f"stage.contamination.against=[{here / 'evals.jsonl'}]"]
    _, alone, _ = made(here, *words, "run.name=whole")
    started = list[tuple[bool, int, str | None]]()
    task_counts = list[int]()

    class Workers:
        def __init__(self, on_ray: bool, workers: int, address: str | None) -> None:
            self.workers = workers
            started.append((on_ray, workers, address))

        def __call__(self, do: Callable[[Any], Any], tasks: list[Any]) -> Any:
            task_counts.append(len(tasks))
            return reversed([(i, do(task)) for i, task in enumerate(tasks)])

    monkeypatch.setattr("align.stages.data.DaftRunner", Workers)
    monkeypatch.setattr(gather, "PART", 40)
    folder, divided, _ = made(here, *words, "stage.engine=ray", "stage.workers=3", "stage.ray=auto")
    assert started == [(True, 3, "auto")]
    assert task_counts == [2, 9, 6]  # files, pieces of them, packs of near-duplicates
    for key in ("root", "ids_root", "splits", "sources", "lengths", "found", "evaluations"):
        assert divided[key] == alone[key]
    again, _, printed = made(here, *words)
    assert again == folder
    assert len(task_counts) == 3
    assert "finished already" in printed


def test_the_fingerprint_is_that_of_the_rows(here: Path) -> None:
    folder, data, _ = made(here, *sources(here))
    for side in ("train", "test"):
        leaves = leaves_by_hand(folder / "artifact", side)
        assert data["splits"][side]["root"] == root_by_hand(leaves).hex()
    for row in rows_of(folder):
        content = json.dumps({"messages": row["messages"]}, sort_keys=True, separators=(",", ":"))
        assert hashlib.sha256(content.encode()).hexdigest() == row["content_id"]


def test_it_is_read_by_datasets(here: Path) -> None:
    folder, data, _ = made(here, *sources(here))
    found = datasets.load_dataset(str(folder / "artifact"), cache_dir=str(here / "cache"))
    assert {side: len(found[side]) for side in found} == {s: data["splits"][s]["rows"] for s in ("train", "test")}
    assert set(found["train"].column_names) == {
        "messages", "content_id", "question_id", "source", "row", "cluster", "metadata",
    }  # fmt: skip


def test_the_same_roots_however_the_work_is_divided(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = made(here, *sources(here), "run.name=whole")[1]
    for batch, part, shard in ((1, 7, 10), (13, 50, 33)):
        for module, name, value in ((gather, "BATCH", batch), (gather, "PART", part), (published, "SHARD_ROWS", shard)):
            monkeypatch.setattr(module, name, value)
        divided = made(here, *sources(here), f"run.name=divided-{part}")[1]
        for key in ("root", "ids_root", "splits", "sources", "lengths"):
            assert divided[key] == whole[key]


def test_killed_while_it_reads_it_goes_on(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a part or behind one, by turns. At each attempt two parts are passed."""
    words, write = sources(here), Spool.write
    whole = made(here, *words, "run.name=whole")[1]
    monkeypatch.setattr(gather, "PART", 40)
    passed, kills = count(), 0

    def writes(self: Spool, name: str, batches: Any, groups: Any, account: Any) -> None:
        last = next(passed) == 1
        if last and kills % 2:
            (self.folder / f"{name}.0.arrow").write_bytes(b"ARROW1 and no more")
            os.kill(os.getpid(), 9)
        write(self, name, batches, groups, account)
        if last:
            os.kill(os.getpid(), 9)

    with monkeypatch.context() as patch:
        patch.setattr(Spool, "write", writes)
        while in_a_fork([*words, "run.name=killed"]) == -9:
            kills += 1
            assert kills < 20
    assert kills >= 4
    same(here, whole)


def test_killed_while_it_publishes_it_goes_on(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, publish = sources(here), published.write_data_set
    whole = made(here, *words, "run.name=whole")[1]

    def publishes(*given: Any) -> None:
        publish(*given)
        os.kill(os.getpid(), 9)

    with monkeypatch.context() as patch:
        patch.setattr("align.stages.data.write_data_set", publishes)
        assert in_a_fork([*words, "run.name=killed"]) == -9
    assert "continues" in made(here, *words, "run.name=killed")[2]
    same(here, whole)


def same(here: Path, whole: dict[str, Any]) -> None:
    again = load_data_set(here / "runs" / "data" / "killed" / "artifact").data
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


def test_a_shard_that_was_changed_is_refused(here: Path) -> None:
    folder, _, _ = made(here, *sources(here))
    [path] = (folder / "artifact").glob("train-*.parquet")
    path.chmod(0o644)
    path.write_bytes(path.read_bytes() + b" ")
    shop = Workshop(here / "runs", here)
    shop.refuses(
        "stage=sft",
        "model=pocket",
        "data=manifest",
        f"data.path={folder}",
        f"run.root={here / 'runs'}",
        says="is not the file that was published",
    )


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
    shop.refuses(*dpo, "data.path=data:chats", says="holds documents, and this stage reads preferences")
    sample = ["stage=sample", *common, "stage.prompts=2", "rollout.max_new_tokens=2"]
    assert shop.ended(*sample, "data.path=data:pairs", "run.name=s") in (0, 2), shop.said
    assert "holds" not in shop.said
    shop.refuses(
        "stage=sft",
        *common[1:],
        "data.path=data:pairs",
        says="holds preferences, and conversations or texts are imitated",
    )


def test_an_engine_that_is_not_there_costs_no_part(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = sources(here)
    whole = made(here, *words, "run.name=whole")[1]
    monkeypatch.setitem(sys.modules, "daft", None)
    in_root = [*words, f"run.root={here / 'runs'}", "run.name=killed"]
    assert in_a_fork(in_root, deadly=["align.stages.data.write_data_set"], times=0) == -9
    parts = sorted(path.name for path in (here / "runs" / "data" / "killed" / "checkpoints").iterdir())
    shop = Workshop(here / "runs", here)
    assert shop.ended(*words, "run.name=killed", "stage.engine=daft") == 2
    assert "is not installed here" in shop.said
    assert sorted(path.name for path in (here / "runs" / "data" / "killed" / "checkpoints").iterdir()) == parts != []
    with monkeypatch.context() as patch:
        patch.setattr(Spool, "write", None)  # every part is there
        assert "continues" in made(here, *words, "run.name=killed")[2]
    same(here, whole)
