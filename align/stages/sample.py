"""Several answers a prompt, from where PPO will start: into the annotation store, for people to rank; or ranked by a
reward (`stage.best_of=N`). The best answers then become rows for stage=sft (rejection sampling), the best and the worst
pairs for stage=dpo or stage=reward.

    for each chunk of prompts:
        several answers to each from the policy; of best-of-n a score for each; they go to samples.jsonl
    people: the store hands them out; best-of-n: winners, pairs and figures are read off samples.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from align import ranks
from align.annotate.store import Candidate, Store, storable
from align.config.root import Config, to_plain_dict
from align.config.sample import SampleConfig
from align.config.scorers import build_reward_spec
from align.config.settings import replace_values
from align.core.errors import InputError, require
from align.core.files import open_text
from align.core.types import Conversation, Rollout, StageResult
from align.data.chat.encode import Prompt, encode_prompts, prompt_room
from align.data.read.records import write_preferences
from align.data.sources import DataSource, build_data_inputs
from align.data.sources import read_source_prompts as read_prompts
from align.evals.judges.identity import list_scorer_parts, scorer_title
from align.models.base import adapter_folder, frozen_method, label
from align.models.lora import Lora
from align.report.figure_text import counted, in_words
from align.reward.inputs import (
    check_reasoning_matches,
    check_rows,
    load_reward_artifacts,
    reward_inputs,
    select_on_base,
)
from align.run import Artifact, Base, Input, Run, write_json, write_text
from align.stages.runner import Inputs, find_start, load_start, open_rollout_engine, open_store, open_tracker
from align.track import (
    format_last_turn,
    format_row,
    get_peak_memory,
    get_peak_rss_mb,
    read_rows,
    show_progress,
    truncate_text,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from align.evals.best_of import Tally
    from align.models.actors import Actor
    from align.reward.scorer import Scorer
    from align.rollout.engine import Engine
    from align.rollout.strip_reasoning import Judged

PROMPTS_AT_ONCE = 64
MEANS = ("eos_rate", "mean_length", "empty_rate")
KEPT_BACK = {
    "all_empty": "whose answers are all empty",
    "all_equal": "whose answers are all equal",
    "with_tools": "with tools, which the annotation page does not show",
}
"""Metric → what is said of the prompts that it counts, which are not handed out to people."""
SHOWN = 3
"""Prompts whose first answer is printed in the end."""
ANSWERS_AT_ONCE = 1024
"""Answers of best-of-n that are in memory at a time; at least those to one prompt."""
SCORED_AT_ONCE = 32
CALIBRATED_ON = 64
"""Prompts whose answers bring the learned members of an ensemble or a sum to one scale."""
GOLD = "gold."
"""The beginning of the names of the inputs of the reward that measures."""
PRELOAD = ("align.models.actors", "align.rollout.registry")
"""See `align.stages.load_stage`."""


def inputs(config: Config) -> Inputs:
    artifact, base, config = find_start(config)
    stage: SampleConfig = config.stage
    source = DataSource.from_settings(config.data)
    records = {"init": artifact.as_input(), **build_data_inputs(source)}
    records |= find_rewards(config, artifact, base) if stage.best_of else {}

    def rows() -> tuple[Any, ...]:
        prompts = read_prompts(source, "train", config.seed)[: stage.prompts]
        check_rows(build_reward_spec(config.reward), prompts)
        if stage.gold is not None:
            check_rows(build_reward_spec(stage.parse_gold()), prompts)
        return (prompts,)

    return Inputs(config, label(base, config.method.name), base, records, rows)


def find_rewards(config: Config, policy: Artifact, base: Base) -> dict[str, Input]:
    """Return the models and functions of the reward that ranks, and of the one that measures, as inputs of the run.

    Raises:
        MissingArtifact: a reward model is not there yet.
        InputError: something is no reward, or what measures also ranks.
    """
    root = config.run.folder
    ranking = reward_inputs(build_reward_spec(config.reward), root, base, policy, config.method.name)
    check_reasoning_matches(load_reward_artifacts(ranking), config.rollout.reasoning)
    if config.stage.gold is None:
        return ranking
    measuring = reward_inputs(build_reward_spec(config.stage.parse_gold()), root, base)
    check_reasoning_matches(load_reward_artifacts(measuring), config.rollout.reasoning)
    gold = gold_settings(config)
    if list_scorer_parts(gold, measuring) & list_scorer_parts(to_plain_dict(config)["reward"], ranking):
        problem = "also ranks the answers: its score of the best one says nothing of quality"
        remedy = "Measure by another reward, or drop it."
        raise InputError("stage.gold", scorer_title(gold, measuring), problem, remedy)
    return {**ranking, **{f"{GOLD}{name}": record for name, record in measuring.items()}}


def gold_settings(config: Config) -> Mapping[str, Any]:
    """Return the reward that measures, as a manifest would have it as `reward`."""
    return to_plain_dict(replace_values(config, reward=config.stage.parse_gold()))["reward"]


def gold_inputs(run: Run) -> dict[str, Input]:
    """Return the inputs of the reward that measures, by the names that a reward's have."""
    return {name.removeprefix(GOLD): record for name, record in run.inputs.items() if name.startswith(GOLD)}


def run(run: Run, config: Config, prompts: list[Conversation]) -> StageResult:
    return rank_answers(run, config, prompts) if config.stage.best_of is not None else hand_out(run, config, prompts)


def encode_for(run: Run, config: Config, tokenizer: Any, prompts: Sequence[Conversation]) -> tuple[list[Prompt], str]:
    """Return the prompts that fit, as tokens, and a sentence on those that do not."""
    from align.models.load import context_length, describe

    room = prompt_room(context_length(describe(run.base)), config.data.max_length, config.rollout.max_new_tokens)
    encoded, dropped = encode_prompts(tokenizer, prompts, room)
    run.known_metrics = {"prompts": len(encoded), "dropped": dropped}
    return encoded, f"{len(encoded)} prompts, {dropped} dropped as longer than {room} tokens"


def summarize_chunks(chunks: Sequence[Mapping[str, Any]]) -> tuple[int, dict[str, float]]:
    """Return how many answers there are, and their means, from the rows of the metrics stream."""
    answers = sum(row["answers"] for row in chunks)
    return answers, {key: sum(row["answers"] * row[key] for row in chunks) / answers for key in MEANS}


def describe_flawed(config: Config, means: Mapping[str, float]) -> list[str]:
    """Return sentences on answers that were cut, and on empty ones, if there are many."""
    from align.rollout.engine import cut_answers
    from align.rollout.strip_reasoning import empty_answers

    return [
        *cut_answers(1 - means["eos_rate"], config.rollout.max_new_tokens),
        *empty_answers(means["empty_rate"], config.rollout.reasoning == "hide"),
    ]


# Answers for people


def hand_out(run: Run, config: Config, prompts: list[Conversation]) -> StageResult:
    """Put several answers to each prompt into the annotation store."""
    from align.models.actors import AdapterPool
    from align.models.load import choose_device, choose_dtype, load_base
    from align.rollout.engine import divergence_as_input_error, response_texts, row_seeds
    from align.rollout.strip_reasoning import empty, parted_texts, sample_row

    stage: SampleConfig = config.stage
    base = run.base
    artifact, tokenizer = load_start(run, config)
    device = choose_device(config.device)
    encoded, fitting = encode_for(run, config, tokenizer, prompts)
    method = config.method.name
    model = load_base(base, method, device, choose_dtype(config.dtype, device))
    pool = AdapterPool(model, alone=True)
    adapter = adapter_folder(artifact)
    actor = pool.actor(pool.add(adapter) if adapter else None)
    print(f"{fitting}; {stage.candidates} answers each")

    # A chunk is logged once the store has it, so that a resumed run goes on after the last one it logged.
    limit = config.rollout.max_new_tokens
    speaker = "" if artifact.whole else artifact.digest
    hides = config.rollout.reasoning == "hide"
    sampling = {"temperature": config.rollout.temperature, "max_new_tokens": limit, "seed": config.seed}
    logged = read_rows(run.folder / "metrics.jsonl") if run.resumed else []
    done = ranks.broadcast(logged[-1]["step"] if logged else 0)
    opened_engine = open_rollout_engine(run, config, base, method, tokenizer, model.generation_config)
    opened_store = open_store(config) if ranks.is_main() else nullcontext()
    bars = show_progress("sample", len(encoded), done)
    with opened_engine as engine, opened_store as store, open_tracker(run, done) as track, bars as bar:
        engine.sync(actor)
        for first in range(done, len(encoded), PROMPTS_AT_ONCE):
            chunk = encoded[first : first + PROMPTS_AT_ONCE]
            rows = [(first + i, k) for i in range(len(chunk)) for k in range(stage.candidates)]
            asked = [encoded[i].input_ids for i, _ in rows]
            with divergence_as_input_error(f"init={run.inputs['init'].ref}", None, config.dtype):
                rollout = engine.generate(asked, actor, row_seeds(rows, config.seed, "sample"))
            if store is None:  # the first rank hands out
                bar.advance(first + len(chunk))
                continue
            texts = response_texts(rollout, tokenizer)
            ends = rollout.ended_B.tolist()
            reasoning, texts = parted_texts([encoded[i] for i, _ in rows], texts, tokenizer, hides)
            answers = [
                Candidate(storable(text), base.digest, speaker, {**sampling, "row": list(row)}, ended=bool(end))
                for row, text, end in zip(rows, texts, ends, strict=True)
            ]
            kept_back = add_items(store, config, f"{run.name}/", first, chunk, answers)
            samples = [
                sample_row(encoded[i].conversation, answer.text, why, ended=answer.ended)
                for (i, _), answer, why in zip(rows, answers, reasoning, strict=True)
            ]
            track.keep(first + len(chunk), samples)
            sums = sum(ends), float(rollout.lengths_B.sum()), sum(empty(answer.text) for answer in answers)
            means = {key: total / len(rows) for key, total in zip(MEANS, sums, strict=True)}
            track.log(first + len(chunk), {"answers": len(rows), **means, **kept_back})
            bar.advance(first + len(chunk), eos_rate=means["eos_rate"], length=means["mean_length"])
        if store is None:
            return StageResult({}, ())
        chunks = track.rows()
        require_items(run, config, chunks)
        head = store.head(config.project)
    write_json(run.artifact / "ledger.json", {"project": config.project, "seq": head.seq, "hash": head.hash})

    answered, means = summarize_chunks(chunks)
    kept_back = {why: sum(row.get(why, 0) for row in chunks) for why in KEPT_BACK}
    metrics = {**run.known_metrics, "answers": answered, **means, **kept_back, "peak_rss_mb": get_peak_rss_mb()}
    shown = read_rows(run.folder / "samples.jsonl")[: SHOWN * stage.candidates : stage.candidates]
    lines = [f"  {truncate_text(format_last_turn(row))} → {truncate_text(row['answer'])}" for row in shown]
    handed_out = len(encoded) - sum(kept_back.values())
    some = "" if handed_out == len(encoded) else f", {handed_out} of them"
    line = (
        f"{answered} answers to {len(encoded)} prompts{some} in project {config.project}; all of them in samples.jsonl"
    )
    return StageResult(metrics, (*lines, *describe_flawed(config, means), *describe_kept_back(kept_back), line))


def require_items(run: Run, config: Config, chunks: Sequence[Mapping[str, Any]]) -> None:
    """Raise InputError if no prompt was handed out: all answers are empty, or those to each prompt are equal."""
    empty, equal, tools = (sum(row.get(why, 0) for row in chunks) for why in KEPT_BACK)
    prompts = run.known_metrics["prompts"] - tools
    if not prompts:
        return
    remedy = f"What was said is in {run.folder / 'samples.jsonl'}."
    problem = "leaves nothing of any answer: no reasoning was ever closed"
    longer = f"Raise rollout.max_new_tokens, or start from a policy that closes its reasoning. {remedy}"
    require(empty < prompts or config.rollout.reasoning != "hide", "rollout.reasoning", "hide", problem, longer)
    problem = "gives each prompt the same answers, or empty ones"
    other = f"Raise rollout.temperature, or start from another policy. {remedy}"
    require(empty + equal < prompts, "init", run.inputs["init"].ref, problem, other)


def add_items(
    store: Store, config: Config, prefix: str, first: int, chunk: Sequence[Prompt], answers: Sequence[Candidate]
) -> dict[str, int]:
    """Put prompts with their answers into the annotation store. Returns how many are kept back, and why.

    Args:
        prefix: of the items' keys, followed by a prompt's number.
        first: the number of the first of these prompts.
        answers: those to one prompt after those to another.
    """
    from align.rollout.strip_reasoning import asked_alone

    count = config.stage.candidates
    kept_back = dict.fromkeys(KEPT_BACK, 0)
    with store.transaction():
        for i, prompt in enumerate(chunk):
            own = answers[i * count : (i + 1) * count]
            texts = {answer.text.strip() for answer in own}
            if prompt.conversation.uses_tools:
                kept_back["with_tools"] += 1
            elif len(texts) == 1:
                kept_back["all_empty" if texts == {""} else "all_equal"] += 1
            else:
                asked = asked_alone(prompt) if config.rollout.reasoning == "hide" else prompt.conversation
                store.add_item(config.project, f"{prefix}{first + i}", asked, own)
    return kept_back


def describe_kept_back(kept_back: Mapping[str, int]) -> list[str]:
    """Return a sentence on the prompts that are kept back; none if there are none."""
    parts = [f"{counted(kept_back[key], 'prompt')} {what}" for key, what in KEPT_BACK.items() if kept_back[key]]
    return [f"not handed out to people: {', '.join(parts)}"] if parts else []


# Best-of-n


@dataclass(frozen=True)
class RankedSampling:
    """What answers, and what scores the answers.

    Attributes:
        prompts: as they are asked.
        read: prompts, answers as texts and tokens → what the scorers read of them.
        scorers: `score` ranks; `gold` measures, if there is `stage.gold`.
    """

    prompts: Sequence[Prompt]
    tokenizer: Any
    device: torch.device
    engine: Engine
    actor: Actor
    read: Any
    scorers: Mapping[str, Scorer]

    def answer(self, rows: Sequence[tuple[int, int]], seed: int, *where: str) -> tuple[Rollout, Judged]:
        """Return the answers of these rows, each the number of a prompt and of an answer to it."""
        from align.rollout.engine import response_texts, row_seeds

        asked = [self.prompts[i] for i, _ in rows]
        seeds = row_seeds(rows, seed, *where)
        rollout = self.engine.generate([p.input_ids for p in asked], self.actor, seeds).to(self.device)
        return rollout, self.read(asked, response_texts(rollout, self.tokenizer), rollout)

    def calibrate(self, seed: int) -> RankedSampling:
        """Return the same with the learned members of ensembles and sums on one scale for answers of the policy. A
        resumed run draws the same answers again."""
        from align.reward.combined import Ensemble, Sum, standardise_members

        if not any(isinstance(scorer, Ensemble | Sum) for scorer in self.scorers.values()):
            return self
        rows = [(i, 0) for i in range(min(CALIBRATED_ON, len(self.prompts)))]
        _, judged = self.answer(rows, seed, "normalise")
        scaled = {
            name: standardise_members(scorer, judged.conversations, judged.rollout)
            for name, scorer in self.scorers.items()
        }
        return replace(self, scorers=scaled)


def rank_answers(run: Run, config: Config, prompts: list[Conversation]) -> StageResult:
    """Sample and score N answers to each prompt, and publish winners, pairs and figures."""
    from align.rollout.engine import divergence_as_input_error
    from align.rollout.strip_reasoning import empty

    n = config.stage.best_of
    logged = read_rows(run.folder / "metrics.jsonl") if run.resumed else []
    done = ranks.broadcast(logged[-1]["step"] if logged else 0)
    with load_ranked_sampling(run, config, prompts) as sampling, open_tracker(run, done) as track:
        count = len(sampling.prompts)
        at_once = max(1, ANSWERS_AT_ONCE // n)
        bars = show_progress("sample", count, done)
        with divergence_as_input_error(f"init={run.inputs['init'].ref}", None, config.dtype), bars as bar:
            sampling.engine.sync(sampling.actor)
            sampling = sampling.calibrate(config.seed)
            for first in range(done, count, at_once):
                last = min(first + at_once, count)
                rows = [(i, k) for i in range(first, last) for k in range(n)]
                rollout, judged = sampling.answer(rows, config.seed, "sample")
                scores = {name: score_answers(scorer, name, judged) for name, scorer in sampling.scorers.items()}
                texts = [conversation.messages[-1].content for conversation in judged.conversations]
                means = {
                    "eos_rate": float(rollout.ended_B.sum()) / len(rows),
                    "mean_length": float(rollout.lengths_B.sum()) / len(rows),
                    "empty_rate": sum(map(empty, texts)) / len(rows),
                    "mean_reward": float(scores["score"].double().sum()) / len(rows),
                }
                if ranks.is_main():
                    track.keep(last, list_samples(range(first, last), texts, rollout, judged, scores))
                    track.log(last, {"answers": len(rows), **means})
                bar.advance(last, reward=means["mean_reward"], length=means["mean_length"])
        chunks = track.rows()
    return publish_best(run, config, chunks) if ranks.is_main() else StageResult({}, ())


@contextmanager
def load_ranked_sampling(run: Run, config: Config, prompts: Sequence[Conversation]) -> Iterator[RankedSampling]:
    """Load the policy, the engine and the scorers. The engine is closed in the end. Reward models on the policy's base
    are further adapters on it, as in PPO; all others, and those of `stage.gold`, bring a base of their own.

    Raises:
        InputError: a reward model on the policy's base was trained with another chat template.
    """
    from align.models.load import choose_device, choose_dtype
    from align.ppo.workers import build_roles
    from align.reward.build import build_beside_policy, build_scorer, check_same_template, load_reward_model
    from align.rollout.strip_reasoning import answer_reader

    base = run.base
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    frozen = frozen_method(config.method.name)
    policy, tokenizer = load_start(run, config)
    reward = build_reward_spec(config.reward)
    models = load_reward_artifacts(run.inputs)
    check_same_template(reward, models, base, tokenizer, config.init)
    encoded, fitting = encode_for(run, config, tokenizer, prompts)
    roles = build_roles(
        base,
        adapter_folder(policy),
        [model.path for model in select_on_base(models, base)],
        method=frozen,
        frozen=frozen,
        fresh=Lora.from_settings(config.method),
        value_backbone="none",
        device=device,
        dtype=dtype,
        seed=config.seed,
    )
    scorers = {"score": build_beside_policy(reward, models, roles, base, SCORED_AT_ONCE, dtype, tokenizer)}
    measured = ""
    if config.stage.gold is not None:
        gold_models = (
            load_reward_model(m, device, dtype, SCORED_AT_ONCE) for m in load_reward_artifacts(gold_inputs(run))
        )
        scorers["gold"] = build_scorer(build_reward_spec(config.stage.parse_gold()), gold_models)
        measured = f"; measured by {scorers['gold'].name}"
    print(f"{fitting}; {config.stage.best_of} answers each, ranked by {scorers['score'].name}{measured}")
    generation_config = roles.model.generation_config
    read = answer_reader(config.rollout.reasoning == "hide", tokenizer, generation_config)
    with open_rollout_engine(run, config, base, frozen, tokenizer, generation_config) as engine:
        yield RankedSampling(encoded, tokenizer, device, engine, roles.actor("reference"), read, scorers)


def score_answers(scorer: Scorer, name: str, judged: Judged) -> Tensor:
    """Return the scores of answers [B].

    Raises:
        InputError: one is not finite.
    """
    from align.reward.scorer import check_finite

    scores = scorer.score(judged.conversations, judged.rollout).float().cpu()
    check_finite(scores, scorer.name, "stage.gold" if name == "gold" else "reward")
    return scores


def list_samples(
    numbers: Sequence[int], texts: Sequence[str], rollout: Rollout, judged: Judged, scores: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """Return the lines of `samples.jsonl` for a chunk: a prompt each, with all answers to it in the order in which they
    were drawn.

    Args:
        numbers: of the prompts.
        texts: the answers as they are scored.
        scores: name → [B].
    """
    columns = {
        "answer": [*map(storable, texts)],
        "ended": rollout.ended_B.tolist(),
        "tokens": rollout.lengths_B.tolist(),
        **{name: values.tolist() for name, values in scores.items()},
    }
    if judged.reasoning[0] is not None:
        columns["reasoning"] = judged.reasoning
    answers = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    n = len(answers) // len(numbers)
    lines: list[dict[str, Any]] = []
    for i, number in enumerate(numbers):
        conversation = judged.conversations[i * n]
        prompt = conversation.turns(len(conversation.messages) - 1)
        tools = {"tools": prompt.tool_dicts()} if prompt.tools else {}
        lines.append({"number": number, "prompt": prompt.as_dicts(), **tools, "answers": answers[i * n : (i + 1) * n]})
    return lines


def publish_best(run: Run, config: Config, chunks: Sequence[Mapping[str, Any]]) -> StageResult:
    """Write winners, pairs and figures.

    Raises:
        InputError: no answer to any prompt can be imitated.
    """
    from align.evals.best_of import figures, tallied

    scorer = scorer_title(to_plain_dict(config)["reward"], run.inputs)
    with open_text(run.folder / "samples.jsonl") as file:
        tally = tallied(map(json.loads, file), run.manifest.ref, scorer)
    require_winner(run, config, tally)
    best = figures(tally) | {"scorer": scorer}
    if config.stage.gold is not None:
        best["measured_by"] = scorer_title(gold_settings(config), gold_inputs(run))
    answered, means = summarize_chunks(chunks)
    write_text(run.artifact / "winners.jsonl", "".join(map(format_row, tally.winners)))
    write_preferences(run.artifact / "pairs.jsonl", tally.pairs)
    write_json(run.artifact / "best_of.json", best)
    metrics = {**run.known_metrics, "answers": answered, **means, **best, **get_peak_memory()}
    return StageResult(metrics, (*best_of_table(best), *describe_flawed(config, means), *describe_best(best)))


def require_winner(run: Run, config: Config, tally: Tally) -> None:
    """Raise InputError if no answer to any prompt can be imitated."""
    asked = len(tally.scores) - tally.reasons["with_tools"]
    problem = "leaves no answer that ended by itself and holds text"
    remedy = f"Raise it, or start from another policy. What was said is in {run.folder / 'samples.jsonl'}."
    has_winner = tally.reasons["no_winner"] < asked or not asked
    require(has_winner, "rollout.max_new_tokens", config.rollout.max_new_tokens, problem, remedy)


def best_of_table(best: Mapping[str, Any]) -> list[str]:
    """Return the figures for each n, aligned."""
    table = [["n", "reward", *(["gold"] if "gold" in best else []), "tokens", "KL at most"]]
    for line in best["best_of"]:
        means = [in_words(line[name], ".3f") for name in ("reward", "gold") if name in line]
        table.append([str(line["n"]), *means, f"{line['tokens']:.1f}", f"{line['kl_bound']:.2f}"])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]


def describe_best(best: Mapping[str, Any]) -> list[str]:
    """Return sentences on what was written, and on what was not."""
    from align.evals.best_of import NO_ROW

    lines = []
    if best["winners"]:
        line = f"the winners' mean reward is {best.get('winner_reward', 0.0):.3g}"
        if best["outranked"]:
            line += f"; a better answer beside {best['outranked']:,} of them was cut or is empty"
        lines.append(line)
    if without := [f"{counted(best[why], 'prompt')} {what}" for why, what in NO_ROW.items() if best[why]]:
        lines.append(f"no pair of {', '.join(without)}")
    winners = counted(best["winners"], "winner")
    pairs = counted(best["pairs"], "pair")
    lines.append(f"{winners} in artifact/winners.jsonl, {pairs} in artifact/pairs.jsonl; all answers in samples.jsonl")
    return lines
