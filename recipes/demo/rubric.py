"""The preferences that the demo teaches: what the simulated annotators vote by, and what the evaluation counts.

A good answer is finished, is about what was asked, and meets five items: it has at most three sentences; they are
short; it repeats nothing; it is prose without empty phrases; and it says enough to be of use. An unfinished answer, or
one about something else, meets no item.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache

import snowballstemmer
from prompts import THEMES

MAX_SENTENCES = 3
MAX_SENTENCE_WORDS = 20
REPEATED_WORDS = 5
"""Number of consecutive words that may not occur twice."""
MIN_USEFUL_WORDS = 8
"""Minimum number of words of a useful answer that its question does not have."""
ITEMS = ("brief", "plain", "unrepeated", "prose", "useful")

WORD = re.compile(r"\d+|[^\W\d_][\w'’-]*")
FINISHED = re.compile(r"(?<!\.)[.!?][\"'”’)\]]*$")
SENTENCE_BREAK = re.compile(r"(?<=[.!?])(?:(?<=[.!?])|[\"'”’)\]]+)\s+|\n+")
ABBREVIATION = re.compile(
    r"\b(?:Dr|Mr|Mrs|Ms|St|vs|approx|e\.g|i\.e)\."
    r"|\b[A-Z]\.(?=[A-Z]\.)|(?<=[A-Z]\.)[A-Z]\.(?=\s+[a-z])"  # U.S. law
    r"|\b[ap]\.m\.(?!\s+[A-Z])|\betc\.(?=\s+[a-z])|\b[ap]\.(?=m\.)"
)
LISTED = re.compile(r"(?m)^\s*(?:[-*•#]|\d+[.)])\s|\*\*|:\s*$|[.!?:]\s+(?:[-*•]|\d+[.)])\s+[A-Za-z]")
EMPTY_PHRASE = re.compile(
    r"\b(?:great|good|excellent|wonderful|fascinating|interesting|thoughtful) question\b"
    r"|\bas an? (?:ai|(?:large )?language model)\b|\bi(?:['’]m| am) (?:sorry|glad|happy|here)\b"
    r"|\bi hope (?:this|that|you)\b|\blet me know\b|\bfeel free\b|\bhappy to help\b|\bthank you for\b"
    r"|\bhere are (?:some|a few)\b|^(?:certainly|of course|sure|absolutely)[,.!]",
    re.IGNORECASE,
)


@cache
def stem_word(word: str) -> str:
    return snowballstemmer.stemmer("english").stemWord(word)


def list_words(text: str) -> list[str]:
    return [word.lower() for word in WORD.findall(text)]


def stem_words(text: str) -> list[str]:
    return [stem_word(word) for word in list_words(text)]


COMMON_WORDS = frozenset(
    list_words(
        """
    about all also and any are because been being but can could did does even for from had has have having help
    her here him his how into its just like make makes many may might more most much must need needs not one
    only other our out over please she should some such than that the their them then there these they this
    those through too use used using very want was way ways well were what when where which while who why will
    with would you your
    """
    )
)
"""Words of three letters or more that say nothing by themselves."""
TEMPLATE_WORDS = frozenset(list_words(" ".join(theme.templates for theme in THEMES) + " a an the of to on for"))
"""The words of the templates and of the topics' articles and prepositions."""


def find_topic_stem(question: str) -> str | None:
    """Return the stem of the last word of a question's topic: `pan` of `How do I clean a cast iron pan?`.

    Returns None if the templates have all words of the topic.
    """
    words = [word for word in list_words(question) if word not in TEMPLATE_WORDS]
    return stem_word(words[-1]) if words else None


def find_own_stems(question: str, answer: str) -> set[str]:
    """Return the stems of an answer's words that its question does not have.

    Words that say nothing by themselves are left out, and so are the answer's questions.
    """
    statements = " ".join(
        sentence for sentence in split_sentences(answer) if not sentence.rstrip("\"'”’)]").endswith("?")
    )
    words = [word for word in list_words(statements) if word not in COMMON_WORDS and (len(word) > 2 or word.isdigit())]
    return {stem_word(word) for word in words} - {*stem_words(question)}


def split_sentences(text: str) -> list[str]:
    masked = ABBREVIATION.sub(lambda match: match.group().replace(".", "\0"), text.strip())
    return [part.replace("\0", ".") for part in SENTENCE_BREAK.split(masked) if WORD.search(part)]


def has_repetition(text: str) -> bool:
    """Return whether a run of `REPEATED_WORDS` words occurs twice in a text."""
    words = list_words(text)
    runs = [tuple(words[i : i + REPEATED_WORDS]) for i in range(len(words) - REPEATED_WORDS + 1)]
    return len(set(runs)) < len(runs)


def is_answer(question: str, answer: str) -> bool:
    """Return whether a text ends as a sentence does, names the topic of a question, and says something about it."""
    topic = find_topic_stem(question)
    names_topic = topic is None or topic in stem_words(answer)
    return names_topic and bool(find_own_stems(question, answer)) and FINISHED.search(answer.strip()) is not None


def check_items(question: str, answer: str) -> dict[str, bool]:
    """Return whether an answer meets each of the items.

    An unfinished answer, or one about something else, meets none.
    """
    if not is_answer(question, answer):
        return dict.fromkeys(ITEMS, False)
    sentences = split_sentences(answer)
    return {
        "brief": len(sentences) <= MAX_SENTENCES,
        "plain": all(len(sentence.split()) <= MAX_SENTENCE_WORDS for sentence in sentences),
        "unrepeated": not has_repetition(answer),
        "prose": not LISTED.search(answer) and not EMPTY_PHRASE.search(answer.strip()),
        "useful": len(find_own_stems(question, answer)) >= MIN_USEFUL_WORDS,
    }


EQUAL = dict.fromkeys(ITEMS, 1.0)
CONCISE = {**EQUAL, "brief": 2.0, "plain": 2.0}
CURIOUS = {**EQUAL, "unrepeated": 2.0, "useful": 2.0}


def score_answer(question: str, answer: str, weights: Mapping[str, float] = EQUAL) -> float:
    """Return the weighted share of the items that an answer meets, from 0 to 1."""
    items = check_items(question, answer)
    return sum(weight * items[item] for item, weight in weights.items()) / sum(weights.values())


Conversation = Sequence[Mapping[str, str]]


def score_conversations(conversations: Sequence[Conversation], weights: Mapping[str, float]) -> list[float]:
    questions = [next(m["content"] for m in reversed(chat[:-1]) if m["role"] == "user") for chat in conversations]
    answers = [chat[-1]["content"] for chat in conversations]
    return [score_answer(question, answer, weights) for question, answer in zip(questions, answers, strict=True)]


def score_by_rubric(conversations: Sequence[Conversation]) -> list[float]:
    """Score answers as the evaluation does, with the same weight for each item."""
    return score_conversations(conversations, EQUAL)


def score_as_concise_reader(conversations: Sequence[Conversation]) -> list[float]:
    """Score answers as annotators do who above all want few and short sentences."""
    return score_conversations(conversations, CONCISE)


def score_as_curious_reader(conversations: Sequence[Conversation]) -> list[float]:
    """Score answers as annotators do who above all want to learn something, and each thing once."""
    return score_conversations(conversations, CURIOUS)
