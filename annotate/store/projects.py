"""Projects: how items are assigned, what annotators are asked, and the guidelines that they read.

Settings and guidelines change while people work. Each change is a row of the ledger, so that a vote's row tells under
which settings and guidelines it was cast.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import Connection, insert, select, update

from align.annotate.store.ledger import append_ledger_row, find_project_tombstone, require_known_project
from align.annotate.store.records import RESTORE_REMEDY, check_text, hash_to_fraction
from align.annotate.store.tables import guidelines, ledger, project_keys, projects, work
from align.core.chain import to_canonical_json
from align.core.errors import CorruptFile, InputError, require

if TYPE_CHECKING:
    from align.annotate.store.database import Store

STATES = ("open", "paused", "closed")
ORDERS = ("random", "priority")
MAX_OVERLAP = 100
MAX_QUOTA = 1_000_000
MAX_ATTRIBUTES = 12
MAX_LEASE_MINUTES = 7 * 24 * 60
"""In minutes."""
TYPE_NAMES = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    tuple: "a list of names, such as [helpful, harmless]",
}


@dataclass(frozen=True, slots=True)
class ProjectSettings:
    """A project's settings: how its items are assigned, and what annotators are asked.

    Attributes:
        title: the title that annotators see; empty for the project's name.
        attributes: the names of ratings that each answer gets besides the ranking.
        scale: the highest rating; the lowest is 1.
        overlap: number of people who judge each item of the share `overlap_share`; one person judges each of the
            others.
        overlap_share: share of the items, from 0 to 1, chosen by a hash of their id.
        gold_share: share of an annotator's tasks, from 0 to 1, that are gold items they have not seen.
        repeat_share: share of an annotator's tasks, from 0 to 1, that repeat an item with its answers in reverse order.
        order: `random`, or `priority`: items of the highest priority first.
        lease_minutes: minutes that an item is reserved for an annotator after their last activity.
        quota: maximum votes per annotator; 0 for no limit.
        blurred: whether answers are hidden until the annotator shows them.
        turned_by_item: whether the answers' order depends on the item: as added for the first person who judges it,
            rotated by one place for each further person. Otherwise the order is counterbalanced over each person's
            items.
    """

    title: str = ""
    attributes: tuple[str, ...] = ()
    scale: int = 5
    overlap: int = 1
    overlap_share: float = 1.0
    gold_share: float = 0.0
    repeat_share: float = 0.0
    order: str = "random"
    lease_minutes: float = 30.0
    quota: int = 0
    blurred: bool = False
    turned_by_item: bool = False

    def __post_init__(self) -> None:
        for name in ("overlap_share", "gold_share", "repeat_share"):
            value = getattr(self, name)
            require(0 <= value <= 1, name, value, "it is not between 0 and 1", "Give a number from 0 to 1.")
        check_text("title", self.title, 200)
        is_valid_overlap = 1 <= self.overlap <= MAX_OVERLAP
        require(
            is_valid_overlap,
            "overlap",
            self.overlap,
            "it is not a possible number of people",
            f"Give 1 to {MAX_OVERLAP}.",
        )
        is_valid_quota = 0 <= self.quota <= MAX_QUOTA
        require(
            is_valid_quota,
            "quota",
            self.quota,
            "it is not a possible number of votes",
            f"Give up to {MAX_QUOTA}, 0 for no limit.",
        )
        require(2 <= self.scale <= 10, "scale", self.scale, "it cannot be shown", "Give 2 to 10.")
        require(
            self.order in ORDERS, "order", self.order, "there is no such order", f"Choose one of: {', '.join(ORDERS)}."
        )
        is_valid_time = 0 < self.lease_minutes <= MAX_LEASE_MINUTES
        remedy = f"Give a number of minutes above 0, up to {MAX_LEASE_MINUTES}."
        require(is_valid_time, "lease_minutes", self.lease_minutes, "it is not a possible duration", remedy)
        names = self.attributes
        are_unique = len(set(names)) == len(names) and all(names)
        require(are_unique, "attributes", list(names), "a name is empty or given twice", "Name each attribute once.")
        are_few = len(names) <= MAX_ATTRIBUTES
        require(are_few, "attributes", len(names), "there are too many attributes", f"Name up to {MAX_ATTRIBUTES}.")
        for name in names:
            check_text("attributes", name, 60)

    def count_wanted_votes(self, item: str) -> int:
        """Return the number of people who are to judge an item: `overlap` for a share of the items, else 1."""
        return self.overlap if hash_for_overlap(item) < self.overlap_share else 1

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ProjectSettings:
        """Create settings from a mapping of names to JSON values, with defaults for the rest.

        Raises:
            InputError: an unknown name, or a value of another type.
        """
        types = {field.name: type(field.default) for field in fields(cls)}
        settings = {}
        for name, value in values.items():
            require(name in types, "settings", name, "there is no such setting", f"There are {', '.join(types)}.")
            kind = types[name]
            if kind is tuple and isinstance(value, list | tuple):
                is_valid = all(isinstance(part, str) for part in value)
                value = tuple(value)
            elif kind is float:
                is_valid = type(value) in (int, float)
            else:
                is_valid = type(value) is kind
            require(is_valid, name, value, f"it is not {TYPE_NAMES[kind]}", f"Give {TYPE_NAMES[kind]}.")
            settings[name] = value
        return cls(**settings)


def hash_for_overlap(item: str) -> float:
    """Return a hash of an item's id in [0, 1). If it is below `overlap_share`, `overlap` people judge the item."""
    return hash_to_fraction(f"overlap/{item}")


def compute_overlap(items: Collection[str], votes: int) -> dict[str, Any]:
    """Return the settings `overlap` and `overlap_share` for which the items together need `votes` votes.

    The total may exceed `votes` a little, because each item gets a whole number of people, at least one.

    Args:
        items: their ids, at least one.
        votes: the total number of votes wanted.
    """
    overlap = max(2, math.ceil(votes / len(items)))
    items_with_overlap = min(len(items), math.ceil(max(0, votes - len(items)) / (overlap - 1)))
    thresholds = [0.0, *sorted(map(hash_for_overlap, items)), 1.0]
    share = (
        items_with_overlap / len(items)
        if items_with_overlap in (0, len(items))
        else (thresholds[items_with_overlap] + thresholds[items_with_overlap + 1]) / 2
    )
    return {"overlap": overlap, "overlap_share": share}


def read_settings(connection: Connection, project: str) -> ProjectSettings:
    """Return a project's current settings, with defaults for settings that were never changed.

    Raises:
        InputError: unknown project.
        CorruptFile: the stored settings cannot be read.
    """
    text = connection.execute(select(projects.c.settings).where(projects.c.name == project)).scalar()
    if text is None:
        require_known_project(connection, project)
        return ProjectSettings()
    try:
        return ProjectSettings.from_json(json.loads(text))
    except (ValueError, InputError) as error:
        raise CorruptFile(
            "projects.settings", project, f"the settings cannot be read ({error})", RESTORE_REMEDY
        ) from error


def ensure_project(connection: Connection, project: str) -> ProjectSettings:
    """Create the project with default settings and a random secret key if it does not exist, and return its settings.

    Raises:
        InputError: an invalid name, or the project was erased.
    """
    if connection.execute(select(projects.c.name).where(projects.c.name == project)).first() is None:
        require(bool(project.strip()), "project", project, "it is empty", "Name one, for instance project=quickstart.")
        check_text("project", project, 200)
        require_not_erased(connection, project)
        connection.execute(insert(projects), {"name": project, "settings": "{}", "state": "open"})
        connection.execute(insert(project_keys), {"project": project, "key": secrets.token_hex(32)})
    return read_settings(connection, project)


def require_not_erased(connection: Connection, project: str) -> None:
    """Raise InputError if a project was erased. Its name is not used again, because names identify projects."""
    tombstone = find_project_tombstone(connection, project)
    problem = f"it was erased (row {tombstone} of the ledger), and its name is not used again"
    require(tombstone is None, "project", project, problem, "Choose another name.")


class SettingsVersion(NamedTuple):
    """A version of a project's settings, with its number.

    Attributes:
        version: seq of the ledger row of the change; 0 for the defaults before any change.
    """

    version: int
    settings: ProjectSettings


class Guidelines(NamedTuple):
    """A version of a project's guidelines for annotators, with its number.

    Attributes:
        version: 1, 2, 3, ….
        text: Markdown.
    """

    version: int
    text: str


def read_settings_version(connection: Connection, project: str) -> int:
    """Return the version of a project's settings: the number of the ledger row of their last change, or 0."""
    return read_settings_history(connection, project)[-1].version


def read_settings_history(connection: Connection, project: str) -> list[SettingsVersion]:
    """Return all versions of a project's settings with their numbers, the defaults (version 0) first."""
    conditions = (ledger.c.project == project, ledger.c.kind == "settings")
    versions = [SettingsVersion(0, ProjectSettings())]
    values = {}
    for row in connection.execute(select(ledger.c.seq, ledger.c.payload).where(*conditions).order_by(ledger.c.seq)):
        values |= json.loads(row.payload)
        settings = ProjectSettings.from_json({name: value for name, value in values.items() if name != "state"})
        versions.append(SettingsVersion(row.seq, settings))
    return versions


def read_state(connection: Connection, project: str) -> str:
    """Return the state of a project: `open`, `paused` or `closed`.

    Raises:
        InputError: unknown project.
    """
    state = connection.execute(select(projects.c.state).where(projects.c.name == project)).scalar()
    if state is None:
        require_known_project(connection, project)
    return state or "open"


def read_guidelines(connection: Connection, project: str, version: int | None = None) -> Guidelines | None:
    """Return a version of a project's guidelines, by default the newest, or None if there is no such version."""
    query = select(guidelines.c.version, guidelines.c.text).where(guidelines.c.project == project)
    if version is not None:
        query = query.where(guidelines.c.version == version)
    row = connection.execute(query.order_by(guidelines.c.version.desc()).limit(1)).first()
    return None if row is None else Guidelines(row.version, row.text)


def configure_project(
    store: Store, project: str, values: Mapping[str, Any] | None = None, state: str | None = None
) -> ProjectSettings:
    """Change a project's settings and state, and return the new settings. The project is created if it does not exist.

    In every state, votes on items that people hold are accepted; new items are assigned only while the project is open.

    Args:
        values: settings to change, by name.

    Raises:
        InputError: an unknown setting or state, or an invalid value.
    """
    is_known_state = state is None or state in STATES
    require(is_known_state, "state", state, "there is no such state", f"Choose one of: {', '.join(STATES)}.")
    with store.transaction() as connection:
        same_project = projects.c.name == project
        is_new = connection.execute(select(projects.c.name).where(same_project)).first() is None
        old_settings = ensure_project(connection, project)
        new_settings = ProjectSettings.from_json(asdict(old_settings) | dict(values or {}))
        changed = {name: value for name, value in asdict(new_settings).items() if value != getattr(old_settings, name)}
        old_state = read_state(connection, project)
        if state is not None and state != old_state:
            changed["state"] = state
        if not changed and not is_new:
            return new_settings
        row = {"settings": to_canonical_json(asdict(new_settings)), "state": state or old_state}
        connection.execute(update(projects).where(same_project), row)
        append_ledger_row(connection, project, "settings", changed)
        if {"overlap", "overlap_share"} & changed.keys():
            items = select(work.c.item).where(work.c.project == project, ~work.c.gold)
            for item in connection.execute(items).scalars().all():
                same_item = (work.c.project == project, work.c.item == item)
                connection.execute(update(work).where(*same_item).values(wanted=new_settings.count_wanted_votes(item)))
    return new_settings


def publish_guidelines(store: Store, project: str, text: str) -> int:
    """Store a new version of a project's guidelines, in Markdown, and return its number.

    If the text is that of the newest version, nothing is stored, and the number stays the same.

    Raises:
        InputError: an empty text.
    """
    require(bool(text.strip()), "guidelines", text, "they are empty", "Say what makes an answer good.")
    with store.transaction() as connection:
        ensure_project(connection, project)
        last_version, last_text = read_guidelines(connection, project) or Guidelines(0, "")
        if text == last_text:
            return last_version
        version = last_version + 1
        connection.execute(insert(guidelines), {"project": project, "version": version, "text": text})
        digest = hashlib.sha256(text.encode()).hexdigest()
        append_ledger_row(connection, project, "guidelines", {"version": version, "digest": digest})
    return version
