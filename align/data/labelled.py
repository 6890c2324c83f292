"""Answers with a label, as a stage meets them: read from a file or a data set. What they say is KTO's, see
`align.data.records.feedback`."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from align.data.reasoning import without_reasoning
from align.data.records.bad_rows import BadRows
from align.data.records.column_rules import ColumnRules, UnreadColumns
from align.data.records.content import FEEDBACK
from align.data.records.documents import OURS
from align.data.records.drops import Drop
from align.data.records.labels import LABEL
from align.data.records.messages import with_default_system
from align.data.records.read import read_records
from align.data.sets.published import data_set
from align.data.sources import MANIFEST, DataSource
from align.errors import InputError, require
from align.types import Feedback

HELP = 'A row holds {"prompt": "…", "completion": "…", "label": true}.'


def read_labelled(data: DataSource) -> list[Feedback]:
    """The answers of a file, or those of a data set that are held out.

    Raises:
        InputError: there is none, or a row is something else.
        CorruptFile: a file was cut or is damaged.
    """
    if data.name != MANIFEST:
        return [prepared(one, data) for one in answers_of_file(data.path or "", "data.path", data.skips, data.rules)]
    found = answers_in(data, "test")
    problem = "has no answer to measure on"
    require(bool(found), "data.path", data.path, problem, "Make it with data.held_out above 0.")
    return [prepared(one, data) for one in found]


def answers_in(data: DataSource, side: str) -> list[Feedback]:
    """The answers of one side of a data set."""
    there = data_set(Path(data.path or ""))
    problem = f"holds {there.kind}, and answers with labels are read"
    require(there.kind == FEEDBACK, "data.path", data.path, problem, "Name a data set that was made of such.")
    return [record for record in there.records(side) if isinstance(record, Feedback)]


def answers_of_file(path: str, field: str, skips: bool, rules: ColumnRules = OURS) -> list[Feedback]:
    """The answers of a file.

    Args:
        field: what the user calls it.
        skips: rows that are refused are left out.
        rules: what the user says of columns.
    """
    bad_rows = BadRows(skips)
    found = list[Feedback]()
    unread = UnreadColumns(rules)
    for read in read_records(path, field=field, rules=rules, bad_rows=bad_rows, drops=Counter[Drop]()):
        unread.add(read.sizes)
        if isinstance(read.record, Feedback):
            id = read.extra.get("id")
            found.append(read.record if id is None else replace(read.record, id=str(id)))
        else:
            label = read.extra.get(LABEL, "(none)")
            where = f"{path}, row {read.number}"
            bad_rows.take(InputError(f"{where}, {LABEL}", label, "it is no answer with a label, true or false", HELP))
    bad_rows.settle(path, len(found))
    unread.check(field, path)
    require(bool(found), field, path, "holds no answer with a label", HELP)
    unread.tell(path)
    return found


def prepared(one: Feedback, data: DataSource) -> Feedback:
    """An answer with the system turn that its prompt lacks, and without the reasoning that is to be hidden."""
    if data.hide_reasoning:
        one = replace(one, prompt=without_reasoning(one.prompt), completion=without_reasoning(one.completion))
    return replace(one, prompt=with_default_system(one.prompt, data.system))
