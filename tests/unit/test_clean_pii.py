"""Personal data: its detection, text that is left unchanged, and masking in counts and examples."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import pytest
from clean_samples import build_conversation, build_preference

from align.core.redaction import mask_secrets
from align.data.chitchat import join_turns, load_records, to_conversation
from align.data.clean.cleaner import Cleaner
from align.data.clean.outcome import Drop, NotedRecord
from align.data.clean.pii import IBAN_LENGTHS, KINDS, PersonalDataFilter, is_card_number, passes_luhn, passes_mod_97
from align.data.clean.steps import create_steps

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "data"))
from fake_pii import MAKERS, plant
from pii_detection import API_KEYS, NEGATIVES, create_jwt, create_private_key, measure_detection
from pii_detection import MAKERS as PLANTED


def test_checks_by_hand():
    """Numbers that the schemes publish as examples."""
    assert passes_luhn("79927398713")
    assert not any(passes_luhn(f"7992739871{last}") for last in "012456789")
    assert all(map(is_card_number, ("4111111111111111", "378282246310005", "6011111111111117", "5555555555554444")))
    assert not any(map(is_card_number, ("4111111111111112", "0000000000000000", "378282246310005123", "411111111111")))
    for iban in (
        "GB82WEST12345698765432",
        "DE89370400440532013000",
        "NO9386011117947",
        "MT84MALT011000012345MTLCAST001S",
    ):
        assert passes_mod_97(iban)
        assert len(iban) == IBAN_LENGTHS[iban[:2]]
        assert not passes_mod_97(f"{iban[:-1]}{'7' if iban[-1] != '7' else '8'}")


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("write bob@example.com.", "write [EMAIL]."),
        ("<bob@x.co.uk>, 'eve@y.de'", "<[EMAIL]>, '[EMAIL]'"),
        ("O'Brien+x@Mail.Example.COM", "[EMAIL]"),
        ("邮箱是bob@example.com谢谢", "邮箱是[EMAIL]谢谢"),
        ("müller@uni-köln.de", "[EMAIL]"),
        ("https://user:secret@host.example.com/", "https://user:[EMAIL]/"),
        ("card 4111 1111 1111 1111, thanks", "card [CARD], thanks"),
        ("3782-822463-10005", "[CARD]"),
        ("1234 4111 1111 1111 1111", "1234 [CARD]"),
        ("4111111111111111/12 and 5555.5555.5555.4444", "[CARD]/12 and [CARD]"),
        ("IBAN: DE89 3704 0044 0532 0130 00 please", "IBAN: [IBAN] please"),
        ("gb82west12345698765432", "[IBAN]"),
        ("NO93 8601 1117 947", "[IBAN]"),
        ("from 8.8.8.8:53", "from [IPV4]:53"),
        ("at 2001:4860:4860::8888.", "at [IPV6]."),
        ("SSN 219-09-9998", "SSN [US_SSN]"),
        ("call (212) 664-7665 or +49 30 901820", "call [PHONE] or [PHONE]"),
        ("on 2020-05-04 212-664-7665", "on 2020-05-04 [PHONE]"),
        ("call 2126647665 now", "call [PHONE] now"),
        ("0044 7911 123456 or +49 (0)30 901820", "[PHONE] or [PHONE]"),
        ("SSN: 219099998, or 219 09 9998", "SSN: [US_SSN], or [US_SSN]"),
        ("order 212-664-7665, my phone is 212-664-7665", "order 212-664-7665, my phone is [PHONE]"),
        ("http://52.14.9.200:80/ and client_ip=52.14.9.200", "http://[IPV4]:80/ and client_ip=[IPV4]"),
        ("server 5.9.12.3, as IP 5.9.12.3", "server [IPV4], as IP [IPV4]"),
        ("a@b.com@c.com", "[EMAIL]@c.com"),
    ],
)
def test_what_is_masked(text: str, hidden: str):
    assert PersonalDataFilter().mask_personal_data(text) == hidden
    notes = PersonalDataFilter(action="report")(build_conversation("Hi", text)).notes  # pyright: ignore
    assert PersonalDataFilter()(build_conversation("Hi", text)) == NotedRecord(build_conversation("Hi", hidden), notes)


@pytest.mark.parametrize(
    "text",
    [
        "git clone git@github.com:align/align.git",
        "@staticmethod, a @ b, x@y, me@localhost",
        "4111 1111 1111 1112 and 1234 5678 9012 3456",
        "order 20230145 of 2024-01-02, 12:30:45, 3.14159, 1,234,567.89",
        "v1.2.3.4, 127.0.0.1, 192.168.0.1, 10.0.0.1, 999.1.1.1, 1.2.3.4.5",
        "fe80::1, ::1, 2001:db8::1, std::abs, 20:30:45, 2001:zz",
        "000-12-3456, 666-12-3456, 912-12-3456, 123-00-4567, 123-45-0000, 1234-56-7890",
        "at 20 people came to the house and 5 of them left, no 15 others stayed",
        "DE89 3704 0044 0532 0130 01",
        "at 20 we saw anna ida fred, 123456 of them",  # Austria's length, and MOD 97-10 is right
        "order 2126647665",  # the number of an order, ten digits in a row
        "1609459200 and 20210101120000",
        "π = 3.14159265358979323846",
        "2026-11-29 18:04:51 and 29.11.2026 18:04",
        "model.layers@tf.function, q@k.mean(1), x@np.dot, icon@2x.png, lodash@4.17.21",
        "version 52.14.9.200, pkg==52.14.9.200, foo-52.14.9.200, see 3.12.4.7, Chrome/52.14.9.200",
        "ISBN 0-306-40615-2, order #219-09-9998, ticket 212-664-7665, 114-3941689-8772232",
        "8517 4614 4111 1111 1111 1111 2551 and 0.4111111111111111",
        "is 706 604 808 278 021 625 470 036",
        "hf_" + "x" * 34 + ", sk-container-id-1, hf_hub_download, SG.one.two, ghp_, eyJ is how they begin",
        "I have 2 cats, 13 dogs & 100 fish: 115 animals!",
    ],
)
def test_what_is_left_alone(text: str):
    record = build_conversation("Hi", text)
    assert PersonalDataFilter()(record) is record


def test_telephone_numbers_of_other_countries():
    assert PersonalDataFilter().mask_personal_data("030 901820") == "030 901820"
    assert PersonalDataFilter(regions=("DE",)).mask_personal_data("ruf 030 901820 an") == "ruf [PHONE] an"
    assert (
        PersonalDataFilter(regions=()).mask_personal_data("(212) 664-7665, +1 212 664 7665")
        == "(212) 664-7665, [PHONE]"
    )
    assert PersonalDataFilter(regions=("US", "DE")).mask_personal_data("212-664-7665 030 901820") == "[PHONE] [PHONE]"


def test_actions():
    record = build_conversation("I am bob@example.com", "And your card, 4111111111111111, is fine.")
    assert PersonalDataFilter(action="drop")(record) == Drop("pii: email", "[EMAIL], [CARD]")
    noted_record = PersonalDataFilter(action="report")(record)
    assert isinstance(noted_record, NotedRecord)
    assert noted_record.record is record
    assert noted_record.notes == ("email", "card")
    masked = build_conversation("I am [EMAIL]", "And your card, [CARD], is fine.")
    assert PersonalDataFilter()(record) == NotedRecord(masked, ("email", "card"))
    assert PersonalDataFilter(kinds=("card",))(record) == NotedRecord(
        build_conversation("I am bob@example.com", "And your card, [CARD], is fine."), ("card",)
    )
    alike_pair = build_preference("Mail?", "a@example.com", "b@example.com")
    assert PersonalDataFilter()(alike_pair) == Drop("answers alike", "chosen and rejected are the same after this step")
    assert PersonalDataFilter(action="report")(alike_pair) == NotedRecord(alike_pair, ("email",))


CORPUS = [to_conversation(lines, id) for id, record in load_records().items() if (lines := join_turns(record))]


@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_planted_among_real_dialogue_is_found(kind: str):
    """Detection of 1,000 values of each kind. Some telephone numbers are in unassigned ranges, and are not detected."""
    draw = random.Random(kind)
    masked_count = 0
    for _ in range(1_000):
        text, planted = plant(draw.choice(draw.choice(CORPUS).messages).content, kind, draw)
        hidden = PersonalDataFilter().mask_personal_data(text)
        masked_count += f"[{kind.upper()}]" in hidden and planted not in hidden
    assert masked_count >= (970 if kind == "phone" else 990)


def test_what_is_found_in_real_dialogue():
    """Two of 7,168 conversations have a telephone number, and two an e-mail address."""
    counts = dict.fromkeys(KINDS, 0)
    for record in CORPUS:
        outcome = PersonalDataFilter(action="report")(record)
        for kind in outcome.notes if isinstance(outcome, NotedRecord) else ():
            counts[kind] += 1
    assert counts == dict.fromkeys(KINDS, 0) | {"email": 2, "phone": 2}


@pytest.mark.parametrize("seed", [1, 2])
def test_precision_and_recall_of_the_battery(seed: int):
    outcome = measure_detection(seed, 60)
    for maker in PLANTED:
        assert outcome.recall(maker) >= 0.95, (maker, outcome.missed[maker])
    for kind in KINDS:
        assert outcome.precision(kind) >= 0.99, (kind, outcome.taken[kind])
    assert {maker.split(",")[0] for maker in PLANTED} == {*KINDS}
    assert outcome.negatives.total() <= 0.01 * 60 * len(NEGATIVES), outcome.taken


@pytest.mark.parametrize("issuer", API_KEYS)
def test_keys_of_every_issuer_are_masked_in_rows_and_in_messages(issuer: str):
    key = API_KEYS[issuer](random.Random(issuer))
    for around in ("{}", "export TOKEN={}", '"key": "{}",', "({})", "use {}.", "'{}'"):
        assert key[-12:] not in PersonalDataFilter().mask_personal_data(around.format(key))
        assert key[-12:] not in mask_secrets(around.format(key))


def test_blocks_of_private_keys_and_tokens_of_json():
    draw = random.Random(0)
    assert PersonalDataFilter().mask_personal_data(f"a\n{create_private_key(draw)}\nb") == "a\n[PRIVATE_KEY]\nb"
    assert PersonalDataFilter().mask_personal_data(f"Bearer {create_jwt(draw)}") == "Bearer [JWT]"
    assert PersonalDataFilter(kinds=("email",)).mask_personal_data(create_jwt(random.Random(0))) == create_jwt(
        random.Random(0)
    )


def test_a_long_text_of_prefixes_takes_linear_time():
    for prefix in (
        "sk-",
        "eyJ",
        "-----BEGIN RSA PRIVATE KEY-----\n",
        "xoxb-1-",
        "2026-11-29 18",
        "1.2.3.4.",
        "(212) 6",
        "a@a.io@",
    ):
        step = PersonalDataFilter()
        text = prefix * (60_000 // len(prefix))
        start = time.process_time()
        step.mask_personal_data(text)
        assert time.process_time() - start < 10, prefix


def run_cleaner(*steps: object) -> Cleaner:
    cleaner = Cleaner(create_steps(steps))
    rows = [
        "x\x00 mail bob@example.com now",
        "plain",
        "long " * 50 + "4111111111111111",
        "I am an AI language model, eve@x.io",
    ]
    for i, row in enumerate(rows):
        cleaner.clean(row, i)
    return cleaner


@pytest.mark.parametrize("action", ["mask", "report", "drop"])
def test_examples_show_no_personal_data_whichever_step_keeps_them(action: str):
    cleaner = run_cleaner("control", {"length": {"most": 40}}, "boilerplate", {"pii": {"action": action}})
    counts_text = repr(cleaner.counts)
    assert [len(counts.examples) for counts in cleaner.counts] == [1, 1, 1, 1]
    assert "[EMAIL]" in counts_text
    assert "[CARD]" in counts_text
    for secret in ("bob@", "eve@", "4111"):
        assert secret not in counts_text
    (pii,) = cleaner.counts[-1].examples
    assert "[EMAIL]" in pii["before"]["text"]
    assert (pii["after"] is None) == (action == "drop")
    assert "4111" not in repr(run_cleaner({"length": {"most": 40}}, {"pii": {"kinds": ["email"]}}).counts)
    assert "bob@" in repr(run_cleaner("control").counts)  # without a step for personal data, nothing is masked


def test_an_example_shows_the_place_of_what_was_found():
    cleaner = Cleaner(create_steps([{"pii": {"action": "report"}}]))
    cleaner.clean("word " * 4000 + "bob@example.com" + " word" * 4000, 0)
    (example,) = cleaner.counts[0].examples
    assert "[EMAIL]" in example["before"]["text"]
    assert len(example["before"]["text"]) < 700
