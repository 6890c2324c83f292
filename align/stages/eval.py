"""An artifact against what it started from, by a judge that it was not optimised against."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from align.config.compose import plain
from align.config.eval import EvalConfig
from align.config.root import Config
from align.config.scorers import reward_spec
from align.data.chat import Prompt, encode_prompts
from align.data.sources import data_record, prompts
from align.data.template import use_template
from align.errors import InputError, MissingArtifact
from align.evals import judges
from align.evals.comparison import Sample, summarise, write_samples
from align.evals.heldout import same_split
from align.models.actor import Actor, ModelActor
from align.models.adapter_pool import AdapterPool
from align.models.backbone import response_logprobs
from align.models.base import base_of
from align.models.chunks import in_chunks
from align.models.finite import diverged
from align.models.load import choose_device, choose_dtype, context_length, describe, load_base, own_tokenizer
from align.models.start import BASE, adapter_folder, base_itself, find, label
from align.ops.finite import not_finite
from align.report import Report, histogram_pair, in_words
from align.rollout.engine import Engine, divergence_as_input_error, response_texts
from align.rollout.randomness import row_seeds
from align.rollout.registry import loaded_engine
from align.run import Artifact, Base, Input, Run, artifact_in, resolve, write_json
from align.run.lineage import made_in
from align.stages import Inputs, source_of, start
from align.track import peak_rss_mb
from align.types import Result, Rollout
from reward.build import build, on_its_own_base
from reward.combined import comparable
from reward.inputs import models_of, reward_inputs
from reward.scorer import Scorer

INIT = Config().init


def inputs(config: Config) -> Inputs:
    artifact, base, config = start(config, config.artifact, "artifact")
    reference = started_from(artifact, config)
    root = Path(config.run.root).expanduser()
    same_split(artifact, source_of(config), root)
    judge = reward_inputs(reward_spec(config.reward), root, base, None)
    reward = plain(config)["reward"]
    title = judges.title(reward, judge)
    of = judges.standing_of(artifact, judges.identities(reward, judge), root)
    judges.independent(of, title, artifact.ref, config.stage.allow_proxy)
    records = {"artifact": artifact.as_input(), "data": data_record(source_of(config)), **judge}
    if reference is not None:
        if not artifact.whole and base_of(reference, "init").digest != base.digest:
            raise InputError("init", reference.ref, f"is on another base than {artifact.ref}", "Name one on this base.")
        records["init"] = reference.as_input()
    return Inputs(config, label(base, config.method.name), base, records)


def started_from(artifact: Artifact, config: Config) -> Artifact | None:
    """What an artifact is measured against: what its run started from; None for one that started from the base."""
    root = Path(config.run.root).expanduser()
    named = partial(find, config.init, root, config.model.path, config.model.revision, "init")
    recorded = artifact.manifest.inputs.get("init") if artifact.manifest else None
    if recorded is not None:
        if recorded.ref == BASE:
            manifest = artifact.manifest
            found = base_itself(replace(artifact, base=manifest.base if manifest else None, whole=False))
        else:
            found = as_recorded(recorded, root)
        asked = named() if config.init != INIT else None
        if asked and asked.digest != found.digest:
            raise InputError(
                "init", config.init, f"{artifact.ref} was trained from {recorded.ref}, and is measured against that",
                "Drop init=.",
            )  # fmt: skip
        return found
    if artifact.manifest:
        if artifact.whole:
            raise InputError(
                "artifact", artifact.ref, "was trained to imitate, not to be preferred to anything",
                "Its held-out loss before and after is in its own report.",
            )  # fmt: skip
        return None
    return named()


def as_recorded(recorded: Input, root: Path) -> Artifact:
    """What an artifact started from, wherever it lies by now.

    Raises:
        MissingArtifact: it is gone, or something else lies there.
    """
    folder = made_in(recorded, root) if recorded.stage else Path(recorded.path)
    if folder is not None and folder.is_dir():
        found = artifact_in(folder, recorded.ref)
        if found.digest == recorded.digest:
            return found
    raise MissingArtifact(
        "init", recorded.ref, f"what the artifact started from ({recorded.digest[:12]}) is gone, or was changed",
        "Restore it, or evaluate an artifact whose start is there.",
    )  # fmt: skip


def run(run: Run, config: Config) -> Result:
    stage: EvalConfig = config.stage
    base = run.base
    artifact = start(config, run.inputs["artifact"].path, "artifact")[0]
    device = choose_device(config.device)
    tokenizer = own_tokenizer(artifact, base)
    use_template(tokenizer, config.data.template, config.data.template_kwargs)
    room = min(config.data.max_length, context_length(describe(base)) - config.rollout.max_new_tokens)
    found, dropped = encode_prompts(tokenizer, prompts(source_of(config), "test", config.seed)[: stage.prompts], room)

    policies = policies_of(run, config, artifact, base, device)
    answers, kl = sampled(run, config, policies, found, tokenizer, choose_dtype(config.dtype, device))

    judge = judges.title(run.manifest.config["reward"], run.inputs)
    root = Path(config.run.root).expanduser()
    of = judges.standing_of(artifact, judges.identities(run.manifest.config["reward"], run.inputs), root)
    made = (on_its_own_base(m, device, choose_dtype(config.dtype, device), 32) for m in models_of(run.inputs))
    texts = {who: response_texts(a, tokenizer) for who, a in answers.items()}
    samples = scored_samples(build(reward_spec(config.reward), made), found, answers, texts, kl)
    notes = of.sentences(judge)
    metrics = summarise(samples, of.role) | {
        "dropped": dropped,
        "judge": judge,
        "judge_is": of.role,
        "judge_notes": notes,
        "peak_rss_mb": peak_rss_mb(),
    }
    write_samples(run.artifact / "samples.jsonl", samples)
    write_json(run.artifact / "metrics.json", metrics)
    draw(run, config, samples, metrics, artifact.ref, notes)
    won, risen = metrics["win_rate"], metrics["most_risen_word"]
    line = (
        f"win rate {in_words(won)} on {won['n']} prompts by {judge}, "
        f"{of.role} {metrics[of.role]['ref']:.3f} → {metrics[of.role]['policy']:.3f}, KL {metrics['kl']:.2f} nats, "
        f"distinct-2 {metrics['distinct2']['ref']:.3f} → {metrics['distinct2']['policy']:.3f}"
    )
    shares = f"{risen['ref']:.0%} → {risen['policy']:.0%}"
    lines = [line, f"the word that rose most: {risen['word']!r}, in {shares} of the answers", *notes]
    if len(found) < stage.prompts:
        lines.append(f"{stage.prompts} prompts were asked for, {len(found)} are held out")
    return Result(metrics, tuple(lines))


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
) -> tuple[dict[str, Rollout], list[float]]:
    """One answer each, sampled as in training; and the sequence KL of the policy's answers, one sample each."""
    rollout, answers = config.rollout, {}
    sizes = rollout.max_new_tokens, rollout.temperature, rollout.batch_size
    ref, rows = run.inputs["artifact"].ref, [p.input_ids for p in found]
    with ExitStack() as stack:
        engines: dict[str, Engine] = {}  # one a base
        for who, (actor, base, method) in policies.items():
            if base.digest not in engines:
                generation = describe(base).generation_config
                loaded = loaded_engine(rollout.engine, base, method, dtype, tokenizer, generation, *sizes)
                engines[base.digest] = stack.enter_context(loaded)
            name = f"artifact={ref}" if who == "policy" else f"what artifact={ref} started from"
            with divergence_as_input_error(name, None, config.dtype):
                engines[base.digest].sync(actor)
                seeds = row_seeds(range(len(found)), config.seed, "eval", who)
                answers[who] = engines[base.digest].generate(rows, actor, seeds)
    logprobs = {who: sequence_logprobs(p.actor, answers["policy"], rollout.temperature) for who, p in policies.items()}
    for who, found_B in logprobs.items():
        if count := not_finite(found_B):
            raise diverged(f"{count} answers have logprobs that are no numbers under its {who}", None, config.dtype)
    return answers, (logprobs["policy"] - logprobs["ref"]).tolist()


@torch.no_grad()
def sequence_logprobs(actor: Actor, rollout: Rollout, temperature: float) -> torch.Tensor:
    """log p of each whole response [B], summed over its tokens."""
    with actor.use() as model:
        return in_chunks(lambda part: response_logprobs(model, part, temperature)[0].sum(-1), rollout, 32)


def scored_samples(
    judge: Scorer, found: list[Prompt], answers: dict[str, Rollout], texts: dict[str, list[str]], kl: list[float]
) -> list[Sample]:
    """Both answers to every prompt with the judge's score of each; its learned parts are brought to one scale on the
    reference's."""
    whole = {who: [p.conversation.answered(t) for p, t in zip(found, each, strict=True)] for who, each in texts.items()}
    judge = comparable(judge, whole["ref"], answers["ref"])
    scores = {who: judge.score(conversations, answers[who]).tolist() for who, conversations in whole.items()}
    lengths = {who: a.lengths_B.tolist() for who, a in answers.items()}
    ended = {who: a.ended_B.tolist() for who, a in answers.items()}
    return [
        Sample(
            prompt.conversation.id or str(i), prompt.conversation.messages, texts["ref"][i], texts["policy"][i],
            scores["ref"][i], scores["policy"][i], lengths["ref"][i], lengths["policy"][i], ended["ref"][i],
            ended["policy"][i], kl[i],
        )
        for i, prompt in enumerate(found)
    ]  # fmt: skip


def draw(run: Run, config: Config, samples: list[Sample], metrics: dict, ref: str, notes: list[str]) -> None:
    """The report: what the judge is to the policy, figures, distributions, and answers side by side."""
    role = metrics["judge_is"]
    called = "judge" if role == "gold" else role
    report = Report(f"eval: {run.name}", f"{ref} against what it started from; {called}: {metrics['judge']}")
    if notes:
        report.text("\n".join(f"- {sentence}" for sentence in notes))
    report.figures_table({key: value for key, value in metrics.items() if key != "judge_notes"})
    names = ("start", "policy")
    for values, xlabel, caption in (
        (
            ([s.score_ref for s in samples], [s.score_policy for s in samples]),
            f"{role} score",
            f"{role.capitalize()} score of the answers.",
        ),
        (([s.length_ref for s in samples], [s.length_policy for s in samples]), "tokens", "Length of the answers."),
    ):
        report.plot(histogram_pair(*values, names, xlabel), caption, f"histograms of {xlabel}, start and policy")
    rows = [
        ("\n".join(f"{m.role}: {m.content}" for m in s.prompt), s.ref, s.policy, s.score_ref, s.score_policy)
        for s in samples[: config.stage.shown]
    ]
    report.heading("Answers side by side").table(("prompt", "start", "policy", f"{role} start", f"{role} policy"), rows)
    report.write(run.folder / "report.html")
