"""What a task of an evaluation checks answers by, as a reward: the check that stands in the row of each prompt, or one
for all of them. `docs/checkers.md` has the kinds of checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from align import ranks
from align.core.errors import require
from align.core.types import Conversation, Rollout
from align.reward.checkers import Checked, Checker, check_turns, checks_of, spec_of
from align.reward.checkers.checked import AllowCode
from align.reward.rules import last_answer

if TYPE_CHECKING:
    from torch import Tensor

FIELD = "reward.check"


class Checks:
    """1 where the last answer of a conversation has all that its check asks for, else 0; or the share of that.

    Args:
        spec: the check of conversations whose row has none; None where there is none.
        parts: the share of the check's parts that hold, in place of 0 or 1.
        allow_code: whether checks may run programs that a model wrote.
    """

    name = "check"

    def __init__(self, spec: Any = None, parts: bool = False, allow_code: AllowCode = False) -> None:
        self.spec = spec
        self.parts = parts
        self.allow_code: AllowCode = allow_code

    def checkers(self, conversation: Conversation) -> tuple[Checker | None, ...]:
        """What checks the answer to a prompt.

        Raises:
            InputError: there is no check, or it is wrong: names the row.
        """
        where = conversation.id or "(a prompt without an id)"
        own = spec_of(conversation.columns, where)
        spec, field = (self.spec, FIELD) if own is None else (own, f"{where}, check")
        require(
            spec is not None, f"{where}, check", "(missing)", "the row does not say what its answer has to be",
            'Give each row one, {"check": {"kind": "exact", "answer": "4"}}, or write one for all as reward.check.',
        )  # fmt: skip
        return checks_of(spec, 1, field, allow_code=self.allow_code)

    def checked(self, conversations: Sequence[Conversation]) -> Sequence[Checked]:
        """What the checks say. On several ranks each checks its share: checks of code take time."""
        mine = [check_turns(self.checkers(one), [last_answer(one)]) for one in ranks.own_share(conversations)]
        return ranks.gather_shares(mine, len(conversations))

    def scores(self, checked: Sequence[Checked]) -> Tensor:
        """[B], fp32. An answer without a verdict has 0."""
        import torch

        def score(one: Checked) -> float:
            return sum(part.held for part in one.parts) / len(one.parts) if self.parts else one.score

        return torch.tensor([score(one) for one in checked], dtype=torch.float32)

    def score(self, conversations: Sequence[Conversation], rollout: Rollout | None = None) -> Tensor:
        """Raises: InputError: a row has no check, or a wrong one."""
        return self.scores(self.checked(conversations))
