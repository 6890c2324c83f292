"""What the tests of the annotation store share: short ways to fill one, and to look or meddle behind its back."""

import sqlite3
from pathlib import Path
from uuid import uuid4

from align.types import Conversation, Message
from annotate.store import Candidate, Store

TABLES = ("prompts", "candidates", "annotators", "ledger")


def url_of(folder: Path) -> str:
    return f"sqlite:///{folder / 'annotations.db'}"


def ask(text: str = "How are you?") -> Conversation:
    return Conversation((Message("user", text),))


def add(store: Store, key: str = "run/0", project: str = "p", texts: tuple[str, ...] = ("fine", "bad", "eh")) -> str:
    return store.add_item(project, key, ask(f"question of {key}"), [Candidate(text) for text in texts])


def rank(store: Store, item: str, order: str, annotator: str = "ann@example.org", **more) -> int:
    """`order` as in "0>12": candidate 0 first, 1 and 2 tied below it."""
    tiers = [[f"{item}-{k}" for k in tier] for tier in order.split(">")]
    return store.record_ranking("p", item, tiers, annotator=annotator, **{"key": uuid4().hex, **more})


def tamper(folder: Path, *statements: str) -> None:
    """Edits the file behind the store's back, as somebody would who knows to drop the triggers."""
    with sqlite3.connect(folder / "annotations.db") as connection:
        for trigger in ("update", "delete"):
            connection.execute(f"DROP TRIGGER IF EXISTS ledger_no_{trigger}")
        for statement in statements:
            connection.execute(statement)
    connection.close()


def counts(folder: Path) -> dict[str, int]:
    with sqlite3.connect(folder / "annotations.db") as connection:
        found = {name: connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in TABLES}
    connection.close()
    return found
