"""A reward model: Bradley–Terry on preference pairs, from where the SFT adapter left off."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from align.config.reward import RewardStageConfig
from align.config.root import Config
from align.data.chat import encode_judged, stop_token_ids
from align.data.preferences import read_preferences, split_by_group
from align.data.sources import data_record, share_of
from align.errors import InputError, require
from align.evals.stats import paired_bootstrap, per_prompt
from align.models.adapters import SCORE_KEY, read_tensors, save_adapter, with_new_adapter
from align.models.load import (
    adapter_config,
    choose_device,
    choose_dtype,
    context_length,
    load_classifier,
    save_tokenizer,
)
from align.report import Report, calibration_bins, curves, histogram_pair, reliability
from align.run import Base, Run
from align.run.checkpoints import newest_checkpoint, step_of
from align.stages import Inputs, open_store, tracker
from align.stages.lineage import adapter_folder, label, start, tokenizer_of
from align.track import peak_rss_mb, progress
from align.trainers.common import Reporter, steps_in, training_arguments
from align.trainers.reward import Pair, rankings, score_head, start_from, train_reward
from align.types import Conversation, Preference, Result
from annotate.store import preferences
from reward.learned import score_rows
from reward.rules import Sentiment


def inputs(config: Config) -> Inputs:
    artifact, base = start(config)
    if config.data.name == "annotations":
        with open_store(config, create=False) as store:
            head = store.head(config.project)
        data = {"project": config.project, "seq": head.seq, "digest": head.hash}
    else:
        data = data_record(config.data)
    return Inputs(label(base, config), base, {"init": artifact.record(), "data": data})


def run(run: Run, config: Config) -> Result:
    stage: RewardStageConfig = config.stage
    base, (artifact, _) = Base(**run.manifest["base"]), start(config, run.inputs["init"]["path"])
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)

    # Pairs, divided by prompt so that no ranking has a pair on both sides.
    train_prefs, test_prefs = split_by_group(pairs_from(config), stage.held_out, config.seed)
    if config.data.name == "jsonl":  # a prompt that `eval` will ask must not have taught the reward either
        sides: dict[bool, list[Preference]] = {True: test_prefs, False: []}
        for pref in train_prefs:
            sides[share_of(Conversation(pref.prompt)) < config.data.held_out].append(pref)
        train_prefs = sides[False]
        require(bool(train_prefs), "data.held_out", config.data.held_out, "leaves no pair to train on", "Lower it.")
    tokenizer = tokenizer_of(artifact, base, config.data.template)
    stops = stop_token_ids(tokenizer)

    # The same base with a score head; LoRA from the SFT adapter, head from zero.
    adapter = adapter_folder(artifact)
    given = adapter_config(adapter) if adapter else {"r": config.method.r, "lora_alpha": config.method.alpha}
    model = load_classifier(base, config.method.name, device, dtype)
    torch.manual_seed(config.seed)  # a fresh adapter's lora_A is random
    model = with_new_adapter(model, given["r"], given["lora_alpha"], classifier=True)
    copied = start_from(model, adapter)
    max_length = min(config.data.max_length, context_length(model))
    train, dropped = encoded(tokenizer, train_prefs, stops, max_length)
    test, dropped_test = encoded(tokenizer, test_prefs, stops, max_length)
    judged = rankings((pref.group_id or pref.id or f"row {i}", pair) for i, (pref, pair) in enumerate(train))
    print(
        f"{len(train)} pairs of {len(judged)} rankings to train on, {len(test)} pairs held out, "
        f"{dropped + dropped_test} longer than {max_length} tokens"
    )

    steps = steps_in(len(judged), stage.batch_size, stage.epochs, None)
    arguments = training_arguments(
        output=run.checkpoints, device=device, dtype=dtype, lr=stage.lr, epochs=stage.epochs, max_steps=None,
        batch_size=stage.batch_size, micro_batch=stage.micro_batch, warmup=stage.warmup, schedule=stage.schedule,
        max_grad_norm=stage.max_grad_norm, weight_decay=0.0, save_every=stage.save_every, seed=config.seed,
        gradient_checkpointing=stage.gradient_checkpointing, total_steps=steps,
    )  # fmt: skip
    checkpoint = newest_checkpoint(run)
    with tracker(run, config, step_of(checkpoint)) as track, progress("reward", steps, step_of(checkpoint)) as bar:
        names = {"loss": "loss", "accuracy": "accuracy", "margin": "margin", "grad_norm": "grad_norm"}
        train_reward(
            model, tokenizer, judged, arguments,
            callback=Reporter(track, bar, stage.log_every, names), checkpoint=checkpoint,
        )  # fmt: skip
        rows = track.rows()

    # Held-out pairs, scored where training read the score.
    tokens = [tuple(ids) for _, pair in test for ids in (pair.chosen_ids, pair.rejected_ids)]
    place = {ids: i for i, ids in enumerate(dict.fromkeys(tokens))}  # each answer is scored once
    each = score_rows(model.eval(), score_head(model), list(place), tokenizer.pad_token_id)
    scores = each[torch.tensor([place[ids] for ids in tokens])].view(-1, 2)
    gap = scores[:, 0] - scores[:, 1]
    metrics = {
        **held_out_figures([pref for pref, _ in test], gap, config.seed),
        "loss": float(-logsigmoid(gap).mean()), "pairs": len(train), "rankings": len(judged),
        "held_out_pairs": len(test), "dropped": dropped + dropped_test, "steps": steps, "copied_tensors": copied,
        "peak_rss_mb": peak_rss_mb(),
    }  # fmt: skip
    save_adapter(model, run.artifact, base)
    assert SCORE_KEY in read_tensors(run.artifact), "the score head was not saved"
    save_tokenizer(tokenizer, run.artifact)

    report = Report(f"reward: {run.manifest['name']}", f"{len(train)} pairs, from {artifact.ref}")
    report.figures_table(metrics)
    report.plot(curves(rows, ("loss",)), "Training loss.", "loss over steps")
    report.plot(reliability(shuffled_bins(test, gap)), "Predicted against observed.", "reliability plot")
    chosen, rejected = scores[:, 0].tolist(), scores[:, 1].tolist()
    report.plot(
        histogram_pair(chosen, rejected, ("chosen", "rejected"), "score"), "Scores of held-out answers.",
        "histograms of the scores of chosen and rejected answers",
    )  # fmt: skip
    report.write(run.folder / "report.html")
    intervals = ((k, v) for k, v in metrics.items() if isinstance(v, dict))
    shown = ", ".join(f"{k} {v['value']:.3f} [{v['low']:.3f}, {v['high']:.3f}]" for k, v in intervals)
    return Result(metrics, (f"held out: {shown}",))


def pairs_from(config: Config) -> list[Preference]:
    """Pairs of the annotation store's project, or of a file."""
    if config.data.name == "annotations":
        with open_store(config, create=False) as store:
            found = preferences(store, config.project, config.data.allow_simulated)
    else:
        found = read_preferences(config.data.path or "")
    return found[: config.data.limit]


def encoded(
    tokenizer: object, prefs: list[Preference], stops: tuple[int, ...], max_length: int
) -> tuple[list[tuple[Preference, Pair]], int]:
    """Pairs as token rows, and how many were longer than the context.

    Raises:
        InputError: none fits, or an answer is not one assistant turn.
    """
    kept = []
    known: dict[tuple[Any, ...], list[int]] = {}  # an answer stands in many pairs

    def ids_of(pref: Preference, side: str) -> list[int]:
        text = (pref.prompt, getattr(pref, side), getattr(pref, f"{side}_ended"))
        if text not in known:
            known[text] = judged_ids(tokenizer, pref, side, stops)
        return known[text]

    for pref in prefs:
        pair = Pair(ids_of(pref, "chosen"), ids_of(pref, "rejected"))
        if max(len(pair.chosen_ids), len(pair.rejected_ids)) <= max_length:
            kept.append((pref, pair))
    if not kept:
        raise InputError(
            "data.max_length", max_length, f"all {len(prefs)} pairs are longer", "Raise it, or give shorter pairs."
        )
    return kept, len(prefs) - len(kept)


def judged_ids(tokenizer: object, pref: Preference, side: str, stops: tuple[int, ...]) -> list[int]:
    """One side of a pair as the reward model reads it."""
    turns, ended = getattr(pref, side), getattr(pref, f"{side}_ended")
    *before, last = turns
    return encode_judged(tokenizer, Conversation((*pref.prompt, *before), pref.id), last.content, ended, stops)


def held_out_figures(prefs: list[Preference], gap: torch.Tensor, seed: int) -> dict[str, dict[str, float]]:
    """Accuracy on the labels with its interval over prompts; where they are simulated also against the noiseless order,
    and the ceiling that the noise leaves: how often the labels agree with it."""
    groups = [p.group_id or p.id for p in prefs]

    def interval(values: list[float]) -> dict[str, float]:
        return paired_bootstrap(per_prompt(groups, values), seed=seed).as_dict()

    figures = {"accuracy": interval((gap > 0).double().tolist())}
    if all(p.source == "simulated" for p in prefs):
        gold = Sentiment()
        better, worse = (
            gold.score([Conversation((*p.prompt, *getattr(p, side))) for p in prefs]) for side in ("chosen", "rejected")
        )
        right = better > worse  # ties never become pairs
        figures["accuracy_noiseless"] = interval(((gap > 0) == right).double().tolist())
        figures["ceiling"] = interval(right.double().tolist())
    return figures


def shuffled_bins(test: list[tuple[Preference, Pair]], gap: torch.Tensor) -> list:
    """Calibration of P(first wins), each pair's first chosen by a hash of its id: with the chosen always first, every
    outcome would be 1."""
    predicted, outcomes = [], []
    for (pref, _), g in zip(test, gap.tolist(), strict=True):
        flipped = hashlib.sha256(pref.id.encode()).digest()[0] % 2 == 1
        predicted.append(1 / (1 + math.exp(min(g if flipped else -g, 700.0))))
        outcomes.append(0.0 if flipped else 1.0)
    return calibration_bins(predicted, outcomes)
