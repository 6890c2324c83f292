"""An index of the run folders: one SQLite file beside them, updated whenever it is opened.

It holds nothing that the folders do not hold. An index of another version is rebuilt. One that is damaged, or that
another program made, is renamed first. If no file can be written, as on a read-only disk, the index is kept in memory
for one query.
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
from align.core.errors import CorruptFile, InputError, find_lone_surrogate, require
from align.core.files import has_file
from align.core.outputs import move_aside
from align.registry.record import (
    ADAPTERS,
    UNREADABLE,
    Record,
    join_records,
    list_alias_changes,
    list_digests,
    list_input_edges,
    make_record,
    make_unreadable_record,
)
from align.run.alias_log import REMEDY, AliasLog, Change, read_alias_log
from align.run.digests import file_digest
from align.run.figures import FILE as METRICS
from align.run.figures import IN_ARTIFACT
from align.run.files import read_json_object
from align.run.manifest import (
    FILE,
    Manifest,
    ManifestDigests,
    get_weights_digest,
    parse_manifest_digests,
    read_manifest,
)
from align.run.receipt import RECEIPT
from align.run.stale import FILE as STALE


def iter_run_stamps(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (`stage:name`, stamp) for each run folder with a manifest; a changed stamp shows that the folder has
    changed.

    The stamp changes when the manifest is replaced, the run is marked stale, its metrics are written again, or a
    server's log of adapters grows.

    Raises:
        InputError: A folder of runs cannot be listed.
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
            folder = f"{root}/{stage}/{name}"  # building 10,000 Paths would double the time
            if stamp := read_stamp(f"{folder}/{FILE}"):
                yield f"{stage}:{name}", " ".join([stamp, *(read_stamp(f"{folder}/{file}") for file in files)])


def read_stamp(path: Path | str) -> str:
    """Return a text with the size, times and inode of a file, which changes when the file does, or "" if it is missing.

    No program can set the change time back.
    """
    if not os.access(path, os.F_OK):  # faster than an exception
        return ""
    with suppress(OSError):
        status = os.stat(path)
        return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}-{status.st_ino}"
    return ""


def read_locked_inodes() -> set[int] | None:
    """Return the inodes of all files and folders that processes of this machine have locked, or None if unknown."""
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
        return {int(line.split()[-3].rpartition(":")[2]) for line in lines if "FLOCK" in line}
    return None


@dataclass(frozen=True, slots=True)
class FileHash:
    """The SHA-256 of a file, with its size and times and the moment of hashing.

    Attributes:
        state: result of `read_stamp`.
        sha256: SHA-256 in hex.
        at: time, ISO 8601 in UTC.
    """

    state: str
    sha256: str
    at: str


INDEX = ".registry.db"
OF_RECORDS = ("index.py", "record.py", "../run/figures.py")
"""Source files whose code decides the content of the index; the index is rebuilt when they change."""
UNWRITTEN = tuple(f"SQLITE_{why}" for why in ("BUSY", "LOCKED", "READONLY", "CANTOPEN", "PERM", "IOERR", "FULL"))
"""Names of SQLite errors which mean that the index file cannot be written. Other errors mean that it is damaged."""
ENDED = "its process ended without reporting an error"
WAIT_S = 30
"""Seconds to wait for another process that updates the same index."""
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
"""Table → its column with the name of the run that its rows were read from."""


T = TypeVar("T")


@cache
def compute_version() -> int:
    """Return a digest of the code that decides the content of the index, as its version.

    An index with another version is rebuilt.
    """
    code = b"".join((Path(__file__).parent / name).read_bytes() for name in OF_RECORDS)
    return int.from_bytes(sha256(code).digest()[:4], "big") >> 1


DAMAGED = (sqlite3.DatabaseError, UnicodeDecodeError, json.JSONDecodeError)
"""Exceptions that reading a damaged index may raise."""


class DamagedIndex(sqlite3.DatabaseError):
    """Error for an index whose tables or rows were not written by this code."""


def query_index(root: Path, query: Callable[[Index], T]) -> T:
    """Open and update the index of a folder of runs, call `query` with it, and return its result.

    A damaged index is rebuilt first.

    Args:
        root: the folder of all runs.
    """
    try:
        with Index(root) as index:
            return query(index)
    except DAMAGED as error:
        if get_error_name(error) == "SQLITE_ERROR" and "malformed" not in str(error):
            raise  # the query itself is wrong
    with Index(
        root, rebuild=True
    ) as index:  # outside of the except clause, whose traceback holds a cursor and so a lock
        return query(index)


def get_error_name(error: Exception) -> str:
    """Return SQLite's name of an exception, such as `SQLITE_BUSY`, or an empty text for other exceptions."""
    return getattr(error, "sqlite_errorname", "")


class Index:
    """A queryable index of the runs under one root, updated when it is opened. Use it as a context manager.

    Args:
        root: the folder of all runs.
        rebuild: build it from nothing.

    Attributes:
        path: path of the file; None if it is in memory.
        changed: number of folders that were read again or are gone.
        aliases_error: why the aliases are unknown; empty if their log can be read.
        unnamed: folders whose names are not valid UTF-8. They are left out.
    """

    def __init__(self, root: Path, rebuild: bool = False) -> None:
        self.root = root
        has_file(root / INDEX, "run.root", f"Move {INDEX} away: it is made again.")
        attempts: list[tuple[Path | None, bool]] = [(None, True), (None, False)]
        if (root / INDEX).exists() or any(iter_run_stamps(root)):  # a folder without runs gets no index
            attempts.insert(0, (root / INDEX, False))
        while True:
            self.path, copy_file = attempts.pop(0)
            try:
                self.changed = self._open(rebuild, copy_file)
                return
            except DAMAGED as error:
                if not attempts:
                    raise
                if self.path and not get_error_name(error).startswith(UNWRITTEN) and try_move_aside(self.path):
                    attempts.insert(0, (self.path, False))

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.db.close()

    def _open(self, rebuild: bool, copy_file: bool) -> int:
        """Open the index file, or a database in memory if `path` is `None`, update it, and return the number of changed
        folders.

        Args:
            copy_file: start from a copy of the file in memory, which may be nearly up to date.
        """
        self.db = sqlite3.connect(self.path or ":memory:", timeout=WAIT_S, isolation_level=None)
        try:
            if copy_file:
                with (
                    suppress(sqlite3.Error),
                    closing(sqlite3.connect(to_read_only_uri(self.root / INDEX), uri=True)) as file_db,
                ):
                    file_db.backup(self.db)
            return self._update(rebuild)
        except BaseException:
            self.db.close()
            raise

    def _update(self, rebuild: bool) -> int:
        """Create missing or outdated tables and update their rows in one transaction. Returns the number of changed
        folders."""
        self.db.execute("begin immediate")  # a second process waits, and then finds nothing to do
        if rebuild or self.db.execute("pragma user_version").fetchone() != (compute_version(),):
            objects = self.db.execute("select type, name from sqlite_master where sql is not null").fetchall()
            if objects and not {("table", "runs"), ("table", "hashed")} <= set(objects):
                raise DamagedIndex("another program made the tables")
            for kind, name in objects:
                if kind == "table" and name != "hashed":  # hashes are expensive, so they are kept
                    self.db.execute(f'drop table "{name}"')
            for statement in filter(str.strip, TABLES.split(";")):
                self.db.execute(statement)
            self.db.execute(f"pragma user_version = {compute_version()}")
        changed = self._refresh()
        self.db.execute("commit")
        return changed

    def _refresh(self) -> int:
        """Update the rows of run folders that are new, changed or gone, and return their number.

        Records that depend on these runs are updated too.
        """
        old_stamps: dict[str, str] = dict(self.db.execute("select run, stamp from runs"))
        stamps = dict(iter_run_stamps(self.root))
        self.unnamed = [run for run in stamps if find_lone_surrogate(run)]
        for run in self.unnamed:
            del stamps[run]
        gone = old_stamps.keys() - stamps.keys()
        new = {run: stamp for run, stamp in stamps.items() if old_stamps.get(run) != stamp}
        neighbours = self._find_neighbours(gone | new.keys())
        self._delete_rows(gone | new.keys())
        for run, stamp in new.items():
            self._insert_run(run, stamp)
        for run in (neighbours | new.keys() | self._find_neighbours(new.keys())) - gone:
            self._update_joined_record(run)
        self._update_running_statuses()
        self._update_alias_marks()
        return len(gone) + len(new)

    def _delete_rows(self, runs: Iterable[str]) -> None:
        for run in runs:
            for table, column in OF_A_RUN.items():
                self.db.execute(f"delete from {table} where {column} = ?", (run,))

    def _update_alias_marks(self) -> None:
        """Store in each run's record the aliases that refer to it, and an error if its manifest differs from a recorded
        digest."""
        aliases: dict[str, list[str]] = {}
        replaced: dict[str, str] = {}
        changes: dict[str, Change] = {}
        try:
            log = read_alias_log(self.root)
            changes = log.get_current_changes()
            replaced = self.find_replaced_manifests(log)
            self.aliases_error = str(self.find_lost_changes(log) or "")
        except InputError as error:  # the runs are listed without aliases
            changes = {}
            self.aliases_error = str(error)
        for alias, change in changes.items():
            for arm in change.arms:
                if run := self.maker(arm.digest, arm.ref):
                    aliases.setdefault(run, []).append(alias)
        new = {run: (json.dumps(aliases.get(run, [])), replaced.get(run)) for run in aliases.keys() | replaced.keys()}
        old = {run: tuple(values) for run, *values in self.db.execute("select run, aliases, replaced from aliased")}
        for run in {run for run, _ in new.items() ^ old.items()}:
            update = "update runs set record = json_set(record, '$.aliases', json(?), '$.replaced', ?) where run = ?"
            self.db.execute(update, (*new.get(run, ("[]", None)), run))
        self.db.execute("delete from aliased")
        self.db.executemany("insert into aliased values (?, ?, ?)", [(run, *values) for run, values in new.items()])

    def find_replaced_manifests(self, log: AliasLog) -> dict[str, str]:
        """Return run → problem for each run whose manifest, or its evaluation's manifest, differs from a recorded
        digest.

        The log of aliases and the receipts of exports record digests of manifests.
        """
        latest: dict[str, tuple[ManifestDigests, str]] = {}
        for change in log.changes:  # the newest change counts
            for arm in change.arms:
                for run, manifest in arm.manifests.items():
                    latest[run] = manifest, f"when @{change.alias} was changed (change {change.seq})"
        claims = [(run, manifest, when) for run, (manifest, when) in latest.items()]
        for export, run, *digests in self.db.execute("select export, run, content, sha256 from held"):
            claims.append((run, ManifestDigests(*digests), f"when {export} was written"))
        problems: dict[str, list[str]] = {}
        for run, manifest, when in claims:
            row = self.db.execute("select content, manifest from runs where run = ?", (run,)).fetchone()
            if row is None or row[0] != manifest.content or row[1] == manifest.sha256:
                continue
            problem = f"{run}: manifest.json was different {when}"
            subjects = self._select_column("select run from runs where json_extract(record, '$.evaluation') = ?", run)
            for name in (run, *subjects):
                problems.setdefault(name, []).append(problem)
        return {run: "; ".join(dict.fromkeys(reasons)) for run, reasons in problems.items()}

    def reread(self, run: str) -> None:
        """Update a run's rows from its folder even if its stamp is unchanged.

        Gates do so, as they decide by the files.
        """
        stamps = dict(iter_run_stamps(self.root))
        self.db.execute("begin immediate")
        self._delete_rows([run])
        if run in stamps:
            self._insert_run(run, stamps[run])
            for neighbour in {run, *self._find_neighbours([run])}:
                self._update_joined_record(neighbour)
        self._update_running_statuses()
        self._update_alias_marks()
        self.db.execute("commit")

    def find_lost_changes(self, log: AliasLog) -> CorruptFile | None:
        """Return a CorruptFile error if the log of aliases lacks a change that a run recorded, otherwise None."""
        for run, alias, seq, hash in self.db.execute("select run, alias, seq, hash from noted order by seq"):
            if not 0 < seq <= len(log.changes) or log.changes[seq - 1].hash != hash:
                problem = f"is no longer in the log, but {run} relied on change {seq}"
                return CorruptFile("aliases", f"@{alias}", problem, REMEDY)
        return None

    def _update_running_statuses(self) -> None:
        """Store the status `interrupted` for each run with the status `running` whose process no longer holds its
        folder's lock."""
        running = self._select_column("select run from runs where json_extract(own, '$.status') = 'running'")
        locks = read_locked_inodes() if running else None
        for run in running:
            stage, _, name = run.partition(":")
            with suppress(OSError):
                is_running = locks is None or os.stat(self.root / stage / name).st_ino in locks
                status = "running" if is_running else "interrupted"
                error = None if is_running else ENDED
                values = "record = json_set(record, '$.status', ?, '$.error', ?), status = ?"
                self.db.execute(f"update runs set {values} where run = ?", (status, error, status, run))

    def _insert_run(self, run: str, stamp: str) -> None:
        """Read a run's manifest and folder, and insert its record, artifact digests, inputs and alias changes.

        An unreadable folder gets a record with the status `unreadable`.
        """
        stage, _, name = run.partition(":")
        folder = self.root / stage / name
        manifest: Manifest | None = None
        try:
            require((folder / FILE).is_file(), "manifest", str(folder / FILE), "is no file", "Move the folder away.")
            manifest = read_manifest(folder)
            if manifest.stage == stage:
                record = make_record(folder, replace(manifest, name=name))  # references use the folder's name
            else:
                record = make_unreadable_record(
                    folder, f"manifest.json is that of {manifest.ref}; this folder is {run}"
                )
        except InputError as error:
            record = make_unreadable_record(folder, str(error))
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # edited by hand
            record = make_unreadable_record(folder, f"manifest.json has content that no run writes: {error!r}")
        # Read it again next time: the cause, such as rights, may end without a new manifest.
        stamp = "" if record["status"] == UNREADABLE else stamp
        digests = (get_weights_digest(manifest), file_digest(folder / FILE)) if manifest is not None else ("", "")
        values = (run, stamp, json.dumps(record), *digests)
        self.db.execute("insert into runs (run, stamp, own, content, manifest) values (?, ?, ?, ?, ?)", values)
        if manifest is not None and "digest" in record:
            artifacts = [(run, digest) for digest in list_digests(record, manifest.outputs)]
            self.db.executemany("insert into makes values (?, ?)", artifacts)
            self.db.executemany(
                "insert into reads values (?, ?, ?, ?)", [(run, *edge) for edge in list_input_edges(record)]
            )
            self.db.executemany(
                "insert into noted values (?, ?, ?, ?)", [(run, *change) for change in list_alias_changes(record)]
            )
            if stage == "export" and manifest.done:
                receipts = read_receipt_digests(folder).items()
                rows = [(run, name, digests.content, digests.sha256) for name, digests in receipts]
                self.db.executemany("insert into held values (?, ?, ?, ?)", rows)

    def _find_neighbours(self, runs: Iterable[str]) -> set[str]:
        """Return the runs that made inputs of the given runs or read their outputs, whose records depend on them."""
        neighbours: set[str] = set()
        for run in runs:
            makers = "select makes.run from reads join makes on makes.digest = reads.digest where reads.run = ?"
            neighbours.update(self._select_column(makers, run))
            neighbours.update(name for name, _ in self._find_children(run))
        return neighbours

    def _iter_parents(self, run: str) -> Iterator[tuple[str, bool]]:
        """Yield (run, exists) for the maker of each input that was made by a run."""
        for digest, made_by in self.db.execute(
            "select digest, made_by from reads where run = ? order by rowid", (run,)
        ).fetchall():
            maker = self.maker(digest, made_by)
            if maker or made_by:  # the maker may have another name, or be gone
                yield maker or made_by, bool(maker)

    def _find_children(self, run: str) -> list[tuple[str, str]]:
        """Return (run, name of its input) for each run that read an artifact of the given run."""
        query = (
            "select distinct reads.run, reads.input from makes join reads on reads.digest = makes.digest "
            "where makes.run = ? and reads.run != ? order by reads.run"
        )
        return self.db.execute(query, (run, run)).fetchall()

    def _update_joined_record(self, run: str) -> None:
        """Compute and store a run's record again from its own record, its parents and its children."""
        own_record = self._get_own_record(run)
        if own_record is None:
            return
        children = []
        for name, input in self._find_children(run):
            if (child := self._get_own_record(name)) is not None:
                children.append({**child, "through": input})
        record = json.dumps(join_records(own_record, self._iter_parents(run), children))
        self.db.execute("delete from aliased where run = ?", (run,))
        self.db.execute("update runs set record = ?, status = ? where run = ?", (record, own_record["status"], run))

    def _select_column(self, query: str, *values: Any) -> list[Any]:
        return [value for (value,) in self.db.execute(query, values)]

    def _get_own_record(self, run: str) -> Record | None:
        row = self.db.execute("select run, own from runs where run = ?", (run,)).fetchone()
        return parse_record(*row) if row else None

    def record(self, run: str) -> Record | None:
        """Return the record of the run `stage:name`, or None if there is no such run."""
        row = self.db.execute("select run, record from runs where run = ?", (run,)).fetchone()
        return parse_record(*row) if row else None

    def records(self) -> list[Record]:
        """Return the records of all runs, sorted by `stage:name`."""
        return [parse_record(*row) for row in self.db.execute("select run, record from runs order by run")]

    def names(self) -> list[str]:
        """Return the names of all runs as `stage:name`, sorted."""
        return self._select_column("select run from runs order by run")

    def maker(self, digest: str, made_by: str) -> str:
        """Return the run that made the artifact with a digest, or an empty text if no run here made it.

        Args:
            made_by: run that a manifest names as the maker; it is preferred if several made this digest.
        """
        makers = self._select_column("select run from makes where digest = ? order by run", digest)
        return made_by if made_by in makers else next(iter(makers), "")

    def find_readers(self, digest: str) -> list[str]:
        """Return the runs that have the artifact with a digest as an input, sorted."""
        return self._select_column("select distinct run from reads where digest = ? order by run", digest)

    def list_sampling_runs(self, project: str) -> list[str]:
        """Return the finished runs that sampled answers for an annotation project, except best-of-n runs."""
        condition = "json_extract(own, '$.project') = ? and json_extract(own, '$.stage') = 'sample'"
        condition += " and json_extract(own, '$.config.stage.best_of') is null"
        query = f"select run from runs where {condition} and json_extract(own, '$.status') = 'done' order by run"
        return self._select_column(query, project)

    def get_hashes(self, run: str) -> dict[str, FileHash]:
        """Return file name → FileHash of the last hashing, for the files of a run that were ever hashed."""
        rows = self.db.execute("select file, state, sha256, at from hashed where run = ?", (run,))
        return {file: FileHash(*values) for file, *values in rows}

    def store_hashes(self, run: str, files: Mapping[str, FileHash]) -> None:
        """Store the hashes of a run's files in the index, unless it cannot be written.

        Then they are computed again next time.
        """
        rows = [(run, file, hashed.state, hashed.sha256, hashed.at) for file, hashed in files.items()]
        with suppress(sqlite3.OperationalError):
            self.db.executemany("insert or replace into hashed values (?, ?, ?, ?, ?)", rows)

    def get_json_type(self, path: str) -> str | None:
        """Return SQLite's type of the value at a JSON path, such as `text`, from the first record that has one.

        Returns `null` if every record has null there, and None if no record has the path.
        """
        kinds = "select json_type(record, ?) as kind from runs where kind {} limit 1"
        for condition in ("<> 'null'", "= 'null'"):
            if row := self.db.execute(kinds.format(condition), (path,)).fetchone():
                return row[0]
        return None

    def list_key_paths(self) -> dict[str, str]:
        """Return dotted key → SQLite JSON path for each key with a value or a list in any record."""
        rows = self.db.execute(
            "select distinct fullkey from runs, json_tree(record) where json_tree.type <> 'object' "
            "and fullkey not like '%[%'"
        )
        return {path.removeprefix("$.").replace('"', ""): path for (path,) in sorted(rows)}

    def select_records(
        self, condition: str, order: str, values: Sequence[Any], limit: int, offset: int = 0
    ) -> list[Record]:
        """Return the records that meet an SQL condition, in an SQL order, with `values` bound to the parameters of
        both.

        See `align.registry.query`.
        """
        query = f"select run, record from runs where {condition} order by {order} limit ? offset ?"
        return [parse_record(*row) for row in self.db.execute(query, [*values, limit, offset])]

    def count_by_status(self) -> dict[str, int]:
        """Return status → number of runs."""
        counted = "select status, count(*) from runs group by status order by status"
        return {str(status): count for status, count in self.db.execute(counted)}

    def count_by_stage(self) -> dict[str, int]:
        """Return stage → number of runs."""
        counted = "select substr(run, 1, instr(run, ':') - 1) as stage, count(*) from runs group by stage"
        return dict(self.db.execute(counted).fetchall())

    def count_runs(self, condition: str, values: Sequence[Any]) -> int:
        """Return the number of runs that meet an SQL condition with the parameters `values`."""
        return self.db.execute(f"select count(*) from runs where {condition}", values).fetchone()[0]


def read_receipt_digests(folder: Path) -> dict[str, ManifestDigests]:
    """Return run → digests of its manifest, as recorded in the receipts in an export's folder."""
    digests: dict[str, ManifestDigests] = {}
    for pattern in (RECEIPT, f"*/{RECEIPT}"):
        for path in sorted((folder / "artifact").glob(pattern)):
            with suppress(InputError):  # an unreadable receipt is reported when it is checked
                digests |= (
                    parse_manifest_digests(read_json_object(path, RECEIPT, "Export again.").get("manifests")) or {}
                )
    return digests


def parse_record(run: str, text: str) -> Record:
    """Parse the JSON record of a run from the index, or raise DamagedIndex if it is not the record of `run`.

    Raises:
        DamagedIndex: It is not the record of this run.
    """
    record = json.loads(text) if isinstance(text, str) else None
    if not isinstance(record, dict) or record.get("run") != run:
        raise DamagedIndex(f"the index holds no record of {run!r}")
    return record


def to_read_only_uri(path: Path) -> str:
    """Return the SQLite URI that opens a database read-only and without locks."""
    return f"file:{quote(str(path.absolute()))}?mode=ro&immutable=1"


def try_move_aside(path: Path) -> bool:
    """Rename a file that is not a usable index, and return whether that succeeded. Never raises."""
    with suppress(OSError):
        move_aside(path)
        return True
    return False
