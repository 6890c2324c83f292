"""Parsers of rows into preference pairs, and `write_preferences`, which writes pairs in TRL's conversational form.

Shapes of pairs:

    chosen rejected [prompt|question]                 TRL (messages or plain strings), UltraFeedback binarised, the
                                                      implicit form (whole conversations), HH transcripts, Orca pairs
    conversations chosen{} rejected{}                 LLaMA-Factory: a conversation, and two last turns
    instruction [input] chosen rejected               LLaMA-Factory
    prompt response helpfulness                       HelpSteer: neighbouring rows with one prompt are paired
    prompt response_1 response_2 preference_strength  HelpSteer2 preferences
    prompt chosen[] rejected[]                        RewardBench 2: one right answer and several wrong ones, or several
    context response1 response2 overall_preference    HelpSteer3
    prompt answers[{answer, rank}]                    K-wise rankings (Nectar), rank 1 the best
    instruction completions[{response, overall_score}]   UltraFeedback: the higher score is the better answer

Two answers and a verdict on them, from arenas, judges or annotators:

    prompt response_a response_b winner             also answer_, completion_, output_, conversation_; _1 _2; _0 _1
    conversation_a conversation_b winner            LMSYS arena: whole conversations
    prompt response_a response_b winner_model_a winner_model_b winner_tie    its Kaggle form: lists of texts
    prompt response_0 response_1 better_response_id     PKU-SafeRLHF
    instruction output_1 output_2 preference            AlpacaFarm
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

from align.core.errors import InputError, StorageError
from align.core.outputs import replace_file
from align.core.types import Message, Preference
from align.data.read.column_rules import POSTERIOR
from align.data.read.content import ENDED_FLAGS, MESSAGE_ATTRIBUTES, PREFERENCES
from align.data.read.conversations import parse_alpaca, parse_sharegpt
from align.data.read.drops import DoubtfulSourceError, Drop
from align.data.read.json_rows import check_json_values
from align.data.read.messages import (
    HH_TURN,
    UNSUPPORTED_COLUMNS,
    Fields,
    check_tool_calls,
    check_unsupported_fields,
    format_value,
    pairs_to_turns,
    parse_tools,
    parse_transcript,
    with_system_column,
)
from align.data.read.rows import Row
from align.data.read.shapes import (
    HELPSTEER,
    HELPSTEER2,
    HELPSTEER3,
    JUDGED,
    SCORED,
    WINNER_COLUMNS,
    JudgedColumns,
    describe_nearest_shape,
    find_judged_columns_of_row,
    find_question_column,
    find_shape,
    is_helpsteer,
    parse_label,
)
from align.data.read.unread_columns import find_unread_columns

Messages = tuple[Message, ...]
ParsedPair = tuple[Preference, Fields] | Drop
"""A preference pair with its answers' metadata under `chosen` and `rejected`, or the reason why there is no pair."""
PAIR_HELP = "A row holds prompt, chosen and rejected, or the columns of HH, UltraFeedback, HelpSteer or Nectar."
POSTERIOR_HELP = (
    "Give the probability that `chosen` is better, or keep the column as metadata: data.metadata=[posterior]."
)
VERDICT_HELP = 'Write "{}" or "{}" for the better answer, or "tie".'
TIES = frozenset(["tie", "tied", "tie_(bothbad)", "both_bad", "bothbad", "both", "draw", "neither", "equal", "none"])
VERDICT_PREFIX = re.compile(r"(?:model|response|answer|completion|output|conversation|assistant)_")
"""Prefix of an ending in a verdict, as in `model_a`."""


def build_pair_error(data: Fields, column: str, problem: str, remedy: str = PAIR_HELP) -> InputError:
    """Return an InputError about a column of a preference pair, which shows the column's value."""
    name = column.split("[")[0]
    return InputError(column, format_value(data[name]) if name in data else "(no such column)", problem, remedy)


def require_text(data: Fields, column: str) -> str:
    """Return the text in a row's column, or raise InputError if the column holds no text."""
    value = data.get(column)
    if not isinstance(value, str):
        raise build_pair_error(data, column, "missing" if value is None else "not a text")
    return value


def require_number(data: Fields, column: str, value: Any) -> float:
    """Return `value` as a float, or raise InputError about `column` if it is no finite number."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not -sys.float_info.max <= value <= sys.float_info.max:  # integers of JSON have no bounds
        raise build_pair_error(data, column, "missing" if value is None else "not a finite number")
    return float(value)


def parse_pairs(group: Sequence[Row]) -> Iterator[ParsedPair]:
    """Yield each preference pair of a row, or of HelpSteer rows with one prompt, and a Drop, the reason, for each that
    is left out."""
    for row in group:
        with row.naming_errors():
            check_unsupported_fields(row.data, UNSUPPORTED_COLUMNS)
    with group[0].naming_errors():
        yield from pair_helpsteer_rows(group) if is_helpsteer(group[0].data) else parse_row_pairs(group[0])


def parse_row_pairs(row: Row) -> Iterator[ParsedPair]:
    """Yield each preference pair of a row in any pair format except HelpSteer, and a Drop, the reason, for each that is
    left out. Raises InputError if the row has no such format."""
    data = row.data
    shape = find_shape(data)
    if shape is SCORED:
        question_name = find_question_column(data)
        answers = parse_scored_answers(row, "completions", "response", "overall_score", 1)
        yield from pair_all(answers, parse_prompt(data, question_name))
    elif {"chosen", "rejected"} <= data.keys() and is_text_list(data["rejected"]):
        if data.get(POSTERIOR) is not None:
            raise build_pair_error(data, POSTERIOR, "one number for several pairs", POSTERIOR_HELP)
        yield from pair_right_with_wrong_answers(row)
    elif {"chosen", "rejected"} <= data.keys():
        yield parse_pair(row)
    elif shape is JUDGED:
        yield parse_judged_pair(row)
    elif {"prompt", "answers"} <= data.keys():
        # Ranks give the order of answers, not a margin between them.
        answers = parse_scored_answers(row, "answers", "answer", "rank", -1)
        yield from pair_all(answers, parse_prompt(data, "prompt"), has_margins=False)
    elif compared_shape := next((shape for shape in (HELPSTEER2, HELPSTEER3) if data.keys() >= {*shape.needs}), None):
        yield parse_compared_pair(row, *compared_shape.needs)
    else:
        problem = f"missing (the row has {', '.join(sorted(data)) or 'no columns'})"
        remedy = describe_nearest_shape(data, (PREFERENCES,)) + PAIR_HELP
        raise build_pair_error(data, "rejected" if "chosen" in data else "chosen", problem, remedy)


def parse_pair_answer(data: Fields, column: str, prompt: Any) -> Messages:
    """Parse the answer in a pair's column `chosen` or `rejected` into messages. If `prompt` is `None`, they begin with
    the prompt."""
    value = data[column]
    if not isinstance(value, str):
        return parse_pair_messages(data, column, [value] if isinstance(value, dict) else value)
    if prompt is not None:
        return to_answer(value)
    if not HH_TURN.match(value.lstrip(" ")):
        problem = f"missing, and {column} is not a transcript (\\n\\nHuman: … \\n\\nAssistant: …)"
        raise build_pair_error(data, "prompt", problem)
    return parse_transcript(value)


def parse_pair(row: Row) -> ParsedPair:
    """Parse a row with `chosen` and `rejected`, two answers to a prompt or two whole conversations with a common
    beginning, into a preference pair. Returns `Drop.IDENTICAL` if they are equal."""
    data = row.data
    question_name = find_question_column(data) or "prompt"
    prompt = data.get(question_name)
    for column in ("chosen", "rejected"):
        value = data[column]
        if not isinstance(value, str | list | dict):
            raise build_pair_error(
                data, column, "missing" if value is None else "neither a text nor a list of messages"
            )
    if type(data["chosen"]) is not type(data["rejected"]):
        raise build_pair_error(data, "rejected", "not of the same form as chosen")
    better, worse = (parse_pair_answer(data, column, prompt) for column in ("chosen", "rejected"))
    for column, turns in (("chosen", better), ("rejected", worse)):
        if turns[-1].role != "assistant":
            raise build_pair_error(
                data, column, f"it ends with a {turns[-1].role} turn, so there is no answer to judge"
            )
    if better == worse:
        return Drop.IDENTICAL
    if better[0].role == worse[0].role == "assistant":
        if prompt is None:
            raise build_pair_error(data, "prompt", "missing")
        prompt_turns = parse_prompt(data, question_name)
    else:
        shared_count = count_shared_turns(data, better, worse)
        prompt_turns = with_system_column(better[:shared_count], data)
        better = better[shared_count:]
        worse = worse[shared_count:]
        # A list of messages must equal the last shared turns. A string is a caption that repeats one of them
        # (UltraFeedback), and `messages` may be a whole conversation that ends with one of the answers.
        if isinstance(prompt, list) and question_name != "messages":
            named_prompt = parse_pair_messages(data, question_name, prompt)
            if prompt_turns[-len(named_prompt) :] != named_prompt:
                raise build_pair_error(data, question_name, "not the common beginning of chosen and rejected")
    margin, chosen_score, rejected_score = (data.get(column) for column in ("margin", "score_chosen", "score_rejected"))
    if margin is not None:
        margin = require_number(data, "margin", margin)
    elif chosen_score is not None and rejected_score is not None:  # UltraFeedback
        margin = require_number(data, "score_chosen", chosen_score) - require_number(
            data, "score_rejected", rejected_score
        )
    pair = build_preference(row, prompt_turns, better, worse, margin)
    return replace(pair, posterior=parse_posterior(data)), {}


def parse_posterior(data: Fields) -> float | None:
    """Return the column `posterior` of a pair, or None if it is missing or null.

    Raises:
        InputError: it is no number from 0 to 1.
    """
    posterior = data.get(POSTERIOR)
    if posterior is None:
        return None
    if type(posterior) not in (int, float) or not 0 <= posterior <= 1:
        raise build_pair_error(data, POSTERIOR, "not a probability from 0 to 1", POSTERIOR_HELP)
    return float(posterior)


def parse_judged_pair(row: Row) -> ParsedPair:
    """Parse a row of two answers and a verdict, such as `winner: a`, into a preference pair. Returns a Drop for a tie
    or equal answers."""
    data = row.data
    columns = find_judged_columns_of_row(data)
    assert columns is not None
    verdict = parse_verdict(data, columns)
    name = columns.verdict[0]
    remedy = VERDICT_HELP.format(*columns.endings)
    number = convert_to_float(data[name])
    if number is not None and number <= 0 and columns.endings != ("0", "1") and columns.verdict != WINNER_COLUMNS:
        # An ambiguous code: 0 may be the first answer or a tie, and a negative number may be a degree.
        problem = "is ambiguous: it may mean the first answer, a tie or a degree"
        raise DoubtfulSourceError(name, format_value(data[name]), problem, remedy)
    if verdict is None:
        problem = f"neither of the answers {' and '.join(columns.answers)}, nor a tie"
        raise build_pair_error(data, name, problem, remedy)
    if verdict == 0:
        return Drop.TIE
    answers: list[Any] = [data[name] for name in columns.answers]
    pair = {name: value for name, value in data.items() if name not in (*columns.answers, POSTERIOR)}
    text_lists = [parse_text_list(value) for value in (data.get("prompt"), *answers)]
    if columns.verdict == WINNER_COLUMNS and all(text_lists):  # the Kaggle form of LMSYS's arena
        del pair["prompt"]
        if len({*map(len, text_lists)}) > 1:
            raise build_pair_error(data, columns.answers[0], "a list of texts of another length than the prompt's")
        answers = [pairs_to_turns(zip(text_lists[0], texts, strict=True)) for texts in text_lists[1:]]
    better_answer, worse_answer = answers if verdict < 0 else reversed(answers)
    pair |= {"chosen": better_answer, "rejected": worse_answer}
    if columns.verdict == WINNER_COLUMNS:
        check_json_values(pair)  # texts decoded from JSON text have not been checked yet
    return parse_pair(row._replace(data=pair))


def parse_verdict(row: Fields, columns: JudgedColumns) -> int | None:
    """Return the answer that a row's verdict prefers: -1 for the first, 1 for the second, 0 for neither. Returns None
    if the verdict cannot be parsed.

    A number names the column that ends with it. Answers a and b have the numbers 1 and 2; 1.5 is a tie. A text is an
    ending, a column, a model's name, or a tie.
    """
    if columns.verdict == WINNER_COLUMNS:
        first, second = (parse_label(row[name]) for name in WINNER_COLUMNS)
        tie = parse_label(row.get("winner_tie", False))
        if None in (first, second, tie) or bool(first) + bool(second) + bool(tie) > 1:
            return None
        return bool(second) - bool(first)
    value = row[columns.verdict[0]]
    if isinstance(value, str):
        models = [row.get("model_a"), row.get("model_b")]
        if value in models and models[0] != models[1]:
            return -1 if value == models[0] else 1
        normalised = re.sub(r"[ -]", "_", value.strip().strip("[]").casefold())
        if normalised in TIES:
            return 0
        value = VERDICT_PREFIX.sub("", normalised)
        if value in columns.endings:
            return -1 if value == columns.endings[0] else 1
    places = {0.0: -1, 1.0: 1} if columns.endings == ("0", "1") else {1.0: -1, 1.5: 0, 2.0: 1}
    number = None if isinstance(value, bool) else convert_to_float(value)
    return None if number is None else places.get(number)


def convert_to_float(value: Any) -> float | None:
    """Convert a number or its text to a float, or return None for any other value."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def parse_text_list(value: Any) -> list[str]:
    """Return a list of texts, given as a list or as its JSON text, with null entries as empty texts. Returns an empty
    list for anything else."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    if not isinstance(value, list) or not all(isinstance(text, str | None) for text in value):
        return []
    return [text or "" for text in value]


def is_text_list(value: Any) -> bool:
    """Return whether a value is a non-empty list of texts, and not of messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def pair_right_with_wrong_answers(row: Row) -> Iterator[ParsedPair]:
    """Yield a preference pair for every combination of a right answer in `chosen` and a wrong answer in `rejected`. All
    have the row's group name. Equal answers yield `Drop.IDENTICAL`."""
    right_answers = [row.data["chosen"]] if isinstance(row.data["chosen"], str) else row.data["chosen"]
    if not is_text_list(right_answers):
        raise build_pair_error(row.data, "chosen", "neither a text nor a list of texts, as rejected is one")
    prompt = parse_prompt(row.data, find_question_column(row.data) or "prompt")
    name = get_text(row.data, "id") or row.name
    if "source" not in row.data and "subset" in row.data:  # RewardBench's name
        row = row._replace(data={**row.data, "source": row.data["subset"]})
    for (i, better), (j, worse) in product(enumerate(right_answers), enumerate(row.data["rejected"])):
        if better == worse:
            yield Drop.IDENTICAL
        else:
            pair = build_preference(row, prompt, to_answer(better), to_answer(worse), None, f"{name}/{i}>{j}", name)
            yield pair, {}


class ScoredAnswer(NamedTuple):
    """One of several answers to a prompt, with its score and its other fields.

    Attributes:
        row: the row that holds it.
        turns: the answer.
        score: higher is better.
        other_fields: other fields of the answer.
    """

    row: Row
    turns: Messages
    score: float
    other_fields: Fields


def parse_scored_answers(
    row: Row, column: str, text_field: str, score_field: str, score_sign: int
) -> list[ScoredAnswer]:
    """Parse a column that lists answers with their scores or ranks, as in UltraFeedback or Nectar, into ScoredAnswers.
    Raises InputError if there are fewer than two, or one lacks its text or number.

    Args:
        row: the row.
        column: the column.
        text_field: the entry's field with the answer.
        score_field: the entry's field with the score.
        score_sign: 1 if a higher score is better, -1 if a lower one is.
    """
    entries = row.data[column]
    if not isinstance(entries, list) or len(entries) < 2:
        raise build_pair_error(row.data, column, "not a list of two or more answers")
    answers = list[ScoredAnswer]()
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get(text_field), str):
            raise build_pair_error(row.data, f"{column}[{i}].{text_field}", "missing or not a text")
        number = score_sign * require_number(row.data, f"{column}[{i}].{score_field}", entry.get(score_field))
        about = {name: value for name, value in entry.items() if name != text_field and value is not None}
        answers.append(ScoredAnswer(row, to_answer(entry[text_field]), number, about))
    return answers


def pair_helpsteer_rows(rows: Sequence[Row]) -> Iterator[ParsedPair]:
    """Yield a preference pair for every two HelpSteer rows of one prompt, the more helpful answer preferred. A single
    row, a tie and equal answers yield a Drop."""
    if len(rows) == 1:
        yield Drop.UNPAIRED
    answers = list[ScoredAnswer]()
    for row in rows:
        with row.naming_errors():
            turns = to_answer(require_text(row.data, "response"))
            score = require_number(row.data, "helpfulness", row.data["helpfulness"])
            answers.append(ScoredAnswer(row, turns, score, find_unread_columns(row, HELPSTEER)))
    yield from pair_all(answers, parse_prompt(rows[0].data, "prompt"))


def pair_all(answers: Sequence[ScoredAnswer], prompt: Messages, has_margins: bool = True) -> Iterator[ParsedPair]:
    """Yield a preference pair for every two answers to one prompt, the higher score preferred, all in one group. A tie
    and equal answers yield a Drop.

    Args:
        answers: two or more answers.
        prompt: the prompt.
        has_margins: differences of scores are margins.
    """
    group = answers[0].row.name
    for pair in combinations(enumerate(answers), 2):
        (i, better), (j, worse) = sorted(pair, key=lambda answer: -answer[1].score)
        if better.score == worse.score:
            yield Drop.TIE
        elif better.turns == worse.turns:
            yield Drop.IDENTICAL
        else:
            margin = better.score - worse.score if has_margins else None
            with better.row.naming_errors():
                record = build_preference(
                    better.row, prompt, better.turns, worse.turns, margin, f"{group}/{i}>{j}", group
                )
            about = {"chosen": dict(better.other_fields), "rejected": dict(worse.other_fields)}
            yield record, {side: fields for side, fields in about.items() if fields}


def parse_compared_pair(
    row: Row, question_name: str, first_column: str, second_column: str, verdict_column: str
) -> ParsedPair:
    """Parse a row of two answers and a verdict from -3 (the first is much better) to 3 (the second is much better) into
    a preference pair. Its margin is the absolute verdict. Returns a Drop for a tie or equal answers.

    Args:
        row: the row.
        question_name: the question column.
        first_column, second_column: the answer columns.
        verdict_column: the verdict column.
    """
    answers = [to_answer(require_text(row.data, name)) for name in (first_column, second_column)]
    verdict = require_number(row.data, verdict_column, row.data[verdict_column])
    if not -3 <= verdict <= 3:
        raise build_pair_error(row.data, verdict_column, "outside -3 … 3")
    if verdict == 0:
        return Drop.TIE
    if answers[0] == answers[1]:
        return Drop.IDENTICAL
    better, worse = answers if verdict < 0 else reversed(answers)
    return build_preference(row, parse_prompt(row.data, question_name), better, worse, abs(verdict)), {}


def get_text(data: Fields, column: str) -> str:
    """Return the value of a row's column as text, or an empty text if it is null or missing."""
    value = data.get(column)
    return "" if value is None else str(value)


def to_answer(text: str) -> Messages:
    """Return a text as a tuple of one assistant message."""
    return (Message("assistant", text),)


def build_preference(
    row: Row,
    prompt: Messages,
    chosen: Messages,
    rejected: Messages,
    margin: float | None,
    id: str = "",
    group: str = "",
) -> Preference:
    """Build a Preference from its prompt and answers, with attributes such as `annotator` from the row's other columns.

    Args:
        row: the row.
        prompt, chosen, rejected: the turns.
        margin: how much better the chosen answer is, if known.
        id: empty to use the row's `id` or `prompt_id`, else its place.
        group: the group unless the row has a `group_id`.

    Raises:
        InputError: `strength` is not an integer, or tools and calls do not match.
    """
    data = row.data
    strength = data.get("strength")
    if strength is not None and type(strength) is not int:
        raise build_pair_error(data, "strength", "not a whole number")
    tools = parse_tools(data)
    for answer_name, answer in (("chosen", chosen), ("rejected", rejected)):
        parts = (("prompt", prompt), (answer_name, answer))
        check_tool_calls([(f"{name}[{i}]", turn) for name, part in parts for i, turn in enumerate(part)], tools)
    texts: dict[str, Any] = {
        name: get_text(data, name) for name in ("annotator", "guideline_version", "created_at", "scorer")
    }
    return Preference(
        prompt,
        chosen,
        rejected,
        id=id or get_text(data, "id") or get_text(data, "prompt_id") or row.name,
        group_id=get_text(data, "group_id") or group,
        margin=margin,
        source=get_text(data, "source") if "source" in data else row.name.rsplit(":", 1)[0],
        strength=strength,
        **{name: data.get(name) is not False for name in ENDED_FLAGS},
        **texts,
        tools=tools,
    )


def parse_pair_messages(data: Fields, column: str, value: Any) -> Messages:
    """Parse a column's list of `{role, content}` or ShareGPT's `{from, value}` into messages. Raises InputError for
    anything else."""
    if not isinstance(value, list) or not value:
        raise build_pair_error(data, column, "neither a text nor a list of messages")
    return tuple(message for _, message in parse_sharegpt(value, column))


def parse_prompt(data: Fields, column: str) -> Messages:
    """Parse a pair's prompt from a column that holds messages, a transcript or a plain question. The row's system
    prompt comes first. Raises InputError if the prompt is empty or ends with an answer."""
    value = data.get(column)
    if column == "instruction" and isinstance(value, str):
        turns = tuple(message for place, message in parse_alpaca(data) if place not in ("output", "response"))
    elif isinstance(value, str):
        turns = parse_transcript(value)
    else:
        turns = parse_pair_messages(data, column, value)
    turns = with_system_column(turns, data)
    if turns[-1] == Message("assistant", ""):  # HH and Nectar end a prompt with "Assistant:"
        turns = turns[:-1]
    if not turns or turns[-1].role == "assistant" or not any(turn.content.strip() for turn in turns):
        raise build_pair_error(data, column, "it holds no question to answer")
    return turns


def count_shared_turns(data: Fields, chosen: Messages, rejected: Messages) -> int:
    """Return the number of leading turns that two conversations share before the two answers that differ. Raises
    InputError if they share none."""
    limit = min(len(chosen), len(rejected)) - 1
    count = next((i for i in range(limit) if chosen[i] != rejected[i]), limit)
    while count > 0 and not chosen[count].role == rejected[count].role == "assistant":
        count -= 1
    if count == 0:
        problem = "it has no common beginning with rejected"
        raise build_pair_error(data, "chosen", problem, "Give the prompt in a column of its own.")
    return count


def write_preferences(path: str | Path, prefs: Sequence[Preference]) -> None:
    """Write preference pairs to a JSON Lines file in TRL's conversational form, compressed if its name ends in `.gz`.
    Creates the folder. The same pairs give the same bytes.

    Raises:
        StorageError: the file cannot be written.
    """
    path = Path(path)
    text = "".join(json.dumps(to_trl_row(pref), ensure_ascii=False) + "\n" for pref in prefs)
    blob = text.encode("utf-8", "backslashreplace")  # half a surrogate pair becomes its JSON escape
    if path.suffix == ".gz":
        blob = gzip.compress(blob, mtime=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, blob)
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        raise StorageError("path", str(path), problem, "Choose a folder with room that you can write to.") from error


def to_trl_row(pref: Preference) -> Mapping[str, Any]:
    """Return a preference pair as a row in TRL's conversational form. A pair without margin has no column `margin`, as
    TRL uses margins if the column exists, and one without posterior no column `posterior`."""
    row: dict[str, Any] = {
        name: [turn.as_dict() for turn in getattr(pref, name)] for name in MESSAGE_ATTRIBUTES[Preference]
    }
    names = ("id", "group_id", "annotator", "source", "strength", "guideline_version", "created_at")
    row |= {name: getattr(pref, name) for name in names}
    row |= {name: False for name in ENDED_FLAGS if not getattr(pref, name)}  # the default is True
    if pref.scorer:
        row["scorer"] = pref.scorer
    if pref.tools:
        row["tools"] = [tool.as_dict() for tool in pref.tools]
    row |= {name: getattr(pref, name) for name in ("margin", "posterior") if getattr(pref, name) is not None}
    return row
