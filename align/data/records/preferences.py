"""Preference files: the field's formats in, TRL's conversational form out.

Each row is recognised by its columns:

    chosen rejected [prompt|question]                 TRL (messages or plain strings), UltraFeedback binarised, the
                                                      implicit form (whole conversations), HH transcripts, Orca pairs
    prompt response helpfulness                       HelpSteer: neighbouring rows with one prompt are paired
    prompt chosen[] rejected[]                        RewardBench 2: one right answer and several wrong ones, or several
    context response1 response2 overall_preference    HelpSteer3
    prompt answers[{answer, rank}]                    K-wise rankings (Nectar), rank 1 the best
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

from align.data.formats.rows import Row
from align.data.records.bad_rows import BadRows
from align.data.records.content import PREFERENCES
from align.data.records.drops import Drop
from align.data.records.grouping import grouped_rows, is_helpsteer
from align.data.records.messages import check_row, messages_of, with_system_column
from align.data.records.refusals import displayed
from align.data.records.shapes import nearest
from align.data.records.tools import check_calls, tools_of
from align.data.tally import tally
from align.errors import InputError, StorageError, require
from align.types import Message, Preference

Messages = tuple[Message, ...]

HELP = "A row holds prompt, chosen and rejected, or the columns of HH, UltraFeedback, HelpSteer or Nectar."
HH_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
HELPSTEER_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


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
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(column, "missing" if value is None else "not a finite number")
        return float(value)

    def label(self, column: str) -> str:
        value = self.data.get(column)
        return "" if value is None else str(value)


def read_preferences(path: str | Path, field: str = "data.path", skips: bool = False) -> list[Preference]:
    """The pairs of a file, see `read_with_report`; says how many were left out because no answer of theirs is
    preferred."""
    pairs, report = read_with_report(path, field, skips)
    undecided = report.identical + report.ties + report.unpaired
    tally("dropped_undecided", undecided)
    if undecided:
        print(f"{undecided} pairs of {path} are left out: their answers are equal, tied or alone")
    return pairs


def read_with_report(
    path: str | Path, field: str = "data.path", skips: bool = False
) -> tuple[list[Preference], ReadReport]:
    """The pairs of a data set in its order, and what became of its rows.

    Args:
        path: see `align.data.formats.files.files_of`.
        field: what the user calls the data set.
        skips: rows that are refused are left out. Without, the data set is refused.

    Raises:
        InputError: no such file, no row, no pair, or a bad row: names file, row (from 1) and column.
        CorruptFile: a file was cut or is damaged.
    """
    bad_rows = BadRows(skips)
    pairs: list[Preference] = []
    drops: Counter[Drop] = Counter()
    rows = 0
    for together in grouped_rows(path, field, bad_rows):
        rows += len(together)
        with bad_rows:
            found = list(parse(together))  # all of a row, or nothing
            drops.update(drop for drop in found if isinstance(drop, Drop))
            pairs += [pair for pair in found if isinstance(pair, Preference)]
    bad_rows.settle(path, len(pairs) + sum(drops.values()))
    require(rows > 0, field, str(path), "is empty", HELP)
    problem = f"none of its {rows} rows holds a preference ({', '.join(drop.value for drop in drops)})"
    require(bool(pairs), field, str(path), problem, "Name a file in which one answer was preferred.")
    return pairs, ReadReport(rows, len(pairs), drops[Drop.IDENTICAL], drops[Drop.TIE], drops[Drop.UNPAIRED])


def parse(group: Sequence[Row]) -> Iterator[Preference | Drop]:
    """The pairs of one row, or of neighbouring HelpSteer rows."""
    rows = [SourceRow(row.data, row.where, row.name) for row in group]
    row, columns = rows[0], rows[0].data.keys()
    for each in rows:
        check_row(each.data, each.where)
    if is_helpsteer(row.data):
        yield from _helpsteer(rows)
    elif {"chosen", "rejected"} <= columns and is_texts(row.data["rejected"]):
        yield from _right_and_wrong(row)
    elif {"chosen", "rejected"} <= columns:
        yield _pair(row)
    elif {"prompt", "answers"} <= columns:
        yield from _k_wise(row)
    elif {"context", "response1", "response2", "overall_preference"} <= columns:
        yield _helpsteer3(row)
    else:
        column = "rejected" if "chosen" in columns else "chosen"
        seen = f"missing (the row has {', '.join(sorted(columns)) or 'no columns'})"
        raise row.error(column, seen, nearest(row.data, (PREFERENCES,)) + HELP)


def _pair(row: SourceRow) -> Preference | Drop:
    chosen, rejected = row.data["chosen"], row.data["rejected"]
    asking = "prompt" if row.data.get("prompt") is not None or "question" not in row.data else "question"
    prompt = row.data.get(asking)
    for column, value in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, str | list):
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
        better, worse = (as_messages(row, column, row.data[column]) for column in ("chosen", "rejected"))
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
        # A list names its messages and must be right; a string (UltraFeedback) repeats one of them, as a caption.
        if isinstance(prompt, list) and asked[-len(prompt) :] != as_messages(row, asking, prompt):
            raise row.error(asking, "not what chosen and rejected share")
    return _preference(row, asked, (better, worse), _margin(row))


def is_texts(value: Any) -> bool:
    """Whether a column is a list of texts, and no list of messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def _right_and_wrong(row: SourceRow) -> Iterator[Preference | Drop]:
    """Each right answer over each wrong one, as one group."""
    right = [row.data["chosen"]] if isinstance(row.data["chosen"], str) else row.data["chosen"]
    if not is_texts(right):
        raise row.error("chosen", "neither a text nor a list of texts, as rejected is one")
    prompt, name = as_prompt(row, "prompt", row.data.get("prompt")), row.label("id") or row.name
    if "source" not in row.data and "subset" in row.data:  # as RewardBench calls it
        row = SourceRow({**row.data, "source": row.data["subset"]}, row.where, row.name)
    for (i, better), (j, worse) in product(enumerate(right), enumerate(row.data["rejected"])):
        if better == worse:
            yield Drop.IDENTICAL
            continue
        turns = (Message("assistant", better),), (Message("assistant", worse),)
        yield _preference(row, prompt, turns, margin=None, id=f"{name}/{i}>{j}", group=name)


def _margin(row: SourceRow) -> float | None:
    """The margin given, or the difference of UltraFeedback's scores."""
    margin, high, low = (row.data.get(column) for column in ("margin", "score_chosen", "score_rejected"))
    if margin is None and high is not None and low is not None:
        return row.figure("score_chosen", high) - row.figure("score_rejected", low)
    return None if margin is None else row.figure("margin", margin)


def _k_wise(row: SourceRow) -> Iterator[Preference | Drop]:
    answers = row.data["answers"]
    if not isinstance(answers, list) or len(answers) < 2:
        raise row.error("answers", "not a list of two or more answers")
    judged: list[Judged] = []
    for k, answer in enumerate(answers):
        if not isinstance(answer, dict) or not isinstance(answer.get("answer"), str):
            raise row.error(f"answers[{k}].answer", "missing or not a text")
        judged.append((row, answer["answer"], -row.figure(f"answers[{k}].rank", answer.get("rank"))))
    for found in _across(judged):  # ranks say in what order, not by how much
        yield found if isinstance(found, Drop) else replace(found, margin=None)


def _helpsteer(rows: Sequence[SourceRow]) -> Iterator[Preference | Drop]:
    if len(rows) == 1:
        yield Drop.UNPAIRED
    yield from _across(
        [(row, row.text("response"), row.figure("helpfulness", row.data["helpfulness"])) for row in rows]
    )


Judged = tuple[SourceRow, str, float]
"""An answer's row, its text, and how good it is: higher is better."""


def _across(judged: Sequence[Judged]) -> Iterator[Preference | Drop]:
    """Every pair of answers to one prompt, as one group."""
    first = judged[0][0]
    prompt = as_prompt(first, "prompt", first.data["prompt"])
    for pair in combinations(enumerate(judged), 2):
        (i, (row, better, high)), (j, (_, worse, low)) = sorted(pair, key=lambda answer: -answer[1][2])
        if high == low:
            yield Drop.TIE
        elif better == worse:
            yield Drop.IDENTICAL
        else:
            turns = (Message("assistant", better),), (Message("assistant", worse),)
            name = f"{first.name}/{i}>{j}"
            yield _preference(row, prompt, turns, margin=high - low, id=name, group=first.name)


def _helpsteer3(row: SourceRow) -> Preference | Drop:
    one, other = row.text("response1"), row.text("response2")
    verdict = row.figure("overall_preference", row.data["overall_preference"])
    if not -3 <= verdict <= 3:
        raise row.error("overall_preference", "outside -3 … 3")
    if verdict == 0:
        return Drop.TIE
    if one == other:
        return Drop.IDENTICAL
    best, worst = (one, other) if verdict < 0 else (other, one)  # -3: response1 much better; 3: response2
    turns = (Message("assistant", best),), (Message("assistant", worst),)
    return _preference(row, as_prompt(row, "context", row.data["context"]), turns, margin=abs(verdict))


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
    return messages_of(value, row.where, column)


def as_prompt(row: SourceRow, column: str, value: Any) -> Messages:
    """A prompt from messages, a transcript or a plain question; ends before the assistant's turn."""
    turns = transcript(value) if isinstance(value, str) else as_messages(row, column, value)
    turns = with_system_column(turns, row.data, row.where)
    if turns[-1] == Message("assistant", ""):  # HH and Nectar end a prompt with "Assistant:"
        turns = turns[:-1]
    if not turns or turns[-1].role == "assistant" or not any(turn.content.strip() for turn in turns):
        raise row.error(column, "it holds no question to answer")
    return turns


def transcript(text: str) -> Messages:
    r"""The turns of an HH transcript (`\n\nHuman: …`) or a HelpSteer2 one (`<extra_id_1>`); else one user turn."""
    if HH_TURN.match(text.lstrip(" ")):
        _, *parts = HH_TURN.split(text.lstrip(" "))
        roles = {"Human": "user", "Assistant": "assistant"}
        return tuple(Message(roles[who], content.strip()) for who, content in zip(parts[::2], parts[1::2], strict=True))
    first, *parts = HELPSTEER_TURN.split(text)
    later = (Message(who.lower(), content) for who, content in zip(parts[::2], parts[1::2], strict=True))
    return (Message("user", first), *later)


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
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(blob)
        os.replace(partial, path)
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
