"""Garbage collection finds and removes exactly the files that nothing needs."""

from __future__ import annotations

import fcntl
import json
import os
import random
import subprocess
import time
from hashlib import sha256
from pathlib import Path
from socket import gethostname
from typing import Any

import pytest
from synthetic_runs import compute_artifact_digest, write_run_folder

from align.core.errors import MissingArtifact
from align.registry.garbage import BY, LOG, Piece, as_lines, find_garbage, format_bytes, remove_pieces
from align.registry.index import query_index
from align.run import resolve
from align.run.alias_log import AliasTarget, append_change, read_alias_log
from align.run.artifacts import require_not_replaced

OLD = time.time() - 40 * 86400
NOBODY = 4_190_000
"""The id of a process that does not exist."""


def set_age(path: Path, at: float = OLD) -> Path:
    """Set the time of the last change of a file, or of a folder and all its contents. Returns the path."""
    for entry in [*(path.rglob("*") if path.is_dir() else []), path]:
        os.utime(entry, (at, at), follow_symlinks=False)
    return path


def write_old_run(root: Path, ref: str, inputs: dict[str, Any] | None = None, size: int = 1000, **known: Any) -> Path:
    """Write an old run with weights of its own. Returns its folder."""
    folder = write_run_folder(root, ref, inputs, **known)
    (folder / "artifact" / "adapter_model.safetensors").write_bytes(b"w" * size)
    (folder / "artifact" / "README.md").write_text("card")
    return set_age(folder)


def list_garbage(root: Path, days: float = 30.0) -> list[Piece]:
    return query_index(root, lambda index: find_garbage(index, read_alias_log(root), days))


def list_paths(root: Path, *kinds: str, days: float = 30.0) -> list[str]:
    return [piece.path for piece in list_garbage(root, days) if piece.kind in (kinds or ("artifacts",))]


def set_alias(root: Path, ref: str, name: str = "production") -> None:
    last = read_alias_log(root).last(name)
    append_change(
        root,
        name,
        [AliasTarget(ref, compute_artifact_digest(ref))],
        who="ann",
        why="so",
        replaces=last.seq if last else 0,
    )


def test_artifacts_that_a_later_run_superseded(tmp_path: Path) -> None:
    for day, name in enumerate("abcde"):
        write_old_run(tmp_path, f"ppo:{name}", {"init": "sft:s"}, day=day)
    write_old_run(tmp_path, "sft:s")
    write_old_run(tmp_path, "sft:t", day=9)
    assert list_paths(tmp_path) == [f"ppo/{name}/artifact" for name in "abcd"]  # `sft:s` has children
    set_alias(tmp_path, "ppo:a")
    set_alias(tmp_path, "ppo:e")  # a previous target of an alias may be restored
    write_run_folder(tmp_path, "export:x", {"artifact": "ppo:b"})
    write_run_folder(tmp_path, "eval:e", {"artifact": "ppo:c"})
    write_run_folder(tmp_path, "ppo:child", {"init": "ppo:d"}, status="running", day=20)
    assert list_paths(tmp_path) == ["ppo/c/artifact"]
    (tmp_path / "ppo" / "c" / "artifact" / "adapter_model.safetensors").touch()
    assert list_paths(tmp_path) == []  # it changed within the last day


def test_the_newest_is_that_of_a_base_and_a_stage(tmp_path: Path) -> None:
    manifest_path = write_run_folder(tmp_path, "sft:x").parent.parent / "sft" / "x" / "manifest.json"
    base = json.loads(manifest_path.read_text())["base"]
    for day, name in enumerate("ab"):
        write_old_run(tmp_path, f"ppo:{name}", day=day)
    from align.run.manifest import Base

    write_old_run(tmp_path, "ppo:elsewhere", day=5, base=Base(**{**base, "digest": "e" * 64}))
    write_old_run(tmp_path, "ppo:failed", day=7, status="failed")
    assert list_paths(tmp_path) == ["ppo/a/artifact"]


def test_checkpoints(tmp_path: Path) -> None:
    for name, status in (("done", "done"), ("failed", "failed"), ("cut", "interrupted"), ("recent", "failed")):
        folder = write_old_run(tmp_path, f"sft:{name}", status=status, digest="")
        (folder / "checkpoints" / "checkpoint-3").mkdir(parents=True)
        (folder / "checkpoints" / "checkpoint-3" / "state.safetensors").write_bytes(b"x" * 50)
        set_age(folder / "checkpoints", time.time() - 5 * 86400 if name == "recent" else OLD)
    assert list_paths(tmp_path, "checkpoints") == [f"sft/{name}/checkpoints" for name in ("cut", "done", "failed")]
    assert "sft/recent/checkpoints" in list_paths(tmp_path, "checkpoints", days=3)
    reasons = {piece.run: piece.why for piece in list_garbage(tmp_path) if piece.kind == "checkpoints"}
    assert reasons["sft:done"] == "its run is done"
    assert reasons["sft:cut"] == "its run was interrupted 40 days ago; without them it would start from the beginning"


def test_a_run_that_is_at_work_is_left_alone(tmp_path: Path) -> None:
    folder = write_old_run(tmp_path, "sft:busy", status="running", digest="")
    (folder / "checkpoints" / ".unfinished").mkdir(parents=True)
    set_age(folder)
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert list_paths(tmp_path, "checkpoints", "leftovers", days=0) == []
    os.close(lock)
    assert list_paths(tmp_path, "checkpoints", "leftovers", days=0) == [
        "sft/busy/checkpoints/.unfinished",
        "sft/busy/checkpoints",
    ]


def test_leftovers_of_processes_that_have_ended(tmp_path: Path) -> None:
    """Leftovers are removed if their process on this machine has ended, or after a day.

    Files whose names a user may have chosen stay.
    """
    folder = write_old_run(tmp_path, "sft:a")
    hostname = gethostname()
    abandoned = [
        f"sft/.b.{hostname}-{NOBODY}-0123abcd.part",
        f"sft/.b.{hostname}-{NOBODY}-0123abcd.old",
        f"sft/a/.report.html.{NOBODY}.part",
    ]
    foreign = ["sft/.b.elsewhere-12-0123abcd.part", "sft/a/.metrics.jsonl.tmp", "bases/.x.elsewhere-1-0123abcd.part"]
    unknown = [
        f"sft/.b.{hostname}-{os.getpid()}-0123abcd.part",
        ".notes.part",
        "sft/a/notes.tmp",
        ".env.old",
        "mine/.x.tmp",
    ]
    for name in (*abandoned, *foreign, *unknown):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    assert list_paths(tmp_path, "leftovers") == sorted(abandoned)
    for name in (*foreign, *unknown):
        set_age(tmp_path / name)
    expected = sorted([*abandoned, *foreign, unknown[0]])  # after a day its process id may be reused
    assert list_paths(tmp_path, "leftovers") == expected
    assert folder.is_dir()


def test_bases_that_no_export_links_to(tmp_path: Path) -> None:
    bases = tmp_path / "bases"
    for name in ("linked", "orphan", "recent", "shared", "alone", "thesis"):
        (bases / name).mkdir(parents=True)
        (bases / name / "model.safetensors").write_bytes(b"x" * (10 if name == "alone" else 100))
        if name != "thesis":  # a folder of the user
            (bases / name / "base.json").write_text("{}")
    (bases / "notes.txt").write_text("mine")
    export = write_old_run(tmp_path, "export:x", {"artifact": "ppo:a"}) / "artifact"
    (export / "pocket").symlink_to("../../../bases/linked", target_is_directory=True)
    (export / "model.safetensors").hardlink_to(bases / "shared" / "model.safetensors")
    for name in ("linked", "orphan", "shared", "alone", "thesis", "notes.txt"):
        set_age(bases / name)
    assert list_paths(tmp_path, "bases") == ["bases/orphan", "bases/alone"]
    (export / "pocket").unlink()
    assert list_paths(tmp_path, "bases") == ["bases/linked", "bases/orphan", "bases/alone"]


def hash_files(root: Path) -> dict[str, str]:
    """Hash every file below a folder, without the index and the log."""
    return {
        path.relative_to(root).as_posix(): sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file() and not path.name.startswith(".registry") and path.name != LOG
    }


def test_what_is_removed_is_what_was_listed_and_is_written_down(tmp_path: Path) -> None:
    for day, name in enumerate("abc"):
        write_old_run(tmp_path, f"ppo:{name}", day=day, size=100 * (day + 1))
    (tmp_path / "ppo" / "c" / "checkpoints").mkdir()
    (tmp_path / "ppo" / "c" / "checkpoints" / "x").write_bytes(b"1")
    set_age(tmp_path / "ppo" / "c" / "checkpoints")
    before = hash_files(tmp_path)
    pieces = list_garbage(tmp_path)
    assert [(piece.kind, piece.path, piece.bytes) for piece in pieces] == [
        ("checkpoints", "ppo/c/checkpoints", 1),
        ("artifacts", "ppo/b/artifact", 200),
        ("artifacts", "ppo/a/artifact", 100),
    ]
    assert all(removed for _, removed in remove_pieces(tmp_path, pieces, "ann"))
    after = hash_files(tmp_path)
    removed_files = {
        "ppo/c/checkpoints/x",
        "ppo/a/artifact/adapter_model.safetensors",
        "ppo/b/artifact/adapter_model.safetensors",
    }
    assert before.keys() - after.keys() == removed_files
    assert after.keys() - before.keys() == {"ppo/a/artifact/replaced.json", "ppo/b/artifact/replaced.json"}
    assert all(after[name] == before[name] for name in before.keys() & after.keys())
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert {name: size for line in lines for name, size in line["files"].items()} == {
        "ppo/c/checkpoints/x": 1,
        "ppo/a/artifact/adapter_model.safetensors": 100,
        "ppo/b/artifact/adapter_model.safetensors": 200,
    }
    assert {line["who"] for line in lines} == {"ann"}
    assert list_garbage(tmp_path) == []
    with pytest.raises(MissingArtifact, match=f"was removed by {BY} at .*: ppo:c is later"):
        require_not_replaced(tmp_path / "ppo" / "a" / "artifact", "artifact")
    with pytest.raises(MissingArtifact, match="was removed by"):
        resolve("ppo:a", tmp_path)


def test_a_run_that_began_to_work_meanwhile_keeps_all(tmp_path: Path) -> None:
    for day, name in enumerate("ab"):
        write_old_run(tmp_path, f"ppo:{name}", day=day)
    pieces = list_garbage(tmp_path)
    holder = subprocess.Popen(["flock", str(tmp_path / "ppo" / "a"), "sleep", "30"])
    try:
        while not [line for line in Path("/proc/locks").read_text().splitlines() if f" {holder.pid} " in line]:
            time.sleep(0.02)
        before = hash_files(tmp_path)
        outcomes = list(remove_pieces(tmp_path, pieces, "ann"))
        assert [removed for _, removed in outcomes] == [False]
        assert hash_files(tmp_path) == before
    finally:
        holder.kill()
        holder.wait()
    assert "in use" in "\n".join(as_lines(pieces, {piece.path: removed for piece, removed in outcomes}))


def test_no_portfolio_loses_what_it_needs(tmp_path: Path) -> None:
    """Check the definition on random portfolios: all targets of aliases, parents and the newest runs stay."""
    for seed in range(12):
        rng = random.Random(seed)
        root = tmp_path / str(seed)
        refs: list[str] = []
        needed: set[str] = set()
        for day in range(rng.randint(2, 14)):
            stage = rng.choice(["sft", "ppo", "reward", "export", "eval"])
            source = rng.choice(refs) if refs and rng.random() < 0.6 else None
            status = rng.choice(["done", "done", "done", "failed", "running"])
            ref = f"{stage}:{day}"
            input_name = "artifact" if stage in ("export", "eval") else "init"
            write_old_run(root, ref, {input_name: source} if source else None, day=day, status=status)
            if source and stage != "eval":
                needed.add(source)
            if stage in ("sft", "ppo", "reward") and status == "done":
                refs.append(ref)
        for ref in rng.sample(refs, min(len(refs), 2)):
            set_alias(root, ref)
            needed.add(ref)
        newest = {ref.partition(":")[0]: ref for ref in refs}
        expected = {ref for ref in refs if ref not in needed and ref not in newest.values()}
        assert {piece.run for piece in list_garbage(root) if piece.kind == "artifacts"} == expected, seed


def test_sizes_in_words() -> None:
    sizes = {0: "0 B", 999: "999 B", 1500: "1.5 kB", 12_345_678: "12.3 MB", 3_200_000_000: "3.2 GB"}
    assert {size: format_bytes(size) for size in sizes} == sizes
