"""An assignment queue with items, and short helpers that judge them."""

from annotation_store import add_question, build_judgement

from align.annotate.assignment import AssignmentQueue
from align.annotate.assignment.leases import get_page_mode, read_terms
from align.annotate.store import configure_project
from align.annotate.store.tables import work


class SettableClock:
    """A clock that the test sets."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def open_queue(store, clock=None, items=3, **settings):
    for i in range(items):
        add_question(store, f"run/{i}")
    configure_project(store, "p", settings)
    return AssignmentQueue(store, "p", clock)


def rank_in_order(task, **more):
    return build_judgement(task.item.id, "0>1>2", **more)


def cast_vote(queue, who, task, key, judgement):
    """Vote under the terms that are in force now."""
    with queue.store.reading() as db:
        terms = read_terms(db, queue.project, get_page_mode(task.purpose))
    return queue.vote(who, task.token, key, judgement, terms)


def judge(queue, who, task, key=None, **more):
    return cast_vote(queue, who, task, key or f"{who}/{task.token}", rank_in_order(task, **more))


def read_counters(store):
    with store.reading() as db:
        rows = db.execute(work.select()).all()
    return {row.item: (row.judged, row.leased) for row in rows}
