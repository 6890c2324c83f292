"""Fill, read and tamper with an annotation store in tests."""

from pathlib import Path
from uuid import uuid4

from align.annotate.store import Candidate, Judgement, Store
from align.core.types import Conversation, Message

TABLES = ("prompts", "candidates", "annotators", "ledger")
UNGUARDED = {
    "sqlite": tuple(f"DROP TRIGGER IF EXISTS ledger_no_{verb}" for verb in ("update", "delete")),
    "postgresql": ("ALTER TABLE ledger DISABLE TRIGGER ledger_append_only",),
}


def build_store_url(folder: Path) -> str:
    return f"sqlite:///{folder / 'annotations.db'}"


def build_prompt(text: str = "How are you?") -> Conversation:
    return Conversation((Message("user", text),))


def add_question(
    store: Store, key: str = "run/0", project: str = "p", texts: tuple[str, ...] = ("fine", "bad", "eh")
) -> str:
    return store.add_item(project, key, build_prompt(f"question of {key}"), [Candidate(text) for text in texts])


def record_ranking(store: Store, item: str, order: str, annotator: str = "ann@example.org", **more) -> int:
    """Record a ranking. `order` "0>12" puts candidate 0 first, and 1 and 2 tied below it."""
    key = more.pop("key", uuid4().hex)
    return store.record("p", item, build_judgement(item, order, **more), annotator=annotator, key=key)


def build_judgement(item: str, order: str, **more) -> Judgement:
    tiers = tuple(tuple(f"{item}-{k}" for k in tier) for tier in order.split(">"))
    return Judgement(tiers, **more)


def tamper(store: Store, *statements: str) -> None:
    """Edit the tables with SQL, after dropping the triggers that protect them."""
    with store.transaction() as connection:
        for statement in (*UNGUARDED[connection.dialect.name], *statements):
            connection.exec_driver_sql(statement)


def count_table_rows(store: Store) -> dict[str, int]:
    with store.reading() as connection:
        return {name: connection.exec_driver_sql(f"SELECT count(*) FROM {name}").scalar_one() for name in TABLES}


def query_rows(store: Store, query: str) -> list[tuple]:
    with store.reading() as connection:
        return [tuple(row) for row in connection.exec_driver_sql(query)]
