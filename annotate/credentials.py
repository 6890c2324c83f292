"""What people are called and prove themselves by: names, passwords, and the tokens of sessions and links."""

from __future__ import annotations

import hashlib
import re
import secrets
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address, ip_network

from argon2 import PasswordHasher
from argon2.exceptions import VerificationError

from align.errors import InputError, StorageError, require

SHORTEST_PASSWORD = 12
AT_ONCE, WAITING = 2, 20
"""Passwords that are hashed at a time (each takes 64 MiB), and how many may wait for that: who comes on top is
told to come back, so that strangers at the door do not take the threads of those who work."""
# What Unicode says may be ignored when shown, beyond the categories of controls and spaces, and the blank of Braille.
UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
ALIKE = {"LATIN", "CYRILLIC", "GREEK"}


class Refused(InputError):
    """Somebody may not come in."""


class Busy(StorageError):
    """Too many passwords are being looked at."""


class Passwords:
    """Hashes of passwords: argon2id. Safe to share between threads."""

    def __init__(self, hasher: PasswordHasher) -> None:
        self.hasher = hasher
        self._slots, self._room = threading.Semaphore(AT_ONCE), threading.Semaphore(WAITING)
        self._nobodys = hasher.hash(secrets.token_hex(16))

    @contextmanager
    def _slot(self) -> Iterator[None]:
        if not self._room.acquire(blocking=False):
            raise Busy("password", "(not shown)", "many people are at the door", "Try again in a moment.")
        try:
            with self._slots:
                yield
        finally:
            self._room.release()

    def hashed(self, password: str) -> str:
        with self._slot():
            return self.hasher.hash(password)

    def matches(self, kept: str | None, password: str) -> bool:
        """Whether a password is the one of a hash; None: nobody's, which takes as long to say."""
        try:
            with self._slot():
                return self.hasher.verify(self._nobodys if kept is None else kept, password[:1000])
        except VerificationError:
            return False

    def stale(self, kept: str) -> bool:
        """Whether a hash was made when hashes cost less."""
        return self.hasher.check_needs_rehash(kept)


def digest(token: str) -> str:
    """Of a random token of 256 bits: nothing slower is needed."""
    return hashlib.sha256(token.encode()).hexdigest()


def network(address: str) -> str:
    """Where an address belongs: of IPv6 the /64, for one customer has all of it."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address
    return str(ip_network(f"{parsed}/64", strict=False)) if parsed.version == 6 else address


def tidy(name: str) -> str:
    """A name as it is compared: compatible forms of a letter, capitals, and runs of spaces are one."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def named(name: str) -> str:
    """A name that somebody can have, tidied.

    Raises:
        InputError: it is empty, too long, or holds what cannot be seen.
    """
    name = tidy(name)
    require(0 < len(name) <= 100, "name", name, "it is empty or too long", "Give 1 to 100 characters.")
    seen = all(letter == " " or not unicodedata.category(letter).startswith(("C", "Z")) for letter in name)
    require(seen and not UNSEEN.search(name), "name", name, "it holds what cannot be seen", "Use letters and signs.")
    scripts = {unicodedata.name(letter, "").split(" ")[0] for letter in name} & ALIKE
    require(len(scripts) < 2, "name", name, "letters of two alphabets look alike in it", "Use those of one.")
    return name


def is_name(name: str) -> bool:
    """Whether a tidied name is one that somebody can have."""
    try:
        return named(name) == name
    except InputError:
        return False


def checked(name: str, password: str) -> str:
    """A password that may be chosen (NIST SP 800-63B: length is what counts, no rule of composition).

    Raises:
        InputError: it is too short, too long, or the name.
    """
    good = SHORTEST_PASSWORD <= len(password) <= 1000
    require(
        good, "password", "(not shown)", "it is too short or too long", f"Give {SHORTEST_PASSWORD} or more letters."
    )
    require(tidy(password) != name, "password", "(not shown)", "it is the name", "Choose another.")
    return password
