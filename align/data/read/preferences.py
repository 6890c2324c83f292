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
    NOT_READ_OF_ROWS,
    Fields,
    as_turns,
    check_calls,
    check_read,
    displayed,
    tools_of,
    transcript,
    with_system_column,
)
from align.data.read.rows import Row
from align.data.read.shapes import (
    HELPSTEER,
    HELPSTEER2,
    HELPSTEER3,
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


def field_error(data: Fields, column: str, problem: str, remedy: str = HELP) -> InputError:
    name = column.split("[")[0]
    return InputError(column, displayed(data[name]) if name in data else "(no such column)", problem, remedy)


def text_in(data: Fields, column: str) -> str:
    value = data.get(column)
    if not isinstance(value, str):
        raise field_error(data, column, "missing" if value is None else "not a text")
    return value


def figure_in(data: Fields, column: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not -sys.float_info.max <= value <= sys.float_info.max:  # integers of JSON have no bounds
        raise field_error(data, column, "missing" if value is None else "not a finite number")
    return float(value)


def parse(group: Sequence[Row]) -> Iterator[Parsed]:
    """Yield the pairs of one row, or of neighbouring HelpSteer rows."""
    for row in group:
        with row.naming_errors():
            check_read(row.data, NOT_READ_OF_ROWS)
    with group[0].naming_errors():
        yield from pair_neighbours(group) if is_helpsteer(group[0].data) else parse_row(group[0])


def parse_row(row: Row) -> Iterator[Parsed]:
    """Yield the pairs of one row."""
    data = row.data
    shape = recognised(data)
    if shape is SCORED:
        asking = question_column(data)
        yield from pair_all(entries_of(row, "completions", "response", "overall_score", 1), as_prompt(data, asking))
    elif {"chosen", "rejected"} <= data.keys() and is_texts(data["rejected"]):
        yield from pair_right_and_wrong(row)
    elif {"chosen", "rejected"} <= data.keys():
        yield parse_pair(row)
    elif shape is JUDGED:
        yield parse_judged(row)
    elif {"prompt", "answers"} <= data.keys():
        # Ranks say in what order answers are, not by how much one is better.
        yield from pair_all(entries_of(row, "answers", "answer", "rank", -1), as_prompt(data, "prompt"), margins=False)
    elif compared := next((shape for shape in (HELPSTEER2, HELPSTEER3) if data.keys() >= {*shape.needs}), None):
        yield parse_compared(row, *compared.needs)
    else:
        problem = f"missing (the row has {', '.join(sorted(data)) or 'no columns'})"
        remedy = nearest_shape(data, (PREFERENCES,)) + HELP
        raise field_error(data, "rejected" if "chosen" in data else "chosen", problem, remedy)


def parse_pair(row: Row) -> Parsed:
    data = row.data
    chosen = data["chosen"]
    rejected = data["rejected"]
    asking = question_column(data) or "prompt"
    prompt = data.get(asking)
    for column, value in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, str | list | dict):
            raise field_error(data, column, "missing" if value is None else "neither a text nor a list of messages")
    if type(chosen) is not type(rejected):
        raise field_error(data, "rejected", "not of the same form as chosen")
    if isinstance(chosen, str) and prompt is None:
        for column in ("chosen", "rejected"):
            if not HH_TURN.match(data[column].lstrip(" ")):
                problem = f"missing, and {column} is no transcript (\\n\\nHuman: … \\n\\nAssistant: …)"
                raise field_error(data, "prompt", problem)
        better, worse = transcript(chosen), transcript(rejected)
    elif isinstance(chosen, str):
        better, worse = (Message("assistant", chosen),), (Message("assistant", rejected),)
    else:
        better, worse = (
            as_messages(data, column, [value] if isinstance(value, dict) else value)
            for column, value in (("chosen", chosen), ("rejected", rejected))
        )
    for column, turns in (("chosen", better), ("rejected", worse)):
        if turns[-1].role != "assistant":
            raise field_error(data, column, f"it ends with a {turns[-1].role} turn, so there is no answer to judge")
    if better == worse:
        return Drop.IDENTICAL
    if better[0].role == worse[0].role == "assistant":
        if prompt is None:
            raise field_error(data, "prompt", "missing")
        asked = as_prompt(data, asking)
    else:
        shared = count_shared(data, better, worse)
        asked = with_system_column(better[:shared], data)
        better = better[shared:]
        worse = worse[shared:]
        # A list names its messages and must be right; a string (UltraFeedback) repeats one of them, as a caption,
        # and so do `messages` that one of the answers ends.
        named = as_messages(data, asking, prompt) if isinstance(prompt, list) and asking != "messages" else ()
        if named and asked[-len(named) :] != named:
            raise field_error(data, asking, "not what chosen and rejected share")
    margin, high, low = (data.get(column) for column in ("margin", "score_chosen", "score_rejected"))
    if margin is not None:
        margin = figure_in(data, "margin", margin)
    elif high is not None and low is not None:  # UltraFeedback's
        margin = figure_in(data, "score_chosen", high) - figure_in(data, "score_rejected", low)
    return preference_of(row, asked, better, worse, margin), {}


def parse_judged(row: Row) -> Parsed:
    """Return the pair of two answers and a verdict that names the better one."""
    data = row.data
    columns = judged_columns_of(data)
    assert columns is not None
    verdict = read_verdict(data, columns)
    name = columns.verdict[0]
    remedy = WRITE.format(*columns.endings)
    number = as_number(data[name])
    if number is not None and number <= 0 and columns.endings != ("0", "1") and columns.verdict != WINNERS:
        # A code of another kind: 0 may be the first of two answers, or a tie, and a negative number a degree.
        problem = "may be the first answer, a tie or a degree"
        raise RefusedSource(name, displayed(data[name]), problem, remedy)
    if verdict is None:
        problem = f"neither of the answers {' and '.join(columns.answers)}, nor a tie"
        raise field_error(data, name, problem, remedy)
    if verdict == 0:
        return Drop.TIE
    answers: list[Any] = [data[name] for name in columns.answers]
    pair = {name: value for name, value in data.items() if name not in columns.answers}
    lists = [parse_texts(value) for value in (data.get("prompt"), *answers)]
    if columns.verdict == WINNERS and all(lists):  # the Kaggle form of LMSYS's arena
        del pair["prompt"]
        if len({*map(len, lists)}) > 1:
            raise field_error(data, columns.answers[0], "a list of texts of another length than the prompt's")
        answers = [as_turns(zip(lists[0], texts, strict=True)) for texts in lists[1:]]
    chosen, rejected = answers if verdict < 0 else reversed(answers)
    pair |= {"chosen": chosen, "rejected": rejected}
    if columns.verdict == WINNERS:
        check_values(pair)  # texts out of JSON in a text, which was not looked into before
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


def is_texts(value: Any) -> bool:
    """Return whether a column is a list of texts, and no list of messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def pair_right_and_wrong(row: Row) -> Iterator[Parsed]:
    """Yield each right answer over each wrong one, as one group."""
    right = [row.data["chosen"]] if isinstance(row.data["chosen"], str) else row.data["chosen"]
    if not is_texts(right):
        raise field_error(row.data, "chosen", "neither a text nor a list of texts, as rejected is one")
    prompt = as_prompt(row.data, question_column(row.data) or "prompt")
    name = label_in(row.data, "id") or row.name
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
        raise field_error(row.data, column, "not a list of two or more answers")
    answers = list[ScoredAnswer]()
    for k, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get(text), str):
            raise field_error(row.data, f"{column}[{k}].{text}", "missing or not a text")
        figure = sign * figure_in(row.data, f"{column}[{k}].{score}", entry.get(score))
        about = {name: value for name, value in entry.items() if name != text and value is not None}
        answers.append(ScoredAnswer(row, entry[text], figure, about))
    return answers


def pair_neighbours(rows: Sequence[Row]) -> Iterator[Parsed]:
    """Yield the pairs of HelpSteer's rows on one prompt."""
    if len(rows) == 1:
        yield Drop.UNPAIRED
    answers = list[ScoredAnswer]()
    for row in rows:
        with row.naming_errors():
            text = text_in(row.data, "response")
            score = figure_in(row.data, "helpfulness", row.data["helpfulness"])
            answers.append(ScoredAnswer(row, text, score, unread_columns(row, HELPSTEER)))
    yield from pair_all(answers, as_prompt(rows[0].data, "prompt"))


def pair_all(answers: Sequence[ScoredAnswer], prompt: Messages, margins: bool = True) -> Iterator[Parsed]:
    """Yield every pair of answers to one prompt, as one group.

    Args:
        margins: whether differences of scores say how much better an answer is.
    """
    group = answers[0].row.name
    for pair in combinations(enumerate(answers), 2):
        (i, better), (j, worse) = sorted(pair, key=lambda answer: -answer[1].score)
        if better.score == worse.score:
            yield Drop.TIE
        elif better.text == worse.text:
            yield Drop.IDENTICAL
        else:
            margin = better.score - worse.score if margins else None
            with better.row.naming_errors():
                record = pair_of_texts(better.row, prompt, better.text, worse.text, margin, f"{group}/{i}>{j}", group)
            about = {"chosen": dict(better.about), "rejected": dict(worse.about)}
            yield record, {side: said for side, said in about.items() if said}


def parse_compared(row: Row, asking: str, first: str, second: str, column: str) -> Parsed:
    """Return the pair of two answers and a verdict from -3, the first is much better, to 3, the second is."""
    answers = [text_in(row.data, name) for name in (first, second)]
    verdict = figure_in(row.data, column, row.data[column])
    if not -3 <= verdict <= 3:
        raise field_error(row.data, column, "outside -3 … 3")
    if verdict == 0:
        return Drop.TIE
    if answers[0] == answers[1]:
        return Drop.IDENTICAL
    best, worst = answers if verdict < 0 else reversed(answers)
    return pair_of_texts(row, as_prompt(row.data, asking), best, worst, abs(verdict)), {}


def label_in(data: Fields, column: str) -> str:
    value = data.get(column)
    return "" if value is None else str(value)


def pair_of_texts(
    row: Row, prompt: Messages, chosen: str, rejected: str, margin: float | None, id: str = "", group: str = ""
) -> Preference:
    chosen_turns = (Message("assistant", chosen),)
    rejected_turns = (Message("assistant", rejected),)
    return preference_of(row, prompt, chosen_turns, rejected_turns, margin, id, group)


def preference_of(
    row: Row,
    prompt: Messages,
    chosen: Messages,
    rejected: Messages,
    margin: float | None,
    id: str = "",
    group: str = "",
) -> Preference:
    data = row.data
    strength = data.get("strength")
    if strength is not None and type(strength) is not int:
        raise field_error(data, "strength", "not a whole number")
    tools = tools_of(data)
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        sides = (("prompt", prompt), (side, answer))
        check_calls([(f"{name}[{i}]", turn) for name, part in sides for i, turn in enumerate(part)], tools)
    texts: dict[str, Any] = {
        name: label_in(data, name) for name in ("annotator", "guideline_version", "created_at", "scorer")
    }
    return Preference(
        prompt,
        chosen,
        rejected,
        id=id or label_in(data, "id") or label_in(data, "prompt_id") or row.name,
        group_id=label_in(data, "group_id") or group,
        margin=margin,
        source=label_in(data, "source") if "source" in data else row.name.rsplit(":", 1)[0],
        strength=strength,
        **{name: data.get(name) is not False for name in ENDED},
        **texts,
        tools=tools,
    )


def as_messages(data: Fields, column: str, value: Any) -> Messages:
    """Return a list of `{role, content}`, checked."""
    if not isinstance(value, list) or not value:
        raise field_error(data, column, "neither a text nor a list of messages")
    return tuple(message for _, message in share_gpt(value, column))


def as_prompt(data: Fields, column: str) -> Messages:
    """Return a prompt from messages, a transcript or a plain question; it ends before the assistant's turn."""
    value = data.get(column)
    if column == "instruction" and isinstance(value, str):
        turns = tuple(message for place, message in alpaca(data) if place not in ("output", "response"))
    elif isinstance(value, str):
        turns = transcript(value)
    else:
        turns = as_messages(data, column, value)
    turns = with_system_column(turns, data)
    if turns[-1] == Message("assistant", ""):  # HH and Nectar end a prompt with "Assistant:"
        turns = turns[:-1]
    if not turns or turns[-1].role == "assistant" or not any(turn.content.strip() for turn in turns):
        raise field_error(data, column, "it holds no question to answer")
    return turns


def count_shared(data: Fields, chosen: Messages, rejected: Messages) -> int:
    """Return how many turns two whole conversations share: up to the last assistant turn from which both can go on."""
    last = min(len(chosen), len(rejected)) - 1
    count = next((i for i in range(last) if chosen[i] != rejected[i]), last)
    while count > 0 and not chosen[count].role == rejected[count].role == "assistant":
        count -= 1
    if count == 0:
        problem = "it shares no beginning with rejected"
        raise field_error(data, "chosen", problem, "Give the prompt in a column of its own.")
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
