"""Tasks of lm-eval in a suite. Log-likelihoods for them come from `align.stages.suite_probes`, and answers from
`align.stages.suite_completions`. lm-eval's own evaluation makes figures of both, which say here what exactly was
measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from align import ranks
from align.config.root import Config
from align.data.chat.continuations import behind, continued, encoded, prefix_id
from align.data.chat.encode import Encoded
from align.errors import require
from align.evals.harness import Completion, Found, Requests
from align.evals.likelihoods import Likelihood
from align.evals.results import Said, Scored
from align.evals.systems import System
from align.evals.tasks import Item, Task
from align.models.load import choose_device
from align.run import Run, json_digest, write_json
from align.stages.suite_answers import computed_by, speaks
from align.stages.suite_completions import Written

Told = Sequence[Likelihood] | Written
"""What a system gives for an item: the likelihood of each row, or an answer."""
FOLDER = "lm_eval"
"""Of a run's artifact: `TASK/SYSTEM.json`."""


def request_rows(tokenizer: Any, requests: Requests, window: int) -> list[Encoded]:
    """What is weighed of an item: a row for each request; of a whole text its windows, by lm-eval's rules.

    Args:
        window: the most tokens of a window.

    Raises:
        InputError: nothing can be weighed of a request.
    """
    if len(requests.texts[0]) > 1:
        return [continued(tokenizer, context, continuation) for context, continuation in requests.texts]
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # lm-eval is an extra

    ((text,),) = requests.texts
    problem = f"is no text, as item {requests.doc} of {requests.task}"
    require(bool(text.strip()), "lm_eval", text, problem, "Leave the row out.")
    ids = encoded(tokenizer, text)
    pairs = get_rolling_token_windows(ids, prefix_id(tokenizer), window - 1, 1)
    return [behind(*make_disjoint_window(pair)) for pair in pairs]


def by_lm_eval(
    run: Run, config: Config, systems: Sequence[System], task: Task, items: Sequence[Item],
    given: Mapping[str, Sequence[Told]],
) -> Scored:  # fmt: skip
    """A task of lm-eval, scored; its results are written down for each system. The first rank asks lm-eval.

    Args:
        given: system → what it gives for each item.

    Raises:
        InputError: no metric scores items.
    """
    from align.evals.lm_eval_tasks import built, outcome_of, scoring_metrics  # lm-eval is an extra

    assert task.probe is not None
    harness = task.probe.harness
    assert harness is not None

    def scored() -> Scored:
        tasks, told = built(harness, task.field), {name: found_of(items, of) for name, of in given.items()}
        outcomes = {
            name: outcome_of(task, harness, tasks, items, {key: one for of in each for key, one in of.items()})
            for name, each in told.items()
        }
        metrics = scoring_metrics(task, harness, tasks, items, [*outcomes.values()])
        said = {
            name: [
                said_of(*each, metrics)
                for each in zip(items, given[name], told[name], outcome.metrics, strict=True)
            ]
            for name, outcome in outcomes.items()
        }  # fmt: skip
        shares = all(one.score in (0.0, 1.0) for of in said.values() for one in of)
        figures = {name: figures_of(outcome.results["results"], harness.task) for name, outcome in outcomes.items()}
        folder = run.artifact / FOLDER / task.name
        folder.mkdir(parents=True, exist_ok=True)
        for system in systems:
            results = identity_of(config, system, items) | outcomes[system.name].results
            write_json(folder / f"{system.name}.json", results)
        by = f"lm-eval's {', '.join(dict.fromkeys(metrics.values()))}"
        return Scored(task.name, by, "exact" if shares else "measured", items, said, figures=figures)

    (found,) = ranks.from_main([scored()] if ranks.is_main() else list[Scored]())
    return found


def found_of(items: Sequence[Item], given: Sequence[Told]) -> list[Found]:
    """What lm-eval asked about each item, and was told."""
    found = list[Found]()
    for item, rows in zip(items, given, strict=True):
        if isinstance(item.probe, Completion):
            assert isinstance(rows, Written)
            found.append({item.probe.request: rows.answer.text})
            continue
        assert isinstance(item.probe, Requests)
        assert not isinstance(rows, Written)
        texts = item.probe.texts
        parts = [rows] if len(texts[0]) == 1 else [[row] for row in rows]
        found.append({
            text: (sum(row.logprob for row in part), all(row.greedy for row in part))
            for text, part in zip(texts, parts, strict=True)
        })  # fmt: skip
    return found


def said_of(
    item: Item, given: Told, found: Found, metrics: Mapping[str, float], scored_by: Mapping[str, str]
) -> Said:  # fmt: skip
    """What a system makes of an item: its answer, or for people the likeliest continuation of its first context.

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
    likeliest = max(behind_first, key=found.__getitem__)[-1].strip() if texts else ""
    weighed = {"requests": [[text[-1], found[text][0]] for text in texts], "metrics": {**metrics}}
    return Said("", likeliest, score, weighed=weighed)


def figures_of(results: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, float]:
    """lm-eval's figures of a task, or of a group that has some.

    Args:
        results: task → metric, a comma and the filter → figure.
    """
    return {
        key.removesuffix(",none"): value
        for key, value in results.get(name, {}).items()
        if isinstance(value, float) and "_stderr" not in key
    }


def identity_of(config: Config, system: System, items: Sequence[Item]) -> dict[str, Any]:
    """What lm-eval's results do not say: who was measured, how it was computed, and on what."""
    who = speaks(config, system)
    asked = [
        item.probe.request if isinstance(item.probe, Completion) else item.probe.texts
        for item in items
        if isinstance(item.probe, Requests | Completion)
    ]
    align = {
        "system": system.name, "ref": system.ref, **who,
        "computed_by": computed_by(choose_device(config.device)), "requests": json_digest(asked),
    }  # fmt: skip
    sha = who["adapter"] or who["base"]
    about = {"model": "align", "model_args": None, "model_dtype": who["dtype"], "model_sha": sha}
    return {"align": align, "config": about, "lm_eval_version": version("lm_eval")}
