"""The page of several systems on the tasks of a suite: who is better, by how much, and where the first one lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from align.report.page import Report, Said
from align.report.seen import Seen
from align.report.words import counted, format_figure, in_words, percent, signed

LEVEL = 0.05
"""The p below which a difference is called shown, after Holm's step-down over all comparisons."""
SHARES = {
    "prompt_strict": "all checks hold", "prompt_loose": "all hold loosely", "instruction_strict": "checks that hold",
    "instruction_loose": "that hold loosely",
}  # fmt: skip


def verdict(seen: Seen) -> str:
    """A sentence for each task and comparison."""
    names, tasks = names_of(seen), seen.metrics["tasks"]
    return " ".join(said for name, task in tasks.items() for said in sentences(names, name, task))


def names_of(seen: Seen) -> list[str]:
    """The systems as the user wrote them; the first is compared with the others."""
    return [system["name"] for system in seen.metrics["systems"]]


def sentences(names: Sequence[str], name: str, task: Mapping[str, Any]) -> Iterator[str]:
    first, *others = names
    for other in others:
        found = task["against"][other]
        difference, n = found["difference"], counted(found["difference"]["n"], "item")
        shown = found["p_holm"] < LEVEL
        which = "better than" if difference["value"] > 0 else "worse than"
        by = "" if task["role"] == "exact" else f" by {task['by']}{', a proxy,' if task['role'] == 'proxy' else ''}"
        said = in_words(difference)
        if shown:
            yield f"{name}: {first} is {which} {other}{by}: {said} on {n}."
            continue
        size = found["detectable"]
        more = f"; {n} would show one of {size:.3g}" if size is not None else ""
        yield f"{name}: no difference between {first} and {other} was shown{by}: {said}{more}."


def shown(report: Report, seen: Seen) -> None:
    """Tables of each task, and the answers to the items that the first system lost most on."""
    results, rows = seen.mapping("artifact/results.json"), seen.evidence("artifact/answers.jsonl")
    if not results:
        return
    names, answers = names_of(seen), {(row["task"], row["id"]): row for row in rows}
    for name, task in results["tasks"].items():
        report.heading(f"Task {name}").text(about(task))
        systems_table(report, name, names, task)
        against_table(report, name, names[1:], task)
        categories_table(report, name, names[1:], task)
        for other in names[1:]:
            regressions(report, names[0], other, [answers.get((name, one["id"])) for one in task["regressions"][other]])


def about(task: Mapping[str, Any]) -> str:
    by = "by checks of what each item asks" if task["role"] == "exact" else f"by {task['by']}"
    proxy = ", **a proxy that a system was optimised against**" if task["role"] == "proxy" else ""
    said = f"{counted(task['items'], 'item')}, scored {by}{proxy}."
    left = counted(task["dropped"], "item")
    return f"{said} {left} did not fit some system and were asked of none." if task["dropped"] else said


def systems_table(report: Report, name: str, names: Sequence[str], task: Mapping[str, Any]) -> None:
    systems = task["systems"]
    shares = [key for key in SHARES if key in next(iter(systems.values()))]
    heads = ("system", "score", *(SHARES[key] for key in shares), "characters", "cut", "empty")
    rows = [
        (
            who, in_words(one["score"]), *(percent(one[key]) for key in shares), f"{one['characters']:,.0f}",
            "–" if one["cut"] is None else percent(one["cut"]), percent(one["empty"]),
        )
        for who in names
        for one in [systems[who]]
    ]  # fmt: skip
    report.table(heads, rows, f"{name}: systems")
    if "strengths" in task:
        found = sorted(task["strengths"]["strengths"].items(), key=lambda one: -one[1]["value"])
        report.table(
            ("system", "strength, log-odds"), [(who, in_words(one)) for who, one in found],
            f"{name}: strengths by Bradley–Terry",
        )  # fmt: skip


def against_table(report: Report, name: str, others: Sequence[str], task: Mapping[str, Any]) -> None:
    wins = "win_rate" in next(iter(task["against"].values()))
    heads = ("against", "difference", "p", "p after Holm", "difference that would show")
    rows = []
    for other in others:
        found = task["against"][other]
        size = "–" if found["detectable"] is None else format_figure(found["detectable"])
        row = [other, in_words(found["difference"]), f"{found['p']:.2g}", f"{found['p_holm']:.2g}", size]
        if wins:
            row += [percent(found["win_rate"]), percent(found["win_rate_at_equal_lengths"])]
        rows.append(row)
    heads += ("win rate", "at equal lengths") if wins else ()
    report.table(heads, rows, f"{name}: the first against others")


def categories_table(report: Report, name: str, others: Sequence[str], task: Mapping[str, Any]) -> None:
    rows = [
        (category, other, counted(one["difference"]["n"], "item"), in_words(one["difference"]))
        for category, found in task["categories"].items()
        for other in others
        for one in [found[other]]
    ]
    if rows:
        report.table(("category", "against", "items", "difference"), rows, f"{name}: by category")


def regressions(report: Report, first: str, other: str, rows: Sequence[Mapping[str, Any] | None]) -> None:
    """The items that the first system lost most on, with both answers.

    Args:
        rows: of `answers.jsonl`; None of one that was forgotten since.
    """
    there = [row for row in rows if row is not None]
    if there:
        report.text(f"Where {first} lost most against {other}:")
    for row in there:
        sides = [
            Said(f"{who}, score {signed(one['score'])}{missed(one)}", one["text"], one.get("reasoning", ""))
            for who in (first, other)
            for one in [row["answers"][who]]
        ]
        report.side_by_side(row["prompt"], sides)


def missed(answer: Mapping[str, Any]) -> str:
    found = [*answer.get("missed", ())]
    return f"; missed: {'; '.join(found)}" if found else ""
