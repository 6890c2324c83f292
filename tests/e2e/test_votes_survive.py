"""No acknowledged vote is lost, and nobody is given what another holds: with many annotators, and with SIGKILL."""

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
from align.annotate.store import Candidate, Judgement, Store, configure
from align.core.errors import StorageError
from align.core.types import Conversation, Message

UNCHANGED = Terms(0, "work", None)
"""Of a project whose settings are those it was made with."""
ANNOTATORS = 50
ITEMS = 400


def fill(url: str, items: int = ITEMS, **settings) -> None:
    with Store.open(url) as store, store.transaction():
        for i in range(items):
            prompt = Conversation((Message("user", f"question {i}"),))
            store.add_item("p", f"run/{i}", prompt, [Candidate("yes"), Candidate("no")])
        configure(store, "p", settings)


def work_on(url: str, people: list[str], log: str) -> None:
    """Each of the people in turn judges an item, until nothing is left. What was acknowledged is on disk in the log
    before the next vote is sent, as a browser would remember it."""
    with Store.open(url) as store, open(log, "a", encoding="utf-8") as acknowledged:
        queue, held = AssignmentQueue(store, "p"), {}
        for who in people:
            held[who] = queue.take(who)
        while any(held.values()):
            for who in [who for who in people if held[who]]:
                task = held[who]
                tiers = tuple((id,) for id in task.display_order)
                seq, held[who] = queue.vote(who, task.token, f"{who}/{task.token}", Judgement(tiers), UNCHANGED)
                acknowledged.write(f"{seq} {task.item.id} {who}\n")
                acknowledged.flush()


def workers(url: str, folder: Path, count: int) -> list:
    spawn = multiprocessing.get_context("spawn").Process
    people = [f"ann{n}" for n in range(ANNOTATORS)]
    return [spawn(target=work_on, args=(url, people[n::count], str(folder / f"log{n}"))) for n in range(count)]


def acknowledged(folder: Path) -> list[tuple[int, str, str]]:
    lines = [line for log in folder.glob("log*") for line in log.read_text().split("\n")[:-1]]
    return [(int(seq), item, who) for seq, item, who in (line.split() for line in lines)]


def check(url: str, votes: list[tuple[int, str, str]], wanted: int) -> None:
    with Store.open(url, create=False) as store:
        store.verify()
        kept = {vote.seq: vote for vote in store.rankings("p")}
        assert len({seq for seq, _, _ in votes}) == len(votes)
        assert [seq for seq, item, _ in votes if seq not in kept or kept[seq].item != item] == []
        assert len({(vote.item, vote.annotator) for vote in kept.values()}) == len(kept)
        assert max(Counter(vote.item for vote in kept.values()).values()) <= wanted


@pytest.mark.slow
def test_several_processes_share_the_work_and_give_nothing_twice(store_url: str, tmp_path: Path) -> None:
    fill(store_url, overlap=2)
    busy = workers(store_url, tmp_path, 3)
    for worker in busy:
        worker.start()
    for worker in busy:
        worker.join()
    votes = acknowledged(tmp_path)
    assert len(votes) == 2 * ITEMS
    check(store_url, votes, 2)


@pytest.mark.slow
def test_killed_again_and_again_it_loses_no_acknowledged_vote(store_url: str, tmp_path: Path) -> None:
    fill(store_url)
    for round in range(4):
        busy = workers(store_url, tmp_path, 2)
        for worker in busy:
            worker.start()
        target = (round + 1) * ITEMS // 5
        deadline = time.monotonic() + 120
        while len(acknowledged(tmp_path)) < target and time.monotonic() < deadline:
            time.sleep(0.01)
        for worker in busy:
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()
        check(store_url, acknowledged(tmp_path), 1)
    for worker in (busy := workers(store_url, tmp_path, 1)):
        worker.start()
    for worker in busy:
        worker.join()
    votes = acknowledged(tmp_path)
    with Store.open(store_url, create=False) as store:
        assert len(store.rankings("p")) == ITEMS  # what was held when the killed ones died went on
    assert len(votes) >= ITEMS - 4 * 2  # a vote that was on disk but not yet acknowledged, at most one a kill
    check(store_url, votes, 1)


def test_a_locked_database_is_waited_for_and_then_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.annotate.store.connections.LOCKED_S", 1)
    url = f"sqlite:///{tmp_path / 'annotations.db'}"
    fill(url, 2)
    with Store.open(url) as store, Store.open(url) as other:
        queue = AssignmentQueue(store, "p")
        task = queue.take("ann")
        judgement = Judgement(tuple((id,) for id in task.display_order))
        with other.transaction():
            with pytest.raises(StorageError, match="locked"):
                queue.vote("ann", task.token, "k", judgement, UNCHANGED)
        seq, _ = queue.vote("ann", task.token, "k", judgement, UNCHANGED)
        assert [vote.seq for vote in store.rankings("p")] == [seq]


def test_a_full_disk_is_said_and_the_vote_is_taken_once_there_is_room(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'annotations.db'}"
    fill(url, 2)
    with Store.open(url) as store:
        queue = AssignmentQueue(store, "p")
        task = queue.take("ann")
        with store.reading() as db:  # the one connection of the pool keeps the limit
            pages = db.exec_driver_sql("PRAGMA page_count").scalar()
            db.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
        told = Judgement(tuple((id,) for id in task.display_order), rationale="because " * 10_000)
        with pytest.raises(StorageError, match="full"):
            queue.vote("ann", task.token, "k", told, UNCHANGED)
        assert store.rankings("p") == []
        assert store.verify()
        with store.reading() as db:
            db.exec_driver_sql("PRAGMA max_page_count = 1000000")
        seq, _ = queue.vote("ann", task.token, "k", told, UNCHANGED)
        assert [vote.seq for vote in store.rankings("p")] == [seq]
