"""The checks of a receipt: each export on each base, in each installed engine, compared with the trained model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from align.data.chat.fixed_prompts import render_fixed_prompts
from align.export.adapter import read_rank
from align.export.engines import VERSION, run_adapter, run_model
from align.export.gguf import ADAPTER, F16, F32, check_tokenization, find_variants, list_texts
from align.export.receipt_rows import FAIL, Bound, ReceiptCheck
from align.export.trained_model import TrainedModel
from align.models.dequantised import DEQUANTISED
from align.models.load import get_dtype_name
from align.ops.divergence import compute_divergence
from align.rollout.engine_process import (
    LLAMA_CPP,
    RANKS,
    SETTINGS,
    TRANSFORMERS,
    VLLM,
    EngineResponse,
    choose_vllm_rank,
    explain_skipped_engine,
    find_interpreter,
    run_engine_script,
)

EXACT: Bound = ("max_logprob", 1e-4)
"""Bound for the same weights, summed in fp32 by another loader."""
MERGED: Bound = ("kl", 1e-5)
"""Bound for a merge computed and compared in fp32."""
ROUNDED: Bound = ("kl", 1e-2)
"""Bound for weights that were saved in fewer bits."""
SCORES: Bound = ("kl", 1e-3)
"""The same for scores as choices: they moved by 0.09 at texts of nearly equal score."""
GGUF: Bound = ("max_logprob", 0.02)
"""Bound for llama.cpp's f16 weights, activations and cache."""
ENGINE: Bound = ("kl", 1e-3)
"""Bound for llama.cpp in f16 on weights that are known to be exact."""
PRECISE: Bound = ("max_logprob", 1e-3)
"""Bound for another engine that computes in fp32 on fp32 weights."""

Engines = Mapping[str, str]
"""Engine of `align.rollout.engine_process` → `auto`, `none` or the Python that has it."""
OLLAMA = "Ollama"
BEFORE_CAST = "merge-before-cast"
"""Name of the merge in fp32, before its weights are cast and saved."""
NO_BASE = "that base was left out of the export, or is not beside the runs"
NO_SCORES = "its converter does not support this score head"
NO_POOLING = "it gives scores only for a merged model, with --runner pooling"
READS_GGUF = "it reads GGUF: export=gguf"
READS_NO_GGUF = "it reads no adapter in GGUF"
AS_MERGED = "it checks export=merged"


def check_adapter(
    trained: TrainedModel, folder: Path, dequantised: Path | None, kept: str, engines: Engines
) -> list[ReceiptCheck]:
    """Compare an exported adapter with the trained model, on each base that it may be used on.

    Args:
        dequantised: folder of the dequantised base, with its weights in `kept`; None if it was not written.
        kept: dtype of that base.
    """
    base = Path(trained.base.path)
    is_nf4 = trained.kind == "nf4"
    logits = run_adapter(base, folder, trained.prompts, trained.device, trained.dtype, quantised=is_nf4)
    checks = [trained.compare(logits, "adapter", trained.kind, get_dtype_name(trained.dtype), EXACT)]
    if not is_nf4:
        checks.append(check_vllm(trained, base, folder, "original", get_dtype_name(trained.dtype), engines))
    else:
        if dequantised is None:
            checks.append(ReceiptCheck(TRANSFORMERS, "adapter", DEQUANTISED, kept, note=NO_BASE))
            checks.append(ReceiptCheck(VLLM, note=NO_BASE))
        else:
            bound = EXACT if kept == "float32" else choose_rounding_bound(trained)
            logits = run_adapter(dequantised, folder, trained.prompts, trained.device)
            checks.append(trained.compare(logits, "adapter", DEQUANTISED, kept, bound))
            checks.append(check_vllm(trained, dequantised, folder, DEQUANTISED, kept, engines))
        checks.append(check_on_original(trained, folder))
    return sort_checks([*checks, *trained.base_checks, explain_no_gguf(trained)])


def check_merged(
    trained: TrainedModel, folder: Path, into: str, kept: str, summed: Sequence[Tensor] | None, engines: Engines
) -> list[ReceiptCheck]:
    """Compare an exported merged or whole model with the trained one, as saved and also before its cast to `kept`.

    Merged into the original weights, a QLoRA adapter makes another model. It is compared with the adapter on these
    weights, and its difference from the trained model is reported.
    """
    has_training_weights, expected_logits = compute_expected_logits(trained, into)
    logits = run_model(folder, trained.prompts, trained.device)
    checks = []
    if summed is not None:
        divergence = compute_divergence(expected_logits, summed)
        checks.append(
            ReceiptCheck(TRANSFORMERS, BEFORE_CAST, into, "float32", VERSION, divergence, MERGED, shipped=False)
        )
    bound = MERGED if kept == "float32" else choose_rounding_bound(trained)
    divergence = compute_divergence(expected_logits, logits)
    checks.append(ReceiptCheck(TRANSFORMERS, name_model(trained), into, kept, VERSION, divergence, bound))
    checks.append(check_vllm(trained, folder, None, into, kept, engines, expected_logits))
    return sort_checks(
        [*checks, *report_differences(trained, has_training_weights, logits, into, kept), explain_no_gguf(trained)]
    )


def choose_rounding_bound(trained: TrainedModel) -> Bound:
    """Return the bound for weights that were saved in fewer bits."""
    return SCORES if trained.prompts.scores else ROUNDED


def name_model(trained: TrainedModel) -> str:
    """Return the receipt's name for an export as one model."""
    return "model" if trained.adapter is None else "merged"


def explain_no_gguf(trained: TrainedModel) -> ReceiptCheck:
    """Return a check that says why llama.cpp did not read this export."""
    return ReceiptCheck(LLAMA_CPP, note=NO_SCORES if trained.prompts.scores else READS_GGUF)


def run_llama_cpp(
    trained: TrainedModel, base: Path, adapter: Path | None, engines: Engines, precise: bool = False
) -> EngineResponse | None:
    """Run llama.cpp on GGUF files, a base and an adapter or a whole model. Returns None if it is not installed.

    Args:
        precise: keep the cache of keys and values in f32 instead of f16.

    Raises:
        InputError: It tokenizes text otherwise than in training, or cannot load the files.
    """
    python = find_interpreter(LLAMA_CPP, engines[LLAMA_CPP], SETTINGS[LLAMA_CPP])
    if python is None:
        return None
    prompts = render_fixed_prompts(trained.tokenizer, max(map(len, trained.rows)))
    answer = run_engine_script(
        LLAMA_CPP,
        python,
        SETTINGS[LLAMA_CPP],
        model=str(base),
        precise=precise,
        adapter=None if adapter is None else str(adapter),
        rows=[list(row) for row in trained.rows],
        texts=list_texts(trained.tokenizer, prompts),
    )
    check_tokenization(trained.tokenizer, prompts, answer)
    return answer


@dataclass(frozen=True, slots=True)
class F32Measurement:
    """A measurement of the same base and adapter, converted to f32.

    Attributes:
        answer: llama.cpp's answer on the f32 files, with its cache in f32.
        mismatch: name of the first tensor of the exported files that is not the rounded f32 tensor; empty if all are.
    """

    answer: EngineResponse
    mismatch: str


def check_gguf(
    trained: TrainedModel,
    folder: Path,
    into: str,
    engines: Engines,
    first: EngineResponse | None,
    in_f32: Callable[[], F32Measurement | None],
) -> list[ReceiptCheck]:
    """Compare an export in GGUF, run by llama.cpp, with the trained model. Variants in fewer bits have no bound.

    Args:
        first: `run_llama_cpp` on the base in f16; None if llama.cpp is not installed.
        in_f32: measure the f32 conversion. It is called only if f16 misses its bound, which models with large
            activations do by llama.cpp's own rounding. If f32 keeps its bound, and the exported tensors are its rounded
            ones, the export is right.
    """
    vllm_note = AS_MERGED if trained.adapter is None else READS_NO_GGUF
    not_run = [ReceiptCheck(OLLAMA, note="its Modelfile is not tested"), ReceiptCheck(VLLM, note=vllm_note)]
    if first is None:
        checks = report_differences(trained, True, (), into, F16)
        return [*checks, ReceiptCheck(LLAMA_CPP, note=explain_skipped_engine(LLAMA_CPP, engines[LLAMA_CPP])), *not_run]
    has_training_weights, expected_logits = compute_expected_logits(trained, into)
    adapter = None if trained.adapter is None else folder / ADAPTER
    what = name_model(trained) if adapter is None else "adapter"

    def build_check(response: EngineResponse, weights: str, bound: Bound | None, note: str = "") -> ReceiptCheck:
        divergence = compute_divergence(expected_logits, strip_padding(response, expected_logits))
        return ReceiptCheck(LLAMA_CPP, what, into, weights, response.version, divergence, bound, note)

    checks = [build_check(first, F16, GGUF)]
    if checks[0].verdict == FAIL and (exact := in_f32()):
        if exact.mismatch:
            checks = [replace(checks[0], note=f"{exact.mismatch} differs from the converted model")]
        else:
            note = f"{GGUF[0]} misses {GGUF[1]:g} by llama.cpp's rounding: the same numbers in f32 do not"
            f32_check = replace(build_check(exact.answer, F32, PRECISE), shipped=False)
            checks = [f32_check, build_check(first, F16, ENGINE, note)]
    for weights, path in find_variants(folder).items():
        if weights != F16 and (answer := run_llama_cpp(trained, path, adapter, engines)):
            divergence = compute_divergence(trained.logits, strip_padding(answer, trained.logits))
            checks.append(
                ReceiptCheck(
                    LLAMA_CPP, what if has_training_weights else "gap", into, weights, answer.version, divergence
                )
            )
    logits = strip_padding(first, expected_logits)
    reported = report_differences(trained, has_training_weights, logits, into, F16, LLAMA_CPP, first.version)
    return [*checks, *reported, *not_run]


def sort_checks(checks: Sequence[ReceiptCheck]) -> list[ReceiptCheck]:
    return sorted(checks, key=lambda check: check.found is None and not check.what)


class ExpectedLogits(NamedTuple):
    """The logits that an export must have on its base weights.

    Attributes:
        has_training_weights: True if these are the base weights that the adapter was trained on.
        logits: [S, V] for each prompt.
    """

    has_training_weights: bool
    logits: Sequence[Tensor]


def compute_expected_logits(trained: TrainedModel, into: str) -> ExpectedLogits:
    """Return the logits that an export with the base weights `into` must have on the fixed prompts."""
    if into in (trained.kind, DEQUANTISED):
        return ExpectedLogits(True, trained.logits)
    assert trained.adapter is not None, "a whole model has no adapter to merge"
    logits = run_adapter(Path(trained.base.path), trained.adapter, trained.prompts, trained.device, trained.dtype)
    return ExpectedLogits(False, logits)


def report_differences(
    trained: TrainedModel,
    as_trained: bool,
    logits: Sequence[Tensor],
    into: str,
    kept: str,
    engine: str = TRANSFORMERS,
    version: str = VERSION,
) -> list[ReceiptCheck]:
    """Measure differences that have no bound: an export on other base weights than those of training, an adapter on
    the original base, and the base alone.

    Args:
        as_trained: the export's weights are those of training.
        logits: those of the export.
    """
    checks = []
    if not as_trained:
        checks.append(ReceiptCheck(engine, "gap", into, kept, version, compute_divergence(trained.logits, logits)))
    if trained.adapter and trained.kind == "nf4":
        checks.append(check_on_original(trained, trained.adapter))
    return [*checks, *trained.base_checks]


def check_on_original(trained: TrainedModel, adapter: Path) -> ReceiptCheck:
    """Compare a QLoRA adapter on the original base with the trained model: most people use it on that base.

    It is another model than was trained, so the difference is reported without a bound.
    """
    base = Path(trained.base.path)
    logits = run_adapter(base, adapter, trained.prompts, trained.device, trained.dtype)
    return trained.compare(logits, "adapter", "original", get_dtype_name(trained.dtype), None)


def check_vllm(
    trained: TrainedModel,
    model: Path,
    adapter: Path | None,
    base: str,
    kept: str,
    engines: Engines,
    truth: Sequence[Tensor] | None = None,
) -> ReceiptCheck:
    """Compare vLLM's logits of an exported model or adapter with the trained model's. Reward models are skipped."""
    if trained.prompts.scores:
        return ReceiptCheck(VLLM, note=NO_POOLING)
    python = find_interpreter(VLLM, engines[VLLM], SETTINGS[VLLM])
    if python is None:
        return ReceiptCheck(VLLM, note=explain_skipped_engine(VLLM, engines[VLLM]))
    truth = trained.logits if truth is None else truth
    rank = None if adapter is None else read_rank(adapter)
    if rank is not None and rank > RANKS[-1]:
        return ReceiptCheck(VLLM, note=f"it serves adapters of rank {RANKS[-1]} at most")
    answer = run_engine_script(
        VLLM,
        python,
        SETTINGS[VLLM],
        model=str(model),
        adapter=None if adapter is None else str(adapter),
        rank=None if rank is None else choose_vllm_rank(rank),
        rows=[list(row) for row in trained.rows],
    )
    what = name_model(trained) if adapter is None else "adapter"
    bound = PRECISE if kept == "float32" else ROUNDED
    divergence = compute_divergence(truth, strip_padding(answer, truth))
    return ReceiptCheck(VLLM, what, base, kept, answer.version, divergence, bound)


def strip_padding(answer: EngineResponse, truth: Sequence[Tensor]) -> list[Tensor]:
    """Return an engine's logits without the columns that pad the vocabulary."""
    return [logits[:, : expected.shape[1]] for logits, expected in zip(answer.logits, truth, strict=True)]
