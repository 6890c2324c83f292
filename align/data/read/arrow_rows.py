"""Rows of Parquet files, and of Arrow IPC files and streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO

from align.core.errors import InputError
from align.data.read.files import DataFile
from align.data.read.json_rows import DECODER, NumberedRows, check_json_values

if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS = 1024
"""Maximum rows of a batch."""
BATCH_BYTES = 8 * 2**20
"""Approximate maximum bytes of a batch."""
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
"""Last bytes of an Arrow stream. A stream without them was cut between two batches."""


def iter_numbered_rows(
    read_batches: Callable[[DataFile, int], Iterator[pyarrow.RecordBatch | int]], source: DataFile, skip: int = 0
) -> NumberedRows:
    """Yield (number, row or its InputError) for each row of a file's Arrow record batches, then (last number, None).

    Args:
        read_batches: yields batches, and an integer for each number of rows that it skips.
        source: the file.
        skip: rows up to this number are not yielded.

    Raises:
        CorruptFile: Arrow cannot read a batch.
    """
    import pyarrow

    row = 0
    try:
        for batch in read_batches(source, skip):
            if isinstance(batch, int):
                row += batch
                continue
            skipped = min(max(skip - row, 0), batch.num_rows)
            row += skipped
            for data in iter_batch_rows(batch.slice(skipped)):
                row += 1
                yield row, data
    except InputError:
        raise
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise source.build_corrupt_error(f"cannot be read after row {row}: it was cut or damaged ({reason})") from error
    yield row, None


def iter_parquet_batches(source: DataFile, skip: int) -> Iterator[pyarrow.RecordBatch | int]:
    """Yield the record batches of a Parquet file, and for each row group that ends before or at row `skip` only its
    number of rows."""
    from pyarrow import parquet

    with source.open_seekable() as file:
        parquet_file = parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
        check_column_names(parquet_file.schema_arrow, source)
        metadata = parquet_file.metadata
        row = 0
        for group in range(metadata.num_row_groups):
            row_group = metadata.row_group(group)
            if row + row_group.num_rows <= skip:
                row += row_group.num_rows
                yield row_group.num_rows
                continue
            batch_rows = max(1, min(BATCH_ROWS, BATCH_BYTES * row_group.num_rows // max(1, row_group.total_byte_size)))
            for batch in parquet_file.iter_batches(batch_rows, row_groups=[group]):
                row += batch.num_rows
                yield batch
        if row != metadata.num_rows:
            raise source.build_corrupt_error(f"has {row} rows, and its end says {metadata.num_rows}")


def iter_file_batches(source: DataFile, skip: int) -> Iterator[pyarrow.RecordBatch]:
    """Yield all record batches of an Arrow IPC file, such as Feather. `skip` is not used."""
    import pyarrow.ipc

    with source.open_seekable() as file:
        arrow_file = pyarrow.ipc.open_file(file)
        check_column_names(arrow_file.schema, source)
        for i in range(arrow_file.num_record_batches):
            yield arrow_file.get_batch(i)


def iter_stream_batches(source: DataFile, skip: int) -> Iterator[pyarrow.RecordBatch]:
    """Yield all record batches of an Arrow IPC stream, as `datasets` writes it. `skip` is not used. Raises CorruptFile
    if the mark of the stream's end is missing."""
    import pyarrow.ipc

    with source.open_stream() as file:
        tail = TailKeeper(file)
        stream = pyarrow.ipc.open_stream(pyarrow.PythonFile(tail, "r"))
        check_column_names(stream.schema, source)
        row = 0
        for batch in stream:
            row += batch.num_rows
            yield batch
        if tail.last != STREAM_END:
            raise source.build_corrupt_error(f"ends after row {row} without the mark of its end: it was cut")


read_parquet = partial(iter_numbered_rows, iter_parquet_batches)
read_arrow_file = partial(iter_numbered_rows, iter_file_batches)
read_arrow_stream = partial(iter_numbered_rows, iter_stream_batches)


def check_column_names(schema: pyarrow.Schema, source: DataFile) -> None:
    """Raise InputError if two columns of an Arrow schema have the same name, as a row holds one value per name."""
    if duplicates := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise source.build_input_error(f"has several columns called {', '.join(duplicates)}", "Rename them.")


class TailKeeper:
    """A binary file wrapper that remembers the last eight bytes read."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.last = b""

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.last = (self.last + data[-len(STREAM_END) :])[-len(STREAM_END) :]
        return data

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        """Do nothing: the context that opened the file closes it."""


def iter_batch_rows(batch: pyarrow.RecordBatch) -> Iterator[dict[str, Any] | InputError]:
    """Yield each row of an Arrow record batch as a dict of JSON values, or an InputError for a row that cannot be kept.
    A batch may be of any size: it is converted in parts."""
    import pyarrow

    types = pyarrow.types

    def is_special(data_type: pyarrow.DataType) -> bool:
        return types.is_temporal(data_type) or types.is_decimal(data_type) or types.is_map(data_type)

    has_special_types = any(has_matching_type(data_type, is_special) for data_type in batch.schema.types)
    json_fields = [field for field in batch.schema if has_matching_type(field.type, is_json)]
    nested_fields = [*json_fields, *(field for field in batch.schema if has_matching_type(field.type, has_structs))]
    part_rows = max(1, min(BATCH_ROWS, BATCH_BYTES * batch.num_rows // max(1, batch.nbytes)))
    for start in range(0, batch.num_rows, part_rows):
        part_batch = batch.slice(start, part_rows)
        needs_check = bool(json_fields) or any(map(has_nul, part_batch.columns))
        for data in part_batch.to_pylist():
            try:
                if has_special_types:
                    data = {name: to_json_value(value) for name, value in data.items()}
                if nested_fields:
                    data |= {field.name: decode_nested(data[field.name], field.type) for field in nested_fields}
                if needs_check:
                    check_json_values(data)
            except InputError as error:
                yield error
            else:
                yield data


def has_nul(column: pyarrow.Array) -> bool:
    """Return whether a text in an Arrow column, or nested in it, contains the character U+0000 (NUL)."""
    import pyarrow
    import pyarrow.compute

    data_type: Any = column.type
    pc: Any = pyarrow.compute  # its functions are created at run time
    types = pyarrow.types
    if types.is_struct(data_type):
        return any(map(has_nul, column.flatten()))
    if types.is_list(data_type) or types.is_large_list(data_type) or types.is_fixed_size_list(data_type):
        return has_nul(column.flatten())
    if types.is_dictionary(data_type):
        return has_nul(column.dictionary)
    is_text = types.is_string(data_type) or types.is_large_string(data_type)
    return is_text and bool(pc.any(pc.match_substring(column, "\0")).as_py())


def list_child_fields(data_type: pyarrow.DataType) -> list[pyarrow.Field]:
    """Return the child fields of an Arrow list or struct type. Returns an empty list for a map."""
    import pyarrow

    return [] if pyarrow.types.is_map(data_type) else [data_type.field(i) for i in range(data_type.num_fields)]


def has_matching_type(data_type: pyarrow.DataType, test: Callable[[pyarrow.DataType], bool]) -> bool:
    """Return whether an Arrow type, or a type nested in it, passes `test`."""
    import pyarrow

    if pyarrow.types.is_dictionary(data_type):
        inner_types = [data_type.value_type]
    else:
        inner_types = [field.type for field in list_child_fields(data_type)]
    return test(data_type) or any(has_matching_type(inner_type, test) for inner_type in inner_types)


def is_json(data_type: pyarrow.DataType) -> bool:
    """Return whether an Arrow type is JSON, in which `datasets` keeps objects of any form."""
    import pyarrow

    return isinstance(data_type, pyarrow.JsonType)


def has_structs(data_type: pyarrow.DataType) -> bool:
    """Return whether an Arrow type is a struct that contains structs, such as a message with a tool call."""
    import pyarrow

    is_struct = pyarrow.types.is_struct
    return is_struct(data_type) and any(
        has_matching_type(field.type, is_struct) for field in list_child_fields(data_type)
    )


def decode_nested(value: Any, data_type: pyarrow.DataType) -> Any:
    """Decode JSON text within a value of an Arrow column, and drop null fields of its structs, as JSON Lines would hold
    it. All structs of a column have the same fields, so that null fills those a row lacks.

    Raises:
        InputError: a value of a JSON column is not JSON.
    """
    import pyarrow

    if is_json(data_type) and isinstance(value, str):
        try:
            return DECODER.decode(value)
        except (ValueError, RecursionError) as error:
            problem = f"holds what is no JSON ({error})"
            raise InputError("a column of JSON", value[:60], problem, "Write JSON.") from error
    if isinstance(value, dict) and pyarrow.types.is_struct(data_type):
        return {
            field.name: decode_nested(value[field.name], field.type)
            for field in list_child_fields(data_type)
            if value.get(field.name) is not None
        }
    if isinstance(value, list) and not pyarrow.types.is_map(data_type):
        inner_fields = list_child_fields(data_type)
        if len(inner_fields) == 1:
            return [decode_nested(entry, inner_fields[0].type) for entry in value]
    return value


def to_json_value(value: Any) -> Any:
    """Convert a value of an Arrow column to JSON types: times to ISO 8601, durations to seconds, decimals to numbers,
    maps to objects."""
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, dict):
        return {name: to_json_value(inner) for name, inner in value.items()}
    if isinstance(value, list):
        is_map = bool(value) and all(isinstance(entry, tuple) for entry in value)  # Arrow's form of a map
        return (
            {str(name): to_json_value(inner) for name, inner in value}
            if is_map
            else [to_json_value(inner) for inner in value]
        )
    return value
