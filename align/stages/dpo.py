"""DPO and its kin: the policy's logprobs, against those of the adapter it started from, are the reward. ORPO and SimPO
take the logprobs alone."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from align.config.dpo import DpoConfig
from align.config.root import Config
from align.config.training import held_out_for
from align.core.errors import require
from align.core.types import Preference, Result
from align.data.chat.encode import stop_token_ids
from align.data.chat.template import use_template
from align.data.chat.training_view import write_pair
from align.data.pairs import Pair, encoded_sides
from align.report import in_words
from align.run import Run
from align.stages.execution import tracker
from align.stages.footprint import predicted_peak
from align.stages.preferences import load_policy, pairs_of, preference_inputs
from align.stages.starting import Inputs, start
from align.track import peak_memory
from align.trainers.available import check_trainer

if TYPE_CHECKING:
    from torch import Tensor


PRELOAD = ("align.trainers.dpo",)
"""See `align.stages.load_stage`."""


def inputs(config: Config) -> Inputs:
    check_trainer(config.stage.loss)
    return preference_inputs(config, pairs_of)


def run(run: Run, config: Config, train_prefs: list[Preference], test_prefs: list[Preference]) -> Result:
    from align.evals.implicit_reward import pair_logprobs, require_finite
    from align.evals.pair_accuracy import held_out_figures, simulated_by, write_held_out
    from align.models.adapters import save_adapter
    from align.models.load import choose_device, choose_dtype, context_length, describe, own_tokenizer, save_tokenizer
    from align.trainers.common import Training, fit
    from align.trainers.dpo import dpo_trainer, figures_of
    from align.trainers.evaluation import Measuring

    stage: DpoConfig = config.stage
    base, artifact = run.base, start(config, run.inputs["init"].path)[0]
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)

    tokenizer, described = own_tokenizer(artifact, base), describe(base)
    use_template(tokenizer, config.data.template, config.data.template_kwargs)
    stops = stop_token_ids(tokenizer, described.generation_config)
    max_length = min(config.data.max_length, context_length(described))
    train, test, counts = encoded_sides(tokenizer, (train_prefs, test_prefs), stops, max_length)
    print(
        f"{len(train)} pairs to train on, {len(test)} held out; "
        f"{counts['dropped']} and {counts['held_out_dropped']} more are longer than {max_length} tokens"
    )
    run.known_metrics = counts
    write_pair(run.folder, tokenizer, train[0][1], answers=True)
    held_out_for(stage.eval_every, len(test), "stage.held_out")
    by_token = stage.loss != "sigmoid"
    if by_token:
        check_answers(stage.loss, (*train, *test))

    model = load_policy(config, run, artifact, device, dtype, stage.has_reference)

    # Held-out pairs by the implicit reward, log π / π_ref of an answer.
    held_out, pairs = [pref for pref, _ in test], [pair for _, pair in test]

    def logprobs(steps: int) -> Tensor:
        found = pair_logprobs(model.eval(), pairs, tokenizer.pad_token_id, by_token)
        assert stage.lr is not None  # filled in by `fill_rates`
        return require_finite(found, "pairs", steps, stage.lr, config.dtype)

    at_start, loss = logprobs(0), partial(held_out_loss, stage)
    settings = {"label_smoothing": stage.label_smoothing, "simpo_gamma": stage.simpo_gamma}
    fitted = fit(
        partial(
            dpo_trainer, model, tokenizer, [pair for _, pair in train], beta=stage.beta, loss=stage.loss, **settings
        ),
        model, Training.of(stage, config.seed), len(train), run,
        Measuring.by(lambda step: loss(logprobs(step), at_start), stage),
        device=device, dtype=dtype, track=partial(tracker, run, config), log_every=stage.log_every,
        figures=figures_of(stage.loss),
    )  # fmt: skip

    now = logprobs(fitted.published_step)
    gained = now - at_start
    gap = gained[:, 0] - gained[:, 1]
    metrics = {
        **held_out_figures(held_out, gap), "loss_before": loss(at_start, at_start), "loss": loss(now, at_start),
        **run.known_metrics, **fitted.figures, **peak_memory(), **simulated_by(train_prefs),
        **predicted_peak(config, run, max(len(ids) for _, p in train for ids in (p.chosen_ids, p.rejected_ids))),
    }  # fmt: skip

    # Publish.
    save_adapter(model, run.artifact, base)
    save_tokenizer(tokenizer, run.artifact)
    sure = stage.beta if stage.loss == "sigmoid" else None  # the other losses say nothing of probabilities
    write_held_out(run.folder / "held_out.jsonl", held_out, gap, log_odds=sure)
    return Result(metrics, (f"held out: accuracy {in_words(metrics['accuracy'])}", fitted.said))


def held_out_loss(stage: DpoConfig, logprobs_M2: Tensor, at_start_M2: Tensor) -> float:
    """The loss of pairs that training lowers, of the logprobs of the better and the worse answer of each."""

    from align.ops.losses import dpo_loss, orpo_loss, simpo_loss

    assert stage.beta is not None, "`check_together` has set it"
    chosen_M, rejected_M = logprobs_M2[:, 0], logprobs_M2[:, 1]
    if stage.loss == "orpo":
        return float(orpo_loss(chosen_M, rejected_M, stage.beta))
    if stage.loss == "simpo":
        return float(simpo_loss(chosen_M, rejected_M, stage.beta, stage.simpo_gamma))
    gained = logprobs_M2 - at_start_M2
    return float(dpo_loss(gained[:, 0] - gained[:, 1], stage.beta, stage.loss, stage.label_smoothing))


def check_answers(loss: str, pairs: Iterable[tuple[Preference, Pair]]) -> None:
    """Raises InputError where a loss takes a mean over an answer's tokens, and an answer has none."""
    for pref, pair in pairs:
        tokens = min(len(pair.chosen_ids) - pair.chosen_start, len(pair.rejected_ids) - pair.rejected_start)
        require(
            tokens > 0, "stage.loss", loss,
            f"takes a mean over an answer's tokens, and an answer of pair {pref.id or '(no id)'} has none",
            "Leave the pair out, or use stage.loss=sigmoid.",
        )  # fmt: skip
