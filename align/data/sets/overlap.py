"""Which rows two data sets share, by their ids alone where these are of one kind.

Ids of two kinds are never equal, so that a row of the annotation store is found among rows of files, or of another
project, by computing its id again: the HMAC of the other rows under the project's key, while there is one. Where the
key is gone nobody can say any more what is shared, and `None` says so: it is not zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass

from align.data.records.content import row_bytes
from align.data.sets.columns import records_of
from align.data.sets.ids import SHA256, IdKind, id_of, kinds_in
from align.data.sets.published import DataSet
from align.data.sets.sides import SIDES

KeyOf = Callable[[IdKind], bytes | None]
"""The key of a kind of ids; None where it cannot be read (any more). It is asked for HMAC alone."""


@dataclass(frozen=True, slots=True)
class Content:
    """What a data set holds.

    Attributes:
        ids: kind of ids → content ids. Rows that were forgotten have none.
        rows: the rows that have ids of a kind: each id, and the row as canonical JSON, see
            `align.data.records.content.row_bytes`. Asked for only where kinds differ.
    """

    ids: Mapping[IdKind, Set[bytes]]
    rows: Callable[[IdKind], Iterable[tuple[bytes, bytes]]]


@dataclass(frozen=True, slots=True)
class Shared:
    """What one data set shares with another.

    Attributes:
        ids: its content ids of rows that are in the other one, as far as that can be told.
        unknown: those of which nobody can tell.
    """

    ids: frozenset[bytes]
    unknown: frozenset[bytes]

    @property
    def count(self) -> int | None:
        """How many rows are shared; None where that is not known."""
        return None if self.unknown else len(self.ids)


def shared(ours: Content, theirs: Content, key_of: KeyOf) -> Shared:
    """Which rows of ours are theirs too."""
    found, unknown = set[bytes](), set[bytes]()
    for kind, ids in ours.ids.items():
        for other, there in theirs.ids.items():
            same = common(kind, ids, other, there, ours, theirs, key_of) if ids and there else set()
            if same is None:
                unknown |= ids
            else:
                found |= same
    return Shared(frozenset(found), frozenset(unknown - found))


def common(
    kind: IdKind, ids: Set[bytes], other: IdKind, there: Set[bytes], ours: Content, theirs: Content, key_of: KeyOf
) -> set[bytes] | None:
    """Those of our ids of one kind whose rows have ids of another kind there; None where that is not known."""
    if kind == other:
        return {*ids} & there
    if other != SHA256 and (key := key_of(other)) is not None:  # their ids of our rows
        return {id for id, row in ours.rows(kind) if id_of(row, key) in there}
    if kind != SHA256 and (key := key_of(kind)) is not None:  # our ids of their rows
        return {id for _, row in theirs.rows(other) if (id := id_of(row, key)) in ids}
    return None


def content(found: DataSet, *sides: str) -> Content:
    """What a published data set holds.

    Args:
        sides: `train`, `test`; both where none is named.
    """
    kinds, chosen = kinds_in(found.data), sides or SIDES
    ids: dict[IdKind, set[bytes]] = {}
    for side in chosen:
        for table in found.tables(side, ["source", "content_id"]):
            for source, id in zip(table["source"].to_pylist(), table["content_id"].to_pylist(), strict=True):
                ids.setdefault(kinds[source], set()).add(bytes.fromhex(id))

    def rows(kind: IdKind) -> Iterator[tuple[bytes, bytes]]:
        for side in chosen:
            for table in found.tables(side):
                sources, named = table["source"].to_pylist(), table["content_id"].to_pylist()
                records = records_of(found.kind, table, sources)
                for source, id, record in zip(sources, named, records, strict=True):
                    if kinds[source] == kind:
                        yield bytes.fromhex(id), row_bytes(record)

    return Content(ids, rows)
