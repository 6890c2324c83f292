"""The page of several systems on the tasks of a suite: who is better, by how much, and where the first one lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align.report.figure_text import counted, percent
from align.report.page import Report
from align.report.run_view import RunView

TEMPLATE = "suite.html"


def summarize(seen: RunView) -> str:
    """Return what the gates say, and the differences that were shown."""
    names, gates = names_of(seen), seen.metrics.get("gates", {})
    first, others = names[0], names[1:]
    gated = [*collapsed(seen), *([outcomes([*gates.values()])] if gates else [])]
    every = [
        (name, task, other)
        for name, task in in_order(seen, seen.metrics)
        for other in others
        if other in task["against"]
    ]
    clear = [one for one in every if one[1]["against"][one[2]]["p_holm"] < 1 - seen.settings["level"]]
    found = [*shares(seen), *(sentence(first, *one) for one in clear)]
    if not every:
        return " ".join([*gated, f"Nobody has judged {first} against {' or '.join(others)} yet."])
    none = f"No difference between {first} and {' or '.join(others)} was shown."
    rest = "No other difference was shown." if clear else none
    return " ".join([*gated, *found, *([rest] if len(clear) < len(every) else [])])


def collapsed(seen: RunView) -> list[str]:
    """Return a sentence on each system that collapsed."""
    systems = seen.metrics.get("collapse", {}).get("systems", {})
    return [
        f"{name} collapsed: {'; '.join(systems[name]['reasons'])}."
        for name in names_of(seen)
        if systems.get(name, {}).get("verdict") == "collapsed"
    ]


def outcomes(found: Sequence[str]) -> str:
    """How many gates passed, failed and are undecided.

    Args:
        found: of each gate `pass`, `fail` or `undecided`.
    """
    failed, undecided = found.count("fail"), found.count("undecided")
    said = [f"{found.count('pass')} of {counted(len(found), 'gate')} passed"]
    said += [f"{failed} failed"] if failed else []
    said += [f"{undecided} {'is' if undecided == 1 else 'are'} undecided"] if undecided else []
    return f"{', '.join(said)}."


def names_of(seen: RunView) -> list[str]:
    """The systems as the user wrote them; the first is compared with the others."""
    return [system["name"] for system in seen.metrics["systems"]]


def in_order(seen: RunView, results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The tasks as the user wrote them: JSON has them by name."""
    written = [task["name"] for task in seen.config["eval"]["tasks"] or ()]
    tasks = results.get("tasks", {})
    return sorted(tasks.items(), key=lambda one: written.index(one[0]) if one[0] in written else len(written))


def shares(seen: RunView) -> list[str]:
    """Of tasks that ask a question about each answer, the systems' shares of yes."""
    return [
        f"On {name}, the share that {task['yes']} is "
        + " and ".join(f"{percent(task['systems'][who]['score'])} for {who}" for who in names_of(seen))
        + f", by {task['by']}."
        for name, task in in_order(seen, seen.metrics)
        if "asks" in task
    ]


def sentence(first: str, name: str, task: Mapping[str, Any], other: str) -> str:
    """What a difference says, and by whose word. Of what is graded it says no more than which has more of it."""
    better = task["against"][other]["difference"]["value"] > 0
    if "asks" in task:
        return f"{first} {task['yes']} {'more' if better else 'less'} often than {other} on {name}."
    by = {"exact": "", "measured": "", "proxy": f", by {task['by']}, a proxy,"}.get(task["role"], f", by {task['by']},")
    return f"{first} is {'better' if better else 'worse'}{by} than {other} on {name}."


def overview(report: Report, seen: RunView) -> None:
    """Add gates and comparisons."""
    tasks = in_order(seen, seen.json("artifact/results.json"))
    gates = [seen.json(f"artifact/verdicts/{name}.json") for name in seen.metrics.get("gates", ())]
    people = seen.json("artifact/people.json")
    report.add("overview", names_of(seen), tasks, gates, people, seen.settings["level"], template=TEMPLATE)


def add_body(report: Report, seen: RunView) -> None:
    """Add tables of each task, and the answers to the items that the first system lost most on."""
    results = seen.json("artifact/results.json")
    names = names_of(seen)
    answers = {(row["task"], row["id"]): row for row in seen.evidence("artifact/answers.jsonl")}
    if measured := results.get("collapse"):
        report.add("variety", names, measured, template=TEMPLATE)
    for name, task in in_order(seen, results):
        report.add("task", name, names, task, template=TEMPLATE)
        for other in names[1:]:
            lost = task["regressions"].get(other, ())
            rows = [answers[name, one["id"]] for one in lost if (name, one["id"]) in answers]  # some were forgotten
            report.add("regressions", names[0], other, rows, "asks" in task, template=TEMPLATE)
