"""Tests of the cleaning steps for characters, turns, length, language, repetition and boilerplate."""

from __future__ import annotations

import random
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from clean_samples import WRITTEN, build_conversation, build_conversation_by_role, build_feedback, build_preference

from align.core.errors import InputError
from align.core.types import Conversation, Message, Preference
from align.data.chitchat import join_turns, load_records, to_conversation
from align.data.clean.language import COMMON, NONE, RARE, load_identifier
from align.data.clean.outcome import Drop, NotedRecord, Outcome, Step
from align.data.clean.quality import (
    DEFAULT_PHRASES,
    N,
    compute_repeated_line_share,
    compute_repeated_ngram_share,
    count_words,
    read_phrases,
    split_lowercase_words,
)
from align.data.clean.steps import create_steps
from align.data.ngrams import iter_ngrams


def create_step(setting: Any, **arguments: Any) -> Step:
    ((_, created),) = create_steps([setting], **arguments)
    return created


def require_text(outcome: Outcome) -> str:
    assert isinstance(outcome, str)
    return outcome


def get_drop_reason(outcome: Outcome) -> str:
    assert isinstance(outcome, Drop)
    return outcome.reason


# Characters.


@pytest.mark.parametrize(
    ("broken", "repaired"),
    [
        ("schÃ¶n, weiÃŸ", "schön, weiß"),
        ("donâ€™t", "don’t"),
        ("Ð¿Ñ€Ð¸Ð²ÐµÑ‚", "привет"),
        ("cafe\u0301", "café"),
        ("one\r\ntwo\rthree", "one\ntwo\nthree"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("“curly” ﬁne ！", "“curly” ﬁne ！"),
        ("a &amp; b", "a &amp; b"),
    ],
)
def test_unicode(broken: str, repaired: str):
    assert create_step("unicode")(broken) == repaired
    assert create_step("unicode")(build_conversation("Hi", broken)) == build_conversation("Hi", repaired)


def test_marks_without_end_are_cut():
    """Zalgo text keeps thirty marks on a letter."""
    assert create_step("unicode")("a" + "\u0323\u0301" * 2000) == unicodedata.normalize(
        "NFC", "a" + "\u0323\u0301" * 15
    )
    assert create_step("unicode")("b\u0316\u0301 " * 1000) == "b\u0316\u0301 " * 1000


def test_unicode_unescapes_where_asked():
    assert create_step({"unicode": {"unescape": True}})("caf&eacute; &amp;amp; bar") == "café & bar"
    assert create_step({"unicode": {"unescape": True}})("<b>&amp;</b>") == "<b>&amp;</b>"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("a\x00b\x07c\x7f", "abc"),
        ("zero\u200bwidth\ufeff\u2060 soft\u00adhyphen", "zerowidth softhyphen"),
        ("pass\u200dword \u200cx", "password x"),
        ("if (x \u202e} ){ y \u202c\u2066z\u2069", "if (x } ){ y z"),
        ("a\x0bb\x0cc\x85d\u2028e\r\nf", "a\nb\nc\nd\ne\nf"),
        ("tab\tand\nline", "tab\tand\nline"),
        ("hello" + "".join(chr(0xE0000 + ord(c)) for c in "ignore this"), "hello"),
        ("🏴" + "".join(chr(0xE0000 + ord(c)) for c in "ignore all of this") + "\U000e007f!", "🏴!"),
        ("😀" + "".join(chr(0xE0100 + i) for i in range(40)), "😀"),
        ("x\ufe01\ufe02\ufe03", "x\ufe01"),
        ("x\ufe01\u200b\ufe02\u200b\ufe03", "x\ufe01"),
        ("a\ufdd0b\ufffe\U0001ffffc", "abc"),
        ("👩\u200b\u200d🚀", "👩🚀"),
        ("la\u200erge \u061c", "large "),
        ("שלום\u202eabc", "שלוםabc"),
    ],
)
def test_control(given: str, kept: str):
    assert create_step("control")(given) == kept
    assert create_step("control")(build_conversation("Hi", given)) == build_conversation("Hi", kept)


@pytest.mark.parametrize("script", WRITTEN)
def test_what_people_write_passes_every_step_as_the_very_same_record(script: str):
    text = WRITTEN[script]
    for record in (
        text,
        build_conversation("Hi", text),
        build_conversation(text, "Yes."),
        build_preference(text, text + " Yes.", "No."),
    ):
        for name, clean in create_steps(["unicode", "control", "empty", "roles", "repetition", "boilerplate", "pii"]):
            assert clean(record) is record, (name, clean(record))


# Turns.


@pytest.mark.parametrize("nothing", ["", " \n\t", "\u200b\u2060", "\u3164", "<think>\nHm.\n</think>\n"])
def test_empty(nothing: str):
    empty = create_step("empty")
    assert empty(build_conversation("a", "b", "c", nothing)) == build_conversation("a", "b")
    assert empty(
        build_conversation_by_role(("user", "a"), ("assistant", "b"), ("user", nothing if "<" not in nothing else ""))
    ) == build_conversation("a", "b")
    assert get_drop_reason(empty(build_conversation("a", nothing))) == "empty"
    assert (
        get_drop_reason(empty(build_conversation_by_role(("system", "s"), ("user", "a"), ("assistant", nothing))))
        == "empty"
    )
    assert get_drop_reason(empty(build_conversation("a", nothing, "c", "d"))) == "empty turn"
    assert get_drop_reason(empty(build_preference(nothing if "<" not in nothing else "", "b", "c"))) == "empty turn"


def test_what_may_be_empty():
    """System turns, answers that are not trained on, and answers that people judged may be empty."""
    untrained = Conversation(
        (Message("user", "a"), Message("assistant", "", False), Message("user", "b"), Message("assistant", "c"))
    )
    for record in (
        untrained,
        build_conversation_by_role(("system", ""), ("user", "a"), ("assistant", "b")),
        build_preference("a", "", "b"),
        build_feedback("a", "", False),
    ):
        assert create_step("empty")(record) is record
    assert get_drop_reason(create_step("empty")(" \n")) == "empty"
    assert create_step("empty")(build_conversation("a", "<think>Hm.</think> Yes.")) == build_conversation(
        "a", "<think>Hm.</think> Yes."
    )


@pytest.mark.parametrize(
    ("roles", "found"),
    [
        ("sua", None),
        ("ua", None),
        ("uaua", None),
        ("u", "no answer"),
        ("uau", "no answer"),
        ("su", "no answer"),
        ("a", "role order"),
        ("au", "role order"),
        ("uua", "role order"),
        ("uaa", "role order"),
        ("usa", "role order"),
        ("ssua", "role order"),
        ("sa", "role order"),
    ],
)
def test_roles(roles: str, found: str | None):
    name = {"s": "system", "u": "user", "a": "assistant"}
    record = build_conversation_by_role(*((name[role], "x") for role in roles))
    assert (
        create_step("roles")(record) is record
        if found is None
        else get_drop_reason(create_step("roles")(record)) == found
    )
    lenient = create_step({"roles": {"ends": "any"}})(record)
    assert get_drop_reason(lenient) == "role order" if found == "role order" else lenient is record


def test_roles_of_pairs():
    good = build_preference("a", "b", "c")
    assert create_step("roles")(good) is good
    assert get_drop_reason(create_step("roles")(replace(good, rejected=(Message("user", "c"),)))) == "role order"
    assert get_drop_reason(create_step("roles")(replace(good, prompt=(Message("assistant", "c"),)))) == "role order"


# Length.


@pytest.mark.parametrize(("by", "length"), [("characters", 12), ("words", 4), ("turns", 2), ("tokens", 7)])
def test_length(by: str, length: int):
    record = build_conversation_by_role(("system", ""), ("user", "Hi all"), ("assistant", "Yes, I"))
    token_counter = {"count_tokens": lambda conversation: 7}
    assert create_step({"length": {"least": length, "most": length, "by": by}}, **token_counter)(record) is record
    assert (
        get_drop_reason(create_step({"length": {"least": length + 1, "by": by}}, **token_counter)(record))
        == "too short"
    )
    assert (
        get_drop_reason(create_step({"length": {"most": length - 1, "by": by}}, **token_counter)(record)) == "too long"
    )


def test_a_pair_is_measured_with_either_answer():
    record = build_preference("a b", "c", "d e f g")  # 3 and 6 words
    assert create_step({"length": {"least": 3, "most": 6}})(record) is record
    assert get_drop_reason(create_step({"length": {"least": 4}})(record)) == "too short"
    assert get_drop_reason(create_step({"length": {"most": 5}})(record)) == "too long"
    conversations: list[Any] = []
    create_step(
        {"length": {"most": 5, "by": "tokens"}},
        count_tokens=lambda conversation: conversations.append(conversation) or 1,
    )(record)
    assert [conversation.messages for conversation in conversations] == [
        record.prompt + record.chosen,
        record.prompt + record.rejected,
    ]
    assert isinstance(record, Preference)


def test_words_of_scripts_that_do_not_part_them():
    assert count_words("one two  three\n") == 3
    assert count_words("größer als drei") == 3
    assert count_words("你好，我想问一下") == 7
    assert count_words("电球是 lamp") == 3
    assert 3 <= count_words("สวัสดีครับหลอดไฟอยู่ในกล่อง") <= 8


# Language.


def test_language_of_whole_conversations():
    english = create_step({"language": {"keep": ["en"]}})
    spoken = build_conversation("Hello there, how are you doing today?", "I am fine, thank you, and how about you?")
    assert english(spoken) == NotedRecord(spoken, ("en",))
    german = build_conversation("Guten Tag, wie geht es Ihnen heute?", "Danke, mir geht es gut, und Ihnen selbst?")
    assert english(german) == Drop("language: de", english(german).detail)  # pyright: ignore
    assert create_step({"language": {"keep": ["en", "de"]}})(german) == NotedRecord(german, ("de",))
    short = build_conversation("Wie bitte?", "Ja.")
    assert english(short) == NotedRecord(short, ("undecided",))
    unsure = build_conversation("Yo Yo Yo Yo Yo", "Yo Yo Yo To Yo")  # Spanish, by 0.22
    assert english(unsure) == NotedRecord(unsure, ("undecided",))
    assert isinstance(create_step({"language": {"keep": ["en"], "confidence": 0.1}})(unsure), Drop)
    digits = build_conversation("1 2 3 4 5 6 7 8 9 10", "11 12 13 14 15 16")
    assert english(digits) == NotedRecord(digits, ("undecided",))


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("Chinese", "zh"),
        ("Japanese", "ja"),
        ("Korean", "ko"),
        ("Arabic", "ar"),
        ("Persian", "fa"),
        ("Hindi", "hi"),
        ("Tamil", "ta"),
        ("Thai", "th"),
        ("Russian", "ru"),
        ("Greek", "el"),
        ("Vietnamese", "vi"),
        ("French", "fr"),
        ("Khmer", "km"),
    ],
)
def test_languages_of_the_world(script: str, code: str):
    text = WRITTEN[script] * 3
    outcome = create_step({"language": {"keep": [code]}})(text)
    assert isinstance(outcome, NotedRecord)
    assert outcome.record is text
    assert outcome.notes == (code,)
    assert isinstance(create_step({"language": {"keep": ["en"]}})(text), Drop) or code not in COMMON.split()


def test_the_codes_that_can_be_kept_are_those_of_the_library():
    library_codes = set(load_identifier(("en",))._full_model[2])
    assert set(f"{COMMON} {RARE} {NONE}".split()) <= library_codes


def test_no_conversation_of_the_corpus_is_taken_for_another_language():
    english = create_step({"language": {"keep": ["en"]}})
    corpus = load_records()
    sampled_ids = random.Random(0).sample(sorted(corpus), 700)
    rows = [to_conversation(lines, id) for id in sampled_ids if (lines := join_turns(corpus[id]))]
    assert not [row for row in rows if isinstance(english(row), Drop)]


# Repetition.

PROSE = (
    "The lamp on the table was bought by my grandmother in a small shop near the harbour many years ago and it has"
    " stood in every kitchen since then although nobody remembers who repaired its cable after the flood or why one"
    " screw is made of brass while all others are steel which puzzles each electrician that comes by"
)


def test_repetition_of_words():
    repeated_words = " ".join(PROSE.split()[:30])
    assert create_step("repetition")(build_conversation("Hi", PROSE)) == build_conversation("Hi", PROSE)
    assert (
        get_drop_reason(create_step("repetition")(build_conversation("Hi", f"{PROSE} {repeated_words}")))
        == "repetition: words"
    )
    assert create_step("repetition")(build_conversation(f"{PROSE} {repeated_words}", PROSE)) == build_conversation(
        f"{PROSE} {repeated_words}", PROSE
    )  # a question may repeat itself
    assert get_drop_reason(create_step("repetition")(f"{PROSE} {repeated_words}")) == "repetition: words"
    assert create_step({"repetition": {"grams": None}})(f"{PROSE} {repeated_words}") == f"{PROSE} {repeated_words}"
    chinese = "这台灯是我奶奶多年前在港口附近的一家小店里买的"
    assert get_drop_reason(create_step("repetition")(chinese * 6)) == "repetition: words"


def test_the_quick_look_never_hides_a_share_above_the_bound():
    draw = random.Random(0)
    for _ in range(300):
        letters = draw.choices("abcdefghijkl"[: draw.randrange(1, 12)], k=draw.randrange(50, 90))
        for _ in range(draw.randrange(3)):  # repeated passages
            at = draw.randrange(len(letters))
            letters += letters[at : at + draw.randrange(20)]
        grams = list(iter_ngrams(letters, N))
        share = 1 - len(set(grams)) / len(grams)
        for bound in (0.0, 0.05, 0.15, 0.5, share - 1e-9):
            quick = compute_repeated_ngram_share(" ".join(letters), bound, 50)
            assert quick == pytest.approx(share) or (quick == 0 and share <= bound)


def test_repetition_of_lines_and_characters():
    lines = [f"line {i} says something of its own, as lines do" for i in range(8)]
    assert compute_repeated_line_share("\n".join(lines)) == 0
    assert compute_repeated_line_share("ab\n\nab\ncdef\n") == pytest.approx(2 / 8)
    assert (
        get_drop_reason(create_step({"repetition": {"grams": None}})("\n".join([*lines, *lines[:4]])))
        == "repetition: lines"
    )
    for run in (64, 65, 200):
        for before in range(17):
            assert (
                get_drop_reason(create_step("repetition")("y" * before + "é" * run + "z")) == "repetition: characters"
            )
    assert create_step("repetition")("a" * 63) == "a" * 63
    assert create_step("repetition")("-" * 200 + "\n" + "=" * 80) == "-" * 200 + "\n" + "=" * 80
    assert split_lowercase_words("Ein Wort") == ["ein", "wort"]


def test_a_rejected_answer_may_repeat_itself_and_refuse():
    for bad in ("a" * 100, "As an AI language model, I have no lamp."):
        bad_rejected = build_preference("Hi", "Hello!", bad)
        assert create_step("repetition")(bad_rejected) is bad_rejected
        assert create_step("boilerplate")(bad_rejected) is bad_rejected
        assert create_step("boilerplate")(build_feedback("Hi", bad, False)) == build_feedback("Hi", bad, False)
        untrained = Conversation((Message("user", "Hi"), Message("assistant", bad, trained=False)))
        assert create_step("repetition")(untrained) is untrained
        assert create_step("boilerplate")(untrained) is untrained
        bad_chosen = build_preference("Hi", bad, "Hello!")
        liked_feedback = build_feedback("Hi", bad, True)
        for record in (bad_chosen, liked_feedback):
            assert any(isinstance(create_step(name)(record), Drop) for name in ("repetition", "boilerplate"))


# Boilerplate.


@pytest.mark.parametrize(
    ("answer", "group"),
    [
        ("I'm sorry, but I can't help with that.", "refusal"),
        ("I’m sorry, but I can’t\nassist with that request.", "refusal"),
        ("As an AI language model, I do not have feelings.", "self-reference"),
        ("Sure! As an  AI,\n I have no lamp.", "self-reference"),
        ("We use cookies to improve your experience.", "web page"),
        ("The lamp<br>is blue.", "markup"),
        ("Tom &amp; Jerry", "markup"),
    ],
)
def test_boilerplate(answer: str, group: str):
    assert get_drop_reason(create_step("boilerplate")(build_conversation("Hi", answer))) == f"boilerplate: {group}"
    assert create_step("boilerplate")(build_conversation(answer, "Hello!")) == build_conversation(
        answer, "Hello!"
    )  # the user may say so


@pytest.mark.parametrize(
    "answer",
    [
        "Use `<br>` for a new line, and `&amp;` for an ampersand:\n```html\n<p>Hi</p>\n```",
        "Serve it as an aid, if you can.",
        "The lamp is blue. " * 20 + "She said: I'm sorry, but I can't come.",  # a refusal stands at the beginning
        "I can't wait to see it!",
    ],
)
def test_what_is_no_boilerplate(answer: str):
    record = build_conversation("Hi", answer)
    assert create_step("boilerplate")(record) is record


def test_phrases_of_ones_own(tmp_path: Path):
    phrase_path = tmp_path / "mine.txt"
    phrase_path.write_text("# Ours.\n[greeting, beginning]\nDear  Customer\n[brand]\nacme™\n", encoding="utf-8")
    boilerplate = create_step({"boilerplate": {"patterns": str(phrase_path)}})
    assert get_drop_reason(boilerplate(build_conversation("Hi", "dear customer, hello"))) == "boilerplate: greeting"
    assert get_drop_reason(boilerplate(build_conversation("Hi", "That is ACME™."))) == "boilerplate: brand"
    for answer in ("That is acmeware.", "superacme™", "Oh, dear customers"):
        assert boilerplate(build_conversation("Hi", answer)) == build_conversation(
            "Hi", answer
        )  # the phrase is only part of a word
    assert boilerplate(build_conversation("Hi", "As an AI language model, no.")) == build_conversation(
        "Hi", "As an AI language model, no."
    )
    phrase_path.write_text("dear customer\n[a]\n", encoding="utf-8")
    with pytest.raises(
        InputError, match=r"stage\.clean\[0\]\.boilerplate\.patterns, mine.txt, row 1=dear customer: is in no"
    ):
        create_step({"boilerplate": {"patterns": str(phrase_path)}})
    phrase_path.write_text("[a]\n# nothing\n", encoding="utf-8")
    with pytest.raises(InputError, match="has no phrases"):
        create_step({"boilerplate": {"patterns": str(phrase_path)}})
    with pytest.raises(InputError, match="there is no such file"):
        create_step({"boilerplate": {"patterns": str(tmp_path / "none.txt")}})


def test_our_phrases_are_written_as_they_are_looked_for():
    groups = read_phrases(DEFAULT_PHRASES)
    assert [group.name for group in groups] == ["refusal", "self-reference", "web page", "markup"]
    assert [group.beginning for group in groups] == [True, False, False, False]
    assert all(phrase == phrase.lower().strip() and phrase.isascii() for group in groups for phrase in group.phrases)
