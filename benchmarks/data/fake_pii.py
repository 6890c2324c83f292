"""Generate fake personal data in the forms in which people write it. Each number passes its checksum."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping

from align.data.clean.pii import IBAN_LENGTHS

NAMES = ("anna", "j.smith", "o'brien", "müller", "maria_lopez", "kev1n", "li.wei", "a", "first.middle.last")
HOSTS = ("example.com", "mail.example.co.uk", "uni-bonn.de", "x.io", "my-firm.travel", "sub.domain.org")
CARDS = {
    "4": 16,
    "51": 16,
    "55": 16,
    "2221": 16,
    "2720": 16,
    "34": 15,
    "37": 15,
    "6011": 16,
    "65": 16,
    "3528": 16,
    "36": 14,
    "62": 19,
    "4000": 13,
}
"""First digits → length: Visa, Mastercard, American Express, Discover, JCB, Diners, UnionPay."""
SEPARATORS = ("", " ", "-", ".", "\xa0")


def draw_digits(draw: random.Random, count: int) -> str:
    return "".join(draw.choices(string.digits, k=count))


def create_email(draw: random.Random) -> str:
    name = draw.choice(NAMES) + draw.choice(("", "+shop", str(draw.randrange(100))))
    return draw.choice((str, str.upper, str.title))(name) + "@" + draw.choice(HOSTS)


def create_card_number(draw: random.Random) -> str:
    """Return a card number. Its last digit makes the Luhn sum end in 0, computed here without align's code."""
    prefix, length = draw.choice(list(CARDS.items()))
    body = prefix + draw_digits(draw, length - 1 - len(prefix))
    for last in string.digits:
        numbers = [int(d) for d in body + last]
        doubled = [2 * n if i % 2 == length % 2 else n for i, n in enumerate(numbers)]
        if sum(n - 9 if n > 9 else n for n in doubled) % 10 == 0:
            body += last
            break
    separator = draw.choice(SEPARATORS)
    groups = {15: (4, 6, 5), 14: (4, 6, 4), 13: (13,), 19: (4, 4, 4, 4, 3)}.get(length, (4, 4, 4, 4))
    parts = []
    start = 0
    for size in groups:
        parts.append(body[start : start + size])
        start += size
    return separator.join(parts)


def create_iban(draw: random.Random) -> str:
    """Return an IBAN. Its check digits are computed here by ISO 7064, without align's code."""
    country, length = draw.choice(list(IBAN_LENGTHS.items()))
    letters = 4 if country in ("GB", "IE", "NL", "MT", "BG", "LV", "RO", "KW", "QA", "JO", "GI") else 0
    account = "".join(draw.choices(string.ascii_uppercase, k=letters)) + draw_digits(draw, length - 4 - letters)
    number = int("".join(str(int(c, 36)) for c in f"{account}{country}00"))
    compact = f"{country}{98 - number % 97:02d}{account}"
    form = draw.choice((compact, " ".join(compact[i : i + 4] for i in range(0, length, 4))))
    return draw.choice((form, form, form.lower()))


def create_ipv4(draw: random.Random) -> str:
    prefix = f"{draw.choice((8, 23, 52, 81, 134, 185, 203))}.{draw.randrange(1, 113)}"
    return f"{prefix}.{draw.randrange(256)}.{draw.randrange(256)}"


def create_ipv6(draw: random.Random) -> str:
    groups = [f"{draw.randrange(1, 0x10000):x}" for _ in range(5)]
    prefix = draw.choice(("2a01", "2606", "2404", "2001:4860"))
    return draw.choice(
        (f"{prefix}::{groups[0]}", f"{prefix}:{groups[0]}:{groups[1]}::{groups[2]}", f"{prefix.upper()}:{groups[0]}::1")
    )


def create_us_ssn(draw: random.Random) -> str:
    area = draw.choice([n for n in range(1, 900) if n != 666])
    return f"{area:03d}-{draw.randrange(1, 100):02d}-{draw.randrange(1, 10_000):04d}"


def create_phone_number(draw: random.Random) -> str:
    """Return an American number in one of its usual forms, or a number of another country with +."""
    area = draw.choice((212, 415, 617, 312, 206, 702))
    number = draw_digits(draw, 4)
    middle = draw.randrange(200, 900)
    middle += middle % 100 == 11  # 211, 311 and so on are service numbers
    forms = (
        f"({area}) {middle}-{number}",
        f"{area}-{middle}-{number}",
        f"+1 {area} {middle} {number}",
        f"{area}.{middle}.{number}",
        f"+49 30 {draw.randrange(2, 9)}{draw_digits(draw, 6)}",
        f"+44 7{draw.randrange(700, 800)} {draw_digits(draw, 6)}",
        f"+33 6 {draw.randrange(10, 99)} {draw_digits(draw, 2)} {draw_digits(draw, 2)} {draw_digits(draw, 2)}",
    )
    return draw.choice(forms)


MAKERS: Mapping[str, Callable[[random.Random], str]] = {
    "email": create_email,
    "iban": create_iban,
    "card": create_card_number,
    "ipv6": create_ipv6,
    "ipv4": create_ipv4,
    "us_ssn": create_us_ssn,
    "phone": create_phone_number,
}
CONTEXTS = (
    "{}",
    "it is {}.",
    "({})",
    "<{}>",
    "mine: {}, ok?",
    "write {} down",
    "“{}”",
    "I have {}\nand more",
    "see {}!",
)


def plant(text: str, kind: str, draw: random.Random) -> tuple[str, str]:
    """Insert a value of a kind between two words of a text. Returns the new text and the value."""
    value = MAKERS[kind](draw)
    words = text.split(" ")
    position = draw.randrange(len(words) + 1)
    return " ".join([*words[:position], draw.choice(CONTEXTS).format(value), *words[position:]]), value
