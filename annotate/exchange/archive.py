"""Backup of a whole store in one file while it is in use, and restoration into an empty store on SQLite or PostgreSQL.

The file is gzipped JSON Lines: a header with the schema version and the ledger's head, a line for every row of every
table, and a last line with the number of rows. It contains identities, texts and the projects' keys, so protect it like
the store itself. Erasing something from the store does not erase it from earlier backups.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from sqlalchemy import Connection, Table, insert, select

from align.annotate.store import ChainHead, Store
from align.annotate.store.connections import SCHEMA_VERSION
from align.annotate.store.integrity import correct_counters
from align.annotate.store.tables import invitations, ledger, metadata, projects, sessions, store_meta
from align.core.errors import CorruptFile, InputError, StorageError, require, require_schema_version
from align.core.outputs import open_atomic_file
from align.data.read.rows import iter_valid_rows

FORMAT = "align annotation store"
ROWS_PER_INSERT = 500
"""Number of rows in one INSERT."""
REMEDY = "Take another backup; this one cannot be trusted."


def list_backed_up_tables() -> list[Table]:
    """Return the store's tables to back up, referenced tables first.

    Schema version, sessions and invitations are left out.
    """
    return [table for table in metadata.sorted_tables if table not in (store_meta, sessions, invitations)]


def write_store_backup(store: Store, path: Path) -> dict[str, Any]:
    """Write a consistent backup of a store to a new gzip file, and return the backup's header with the number of rows.

    The file appears only when it is complete.

    Raises:
        CorruptFile: the store fails its integrity checks.
        InputError: the file exists already, or cannot be written.
    """
    taken_at = datetime.now(UTC).isoformat(timespec="seconds")
    exists_error = InputError("stage.path", str(path), "there is such a file already", "Name a new one.")
    if os.path.lexists(path):
        raise exists_error
    try:
        # The file contains names, so only its owner may read it.
        with store.reading() as connection, open_atomic_file(path, mode=0o600, replace=False) as raw:
            header = {
                "format": FORMAT,
                "schema_version": SCHEMA_VERSION,
                "taken_at": taken_at,
                **asdict(store.verify()),
            }
            with gzip.open(raw, "wt", encoding="utf-8") as file:
                rows = write_backup_lines(file, header, connection)
    except InputError:
        raise
    except FileExistsError as error:
        raise exists_error from error
    except OSError as error:
        remedy = "Name a file in a folder that you can write to, on a disk with room."
        raise StorageError("stage.path", str(path), f"it cannot be written ({error.strerror})", remedy) from error
    return header | {"rows": rows}


def write_backup_lines(file: TextIO, header: dict[str, Any], connection: Connection) -> int:
    """Write a backup's header, a JSON line for each row of each table, and the checksum; return the number of rows."""
    digest = hashlib.sha256()
    rows = 0

    def write_line(value: dict[str, Any]) -> None:
        text = json.dumps(value) + "\n"
        digest.update(text.encode())
        file.write(text)

    write_line(header)
    for table in list_backed_up_tables():
        sort_columns = [ledger.c.seq] if table is ledger else list(table.primary_key.columns)
        for row in connection.execute(select(table).order_by(*sort_columns)).mappings():
            write_line({"table": table.name, "row": dict(row)})
            rows += 1
    file.write(json.dumps({"rows": rows, "sha256": digest.hexdigest()}) + "\n")
    return rows


def restore_store(store: Store, path: Path) -> ChainHead:
    """Fill an empty store from a backup in one transaction, check every hash, and return the ledger's head.

    The head is the number and hash of its last row.

    Raises:
        InputError: the store is not empty, or the file is not a backup of this schema version.
        CorruptFile: the file is incomplete or was changed.
    """
    lines = ((row.number, row.data) for row in iter_valid_rows(path, "stage.path"))
    _, header = next(lines, (0, {}))
    problem = "it is no backup of an annotation store"
    require(header.get("format") == FORMAT, "stage.path", str(path), problem, "Name a file of stage.action=backup.")
    remedy = (
        "Restore it with the version of align that wrote it, and export its votes: stage=annotate stage.action=export"
    )
    require_schema_version(header.get("schema_version"), SCHEMA_VERSION, "stage.path", str(path), remedy)
    with store.transaction() as connection:
        for table in list_backed_up_tables():
            if connection.execute(select(table).limit(1)).first() is not None:
                remedy = "Restore into a store that does not exist yet."
                raise InputError("store.url", store.masked_url, f"the store is not empty ({table.name})", remedy)
        insert_rows(path, header, lines, connection)
        head = store.verify(ChainHead(header["seq"], header["hash"]))
        for project in connection.execute(select(projects.c.name)).scalars().all():
            correct_counters(connection, project)
        return head


def insert_rows(
    path: Path, header: dict[str, Any], lines: Iterable[tuple[int, dict[str, Any]]], connection: Connection
) -> None:
    """Insert a backup's rows into an empty store's tables, or raise CorruptFile if they do not fit its checksum."""
    tables_by_name = {table.name: table for table in list_backed_up_tables()}
    batch: list[dict[str, Any]] = []
    digest = hashlib.sha256((json.dumps(header) + "\n").encode())
    rows = 0
    trailer = {}

    def insert_batch() -> None:
        if batch:
            connection.execute(insert(tables_by_name[batch[0]["table"]]), [line["row"] for line in batch])
            batch.clear()

    for number, line in lines:
        if "rows" in line:
            trailer = line
            break
        if line.get("table") not in tables_by_name or set(line["row"]) != set(
            tables_by_name[line["table"]].columns.keys()
        ):
            raise CorruptFile(f"{path}, row {number}", line.get("table"), "it is no row of a table", REMEDY)
        if batch and (batch[0]["table"] != line["table"] or len(batch) == ROWS_PER_INSERT):
            insert_batch()
        digest.update((json.dumps(line) + "\n").encode())
        batch.append(line)
        rows += 1
    if trailer.get("rows") != rows:
        raise CorruptFile("stage.path", str(path), f"it is cut short: {rows} rows, and no count of them", REMEDY)
    if trailer.get("sha256") != digest.hexdigest():
        raise CorruptFile("stage.path", str(path), "it is not what was written (its sha256 differs)", REMEDY)
    insert_batch()
