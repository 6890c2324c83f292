"""One source of a data set: location of its rows, their number and weight in the mixture, and their licence."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from align.annotate.store import Store
from align.annotate.store.preference_pairs import LoadPairs, load_preferences
from align.annotate.store.vote_selection import VoteSelection
from align.core.chain import ChainHead
from align.core.errors import CorruptFile, InputError, require
from align.data import chitchat
from align.data.read.column_rules import ColumnRules
from align.data.read.content import DOCUMENTS, PREFERENCES, get_record_kind
from align.data.read.files import DATA_SET_FILE, RESTORE_HELP, SHARD_NAME, list_data_files
from align.data.read.records import ParsedRecord, RowOutcome, apply_rules, iter_outcomes
from align.data.read.rows import iter_rows
from align.data.read.shapes import find_shape_name
from align.data.sets.ids import SHA256, IdKind, build_hmac_kind
from align.data.sources import build_files_input, get_licence
from align.run import HUB, Input, lookup_digest
from align.run.files import read_json_object

FIELD = "stage.sources"
NAME = re.compile(r"\w[\w.-]{0,79}")
CORPUS = "chitchat"
HELP = 'Write "stage.sources=[{path: a.jsonl}, {path: b.parquet, weight: 0.3}]".'
SHAPE_ROWS = 100
"""Number of rows from which the shapes of a source's rows are determined."""


@dataclass(frozen=True, slots=True)
class VoteSnapshot:
    """The state of an annotation project at the beginning of a run: the head of its ledger, and the secret key of its
    row ids.

    Attributes:
        url: URL of the store.
        head: head of the project's ledger. Later votes are left to the next run.
        selection: the annotators whose votes count.
        key: key of the project's ids. It is secret.
        load_pairs: see `align.data.pairs.VoteSource`.
    """

    url: str = field(repr=False)
    project: str
    head: ChainHead
    selection: VoteSelection
    key: bytes = field(repr=False)
    load_pairs: LoadPairs = load_preferences

    @property
    def ids(self) -> IdKind:
        """Kind of the ids of the project's rows: HMAC under its key."""
        return build_hmac_kind(self.project, self.key)

    def iter_pairs(self, skip: int = 0) -> Iterator[ParsedRecord]:
        """Yield the project's preference pairs up to the head of the ledger, in the ledger's order, numbered from 1.
        They are the same pairs as with `data=annotations`.

        Args:
            skip: number of pairs to skip.

        Raises:
            InputError: As `load_preferences`.
        """
        with Store.open(self.url, create_if_missing=False) as store, store.reading():  # one consistent view
            pairs = self.load_pairs(store, self.project, self.selection, self.head.seq)
        for number, pair in enumerate(pairs[skip:], start=skip + 1):
            yield ParsedRecord(number, pair, {"created_at": pair.created_at})


def load_vote_snapshot(
    url: str, project: str, selection: VoteSelection, load_pairs: LoadPairs = load_preferences
) -> VoteSnapshot:
    """Return the ledger head and the row-id key of an annotation project as a snapshot of its votes.

    Raises:
        InputError: There is no such store or project, or the project was erased.
    """
    with Store.open(url, create_if_missing=False) as store, store.reading():
        head = store.head(project)
        key = store.key(project)
    if key is None:
        problem = "it was erased, so its rows have no ids any more"
        raise InputError("project", project, problem, "Name another project.")
    return VoteSnapshot(url, project, head, selection, key, load_pairs)


def load_active_votes(url: str, kind: IdKind) -> set[int] | None:
    """Return the sequence numbers of a project's votes that are neither retracted nor on an erased item.

    Returns None if the project was erased.

    Raises:
        InputError: There is no such store or project, or the project has another key.
    """
    with Store.open(url, create_if_missing=False) as store, store.reading():
        key = store.key(kind.project)
        if key is None:
            return None
        problem = "is a different project with the same name as that of the rows: their keys differ"
        remedy = "Name the store that they are from: store.url=…"
        require(build_hmac_kind(kind.project, key) == kind, "project", kind.project, problem, remedy)
        return {vote.seq for vote in store.rankings(kind.project)}


@dataclass(frozen=True, slots=True)
class Source:
    """A source of rows: a file, a folder, a glob or a hub data set (`path`), the built-in corpus (`data`), or the votes
    of an annotation project (`annotations`).

    Attributes:
        name: unique name in the data set.
        path: see `align.data.read`.
        data, part: `chitchat` and a part of it.
        annotations: name of the project.
        weight: its share of the mixture; None for none, see `align.data.sets.mix`.
        cap: largest number of its rows; None for all.
        columns: our column → its column.
        metadata: its columns that are always kept as metadata.
        licence: licence of its rows; empty if unknown. That of a data set is in its `data.json`, see `resolve`.
        votes: snapshot of `annotations`, see `resolve`. It is not a setting.
    """

    name: str
    path: str = ""
    data: str = ""
    part: str = "sft"
    annotations: str = ""
    weight: float | None = None
    cap: int | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    metadata: tuple[str, ...] = ()
    licence: str = ""
    votes: VoteSnapshot | None = None

    @property
    def location(self) -> str:
        """Origin of the rows: the path, `annotations:PROJECT` or `chitchat:PART`."""
        return f"annotations:{self.annotations}" if self.annotations else self.path or f"{self.data}:{self.part}"

    @property
    def field(self) -> str:
        """Name of the source in errors, `stage.sources.NAME`."""
        return f"{FIELD}.{self.name}"

    @property
    def key(self) -> bytes | None:
        """Secret key of the ids of the source's rows, or None if the ids are SHA-256."""
        return self.votes.key if self.votes else None

    @property
    def ids(self) -> IdKind:
        """Kind of the ids of the source's rows: HMAC for votes, SHA-256 for all others."""
        return self.votes.ids if self.votes else SHA256

    @property
    def rules(self) -> ColumnRules:
        """Column names and metadata columns from the settings, as the rules for reading the source."""
        return ColumnRules(self.columns, self.metadata, source=True)

    @property
    def files(self) -> list[Path]:
        """Files at the source's path, or an empty list if it has no path. Raises InputError if there is no such
        file."""
        return list_data_files(self.path, self.field) if self.path else []

    def resolve(self, store: str, selection: VoteSelection, load_pairs: LoadPairs = load_preferences) -> Source:
        """Return the source with a snapshot of its votes if it is a project, and with its licence if it is a published
        data set.

        Args:
            store: URL of the annotation store.
            selection: the annotators whose votes count.
            load_pairs: see `align.data.pairs.VoteSource`.

        Raises:
            InputError: There is no such store, project or file; a data set has rows of votes, whose new ids could be
                guessed; or its licences differ.
        """
        if self.annotations:
            return replace(self, votes=load_vote_snapshot(store, self.annotations, selection, load_pairs))
        sources = read_data_set_sources(self.files, self.field)
        projects = dict.fromkeys(str(source.get("project")) for source in sources if source.get("content_id") == "hmac")
        problem = f"holds rows of votes ({', '.join(projects)}), whose ids are under their project's key"
        require(not projects, self.field, self.path, problem, "Name the project: {annotations: PROJECT}.")
        return replace(self, licence=resolve_licence(sources, self.licence, f"{self.field}.licence"))

    def build_input(self) -> Input:
        """Return the digest of the source's files or votes as an input for a run's manifest. Raises InputError if there
        is no such file."""
        if self.votes:
            return Input(self.votes.head.hash, project=self.votes.project, seq=self.votes.head.seq)
        if self.path:
            return build_files_input(self.path, self.field)
        return Input(lookup_digest(chitchat.get_corpus_path()), path=self.location)

    def iter_outcomes(self, skip: int = 0, counts: Sequence[int] = ()) -> Iterator[RowOutcome]:
        """Yield the outcome of reading each row, a record, a drop or an error, in order. Rows are numbered from 1.

        Args:
            skip: number of rows to skip.
            counts: see `iter_outcomes`.
        """
        if self.path:
            yield from iter_outcomes(self.path, self.field, self.rules, skip, counts)
            return
        if self.votes:
            reads = self.votes.iter_pairs(skip)
        else:
            records = (chitchat.load_texts if self.part == "base" else chitchat.load_conversations)(self.part)
            reads = (
                ParsedRecord(number, record, {}) for number, record in islice(enumerate(records, start=1), skip, None)
            )
        for read in reads:
            yield RowOutcome(read.number, read)

    def detect_kind(self) -> str:
        """Return the kind of the source's first record, `documents`, `preferences` or `feedback`, or `documents` if it
        has no record."""
        if self.votes:
            return PREFERENCES
        with suppress(InputError):  # the complete reading reports it
            for _, result in self.iter_outcomes():
                if isinstance(result, ParsedRecord):
                    return get_record_kind(result.record)
        return DOCUMENTS


def detect_row_shapes(source: Source) -> dict[str, Any]:
    """Return the formats (shapes) and columns of the first rows of a source that is read from files, for `data.json`.

    Rows that cannot be read are skipped, because the complete reading reports them.

    Returns:
        `rows`: number of rows with a known shape; `shapes`: shape → number of rows; `columns`: names of columns that
        are not empty, after renaming. All are empty for votes and the corpus.
    """
    shapes = Counter[str]()
    columns = dict[str, None]()
    if source.path:
        with suppress(InputError):  # the complete reading reports it
            for row in islice(apply_rules(iter_rows(source.path), source.rules), SHAPE_ROWS):
                if row.error is None and (name := find_shape_name(row.data)):
                    shapes[name] += 1
                    columns |= dict.fromkeys(str(name) for name, value in row.data.items() if value is not None)
    return {"rows": shapes.total(), "shapes": dict(shapes.most_common()), "columns": [*columns]}


def parse_sources(setting: Any, field: str = FIELD) -> list[Source]:
    """Parse the setting `stage.sources`, a list of mappings or of paths, to sources with unique names.

    A source without a name gets that of its path, and a number if another source has the same.

    Raises:
        InputError: A source is invalid.
    """
    setting = list(setting) if isinstance(setting, list | tuple) else setting
    require(isinstance(setting, list) and bool(setting), field, setting, "is no list of sources", HELP)
    sources: list[Source] = []
    set_names = {
        entry["name"] for entry in setting if isinstance(entry, Mapping) and isinstance(entry.get("name"), str)
    }
    for i, entry in enumerate(setting):
        source = parse_source({"path": entry} if isinstance(entry, str) else entry, f"{field}[{i}]")
        taken = {earlier.name for earlier in sources}
        if "name" not in (entry if isinstance(entry, Mapping) else {}):
            number = 2
            name = source.name
            while name in taken | set_names:
                name = f"{source.name}-{number}"
                number += 1
            source = replace(source, name=name)
        require(
            source.name not in taken, f"{field}[{i}].name", source.name, "is another source's too", "Choose another."
        )
        sources.append(source)
    return sources


def parse_source(setting: Any, field: str) -> Source:
    """Parse one entry of the setting `stage.sources`, or raise InputError if a key or a value of it is invalid.

    Args:
        field: name of the setting in errors.
    """
    require(isinstance(setting, Mapping), field, setting, "is no source", HELP)
    field_names = [f.name for f in fields(Source) if f.name != "votes"]
    for key in setting:
        similar = get_close_matches(str(key), field_names, n=1)
        remedy = f"{f'Did you mean {similar[0]}? ' if similar else ''}There are {', '.join(field_names)}."
        require(key in field_names, f"{field}.{key}", setting[key], "is no key of a source", remedy)
    values: dict[str, Any] = {key: value for key, value in setting.items() if value is not None}
    check_source(values, field)
    values["columns"] = dict(values.get("columns", {}))
    values["metadata"] = tuple(values.get("metadata", ()))
    if not values.get("name"):
        values["name"] = derive_source_name(values.get("path") or values.get("annotations") or CORPUS)
    if values.get("data") == CORPUS:
        values.setdefault("licence", get_licence(CORPUS))
    return Source(**values)


def check_source(values: Mapping[str, Any], field: str) -> None:
    """Raise InputError if a value in a source's entry has a wrong type, is out of range, or contradicts another
    value."""

    def check(condition: bool, key: str, problem: str, remedy: str) -> None:
        require(condition, f"{field}.{key}", values.get(key), problem, remedy)

    for key in ("name", "path", "data", "part", "annotations", "licence"):
        check(isinstance(values.get(key, ""), str), key, "is no text", "Quote it.")
    problem = "names no rows, or two kinds of them"
    remedy = "Give it `path`, `data: chitchat` or `annotations: PROJECT`."
    require(len(values.keys() & {"path", "data", "annotations"}) == 1, field, dict(values), problem, remedy)
    check(values.get("path") != "", "path", "names no file", "Give a file, a folder, a glob or a hub id.")
    remedy = "Name a project of the annotation store."
    check(values.get("annotations") != "", "annotations", "is no project", remedy)
    for key in ("columns", "metadata"):
        check(key not in values or "path" in values, key, "applies to columns, which only files have", "Drop it.")
    names = values.get("metadata", ())
    is_list = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    check(is_list, "metadata", "is no list of columns", "Write metadata: [source, notes].")
    if "data" in values:
        check(values["data"] == CORPUS, "data", "is no corpus", f"Write {CORPUS}, or a path.")
        parts = ", ".join(chitchat.PARTS)
        is_part = values.get("part", "sft") in chitchat.PARTS
        check(is_part, "part", "is no part of the corpus", f"Choose one of: {parts}.")
    check("part" not in values or "data" in values, "part", "applies only with data: chitchat", "Drop it.")
    is_name = NAME.fullmatch(values.get("name", "a")) is not None
    check(is_name, "name", "cannot be a name", "Use letters, digits, `.`, `_`, `-`.")
    weight = values.get("weight", 1)
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    remedy = "Give a number from 1e-6 to 1e6, or 0 to measure on the source and not train on it."
    check(is_number and (weight == 0 or 1e-6 <= weight <= 1e6), "weight", "is no share", remedy)
    cap = values.get("cap", 1)
    is_count = isinstance(cap, int) and not isinstance(cap, bool) and cap > 0
    check(is_count, "cap", "is no number of rows", "Give a whole number above 0.")
    columns = values.get("columns", {})
    is_mapping = isinstance(columns, Mapping) and all(
        isinstance(part, str) for pair in columns.items() for part in pair
    )
    check(is_mapping, "columns", "maps no columns", "Write {prompt: question}: ours, then the file's.")


def derive_source_name(path: str) -> str:
    """Return a name for a source from its path: the file's name without suffixes, or the folder's name for a
    pattern."""
    stripped = path.removeprefix(HUB).rstrip("/")
    parts = [part for part in Path(stripped).parts if not any(sign in part for sign in "*?[")] or ["rows"]
    stem = re.sub(r"\.(jsonl?|csv|tsv|parquet|arrow|gz|zst|xz|bz2)\b", "", parts[-1])
    return re.sub(r"[^\w.-]+", "-", stem).strip("-.")[:80] or "rows"


def rank_by_name(sources: list[Source], names: Any, field: str) -> list[int]:
    """Return the rank of each source by its position in `names`. Sources that are not named follow in their order.

    Raises:
        InputError: There is no source with one of the names.
    """
    source_names = [source.name for source in sources]
    for name in names:
        if name not in source_names:
            raise InputError(field, name, "is no source", f"There are {', '.join(source_names)}.")
    rank_of_source = {source_names.index(name): rank for rank, name in enumerate(names)}
    return [rank_of_source.get(i, len(names) + i) for i in range(len(sources))]


def read_data_set_sources(files: Sequence[Path], field: str) -> list[dict[str, Any]]:
    """Return the source entries of the `data.json` beside files that are shards of a data set, or none for other files.
    Only sources with rows in the splits that are read are returned."""
    splits_of_description: dict[Path, set[str]] = {}
    for file in files:
        if (match := SHARD_NAME.fullmatch(file.name)) and (file.parent / DATA_SET_FILE).is_file():
            splits_of_description.setdefault(file.parent / DATA_SET_FILE, set()).add(match[1])
    entries = list[dict[str, Any]]()
    for path, splits in splits_of_description.items():
        try:
            sources = read_json_object(path, field, RESTORE_HELP)["sources"]
            entries += [source for source in sources if any(source["splits"][split]["rows"] for split in splits)]
        except (KeyError, TypeError) as error:
            raise CorruptFile(field, str(path), "does not describe a data set", RESTORE_HELP) from error
    return entries


def resolve_licence(sources: Sequence[Mapping[str, Any]], setting: str, field: str) -> str:
    """Return the licence of a data set's rows: the one in the settings, or else the one that all its sources have.
    Returns an empty text if none is known.

    Args:
        sources: entries of `data.json`.
        setting: licence in the settings; empty for none.

    Raises:
        InputError: The sources have different licences and the settings have none, or the settings contradict their
            common licence.
    """
    stated = {licence.casefold(): licence for source in sources for licence in [source.get("licence") or ""]}
    if len(stated) > 1 and not setting:
        listed = ", ".join(sorted(licence or "(not said)" for licence in stated.values()))
        remedy = "Say what its rows may be used under: {path: …, licence: …}."
        raise InputError(field, listed, "are the licences of the data set's sources, and they differ", remedy)
    licence = next(iter(stated.values())) if len(stated) == 1 else ""
    is_consistent = not setting or not licence or setting.casefold() == licence.casefold()
    require(
        is_consistent, field, setting, f"contradicts the data set's licence, {licence}", "Correct it, or leave it out."
    )
    return setting or licence
