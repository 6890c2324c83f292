"""Which documents have a band's key in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from align.data.dedup.arrays import NO_HASHES, NO_NUMBERS, components, count_shared, distinct, held, join, spans
from align.data.dedup.words import ODD, mixed


@dataclass(frozen=True)
class Groups:
    """Documents that share a key, each by its place: 0 is the most preferred of all documents."""

    members: ndarray
    """int32: the places of each group's documents, ascending, group after group."""
    sizes: ndarray
    """int64 (G): at least 2."""

    @property
    def first(self) -> ndarray:
        """int64 (G): where each group's members begin."""
        return np.cumsum(self.sizes) - self.sizes

    def sampled(self, larger: int, most: int) -> ndarray:
        """Return the places of `most` members of each group that is larger than `larger`, evenly spaced."""
        big = self.sizes > larger
        step = np.arange(most) * self.sizes[big, None] // most
        return distinct(self.members[(self.first[big, None] + step).ravel()])


@dataclass(frozen=True)
class Memberships:
    """The groups of each document that is in one."""

    documents: ndarray
    """int32 (D): places, ascending."""
    offsets: ndarray
    """int64 (D+1): the groups of document `d` are those from `offsets[d]` to `offsets[d + 1]`."""
    groups: ndarray
    """int32: which groups, ascending in each document."""

    @classmethod
    def of(cls, groups: Groups) -> Memberships:
        order = np.argsort(groups.members, kind="stable")
        members = groups.members[order]
        first = np.flatnonzero(np.diff(members, prepend=-1))
        group = np.repeat(np.arange(len(groups.sizes), dtype=np.int32), groups.sizes)[order]
        return cls(members[first], np.append(first, len(members)), group)

    def blocks(self, costs: ndarray, budget: int, most: int) -> Iterator[tuple[ndarray, ndarray]]:
        """Yield documents in order, at most so many at a time: their places, each there once for each of its groups.

        Args:
            costs: of each place.
            budget: of documents together; one that costs more is alone.
        """
        for at, end in spans(costs[self.documents], budget, most):
            offsets = self.offsets[at : end + 1]
            yield np.repeat(self.documents[at:end], np.diff(offsets)), self.groups[offsets[0] : offsets[-1]]

    def in_any(self, chosen: ndarray) -> ndarray:
        """Return the places of the documents that are in any of these groups (bool (G)), ascending (int32)."""
        many = np.diff(np.append(0, np.cumsum(chosen[self.groups]))[self.offsets])
        return self.documents[many > 0]

    def meet(self, a: ndarray, b: ndarray) -> ndarray:
        """Return whether the documents at places `a` and `b` have a group in common, bool (pairs)."""
        sides = []
        for places in (a, b):
            at = np.searchsorted(self.documents, places)
            sides += [self.groups, self.offsets[at], self.offsets[at + 1] - self.offsets[at]]
        return count_shared(*sides, bits=32) > 0


def sharing(place: ndarray, has: ndarray, column: Callable[[int], ndarray], bands: int) -> Groups:
    """Return the groups of all bands. Documents that share several keys with the very same others are one group.

    Groups go by 64-bit hashes of their members: one of ten million is taken for another in one of 4·10⁵ data sets.

    Args:
        place: int32 (N), a permutation: the place of each document.
        has: bool (N): which documents have keys.
        column: band → uint64 (N). Asked once for each band; nothing of it is kept.
    """
    seen = NO_HASHES
    members, sizes = list[ndarray](), list[ndarray]()
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
        seen = np.sort(np.append(seen, names[new]))
    return Groups(join(members, np.zeros(0, np.int32)), join(sizes, NO_NUMBERS))


def groups_of(keys: ndarray, place: ndarray) -> tuple[ndarray, ndarray]:
    """Return the places of the documents whose key another one has, by group and in order; and the sizes of the
    groups."""
    order = np.argsort(keys)
    ranked = keys[order]
    inside = np.zeros(len(keys) + 1, bool)  # whether a key is that of the one before
    np.equal(ranked[1:], ranked[:-1], out=inside[1:-1])
    common = inside[1:] | inside[:-1]
    first = ~inside[:-1][common]
    numbered = np.cumsum(first, dtype=np.int64) << 32 | place[order[common]]
    numbered.sort()
    return (numbered & 0xFFFFFFFF).astype(np.int32), np.diff(np.append(np.flatnonzero(first), len(first)))


def packs(groups: Groups, costs: ndarray, count: int) -> list[ndarray]:
    """Return the documents that are in groups, in at most `count` packs that have none in common: what is kept or
    dropped of one says nothing of another. Groups that are linked by their members are in one, so that a pack may be
    large.

    Args:
        groups: of documents by their numbers.
        costs: of each document.

    Returns:
        the numbers of each pack's documents, ascending (int64).
    """
    first = np.repeat(groups.members[groups.first], groups.sizes)
    root = components(len(costs), first.astype(np.int64), groups.members.astype(np.int64))
    inside = distinct(groups.members).astype(np.int64)
    heads, component = np.unique(root[inside], return_inverse=True)
    dearest = np.argsort(-np.bincount(component, costs[inside], len(heads)), kind="stable")
    pack = np.empty(len(heads), np.int64)
    pack[dearest] = np.arange(len(heads)) % count
    return [inside[pack[component] == number] for number in range(min(count, len(heads)))]
