"""Several systems on the tasks of a suite: what `stage=eval` does where `stage.systems` names some."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from align import ranks
from align.config.eval import EvalConfig
from align.config.root import Config
from align.config.scorers import reward_spec
from align.data.reasoning import parted, without_reasoning
from align.errors import require
from align.evals import judges
from align.evals.checkers import Checker, checker
from align.evals.gates import Gate, decision, in_a_line, junit, verdict_file
from align.evals.results import Said, Scored, results_of
from align.evals.stats import Decision
from align.evals.suite import Tasks, Work
from align.evals.systems import System
from align.evals.tasks import Item, Task
from align.models.backbone import answered
from align.models.load import choose_device, choose_dtype
from align.report import in_words
from align.report.words import counted, few
from align.rollout.answers_alone import parted_texts
from align.rollout.kept import Answer
from align.run import Run, write_json
from align.run.files import write_text
from align.stages.suite_answers import Made, Speaker, answers_of, prompts_of, speaker_of
from align.track import peak_rss_mb
from align.types import Conversation, Result, Rollout
from reward.build import build, on_its_own_base
from reward.combined import comparable
from reward.inputs import models_of
from reward.scorer import Scorer


def run(run: Run, config: Config, work: Work) -> Result:
    stage: EvalConfig = config.stage
    hides = config.rollout.reasoning == "hide"

    # What fits every system is asked of all; what was answered before is not asked again.
    models = [system for system in work.systems if system.base is not None]
    prompts = [prompts_of(config, system, work.tasks) for system in models]
    fits = [None not in of_item for of_item in zip(*(each.tokens for each in prompts), strict=True)] or None
    tasks, dropped = those_that_fit(work.tasks, fits)
    speakers = [speaker_of(config, each, tasks, fits or ()) for each in prompts]
    answers, made = answers_of(run, config, speakers)

    said = {s.system.name: read_answers(s, answers[s.system.name], hides) for s in speakers}
    said |= {name: read_file(found, tasks, hides) for name, found in work.files.items()}
    rollouts = {s.system.name: rollout_of(s, answers[s.system.name]) for s in speakers}
    judge = judge_of(run, config, work) if any(items[0].check is None for _, items in tasks) else None

    scored, warnings, first = list[Scored](), dict[str, None](), 0
    for task, items in tasks:
        rows = slice(first, first + len(items))
        first += len(items)
        told = {system.name: said[system.name][rows] for system in work.systems}
        if judge is None or items[0].check is not None:
            checks = [checker(item.check, item.id, allow_code=stage.allow_code) for item in items]
            warnings |= dict.fromkeys(line for check in checks for line in check.warnings)
            scores = ranks.from_main(checked(checks, told) if ranks.is_main() else {})
            scored.append(Scored(task.name, "checks", "exact", items, scores, dropped[task.name]))
        else:
            part = {name: rows_of(rollout, rows) for name, rollout in rollouts.items()}
            scores = judged(judge.scorer, items, told, part, hides)
            scored.append(Scored(task.name, judge.title, judge.role, items, scores, dropped[task.name]))
    write_text(run.artifact / "answers.jsonl", "".join(f"{json.dumps(row)}\n" for row in evidence(scored)))
    notes = [*dict.fromkeys([*(judge.notes if judge else ()), *work.unknown, *warnings])]
    gates = {gate.name: (gate, decision(gate, scored)) for gate in work.gates}
    return published(run, config, work, results_of(scored, stage.level, stage.shown), gates, made, notes)


def those_that_fit(tasks: Tasks, fits: Sequence[bool] | None) -> tuple[Tasks, dict[str, int]]:
    """The items whose prompt fits every system, and how many do not, by task.

    Args:
        fits: of every item, one task behind another; None where no system has a limit.

    Raises:
        InputError: none of a task's fits.
    """
    found, dropped, first = list[tuple[Task, Sequence[Item]]](), dict[str, int](), 0
    for task, items in tasks:
        those = fits[first : first + len(items)] if fits is not None else [True] * len(items)
        first += len(items)
        kept = [item for item, fit in zip(items, those, strict=True) if fit]
        problem = f"is longer than what a prompt may have, for all {counted(len(items), 'item')} of {task.name}"
        require(bool(kept), "data.max_length", task.name, problem, "Raise it, or lower rollout.max_new_tokens.")
        found.append((task, kept))
        dropped[task.name] = len(items) - len(kept)
    return found, dropped


def read_answers(speaker: Speaker, answers: Sequence[Answer], hides: bool) -> list[Said]:
    """Answers as they are scored: without their reasoning where that is hidden."""
    hidden, read = parted_texts(speaker.prompts, [answer.text for answer in answers], speaker.tokenizer, hides)
    rows = zip(speaker.asked, answers, hidden, read, strict=True)
    return [Said(asked.id, text, 0.0, answer.ended, reasoning) for asked, answer, reasoning, text in rows]


def read_file(found: Mapping[tuple[str, str], str], tasks: Tasks, hides: bool) -> list[Said]:
    """The same of a file.

    Args:
        found: task and id of an item → its answer.
    """
    texts = [found[task.name, item.id] for task, items in tasks for item in items]
    parts = [parted(text, False) if hides else (None, text) for text in texts]
    return [Said("", text, 0.0, None, reasoning) for reasoning, text in parts]


def rollout_of(speaker: Speaker, answers: Sequence[Answer]) -> Rollout:
    """The answers as tokens, for scorers that read these, or whether an answer was cut."""
    asked, said = [p.input_ids for p in speaker.prompts], [answer.ids for answer in answers]
    made = answered(asked, said, speaker.tokenizer.pad_token_id, "cpu")
    return replace(made, ended_B=made.ended_B.new_tensor([answer.ended for answer in answers]))


def rows_of(rollout: Rollout, rows: slice) -> Rollout:
    """Some rows of a rollout."""
    tokens, mask, ended = (x[rows] for x in (rollout.tokens_BS, rollout.mask_BS, rollout.ended_B))
    return Rollout(tokens, mask, rollout.prompt_width, ended)


class Judge(NamedTuple):
    """Who scores what no check does.

    Attributes:
        role: `gold`, or `proxy` where some system was optimised against it.
        notes: what is to be said of it.
    """

    scorer: Scorer
    title: str
    role: str
    notes: Sequence[str]


def judge_of(run: Run, config: Config, work: Work) -> Judge:
    """The judge of `reward=`, loaded, and what it is to the systems."""
    reward, models = run.manifest.config["reward"], models_of(run.inputs)
    title, identities = judges.title(reward, run.inputs), judges.identities(reward, run.inputs)
    root, device = Path(config.run.root).expanduser(), choose_device(config.device)
    artifacts = [s.artifact for s in work.systems if s.artifact is not None and s.artifact.manifest is not None]
    found = [judges.standing_of(artifact, identities, root, models) for artifact in artifacts]
    role = "proxy" if any(of.role == "proxy" for of in found) else "gold"
    dtype = choose_dtype(config.dtype, device)
    scorer = build(reward_spec(config.reward), (on_its_own_base(m, device, dtype, 32) for m in models))
    return Judge(scorer, title, role, [note for of in found for note in of.sentences(title)])


def checked(checks: Sequence[Checker], told: Mapping[str, Sequence[Said]]) -> dict[str, list[Said]]:
    """Answers with what the check of each item says."""
    found: dict[str, list[Said]] = {}
    for name, answers in told.items():
        results = [check(answer.text) for check, answer in zip(checks, answers, strict=True)]
        rows = zip(answers, results, strict=True)
        found[name] = [replace(answer, score=result.score, checked=result) for answer, result in rows]
    return found


def judged(
    judge: Scorer, items: Sequence[Item], told: Mapping[str, Sequence[Said]], rollouts: Mapping[str, Rollout],
    hides: bool,
) -> dict[str, list[Said]]:  # fmt: skip
    """Answers with the judge's scores. Its learned parts are brought to one scale on the answers of the second system,
    which the first is compared with."""

    def whole(item: Item, answer: Said) -> Conversation:
        messages = without_reasoning(item.prompt.messages) if hides else item.prompt.messages
        return replace(item.prompt, messages=messages).answered(answer.text)

    read = {name: [whole(*pair) for pair in zip(items, answers, strict=True)] for name, answers in told.items()}
    reference = [*told][1]
    judge = comparable(judge, read[reference], rollouts.get(reference))
    scores = {name: judge.score(each, rollouts.get(name)).tolist() for name, each in read.items()}
    return {
        name: [replace(answer, score=score) for answer, score in zip(answers, scores[name], strict=True)]
        for name, answers in told.items()
    }


def evidence(tasks: Sequence[Scored]) -> Iterator[dict[str, Any]]:
    """A line for each item: what was asked, and what every system said."""
    for task in tasks:
        for i, item in enumerate(task.items):
            answers = {name: one[i].as_dict() for name, one in task.said.items()}
            prompt = {"prompt": item.prompt.as_dicts(), "tools": item.prompt.tool_dicts()}
            about = {"task": task.name, "id": item.id, "cluster": item.cluster, "category": item.category}
            yield {**about, **{key: value for key, value in prompt.items() if value}, "answers": answers}


def published(
    run: Run, config: Config, work: Work, results: Mapping[str, Any], gates: Mapping[str, tuple[Gate, Decision]],
    made: Made, notes: Sequence[str],
) -> Result:  # fmt: skip
    """Write the results down, and say the main ones."""
    about = [about_system(system) for system in work.systems]
    write_json(run.artifact / "results.json", {"systems": about, "tasks": results, "notes": [*notes]})
    kept = {name: {k: v for k, v in task.items() if k in IN_MANIFEST} for name, task in results.items()}
    metrics = {
        "systems": about, "tasks": kept, "answers_made": made.now,
        "dropped_seen": sum(work.seen.values()), "judge_notes": [*notes], "peak_rss_mb": peak_rss_mb(),
    }  # fmt: skip
    metrics |= judged_by_gates(run, config, work, gates)
    first = work.systems[0].name
    lines = [line for name, task in results.items() for line in in_lines(first, name, task)]
    kept_before = f"{made.before:,} of {counted(made.before + made.now, 'answer')} were made before"
    lines = [kept_before, *lines] if made.before else lines
    lines += [in_a_line(*each) for each in gates.values()]
    return Result(metrics, (*lines, *notes))


def judged_by_gates(run: Run, config: Config, work: Work, gates: Mapping[str, tuple[Gate, Decision]]) -> dict[str, Any]:
    """Write a verdict file for each gate, and what continuous integration reads; what the manifest says of them."""
    if not gates:
        return {}
    digests = {"artifact": work.systems[0].record.digest}
    digests |= {name: read.digest for name, read in run.inputs.items() if name.startswith(("tasks.", "systems."))}
    folder = run.artifact / FOLDER
    folder.mkdir(exist_ok=True)
    for name, (gate, found) in gates.items():
        write_json(folder / f"{name}.json", verdict_file(gate, found, digests))
    write_text(run.artifact / "junit.xml", junit(run.name, gates))
    said = {name: found.outcome for name, (_, found) in gates.items()}
    return {"gates": said, "exit_status": 0 if {*said.values()} == {"pass"} else NOT_PASSED}


FOLDER, NOT_PASSED = "verdicts", 3
"""Of a run's artifact, for verdict files; and the exit status of an evaluation in which a gate is not passed."""


IN_MANIFEST = ("by", "role", "items", "dropped", "systems", "against")
"""Figures of a task that the manifest has too; the others are in `results.json`."""


def about_system(system: System) -> dict[str, Any]:
    """What exactly answered."""
    base = {"base": system.base.digest, "base_id": system.base.id, "method": system.method} if system.base else {}
    return {"name": system.name, "ref": system.ref, "digest": system.record.digest, **base}


def in_lines(first: str, name: str, task: Mapping[str, Any]) -> Iterator[str]:
    """A task's results in words."""
    by = {"exact": "", "gold": f" by {task['by']}", "proxy": f" by {task['by']}, a proxy"}[task["role"]]
    for other, found in task["against"].items():
        scores = " against ".join(f"{task['systems'][one]['score']['value']:.3f}" for one in (first, other))
        won = f", win rate {in_words(found['win_rate'])}" if "win_rate" in found else ""
        n, items = found["difference"]["n"], counted(task["items"], "item")
        items += f"{'' if n == task['items'] else f' from {n:,} sources'}{few(n)}"
        yield (
            f"{name}: {first} against {other}{by}: {scores}, difference {in_words(found['difference'])}{won}, "
            f"p after Holm {found['p_holm']:.2g} on {items}"
        )
    if task["dropped"]:
        yield f"{name}: {counted(task['dropped'], 'item')} too long for some system, and asked of none"
    for system, found in task["systems"].items():
        if errors := found.get("errors"):
            yield f"{name}: no verdict on {counted(errors, 'answer')} of {system}, which score 0"
