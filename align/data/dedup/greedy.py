"""The walk over documents in order of preference, which keeps or drops each of them.

Two documents are compared only if a *mark* of theirs is the same. Marks of a document are the groups that it is in.
In a large group (of texts from one template, say) too many pairs would be compared, and hardly any are alike. There,
marks are the document's rarest shingles, as many as that two sets without a common one are below the threshold. Those
that are common in a huge group are left out, and their pairs are found by *patterns* (`align.data.dedup.patterns`).

Source: prefix filtering, Bayardo, Ma and Srikant 2007, "Scaling up all pairs similarity search".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from align.data.dedup import patterns
from align.data.dedup.arrays import distinct, held, ranges, spans
from align.data.dedup.patterns import Patterns

BLOCK_PAIRS = 1 << 20
"""Pairs that are looked at together."""
FEW_PAIRS = 1 << 14
"""Documents with at most so many pairs among themselves are compared each with each."""
FEW_PATTERNED = 1 << 7
"""As well as so many documents with patterns."""
RUN = 1 << 22
"""Marks of kept documents from which on a run grows no more: to put two together, both are there twice."""
NOWHERE = np.iinfo(np.int64).max

NONE = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
"""No pairs: earlier documents, later ones, similarities."""


@dataclass(frozen=True)
class Marked:
    """Marks of documents, by mark and then by document."""

    mark: np.ndarray
    """uint64."""
    document: np.ndarray
    """int32: its place in the order of preference."""

    @classmethod
    def of(cls, mark: np.ndarray, document: np.ndarray) -> Marked:
        order = np.lexsort((document, mark))
        return cls(mark[order], document[order])

    def where(self, chosen: np.ndarray) -> Marked:
        return Marked(self.mark[chosen], self.document[chosen])

    def without(self, documents: np.ndarray) -> Marked:
        """Args: documents: ascending."""
        return self.where(~held(documents, self.document)) if len(documents) else self

    def together(self, other: Marked) -> Marked:
        return Marked.of(np.append(self.mark, other.mark), np.append(self.document, other.document))

    def meeting(self, other: Marked) -> tuple[np.ndarray, np.ndarray]:
        """Where the entries of this with the mark of each of the other's begin, and how many they are."""
        begins = np.searchsorted(self.mark, other.mark)
        return begins, np.searchsorted(self.mark, other.mark, "right") - begins


@dataclass(frozen=True)
class Block:
    """Documents that are compared, by what they have."""

    marked: Marked
    patterned: Marked
    """Keys of patterns as marks, one of each document that has a pattern."""
    patterns: Patterns

    def __len__(self) -> int:
        return len(self.marked.mark) + len(self.patterned.mark)

    @property
    def documents(self) -> np.ndarray:
        return distinct(np.append(self.marked.document, self.patterned.document))

    def until(self, document: float) -> tuple[Block, Block]:
        """The documents before this one, and the others."""
        one, other = self.marked.document < document, self.patterned.document < document
        return (
            Block(self.marked.where(one), self.patterned.where(other), self.patterns),
            Block(self.marked.where(~one), self.patterned.where(~other), self.patterns),
        )

    def without(self, documents: np.ndarray) -> Block:
        """Args: documents: ascending."""
        return Block(self.marked.without(documents), self.patterned.without(documents), self.patterns)

    def with_patterns(self) -> Patterns:
        """The patterns that are left."""
        return self.patterns.among(distinct(self.patterned.mark))

    def together(self, other: Block) -> Block:
        same = self.patterns is other.patterns
        return Block(
            self.marked.together(other.marked), self.patterned.together(other.patterned),
            self.patterns if same else patterns.together(self.with_patterns(), other.with_patterns()),
        )  # fmt: skip


class Greedy:
    """What is kept and dropped so far.

    Args:
        similar: places of earlier and later documents, pair by pair → their similarity; less than the threshold where
            they are no pair that may be twins.
        across: see `align.data.dedup.patterns.alike`.
    """

    def __init__(
        self, similar: Callable[[np.ndarray, np.ndarray], np.ndarray], threshold: float, across: bool | None = None
    ):
        self.similar, self.threshold, self.across = similar, threshold, across
        self.kept: list[Block] = []  # runs, each at least four times as long as the next one, or of `RUN`
        self.twins: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # kept, dropped, similarity

    def decide(self, block: Block) -> None:
        """The next documents in order."""
        self.keep(self.among(block.without(self.drop(*self.alike(self.kept, block)))))

    def among(self, block: Block) -> Block:
        """Decides documents that are no twins of earlier ones. Returns those that are kept."""
        marked = block.marked
        few = int(marked.meeting(marked)[1].sum()) <= FEW_PAIRS + len(marked.mark)
        few &= len(block.patterned.document) <= FEW_PATTERNED
        if few or len(block.documents) == 1:
            return block.without(self.drop(*joined([*self.by_marks([block], block), self.by_patterns(block)])))
        first, second = block.until(float(np.median(block.documents)))
        first = self.among(first)
        return first.together(self.among(second.without(self.drop(*self.alike([first], second)))))

    def alike(self, earlier: Sequence[Block], later: Block) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pairs that reach the threshold: documents of the former, which are kept, documents of the latter,
        similarities. Of those that are alike by patterns, the first one of each run will do."""
        by_patterns = [self.first_by_patterns(one, later) for one in earlier if len(later.patterned.mark)]
        return joined([*self.by_marks(earlier, later), *by_patterns])

    def by_marks(self, earlier: Sequence[Block], later: Block) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        yield NONE
        for one, other in pairs([block.marked for block in earlier], later.marked):
            yield self.enough(one, other)

    def enough(self, one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        similarity = self.similar(one, other)
        enough = similarity >= self.threshold
        return one[enough], other[enough], similarity[enough]

    def by_patterns(self, block: Block) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All pairs of few documents."""
        made = block.with_patterns()
        of = np.searchsorted(made.key, block.patterned.mark)
        whole = np.zeros((len(made), len(made)), bool)
        for some, others, found in patterns.alike(made, made, self.threshold, self.across):
            whole[np.ix_(some, others)] = found
        document = block.patterned.document.astype(np.int64)
        one, other = (document[i] for i in np.nonzero(whole[np.ix_(of, of)]))
        return self.enough(one[one < other], other[one < other])

    def first_by_patterns(self, earlier: Block, later: Block) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each later document, the first earlier one that it is alike by its pattern."""
        theirs, made = earlier.with_patterns(), later.with_patterns()
        first = earlier.patterned.document[np.searchsorted(earlier.patterned.mark, theirs.key)].astype(np.int64)
        best = np.full(len(made), NOWHERE)
        for some, others, found in patterns.alike(made, theirs, self.threshold, self.across):
            best[some] = np.minimum(best[some], np.where(found, first[others], NOWHERE).min(1))
        of = np.searchsorted(made.key, later.patterned.mark)
        some = best[of] < NOWHERE
        one, other = best[of][some], later.patterned.document[some].astype(np.int64)
        found = [self.enough(one, other)]
        for i in np.flatnonzero(some)[~np.isin(other, found[0][1])]:  # alike, but with no key in common: who else?
            found.append(
                self.any_by_pattern(earlier, theirs, made.take(of[i : i + 1]), int(later.patterned.document[i]))
            )
        return joined(found)

    def any_by_pattern(
        self, earlier: Block, theirs: Patterns, pattern: Patterns, document: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Every earlier document that one is alike by its pattern."""
        keys = [theirs.key[others[found[0]]] for _, others, found in patterns.alike(
            pattern, theirs, self.threshold, self.across
        )]  # fmt: skip
        one = earlier.patterned.document[held(distinct(np.concatenate(keys)), earlier.patterned.mark)].astype(np.int64)
        return self.enough(one, np.full(len(one), document, np.int64))

    def drop(self, earlier: np.ndarray, later: np.ndarray, similarity: np.ndarray) -> np.ndarray:
        """Drops each later document of pairs for the first earlier one that is kept. Returns those, ascending."""
        order = np.lexsort((earlier, later))
        gone: dict[int, int] = {}
        for row, one, other in zip(order.tolist(), earlier[order].tolist(), later[order].tolist(), strict=True):
            if one not in gone and other not in gone:
                gone[other] = row
        rows = np.fromiter(gone.values(), np.int64, len(gone))
        self.twins.append((earlier[rows], later[rows], similarity[rows]))
        return later[rows]

    def found(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Places of the documents that twins were kept of, of those dropped, and their similarities; by the latter."""
        kept, dropped, similarity = joined([NONE, *self.twins])
        order = np.argsort(dropped)
        return kept[order], dropped[order], similarity[order]

    def keep(self, block: Block) -> None:
        self.kept.append(block)
        while len(self.kept) > 1 and len(self.kept[-2]) < min(4 * len(self.kept[-1]), RUN):
            last, before = self.kept.pop(), self.kept.pop()
            self.kept.append(before.together(last))


def pairs(earlier: Sequence[Marked], later: Marked) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of documents that have a mark in common, the earlier one first, a bounded number at a time."""
    waiting = np.zeros(0, np.int64)
    for some in earlier:
        begins, counts = some.meeting(later)
        for at, end in spans(counts, BLOCK_PAIRS, max(len(counts), 1)):
            one = some.document[ranges(begins[at:end], counts[at:end])].astype(np.int64)
            other = np.repeat(later.document[at:end], counts[at:end]).astype(np.int64)
            waiting = distinct(np.append(waiting, (other << 32 | one)[one < other]))
            if len(waiting) > BLOCK_PAIRS:
                yield waiting & 0xFFFFFFFF, waiting >> 32
                waiting = waiting[:0]
    yield waiting & 0xFFFFFFFF, waiting >> 32


def joined(found: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    one, other, similarity = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return one, other, similarity
