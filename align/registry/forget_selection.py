"""Selection of data for `stage.action=forget`: rows in the annotation store and in data sets, and the runs that read
them."""

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
from align.annotate.store.erasure import ANNOTATOR, ITEM, PROJECT, ErasureTarget, find_erasure_target, iter_texts
from align.annotate.store.preference_pairs import build_pairs
from align.core.errors import AlignError, InputError, require
from align.core.files import require_readable
from align.data.read.content import encode_content_row, list_texts
from align.data.sets.forget import RowPredicate
from align.data.sets.ids import compute_content_id, read_id_kinds
from align.data.sets.published import DataSet, load_data_set
from align.data.sets.record_columns import CONTENT, columns_to_records
from align.data.sets.splits import SPLITS
from align.data.trained_ids import FILE as IDS
from align.data.trained_ids import TRAINING_STAGES
from align.registry.forgotten_texts import ForgottenTexts, RowMarks
from align.registry.index import Index
from align.registry.record import Record
from align.run.artifacts import REPLACED
from align.run.files import read_json_object

SOURCE = "source"
CONTENT_ID = "content_id"
KINDS = (ANNOTATOR, SOURCE, ITEM, CONTENT_ID)
TRAINED = "trained on what is forgotten"
READ = "read what is forgotten"
HELD = "held what is forgotten"
MAY_HAVE = "may have read what is forgotten"
FILES = "read it from your own files: remove the rows from these files before you run the commands"


@dataclass(frozen=True, slots=True)
class Selector:
    """A selector of data to delete: the name of an annotator, a source, an item or a content id.

    Attributes:
        kind: one of `KINDS`.
        value: the annotator, source, item or content id.
        project: project of the annotation store.

    Raises:
        InputError: The value is not valid for this kind.
    """

    kind: str
    value: str
    project: str

    def __post_init__(self) -> None:
        if self.kind == CONTENT_ID:
            is_hex_digest = len(self.value) == 64 and not {*self.value.lower()} - {*"0123456789abcdef"}
            remedy = "An id has 64 hex digits, see the column content_id of a data set; quote it."
            require(is_hex_digest, self.field, self.value, "is no content id", remedy)

    @property
    def field(self) -> str:
        return f"stage.{self.kind}"


@dataclass(frozen=True)
class Selection:
    """The data to delete that a selector matches, the texts in it, and the runs that read it.

    Attributes:
        stored: matching data in the store; None if it holds none.
        sets: data set, as `data:NAME` → content ids of its rows to remove.
        texts: texts of all this data.
        runs_with_votes: runs that read the project, whose rows are also identified by their votes.
        stale_reasons: run → why it is stale: it read some of the data, or may have.
        notes: what cannot be known, one sentence each.
    """

    stored: ErasureTarget | None = None
    sets: Mapping[str, frozenset[str]] = field(default_factory=dict)
    texts: ForgottenTexts = field(default_factory=ForgottenTexts)
    runs_with_votes: frozenset[str] = frozenset()
    stale_reasons: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.stored or self.sets or self.stale_reasons)

    def get_texts_for_run(self, run: str) -> ForgottenTexts:
        """Return the texts to remove from a run's files, without ids of annotation rows unless the run read the
        project."""
        return self.texts if run in self.runs_with_votes else replace(self.texts, marks=RowMarks())


def select_data(index: Index, selector: Selector, url: str) -> Selection:
    """Find the data to delete in the annotation store and in data sets, its texts, and the runs that read it.

    Args:
        url: URL of the annotation store.

    Raises:
        InputError: Nothing matches. The message names the most similar names.
    """
    records = index.records()
    stored = find_stored_target(selector, url)
    texts = ForgottenTexts()
    if stored:
        annotator = stored.id if stored.kind == ANNOTATOR else ""
        item = stored.id if stored.kind == ITEM else ""
        texts = ForgottenTexts(
            stored.texts, stored.shared, stored.names, RowMarks(annotator, item, frozenset(stored.votes))
        )
    from_files: list[str] = []
    sets: dict[str, frozenset[str]] = {}
    stale_reasons: dict[str, str] = {}
    notes: list[str] = []
    for record in records:
        run = record["run"]
        folder = index.root / record["folder"]
        if record["stage"] == "data" and record["status"] == "done" and not (folder / "artifact" / REPLACED).is_file():
            # The rows of a data set decide, not its inputs.
            try:
                ids, set_texts = select_rows(load_data_set(folder / "artifact"), selector, stored)
            except (AlignError, OSError, pa.ArrowException, KeyError) as error:
                notes.append(f"{run} cannot be read, so its rows are not known: {error}")
                continue
            if ids:
                sets[run] = ids
                stale_reasons[run] = HELD
                texts |= set_texts
            continue
        if reason := find_stale_reason(index.root, record, selector, stored):
            stale_reasons.setdefault(run, reason)
            from_data_set = any(input.get("root") for input in record["inputs"].values())
            if reason in (TRAINED, READ) and stored is None and record["stage"] != "data" and not from_data_set:
                from_files.append(run)  # a repeated run would read the rows from files again
    if not (stored or sets or any(not reason.startswith(MAY_HAVE) for reason in stale_reasons.values())):
        raise make_no_match_error(selector, records, index.root, notes)
    if from_files:
        notes.append(f"{', '.join(from_files)} {FILES}")
    if stored is None:
        return Selection(
            stored, sets, texts, stale_reasons=stale_reasons, notes=(*notes, *iter_same_text_notes(url, texts))
        )
    runs_with_votes = set()
    for record in records:
        projects = (record.get("project"), *(input.get("project") for input in record["inputs"].values()))
        if stored.project in projects:
            runs_with_votes.add(record["run"])
    return Selection(stored, sets, texts, frozenset(runs_with_votes), stale_reasons, tuple(notes))


def make_no_match_error(selector: Selector, records: Sequence[Record], root: Path, notes: Sequence[str]) -> InputError:
    """Build the InputError for a selector that matches no data.

    Its remedy names similar sources, if there are any.
    """
    remedy = "Name the run.root=… that it is in."
    if selector.kind in (ANNOTATOR, ITEM):
        remedy = "Name the project=… and the store.url=… that it is in."
    if selector.kind == SOURCE:
        names = {name for record in records for name in list_sources(root, record)}
        if similar := difflib.get_close_matches(selector.value, sorted(names), n=3):
            remedy = f"Did you mean {', '.join(similar)}? {remedy}"
    problem = "; ".join([f"it was found neither in a run under {root} nor in the annotation store", *notes])
    return InputError(selector.field, selector.value, problem, remedy)


def find_stored_target(selector: Selector, url: str) -> ErasureTarget | None:
    """Return the data in the annotation store that a selector matches, or None if none exists.

    Raises:
        InputError: The store does not know the item or annotator, or there is no such store.
    """
    if selector.kind in (ITEM, ANNOTATOR):
        with Store.open(url, create_if_missing=False) as store:
            try:
                return find_erasure_target(store, selector.project, selector.kind, selector.value)
            except InputError as error:
                if error.field != selector.kind:
                    raise
                raise InputError(selector.field, selector.value, error.problem, error.remedy) from error
    try:
        optional_store = Store.open(url, create_if_missing=False)
    except InputError:  # there is no store
        return None
    with optional_store as store:
        if selector.kind == SOURCE:
            return (
                find_erasure_target(store, selector.value, PROJECT, "") if selector.value in store.projects() else None
            )
        for project in store.projects():
            if item := find_item_of_pair(store, project, bytes.fromhex(selector.value)):
                return find_erasure_target(store, project, ITEM, item)
    return None


def iter_same_text_notes(url: str, texts: ForgottenTexts) -> Iterator[str]:
    """Yield a note for each annotation project with items that contain the deleted texts. These items stay in the
    store."""
    with suppress(InputError), Store.open(url, create_if_missing=False) as store:  # there may be no store
        for project in store.projects():
            items = [item.id for item in store.items(project) if any(map(texts.occur_in, iter_texts(item)))]
            if items:
                name = f"stage.item={items[0]}" + (f" and {len(items) - 1:,} more" if len(items) > 1 else "")
                yield f"project {project} has the same texts, and keeps them: {name}, project={project}"


def find_item_of_pair(store: Store, project: str, content_id: bytes) -> str:
    """Return the id of the annotation item whose votes gave the preference pair with a content id, or "" if none did.

    To forget the pair is to forget the item: the pair's texts are stored nowhere else.
    """
    with store.reading():
        if (key := store.key(project)) is None:
            return ""
        items = {item.id: item for item in store.items(project)}
        for vote in store.rankings(project):
            if vote.item in items and any(
                compute_content_id(encode_content_row(pair), key) == content_id
                for pair in build_pairs(vote, items[vote.item])
            ):
                return vote.item
    return ""


def select_rows(
    data_set: DataSet, selector: Selector, stored: ErasureTarget | None
) -> tuple[frozenset[str], ForgottenTexts]:
    """Return the content ids of a data set's rows that a selector matches, and the texts of these rows."""
    match_rows = make_row_filter(data_set, selector, stored)
    ids: set[str] = set()
    removed_texts: set[str] = set()
    staying_texts: set[str] = set()

    def iter_tables() -> Iterator[pa.Table]:
        return chain.from_iterable(map(data_set.iter_tables, SPLITS))

    for table in iter_tables():
        matches = zip(table["content_id"].to_pylist(), match_rows(table), strict=True)
        ids.update(id for id, is_match in matches if is_match)
    if not ids:
        return frozenset(), ForgottenTexts()
    for table in iter_tables():
        removed = table.filter(pa.array([id in ids for id in table["content_id"].to_pylist()]))
        removed_texts.update(iter_row_texts(data_set.kind, removed))
    for table in iter_tables():
        staying = table.filter(pa.array([id not in ids for id in table["content_id"].to_pylist()]))
        staying_texts.update(text for text in iter_row_texts(data_set.kind, staying) if text in removed_texts)
    return frozenset(ids), ForgottenTexts(frozenset(removed_texts - staying_texts), frozenset(staying_texts))


def iter_row_texts(kind: str, table: pa.Table) -> Iterator[str]:
    """Yield every non-empty text in the rows of a data set's table, by the columns of its kind, such as messages."""
    columns = [name for name in CONTENT[kind] if name in table.column_names]
    for record in columns_to_records(kind, table.select(columns), [""] * table.num_rows):
        yield from (text for text in list_texts(record) if text)


def make_row_filter(data_set: DataSet, selector: Selector, stored: ErasureTarget | None) -> RowPredicate:
    """Return a function that yields one boolean per row of a data set's table: True if the row has to be removed."""
    kinds = {name: kind.project for name, kind in read_id_kinds(data_set.data).items() if kind.project}
    source = selector.value if selector.kind == SOURCE else None
    content_id = selector.value.lower() if selector.kind == CONTENT_ID else None

    def is_matching_vote(row: Mapping[str, str | None]) -> bool:
        if stored is None or kinds.get(row["source"] or "") != stored.project:
            return False
        vote = str(row.get("id") or "").partition(":")[0]
        is_stored = row.get("group_id") == stored.id or (vote.isdigit() and int(vote) in stored.votes)
        return stored.kind == PROJECT or is_stored

    def match_rows(table: pa.Table) -> Iterator[bool]:
        rows = table.select([name for name in ("content_id", "source", "id", "group_id") if name in table.column_names])
        for row in rows.to_pylist():
            yield row["content_id"] == content_id or row["source"] == source or is_matching_vote(row)

    return match_rows


def find_stale_reason(root: Path, record: Record, selector: Selector, stored: ErasureTarget | None) -> str:
    """Return why a run is stale, because it read selected data or may have, or an empty text if it did not.

    Args:
        root: the folder of all runs.
        record: the run's record.
        stored: the selected data in the annotation store; None if it holds none.
    """
    certain_reason = TRAINED if record["stage"] in TRAINING_STAGES else HELD if record["stage"] == "data" else READ
    for input in record["inputs"].values():
        # A simulated annotator reads a project without a row of its ledger. Its run's outputs hold none of the texts.
        if stored is not None and input.get("project") == stored.project and stored.was_read_at(input.get("seq", -1)):
            return certain_reason
    if selector.kind == SOURCE and selector.value in list_sources(root, record):
        return certain_reason
    if selector.kind == CONTENT_ID and record["stage"] in TRAINING_STAGES:
        return find_reason_by_ids(root / record["folder"] / IDS, bytes.fromhex(selector.value))
    return ""


def list_sources(root: Path, record: Record) -> set[str]:
    """Return all names by which `stage.source` may select a run: projects, paths, file names and source names of its
    data."""
    names: set[str] = set()
    for name, input in record["inputs"].items():
        if name.startswith("sources."):
            names.add(name.removeprefix("sources."))
        if name == "data" or name.startswith("sources."):
            path = str(input.get("path") or "")
            names |= {path, Path(path).name, str(input.get("project") or "")}
    data_file = root / record["folder"] / "artifact" / "data.json"
    if record["stage"] == "data" and data_file.is_file():
        with suppress(InputError, KeyError, TypeError):  # the manifest's names remain
            names |= {
                str(source["name"]) for source in read_json_object(data_file, "data.json", "").get("sources") or ()
            }
    return names - {"", "artifact"}


def find_reason_by_ids(path: Path, content_id: bytes) -> str:
    """Return why a training run is stale, by the recorded content ids of its rows, or an empty text if it is not.

    A run without recorded ids may have read the deleted row.

    Args:
        path: the Parquet file with these ids.
        content_id: id of the deleted row.
    """
    if not path.is_file():
        return f"{MAY_HAVE}: it keeps no ids of its rows"
    without_id = 0
    require_readable(path, "file")
    try:
        for batch in pq.ParquetFile(path).iter_batches(columns=["content_id"]):
            ids = batch.column(0)
            without_id += ids.null_count
            if content_id in ids.to_pylist():
                return TRAINED
    except (OSError, pa.ArrowException, KeyError) as error:
        return f"{MAY_HAVE}: the ids of its rows cannot be read ({type(error).__name__})"
    return f"{MAY_HAVE}: {without_id:,} of its rows have no id" if without_id else ""
