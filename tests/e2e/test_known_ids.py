"""Content ids that are taken from a data set are those that its rows have: what a run writes is the same."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_of_votes import filled, making
from data_sets import chat, made, sentence, write

from align.config.compose import check, compose_raw
from align.config.root import Config
from align.data.pairs import read_pairs
from align.data.sets.ids import Known, remembered
from align.data.sets.published import data_set
from align.data.sources import divided_documents, prepared, prompts
from align.data.trained_ids import FILE, write_ids
from align.stages.rows import naming_of, source_of, store_url

Draw = Callable[[Config], list[Any]]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]}
CHANGED = ("data.system=Be brief.", "data.reasoning=hide")
"""Settings that change rows: these have other ids than in the data set."""


def documents(config: Config) -> list[Any]:
    return list(divided_documents(source_of(config), 3)[0])


def questions(config: Config) -> list[Any]:
    return list(prompts(source_of(config), "train", 3))


def pairs(config: Config) -> list[Any]:
    source = source_of(config)
    return [prepared(pair, source) for pair in read_pairs(source, store_url(config), config.project, False, 3)]


def of_every_form(here: Path) -> list[str]:
    """Conversations with tools, reasoning, system prompts, turns that are not trained on, and plain text."""
    rows: list[dict[str, Any]] = []
    for i in range(12):
        plain, said = chat(f"What of {i}?", f"é {i} 🙂"), chat(f"Why {i}?", f"<think>\nHm {i}\n</think>\n\nSo {i}.")
        system = chat(f"Which {i}?", f"That {i}.")
        system["messages"].insert(0, {"role": "system", "content": "Be brief." if i % 2 else "Be long."})
        longer = chat(f"How {i}?", f"Thus {i}.")
        longer["messages"] = [*chat(f"And {i}?", "Not this.")["messages"], *longer["messages"]]
        longer["messages"][1]["train"] = False
        rows += [plain, said, system, longer, {"text": sentence_of(i)}]
        called = chat(f"Call {i}", f"It is {i}.")
        called["messages"][1:1] = [CALL, {"role": "tool", "content": f"{i}"}]
        rows.append({"tools": [{"name": "f"}], **called})
    path = write(here / "rows.jsonl", rows)
    return ["stage=data", f"stage.sources=[{path}]", f"run.root={here / 'runs'}", "data.held_out=0.1",
            "stage.duplicates.near=null", "stage.contamination.test=false"]  # fmt: skip


def sentence_of(i: int) -> str:
    return sentence(random.Random(i), i)


def taken(config: Config, draw: Draw, folder: Path) -> tuple[int, int]:
    """How many rows are given, and how many have the id with which they were read; what is written is the same."""
    with remembered() as known:
        rows = draw(config)
    system = config.data.system or None
    roots = write_ids(folder, rows, naming_of(config), system, known)
    written = (folder / FILE).read_bytes()
    assert write_ids(folder, rows, naming_of(config), system, Known()) == roots != {}
    assert (folder / FILE).read_bytes() == written
    return len(rows), sum(known.content_id(row) is not None for row in rows)


@pytest.mark.parametrize("more", [(), ("data.limit=20",), *[(word,) for word in CHANGED]])
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_documents(tmp_path: Path, stage: str, more: tuple[str, ...]) -> None:
    made(tmp_path, *of_every_form(tmp_path), "stage.mix.repeat=2", "stage.mix.total=90", "run.name=all")
    path = tmp_path / "runs" / "data" / "all" / "artifact"
    ids = [id for table in data_set(path).tables("train") for id in table["content_id"].to_pylist()]
    assert {*Counter(ids).values()} == {1, 2}
    config = check(compose_raw([f"stage={stage}", "data=manifest", f"data.path={path}", "model=pocket", *more]))
    count, known = taken(config, documents if stage == "sft" else questions, tmp_path)
    assert count > 0
    if stage == "ppo":
        assert known == 0  # a question is not the row that it stands in
    elif more and more[0] in CHANGED:
        assert 0 < known < count
    else:
        assert known == count == (20 if more else 90)


@pytest.mark.parametrize("more", [(), ("data.limit=20",), ("data.system=Be brief.",)])
def test_pairs_of_files_and_votes(tmp_path: Path, store_url: str, more: tuple[str, ...]) -> None:
    """Ids of votes are computed each time: whether there is a key is another question each time. So are those of rows
    that ask what a vote asks."""
    words = making(tmp_path, store_url)
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.writelines(f'{{"prompt": "What of day {i}?", "chosen": "a {i}", "rejected": "b"}}\n' for i in range(12))
    with filled(store_url):
        made(tmp_path, *words, "run.name=votes")
        path = tmp_path / "runs" / "data" / "votes" / "artifact"
        words = ["stage=reward", "data=manifest", f"data.path={path}", f"store.url={store_url}", "model=pocket", *more]
        config = check(compose_raw(words))
        files = sum(row.source != "human" for row in pairs(config))
        count, known = taken(config, pairs, tmp_path)
    sources = data_set(path).sources("train")
    if "data.limit=20" in more:
        assert count == 20
    else:
        assert (count, files) == (len(sources), sources.count("file"))
    assert 0 < files < count
    assert known == (0 if "data.system=Be brief." in more else files)


def test_labelled_answers(tmp_path: Path) -> None:
    rows = [{"prompt": f"Is it {i}?", "completion": f"Yes, {i}.", "label": i % 2 == 0} for i in range(30)]
    words = ["stage=data", f"stage.sources=[{write(tmp_path / 'l.jsonl', rows)}]", f"run.root={tmp_path / 'runs'}"]
    folder, _, _ = made(tmp_path, *words)
    with remembered() as known:
        found = data_set(folder / "artifact").records("train")
    assert write_ids(tmp_path, found, known=known) == write_ids(tmp_path, found)
    assert all(known.content_id(record) for record in found)
