"""Numbers that carry a check of their own: payment cards and bank accounts."""

from __future__ import annotations

import re
from collections.abc import Mapping

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
        15: "NO", 16: "BE", 18: "DK FI FK FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU MN XK",
        21: "CH HR LI LV", 22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM SO TL",
        24: "AD CZ DZ ES MD PK RO SA SE SK TN VG", 25: "AO CV GW LY PT ST", 26: "IS TR",
        27: "BF BI BJ CF CG CM DJ EG FR GA GR IT KM MC MG ML MR SM SN TD TG YE",
        28: "AL AZ BY CI CY DO GT HN HU LB MA NE NI PL SV", 29: "BR PS QA UA",
        30: "JO KW MU", 31: "MT SC", 32: "LC", 33: "RU",
    }.items()
    for country in countries.split()
}  # fmt: skip
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
