"""KTO: answers that were wanted or not, each by itself. The reward of an answer is its logprob, against that of the
adapter the policy started from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from align.config.kto import KtoConfig
from align.config.root import Config
from align.config.training import held_out_for
from align.core.types import Feedback, Preference, Result
from align.data.chat.encode import stop_token_ids
from align.data.chat.template import use_template
from align.data.chat.training_view import write_labelled
from align.data.pairs import Judgements, Labelled, check_labels, encoded_answers, encoded_pairs, labelled, other_answers
from align.report import in_words
from align.run import Run
from align.stages.execution import tracker
from align.stages.footprint import predicted_peak
from align.stages.preferences import judgements_of, load_policy, preference_inputs
from align.stages.starting import Inputs, start
from align.track import peak_memory

if TYPE_CHECKING:
    from torch import Tensor


PRELOAD = ("align.trainers.kto",)
"""See `align.stages.load_stage`."""


def inputs(config: Config) -> Inputs:
    return preference_inputs(config, judgements_of)


def run(run: Run, config: Config, train_records: Judgements, test_records: Judgements) -> Result:
    import torch

    from align.evals.pair_accuracy import simulated_by
    from align.models.adapters import save_adapter
    from align.models.load import choose_device, choose_dtype, context_length, describe, own_tokenizer, save_tokenizer
    from align.ops.losses import kto_loss, kto_reference
    from align.trainers.common import Training, fit
    from align.trainers.evaluation import Measuring
    from align.trainers.kto import FIGURES, kto_trainer

    stage: KtoConfig = config.stage
    base, artifact = run.base, start(config, run.inputs["init"].path)[0]
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)

    tokenizer, described = own_tokenizer(artifact, base), describe(base)
    use_template(tokenizer, config.data.template, config.data.template_kwargs)
    stops = stop_token_ids(tokenizer, described.generation_config)
    max_length = min(config.data.max_length, context_length(described))
    train, test = (side_of(tokenizer, side, stops, max_length) for side in (train_records, test_records))
    print(
        f"{train.wanted} wanted and {len(train.rows) - train.wanted} unwanted answers to train on, {len(test.rows)} "
        f"answers held out; {train.dropped} and {test.dropped} more are longer than {max_length} tokens"
    )
    data = config.data.path or config.data.name
    check_labels([row.wanted for row in train.rows], [row.prompt for row in train.rows], data)
    run.known_metrics = counts(train, test)
    write_labelled(run.folder, tokenizer, train.rows)
    held_out_for(stage.eval_every, len(test.rows), "stage.held_out")

    model = load_policy(config, run, artifact, device, dtype, referenced=True)
    measure = partial(held_out_logprobs, model, held_out_rows(train.rows, test.rows, max_length), tokenizer, config)
    at_start = measure(0)
    wanted = torch.tensor([row.wanted for row in test.rows], device="cpu")
    weights = {"desirable_weight": stage.desirable_weight, "undesirable_weight": stage.undesirable_weight}

    def loss(logprobs_2N: Tensor) -> float:
        own, others = logprobs_2N - at_start
        return float(kto_loss(own, wanted, kto_reference(others), stage.beta, *weights.values()))

    fitted = fit(
        partial(kto_trainer, model, tokenizer, train.rows, beta=stage.beta, max_length=max_length, **weights),
        model, Training.of(stage, config.seed), len(train.rows), run,
        Measuring.by(lambda step: loss(measure(step)), stage),
        device=device, dtype=dtype, track=partial(tracker, run, config), log_every=stage.log_every, figures=FIGURES,
    )  # fmt: skip

    now = measure(fitted.published_step)
    figures = write_figures(run, test, (now - at_start)[0])
    metrics = {
        **figures, "loss_before": loss(at_start), "loss": loss(now), **run.known_metrics, **fitted.figures,
        **peak_memory(), **simulated_by([one for one in train.records if isinstance(one, Preference)]),
        **predicted_peak(config, run, max(len(row.ids) for row in train.rows)),
    }  # fmt: skip

    # Publish.
    save_adapter(model, run.artifact, base)
    save_tokenizer(tokenizer, run.artifact)
    told = [f"{key} {in_words(figures[key])}" for key in ("accuracy", "auc") if key in figures]
    return Result(metrics, (f"held out: {told[0]}" if told else ONE_LABEL, fitted.said))


ONE_LABEL = "the held-out answers have one label, so that nothing says whether it tells wanted from unwanted ones"


@dataclass(frozen=True, slots=True)
class Side:
    """What is trained on, or measured on.

    Attributes:
        records: answers with a label, or pairs, that fit.
        rows: their answers as tokens; of each pair the chosen one, then the rejected one.
        dropped: how many records were too long.
    """

    records: Judgements
    rows: list[Labelled]
    dropped: int

    @property
    def wanted(self) -> int:
        return sum(row.wanted for row in self.rows)


def side_of(tokenizer: Any, records: Judgements, stops: tuple[int, ...], max_length: int) -> Side:
    pairs = [one for one in records if isinstance(one, Preference)]
    if pairs:
        kept, dropped = encoded_pairs(tokenizer, pairs, stops, max_length)
        return Side([pref for pref, _ in kept], [*labelled([pair for _, pair in kept])], dropped)
    answers = [one for one in records if isinstance(one, Feedback)]
    found, dropped = encoded_answers(tokenizer, answers, stops, max_length)
    return Side([one for one, _ in found], [row for _, row in found], dropped)


def counts(train: Side, test: Side) -> dict[str, int]:
    """What a run's metrics count of its data."""
    return {
        "wanted": train.wanted, "unwanted": len(train.rows) - train.wanted, "held_out_answers": len(test.rows),
        "dropped": train.dropped, "held_out_dropped": test.dropped,
    }  # fmt: skip


def held_out_rows(
    train: Sequence[Labelled], test: Sequence[Labelled], max_length: int
) -> tuple[list[tuple[list[int], int]], ...]:
    """The held-out answers, and each of their prompts with an answer to another one, as the loss pairs them."""
    every = [*test, *train]  # where all that is held out answers one prompt, training has another
    others = other_answers(range(len(test)), every)
    mixed = [((row.prompt + other)[:max_length], row.start) for row, other in zip(test, others, strict=True)]
    return [(row.ids, row.start) for row in test], mixed


def held_out_logprobs(
    model: Any, rows: Sequence[Sequence[tuple[list[int], int]]], tokenizer: Any, config: Config, steps: int
) -> Tensor:
    """log π of the held-out answers, and of the answers to other prompts [2, N], after so many steps of training."""

    import torch

    from align.evals.implicit_reward import answer_logprobs, require_finite

    found = torch.stack([answer_logprobs(model.eval(), each, tokenizer.pad_token_id) for each in rows])
    require_finite(found.T, "answers", steps, config.stage.lr, config.dtype)
    return found


def write_figures(run: Run, test: Side, rewards_N: Tensor) -> dict[str, Any]:
    """`held_out.jsonl`, and the figures of held-out answers; of pairs, by how much the chosen one is above the other.

    Args:
        rewards_N: log π / π_ref of each answer.
    """

    from align.evals.label_accuracy import label_figures, write_held_out_answers
    from align.evals.pair_accuracy import held_out_figures, write_held_out

    path, pairs = run.folder / "held_out.jsonl", [one for one in test.records if isinstance(one, Preference)]
    if pairs:
        gap = rewards_N[0::2] - rewards_N[1::2]
        write_held_out(path, pairs, gap, log_odds=None)
        return held_out_figures(pairs, gap)
    answers = [one for one in test.records if isinstance(one, Feedback)]
    write_held_out_answers(path, answers, rewards_N)
    return label_figures(answers, rewards_N)
