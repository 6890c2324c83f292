"""Tasks of lm-eval in an evaluation: their items, and lm-eval's figures of each model.

The tasks are built once, before anything is computed. Afterwards lm-eval's own evaluation runs for each system, on an
`LM` that returns log-likelihoods and answers computed before (`align.evals.suite.likelihoods`). Import this module only
where lm-eval is known to be installed. Imports no torch.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import version
from io import StringIO
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from lm_eval.api.model import LM
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window

from align import ranks
from align.core.errors import AlignError, InputError, require
from align.core.files import parse_user_path
from align.core.types import Conversation, Message
from align.data.chat.continuations import (
    build_scored_row,
    encode_continuation,
    encode_with_special_tokens,
    get_prefix_token_id,
)
from align.evals.suite.probes import (
    CompletionRequest,
    HarnessTask,
    LikelihoodRequests,
    LMEvalReplies,
    WrittenCompletion,
)
from align.evals.suite.results import EvaluatedAnswer, ScoredTask
from align.evals.suite.systems import System
from align.evals.suite.tasks import EvalItem, EvalTask, cluster_items
from align.report.figure_text import pluralize
from align.run import json_digest, write_json

if TYPE_CHECKING:
    from align.data.chat.encode import EncodedRow
    from align.evals.suite.likelihoods import Likelihood

FOLDER = "lm_eval"
"""Folder in a run's artifact for lm-eval's results, `TASK/SYSTEM.json`."""

ROLLING = "loglikelihood_rolling"
GENERATE_UNTIL = "generate_until"
KINDS = ("multiple_choice", "loglikelihood", ROLLING, GENERATE_UNTIL)
MAX_TOKENS = 256
"""Default maximum number of tokens of an answer, as in lm-eval's `hf` model."""
MAX_TOKENS_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
GREEDY_KEYS = ("until", *MAX_TOKENS_KEYS, "do_sample", "temperature")
SAMPLING_KEYS = ("top_p", "top_k", "min_p")
"""Keys of `generation_kwargs` that are accepted but have no effect on greedy decoding."""
SEEDS = {"random_seed": DEFAULT_RANDOM_SEED, "numpy_seed": DEFAULT_OTHER_SEED, "fewshot_seed": DEFAULT_OTHER_SEED}
"""Random seeds for few-shot examples and for code in a folder of tasks, as on lm-eval's command line."""


class StoredReplies(LM):
    """An lm-eval model that returns log-likelihoods and answers computed before."""

    def __init__(self, replies: LMEvalReplies) -> None:
        super().__init__()
        self.replies = replies

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return [self.replies[request.args] for request in requests]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        return [self.replies[request.args][0] for request in requests]

    def generate_until(self, requests: list[Any]) -> list[str]:
        return [
            self.replies[context, *parse_stop_rules(kwargs)]
            for context, kwargs in (request.args for request in requests)
        ]


class LMEvalOutcome(NamedTuple):
    """lm-eval's results for one model: its figures, and the metrics of each item.

    Attributes:
        results: as lm-eval writes them.
        metrics: of each item, in order. An item may lack some metrics.
    """

    results: dict[str, Any]
    metrics: Sequence[Mapping[str, float]]


@contextmanager
def isolate_lm_eval(harness: HarnessTask, field: str) -> Iterator[None]:
    """Set lm-eval's random seeds, hide its progress bars and turn its exceptions into InputError while the `with` block
    runs. The process's random state is restored.

    Raises:
        InputError: the code fails. YAML, templates and functions of a task are the user's, and may fail in any way.
    """
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    random.seed(SEEDS["random_seed"])
    np.random.seed(SEEDS["numpy_seed"])
    try:
        with redirect_stderr(StringIO()):
            yield
    except AlignError:
        raise
    except Exception as error:
        reason: BaseException = error
        while reason.__cause__ is not None:  # only the innermost error of datasets explains the problem
            reason = reason.__cause__
        problem = f"fails in lm-eval ({type(reason).__name__}: {reason})"
        raise InputError(f"{field}.lm_eval", harness.task, problem, f"Correct it in {harness.include}.") from error
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def build_tasks(harness: HarnessTask, field: str) -> dict[str, Any]:
    """Load an lm-eval task or group with lm-eval's `TaskManager`, and build the requests of its items. The result is
    the same each time.

    Raises:
        InputError: the folder has no such task, lm-eval cannot read it, or it samples answers.
    """
    with isolate_lm_eval(harness, field):
        manager = TaskManager(include_path=str(parse_user_path(harness.include, "include")), include_defaults=False)
        names = manager.all_tasks
        problem = f"is no task of {harness.include}"
        remedy = f"Its tasks are {', '.join(names)}." if names else "No YAML file there is a task of lm-eval."
        require(harness.task in names, f"{field}.lm_eval", harness.task, problem, remedy)
        groups: dict[str, Any] = {**manager.load([harness.task])}
        for name, task in groups["tasks"].items():
            kind = task.get_config("output_type")
            problem = f"asks for {kind} in {name}"
            remedy = f"Its output_type can be one of {', '.join(KINDS)}."
            require(kind in KINDS, f"{field}.lm_eval", harness.task, problem, remedy)
            if kind == GENERATE_UNTIL:
                require_greedy(task.get_config("generation_kwargs"), f"{field}, {name}, generation_kwargs")
            metrics = [*task.higher_is_better()]
            problem = f"is no metric of {name}"
            is_metric = not harness.metric or harness.metric in metrics
            require(is_metric, f"{field}.metric", harness.metric, problem, f"Its metrics are {', '.join(metrics)}.")
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(SEEDS["fewshot_seed"])
            task.build_all_requests()
        return groups


def require_greedy(kwargs: Mapping[str, Any], field: str) -> None:
    """Raise InputError if a task's `generation_kwargs` ask for sampling, or have an unknown key or a wrong value.

    Args:
        field: the field, for error messages.
    """
    problem = "asks for sampling, and tasks of lm-eval are decoded greedily here"
    remedy = "Drop it, or write"
    do_sample = kwargs.get("do_sample") or False
    require(do_sample is False, f"{field}.do_sample", do_sample, problem, f"{remedy} do_sample: false.")
    temperature = kwargs.get("temperature") or 0.0
    require(temperature == 0, f"{field}.temperature", temperature, problem, f"{remedy} temperature: 0.")
    unknown_key = next((key for key in kwargs if key not in (*GREEDY_KEYS, *SAMPLING_KEYS)), None)
    problem = "is not known to greedy decoding here"
    remedy = f"Drop it: answers are made by {', '.join(GREEDY_KEYS)}."
    require(unknown_key is None, f"{field}.{unknown_key}", kwargs.get(unknown_key or ""), problem, remedy)
    until = kwargs.get("until")
    for text in until if isinstance(until, list) else [until or ""]:
        require(isinstance(text, str), f"{field}.until", text, "is no text", 'Write until: ["\\n"].')
    max_tokens = next((kwargs[key] for key in MAX_TOKENS_KEYS if kwargs.get(key) is not None), MAX_TOKENS)
    is_valid = isinstance(max_tokens, int) and not isinstance(max_tokens, bool) and max_tokens > 0
    remedy = f"Write max_gen_toks: {MAX_TOKENS}."
    require(is_valid, f"{field}.max_gen_toks", max_tokens, "is no number of tokens", remedy)


class StopRules(NamedTuple):
    """The stop texts and the token limit of a greedy answer.

    Attributes:
        until: texts before which an answer is cut.
        max_tokens: maximum number of tokens of an answer.
    """

    until: tuple[str, ...]
    max_tokens: int


def parse_stop_rules(kwargs: Mapping[str, Any]) -> StopRules:
    """Parse the stop texts and the maximum number of tokens from a task's `generation_kwargs`, as lm-eval does."""
    settings: Any = normalize_gen_kwargs({**kwargs}, MAX_TOKENS)
    stops = handle_stop_sequences(settings.get("until"), None)
    return StopRules(tuple(text for text in stops if text), settings["max_gen_toks"])


def load_harness_items(task: EvalTask, harness: HarnessTask) -> Sequence[EvalItem]:
    """Build evaluation items, with lm-eval's requests, from the documents of an lm-eval task. A group has the items of
    all its tasks, each with its task as the category.

    Raises:
        InputError: see `build_tasks`.
    """
    lm_tasks = build_tasks(harness, task.field)["tasks"]
    items: list[EvalItem] = []
    for name, lm_task in lm_tasks.items():
        instances_by_doc: dict[int, list[Any]] = {}
        for instance in lm_task.instances:
            instances_by_doc.setdefault(instance.doc_id, []).append(instance)
        with isolate_lm_eval(harness, task.field):
            texts = {doc: get_item_text(lm_task, instances) for doc, instances in instances_by_doc.items()}
        build_probe = (
            build_completion_request
            if lm_task.get_config("output_type") == GENERATE_UNTIL
            else build_likelihood_requests
        )
        for doc, instances in instances_by_doc.items():
            id = f"{name}/{doc}" if len(lm_tasks) > 1 else str(doc)
            prompt = Conversation((Message("user", texts[doc]),), id)
            probe = build_probe(name, doc, instances, task.field)
            items.append(EvalItem(id, id, name if len(lm_tasks) > 1 else "", prompt, None, probe=probe))
    return cluster_items(items)


def build_likelihood_requests(name: str, doc: int, instances: Sequence[Any], field: str) -> LikelihoodRequests:
    """Build the log-likelihood requests of one item from lm-eval's instances. `doc` is the item's index in the task's
    data."""
    return LikelihoodRequests(name, doc, tuple(tuple(map(str, instance.args)) for instance in instances))


def build_completion_request(name: str, doc: int, instances: Sequence[Any], field: str) -> CompletionRequest:
    """Build the completion request of one item from lm-eval's instance. Raises InputError if the request holds more
    than one text, such as images."""
    args = instances[0].args
    problem = f"asks about more than a text in item {doc}"
    is_text = len(instances) == 1 and len(args) == 2
    require(is_text, f"{field}, {name}", name, problem, "Drop its images and sounds.")
    return CompletionRequest(name, doc, str(args[0]), *parse_stop_rules(args[1]))


def get_item_text(lm_task: Any, instances: Sequence[Any]) -> str:
    """Return the text of an item without few-shot examples, or the whole context of its first request if lm-eval has no
    such text."""
    text = lm_task.doc_to_text(instances[0].doc)
    return text if isinstance(text, str) and text.strip() else str(instances[0].args[0])


def evaluate_items(
    task: EvalTask, harness: HarnessTask, groups: Mapping[str, Any], items: Sequence[EvalItem], replies: LMEvalReplies
) -> LMEvalOutcome:
    """Run lm-eval's own evaluation on some items, with a model's stored log-likelihoods and answers as its replies.

    Args:
        groups: see `build_tasks`. Filters and metrics modify its tasks, and each call resets them first.

    Raises:
        InputError: a metric fails.
    """
    docs_by_task: dict[str, list[int]] = {}
    for item in items:
        name, doc = get_task_and_doc(item)
        docs_by_task.setdefault(name, []).append(doc)
    with isolate_lm_eval(harness, task.field):
        selected = {name: restrict_to_docs(groups["tasks"][name], docs) for name, docs in docs_by_task.items()}
        is_complete = len(selected) == len(groups["tasks"])  # lm-eval has no figures of a group that lacks a task
        task_dict: Any = {"tasks": selected, "groups": {}, "group_map": {}}
        if is_complete:
            task_dict = {**groups, "tasks": selected}
        results: Any = evaluate(lm=StoredReplies(replies), task_dict=task_dict, bootstrap_iters=0, log_samples=True)
    samples: dict[tuple[str, int], Mapping[str, float]] = {}
    for name, rows in results.pop("samples").items():
        is_rolling = selected[name].get_config("output_type") == ROLLING
        for row in rows:  # the first of several filters counts
            samples.setdefault((name, row["doc_id"]), extract_metrics(row, is_rolling))
    metrics = [samples[get_task_and_doc(item)] for item in items]
    return LMEvalOutcome(json.loads(json.dumps(results, default=handle_non_serializable)), metrics)


def get_task_and_doc(item: EvalItem) -> tuple[str, int]:
    """Return (lm-eval's name of an item's task, index of the item in the task's data)."""
    assert isinstance(item.probe, LikelihoodRequests | CompletionRequest)
    return item.probe.task, item.probe.doc


def restrict_to_docs(lm_task: Any, docs: Sequence[int]) -> Any:
    """Restrict an lm-eval task to some of its documents, in place, and return it.

    Its requests stay those that were built from all data: lm-eval draws few-shot examples row by row, so that building
    fewer requests would change the examples of later rows.
    """
    selected = {*docs}
    rows = [(doc, row) for doc, row in type(lm_task).doc_iterator(lm_task) if doc in selected]
    instances = [instance for instance in lm_task.instances if instance.doc_id in selected]
    for instance in instances:
        instance.resps = []
        instance.filtered_resps = {}
    lm_task._instances = instances
    lm_task.build_all_requests = lambda **_: None
    lm_task.doc_iterator = lambda **_: iter(rows)
    return lm_task


def extract_metrics(sample: Mapping[str, Any], is_rolling: bool) -> dict[str, float]:
    """Return the metrics of an lm-eval sample that are numbers, as metric name → value.

    An accuracy is 0 or 1. A metric of a whole text, which is a pair of a log-likelihood and a count of bytes or words,
    becomes their ratio.
    """
    metrics: dict[str, float] = {}
    for name in sample["metrics"]:
        value = sample[name]
        if is_rolling and isinstance(value, tuple) and len(value) == 2:
            value = value[0] / value[1]
        if isinstance(value, Real | np.bool_):
            metrics[name] = float(value)
    return metrics


def choose_scoring_metrics(
    task: EvalTask,
    harness: HarnessTask,
    groups: Mapping[str, Any],
    items: Sequence[EvalItem],
    outcomes: Sequence[LMEvalOutcome],
) -> dict[str, str]:
    """Choose the metric that scores the items of each lm-eval task, and return task name → metric.

    It is the configured metric, or else the first one that is higher for better answers and that every item has. If
    the tasks of a group have no such metric in common, each task has its own first one, provided that all values are 0
    or 1.

    Raises:
        InputError: there is no such metric, or the configured one does not score single items.
    """
    metrics_by_item = [
        (get_task_and_doc(item)[0], metrics)
        for outcome in outcomes
        for item, metrics in zip(items, outcome.metrics, strict=True)
    ]
    names = [*dict.fromkeys(name for name, _ in metrics_by_item)]
    candidates = list_common_metrics(groups, names, metrics_by_item)
    metric = harness.metric or (candidates[0] if candidates else "")
    if metric in candidates:
        return dict.fromkeys(names, metric)
    metric_by_task = {}
    for name in names:
        if own_candidates := list_common_metrics(groups, [name], metrics_by_item):
            metric_by_task[name] = own_candidates[0]
    are_shares = len(metric_by_task) == len(names) and all(
        metrics[metric_by_task[name]] in (0.0, 1.0) for name, metrics in metrics_by_item
    )
    if not harness.metric and are_shares:
        return metric_by_task
    problem = f"scores no item by itself, of {pluralize(len(metrics_by_item), 'item')}"
    remedy = f"Name one of {', '.join(candidates)}." if candidates else "Add acc to its metric_list, or exact_match."
    all_metrics = [metric for lm_task in groups["tasks"].values() for metric in lm_task.higher_is_better()]
    raise InputError(f"{task.field}.metric", metric or [*dict.fromkeys(all_metrics)], problem, remedy)


def list_common_metrics(
    groups: Mapping[str, Any], names: Sequence[str], metrics_by_item: Sequence[tuple[str, Mapping[str, float]]]
) -> list[str]:
    """Return the metrics that every item of the tasks `names` has and that are higher for better answers. For a task
    that scores whole texts, every metric counts as higher for better."""
    candidates: list[str] = []
    for name in names:
        lm_task = groups["tasks"][name]
        # An item's number for a whole text is a log-likelihood, which is higher for better texts, while lm-eval's
        # direction is that of its figure over all texts, such as a perplexity.
        is_rolling = lm_task.get_config("output_type") == ROLLING
        candidates += [metric for metric, is_higher in lm_task.higher_is_better().items() if is_higher or is_rolling]
    own_metrics = [metrics for name, metrics in metrics_by_item if name in names]
    return [metric for metric in dict.fromkeys(candidates) if all(metric in metrics for metrics in own_metrics)]


def encode_requests(tokenizer: Any, requests: LikelihoodRequests, window: int) -> list[EncodedRow]:
    """Tokenize the requests of an item into rows with labels: one row per request, or the windows of a whole text by
    lm-eval's rules.

    Args:
        window: maximum tokens of a window.

    Raises:
        InputError: a text is empty, a continuation has no token of its own, or the tokenizer has neither BOS nor EOS.
    """
    if len(requests.texts[0]) > 1:
        return [encode_continuation(tokenizer, context, continuation) for context, continuation in requests.texts]
    ((text,),) = requests.texts
    problem = f"is no text, as item {requests.doc} of {requests.task}"
    require(bool(text.strip()), "lm_eval", text, problem, "Leave the row out.")
    ids = encode_with_special_tokens(tokenizer, text)
    pairs = get_rolling_token_windows(ids, get_prefix_token_id(tokenizer), window - 1, 1)
    return [build_scored_row(*make_disjoint_window(pair)) for pair in pairs]


def score_by_lm_eval(
    task: EvalTask,
    items: Sequence[EvalItem],
    measurements: Mapping[str, Sequence[Sequence[Likelihood] | WrittenCompletion]],
    identities: Mapping[str, Mapping[str, Any]],
    folder: Path,
) -> ScoredTask:
    """Score a task by lm-eval, and write each model's results to `lm_eval/TASK/SYSTEM.json` in `folder`. lm-eval runs
    on the main rank, which broadcasts the scored task.

    Args:
        measurements: system → for each item the likelihoods of its rows, or an answer.
        identities: system → the fields that lm-eval's results lack, see `build_result_metadata`.
        folder: of the run's artifact.

    Raises:
        InputError: no metric scores items.
    """
    assert task.probe is not None
    harness = task.probe.harness
    assert harness is not None

    def score() -> ScoredTask:
        groups = build_tasks(harness, task.field)
        replies_by_item: dict[str, list[LMEvalReplies]] = {}
        outcomes: dict[str, LMEvalOutcome] = {}
        for name, rows in measurements.items():
            replies_by_item[name] = [collect_replies(*row) for row in zip(items, rows, strict=True)]
            all_replies = {key: reply for replies in replies_by_item[name] for key, reply in replies.items()}
            outcomes[name] = evaluate_items(task, harness, groups, items, all_replies)
        metrics = choose_scoring_metrics(task, harness, groups, items, [*outcomes.values()])
        answers = {
            name: [
                build_evaluated_answer(*row, metrics)
                for row in zip(items, measurements[name], replies_by_item[name], outcome.metrics, strict=True)
            ]
            for name, outcome in outcomes.items()
        }
        are_shares = all(answer.score in (0.0, 1.0) for row in answers.values() for answer in row)
        figures = {
            name: select_task_figures(outcome.results["results"], harness.task) for name, outcome in outcomes.items()
        }
        results_folder = folder / FOLDER / task.name
        results_folder.mkdir(parents=True, exist_ok=True)
        for name, outcome in outcomes.items():
            write_json(results_folder / f"{name}.json", {**identities[name], **outcome.results})
        by = f"lm-eval's {', '.join(dict.fromkeys(metrics.values()))}"
        return ScoredTask(task.name, by, "exact" if are_shares else "measured", items, answers, figures=figures)

    (scored,) = ranks.broadcast([score()] if ranks.is_main() else list[ScoredTask]())
    return scored


def collect_replies(item: EvalItem, measurement: Sequence[Likelihood] | WrittenCompletion) -> LMEvalReplies:
    """Return the replies to one item's requests, keyed by the requests' arguments: (log-likelihood, greedy) pairs, or
    the completion."""
    if isinstance(item.probe, CompletionRequest):
        assert isinstance(measurement, WrittenCompletion)
        return {item.probe.request: measurement.answer.text}
    assert isinstance(item.probe, LikelihoodRequests)
    assert not isinstance(measurement, WrittenCompletion)
    texts = item.probe.texts
    parts = [measurement] if len(texts[0]) == 1 else [[row] for row in measurement]
    return {
        text: (sum(row.logprob for row in part), all(row.greedy for row in part))
        for text, part in zip(texts, parts, strict=True)
    }


def build_evaluated_answer(
    item: EvalItem,
    measurement: Sequence[Likelihood] | WrittenCompletion,
    replies: LMEvalReplies,
    metrics: Mapping[str, float],
    scored_by: Mapping[str, str],
) -> EvaluatedAnswer:
    """Build a model's scored answer to an item. Its text is the completion, or for display the likeliest continuation
    of the item's first context.

    Args:
        scored_by: lm-eval's task → the metric that scores its items.
    """
    assert isinstance(item.probe, LikelihoodRequests | CompletionRequest)
    score = metrics[scored_by[item.probe.task]]
    if isinstance(measurement, WrittenCompletion):
        return EvaluatedAnswer(
            measurement.request.id,
            measurement.answer.text,
            score,
            measurement.answer.ended,
            weighed={"metrics": {**metrics}},
        )
    assert isinstance(item.probe, LikelihoodRequests)
    texts = [text for text in item.probe.texts if len(text) > 1]
    behind_first = [text for text in texts if text[0] == texts[0][0]]
    likeliest = max(behind_first, key=replies.__getitem__)[-1].strip() if texts else ""
    weighed = {"requests": [[text[-1], replies[text][0]] for text in texts], "metrics": {**metrics}}
    return EvaluatedAnswer("", likeliest, score, weighed=weighed)


def select_task_figures(results: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, float]:
    """Return lm-eval's figures of a task or group, as metric → value, without standard errors. Returns an empty dict
    for a group without figures.

    Args:
        results: task → metric, a comma and the filter → figure.
    """
    return {
        key.removesuffix(",none"): value
        for key, value in results.get(name, {}).items()
        if isinstance(value, float) and "_stderr" not in key
    }


def build_result_metadata(
    system: System, identity: Mapping[str, Any], computed_by: Sequence[str], items: Sequence[EvalItem]
) -> dict[str, Any]:
    """Return the fields that lm-eval's results lack: the model's identity, device and library versions, and the digest
    of the requests."""
    requests = [
        item.probe.request if isinstance(item.probe, CompletionRequest) else item.probe.texts
        for item in items
        if isinstance(item.probe, LikelihoodRequests | CompletionRequest)
    ]
    align = {
        "system": system.name,
        "ref": system.ref,
        **identity,
        "computed_by": computed_by,
        "requests": json_digest(requests),
    }
    sha = identity["adapter"] or identity["base"]
    about = {"model": "align", "model_args": None, "model_dtype": identity["dtype"], "model_sha": sha}
    return {"align": align, "config": about, "lm_eval_version": version("lm_eval")}
