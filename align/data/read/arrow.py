"""Parquet, and Arrow's IPC files and streams: batches of columns, as rows of Python's values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, BinaryIO

from align.core.errors import InputError
from align.data.read.files import DataFile
from align.data.read.text_formats import DECODER, NumberedRows, check_values

if TYPE_CHECKING:
    import pyarrow

ROWS = 1024
"""Rows of a batch, at most."""
BATCH = 8 * 2**20
"""Bytes of a batch, about."""
END = b"\xff\xff\xff\xff\0\0\0\0"
"""What a stream ends with. Without it, it was cut between two batches."""


def number_rows(source: DataFile, skip: int, batches: Iterator[pyarrow.RecordBatch | int]) -> NumberedRows:
    """Yield the rows of batches, numbered.

    Args:
        batches: a number stands for rows that are passed over.

    Raises:
        CorruptFile: Arrow cannot read a batch.
    """
    import pyarrow

    row = 0
    try:
        for batch in batches:
            if isinstance(batch, int):
                row += batch
                continue
            passed = min(max(skip - row, 0), batch.num_rows)
            row += passed
            for data in rows_of(batch.slice(passed)):
                row += 1
                yield row, data
    except InputError:
        raise
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise source.corrupt(f"cannot be read after row {row}: it was cut or damaged ({reason})") from error
    yield row, None


def read_parquet(source: DataFile, skip: int = 0) -> NumberedRows:
    """Read Parquet. Groups of rows that lie before `skip` are not read."""
    return number_rows(source, skip, parquet_batches(source, skip))


def parquet_batches(source: DataFile, skip: int) -> Iterator[pyarrow.RecordBatch | int]:
    from pyarrow import parquet

    with source.seekable() as file:
        whole = parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
        check_names(whole.schema_arrow, source)
        metadata = whole.metadata
        row = 0
        for group in range(metadata.num_row_groups):
            here = metadata.row_group(group)
            if row + here.num_rows <= skip:
                row += here.num_rows
                yield here.num_rows
                continue
            at_once = max(1, min(ROWS, BATCH * here.num_rows // max(1, here.total_byte_size)))
            for batch in whole.iter_batches(at_once, row_groups=[group]):
                row += batch.num_rows
                yield batch
        if row != metadata.num_rows:
            raise source.corrupt(f"has {row} rows, and its end says {metadata.num_rows}")


def read_arrow_file(source: DataFile, skip: int = 0) -> NumberedRows:
    """Read an IPC file, such as Feather is one."""
    return number_rows(source, skip, file_batches(source))


def file_batches(source: DataFile) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow.ipc

    with source.seekable() as file:
        whole = pyarrow.ipc.open_file(file)
        check_names(whole.schema, source)
        for i in range(whole.num_record_batches):
            yield whole.get_batch(i)


def read_arrow_stream(source: DataFile, skip: int = 0) -> NumberedRows:
    """Read an IPC stream, such as `datasets` writes."""
    return number_rows(source, skip, stream_batches(source))


def stream_batches(source: DataFile) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow.ipc

    with source.opened() as file:
        tail = TailKeeper(file)
        stream = pyarrow.ipc.open_stream(pyarrow.PythonFile(tail, "r"))
        check_names(stream.schema, source)
        row = 0
        for batch in stream:
            row += batch.num_rows
            yield batch
        if tail.last != END:
            raise source.corrupt(f"ends after row {row} without the mark of its end: it was cut")


def check_names(schema: pyarrow.Schema, source: DataFile) -> None:
    """Raise InputError if two columns have one name, of which a row could hold one."""
    if twice := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise source.refused(f"has several columns called {', '.join(twice)}", "Rename them.")


class TailKeeper:
    """A file that remembers the last bytes that were read of it."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.last = b""

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.last = (self.last + data[-len(END) :])[-len(END) :]
        return data

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        """Do nothing: whoever opened the file closes it."""


def rows_of(batch: pyarrow.RecordBatch) -> Iterator[dict[str, Any] | InputError]:
    """Yield the rows of a batch of any size."""
    import pyarrow

    types = pyarrow.types
    is_strange = any(
        contains(kind, lambda kind: types.is_temporal(kind) or types.is_decimal(kind) or types.is_map(kind))
        for kind in batch.schema.types
    )
    with_json = [field for field in batch.schema if contains(field.type, is_json)]
    shaped = [*with_json, *(field for field in batch.schema if contains(field.type, has_structs))]
    at_once = max(1, min(ROWS, BATCH * batch.num_rows // max(1, batch.nbytes)))
    for start in range(0, batch.num_rows, at_once):
        part = batch.slice(start, at_once)
        suspect = bool(with_json) or any(map(holds_nul, part.columns))
        for data in part.to_pylist():
            try:
                if is_strange:
                    data = {name: plain(value) for name, value in data.items()}
                if shaped:
                    data |= {field.name: as_written(data[field.name], field.type) for field in shaped}
                if suspect:
                    check_values(data)
            except InputError as error:
                yield error
            else:
                yield data


def holds_nul(column: pyarrow.Array) -> bool:
    """Return whether a text within a column holds NUL."""
    import pyarrow
    import pyarrow.compute

    kind: Any = column.type
    pc: Any = pyarrow.compute  # whose functions are made at run time
    types = pyarrow.types
    if types.is_struct(kind):
        return any(map(holds_nul, column.flatten()))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return holds_nul(column.flatten())
    if types.is_dictionary(kind):
        return holds_nul(column.dictionary)
    texts = types.is_string(kind) or types.is_large_string(kind)
    return texts and bool(pc.any(pc.match_substring(column, "\0")).as_py())


def fields_in(kind: pyarrow.DataType) -> list[pyarrow.Field]:
    """Return the fields of a list or a struct. A map has none of its own."""
    import pyarrow

    return [] if pyarrow.types.is_map(kind) else [kind.field(i) for i in range(kind.num_fields)]


def contains(kind: pyarrow.DataType, test: Callable[[pyarrow.DataType], bool]) -> bool:
    """Return whether a type, or one within it, passes a test."""
    import pyarrow

    inner = [kind.value_type] if pyarrow.types.is_dictionary(kind) else [field.type for field in fields_in(kind)]
    return test(kind) or any(contains(other, test) for other in inner)


def is_json(kind: pyarrow.DataType) -> bool:
    """Return whether a type is that of JSON as text, in which `datasets` keeps objects of any form."""
    import pyarrow

    return isinstance(kind, pyarrow.JsonType)


def has_structs(kind: pyarrow.DataType) -> bool:
    """Return whether a type is a struct with structs within it, such as a call's function in a message."""
    import pyarrow

    is_struct = pyarrow.types.is_struct
    return is_struct(kind) and any(contains(field.type, is_struct) for field in fields_in(kind))


def as_written(value: Any, kind: pyarrow.DataType) -> Any:
    """Return a value as JSON Lines write it: JSON for its text, and structs without the fields that are null. All
    structs of a column have the same fields, and null stands in those that others have.

    Raises:
        InputError: what is to be JSON is none.
    """
    import pyarrow

    if is_json(kind) and isinstance(value, str):
        try:
            return DECODER.decode(value)
        except (ValueError, RecursionError) as error:
            problem = f"holds what is no JSON ({error})"
            raise InputError("a column of JSON", value[:60], problem, "Write JSON.") from error
    if isinstance(value, dict) and pyarrow.types.is_struct(kind):
        return {
            field.name: as_written(value[field.name], field.type)
            for field in fields_in(kind)
            if value.get(field.name) is not None
        }
    if isinstance(value, list) and not pyarrow.types.is_map(kind) and len(inner := fields_in(kind)) == 1:
        return [as_written(entry, inner[0].type) for entry in value]
    return value


def plain(value: Any) -> Any:
    """Return a value as JSON Lines write it: times in ISO 8601, durations in seconds, decimals as numbers, maps as
    objects."""
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        pairs = bool(value) and all(isinstance(entry, tuple) for entry in value)  # as Arrow hands over a map
        return {str(name): plain(inner) for name, inner in value} if pairs else [plain(inner) for inner in value]
    return value
