"""Measure precision and recall of the cleaning step `pii`, by kind, on planted personal data, secrets and lookalikes.

    python benchmarks/data/pii_detection.py [--seed 0] [--each 1000] [--show 5]

Some kinds are from `fake_pii.py`. Each planted value, and each hard negative, stands in a sentence of its own or
between words of the built-in corpus. Recall is the share of planted values that are masked completely and as their
kind; precision is the share of a kind's masks that stand in texts in which one was planted.
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

import fake_pii
from fake_pii import create_us_ssn, draw_digits

from align.data.chitchat import join_turns, load_records
from align.data.clean.pii import KINDS, PersonalDataFilter

LETTERS = string.ascii_letters + string.digits
Maker = Callable[[random.Random], str]


def draw_characters(draw: random.Random, count: int, alphabet: str = LETTERS) -> str:
    return "".join(draw.choices(alphabet, k=count))


def draw_base64(draw: random.Random, count: int) -> str:
    """Return `count` random bytes in URL-safe base64 without padding."""
    return base64.urlsafe_b64encode(draw.randbytes(count)).decode().rstrip("=")


API_KEYS: Mapping[str, Maker] = {
    "AWS": lambda draw: draw.choice(("AKIA", "ASIA")) + draw_characters(draw, 16, string.ascii_uppercase + "234567"),
    "GitHub": lambda draw: draw.choice(("ghp_", "gho_", "ghu_", "ghs_", "ghr_")) + draw_characters(draw, 36),
    "GitHub, fine-grained": lambda draw: f"github_pat_{draw_characters(draw, 22)}_{draw_characters(draw, 59)}",
    "GitLab": lambda draw: draw.choice(("glpat-", "gldt-", "glrt-")) + draw_characters(draw, 20, LETTERS + "_-"[:1]),
    "Slack": lambda draw: "-".join(
        (f"xox{draw.choice('bp')}", draw_digits(draw, 12), draw_digits(draw, 13), draw_characters(draw, 24))
    ),
    "Slack, hook": lambda draw: "/".join(
        (
            "https://hooks.slack.com/services",
            f"T{draw_characters(draw, 8)}",
            f"B{draw_characters(draw, 10)}",
            draw_characters(draw, 24),
        )
    ),
    "Google": lambda draw: "AIza" + draw_characters(draw, 35, LETTERS + "-_"),
    "Stripe": lambda draw: (
        draw.choice(("sk_live_", "sk_test_", "rk_live_")) + draw_characters(draw, draw.choice((24, 99)))
    ),
    "OpenAI": lambda draw: f"sk-{draw_characters(draw, 20)}T3BlbkFJ{draw_characters(draw, 20)}",
    "OpenAI, project": lambda draw: f"sk-proj-{draw_base64(draw, 54)}T3BlbkFJ{draw_base64(draw, 54)}",
    "Anthropic": lambda draw: f"sk-ant-api03-{draw_base64(draw, 69)}-{draw_characters(draw, 6)}AA",
    "Hugging Face": lambda draw: "hf_" + draw_characters(draw, 34, string.ascii_letters),
    "npm": lambda draw: "npm_" + draw_characters(draw, 36),
    "PyPI": lambda draw: "pypi-AgEIcHlwaS5vcmc" + draw_base64(draw, 110),
    "SendGrid": lambda draw: f"SG.{draw_base64(draw, 16)}.{draw_base64(draw, 32)}",
}


def create_api_key(draw: random.Random) -> str:
    return API_KEYS[draw.choice([*API_KEYS])](draw)


def create_jwt(draw: random.Random) -> str:
    header = {"alg": draw.choice(("HS256", "RS256", "ES256")), "typ": "JWT"}
    claims = {"sub": draw_digits(draw, 10), "name": "Anna", "iat": draw.randrange(10**9, 2 * 10**9)}
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in (header, claims)]
    return ".".join([*parts, draw_base64(draw, draw.choice((32, 64, 256)))])


def create_private_key(draw: random.Random) -> str:
    kind = draw.choice(
        ("RSA PRIVATE KEY", "EC PRIVATE KEY", "OPENSSH PRIVATE KEY", "PRIVATE KEY", "ENCRYPTED PRIVATE KEY")
    )
    body = base64.b64encode(draw.randbytes(draw.choice((120, 600, 1200)))).decode()
    lines = [body[i : i + 64] for i in range(0, len(body), 64)]
    return "\n".join([f"-----BEGIN {kind}-----", *lines, f"-----END {kind}-----"])


def create_varied_us_ssn(draw: random.Random) -> str:
    return create_us_ssn(draw).replace("-", draw.choice(("-", "-", " ")))


def draw_us_number_parts(draw: random.Random) -> tuple[int, int, str]:
    """Return an area code, a prefix and the last four digits."""
    middle = draw.randrange(200, 900)
    return draw.choice((212, 415, 617, 312, 206, 702)), middle + (middle % 100 == 11), draw_digits(draw, 4)


def create_national_phone(draw: random.Random) -> str:
    area, middle, last = draw_us_number_parts(draw)
    forms = ("({}) {}-{}", "{}-{}-{}", "{}.{}.{}", "{} {} {}", "1-{}-{}-{}", "({}){}-{}", "({}) {} {}")
    return draw.choice(forms).format(area, middle, last)


def create_international_phone(draw: random.Random) -> str:
    area, middle, last = draw_us_number_parts(draw)
    forms = (
        f"+1 {area} {middle} {last}",
        f"+1-{area}-{middle}-{last}",
        f"+1{area}{middle}{last}",
        f"+1 ({area}) {middle}-{last}",
        f"+49 30 {draw.randrange(2, 9)}{draw_digits(draw, 6)}",
        f"+44 7{draw.randrange(700, 800)} {draw_digits(draw, 6)}",
        f"+33 6 {draw.randrange(10, 69)} {' '.join(draw_digits(draw, 2) for _ in range(3))}",
        f"+49 (0)30 {draw.randrange(2, 9)}{draw_digits(draw, 6)}",
        f"0044 7{draw.randrange(700, 800)} {draw_digits(draw, 6)}",
        f"+34 6{draw_digits(draw, 2)} {draw_digits(draw, 3)} {draw_digits(draw, 3)}",
    )
    return draw.choice(forms)


def create_unformatted_phone(draw: random.Random) -> str:
    area, middle, last = draw_us_number_parts(draw)
    return f"{area}{middle}{last}"


MAKERS: Mapping[str, Maker] = {
    **fake_pii.MAKERS,
    "us_ssn": create_varied_us_ssn,
    "phone": create_national_phone,
    "phone, international": create_international_phone,
    "phone, ten digits": create_unformatted_phone,
    "api_key": create_api_key,
    "jwt": create_jwt,
    "private_key": create_private_key,
}
PHONE_CONTEXTS = (
    "call {}",
    "My cell is {}.",
    "tel: {}",
    "Text me at {} tonight",
    "phone number {}",
    "Please dial {} now",
    "mobile {}",
)
"""Contexts in which ten digits in a row are a telephone number."""


def draw_number(draw: random.Random, low: int = 0, high: int = 99) -> int:
    """Return a number in the range, both ends included."""
    return draw.randint(low, high)


# Hard negatives: texts that look like personal data.


def create_timestamp(draw: random.Random) -> str:
    year = draw_number(draw, 1990, 2039)
    month = draw_number(draw, 1, 12)
    day = draw_number(draw, 1, 28)
    hour = draw_number(draw, 0, 23)
    minute = draw_number(draw, 0, 59)
    second = draw_number(draw, 0, 59)
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


def draw_four_part_number(draw: random.Random) -> str:
    high = draw.choice((9, 30, 255))
    return ".".join(str(draw_number(draw, 0, high)) for _ in range(4))


def create_version(draw: random.Random) -> str:
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
    return draw.choice(forms).format(draw_four_part_number(draw))


def create_section(draw: random.Random) -> str:
    parts = ".".join(str(draw_number(draw, 1, 12)) for _ in range(4))
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


def create_isbn(draw: random.Random) -> str:
    if draw.random() < 0.5:
        group = draw_number(draw, 0, 9)
        publisher = draw_number(draw, 10, 99)
        title = draw_digits(draw, 6)
        return f"ISBN {draw.choice((978, 979))}-{group}-{publisher}-{title}-{draw_number(draw, 0, 9)}"
    return draw.choice(("ISBN {}-{}-{}-{}", "ISBN-10: {}-{}-{}-{}", "{}-{}-{}-{}")).format(
        draw_number(draw, 0, 9), draw_number(draw, 100, 999), draw_number(draw, 10000, 99999), draw_number(draw, 0, 9)
    )


def create_order_number(draw: random.Random) -> str:
    body = draw.choice(
        (
            draw_digits(draw, 10),
            draw_digits(draw, 16),
            draw_digits(draw, 9),
            f"{draw_digits(draw, 3)}-{draw_digits(draw, 7)}-{draw_digits(draw, 7)}",
            f"{draw_digits(draw, 3)}-{draw_digits(draw, 3)}-{draw_digits(draw, 4)}",
            f"{draw_digits(draw, 3)}-{draw_digits(draw, 2)}-{draw_digits(draw, 4)}",
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


def create_digits(draw: random.Random) -> str:
    forms = ("{} rows", "id {}", "a total of {}", "{}", "seed={}", "hash({})")
    return draw.choice(forms).format(draw_digits(draw, draw.choice((9, 10, 10, 11, 12))))


def create_coordinates(draw: random.Random) -> str:
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


def create_decorator(draw: random.Random) -> str:
    call = draw.choice(CALLS)

    def name() -> str:
        return draw.choice(NAMES)

    forms = (
        f"{name()}.{name()}@tf.{call}",
        f"@{name()}.{call}",
        f"y = {name()} @ {name()}.{call}",
        f"{name()}@{name()}.{call}(1, 0)",
        f"{name()}@{name()}.{call}()",
        "@torch.no_grad",
        f"lodash@{draw_number(draw)}.{draw_number(draw)}.{draw_number(draw)}",
        "icon@2x.png",
        f"git@github.com:{name()}/{name()}.git",
        f"@pytest.fixture\ndef {name()}(): ...",
        f"actions/checkout@v{draw_number(draw, 1, 9)}",
        "root@localhost:~#",
        f"@{name()}_{draw_number(draw)} on Twitter",
    )
    return draw.choice(forms)


def create_code(draw: random.Random) -> str:
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
    return draw.choice(forms).format(*(draw_number(draw, 0, 10**6) for _ in range(3)))


def create_number_table(draw: random.Random) -> str:
    width = draw.choice((2, 3, 4))
    return " ".join(draw_digits(draw, width) for _ in range(draw_number(draw, 5, 9)))


def create_digest(draw: random.Random) -> str:
    hexadecimal = "0123456789abcdef"
    identifier = str(uuid.UUID(int=draw.getrandbits(128), version=4))
    return draw.choice(
        (
            draw_characters(draw, 40, hexadecimal),
            draw_characters(draw, 64, hexadecimal),
            identifier,
            f"sha256:{draw_characters(draw, 64, hexadecimal)}",
            f"sk-{draw_characters(draw, 12)}",
            f"hf_{'x' * 34}",
            f"AKIA{draw_characters(draw, 8, string.ascii_uppercase)}",
            f"eyJ{draw_characters(draw, 30)}",
            draw_base64(draw, 60),
            ":".join(draw_characters(draw, 2, hexadecimal) for _ in range(6)),
            f"ghp_{'0' * 36}",
            "-----BEGIN PUBLIC KEY-----",
        )
    )


def create_price(draw: random.Random) -> str:
    return draw.choice(
        (
            "$1,{0:03d},{1:03d}.99",
            "{0} {1:03d} {1:03d} EUR",
            "€ {0}.{1:03d}.{1:03d},00",
            "{0:03d}.{1:03d} + 12.5%",
            "{0}-{1} USD, {1}-{0} GBP",
        )
    ).format(draw_number(draw, 1, 999), draw_number(draw, 0, 999))


def create_measurement(draw: random.Random) -> str:
    forms = ("{:.16f}", "loss {:.17f} after", "p = {:.19f}", "{:.10f}e-07", "pi/{:.12f}")
    return draw.choice(forms).format(draw.random())


def create_private_address(draw: random.Random) -> str:
    return draw.choice(
        (
            f"10.{draw_number(draw)}.{draw_number(draw)}.1",
            f"192.168.{draw_number(draw)}.{draw_number(draw)}",
            "127.0.0.1",
            "::1",
            f"fe80::{draw_number(draw)}",
            "std::pair<a::b>",
            "2001:db8::1",
        )
    )


NEGATIVES: Mapping[str, Maker] = {
    "timestamp": create_timestamp,
    "version": create_version,
    "section": create_section,
    "ISBN": create_isbn,
    "order number": create_order_number,
    "digits": create_digits,
    "coordinates": create_coordinates,
    "decorator": create_decorator,
    "code": create_code,
    "number table": create_number_table,
    "hash": create_digest,
    "price": create_price,
    "measurement": create_measurement,
    "private address": create_private_address,
}
CONTEXTS = (
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
class DetectionCounts:
    """Counts and examples of a test run.

    Attributes:
        planted: planted values, by maker.
        found: planted values that were masked completely as their kind, by maker.
        right: masks by kind, in texts in which a value of the kind was planted.
        wrong: masks by kind, in other texts.
        negatives: hard negatives in which anything was masked, by maker.
        missed: texts with values that were not masked, by maker.
        taken: texts with wrong masks, by kind.
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


def insert_into_text(value: str, corpus: list[str], draw: random.Random, contexts: tuple[str, ...]) -> str:
    """Return a sentence with the value, alone or between words of a text of the corpus."""
    sentence = draw.choice(contexts).format(value)
    words = draw.choice(corpus).split(" ")
    position = draw.randrange(len(words) + 1)
    return draw.choice((sentence, "\n".join([" ".join(words[:position]), sentence, " ".join(words[position:])])))


def measure_detection(seed: int, each: int) -> DetectionCounts:
    """Run the step on `each` values of every kind and of every hard negative."""
    draw = random.Random(seed)
    corpus = [turn for record in load_records().values() for turn in join_turns(record)[:2]][:3000]
    corpus = [turn for turn in corpus if not any(map(str.isdigit, turn)) and "@" not in turn]
    step = PersonalDataFilter()
    outcome = DetectionCounts()
    for maker, make in MAKERS.items():
        kind = maker.split(",")[0]
        contexts = PHONE_CONTEXTS if maker == "phone, ten digits" else (*CONTEXTS, *fake_pii.CONTEXTS)
        for _ in range(each):
            value = make(draw)
            text = insert_into_text(value, corpus, draw, contexts)
            masked = step.mask_personal_data(text)
            is_masked = f"[{kind.upper()}]" in masked and value not in masked
            outcome.planted[maker] += 1
            outcome.found[maker] += is_masked
            if not is_masked:
                outcome.missed.setdefault(maker, []).append(text)
            for mask_kind in KINDS:
                count = masked.count(f"[{mask_kind.upper()}]")
                (outcome.right if mask_kind == kind else outcome.wrong)[mask_kind] += count
                if count and mask_kind != kind:
                    outcome.taken.setdefault(mask_kind, []).append(text)
    for maker, make in NEGATIVES.items():
        for _ in range(each):
            text = insert_into_text(make(draw), corpus, draw, CONTEXTS)
            masked = step.mask_personal_data(text)
            outcome.negatives[maker] += masked != text
            for kind in KINDS:
                count = masked.count(f"[{kind.upper()}]")
                outcome.wrong[kind] += count
                if count:
                    outcome.taken.setdefault(kind, []).append(text)
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=1000)
    parser.add_argument("--show", type=int, default=0, help="number of examples of missed values and wrong masks")
    options = parser.parse_args()
    outcome = measure_detection(options.seed, options.each)
    print("| kind | precision | recall |\n| --- | --- | --- |")
    for maker in MAKERS:
        print(f"| {maker} | {outcome.precision(maker.split(',')[0]):.3f} | {outcome.recall(maker):.3f} |")
    share = ", ".join(f"{maker} {count / options.each:.3f}" for maker, count in outcome.negatives.items() if count)
    print(f"\nhard negatives of which anything is masked: {share or 'none'} (each {options.each:,})")
    for label, examples in (("missed", outcome.missed), ("taken", outcome.taken)):
        for kind, texts in examples.items():
            for text in texts[: options.show]:
                print(f"{label} {kind}: {text[-160:]!r}")


if __name__ == "__main__":
    main()
