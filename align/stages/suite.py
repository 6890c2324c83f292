"""Several systems on the tasks of a suite: what `stage=eval` does where `stage.systems` names some."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from align.config.eval import EvalConfig
from align.config.root import Config
from align.errors import NOT_PASSED
from align.evals.collapse import Measurement, collapse_lines, phrase_lines
from align.evals.gates import Gate, decide_on_collapse, decision, in_a_line, junit, verdict_file
from align.evals.probes import Choices
from align.evals.results import Said, Scored, results_of
from align.evals.stats import Decision
from align.evals.suite import Tasks, Work
from align.evals.systems import System
from align.report import in_words
from align.report.words import counted, few
from align.reward.checkers.code import code_permission
from align.run import Run, write_json
from align.run.files import write_text
from align.stages.suite_answers import Made
from align.stages.suite_collapse import (
    TaskAnswers,
    closed_score,
    is_closed,
    measure_closed,
    measure_open,
    task_answers,
    verdicts_by_system,
)
from align.stages.suite_people import judge_of_people
from align.stages.suite_people_inputs import PEOPLE
from align.stages.suite_probes import probed
from align.stages.suite_scores import Judge, Told, by_checks, judge_of
from align.stages.suite_turns import heard
from align.track import peak_rss_mb
from align.types import Result, Rollout


def run(run: Run, config: Config, work: Work) -> Result:
    stage: EvalConfig = config.stage
    models = [system for system in work.systems if system.base is not None]
    answered = [each for each in work.tasks if each[0].probe is None]
    said, made, notes, collapses = scored_answers(run, config, work, answered)
    weighed, computed, written = probed(run, config, models, work.tasks)
    by_name = {each.name: each for each in said} | weighed
    scored = [by_name[task.name] for task, _ in work.tasks]
    write_lines(run.artifact / "answers.jsonl", evidence(scored))
    write_lines(run.artifact / "verdicts.jsonl", verdicts(scored))
    names = [system.name for system in work.systems]
    verdicts_on = verdicts_by_system(collapses, names)
    gates = {
        gate.name: (gate, decide_on_collapse(gate, decision(gate, scored), names[0], verdicts_on[names[0]]))
        for gate in work.gates
    }
    results = results_of(scored, stage.level, stage.shown)
    notes = [*dict.fromkeys([*notes, *work.unknown])]
    counts = {"answer": made.plus(written), "log-likelihood": computed}
    return published(run, config, work, results, gates, counts, notes, collapses)


def scored_answers(
    run: Run, config: Config, work: Work, tasks: Tasks
) -> tuple[list[Scored], Made, list[str], dict[str, dict[str, Measurement]]]:
    """The tasks that ask for answers, scored; how many answers were made; what is to be said of who scores; and whether
    the systems collapsed, by task."""
    if not tasks:
        return [], Made(0, 0), [], {}
    stage: EvalConfig = config.stage
    every = heard(run, config, work, tasks)
    tasks, dropped = every.tasks, every.dropped
    tolds = told_of([system.name for system in work.systems], tasks, every.said, every.rollouts)
    judged = [told for told in tolds if told.items[0].check is None]
    judge = judge_over(run, config, work, judged) if judged else None

    scored, notes = list[Scored](), [*(judge.notes if judge else ())]
    for told in tolds:
        if judge is None or told.items[0].check is not None:
            found, said_of_it = by_checks(told, code_permission(stage.allow_code, stage.unsafe_code))
        else:
            found, said_of_it = judge.scored(told)
        notes += said_of_it
        scored.append(replace(found, dropped=dropped[told.task]))
    return scored, every.made, notes, measure_tasks(config, tasks, task_answers(every), judge)


def measure_tasks(
    config: Config, tasks: Tasks, answers: Mapping[str, TaskAnswers], judge: Judge | None
) -> dict[str, dict[str, Measurement]]:
    """Return task → system → whether its answers are nearly the same whatever is asked."""
    stage: EvalConfig = config.stage
    closed: dict[str, dict[str, Measurement]] = {}
    for task, items in tasks:
        if not is_closed(task, items, config.eval.closed):
            continue
        allow_code = code_permission(stage.allow_code, stage.unsafe_code)
        scorer = judge.scorer if judge else None
        scoring = closed_score(answers[task.name].items, allow_code, scorer, config.rollout.reasoning == "hide")
        closed[task.name] = measure_closed(answers[task.name], scoring)
    opened = {name: each for name, each in answers.items() if name not in closed}
    return {**(measure_open(opened) if opened else {}), **closed}


def judge_over(run: Run, config: Config, work: Work, judged: Sequence[Told]) -> Judge:
    """The judge of the evaluation.

    Args:
        judged: all that it is going to judge, which people are asked about at once.
    """
    return judge_of_people(run, config, judged) if work.judge == PEOPLE else judge_of(run, config, work)


def told_of(
    systems: Sequence[str], tasks: Tasks, said: Mapping[str, Sequence[Said]], rollouts: Mapping[str, Rollout]
) -> list[Told]:
    """What was said to the items of each task.

    Args:
        said, rollouts: system → its answers to all items, one task behind another.
    """
    found, first = list[Told](), 0
    for task, items in tasks:
        rows = slice(first, first + len(items))
        first += len(items)
        part = {name: rows_of(each, rows) for name, each in rollouts.items()}
        found.append(Told(task.name, items, {name: said[name][rows] for name in systems}, part, task.asks))
    return found


def rows_of(rollout: Rollout, rows: slice) -> Rollout:
    """Some rows of a rollout."""
    tokens, mask, ended = (x[rows] for x in (rollout.tokens_BS, rollout.mask_BS, rollout.ended_B))
    return Rollout(tokens, mask, rollout.prompt_width, ended)


def evidence(tasks: Sequence[Scored]) -> Iterator[dict[str, Any]]:
    """A line for each item: what was asked, and what every system said."""
    for task in tasks:
        for i, item in enumerate(task.items):
            answers = {name: one[i].as_dict() for name, one in task.said.items()}
            prompt = {"prompt": item.prompt.as_dicts(), "tools": item.prompt.tool_dicts()}
            about = {"task": task.name, "id": item.id, "cluster": item.cluster, "category": item.category}
            about |= {"near": dict(item.near)} if item.near else {}
            if isinstance(item.probe, Choices):
                about |= {"choices": [*item.probe.texts], "right": item.probe.answer}
            yield {**about, **{key: value for key, value in prompt.items() if value}, "answers": answers}


def verdicts(tasks: Sequence[Scored]) -> Iterator[dict[str, Any]]:
    """A line for each verdict of a judge."""
    for task in tasks:
        for other, said in task.verdicts.items():
            yield from ({"task": task.name, "against": other, **one.as_dict()} for one in said)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines; no file where there are none."""
    if text := "".join(f"{json.dumps(row)}\n" for row in rows):
        write_text(path, text)


def published(
    run: Run, config: Config, work: Work, results: Mapping[str, Any], gates: Mapping[str, tuple[Gate, Decision]],
    made: Mapping[str, Made], notes: Sequence[str], collapses: Mapping[str, Mapping[str, Measurement]],
) -> Result:  # fmt: skip
    """Write the results down, and say the main ones.

    Args:
        collapses: task → system → whether its answers are nearly the same whatever is asked.
    """
    about = [about_system(system) for system in work.systems]
    measured = {task: {name: each.as_dict() for name, each in systems.items()} for task, systems in collapses.items()}
    content = {"systems": about, "tasks": results, "collapse": measured, "notes": [*notes]}
    write_json(run.artifact / "results.json", content)
    kept = {name: {k: v for k, v in task.items() if k in IN_MANIFEST} for name, task in results.items()}
    metrics = {
        "systems": about, "tasks": kept, "answers_made": made["answer"].now,
        "dropped_seen": sum(work.seen.values()), "judge_notes": [*notes], "peak_rss_mb": peak_rss_mb(),
    }  # fmt: skip
    weighed = made["log-likelihood"]
    metrics |= {"likelihoods_made": weighed.now} if sum(weighed) else {}
    metrics |= main_figure(results) | judged_by_gates(run, config, work, gates)
    first = work.systems[0].name
    verdicts_on = verdicts_by_system(collapses, [system.name for system in work.systems])
    by_system = {name: collapse.as_dict() for name, collapse in verdicts_on.items()}
    metrics["collapse"] = {**by_system[first], "systems": by_system}
    lines = [line for name, task in results.items() for line in in_lines(first, name, task)]
    before = [(what, of) for what, of in made.items() if of.before]
    lines = [*(f"{of.before:,} of {counted(sum(of), what)} were made before" for what, of in before), *lines]
    lines += [in_a_line(*each) for each in gates.values()]
    before_all = collapse_lines(verdicts_on) if collapses else []
    for task, systems in measured.items():
        greedy = systems[first]["variety"].get("greedy", {})
        lines += [
            f"{task}, {first}: {line}"
            for line in phrase_lines(collapses[task][first].collapse, greedy.get("new_phrase"), work.systems[1].name)
        ]
    return Result(metrics, (*before_all, *lines, *notes))


def main_figure(results: Mapping[str, Any]) -> dict[str, Any]:
    """What lists of runs show: the first task's comparison of the first two systems."""
    against = next(iter(next(iter(results.values()))["against"].values()), {})
    return {key: against[key] for key in ("win_rate", "difference") if key in against}


def judged_by_gates(run: Run, config: Config, work: Work, gates: Mapping[str, tuple[Gate, Decision]]) -> dict[str, Any]:
    """Write a verdict file for each gate, and what continuous integration reads; what the manifest says of them."""
    if not gates:
        return {}
    digests = {"artifact": work.systems[0].record.digest}
    digests |= {
        name: read.digest for name, read in run.inputs.items() if name.startswith(("tasks.", "systems.", "card"))
    }
    folder = run.artifact / FOLDER
    folder.mkdir(exist_ok=True)
    for name, (gate, found) in gates.items():
        by = work.cards[name].as_dict() if name in work.cards else None
        write_json(folder / f"{name}.json", verdict_file(gate, found, digests, by))
    write_text(run.artifact / "junit.xml", junit(run.name, gates))
    said = {name: found.outcome for name, (_, found) in gates.items()}
    return {"gates": said, "exit_status": 0 if {*said.values()} == {"pass"} else NOT_PASSED}


FOLDER = "verdicts"
"""Of a run's artifact, for verdict files."""


IN_MANIFEST = ("by", "role", "asks", "yes", "items", "dropped", "systems", "against")
"""Figures of a task that the manifest has too; the others are in `results.json`."""


def about_system(system: System) -> dict[str, Any]:
    """What exactly answered."""
    base = {"base": system.base.digest, "base_id": system.base.id, "method": system.method} if system.base else {}
    return {"name": system.name, "ref": system.ref, "digest": system.record.digest, **base}


def in_lines(first: str, name: str, task: Mapping[str, Any]) -> Iterator[str]:
    """A task's results in words."""
    if "asks" in task:
        shares = ", ".join(f"{who} {in_words(found['score'], '.2f')}" for who, found in task["systems"].items())
        yield f"{name}: share that {task['yes']}, by {task['by']}: {shares}"
    by = {"exact": "", "proxy": f" by {task['by']}, a proxy"}.get(task["role"], f" by {task['by']}")
    for other, found in task["against"].items():
        scores = f"{found['first']['value']:.3f} against {found['second']['value']:.3f}"
        won = f", win rate {in_words(found['win_rate'])}" if "win_rate" in found else ""
        n, items = found["difference"]["n"], counted(found["items"], "item")
        items += f"{'' if n == found['items'] else f' from {n:,} sources'}{few(n)}"
        yield (
            f"{name}: {first} against {other}{by}: {scores}, difference {in_words(found['difference'])}{won}, "
            f"p after Holm {found['p_holm']:.2g} on {items}"
        )
    for other in task["systems"]:
        if other != first and other not in task["against"]:
            yield f"{name}: nobody has judged {first} against {other} yet"
    if near := task.get("near"):
        yield f"{name}: {counted(near['items'], 'item')} nearly what training saw{on_the_others(first, near['others'])}"
    if task["dropped"]:
        yield f"{name}: {counted(task['dropped'], 'item')} too long for some system, and asked of none"
    for system, found in task["systems"].items():
        if errors := found.get("errors"):
            count_as = "count as one half" if "asks" in task else "score 0"
            yield f"{name}: no verdict on {counted(errors, 'answer')} of {system}, which {count_as}"


def on_the_others(first: str, others: Mapping[str, Any]) -> str:
    """The comparisons without items that training nearly saw."""
    said = [f"against {other} {in_words(found['difference'])}" for other, found in others.items()]
    return f"; on the others {first} {', '.join(said)}" if said else ", which leaves no others"
