"""Account names, passwords, random tokens, and the session cookie."""

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
from align.core.names import normalise_name
from align.web.throttle import FairQueue

MIN_PASSWORD_LENGTH = 12
"""Minimum length of a password, in characters."""
MAX_HASHING = 2
"""Maximum number of passwords that are hashed at the same time, each with 64 MiB of memory."""
MAX_WAITING = 20
"""Password checks that may wait for their turn. Further ones are refused, so that strangers who try to log in do not
occupy the threads of people who are logged in."""
MAX_WAIT_S = 10
"""Seconds that a password check waits before it is refused."""
# Characters that Unicode lets renderers ignore, beyond the categories of controls and spaces, and the blank of Braille.
INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
LOOKALIKE_SCRIPTS = {"LATIN", "CYRILLIC", "GREEK"}


class AccessRefused(InputError):
    """Error for a login or an invitation that is not accepted."""


class Passwords:
    """A hasher and verifier of passwords with argon2id, safe to share between threads.

    `hash_password` and `matches` take a turn in a `FairQueue`, which documents `queue_key` and `failures`.
    """

    def __init__(self, hasher: PasswordHasher) -> None:
        self.hasher = hasher
        self.queue = FairQueue(MAX_HASHING, MAX_WAITING, MAX_WAIT_S, "password")
        self._dummy_hash = hasher.hash(secrets.token_hex(16))

    def hash_password(self, password: str, queue_key: str = "", failures: int = 0) -> str:
        """Return the argon2id hash of a password, after a wait while `MAX_HASHING` others are hashed. Waiting threads
        are ordered by `queue_key` and `failures`.

        Raises:
            ServerBusy: too many password checks wait.
        """
        with self.queue.take_turn(queue_key, failures):
            return self.hasher.hash(password)

    def matches(self, password_hash: str | None, password: str, queue_key: str = "", failures: int = 0) -> bool:
        """Return whether a password matches a hash; without a hash (None), as for an unknown account, return False. The
        latter takes as much computation, so that the time of a response does not tell which accounts exist.

        Raises:
            ServerBusy: too many password checks wait.
        """
        try:
            with self.queue.take_turn(queue_key, failures):
                return self.hasher.verify(self._dummy_hash if password_hash is None else password_hash, password[:1000])
        except VerificationError:
            return False

    def needs_rehash(self, password_hash: str) -> bool:
        """Return whether a hash was computed with other argon2 parameters than the current ones."""
        return self.hasher.check_needs_rehash(password_hash)


def create_token() -> str:
    """Return a random URL-safe token of 256 bits for a session, a link or a key."""
    return secrets.token_urlsafe(32)


def hash_token(token: str) -> str:
    """Return the SHA-256 of a token in hexadecimal, which is stored instead of the token. 256 random bits need no
    slower hash."""
    return hashlib.sha256(token.encode()).hexdigest()


def format_session_cookie(name: str, session: str, origin: str, seconds: int) -> str:
    """Return the `Set-Cookie` value of a session cookie that expires after `seconds`. An empty session with 0 seconds
    deletes the cookie."""
    secure = "; Secure" if origin.startswith("https:") else ""
    return f"{name}={quote(session)}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Lax{secure}"


def get_network(address: str) -> str:
    """Return the /64 network of an IPv6 address, which belongs to one customer, and any other address unchanged."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address
    return str(ip_network(f"{parsed}/64", strict=False)) if parsed.version == 6 else address


def validate_name(name: str) -> str:
    """Return the normalised name of an account, or raise InputError if it is not allowed.

    Raises:
        InputError: it is empty or too long, has invisible characters, or mixes alphabets that look alike.
    """
    name = normalise_name(name)
    require(0 < len(name) <= 100, "name", name, "it is empty or too long", "Give 1 to 100 characters.")
    is_visible = all(letter == " " or not unicodedata.category(letter).startswith(("C", "Z")) for letter in name)
    is_visible = is_visible and not INVISIBLE.search(name)
    require(is_visible, "name", name, "it holds invisible characters", "Use visible letters and symbols.")
    scripts = {unicodedata.name(letter, "").split(" ")[0] for letter in name} & LOOKALIKE_SCRIPTS
    require(
        len(scripts) < 2,
        "name",
        name,
        "it mixes letters of two alphabets that look alike",
        "Use the letters of one alphabet.",
    )
    return name


def is_valid_name(name: str) -> bool:
    """Return whether a name is allowed for an account and equals its normalised form."""
    try:
        return validate_name(name) == name
    except InputError:
        return False


def validate_password(name: str, password: str) -> str:
    """Return a new password unchanged, or raise InputError if its length is not allowed or it equals the account's
    name. Its composition does not count (NIST SP 800-63B).

    Raises:
        InputError: it is too short, too long, or the account's name.
    """
    has_valid_length = MIN_PASSWORD_LENGTH <= len(password) <= 1000
    remedy = f"Give {MIN_PASSWORD_LENGTH} or more letters."
    require(has_valid_length, "password", "(not shown)", "it is too short or too long", remedy)
    require(normalise_name(password) != name, "password", "(not shown)", "it is the name", "Choose another.")
    return password
