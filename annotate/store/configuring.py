"""Changes of a project: its settings, its state and its guidelines, each a row of the ledger."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, insert, select, update

from align.annotate.store.database import Store
from align.annotate.store.projects import STATES, Settings, guidelines_of, met, state_of
from align.annotate.store.queries import append
from align.annotate.store.tables import guidelines, projects, work
from align.core.chain import canonical
from align.core.errors import require


def configure(
    store: Store, project: str, values: Mapping[str, Any] | None = None, state: str | None = None
) -> Settings:
    """Changes the settings that `values` names, and the state; makes the project where there is none.

    Votes of items that people hold are taken in every state; new items are given out in `open` alone.

    Raises:
        InputError: an unknown setting or state, or a value that it cannot have.
    """
    require(bool(project.strip()), "project", project, "it is empty", "Name one, for instance project=quickstart.")
    known = ", ".join(STATES)
    require(state is None or state in STATES, "state", state, "there is no such state", f"Choose one of: {known}.")
    with store.transaction() as connection:
        mine = select(projects.c.name).where(projects.c.name == project)
        new = connection.execute(mine).first() is None
        before = met(connection, project)
        after = Settings.read(asdict(before) | dict(values or {}))
        changed = {name: value for name, value in asdict(after).items() if value != getattr(before, name)}
        state_before = state_of(connection, project)
        if state is not None and state != state_before:
            changed["state"] = state
        if not changed and not new:
            return after
        changed = {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}
        row = {"settings": canonical(asdict(after)), "state": state or state_before}
        connection.execute(update(projects).where(projects.c.name == project), row)
        append(connection, project, "settings", changed)
        if {"overlap", "overlap_share"} & changed.keys():
            _want_anew(connection, project, after)
    return after


def _want_anew(connection: Connection, project: str, settings: Settings) -> None:
    items = connection.execute(select(work.c.item).where(work.c.project == project, ~work.c.gold)).scalars().all()
    for item in items:
        mine = (work.c.project == project, work.c.item == item)
        connection.execute(update(work).where(*mine).values(wanted=settings.wanted(item)))


def publish_guidelines(store: Store, project: str, text: str) -> int:
    """A new version of the project's guidelines, in Markdown; returns its number, the last one's where nothing changed.

    Raises:
        InputError: an empty text.
    """
    require(bool(text.strip()), "guidelines", text, "they are empty", "Say what makes an answer good.")
    with store.transaction() as connection:
        met(connection, project)
        last = guidelines_of(connection, project)
        if last is not None and last[1] == text:
            return last[0]
        version = 1 if last is None else last[0] + 1
        connection.execute(insert(guidelines), {"project": project, "version": version, "text": text})
        digest = hashlib.sha256(text.encode()).hexdigest()
        append(connection, project, "guidelines", {"version": version, "digest": digest})
    return version
