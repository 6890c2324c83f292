"""Every path that a user can name and align writes to, with every kind of thing in its place: it is refused by name as
the user's own error, or left as it was, and what align made is replaced whole."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import signal
import sqlite3
import stat
import tarfile
from collections.abc import Callable
from contextlib import closing, nullcontext, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import pytest
from odd_files import NOT_FILES, at_once
from test_own_files import open_run

from align.annotate.exchange.archive import write_store_backup
from align.annotate.store import Store
from align.core.errors import InputError
from align.core.outputs import open_atomic_file, replace_file
from align.export.converters import HF, LORA, unpack_converters
from align.models.base import convert_gguf_once
from align.registry.comparison import write_sweep_note
from align.registry.garbage import LOG, Piece, append_to_removal_log
from align.registry.index import INDEX, Index
from align.report.page import Report
from align.rollout.answer_cache import AnswerStore
from align.run.alias_log import FILE as ALIASES
from align.run.alias_log import AliasTarget, append_change
from align.run.atomic import publish_folder
from align.serve.tenants import change_tenant
from align.serve.usage import UsageDatabase
from align.web.key_link import load_or_create_key


class Output(NamedTuple):
    """A path that a user can name.

    Attributes:
        name: the path, below the folder of the test.
        write: has align write there.
        replaces: whether a second call takes the place of what the first one wrote, or adds to it.
    """

    name: str
    write: Callable[[Path], object]
    replaces: bool = True


def write_page(path: Path) -> None:
    Report("title").text("text").write(path, "stage.html")


def write_backup(path: Path) -> None:
    with Store.open("sqlite:///:memory:") as store:
        write_store_backup(store, path)


def open_store(path: Path) -> None:
    with Store.open(f"sqlite:///{path}"):
        pass


def open_store_by_uri(path: Path) -> None:
    with Store.open(f"sqlite:///file:{path}?uri=true"):
        pass


def serve_store(path: Path) -> None:
    with Store.open(f"sqlite:///{path.with_suffix('')}") as store, store.serve_exclusively():
        pass


def count_usage(path: Path) -> None:
    with UsageDatabase(path):
        pass


def add_answers(path: Path) -> None:
    AnswerStore(path).add([])


def log_removal(path: Path) -> None:
    append_to_removal_log(path.parent, Piece("bases", "bases/x", 1, "nothing needs it"), "ann")


def change_alias(path: Path) -> None:
    append_change(path.parent, "production", [AliasTarget("sft:one", "0" * 64)], who="ann", why="so", replaces=0)


def publish_base(path: Path) -> None:
    with publish_folder(path, replace="base.json") as part:
        (part / "base.json").write_text("{}")


def unpack_test_archive(path: Path) -> None:
    archive = path.parent / ".archive.tar"
    with tarfile.open(archive, "w") as tar:
        for name in (HF, LORA):
            member = tarfile.TarInfo(f"llama_cpp_python-0.3.36/vendor/llama.cpp/{name}")
            member.size = 4
            tar.addfile(member, io.BytesIO(b"pass"))
    try:
        unpack_converters(archive, path)
    finally:
        archive.unlink()


def convert_smollm2(path: Path) -> None:
    gguf = path.parent / ".model.gguf"
    gguf.write_bytes(b"")
    try:
        convert_gguf_once(gguf, path.parent)
    except ValueError as error:
        if isinstance(error, InputError):
            raise  # a refusal; other errors come later, as transformers reads no empty GGUF
    finally:
        gguf.unlink()


EMPTY_DIGEST = hashlib.sha256(b"").hexdigest()[:12]
FILES = {
    "stage.html": Output("page.html", write_page),
    "stage.path of a backup": Output("backup.jsonl.gz", write_backup, replaces=False),
    "stage.keys": Output("keys.json", lambda path: change_tenant(path, "acme")),
    "the usage beside stage.keys": Output("keys.json.usage.db", count_usage),
    "store.url": Output("annotations.db", open_store),
    "store.url as a URI": Output("annotations.db", open_store_by_uri),
    "the answers in run.root": Output("answers.db", add_answers),
    "the key of a page in run.root": Output("annotate.key", load_or_create_key),
    "the log of removals in run.root": Output(LOG, log_removal),
    "the aliases in run.root": Output(ALIASES, change_alias, replaces=False),
    "the note of a sweep in run.root": Output(
        "compare/x.json", lambda path: write_sweep_note(path.parents[1], "x", ["a:b"])
    ),
}
FOLDERS = {
    "run.name": Output("sft/mine", lambda path: open_run(path.parents[1]).__exit__(None, None, None)),
    "run.root": Output("runs", lambda path: open_run(path).__exit__(None, None, None)),
    "the folder of a stage": Output("sft", lambda path: open_run(path.parent).__exit__(None, None, None)),
    "a base in run.root": Output("bases/x", publish_base),
    "the converters in XDG_CACHE_HOME": Output("llama.cpp", unpack_test_archive),
    "SmolLM2 in XDG_CACHE_HOME": Output(f"smollm2-{EMPTY_DIGEST}", convert_smollm2, replaces=False),
}
OUTPUTS = FILES | FOLDERS


def make_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE bookmarks (address TEXT)")
        database.execute("INSERT INTO bookmarks VALUES ('mine')")
        database.commit()


def make_logged_database(path: Path) -> None:
    """Make a database whose tables stand in its write-ahead log alone, as a killed program leaves it."""
    original = path.with_name("original.db")
    with closing(sqlite3.connect(original)) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("CREATE TABLE bookmarks (address TEXT)")
        database.commit()
        for suffix in ("", "-wal"):
            shutil.copyfile(f"{original}{suffix}", f"{path}{suffix}")
    for suffix in ("", "-wal", "-shm"):
        Path(f"{original}{suffix}").unlink(missing_ok=True)


def make_views(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE VIEW bookmarks AS SELECT 'mine' AS address")
        database.commit()


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("mine")
    (path / "part").mkdir()


def link_to_file(path: Path) -> None:
    path.with_name("target").write_text('{"mine": true}\n')
    path.symlink_to("target")


def link_to_folder(path: Path) -> None:
    make_folder(path.with_name("target"))
    path.symlink_to("target", target_is_directory=True)


FOREIGN: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("mine\n" * 100),
    "binary": lambda path: path.write_bytes(bytes(range(256))),
    "object": lambda path: path.write_text('{"mine": true}\n'),
    "list": lambda path: path.write_text("[1, 2]\n"),
    "page": lambda path: path.write_text("<!doctype html><title>mine</title>"),
    "database": make_database,
    "database in its log": make_logged_database,
    "database of views": make_views,
    "cut database": lambda path: path.write_bytes(b"SQLite format 3\0" + bytes(4000)),
    "full folder": make_folder,
    "link to a file": link_to_file,
    "link to a folder": link_to_folder,
    **{kind: make for kind, (make, _) in NOT_FILES.items()},
}
SHARED_FOLDERS = ("run.root", "the folder of a stage")
"""Settings whose folder may hold files of other programs, which are not replaced."""
TAKEN_OVER = {("folder", setting) for setting in FOLDERS} | {
    (kind, setting) for kind in ("full folder", "link to a folder") for setting in SHARED_FOLDERS
}
"""Pairs of a kind and a setting where align writes into the existing folder, such as an empty one."""


def contents_of(root: Path) -> dict[str, object]:
    """Return what lies below a folder, by name: the bytes of a file, where a link leads, and the kind of the rest."""
    contents: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        mode = path.lstat().st_mode
        content: object = stat.S_IFMT(mode)
        if stat.S_ISLNK(mode):
            content = os.readlink(path)
        elif stat.S_ISREG(mode):
            content = path.read_bytes()
        contents[str(path.relative_to(root))] = content
    return contents


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("setting", OUTPUTS)
def test_what_align_did_not_make_is_refused_and_stays(setting: str, kind: str, tmp_path: Path) -> None:
    output = OUTPUTS[setting]
    path = tmp_path / output.name
    path.parent.mkdir(exist_ok=True)
    FOREIGN[kind](path)
    before = contents_of(tmp_path)
    if (kind, setting) in TAKEN_OVER:
        with at_once():
            output.write(path)
        after = contents_of(tmp_path)
        assert {name: after[name] for name in before} == before
        return
    with at_once(), pytest.raises(InputError) as refused:
        output.write(path)
    assert refused.value.exit_status == 2
    assert contents_of(tmp_path) == before
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize("kind", FOREIGN)
def test_the_lock_of_a_store_changes_nothing(kind: str, tmp_path: Path) -> None:
    FOREIGN[kind](tmp_path / "annotations.db.serving")
    before = contents_of(tmp_path)
    is_file = kind not in NOT_FILES and "folder" not in kind
    with at_once(), nullcontext() if is_file else pytest.raises(InputError):
        serve_store(tmp_path / "annotations.db.serving")
    after = contents_of(tmp_path)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("setting", sorted(name for name in FILES if not FILES[name].replaces))
def test_what_is_written_once_is_not_written_again(setting: str, tmp_path: Path) -> None:
    output = OUTPUTS[setting]
    output.write(tmp_path / output.name)
    before = contents_of(tmp_path)
    with pytest.raises(InputError):
        output.write(tmp_path / output.name)
    assert contents_of(tmp_path) == before


@pytest.mark.parametrize("setting", sorted(name for name in OUTPUTS if OUTPUTS[name].replaces))
def test_what_align_made_is_taken_again(setting: str, tmp_path: Path) -> None:
    output = OUTPUTS[setting]
    path = tmp_path / output.name
    path.parent.mkdir(exist_ok=True)
    output.write(path)
    first = contents_of(path.parent)
    output.write(path)
    assert contents_of(path.parent).keys() >= {name for name in first if not name.endswith(("-wal", "-shm"))}
    assert not [name for name in os.listdir(path.parent) if name.endswith((".part", ".old", ".tmp"))]


def test_a_folder_of_align_that_was_edited_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "llama.cpp"
    for edit in (
        lambda: (folder / HF).write_text("mine"),
        lambda: (folder / "mine.py").write_text(""),
        lambda: (folder / LORA).unlink(),
        lambda: (folder / "link").symlink_to(tmp_path),
    ):
        if folder.exists():
            shutil.rmtree(folder)
        unpack_test_archive(folder)
        edit()
        before = contents_of(tmp_path)
        with pytest.raises(InputError, match="did not write, or that were edited since"):
            unpack_test_archive(folder)
        assert contents_of(tmp_path) == before


@pytest.mark.parametrize("kind", ["text", "database", "cut database", "object"])
def test_a_file_in_the_place_of_the_index_is_renamed(kind: str, tmp_path: Path) -> None:
    path = tmp_path / INDEX
    FOREIGN[kind](path)
    before = path.read_bytes()
    with Index(tmp_path) as index:
        assert index.path == path
    aside = [name for name in os.listdir(tmp_path) if name.endswith(".aside")]
    assert [(tmp_path / name).read_bytes() for name in aside] == [before]
    with Index(tmp_path) as index:  # and once only
        assert index.path == path
    assert [name for name in os.listdir(tmp_path) if name.endswith(".aside")] == aside


@pytest.mark.parametrize("kind", NOT_FILES)
def test_what_is_no_file_in_the_place_of_the_index(kind: str, tmp_path: Path) -> None:
    FOREIGN[kind](tmp_path / INDEX)
    before = contents_of(tmp_path)
    with at_once(), suppress(InputError), Index(tmp_path) as index:
        assert index.path is None
    assert contents_of(tmp_path) == before


def test_a_run_that_failed_leaves_links_and_pipes_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with suppress(InputError), open_run(tmp_path / "runs") as run:
        run.begin("stage: sft\n")
        (run.folder / "data").symlink_to(tmp_path / "mine", target_is_directory=True)
        os.mkfifo(run.folder / "pipe")
        raise InputError("data.path", "x", "is wrong", "Mend it.")
    assert {"data", "pipe"} <= set(os.listdir(run.folder))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"


# Killed at any moment


def run_in_child(act: Callable[[], object]) -> int | None:
    """Run an act in a process of its own and return its exit code."""
    child = get_context("fork").Process(target=act)
    child.start()
    child.join()
    return child.exitcode


def kill_before_call(name: str, count: int, act: Callable[[], object]) -> Callable[[], object]:
    """Return an act during which the process kills itself before the given call of a function of `os`."""

    def run() -> None:
        real = getattr(os, name)
        calls = iter(range(count, -1, -1))

        def call(*args: object, **kwargs: object) -> object:
            if next(calls) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(os, name, call)
        act()

    return run


@pytest.mark.parametrize("name", ["open", "fsync", "replace", "unlink"])
def test_a_file_is_the_old_one_or_the_new_one_however_its_writer_is_killed(name: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    old = b"old" * 10_000
    new = b"new" * 10_000
    replace_file(path, old)
    assert run_in_child(kill_before_call(name, 0, lambda: replace_file(path, new))) in (-signal.SIGKILL, 0)
    assert path.read_bytes() in (old, new)
    replace_file(path, new)
    assert path.read_bytes() == new


def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_file(path, b"old")

    def fail_halfway() -> None:
        with open_atomic_file(path) as file:
            file.write(b"ne")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_halfway()
    assert contents_of(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize("count", range(3))
def test_a_folder_is_the_old_one_or_the_new_one_however_its_writer_is_killed(count: int, tmp_path: Path) -> None:
    folder = tmp_path / "base"

    def write(text: str) -> None:
        with publish_folder(folder, replace="base.json") as part:
            (part / "base.json").write_text(text)
            (part / "weights").write_text(text)

    write("old")
    run_in_child(kill_before_call("replace", count, lambda: write("new")))
    assert contents_of(folder) in [{"base.json": text, "weights": text} for text in (b"old", b"new")]
    write("new")
    assert contents_of(folder) == {"base.json": b"new", "weights": b"new"}
    assert os.listdir(tmp_path) == ["base"]
