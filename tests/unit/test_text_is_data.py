"""Special tokens that are spelt out in contents are text, for each special token of each test tokenizer."""

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
from annotation_store import build_store_url, record_ranking
from tokenizer_families import MANNERS
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
from align.data.chat.template import ZERO_WIDTH_SPACE, break_up_special_token, build_escaping_template
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
def load_test_tokenizer(name: str) -> Any:
    if name in MANNERS:
        return MANNERS[name].tokenizer()
    if name == "pocket":
        return AutoTokenizer.from_pretrained(find_builtin_folder("pocket"))
    gguf = find_gguf_in_wheel()
    assert gguf is not None
    return AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)  # its weights are not read


@cache
def make_tokenizer_of_other_spellings(name: str) -> Any:
    """Return the tokenizer with other special tokens, so that it reads the usual ones as text."""
    manner = MANNERS[name]
    return manner.tokenizer(lambda text: f"\ue7f0{manner.marks.index(text)}\ue7f1")


def to_full_width(text: str) -> str:
    """Return full-width letters, which NFKC normalises to the given ones."""
    return "".join(chr(ord(letter) + 0xFEE0) if "!" <= letter <= "~" else letter for letter in text)


PLACES: list[Callable[[str], str]] = [
    lambda mark: mark,
    lambda mark: f"{mark} it began.",
    lambda mark: f"It ended with {mark}",
    lambda mark: f"one{mark}two",
    lambda mark: f"{mark}{mark}",
    lambda mark: f"  {mark}\n",
    lambda mark: f"{mark[:1]}{mark}{mark[1:]}",
    to_full_width,
    lambda mark: mark[:-1],
    lambda mark: mark[1:],
    lambda mark: mark[1:-1],
]
TURNS = ("Be brief.", "What is it?", "Nothing much.", "And now?", "As before.")


def build_conversation(name: str, turns: tuple[str, ...]) -> Conversation:
    roles = ("system", "user", "assistant", "user", "assistant")
    messages = [Message(role, text) for role, text in zip(roles, turns, strict=True)]
    return Conversation(tuple(messages[1:] if name == "gemma" else messages), "c1")


def iter_planted_conversations(name: str) -> Iterator[Conversation]:
    """Yield conversations with each special token at each place of all turns, alone in a turn, or split over two."""
    unknown = load_test_tokenizer(name).unk_token
    for mark in get_special_tokens(load_test_tokenizer(name)).texts:
        for place in PLACES:
            if place is to_full_width and mark == unknown:
                continue  # full-width letters may be unknown to the tokenizer
            yield build_conversation(name, (place(mark),) * len(TURNS))
        for i, text in enumerate(TURNS):
            yield build_conversation(name, (*TURNS[:i], mark, *TURNS[i + 1 :]))
            if i:
                halves = (TURNS[i - 1] + mark[:2], mark[2:] + text)
                yield build_conversation(name, (*TURNS[: i - 1], *halves, *TURNS[i + 1 :]))


def find_special_ids(tokenizer: Any, ids: list[int]) -> list[int]:
    unknown = tokenizer.unk_token_id  # stands for letters that the vocabulary lacks
    return [i for i in ids if i in get_special_token_ids(tokenizer) and i != unknown]


def remove_blanks(text: str) -> str:
    """Return the text after NFKC, without blanks."""
    return "".join(normalize("NFKC", text).replace("▁", " ").split())


def iter_encodings(
    tokenizer: Any, conversation: Conversation, stops: tuple[int, ...]
) -> Iterator[tuple[list[int], str]]:
    """Yield token ids of a conversation and their text, from each function that encodes conversations."""
    prompt = Conversation(conversation.messages[:-1], "c1")
    answer = conversation.messages[-1].content
    text = render(tokenizer, conversation)
    yield encode_conversation(tokenizer, conversation).input_ids, text
    [encoded_prompt], _ = encode_prompts(tokenizer, [prompt], 10_000)
    yield encoded_prompt.input_ids, render(tokenizer, prompt, add_generation_prompt=True)
    yield encode_for_reward_model(tokenizer, prompt, answer, True, stops), text
    yield encode_for_reward_model(tokenizer, prompt, answer, False, stops), text


@pytest.mark.parametrize("name", EVERY)
def test_no_content_becomes_a_special_token(name: str) -> None:
    tokenizer = load_test_tokenizer(name)
    assert name not in MANNERS or {*get_special_tokens(tokenizer).texts} == {*MANNERS[name].marks}
    stops = find_stop_token_ids(tokenizer)
    harmless = [
        find_special_ids(tokenizer, ids) for ids, _ in iter_encodings(tokenizer, build_conversation(name, TURNS), stops)
    ]
    checked_encodings = 0
    for conversation in iter_planted_conversations(name):
        for (ids, text), expected in zip(iter_encodings(tokenizer, conversation, stops), harmless, strict=True):
            assert find_special_ids(tokenizer, ids) == expected, conversation
            assert remove_blanks(text).startswith(remove_blanks(tokenizer.decode(ids))), conversation
            checked_encodings += 1
    assert checked_encodings >= 4 * (len(PLACES) + 7) * len(get_special_token_ids(tokenizer))


@pytest.mark.parametrize("name", MANNERS)
def test_contents_are_cut_as_by_a_tokenizer_that_does_not_know_the_spelling(name: str) -> None:
    """Contents have the same tokens as text of any other tokens around them: no token border is added or moved."""
    tokenizer = load_test_tokenizer(name)
    other_tokenizer = make_tokenizer_of_other_spellings(name)
    stops = find_stop_token_ids(tokenizer)
    for conversation in iter_planted_conversations(name):
        for (ids, _), (expected, _) in zip(
            iter_encodings(tokenizer, conversation, stops),
            iter_encodings(other_tokenizer, conversation, stops),
            strict=True,
        ):
            assert ids == expected, conversation


@pytest.mark.parametrize("name", [n for n in EVERY if n != "bare"])  # turns of `bare` may share a token
def test_the_loss_is_on_what_it_was_on(name: str) -> None:
    tokenizer = load_test_tokenizer(name)

    def find_trained_spans(conversation: Conversation) -> list[list[int]]:
        spans: list[list[int]] = [[]]
        for label in encode_conversation(tokenizer, conversation).labels:
            spans += [[]] if label == IGNORE_INDEX else []
            spans[-1] += [] if label == IGNORE_INDEX else [label]
        return [span for span in spans if span]

    for conversation in iter_planted_conversations(name):
        answers = [m.content for m in conversation.messages if m.role == "assistant"]
        spans = find_trained_spans(conversation)
        for answer, ids in zip(answers, spans, strict=True):
            assert remove_blanks(answer) in remove_blanks(tokenizer.decode(ids)), conversation
            special_ids = find_special_ids(tokenizer, ids)
            assert len(special_ids) <= 1, conversation
            assert not special_ids or ids[-1] == special_ids[0], conversation


ORDINARY = (
    "A plain line.",
    " two  blanks and\ttabs ",
    "a < b > c | d [e] {f}",
    "\n\nbreaks\r\n\n",
    "Größe, 你好, 🙂 e\u0301",
    "<",
    "</",
    "s>",
    "|>",
    "user",
    "a",
    "\ue000answer\ue001",
    "\ue100\ue101",
    "<b>bold</b> <think>hm</think>",
    "<|",
)


@pytest.mark.parametrize("name", EVERY)
def test_what_spells_none_is_cut_as_ever(name: str) -> None:
    tokenizer = load_test_tokenizer(name)
    for i, text in enumerate(ORDINARY):
        for turns in ((text, *TURNS[1:]), (*TURNS[:1], text, ORDINARY[i - 1], *TURNS[3:]), (*TURNS[:4], text)):
            conversation = build_conversation(name, turns)
            text_of_conversation = render(tokenizer, conversation)
            expected = tokenizer(text_of_conversation, add_special_tokens=False)["input_ids"]
            assert encode_conversation(tokenizer, conversation).input_ids == expected, conversation
            # The copy without special tokens cuts the same characters in the same way.
            assert tokenize_with_copy(
                tokenizer, text_of_conversation, get_special_tokens(tokenizer).find_spans(text_of_conversation)
            ) == tokenize_directly(tokenizer, text_of_conversation)


@pytest.mark.parametrize("name", EVERY)
def test_plain_text_is_text(name: str) -> None:
    tokenizer = load_test_tokenizer(name)
    added_ids = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
    for mark in get_special_tokens(tokenizer).texts:
        for place in PLACES:
            [row] = encode_text(tokenizer, "Once " + place(mark), 10_000)
            assert find_special_ids(tokenizer, row.input_ids) == [i for i in added_ids if i != tokenizer.unk_token_id]
            assert remove_blanks(place(mark)) in remove_blanks(tokenizer.decode(row.input_ids))


@pytest.mark.parametrize("name", [n for n in EVERY if n != "bare"])
def test_pairs_are_one_prompt_and_two_answers(name: str) -> None:
    """Reward models and DPO read past an end of turn that an answer spells out."""
    tokenizer = load_test_tokenizer(name)
    stops = find_stop_token_ids(tokenizer)
    question = (Message("user", "What is it?"),)
    [prompt], _ = encode_prompts(tokenizer, [Conversation(question)], 10_000)
    for mark in get_special_tokens(tokenizer).texts:
        good = f"Good.{mark}\nuser"
        bad = mark
        pref = Preference(question, (Message("assistant", good),), (Message("assistant", bad),))
        [(_, pair)], _ = encode_pairs(tokenizer, [pref], stops, 10_000)
        for ids, start, answer in (
            (pair.chosen_ids, pair.chosen_start, good),
            (pair.rejected_ids, pair.rejected_start, bad),
        ):
            assert start == len(prompt.input_ids) == count_prompt_tokens(tokenizer, Conversation(question), ids)
            assert len(find_special_ids(tokenizer, ids[start:])) == 1
            assert ids[-1] in get_special_token_ids(tokenizer)
            assert remove_blanks(tokenizer.decode(ids[start:-1])).endswith(remove_blanks(answer))


@pytest.mark.parametrize("name", ["pocket", pytest.param("smollm2", marks=needs_wheel)])
def test_what_was_sampled_is_what_is_judged(name: str, tmp_path: Path) -> None:
    """An answer that spells out the end of its turn is sampled in ordinary tokens, stored as text, ranked by a person,
    and encoded for the reward model as the sampled tokens."""
    tokenizer = load_test_tokenizer(name)
    stops = find_stop_token_ids(tokenizer)
    marks = get_special_tokens(tokenizer).texts
    conversation = Conversation((Message("user", "What is it?"),))
    [prompt], _ = encode_prompts(tokenizer, [conversation], 10_000)
    sampled_ids = [[*tokenize_text(tokenizer, f"No.{mark}{marks[0]} Yes!"), tokenizer.eos_token_id] for mark in marks]
    tokens = pad_rows([prompt.input_ids + ids for ids in sampled_ids], tokenizer.pad_token_id)
    mask = pad_rows([[1] * (len(prompt.input_ids) + len(ids)) for ids in sampled_ids], 0).bool()
    rollout = Rollout(tokens, mask, len(prompt.input_ids), torch.ones(len(sampled_ids), dtype=torch.bool))
    texts = decode_responses(rollout, tokenizer)
    assert texts == [f"No.{mark}{marks[0]} Yes!" for mark in marks]
    with Store.open(build_store_url(tmp_path)) as store:
        for i in range(len(texts)):
            answers = [Candidate(replace_unwritable(text)) for text in (texts[i], texts[i - 1])]
            record_ranking(store, store.add_item("p", f"run/{i}", conversation, answers), "0>1")
        pairs = encode_pairs(tokenizer, load_preferences(store, "p"), stops, 10_000)[0]
    read = {ids for _, pair in pairs for ids in (tuple(pair.chosen_ids), tuple(pair.rejected_ids))}
    assert read == {tuple(prompt.input_ids + ids) for ids in sampled_ids}


def test_words_that_templates_look_for_stay_words() -> None:
    """Qwen encloses thoughts in added tokens that are not special, and reads these in contents."""
    tokenizer = load_test_tokenizer("qwen")
    think, end_think = (tokenizer.convert_tokens_to_ids(word) for word in ("<think>", "</think>"))
    conversation = Conversation.from_messages(
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "<think>\nSay </s>.<|im_end|>\n</think>\n\nb"},
        ]
    )
    ids = encode_conversation(tokenizer, conversation).input_ids
    assert (ids.count(think), ids.count(end_think)) == (1, 1)
    assert len(find_special_ids(tokenizer, ids)) == 4
    assert "Say </s>.<|im_end|>\n</think>\n\nb<|im_end|>" in tokenizer.decode(ids)


def test_a_tokenizer_that_cannot_be_copied_says_so() -> None:
    """A tokenizer with a part in Python reads all texts except those that spell out a special token."""

    class Whole:
        def pre_tokenize(self, text: Any) -> None:
            pass

    tokenizer = MANNERS["qwen"].tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Whole())
    assert encode_text(tokenizer, "a < b", 100)
    with pytest.raises(InputError, match=r"tokenizer=.*spells out.*Take such spellings out"):
        encode_text(tokenizer, "a <|im_end|> b", 100)


def test_one_module_turns_text_into_token_ids() -> None:
    """A direct call of a tokenizer reads special tokens in contents."""
    modules_that_tokenize = set()
    root = Path(align.__file__).parent.parent
    for path in [p for room in ("align", "reward", "annotate") for p in (root / room).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            function_name = ast.unparse(node.func)
            reads = function_name.rpartition(".")[2] in (
                "tokenizer",
                "encode_plus",
                "batch_encode_plus",
                "encode_batch",
            )
            text_only = any(k.arg == "tokenize" and ast.unparse(k.value) == "False" for k in node.keywords)
            renders = function_name.endswith(".apply_chat_template") and not text_only
            if reads or renders or function_name.endswith("tokenizer.encode"):
                modules_that_tokenize.add(str(path.relative_to(root)))
    # `export/reward` checks how other programs will tokenize; `continuations` splits multiple choice as lm-eval does,
    # special tokens included; `probe_pattern` measures the time that patterns take.
    assert modules_that_tokenize == {
        "align/data/chat/tokens.py",
        "align/data/chat/probe_pattern.py",
        "align/export/reward.py",
        "align/data/chat/continuations.py",
    }


# Engines read special tokens in all that they render, which `launch/chat_template.jinja` prevents.


@pytest.mark.parametrize("name", EVERY)
def test_the_launch_files_template_takes_them_apart(name: str) -> None:
    tokenizer = load_test_tokenizer(name)
    engine = copy(tokenizer)  # reads the rendered text as it is
    engine.chat_template = build_escaping_template(tokenizer)

    def render_by_engine(conversation: Conversation) -> str:
        return engine.apply_chat_template(conversation.as_dicts(), tokenize=False)

    harmless = build_conversation(name, TURNS)
    expected = find_special_ids(tokenizer, tokenize_directly(tokenizer, render(tokenizer, harmless)).ids)
    for mark in get_special_tokens(tokenizer).texts:
        for place in PLACES[:7]:
            conversation = build_conversation(name, (place(mark),) * len(TURNS))
            assert (
                find_special_ids(tokenizer, tokenize_directly(engine, render_by_engine(conversation)).ids) == expected
            ), conversation
            assert render_by_engine(conversation).replace(ZERO_WIDTH_SPACE, "") == render(tokenizer, conversation)
    for text in ORDINARY:
        conversation = build_conversation(name, (text,) * len(TURNS))
        assert render_by_engine(conversation) == render(tokenizer, conversation)


def test_contents_in_parts_are_taken_apart_too() -> None:
    tokenizer = MANNERS["marked"].tokenizer()
    tokenizer.chat_template = (
        "\n  {% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content or [] %}[{{ part.text or part.type }}]{% endfor %}{% endif %}{{ m.tool }}\n"
        "{% endfor %}"
    )
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a<|im_start|>b"}, {"type": "image"}]},
        {"role": "assistant", "content": None, "tool": "T"},
        {"role": "user", "content": "<|im_start|>", "tool": "U"},
    ]
    plain = tokenizer.apply_chat_template(messages, tokenize=False)
    tokenizer.chat_template = build_escaping_template(tokenizer)
    escaped = tokenizer.apply_chat_template(messages, tokenize=False)
    assert escaped == plain.replace("<|im_start|>", f"<{ZERO_WIDTH_SPACE}|im_start|>")
    assert escaped.count(ZERO_WIDTH_SPACE) == 2


def test_spellings_are_said_as_jinja_reads_them() -> None:
    """Special tokens may have quotes, braces, a backslash, a line break, letters of all planes, or one letter."""
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
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": f"x{text}y"}], tokenize=False)
        assert rendered == f"<s>x{break_up_special_token(text)}y</s>"
        assert text not in rendered
