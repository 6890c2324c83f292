"""Sources into a spool: records are read, cleaned, and written with what later steps ask of each row.

A source is written in parts, and each says in an account of its own what became of its rows. A part is made of a fixed
range of the source's rows, so that it is the same whoever makes it, and whatever was made before. Parts can be made in
any order and anywhere: those that are there are counted, and others are made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute

from align.core.errors import InputError, require
from align.core.types import Conversation, Preference, Record
from align.data.clean.cleaner import Cleaner
from align.data.clean.outcome import Drop, Step, sequences
from align.data.clean.quality import CountTokens
from align.data.dedup.numbers import number_hashes
from align.data.dedup.shingles import BANDS, band_keys, normalised_digests, shingled
from align.data.read.columns import UnreadColumns, encode_metadata
from align.data.read.content import DOCUMENTS, encode_content_row, get_record_kind, list_texts, map_strings
from align.data.read.drops import BadRows
from align.data.read.drops import Drop as Undecided
from align.data.read.records import ParsedRecord, RowOutcome
from align.data.sets.ids import id_of, question_id
from align.data.sets.record_columns import CONTENT, columns_of, texts_of, turn_counts, whole_texts
from align.data.sets.source import Source
from align.data.sets.spool import REMEDY, Spool

pc: Any = pyarrow.compute  # whose functions are made when it is imported

PART = 50_000
"""Rows of a source that one part is made of; of a record that stands in several, the first one counts."""
BATCH, HEAVY = 2048, 32 * 2**20
"""Rows of a batch at most; characters from which on it ends."""
BANDS_TOGETHER = 8
"""Columns of band keys in one file: each is read alone, and more files are more to open."""
FACTS: Mapping[str, pa.DataType] = {
    "content_id": pa.binary(32),
    "question_id": pa.binary(32),
    "question": pa.binary(8),
    "source": pa.int16(),
    "row": pa.int64(),
    "turns": pa.int32(),
    "tokens": pa.int32(),
    "group": pa.string(),
    "split": pa.string(),
    "time": pa.string(),
    "digest": pa.binary(16),
    "shingles": pa.int32(),
    "numbers": pa.uint64(),
    "characters": pa.int32(),
    "metadata": pa.string(),
}
"""What a spool knows of each row beside its content. `question` is the same for rows of all sources that ask the same,
whatever their ids are made of. `metadata` is what else the row says, as JSON. `digest` is of its normalised text, or of
its content where no texts are compared; `shingles` is how many its text has, and `numbers` a hash of the numbers and
operators in it."""
HASHES = "shingle_hashes"
"""The column of each text's shingles, which near-duplicates are compared by: to make them again would take
longer than to read them."""
PART_FORMAT = 3
"""Of the account of a part. A run goes on from parts of this format alone."""
UNDECIDED, SKIPPED = "dropped_undecided", "skipped_rows"
"""What counts pairs of which no answer is preferred, and rows that were refused, as for plain files."""


class Wanted(NamedTuple):
    """What later steps will ask of each row.

    Attributes:
        over: what is compared to find duplicates: `both`, `prompts` or `answers`.
        near: whether near-duplicates are looked for.
        split, time: the columns that say which side a row is on, and when it was written; empty for none.
        count_tokens: None if tokens are not counted; of a pair, both of its sides count.
    """

    over: str = "both"
    near: bool = True
    split: str = ""
    time: str = ""
    count_tokens: CountTokens | None = None


def band_name(band: int) -> str:
    return f"band_{band:02d}"


@dataclass
class Gathering:
    """One source on its way into a spool.

    Attributes:
        number: of the source, from 0.
        kind: that its records must be of.
        skips: rows that are refused are left out. Without, their source is refused.
        known: rows of its files, where they are known.
        schemas: the columns of a spool of records of one kind, by the files that they stand in.
        failed: parts that a worker could not make, and why.
    """

    spool: Spool
    source: Source
    number: int
    steps: Sequence[tuple[str, Step]]
    wanted: Wanted
    kind: str
    skips: bool
    known: Sequence[int] = ()

    def __post_init__(self) -> None:
        self.size = PART  # which workers are to know too
        self.schemas = [pa.schema([*columns]) for columns in (CONTENT[self.kind].items(), FACTS.items())]
        if self.wanted.near and self.kind == DOCUMENTS:
            bands = [(band_name(band), pa.uint64()) for band in range(BANDS)]
            self.schemas += [pa.schema(bands[i : i + BANDS_TOGETHER]) for i in range(0, BANDS, BANDS_TOGETHER)]
            self.schemas.append(pa.schema([(HASHES, pa.list_(pa.uint64()))]))
        self.failed: Mapping[int, str] = {}
        self.account = SourceAccount(self.source, self.steps)
        self._reading: Reading | None = None
        self._next = 0

    def run(self, done: Callable[[int, int], None] = lambda read, kept: None) -> dict[str, Any]:
        """Read, clean and write what is not yet there.

        Args:
            done: gets, after each part, how many records were read and how many are left.

        Returns:
            what became of all of its rows, see `SourceAccount`.

        Raises:
            InputError: rows are refused, or are of different kinds, or none is left.
        """
        gathered = SourceAccount(self.source, self.steps, self.skips)
        there = self.parts()
        part = 0
        last = told = False
        while not last:
            if part not in there:
                self.write(part)
                if part in self.failed and not told:
                    told = True
                    known = range(-(-sum(self.known) // self.size))
                    print(
                        f"{self.source.name}: parts that this process makes: "
                        f"{sum(part not in there for part in known)} of {len(known)}. "
                        f"A worker could not make part {part}: {self.failed[part]}",
                        flush=True,
                    )
            account = self.spool.account(self.spool.folder / self.name(part))
            gathered.add(account)
            done(gathered.counts["read"], gathered.counts["kept"])
            part += 1
            last = account["last"]
        return gathered.settled()

    def parts(self) -> set[int]:
        """Return the numbers of the parts that are there."""
        return {int(path.name.partition("-")[2]) for path in self.spool.parts(f"{self.number:03d}-")}

    def name(self, part: int) -> str:
        return f"{self.number:03d}-{part:06d}"

    def write(self, part: int) -> dict[str, Any]:
        """Write one part, whole. Returns its account.

        Raises:
            InputError: a row is of another kind, or contradicts the source's licence; or it cannot be read on.
        """
        reading = self._reading
        if reading is None or reading.last or self._next != part:
            reading = Reading(self.source, part, self.size, self.known)
        self._reading = None
        self.account = SourceAccount(self.source, self.steps)
        account = dict[str, Any]()

        def batches() -> Iterator[pa.RecordBatch]:
            for chunk in chunked(self._reads(reading.part(part))):
                batch = self.cleaned(chunk)
                if batch is not None:
                    yield batch
            self.account.counts[SKIPPED] = self.account.bad_rows.count
            account.update(last=reading.last, format=PART_FORMAT, **self.account.as_json())

        self.spool.write(self.name(part), batches(), self.schemas, account)
        self._reading = reading
        self._next = part + 1
        return account

    def _reads(self, outcomes: Iterable[RowOutcome]) -> Iterator[ParsedRecord]:
        """Yield the records of rows, and count the rows that give none."""
        for _, result in outcomes:
            if isinstance(result, InputError):
                self.account.bad_rows.add(result)
            elif isinstance(result, Undecided):
                self.account.counts[UNDECIDED] += 1
            else:
                yield result

    def cleaned(self, chunk: Sequence[ParsedRecord]) -> pa.RecordBatch | None:
        """Return the rows of a batch that the cleaning leaves; None if it leaves none."""
        kept = list[ParsedRecord]()
        records = list[Record]()
        for read in chunk:
            self._check(read)
            record = self.account.cleaner.clean(read.record, read.number)
            self.account.unread.add(read.sizes)
            if not isinstance(record, Drop):
                kept.append(read)
                records.append(record)
        unanswered = sum(
            isinstance(record, Conversation)
            and not any(turn.role == "assistant" and turn.trained for turn in record.messages)
            for record in records
        )
        self.account.counts.update(read=len(chunk), kept=len(kept), unanswered=unanswered)
        if not kept:
            return None
        columns = columns_of(self.kind, records)
        columns |= self._facts(kept, records, pa.RecordBatch.from_pydict(columns))
        schema = pa.unify_schemas(self.schemas)
        return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)

    def _check(self, read: ParsedRecord) -> None:
        """Raise InputError if a row is of another kind than those before it, or contradicts its source's licence."""
        where = f"{self.source.given}, row {read.number}"
        kind = get_record_kind(read.record)
        if kind != self.kind:
            remedy = "Make a data set of each kind; columns can be mapped: columns: {ours: theirs}."
            raise InputError(where, kind, f"the rows before it are {self.kind}", remedy)
        if licence := str(read.extra.get("licence") or read.extra.get("license") or ""):
            stated = self.source.licence
            problem = f"contradicts the source's licence, {stated}"
            remedy = "Correct the source's licence, or divide the source by licence."
            same = not stated or licence.casefold() == stated.casefold()
            require(same, f"{where}, licence", licence, problem, remedy)
            self.account.licences[licence] += 1

    def _facts(
        self, reads: Sequence[ParsedRecord], records: Sequence[Record], table: pa.RecordBatch
    ) -> dict[str, pa.Array]:
        """Return what later steps ask of each row, see `FACTS`."""
        count = self.wanted.count_tokens
        key = self.source.key
        rows = [encode_content_row(record) for record in records]
        questions = [question_id(record) for record in records]
        plain = [id_of(row) for row in rows]
        values = {
            "content_id": [id_of(row, key) for row in rows] if key else plain,
            "question_id": [question_id(record, key) for record in records] if key else questions,
            "question": [question[:8] for question in questions],
            "source": np.full(len(records), self.number, np.int16),
            "row": [read.number for read in reads],
            "turns": turn_counts(self.kind, table).astype(np.int32),
            "tokens": [count and sum(map(count, sequences(record))) for record in records],
            "group": [group_of(read) for read in reads],
            "metadata": [self._metadata_of(read) for read in reads],
        }
        for name, column in (("split", self.wanted.split), ("time", self.wanted.time)):
            found = [read.extra.get(column) if column else None for read in reads]
            values[name] = [None if value is None else str(value) for value in found]
        facts = {name: pa.array(column, FACTS[name]) for name, column in values.items()}
        said = texts_of(self.kind, table)
        facts["characters"] = pc.utf8_length(said)
        # Half the words of two pairs on one prompt are the same, so that only whole rows of them are compared.
        digests = np.array([id[:16] for id in plain], "V16")
        sizes = np.zeros(len(records), np.int32)
        numbers = np.zeros(len(records), np.uint64)
        if self.kind == DOCUMENTS:
            over = self.wanted.over
            compared = said if over == "both" else texts_of(self.kind, table, over)
            nothing = pc.equal(pc.utf8_length(compared), 0).to_numpy(zero_copy_only=False)
            normalised = normalised_digests(whole_texts(table) if over == "both" else compared)
            digests = np.where(nothing, digests, normalised)  # rows that ask nothing are not the same
            if self.wanted.near:
                sets = shingled(compared)
                sizes = sets.sizes.astype(np.int32)
                numbers = number_hashes(compared)
                keys = band_keys(sets)
                facts |= {band_name(band): pa.array(keys[:, band]) for band in range(BANDS)} | {HASHES: sets.column()}
        data = pa.py_buffer(np.ascontiguousarray(digests).tobytes())
        digest = pa.Array.from_buffers(FACTS["digest"], len(digests), [None, data])
        return facts | {"digest": digest, "shingles": pa.array(sizes), "numbers": pa.array(numbers)}

    def _metadata_of(self, read: ParsedRecord) -> str | None:
        """Return a record's metadata as JSON, without personal data if a step looks for any."""
        cleaner = self.account.cleaner
        hides = read.metadata and cleaner.hides
        return encode_metadata(map_strings(read.metadata, cleaner.hidden) if hides else read.metadata)


class SourceAccount:
    """What became of the rows of a source, or of a part of it."""

    def __init__(self, source: Source, steps: Sequence[tuple[str, Step]], skips: bool = True) -> None:
        self.source = source
        self.bad_rows = BadRows(skips)
        self.counts = Counter({"read": 0, "kept": 0, "unanswered": 0, UNDECIDED: 0, SKIPPED: 0})
        self.licences = Counter[str]()
        self.cleaner = Cleaner(steps)
        self.unread = UnreadColumns(source.rules)

    def as_json(self) -> dict[str, Any]:
        return {
            "counts": dict(self.counts),
            "licences": dict(self.licences),
            "bad_rows": self.bad_rows.as_json(),
            "clean": [*map(vars, self.cleaner.counts)],
            "unread": self.unread.sizes,
        }

    def add(self, account: Mapping[str, Any]) -> None:
        """Add the account of the next part.

        Raises:
            InputError: another version of align wrote it, or rows of it are refused, and are not to be left out.
        """
        problem = "was left by another version of align"
        require(account.get("format") == PART_FORMAT, "checkpoints", self.source.name, problem, REMEDY)
        self.counts.update(account["counts"])
        self.licences.update(account["licences"])
        self.unread.add(account["unread"])
        self.cleaner.merge(account["clean"])
        self.bad_rows.restore(account["bad_rows"])
        if not self.bad_rows.skips:
            self.bad_rows.finish_file(self.source.given, self.counts["read"])

    def settled(self) -> dict[str, Any]:
        """Return the account of the whole source.

        Raises:
            InputError: a column holds texts that nothing reads, its rows have different licences, or none is left.
        """
        account = self.as_json()
        self.bad_rows.finish_file(self.source.given, self.counts["read"])
        self.unread.check(self.source.field, self.source.given)
        if len(self.licences) > 1 and not self.source.licence:
            listed = ", ".join(sorted(self.licences))
            remedy = "Divide the source by licence: a data set says one licence of each source."
            raise InputError(self.source.field, listed, "are the licences of its rows, and they differ", remedy)
        if self.counts["kept"] == 0:
            problem = f"is empty after cleaning: of its {self.counts['read']:,} records none is left"
            remedy = "Loosen stage.clean, or leave the source out."
            if not self.counts["read"]:
                problem = "is empty: it has no row"
                remedy = "Give at least one row, or leave the source out."
            raise InputError(self.source.field, self.source.given, problem, remedy)
        return {**account, "metadata": [*self.unread.sizes]}


class Reading:
    """The rows of a source from the beginning of a part on.

    Args:
        part: the number of that part, from 0.
        size: rows of a part.
        counts: rows of the source's files, where they are known.
    """

    def __init__(self, source: Source, part: int, size: int, counts: Sequence[int]) -> None:
        self._size = size
        self._outcomes = source.outcomes(part * size, counts)
        self._next = next(self._outcomes, None)

    @property
    def last(self) -> bool:
        """Whether nothing is behind the part that was read last."""
        return self._next is None

    def part(self, number: int) -> Iterator[RowOutcome]:
        """Yield what became of its rows, in order. Parts are read one after another, each to its end."""
        while self._next is not None and self._next.begin <= (number + 1) * self._size:
            yield self._next
            self._next = next(self._outcomes, None)


def chunked(reads: Iterator[ParsedRecord]) -> Iterator[list[ParsedRecord]]:
    """Yield lists of `BATCH`, or fewer if their texts are long."""
    chunk = list[ParsedRecord]()
    size = 0
    for read in reads:
        chunk.append(read)
        size += sum(map(len, list_texts(read.record)))
        if len(chunk) == BATCH or size > HEAVY:
            yield chunk
            chunk = []
            size = 0
    if chunk:
        yield chunk


def group_of(read: ParsedRecord) -> str | None:
    group = read.record.group_id if isinstance(read.record, Preference) else read.extra.get("group_id")
    return None if group in (None, "") else str(group)
