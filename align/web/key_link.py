"""One person, who has the link that the server prints, as with a notebook server."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar
from urllib.parse import parse_qs

from align.errors import StorageError, require
from align.files import read_text
from align.web.gate import KEY, Answer, Visitor, refusal

V = TypeVar("V", bound=Visitor)


class KeyAuthenticator(Generic[V]):
    """Knows whoever came by the link once.

    Args:
        cookie: its name; browsers send a host's cookies to all of its ports.
        attributes: of the cookie, beside those that it always has.
    """

    def __init__(self, key: str, person: V, cookie: str, attributes: str = "SameSite=Strict") -> None:
        require(len(key) >= 32, "key", "(not shown)", "it is too short to keep anybody out", "Give 32 characters.")
        self.key, self.person, self.cookie, self.attributes = key, person, cookie, attributes

    def who(self, cookies: Mapping[str, str]) -> V | None:
        return self.person if self._fits(cookies.get(self.cookie, "")) else None

    def opened(self, query: str) -> str | None:
        given = parse_qs(query).get(KEY, [""])[0]
        return f"{self.cookie}={given}; Path=/; HttpOnly; {self.attributes}" if self._fits(given) else None

    def unauthenticated(self, path: str, query: str) -> Answer | None:
        return refusal(403, "Open the link that the server printed when it started.")

    def _fits(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self.key.encode())


@dataclass(frozen=True, slots=True)
class Somebody:
    """A visitor of whom nothing is known but that they may come in."""

    name: str = ""


class Anybody:
    """Knows whoever comes: for a page on this machine alone, behind the gate's other checks."""

    visitor = Somebody()

    def who(self, cookies: Mapping[str, str]) -> Somebody | None:
        return self.visitor

    def opened(self, query: str) -> str | None:
        return None

    def unauthenticated(self, path: str, query: str) -> Answer | None:
        return None


def key_in(path: Path) -> str:
    """The key of the link: made once, so that a page outlives a restart of its server; for the user's own eyes.

    Raises:
        StorageError: it cannot be read or written.
    """
    try:
        if not path.is_file() or len(read_text(path, "key")) < 32:  # a crash may have left less
            unfinished = path.with_name(f"{path.name}.part")
            unfinished.unlink(missing_ok=True)
            with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_urlsafe(24))
            os.replace(unfinished, path)
        return read_text(path, "key")
    except OSError as error:
        remedy = "Make its folder writable."
        raise StorageError("key", str(path), f"it cannot be kept ({error.strerror})", remedy) from error
