"""Names, passwords, tokens, and the cookie of a session."""

from __future__ import annotations

import hashlib
import re
import secrets
import unicodedata
from ipaddress import ip_address, ip_network
from urllib.parse import quote

from argon2 import PasswordHasher
from argon2.exceptions import VerificationError

from align.core.errors import InputError, require
from align.web.throttle import FairQueue

SHORTEST_PASSWORD = 12
AT_ONCE = 2
WAITING = 20
PATIENCE_S = 10
"""Passwords that are hashed at a time (each takes 64 MiB), how many may wait for that, and for how many seconds: who
comes on top is told to come back, so that strangers at the door do not take the threads of those who work."""
# What Unicode says may be ignored when shown, beyond the categories of controls and spaces, and the blank of Braille.
UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
ALIKE = {"LATIN", "CYRILLIC", "GREEK"}


class Refused(InputError):
    """A person may not come in."""


class Passwords:
    """Hashes of passwords: argon2id. Safe to share between threads.

    `share` and `failures` say who waits for it, see `FairQueue`.
    """

    def __init__(self, hasher: PasswordHasher) -> None:
        self.hasher = hasher
        self.queue = FairQueue(AT_ONCE, WAITING, PATIENCE_S, "password")
        self._nobodys = hasher.hash(secrets.token_hex(16))

    def hashed(self, password: str, share: str = "", failures: int = 0) -> str:
        """Raises: Busy: others go first."""
        with self.queue.turn(share, failures):
            return self.hasher.hash(password)

    def matches(self, kept: str | None, password: str, share: str = "", failures: int = 0) -> bool:
        """Return whether a password is the one of a hash. For None it is not, which takes as long to compute.

        Raises:
            Busy: others go first.
        """
        try:
            with self.queue.turn(share, failures):
                return self.hasher.verify(self._nobodys if kept is None else kept, password[:1000])
        except VerificationError:
            return False

    def stale(self, kept: str) -> bool:
        """Return whether a hash was made when hashes cost less."""
        return self.hasher.check_needs_rehash(kept)


def new_token() -> str:
    """256 random bits: of a session, a link or a key."""
    return secrets.token_urlsafe(32)


def digest(token: str) -> str:
    """Return what is kept of a random token of 256 bits: nothing slower is needed."""
    return hashlib.sha256(token.encode()).hexdigest()


def session_cookie(name: str, session: str, origin: str, seconds: int) -> str:
    """The header that gives a browser a session; an empty one with 0 seconds takes it."""
    secure = "; Secure" if origin.startswith("https:") else ""
    return f"{name}={quote(session)}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Lax{secure}"


def network(address: str) -> str:
    """Return the network of an address: of IPv6 the /64, for one customer has all of it."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address
    return str(ip_network(f"{parsed}/64", strict=False)) if parsed.version == 6 else address


def normalised_name(name: str) -> str:
    """A name as it is compared: compatible forms of a letter, capitals, and runs of spaces are one."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def checked_name(name: str) -> str:
    """Tidy a name, and check that a person can have it.

    Raises:
        InputError: it is empty, too long, or holds what cannot be seen.
    """
    name = normalised_name(name)
    require(0 < len(name) <= 100, "name", name, "it is empty or too long", "Give 1 to 100 characters.")
    seen = all(letter == " " or not unicodedata.category(letter).startswith(("C", "Z")) for letter in name)
    require(seen and not UNSEEN.search(name), "name", name, "it holds what cannot be seen", "Use letters and signs.")
    scripts = {unicodedata.name(letter, "").split(" ")[0] for letter in name} & ALIKE
    require(len(scripts) < 2, "name", name, "letters of two alphabets look alike in it", "Use those of one.")
    return name


def is_name(name: str) -> bool:
    """Return whether a tidied name is one that a person can have."""
    try:
        return checked_name(name) == name
    except InputError:
        return False


def checked_password(name: str, password: str) -> str:
    """A password that may be chosen (NIST SP 800-63B: length is what counts, no rule of composition).

    Raises:
        InputError: it is too short, too long, or the name.
    """
    good = SHORTEST_PASSWORD <= len(password) <= 1000
    require(
        good, "password", "(not shown)", "it is too short or too long", f"Give {SHORTEST_PASSWORD} or more letters."
    )
    require(normalised_name(password) != name, "password", "(not shown)", "it is the name", "Choose another.")
    return password
