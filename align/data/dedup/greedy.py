"""The walk over documents in order of preference, which keeps or drops each of them.

Two documents are compared only if a *mark* of theirs is the same. Marks of a document are the groups that it is in.
In a large group (of texts from one template, say) too many pairs would be compared, and hardly any are alike. There,
marks are the document's rarest shingles, as many as that two sets without a common one are below the threshold, but for
those of shared text (`align.data.dedup.shared_text`), and one mark of the whole set.

Source: prefix filtering, Bayardo, Ma and Srikant 2007, "Scaling up all pairs similarity search".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from align.data.dedup.arrays import distinct, held, ranges, spans

BLOCK_PAIRS = 1 << 20
"""Pairs that are looked at together."""
FEW_PAIRS = 1 << 14
"""Documents with at most so many pairs among themselves are compared each with each."""
RUN = 1 << 22
"""Marks of kept documents from which on a run grows no more: to put two together, both are there twice."""

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

    def __len__(self) -> int:
        return len(self.mark)

    def until(self, document: float) -> tuple[Marked, Marked]:
        """The marks of documents before this one, and those of the others."""
        before = self.document < document
        return self.where(before), self.where(~before)

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


class Greedy:
    """What is kept and dropped so far.

    Args:
        similar: places of earlier and later documents, pair by pair → their similarity; less than the threshold where
            they are no pair that may be twins.
    """

    def __init__(self, similar: Callable[[np.ndarray, np.ndarray], np.ndarray], threshold: float):
        self.similar = similar
        self.threshold = threshold
        self.kept: list[Marked] = []  # runs, each at least four times as long as the next one, or of `RUN`
        self.twins: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # kept, dropped, similarity

    def decide(self, block: Marked) -> None:
        """The next documents in order."""
        self.keep(self.among(block.without(self.drop(*self.alike(self.kept, block)))))

    def among(self, block: Marked) -> Marked:
        """Decides documents that are no twins of earlier ones. Returns those that are kept."""
        few = int(block.meeting(block)[1].sum()) <= FEW_PAIRS + len(block)
        documents = distinct(block.document)
        if few or len(documents) == 1:
            return block.without(self.drop(*self.alike([block], block)))
        first, second = block.until(float(np.median(documents)))
        first = self.among(first)
        return first.together(self.among(second.without(self.drop(*self.alike([first], second)))))

    def alike(self, earlier: Sequence[Marked], later: Marked) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pairs that reach the threshold: documents of the former, which are kept, documents of the latter,
        similarities."""
        return joined([NONE, *(self.enough(one, other) for one, other in pairs(earlier, later))])

    def enough(self, one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        similarity = self.similar(one, other)
        enough = similarity >= self.threshold
        return one[enough], other[enough], similarity[enough]

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

    def keep(self, block: Marked) -> None:
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
