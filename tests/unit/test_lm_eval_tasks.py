"""Requests of lm-eval's tasks, and the metrics that lm-eval computes from given log-likelihoods."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval_folder import write_task_folder

from align.core.errors import InputError
from align.data.chat.encode import IGNORE_INDEX
from align.evals.suite.probes import LM_EVAL, HarnessTask, LikelihoodRequests, LMEvalReplies, Probe
from align.evals.suite.tasks import EvalItem, EvalTask

lm = pytest.importorskip("align.evals.suite.lm_eval", reason='needs lm-eval (pip install "align-rlhf[evals]")')


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_task_folder(tmp_path / "tasks")


def load_items(folder: Path, name: str, metric: str = "") -> tuple[EvalTask, HarnessTask, Sequence[EvalItem], Any]:
    harness = HarnessTask(name, str(folder), metric)
    task = EvalTask(name, probe=Probe(LM_EVAL, harness=harness))
    return task, harness, lm.load_harness_items(task, harness), lm.build_tasks(harness, task.field)


def build_replies(items: Sequence[EvalItem], choice: int) -> LMEvalReplies:
    """Build replies that make one choice of each item the likeliest, and none greedy."""
    replies = dict[tuple[str, ...], tuple[float, bool]]()
    for item in items:
        assert isinstance(item.probe, LikelihoodRequests)
        replies |= {text: (-1.0 if i == choice else -9.0, False) for i, text in enumerate(item.probe.texts)}
    return replies


def test_items_ask_with_examples_and_are_known_by_their_question(folder: Path) -> None:
    _, _, items, _ = load_items(folder, "choose")
    assert [item.id for item in items] == [*"012345"]
    assert items[1].prompt.messages[0].content == "Question: What about the rain?\nAnswer:"
    assert isinstance(items[1].probe, LikelihoodRequests)
    contexts, continuations = zip(*items[1].probe.texts, strict=True)
    assert continuations == (" I like the rain.", " No.", "  It is late.")
    assert len({*contexts}) == 1
    assert contexts[0].count("Question: ") == 3
    assert contexts[0].endswith("Question: What about the rain?\nAnswer:")


def test_the_same_is_asked_each_time_and_random_states_stay(folder: Path) -> None:
    first = load_items(folder, "choose")[2]
    random.seed(5)
    np.random.seed(5)
    numbers = random.random(), np.random.random()
    random.seed(5)
    np.random.seed(5)
    second = load_items(folder, "choose")[2]
    assert second == first
    assert (random.random(), np.random.random()) == numbers


def test_an_accuracy_by_hand_of_all_and_of_some(folder: Path) -> None:
    """The right answers are 0, 1, 2, 0, 1, 2. A task is evaluated several times, once for each system."""
    task, harness, items, tasks = load_items(folder, "choose")
    three_items = [items[i] for i in (0, 3, 4)]
    for choice, chosen_items, right in ((0, items, 2), (1, items, 2), (0, three_items, 2), (1, three_items, 1)):
        outcome = lm.evaluate_items(task, harness, tasks, chosen_items, build_replies(chosen_items, choice))
        assert outcome.results["results"]["choose"]["acc,none"] == pytest.approx(right / len(chosen_items))
        assert outcome.results["n-samples"]["choose"] == {"original": 6, "effective": len(chosen_items)}
        assert sum(metrics["acc"] for metrics in outcome.metrics) == right
        assert [metrics["acc"] for metrics in outcome.metrics] == [float(int(i.id) % 3 == choice) for i in chosen_items]


def test_a_group_has_its_own_figure_where_all_its_tasks_are_asked(folder: Path) -> None:
    task, harness, items, tasks = load_items(folder, "both")
    assert {item.category for item in items} == {"choose", "more"}
    assert items[6].id == "more/0"
    group_outcome = lm.evaluate_items(task, harness, tasks, items, build_replies(items, 0))
    assert group_outcome.results["groups"]["both"]["acc,none"] == pytest.approx(4 / 10)
    task, harness, items, tasks = load_items(folder, "both")
    task_outcome = lm.evaluate_items(task, harness, tasks, items[:6], build_replies(items, 0))
    assert [*task_outcome.results["results"]] == ["choose"]


def test_what_scores_an_item(folder: Path) -> None:
    """A task of texts such as `reading` has no accuracy. It is scored by log-likelihood per word or byte."""
    task, harness, items, tasks = load_items(folder, "guess")
    outcome = lm.evaluate_items(task, harness, tasks, items, build_replies(items, 0))
    assert lm.choose_scoring_metrics(task, harness, tasks, items, [outcome]) == {"guess": "acc"}
    task, harness, items, tasks = load_items(folder, "guess", "perplexity")
    with pytest.raises(InputError, match="Name one of acc"):
        lm.choose_scoring_metrics(task, harness, tasks, items, [outcome])
    task, harness, items, tasks = load_items(folder, "reading", "bits_per_byte")
    outcome = lm.evaluate_items(task, harness, tasks, items, build_replies(items, 0))
    assert lm.choose_scoring_metrics(task, harness, tasks, items, [outcome]) == {"reading": "bits_per_byte"}
    assert outcome.metrics[0]["bits_per_byte"] == pytest.approx(-1 / len("I am tired, and the rain is here."))
    size = sum(len(item.prompt.messages[0].content) for item in items)
    assert outcome.results["results"]["reading"]["bits_per_byte,none"] == pytest.approx(2 / size / math.log(2))


def test_a_metric_of_all_items_together_scores_none(folder: Path) -> None:
    yaml = folder / "choose.yaml"
    yaml.write_text(yaml.read_text().replace("metric: acc_norm", "metric: mcc"))
    task, harness, items, tasks = load_items(folder, "choose", "mcc")
    outcome = lm.evaluate_items(task, harness, tasks, items, build_replies(items, 0))
    assert isinstance(outcome.results["results"]["choose"]["mcc,none"], float)
    with pytest.raises(InputError, match="metric=mcc: scores no item by itself"):
        lm.choose_scoring_metrics(task, harness, tasks, items, [outcome])


def test_a_metric_that_fails_is_the_users_to_mend(folder: Path) -> None:
    yaml = folder / "choose.yaml"
    yaml.write_text(yaml.read_text().replace("metric: acc_norm", "metric: f1"))
    task, harness, items, tasks = load_items(folder, "choose")
    with pytest.raises(InputError, match="multiclass"):  # its f1 is of two choices
        lm.evaluate_items(task, harness, tasks, items, build_replies(items, 0))


def test_a_text_is_read_in_windows_and_each_token_scored_once(tiny_tokenizer: Any) -> None:
    text = "The rain is here, and my dog is late. " * 3
    (unsplit_row,) = lm.encode_requests(tiny_tokenizer, LikelihoodRequests("reading", 0, ((text,),)), 1000)
    rows = lm.encode_requests(tiny_tokenizer, LikelihoodRequests("reading", 0, ((text,),)), 8)
    assert len(rows) > 5
    assert max(len(row.input_ids) for row in rows) == 8
    assert [id for row in rows for id in row.labels if id != IGNORE_INDEX] == [
        id for id in unsplit_row.labels if id != IGNORE_INDEX
    ]
    with pytest.raises(InputError, match="is no text, as item 3 of reading"):
        lm.encode_requests(tiny_tokenizer, LikelihoodRequests("reading", 3, ((" ",),)), 8)
