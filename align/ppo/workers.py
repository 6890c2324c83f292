"""The workers of PPO: one base and its roles, the engine that samples from them, the scorer, the prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from align.core.errors import require
from align.core.types import Conversation, Rollout
from align.data.chat.encode import Prompt
from align.models.load import load_base
from align.models.lora import Lora
from align.models.roles import Role, Roles
from align.ops.moments import Moments
from align.reward.combined import comparable, scored
from align.reward.scorer import Scorer, check_finite
from align.rollout.distributed import FirstRankEngine
from align.rollout.engine import Engine, joined, response_texts
from align.rollout.randomness import row_seeds
from align.rollout.strip_reasoning import Judged, whole
from align.run import Base


class Answers(NamedTuple):
    """Prompts and what one role said to them, as tokens, as text, and as whoever judges reads it."""

    prompts: Sequence[Prompt]
    rollout: Rollout
    texts: list[str]
    judged: Judged

    @property
    def conversations(self) -> list[Conversation]:
        """What is judged."""
        return self.judged.conversations

    @property
    def read(self) -> list[str]:
        """The answers as they are judged."""
        return [conversation.messages[-1].content for conversation in self.conversations]

    def rows(self, index: Sequence[int]) -> Answers:
        """Some of them, in this order."""
        taken = torch.tensor(index, device=self.rollout.tokens_BS.device)
        told, tokens, reasoning = self.judged
        judged = Judged(
            [told[i] for i in index], tokens.rows(taken.to(tokens.tokens_BS.device)), [reasoning[i] for i in index]
        )
        return Answers(
            [self.prompts[i] for i in index], self.rollout.rows(taken), [self.texts[i] for i in index], judged
        )


def together(parts: Sequence[Answers], pad_id: int) -> Answers:
    """The answers of several, one part behind another."""
    if len(parts) == 1:
        return parts[0]
    rows = sum(len(part.prompts) for part in parts)
    rollout, judged = (
        joined(of, torch.arange(rows, device=of[0].tokens_BS.device), pad_id)
        for of in ([p.rollout for p in parts], [p.judged.rollout for p in parts])
    )
    told = Judged(
        [each for p in parts for each in p.conversations], judged, [each for p in parts for each in p.judged.reasoning]
    )
    return Answers([x for p in parts for x in p.prompts], rollout, [x for p in parts for x in p.texts], told)


Read = Callable[[Sequence[Prompt], list[str], Rollout], Judged]


@dataclass(frozen=True)
class Workers:
    """Attributes:
    prompts: to train on.
    held_out: kept out of training, to measure on; none without `stage.eval_every`.
    seed: the run's own.
    speaks: role → what the user calls it, where its answers cannot be drawn.
    read: answers to prompts, as texts and tokens → what whoever judges reads of them.
    """

    tokenizer: Any
    roles: Roles
    engine: Engine
    scorer: Scorer
    prompts: list[Prompt]
    held_out: list[Prompt]
    seed: int
    speaks: Callable[[Role], AbstractContextManager[None]]
    read: Read = whole

    def sample(self, role: Role, prompts: Sequence[Prompt], *where: str | int) -> Answers:
        """One answer of a role to each prompt.

        Args:
            where: the place in the run; each place draws anew.
        """
        return self.heard(prompts, self.drawing(role, prompts, *where)())

    def drawing(self, role: Role, prompts: Sequence[Prompt], *where: str | int) -> Callable[[], Rollout | None]:
        """The tokens of `sample`, by a call that may come later and from another thread, where the engine has weights
        of its own: it answers with those of now. None on a rank that asks no server."""
        actor, seeds = self.roles.actor(role), row_seeds(range(len(prompts)), self.seed, *where)
        with self.speaks(role):
            self.engine.sync(actor)

        asks = self.engine.drawn if isinstance(self.engine, FirstRankEngine) else self.engine.generate

        def draw() -> Rollout | None:
            with self.speaks(role):
                return asks([p.input_ids for p in prompts], actor, seeds)

        return draw

    def heard(self, prompts: Sequence[Prompt], drawn: Rollout | None) -> Answers:
        """What was drawn, as text too, on every rank."""
        given = self.engine.shared(drawn) if isinstance(self.engine, FirstRankEngine) else drawn
        assert given is not None, "this engine draws on every rank"
        rollout = given.to(self.roles.device)
        texts = response_texts(rollout, self.tokenizer)
        return Answers(prompts, rollout, texts, self.read(prompts, texts, rollout))

    def score(self, answers: Answers) -> tuple[Tensor, dict[str, float]]:
        """The raw scores [B], on the device of the rollout, and what the scorer says of them."""
        scores, figures = scored(self.scorer, answers.conversations, answers.judged.rollout)
        check_finite(scores, self.scorer.name)
        return scores.to(answers.rollout.tokens_BS.device), figures

    def calibrated(self, answers: Answers) -> tuple[Workers, Moments]:
        """The same workers with a scorer whose members are on one scale for these answers; and the moments of its
        scores there."""
        workers = replace(self, scorer=comparable(self.scorer, answers.conversations, answers.judged.rollout))
        return workers, Moments.of(workers.score(answers)[0])

    def policy(self) -> tuple[Tensor, ...]:
        """The weights of the policy as they stand, in the order of its parameters, on the CPU."""
        return tuple(p.detach().to("cpu", copy=True) for p in self.roles.parameters_of("policy"))

    @contextmanager
    def as_was(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """With the policy as it was when it had these weights; as it is where there are none. Graphs that were made
        outside of the block stay good."""
        changed = list(zip(self.roles.parameters_of("policy"), weights, strict=True)) if weights else []
        now = [parameter.data for parameter, _ in changed]
        try:
            for parameter, weight in changed:
                parameter.data = weight.to(parameter.device)
            yield
        finally:
            for (parameter, _), weight in zip(changed, now, strict=True):
                parameter.data = weight

    @torch.no_grad()
    def put_back(self, weights: Sequence[Tensor]) -> None:
        """Give the policy these weights, in the order of its parameters."""
        for parameter, weight in zip(self.roles.parameters_of("policy"), weights, strict=True):
            parameter.copy_(weight)


def set_apart(found: Sequence[Prompt], apart: Sequence[Prompt], n_eval: int) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to train on, and those to measure on: the first `n_eval` of a file of their own, else the last of
    `found`. None of them is trained on, not even where a file repeats it.

    Raises:
        InputError: none is left to train on.
    """
    if not apart:
        require(
            len(found) > n_eval, "stage.eval_prompts", n_eval, f"leaves none of {len(found)} prompts to train on",
            "Set fewer apart.",
        )  # fmt: skip
    held_out = list(apart[:n_eval] if apart else found[len(found) - n_eval :])
    asked = {p.conversation.messages for p in held_out}
    training = [p for p in found if p.conversation.messages not in asked]
    require(bool(training), "stage.eval_prompts", n_eval, "leaves no other prompt to train on", "Set fewer apart.")
    return training, held_out


def roles_on(
    base: Base, init: Path | None, rewards: Sequence[Path], *, method: str, frozen: str, fresh: Lora,
    value_backbone: str, device: torch.device, dtype: torch.dtype, seed: int,
) -> Roles:  # fmt: skip
    """The roles of a method, on its device: adapters on one base; under `method=full` a policy of its own, and the
    others on a frozen copy of what it starts from.

    Args:
        init, rewards, fresh, value_backbone: see `Roles`.
        frozen: the method by which the base is kept that nothing trains.
    """
    policy = load_base(base, "full", device, dtype) if method == "full" else None
    kept = load_base(base, frozen, device, dtype)
    torch.manual_seed(seed)  # a fresh adapter's lora_A is random
    roles = Roles(kept, init, rewards, fresh, value_backbone, policy, None if dtype == torch.float32 else dtype)
    if method == "qlora":
        assert roles.quantised_layers() > 0, "the base is not NF4"
    return roles
