"""Why what a row says makes no record, though nothing is wrong with it: counted, and left out."""

from __future__ import annotations

from enum import Enum


class Drop(Enum):
    """One judgement, or one path of a tree, that makes no record."""

    IDENTICAL = "chosen and rejected are the same"
    TIE = "neither was preferred"
    UNPAIRED = "no other response to the prompt"
    UNANSWERED = "the path through the tree ends with a question"
    DELETED = "the message was deleted, with all that answers it"
