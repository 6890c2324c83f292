"""Hash chains: the content that a link's hash covers, and refusal of a link that does not follow."""

from dataclasses import dataclass

import pytest

from align.core.chain import ChainHead, hash_link, verify_successor
from align.core.errors import CorruptFile


@dataclass(frozen=True)
class Line:
    """A link of another chain than the ledger's."""

    seq: int
    name: str
    prev_hash: str
    hash: str

    @property
    def hashed(self):
        return (self.seq, self.name)


def build_line(seq: int, name: str, prev_hash: str) -> Line:
    return Line(seq, name, prev_hash, hash_link((seq, name), prev_hash))


@pytest.mark.parametrize(
    ("link", "seq", "problem"),
    [
        (build_line(3, "b", "f" * 64), 2, "missing"),
        (build_line(2, "b", "e" * 64), 2, "does not follow"),
        (Line(2, "c", "f" * 64, build_line(2, "b", "f" * 64).hash), 2, "not the one that was written"),
    ],
)
def test_the_first_bad_link_is_named_as_its_owner_calls_it(link: Line, seq: int, problem: str):
    with pytest.raises(CorruptFile, match=problem) as caught:
        verify_successor(ChainHead(1, "f" * 64), link, "aliases", "Restore it.")
    assert (caught.value.field, caught.value.value, caught.value.remedy) == ("aliases", seq, "Restore it.")
