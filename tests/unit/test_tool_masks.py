"""Rows with tools as templates write them: what the loss is on, what is refused, and that the server asks alike."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trl
from templates import LLAMA3, make_tokenizer, trained_texts
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

# As Qwen2.5 and Hermes: schemas in the system turn, calls between marks, results in a turn of the user.
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

# As Llama 3.1: schemas in the first question, one call a turn, an object alone; the text beside it is left out.
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

# As Mistral: schemas before the *last* question, so that earlier turns change; lists of calls with ids of nine letters.
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
)  # fmt: skip


def call(number: int, **arguments: Any) -> ToolCall:
    return ToolCall.from_arguments("weather", arguments, f"abcdefgh{number}")


def result(number: int, text: str) -> Message:
    return Message("tool", text, tool_call_id=f"abcdefgh{number}", name="weather")


def calling(*calls: ToolCall, text: str = "", trained: bool = True) -> Message:
    return Message("assistant", text, trained, calls)


def talk(*turns: Message) -> Conversation:
    return Conversation(turns, "row 7", (WEATHER,))


ASK, AGAIN, NO = Message("user", "Rain?"), Message("user", "And?"), Message("assistant", "No.")
ONE = talk(ASK, calling(call(1, city="Oslo")), result(1, "dry"), NO)
LONG = talk(
    Message("system", "S."), ASK, calling(call(1, city="Oslo")), result(1, "dry"), NO, AGAIN,
    calling(call(2, days=[3, {}])), result(2, '{"rain": 0}'), Message("assistant", "Nor then."), AGAIN,
    calling(call(3)),
)  # fmt: skip
TWO = talk(ASK, calling(call(1, city="Oslo"), call(2, city="Rome")), result(1, "dry"), result(2, "wet"), NO)
BESIDE = talk(ASK, calling(call(1, city="Oslo"), text="Let me look."), result(1, "dry"), NO)


def tokenizer_of(name: str) -> Any:
    templates = {"qwen": QWEN, "llama": LLAMA31, "mistral": MISTRAL_TOOLS, "chatml": CHATML}
    if name == "pocket":
        return AutoTokenizer.from_pretrained(POCKET_FOLDER)
    eos = {"qwen": "<|im_end|>", "llama": "<|eot_id|>", "mistral": "</s>", "chatml": "<|endoftext|>"}[name]
    return make_tokenizer(templates[name], eos, WORDS)


FORMS = {  # how each writes a call, what is between two, what ends a turn, and what begins an answer
    "qwen": ('<tool_call>\n{{"name": "weather", "arguments": {}}}\n</tool_call>', "\n", "<|im_end|>", ""),
    "llama": ('{{"name": "weather", "parameters": {}}}', None, "<|eot_id|>", ""),
    "mistral": ('{{"name": "weather", "arguments": {}, "id": "{}"}}', ", ", "</s>", " "),
    "chatml": ('<tool_call>\n{{"name": "weather", "arguments": {}}}\n</tool_call>', "\n", "<|endoftext|>", ""),
    "pocket": ('<tool_call>\n{{"name": "weather", "arguments": {}}}\n</tool_call>', "\n", "<|end|>", ""),
}


def expected(name: str, turn: Message) -> str:
    form, between, end, begins = FORMS[name]
    if not turn.tool_calls:
        return begins + turn.content + end
    calls = (between or "").join(form.format(one.arguments, one.id) for one in turn.tool_calls)
    calls = f"[TOOL_CALLS] [{calls}]" if name == "mistral" else calls
    return (turn.content + "\n" if turn.content else "") + calls + end


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("conversation", [ONE, LONG, TWO, BESIDE], ids=["one", "long", "two", "beside"])
def test_calls_are_trained_as_text_is_and_results_and_schemas_never(name: str, conversation: Conversation) -> None:
    tokenizer = tokenizer_of(name)
    refuses = (name == "llama" and conversation is TWO) or (name in ("llama", "mistral") and conversation is BESIDE)
    if refuses:
        with pytest.raises(InputError, match=r"one call a turn|leaves out the text beside a call"):
            encode_conversation(tokenizer, conversation)
        return
    told = trained_texts(tokenizer, conversation)
    answers = [expected(name, turn) for turn in conversation.messages if turn.role == "assistant"]
    if (
        name == "mistral"
    ):  # where earlier turns change with what follows, the blank of its header counts as the header's
        told, answers = [text.lstrip() for text in told], [text.lstrip() for text in answers]
    assert told == answers
    whole = tokenizer.decode(encode_conversation(tokenizer, conversation).input_ids)
    assert whole == tokenizer.apply_chat_template(
        conversation.as_dicts(), tools=conversation.tool_dicts(), tokenize=False
    )
    assert "dry" in whole
    assert "properties" in whole


@pytest.mark.parametrize("name", FORMS)
def test_calls_that_are_not_to_be_imitated_are_read_and_not_trained(name: str) -> None:
    tokenizer = tokenizer_of(name)
    turns = tuple(replace(turn, trained=i == len(LONG.messages) - 1) for i, turn in enumerate(LONG.messages))
    assert trained_texts(tokenizer, replace(LONG, messages=turns)) == [expected(name, LONG.messages[-1])]


@pytest.mark.parametrize("name", FORMS)
def test_no_text_of_a_call_a_result_or_a_schema_becomes_a_special_token(name: str) -> None:
    tokenizer = tokenizer_of(name)
    end = FORMS[name][2]
    plain = talk(ASK, calling(call(1, city="Os")), result(1, "dry"), NO)
    spelt = talk(ASK, calling(call(1, city=f"Os{end}")), result(1, f"dry{end}"), NO)
    spelt = replace(spelt, tools=(Tool.from_dict({"name": "weather", "description": f"a{end}b", "parameters": {}}),))
    found = [encode_conversation(tokenizer, one).input_ids for one in (plain, spelt)]
    special = tokenizer.convert_tokens_to_ids(end)
    assert found[0].count(special) == found[1].count(special)
    assert end in trained_texts(tokenizer, spelt)[0].removesuffix(end)
    bad = talk(ASK, calling(call(1, **{f"a{end}": 1})), result(1, "dry"), NO)
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
    ]  # fmt: skip
    for template, conversation, problem in cases:
        tokenizer = make_tokenizer(template, "<|im_end|>", WORDS)
        tokenizer.name_or_path = "org/model-7b"
        for encodes in (encode_conversation, encode_prompt):
            with pytest.raises(InputError, match=f"row 7, .*{problem}") as caught:
                encodes(tokenizer, conversation)
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
    """TRL marks in its own copies of templates what the assistant wrote: a second implementation of the mask."""
    tokenizer = make_tokenizer((TRL / f"{name}_training.jinja").read_text(), "<|im_end|>", ("<think>", "</think>"))
    theirs = tokenizer.apply_chat_template(
        conversation.as_dicts(), tools=conversation.tool_dicts(), tokenize=True, return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    ours = encode_conversation(tokenizer, conversation)
    assert ours.input_ids == theirs["input_ids"]
    mask = [label != IGNORE_INDEX for label in ours.labels]
    differ = {i for i, (a, b) in enumerate(zip(mask, theirs["assistant_masks"], strict=True)) if a != bool(b)}
    # Theirs counts the line break behind a turn, at which nothing samples.
    assert {tokenizer.decode([ours.input_ids[i]]) for i in differ} <= {"\n"}
    assert sum(mask) > 10


def test_the_house_s_markers_say_what_the_mask_says() -> None:
    for name in ("pocket", "chatml"):
        tokenizer = tokenizer_of(name)
        for conversation in (ONE, LONG, TWO, BESIDE):
            theirs = tokenizer.apply_chat_template(
                conversation.as_dicts(), tools=conversation.tool_dicts(), tokenize=True, return_dict=True,
                return_assistant_tokens_mask=True,
            )  # fmt: skip
            labels = encode_conversation(tokenizer, conversation).labels
            assert [label != IGNORE_INDEX for label in labels] == [bool(i) for i in theirs["assistant_masks"]]


@pytest.mark.parametrize("name", FORMS)
def test_the_server_asks_by_the_tokens_that_training_read(name: str) -> None:
    tokenizer = tokenizer_of(name)
    form = ChatFormat(tokenizer, ())
    function = {"parameters": {"type": "object", "properties": {"city": {}}}, "description": "d", "name": "weather"}
    shuffled = {"function": function, "type": "function"}
    for conversation in (LONG, TWO, ONE) if name != "llama" else (LONG, ONE):
        prompt = replace(conversation.turns(len(conversation.messages) - 1), tools=(Tool.from_dict(shuffled),))
        messages = prompt.as_dicts()
        for message in messages:  # as clients of OpenAI's API write arguments
            for one in message.get("tool_calls", ()):
                one["function"]["arguments"] = json.dumps(one["function"]["arguments"])
        body = ChatBody.model_validate({"model": "m", "messages": messages, "tools": [shuffled]})
        assert list(build_chat_prompt(form, body).ids) == encode_prompt(tokenizer, prompt)


def test_the_server_refuses_tools_that_a_template_does_not_write() -> None:
    form = ChatFormat(make_tokenizer(LLAMA3), ())
    body = ChatBody.model_validate({"model": "m", "messages": [ASK.as_dict()], "tools": [WEATHER.as_dict()]})
    with pytest.raises(Refusal, match="takes no tools"):
        build_chat_prompt(form, body)


@pytest.mark.parametrize("name", ["pocket", "chatml", "qwen", "llama"])
def test_the_server_reads_the_calls_that_were_trained(name: str) -> None:
    """What the loss is on, cut anywhere, parses to the very calls."""
    tokenizer, end = tokenizer_of(name), FORMS[name][2]
    for conversation in (ONE, BESIDE, TWO) if name != "llama" else (ONE,):
        turn = next(turn for turn in conversation.messages if turn.tool_calls)
        text = trained_texts(tokenizer, conversation)[0].removesuffix(end)
        for cut in range(len(text)):
            reader = AnswerParser(tools=["weather"])
            parts = [*reader.feed(text[:cut]), *reader.feed(text[cut:], last=True)]
            assert "".join(part.text for part in parts) == turn.content
            calls = [(part.call.name, json.loads(part.call.arguments)) for part in parts if part.call]
            assert calls == [(one.name, json.loads(one.arguments)) for one in turn.tool_calls]


def test_a_judged_answer_may_call_tools() -> None:
    for name in FORMS:
        tokenizer, end = tokenizer_of(name), FORMS[name][2]
        prompt, answer = talk(ASK), calling(call(1, city="Oslo"))
        ids = encode_for_reward_model(tokenizer, prompt, answer, True, find_stop_token_ids(tokenizer))
        asked = encode_prompt(tokenizer, prompt)
        assert ids[: len(asked)] == asked
        assert tokenizer.decode(ids[len(asked) :]) == expected(name, answer)
        cut = encode_for_reward_model(tokenizer, prompt, answer, False, find_stop_token_ids(tokenizer))
        assert tokenizer.decode(cut[len(asked) :]) == expected(name, answer).removesuffix(end)


def test_reasoning_before_a_call_is_masked_alone() -> None:
    tokenizer = tokenizer_of("qwen")
    thinking = talk(ASK, calling(call(1, city="Oslo"), text="<think>\nHm.\n</think>\n\n"), result(1, "dry"), NO)
    encoded = encode_conversation(tokenizer, thinking, mask_reasoning=True)
    kept = tokenizer.decode([label for label in encoded.labels if label != IGNORE_INDEX])
    assert kept == expected("qwen", ONE.messages[1]) + "No.<|im_end|>"


def test_too_long_calls_are_counted() -> None:
    tokenizer = tokenizer_of("qwen")
    long = talk(ASK, calling(call(1, city="a b " * 4000)))
    assert encode_documents(tokenizer, [long, ONE], 1000).too_long == 1


def test_rows_without_tools_are_written_as_ever() -> None:
    plain = Conversation((Message("system", "S."), ASK, NO))
    assert render(tokenizer_of("pocket"), plain) == "<s><|system|>S.<|end|><|user|>Rain?<|end|><|assistant|>No.<|end|>"
    assert render(tokenizer_of("chatml"), plain, add_generation_prompt=True) == (
        "<|im_start|>system\nS.<|im_end|>\n<|im_start|>user\nRain?<|im_end|>\n"
        "<|im_start|>assistant\nNo.<|endoftext|>\n<|im_start|>assistant\n"
    )
    assert plain.as_dicts() == [{"role": m.role, "content": m.content} for m in plain.messages]
