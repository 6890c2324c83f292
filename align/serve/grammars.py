"""Constrained decoding by llguidance: masks of the allowed next tokens, and endings within the token limit."""

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
from align.serve.grammar_sandbox import LIMITS, GrammarSandbox

MAX_CACHED = 32
"""Maximum number of compiled grammars cached per tokenizer. A hostile grammar can have 20 MB of states."""
NEAR = 32
LAST = 8
"""Spare tokens beyond an answer's shortest known ending at which no new structure may be opened (`NEAR`), and at which
the ending is forced (`LAST`)."""
LONGEST_ENDING = 512
EXPLORED_ANSWERS = 4
EXPLORED_TOKENS = 48
EXPLORED_S = 0.25
"""Number, length in tokens and total time in seconds of the random answers that test the cost of a grammar's steps.

200 tokens usually take 20 ms."""
STRUCTURE = '}]",:'
OTHERS = "0123456789.ntf-[{"
SANDBOX = GrammarSandbox()
atexit.register(SANDBOX.close)


class NoTokenBytes(InputError):
    """An error for a tokenizer that does not define the bytes of its tokens, so that no grammar can be applied."""


NOT_ALLOWED = "satisfy the grammar"
"""Substring of llguidance's error message for a token that the grammar does not allow."""


class GrammarFailed(AlignError):
    """An error for a decoding step at which a compiled grammar exceeds its cost limit."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer converted for llguidance, with its stop tokens, single-byte tokens and masks of plain tokens.

    Attributes:
        stop_ids: tokens that end an answer.
        singles: byte → the token of this single byte; the last of several, which is the one that llguidance allows.
        plain_V: bool mask of the tokens without JSON's structural characters.
        leaving_V: bool mask of the tokens that may close reasoning and hold text after it.
    """

    tokens: LLTokenizer
    stop_ids: tuple[int, ...]
    singles: dict[int, int]
    plain_V: np.ndarray
    leaving_V: np.ndarray

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, stop_ids: tuple[int, ...]) -> Vocabulary:
        """Convert a transformers tokenizer for llguidance, or raise NoTokenBytes if that is not possible.

        Raises:
            NoTokenBytes: the tokenizer does not define the bytes of its tokens.
        """
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


class GrammarCache:
    """An LRU cache of the grammars compiled for one tokenizer. Threads may share it."""

    def __init__(self, tokenizer: Any, stop_ids: tuple[int, ...]) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self._cache: OrderedDict[str, CompiledGrammar] = OrderedDict()
        self._lock = Lock()

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.from_tokenizer(self.tokenizer, self.stop_ids)

    def compile(self, lark: str) -> CompiledGrammar:
        """Compile a grammar in llguidance's Lark or return it from the cache; raise ValueError if it cannot be used.

        Raises:
            ValueError: the grammar is invalid or costs too much; the message has the reason.
            NoTokenBytes: the tokenizer supports no grammars.
        """
        with self._lock:
            cached = self._cache.pop(lark, None)
            if cached is not None and cached.can_start():
                self._cache[lark] = cached
                return cached
        vocabulary = self.vocabulary
        if problem := SANDBOX(lark):
            raise ValueError(problem)
        matcher = LLMatcher(
            vocabulary.tokens, LLMatcher.grammar_from_lark(lark), log_level=0, limits=LLParserLimits(**LIMITS)
        )
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        grammar = CompiledGrammar(matcher, vocabulary)
        try:
            has_first_token = grammar.compute_next_V(matcher.deep_copy()).any()
            grammar.check_step_costs()
        except GrammarFailed as error:
            raise ValueError("no answer is valid, or it costs too much to find one") from error
        if not has_first_token:
            raise ValueError("no answer is valid")
        _ = grammar.shortest_answer  # computed now, to spare the engine's thread
        with self._lock:
            self._cache[lark] = grammar
            while len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)
        return grammar


@dataclass(frozen=True)
class CompiledGrammar:
    """A grammar compiled for a tokenizer, in the state before the first token of an answer."""

    matcher: LLMatcher
    vocabulary: Vocabulary

    def can_start(self) -> bool:
        """Return whether the grammar still allows any first token.

        All answers share the lexer's states, and a failed step of one invalidates them.
        """
        try:
            return bool(self.compute_next_V(self.matcher.deep_copy()).any())
        except GrammarFailed:
            return False

    def check_step_costs(self) -> None:
        """Sample random answers of the grammar, and raise GrammarFailed if one of their steps costs too much.

        Compiling a grammar does not find such steps.

        Raises:
            GrammarFailed: a step exceeds its cost limit.
        """
        deadline = time.monotonic() + EXPLORED_S
        for seed in range(EXPLORED_ANSWERS):
            generator = random.Random(seed)
            walker = self.matcher.deep_copy()
            for _ in range(EXPLORED_TOKENS):
                allowed_ids = self.compute_next_V(walker).nonzero()[0]
                if not len(allowed_ids) or time.monotonic() > deadline:
                    break
                if not walker.consume_token(int(allowed_ids[generator.randrange(len(allowed_ids))])):
                    raise GrammarFailed(walker.get_error())

    @cached_property
    def shortest_answer(self) -> list[int]:
        """Token ids of a short complete answer of the grammar, see `find_ending`; empty if none was found."""
        return self.find_ending(self.matcher, LONGEST_ENDING) or []

    def compute_next_V(self, matcher: LLMatcher) -> np.ndarray:
        """Return a bool mask [vocabulary] of the tokens that a matcher allows next.

        Raises:
            GrammarFailed: the step exceeds its cost limit.
        """
        if matcher.is_stopped() and not matcher.is_error():
            return np.zeros(len(self.vocabulary.plain_V), bool)
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():
            raise GrammarFailed(matcher.get_error())
        return np.unpackbits(bits, count=len(self.vocabulary.plain_V), bitorder="little").view(bool)

    def find_ending(self, matcher: LLMatcher, max_tokens: int) -> list[int] | None:
        """Return token ids that complete the answer of `matcher`, or None if none within `max_tokens` were found.

        The ending is short, but not always the shortest.

        Open structure is closed as soon as the grammar allows. Otherwise the next token is a forced one, a byte after
        which a string may end, or the byte used least often since the last closing: a pattern that waits for a certain
        byte gets it at some point.
        """
        walker = matcher.deep_copy()
        path = list[int]()
        byte_counts = Counter[int]()
        while not walker.is_accepting():
            step = walker.compute_ff_tokens() or self._choose_byte(walker, byte_counts)
            if not step or len(path) + len(step) > max_tokens or not walker.consume_tokens(step):
                return None
            path += step
        return path if walker.is_stopped() else [*path, self.vocabulary.stop_ids[0]]

    def _choose_byte(self, walker: LLMatcher, byte_counts: Counter[int]) -> list[int]:
        """Choose the next byte of an answer's ending, and return its token in a list, empty if no byte is allowed.

        Counts the byte in `byte_counts`, or clears the counts if it closes structure.
        """
        allowed_V = self.compute_next_V(walker)
        singles = self.vocabulary.singles
        allowed_bytes = {byte for byte, id in singles.items() if allowed_V[id]}
        inside_text = {ord("{"), ord("}")} <= allowed_bytes  # both are allowed inside strings only
        for byte in b'"' if inside_text else STRUCTURE.encode():
            if byte in allowed_bytes:
                byte_counts.clear()
                return [singles[byte]]
        order = OTHERS.encode()
        ranked = sorted(
            allowed_bytes, key=lambda byte: (byte_counts[byte], byte == ord("\\"), order.find(byte) % 256, byte)
        )
        best = next(iter(ranked), None)
        steps = byte_counts.total()
        if steps & (steps - 1) == 0:  # at powers of two only: look for a byte after which a string may end
            ends = [id for id in (singles.get(ord('"')), self.vocabulary.stop_ids[0]) if id is not None]
            for byte in ranked:
                if byte not in b"\\[{" and any(walker.validate_tokens([singles[byte], end]) == 2 for end in ends):
                    best = byte
                    break
        if best is None:
            return []
        byte_counts[best] += 1
        return [singles[best]]


class GrammarState:
    """The decoding state of one answer under a grammar, which masks the next token and ends within the token limit.

    It implements `align.rollout.serving_engine.Grammar`.

    Args:
        embedding_rows: rows of the model's embedding, which may be more than the tokenizer's tokens.
        max_tokens: maximum tokens of the answer.
        must_be_complete: whether the answer must be complete within them; otherwise it may be cut.
        source: the grammar as text, for external engines.
    """

    def __init__(
        self,
        grammar: CompiledGrammar,
        embedding_rows: int,
        max_tokens: int,
        must_be_complete: bool,
        source: str | None = None,
    ) -> None:
        self.grammar = grammar
        self.matcher = grammar.matcher.deep_copy()
        self.source = source
        self._mask = np.zeros(embedding_rows, bool)
        self._remaining = max_tokens
        self._next_check_at = max_tokens if must_be_complete else 0
        self._ending = grammar.shortest_answer if must_be_complete else []

    def compute_mask(self) -> np.ndarray:
        """Return a bool mask [embedding rows] of the tokens that may come next. The next call reuses the array."""
        allowed_V = self.grammar.compute_next_V(self.matcher)[: len(self._mask)]
        self._mask[: len(allowed_V)] = allowed_V
        if self._remaining <= self._next_check_at:
            self._restrict_to_ending()
        return self._mask

    def accept(self, token: int) -> bool:
        """Advance the grammar by the sampled token, and return whether the answer has ended.

        Raises:
            GrammarFailed: the step exceeds its cost limit.
        """
        if not self.matcher.consume_token(token):
            problem = self.matcher.get_error()
            if NOT_ALLOWED in problem:  # the engine ignored the mask: a fault of the engine and not of the request
                raise RuntimeError(f"the engine drew a token that the grammar does not allow: {problem}")
            raise GrammarFailed(problem)
        self._remaining -= 1
        self._ending = self._ending[1:] if self._ending[:1] == [token] else self._ending
        return self.matcher.is_stopped()

    def _has_valid_ending(self) -> bool:
        """Return whether the ending found at an earlier token would still complete the answer.

        Inside a string it would be text.
        """
        walker = self.matcher.deep_copy()
        return bool(self._ending) and walker.consume_tokens(self._ending) and walker.is_stopped()

    def _restrict_to_ending(self) -> None:
        """Restrict the mask in place if the answer is near its token limit, so that it can still be completed.

        Computing an ending costs milliseconds: it is done when half of the spare tokens are used up, and at each token
        only near the end.
        """
        if not self._has_valid_ending():
            self._ending = self.grammar.find_ending(self.matcher, min(self._remaining, LONGEST_ENDING)) or []
        spare = self._remaining - len(self._ending)
        if not self._ending or spare > NEAR:
            self._next_check_at = self._remaining - max(1, spare // 2)
            return
        self._next_check_at = self._remaining
        next_id = self._ending[0]
        plain = self.grammar.vocabulary.plain_V[: len(self._mask)]
        self._mask[: len(plain)] &= plain & (spare > LAST)
        self._mask[next_id] = True


class GrammarStateAfterReasoning:
    """The decoding state of an answer that begins with reasoning, to which a grammar applies only after `</think>`.

    Args:
        grammar, embedding_rows, must_be_complete: see `GrammarState`.
        max_tokens: maximum tokens of the reasoning and the answer.
    """

    def __init__(self, grammar: CompiledGrammar, embedding_rows: int, max_tokens: int, must_be_complete: bool) -> None:
        self._grammar = grammar
        self._embedding_rows = embedding_rows
        self._remaining = max_tokens
        self._must_be_complete = must_be_complete
        self._last_bytes = b""
        self.source: str | None = None
        self._answer: GrammarState | None = None
        vocabulary = grammar.vocabulary
        self._closing_ids = vocabulary.tokens.greedy_tokenize(CLOSE)
        self._close_at = 0
        if must_be_complete:
            self._close_at = len(self._closing_ids) + len(grammar.shortest_answer) + NEAR
        self._mask = np.ones(embedding_rows, bool)
        leaving = vocabulary.leaving_V[:embedding_rows]
        self._mask[: len(leaving)] = ~leaving
        self._mask[list(vocabulary.stop_ids)] = False

    def compute_mask(self) -> np.ndarray:
        """Return a bool mask [embedding rows] of the tokens that may come next. The next call reuses the array."""
        if self._answer is not None:
            return self._answer.compute_mask()
        if self._remaining <= self._close_at:
            self._mask[:] = False
            self._mask[self._closing_ids.pop(0)] = True
        return self._mask

    def accept(self, token: int) -> bool:
        """Add a sampled token, start the grammar after `</think>`, and return whether the answer has ended."""
        self._remaining -= 1
        if self._answer is not None:
            return self._answer.accept(token)
        self._last_bytes = self._last_bytes[-len(CLOSE) :] + self._grammar.vocabulary.tokens.decode_bytes([token])
        if CLOSE.encode() in self._last_bytes:
            self._answer = GrammarState(self._grammar, self._embedding_rows, self._remaining, self._must_be_complete)
        return False
