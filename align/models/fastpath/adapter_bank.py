"""A bank of LoRA adapters in memory, split into units of 16 ranks that are stacked in one tensor for each matrix.

Rows of different adapters share a batched product: each row is multiplied by its own A, then by its own B (Chen et al.,
Punica, 2023; Sheng et al., S-LoRA, 2023). The product reads consecutive units, so that those in use are moved to the
front.

The bits of a row do not depend on the other rows: products are of blocks of 4 or 8 rows of one adapter, and of at least
as many blocks as there are threads. For these shapes a row's result is the same beside any other rows
(`align.models.fastpath.exact` checks this on the machine).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from align.core.errors import require
from align.models.adapters import Adapter, list_adapter_files, read_adapter, require_configured_modules
from align.models.cpu_memory import reserve_zeros
from align.models.fastpath.exact import compute_min_batch
from align.models.plain_lora import convert_to_plain_lora, refuse_unsupported_adapter
from align.run.digests import require_same_bytes
from align.run.weights import SCORE_KEY

UNIT = 16
"""Number of ranks in a unit. An adapter whose rank is not a multiple is padded with zeros."""
BLOCKS = (4, 8)
"""Possible numbers of rows in a block."""


class Site(NamedTuple):
    """The matrices of one layer that read the same input, such as those of queries, keys and values.

    Attributes:
        modules: their names in an adapter's file.
        inputs, outputs: number of input features, and of each matrix's output features.
    """

    modules: tuple[str, ...]
    inputs: int
    outputs: tuple[int, ...]


class BlockedProduct(NamedTuple):
    """The plan of one batched matrix product of a step: its adapter units, blocks of rows, and the rows to add results
    to.

    Attributes:
        units: the consecutive units that are read; a single one is used by all blocks.
        blocks: number of blocks of rows.
        gather: the step's row at each position of the blocks [blocks · rows of a block].
        sums: consecutive rows that results are added to, with the position in the blocks of each; an adapter of several
            units is in several sums.
    """

    units: slice
    blocks: int
    gather: Tensor
    sums: Sequence[tuple[slice, Tensor]]


class AdapterBank:
    """An LRU cache of LoRA adapters in memory, whose matrices are stacked for batched products.

    Args:
        sites: the sites in the order of the forward pass.
        resident: maximum adapters.
        max_rank: maximum rank of an adapter.
        dtype: dtype of the weights.

    Attributes:
        units: digest of an adapter → its units.
        heads: digest of a reward model → its score head, fp32 [D].
    """

    def __init__(self, sites: Sequence[Site], resident: int, max_rank: int, dtype: torch.dtype) -> None:
        self.sites = tuple(sites)
        self.resident = resident
        self.max_rank = max_rank
        units = resident * -(-max_rank // UNIT)
        self.a = [reserve_zeros((units, site.inputs, UNIT * len(site.outputs)), dtype) for site in self.sites]
        self.b = [[reserve_zeros((units, UNIT, out), dtype) for out in site.outputs] for site in self.sites]
        self.units: OrderedDict[str, list[int]] = OrderedDict()
        self.heads: dict[str, Tensor] = {}
        self._free = list(range(units))[::-1]

    def __contains__(self, digest: str) -> bool:
        return digest in self.units

    def has_room(self, in_use: set[str]) -> bool:
        """Return whether another adapter can be loaded without removing one of the adapters `in_use`."""
        return len(in_use) < self.resident

    def load(self, digest: str, folder: Path, in_use: set[str]) -> None:
        """Load an adapter from its folder and mark it as most recently used, replacing the least recently used one if
        the bank is full. An adapter that is loaded already is only marked, and those in use are not replaced.

        Raises:
            CorruptFile, InputError: see `load_bank_adapter`.
        """
        if digest not in self.units:
            adapter = load_bank_adapter(folder, self.sites, self.max_rank)
            while len(self.units) >= self.resident:
                self.remove(next(each for each in self.units if each not in in_use))
            self.units[digest] = [self._free.pop() for _ in range(-(-adapter.config["r"] // UNIT))]
            if adapter.has_score_head:
                self.heads[digest] = adapter.tensors[SCORE_KEY].squeeze(0)
            try:
                self._write_units(self.units[digest], adapter)
            except BaseException:
                self.remove(digest)
                raise
        self.units.move_to_end(digest)

    def remove(self, digest: str) -> None:
        self._free += self.units.pop(digest)
        self.heads.pop(digest, None)

    def _write_units(self, units: Sequence[int], adapter: Adapter) -> None:
        factors = adapter.factors
        rank = UNIT * len(units)
        for site, a, bs in zip(self.sites, self.a, self.b, strict=True):
            for j, module in enumerate(site.modules):
                empty = torch.zeros(0, site.inputs), torch.zeros(site.outputs[j], 0)
                low_a, low_b = factors.get(module, empty)
                low_a = pad(low_a, (0, 0, 0, rank - len(low_a))).view(len(units), UNIT, -1)
                low_b = pad(low_b, (0, rank - low_b.shape[1])).T.reshape(len(units), UNIT, -1)
                a[units, :, UNIT * j : UNIT * (j + 1)] = low_a.mT.to(a.dtype)
                bs[j][units] = low_b.to(a.dtype)

    def bring_to_front(self, digests: Sequence[str]) -> list[list[str]]:
        """Swap the units of the given adapters to the front of the bank, so that a product reads consecutive units.
        First comes the first unit of each, then the second of those that have one, and so on.

        Returns:
            For each of these groups its adapters, in the order of their units.
        """
        first = 0
        stretches = []
        for k in range(max((len(self.units[digest]) for digest in digests), default=0)):
            owners = [digest for digest in digests if len(self.units[digest]) > k]
            places = range(first, first + len(owners))
            at_front = {self.units[digest][k] for digest in owners}
            away = [digest for digest in owners if self.units[digest][k] not in places]
            for digest, place in zip(away, (place for place in places if place not in at_front), strict=True):
                self._swap_units(self.units[digest][k], place)
            stretches.append(sorted(owners, key=lambda digest: self.units[digest][k]))
            first = places.stop
        return stretches

    def _swap_units(self, unit: int, other_unit: int) -> None:
        for tensor in (*self.a, *(b for bs in self.b for b in bs)):
            copy = tensor[other_unit].clone()
            tensor[other_unit] = tensor[unit]
            tensor[unit] = copy
        swapped = {unit: other_unit, other_unit: unit}
        for units in (self._free, *self.units.values()):
            units[:] = [swapped.get(unit, unit) for unit in units]

    def add_adapter_outputs(
        self, site_index: int, x_PI: Tensor, out_PO: Tensor, products: Sequence[BlockedProduct]
    ) -> None:
        """Add the LoRA output of each row's adapter to the output of one layer's matrices, in place.

        Args:
            site_index: index of the site.
            x_PI, out_PO: input and output of the site, with rows in the order of `plan_products`.
        """
        site = self.sites[site_index]
        outs = out_PO.split(site.outputs, 1)
        for product in products:
            x = x_PI.index_select(0, product.gather).view(product.blocks, -1, site.inputs)
            lows = torch.bmm(x, self.a[site_index][product.units].expand(product.blocks, -1, -1)).split(UNIT, 2)
            for low, b, out, width in zip(lows, self.b[site_index], outs, site.outputs, strict=True):
                added = torch.bmm(low, b[product.units].expand(product.blocks, -1, -1)).view(-1, width)
                for rows, places in product.sums:
                    out[rows].add_(added.index_select(0, places))


def load_bank_adapter(folder: Path, sites: Sequence[Site], max_rank: int) -> Adapter:
    """Read an adapter, convert it to plain LoRA, and check that its rank and modules fit the bank.

    Raises:
        CorruptFile: its files are truncated, hold values that are not finite, or do not fit the model.
        InputError: it cannot be converted to plain LoRA, exceeds the rank, or has modules that the bank does not.
    """
    # Both files must be of the same version.
    with require_same_bytes(list_adapter_files(folder), "adapter", str(folder)):
        adapter = read_adapter(folder, is_only_adapter=False)
    refuse_unsupported_adapter(adapter)
    plain = convert_to_plain_lora(adapter)
    rank = plain.config["r"]
    require(rank <= max_rank, "r", rank, f"is above stage.max_rank={max_rank}", "Raise stage.max_rank.")
    shapes = {m: (site.inputs, out) for site in sites for m, out in zip(site.modules, site.outputs, strict=True)}
    other_base = "Serve it on the base that it was trained on."
    for module, (a, b) in plain.factors.items():
        problem = "is no linear layer of this base's attention or MLP"
        remedy = "Serve it merged (export=merged), or by serve=vllm."
        require(module in shapes, "target_modules", module, problem, remedy)
        inputs, outputs = shapes[module]
        problem = f"this base has {outputs} by {inputs}"
        fits = (a.shape[1], len(b)) == (inputs, outputs)
        require(fits, module, f"{len(b)} by {a.shape[1]}", problem, other_base)
    require_configured_modules(adapter.config, plain.factors, shapes)
    if plain.has_score_head:
        shape = tuple(plain.tensors[SCORE_KEY].shape)
        require(shape == (1, sites[0].inputs), "score", shape, "is no head of this base", other_base)
    return plain


def plan_products(adapters: Sequence[str | None], bank: AdapterBank) -> tuple[list[int], list[BlockedProduct]]:
    """Group the rows of a forward pass into blocks, so that rows of several adapters share batched matrix products.

    The first rows of each adapter, up to 8, form one block of a common product. Further rows of an adapter have
    separate products with its units, and so do all rows if fewer units are in use than a product needs.

    Args:
        adapters: digest of each row's adapter; None for the base alone.

    Returns:
        The order in which the rows must be arranged, and the products.
    """
    rows: dict[str, list[int]] = {}
    for row, digest in enumerate(adapters):
        if digest is not None:
            rows.setdefault(digest, []).append(row)
    stretches = bank.bring_to_front(list(rows))
    size = BLOCKS[0] if max(map(len, rows.values()), default=0) <= BLOCKS[0] else BLOCKS[1]
    enough = len(rows) > 1 and sum(len(bank.units[digest]) for digest in rows) >= compute_min_batch()
    together = {digest: (own_rows[:size] if enough else []) for digest, own_rows in rows.items()}
    order = [row for digest in sorted(rows, key=lambda digest: -len(bank.units[digest])) for row in together[digest]]
    place = {row: i for i, row in enumerate(order)}
    products: list[BlockedProduct] = []
    if order:
        blocks = [[place[row] for row in together[digest]] for owners in stretches for digest in owners]
        first = 0
        sums = []
        for owners in stretches:
            places = {
                place[row]: size * (first + i) + j
                for i, digest in enumerate(owners)
                for j, row in enumerate(together[digest])
            }
            sums.append((slice(0, len(places)), torch.tensor([places[row] for row in range(len(places))])))
            first += len(owners)
        products.append(BlockedProduct(slice(0, len(blocks)), *pad_blocks(blocks, size), sums))
    for digest, own_rows in rows.items():
        if alone := own_rows[len(together[digest]) :]:
            begin = len(order)
            order += alone
            blocks = [list(range(i, min(i + size, len(order)))) for i in range(begin, len(order), size)]
            sums = [(slice(begin, len(order)), torch.arange(len(alone)))]
            filled = pad_blocks(blocks, size)
            products += [BlockedProduct(slice(unit, unit + 1), *filled, sums) for unit in bank.units[digest]]
    return order + [row for row, digest in enumerate(adapters) if digest is None], products


def pad_blocks(blocks: list[list[int]], size: int) -> tuple[int, Tensor]:
    """Pad each block of rows to `size` with copies of its first row, and the list of blocks to the minimum of a batched
    product. Returns the number of blocks and their rows."""
    full = [block + block[:1] * (size - len(block)) for block in blocks]
    full += [full[0]] * (compute_min_batch() - len(full))
    return len(full), torch.tensor([row for block in full for row in block])
