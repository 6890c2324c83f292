"""Log-likelihoods of rows under the models of systems, and the probes of a suite that are made of them: how likely
every system finds choices and texts, and what it writes for tasks of lm-eval.

What was computed before is not computed again (`align.rollout.answer_cache`). The first rank keeps it; several ranks
share the batches.
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
from torch.nn.functional import pad as widened

from align import ranks
from align.core.errors import LONE_SURROGATE, require
from align.core.types import Conversation
from align.data.chat.continuations import answered, behind, continued, following, windows
from align.data.chat.encode import IGNORED, Encoded, encode_conversation, eos_token_ids, surely_too_long
from align.evals.suite.answers import (
    Keep,
    Sampling,
    Wanted,
    complete,
    identify_system,
    list_computing_versions,
    load_actors,
    load_tokenizer,
)
from align.evals.suite.probes import (
    BY,
    CHOICE,
    NORMS,
    Choices,
    Completion,
    Probe,
    Requests,
    Written,
    bits_per_byte,
    chosen,
    size_of,
)
from align.evals.suite.results import Said, Scored
from align.evals.suite.systems import System
from align.evals.suite.tasks import Item, Task, Tasks
from align.models.actors import Actor
from align.models.fastpath.llama import attention_by_width
from align.models.finite_checks import diverged
from align.models.forward import hidden_states, lm_head, pad, route_of, states_and_logits
from align.models.load import context_length, describe
from align.ops.logprobs import choose_chunk_rows
from align.report.figure_text import counted
from align.rollout.answer_cache import FILE, Answer, AnswerStore, Asked, Weighed
from align.rollout.detokenize import StopFinder, TextDecoder
from align.rollout.engine import divergence_as_input_error, response_ids
from align.rollout.hf import HfEngine
from align.run import json_digest

TABLE = "likelihoods"
"""Of the store of answers."""
LEAST = 32
"""Tokens of a pass's width, and of a product with the head, at least. Libraries compute others in another order of
addition, and a row's last bits would depend on the rows beside it."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely the scored tokens of a row are.

    Attributes:
        logprob: log p of all of them, each given the tokens before it, in nats: their sum in float64.
        greedy: whether each is the likeliest in its place.
    """

    logprob: float
    greedy: bool

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Likelihood:
        """The inverse of `asdict`. Raises: KeyError, TypeError, ValueError: it is none."""
        return cls(float(record["logprob"]), bool(record["greedy"]))


def likelihoods(model: Any, rows: Sequence[Encoded], pad_id: int, context: int) -> list[Likelihood]:
    """The likelihood of each row, under whatever adapter is active. The width of the pass that a row is in follows from
    its own length, so that in fp32 no bit of it depends on the other rows.

    Args:
        rows: each with a token that is scored, and at most as long as the model's context.
        pad_id: fills the rectangle.
        context: the most tokens of a row.
    """
    widths = [width_of(len(row.input_ids), context) for row in rows]
    found: dict[int, Likelihood] = {}
    for width in {*widths}:
        places = [i for i, one in enumerate(widths) if one == width]
        found |= zip(places, of_width(model, [rows[i] for i in places], pad_id, width), strict=True)
    return [found[i] for i in range(len(rows))]


def width_of(tokens: int, context: int) -> int:
    """The width of the pass for a row of so many tokens: `LEAST`, doubled as often as it takes."""
    width = LEAST
    while width < tokens:
        width *= 2
    return max(tokens, min(width, context))


@torch.no_grad()
def of_width(model: Any, rows: Sequence[Encoded], pad_id: int, width: int) -> list[Likelihood]:
    """The likelihoods of rows in one pass of this width, which a row of padding gives it."""
    device = next(model.parameters()).device
    ids, labels = [row.input_ids for row in rows], [row.labels for row in rows]
    if max(map(len, ids)) < width:
        ids, labels = [*ids, [pad_id] * width], [*labels, [IGNORED] * width]
    tokens, mask = pad(ids, pad_id).to(device), pad([[1] * len(row) for row in ids], 0).bool().to(device)
    picked = (pad(labels, IGNORED) != IGNORED).to(device)
    picked[:, 0] = False  # nothing stands before a first token
    logprobs, greedy = picked_likelihoods(model, tokens, mask, picked)
    counts = [row.trained for row in rows]
    parts = zip(logprobs.double().split(counts), greedy.split(counts), strict=True)
    return [Likelihood(of_row.sum().item(), bool(likeliest.all())) for of_row, likeliest in parts]


def picked_likelihoods(model: Any, tokens_BS: Tensor, mask_BS: Tensor, picked_BS: Tensor) -> tuple[Tensor, Tensor]:
    """log p of each picked token given the real tokens before it in its row, and whether it is the likeliest there: two
    [N], row by row.

    Args:
        picked_BS: real tokens, none of them a row's first.
    """
    targets_N = tokens_BS[picked_BS]
    if route_of(model).fast:
        with attention_by_width():
            states = hidden_states(model, tokens_BS, mask_BS)[:, :-1][picked_BS[:, 1:]]
        head = lm_head(model)
    else:
        _, logits_NV, places_N = states_and_logits(model, tokens_BS, mask_BS, picked_BS)
        states, head = logits_NV[places_N.argsort()], torch.nn.Identity()
    chunk = choose_chunk_rows(head(states[:1]).shape[-1], states.device)
    found = list[tuple[Tensor, Tensor]]()
    for part, targets in zip(states.split(chunk), targets_N.split(chunk), strict=True):
        logits = head(widened(part, (0, 0, 0, max(0, LEAST - len(part)))))[: len(part)].float()
        logprobs = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
        found.append((logprobs, logits.argmax(-1) == targets))
    logprobs, greedy = zip(*found, strict=True)
    return torch.cat(logprobs), torch.cat(greedy)


# The probes of a suite


class Reader(NamedTuple):
    """A system that reads here, and what it reads.

    Attributes:
        rows: of every task's items, one task behind another, the rows that are weighed; of a completion one row with
            its context, of which nothing is weighed; None of an item that is too long for the system.
    """

    system: System
    tokenizer: Any
    rows: Sequence[Sequence[Encoded] | None]


def measure_probes(sampling: Sampling, systems: Sequence[System], tasks: Tasks, folder: Path) -> dict[str, Scored]:
    """Measure the probes among the tasks: name of the task → what came of it.

    The model of each system computes here, whatever `rollout=` is; adapters on one base in one load of it, one after
    another.

    Args:
        systems: those that have a model.
        folder: where lm-eval's results are written.

    Raises:
        InputError: no item of a task fits; a row cannot be split into tokens; a system has no distribution.
    """
    asked = [(task, item) for task, items in tasks if task.probe is not None for item in items]
    if not asked:
        return {}
    readers = [build_reader(sampling, system, asked) for system in systems]
    fits = [all(reader.rows[i] is not None for reader in readers) for i in range(len(asked))]
    kept_by_task: dict[str, list[int]] = {task.name: [] for task, _ in asked}
    for i, (task, _) in enumerate(asked):
        if fits[i]:
            kept_by_task[task.name].append(i)
    probes = [(task, items, kept_by_task[task.name]) for task, items in tasks if task.probe is not None]
    for task, items, kept in probes:
        problem = f"is longer than the context of some system, for all {counted(len(items), 'item')}"
        remedy = "Give shorter rows; an answer's max_gen_toks count with its context."
        require(bool(kept), task.field, task.path or task.name, problem, remedy)
    weighed = weigh_rows(sampling, readers, asked, fits)
    completed = write_completions(sampling, readers, asked, fits)
    scored: dict[str, Scored] = {}
    for task, items, kept in probes:
        assert task.probe is not None
        of_task = [asked[i][1] for i in kept]
        if task.probe.harness is not None:
            from align.evals.suite.lm_eval import identify_results, score_by_lm_eval  # lm-eval is an extra

            given = {name: [completed[name].get(i) or rows[i] for i in kept] for name, rows in weighed.items()}
            computed_by = list_computing_versions(sampling.device)
            identities = {
                system.name: identify_results(system, identify_system(sampling, system), computed_by, of_task)
                for system in systems
            }
            part = score_by_lm_eval(task, of_task, given, identities, folder)
        else:
            said = {
                reader.system.name: [
                    read_weighed(task.probe, asked[i][1], reader.rows[i] or (), weighed[reader.system.name][i])
                    for i in kept
                ]
                for reader in readers
            }
            role = "exact" if task.probe.kind == CHOICE else "measured"
            part = Scored(task.name, BY[task.probe.kind], role, of_task, said)
        scored[task.name] = replace(part, dropped=len(items) - len(kept))
    return scored


def build_reader(sampling: Sampling, system: System, asked: Sequence[tuple[Task, Item]]) -> Reader:
    assert system.base is not None, "inputs() lets no such system pass"
    tokenizer = load_tokenizer(sampling, system)
    context = context_length(describe(system.base))
    window = max(min(context, sampling.max_length), 2)  # a token, and one before it
    return Reader(system, tokenizer, [encode_item(tokenizer, *each, context, window) for each in asked])


def encode_item(tokenizer: Any, task: Task, item: Item, context: int, window: int) -> list[Encoded] | None:
    """Return what is read of an item: each of its choices, its text in windows, or the context of a completion; None if
    one is too long.

    Args:
        context, window: the most tokens of a row, and of a window of text.
    """
    if isinstance(item.probe, str):
        rows = windows(tokenizer, item.probe, window)
        require(bool(rows), f"{task.field}, id", item.id, "has no token", "Leave the row out.")
        return rows
    if isinstance(item.probe, Completion):
        given = following(tokenizer, item.probe.context)
        return None if len(given) + item.probe.max_tokens > context else [behind(given, [])]
    if isinstance(item.probe, Requests):
        from align.evals.suite.lm_eval import encode_requests  # lm-eval is an extra

        rows = encode_requests(tokenizer, item.probe, window)
    elif isinstance(item.probe, Choices):
        assert task.probe is not None
        if task.probe.template:
            rows = [answered(tokenizer, item.prompt, text) for text in item.probe.texts]
        else:
            before = item.prompt.messages[-1].content
            rows = [continued(tokenizer, before, f" {text}") for text in item.probe.texts]
    else:
        assert item.probe is not None
        if surely_too_long(tokenizer, item.probe, context):
            return None
        rows = [encode_conversation(tokenizer, item.probe)]
        problem, remedy = "has no token that is trained on", "Give a conversation with an answer."
        require(rows[0].trained > 0, f"{task.field}, id", item.id, problem, remedy)
    return None if any(len(row.input_ids) > context for row in rows) else rows


def read_weighed(probe: Probe, item: Item, rows: Sequence[Encoded], likelihoods: Sequence[Likelihood]) -> Said:
    """Return what a system makes of an item, by the likelihood of each row."""
    logprobs = [one.logprob for one in likelihoods]
    if isinstance(item.probe, Choices):
        weighed = chosen(item.probe, logprobs)
        name = NORMS[probe.norm]
        return Said("", item.probe.texts[weighed[f"{name}_choice"]], weighed[name], weighed=weighed)
    assert isinstance(item.probe, str | Conversation)
    nats, size = -sum(logprobs), size_of(item.probe)
    weighed = {"nats": nats, "tokens": sum(row.trained for row in rows), "bytes": size}
    return Said("", "", -bits_per_byte(nats, size), weighed=weighed)


def weigh_rows(
    sampling: Sampling, readers: Sequence[Reader], asked: Sequence[tuple[Task, Item]], fits: Sequence[bool]
) -> dict[str, list[list[Likelihood]]]:
    """Return how likely each system finds each row, by its name; nothing of items that do not fit, or ask for an
    answer."""
    engine = " ".join(list_computing_versions(sampling.device))
    rows: dict[str, Encoded] = {}
    counts: list[list[int]] = []
    wanted: list[Wanted] = []
    for reader in readers:
        identity = identify_system(sampling, reader.system)
        identity.pop("tokenizer")
        keys: list[Weighed] = []
        counts.append([])
        for (_, item), of_item, fit in zip(asked, reader.rows, fits, strict=True):
            weighed = of_item if fit and of_item and not isinstance(item.probe, Completion) else []
            counts[-1].append(len(weighed))
            for row in weighed:
                key = Weighed(**identity, row=json_digest([row.input_ids, row.labels]), engine=engine)
                keys.append(key)
                rows[key.id] = row
        wanted.append(Wanted(reader.system, reader.tokenizer, keys))
    store = AnswerStore(sampling.root / FILE, Likelihood, TABLE)
    found = complete(store, wanted, "log-likelihoods", sampling.likelihoods, partial(weigh, sampling, rows))
    by_item = {}
    for reader, of_item, records in zip(readers, counts, found, strict=True):
        left = iter(records)
        by_item[reader.system.name] = [[*islice(left, count)] for count in of_item]
    return by_item


def weigh(sampling: Sampling, rows: Mapping[str, Encoded], group: Sequence[Wanted], keep: Keep) -> None:
    """Compute missing log-likelihoods of systems on one base; rows of like length together.

    Args:
        rows: by the id of their key.

    Raises:
        InputError: a log-likelihood is not finite.
    """
    actors = load_actors(sampling, [each.system for each in group])
    for each in group:
        assert each.system.base is not None
        context = context_length(describe(each.system.base))
        keys = sorted(each.keys, key=lambda key: len(rows[key.id].input_ids))
        size = sampling.batch_size
        batches = [keys[first : first + size] for first in range(0, len(keys), size)]
        with actors[each.system.name].use() as model:
            model.eval()
            compute = partial(weigh_batch, model=model, rows=rows, pad_id=each.tokenizer.pad_token_id, context=context)
            for records in share_batches(batches, compute):
                if any(not math.isfinite(likelihood.logprob) for _, likelihood in records):
                    problem = f"{each.system.field} finds a row's log-likelihood to be no number"
                    raise diverged(problem, None, sampling.dtype_setting)
                keep(records)


def weigh_batch(
    batch: Sequence[Weighed], model: Any, rows: Mapping[str, Encoded], pad_id: int, context: int
) -> list[Likelihood]:
    return likelihoods(model, [rows[key.id] for key in batch], pad_id, context)


def share_batches(
    batches: Sequence[Sequence[Any]], compute: Callable[[Sequence[Any]], Sequence[Any]]
) -> Iterator[list[tuple[Any, Any]]]:
    """Yield batches with what is computed of them, as many at a time as there are ranks, which share the work."""
    for first in range(0, len(batches), ranks.world_size()):
        share = batches[first : first + ranks.world_size()]
        results = ranks.gather_shares([compute(batch) for batch in ranks.own_share(share)], len(share))
        yield [pair for batch, of in zip(share, results, strict=True) for pair in zip(batch, of, strict=True)]


# The answers that tasks of lm-eval ask for


def write_completions(
    sampling: Sampling, readers: Sequence[Reader], asked: Sequence[tuple[Task, Item]], fits: Sequence[bool]
) -> dict[str, dict[int, Written]]:
    """Return system → place of an item that asks for an answer → the answer; nothing of items that do not fit. As in
    lm-eval, an answer ends with the EOS where it spells that out, too."""
    probes = {i: item.probe for i, (_, item) in enumerate(asked) if fits[i] and isinstance(item.probe, Completion)}
    engine = " ".join(["hf", *list_computing_versions(sampling.device)])
    wanted = []
    for reader in readers:
        assert reader.system.base is not None
        tokenizer = reader.tokenizer
        stop_ids = eos_token_ids(tokenizer, describe(reader.system.base).generation_config)
        eos = tokenizer.eos_token_id
        spelled = (tokenizer.decode(eos),) if eos is not None and tokenizer.decode(eos) else ()
        identity = identify_system(sampling, reader.system)
        keys = [
            Asked(
                **identity,
                prompt=tuple((reader.rows[i] or [])[0].input_ids),
                max_new_tokens=probe.max_tokens,
                temperature=0.0,
                stop_ids=stop_ids,
                seed=0,
                engine=engine,
                stops=(*probe.until, *spelled),
            )
            for i, probe in probes.items()
        ]
        wanted.append(Wanted(reader.system, tokenizer, keys))
    store = AnswerStore(sampling.root / FILE)
    answers = complete(store, wanted, "answers", sampling.answers, partial(write, sampling))
    return {
        each.system.name: dict(zip(probes, map(Written, each.keys, of_system), strict=True))
        for each, of_system in zip(wanted, answers, strict=True)
    }


def write(sampling: Sampling, group: Sequence[Wanted], keep: Keep) -> None:
    """Write missing completions of systems on one base.

    Raises:
        InputError: a system has no distribution to draw from.
    """
    actors = load_actors(sampling, [each.system for each in group])
    for each in group:
        complete_batch = partial(complete_texts, actor=actors[each.system.name], tokenizer=each.tokenizer)
        with divergence_as_input_error(each.system.field, None, sampling.dtype_setting):
            for records in share_batches(batch_by_length(each.keys, sampling.batch_size), complete_batch):
                keep(records)


def batch_by_length(asked: Sequence[Asked], size: int) -> list[list[Asked]]:
    """Return batches of answers that may be equally long, to prompts of like length."""
    ordered = sorted(asked, key=lambda one: (one.max_new_tokens, len(one.prompt)))
    parts = [[*part] for _, part in groupby(ordered, lambda one: one.max_new_tokens)]
    return [part[first : first + size] for part in parts for first in range(0, len(part), size)]


def complete_texts(batch: Sequence[Asked], actor: Actor, tokenizer: Any) -> list[Answer]:
    """Return the likeliest tokens behind each prompt, up to the one that ends the answer or completes a text that does.

    Args:
        batch: all with the same `max_new_tokens` and `stop_ids`.

    Raises:
        NonFiniteLogits: there is no likeliest token.
    """
    one = batch[0]
    engine = HfEngine(one.stop_ids, tokenizer.pad_token_id, one.max_new_tokens, 0.0, len(batch))
    ends = [StopFinder(TextDecoder(tokenizer, asked.stops, special=True)) for asked in batch]
    rollout = engine.generate([asked.prompt for asked in batch], actor, [0] * len(batch), ends)
    rows = zip(batch, response_ids(rollout), rollout.ended_B.tolist(), strict=True)
    return [Answer(tuple(ids), decode_answer(tokenizer, ids, asked.stops), ended) for asked, ids, ended in rows]


def decode_answer(tokenizer: Any, ids: Sequence[int], stops: Sequence[str]) -> str:
    """Return an answer as text without special tokens, before the first of the texts that end it. White space stays:
    metrics see it."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    for stop in stops:
        text = text.partition(stop)[0]
    return LONE_SURROGATE.sub("\ufffd", text)
