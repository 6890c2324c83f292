"""The kinds of export (adapter, merged, GGUF): each is written to a folder, and compared there with the trained
model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from align.data.chat.template import build_escaping_template
from align.export.adapter import read_plain_lora_rank, write_as_plain_lora
from align.export.bases import find_or_write_dequantised_base, get_dequantised_folder, link_base_unless_on_hub
from align.export.checks import F32Measurement, compare_adapter, compare_gguf_export, compare_merged, run_llama_cpp
from align.export.converters import convert_adapter, find_converters, find_mismatched_tensor
from align.export.engines import compute_choices, compute_logits, free_memory, gather_token_logprobs
from align.export.gguf import (
    ADAPTER,
    F16,
    F32,
    GgufSource,
    build_gguf_file_name,
    build_gguf_source,
    find_variants,
    write_adapter_as_gguf,
    write_missing_bases,
    write_whole_model_as_gguf,
)
from align.export.launch import (
    LAUNCH,
    ServedBase,
    write_adapter_scripts,
    write_align_script,
    write_llama_script,
    write_model_script,
)
from align.export.merged import load_merged_model, write_merged_model
from align.export.ollama import build_modelfile
from align.export.receipt_rows import ReceiptCheck, find_divergence_on_original
from align.export.trained_model import TrainedModel
from align.models.base import to_public_base
from align.models.dequantised import cast_weights_in_place, read_weights_dtype
from align.models.load import DTYPES
from align.rollout.engine_process import LLAMA_CPP, SETTINGS, EngineResponse, find_interpreter
from align.rollout.probes import Probes, write_probes
from align.run import Base
from align.run.atomic import scratch_folder
from align.run.weights import adapter_digest, build_local_base_name


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """The settings of an export: dtypes, base weights, folders and engines.

    Attributes:
        dtype: dtype of a merged model, and of the base beside an adapter.
        into: base weights of a merge and of a GGUF file, `nf4-dequantised` or `original`.
        bases: folder of the bases that exports share.
        with_base: write the dequantised base beside an adapter.
        quantised: further variants of a GGUF base, in fewer bits.
        converters: folder of llama.cpp's converters; None for the one they are unpacked to.
        engines: engine of `align.rollout.engine_process` → `auto`, `none` or the Python that has it.
    """

    dtype: str
    into: str
    bases: Path
    with_base: bool
    quantised: Sequence[str]
    converters: str | None
    engines: Mapping[str, str]


def export_adapter(options: ExportOptions, trained: TrainedModel, folder: Path) -> list[ReceiptCheck]:
    """Write a trained adapter as plain LoRA with its probes and base, and compare it with the trained model in each
    engine.

    A reward model's adapter has its score head.
    """
    write_as_plain_lora(trained, folder)
    if trained.base_logprobs is not None:
        probes = Probes(trained.rows, gather_token_logprobs(trained.logits, trained.rows), trained.base_logprobs)
        write_probes(folder, probes, adapter_digest(folder), trained.base.digest)
    return measure_adapter(options, trained, folder, write_missing_base=True)


def export_merged(options: ExportOptions, trained: TrainedModel, folder: Path) -> list[ReceiptCheck]:
    """Write a trained adapter merged into its base, or a fully trained model, and compare it with the trained model.

    The merge is compared before and after the cast to `dtype`.
    """
    model = load_merged_model(trained, options.into)
    merge_logits = compute_merge_logits(trained, model)
    cast_weights_in_place(model, DTYPES[options.dtype])
    model.config.dtype = DTYPES[options.dtype]
    write_merged_model(
        folder,
        model,
        to_public_base(trained.origin),
        tokenizer=trained.tokenizer,
        base_folder=Path(trained.origin.path),
    )
    del model
    free_memory()  # before the next model is loaded
    return compare_merged(trained, folder, options.into, options.dtype, merge_logits, options.engines)


def compute_merge_logits(trained: TrainedModel, model: Any) -> list[Tensor] | None:
    """Compute the logits of a merged model before it is saved, or return None for a fully trained model, which has no
    merge."""
    if trained.adapter is None:
        return None
    return (
        compute_choices(model, trained.rows, None)
        if trained.prompts.is_reward_model
        else compute_logits(model, trained.rows)
    )


def export_gguf(options: ExportOptions, trained: TrainedModel, folder: Path) -> list[ReceiptCheck]:
    """Write a trained adapter and its base, or a fully trained model, as GGUF with a Modelfile, and check it with
    llama.cpp."""
    source = build_export_source(options, trained)
    python = find_interpreter(LLAMA_CPP, options.engines[LLAMA_CPP], SETTINGS[LLAMA_CPP])
    files = write_missing_bases(options.bases, source, options.quantised, python)
    if trained.adapter is None:
        write_whole_model_as_gguf(folder, files, trained)
    else:
        with scratch_folder(folder / ADAPTER) as scratch:  # inside the export, so that a killed one leaves nothing
            write_adapter_as_gguf(folder, files, write_as_plain_lora(trained, scratch / "adapter"), source)
    answer = run_llama_cpp_on_export(options, trained, folder)
    if answer is not None:
        begins_with_bos = bool(answer.output["begins_with_bos"])
        adapter = None if trained.adapter is None else ADAPTER
        text = build_modelfile(
            folder, trained.tokenizer, begins_with_bos, build_gguf_file_name(F16, trained.adapter is None), adapter
        )
        (folder / "Modelfile").write_text(text, encoding="utf-8")
    return measure_gguf(options, trained, folder, answer)


WRITERS: dict[str, Callable[[ExportOptions, TrainedModel, Path], list[ReceiptCheck]]] = {
    "adapter": export_adapter,
    "merged": export_merged,
    "gguf": export_gguf,
}
"""Kind of export → function that writes it to an empty folder and returns its checks."""


def measure_export(options: ExportOptions, trained: TrainedModel, folder: Path) -> list[ReceiptCheck]:
    """Compare an existing export with the trained model again, and return the checks.

    The kind is found by the files in the folder.
    """
    if F16 in find_variants(folder):
        return measure_gguf(options, trained, folder, run_llama_cpp_on_export(options, trained, folder))
    if (folder / "config.json").is_file():
        merge_logits = None
        if trained.adapter is not None:
            merge_logits = compute_merge_logits(trained, load_merged_model(trained, options.into))
        free_memory()
        return compare_merged(trained, folder, options.into, read_weights_dtype(folder), merge_logits, options.engines)
    return measure_adapter(options, trained, folder, write_missing_base=False)


def measure_adapter(
    options: ExportOptions, trained: TrainedModel, folder: Path, write_missing_base: bool
) -> list[ReceiptCheck]:
    base = (
        find_or_write_dequantised_base(trained, options.bases, DTYPES[options.dtype], write_missing_base)
        if options.with_base
        else None
    )
    return compare_adapter(trained, folder, base, options.dtype, options.engines)


def run_llama_cpp_on_export(options: ExportOptions, trained: TrainedModel, folder: Path) -> EngineResponse | None:
    """Run llama.cpp on the f16 files of a GGUF export and return its response, or None if llama.cpp is not
    installed."""
    adapter = None if trained.adapter is None else folder / ADAPTER
    return run_llama_cpp(trained, folder / build_gguf_file_name(F16, adapter is None), adapter, options.engines)


def measure_gguf(
    options: ExportOptions, trained: TrainedModel, folder: Path, f16_response: EngineResponse | None
) -> list[ReceiptCheck]:
    """Compare a GGUF export with the trained model by llama.cpp's response, and in f32 if f16 misses its bound.

    Args:
        f16_response: llama.cpp's, on the base in f16; None if it is not installed.
    """

    def measure_in_f32() -> F32Measurement | None:
        with scratch_folder(options.bases / "f32") as scratch:
            source = build_export_source(options, trained)
            base = scratch / build_gguf_file_name(F32)
            source.convert(base, F32)
            adapter = None
            pairs = [(base, folder / build_gguf_file_name(F16, trained.adapter is None))]
            if trained.adapter is not None:
                adapter = scratch / "adapter.gguf"
                plain_adapter = write_as_plain_lora(trained, scratch / "adapter")
                convert_adapter(source.converters, plain_adapter, source.folder, adapter, F32)
                pairs.append((adapter, folder / ADAPTER))
            mismatch = next((name for pair in pairs if (name := find_mismatched_tensor(source.converters, *pair))), "")
            exact = run_llama_cpp(trained, base, adapter, options.engines, use_f32_cache=True)
            return None if exact is None else F32Measurement(exact, mismatch)

    return compare_gguf_export(trained, folder, options.into, options.engines, f16_response, measure_in_f32)


def build_export_source(options: ExportOptions, trained: TrainedModel) -> GgufSource:
    return build_gguf_source(trained, options.into, find_converters(options.converters))


def write_launch_files(
    options: ExportOptions,
    trained: TrainedModel,
    kind: str,
    folder: Path,
    final_folder: Path,
    name: str,
    checks: Sequence[ReceiptCheck],
) -> None:
    """Write the launch scripts of an export, and a link to an adapter's base if the base is not on a hub.

    Args:
        final_folder: final path of `folder`.
        name: the model's name in requests.
    """
    template = build_escaping_template(trained.tokenizer)
    gap = find_divergence_on_original(checks)
    original = options.into == "original" and trained.adapter is not None
    if kind == "adapter":
        base = to_public_base(trained.base)
        dequantised = (
            get_dequantised_folder(trained, options.bases, DTYPES[options.dtype]) if options.with_base else None
        )
        relative_path = os.path.relpath(dequantised, final_folder / LAUNCH) if dequantised is not None else ""
        if link_base_unless_on_hub(trained, dequantised, folder, final_folder):
            relative_path = f"../{build_local_base_name(base)}"
        served_base = ServedBase(base["id"], relative_path, base["revision"], build_local_base_name(base))
        write_align_script(folder, name, served_base, trained.prompts.is_reward_model)
        if not trained.prompts.is_reward_model:  # no other engine reads a score head beside an adapter
            write_adapter_scripts(folder, name, served_base, read_plain_lora_rank(folder), gap, template)
    elif kind == "merged":
        if not trained.prompts.is_reward_model:
            write_align_script(folder, name, None)
        write_model_script(folder, name, gap, original, template, trained.prompts.is_reward_model)
    else:
        write_llama_script(folder, name, None if trained.adapter is None else ADAPTER, gap, original)


def describe_export(options: ExportOptions, base: Base, kind: str, artifact: str) -> dict[str, Any]:
    """Return the fields of a receipt that describe an export: kind, dtype, base weights, base model and artifact
    digest.

    Args:
        base: the model that it grew from.
        artifact: digest of the exported artifact.
    """
    return {
        "kind": kind,
        "dtype": "float16" if kind == "gguf" else options.dtype,
        "into": options.into,
        "base": to_public_base(base),
        "artifact": artifact,
    }
