"""A reward model: Bradley–Terry on preference pairs, from where the SFT adapter left off."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.functional import logsigmoid

from align.config.reward import RewardStageConfig
from align.config.root import Config
from align.data.chat import stop_token_ids
from align.data.pairs import divided_pairs, encoded_pairs, pairs_record, read_pairs
from align.evals.pair_accuracy import RELIABILITY, held_out_figures, shuffled_bins, simulated_by
from align.models.adapters import SCORE_KEY, adapter_config, read_tensors, save_adapter, with_new_adapter
from align.models.finite import diverged
from align.models.load import (
    choose_device,
    choose_dtype,
    context_length,
    describe,
    load_classifier,
    save_tokenizer,
)
from align.ops.finite import not_finite
from align.redaction import masked, unmarked
from align.report import Report, curves, histogram_pair, in_words, reliability
from align.run import Input, Run, json_digest
from align.stages import Inputs, open_store, store_url, tracker
from align.stages.lineage import adapter_folder, label, source_of, start, tokenizer_of
from align.track import peak_rss_mb
from align.trainers.common import Training, fit
from align.trainers.reward import FIGURES, rankings, reward_trainer, score_head, start_from
from align.types import Result
from annotate.priority import prioritise
from reward.learned import score_rows


def inputs(config: Config) -> Inputs:
    artifact, base, config = start(config)
    records = {"init": artifact.as_input(), "data": pairs_record(source_of(config), store_url(config), config.project)}
    if config.stage.prioritise:  # what it writes to: the same votes in another store are another run
        records["queue"] = Input(json_digest([unmarked(masked(store_url(config))), config.project]))
    return Inputs(config, label(base, config), base, records)


def run(run: Run, config: Config) -> Result:
    stage: RewardStageConfig = config.stage
    base = run.base
    artifact = start(config, run.inputs["init"].path).artifact
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)

    prefs = read_pairs(source_of(config), store_url(config), config.project, config.data.allow_simulated)
    train_prefs, test_prefs = divided_pairs(prefs, source_of(config), stage.held_out, config.seed)
    tokenizer = tokenizer_of(artifact, base, config.data.template)
    stops = stop_token_ids(tokenizer)
    max_length = min(config.data.max_length, context_length(describe(base)))
    train, dropped = encoded_pairs(tokenizer, train_prefs, stops, max_length)
    test, dropped_test = encoded_pairs(tokenizer, test_prefs, stops, max_length)
    judged = rankings((pref.group_id or pref.id or f"row {i}", pair) for i, (pref, pair) in enumerate(train))
    print(
        f"{len(train)} pairs of {len(judged)} rankings to train on, {len(test)} pairs held out, "
        f"{dropped + dropped_test} longer than {max_length} tokens"
    )

    # The same base with a score head; LoRA from the SFT adapter, head from zero.
    adapter = adapter_folder(artifact)
    given = adapter_config(adapter, "init") if adapter else {"r": config.method.r, "lora_alpha": config.method.alpha}
    model = load_classifier(base, config.method.name, device, dtype)
    torch.manual_seed(config.seed)  # a fresh adapter's lora_A is random
    model = with_new_adapter(model, given["r"], given["lora_alpha"], classifier=True)
    copied = start_from(model, adapter)

    fitted = fit(
        partial(reward_trainer, model, tokenizer, judged), model, Training.of(stage, config.seed), len(judged), run,
        device=device, dtype=dtype, track=partial(tracker, run, config), log_every=stage.log_every, figures=FIGURES,
    )  # fmt: skip

    # Held-out pairs, scored where training read the score.
    tokens = [tuple(ids) for _, pair in test for ids in (pair.chosen_ids, pair.rejected_ids)]
    place = {ids: i for i, ids in enumerate(dict.fromkeys(tokens))}  # each answer is scored once
    each = score_rows(model.eval(), score_head(model), list(place), tokenizer.pad_token_id)
    if count := not_finite(each):
        what = f"{count} of {len(each)} held-out answers have scores that are no numbers after step {fitted.steps}"
        raise diverged(f"{what}: nothing is published", stage.lr, config.dtype)
    scores = each[torch.tensor([place[ids] for ids in tokens])].view(-1, 2)
    gap = scores[:, 0] - scores[:, 1]
    metrics = {
        **held_out_figures([pref for pref, _ in test], gap),
        "loss": float(-logsigmoid(gap).mean()), "pairs": len(train), "rankings": len(judged),
        "held_out_pairs": len(test), "dropped": dropped + dropped_test, "steps": fitted.steps, "copied_tensors": copied,
        "peak_rss_mb": peak_rss_mb(), **simulated_by(train_prefs),
    }  # fmt: skip
    save_adapter(model, run.artifact, base)
    assert SCORE_KEY in read_tensors(run.artifact), "the score head was not saved"
    save_tokenizer(tokenizer, run.artifact)
    if stage.prioritise:
        with open_store(config, create=False) as store:
            metrics["prioritised"] = prioritise(
                store, config.project, model, score_head(model), tokenizer, stops, max_length
            )

    report = Report(f"reward: {run.name}", f"{len(train)} pairs, from {artifact.ref}")
    report.figures_table(metrics)
    report.plot(curves(fitted.rows, ("loss",)), "Training loss.", "loss over steps")
    report.plot(reliability(shuffled_bins([pref for pref, _ in test], gap)), RELIABILITY, "reliability plot")
    chosen, rejected = scores[:, 0].tolist(), scores[:, 1].tolist()
    report.plot(
        histogram_pair(chosen, rejected, ("chosen", "rejected"), "score"), "Scores of held-out answers.",
        "histograms of the scores of chosen and rejected answers",
    )  # fmt: skip
    report.write(run.folder / "report.html")
    intervals = ((k, v) for k, v in metrics.items() if isinstance(v, dict))
    shown = ", ".join(f"{k} {in_words(v)}" for k, v in intervals)
    said = [f"{metrics['prioritised']} items ordered by how unsure it is of them"] if stage.prioritise else []
    return Result(metrics, (*said, f"held out: {shown}"))
