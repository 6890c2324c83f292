"""Log-likelihoods of rows under the evaluated models, and the probes based on them: choices, texts, and tasks of
lm-eval.

Stored log-likelihoods are not computed again (`align.rollout.answer_cache`). The first rank stores them, and several
ranks share the batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_tensor

from align import ranks
from align.core.errors import LONE_SURROGATE, require
from align.core.types import Conversation
from align.data.chat.continuations import (
    build_scored_row,
    encode_answer,
    encode_context,
    encode_continuation,
    split_windows,
)
from align.data.chat.encode import IGNORE_INDEX, EncodedRow, encode_conversation, find_eos_token_ids, is_surely_too_long
from align.evals.suite.answers import (
    Sampling,
    StoreRecords,
    SystemRequests,
    complete_records,
    identify_system,
    list_computing_versions,
    load_actors,
    load_system_tokenizer,
)
from align.evals.suite.probes import (
    CHOICE,
    NORMS,
    SCORED_BY,
    ChoiceQuestion,
    CompletionRequest,
    LikelihoodRequests,
    Probe,
    WrittenCompletion,
    compute_bits_per_byte,
    count_scored_bytes,
    score_choices,
)
from align.evals.suite.results import EvaluatedAnswer, ScoredTask
from align.evals.suite.systems import System
from align.evals.suite.tasks import EvalItem, EvalTask, Tasks
from align.models.actors import Actor
from align.models.fastpath.llama import attention_by_width
from align.models.finite_checks import build_divergence_error
from align.models.forward import compute_hidden_states, compute_states_and_logits, get_lm_head, get_route, pad_rows
from align.models.load import get_context_length, read_configurations
from align.ops.logprobs import choose_chunk_rows
from align.report.figure_text import pluralize
from align.rollout.answer_cache import FILE, AnswerKey, AnswerStore, CachedAnswer, LikelihoodKey
from align.rollout.detokenize import StopFinder, TextDecoder
from align.rollout.engine import convert_divergence_errors, extract_response_ids
from align.rollout.hf import HfEngine
from align.run import json_digest

TABLE = "likelihoods"
"""Name of the answer store's table for log-likelihoods."""
MIN_WIDTH = 32
"""Minimum width of a forward pass in tokens, and minimum rows of a product with the LM head. Libraries use another
order of addition for smaller sizes, so that a row's last bits would depend on the other rows of its batch."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """The log-likelihood of a row's scored tokens, and whether greedy decoding gives them.

    Attributes:
        logprob: sum of log p of all of them, each given the tokens before it, in nats, added in float64.
        greedy: True if each is the likeliest token in its place.
    """

    logprob: float
    greedy: bool

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Likelihood:
        """Rebuild a Likelihood from its JSON form. Raises KeyError, TypeError or ValueError if the form is invalid."""
        return cls(float(record["logprob"]), bool(record["greedy"]))


def compute_likelihoods(model: Any, rows: Sequence[EncodedRow], pad_id: int, context: int) -> list[Likelihood]:
    """Compute the log-likelihood of the labelled tokens of each row under the model's active adapter.

    The width of a row's forward pass depends on its own length only, so that in fp32 the result does not depend on the
    other rows, to the last bit.

    Args:
        rows: each with a scored token, and at most as long as the model's context.
        pad_id: the padding token.
        context: maximum tokens of a row.
    """
    widths = [choose_pass_width(len(row.input_ids), context) for row in rows]
    likelihood_by_row: dict[int, Likelihood] = {}
    for width in {*widths}:
        places = [i for i, row_width in enumerate(widths) if row_width == width]
        batch = compute_padded_likelihoods(model, [rows[i] for i in places], pad_id, width)
        likelihood_by_row |= zip(places, batch, strict=True)
    return [likelihood_by_row[i] for i in range(len(rows))]


def choose_pass_width(tokens: int, context: int) -> int:
    """Return the width in tokens to which a row is padded: the smallest `MIN_WIDTH` times a power of two that holds it,
    at most the context."""
    width = MIN_WIDTH
    while width < tokens:
        width *= 2
    return max(tokens, min(width, context))


@torch.no_grad()
def compute_padded_likelihoods(model: Any, rows: Sequence[EncodedRow], pad_id: int, width: int) -> list[Likelihood]:
    """Compute the likelihoods of rows in one forward pass, padded to `width` tokens. If all rows are shorter, a row of
    padding is added."""
    device = next(model.parameters()).device
    ids = [row.input_ids for row in rows]
    labels = [row.labels for row in rows]
    if max(map(len, ids)) < width:
        ids.append([pad_id] * width)
        labels.append([IGNORE_INDEX] * width)
    tokens = pad_rows(ids, pad_id).to(device)
    mask = pad_rows([[1] * len(row) for row in ids], 0).bool().to(device)
    picked = (pad_rows(labels, IGNORE_INDEX) != IGNORE_INDEX).to(device)
    picked[:, 0] = False  # the first token has no context
    logprobs, is_greedy = compute_token_likelihoods(model, tokens, mask, picked)
    counts = [row.trained for row in rows]
    parts = zip(logprobs.double().split(counts), is_greedy.split(counts), strict=True)
    return [Likelihood(row_logprobs.sum().item(), bool(row_greedy.all())) for row_logprobs, row_greedy in parts]


class TokenLikelihoods(NamedTuple):
    """The log-probabilities of N tokens, row by row.

    Attributes:
        logprobs: log p of each token given the tokens before it, float32 [N].
        is_greedy: True for a token that is the likeliest at its position, bool [N].
    """

    logprobs: Tensor
    is_greedy: Tensor


def compute_token_likelihoods(model: Any, tokens_BS: Tensor, mask_BS: Tensor, picked_BS: Tensor) -> TokenLikelihoods:
    """Compute the log-probability of each picked token given the tokens before it in its row, and whether it is the
    likeliest one.

    Args:
        picked_BS: True for real tokens to score, none of them a row's first.
    """
    targets_N = tokens_BS[picked_BS]
    if get_route(model).has_fast_path:
        with attention_by_width():
            states = compute_hidden_states(model, tokens_BS, mask_BS)[:, :-1][picked_BS[:, 1:]]
        head = get_lm_head(model)
    else:
        _, logits_NV, places_N = compute_states_and_logits(model, tokens_BS, mask_BS, picked_BS)
        states = logits_NV[places_N.argsort()]
        head = torch.nn.Identity()
    chunk = choose_chunk_rows(head(states[:1]).shape[-1], states.device)
    logprob_chunks: list[Tensor] = []
    greedy_chunks: list[Tensor] = []
    for part, targets in zip(states.split(chunk), targets_N.split(chunk), strict=True):
        logits = head(pad_tensor(part, (0, 0, 0, max(0, MIN_WIDTH - len(part)))))[: len(part)].float()
        logprob_chunks.append(logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1))
        greedy_chunks.append(logits.argmax(-1) == targets)
    return TokenLikelihoods(torch.cat(logprob_chunks), torch.cat(greedy_chunks))


# The probes of a suite


class EncodedItems(NamedTuple):
    """The items of all probes, tokenized for one evaluated model.

    Attributes:
        rows: for each item of all tasks, in order, the rows to score; for a completion one row with its context, where
            no token is scored. None for an item that is too long for the system.
    """

    system: System
    tokenizer: Any
    rows: Sequence[Sequence[EncodedRow] | None]


def measure_probes(sampling: Sampling, systems: Sequence[System], tasks: Tasks, folder: Path) -> dict[str, ScoredTask]:
    """Score all tasks that are probes, by log-likelihoods or greedy completions, and return task name → scored task.
    Results of lm-eval are written to `folder`.

    Each system's model runs in this process and ignores `rollout=`. Adapters on one base share its load, one after
    another.

    Args:
        systems: those that have a model.
        folder: where lm-eval's results are written.

    Raises:
        InputError: no item of a task fits; a row cannot be encoded; or a log-likelihood is not finite.
    """
    all_items = [(task, item) for task, items in tasks if task.probe is not None for item in items]
    if not all_items:
        return {}
    encoded_items = [encode_items(sampling, system, all_items) for system in systems]
    fits = [all(encoded.rows[i] is not None for encoded in encoded_items) for i in range(len(all_items))]
    kept_by_task: dict[str, list[int]] = {task.name: [] for task, _ in all_items}
    for i, (task, _) in enumerate(all_items):
        if fits[i]:
            kept_by_task[task.name].append(i)
    probes = [(task, items, kept_by_task[task.name]) for task, items in tasks if task.probe is not None]
    for task, items, kept in probes:
        problem = f"is longer than the context of some system, for all {pluralize(len(items), 'item')}"
        remedy = "Give shorter rows; an answer's max_gen_toks count with its context."
        require(bool(kept), task.field, task.path or task.name, problem, remedy)
    likelihoods_by_system = compute_likelihoods_by_system(sampling, encoded_items, all_items, fits)
    completions_by_system = generate_completions(sampling, encoded_items, all_items, fits)
    scored: dict[str, ScoredTask] = {}
    for task, items, kept in probes:
        assert task.probe is not None
        task_items = [all_items[i][1] for i in kept]
        if task.probe.harness is not None:
            from align.evals.suite.lm_eval import build_result_metadata, score_by_lm_eval  # lm-eval is an extra

            measurements = {
                name: [completions_by_system[name].get(i) or rows[i] for i in kept]
                for name, rows in likelihoods_by_system.items()
            }
            computed_by = list_computing_versions(sampling.device)
            identities = {
                system.name: build_result_metadata(system, identify_system(sampling, system), computed_by, task_items)
                for system in systems
            }
            part = score_by_lm_eval(task, task_items, measurements, identities, folder)
        else:
            answers = {
                encoded.system.name: [
                    build_probe_answer(
                        task.probe,
                        all_items[i][1],
                        encoded.rows[i] or (),
                        likelihoods_by_system[encoded.system.name][i],
                    )
                    for i in kept
                ]
                for encoded in encoded_items
            }
            role = "exact" if task.probe.kind == CHOICE else "measured"
            part = ScoredTask(task.name, SCORED_BY[task.probe.kind], role, task_items, answers)
        scored[task.name] = replace(part, dropped=len(items) - len(kept))
    return scored


def encode_items(sampling: Sampling, system: System, all_items: Sequence[tuple[EvalTask, EvalItem]]) -> EncodedItems:
    """Tokenize the items of all probes with the tokenizer and for the context of one evaluated model."""
    assert system.base is not None, "inputs() rejects systems without a base"
    tokenizer = load_system_tokenizer(sampling, system)
    context = get_context_length(read_configurations(system.base))
    window = max(min(context, sampling.max_length), 2)  # a token, and one before it
    return EncodedItems(
        system, tokenizer, [encode_item(tokenizer, task, item, context, window) for task, item in all_items]
    )


def encode_item(tokenizer: Any, task: EvalTask, item: EvalItem, context: int, window: int) -> list[EncodedRow] | None:
    """Tokenize an item into rows with labels: each of its choices, its text in windows, or the context of a completion.
    Returns None if a row is too long.

    Args:
        context, window: maximum tokens of a row, and of a window of text.
    """
    if isinstance(item.probe, str):
        rows = split_windows(tokenizer, item.probe, window)
        require(bool(rows), f"{task.field}, id", item.id, "has no token", "Leave the row out.")
        return rows
    if isinstance(item.probe, CompletionRequest):
        context_ids = encode_context(tokenizer, item.probe.context)
        return None if len(context_ids) + item.probe.max_tokens > context else [build_scored_row(context_ids, [])]
    if isinstance(item.probe, LikelihoodRequests):
        from align.evals.suite.lm_eval import encode_requests  # lm-eval is an extra

        rows = encode_requests(tokenizer, item.probe, window)
    elif isinstance(item.probe, ChoiceQuestion):
        assert task.probe is not None
        if task.probe.template:
            rows = [encode_answer(tokenizer, item.prompt, text) for text in item.probe.texts]
        else:
            before = item.prompt.messages[-1].content
            rows = [encode_continuation(tokenizer, before, f" {text}") for text in item.probe.texts]
    else:
        assert item.probe is not None
        if is_surely_too_long(tokenizer, item.probe, context):
            return None
        rows = [encode_conversation(tokenizer, item.probe)]
        problem = "has no token that is trained on"
        remedy = "Give a conversation with an answer."
        require(rows[0].trained > 0, f"{task.field}, id", item.id, problem, remedy)
    return None if any(len(row.input_ids) > context for row in rows) else rows


def build_probe_answer(
    probe: Probe, item: EvalItem, rows: Sequence[EncodedRow], likelihoods: Sequence[Likelihood]
) -> EvaluatedAnswer:
    """Build a model's scored answer to an item from the likelihoods of its rows. The score is the correctness of the
    likeliest choice, or minus the bits per byte of a text."""
    logprobs = [likelihood.logprob for likelihood in likelihoods]
    if isinstance(item.probe, ChoiceQuestion):
        measurements = score_choices(item.probe, logprobs)
        name = NORMS[probe.norm]
        text = item.probe.texts[measurements[f"{name}_choice"]]
        return EvaluatedAnswer("", text, measurements[name], weighed=measurements)
    assert isinstance(item.probe, str | Conversation)
    nats = -sum(logprobs)
    size = count_scored_bytes(item.probe)
    measurements = {"nats": nats, "tokens": sum(row.trained for row in rows), "bytes": size}
    return EvaluatedAnswer("", "", -compute_bits_per_byte(nats, size), weighed=measurements)


def compute_likelihoods_by_system(
    sampling: Sampling,
    items_by_system: Sequence[EncodedItems],
    items: Sequence[tuple[EvalTask, EvalItem]],
    fits: Sequence[bool],
) -> dict[str, list[list[Likelihood]]]:
    """Return model name → for each item the log-likelihoods of its rows, from the cache or else computed. The list is
    empty for items that do not fit, and for completions."""
    engine = " ".join(list_computing_versions(sampling.device))
    rows: dict[str, EncodedRow] = {}
    counts_by_system: list[list[int]] = []
    requests: list[SystemRequests] = []
    for encoded in items_by_system:
        identity = identify_system(sampling, encoded.system)
        identity.pop("tokenizer")
        keys: list[LikelihoodKey] = []
        counts: list[int] = []
        for (_, item), encoded_rows, fit in zip(items, encoded.rows, fits, strict=True):
            scored_rows = encoded_rows if fit and encoded_rows and not isinstance(item.probe, CompletionRequest) else []
            counts.append(len(scored_rows))
            for row in scored_rows:
                key = LikelihoodKey(**identity, row=json_digest([row.input_ids, row.labels]), engine=engine)
                keys.append(key)
                rows[key.id] = row
        counts_by_system.append(counts)
        requests.append(SystemRequests(encoded.system, encoded.tokenizer, keys))
    store = AnswerStore(sampling.root / FILE, Likelihood, TABLE)
    compute = partial(compute_missing_likelihoods, sampling, rows)
    records_by_system = complete_records(store, requests, "log-likelihoods", sampling.likelihoods, compute)
    by_system = {}
    for encoded, counts, records in zip(items_by_system, counts_by_system, records_by_system, strict=True):
        remaining = iter(records)
        by_system[encoded.system.name] = [[*islice(remaining, count)] for count in counts]
    return by_system


def compute_missing_likelihoods(
    sampling: Sampling, rows: Mapping[str, EncodedRow], group: Sequence[SystemRequests], store_records: StoreRecords
) -> None:
    """Compute and store the log-likelihoods that the cache lacks, for models on one base, in batches of rows of similar
    length.

    Args:
        rows: by the id of their key.

    Raises:
        InputError: a log-likelihood is not finite.
    """
    actors = load_actors(sampling, [request.system for request in group])
    for request in group:
        system = request.system
        assert system.base is not None
        context = get_context_length(read_configurations(system.base))
        keys = sorted(request.keys, key=lambda key: len(rows[key.id].input_ids))
        size = sampling.batch_size
        batches = [keys[first : first + size] for first in range(0, len(keys), size)]
        pad_id = request.tokenizer.pad_token_id
        with actors[system.name].use() as model:
            model.eval()
            compute = partial(compute_batch, model=model, rows=rows, pad_id=pad_id, context=context)
            for records in compute_batches(batches, compute):
                if any(not math.isfinite(likelihood.logprob) for _, likelihood in records):
                    problem = f"{system.field} gives a row a log-likelihood that is not finite"
                    raise build_divergence_error(problem, None, sampling.dtype_setting)
                store_records(records)


def compute_batch(
    batch: Sequence[LikelihoodKey], model: Any, rows: Mapping[str, EncodedRow], pad_id: int, context: int
) -> list[Likelihood]:
    return compute_likelihoods(model, [rows[key.id] for key in batch], pad_id, context)


def compute_batches(
    batches: Sequence[Sequence[Any]], compute: Callable[[Sequence[Any]], Sequence[Any]]
) -> Iterator[list[tuple[Any, Any]]]:
    """Compute batches in parallel on all ranks, and yield lists of (entry, result) pairs. Each list covers as many
    batches as there are ranks."""
    for first in range(0, len(batches), ranks.world_size()):
        share = batches[first : first + ranks.world_size()]
        results = ranks.gather_shares([compute(batch) for batch in ranks.select_own_share(share)], len(share))
        pairs = []
        for batch, batch_results in zip(share, results, strict=True):
            pairs += zip(batch, batch_results, strict=True)
        yield pairs


# Completions for tasks of lm-eval


def generate_completions(
    sampling: Sampling,
    encoded_items: Sequence[EncodedItems],
    items: Sequence[tuple[EvalTask, EvalItem]],
    fits: Sequence[bool],
) -> dict[str, dict[int, WrittenCompletion]]:
    """Generate greedy completions for lm-eval's items that need one, and return model name → item index → completion.
    Cached ones are not generated again, and items that do not fit are left out.

    As in lm-eval, an answer also ends with the text of the EOS token.
    """
    probes = {
        i: item.probe for i, (_, item) in enumerate(items) if fits[i] and isinstance(item.probe, CompletionRequest)
    }
    engine = " ".join(["hf", *list_computing_versions(sampling.device)])
    requests = []
    for encoded in encoded_items:
        assert encoded.system.base is not None
        tokenizer = encoded.tokenizer
        stop_ids = find_eos_token_ids(tokenizer, read_configurations(encoded.system.base).generation_config)
        eos = tokenizer.eos_token_id
        eos_texts = (tokenizer.decode(eos),) if eos is not None and tokenizer.decode(eos) else ()
        identity = identify_system(sampling, encoded.system)
        keys = [
            AnswerKey(
                **identity,
                prompt=tuple((encoded.rows[i] or [])[0].input_ids),
                max_new_tokens=probe.max_tokens,
                temperature=0.0,
                stop_ids=stop_ids,
                seed=0,
                engine=engine,
                stops=(*probe.until, *eos_texts),
            )
            for i, probe in probes.items()
        ]
        requests.append(SystemRequests(encoded.system, tokenizer, keys))
    store = AnswerStore(sampling.root / FILE)
    answers = complete_records(
        store, requests, "answers", sampling.answers, partial(generate_missing_completions, sampling)
    )
    return {
        request.system.name: dict(zip(probes, map(WrittenCompletion, request.keys, system_answers), strict=True))
        for request, system_answers in zip(requests, answers, strict=True)
    }


def generate_missing_completions(
    sampling: Sampling, group: Sequence[SystemRequests], store_records: StoreRecords
) -> None:
    """Generate and store the completions that the cache lacks, for models on one base.

    Raises:
        InputError: the logits of a system are not finite.
    """
    actors = load_actors(sampling, [request.system for request in group])
    for request in group:
        complete_batch = partial(complete_texts, actor=actors[request.system.name], tokenizer=request.tokenizer)
        with convert_divergence_errors(request.system.field, None, sampling.dtype_setting):
            for records in compute_batches(batch_by_length(request.keys, sampling.batch_size), complete_batch):
                store_records(records)


def batch_by_length(requests: Sequence[AnswerKey], size: int) -> list[list[AnswerKey]]:
    """Split requests into batches of at most `size` with the same `max_new_tokens` and prompts of similar length."""
    ordered = sorted(requests, key=lambda request: (request.max_new_tokens, len(request.prompt)))
    parts = [[*part] for _, part in groupby(ordered, lambda request: request.max_new_tokens)]
    return [part[first : first + size] for part in parts for first in range(0, len(part), size)]


def complete_texts(batch: Sequence[AnswerKey], actor: Actor, tokenizer: Any) -> list[CachedAnswer]:
    """Continue each prompt by greedy decoding, until one of its stop tokens or stop texts or the token limit.

    Args:
        batch: requests with the same `max_new_tokens` and `stop_ids`.

    Raises:
        NonFiniteLogits: the logits are not finite.
    """
    first = batch[0]
    engine = HfEngine(first.stop_ids, tokenizer.pad_token_id, first.max_new_tokens, 0.0, len(batch))
    stop_finders = [StopFinder(TextDecoder(tokenizer, request.stops, special=True)) for request in batch]
    rollout = engine.generate([request.prompt for request in batch], actor, [0] * len(batch), stop_finders)
    rows = zip(batch, extract_response_ids(rollout), rollout.ended_B.tolist(), strict=True)
    return [
        CachedAnswer(tuple(ids), decode_answer(tokenizer, ids, request.stops), has_ended)
        for request, ids, has_ended in rows
    ]


def decode_answer(tokenizer: Any, ids: Sequence[int], stops: Sequence[str]) -> str:
    """Decode an answer without special tokens, and cut it before each of the stop texts. White space is kept, because
    metrics depend on it. Lone surrogates become U+FFFD."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    for stop in stops:
        text = text.partition(stop)[0]
    return LONE_SURROGATE.sub("\ufffd", text)
