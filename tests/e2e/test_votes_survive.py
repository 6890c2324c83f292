"""No acknowledged vote is lost and no item is leased twice, with many annotators and after SIGKILL."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from align.annotate.assignment import AssignmentQueue
from align.annotate.assignment.leases import Terms
from align.annotate.store import Candidate, Judgement, Store, configure_project
from align.core.errors import StorageError
from align.core.types import Conversation, Message

UNCHANGED = Terms(0, "work", None)
"""Terms of a project with its original settings."""
ANNOTATORS = 50
ITEMS = 400


def fill_project(url: str, items: int = ITEMS, **settings) -> None:
    with Store.open(url) as store, store.transaction():
        for i in range(items):
            prompt = Conversation((Message("user", f"question {i}"),))
            store.add_item("p", f"run/{i}", prompt, [Candidate("yes"), Candidate("no")])
        configure_project(store, "p", settings)


def work_on(url: str, people: list[str], log: str) -> None:
    """Let each person in turn judge an item until none is left. An acknowledged vote is on disk in the log before the
    next vote is sent, as in a browser."""
    with Store.open(url) as store, open(log, "a", encoding="utf-8") as acknowledged:
        queue = AssignmentQueue(store, "p")
        tasks = {}
        for person in people:
            tasks[person] = queue.take(person)
        while any(tasks.values()):
            for person in [person for person in people if tasks[person]]:
                task = tasks[person]
                tiers = tuple((id,) for id in task.display_order)
                seq, tasks[person] = queue.vote(
                    person, task.token, f"{person}/{task.token}", Judgement(tiers), UNCHANGED
                )
                acknowledged.write(f"{seq} {task.item.id} {person}\n")
                acknowledged.flush()


def build_workers(url: str, folder: Path, count: int) -> list:
    spawn = multiprocessing.get_context("spawn").Process
    people = [f"ann{n}" for n in range(ANNOTATORS)]
    return [spawn(target=work_on, args=(url, people[n::count], str(folder / f"log{n}"))) for n in range(count)]


def read_acknowledged(folder: Path) -> list[tuple[int, str, str]]:
    lines = [line for log in folder.glob("log*") for line in log.read_text().split("\n")[:-1]]
    return [(int(seq), item, person) for seq, item, person in (line.split() for line in lines)]


def check_votes(url: str, votes: list[tuple[int, str, str]], overlap: int) -> None:
    with Store.open(url, create_if_missing=False) as store:
        store.verify()
        stored = {vote.seq: vote for vote in store.rankings("p")}
        assert len({seq for seq, _, _ in votes}) == len(votes)
        assert [seq for seq, item, _ in votes if seq not in stored or stored[seq].item != item] == []
        assert len({(vote.item, vote.annotator) for vote in stored.values()}) == len(stored)
        assert max(Counter(vote.item for vote in stored.values()).values()) <= overlap


@pytest.mark.slow
def test_several_processes_share_the_work_and_give_nothing_twice(store_url: str, tmp_path: Path) -> None:
    fill_project(store_url, overlap=2)
    processes = build_workers(store_url, tmp_path, 3)
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    votes = read_acknowledged(tmp_path)
    assert len(votes) == 2 * ITEMS
    check_votes(store_url, votes, 2)


@pytest.mark.slow
def test_killed_again_and_again_it_loses_no_acknowledged_vote(store_url: str, tmp_path: Path) -> None:
    fill_project(store_url)
    for round in range(4):
        processes = build_workers(store_url, tmp_path, 2)
        for process in processes:
            process.start()
        target = (round + 1) * ITEMS // 5
        deadline = time.monotonic() + 120
        while len(read_acknowledged(tmp_path)) < target and time.monotonic() < deadline:
            time.sleep(0.01)
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        check_votes(store_url, read_acknowledged(tmp_path), 1)
    for process in (processes := build_workers(store_url, tmp_path, 1)):
        process.start()
    for process in processes:
        process.join()
    votes = read_acknowledged(tmp_path)
    with Store.open(store_url, create_if_missing=False) as store:
        assert len(store.rankings("p")) == ITEMS  # items leased to killed workers were judged too
    assert len(votes) >= ITEMS - 4 * 2  # each kill leaves at most one stored vote unacknowledged
    check_votes(store_url, votes, 1)


def test_a_locked_database_is_waited_for_and_then_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.annotate.store.connections.LOCKED_S", 1)
    url = f"sqlite:///{tmp_path / 'annotations.db'}"
    fill_project(url, 2)
    with Store.open(url) as store, Store.open(url) as locking_store:
        queue = AssignmentQueue(store, "p")
        task = queue.take("ann")
        judgement = Judgement(tuple((id,) for id in task.display_order))
        with locking_store.transaction():
            with pytest.raises(StorageError, match="locked"):
                queue.vote("ann", task.token, "k", judgement, UNCHANGED)
        seq, _ = queue.vote("ann", task.token, "k", judgement, UNCHANGED)
        assert [vote.seq for vote in store.rankings("p")] == [seq]


def test_a_full_disk_is_said_and_the_vote_is_taken_once_there_is_room(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'annotations.db'}"
    fill_project(url, 2)
    with Store.open(url) as store:
        queue = AssignmentQueue(store, "p")
        task = queue.take("ann")
        with store.reading() as db:  # the pool has one connection, which keeps the limit
            pages = db.exec_driver_sql("PRAGMA page_count").scalar()
            db.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
        judgement = Judgement(tuple((id,) for id in task.display_order), rationale="because " * 10_000)
        with pytest.raises(StorageError, match="full"):
            queue.vote("ann", task.token, "k", judgement, UNCHANGED)
        assert store.rankings("p") == []
        assert store.verify()
        with store.reading() as db:
            db.exec_driver_sql("PRAGMA max_page_count = 1000000")
        seq, _ = queue.vote("ann", task.token, "k", judgement, UNCHANGED)
        assert [vote.seq for vote in store.rankings("p")] == [seq]
