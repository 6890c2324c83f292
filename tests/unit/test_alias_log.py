"""The log of the aliases: reading, appending, and detection of altered lines."""

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
from align.run.alias_log import FILE, AliasTarget, Change, append_change, describe_arms, read_alias_log


def write_change(
    root: Path, alias: str, *refs: str, replaces: int | None = None, why: str = "so", **options: Any
) -> Change:
    previous = None if replaces is not None else read_alias_log(root).last(alias)
    seq = (previous.seq if previous else 0) if replaces is None else replaces
    return append_change(
        root, alias, [AliasTarget(ref, f"{ref}-digest") for ref in refs], who="ann", why=why, replaces=seq, **options
    )


def write_three_changes(root: Path) -> Path:
    write_change(root, "production", "ppo:a")
    write_change(root, "canary", "ppo:b")
    write_change(root, "production", "ppo:c", "ppo:d", gates=[{"gate": "g", "findings": [{"passed": True}]}])
    return root / FILE


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_alias_log(tmp_path).changes == ()
    write_three_changes(tmp_path)
    log = read_alias_log(tmp_path)
    assert [(c.seq, c.alias, [arm.ref for arm in c.arms], c.replaces) for c in log.changes] == [
        (1, "production", ["ppo:a"], 0),
        (2, "canary", ["ppo:b"], 0),
        (3, "production", ["ppo:c", "ppo:d"], 1),
    ]
    assert log.changes[2].gates == ({"gate": "g", "findings": [{"passed": True}]},)
    assert {alias: change.seq for alias, change in log.get_current_changes().items()} == {"canary": 2, "production": 3}
    assert log.head.seq == 3
    write_change(tmp_path, "canary")
    assert [*read_alias_log(tmp_path).get_current_changes()] == ["production"]
    assert read_alias_log(tmp_path).last("canary") == read_alias_log(tmp_path).changes[3]


def test_every_value_of_every_line_is_held_by_the_chain(tmp_path: Path) -> None:
    """Every value that is altered, removed, added or moved before the log's end is detected."""
    path = write_three_changes(tmp_path)
    lines = path.read_text().splitlines()
    altered_logs = [[*lines[:i], *lines[i + 1 :]] for i in range(2)] + [
        [lines[1], lines[0], lines[2]],
        [lines[0], *lines],
    ]
    for i, line in enumerate(lines):
        change = json.loads(line)
        for key, value in change.items():
            new_value = value + {int: 1, str: "0", list: [{"ref": "x", "digest": "y", "weight": 1}]}[type(value)]
            altered_line = json.dumps({**change, key: new_value})
            altered_logs.append([*lines[:i], altered_line, *lines[i + 1 :]])
            altered_logs.append(
                [*lines[:i], json.dumps({k: v for k, v in change.items() if k != key}), *lines[i + 1 :]]
            )
    assert len(altered_logs) == 4 + 3 * 2 * 12
    for altered_lines in altered_logs:
        path.write_text("".join(line + "\n" for line in altered_lines))
        with pytest.raises(InputError, match=f"{FILE}, line"):
            read_alias_log(tmp_path)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"\xff\xfe", "is no line of JSON in UTF-8"),
        (b"", "is no line of JSON"),
        (b"[1]", "is no record of an alias change"),
        (b"[" * 5000, "is no line of JSON"),
        (b'{"schema_version": 2}', "this version of align reads 1"),
        (b'{"schema_version": 1, "seq": 4}', "is no record of an alias change"),
    ],
    ids=["bytes", "empty", "a list", "deep", "future", "half"],
)
def test_a_line_that_is_none(tmp_path: Path, line: bytes, says: str) -> None:
    path = write_three_changes(tmp_path)
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(InputError, match=says) as raised:
        read_alias_log(tmp_path)
    assert "line 4" in raised.value.field


def test_a_time_that_is_none_is_refused(tmp_path: Path) -> None:
    path = write_three_changes(tmp_path)
    for at in ("yesterday", "2026-11-01T00:00:00"):
        path.write_text(json.dumps({**json.loads(path.read_text().splitlines()[0]), "at": at}) + "\n")
        with pytest.raises(CorruptFile, match="is no record of an alias change"):
            read_alias_log(tmp_path)


def test_what_was_cut_off_while_it_was_written_is_no_change(tmp_path: Path) -> None:
    """A change that was cut off was never acknowledged. The next change replaces it."""
    path = write_three_changes(tmp_path)
    content = path.read_bytes()
    last_line = content.splitlines(keepends=True)[-1]
    for end in range(2, len(last_line)):
        path.write_bytes(content[: len(content) - end])
        assert len(read_alias_log(tmp_path).changes) == 2
    assert write_change(tmp_path, "production", "ppo:e").seq == 3
    assert [c.arms[0].ref for c in read_alias_log(tmp_path).changes] == ["ppo:a", "ppo:b", "ppo:e"]


def test_a_last_line_break_that_is_lost_costs_no_change(tmp_path: Path) -> None:
    """A complete last change counts if it continues the chain. The next change gets a line of its own."""
    path = write_three_changes(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert len(read_alias_log(tmp_path).changes) == 3
    assert write_change(tmp_path, "production", "ppo:e").seq == 4
    assert path.read_bytes().startswith(content)
    assert len(read_alias_log(tmp_path).changes) == 4
    path.write_bytes(content + content.splitlines()[0])
    with pytest.raises(CorruptFile, match="line 4"):
        read_alias_log(tmp_path)
    path.write_bytes(content.replace(b"\n", b"\r"))
    with pytest.raises(CorruptFile, match="line 1"):
        read_alias_log(tmp_path)
    assert path.read_bytes() == content.replace(b"\n", b"\r")


def test_what_no_change_holds(tmp_path: Path) -> None:
    """Values that Python's JSON can write are refused if a change cannot hold them."""
    path = write_three_changes(tmp_path)
    first_change = json.loads(path.read_text().splitlines()[0])
    arm = first_change["arms"][0]
    for changes in ({"arms": [{**arm, "weight": w}]} for w in (math.nan, math.inf, 0, -1, True, "1")):
        path.write_text(json.dumps({**first_change, **changes}) + "\n")
        with pytest.raises(CorruptFile, match="is no"):
            read_alias_log(tmp_path)
    path.write_text(json.dumps(first_change).replace('"weight": 1.0', '"weight": 1e999') + "\n")
    with pytest.raises(CorruptFile, match="is no record"):
        read_alias_log(tmp_path)
    for changes in ({"gates": [1]}, {"gates": ["ab"]}, {"gates": [{"a": math.nan}]}, {"who": "\ud800"}):
        path.write_text(json.dumps({**first_change, **changes}) + "\n")
        with pytest.raises(CorruptFile, match="is no"):
            read_alias_log(tmp_path)


def test_a_log_that_would_be_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FILE)
    with pytest.raises(CorruptFile, match=r"is a pipe \(FIFO\), not a file"):
        read_alias_log(tmp_path)
    with pytest.raises(CorruptFile, match=r"is a pipe \(FIFO\), not a file"):
        write_change(tmp_path, "production", "ppo:a", replaces=0)


def test_a_log_that_lost_its_end_since_it_was_looked_at(tmp_path: Path) -> None:
    write_three_changes(tmp_path).unlink()
    with pytest.raises(CorruptFile, match="was cut at its end"):
        write_change(tmp_path, "production", "ppo:a", replaces=3)


def test_who_looked_too_early_is_told_what_it_lost_to(tmp_path: Path) -> None:
    write_change(tmp_path, "production", "ppo:a", why="the first")
    with pytest.raises(RunConflict, match=r"changed in the meantime by ann at .*: it points at ppo:a .*\(the first\)"):
        write_change(tmp_path, "production", "ppo:b", replaces=0)
    write_change(tmp_path, "other", "ppo:b", replaces=0)  # changes of another alias do not conflict
    write_change(tmp_path, "production", why="no more")
    with pytest.raises(RunConflict, match=r"it points at no artifact: it was retired \(no more\)"):
        write_change(tmp_path, "production", "ppo:b", replaces=1)
    assert len(read_alias_log(tmp_path).changes) == 3


def append_in_race(root: Path, number: int, barrier: Any, accepted: Any) -> None:
    barrier.wait()
    for _ in range(50):
        previous = read_alias_log(root).last("a")
        try:
            append_change(
                root,
                "a",
                [AliasTarget(f"ppo:{number}", "d")],
                who=str(number),
                why="race",
                replaces=previous.seq if previous else 0,
            )
            accepted.put(number)
        except RunConflict:
            pass


def test_many_processes_at_once(tmp_path: Path) -> None:
    """Every acknowledged change is in the log, and each replaces the one before it."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    accepted = context.Queue()
    workers = [
        context.Process(target=append_in_race, args=(tmp_path, number, barrier, accepted)) for number in range(4)
    ]
    for worker in workers:
        worker.start()
    accepted_numbers: list[int] = []
    while any(worker.is_alive() for worker in workers) or not accepted.empty():
        while not accepted.empty():
            accepted_numbers.append(accepted.get())
    for worker in workers:
        worker.join()
    log = read_alias_log(tmp_path)
    assert sorted(accepted_numbers) == sorted(int(change.who) for change in log.changes)
    assert len(log.changes) >= 50
    assert [change.replaces for change in log.changes] == [*range(len(log.changes))]


def test_a_clock_that_is_set_back_does_not_turn_time_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the changes decides the target of an alias at a time."""
    times = [datetime(2026, 11, day, tzinfo=UTC) for day in (10, 3, 12)]

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return times.pop(0)

    monkeypatch.setattr(alias_log, "datetime", Clock)
    for name in "abc":
        write_change(tmp_path, "production", f"ppo:{name}")
    monkeypatch.undo()
    log = read_alias_log(tmp_path)
    assert [change.at[:10] for change in log.changes] == ["2026-11-10", "2026-11-10", "2026-11-12"]

    def find_refs(day: int) -> list[str]:
        moment = datetime(2026, 11, day, tzinfo=UTC)
        return [arm.ref for change in log.get_current_changes(moment).values() for arm in change.arms]

    assert [find_refs(day) for day in (9, 10, 11, 12)] == [[], ["ppo:b"], ["ppo:b"], ["ppo:c"]]
    assert log.get_current_changes(datetime.fromisoformat(log.changes[0].at) - timedelta(microseconds=1)) == {}


def test_a_log_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(CorruptFile, match="is a folder, not a file"):
        read_alias_log(tmp_path)
    if os.geteuid():  # the superuser may write anywhere
        (tmp_path / FILE).rmdir()
        tmp_path.chmod(0o500)
        with pytest.raises(PermissionError):
            write_change(tmp_path, "production", "ppo:a")
        tmp_path.chmod(0o700)


def test_in_words() -> None:
    arms = [AliasTarget("ppo:a", "0123456789abcdef", 3.0), AliasTarget("ppo:b", "f" * 64)]
    assert describe_arms(arms) == "0.75 of ppo:a (0123456789ab), 0.25 of ppo:b (ffffffffffff)"
    assert (describe_arms(arms[:1]), describe_arms([])) == ("ppo:a (0123456789ab)", "")
