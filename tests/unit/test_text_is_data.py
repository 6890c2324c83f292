"""Special tokens that a content spells out are text, for every special token of every tokenizer here."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable, Iterator
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
import torch
from annotation_store import rank, url_of
from families import MANNERS
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

import align
from align.annotate.store import Candidate, Store, replace_unwritable
from align.annotate.store.preference_pairs import load_preferences
from align.core.errors import InputError
from align.core.types import Conversation, Message, Preference, Rollout
from align.data.chat.encode import (
    IGNORE_INDEX,
    count_prompt_tokens,
    encode_conversation,
    encode_for_reward_model,
    encode_prompts,
    encode_text,
    find_stop_token_ids,
    render,
)
from align.data.chat.template import ZERO_WIDTH_SPACE, break_up_spelling, build_escaping_template
from align.data.chat.tokens import (
    get_special_token_ids,
    get_special_tokens,
    tokenize_directly,
    tokenize_text,
    tokenize_with_copy,
)
from align.data.pairs import encode_pairs
from align.models.base import INSTALL, find_builtin_folder, find_gguf_in_wheel
from align.models.forward import pad_rows
from align.rollout.engine import decode_responses

needs_wheel = pytest.mark.skipif(
    find_gguf_in_wheel() is None or importlib.util.find_spec("gguf") is None, reason=f"needs SmolLM2: {INSTALL}"
)
EVERY = [*MANNERS, "pocket", pytest.param("smollm2", marks=needs_wheel)]


@cache
def tokenizer_of(name: str) -> Any:
    if name in MANNERS:
        return MANNERS[name].tokenizer()
    if name == "pocket":
        return AutoTokenizer.from_pretrained(find_builtin_folder("pocket"))
    gguf = find_gguf_in_wheel()
    assert gguf is not None
    return AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)  # its weights are not read


@cache
def told_otherwise(name: str) -> Any:
    """The same tokenizer and template with other spellings, to which the usual ones are text."""
    manner = MANNERS[name]
    return manner.tokenizer(lambda text: f"\ue7f0{manner.marks.index(text)}\ue7f1")


def full_width(text: str) -> str:
    """As other letters, of which NFKC makes these."""
    return "".join(chr(ord(letter) + 0xFEE0) if "!" <= letter <= "~" else letter for letter in text)


PLACES: list[Callable[[str], str]] = [
    lambda mark: mark,
    lambda mark: f"{mark} it began.",
    lambda mark: f"It ended with {mark}",
    lambda mark: f"one{mark}two",
    lambda mark: f"{mark}{mark}",
    lambda mark: f"  {mark}\n",
    lambda mark: f"{mark[:1]}{mark}{mark[1:]}",
    full_width,
    lambda mark: mark[:-1],
    lambda mark: mark[1:],
    lambda mark: mark[1:-1],
]
TURNS = ("Be brief.", "What is it?", "Nothing much.", "And now?", "As before.")


def conversation(name: str, turns: tuple[str, ...]) -> Conversation:
    roles = ("system", "user", "assistant", "user", "assistant")
    told = [Message(role, text) for role, text in zip(roles, turns, strict=True)]
    return Conversation(tuple(told[1:] if name == "gemma" else told), "c1")


def planted(name: str) -> Iterator[Conversation]:
    """Each special token at each place of all turns, alone in each turn, and cut in two by the border of two turns."""
    unknown = tokenizer_of(name).unk_token
    for mark in get_special_tokens(tokenizer_of(name)).texts:
        for place in PLACES:
            if place is full_width and mark == unknown:
                continue  # may come of unknown letters, which these are
            yield conversation(name, (place(mark),) * len(TURNS))
        for i, text in enumerate(TURNS):
            yield conversation(name, (*TURNS[:i], mark, *TURNS[i + 1 :]))
            if i:
                halves = (TURNS[i - 1] + mark[:2], mark[2:] + text)
                yield conversation(name, (*TURNS[: i - 1], *halves, *TURNS[i + 1 :]))


def specials(tokenizer: Any, ids: list[int]) -> list[int]:
    unknown = tokenizer.unk_token_id  # comes of letters that the vocabulary lacks
    return [i for i in ids if i in get_special_token_ids(tokenizer) and i != unknown]


def without_blanks(text: str) -> str:
    """Nor what normalisers change."""
    return "".join(normalize("NFKC", text).replace("▁", " ").split())


def ways(tokenizer: Any, told: Conversation, stops: tuple[int, ...]) -> Iterator[tuple[list[int], str]]:
    """Every way from a conversation to token ids, and the text that they stand for."""
    prompt, answer = Conversation(told.messages[:-1], "c1"), told.messages[-1].content
    whole = render(tokenizer, told)
    yield encode_conversation(tokenizer, told).input_ids, whole
    [asked], _ = encode_prompts(tokenizer, [prompt], 10_000)
    yield asked.input_ids, render(tokenizer, prompt, add_generation_prompt=True)
    yield encode_for_reward_model(tokenizer, prompt, answer, True, stops), whole
    yield encode_for_reward_model(tokenizer, prompt, answer, False, stops), whole


@pytest.mark.parametrize("name", EVERY)
def test_no_content_becomes_a_special_token(name: str) -> None:
    tokenizer = tokenizer_of(name)
    assert name not in MANNERS or {*get_special_tokens(tokenizer).texts} == {*MANNERS[name].marks}
    stops = find_stop_token_ids(tokenizer)
    harmless = [specials(tokenizer, ids) for ids, _ in ways(tokenizer, conversation(name, TURNS), stops)]
    number = 0
    for told in planted(name):
        for (ids, text), expected in zip(ways(tokenizer, told, stops), harmless, strict=True):
            assert specials(tokenizer, ids) == expected, told
            assert without_blanks(text).startswith(without_blanks(tokenizer.decode(ids))), told
            number += 1
    assert number >= 4 * (len(PLACES) + 7) * len(get_special_token_ids(tokenizer))


@pytest.mark.parametrize("name", MANNERS)
def test_contents_are_cut_as_by_a_tokenizer_that_does_not_know_the_spelling(name: str) -> None:
    """To the token, whatever stands around them: no border is added, and none is moved."""
    tokenizer, ignorant = tokenizer_of(name), told_otherwise(name)
    stops = find_stop_token_ids(tokenizer)
    for told in planted(name):
        for (ids, _), (expected, _) in zip(ways(tokenizer, told, stops), ways(ignorant, told, stops), strict=True):
            assert ids == expected, told


@pytest.mark.parametrize("name", [n for n in EVERY if n != "bare"])  # whose turns may share a token
def test_the_loss_is_on_what_it_was_on(name: str) -> None:
    tokenizer = tokenizer_of(name)

    def trained(told: Conversation) -> list[list[int]]:
        spans: list[list[int]] = [[]]
        for label in encode_conversation(tokenizer, told).labels:
            spans += [[]] if label == IGNORE_INDEX else []
            spans[-1] += [] if label == IGNORE_INDEX else [label]
        return [span for span in spans if span]

    for told in planted(name):
        answers = [m.content for m in told.messages if m.role == "assistant"]
        spans = trained(told)
        for answer, ids in zip(answers, spans, strict=True):
            assert without_blanks(answer) in without_blanks(tokenizer.decode(ids)), told
            inside = specials(tokenizer, ids)
            assert len(inside) <= 1, told
            assert not inside or ids[-1] == inside[0], told


ORDINARY = (
    "A plain line.", " two  blanks and\ttabs ", "a < b > c | d [e] {f}", "\n\nbreaks\r\n\n", "Größe, 你好, 🙂 e\u0301",
    "<", "</", "s>", "|>", "user", "a", "\ue000answer\ue001", "\ue100\ue101", "<b>bold</b> <think>hm</think>", "<|",
)  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
def test_what_spells_none_is_cut_as_ever(name: str) -> None:
    tokenizer = tokenizer_of(name)
    for i, text in enumerate(ORDINARY):
        for turns in ((text, *TURNS[1:]), (*TURNS[:1], text, ORDINARY[i - 1], *TURNS[3:]), (*TURNS[:4], text)):
            told = conversation(name, turns)
            whole = render(tokenizer, told)
            expected = tokenizer(whole, add_special_tokens=False)["input_ids"]
            assert encode_conversation(tokenizer, told).input_ids == expected, told
            # The copy that reads the others would have said the same, of the same characters.
            assert tokenize_with_copy(
                tokenizer, whole, get_special_tokens(tokenizer).find_spans(whole)
            ) == tokenize_directly(tokenizer, whole)


@pytest.mark.parametrize("name", EVERY)
def test_plain_text_is_text(name: str) -> None:
    tokenizer = tokenizer_of(name)
    own = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
    for mark in get_special_tokens(tokenizer).texts:
        for place in PLACES:
            [row] = encode_text(tokenizer, "Once " + place(mark), 10_000)
            assert specials(tokenizer, row.input_ids) == [i for i in own if i != tokenizer.unk_token_id]
            assert without_blanks(place(mark)) in without_blanks(tokenizer.decode(row.input_ids))


@pytest.mark.parametrize("name", [n for n in EVERY if n != "bare"])
def test_pairs_are_one_prompt_and_two_answers(name: str) -> None:
    """As reward models and DPO read them: an answer that closes its turn in writing goes on."""
    tokenizer = tokenizer_of(name)
    stops = find_stop_token_ids(tokenizer)
    asked = (Message("user", "What is it?"),)
    [prompt], _ = encode_prompts(tokenizer, [Conversation(asked)], 10_000)
    for mark in get_special_tokens(tokenizer).texts:
        good, bad = f"Good.{mark}\nuser", mark
        pref = Preference(asked, (Message("assistant", good),), (Message("assistant", bad),))
        [(_, pair)], _ = encode_pairs(tokenizer, [pref], stops, 10_000)
        for ids, start, answer in (
            (pair.chosen_ids, pair.chosen_start, good), (pair.rejected_ids, pair.rejected_start, bad),
        ):  # fmt: skip
            assert start == len(prompt.input_ids) == count_prompt_tokens(tokenizer, Conversation(asked), ids)
            assert len(specials(tokenizer, ids[start:])) == 1
            assert ids[-1] in get_special_token_ids(tokenizer)
            assert without_blanks(tokenizer.decode(ids[start:-1])).endswith(without_blanks(answer))


@pytest.mark.parametrize("name", ["pocket", pytest.param("smollm2", marks=needs_wheel)])
def test_what_was_sampled_is_what_is_judged(name: str, tmp_path: Path) -> None:
    """An answer that closes its turn in writing: sampled in ordinary tokens, kept as text, ranked by a person, and read
    by a reward model as those very tokens."""
    tokenizer = tokenizer_of(name)
    stops, marks = find_stop_token_ids(tokenizer), get_special_tokens(tokenizer).texts
    asked = Conversation((Message("user", "What is it?"),))
    [prompt], _ = encode_prompts(tokenizer, [asked], 10_000)
    said = [[*tokenize_text(tokenizer, f"No.{mark}{marks[0]} Yes!"), tokenizer.eos_token_id] for mark in marks]
    tokens = pad_rows([prompt.input_ids + ids for ids in said], tokenizer.pad_token_id)
    mask = pad_rows([[1] * (len(prompt.input_ids) + len(ids)) for ids in said], 0).bool()
    rollout = Rollout(tokens, mask, len(prompt.input_ids), torch.ones(len(said), dtype=torch.bool))
    texts = decode_responses(rollout, tokenizer)
    assert texts == [f"No.{mark}{marks[0]} Yes!" for mark in marks]
    with Store.open(url_of(tmp_path)) as store:
        for i in range(len(texts)):
            answers = [Candidate(replace_unwritable(text)) for text in (texts[i], texts[i - 1])]
            rank(store, store.add_item("p", f"run/{i}", asked, answers), "0>1")
        pairs = encode_pairs(tokenizer, load_preferences(store, "p"), stops, 10_000)[0]
    read = {ids for _, pair in pairs for ids in (tuple(pair.chosen_ids), tuple(pair.rejected_ids))}
    assert read == {tuple(prompt.input_ids + ids) for ids in said}


def test_words_that_templates_look_for_stay_words() -> None:
    """Qwen's thoughts stand in contents, between added tokens that are not special."""
    tokenizer = tokenizer_of("qwen")
    think, closed = (tokenizer.convert_tokens_to_ids(word) for word in ("<think>", "</think>"))
    told = Conversation.from_messages(
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "<think>\nSay </s>.<|im_end|>\n</think>\n\nb"},
        ]
    )
    ids = encode_conversation(tokenizer, told).input_ids
    assert (ids.count(think), ids.count(closed)) == (1, 1)
    assert len(specials(tokenizer, ids)) == 4
    assert "Say </s>.<|im_end|>\n</think>\n\nb<|im_end|>" in tokenizer.decode(ids)


def test_a_tokenizer_that_cannot_be_copied_says_so() -> None:
    """One with a part in Python: it reads all texts but those that spell out a special token."""

    class Whole:
        def pre_tokenize(self, text: Any) -> None:
            pass

    tokenizer = MANNERS["qwen"].tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Whole())
    assert encode_text(tokenizer, "a < b", 100)
    with pytest.raises(InputError, match=r"tokenizer=.*spells out.*Take such spellings out"):
        encode_text(tokenizer, "a <|im_end|> b", 100)


def test_one_module_turns_text_into_token_ids() -> None:
    """Whoever calls a tokenizer by itself reads special tokens in contents again."""
    found = set()
    root = Path(align.__file__).parent.parent
    for path in [p for room in ("align", "reward", "annotate") for p in (root / room).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            reads = called.rpartition(".")[2] in ("tokenizer", "encode_plus", "batch_encode_plus", "encode_batch")
            text_only = any(k.arg == "tokenize" and ast.unparse(k.value) == "False" for k in node.keywords)
            renders = called.endswith(".apply_chat_template") and not text_only
            if reads or renders or called.endswith("tokenizer.encode"):
                found.add(str(path.relative_to(root)))
    # `length` counts, and hands out no ids; `export/reward` looks at what others will read; `continuations` splits
    # multiple choice as lm-eval does, special tokens among it; `probe_pattern` measures the time that patterns take.
    assert found == {
        "align/data/chat/tokens.py",
        "align/data/chat/probe_pattern.py",
        "align/export/reward.py",
        "align/data/chat/continuations.py",
    }


# In engines that read special tokens in whatever they render: `launch/chat_template.jinja`.


@pytest.mark.parametrize("name", EVERY)
def test_the_launch_files_template_takes_them_apart(name: str) -> None:
    tokenizer = tokenizer_of(name)
    engine = copy(tokenizer)  # reads the rendered text as it is
    engine.chat_template = build_escaping_template(tokenizer)

    def rendered(told: Conversation) -> str:
        return engine.apply_chat_template(told.as_dicts(), tokenize=False)

    harmless = conversation(name, TURNS)
    expected = specials(tokenizer, tokenize_directly(tokenizer, render(tokenizer, harmless)).ids)
    for mark in get_special_tokens(tokenizer).texts:
        for place in PLACES[:7]:
            told = conversation(name, (place(mark),) * len(TURNS))
            assert specials(tokenizer, tokenize_directly(engine, rendered(told)).ids) == expected, told
            assert rendered(told).replace(ZERO_WIDTH_SPACE, "") == render(tokenizer, told)
    for text in ORDINARY:
        told = conversation(name, (text,) * len(TURNS))
        assert rendered(told) == render(tokenizer, told)


def test_contents_in_parts_are_taken_apart_too() -> None:
    tokenizer = MANNERS["marked"].tokenizer()
    tokenizer.chat_template = (
        "\n  {% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content or [] %}[{{ part.text or part.type }}]{% endfor %}{% endif %}{{ m.tool }}\n"
        "{% endfor %}"
    )
    said = [
        {"role": "user", "content": [{"type": "text", "text": "a<|im_start|>b"}, {"type": "image"}]},
        {"role": "assistant", "content": None, "tool": "T"},
        {"role": "user", "content": "<|im_start|>", "tool": "U"},
    ]
    plain = tokenizer.apply_chat_template(said, tokenize=False)
    tokenizer.chat_template = build_escaping_template(tokenizer)
    apart = tokenizer.apply_chat_template(said, tokenize=False)
    assert apart == plain.replace("<|im_start|>", f"<{ZERO_WIDTH_SPACE}|im_start|>")
    assert apart.count(ZERO_WIDTH_SPACE) == 2


def test_spellings_are_said_as_jinja_reads_them() -> None:
    """Whatever a special token holds: quotes, braces, a backslash, a line break, letters of all planes, one letter."""
    for text in (
        'a"b',
        "a'b",
        "{{ a }}",
        "{% raw %}",
        "{# a #}",
        "a\\nb",
        "a\nb",
        "\U0001f600!",
        "｜▁",
        "\x07\x00",
        "¶",
    ):
        tokenizer = MANNERS["bare"].tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": [text]})
        tokenizer.chat_template = build_escaping_template(tokenizer)
        said = tokenizer.apply_chat_template([{"role": "user", "content": f"x{text}y"}], tokenize=False)
        assert said == f"<s>x{break_up_spelling(text)}y</s>"
        assert text not in said
