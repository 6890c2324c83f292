"""An artifact against what it started from, by a judge that it was not optimised against; several systems, or the judge
itself, where these are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from align.config.compose import plain
from align.config.eval import EvalConfig
from align.config.groups import DataConfig
from align.config.root import Config
from align.config.scorers import reward_spec
from align.config.suites import JUDGE
from align.data.chat.encode import Prompt, encode_prompts, prompt_room
from align.data.chat.template import use_template
from align.data.trained_ids import Seen
from align.evals import judges
from align.evals.collapse import (
    Collapse,
    SystemAnswers,
    collapse_lines,
    first_of_each_prompt,
    judge_closed_task,
    phrase_lines,
)
from align.evals.comparison import Sample, prompt_text, summarise, write_samples
from align.evals.llm_judge import collect_judge_usage
from align.models.actor import Actor, ModelActor
from align.models.adapter_pool import AdapterPool
from align.models.backbone import response_logprobs
from align.models.base import base_of
from align.models.chunks import in_chunks
from align.models.finite import diverged
from align.models.load import choose_device, choose_dtype, context_length, describe, load_base, own_tokenizer
from align.models.start import adapter_folder
from align.ops.finite import not_finite
from align.report import in_words
from align.report.words import counted
from align.reward.build import build, on_its_own_base
from align.reward.combined import comparable
from align.reward.inputs import models_of
from align.reward.scorer import Scorer
from align.rollout.answers_alone import asked_alone, empty_answers, parted_texts
from align.rollout.engine import Engine, cut_answers, divergence_as_input_error, greedily, response_texts
from align.rollout.randomness import row_seeds
from align.run import Artifact, Base, Manifest, Run, resolve, write_json
from align.stages import judge, suite
from align.stages.rollouts import engine_for
from align.stages.starting import start
from align.track import peak_rss_mb
from align.types import Conversation, Result, Rollout

ENOUGH = 64
"""Prompts: at 64, a win rate's 95 % interval is about 0.12 to each side of it."""


def run(run: Run, config: Config, *rows: Any) -> Result:
    with collect_judge_usage() as usage:
        result = evaluate(run, config, *rows)
    if not usage.asked:
        return result
    return replace(result, metrics={**result.metrics, "judge_usage": asdict(usage)})


def evaluate(run: Run, config: Config, *rows: Any) -> Result:
    if config.eval.measures == JUDGE:
        return judge.run(run, config, *rows)
    return suite.run(run, config, *rows) if config.stage.systems is not None else pair(run, config, *rows)


def pair(run: Run, config: Config, prompts: list[Conversation], seen: Seen, left_out: int) -> Result:
    """Compare the artifact with what it started from.

    Args:
        prompts: what both are asked.
        seen: what the artifact was trained on.
        left_out: number of prompts that are not asked because training saw them.
    """
    stage: EvalConfig = config.stage
    base = run.base
    artifact = start(config, run.inputs["artifact"].path, "artifact")[0]
    device = choose_device(config.device)
    tokenizer = own_tokenizer(artifact, base)
    use_template(tokenizer, config.data.template, config.data.template_kwargs)
    room = prompt_room(context_length(describe(base)), config.data.max_length, config.rollout.max_new_tokens)
    found, dropped = encode_prompts(tokenizer, prompts, room)

    policies = policies_of(run, config, artifact, base, device)
    answers, greedy, kl = sampled(run, config, policies, found, tokenizer, choose_dtype(config.dtype, device))

    judge = judges.title(run.manifest.config["reward"], run.inputs)
    root = config.run.folder
    models = models_of(run.inputs)
    of = judges.standing_of(artifact, judges.identities(run.manifest.config["reward"], run.inputs), root, models)
    made = (on_its_own_base(m, device, choose_dtype(config.dtype, device), 32) for m in models)
    texts = {who: response_texts(a, tokenizer) for who, a in answers.items()}
    hides = config.rollout.reasoning == "hide"
    read = {who: parted_texts(found, each, tokenizer, hides) for who, each in texts.items()}
    asked = [asked_alone(prompt) if hides else prompt.conversation for prompt in found]
    read_greedily = {
        who: parted_texts(found, response_texts(each, tokenizer), tokenizer, hides)[1] for who, each in greedy.items()
    }
    scorer = build(reward_spec(config.reward), made)
    samples = scored_samples(scorer, found, asked, answers, read, read_greedily, kl, seen)
    notes = of.sentences(judge) + asked_otherwise(run.inputs["artifact"].ref, artifact.manifest, config)
    notes += seen.unknown
    metrics = summarise(samples, of.role) | {
        "dropped": dropped,
        "judge": judge,
        "judge_is": of.role,
        "judge_notes": notes,
        **without_seen(samples, of.role),
        "seen_unknown": len(seen.unknown),
        "peak_rss_mb": peak_rss_mb(),
    }
    if is_closed(config):
        best_score = 1.0 if config.reward.name == "check" else None
        metrics["collapse"] = judge_closed(scorer, asked, samples, best_score).as_dict()
    collapse = Collapse(metrics["collapse"]["verdict"], tuple(metrics["collapse"]["reasons"]))
    won, risen = metrics["win_rate"], metrics["most_risen_word"]
    line = (
        f"win rate {in_words(won)} on {won['n']} prompts by {judge}, "
        f"{of.role} {metrics[of.role]['ref']:.3f} → {metrics[of.role]['policy']:.3f}, KL {metrics['kl']:.2f} nats, "
        f"distinct-2 {metrics['distinct2']['ref']:.3f} → {metrics['distinct2']['policy']:.3f}"
    )
    shares = f"{risen['ref']:.0%} → {risen['policy']:.0%}"
    ends = {who: sum(a.ended_B.tolist()) / len(found) for who, a in answers.items()}
    limit, whose = config.rollout.max_new_tokens, {"policy": "policy's ", "ref": "start's "}
    cut = [said for who, share in ends.items() for said in cut_answers(1 - share, limit, whose[who])]
    cut += [said for who in ends for said in empty_answers(metrics["empty_rate"][who], hides, whose[who])]
    write_samples(run.artifact / "samples.jsonl", samples)
    write_json(run.artifact / "metrics.json", metrics)
    lines = [
        *collapse_lines({"the policy": collapse}),
        line,
        f"the word that rose most: {risen['word']!r}, in {shares} of the answers",
        *phrase_lines(collapse, metrics["variety"]["greedy"]["new_phrase"], "start"),
        *cut,
        *notes,
    ]
    if "seen" in metrics:
        apart = metrics.get("unseen")
        others = f"; win rate {in_words(apart['win_rate'])} on the {apart['win_rate']['n']} others" if apart else ""
        lines.append(f"training saw {metrics['seen']:,} of these prompts{others}")
    if dropped:
        lines.append(f"not asked: {counted(dropped, 'prompt')} longer than {room} tokens")
    few = explain_few_prompts(len(found), config.data, stage.prompts, seen=left_out, too_long=dropped)
    return Result(metrics, (few, *lines) if few else tuple(lines))


def explain_few_prompts(measured: int, data: DataConfig, most: int, *, seen: int = 0, too_long: int = 0) -> str:
    """Return a sentence on an evaluation with fewer than `ENOUGH` prompts: that it decides nothing, and the setting
    that is the cause. Returns an empty text for a larger one.

    Args:
        measured: prompts that were asked.
        data: the settings of the data.
        most: `stage.prompts`.
        seen: prompts that were left out because training saw them.
        too_long: prompts that were left out because they are too long.
    """
    if measured >= ENOUGH:
        return ""
    before = measured + too_long
    if before == most:
        cause = f"stage.prompts={most} asks no more. Raise it"
    elif before == data.limit:
        cause = f"data.limit={data.limit} reads no more. Raise it, or leave it out"
    elif before >= ENOUGH:
        cause = (
            f"{counted(too_long, 'prompt')} did not fit. Raise data.max_length={data.max_length}, or lower "
            "rollout.max_new_tokens"
        )
    elif before + seen >= ENOUGH:
        cause = (
            f"stage.seen=drop left out {counted(seen, 'prompt')} that training saw. Measure on other prompts: "
            "data.eval_path=FILE"
        )
    else:
        cause = explain_small_data(data)
    return f"this result decides nothing: it is of {counted(measured, 'prompt')}, and {ENOUGH} are the least; {cause}"


def explain_small_data(data: DataConfig) -> str:
    """Return which setting of the data gives more prompts to measure on."""
    if data.eval_path is not None:
        return f"data.eval_path={data.eval_path} has no more. Give a larger file"
    if data.name == "manifest":
        return (
            f"the data set {data.path} holds out no more. Make it again with more held out (stage=data "
            "data.held_out=SHARE)"
        )
    if data.name == "annotations":
        return "the project's held-out questions are no more. Measure on a file: data=files data.path=FILE"
    return (
        f"data.held_out={data.held_out:g} holds out no more of {data.path or data.name}. Raise it before training "
        "(data.held_out=0.3), or measure on a file of its own: data.eval_path=FILE"
    )


def is_closed(config: Config) -> bool:
    """Return whether many prompts may share one right answer."""
    return config.reward.name == "check" if config.eval.closed is None else config.eval.closed


def judge_closed(
    scorer: Scorer, asked: Sequence[Conversation], samples: Sequence[Sample], best_score: float | None
) -> Collapse:
    """Compare the policy's greedy answers with the best constant answer, see `judge_closed_task`."""
    rows = first_of_each_prompt([prompt_text(sample.prompt) for sample in samples])
    policy = [samples[row].greedy_policy or "" for row in rows]
    ref = [samples[row].greedy_ref or "" for row in rows]

    def score(texts: Sequence[str]) -> list[float]:
        answers = [asked[row].answered(text) for row, text in zip(rows, texts, strict=True)]
        return scorer.score(answers).tolist()

    return judge_closed_task(score, SystemAnswers(policy, policy), SystemAnswers(ref, ref), best_score)


def asked_otherwise(ref: str, manifest: Manifest | None, config: Config) -> list[str]:
    """How the policy answers here under other settings than those that PPO optimised it under; nothing where it does
    not, or nobody says.

    Args:
        ref: what the user calls it.
        manifest: of the run that made it.
    """
    if manifest is None or manifest.stage != "ppo":
        return []
    trained, here = manifest.config["rollout"], plain(config)["rollout"]
    changed = [key for key in ("temperature", "max_new_tokens", "reasoning") if trained.get(key) != here[key]]
    told = (", ".join(f"rollout.{key}={values.get(key)}" for key in changed) for values in (trained, here))
    before, now = told
    return [f"{ref} was optimised with {before}, and answers here with {now}"] if changed else []


def without_seen(samples: Sequence[Sample], role: str) -> dict[str, Any]:
    """How many prompts training saw, and the figures that tell of a gain over the others; nothing where it saw none."""
    unseen = [sample for sample in samples if not sample.seen]
    if len(unseen) == len(samples):
        return {}
    found = summarise(unseen, role) if unseen else {}
    figures = {"unseen": {"win_rate": found["win_rate"], "gain": found[role]["difference"]}} if unseen else {}
    return {"seen": len(samples) - len(unseen), **figures}


class Policy(NamedTuple):
    """Who answers, and the base that they answer on, kept by a method."""

    actor: Actor
    base: Base
    method: str


def policies_of(run: Run, config: Config, artifact: Artifact, base: Base, device: torch.device) -> dict[str, Policy]:
    """`policy`, and `ref`, what it started from: two adapters on one base, or two whole models."""
    dtype, root, method = choose_dtype(config.dtype, device), Path(config.run.root), config.method.name
    started = resolve(run.inputs["init"].path, root, field_name="init") if "init" in run.inputs else None
    if artifact.whole:
        assert started is not None, "inputs() lets no such artifact pass"
        bases = {"ref": base_of(started, "init"), "policy": base}
        models = {who: load_base(found, "lora", device, dtype) for who, found in bases.items()}
        return {who: Policy(ModelActor(models[who]), found, "lora") for who, found in bases.items()}
    pool = AdapterPool(load_base(base, method, device, dtype))
    folders = {"ref": adapter_folder(started) if started else None, "policy": artifact.path}
    digests = {who: pool.add(folder) if folder else None for who, folder in folders.items()}
    return {who: Policy(pool.actor(digest), base, method) for who, digest in digests.items()}


def sampled(
    run: Run, config: Config, policies: dict[str, Policy], found: list[Prompt], tokenizer: Any, dtype: torch.dtype
) -> tuple[dict[str, Rollout], dict[str, Rollout], list[float]]:
    """Answer every prompt with each policy.

    Returns:
        One answer each, sampled as in training; the greedy answers; and the sequence KL of the policy's sampled
        answers, one sample each.
    """
    rollout = config.rollout
    answers: dict[str, Rollout] = {}
    greedy: dict[str, Rollout] = {}
    ref, rows = run.inputs["artifact"].ref, [p.input_ids for p in found]
    with ExitStack() as stack:
        engines: dict[str, Engine] = {}  # one a base
        for who, (actor, base, method) in policies.items():
            if base.digest not in engines:
                generation = describe(base).generation_config
                loaded = engine_for(run, config, base, method, dtype, tokenizer, generation)
                engines[base.digest] = stack.enter_context(loaded)
            name = f"artifact={ref}" if who == "policy" else f"what artifact={ref} started from"
            with divergence_as_input_error(name, None, config.dtype):
                engines[base.digest].sync(actor)
                seeds = row_seeds(range(len(found)), config.seed, "eval", who)
                answers[who] = engines[base.digest].generate(rows, actor, seeds)
                with greedily(engines[base.digest]):
                    greedy[who] = engines[base.digest].generate(rows, actor, seeds)
    logprobs = {who: sequence_logprobs(p.actor, answers["policy"], rollout.temperature) for who, p in policies.items()}
    for who, found_B in logprobs.items():
        if count := not_finite(found_B):
            raise diverged(f"{count} answers have logprobs that are no numbers under its {who}", None, config.dtype)
    return answers, greedy, (logprobs["policy"] - logprobs["ref"]).tolist()


@torch.no_grad()
def sequence_logprobs(actor: Actor, rollout: Rollout, temperature: float) -> torch.Tensor:
    """log p of each whole response [B], summed over its tokens."""
    with actor.use() as model:
        there = rollout.to(next(model.parameters()).device)
        return in_chunks(lambda part: response_logprobs(model, part, temperature)[0].sum(-1), there, 32)


def scored_samples(
    judge: Scorer,
    found: list[Prompt],
    asked: list[Conversation],
    answers: dict[str, Rollout],
    read: Mapping[str, tuple[Sequence[str | None], Sequence[str]]],
    greedy: Mapping[str, Sequence[str]],
    kl: list[float],
    seen: Seen,
) -> list[Sample]:
    """Both answers to every prompt with the judge's score of each; its learned parts are brought to one scale on the
    reference's.

    Args:
        asked: the prompts as the judge reads them.
        read: of each who answers, what the judge does not read of their answers, and what it reads.
        greedy: the greedy answers of each, as the judge would read them.
    """
    hidden, texts = {who: each[0] for who, each in read.items()}, {who: each[1] for who, each in read.items()}
    whole = {who: [c.answered(t) for c, t in zip(asked, each, strict=True)] for who, each in texts.items()}
    judge = comparable(judge, whole["ref"], answers["ref"])
    scores = {who: judge.score(conversations, answers[who]).tolist() for who, conversations in whole.items()}
    lengths = {who: a.lengths_B.tolist() for who, a in answers.items()}
    ended = {who: a.ended_B.tolist() for who, a in answers.items()}
    return [
        Sample(
            prompt.conversation.id or str(i), prompt.conversation.messages, texts["ref"][i], texts["policy"][i],
            scores["ref"][i], scores["policy"][i], lengths["ref"][i], lengths["policy"][i], ended["ref"][i],
            ended["policy"][i], kl[i], hidden["ref"][i], hidden["policy"][i],
            seen.asks(prompt.conversation.messages) or None, greedy["ref"][i], greedy["policy"][i],
        )
        for i, prompt in enumerate(found)
    ]  # fmt: skip
