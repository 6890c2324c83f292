"""What somebody judges under: the project's settings, the guidelines before them, and what the page is for.

Both change while people work. Each step that a page is sent says its terms, and each vote says those that it was made
under; it is held to these, however long it waited in the page, and keeps them in the ledger.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection

from align.annotate.store import Settings
from align.annotate.store.projects import guidelines_of, settings_of, version_of
from align.core.errors import require


@dataclass(frozen=True, slots=True)
class Terms:
    """Attributes:
    version: of the project's settings, see `version_of`.
    mode: `work`, judging items, or `review`, settling what others said of them.
    guidelines: the version before their eyes; None where there are none.
    """

    version: int
    mode: str
    guidelines: int | None


def mode_of(purpose: str) -> str:
    """What a page is for that shows an item of this purpose: gold items and repeats look like any other."""
    return "review" if purpose == "review" else "work"


def terms_now(db: Connection, project: str, mode: str) -> tuple[Terms, Settings]:
    """What is judged under from now on, and the settings of that version."""
    guidelines = guidelines_of(db, project)
    terms = Terms(version_of(db, project), mode, None if guidelines is None else guidelines[0])
    return terms, settings_of(db, project)


def check_terms(db: Connection, project: str, purpose: str, terms: Terms) -> None:
    """Raises where nobody can have judged an item of this purpose under such terms. (Its version the store checks.)"""
    mode = mode_of(purpose)
    require(terms.mode == mode, "mode", terms.mode, f"the item was given for {mode}", "Ask for another.")
    known = terms.guidelines is None or guidelines_of(db, project, terms.guidelines) is not None
    require(known, "guidelines", terms.guidelines, "there is no such version", "Give the one that was shown.")
