"""A run's folder: its name, and its state after a crash, an interruption or a full disk."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from run_folders import BASE, INPUTS, build_run_config, load_manifest, open_run, publish_run

from align.core.errors import MissingArtifact, RunBusy, RunConflict, StorageError
from align.run import Input, as_storage_error, file_digest, folder_digest, is_out_of_memory, json_digest, write_json
from align.run.environment import read_git_state, read_own_commit
from align.run.files import find_user_error
from align.run.folder import find_first_difference
from align.run.manifest import compute_identity

# --- Digests and files


def test_digests_by_hand(tmp_path: Path):
    # sha256 of "abc", FIPS 180-2, appendix B.1
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "a.txt").write_text("abc")
    assert file_digest(tmp_path / "a.txt") == abc
    assert json_digest({"b": 1, "a": 2}) == json_digest({"a": 2, "b": 1}) != json_digest({"a": 1, "b": 2})
    assert folder_digest(tmp_path) == json_digest([["a.txt", abc]])


def test_a_folder_digest_sees_names_contents_and_patterns_only(tmp_path: Path):
    (tmp_path / "a.txt").write_text("abc")
    before = folder_digest(tmp_path, ("*.txt", "a*"))
    (tmp_path / "notes.md").write_text("x")
    assert folder_digest(tmp_path, ("a*", "*.txt")) == before
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert folder_digest(tmp_path, ("*.txt",)) != before


def test_a_failed_write_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "m.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


# --- Identity


def test_the_same_command_lands_in_the_same_folder(tmp_path: Path):
    with open_run(tmp_path) as run:
        first = run.folder
    assert first == tmp_path / "sft" / f"tiny-qlora-{first.name[-8:]}"
    with open_run(tmp_path, resume="auto", track={"name": "wandb"}) as run:
        assert run.folder == first
    with open_run(tmp_path, seed=1) as run:
        assert run.folder != first
    with open_run(tmp_path, inputs={"data": Input("d2", path="a.jsonl")}) as run:
        assert run.folder != first


def test_identity_ignores_where_and_how_it_is_watched(tmp_path: Path):
    settings = build_run_config(tmp_path, "x")
    moved_settings = build_run_config(tmp_path / "b", "y", resume="never", track={"name": "wandb"})
    assert compute_identity("sft", settings, INPUTS, BASE) == compute_identity("sft", moved_settings, INPUTS, BASE)
    assert compute_identity("sft", settings, INPUTS, BASE) != compute_identity(
        "sft", settings | {"seed": 1}, INPUTS, BASE
    )


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ({"a": {"b": 1}}, {"a": {"b": 2}}, ("a.b", 1, 2)),
        ({"a": 1}, {"a": 1, "b": 2}, ("b", "(missing)", 2)),
        ({"a": [1]}, {"a": [1]}, None),
    ],
)
def test_first_difference(old: Any, new: Any, found: Any):
    assert find_first_difference(old, new) == found


# --- Life of a run


def test_publish_hashes_every_output_and_only_then_says_done(tmp_path: Path):
    with open_run(tmp_path, "x") as run:
        run.begin("a: 1\n")
        assert load_manifest(run.folder)["status"] == "running"
        (run.checkpoints / "big").write_text("x")
        (run.artifact / "sub").mkdir()
        (run.artifact / "sub" / "w").write_text("abc")
        (run.folder / "report.html").write_text("<p>")
        run.publish({"loss": 1.5})
    manifest = load_manifest(run.folder)
    assert manifest["status"] == "done"
    assert manifest["metrics"] == {"loss": 1.5}
    assert manifest["outputs"] == {
        "artifact/sub/w": file_digest(run.artifact / "sub" / "w"),
        "config.yaml": file_digest(run.folder / "config.yaml"),
        "metrics.json": file_digest(run.folder / "metrics.json"),
        "report.html": file_digest(run.folder / "report.html"),
    }
    names = ["artifact", "config.yaml", "manifest.json", "metrics.json", "report.html"]
    assert sorted(p.name for p in run.folder.iterdir()) == names
    assert {"git", "hardware", "identity", "inputs", "base", "packages", "schema_version", "seed"} <= manifest.keys()
    assert manifest["inputs"] == {"data": {"path": "a.jsonl", "digest": "d1"}}
    assert manifest["base"]["digest"] == BASE.digest


def test_a_published_run_is_returned_and_never_touched(tmp_path: Path):
    folder = publish_run(tmp_path, "x")
    before = (folder / "manifest.json").read_bytes()
    run = open_run(tmp_path, "x")
    assert (run.done, run.resumed) == (True, False)
    with pytest.raises(KeyboardInterrupt), run:
        raise KeyboardInterrupt
    assert (folder / "manifest.json").read_bytes() == before


def test_checkpoints_that_a_kill_left_behind_a_done_run_go(tmp_path: Path):
    folder = publish_run(tmp_path, "x")
    (folder / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    with open_run(tmp_path, "x") as run:
        assert run.done
    assert not (folder / "checkpoints").exists()


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), "interrupted"), (ValueError("x"), "failed")])
def test_an_unfinished_run_says_why_and_is_continued(tmp_path: Path, error: BaseException, status: str):
    run = open_run(tmp_path, "x")
    run.begin("a: 1\n")
    (run.checkpoints / "c").write_text("kept")
    with pytest.raises(type(error)), run:
        raise error
    assert load_manifest(run.folder)["status"] == status
    began = load_manifest(run.folder)["times"]["started"]
    with open_run(tmp_path, "x") as resumed_run:
        assert resumed_run.resumed
        assert (resumed_run.checkpoints / "c").read_text() == "kept"
        resumed_run.begin("a: 1\n")
        resumed_run.publish({})
    manifest = load_manifest(run.folder)
    assert manifest["times"]["first_started"] == began
    assert "error" not in manifest


def test_a_crash_leaves_a_folder_that_is_continued(tmp_path: Path):
    script = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from run_folders import open_run
run = open_run(Path({str(tmp_path)!r}), "x")
run.begin("a: 1")
(run.checkpoints / "c").write_text("kept")
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=False).returncode == 9
    assert load_manifest(tmp_path / "sft" / "x")["status"] == "running"
    with open_run(tmp_path, "x") as run:
        assert run.resumed
        assert (run.checkpoints / "c").read_text() == "kept"


def test_resume_never_makes_a_new_folder_beside(tmp_path: Path):
    folder = publish_run(tmp_path, "x")
    for expected in ("x-2", "x-3"):
        with open_run(tmp_path, "x", resume="never") as run:
            assert (run.folder.name, run.done, run.resumed) == (expected, False, False)
    assert load_manifest(folder)["status"] == "done"


def test_resume_must_refuses_to_start_afresh(tmp_path: Path):
    with pytest.raises(MissingArtifact, match="no run to continue"):
        open_run(tmp_path, "x", resume="must")
    assert not (tmp_path / "sft").exists()
    publish_run(tmp_path, "x")
    with open_run(tmp_path, "x", resume="must") as run:
        assert run.done


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"seed": 1}, "seed", 1),
        ({"stage": {"name": "sft", "lr": 0.2}}, "stage.lr", 0.2),
        ({"inputs": {"data": Input("d2")}}, "inputs.data", "d2"),
    ],
)
def test_one_name_for_two_configurations_is_refused(tmp_path: Path, changes: dict, key: str, value: Any):
    folder = publish_run(tmp_path, "x")
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(RunConflict) as caught:
        open_run(tmp_path, "x", **changes)
    assert (caught.value.field, caught.value.value) == (key, value)
    assert (folder / "manifest.json").read_bytes() == before
    with open_run(tmp_path, "x") as run:  # the refusal let go of the lock
        assert run.done


def fail_after_writing(root: Path, file_name: str) -> None:
    """Start a run, write one file into its folder, and raise ValueError."""
    with open_run(root, "x") as run:
        run.begin("a: 1")
        path = run.folder / file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if file_name == "artifact/empty" else "{}")
        raise ValueError("a broken row")


@pytest.mark.parametrize("made", ["log.txt", "artifact/empty"])
def test_a_run_that_failed_before_it_made_anything_gives_its_name_back(tmp_path: Path, made: str):
    with pytest.raises(ValueError, match="a broken row"):
        fail_after_writing(tmp_path, made)
    with open_run(tmp_path, "x", inputs={"data": Input("d2")}) as run:
        assert not run.resumed
        assert list(run.folder.iterdir()) == []
        run.begin("a: 2")
        run.publish({})
    assert load_manifest(run.folder)["identity"]["inputs"] == {"data": "d2"}


@pytest.mark.parametrize("made", ["metrics.jsonl", "artifact/a", "checkpoints/c/a"])
def test_a_run_that_failed_later_keeps_its_name(tmp_path: Path, made: str):
    with pytest.raises(ValueError, match="a broken row"):
        fail_after_writing(tmp_path, made)
    with pytest.raises(RunConflict):
        open_run(tmp_path, "x", inputs={"data": Input("d2")})
    assert (tmp_path / "sft" / "x" / made).read_text() == "{}"


@pytest.mark.parametrize("end", ["interrupted", "running", "done"])
def test_a_run_that_did_not_fail_keeps_its_name_whatever_it_made(tmp_path: Path, end: str):
    with suppress(KeyboardInterrupt), open_run(tmp_path, "x") as run:
        run.begin("a: 1")
        if end == "done":
            run.publish({})
        elif end == "interrupted":
            raise KeyboardInterrupt
    assert load_manifest(run.folder)["status"] == end
    before = (run.folder / "manifest.json").read_bytes()
    with pytest.raises(RunConflict):
        open_run(tmp_path, "x", inputs={"data": Input("d2")})
    assert (run.folder / "manifest.json").read_bytes() == before


def test_a_second_process_is_refused_until_the_first_ends(tmp_path: Path):
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from run_folders import open_run
with open_run(Path({str(tmp_path)!r}), "x") as run:
    run.begin("a: 1")
    print("held", flush=True)
    sys.stdin.read()
"""
    child = subprocess.Popen(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    with pytest.raises(RunBusy, match="another process"):
        open_run(tmp_path, "x")
    with open_run(tmp_path, "y"):
        pass
    child.kill()
    child.wait()
    child.stdin.close()
    child.stdout.close()
    with open_run(tmp_path, "x") as run:
        assert run.resumed


@pytest.mark.parametrize("name", ["x", "n" * 300])
def test_a_root_that_cannot_be_written(tmp_path: Path, name: str):
    (tmp_path / "file").write_text("not a folder")
    root = tmp_path if len(name) > 255 else tmp_path / "file" / "runs"
    for resume in ("auto", "never"):
        with pytest.raises(StorageError, match="cannot be written") as caught:
            open_run(root, name, resume=resume)
        assert caught.value.field == "run.root"
    with open_run(tmp_path, "x"):
        pass


def test_a_full_disk_hides_nothing_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def raise_disk_full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    folder = publish_run(tmp_path, "x")
    run = open_run(tmp_path, "y")
    run.begin("a: 1\n")
    with monkeypatch.context() as patched:
        patched.setattr("align.run.files.write_text", raise_disk_full)
        with pytest.raises(OSError, match="No space left"), run:
            run.publish({})
    assert load_manifest(folder)["status"] == "done"
    assert load_manifest(run.folder)["status"] == "running"
    with open_run(tmp_path, "y") as resumed_run:
        assert resumed_run.resumed


@pytest.mark.parametrize(
    ("error", "blamed"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/w"), True),
        (OSError(errno.EFBIG, "File too large"), True),
        (PermissionError(errno.EACCES, "Permission denied"), True),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 204224 vs 204116"), True),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_which_errors_are_the_disks(error: Exception, blamed: bool):
    storage_error = as_storage_error(error, "runs")
    assert (storage_error is not None) == blamed
    if storage_error:
        assert (storage_error.exit_status, storage_error.field, storage_error.value) == (2, "run.root", "runs")


ALLOCATION = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9437184 bytes. Error code 12"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (RuntimeError(f"[enforce fail at alloc_cpu.cpp:127] err == 0. {ALLOCATION} (Cannot allocate memory)"), True),
        (RuntimeError("unable to mmap 88 bytes from file </x/model.safetensors>: Cannot allocate memory (12)"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a memory object"), True),
        (RuntimeError("could not execute a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for the matmul primitive"), False),
        (RuntimeError("could not create a memory descriptor"), False),
        (RuntimeError("shape mismatch"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
    ],
)
def test_which_errors_are_of_too_little_memory(error: Exception, expected: bool, tmp_path: Path):
    assert is_out_of_memory(error) == expected
    wrapped = ValueError("the library failed")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped) == expected
    user_error = find_user_error(error, str(tmp_path))
    if expected:
        assert user_error is not None
        assert (user_error.exit_status, user_error.field) == (2, "memory")
        assert "stage.micro_batch" in user_error.remedy
    else:
        assert user_error is None or user_error.field != "memory"


def test_what_caused_an_error_counts_when_the_disk_is_full_only():
    def build_chained_error(cause: OSError) -> RuntimeError:
        try:
            try:
                raise cause
            except OSError:
                raise RuntimeError("library failed")  # noqa: B904
        except RuntimeError as error:
            return error

    assert as_storage_error(build_chained_error(OSError(errno.ENOSPC, "full")), "runs")
    assert (
        as_storage_error(build_chained_error(PermissionError(errno.EACCES, "a cache that is not ours")), "runs") is None
    )


# --- Git


def test_git_state_holds_a_difference_of_any_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert read_git_state() is None

    def git(*arguments: str) -> None:
        author = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        subprocess.run(["git", *author, *arguments], check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "a.txt").write_text("one\n")
    git("add", "a.txt")
    git("commit", "-qm", "first")
    state = read_git_state()
    assert state is not None
    assert set(state) == {"commit"}
    (tmp_path / "a.txt").write_bytes(b"caf\xe9\n")  # Latin-1, no UTF-8
    state = read_git_state()
    assert state is not None
    assert "+caf�" in state["diff"]


def test_the_commit_is_that_of_the_code_and_of_no_checkout_around_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def git(*arguments: str) -> str:
        author = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        process = subprocess.run(["git", "-C", str(tmp_path), *author, *arguments], check=True, capture_output=True)
        return process.stdout.decode().strip()

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    for name in ("align", "venv/align"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.py").write_text("a = 1\n")
    assert read_own_commit(tmp_path) == ""
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    head = git("rev-parse", "HEAD")
    assert read_own_commit(tmp_path) == head
    assert read_own_commit(tmp_path / "venv") == ""  # installed below another repository
    (tmp_path / "notes.md").write_text("no code")
    assert read_own_commit(tmp_path) == head
    (tmp_path / "align" / "b.py").write_text("b = 2\n")
    assert read_own_commit(tmp_path) == f"{head}+"


def test_the_lock_is_not_inherited(tmp_path: Path):
    with open_run(tmp_path, "x") as run:
        assert not os.get_inheritable(run._lock)
