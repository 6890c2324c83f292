"""Hide secrets: passwords in URLs, keys and tokens.

A `Secret` is a string whose text is its masked form, so that printing, joining, hashing or pickling it gives `***`.
Only `reveal_secret` returns the value. In addition, all output for people (errors, logs, tracebacks, the diff of a
checkout) passes through `redact`, which masks the shapes in `SHAPES` and the values of this process's secrets.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote


class KeyShape(NamedTuple):
    """The form of one issuer's API keys or other secrets, as a regular expression.

    Attributes:
        issuer: the service that issues them.
        hints: each key contains one of these texts, so that a text without them has no such key.
        pattern: the prefix is its first group. Every run is bounded.
        source: the page or standard that publishes the prefix.
    """

    issuer: str
    hints: tuple[str, ...]
    pattern: re.Pattern[str]
    source: str


def build_shape(issuer: str, hints: str, pattern: str, source: str) -> KeyShape:
    return KeyShape(issuer, tuple(hints.split()), re.compile(rf"(?<![A-Za-z0-9_]){pattern}", re.ASCII), source)


KEY_SHAPES = (
    build_shape(
        "AWS",
        "AKIA ASIA",
        r"(A[KS]IA)[A-Z0-9]{16}(?![A-Za-z0-9])",
        "docs.aws.amazon.com/IAM/latest/UserGuide/reference_identifiers.html",
    ),
    build_shape(
        "GitHub",
        "ghp_ gho_ ghu_ ghs_ ghr_",
        r"(gh[pousr]_)[A-Za-z0-9]{36,255}(?![A-Za-z0-9_])",
        "docs.github.com/en/authentication, About authentication to GitHub, token formats",
    ),
    build_shape(
        "GitHub",
        "github_pat_",
        r"(github_pat_)[A-Za-z0-9_]{40,255}(?![A-Za-z0-9_])",
        "docs.github.com/en/authentication, About authentication to GitHub, token formats",
    ),
    build_shape(
        "GitLab",
        "glpat- gldt- glrt- glptt- glsoat- glcbt- glft- glimt- glagent- gloas- glffct-",
        r"(gl(?:pat|dt|rt|ptt|soat|cbt|ft|imt|agent|oas|ffct)-)[A-Za-z0-9_.\-]{20,128}(?![A-Za-z0-9_])",
        "docs.gitlab.com/security/tokens, token prefixes",
    ),
    build_shape(
        "Slack",
        "xoxb- xoxp- xoxa- xoxr- xoxs- xoxe. xoxe- xapp-",
        r"(xox[bpars]-|xoxe[.\-](?:xox[bp]-)?|xapp-)[A-Za-z0-9\-]{20,255}(?![A-Za-z0-9])",
        "docs.slack.dev/authentication/tokens",
    ),
    build_shape(
        "Slack",
        "hooks.slack.com",
        r"(hooks\.slack\.com/(?:services|workflows|triggers)/)[A-Za-z0-9/]{20,128}",
        "docs.slack.dev/messaging/sending-messages-using-incoming-webhooks",
    ),
    build_shape(
        "Google", "AIza", r"(AIza)[A-Za-z0-9_\-]{35}(?![A-Za-z0-9_\-])", "cloud.google.com/docs/authentication/api-keys"
    ),
    build_shape(
        "Google",
        "GOCSPX- ya29.",
        r"(GOCSPX-|ya29\.)[A-Za-z0-9_.\-]{20,512}",
        "developers.google.com/identity/protocols/oauth2",
    ),
    build_shape(
        "Stripe",
        "sk_live_ sk_test_ rk_live_ rk_test_ whsec_",
        r"([sr]k_(?:live|test)_|whsec_)[A-Za-z0-9+/]{16,255}(?![A-Za-z0-9])",
        "docs.stripe.com/keys",
    ),
    build_shape(
        "Anthropic",
        "sk-ant-",
        r"(sk-ant-)[A-Za-z0-9_\-]{32,255}(?![A-Za-z0-9_])",
        "docs.anthropic.com/en/api, console.anthropic.com",
    ),
    build_shape(
        "OpenAI",
        "sk-",
        r"(sk-(?:proj-|svcacct-|admin-))[A-Za-z0-9_\-]{32,255}(?![A-Za-z0-9_])",
        "platform.openai.com/docs/api-reference/authentication",
    ),
    build_shape(
        "OpenAI",
        "sk-",
        r"(sk-)[A-Za-z0-9]{32,64}(?![A-Za-z0-9_\-])",
        "platform.openai.com/docs/api-reference/authentication",
    ),
    build_shape(
        "Hugging Face",
        "hf_ api_org_",
        r"(hf_|api_org_)[A-Za-z0-9]{30,64}(?![A-Za-z0-9_])",
        "huggingface.co/docs/hub/security-tokens",
    ),
    build_shape("npm", "npm_", r"(npm_)[A-Za-z0-9]{36}(?![A-Za-z0-9_])", "docs.npmjs.com/about-access-tokens"),
    build_shape("PyPI", "pypi-AgE", r"(pypi-AgE)[A-Za-z0-9_\-]{50,512}", "pypi.org/help/#apitoken"),
    build_shape(
        "SendGrid",
        "SG.",
        r"(SG\.)[A-Za-z0-9_\-]{16,32}\.[A-Za-z0-9_\-]{16,64}(?![A-Za-z0-9_\-])",
        "docs.sendgrid.com/ui/account-and-settings/api-keys",
    ),
)
JWT = KeyShape(
    "JWT",
    ("eyJ",),
    re.compile(
        r"(?<![A-Za-z0-9_\-.])(eyJ)[A-Za-z0-9_\-]{8,4096}\.eyJ[A-Za-z0-9_\-]{8,8192}\.[A-Za-z0-9_\-]{16,1024}", re.ASCII
    ),
    "RFC 7519, RFC 7515: three parts in base64url, the first two of which are objects of JSON",
)
PRIVATE_KEY = KeyShape(
    "private key",
    ("PRIVATE KEY",),
    re.compile(
        r"(-----BEGIN (?:[A-Z0-9]{1,12} ){0,2}PRIVATE KEY(?: BLOCK)?-----)"
        r"[A-Za-z0-9+/=\s\\:,.\-]{16,16384}?-----END (?:[A-Z0-9]{1,12} ){0,2}PRIVATE KEY(?: BLOCK)?-----",
        re.ASCII,
    ),
    "RFC 7468, RFC 4880",
)
VARIED = 8
"""Minimum number of different characters after a key's prefix: `hf_xxxxxxxx…` is a placeholder."""


def iter_key_spans(text: str, shapes: tuple[KeyShape, ...] = KEY_SHAPES) -> Iterator[tuple[int, int]]:
    """Yield the start and end offsets of each API key in a text, for one shape after the other.

    Placeholders such as `hf_xxxxxxxx…` are left out.
    """
    for shape in shapes:
        if any(hint in text for hint in shape.hints):
            for match in shape.pattern.finditer(text):
                if len(set(text[match.end(1) : match.end()])) >= VARIED:
                    yield match.span()


MASK = "***"
NAME_FIELDS = ("data.annotators", "data.exclude_annotators", "stage.annotator")
"""Settings that name people. A run writes their pseudonyms instead."""
URL_FIELDS = ("store.url",)
"""Settings whose value is a URL that may have a password in it."""
STORE_URL = "ALIGN_STORE_URL"
PLAIN = (
    "application_name",
    "cache",
    "charset",
    "connect_timeout",
    "dbname",
    "driver",
    "host",
    "mode",
    "options",
    "port",
    "sslmode",
    "target_session_attrs",
    "timeout",
    "uri",
    "user",
)
"""Parameters of a database's URL that hold no secret. The values of all others are hidden: each driver has its own."""

# A password that was not encoded may hold anything but blanks, so it is taken to reach to the last @; digits in front
# of a path are a port. Every run is bounded: a line of a megabyte must not take a minute.
SHAPES = (
    re.compile(
        r"""(\b[A-Za-z][\w+.\-]{0,30}://[^\s:/@?#'"]{0,256}:)(?!\d+(?:[/?#\s'"]|$))(?=[^\s'"@]{0,1024}+@)[^\s'"]{0,1024}(?=@)"""
    ),
    re.compile(r"""(\bhttps?://)[^\s/@?#'"]{1,1024}(?=@)"""),  # a token is often the user name
    re.compile(
        r"""([?&;](?:[\w.\-]{0,64}(?:password|passwd|pwd|token|secret|signature|credential|api_?key)|key|sig|auth)=)"""
        r"""[^&#;\s'"<>]+""",
        re.IGNORECASE,
    ),
    re.compile(r"""(\b\w{0,64}(?:passphrase|password|passwd|pwd)(?:=|%3D))[^\s&;'"%]+""", re.IGNORECASE),
    re.compile(
        r"""(\b(?:[A-Z][A-Z0-9]*_)*(?:TOKEN|API_KEY|ACCESS_KEY|SECRET_KEY|SECRET|PG_?PASSWORD|PASSWORD)"""
        r"""["']?\s*[=:]\s*["']?)[^\s"']+"""
    ),
    re.compile(r"(\bBearer\s+)[\w.~+/\-]{8,}=*"),
    re.compile(r"(\bal-)[\w\-]{43}(?![\w\-])"),  # a key of our own server
    *(shape.pattern for shape in (*KEY_SHAPES, JWT, PRIVATE_KEY)),
)
SECRET_NAMES = (
    r"(?:[\w\-]{0,64}[_\-])?(?:api[_\-]?key|access[_\-]?key|secret[_\-]?key|private[_\-]?key|secret|password|passwd|passphrase|"
    r"credentials?|(?:api|auth|access|bearer|refresh|session|hf|id)[_\-]?token)"
)
SECRET_KEY = re.compile(rf"(?:{SECRET_NAMES}|token|authorization)", re.IGNORECASE)
"""Keys of a mapping whose values are secrets of any form. `eos_token` and `api_key_env` are none."""
SHAPES += (
    re.compile(
        rf"""((?<![\w\-]){SECRET_NAMES}["']?\s*[:=]\s*["']?)(?!\*\*\*)[^\s"',;}}\]&<>]{{1,1024}}""", re.IGNORECASE
    ),
)
NAMED_SECRET = re.compile(r"(TOKEN|KEY|PASSWORD|PASSWD|SECRET)$")
SHORTEST = 6
"""Minimum number of characters of a value that is masked everywhere: a shorter one may be an ordinary word."""

LONG = 8
"""Minimum number of characters of an environment variable's value that is masked everywhere.

A variable called KEY may hold a word such as `enabled`.
"""

_secret_values: set[str] = set()


class Secret(str):
    """A string whose text is a mask, such as `***`, and which holds the secret value separately.

    Two secrets with the same display are equal, even if their values differ.

    Args:
        value: the hidden value.
        display: the text of the string.
    """

    _value: str

    def __new__(cls, value: str, display: str = MASK) -> Secret:
        secret = super().__new__(cls, display)
        secret._value = value
        return secret

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, _: Any) -> Secret:
        return self

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)  # a pickle must not hold the value


def reveal_secret(text: str) -> str:
    """Return the hidden value of a `Secret`, and any other text as it is. Call it only where the value is used."""
    return text._value if isinstance(text, Secret) else text


def hide_password(url: str) -> str:
    """Return a database's URL as a `Secret` that displays `***` for its password and for unknown parameters.

    A URL without a password or such parameters is returned as it is. The hidden values are registered, so that `redact`
    masks them too.
    """
    if isinstance(url, Secret):
        return url
    match = re.match(r"([A-Za-z][\w+.\-]*://[^:/@?]*:)(.*)(?=@)", url, re.DOTALL)
    if not has_clear_host(url):
        display = url.partition("://")[0] + "://" + MASK
    elif match:
        for value in {match[2], unquote(match[2])}:
            register_secret(value, match[1] + url[match.end() :])
        display = mask_secrets(match[1] + MASK + url[match.end() :])
    else:
        display = mask_secrets(url) if "://" in url else MASK  # the password may be anywhere in a text that is no URL
    display = register_and_hide_url_parameters(display, url)
    return url if display == url else Secret(url, display)


def register_and_hide_url_parameters(display: str, url: str) -> str:
    """Return `display`, the masked form of `url`, with `***` for the value of each query parameter not in `PLAIN`.

    The values in `url` are registered, so that `redact` masks them too.
    """
    front, mark, query = display.partition("?")
    for name, value in parse_qsl(url.partition("?")[2], keep_blank_values=True):
        if name.lower() not in PLAIN:
            register_secret(value)
    parts = (part.partition("=") for part in re.split("[&;]", query))
    values = (f"{name}={value if name.lower() in PLAIN else MASK}" if equals else MASK for name, equals, value in parts)
    return front + mark + "&".join(values) if mark else display


def has_clear_host(url: str) -> bool:
    """Return whether a database URL's host is unambiguous: at most one @ before its parameters, and none in them.

    With another @, a driver may take half of the password for the host.
    """
    address = url.partition("://")[2]
    return address.startswith("/") or (address.count("@") < 2 and "@" not in address.partition("?")[2])


def register_secret(value: str, shown_text: str = "") -> None:
    """Add a value to the secrets that `redact` masks in all output, unless it is shorter than `SHORTEST` characters.

    Args:
        shown_text: text that is displayed beside the value. A value that occurs in it is not masked everywhere.
    """
    if len(value) >= SHORTEST and value not in shown_text:
        _secret_values.add(value)


def mask_secrets(text: str) -> str:
    """Return a text with `***` in place of everything that looks like a secret: passwords in URLs, API keys, tokens.

    The patterns are `SHAPES`. The result depends on the text alone, so that it may be part of a run's identity.
    """
    for shape in SHAPES:
        text = shape.sub(rf"\g<1>{MASK}", text)
    return text


def redact(text: str) -> str:
    """Return a text with `***` for everything that looks like a secret, and for this process's known secret values.

    The known values are those of `register_secret` and of environment variables such as `HF_TOKEN`.
    """
    of_environment = {os.environ[name] for name in os.environ if is_secret_variable(name)}
    long_values = {value for value in of_environment if len(value) >= LONG}
    for value in sorted(_secret_values | long_values, key=len, reverse=True):
        text = text.replace(value, MASK)
    return mask_secrets(text)


@lru_cache(maxsize=1024)
def is_secret_variable(variable: str) -> bool:
    """Return whether the name of an environment variable, such as `HF_TOKEN`, says that its value is a secret.

    Cached, because every error checks all variables.
    """
    return NAMED_SECRET.search(variable) is not None


def mask_tree(value: Any, mask: Callable[[str], str] = mask_secrets) -> Any:
    """Return nested mappings and lists with `mask` applied to every text, and `***` for the value of each secret key.

    `SECRET_KEY` matches the secret keys, such as `api_key`. Their values are registered, so that `redact` masks them
    too.
    """
    if isinstance(value, Mapping):
        return {
            key: register_and_mask(inner) if SECRET_KEY.fullmatch(str(key)) else mask_tree(inner, mask)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [mask_tree(inner, mask) for inner in value]
    return mask(str(value)) if isinstance(value, str) else value


def register_and_mask(value: Any) -> Any:
    """Return `***` in place of a secret value, or of each value in mappings and lists, and let `redact` mask it too.

    None, booleans and empty texts are returned as they are.
    """
    if value is None or value == "" or isinstance(value, bool):
        return value
    if isinstance(value, Mapping):
        return {key: register_and_mask(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [register_and_mask(inner) for inner in value]
    if str(value) != MASK:
        register_secret(str(value))
    return MASK


def drop_masks(value: Any) -> Any:
    """Return nested mappings and lists with `user:***@host` in each text replaced by `user@host`.

    A database is the same one if its password comes from elsewhere than its URL.
    """
    if isinstance(value, Mapping):
        return {key: drop_masks(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [drop_masks(inner) for inner in value]
    return value.replace(f":{MASK}@", "@") if isinstance(value, str) else value


def mask_argument(argument: str) -> str:
    """Return a command-line argument `key=value` with the secrets and the names of people in it masked."""
    key, equals, value = argument.partition("=")
    if equals and key.lstrip("+") in NAME_FIELDS:
        return f"{key}={MASK}"
    return f"{key}={hide_password(value)}" if equals and key in URL_FIELDS else mask_secrets(argument)


class RedactingFormatter(logging.Formatter):
    """A formatter of log records and their tracebacks that masks secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def print_redacted_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of an unhandled exception to stderr, with secrets masked. Fits `sys.excepthook`."""
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))
