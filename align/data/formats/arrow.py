"""Parquet, and Arrow's IPC files and streams: batches of columns, as rows of Python's values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, BinaryIO

from align.data.formats.source import Source
from align.data.formats.values import READ, check_values
from align.errors import InputError

if TYPE_CHECKING:
    import pyarrow

ROWS = 1024
"""Of a batch, at most."""
BATCH = 8 * 2**20
"""Bytes of a batch, about."""
END = b"\xff\xff\xff\xff\0\0\0\0"
"""What a stream ends with. Without it, it was cut between two batches."""
Numbered = Iterator[tuple[int, dict[str, Any] | InputError | None]]


@contextmanager
def told(source: Source, row: list[int]) -> Iterator[None]:
    """What Arrow raises of bytes that it cannot read."""
    import pyarrow

    try:
        yield
    except InputError:
        raise
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise source.corrupt(f"cannot be read after row {row[0]}: it was cut or damaged ({said[0][:200]})") from error


def read_parquet(source: Source, skip: int = 0) -> Numbered:
    """See `align.data.formats.rows.Reader`. Groups of rows that lie before `skip` are not read."""
    from pyarrow import parquet

    row = [0]
    with told(source, row), source.seekable() as file:
        whole = parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
        check_names(whole.schema_arrow, source)
        about = whole.metadata
        for group in range(about.num_row_groups):
            here = about.row_group(group)
            if row[0] + here.num_rows <= skip:
                row[0] += here.num_rows
                continue
            at_once = max(1, min(ROWS, BATCH * here.num_rows // max(1, here.total_byte_size)))
            for batch in whole.iter_batches(at_once, row_groups=[group]):
                yield from rows_of(batch, source, row, skip)
        if row[0] != about.num_rows:
            raise source.corrupt(f"has {row[0]} rows, and its end says {about.num_rows}")
        yield row[0], None


def read_arrow_file(source: Source, skip: int = 0) -> Numbered:
    """An IPC file, such as Feather is one. See `align.data.formats.rows.Reader`."""
    import pyarrow.ipc

    row = [0]
    with told(source, row), source.seekable() as file:
        whole = pyarrow.ipc.open_file(file)
        check_names(whole.schema, source)
        for i in range(whole.num_record_batches):
            yield from parts(whole.get_batch(i), source, row, skip)
        yield row[0], None


def read_arrow_stream(source: Source, skip: int = 0) -> Numbered:
    """An IPC stream, such as `datasets` writes. See `align.data.formats.rows.Reader`."""
    import pyarrow.ipc

    row = [0]
    with told(source, row), source.opened() as file:
        ending = Ending(file)
        stream = pyarrow.ipc.open_stream(pyarrow.PythonFile(ending, "r"))
        check_names(stream.schema, source)
        for batch in stream:
            yield from parts(batch, source, row, skip)
        if ending.last != END:
            raise source.corrupt(f"ends after row {row[0]} without the mark of its end: it was cut")
        yield row[0], None


def check_names(schema: pyarrow.Schema, source: Source) -> None:
    """Raises: InputError: two columns have one name, of which a row could hold one."""
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise source.refused(f"has several columns called {', '.join(twice)}", "Rename them.")


class Ending:
    """A file that remembers the last bytes that were read of it."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.last = file, b""

    def read(self, size: int = -1) -> bytes:
        found = self.file.read(size)
        self.last = (self.last + found[-len(END) :])[-len(END) :]
        return found

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        """It is closed by whoever opened it."""


def parts(batch: pyarrow.RecordBatch, source: Source, row: list[int], skip: int) -> Numbered:
    """The rows of a batch of any size."""
    at_once = max(1, min(ROWS, BATCH * batch.num_rows // max(1, batch.nbytes)))
    for start in range(0, batch.num_rows, at_once):
        yield from rows_of(batch.slice(start, at_once), source, row, skip)


def rows_of(batch: pyarrow.RecordBatch, source: Source, row: list[int], skip: int) -> Numbered:
    """The rows of a small batch; `row` counts on."""
    if row[0] + batch.num_rows <= skip:
        row[0] += batch.num_rows
        return
    suspect = any(map(holds_nul, batch.columns))
    strange = any(map(is_strange, batch.schema.types))
    shaped = [field for field in batch.schema if is_deep(field.type) or holds_json(field.type)]
    suspect |= any(holds_json(field.type) for field in shaped)
    for data in batch.to_pylist():
        row[0] += 1
        if row[0] <= skip:
            continue
        try:
            if strange:
                data = {name: plain(value) for name, value in data.items()}
            if shaped:
                data |= {field.name: as_written(data[field.name], field.type) for field in shaped}
            if suspect:
                check_values(data, source.where(row[0]))
        except InputError as error:
            yield row[0], error
        else:
            yield row[0], data


def holds_nul(column: pyarrow.Array) -> bool:
    """Whether a text within a column holds NUL."""
    import pyarrow
    import pyarrow.compute

    kind: Any = column.type
    pc: Any = pyarrow.compute  # whose functions are made at run time
    if pyarrow.types.is_struct(kind):
        return any(map(holds_nul, column.flatten()))
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind):
        return holds_nul(column.flatten())
    if pyarrow.types.is_dictionary(kind):
        return holds_nul(column.dictionary)
    texts = pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
    return texts and bool(pc.any(pc.match_substring(column, "\0")).as_py())


def is_strange(kind: pyarrow.DataType) -> bool:
    """Whether a type, or one within it, has values that JSON has not."""
    import pyarrow

    types = pyarrow.types
    if any(is_strange(kind.field(i).type) for i in range(kind.num_fields)):
        return True
    if types.is_dictionary(kind):
        return is_strange(kind.value_type)
    return types.is_temporal(kind) or types.is_decimal(kind) or types.is_map(kind)


def holds_json(kind: pyarrow.DataType) -> bool:
    """Whether a type is that of JSON as text, or one within it is: what `datasets` keeps objects of any form in."""
    import pyarrow

    return isinstance(kind, pyarrow.JsonType) or any(holds_json(field.type) for field in fields_in(kind))


def is_deep(kind: pyarrow.DataType, within: bool = False) -> bool:
    """Whether there are structs within structs, such as a call's function in a message."""
    import pyarrow

    struct = pyarrow.types.is_struct(kind)
    return (struct and within) or any(is_deep(field.type, within or struct) for field in fields_in(kind))


def fields_in(kind: pyarrow.DataType) -> list[pyarrow.Field]:
    import pyarrow

    nested = pyarrow.types.is_nested(kind) and not pyarrow.types.is_map(kind)
    return [kind.field(i) for i in range(kind.num_fields)] if nested else []


def as_written(value: Any, kind: pyarrow.DataType) -> Any:
    """A value as JSON Lines write it: JSON for its text, and structs without the fields that are null. All structs of a
    column have the same fields, and null stands in those that others have.

    Raises:
        InputError: what is to be JSON is none.
    """
    import pyarrow

    if value is None:
        return None
    if isinstance(kind, pyarrow.JsonType):
        return parsed(value)
    if isinstance(value, dict) and pyarrow.types.is_struct(kind):
        return {field.name: as_written(value[field.name], field.type)
                for field in fields_in(kind) if value.get(field.name) is not None}  # fmt: skip
    if isinstance(value, list) and len(inner := fields_in(kind)) == 1:
        return [as_written(one, inner[0].type) for one in value]
    return value


def parsed(text: str) -> Any:
    try:
        return READ.decode(text)
    except (ValueError, RecursionError) as error:
        raise InputError("a column of JSON", text[:60], f"holds what is no JSON ({error})", "Write JSON.") from error


def plain(value: Any) -> Any:
    """A value as JSON Lines write it: times in ISO 8601, durations in seconds, decimals as numbers, maps as objects."""
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        pairs = bool(value) and all(isinstance(one, tuple) for one in value)  # as Arrow hands over a map
        return {str(name): plain(inner) for name, inner in value} if pairs else [plain(inner) for inner in value]
    return value
