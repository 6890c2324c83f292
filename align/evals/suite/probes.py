"""Probes: evaluation tasks that measure the likelihood of texts and need no judge. Imports neither torch nor lm-eval.

    {name: arc, path: arc.jsonl, probe: choice}      the likeliest of several choices has to be the right one {name:
    wiki, path: texts.jsonl, probe: loss}     bits per byte of a text {name: arc, lm_eval: arc_local, include: tasks/} a
    task of lm-eval (EleutherAI's lm-evaluation-harness)

`include` is a folder of lm-eval's own YAML files, whose data are local files. Answers are generated only for tasks of
lm-eval that ask for them.
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
from align.data.read.conversations import parse_document
from align.data.read.messages import with_default_system
from align.data.read.rows import Row
from align.data.split import truncate_to_question
from align.rollout.answer_cache import AnswerKey, CachedAnswer
from align.run import Input, json_digest
from align.run.digests import lookup_digest

HELP = "Write {name: arc, lm_eval: TASK, include: FOLDER}; FOLDER holds TASK's YAML file."
READERS = ("json", "csv", "parquet", "text")
"""Allowed values of `dataset_path` in lm-eval's YAML files: loaders of local files instead of a hub."""
LOCAL_DATA_REMEDY = (
    f"Write dataset_path: one of {', '.join(READERS)}, and dataset_kwargs: {{data_files: {{test: FILE}}}}."
)


LMEvalReplies = Mapping[tuple[Any, ...], Any]
"""Arguments of a request → (log-likelihood in nats, whether greedy decoding gives it); for a `CompletionRequest`, the
completion."""


class HarnessTask(NamedTuple):
    """A task of lm-eval and the folder that defines it.

    Attributes:
        task: lm-eval's name of a task, or of a group.
        include: the folder with its YAML file.
        metric: that scores an item. Empty for the first suitable one.
    """

    task: str
    include: str
    metric: str = ""


class LikelihoodRequests(NamedTuple):
    """The log-likelihood requests of lm-eval about an item.

    Attributes:
        task, doc: lm-eval's name of the task (not of its group), and the item's index in its data.
        texts: for each request a context and its continuation; or a single request of one text, which is scored as a
            whole.
    """

    task: str
    doc: int
    texts: tuple[tuple[str, ...], ...]


class CompletionRequest(NamedTuple):
    """A text that lm-eval has a model continue with greedy decoding.

    Attributes:
        task, doc: see `LikelihoodRequests`.
        context: the text that is continued with greedy decoding.
        until: texts that end the answer. It is cut before the first of them.
        max_tokens: maximum tokens of the answer.
    """

    task: str
    doc: int
    context: str
    until: tuple[str, ...]
    max_tokens: int

    @property
    def request(self) -> tuple[str, tuple[str, ...], int]:
        """The fields that determine a model's answer: context, stop texts and maximum number of tokens."""
        return self.context, self.until, self.max_tokens


class WrittenCompletion(NamedTuple):
    """A generated answer with its cache key, which holds all settings that determine it."""

    request: AnswerKey
    answer: CachedAnswer


def parse_harness(task: Mapping[str, Any], field: str) -> HarnessTask | None:
    """Parse the keys `lm_eval`, `include` and `metric` of an entry of `eval.tasks`. Returns None if it is no task of
    lm-eval.

    Raises:
        InputError: a key is invalid.
    """
    name = task.get("lm_eval")
    if name is None:
        for key in ("include", "metric"):
            require(key not in task, f"{field}.{key}", task.get(key), "applies to tasks of lm-eval only", "Drop it.")
        return None
    for key in ("path", "check", "probe", "norm", "template"):
        require(key not in task, f"{field}.{key}", task.get(key), "does not apply to tasks of lm-eval", "Drop it.")
    for key, value in (("lm_eval", name), ("include", task.get("include")), ("metric", task.get("metric", "acc"))):
        require(isinstance(value, str) and bool(value), f"{field}.{key}", value, "is no name", HELP)
    problem = "downloads nltk's data; align has checks of its own for it"
    remedy = "Write {name: ifeval, path: ifeval.jsonl} with IFEval's rows; see docs/checkers.md."
    require("ifeval" not in name.lower(), f"{field}.lm_eval", name, problem, remedy)
    return HarnessTask(name, task["include"], task.get("metric", ""))


def build_harness_input(harness: HarnessTask, field: str) -> Input:
    """Return an lm-eval task as an input for the run's manifest, with a digest of lm-eval's version, the task's folder
    and its data files.

    Raises:
        InputError: lm-eval is not installed, the folder does not exist, or its tasks load data from a hub or by code,
            which no digest would cover.
    """
    require_extra("evals", f"{field}.lm_eval", harness.task)
    folder = parse_user_path(harness.include, f"{field}.include")
    require(folder.is_dir(), f"{field}.include", harness.include, "is no folder", HELP)
    paths = (path for path in folder.rglob("*") if not path.is_dir() and "__pycache__" not in path.parts)
    task_files = sorted(path for path in paths if has_file(path, f"{field}.include", HELP))
    data_files = {Path(name) for path in task_files if may_be_yaml(path) for name in iter_data_files(path, folder)}
    files = [[path.relative_to(folder).as_posix(), lookup_digest(path)] for path in task_files]
    files += [[path.as_posix(), lookup_digest(path)] for path in sorted(data_files)]
    digest = json_digest({"task": harness.task, "lm_eval": version("lm_eval"), "files": files})
    return Input(digest, ref=harness.task, path=harness.include)


def may_be_yaml(path: Path) -> bool:
    """Return whether a file's name ends like that of a YAML file. lm-eval's included templates may be called
    `_arc_yaml`."""
    return path.name.endswith(("yaml", "yml"))


class PlainLoader(yaml.SafeLoader):
    """A YAML loader that reads tagged values as None, so that no Python code is loaded."""


PlainLoader.add_multi_constructor("!", lambda loader, tag, node: None)


def iter_data_files(path: Path, folder: Path) -> Iterator[str]:
    """Yield the names of the local data files that an lm-eval YAML file refers to.

    Raises:
        InputError: the data would be loaded from elsewhere.
        CorruptFile: the file is not valid YAML.
    """
    text = read_text(path, "include", "Correct it, or move it away.")
    try:
        config = yaml.load(text, PlainLoader)
    except yaml.YAMLError as error:
        raise CorruptFile("include", str(path), f"is no YAML ({error})", "Correct it, or move it away.") from error
    yield from iter_referenced_files(config, path, folder)


def iter_referenced_files(value: Any, path: Path, folder: Path) -> Iterator[str]:
    """Yield the names of the data files in a parsed part of an lm-eval YAML file, at any depth, without following
    includes. Raises InputError if data would come from a hub or from code."""
    if isinstance(value, list):
        for entry in value:
            yield from iter_referenced_files(entry, path, folder)
    if not isinstance(value, Mapping):
        return
    for key, entry in value.items():
        at = f"{path}, {key}"
        require(
            key != "dataset_path" or entry in READERS, at, entry, "names a dataset of a hub, or code", LOCAL_DATA_REMEDY
        )
        problem = "loads data whose content no digest records"
        require(key not in ("data_dir", "custom_dataset", "class"), at, entry, problem, LOCAL_DATA_REMEDY)
        if key == "include":
            for name in entry if isinstance(entry, list) else [entry]:
                template = (path.parent / str(name)).resolve()
                is_valid = template.is_relative_to(folder.resolve()) and may_be_yaml(template)
                require(is_valid, at, name, "is no YAML file of the folder", f"Copy it into {folder}, as NAME.yaml.")
        elif key == "data_files":
            yield from iter_listed_files(entry, at)
        else:
            yield from iter_referenced_files(entry, path, folder)


def iter_listed_files(value: Any, field: str) -> Iterator[str]:
    """Yield the file names of a `data_files` entry: one name, a list of names, or a mapping from splits to them. Raises
    InputError if a file does not exist."""
    if isinstance(value, str):
        if not Path(value).is_file():
            raise InputError(field, value, "is no file", "Name a file from the working folder, without a pattern.")
        yield value
        return
    require(isinstance(value, list | Mapping) and bool(value), field, value, "names no file", LOCAL_DATA_REMEDY)
    for entry in value.values() if isinstance(value, Mapping) else value:
        yield from iter_listed_files(entry, field)


CHOICE = "choice"
LOSS = "loss"
LM_EVAL = "lm-eval"
SUM = "none"
CHARACTERS = "characters"
BYTES = "bytes"
NORMS = {SUM: "acc", CHARACTERS: "acc_norm", BYTES: "acc_bytes"}
"""Normalisations of a choice's log-likelihood, mapped to lm-eval's name of the resulting accuracy."""
SCORED_BY = {CHOICE: "log-likelihood", LOSS: "minus bits per byte"}
"""Kinds of probes, mapped to the display name of their items' score."""
CHOICE_HELP = 'Write rows like {"prompt": "The capital of France is", "choices": ["Paris", "Rome"], "answer": 0}.'
LOSS_HELP = 'Write rows like {"text": "…"}, or conversations with an answer.'


@dataclass(frozen=True, slots=True)
class Probe:
    """The settings of a probe, an evaluation task that measures likelihoods.

    Attributes:
        kind: `choice`, `loss` or `lm-eval`.
        norm: normalisation of the log-likelihoods of choices: none, by character or by byte of the choice.
        template: True if a choice is the answer to a chat. Otherwise it continues a plain text.
        harness: the task of lm-eval. None for the other kinds.
    """

    kind: str
    norm: str = SUM
    template: bool = False
    harness: HarnessTask | None = None


class ChoiceQuestion(NamedTuple):
    """The choices of a multiple-choice item and the index of the right one.

    Attributes:
        texts: at least two.
        answer: index of the right one.
    """

    texts: tuple[str, ...]
    answer: int


ProbeQuestion = ChoiceQuestion | Document | LikelihoodRequests | CompletionRequest
"""The content of a probe's item: choices, a text or a conversation, or lm-eval's requests."""


def parse_probe(task: Mapping[str, Any], field: str) -> Probe | None:
    """Parse the probe settings of an entry of `eval.tasks`. Returns None if the task is not a probe.

    Raises:
        InputError: a key is invalid.
    """
    harness = parse_harness(task, field)
    if harness is not None:
        return Probe(LM_EVAL, harness=harness)
    is_choice = task.get("probe") == CHOICE
    for key in ("norm", "template"):
        require(
            is_choice or key not in task, f"{field}.{key}", task.get(key), "applies to probe: choice only", "Drop it."
        )
    if task.get("probe") is None:
        return None
    kind = get_choice(task, field, "probe", (CHOICE, LOSS))
    problem = "applies to tasks whose answers are checked, and a probe generates none"
    require(task.get("check") is None, f"{field}.check", task.get("check"), problem, "Drop it.")
    require(bool(task.get("path")), f"{field}.path", task.get("path"), "is needed for a probe", "Name a file of rows.")
    return Probe(kind, get_choice(task, field, "norm", [*NORMS], SUM), get_flag(task, field, "template", False))


def parse_probe_row(row: Row, probe: Probe, id: str, system: str | None) -> tuple[Conversation, ProbeQuestion]:
    """Parse a row of a probe's data file into a prompt and the content whose likelihood is measured.

    The prompt of a plain text is the text itself.

    Args:
        system: the system turn of conversations that have none.

    Raises:
        InputError: the row does not fit the probe.
    """
    check = row.data.get("check")
    problem = "applies to tasks whose answers are checked, and this task is a probe"
    require(check is None, f"{row.where}, check", check, problem, "Drop it, or drop probe.")
    prompt, content = parse_choices(row, probe, id) if probe.kind == CHOICE else parse_passage(row, id)
    if not probe.template and not isinstance(content, Conversation):
        return prompt, content
    prompt = replace(prompt, messages=with_default_system(prompt.messages, system))
    return prompt, prompt if isinstance(content, Conversation) else content


def parse_choices(row: Row, probe: Probe, id: str) -> tuple[Conversation, ChoiceQuestion]:
    """Parse a row of a multiple-choice probe into a conversation with the context as user turn, and the choices. Raises
    InputError if the row does not fit."""
    context_keys = [key for key in ("prompt", "context") if key in row.data]
    require(len(context_keys) == 1, row.where, sorted(row.data), "needs either prompt or context", CHOICE_HELP)
    context = row.data[context_keys[0]]
    context = "" if context is None and row.texts else context  # an empty cell of a table
    if probe.template:
        with row.naming_errors():
            prompt = truncate_to_question(parse_document({"prompt": context}, id))
        require(prompt is not None, row.where, context, "asks nothing", CHOICE_HELP)
        assert prompt is not None
    else:
        problem = "is no text; a chat needs template: true"
        if not isinstance(context, str):
            raise InputError(f"{row.where}, {context_keys[0]}", context, problem, CHOICE_HELP)
        prompt = Conversation((Message("user", context),), id)
    choices = parse_json_or_text(row.data.get("choices")) if row.texts else row.data.get("choices")
    if not isinstance(choices, list | tuple) or len(choices) < 2:
        raise InputError(f"{row.where}, choices", choices, "is no list of at least two texts", CHOICE_HELP)
    texts = tuple(parse_text(choice, f"{row.where}, choices[{i}]") for i, choice in enumerate(choices))
    repeated = next((text for i, text in enumerate(texts) if text in texts[:i]), None)
    problem = f"has {repeated} twice, and equal choices are equally likely"
    require(repeated is None, f"{row.where}, choices", choices, problem, "Write each choice once.")
    return prompt, ChoiceQuestion(texts, parse_answer_index(row, len(texts)))


def parse_answer_index(row: Row, choices: int) -> int:
    """Return the index of the right choice from a row's `answer`, a number from 0 or a letter from A. Raises InputError
    if it names no choice. In a cell of a table the number is a text."""
    answer = row.data.get("answer")
    at = f"{row.where}, answer"
    remedy = f"Write its position from 0 to {choices - 1}, or its letter from A."
    require(answer is not None and answer != "", at, "(missing)", "is missing", remedy)
    index: Any = answer
    if isinstance(answer, str) and len(answer) == 1 and "A" <= answer.upper() <= "Z":
        index = ord(answer.upper()) - ord("A")
    elif row.texts and isinstance(answer, str) and answer.isdecimal():
        index = int(answer)
    type_names = ((bool, "true or false"), (str, "a text"), (float, "a number with a decimal point"))
    type_name = next((name for type_, name in type_names if isinstance(index, type_)), "")
    require(not type_name, at, answer, f"is {type_name}, but the position of a choice is a whole number", remedy)
    if not isinstance(index, int) or not 0 <= index < choices:
        raise InputError(at, answer, f"names none of {choices} choices", remedy)
    return index


def parse_passage(row: Row, id: str) -> tuple[Conversation, Document]:
    """Parse a row of a `loss` probe: a text, or a conversation with a trained answer. Returns its prompt and itself.
    Raises InputError if there is nothing to score."""
    columns = {key: value for key, value in row.data.items() if key not in ("category", "source", "check")}
    with row.naming_errors():
        document = parse_document(columns, id)
    if isinstance(document, str):
        require(bool(document), f"{row.where}, text", document, "is empty", LOSS_HELP)
        return Conversation((Message("user", document),), id), document
    first = next((i for i, turn in enumerate(document.messages) if turn.role != "system"), 0)
    has_answer = any(turn.role == "assistant" and turn.trained for turn in document.messages[first + 1 :])
    is_valid = has_answer and count_scored_bytes(document) > 0
    require(is_valid, row.where, sorted(row.data), "has no answer after a question", LOSS_HELP)
    return document, document


def count_scored_bytes(document: Document) -> int:
    """Return the number of UTF-8 bytes of the scored text: all of a text, or the trained assistant turns of a
    conversation. Tool calls are included. The tokens that end a turn are scored but have no bytes."""
    if isinstance(document, str):
        return len(document.encode())
    turns = [turn for turn in document.messages if turn.role == "assistant" and turn.trained]
    texts = [turn.content for turn in turns]
    texts += [text for turn in turns for call in turn.tool_calls for text in (call.name, call.arguments)]
    return sum(len(text.encode()) for text in texts)


def score_choices(choices: ChoiceQuestion, logprobs: Sequence[float]) -> dict[str, Any]:
    """Return the likeliest choice and its correctness for each normalisation of the log-likelihood: sum, per character
    and per byte. Of equally likely choices the first counts.

    Args:
        logprobs: of each choice, in nats.
    """
    sizes = {
        SUM: [1] * len(choices.texts),
        CHARACTERS: [len(text) for text in choices.texts],
        BYTES: [len(text.encode()) for text in choices.texts],
    }
    scores: dict[str, Any] = {"logprobs": [*logprobs]}
    for norm, name in NORMS.items():
        normalised = [logprob / size for logprob, size in zip(logprobs, sizes[norm], strict=True)]
        choice = normalised.index(max(normalised))
        scores[f"{name}_choice"] = choice
        scores[name] = float(choice == choices.answer)
    return scores


def compute_bits_per_byte(negative_log_likelihood: float, byte_count: int) -> float:
    """Convert a text's negative log-likelihood in nats to bits per UTF-8 byte, which does not depend on the
    tokenizer."""
    return negative_log_likelihood / math.log(2) / byte_count


def compute_probe_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Compute a model's figures over a probe's items: accuracies for choices, or bits per byte, nats per token and
    perplexity for texts.

    For choices these are the accuracies, with each item counted once. For texts they are the bits per byte, the nats
    per token and the perplexity of a token over all texts together.

    Args:
        rows: for each item the result of `score_choices`, or `{nats, tokens, bytes}`.
    """
    if "logprobs" in rows[0]:
        return {name: sum(row[name] for row in rows) / len(rows) for name in NORMS.values()}
    nats, tokens, size = (sum(row[key] for row in rows) for key in ("nats", "tokens", "bytes"))
    return {
        "bits_per_byte": compute_bits_per_byte(nats, size),
        "nats_per_token": nats / tokens,
        "perplexity": math.exp(min(nats / tokens, 700.0)),
    }
