"""The index of a packed batch: positions of its tokens without padding, and common prefixes of its rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LEAST_SHARED = 1 / 8
"""Share of the real tokens that common prefixes must save to be computed once. Each layer then copies queries, keys,
values and the output of attention, which takes a few hundredths of a pass."""


class PackedIndex(NamedTuple):
    """The positions of a batch's N computed tokens in its padded input and in left-aligned rows. The input [B, W] may
    have padding anywhere. The left-aligned rows are [B, S], where S is the longest length.

    N is the number A of real tokens, or less if rows share a common prefix, which is computed once.

    Attributes:
        mask_BW: True at real tokens.
        longest: S.
        input_indices_A, aligned_indices_A: flat indices of the real tokens in the input and in the left-aligned rows;
            None if there is no padding.
        shared: the shared prefixes; None if every real token is computed.
    """

    mask_BW: Tensor
    longest: int
    input_indices_A: Tensor | None
    aligned_indices_A: Tensor | None
    shared: SharedPrefixes | None = None

    @classmethod
    def build(cls, mask_BW: Tensor, *inputs_BW: Tensor) -> PackedIndex:
        """Build the index of a batch from its mask, and find common prefixes of its rows if `inputs_BW` are given.

        Args:
            inputs_BW: all inputs of a token besides the previous tokens of its row: ids and positions. Without them no
                prefixes are shared.
        """
        if bool(mask_BW.all()):
            shared = SharedPrefixes.find(mask_BW, *inputs_BW) if inputs_BW else None
            return cls(mask_BW, mask_BW.shape[1], None, None, shared)
        longest = int(mask_BW.sum(-1).max())
        given_A = mask_BW.flatten().nonzero().squeeze(-1)
        column_A = (mask_BW.long().cumsum(-1) - 1)[mask_BW]
        pushed_A = given_A // mask_BW.shape[1] * longest + column_A
        shared = None
        if inputs_BW:
            mask = mask_BW.new_zeros(len(mask_BW) * longest).index_fill_(0, pushed_A, True)
            aligned = (x.new_zeros(mask.shape).index_copy_(0, pushed_A, x.flatten()[given_A]) for x in inputs_BW)
            shared = SharedPrefixes.find(*(x.view(-1, longest) for x in (mask, *aligned)))
        return cls(mask_BW, longest, given_A, pushed_A, shared)

    def real(self, x_BW: Tensor) -> Tensor:
        """Return the values of a padded tensor at the computed tokens [N]."""
        x_A = x_BW.reshape(-1)
        return self.reduce(x_A if self.input_indices_A is None else x_A[self.input_indices_A])

    def lengths(self) -> list[int]:
        """Return the number of real tokens of each row."""
        return self.mask_BW.sum(-1).tolist()

    def rectangle(self, x_ND: Tensor) -> Tensor:
        """Scatter the values of the N computed tokens to all their positions in the padded input [B, W, …], with 0 at
        padding."""
        x_AD = self.expand(x_ND)
        shape = (*self.mask_BW.shape, *x_AD.shape[1:])
        if self.input_indices_A is None:
            return x_AD.view(shape)
        return (
            x_AD.new_zeros(self.mask_BW.numel(), *x_AD.shape[1:]).index_copy(0, self.input_indices_A, x_AD).view(shape)
        )

    def expand(self, x_ND: Tensor) -> Tensor:
        """Repeat the values of the N computed tokens at each of the A real tokens that they stand for, row by row."""
        # Not x[of_A]: its backward pass adds bf16 up in bf16, and in an order that several threads change.
        return x_ND if self.shared is None else x_ND.index_select(0, self.shared.of_A)

    def expand_once(self, x_ND: Tensor) -> Tensor:
        """Place the N computed tokens at the first of their positions among the A real tokens [A, …], with 0 elsewhere.
        This is the transpose of `reduce`."""
        if self.shared is None:
            return x_ND
        return x_ND.new_zeros(len(self.shared.of_A), *x_ND.shape[1:]).index_copy_(0, self.shared.first_N, x_ND)

    def reduce(self, x_AD: Tensor) -> Tensor:
        """Select the value at the first position of each of the N computed tokens among the A real tokens. This is the
        inverse of `expand`."""
        return x_AD if self.shared is None else x_AD[self.shared.first_N]

    def reduce_by_sum(self, x_AD: Tensor) -> Tensor:
        """Sum the values over all positions of each of the N computed tokens among the A real tokens. This is the
        transpose of `expand`."""
        if self.shared is None:
            return x_AD
        zeros = x_AD.new_zeros(len(self.shared.first_N), *x_AD.shape[1:])
        return zeros.index_add_(0, self.shared.of_A, x_AD)

    def to_groups(self, x_AHD: Tensor, groups: int) -> Tensor:
        """Arrange heads [A, H, D] as left-aligned rows [B · groups, H / groups · S, D] for attention, with 0 after the
        rows' ends."""
        rows = len(self.mask_BW)
        heads, width = x_AHD.shape[1:]
        if self.aligned_indices_A is not None:
            x_AHD = x_AHD.new_zeros(rows * self.longest, heads, width).index_copy_(0, self.aligned_indices_A, x_AHD)
        x = x_AHD.view(rows, self.longest, groups, heads // groups, width).permute(0, 2, 3, 1, 4)
        return x.reshape(rows * groups, -1, width)

    def from_groups(self, x: Tensor, heads: int) -> Tensor:
        """Arrange left-aligned rows of attention as heads [A, H, D] again, the inverse of `to_groups`."""
        rows = len(self.mask_BW)
        width = x.shape[-1]
        x = x.view(rows, -1, heads // (len(x) // rows), self.longest, width).permute(0, 3, 1, 2, 4)
        x_AHD = x.reshape(rows * self.longest, heads, width)
        return x_AHD if self.aligned_indices_A is None else x_AHD[self.aligned_indices_A]


class SharedPrefixes(NamedTuple):
    """The distinct tokens of rows with common prefixes, which are computed once. A token's result depends only on
    itself and the previous tokens, so that rows with equal prefixes have equal results there.

    Attributes:
        of_A: index among the N distinct tokens of each real token.
        first_N: index of the first real token, rows sorted by their ids, that equals each distinct token.
    """

    of_A: Tensor
    first_N: Tensor

    @classmethod
    def find(cls, mask_BS: Tensor, *inputs_BS: Tensor) -> SharedPrefixes | None:
        """Find the common prefixes of left-aligned rows, or return None if sharing them would save less than
        `LEAST_SHARED`.

        Args:
            mask_BS: mask of left-aligned rows.
            inputs_BS: the inputs of each token, non-negative.
        """
        inputs_BSI = torch.stack(inputs_BS, -1)
        # In lexicographic order a row shares its longest prefix with the row above it. Padding (−1) sorts first.
        words = inputs_BSI.masked_fill(~mask_BS[..., None], -1).flatten(1).tolist()
        order = torch.tensor(sorted(range(len(words)), key=words.__getitem__), device=mask_BS.device)
        mask = mask_BS[order]
        inputs = inputs_BSI[order]
        is_equal = (inputs[1:] == inputs[:-1]).all(-1) & mask[1:] & mask[:-1]
        is_shared = torch.zeros_like(mask)  # with the row above
        is_shared[1:] = is_equal.long().cumprod(-1).bool()
        if int(is_shared.sum()) < LEAST_SHARED * int(mask.sum()):
            return None
        new = mask & ~is_shared
        number = torch.where(new, (new.flatten().cumsum(0) - 1).view(new.shape), -1)
        of_BS = torch.empty_like(number)
        of_BS[order] = number.cummax(0).values  # the last new token in the column; meaningless at padding
        index_BS = (mask_BS.flatten().cumsum(0) - 1).view(mask_BS.shape)  # among the A real tokens
        return cls(of_BS[mask_BS], index_BS[order][new])
