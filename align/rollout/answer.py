"""One answer while it is being made, whichever engine makes it."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from align.core.errors import AlignError, NotFinite
from align.rollout.requests import FinishReason, Output, Pending, Token
from align.rollout.sampling import drawn_numbers

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Answer:
    """Attributes:
    pending: what is answered.
    read: the prompt has been read, and the listener was told.
    made: tokens so far.
    finished: why the answer ended, once it has.
    """

    pending: Pending
    read: bool = False
    made: int = 0
    finished: FinishReason | None = None
    _numbers: list[float] | None = None

    @property
    def number(self) -> float:
        """The uniform number for the next draw; 0 at temperature 0."""
        if self._numbers is None:  # an engine that draws by itself asks for none
            self._numbers = drawn_numbers(self.pending.request.sampling)
        return self._numbers[self.made] if self._numbers else 0.0

    def allowed(self) -> np.ndarray | None:
        grammar = self.pending.request.grammar
        return None if grammar is None else grammar.allowed()

    def begin(
        self, prompt_logprobs: tuple[Token | None, ...] | None, cached_tokens: int, score: float | None = None
    ) -> None:
        """The prompt has been read."""
        self.read = True
        if score is not None and not math.isfinite(score):
            self.fail(NotFinite("the score is nan or infinite"))
            return
        ends = self.pending.request.scored or self.pending.request.sampling.max_tokens == 0
        self._tell(Output((), "length" if ends else None, None, prompt_logprobs, cached_tokens, score))

    def take(self, token: Token | None) -> None:
        """The next token; None where there was no distribution to draw from."""
        if token is None:
            self.fail(NotFinite("the logits are nan or infinite"))
            return
        request, self.made = self.pending.request, self.made + 1
        ended = token.id in request.sampling.stop_ids
        if request.grammar is not None:
            ended |= request.grammar.accept(token.id)
        if request.ends is not None:
            ended |= request.ends(token.id)
        reason: FinishReason | None = "stop" if ended else None
        if not ended and self.made == request.sampling.max_tokens:
            reason = "length"
        self._tell(Output((token,), reason))

    def stop(self) -> None:
        """It has ended with the last token."""
        self._tell(Output((), "stop"))

    def abort(self) -> None:
        self._tell(Output((), "abort"))

    def fail(self, error: Exception) -> None:
        """It cannot go on. What is no fault of the input is logged."""
        if not isinstance(error, AlignError | NotFinite):
            log.exception("a request failed", exc_info=error)
        self._tell(Output((), "error", error))

    def _tell(self, output: Output) -> None:
        if self.finished is None:
            self.finished = output.finish_reason
            self.pending.listener(output)
