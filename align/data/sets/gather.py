"""Sources into a spool: records are read, cleaned, and written with what later steps ask of each row.

A source is written in parts, and each says in an account of its own what became of its rows. Parts can be made in any
order and anywhere: those that are there are counted, and others are made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from align.data.clean.cleaner import Cleaner, as_json, from_json
from align.data.clean.length import CountTokens
from align.data.clean.outcome import Drop, Step, sequences
from align.data.dedup.numbers import number_hashes
from align.data.dedup.shingles import BANDS, band_keys, normalised_digests, shingled
from align.data.read.columns import UnreadColumns, metadata_json
from align.data.read.content import DOCUMENTS, kind_of, row_bytes, texts, with_strings
from align.data.read.drops import BadRows
from align.data.read.records import Read
from align.data.sets import reads
from align.data.sets.columns import CONTENT, columns_of, texts_of, turn_counts, whole_texts
from align.data.sets.ids import id_of, question_id
from align.data.sets.source import Source
from align.data.sets.spool import REMEDY, Spool
from align.errors import InputError, require
from align.types import Conversation, Preference, Record

pc: Any = pyarrow.compute  # whose functions are made when it is imported

BATCH, HEAVY = 2048, 32 * 2**20
"""Rows of a batch at most; characters from which on it ends."""
COUNTED = ("read", "kept", "unanswered")
"""Records that were read, that the cleaning left, and those of them without an answer to imitate."""
BANDS_TOGETHER = 8
"""Columns of band keys in one file: each is read alone, and more files are more to open."""
FACTS: Mapping[str, pa.DataType] = {
    "content_id": pa.binary(32), "question_id": pa.binary(32), "question": pa.binary(8), "source": pa.int16(),
    "row": pa.int64(),
    "turns": pa.int32(), "tokens": pa.int32(), "group": pa.string(), "split": pa.string(), "time": pa.string(),
    "digest": pa.binary(16), "shingles": pa.int32(), "numbers": pa.uint64(), "characters": pa.int32(),
    "metadata": pa.string(),
}  # fmt: skip
"""What a spool knows of each row beside its content. `question` is the same for rows of all sources that ask the same,
whatever their ids are made of. `metadata` is what else the row says, as JSON. `digest` is of its normalised text, or of
its content where no texts are compared; `shingles` is how many its text has, and `numbers` a hash of the numbers and
operators in it."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What later steps will ask of each row.

    Attributes:
        over: what is compared to find duplicates: `both`, `prompts` or `answers`.
        near: whether near-duplicates are looked for.
        split, time: the columns that say which side a row is on, and when it was written; empty for none.
        count_tokens: None where nobody asks; of a pair, both of its sides count.
    """

    over: str = "both"
    near: bool = True
    split: str = ""
    time: str = ""
    count_tokens: CountTokens | None = None


HASHES = "shingle_hashes"
"""The column of each text's shingles, which near-duplicates are compared by: to make them again would take
longer than to read them."""


def band_name(band: int) -> str:
    return f"band_{band:02d}"


def schemas_of(kind: str, near: bool) -> list[pa.Schema]:
    """The columns of a spool of records of one kind, by the files that they stand in."""
    schemas = [pa.schema([*columns]) for columns in (CONTENT[kind].items(), FACTS.items())]
    if near and kind == DOCUMENTS:
        bands = [(band_name(band), pa.uint64()) for band in range(BANDS)]
        schemas += [pa.schema(bands[i : i + BANDS_TOGETHER]) for i in range(0, BANDS, BANDS_TOGETHER)]
        schemas.append(pa.schema([(HASHES, pa.list_(pa.uint64()))]))
    return schemas


class Gathering:
    """One source on its way into a spool.

    Args:
        number: of the source, from 0.
        kind: that its records must be of.
        skips: rows that are refused are left out. Without, their source is refused.
        counts: rows of its files, where they are known.

    Attributes:
        failed: parts that a worker could not make, and why.
    """

    def __init__(
        self, spool: Spool, source: Source, number: int, steps: Sequence[tuple[str, Step]], wanted: Wanted, kind: str,
        skips: bool, counts: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.spool, self.source, self.number, self.steps = spool, source, number, steps
        self.wanted, self.kind, self.skips, self.known = wanted, kind, skips, counts
        self.schemas, self.size = schemas_of(kind, wanted.near), reads.PART  # which workers are to know too
        self.begin()
        self.failed: Mapping[int, str] = {}
        self._reads: reads.Reads | None = None
        self._next = 0

    def begin(self) -> None:
        """Count from nothing, as each part does."""
        self.counts, self.licences, self.cleaner = Counter[str](), Counter[str](), Cleaner(self.steps)
        self.unread = UnreadColumns(self.source.rules)

    def run(self, done: Callable[[int, int], None] = lambda read, kept: None) -> dict[str, Any]:
        """Read, clean and write what is not yet there.

        Args:
            done: is told, after each part, how many records were read and how many are left.

        Returns:
            what became of all of its rows, see `Gathered`.

        Raises:
            InputError: rows are refused, or are of different kinds, or none is left.
        """
        found, there = Gathered(self.source, self.steps, self.skips), self.parts()
        part, last, told = 0, False, False
        while not last:
            if part not in there:
                self.write(part)
                if part in self.failed and not told:
                    told = True
                    self.tell_failed(part, there)
            account = self.spool.account(self.spool.folder / self.name(part))
            require("unread" in account, "checkpoints", self.name(part), "was left by another version of align", REMEDY)
            found.add(account)
            done(found.counts["read"], found.counts["kept"])
            part, last = part + 1, account["last"]
        return found.settled()

    def tell_failed(self, part: int, there: set[int]) -> None:
        """Print how many parts are made by this process, and why: it made one that a worker could not make."""
        known = range(-(-sum(self.known) // self.size))
        print(
            f"{self.source.name}: parts that this process makes: {sum(part not in there for part in known)} of "
            f"{len(known)}. A worker could not make part {part}: {self.failed[part]}",
            flush=True,
        )

    def parts(self) -> set[int]:
        """The numbers of the parts that are there."""
        return {int(path.name.partition("-")[2]) for path in self.spool.parts(f"{self.number:03d}-")}

    def name(self, part: int) -> str:
        return f"{self.number:03d}-{part:06d}"

    def write(self, part: int) -> dict[str, Any]:
        """One part, whole. Returns its account.

        Raises:
            InputError: a row is of another kind, or contradicts the source's licence; or it cannot be read on.
        """
        reading = self._reads
        if reading is None or reading.last or self._next != part:
            reading = reads.Reads(self.source, part, self.size, self.known)
        self._reads, account = None, dict[str, Any]()
        self.begin()

        def batches() -> Iterator[pa.RecordBatch]:
            for chunk in chunked(reading.part(part)):
                batch = self.cleaned(chunk)
                if batch is not None:
                    yield batch
            left_out = reading.left_out(part)
            counts = {**{name: self.counts[name] for name in COUNTED}, **left_out["counts"]}
            account.update(
                last=reading.last, bad_rows=left_out["bad_rows"], counts=counts, licences=dict(self.licences),
                unread=self.unread.sizes,
                clean=[as_json(counts) for counts in self.cleaner.counts],
            )  # fmt: skip

        self.spool.write(self.name(part), batches(), self.schemas, account)
        self._reads, self._next = reading, part + 1
        return account

    def cleaned(self, chunk: Sequence[Read]) -> pa.RecordBatch | None:
        """The rows of a batch that the cleaning leaves; None where it leaves none."""
        kept, records = list[Read](), list[Record]()
        for read in chunk:
            self.check(read)
            record = self.cleaner.clean(read.record, (read.number,))
            self.counts["read"] += 1
            self.unread.add(read.sizes)
            if not isinstance(record, Drop):
                kept.append(read)
                records.append(record)
        self.counts["kept"] += len(kept)
        self.counts["unanswered"] += sum(map(unanswered, records))
        if not kept:
            return None
        columns = columns_of(self.kind, records)
        table = pa.RecordBatch.from_pydict(columns)
        schema = pa.unify_schemas(self.schemas)
        made = {**columns, **self.facts(kept, records, table)}
        return pa.RecordBatch.from_arrays([made[name] for name in schema.names], schema=schema)

    def check(self, read: Read) -> None:
        """Raises: InputError: a row is of another kind than those before it, or contradicts its source's licence."""
        kind = kind_of(read.record)
        if kind != self.kind:
            remedy = "Make a data set of each kind; columns can be mapped: columns: {ours: theirs}."
            raise InputError(self.where(read), kind, f"the rows before it are {self.kind}", remedy)
        if read.extra and (said := str(read.extra.get("licence") or read.extra.get("license") or "")):
            stated = self.source.licence
            remedy = "Correct the source's licence, or divide the source by licence."
            problem = f"contradicts the source's licence, {stated}"
            same = not stated or said.casefold() == stated.casefold()
            require(same, f"{self.where(read)}, licence", said, problem, remedy)
            self.licences[said] += 1

    def where(self, read: Read) -> str:
        """How errors name a row."""
        return f"{self.source.given}, row {read.number}"

    def facts(self, reads: Sequence[Read], records: Sequence[Record], table: pa.RecordBatch) -> dict[str, pa.Array]:
        """What later steps ask of each row, see `FACTS`."""
        count, extras, key = self.wanted.count_tokens, [read.extra for read in reads], self.source.key
        rows, questions = [row_bytes(record) for record in records], [question_id(record) for record in records]
        plain = [id_of(row) for row in rows]
        made = {
            "content_id": [id_of(row, key) for row in rows] if key else plain,
            "question_id": [question_id(record, key) for record in records] if key else questions,
            "question": [question[:8] for question in questions],
            "source": np.full(len(records), self.number, np.int16),
            "row": [read.number for read in reads],
            "turns": turn_counts(self.kind, table).astype(np.int32),
            "tokens": [tokens(record, count) for record in records] if count else [None] * len(records),
            "group": [group_of(read) for read in reads],
            "split": said_in(extras, self.wanted.split),
            "metadata": [self.metadata_of(read) for read in reads],
            "time": said_in(extras, self.wanted.time),
        }
        found = {name: pa.array(values, FACTS[name]) for name, values in made.items()}
        said, over = texts_of(self.kind, table), self.wanted.over
        found["characters"] = pc.utf8_length(said)
        own = np.array([id[:16] for id in plain], "V16")
        compared, sizes = said if over == "both" else texts_of(self.kind, table, over), np.zeros(len(records), np.int32)
        if self.kind == DOCUMENTS:
            digests = normalised_digests(whole_texts(table) if over == "both" else compared)
            nothing = pc.equal(pc.utf8_length(compared), 0).to_numpy(zero_copy_only=False)
            found["digest"] = as_binary(np.where(nothing, own, digests))  # rows that ask nothing are not the same
        else:  # half the words of two pairs on one prompt are the same, so that only whole rows are compared
            found["digest"] = as_binary(own)
        numbers = np.zeros(len(records), np.uint64)
        if self.wanted.near and self.kind == DOCUMENTS:
            sets, numbers = shingled(compared), number_hashes(compared)
            keys, sizes = band_keys(sets), sets.sizes
            found |= {band_name(band): pa.array(keys[:, band]) for band in range(BANDS)} | {HASHES: sets.column()}
        return found | {"shingles": pa.array(sizes.astype(np.int32)), "numbers": pa.array(numbers)}

    def metadata_of(self, read: Read) -> str | None:
        """Return a record's metadata as JSON, without personal data if a step looks for any."""
        hides = read.metadata and self.cleaner.hides
        return metadata_json(with_strings(read.metadata, self.cleaner.hidden) if hides else read.metadata)


class Gathered:
    """What became of the rows of a source, over its parts in their order."""

    def __init__(self, source: Source, steps: Sequence[tuple[str, Step]], skips: bool) -> None:
        self.source, self.bad_rows = source, BadRows(skips)
        self.counts, self.licences, self.cleaner = Counter[str](), Counter[str](), Cleaner(steps)
        self.unread = UnreadColumns(source.rules)

    def add(self, account: Mapping[str, Any]) -> None:
        """The next part's account.

        Raises:
            InputError: rows of it are refused, and are not to be left out.
        """
        self.counts.update(account["counts"])
        self.licences.update(account["licences"])
        self.unread.add(account["unread"])
        self.cleaner.merge([[from_json(counts) for counts in account["clean"]]])
        self.bad_rows.restore(account["bad_rows"])
        if not self.bad_rows.skips:
            self.bad_rows.settle(self.source.given, self.counts["read"])

    def settled(self) -> dict[str, Any]:
        """The account of the whole source.

        Raises:
            InputError: a column holds texts that nothing reads, its rows have different licences, or none is left.
        """
        refused = self.bad_rows.as_json()
        self.bad_rows.settle(self.source.given, self.counts["read"])
        at = f"stage.sources.{self.source.name}"
        self.unread.check(at, self.source.given)
        if len(self.licences) > 1 and not self.source.licence:
            said, problem = ", ".join(sorted(self.licences)), "are the licences of its rows, and they differ"
            remedy = "Divide the source by licence: a data set says one licence of each source."
            raise InputError(at, said, problem, remedy)
        if self.counts["kept"] == 0:
            problem = f"is empty after cleaning: of its {self.counts['read']:,} records none is left"
            remedy = "Loosen stage.clean, or leave the source out."
            if not self.counts["read"]:
                problem, remedy = "is empty: it has no row", "Give at least one row, or leave the source out."
            raise InputError(at, self.source.given, problem, remedy)
        clean = [as_json(counts) for counts in self.cleaner.counts]
        return {
            "counts": {**self.counts},
            "licences": dict(self.licences),
            "bad_rows": refused,
            "clean": clean,
            "metadata": [*self.unread.sizes],
        }


def chunked(reads: Iterator[Read]) -> Iterator[list[Read]]:
    """In lists of `BATCH`, or fewer where their texts are long."""
    chunk, size = list[Read](), 0
    for read in reads:
        chunk.append(read)
        size += sum(map(len, texts(read.record)))
        if len(chunk) == BATCH or size > HEAVY:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def as_binary(digests: np.ndarray) -> pa.Array:
    """Digests (`V16`) as a column."""
    data = pa.py_buffer(np.ascontiguousarray(digests).tobytes())
    return pa.Array.from_buffers(pa.binary(digests.dtype.itemsize), len(digests), [None, data])


def group_of(read: Read) -> str | None:
    said = read.record.group_id if isinstance(read.record, Preference) else read.extra.get("group_id")
    return None if said in (None, "") else str(said)


def unanswered(record: Record) -> bool:
    """Whether a conversation has no answer to imitate."""
    return isinstance(record, Conversation) and not any(
        turn.role == "assistant" and turn.trained for turn in record.messages
    )


def tokens(record: Record, count: CountTokens) -> int:
    return count(record) if isinstance(record, str) else sum(map(count, sequences(record)))


def said_in(extras: Sequence[Mapping[str, Any]], column: str) -> list[str | None]:
    """What each row says in a column, as text; nothing where no column is asked for."""
    if not column:
        return [None] * len(extras)
    return [None if (value := extra.get(column)) is None else str(value) for extra in extras]
