"""Tasks of lm-eval (EleutherAI's lm-evaluation-harness) in a suite: how they are named, and the files that they read.

    {name: arc, lm_eval: arc_local, include: tasks/}

`include` is a folder of lm-eval's own YAML files, whose data are local files. Imports neither torch nor lm-eval.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from align.core.distribution import require_extra
from align.core.errors import CorruptFile, InputError, require
from align.core.files import has_file, read_text, user_path
from align.rollout.answer_cache import Answer, Asked
from align.run import Input, json_digest
from align.run.digests import known_digest

HELP = "Write {name: arc, lm_eval: TASK, include: FOLDER}; FOLDER holds TASK's YAML file."
READERS = ("json", "csv", "parquet", "text")
"""Values of `dataset_path` that read files and ask no hub."""
LOCAL = f"Write dataset_path: one of {', '.join(READERS)}, and dataset_kwargs: {{data_files: {{test: FILE}}}}."


Found = Mapping[tuple[Any, ...], Any]
"""Request → its log-likelihood in nats, and whether greedy decoding would say it; of a `Completion`'s the text."""


class Harness(NamedTuple):
    """A task of lm-eval.

    Attributes:
        task: lm-eval's name of a task, or of a group.
        include: the folder with its YAML file.
        metric: that scores an item; empty for the first that can.
    """

    task: str
    include: str
    metric: str = ""


class Requests(NamedTuple):
    """What lm-eval asks about an item.

    Attributes:
        task, doc: lm-eval's name of the task, without a group's, and the item's place in its data.
        texts: of each request a context and its continuation; or one request of one text, which is weighed as a whole.
    """

    task: str
    doc: int
    texts: tuple[tuple[str, ...], ...]


class Completion(NamedTuple):
    """What lm-eval has a system write for an item.

    Attributes:
        task, doc: see `Requests`.
        context: a text that is continued by the likeliest tokens.
        until: texts that end the answer, which is cut before the first of them.
        max_tokens: of the answer, at most.
    """

    task: str
    doc: int
    context: str
    until: tuple[str, ...]
    max_tokens: int

    @property
    def request(self) -> tuple[str, tuple[str, ...], int]:
        """All that decides the answer of a system."""
        return self.context, self.until, self.max_tokens


class Written(NamedTuple):
    """An answer that a system wrote, and all that decides it."""

    asked: Asked
    answer: Answer


def parsed_harness(task: Mapping[str, Any], at: str) -> Harness | None:
    """The task of lm-eval that a task as `eval.tasks` writes it names; None where it names none.

    Raises:
        InputError: it is wrong.
    """
    name = task.get("lm_eval")
    if name is None:
        for key in ("include", "metric"):
            require(key not in task, f"{at}.{key}", task.get(key), "is of tasks of lm-eval alone", "Drop it.")
        return None
    for key in ("path", "check", "probe", "norm", "template"):
        require(key not in task, f"{at}.{key}", task.get(key), "is of tasks that are not lm-eval's", "Drop it.")
    for key, value in (("lm_eval", name), ("include", task.get("include")), ("metric", task.get("metric", "acc"))):
        require(isinstance(value, str) and bool(value), f"{at}.{key}", value, "is no name", HELP)
    problem = "downloads nltk's data; align has checks of its own for it"
    remedy = "Write {name: ifeval, path: ifeval.jsonl} with IFEval's rows; see docs/checkers.md."
    require("ifeval" not in name.lower(), f"{at}.lm_eval", name, problem, remedy)
    return Harness(name, task["include"], task.get("metric", ""))


def harness_record(harness: Harness, field: str) -> Input:
    """A task of lm-eval as an input of a run: lm-eval's version, and the digests of all files of the folder and of the
    data that they name.

    Raises:
        InputError: lm-eval is not installed; the folder is none; or its tasks need data of a hub, or data that code
            finds, which no digest would cover.
    """
    require_extra("evals", f"{field}.lm_eval", harness.task)
    folder = user_path(harness.include, f"{field}.include")
    require(folder.is_dir(), f"{field}.include", harness.include, "is no folder", HELP)
    beneath = (path for path in folder.rglob("*") if not path.is_dir() and "__pycache__" not in path.parts)
    inside = sorted(path for path in beneath if has_file(path, f"{field}.include", HELP))
    data = {Path(named) for path in inside if is_yaml(path) for named in data_of(path, folder)}
    files = [[path.relative_to(folder).as_posix(), known_digest(path)] for path in inside]
    files += [[path.as_posix(), known_digest(path)] for path in sorted(data)]
    digest = json_digest({"task": harness.task, "lm_eval": version("lm_eval"), "files": files})
    return Input(digest, ref=harness.task, path=harness.include)


def is_yaml(path: Path) -> bool:
    """Whether lm-eval may read a file as YAML: templates that others include are called `_arc_yaml` as well."""
    return path.name.endswith(("yaml", "yml"))


class Plain(yaml.SafeLoader):
    """Reads YAML, and no Python that it names."""


Plain.add_multi_constructor("!", lambda loader, tag, node: None)


def data_of(path: Path, folder: Path) -> Iterator[str]:
    """The files of data that a YAML file of lm-eval names.

    Raises:
        InputError: its data would come from elsewhere.
        CorruptFile: it is no YAML.
    """
    text = read_text(path, "include", "Mend it, or move it away.")
    try:
        given = yaml.load(text, Plain)
    except yaml.YAMLError as error:
        raise CorruptFile("include", str(path), f"is no YAML ({error})", "Mend it, or move it away.") from error
    yield from named_in(given, path, folder)


def named_in(given: Any, path: Path, folder: Path) -> Iterator[str]:
    """The same of a part of a YAML file."""
    if isinstance(given, list):
        for one in given:
            yield from named_in(one, path, folder)
    if not isinstance(given, Mapping):
        return
    for key, value in given.items():
        at = f"{path}, {key}"
        require(key != "dataset_path" or value in READERS, at, value, "is of a hub, or code", LOCAL)
        problem = "finds data that no digest covers"
        require(key not in ("data_dir", "custom_dataset", "class"), at, value, problem, LOCAL)
        if key == "include":
            for one in value if isinstance(value, list) else [value]:
                named = (path.parent / str(one)).resolve()
                right = named.is_relative_to(folder.resolve()) and is_yaml(named)
                require(right, at, one, "is no YAML file of the folder", f"Copy it into {folder}, as NAME.yaml.")
        elif key == "data_files":
            yield from files_in(value, at)
        else:
            yield from named_in(value, path, folder)


def files_in(given: Any, at: str) -> Iterator[str]:
    """The files that `data_files` names: one, some, or those of each split."""
    if isinstance(given, str):
        if not Path(given).is_file():
            raise InputError(at, given, "is no file", "Name a file from the working folder, without a pattern.")
        yield given
        return
    require(isinstance(given, list | Mapping) and bool(given), at, given, "names no file", LOCAL)
    for one in given.values() if isinstance(given, Mapping) else given:
        yield from files_in(one, at)
