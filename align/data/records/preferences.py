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
    response_a response_b winner                      two answers and a verdict (`judged_pairs`)
    instruction completions[{response, overall_score}]   UltraFeedback: the higher score is the better answer
"""

from __future__ import annotations

import gzip
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

from align.data.formats.rows import Row
from align.data.formats.values import check_values
from align.data.records.bad_rows import BadRows, RefusedSource
from align.data.records.column_rules import ColumnRules, UnreadColumns, unread_columns
from align.data.records.content import PREFERENCES
from align.data.records.documents import OURS, alpaca, count_unread, share_gpt
from align.data.records.drops import Drop
from align.data.records.grouping import grouped_rows
from align.data.records.judged_pairs import (
    WINNERS,
    WRITE,
    apply_verdict,
    find_judged_columns,
    is_unclear_code,
    read_verdict,
)
from align.data.records.messages import HH_TURN, check_row, transcript, with_system_column
from align.data.records.refusals import displayed
from align.data.records.shapes import (
    HELPSTEER,
    JUDGED,
    PAIRS,
    SCORED,
    is_helpsteer,
    nearest,
    question_column,
    recognised,
)
from align.data.records.tools import check_calls, tools_of
from align.data.tally import tally
from align.errors import InputError, StorageError, require
from align.outputs import replace_file
from align.types import Message, Preference

Messages = tuple[Message, ...]

HELP = "A row holds prompt, chosen and rejected, or the columns of HH, UltraFeedback, HelpSteer or Nectar."


@dataclass(frozen=True, slots=True)
class ReadReport:
    """What became of a file's rows. K-wise rows count once in `rows` and pair by pair in the others."""

    rows: int
    pairs: int
    identical: int
    ties: int
    unpaired: int


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row, and the errors that point at it."""

    data: Mapping[str, Any]
    where: str
    name: str

    def error(self, column: str, problem: str, remedy: str = HELP) -> InputError:
        name = column.split("[")[0]
        value = displayed(self.data[name]) if name in self.data else "(no such column)"
        return InputError(f"{self.where}, {column}", value, problem, remedy)

    def text(self, column: str) -> str:
        value = self.data.get(column)
        if not isinstance(value, str):
            raise self.error(column, "missing" if value is None else "not a text")
        return value

    def figure(self, column: str, value: Any) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not -sys.float_info.max <= value <= sys.float_info.max:  # integers of JSON have no bounds
            raise self.error(column, "missing" if value is None else "not a finite number")
        return float(value)

    def label(self, column: str) -> str:
        value = self.data.get(column)
        return "" if value is None else str(value)


def read_preferences(
    path: str | Path, field: str = "data.path", skips: bool = False, rules: ColumnRules = OURS
) -> list[Preference]:
    """The pairs of a file, see `read_with_report`; says how many were left out because no answer of theirs is
    preferred."""
    pairs, report = read_with_report(path, field, skips, rules)
    undecided = report.identical + report.ties + report.unpaired
    tally("dropped_undecided", undecided)
    if undecided:
        print(f"{undecided} pairs of {path} are left out: their answers are equal, tied or alone")
    return pairs


def read_with_report(
    path: str | Path, field: str = "data.path", skips: bool = False, rules: ColumnRules = OURS
) -> tuple[list[Preference], ReadReport]:
    """The pairs of a data set in its order, and what became of its rows.

    Args:
        path: see `align.data.formats.files.files_of`.
        field: what the user calls the data set.
        skips: rows that are refused are left out. Without, the data set is refused.
        rules: what the user says of columns.

    Raises:
        InputError: no such file, no row, no pair, a column that nothing reads, or a bad row: names file, row (from
            1) and column.
        CorruptFile: a file was cut or is damaged.
    """
    bad_rows = BadRows(skips)
    pairs: list[Preference] = []
    drops: Counter[Drop] = Counter()
    rows = 0
    unread = UnreadColumns(rules)
    for together in grouped_rows(path, field, bad_rows, rules):
        rows += len(together)
        with bad_rows:
            parsed = list(parse(together))  # all of a row, or nothing
            drops.update(drop for drop in parsed if isinstance(drop, Drop))
            pairs += [pair[0] for pair in parsed if not isinstance(pair, Drop)]
            for row in together:
                count_unread(unread, row, recognised(row.data) or PAIRS)
    bad_rows.settle(path, len(pairs) + sum(drops.values()))
    unread.check(field, str(path))
    require(rows > 0, field, str(path), "is empty", HELP)
    problem = f"none of its {rows} rows holds a preference ({', '.join(drop.value for drop in drops)})"
    require(bool(pairs), field, str(path), problem, "Name a file in which one answer was preferred.")
    unread.tell(path)
    return pairs, ReadReport(rows, len(pairs), drops[Drop.IDENTICAL], drops[Drop.TIE], drops[Drop.UNPAIRED])


Parsed = tuple[Preference, Mapping[str, Any]] | Drop
"""A pair, and what else its row says of each of its answers."""


def parse(group: Sequence[Row]) -> Iterator[Parsed]:
    """Yield the pairs of one row, or of neighbouring HelpSteer rows."""
    rows = [SourceRow(row.data, row.where, row.name) for row in group]
    row, columns = rows[0], rows[0].data.keys()
    for each in rows:
        check_row(each.data, each.where)
    shape = recognised(row.data)
    if is_helpsteer(row.data):
        yield from _helpsteer(rows, [unread_columns(each, HELPSTEER) for each in group])
    elif shape is SCORED:
        yield from _scored(row)
    elif {"chosen", "rejected"} <= columns and is_texts(row.data["rejected"]):
        yield from _right_and_wrong(row)
    elif {"chosen", "rejected"} <= columns:
        yield _alone(_pair(row))
    elif shape is JUDGED:
        yield _judged(row)
    elif {"prompt", "answers"} <= columns:
        yield from _k_wise(row)
    elif {"prompt", "response_1", "response_2", "preference_strength"} <= columns:
        yield _alone(_compared(row, "prompt", ("response_1", "response_2"), "preference_strength"))
    elif {"context", "response1", "response2", "overall_preference"} <= columns:
        yield _alone(_compared(row, "context", ("response1", "response2"), "overall_preference"))
    else:
        column = "rejected" if "chosen" in columns else "chosen"
        seen = f"missing (the row has {', '.join(sorted(columns)) or 'no columns'})"
        raise row.error(column, seen, nearest(row.data, (PREFERENCES,)) + HELP)


def _alone(pair: Preference | Drop) -> Parsed:
    return pair if isinstance(pair, Drop) else (pair, {})


def _pair(row: SourceRow) -> Preference | Drop:
    chosen, rejected = row.data["chosen"], row.data["rejected"]
    asking = question_column(row.data) or "prompt"
    prompt = row.data.get(asking)
    for column, value in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, str | list | dict):
            raise row.error(column, "missing" if value is None else "neither a text nor a list of messages")
    if type(chosen) is not type(rejected):
        raise row.error("rejected", "not of the same form as chosen")
    if isinstance(chosen, str) and prompt is None:
        for column in ("chosen", "rejected"):
            if not HH_TURN.match(row.data[column].lstrip(" ")):
                raise row.error("prompt", f"missing, and {column} is no transcript (\\n\\nHuman: … \\n\\nAssistant: …)")
        better, worse = transcript(chosen), transcript(rejected)
    elif isinstance(chosen, str):
        better, worse = (Message("assistant", chosen),), (Message("assistant", rejected),)
    else:
        better, worse = (as_messages(row, column, listed_turns(row.data[column])) for column in ("chosen", "rejected"))
    for column, turns in (("chosen", better), ("rejected", worse)):
        if turns[-1].role != "assistant":
            raise row.error(column, f"it ends with a {turns[-1].role} turn, so there is no answer to judge")
    if better == worse:
        return Drop.IDENTICAL
    if better[0].role == worse[0].role == "assistant":
        if prompt is None:
            raise row.error("prompt", "missing")
        asked = as_prompt(row, asking, prompt)
    else:
        asked, better, worse = split_shared(row, better, worse)
        asked = with_system_column(asked, row.data, row.where)
        # A list names its messages and must be right; a string (UltraFeedback) repeats one of them, as a caption,
        # and so do `messages` that one of the answers ends.
        named = as_messages(row, asking, prompt) if isinstance(prompt, list) and asking != "messages" else ()
        if named and asked[-len(named) :] != named:
            raise row.error(asking, "not what chosen and rejected share")
    return _preference(row, asked, (better, worse), _margin(row))


def _judged(row: SourceRow) -> Parsed:
    """Return the pair of two answers and a verdict that names the better one."""
    columns = find_judged_columns(tuple([name for name, value in row.data.items() if value is not None]))
    assert columns is not None
    verdict = read_verdict(row.data, columns)
    name = columns.verdict[0]
    if is_unclear_code(row.data, columns):
        problem = "may be the first answer, a tie or a degree"
        value = displayed(row.data[name])
        raise RefusedSource(f"{row.where}, {name}", value, problem, WRITE.format(*columns.endings))
    if verdict is None:
        problem = f"neither of the answers {' and '.join(columns.answers)}, nor a tie"
        raise row.error(name, problem, WRITE.format(*columns.endings))
    if verdict == 0:
        return Drop.TIE
    try:
        pair = apply_verdict(row.data, columns, better=int(verdict > 0))
    except ValueError as error:
        problem = "a list of texts of another length than the prompt's"
        raise row.error(columns.answers[0], problem) from error
    if columns.verdict == WINNERS:
        check_values(pair, row.where)  # texts out of JSON in a text, which was not looked into before
    return _alone(_pair(SourceRow(pair, row.where, row.name)))


def listed_turns(value: Any) -> Any:
    """Return one turn as a list of one; a list as it is."""
    return [value] if isinstance(value, dict) else value


def is_texts(value: Any) -> bool:
    """Whether a column is a list of texts, and no list of messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def _right_and_wrong(row: SourceRow) -> Iterator[Parsed]:
    """Each right answer over each wrong one, as one group."""
    right = [row.data["chosen"]] if isinstance(row.data["chosen"], str) else row.data["chosen"]
    if not is_texts(right):
        raise row.error("chosen", "neither a text nor a list of texts, as rejected is one")
    asking = question_column(row.data) or "prompt"
    prompt = as_prompt(row, asking, row.data.get(asking))
    name = row.label("id") or row.name
    if "source" not in row.data and "subset" in row.data:  # as RewardBench calls it
        row = SourceRow({**row.data, "source": row.data["subset"]}, row.where, row.name)
    for (i, better), (j, worse) in product(enumerate(right), enumerate(row.data["rejected"])):
        if better == worse:
            yield Drop.IDENTICAL
            continue
        turns = (Message("assistant", better),), (Message("assistant", worse),)
        yield _preference(row, prompt, turns, margin=None, id=f"{name}/{i}>{j}", group=name), {}


def _margin(row: SourceRow) -> float | None:
    """The margin given, or the difference of UltraFeedback's scores."""
    margin, high, low = (row.data.get(column) for column in ("margin", "score_chosen", "score_rejected"))
    if margin is None and high is not None and low is not None:
        return row.figure("score_chosen", high) - row.figure("score_rejected", low)
    return None if margin is None else row.figure("margin", margin)


class Judged(NamedTuple):
    """An answer to a prompt that several answer.

    Attributes:
        row: that it stands in.
        text: what it says.
        score: how good it is: higher is better.
        about: what else is said of it.
    """

    row: SourceRow
    text: str
    score: float
    about: Mapping[str, Any]


def _k_wise(row: SourceRow) -> Iterator[Parsed]:
    """Yield the pairs of a ranking. Ranks say in what order answers are, not by how much one is better."""
    for pair in _across(_entries(row, "answers", "answer", "rank", -1), "prompt"):
        yield pair if isinstance(pair, Drop) else (replace(pair[0], margin=None), pair[1])


def _scored(row: SourceRow) -> Iterator[Parsed]:
    """Yield the pairs of completions with scores."""
    yield from _across(_entries(row, "completions", "response", "overall_score", 1), question_column(row.data))


def _entries(row: SourceRow, column: str, text: str, score: str, sign: int) -> list[Judged]:
    """Return the entries of a list of answers, each with what else it says."""
    entries = row.data[column]
    if not isinstance(entries, list) or len(entries) < 2:
        raise row.error(column, "not a list of two or more answers")
    judged = list[Judged]()
    for k, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get(text), str):
            raise row.error(f"{column}[{k}].{text}", "missing or not a text")
        figure = sign * row.figure(f"{column}[{k}].{score}", entry.get(score))
        about = {name: value for name, value in entry.items() if name != text and value is not None}
        judged.append(Judged(row, entry[text], figure, about))
    return judged


def _helpsteer(rows: Sequence[SourceRow], about: Sequence[Mapping[str, Any]]) -> Iterator[Parsed]:
    if len(rows) == 1:
        yield Drop.UNPAIRED
    judged = [
        Judged(row, row.text("response"), row.figure("helpfulness", row.data["helpfulness"]), more)
        for row, more in zip(rows, about, strict=True)
    ]
    yield from _across(judged, "prompt")


def _across(judged: Sequence[Judged], asking: str) -> Iterator[Parsed]:
    """Yield every pair of answers to one prompt, as one group.

    Args:
        asking: the column that holds the prompt.
    """
    first = judged[0].row
    prompt = as_prompt(first, asking, first.data[asking])
    for pair in combinations(enumerate(judged), 2):
        (i, better), (j, worse) = sorted(pair, key=lambda answer: -answer[1].score)
        if better.score == worse.score:
            yield Drop.TIE
        elif better.text == worse.text:
            yield Drop.IDENTICAL
        else:
            turns = (Message("assistant", better.text),), (Message("assistant", worse.text),)
            name = f"{first.name}/{i}>{j}"
            record = _preference(
                better.row, prompt, turns, margin=better.score - worse.score, id=name, group=first.name
            )
            about = {"chosen": dict(better.about), "rejected": dict(worse.about)}
            yield record, {side: said for side, said in about.items() if said}


def _compared(row: SourceRow, asking: str, answers: tuple[str, str], column: str) -> Preference | Drop:
    """Return the pair of two answers and a verdict from -3, the first is much better, to 3, the second is."""
    first, second = (row.text(name) for name in answers)
    verdict = row.figure(column, row.data[column])
    if not -3 <= verdict <= 3:
        raise row.error(column, "outside -3 … 3")
    if verdict == 0:
        return Drop.TIE
    if first == second:
        return Drop.IDENTICAL
    best, worst = (first, second) if verdict < 0 else (second, first)
    turns = (Message("assistant", best),), (Message("assistant", worst),)
    return _preference(row, as_prompt(row, asking, row.data[asking]), turns, margin=abs(verdict))


def _preference(
    row: SourceRow,
    prompt: Messages,
    turns: tuple[Messages, Messages],
    margin: float | None,
    id: str = "",
    group: str = "",
) -> Preference:
    """The record; `turns` are the chosen and the rejected ones."""
    strength = row.data.get("strength")
    if strength is not None and type(strength) is not int:
        raise row.error("strength", "not a whole number")
    tools = tools_of(row.data, row.where)
    for side, answer in zip(("chosen", "rejected"), turns, strict=True):
        placed = [
            (f"{name}[{i}]", m) for name, part in (("prompt", prompt), (side, answer)) for i, m in enumerate(part)
        ]
        check_calls(placed, tools, row.where)
    return Preference(
        prompt,
        *turns,
        id=id or row.label("id") or row.label("prompt_id") or row.name,
        group_id=row.label("group_id") or group,
        margin=margin,
        annotator=row.label("annotator"),
        source=row.label("source") if "source" in row.data else row.name.rsplit(":", 1)[0],
        strength=strength,
        guideline_version=row.label("guideline_version"),
        created_at=row.label("created_at"),
        chosen_ended=row.data.get("chosen_ended") is not False,
        rejected_ended=row.data.get("rejected_ended") is not False,
        scorer=row.label("scorer"),
        tools=tools,
    )


def as_messages(row: SourceRow, column: str, value: Any) -> Messages:
    """A list of `{role, content}`, checked."""
    if not isinstance(value, list) or not value:
        raise row.error(column, "neither a text nor a list of messages")
    return tuple(message for _, message in share_gpt(value, row.where, column))


def as_prompt(row: SourceRow, column: str, value: Any) -> Messages:
    """A prompt from messages, a transcript or a plain question; ends before the assistant's turn."""
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
        raise row.error(column, "it holds no question to answer")
    return turns


def split_shared(row: SourceRow, chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """Whole conversations into what they share and how each goes on: from the last assistant turn at which both can."""
    last = min(len(chosen), len(rejected)) - 1
    n = next((i for i in range(last) if chosen[i] != rejected[i]), last)
    while n > 0 and not chosen[n].role == rejected[n].role == "assistant":
        n -= 1
    if n == 0:
        raise row.error("chosen", "it shares no beginning with rejected", "Give the prompt in a column of its own.")
    return chosen[:n], chosen[n:], rejected[n:]


def write_preferences(path: str | Path, prefs: Sequence[Preference]) -> None:
    """Writes JSON Lines (packed where the name ends in `.gz`) in TRL's conversational form; the same pairs, same bytes.

    `margin` is left out where nobody gave one: TRL takes the column's presence for its use.

    Raises:
        StorageError: the file cannot be written.
    """
    path = Path(path)
    text = "".join(json.dumps(_as_row(pref), ensure_ascii=False) + "\n" for pref in prefs)
    blob = text.encode(
        "utf-8", "backslashreplace"
    )  # half a surrogate pair becomes the very escape that JSON has for it
    if path.suffix == ".gz":
        blob = gzip.compress(blob, mtime=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, blob)
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        raise StorageError("path", str(path), problem, "Choose a folder with room that you can write to.") from error


def _as_row(pref: Preference) -> dict[str, Any]:
    turns = {name: [m.as_dict() for m in getattr(pref, name)] for name in ("prompt", "chosen", "rejected")}
    names = ("id", "group_id", "annotator", "source", "strength", "guideline_version", "created_at")
    row = {**turns, **{name: getattr(pref, name) for name in names}}
    row |= {name: False for name in ("chosen_ended", "rejected_ended") if not getattr(pref, name)}  # True is the rule
    row |= {"scorer": pref.scorer} if pref.scorer else {}
    row |= {"tools": [tool.as_dict() for tool in pref.tools]} if pref.tools else {}
    return row if pref.margin is None else {**row, "margin": pref.margin}
