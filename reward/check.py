"""Checks of evaluation tasks as a reward: the check in the row of each prompt, or one for all prompts.

`docs/checkers.md` lists the kinds of checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from align import ranks
from align.core.errors import require
from align.core.types import Conversation, Rollout
from align.reward.checkers import Checker, CheckResult, build_checkers, check_answers_of_turns, get_check_spec
from align.reward.checkers.checked import AllowCode
from align.reward.rules import get_last_answer

if TYPE_CHECKING:
    from torch import Tensor

FIELD = "reward.check"


class CheckReward:
    """A scorer that gives the last answer of a conversation 1 if it passes its rule-based check, else 0.

    Args:
        spec: the check of conversations whose row has none. With None such a row is an error.
        score_parts: whether the score is the share of the check's parts that hold, instead of 0 or 1.
        allow_code: whether checks may run programs that a model wrote.
    """

    name = "check"

    def __init__(self, spec: Any = None, score_parts: bool = False, allow_code: AllowCode = False) -> None:
        self.spec = spec
        self.score_parts = score_parts
        self.allow_code: AllowCode = allow_code

    def find_checkers(self, conversation: Conversation) -> tuple[Checker | None, ...]:
        """Build the checkers of a prompt's answer from the check in its data set row, or else from `self.spec`.

        Raises:
            InputError: the row has no check, or a wrong one.
        """
        prompt_id = conversation.id or "(a prompt without an id)"
        field = f"{prompt_id}, check"
        spec = get_check_spec(conversation.columns, prompt_id)
        if spec is not None:
            return build_checkers(spec, 1, field, allow_code=self.allow_code)
        require(
            self.spec is not None,
            field,
            "(missing)",
            "the row has no check for its answer",
            'Give each row one, {"check": {"kind": "exact", "answer": "4"}}, or write one for all as reward.check.',
        )
        return build_checkers(self.spec, 1, FIELD, allow_code=self.allow_code)

    def run_checks(self, conversations: Sequence[Conversation]) -> Sequence[CheckResult]:
        """Check the last answer of each conversation, and return one result for each, on every rank.

        Each rank checks its share, because checks of code take time.
        """
        share = [
            check_answers_of_turns(self.find_checkers(conversation), [get_last_answer(conversation)])
            for conversation in ranks.select_own_share(conversations)
        ]
        return ranks.gather_shares(share, len(conversations))

    def compute_scores(self, results: Sequence[CheckResult]) -> Tensor:
        """Return the scores of checked answers, [B] fp32: 1 or 0, or the share of passed parts if `score_parts` is set.

        An answer whose check could not be decided has 0.
        """
        import torch

        if self.score_parts:
            scores = [sum(part.held for part in result.parts) / len(result.parts) for result in results]
        else:
            scores = [result.score for result in results]
        return torch.tensor(scores, dtype=torch.float32)

    def score(self, conversations: Sequence[Conversation], rollout: Rollout | None = None) -> Tensor:
        """Check the last answer of each conversation, and return the scores [B], fp32.

        Raises:
            InputError: a row has no check, or a wrong one.
        """
        return self.compute_scores(self.run_checks(conversations))
