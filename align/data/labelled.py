"""Answers with a label, as a stage meets them: read from a file or a data set. What they say is KTO's, see
`align.data.read.documents`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from align.data.read.content import FEEDBACK
from align.data.read.messages import with_default_system
from align.data.read.records import answers_of_file
from align.data.reasoning import without_reasoning
from align.data.sets.published import data_set
from align.data.sources import MANIFEST, DataSource
from align.errors import require
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


def prepared(one: Feedback, data: DataSource) -> Feedback:
    """An answer with the system turn that its prompt lacks, and without the reasoning that is to be hidden."""
    if data.hide_reasoning:
        one = replace(one, prompt=without_reasoning(one.prompt), completion=without_reasoning(one.completion))
    return replace(one, prompt=with_default_system(one.prompt, data.system))
