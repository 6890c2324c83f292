"""Planted personal data and secrets beside what looks like them: precision and recall of the step `pii`, by kind.

    python benchmarks/data/personal.py [--seed 0] [--each 1000] [--show 5]

`planted.py` makes up some kinds. Each one, and each hard negative, stands in a sentence of its own or between words of
the built-in corpus. Recall is the share of planted ones that are masked wholly as their kind; precision is the share
of a kind's masks that stand in texts in which one was planted.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import string
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import planted

from align.data.chitchat import join_turns, load_records
from align.data.clean.pii import KINDS, PersonalDataFilter

LETTERS = string.ascii_letters + string.digits
Maker = Callable[[random.Random], str]


def characters(draw: random.Random, count: int, of: str = LETTERS) -> str:
    return "".join(draw.choices(of, k=count))


def encoded(draw: random.Random, count: int) -> str:
    return base64.urlsafe_b64encode(draw.randbytes(count)).decode().rstrip("=")


KEYS: Mapping[str, Maker] = {
    "AWS": lambda draw: draw.choice(("AKIA", "ASIA")) + characters(draw, 16, string.ascii_uppercase + "234567"),
    "GitHub": lambda draw: draw.choice(("ghp_", "gho_", "ghu_", "ghs_", "ghr_")) + characters(draw, 36),
    "GitHub, fine-grained": lambda draw: f"github_pat_{characters(draw, 22)}_{characters(draw, 59)}",
    "GitLab": lambda draw: draw.choice(("glpat-", "gldt-", "glrt-")) + characters(draw, 20, LETTERS + "_-"[:1]),
    "Slack": lambda draw: "-".join(
        (f"xox{draw.choice('bp')}", planted.digits(draw, 12), planted.digits(draw, 13), characters(draw, 24))
    ),
    "Slack, hook": lambda draw: "/".join(
        (
            "https://hooks.slack.com/services",
            f"T{characters(draw, 8)}",
            f"B{characters(draw, 10)}",
            characters(draw, 24),
        )
    ),
    "Google": lambda draw: "AIza" + characters(draw, 35, LETTERS + "-_"),
    "Stripe": lambda draw: draw.choice(("sk_live_", "sk_test_", "rk_live_")) + characters(draw, draw.choice((24, 99))),
    "OpenAI": lambda draw: f"sk-{characters(draw, 20)}T3BlbkFJ{characters(draw, 20)}",
    "OpenAI, project": lambda draw: f"sk-proj-{encoded(draw, 54)}T3BlbkFJ{encoded(draw, 54)}",
    "Anthropic": lambda draw: f"sk-ant-api03-{encoded(draw, 69)}-{characters(draw, 6)}AA",
    "Hugging Face": lambda draw: "hf_" + characters(draw, 34, string.ascii_letters),
    "npm": lambda draw: "npm_" + characters(draw, 36),
    "PyPI": lambda draw: "pypi-AgEIcHlwaS5vcmc" + encoded(draw, 110),
    "SendGrid": lambda draw: f"SG.{encoded(draw, 16)}.{encoded(draw, 32)}",
}


def api_key(draw: random.Random) -> str:
    return KEYS[draw.choice([*KEYS])](draw)


def jwt(draw: random.Random) -> str:
    header = {"alg": draw.choice(("HS256", "RS256", "ES256")), "typ": "JWT"}
    claims = {"sub": planted.digits(draw, 10), "name": "Anna", "iat": draw.randrange(10**9, 2 * 10**9)}
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in (header, claims)]
    return ".".join([*parts, encoded(draw, draw.choice((32, 64, 256)))])


def private_key(draw: random.Random) -> str:
    kind = draw.choice(
        ("RSA PRIVATE KEY", "EC PRIVATE KEY", "OPENSSH PRIVATE KEY", "PRIVATE KEY", "ENCRYPTED PRIVATE KEY")
    )
    body = base64.b64encode(draw.randbytes(draw.choice((120, 600, 1200)))).decode()
    lines = [body[i : i + 64] for i in range(0, len(body), 64)]
    return "\n".join([f"-----BEGIN {kind}-----", *lines, f"-----END {kind}-----"])


def us_ssn(draw: random.Random) -> str:
    return planted.us_ssn(draw).replace("-", draw.choice(("-", "-", " ")))


def parts_of_us_number(draw: random.Random) -> tuple[int, int, str]:
    middle = draw.randrange(200, 900)
    return draw.choice((212, 415, 617, 312, 206, 702)), middle + (middle % 100 == 11), planted.digits(draw, 4)


def phone_national(draw: random.Random) -> str:
    area, middle, last = parts_of_us_number(draw)
    forms = ("({}) {}-{}", "{}-{}-{}", "{}.{}.{}", "{} {} {}", "1-{}-{}-{}", "({}){}-{}", "({}) {} {}")
    return draw.choice(forms).format(area, middle, last)


def phone_international(draw: random.Random) -> str:
    area, middle, last = parts_of_us_number(draw)
    forms = (
        f"+1 {area} {middle} {last}",
        f"+1-{area}-{middle}-{last}",
        f"+1{area}{middle}{last}",
        f"+1 ({area}) {middle}-{last}",
        f"+49 30 {draw.randrange(2, 9)}{planted.digits(draw, 6)}",
        f"+44 7{draw.randrange(700, 800)} {planted.digits(draw, 6)}",
        f"+33 6 {draw.randrange(10, 69)} {' '.join(planted.digits(draw, 2) for _ in range(3))}",
        f"+49 (0)30 {draw.randrange(2, 9)}{planted.digits(draw, 6)}",
        f"0044 7{draw.randrange(700, 800)} {planted.digits(draw, 6)}",
        f"+34 6{planted.digits(draw, 2)} {planted.digits(draw, 3)} {planted.digits(draw, 3)}",
    )
    return draw.choice(forms)


def phone_bare(draw: random.Random) -> str:
    area, middle, last = parts_of_us_number(draw)
    return f"{area}{middle}{last}"


MAKERS: Mapping[str, Maker] = {
    **planted.MAKERS,
    "us_ssn": us_ssn,
    "phone": phone_national,
    "phone, international": phone_international,
    "phone, ten digits": phone_bare,
    "api_key": api_key,
    "jwt": jwt,
    "private_key": private_key,
}
BARE = (
    "call {}",
    "My cell is {}.",
    "tel: {}",
    "Text me at {} tonight",
    "phone number {}",
    "Please dial {} now",
    "mobile {}",
)
"""Ten digits in a row are a telephone number where words say so."""


def number(draw: random.Random, low: int = 0, high: int = 99) -> int:
    return draw.randint(low, high)


def timestamp(draw: random.Random) -> str:
    year, month, day = number(draw, 1990, 2039), number(draw, 1, 12), number(draw, 1, 28)
    hour, minute, second = number(draw, 0, 23), number(draw, 0, 59), number(draw, 0, 59)
    forms = (
        "{0}-{1:02d}-{2:02d} {3:02d}:{4:02d}:{5:02d}",
        "{0}-{1:02d}-{2:02d}T{3:02d}:{4:02d}:{5:02d}Z",
        "{0}{1:02d}{2:02d}{3:02d}{4:02d}{5:02d}",
        "{0}/{1:02d}/{2:02d} {3:02d}.{4:02d}",
        "{2:02d}.{1:02d}.{0} {3:02d}:{4:02d}",
        "{0}-{1:02d}-{2:02d} {3:02d}-{4:02d}-{5:02d}",
        "{0}_{1:02d}_{2:02d}_{3:02d}{4:02d}{5:02d}",
        "{1}/{2}/{0} {3}:{4:02d} PM",
        "from {0}-{1:02d}-{2:02d} to {0}-{1:02d}-28",
        "{0}-{1:02d}-{2:02d} {3:02d}:{4:02d}:{5:02d}.123456+02:00",
    )
    return draw.choice(forms).format(year, month, day, hour, minute, second)


def four_parts(draw: random.Random) -> str:
    high = draw.choice((9, 30, 255))
    return ".".join(str(number(draw, 0, high)) for _ in range(4))


def version(draw: random.Random) -> str:
    forms = (
        "v{}",
        "version {}",
        "Version: {}",
        "pkg=={}",
        "requires foo>={}",
        "release {}",
        "driver {}",
        "Chrome/{}",
        "foo-{}.tar.gz",
        "upgrade to {}",
        "build {} is out",
        "ver. {}",
        "lib-{}-beta",
        "updated from {}",
        "firmware {}",
        "SDK {}",
    )
    return draw.choice(forms).format(four_parts(draw))


def section(draw: random.Random) -> str:
    parts = ".".join(str(number(draw, 1, 12)) for _ in range(4))
    return draw.choice(
        (
            "see section {}",
            "{} Materials and methods",
            "§ {}",
            "Table {}",
            "clause {}",
            "OID 1.3.6.1.4.1.{}",
            "Chapter {}",
        )
    ).format(parts)


def isbn(draw: random.Random) -> str:
    if draw.random() < 0.5:
        group, publisher, title = number(draw, 0, 9), number(draw, 10, 99), planted.digits(draw, 6)
        return f"ISBN {draw.choice((978, 979))}-{group}-{publisher}-{title}-{number(draw, 0, 9)}"
    return draw.choice(("ISBN {}-{}-{}-{}", "ISBN-10: {}-{}-{}-{}", "{}-{}-{}-{}")).format(
        number(draw, 0, 9), number(draw, 100, 999), number(draw, 10000, 99999), number(draw, 0, 9)
    )


def order(draw: random.Random) -> str:
    body = draw.choice(
        (
            planted.digits(draw, 10),
            planted.digits(draw, 16),
            planted.digits(draw, 9),
            f"{planted.digits(draw, 3)}-{planted.digits(draw, 7)}-{planted.digits(draw, 7)}",
            f"{planted.digits(draw, 3)}-{planted.digits(draw, 3)}-{planted.digits(draw, 4)}",
            f"{planted.digits(draw, 3)}-{planted.digits(draw, 2)}-{planted.digits(draw, 4)}",
        )
    )
    forms = (
        "order {}",
        "Order #{}",
        "order number {}",
        "invoice no. {}",
        "tracking number: {}",
        "ticket #{}",
        "part number {}",
        "case {}",
        "your reference is {}",
        "SKU {}",
        "serial {}",
        "booking code {}",
        "transaction id {}",
    )
    return draw.choice(forms).format(body)


def bare_digits(draw: random.Random) -> str:
    forms = ("{} rows", "id {}", "a total of {}", "{}", "seed={}", "hash({})")
    return draw.choice(forms).format(planted.digits(draw, draw.choice((9, 10, 10, 11, 12))))


def coordinates(draw: random.Random) -> str:
    latitude = draw.uniform(-90, 90)
    longitude = draw.uniform(-180, 180)
    return draw.choice(
        (
            "{:.4f}, {:.4f}",
            "{:.6f} {:.6f}",
            "({:.5f},{:.5f})",
            "lat {:.4f} lon {:.4f}",
            "{:.4f}/{:.4f}",
            "{:.3f} - {:.3f}",
        )
    ).format(latitude, longitude)


NAMES = ("model", "layers", "self", "np", "torch", "x", "attention", "utils", "q", "weights", "app", "router")
CALLS = ("function", "transpose", "array", "dot", "compile", "get", "setter", "cache", "mean", "T", "wraps", "fixture")


def decorator(draw: random.Random) -> str:
    name, call = (lambda: draw.choice(NAMES)), draw.choice(CALLS)
    forms = (
        f"{name()}.{name()}@tf.{call}",
        f"@{name()}.{call}",
        f"y = {name()} @ {name()}.{call}",
        f"{name()}@{name()}.{call}(1, 0)",
        f"{name()}@{name()}.{call}()",
        "@torch.no_grad",
        f"lodash@{number(draw)}.{number(draw)}.{number(draw)}",
        "icon@2x.png",
        f"git@github.com:{name()}/{name()}.git",
        f"@pytest.fixture\ndef {name()}(): ...",
        f"actions/checkout@v{number(draw, 1, 9)}",
        "root@localhost:~#",
        f"@{name()}_{number(draw)} on Twitter",
    )
    return draw.choice(forms)


def code(draw: random.Random) -> str:
    forms = (
        "x[{}:{}] = {}",
        "std::vector<int> v({}, {}); // {}",
        "assert f({}) == {} + {}",
        "0x{:08x} 0x{:08x} {}",
        "color: rgb({}, {}, {})",
        "[{}, {}, {}]",
        "for i in range({}, {}, {}):",
        "{} {} {}\n",
        "mov eax, {}; add {}, {}",
        "{}x{}+{}",
    )
    return draw.choice(forms).format(*(number(draw, 0, 10**6) for _ in range(3)))


def number_table(draw: random.Random) -> str:
    width = draw.choice((2, 3, 4))
    return " ".join(planted.digits(draw, width) for _ in range(number(draw, 5, 9)))


def digest(draw: random.Random) -> str:
    hexadecimal = "0123456789abcdef"
    identifier = str(uuid.UUID(int=draw.getrandbits(128), version=4))
    return draw.choice(
        (
            characters(draw, 40, hexadecimal),
            characters(draw, 64, hexadecimal),
            identifier,
            f"sha256:{characters(draw, 64, hexadecimal)}",
            f"sk-{characters(draw, 12)}",
            f"hf_{'x' * 34}",
            f"AKIA{characters(draw, 8, string.ascii_uppercase)}",
            f"eyJ{characters(draw, 30)}",
            encoded(draw, 60),
            ":".join(characters(draw, 2, hexadecimal) for _ in range(6)),
            f"ghp_{'0' * 36}",
            "-----BEGIN PUBLIC KEY-----",
        )
    )


def price(draw: random.Random) -> str:
    return draw.choice(
        (
            "$1,{0:03d},{1:03d}.99",
            "{0} {1:03d} {1:03d} EUR",
            "€ {0}.{1:03d}.{1:03d},00",
            "{0:03d}.{1:03d} + 12.5%",
            "{0}-{1} USD, {1}-{0} GBP",
        )
    ).format(number(draw, 1, 999), number(draw, 0, 999))


def measurement(draw: random.Random) -> str:
    forms = ("{:.16f}", "loss {:.17f} after", "p = {:.19f}", "{:.10f}e-07", "pi/{:.12f}")
    return draw.choice(forms).format(draw.random())


def private_address(draw: random.Random) -> str:
    return draw.choice(
        (
            f"10.{number(draw)}.{number(draw)}.1",
            f"192.168.{number(draw)}.{number(draw)}",
            "127.0.0.1",
            "::1",
            f"fe80::{number(draw)}",
            "std::pair<a::b>",
            "2001:db8::1",
        )
    )


NEGATIVES: Mapping[str, Maker] = {
    "timestamp": timestamp,
    "version": version,
    "section": section,
    "ISBN": isbn,
    "order number": order,
    "digits": bare_digits,
    "coordinates": coordinates,
    "decorator": decorator,
    "code": code,
    "number table": number_table,
    "hash": digest,
    "price": price,
    "measurement": measurement,
    "private address": private_address,
}
AROUND = (
    "{}",
    "{}.",
    "it is {}.",
    "({})",
    "see {} below",
    "we had {}, and then",
    "Note: {}\nMore text follows.",
    "- {}\n- other",
    "`{}`",
)


@dataclass
class Outcome:
    """Counts of a battery.

    Attributes:
        planted, found: by maker.
        right, wrong: masks by kind, in texts in which one of the kind was planted, and in others.
        missed, taken: examples.
        negatives: hard negatives in which anything was masked, by maker.
    """

    planted: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    negatives: Counter[str] = field(default_factory=Counter)
    missed: dict[str, list[str]] = field(default_factory=dict)
    taken: dict[str, list[str]] = field(default_factory=dict)

    def precision(self, kind: str) -> float:
        return self.right[kind] / max(self.right[kind] + self.wrong[kind], 1)

    def recall(self, maker: str) -> float:
        return self.found[maker] / self.planted[maker]


def surrounded(made: str, corpus: list[str], draw: random.Random, around: tuple[str, ...]) -> str:
    sentence = draw.choice(around).format(made)
    words = draw.choice(corpus).split(" ")
    at = draw.randrange(len(words) + 1)
    return draw.choice((sentence, "\n".join([" ".join(words[:at]), sentence, " ".join(words[at:])])))


def battery(seed: int, each: int) -> Outcome:
    """Plant `each` of every kind and of every hard negative."""
    draw = random.Random(seed)
    corpus = [turn for record in load_records().values() for turn in join_turns(record)[:2]][:3000]
    corpus = [turn for turn in corpus if not any(map(str.isdigit, turn)) and "@" not in turn]
    step = PersonalDataFilter()
    outcome = Outcome()
    for maker, make in MAKERS.items():
        kind = maker.split(",")[0]
        for _ in range(each):
            made = make(draw)
            text = surrounded(made, corpus, draw, BARE if maker == "phone, ten digits" else (*AROUND, *planted.AROUND))
            hidden = step.mask_personal_data(text)
            good = f"[{kind.upper()}]" in hidden and made not in hidden
            outcome.planted[maker] += 1
            outcome.found[maker] += good
            if not good:
                outcome.missed.setdefault(maker, []).append(text)
            for other in KINDS:
                count = hidden.count(f"[{other.upper()}]")
                (outcome.right if other == kind else outcome.wrong)[other] += count
                if count and other != kind:
                    outcome.taken.setdefault(other, []).append(text)
    for maker, make in NEGATIVES.items():
        for _ in range(each):
            text = surrounded(make(draw), corpus, draw, AROUND)
            hidden = step.mask_personal_data(text)
            outcome.negatives[maker] += hidden != text
            for kind in KINDS:
                count = hidden.count(f"[{kind.upper()}]")
                outcome.wrong[kind] += count
                if count:
                    outcome.taken.setdefault(kind, []).append(text)
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=1000)
    parser.add_argument("--show", type=int, default=0, help="examples of what is missed or wrongly taken")
    given = parser.parse_args()
    outcome = battery(given.seed, given.each)
    print("| kind | precision | recall |\n| --- | --- | --- |")
    for maker in MAKERS:
        print(f"| {maker} | {outcome.precision(maker.split(',')[0]):.3f} | {outcome.recall(maker):.3f} |")
    share = ", ".join(f"{maker} {count / given.each:.3f}" for maker, count in outcome.negatives.items() if count)
    print(f"\nhard negatives of which anything is masked: {share or 'none'} (each {given.each:,})")
    for label, examples in (("missed", outcome.missed), ("taken", outcome.taken)):
        for kind, texts in examples.items():
            for text in texts[: given.show]:
                print(f"{label} {kind}: {text[-160:]!r}")


if __name__ == "__main__":
    main()
