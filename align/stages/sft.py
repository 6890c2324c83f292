"""Supervised fine-tuning of an adapter (`stage=sft`) or of all weights (`stage=full`).

tokenize the conversations; labels only on the tokens that the assistant writes
held-out loss of the model before training
train
held-out loss of the trained model; save adapter or weights
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from align import ranks
from align.config.root import Config
from align.config.settings import replace_values
from align.config.sft import SftConfig
from align.config.training import require_held_out_rows
from align.core.types import Document, StageResult
from align.data.chat.encode import EncodingResult, encode_documents
from align.data.chat.template import set_chat_template
from align.data.chat.training_view import write_first_rows
from align.data.sources import DataSource, build_data_inputs, list_held_out_sources, read_divided_documents
from align.models.base import BASE, build_run_label, find_adapter_folder, find_base
from align.models.lora import Lora
from align.report import format_interval
from align.run import Input, Run
from align.stages.runner import (
    StageInputs,
    collect_memory_metrics,
    load_input_artifact,
    open_tracker,
    resolve_stage_start,
)

if TYPE_CHECKING:
    from align.evals.held_out import HeldOutLoss

LARGEST_LOSS = 700.0
"""Largest held-out loss that is accepted, in nats per token: exp of a larger one overflows.

A uniform guess has 12 with the largest vocabularies.
"""
PRELOAD = ("align.trainers.sft", "align.models.sharded")
"""Modules with torch that `run` imports, loaded before it and before forks; see `align.stages.load_stage`."""


def inputs(config: Config) -> StageInputs:
    if config.init == BASE:
        base = find_base(config.model.path, config.model.revision)
        method = "qlora" if config.method.name == "auto" else config.method.name
        config = replace_values(config, method=replace_values(config.method, name=method))
        records = {"base": Input(base.digest, ref=base.id)}
    else:
        artifact, base, config = resolve_stage_start(config)
        records = {"init": artifact.as_input()}
    source = DataSource.from_settings(config.data)

    def rows() -> tuple[Any, ...]:
        train, test = read_divided_documents(source, config.seed)
        require_held_out_rows(config.stage.eval_every, len(test), "data.held_out")
        sources = list_held_out_sources(source, config.seed)
        return train, test[: config.stage.eval_size], sources[: config.stage.eval_size]

    records |= build_data_inputs(source)
    return StageInputs(config, build_run_label(base, config.method.name), base, records, rows, trains=True)


def run(
    run: Run,
    config: Config,
    train_documents: list[Document],
    test_documents: list[Document],
    test_sources: Sequence[str],
) -> StageResult:
    from align.evals.held_out import compute_held_out_loss
    from align.models.adapters import save_adapter
    from align.models.finite_checks import build_divergence_error
    from align.models.load import (
        choose_device,
        choose_dtype,
        get_context_length,
        load_base,
        load_own_tokenizer,
        load_tokenizer,
        read_configurations,
        require_packing_support,
        save_tokenizer,
    )
    from align.models.sharded import load_in_shards, save_full_model
    from align.trainers.common import add_trained_adapter, fit
    from align.trainers.sft import FIGURES, build_sft_trainer, pack_rows

    stage: SftConfig = config.stage
    base = run.base
    if stage.packing:
        require_packing_support(base)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    init = load_input_artifact(run) if "init" in run.inputs else None
    tokenizer = load_own_tokenizer(init, base) if init else load_tokenizer(base)
    is_plain_text = config.data.name == "chitchat" and config.data.part == "base"
    if not is_plain_text:
        set_chat_template(tokenizer, config.data.template, config.data.template_kwargs)

    # Tokenize before any weights are loaded. Only tokens that the assistant writes have a label.
    max_length = min(config.data.max_length, get_context_length(read_configurations(base)))
    cuts = config.data.too_long == "truncate"
    masks = config.data.reasoning == "mask"
    encode_rows = partial(encode_documents, tokenizer, max_length=max_length, truncate=cuts, mask_reasoning=masks)
    train = encode_rows(train_documents)
    test = encode_rows(test_documents, problem="leaves nothing to measure on")
    for line in describe_rows(train, test, max_length, cuts):
        print(line)
    run.known_metrics = {
        "train_rows": len(train.rows),
        "train_tokens": train.tokens,
        "held_out_rows": len(test.rows),
        "dropped_too_long": train.too_long,
        "dropped_unanswered": train.unanswered,
        "cut": train.cut,
        "held_out_too_long": test.too_long,
        "held_out_unanswered": test.unanswered,
        "held_out_cut": test.cut,
        "reasoning_lost_last": train.unreasoned,
        "reasoning_lost_earlier": train.unreasoned_earlier,
    }
    write_first_rows(run.folder, tokenizer, train.rows)
    require_held_out_rows(stage.eval_every, len(test.rows), "data.held_out")

    # Measure the held-out loss, train, measure again.
    shards = config.method.name == "full" and not ranks.is_alone()
    model = load_in_shards(base, device, dtype) if shards else load_base(base, config.method.name, device, dtype)
    if config.method.name != "full":
        model = add_trained_adapter(
            model, find_adapter_folder(init) if init else None, Lora.from_settings(config.method), config.seed
        )

    def measure(steps: int) -> HeldOutLoss:
        """Return the loss on the held-out rows after `steps` training steps. Raises InputError if it diverged."""
        loss = compute_held_out_loss(model, test.rows, tokenizer.pad_token_id)
        if not loss.mean < LARGEST_LOSS:
            what = f"after step {steps}" if steps else f"of {base.id} before training"
            problem = f"the held-out loss {what} is {loss.mean:.3g} nats a token: nothing is published"
            raise build_divergence_error(problem, stage.lr if steps else None, config.dtype)
        return loss

    at_start = measure(0) if test.rows else None
    fitted = fit(
        partial(build_sft_trainer, model, tokenizer, train.rows, max_length=max_length, packing=stage.packing),
        model,
        stage,
        config.seed,
        len(pack_rows(train.rows, max_length)) if stage.packing else len(train.rows),
        run,
        lambda step: measure(step).mean,
        device=device,
        dtype=dtype,
        track=open_tracker,
        figure_names=FIGURES,
    )
    figures: dict[str, Any] = {}
    if at_start is not None:
        at_end = measure(fitted.published_step)
        figures = compare_losses(at_start, at_end, [test_sources[i] for i in test.places] if test_sources else ())

    save_tokenizer(tokenizer, run.artifact)
    if config.method.name == "full":
        save_full_model(model, dtype, run.artifact)
    else:
        save_adapter(model, run.artifact, base)
    longest = max_length if stage.packing else max(len(row.input_ids) for row in train.rows)
    metrics = {
        **figures,
        **fitted.figures,
        **run.known_metrics,
        **collect_memory_metrics(run, config, longest),
    }
    return StageResult(metrics, (*describe_losses(metrics), fitted.summary))


def describe_rows(train: EncodingResult, test: EncodingResult, max_length: int, cuts_long_rows: bool) -> Iterator[str]:
    """Yield lines on the numbers of training and held-out rows, of rows dropped or cut, and of lost reasoning."""
    too_long = f"cut {train.cut} at" if cuts_long_rows else f"dropped {train.too_long} longer than"
    total = f"of {test.total_rows} " if test.total_rows > len(test.rows) else ""
    held_out = [f"{len(test.rows) or 'nothing'} {total}held out"]
    held_out += [f"{test.too_long} longer than {max_length} tokens"] if test.too_long else []
    held_out += [f"{test.cut} cut at {max_length} tokens"] if test.cut else []
    held_out += [f"{test.unanswered} without an assistant turn"] if test.unanswered else []
    yield (
        f"{len(train.rows)} rows, {train.tokens} tokens; {too_long} {max_length} tokens, "
        f"dropped {train.unanswered} without an assistant turn; {', '.join(held_out)}"
    )
    counts = (("the last answer", train.unreasoned), ("earlier answers", train.unreasoned_earlier))
    without_reasoning = [f"of {answers} in {count} rows" for answers, count in counts if count]
    if without_reasoning:
        yield (
            f"the chat template leaves out the reasoning {' and '.join(without_reasoning)}; "
            "these answers train without it"
        )


def compare_losses(before: HeldOutLoss, after: HeldOutLoss, sources: Sequence[str]) -> dict[str, Any]:
    """Return the held-out loss and perplexity before and after training, and the change of the loss, as metrics.

    If there are several sources, the metrics have the losses of each source too.

    Args:
        sources: name of each row's source; empty if there is only one.
    """
    figures: dict[str, Any] = {
        "loss_before": before.mean,
        "loss_after": after.mean,
        "loss_change": before.compute_change(after).as_dict(),
        "perplexity_before": math.exp(before.mean),
        "perplexity_after": math.exp(after.mean),
        "held_out_tokens": after.tokens,
    }
    names = dict.fromkeys(sources)
    if len(names) > 1:
        figures["loss_by_source"] = {}
        for name in names:
            is_selected = [source == name for source in sources]
            source_before = before.select(is_selected)
            source_after = after.select(is_selected)
            figures["loss_by_source"][name] = {
                "before": source_before.mean,
                "after": source_after.mean,
                "change": source_before.compute_change(source_after).as_dict(),
            }
    return figures


def describe_losses(metrics: Mapping[str, Any]) -> Iterator[str]:
    if not metrics["held_out_rows"]:
        yield "no rows were held out, so there is no held-out loss"
        return
    loss = f"{metrics['loss_before']:.3f} → {metrics['loss_after']:.3f}"
    perplexity = f"{metrics['perplexity_before']:.3f} → {metrics['perplexity_after']:.3f}"
    yield f"held-out loss {loss} (change {format_interval(metrics['loss_change'])}), perplexity {perplexity}"
    for name, losses in metrics.get("loss_by_source", {}).items():
        yield f"  {name}: {losses['before']:.3f} → {losses['after']:.3f} (change {format_interval(losses['change'])})"
