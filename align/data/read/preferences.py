"""Preference files: the field's formats in, TRL's conversational form out.

Each row is recognised by its columns:

    chosen rejected [prompt|question]                 TRL (messages or plain strings), UltraFeedback binarised, the
                                                      implicit form (whole conversations), HH transcripts, Orca pairs
    conversations chosen{} rejected{}                 LLaMA-Factory: a conversation, and two last turns
    instruction [input] chosen rejected               LLaMA-Factory
    prompt response helpfulness                       HelpSteer: neighbouring rows with one prompt are paired
    prompt response_1 response_2 preference_strength  HelpSteer2's preferences
    prompt chosen[] rejected[]                        RewardBench 2: one right answer and several wrong ones, or several
    context response1 response2 overall_preference    HelpSteer3
    prompt answers[{answer, rank}]                    K-wise rankings (Nectar), rank 1 the best
    instruction completions[{response, overall_score}]   UltraFeedback: the higher score is the better answer

Two answers and a verdict on them, as arenas, judges and annotators write them:

    prompt response_a response_b winner             also answer_, completion_, output_, conversation_; _1 _2; _0 _1
    conversation_a conversation_b winner            LMSYS's arena: whole conversations
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
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

from align.core.errors import InputError, StorageError
from align.core.outputs import replace_file
from align.core.types import Message, Preference
from align.data.read.columns import unread_columns
from align.data.read.content import ENDED, PARTS, PREFERENCES
from align.data.read.documents import alpaca, share_gpt
from align.data.read.drops import Drop, RefusedSource
from align.data.read.messages import (
    HH_TURN,
    Fields,
    check_calls,
    check_row,
    displayed,
    tools_of,
    transcript,
    with_system_column,
)
from align.data.read.rows import Row
from align.data.read.shapes import (
    HELPSTEER,
    JUDGED,
    SCORED,
    WINNERS,
    JudgedColumns,
    is_helpsteer,
    judged_columns_of,
    nearest_shape,
    question_column,
    read_label,
    recognised,
)
from align.data.read.text_formats import check_values

Messages = tuple[Message, ...]
Parsed = tuple[Preference, Fields] | Drop
"""A pair, and what else its row says of each of its answers."""
HELP = "A row holds prompt, chosen and rejected, or the columns of HH, UltraFeedback, HelpSteer or Nectar."
WRITE = 'Write "{}" or "{}" for the better answer, or "tie".'
TIES = frozenset(["tie", "tied", "tie_(bothbad)", "both_bad", "bothbad", "both", "draw", "neither", "equal", "none"])
NAMED = re.compile(r"(?:model|response|answer|completion|output|conversation|assistant)_")
"""What may stand in front of an ending in a verdict: `model_a`."""


def row_error(row: Row, column: str, problem: str, remedy: str = HELP) -> InputError:
    name = column.split("[")[0]
    value = displayed(row.data[name]) if name in row.data else "(no such column)"
    return InputError(f"{row.where}, {column}", value, problem, remedy)


def text_in(row: Row, column: str) -> str:
    value = row.data.get(column)
    if not isinstance(value, str):
        raise row_error(row, column, "missing" if value is None else "not a text")
    return value


def figure_in(row: Row, column: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not -sys.float_info.max <= value <= sys.float_info.max:  # integers of JSON have no bounds
        raise row_error(row, column, "missing" if value is None else "not a finite number")
    return float(value)


def parse(group: Sequence[Row]) -> Iterator[Parsed]:
    """Yield the pairs of one row, or of neighbouring HelpSteer rows."""
    row = group[0]
    columns = row.data.keys()
    for each in group:
        check_row(each.data, each.where)
    shape = recognised(row.data)
    if is_helpsteer(row.data):
        yield from pair_neighbours(group)
    elif shape is SCORED:
        yield from pair_all(entries_of(row, "completions", "response", "overall_score", 1), question_column(row.data))
    elif {"chosen", "rejected"} <= columns and is_texts(row.data["rejected"]):
        yield from pair_right_and_wrong(row)
    elif {"chosen", "rejected"} <= columns:
        yield parse_pair(row)
    elif shape is JUDGED:
        yield parse_judged(row)
    elif {"prompt", "answers"} <= columns:
        # Ranks say in what order answers are, not by how much one is better.
        yield from pair_all(entries_of(row, "answers", "answer", "rank", -1), "prompt", margins=False)
    elif {"prompt", "response_1", "response_2", "preference_strength"} <= columns:
        yield parse_compared(row, "prompt", ("response_1", "response_2"), "preference_strength")
    elif {"context", "response1", "response2", "overall_preference"} <= columns:
        yield parse_compared(row, "context", ("response1", "response2"), "overall_preference")
    else:
        column = "rejected" if "chosen" in columns else "chosen"
        problem = f"missing (the row has {', '.join(sorted(columns)) or 'no columns'})"
        raise row_error(row, column, problem, nearest_shape(row.data, (PREFERENCES,)) + HELP)


def parse_pair(row: Row) -> Parsed:
    chosen = row.data["chosen"]
    rejected = row.data["rejected"]
    asking = question_column(row.data) or "prompt"
    prompt = row.data.get(asking)
    for column, value in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, str | list | dict):
            raise row_error(row, column, "missing" if value is None else "neither a text nor a list of messages")
    if type(chosen) is not type(rejected):
        raise row_error(row, "rejected", "not of the same form as chosen")
    if isinstance(chosen, str) and prompt is None:
        for column in ("chosen", "rejected"):
            if not HH_TURN.match(row.data[column].lstrip(" ")):
                problem = f"missing, and {column} is no transcript (\\n\\nHuman: … \\n\\nAssistant: …)"
                raise row_error(row, "prompt", problem)
        better, worse = transcript(chosen), transcript(rejected)
    elif isinstance(chosen, str):
        better, worse = (Message("assistant", chosen),), (Message("assistant", rejected),)
    else:
        better, worse = (
            as_messages(row, column, [value] if isinstance(value, dict) else value)
            for column, value in (("chosen", chosen), ("rejected", rejected))
        )
    for column, turns in (("chosen", better), ("rejected", worse)):
        if turns[-1].role != "assistant":
            raise row_error(row, column, f"it ends with a {turns[-1].role} turn, so there is no answer to judge")
    if better == worse:
        return Drop.IDENTICAL
    if better[0].role == worse[0].role == "assistant":
        if prompt is None:
            raise row_error(row, "prompt", "missing")
        asked = as_prompt(row, asking, prompt)
    else:
        shared = count_shared(row, better, worse)
        asked = with_system_column(better[:shared], row.data, row.where)
        better = better[shared:]
        worse = worse[shared:]
        # A list names its messages and must be right; a string (UltraFeedback) repeats one of them, as a caption,
        # and so do `messages` that one of the answers ends.
        named = as_messages(row, asking, prompt) if isinstance(prompt, list) and asking != "messages" else ()
        if named and asked[-len(named) :] != named:
            raise row_error(row, asking, "not what chosen and rejected share")
    margin, high, low = (row.data.get(column) for column in ("margin", "score_chosen", "score_rejected"))
    if margin is not None:
        margin = figure_in(row, "margin", margin)
    elif high is not None and low is not None:  # UltraFeedback's
        margin = figure_in(row, "score_chosen", high) - figure_in(row, "score_rejected", low)
    return preference_of(row, asked, better, worse, margin), {}


def parse_judged(row: Row) -> Parsed:
    """Return the pair of two answers and a verdict that names the better one."""
    columns = judged_columns_of(row.data)
    assert columns is not None
    verdict = read_verdict(row.data, columns)
    name = columns.verdict[0]
    remedy = WRITE.format(*columns.endings)
    if is_unclear_code(row.data[name], columns):
        problem = "may be the first answer, a tie or a degree"
        raise RefusedSource(f"{row.where}, {name}", displayed(row.data[name]), problem, remedy)
    if verdict is None:
        problem = f"neither of the answers {' and '.join(columns.answers)}, nor a tie"
        raise row_error(row, name, problem, remedy)
    if verdict == 0:
        return Drop.TIE
    answers: list[Any] = [row.data[name] for name in columns.answers]
    pair = {name: value for name, value in row.data.items() if name not in columns.answers}
    lists = [parse_texts(value) for value in (row.data.get("prompt"), *answers)]
    if columns.verdict == WINNERS and all(lists):  # the Kaggle form of LMSYS's arena
        pair.pop("prompt")
        try:
            answers = [interleave(lists[0], texts) for texts in lists[1:]]
        except ValueError as error:
            problem = "a list of texts of another length than the prompt's"
            raise row_error(row, columns.answers[0], problem) from error
    chosen, rejected = answers if verdict < 0 else reversed(answers)
    pair |= {"chosen": chosen, "rejected": rejected}
    if columns.verdict == WINNERS:
        check_values(pair, row.where)  # texts out of JSON in a text, which was not looked into before
    return parse_pair(row._replace(data=pair))


def read_verdict(row: Fields, columns: JudgedColumns) -> int | None:
    """Return which answer is better: -1 the first, 1 the second, 0 neither; None if that cannot be read.

    A number names the column that ends with it. Answers a and b are 1 and 2; 1.5 is in the middle. A text is an ending,
    a column, a model's name, or a tie.
    """
    if columns.verdict == WINNERS:
        first, second = (read_label(row[name]) for name in WINNERS)
        tie = read_label(row.get("winner_tie", False))
        if None in (first, second, tie) or bool(first) + bool(second) + bool(tie) > 1:
            return None
        return bool(second) - bool(first)
    value = row[columns.verdict[0]]
    if isinstance(value, str):
        models = [row.get("model_a"), row.get("model_b")]
        if value in models and models[0] != models[1]:
            return -1 if value == models[0] else 1
        words = re.sub(r"[ -]", "_", value.strip().strip("[]").casefold())
        if words in TIES:
            return 0
        value = NAMED.sub("", words)
        if value in columns.endings:
            return -1 if value == columns.endings[0] else 1
    places = {0.0: -1, 1.0: 1} if columns.endings == ("0", "1") else {1.0: -1, 1.5: 0, 2.0: 1}
    number = None if isinstance(value, bool) else as_number(value)
    return None if number is None else places.get(number)


def is_unclear_code(value: Any, columns: JudgedColumns) -> bool:
    """Return whether a verdict is a number that can be a code of another kind: 0 may be the first of two answers, or a
    tie, and a negative number a degree."""
    number = as_number(value)
    return number is not None and number <= 0 and columns.endings != ("0", "1") and columns.verdict != WINNERS


def as_number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def parse_texts(value: Any) -> list[str]:
    """Return a list of texts, which may stand as its JSON text; an empty list for anything else. A null is an empty
    text."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    if not isinstance(value, list) or not all(isinstance(text, str | None) for text in value):
        return []
    return [text or "" for text in value]


def interleave(asked: Sequence[str], answered: Sequence[str]) -> list[dict[str, str]]:
    """Return the turns of a conversation."""
    return [
        {"role": role, "content": text}
        for texts in zip(asked, answered, strict=True)
        for role, text in zip(("user", "assistant"), texts, strict=True)
    ]


def is_texts(value: Any) -> bool:
    """Return whether a column is a list of texts, and no list of messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def pair_right_and_wrong(row: Row) -> Iterator[Parsed]:
    """Yield each right answer over each wrong one, as one group."""
    right = [row.data["chosen"]] if isinstance(row.data["chosen"], str) else row.data["chosen"]
    if not is_texts(right):
        raise row_error(row, "chosen", "neither a text nor a list of texts, as rejected is one")
    asking = question_column(row.data) or "prompt"
    prompt = as_prompt(row, asking, row.data.get(asking))
    name = label_in(row, "id") or row.name
    if "source" not in row.data and "subset" in row.data:  # as RewardBench calls it
        row = row._replace(data={**row.data, "source": row.data["subset"]})
    for (i, better), (j, worse) in product(enumerate(right), enumerate(row.data["rejected"])):
        if better == worse:
            yield Drop.IDENTICAL
        else:
            yield pair_of_texts(row, prompt, better, worse, None, f"{name}/{i}>{j}", name), {}


class ScoredAnswer(NamedTuple):
    """An answer to a prompt that several answer.

    Attributes:
        row: that it stands in.
        score: how good it is: higher is better.
        about: what else is said of it.
    """

    row: Row
    text: str
    score: float
    about: Fields


def entries_of(row: Row, column: str, text: str, score: str, sign: int) -> list[ScoredAnswer]:
    """Return the entries of a list of answers, each with what else it says."""
    entries = row.data[column]
    if not isinstance(entries, list) or len(entries) < 2:
        raise row_error(row, column, "not a list of two or more answers")
    answers = list[ScoredAnswer]()
    for k, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get(text), str):
            raise row_error(row, f"{column}[{k}].{text}", "missing or not a text")
        figure = sign * figure_in(row, f"{column}[{k}].{score}", entry.get(score))
        about = {name: value for name, value in entry.items() if name != text and value is not None}
        answers.append(ScoredAnswer(row, entry[text], figure, about))
    return answers


def pair_neighbours(rows: Sequence[Row]) -> Iterator[Parsed]:
    """Yield the pairs of HelpSteer's rows on one prompt."""
    if len(rows) == 1:
        yield Drop.UNPAIRED
    answers = [
        ScoredAnswer(
            row,
            text_in(row, "response"),
            figure_in(row, "helpfulness", row.data["helpfulness"]),
            unread_columns(row, HELPSTEER),
        )
        for row in rows
    ]
    yield from pair_all(answers, "prompt")


def pair_all(answers: Sequence[ScoredAnswer], asking: str, margins: bool = True) -> Iterator[Parsed]:
    """Yield every pair of answers to one prompt, as one group.

    Args:
        asking: the column that holds the prompt.
        margins: whether differences of scores say how much better an answer is.
    """
    first = answers[0].row
    prompt = as_prompt(first, asking, first.data[asking])
    for pair in combinations(enumerate(answers), 2):
        (i, better), (j, worse) = sorted(pair, key=lambda answer: -answer[1].score)
        if better.score == worse.score:
            yield Drop.TIE
        elif better.text == worse.text:
            yield Drop.IDENTICAL
        else:
            margin = better.score - worse.score if margins else None
            name = f"{first.name}/{i}>{j}"
            record = pair_of_texts(better.row, prompt, better.text, worse.text, margin, name, first.name)
            about = {"chosen": dict(better.about), "rejected": dict(worse.about)}
            yield record, {side: said for side, said in about.items() if said}


def parse_compared(row: Row, asking: str, answers: tuple[str, str], column: str) -> Parsed:
    """Return the pair of two answers and a verdict from -3, the first is much better, to 3, the second is."""
    first, second = (text_in(row, name) for name in answers)
    verdict = figure_in(row, column, row.data[column])
    if not -3 <= verdict <= 3:
        raise row_error(row, column, "outside -3 … 3")
    if verdict == 0:
        return Drop.TIE
    if first == second:
        return Drop.IDENTICAL
    best, worst = (first, second) if verdict < 0 else (second, first)
    return pair_of_texts(row, as_prompt(row, asking, row.data[asking]), best, worst, abs(verdict)), {}


def label_in(row: Row, column: str) -> str:
    value = row.data.get(column)
    return "" if value is None else str(value)


def pair_of_texts(
    row: Row, prompt: Messages, chosen: str, rejected: str, margin: float | None, id: str = "", group: str = ""
) -> Preference:
    said_one, said_other = ((Message("assistant", text),) for text in (chosen, rejected))
    return preference_of(row, prompt, said_one, said_other, margin, id, group)


def preference_of(
    row: Row,
    prompt: Messages,
    chosen: Messages,
    rejected: Messages,
    margin: float | None,
    id: str = "",
    group: str = "",
) -> Preference:
    strength = row.data.get("strength")
    if strength is not None and type(strength) is not int:
        raise row_error(row, "strength", "not a whole number")
    tools = tools_of(row.data, row.where)
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        sides = (("prompt", prompt), (side, answer))
        check_calls([(f"{name}[{i}]", turn) for name, part in sides for i, turn in enumerate(part)], tools, row.where)
    texts: dict[str, Any] = {
        name: label_in(row, name) for name in ("annotator", "guideline_version", "created_at", "scorer")
    }
    return Preference(
        prompt,
        chosen,
        rejected,
        id=id or label_in(row, "id") or label_in(row, "prompt_id") or row.name,
        group_id=label_in(row, "group_id") or group,
        margin=margin,
        source=label_in(row, "source") if "source" in row.data else row.name.rsplit(":", 1)[0],
        strength=strength,
        **{name: row.data.get(name) is not False for name in ENDED},
        **texts,
        tools=tools,
    )


def as_messages(row: Row, column: str, value: Any) -> Messages:
    """Return a list of `{role, content}`, checked."""
    if not isinstance(value, list) or not value:
        raise row_error(row, column, "neither a text nor a list of messages")
    return tuple(message for _, message in share_gpt(value, row.where, column))


def as_prompt(row: Row, column: str, value: Any) -> Messages:
    """Return a prompt from messages, a transcript or a plain question; it ends before the assistant's turn."""
    if column == "instruction" and isinstance(value, str):
        turns = tuple(message for place, message in alpaca(row.data, row.where) if place not in ("output", "response"))
    elif isinstance(value, str):
        turns = transcript(value)
    else:
        turns = as_messages(row, column, value)
    turns = with_system_column(turns, row.data, row.where)
    if turns[-1] == Message("assistant", ""):  # HH and Nectar end a prompt with "Assistant:"
        turns = turns[:-1]
    if not turns or turns[-1].role == "assistant" or not any(turn.content.strip() for turn in turns):
        raise row_error(row, column, "it holds no question to answer")
    return turns


def count_shared(row: Row, chosen: Messages, rejected: Messages) -> int:
    """Return how many turns two whole conversations share: up to the last assistant turn from which both can go on."""
    last = min(len(chosen), len(rejected)) - 1
    count = next((i for i in range(last) if chosen[i] != rejected[i]), last)
    while count > 0 and not chosen[count].role == rejected[count].role == "assistant":
        count -= 1
    if count == 0:
        problem = "it shares no beginning with rejected"
        raise row_error(row, "chosen", problem, "Give the prompt in a column of its own.")
    return count


def write_preferences(path: str | Path, prefs: Sequence[Preference]) -> None:
    """Write JSON Lines (packed if the name ends in `.gz`) in TRL's conversational form; the same pairs, same bytes.

    Raises:
        StorageError: the file cannot be written.
    """
    path = Path(path)
    text = "".join(json.dumps(as_row(pref), ensure_ascii=False) + "\n" for pref in prefs)
    blob = text.encode("utf-8", "backslashreplace")  # half a surrogate pair becomes the very escape that JSON has
    if path.suffix == ".gz":
        blob = gzip.compress(blob, mtime=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, blob)
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        raise StorageError("path", str(path), problem, "Choose a folder with room that you can write to.") from error


def as_row(pref: Preference) -> Mapping[str, Any]:
    """Return a pair as a row. `margin` is left out if nobody gave one: TRL takes the column's presence for its use."""
    row: dict[str, Any] = {name: [turn.as_dict() for turn in getattr(pref, name)] for name in PARTS[Preference]}
    names = ("id", "group_id", "annotator", "source", "strength", "guideline_version", "created_at")
    row |= {name: getattr(pref, name) for name in names}
    row |= {name: False for name in ENDED if not getattr(pref, name)}  # True is the rule
    if pref.scorer:
        row["scorer"] = pref.scorer
    if pref.tools:
        row["tools"] = [tool.as_dict() for tool in pref.tools]
    if pref.margin is not None:
        row["margin"] = pref.margin
    return row
