"""Several answers a prompt, from where PPO will start, into the annotation store."""

from __future__ import annotations

from typing import Any

from align.config.root import Config
from align.config.sample import SampleConfig
from align.data.chat import Prompt, encode_prompts, prompt_room
from align.data.template import use_template
from align.models.adapter_pool import AdapterPool
from align.models.load import choose_device, choose_dtype, context_length, describe, load_base, own_tokenizer
from align.models.start import adapter_folder
from align.rollout.answers_alone import texts_alone
from align.rollout.engine import cut_answers, divergence_as_input_error, response_texts
from align.rollout.randomness import row_seeds
from align.rollout.registry import loaded_engine
from align.run import Run, write_json
from align.stages import tracker
from align.stages.inputs import open_store, start
from align.track import peak_rss_mb, progress, read_rows, shortened
from align.types import Conversation, Result
from annotate.store import Candidate, storable

PROMPTS_AT_ONCE = 64
SHOWN = 3
"""Prompts whose first answer is printed in the end."""


def run(run: Run, config: Config, prompts: list[Conversation]) -> Result:
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
    sampling = {"temperature": config.rollout.temperature, "max_new_tokens": limit, "seed": config.seed}
    logged = read_rows(run.folder / "metrics.jsonl") if run.resumed else []
    done = logged[-1]["step"] if logged else 0
    bars = progress("sample", len(found), done)
    sizes = limit, config.rollout.temperature, config.rollout.batch_size
    loaded = loaded_engine(config.rollout.engine, base, method, dtype, tokenizer, model.generation_config, *sizes)
    with loaded as engine, open_store(config) as store, tracker(run, config, done) as track, bars as bar:
        engine.sync(actor)
        for first in range(done, len(found), PROMPTS_AT_ONCE):
            chunk = found[first : first + PROMPTS_AT_ONCE]
            rows = [(first + i, k) for i in range(len(chunk)) for k in range(stage.candidates)]
            asked = [found[i].input_ids for i, _ in rows]
            with divergence_as_input_error(f"init={run.inputs['init'].ref}", None, config.dtype):
                rollout = engine.generate(asked, actor, row_seeds(rows, config.seed, "sample"))
            texts, ends = response_texts(rollout, tokenizer), rollout.ended_B.tolist()
            if config.rollout.reasoning == "hide":
                texts = texts_alone([found[i] for i, _ in rows], texts, tokenizer)
            answers = [
                Candidate(storable(text), base.digest, speaker, {**sampling, "row": list(row)}, ended=bool(end))
                for row, text, end in zip(rows, texts, ends, strict=True)
            ]
            with store.transaction():
                for i, prompt in enumerate(chunk):
                    mine = answers[i * stage.candidates : (i + 1) * stage.candidates]
                    store.add_item(config.project, f"{run.name}/{first + i}", prompt.conversation, mine)
            track.keep(first + len(chunk), [sample_of(found[i], a) for (i, _), a in zip(rows, answers, strict=True)])
            figures = {"answers": len(rows), "eos_rate": sum(ends) / len(rows)}
            figures["mean_length"] = float(rollout.lengths_B.sum()) / len(rows)
            track.log(first + len(chunk), figures)
            bar.advance(first + len(chunk), eos_rate=figures["eos_rate"], length=figures["mean_length"])
        head, chunks = store.head(config.project), track.rows()

    answered = sum(row["answers"] for row in chunks)
    means = {k: sum(row["answers"] * row[k] for row in chunks) / answered for k in ("eos_rate", "mean_length")}
    metrics = {
        **run.known_metrics, "answers": answered, **means, "peak_rss_mb": peak_rss_mb(),
    }  # fmt: skip
    write_json(run.artifact / "ledger.json", {"project": config.project, "seq": head.seq, "hash": head.hash})
    shown = read_rows(run.folder / "samples.jsonl")[: SHOWN * stage.candidates : stage.candidates]
    lines = [f"  {shortened(row['prompt'])} → {shortened(row['answer'])}" for row in shown]
    cut = cut_answers(1 - means["eos_rate"], limit)
    line = f"{answered} answers to {len(found)} prompts in project {config.project}; all of them in samples.jsonl"
    return Result(metrics, (*lines, *cut, line))


def sample_of(prompt: Prompt, answer: Candidate) -> dict[str, Any]:
    """One line of `samples.jsonl`."""
    return {**prompt.conversation.as_sample(), "answer": answer.text, "ended": answer.ended}
