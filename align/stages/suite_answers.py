"""The answers of several systems to the same prompts: those that were made before, and the others.

Systems on one base answer in one load, in batches that hold rows of all of them. Every chunk is kept as soon as it is
made (`align.rollout.kept`), so that a run that is cut off makes nothing twice. The first rank keeps them; several ranks
share the work of making them. Models behind somebody's server are asked by the first rank alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from align import ranks
from align.config.root import Config
from align.data.chat.encode import Prompt, prompt_ids, prompt_room, stop_token_ids, surely_too_long
from align.data.chat.template import use_template
from align.data.ngrams import words
from align.evals.endpoint import Endpoint, Failure, answers_from, lost, messages_of
from align.evals.systems import System
from align.evals.tasks import Item
from align.models.actor import Actor, ModelActor
from align.models.adapter_pool import AdapterPool
from align.models.load import choose_device, choose_dtype, context_length, describe, load_base, name_of, own_tokenizer
from align.rollout.engine import divergence_as_input_error, greedily, response_ids, response_text
from align.rollout.engine_process import VLLM, engine_version
from align.rollout.kept import FILE, Answer, AnswerStore, Asked, Question
from align.rollout.randomness import place_seed
from align.run import Run
from align.run.environment import package_versions
from align.run.weights import tokenizer_digest
from align.stages.rollouts import engine_for
from align.track import progress
from align.types import Conversation

COMPUTES = ("torch", "transformers", "peft", "bitsandbytes")
PROBES = 8
"""Prompts that a server is asked twice, to see whether it honours temperature 0."""
OPENING = 10
"""Words of two answers that have to be the same: later ones may differ by rounding."""


def answer_store(config: Config) -> AnswerStore:
    """The answers that are kept among the runs, those of judges too."""
    return AnswerStore(config.run.folder / FILE)


class Speaker(NamedTuple):
    """A system that answers here, and what it is asked.

    Attributes:
        prompts: of the items that fit.
        asked: the same with all that decides the answer.
    """

    system: System
    tokenizer: Any
    prompts: Sequence[Prompt]
    asked: Sequence[Asked]

    def greedy(self, rows: Sequence[int]) -> Speaker:
        """Return the same system, asked some of its prompts at temperature 0."""
        asked = [replace(self.asked[row], temperature=0.0, seed=0) for row in rows]
        return self._replace(prompts=[self.prompts[row] for row in rows], asked=asked)


class Elsewhere(NamedTuple):
    """What a model behind somebody's server was asked, and said.

    Attributes:
        asked, answers: of every item; an answer is None where nobody asked, or where the server found the prompt too
            long.
        refusals: what the server said of each prompt that was too long for it; else empty.
    """

    system: System
    asked: Sequence[Question]
    answers: Sequence[Answer | None]
    refusals: Sequence[str]


class Prompts(NamedTuple):
    """What a system would be asked.

    Attributes:
        tokens: of every item's prompt; None of one that is too long for the system.
    """

    system: System
    tokenizer: Any
    tokens: Sequence[list[int] | None]


def prompts_of(config: Config, system: System, items: Sequence[Item]) -> Prompts:
    assert system.base is not None
    tokenizer = tokenizer_of(config, system)
    context = context_length(describe(system.base))
    room = prompt_room(context, config.data.max_length, config.rollout.max_new_tokens)
    tokens = [tokens_that_fit(tokenizer, item.prompt, room) for item in items]
    return Prompts(system, tokenizer, tokens)


def speaker_of(config: Config, prompts: Prompts, items: Sequence[Item], fits: Sequence[bool]) -> Speaker:
    """
    Args:
        fits: which of the items fit every system: the others are not asked.
    """
    system, tokenizer, tokens = prompts
    rows = [(item, ids or []) for item, ids, fit in zip(items, tokens, fits, strict=True) if fit]
    asked, draws = [Prompt(item.prompt, ids) for item, ids in rows], [item.draw for item, _ in rows]
    return Speaker(system, tokenizer, asked, asked_of(config, system, tokenizer, asked, draws))


def tokenizer_of(config: Config, system: System) -> Any:
    assert system.artifact is not None
    assert system.base is not None
    tokenizer = own_tokenizer(system.artifact, system.base)
    use_template(tokenizer, config.data.template, config.data.template_kwargs)
    return tokenizer


def tokens_that_fit(tokenizer: Any, prompt: Conversation, room: int) -> list[int] | None:
    """A prompt's tokens; None of one that is longer than its room."""
    if surely_too_long(tokenizer, prompt, room):
        return None
    ids = prompt_ids(tokenizer, prompt)
    return ids if len(ids) <= room else None


def asked_of(
    config: Config, system: System, tokenizer: Any, prompts: Sequence[Prompt], draws: Sequence[int]
) -> list[Asked]:
    """All that decides each answer.

    Args:
        draws: which answer to its prompt each one is, from 0.
    """
    rollout, who = config.rollout, speaks(config, system)
    drawn_by = [rollout.engine, *computed_by(choose_device(config.device))]
    if rollout.engine == "vllm":  # of servers that run already nobody says the version; they are who they are
        servers = rollout.urls or [engine_version(VLLM, rollout.python, "rollout.python")]
        drawn_by += [*servers, rollout.dtype, *rollout.words]
    assert system.base is not None
    stops = stop_token_ids(tokenizer, describe(system.base).generation_config)
    return [
        Asked(
            **who, prompt=tuple(prompt.input_ids), max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature, stop_ids=stops, seed=seed_of(config.seed, prompt.conversation, draw),
            engine=" ".join(drawn_by),
        )
        for prompt, draw in zip(prompts, draws, strict=True)
    ]  # fmt: skip


def speaks(config: Config, system: System) -> dict[str, Any]:
    """Who answers: those of `Asked` that are the system's."""
    base, artifact = system.base, system.artifact
    assert base is not None
    assert artifact is not None
    return {
        "base": base.digest, "adapter": "" if artifact.whole else artifact.digest, "method": system.method,
        "dtype": name_of(choose_dtype(config.dtype, choose_device(config.device))),
        "tokenizer": tokenizer_digest(artifact.path) or tokenizer_digest(Path(base.path)),
    }  # fmt: skip


def computed_by(device: torch.device) -> list[str]:
    """What numbers depend on beside weights and tokens: the device, and the versions of what computes."""
    versions = package_versions()
    return [device.type, *(f"{name} {versions[name]}" for name in COMPUTES if name in versions)]


class Made(NamedTuple):
    """How many different answers were made before, and now."""

    before: int
    now: int

    def plus(self, other: Made) -> Made:
        return Made(self.before + other.before, self.now + other.now)


def answers_of(run: Run, config: Config, speakers: Sequence[Speaker]) -> tuple[list[list[Answer]], Made]:
    """Every speaker's answers, in the order of its prompts. Those on one base answer in one load of it.

    Raises:
        InputError: a system has no distribution to draw from.
    """
    store = answer_store(config)
    every = {asked.id for speaker in speakers for asked in speaker.asked}
    known = ranks.from_main(store.found(every) if ranks.is_main() else {})
    before = len(known)
    groups: dict[Any, list[Speaker]] = {}
    for speaker in speakers:
        asked = speaker.asked[0]
        groups.setdefault((asked.base, asked.method, asked.stop_ids), []).append(speaker)
    with progress("answers", len(every), before) as bar:
        for group in groups.values():
            turns = range(max(len(speaker.asked) for speaker in group))
            rows = [(speaker, i) for i in turns for speaker in group if i < len(speaker.asked)]
            missing = {s.asked[i].id: (s, i) for s, i in rows if s.asked[i].id not in known}
            if missing:
                made_by(run, config, group, [*missing.values()], store, known, bar)
    return [[known[asked.id] for asked in s.asked] for s in speakers], Made(before, len(every) - before)


def answers_elsewhere(
    config: Config, systems: Sequence[System], items: Mapping[str, Sequence[Item]], fits: Sequence[bool]
) -> tuple[list[Elsewhere], Made]:
    """The answers of models behind servers. The server's template is its own, and so is its limit: only it can say that
    a prompt is too long, which is asked again by every run.

    Args:
        items: system → what it is asked.
        fits: which of these other systems can be asked; the rest is not asked here.

    Raises:
        InputError: a server does not answer, or refuses for another reason.
    """
    store = answer_store(config)
    found, before, now = list[Elsewhere](), 0, 0
    for system in systems:
        if system.endpoint is None:
            continue
        asked = [question_of(config, system.endpoint, item) for item in items[system.name]]
        there = [question for question, fit in zip(asked, fits, strict=True) if fit]
        said, kept = ranks.from_main(
            answers_from(system.endpoint, there, store, system.field, must_answer(system.endpoint))
            if ranks.is_main()
            else ({}, 0)
        )
        told = [said.get(question.id) for question in asked]
        answers = [one if isinstance(one, Answer) else None for one in told]
        refusals = [f"{system.name} {one.said}" if isinstance(one, Failure) else "" for one in told]
        found.append(Elsewhere(system, asked, answers, refusals))
        made = sum(isinstance(one, Answer) for one in said.values())
        before, now = before + kept, now + made - kept
    return found, Made(before, now)


class GreedyReplies(NamedTuple):
    """The answers of a server at temperature 0.

    Attributes:
        texts: None if it gives no such answers.
        why: the reason then.
    """

    texts: Sequence[str] | None
    why: str
    made: Made


def greedy_replies(config: Config, system: System, questions: Sequence[Question]) -> GreedyReplies:
    """Ask a server at temperature 0. The first few questions are asked twice, with different seeds: a server whose
    answers differ does not honour the temperature.

    Raises:
        InputError: the server cannot be reached, or its answers cannot be read.
    """
    endpoint = system.endpoint
    assert endpoint is not None
    if any(question.body.get("temperature") != config.rollout.temperature for question in questions):
        return GreedyReplies(None, f"{endpoint.field}.extra_body sets the temperature", Made(0, 0))
    greedy = [with_settings(question, temperature=0.0, seed=0) for question in questions]
    again = [replace(with_settings(question, seed=1), draw=1) for question in greedy[:PROBES]]
    replies, before = ask_greedily(config, endpoint, [*greedy[:PROBES], *again])
    made = Made(before, len(replies) - before)
    texts = [reply.text if isinstance(reply, Answer) else None for reply in replies]
    if None in texts:
        refusal = next(reply.said for reply in replies if isinstance(reply, Failure))
        return GreedyReplies(None, f"its server {refusal}", made)
    openings = [words(text or "")[:OPENING] for text in texts]
    pairs = [*zip(openings[: len(again)], openings[len(again) :], strict=True)]
    if 2 * sum(first != second for first, second in pairs) >= len(pairs):
        return GreedyReplies(None, "its server answers differently each time", made)
    replies, before = ask_greedily(config, endpoint, greedy)
    texts = [reply.text for reply in replies if isinstance(reply, Answer)]
    made = Made(made.before, made.now + len(replies) - before)
    if len(texts) < len(greedy):
        return GreedyReplies(None, "its server refuses some prompts at this temperature", made)
    return GreedyReplies(texts, "", made)


def with_settings(question: Question, **settings: Any) -> Question:
    """Return the question with other values for those settings that it has."""
    return replace(question, body={**question.body, **{k: v for k, v in settings.items() if k in question.body}})


def ask_greedily(
    config: Config, endpoint: Endpoint, questions: Sequence[Question]
) -> tuple[list[Answer | Failure], int]:
    """Return the replies to questions, and how many were there before. A refusal is a reply."""

    def watch(reply: Answer | Failure) -> None:
        if isinstance(reply, Failure) and reply.kind not in ("too long", "refused"):
            raise lost(endpoint, reply)

    replies, before = ranks.from_main(
        answers_from(endpoint, questions, answer_store(config), f"{endpoint.field}, temperature 0", watch)
        if ranks.is_main()
        else ({}, 0)
    )
    return [replies[question.id] for question in questions], before


def question_of(config: Config, endpoint: Endpoint, item: Item) -> Question:
    """A prompt with the settings of sampling. Servers take 31 bits of its seed."""
    rollout, seed = config.rollout, seed_of(config.seed, item.prompt, item.draw) % 2**31
    drawn = {"max_tokens": rollout.max_new_tokens, "temperature": rollout.temperature, "seed": seed}
    return endpoint.question(messages_of(item.prompt), item.draw, **drawn)


def seed_of(seed: int, prompt: Conversation, draw: int) -> int:
    """The seed is the prompt's, and another for each further answer to it: every system draws with the same one."""
    return place_seed(seed, "suite", repr(prompt.as_dicts()), *([draw] if draw else []))


def must_answer(endpoint: Endpoint) -> Callable[[Answer | Failure], None]:
    """What ends the asking where a system gives no answer, for any reason but a prompt that is too long for it."""

    def watch(found: Answer | Failure) -> None:
        if isinstance(found, Failure) and found.kind != "too long":
            raise lost(endpoint, found)

    return watch


def made_by(
    run: Run, config: Config, group: Sequence[Speaker], missing: Sequence[tuple[Speaker, int]], store: AnswerStore,
    known: dict[str, Answer], bar: Any,
) -> None:  # fmt: skip
    """Make the answers that are missing, in one load of their base.

    Args:
        group: speakers on one base, whose answers end with the same tokens.
        missing: who answers, and the number of the prompt; rows of one prompt stand together.
        store, known: where they are kept, and known by their id.
    """
    system = group[0].system
    assert system.base is not None
    base, dtype = system.base, choose_dtype(config.dtype, choose_device(config.device))
    generation = describe(base).generation_config
    systems = {speaker.system.name: speaker.system for speaker in group}
    actors = actors_of(config, [*systems.values()], dtype)
    at_once = config.rollout.batch_size * len(systems)
    sampled = [(speaker, i) for speaker, i in missing if speaker.asked[i].temperature]
    greedy = [(speaker, i) for speaker, i in missing if not speaker.asked[i].temperature]
    batches = [rows[first : first + at_once] for rows in (sampled, greedy) for first in range(0, len(rows), at_once)]
    with engine_for(run, config, base, system.method, dtype, group[0].tokenizer, generation) as engine:
        for actor in actors.values():
            engine.sync(actor)
        for part in batches:
            speaker, first = part[0]
            temperature = speaker.asked[first].temperature
            names = ", ".join(dict.fromkeys(s.system.field for s, _ in part))
            with divergence_as_input_error(names, None, config.dtype):
                rows, seeds = [s.prompts[i].input_ids for s, i in part], [s.asked[i].seed for s, i in part]
                with nullcontext() if temperature else greedily(engine):
                    rollout = engine.generate(rows, [actors[s.system.name] for s, _ in part], seeds)
            told = zip(part, response_ids(rollout), rollout.ended_B.tolist(), strict=True)
            made = [
                (s.asked[i], Answer(tuple(ids), response_text(s.tokenizer, ids, ended), ended))
                for (s, i), ids, ended in told
            ]
            if ranks.is_main():
                store.add(made)
            known |= {asked.id: answer for asked, answer in made}
            bar.advance(len(known))


def actors_of(config: Config, group: Sequence[System], dtype: torch.dtype) -> dict[str, Actor]:
    """Who speaks for each system of a base, by its name."""
    first = group[0]
    assert first.base is not None
    model = load_base(first.base, first.method, choose_device(config.device), dtype)
    folders = {s.name: s.artifact.path for s in group if s.artifact is not None and not s.artifact.whole}
    if not folders:
        return {s.name: ModelActor(model) for s in group}
    pool = AdapterPool(model, alone=len(group) == 1)
    digests = {name: pool.add(folder) for name, folder in folders.items()}
    return {s.name: pool.actor(digests.get(s.name)) for s in group}
