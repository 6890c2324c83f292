"""A bank of adapters: plain LoRA, cut into units of 16 ranks, side by side in one tensor a matrix.

Rows of different adapters go through one batched product: x of each row through its own A, then through its own B
(Chen et al., Punica, 2023; Sheng et al., S-LoRA, 2023). The product reads units that stand side by side, so those in
use are kept at the front.

A row's bits do not depend on its neighbours. Products are of blocks of 4 or 8 rows of one adapter, and of as many
blocks as there are threads at least: these shapes are the ones for which a row comes out the same beside any other
(`align.models.fastpath.exact` asks the machine).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from align.core.errors import InputError, require
from align.models.adapter_files import (
    Factors,
    adapter_config,
    check_targets,
    factors_in,
    files_of_adapter,
    head_in,
    read_adapter,
)
from align.models.fastpath.exact import least_batch
from align.models.lowering import check_plain, lower
from align.models.memory import untouched
from align.run.digests import same_bytes

UNIT = 16
"""Ranks of a unit. An adapter of another rank is filled up with zeros."""
BLOCKS = (4, 8)
"""Rows of a block."""
OTHER_BASE = "Serve it on the base that it was trained on."


class Site(NamedTuple):
    """Matrices of one layer that read the same input.

    Attributes:
        modules: their names, as an adapter's file has them.
        inputs, outputs: features in, and out of each.
    """

    modules: tuple[str, ...]
    inputs: int
    outputs: tuple[int, ...]


class Pass(NamedTuple):
    """One batched product of a step.

    Attributes:
        first, units: the units that are read, side by side; or one unit for all blocks, where `units` is 1.
        blocks: how many blocks of rows.
        gather: which row of the step stands where in the blocks [blocks · rows of a block].
        sums: rows that something is added to, side by side, and where in the blocks it stands for each of them; an
            adapter of several units is in several sums.
    """

    first: int
    units: int
    blocks: int
    gather: Tensor
    sums: Sequence[tuple[slice, Tensor]]


class Bank:
    """Adapters in memory, the ones used least lately making room.

    Args:
        sites: in the order of the pass.
        resident: adapters at most.
        max_rank: of an adapter.
        dtype: of the weights; the model's.

    Attributes:
        units: of each adapter, where they stand.
        heads: of those that are reward models, fp32 [D].
    """

    def __init__(self, sites: Sequence[Site], resident: int, max_rank: int, dtype: torch.dtype) -> None:
        self.sites, self.resident, self.max_rank = tuple(sites), resident, max_rank
        units = resident * -(-max_rank // UNIT)
        self.a = [untouched((units, site.inputs, UNIT * len(site.outputs)), dtype) for site in self.sites]
        self.b = [[untouched((units, UNIT, out), dtype) for out in site.outputs] for site in self.sites]
        self.units: OrderedDict[str, list[int]] = OrderedDict()
        self.heads: dict[str, Tensor] = {}
        self._free = list(range(units))[::-1]

    def __contains__(self, digest: str) -> bool:
        return digest in self.units

    def room(self, in_use: set[str]) -> bool:
        """Whether another adapter can be taken in beside those that are in use."""
        return len(in_use) < self.resident

    def put(self, digest: str, folder: Path, in_use: set[str]) -> None:
        """Take an adapter in; one that is there already counts as used again.

        Raises:
            CorruptFile, InputError: see `lowered`.
        """
        if digest not in self.units:
            pieces = lowered(folder, self.sites, self.max_rank)
            while len(self.units) >= self.resident:
                self.remove(next(each for each in self.units if each not in in_use))
            self.units[digest] = [self._free.pop() for _ in range(-(-pieces.rank // UNIT))]
            if pieces.head is not None:
                self.heads[digest] = pieces.head
            try:
                self._write(self.units[digest], pieces)
            except BaseException:
                self.remove(digest)
                raise
        self.units.move_to_end(digest)

    def remove(self, digest: str) -> None:
        self._free += self.units.pop(digest)
        self.heads.pop(digest, None)

    def _write(self, units: Sequence[int], pieces: Lowered) -> None:
        for site, a, bs in zip(self.sites, self.a, self.b, strict=True):
            for j, module in enumerate(site.modules):
                for k, unit in enumerate(units):
                    into_a, into_b = a[unit, :, UNIT * j : UNIT * (j + 1)], bs[j][unit]
                    if module not in pieces.factors:
                        into_a.zero_()
                        into_b.zero_()
                        continue
                    low_a, low_b = pieces.factors[module]
                    ranks = slice(UNIT * k, UNIT * (k + 1))
                    copied(into_a, low_a[ranks].T, 1)
                    copied(into_b, low_b[:, ranks].T, 0)

    def bring_to_front(self, digests: Sequence[str]) -> list[list[str]]:
        """Let the units of these adapters stand at the front: the first of each, then the second of those that have
        one, and so on. Returns the adapters of each of these stretches, in the order of their units."""
        first, stretches, owner = 0, [], {unit: d for d, units in self.units.items() for unit in units}
        for k in range(max((len(self.units[d]) for d in digests), default=0)):
            mine = [d for d in digests if len(self.units[d]) > k]
            last = first + len(mine)
            away = [d for d in mine if not first <= self.units[d][k] < last]
            there = {self.units[d][k] for d in mine}
            for digest, unit in zip(away, (u for u in range(first, last) if u not in there), strict=True):
                self._swap(self.units[digest][k], unit, owner)
            stretches.append(sorted(mine, key=lambda d: self.units[d][k]))
            first = last
        return stretches

    def _swap(self, one: int, other: int, owner: dict[int, str]) -> None:
        for tensor in (*self.a, *(b for bs in self.b for b in bs)):
            if other in owner:
                kept = tensor[other].clone()
                tensor[other] = tensor[one]
                tensor[one] = kept
            else:
                tensor[other] = tensor[one]
        if other not in owner:
            self._free[self._free.index(other)] = one
        pair = {one: other, other: one}
        for digest in {owner.get(one), owner.get(other)} - {None}:
            self.units[str(digest)] = [pair.get(unit, unit) for unit in self.units[str(digest)]]
        swapped = {pair[unit]: owner.pop(unit) for unit in (one, other) if unit in owner}
        owner.update(swapped)

    def add_step(self, number: int, x_PI: Tensor, out_PO: Tensor, plan: Sequence[Pass]) -> None:
        """Add what each row's adapter adds at a site, in place.

        Args:
            number: of the site.
            x_PI, out_PO: the site's input and output, rows as the plan has them.
        """
        a, bs, site = self.a[number], self.b[number], self.sites[number]
        outs = out_PO.split(site.outputs, 1)
        for each in plan:
            x = x_PI.index_select(0, each.gather).view(each.blocks, -1, site.inputs)
            units = slice(each.first, each.first + each.units)
            lows = torch.bmm(x, spread(a[units], each.blocks)).split(UNIT, 2)
            for low, b, out, width in zip(lows, bs, outs, site.outputs, strict=True):
                more = torch.bmm(low, spread(b[units], each.blocks)).view(-1, width)
                for rows, at in each.sums:
                    out[rows].add_(more.index_select(0, at))


def spread(units: Tensor, blocks: int) -> Tensor:
    """Weights for so many blocks: one for each, or one for all of them."""
    return units if len(units) == blocks else units.expand(blocks, -1, -1)


def copied(into: Tensor, given: Tensor, dim: int) -> None:
    """A piece that may be short of ranks, along `dim`, and zeros behind it."""
    ranks = given.shape[dim]
    into.narrow(dim, 0, ranks).copy_(given)
    into.narrow(dim, ranks, UNIT - ranks).zero_()


class Lowered(NamedTuple):
    """An adapter as plain LoRA of one rank, to be multiplied by nothing; of a reward model, its head too [D]."""

    rank: int
    factors: Mapping[str, Factors]
    head: Tensor | None = None


def lowered(folder: Path, sites: Sequence[Site], max_rank: int) -> Lowered:
    """Read an adapter that can stand in a bank.

    Raises:
        CorruptFile: its files are truncated, or hold values that are not finite, or do not fit the model.
        InputError: it is more than LoRA, of a higher rank, or on modules that the bank has no place for.
    """
    with same_bytes(files_of_adapter(folder), "adapter", str(folder)):
        config = adapter_config(folder)
        adapter = read_adapter(folder)
        read_factors = factors_in(folder)
        head = head_in(folder) if adapter.scores else None
    check_plain(adapter)
    plain, factors = lower(config, read_factors)
    known = {m: (s.inputs, out) for s in sites for m, out in zip(s.modules, s.outputs, strict=True)}
    require(plain["r"] <= max_rank, "r", plain["r"], f"is over stage.max_rank={max_rank}", "Raise stage.max_rank.")
    for module, (a, b) in factors.items():
        if module not in known:
            problem = "is no linear layer of this base's attention or MLP"
            raise InputError("target_modules", module, problem, "Serve it merged (export=merged), or by serve=vllm.")
        fits = (a.shape[1], b.shape[0]) == known[module]
        require(
            fits, module, f"{b.shape[0]} by {a.shape[1]}", f"this base has {known[module][1]} by {known[module][0]}",
            OTHER_BASE,
        )  # fmt: skip
    check_targets(config, factors, known)
    fits = head is None or head.shape == (sites[0].inputs,)
    require(fits, "score", tuple(head.shape) if head is not None else None, "is no head of this base", OTHER_BASE)
    return Lowered(plain["r"], factors, head)


def plan_of(adapters: Sequence[str | None], bank: Bank) -> tuple[list[int], list[Pass]]:
    """How rows of these adapters go through the bank together.

    Returns the order in which rows have to stand, and the passes. Rows that share an adapter stand in one block of up
    to 8; what an adapter has more of goes through its units in blocks of its own, and so do all rows where fewer units
    are asked for than a product has at least.
    """
    rows: dict[str, list[int]] = {}
    for row, digest in enumerate(adapters):
        if digest is not None:
            rows.setdefault(digest, []).append(row)
    stretches = bank.bring_to_front(list(rows))
    size = BLOCKS[0] if max(map(len, rows.values()), default=0) <= BLOCKS[0] else BLOCKS[1]
    enough = len(rows) > 1 and sum(len(bank.units[d]) for d in rows) >= least_batch()
    together = {d: (mine[:size] if enough else []) for d, mine in rows.items()}
    most_units_first = sorted(rows, key=lambda d: -len(bank.units[d]))
    order = [row for d in most_units_first for row in together[d]]
    place = {row: i for i, row in enumerate(order)}
    plan: list[Pass] = []
    if order:
        blocks = [[place[row] for row in together[d]] for mine in stretches for d in mine]
        first, sums = 0, []
        for mine in stretches:
            at = {place[row]: size * (first + i) + j for i, d in enumerate(mine) for j, row in enumerate(together[d])}
            sums.append((slice(0, len(at)), torch.tensor([at[row] for row in range(len(at))])))
            first += len(mine)
        plan.append(Pass(0, len(blocks), *gathered(blocks, size), sums))
    for digest, mine in rows.items():
        if more := mine[len(together[digest]) :]:
            begin, order = len(order), [*order, *more]
            blocks = [list(range(i, min(i + size, len(order)))) for i in range(begin, len(order), size)]
            sums = [(slice(begin, len(order)), torch.arange(len(more)))]
            plan += [Pass(unit, 1, *gathered(blocks, size), sums) for unit in bank.units[digest]]
    return order + [row for row, digest in enumerate(adapters) if digest is None], plan


def gathered(blocks: list[list[int]], size: int) -> tuple[int, Tensor]:
    """How many blocks there are, filled up to their size, and as many as a product has at least; and the rows in
    them."""
    full = [block + block[:1] * (size - len(block)) for block in blocks]
    full += [full[0]] * (least_batch() - len(full))
    return len(full), torch.tensor([row for block in full for row in block])
