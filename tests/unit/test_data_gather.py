"""Tests of importing sources into a spool: counts, refused rows, and runs that resume after any part."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.core.errors import CorruptFile, InputError
from align.data.clean.steps import create_steps
from align.data.sets import gather, published
from align.data.sets.gather import FactOptions, SourceImport
from align.data.sets.source import (
    Source,
    detect_row_shapes,
    parse_sources,
    rank_by_name,
    read_data_set_sources,
    resolve_licence,
)
from align.data.sets.spool import Spool, SpoolRows

GOOD = [{"prompt": f"question {i}?", "completion": f"the answer {i} to it"} for i in range(25)]
RANKS = [("a", 1), ("b", 2), ("c", 2)]
BAD = {"prompt": "no answer", "completion": ""}


def write_rows_and_blanks(path: Path, rows: Sequence[Any]) -> Path:
    """Write one row per line. An empty text makes a blank line."""
    path.write_text("".join((json.dumps(row) if row else "") + "\n" for row in rows), encoding="utf-8")
    return path


def create_import(
    folder: Path, path: Path, skips: bool = True, kind: str = "", counts: Sequence[int] = (), **options: Any
) -> SourceImport:
    folder.mkdir(exist_ok=True)
    source = Source("s", str(path), **options)
    steps = create_steps([{"length": {"most": 8, "by": "words"}}])
    return SourceImport(Spool(folder), source, 0, steps, FactOptions(), kind or source.detect_kind(), skips, counts)


def build_mixed_rows() -> list[Any]:
    """Build rows with bad rows at the beginning, within, in runs and at the end, and rows that cleaning drops."""
    rows: list[Any] = [BAD, BAD]
    for i, row in enumerate(GOOD):
        rows.append(row if i % 6 else {"prompt": "long", "completion": " ".join(["word"] * 9)})
        rows += [BAD] * (i % 4 == 3) + [BAD, {"nothing": 1}] * (i % 9 == 8)
    return [*rows, BAD]


def build_tied_pairs() -> list[Any]:
    return [
        {"prompt": f"q {i}", "answers": [{"answer": f"{text} {i}", "rank": rank} for text, rank in RANKS]}
        for i in range(12)
    ]


def build_neighbours() -> list[Any]:
    """Build rows as HelpSteer has them: answers to a prompt in neighbouring rows, with bad rows after some prompts."""
    rows: list[Any] = []
    for i in range(9):
        rows += [{"prompt": f"q {i}", "response": f"a {i} {k}", "helpfulness": k % 3} for k in range(1 + i % 4)]
        rows += [BAD] * (i % 3)
    return rows


def build_trees() -> list[Any]:
    """Build messages of trees without an id of the tree, with blank lines and bad rows among them."""
    rows: list[Any] = []
    for i in range(8):
        rows.append({"message_id": f"{i}", "parent_id": None, "role": "prompter", "text": f"root {i}"})
        for k in range(i % 5):
            rows.append({"message_id": f"{i}.{k}", "parent_id": f"{i}", "role": "assistant", "text": f"answer {i} {k}"})
            rows += [BAD] * (k % 2) + [""] * (i % 3)
    return rows


KINDS = {
    "bad rows": build_mixed_rows(),
    "pairs": build_tied_pairs(),
    "neighbours": build_neighbours(),
    "trees": build_trees(),
}


@pytest.fixture(params=KINDS)
def rows(request: pytest.FixtureRequest) -> list[Any]:
    return KINDS[request.param]


@pytest.mark.parametrize("part", [1, 2, 3, 5, 7, 100])
@pytest.mark.parametrize("order", ["in order", "backwards", "each by another", "some are there"])
def test_parts_are_the_same_whoever_makes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Any], part: int, order: str
) -> None:
    """All rows of all parts, and their account, are those of a single part. Rows that are read together stand in two
    files, and at the edge of two parts."""
    write_rows_and_blanks(tmp_path / "whole.jsonl", rows)
    (tmp_path / "shards").mkdir()
    for name, shard_rows in (("0", rows[:11]), ("1", rows[11:12]), ("2", rows[12:])):
        write_rows_and_blanks(tmp_path / "shards" / f"{name}.jsonl", shard_rows)
    shards = tmp_path / "shards"
    counts = [11, 1, len(rows) - 12]
    expected = create_import(tmp_path / "one part", shards).run()
    monkeypatch.setattr(gather, "PART", part)
    numbers = [*range(-(-len(rows) // part))]
    source_import = create_import(tmp_path / "parts", shards, counts=counts)
    for number in {"in order": [], "some are there": numbers[::3]}.get(order, numbers[::-1]):
        source_import = (
            create_import(tmp_path / "parts", shards, counts=counts) if order == "each by another" else source_import
        )
        source_import.write(number)
    assert source_import.run() == expected
    spools = [SpoolRows(Spool(tmp_path / name)) for name in ("one part", "parts")]
    for name in ("content_id", "row", "digest"):
        assert np.array_equal(*(rows.load_numbers(name) for rows in spools))
    assert spools[0].count > 5 or rows == build_tied_pairs()
    if rows == build_tied_pairs():
        assert expected["counts"]["dropped_undecided"] == 12
    assert expected["counts"]["read"] == expected["counts"]["kept"] + sum(step["dropped"] for step in expected["clean"])


def test_a_part_ends_with_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused row is counted with its own part, although records are read beyond it. Empty parts are written."""
    monkeypatch.setattr(gather, "PART", 4)
    path = write_rows_and_blanks(tmp_path / "rows.jsonl", [GOOD[0], BAD, "", "", "", BAD, *[""] * 8, GOOD[1], BAD])
    source_import = create_import(tmp_path / "spool", path)
    source_import.run()
    accounts = [source_import.spool.read_part_counts(part) for part in source_import.spool.parts()]
    assert [account["counts"]["skipped_rows"] for account in accounts] == [1, 1, 0, 1]
    assert [account["counts"]["read"] for account in accounts] == [1, 0, 0, 1]
    assert [account["last"] for account in accounts] == [False, False, False, True]


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_ids_are_sorted_a_part_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(published, "SORTED_AT_ONCE", at_once)
    path = write_rows_and_blanks(
        tmp_path / "rows.jsonl", [{"prompt": f"p {i % 50}", "completion": "c"} for i in range(90)]
    )
    create_import(tmp_path / "spool", path).run()
    rows = SpoolRows(Spool(tmp_path / "spool"))
    is_selected = np.arange(rows.count) % 3 > 0
    ids = [bytes(id) for id in rows.load_numbers("content_id")[is_selected]]
    assert len({*ids}) > 30
    assert [*published.iter_unique_ids(rows, is_selected)] == sorted({*ids})
    assert rows.load_first_bits("content_id")[is_selected].tolist() == [int.from_bytes(id[:8], "big") for id in ids]


def test_a_row_that_is_refused_ends_it_unless_it_is_left_out(tmp_path: Path) -> None:
    path = write_rows_and_blanks(tmp_path / "rows.jsonl", build_mixed_rows())
    with pytest.raises(InputError, match=r"rows\.jsonl, row 1, completion=.*more are refused.*data\.on_bad_row=skip"):
        create_import(tmp_path / "spool", path, skips=False).run()
    account = create_import(tmp_path / "other", path).run()
    assert account["counts"]["skipped_rows"] == sum(row == BAD or "nothing" in row for row in build_mixed_rows())


@pytest.mark.parametrize(
    ("rows", "source", "says"),
    [
        ([GOOD[0], {"prompt": "a", "chosen": "b", "rejected": "c"}], {}, "row 2=preferences: the rows before"),
        ([{**GOOD[0], "license": "GPL-3"}], {"licence": "MIT"}, "row 1, licence=GPL-3: contradicts the source's"),
        ([{"prompt": "a", "completion": "b " * 9}], {}, "is empty after cleaning: of its 1 records none is left"),
    ],
)
def test_what_is_refused(tmp_path: Path, rows: list[Any], source: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        create_import(tmp_path / "spool", write_rows_and_blanks(tmp_path / "rows.jsonl", rows), **source).run()
    assert says in str(caught.value)


def test_another_kind_than_that_of_the_sources_before(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the rows before it are feedback"):
        create_import(tmp_path / "spool", write_rows_and_blanks(tmp_path / "rows.jsonl", GOOD), kind="feedback").run()


def test_licences_of_rows_are_counted(tmp_path: Path) -> None:
    rows = [{**row, "licence": "MIT" if i % 2 else "Apache-2.0"} for i, row in enumerate(GOOD)]
    with pytest.raises(InputError, match=r"stage\.sources\.s=Apache-2\.0, MIT: are the licences of its rows"):
        create_import(tmp_path / "spool", write_rows_and_blanks(tmp_path / "rows.jsonl", rows)).run()
    mit_rows = [{**row, "license": "MIT"} for row in GOOD]
    account = create_import(
        tmp_path / "other", write_rows_and_blanks(tmp_path / "rows.jsonl", mit_rows), licence="mit"
    ).run()
    assert account["licences"] == {"MIT": 25}


def test_a_damaged_account_is_told(tmp_path: Path) -> None:
    source_import = create_import(tmp_path / "spool", write_rows_and_blanks(tmp_path / "rows.jsonl", GOOD))
    source_import.run()
    [part] = source_import.spool.parts()
    part.with_suffix(".json").write_text("{")
    with pytest.raises(CorruptFile, match="checkpoints"):
        source_import.spool.read_part_counts(part)


def test_a_part_of_another_format_is_refused(tmp_path: Path):
    source_import = create_import(tmp_path / "spool", write_rows_and_blanks(tmp_path / "rows.jsonl", GOOD))
    source_import.run()
    [part] = source_import.spool.parts()
    path = part.with_suffix(".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))
    with pytest.raises(InputError, match="another version of align"):
        create_import(tmp_path / "spool", tmp_path / "rows.jsonl").run()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "is no list of sources"),
        ("a.jsonl", "is no list of sources"),
        ([], "is no list of sources"),
        ([3], "stage.sources[0]=3: is no source"),
        ([{"path": "a", "wieght": 1}], "Did you mean weight?"),
        ([{"name": "x"}], "names no rows, or two kinds"),
        ([{"path": ""}], "stage.sources[0].path=: names no file"),
        ([{"path": "a", "data": "chitchat"}], "names no rows, or two kinds"),
        ([{"path": 3}], "stage.sources[0].path=3: is no text"),
        ([{"data": "c4"}], "data=c4: is no corpus"),
        ([{"data": "chitchat", "part": "dev"}], "part=dev: is no part"),
        ([{"path": "a", "part": "sft"}], "part=sft: applies only with"),
        ([{"path": "a", "name": "a b"}], "name=a b: cannot be a name"),
        ([{"path": "a", "weight": 1e-7}], "weight=1e-07: is no share"),
        ([{"path": "a", "weight": "much"}], "weight=much: is no share"),
        ([{"path": "a", "weight": True}], "is no share"),
        ([{"path": "a", "weight": float("nan")}], "is no share"),
        ([{"path": "a", "cap": 0}], "cap=0: is no number of rows"),
        ([{"path": "a", "cap": 1.5}], "is no number of rows"),
        ([{"path": "a", "columns": ["b"]}], "maps no columns"),
        ([{"path": "a", "name": "x"}, {"path": "b", "name": "x"}], "name=x: is another source's too"),
    ],
)
def test_sources_that_are_none(given: Any, says: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_sources(given)
    assert says in str(caught.value)


def test_names_of_sources() -> None:
    entries = [
        "x/rows.jsonl.gz",
        {"path": "y/rows.parquet"},
        {"path": "logs/*.jsonl"},
        {"data": "chitchat"},
        "hub:org/my set",
    ]
    sources = parse_sources(entries)
    assert [source.name for source in sources] == ["rows", "rows-2", "logs", "chitchat", "my-set"]
    assert sources[3].licence == "MIT"
    assert rank_by_name(sources, ["logs"], "prefer") == [1, 2, 0, 4, 5]


@pytest.mark.parametrize(
    ("stated", "given", "licence"),
    [
        ([], "", ""),
        ([], "MIT", "MIT"),
        ([None, None], "", ""),
        (["MIT", "mit"], "", "mit"),
        (["MIT"], "mit", "mit"),
        ([None], "MIT", "MIT"),
        (["MIT", "GPL-3"], "see LICENSES", "see LICENSES"),
        (["MIT", "GPL-3"], "", InputError("x.licence", "GPL-3, MIT", "are the licences", "licence: …")),
        (["MIT", None], "", InputError("x.licence", r"\(not said\), MIT", "are the licences", "licence: …")),
        (["MIT"], "GPL-3", InputError("x.licence", "GPL-3", "contradicts the data set's licence, MIT", "Correct")),
    ],
)
def test_the_licence_of_a_data_set(stated: list[Any], given: str, licence: str | InputError) -> None:
    sources = [{"licence": stated_licence} for stated_licence in stated]
    if isinstance(licence, str):
        assert resolve_licence(sources, given, "x.licence") == licence
        return
    with pytest.raises(InputError, match=f"{licence.field}={licence.value}: {licence.problem}.*{licence.remedy}"):
        resolve_licence(sources, given, "x.licence")


def test_licences_of_a_data_set_are_those_of_sources_with_rows_on_the_sides_that_are_read(tmp_path: Path) -> None:
    rows_by_side = {"mit": (30, 0), "gpl": (0, 10), "copies": (0, 0)}
    sources = [
        {"name": name, "splits": {"train": {"rows": train}, "test": {"rows": test}}}
        for name, (train, test) in rows_by_side.items()
    ]
    (tmp_path / "data.json").write_text(json.dumps({"sources": sources}))
    shards = [tmp_path / f"{side}-00000-of-00001.parquet" for side in ("train", "test")]

    def read_names(files: Sequence[Path]) -> list[str]:
        return [source["name"] for source in read_data_set_sources(files, "stage.sources.x")]

    assert read_names(shards[:1]) == ["mit"]
    assert read_names(shards[1:]) == ["gpl"]
    assert read_names(shards) == ["mit", "gpl"]
    assert read_names([tmp_path / "rows.parquet"]) == []


def test_what_the_first_rows_are_taken_for(tmp_path: Path) -> None:
    rows: list[Any] = [{"question": f"q {i}", "answer": "a", "topic": None if i else "t"} for i in range(4)]
    rows += [{"text": "plain"}, {"nothing": 1}]
    path = write_rows_and_blanks(tmp_path / "rows.jsonl", rows)
    path.write_text(path.read_text() + "no JSON\n")
    detected = detect_row_shapes(Source("s", str(path)))
    assert detected["shapes"] == {"a question and its answer": 4, "plain text": 1}
    assert (detected["rows"], detected["columns"]) == (5, ["question", "answer", "topic", "text"])
    mapped = detect_row_shapes(Source("s", str(path), columns={"prompt": "question", "completion": "answer"}))
    assert mapped["shapes"] == {"a prompt and its completion": 4}
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    assert detect_row_shapes(Source("s", str(tmp_path / "cut.parquet")))["rows"] == 0
    assert detect_row_shapes(Source("s", data="chitchat")) == {"rows": 0, "shapes": {}, "columns": []}


def test_rows_are_taken_in_the_order_that_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "BATCH", 4)
    source_import = create_import(tmp_path / "spool", write_rows_and_blanks(tmp_path / "rows.jsonl", GOOD))
    source_import.run()
    rows = SpoolRows(source_import.spool)
    assert rows.count == 25
    for order in ([7, 3, 24, 3, 0], [5], [*range(24, -1, -1)]):
        assert rows.take(np.array(order), ["row"])["row"].to_pylist() == [number + 1 for number in order]


def test_rows_that_ask_nothing_are_not_the_same(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"only a question {i}"}]} for i in range(5)]
    source_import = create_import(tmp_path / "spool", write_rows_and_blanks(tmp_path / "rows.jsonl", rows))
    source_import.options = FactOptions(over="answers")
    source_import.run()
    assert len({bytes(row) for row in SpoolRows(source_import.spool).load_numbers("digest")}) == 5
