"""What a run was given to train on, by ids: the fingerprint of its rows, and what a later evaluation leaves out.

`trained_ids.parquet` beside a run's artifact has one row for each row that the run was given, in that order, however
many of them it came to. An evaluation asks questions, so each row also has an id of every question that it answers or
asks: the turns up to there, without system prompts. A question that was trained on under one system prompt is seen
under another.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from align.chain import canonical
from align.data.records.content import content_id, turn_row
from align.data.sets.published import leaf
from align.errors import CorruptFile
from align.merkle import root_of
from align.run import Artifact, known_digest
from align.run.lineage import Gone, folders_behind
from align.types import Conversation, Message, Record

FILE = "trained_ids.parquet"
TRAINS = ("sft", "full", "reward", "dpo", "ppo")
"""The stages that learn from rows."""
ID = pa.binary(32)
SCHEMA = pa.schema([("content_id", ID), ("question_ids", pa.list_(ID))])


def question_id(turns: Sequence[Message]) -> bytes:
    """SHA-256 of the turns that an answer is due to, 32 bytes. System prompts, and what is trained on, are no part."""
    said = [{**turn_row(turn), "train": None} for turn in turns if turn.role != "system"]
    return hashlib.sha256(canonical(said).encode()).digest()


def question_ids(record: Record) -> list[bytes]:
    """The ids of all questions that a record answers or asks, in order; none of plain text."""
    if isinstance(record, str):
        return []
    turns = record.messages if isinstance(record, Conversation) else record.prompt
    ends = [i for i, turn in enumerate(turns) if turn.role == "assistant" and i]
    if turns[-1].role != "assistant":
        ends.append(len(turns))
    return [question_id(turns[:end]) for end in ends]


def write_ids(folder: Path, records: Sequence[Record]) -> dict[str, str]:
    """`trained_ids.parquet` of the rows that a run was given.

    Returns:
        the roots over them, 64 hex digits: `data_root` over the sequence of (content id, exposure), each where it comes
        first, and `data_ids_root` over the sorted set of content ids.
    """
    ids = [content_id(record) for record in records]
    table = pa.table([pa.array(ids, ID), pa.array(map(question_ids, records), pa.list_(ID))], schema=SCHEMA)
    pq.write_table(table, folder / FILE, compression="none")  # a digest does not get smaller
    exposures = Counter(ids)
    sequence, both = (leaf(id, n) for id, n in exposures.items()), sorted(exposures)
    return {"data_root": root_of(sequence), "data_ids_root": root_of(both)}


@dataclass(frozen=True, slots=True)
class Seen:
    """What an artifact was trained on, as far as its runs say.

    Attributes:
        questions: the ids of all questions.
        unknown: what is not known, a sentence each.
    """

    questions: frozenset[bytes]
    unknown: tuple[str, ...] = ()

    def asks(self, turns: Sequence[Message]) -> bool:
        """Whether a question was among them."""
        return question_id(turns) in self.questions


def seen_by(artifact: Artifact, root: Path) -> Seen:
    """What the runs that an artifact came through were given to train on, those of its reward models and of its base
    among them.

    Args:
        root: the folder of runs.

    Raises:
        CorruptFile: a run's ids are not those that it published.
    """
    questions, unknown = set[bytes](), list[str]()
    for manifest, folder in folders_behind(artifact, root):
        if isinstance(manifest, Gone) or folder is None:
            unknown.append(f"{manifest.ref} is gone: nobody knows whether it saw what is measured on")
        elif manifest.stage in TRAINS and FILE not in manifest.outputs:
            unknown.append(f"{manifest.ref} has no {FILE}: nobody knows whether it saw what is measured on")
        elif manifest.stage in TRAINS:
            questions |= questions_in(folder / FILE, manifest.outputs[FILE])
    if artifact.manifest is None:
        unknown.append(f"no run of ours made {artifact.ref}: nobody knows whether it saw what is measured on")
    return Seen(frozenset(questions), tuple(unknown))


def questions_in(path: Path, digest: str) -> set[bytes]:
    """The ids of questions in the file of a run, which has this SHA-256."""
    if not path.is_file() or known_digest(path) != digest:
        problem = "is missing" if not path.is_file() else "is not the file that was published (its sha256 differs)"
        raise CorruptFile("artifact", str(path), problem, "Restore it, or train again with resume=never.")
    column = pq.read_table(path, columns=["question_ids"])["question_ids"]
    return {id for ids in column.chunks for id in ids.flatten().to_pylist()}
