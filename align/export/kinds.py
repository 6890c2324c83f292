"""The kinds of an export: each is written into a folder and measured there, and measured again where it lies."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.data.engine_template import contents_as_text
from align.export.adapter import rank_of, write_lowered
from align.export.bases import base_beside, base_folder, named_base
from align.export.checks import InF32, adapter_checks, gguf_answer, gguf_checks, merged_checks
from align.export.converters import convert_adapter, converters_in, first_mismatch
from align.export.engines import free_memory, logits_of
from align.export.gguf import ADAPTER, F16, F32, Source, base_file, gguf_bases, gguf_source, write_gguf
from align.export.launch import LAUNCH, Served, launches_adapter, launches_gguf, launches_merged
from align.export.merged import merged_model, write_merged
from align.export.ollama import ollama_file
from align.export.trained import Trained
from align.export.verdicts import Check, gap_in
from align.models.base import BUILT_IN
from align.models.dequantised import cast_weights, weights_dtype
from align.models.load import DTYPES
from align.rollout.engine_process import LLAMA_CPP, SETTINGS, Answer, interpreter
from align.run import Base
from align.run.atomic import scratch_folder


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
    """Writes the adapter, lowered, and the base that it knows; asks them back."""
    write_lowered(trained, folder)
    return measured_adapter(options, trained, folder, write_base=True)


def export_merged(options: Options, trained: Trained, folder: Path) -> list[Check]:
    """Writes base and adapter as one model; asks it before it is cast, and back."""
    model = merged_model(trained, options.into)
    summed = logits_of(model, trained.rows)
    cast_weights(model, DTYPES[options.dtype])
    model.config.dtype = DTYPES[options.dtype]
    write_merged(folder, model, named_base(trained.base), tokenizer=trained.tokenizer, beside=Path(trained.base.path))
    del model
    free_memory()  # before others are loaded to compare
    return merged_checks(trained, folder, options.into, options.dtype, summed, options.engines)


def export_gguf(options: Options, trained: Trained, folder: Path) -> list[Check]:
    """Writes base and adapter as GGUF, with a Modelfile; asks llama.cpp."""
    source = source_for(options, trained)
    python = interpreter(LLAMA_CPP, options.engines[LLAMA_CPP], SETTINGS[LLAMA_CPP])
    bases = gguf_bases(options.bases, source, options.quantised, python)
    with scratch_folder(folder / ADAPTER) as work:  # in what goes with a killed export
        write_gguf(folder, bases, write_lowered(trained, work / "adapter"), source)
    answer = gguf_answer(trained, folder / base_file(F16), folder / ADAPTER, options.engines)
    if answer is not None:
        starts = bool(answer.output["begins_with_bos"])
        text = ollama_file(folder, trained.tokenizer, starts, base_file(F16), ADAPTER)
        (folder / "Modelfile").write_text(text, encoding="utf-8")
    return measured_gguf(options, trained, folder, answer)


WRITERS: dict[str, Callable[[Options, Trained, Path], list[Check]]] = {
    "adapter": export_adapter, "merged": export_merged, "gguf": export_gguf,
}  # fmt: skip


def measured_again(options: Options, trained: Trained, folder: Path) -> list[Check]:
    """The checks of an export that was made before; which kind it is, its files say."""
    if (folder / ADAPTER).is_file():
        answer = gguf_answer(trained, folder / base_file(F16), folder / ADAPTER, options.engines)
        return measured_gguf(options, trained, folder, answer)
    if (folder / "config.json").is_file():
        summed = logits_of(merged_model(trained, options.into), trained.rows)
        free_memory()
        return merged_checks(trained, folder, options.into, weights_dtype(folder), summed, options.engines)
    return measured_adapter(options, trained, folder, write_base=False)


def measured_adapter(options: Options, trained: Trained, folder: Path, write_base: bool) -> list[Check]:
    base = base_beside(trained, options.bases, DTYPES[options.dtype], write_base) if options.with_base else None
    return adapter_checks(trained, folder, base, options.dtype, options.engines)


def measured_gguf(options: Options, trained: Trained, folder: Path, answer: Answer | None) -> list[Check]:
    """Args:
    answer: llama.cpp's, on the base in f16.
    """

    def in_f32() -> InF32 | None:
        with scratch_folder(options.bases / "f32") as work:
            source, base, made = source_for(options, trained), work / base_file(F32), work / "adapter.gguf"
            source.convert(base, F32)
            plain = write_lowered(trained, work / "adapter")
            convert_adapter(source.converters, plain, source.folder, made, F32)
            pairs = ((base, folder / base_file(F16)), (made, folder / ADAPTER))
            other = next((name for pair in pairs if (name := first_mismatch(source.converters, *pair))), "")
            exact = gguf_answer(trained, base, made, options.engines, precise=True)
            return None if exact is None else InF32(exact, other)

    return gguf_checks(trained, folder, options.into, options.engines, answer, in_f32)


def source_for(options: Options, trained: Trained) -> Source:
    return gguf_source(trained, options.into, converters_in(options.converters))


def launch_files(
    options: Options, trained: Trained, kind: str, folder: Path, home: Path, name: str, checks: Sequence[Check]
) -> None:
    """The files that start an engine on an export.

    Args:
        home: where `folder` will lie in the end.
        name: by which requests ask for it.
    """
    template, gap, original = contents_as_text(trained.tokenizer), gap_in(checks), options.into == "original"
    if kind == "adapter":
        named = named_base(trained.base)
        beside = base_folder(trained, options.bases, DTYPES[options.dtype]) if options.with_base else None
        seen = os.path.relpath(beside, home / LAUNCH) if beside is not None else ""
        revision = "" if named["id"] in BUILT_IN else named["revision"]
        launches_adapter(folder, name, Served(named["id"], seen, revision), rank_of(folder), gap, template)
    elif kind == "merged":
        launches_merged(folder, name, gap, original, template)
    else:
        launches_gguf(folder, name, ADAPTER, gap, original)


def receipt_facts(options: Options, base: Base, kind: str, artifact: str) -> dict[str, Any]:
    """What a receipt speaks of, and how it was made.

    Args:
        base: on which was trained.
        artifact: the digest of what was exported.
    """
    made = {"kind": kind, "dtype": "float16" if kind == "gguf" else options.dtype, "into": options.into}
    return {**made, "base": named_base(base), "artifact": artifact}
