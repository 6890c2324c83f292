"""What a run was given to train on, by ids: the fingerprint of its rows, and what a later evaluation leaves out.

`trained_ids.parquet` beside a run's artifact has one row for each row that the run was given, in that order, however
many of them it came to. An evaluation asks questions, so each row also has an id of every question that it answers or
asks: the turns up to there, without system prompts. A question that was trained on under one system prompt is seen
under another.

Rows of the annotation store have their ids under their project's key, see `align.data.sets.ids`. Where the key cannot
be read, they have none.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from align.chain import canonical
from align.data.records.content import row_bytes, turn_row
from align.data.sets.ids import SHA256, IdKind, id_of
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
SCHEMA = pa.schema([
    ("content_id", ID), ("question_ids", pa.list_(ID)), ("project", pa.string()), ("key_fingerprint", pa.string()),
])  # fmt: skip
UNTOLD = "nobody knows whether it saw what is measured on"

KeyOf = Callable[[IdKind], bytes | None]
"""The key of a kind of ids; None where it cannot be read. It is asked for HMAC alone."""


class Naming(NamedTuple):
    """How rows get their ids.

    Attributes:
        kind_of: which kind of ids a record has.
        key_of: the keys of those under one.
    """

    kind_of: Callable[[Record], IdKind] = lambda record: SHA256
    key_of: KeyOf = lambda kind: None


WITHOUT_KEYS = Naming()


def question_bytes(turns: Sequence[Message]) -> bytes:
    """The turns that an answer is due to, as canonical JSON. System prompts, and what is trained on, are no part."""
    said = [{**turn_row(turn), "train": None} for turn in turns if turn.role != "system"]
    return canonical(said).encode()


def questions_of(record: Record) -> list[bytes]:
    """All questions that a record answers or asks, in order, see `question_bytes`; none of plain text."""
    if isinstance(record, str):
        return []
    turns = record.messages if isinstance(record, Conversation) else record.prompt
    ends = [i for i, turn in enumerate(turns) if turn.role == "assistant" and i]
    if turns[-1].role != "assistant":
        ends.append(len(turns))
    return [question_bytes(turns[:end]) for end in ends]


def write_ids(folder: Path, records: Sequence[Record], naming: Naming = WITHOUT_KEYS) -> dict[str, str]:
    """`trained_ids.parquet` of the rows that a run was given.

    Returns:
        the roots over them, 64 hex digits: `data_root` over the sequence of (content id, exposure), each where it comes
        first, and `data_ids_root` over the sorted set of content ids. Nothing where a row has no id.
    """
    kinds = [naming.kind_of(record) for record in records]
    keys = {kind: naming.key_of(kind) for kind in {*kinds} - {SHA256}}
    ids = list[bytes | None]()
    questions = list[list[bytes] | None]()
    for record, kind in zip(records, kinds, strict=True):
        key = keys.get(kind)
        named = kind == SHA256 or key is not None
        ids.append(id_of(row_bytes(record), key) if named else None)
        questions.append([id_of(question, key) for question in questions_of(record)] if named else None)
    columns = {
        "content_id": ids, "question_ids": questions, "project": [kind.project or None for kind in kinds],
        "key_fingerprint": [kind.key or None for kind in kinds],
    }  # fmt: skip
    pq.write_table(pa.table(columns, schema=SCHEMA), folder / FILE, compression="none")  # digests get no smaller
    exposures = Counter(id for id in ids if id is not None)
    if sum(exposures.values()) < len(records):
        return {}
    sequence = (leaf(id, n) for id, n in exposures.items())
    return {"data_root": root_of(sequence), "data_ids_root": root_of(sorted(exposures))}


@dataclass(frozen=True, slots=True)
class Seen:
    """What an artifact was trained on, as far as its runs say.

    Attributes:
        questions: key → the ids of all questions under it; None stands for ids without a key.
        unknown: what is not known, a sentence each.
    """

    questions: dict[bytes | None, set[bytes]]
    unknown: tuple[str, ...] = ()

    def asks(self, turns: Sequence[Message]) -> bool:
        """Whether a question was among them."""
        asked = question_bytes(turns)
        return any(id_of(asked, key) in ids for key, ids in self.questions.items())


def seen_by(artifact: Artifact, root: Path, key_of: KeyOf) -> Seen:
    """What the runs that an artifact came through were given to train on, those of its reward models and of its base
    among them.

    Args:
        root: the folder of runs.

    Raises:
        CorruptFile: a run's ids are not those that it published.
    """
    found, unknown = defaultdict[IdKind, set[bytes]](set), list[str]()
    for manifest, folder in folders_behind(artifact, root):
        if isinstance(manifest, Gone) or folder is None:
            unknown.append(f"{manifest.ref} is gone: {UNTOLD}")
        elif manifest.stage in TRAINS and FILE not in manifest.outputs:
            unknown.append(f"{manifest.ref} has no {FILE}: {UNTOLD}")
        elif manifest.stage in TRAINS:
            nameless = add_questions(found, folder / FILE, manifest.outputs[FILE])
            unknown += [f"{manifest.ref} could not read the key of {nameless} rows: {UNTOLD}"] if nameless else []
    if artifact.manifest is None:
        unknown.append(f"no run of ours made {artifact.ref}: {UNTOLD}")
    questions: dict[bytes | None, set[bytes]] = {None: found.pop(SHA256, set())}
    for kind, ids in found.items():
        if (key := key_of(kind)) is None:
            unknown.append(f"the key of project {kind.project} cannot be read: nobody knows whether it asked this")
        else:
            questions[key] = ids
    return Seen(questions, tuple(unknown))


def add_questions(found: dict[IdKind, set[bytes]], path: Path, digest: str) -> int:
    """Add the ids of questions in the file of a run, which has this SHA-256, and return how many rows have none."""
    if not path.is_file() or known_digest(path) != digest:
        problem = "is missing" if not path.is_file() else "is not the file that was published (its sha256 differs)"
        raise CorruptFile("artifact", str(path), problem, "Restore it, or train again with resume=never.")
    nameless = 0
    for batch in pq.ParquetFile(path).iter_batches(columns=SCHEMA.names[1:]):
        for ids, project, key in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            nameless += ids is None
            found[IdKind(project or "", key or "")].update(ids or ())
    return nameless
