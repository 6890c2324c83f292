"""The answers of the evaluated models to the prompts of tasks, turn by turn.

All systems get the first question of every item, then the next question of items that have one, after each system's own
answer. Systems on one base share its load and its batches. Every batch is stored as soon as it is sampled
(`align.rollout.answer_cache`), so that a resumed run samples nothing twice. The first rank stores answers and asks
models behind servers; sampling is shared by all ranks.
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
from align.data.chat.encode import (
    Prompt,
    compute_max_prompt_tokens,
    encode_prompt,
    find_stop_token_ids,
    is_surely_too_long,
)
from align.data.chat.reasoning import split_reasoning
from align.data.chat.template import set_chat_template
from align.data.ngrams import tokenize_words
from align.evals.collapse import MIN_PROMPTS, find_distinct_prompts, get_prompt_text
from align.evals.endpoint import Endpoint, EndpointFailure, build_endpoint_error, fetch_answers, to_openai_messages
from align.evals.suite.results import EvaluatedAnswer
from align.evals.suite.systems import System
from align.evals.suite.tasks import DEFAULT_TASK, EvalItem, EvalTask, RemainingTasks, Tasks
from align.models.actors import Actor, AdapterPool, ModelActor
from align.models.forward import rollout_from_answers
from align.models.load import get_context_length, get_dtype_name, load_base, load_own_tokenizer, read_configurations
from align.report.figure_text import pluralize
from align.rollout.answer_cache import FILE, AnswerKey, AnswerStore, CachedAnswer, ServerAnswerKey
from align.rollout.engine import (
    Engine,
    convert_divergence_errors,
    decode_response,
    derive_place_seed,
    extract_response_ids,
    use_greedy_decoding,
)
from align.rollout.strip_reasoning import split_reasoning_batch
from align.run.environment import package_versions
from align.run.weights import tokenizer_digest
from align.track import show_progress

NUMERICAL_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
REPEATED_PROMPTS = 8
"""Number of prompts that a server gets twice, to check that it honours temperature 0."""
COMPARED_WORDS = 10
"""Number of first words in which two greedy answers have to be equal. Later words may differ by rounding."""

Files = Mapping[str, Mapping[tuple[str, str], Sequence[str]]]
"""Model name → (task, item id) → the model's answers in a file, one per turn."""


@dataclass(slots=True)
class RecordCounts:
    """Number of distinct records that the cache had before this run, and that this run added."""

    before: int = 0
    now: int = 0

    def add(self, total: int, before: int) -> None:
        """Count `total` records, of which `before` were in the cache."""
        self.before += before
        self.now += total - before


@dataclass(frozen=True, slots=True)
class Sampling:
    """The sampling settings of an evaluation, with the models that are loaded.

    Attributes:
        root: the folder of runs, which holds the file of answers.
        seed: base of the seeds of all answers, see `choose_seed`.
        dtype_setting: `dtype` as set by the user, for error messages.
        max_length: maximum tokens of a prompt.
        template, template_kwargs: of chats, see `align.data.chat.template.set_chat_template`.
        hides_reasoning: True if reasoning is hidden from judges and from later turns.
        engine: identity of the sampling engine: its name, the device and the versions of libraries.
        open_engine: loads the engine for the base of a system, with a tokenizer.
        seed_of: returns the seed of a system's answer to an item. None to derive it from the prompt and the draw.
        loaded: names of systems → their actors, for the systems that were used last, see `load_actors`.
        answers, likelihoods: counts over all systems.
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
    seed_of: Callable[[System, EvalItem], int] | None = None
    loaded: dict[tuple[str, ...], dict[str, Actor]] = field(default_factory=dict)
    answers: RecordCounts = field(default_factory=RecordCounts)
    likelihoods: RecordCounts = field(default_factory=RecordCounts)

    def choose_seed(self, system: System, item: EvalItem) -> int:
        """Return the seed of a model's answer to an item. It is the same for every model, unless `seed_of` is set, and
        0 for greedy answers."""
        if self.temperature == 0:
            return 0
        if self.seed_of is not None:
            return self.seed_of(system, item)
        return derive_place_seed(self.seed, "suite", repr(item.prompt.as_dicts()), *([item.draw] if item.draw else []))


class TaskAnswers(NamedTuple):
    """The answers of all models to the items of a task.

    Attributes:
        items: those that every system was asked, at every turn.
        answers: system → its last answers. The first system comes first.
        rollouts: system → the same answers as tokens, for systems sampled in this run's process.
        dropped: number of items that are too long for some system.
        greedy: system → its first answers at temperature 0, for systems that have such answers. None for an item that
            was not asked at temperature 0.
        no_greedy: system → the reason why it has no such answers.
    """

    task: EvalTask
    items: Sequence[EvalItem]
    answers: Mapping[str, Sequence[EvaluatedAnswer]]
    rollouts: Mapping[str, Rollout]
    dropped: int
    greedy: Mapping[str, Sequence[str | None]]
    no_greedy: Mapping[str, str]

    @property
    def first(self) -> str:
        """The name of the model that is compared with the others."""
        return next(iter(self.answers))

    @property
    def is_judged(self) -> bool:
        """True if a judge scores the answers, False if checks do."""
        return self.items[0].check is None


class Turn(NamedTuple):
    """A model's answer at one turn of an item, as text and as tokens.

    Attributes:
        reply: the answer as text.
        request, answer: the same as tokens, with all settings of sampling. None for a system behind a server.
    """

    reply: EvaluatedAnswer
    request: AnswerKey | None = None
    answer: CachedAnswer | None = None


class GreedyAnswers(NamedTuple):
    """The models' answers at temperature 0, which are collected during the first turn.

    Attributes:
        texts: system → index of the item → its answer.
        why_none: system → the reason why it has no such answers.
    """

    texts: dict[str, dict[int, str]]
    why_none: dict[str, str]


def ask_systems(sampling: Sampling, systems: Sequence[System], tasks: Tasks, files: Files) -> list[TaskAnswers]:
    """Sample every model's answer to every item, turn by turn, and return the answers by task. Answers in the cache are
    not sampled again, and those in `files` replace sampling.

    Raises:
        InputError: no item of a task fits every system, or a system gives no answers.
    """
    active_systems = [system for system in systems if not system.is_file]
    items = [item for _, items in tasks for item in items]
    conversations = {system.name: [item.prompt for item in items] for system in active_systems}
    turns_by_system: dict[str, dict[int, Turn]] = {system.name: {} for system in active_systems}
    pad_ids: dict[str, int] = {}
    fits = [True] * len(items)
    refusals = [""] * len(items)
    greedy = GreedyAnswers({}, {system.name: "a file has none" for system in systems if system.is_file})
    for turn_number in range(1 + max(len(item.then) for item in items) if active_systems else 0):
        due_rows = [i for i, item in enumerate(items) if fits[i] and len(item.then) >= turn_number]
        requests = []
        for system in active_systems:
            due_items = [items[i]._replace(prompt=conversations[system.name][i]) for i in due_rows]
            requests.append(build_requests(sampling, system, due_items))
        pad_ids |= {
            request.system.name: request.tokenizer.pad_token_id for request in requests if request.tokenizer is not None
        }
        greedy_rows = select_greedy_rows(tasks) if turn_number == 0 else []
        row_fits, row_refusals, answers = ask_next_turn(sampling, requests, greedy_rows, greedy)
        for i, fit, refusal in zip(due_rows, row_fits, row_refusals, strict=True):
            fits[i] = fit
            refusals[i] = refusal
        answered_rows = [i for i in due_rows if fits[i]]
        for name, turns in answers.items():
            for i, turn in zip(answered_rows, turns, strict=True):
                turns_by_system[name][i] = turn
                if len(items[i].then) > turn_number:
                    next_question = items[i].then[turn_number]
                    conversations[name][i] = continue_conversation(
                        conversations[name][i], turn.reply.text, next_question
                    )
    kept, dropped = drop_too_long_items(tasks, fits, refusals)
    fitting_rows = [i for i in range(len(items)) if fits[i]]
    answers_by_system: dict[str, Sequence[EvaluatedAnswer]] = {
        name: [with_earlier_turns(items[i], conversations[name][i], turns[i].reply) for i in fitting_rows]
        for name, turns in turns_by_system.items()
    }
    answers_by_system |= {
        name: convert_file_answers(answers, kept, sampling.hides_reasoning) for name, answers in files.items()
    }
    rollouts = {
        name: build_rollout(pad, [turns_by_system[name][i] for i in fitting_rows]) for name, pad in pad_ids.items()
    }
    greedy_texts = {name: [texts.get(i) for i in fitting_rows] for name, texts in greedy.texts.items()}
    by_task: list[TaskAnswers] = []
    first = 0
    for task, items in kept:
        rows = slice(first, first + len(items))
        first += len(items)
        by_task.append(
            TaskAnswers(
                task,
                items,
                {system.name: answers_by_system[system.name][rows] for system in systems},
                {name: slice_rollout(rollout, rows) for name, rollout in rollouts.items()},
                dropped[task.name],
                {name: texts[rows] for name, texts in greedy_texts.items()},
                greedy.why_none,
            )
        )
    return by_task


def slice_rollout(rollout: Rollout, rows: slice) -> Rollout:
    tokens, mask, ended = (x[rows] for x in (rollout.tokens_BS, rollout.mask_BS, rollout.ended_B))
    return Rollout(tokens, mask, rollout.prompt_width, ended)


def select_greedy_rows(tasks: Tasks) -> list[int]:
    """Return the indices of the items to answer also at temperature 0: the first item with each distinct prompt of a
    task. Returns an empty list if all tasks together have too few distinct prompts."""
    rows: list[int] = []
    prompts: list[str] = []
    for _, items in tasks:
        texts = [get_prompt_text(item.prompt.messages) for item in items]
        rows += [len(prompts) + row for row in find_distinct_prompts(texts)]
        prompts += texts
    return rows if len(find_distinct_prompts(prompts)) >= MIN_PROMPTS else []


def build_requests(sampling: Sampling, system: System, items: Sequence[EvalItem]) -> SystemRequests:
    """Build the cache keys of a model's answers to some items, each with all settings that determine the answer. The
    key of an item that is too long is `None`."""
    if system.endpoint is not None:
        return SystemRequests(system, None, [build_server_request(sampling, system, item) for item in items], items)
    assert system.base is not None
    tokenizer = load_system_tokenizer(sampling, system)
    model = read_configurations(system.base)
    room = compute_max_prompt_tokens(get_context_length(model), sampling.max_length, sampling.max_new_tokens)
    stop_ids = find_stop_token_ids(tokenizer, model.generation_config)
    identity = identify_system(sampling, system)
    keys: list[AnswerKey | None] = []
    for item in items:
        ids = None if is_surely_too_long(tokenizer, item.prompt, room) else encode_prompt(tokenizer, item.prompt)
        if ids is None or len(ids) > room:
            keys.append(None)
            continue
        key = AnswerKey(
            **identity,
            prompt=tuple(ids),
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            stop_ids=stop_ids,
            seed=sampling.choose_seed(system, item),
            engine=sampling.engine,
        )
        keys.append(key)
    return SystemRequests(system, tokenizer, keys, items)


def build_server_request(sampling: Sampling, system: System, item: EvalItem) -> ServerAnswerKey:
    """Build the chat request that asks a model behind a server to answer an item. Seeds are cut to 31 bits, the limit
    of servers."""
    assert system.endpoint is not None
    return system.endpoint.question(
        to_openai_messages(item.prompt),
        item.draw,
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        seed=sampling.choose_seed(system, item) % 2**31,
    )


def load_system_tokenizer(sampling: Sampling, system: System) -> Any:
    """Load the tokenizer of a model, or of the model that `tokenized_as` names, and set its chat template."""
    owner = system.tokenized_as or system
    assert owner.artifact is not None
    assert owner.base is not None
    tokenizer = load_own_tokenizer(owner.artifact, owner.base)
    set_chat_template(tokenizer, sampling.template, sampling.template_kwargs)
    return tokenizer


def identify_system(sampling: Sampling, system: System) -> dict[str, Any]:
    """Return the fields of a cache key that identify a model: digests of base, adapter and tokenizer, method and
    dtype."""
    owner = system.tokenized_as or system
    assert system.base is not None
    assert system.artifact is not None
    assert owner.artifact is not None
    assert owner.base is not None
    return {
        "base": system.base.digest,
        "adapter": "" if system.artifact.whole else system.artifact.digest,
        "method": system.method,
        "dtype": get_dtype_name(sampling.dtype),
        "tokenizer": tokenizer_digest(owner.artifact.path) or tokenizer_digest(Path(owner.base.path)),
    }


def list_computing_versions(device: torch.device) -> list[str]:
    """Return the device type and the versions of the numerical libraries, such as `torch 2.7.0`, for the cache key of
    an answer."""
    versions = package_versions()
    return [device.type, *(f"{name} {versions[name]}" for name in NUMERICAL_PACKAGES if name in versions)]


class TurnAnswers(NamedTuple):
    """The answers of all models at one turn, for the items that fit every model.

    Attributes:
        fits: for each requested item, True if its prompt fits the context of every system.
        refusals: for each item, the last message of a server that found it too long; empty without one.
        answers: system → its answers to the items that fit.
    """

    fits: Sequence[bool]
    refusals: Sequence[str]
    answers: dict[str, list[Turn]]


def ask_next_turn(
    sampling: Sampling, requests: Sequence[SystemRequests], greedy_rows: Sequence[int], greedy: GreedyAnswers
) -> TurnAnswers:
    """Sample every model's answer to the last user message of each item that fits all models. Greedy answers to
    `greedy_rows` are added to `greedy`.

    Args:
        greedy_rows: indices of the items that are also asked at temperature 0, if they fit.
        greedy: receives the answers to them.
    """
    local_requests = [request for request in requests if request.system.endpoint is None]
    server_requests = [request for request in requests if request.system.endpoint is not None]
    fits = [all(key is not None for key in row) for row in zip(*(request.keys for request in requests), strict=True)]
    refusals = [""] * len(fits)
    replies: dict[str, list[CachedAnswer | EndpointFailure | None]] = {}
    for request in server_requests:  # only the server knows its template and its limit of a prompt
        assert request.system.endpoint is not None
        questions = [question for question, fit in zip(request.keys, fits, strict=True) if fit]
        server_replies = ask_endpoint(sampling, request.system.endpoint, questions, request.system.field, ("too long",))
        replies[request.system.name] = [server_replies.get(question.id) for question in request.keys]
    for name, server_replies in replies.items():
        fits = [fit and isinstance(reply, CachedAnswer) for fit, reply in zip(fits, server_replies, strict=True)]
        refusals = [
            f"{name} {reply.problem}" if isinstance(reply, EndpointFailure) else before
            for reply, before in zip(server_replies, refusals, strict=True)
        ]
    if not any(fits):
        return TurnAnswers(fits, refusals, {request.system.name: [] for request in requests})
    rows = [row for row, fit in enumerate(fits) if fit]
    greedy_rows = [row for row in greedy_rows if fits[row]]
    record_requests = []
    for request in local_requests:
        keys = [request.keys[row] for row in rows]
        keys += [replace(request.keys[row], temperature=0.0, seed=0) for row in greedy_rows]
        record_requests.append(SystemRequests(request.system, request.tokenizer, keys))
    store = AnswerStore(sampling.root / FILE)
    answers = complete_records(
        store, record_requests, "answers", sampling.answers, partial(sample_missing_answers, sampling)
    )
    turns: dict[str, list[Turn]] = {}
    for request, system_request, values in zip(local_requests, record_requests, answers, strict=True):
        items = [request.items[row] for row in (*rows, *greedy_rows)]
        prompts = [Prompt(item.prompt, [*key.prompt]) for item, key in zip(items, system_request.keys, strict=True)]
        texts = [answer.text for answer in values]
        reasonings, shown_texts = split_reasoning_batch(prompts, texts, request.tokenizer, sampling.hides_reasoning)
        turns[request.system.name] = [
            Turn(EvaluatedAnswer(key.id, text, None, answer.ended, reasoning), key, answer)
            for key, answer, reasoning, text in zip(system_request.keys, values, reasonings, shown_texts, strict=True)
        ][: len(rows)]
        if greedy_rows:
            greedy.texts[request.system.name] = dict(zip(greedy_rows, shown_texts[len(rows) :], strict=True))
    for request in server_requests:
        name = request.system.name
        turns[name] = []
        for question, reply, fit in zip(request.keys, replies[name], fits, strict=True):
            if fit and isinstance(reply, CachedAnswer):
                reasoning, text = split_reasoning(reply.text) if sampling.hides_reasoning else (None, reply.text)
                turns[name].append(Turn(EvaluatedAnswer(question.id, text, None, reply.ended, reasoning)))
        if greedy_rows:
            texts, why = ask_server_greedily(sampling, request.system, [request.keys[row] for row in greedy_rows])
            if texts is None:
                greedy.why_none[name] = why
            else:
                shown_texts = [split_reasoning(text)[1] if sampling.hides_reasoning else text for text in texts]
                greedy.texts[name] = dict(zip(greedy_rows, shown_texts, strict=True))
    return TurnAnswers(fits, refusals, turns)


# Systems that are sampled in this process


class SystemRequests(NamedTuple):
    """The cache keys of the records, such as answers, that are needed from one model.

    Attributes:
        tokenizer: None for a model behind a server.
        keys: for each record all settings that decide it, such as an `AnswerKey` or a `ServerAnswerKey`. None for a
            prompt that is too long for the system.
        items: of the records, if they are answers.
    """

    system: System
    tokenizer: Any
    keys: Sequence[Any]
    items: Sequence[EvalItem] = ()

    @property
    def group(self) -> tuple[Any, ...]:
        """The key shared by models that are sampled together: digest and method of the base, and the stop tokens."""
        assert self.system.base is not None
        return self.system.base.digest, self.system.method, getattr(self.keys[0], "stop_ids", ())


StoreRecords = Callable[[Sequence[tuple[Any, Any]]], None]
"""Callback that stores (key, record) pairs."""


def complete_records(
    store: AnswerStore,
    requests: Sequence[SystemRequests],
    what: str,
    counts: RecordCounts,
    compute_missing: Callable[[Sequence[SystemRequests], StoreRecords], None],
) -> list[list[Any]]:
    """Look up records in the cache, compute and store the missing ones, and return one list per model in the order of
    its keys.

    Args:
        what: the name of the records, for the progress bar.
        counts: counts them.
        compute_missing: computes the missing records of systems on one base, each once.
    """
    ids = {key.id for request in requests for key in request.keys}
    if not ids:
        return [[] for _ in requests]
    record_by_id: dict[str, Any] = ranks.broadcast(store.find_records(ids) if ranks.is_main() else {})
    stored_count = len(record_by_id)
    counts.add(len(ids), stored_count)
    groups: dict[tuple[Any, ...], list[SystemRequests]] = {}
    for request in requests:
        if request.keys:
            groups.setdefault(request.group, []).append(request)
    with show_progress(what, len(ids), stored_count) as bar:

        def keep(records: Sequence[tuple[Any, Any]]) -> None:
            if ranks.is_main():
                store.add(records)
            record_by_id.update((key.id, record) for key, record in records)
            bar.advance(len(record_by_id))

        for group in groups.values():
            missing = [
                request._replace(keys=[*{key.id: key for key in request.keys if key.id not in record_by_id}.values()])
                for request in group
            ]
            if any(request.keys for request in missing):
                compute_missing(missing, keep)
    return [[record_by_id[key.id] for key in request.keys] for request in requests]


def sample_missing_answers(sampling: Sampling, group: Sequence[SystemRequests], store_records: StoreRecords) -> None:
    """Sample and store the answers that the cache lacks, for models on one base. The models' rows of one prompt are
    next to each other in a batch.

    Raises:
        InputError: the logits of a system are not finite.
    """
    actors = load_actors(sampling, [request.system for request in group])
    rows = [
        (request, key)
        for keys_of_item in zip_longest(*(request.keys for request in group))
        for request, key in zip(group, keys_of_item, strict=True)
        if key is not None
    ]
    sampled = [row for row in rows if row[1].temperature]
    greedy = [row for row in rows if not row[1].temperature]
    size = sampling.batch_size * len(group)
    batches = [part[first : first + size] for part in (sampled, greedy) for first in range(0, len(part), size)]
    with sampling.open_engine(group[0].system, group[0].tokenizer) as engine:
        for actor in actors.values():
            engine.sync(actor)
        for batch in batches:
            names = ", ".join(dict.fromkeys(request.system.field for request, _ in batch))
            with convert_divergence_errors(names, None, sampling.dtype_setting):
                prompts = [[*key.prompt] for _, key in batch]
                seeds = [key.seed for _, key in batch]
                with nullcontext() if batch[0][1].temperature else use_greedy_decoding(engine):
                    rollout = engine.generate(prompts, [actors[request.system.name] for request, _ in batch], seeds)
            answers = zip(batch, extract_response_ids(rollout), rollout.ended_B.tolist(), strict=True)
            store_records(
                [
                    (key, CachedAnswer(tuple(ids), decode_response(request.tokenizer, ids, has_ended), has_ended))
                    for (request, key), ids, has_ended in answers
                ]
            )


def load_actors(sampling: Sampling, systems: Sequence[System]) -> dict[str, Actor]:
    """Load one base with the adapters of several models, and return model name → actor to sample with. They stay loaded
    until a call for other models."""
    names = tuple(system.name for system in systems)
    if names in sampling.loaded:
        return sampling.loaded[names]
    sampling.loaded.clear()
    first = systems[0]
    assert first.base is not None
    model = load_base(first.base, first.method, sampling.device, sampling.dtype)
    folders = {s.name: s.artifact.path for s in systems if s.artifact is not None and not s.artifact.whole}
    if folders:
        pool = AdapterPool(model, is_only_adapter=len(systems) == 1)
        digests = {name: pool.add(folder) for name, folder in folders.items()}
        actors: dict[str, Actor] = {name: pool.actor(digests.get(name)) for name in names}
    else:
        actors = {name: ModelActor(model) for name in names}
    sampling.loaded[names] = actors
    return actors


# Models behind servers


def ask_endpoint(
    sampling: Sampling, endpoint: Endpoint, questions: Sequence[ServerAnswerKey], label: str, accepted: Sequence[str]
) -> Mapping[str, CachedAnswer | EndpointFailure]:
    """Request from a server the answers that the cache lacks, and return request id → reply. The main rank sends the
    requests and broadcasts the replies.

    Args:
        label: of the progress bar.
        accepted: kinds of failures that are returned instead of raised.

    Raises:
        InputError: the server does not answer, or a question fails in another way.
    """

    def watch(reply: CachedAnswer | EndpointFailure) -> None:
        if isinstance(reply, EndpointFailure) and reply.kind not in accepted:
            raise build_endpoint_error(endpoint, reply)

    replies: Mapping[str, CachedAnswer | EndpointFailure] = {}
    stored_count = 0
    if ranks.is_main():
        replies, stored_count = fetch_answers(endpoint, questions, AnswerStore(sampling.root / FILE), label, watch)
    replies, stored_count = ranks.broadcast((replies, stored_count))
    sampling.answers.add(sum(isinstance(reply, CachedAnswer) for reply in replies.values()), stored_count)
    return replies


class GreedyServerAnswers(NamedTuple):
    """The answers of a server at temperature 0, or the reason why none exist.

    Attributes:
        texts: one per question; None if the server gives no greedy answers.
        why_none: the reason if none exist, else empty.
    """

    texts: list[str] | None
    why_none: str = ""


def ask_server_greedily(
    sampling: Sampling, system: System, questions: Sequence[ServerAnswerKey]
) -> GreedyServerAnswers:
    """Request a server's answers at temperature 0, and check by repeated requests that it honours the temperature.

    The first few questions are asked twice, with different seeds, since a server that does not honour the temperature
    then answers differently.

    Raises:
        InputError: the server cannot be reached, or its answers cannot be read.
    """
    endpoint = system.endpoint
    assert endpoint is not None
    ask = partial(
        ask_endpoint, sampling, endpoint, label=f"{endpoint.field}, temperature 0", accepted=("too long", "refused")
    )
    if any(question.body.get("temperature") != sampling.temperature for question in questions):
        return GreedyServerAnswers(None, f"{endpoint.field}.extra_body sets the temperature")
    greedy = [replace_settings(question, temperature=0.0, seed=0) for question in questions]
    compared = greedy[:REPEATED_PROMPTS]
    repeated = [replace(replace_settings(question, seed=1), draw=1) for question in compared]
    replies = ask(questions=[*compared, *repeated])
    refusal = next((reply.problem for reply in replies.values() if isinstance(reply, EndpointFailure)), None)
    if refusal is not None:
        return GreedyServerAnswers(None, f"its server {refusal}")
    openings = {
        id: tokenize_words(reply.text)[:COMPARED_WORDS]
        for id, reply in replies.items()
        if isinstance(reply, CachedAnswer)
    }
    differing = sum(openings[first.id] != openings[second.id] for first, second in zip(compared, repeated, strict=True))
    if 2 * differing >= len(compared):
        return GreedyServerAnswers(None, "its server answers differently each time")
    replies = {**replies, **ask(questions=[question for question in greedy if question.id not in replies])}
    texts = [reply.text for question in greedy if isinstance(reply := replies[question.id], CachedAnswer)]
    if len(texts) < len(greedy):
        return GreedyServerAnswers(None, "its server refuses some prompts at this temperature")
    return GreedyServerAnswers(texts)


def replace_settings(question: ServerAnswerKey, **settings: Any) -> ServerAnswerKey:
    """Return a copy of a server request with new sampling parameters. Parameters that the request does not set are
    ignored."""
    return replace(question, body={**question.body, **{k: v for k, v in settings.items() if k in question.body}})


# Conversions of answers


def continue_conversation(conversation: Conversation, answer: str, question: str) -> Conversation:
    """Return the conversation with the model's answer and the user's next question appended."""
    return replace(
        conversation, messages=(*conversation.messages, Message("assistant", answer), Message("user", question))
    )


def with_earlier_turns(item: EvalItem, conversation: Conversation, answer: EvaluatedAnswer) -> EvaluatedAnswer:
    """Return a model's last answer to an item with `before` set to the turns between the prompt and this answer."""
    return replace(answer, before=conversation.messages[len(item.prompt.messages) :])


def drop_too_long_items(tasks: Tasks, fits: Sequence[bool], refusals: Sequence[str]) -> RemainingTasks:
    """Return the tasks without the items whose prompts exceed the context of any model, and the number of dropped items
    per task.

    Args:
        fits: of every item, one task after another.
        refusals: for each item the message of a server that found it too long, else empty.

    Raises:
        InputError: no item of a task fits. The message includes the last one of a server, since the reason may be
            another.
    """
    kept_tasks: list[tuple[EvalTask, Sequence[EvalItem]]] = []
    dropped: dict[str, int] = {}
    first = 0
    for task, items in tasks:
        rows = range(first, first + len(items))
        first += len(items)
        fitting = [item for item, row in zip(items, rows, strict=True) if fits[row]]
        server_messages = [f": {refusals[row]}" for row in rows if refusals[row]]
        problem = f"is longer than what a prompt may have, for all {pluralize(len(items), 'item')}"
        problem += f" of {task.name}" if task.name != DEFAULT_TASK else ""
        problem += server_messages[-1] if server_messages else ""
        value = task.name if task.name != DEFAULT_TASK else "the longest prompt"
        require(bool(fitting), "data.max_length", value, problem, "Raise it, or lower rollout.max_new_tokens.")
        kept_tasks.append((task, fitting))
        dropped[task.name] = len(items) - len(fitting)
    return RemainingTasks(kept_tasks, dropped)


def convert_file_answers(
    answers: Mapping[tuple[str, str], Sequence[str]], tasks: Tasks, hides_reasoning: bool
) -> list[EvaluatedAnswer]:
    """Convert a model's answers from a file to evaluated answers, in the order of all tasks' items.

    Args:
        answers: task and id of an item → its answers, one per turn.
        hides_reasoning: True to split reasoning off the answers.
    """
    last_answers = []
    for task, items in tasks:
        for item in items:
            texts = answers[task.name, item.id]
            parts = [split_reasoning(text, False) if hides_reasoning else (None, text) for text in texts]
            conversation = item.prompt
            for (_, text), question in zip(parts, item.then, strict=False):
                conversation = continue_conversation(conversation, text, question)
            reasoning, text = parts[-1]
            answer = EvaluatedAnswer("", text, None, None, reasoning)
            last_answers.append(with_earlier_turns(item, conversation, answer))
    return last_answers


def build_rollout(pad: int, turns: Sequence[Turn]) -> Rollout:
    """Build a rollout on the CPU from the answers of the last turn, for rewards that read tokens or end-of-text flags.

    Args:
        pad: id of the padding token.
    """
    prompts = [turn.request.prompt for turn in turns if turn.request is not None]
    answers = [turn.answer for turn in turns if turn.answer is not None]
    rollout = rollout_from_answers(prompts, [answer.ids for answer in answers], pad, "cpu")
    return replace(rollout, ended_B=rollout.ended_B.new_tensor([answer.ended for answer in answers]))
