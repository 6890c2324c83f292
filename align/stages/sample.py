"""Several answers a prompt, from where PPO will start, into the annotation store; or ranked by a reward (best-of-n)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from align import ranks
from align.annotate.store import Candidate, Store, storable
from align.config.root import Config
from align.config.sample import SampleConfig
from align.config.scorers import reward_spec
from align.core.errors import require
from align.core.types import Conversation, Result
from align.data.chat.encode import Prompt, encode_prompts, prompt_room
from align.data.chat.template import use_template
from align.data.sources import data_records
from align.models.start import adapter_folder, label
from align.report.figure_text import counted
from align.reward.inputs import check_rows
from align.run import Run, write_json
from align.stages.best_of_inputs import best_of_inputs
from align.stages.execution import tracker
from align.stages.rows import open_store, prompts_of, source_of
from align.stages.starting import Inputs, start
from align.track import last_turn, peak_rss_mb, progress, read_rows, shortened

PROMPTS_AT_ONCE = 64
MEANS = ("eos_rate", "mean_length", "empty_rate")
KEPT_BACK = {
    "all_empty": "whose answers are all empty", "all_equal": "whose answers are all equal",
    "with_tools": "with tools, which the annotation page does not show",
}  # fmt: skip
"""Metric → what is said of the prompts that it counts, which are not handed out: there is nothing to compare, or nobody
would see what they compare."""
SHOWN = 3
"""Prompts whose first answer is printed in the end."""


PRELOAD = ("align.models.adapter_pool", "align.stages.rollouts")
"""See `align.stages.load_stage`."""


def inputs(config: Config) -> Inputs:
    artifact, base, config = start(config)
    records = {"init": artifact.as_input(), **data_records(source_of(config))}
    records |= best_of_inputs(config, artifact, base) if config.stage.best_of else {}

    def rows() -> tuple[Any, ...]:
        (found,) = prompts_of(config, "train", config.stage.prompts)
        if config.stage.gold is not None:
            check_rows(reward_spec(config.stage.measured_by()), found)
        return (found,)

    return Inputs(config, label(base, config.method.name), base, records, rows)


def run(run: Run, config: Config, prompts: list[Conversation]) -> Result:
    from align.stages import best_of

    if config.stage.best_of is not None:
        return best_of.run(run, config, prompts)
    return for_people(run, config, prompts)


def for_people(run: Run, config: Config, prompts: list[Conversation]) -> Result:
    """Answers that the annotation store hands out."""

    from align.models.adapter_pool import AdapterPool
    from align.models.load import choose_device, choose_dtype, context_length, describe, load_base, own_tokenizer
    from align.rollout.engine import divergence_as_input_error, response_texts
    from align.rollout.randomness import row_seeds
    from align.rollout.strip_reasoning import empty, parted_texts, sample_row
    from align.stages.rollouts import engine_for

    stage: SampleConfig = config.stage
    base, artifact = run.base, start(config, run.inputs["init"].path)[0]
    device = choose_device(config.device)
    tokenizer = own_tokenizer(artifact, base)
    use_template(tokenizer, config.data.template, config.data.template_kwargs)
    room = prompt_room(context_length(describe(base)), config.data.max_length, config.rollout.max_new_tokens)
    found, dropped = encode_prompts(tokenizer, prompts, room)
    run.known_metrics = {"prompts": len(found), "dropped": dropped}
    method, dtype = config.method.name, choose_dtype(config.dtype, device)
    model = load_base(base, method, device, dtype)
    pool, adapter = AdapterPool(model, alone=True), adapter_folder(artifact)
    actor = pool.actor(pool.add(adapter) if adapter else None)
    print(f"{len(found)} prompts, {dropped} dropped as longer than {room} tokens; {stage.candidates} answers each")

    # A chunk is logged once the store has it, so that a resumed run goes on behind the last one it logged.
    limit, speaker = config.rollout.max_new_tokens, "" if artifact.whole else artifact.digest
    hides = config.rollout.reasoning == "hide"
    sampling = {"temperature": config.rollout.temperature, "max_new_tokens": limit, "seed": config.seed}
    logged = read_rows(run.folder / "metrics.jsonl") if run.resumed else []
    done = ranks.from_main(logged[-1]["step"] if logged else 0)
    bars = progress("sample", len(found), done)
    loaded = engine_for(run, config, base, method, dtype, tokenizer, model.generation_config)
    opened = open_store(config) if ranks.is_main() else nullcontext()
    with loaded as engine, opened as store, tracker(run, config, done) as track, bars as bar:
        engine.sync(actor)
        for first in range(done, len(found), PROMPTS_AT_ONCE):
            chunk = found[first : first + PROMPTS_AT_ONCE]
            rows = [(first + i, k) for i in range(len(chunk)) for k in range(stage.candidates)]
            asked = [found[i].input_ids for i, _ in rows]
            with divergence_as_input_error(f"init={run.inputs['init'].ref}", None, config.dtype):
                rollout = engine.generate(asked, actor, row_seeds(rows, config.seed, "sample"))
            if store is None:  # the first rank hands out
                bar.advance(first + len(chunk))
                continue
            texts, ends = response_texts(rollout, tokenizer), rollout.ended_B.tolist()
            reasoning, texts = parted_texts([found[i] for i, _ in rows], texts, tokenizer, hides)
            answers = [
                Candidate(storable(text), base.digest, speaker, {**sampling, "row": list(row)}, ended=bool(end))
                for row, text, end in zip(rows, texts, ends, strict=True)
            ]
            kept_back = hand_out(store, config, f"{run.name}/", first, chunk, answers)
            told = zip(rows, answers, reasoning, strict=True)
            samples = [sample_row(found[i].conversation, a.text, why, ended=a.ended) for (i, _), a, why in told]
            track.keep(first + len(chunk), samples)
            sums = sum(ends), float(rollout.lengths_B.sum()), sum(empty(answer.text) for answer in answers)
            means = {key: total / len(rows) for key, total in zip(MEANS, sums, strict=True)}
            track.log(first + len(chunk), {"answers": len(rows), **means, **kept_back})
            bar.advance(first + len(chunk), eos_rate=means["eos_rate"], length=means["mean_length"])
        if store is None:
            return Result({}, ())
        chunks = track.rows()
        somebody_can_rank(run, config, chunks, len(found))
        head = store.head(config.project)
    write_json(run.artifact / "ledger.json", {"project": config.project, "seq": head.seq, "hash": head.hash})
    return result_of(run, config, chunks)


def somebody_can_rank(run: Run, config: Config, chunks: Sequence[Mapping[str, Any]], prompts: int) -> None:
    """Raise where no prompt was handed out.

    Raises:
        InputError: all answers are empty, or those to each prompt are equal.
    """

    empty, equal, tools = (sum(row.get(why, 0) for row in chunks) for why in KEPT_BACK)
    prompts -= tools  # their answers are in samples.jsonl, for whoever wants them
    if not prompts:
        return
    remedy = f"What was said is in {run.folder / 'samples.jsonl'}."
    hides = config.rollout.reasoning == "hide"
    require(
        empty < prompts or not hides, "rollout.reasoning", "hide",
        "leaves nothing of any answer: no reasoning was ever closed",
        f"Raise rollout.max_new_tokens, or start from a policy that closes its reasoning. {remedy}",
    )  # fmt: skip
    require(
        empty + equal < prompts, "init", run.inputs["init"].ref, "gives each prompt the same answers, or empty ones",
        f"Raise rollout.temperature, or start from another policy. {remedy}",
    )  # fmt: skip


def result_of(run: Run, config: Config, chunks: Sequence[Mapping[str, Any]]) -> Result:
    """The figures, and what is printed.

    Args:
        chunks: rows of the metrics stream.
    """

    from align.rollout.engine import cut_answers
    from align.rollout.strip_reasoning import empty_answers

    answered = sum(row["answers"] for row in chunks)
    means = {k: sum(row["answers"] * row[k] for row in chunks) / answered for k in MEANS}
    back = {why: sum(row.get(why, 0) for row in chunks) for why in KEPT_BACK}
    metrics = {**run.known_metrics, "answers": answered, **means, **back, "peak_rss_mb": peak_rss_mb()}
    candidates, limit = config.stage.candidates, config.rollout.max_new_tokens
    shown = read_rows(run.folder / "samples.jsonl")[: SHOWN * candidates : candidates]
    lines = [f"  {shortened(last_turn(row))} → {shortened(row['answer'])}" for row in shown]
    cut = [
        *cut_answers(1 - means["eos_rate"], limit),
        *empty_answers(means["empty_rate"], config.rollout.reasoning == "hide"),
    ]
    prompts = run.known_metrics["prompts"]
    handed_out = prompts - sum(back.values())
    some = "" if handed_out == prompts else f", {handed_out} of them"
    line = f"{answered} answers to {prompts} prompts{some} in project {config.project}; all of them in samples.jsonl"
    return Result(metrics, (*lines, *cut, *said_of(back), line))


def hand_out(
    store: Store, config: Config, prefix: str, first: int, chunk: Sequence[Prompt], answers: Sequence[Candidate]
) -> dict[str, int]:
    """Put prompts with their answers into the annotation store; how many are kept back, and why.

    Args:
        prefix: of the items' keys, behind which stands a prompt's number.
        first: the number of the first of these prompts.
        answers: those to one prompt behind those to another.
    """

    from align.rollout.strip_reasoning import asked_alone

    count, kept_back = config.stage.candidates, dict.fromkeys(KEPT_BACK, 0)
    with store.transaction():
        for i, prompt in enumerate(chunk):
            mine = answers[i * count : (i + 1) * count]
            texts = {answer.text.strip() for answer in mine}
            if prompt.conversation.uses_tools:
                kept_back["with_tools"] += 1
                continue
            if len(texts) == 1:
                kept_back["all_empty" if texts == {""} else "all_equal"] += 1
                continue
            asked = asked_alone(prompt) if config.rollout.reasoning == "hide" else prompt.conversation
            store.add_item(config.project, f"{prefix}{first + i}", asked, mine)
    return kept_back


def said_of(kept_back: Mapping[str, int]) -> list[str]:
    """What is to be said of prompts that are kept back; nothing where none is."""
    told = [f"{counted(kept_back[key], 'prompt')} {what}" for key, what in KEPT_BACK.items() if kept_back[key]]
    return [f"not handed out to people: {', '.join(told)}"] if told else []
