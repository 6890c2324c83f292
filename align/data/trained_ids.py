"""Ids of the rows that a run was given to train on. They identify its data, and let a later evaluation leave out
prompts that were trained on.

`trained_ids.parquet` beside a run's artifact has one row per training row, in order, regardless of how many were used.
As an evaluation asks questions, each row also has the id of every question that it answers or asks, see
`hash_questions`.

Rows of the annotation store have ids under their project's key, see `align.data.sets.ids`. They have none if the key
cannot be read.
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
from align.data.chat.reasoning import strip_message_reasoning
from align.data.read.content import encode_content_row, encode_role_and_content
from align.data.sets.ids import SHA256, FindKey, IdKind, apply_key, build_hmac_kind, compute_content_id, read_id_kinds
from align.data.sets.published import encode_row_leaf, load_data_set
from align.data.sources import MANIFEST, DataSource
from align.run import Artifact, lookup_digest
from align.run.lineage import GoneRun, iter_artifact_ancestors

SEEN = "dropped_seen"
"""Name of the metric that counts the prompts left out of an evaluation because training saw them."""
FILE = "trained_ids.parquet"
TRAINING_STAGES = ("sft", "full", "reward", "dpo", "kto", "ppo")
"""Names of the stages that train a model on rows."""
ID = pa.binary(32)
SCHEMA = pa.schema(
    [
        ("content_id", ID),
        ("question_ids", pa.list_(ID)),
        ("project", pa.string()),
        ("key_fingerprint", pa.string()),
    ]
)
UNKNOWN_PROBLEM = "it is unknown whether it was trained on these prompts"


class IdScheme(NamedTuple):
    """The rule for the ids of rows: plain SHA-256, or HMAC with the secret key of an annotation project.

    Attributes:
        kind_of: returns the kind of ids of a record. None if all ids are plain SHA-256.
        key_of: returns the key of a kind of ids, or None if it cannot be read.
    """

    kind_of: Callable[[Record], IdKind] | None = None
    key_of: FindKey = lambda kind: None


KEYLESS_SCHEME = IdScheme()


def choose_id_scheme(source: DataSource, store: str, project: str) -> IdScheme:
    """Return the rule for the row ids of a source: HMAC with the project's key for annotation votes, and plain SHA-256
    for other rows. Votes within a data set have ids under the key of their project too.

    Args:
        source: the source.
        store: URL of the annotation store.
        project: project of the votes of `data=annotations`.
    """
    find_key = partial(find_store_key, store)
    if source.name == "annotations":
        with Store.open(store, create_if_missing=False) as votes:
            key = votes.key(project)
        kind = build_hmac_kind(project, key) if key else IdKind(project)  # the key may just have been erased
        return IdScheme(lambda record: kind, find_key)
    if source.name != MANIFEST:
        return IdScheme()
    rows = load_data_set(Path(source.path or ""))
    kinds = read_id_kinds(rows.data)
    if {*kinds.values()} <= {SHA256}:
        return IdScheme()
    # The first question of a row depends neither on `data.system` nor on hidden reasoning.
    kind_of_question = {}
    # Repeated rows come last.
    for name, record in zip(rows.list_row_sources("train"), rows.load_records("train"), strict=False):
        if kinds[name] != SHA256:
            kind_of_question[hash_first_question(record)] = kinds[name]
    return IdScheme(lambda record: kind_of_question.get(hash_first_question(record, source.system), SHA256), find_key)


def hash_first_question(record: Record, system: str | None = None) -> bytes:
    """Return the SHA-256 id of the first question that a record answers or asks, or empty bytes for plain text."""
    return next(iter(hash_questions(record, system)), b"")


def find_store_key(store: str, kind: IdKind) -> bytes | None:
    """Return the key of a project from the annotation store, or None if the store, the project or this key is missing.
    The key of another project with the same name is not returned."""
    with suppress(InputError), Store.open(store, create_if_missing=False) as votes:
        key = votes.key(kind.project)
        if key is not None and build_hmac_kind(kind.project, key) == kind:
            return key
    return None


def hash_questions(record: Record, system: str | None = None) -> list[bytes]:
    """Return the SHA-256 ids, without a key, of all questions that a record answers or asks, in order. Returns an empty
    list for plain text.

    A question consists of all turns before an answer. Its id is the SHA-256 of these turns as lines of canonical JSON,
    without reasoning and without the ids that link tool results to calls. Answers that are excluded from the loss count
    too, as the model has seen the turns before them.

    Args:
        record: the record.
        system: the system prompt from `data.system`, which is not part of a question. A system prompt of the row is, as
            the question may be about it.
    """
    if isinstance(record, str):
        return []
    if isinstance(record, Conversation):
        return hash_turns_before_answers(record.messages, system)
    if isinstance(record, Feedback):
        return hash_turns_before_answers((*record.prompt, *record.completion), system)
    ids_of_answers = (
        hash_turns_before_answers((*record.prompt, *answer), system) for answer in (record.chosen, record.rejected)
    )
    return [*dict.fromkeys(chain(*ids_of_answers))]


def hash_turns_before_answers(turns: Sequence[Message], system: str | None) -> list[bytes]:
    """Return the SHA-256 of the turns before each answer, and of all turns if the last one is not an answer."""
    digest = hashlib.sha256()
    has_question = False
    ids = list[bytes]()
    *earlier_turns, last_turn = turns
    for turn in earlier_turns:
        if turn.role == "assistant" and has_question:
            ids.append(digest.digest())
        if turn.role != "system" or turn.content != system:
            digest.update(encode_turn_line(turn))
        has_question = has_question or turn.role != "system"
    if last_turn.role != "assistant" and (last_turn.role != "system" or last_turn.content != system):
        digest.update(encode_turn_line(last_turn))
    if last_turn.role != "assistant" or has_question:
        ids.append(digest.digest())
    return ids


def encode_turn_line(turn: Message) -> bytes:
    """Return a turn as a line of canonical JSON in UTF-8, without its reasoning and the ids of its tool calls."""
    stripped = strip_message_reasoning(turn) if turn.role == "assistant" else turn
    if not stripped.tool_calls:
        return encode_role_and_content(stripped).encode() + b"\n"
    row: dict[str, Any] = {"role": stripped.role, "content": stripped.content}
    row["tool_calls"] = [call.as_dict()["function"] for call in stripped.tool_calls]
    return to_canonical_json(row).encode() + b"\n"


def write_trained_ids(
    folder: Path,
    records: Sequence[Record],
    scheme: IdScheme = KEYLESS_SCHEME,
    system: str | None = None,
) -> dict[str, str]:
    """Write the content ids and question ids of a run's training rows to `trained_ids.parquet`, and return Merkle roots
    over the content ids.

    Args:
        folder: the run's folder.
        records: the rows.
        scheme: the rule by which they get their ids.
        system: see `hash_questions`.

    Returns:
        Merkle roots of 64 hex digits: `data_root` over the distinct content ids in order of first occurrence, with
            their counts, and `data_ids_root` over the sorted content ids. Empty if a row has no id.
    """
    kinds = [scheme.kind_of(record) for record in records] if scheme.kind_of else [SHA256] * len(records)
    keys = {kind: scheme.key_of(kind) for kind in {*kinds} - {SHA256}}
    ids: list[bytes | None] = [None] * len(records)
    ids_of_questions: list[list[bytes] | None] = [None] * len(records)
    # Records are shuffled. Visiting them in the order of their addresses takes a third of the time.
    for i in sorted(range(len(records)), key=lambda i: id(records[i])):
        record = records[i]
        kind = kinds[i]
        key = keys.get(kind) if keys else None
        if kind != SHA256 and key is None:
            continue
        ids[i] = compute_content_id(encode_content_row(record), key)
        question_ids = hash_questions(record, system)
        ids_of_questions[i] = [apply_key(question_id, key) for question_id in question_ids] if key else question_ids
    columns = {
        "content_id": ids,
        "question_ids": ids_of_questions,
        "project": [kind.project or None for kind in kinds],
        "key_fingerprint": [kind.key or None for kind in kinds],
    }
    pq.write_table(pa.table(columns, schema=SCHEMA), folder / FILE, compression="none")  # digests get no smaller
    known_ids = [row_id for row_id in ids if row_id is not None]
    if len(known_ids) < len(records):
        return {}
    values, first_index, counts = np.unique(
        np.frombuffer(b"".join(known_ids), "V32"), return_index=True, return_counts=True
    )
    order = np.argsort(first_index)
    sequence = map(encode_row_leaf, values[order].tolist(), counts[order].tolist())
    return {"data_root": compute_root(sequence), "data_ids_root": compute_root(values.tolist())}


@dataclass(frozen=True, slots=True)
class TrainedQuestions:
    """Ids of the questions that an artifact was trained on, and a list of the training data whose questions are
    unknown.

    Attributes:
        questions: key → ids of all questions under it; the key None holds ids without a key.
        unknown: gaps in this knowledge, a sentence each.
        system: the system prompt from `data.system`, see `hash_questions`.
    """

    questions: dict[bytes | None, set[bytes]]
    unknown: tuple[str, ...] = ()
    system: str | None = None

    def asks(self, turns: Sequence[Message]) -> bool:
        """Return whether the artifact was trained on the last question of a conversation."""
        *_, question_id = hash_turns_before_answers(turns, self.system)
        return any(apply_key(question_id, key) in ids for key, ids in self.questions.items())


def collect_trained_questions(
    artifact: Artifact,
    root: Path,
    key_of: FindKey,
    system: str | None = None,
    stages: Collection[str] = TRAINING_STAGES,
) -> TrainedQuestions:
    """Collect the ids of the questions that an artifact's run and all its ancestor runs trained on. The runs of its
    reward models and of its base are included.

    Args:
        artifact: the artifact.
        root: the folder of runs.
        key_of: returns the key of a kind of ids.
        system: see `TrainedQuestions`.
        stages: stages whose runs are considered.

    Raises:
        CorruptFile: the ids of a run are not those that it published.
    """
    ids_by_kind = defaultdict[IdKind, set[bytes]](set)
    unknown = list[str]()
    for manifest, folder in iter_artifact_ancestors(artifact, root):
        if isinstance(manifest, GoneRun) or folder is None:
            unknown.append(f"{manifest.ref} is gone: {UNKNOWN_PROBLEM}")
        elif manifest.stage in stages:
            without_ids, plain_texts = add_question_ids(ids_by_kind, folder / FILE, manifest.outputs.get(FILE, ""))
            if without_ids:
                unknown.append(f"{manifest.ref} could not read the key of {without_ids:,} rows: {UNKNOWN_PROBLEM}")
            if plain_texts:
                unknown.append(f"{plain_texts:,} rows of {manifest.ref} are plain text: {UNKNOWN_PROBLEM}")
    if artifact.manifest is None:
        unknown.append(f"no run of ours made {artifact.ref}: {UNKNOWN_PROBLEM}")
    questions: dict[bytes | None, set[bytes]] = {None: ids_by_kind.pop(SHA256, set())}
    for kind, ids in ids_by_kind.items():
        if (key := key_of(kind)) is None:
            unknown.append(f"the key of project {kind.project} cannot be read: {UNKNOWN_PROBLEM}")
        else:
            questions[key] = ids
    return TrainedQuestions(questions, tuple(unknown), system)


class RowsWithoutQuestions(NamedTuple):
    """Numbers of training rows whose questions are unknown.

    Attributes:
        without_ids: rows without ids, because their project's key could not be read.
        plain_texts: rows of plain text, which have no question.
    """

    without_ids: int
    plain_texts: int


def add_question_ids(ids_by_kind: dict[IdKind, set[bytes]], path: Path, digest: str) -> RowsWithoutQuestions:
    """Add the question ids in a run's `trained_ids.parquet` to `ids_by_kind` in place, and count the rows without
    questions. Raises CorruptFile if the file is missing or has another digest.

    Args:
        ids_by_kind: kind of ids → ids, which are added to.
        path: the file.
        digest: its published SHA-256.
    """
    if not path.is_file() or lookup_digest(path) != digest:
        problem = "is missing" if not path.is_file() else "is not the file that was published (its sha256 differs)"
        raise CorruptFile("artifact", str(path), problem, "Restore it, or train again with resume=never.")
    without_ids = 0
    plain_texts = 0
    for batch in pq.ParquetFile(path).iter_batches(columns=SCHEMA.names[1:]):
        for ids, project, key in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            without_ids += ids is None
            plain_texts += ids == []
            ids_by_kind[IdKind(project or "", key or "")].update(ids or ())
    return RowsWithoutQuestions(without_ids, plain_texts)
