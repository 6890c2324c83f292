"""The kinds of an export: each is written into a folder and measured there, and measured again where it lies."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from align.data.chat.template import contents_as_text
from align.export.adapter import rank_of, write_lowered
from align.export.bases import base_beside, base_folder, link_base
from align.export.checks import InF32, adapter_checks, gguf_answer, gguf_checks, merged_checks
from align.export.converters import convert_adapter, converters_in, first_mismatch
from align.export.engines import choices_of, free_memory, logits_of, picked
from align.export.gguf import (
    ADAPTER,
    F16,
    F32,
    Source,
    base_file,
    gguf_bases,
    gguf_source,
    variants_in,
    write_gguf,
    write_whole_gguf,
)
from align.export.launch import (
    LAUNCH,
    Served,
    write_adapter_scripts,
    write_align_script,
    write_llama_script,
    write_model_script,
)
from align.export.merged import merged_model, write_merged
from align.export.ollama import ollama_file
from align.export.receipt_rows import Check, gap_in
from align.export.trained import Trained
from align.models.base import named_base
from align.models.dequantised import cast_weights, weights_dtype
from align.models.load import DTYPES
from align.rollout.engine_process import LLAMA_CPP, SETTINGS, Answer, interpreter
from align.rollout.probes import Probes, write_probes
from align.run import Base
from align.run.atomic import scratch_folder
from align.run.weights import adapter_digest, local_base_name


@dataclass(frozen=True, slots=True)
class Options:
    """How exports are made.

    Attributes:
        dtype: of a merged model, and of the base beside an adapter.
        into: the weights that a merge and a GGUF base are made of, `nf4-dequantised` or `original`.
        bases: the folder of the bases that exports share.
        with_base: the dequantised base is written beside an adapter.
        quantised: the variants of a GGUF base in fewer bits.
        converters: the folder of llama.cpp's; None: where they were downloaded to.
        engines: for each of `align.rollout.engine_process`, `auto`, `none` or the Python that has it.
    """

    dtype: str
    into: str
    bases: Path
    with_base: bool
    quantised: Sequence[str]
    converters: str | None
    engines: Mapping[str, str]


def export_adapter(options: Options, trained: Trained, folder: Path) -> list[Check]:
    """Writes the adapter, lowered, a reward model's with its head, what an engine must say by it, and the base that it
    knows; asks them back."""
    write_lowered(trained, folder)
    if trained.base_logprobs is not None:
        probes = Probes(trained.rows, picked(trained.logits, trained.rows), trained.base_logprobs)
        write_probes(folder, probes, adapter_digest(folder), trained.base.digest)
    return measured_adapter(options, trained, folder, write_base=True)


def export_merged(options: Options, trained: Trained, folder: Path) -> list[Check]:
    """Writes base and adapter as one model, or one that is whole; asks a merge before it is cast, and each back."""
    model = merged_model(trained, options.into)
    summed = logits_in_memory(trained, model)
    cast_weights(model, DTYPES[options.dtype])
    model.config.dtype = DTYPES[options.dtype]
    write_merged(
        folder, model, named_base(trained.origin), tokenizer=trained.tokenizer, beside=Path(trained.origin.path)
    )
    del model
    free_memory()  # before others are loaded to compare
    return merged_checks(trained, folder, options.into, options.dtype, summed, options.engines)


def logits_in_memory(trained: Trained, model: Any) -> list[Tensor] | None:
    """What a merge says before it is saved; None of a whole model, which is nobody's sum."""
    if trained.adapter is None:
        return None
    return choices_of(model, trained.rows, None) if trained.asked.scores else logits_of(model, trained.rows)


def export_gguf(options: Options, trained: Trained, folder: Path) -> list[Check]:
    """Writes base and adapter, or a whole model, as GGUF, with a Modelfile; asks llama.cpp."""
    source = source_for(options, trained)
    python = interpreter(LLAMA_CPP, options.engines[LLAMA_CPP], SETTINGS[LLAMA_CPP])
    files = gguf_bases(options.bases, source, options.quantised, python)
    if trained.adapter is None:
        write_whole_gguf(folder, files, trained)
    else:
        with scratch_folder(folder / ADAPTER) as work:  # in what goes with a killed export
            write_gguf(folder, files, write_lowered(trained, work / "adapter"), source)
    answer = answer_in(options, trained, folder)
    if answer is not None:
        starts = bool(answer.output["begins_with_bos"])
        adapter = None if trained.adapter is None else ADAPTER
        text = ollama_file(folder, trained.tokenizer, starts, base_file(F16, trained.adapter is None), adapter)
        (folder / "Modelfile").write_text(text, encoding="utf-8")
    return measured_gguf(options, trained, folder, answer)


WRITERS: dict[str, Callable[[Options, Trained, Path], list[Check]]] = {
    "adapter": export_adapter, "merged": export_merged, "gguf": export_gguf,
}  # fmt: skip


def measured_again(options: Options, trained: Trained, folder: Path) -> list[Check]:
    """The checks of an export that was made before; which kind it is, its files say."""
    if F16 in variants_in(folder):
        return measured_gguf(options, trained, folder, answer_in(options, trained, folder))
    if (folder / "config.json").is_file():
        summed = None if trained.adapter is None else logits_in_memory(trained, merged_model(trained, options.into))
        free_memory()
        return merged_checks(trained, folder, options.into, weights_dtype(folder), summed, options.engines)
    return measured_adapter(options, trained, folder, write_base=False)


def measured_adapter(options: Options, trained: Trained, folder: Path, write_base: bool) -> list[Check]:
    base = base_beside(trained, options.bases, DTYPES[options.dtype], write_base) if options.with_base else None
    return adapter_checks(trained, folder, base, options.dtype, options.engines)


def answer_in(options: Options, trained: Trained, folder: Path) -> Answer | None:
    """llama.cpp's answer to what a GGUF export holds in f16; None where it is not there."""
    adapter = None if trained.adapter is None else folder / ADAPTER
    return gguf_answer(trained, folder / base_file(F16, adapter is None), adapter, options.engines)


def measured_gguf(options: Options, trained: Trained, folder: Path, answer: Answer | None) -> list[Check]:
    """Args:
    answer: llama.cpp's, on the base in f16.
    """

    def in_f32() -> InF32 | None:
        with scratch_folder(options.bases / "f32") as work:
            source, base, made = source_for(options, trained), work / base_file(F32), None
            source.convert(base, F32)
            pairs = [(base, folder / base_file(F16, trained.adapter is None))]
            if trained.adapter is not None:
                made = work / "adapter.gguf"
                convert_adapter(
                    source.converters, write_lowered(trained, work / "adapter"), source.folder, made, F32
                )  # fmt: skip
                pairs.append((made, folder / ADAPTER))
            other = next((name for pair in pairs if (name := first_mismatch(source.converters, *pair))), "")
            exact = gguf_answer(trained, base, made, options.engines, precise=True)
            return None if exact is None else InF32(exact, other)

    return gguf_checks(trained, folder, options.into, options.engines, answer, in_f32)


def source_for(options: Options, trained: Trained) -> Source:
    return gguf_source(trained, options.into, converters_in(options.converters))


def launch_files(
    options: Options, trained: Trained, kind: str, folder: Path, home: Path, name: str, checks: Sequence[Check]
) -> None:
    """The files that start an engine on an export, and the link to the base of an adapter that no hub has.

    Args:
        home: where `folder` will lie in the end.
        name: by which requests ask for it.
    """
    template, gap = contents_as_text(trained.tokenizer), gap_in(checks)
    original = options.into == "original" and trained.adapter is not None
    if kind == "adapter":
        named = named_base(trained.base)
        beside = base_folder(trained, options.bases, DTYPES[options.dtype]) if options.with_base else None
        seen = os.path.relpath(beside, home / LAUNCH) if beside is not None else ""
        if link_base(trained, beside, folder, home):
            seen = f"../{local_base_name(named)}"
        served = Served(named["id"], seen, named["revision"], local_base_name(named))
        write_align_script(folder, name, served, trained.asked.scores)
        if not trained.asked.scores:  # no other engine takes a head of scores beside an adapter
            write_adapter_scripts(folder, name, served, rank_of(folder), gap, template)
    elif kind == "merged":
        if not trained.asked.scores:
            write_align_script(folder, name, None)
        write_model_script(folder, name, gap, original, template, trained.asked.scores)
    else:
        write_llama_script(folder, name, None if trained.adapter is None else ADAPTER, gap, original)


def receipt_facts(options: Options, base: Base, kind: str, artifact: str) -> dict[str, Any]:
    """What a receipt speaks of, and how it was made.

    Args:
        base: by which a card names what it grew from.
        artifact: the digest of what was exported.
    """
    made = {"kind": kind, "dtype": "float16" if kind == "gguf" else options.dtype, "into": options.into}
    return {**made, "base": named_base(base), "artifact": artifact}
