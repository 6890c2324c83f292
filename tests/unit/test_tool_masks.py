"""Rows with tools are rendered by templates: loss masks, refusals, and the same prompts in the server."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trl
from chat_templates import LLAMA3, decode_trained_spans, make_tokenizer
from transformers import AutoTokenizer

from align.core.errors import InputError
from align.core.types import Conversation, Message, Tool, ToolCall
from align.data.chat.encode import (
    IGNORE_INDEX,
    encode_conversation,
    encode_documents,
    encode_for_reward_model,
    encode_prompt,
    find_stop_token_ids,
    render,
)
from align.data.chat.template import CHATML
from align.models.base import POCKET_FOLDER
from align.serve.answers import AnswerParser
from align.serve.errors import Refusal
from align.serve.prompts import ChatBody, ChatFormat, build_chat_prompt

TRL = Path(trl.__file__).parent / "chat_templates"

# Qwen2.5 and Hermes: schemas in the system turn, calls between marks, results in a turn of the user.
QWEN = """
{%- if tools %}
  {{- '<|im_start|>system\n' }}
  {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{% endif %}
  {{- '<tools>' }}{% for tool in tools %}{{- '\n' + tool | tojson }}{% endfor %}{{- '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for m in messages %}
  {%- if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
  {%- elif m.role == 'assistant' %}
    {{- '<|im_start|>assistant' }}{% if m.content %}{{- '\n' + m.content }}{% endif %}
    {%- for call in m.tool_calls %}
      {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
      {{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
  {%- elif m.role == 'tool' %}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
    {{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{% endif %}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}
"""

# Llama 3.1: schemas in the first question, one call a turn, a bare JSON object; text beside the call is left out.
LLAMA31 = """
{{- bos_token }}
{%- for m in messages %}
  {%- if 'tool_calls' in m %}
    {%- if m.tool_calls | length != 1 %}{{- raise_exception('one call a turn') }}{% endif %}
    {%- set f = m.tool_calls[0].function %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
    {{- '{"name": "' + f.name + '", "parameters": ' }}{{- f.arguments | tojson }}{{- '}<|eot_id|>' }}
  {%- elif m.role == 'tool' %}
    {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}
  {%- else %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
    {%- if tools and m.role == 'user' and loop.index0 < 2 %}
      {%- for tool in tools %}{{- tool | tojson(indent=4) + '\n\n' }}{% endfor %}
    {%- endif %}
    {{- m.content | trim + '<|eot_id|>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
"""

# Mistral: schemas before the *last* question, so that earlier turns change; lists of calls with ids of nine letters.
MISTRAL_TOOLS = """
{%- if messages[0].role == 'system' %}{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in turns %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{{- bos_token }}
{%- for m in turns %}
  {%- if m.role == 'user' %}
    {%- if tools and loop.index0 == ns.last %}
      {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
    {%- endif %}
    {{- '[INST] ' }}
    {%- if loop.index0 == ns.last and messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{% endif %}
    {{- m.content + '[/INST]' }}
  {%- elif m.tool_calls is defined and m.tool_calls %}
    {{- '[TOOL_CALLS] [' }}
    {%- for call in m.tool_calls %}
      {%- if call.id is not defined or call.id | length != 9 %}{{- raise_exception('ids have 9 letters') }}{% endif %}
      {%- set out = call.function | tojson %}{{- out[:-1] }}{{- ', "id": "' + call.id + '"}' }}
      {{- ', ' if not loop.last else ']' + eos_token }}
    {%- endfor %}
  {%- elif m.role == 'tool' %}
    {{- '[TOOL_RESULTS] {"content": ' + m.content + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
  {%- else %}
    {{- ' ' + m.content + eos_token }}
  {%- endif %}
{%- endfor %}
"""

WORDS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
WEATHER = Tool.from_dict(
    {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
)


def call(number: int, **arguments: Any) -> ToolCall:
    return ToolCall.from_arguments("weather", arguments, f"abcdefgh{number}")


def build_result(number: int, text: str) -> Message:
    return Message("tool", text, tool_call_id=f"abcdefgh{number}", name="weather")


def build_call_turn(*calls: ToolCall, text: str = "", trained: bool = True) -> Message:
    return Message("assistant", text, trained, calls)


def build_conversation(*turns: Message) -> Conversation:
    return Conversation(turns, "row 7", (WEATHER,))


ASK = Message("user", "Rain?")
AGAIN = Message("user", "And?")
NO = Message("assistant", "No.")
ONE = build_conversation(ASK, build_call_turn(call(1, city="Oslo")), build_result(1, "dry"), NO)
LONG = build_conversation(
    Message("system", "S."),
    ASK,
    build_call_turn(call(1, city="Oslo")),
    build_result(1, "dry"),
    NO,
    AGAIN,
    build_call_turn(call(2, days=[3, {}])),
    build_result(2, '{"rain": 0}'),
    Message("assistant", "Nor then."),
    AGAIN,
    build_call_turn(call(3)),
)
TWO = build_conversation(
    ASK, build_call_turn(call(1, city="Oslo"), call(2, city="Rome")), build_result(1, "dry"), build_result(2, "wet"), NO
)
BESIDE = build_conversation(ASK, build_call_turn(call(1, city="Oslo"), text="Let me look."), build_result(1, "dry"), NO)


def load_test_tokenizer(name: str) -> Any:
    templates = {"qwen": QWEN, "llama": LLAMA31, "mistral": MISTRAL_TOOLS, "chatml": CHATML}
    if name == "pocket":
        return AutoTokenizer.from_pretrained(POCKET_FOLDER)
    eos = {"qwen": "<|im_end|>", "llama": "<|eot_id|>", "mistral": "</s>", "chatml": "<|endoftext|>"}[name]
    return make_tokenizer(templates[name], eos, WORDS)


FORMS = {  # template → form of a call, separator of calls, end of a turn, start of an answer
    "qwen": ('<tool_call>\n{{"name": "weather", "arguments": {}}}\n</tool_call>', "\n", "<|im_end|>", ""),
    "llama": ('{{"name": "weather", "parameters": {}}}', None, "<|eot_id|>", ""),
    "mistral": ('{{"name": "weather", "arguments": {}, "id": "{}"}}', ", ", "</s>", " "),
    "chatml": ('<tool_call>\n{{"name": "weather", "arguments": {}}}\n</tool_call>', "\n", "<|endoftext|>", ""),
    "pocket": ('<tool_call>\n{{"name": "weather", "arguments": {}}}\n</tool_call>', "\n", "<|end|>", ""),
}


def build_expected_text(name: str, turn: Message) -> str:
    template, separator, end, prefix = FORMS[name]
    if not turn.tool_calls:
        return prefix + turn.content + end
    calls = (separator or "").join(template.format(call.arguments, call.id) for call in turn.tool_calls)
    calls = f"[TOOL_CALLS] [{calls}]" if name == "mistral" else calls
    return (turn.content + "\n" if turn.content else "") + calls + end


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("conversation", [ONE, LONG, TWO, BESIDE], ids=["one", "long", "two", "beside"])
def test_calls_are_trained_as_text_is_and_results_and_schemas_never(name: str, conversation: Conversation) -> None:
    tokenizer = load_test_tokenizer(name)
    refuses = (name == "llama" and conversation is TWO) or (name in ("llama", "mistral") and conversation is BESIDE)
    if refuses:
        with pytest.raises(InputError, match=r"one call a turn|leaves out the text beside a call"):
            encode_conversation(tokenizer, conversation)
        return
    texts = decode_trained_spans(tokenizer, conversation)
    answers = [build_expected_text(name, turn) for turn in conversation.messages if turn.role == "assistant"]
    # Earlier turns change with later ones, so that the blank at the start of an answer belongs to its header.
    if name == "mistral":
        texts = [text.lstrip() for text in texts]
        answers = [text.lstrip() for text in answers]
    assert texts == answers
    decoded = tokenizer.decode(encode_conversation(tokenizer, conversation).input_ids)
    assert decoded == tokenizer.apply_chat_template(
        conversation.as_dicts(), tools=conversation.tool_dicts(), tokenize=False
    )
    assert "dry" in decoded
    assert "properties" in decoded


@pytest.mark.parametrize("name", FORMS)
def test_calls_that_are_not_to_be_imitated_are_read_and_not_trained(name: str) -> None:
    tokenizer = load_test_tokenizer(name)
    turns = tuple(replace(turn, trained=i == len(LONG.messages) - 1) for i, turn in enumerate(LONG.messages))
    assert decode_trained_spans(tokenizer, replace(LONG, messages=turns)) == [
        build_expected_text(name, LONG.messages[-1])
    ]


@pytest.mark.parametrize("name", FORMS)
def test_no_text_of_a_call_a_result_or_a_schema_becomes_a_special_token(name: str) -> None:
    tokenizer = load_test_tokenizer(name)
    end = FORMS[name][2]
    plain = build_conversation(ASK, build_call_turn(call(1, city="Os")), build_result(1, "dry"), NO)
    spelt_out = build_conversation(ASK, build_call_turn(call(1, city=f"Os{end}")), build_result(1, f"dry{end}"), NO)
    spelt_out = replace(
        spelt_out, tools=(Tool.from_dict({"name": "weather", "description": f"a{end}b", "parameters": {}}),)
    )
    encoded = [encode_conversation(tokenizer, conversation).input_ids for conversation in (plain, spelt_out)]
    special = tokenizer.convert_tokens_to_ids(end)
    assert encoded[0].count(special) == encoded[1].count(special)
    assert end in decode_trained_spans(tokenizer, spelt_out)[0].removesuffix(end)
    bad = build_conversation(ASK, build_call_turn(call(1, **{f"a{end}": 1})), build_result(1, "dry"), NO)
    with pytest.raises(InputError, match="special token in it"):
        encode_conversation(tokenizer, bad)


def test_a_template_that_leaves_something_out_is_named_with_what_it_leaves_out() -> None:
    cases = [
        (LLAMA3, ONE, "undefined|refuses it|leaves out the tools that are offered"),
        (QWEN.replace("if tools", "if false"), ONE, "tools=.*leaves out the tools that are offered"),
        (QWEN.replace("for call in m.tool_calls", "for call in m.tool_calls[:1]"), TWO, "call 2 of a turn"),
        (QWEN.replace("for call in m.tool_calls", "for call in []"), ONE, r"messages\[1\]\.tool_calls.*calls of tools"),
        (QWEN.replace("m.role == 'tool'", "false"), ONE, r"messages\[2\]\.content.*results of tools"),
        (QWEN.replace("if m.content", "if false"), BESIDE, r"messages\[1\]\.content.*the text beside a call"),
    ]
    for template, conversation, problem in cases:
        tokenizer = make_tokenizer(template, "<|im_end|>", WORDS)
        tokenizer.name_or_path = "org/model-7b"
        for encode in (encode_conversation, encode_prompt):
            with pytest.raises(InputError, match=f"row 7, .*{problem}") as caught:
                encode(tokenizer, conversation)
            assert "data.template=chatml" in caught.value.remedy
            assert "leaves out" not in caught.value.problem or "org/model-7b" in caught.value.problem


def test_text_that_a_template_moves_behind_the_results_is_refused() -> None:
    moved = QWEN.replace("{% if m.content %}{{- '\n' + m.content }}{% endif %}", "").replace(
        "{{- '\n<tool_response>", "{{- messages[loop.index0 - 1].content + '\n<tool_response>"
    )
    with pytest.raises(InputError, match=r"messages\[1\]=Let me look\..*loss mask is not known"):
        encode_conversation(make_tokenizer(moved, "<|im_end|>", WORDS), BESIDE)


MARKED = ("qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_vl")


@pytest.mark.parametrize("name", MARKED)
@pytest.mark.parametrize("conversation", [ONE, LONG, TWO, BESIDE], ids=["one", "long", "two", "beside"])
def test_the_mask_is_that_of_trl(name: str, conversation: Conversation) -> None:
    """TRL marks the text of the assistant in its own copies of templates: a second implementation of the mask."""
    tokenizer = make_tokenizer((TRL / f"{name}_training.jinja").read_text(), "<|im_end|>", ("<think>", "</think>"))
    theirs = tokenizer.apply_chat_template(
        conversation.as_dicts(),
        tools=conversation.tool_dicts(),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ours = encode_conversation(tokenizer, conversation)
    assert ours.input_ids == theirs["input_ids"]
    mask = [label != IGNORE_INDEX for label in ours.labels]
    different_positions = {
        i for i, (a, b) in enumerate(zip(mask, theirs["assistant_masks"], strict=True)) if a != bool(b)
    }
    # TRL also counts the line break after a turn, which is never sampled.
    assert {tokenizer.decode([ours.input_ids[i]]) for i in different_positions} <= {"\n"}
    assert sum(mask) > 10


def test_the_house_s_markers_say_what_the_mask_says() -> None:
    for name in ("pocket", "chatml"):
        tokenizer = load_test_tokenizer(name)
        for conversation in (ONE, LONG, TWO, BESIDE):
            theirs = tokenizer.apply_chat_template(
                conversation.as_dicts(),
                tools=conversation.tool_dicts(),
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            labels = encode_conversation(tokenizer, conversation).labels
            assert [label != IGNORE_INDEX for label in labels] == [bool(i) for i in theirs["assistant_masks"]]


@pytest.mark.parametrize("name", FORMS)
def test_the_server_asks_by_the_tokens_that_training_read(name: str) -> None:
    tokenizer = load_test_tokenizer(name)
    form = ChatFormat(tokenizer, ())
    function = {"parameters": {"type": "object", "properties": {"city": {}}}, "description": "d", "name": "weather"}
    shuffled = {"function": function, "type": "function"}
    for conversation in (LONG, TWO, ONE) if name != "llama" else (LONG, ONE):
        prompt = replace(conversation.turns(len(conversation.messages) - 1), tools=(Tool.from_dict(shuffled),))
        messages = prompt.as_dicts()
        for message in messages:  # as clients of OpenAI's API write arguments
            for tool_call in message.get("tool_calls", ()):
                tool_call["function"]["arguments"] = json.dumps(tool_call["function"]["arguments"])
        body = ChatBody.model_validate({"model": "m", "messages": messages, "tools": [shuffled]})
        assert list(build_chat_prompt(form, body).ids) == encode_prompt(tokenizer, prompt)


def test_the_server_refuses_tools_that_a_template_does_not_write() -> None:
    form = ChatFormat(make_tokenizer(LLAMA3), ())
    body = ChatBody.model_validate({"model": "m", "messages": [ASK.as_dict()], "tools": [WEATHER.as_dict()]})
    with pytest.raises(Refusal, match="takes no tools"):
        build_chat_prompt(form, body)


@pytest.mark.parametrize("name", ["pocket", "chatml", "qwen", "llama"])
def test_the_server_reads_the_calls_that_were_trained(name: str) -> None:
    """The trained text, divided at any character, parses to the same calls."""
    tokenizer = load_test_tokenizer(name)
    end = FORMS[name][2]
    for conversation in (ONE, BESIDE, TWO) if name != "llama" else (ONE,):
        turn = next(turn for turn in conversation.messages if turn.tool_calls)
        text = decode_trained_spans(tokenizer, conversation)[0].removesuffix(end)
        for cut in range(len(text)):
            reader = AnswerParser(tools=["weather"])
            parts = [*reader.feed(text[:cut]), *reader.feed(text[cut:], is_last=True)]
            assert "".join(part.text for part in parts) == turn.content
            calls = [(part.call.name, json.loads(part.call.arguments)) for part in parts if part.call]
            assert calls == [(call.name, json.loads(call.arguments)) for call in turn.tool_calls]


def test_a_judged_answer_may_call_tools() -> None:
    for name in FORMS:
        tokenizer = load_test_tokenizer(name)
        end = FORMS[name][2]
        prompt = build_conversation(ASK)
        answer = build_call_turn(call(1, city="Oslo"))
        ids = encode_for_reward_model(tokenizer, prompt, answer, True, find_stop_token_ids(tokenizer))
        prompt_ids = encode_prompt(tokenizer, prompt)
        assert ids[: len(prompt_ids)] == prompt_ids
        assert tokenizer.decode(ids[len(prompt_ids) :]) == build_expected_text(name, answer)
        cut = encode_for_reward_model(tokenizer, prompt, answer, False, find_stop_token_ids(tokenizer))
        assert tokenizer.decode(cut[len(prompt_ids) :]) == build_expected_text(name, answer).removesuffix(end)


def test_reasoning_before_a_call_is_masked_alone() -> None:
    tokenizer = load_test_tokenizer("qwen")
    thinking = build_conversation(
        ASK, build_call_turn(call(1, city="Oslo"), text="<think>\nHm.\n</think>\n\n"), build_result(1, "dry"), NO
    )
    encoded = encode_conversation(tokenizer, thinking, mask_reasoning=True)
    trained_text = tokenizer.decode([label for label in encoded.labels if label != IGNORE_INDEX])
    assert trained_text == build_expected_text("qwen", ONE.messages[1]) + "No.<|im_end|>"


def test_too_long_calls_are_counted() -> None:
    tokenizer = load_test_tokenizer("qwen")
    long = build_conversation(ASK, build_call_turn(call(1, city="a b " * 4000)))
    assert encode_documents(tokenizer, [long, ONE], 1000).too_long == 1


def test_rows_without_tools_are_written_as_ever() -> None:
    plain = Conversation((Message("system", "S."), ASK, NO))
    assert (
        render(load_test_tokenizer("pocket"), plain)
        == "<s><|system|>S.<|end|><|user|>Rain?<|end|><|assistant|>No.<|end|>"
    )
    assert render(load_test_tokenizer("chatml"), plain, add_generation_prompt=True) == (
        "<|im_start|>system\nS.<|im_end|>\n<|im_start|>user\nRain?<|im_end|>\n"
        "<|im_start|>assistant\nNo.<|endoftext|>\n<|im_start|>assistant\n"
    )
    assert plain.as_dicts() == [{"role": m.role, "content": m.content} for m in plain.messages]
