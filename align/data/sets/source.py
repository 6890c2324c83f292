"""One source of a data set: where its rows come from, how much of it is wanted, and under which terms it is used."""

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
from align.annotate.store.preference_pairs import preferences
from align.core.chain import ChainHead
from align.core.errors import CorruptFile, InputError, require
from align.data import chitchat
from align.data.read.columns import ColumnRules, find_shape_name
from align.data.read.content import DOCUMENTS, PREFERENCES, get_record_kind
from align.data.read.files import DATA_SET_FILE, RESTORE_HELP, SHARD_NAME, list_data_files
from align.data.read.records import ParsedRecord, RowOutcome, apply_rules, iter_outcomes
from align.data.read.rows import iter_rows
from align.data.sets.ids import SHA256, IdKind, kind_under
from align.data.sources import build_files_input, get_licence
from align.run import HUB, Input, lookup_digest
from align.run.files import read_json_object

FIELD = "stage.sources"
NAME = re.compile(r"\w[\w.-]{0,79}")
CORPUS = "chitchat"
HELP = 'Write "stage.sources=[{path: a.jsonl}, {path: b.parquet, weight: 0.3}]".'
FIRST = 100
"""Rows that are looked at for what the rows of a source are taken for."""


@dataclass(frozen=True, slots=True)
class Votes:
    """What there is of a project of the annotation store when a run begins.

    Attributes:
        url: of the store.
        head: of the project's ledger. Votes that come later are another run's.
        allow_simulated: see `preferences`.
        key: the project's, for ids; shown nowhere.
    """

    url: str = field(repr=False)
    project: str
    head: ChainHead
    allow_simulated: bool
    key: bytes = field(repr=False)

    @property
    def ids(self) -> IdKind:
        """How the ids of its rows are made."""
        return kind_under(self.project, self.key)

    def reads(self, skip: int = 0) -> Iterator[ParsedRecord]:
        """Yield the pairs that `data=annotations` reads in the order of the ledger, numbered from 1.

        Args:
            skip: pairs that are not asked for.

        Raises:
            InputError: as `preferences`.
        """
        with Store.open(self.url, create=False) as store, store.reading():  # one view for all of it
            pairs = preferences(store, self.project, self.allow_simulated, self.head.seq)
        for number, pair in enumerate(pairs[skip:], start=skip + 1):
            yield ParsedRecord(number, pair, {"created_at": pair.created_at})


def votes_of(url: str, project: str, allow_simulated: bool) -> Votes:
    """Return the votes of a project.

    Raises:
        InputError: there is no such store or project, or the project was erased.
    """
    with Store.open(url, create=False) as store, store.reading():
        head = store.head(project)
        key = store.key(project)
    if key is None:
        problem = "it was erased, and its rows have no ids any more"
        raise InputError("project", project, problem, "Name another project.")
    return Votes(url, project, head, allow_simulated, key)


def standing(url: str, kind: IdKind) -> set[int] | None:
    """Return the votes of the project whose key makes such ids that stand: neither retracted nor on an item that was
    erased. Returns None if the project was erased.

    Raises:
        InputError: there is no such store or project, or it is another one of that name.
    """
    with Store.open(url, create=False) as store, store.reading():
        key = store.key(kind.project)
        if key is None:
            return None
        problem = "is another project of that name than the one that the rows are from: its key is another"
        remedy = "Name the store that they are from: store.url=…"
        require(kind_under(kind.project, key) == kind, "project", kind.project, problem, remedy)
        return {vote.seq for vote in store.rankings(kind.project)}


@dataclass(frozen=True, slots=True)
class Source:
    """Where rows come from: a file, a folder, a glob or a hub data set (`path`), the built-in corpus (`data`), or the
    votes of an annotation project (`annotations`).

    Attributes:
        name: what the data set calls it; unlike the others.
        path: see `align.data.read`.
        data, part: `chitchat` and a part of it.
        annotations: the project.
        weight: its share of the rows to train on; None if nobody gave one, see `align.data.sets.mix`.
        cap: rows of it at most; None for all.
        columns: our column → its column.
        metadata: its columns that are kept as metadata, whatever they hold.
        licence: what its rows may be used under; empty if nobody says. That of a data set is in its `data.json`, see
            `opened`.
        votes: of `annotations`, once the store was asked, see `opened`. No user sets it.
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
    votes: Votes | None = None

    @property
    def given(self) -> str:
        """What the user called it."""
        return f"annotations:{self.annotations}" if self.annotations else self.path or f"{self.data}:{self.part}"

    @property
    def field(self) -> str:
        """How errors name its files."""
        return f"{FIELD}.{self.name}"

    @property
    def key(self) -> bytes | None:
        """Under which its rows have their ids; None for SHA-256."""
        return self.votes.key if self.votes else None

    @property
    def ids(self) -> IdKind:
        """How the ids of its rows are made."""
        return self.votes.ids if self.votes else SHA256

    @property
    def rules(self) -> ColumnRules:
        """What the user says of its columns."""
        return ColumnRules(self.columns, self.metadata, source=True)

    @property
    def files(self) -> list[Path]:
        """What it is read from, if that is files. Raises InputError if there is none."""
        return list_data_files(self.path, self.field) if self.path else []

    def opened(self, store: str, allow_simulated: bool) -> Source:
        """Return the source with the votes as they are now, if it is a project; with the licence of its rows, if it is
        a data set.

        Args:
            store: URL of the annotation store.

        Raises:
            InputError: there is no such store, project or file; a data set holds rows of votes, which would get ids
                that can be guessed, or its licences differ.
        """
        if self.annotations:
            return replace(self, votes=votes_of(store, self.annotations, allow_simulated))
        sources = sources_within(self.files, self.field)
        projects = dict.fromkeys(str(source.get("project")) for source in sources if source.get("content_id") == "hmac")
        problem = f"holds rows of votes ({', '.join(projects)}), whose ids are under their project's key"
        require(not projects, self.field, self.path, problem, "Name the project: {annotations: PROJECT}.")
        return replace(self, licence=licence_within(sources, self.licence, f"{self.field}.licence"))

    def record(self) -> Input:
        """Return the source as an input of a run. Raises InputError if there is no such file."""
        if self.votes:
            return Input(self.votes.head.hash, project=self.votes.project, seq=self.votes.head.seq)
        if self.path:
            return build_files_input(self.path, self.field)
        return Input(lookup_digest(chitchat.get_corpus_path()), path=self.given)

    def outcomes(self, skip: int = 0, counts: Sequence[int] = ()) -> Iterator[RowOutcome]:
        """Yield what becomes of its rows, whose numbers ascend from 1.

        Args:
            skip: rows that are not asked for.
            counts: see `iter_outcomes`.
        """
        if self.path:
            yield from iter_outcomes(self.path, self.field, self.rules, skip, counts)
            return
        if self.votes:
            reads = self.votes.reads(skip)
        else:
            records = (chitchat.load_texts if self.part == "base" else chitchat.load_conversations)(self.part)
            reads = (
                ParsedRecord(number, record, {}) for number, record in islice(enumerate(records, start=1), skip, None)
            )
        for read in reads:
            yield RowOutcome(read.number, read)

    def kind(self) -> str:
        """Return the kind of its first record, see `get_record_kind`; that of documents if it has none."""
        if self.votes:
            return PREFERENCES
        with suppress(InputError):  # whoever reads all of it is told
            for _, result in self.outcomes():
                if isinstance(result, ParsedRecord):
                    return get_record_kind(result.record)
        return DOCUMENTS


def recognised(source: Source) -> dict[str, Any]:
    """Return how many of the first `rows` have which of the `shapes`, and the `columns` that hold something, as
    `columns` of the source name them. Rows that cannot be read are left to whoever reads all. Votes and the corpus have
    no columns."""
    shapes = Counter[str]()
    columns = dict[str, None]()
    if source.path:
        with suppress(InputError):  # it is told when all rows are read, with what was read before it
            for row in islice(apply_rules(iter_rows(source.path), source.rules), FIRST):
                if row.error is None and (name := find_shape_name(row.data)):
                    shapes[name] += 1
                    columns |= dict.fromkeys(str(name) for name, value in row.data.items() if value is not None)
    return {"rows": shapes.total(), "shapes": dict(shapes.most_common()), "columns": [*columns]}


def parsed_sources(given: Any, at: str = FIELD) -> list[Source]:
    """Return the sources of a setting: a list of mappings, or of paths. A source without a name of its own has that of
    its path, with a number behind it if another has that.

    Raises:
        InputError: names the source and what is wrong with it.
    """
    given = list(given) if isinstance(given, list | tuple) else given
    require(isinstance(given, list) and bool(given), at, given, "is no list of sources", HELP)
    sources: list[Source] = []
    named = {entry["name"] for entry in given if isinstance(entry, Mapping) and isinstance(entry.get("name"), str)}
    for i, entry in enumerate(given):
        source = source_of({"path": entry} if isinstance(entry, str) else entry, f"{at}[{i}]")
        taken = {earlier.name for earlier in sources}
        if "name" not in (entry if isinstance(entry, Mapping) else {}):
            number = 2
            name = source.name
            while name in taken | named:
                name = f"{source.name}-{number}"
                number += 1
            source = replace(source, name=name)
        require(source.name not in taken, f"{at}[{i}].name", source.name, "is another source's too", "Choose another.")
        sources.append(source)
    return sources


def source_of(given: Any, at: str) -> Source:
    """Return one source."""
    require(isinstance(given, Mapping), at, given, "is no source", HELP)
    known = [f.name for f in fields(Source) if f.name != "votes"]
    for key in given:
        close = get_close_matches(str(key), known, n=1)
        remedy = f"{f'Did you mean {close[0]}? ' if close else ''}There are {', '.join(known)}."
        require(key in known, f"{at}.{key}", given[key], "is no key of a source", remedy)
    values: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    check_source(values, at)
    values["columns"] = dict(values.get("columns", {}))
    values["metadata"] = tuple(values.get("metadata", ()))
    if not values.get("name"):
        values["name"] = short_name(values.get("path") or values.get("annotations") or CORPUS)
    if values.get("data") == CORPUS:
        values.setdefault("licence", get_licence(CORPUS))
    return Source(**values)


def check_source(values: Mapping[str, Any], at: str) -> None:
    """Raise InputError if a value of a source is of another kind, out of its range, or goes with no other."""

    def check(condition: bool, key: str, problem: str, remedy: str) -> None:
        require(condition, f"{at}.{key}", values.get(key), problem, remedy)

    for key in ("name", "path", "data", "part", "annotations", "licence"):
        check(isinstance(values.get(key, ""), str), key, "is no text", "Quote it.")
    problem = "names no rows, or two kinds of them"
    remedy = "Give it `path`, `data: chitchat` or `annotations: PROJECT`."
    require(len(values.keys() & {"path", "data", "annotations"}) == 1, at, dict(values), problem, remedy)
    check(values.get("path") != "", "path", "names no file", "Give a file, a folder, a glob or a hub id.")
    remedy = "Name a project of the annotation store."
    check(values.get("annotations") != "", "annotations", "is no project", remedy)
    for key in ("columns", "metadata"):
        check(key not in values or "path" in values, key, "is about columns, and only files have them", "Drop it.")
    names = values.get("metadata", ())
    listed = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    check(listed, "metadata", "is no list of columns", "Write metadata: [source, notes].")
    if "data" in values:
        check(values["data"] == CORPUS, "data", "is no corpus", f"Write {CORPUS}, or a path.")
        parts = ", ".join(chitchat.PARTS)
        known = values.get("part", "sft") in chitchat.PARTS
        check(known, "part", "is no part of the corpus", f"Choose one of: {parts}.")
    check("part" not in values or "data" in values, "part", "is of chitchat", "Drop it.")
    named = NAME.fullmatch(values.get("name", "a")) is not None
    check(named, "name", "cannot be a name", "Use letters, digits, `.`, `_`, `-`.")
    weight = values.get("weight", 1)
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    remedy = "Give a number from 1e-6 to 1e6, or 0 to measure on the source and not train on it."
    check(number and (weight == 0 or 1e-6 <= weight <= 1e6), "weight", "is no share", remedy)
    cap = values.get("cap", 1)
    whole = isinstance(cap, int) and not isinstance(cap, bool) and cap > 0
    check(whole, "cap", "is no number of rows", "Give a whole number above 0.")
    columns = values.get("columns", {})
    texts = isinstance(columns, Mapping) and all(isinstance(part, str) for pair in columns.items() for part in pair)
    check(texts, "columns", "maps no columns", "Write {prompt: question}: ours, then the file's.")


def short_name(path: str) -> str:
    """Return a file's name without what only says how it is packed; of a pattern, its folder's."""
    name = path.removeprefix(HUB).rstrip("/")
    parts = [part for part in Path(name).parts if not any(sign in part for sign in "*?[")] or ["rows"]
    stem = re.sub(r"\.(jsonl?|csv|tsv|parquet|arrow|gz|zst|xz|bz2)\b", "", parts[-1])
    return re.sub(r"[^\w.-]+", "-", stem).strip("-.")[:80] or "rows"


def by_name(sources: list[Source], names: Any, at: str) -> list[int]:
    """Return for each source its rank in `names`; those that are not named come behind, in their order.

    Raises:
        InputError: a name is no source's.
    """
    known = [source.name for source in sources]
    for name in names:
        if name not in known:
            raise InputError(at, name, "is no source", f"There are {', '.join(known)}.")
    first = {known.index(name): rank for rank, name in enumerate(names)}
    return [first.get(i, len(names) + i) for i in range(len(sources))]


def sources_within(files: Sequence[Path], field: str) -> list[dict[str, Any]]:
    """Return what `data.json` says of the sources that gave rows to the sides which are read, if files are a data
    set's."""
    sides: dict[Path, set[str]] = {}
    for file in files:
        if (named := SHARD_NAME.fullmatch(file.name)) and (file.parent / DATA_SET_FILE).is_file():
            sides.setdefault(file.parent / DATA_SET_FILE, set()).add(named[1])
    found = list[dict[str, Any]]()
    for about, read in sides.items():
        try:
            sources = read_json_object(about, field, RESTORE_HELP)["sources"]
            found += [source for source in sources if any(source["splits"][side]["rows"] for side in read)]
        except (KeyError, TypeError) as error:
            raise CorruptFile(field, str(about), "does not describe a data set", RESTORE_HELP) from error
    return found


def licence_within(sources: Sequence[Mapping[str, Any]], given: str, field: str) -> str:
    """Return the licence of rows that a data set got from several sources.

    Args:
        given: what the user says.

    Raises:
        InputError: the user says nothing though they differ, or something else though all have the same.
    """
    stated = {licence.casefold(): licence for source in sources for licence in [source.get("licence") or ""]}
    if len(stated) > 1 and not given:
        listed = ", ".join(sorted(licence or "(not said)" for licence in stated.values()))
        remedy = "Say what its rows may be used under: {path: …, licence: …}."
        raise InputError(field, listed, "are the licences of the data set's sources, and they differ", remedy)
    licence = next(iter(stated.values())) if len(stated) == 1 else ""
    same = not given or not licence or given.casefold() == licence.casefold()
    require(same, field, given, f"contradicts the data set's licence, {licence}", "Correct it, or leave it out.")
    return given or licence
