"""Documents and prompts of the config group `data`, read from files, a data set of `stage=data` or the built-in
corpus."""

from __future__ import annotations

import random
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from glob import has_magic
from pathlib import Path
from typing import Any, TypeVar

from align.core.errors import InputError, require
from align.core.files import convert_read_errors, parse_user_path
from align.core.types import Conversation, Document, Feedback, Preference
from align.data import chitchat
from align.data.chat.reasoning import strip_all_reasoning
from align.data.generated_tasks import SOURCE as REASONING_GYM
from align.data.generated_tasks import TASKS, build_tasks_input, generate_conversations
from align.data.read.column_rules import ColumnRules
from align.data.read.content import DOCUMENTS, MESSAGE_ATTRIBUTES, PREFERENCES, extract_prompt
from align.data.read.files import list_data_files
from align.data.read.messages import with_default_system
from align.data.read.records import read_documents
from align.data.sets.published import ROOT_FIELDS, load_data_set, read_description
from align.data.sets.splits import SPLITS
from align.data.split import TrainTest, exclude_test_questions, split_documents, truncate_to_question
from align.run import Input, files_digest, json_digest, lookup_digest
from align.run.artifacts import try_read_manifest
from align.run.manifest import FILE, Manifest

MANIFEST = "manifest"
FILES = "files"
FILES_ALIAS = "jsonl"
"""Another accepted value of `data.name` for `files`."""


@dataclass(frozen=True, slots=True)
class DataSource:
    """The settings of the config group `data`: the source of a run's rows, and the rules for reading and dividing them.

    Attributes:
        name: `chitchat`, the corpus of the built-in model; `files`, alias `jsonl`; `manifest`, a data set of
            `stage=data`; `annotations`, votes; `reasoning_gym`, generated tasks.
        path: a file, a folder, a pattern, or a data set on the hub, see `align.data.read.files.list_data_files`; for
            `manifest`, the folder of the data set.
        part: part of the corpus; None for the stage's default.
        held_out: share of a file that is kept for measuring; 0 measures nothing, 1 measures on all rows.
        limit: maximum number of rows; None for all.
        eval_path: files to measure on, in the same forms as `path`. Then all rows of `path` are trained on, except
            those whose question is also in `eval_path`.
        system: system prompt for conversations without one.
        hide_reasoning: answers are read without the reasoning at their beginning.
        skip_bad_rows: leave refused rows out. If False, their file is refused.
        columns: our name of a column → that of the files.
        metadata: columns of the files that are kept as metadata.
        tasks: the tasks of `reasoning_gym`, see `align.data.generated_tasks.parse_task`.
        soft_labels: preference pairs keep their posteriors, and must have one.
    """

    name: str
    path: str | None = None
    part: str | None = None
    held_out: float = 0.0
    limit: int | None = None
    eval_path: str | None = None
    system: str | None = None
    hide_reasoning: bool = False
    skip_bad_rows: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)
    metadata: tuple[str, ...] = ()
    tasks: Any = None
    soft_labels: bool = False

    def __post_init__(self) -> None:
        if self.name == FILES_ALIAS:
            object.__setattr__(self, "name", FILES)

    @classmethod
    def from_settings(cls, settings: Any) -> DataSource:
        """Build a DataSource from an object whose attributes are the settings of the config group `data`."""
        return cls(
            settings.name,
            settings.path,
            part=settings.part,
            held_out=settings.held_out,
            limit=settings.limit,
            eval_path=settings.eval_path,
            system=settings.system or None,
            hide_reasoning=settings.reasoning == "hide",
            skip_bad_rows=settings.on_bad_row == "skip",
            columns=settings.columns or {},
            metadata=tuple(settings.metadata or ()),
            tasks=getattr(settings, "tasks", None),  # manifests of earlier versions have none
            soft_labels=getattr(settings, "soft_labels", False),
        )

    @property
    def rules(self) -> ColumnRules:
        """The user's column names and metadata columns, as the rules for reading files."""
        return ColumnRules(self.columns, self.metadata)


T = TypeVar("T")
MORE_ROWS_HELP = "Give rows with more distinct questions, another data.held_out, or data.eval_path=FILE to measure on."


def build_data_input(data: DataSource) -> Input:
    """Return the path and digest of the source's files or data set, as an input for a run's manifest.

    Raises:
        InputError: a file does not exist.
    """
    if data.name == MANIFEST:
        folder = Path(data.path or "")
        description = read_description(folder)
        digest = json_digest([description["root"], description["shards"]])
        return Input(digest, path=str(data.path), details={key: description[key] for key in ROOT_FIELDS})
    if data.name == REASONING_GYM:
        return build_tasks_input(data.tasks)
    if data.name == "chitchat":
        return Input(lookup_digest(chitchat.get_corpus_path()), path=data.path or data.name)
    return build_files_input(data.path, "data.path")


def build_data_inputs(data: DataSource) -> dict[str, Input]:
    """Return the inputs for a run's manifest by name: `data`, and `eval_data` if `data.eval_path` is set."""
    records = {"data": build_data_input(data)}
    if data.eval_path:
        records["eval_data"] = build_files_input(data.eval_path, "data.eval_path")
    return records


def build_files_input(path: str | None, field: str) -> Input:
    """Return a path and the digest of its files, as an input for a run's manifest. A single file has its own digest,
    several have one over all of them in order.

    Raises:
        InputError: the path names no file, or one cannot be read.
    """
    files = list_data_files(path or "", field)
    with convert_read_errors(field):
        return Input(lookup_digest(files[0]) if len(files) == 1 else files_digest(files), path=path or "")


def get_licence(name: str) -> str:
    """Return the licence of a built-in data set, or an empty text for any other name."""
    return "MIT" if name == "chitchat" else ""


def read_documents_of_split(data: DataSource, split: str, seed: int = 0) -> list[Document]:
    """Return the conversations or texts of one split for supervised training, shuffled and limited to `data.limit`. See
    `read_divided_documents`.

    Args:
        data: the source.
        split: `train` or `test`.
        seed: of the order.
    """
    return read_divided_documents(data, seed)[split == "test"]


def read_divided_documents(data: DataSource, seed: int = 0) -> TrainTest[Document]:
    """Return the conversations or texts to train on and the held-out ones, each shuffled and limited to `data.limit`.
    The second list is empty if `held_out` is 0.

    Raises:
        InputError: a row has no shape (with file and row number), or no row is left to train on.
    """
    train, test = read_both_splits(data, requires_answer=True)
    for documents, purpose in ((train, "to train on"), (test, "to measure on")):
        may_be_empty = documents is test and (data.held_out == 0 or data.name == MANIFEST)
        if not documents and not may_be_empty:
            raise build_empty_split_error(data, f"leaves no row {purpose}")
    return TrainTest(
        shuffle_in_place_and_limit(train, seed, data.limit), shuffle_in_place_and_limit(test, seed, data.limit)
    )


def list_held_out_sources(data: DataSource, seed: int = 0) -> list[str]:
    """Return for each held-out row of a data set the name of its source, in the order of `read_divided_documents`.
    Returns an empty list for other sources of rows, and if `data.eval_path` is set."""
    if data.name != MANIFEST or data.eval_path:
        return []
    return shuffle_in_place_and_limit(load_data_set(Path(data.path or "")).list_row_sources("test"), seed, data.limit)


def read_source_prompts(data: DataSource, split: str, seed: int = 0) -> list[Conversation]:
    """Return the prompts of one split, cut after the last user or tool turn, shuffled and limited to `data.limit`.
    Prompts from files keep the other columns of their rows.

    Args:
        data: the source.
        split: `train` for sampling and PPO, `test` for evaluation.
        seed: of the order.
    """
    if data.name == "chitchat":
        conversations = chitchat.load_prompts("test" if split == "test" else data.part or "prompts")
        questions = [prepare_record(conversation, data) for conversation in conversations]
    else:
        if data.eval_path and split == "test":  # `path` need not be read
            rows = [
                prepare_record(document, data)
                for document in read_file_documents(data, "eval_path", requires_answer=False)
            ]
        else:
            rows = read_both_splits(data)[split == "test"]
        questions = [*filter(None, map(truncate_to_question, rows))]
    return shuffle_prompts(questions, data, split, seed)


def read_divided_prompts(data: DataSource, seed: int = 0) -> TrainTest[Conversation]:
    """Return the prompts to train on and the held-out prompts, each cut after the last user or tool turn and shuffled.
    See `read_source_prompts`."""
    train, test = ([*filter(None, map(truncate_to_question, documents))] for documents in read_both_splits(data))
    return TrainTest(shuffle_prompts(train, data, "train", seed), shuffle_prompts(test, data, "test", seed))


def shuffle_prompts(questions: list[Conversation], data: DataSource, split: str, seed: int) -> list[Conversation]:
    """Shuffle the prompts of a split in place, and return at most `data.limit` of them.

    Raises:
        InputError: there are no prompts.
    """
    if not questions:
        raise build_empty_split_error(
            data, f"leaves no question {'to measure on' if split == 'test' else 'to train on'}"
        )
    return shuffle_in_place_and_limit(questions, seed, data.limit)


def build_empty_split_error(data: DataSource, problem: str) -> InputError:
    """Return the InputError for a source that has no rows for one split. It names the setting that divides the rows."""
    if data.eval_path:
        remedy = "Give two files whose rows ask different questions, where a user speaks."
        return InputError("data.eval_path", data.eval_path, problem, remedy)
    if data.name == MANIFEST:
        return InputError("data.path", data.path, problem, "Make a data set with more rows, or another data.held_out.")
    if data.name == REASONING_GYM:
        remedy = "Raise size in data.tasks, or set another data.held_out."
        return InputError("data.held_out", data.held_out, problem, remedy)
    field, value = ("data.held_out", data.held_out) if data.name == FILES else ("data", data.name)
    return InputError(field, value, problem, f"{MORE_ROWS_HELP} A user must speak in them.")


def read_both_splits(data: DataSource, requires_answer: bool = False) -> TrainTest[Document]:
    """Read the source's conversations or texts, and divide them into a train and a test split. A file is divided by the
    hash of each row's question (`held_out`), or another file is measured on (`eval_path`); equal questions are never in
    both. The corpus has fixed parts.

    Args:
        data: the source.
        requires_answer: see `read_documents`.
    """
    if data.name == "chitchat":
        load_part = chitchat.load_texts if data.part == "base" else chitchat.load_conversations
        train: list[Document] = [*load_part(data.part or "sft")]
        test: list[Document] = [*load_part("test")]
    elif data.eval_path:
        test = read_file_documents(data, "eval_path", requires_answer)
        train = exclude_test_questions(read_all_documents(data, requires_answer), test, f"rows of {data.path}")
    elif data.name == MANIFEST:
        train, test = (read_data_set_split(data, split, requires_answer) for split in SPLITS)
    else:
        train, test = split_documents(read_all_documents(data, requires_answer), data.held_out)
    return TrainTest(
        [prepare_record(document, data) for document in train], [prepare_record(document, data) for document in test]
    )


def read_all_documents(data: DataSource, requires_answer: bool = False) -> list[Document]:
    """Return the conversations or texts of `data.path` or `data.tasks` in their order, and of a data set only its train
    split."""
    if data.name == MANIFEST:
        return read_data_set_split(data, "train", requires_answer)
    if data.name == REASONING_GYM:
        return [*generate_conversations(data.tasks)]
    return read_file_documents(data, "path", requires_answer)


def read_data_set_split(data: DataSource, split: str, requires_answer: bool = False) -> list[Document]:
    """Return the conversations or texts in one split of a published data set. Of pairs and feedback, only the prompts
    are returned.

    Args:
        data: the source.
        split: `train` or `test`.
        requires_answer: the documents are imitated.

    Raises:
        InputError: the documents are imitated, and the data set holds pairs or feedback, which only give prompts.
    """
    rows = load_data_set(Path(data.path or ""))
    remedy = "Name a data set of conversations or texts."
    if rows.kind == PREFERENCES:
        remedy = f"Use it with stage=reward, stage=dpo or stage=kto, or n{remedy[1:]}"
    problem = f"holds {rows.kind}, but this stage trains on conversations or texts"
    require(rows.kind == DOCUMENTS or not requires_answer, "data.path", data.path, problem, remedy)
    return [extract_prompt(record) for record in rows.load_records(split)]


def read_file_documents(data: DataSource, key: str, requires_answer: bool) -> list[Document]:
    """Read the conversations or texts in the files that a setting names; `key` is `path` or `eval_path`. Prompts keep
    the other columns of their rows in `Conversation.row`, which imitated documents do not need."""
    path = getattr(data, key) or ""
    return read_documents(
        path, f"data.{key}", data.skip_bad_rows, requires_answer, are_prompts=not requires_answer, rules=data.rules
    )


def prepare_record(record: T, data: DataSource) -> T:
    """Return a record with `data.system` as its system prompt if it has none, without reasoning if
    `data.hide_reasoning` is set, and a pair without its posterior unless `data.soft_labels` is set.

    Raises:
        InputError: the answers of a pair differ in their reasoning only, or a pair has no posterior and
            `data.soft_labels` is set.
    """
    if not isinstance(record, Conversation | Preference | Feedback):
        return record
    parts = {name: getattr(record, name) for name in MESSAGE_ATTRIBUTES[type(record)]}
    changed = {name: strip_all_reasoning(turns) if data.hide_reasoning else turns for name, turns in parts.items()}
    if isinstance(record, Preference):
        problem = f"the answers of pair {record.id} differ in their reasoning only"
        remedy = "Leave the pair out, or keep the reasoning."
        require(changed["chosen"] != changed["rejected"], "data.reasoning", "hide", problem, remedy)
        if data.soft_labels:
            problem = f"pair {record.id or '(no id)'} has no posterior"
            remedy = (
                "Give each pair a column `posterior`, the probability that `chosen` is better (1 if that is certain), "
                "also in data.eval_path, or make the data set of votes with data.soft_labels=true."
            )
            require(record.posterior is not None, "data.soft_labels", True, problem, remedy)
        else:
            record = replace(record, posterior=None)
    first = next(iter(parts))
    changed[first] = with_default_system(changed[first], data.system)
    return record if changed == parts else replace(record, **changed)


def shuffle_in_place_and_limit(items: list[T], seed: int, limit: int | None) -> list[T]:
    """Shuffle a list in place, and return its first `limit` items. Returns all items if `limit` is `None`."""
    random.Random(seed).shuffle(items)
    return items[:limit]


RANKED_BY = "ranked_by"
"""Key in the details of an input for the best-of-n runs that ranked its rows."""


def add_rankers(inputs: Mapping[str, Input], root: Path) -> dict[str, Input]:
    """Return the run's inputs, with the best-of-n runs that ranked their rows (`sample:NAME`) added to the details of
    training data.

    Args:
        inputs: the inputs of a run.
        root: the folder of runs.
    """
    result = dict(inputs)
    for name, source_input in inputs.items():
        has_rows = name == "data" or name.startswith("sources.")
        if has_rows and source_input.path and (runs := find_rankers(source_input, root)):
            result[name] = replace(source_input, details={**source_input.details, RANKED_BY: list(runs)})
    return result


def find_rankers(source_input: Input, root: Path) -> tuple[str, ...]:
    """Return the names (`sample:NAME`) of the best-of-n runs that ranked the rows of an input. For files, these are the
    runs that published one of the files, wherever it is now; for a data set of `stage=data`, the runs that ranked the
    rows of its sources."""
    if TASKS in source_input.details:
        return ()
    if "root" in source_input.details:
        manifest = try_read_manifest(Path(source_input.path).parent)
        sources = manifest.inputs.values() if manifest else ()
        return tuple(dict.fromkeys(run for source in sources for run in source.details.get(RANKED_BY, ())))
    place = parse_user_path(source_input.path, "data.path").absolute()
    folders = [path.parent for path in sorted(root.glob(f"sample/*/{FILE}"))]
    folders += [parent for parent in place.parents if (parent / FILE).is_file()]  # runs of another root
    manifests = [manifest for folder in folders if (manifest := try_read_manifest(folder)) and is_ranking_run(manifest)]
    run_of_digest = {digest: manifest.ref for manifest in manifests for digest in manifest.outputs.values()}
    digests = [source_input.digest]  # a run publishes digests of single files
    if run_of_digest and (place.is_dir() or has_magic(source_input.path)):
        with suppress(InputError):  # a corpus may have the name of a folder
            digests += map(lookup_digest, list_data_files(source_input.path))
    return tuple(dict.fromkeys(run_of_digest[digest] for digest in digests if digest in run_of_digest))


def is_ranking_run(manifest: Manifest) -> bool:
    """Return whether a run is a finished run of `stage=sample` with best-of-n ranking."""
    return manifest.done and manifest.stage == "sample" and manifest.config["stage"].get("best_of") is not None
