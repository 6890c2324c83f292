"""Where documents, prompts and pairs come from: the `data` group, read into the records of `align.core.types`."""

from __future__ import annotations

import random
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from glob import has_magic
from pathlib import Path
from typing import Any, TypeVar

from align.core.errors import InputError, require
from align.core.files import explain_read_errors, parse_user_path
from align.core.types import Conversation, Document, Feedback, Preference
from align.data import chitchat
from align.data.chat.reasoning import without_reasoning
from align.data.read.columns import ColumnRules
from align.data.read.content import DOCUMENTS, PARTS, PREFERENCES, asked
from align.data.read.files import files_of
from align.data.read.messages import with_default_system
from align.data.read.records import read_documents
from align.data.sets.published import ROOTS, data_set, described
from align.data.sets.sides import SIDES
from align.data.split import divided, question, unasked
from align.run import Input, files_digest, json_digest, lookup_digest
from align.run.artifacts import try_read_manifest
from align.run.manifest import FILE, Manifest

MANIFEST = "manifest"
FILES = "files"
ALIAS = "jsonl"
"""Another name of `FILES`."""


@dataclass(frozen=True, slots=True)
class DataSource:
    """Where rows come from.

    Attributes:
        name: `chitchat`, the corpus of the built-in model; `files`, which may be called `jsonl`; `manifest`,
            a data set of `stage=data`; `annotations`, votes.
        path: a file, a folder, a pattern, or a data set on the hub, see `align.data.read.files.files_of`; the folder
            of the data set of `manifest`.
        part: of the corpus; None for what the stage needs.
        held_out: the share of a file that is kept for measuring; 0 measures nothing, 1 measures all of it.
        limit: the most rows that are read; None for all.
        eval_path: files to measure on, as `path` is one; `path` is then trained on whole, but for what it asks too.
        system: the system turn of conversations that have none.
        hide_reasoning: answers are read without the reasoning that they begin with.
        skips: rows that are refused are left out. Without, their file is refused.
        columns: our name of a column → that of the files.
        metadata: columns of the files that are kept as metadata.
    """

    name: str
    path: str | None = None
    part: str | None = None
    held_out: float = 0.0
    limit: int | None = None
    eval_path: str | None = None
    system: str | None = None
    hide_reasoning: bool = False
    skips: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)
    metadata: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.name == ALIAS:
            object.__setattr__(self, "name", FILES)

    @classmethod
    def of(cls, settings: Any) -> DataSource:
        """Return the source of the settings of the group `data`."""
        return cls(
            settings.name,
            settings.path,
            part=settings.part,
            held_out=settings.held_out,
            limit=settings.limit,
            eval_path=settings.eval_path,
            system=settings.system or None,
            hide_reasoning=settings.reasoning == "hide",
            skips=settings.on_bad_row == "skip",
            columns=settings.columns or {},
            metadata=tuple(settings.metadata or ()),
        )

    @property
    def rules(self) -> ColumnRules:
        """What the user says of columns."""
        return ColumnRules(self.columns, self.metadata)


T = TypeVar("T")
MORE = "Give rows that ask more different questions, another data.held_out, or data.eval_path=FILE to measure on."


def data_record(data: DataSource) -> Input:
    """A data set that lies in files, as an input of a run.

    Raises:
        InputError: there are none.
    """
    if data.name == MANIFEST:
        folder = Path(data.path or "")
        said = described(folder)
        return Input(
            json_digest([said["root"], said["shards"]]), path=str(data.path), details={key: said[key] for key in ROOTS}
        )
    if data.name == "chitchat":
        return Input(lookup_digest(chitchat.corpus_path()), path=data.path or data.name)
    return files_record(data.path, "data.path")


def data_records(data: DataSource) -> dict[str, Input]:
    """The data sets that are read, as inputs of a run: `data`, and `eval_data` where one of its own is measured on."""
    records = {"data": data_record(data)}
    if data.eval_path:
        records["eval_data"] = files_record(data.eval_path, "data.eval_path")
    return records


def files_record(given: str | None, field: str) -> Input:
    """Return the files that a path names as one input of a run: a file by its digest, several by one over all of them,
    in their order. Raises: InputError: there are none, or one cannot be read."""
    files = files_of(given or "", field)
    with explain_read_errors(field):
        return Input(lookup_digest(files[0]) if len(files) == 1 else files_digest(files), path=given or "")


def licence_of(name: str) -> str:
    """Return the licence of a data set that this package names; empty if there is none."""
    return "MIT" if name == "chitchat" else ""


def documents(data: DataSource, split: str, seed: int = 0) -> list[Document]:
    """What supervised training reads of one side, `train` or `test`, see `divided_documents`."""
    return divided_documents(data, seed)[split == "test"]


def divided_documents(data: DataSource, seed: int = 0) -> tuple[list[Document], list[Document]]:
    """What supervised training learns from, and what it is measured on; the second is empty where `held_out` is 0.

    Raises:
        InputError: a row without the expected fields (with file and row number), or nothing to train on.
    """
    train, test = sides(data, answered=True)
    for found, purpose in ((train, "to train on"), (test, "to measure on")):
        none_wanted = found is test and (data.held_out == 0 or data.name == MANIFEST)
        if not found and not none_wanted:
            raise nothing_left(data, f"leaves no row {purpose}")
    return shuffled(train, seed, data.limit), shuffled(test, seed, data.limit)


def held_out_sources(data: DataSource, seed: int = 0) -> list[str]:
    """The source of each row that `divided_documents` holds out of a data set, in that order; of anything else none."""
    if data.name != MANIFEST or data.eval_path:
        return []
    return shuffled(data_set(Path(data.path or "")).sources("test"), seed, data.limit)


def prompts(data: DataSource, split: str, seed: int = 0) -> list[Conversation]:
    """Conversations that end where an answer is due. Those of files have the other columns of their rows.

    Args:
        split: `train` for sampling and PPO, `test` for evaluation.
    """
    if data.name == "chitchat":
        conversations = chitchat.contexts("test" if split == "test" else data.part or "prompts")
        found = [prepared(c, data) for c in conversations]
    else:
        if data.eval_path and split == "test":  # nobody asks what is trained on
            read = [prepared(document, data) for document in documents_of_files(data, "eval_path", answered=False)]
        else:
            read = sides(data)[split == "test"]
        found = [*filter(None, map(question, read))]
    return some(found, data, split, seed)


def divided_prompts(data: DataSource, seed: int = 0) -> tuple[list[Conversation], list[Conversation]]:
    """Return the prompts of both sides of a file, see `prompts`."""
    train, test = ([*filter(None, map(question, side))] for side in sides(data))
    return some(train, data, "train", seed), some(test, data, "test", seed)


def some(found: list[Conversation], data: DataSource, split: str, seed: int) -> list[Conversation]:
    """Return these prompts in their order.

    Raises:
        InputError: there are none.
    """
    if not found:
        raise nothing_left(data, f"leaves no question {'to measure on' if split == 'test' else 'to train on'}")
    return shuffled(found, seed, data.limit)


def nothing_left(data: DataSource, problem: str) -> InputError:
    """The error of a data set that has nothing for one side: it names the setting that divides it."""
    if data.eval_path:
        remedy = "Give two files whose rows ask different questions, where a user speaks."
        return InputError("data.eval_path", data.eval_path, problem, remedy)
    if data.name == MANIFEST:
        return InputError("data.path", data.path, problem, "Make a data set with more rows, or another data.held_out.")
    field, value = ("data.held_out", data.held_out) if data.name == FILES else ("data", data.name)
    return InputError(field, value, problem, f"{MORE} A user must speak in them.")


def sides(data: DataSource, answered: bool = False) -> tuple[list[Document], list[Document]]:
    """What a data set has to train on and to measure on. A file is divided by the hash of what each row asks
    (`held_out`), or measured on another file (`eval_path`); equal questions never stand on both sides. The corpus has
    parts of its own.

    Args:
        answered: see `read_documents`.
    """
    if data.name == "chitchat":
        read = chitchat.texts if data.part == "base" else chitchat.conversations
        train: list[Document] = [*read(data.part or "sft")]
        test: list[Document] = [*read("test")]
    elif data.eval_path:
        test = documents_of_files(data, "eval_path", answered)
        train = unasked(all_documents(data, answered), test, f"rows of {data.path}")
    elif data.name == MANIFEST:
        train, test = (documents_in(data, side, answered) for side in SIDES)
    else:
        train, test = divided(all_documents(data, answered), data.held_out)
    return [prepared(d, data) for d in train], [prepared(d, data) for d in test]


def all_documents(data: DataSource, answered: bool = False) -> list[Document]:
    """Return what `data.path` holds, as it is; of a data set, what is to train on."""
    if data.name == MANIFEST:
        return documents_in(data, "train", answered)
    return documents_of_files(data, "path", answered)


def documents_in(data: DataSource, side: str, answered: bool = False) -> list[Document]:
    """Return one side of a data set. Of pairs and feedback, what they ask.

    Args:
        answered: it is to be imitated.

    Raises:
        InputError: it holds no documents, which only prompts can be taken from.
    """
    found = data_set(Path(data.path or ""))
    remedy = "Name a data set of conversations or texts."
    if found.kind == PREFERENCES:
        remedy = f"Use it with stage=reward, stage=dpo or stage=kto, or n{remedy[1:]}"
    problem = f"holds {found.kind}, and conversations or texts are imitated"
    require(found.kind == DOCUMENTS or not answered, "data.path", data.path, problem, remedy)
    return [asked(record) for record in found.records(side)]


def documents_of_files(data: DataSource, key: str, answered: bool) -> list[Document]:
    """Return what the files of `path` or `eval_path` hold. Prompts keep the other columns of their rows
    (`Conversation.row`), which nobody reads of what is imitated."""
    path = getattr(data, key) or ""
    return read_documents(path, f"data.{key}", data.skips, answered, rows=not answered, rules=data.rules)


def prepared(record: T, data: DataSource) -> T:
    """Return a record with the system turn that it lacks, and without the reasoning that is to be hidden; the very same
    one if nothing changes, which still has the id that it was read with.

    Raises:
        InputError: nothing but their reasoning tells the answers of a pair apart.
    """
    if not isinstance(record, Conversation | Preference | Feedback):
        return record
    parts = {name: getattr(record, name) for name in PARTS[type(record)]}
    changed = {name: without_reasoning(turns) if data.hide_reasoning else turns for name, turns in parts.items()}
    if isinstance(record, Preference):
        problem = f"nothing else tells the answers of pair {record.id} apart"
        remedy = "Leave the pair out, or keep the reasoning."
        require(changed["chosen"] != changed["rejected"], "data.reasoning", "hide", problem, remedy)
    first = next(iter(parts))
    changed[first] = with_default_system(changed[first], data.system)
    return record if changed == parts else replace(record, **changed)


def shuffled(items: list[T], seed: int, limit: int | None) -> list[T]:
    random.Random(seed).shuffle(items)
    return items[:limit]


RANKED_BY = "ranked_by"
"""What an input's details call these runs."""


def with_rankers(inputs: Mapping[str, Input], root: Path) -> dict[str, Input]:
    """Inputs, of which each that is rows to train on names the runs that ranked them, `sample:NAME`.

    Args:
        root: the folder of runs.
    """
    found = dict(inputs)
    for name, given in inputs.items():
        rows = name == "data" or name.startswith("sources.")
        if rows and given.path and (runs := ranked_by(given, root)):
            found[name] = replace(given, details={**given.details, RANKED_BY: list(runs)})
    return found


def ranked_by(given: Input, root: Path) -> tuple[str, ...]:
    """The runs that ranked the rows of a data set: of files, those that published one of them, wherever it lies now; of
    a data set of `stage=data`, those of its sources."""
    if "root" in given.details:
        made = try_read_manifest(Path(given.path).parent)
        sources = made.inputs.values() if made else ()
        return tuple(dict.fromkeys(run for source in sources for run in source.details.get(RANKED_BY, ())))
    place = parse_user_path(given.path, "data.path").absolute()
    folders = [path.parent for path in sorted(root.glob(f"sample/*/{FILE}"))]
    folders += [parent for parent in place.parents if (parent / FILE).is_file()]  # of another root than this one
    made = [manifest for folder in folders if (manifest := try_read_manifest(folder)) and ranks(manifest)]
    known = {digest: manifest.ref for manifest in made for digest in manifest.outputs.values()}
    digests = [given.digest]  # of a file; several have one over all of them
    if known and (place.is_dir() or has_magic(given.path)):
        with suppress(InputError):  # it is a corpus with the name of a folder
            digests += map(lookup_digest, files_of(given.path))
    return tuple(dict.fromkeys(known[digest] for digest in digests if digest in known))


def ranks(manifest: Manifest) -> bool:
    """Whether a run is a finished one of best-of-n."""
    return manifest.done and manifest.stage == "sample" and manifest.config["stage"].get("best_of") is not None
