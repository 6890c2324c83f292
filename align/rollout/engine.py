"""Rollout engines: prompts and who answers them in, a `Rollout` out; and the seeds that they draw by."""

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
from align.models.actors import Actor, snapshot
from align.models.finite_checks import diverged
from align.models.forward import pad
from align.run import Base


@contextmanager
def divergence_as_input_error(model_name: str, lr: float | None, dtype: str) -> Iterator[None]:
    """Around an engine's work: a model that has no distribution to draw from, as the user's error.

    Args:
        model_name: as the user knows it.
        lr, dtype: see `align.models.finite_checks.diverged`.
    """
    try:
        yield
    except NonFiniteLogits as error:
        raise diverged(f"{model_name}, answers nothing: {error}", lr, dtype) from error


class Engine(Protocol):
    """Samples one response a prompt from softmax(logits / temperature): no top-k, no top-p, no penalty, whatever the
    checkpoint's generation settings say, so that the samples come from the distribution whose logprobs are used.

    `align.rollout.registry.open_engine` loads one and closes it.
    """

    @property
    def temperature(self) -> float:
        """The divisor of the logits; 0 takes the likeliest token. See `greedily`."""
        ...

    @temperature.setter
    def temperature(self, temperature: float) -> None: ...

    def load(self, base: Base, method: str, dtype: torch.dtype) -> None:
        """Get ready to answer on this base, kept as the learner keeps it. Called once, before anything else.

        Args:
            method, dtype: as `align.models.load.load_base` takes them.
        """
        ...

    def sync(self, actor: Actor) -> None:
        """Answer from now on with this actor's weights as they stand. The caller calls it before an actor speaks, and
        again once the actor has learned. An engine with weights of its own takes a snapshot
        (`align.models.actors.snapshot`) where they changed, and lets go of the one before; an engine that samples
        from the actor's own model has nothing to do."""
        ...

    def close(self) -> None:
        """Let go of what `load` took."""
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], actor: Actor | Sequence[Actor], seeds: Sequence[int]
    ) -> Rollout:
        """Responses in the order of the prompts, with the engine's own logprobs of their tokens.

        Args:
            actor: who answers; or a list of them, one a prompt.
            seeds: one a prompt (`row_seeds`). What is drawn at a position is a function of the row's seed and of the
                position, regardless of what else is sampled with it.

        Raises:
            InputError: an actor's adapter is not there; nobody else answers in its place.
            NonFiniteLogits: the logits of a row are not finite.
        """
        ...


@contextmanager
def greedily(engine: Engine) -> Iterator[None]:
    """Inside the block the engine takes the likeliest token at each position, regardless of the seeds."""
    before = engine.temperature
    engine.temperature = 0.0
    try:
        yield
    finally:
        engine.temperature = before


def rows_by_actor(actor: Actor | Sequence[Actor], rows: int) -> dict[Actor, list[int]]:
    """Return the rows that each actor answers.

    Raises:
        ValueError: there are other than so many.
    """
    if not isinstance(actor, Sequence):
        return {actor: list(range(rows))}
    if len(actor) != rows:
        raise ValueError(f"{len(actor)} actors for {rows} prompts")
    rows_of: dict[Actor, list[int]] = {}
    for row, each in enumerate(actor):
        rows_of.setdefault(each, []).append(row)
    return rows_of


def rollout_of(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float]],
    ended: Sequence[bool],
    pad_id: int,
) -> Rollout:
    """Prompts, the tokens that were drawn for each, and the logprobs that they were drawn with, as one rectangle."""
    tokens = torch.cat([pad(prompts, pad_id, left=True), pad(responses, pad_id)], 1)
    ones = ([[1] * len(row) for row in side] for side in (prompts, responses))
    mask = torch.cat([pad(side, 0, left) for side, left in zip(ones, (True, False), strict=True)], 1).bool()
    drawn_BT = torch.zeros(len(responses), max(map(len, responses)))
    for row, values in enumerate(logprobs):
        drawn_BT[row, : len(values)] = torch.tensor(values)
    return Rollout(tokens, mask, max(map(len, prompts)), torch.tensor(ended), drawn_BT)


def response_ids(rollout: Rollout) -> list[list[int]]:
    """The sampled tokens of each response, its stop token included."""
    rows = zip(rollout.response_BT.tolist(), rollout.response_mask_BT.tolist(), strict=True)
    return [[i for i, real in zip(ids, mask, strict=True) if real] for ids, mask in rows]


def response_texts(rollout: Rollout, tokenizer: Any) -> list[str]:
    """Each response as text, without its stop token. Half a character, which a broken tokenizer may make, is U+FFFD: no
    file, database or other tokenizer takes it."""
    rows = zip(response_ids(rollout), rollout.ended_B.tolist(), strict=True)
    return [response_text(tokenizer, ids, ended) for ids, ended in rows]


def response_text(tokenizer: Any, ids: Sequence[int], ended: bool) -> str:
    """Return one response as text, see `response_texts`.

    Args:
        ended: the last token is a stop token.
    """
    answer_ids = ids[:-1] if ended else ids
    return LONE_SURROGATE.sub("\ufffd", tokenizer.decode(answer_ids, skip_special_tokens=True)).strip()


CUT = 0.1
"""The share of answers cut at the length limit from which on it is said."""


def cut_answers(share: float, limit: int, whose: str = "") -> list[str]:
    """Return a warning if many answers reached the length limit; nothing if few did.

    Args:
        share: of the answers that were cut.
        limit: tokens an answer.
        whose: with a blank behind it.
    """
    if share < CUT:
        return []
    return [f"{share:.0%} of the {whose}answers were cut at rollout.max_new_tokens={limit}: raise it for whole ones"]


def joined(parts: Sequence[Rollout], order: Tensor, pad_id: int) -> Rollout:
    """Several rollouts as one, padded to common widths, rows put back by `order` (the inverse is applied)."""
    from torch.nn.functional import pad as widen

    width_P = max(p.prompt_width for p in parts)
    width_T = max(p.tokens_BS.shape[1] - p.prompt_width for p in parts)

    def widened(x: Tensor, part: Rollout, value: int) -> Tensor:
        right = width_T - (x.shape[1] - part.prompt_width)
        return widen(x, (width_P - part.prompt_width, right), value=value)

    tokens = torch.cat([widened(p.tokens_BS, p, pad_id) for p in parts])
    mask = torch.cat([widened(p.mask_BS, p, 0) for p in parts])
    ended = torch.cat([p.ended_B for p in parts])
    inverse = torch.argsort(order)
    sampled = [widen(x, (0, width_T - x.shape[1])) for p in parts if (x := p.logprobs_BT) is not None]
    logprobs = torch.cat(sampled)[inverse] if len(sampled) == len(parts) else None
    return Rollout(tokens[inverse], mask[inverse], width_P, ended[inverse], logprobs)


class SnapshotEngine:
    """The part of an engine with weights of its own that knows which snapshot of an actor's adapter answers.

    Attributes:
        name: of the engine, as `rollout.engine` has it.
        base, snapshots: the base, and the folder of snapshots, once it is loaded.
        digests: actor → digest of its snapshot; None for the base.
    """

    name: ClassVar[str]
    base: Base
    snapshots: Path
    digests: dict[Actor, str | None]

    def sync(self, actor: Actor) -> None:
        """Answer from now on with this actor's weights as they stand.

        Raises:
            InputError: the actor is no plain adapter.
        """
        folder = None
        if not actor.base_alone:
            folder = snapshot(actor, self.base, self.snapshots)
            is_adapter = (folder / "adapter_config.json").is_file()
            require(is_adapter, "rollout.engine", self.name, "answers by adapters alone", "Use rollout=hf.")
        self.load_snapshot(actor, folder)
        before = self.digests.get(actor)
        self.digests[actor] = None if folder is None else folder.name
        if before is not None and before not in self.digests.values():
            self.drop_snapshot(before)

    def load_snapshot(self, actor: Actor, folder: Path | None) -> None:
        """Get ready to answer by a snapshot, or by the base if `folder` is None."""
        raise NotImplementedError

    def drop_snapshot(self, digest: str) -> None:
        raise NotImplementedError

    def digests_of_rows(self, actor: Actor | Sequence[Actor], rows: int) -> list[str | None]:
        """Return whose snapshot answers each row."""
        actors = actor if isinstance(actor, Sequence) else [actor] * rows
        for each in rows_by_actor(actor, rows):
            if each not in self.digests:
                self.sync(each)
        return [self.digests[each] for each in actors]


def place_seed(*where: Any) -> int:
    """63 bits that belong to one place, such as `(seed, "rollout", update, row)`."""
    return int.from_bytes(hashlib.sha256(repr(where).encode()).digest()[:8], "big") >> 1


def generator_for(device: torch.device, seed: int, *where: str | int) -> torch.Generator:
    """A generator for one place in a run, such as `(seed, "minibatches", update)`."""
    return torch.Generator(device).manual_seed(place_seed(seed, *where))


def row_seeds(rows: Iterable[Any], seed: int, *where: str | int) -> list[int]:
    """A seed for each row that is sampled at one place in a run. What a row draws depends on its own seed, and so on no
    other row: not on how many are sampled, in which order, or in which process.

    Args:
        rows: what tells the rows of that place apart, such as their numbers.
    """
    return [place_seed(seed, *where, row) for row in rows]
