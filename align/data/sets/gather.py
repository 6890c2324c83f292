"""Sources into a spool: records are read, cleaned, and written with what later steps ask of each row.

A source is written in parts. Killed between two of them, it goes on behind the last whole one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from align.data.clean.cleaner import Cleaner, as_json, from_json
from align.data.clean.length import CountTokens
from align.data.clean.outcome import Drop, sequences
from align.data.dedup.minhash import BANDS, band_keys
from align.data.dedup.shingles import normalised_digests, shingled
from align.data.records.bad_rows import BadRows
from align.data.records.content import DOCUMENTS, kind_of, row_bytes, texts
from align.data.records.drops import Drop as Undecided
from align.data.records.read import Read
from align.data.sets.columns import CONTENT, columns_of, texts_of, turn_counts, whole_texts
from align.data.sets.ids import id_of, question_id
from align.data.sets.source import Source
from align.data.sets.spool import Spool
from align.errors import InputError, require
from align.types import Conversation, Preference, Record

pc: Any = pyarrow.compute  # whose functions are made when it is imported

PART = 50_000
"""Rows of a source that one part is made from."""
BATCH, HEAVY = 2048, 32 * 2**20
"""Rows of a batch at most; characters from which on it ends."""
COUNTED = ("read", "kept", "unanswered")
"""Records that were read, that the cleaning left, and those of them without an answer to imitate."""
UNDECIDED, SKIPPED = "dropped_undecided", "skipped_rows"
"""What counts pairs of which no answer is preferred, and rows that were refused, as for plain files."""
BANDS_TOGETHER = 8
"""Columns of band keys in one file: each is read alone, and more files are more to open."""
END = -1
"""Stands where there is no further row to go on from."""
FACTS: Mapping[str, pa.DataType] = {
    "content_id": pa.binary(32), "question_id": pa.binary(32), "question": pa.binary(8), "source": pa.int16(),
    "row": pa.int64(),
    "turns": pa.int32(), "tokens": pa.int32(), "group": pa.string(), "split": pa.string(), "time": pa.string(),
    "digest": pa.binary(16), "shingles": pa.int32(), "characters": pa.int32(),
}  # fmt: skip
"""What a spool knows of each row beside its content. `question` is the same for rows of all sources that ask the same,
whatever their ids are made of. `digest` is of its normalised text, or of its content where no
texts are compared; `shingles` is how many its text has."""


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


RUNS = "runs"
"""The column of each text's shingles, which near-duplicates are compared by: reading them takes a tenth of the time of
making them again."""


def band_name(band: int) -> str:
    return f"band_{band:02d}"


def schemas_of(kind: str, near: bool) -> list[pa.Schema]:
    """The columns of a spool of records of one kind, by the files that they stand in."""
    schemas = [pa.schema([*columns]) for columns in (CONTENT[kind].items(), FACTS.items())]
    if near and kind == DOCUMENTS:
        bands = [(band_name(band), pa.uint64()) for band in range(BANDS)]
        schemas += [pa.schema(bands[i : i + BANDS_TOGETHER]) for i in range(0, BANDS, BANDS_TOGETHER)]
        schemas.append(pa.schema([(RUNS, pa.list_(pa.uint64()))]))
    return schemas


class Gathering:
    """One source on its way into a spool.

    Args:
        number: of the source, from 0.
        skips: rows that are refused are left out. Without, their source is refused.
    """

    def __init__(
        self, spool: Spool, source: Source, number: int, cleaner: Cleaner, wanted: Wanted, skips: bool
    ) -> None:
        self.spool, self.source, self.number, self.cleaner, self.wanted = spool, source, number, cleaner, wanted
        self.kind, self.counts, self.licences = "", Counter[str](), Counter[str]()
        self.reads = Reads(source, BadRows(skips))

    def run(self, kind: str = "", done: Callable[[int, int], None] = lambda read, kept: None) -> dict[str, Any]:
        """Read, clean and write what is not yet there.

        Args:
            kind: that its records must be of; empty where that is free.
            done: is told, after each part, how many records were read and how many are left.

        Returns:
            the account of its last part, which counts over all of them.

        Raises:
            InputError: rows are refused, or are of different kinds, or none is left.
        """
        self.kind = kind
        parts = self.spool.parts(f"{self.number:03d}-")
        account: Mapping[str, Any] = self.spool.account(parts[-1]) if parts else {"through": 0}
        if parts:
            self.restore(account)
        part = len(parts)
        while account["through"] != END:
            account = self.write_part(f"{self.number:03d}-{part:06d}", account["through"])
            done(self.counts["read"], self.counts["kept"])
            part += 1
        self.reads.settle(self.counts["read"])
        if len(self.licences) > 1 and not self.source.licence:
            said, problem = ", ".join(sorted(self.licences)), "are the licences of its rows, and they differ"
            remedy = "Divide the source by licence: a data set says one licence of each source."
            raise InputError(f"stage.sources.{self.source.name}", said, problem, remedy)
        if self.counts["kept"] == 0:
            problem = f"is empty after cleaning: of its {self.counts['read']:,} records none is left"
            remedy = "Loosen stage.clean, or leave the source out."
            raise InputError(f"stage.sources.{self.source.name}", self.source.given, problem, remedy)
        return dict(account)

    def write_part(self, name: str, through: int) -> dict[str, Any]:
        """One part, of the rows behind `through`. Returns its account."""
        account: dict[str, Any] = {}
        chunks = chunked(self.reads.part(through))
        first = next(chunks, [])
        self.kind = self.kind or (kind_of(first[0].record) if first else DOCUMENTS)

        def batches() -> Iterator[pa.RecordBatch]:
            for chunk in chain([first] if first else [], chunks):
                batch = self.cleaned(chunk)
                if batch is not None:
                    yield batch
            if not self.reads.bad_rows.skips:
                self.reads.settle(self.counts["read"])
            account.update(self.state())

        self.spool.write(name, batches(), schemas_of(self.kind, self.wanted.near), account)
        return account

    def cleaned(self, chunk: Sequence[Read]) -> pa.RecordBatch | None:
        """The rows of a batch that the cleaning leaves; None where it leaves none."""
        kept, records = list[Read](), list[Record]()
        for read in chunk:
            self.check(read)
            record = self.cleaner.clean(read.record, (self.counts["read"],))
            self.counts["read"] += 1
            if not isinstance(record, Drop):
                kept.append(read)
                records.append(record)
        self.counts["kept"] += len(kept)
        self.counts["unanswered"] += sum(map(unanswered, records))
        if not kept:
            return None
        columns = columns_of(self.kind, records)
        table = pa.RecordBatch.from_pydict(columns)
        schema = pa.unify_schemas(schemas_of(self.kind, self.wanted.near))
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
        if self.wanted.near and self.kind == DOCUMENTS:
            sets = shingled(compared)
            keys, sizes = band_keys(sets), sets.sizes
            found |= {band_name(band): pa.array(keys[:, band]) for band in range(BANDS)} | {RUNS: sets.column()}
        return found | {"shingles": pa.array(sizes.astype(np.int32))}

    def state(self) -> dict[str, Any]:
        """What a part's account says: counts of all parts up to it, so that the last one says all."""
        return {
            **self.reads.state, "kind": self.kind, "counts": {**self.counts, **self.reads.state["left_out"]},
            "licences": dict(self.licences), "clean": [as_json(counts) for counts in self.cleaner.counts],
        }  # fmt: skip

    def restore(self, account: Mapping[str, Any]) -> None:
        """Go on from a part's account."""
        self.kind = self.kind or account["kind"]
        self.counts = Counter({name: account["counts"][name] for name in COUNTED})
        self.licences = Counter(account["licences"])
        self.cleaner.merge([[from_json(counts) for counts in account["clean"]]])
        self.reads.restore(account)


class Reads:
    """The records of a source, a part at a time.

    Attributes:
        state: what was read and left out when the last part ended: `through`, the number of the row behind which the
            next part begins (`END` for none), the `bad_rows`, and how many rows or pairs were `left_out`.
    """

    def __init__(self, source: Source, bad_rows: BadRows) -> None:
        self.source, self.bad_rows, self.drops = source, bad_rows, Counter[Undecided]()
        self._reads: Iterator[Read] | None = None
        self._next: Read | None = None
        self.state: dict[str, Any] = {}

    def part(self, through: int) -> Iterator[Read]:
        """Records of the rows behind `through`: some `PART`, and all of the last one's row."""
        if self._reads is None:
            self._reads = self.source.reads(self.bad_rows, through, self.drops)
            self._next = next(self._reads, None)
        count, last = 0, None
        while self._next is not None and (count < PART or self._next.number == last):
            read = self._next
            yield read
            count, last = count + 1, read.number
            if count >= PART:  # what is refused from here on to the next record belongs to the next part
                self.state = self._state(last)
            self._next = next(self._reads, None)
        if self._next is None:
            self.state = self._state(END)

    def settle(self, read: int) -> None:
        """Raise, or say, what was refused, see `BadRows.settle`."""
        self.bad_rows.settle(self.source.given, read)

    def _state(self, through: int) -> dict[str, Any]:
        left_out = {UNDECIDED: sum(self.drops.values()), SKIPPED: self.bad_rows.count}
        return {"through": through, "bad_rows": self.bad_rows.as_json(), "left_out": left_out}

    def restore(self, account: Mapping[str, Any]) -> None:
        self.bad_rows.restore(account["bad_rows"])
        self.drops = Counter({Undecided.TIE: account["left_out"][UNDECIDED]})
        self.state = {name: account[name] for name in ("through", "bad_rows", "left_out")}


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
