"""Authentication of a single visitor by a link with a secret key that the server prints, as with a notebook server."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from starlette.responses import Response

from align.core.errors import InputError, StorageError, require
from align.core.files import read_text
from align.core.outputs import refuse_foreign_file, replace_file
from align.web.auth import Visitor, build_error_response

V = TypeVar("V", bound=Visitor)
KEY_TEXT = re.compile(rb"[\w-]{32}")
"""Pattern of a key file's content, as `secrets.token_urlsafe(24)` returns it."""
OTHER_KEY = "Move the file away: a key is made in its place."


class KeyAuthenticator(Generic[V]):
    """Authenticator of a single visitor, who opens a link with a secret key and then sends the key as a cookie.

    Args:
        person: the visitor.
        cookie: name of the cookie, different for each port: browsers send a host's cookies to all of its ports.
        attributes: further attributes of the cookie.
    """

    def __init__(self, key: str, person: V, cookie: str, attributes: str = "SameSite=Strict") -> None:
        require(len(key) >= 32, "key", "(not shown)", "it is too short", "Give 32 characters.")
        self.key = key
        self.person = person
        self.cookie = cookie
        self.attributes = attributes

    def find_visitor(self, cookies: Mapping[str, str]) -> V | None:
        return self.person if self._is_key(cookies.get(self.cookie, "")) else None

    def create_link_cookie(self, key: str) -> str | None:
        return f"{self.cookie}={key}; Path=/; HttpOnly; {self.attributes}" if self._is_key(key) else None

    def refuse_unknown_visitor(self, path: str, query: Mapping[str, str]) -> Response | None:
        return build_error_response(403, "Open the link that the server printed when it started.")

    def _is_key(self, text: str) -> bool:
        return secrets.compare_digest(text.encode(), self.key.encode())


@dataclass(frozen=True, slots=True)
class AnonymousVisitor:
    """A visitor without an account or a name."""

    name: str = ""


class OpenAuthenticator:
    """Authenticator that accepts every visitor, for a page that only this machine can reach. The other checks of
    `align.web.auth` still apply."""

    visitor = AnonymousVisitor()

    def find_visitor(self, cookies: Mapping[str, str]) -> AnonymousVisitor | None:
        return self.visitor

    def create_link_cookie(self, key: str) -> str | None:
        return None

    def refuse_unknown_visitor(self, path: str, query: Mapping[str, str]) -> Response | None:
        return None


def load_or_create_key(path: Path) -> str:
    """Return the secret key of the login link from its file, or write a new key there if the file is missing or empty.
    The link stays valid when the server restarts.

    Raises:
        InputError: the file exists and holds something other than a key.
        StorageError: the file cannot be read or written.
    """
    try:
        refuse_foreign_file(path, "key", lambda data: not data or KEY_TEXT.fullmatch(data) is not None, OTHER_KEY)
        if not path.is_file() or not path.stat().st_size:
            replace_file(path, secrets.token_urlsafe(24).encode(), mode=0o600)
        return read_text(path, "key")
    except InputError:
        raise
    except OSError as error:
        remedy = "Make its folder writable."
        raise StorageError("key", str(path), f"it cannot be kept ({error.strerror})", remedy) from error
