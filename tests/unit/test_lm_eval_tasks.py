"""What lm-eval's tasks ask, and what lm-eval makes of log-likelihoods that are written down here."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval_folder import written

from align.core.errors import InputError
from align.data.chat.encode import IGNORE_INDEX
from align.evals.suite.probes import LM_EVAL, HarnessTask, LikelihoodRequests, LMEvalReplies, Probe
from align.evals.suite.tasks import EvalItem, EvalTask

lm = pytest.importorskip("align.evals.suite.lm_eval", reason='needs lm-eval (pip install "align-rlhf[evals]")')


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path / "tasks")


def asked(folder: Path, name: str, metric: str = "") -> tuple[EvalTask, HarnessTask, Sequence[EvalItem], Any]:
    harness = HarnessTask(name, str(folder), metric)
    task = EvalTask(name, probe=Probe(LM_EVAL, harness=harness))
    return task, harness, lm.load_harness_items(task, harness), lm.build_tasks(harness, task.field)


def likes(items: Sequence[EvalItem], place: int) -> LMEvalReplies:
    """A model that finds the continuation at a place the likeliest, and none greedy."""
    found = dict[tuple[str, ...], tuple[float, bool]]()
    for item in items:
        assert isinstance(item.probe, LikelihoodRequests)
        found |= {text: (-1.0 if i == place else -9.0, False) for i, text in enumerate(item.probe.texts)}
    return found


def test_items_ask_with_examples_and_are_known_by_their_question(folder: Path) -> None:
    _, _, items, _ = asked(folder, "choose")
    assert [item.id for item in items] == [*"012345"]
    assert items[1].prompt.messages[0].content == "Question: What about the rain?\nAnswer:"
    assert isinstance(items[1].probe, LikelihoodRequests)
    contexts, continuations = zip(*items[1].probe.texts, strict=True)
    assert continuations == (" I like the rain.", " No.", "  It is late.")
    assert len({*contexts}) == 1
    assert contexts[0].count("Question: ") == 3
    assert contexts[0].endswith("Question: What about the rain?\nAnswer:")


def test_the_same_is_asked_each_time_and_random_states_stay(folder: Path) -> None:
    first = asked(folder, "choose")[2]
    random.seed(5)
    np.random.seed(5)
    drawn = random.random(), np.random.random()
    random.seed(5)
    np.random.seed(5)
    again = asked(folder, "choose")[2]
    assert again == first
    assert (random.random(), np.random.random()) == drawn


def test_an_accuracy_by_hand_of_all_and_of_some(folder: Path) -> None:
    """The right answers are 0, 1, 2, 0, 1, 2. A task is asked several times, once for each system."""
    task, harness, items, tasks = asked(folder, "choose")
    some = [items[i] for i in (0, 3, 4)]
    for place, those, right in ((0, items, 2), (1, items, 2), (0, some, 2), (1, some, 1)):
        outcome = lm.evaluate_items(task, harness, tasks, those, likes(those, place))
        assert outcome.results["results"]["choose"]["acc,none"] == pytest.approx(right / len(those))
        assert outcome.results["n-samples"]["choose"] == {"original": 6, "effective": len(those)}
        assert sum(metrics["acc"] for metrics in outcome.metrics) == right
        assert [metrics["acc"] for metrics in outcome.metrics] == [float(int(i.id) % 3 == place) for i in those]


def test_a_group_has_its_own_figure_where_all_its_tasks_are_asked(folder: Path) -> None:
    task, harness, items, tasks = asked(folder, "both")
    assert {item.category for item in items} == {"choose", "more"}
    assert items[6].id == "more/0"
    whole = lm.evaluate_items(task, harness, tasks, items, likes(items, 0))
    assert whole.results["groups"]["both"]["acc,none"] == pytest.approx(4 / 10)
    task, harness, items, tasks = asked(folder, "both")
    part = lm.evaluate_items(task, harness, tasks, items[:6], likes(items, 0))
    assert [*part.results["results"]] == ["choose"]


def test_what_scores_an_item(folder: Path) -> None:
    """Of `guess` a smaller perplexity is better; of a text nothing is 0 or 1, and its nats by word or byte are read."""
    task, harness, items, tasks = asked(folder, "guess")
    outcome = lm.evaluate_items(task, harness, tasks, items, likes(items, 0))
    assert lm.choose_scoring_metrics(task, harness, tasks, items, [outcome]) == {"guess": "acc"}
    task, harness, items, tasks = asked(folder, "guess", "perplexity")
    with pytest.raises(InputError, match="Name one of acc"):
        lm.choose_scoring_metrics(task, harness, tasks, items, [outcome])
    task, harness, items, tasks = asked(folder, "reading", "bits_per_byte")
    outcome = lm.evaluate_items(task, harness, tasks, items, likes(items, 0))
    assert lm.choose_scoring_metrics(task, harness, tasks, items, [outcome]) == {"reading": "bits_per_byte"}
    assert outcome.metrics[0]["bits_per_byte"] == pytest.approx(-1 / len("I am tired, and the rain is here."))
    size = sum(len(item.prompt.messages[0].content) for item in items)
    assert outcome.results["results"]["reading"]["bits_per_byte,none"] == pytest.approx(2 / size / math.log(2))


def test_a_metric_of_all_items_together_scores_none(folder: Path) -> None:
    yaml = folder / "choose.yaml"
    yaml.write_text(yaml.read_text().replace("metric: acc_norm", "metric: mcc"))
    task, harness, items, tasks = asked(folder, "choose", "mcc")
    outcome = lm.evaluate_items(task, harness, tasks, items, likes(items, 0))
    assert isinstance(outcome.results["results"]["choose"]["mcc,none"], float)
    with pytest.raises(InputError, match="metric=mcc: scores no item by itself"):
        lm.choose_scoring_metrics(task, harness, tasks, items, [outcome])


def test_a_metric_that_fails_is_the_users_to_mend(folder: Path) -> None:
    yaml = folder / "choose.yaml"
    yaml.write_text(yaml.read_text().replace("metric: acc_norm", "metric: f1"))
    task, harness, items, tasks = asked(folder, "choose")
    with pytest.raises(InputError, match="multiclass"):  # its f1 is of two choices
        lm.evaluate_items(task, harness, tasks, items, likes(items, 0))


def test_a_text_is_read_in_windows_and_each_token_scored_once(tiny_tokenizer: Any) -> None:
    text = "The rain is here, and my dog is late. " * 3
    (whole,) = lm.encode_requests(tiny_tokenizer, LikelihoodRequests("reading", 0, ((text,),)), 1000)
    rows = lm.encode_requests(tiny_tokenizer, LikelihoodRequests("reading", 0, ((text,),)), 8)
    assert len(rows) > 5
    assert max(len(row.input_ids) for row in rows) == 8
    assert [id for row in rows for id in row.labels if id != IGNORE_INDEX] == [
        id for id in whole.labels if id != IGNORE_INDEX
    ]
    with pytest.raises(InputError, match="is no text, as item 3 of reading"):
        lm.encode_requests(tiny_tokenizer, LikelihoodRequests("reading", 3, ((" ",),)), 8)
