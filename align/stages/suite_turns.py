"""Asking systems the items of a suite, turn by turn: the first question of every item, then, behind each system's own
answer, the next one of those items that have one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from align.config.root import Config
from align.data.chat.encode import Prompt
from align.data.chat.reasoning import parted
from align.errors import require
from align.evals.collapse import MIN_PROMPTS, first_of_each_prompt
from align.evals.comparison import prompt_text
from align.evals.results import Said
from align.evals.suite import Tasks, Work
from align.evals.systems import System
from align.evals.tasks import Item, Task
from align.models.backbone import answered
from align.report.words import counted
from align.rollout.answers_alone import parted_texts
from align.rollout.kept import Answer
from align.run import Run
from align.stages.suite_answers import (
    Elsewhere,
    Made,
    Speaker,
    answers_elsewhere,
    answers_of,
    greedy_replies,
    prompts_of,
    speaker_of,
    tokenizer_of,
)
from align.types import Conversation, Message, Rollout


class Heard(NamedTuple):
    """What the systems said.

    Attributes:
        tasks: with the items that every system was asked, at every turn.
        dropped: items that were too long for some system, by task.
        said: system → its last answers to all these items, one task behind another.
        rollouts: the same as tokens, of the systems that answer here.
        made: how many answers were made.
        greedy: system → its first answers at temperature 0 to all these items, of the systems that give such answers.
            None for an item that was not asked so.
        no_greedy: system → why it gives none.
    """

    tasks: Tasks
    dropped: Mapping[str, int]
    said: Mapping[str, Sequence[Said]]
    rollouts: Mapping[str, Rollout]
    made: Made
    greedy: Mapping[str, Sequence[str | None]]
    no_greedy: Mapping[str, str]


class Greedy(NamedTuple):
    """What systems answer at temperature 0.

    Attributes:
        texts: system → number of the item → its answer.
        why_none: system → why it gives none.
    """

    texts: dict[str, dict[int, str]]
    why_none: dict[str, str]


class Turn(NamedTuple):
    """A system's answer at one turn of an item.

    Attributes:
        prompt, answer: as tokens, of a system that answers here.
    """

    said: Said
    prompt: Prompt | None = None
    answer: Answer | None = None


def heard(run: Run, config: Config, work: Work, tasks: Tasks) -> Heard:
    """Ask every system every item. What was answered before is not asked again.

    Raises:
        InputError: no item of a task fits every system, or a system gives no answers.
    """
    asking = [system for system in work.systems if not system.is_file]
    items = [item for _, items in tasks for item in items]
    talks = {system.name: [item.prompt for item in items] for system in asking}
    told: dict[str, dict[int, Turn]] = {system.name: {} for system in asking}
    fits, refusals, made = [True] * len(items), [""] * len(items), Made(0, 0)
    turns = 1 + max(len(item.then) for item in items) if asking else 0  # files were answered before
    greedy = Greedy({}, {system.name: "a file has none" for system in work.systems if system.is_file})
    for turn in range(turns):
        due = [i for i, item in enumerate(items) if fits[i] and len(item.then) >= turn]
        asked = {name: [items[i]._replace(prompt=talk[i]) for i in due] for name, talk in talks.items()}
        greedy_rows = rows_to_ask_greedily(tasks) if turn == 0 else []
        there, why, found, now = one_turn(run, config, asking, asked, greedy_rows, greedy)
        made = made.plus(now)
        for i, fit, refusal in zip(due, there, why, strict=True):
            fits[i], refusals[i] = fit, refusal
        answered_now = [i for i in due if fits[i]]
        for name, answers in found.items():
            for i, answer in zip(answered_now, answers, strict=True):
                told[name][i] = answer
                if len(items[i].then) > turn:
                    talks[name][i] = continued(talks[name][i], answer.said.text, items[i].then[turn])
    kept, dropped = those_that_fit(tasks, fits, refusals)
    last = {name: [turns[i] for i in range(len(items)) if fits[i]] for name, turns in told.items()}
    before = {name: [talk[i] for i in range(len(items)) if fits[i]] for name, talk in talks.items()}
    all_greedy = {name: [texts.get(i) for i in range(len(items)) if fits[i]] for name, texts in greedy.texts.items()}
    said = all_said(config, work, kept, before, last)
    return Heard(kept, dropped, said, as_tokens(config, asking, last), made, all_greedy, greedy.why_none)


def rows_to_ask_greedily(tasks: Tasks) -> list[int]:
    """Return the numbers of the items whose answers at temperature 0 are compared: one for each distinct prompt of a
    task. Empty if all tasks together have too few."""
    rows: list[int] = []
    prompts: list[str] = []
    for _, items in tasks:
        texts = [prompt_text(item.prompt.messages) for item in items]
        rows += [len(prompts) + row for row in first_of_each_prompt(texts)]
        prompts += texts
    return rows if len(first_of_each_prompt(prompts)) >= MIN_PROMPTS else []


def all_said(
    config: Config, work: Work, tasks: Tasks, talks: Mapping[str, Sequence[Conversation]],
    last: Mapping[str, Sequence[Turn]],
) -> dict[str, Sequence[Said]]:  # fmt: skip
    """Every system's last answers with what was said before them, those of files too.

    Args:
        talks: system → of each item the conversation up to the last answer.
    """
    items = [item for _, items in tasks for item in items]
    said: dict[str, Sequence[Said]] = {
        name: [whole(*each) for each in zip(items, talks[name], turns, strict=True)] for name, turns in last.items()
    }
    hides = config.rollout.reasoning == "hide"
    return said | {name: read_file(answers, tasks, hides) for name, answers in work.files.items()}


def as_tokens(config: Config, systems: Sequence[System], last: Mapping[str, Sequence[Turn]]) -> dict[str, Rollout]:
    """The last answers of the systems that answer here."""
    here = [system for system in systems if system.base is not None]
    pads = {system.name: tokenizer_of(config, system).pad_token_id for system in here}
    return {name: rollout_of(pad, last[name]) for name, pad in pads.items()}


def continued(talk: Conversation, answer: str, question: str) -> Conversation:
    """A conversation that goes on: with the system's own answer, without reasoning that is hidden, and a question."""
    return replace(talk, messages=(*talk.messages, Message("assistant", answer), Message("user", question)))


def one_turn(
    run: Run,
    config: Config,
    systems: Sequence[System],
    asked: Mapping[str, Sequence[Item]],
    greedy_rows: Sequence[int],
    greedy: Greedy,
) -> tuple[Sequence[bool], Sequence[str], dict[str, list[Turn]], Made]:
    """The next answers of all systems.

    Args:
        asked: system → the items with the conversation so far.
        greedy_rows: the numbers of those that are also asked at temperature 0, if they fit.
        greedy: receives the answers to them.

    Returns:
        which items fit every system; what a server said of each that it found too long; system → its answers to those
        that fit; how many were made.
    """
    hides = config.rollout.reasoning == "hide"
    prompts = [prompts_of(config, system, asked[system.name]) for system in systems if system.base is not None]
    fits = [True] * len(next(iter(asked.values()), ()))
    for each in prompts:
        fits = [fit and ids is not None for fit, ids in zip(fits, each.tokens, strict=True)]
    elsewhere, there = answers_elsewhere(config, systems, asked, fits)
    why = [""] * len(fits)
    for each in elsewhere:
        fits = [fit and answer is not None for fit, answer in zip(fits, each.answers, strict=True)]
        why = [refusal or before for refusal, before in zip(each.refusals, why, strict=True)]
    if not any(fits):
        return fits, why, {system.name: [] for system in systems}, there
    speakers = [speaker_of(config, each, asked[each.system.name], fits) for each in prompts]
    rows = [row for row in greedy_rows if fits[row]]
    place = {row: i for i, row in enumerate(row for row, fit in enumerate(fits) if fit)}
    greedy_speakers = [speaker.greedy([place[row] for row in rows]) for speaker in speakers] if rows else []
    answers, here = answers_of(run, config, [*speakers, *greedy_speakers])
    read = [read_answers(*each, hides) for each in zip([*speakers, *greedy_speakers], answers, strict=True)]
    found = {speaker.system.name: turns for speaker, turns in zip(speakers, read, strict=False)}
    for speaker, turns in zip(greedy_speakers, read[len(speakers) :], strict=True):
        texts = [turn.said.text for turn in turns]
        greedy.texts[speaker.system.name] = dict(zip(rows, texts, strict=True))
    found |= {each.system.name: read_elsewhere(each, fits, hides) for each in elsewhere}
    made = there.plus(here)
    for each in elsewhere if rows else ():
        replies = greedy_replies(config, each.system, [each.asked[row] for row in rows])
        made = made.plus(replies.made)
        if replies.texts is None:
            greedy.why_none[each.system.name] = replies.why
        else:
            texts = [parted(text)[1] if hides else text for text in replies.texts]
            greedy.texts[each.system.name] = dict(zip(rows, texts, strict=True))
    return fits, why, found, made


def those_that_fit(tasks: Tasks, fits: Sequence[bool], refusals: Sequence[str]) -> tuple[Tasks, dict[str, int]]:
    """The items whose prompts fit every system, and how many do not, by task.

    Args:
        fits: of every item, one task behind another.
        refusals: what a server said of each that it found too long; else empty.

    Raises:
        InputError: none of a task's fits. It has the last words of a server: what is meant may be something else.
    """
    found, dropped, first = list[tuple[Task, Sequence[Item]]](), dict[str, int](), 0
    for task, items in tasks:
        rows = slice(first, first + len(items))
        those, words = fits[rows], [refusal for refusal in refusals[rows] if refusal]
        first = rows.stop
        kept = [item for item, fit in zip(items, those, strict=True) if fit]
        problem = f"is longer than what a prompt may have, for all {counted(len(items), 'item')} of {task.name}"
        problem += f": {words[-1]}" if words else ""
        require(bool(kept), "data.max_length", task.name, problem, "Raise it, or lower rollout.max_new_tokens.")
        found.append((task, kept))
        dropped[task.name] = len(items) - len(kept)
    return found, dropped


def whole(item: Item, talk: Conversation, last: Turn) -> Said:
    """A system's last answer to an item, with what was said before it."""
    return replace(last.said, before=talk.messages[len(item.prompt.messages) :])


def read_answers(speaker: Speaker, answers: Sequence[Answer], hides: bool) -> list[Turn]:
    """Answers as they are scored: without their reasoning where that is hidden."""
    hidden, read = parted_texts(speaker.prompts, [answer.text for answer in answers], speaker.tokenizer, hides)
    rows = zip(speaker.asked, speaker.prompts, answers, hidden, read, strict=True)
    return [
        Turn(Said(asked.id, text, None, answer.ended, reasoning), prompt, answer)
        for asked, prompt, answer, reasoning, text in rows
    ]


def read_elsewhere(told: Elsewhere, fits: Sequence[bool], hides: bool) -> list[Turn]:
    """The same of a model behind a server."""
    rows = [(q.id, answer) for q, answer, fit in zip(told.asked, told.answers, fits, strict=True) if fit and answer]
    parts = [parted(answer.text) if hides else (None, answer.text) for _, answer in rows]
    return [
        Turn(Said(id, text, None, answer.ended, reasoning))
        for (id, answer), (reasoning, text) in zip(rows, parts, strict=True)
    ]


def read_file(found: Mapping[tuple[str, str], Sequence[str]], tasks: Tasks, hides: bool) -> list[Said]:
    """The same of a file.

    Args:
        found: task and id of an item → its answers, one a turn.
    """
    said = []
    for task, items in tasks:
        for item in items:
            read = [parted(text, False) if hides else (None, text) for text in found[task.name, item.id]]
            talk = item.prompt
            for (_, text), question in zip(read, item.then, strict=False):
                talk = continued(talk, text, question)
            reasoning, text = read[-1]
            said.append(whole(item, talk, Turn(Said("", text, None, None, reasoning))))
    return said


def rollout_of(pad: int, turns: Sequence[Turn]) -> Rollout:
    """Answers as tokens, for scorers that read these, or whether an answer was cut.

    Args:
        pad: the id of the token that fills rows up.
    """
    both = [(turn.prompt, turn.answer) for turn in turns if turn.prompt is not None and turn.answer is not None]
    made = answered([prompt.input_ids for prompt, _ in both], [answer.ids for _, answer in both], pad, "cpu")
    return replace(made, ended_B=made.ended_B.new_tensor([answer.ended for _, answer in both]))
