"""What a selector of `stage.action=forget` means: rows of the store, rows of data sets, and the runs that read them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from align.annotate.store import Store
from align.annotate.store.erasure import ANNOTATOR, ITEM, PROJECT, About, about, texts_of
from align.annotate.store.preference_pairs import pairs_of
from align.core.errors import AlignError, InputError, require
from align.core.files import check_readable
from align.data.read.content import row_bytes
from align.data.read.content import texts as said_by
from align.data.sets.forget import Facts
from align.data.sets.ids import id_of, kinds_in
from align.data.sets.published import DataSet, data_set
from align.data.sets.record_columns import CONTENT, records_of
from align.data.sets.sides import SIDES
from align.data.trained_ids import FILE as IDS
from align.data.trained_ids import TRAINS
from align.registry.forgotten_texts import Marks, Texts
from align.registry.index import Index
from align.registry.record import Record
from align.run.artifacts import REPLACED
from align.run.files import json_object

SOURCE, CONTENT_ID = "source", "content_id"
KINDS = (ANNOTATOR, SOURCE, ITEM, CONTENT_ID)
TRAINED, READ, HELD = "trained on what is forgotten", "read what is forgotten", "held what is forgotten"
MAY_HAVE = "may have read what is forgotten"
FILES = "read it from files, which are yours: take the rows out of them before you run the commands"


@dataclass(frozen=True, slots=True)
class Selector:
    """What is to be forgotten.

    Attributes:
        kind: one of `KINDS`.
        project: of the annotation store.

    Raises:
        InputError: the value can name nothing of that kind.
    """

    kind: str
    value: str
    project: str

    def __post_init__(self) -> None:
        if self.kind == CONTENT_ID:
            hexadecimal = len(self.value) == 64 and not {*self.value.lower()} - {*"0123456789abcdef"}
            remedy = "An id has 64 hex digits, see the column content_id of a data set; quote it."
            require(hexadecimal, self.field, self.value, "is no content id", remedy)

    @property
    def field(self) -> str:
        return f"stage.{self.kind}"


@dataclass(frozen=True)
class Selection:
    """What there is to forget, and who read it.

    Attributes:
        stored: what the store holds of it; None for nothing.
        sets: data set, as `data:NAME` → the content ids of its rows that go.
        texts: of all of it.
        voted: the runs in whose files rows are known by their votes, too.
        read: run → why it is stale: that it read some of it, or that nobody can say.
        notes: what cannot be known, a sentence each.
    """

    stored: About | None = None
    sets: Mapping[str, frozenset[str]] = field(default_factory=dict)
    texts: Texts = field(default_factory=Texts)
    voted: frozenset[str] = frozenset()
    read: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.stored or self.sets or self.read)

    def texts_of(self, run: str) -> Texts:
        """Return what is looked for in the files of a run."""
        return self.texts if run in self.voted else replace(self.texts, marks=Marks())


def selected(index: Index, wanted: Selector, url: str) -> Selection:
    """Return what a selector means now.

    Args:
        url: of the annotation store.

    Raises:
        InputError: nothing is known of it; the message has the nearest names.
    """
    records = index.records()
    stored = in_store(wanted, url)
    texts = Texts()
    if stored:
        annotator, item = (stored.id if stored.what == what else "" for what in (ANNOTATOR, ITEM))
        texts = Texts(stored.texts, stored.shared, stored.names, Marks(annotator, item, frozenset(stored.votes)))
    from_files = list[str]()
    sets, read, notes = dict[str, frozenset[str]](), dict[str, str](), list[str]()
    for record in records:
        folder = index.root / record["folder"]
        if record["stage"] == "data" and record["status"] == "done" and not (folder / "artifact" / REPLACED).is_file():
            try:
                ids, found = rows_in(data_set(folder / "artifact"), wanted, stored)
            except (AlignError, OSError, pa.ArrowException, KeyError) as error:
                notes.append(f"{record['run']} cannot be read, so its rows are not known: {error}")
                continue
            if ids:
                sets[record["run"]], read[record["run"]], texts = ids, HELD, texts | found
            continue  # its rows say what it has
        if why := why_read(index.root, record, wanted, stored):
            read.setdefault(record["run"], why)
            from_data_set = any(one.get("root") for one in record["inputs"].values())
            if why in (TRAINED, READ) and stored is None and record["stage"] != "data" and not from_data_set:
                from_files.append(record["run"])  # it will read its rows from files again
    if not (stored or sets or any(not why.startswith(MAY_HAVE) for why in read.values())):
        raise nothing_known(wanted, records, index.root, notes)
    notes += [f"{', '.join(from_files)} {FILES}"] if from_files else []
    if stored is None:
        notes += same_in_store(url, texts)
    project = stored.project if stored else None
    voted = frozenset(
        record["run"]
        for record in records
        if project is not None
        and project in (record.get("project"), *(i.get("project") for i in record["inputs"].values()))
    )
    return Selection(stored, sets, texts, voted, read, tuple(notes))


def nothing_known(wanted: Selector, records: Sequence[Record], root: Path, notes: Sequence[str]) -> InputError:
    close = ""
    if wanted.kind == SOURCE:
        names = {name for record in records for name in sources_in(root, record)}
        near = difflib.get_close_matches(wanted.value, sorted(names), n=3)
        close = f"Did you mean {', '.join(near)}? " if near else ""
    named = wanted.kind in (ANNOTATOR, ITEM)
    where = "Name the project=… and the store.url=… that it is in." if named else "Name the run.root=… that it is in."
    problem = (
        f"nothing is known of it under {root}, nor in the annotation store{''.join(f'; {note}' for note in notes)}"
    )
    return InputError(wanted.field, wanted.value, problem, f"{close}{where}")


def in_store(wanted: Selector, url: str) -> About | None:
    """Return what the annotation store holds of it; None if it cannot hold any.

    Raises:
        InputError: an item or an annotator that it does not know; there is no such store.
    """
    if wanted.kind in (ITEM, ANNOTATOR):
        with Store.open(url, create=False) as store:
            try:
                return about(store, wanted.project, wanted.kind, wanted.value)
            except InputError as error:
                if error.field != wanted.kind:
                    raise
                raise InputError(wanted.field, wanted.value, error.problem, error.remedy) from error
    try:
        opened = Store.open(url, create=False)
    except InputError:  # there is none
        return None
    with opened as store:
        if wanted.kind == SOURCE:
            return about(store, wanted.value, PROJECT, "") if wanted.value in store.projects() else None
        for project in store.projects():
            if item := item_of(store, project, bytes.fromhex(wanted.value)):
                return about(store, project, ITEM, item)
    return None


def same_in_store(url: str, texts: Texts) -> Iterator[str]:
    """Yield notes on items of the store that have the same texts: they are somebody's to name."""
    with suppress(InputError), Store.open(url, create=False) as store:  # or there is none
        for project in store.projects():
            there = (item.id for item in store.items(project) if any(map(texts.within, texts_of(item))))
            if found := list(there):
                name = f"stage.item={found[0]}" + (f" and {len(found) - 1:,} more" if len(found) > 1 else "")
                yield f"project {project} has the same texts, and they stay there: {name}, project={project}"


def item_of(store: Store, project: str, content_id: bytes) -> str:
    """Return the item that a pair with this id is of; empty for none. To forget the pair is to forget the item: its
    texts stand nowhere else in the store."""
    with store.reading():
        if (key := store.key(project)) is None:
            return ""
        items = {item.id: item for item in store.items(project)}
        for vote in store.rankings(project):
            if vote.item in items and any(
                id_of(row_bytes(pair), key) == content_id for pair in pairs_of(vote, items[vote.item])
            ):
                return vote.item
    return ""


def rows_in(found: DataSet, wanted: Selector, stored: About | None) -> tuple[frozenset[str], Texts]:
    """Return the content ids of the rows of a data set that go, and their texts."""
    goes = going(found, wanted, stored)
    ids, own, others = set[str](), set[str](), set[str]()

    def tables() -> Iterator[pa.Table]:
        return chain.from_iterable(map(found.tables, SIDES))

    for table in tables():
        ids.update(id for id, gone in zip(table["content_id"].to_pylist(), goes(table), strict=True) if gone)
    if not ids:
        return frozenset(), Texts()
    for table in tables():
        own.update(texts_in(found.kind, table.filter(pa.array([id in ids for id in table["content_id"].to_pylist()]))))
    for table in tables():
        rest = table.filter(pa.array([id not in ids for id in table["content_id"].to_pylist()]))
        others.update(text for text in texts_in(found.kind, rest) if text in own)
    return frozenset(ids), Texts(frozenset(own - others), frozenset(others))


def texts_in(kind: str, table: pa.Table) -> Iterator[str]:
    columns = [name for name in CONTENT[kind] if name in table.column_names]
    for record in records_of(kind, table.select(columns), [""] * table.num_rows):
        yield from (text for text in said_by(record) if text)


def going(found: DataSet, wanted: Selector, stored: About | None) -> Facts:
    """Return what says of each row of a table whether it goes."""
    kinds = {name: kind.project for name, kind in kinds_in(found.data).items() if kind.project}
    source = wanted.value if wanted.kind == SOURCE else None
    content_id = wanted.value.lower() if wanted.kind == CONTENT_ID else None

    def was_vote(row: Mapping[str, str | None]) -> bool:
        """Return whether a row was a vote that goes."""
        if stored is None or kinds.get(row["source"] or "") != stored.project:
            return False
        vote = str(row.get("id") or "").partition(":")[0]
        known = row.get("group_id") == stored.id or (vote.isdigit() and int(vote) in stored.votes)
        return stored.what == PROJECT or known

    def goes(table: pa.Table) -> Iterator[bool]:
        rows = table.select([name for name in ("content_id", "source", "id", "group_id") if name in table.column_names])
        for row in rows.to_pylist():
            yield row["content_id"] == content_id or row["source"] == source or was_vote(row)

    return goes


def why_read(root: Path, record: Record, wanted: Selector, stored: About | None) -> str:
    """Return why a run is stale: it read some of it itself, or nobody can say; empty if it did not."""
    certain = TRAINED if record["stage"] in TRAINS else HELD if record["stage"] == "data" else READ
    for one in record["inputs"].values():
        # What a simulated annotator reads of a project has no row of the ledger: none of it is in what its run made.
        if stored is not None and one.get("project") == stored.project and stored.read_by(one.get("seq", -1)):
            return certain
    if wanted.kind == SOURCE and wanted.value in sources_in(root, record):
        return certain
    if wanted.kind == CONTENT_ID and record["stage"] in TRAINS:
        return by_ids(root / record["folder"] / IDS, bytes.fromhex(wanted.value))
    return ""


def sources_in(root: Path, record: Record) -> set[str]:
    """Return what the rows of a run are called: the sources of a data set, and files by their names."""
    found = set[str]()
    for name, one in record["inputs"].items():
        if name.startswith("sources."):
            found.add(name.removeprefix("sources."))
        if name == "data" or name.startswith("sources."):
            path = str(one.get("path") or "")
            found |= {path, Path(path).name} | ({str(one["project"])} if one.get("project") else set())
    about_set = root / record["folder"] / "artifact" / "data.json"
    if record["stage"] == "data" and about_set.is_file():
        try:
            listed = json_object(about_set, "data.json", "").get("sources") or ()
            found |= {str(one["name"]) for one in listed}
        except (InputError, KeyError, TypeError):
            pass  # what its manifest has is enough to find it
    return found - {"", "artifact"}


def by_ids(path: Path, content_id: bytes) -> str:
    """Return why a run that trained is stale, by the ids of its rows; empty if it saw no such row."""
    if not path.is_file():
        return f"{MAY_HAVE}: it keeps no ids of its rows"
    nameless = 0
    check_readable(path, "file")
    try:
        for batch in pq.ParquetFile(path).iter_batches(columns=["content_id"]):
            ids = batch.column(0)
            nameless += ids.null_count
            if content_id in ids.to_pylist():
                return TRAINED
    except (OSError, pa.ArrowException, KeyError) as error:
        return f"{MAY_HAVE}: the ids of its rows cannot be read ({type(error).__name__})"
    return f"{MAY_HAVE}: {nameless:,} of its rows have no id" if nameless else ""
