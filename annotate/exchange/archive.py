"""A whole store in one file, taken while people work, and put back into an empty store of either kind.

The file is gzipped JSON Lines: a head that names the schema and the ledger's head, a line for every row of every table,
and a last line that counts them. It holds all that the store holds, identities, texts and the keys of projects among
it: keep it as the store itself is kept. What is erased from the store later lives on in it.
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
from align.annotate.store.integrity import recount
from align.annotate.store.tables import invitations, ledger, metadata, projects, sessions, store_meta
from align.core.errors import CorruptFile, InputError, StorageError, require, require_schema_version
from align.core.outputs import atomic_file
from align.data.read.rows import iter_valid_rows

FORMAT = "align annotation store"
AT_ONCE = 500
AGAIN = "Take another backup; this one cannot be trusted."


def tables() -> list[Table]:
    """Every table but the note of its own version and what lets people in for a while, those first that others refer
    to."""
    return [table for table in metadata.sorted_tables if table not in (store_meta, sessions, invitations)]


def backup(store: Store, path: Path) -> dict[str, Any]:
    """Writes the store as it is at one moment; the file appears whole or not at all. Returns its head line.

    Raises:
        CorruptFile: the store is not what was written: a backup of it would hide that.
        InputError: there is such a file already, or it cannot be written.
    """
    taken = datetime.now(UTC).isoformat(timespec="seconds")
    exists = InputError("stage.path", str(path), "there is such a file already", "Name a new one.")
    if os.path.lexists(path):
        raise exists
    try:
        # It names people, hence the rights.
        with store.reading() as connection, atomic_file(path, mode=0o600, replace=False) as raw:
            about = {"format": FORMAT, "schema_version": SCHEMA_VERSION, "taken_at": taken, **asdict(store.verify())}
            with gzip.open(raw, "wt", encoding="utf-8") as file:
                rows = write(file, about, connection)
    except InputError:
        raise
    except FileExistsError as error:
        raise exists from error
    except OSError as error:
        remedy = "Name a file in a folder that you can write to, on a disk with room."
        raise StorageError("stage.path", str(path), f"it cannot be written ({error.strerror})", remedy) from error
    return about | {"rows": rows}


def write(file: TextIO, about: dict[str, Any], connection: Connection) -> int:
    """The lines of a backup; the number of rows."""
    digest, rows = hashlib.sha256(), 0

    def line(value: dict[str, Any]) -> None:
        text = json.dumps(value) + "\n"
        digest.update(text.encode())
        file.write(text)

    line(about)
    for table in tables():
        order = [ledger.c.seq] if table is ledger else list(table.primary_key.columns)
        for row in connection.execute(select(table).order_by(*order)).mappings():
            line({"table": table.name, "row": dict(row)})
            rows += 1
    file.write(json.dumps({"rows": rows, "sha256": digest.hexdigest()}) + "\n")
    return rows


def restore(store: Store, path: Path) -> ChainHead:
    """Fills an empty store from a backup, in one transaction, and checks every hash before it commits.

    Raises:
        InputError: the store is not empty, or the file is no backup of this schema.
        CorruptFile: the file is cut short or was changed.
    """
    lines = ((row.number, row.data) for row in iter_valid_rows(path, "stage.path"))
    _, about = next(lines, (0, {}))
    problem = "it is no backup of an annotation store"
    require(about.get("format") == FORMAT, "stage.path", str(path), problem, "Name a file of stage.action=backup.")
    remedy = (
        "Restore it with the version of align that wrote it, and export its votes: stage=annotate stage.action=export"
    )
    require_schema_version(about.get("schema_version"), SCHEMA_VERSION, "stage.path", str(path), remedy)
    with store.transaction() as connection:
        for table in tables():
            if connection.execute(select(table).limit(1)).first() is not None:
                remedy = "Restore into one that is not there."
                raise InputError("store.url", store.masked_url, f"the store is not empty ({table.name})", remedy)
        read(path, about, lines, connection)
        head = store.verify(ChainHead(about["seq"], about["hash"]))
        for project in connection.execute(select(projects.c.name)).scalars().all():
            recount(connection, project)
        return head


def read(
    path: Path, about: dict[str, Any], lines: Iterable[tuple[int, dict[str, Any]]], connection: Connection
) -> None:
    """Inserts the rows of a backup; raises where they are not what was written."""
    known = {table.name: table for table in tables()}
    waiting: list[dict[str, Any]] = []
    digest, rows, end = hashlib.sha256((json.dumps(about) + "\n").encode()), 0, {}

    def flush() -> None:
        if waiting:
            connection.execute(insert(known[waiting[0]["table"]]), [line["row"] for line in waiting])
            waiting.clear()

    for number, line in lines:
        if "rows" in line:
            end = line
            break
        if line.get("table") not in known or set(line["row"]) != set(known[line["table"]].columns.keys()):
            raise CorruptFile(f"{path}, row {number}", line.get("table"), "it is no row of a table", AGAIN)
        if waiting and (waiting[0]["table"] != line["table"] or len(waiting) == AT_ONCE):
            flush()
        digest.update((json.dumps(line) + "\n").encode())
        waiting.append(line)
        rows += 1
    if end.get("rows") != rows:
        raise CorruptFile("stage.path", str(path), f"it is cut short: {rows} rows, and no count of them", AGAIN)
    if end.get("sha256") != digest.hexdigest():
        raise CorruptFile("stage.path", str(path), "it is not what was written (its sha256 differs)", AGAIN)
    flush()
