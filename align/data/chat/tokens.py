"""Text to token ids, for everybody. What a message says is data: a special token that it spells out is text.

A template writes special tokens to tell turns apart. A tokenizer finds them in the rendered text, whoever wrote them,
so that a row, a prompt or an answer could close its own turn and speak as somebody else. So each of them is found in
the contents before rendering, and its first letter is hidden behind a private-use letter: what is found in the
rendering all the same is the template's own. Where that is all there is, the tokenizer reads the text as it always did.
Where contents spell out more, a copy of the tokenizer reads it that spells its special tokens as no content can: the
whole text at once, so that everything else is cut as ever.

Added tokens that are not special, such as Qwen's `<think>` and `<tool_call>`, are words: templates look for them in
contents, and models write them. A content may become one, unless the template ends answers with it.
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

Veil = dict[int, str]
"""For `str.translate`: the private-use letters that stand in contents, and what they hide."""
Span = tuple[int, int]
"""Characters [start, end)."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Attributes:
    ids: of a text.
    spans: the characters that each was cut from; none where the tokenizer does not tell.
    """

    ids: list[int]
    spans: list[Span]


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """A text that is content and nothing else, without a template around it."""
    return tokens_with(tokenizer, text, []).ids


def beginning_ids(tokenizer: Any) -> list[int]:
    """Tokens that a tokenizer puts in front of a text: BOS, for most."""
    whole, bare = (list(tokenizer("a", add_special_tokens=added)["input_ids"]) for added in (True, False))
    return whole[: whole.index(bare[0])] if bare and bare[0] in whole else []


def tokenised(tokenizer: Any, rendered: str, veil: Veil) -> Tokens:
    """The tokens of a rendering, or of a part of one, of a conversation that is veiled, see `veiled_texts`.

    Raises:
        InputError: see `respelled`.
    """
    return tokens_with(tokenizer, rendered.translate(veil), markup(tokenizer).found(rendered))


def veiled_texts(tokenizer: Any, contents: Sequence[str]) -> tuple[list[str], Veil]:
    """The contents with private-use letters for the first letter of each special token that they spell out, or might
    together with what the template writes beside them; and what these letters hide. Lengths stay."""
    marks = markup(tokenizer)
    starts = [marks.starts(text) for text in contents]
    letters = sorted({text[i] for text, found in zip(contents, starts, strict=True) for i in found})
    if not letters:
        return list(contents), {}
    unused = unused_letters("".join((*contents, *marks.texts, str(tokenizer.chat_template))))
    hiding = dict(zip(letters, unused, strict=False))
    hidden = [
        "".join(hiding[letter] if i in found else letter for i, letter in enumerate(text)) if found else text
        for text, found in zip(contents, starts, strict=True)
    ]
    return hidden, {ord(hides): letter for letter, hides in hiding.items()}


def unused_letters(text: str) -> Iterator[str]:
    """Private-use letters that a text does not hold."""
    held = set(text)
    return (chr(i) for i in chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE)) if chr(i) not in held)


def tokens_with(tokenizer: Any, text: str, own: Sequence[Span]) -> Tokens:
    """The tokens of a text in which `own` are special tokens, and nothing else is."""
    marks = markup(tokenizer)
    if marks.found(text) == own:
        made = as_ever(tokenizer, text)
        if not marks.came_of(text, made):
            return made
    return by_copy(tokenizer, text, own)


def as_ever(tokenizer: Any, text: str) -> Tokens:
    """By the tokenizer itself, to which a special token is one whoever wrote it."""
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    return Tokens(list(made["input_ids"]), list(made.get("offset_mapping", ())))


def by_copy(tokenizer: Any, text: str, own: Sequence[Span]) -> Tokens:
    """By the copy with other spellings, in which only what stands in `own` is a special token."""
    marks = markup(tokenizer)
    copy, spellings = marks.copy or respelled(tokenizer, marks)
    marks.copy = copy, spellings
    parts, where, at = [], [], 0  # where: of each character of the respelled text the one in `text`
    for start, end in own:
        spelling = spellings[text[start:end]]
        parts += [text[at:start], spelling]
        where += [*range(at, start + 1), *[end] * (len(spelling) - 1)]
        at = end
    made = copy.encode("".join((*parts, text[at:])), add_special_tokens=False)
    where += range(at, len(text) + 1)
    return Tokens(list(made.ids), [(where[start], where[end]) for start, end in made.offsets])


def respelled(tokenizer: Any, marks: Markup) -> tuple[Any, dict[str, str]]:
    """A copy of the tokenizer with the same ids, whose special tokens are spelled with a number that nobody can guess;
    and these spellings.

    Raises:
        InputError: it is not made by the library `tokenizers`, or of parts that this cannot copy.
    """
    from tokenizers import Tokenizer

    number = secrets.token_hex(16)
    spellings = {text: f"\ue000{number}.{i}\ue001" for i, text in enumerate(marks.texts)}
    try:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state |= {"truncation": None, "padding": None}
        for token in state["added_tokens"]:
            token["content"] = spellings.get(token["content"], token["content"])
        model = state["model"]
        vocabulary = model["vocab"]  # {piece: id}, or of a unigram model [[piece, score], …]
        if isinstance(vocabulary, dict):
            model["vocab"] = {spellings.get(piece, piece): id for piece, id in vocabulary.items()}
        else:
            model["vocab"] = [[spellings.get(piece, piece), score] for piece, score in vocabulary]
        if (unknown := model.get("unk_token")) is not None:
            model["unk_token"] = spellings.get(unknown, unknown)
        if "merges" in model:  # none may lead to a special token
            model["merges"] = [m for m in model["merges"] if not {*m, "".join(m)} & spellings.keys()]
        return Tokenizer.from_str(json.dumps(state)), spellings
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise InputError(
            "tokenizer",
            type(tokenizer).__name__,
            f"a text spells out one of its special tokens, and no copy reads that as text ({str(error)[:120]})",
            "Take such spellings out of the data, or use a model with a tokenizer.json.",
        ) from error


def special_ids(tokenizer: Any) -> frozenset[int]:
    """No content may become one of these."""
    return markup(tokenizer).ids


def special_texts(tokenizer: Any) -> tuple[str, ...]:
    """Of the same, longest first."""
    return markup(tokenizer).texts


def for_others(tokenizer: Any) -> Any:
    """A copy for those who render chats by transformers' `sanitize_control_tokens`, which makes text of what is in its
    list (saved as `chat_control_tokens`) and of special tokens. Unless told, it takes every added token that the
    template writes, such as Qwen's `</think>`, for one: a template that looks for these in a content would then find
    them between marks, and render another text than training read."""
    made = deepcopy(tokenizer)
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    made.chat_control_tokens = [text for text in special_texts(tokenizer) if text not in special]
    return made


class Markup:
    """The special tokens of a tokenizer, and the added token that its template ends answers with where that is none.

    Attributes:
        ids: no content may become one of these.
        texts: theirs, longest first.
        copy: of `respelled`, once it was needed.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.added_tokens_decoder
        ids = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        tail = behind_an_answer(tokenizer).lstrip()
        ends = [i for i, token in added.items() if token.content.strip() and tail.startswith(token.content)]
        ids |= {max(ends, key=lambda i: len(added[i].content))} if ends else set()
        texts = {tokenizer.convert_ids_to_tokens(i) for i in ids} - {None, ""}
        words = {token.content for token in added.values()} - texts
        self.ids = frozenset(ids)
        self.texts = longest_first(texts)
        self.copy: tuple[Any, dict[str, str]] | None = None
        self._known = frozenset(text.strip() for text in texts)
        self._unknown = tokenizer.unk_token_id
        self._any = any_of(longest_first(texts | words))
        self._here = re.compile(f"(?={any_of(self.texts).pattern})")
        self._letters = {text[0] for text in texts}
        self._heads = {text[:i] for text in texts for i in range(1, len(text))}
        self._tails = {text[i:] for text in texts for i in range(1, len(text))}
        self._longest = max(map(len, texts), default=0)

    def found(self, text: str) -> list[Span]:
        """The special tokens that a tokenizer finds: of all added tokens the leftmost, and there the longest."""
        return [found.span() for found in self._any.finditer(text) if found[0].strip() in self._known]

    def came_of(self, text: str, made: Tokens) -> bool:
        """Whether there is a special token that the text does not spell out: a normaliser makes "</s>" of other
        letters, such as those of full width. What stands for unknown letters is none."""
        suspects = self.ids - {self._unknown}
        return any(
            i in suspects and text[start:end].strip() not in self._known
            for i, (start, end) in zip(made.ids, made.spans, strict=False)
        )

    def starts(self, text: str) -> set[int]:
        """Where a special token begins in a content; or could begin, or go on, at either end of it, which a template
        may trim."""
        anywhere = any(letter in text for letter in self._letters)
        starts = {found.start() for found in self._here.finditer(text)} if anywhere else set()
        inner = text.strip()
        first, last = text.find(inner), text.find(inner) + len(inner)
        sizes = range(1, min(len(inner) + 1, self._longest))
        starts |= {last - size for size in sizes if inner[-size:] in self._heads}
        if any(inner[:size] in self._tails for size in sizes):
            starts.add(first)
        if 0 < len(inner) < self._longest and any(inner in special for special in self.texts):
            starts.add(first)
        return starts


def longest_first(texts: set[str]) -> tuple[str, ...]:
    return tuple(sorted(texts, key=lambda text: (-len(text), text)))


def any_of(texts: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")


ANSWER = "\ue000answer\ue001"


def behind_an_answer(tokenizer: Any) -> str:
    """What the template writes behind an answer; nothing where it refuses one question with one answer."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER}]
    try:
        with render_deadline():
            return tokenizer.apply_chat_template(turns, tokenize=False).partition(ANSWER)[2]
    except Exception:  # a template may raise anything; whoever renders with it says what
        return ""


_markups: WeakKeyDictionary[Any, tuple[Any, Markup]] = WeakKeyDictionary()


def markup(tokenizer: Any) -> Markup:
    """Made once for a tokenizer, and anew where its template or its special tokens change."""
    key = (tokenizer.chat_template, len(tokenizer), tuple(tokenizer.all_special_ids))
    known = _markups.get(tokenizer)
    if known is None or known[0] != key:
        _markups[tokenizer] = known = key, Markup(tokenizer)
    return known[1]


CHARACTERS = 8
"""A token of ordinary text is shorter, so that twice the limit's worth of it settles most texts at one look."""
MARGIN = 64
"""Tokens that a cut may cost or add: they are merged or chosen anew only near it."""


def longer_than(tokenizer: Any, text: str, most: int) -> bool:
    """Whether `text` surely has more than `most` tokens. False where it may have fewer: it is short, or all of it was
    looked at.

    A tokenizer takes some 400 bytes a character for as long as it works, so that a row of eleven million took five
    gigabytes to be found too long. A beginning with enough tokens proves the same of the whole, for what stands behind
    changes none but the last. How many characters that takes depends on the tokenizer and the text (a run of blanks may
    be one token), so the beginning doubles until it does: at most twice the characters that `most` tokens have here.

    Args:
        most: tokens that a row may have.
    """
    looked = CHARACTERS * (most + MARGIN)
    while looked < len(text):
        if len(tokenizer(text[:looked], add_special_tokens=False)["input_ids"]) > most + MARGIN:
            return True
        looked *= 2
    return False
