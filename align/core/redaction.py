"""Hide secrets: passwords in URLs, keys and tokens.

A `Secret` is a string whose text is its masked form, so that printing, joining, hashing or pickling it gives `***`;
`value_of` alone returns the value. In addition, all output for people (errors, logs, tracebacks, the diff of a
checkout) passes through `redacted`, which masks the shapes in `KEY_SHAPES` and the values of this process's secrets.
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
    """The form of one issuer's keys.

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


def shape(issuer: str, hints: str, pattern: str, source: str) -> KeyShape:
    return KeyShape(issuer, tuple(hints.split()), re.compile(rf"(?<![A-Za-z0-9_]){pattern}", re.ASCII), source)


KEY_SHAPES = (
    shape(
        "AWS",
        "AKIA ASIA",
        r"(A[KS]IA)[A-Z0-9]{16}(?![A-Za-z0-9])",
        "docs.aws.amazon.com/IAM/latest/UserGuide/reference_identifiers.html",
    ),
    shape(
        "GitHub",
        "ghp_ gho_ ghu_ ghs_ ghr_",
        r"(gh[pousr]_)[A-Za-z0-9]{36,255}(?![A-Za-z0-9_])",
        "docs.github.com/en/authentication, About authentication to GitHub, token formats",
    ),
    shape(
        "GitHub",
        "github_pat_",
        r"(github_pat_)[A-Za-z0-9_]{40,255}(?![A-Za-z0-9_])",
        "docs.github.com/en/authentication, About authentication to GitHub, token formats",
    ),
    shape(
        "GitLab",
        "glpat- gldt- glrt- glptt- glsoat- glcbt- glft- glimt- glagent- gloas- glffct-",
        r"(gl(?:pat|dt|rt|ptt|soat|cbt|ft|imt|agent|oas|ffct)-)[A-Za-z0-9_.\-]{20,128}(?![A-Za-z0-9_])",
        "docs.gitlab.com/security/tokens, token prefixes",
    ),
    shape(
        "Slack",
        "xoxb- xoxp- xoxa- xoxr- xoxs- xoxe. xoxe- xapp-",
        r"(xox[bpars]-|xoxe[.\-](?:xox[bp]-)?|xapp-)[A-Za-z0-9\-]{20,255}(?![A-Za-z0-9])",
        "docs.slack.dev/authentication/tokens",
    ),
    shape(
        "Slack",
        "hooks.slack.com",
        r"(hooks\.slack\.com/(?:services|workflows|triggers)/)[A-Za-z0-9/]{20,128}",
        "docs.slack.dev/messaging/sending-messages-using-incoming-webhooks",
    ),
    shape(
        "Google", "AIza", r"(AIza)[A-Za-z0-9_\-]{35}(?![A-Za-z0-9_\-])", "cloud.google.com/docs/authentication/api-keys"
    ),
    shape(
        "Google",
        "GOCSPX- ya29.",
        r"(GOCSPX-|ya29\.)[A-Za-z0-9_.\-]{20,512}",
        "developers.google.com/identity/protocols/oauth2",
    ),
    shape(
        "Stripe",
        "sk_live_ sk_test_ rk_live_ rk_test_ whsec_",
        r"([sr]k_(?:live|test)_|whsec_)[A-Za-z0-9+/]{16,255}(?![A-Za-z0-9])",
        "docs.stripe.com/keys",
    ),
    shape(
        "Anthropic",
        "sk-ant-",
        r"(sk-ant-)[A-Za-z0-9_\-]{32,255}(?![A-Za-z0-9_])",
        "docs.anthropic.com/en/api, console.anthropic.com",
    ),
    shape(
        "OpenAI",
        "sk-",
        r"(sk-(?:proj-|svcacct-|admin-))[A-Za-z0-9_\-]{32,255}(?![A-Za-z0-9_])",
        "platform.openai.com/docs/api-reference/authentication",
    ),
    shape(
        "OpenAI",
        "sk-",
        r"(sk-)[A-Za-z0-9]{32,64}(?![A-Za-z0-9_\-])",
        "platform.openai.com/docs/api-reference/authentication",
    ),
    shape(
        "Hugging Face",
        "hf_ api_org_",
        r"(hf_|api_org_)[A-Za-z0-9]{30,64}(?![A-Za-z0-9_])",
        "huggingface.co/docs/hub/security-tokens",
    ),
    shape("npm", "npm_", r"(npm_)[A-Za-z0-9]{36}(?![A-Za-z0-9_])", "docs.npmjs.com/about-access-tokens"),
    shape("PyPI", "pypi-AgE", r"(pypi-AgE)[A-Za-z0-9_\-]{50,512}", "pypi.org/help/#apitoken"),
    shape(
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
"""Least number of different characters behind a prefix: `hf_xxxxxxxx…` is a placeholder."""


def find_keys(text: str, shapes: tuple[KeyShape, ...] = KEY_SHAPES) -> Iterator[tuple[int, int]]:
    """Yield where keys of these shapes begin and end in a text, by shape. Placeholders do not count."""
    for one in shapes:
        if any(hint in text for hint in one.hints):
            for match in one.pattern.finditer(text):
                if len(set(text[match.end(1) : match.end()])) >= VARIED:
                    yield match.span()


MASK = "***"
URL_FIELDS = ("store.url",)
"""Settings that hold a URL with a password in it."""
STORE_URL = "ALIGN_STORE_URL"
PLAIN = (
    "application_name", "cache", "charset", "connect_timeout", "dbname", "driver", "host", "mode", "options", "port",
    "sslmode", "target_session_attrs", "timeout", "uri", "user",
)  # fmt: skip
"""Parameters of a database's URL that hold no secret. Of all others the values are hidden: each driver has its own."""

# A password may hold anything but blanks where nobody encoded it, so it is taken to reach to the last @; digits in
# front of a path are a port. Every run is bounded: a line of a megabyte must not take a minute.
SHAPES = (
    re.compile(
        r"""(\b[A-Za-z][\w+.\-]{0,30}://[^\s:/@?#'"]{0,256}:)(?!\d+(?:[/?#\s'"]|$))(?=[^\s'"@]{0,1024}+@)[^\s'"]{0,1024}(?=@)"""
    ),
    re.compile(r"""(\bhttps?://)[^\s/@?#'"]{1,1024}(?=@)"""),  # here a token is often the user
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
"""Keys of a mapping whose value is a secret, whatever it looks like. `eos_token` and `api_key_env` are none."""
SHAPES += (
    re.compile(
        rf"""((?<![\w\-]){SECRET_NAMES}["']?\s*[:=]\s*["']?)(?!\*\*\*)[^\s"',;}}\]&<>]{{1,1024}}""", re.IGNORECASE
    ),
)
NAMED_SECRET = re.compile(r"(TOKEN|KEY|PASSWORD|PASSWD|SECRET)$")
SHORTEST = 6
"""Characters below which a value is a word like another, and only its place tells."""

LONG = 8
"""The same for what the environment calls a key: many a one is switched with a word."""

_given: set[str] = set()


class Secret(str):
    """Text that shows itself masked. Two that hide different values behind one mask are equal: the place is what tells
    one from another, never the secret.

    Args:
        value: what is hidden.
        display: what everybody sees.
    """

    _value: str

    def __new__(cls, value: str, display: str = MASK) -> Secret:
        made = super().__new__(cls, display)
        made._value = value
        return made

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, _: Any) -> Secret:
        return self

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)  # a pickle is a file like another


def value_of(text: str) -> str:
    """What a secret hides; any other text as it is. To be asked for where the value is used, and nowhere before."""
    return text._value if isinstance(text, Secret) else text


def secret_url(url: str) -> str:
    """A URL of a database whose text has `***` for its password; the same where it has none."""
    if isinstance(url, Secret):
        return url
    match = re.match(r"([A-Za-z][\w+.\-]*://[^:/@?]*:)(.*)(?=@)", url, re.DOTALL)
    if not tells_its_host(url):
        display = url.partition("://")[0] + "://" + MASK
    elif match:
        for value in {match[2], unquote(match[2])}:
            remember(value, match[1] + url[match.end() :])
        display = masked(match[1] + MASK + url[match.end() :])
    else:
        display = masked(url) if "://" in url else MASK  # what is no URL says not where its password is
    display = without_parameters(display, url)
    return url if display == url else Secret(url, display)


def without_parameters(display: str, url: str) -> str:
    """What is shown of a URL with `***` for the value of each parameter that is not known to be harmless."""
    front, mark, query = display.partition("?")
    for name, value in parse_qsl(url.partition("?")[2], keep_blank_values=True):
        if name.lower() not in PLAIN:
            remember(value)
    parts = (part.partition("=") for part in re.split("[&;]", query))
    values = (f"{name}={value if name.lower() in PLAIN else MASK}" if equals else MASK for name, equals, value in parts)
    return front + mark + "&".join(values) if mark else display


def tells_its_host(url: str) -> bool:
    """Whether the @ that ends a URL's password is the only one where it matters: behind another, half of a password
    passes for a host."""
    rest = url.partition("://")[2]
    return rest.startswith("/") or (rest.count("@") < 2 and "@" not in rest.partition("?")[2])


def remember(value: str, around: str = "") -> None:
    """Have `redacted` mask a value wherever it stands: not one that is a common word, or that its own surroundings
    show."""
    if len(value) >= SHORTEST and value not in around:
        _given.add(value)


def masked(text: str) -> str:
    """`text` with `***` wherever something has the shape of a secret. It depends on nothing else: the same text gives
    the same in any process, so that it may be part of an identity."""
    for shape in SHAPES:
        text = shape.sub(rf"\g<1>{MASK}", text)
    return text


def redacted(text: str) -> str:
    """`text`, for people to read, with `***` for the shapes of secrets and for the values that this process knows."""
    named = {os.environ[name] for name in os.environ if names_secret(name)}
    named = {value for value in named if len(value) >= LONG}
    for value in sorted(_given | named, key=len, reverse=True):
        text = text.replace(value, MASK)
    return masked(text)


@lru_cache(maxsize=1024)
def names_secret(variable: str) -> bool:
    """Whether a variable of the environment holds a secret. It is asked of every one for every error."""
    return NAMED_SECRET.search(variable) is not None


def masked_tree(value: Any, mask: Callable[[str], str] = masked) -> Any:
    """Return nested mappings and lists with every text in them masked, and the whole value of each key whose name says
    that it is a secret."""
    if isinstance(value, Mapping):
        return {
            key: masked_secret(inner) if SECRET_KEY.fullmatch(str(key)) else masked_tree(inner, mask)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [masked_tree(inner, mask) for inner in value]
    return mask(str(value)) if isinstance(value, str) else value


def masked_secret(value: Any) -> Any:
    """Return the mask in place of a secret, which is masked from now on wherever else it would be shown. Nothing, a
    truth value and an empty text stay as they are."""
    if value is None or value == "" or isinstance(value, bool):
        return value
    if isinstance(value, Mapping):
        return {key: masked_secret(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [masked_secret(inner) for inner in value]
    if str(value) != MASK:
        remember(str(value))
    return MASK


def unmarked(value: Any) -> Any:
    """Nested mappings and lists without the mask of a URL: `user:***@host` as `user@host`. A database is the same one
    whether its password came with the URL or from somewhere else."""
    if isinstance(value, Mapping):
        return {key: unmarked(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [unmarked(inner) for inner in value]
    return value.replace(f":{MASK}@", "@") if isinstance(value, str) else value


def masked_argument(argument: str) -> str:
    """`key=value` of a command line, as others may read it."""
    key, equals, value = argument.partition("=")
    return f"{key}={secret_url(value)}" if equals and key in URL_FIELDS else masked(argument)


class Formatter(logging.Formatter):
    """Formats a log record, its traceback included, and masks what is secret in it."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What Python prints of an error that nobody handled, masked."""
    sys.stderr.write(redacted("".join(traceback.format_exception(kind, error, trace))))
