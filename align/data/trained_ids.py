"""What a run was given to train on, by ids: the fingerprint of its rows, and what a later evaluation leaves out.

`trained_ids.parquet` beside a run's artifact has one row for each row that the run was given, in that order, however
many of them it came to. An evaluation asks questions, so each row also has an id of every question that it answers or
asks, see `questions_of`.

Rows of the annotation store have their ids under their project's key, see `align.data.sets.ids`. Where the key cannot
be read, they have none.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from align.annotate.store import Store
from align.core.chain import to_canonical_json
from align.core.errors import CorruptFile, InputError
from align.core.merkle import compute_root
from align.core.types import Conversation, Feedback, Message, Record
from align.data.chat.reasoning import alone
from align.data.read.content import row_bytes, said_json
from align.data.sets.ids import SHA256, IdKind, KeyOf, id_of, kind_under, kinds_in, under
from align.data.sets.published import data_set, leaf
from align.data.sources import MANIFEST, DataSource
from align.run import Artifact, lookup_digest
from align.run.lineage import GoneRun, iter_artifact_ancestors

FILE = "trained_ids.parquet"
TRAINS = ("sft", "full", "reward", "dpo", "kto", "ppo")
"""The stages that learn from rows."""
ID = pa.binary(32)
SCHEMA = pa.schema(
    [
        ("content_id", ID),
        ("question_ids", pa.list_(ID)),
        ("project", pa.string()),
        ("key_fingerprint", pa.string()),
    ]
)
NOT_KNOWN = "it is unknown whether it was trained on these prompts"


class Naming(NamedTuple):
    """How rows get their ids.

    Attributes:
        kind_of: which kind of ids a record has; None where all have SHA-256.
        key_of: the keys of those under one.
    """

    kind_of: Callable[[Record], IdKind] | None = None
    key_of: KeyOf = lambda kind: None


WITHOUT_KEYS = Naming()


def name_rows(source: DataSource, store: str, project: str) -> Naming:
    """Return how the rows of a source get their ids: votes under the key of their project, also those that a data set
    was made of, and all others without a key.

    Args:
        store: URL of the annotation store.
        project: of the votes of `data=annotations`.
    """
    find_key = partial(find_store_key, store)
    if source.name == "annotations":
        with Store.open(store, create=False) as votes:
            key = votes.key(project)
        kind = kind_under(project, key) if key else IdKind(project)  # erased a moment ago
        return Naming(lambda record: kind, find_key)
    if source.name != MANIFEST:
        return Naming()
    rows = data_set(Path(source.path or ""))
    kinds = kinds_in(rows.data)
    if {*kinds.values()} <= {SHA256}:
        return Naming()
    # Neither `data.system` nor reasoning that is hidden changes the first question of a row.
    kind_of_question = {}
    for name, record in zip(rows.sources("train"), rows.records("train"), strict=False):  # repeated rows come last
        if kinds[name] != SHA256:
            kind_of_question[first_question(record)] = kinds[name]
    return Naming(lambda record: kind_of_question.get(first_question(record, source.system), SHA256), find_key)


def first_question(record: Record, system: str | None = None) -> bytes:
    """Return the id of the first question that a record answers or asks; empty for plain text."""
    return next(iter(questions_of(record, system)), b"")


def find_store_key(store: str, kind: IdKind) -> bytes | None:
    """Return the key of a kind of ids. Returns None if there is no such store or project any more, or another project
    has its name."""
    with suppress(InputError), Store.open(store, create=False) as votes:
        key = votes.key(kind.project)
        if key is not None and kind_under(kind.project, key) == kind:
            return key
    return None


def questions_of(record: Record, system: str | None = None) -> list[bytes]:
    """The ids without a key of all questions that a record answers or asks, in order; none of plain text.

    A question is what an answer is due to: all turns before it. Its id is the SHA-256 of these turns as canonical JSON,
    a line each, without reasoning and without what ties results to calls. An answer that is read and not imitated
    counts as well: the model has seen what came before it.

    Args:
        system: the system prompt that `data.system` adds, which is no part of a question. A row's own one is: it may
            be what the question is about.
    """
    if isinstance(record, str):
        return []
    if isinstance(record, Conversation):
        return before_answers(record.messages, system)
    if isinstance(record, Feedback):
        return before_answers((*record.prompt, *record.completion), system)
    both = (before_answers((*record.prompt, *answer), system) for answer in (record.chosen, record.rejected))
    return [*dict.fromkeys(chain(*both))]


def before_answers(turns: Sequence[Message], system: str | None) -> list[bytes]:
    """The ids of what stands before each answer, and of all of it where no answer is the last turn."""
    said, asked, found = hashlib.sha256(), False, list[bytes]()
    *before, last = turns
    for turn in before:
        if turn.role == "assistant" and asked:
            found.append(said.digest())
        if turn.role != "system" or turn.content != system:
            said.update(line_of(turn))
        asked = asked or turn.role != "system"
    if last.role != "assistant" and (last.role != "system" or last.content != system):
        said.update(line_of(last))
    if last.role != "assistant" or asked:
        found.append(said.digest())
    return found


def line_of(turn: Message) -> bytes:
    """A turn without its reasoning, as a line of canonical JSON."""
    said = alone(turn) if turn.role == "assistant" else turn
    if not said.tool_calls:
        return said_json(said).encode() + b"\n"
    row: dict[str, Any] = {"role": said.role, "content": said.content}
    row["tool_calls"] = [call.as_dict()["function"] for call in said.tool_calls]
    return to_canonical_json(row).encode() + b"\n"


def write_ids(
    folder: Path,
    records: Sequence[Record],
    naming: Naming = WITHOUT_KEYS,
    system: str | None = None,
) -> dict[str, str]:
    """`trained_ids.parquet` of the rows that a run was given.

    Args:
        system: see `questions_of`.

    Returns:
        the roots over them, 64 hex digits: `data_root` over the sequence of content ids, each where it comes first
        and with how often it comes, and `data_ids_root` over the sorted set of content ids. Nothing where a
        row has no id.
    """
    kinds = [naming.kind_of(record) for record in records] if naming.kind_of else [SHA256] * len(records)
    keys = {kind: naming.key_of(kind) for kind in {*kinds} - {SHA256}}
    ids: list[bytes | None] = [None] * len(records)
    questions: list[list[bytes] | None] = [None] * len(records)
    # Records are shuffled. Looked at as they lie in memory, they cost a third of the time.
    for i in sorted(range(len(records)), key=lambda i: id(records[i])):
        record, kind = records[i], kinds[i]
        key = keys.get(kind) if keys else None
        if kind != SHA256 and key is None:
            continue
        ids[i] = id_of(row_bytes(record), key)
        asked = questions_of(record, system)
        questions[i] = [under(one, key) for one in asked] if key else asked
    columns = {
        "content_id": ids,
        "question_ids": questions,
        "project": [kind.project or None for kind in kinds],
        "key_fingerprint": [kind.key or None for kind in kinds],
    }
    pq.write_table(pa.table(columns, schema=SCHEMA), folder / FILE, compression="none")  # digests get no smaller
    named = [one for one in ids if one is not None]
    if len(named) < len(records):
        return {}
    values, first, counts = np.unique(np.frombuffer(b"".join(named), "V32"), return_index=True, return_counts=True)
    order = np.argsort(first)
    sequence = map(leaf, values[order].tolist(), counts[order].tolist())
    return {"data_root": compute_root(sequence), "data_ids_root": compute_root(values.tolist())}


@dataclass(frozen=True, slots=True)
class Seen:
    """What an artifact was trained on, as far as its runs say.

    Attributes:
        questions: key → the ids of all questions under it; None stands for ids without a key.
        unknown: what is not known, a sentence each.
        system: the system prompt that `data.system` adds to what is asked, see `questions_of`.
    """

    questions: dict[bytes | None, set[bytes]]
    unknown: tuple[str, ...] = ()
    system: str | None = None

    def asks(self, turns: Sequence[Message]) -> bool:
        """Whether a question was among them."""
        *_, asked = before_answers(turns, self.system)
        return any(under(asked, key) in ids for key, ids in self.questions.items())


def seen_by(
    artifact: Artifact, root: Path, key_of: KeyOf, system: str | None = None, stages: Collection[str] = TRAINS
) -> Seen:
    """What the runs that an artifact came through were given to train on, those of its reward models and of its base
    among them.

    Args:
        root: the folder of runs.
        system: see `Seen`.
        stages: whose runs count.

    Raises:
        CorruptFile: a run's ids are not those that it published.
    """
    found, unknown = defaultdict[IdKind, set[bytes]](set), list[str]()
    for manifest, folder in iter_artifact_ancestors(artifact, root):
        if isinstance(manifest, GoneRun) or folder is None:
            unknown.append(f"{manifest.ref} is gone: {NOT_KNOWN}")
        elif manifest.stage in stages:
            nameless, plain = add_questions(found, folder / FILE, manifest.outputs.get(FILE, ""))
            unknown += [f"{manifest.ref} could not read the key of {nameless:,} rows: {NOT_KNOWN}"] if nameless else []
            unknown += [f"{plain:,} rows of {manifest.ref} are plain text: {NOT_KNOWN}"] if plain else []
    if artifact.manifest is None:
        unknown.append(f"no run of ours made {artifact.ref}: {NOT_KNOWN}")
    questions: dict[bytes | None, set[bytes]] = {None: found.pop(SHA256, set())}
    for kind, ids in found.items():
        if (key := key_of(kind)) is None:
            unknown.append(f"the key of project {kind.project} cannot be read: {NOT_KNOWN}")
        else:
            questions[key] = ids
    return Seen(questions, tuple(unknown), system)


def add_questions(found: dict[IdKind, set[bytes]], path: Path, digest: str) -> tuple[int, int]:
    """Add the ids of questions in the file of a run, which has this SHA-256. Returns how many rows have no ids, and how
    many ask nothing."""
    if not path.is_file() or lookup_digest(path) != digest:
        problem = "is missing" if not path.is_file() else "is not the file that was published (its sha256 differs)"
        raise CorruptFile("artifact", str(path), problem, "Restore it, or train again with resume=never.")
    nameless = plain = 0
    for batch in pq.ParquetFile(path).iter_batches(columns=SCHEMA.names[1:]):
        for ids, project, key in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            nameless += ids is None
            plain += ids == []
            found[IdKind(project or "", key or "")].update(ids or ())
    return nameless, plain
