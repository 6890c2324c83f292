"""A PostgreSQL server of our own, for as long as a test session lasts."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from sqlalchemy import create_engine


def programs() -> Path | None:
    """Where Debian's package, or the PATH, has the server's programs; the newest version's. None if root, as whom the
    server refuses to run, cannot become another user."""
    if os.geteuid() == 0 and shutil.which("runuser") is None:
        return None
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parents[1].name))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


@contextmanager
def server(binaries: Path) -> Iterator[str]:
    """The URL of a server on a socket in a folder of its own.

    It speaks to nobody else: no TCP, and the socket's folder is its user's alone. As root it runs as `postgres`, for it
    refuses to run as root.
    """
    folder = Path(mkdtemp(prefix="align-pg-"))
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    if as_user:
        shutil.chown(folder, "postgres", "postgres")

    def run(*command: str) -> None:
        subprocess.run([*as_user, *command], check=True, stdout=subprocess.DEVNULL, cwd=folder)

    data, log = str(folder / "data"), str(folder / "log")
    options = f"-c listen_addresses='' -c unix_socket_directories='{folder}' -c max_connections=60 -c fsync=off"
    run(str(binaries / "initdb"), "-D", data, "-U", "align", "-A", "trust", "-E", "UTF8", "--no-sync")
    try:
        run(str(binaries / "pg_ctl"), "-D", data, "-l", log, "-o", options, "-w", "start")
        yield f"postgresql+psycopg://align@/postgres?host={folder}"
    finally:
        run(str(binaries / "pg_ctl"), "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


def new_schema(url: str, name: str) -> str:
    """The URL of an empty schema of that server: what a database of its own is to a program, and made at once."""
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {name}")
    engine.dispose()
    return f"{url}&options=-csearch_path%3D{name}"
