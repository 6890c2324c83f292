"""Shapes of API keys, tokens and private keys, by the prefixes that their issuers publish.

`align.core.redaction` masks them in what is written for people; `align.data.clean.pii` looks for them in training rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple


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
