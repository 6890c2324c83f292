"""An index of the run folders: one SQLite file beside them, brought up to date whenever it is asked.

It holds nothing that the folders do not say. One of another version is made again. One that is damaged, or that another
program made, is renamed first, for nobody can tell whose it is. Where none can be written, as on a disk that is read
only, it lives in memory for the one question.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from align.config.stages import WITH_RUNS
from align.core.errors import CorruptFile, InputError, half_character, require
from align.core.files import has_file
from align.core.outputs import move_aside
from align.registry.record import (
    ADAPTERS,
    UNREADABLE,
    Record,
    digests_of,
    edges_of,
    joined,
    noted_in,
    record_of,
    unreadable,
)
from align.run.alias_log import REMEDY, AliasLog, read_log
from align.run.digests import file_digest
from align.run.figures import FILE as METRICS
from align.run.figures import IN_ARTIFACT
from align.run.files import json_object
from align.run.manifest import FILE, HeldManifest, Manifest, content_of, parse_held_manifests, read_manifest
from align.run.receipt import RECEIPT
from align.run.stale import FILE as STALE


def iter_folders(root: Path) -> Iterator[tuple[str, str]]:
    """Yield `stage:name` and a stamp of each folder with a manifest. A run has another stamp once its manifest was
    replaced, it was marked stale, its figures were written again, or a server's log of adapters grew.

    Raises:
        InputError: a folder of runs cannot be listed.
    """
    for stage in WITH_RUNS:
        try:
            with os.scandir(root / stage) as entries:
                names = [entry.name for entry in entries]
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            problem = f"cannot be listed ({error.strerror})"
            remedy = "Change its rights, or name another run.root."
            raise InputError("run.root", str(root / stage), problem, remedy) from error
        files = (METRICS, *{"eval": [IN_ARTIFACT], "serve": [ADAPTERS]}.get(stage, ()), STALE)
        for name in names:
            folder = f"{root}/{stage}/{name}"  # a path of 10,000 each would take as long again
            if stamp := stamp_of(f"{folder}/{FILE}"):
                yield f"{stage}:{name}", " ".join([stamp, *(stamp_of(f"{folder}/{file}") for file in files)])


def stamp_of(path: Path | str) -> str:
    """Return size, times and inode of a file: no program sets the change time back. Empty if there is none."""
    if not os.access(path, os.F_OK):  # an exception would cost more than all of this
        return ""
    with suppress(OSError):
        found = os.stat(path)
        return f"{found.st_size}-{found.st_mtime_ns}-{found.st_ctime_ns}-{found.st_ino}"
    return ""


def locked_inodes() -> set[int] | None:
    """Return the inodes of files and folders that a process of this machine has locked; None if nobody can tell."""
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
        return {int(line.split()[-3].rpartition(":")[2]) for line in lines if "FLOCK" in line}
    return None


@dataclass(frozen=True, slots=True)
class Hashed:
    """A file as it was when it was hashed.

    Attributes:
        state: see `stamp_of`.
        sha256: hex.
        at: when, ISO 8601 in UTC.
    """

    state: str
    sha256: str
    at: str


INDEX = ".registry.db"
OF_RECORDS = ("index.py", "record.py", "../run/figures.py")
"""The files that decide what an index holds."""
UNWRITTEN = tuple(f"SQLITE_{why}" for why in ("BUSY", "LOCKED", "READONLY", "CANTOPEN", "PERM", "IOERR", "FULL"))
"""How errors are called which say that the file cannot be written; others say that it is damaged."""
ENDED = "its process ended before it could say why"
WAIT_S = 30
"""For another process that brings the same index up to date."""
TABLES = """
create table runs (
    run text primary key, stamp text not null, own text not null, record text, status text,
    content text not null, manifest text not null
);
create table held (export text not null, run text not null, content text not null, sha256 text not null);
create table makes (run text not null, digest text not null);
create table reads (run text not null, input text not null, digest text not null, made_by text not null);
create table if not exists hashed (
    run text not null, file text not null, state text not null, sha256 text not null, at text not null,
    primary key (run, file)
);
create table noted (run text not null, alias text not null, seq integer not null, hash text not null);
create table aliased (run text primary key, aliases text not null, replaced text);
create index runs_running on runs (run) where json_extract(own, '$.status') = 'running';
create index runs_status on runs (status);
create index noted_run on noted (run);
create index makes_run on makes (run);
create index makes_digest on makes (digest);
create index reads_run on reads (run);
create index reads_digest on reads (digest);
"""

OF_A_RUN = {"runs": "run", "makes": "run", "reads": "run", "noted": "run", "held": "export"}
"""Table → its column with the run whose folder a row was read from."""


T = TypeVar("T")


@cache
def version() -> int:
    """Return the version of the tables and of what is in them: an index that another code made is made again."""
    code = b"".join((Path(__file__).parent / name).read_bytes() for name in OF_RECORDS)
    return int.from_bytes(sha256(code).digest()[:4], "big") >> 1


DAMAGED = (sqlite3.DatabaseError, UnicodeDecodeError, json.JSONDecodeError)
"""What reading a damaged index may raise."""


class Damaged(sqlite3.DatabaseError):
    """A row holds something that this index did not write."""


def asked(root: Path, question: Callable[[Index], T]) -> T:
    """Ask an index that is up to date. If it turns out to be damaged, it is made again."""
    try:
        with Index(root) as index:
            return question(index)
    except DAMAGED as error:
        if name_of(error) == "SQLITE_ERROR" and "malformed" not in str(error):
            raise  # a fault of the question
    with Index(root, rebuild=True) as index:  # outside of the except: its traceback holds a cursor, and so a lock
        return question(index)


def name_of(error: Exception) -> str:
    """Return what SQLite calls an error; empty for Python's own, such as text that is no UTF-8."""
    return getattr(error, "sqlite_errorname", "")


class Index:
    """The runs under one root, as they are at the moment when this is opened. Use it as a context manager.

    Args:
        root: the folder of all runs.
        rebuild: make it from nothing.

    Attributes:
        path: of the file; None where it is in memory.
        changed: how many folders were read anew, or are gone.
        aliases_error: why nobody can say which aliases there are; empty where the log can be read.
        unnamed: folders whose names are no text in UTF-8. They are left out.
    """

    def __init__(self, root: Path, rebuild: bool = False) -> None:
        self.root = root
        has_file(root / INDEX, "run.root", f"Move {INDEX} away: it is made again.")
        attempts: list[tuple[Path | None, bool]] = [(None, True), (None, False)]
        if (root / INDEX).exists() or any(iter_folders(root)):  # nothing is left in a folder that is no folder of runs
            attempts.insert(0, (root / INDEX, False))
        while True:
            self.path, copied = attempts.pop(0)
            try:
                self.changed = self._opened(rebuild, copied)
                return
            except DAMAGED as error:
                if not attempts:
                    raise
                if self.path and not name_of(error).startswith(UNWRITTEN) and is_moved_aside(self.path):
                    attempts.insert(0, (self.path, False))

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *given: object) -> None:
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
        except BaseException:
            self.db.close()
            raise

    def _renewed(self, rebuild: bool) -> int:
        self.db.execute("begin immediate")  # of two processes the second one waits, and finds nothing left to do
        if rebuild or self.db.execute("pragma user_version").fetchone() != (version(),):
            objects = self.db.execute("select type, name from sqlite_master where sql is not null").fetchall()
            if objects and not {("table", "runs"), ("table", "hashed")} <= set(objects):
                raise Damaged("another program made the tables")
            for kind, name in objects:
                if kind == "table" and name != "hashed":  # which costs more than a look at the manifests
                    self.db.execute(f'drop table "{name}"')
            for statement in filter(str.strip, TABLES.split(";")):
                self.db.execute(statement)
            self.db.execute(f"pragma user_version = {version()}")
        changed = self._refresh()
        self.db.execute("commit")
        return changed

    def _refresh(self) -> int:
        known: dict[str, str] = dict(self.db.execute("select run, stamp from runs"))
        there = dict(iter_folders(self.root))
        self.unnamed = [run for run in there if half_character(run)]
        for run in self.unnamed:
            del there[run]
        gone = known.keys() - there.keys()
        new = {run: stamp for run, stamp in there.items() if known.get(run) != stamp}
        around = self._around(gone | new.keys())
        self._remove(gone | new.keys())
        for run, stamp in new.items():
            self._read(run, stamp)
        for run in (around | new.keys() | self._around(new.keys())) - gone:
            self._join(run)
        self._settle()
        self._mark_aliases()
        return len(gone) + len(new)

    def _remove(self, runs: Iterable[str]) -> None:
        for run in runs:
            for table, column in OF_A_RUN.items():
                self.db.execute(f"delete from {table} where {column} = ?", (run,))

    def _mark_aliases(self) -> None:
        """Note in the records which aliases mean their artifacts now, and whose manifest is not the one that the log
        holds the digest of."""
        wanted: dict[str, list[str]] = {}
        replaced: dict[str, str] = {}
        try:
            log = read_log(self.root)
            standing = log.standing()
            replaced = self.replaced_manifests(log)
            self.aliases_error = str(self.lost_changes(log) or "")
        except InputError as error:  # the runs are listed all the same
            standing, self.aliases_error = {}, str(error)
        for alias, change in standing.items():
            for arm in change.arms:
                if run := self.maker(arm.digest, arm.ref):
                    wanted.setdefault(run, []).append(alias)
        now = {run: (json.dumps(wanted.get(run, [])), replaced.get(run)) for run in wanted.keys() | replaced.keys()}
        before = {run: tuple(values) for run, *values in self.db.execute("select run, aliases, replaced from aliased")}
        for run in {run for run, _ in now.items() ^ before.items()}:
            noted = "update runs set record = json_set(record, '$.aliases', json(?), '$.replaced', ?) where run = ?"
            self.db.execute(noted, (*now.get(run, ("[]", None)), run))
        self.db.execute("delete from aliased")
        self.db.executemany("insert into aliased values (?, ?, ?)", [(run, *values) for run, values in now.items()])

    def replaced_manifests(self, log: AliasLog) -> dict[str, str]:
        """Return the runs whose manifest, or that of their evaluation, is not the one that the log of the aliases holds
        the digest of → what is to be said of it."""
        latest: dict[str, tuple[HeldManifest, str]] = {}
        for change in log.changes:  # of several, the newest counts
            for arm in change.arms:
                for run, one in arm.manifests.items():
                    latest[run] = one, f"when @{change.alias} was changed (change {change.seq})"
        claims = [(run, one, when) for run, (one, when) in latest.items()]
        for export, run, *one in self.db.execute("select export, run, content, sha256 from held"):
            claims.append((run, HeldManifest(*one), f"when {export} was written"))
        problems: dict[str, list[str]] = {}
        for run, one, when in claims:
            row = self.db.execute("select content, manifest from runs where run = ?", (run,)).fetchone()
            if row is None or row[0] != one.content or row[1] == one.sha256:
                continue
            why = f"{run}: manifest.json is another than {when}"
            evaluated = self._column("select run from runs where json_extract(record, '$.evaluation') = ?", run)
            for name in (run, *evaluated):
                problems.setdefault(name, []).append(why)
        return {run: "; ".join(dict.fromkeys(reasons)) for run, reasons in problems.items()}

    def reread(self, run: str) -> None:
        """Read a run's folder again, whatever the index holds of it: what a gate decides by comes from the files."""
        stamps = dict(iter_folders(self.root))
        self.db.execute("begin immediate")
        self._remove([run])
        if run in stamps:
            self._read(run, stamps[run])
            for one in {run, *self._around([run])}:
                self._join(one)
        self._settle()
        self._mark_aliases()
        self.db.execute("commit")

    def lost_changes(self, log: AliasLog) -> CorruptFile | None:
        """Return the error of a log that lacks a change which a run went by; None if it lacks none."""
        for run, alias, seq, hash in self.db.execute("select run, alias, seq, hash from noted order by seq"):
            if not 0 < seq <= len(log.changes) or log.changes[seq - 1].hash != hash:
                problem = f"is not in the log any more: {run} went by change {seq}"
                return CorruptFile("aliases", f"@{alias}", problem, REMEDY)
        return None

    def _settle(self) -> None:
        """Call a run interrupted that says it is running and whose process is gone."""
        running = self._column("select run from runs where json_extract(own, '$.status') = 'running'")
        locks = locked_inodes() if running else None
        for run in running:
            stage, _, name = run.partition(":")
            with suppress(OSError):
                held = locks is None or os.stat(self.root / stage / name).st_ino in locks
                said = "running" if held else "interrupted"
                why = None if held else ENDED
                settled = "record = json_set(record, '$.status', ?, '$.error', ?), status = ?"
                self.db.execute(f"update runs set {settled} where run = ?", (said, why, said, run))

    def _read(self, run: str, stamp: str) -> None:
        stage, _, name = run.partition(":")
        folder = self.root / stage / name
        manifest: Manifest | None = None
        try:
            require((folder / FILE).is_file(), "manifest", str(folder / FILE), "is no file", "Move the folder away.")
            manifest = read_manifest(folder)
            if manifest.stage == stage:
                own = record_of(folder, replace(manifest, name=name))  # references go by the folder's name too
            else:
                own = unreadable(folder, f"manifest.json is that of {manifest.ref}; this folder is {run}")
        except InputError as error:
            own = unreadable(folder, str(error))
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # edited by hand, in a way of its own
            own = unreadable(folder, f"manifest.json says something that runs do not write: {error!r}")
        # Why it cannot be read may go without the manifest being written: rights, another version of align.
        stamp = "" if own["status"] == UNREADABLE else stamp
        known = (content_of(manifest), file_digest(folder / FILE)) if manifest is not None else ("", "")
        values = (run, stamp, json.dumps(own), *known)
        self.db.execute("insert into runs (run, stamp, own, content, manifest) values (?, ?, ?, ?, ?)", values)
        if manifest is not None and "digest" in own:
            made = digests_of(own, manifest.outputs)
            self.db.executemany("insert into makes values (?, ?)", [(run, digest) for digest in made])
            self.db.executemany("insert into reads values (?, ?, ?, ?)", [(run, *edge) for edge in edges_of(own)])
            self.db.executemany("insert into noted values (?, ?, ?, ?)", [(run, *noted) for noted in noted_in(own)])
            if stage == "export" and manifest.done:
                rows = [(run, one, held.content, held.sha256) for one, held in held_by_receipts(folder).items()]
                self.db.executemany("insert into held values (?, ?, ?, ?)", rows)

    def _around(self, runs: Iterable[str]) -> set[str]:
        """Return the runs whose records say something of these: those that made what they read, and that read what
        they made."""
        found: set[str] = set()
        for run in runs:
            makers = "select makes.run from reads join makes on makes.digest = reads.digest where reads.run = ?"
            found.update(self._column(makers, run))
            found.update(name for name, _ in self._children(run))
        return found

    def _parents(self, run: str) -> Iterator[tuple[str, bool]]:
        """Yield (run that made it, whether that is there) of each input that a run made."""
        for digest, made_by in self.db.execute(
            "select digest, made_by from reads where run = ? order by rowid", (run,)
        ).fetchall():
            maker = self.maker(digest, made_by)
            if maker or made_by:  # it may be there under another name, or nowhere
                yield maker or made_by, bool(maker)

    def _children(self, run: str) -> list[tuple[str, str]]:
        """Return (run, input) of the runs that read what this one made."""
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
        children = [
            {**child, "through": name} for one, name in self._children(run) if (child := self._own(one)) is not None
        ]
        record = json.dumps(joined(own, self._parents(run), children))
        self.db.execute("delete from aliased where run = ?", (run,))
        self.db.execute("update runs set record = ?, status = ? where run = ?", (record, own["status"], run))

    def _column(self, query: str, *values: Any) -> list[Any]:
        return [value for (value,) in self.db.execute(query, values)]

    def _own(self, run: str) -> Record | None:
        row = self.db.execute("select run, own from runs where run = ?", (run,)).fetchone()
        return parse_record(*row) if row else None

    def record(self, run: str) -> Record | None:
        """Return the record of `stage:name`; None if there is no such run."""
        row = self.db.execute("select run, record from runs where run = ?", (run,)).fetchone()
        return parse_record(*row) if row else None

    def records(self) -> list[Record]:
        """Return the records of all runs, by name."""
        return [parse_record(*row) for row in self.db.execute("select run, record from runs order by run")]

    def names(self) -> list[str]:
        """Return all runs, as `stage:name`."""
        return self._column("select run from runs order by run")

    def maker(self, digest: str, made_by: str) -> str:
        """Return the run that made something: of several the one that a manifest names. Empty if none here did."""
        makers = self._column("select run from makes where digest = ? order by run", digest)
        return made_by if made_by in makers else next(iter(makers), "")

    def readers(self, digest: str) -> list[str]:
        """Return the runs that read something by its digest."""
        return self._column("select distinct run from reads where digest = ? order by run", digest)

    def filling(self, project: str) -> list[str]:
        """Return the done runs that sampled answers for an annotation project."""
        which = "json_extract(own, '$.project') = ? and json_extract(own, '$.stage') = 'sample'"
        which += " and json_extract(own, '$.config.stage.best_of') is null"
        done = f"select run from runs where {which} and json_extract(own, '$.status') = 'done' order by run"
        return self._column(done, project)

    def hashed(self, run: str) -> dict[str, Hashed]:
        """Return the files of a run that were hashed, as they were then."""
        rows = self.db.execute("select file, state, sha256, at from hashed where run = ?", (run,))
        return {file: Hashed(*found) for file, *found in rows}

    def note_hashed(self, run: str, found: Mapping[str, Hashed]) -> None:
        """Remember files of a run as they were hashed; what cannot be written is hashed again next time."""
        rows = [(run, file, one.state, one.sha256, one.at) for file, one in found.items()]
        with suppress(sqlite3.OperationalError):
            self.db.executemany("insert or replace into hashed values (?, ?, ?, ?, ?)", rows)

    def kind(self, path: str) -> str | None:
        """Return what SQLite calls the kind of the value at one of its paths, in the first record that has one: `null`
        if each has none, None if no record has such a path."""
        kinds = "select json_type(record, ?) as kind from runs where kind {} limit 1"
        for which in ("<> 'null'", "= 'null'"):
            if found := self.db.execute(kinds.format(which), (path,)).fetchone():
                return found[0]
        return None

    def keys(self) -> dict[str, str]:
        """Return the dotted keys of all records that hold a value or a list → the path of each, as SQLite writes it."""
        found = self.db.execute(
            "select distinct fullkey from runs, json_tree(record) where json_tree.type <> 'object' "
            "and fullkey not like '%[%'"
        )
        return {path.removeprefix("$.").replace('"', ""): path for (path,) in sorted(found)}

    def selected(self, condition: str, order: str, values: Sequence[Any], limit: int, offset: int = 0) -> list[Record]:
        """Return records by a condition and an order in SQL with `values` in them, see `align.registry.query`."""
        query = f"select run, record from runs where {condition} order by {order} limit ? offset ?"
        return [parse_record(*row) for row in self.db.execute(query, [*values, limit, offset])]

    def statuses(self) -> dict[str, int]:
        """Return how many runs have each status."""
        counted = "select status, count(*) from runs group by status order by status"
        return {str(status): count for status, count in self.db.execute(counted)}

    def stages(self) -> dict[str, int]:
        """Return how many runs are of each stage."""
        counted = "select substr(run, 1, instr(run, ':') - 1) as stage, count(*) from runs group by stage"
        return dict(self.db.execute(counted).fetchall())

    def count(self, condition: str, values: Sequence[Any]) -> int:
        """Count the runs that meet a condition."""
        return self.db.execute(f"select count(*) from runs where {condition}", values).fetchone()[0]


def held_by_receipts(folder: Path) -> dict[str, HeldManifest]:
    """Return the manifests that the receipts of an export hold, of the one export or of its kinds."""
    held: dict[str, HeldManifest] = {}
    for pattern in (RECEIPT, f"*/{RECEIPT}"):
        for path in sorted((folder / "artifact").glob(pattern)):
            with suppress(InputError):  # one that cannot be read is told of where it is asked for
                held |= parse_held_manifests(json_object(path, RECEIPT, "Export again.").get("manifests")) or {}
    return held


def parse_record(run: str, text: str) -> Record:
    """Return a record that was written down.

    Raises:
        Damaged: it is that of no such run.
    """
    found = json.loads(text) if isinstance(text, str) else None
    if not isinstance(found, dict) or found.get("run") != run:
        raise Damaged(f"the index holds no record of {run!r}")
    return found


def read_only(path: Path) -> str:
    """Return the URI of a database that is not written to, and that nobody writes to."""
    return f"file:{quote(str(path.absolute()))}?mode=ro&immutable=1"


def is_moved_aside(path: Path) -> bool:
    """Free the name of a file that is no index, and return whether that could be done."""
    with suppress(OSError):
        move_aside(path)
        return True
    return False
