"""The loss mask and the tokens that end an answer, on the structure of the templates people use."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from templates import FAMILIES, MARKED, MISTRAL, PLAIN, QWEN3, make_tokenizer, trained_texts

from align.config.groups import RolloutConfig
from align.core.errors import InputError
from align.core.types import Conversation
from align.data.chat.encode import (
    compute_max_prompt_tokens,
    encode_conversation,
    encode_documents,
    encode_for_reward_model,
    encode_prompts,
    encode_text,
    find_stop_token_ids,
    find_turn_end_token,
)
from align.data.chat.template import CHATML, use_template
from align.rollout.registry import build_engine


def talk(*turns: str, system: str | None = None) -> Conversation:
    """User and assistant in turn."""
    first = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return Conversation.from_messages(
        [*first, *({"role": roles[i % 2], "content": t} for i, t in enumerate(turns))], "c1"
    )


def family(name: str) -> tuple[Any, Any]:
    found = FAMILIES[name]
    return found, make_tokenizer(found.template, found.eos)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_is_on_each_answer_and_the_token_that_ends_it(name: str) -> None:
    found, tokenizer = family(name)
    told = trained_texts(tokenizer, talk("Hi.", "Good day.", "And?", "Fine.\nThanks", "b", "a b"))
    # Mistral's separating space belongs to the answer's first token, as sampling produces it.
    lead = " " if name == "mistral" else ""
    answers = ["Good day.", "Fine.\nThanks", found.header + "a b"]
    assert told == [lead + answer + found.end for answer in answers]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_system_turn_is_read_and_never_trained(name: str) -> None:
    found, tokenizer = family(name)
    conversation = talk("Hi.", "Good day.", "And?", "Fine.", system="Be brief.")
    if not found.system:
        with pytest.raises(InputError, match=r"c1, roles=system.*system role.*data\.template=chatml"):
            encode_conversation(tokenizer, conversation)
        return
    told = trained_texts(tokenizer, conversation)
    assert [t.strip() for t in told] == ["Good day." + found.end, found.header + "Fine." + found.end]
    assert "Be brief." in tokenizer.decode(encode_conversation(tokenizer, conversation).input_ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_equal_answers_are_told_apart(name: str) -> None:
    found, tokenizer = family(name)
    told = trained_texts(tokenizer, talk("a", "b", "a", "b", "b", "b"))
    assert [t.strip() for t in told] == ["b" + found.end] * 2 + [found.header + "b" + found.end]


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "mistral"])
def test_a_conversation_may_open_with_the_assistant(name: str) -> None:
    found, tokenizer = family(name)
    opened = Conversation.from_messages([{"role": "assistant", "content": "Hi."}, {"role": "user", "content": "a"}])
    assert trained_texts(tokenizer, opened) == ["Hi." + found.end]


def test_roles_out_of_order_are_refused_by_name() -> None:
    opened = Conversation.from_messages([{"role": "assistant", "content": "Hi."}], "row 7")
    with pytest.raises(InputError, match=r"row 7, roles=assistant.*alternate"):
        encode_conversation(make_tokenizer(MISTRAL), opened)


def test_a_template_with_markers_refuses_by_name_too() -> None:
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template = no_system + MARKED.strip()
    with pytest.raises(InputError, match=r"c1, roles=system.*no system.*data\.template=chatml"):
        encode_conversation(make_tokenizer(template), talk("a", "b", system="s"))


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_that_is_not_to_be_imitated_is_read_and_not_trained(name: str) -> None:
    _, tokenizer = family(name)
    whole = talk("Hi.", "Good day.", "And?", "Fine.", "b", "a b")
    first, second, third = (i for i, m in enumerate(whole.messages) if m.role == "assistant")
    every = trained_texts(tokenizer, whole)
    for left_out, kept in (({first}, every[1:]), ({second}, [every[0], every[2]]), ({third}, every[:2])):
        messages = tuple(replace(m, trained=i not in left_out) for i, m in enumerate(whole.messages))
        weighed = Conversation(messages, "c1")
        assert trained_texts(tokenizer, weighed) == kept
        assert encode_conversation(tokenizer, weighed).input_ids == encode_conversation(tokenizer, whole).input_ids
    silent = Conversation(tuple(replace(m, trained=False) for m in whole.messages))
    assert encode_documents(tokenizer, [silent, whole], max_length=500).unanswered == 1


def test_an_answer_that_is_not_trained_may_stand_beside_markers() -> None:
    tokenizer = make_tokenizer(MARKED)
    whole = talk("a", "b", "c", "d")
    messages = (whole.messages[0], replace(whole.messages[1], trained=False), *whole.messages[2:])
    assert trained_texts(tokenizer, Conversation(messages)) == trained_texts(tokenizer, whole)[1:]


def test_thoughts_of_earlier_turns_are_neither_shown_nor_trained() -> None:
    tokenizer = make_tokenizer(QWEN3, "<|im_end|>")
    told = trained_texts(tokenizer, talk("a", "<think>\nx\n</think>\n\nHi.", "b", "<think>\ny\n</think>\n\nBye."))
    assert told == ["Hi.<|im_end|>", "<think>\ny\n</think>\n\nBye.<|im_end|>"]


@pytest.mark.parametrize(
    "body",
    [
        "{{ m.content | upper if not loop.last else m.content }}",  # an earlier turn is rewritten
        "{{ m.content if loop.last else '' }}",  # or dropped
        "{{ m.content }}{{ m.content }}",  # or said twice
    ],
)
def test_a_template_that_rewrites_turns_is_refused(body: str) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n" + body + "<|im_end|>\n{% endfor %}"
    with pytest.raises(InputError, match=r"c1, messages\[1\]=Good day.*loss mask is not known.*data\.template=chatml"):
        encode_conversation(make_tokenizer(template, "<|im_end|>"), talk("a", "Good day.", "b", "Fine."))


def test_a_template_that_ends_turns_with_plain_text() -> None:
    """The line break is all there is; it is not trained, and nothing of the next question is."""
    assert trained_texts(make_tokenizer(PLAIN), talk("a", "Good day.", "b", "Fine!"))[-1].strip() == "Fine!"


# A base model.


def test_a_base_model_is_told_about_chatml() -> None:
    with pytest.raises(InputError, match=r"data\.template=.*no chat template.*data\.template=chatml"):
        use_template(make_tokenizer(None), None)


def test_chatml_ends_with_a_token_that_the_base_knows() -> None:
    tokenizer = make_tokenizer(None, "<|endoftext|>")
    use_template(tokenizer, "chatml")
    assert tokenizer.chat_template == CHATML
    assert trained_texts(tokenizer, talk("a", "Good day.", "b", "Fine.")) == [
        "Good day.<|endoftext|>",
        "Fine.<|endoftext|>",
    ]
    assert find_stop_token_ids(tokenizer) == (tokenizer.eos_token_id,)


def test_a_template_of_the_model_is_kept() -> None:
    tokenizer = make_tokenizer(MISTRAL)
    use_template(tokenizer, None)
    assert tokenizer.chat_template == MISTRAL.strip()


# Documents.


def test_what_cannot_be_trained_on_is_counted() -> None:
    _, tokenizer = family("qwen2.5")
    short, long = talk("a", "b"), talk("a", "b" * 300)
    silent = Conversation.from_messages([{"role": "user", "content": "a"}])
    made = encode_documents(tokenizer, [short, long, silent, short, "plain text"], max_length=100)
    assert (len(made.rows), made.too_long, made.unanswered) == (3, 1, 1)
    assert made.tokens == sum(len(r.input_ids) for r in made.rows)
    assert made.rows[0].trained == 2  # the answer's one token, and what ends it


def test_what_is_too_long_is_cut_where_that_is_asked_for() -> None:
    """The same tokens up to the limit, and the same labels; one that is cut before its answer teaches nothing."""
    _, tokenizer = family("qwen2.5")
    short, long, late = talk("a", "b"), talk("a", "b" * 300), talk("a" * 300, "b")
    made = encode_documents(tokenizer, [short, long, late], max_length=100, truncate=True)
    assert (len(made.rows), made.cut, made.too_long, made.unanswered) == (2, 1, 0, 1)
    whole = encode_conversation(tokenizer, long)
    assert (made.rows[1].input_ids, made.rows[1].labels) == (whole.input_ids[:100], whole.labels[:100])
    assert encode_documents(tokenizer, [short, long, late], max_length=100).too_long == 2


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
    found, tokenizer = family(name)
    asked = talk("Hi.", "Good day.", "And?")
    (prompt,), dropped = encode_prompts(tokenizer, [asked], 200)
    whole = encode_conversation(tokenizer, asked.with_answer("Fine.")).input_ids
    assert dropped == 0
    assert whole[: len(prompt.input_ids)] == prompt.input_ids
    rest = tokenizer.decode(whole[len(prompt.input_ids) :])
    assert rest.lstrip().startswith(found.header + "Fine." + found.end)


def test_an_answer_that_takes_the_whole_context_is_named() -> None:
    assert compute_max_prompt_tokens(256, 1024, 56) == 200
    assert compute_max_prompt_tokens(256, 100, 56) == 100
    with pytest.raises(InputError, match=r"rollout\.max_new_tokens=256.*context is 256 tokens"):
        compute_max_prompt_tokens(256, 1024, 256)


def test_prompts_too_long_are_dropped_and_counted() -> None:
    _, tokenizer = family("llama3")
    kept, dropped = encode_prompts(tokenizer, [talk("a"), talk("a" * 90), talk("b")], 60)
    assert [p.conversation.messages[0].content for p in kept] == ["a", "b"]
    assert dropped == 1
    with pytest.raises(InputError, match=r"every one of the 2 prompts is longer.*rollout\.max_new_tokens"):
        encode_prompts(tokenizer, [talk("a"), talk("b")], 3)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_token_that_ends_a_turn_stops_an_answer(name: str) -> None:
    found, tokenizer = family(name)
    expected = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(found.end)}
    assert find_stop_token_ids(tokenizer) == tuple(sorted(expected))


def test_the_checkpoint_may_list_more_stops() -> None:
    tokenizer = make_tokenizer(None)
    eos = tokenizer.eos_token_id
    assert find_stop_token_ids(tokenizer, SimpleNamespace(eos_token_id=[40, eos, 41])) == (eos, 40, 41)
    assert find_stop_token_ids(tokenizer, SimpleNamespace(eos_token_id=40)) == (eos, 40)
    assert find_stop_token_ids(tokenizer, SimpleNamespace(eos_token_id=None)) == (eos,)


def test_a_model_that_nothing_stops_is_not_sampled_from() -> None:
    """It would talk to its limit, every time, and never be trained to end."""
    tokenizer = make_tokenizer(PLAIN)
    rollout = RolloutConfig()

    def stops(listed: int | None) -> tuple[int, ...]:
        engine: Any = build_engine(rollout, tokenizer, SimpleNamespace(eos_token_id=listed))
        return engine.stop_ids

    assert stops(None) == (tokenizer.eos_token_id,)
    tokenizer.eos_token = None
    assert stops(7) == (7,)
    with pytest.raises(InputError, match=r"eos_token=.*no token ends an answer"):
        stops(None)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_reward_models_rows_end_with_one_token(name: str) -> None:
    found, tokenizer = family(name)
    assert find_turn_end_token(tokenizer) == tokenizer.convert_tokens_to_ids(found.end)


def test_a_template_that_ends_turns_with_plain_text_has_no_such_token() -> None:
    assert find_turn_end_token(make_tokenizer(PLAIN)) is None


@pytest.mark.parametrize("answer", ["Good day.", "\n\nb", "b.\n"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_judged_answer_is_the_prompt_the_answer_and_its_end(name: str, answer: str) -> None:
    """Read as PPO's rollouts are: the prompt's own tokens first, though a merge could cross into the answer."""
    found, tokenizer = family(name)
    asked = talk("Hi.", "Good day.", "And?")
    stops = find_stop_token_ids(tokenizer)
    prompt = encode_prompts(tokenizer, [asked], 200)[0][0].input_ids
    end = tokenizer.convert_tokens_to_ids(found.end)

    ended = encode_for_reward_model(tokenizer, asked, answer, True, stops)
    assert ended[: len(prompt)] == prompt
    assert ended[-1] == end
    assert tokenizer.decode(ended[len(prompt) : -1]).strip() == (found.header + answer.lstrip()).strip()

    cut = encode_for_reward_model(tokenizer, asked, answer, False, stops)
    assert cut == ended[:-1]
    assert not set(cut[len(prompt) :]) & set(stops)
