"""The report page of an evaluation suite: gates, differences between models, and items with the largest losses.

A "system" is a model with its sampling settings. The first system is compared with each of the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align.report.figure_text import format_interval, format_percent, pluralize
from align.report.page import Report
from align.report.run_view import PageSections, RunView

TEMPLATE = "suite.html"


def summarize_suite(view: RunView) -> str:
    """Return a summary in sentences of an evaluation suite: gates, collapsed models and significant differences."""
    first, *baselines = list_system_names(view)
    gates = view.metrics.get("gates", {})
    sentences = describe_collapses(view)
    if gates:
        sentences.append(describe_gates([*gates.values()], view.config["eval"].get("gate_family", "all")))
    comparisons = [
        (name, task, baseline)
        for name, task in list_results_in_order(view, view.metrics)
        for baseline in baselines
        if baseline in task["against"]
    ]
    if not baselines:
        return " ".join([*sentences, *describe_yes_shares(view), *describe_scores(view)])
    if not comparisons:
        return " ".join([*sentences, f"{first} has not been judged against {' or '.join(baselines)} yet."])
    level = 1 - view.settings["level"]
    significant = [
        (name, task, baseline) for name, task, baseline in comparisons if task["against"][baseline]["p_holm"] < level
    ]
    sentences += describe_yes_shares(view)
    sentences += [describe_system_difference(first, name, task, baseline) for name, task, baseline in significant]
    if not significant:
        sentences.append(f"No difference between {first} and {' or '.join(baselines)} was shown.")
    elif len(significant) < len(comparisons):
        sentences.append("No other difference was shown.")
    return " ".join(sentences)


def describe_collapses(view: RunView) -> list[str]:
    """Return a sentence for each evaluated model whose answers collapsed, with the reasons."""
    systems = view.metrics.get("collapse", {}).get("systems", {})
    return [
        f"{name} collapsed: {'; '.join(systems[name]['reasons'])}."
        for name in list_system_names(view)
        if systems.get(name, {}).get("verdict") == "collapsed"
    ]


def describe_gates(verdicts: Sequence[str], family: str) -> str:
    """Return a sentence on how many gates of an evaluation passed, failed and are undecided.

    Args:
        verdicts: `pass`, `fail` or `undecided` of each gate.
        family: `all` if every gate has to pass, `any` if one is enough.
    """
    failed = verdicts.count("fail")
    undecided = verdicts.count("undecided")
    parts = [f"{verdicts.count('pass')} of {pluralize(len(verdicts), 'gate')} passed"]
    if failed:
        parts.append(f"{failed} failed")
    if undecided:
        parts.append(f"{undecided} {'is' if undecided == 1 else 'are'} undecided")
    rule = "; one is enough" if family == "any" and len(verdicts) > 1 else ""
    return f"{', '.join(parts)}{rule}."


def list_system_names(view: RunView) -> list[str]:
    """Return the names of the evaluated models in the order of the configuration."""
    return [system["name"] for system in view.metrics["systems"]]


def list_results_in_order(view: RunView, results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return a (task name, result) list of the tasks in `results`, in the order of the configuration.

    In JSON they are sorted by name.
    """
    configured = [task["name"] for task in view.config["eval"]["tasks"] or ()]
    tasks = results.get("tasks", {})
    return sorted(
        tasks.items(), key=lambda item: configured.index(item[0]) if item[0] in configured else len(configured)
    )


def describe_scores(view: RunView) -> list[str]:
    """Return a sentence for each task with the score of the only system, but for tasks with a yes-or-no question."""
    (system,) = list_system_names(view)
    return [
        f"{system} scores {format_interval(task['systems'][system]['score'])} on {name}."
        for name, task in list_results_in_order(view, view.metrics)
        if "asks" not in task
    ]


def describe_yes_shares(view: RunView) -> list[str]:
    """Return a sentence for each task with a yes-or-no question about answers: the share of yes for each model."""
    sentences = []
    for name, task in list_results_in_order(view, view.metrics):
        if "asks" in task:
            shares = [
                f"{format_percent(task['systems'][system]['score'])} for {system}" for system in list_system_names(view)
            ]
            sentences.append(f"On {name}, the share that {task['yes']} is {' and '.join(shares)}, by {task['by']}.")
    return sentences


def describe_system_difference(first: str, task_name: str, task: Mapping[str, Any], baseline: str) -> str:
    """Return a sentence that one model is better or worse than the other on a task, with the judge's name.

    On a task that asks a question about every answer, it says instead which model's answers are a yes more often.
    """
    is_higher = task["against"][baseline]["difference"]["value"] > 0
    if "asks" in task:
        return f"{first} {task['yes']} {'more' if is_higher else 'less'} often than {baseline} on {task_name}."
    match task["role"]:
        case "exact" | "measured":
            judge = ""
        case "proxy":
            judge = f", by {task['by']}, a proxy,"
        case _:
            judge = f", by {task['by']},"
    return f"{first} is {'better' if is_higher else 'worse'}{judge} than {baseline} on {task_name}."


def add_overview(report: Report, view: RunView) -> None:
    """Add tables of the gates, of the comparisons between models and of people's votes to the report page."""
    tasks = list_results_in_order(view, view.read_json("artifact/results.json"))
    gates = [view.read_json(f"artifact/verdicts/{name}.json") for name in view.metrics.get("gates", ())]
    people = view.read_json("artifact/people.json")
    report.add("overview", list_system_names(view), tasks, gates, people, view.settings["level"], template=TEMPLATE)


def add_suite_body(report: Report, view: RunView) -> None:
    """Add a table for each task to the report page, and the answers to the items on which the first model lost most."""
    results = view.read_json("artifact/results.json")
    names = list_system_names(view)
    answers = {(row["task"], row["id"]): row for row in view.read_stream("artifact/answers.jsonl")}
    if variety := results.get("collapse"):
        report.add("variety", names, variety, template=TEMPLATE)
    for task_name, task in list_results_in_order(view, results):
        report.add("task", task_name, names, task, template=TEMPLATE)
        for baseline in names[1:]:
            ids = [item["id"] for item in task["regressions"].get(baseline, ())]
            # Answers may be missing because rows were forgotten since.
            rows = [answers[task_name, item_id] for item_id in ids if (task_name, item_id) in answers]
            report.add("regressions", names[0], baseline, rows, "asks" in task, template=TEMPLATE)


PAGE_SECTIONS = PageSections(summarize_suite, add_suite_body, add_overview)
