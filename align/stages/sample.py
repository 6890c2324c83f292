"""`stage=sample`: sample several answers to each prompt from a policy, for people or a reward to rank.

For people they go into the annotation store. With `stage.best_of=N` a reward ranks them: the best answers become rows
for stage=sft (rejection sampling), and the best and the worst answers become pairs for stage=dpo or stage=reward.

    for each chunk of prompts:
        sample answers, score them if best-of-n, append them to samples.jsonl
        without best-of-n: add the prompts and their answers to the annotation store
    best-of-n: write winners, pairs and metrics from samples.jsonl
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from align import ranks
from align.annotate.store import Candidate, Store, replace_unwritable
from align.config.root import Config, to_plain_dict
from align.config.sample import SampleConfig
from align.config.scorers import build_reward_spec
from align.config.settings import replace_values
from align.core.errors import InputError, require
from align.core.files import open_text
from align.core.types import Conversation, Rollout, StageResult
from align.data.chat.encode import Prompt, compute_max_prompt_tokens, encode_prompts
from align.data.read.preferences import write_preferences
from align.data.sources import DataSource, build_data_inputs
from align.data.sources import read_source_prompts as read_prompts
from align.evals.judges.identity import get_scorer_title, list_scorer_parts
from align.models.base import build_run_label, choose_frozen_method, find_adapter_folder
from align.models.lora import Lora
from align.report.figure_text import format_interval, pluralize
from align.reward.inputs import (
    load_reward_artifacts,
    require_matching_reasoning,
    require_row_checks,
    resolve_reward_inputs,
    select_models_on_base,
)
from align.run import Artifact, Base, Input, Run, write_json, write_text
from align.stages.runner import (
    StageInputs,
    load_start,
    open_rollout_engine,
    open_store,
    open_tracker,
    resolve_stage_start,
)
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

    from align.evals.best_of import BestOfResults
    from align.models.actors import Actor
    from align.reward.scorer import Scorer
    from align.rollout.engine import Engine
    from align.rollout.strip_reasoning import JudgedAnswers

PROMPTS_AT_ONCE = 64
"""Number of prompts that are sampled and stored at once, without best-of-n."""
MEANS = ("eos_rate", "mean_length", "empty_rate")
WITHHELD = {
    "all_empty": "whose answers are all empty",
    "all_equal": "whose answers are all equal",
    "with_tools": "with tools, which the annotation page does not show",
}
"""Name of a metric → description of the prompts that it counts, which are not added to the annotation store."""
PRINTED_PROMPTS = 3
"""Number of prompts whose first answer is printed at the end of the run."""
ANSWERS_AT_ONCE = 1024
"""Number of answers that are sampled and scored at once with best-of-n, or N if that is more."""
SCORED_AT_ONCE = 32
"""Number of answers in a batch that a reward model scores."""
CALIBRATION_PROMPTS = 64
"""Number of prompts whose answers are sampled to standardise the reward models of an ensemble or a weighted sum."""
GOLD = "gold."
"""Prefix of the names of the gold reward's inputs in the run's manifest."""
PRELOAD = ("align.models.actors", "align.rollout.registry")
"""Modules with torch that `run` imports, loaded before it and before forks; see `align.stages.load_stage`."""


def inputs(config: Config) -> StageInputs:
    artifact, base, config = resolve_stage_start(config)
    stage: SampleConfig = config.stage
    source = DataSource.from_settings(config.data)
    records = {"init": artifact.as_input(), **build_data_inputs(source)}
    if stage.best_of:
        records |= build_reward_inputs(config, artifact, base)

    def rows() -> tuple[Any, ...]:
        prompts = read_prompts(source, "train", config.seed)[: stage.prompts]
        require_row_checks(build_reward_spec(config.reward), prompts)
        if stage.gold is not None:
            require_row_checks(build_reward_spec(stage.parse_gold()), prompts)
        return (prompts,)

    return StageInputs(config, build_run_label(base, config.method.name), base, records, rows)


def build_reward_inputs(config: Config, policy: Artifact, base: Base) -> dict[str, Input]:
    """Return the run's inputs, by name, for the reward that ranks answers and the gold reward that only measures them.

    The inputs are reward models and functions.

    Raises:
        MissingArtifact: a reward model does not exist yet.
        InputError: an input is not a reward, or a part of the gold reward also ranks.
    """
    root = config.run.folder
    reward_records = resolve_reward_inputs(build_reward_spec(config.reward), root, base, policy, config.method.name)
    require_matching_reasoning(load_reward_artifacts(reward_records), config.rollout.reasoning)
    if config.stage.gold is None:
        return reward_records
    gold_records = resolve_reward_inputs(build_reward_spec(config.stage.parse_gold()), root, base)
    require_matching_reasoning(load_reward_artifacts(gold_records), config.rollout.reasoning)
    gold = get_gold_settings(config)
    if list_scorer_parts(gold, gold_records) & list_scorer_parts(to_plain_dict(config)["reward"], reward_records):
        problem = "also ranks the answers: its score of the best answer is then no evidence of quality"
        remedy = "Measure by another reward, or drop it."
        raise InputError("stage.gold", get_scorer_title(gold, gold_records), problem, remedy)
    return {**reward_records, **{f"{GOLD}{name}": record for name, record in gold_records.items()}}


def get_gold_settings(config: Config) -> Mapping[str, Any]:
    """Return the settings of the gold reward, `stage.gold`, as a mapping like the manifest's `reward`."""
    return to_plain_dict(replace_values(config, reward=config.stage.parse_gold()))["reward"]


def get_gold_inputs(run: Run) -> dict[str, Input]:
    """Return the run's inputs whose names begin with `gold.`, by name without this prefix."""
    return {name.removeprefix(GOLD): record for name, record in run.inputs.items() if name.startswith(GOLD)}


def run(run: Run, config: Config, prompts: list[Conversation]) -> StageResult:
    if config.stage.best_of is not None:
        return sample_best_of(run, config, prompts)
    return sample_for_people(run, config, prompts)


class EncodedPrompts(NamedTuple):
    """The tokenized prompts that fit the context, and a line about their number.

    Attributes:
        prompts: the tokenized prompts.
        summary: one line with the numbers of prompts and of dropped ones.
    """

    prompts: list[Prompt]
    summary: str


def encode_and_count_prompts(
    run: Run, config: Config, tokenizer: Any, prompts: Sequence[Conversation]
) -> EncodedPrompts:
    """Tokenize the prompts, drop prompts that are too long, and set `run.known_metrics` to both counts."""
    from align.models.load import get_context_length, read_configurations

    room = compute_max_prompt_tokens(
        get_context_length(read_configurations(run.base)), config.data.max_length, config.rollout.max_new_tokens
    )
    encoded, dropped = encode_prompts(tokenizer, prompts, room)
    run.known_metrics = {"prompts": len(encoded), "dropped": dropped}
    summary = f"{len(encoded)} prompts, {dropped} dropped as longer than {room} tokens"
    return EncodedPrompts(encoded, summary)


class ChunkSummary(NamedTuple):
    """The number of answers of a sampling run, and their mean metrics.

    Attributes:
        answer_count: number of answers.
        means: metric → its mean over all answers.
    """

    answer_count: int
    means: dict[str, float]


def summarize_chunks(chunks: Sequence[Mapping[str, Any]]) -> ChunkSummary:
    """Sum up the rows of `metrics.jsonl`, one per chunk of prompts, to the number of answers and their mean metrics."""
    answers = sum(row["answers"] for row in chunks)
    means = {key: sum(row["answers"] * row[key] for row in chunks) / answers for key in MEANS}
    return ChunkSummary(answers, means)


def describe_flawed_answers(config: Config, means: Mapping[str, float]) -> list[str]:
    """Return warnings about answers that were cut off at the token limit or are empty, if there are many of these.

    Args:
        means: metric → its mean over all answers.
    """
    from align.rollout.engine import warn_about_cut_answers
    from align.rollout.strip_reasoning import warn_about_empty_answers

    return [
        *warn_about_cut_answers(1 - means["eos_rate"], config.rollout.max_new_tokens),
        *warn_about_empty_answers(means["empty_rate"], config.rollout.reasoning == "hide"),
    ]


# Answers for people


def sample_for_people(run: Run, config: Config, prompts: list[Conversation]) -> StageResult:
    """Sample several answers to each prompt, and add them to the annotation store for people to rank.

    Also writes `samples.jsonl` and `metrics.jsonl`, from which an interrupted run continues.
    """
    from align.models.actors import AdapterPool
    from align.models.load import choose_device, choose_dtype, load_base
    from align.rollout.engine import convert_divergence_errors, decode_responses, derive_row_seeds
    from align.rollout.strip_reasoning import build_sample_row, is_empty_answer, split_reasoning_batch

    stage: SampleConfig = config.stage
    base = run.base
    artifact, tokenizer = load_start(run, config)
    device = choose_device(config.device)
    encoded, prompt_counts = encode_and_count_prompts(run, config, tokenizer, prompts)
    method = config.method.name
    model = load_base(base, method, device, choose_dtype(config.dtype, device))
    pool = AdapterPool(model, is_only_adapter=True)
    adapter = find_adapter_folder(artifact)
    actor = pool.actor(pool.add(adapter) if adapter else None)
    print(f"{prompt_counts}; {stage.candidates} answers each")

    # A chunk is logged after the store has it, so a resumed run continues behind the last chunk that was logged.
    adapter_digest = "" if artifact.whole else artifact.digest
    hides_reasoning = config.rollout.reasoning == "hide"
    sampling = {
        "temperature": config.rollout.temperature,
        "max_new_tokens": config.rollout.max_new_tokens,
        "seed": config.seed,
    }
    start = count_finished_prompts(run)
    opened_engine = open_rollout_engine(run, config, base, method, tokenizer, model.generation_config)
    opened_store = open_store(config) if ranks.is_main() else nullcontext()
    bars = show_progress("sample", len(encoded), start)
    with opened_engine as engine, opened_store as store, open_tracker(run, start) as track, bars as bar:
        engine.sync(actor)
        for first in range(start, len(encoded), PROMPTS_AT_ONCE):
            chunk = encoded[first : first + PROMPTS_AT_ONCE]
            rows = [(first + i, k) for i in range(len(chunk)) for k in range(stage.candidates)]
            row_prompts = [encoded[i] for i, _ in rows]
            prompt_ids = [prompt.input_ids for prompt in row_prompts]
            with convert_divergence_errors(f"init={run.inputs['init'].ref}", None, config.dtype):
                rollout = engine.generate(prompt_ids, actor, derive_row_seeds(rows, config.seed, "sample"))
            if store is None:  # only the first rank adds items
                bar.advance(first + len(chunk))
                continue
            texts = decode_responses(rollout, tokenizer)
            has_ended = rollout.ended_B.tolist()
            reasoning, texts = split_reasoning_batch(row_prompts, texts, tokenizer, hides_reasoning)
            candidates = [
                Candidate(
                    replace_unwritable(text),
                    base.digest,
                    adapter_digest,
                    {**sampling, "row": list(row)},
                    ended=bool(end),
                )
                for row, text, end in zip(rows, texts, has_ended, strict=True)
            ]
            withheld = add_items(store, config, f"{run.name}/", first, chunk, candidates)
            samples = [
                build_sample_row(prompt.conversation, candidate.text, thought, ended=candidate.ended)
                for prompt, candidate, thought in zip(row_prompts, candidates, reasoning, strict=True)
            ]
            track.keep(first + len(chunk), samples)
            means = {
                "eos_rate": sum(has_ended) / len(rows),
                "mean_length": float(rollout.lengths_B.sum()) / len(rows),
                "empty_rate": sum(is_empty_answer(candidate.text) for candidate in candidates) / len(rows),
            }
            track.log(first + len(chunk), {"answers": len(rows), **means, **withheld})
            bar.advance(first + len(chunk), eos_rate=means["eos_rate"], length=means["mean_length"])
        if store is None:
            return StageResult({}, ())
        chunks = track.rows()
        require_added_items(run, config, chunks)
        head = store.head(config.project)
    write_json(run.artifact / "ledger.json", {"project": config.project, "seq": head.seq, "hash": head.hash})

    answer_count, means = summarize_chunks(chunks)
    withheld = {reason: sum(row.get(reason, 0) for row in chunks) for reason in WITHHELD}
    metrics = {**run.known_metrics, "answers": answer_count, **means, **withheld, "peak_rss_mb": get_peak_rss_mb()}
    printed = read_rows(run.folder / "samples.jsonl")[: PRINTED_PROMPTS * stage.candidates : stage.candidates]
    lines = [f"  {truncate_text(format_last_turn(row))} → {truncate_text(row['answer'])}" for row in printed]
    added = len(encoded) - sum(withheld.values())
    added_count = "" if added == len(encoded) else f", {added} of them"
    line = (
        f"{answer_count} answers to {len(encoded)} prompts{added_count} in project {config.project}; "
        "all of them in samples.jsonl"
    )
    return StageResult(metrics, (*lines, *describe_flawed_answers(config, means), *describe_withheld(withheld), line))


def count_finished_prompts(run: Run) -> int:
    """Return the number of prompts that an interrupted run has finished, the same on all ranks; 0 for a new run."""
    logged = read_rows(run.folder / "metrics.jsonl") if run.resumed else []
    return ranks.broadcast(logged[-1]["step"] if logged else 0)


def require_added_items(run: Run, config: Config, chunks: Sequence[Mapping[str, Any]]) -> None:
    """Raise InputError if no prompt was added to the annotation store because all its answers are empty or the same.

    Args:
        chunks: the rows of `metrics.jsonl`.
    """
    empty, equal, with_tools = (sum(row.get(reason, 0) for row in chunks) for reason in WITHHELD)
    prompts = run.known_metrics["prompts"] - with_tools
    if not prompts:
        return
    remedy = f"The answers are in {run.folder / 'samples.jsonl'}."
    problem = "leaves every answer empty: no answer closes its reasoning"
    raise_limit = f"Raise rollout.max_new_tokens, or start from a policy that closes its reasoning. {remedy}"
    require(empty < prompts or config.rollout.reasoning != "hide", "rollout.reasoning", "hide", problem, raise_limit)
    problem = "gives each prompt the same answers, or empty ones"
    remedy = f"Raise rollout.temperature, or start from another policy. {remedy}"
    require(empty + equal < prompts, "init", run.inputs["init"].ref, problem, remedy)


def add_items(
    store: Store, config: Config, prefix: str, first: int, chunk: Sequence[Prompt], answers: Sequence[Candidate]
) -> dict[str, int]:
    """Add prompts with their answers to the annotation store, and return the number of prompts left out, by reason.

    Left out are prompts whose answers are all the same, and prompts with tools.

    Args:
        prefix: prefix of the items' keys; a prompt's number follows it.
        first: number of the first prompt of the chunk.
        answers: `stage.candidates` answers to the first prompt, then those to the second one, and so on.
    """
    from align.rollout.strip_reasoning import strip_prompt_reasoning

    count = config.stage.candidates
    withheld = dict.fromkeys(WITHHELD, 0)
    with store.transaction():
        for i, prompt in enumerate(chunk):
            candidates = answers[i * count : (i + 1) * count]
            texts = {candidate.text.strip() for candidate in candidates}
            if prompt.conversation.uses_tools:
                withheld["with_tools"] += 1
            elif len(texts) == 1:
                withheld["all_empty" if texts == {""} else "all_equal"] += 1
            else:
                conversation = (
                    strip_prompt_reasoning(prompt) if config.rollout.reasoning == "hide" else prompt.conversation
                )
                store.add_item(config.project, f"{prefix}{first + i}", conversation, candidates)
    return withheld


def describe_withheld(withheld: Mapping[str, int]) -> list[str]:
    """Return a list with one line on the prompts that were not added to the annotation store; empty if all were added.

    Args:
        withheld: reason, as in `WITHHELD` → number of prompts.
    """
    parts = [
        f"{pluralize(withheld[key], 'prompt')} {description}" for key, description in WITHHELD.items() if withheld[key]
    ]
    return [f"not handed out to annotators: {', '.join(parts)}"] if parts else []


# Best-of-n


SampleKey = tuple[int, int]
"""Index of a prompt and index of an answer to it. A plain tuple, because seeds are derived from its `repr`."""


@dataclass(frozen=True)
class RankedSampling:
    """The policy, rollout engine and reward scorers that best-of-n sampling uses.

    Attributes:
        prompts: the tokenized prompts.
        read_answers: takes the prompts of a batch, the answers' texts and the rollout. Returns the conversations to
            score, without reasoning if `rollout.reasoning=hide`.
        scorers: `score` ranks the answers; `gold`, present if `stage.gold` is set, only measures them.
    """

    prompts: Sequence[Prompt]
    tokenizer: Any
    device: torch.device
    engine: Engine
    actor: Actor
    read_answers: Any
    scorers: Mapping[str, Scorer]

    def sample_answers(
        self, sample_keys: Sequence[SampleKey], seed: int, purpose: str
    ) -> tuple[Rollout, JudgedAnswers]:
        """Sample one answer of the policy for each (prompt, answer) index pair, with seeds derived from it.

        Returns the rollout, and the answers in the form in which the scorers read them.

        Args:
            sample_keys: which answers to which prompts.
            purpose: name that enters the seeds, so that different uses sample different answers.
        """
        from align.rollout.engine import decode_responses, derive_row_seeds

        prompts = [self.prompts[i] for i, _ in sample_keys]
        seeds = derive_row_seeds(sample_keys, seed, purpose)
        rollout = self.engine.generate([prompt.input_ids for prompt in prompts], self.actor, seeds).to(self.device)
        return rollout, self.read_answers(prompts, decode_responses(rollout, self.tokenizer), rollout)

    def calibrate(self, seed: int) -> RankedSampling:
        """Return a copy whose ensembles and sums have their reward models standardised on sampled answers of the
        policy.

        A resumed run samples the same answers again. Returns `self` if there is no ensemble or sum.
        """
        from align.reward.combined import Ensemble, Sum, standardise_members

        if not any(isinstance(scorer, Ensemble | Sum) for scorer in self.scorers.values()):
            return self
        sample_keys = [(i, 0) for i in range(min(CALIBRATION_PROMPTS, len(self.prompts)))]
        _, judged_rollout = self.sample_answers(sample_keys, seed, "normalise")
        standardised = {
            name: standardise_members(scorer, judged_rollout.conversations, judged_rollout.rollout)
            for name, scorer in self.scorers.items()
        }
        return replace(self, scorers=standardised)


def sample_best_of(run: Run, config: Config, prompts: list[Conversation]) -> StageResult:
    """Sample N answers to each prompt, score them by the reward, and write the best answers and preference pairs."""
    from align.rollout.engine import convert_divergence_errors
    from align.rollout.strip_reasoning import is_empty_answer

    n = config.stage.best_of
    start = count_finished_prompts(run)
    with load_ranked_sampling(run, config, prompts) as sampling, open_tracker(run, start) as track:
        count = len(sampling.prompts)
        chunk_size = max(1, ANSWERS_AT_ONCE // n)
        bars = show_progress("sample", count, start)
        with convert_divergence_errors(f"init={run.inputs['init'].ref}", None, config.dtype), bars as bar:
            sampling.engine.sync(sampling.actor)
            sampling = sampling.calibrate(config.seed)
            for first in range(start, count, chunk_size):
                last = min(first + chunk_size, count)
                sample_keys = [(i, k) for i in range(first, last) for k in range(n)]
                rollout, judged_rollout = sampling.sample_answers(sample_keys, config.seed, "sample")
                scores = {
                    name: score_answers(scorer, name, judged_rollout) for name, scorer in sampling.scorers.items()
                }
                texts = [conversation.messages[-1].content for conversation in judged_rollout.conversations]
                means = {
                    "eos_rate": float(rollout.ended_B.sum()) / len(sample_keys),
                    "mean_length": float(rollout.lengths_B.sum()) / len(sample_keys),
                    "empty_rate": sum(map(is_empty_answer, texts)) / len(sample_keys),
                    "mean_reward": float(scores["score"].double().sum()) / len(sample_keys),
                }
                if ranks.is_main():
                    track.keep(last, list_samples(range(first, last), texts, rollout, judged_rollout, scores))
                    track.log(last, {"answers": len(sample_keys), **means})
                bar.advance(last, reward=means["mean_reward"], length=means["mean_length"])
        chunks = track.rows()
    return publish_best(run, config, chunks) if ranks.is_main() else StageResult({}, ())


@contextmanager
def load_ranked_sampling(run: Run, config: Config, prompts: Sequence[Conversation]) -> Iterator[RankedSampling]:
    """Load the policy, the reward scorers and the rollout engine for best-of-n, and close the engine as the block ends.

    Reward models on the policy's base are further adapters on it, as in PPO. The others, and those of `stage.gold`,
    load a base of their own.

    Raises:
        InputError: a reward model on the policy's base was trained with another chat template.
    """
    from align.models.load import choose_device, choose_dtype
    from align.ppo.workers import build_roles
    from align.reward.build import build_scorer, build_scorer_for_policy, load_reward_model, require_same_template
    from align.rollout.strip_reasoning import choose_answer_reader

    base = run.base
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    frozen = choose_frozen_method(config.method.name)
    policy, tokenizer = load_start(run, config)
    reward = build_reward_spec(config.reward)
    models = load_reward_artifacts(run.inputs)
    require_same_template(reward, models, base, tokenizer, config.init)
    encoded, prompt_counts = encode_and_count_prompts(run, config, tokenizer, prompts)
    roles = build_roles(
        base,
        find_adapter_folder(policy),
        [model.path for model in select_models_on_base(models, base)],
        method=frozen,
        frozen_method=frozen,
        fresh=Lora.from_settings(config.method),
        value_backbone="none",
        device=device,
        dtype=dtype,
        seed=config.seed,
    )
    scorers = {"score": build_scorer_for_policy(reward, models, roles, base, SCORED_AT_ONCE, dtype, tokenizer)}
    gold_title = ""
    if config.stage.gold is not None:
        gold_artifacts = load_reward_artifacts(get_gold_inputs(run))
        gold_models = (load_reward_model(model, device, dtype, SCORED_AT_ONCE) for model in gold_artifacts)
        scorers["gold"] = build_scorer(build_reward_spec(config.stage.parse_gold()), gold_models)
        gold_title = f"; measured by {scorers['gold'].name}"
    print(f"{prompt_counts}; {config.stage.best_of} answers each, ranked by {scorers['score'].name}{gold_title}")
    generation_config = roles.model.generation_config
    read_answers = choose_answer_reader(config.rollout.reasoning == "hide", tokenizer, generation_config)
    with open_rollout_engine(run, config, base, frozen, tokenizer, generation_config) as engine:
        yield RankedSampling(encoded, tokenizer, device, engine, roles.actor("reference"), read_answers, scorers)


def score_answers(scorer: Scorer, name: str, judged_rollout: JudgedAnswers) -> Tensor:
    """Score a batch of answers with one reward scorer, and return the scores, float32 [B] on the CPU.

    Args:
        name: `gold` or `score`, for the error message.

    Raises:
        InputError: a score is not finite.
    """
    from align.reward.scorer import require_finite_scores

    scores = scorer.score(judged_rollout.conversations, judged_rollout.rollout).float().cpu()
    require_finite_scores(scores, scorer.name, "stage.gold" if name == "gold" else "reward")
    return scores


def list_samples(
    numbers: Sequence[int],
    texts: Sequence[str],
    rollout: Rollout,
    judged_rollout: JudgedAnswers,
    scores: Mapping[str, Tensor],
) -> list[dict[str, Any]]:
    """Build the rows of `samples.jsonl` for a chunk of prompts: one per prompt, with all its answers and their scores.

    The answers are in the order in which they were sampled.

    Args:
        numbers: numbers of the prompts.
        texts: the answers in the form in which they were scored.
        scores: name of the scorer → scores [B].
    """
    columns = {
        "answer": [*map(replace_unwritable, texts)],
        "ended": rollout.ended_B.tolist(),
        "tokens": rollout.lengths_B.tolist(),
        **{name: values.tolist() for name, values in scores.items()},
    }
    if judged_rollout.reasoning[0] is not None:
        columns["reasoning"] = judged_rollout.reasoning
    answers = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    n = len(answers) // len(numbers)
    rows: list[dict[str, Any]] = []
    for i, number in enumerate(numbers):
        conversation = judged_rollout.conversations[i * n]
        prompt = conversation.turns(len(conversation.messages) - 1)
        tools = {"tools": prompt.tool_dicts()} if prompt.tools else {}
        rows.append({"number": number, "prompt": prompt.as_dicts(), **tools, "answers": answers[i * n : (i + 1) * n]})
    return rows


def publish_best(run: Run, config: Config, chunks: Sequence[Mapping[str, Any]]) -> StageResult:
    """Read `samples.jsonl`, and write the best answers, the preference pairs and the best-of-n metrics to the artifact.

    The files are `winners.jsonl`, `pairs.jsonl` and `best_of.json`.

    Args:
        chunks: the rows of metrics.jsonl.

    Raises:
        InputError: no answer to any prompt can be a winner.
    """
    from align.evals.best_of import collect_best_of_results, compute_best_of_figures

    scorer = get_scorer_title(to_plain_dict(config)["reward"], run.inputs)
    with open_text(run.folder / "samples.jsonl") as file:
        min_score = -math.inf if config.stage.min_score is None else config.stage.min_score
        tally = collect_best_of_results(map(json.loads, file), run.manifest.ref, scorer, min_score)
    require_winner(run, config, tally)
    best = compute_best_of_figures(tally) | {"scorer": scorer}
    if config.stage.gold is not None:
        best["measured_by"] = get_scorer_title(get_gold_settings(config), get_gold_inputs(run))
    answer_count, means = summarize_chunks(chunks)
    write_text(run.artifact / "winners.jsonl", "".join(map(format_row, tally.winners)))
    write_preferences(run.artifact / "pairs.jsonl", tally.pairs)
    write_json(run.artifact / "best_of.json", best)
    metrics = {**run.known_metrics, "answers": answer_count, **means, **best, **get_peak_memory()}
    return StageResult(
        metrics, (*format_best_of_table(best), *describe_flawed_answers(config, means), *describe_best(best))
    )


def require_winner(run: Run, config: Config, results: BestOfResults) -> None:
    """Raise InputError if no answer to any prompt may win, because all were cut off, are empty or score too low."""
    prompt_count = len(results.scores) - results.reasons["with_tools"]
    problem = "leaves no answer that is complete and not empty"
    alternative = f"or start from another policy. The answers are in {run.folder / 'samples.jsonl'}."
    has_winner = results.reasons["no_winner"] < prompt_count or not prompt_count
    require(has_winner, "rollout.max_new_tokens", config.rollout.max_new_tokens, problem, f"Raise it, {alternative}")
    has_winner = results.reasons["no_winner"] + results.reasons["low_score"] < prompt_count or not prompt_count
    problem = "is higher than the score of every prompt's best complete answer"
    require(has_winner, "stage.min_score", config.stage.min_score, problem, f"Lower it, {alternative}")


def format_best_of_table(best: Mapping[str, Any]) -> list[str]:
    """Return the lines of a text table with mean reward, gold reward, length in tokens and KL bound for each n."""
    table = [["n", "reward", *(["gold"] if "gold" in best else []), "tokens", "KL at most"]]
    for row in best["best_of"]:
        means = [format_interval(row[name], ".3f") for name in ("reward", "gold") if name in row]
        table.append([str(row["n"]), *means, f"{row['tokens']:.1f}", f"{row['kl_bound']:.2f}"])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]


def describe_best(best: Mapping[str, Any]) -> list[str]:
    """Return the report lines of best-of-n: mean reward of the winners, numbers of winners and pairs written, and
    number of prompts without a pair.

    Args:
        best: the metrics in `best_of.json`.
    """
    from align.evals.best_of import NO_ROW

    lines = []
    if best["winners"]:
        line = f"the winners' mean reward is {best.get('winner_reward', 0.0):.3g}"
        if best["outranked"]:
            line += f"; for {best['outranked']:,} of them, a better-scored answer was cut or is empty"
        lines.append(line)
    without_pair = [
        f"{pluralize(best[reason], 'prompt')} {description}" for reason, description in NO_ROW.items() if best[reason]
    ]
    if without_pair:
        lines.append(f"no pair of {', '.join(without_pair)}")
    winners = pluralize(best["winners"], "winner")
    pairs = pluralize(best["pairs"], "pair")
    lines.append(f"{winners} in artifact/winners.jsonl, {pairs} in artifact/pairs.jsonl; all answers in samples.jsonl")
    return lines
