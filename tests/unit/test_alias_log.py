"""The log of the aliases: what it says, and that nobody alters it unnoticed."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from align.core.errors import CorruptFile, InputError, RunConflict
from align.run import alias_log
from align.run.alias_log import FILE, AliasTarget, Change, append_change, describe_arms, read_log


def changed(root: Path, alias: str, *refs: str, replaces: int | None = None, why: str = "so", **more: Any) -> Change:
    last = None if replaces is not None else read_log(root).last(alias)
    seq = (last.seq if last else 0) if replaces is None else replaces
    return append_change(
        root, alias, [AliasTarget(ref, f"{ref}-digest") for ref in refs], who="ann", why=why, replaces=seq, **more
    )


def three(root: Path) -> Path:
    changed(root, "production", "ppo:a")
    changed(root, "canary", "ppo:b")
    changed(root, "production", "ppo:c", "ppo:d", gates=[{"gate": "g", "findings": [{"passed": True}]}])
    return root / FILE


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_log(tmp_path).changes == ()
    three(tmp_path)
    log = read_log(tmp_path)
    assert [(c.seq, c.alias, [arm.ref for arm in c.arms], c.replaces) for c in log.changes] == [
        (1, "production", ["ppo:a"], 0),
        (2, "canary", ["ppo:b"], 0),
        (3, "production", ["ppo:c", "ppo:d"], 1),
    ]
    assert log.changes[2].gates == ({"gate": "g", "findings": [{"passed": True}]},)
    assert {alias: change.seq for alias, change in log.standing().items()} == {"canary": 2, "production": 3}
    assert log.head.seq == 3
    changed(tmp_path, "canary")
    assert [*read_log(tmp_path).standing()] == ["production"]
    assert read_log(tmp_path).last("canary") == read_log(tmp_path).changes[3]


def test_every_value_of_every_line_is_held_by_the_chain(tmp_path: Path) -> None:
    """Whatever is altered, removed, added or moved is found, wherever it stands before the end."""
    path = three(tmp_path)
    lines = path.read_text().splitlines()
    broken = [[*lines[:i], *lines[i + 1 :]] for i in range(2)] + [[lines[1], lines[0], lines[2]], [lines[0], *lines]]
    for i, line in enumerate(lines):
        found = json.loads(line)
        for key, value in found.items():
            other = value + {int: 1, str: "0", list: [{"ref": "x", "digest": "y", "weight": 1}]}[type(value)]
            altered = json.dumps({**found, key: other})
            broken.append([*lines[:i], altered, *lines[i + 1 :]])
            broken.append([*lines[:i], json.dumps({k: v for k, v in found.items() if k != key}), *lines[i + 1 :]])
    assert len(broken) == 4 + 3 * 2 * 12
    for some in broken:
        path.write_text("".join(line + "\n" for line in some))
        with pytest.raises(InputError, match=f"{FILE}, line"):
            read_log(tmp_path)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"\xff\xfe", "is no line of JSON in UTF-8"), (b"", "is no line of JSON"), (b"[1]", "is no change of an alias"),
        (b"[" * 5000, "is no line of JSON"), (b'{"schema_version": 2}', "this version of align reads 1"),
        (b'{"schema_version": 1, "seq": 4}', "is no change of an alias"),
    ],
    ids=["bytes", "empty", "a list", "deep", "future", "half"],
)  # fmt: skip
def test_a_line_that_is_none(tmp_path: Path, line: bytes, says: str) -> None:
    path = three(tmp_path)
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(InputError, match=says) as raised:
        read_log(tmp_path)
    assert "line 4" in raised.value.field


def test_a_time_that_is_none_is_refused(tmp_path: Path) -> None:
    path = three(tmp_path)
    for at in ("yesterday", "2026-11-01T00:00:00"):
        path.write_text(json.dumps({**json.loads(path.read_text().splitlines()[0]), "at": at}) + "\n")
        with pytest.raises(CorruptFile, match="is no change of an alias"):
            read_log(tmp_path)


def test_what_was_cut_off_while_it_was_written_is_no_change(tmp_path: Path) -> None:
    """Nobody was told of it; the next one takes its place."""
    path = three(tmp_path)
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for end in range(2, len(last)):
        path.write_bytes(whole[: len(whole) - end])
        assert len(read_log(tmp_path).changes) == 2
    assert changed(tmp_path, "production", "ppo:e").seq == 3
    assert [c.arms[0].ref for c in read_log(tmp_path).changes] == ["ppo:a", "ppo:b", "ppo:e"]


def test_a_last_line_break_that_is_lost_costs_no_change(tmp_path: Path) -> None:
    """A whole change counts, if it goes on with the chain; the next one stands on a line of its own."""
    path = three(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert len(read_log(tmp_path).changes) == 3
    assert changed(tmp_path, "production", "ppo:e").seq == 4
    assert path.read_bytes().startswith(whole)
    assert len(read_log(tmp_path).changes) == 4
    path.write_bytes(whole + whole.splitlines()[0])
    with pytest.raises(CorruptFile, match="line 4"):
        read_log(tmp_path)
    path.write_bytes(whole.replace(b"\n", b"\r"))
    with pytest.raises(CorruptFile, match="line 1"):
        read_log(tmp_path)
    assert path.read_bytes() == whole.replace(b"\n", b"\r")


def test_what_no_change_holds(tmp_path: Path) -> None:
    """Values that JSON writes and no reader of ours does, in a chain that was computed anew."""
    path = three(tmp_path)
    first = json.loads(path.read_text().splitlines()[0])
    arm = first["arms"][0]
    for odd in ({"arms": [{**arm, "weight": w}]} for w in (math.nan, math.inf, 0, -1, True, "1")):
        path.write_text(json.dumps({**first, **odd}) + "\n")
        with pytest.raises(CorruptFile, match="is no"):
            read_log(tmp_path)
    path.write_text(json.dumps(first).replace('"weight": 1.0', '"weight": 1e999') + "\n")
    with pytest.raises(CorruptFile, match="is no change"):
        read_log(tmp_path)
    for odd in ({"gates": [1]}, {"gates": ["ab"]}, {"gates": [{"a": math.nan}]}, {"who": "\ud800"}):
        path.write_text(json.dumps({**first, **odd}) + "\n")
        with pytest.raises(CorruptFile, match="is no"):
            read_log(tmp_path)


def test_a_log_that_would_be_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FILE)
    with pytest.raises(CorruptFile, match=r"is a pipe \(FIFO\), not a file"):
        read_log(tmp_path)
    with pytest.raises(CorruptFile, match=r"is a pipe \(FIFO\), not a file"):
        changed(tmp_path, "production", "ppo:a", replaces=0)


def test_a_log_that_lost_its_end_since_it_was_looked_at(tmp_path: Path) -> None:
    three(tmp_path).unlink()
    with pytest.raises(CorruptFile, match="lost its end"):
        changed(tmp_path, "production", "ppo:a", replaces=3)


def test_who_looked_too_early_is_told_what_it_lost_to(tmp_path: Path) -> None:
    changed(tmp_path, "production", "ppo:a", why="the first")
    with pytest.raises(RunConflict, match=r"changed meanwhile by ann at .*: it means ppo:a .*\(the first\)"):
        changed(tmp_path, "production", "ppo:b", replaces=0)
    changed(tmp_path, "other", "ppo:b", replaces=0)  # another alias is nobody's loss
    changed(tmp_path, "production", why="no more")
    with pytest.raises(RunConflict, match=r"it means nothing: it was retired \(no more\)"):
        changed(tmp_path, "production", "ppo:b", replaces=1)
    assert len(read_log(tmp_path).changes) == 3


def race(root: Path, i: int, barrier: Any, won: Any) -> None:
    barrier.wait()
    for _ in range(50):
        last = read_log(root).last("a")
        try:
            append_change(
                root, "a", [AliasTarget(f"ppo:{i}", "d")], who=str(i), why="race", replaces=last.seq if last else 0
            )
            won.put(i)
        except RunConflict:
            pass


def test_many_processes_at_once(tmp_path: Path) -> None:
    """Each change that was acknowledged is there, and each goes by the one before it."""
    context = multiprocessing.get_context("fork")
    barrier, won = context.Barrier(4), context.Queue()
    workers = [context.Process(target=race, args=(tmp_path, i, barrier, won)) for i in range(4)]
    for worker in workers:
        worker.start()
    counts: list[int] = []
    while any(worker.is_alive() for worker in workers) or not won.empty():
        while not won.empty():
            counts.append(won.get())
    for worker in workers:
        worker.join()
    log = read_log(tmp_path)
    assert sorted(counts) == sorted(int(change.who) for change in log.changes)
    assert len(log.changes) >= 50
    assert [change.replaces for change in log.changes] == [*range(len(log.changes))]


def test_a_clock_that_is_set_back_does_not_turn_time_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an alias meant at a time goes by the order of the changes."""
    times = [datetime(2026, 11, day, tzinfo=UTC) for day in (10, 3, 12)]

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return times.pop(0)

    monkeypatch.setattr(alias_log, "datetime", Clock)
    for name in "abc":
        changed(tmp_path, "production", f"ppo:{name}")
    monkeypatch.undo()
    log = read_log(tmp_path)
    assert [change.at[:10] for change in log.changes] == ["2026-11-10", "2026-11-10", "2026-11-12"]

    def meant(day: int) -> list[str]:
        at = datetime(2026, 11, day, tzinfo=UTC)
        return [arm.ref for change in log.standing(at).values() for arm in change.arms]

    assert [meant(day) for day in (9, 10, 11, 12)] == [[], ["ppo:b"], ["ppo:b"], ["ppo:c"]]
    assert log.standing(datetime.fromisoformat(log.changes[0].at) - timedelta(microseconds=1)) == {}


def test_a_log_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(CorruptFile, match="is a folder, not a file"):
        read_log(tmp_path)
    if os.geteuid():  # the superuser may write anywhere
        (tmp_path / FILE).rmdir()
        tmp_path.chmod(0o500)
        with pytest.raises(PermissionError):
            changed(tmp_path, "production", "ppo:a")
        tmp_path.chmod(0o700)


def test_in_words() -> None:
    arms = [AliasTarget("ppo:a", "0123456789abcdef", 3.0), AliasTarget("ppo:b", "f" * 64)]
    assert describe_arms(arms) == "0.75 of ppo:a (0123456789ab), 0.25 of ppo:b (ffffffffffff)"
    assert (describe_arms(arms[:1]), describe_arms([])) == ("ppo:a (0123456789ab)", "")
