"""`stage=sample stage.best_of=N`: N answers to each prompt, ranked by a reward; the best become rows for stage=sft
(rejection sampling), the best and the worst pairs for stage=dpo or stage=reward.

    for each chunk of prompts:
        N answers to each from the policy; a score for each; they go to samples.jsonl
    winners, pairs and figures are read off samples.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align import ranks
from align.annotate.store import storable
from align.config.root import Config, plain
from align.config.scorers import reward_spec
from align.config.settings import changed
from align.core.errors import require
from align.core.files import open_text
from align.core.types import Conversation, Result, Rollout
from align.data.chat.encode import Prompt
from align.data.read.preferences import write_preferences
from align.evals.best_of import NO_ROW, Tally, figures, tallied
from align.evals.judges import title
from align.models.actor import Actor
from align.models.load import choose_device, choose_dtype
from align.models.start import adapter_folder, frozen_as
from align.ppo.workers import Read, roles_on
from align.report.figure_text import counted, in_words
from align.reward.build import build, build_beside_policy, on_its_own_base
from align.reward.combined import Ensemble, Sum, comparable
from align.reward.inputs import models_of, on_base
from align.reward.scorer import Scorer, check_finite
from align.rollout.engine import Engine, cut_answers, divergence_as_input_error, response_texts
from align.rollout.randomness import row_seeds
from align.rollout.strip_reasoning import Judged, empty, empty_answers
from align.run import Run, write_json, write_text
from align.stages.asking import asked, reading
from align.stages.best_of_inputs import of_gold
from align.stages.execution import tracker
from align.stages.rollouts import engine_for
from align.stages.starting import lora_of
from align.track import line_of, peak_memory, progress, read_rows

ANSWERS_AT_ONCE = 1024
"""Answers that are in memory at a time; at least those to one prompt."""
SCORED_AT_ONCE = 32
CALIBRATED_ON = 64
"""Prompts whose answers bring the learned members of an ensemble or a sum to one scale."""
MEANS = ("eos_rate", "mean_length", "empty_rate", "mean_reward")


@dataclass(frozen=True)
class Work:
    """Who answers and who scores.

    Attributes:
        prompts: as they are asked.
        read: answers as texts and tokens → what whoever scores reads of them.
        scorer: ranks.
        gold: measures; None without `stage.gold`.
    """

    prompts: Sequence[Prompt]
    tokenizer: Any
    device: torch.device
    engine: Engine
    actor: Actor
    read: Read
    scorer: Scorer
    gold: Scorer | None

    def answered(self, rows: Sequence[tuple[int, int]], seed: int, *where: str) -> tuple[Rollout, Judged]:
        """The answers of these rows, each the number of a prompt and of an answer to it."""
        asked = [self.prompts[i] for i, _ in rows]
        seeds = row_seeds(rows, seed, *where)
        rollout = self.engine.generate([p.input_ids for p in asked], self.actor, seeds).to(self.device)
        return rollout, self.read(asked, response_texts(rollout, self.tokenizer), rollout)


def run(run: Run, config: Config, prompts: list[Conversation]) -> Result:
    """See the head of this file."""
    n, init = config.stage.best_of, f"init={run.inputs['init'].ref}"
    logged = read_rows(run.folder / "metrics.jsonl") if run.resumed else []
    done = ranks.from_main(logged[-1]["step"] if logged else 0)
    with loaded(run, config, prompts) as work, tracker(run, config, done) as track:
        count, at_once = len(work.prompts), max(1, ANSWERS_AT_ONCE // n)
        with divergence_as_input_error(init, None, config.dtype), progress("sample", count, done) as bar:
            work.engine.sync(work.actor)
            work = calibrated(work, config.seed)
            for first in range(done, count, at_once):
                last = min(first + at_once, count)
                rows = [(i, k) for i in range(first, last) for k in range(n)]
                rollout, judged = work.answered(rows, config.seed, "sample")
                scores = {name: checked(scorer, name, judged) for name, scorer in scorers(work).items()}
                means = means_of(rollout, judged, scores["score"])
                if ranks.is_main():
                    track.keep(last, kept(range(first, last), rollout, judged, scores))
                    track.log(last, {"answers": len(rows), **means})
                bar.advance(last, reward=means["mean_reward"], length=means["mean_length"])
        logged = track.rows()
    if not ranks.is_main():
        return Result({}, ())
    return published(run, config, logged)


@contextmanager
def loaded(run: Run, config: Config, prompts: Sequence[Conversation]) -> Iterator[Work]:
    """Load everybody; the engine is closed in the end. Reward models on the policy's base are further adapters on it,
    as in PPO; all others, and those of `stage.gold`, bring a base of their own.

    Raises:
        InputError: a reward model on the policy's base was trained with another chat template.
    """
    base, device = run.base, choose_device(config.device)
    dtype, kept_as = choose_dtype(config.dtype, device), frozen_as(config.method.name)
    policy, tokenizer, found, room, dropped, reward, models = asked(run, config, prompts)
    run.known_metrics = {"prompts": len(found), "dropped": dropped}
    roles = roles_on(
        base, adapter_folder(policy), [m.path for m in on_base(models, base)], method=kept_as, frozen=kept_as,
        fresh=lora_of(config), value_backbone="none", device=device, dtype=dtype, seed=config.seed,
    )  # fmt: skip
    scorer = build_beside_policy(reward, models, roles, base, SCORED_AT_ONCE, dtype, tokenizer)
    gold = None
    if config.stage.gold is not None:
        made = (on_its_own_base(m, device, dtype, SCORED_AT_ONCE) for m in models_of(of_gold(run.inputs)))
        gold = build(reward_spec(config.stage.measured_by()), made)
    said = f"; measured by {gold.name}" if gold else ""
    print(
        f"{len(found)} prompts, {dropped} dropped as longer than {room} tokens; {config.stage.best_of} answers each, "
        f"ranked by {scorer.name}{said}"
    )
    generation = roles.model.generation_config
    read = reading(config, tokenizer, generation)
    with engine_for(run, config, base, kept_as, dtype, tokenizer, generation) as engine:
        yield Work(found, tokenizer, device, engine, roles.actor("reference"), read, scorer, gold)


def calibrated(work: Work, seed: int) -> Work:
    """The same with the learned members of ensembles and sums on one scale for answers of the policy. A run that goes
    on draws the very same ones."""
    if not any(isinstance(scorer, Ensemble | Sum) for scorer in (work.scorer, work.gold)):
        return work
    rows = [(i, 0) for i in range(min(CALIBRATED_ON, len(work.prompts)))]
    _, judged = work.answered(rows, seed, "normalise")
    scaled = {
        name: comparable(scorer, judged.conversations, judged.rollout) for name, scorer in scorers(work).items()
    }  # fmt: skip
    return replace(work, scorer=scaled["score"], gold=scaled.get("gold"))


def scorers(work: Work) -> dict[str, Scorer]:
    """`score` ranks, `gold` measures."""
    return {"score": work.scorer, **({"gold": work.gold} if work.gold else {})}


def checked(scorer: Scorer, name: str, judged: Judged) -> Tensor:
    """The scores of answers [B].

    Raises:
        InputError: one is no number.
    """
    scores = scorer.score(judged.conversations, judged.rollout).float().cpu()
    check_finite(scores, scorer.name, "stage.gold" if name == "gold" else "reward")
    return scores


def texts_of(judged: Judged) -> list[str]:
    """The answers as they are scored."""
    return [conversation.messages[-1].content for conversation in judged.conversations]


def means_of(rollout: Rollout, judged: Judged, scores_B: Tensor) -> dict[str, float]:
    """What the metrics stream says of a chunk, by the names of `MEANS`."""
    sums = (
        float(rollout.ended_B.sum()), float(rollout.lengths_B.sum()), sum(map(empty, texts_of(judged))),
        float(scores_B.double().sum()),
    )  # fmt: skip
    return {key: total / len(scores_B) for key, total in zip(MEANS, sums, strict=True)}


def kept(
    numbers: Sequence[int], rollout: Rollout, judged: Judged, scores: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """The lines of `samples.jsonl` for a chunk: a prompt each, with all answers to it in the order in which they were
    drawn.

    Args:
        numbers: of the prompts.
        scores: name → [B].
    """
    columns = {
        "answer": [*map(storable, texts_of(judged))], "ended": rollout.ended_B.tolist(),
        "tokens": rollout.lengths_B.tolist(), **{name: values.tolist() for name, values in scores.items()},
    }  # fmt: skip
    columns |= {"reasoning": judged.reasoning} if judged.reasoning[0] is not None else {}
    answers = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    n, lines = len(answers) // len(numbers), list[dict[str, Any]]()
    for i, number in enumerate(numbers):
        told = judged.conversations[i * n]
        prompt = told.turns(len(told.messages) - 1)
        tools = {"tools": prompt.tool_dicts()} if prompt.tools else {}
        lines.append({"number": number, "prompt": prompt.as_dicts(), **tools, "answers": answers[i * n : (i + 1) * n]})
    return lines


def published(run: Run, config: Config, logged: Sequence[Mapping[str, Any]]) -> Result:
    """Write winners, pairs and figures; what is printed.

    Raises:
        InputError: no answer to any prompt can be imitated.
    """
    scorer = title(plain(config)["reward"], run.inputs)
    found = tallied(lines_of(run.folder / "samples.jsonl"), run.manifest.ref, scorer)
    made = figures(found) | {"scorer": scorer}
    if config.stage.gold is not None:
        gold = plain(changed(config, reward=config.stage.measured_by()))["reward"]
        made["measured_by"] = title(gold, of_gold(run.inputs))
    answered = sum(row["answers"] for row in logged)
    means = {key: sum(row["answers"] * row[key] for row in logged) / answered for key in MEANS[:-1]}
    somebody_wins(run, config, found)
    write_text(run.artifact / "winners.jsonl", "".join(map(line_of, found.winners)))
    write_preferences(run.artifact / "pairs.jsonl", found.pairs)
    write_json(run.artifact / "best_of.json", made)
    metrics = {**run.known_metrics, "answers": answered, **means, **made, **peak_memory()}
    said = [
        *cut_answers(1 - means["eos_rate"], config.rollout.max_new_tokens),
        *empty_answers(means["empty_rate"], config.rollout.reasoning == "hide"),
    ]
    return Result(metrics, (*table(made), *said, *lines_about(made)))


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file that is whole, one at a time."""
    with open_text(path) as file:
        yield from map(json.loads, file)


def somebody_wins(run: Run, config: Config, found: Tally) -> None:
    """Raises: InputError: no answer to any prompt can be imitated."""
    asked = len(found.scores) - found.reasons["with_tools"]
    require(
        found.reasons["no_winner"] < asked or not asked, "rollout.max_new_tokens", config.rollout.max_new_tokens,
        "leaves no answer that ended by itself and holds text",
        f"Raise it, or start from another policy. What was said is in {run.folder / 'samples.jsonl'}.",
    )  # fmt: skip


def table(made: Mapping[str, Any]) -> list[str]:
    """The figures for each n, aligned."""
    heads = ["n", "reward", *(["gold"] if "gold" in made else []), "tokens", "KL at most"]
    rows = [
        [
            str(line["n"]), *(in_words(line[name], ".3f") for name in ("reward", "gold") if name in line),
            f"{line['tokens']:.1f}", f"{line['kl_bound']:.2f}",
        ]
        for line in made["best_of"]
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (heads, *rows)]


def lines_about(made: Mapping[str, Any]) -> list[str]:
    """What was written, and what was not."""
    none = [f"{counted(made[why], 'prompt')} {what}" for why, what in NO_ROW.items() if made[why]]
    winners, pairs = counted(made["winners"], "winner"), counted(made["pairs"], "pair")
    beside = f"; a better answer beside {made['outranked']:,} of them was cut or is empty"
    reward = f"the winners' mean reward is {made.get('winner_reward', 0.0):.3g}"
    return [
        *([reward + (beside if made["outranked"] else "")] if made["winners"] else []),
        *([f"no pair of {', '.join(none)}"] if none else []),
        f"{winners} in artifact/winners.jsonl, {pairs} in artifact/pairs.jsonl; all answers in samples.jsonl",
    ]
