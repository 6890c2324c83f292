"""An index of the run folders: one SQLite file beside them, brought up to date whenever it is asked.

It holds nothing that the folders do not say. One that is damaged or of another version is made again, and where none
can be written, as on a disk that is read only, it lives in memory for the one question.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from align.config.stages import WITH_RUNS
from align.errors import InputError
from align.registry.record import Record, digests_of, edges_of, joined, record_of, unreadable
from align.run.manifest import FILE, Manifest, read_manifest

INDEX = ".registry.db"
VERSION = 1
"""Of the tables and of what is in them. An index of another version is made again."""
UNWRITTEN = tuple(f"SQLITE_{why}" for why in ("BUSY", "LOCKED", "READONLY", "CANTOPEN", "PERM", "IOERR", "FULL"))
"""How errors are called which say that the file cannot be written; others say that it is damaged."""
WAIT_S = 30
"""For another process that brings the same index up to date."""
TABLES = """
create table runs (run text primary key, stamp text not null, own text not null, record text);
create table makes (run text not null, digest text not null);
create table reads (run text not null, input text not null, digest text not null, made_by text not null);
create index runs_running on runs (run) where json_extract(own, '$.status') = 'running';
create index makes_run on makes (run);
create index makes_digest on makes (digest);
create index reads_run on reads (run);
create index reads_digest on reads (digest);
create index reads_made_by on reads (made_by);
"""


T = TypeVar("T")


def asked(root: Path, question: Callable[[Index], T]) -> T:
    """The answer of an index that is up to date. Where it turns out to be damaged, it is made again."""
    try:
        with Index(root) as index:
            return question(index)
    except sqlite3.DatabaseError:
        with Index(root, rebuild=True) as index:
            return question(index)


class Index:
    """The runs under one root, as they are at the moment when this is opened. Use it as a context manager.

    Args:
        root: the folder of all runs.
        rebuild: make it from nothing.

    Attributes:
        path: of the file; None where it is in memory.
        changed: how many folders were read anew, or are gone.
    """

    def __init__(self, root: Path, rebuild: bool = False) -> None:
        self.root = root
        attempts: list[tuple[Path | None, bool]] = [(root / INDEX, False), (None, True), (None, False)]
        while True:
            self.path, copied = attempts.pop(0)
            try:
                self.changed = self._opened(rebuild, copied)
                return
            except sqlite3.DatabaseError as error:
                if not attempts:
                    raise
                if self.path and not error.sqlite_errorname.startswith(UNWRITTEN) and removed(self.path):
                    attempts.insert(0, (self.path, False))

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *given: object) -> None:
        self.close()

    def close(self) -> None:
        self.db.close()

    def _opened(self, rebuild: bool, copied: bool) -> int:
        """Open the file, or one in memory, and bring it up to date. Returns how many folders changed.

        Args:
            copied: what lies in the file is copied to memory: it may be new enough, or nearly.
        """
        self.db = sqlite3.connect(self.path or ":memory:", timeout=WAIT_S, isolation_level=None)
        try:
            if copied:
                with suppress(sqlite3.Error), closing(sqlite3.connect(read_only(self.root / INDEX), uri=True)) as there:
                    there.backup(self.db)
            return self._renewed(rebuild)
        except sqlite3.DatabaseError:
            self.db.close()
            raise

    def _renewed(self, rebuild: bool) -> int:
        self.db.execute("begin immediate")  # of two processes the second one waits, and finds nothing left to do
        if rebuild or self.db.execute("pragma user_version").fetchone() != (VERSION,):
            for kind, name in self.db.execute("select type, name from sqlite_master where sql is not null").fetchall():
                if kind == "table":
                    self.db.execute(f'drop table "{name}"')
            for statement in filter(str.strip, TABLES.split(";")):
                self.db.execute(statement)
            self.db.execute(f"pragma user_version = {VERSION}")
        changed = self._refresh()
        self.db.execute("commit")
        return changed

    def _refresh(self) -> int:
        known: dict[str, str] = dict(self.db.execute("select run, stamp from runs"))
        there = dict(folders(self.root))
        gone = known.keys() - there.keys()
        new = {run: stamp for run, stamp in there.items() if known.get(run) != stamp}
        around = self._around(gone | new.keys())
        for run in gone | new.keys():
            for table in ("runs", "makes", "reads"):
                self.db.execute(f"delete from {table} where run = ?", (run,))
        for run, stamp in new.items():
            self._read(run, stamp)
        for run in (around | new.keys() | self._around(new.keys())) - gone:
            self._join(run)
        self._settle()
        return len(gone) + len(new)

    def _settle(self) -> None:
        """Of the runs that say they are running, which do: the others were killed before they could say more."""
        running = self.db.execute("select run from runs where json_extract(own, '$.status') = 'running'").fetchall()
        locks = locked_inodes() if running else None
        for (run,) in running:
            stage, _, name = run.partition(":")
            with suppress(OSError):
                held = locks is None or os.stat(self.root / stage / name).st_ino in locks
                said = "running" if held else "interrupted"
                self.db.execute("update runs set record = json_set(record, '$.status', ?) where run = ?", (said, run))

    def _read(self, run: str, stamp: str) -> None:
        stage, _, name = run.partition(":")
        folder = self.root / stage / name
        manifest: Manifest | None = None
        try:
            manifest = read_manifest(folder)
            own = record_of(folder, manifest)
            if own["run"] != run:
                own = unreadable(folder, f"manifest.json is that of {own['run']}; this folder is {run}")
        except InputError as error:
            own = unreadable(folder, str(error))
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # edited by hand, in a way of its own
            own = unreadable(folder, f"manifest.json says something that runs do not write: {error!r}")
        self.db.execute("insert into runs (run, stamp, own) values (?, ?, ?)", (run, stamp, json.dumps(own)))
        if manifest is not None and "digest" in own:
            made = digests_of(own, manifest.outputs)
            self.db.executemany("insert into makes values (?, ?)", [(run, digest) for digest in made])
            self.db.executemany("insert into reads values (?, ?, ?, ?)", [(run, *edge) for edge in edges_of(own)])

    def _around(self, runs: Iterable[str]) -> set[str]:
        """The runs whose records say something of these: those that made what they read, and that read what they
        made."""
        found: set[str] = set()
        for run in runs:
            makers = "select makes.run from reads join makes on makes.digest = reads.digest where reads.run = ?"
            found.update(name for (name,) in self.db.execute(makers, (run,)))
            found.update(name for name, _ in self._children(run))
        return found

    def _parents(self, run: str) -> Iterator[tuple[str, str, bool]]:
        """(input, run that made it, whether that is there) of each input that a run made."""
        for name, digest, made_by in self.db.execute(
            "select input, digest, made_by from reads where run = ? order by rowid", (run,)
        ).fetchall():
            makers = [one for (one,) in self.db.execute("select run from makes where digest = ?", (digest,))]
            if made_by in makers or (makers and not made_by):
                yield name, made_by or min(makers), True
            elif makers or made_by:  # under another name, or nowhere
                yield name, min(makers, default=made_by), bool(makers)

    def _children(self, run: str) -> list[tuple[str, str]]:
        """(run, input) of the runs that read what this one made."""
        found = self.db.execute(
            "select distinct reads.run, reads.input from makes join reads on reads.digest = makes.digest "
            "where makes.run = ? and reads.run != ? order by reads.run",
            (run, run),
        )
        return found.fetchall()

    def _join(self, run: str) -> None:
        own = self._own(run)
        if own is None:
            return
        parents = [{"input": name, "run": made_by, "there": there} for name, made_by, there in self._parents(run)]
        children = [
            {**child, "through": name} for one, name in self._children(run) if (child := self._own(one)) is not None
        ]
        record = json.dumps(joined(own, parents, children))
        self.db.execute("update runs set record = ? where run = ?", (record, run))

    def _own(self, run: str) -> Record | None:
        found = self.db.execute("select own from runs where run = ?", (run,)).fetchone()
        return json.loads(found[0]) if found else None

    def record(self, run: str) -> Record | None:
        """The record of `stage:name`; None where there is no such run."""
        found = self.db.execute("select record from runs where run = ?", (run,)).fetchone()
        return json.loads(found[0]) if found else None

    def names(self) -> list[str]:
        """All runs, as `stage:name`."""
        return [run for (run,) in self.db.execute("select run from runs order by run")]

    def has(self, path: str, whole: bool = False) -> bool:
        """Whether any record has such a path of SQLite's, and no mapping there unless `whole`."""
        asked = "select 1 from runs where json_type(record, ?) <> ? limit 1"
        return self.db.execute(asked, (path, "" if whole else "object")).fetchone() is not None

    def keys(self) -> list[str]:
        """The dotted keys of all records that hold a value or a list."""
        found = self.db.execute(
            "select distinct fullkey from runs, json_tree(record) where json_tree.type not in ('object') "
            "and fullkey not like '%[%'"
        )
        return sorted(key.removeprefix("$.").replace('"', "") for (key,) in found)

    def selected(self, condition: str, values: Mapping[str, Any] | list[Any], order: str, limit: int) -> list[Record]:
        """Records by a condition and an order in SQL, see `align.registry.query`."""
        found = self.db.execute(f"select record from runs where {condition} order by {order} limit ?", [*values, limit])
        return [json.loads(record) for (record,) in found]


def folders(root: Path) -> Iterator[tuple[str, str]]:
    """`stage:name` and a stamp of each folder with a manifest: one that was replaced has another stamp."""
    for stage in WITH_RUNS:
        with suppress(OSError), os.scandir(root / stage) as entries:
            for entry in entries:
                with suppress(OSError):  # no folder, or gone meanwhile
                    found = os.stat(f"{entry.path}/{FILE}")
                    yield f"{stage}:{entry.name}", f"{found.st_mtime_ns}-{found.st_size}-{found.st_ino}"


def locked_inodes() -> set[int] | None:
    """The inodes of files and folders that a process of this machine has locked; None where nobody can tell."""
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
        return {int(line.split()[-3].rpartition(":")[2]) for line in lines if "FLOCK" in line}
    return None


def read_only(path: Path) -> str:
    """The URI of a database that is not written to, and that nobody writes to."""
    return f"file:{quote(str(path.absolute()))}?mode=ro&immutable=1"


def removed(path: Path) -> bool:
    """Whether a damaged index could be taken away."""
    with suppress(OSError):
        path.unlink()
        return True
    return False
