"""Tests that parts written by workers give the same rows, accounts and errors as a single process."""

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


def build_rows(name: str, count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{name} {i}?", "completion": f"the answer {i} of {name}"} for i in range(count)]


def write_lines(path: Path, rows: Sequence[Any], open_file: Callable[..., Any] = open) -> None:
    path.parent.mkdir(exist_ok=True)
    with open_file(path, "wt") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Source]:
    """Sources: lines with bad and blank rows, shards of several formats, a table, a small file, and a corpus."""
    monkeypatch.setattr(gather, "PART", 5)
    rows: list[Any] = build_rows("a", 31)
    rows[3:3] = [BAD, "{no json", "", "", "", "", "", BAD]
    write_lines(tmp_path / "a.jsonl", [*rows, BAD, "", ""])
    write_lines(tmp_path / "b" / "0.jsonl.gz", build_rows("b0", 13), gzip.open)
    pq.write_table(pa.Table.from_pylist(build_rows("b1", 11)), tmp_path / "b" / "1.parquet", row_group_size=4)
    (tmp_path / "b" / "2.json").write_text(json.dumps(build_rows("b2", 9)))
    write_lines(tmp_path / "c.csv", ["question,answer", *(f"c {i}?,the answer {i}" for i in range(12))])
    write_lines(tmp_path / "d.jsonl", build_rows("d", 2))
    conversations = [
        Conversation((Message("user", f"e {i}?"), Message("assistant", f"the answer {i} of e"))) for i in range(8)
    ]
    monkeypatch.setattr(chitchat, "load_conversations", lambda part: conversations)
    paths = {
        name: str(tmp_path / path) for name, path in zip("abcd", ("a.jsonl", "b", "c.csv", "d.jsonl"), strict=True)
    }
    return [*(Source(name, path) for name, path in paths.items()), Source("e", data="chitchat", part="test")]


def create_imports(folder: Path, sources: Sequence[Source], skips: bool = True) -> list[SourceImport]:
    folder.mkdir(exist_ok=True)
    steps = create_steps(["control", {"length": {"least": 4, "by": "words"}}])
    kind = sources[0].detect_kind()
    return [
        SourceImport(Spool(folder), source, number, steps, FactOptions(), kind, skips)
        for number, source in enumerate(sources)
    ]


def create_shuffled_runner(seed: int) -> TaskRunner:
    """Return a runner that shuffles tasks, and pickles them and their results."""

    def run(do: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        numbered = list(enumerate(tasks))
        random.Random(seed).shuffle(numbered)
        do = pickle.loads(pickle.dumps(do))
        for number, task in numbered:
            yield number, pickle.loads(pickle.dumps(do(pickle.loads(pickle.dumps(task)))))

    return run


def run_in_processes(do: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    with ProcessPoolExecutor(2, get_context("fork")) as pool:
        task_numbers = {pool.submit(do, task): number for number, task in enumerate(tasks)}
        for future in as_completed(task_numbers):
            yield task_numbers[future], future.result()


def import_all(imports: Sequence[SourceImport]) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """Import the sources. Returns the account of each, and three columns of the spool."""
    accounts = [source_import.run() for source_import in imports]
    rows = SpoolRows(imports[0].spool)
    return accounts, [
        np.ascontiguousarray(rows.load_numbers(name)).tolist() for name in ("content_id", "source", "row")
    ]


@pytest.mark.parametrize(
    "engine",
    [in_process_runner, *map(create_shuffled_runner, range(3)), run_in_processes],
    ids=["e", "0", "1", "2", "p"],
)
def test_the_same_as_in_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sources: list[Source], engine: TaskRunner
) -> None:
    expected = import_all(create_imports(tmp_path / "one", sources))
    assert expected[0][0]["counts"]["skipped_rows"] == 4
    imports = create_imports(tmp_path / "many", sources)
    write_parts_in_workers(engine, imports)
    assert [len(source_import.parts()) for source_import in imports] == [9, 7, 3, 1, 0]
    write = SourceImport.write

    def write_fileless(self: SourceImport, part: int) -> dict[str, Any]:
        assert not self.source.path, f"{self.name(part)} was left"
        return write(self, part)

    monkeypatch.setattr(SourceImport, "write", write_fileless)
    assert import_all(imports) == expected


@pytest.mark.parametrize("seed", range(4))
def test_cut_off_at_any_task_it_goes_on(tmp_path: Path, sources: list[Source], seed: int) -> None:
    """Other workers continue, and then a single process."""
    expected = import_all(create_imports(tmp_path / "one", sources))

    def run_until_cut(do: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        remaining = 3 if do is not parallel.count_file_rows else len(tasks)
        for outcome in create_shuffled_runner(seed)(do, tasks):
            if not remaining:
                raise KeyboardInterrupt
            yield outcome
            remaining -= 1

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            write_parts_in_workers(run_until_cut, create_imports(tmp_path / "many", sources))
    part_count = len(Spool(tmp_path / "many").parts())
    assert 6 <= part_count < 20
    assert import_all(create_imports(tmp_path / "many", sources)) == expected


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
MIT = {"licence": "MIT"}
GPL = {"license": "GPL-3"}


def build_wrong_sources(folder: Path, name: str) -> tuple[list[Source], bool]:
    """Build sources with an error, mostly far behind their first row. Returns also whether bad rows are skipped."""
    rows: list[Any] = build_rows("a", 40)
    options: dict[str, Any] = {}
    if name == "bad rows":
        rows[22:24] = [BAD, "{no json"]
        rows[33] = BAD
    elif name == "another kind":
        rows[21] = PAIR
    elif name == "another kind in another source":
        write_lines(folder / "second.jsonl", [PAIR])
    elif name == "a licence that contradicts":
        rows[28] = {**rows[28], **GPL}
        options = MIT
    elif name == "licences":
        rows[2], rows[28] = {**rows[2], **MIT}, {**rows[28], **GPL}
    elif name == "nothing is left":
        rows = [{"prompt": "a", "completion": "b"}] * 12
    elif name == "nothing is there":
        rows = []
    elif name == "several":
        rows[31], rows[12] = PAIR, {**rows[12], **GPL}
        options = MIT
    write_lines(folder / "first.jsonl", rows)
    sources = [Source("first", str(folder / "first.jsonl"), **options)]
    if name in ("cut", "cut behind bad rows"):
        with gzip.open(folder / "first.jsonl.gz", "wt", compresslevel=0) as file:
            file.writelines(json.dumps(BAD if name != "cut" and i == 7 else row) + "\n" for i, row in enumerate(rows))
        archive = (folder / "first.jsonl.gz").read_bytes()
        (folder / "first.jsonl.gz").write_bytes(archive[: len(archive) * 2 // 3])
        sources = [Source("first", str(folder / "first.jsonl.gz"))]
    if name == "a quote":
        write_lines(folder / "first.csv", ["prompt,completion", *(f"a {i},b {i}" for i in range(30)), '"no end,b'])
        sources = [Source("first", str(folder / "first.csv"))]
    if name == "another kind in another source":
        sources.append(Source("second", str(folder / "second.jsonl")))
    return sources, name not in ("bad rows", "cut behind bad rows")


WRONG = [
    "bad rows",
    "another kind",
    "another kind in another source",
    "a licence that contradicts",
    "licences",
    "nothing is left",
    "nothing is there",
    "several",
    "cut",
    "cut behind bad rows",
    "a quote",
]


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("engine", [*map(create_shuffled_runner, range(2)), run_in_processes], ids=["0", "1", "p"])
def test_errors_are_the_same_whoever_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: TaskRunner, name: str
) -> None:
    monkeypatch.setattr(gather, "PART", 5)
    sources, skips = build_wrong_sources(tmp_path, name)
    errors = []
    for folder in ("one", "many"):
        imports = create_imports(tmp_path / folder, sources, skips)
        if folder == "many":
            write_parts_in_workers(engine, imports)
        with pytest.raises(InputError) as caught:
            import_all(imports)
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]


def test_nobody_works_on_what_is_behind_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "PART", 5)
    sources, skips = build_wrong_sources(tmp_path, "bad rows")  # in the fifth part of eight
    imports = create_imports(tmp_path / "many", [sources[0], Source("later", sources[0].path)], skips)
    write_parts_in_workers(in_process_runner, imports)
    assert [source_import.parts() for source_import in imports] == [{0, 1, 2, 3, 4}, set()]
    write_lines(Path(sources[0].path), build_rows("a", 40))  # another run, in the same folder
    later_imports = create_imports(tmp_path / "many", [sources[0], Source("later", sources[0].path)], skips)
    write_parts_in_workers(in_process_runner, later_imports)
    assert [len(source_import.parts()) for source_import in later_imports] == [8, 8]


def run_elsewhere(
    do: Callable[[Any], Any], tasks: Sequence[Any], work: Callable[[Any], Any]
) -> Iterator[tuple[int, Any]]:
    """Count files in this process, and write parts with `work`."""
    return enumerate(map(do if do is parallel.count_file_rows else work, tasks))


def test_workers_without_the_runs_folder_leave_their_parts_to_this_process(
    tmp_path: Path, sources: list[Source], capsys: pytest.CaptureFixture[str]
) -> None:
    """The workers cannot write an error there either. One message is printed for each source."""
    remote_imports = {
        source_import.number: source_import for source_import in create_imports(tmp_path / "gone", sources[:2])
    }
    (tmp_path / "gone").rmdir()
    imports = create_imports(tmp_path / "many", sources[:2])
    expected = import_all(create_imports(tmp_path / "one", sources[:2]))
    write_parts_in_workers(
        lambda do, tasks: run_elsewhere(do, tasks, lambda task: parallel.write_task_parts(remote_imports, task)),
        imports,
    )
    assert [source_import.parts() for source_import in imports] == [set(), set()]
    assert import_all(imports) == expected
    messages = [line for line in capsys.readouterr().out.splitlines() if "process has to make itself" in line]
    assert [line.partition(". ")[0] for line in messages] == [
        "a: parts that this process has to make itself: 9 of 9",
        "b: parts that this process has to make itself: 7 of 7",
    ]
    assert "A worker could not make part 0: " in messages[0]
    assert "No such file or directory" in messages[0]


def test_workers_whose_disk_is_full_leave_their_parts_to_this_process(
    tmp_path: Path, sources: list[Source], capsys: pytest.CaptureFixture[str]
) -> None:
    full_disk_imports = create_imports(tmp_path / "full", sources[:1])
    imports = create_imports(tmp_path / "many", sources[:1])
    for part in range(9):
        (tmp_path / "full" / f"000-{part:06d}.0.arrow.{gethostname()}-{os.getpid()}").symlink_to("/dev/full")
    write_parts_in_workers(
        lambda do, tasks: run_elsewhere(
            do, tasks, lambda task: parallel.write_task_parts({0: full_disk_imports[0]}, task)
        ),
        imports,
    )
    assert (full_disk_imports[0].parts(), imports[0].parts()) == (set(), set())
    assert imports[0].run()["counts"]["kept"] == 31
    stdout = capsys.readouterr().out
    assert "a: parts that this process has to make itself: 9 of 9. A worker could not make part 0: " in stdout
    assert "No space left on device" in stdout


def test_workers_that_cannot_see_the_sources_are_told_of_in_one_line(
    tmp_path: Path, sources: list[Source], capsys: pytest.CaptureFixture[str]
) -> None:
    """Files are read in order, so files behind one that cannot be counted are left to this process, too."""

    def run_without_files(do: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        if do is parallel.count_file_rows:  # another machine does not have these files
            tasks = [
                (*task[:2], tmp_path / "gone" if task[2].suffix in (".parquet", ".csv") else task[2]) for task in tasks
            ]
        return in_process_runner(do, tasks)

    imports = create_imports(tmp_path / "many", sources)
    write_parts_in_workers(run_without_files, imports)
    assert [len(source_import.parts()) for source_import in imports] == [9, 3, 0, 1, 0]
    (message,) = capsys.readouterr().out.splitlines()
    assert message.startswith(
        "files that this process has to read itself: 3 of 6. A worker could not count the rows of "
    )
    assert f"{tmp_path / 'b' / '1.parquet'}: " in message


def test_workers_that_write_elsewhere_are_told(
    tmp_path: Path, sources: list[Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "SEEN_WITHIN", 0.0)
    remote_imports = {
        source_import.number: source_import for source_import in create_imports(tmp_path / "other", sources)
    }
    message = (
        r"stage\.engine=.*workers write to a folder that this process cannot see \(000-000000\.json.*one file system"
    )
    with pytest.raises(InputError, match=message):
        write_parts_in_workers(
            lambda do, tasks: run_elsewhere(do, tasks, lambda task: parallel.write_task_parts(remote_imports, task)),
            create_imports(tmp_path / "many", sources),
        )


def test_a_part_that_is_seen_late_is_waited_for(
    tmp_path: Path, sources: list[Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "PAUSE", 0.01)
    imports = create_imports(tmp_path / "many", sources[:1])
    shown_paths = []

    def write_hidden(task: Any) -> Any:
        outcome = parallel.write_task_parts({0: imports[0]}, task)
        path = imports[0].spool.folder / f"{imports[0].name(task.parts[0])}.json"
        path.rename(hidden := path.with_suffix(".hidden"))
        Timer(0.1, lambda: (hidden.rename(path), shown_paths.append(path))).start()
        return outcome

    write_parts_in_workers(lambda do, tasks: run_elsewhere(do, tasks, write_hidden), imports)
    assert len(shown_paths) == len(imports[0].parts()) == 9


def test_pieces_are_all_parts_and_few_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "PART", 10)
    counts = [RowCount(7, True), RowCount(1, False), RowCount(995, False), RowCount(2000, True), RowCount(4, False)]
    pieces = [*split_parts(counts)]
    assert [part for piece in pieces for part in piece] == [*range(301)]
    begins = [
        next(i for i, end in enumerate(np.cumsum([count.rows for count in counts])) if piece[0] * 10 < end)
        for piece in pieces
    ]
    assert [begins.count(file) for file in range(5)] == [1, 0, 4, 29, 0]
    assert [*split_parts([])] == []


def test_no_worker_is_given_a_projects_key(tmp_path: Path, sources: list[Source]) -> None:
    votes = VoteSnapshot("sqlite:///votes.db", "p", ChainHead(0, ""), False, b"the key of a project")
    imports = create_imports(tmp_path / "many", [*sources[:2], Source("votes", annotations="p", votes=votes)])
    pickled_tasks = []

    def record_tasks(do: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        pickled_tasks.append(pickle.dumps((do, tasks)))
        return in_process_runner(do, tasks)

    write_parts_in_workers(record_tasks, imports)
    assert len(pickled_tasks) == 2
    assert b"the key of a project" in pickle.dumps(imports[2])
    assert not any(b"the key of a project" in pickled or b"votes.db" in pickled for pickled in pickled_tasks)


@pytest.mark.parametrize("workers", [2, 5])
@pytest.mark.parametrize("among", ["all", "within", "across"])
def test_near_duplicates_in_packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, among: str) -> None:
    """Any number of workers finds the same duplicates in the same order."""
    generator = random.Random(0)
    records = []
    texts = [[generator.choice("abcdefgh") + generator.choice("xyz") for _ in range(30)] for _ in range(12)]
    for _ in range(150):
        words = [*generator.choice(texts)]
        for at in generator.sample(range(30), generator.randrange(4)):
            words[at] = generator.choice(["one", "two"])
        records.append({"text": " ".join(words)})
    write_lines(tmp_path / "a.jsonl", records[:90])
    write_lines(tmp_path / "b.jsonl", records[90:])
    imports = create_imports(tmp_path / "spool", [Source(name, str(tmp_path / f"{name}.jsonl")) for name in "ab"])
    import_all(imports)
    rows = SpoolRows(imports[0].spool)
    compared = list[int]()
    is_kept = np.arange(150) % 7 > 0
    source = rows.load_numbers("source").astype(np.int64)
    order = rank_rows(source, [1, 0])
    expected = find_near_duplicates(rows, is_kept, order, source, threshold=0.7, among=among)
    engine = create_shuffled_runner(workers)

    def count_compared(do: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        compared.extend(len(task.number) for task in tasks)
        return engine(do, tasks)

    monkeypatch.setattr(count_compared, "workers", workers, raising=False)
    duplicates = find_near_duplicates(rows, is_kept, order, source, threshold=0.7, among=among, runner=count_compared)  # type: ignore[arg-type]
    assert len(expected.dropped) > 20
    assert len(compared) == min(12, 2 * workers)
    for name in ("dropped", "kept", "jaccard", "exact"):
        assert np.array_equal(getattr(duplicates, name), getattr(expected, name))
