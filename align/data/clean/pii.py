"""Cleaning step that finds personal data and secrets by their form.

Patterns find candidates, which are then checked by the rules for such data, for instance checksums. Where the form is
ambiguous (a version and an IP address both have four numbers), the words in front of it decide.

Names, postal addresses and dates of birth have no fixed form, and are not found.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from align.core.redaction import JWT, KEY_SHAPES, PRIVATE_KEY, iter_key_spans
from align.core.types import Record
from align.data.clean.outcome import Drop, NotedRecord, check_choice, check_choice_list, join_texts, rewrite_texts
from align.data.read.content import list_argument_names

if TYPE_CHECKING:
    from phonenumbers import PhoneNumberMatch

LETTERS = "A-Za-z0-9_\u00c0-\u024f\u0370-\u052f"
EMAIL = re.compile(
    rf"(?<![{LETTERS}.%+-])(?!git@)[{LETTERS}](?:[{LETTERS}.%+'-]{{0,63}})"
    rf"@(?:[{LETTERS}-]{{1,63}}\.){{1,8}}(?:[A-Za-z]{{2,63}}|xn--[A-Za-z0-9-]{{2,59}})(?![{LETTERS}])"
)
"""Candidates for e-mail addresses. All parts have bounded lengths and none begins inside another, so that a megabyte of
`a@a@a@` takes linear time."""
GAP = "[ .\\-–\xa0]"
CARD = re.compile(
    rf"(?<!\w)(?<!\d\.)(?:\d{{13,19}}|\d{{4}}({GAP})\d{{4}}\1\d{{4}}\1\d{{4}}(?:\1\d{{1,3}})?|3\d{{3}}({GAP})\d{{6}}\2\d{{4,5}})(?!\w)",
    re.ASCII,
)
"""Candidates for payment card numbers: 13 to 19 digits without spaces, or digits in the groups that are printed on
cards."""
GROUPS_AHEAD = re.compile(r"(?<!\d)(?:\d{4} ){2}\Z", re.ASCII)
GROUPS_BEHIND = re.compile(r" \d{4}(?!\d)", re.ASCII)
IBAN = re.compile(r"(?<![A-Za-z0-9])(?:[A-Za-z]{2}|[A-Z]{2}[ \-\xa0])[0-9]{2}(?=[ \-\xa0]?[A-Za-z0-9])")
"""The beginning of an IBAN. A space after the country is allowed only in capitals: `is 70` is a word and a number."""
IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d)", re.ASCII)
IPV6 = re.compile(r"(?<![\w:.])[23][0-9a-f]{3}:[0-9a-f:]{1,35}(?![\w:])", re.ASCII | re.IGNORECASE)
"""Candidates for IPv6 addresses in the range for hosts, 2000::/3 (RFC 4291)."""
US_SSN = re.compile(
    r"(?<![\w-])(?<!\d[ .])(?!000|666|9)\d{3}(?P<gap>[-– ])(?!00)\d{2}(?P=gap)(?!0000)\d{4}(?![\w-])(?![ .]\d)",
    re.ASCII,
)
"""US social security numbers with separators and valid area, group and serial numbers (Social Security Administration,
POMS RM 10201.030)."""
BARE_SSN = re.compile(r"(?<![\w.,-])(?!000|666|9)\d{3}(?!00)\d{2}(?!0000)\d{4}(?![\w-])(?![.,]\d)", re.ASCII)
"""US social security numbers without separators. They count only after words such as "SSN"."""
PHONE = re.compile(r"(?<![\w.])(?:\+ ?)?\(?\d(?:[ ().\-–/\xa0]{0,3}\d){6,40}(?!\w)", re.ASCII)
"""Candidates for telephone numbers, which the library phonenumbers checks."""
TIMES = re.compile(
    r"(?<!\d)(?:(?:19|20)\d\d([-/.])(?:0?[1-9]|1[0-2])\1(?:0?[1-9]|[12]\d|3[01])"
    r"|(?:0?[1-9]|[12]\d|3[01])([-/.])(?:0?[1-9]|[12]\d|3[01])\2(?:19|20)\d\d)"
    r"(?:(?:T|[ _-]{1,2})[0-2]?\d(?:[:.h-][0-5]\d){0,2}(?=\D|$))?(?!\d)"
    r"|(?<!\d)[0-2]?\d:[0-5]\d(?::[0-5]\d(?:[.,]\d{1,9})?)?(?!\d)",
    re.ASCII,
)
"""Dates and times, which are not telephone numbers although they have as many digits."""

BEFORE = 32
"""Number of characters in front of a number that are searched for words that name it."""
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
"""Names of other kinds of numbers, such as "order", directly in front of a number: it is no telephone, card or social
security number."""
VERSION = re.compile(
    r"(?:\b(?:v|ver|versions?|release[ds]?|rev|revision|build|driver|firmware|sdk|upgrad\w{0,3}|updat\w{0,3}|downgrad\w{0,3}|"
    r"bump\w{0,3}|patch\w{0,3}|sections?|sec|chapters?|clauses?|paragraphs?|articles?|figures?|fig|tables?|appendix|annex|"
    r"requirements?|rules?|oid|kernel|python|java|chrome|firefox|edge|numpy|torch|node|since|assembly\w{0,12}|"
    r"abschnitt|kapitel|versión|versione|версия|safari|opera|webkit|tag|tagged|install\w{0,3})\b[^\w\n]{0,4}"
    r"(?:\b(?:is|was|to|from|number|no|the|of|in)\b\W{0,3}){0,2}|[§^~]\s?|[=<>~!]=\s?|[A-Za-z_][-/_]|\b[vV])$",
    re.IGNORECASE,
)
"""Words and signs in front of a version or a section number, which may have four parts as an IP address has."""
VERSION_ENDS = re.compile(
    r"(?:[-+](?:alpha|beta|rc|dev|pre|snapshot|ubuntu|deb|fc|el|git|post|final|\d)|\.(?:jar|whl|tar|zip|exe|dll|so|deb|rpm)\b)",
    re.IGNORECASE,
)
SMALL = 32
"""Bound below which the four numbers of an IPv4 address are taken for a version or a section, unless the text says that
they are an address."""
RESOLVERS = frozenset({"1.1.1.1", "1.0.0.1", "8.8.8.8", "8.8.4.4", "9.9.9.9", "4.2.2.2"})
"""Well-known addresses of DNS servers whose numbers are all below `SMALL`."""
MODULES = frozenset(
    {"np", "numpy", "jnp", "torch", "tf", "jax", "nn", "pd", "self", "cls", "functools", "math", "mx", "F"}
)
"""Names in front of a dot in Python code, where `x@np.dot` is a matrix product."""

# Numbers with checksums: payment cards and bank accounts.

LUHN_DOUBLED = (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)
"""Digit sum of the double of each digit from 0 to 9, for the Luhn check."""
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
"""Country code → number of characters of the country's IBANs, from the IBAN registry of ISO 13616 (SWIFT)."""


def passes_luhn(digits: str) -> bool:
    """Return whether a number passes the Luhn check of ISO/IEC 7812-1, annex B."""
    numbers = [ord(digit) - 48 for digit in reversed(digits)]
    return (sum(numbers[::2]) + sum(LUHN_DOUBLED[n] for n in numbers[1::2])) % 10 == 0


def is_card_number(digits: str) -> bool:
    """Return whether digits have the beginning and length of a card scheme's numbers and pass the Luhn check."""
    return ISSUED.fullmatch(digits) is not None and passes_luhn(digits)


def passes_mod_97(iban: str) -> bool:
    """Return whether the check digits of an IBAN in capital letters are correct: ISO 7064, MOD 97-10."""
    rotated = iban[4:] + iban[:4]
    return int("".join(str(int(character, 36)) for character in rotated)) % 97 == 1


def find_iban_end(text: str, start: int) -> int:
    """Return the end position of the valid IBAN that begins at `start`, or 0 if no valid IBAN begins there.

    A single space or hyphen is allowed between its characters.
    """
    length = IBAN_LENGTHS.get(text[start : start + 2].upper(), 0)
    iban = ""
    end = start
    while len(iban) < length and end < len(text):
        character = text[end]
        if character.isascii() and character.isalnum():
            iban += character
        elif character not in " -\xa0" or not text[end - 1].isalnum():
            return 0
        end += 1
    goes_on = end < len(text) and text[end].isascii() and text[end].isalnum()
    if length == 0 or len(iban) != length or goes_on:
        return 0
    n_digits = sum(map(str.isdigit, iban))
    # At least two fifths of every IBAN are digits, unlike in "at 20 people come …".
    return end if 5 * n_digits >= 2 * length and passes_mod_97(iban.upper()) else 0


Span = tuple[int, int]
Finder = Callable[[str], Iterator[Span]]


def get_text_before(text: str, start: int) -> str:
    """Return up to BEFORE characters in front of position `start`, on the same line."""
    return text[max(0, start - BEFORE) : start].rpartition("\n")[2]


@lru_cache(1)
def load_top_level_domains() -> frozenset[str]:
    """Return the top-level domains of IANA's root zone, in ASCII and lower case, from `top_level_domains.txt`."""
    return frozenset((Path(__file__).parent / "top_level_domains.txt").read_text(encoding="ascii").split())


def iter_emails(text: str) -> Iterator[Span]:
    """Yield the span of each e-mail address with an existing top-level domain, but not of calls in code such as
    `x@package.call(`."""
    for match in EMAIL.finditer(text):
        domain = match[0].rpartition("@")[2]
        first, _, last = domain.rpartition(".")
        is_domain = last.lower() in load_top_level_domains() or last.lower().startswith("xn--")
        if is_domain and first not in MODULES and not text.startswith(("(", "["), match.end()):
            yield match.span()


def iter_cards(text: str) -> Iterator[Span]:
    """Yield the span of each payment card number, except for numbers in a table and numbers that the text names an
    order or the like."""
    for start, end in iter_valid_matches(CARD, text, lambda number: is_card_number(re.sub("[^0-9]", "", number))):
        before = get_text_before(text, start)
        # Further groups of four digits, one after the number or two before it, mean that it is in a table.
        is_in_table = GROUPS_BEHIND.match(text, end) or GROUPS_AHEAD.search(text, max(0, start - 25), start)
        if CALLED_CARD.search(before) or not (OTHER_NUMBER.search(before) or is_in_table):
            yield start, end


def iter_ipv4s(text: str) -> Iterator[Span]:
    """Yield the span of each public IPv4 address, except for probable version and section numbers. These have small
    numbers, or words beside them such as "version"."""
    for start, end in iter_valid_matches(IPV4, text, is_public):
        before = get_text_before(text, start)
        if not CALLED_ADDRESS.search(before) or VERSION.search(before):
            address = text[start:end]
            is_small = all(int(part) < SMALL for part in address.split(".")) and address not in RESOLVERS
            if is_small or VERSION.search(before) or VERSION_ENDS.match(text, end):
                continue
        yield start, end


def iter_us_ssns(text: str) -> Iterator[Span]:
    for pattern in (US_SSN, BARE_SSN):
        for match in pattern.finditer(text):
            before = get_text_before(text, match.start())
            is_named = CALLED_SSN.search(before)
            if is_named or (pattern is US_SSN and not OTHER_NUMBER.search(before)):
                yield match.span()


def iter_phones(text: str, regions: tuple[str, ...]) -> Iterator[Span]:
    """Yield the span of each telephone number that is valid by Google's libphonenumber.

    International numbers, which begin with + or 00, may be grouped in any way. National numbers must be grouped as
    usual in their country, and no other digits may stand beside them. Numbers that the text names an order or the like
    are skipped. A national number without a leading zero and without separators counts only if the text says that it is
    one, since ten digits in a row are mostly something else.

    Args:
        regions: countries of national numbers.
    """
    from phonenumbers import Leniency, PhoneNumberMatcher

    if not PHONE.search(text):
        return
    without_times = TIMES.sub(lambda match: "x" * len(match[0]), text)
    for candidate in PHONE.finditer(without_times):
        digits = candidate[0].removeprefix("(") if candidate[0].startswith("(00") else candidate[0]
        offset = candidate.end() - len(digits)
        before = get_text_before(text, offset)
        is_named = CALLED_PHONE.search(before)
        if OTHER_NUMBER.search(before) and not is_named:
            continue
        is_international = digits.startswith("+") or (digits.startswith("00") and digits[2:3] in "123456789")
        if is_international:
            number = digits.replace("(0)", "   ")
            number = f" +{number[2:]}" if number.startswith("00") else number
            for match in PhoneNumberMatcher(number, None, leniency=Leniency.VALID):
                yield offset + (0 if match.start < 2 else match.start), offset + match.end
            if digits.startswith("+"):
                continue
        spans = find_national_numbers(digits, regions)
        remaining = list(digits)
        for start, end in spans:
            remaining[start:end] = " " * (end - start)
        has_other_digits = any(character.isdigit() for character in remaining)
        for start, end in spans:
            number = digits[start:end]
            is_plausible = is_named or number[0] == "0" or not number.strip("()").isdigit()
            if number[0] == "+" or (not has_other_digits and is_plausible):
                yield offset + start, offset + end


def find_national_numbers(digits: str, regions: tuple[str, ...]) -> list[Span]:
    """Return the spans of the telephone numbers in `digits` that are valid in one of the countries `regions`. If
    several begin together, the first country wins."""
    from phonenumbers import Leniency, PhoneNumberMatcher

    spans: list[Span] = []
    position = 0
    while True:
        candidates = [
            (position + match.start, order, position + match.end)
            for order, region in enumerate(regions)
            for match in PhoneNumberMatcher(digits[position:], region, leniency=Leniency.VALID)
            if match.raw_string.startswith("+") or is_usual_grouping(match)
        ]
        if not candidates:
            return spans
        start, _, position = min(candidates)
        spans.append((start, position))


def is_usual_grouping(match: PhoneNumberMatch) -> bool:
    """Return whether the digits of a number are grouped as usual in its country.

    In North America that is 3, 3 and 4 digits, or parts of that; elsewhere any grouping in up to five groups.
    """
    groups = [len(group) for group in re.findall("[0-9]+", match.raw_string)]
    if match.number.country_code != 1:
        return len(groups) < 6
    if groups and groups[0] == 1 and len(groups) > 1:
        groups = groups[1:]
    return groups in ([3, 3, 4], [3, 7], [6, 4], [10], [11])


def iter_valid_matches(pattern: re.Pattern[str], text: str, validate: Callable[[str], bool]) -> Iterator[Span]:
    """Yield the span of each match of a pattern that passes `validate`. After an invalid match, the next one may begin
    inside it."""
    match = pattern.search(text)
    while match:
        is_valid = validate(match[0])
        if is_valid:
            yield match.span()
        match = pattern.search(text, match.end() if is_valid else match.start() + 1)


def is_public(address: str) -> bool:
    """Return whether an IP address is public, and neither private nor reserved for documentation. Returns False if it
    is no valid address."""
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


def iter_ibans(text: str) -> Iterator[Span]:
    for match in IBAN.finditer(text):
        if end := find_iban_end(text, match.start()):
            yield match.start(), end


class PersonalDataKind(NamedTuple):
    """Detection of one kind of personal data: a function that finds it, and quick conditions that a text must meet
    before.

    Attributes:
        find: yields the spans of the data in a text; None for telephone numbers, whose form depends on the regions.
        digits: minimum number of digits in the data.
        sign: a substring that all data of the kind has.
    """

    find: Finder | None
    digits: int = 0
    sign: str = ""


FINDERS: Mapping[str, PersonalDataKind] = {
    "private_key": PersonalDataKind(lambda text: iter_key_spans(text, (PRIVATE_KEY,)), sign="PRIVATE KEY"),
    "jwt": PersonalDataKind(lambda text: iter_key_spans(text, (JWT,)), sign="eyJ"),
    "api_key": PersonalDataKind(iter_key_spans),
    "email": PersonalDataKind(iter_emails, sign="@"),
    "iban": PersonalDataKind(iter_ibans, digits=6),
    "card": PersonalDataKind(iter_cards, digits=13),
    "ipv6": PersonalDataKind(lambda text: iter_valid_matches(IPV6, text, is_public), digits=1, sign=":"),
    "ipv4": PersonalDataKind(iter_ipv4s, digits=4, sign="."),
    "us_ssn": PersonalDataKind(iter_us_ssns, digits=9),
    "phone": PersonalDataKind(None, digits=7),
}
"""Kind of personal data → its detection, in the order of masking. Each kind is masked in the text that the ones before
have left."""
KINDS = (*FINDERS,)
KEY_SIGNS = ("_", "-", "")
HINTS = tuple(dict.fromkeys(hint for shape in (*KEY_SHAPES, JWT, PRIVATE_KEY) for hint in shape.hints))
KEY_HINTS = {
    sign: tuple(hint for hint in HINTS if next(sign for sign in KEY_SIGNS if sign in hint) == sign)
    for sign in KEY_SIGNS
}
"""Character → prefixes of secret keys that contain it. Most texts lack the first two characters, which saves
searches."""
SECRET_KINDS = frozenset({"private_key", "jwt", "api_key"})


def has_key_hint(text: str) -> bool:
    """Return whether a text contains a prefix of an API key, of a token or of a private key."""
    for sign, hints in KEY_HINTS.items():
        if sign in text:
            for hint in hints:
                if hint in text:
                    return True
    return False


def select_possible_kinds(text: str, kinds: tuple[str, ...]) -> tuple[str, ...]:
    """Return the kinds of personal data that a text may contain by its number of digits and its substrings. They are in
    the order of `FINDERS`."""
    digits = sum(map(text.count, "0123456789"))
    has_key = not SECRET_KINDS.isdisjoint(kinds) and has_key_hint(text)
    if not digits and not has_key and "@" not in text:
        return ()
    return tuple(
        kind
        for kind, data in FINDERS.items()
        if kind in kinds and digits >= data.digits and data.sign in text and (has_key or kind != "api_key")
    )


def iter_without_overlaps(spans: Iterator[Span]) -> Iterator[Span]:
    """Yield the spans sorted by their start, except for spans that begin inside an earlier one."""
    end = 0
    for span in sorted(spans):
        if span[0] >= end:
            yield span
            end = span[1]


def mask_and_record_kinds(text: str, kinds: tuple[str, ...], regions: tuple[str, ...], found_kinds: set[str]) -> str:
    """Replace personal data in a text by `[EMAIL]`, `[CARD]`, …, and add the kinds of data to `found_kinds`.

    Args:
        kinds: kinds to look for.
        regions: countries of national telephone numbers.
        found_kinds: the kinds that are found are added to it.
    """
    previous = None
    while text != previous:  # masking may bring the parts of further data together
        previous = text
        for kind in select_possible_kinds(text, kinds):
            parts: list[str] = []
            position = 0
            find = FINDERS[kind].find
            spans = find(text) if find else iter_phones(text, regions)
            for start, end in iter_without_overlaps(spans):
                parts += [text[position:start], f"[{kind.upper()}]"]
                position = end
            if parts:
                found_kinds.add(kind)
                text = "".join([*parts, text[position:]])
    return text


@dataclass(frozen=True, slots=True)
class PersonalDataFilter:
    """Cleaning step that masks personal data and secrets in a record's turns, leaves the record out, or only counts
    them.

    Args:
        action: `mask` replaces the data by `[EMAIL]` and the like, `drop` leaves the record out, `report` only counts.
        kinds: kinds to look for, see `KINDS`.
        regions: countries (ISO 3166, such as US, DE) whose telephone numbers are found in their national form. Numbers
            that begin with + are found for every country.
    """

    action: str = "mask"
    kinds: tuple[str, ...] = KINDS
    regions: tuple[str, ...] = ("US",)

    def __post_init__(self) -> None:
        from phonenumbers import SUPPORTED_REGIONS

        check_choice("action", self.action, ("drop", "mask", "report"))
        check_choice_list("kinds", self.kinds, KINDS, "[email, card]")
        check_choice_list("regions", self.regions, SUPPORTED_REGIONS, "[US, DE]", allow_empty=True)

    def __call__(self, record: Record) -> Record | Drop | NotedRecord:
        kinds = select_possible_kinds("\n".join([join_texts(record), *list_argument_names(record)]), self.kinds)
        if not kinds:
            return record
        found_kinds: set[str] = set()

        def mask(text: str) -> str:
            return mask_and_record_kinds(text, kinds, self.regions, found_kinds)

        masked_record = rewrite_texts(record, mask, mask)
        if not found_kinds:
            return record
        ordered_kinds = tuple(kind for kind in KINDS if kind in found_kinds)
        if self.action == "drop":
            return Drop(f"pii: {ordered_kinds[0]}", ", ".join(f"[{kind.upper()}]" for kind in ordered_kinds))
        if self.action == "report":
            return NotedRecord(record, ordered_kinds)
        return masked_record if isinstance(masked_record, Drop) else NotedRecord(masked_record, ordered_kinds)

    def mask_personal_data(self, text: str) -> str:
        """Return a text with its personal data replaced by placeholders such as `[EMAIL]`, regardless of `action`."""
        return mask_and_record_kinds(text, self.kinds, self.regions, set())
