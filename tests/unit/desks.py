"""What the tests of the desk share: one with items, and short ways to judge them."""

from annotation_store import add, said

from annotate.assignment import Desk
from annotate.store import configure
from annotate.store.tables import work


def desk_of(store, clock=None, items=3, **settings):
    for i in range(items):
        add(store, f"run/{i}")
    configure(store, "p", settings)
    return Desk(store, "p", clock)


def best_first(task, **more):
    return said(task.item.id, "0>1>2", **more)


def judge(desk, who, task, key=None, **more):
    return desk.vote(who, task.token, key or f"{who}/{task.token}", best_first(task, **more))


def counters(store):
    with store.reading() as db:
        rows = db.execute(work.select()).all()
    return {row.item: (row.judged, row.leased) for row in rows}
