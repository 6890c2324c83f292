"""Supervised instruction tuning, of an adapter (`stage=sft`) or of every weight (`stage=full`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from align.config.root import Config
from align.config.settings import changed
from align.config.sft import SftConfig
from align.data.chat import encode
from align.data.sources import data_record, documents
from align.data.template import use_template
from align.errors import require
from align.evals.heldout import held_out_loss
from align.models.adapters import save_adapter, with_new_adapter
from align.models.base import find_base
from align.models.finite import diverged
from align.models.load import (
    choose_device,
    choose_dtype,
    context_length,
    describe,
    load_base,
    load_tokenizer,
    save_tokenizer,
)
from align.models.plain_path import route_of
from align.report import Report, curves, few
from align.run import Input, Run
from align.stages import Inputs, source_of, tracker
from align.track import peak_rss_mb
from align.trainers.common import Training, fit
from align.trainers.sft import FIGURES, packed_rows, sft_trainer
from align.types import Result

LARGEST_LOSS = 700.0
"""Nats a token; exp of it is still a number. Chance is at 12 for the largest vocabularies."""


def inputs(config: Config) -> Inputs:
    base = find_base(config.model.path, config.model.revision)
    if config.method.name == "auto":
        config = changed(config, method=changed(config.method, name="qlora"))
    label = "-".join(dict.fromkeys((base.id.rstrip("/").rpartition("/")[2], config.method.name)))
    records = {"base": Input(base.digest, ref=base.id), "data": data_record(source_of(config))}
    return Inputs(config, label, base, records)


def run(run: Run, config: Config) -> Result:
    stage: SftConfig = config.stage
    base = run.base
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    tokenizer = load_tokenizer(base)
    text_only = config.data.name == "chitchat" and config.data.part == "base"
    if not text_only:
        use_template(tokenizer, config.data.template, config.data.template_kwargs)

    # Data, before any weights: our own tokens and labels, a loss only on what the assistant writes.
    max_length = min(config.data.max_length, context_length(describe(base)))
    train = encode(tokenizer, documents(source_of(config), "train", config.seed), max_length)
    test = encode(tokenizer, documents(source_of(config), "test", config.seed)[: stage.eval_size], max_length)
    print(
        f"{len(train.rows)} rows, {train.tokens} tokens; dropped {train.too_long} longer than {max_length} tokens "
        f"and {train.unanswered} without an assistant turn; {len(test.rows)} held out"
    )

    # The model before training, then training, then the same measure again.
    model = load_base(base, config.method.name, device, dtype)
    require(
        not stage.packing or route_of(model).packing, "stage.packing", stage.packing,
        f"type {model.config.model_type} is not proven to tell packed rows apart by their positions", "Drop it.",
    )  # fmt: skip
    if config.method.name != "full":
        torch.manual_seed(config.seed)  # a fresh adapter's lora_A is random
        model = with_new_adapter(model, config.method.r, config.method.alpha)
    before, tokens = held_out_loss(model, test.rows, tokenizer.pad_token_id)
    perplexity_before = perplexity(before, f"the held-out loss of {base.id} before training", None, config.dtype)
    rows = len(packed_rows(train.rows, max_length)) if stage.packing else len(train.rows)
    fitted = fit(
        partial(sft_trainer, model, tokenizer, train.rows, max_length=max_length, packing=stage.packing),
        model, Training.of(stage, config.seed), rows, run,
        device=device, dtype=dtype, track=partial(tracker, run, config), log_every=stage.log_every, figures=FIGURES,
    )  # fmt: skip
    after, _ = held_out_loss(model, test.rows, tokenizer.pad_token_id)
    perplexity_after = perplexity(after, f"the held-out loss after step {fitted.steps}", stage.lr, config.dtype)

    # Publish.
    save_tokenizer(tokenizer, run.artifact)
    if config.method.name == "full":
        model.to(dtype).save_pretrained(str(run.artifact))
    else:
        save_adapter(model, run.artifact, base)
    metrics = {
        "loss_before": before, "loss_after": after, "perplexity_before": perplexity_before,
        "perplexity_after": perplexity_after, "held_out_tokens": tokens, "held_out_rows": len(test.rows),
        "trained_weights": fitted.trained_weights, "steps": fitted.steps,
        "train_tokens": train.tokens, "dropped_too_long": train.too_long, "dropped_unanswered": train.unanswered,
        "peak_rss_mb": peak_rss_mb(),
    }  # fmt: skip
    scarce = few_rows(len(test.rows))
    report = report_of(metrics, fitted.rows, scarce, f"{stage.name}: {run.name}", f"{config.method.name} on {base.id}")
    report.write(run.folder / "report.html")
    line = f"held-out loss {before:.3f} → {after:.3f}, perplexity {perplexity_before:.1f} → {perplexity_after:.1f}"
    return Result(metrics, (line, *([scarce] if scarce else [])))


def report_of(
    metrics: dict[str, Any], rows: Sequence[Mapping[str, Any]], scarce: str, title: str, subtitle: str
) -> Report:
    """What is shown of the run: its figures, what is to be said of few held-out rows, and the loss in `rows` of its
    metrics stream."""
    report = Report(title, subtitle)
    report.figures_table(metrics)
    if scarce:
        report.text(scarce)
    report.plot(curves(rows, ("loss",)), "Training loss, nats a token.", "training loss over steps")
    return report


def few_rows(n: int) -> str:
    """What is to be said of a held-out loss over so few rows; empty where they are enough."""
    return f"the held-out loss is over {n} rows{few(n)}, and says little" if few(n) else ""


def perplexity(loss: float, what: str, lr: float | None, dtype: str) -> float:
    """exp of a loss.

    Raises:
        InputError: it is no number, or more than any model loses that says anything.
    """
    if not loss < LARGEST_LOSS:
        raise diverged(f"{what} is {loss:.3g} nats a token: nothing is published", lr, dtype)
    return math.exp(loss)
