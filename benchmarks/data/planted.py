"""Personal data that is made up, in the forms that people write it in; each number passes its check."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping

from align.data.clean.pii import IBAN_LENGTHS

NAMES = ("anna", "j.smith", "o'brien", "müller", "maria_lopez", "kev1n", "li.wei", "a", "first.middle.last")
HOSTS = ("example.com", "mail.example.co.uk", "uni-bonn.de", "x.io", "my-firm.travel", "sub.domain.org")
CARDS = {"4": 16, "51": 16, "55": 16, "2221": 16, "2720": 16, "34": 15, "37": 15, "6011": 16, "65": 16, "3528": 16,
         "36": 14, "62": 19, "4000": 13}  # fmt: skip
"""First digits → length: Visa, Mastercard, American Express, Discover, JCB, Diners, UnionPay."""
GAPS = ("", " ", "-", ".", "\xa0")


def digits(draw: random.Random, count: int) -> str:
    return "".join(draw.choices(string.digits, k=count))


def email(draw: random.Random) -> str:
    name = draw.choice(NAMES) + draw.choice(("", "+shop", str(draw.randrange(100))))
    return draw.choice((str, str.upper, str.title))(name) + "@" + draw.choice(HOSTS)


def card(draw: random.Random) -> str:
    """By Luhn's rule written anew: the check digit is the one that makes the sum end in 0."""
    begin, length = draw.choice(list(CARDS.items()))
    body = begin + digits(draw, length - 1 - len(begin))
    for last in string.digits:
        numbers = [int(d) for d in body + last]
        doubled = [2 * n if i % 2 == length % 2 else n for i, n in enumerate(numbers)]
        if sum(n - 9 if n > 9 else n for n in doubled) % 10 == 0:
            body += last
            break
    gap = draw.choice(GAPS)
    groups = {15: (4, 6, 5), 14: (4, 6, 4), 13: (13,), 19: (4, 4, 4, 4, 3)}.get(length, (4, 4, 4, 4))
    parts, at = [], 0
    for group in groups:
        parts.append(body[at : at + group])
        at += group
    return gap.join(parts)


def iban(draw: random.Random) -> str:
    """By ISO 7064 written anew: the check digits are 98 less the remainder of the rest with 00."""
    country, length = draw.choice(list(IBAN_LENGTHS.items()))
    letters = 4 if country in ("GB", "IE", "NL", "MT", "BG", "LV", "RO", "KW", "QA", "JO", "GI") else 0
    rest = "".join(draw.choices(string.ascii_uppercase, k=letters)) + digits(draw, length - 4 - letters)
    number = int("".join(str(int(c, 36)) for c in f"{rest}{country}00"))
    whole = f"{country}{98 - number % 97:02d}{rest}"
    grouped = draw.choice((whole, " ".join(whole[i : i + 4] for i in range(0, length, 4))))
    return draw.choice((grouped, grouped, grouped.lower()))


def ipv4(draw: random.Random) -> str:
    begin = f"{draw.choice((8, 23, 52, 81, 134, 185, 203))}.{draw.randrange(1, 113)}"
    return f"{begin}.{draw.randrange(256)}.{draw.randrange(256)}"


def ipv6(draw: random.Random) -> str:
    groups = [f"{draw.randrange(1, 0x10000):x}" for _ in range(5)]
    begin = draw.choice(("2a01", "2606", "2404", "2001:4860"))
    return draw.choice(
        (f"{begin}::{groups[0]}", f"{begin}:{groups[0]}:{groups[1]}::{groups[2]}", f"{begin.upper()}:{groups[0]}::1")
    )


def us_ssn(draw: random.Random) -> str:
    area = draw.choice([n for n in range(1, 900) if n != 666])
    return f"{area:03d}-{draw.randrange(1, 100):02d}-{draw.randrange(1, 10_000):04d}"


def phone(draw: random.Random) -> str:
    """American numbers in the forms they are written in, and some of other countries with +."""
    area, number = draw.choice((212, 415, 617, 312, 206, 702)), digits(draw, 4)
    middle = draw.randrange(200, 900)
    middle += middle % 100 == 11
    forms = (f"({area}) {middle}-{number}", f"{area}-{middle}-{number}", f"+1 {area} {middle} {number}",
             f"{area}.{middle}.{number}",
             f"+49 30 {draw.randrange(2, 9)}{digits(draw, 6)}", f"+44 7{draw.randrange(700, 800)} {digits(draw, 6)}",
             f"+33 6 {draw.randrange(10, 99)} {digits(draw, 2)} {digits(draw, 2)} {digits(draw, 2)}")  # fmt: skip
    return draw.choice(forms)


MAKERS: Mapping[str, Callable[[random.Random], str]] = {
    "email": email, "iban": iban, "card": card, "ipv6": ipv6, "ipv4": ipv4, "us_ssn": us_ssn, "phone": phone,
}  # fmt: skip
AROUND = ("{}", "it is {}.", "({})", "<{}>", "mine: {}, ok?", "write {} down", "“{}”", "I have {}\nand more", "see {}!")


def planted(text: str, kind: str, draw: random.Random) -> tuple[str, str]:
    """A text with one of a kind at a place between its words, and what was planted."""
    made = MAKERS[kind](draw)
    words = text.split(" ")
    at = draw.randrange(len(words) + 1)
    return " ".join([*words[:at], draw.choice(AROUND).format(made), *words[at:]]), made
