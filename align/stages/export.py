"""What others load: the adapter in PEFT's format, or a model with the adapter merged in."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from align.config.export import ExportStageConfig
from align.config.root import Config
from align.data.chat import encode_prompts
from align.data.sources import data_record, prompts
from align.errors import InputError
from align.export.adapter import export_adapter
from align.export.card import render_card
from align.export.merged import export_merged, merge
from align.models.adapters import attach
from align.models.load import DTYPES, choose_device, choose_dtype, load_base
from align.models.trunk import pad
from align.ops.divergence import Divergence, kl_between, pooled
from align.report import Report
from align.run import Base, Run, json_digest
from align.stages import Inputs
from align.stages.lineage import evaluation_of, label, parents_of, start, tokenizer_of
from align.track import peak_rss_mb
from align.types import Result

ROWS_AT_ONCE = 4  # full logits of these are held, twice


def inputs(config: Config) -> Inputs:
    artifact, base = start(config, config.artifact, "artifact")
    if artifact.whole:
        raise InputError(
            "artifact",
            artifact.ref,
            "is a whole model already",
            f"Load {artifact.path} as it is, or export an adapter.",
        )
    records = {"artifact": artifact.record()}
    if (evaluation := evaluation_of(artifact, Path(config.run.root).expanduser())) is not None:
        records["evaluation"] = {"digest": json_digest(evaluation)}  # stands in the card: another is another export
    if config.export.name == "merged":  # whose fidelity is measured on prompts
        records["data"] = data_record(config.data)
    return Inputs(f"{label(base, config)}-{config.export.name}", base, records)


def run(run: Run, config: Config) -> Result:
    base, (artifact, _) = Base(**run.manifest["base"]), start(config, run.inputs["artifact"]["path"], "artifact")
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    tokenizer = tokenizer_of(artifact, base, config.data.template)
    root = Path(config.run.root).expanduser()
    named = {"id": public_id(base), "revision": base.revision or "", "digest": base.digest}
    facts: dict[str, Any] = {
        "name": f"{run.manifest['stage']}-{run.manifest['name']}", "kind": config.export.name, "base": named,
        "method": config.method.name, "parents": parents_of(artifact, root), "seed": config.seed,
    }  # fmt: skip
    if (evaluation := evaluation_of(artifact, root)) is not None:
        facts |= {"metrics": evaluation, "judge": evaluation.get("judge", "")}
    target = run.folder / "artifact"
    shutil.rmtree(target, ignore_errors=True)

    metrics: dict[str, Any] = {"base": base.id, "base_digest": base.digest}
    if config.export.name == "adapter":
        facts |= {"precision": "nf4" if config.method.name == "qlora" else str(dtype).removeprefix("torch.")}
        export_adapter(artifact.path, target, named, tokenizer=tokenizer, card=render_card(facts))
    else:
        weights = DTYPES[config.export.dtype]
        merged = merge(load_base(base, config.method.name, device, dtype), artifact.path, weights)
        export_merged(merged, target, named, tokenizer=tokenizer)
        del merged  # before two more models are loaded to compare
        divergence = compared(config, base, artifact.path, target, tokenizer)
        facts |= {"dtype": config.export.dtype, "divergence": divergence.as_dict()}
        (target / "README.md").write_text(render_card(facts), encoding="utf-8")
        metrics |= {"kl": divergence.kl, "top1": divergence.top1, "max_logprob": divergence.max_logprob}
    metrics["peak_rss_mb"] = peak_rss_mb()

    report = Report(f"export: {run.manifest['name']}", f"{artifact.ref} as {config.export.name}")
    report.figures_table(metrics)
    if "kl" in metrics:
        report.text(
            "The figures compare the merged model, loaded back as anyone would load it, with the model that was "
            f"trained ({'NF4 base' if config.method.name == 'qlora' else 'base'} and adapter), token by token."
        )
    report.write(run.folder / "report.html")
    close = f", KL {metrics['kl']:.2g} nats a token from what was trained" if "kl" in metrics else ""
    return Result(metrics, (f"{config.export.name} of {artifact.ref} in {target}{close}",))


def public_id(base: Base) -> str:
    """The base's name as another machine may know it: never a path of this one."""
    return base.id if not Path(base.id).is_absolute() and not base.id.startswith((".", "~")) else Path(base.id).name


@torch.no_grad()
def compared(config: Config, base: Base, adapter: Path, target: Path, tokenizer: Any) -> Divergence:
    """The merged model as it lies on disk against the model that was trained, on held-out prompts."""
    stage: ExportStageConfig = config.stage
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    found, _ = encode_prompts(
        tokenizer, prompts(config.data, "test", config.seed)[: stage.prompts], config.data.max_length
    )
    trained = attach(load_base(base, config.method.name, device, dtype), adapter, "policy")
    loaded = AutoModelForCausalLM.from_pretrained(target, dtype=dtype, device_map={"": device}).eval()
    parts = []
    for first in range(0, len(found), ROWS_AT_ONCE):
        rows = [p.input_ids for p in found[first : first + ROWS_AT_ONCE]]
        tokens = pad(rows, tokenizer.pad_token_id).to(device)
        mask = pad([[1] * len(row) for row in rows], 0).bool().to(device)
        truth, export = (m(input_ids=tokens, attention_mask=mask.long()).logits for m in (trained, loaded))
        parts.append(kl_between(truth, export, mask))
    return pooled(parts)
