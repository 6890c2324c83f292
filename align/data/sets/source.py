"""One source of a data set: where its rows come from, how much of it is wanted, and under which terms it is used."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from align.data import chitchat
from align.data.read.columns import ColumnRules
from align.data.read.content import DOCUMENTS, PREFERENCES, kind_of
from align.data.read.drops import BadRows, Drop
from align.data.read.files import DATA_SET, RESTORE, SHARD_NAME, files_of
from align.data.read.records import Read, read_records
from align.data.sets.ids import SHA256, IdKind
from align.data.sets.votes import Votes, votes_of
from align.data.sources import files_record, licence_of
from align.errors import CorruptFile, InputError, require
from align.run import HUB, Input, known_digest
from align.run.files import json_object

FIELD = "stage.sources"
NAME = re.compile(r"\w[\w.-]{0,79}")
CORPUS = "chitchat"
HELP = 'Write "stage.sources=[{path: a.jsonl}, {path: b.parquet, weight: 0.3}]".'


@dataclass(frozen=True, slots=True)
class Source:
    """Where rows come from: a file, a folder, a glob or a hub data set (`path`), the built-in corpus (`data`), or the
    votes of an annotation project (`annotations`).

    Attributes:
        name: what the data set calls it; unlike the others.
        path: see `align.data.read`.
        data, part: `chitchat` and a part of it.
        annotations: the project.
        weight: its share of the rows to train on; None where nobody gave one, see `align.data.sets.mix`.
        cap: rows of it at most; None for all.
        columns: our column → its column.
        metadata: its columns that are kept as metadata, whatever they hold.
        licence: what its rows may be used under; empty where nobody says. That of a data set is in its `data.json`, see
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
        """What it is read from, where that is files. Raises: InputError: there is none."""
        return files_of(self.path, self.field) if self.path else []

    def opened(self, store: str, allow_simulated: bool) -> Source:
        """With the votes as they are now, where it is a project; with the licence of its rows, where it is a data set.

        Args:
            store: URL of the annotation store.

        Raises:
            InputError: there is no such store, project or file; a data set holds rows of votes, which would get ids
                that can be guessed, or its licences differ.
        """
        if self.annotations:
            return replace(self, votes=votes_of(store, self.annotations, allow_simulated))
        made_of = sources_within(self.files, self.field)
        check_no_votes(made_of, self.path, self.field)
        return replace(self, licence=licence_within(made_of, self.licence, f"{self.field}.licence"))

    def record(self) -> Input:
        """The source as an input of a run. Raises: InputError: there is no such file."""
        if self.votes:
            return Input(self.votes.head.hash, project=self.votes.project, seq=self.votes.head.seq)
        if self.path:
            return files_record(self.path, self.field)
        return Input(known_digest(chitchat.corpus_path()), path=self.given)

    def reads(
        self, bad_rows: BadRows, skip: int = 0, drops: Counter[Drop] | None = None,
        reached: Callable[[int], None] = lambda row: None, counts: Sequence[int] = (),
    ) -> Iterator[Read]:  # fmt: skip
        """Its records with their rows' numbers, ascending from 1.

        Args:
            bad_rows, drops, reached, counts: see `read_records`.
            skip: rows that are not asked for.
        """
        if self.path:
            yield from read_records(
                self.path, field=self.field, rules=self.rules, bad_rows=bad_rows, skip=skip, drops=drops,
                reached=reached, counts=counts,
            )  # fmt: skip
            return
        for read in self.votes.reads(skip) if self.votes else self._corpus(skip):
            reached(read.number)
            yield read

    def _corpus(self, skip: int) -> Iterator[Read]:
        of_part = partial(chitchat.texts if self.part == "base" else chitchat.conversations, self.part)
        for number, record in enumerate(of_part(), start=1):
            if number > skip:
                yield Read(number, record, {})

    def kind(self) -> str:
        """The kind of its first record, see `kind_of`; that of documents where it has none."""
        if self.votes:
            return PREFERENCES
        with suppress(InputError):  # whoever reads all of it is told
            for read in self.reads(BadRows(skips=True)):
                return kind_of(read.record)
        return DOCUMENTS


def parsed_sources(given: Any, at: str = FIELD) -> list[Source]:
    """The sources of a setting: a list of mappings, or of paths.

    Raises:
        InputError: names the source and what is wrong with it.
    """
    given = list(given) if isinstance(given, list | tuple) else given
    require(isinstance(given, list) and bool(given), at, given, "is no list of sources", HELP)
    found: list[Source] = []
    named = {one["name"] for one in given if isinstance(one, Mapping) and isinstance(one.get("name"), str)}
    for i, one in enumerate(given):
        source = source_of({"path": one} if isinstance(one, str) else one, f"{at}[{i}]")
        known = {earlier.name for earlier in found}
        if "name" not in (one if isinstance(one, Mapping) else {}):
            source = renamed(source, known | named)
        require(source.name not in known, f"{at}[{i}].name", source.name, "is another source's too", "Choose another.")
        found.append(source)
    return found


def source_of(given: Any, at: str) -> Source:
    """One source."""
    require(isinstance(given, Mapping), at, given, "is no source", HELP)
    known = [f.name for f in fields(Source) if f.name != "votes"]
    for key in given:
        close = difflib.get_close_matches(str(key), known, n=1)
        remedy = f"Did you mean {close[0]}? " if close else ""
        require(
            key in known, f"{at}.{key}", given[key], "is no key of a source", f"{remedy}There are {', '.join(known)}."
        )
    values: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    check(values, at)
    values["columns"] = dict(values.get("columns", {}))
    values["metadata"] = tuple(values.get("metadata", ()))
    if not values.get("name"):
        values["name"] = short_name(values.get("path") or values.get("annotations") or CORPUS)
    if values.get("data") == CORPUS:
        values.setdefault("licence", licence_of(CORPUS))
    return Source(**values)


def check(values: Mapping[str, Any], at: str) -> None:
    """Raises: InputError: a value of a source is of another kind, out of its range, or goes with no other."""
    for key in ("name", "path", "data", "part", "annotations", "licence"):
        value = values.get(key, "")
        require(isinstance(value, str), f"{at}.{key}", value, "is no text", "Quote it.")
    one = len(values.keys() & {"path", "data", "annotations"}) == 1
    remedy = "Give it `path`, `data: chitchat` or `annotations: PROJECT`."
    require(one, at, dict(values), "names no rows, or two kinds of them", remedy)
    require(values.get("path") != "", f"{at}.path", "", "names no file", "Give a file, a folder, a glob or a hub id.")
    remedy = "Name a project of the annotation store."
    require(values.get("annotations") != "", f"{at}.annotations", "", "is no project", remedy)
    for key in ("columns", "metadata"):
        problem = "is about columns, and only files have them"
        require(key not in values or "path" in values, f"{at}.{key}", values.get(key), problem, "Drop it.")
    names = values.get("metadata", ())
    listed = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    require(listed, f"{at}.metadata", names, "is no list of columns", "Write metadata: [source, notes].")
    if "data" in values:
        require(values["data"] == CORPUS, f"{at}.data", values["data"], "is no corpus", f"Write {CORPUS}, or a path.")
        part, parts = values.get("part", "sft"), ", ".join(chitchat.PARTS)
        require(part in chitchat.PARTS, f"{at}.part", part, "is no part of the corpus", f"Choose one of: {parts}.")
    require("part" not in values or "data" in values, f"{at}.part", values.get("part"), "is of chitchat", "Drop it.")
    named = values.get("name", "a")
    require(
        NAME.fullmatch(named) is not None,
        f"{at}.name",
        named,
        "cannot be a name",
        "Use letters, digits, `.`, `_`, `-`.",
    )
    weight, cap, columns = values.get("weight", 1), values.get("cap", 1), values.get("columns", {})
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    remedy = "Give a number from 1e-6 to 1e6, or 0 to measure on the source and not train on it."
    require(number and (weight == 0 or 1e-6 <= weight <= 1e6), f"{at}.weight", weight, "is no share", remedy)
    whole = isinstance(cap, int) and not isinstance(cap, bool) and cap > 0
    require(whole, f"{at}.cap", cap, "is no number of rows", "Give a whole number above 0.")
    texts = isinstance(columns, Mapping) and all(isinstance(part, str) for pair in columns.items() for part in pair)
    require(texts, f"{at}.columns", columns, "maps no columns", "Write {prompt: question}: ours, then the file's.")


def short_name(path: str) -> str:
    """A file's name without what only says how it is packed; of a pattern, its folder's."""
    name = path.removeprefix(HUB).rstrip("/")
    parts = [part for part in Path(name).parts if not any(sign in part for sign in "*?[")] or ["rows"]
    stem = re.sub(r"\.(jsonl?|csv|tsv|parquet|arrow|gz|zst|xz|bz2)\b", "", parts[-1])
    return re.sub(r"[^\w.-]+", "-", stem).strip("-.")[:80] or "rows"


def renamed(source: Source, known: set[str]) -> Source:
    """A source with a number behind the name that it was given by its path, where another has that."""
    name, number = source.name, 2
    while name in known:
        name, number = f"{source.name}-{number}", number + 1
    return replace(source, name=name)


def by_name(sources: list[Source], names: Any, at: str) -> list[int]:
    """For each source its rank in `names`; those that are not named come behind, in their order.

    Raises:
        InputError: a name is no source's.
    """
    known = {source.name: i for i, source in enumerate(sources)}
    for name in names:
        if name not in known:
            raise InputError(at, name, "is no source", f"There are {', '.join(known)}.")
    first = {known[name]: rank for rank, name in enumerate(names)}
    return [first.get(i, len(names) + i) for i in range(len(sources))]


def sources_within(files: Sequence[Path], field: str) -> list[dict[str, Any]]:
    """What `data.json` says of the sources that gave rows to the sides which are read, where files are a data set's."""
    sides: dict[Path, set[str]] = {}
    for file in files:
        if (named := SHARD_NAME.fullmatch(file.name)) and (file.parent / DATA_SET).is_file():
            sides.setdefault(file.parent / DATA_SET, set()).add(named[1])
    found = list[dict[str, Any]]()
    for about, read in sides.items():
        try:
            for source in json_object(about, field, RESTORE)["sources"]:
                found += [source] if any(source["splits"][side]["rows"] for side in read) else []
        except (KeyError, TypeError) as error:
            raise CorruptFile(field, str(about), "does not describe a data set", RESTORE) from error
    return found


def check_no_votes(made_of: Sequence[Mapping[str, Any]], path: str, field: str) -> None:
    """Raises: InputError: rows are votes, which would get ids that can be guessed."""
    projects = dict.fromkeys(str(source.get("project")) for source in made_of if source.get("content_id") == "hmac")
    problem = f"holds rows of votes ({', '.join(projects)}), whose ids are under their project's key"
    require(not projects, field, path, problem, "Name the project: {annotations: PROJECT}.")


def licence_within(made_of: Sequence[Mapping[str, Any]], given: str, field: str) -> str:
    """The licence of rows that a data set got from several sources.

    Args:
        given: what the user says.

    Raises:
        InputError: the user says nothing where they differ, or something else where all have the same.
    """
    stated = {(source.get("licence") or "").casefold(): source.get("licence") or "" for source in made_of}
    if len(stated) > 1 and not given:
        said = ", ".join(sorted(licence or "(not said)" for licence in stated.values()))
        remedy = "Say what its rows may be used under: {path: …, licence: …}."
        raise InputError(field, said, "are the licences of the data set's sources, and they differ", remedy)
    licence = next(iter(stated.values()), "") if len(stated) == 1 else ""
    same = not given or not licence or given.casefold() == licence.casefold()
    require(same, field, given, f"contradicts the data set's licence, {licence}", "Correct it, or leave it out.")
    return given or licence
