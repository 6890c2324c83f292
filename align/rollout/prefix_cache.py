"""What was computed of prompts that begin alike: keys and values of whole chunks, found by all that they depend on."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from torch import Tensor


class PrefixCache:
    """Blocks of one base, the ones used least lately making room.

    A block is known by the tenant, the adapter, and every token from the beginning of the prompt to its own end. So no
    other adapter, and no other tenant, ever finds it.

    Args:
        chunk: tokens of a block.
        most_bytes: of all blocks together.
    """

    def __init__(self, chunk: int, most_bytes: int) -> None:
        self.chunk, self.most_bytes, self.bytes = chunk, most_bytes, 0
        self._blocks: OrderedDict[bytes, Tensor] = OrderedDict()

    def keys(self, tenant: str, adapter: str | None, ids: Sequence[int]) -> Iterator[bytes]:
        """The key of each whole block of a prompt, but for one that holds its last token: that has to be computed, for
        what comes next."""
        kept = hashlib.sha256(repr((tenant, adapter)).encode())
        for first in range(0, len(ids) - self.chunk, self.chunk):
            kept.update(repr(ids[first : first + self.chunk]).encode())
            yield kept.digest()

    def get(self, key: bytes) -> Tensor | None:
        block = self._blocks.get(key)
        if block is not None:
            self._blocks.move_to_end(key)
        return block

    def put(self, key: bytes, block: Tensor) -> None:
        size = block.nbytes
        if key in self._blocks or size > self.most_bytes:
            return
        while self.bytes + size > self.most_bytes:
            self.bytes -= self._blocks.popitem(last=False)[1].nbytes
        self._blocks[key] = block
        self.bytes += size
