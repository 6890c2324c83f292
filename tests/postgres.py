"""A private PostgreSQL server for a test session."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from sqlalchemy import create_engine


def find_postgres_programs() -> Path | None:
    """Find the folder of the server's programs: the newest version of Debian's package, or else the PATH's. Returns
    None if there is no such folder, or if the user is root, as whom the server refuses to run, and cannot become
    another user."""
    if os.geteuid() == 0 and shutil.which("runuser") is None:
        return None
    initdb_paths = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parents[1].name))
    on_path = shutil.which("initdb")
    return initdb_paths[-1].parent if initdb_paths else Path(on_path).parent if on_path else None


@contextmanager
def run_postgres(binaries: Path) -> Iterator[str]:
    """Run a server on a socket in a temporary folder, and yield its URL.

    Other users cannot reach it: it does not listen on TCP, and only its user can enter the socket's folder. If the user
    is root, it runs as `postgres`, because it refuses to run as root.
    """
    folder = Path(mkdtemp(prefix="align-pg-"))
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    if as_user:
        shutil.chown(folder, "postgres", "postgres")

    def run(*command: str) -> None:
        subprocess.run([*as_user, *command], check=True, stdout=subprocess.DEVNULL, cwd=folder)

    data = str(folder / "data")
    log = str(folder / "log")
    options = f"-c listen_addresses='' -c unix_socket_directories='{folder}' -c max_connections=60 -c fsync=off"
    run(str(binaries / "initdb"), "-D", data, "-U", "align", "-A", "trust", "-E", "UTF8", "--no-sync")
    try:
        run(str(binaries / "pg_ctl"), "-D", data, "-l", log, "-o", options, "-w", "start")
        yield f"postgresql+psycopg://align@/postgres?host={folder}"
    finally:
        run(str(binaries / "pg_ctl"), "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


def create_schema(url: str, name: str) -> str:
    """Create an empty schema on a server. Returns its URL, which a program can use like that of an empty database."""
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {name}")
    engine.dispose()
    return f"{url}&options=-csearch_path%3D{name}"
