"""The loss mask and the tokens that end an answer, on the structure of the templates people use."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from chat_templates import FAMILIES, MARKED, MISTRAL, PLAIN, QWEN3, decode_trained_spans, make_tokenizer

from align.config.groups import RolloutConfig
from align.core.errors import InputError
from align.core.types import Conversation
from align.data.chat.encode import (
    compute_max_prompt_tokens,
    count_document_tokens,
    encode_conversation,
    encode_documents,
    encode_for_reward_model,
    encode_prompts,
    encode_text,
    find_stop_token_ids,
    find_turn_end_token,
)
from align.data.chat.template import CHATML, set_chat_template
from align.rollout.registry import build_engine


def talk(*turns: str, system: str | None = None) -> Conversation:
    """Build a conversation of user and assistant turns."""
    system_turns = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return Conversation.from_messages(
        [*system_turns, *({"role": roles[i % 2], "content": t} for i, t in enumerate(turns))], "c1"
    )


def family(name: str) -> tuple[Any, Any]:
    template_family = FAMILIES[name]
    return template_family, make_tokenizer(template_family.template, template_family.eos)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_is_on_each_answer_and_the_token_that_ends_it(name: str) -> None:
    template_family, tokenizer = family(name)
    texts = decode_trained_spans(tokenizer, talk("Hi.", "Good day.", "And?", "Fine.\nThanks", "b", "a b"))
    # Mistral's separating space belongs to the answer's first token, as sampling produces it.
    lead = " " if name == "mistral" else ""
    answers = ["Good day.", "Fine.\nThanks", template_family.header + "a b"]
    assert texts == [lead + answer + template_family.end for answer in answers]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_system_turn_is_read_and_never_trained(name: str) -> None:
    template_family, tokenizer = family(name)
    conversation = talk("Hi.", "Good day.", "And?", "Fine.", system="Be brief.")
    if not template_family.system:
        with pytest.raises(InputError, match=r"c1, roles=system.*system role.*data\.template=chatml"):
            encode_conversation(tokenizer, conversation)
        return
    texts = decode_trained_spans(tokenizer, conversation)
    assert [t.strip() for t in texts] == [
        "Good day." + template_family.end,
        template_family.header + "Fine." + template_family.end,
    ]
    assert "Be brief." in tokenizer.decode(encode_conversation(tokenizer, conversation).input_ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_equal_answers_are_told_apart(name: str) -> None:
    template_family, tokenizer = family(name)
    texts = decode_trained_spans(tokenizer, talk("a", "b", "a", "b", "b", "b"))
    assert [t.strip() for t in texts] == ["b" + template_family.end] * 2 + [
        template_family.header + "b" + template_family.end
    ]


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "mistral"])
def test_a_conversation_may_open_with_the_assistant(name: str) -> None:
    template_family, tokenizer = family(name)
    conversation = Conversation.from_messages(
        [{"role": "assistant", "content": "Hi."}, {"role": "user", "content": "a"}]
    )
    assert decode_trained_spans(tokenizer, conversation) == ["Hi." + template_family.end]


def test_roles_out_of_order_are_refused_by_name() -> None:
    conversation = Conversation.from_messages([{"role": "assistant", "content": "Hi."}], "row 7")
    with pytest.raises(InputError, match=r"row 7, roles=assistant.*alternate"):
        encode_conversation(make_tokenizer(MISTRAL), conversation)


def test_a_template_with_markers_refuses_by_name_too() -> None:
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template = no_system + MARKED.strip()
    with pytest.raises(InputError, match=r"c1, roles=system.*no system.*data\.template=chatml"):
        encode_conversation(make_tokenizer(template), talk("a", "b", system="s"))


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_that_is_not_to_be_imitated_is_read_and_not_trained(name: str) -> None:
    _, tokenizer = family(name)
    conversation = talk("Hi.", "Good day.", "And?", "Fine.", "b", "a b")
    first, second, third = (i for i, m in enumerate(conversation.messages) if m.role == "assistant")
    all_texts = decode_trained_spans(tokenizer, conversation)
    for left_out, expected in (
        ({first}, all_texts[1:]),
        ({second}, [all_texts[0], all_texts[2]]),
        ({third}, all_texts[:2]),
    ):
        messages = tuple(replace(m, trained=i not in left_out) for i, m in enumerate(conversation.messages))
        partly_trained = Conversation(messages, "c1")
        assert decode_trained_spans(tokenizer, partly_trained) == expected
        assert (
            encode_conversation(tokenizer, partly_trained).input_ids
            == encode_conversation(tokenizer, conversation).input_ids
        )
    untrained = Conversation(tuple(replace(m, trained=False) for m in conversation.messages))
    assert encode_documents(tokenizer, [untrained, conversation], max_length=500).unanswered == 1


def test_an_answer_that_is_not_trained_may_stand_beside_markers() -> None:
    tokenizer = make_tokenizer(MARKED)
    conversation = talk("a", "b", "c", "d")
    messages = (conversation.messages[0], replace(conversation.messages[1], trained=False), *conversation.messages[2:])
    assert decode_trained_spans(tokenizer, Conversation(messages)) == decode_trained_spans(tokenizer, conversation)[1:]


def test_thoughts_of_earlier_turns_are_neither_shown_nor_trained() -> None:
    tokenizer = make_tokenizer(QWEN3, "<|im_end|>")
    texts = decode_trained_spans(
        tokenizer, talk("a", "<think>\nx\n</think>\n\nHi.", "b", "<think>\ny\n</think>\n\nBye.")
    )
    assert texts == ["Hi.<|im_end|>", "<think>\ny\n</think>\n\nBye.<|im_end|>"]


@pytest.mark.parametrize(
    "body",
    [
        "{{ m.content | upper if not loop.last else m.content }}",  # an earlier turn is rewritten
        "{{ m.content if loop.last else '' }}",  # or dropped
        "{{ m.content }}{{ m.content }}",  # or repeated
    ],
)
def test_a_template_that_rewrites_turns_is_refused(body: str) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n" + body + "<|im_end|>\n{% endfor %}"
    with pytest.raises(InputError, match=r"c1, messages\[1\]=Good day.*loss mask is not known.*data\.template=chatml"):
        encode_conversation(make_tokenizer(template, "<|im_end|>"), talk("a", "Good day.", "b", "Fine."))


def test_a_template_that_ends_turns_with_plain_text() -> None:
    """A turn ends with a line break alone. Neither the line break nor the next question is trained."""
    assert decode_trained_spans(make_tokenizer(PLAIN), talk("a", "Good day.", "b", "Fine!"))[-1].strip() == "Fine!"


# A base model.


def test_a_base_model_is_told_about_chatml() -> None:
    with pytest.raises(InputError, match=r"data\.template=.*no chat template.*data\.template=chatml"):
        set_chat_template(make_tokenizer(None), None)


def test_chatml_ends_with_a_token_that_the_base_knows() -> None:
    tokenizer = make_tokenizer(None, "<|endoftext|>")
    set_chat_template(tokenizer, "chatml")
    assert tokenizer.chat_template == CHATML
    assert decode_trained_spans(tokenizer, talk("a", "Good day.", "b", "Fine.")) == [
        "Good day.<|endoftext|>",
        "Fine.<|endoftext|>",
    ]
    assert find_stop_token_ids(tokenizer) == (tokenizer.eos_token_id,)


def test_a_template_of_the_model_is_kept() -> None:
    tokenizer = make_tokenizer(MISTRAL)
    set_chat_template(tokenizer, None)
    assert tokenizer.chat_template == MISTRAL.strip()


# Documents.


def test_what_cannot_be_trained_on_is_counted() -> None:
    _, tokenizer = family("qwen2.5")
    short = talk("a", "b")
    long = talk("a", "b" * 300)
    unanswered = Conversation.from_messages([{"role": "user", "content": "a"}])
    encoded = encode_documents(tokenizer, [short, long, unanswered, short, "plain text"], max_length=100)
    assert (len(encoded.rows), encoded.too_long, encoded.unanswered) == (3, 1, 1)
    assert encoded.tokens == sum(len(r.input_ids) for r in encoded.rows)
    assert encoded.rows[0].trained == 2  # the answer's one token, and what ends it


def test_what_is_too_long_is_cut_where_that_is_asked_for() -> None:
    """Tokens and labels stay the same up to the limit. A conversation cut before its answer counts as unanswered."""
    _, tokenizer = family("qwen2.5")
    short = talk("a", "b")
    long = talk("a", "b" * 300)
    late_answer = talk("a" * 300, "b")
    encoded = encode_documents(tokenizer, [short, long, late_answer], max_length=100, truncate=True)
    assert (len(encoded.rows), encoded.cut, encoded.too_long, encoded.unanswered) == (2, 1, 0, 1)
    uncut = encode_conversation(tokenizer, long)
    assert (encoded.rows[1].input_ids, encoded.rows[1].labels) == (uncut.input_ids[:100], uncut.labels[:100])
    assert encode_documents(tokenizer, [short, long, late_answer], max_length=100).too_long == 2


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([Conversation.from_messages([{"role": "user", "content": "a"}])] * 2, "2 have no assistant turn"),
        ([talk("a", "b" * 300)] * 3, "3 conversations are longer"),
    ],
)
def test_nothing_left_to_train_on_is_an_error(rows: list[Conversation], said: str) -> None:
    _, tokenizer = family("llama3")
    with pytest.raises(InputError, match=said) as caught:
        encode_documents(tokenizer, rows, max_length=100)
    assert caught.value.field == "data.max_length"


def test_markers_without_an_answer_are_no_silent_zero() -> None:
    template = MARKED.replace("m.role == 'assistant'", "m.role == 'nobody'", 1)
    with pytest.raises(InputError, match="1 have no assistant turn"):
        encode_documents(make_tokenizer(template), [talk("a", "b")], max_length=100)


def test_plain_text_is_cut_into_pieces_and_closed_once() -> None:
    tokenizer = make_tokenizer(None)
    pieces = encode_text(tokenizer, "0123456789", max_length=5)
    ids = [i for p in pieces for i in p.input_ids]
    assert [len(p.input_ids) for p in pieces] == [5, 5, 2]
    assert all(p.input_ids == p.labels for p in pieces)
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.decode(ids[1:-1]) == "0123456789"
    assert count_document_tokens(tokenizer, "0123456789") == len(ids)
    # A last piece of one token predicts nothing, and is left out.
    assert [len(p.input_ids) for p in encode_text(tokenizer, "012345678", max_length=5)] == [5, 5]


def test_plain_text_needs_what_closes_it() -> None:
    tokenizer = make_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match=r"eos_token=.*this model has none.*tokenizer_config\.json"):
        encode_text(tokenizer, "a", max_length=5)


# Prompts and answers.


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_ends_where_the_answer_is_due(name: str) -> None:
    template_family, tokenizer = family(name)
    conversation = talk("Hi.", "Good day.", "And?")
    (prompt,), dropped = encode_prompts(tokenizer, [conversation], 200)
    full_ids = encode_conversation(tokenizer, conversation.with_answer("Fine.")).input_ids
    assert dropped == 0
    assert full_ids[: len(prompt.input_ids)] == prompt.input_ids
    remaining_text = tokenizer.decode(full_ids[len(prompt.input_ids) :])
    assert remaining_text.lstrip().startswith(template_family.header + "Fine." + template_family.end)


def test_an_answer_that_takes_the_whole_context_is_named() -> None:
    assert compute_max_prompt_tokens(256, 1024, 56) == 200
    assert compute_max_prompt_tokens(256, 100, 56) == 100
    with pytest.raises(InputError, match=r"rollout\.max_new_tokens=256.*context is 256 tokens"):
        compute_max_prompt_tokens(256, 1024, 256)


def test_prompts_too_long_are_dropped_and_counted() -> None:
    _, tokenizer = family("llama3")
    prompts, dropped = encode_prompts(tokenizer, [talk("a"), talk("a" * 90), talk("b")], 60)
    assert [p.conversation.messages[0].content for p in prompts] == ["a", "b"]
    assert dropped == 1
    with pytest.raises(InputError, match=r"every one of the 2 prompts is longer.*rollout\.max_new_tokens"):
        encode_prompts(tokenizer, [talk("a"), talk("b")], 3)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_token_that_ends_a_turn_stops_an_answer(name: str) -> None:
    template_family, tokenizer = family(name)
    expected = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(template_family.end)}
    assert find_stop_token_ids(tokenizer) == tuple(sorted(expected))


def test_the_checkpoint_may_list_more_stops() -> None:
    tokenizer = make_tokenizer(None)
    eos = tokenizer.eos_token_id
    assert find_stop_token_ids(tokenizer, SimpleNamespace(eos_token_id=[40, eos, 41])) == (eos, 40, 41)
    assert find_stop_token_ids(tokenizer, SimpleNamespace(eos_token_id=40)) == (eos, 40)
    assert find_stop_token_ids(tokenizer, SimpleNamespace(eos_token_id=None)) == (eos,)


def test_a_model_that_nothing_stops_is_not_sampled_from() -> None:
    """A model without a stop token would generate up to its limit every time, and never learn to end."""
    tokenizer = make_tokenizer(PLAIN)
    rollout = RolloutConfig()

    def find_stops(eos_token_id: int | None) -> tuple[int, ...]:
        engine: Any = build_engine(rollout, tokenizer, SimpleNamespace(eos_token_id=eos_token_id))
        return engine.stop_ids

    assert find_stops(None) == (tokenizer.eos_token_id,)
    tokenizer.eos_token = None
    assert find_stops(7) == (7,)
    with pytest.raises(InputError, match=r"eos_token=.*no token ends an answer"):
        find_stops(None)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_reward_models_rows_end_with_one_token(name: str) -> None:
    template_family, tokenizer = family(name)
    assert find_turn_end_token(tokenizer) == tokenizer.convert_tokens_to_ids(template_family.end)


def test_a_template_that_ends_turns_with_plain_text_has_no_such_token() -> None:
    assert find_turn_end_token(make_tokenizer(PLAIN)) is None


@pytest.mark.parametrize("answer", ["Good day.", "\n\nb", "b.\n"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_judged_answer_is_the_prompt_the_answer_and_its_end(name: str, answer: str) -> None:
    """PPO's rollouts have the same tokens: the prompt's own come first, though a merge could cross into the answer."""
    template_family, tokenizer = family(name)
    conversation = talk("Hi.", "Good day.", "And?")
    stops = find_stop_token_ids(tokenizer)
    prompt = encode_prompts(tokenizer, [conversation], 200)[0][0].input_ids
    end = tokenizer.convert_tokens_to_ids(template_family.end)

    ended_ids = encode_for_reward_model(tokenizer, conversation, answer, True, stops)
    assert ended_ids[: len(prompt)] == prompt
    assert ended_ids[-1] == end
    assert tokenizer.decode(ended_ids[len(prompt) : -1]).strip() == (template_family.header + answer.lstrip()).strip()

    cut_ids = encode_for_reward_model(tokenizer, conversation, answer, False, stops)
    assert cut_ids == ended_ids[:-1]
    assert not set(cut_ids[len(prompt) :]) & set(stops)
