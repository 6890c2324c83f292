"""The answers that tasks of lm-eval ask for: a text is continued by the likeliest tokens, up to a text that ends it.

The model of each system writes them here, whatever `rollout=` is; adapters on one base in one load of it, one after
another. They are kept beside the other answers (`align.rollout.kept`), batch by batch. The first rank keeps them;
several ranks share the batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from align import ranks
from align.config.root import Config
from align.data.chat.encode import eos_token_ids
from align.errors import LONE
from align.evals.harness import Completion
from align.evals.systems import System
from align.models.actor import Actor
from align.models.load import choose_device, choose_dtype, describe
from align.rollout.engine import divergence_as_input_error, response_ids
from align.rollout.hf import HfEngine
from align.rollout.kept import Answer, AnswerStore, Asked
from align.serve.detokenize import StopFinder, TextDecoder
from align.stages.suite_answers import Made, actors_of, answer_store, computed_by, speaks
from align.track import progress

ENGINE = "hf"


class Written(NamedTuple):
    """An answer, and all that decides it."""

    asked: Asked
    answer: Answer


class Writer(NamedTuple):
    """A system that writes here.

    Attributes:
        asked: of each completion all that decides the answer.
    """

    system: System
    tokenizer: Any
    asked: Sequence[Asked]


def writer_of(
    config: Config, system: System, tokenizer: Any, prompts: Sequence[Sequence[int]], asked: Sequence[Completion]
) -> Writer:
    """What a system is asked. As in lm-eval, an answer ends with the EOS where it spells that out, too.

    Args:
        prompts: the tokens of each context.
    """
    assert system.base is not None
    who, eos = speaks(config, system), tokenizer.eos_token_id
    stop_ids = eos_token_ids(tokenizer, describe(system.base).generation_config)
    spelled = tuple(text for text in (tokenizer.decode(id) for id in (eos,) if id is not None) if text)
    drawn_by = " ".join([ENGINE, *computed_by(choose_device(config.device))])
    each = [
        Asked(**who, prompt=tuple(ids), max_new_tokens=one.max_tokens, temperature=0.0,
              stop_ids=stop_ids, seed=0, engine=drawn_by, stops=(*one.until, *spelled))
        for ids, one in zip(prompts, asked, strict=True)
    ]  # fmt: skip
    return Writer(system, tokenizer, each)


def written_by(config: Config, writers: Sequence[Writer]) -> tuple[dict[str, list[Written]], Made]:
    """What each system writes, by its name.

    Raises:
        InputError: a system has no distribution to draw from.
    """
    every = {asked.id for writer in writers for asked in writer.asked}
    if not every:
        return {writer.system.name: [] for writer in writers}, Made(0, 0)
    store = answer_store(config)
    known: dict[str, Answer] = ranks.from_main(store.found(every) if ranks.is_main() else {})
    before, groups = len(known), dict[Any, list[Writer]]()
    for writer in writers:
        assert writer.system.base is not None
        groups.setdefault((writer.system.base.digest, writer.system.method), []).append(writer)
    with progress("answers", len(every), before) as bar:
        for group in groups.values():
            missing = {w.system.name: {a.id: a for a in w.asked if a.id not in known} for w in group}
            if any(missing.values()):
                write(config, group, missing, store, known, bar)
    found = {writer.system.name: [Written(a, known[a.id]) for a in writer.asked] for writer in writers}
    return found, Made(before, len(every) - before)


def write(
    config: Config, group: Sequence[Writer], missing: Mapping[str, Mapping[str, Asked]], store: AnswerStore,
    known: dict[str, Answer], bar: Any,
) -> None:  # fmt: skip
    """Make the answers that are missing, in one load of their base.

    Args:
        group: systems on one base.
        missing: system → by their ids, answers.
        store, known: where they are kept, and known by their id.
    """
    actors = actors_of(config, [w.system for w in group], choose_dtype(config.dtype, choose_device(config.device)))
    for writer in group:
        batches = batches_of([*missing[writer.system.name].values()], config.rollout.batch_size)
        for first in range(0, len(batches), ranks.world()):
            share = batches[first : first + ranks.world()]
            with divergence_as_input_error(writer.system.field, None, config.dtype):
                mine = [answers_to(batch, actors[writer.system.name], writer.tokenizer) for batch in ranks.dealt(share)]
            found = ranks.gathered(mine, len(share))
            made = [pair for batch, of in zip(share, found, strict=True) for pair in zip(batch, of, strict=True)]
            if ranks.is_main():
                store.add(made)
            known |= {asked.id: answer for asked, answer in made}
            bar.advance(len(known))


def batches_of(asked: Sequence[Asked], size: int) -> list[list[Asked]]:
    """Answers that may be as long as each other, to prompts of like length, so many at once."""
    ordered = sorted(asked, key=lambda one: (one.max_new_tokens, len(one.prompt)))
    parts = [[*part] for _, part in groupby(ordered, lambda one: one.max_new_tokens)]
    return [part[first : first + size] for part in parts for first in range(0, len(part), size)]


def answers_to(batch: Sequence[Asked], actor: Actor, tokenizer: Any) -> list[Answer]:
    """The likeliest tokens behind each prompt, up to the one that ends the answer or completes a text that does.

    Args:
        batch: all with the same `max_new_tokens` and `stop_ids`.

    Raises:
        NotFinite: there is no likeliest token.
    """
    one = batch[0]
    engine = HfEngine(one.stop_ids, tokenizer.pad_token_id, one.max_new_tokens, 0.0, len(batch))
    ends = [StopFinder(TextDecoder(tokenizer, asked.stops, special=True)) for asked in batch]
    rollout = engine.generate([asked.prompt for asked in batch], actor, [0] * len(batch), ends)
    rows = zip(batch, response_ids(rollout), rollout.ended_B.tolist(), strict=True)
    return [Answer(tuple(ids), text_of(tokenizer, ids, asked.stops), ended) for asked, ids, ended in rows]


def text_of(tokenizer: Any, ids: Sequence[int], stops: Sequence[str]) -> str:
    """An answer as text without special tokens, before the first of the texts that end it. White space stays: metrics
    see it."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    for stop in stops:
        text = text.partition(stop)[0]
    return LONE.sub("\ufffd", text)
