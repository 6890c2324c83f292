"""Tokenization of rendered chats in which the content of messages never becomes a special token.

Templates separate turns with special tokens. A tokenizer finds these in the whole rendered text, also in the content of
a message, which could end its own turn and speak in another role. To prevent this:

1. Before rendering, the first letter of each special token in a content is replaced by a private-use character
   (`escape_texts`). The special tokens that are left in the rendered text are those of the template.
2. If contents had none, the tokenizer encodes the rendered text as usual.
3. Otherwise a copy of the tokenizer encodes the unescaped text. Its special tokens have random spellings, and those of
   the template are respelled. The whole text is encoded at once, so that all other tokens are the usual ones.

Added tokens that are not special, such as Qwen's `<think>` and `<tool_call>`, are treated as words, since templates
look for them in contents and models write them. A content may become one, unless the template ends answers with it.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

from align.core.errors import InputError
from align.data.chat.render_deadline import render_deadline

EscapeTable = dict[int, str]
"""Code point of a private-use character in escaped contents → the letter that it replaces, for `str.translate`."""
Span = tuple[int, int]
"""A range of characters, [start, end)."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """The token ids of a text, with the range of characters of each token.

    Attributes:
        ids: token ids.
        spans: range of characters of each token; empty if the tokenizer has no offsets.
    """

    ids: list[int]
    spans: list[Span]


def tokenize_text(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a plain text without BOS or EOS. Special tokens that the text spells out are tokenized as
    text."""
    return tokenize_with_specials(tokenizer, text, []).ids


def find_leading_token_ids(tokenizer: Any) -> list[int]:
    """Return the ids of the tokens that a tokenizer adds in front of a text. For most tokenizers this is BOS."""
    full_ids = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    bare_ids = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    return full_ids[: full_ids.index(bare_ids[0])] if bare_ids and bare_ids[0] in full_ids else []


def tokenize_rendered(tokenizer: Any, rendered: str, escapes: EscapeTable) -> Tokens:
    """Tokenize rendered text so that special tokens of the template count, and special tokens spelled out in contents
    become plain text. The contents were escaped before rendering, see `escape_texts`.

    Raises:
        InputError: see `build_respelled_copy`.
    """
    return tokenize_with_specials(
        tokenizer, rendered.translate(escapes), get_special_tokens(tokenizer).find_spans(rendered)
    )


def escape_texts(tokenizer: Any, contents: Sequence[str]) -> tuple[list[str], EscapeTable]:
    """Replace the first letter of each special token in contents of messages by a private-use character, so that
    contents hold no special token.

    This includes special tokens that a content might form together with the template's text beside it. Lengths do not
    change.

    Returns:
        the contents, and the table that reverts the replacement.
    """
    special_tokens = get_special_tokens(tokenizer)
    starts = [special_tokens.find_start_positions(text) for text in contents]
    letters = sorted({text[i] for text, text_starts in zip(contents, starts, strict=True) for i in text_starts})
    if not letters:
        return list(contents), {}
    unused = iter_unused_letters("".join((*contents, *special_tokens.texts, str(tokenizer.chat_template))))
    replacements = dict(zip(letters, unused, strict=False))
    escaped = []
    for text, text_starts in zip(contents, starts, strict=True):
        if not text_starts:
            escaped.append(text)
            continue
        characters = list(text)
        for i in text_starts:
            characters[i] = replacements[text[i]]
        escaped.append("".join(characters))
    return escaped, {ord(replacement): letter for letter, replacement in replacements.items()}


def iter_unused_letters(text: str) -> Iterator[str]:
    """Return an iterator over the private-use Unicode characters that do not occur in a text."""
    used = set(text)
    return (chr(i) for i in chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE)) if chr(i) not in used)


def tokenize_with_specials(tokenizer: Any, text: str, spans: Sequence[Span]) -> Tokens:
    """Tokenize a text so that exactly the character ranges `spans` become special tokens."""
    special_tokens = get_special_tokens(tokenizer)
    if special_tokens.find_spans(text) == spans:
        tokens = tokenize_directly(tokenizer, text)
        if not special_tokens.has_unspelled_token(text, tokens):
            return tokens
    return tokenize_with_copy(tokenizer, text, spans)


def tokenize_directly(tokenizer: Any, text: str) -> Tokens:
    """Tokenize a text with the tokenizer itself, which makes every spelled-out special token a special token."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    return Tokens(list(encoding["input_ids"]), list(encoding.get("offset_mapping", ())))


def tokenize_with_copy(tokenizer: Any, text: str, spans: Sequence[Span]) -> Tokens:
    """Tokenize a text with a copy of the tokenizer whose special tokens are respelled, so that only the ranges `spans`
    become special tokens."""
    special_tokens = get_special_tokens(tokenizer)
    if special_tokens.copy is None:
        special_tokens.copy = build_respelled_copy(tokenizer, special_tokens)
    copy, spellings = special_tokens.copy
    parts: list[str] = []
    offsets: list[int] = []  # position in the respelled text → position in `text`
    position = 0
    for start, end in spans:
        spelling = spellings[text[start:end]]
        parts += [text[position:start], spelling]
        offsets += [*range(position, start + 1), *[end] * (len(spelling) - 1)]
        position = end
    encoding = copy.encode("".join((*parts, text[position:])), add_special_tokens=False)
    offsets += range(position, len(text) + 1)
    return Tokens(list(encoding.ids), [(offsets[start], offsets[end]) for start, end in encoding.offsets])


def build_respelled_copy(tokenizer: Any, special_tokens: SpecialTokens) -> tuple[Any, dict[str, str]]:
    """Build a copy of the tokenizer with the same ids, but random spellings of its special tokens, which no text
    contains.

    Returns:
        the copy, and text of a special token → its new spelling.

    Raises:
        InputError: the tokenizer is not one of the library `tokenizers`, or has parts that cannot be copied.
    """
    from tokenizers import Tokenizer

    number = secrets.token_hex(16)
    spellings = {text: f"\ue000{number}.{i}\ue001" for i, text in enumerate(special_tokens.texts)}
    try:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state |= {"truncation": None, "padding": None}
        for token in state["added_tokens"]:
            token["content"] = spellings.get(token["content"], token["content"])
        model = state["model"]
        vocabulary = model["vocab"]  # {piece: id}, or [[piece, score], …] of a unigram model
        if isinstance(vocabulary, dict):
            model["vocab"] = {spellings.get(piece, piece): id for piece, id in vocabulary.items()}
        else:
            model["vocab"] = [[spellings.get(piece, piece), score] for piece, score in vocabulary]
        if (unknown := model.get("unk_token")) is not None:
            model["unk_token"] = spellings.get(unknown, unknown)
        if "merges" in model:  # no merge may create a special token
            model["merges"] = [merge for merge in model["merges"] if not {*merge, "".join(merge)} & spellings.keys()]
        return Tokenizer.from_str(json.dumps(state)), spellings
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise InputError(
            "tokenizer",
            type(tokenizer).__name__,
            f"a text spells out one of its special tokens, and this tokenizer cannot read it as plain text "
            f"({str(error)[:120]})",
            "Take such spellings out of the data, or use a model with a tokenizer.json.",
        ) from error


def get_special_token_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of a tokenizer's special tokens, which the content of a message never becomes, see
    `SpecialTokens`."""
    return get_special_tokens(tokenizer).ids


def get_special_texts(tokenizer: Any) -> tuple[str, ...]:
    """Return the texts of a tokenizer's special tokens, longest first."""
    return get_special_tokens(tokenizer).texts


def copy_tokenizer_for_export(tokenizer: Any) -> Any:
    """Return a copy of a tokenizer with `chat_control_tokens` set to the non-special tokens that transformers must
    escape in contents.

    transformers' `sanitize_control_tokens` escapes special tokens in contents, and the tokens of the list
    `chat_control_tokens`. Without the list it also escapes every added token that the template writes, such as Qwen's
    `</think>`. A template that looks for these in contents would then render another text than in training.
    """
    copy = deepcopy(tokenizer)
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    copy.chat_control_tokens = [text for text in get_special_texts(tokenizer) if text not in special]
    return copy


class SpecialTokens:
    """The special tokens of a tokenizer, including an added token with which its chat template ends answers.

    Attributes:
        ids: token ids.
        texts: their texts, longest first.
        copy: see `build_respelled_copy`; None until it is needed.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.added_tokens_decoder
        ids = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        tail = render_answer_end(tokenizer).lstrip()
        ends = [i for i, token in added.items() if token.content.strip() and tail.startswith(token.content)]
        ids |= {max(ends, key=lambda i: len(added[i].content))} if ends else set()
        texts = {tokenizer.convert_ids_to_tokens(i) for i in ids} - {None, ""}
        words = {token.content for token in added.values()} - texts
        self.ids = frozenset(ids)
        self.texts = sort_longest_first(texts)
        self.copy: tuple[Any, dict[str, str]] | None = None
        self._stripped_texts = frozenset(text.strip() for text in texts)
        self._unknown_id = tokenizer.unk_token_id
        self._added_pattern = compile_alternatives(sort_longest_first(texts | words))
        self._start_pattern = re.compile(f"(?={compile_alternatives(self.texts).pattern})")
        self._first_letters = {text[0] for text in texts}
        self._heads = {text[:i] for text in texts for i in range(1, len(text))}
        self._tails = {text[i:] for text in texts for i in range(1, len(text))}
        self._max_length = max(map(len, texts), default=0)

    def find_spans(self, text: str) -> list[Span]:
        """Return the character spans of the special tokens that a tokenizer finds in a text. Of overlapping added
        tokens it takes the leftmost one, and the longest one there."""
        matches = self._added_pattern.finditer(text)
        return [match.span() for match in matches if match[0].strip() in self._stripped_texts]

    def has_unspelled_token(self, text: str, tokens: Tokens) -> bool:
        """Return whether a tokenized text has a special token that its characters do not spell, such as a full-width
        `</s>`.

        Normalizers may convert these. The token for unknown characters does not count.
        """
        candidates = self.ids - {self._unknown_id}
        return any(
            token_id in candidates and text[start:end].strip() not in self._stripped_texts
            for token_id, (start, end) in zip(tokens.ids, tokens.spans, strict=False)
        )

    def find_start_positions(self, text: str) -> set[int]:
        """Return the positions in a message's content at which special tokens begin.

        A special token could also begin before the content or end after it, in the text of the template beside it. Then
        the position of its first letter in the content is included. A template may trim the content.
        """
        starts: set[int] = set()
        if any(letter in text for letter in self._first_letters):
            starts = {match.start() for match in self._start_pattern.finditer(text)}
        stripped = text.strip()
        start = text.find(stripped)
        end = start + len(stripped)
        sizes = range(1, min(len(stripped) + 1, self._max_length))
        starts |= {end - size for size in sizes if stripped[-size:] in self._heads}
        if any(stripped[:size] in self._tails for size in sizes):
            starts.add(start)
        if 0 < len(stripped) < self._max_length and any(stripped in special for special in self.texts):
            starts.add(start)
        return starts


def sort_longest_first(texts: set[str]) -> tuple[str, ...]:
    """Return texts sorted by descending length, then alphabetically."""
    return tuple(sorted(texts, key=lambda text: (-len(text), text)))


def compile_alternatives(texts: Sequence[str]) -> re.Pattern[str]:
    """Compile a regular expression that matches any of the texts literally, and nothing if none exist."""
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")


ANSWER = "\ue000answer\ue001"


def render_answer_end(tokenizer: Any) -> str:
    """Return the text that the chat template writes after an answer, such as `<|im_end|>`. Returns an empty string if
    the template fails."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER}]
    try:
        with render_deadline():
            return tokenizer.apply_chat_template(turns, tokenize=False).partition(ANSWER)[2]
    except Exception:  # a template may raise anything; it is reported where a conversation is rendered
        return ""


_special_tokens: WeakKeyDictionary[Any, tuple[Any, SpecialTokens]] = WeakKeyDictionary()


def get_special_tokens(tokenizer: Any) -> SpecialTokens:
    """Return the special tokens of a tokenizer, cached until its template or its special tokens change."""
    key = (tokenizer.chat_template, len(tokenizer), tuple(tokenizer.all_special_ids))
    cached = _special_tokens.get(tokenizer)
    if cached is None or cached[0] != key:
        cached = (key, SpecialTokens(tokenizer))
        _special_tokens[tokenizer] = cached
    return cached[1]


CHARACTERS = 8
"""Characters per token that are read first. Tokens of ordinary text are shorter, so that one pass mostly suffices."""
MARGIN = 64
"""Maximum number of tokens by which a cut in the text changes their count, since it changes only the tokens near it."""


def is_longer_than(tokenizer: Any, text: str, max_tokens: int) -> bool:
    """Return True if a text certainly has more than `max_tokens` tokens, found by tokenizing only its beginning.

    A tokenizer needs some 400 bytes of memory per character, five gigabytes for a row of eleven million. A beginning
    with too many tokens proves that the whole is too long, because later text changes only its last tokens. How many
    characters are needed depends on the tokenizer and the text (a run of blanks may be one token), so the beginning is
    doubled until it has enough tokens. Returns False if it would reach the end of the text.
    """
    size = CHARACTERS * (max_tokens + MARGIN)
    while size < len(text):
        if len(tokenizer(text[:size], add_special_tokens=False)["input_ids"]) > max_tokens + MARGIN:
            return True
        size *= 2
    return False
