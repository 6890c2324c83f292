"""Supervised instruction tuning, of an adapter (`stage=sft`) or of every weight (`stage=full`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from align import ranks
from align.config.root import Config
from align.config.settings import changed
from align.config.sft import SftConfig
from align.config.training import held_out_for
from align.core.types import Document, Result
from align.data.chat.encode import Encoded, Encoding, encode
from align.data.chat.template import use_template
from align.data.chat.training_view import write_rows
from align.data.sources import data_records, divided_documents, held_out_sources
from align.models.base import find_base
from align.models.start import BASE, adapter_folder, label
from align.report import in_words
from align.run import Input, Run
from align.stages.execution import tracker
from align.stages.footprint import predicted_peak
from align.stages.rows import source_of
from align.stages.starting import Inputs, lora_of, start, starting_point
from align.track import peak_memory

if TYPE_CHECKING:
    from align.evals.heldout import HeldOutLoss


MEASURED = ("loss", "perplexity")
LARGEST_LOSS = 700.0
"""Nats a token; exp of it is still a number. Chance is at 12 for the largest vocabularies."""


PRELOAD = ("align.trainers.sft", "align.models.sharded")
"""See `align.stages.load_stage`."""


def inputs(config: Config) -> Inputs:
    if config.init == BASE:
        base = find_base(config.model.path, config.model.revision)
        chosen = "qlora" if config.method.name == "auto" else config.method.name
        config = changed(config, method=changed(config.method, name=chosen))
        records = {"base": Input(base.digest, ref=base.id)}
    else:
        artifact, base, config = starting_point(config)
        records = {"init": artifact.as_input()}

    def rows() -> tuple[Any, ...]:
        train, test = divided_documents(source_of(config), config.seed)
        held_out_for(config.stage.eval_every, len(test), "data.held_out")
        sources = held_out_sources(source_of(config), config.seed)
        return train, test[: config.stage.eval_size], sources[: config.stage.eval_size]

    records |= data_records(source_of(config))
    return Inputs(config, label(base, config.method.name), base, records, rows, trains=True)


def run(
    run: Run, config: Config, train_documents: list[Document], test_documents: list[Document],
    test_sources: Sequence[str],
) -> Result:  # fmt: skip
    import torch

    from align.models.adapters import attach, save_adapter, with_new_adapter
    from align.models.load import (
        check_packing,
        choose_device,
        choose_dtype,
        context_length,
        describe,
        load_base,
        load_tokenizer,
        own_tokenizer,
        save_tokenizer,
    )
    from align.models.sharded import load_in_shards, save_whole
    from align.trainers.common import Training, fit
    from align.trainers.evaluation import Measuring
    from align.trainers.sft import FIGURES, packed_rows, sft_trainer

    stage: SftConfig = config.stage
    base = run.base
    if stage.packing:
        check_packing(base)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    init = start(config, run.inputs["init"].path)[0] if "init" in run.inputs else None
    tokenizer = own_tokenizer(init, base) if init else load_tokenizer(base)
    text_only = config.data.name == "chitchat" and config.data.part == "base"
    if not text_only:
        use_template(tokenizer, config.data.template, config.data.template_kwargs)

    # Data, before any weights: our own tokens and labels, a loss only on what the assistant writes.
    max_length = min(config.data.max_length, context_length(describe(base)))
    cuts, masks = config.data.too_long == "truncate", config.data.reasoning == "mask"
    encoded = partial(encode, tokenizer, max_length=max_length, truncate=cuts, mask_reasoning=masks)
    train, test = encoded(train_documents), encoded(test_documents, left="leaves nothing to measure on")
    for line in about_rows(train, test, max_length, cuts):
        print(line)
    run.known_metrics = counts_of(train, test)
    write_rows(run.folder, tokenizer, train.rows)
    held_out_for(stage.eval_every, len(test.rows), "data.held_out")

    # The model before training, then training, then the same measure again.
    shards = config.method.name == "full" and not ranks.alone()
    model = load_in_shards(base, device, dtype) if shards else load_base(base, config.method.name, device, dtype)
    if config.method.name != "full":
        torch.manual_seed(config.seed)  # a fresh adapter's lora_A is random
        before = adapter_folder(init) if init else None
        model = attach(model, before, "default", trainable=True) if before else with_new_adapter(model, lora_of(config))
    assert stage.lr is not None  # filled in by `fill_rates`
    measure = partial(measured, model, test.rows, tokenizer, base.id, stage.lr, config.dtype)
    at_start = measure()
    rows = len(packed_rows(train.rows, max_length)) if stage.packing else len(train.rows)
    fitted = fit(
        partial(sft_trainer, model, tokenizer, train.rows, max_length=max_length, packing=stage.packing),
        model, Training.of(stage, config.seed), rows, run,
        Measuring.by(partial(mean_loss, measure), stage),
        device=device, dtype=dtype, track=partial(tracker, run, config), log_every=stage.log_every, figures=FIGURES,
    )  # fmt: skip
    at_end = measure(fitted.published_step)

    # Publish.
    save_tokenizer(tokenizer, run.artifact)
    if config.method.name == "full":
        save_whole(model, dtype, run.artifact)
    else:
        save_adapter(model, run.artifact, base)
    metrics = {
        **held_out_figures(at_start, at_end),
        **figures_by_source([test_sources[i] for i in test.places] if test_sources else (), at_start, at_end),
        **fitted.figures, **run.known_metrics, **peak_memory(),
        **predicted_peak(config, run, max_length if stage.packing else max(len(r.input_ids) for r in train.rows)),
    }  # fmt: skip
    return Result(metrics, (in_a_line(metrics), *lines_by_source(metrics), fitted.said))


def about_rows(train: Encoding, test: Encoding, max_length: int, cuts: bool) -> Iterator[str]:
    """What is trained on and measured on, and what was left out of both."""
    fate = f"cut {train.cut} at" if cuts else f"dropped {train.too_long} longer than"
    of = f"of {test.given} " if test.given > len(test.rows) else ""
    held_out = [f"{len(test.rows) or 'nothing'} {of}held out"]
    held_out += [f"{test.too_long} longer than {max_length} tokens"] if test.too_long else []
    held_out += [f"{test.cut} cut at {max_length} tokens"] if test.cut else []
    held_out += [f"{test.unanswered} without an assistant turn"] if test.unanswered else []
    yield (
        f"{len(train.rows)} rows, {train.tokens} tokens; {fate} {max_length} tokens, "
        f"dropped {train.unanswered} without an assistant turn; {', '.join(held_out)}"
    )
    counts = (("the last answer", train.unreasoned), ("earlier answers", train.unreasoned_earlier))
    if lost := [f"of {what} in {count} rows" for what, count in counts if count]:
        yield f"the chat template leaves out the reasoning {' and '.join(lost)}; these answers train without it"


def counts_of(train: Encoding, test: Encoding) -> dict[str, int]:
    """Rows that were kept and left out, for the manifest."""
    return {
        "train_rows": len(train.rows), "train_tokens": train.tokens, "held_out_rows": len(test.rows),
        "dropped_too_long": train.too_long, "dropped_unanswered": train.unanswered, "cut": train.cut,
        "held_out_too_long": test.too_long, "held_out_unanswered": test.unanswered, "held_out_cut": test.cut,
        "reasoning_lost_last": train.unreasoned, "reasoning_lost_earlier": train.unreasoned_earlier,
    }  # fmt: skip


def in_a_line(metrics: Mapping[str, Any]) -> str:
    if not metrics["held_out_rows"]:
        return "nothing was held out, so that nothing says how well it learned"
    loss, perplexity = (f"{metrics[f'{name}_before']:.3f} → {metrics[f'{name}_after']:.3f}" for name in MEASURED)
    return f"held-out loss {loss} (change {in_words(metrics['loss_change'])}), perplexity {perplexity}"


def measured(
    model: Any, rows: Sequence[Encoded], tokenizer: Any, base: str, lr: float, dtype: str, steps: int = 0
) -> HeldOutLoss | None:
    """The loss on what is held out, after so many steps of training; None where nothing is held out.

    Raises:
        InputError: the loss is no number, or more than any model loses that says anything.
    """

    from align.evals.heldout import held_out_loss
    from align.models.finite import diverged

    if not rows:
        return None
    found = held_out_loss(model, rows, tokenizer.pad_token_id)
    if not found.mean < LARGEST_LOSS:
        what = f"after step {steps}" if steps else f"of {base} before training"
        problem = f"the held-out loss {what} is {found.mean:.3g} nats a token: nothing is published"
        raise diverged(problem, lr if steps else None, dtype)
    return found


def mean_loss(measure: Callable[[int], HeldOutLoss | None], step: int) -> float:
    found = measure(step)
    assert found is not None, "nothing is held out"
    return found.mean


def held_out_figures(before: HeldOutLoss | None, after: HeldOutLoss | None) -> dict[str, Any]:
    """Loss and perplexity before and after training, and by how much the loss changed; nothing where nothing is held
    out."""

    from align.evals.heldout import change_of

    if before is None or after is None:
        return {}
    return {
        "loss_before": before.mean, "loss_after": after.mean, "loss_change": change_of(before, after).as_dict(),
        "perplexity_before": math.exp(before.mean), "perplexity_after": math.exp(after.mean),
        "held_out_tokens": after.tokens,
    }  # fmt: skip


def figures_by_source(
    sources: Sequence[str], before: HeldOutLoss | None, after: HeldOutLoss | None
) -> dict[str, dict[str, Any]]:
    """The same of each source's rows alone, where a data set has more than one.

    Args:
        sources: of each row.
    """

    from align.evals.heldout import change_of

    names = dict.fromkeys(sources)
    if len(names) < 2 or before is None or after is None:
        return {}
    found: dict[str, Any] = {}
    for name in names:
        mine = [source == name for source in sources]
        one, other = before.of(mine), after.of(mine)
        found[name] = {"before": one.mean, "after": other.mean, "change": change_of(one, other).as_dict()}
    return {"loss_by_source": found}


def lines_by_source(metrics: Mapping[str, Any]) -> Iterator[str]:
    for name, found in metrics.get("loss_by_source", {}).items():
        yield f"  {name}: {found['before']:.3f} → {found['after']:.3f} (change {in_words(found['change'])})"
