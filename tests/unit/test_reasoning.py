"""Reasoning in front of an answer: read from rows, masked or hidden in training, hidden from judges."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_templates import FAMILIES, MARKED, QWEN3, make_tokenizer
from json_lines import write_rows
from test_chat import family, talk
from test_rows import exchange
from test_sources import jsonl

from align.core.errors import InputError
from align.core.types import Conversation, Message, Preference
from align.data.chat.encode import (
    IGNORE_INDEX,
    Prompt,
    encode_conversation,
    encode_documents,
    encode_for_reward_model,
    encode_prompt,
    find_stop_token_ids,
)
from align.data.chat.reasoning import prepend_reasoning, split_reasoning, strip_reasoning
from align.data.read.records import read_documents
from align.data.sources import DataSource, prepare_record, read_documents_of_split, read_source_prompts
from align.models.forward import rollout_from_answers
from align.rollout.engine import decode_responses
from align.rollout.strip_reasoning import read_answers_without_reasoning

THOUGHT = "<think>\nHm, <b>.\n</think>\n\n"


@pytest.mark.parametrize(
    ("text", "alone"),
    [
        ("Yes.", "Yes."),
        ("", ""),
        (THOUGHT + "Yes.", "Yes."),
        ("Hm.\n</think>\n\nYes.", "Hm.\n</think>\n\nYes."),
        ("It closes with </think> and answers.", "It closes with </think> and answers."),
        ("\n<think>\n\n</think>\n\nYes.", "Yes."),
        ("<think>\nHm, and", ""),
        (THOUGHT, ""),
        (THOUGHT + "Say </think> twice.", "Say </think> twice."),
        ("A <think> tag.", "A <think> tag."),
    ],
)
def test_the_answer_alone(text: str, alone: str) -> None:
    assert strip_reasoning(text) == alone


def test_reasoning_and_answer_are_parted() -> None:
    assert split_reasoning(THOUGHT + "Yes.") == (THOUGHT.replace("<think>", "").replace("</think>", "").strip(), "Yes.")
    assert split_reasoning("<think>\nHm, and") == ("Hm, and", "")
    assert split_reasoning("Hm.</think>Yes.", begins_in_reasoning=True) == ("Hm.", "Yes.")
    assert split_reasoning("Yes.") == ("", "Yes.")


def test_a_cut_answer_behind_an_opened_block_is_reasoning() -> None:
    assert strip_reasoning("Hm, and", begins_in_reasoning=True) == ""
    assert strip_reasoning("Hm.</think>Yes.", begins_in_reasoning=True) == "Yes."
    assert strip_reasoning("<think>Hm.</think>Yes.", begins_in_reasoning=True) == "Yes."


def test_what_a_user_says_of_it_is_no_reasoning(tmp_path: Path) -> None:
    questions = ["<think> opens, </think> closes.", "Explain <think>…</think>", "<think> and nothing more"]
    rows = [{"messages": exchange(text, "Tags.")} for text in questions]
    documents = read_documents(write_rows(tmp_path / "d.jsonl", rows))
    assert [d.messages[0].content for d in documents] == questions  # type: ignore[union-attr]


def test_masked_behind_a_header_that_opens_the_block() -> None:
    opens = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<say><think>' + m.content + '<|im_end|>' }}"
        "{% else %}{{ '<ask>' + m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<say><think>' }}"
        "{% endif %}"
    )
    tokenizer = make_tokenizer(opens, "<|im_end|>")
    labels = encode_conversation(tokenizer, talk("q", "Hm.</think>Yes."), True).labels
    labels_of_marked_row = encode_conversation(tokenizer, talk("q", "<think>x</think>Yes."), True).labels
    assert tokenizer.decode([label for label in labels_of_marked_row if label != IGNORE_INDEX]) == "Yes.<|im_end|>"
    assert "Hm" in tokenizer.decode([label for label in labels if label != IGNORE_INDEX])  # a row marks where it begins


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_a_field_of_reasoning_stands_in_front_of_its_answer(tmp_path: Path, field: str) -> None:
    user, answer = exchange("q", "a")
    (conversation,) = read_documents(
        write_rows(tmp_path / "d.jsonl", [{"messages": [user, {**answer, field: " Hm.\n"}]}])
    )
    assert isinstance(conversation, Conversation)
    assert conversation.messages[-1].content == prepend_reasoning("a", "Hm.") == "<think>\nHm.\n</think>\n\na"


@pytest.mark.parametrize(
    ("place", "said", "field"),
    [
        (0, {"reasoning": "Hm."}, r"messages\[0\]\.reasoning"),
        (1, {"reasoning": ["Hm."]}, r"messages\[1\]\.reasoning"),
        (1, {"reasoning": "a", "thinking": "b"}, r"messages\[1\]\.reasoning"),
        (1, {"reasoning": "a", "content": THOUGHT + "a"}, r"messages\[1\]\.reasoning"),
        (1, {"reasoning": "a", "content": ""}, r"messages\[1\]\.content"),
        (1, {"content": THOUGHT}, r"messages\[1\]\.content"),
    ],
)
def test_reasoning_that_cannot_be_kept_is_refused(tmp_path: Path, place: int, said: dict[str, Any], field: str) -> None:
    messages = exchange("q", "a")
    messages[place] |= said
    with pytest.raises(InputError, match=f"row 1, {field}="):
        read_documents(write_rows(tmp_path / "d.jsonl", [{"messages": messages}]))


def test_hidden_it_is_in_no_turn_and_moves_no_row(tmp_path: Path) -> None:
    rows = [{"messages": exchange(f"q{i}", THOUGHT + "a", "more", THOUGHT + "b")} for i in range(20)]
    source, hiding_source = (
        jsonl(write_rows(tmp_path / "d.jsonl", rows), hide_reasoning=hide) for hide in (False, True)
    )
    for split in ("train", "test"):
        documents = read_documents_of_split(source, split)
        stripped_documents = read_documents_of_split(hiding_source, split)
        assert [c.id for c in documents] == [c.id for c in stripped_documents]  # type: ignore[union-attr]
        assert all("think" not in m.content for c in stripped_documents for m in c.messages)  # type: ignore[union-attr]
    assert all("think" not in m.content for c in read_source_prompts(hiding_source, "train") for m in c.messages)


def test_pairs_are_judged_by_their_answers_alone_where_it_is_hidden() -> None:
    source = DataSource("jsonl", hide_reasoning=True)
    pair = Preference((Message("user", "q"),), (Message("assistant", THOUGHT + "a"),), (Message("assistant", "b"),))
    assert [m.content for m in (*prepare_record(pair, source).chosen, *prepare_record(pair, source).rejected)] == [
        "a",
        "b",
    ]
    same = Preference((Message("user", "q"),), (Message("assistant", THOUGHT + "a"),), (Message("assistant", "a"),))
    with pytest.raises(InputError, match=r"data\.reasoning=hide: the answers of pair .* differ"):
        prepare_record(same, source)


@pytest.mark.parametrize("name", FAMILIES)
def test_masked_it_is_read_and_not_trained(name: str) -> None:
    """Masking keeps the tokens; the loss is on the answer and the token that ends it."""
    template, tokenizer = family(name)
    with_reasoning = talk("q", THOUGHT + "Good day.")
    without_reasoning = talk("q", "Good day.")
    encoded, masked = (encode_conversation(tokenizer, with_reasoning, mask) for mask in (False, True))
    assert encoded.input_ids == masked.input_ids
    trained = tokenizer.decode([label for label in masked.labels if label != IGNORE_INDEX])
    assert trained.strip() == "Good day." + template.end
    assert "Hm" in tokenizer.decode([label for label in encoded.labels if label != IGNORE_INDEX])
    assert encode_conversation(tokenizer, without_reasoning).labels == encode_conversation(
        tokenizer, without_reasoning, True
    ).labels or (
        name == "qwen3"  # whose template writes an empty block in front of every last answer
    )


def test_masked_it_may_stand_beside_markers() -> None:
    tokenizer = make_tokenizer(MARKED)
    encoded = encode_conversation(tokenizer, talk("q", THOUGHT + "a b"), True)
    expected_labels = [
        label for label in encode_conversation(tokenizer, talk("q", "a b")).labels if label != IGNORE_INDEX
    ]
    assert [label for label in encoded.labels if label != IGNORE_INDEX] == expected_labels


def test_rows_that_lose_it_to_the_template_are_counted() -> None:
    dropping_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content.split('</think>')[-1] + '<|im_end|>' }}{% endfor %}"
    )
    tokenizer = make_tokenizer(dropping_template, "<|im_end|>")
    rows = [talk("q", THOUGHT + "a"), talk("q", "a")]
    of_dropping_template = encode_documents(tokenizer, rows, 500)
    of_keeping_template = encode_documents(make_tokenizer(QWEN3, "<|im_end|>"), rows, 500)
    assert (of_dropping_template.unreasoned, of_dropping_template.unreasoned_earlier) == (1, 0)
    assert (of_keeping_template.unreasoned, of_keeping_template.unreasoned_earlier) == (0, 0)


def test_earlier_answers_that_lose_it_are_counted_apart() -> None:
    """Qwen3's template keeps the reasoning of the last answer alone, even if two answers have the same reasoning."""
    tokenizer = make_tokenizer(QWEN3, "<|im_end|>")
    same = talk("q", THOUGHT + "a", "r", THOUGHT + "b")
    different = talk("Hm?", "<think>\nOther.\n</think>\n\na", "r", THOUGHT + "b")
    bare = talk("q", "a", "r", THOUGHT + "b")
    empty = talk("q", "<think>\n\n</think>\n\na", "r", THOUGHT + "b")
    untrained = Conversation((same.messages[0], replace(same.messages[1], trained=False), *same.messages[2:]))
    encoded = [encode_documents(tokenizer, [row], 500) for row in (same, different, bare, empty, untrained)]
    assert [row.unreasoned_earlier for row in encoded] == [1, 1, 0, 0, 0]
    assert [row.unreasoned for row in encoded] == [0] * 5
    alike = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
    assert encode_documents(make_tokenizer(alike, "<|im_end|>"), [same, different], 500).unreasoned_earlier == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_judge_on_the_samplers_base_reads_the_answer_as_pairs_have_it(name: str) -> None:
    """The judged tokens equal the training rows of a reward model, also for cut answers and without reasoning."""
    _, tokenizer = family(name)
    stops = find_stop_token_ids(tokenizer)
    questions = [Conversation((Message("user", f"question {i}?"),), str(i)) for i in range(4)]
    prompts = [Prompt(c, encode_prompt(tokenizer, c)) for c in questions]
    completions = [THOUGHT + "Good day.", "Good day.", THOUGHT + "Good d", "<think>\nHm, and"]
    has_ended = [True, True, False, False]
    ids = [
        tokenizer(text, add_special_tokens=False)["input_ids"] + ([stops[-1]] if end else [])
        for text, end in zip(completions, has_ended, strict=True)
    ]
    rollout = rollout_from_answers([p.input_ids for p in prompts], ids, tokenizer.pad_token_id, torch.device("cpu"))
    rollout = type(rollout)(rollout.tokens_BS, rollout.mask_BS, rollout.prompt_width, torch.tensor(has_ended))
    answers = read_answers_without_reasoning(prompts, decode_responses(rollout, tokenizer), rollout, tokenizer, stops)
    texts = [c.messages[-1].content for c in answers.conversations]
    judged_rollout = answers.rollout
    assert texts == ["Good day.", "Good day.", "Good d", ""]
    assert [bool(thought) for thought in answers.reasoning] == [True, False, True, True]
    assert answers.reasoning[3] == "Hm, and"
    assert judged_rollout.ended_B.tolist() == has_ended
    rows = [t[m].tolist() for t, m in zip(judged_rollout.tokens_BS, judged_rollout.mask_BS, strict=True)]
    assert rows[1] == prompts[1].input_ids + ids[1]  # exactly the sampled tokens
    for i in (0, 2, 3):
        assert rows[i] == encode_for_reward_model(tokenizer, questions[i], texts[i], has_ended[i], stops)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_judge_reads_no_reasoning_of_earlier_turns(name: str) -> None:
    """A reward model trained on answers alone saw no reasoning in earlier turns either."""
    _, tokenizer = family(name)
    stops = find_stop_token_ids(tokenizer)
    turns = Message("user", "one?"), Message("assistant", THOUGHT + "One."), Message("user", "two?")
    conversation = Conversation(turns, "c")
    without_reasoning = Conversation((turns[0], Message("assistant", "One."), turns[2]), "c")
    prompt = Prompt(conversation, encode_prompt(tokenizer, conversation))
    ids = [*tokenizer("Two.", add_special_tokens=False)["input_ids"], stops[-1]]
    rollout = rollout_from_answers([prompt.input_ids], [ids], tokenizer.pad_token_id, torch.device("cpu"))
    answers = read_answers_without_reasoning([prompt], ["Two."], rollout, tokenizer, stops)
    assert answers.conversations == [without_reasoning.with_answer("Two.")]
    (row,) = [t[m].tolist() for t, m in zip(answers.rollout.tokens_BS, answers.rollout.mask_BS, strict=True)]
    assert row == encode_for_reward_model(tokenizer, without_reasoning, "Two.", bool(rollout.ended_B[0]), stops)
    assert "Hm" not in tokenizer.decode(row)
