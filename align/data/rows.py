"""JSON Lines files, read a row at a time, with errors that name the row."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.errors import CorruptFile, InputError


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line from 1, object) of each line of a JSON Lines file, plain or `.gz`; blank lines are left out but counted.

    Raises:
        InputError: no such file, or a line that is not a JSON object in UTF-8: names file and row.
        CorruptFile: a `.gz` that cannot be unpacked.
    """
    line = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for line, raw in enumerate(file, start=1):
                if not raw.strip():
                    continue
                try:
                    data = json.loads(raw.decode("utf-8-sig"))
                except ValueError as error:  # of which UnicodeDecodeError and JSONDecodeError are kinds
                    shown = raw[:60].decode("utf-8", "replace").strip()
                    problem = f"not a line of JSON in UTF-8 ({error})"
                    raise InputError(f"{path}, row {line}", shown, problem, "Write one JSON object a line.") from error
                if not isinstance(data, dict):
                    problem = f"a {type(data).__name__}, not an object"
                    raise InputError(f"{path}, row {line}", repr(data)[:60], problem, "Write one JSON object a line.")
                yield line, data
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        problem = f"cannot be unpacked after row {line} ({error})"
        raise CorruptFile("data.path", str(path), problem, "Fetch or write the file again.") from error
    except OSError as error:
        remedy = "Check the path: a JSON Lines file, plain or .gz."
        raise InputError("data.path", str(path), f"cannot be read ({error.strerror})", remedy) from error
