"""Grammars at work on answers, by llguidance: which tokens may come next, and how an answer ends in time."""

from __future__ import annotations

import atexit
import random
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from align.core.errors import AlignError, InputError
from align.data.chat.reasoning import CLOSE
from align.serve.grammar_sandbox import LIMITS, Trial

MOST_KEPT = 32
"""Compiled grammars of a tokenizer. One has up to 20 MB of states where it is made to have many."""
NEAR = 32
LAST = 8
"""Tokens that are left beyond what an answer needs to end: from these on it opens nothing new; ends at once."""
LONGEST_ENDING = 512
EXPLORED_ANSWERS = 4
EXPLORED_TOKENS = 48
EXPLORED_S = 0.25
"""Of answers that are begun to see whether a grammar's steps cost too much: 200 tokens usually take 20 ms."""
STRUCTURE = '}]",:'
OTHERS = "0123456789.ntf-[{"
TRIAL = Trial()
atexit.register(TRIAL.close)


class NoTokenBytes(InputError):
    """The tokenizer does not say which bytes its tokens are."""


NOT_ALLOWED = "satisfy the grammar"
"""What llguidance says of a token that may not come next."""


class GrammarFailed(AlignError):
    """A grammar that was compiled cannot go on: a step of it costs more than it may."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer as llguidance reads it.

    Attributes:
        stop_ids: tokens that end an answer.
        singles: byte → the token that is this byte and no more; of several the last, which llguidance allows.
        plain_V: tokens without a character that is structure in JSON; bool.
        leaving_V: tokens that may close reasoning and say something behind it; bool.
    """

    tokens: LLTokenizer
    stop_ids: tuple[int, ...]
    singles: dict[int, int]
    plain_V: np.ndarray
    leaving_V: np.ndarray

    @classmethod
    def of(cls, tokenizer: Any, stop_ids: tuple[int, ...]) -> Vocabulary:
        """Raises: NoTokenBytes."""
        from llguidance.hf import from_tokenizer

        try:
            if not stop_ids:
                raise ValueError("no token ends an answer")
            tokens = from_tokenizer(tokenizer, eos_token=list(stop_ids))
        except ValueError as error:
            problem = "has a tokenizer whose tokens are not known as bytes, and answers by no grammar"
            raise NoTokenBytes("model", "", problem, "Ask without response_format and forced tools.") from error
        special = [tokens.is_special_token(id) for id in range(tokens.vocab_size)]
        texts = [b"" if special[id] else tokens.decode_bytes([id]) for id in range(tokens.vocab_size)]
        singles = {text[0]: id for id, text in enumerate(texts) if len(text) == 1}
        plain = np.array([bool(text) and not any(byte in b'}]",:[{\\' for byte in text) for text in texts])
        leaving = np.array([bool(text.partition(b">")[2].strip()) for text in texts])
        return cls(tokens, stop_ids, singles, plain, leaving)


class Grammars:
    """Compiled grammars of a tokenizer. Safe to share between threads."""

    def __init__(self, tokenizer: Any, stop_ids: tuple[int, ...]) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self._kept: OrderedDict[str, Compiled] = OrderedDict()
        self._lock = Lock()

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.of(self.tokenizer, self.stop_ids)

    def compiled(self, lark: str) -> Compiled:
        """A grammar in llguidance's Lark.

        Raises:
            ValueError: what is wrong with it.
            NoTokenBytes: there are no grammars for this tokenizer.
        """
        with self._lock:
            kept = self._kept.pop(lark, None)
            if kept is not None and kept.goes_on():
                self._kept[lark] = kept
                return kept
        vocabulary = self.vocabulary
        if problem := TRIAL(lark):
            raise ValueError(problem)
        matcher = LLMatcher(
            vocabulary.tokens, LLMatcher.grammar_from_lark(lark), log_level=0, limits=LLParserLimits(**LIMITS)
        )
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        grammar = Compiled(matcher, vocabulary)
        try:
            begins = grammar.next_V(matcher.deep_copy()).any()
            grammar.explore()
        except GrammarFailed as error:
            raise ValueError("no answer is valid, or it costs too much to find one") from error
        if not begins:
            raise ValueError("no answer is valid")
        _ = grammar.shortest  # found here, and not in the thread that begins answers
        with self._lock:
            self._kept[lark] = grammar
            while len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        return grammar


@dataclass(frozen=True)
class Compiled:
    """A grammar, at its beginning."""

    matcher: LLMatcher
    vocabulary: Vocabulary

    def goes_on(self) -> bool:
        """Return whether answers can still begin. States are shared by all answers, and one whose step fails ends
        them."""
        try:
            return bool(self.next_V(self.matcher.deep_copy()).any())
        except GrammarFailed:
            return False

    def explore(self) -> None:
        """Begin some answers, each by tokens drawn from those that are allowed.

        Raises:
            GrammarFailed: a step costs more than it may. Compiling does not show this.
        """
        until = time.monotonic() + EXPLORED_S
        for seed in range(EXPLORED_ANSWERS):
            draw = random.Random(seed)
            walker = self.matcher.deep_copy()
            for _ in range(EXPLORED_TOKENS):
                allowed = self.next_V(walker).nonzero()[0]
                if not len(allowed) or time.monotonic() > until:
                    break
                if not walker.consume_token(int(allowed[draw.randrange(len(allowed))])):
                    raise GrammarFailed(walker.get_error())

    @cached_property
    def shortest(self) -> list[int]:
        """See `ending`, from the beginning; empty without one."""
        return self.ending(self.matcher, LONGEST_ENDING) or []

    def next_V(self, matcher: LLMatcher) -> np.ndarray:
        """Return which of the tokenizer's tokens may come next; bool.

        Raises:
            GrammarFailed.
        """
        if matcher.is_stopped() and not matcher.is_error():
            return np.zeros(len(self.vocabulary.plain_V), bool)
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():
            raise GrammarFailed(matcher.get_error())
        return np.unpackbits(bits, count=len(self.vocabulary.plain_V), bitorder="little").view(bool)

    def ending(self, matcher: LLMatcher, most: int) -> list[int] | None:
        """Tokens that bring an answer to its end, as few as are easily found; None where these are more than `most`.

        It closes what is open as soon as that is allowed. Where it is not, what is forced comes, or a byte behind which
        a text may end, or the byte that came least often since: so that what a pattern waits for comes at some time.
        """
        walker = matcher.deep_copy()
        path = list[int]()
        came = Counter[int]()
        while not walker.is_accepting():
            step = walker.compute_ff_tokens() or self._closer(walker, came)
            if not step or len(path) + len(step) > most or not walker.consume_tokens(step):
                return None
            path += step
        return path if walker.is_stopped() else [*path, self.vocabulary.stop_ids[0]]

    def _closer(self, walker: LLMatcher, came: Counter[int]) -> list[int]:
        allowed = self.next_V(walker)
        singles = self.vocabulary.singles
        bytes_ = {byte for byte, id in singles.items() if allowed[id]}
        inside_text = {ord("{"), ord("}")} <= bytes_  # which may be next to each other nowhere else
        for byte in b'"' if inside_text else STRUCTURE.encode():
            if byte in bytes_:
                came.clear()
                return [singles[byte]]
        order = OTHERS.encode()
        ranked = sorted(bytes_, key=lambda byte: (came[byte], byte == ord("\\"), order.find(byte) % 256, byte))
        best = next(iter(ranked), None)
        steps = came.total()
        if steps & (steps - 1) == 0:  # now and then: a text may be one byte from where it may end
            ends = [id for id in (singles.get(ord('"')), self.vocabulary.stop_ids[0]) if id is not None]
            for byte in ranked:
                if byte not in b"\\[{" and any(walker.validate_tokens([singles[byte], end]) == 2 for end in ends):
                    best = byte
                    break
        if best is None:
            return []
        came[best] += 1
        return [singles[best]]


class Constrained:
    """An answer that follows a grammar: see `align.rollout.serving_engine.Grammar`.

    Args:
        rows: of the model's embedding, some of which may be no tokens.
        most: tokens of the answer.
        closes: whether it shall come to its end before that; otherwise it may be cut.
        source: for engines of their own.
    """

    def __init__(self, grammar: Compiled, rows: int, most: int, closes: bool, source: str | None = None) -> None:
        self.grammar = grammar
        self.matcher = grammar.matcher.deep_copy()
        self.source = source
        self._mask = np.zeros(rows, bool)
        self._left = most
        self._look_at = most if closes else 0
        self._ending = grammar.shortest if closes else []

    def allowed(self) -> np.ndarray:
        """Return which tokens may come next, in the same array each time."""
        allowed_V = self.grammar.next_V(self.matcher)[: len(self._mask)]
        self._mask[: len(allowed_V)] = allowed_V
        if self._left <= self._look_at:
            self._draw_to_an_end()
        return self._mask

    def accept(self, token: int) -> bool:
        if not self.matcher.consume_token(token):
            problem = self.matcher.get_error()
            if NOT_ALLOWED in problem:  # an engine that passes over grammars, which no request is to blame for
                raise RuntimeError(f"the engine drew a token that the grammar does not allow: {problem}")
            raise GrammarFailed(problem)
        self._left -= 1
        self._ending = self._ending[1:] if self._ending[:1] == [token] else self._ending
        return self.matcher.is_stopped()

    def _still_ends(self) -> bool:
        """Return whether the ending that was found still ends the answer: within a string, it would be text."""
        walker = self.matcher.deep_copy()
        return bool(self._ending) and walker.consume_tokens(self._ending) and walker.is_stopped()

    def _draw_to_an_end(self) -> None:
        """Allow less, the nearer the last token is at which the answer can still end. Looking costs milliseconds, so
        that it is done when half of what was left over is used up, and at each token only near the end."""
        if not self._still_ends():
            self._ending = self.grammar.ending(self.matcher, min(self._left, LONGEST_ENDING)) or []
        over = self._left - len(self._ending)
        if not self._ending or over > NEAR:
            self._look_at = self._left - max(1, over // 2)
            return
        self._look_at = self._left
        goes_on = self._ending[0]
        plain = self.grammar.vocabulary.plain_V[: len(self._mask)]
        self._mask[: len(plain)] &= plain & (over > LAST)
        self._mask[goes_on] = True


class BehindReasoning:
    """An answer whose prompt opened its reasoning: anything may come until `</think>`, and the grammar begins behind.

    Args:
        grammar, rows, most, closes: see `Constrained`; `most` counts the reasoning too.
    """

    def __init__(self, grammar: Compiled, rows: int, most: int, closes: bool) -> None:
        self._grammar = grammar
        self._rows = rows
        self._left = most
        self._closes = closes
        self._said = b""
        self.source: str | None = None
        self._answer: Constrained | None = None
        vocabulary = grammar.vocabulary
        self._close = vocabulary.tokens.greedy_tokenize(CLOSE)
        self._close_at = len(self._close) + len(grammar.shortest) + NEAR if closes else 0
        self._mask = np.ones(rows, bool)
        leaving = vocabulary.leaving_V[:rows]
        self._mask[: len(leaving)] = ~leaving
        self._mask[list(vocabulary.stop_ids)] = False

    def allowed(self) -> np.ndarray:
        if self._answer is not None:
            return self._answer.allowed()
        if self._left <= self._close_at:
            self._mask[:] = False
            self._mask[self._close.pop(0)] = True
        return self._mask

    def accept(self, token: int) -> bool:
        self._left -= 1
        if self._answer is not None:
            return self._answer.accept(token)
        self._said = self._said[-len(CLOSE) :] + self._grammar.vocabulary.tokens.decode_bytes([token])
        if CLOSE.encode() in self._said:
            self._answer = Constrained(self._grammar, self._rows, self._left, self._closes)
        return False
