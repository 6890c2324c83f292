"""The interface of rollout engines, which sample responses to prompts from actors, and the seeds of the sampling."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from align.core.errors import LONE_SURROGATE, NonFiniteLogits, require
from align.core.types import Rollout
from align.models.actors import Actor, save_snapshot
from align.models.finite_checks import build_divergence_error
from align.models.forward import pad_rows
from align.run import Base


@contextmanager
def convert_divergence_errors(model_name: str, lr: float | None, dtype: str) -> Iterator[None]:
    """Convert NonFiniteLogits raised in the block to an InputError about a model that has diverged.

    Args:
        model_name: the model's name for the message.
        lr, dtype: see `align.models.finite_checks.build_divergence_error`.
    """
    try:
        yield
    except NonFiniteLogits as error:
        raise build_divergence_error(f"{model_name}, answers nothing: {error}", lr, dtype) from error


class Engine(Protocol):
    """The interface of a rollout engine, which samples one response per prompt from softmax(logits / temperature).

    The checkpoint's generation settings (top-k, top-p, penalties) are ignored, so that the samples come from the
    distribution whose logprobs are used.

    `align.rollout.registry.open_engine` opens and closes one.
    """

    @property
    def temperature(self) -> float:
        """The number that logits are divided by; 0 is greedy decoding, see `use_greedy_decoding`."""
        ...

    @temperature.setter
    def temperature(self, temperature: float) -> None: ...

    def load(self, base: Base, method: str, dtype: torch.dtype) -> None:
        """Load the base model in the learner's precision. Called once, before any other method.

        Args:
            method, dtype: see `align.models.load.load_base`.
        """
        ...

    def sync(self, actor: Actor) -> None:
        """Update the engine's copy of an actor's weights to their present values, if the engine has a copy.

        The caller calls it before the actor is first sampled, and after each training step. An engine with its own
        weights takes a snapshot (`align.models.actors.save_snapshot`) if they changed, and drops the previous one; an
        engine that samples from the actor's own model does nothing.
        """
        ...

    def close(self) -> None:
        """Release the memory, processes and files that `load` and `sync` have created."""
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], actor: Actor | Sequence[Actor], seeds: Sequence[int]
    ) -> Rollout:
        """Sample a response for each prompt, and return them in the order of the prompts with their tokens' logprobs.

        Args:
            actor: the actor that responds to all prompts, or a list with one actor for each prompt.
            seeds: one for each prompt (`derive_row_seeds`). The sampled token at a position depends on the row's seed
                and the position, and not on the rest of the batch.

        Raises:
            InputError: an actor's adapter is missing; no other weights are used in its place.
            NonFiniteLogits: the logits of a row are not finite.
        """
        ...


@contextmanager
def use_greedy_decoding(engine: Engine) -> Iterator[None]:
    """Set an engine's temperature to 0 during the block, so that it decodes greedily regardless of the seeds."""
    temperature = engine.temperature
    engine.temperature = 0.0
    try:
        yield
    finally:
        engine.temperature = temperature


def group_rows_by_actor(actor: Actor | Sequence[Actor], rows: int) -> dict[Actor, list[int]]:
    """Return actor → the indices of the rows that it samples.

    Args:
        actor: the actor of all rows, or a list with one actor for each row.

    Raises:
        ValueError: the list has another length than `rows`.
    """
    if not isinstance(actor, Sequence):
        return {actor: list(range(rows))}
    if len(actor) != rows:
        raise ValueError(f"{len(actor)} actors for {rows} prompts")
    rows_of: dict[Actor, list[int]] = {}
    for row, each in enumerate(actor):
        rows_of.setdefault(each, []).append(row)
    return rows_of


def build_rollout(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float]],
    ended: Sequence[bool],
    pad_id: int,
) -> Rollout:
    """Pad prompts on the left and responses with their logprobs on the right, and return them as a Rollout."""
    tokens = torch.cat([pad_rows(prompts, pad_id, pad_left=True), pad_rows(responses, pad_id)], 1)
    prompt_mask = pad_rows([[1] * len(row) for row in prompts], 0, pad_left=True)
    response_mask = pad_rows([[1] * len(row) for row in responses], 0)
    mask = torch.cat([prompt_mask, response_mask], 1).bool()
    logprobs_BT = torch.zeros(len(responses), max(map(len, responses)))
    for row, values in enumerate(logprobs):
        logprobs_BT[row, : len(values)] = torch.tensor(values)
    return Rollout(tokens, mask, max(map(len, prompts)), torch.tensor(ended), logprobs_BT)


def extract_response_ids(rollout: Rollout) -> list[list[int]]:
    """Return the token ids of each response, including its stop token."""
    rows = zip(rollout.response_BT.tolist(), rollout.response_mask_BT.tolist(), strict=True)
    return [[i for i, real in zip(ids, mask, strict=True) if real] for ids, mask in rows]


def decode_responses(rollout: Rollout, tokenizer: Any) -> list[str]:
    """Decode each response of a rollout to text, without its stop token.

    A lone surrogate, which a broken tokenizer may produce, is replaced by U+FFFD, because no file, database or other
    tokenizer accepts it.
    """
    rows = zip(extract_response_ids(rollout), rollout.ended_B.tolist(), strict=True)
    return [decode_response(tokenizer, ids, ended) for ids, ended in rows]


def decode_response(tokenizer: Any, ids: Sequence[int], has_stop_token: bool) -> str:
    """Decode one response's token ids to text, without its stop token, special tokens and outer whitespace.

    Args:
        has_stop_token: whether the last token is a stop token.
    """
    answer_ids = ids[:-1] if has_stop_token else ids
    return LONE_SURROGATE.sub("\ufffd", tokenizer.decode(answer_ids, skip_special_tokens=True)).strip()


CUT = 0.1
"""Smallest share of answers cut at the length limit that causes a warning."""


def warn_about_cut_answers(cut_share: float, max_new_tokens: int, whose: str = "") -> list[str]:
    """Return a list with a warning if many answers were cut at the length limit, or an empty list otherwise.

    Args:
        cut_share: share of the answers that were cut.
        max_new_tokens: maximum tokens of an answer.
        whose: adjective for the answers, followed by a space.
    """
    if cut_share < CUT:
        return []
    cut = f"{cut_share:.0%} of the {whose}answers were cut at rollout.max_new_tokens={max_new_tokens}"
    return [f"{cut}: raise it for whole ones"]


def concatenate_rollouts(parts: Sequence[Rollout], order: Tensor, pad_id: int) -> Rollout:
    """Concatenate rollouts, padded to common widths, and return their rows in the original order.

    Args:
        order: the original row of each row of the concatenation.
        pad_id: token id for padding.
    """
    from torch.nn.functional import pad as pad_columns

    width_P = max(p.prompt_width for p in parts)
    width_T = max(p.tokens_BS.shape[1] - p.prompt_width for p in parts)

    def widen(x: Tensor, part: Rollout, value: int) -> Tensor:
        right = width_T - (x.shape[1] - part.prompt_width)
        return pad_columns(x, (width_P - part.prompt_width, right), value=value)

    tokens = torch.cat([widen(p.tokens_BS, p, pad_id) for p in parts])
    mask = torch.cat([widen(p.mask_BS, p, 0) for p in parts])
    ended_B = torch.cat([p.ended_B for p in parts])
    inverse = torch.argsort(order)
    logprobs = [pad_columns(x, (0, width_T - x.shape[1])) for p in parts if (x := p.logprobs_BT) is not None]
    logprobs_BT = torch.cat(logprobs)[inverse] if len(logprobs) == len(parts) else None
    return Rollout(tokens[inverse], mask[inverse], width_P, ended_B[inverse], logprobs_BT)


class SnapshotEngine:
    """A mixin for rollout engines with their own copy of the weights, which load a snapshot of each actor's adapter.

    Attributes:
        name: the engine's name in `rollout.engine`.
        base, snapshots: the base, and the folder of snapshots; set by `load`.
        digests: actor → digest of its snapshot; None for the base.
    """

    name: ClassVar[str]
    base: Base
    snapshots: Path
    digests: dict[Actor, str | None]

    def sync(self, actor: Actor) -> None:
        """Save and load a snapshot of an actor's adapter, and drop its previous one if no other actor uses it.

        Raises:
            InputError: the actor is not a plain adapter.
        """
        folder = None
        if not actor.is_bare_base:
            folder = save_snapshot(actor, self.base, self.snapshots)
            is_adapter = (folder / "adapter_config.json").is_file()
            require(is_adapter, "rollout.engine", self.name, "answers by adapters alone", "Use rollout=hf.")
        self.load_snapshot(actor, folder)
        old_digest = self.digests.get(actor)
        self.digests[actor] = None if folder is None else folder.name
        if old_digest is not None and old_digest not in self.digests.values():
            self.drop_snapshot(old_digest)

    def load_snapshot(self, actor: Actor, folder: Path | None) -> None:
        """Load the adapter snapshot in `folder`, or without one, prepare for sampling an actor from the base."""
        raise NotImplementedError

    def drop_snapshot(self, digest: str) -> None:
        raise NotImplementedError

    def digests_of_rows(self, actor: Actor | Sequence[Actor], rows: int) -> list[str | None]:
        """Return the digest of the adapter snapshot that each row is sampled from, None for the base.

        Actors without a snapshot are synced first.
        """
        actors = actor if isinstance(actor, Sequence) else [actor] * rows
        for each in group_rows_by_actor(actor, rows):
            if each not in self.digests:
                self.sync(each)
        return [self.digests[each] for each in actors]


def derive_place_seed(*where: Any) -> int:
    """Hash a tuple such as `(seed, "rollout", update, row)` to a 63-bit seed."""
    return int.from_bytes(hashlib.sha256(repr(where).encode()).digest()[:8], "big") >> 1


def build_generator(device: torch.device, seed: int, *where: str | int) -> torch.Generator:
    """Return a random generator seeded by a hash of a tuple such as `(seed, "minibatches", update)`."""
    return torch.Generator(device).manual_seed(derive_place_seed(seed, *where))


def derive_row_seeds(rows: Iterable[Any], seed: int, *where: str | int) -> list[int]:
    """Return a seed for each row, which is a hash of `seed`, the parts of `where`, and the row's key.

    Because a row's samples depend on its own seed only, they do not depend on the number of rows, their order, or the
    process.

    Args:
        rows: unique keys of the rows at that place, such as their numbers.
    """
    return [derive_place_seed(seed, *where, row) for row in rows]
