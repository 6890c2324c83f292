"""Probes of forgetting: tasks that ask how likely texts are under a system, and need no judge. Nothing is generated but
the answers that tasks of lm-eval (EleutherAI's lm-evaluation-harness) ask for. Imports neither torch nor lm-eval.

    {name: arc, path: arc.jsonl, probe: choice}      the likeliest of some choices has to be the right one
    {name: wiki, path: texts.jsonl, probe: loss}     how many bits a byte of a text takes
    {name: arc, lm_eval: arc_local, include: tasks/} what a task of lm-eval asks

`include` is a folder of lm-eval's own YAML files, whose data are local files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from align.core.distribution import require_extra
from align.core.errors import CorruptFile, InputError, require
from align.core.files import has_file, parse_user_path, read_text
from align.core.spec import get_choice, get_flag, parse_json_or_text, parse_text
from align.core.types import Conversation, Document, Message
from align.data.read.messages import with_default_system
from align.data.read.records import parse_document
from align.data.read.rows import Row
from align.data.split import truncate_to_question
from align.rollout.answer_cache import Answer, Asked
from align.run import Input, json_digest
from align.run.digests import lookup_digest

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
    folder = parse_user_path(harness.include, f"{field}.include")
    require(folder.is_dir(), f"{field}.include", harness.include, "is no folder", HELP)
    beneath = (path for path in folder.rglob("*") if not path.is_dir() and "__pycache__" not in path.parts)
    inside = sorted(path for path in beneath if has_file(path, f"{field}.include", HELP))
    data = {Path(named) for path in inside if is_yaml(path) for named in data_of(path, folder)}
    files = [[path.relative_to(folder).as_posix(), lookup_digest(path)] for path in inside]
    files += [[path.as_posix(), lookup_digest(path)] for path in sorted(data)]
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


CHOICE, LOSS, LM_EVAL = "choice", "loss", "lm-eval"
SUM, CHARACTERS, BYTES = "none", "characters", "bytes"
NORMS = {SUM: "acc", CHARACTERS: "acc_norm", BYTES: "acc_bytes"}
"""What the log-likelihood of a choice is divided by → lm-eval's name of the accuracy."""
BY = {CHOICE: "log-likelihood", LOSS: "minus bits per byte"}
"""What scores a probe's items, for people."""
CHOICE_HELP = 'Write rows like {"prompt": "The capital of France is", "choices": ["Paris", "Rome"], "answer": 0}.'
LOSS_HELP = 'Write rows like {"text": "…"}, or conversations with an answer.'


@dataclass(frozen=True, slots=True)
class Probe:
    """What a task asks of likelihoods.

    Attributes:
        kind: `choice`, `loss` or `lm-eval`.
        norm: what decides for a choice: the log-likelihood itself, or that by character or byte of the choice.
        template: a choice is the answer to a chat; without, it continues a plain text.
        harness: the task of lm-eval; None of the other kinds.
    """

    kind: str
    norm: str = SUM
    template: bool = False
    harness: Harness | None = None


class Choices(NamedTuple):
    """What an item of `choice` asks.

    Attributes:
        texts: at least two.
        answer: the place of the right one.
    """

    texts: tuple[str, ...]
    answer: int


ProbeQuestion = Choices | Document | Requests | Completion
"""What a probe asks: one of some choices, a text, or what lm-eval asks."""


def parsed_probe(task: Mapping[str, Any], at: str) -> Probe | None:
    """The probe of a task as `eval.tasks` writes it; None where it is none.

    Raises:
        InputError: it is wrong.
    """
    harness = parsed_harness(task, at)
    if harness is not None:
        return Probe(LM_EVAL, harness=harness)
    chosen = task.get("probe") == CHOICE
    for key in ("norm", "template"):
        require(chosen or key not in task, f"{at}.{key}", task.get(key), "is of probe: choice alone", "Drop it.")
    if task.get("probe") is None:
        return None
    kind = get_choice(task, at, "probe", (CHOICE, LOSS))
    problem = "is of tasks whose answers are checked, and a probe generates none"
    require(task.get("check") is None, f"{at}.check", task.get("check"), problem, "Drop it.")
    require(bool(task.get("path")), f"{at}.path", task.get("path"), "is needed for a probe", "Name a file of rows.")
    return Probe(kind, get_choice(task, at, "norm", [*NORMS], SUM), get_flag(task, at, "template", False))


def asked_by(row: Row, probe: Probe, id: str, system: str | None) -> tuple[Conversation, ProbeQuestion]:
    """What a row asks: the prompt, or the text as one, and what is weighed.

    Args:
        system: the system turn of conversations that have none.

    Raises:
        InputError: the row is none of this probe's.
    """
    require(row.data.get("check") is None, f"{row.where}, check", row.data.get("check"), "is of tasks whose answers "
            "are checked, and this one is a probe", "Drop it, or drop probe.")  # fmt: skip
    prompt, asked = choices_of(row, probe, id) if probe.kind == CHOICE else passage_of(row, id)
    if not probe.template and not isinstance(asked, Conversation):
        return prompt, asked
    prompt = replace(prompt, messages=with_default_system(prompt.messages, system))
    return prompt, prompt if isinstance(asked, Conversation) else asked


def choices_of(row: Row, probe: Probe, id: str) -> tuple[Conversation, Choices]:
    """The context, as a turn of the user's, and the choices."""
    given = [key for key in ("prompt", "context") if key in row.data]
    require(len(given) == 1, row.where, sorted(row.data), "has not one of prompt and context", CHOICE_HELP)
    context = row.data[given[0]]
    context = "" if context is None and row.texts else context  # an empty cell of a table
    if probe.template:
        with row.naming_errors():
            prompt = truncate_to_question(parse_document({"prompt": context}, id))
        require(prompt is not None, row.where, context, "asks nothing", CHOICE_HELP)
        assert prompt is not None
    else:
        problem = "is no text; a chat needs template: true"
        if not isinstance(context, str):
            raise InputError(f"{row.where}, {given[0]}", context, problem, CHOICE_HELP)
        prompt = Conversation((Message("user", context),), id)
    choices = parse_json_or_text(row.data.get("choices")) if row.texts else row.data.get("choices")
    if not isinstance(choices, list | tuple) or len(choices) < 2:
        raise InputError(f"{row.where}, choices", choices, "is no list of at least two texts", CHOICE_HELP)
    texts = tuple(parse_text(each, f"{row.where}, choices[{i}]") for i, each in enumerate(choices))
    twice = next((text for i, text in enumerate(texts) if text in texts[:i]), None)
    problem = f"has {twice} twice, and equal choices are equally likely"
    require(twice is None, f"{row.where}, choices", choices, problem, "Write each choice once.")
    return prompt, Choices(texts, place_of(row, len(texts)))


def place_of(row: Row, choices: int) -> int:
    """The right choice of a row: its place from 0, or its letter from A. A cell of a table has the place as a text."""
    answer = row.data.get("answer")
    at, remedy = f"{row.where}, answer", f"Write its place from 0 to {choices - 1}, or its letter from A."
    require(answer is not None and answer != "", at, "(missing)", "is missing", remedy)
    place: Any = answer
    if isinstance(answer, str) and len(answer) == 1 and "A" <= answer.upper() <= "Z":
        place = ord(answer.upper()) - ord("A")
    elif row.texts and isinstance(answer, str) and answer.isdecimal():
        place = int(answer)
    kinds = ((bool, "true or false"), (str, "a text"), (float, "a number with a decimal point"))
    kind = next((words for of, words in kinds if isinstance(place, of)), "")
    require(not kind, at, answer, f"is {kind}, and a place is a whole number", remedy)
    if not isinstance(place, int) or not 0 <= place < choices:
        raise InputError(at, answer, f"names none of {choices} choices", remedy)
    return place


def passage_of(row: Row, id: str) -> tuple[Conversation, Document]:
    """A text, or a conversation with an answer that is trained on."""
    columns = {key: value for key, value in row.data.items() if key not in ("category", "source", "check")}
    with row.naming_errors():
        document = parse_document(columns, id)
    if isinstance(document, str):
        require(bool(document), f"{row.where}, text", document, "is empty", LOSS_HELP)
        return Conversation((Message("user", document),), id), document
    asked = next((i for i, turn in enumerate(document.messages) if turn.role != "system"), 0)
    told = any(turn.role == "assistant" and turn.trained for turn in document.messages[asked + 1 :])
    right = told and size_of(document) > 0
    require(right, row.where, sorted(row.data), "has no answer behind a question", LOSS_HELP)
    return document, document


def size_of(document: Document) -> int:
    """Bytes of UTF-8 of what is scored: of a text all of it, of a conversation what the assistant's trained turns say,
    the calls of tools among it. The tokens that end a turn are scored, and have no bytes."""
    if isinstance(document, str):
        return len(document.encode())
    said = [turn for turn in document.messages if turn.role == "assistant" and turn.trained]
    texts = [turn.content for turn in said]
    texts += [text for turn in said for call in turn.tool_calls for text in (call.name, call.arguments)]
    return sum(len(text.encode()) for text in texts)


def chosen(asked: Choices, logprobs: Sequence[float]) -> dict[str, Any]:
    """What a system makes of some choices: which is the likeliest by each norm; of equal ones the first.

    Args:
        logprobs: of each choice, in nats.
    """
    sizes = {
        SUM: [1] * len(asked.texts), CHARACTERS: [len(text) for text in asked.texts],
        BYTES: [len(text.encode()) for text in asked.texts],
    }  # fmt: skip
    found: dict[str, Any] = {"logprobs": [*logprobs]}
    for norm, name in NORMS.items():
        by = [logprob / size for logprob, size in zip(logprobs, sizes[norm], strict=True)]
        found[f"{name}_choice"] = by.index(max(by))
        found[name] = float(found[f"{name}_choice"] == asked.answer)
    return found


def bits_per_byte(nats: float, size: int) -> float:
    """A negative log-likelihood in bits, by byte of the text: the same unit whatever the tokenizer."""
    return nats / math.log(2) / size


def figures_of(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """A system's figures over the items of a probe, each item counted once: of choices the accuracies, of texts the
    bits per byte, the nats per token and the perplexity of a token over all of them together.

    Args:
        found: of each item, as `chosen` makes it, or `{nats, tokens, bytes}`.
    """
    if "logprobs" in found[0]:
        return {name: sum(one[name] for one in found) / len(found) for name in NORMS.values()}
    nats, tokens, size = (sum(one[key] for one in found) for key in ("nats", "tokens", "bytes"))
    return {
        "bits_per_byte": bits_per_byte(nats, size), "nats_per_token": nats / tokens,
        "perplexity": math.exp(min(nats / tokens, 700.0)),
    }  # fmt: skip
