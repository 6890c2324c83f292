"""The probes of a suite: how likely every system finds choices and texts, and what it writes for tasks of lm-eval. What
was computed before is not computed again.

The model of each system computes this here, whatever `rollout=` is; adapters on one base in one load of it, one after
another. Log-likelihoods are kept beside the answers (`align.rollout.kept`), batch by batch. The first rank keeps them;
several ranks share the batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from align import ranks
from align.config.root import Config
from align.data.chat.continuations import answered, behind, continued, following, windows
from align.data.chat.encode import Encoded, encode_conversation, surely_too_long
from align.errors import require
from align.evals.harness import Completion, Requests
from align.evals.likelihoods import Likelihood, likelihoods
from align.evals.probes import BY, CHOICE, NORMS, Choices, Probe, bits_per_byte, chosen, size_of
from align.evals.results import Said, Scored
from align.evals.suite import Tasks
from align.evals.systems import System
from align.evals.tasks import Item, Task
from align.models.finite import diverged
from align.models.load import choose_device, choose_dtype, context_length, describe, name_of
from align.report.words import counted
from align.rollout.kept import FILE, AnswerStore, Weighed
from align.run import Run, json_digest
from align.stages.suite_answers import Made, actors_of, computed_by, tokenizer_of
from align.stages.suite_completions import Writer, Written, writer_of, written_by
from align.stages.suite_lm_eval import by_lm_eval, request_rows
from align.track import progress
from align.types import Conversation

TABLE = "likelihoods"


class Reader(NamedTuple):
    """A system that reads here, and what it reads.

    Attributes:
        rows: of every task's items, one task behind another, the rows that are weighed, or a row of which nothing is,
            the context of a completion; None of an item that is too long for the system.
    """

    system: System
    tokenizer: Any
    context: int
    rows: Sequence[Sequence[Encoded] | None]


def probed(run: Run, config: Config, systems: Sequence[System], tasks: Tasks) -> tuple[dict[str, Scored], Made, Made]:
    """The probes among the tasks, by name, how many log-likelihoods were computed, and how many answers were made.

    Raises:
        InputError: no item of a task fits; a row cannot be split into tokens; a system has no distribution.
    """
    asked = [(task, item) for task, items in tasks if task.probe is not None for item in items]
    if not asked:
        return {}, Made(0, 0), Made(0, 0)
    readers = [reader_of(config, system, asked) for system in systems]
    fits = [all(reader.rows[i] is not None for reader in readers) for i in range(len(asked))]
    places = dict[str, list[int]]()
    for i, (task, _) in enumerate(asked):
        places.setdefault(task.name, []).append(i)
    for task, items in tasks:
        problem = f"is longer than the context of some system, for all {counted(len(items), 'item')}"
        some = any(fits[i] for i in places.get(task.name, ()))
        remedy = "Give shorter rows; an answer's max_gen_toks count with its context."
        require(task.probe is None or some, task.field, task.path or task.name, problem, remedy)
    weighed, made = weighed_by(config, readers, asked, fits)
    written, answers = completions(config, readers, asked, fits)
    found = dict[str, Scored]()
    for name, those in places.items():
        kept, probe = [i for i in those if fits[i]], asked[those[0]][0].probe
        assert probe is not None
        if probe.harness is not None:
            which = {
                name: [written[name].get(i) or of[i] for i in kept] for name, of in weighed.items()
            }  # fmt: skip
            part = by_lm_eval(run, config, systems, asked[those[0]][0], [asked[i][1] for i in kept], which)
            found[name] = replace(part, dropped=len(those) - len(kept))
            continue
        said = {
            reader.system.name: [
                said_of(probe, asked[i][1], reader.rows[i] or (), weighed[reader.system.name][i]) for i in kept
            ]
            for reader in readers
        }
        role, items = "exact" if probe.kind == CHOICE else "measured", [asked[i][1] for i in kept]
        found[name] = Scored(name, BY[probe.kind], role, items, said, dropped=len(those) - len(kept))
    return found, made, answers


def completions(
    config: Config, readers: Sequence[Reader], asked: Sequence[tuple[Task, Item]], fits: Sequence[bool]
) -> tuple[dict[str, dict[int, Written]], Made]:
    """System → place of an item that asks for an answer → the answer; nothing of items that do not fit."""
    those = {i: item.probe for i, (_, item) in enumerate(asked) if fits[i] and isinstance(item.probe, Completion)}
    writers = list[Writer]()
    for reader in readers:
        prompts = [row.input_ids for i in those for row in reader.rows[i] or ()]
        writers.append(writer_of(config, reader.system, reader.tokenizer, prompts, [*those.values()]))
    found, made = written_by(config, writers)
    return {name: dict(zip(those, of, strict=True)) for name, of in found.items()}, made


def reader_of(config: Config, system: System, asked: Sequence[tuple[Task, Item]]) -> Reader:
    assert system.base is not None, "inputs() lets no such system pass"
    tokenizer, context = tokenizer_of(config, system), context_length(describe(system.base))
    window = max(min(context, config.data.max_length), 2)  # a token, and one before it
    rows = [rows_of(tokenizer, task, item, context, window) for task, item in asked]
    return Reader(system, tokenizer, context, rows)


def rows_of(tokenizer: Any, task: Task, item: Item, context: int, window: int) -> list[Encoded] | None:
    """What is read of an item: each of its choices, its text in windows, or the context of a completion; None where
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
        rows = request_rows(tokenizer, item.probe, window)
    elif isinstance(item.probe, Choices):
        assert task.probe is not None
        rows = choice_rows(tokenizer, task.probe, item, item.probe)
    else:
        assert item.probe is not None
        if surely_too_long(tokenizer, item.probe, context):
            return None
        rows = [encode_conversation(tokenizer, item.probe)]
        problem, remedy = "has no token that is trained on", "Give a conversation with an answer."
        require(rows[0].trained > 0, f"{task.field}, id", item.id, problem, remedy)
    return None if any(len(row.input_ids) > context for row in rows) else rows


def choice_rows(tokenizer: Any, probe: Probe, item: Item, asked: Choices) -> list[Encoded]:
    if probe.template:
        return [answered(tokenizer, item.prompt, text) for text in asked.texts]
    context = item.prompt.messages[-1].content
    return [continued(tokenizer, context, f" {text}") for text in asked.texts]


def said_of(probe: Probe, item: Item, rows: Sequence[Encoded], found: Sequence[Likelihood]) -> Said:
    """What a system makes of an item.

    Args:
        found: of each row.
    """
    logprobs = [one.logprob for one in found]
    if isinstance(item.probe, Choices):
        weighed = chosen(item.probe, logprobs)
        name = NORMS[probe.norm]
        return Said("", item.probe.texts[weighed[f"{name}_choice"]], weighed[name], weighed=weighed)
    assert isinstance(item.probe, str | Conversation)
    nats, size = -sum(logprobs), size_of(item.probe)
    weighed = {"nats": nats, "tokens": sum(row.trained for row in rows), "bytes": size}
    return Said("", "", -bits_per_byte(nats, size), weighed=weighed)


def weighed_by(
    config: Config, readers: Sequence[Reader], items: Sequence[tuple[Task, Item]], fits: Sequence[bool]
) -> tuple[dict[str, list[list[Likelihood]]], Made]:
    """How likely each system finds each row, by its name; nothing of items that do not fit, or ask for an answer."""
    fits = [fit and not isinstance(item.probe, Completion) for (_, item), fit in zip(items, fits, strict=True)]
    device = choose_device(config.device)
    dtype, engine = choose_dtype(config.dtype, device), " ".join(computed_by(device))
    rows = {
        reader.system.name: [
            [(weighed_of(reader.system, row, dtype, engine), row) for row in of or ()] if fit else []
            for of, fit in zip(reader.rows, fits, strict=True)
        ]
        for reader in readers
    }
    every = {asked.id for of_system in rows.values() for of_item in of_system for asked, _ in of_item}
    if not every:
        return {name: [[] for _ in of_system] for name, of_system in rows.items()}, Made(0, 0)
    store = AnswerStore(config.run.folder / FILE, Likelihood, TABLE)
    known: dict[str, Likelihood] = ranks.from_main(store.found(every) if ranks.is_main() else {})
    before, groups = len(known), dict[Any, list[Reader]]()
    for reader in readers:
        assert reader.system.base is not None
        groups.setdefault((reader.system.base.digest, reader.system.method), []).append(reader)
    with progress("log-likelihoods", len(every), before) as bar:
        for group in groups.values():
            missing = {
                reader.system.name: {a.id: (a, row) for of in rows[reader.system.name] for a, row in of
                                     if a.id not in known}
                for reader in group
            }  # fmt: skip
            if any(missing.values()):
                weigh(config, group, missing, store, known, bar)
    found = {name: [[known[a.id] for a, _ in of] for of in of_system] for name, of_system in rows.items()}
    return found, Made(before, len(every) - before)


def weighed_of(system: System, row: Encoded, dtype: torch.dtype, engine: str) -> Weighed:
    """All that decides how likely a system finds a row."""
    assert system.base is not None
    assert system.artifact is not None
    adapter = "" if system.artifact.whole else system.artifact.digest
    digest = json_digest([row.input_ids, row.labels])
    return Weighed(system.base.digest, adapter, system.method, name_of(dtype), digest, engine)


def weigh(
    config: Config, group: Sequence[Reader], missing: Mapping[str, Mapping[str, tuple[Weighed, Encoded]]],
    store: AnswerStore, known: dict[str, Likelihood], bar: Any,
) -> None:  # fmt: skip
    """Compute the log-likelihoods that are missing, in one load of their base; rows of like length together.

    Args:
        group: systems on one base.
        missing: system → by their ids, rows.
        store, known: where they are kept, and known by their id.
    """
    size = config.rollout.batch_size
    actors = actors_of(config, [r.system for r in group], choose_dtype(config.dtype, choose_device(config.device)))
    for reader in group:
        wanted = sorted(missing[reader.system.name].values(), key=lambda one: len(one[1].input_ids))
        batches = [wanted[first : first + size] for first in range(0, len(wanted), size)]
        with actors[reader.system.name].use() as model:
            model.eval()
            for first in range(0, len(batches), ranks.world()):
                share = batches[first : first + ranks.world()]
                pad_id = reader.tokenizer.pad_token_id
                mine = [
                    likelihoods(model, [row for _, row in batch], pad_id, reader.context)
                    for batch in ranks.dealt(share)
                ]
                found = ranks.gathered(mine, len(share))
                made = [(a, one) for batch, of in zip(share, found, strict=True)
                        for (a, _), one in zip(batch, of, strict=True)]  # fmt: skip
                check_finite(config, reader.system, [one for _, one in made])
                if ranks.is_main():
                    store.add(made)
                known |= {a.id: one for a, one in made}
                bar.advance(len(known))


def check_finite(config: Config, system: System, found: Sequence[Likelihood]) -> None:
    """Raises: InputError: a log-likelihood is no number."""
    if any(not math.isfinite(one.logprob) for one in found):
        raise diverged(f"{system.field} finds a row's log-likelihood to be no number", None, config.dtype)
