"""Personal data and secrets that can be recognised by their form: found, then checked by the rules that such data
follows. Where the form says too little (a version and an address have four numbers), the words in front decide.

Names, addresses and dates of birth have no form, and are not found.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from align.core.redaction import JWT, KEY_SHAPES, PRIVATE_KEY, find_keys
from align.core.types import Record
from align.data.clean.outcome import Drop, Noted, check_choice, check_list, rewritten, said
from align.data.read.content import list_argument_names

if TYPE_CHECKING:
    from phonenumbers import PhoneNumberMatch

LETTERS = "A-Za-z0-9_\u00c0-\u024f\u0370-\u052f"
EMAIL = re.compile(
    rf"(?<![{LETTERS}.%+-])(?!git@)[{LETTERS}](?:[{LETTERS}.%+'-]{{0,63}})"
    rf"@(?:[{LETTERS}-]{{1,63}}\.){{1,8}}(?:[A-Za-z]{{2,63}}|xn--[A-Za-z0-9-]{{2,59}})(?![{LETTERS}])"
)
"""Every part is bounded, and none begins inside another: a megabyte of `a@a@a@` takes linear time."""
GAP = "[ .\\-–\xa0]"
CARD = re.compile(
    rf"(?<!\w)(?<!\d\.)(?:\d{{13,19}}|\d{{4}}({GAP})\d{{4}}\1\d{{4}}\1\d{{4}}(?:\1\d{{1,3}})?|3\d{{3}}({GAP})\d{{6}}\2\d{{4,5}})(?!\w)",
    re.ASCII,
)
"""Digits in one run, or in the groups that are printed on cards."""
GROUPS_AHEAD = re.compile(r"(?<!\d)(?:\d{4} ){2}\Z", re.ASCII)
GROUPS_BEHIND = re.compile(r" \d{4}(?!\d)", re.ASCII)
IBAN = re.compile(r"(?<![A-Za-z0-9])(?:[A-Za-z]{2}|[A-Z]{2}[ \-\xa0])[0-9]{2}(?=[ \-\xa0]?[A-Za-z0-9])")
"""In small letters, `is 70` and `at 20` are words and numbers."""
IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d)", re.ASCII)
IPV6 = re.compile(r"(?<![\w:.])[23][0-9a-f]{3}:[0-9a-f:]{1,35}(?![\w:])", re.ASCII | re.IGNORECASE)
"""Of the range that is given out to hosts, 2000::/3 (RFC 4291)."""
US_SSN = re.compile(
    r"(?<![\w-])(?<!\d[ .])(?!000|666|9)\d{3}(?P<gap>[-– ])(?!00)\d{2}(?P=gap)(?!0000)\d{4}(?![\w-])(?![ .]\d)",
    re.ASCII,
)
"""Area, group and serial numbers that are given out (Social Security Administration, POMS RM 10201.030)."""
BARE_SSN = re.compile(r"(?<![\w.,-])(?!000|666|9)\d{3}(?!00)\d{2}(?!0000)\d{4}(?![\w-])(?![.,]\d)", re.ASCII)
"""The same without anything between its parts: one only where the text calls it so."""
PHONE = re.compile(r"(?<![\w.])(?:\+ ?)?\(?\d(?:[ ().\-–/\xa0]{0,3}\d){6,40}(?!\w)", re.ASCII)
"""Where a telephone number may be; whether one is there, phonenumbers says."""
TIMES = re.compile(
    r"(?<!\d)(?:(?:19|20)\d\d([-/.])(?:0?[1-9]|1[0-2])\1(?:0?[1-9]|[12]\d|3[01])"
    r"|(?:0?[1-9]|[12]\d|3[01])([-/.])(?:0?[1-9]|[12]\d|3[01])\2(?:19|20)\d\d)"
    r"(?:(?:T|[ _-]{1,2})[0-2]?\d(?:[:.h-][0-5]\d){0,2}(?=\D|$))?(?!\d)"
    r"|(?<!\d)[0-2]?\d:[0-5]\d(?::[0-5]\d(?:[.,]\d{1,9})?)?(?!\d)",
    re.ASCII,
)
"""Dates and times, which have as many digits as a telephone number."""

BEFORE = 32
"""Characters in front of a number that are read for what it is."""
CALLED_PHONE = re.compile(
    r"(?:\b(?:phones?|tel|telephones?|cell(?:phone)?|mobile|mob|fax|call(?:ing|ed)?|dial|text(?:ed)?|sms|whatsapp|hotline|"
    r"ring|reach(?:ed)?|contact|signal|telegram|landline|voicemail|pager|telefon|telefono|tel[ée]fono|t[ée]l[ée]phone|"
    r"telefonnummer|handy|m[óo]vil|celular|portable|appelez|llama(?:me|r)?|ruf(?:en)?|тел|телефон)\b|电话|手机|電話|携帯|☎|📞|📱)",
    re.IGNORECASE,
)
CALLED_SSN = re.compile(r"\b(?:ssn|social security|social sec)\b", re.IGNORECASE)
CALLED_CARD = re.compile(r"\b(?:card|visa|master ?card|amex|american express|credit|debit|pan|cc)\b", re.IGNORECASE)
CALLED_ADDRESS = re.compile(
    r"(?:(?:\b|_)(?:ip|ips|ipv4|addr(?:ess(?:es)?)?|host|hosts|server|servers|ping|dns|ssh|nameserver|gateway|client|peer|"
    r"subnet|route|via|proxy|firewall|listen|bind|connect(?:ed|ing)?|traceroute|curl|login|logged|blocked|banned|src|dst|"
    r"resolver)\b\W{0,3}|://(?:[^\s/@]{1,64}@)?)$",
    re.IGNORECASE,
)
OTHER_NUMBER = re.compile(
    r"(?:\b(?:orders?|invoices?|tickets?|cases?|parts?|serials?|sku|isbn|issn|ean|upc|gtin|asin|doi|tracking|reference|refs?|"
    r"ids?|account|acct|article|item|model|catalog(?:ue)?|batch|lot|transactions?|timestamp|epoch|version|build|revision|commit|"
    r"hash|uuid|guid|pmid|arxiv|patent|coordinates?|lat(?:itude)?|lon(?:gitude)?|seed|number of|population|pid|"
    r"confirmation|booking|shipment|parcel|docket|vin|imei|licen[cs]e|bestellung|bestellnummer|rechnung|commande|pedido|"
    r"factura|facture|auftrag|sendungsnummer)\b|#|订单|编号)"
    r"\W{0,3}(?:\b(?:no|nr|number|num|id|code|is|was|ref|key|numéro|número|nummer)\b\W{0,3}){0,3}[A-Za-z]{0,4}[-_:]?$",
    re.IGNORECASE,
)
"""Names of numbers that are no telephone, card or social security number, directly in front of one."""
VERSION = re.compile(
    r"(?:\b(?:v|ver|versions?|release[ds]?|rev|revision|build|driver|firmware|sdk|upgrad\w{0,3}|updat\w{0,3}|downgrad\w{0,3}|"
    r"bump\w{0,3}|patch\w{0,3}|sections?|sec|chapters?|clauses?|paragraphs?|articles?|figures?|fig|tables?|appendix|annex|"
    r"requirements?|rules?|oid|kernel|python|java|chrome|firefox|edge|numpy|torch|node|since|assembly\w{0,12}|"
    r"abschnitt|kapitel|versión|versione|версия|safari|opera|webkit|tag|tagged|install\w{0,3})\b[^\w\n]{0,4}"
    r"(?:\b(?:is|was|to|from|number|no|the|of|in)\b\W{0,3}){0,2}|[§^~]\s?|[=<>~!]=\s?|[A-Za-z_][-/_]|\b[vV])$",
    re.IGNORECASE,
)
"""Words and signs in front of a version or a section, which have four numbers as an address has."""
VERSION_ENDS = re.compile(
    r"(?:[-+](?:alpha|beta|rc|dev|pre|snapshot|ubuntu|deb|fc|el|git|post|final|\d)|\.(?:jar|whl|tar|zip|exe|dll|so|deb|rpm)\b)",
    re.IGNORECASE,
)
SMALL = 32
"""Four numbers below this one are a version or a section where nothing says that they are an address."""
RESOLVERS = frozenset({"1.1.1.1", "1.0.0.1", "8.8.8.8", "8.8.4.4", "9.9.9.9", "4.2.2.2"})
"""Addresses of such numbers that everybody knows."""
MODULES = frozenset(
    {"np", "numpy", "jnp", "torch", "tf", "jax", "nn", "pd", "self", "cls", "functools", "math", "mx", "F"}
)
"""Names in front of a dot in code: `x@np.dot` multiplies matrices."""

# --- Numbers that carry a check of their own: payment cards and bank accounts.

DOUBLED = (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)
"""Digit → the sum of the digits of twice it."""
ISSUED = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})"  # Visa
    r"|(?:5[1-5]|2[2-7])\d{14}"  # Mastercard
    r"|3[47]\d{13}"  # American Express
    r"|3[0689]\d{12,17}"  # Diners Club
    r"|35\d{14,17}"  # JCB
    r"|(?:50|5[6-8]|6\d)\d{11,17}"  # Maestro, Discover, UnionPay
)
"""First digits and lengths that card schemes issue (ISO/IEC 7812 ranges, as the schemes publish them)."""
IBAN_LENGTHS: Mapping[str, int] = {
    country: length
    for length, countries in {
        15: "NO",
        16: "BE",
        18: "DK FI FK FO GL NL SD",
        19: "MK SI",
        20: "AT BA EE KZ LT LU MN XK",
        21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA",
        23: "AE GI IL IQ OM SO TL",
        24: "AD CZ DZ ES MD PK RO SA SE SK TN VG",
        25: "AO CV GW LY PT ST",
        26: "IS TR",
        27: "BF BI BJ CF CG CM DJ EG FR GA GR IT KM MC MG ML MR SM SN TD TG YE",
        28: "AL AZ BY CI CY DO GT HN HU LB MA NE NI PL SV",
        29: "BR PS QA UA",
        30: "JO KW MU",
        31: "MT SC",
        32: "LC",
        33: "RU",
    }.items()
    for country in countries.split()
}
"""Country → characters of its account numbers: the IBAN registry of ISO 13616 (SWIFT)."""


def luhn(digits: str) -> bool:
    """Whether the last digit checks the others: ISO/IEC 7812-1, annex B."""
    numbers = [ord(digit) - 48 for digit in reversed(digits)]
    return (sum(numbers[::2]) + sum(DOUBLED[n] for n in numbers[1::2])) % 10 == 0


def is_card(digits: str) -> bool:
    """Whether digits are the number of a payment card: of a range and a length that a scheme issues, with Luhn's
    check."""
    return ISSUED.fullmatch(digits) is not None and luhn(digits)


def mod_97(iban: str) -> bool:
    """Whether the two check digits of an IBAN, in capital letters, are right: ISO 7064, MOD 97-10."""
    turned = iban[4:] + iban[:4]
    return int("".join(str(int(character, 36)) for character in turned)) % 97 == 1


def iban_end(text: str, start: int) -> int:
    """Where the account number ends that begins at `start`: as long as its country's, with a space or a hyphen between
    its characters at the most, and checked. 0 where there is none."""
    length = IBAN_LENGTHS.get(text[start : start + 2].upper(), 0)
    found, at = "", start
    while len(found) < length and at < len(text):
        character = text[at]
        if character.isascii() and character.isalnum():
            found += character
        elif character not in " -\xa0" or not text[at - 1].isalnum():
            return 0
        at += 1
    whole = length > 0 and len(found) == length and not (at < len(text) and text[at].isascii() and text[at].isalnum())
    digits = sum(map(str.isdigit, found))  # no account number has fewer than two fifths; "at 20 people come …" has
    return at if whole and 5 * digits >= 2 * length and mod_97(found.upper()) else 0


Span = tuple[int, int]
Finder = Callable[[str], Iterator[Span]]


def front(text: str, start: int) -> str:
    """Return the text in front of a number, on its line."""
    return text[max(0, start - BEFORE) : start].rpartition("\n")[2]


@lru_cache(1)
def top_level_domains() -> frozenset[str]:
    """The names of IANA's root zone in ASCII. `function` and `png` are none of them."""
    return frozenset((Path(__file__).parent / "top_level_domains.txt").read_text(encoding="ascii").split())


def emails(text: str) -> Iterator[Span]:
    """Addresses at a domain that there may be, which is not called as a function is."""
    for match in EMAIL.finditer(text):
        domain = match[0].rpartition("@")[2]
        first, _, last = domain.rpartition(".")
        known = last.lower() in top_level_domains() or last.lower().startswith("xn--")
        if known and first not in MODULES and not text.startswith(("(", "["), match.end()):
            yield match.span()


def cards(text: str) -> Iterator[Span]:
    """Numbers of cards. Digits in one run are none where the text calls them an order or the like."""
    for start, end in checked(CARD, text, lambda found: is_card(re.sub("[^0-9]", "", found))):
        before = front(text, start)
        # Groups of four digits around a number, one behind it or two in front, are those of a table.
        is_in_table = GROUPS_BEHIND.match(text, end) or GROUPS_AHEAD.search(text, max(0, start - 25), start)
        if CALLED_CARD.search(before) or not (OTHER_NUMBER.search(before) or is_in_table):
            yield start, end


def ipv4s(text: str) -> Iterator[Span]:
    """Public addresses: not versions and sections, which are called so or have small numbers."""
    for start, end in checked(IPV4, text, is_public):
        before = front(text, start)
        if not CALLED_ADDRESS.search(before) or VERSION.search(before):
            small = all(int(part) < SMALL for part in text[start:end].split(".")) and text[start:end] not in RESOLVERS
            if small or VERSION.search(before) or VERSION_ENDS.match(text, end):
                continue
        yield start, end


def us_ssns(text: str) -> Iterator[Span]:
    for pattern in (US_SSN, BARE_SSN):
        for match in pattern.finditer(text):
            before = front(text, match.start())
            called = CALLED_SSN.search(before)
            if called or (pattern is US_SSN and not OTHER_NUMBER.search(before)):
                yield match.span()


def phones(text: str, regions: tuple[str, ...]) -> Iterator[Span]:
    """Numbers that are given out, as Google's libphonenumber has them.

    One that begins with + or 00 may be grouped in any way. Others must be grouped as their country does it and be all
    of the digits that stand there, and no order number or the like. Without a zero in front or anything between its
    digits, a number is one only where the text says so: ten digits in a row are mostly something else.
    """
    from phonenumbers import Leniency, PhoneNumberMatcher

    if not PHONE.search(text):
        return
    plain = TIMES.sub(lambda match: "x" * len(match[0]), text)
    for place in PHONE.finditer(plain):
        digits = place[0].removeprefix("(") if place[0].startswith("(00") else place[0]
        begin = place.end() - len(digits)
        before = front(text, begin)
        called = CALLED_PHONE.search(before)
        if OTHER_NUMBER.search(before) and not called:
            continue
        international = digits.startswith("+") or (digits.startswith("00") and digits[2:3] in "123456789")
        if international:
            number = digits.replace("(0)", "   ")
            number = f" +{number[2:]}" if number.startswith("00") else number
            for match in PhoneNumberMatcher(number, None, leniency=Leniency.VALID):
                yield begin + (0 if match.start < 2 else match.start), begin + match.end
            if digits.startswith("+"):
                continue
        matches = national_numbers(digits, regions)
        left = list(digits)
        for start, end in matches:
            left[start:end] = " " * (end - start)
        whole = not any(character.isdigit() for character in left)
        for start, end in matches:
            number = digits[start:end]
            if number[0] == "+" or (whole and (called or number[0] == "0" or not number.strip("()").isdigit())):
                yield begin + start, begin + end


def national_numbers(digits: str, regions: tuple[str, ...]) -> list[Span]:
    """Return numbers of some countries, one behind the other. Of several at one place, the first country's counts."""
    from phonenumbers import Leniency, PhoneNumberMatcher

    spans = list[Span]()
    at = 0
    while True:
        first = [
            (at + match.start, order, at + match.end)
            for order, region in enumerate(regions)
            for match in PhoneNumberMatcher(digits[at:], region, leniency=Leniency.VALID)
            if match.raw_string.startswith("+") or is_grouped(match)
        ]
        if not first:
            return spans
        start, _, at = min(first)
        spans.append((start, at))


def is_grouped(match: PhoneNumberMatch) -> bool:
    """Return whether a number is grouped as people of its country do it: 3, 3 and 4 digits in North America; elsewhere
    as they like, in up to five groups."""
    groups = [len(group) for group in re.findall("[0-9]+", match.raw_string)]
    if match.number.country_code != 1:
        return len(groups) < 6
    if groups and groups[0] == 1 and len(groups) > 1:
        groups = groups[1:]
    return groups in ([3, 3, 4], [3, 7], [6, 4], [10], [11])


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


class PersonalData(NamedTuple):
    """How one kind of personal data is found.

    Attributes:
        find: yields where it stands in a text; None for telephone numbers, whose form is a region's.
        digits: that it has at least.
        sign: a text that it has.
    """

    find: Finder | None
    digits: int = 0
    sign: str = ""


FINDERS: Mapping[str, PersonalData] = {
    "private_key": PersonalData(lambda text: find_keys(text, (PRIVATE_KEY,)), sign="PRIVATE KEY"),
    "jwt": PersonalData(lambda text: find_keys(text, (JWT,)), sign="eyJ"),
    "api_key": PersonalData(find_keys),
    "email": PersonalData(emails, sign="@"),
    "iban": PersonalData(
        lambda text: ((found.start(), end) for found in IBAN.finditer(text) if (end := iban_end(text, found.start()))),
        digits=6,
    ),
    "card": PersonalData(cards, digits=13),
    "ipv6": PersonalData(lambda text: checked(IPV6, text, is_public), digits=1, sign=":"),
    "ipv4": PersonalData(ipv4s, digits=4, sign="."),
    "us_ssn": PersonalData(us_ssns, digits=9),
    "phone": PersonalData(None, digits=7),
}
"""Kind → how it is found. They are looked for in this order, each in what the ones before have left."""
KINDS = (*FINDERS,)
KEY_SIGNS = ("_", "-", "")
HINTS = tuple(dict.fromkeys(hint for shape in (*KEY_SHAPES, JWT, PRIVATE_KEY) for hint in shape.hints))
KEY_HINTS = {
    sign: tuple(hint for hint in HINTS if next(sign for sign in KEY_SIGNS if sign in hint) == sign)
    for sign in KEY_SIGNS
}
"""Prefixes of keys, by a character that each of them has and most texts have not."""


OF_KEYS = frozenset({"private_key", "jwt", "api_key"})


def has_key_hint(text: str) -> bool:
    """Return whether a text has a prefix of a key."""
    for sign, hints in KEY_HINTS.items():
        if sign in text:
            for hint in hints:
                if hint in text:
                    return True
    return False


def possible(text: str, kinds: tuple[str, ...]) -> tuple[str, ...]:
    """The kinds of which a text has the digits and the signs, at one look; in the order of `FINDERS`."""
    digits = sum(map(text.count, "0123456789"))
    has_key = not OF_KEYS.isdisjoint(kinds) and has_key_hint(text)
    if not digits and not has_key and "@" not in text:
        return ()
    return tuple(
        kind
        for kind, data in FINDERS.items()
        if kind in kinds and digits >= data.digits and data.sign in text and (has_key or kind != "api_key")
    )


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
            find = FINDERS[kind].find
            spans = find(text) if find else phones(text, regions)
            for start, end in apart(spans):
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
        kinds = possible("\n".join([said(record), *list_argument_names(record)]), self.kinds)
        if not kinds:
            return record
        met: set[str] = set()

        def mask(text: str) -> str:
            return masked(text, kinds, self.regions, met)

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
