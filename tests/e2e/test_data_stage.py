"""`stage=data` from files to a data set and into training: every dropped row is counted, and neither interruptions nor
divided work change the roots."""

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
from data_sets import build_data_set, build_sources_command, write_three_sources
from json_lines import write_rows
from stage_commands import Workshop, run_in_fork
from vote_data import compute_merkle_leaves, compute_merkle_root, read_artifact_pairs

from align.data.sets import gather, published
from align.data.sets.published import load_data_set
from align.data.sets.spool import Spool
from align.report.data_set_page import iter_drop_counts


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return write_three_sources(tmp_path)


def test_every_row_is_in_or_counted(here: Path) -> None:
    table = "{path: %s, name: table, columns: {prompt: question, completion: answer}}" % (here / "table.csv")
    arguments = [
        *build_sources_command(here, table),
        f"stage.contamination.against=[{here / 'evals.jsonl'}]",
        "data.held_out=0.2",
    ]
    folder, data, stdout = build_data_set(here, *arguments)
    for source in data["sources"]:
        kept = sum(source["splits"][side]["rows"] for side in ("train", "test"))
        assert source["counts"]["read"] == kept + sum(
            n for reason, n in iter_drop_counts(source) if reason not in ("refused", "undecided")
        ), stdout
    by_name = {source["name"]: dict(iter_drop_counts(source)) for source in data["sources"]}
    expected = {"refused": 0, "dropped in cleaning": 0, "exact duplicates": 12, "near-duplicates": 8, "over the cap": 0}
    assert expected.items() <= by_name["support"].items()
    assert by_name["general"]["like evaluation rows"] == by_name["table"]["like evaluation rows"] == 1
    assert {evaluation["set"]: sum(evaluation["hits"].values()) for evaluation in data["evaluations"][:1]} == {
        str(here / "evals.jsonl"): 2
    }
    assert "exact duplicates 12, near-duplicates 8" in stdout
    report = (folder / "report.html").read_text()
    assert "Where every row went" in report
    assert "The largest clusters of duplicates" in report
    assert "Traceback" not in (folder / "log.txt").read_text()


def test_workers_make_the_same_data_set(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers in this process stand in for Daft's, which `benchmarks/data/engines.py` starts."""
    arguments = [*build_sources_command(here), f"stage.contamination.against=[{here / 'evals.jsonl'}]"]
    _, single, _ = build_data_set(here, *arguments, "run.name=whole")
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
    folder, divided, _ = build_data_set(here, *arguments, "stage.engine=ray", "stage.workers=3", "stage.ray=auto")
    assert started == [(True, 3, "auto")]
    assert task_counts == [2, 9, 6]  # files, pieces of them, packs of near-duplicates
    for key in ("root", "ids_root", "splits", "sources", "lengths", "found", "evaluations"):
        assert divided[key] == single[key]
    second_folder, _, stdout = build_data_set(here, *arguments)
    assert second_folder == folder
    assert len(task_counts) == 3
    assert "finished already" in stdout


def test_the_fingerprint_is_that_of_the_rows(here: Path) -> None:
    folder, data, _ = build_data_set(here, *build_sources_command(here))
    for side in ("train", "test"):
        leaves = compute_merkle_leaves(folder / "artifact", side)
        assert data["splits"][side]["root"] == compute_merkle_root(leaves).hex()
    for row in read_artifact_pairs(folder):
        content = json.dumps({"messages": row["messages"]}, sort_keys=True, separators=(",", ":"))
        assert hashlib.sha256(content.encode()).hexdigest() == row["content_id"]


def test_it_is_read_by_datasets(here: Path) -> None:
    folder, data, _ = build_data_set(here, *build_sources_command(here))
    loaded = datasets.load_dataset(str(folder / "artifact"), cache_dir=str(here / "cache"))
    assert {side: len(loaded[side]) for side in loaded} == {s: data["splits"][s]["rows"] for s in ("train", "test")}
    assert set(loaded["train"].column_names) == {
        "messages",
        "content_id",
        "question_id",
        "source",
        "row",
        "cluster",
        "metadata",
    }


def test_the_same_roots_however_the_work_is_divided(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = build_data_set(here, *build_sources_command(here), "run.name=whole")[1]
    for batch, part, shard in ((1, 7, 10), (13, 50, 33)):
        for module, name, value in ((gather, "BATCH", batch), (gather, "PART", part), (published, "SHARD_ROWS", shard)):
            monkeypatch.setattr(module, name, value)
        divided = build_data_set(here, *build_sources_command(here), f"run.name=divided-{part}")[1]
        for key in ("root", "ids_root", "splits", "sources", "lengths"):
            assert divided[key] == expected[key]


def test_killed_while_it_reads_it_goes_on(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is killed in a part and after one, by turns. Each attempt passes two parts."""
    arguments = build_sources_command(here)
    write_part = Spool.write
    expected = build_data_set(here, *arguments, "run.name=whole")[1]
    monkeypatch.setattr(gather, "PART", 40)
    passed_parts = count()
    kills = 0

    def write_or_kill(self: Spool, name: str, batches: Any, groups: Any, account: Any) -> None:
        is_last = next(passed_parts) == 1
        if is_last and kills % 2:
            (self.folder / f"{name}.0.arrow").write_bytes(b"ARROW1 and no more")
            os.kill(os.getpid(), 9)
        write_part(self, name, batches, groups, account)
        if is_last:
            os.kill(os.getpid(), 9)

    with monkeypatch.context() as patch:
        patch.setattr(Spool, "write", write_or_kill)
        while run_in_fork([*arguments, "run.name=killed"]) == -9:
            kills += 1
            assert kills < 20
    assert kills >= 4
    check_same_roots(here, expected)


def test_killed_while_it_publishes_it_goes_on(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = build_sources_command(here)
    publish = published.write_data_set
    expected = build_data_set(here, *command, "run.name=whole")[1]

    def publish_and_kill(*arguments: Any) -> None:
        publish(*arguments)
        os.kill(os.getpid(), 9)

    with monkeypatch.context() as patch:
        patch.setattr("align.stages.data.write_data_set", publish_and_kill)
        assert run_in_fork([*command, "run.name=killed"]) == -9
    assert "continues" in build_data_set(here, *command, "run.name=killed")[2]
    check_same_roots(here, expected)


def check_same_roots(folder: Path, expected: dict[str, Any]) -> None:
    resumed = load_data_set(folder / "runs" / "data" / "killed" / "artifact").data
    assert (resumed["root"], resumed["ids_root"], resumed["sources"]) == (
        expected["root"],
        expected["ids_root"],
        expected["sources"],
    )


def test_training_reads_it(here: Path, tiny_model: Path) -> None:
    _, data, _ = build_data_set(here, *build_sources_command(here), "data.held_out=0.2")
    shop = Workshop(here / "runs", here)
    sft = [
        "stage=sft",
        "model=hub",
        f"model.path={tiny_model}",
        "data=manifest",
        "data.path=data:latest",
        "stage.max_steps=1",
        "data.too_long=truncate",
        f"run.root={here / 'runs'}",
        "device=cpu",
        "stage.eval_size=3",
    ]
    assert shop.run_command(*sft) == 0, shop.output
    manifest = json.loads((Path(shop.output.splitlines()[-1]) / "manifest.json").read_text())
    assert manifest["inputs"]["data"]["root"] == data["root"]
    assert manifest["metrics"]["train_rows"] == data["splits"]["train"]["rows"]
    second_shop = Workshop(here / "runs", here)
    assert second_shop.run_command(*sft) == 0
    assert "finished already" in second_shop.output


def test_a_shard_that_was_changed_is_refused(here: Path) -> None:
    folder, _, _ = build_data_set(here, *build_sources_command(here))
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
    """The stages `sample` and `dpo` read prompts and pairs. Each refuses the other kind with a remedy."""
    shop = Workshop(here / "runs", here)
    rows = [{"prompt": f"q{i}?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(30)]
    path = write_rows(here / "pairs.jsonl", rows)
    root = f"run.root={here / 'runs'}"
    build_data_set(here, "stage=data", f"stage.sources=[{path}]", "run.name=pairs", "data.held_out=0.3", root)
    build_data_set(here, *build_sources_command(here), "run.name=chats")
    common = ["init=base", "model=hub", f"model.path={tiny_model}", "method=lora", root, "device=cpu", "data=manifest"]
    dpo = ["stage=dpo", *common, "stage.epochs=1", "stage.batch_size=16"]
    assert shop.run_command(*dpo, "data.path=data:pairs") == 0, shop.output
    shop.refuses(*dpo, "data.path=data:chats", says="holds documents, but this stage reads preferences")
    sample = ["stage=sample", *common, "stage.prompts=2", "rollout.max_new_tokens=2"]
    assert shop.run_command(*sample, "data.path=data:pairs", "run.name=s") in (0, 2), shop.output
    assert "holds" not in shop.output
    shop.refuses(
        "stage=sft",
        *common[1:],
        "data.path=data:pairs",
        says="holds preferences, but this stage trains on conversations or texts",
    )


def test_an_engine_that_is_not_there_costs_no_part(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = build_sources_command(here)
    expected = build_data_set(here, *arguments, "run.name=whole")[1]
    monkeypatch.setitem(sys.modules, "daft", None)
    killed_command = [*arguments, f"run.root={here / 'runs'}", "run.name=killed"]
    assert run_in_fork(killed_command, deadly=["align.stages.data.write_data_set"], times=0) == -9
    parts = sorted(path.name for path in (here / "runs" / "data" / "killed" / "checkpoints").iterdir())
    shop = Workshop(here / "runs", here)
    assert shop.run_command(*arguments, "run.name=killed", "stage.engine=daft") == 2
    assert "is not installed here" in shop.output
    assert sorted(path.name for path in (here / "runs" / "data" / "killed" / "checkpoints").iterdir()) == parts != []
    with monkeypatch.context() as patch:
        patch.setattr(Spool, "write", None)  # every part is written already
        assert "continues" in build_data_set(here, *arguments, "run.name=killed")[2]
    check_same_roots(here, expected)
