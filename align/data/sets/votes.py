"""A project of the annotation store as a source of a data set: the pairs that `data=annotations` reads, and its key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from align.annotate.store import Store, preferences
from align.chain import Head
from align.data.read.records import Read
from align.data.sets.ids import IdKind, kind_under
from align.errors import InputError, require


@dataclass(frozen=True, slots=True)
class Votes:
    """What there is of a project when a run begins.

    Attributes:
        url: of the store.
        head: of the project's ledger. Votes that come later are another run's.
        allow_simulated: see `preferences`.
        key: the project's, for ids; shown nowhere.
    """

    url: str = field(repr=False)
    project: str
    head: Head
    allow_simulated: bool
    key: bytes = field(repr=False)

    @property
    def ids(self) -> IdKind:
        """How the ids of its rows are made."""
        return kind_under(self.project, self.key)

    def reads(self, skip: int = 0) -> Iterator[Read]:
        """The pairs in the order of the ledger, numbered from 1.

        Args:
            skip: pairs that are not asked for.

        Raises:
            InputError: as `preferences`.
        """
        with Store.open(self.url, create=False) as store, store.reading():  # one view for all of it
            pairs = preferences(store, self.project, self.allow_simulated, self.head.seq)
        for number, pair in enumerate(pairs[skip:], start=skip + 1):
            yield Read(number, pair, {"created_at": pair.created_at})


def votes_of(url: str, project: str, allow_simulated: bool) -> Votes:
    """The votes of a project.

    Raises:
        InputError: there is no such store or project, or the project was erased.
    """
    with Store.open(url, create=False) as store, store.reading():
        head, key = store.head(project), store.key(project)
    remedy = "Name another project."
    if key is None:
        raise InputError("project", project, "it was erased, and its rows have no ids any more", remedy)
    return Votes(url, project, head, allow_simulated, key)


def key_in(url: str, kind: IdKind) -> bytes | None:
    """The key of a kind of ids; None where the store has it no more, or has another project of that name.

    Raises:
        InputError: there is no such store, or it cannot be read.
    """
    with Store.open(url, create=False) as store:
        try:
            key = store.key(kind.project)
        except InputError:  # no such project
            return None
    return key if key is not None and kind_under(kind.project, key) == kind else None


def standing(url: str, kind: IdKind) -> set[int] | None:
    """The votes of the project whose key makes such ids that stand: neither retracted nor on an item that was erased.
    None where the project was erased.

    Raises:
        InputError: there is no such store or project, or it is another one of that name.
    """
    with Store.open(url, create=False) as store, store.reading():
        key = store.key(kind.project)
        if key is None:
            return None
        problem = "is another project of that name than the one that the rows are from: its key is another"
        remedy = "Name the store that they are from: store.url=…"
        require(kind_under(kind.project, key) == kind, "project", kind.project, problem, remedy)
        return {vote.seq for vote in store.rankings(kind.project)}
