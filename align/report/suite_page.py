"""The page of several systems on the tasks of a suite: who is better, by how much, and where the first one lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align.report.figure_text import counted, few, format_figure, in_words, percent, signed
from align.report.page import Report, Said
from align.report.run_view import RunView
from align.track import shortened

SHARES = {
    "prompt_strict": "all checks hold", "prompt_loose": "all hold loosely", "instruction_strict": "checks that hold",
    "instruction_loose": "that hold loosely",
    "acc": "right", "acc_norm": "right, by character", "acc_bytes": "right, by byte",
}  # fmt: skip
"""Shares of a system's items, and what they are called."""

NUMBERS = {"bits_per_byte": "bits per byte", "nats_per_token": "nats per token", "perplexity": "perplexity"}
"""The same of numbers."""


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
    """Gates and comparisons, a row each."""
    results = seen.mapping("artifact/results.json")
    gates = [seen.mapping(f"artifact/verdicts/{name}.json") for name in seen.metrics.get("gates", ())]
    if gates:
        rows = [(gate["gate"], gate["verdict"], gate["asked"], in_words(gate["figure"]), would(gate)) for gate in gates]
        report.heading("Gates").table(("gate", "verdict", "asks", "found", "items that would decide"), rows, "Gates")
    names = names_of(seen)
    report.heading(f"{names[0]} against {' and '.join(names[1:])}")
    for name, task in in_order(seen, results):
        report.text(f"**{name}**, {about(task)}")
        against_table(report, name, names, task)
        near_table(report, name, names, task)
    if any(task["against"] for task in results["tasks"].values()):
        report.text(READING.format(level=100 * seen.settings["level"]))
    if people := seen.mapping("artifact/people.json"):
        people_table(report, people)


def people_table(report: Report, people: Mapping[str, Any]) -> None:
    """How far people agree, and a row for each of them. They have no names here."""
    agreement = people["agreement"]
    found = {
        "agreement on a pair": agreement["raw"], "Krippendorff's alpha": agreement["alpha"],
        "known answers met": people["gold"], "the same on a repeat": people["repeats"],
        "the answer shown first preferred": people["shown_first"], "the longer answer preferred": people["longer"],
    }  # fmt: skip
    report.heading("People").text(f"{people['votes']:,} of {counted(people['wanted'], 'vote')}.")
    report.table(("figure", "found"), [(name, told(value)) for name, value in found.items()], "People: what they say")
    rows = [
        (
            one["pseudonym"], one["votes"], one["skips"], told(one["gold"]), told(one["repeats"]),
            told(one["shown_first"]),
        )
        for one in people["people"]
    ]  # fmt: skip
    heads = ("who", "votes", "skips", "known answers met", "the same on a repeat", "first one preferred")
    if rows:
        report.table(heads, rows, "People: each of them")


def told(figure: Mapping[str, Any] | str) -> str:
    """A figure; in words where it is undefined."""
    return figure if isinstance(figure, str) else percent(figure)


def would(gate: Mapping[str, Any]) -> str:
    return "–" if gate["verdict"] != "undecided" else str(gate["n_to_decide"] or "none would")


READING = (
    "Differences are the first system's mean score less the other's, paired by prompt, with a {level:g} % interval. "
    "**p after Holm** is how often chance alone makes one so large, raised for the number of comparisons here. **Would "
    "show** is a true difference that so many items find in four of five evaluations: a smaller one may still be there "
    "where none was shown."
)


def add_body(report: Report, seen: RunView) -> None:
    """Add tables of each task, and the answers to the items that the first system lost most on."""
    results, rows = seen.mapping("artifact/results.json"), seen.evidence("artifact/answers.jsonl")
    names, answers = names_of(seen), {(row["task"], row["id"]): row for row in rows}
    variety_table(report, names, results.get("collapse", {}))
    for name, task in in_order(seen, results):
        report.heading(f"Task {name}")
        if "asks" in task:
            report.text(f"The question about each answer: {task['asks']}")
        systems_table(report, name, names, task)
        categories_table(report, name, names[1:], task)
        for other in names[1:]:
            lost = task["regressions"].get(other, ())
            regressions(report, names[0], other, [answers.get((name, one["id"])) for one in lost], "asks" in task)


def variety_table(report: Report, names: Sequence[str], measured: Mapping[str, Any]) -> None:
    """A row for each system and task: whether its answers are nearly the same whatever is asked."""
    if not measured:
        return
    rows = []
    for task, systems in measured.items():
        for name in names:
            variety = systems[name]["variety"]
            greedy = variety.get("greedy")
            shown = greedy or variety["sampled"]
            phrase = shown["new_phrase"]
            rows.append(
                (
                    task,
                    name,
                    systems[name]["collapse"]["verdict"],
                    f"{greedy['policy']['distinct']:,}" if greedy else "–",
                    f"{variety['sampled']['policy']['distinct']:,} of {variety['sampled']['policy']['answers']:,}",
                    f"{percent(shown['policy']['commonest_share'])}: “{shortened(shown['policy']['commonest'])}”",
                    f"{phrase['policy']['value']:.0%}: “{phrase['text']}”" if phrase else "–",
                )
            )
    heads = ("task", "system", "verdict", "different at temperature 0", "different", "commonest", "new words")
    report.heading("Variety of the answers").text(VARIETY).table(heads, rows, "Variety of the answers")


VARIETY = (
    "First answers between distinct prompts, compared without case, punctuation, numbers and words of the prompt. The "
    "commonest answer is a greedy one where there are any. New words stand in more answers than in those of the second "
    "system."
)


def about(task: Mapping[str, Any]) -> str:
    scored = "scored" if "score" in next(iter(task["systems"].values())) else "judged"
    by = f"share that {task['yes']}, by {task['by']}" if "asks" in task else f"{scored} by {task['by']}"
    proxy = ", a proxy that a system was optimised against" if task["role"] == "proxy" else ""
    dropped = f"; {counted(task['dropped'], 'item')} too long for some system left out" if task["dropped"] else ""
    return f"{by}{proxy}{dropped}"


def systems_table(report: Report, name: str, names: Sequence[str], task: Mapping[str, Any]) -> None:
    systems, some = task["systems"], next(iter(task["systems"].values()))
    shares, numbers = ([key for key in known if key in some] for known in (SHARES, NUMBERS))
    undecided = any(one.get("errors") for one in systems.values())
    scored, answers = "score" in some, "characters" in some  # a probe has no answers
    score = "share of yes" if "asks" in task else "score"
    heads = ("system", *((score,) if scored else ()), *(SHARES[key] for key in shares))
    heads += tuple(NUMBERS[key] for key in numbers)
    heads += ("characters", "truncated", "empty") if answers else ()
    heads += ("no verdict",) if undecided else ()
    rows = []
    for who in names:
        one = systems[who]
        row = [who, *([in_words(one["score"])] if scored else []), *(percent(one[key]) for key in shares)]
        row += [format_figure(one[key]) for key in numbers]
        if answers:
            cut = "–" if one["cut"] is None else percent(one["cut"])
            row += [f"{one['characters']:,.0f}", cut, percent(one["empty"])]
        rows.append([*row, *([one["errors"]] if undecided else [])])
    report.table(heads, rows, f"{name}: systems")
    if "strengths" in task:
        found = sorted(task["strengths"]["strengths"].items(), key=lambda one: -one[1]["value"])
        report.table(
            ("system", "strength, log-odds"), [(who, in_words(one)) for who, one in found],
            f"{name}: strengths by Bradley–Terry",
        )  # fmt: skip


def against_table(report: Report, name: str, names: Sequence[str], task: Mapping[str, Any]) -> None:
    """The first system beside each other one."""
    others = [name for name in names[1:] if name in task["against"]]
    if not others:
        report.text("Nobody has judged these yet.")
        return
    some = task["against"][others[0]]
    wins, orders = "win_rate" in some, any("swap" in one for one in task["against"].values())
    unsaid = any(one.get("no_verdict") for one in task["against"].values())
    heads = ("against", "scores", "difference", "p after Holm", "would show", "items")
    heads += ("win rate", "at equal lengths") if wins else ()
    heads += ("the same in both orders",) if orders else ()
    heads += ("no verdict",) if unsaid else ()
    rows = []
    for other in others:
        found = task["against"][other]
        scores = " and ".join(f"{found[side]['value']:.3f}" for side in ("first", "second"))
        size = "–" if found["detectable"] is None else format_figure(found["detectable"])
        n = found["difference"]["n"]
        row = [other, scores, in_words(found["difference"]), f"{found['p_holm']:.2g}", size, f"{n:,}{few(n)}"]
        if wins:
            row += [percent(found["win_rate"]), percent(found["win_rate_at_equal_lengths"])]
        row += [same_in_both(found.get("swap"))] if orders else []
        row += [found["no_verdict"]] if unsaid else []
        rows.append(row)
    report.table(heads, rows, f"{name}: the first against others")


def same_in_both(swap: Mapping[str, Any] | None) -> str:
    """The share of items with one verdict in both orders, and of how many: those without an error in either."""
    if swap is None:
        return "–"
    n = swap["consistency"]["n"]
    return f"{percent(swap['consistency'])} (n={n:,}{few(n)})"


def near_table(report: Report, name: str, names: Sequence[str], task: Mapping[str, Any]) -> None:
    """What training nearly saw, and the comparisons on the other items."""
    if near := task.get("near"):
        told = ", ".join(f"{who} {near['systems'][who]:,}" for who in names)
        report.text(f"Training nearly saw {counted(near['items'], 'item')}, by system: {told}. On the others:")
        rows = [(o, in_words(found["difference"]), found["difference"]["n"]) for o, found in near["others"].items()]
        report.table(("against", "difference", "items"), rows, f"{name}: on items that training did not nearly see")


def categories_table(report: Report, name: str, others: Sequence[str], task: Mapping[str, Any]) -> None:
    rows = [
        (category, other, counted(one["difference"]["n"], "item"), in_words(one["difference"]))
        for category, found in task["categories"].items()
        for other in others
        if (one := found.get(other))
    ]
    if rows:
        report.table(("category", "against", "items", "difference"), rows, f"{name}: by category")


def regressions(report: Report, first: str, other: str, rows: Sequence[Mapping[str, Any] | None], graded: bool) -> None:
    """The items that the first system lost most on, with both answers; of what is graded, those with a yes for one.

    Args:
        rows: of `answers.jsonl`; None of one that was forgotten since.
    """
    there = [row for row in rows if row is not None]
    if there:
        report.text(f"Where {first} and {other} differ:" if graded else f"Where {first} lost most against {other}:")
    for row in there:
        report.side_by_side(row["prompt"], [side(who, row["answers"][who], graded) for who in (first, other)])


def side(who: str, answer: Mapping[str, Any], graded: bool) -> Said:
    """What a system said to an item; of a probe the choice that it picked, or the bits per byte of the text; of a task
    of lm-eval its answer, or the likeliest continuation."""
    if (weighed := answer.get("weighed")) is None:
        label = f"{who}{grade(answer) if graded else scored(answer)}{missed(answer)}"
        return Said(label, transcript(answer), answer.get("reasoning", ""))
    if "logprobs" in weighed:
        return Said(f"{who}, {'right' if answer['score'] else 'wrong'} choice", answer["text"])
    if "metrics" in weighed:
        if weighed.get("requests") == []:  # of a whole text, which nothing continues
            return Said(who, f"{answer['score']:.4f}")
        return Said(f"{who}{scored(answer)}", answer["text"])
    return Said(who, f"{-answer['score']:.4f} bits per byte")


def transcript(answer: Mapping[str, Any]) -> str:
    """An answer, behind the turns before it."""
    before = [f"{turn['role']}: {turn['content']}" for turn in answer.get("before", ())]
    return "\n\n".join([*before, f"assistant: {answer['text']}" if before else answer["text"]])


def grade(answer: Mapping[str, Any]) -> str:
    return {1.0: ", yes", 0.0: ", no"}.get(answer["score"], f", no verdict: {answer.get('error', '')}")


def scored(answer: Mapping[str, Any]) -> str:
    return f", score {signed(answer['score'])}" if "score" in answer else ""


def missed(answer: Mapping[str, Any]) -> str:
    found = [*answer.get("missed", ())]
    return f"; missed: {'; '.join(found)}" if found else ""
