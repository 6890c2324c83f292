"""Parts that workers make ahead: the same rows, accounts and errors as where one process reads everything."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from socket import gethostname
from threading import Timer
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.core.chain import ChainHead
from align.core.errors import InputError
from align.core.types import Conversation, Message
from align.data import chitchat
from align.data.clean.steps import create_steps
from align.data.sets import gather, parallel
from align.data.sets.duplicates import find_near_duplicates, rank_rows
from align.data.sets.gather import FactOptions, SourceImport
from align.data.sets.parallel import RowCount, TaskRunner, in_process_runner, split_parts, write_parts_in_workers
from align.data.sets.source import Source, VoteSnapshot
from align.data.sets.spool import Spool, SpoolRows

BAD = {"prompt": "no answer", "completion": ""}


def rows_of(name: str, count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{name} {i}?", "completion": f"the answer {i} of {name}"} for i in range(count)]


def lines(path: Path, rows: Sequence[Any], opened: Callable[..., Any] = open) -> None:
    path.parent.mkdir(exist_ok=True)
    with opened(path, "wt") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Source]:
    """Lines with bad rows and blank ones; shards of several formats; a table; nothing that is a file; a small one."""
    monkeypatch.setattr(gather, "PART", 5)
    rows: list[Any] = rows_of("a", 31)
    rows[3:3] = [BAD, "{no json", "", "", "", "", "", BAD]
    lines(tmp_path / "a.jsonl", [*rows, BAD, "", ""])
    lines(tmp_path / "b" / "0.jsonl.gz", rows_of("b0", 13), gzip.open)
    pq.write_table(pa.Table.from_pylist(rows_of("b1", 11)), tmp_path / "b" / "1.parquet", row_group_size=4)
    (tmp_path / "b" / "2.json").write_text(json.dumps(rows_of("b2", 9)))
    lines(tmp_path / "c.csv", ["question,answer", *(f"c {i}?,the answer {i}" for i in range(12))])
    lines(tmp_path / "d.jsonl", rows_of("d", 2))
    few = [Conversation((Message("user", f"e {i}?"), Message("assistant", f"the answer {i} of e"))) for i in range(8)]
    monkeypatch.setattr(chitchat, "load_conversations", lambda part: few)
    paths = {
        name: str(tmp_path / path) for name, path in zip("abcd", ("a.jsonl", "b", "c.csv", "d.jsonl"), strict=True)
    }
    return [*(Source(name, path) for name, path in paths.items()), Source("e", data="chitchat", part="test")]


def gatherings(folder: Path, sources: Sequence[Source], skips: bool = True) -> list[SourceImport]:
    folder.mkdir(exist_ok=True)
    steps, kind = create_steps(["control", {"length": {"least": 4, "by": "words"}}]), sources[0].kind()
    return [
        SourceImport(Spool(folder), source, number, steps, FactOptions(), kind, skips)
        for number, source in enumerate(sources)
    ]


def any_order(seed: int) -> TaskRunner:
    """Tasks in any order, and as travellers."""

    def run(do: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        numbered = list(enumerate(tasks))
        random.Random(seed).shuffle(numbered)
        do = pickle.loads(pickle.dumps(do))
        for number, task in numbered:
            yield number, pickle.loads(pickle.dumps(do(pickle.loads(pickle.dumps(task)))))

    return run


def processes(do: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    with ProcessPoolExecutor(2, get_context("fork")) as pool:
        given = {pool.submit(do, task): number for number, task in enumerate(tasks)}
        for future in as_completed(given):
            yield given[future], future.result()


def all_of(made: Sequence[SourceImport]) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """The account of each source, and all that the spool holds of the rows."""
    accounts, rows = [one.run() for one in made], SpoolRows(made[0].spool)
    return accounts, [np.ascontiguousarray(rows.numbers(name)).tolist() for name in ("content_id", "source", "row")]


@pytest.mark.parametrize(
    "engine", [in_process_runner, *map(any_order, range(3)), processes], ids=["e", "0", "1", "2", "p"]
)
def test_the_same_as_in_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sources: list[Source], engine: TaskRunner
) -> None:
    whole = all_of(gatherings(tmp_path / "one", sources))
    assert whole[0][0]["counts"]["skipped_rows"] == 4
    made = gatherings(tmp_path / "many", sources)
    write_parts_in_workers(engine, made)
    assert [len(one.parts()) for one in made] == [9, 7, 3, 1, 0]
    write = SourceImport.write

    def alone(self: SourceImport, part: int) -> dict[str, Any]:
        assert not self.source.path, f"{self.name(part)} was left"
        return write(self, part)

    monkeypatch.setattr(SourceImport, "write", alone)
    assert all_of(made) == whole


@pytest.mark.parametrize("seed", range(4))
def test_cut_off_at_any_task_it_goes_on(tmp_path: Path, sources: list[Source], seed: int) -> None:
    """Other workers go on, and then one process alone."""
    whole = all_of(gatherings(tmp_path / "one", sources))

    def cut(do: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        left = 3 if do is not parallel.count_file else len(tasks)
        for found in any_order(seed)(do, tasks):
            if not left:
                raise KeyboardInterrupt
            yield found
            left -= 1

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            write_parts_in_workers(cut, gatherings(tmp_path / "many", sources))
    there = len(Spool(tmp_path / "many").parts())
    assert 6 <= there < 20
    assert all_of(gatherings(tmp_path / "many", sources)) == whole


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
MIT, GPL = {"licence": "MIT"}, {"license": "GPL-3"}


def wrong(folder: Path, name: str) -> tuple[list[Source], bool]:
    """Sources with a mistake far behind their beginning, mostly; and whether bad rows are left out."""
    rows: list[Any] = rows_of("a", 40)
    about: dict[str, Any] = {}
    if name == "bad rows":
        rows[22:24], rows[33] = [BAD, "{no json"], BAD
    elif name == "another kind":
        rows[21] = PAIR
    elif name == "another kind in another source":
        lines(folder / "second.jsonl", [PAIR])
    elif name == "a licence that contradicts":
        rows[28], about = {**rows[28], **GPL}, MIT
    elif name == "licences":
        rows[2], rows[28] = {**rows[2], **MIT}, {**rows[28], **GPL}
    elif name == "nothing is left":
        rows = [{"prompt": "a", "completion": "b"}] * 12
    elif name == "nothing is there":
        rows = []
    elif name == "several":
        rows[31], rows[12] = PAIR, {**rows[12], **GPL}
        about = MIT
    lines(folder / "first.jsonl", rows)
    found = [Source("first", str(folder / "first.jsonl"), **about)]
    if name in ("cut", "cut behind bad rows"):
        with gzip.open(folder / "first.jsonl.gz", "wt", compresslevel=0) as file:
            file.writelines(json.dumps(BAD if name != "cut" and i == 7 else row) + "\n" for i, row in enumerate(rows))
        whole = (folder / "first.jsonl.gz").read_bytes()
        (folder / "first.jsonl.gz").write_bytes(whole[: len(whole) * 2 // 3])
        found = [Source("first", str(folder / "first.jsonl.gz"))]
    if name == "a quote":
        lines(folder / "first.csv", ["prompt,completion", *(f"a {i},b {i}" for i in range(30)), '"no end,b'])
        found = [Source("first", str(folder / "first.csv"))]
    if name == "another kind in another source":
        found.append(Source("second", str(folder / "second.jsonl")))
    return found, name not in ("bad rows", "cut behind bad rows")


WRONG = [
    "bad rows", "another kind", "another kind in another source", "a licence that contradicts", "licences",
    "nothing is left", "nothing is there", "several", "cut", "cut behind bad rows", "a quote",
]  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("engine", [*map(any_order, range(2)), processes], ids=["0", "1", "p"])
def test_errors_are_the_same_whoever_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: TaskRunner, name: str
) -> None:
    monkeypatch.setattr(gather, "PART", 5)
    found, skips = wrong(tmp_path, name)
    said = []
    for folder in ("one", "many"):
        made = gatherings(tmp_path / folder, found, skips)
        if folder == "many":
            write_parts_in_workers(engine, made)
        with pytest.raises(InputError) as caught:
            all_of(made)
        said.append((type(caught.value), str(caught.value)))
    assert said[0] == said[1]


def test_nobody_works_on_what_is_behind_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "PART", 5)
    found, skips = wrong(tmp_path, "bad rows")  # in the fifth part of eight
    made = gatherings(tmp_path / "many", [found[0], Source("later", found[0].path)], skips)
    write_parts_in_workers(in_process_runner, made)
    assert [one.parts() for one in made] == [{0, 1, 2, 3, 4}, set()]
    lines(Path(found[0].path), rows_of("a", 40))  # another run, in the same folder
    again = gatherings(tmp_path / "many", [found[0], Source("later", found[0].path)], skips)
    write_parts_in_workers(in_process_runner, again)
    assert [len(one.parts()) for one in again] == [8, 8]


def elsewhere(do: Callable[[Any], Any], tasks: Sequence[Any], work: Callable[[Any], Any]) -> Iterator[tuple[int, Any]]:
    """Files are counted here; parts are made by `write_task_parts`."""
    return enumerate(map(do if do is parallel.count_file else work, tasks))


def test_workers_without_the_runs_folder_leave_their_parts_to_this_process(
    tmp_path: Path, sources: list[Source], capsys: pytest.CaptureFixture[str]
) -> None:
    """They can leave no mark there, either; and it is told once of each source."""
    there = {one.number: one for one in gatherings(tmp_path / "gone", sources[:2])}
    (tmp_path / "gone").rmdir()
    made, whole = gatherings(tmp_path / "many", sources[:2]), all_of(gatherings(tmp_path / "one", sources[:2]))
    write_parts_in_workers(
        lambda do, tasks: elsewhere(do, tasks, lambda task: parallel.write_task_parts(there, task)), made
    )
    assert [one.parts() for one in made] == [set(), set()]
    assert all_of(made) == whole
    said = [line for line in capsys.readouterr().out.splitlines() if "process makes" in line]
    assert [line.partition(". ")[0] for line in said] == [
        "a: parts that this process makes: 9 of 9", "b: parts that this process makes: 7 of 7",
    ]  # fmt: skip
    assert "A worker could not make part 0: " in said[0]
    assert "No such file or directory" in said[0]


def test_workers_whose_disk_is_full_leave_their_parts_to_this_process(
    tmp_path: Path, sources: list[Source], capsys: pytest.CaptureFixture[str]
) -> None:
    full, made = gatherings(tmp_path / "full", sources[:1]), gatherings(tmp_path / "many", sources[:1])
    for part in range(9):
        (tmp_path / "full" / f"000-{part:06d}.0.arrow.{gethostname()}-{os.getpid()}").symlink_to("/dev/full")
    write_parts_in_workers(
        lambda do, tasks: elsewhere(do, tasks, lambda task: parallel.write_task_parts({0: full[0]}, task)), made
    )
    assert (full[0].parts(), made[0].parts()) == (set(), set())
    assert made[0].run()["counts"]["kept"] == 31
    said = capsys.readouterr().out
    assert "a: parts that this process makes: 9 of 9. A worker could not make part 0: " in said
    assert "No space left on device" in said


def test_workers_that_cannot_see_the_sources_are_told_of_in_one_line(
    tmp_path: Path, sources: list[Source], capsys: pytest.CaptureFixture[str]
) -> None:
    """The files of a source are read in order, so that those behind one that cannot be counted are left, too."""

    def blind(do: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        if do is parallel.count_file:  # on another machine they are not there
            tasks = [
                (*task[:2], tmp_path / "gone" if task[2].suffix in (".parquet", ".csv") else task[2]) for task in tasks
            ]
        return in_process_runner(do, tasks)

    made = gatherings(tmp_path / "many", sources)
    write_parts_in_workers(blind, made)
    assert [len(one.parts()) for one in made] == [9, 3, 0, 1, 0]
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith(
        "files that this process reads without workers: 3 of 6. A worker could not count the rows of "
    )
    assert f"{tmp_path / 'b' / '1.parquet'}: " in said


def test_workers_that_write_elsewhere_are_told(
    tmp_path: Path, sources: list[Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "SEEN_WITHIN", 0.0)
    there = {one.number: one for one in gatherings(tmp_path / "other", sources)}
    says = r"stage\.engine=.*workers write to a folder that this process cannot see \(000-000000\.json.*one file system"
    with pytest.raises(InputError, match=says):
        write_parts_in_workers(
            lambda do, tasks: elsewhere(do, tasks, lambda task: parallel.write_task_parts(there, task)),
            gatherings(tmp_path / "many", sources),
        )


def test_a_part_that_is_seen_late_is_waited_for(
    tmp_path: Path, sources: list[Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "PAUSE", 0.01)
    made, seen = gatherings(tmp_path / "many", sources[:1]), []

    def late(task: Any) -> Any:
        found = parallel.write_task_parts({0: made[0]}, task)
        path = made[0].spool.folder / f"{made[0].name(task.parts[0])}.json"
        path.rename(hidden := path.with_suffix(".hidden"))
        Timer(0.1, lambda: (hidden.rename(path), seen.append(path))).start()
        return found

    write_parts_in_workers(lambda do, tasks: elsewhere(do, tasks, late), made)
    assert len(seen) == len(made[0].parts()) == 9


def test_pieces_are_all_parts_and_few_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "PART", 10)
    counts = [RowCount(7, True), RowCount(1, False), RowCount(995, False), RowCount(2000, True), RowCount(4, False)]
    found = [*split_parts(counts)]
    assert [part for piece in found for part in piece] == [*range(301)]
    begins = [next(i for i, end in enumerate(np.cumsum([c.rows for c in counts])) if p[0] * 10 < end) for p in found]
    assert [begins.count(file) for file in range(5)] == [1, 0, 4, 29, 0]
    assert [*split_parts([])] == []


def test_no_worker_is_given_a_projects_key(tmp_path: Path, sources: list[Source]) -> None:
    votes = VoteSnapshot("sqlite:///votes.db", "p", ChainHead(0, ""), False, b"the key of a project")
    made = gatherings(tmp_path / "many", [*sources[:2], Source("votes", annotations="p", votes=votes)])
    seen = []

    def looks(do: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        seen.append(pickle.dumps((do, tasks)))
        return in_process_runner(do, tasks)

    write_parts_in_workers(looks, made)
    assert len(seen) == 2
    assert b"the key of a project" in pickle.dumps(made[2])
    assert not any(b"the key of a project" in one or b"votes.db" in one for one in seen)


@pytest.mark.parametrize("workers", [2, 5])
@pytest.mark.parametrize("among", ["all", "within", "across"])
def test_near_duplicates_in_packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, among: str) -> None:
    """The same rows for the same kept ones in the same order, whoever compares which of them."""
    draw, made = random.Random(0), []
    texts = [[draw.choice("abcdefgh") + draw.choice("xyz") for _ in range(30)] for _ in range(12)]
    for _ in range(150):
        words = [*draw.choice(texts)]
        for at in draw.sample(range(30), draw.randrange(4)):
            words[at] = draw.choice(["one", "two"])
        made.append({"text": " ".join(words)})
    lines(tmp_path / "a.jsonl", made[:90])
    lines(tmp_path / "b.jsonl", made[90:])
    both = gatherings(tmp_path / "spool", [Source(name, str(tmp_path / f"{name}.jsonl")) for name in "ab"])
    all_of(both)
    rows, compared = SpoolRows(both[0].spool), list[int]()
    kept, source = np.arange(150) % 7 > 0, rows.numbers("source").astype(np.int64)
    order = rank_rows(source, [1, 0])
    whole = find_near_duplicates(rows, kept, order, source, threshold=0.7, among=among)
    engine = any_order(workers)

    def counted(do: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        compared.extend(len(task.number) for task in tasks)
        return engine(do, tasks)

    monkeypatch.setattr(counted, "workers", workers, raising=False)
    found = find_near_duplicates(rows, kept, order, source, threshold=0.7, among=among, engine=counted)  # type: ignore[arg-type]
    assert len(whole.dropped) > 20
    assert len(compared) == min(12, 2 * workers)
    for name in ("dropped", "kept", "jaccard", "exact"):
        assert np.array_equal(getattr(found, name), getattr(whole, name))
