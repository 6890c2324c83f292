"""Personal data that can be recognised by its form: found, then checked by the rules that such data follows.

Names, addresses and dates of birth have no form, and are not found.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from align.data.clean.arguments import check_choice, check_list
from align.data.clean.checksums import iban_end, is_card
from align.data.clean.outcome import Drop, Noted, rewritten, said
from align.data.records.content import names_in
from align.types import Record

LETTERS = "A-Za-z0-9_\u00c0-\u024f\u0370-\u052f"
EMAIL = re.compile(
    rf"(?<![{LETTERS}.%+-])(?!git@)[{LETTERS}](?:[{LETTERS}.%+'-]{{0,63}})"
    rf"@(?:[{LETTERS}-]{{1,63}}\.){{1,8}}(?:[A-Za-z]{{2,63}}|xn--[A-Za-z0-9-]{{2,59}})(?![{LETTERS}])"
)
"""Every part is bounded, and none begins inside another: a megabyte of `a@a@a@` takes linear time."""
GAP = "[ .\\-–\xa0]"
CARD = re.compile(
    rf"(?<!\w)(?:\d{{13,19}}|\d{{4}}({GAP})\d{{4}}\1\d{{4}}\1\d{{4}}(?:\1\d{{1,3}})?|3\d{{3}}({GAP})\d{{6}}\2\d{{4,5}})(?!\w)",
    re.ASCII,
)
"""Digits in one run, or in the groups that are printed on cards."""
IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}[ \-\xa0]?[0-9]{2}(?=[ \-\xa0]?[A-Za-z0-9])")
IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d)", re.ASCII)
IPV6 = re.compile(r"(?<![\w:.])[23][0-9a-f]{3}:[0-9a-f:]{1,35}(?![\w:])", re.ASCII | re.IGNORECASE)
"""Of the range that is given out to hosts, 2000::/3 (RFC 4291)."""
US_SSN = re.compile(r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])", re.ASCII)
"""Area, group and serial numbers that are given out (Social Security Administration, POMS RM 10201.030)."""
PHONE = re.compile(r"(?<![\w.])(?:\+ ?)?\(?\d(?:[ ().\-–/\xa0]{0,3}\d){6,40}(?!\w)", re.ASCII)
"""Where a telephone number may be; whether one is there, phonenumbers says."""

Span = tuple[int, int]
Finder = Callable[[str, tuple[str, ...]], Iterator[Span]]


def emails(text: str, regions: tuple[str, ...]) -> Iterator[Span]:
    return (found.span() for found in EMAIL.finditer(text))


def ibans(text: str, regions: tuple[str, ...]) -> Iterator[Span]:
    return ((found.start(), end) for found in IBAN.finditer(text) if (end := iban_end(text, found.start())))


def cards(text: str, regions: tuple[str, ...]) -> Iterator[Span]:
    return checked(CARD, text, lambda found: is_card(re.sub("[^0-9]", "", found)))


def ipv4s(text: str, regions: tuple[str, ...]) -> Iterator[Span]:
    return checked(IPV4, text, is_public)


def ipv6s(text: str, regions: tuple[str, ...]) -> Iterator[Span]:
    return checked(IPV6, text, is_public)


def us_ssns(text: str, regions: tuple[str, ...]) -> Iterator[Span]:
    return (found.span() for found in US_SSN.finditer(text))


def phones(text: str, regions: tuple[str, ...]) -> Iterator[Span]:
    """Numbers that are given out, as Google's libphonenumber has them. One without a country's number needs a zero in
    front or something between its digits: ten digits in a row are mostly no telephone number."""
    from phonenumbers import Leniency, PhoneNumberMatcher

    for place in PHONE.finditer(text):
        digits = place[0]
        matches = (
            (place.start() + match.start, place.start() + match.end)
            for region in regions or (None,)
            for match in PhoneNumberMatcher(digits, region, leniency=Leniency.VALID)
        )
        for start, end in matches:
            if text[start] in "+0" or not text[start:end].isdigit():
                yield start, end


def checked(pattern: re.Pattern[str], text: str, valid: Callable[[str], bool]) -> Iterator[Span]:
    """Where `pattern` is met and `valid`. One that is not valid may hide another that begins inside it."""
    found = pattern.search(text)
    while found:
        good = valid(found[0])
        if good:
            yield found.span()
        found = pattern.search(text, found.end() if good else found.start() + 1)


def is_public(address: str) -> bool:
    """Whether an address is a host's on the internet: not a private one, nor one that documentation uses."""
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


FINDERS: Mapping[str, Finder] = {
    "email": emails, "iban": ibans, "card": cards, "ipv6": ipv6s, "ipv4": ipv4s, "us_ssn": us_ssns, "phone": phones,
}  # fmt: skip
"""Kind → where it stands in a text. They are looked for in this order, each in what the ones before have left."""
KINDS = tuple(FINDERS)
DIGITS: Mapping[str, int] = {"email": 0, "iban": 6, "card": 13, "ipv6": 1, "ipv4": 4, "us_ssn": 9, "phone": 7}
"""Digits that a kind has at least."""
SIGN: Mapping[str, str] = {"email": "@", "ipv6": ":", "ipv4": ".", "us_ssn": "-"}
"""A character that a kind has."""


def possible(text: str, kinds: tuple[str, ...]) -> tuple[str, ...]:
    """The kinds of which a text has the digits and the signs, at one look; in the order of `FINDERS`."""
    digits = sum(map(text.count, "0123456789"))
    if not digits and "@" not in text:
        return ()
    return tuple(k for k in KINDS if k in kinds and digits >= DIGITS[k] and SIGN.get(k, "") in text)


def apart(spans: Iterator[Span]) -> Iterator[Span]:
    """Spans in order, without those that begin inside an earlier one, as another country's form of a number does."""
    end = 0
    for span in sorted(spans):
        if span[0] >= end:
            yield span
            end = span[1]


def masked(text: str, kinds: tuple[str, ...], regions: tuple[str, ...], met: set[str]) -> str:
    """The text with `[EMAIL]`, `[CARD]`, … where it has personal data, the kinds of which are added to `met`."""
    before = None
    while text != before:  # what was parted by one may be another without it
        before = text
        for kind in possible(text, kinds):
            parts, at = [], 0
            for start, end in apart(FINDERS[kind](text, regions)):
                parts += [text[at:start], f"[{kind.upper()}]"]
                at = end
            if parts:
                met.add(kind)
                text = "".join([*parts, text[at:]])
    return text


@dataclass(frozen=True, slots=True)
class Pii:
    """Finds personal data, in every turn of a record.

    Args:
        action: `mask` writes `[EMAIL]` and the like in its place, `drop` leaves the record out, `report` counts alone.
        kinds: what is looked for.
        regions: countries (ISO 3166, such as US, DE) whose telephone numbers are found in their national form. Numbers
            that begin with + are found for every country.
    """

    action: str = "mask"
    kinds: tuple[str, ...] = KINDS
    regions: tuple[str, ...] = ("US",)

    def __post_init__(self) -> None:
        from phonenumbers import SUPPORTED_REGIONS

        check_choice("action", self.action, ("drop", "mask", "report"))
        check_list("kinds", self.kinds, KINDS, "[email, card]")
        check_list("regions", self.regions, SUPPORTED_REGIONS, "[US, DE]", empty=True)

    def __call__(self, record: Record) -> Record | Drop | Noted:
        if not possible("\n".join([said(record), *names_in(record)]), self.kinds):
            return record
        met: set[str] = set()

        def mask(text: str) -> str:
            return masked(text, self.kinds, self.regions, met)

        made = rewritten(record, mask, mask)
        if not met:
            return record
        named = tuple(kind for kind in KINDS if kind in met)
        if self.action == "drop":
            return Drop(f"pii: {named[0]}", ", ".join(f"[{kind.upper()}]" for kind in named))
        if self.action == "report":
            return Noted(record, named)
        return made if isinstance(made, Drop) else Noted(made, named)

    def hidden(self, text: str) -> str:
        """The text without the personal data that this step finds."""
        return masked(text, self.kinds, self.regions, set())
