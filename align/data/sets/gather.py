"""Import of sources into a spool: records are read, cleaned, and written with the facts that later steps need.

A source is written in parts, each with counts of its rows. A part is made from a fixed range of the source's rows,
so its content does not depend on the process that writes it or on other parts. Parts can be written in any order and on
any machine: existing parts are counted, and missing ones are written.
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
from align.data.clean.outcome import Drop, Step, list_documents
from align.data.clean.quality import CountTokens
from align.data.dedup.numbers import hash_numbers
from align.data.dedup.shingles import BANDS, build_shingles, compute_band_keys, digest_normalised_texts
from align.data.read.content import DOCUMENTS, encode_content_row, get_record_kind, list_texts, map_strings
from align.data.read.drops import BadRows
from align.data.read.drops import Drop as Undecided
from align.data.read.records import ParsedRecord, RowOutcome
from align.data.read.unread_columns import UnreadColumns, encode_metadata
from align.data.sets.ids import compute_content_id, compute_question_id
from align.data.sets.record_columns import (
    CONTENT,
    count_turns,
    join_complete_texts,
    join_record_texts,
    records_to_columns,
)
from align.data.sets.source import Source
from align.data.sets.spool import REMEDY, Spool

pc: Any = pyarrow.compute  # whose functions are made when it is imported

PART = 50_000
"""Number of a source's rows in one part. A record that is made of several rows belongs to the part of the first one."""
BATCH = 2048
"""Maximum number of records in a batch."""
BATCH_CHARACTERS = 32 * 2**20
"""Number of characters above which a batch ends."""
BANDS_TOGETHER = 8
"""Number of columns of band keys in one file. Each column is read alone, but more files would have to be opened."""
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
"""Columns that are stored for each row beside its content, such as ids and hashes. `question` is equal for rows of all
sources with the same question, regardless of the kind of their ids. `metadata` has other columns of the row as JSON.
`digest` is a hash of the row's normalised text, or of its content if no texts are compared. `shingles` is the number of
shingles of that text, `numbers` a hash of its numbers and operators."""
HASHES = "shingle_hashes"
"""Name of the column with the shingles of each text. Reading them for the comparison of near-duplicates is faster than
computing them again."""
PART_FORMAT = 5
"""Version of the format of a part's counts. A run resumes only from parts of this format."""
UNDECIDED = "dropped_undecided"
"""Name of the count of pairs without a preferred answer, as for plain files."""
SKIPPED = "skipped_rows"
"""Name of the count of rows that were refused, as for plain files."""


class FactOptions(NamedTuple):
    """Settings for the values that are computed and stored for each imported row, such as hashes by which duplicates
    are found.

    Attributes:
        over: texts that are compared to find duplicates: `both`, `prompts` or `answers`.
        near: whether near-duplicates are searched.
        split, time: columns with the split and the time of a row; empty for none.
        count_tokens: counts tokens, of both answers of a pair; None if tokens are not counted.
    """

    over: str = "both"
    near: bool = True
    split: str = ""
    time: str = ""
    count_tokens: CountTokens | None = None


def name_band_column(band: int) -> str:
    """Return the name of the column with the MinHash keys of a band, such as `band_07`."""
    return f"band_{band:02d}"


@dataclass
class SourceImport:
    """The import of one source, whose rows are read, cleaned and written to disk in parts.

    Attributes:
        number: number of the source, from 0.
        kind: required kind of its records.
        skips: whether refused rows are left out. If not, the source is refused.
        file_row_counts: number of rows of each of its files, as far as they were counted.
        schemas: columns of each file of a part.
        failed: part that a worker could not write → reason.
    """

    spool: Spool
    source: Source
    number: int
    steps: Sequence[tuple[str, Step]]
    options: FactOptions
    kind: str
    skips: bool
    file_row_counts: Sequence[int] = ()

    def __post_init__(self) -> None:
        self.size = PART  # an attribute, so that workers use the same value
        self.schemas = [pa.schema([*columns]) for columns in (CONTENT[self.kind].items(), FACTS.items())]
        if self.options.near and self.kind == DOCUMENTS:
            bands = [(name_band_column(band), pa.uint64()) for band in range(BANDS)]
            self.schemas += [pa.schema(bands[i : i + BANDS_TOGETHER]) for i in range(0, BANDS, BANDS_TOGETHER)]
            self.schemas.append(pa.schema([(HASHES, pa.list_(pa.uint64()))]))
        self.failed: Mapping[int, str] = {}
        self.part_counts = SourceCounts(self.source, self.steps)
        self._reading: PartReader | None = None
        self._next = 0

    def run(self, report_progress: Callable[[int, int], None] = lambda read, kept: None) -> dict[str, Any]:
        """Read, clean and write the parts of the source that are not on disk yet, and return the counts of all its
        rows.

        Args:
            report_progress: called after each part with the numbers of records that were read and kept so far.

        Returns:
            The counts of all rows of the source, see `SourceCounts`.

        Raises:
            InputError: Rows are refused, have different kinds, or none is kept.
        """
        total = SourceCounts(self.source, self.steps, self.skips)
        existing = self.parts()
        part = 0
        is_last = False
        has_warned = False
        while not is_last:
            if part not in existing:
                self.write(part)
                if part in self.failed and not has_warned:
                    has_warned = True
                    counted_parts = range(-(-sum(self.file_row_counts) // self.size))
                    print(
                        f"{self.source.name}: parts that this process has to make itself: "
                        f"{sum(part not in existing for part in counted_parts)} of {len(counted_parts)}. "
                        f"A worker could not make part {part}: {self.failed[part]}",
                        flush=True,
                    )
            part_counts = self.spool.read_part_counts(self.spool.folder / self.name(part))
            total.add(part_counts)
            report_progress(total.counts["read"], total.counts["kept"])
            part += 1
            is_last = part_counts["last"]
        return total.finish()

    def parts(self) -> set[int]:
        """Return the numbers of the source's parts that are complete on disk."""
        return {int(path.name.partition("-")[2]) for path in self.spool.parts(f"{self.number:03d}-")}

    def name(self, part: int) -> str:
        return f"{self.number:03d}-{part:06d}"

    def write(self, part: int) -> dict[str, Any]:
        """Read, clean and write one part of the source to disk, and return the counts of its rows.

        Raises:
            InputError: A row has another kind or contradicts the source's licence, or the source cannot be read.
        """
        reading = self._reading
        if reading is None or reading.last or self._next != part:
            reading = PartReader(self.source, part, self.size, self.file_row_counts)
        self._reading = None
        self.part_counts = SourceCounts(self.source, self.steps)
        part_counts = dict[str, Any]()

        def batches() -> Iterator[pa.RecordBatch]:
            for chunk in iter_chunks(self._iter_parsed_records(reading.iter_part(part))):
                batch = self.clean_batch(chunk)
                if batch is not None:
                    yield batch
            self.part_counts.counts[SKIPPED] = self.part_counts.bad_rows.count
            part_counts.update(last=reading.last, format=PART_FORMAT, **self.part_counts.as_json())

        self.spool.write(self.name(part), batches(), self.schemas, part_counts)
        self._reading = reading
        self._next = part + 1
        return part_counts

    def _iter_parsed_records(self, outcomes: Iterable[RowOutcome]) -> Iterator[ParsedRecord]:
        """Yield the records of rows that could be read, and count refused rows and pairs without a preferred answer."""
        for _, result in outcomes:
            if isinstance(result, InputError):
                self.part_counts.bad_rows.add(result)
            elif isinstance(result, Undecided):
                self.part_counts.counts[UNDECIDED] += 1
            else:
                yield result

    def clean_batch(self, chunk: Sequence[ParsedRecord]) -> pa.RecordBatch | None:
        """Clean and count a batch of records, and return the kept ones as columns, or None if no record is kept."""
        kept = list[ParsedRecord]()
        records = list[Record]()
        for read in chunk:
            self._check_record(read)
            record = self.part_counts.cleaner.clean(read.record, read.number)
            self.part_counts.unread.add(read.sizes)
            if not isinstance(record, Drop):
                kept.append(read)
                records.append(record)
        unanswered = sum(
            isinstance(record, Conversation)
            and not any(turn.role == "assistant" and turn.trained for turn in record.messages)
            for record in records
        )
        self.part_counts.counts.update(read=len(chunk), kept=len(kept), unanswered=unanswered)
        if not kept:
            return None
        columns = records_to_columns(self.kind, records)
        columns |= self._compute_facts(kept, records, pa.RecordBatch.from_pydict(columns))
        schema = pa.unify_schemas(self.schemas)
        return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)

    def _check_record(self, read: ParsedRecord) -> None:
        """Raise InputError if a record has another kind than the source, or contradicts the source's licence. Licences
        are counted."""
        place = f"{self.source.location}, row {read.number}"
        kind = get_record_kind(read.record)
        if kind != self.kind:
            remedy = "Make a data set of each kind; columns can be mapped: columns: {ours: theirs}."
            raise InputError(place, kind, f"the rows before it are {self.kind}", remedy)
        if licence := str(read.extra.get("licence") or read.extra.get("license") or ""):
            stated = self.source.licence
            problem = f"contradicts the source's licence, {stated}"
            remedy = "Correct the source's licence, or divide the source by licence."
            is_consistent = not stated or licence.casefold() == stated.casefold()
            require(is_consistent, f"{place}, licence", licence, problem, remedy)
            self.part_counts.licences[licence] += 1

    def _compute_facts(
        self, reads: Sequence[ParsedRecord], records: Sequence[Record], table: pa.RecordBatch
    ) -> dict[str, pa.Array]:
        """Return the columns of `FACTS` for these records: ids, numbers of tokens, and hashes to find duplicates.

        Args:
            table: the records as columns.
        """
        count = self.options.count_tokens
        key = self.source.key
        rows = [encode_content_row(record) for record in records]
        questions = [compute_question_id(record) for record in records]
        sha256_ids = [compute_content_id(row) for row in rows]
        values = {
            "content_id": [compute_content_id(row, key) for row in rows] if key else sha256_ids,
            "question_id": [compute_question_id(record, key) for record in records] if key else questions,
            "question": [question[:8] for question in questions],
            "source": np.full(len(records), self.number, np.int16),
            "row": [read.number for read in reads],
            "turns": count_turns(self.kind, table).astype(np.int32),
            "tokens": [count and sum(map(count, list_documents(record))) for record in records],
            "group": [read_group_id(read) for read in reads],
            "metadata": [self._format_metadata(read) for read in reads],
        }
        for name, column in (("split", self.options.split), ("time", self.options.time)):
            cells = [read.extra.get(column) if column else None for read in reads]
            values[name] = [None if value is None else str(value) for value in cells]
        facts = {name: pa.array(column, FACTS[name]) for name, column in values.items()}
        all_texts = join_record_texts(self.kind, table)
        facts["characters"] = pc.utf8_length(all_texts)
        # Two pairs on one prompt have half of their words in common, so pairs are only compared by their content.
        digests = np.array([id[:16] for id in sha256_ids], "V16")
        sizes = np.zeros(len(records), np.int32)
        numbers = np.zeros(len(records), np.uint64)
        if self.kind == DOCUMENTS:
            over = self.options.over
            compared = all_texts if over == "both" else join_record_texts(self.kind, table, over)
            is_empty = pc.equal(pc.utf8_length(compared), 0).to_numpy(zero_copy_only=False)
            normalised = digest_normalised_texts(join_complete_texts(table) if over == "both" else compared)
            digests = np.where(is_empty, digests, normalised)  # rows without text are not duplicates
            if self.options.near:
                sets = build_shingles(compared)
                sizes = sets.sizes.astype(np.int32)
                numbers = hash_numbers(compared)
                keys = compute_band_keys(sets)
                facts |= {name_band_column(band): pa.array(keys[:, band]) for band in range(BANDS)} | {
                    HASHES: sets.to_column()
                }
        data = pa.py_buffer(np.ascontiguousarray(digests).tobytes())
        digest = pa.Array.from_buffers(FACTS["digest"], len(digests), [None, data])
        return facts | {"digest": digest, "shingles": pa.array(sizes), "numbers": pa.array(numbers)}

    def _format_metadata(self, read: ParsedRecord) -> str | None:
        """Return a record's metadata as JSON, with personal data masked if a cleaning step looks for it."""
        cleaner = self.part_counts.cleaner
        hides = read.metadata and cleaner.masks_personal_data
        return encode_metadata(map_strings(read.metadata, cleaner.mask_personal_data) if hides else read.metadata)


class SourceCounts:
    """Counts of the rows of a source, or of a part of it, by the outcome of reading and cleaning."""

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

    def add(self, part_counts: Mapping[str, Any]) -> None:
        """Add the counts of the source's next part to these counts.

        Raises:
            InputError: Another version of align wrote them, or rows of the part are refused and must not be left out.
        """
        problem = "was left by another version of align"
        require(part_counts.get("format") == PART_FORMAT, "checkpoints", self.source.name, problem, REMEDY)
        self.counts.update(part_counts["counts"])
        self.licences.update(part_counts["licences"])
        self.unread.add(part_counts["unread"])
        self.cleaner.merge(part_counts["clean"])
        self.bad_rows.restore(part_counts["bad_rows"])
        if not self.bad_rows.skips:
            self.bad_rows.report_refused_rows(self.source.location, self.counts["read"])

    def finish(self) -> dict[str, Any]:
        """Check and return the counts of the whole source, and print how many rows were refused.

        Raises:
            InputError: No setting uses a column of texts, rows have different licences, or no row is kept.
        """
        source_counts = self.as_json()
        self.bad_rows.report_refused_rows(self.source.location, self.counts["read"])
        self.unread.check(self.source.field, self.source.location)
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
            raise InputError(self.source.field, self.source.location, problem, remedy)
        return {**source_counts, "metadata": [*self.unread.sizes]}


class PartReader:
    """A reader of the rows of a source, part by part, beginning at a given part.

    Args:
        part: number of the first part to read, from 0.
        size: rows of a part.
        counts: number of rows of each of the source's files, as far as they were counted.
    """

    def __init__(self, source: Source, part: int, size: int, counts: Sequence[int]) -> None:
        self._size = size
        self._outcomes = source.iter_outcomes(part * size, counts)
        self._next = next(self._outcomes, None)

    @property
    def last(self) -> bool:
        """True if the part that was read last is the last one."""
        return self._next is None

    def iter_part(self, number: int) -> Iterator[RowOutcome]:
        """Yield the outcome of each row of a part: a record, a drop or an error. Parts have to be read in order, each
        to its end."""
        while self._next is not None and self._next.first_row_number <= (number + 1) * self._size:
            yield self._next
            self._next = next(self._outcomes, None)


def iter_chunks(reads: Iterator[ParsedRecord]) -> Iterator[list[ParsedRecord]]:
    """Yield lists of `BATCH` records, or of fewer records if their texts are long."""
    chunk = list[ParsedRecord]()
    size = 0
    for read in reads:
        chunk.append(read)
        size += sum(map(len, list_texts(read.record)))
        if len(chunk) == BATCH or size > BATCH_CHARACTERS:
            yield chunk
            chunk = []
            size = 0
    if chunk:
        yield chunk


def read_group_id(read: ParsedRecord) -> str | None:
    """Return the id of the group that a record's row is in, or None if it has none. Rows of a group stay in one
    split."""
    group = read.record.group_id if isinstance(read.record, Preference) else read.extra.get("group_id")
    return None if group in (None, "") else str(group)
