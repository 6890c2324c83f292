"""Which documents have a band's key in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from align.data.dedup.arrays import components, distinct, held, shared, spans
from align.data.dedup.words import ODD, mixed


@dataclass(frozen=True)
class Groups:
    """Documents that share a key, each by its place: 0 is the most preferred of all documents."""

    members: np.ndarray
    """int32: the places of each group's documents, ascending, group after group."""
    sizes: np.ndarray
    """int64 (G): at least 2."""

    def sampled(self, larger: int, most: int) -> np.ndarray:
        """Places of `most` members of each group that is larger than `larger`, evenly spaced."""
        big = self.sizes > larger
        first, sizes = (np.cumsum(self.sizes) - self.sizes)[big], self.sizes[big]
        return distinct(self.members[(first[:, None] + np.arange(most) * sizes[:, None] // most).ravel()])

    def by_document(self) -> Memberships:
        order = np.argsort(self.members, kind="stable")
        members = self.members[order]
        first = np.flatnonzero(np.diff(members, prepend=-1))
        group = np.repeat(np.arange(len(self.sizes), dtype=np.int32), self.sizes)[order]
        return Memberships(members[first], np.append(first, len(members)), group)


@dataclass(frozen=True)
class Memberships:
    """The groups of each document that is in one."""

    documents: np.ndarray
    """int32 (D): places, ascending."""
    offsets: np.ndarray
    """int64 (D+1): the groups of document `d` are those from `offsets[d]` to `offsets[d + 1]`."""
    groups: np.ndarray
    """int32: which groups, ascending in each document."""

    def blocks(self, costs: np.ndarray, budget: int, most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Documents in order, at most so many at a time: their places, each there once for each of its groups.

        Args:
            costs: of each place.
            budget: of documents together; one that costs more is alone.
        """
        for at, end in spans(costs[self.documents], budget, most):
            offsets = self.offsets[at : end + 1]
            yield np.repeat(self.documents[at:end], np.diff(offsets)), self.groups[offsets[0] : offsets[-1]]

    def in_any(self, chosen: np.ndarray) -> np.ndarray:
        """int32: places of the documents that are in any of these groups (bool (G)), ascending."""
        many = np.diff(np.append(0, np.cumsum(chosen[self.groups]))[self.offsets])
        return self.documents[many > 0]

    def meet(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """bool (pairs): whether the documents at places `a` and `b` have a group in common."""
        sides = []
        for places in (a, b):
            at = np.searchsorted(self.documents, places)
            sides += [self.groups, self.offsets[at], self.offsets[at + 1] - self.offsets[at]]
        return shared(*sides, bits=32) > 0


def sharing(place: np.ndarray, has: np.ndarray, column: Callable[[int], np.ndarray], bands: int) -> Groups:
    """The groups of all bands. Documents that share several keys with the very same others are one group.

    Groups go by 64-bit hashes of their members: one of ten million is taken for another in one of 4·10⁵ data sets.

    Args:
        place: int32 (N), a permutation: the place of each document.
        has: bool (N): which documents have keys.
        column: band → uint64 (N). Asked once for each band; nothing of it is kept.
    """
    seen = np.zeros(0, np.uint64)
    members, sizes = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
    everyone = bool(has.all())
    for band in range(bands):
        keys = column(band)
        places, size = groups_of(keys if everyone else keys[has], place if everyone else place[has])
        if not len(size):
            continue
        names = mixed(places.astype(np.uint64) * ODD + ODD)  # not 0 of place 0, which a sum would not show
        names = mixed(np.add.reduceat(names, np.cumsum(size) - size))
        new = ~held(seen, names)
        members.append(places[np.repeat(new, size)])
        sizes.append(size[new])
        seen = np.sort(np.concatenate([seen, names[new]]))
    return Groups(np.concatenate(members), np.concatenate(sizes))


def groups_of(keys: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of the documents whose key another one has, by group and in order; and the sizes of the groups."""
    order = np.argsort(keys)
    ranked = keys[order]
    inside = np.zeros(len(keys) + 1, bool)  # whether a key is that of the one before
    np.equal(ranked[1:], ranked[:-1], out=inside[1:-1])
    common = inside[1:] | inside[:-1]
    first = ~inside[:-1][common]
    numbered = np.cumsum(first, dtype=np.int64) << 32 | place[order[common]]
    numbered.sort()
    return (numbered & 0xFFFFFFFF).astype(np.int32), np.diff(np.append(np.flatnonzero(first), len(first)))


def packs(groups: Groups, costs: np.ndarray, count: int) -> list[np.ndarray]:
    """Documents that are in groups, in at most `count` packs that have none in common: what is kept or dropped of one
    says nothing of another. Groups that are linked by their members are in one, so that a pack may be large.

    Args:
        groups: of documents by their numbers.
        costs: of each document.

    Returns:
        the numbers of each pack's documents, ascending (int64).
    """
    first = np.repeat(groups.members[np.cumsum(groups.sizes) - groups.sizes], groups.sizes)
    root = components(len(costs), first.astype(np.int64), groups.members.astype(np.int64))
    inside = distinct(groups.members).astype(np.int64)
    heads, component = np.unique(root[inside], return_inverse=True)
    dearest = np.argsort(-np.bincount(component, costs[inside], len(heads)), kind="stable")
    pack = np.empty(len(heads), np.int64)
    pack[dearest] = np.arange(len(heads)) % count
    return [inside[pack[component] == number] for number in range(min(count, len(heads)))]
