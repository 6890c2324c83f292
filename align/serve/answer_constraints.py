"""Constraints that a request puts on its answers: JSON of a schema, a pattern, one of several texts, a tool call. Each
is written as a grammar in llguidance's Lark, one rule per line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from llguidance import regex_to_lark

from align.core.errors import InputError
from align.rollout.serving_engine import Grammar
from align.serve.errors import Refusal, as_refusal, invalid_request, not_supported
from align.serve.grammars import CompiledGrammar, GrammarState, GrammarStateAfterReasoning
from align.serve.prompts import CALL_START, ChatBody, ChatFormat, Prompt, SampledBody, StructuredOutputs, Tool

LARGEST = 2**16
DEEPEST = 100
MOST_PROPERTIES = 500
FINEST = 1000
"""Limits of a JSON schema: characters, nesting levels, total properties, and the least common multiple of its
`multipleOf` values in units of their last digit. Schemas beyond them take over 100 ms to compile."""
JSON_TEXT = {
    "whitespace_pattern": r"( |\n {0,16})?",
    "whitespace_flexible": True,
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": False,
    "lenient": False,
    "json_allowed_escapes": '"\\bfnrt',
}
"""llguidance's options for JSON in answers, which allow little whitespace and one spelling of each character.

Between two tokens there is a blank, or a line break and some blanks, or nothing. No character may be escaped in a
second way (\\u0061 for a): a declared key could then be spelled so that its schema is not applied."""
COMPACT = {name: value for name, value in JSON_TEXT.items() if name != "whitespace_pattern"}
COMPACT["whitespace_flexible"] = False
"""The options of `JSON_TEXT` with no whitespace, for external engines.

Earlier versions of llguidance repeat the whitespace pattern any number of times, so that an answer could consist
of endless blanks."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule of a grammar in llguidance's Lark, which is one line of its text.

    Attributes:
        param: the request's parameter that the rule comes from, for error messages.
    """

    name: str
    body: str
    param: str


@dataclass(frozen=True, slots=True)
class AnswerConstraint:
    """A grammar in llguidance's Lark that each answer to a request must follow.

    Attributes:
        start: body of the first rule.
        must_be_complete: whether the answer must end within its token limit, rather than be cut.
    """

    start: str
    rules: tuple[Rule, ...]
    must_be_complete: bool = True

    @property
    def lark(self) -> str:
        """The grammar as text in llguidance's Lark, with one rule per line."""
        return "\n".join([f"start: {self.start}", *(f"{rule.name}: {rule.body}" for rule in self.rules)])

    @property
    def compact(self) -> str:
        """The grammar as text, with the options for JSON replaced so that no whitespace is allowed (`COMPACT`)."""
        return self.lark.replace(json.dumps(JSON_TEXT), json.dumps(COMPACT))


GrammarFor = Callable[[Prompt, int], Grammar]
"""Function that creates the grammar state of one answer from its prompt and its maximum tokens."""


def prepare_grammars(form: ChatFormat, body: SampledBody, embedding_rows: int) -> GrammarFor | None:
    """Compile the grammar that a request demands, and return a function that creates the grammar state of an answer.

    Returns None if the answers are unconstrained.

    Args:
        embedding_rows: rows of the model's embedding, which is the length of the token masks.

    Raises:
        Refusal: the constraint is not supported, contradicts itself, or costs too much.
    """
    constraint = build_constraint(form, body)
    if constraint is None:
        return None
    for rule in constraint.rules:
        for token in form.tokenizer.all_special_tokens:
            if token in rule.body:  # meant as text, but llguidance would read it as the special token
                raise invalid_request(rule.param, f"It spells out the special token {token}.", "invalid_grammar")
    grammar = compile_constraint(form, constraint)
    source = constraint.compact

    def start_grammar(prompt: Prompt, max_tokens: int) -> Grammar:
        if prompt.opens_reasoning:
            return GrammarStateAfterReasoning(grammar, embedding_rows, max_tokens, constraint.must_be_complete)
        return GrammarState(grammar, embedding_rows, max_tokens, constraint.must_be_complete, source)

    return start_grammar


def build_constraint(form: ChatFormat, body: SampledBody) -> AnswerConstraint | None:
    """Return the grammar for a request's response format and tool calls, or None if its answers are unconstrained.

    Raises:
        Refusal: the constraint is not supported, or contradicts itself.
    """
    answer = build_answer_rule(body)
    if not isinstance(body, ChatBody) or not body.tools or body.tool_choice == "none":
        return None if answer is None else AnswerConstraint(answer.name, (answer,))
    forced = body.tool_choice != "auto"
    if answer is not None and forced:
        raise invalid_request("response_format", "An answer that has to be a call of a tool has no other format.")
    prefix, arguments_key, suffix = form.tool_call_format
    rules = build_call_rules(
        find_called_tools(body) if forced else list(enumerate(body.tools)),
        arguments_key,
        only_strict_schemas=not forced,
    )
    call_body = " ".join([*quote_literal(prefix), "call", *quote_literal(suffix)])
    if forced:
        return AnswerConstraint(call_body, rules)
    if answer is not None:
        return AnswerConstraint(f"{answer.name} | {call_body}", (answer, *rules))
    if not prefix or not any(tool.function.strict for tool in body.tools):
        return None
    # Text that may hold calls: a call begins at the first `<tool_call>`.
    rest_of_call = " ".join([*quote_literal(prefix.removeprefix(CALL_START)), "call", *quote_literal(suffix)])
    text = Rule("TEXT", f"/(?s:.*)/ & ~/(?s:.*){CALL_START}(?s:.*)/", "tools")
    opening = Rule("opening[lazy]", f"/(?s:.*){CALL_START}/", "tools")
    return AnswerConstraint(f"(opening {rest_of_call})* TEXT", (text, opening, *rules), must_be_complete=False)


def build_answer_rule(body: SampledBody) -> Rule | None:
    """Return the grammar rule for `response_format` or `structured_outputs`, or None if neither is set.

    Raises Refusal if they ask for more than one format.
    """
    response_format = body.response_format
    structured = body.structured_outputs
    rules: list[Rule] = []
    if response_format.type == "json_schema" and response_format.json_schema is not None:
        rules.append(build_json_rule(response_format.json_schema.of, "response_format.json_schema.schema"))
    if response_format.type == "json_object":
        rules.append(build_json_rule({"type": "object"}, "response_format"))
    if structured is not None:
        rules += iter_structured_rules(structured)
    if len(rules) > 1:
        raise invalid_request(rules[1].param, "An answer has one format: ask for one of them.")
    return rules[0] if rules else None


def iter_structured_rules(structured: StructuredOutputs) -> Iterator[Rule]:
    """Yield a grammar rule for each field of vLLM's `structured_outputs` that is set.

    Raises:
        Refusal: a field is not supported, or its value is invalid.
    """
    for name in ("grammar", "structural_tag"):
        if (structured.model_extra or {}).get(name) is not None:
            raise not_supported(
                f"structured_outputs.{name}", f"The parameter '{name}' is not supported: use json or regex."
            )
    if structured.of is not None:
        param = "structured_outputs.json"
        try:
            schema = json.loads(structured.of) if isinstance(structured.of, str) else structured.of
        except (ValueError, RecursionError) as error:
            raise invalid_request(param, "It is no JSON.") from error
        yield build_json_rule(schema, param)
    if structured.json_object:
        yield build_json_rule({"type": "object"}, "structured_outputs.json_object")
    if structured.regex is not None:
        pattern = regex_to_lark(structured.regex, use_ascii="")
        yield Rule("answer", f"/{escape_line_breaks(pattern)}/", "structured_outputs.regex")
    if structured.choice is not None:
        texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in structured.choice)
        yield Rule("answer", texts, "structured_outputs.choice")


def find_called_tools(body: ChatBody) -> list[tuple[int, Tool]]:
    """Return the tools that a request forces the model to choose from, as (index in `tools`, tool).

    Raises:
        Refusal: `tool_choice` has another form, or names a tool that is not in `tools`.
    """
    choice = body.tool_choice
    tools = list(enumerate(body.tools))
    if choice == "required":
        return tools
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    if not isinstance(function, dict):
        ways = """'none', 'auto', 'required' or {"type": "function", "function": {"name": …}}"""
        raise not_supported("tool_choice", f"tool_choice is {ways}.")
    chosen_tools = [(i, tool) for i, tool in tools if tool.function.name == function.get("name")]
    if not chosen_tools:
        raise invalid_request("tool_choice", "tool_choice names no tool that is offered in tools.")
    return chosen_tools[:1]


def build_call_rules(
    tools: Sequence[tuple[int, Tool]], arguments_key: str, only_strict_schemas: bool
) -> tuple[Rule, ...]:
    """Return the grammar rule `call`, which matches a call of any of the tools, and a rule for each tool's arguments.

    Args:
        tools: tools with their index in the request.
        arguments_key: the JSON key of the arguments.
        only_strict_schemas: apply the schemas of strict tools only; the arguments of others may be any object.
    """
    calls = []
    rules = list[Rule]()
    for i, tool in tools:
        schema = tool.function.parameters if tool.function.strict or not only_strict_schemas else None
        opening = f'{{"name": {json.dumps(tool.function.name)}, "{arguments_key}": '
        calls.append(f"{json.dumps(opening)} arguments_{i} {json.dumps('}')}")
        rules.append(build_json_rule(schema or {"type": "object"}, f"tools.{i}.function.parameters", f"arguments_{i}"))
    return Rule("call", " | ".join(calls), "tools"), *rules


def build_json_rule(schema: Any, param: str, name: str = "answer") -> Rule:
    """Return a grammar rule that matches JSON valid under a schema, or raise Refusal if the schema cannot be used.

    Raises:
        Refusal: the schema is not an object, or see `find_schema_problem`.
    """
    if not isinstance(schema, dict):
        raise invalid_request(param, "A schema is an object.")
    if problem := find_schema_problem(schema):
        raise invalid_request(param, f"The schema has {problem}.", "invalid_grammar")
    return Rule(name, f"%json {json.dumps({**schema, 'x-guidance': JSON_TEXT})}", param)


def find_schema_problem(schema: Any) -> str | None:
    """Return as text why a JSON schema would compile too slowly or wrongly, or None if it has no such problem."""
    nodes = [schema]
    depth = 0
    properties = 0
    multiple = 1
    while nodes:
        depth += 1
        if depth > DEEPEST:
            return f"more than {DEEPEST} levels"
        objects = [each for each in nodes if isinstance(each, dict)]
        property_maps = [each["properties"] for each in objects if isinstance(each.get("properties"), dict)]
        properties += sum(map(len, property_maps))
        for each in objects:
            multiple = math.lcm(multiple, scale_to_integer(each.get("multipleOf")))
            if isinstance(minimum := each.get("minProperties"), int | float) and minimum > 1:
                return "minProperties over 1, which cannot be checked while an answer is generated: use required"
        lists = [each for each in nodes if isinstance(each, list)]
        nodes = [inner for each in objects for inner in each.values()] + [inner for each in lists for inner in each]
    if properties > MOST_PROPERTIES:
        return f"more than {MOST_PROPERTIES} properties"
    if multiple > FINEST:
        return f"multipleOf values whose common multiple is above {FINEST}, in units of their last digit"
    size = len(json.dumps(schema))
    return f"more than {LARGEST} characters" if size > LARGEST else None


def scale_to_integer(multiple: Any) -> int:
    """Return the digits of a `multipleOf` value as an integer, such as 25 for 0.25, or 1 if it is no finite number."""
    if isinstance(multiple, bool) or not isinstance(multiple, int | float) or not math.isfinite(multiple):
        return 1
    return max(1, abs(int("".join(map(str, Decimal(str(multiple)).as_tuple().digits)))))


def quote_literal(text: str) -> list[str]:
    """Return a text as a quoted Lark literal in a list of one, or an empty list for an empty text."""
    return [json.dumps(text, ensure_ascii=False)] if text else []


def escape_line_breaks(pattern: str) -> str:
    """Escape the line breaks in a regular expression, since a line break would end the grammar rule."""
    return pattern.replace("\n", "\\n").replace("\r", "\\r")


def compile_constraint(form: ChatFormat, constraint: AnswerConstraint) -> CompiledGrammar:
    """Compile a constraint's grammar for a tokenizer, or take it from the cache; raise Refusal if that fails.

    Raises:
        Refusal: the grammar is invalid or costs too much, or the tokenizer supports none.
    """
    try:
        return form.grammars.compile(constraint.lark)
    except InputError as error:
        raise as_refusal(error) from error
    except ValueError as error:
        raise explain_failure(str(error), constraint) from error


def explain_failure(message: str, constraint: AnswerConstraint) -> Refusal:
    """Convert llguidance's message about a failed compilation to a Refusal that names the request's parameter at fault.

    Args:
        message: llguidance's message. It names a line of the grammar, which is a rule with its parameter.
    """
    match = re.match(r"at (\d+)\(\d+\): (.*)", message, re.DOTALL)
    line, problem = (int(match[1]), match[2]) if match else (2, message)
    rule = constraint.rules[min(max(line - 2, 0), len(constraint.rules) - 1)]
    problem = problem.partition("\n   1 | ")[0].removeprefix("failed to compile JSON schema: ")
    problem = " ".join(problem.split())[:300]
    return invalid_request(rule.param, f"No answer can be made to follow {rule.param}: {problem}.", "invalid_grammar")
