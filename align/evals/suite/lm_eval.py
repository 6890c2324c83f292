"""Tasks of lm-eval in a suite: what they ask, and the figures that lm-eval makes of the answers. Its tasks are built
once, before anything is computed; its own evaluation then runs for each system over an `LM` that knows the
log-likelihoods and the answers already (`align.evals.suite.likelihoods`).

Import this where lm-eval is needed and known to be installed. Imports no torch.
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
from align.data.chat.continuations import behind, continued, encoded, prefix_id
from align.evals.suite.probes import Completion, Found, Harness, Requests, Written
from align.evals.suite.results import Said, Scored
from align.evals.suite.systems import System
from align.evals.suite.tasks import Item, Task, clustered
from align.report.figure_text import counted
from align.run import json_digest, write_json

if TYPE_CHECKING:
    from align.data.chat.encode import Encoded
    from align.evals.suite.likelihoods import Likelihood

FOLDER = "lm_eval"
"""Of a run's artifact: `TASK/SYSTEM.json`."""

ROLLING = "loglikelihood_rolling"
WRITTEN = "generate_until"
KINDS = ("multiple_choice", "loglikelihood", ROLLING, WRITTEN)
MAX_TOKENS = 256
"""Of an answer, where a task says nothing: as lm-eval's `hf` has it."""
MOST = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
DECIDES = ("until", *MOST, "do_sample", "temperature")
OF_DRAWS = ("top_p", "top_k", "min_p")
"""Of `generation_kwargs`: keys that change nothing where the likeliest token is taken."""
SEEDS = {"random_seed": DEFAULT_RANDOM_SEED, "numpy_seed": DEFAULT_OTHER_SEED, "fewshot_seed": DEFAULT_OTHER_SEED}
"""Of few-shot examples and of code in a folder of tasks: those of lm-eval's command line."""


class Known(LM):
    """A model whose log-likelihoods and answers are known."""

    def __init__(self, found: Found) -> None:
        super().__init__()
        self.found = found

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return [self.found[request.args] for request in requests]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        return [self.found[request.args][0] for request in requests]

    def generate_until(self, requests: list[Any]) -> list[str]:
        return [self.found[context, *ending_of(kwargs)] for context, kwargs in (request.args for request in requests)]


class Outcome(NamedTuple):
    """What lm-eval makes of a system's log-likelihoods and answers.

    Attributes:
        results: as lm-eval writes them.
        metrics: of each item, in their order; of some metrics an item has no number.
    """

    results: dict[str, Any]
    metrics: Sequence[Mapping[str, float]]


@contextmanager
def within(harness: Harness, field: str) -> Iterator[None]:
    """Whatever of lm-eval's is run: by its seeds and without its progress bars; the process's own random state stays.

    Raises:
        InputError: it fails. YAML, templates and functions of a task are the user's, and may fail in any way.
    """
    states = random.getstate(), np.random.get_state()
    random.seed(SEEDS["random_seed"])
    np.random.seed(SEEDS["numpy_seed"])
    try:
        with redirect_stderr(StringIO()):
            yield
    except AlignError:
        raise
    except Exception as error:
        reason: BaseException = error
        while reason.__cause__ is not None:  # datasets says what is wrong only there
            reason = reason.__cause__
        problem = f"fails in lm-eval ({type(reason).__name__}: {reason})"
        raise InputError(f"{field}.lm_eval", harness.task, problem, f"Mend it in {harness.include}.") from error
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def built(harness: Harness, field: str) -> dict[str, Any]:
    """lm-eval's tasks with their requests, as its `TaskManager` loads them. The same each time.

    Raises:
        InputError: the folder has no such task, lm-eval cannot read it, or it draws answers.
    """
    with within(harness, field):
        return loaded(harness, field)


def loaded(harness: Harness, field: str) -> dict[str, Any]:
    """The same, with lm-eval's errors as they are."""
    manager = TaskManager(include_path=str(parse_user_path(harness.include, "include")), include_defaults=False)
    known = manager.all_tasks
    problem = f"is no task of {harness.include}"
    remedy = f"Its tasks are {', '.join(known)}." if known else "No YAML file there is a task of lm-eval."
    require(harness.task in known, f"{field}.lm_eval", harness.task, problem, remedy)
    found: dict[str, Any] = {**manager.load([harness.task])}
    for name, task in found["tasks"].items():
        kind = task.get_config("output_type")
        problem, remedy = f"asks for {kind} in {name}", f"Its output_type can be one of {', '.join(KINDS)}."
        require(kind in KINDS, f"{field}.lm_eval", harness.task, problem, remedy)
        if kind == WRITTEN:
            check_greedy(task.get_config("generation_kwargs"), f"{field}, {name}, generation_kwargs")
        metrics = [*task.higher_is_better()]
        problem = f"is no metric of {name}"
        right = not harness.metric or harness.metric in metrics
        require(right, f"{field}.metric", harness.metric, problem, f"Its metrics are {', '.join(metrics)}.")
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(SEEDS["fewshot_seed"])
        task.build_all_requests()
    return found


def check_greedy(kwargs: Mapping[str, Any], at: str) -> None:
    """
    Args:
        at: the field of an error.

    Raises:
        InputError: a task's `generation_kwargs` ask for anything but the likeliest tokens up to some texts.
    """
    problem, remedy = "draws answers, and those of lm-eval's tasks are the likeliest tokens here", "Drop it, or write"
    drawn = kwargs.get("do_sample") or False
    require(drawn is False, f"{at}.do_sample", drawn, problem, f"{remedy} do_sample: false.")
    temperature = kwargs.get("temperature") or 0.0
    require(temperature == 0, f"{at}.temperature", temperature, problem, f"{remedy} temperature: 0.")
    strange = next((key for key in kwargs if key not in (*DECIDES, *OF_DRAWS)), None)
    problem, remedy = "is not known to greedy decoding here", f"Drop it: answers are made by {', '.join(DECIDES)}."
    require(strange is None, f"{at}.{strange}", kwargs.get(strange or ""), problem, remedy)
    until = kwargs.get("until")
    for text in until if isinstance(until, list) else [until or ""]:
        require(isinstance(text, str), f"{at}.until", text, "is no text", 'Write until: ["\\n"].')
    most = next((kwargs[key] for key in MOST if kwargs.get(key) is not None), MAX_TOKENS)
    right = isinstance(most, int) and not isinstance(most, bool) and most > 0
    require(right, f"{at}.max_gen_toks", most, "is no number of tokens", f"Write max_gen_toks: {MAX_TOKENS}.")


def ending_of(kwargs: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    """The texts that end an answer, and the most tokens that it has, as lm-eval reads `generation_kwargs`."""
    read: Any = normalize_gen_kwargs({**kwargs}, MAX_TOKENS)
    return tuple(text for text in handle_stop_sequences(read.get("until"), None) if text), read["max_gen_toks"]


def items_of_harness(task: Task, harness: Harness) -> Sequence[Item]:
    """The items of a task of lm-eval; of a group those of all its tasks, each a category.

    Raises:
        InputError: see `built`.
    """
    tasks, found = built(harness, task.field)["tasks"], list[Item]()
    for name, of in tasks.items():
        requests = dict[int, list[Any]]()
        for instance in of.instances:
            requests.setdefault(instance.doc_id, []).append(instance)
        with within(harness, task.field):
            asked = {doc: question_of(of, those) for doc, those in requests.items()}
        for doc, those in requests.items():
            id = f"{name}/{doc}" if len(tasks) > 1 else str(doc)
            prompt = Conversation((Message("user", asked[doc]),), id)
            probe = completion_of if of.get_config("output_type") == WRITTEN else requests_of
            asks = probe(name, doc, those, task.field)
            found.append(Item(id, id, name if len(tasks) > 1 else "", prompt, None, probe=asks))
    return clustered(found)


def requests_of(name: str, doc: int, instances: Sequence[Any], field: str) -> Requests:
    return Requests(name, doc, tuple(tuple(map(str, one.args)) for one in instances))


def completion_of(name: str, doc: int, instances: Sequence[Any], field: str) -> Completion:
    """Raises: InputError: it is about more than a text."""
    given = instances[0].args
    problem = f"asks about more than a text in item {doc}"
    require(len(instances) == 1 and len(given) == 2, f"{field}, {name}", name, problem, "Drop its images and sounds.")
    return Completion(name, doc, str(given[0]), *ending_of(given[1]))


def question_of(task: Any, requests: Sequence[Any]) -> str:
    """What an item asks, without few-shot examples, where lm-eval has it as a text; else all of the first request's
    context."""
    asked = task.doc_to_text(requests[0].doc)
    return asked if isinstance(asked, str) and asked.strip() else str(requests[0].args[0])


def outcome_of(task: Task, harness: Harness, tasks: Mapping[str, Any], items: Sequence[Item], found: Found) -> Outcome:
    """What lm-eval's own evaluation makes of some of the items.

    Args:
        tasks: see `built`. Filters and metrics run on them, and the next call starts anew.

    Raises:
        InputError: a metric fails.
    """
    kept = dict[str, list[int]]()
    for item in items:
        assert isinstance(item.probe, Requests | Completion)
        kept.setdefault(item.probe.task, []).append(item.probe.doc)
    with within(harness, task.field):
        chosen = {name: reduced(tasks["tasks"][name], docs) for name, docs in kept.items()}
        whole = len(chosen) == len(tasks["tasks"])  # lm-eval has no figures of a group that lacks a task
        given: Any = {**tasks, "tasks": chosen} if whole else {"tasks": chosen, "groups": {}, "group_map": {}}
        results: Any = evaluate(lm=Known(found), task_dict=given, bootstrap_iters=0, log_samples=True)
    samples = dict[tuple[str, int], Mapping[str, float]]()
    for name, rows in results.pop("samples").items():
        rolling = chosen[name].get_config("output_type") == ROLLING
        for row in rows:  # of several filters the first counts
            samples.setdefault((name, row["doc_id"]), numbers_of(row, rolling))
    metrics = [samples[place_of(item)] for item in items]
    return Outcome(json.loads(json.dumps(results, default=handle_non_serializable)), metrics)


def place_of(item: Item) -> tuple[str, int]:
    """lm-eval's name of an item's task, and its place in the data."""
    assert isinstance(item.probe, Requests | Completion)
    return item.probe.task, item.probe.doc


def reduced(task: Any, docs: Sequence[int]) -> Any:
    """A task that asks about some of its data. What it asks was built of all of them: lm-eval draws few-shot examples
    for one row after another, so that a choice of rows would change those of the rows behind."""
    wanted = {*docs}
    rows = [(doc, row) for doc, row in type(task).doc_iterator(task) if doc in wanted]
    instances = [one for one in task.instances if one.doc_id in wanted]
    for one in instances:
        one.resps, one.filtered_resps = [], {}
    task._instances = instances
    task.build_all_requests = lambda **_: None
    task.doc_iterator = lambda **_: iter(rows)
    return task


def numbers_of(sample: Mapping[str, Any], rolling: bool) -> dict[str, float]:
    """The metrics of an item that are a number: 0 or 1 of an accuracy; of a text, whose metrics are a log-likelihood
    and a count of bytes or words, their ratio."""
    found = dict[str, float]()
    for name in sample["metrics"]:
        value = sample[name]
        if rolling and isinstance(value, tuple) and len(value) == 2:
            value = value[0] / value[1]
        if isinstance(value, Real | np.bool_):
            found[name] = float(value)
    return found


def scoring_metrics(
    task: Task, harness: Harness, tasks: Mapping[str, Any], items: Sequence[Item], outcomes: Sequence[Outcome]
) -> dict[str, str]:
    """lm-eval's task → the metric that scores its items: the one that is named, else the first of which more is better
    and every item has a number. Where tasks of a group have none in common, each has its own first one, as long as all
    of them are 0 or 1.

    Raises:
        InputError: there is none, or the named one scores no item by itself.
    """
    every = [(place_of(item)[0], of) for outcome in outcomes for item, of in zip(items, outcome.metrics, strict=True)]
    names = [*dict.fromkeys(name for name, _ in every)]
    can = counting(tasks, names, every)
    chosen = harness.metric or (can[0] if can else "")
    if chosen in can:
        return dict.fromkeys(names, chosen)
    own = {name: first[0] for name in names if (first := counting(tasks, [name], every))}
    if not harness.metric and len(own) == len(names) and all(of[own[name]] in (0.0, 1.0) for name, of in every):
        return own
    problem = f"scores no item by itself, of {counted(len(every), 'item')}"
    remedy = f"Name one of {', '.join(can)}." if can else "Add acc to its metric_list, or exact_match."
    given = chosen or [*dict.fromkeys(metric for of in tasks["tasks"].values() for metric in of.higher_is_better())]
    raise InputError(f"{task.field}.metric", given, problem, remedy)


def counting(
    tasks: Mapping[str, Any], names: Sequence[str], every: Sequence[tuple[str, Mapping[str, float]]]
) -> list[str]:
    """The metrics of some tasks of which more is better, and of which each of their items has a number."""
    better = list[str]()
    for name in names:
        of = tasks["tasks"][name]
        rolling = of.get_config("output_type") == ROLLING  # of a text's metrics, more is better of what items have
        better += [metric for metric, more in of.higher_is_better().items() if more or rolling]
    theirs = [of for name, of in every if name in names]
    return [metric for metric in dict.fromkeys(better) if all(metric in of for of in theirs)]


def encode_requests(tokenizer: Any, requests: Requests, window: int) -> list[Encoded]:
    """Return the rows that are weighed of an item: one for each request; of a whole text its windows, by lm-eval's
    rules.

    Args:
        window: the most tokens of a window.

    Raises:
        InputError: nothing can be weighed of a request.
    """
    if len(requests.texts[0]) > 1:
        return [continued(tokenizer, context, continuation) for context, continuation in requests.texts]
    ((text,),) = requests.texts
    problem = f"is no text, as item {requests.doc} of {requests.task}"
    require(bool(text.strip()), "lm_eval", text, problem, "Leave the row out.")
    ids = encoded(tokenizer, text)
    pairs = get_rolling_token_windows(ids, prefix_id(tokenizer), window - 1, 1)
    return [behind(*make_disjoint_window(pair)) for pair in pairs]


def score_by_lm_eval(
    task: Task,
    items: Sequence[Item],
    given: Mapping[str, Sequence[Sequence[Likelihood] | Written]],
    identities: Mapping[str, Mapping[str, Any]],
    folder: Path,
) -> Scored:
    """Score a task of lm-eval, and write its results for each system. The first rank asks lm-eval.

    Args:
        given: system → of each item the likelihood of each row, or an answer.
        identities: system → what lm-eval's results do not say, see `identify_results`.
        folder: of the run's artifact.

    Raises:
        InputError: no metric scores items.
    """
    assert task.probe is not None
    harness = task.probe.harness
    assert harness is not None

    def score() -> Scored:
        tasks = built(harness, task.field)
        replies = {name: [list_replies(*row) for row in zip(items, of, strict=True)] for name, of in given.items()}
        outcomes = {
            name: outcome_of(task, harness, tasks, items, {key: one for of in each for key, one in of.items()})
            for name, each in replies.items()
        }
        metrics = scoring_metrics(task, harness, tasks, items, [*outcomes.values()])
        said = {
            name: [
                read_item(*each, metrics)
                for each in zip(items, given[name], replies[name], outcome.metrics, strict=True)
            ]
            for name, outcome in outcomes.items()
        }
        shares = all(one.score in (0.0, 1.0) for of in said.values() for one in of)
        figures = {name: select_figures(outcome.results["results"], harness.task) for name, outcome in outcomes.items()}
        results_folder = folder / FOLDER / task.name
        results_folder.mkdir(parents=True, exist_ok=True)
        for name, outcome in outcomes.items():
            write_json(results_folder / f"{name}.json", {**identities[name], **outcome.results})
        by = f"lm-eval's {', '.join(dict.fromkeys(metrics.values()))}"
        return Scored(task.name, by, "exact" if shares else "measured", items, said, figures=figures)

    (scored,) = ranks.broadcast([score()] if ranks.is_main() else list[Scored]())
    return scored


def list_replies(item: Item, given: Sequence[Likelihood] | Written) -> Found:
    """Return what lm-eval asked about an item, with the replies."""
    if isinstance(item.probe, Completion):
        assert isinstance(given, Written)
        return {item.probe.request: given.answer.text}
    assert isinstance(item.probe, Requests)
    assert not isinstance(given, Written)
    texts = item.probe.texts
    parts = [given] if len(texts[0]) == 1 else [[row] for row in given]
    return {
        text: (sum(row.logprob for row in part), all(row.greedy for row in part))
        for text, part in zip(texts, parts, strict=True)
    }


def read_item(
    item: Item,
    given: Sequence[Likelihood] | Written,
    replies: Found,
    metrics: Mapping[str, float],
    scored_by: Mapping[str, str],
) -> Said:
    """Return what a system makes of an item: its answer, or for people the likeliest continuation of its first context.

    Args:
        scored_by: lm-eval's task → the metric that scores its items.
    """
    assert isinstance(item.probe, Requests | Completion)
    score = metrics[scored_by[item.probe.task]]
    if isinstance(given, Written):
        return Said(given.asked.id, given.answer.text, score, given.answer.ended, weighed={"metrics": {**metrics}})
    assert isinstance(item.probe, Requests)
    texts = [text for text in item.probe.texts if len(text) > 1]
    behind_first = [text for text in texts if text[0] == texts[0][0]]
    likeliest = max(behind_first, key=replies.__getitem__)[-1].strip() if texts else ""
    weighed = {"requests": [[text[-1], replies[text][0]] for text in texts], "metrics": {**metrics}}
    return Said("", likeliest, score, weighed=weighed)


def select_figures(results: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, float]:
    """Return lm-eval's figures of a task, or of a group that has some.

    Args:
        results: task → metric, a comma and the filter → figure.
    """
    return {
        key.removesuffix(",none"): value
        for key, value in results.get(name, {}).items()
        if isinstance(value, float) and "_stderr" not in key
    }


def identify_results(
    system: System, identity: Mapping[str, Any], computed_by: Sequence[str], items: Sequence[Item]
) -> dict[str, Any]:
    """Return what lm-eval's results do not say: who was measured, how it was computed, and on what."""
    asked = [
        item.probe.request if isinstance(item.probe, Completion) else item.probe.texts
        for item in items
        if isinstance(item.probe, Requests | Completion)
    ]
    align = {
        "system": system.name,
        "ref": system.ref,
        **identity,
        "computed_by": computed_by,
        "requests": json_digest(asked),
    }
    sha = identity["adapter"] or identity["base"]
    about = {"model": "align", "model_args": None, "model_dtype": identity["dtype"], "model_sha": sha}
    return {"align": align, "config": about, "lm_eval_version": version("lm_eval")}
