"""The answers of systems to the prompts of tasks, turn by turn.

The first question of every item is asked, then, behind each system's own answer, the next question of those items that
have one. Systems on one base answer in one load of it, in batches that hold rows of all of them. Every batch is kept as
soon as it is made (`align.rollout.answer_cache`), so that a run that is cut off makes nothing twice. The first rank
keeps them; several ranks share the work. Models behind servers are asked by the first rank alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch

from align import ranks
from align.core.errors import require
from align.core.types import Conversation, Message, Rollout
from align.data.chat.encode import Prompt, prompt_ids, prompt_room, stop_token_ids, surely_too_long
from align.data.chat.reasoning import parted
from align.data.chat.template import use_template
from align.data.ngrams import tokenize_words
from align.evals.collapse import MIN_PROMPTS, first_of_each_prompt, prompt_text
from align.evals.endpoint import Endpoint, Failure, answers_from, lost, messages_of
from align.evals.suite.results import Said
from align.evals.suite.systems import System
from align.evals.suite.tasks import JUDGED, Item, Task, Tasks
from align.models.actors import Actor, AdapterPool, ModelActor
from align.models.forward import rollout_from_answers
from align.models.load import context_length, describe, load_base, name_of, own_tokenizer
from align.report.figure_text import counted
from align.rollout.answer_cache import FILE, Answer, AnswerStore, Asked, Question
from align.rollout.engine import Engine, divergence_as_input_error, greedily, place_seed, response_ids, response_text
from align.rollout.strip_reasoning import parted_texts
from align.run.environment import package_versions
from align.run.weights import tokenizer_digest
from align.track import show_progress

COMPUTES = ("torch", "transformers", "peft", "bitsandbytes")
PROBES = 8
"""Prompts that a server is asked twice, to see whether it honours temperature 0."""
OPENING = 10
"""Words of two answers that have to be the same: later ones may differ by rounding."""

Files = Mapping[str, Mapping[tuple[str, str], Sequence[str]]]
"""System → task and id of an item → its answers in a file, one a turn."""


@dataclass(slots=True)
class Made:
    """How many different records were made before, and now."""

    before: int = 0
    now: int = 0

    def add(self, total: int, before: int) -> None:
        """Count so many records, some of which were made before."""
        self.before += before
        self.now += total - before


@dataclass(frozen=True, slots=True)
class Sampling:
    """How systems are asked, and where their answers are kept.

    Attributes:
        root: the folder of runs, which holds the file of answers.
        seed: of all draws, see `seed_of`.
        dtype_setting: `dtype` as the user gave it, for error messages.
        max_length: the most tokens of a prompt.
        template, template_kwargs: of chats, see `align.data.chat.template.use_template`.
        hides_reasoning: reasoning is hidden from judges and from later turns.
        engine: what samples: its name, the device and the versions of what computes.
        open_engine: loads the engine for the base of a system, with a tokenizer.
        seed_of: the seed of a system's answer to an item. None: the prompt and the number of its draw decide it.
        loaded: the models of the systems that were asked last, by their names, see `load_actors`.
        answers, likelihoods: how many were made, of all systems.
    """

    root: Path
    seed: int
    device: torch.device
    dtype: torch.dtype
    dtype_setting: str
    max_length: int
    template: Any
    template_kwargs: Any
    max_new_tokens: int
    temperature: float
    batch_size: int
    hides_reasoning: bool
    engine: str
    open_engine: Callable[[System, Any], AbstractContextManager[Engine]]
    seed_of: Callable[[System, Item], int] | None = None
    loaded: dict[tuple[str, ...], dict[str, Actor]] = field(default_factory=dict)
    answers: Made = field(default_factory=Made)
    likelihoods: Made = field(default_factory=Made)

    def choose_seed(self, system: System, item: Item) -> int:
        """Return the seed of an answer. Every system draws with the same one, unless `seed_of` says otherwise."""
        if self.seed_of is not None:
            return self.seed_of(system, item)
        return place_seed(self.seed, "suite", repr(item.prompt.as_dicts()), *([item.draw] if item.draw else []))


class TaskAnswers(NamedTuple):
    """The answers of all systems to the items of a task.

    Attributes:
        items: that every system was asked, at every turn.
        said: system → its last answers, the first system before the others.
        rollouts: system → the same as tokens, of those that answer here.
        dropped: items that were too long for some system.
        greedy: system → its first answers at temperature 0, of the systems that give such answers. None for an item
            that was not asked so.
        no_greedy: system → why it gives none.
    """

    task: Task
    items: Sequence[Item]
    said: Mapping[str, Sequence[Said]]
    rollouts: Mapping[str, Rollout]
    dropped: int
    greedy: Mapping[str, Sequence[str | None]]
    no_greedy: Mapping[str, str]

    @property
    def first(self) -> str:
        """The system that is compared with the others."""
        return next(iter(self.said))

    @property
    def is_judged(self) -> bool:
        """Whether a judge scores the answers, and no checks do."""
        return self.items[0].check is None


class Turn(NamedTuple):
    """A system's answer at one turn of an item.

    Attributes:
        asked, answer: as tokens, of a system that answers here.
    """

    said: Said
    asked: Asked | None = None
    answer: Answer | None = None


class Greedy(NamedTuple):
    """The answers of systems at temperature 0.

    Attributes:
        texts: system → number of the item → its answer.
        why_none: system → why it gives none.
    """

    texts: dict[str, dict[int, str]]
    why_none: dict[str, str]


def ask_systems(sampling: Sampling, systems: Sequence[System], tasks: Tasks, files: Files) -> list[TaskAnswers]:
    """Ask every system every item, and return the answers to each task. What was answered before is not asked again.

    Raises:
        InputError: no item of a task fits every system, or a system gives no answers.
    """
    asking = [system for system in systems if not system.is_file]
    items = [item for _, items in tasks for item in items]
    talks = {system.name: [item.prompt for item in items] for system in asking}
    turns: dict[str, dict[int, Turn]] = {system.name: {} for system in asking}
    pads: dict[str, int] = {}
    fits = [True] * len(items)
    refusals = [""] * len(items)
    greedy = Greedy({}, {system.name: "a file has none" for system in systems if system.is_file})
    for number in range(1 + max(len(item.then) for item in items) if asking else 0):
        due = [i for i, item in enumerate(items) if fits[i] and len(item.then) >= number]
        requests = [
            build_requests(sampling, system, [items[i]._replace(prompt=talks[system.name][i]) for i in due])
            for system in asking
        ]
        pads |= {each.system.name: each.tokenizer.pad_token_id for each in requests if each.tokenizer is not None}
        greedy_rows = rows_to_ask_greedily(tasks) if number == 0 else []
        due_fits, due_refusals, answers = ask_turn(sampling, requests, greedy_rows, greedy)
        for i, fit, refusal in zip(due, due_fits, due_refusals, strict=True):
            fits[i] = fit
            refusals[i] = refusal
        answered_now = [i for i in due if fits[i]]
        for name, each in answers.items():
            for i, turn in zip(answered_now, each, strict=True):
                turns[name][i] = turn
                if len(items[i].then) > number:
                    talks[name][i] = continue_talk(talks[name][i], turn.said.text, items[i].then[number])
    kept, dropped = drop_unfit(tasks, fits, refusals)
    fitting = [i for i in range(len(items)) if fits[i]]
    said: dict[str, Sequence[Said]] = {
        name: [with_earlier_turns(items[i], talks[name][i], each[i].said) for i in fitting]
        for name, each in turns.items()
    }
    said |= {name: read_file(answers, kept, sampling.hides_reasoning) for name, answers in files.items()}
    rollouts = {name: build_rollout(pad, [turns[name][i] for i in fitting]) for name, pad in pads.items()}
    greedy_texts = {name: [texts.get(i) for i in fitting] for name, texts in greedy.texts.items()}
    by_task: list[TaskAnswers] = []
    first = 0
    for task, items in kept:
        rows = slice(first, first + len(items))
        first += len(items)
        by_task.append(
            TaskAnswers(
                task,
                items,
                {system.name: said[system.name][rows] for system in systems},
                {name: select_rows(rollout, rows) for name, rollout in rollouts.items()},
                dropped[task.name],
                {name: texts[rows] for name, texts in greedy_texts.items()},
                greedy.why_none,
            )
        )
    return by_task


def select_rows(rollout: Rollout, rows: slice) -> Rollout:
    tokens, mask, ended = (x[rows] for x in (rollout.tokens_BS, rollout.mask_BS, rollout.ended_B))
    return Rollout(tokens, mask, rollout.prompt_width, ended)


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


def build_requests(sampling: Sampling, system: System, items: Sequence[Item]) -> Wanted:
    """Return the requests to a system, with all that decides each answer."""
    if system.endpoint is not None:
        return Wanted(system, None, [build_question(sampling, system, item) for item in items], items)
    assert system.base is not None
    tokenizer = load_tokenizer(sampling, system)
    model = describe(system.base)
    room = prompt_room(context_length(model), sampling.max_length, sampling.max_new_tokens)
    stop_ids = stop_token_ids(tokenizer, model.generation_config)
    identity = identify_system(sampling, system)
    keys: list[Asked | None] = []
    for item in items:
        ids = None if surely_too_long(tokenizer, item.prompt, room) else prompt_ids(tokenizer, item.prompt)
        if ids is None or len(ids) > room:
            keys.append(None)
            continue
        asked = Asked(
            **identity,
            prompt=tuple(ids),
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            stop_ids=stop_ids,
            seed=sampling.choose_seed(system, item),
            engine=sampling.engine,
        )
        keys.append(asked)
    return Wanted(system, tokenizer, keys, items)


def build_question(sampling: Sampling, system: System, item: Item) -> Question:
    """Return the request to a server. Servers take 31 bits of a seed."""
    assert system.endpoint is not None
    return system.endpoint.question(
        messages_of(item.prompt),
        item.draw,
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        seed=sampling.choose_seed(system, item) % 2**31,
    )


def load_tokenizer(sampling: Sampling, system: System) -> Any:
    """Load the tokenizer of a system, with the chat template that it is asked with."""
    owner = system.tokenized_as or system
    assert owner.artifact is not None
    assert owner.base is not None
    tokenizer = own_tokenizer(owner.artifact, owner.base)
    use_template(tokenizer, sampling.template, sampling.template_kwargs)
    return tokenizer


def identify_system(sampling: Sampling, system: System) -> dict[str, Any]:
    """Return the fields of `Asked` that say who answers."""
    owner = system.tokenized_as or system
    assert system.base is not None
    assert system.artifact is not None
    assert owner.artifact is not None
    assert owner.base is not None
    return {
        "base": system.base.digest,
        "adapter": "" if system.artifact.whole else system.artifact.digest,
        "method": system.method,
        "dtype": name_of(sampling.dtype),
        "tokenizer": tokenizer_digest(owner.artifact.path) or tokenizer_digest(Path(owner.base.path)),
    }


def list_computing_versions(device: torch.device) -> list[str]:
    """Return what numbers depend on beside weights and tokens: the device, and the versions of what computes."""
    versions = package_versions()
    return [device.type, *(f"{name} {versions[name]}" for name in COMPUTES if name in versions)]


def ask_turn(
    sampling: Sampling, requests: Sequence[Wanted], greedy_rows: Sequence[int], greedy: Greedy
) -> tuple[Sequence[bool], Sequence[str], dict[str, list[Turn]]]:
    """Ask all systems for their next answers.

    Args:
        greedy_rows: the numbers of the items that are also asked at temperature 0, if they fit.
        greedy: receives the answers to them.

    Returns:
        which items fit every system; what a server said of each that it found too long; system → its answers to those
        that fit.
    """
    here = [each for each in requests if each.system.endpoint is None]
    servers = [each for each in requests if each.system.endpoint is not None]
    fits = [all(asked is not None for asked in row) for row in zip(*(each.keys for each in requests), strict=True)]
    refusals = [""] * len(fits)
    replies: dict[str, list[Answer | Failure | None]] = {}
    for each in servers:  # whose templates and limits are their own: only they can say that a prompt is too long
        assert each.system.endpoint is not None
        questions = [question for question, fit in zip(each.keys, fits, strict=True) if fit]
        of_server = ask_endpoint(sampling, each.system.endpoint, questions, each.system.field, ("too long",))
        replies[each.system.name] = [of_server.get(question.id) for question in each.keys]
    for name, of_server in replies.items():
        fits = [fit and isinstance(reply, Answer) for fit, reply in zip(fits, of_server, strict=True)]
        refusals = [
            f"{name} {reply.said}" if isinstance(reply, Failure) else before
            for reply, before in zip(of_server, refusals, strict=True)
        ]
    if not any(fits):
        return fits, refusals, {each.system.name: [] for each in requests}
    rows = [row for row, fit in enumerate(fits) if fit]
    greedy_rows = [row for row in greedy_rows if fits[row]]
    wanted = []
    for each in here:
        keys = [each.keys[row] for row in rows]
        keys += [replace(each.keys[row], temperature=0.0, seed=0) for row in greedy_rows]
        wanted.append(Wanted(each.system, each.tokenizer, keys))
    store = AnswerStore(sampling.root / FILE)
    answers = complete(store, wanted, "answers", sampling.answers, partial(generate, sampling))
    turns: dict[str, list[Turn]] = {}
    for each, of_system, values in zip(here, wanted, answers, strict=True):
        asked_items = [each.items[row] for row in (*rows, *greedy_rows)]
        prompts = [
            Prompt(item.prompt, [*asked.prompt]) for item, asked in zip(asked_items, of_system.keys, strict=True)
        ]
        texts = [answer.text for answer in values]
        hidden, read = parted_texts(prompts, texts, each.tokenizer, sampling.hides_reasoning)
        turns[each.system.name] = [
            Turn(Said(asked.id, text, None, answer.ended, reasoning), asked, answer)
            for asked, answer, reasoning, text in zip(of_system.keys, values, hidden, read, strict=True)
        ][: len(rows)]
        if greedy_rows:
            greedy.texts[each.system.name] = dict(zip(greedy_rows, read[len(rows) :], strict=True))
    for each in servers:
        name = each.system.name
        turns[name] = []
        for question, reply, fit in zip(each.keys, replies[name], fits, strict=True):
            if fit and isinstance(reply, Answer):
                reasoning, text = parted(reply.text) if sampling.hides_reasoning else (None, reply.text)
                turns[name].append(Turn(Said(question.id, text, None, reply.ended, reasoning)))
        if greedy_rows:
            texts, why = ask_server_greedily(sampling, each.system, [each.keys[row] for row in greedy_rows])
            if texts is None:
                greedy.why_none[name] = why
            else:
                read = [parted(text)[1] if sampling.hides_reasoning else text for text in texts]
                greedy.texts[name] = dict(zip(greedy_rows, read, strict=True))
    return fits, refusals, turns


# Systems that answer here


class Wanted(NamedTuple):
    """Records that are wanted of a system, such as answers.

    Attributes:
        tokenizer: None of a model behind a server.
        keys: of each record all that decides it, such as an `Asked`, or a `Question` to a server. None for a prompt
            that is too long for the system.
        items: that the records are of, if they are answers.
    """

    system: System
    tokenizer: Any
    keys: Sequence[Any]
    items: Sequence[Item] = ()

    @property
    def group(self) -> tuple[Any, ...]:
        """What systems share that answer in one load: the base, and the tokens that end an answer."""
        assert self.system.base is not None
        return self.system.base.digest, self.system.method, getattr(self.keys[0], "stop_ids", ())


Keep = Callable[[Sequence[tuple[Any, Any]]], None]
"""Keeps records with their keys as soon as they are made."""


def complete(
    store: AnswerStore, wanted: Sequence[Wanted], what: str, made: Made, make: Callable[[Sequence[Wanted], Keep], None]
) -> list[list[Any]]:
    """Look up records, make and keep those that are missing, and return those of each system in the order of its keys.

    Args:
        what: the records are called, for the progress bar.
        made: counts them.
        make: makes the missing records of systems on one base, each once.
    """
    ids = {key.id for each in wanted for key in each.keys}
    if not ids:
        return [[] for _ in wanted]
    known: dict[str, Any] = ranks.broadcast(store.found(ids) if ranks.is_main() else {})
    before = len(known)
    made.add(len(ids), before)
    groups: dict[tuple[Any, ...], list[Wanted]] = {}
    for each in wanted:
        if each.keys:
            groups.setdefault(each.group, []).append(each)
    with show_progress(what, len(ids), before) as bar:

        def keep(records: Sequence[tuple[Any, Any]]) -> None:
            if ranks.is_main():
                store.add(records)
            known.update((key.id, record) for key, record in records)
            bar.advance(len(known))

        for group in groups.values():
            missing = [
                each._replace(keys=[*{key.id: key for key in each.keys if key.id not in known}.values()])
                for each in group
            ]
            if any(each.keys for each in missing):
                make(missing, keep)
    return [[known[key.id] for key in each.keys] for each in wanted]


def generate(sampling: Sampling, group: Sequence[Wanted], keep: Keep) -> None:
    """Sample the missing answers of systems on one base. Rows of one prompt stand together.

    Raises:
        InputError: a system has no distribution to draw from.
    """
    actors = load_actors(sampling, [each.system for each in group])
    rows = [
        (each, asked)
        for at_once in zip_longest(*(each.keys for each in group))
        for each, asked in zip(group, at_once, strict=True)
        if asked is not None
    ]
    sampled = [row for row in rows if row[1].temperature]
    greedy = [row for row in rows if not row[1].temperature]
    size = sampling.batch_size * len(group)
    batches = [part[first : first + size] for part in (sampled, greedy) for first in range(0, len(part), size)]
    with sampling.open_engine(group[0].system, group[0].tokenizer) as engine:
        for actor in actors.values():
            engine.sync(actor)
        for batch in batches:
            names = ", ".join(dict.fromkeys(each.system.field for each, _ in batch))
            with divergence_as_input_error(names, None, sampling.dtype_setting):
                prompts = [[*asked.prompt] for _, asked in batch]
                seeds = [asked.seed for _, asked in batch]
                with nullcontext() if batch[0][1].temperature else greedily(engine):
                    rollout = engine.generate(prompts, [actors[each.system.name] for each, _ in batch], seeds)
            answers = zip(batch, response_ids(rollout), rollout.ended_B.tolist(), strict=True)
            keep(
                [
                    (asked, Answer(tuple(ids), response_text(each.tokenizer, ids, ended), ended))
                    for (each, asked), ids, ended in answers
                ]
            )


def load_actors(sampling: Sampling, systems: Sequence[System]) -> dict[str, Actor]:
    """Return the actor of each of some systems on one base. Those that were loaded last are kept until others are asked
    for."""
    names = tuple(system.name for system in systems)
    if names in sampling.loaded:
        return sampling.loaded[names]
    sampling.loaded.clear()
    first = systems[0]
    assert first.base is not None
    model = load_base(first.base, first.method, sampling.device, sampling.dtype)
    folders = {s.name: s.artifact.path for s in systems if s.artifact is not None and not s.artifact.whole}
    if folders:
        pool = AdapterPool(model, alone=len(systems) == 1)
        digests = {name: pool.add(folder) for name, folder in folders.items()}
        actors: dict[str, Actor] = {name: pool.actor(digests.get(name)) for name in names}
    else:
        actors = {name: ModelActor(model) for name in names}
    sampling.loaded[names] = actors
    return actors


# Models behind servers


def ask_endpoint(
    sampling: Sampling, endpoint: Endpoint, questions: Sequence[Question], label: str, accepted: Sequence[str]
) -> Mapping[str, Answer | Failure]:
    """Return a server's replies by the id of the question.

    Args:
        label: of the progress bar.
        accepted: the kinds of failures that are replies.

    Raises:
        InputError: the server does not answer, or a question fails in another way.
    """

    def watch(reply: Answer | Failure) -> None:
        if isinstance(reply, Failure) and reply.kind not in accepted:
            raise lost(endpoint, reply)

    replies: Mapping[str, Answer | Failure] = {}
    before = 0
    if ranks.is_main():
        replies, before = answers_from(endpoint, questions, AnswerStore(sampling.root / FILE), label, watch)
    replies, before = ranks.broadcast((replies, before))
    sampling.answers.add(sum(isinstance(reply, Answer) for reply in replies.values()), before)
    return replies


def ask_server_greedily(
    sampling: Sampling, system: System, questions: Sequence[Question]
) -> tuple[list[str] | None, str]:
    """Ask a server at temperature 0. The first few questions are asked twice, with different seeds: a server whose
    answers differ does not honour the temperature.

    Returns:
        the texts, None if it gives no such answers, and the reason then.

    Raises:
        InputError: the server cannot be reached, or its answers cannot be read.
    """
    endpoint = system.endpoint
    assert endpoint is not None
    ask = partial(
        ask_endpoint, sampling, endpoint, label=f"{endpoint.field}, temperature 0", accepted=("too long", "refused")
    )
    if any(question.body.get("temperature") != sampling.temperature for question in questions):
        return None, f"{endpoint.field}.extra_body sets the temperature"
    greedy = [with_settings(question, temperature=0.0, seed=0) for question in questions]
    probes = greedy[:PROBES]
    again = [replace(with_settings(question, seed=1), draw=1) for question in probes]
    replies = ask(questions=[*probes, *again])
    refusal = next((reply.said for reply in replies.values() if isinstance(reply, Failure)), None)
    if refusal is not None:
        return None, f"its server {refusal}"
    openings = {id: tokenize_words(reply.text)[:OPENING] for id, reply in replies.items() if isinstance(reply, Answer)}
    differing = sum(openings[one.id] != openings[other.id] for one, other in zip(probes, again, strict=True))
    if 2 * differing >= len(probes):
        return None, "its server answers differently each time"
    replies = {**replies, **ask(questions=[question for question in greedy if question.id not in replies])}
    texts = [reply.text for question in greedy if isinstance(reply := replies[question.id], Answer)]
    if len(texts) < len(greedy):
        return None, "its server refuses some prompts at this temperature"
    return texts, ""


def with_settings(question: Question, **settings: Any) -> Question:
    """Return the question with other values for those settings that it has."""
    return replace(question, body={**question.body, **{k: v for k, v in settings.items() if k in question.body}})


# What the answers are


def continue_talk(talk: Conversation, answer: str, question: str) -> Conversation:
    """Return a conversation with the system's own answer, without reasoning that is hidden, and the next question."""
    return replace(talk, messages=(*talk.messages, Message("assistant", answer), Message("user", question)))


def with_earlier_turns(item: Item, talk: Conversation, said: Said) -> Said:
    """Return a system's last answer to an item with what was said before it."""
    return replace(said, before=talk.messages[len(item.prompt.messages) :])


def drop_unfit(tasks: Tasks, fits: Sequence[bool], refusals: Sequence[str]) -> tuple[Tasks, dict[str, int]]:
    """Return the items whose prompts fit every system, and how many do not, by task.

    Args:
        fits: of every item, one task behind another.
        refusals: what a server said of each that it found too long; else empty.

    Raises:
        InputError: no item of a task fits. It has the last words of a server: what is meant may be something else.
    """
    kept: list[tuple[Task, Sequence[Item]]] = []
    dropped: dict[str, int] = {}
    first = 0
    for task, items in tasks:
        rows = range(first, first + len(items))
        first += len(items)
        fitting = [item for item, row in zip(items, rows, strict=True) if fits[row]]
        said = [f": {refusals[row]}" for row in rows if refusals[row]]
        problem = f"is longer than what a prompt may have, for all {counted(len(items), 'item')}"
        problem += f" of {task.name}" if task.name != JUDGED else ""
        problem += said[-1] if said else ""
        value = task.name if task.name != JUDGED else "the longest prompt"
        require(bool(fitting), "data.max_length", value, problem, "Raise it, or lower rollout.max_new_tokens.")
        kept.append((task, fitting))
        dropped[task.name] = len(items) - len(fitting)
    return kept, dropped


def read_file(answers: Mapping[tuple[str, str], Sequence[str]], tasks: Tasks, hides: bool) -> list[Said]:
    """Return the answers of a file to all items.

    Args:
        answers: task and id of an item → its answers, one a turn.
    """
    said = []
    for task, items in tasks:
        for item in items:
            read = [parted(text, False) if hides else (None, text) for text in answers[task.name, item.id]]
            talk = item.prompt
            for (_, text), question in zip(read, item.then, strict=False):
                talk = continue_talk(talk, text, question)
            reasoning, text = read[-1]
            said.append(with_earlier_turns(item, talk, Said("", text, None, None, reasoning)))
    return said


def build_rollout(pad: int, turns: Sequence[Turn]) -> Rollout:
    """Return answers as tokens, for scorers that read these, or whether an answer was cut.

    Args:
        pad: the id of the token that fills rows up.
    """
    prompts = [turn.asked.prompt for turn in turns if turn.asked is not None]
    answers = [turn.answer for turn in turns if turn.answer is not None]
    rollout = rollout_from_answers(prompts, [answer.ids for answer in answers], pad, "cpu")
    return replace(rollout, ended_B=rollout.ended_B.new_tensor([answer.ended for answer in answers]))
