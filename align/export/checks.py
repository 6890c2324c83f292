"""The checks of a receipt: run an export on each of its bases in each installed engine, and compare it with the trained
model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from align.data.chat.fixed_prompts import render_fixed_prompts
from align.export.adapter import read_plain_lora_rank
from align.export.engines import VERSION, compute_adapter_logits, compute_model_logits
from align.export.gguf import ADAPTER, F16, F32, find_variants, list_special_tokens_and_prompts, require_same_token_ids
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
    describe_skipped_engine,
    find_interpreter,
    run_engine_script,
)

EXACT: Bound = ("max_logprob", 1e-4)
"""Largest log-probability difference for identical weights, computed in fp32 by another loader."""
MERGED: Bound = ("kl", 1e-5)
"""Largest KL divergence for a merged model that is computed and compared in fp32."""
ROUNDED: Bound = ("kl", 1e-2)
"""Largest KL divergence for weights that were saved in fewer bits."""
SCORES: Bound = ("kl", 1e-3)
"""Largest KL divergence for a reward model's scores, as choices, with weights that were saved in fewer bits.

They moved by 0.09 at texts of nearly equal score.
"""
GGUF: Bound = ("max_logprob", 0.02)
"""Largest log-probability difference for llama.cpp with f16 weights, activations and cache."""
ENGINE: Bound = ("kl", 1e-3)
"""Largest KL divergence for llama.cpp in f16 on weights that are known to be exact."""
PRECISE: Bound = ("max_logprob", 1e-3)
"""Largest log-probability difference for another engine that computes in fp32 on fp32 weights."""

Engines = Mapping[str, str]
"""Name of an engine in `align.rollout.engine_process` → `auto`, `none`, or the path of the Python that has it."""
OLLAMA = "Ollama"
BEFORE_CAST = "merge-before-cast"
"""Name of a check on the merged fp32 model before its weights are cast and saved."""
NO_BASE = "that base was left out of the export, or is not beside the runs"
NO_SCORES = "its converter does not support this score head"
NO_POOLING = "its scores are not checked; vLLM gives them for a merged model, with --runner pooling"
READS_GGUF = "it reads GGUF: export=gguf"
READS_NO_GGUF = "it reads no adapter in GGUF"
AS_MERGED = "it does not check GGUF; it checks export=merged"


def compare_adapter(
    trained: TrainedModel, folder: Path, dequantised_folder: Path | None, saved_dtype: str, engines: Engines
) -> list[ReceiptCheck]:
    """Compare an exported adapter with the trained model, by transformers and vLLM, on each base that it may be used
    on.

    Args:
        dequantised_folder: folder of the dequantised base, with its weights in `saved_dtype`; None if it was not
            written.
        saved_dtype: dtype of that base.
    """
    base = Path(trained.base.path)
    is_nf4 = trained.kind == "nf4"
    logits = compute_adapter_logits(
        base, folder, trained.prompts, trained.device, trained.dtype, quantise_to_nf4=is_nf4
    )
    checks = [trained.compare(logits, "adapter", trained.kind, get_dtype_name(trained.dtype), EXACT)]
    if not is_nf4:
        checks.append(compare_in_vllm(trained, base, folder, "original", get_dtype_name(trained.dtype), engines))
    else:
        if dequantised_folder is None:
            checks.append(ReceiptCheck(TRANSFORMERS, "adapter", DEQUANTISED, saved_dtype, note=NO_BASE))
            checks.append(ReceiptCheck(VLLM, note=NO_BASE))
        else:
            bound = EXACT if saved_dtype == "float32" else choose_rounding_bound(trained)
            logits = compute_adapter_logits(dequantised_folder, folder, trained.prompts, trained.device)
            checks.append(trained.compare(logits, "adapter", DEQUANTISED, saved_dtype, bound))
            checks.append(compare_in_vllm(trained, dequantised_folder, folder, DEQUANTISED, saved_dtype, engines))
        checks.append(compare_on_original_base(trained, folder))
    return sort_checks([*checks, *trained.base_checks, build_llama_cpp_note(trained)])


def compare_merged(
    trained: TrainedModel,
    folder: Path,
    base_weights: str,
    saved_dtype: str,
    logits_before_cast: Sequence[Tensor] | None,
    engines: Engines,
) -> list[ReceiptCheck]:
    """Compare an exported merged or fully trained model with the trained model, by transformers and vLLM.

    The merge is also compared before the cast to `saved_dtype`.

    Merged into the original weights, a QLoRA adapter makes another model. It is compared with the adapter on these
    weights, and its difference from the trained model is reported.
    """
    has_training_weights, expected_logits = compute_expected_logits(trained, base_weights)
    logits = compute_model_logits(folder, trained.prompts, trained.device)
    checks = []
    if logits_before_cast is not None:
        divergence = compute_divergence(expected_logits, logits_before_cast)
        checks.append(
            ReceiptCheck(TRANSFORMERS, BEFORE_CAST, base_weights, "float32", VERSION, divergence, MERGED, shipped=False)
        )
    bound = MERGED if saved_dtype == "float32" else choose_rounding_bound(trained)
    divergence = compute_divergence(expected_logits, logits)
    checks.append(
        ReceiptCheck(TRANSFORMERS, get_model_kind(trained), base_weights, saved_dtype, VERSION, divergence, bound)
    )
    checks.append(compare_in_vllm(trained, folder, None, base_weights, saved_dtype, engines, expected_logits))
    return sort_checks(
        [
            *checks,
            *measure_unbounded_differences(trained, has_training_weights, logits, base_weights, saved_dtype),
            build_llama_cpp_note(trained),
        ]
    )


def choose_rounding_bound(trained: TrainedModel) -> Bound:
    """Return the bound for weights that were saved in fewer bits, which is stricter for a reward model."""
    return SCORES if trained.prompts.is_reward_model else ROUNDED


def get_model_kind(trained: TrainedModel) -> str:
    """Return the name in a receipt for an export as a single model: `model` if all weights were trained, otherwise
    `merged`."""
    return "model" if trained.adapter is None else "merged"


def build_llama_cpp_note(trained: TrainedModel) -> ReceiptCheck:
    """Return a receipt row for llama.cpp, which did not run, with the reason as its note."""
    return ReceiptCheck(LLAMA_CPP, note=NO_SCORES if trained.prompts.is_reward_model else READS_GGUF)


def run_llama_cpp(
    trained: TrainedModel, base: Path, adapter: Path | None, engines: Engines, use_f32_cache: bool = False
) -> EngineResponse | None:
    """Run llama.cpp on a GGUF model and return its logits and token ids on the test prompts, or None if it is not
    installed.

    Args:
        use_f32_cache: keep the cache of keys and values in f32 instead of f16.

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
        precise=use_f32_cache,
        adapter=None if adapter is None else str(adapter),
        rows=[list(row) for row in trained.rows],
        texts=list_special_tokens_and_prompts(trained.tokenizer, prompts),
    )
    require_same_token_ids(trained.tokenizer, prompts, answer)
    return answer


@dataclass(frozen=True, slots=True)
class F32Measurement:
    """llama.cpp's response on the base and adapter converted to f32, to tell its rounding from a faulty export.

    Attributes:
        response: llama.cpp's answer on the f32 files, with its cache in f32.
        mismatch: name of the first tensor of the exported files that is not the rounded f32 tensor; empty if all are.
    """

    response: EngineResponse
    mismatch: str


def compare_gguf_export(
    trained: TrainedModel,
    folder: Path,
    base_weights: str,
    engines: Engines,
    f16_response: EngineResponse | None,
    measure_in_f32: Callable[[], F32Measurement | None],
) -> list[ReceiptCheck]:
    """Compare a GGUF export, run by llama.cpp, with the trained model, and return the checks.

    Variants in fewer bits than f16 have no bound.

    Args:
        f16_response: `run_llama_cpp` on the base in f16; None if llama.cpp is not installed.
        measure_in_f32: measure the f32 conversion. It is called only if f16 misses its bound, which models with large
            activations do by llama.cpp's own rounding. If f32 keeps its bound, and the exported tensors are its rounded
            ones, the export is right.
    """
    vllm_note = AS_MERGED if trained.adapter is None else READS_NO_GGUF
    not_run = [ReceiptCheck(OLLAMA, note="its Modelfile is not tested"), ReceiptCheck(VLLM, note=vllm_note)]
    if f16_response is None:
        checks = measure_unbounded_differences(trained, True, (), base_weights, F16)
        return [*checks, ReceiptCheck(LLAMA_CPP, note=describe_skipped_engine(LLAMA_CPP, engines[LLAMA_CPP])), *not_run]
    has_training_weights, expected_logits = compute_expected_logits(trained, base_weights)
    adapter = None if trained.adapter is None else folder / ADAPTER
    what = get_model_kind(trained) if adapter is None else "adapter"

    def build_check(response: EngineResponse, weights: str, bound: Bound | None, note: str = "") -> ReceiptCheck:
        divergence = compute_divergence(expected_logits, strip_vocabulary_padding(response, expected_logits))
        return ReceiptCheck(LLAMA_CPP, what, base_weights, weights, response.version, divergence, bound, note)

    checks = [build_check(f16_response, F16, GGUF)]
    if checks[0].verdict == FAIL and (exact := measure_in_f32()):
        if exact.mismatch:
            checks = [replace(checks[0], note=f"{exact.mismatch} differs from the converted model")]
        else:
            note = f"{GGUF[0]} misses {GGUF[1]:g} by llama.cpp's rounding: the same numbers in f32 do not"
            f32_check = replace(build_check(exact.response, F32, PRECISE), shipped=False)
            checks = [f32_check, build_check(f16_response, F16, ENGINE, note)]
    for weights, path in find_variants(folder).items():
        if weights != F16 and (answer := run_llama_cpp(trained, path, adapter, engines)):
            divergence = compute_divergence(trained.logits, strip_vocabulary_padding(answer, trained.logits))
            checks.append(
                ReceiptCheck(
                    LLAMA_CPP,
                    what if has_training_weights else "gap",
                    base_weights,
                    weights,
                    answer.version,
                    divergence,
                )
            )
    logits = strip_vocabulary_padding(f16_response, expected_logits)
    reported = measure_unbounded_differences(
        trained, has_training_weights, logits, base_weights, F16, LLAMA_CPP, f16_response.version
    )
    return [*checks, *reported, *not_run]


def sort_checks(checks: Sequence[ReceiptCheck]) -> list[ReceiptCheck]:
    return sorted(checks, key=lambda check: check.found is None and not check.what)


class ExpectedLogits(NamedTuple):
    """The logits on the test prompts that an export must have with its base weights.

    Attributes:
        has_training_weights: True if these are the base weights that the adapter was trained on.
        logits: [S, V] for each prompt.
    """

    has_training_weights: bool
    logits: Sequence[Tensor]


def compute_expected_logits(trained: TrainedModel, base_weights: str) -> ExpectedLogits:
    """Return the logits that an export on the given base weights must have: the trained model's, or new ones on the
    original base."""
    if base_weights in (trained.kind, DEQUANTISED):
        return ExpectedLogits(True, trained.logits)
    assert trained.adapter is not None, "a whole model has no adapter to merge"
    logits = compute_adapter_logits(
        Path(trained.base.path), trained.adapter, trained.prompts, trained.device, trained.dtype
    )
    return ExpectedLogits(False, logits)


def measure_unbounded_differences(
    trained: TrainedModel,
    has_training_weights: bool,
    logits: Sequence[Tensor],
    base_weights: str,
    saved_dtype: str,
    engine: str = TRANSFORMERS,
    version: str = VERSION,
) -> list[ReceiptCheck]:
    """Return checks without a bound, such as of the base model alone, whose differences are only reported.

    These are an export on other base weights than those of training, an adapter on the original base, and the base
    alone.

    Args:
        has_training_weights: the export's weights are those of training.
        logits: those of the export.
    """
    checks = []
    if not has_training_weights:
        checks.append(
            ReceiptCheck(engine, "gap", base_weights, saved_dtype, version, compute_divergence(trained.logits, logits))
        )
    if trained.adapter and trained.kind == "nf4":
        checks.append(compare_on_original_base(trained, trained.adapter))
    return [*checks, *trained.base_checks]


def compare_on_original_base(trained: TrainedModel, adapter: Path) -> ReceiptCheck:
    """Compare a QLoRA adapter on the original, unquantised base with the trained model, without a bound.

    Most people use it on that base. It is another model than was trained, so the difference is only reported.
    """
    base = Path(trained.base.path)
    logits = compute_adapter_logits(base, adapter, trained.prompts, trained.device, trained.dtype)
    return trained.compare(logits, "adapter", "original", get_dtype_name(trained.dtype), None)


def compare_in_vllm(
    trained: TrainedModel,
    model: Path,
    adapter: Path | None,
    base_weights: str,
    saved_dtype: str,
    engines: Engines,
    expected_logits: Sequence[Tensor] | None = None,
) -> ReceiptCheck:
    """Run vLLM on an exported model or adapter, and compare its logits with `expected_logits`, by default the trained
    model's.

    Without vLLM, and for a reward model, the check has only a note.
    """
    if trained.prompts.is_reward_model:
        return ReceiptCheck(VLLM, note=NO_POOLING)
    python = find_interpreter(VLLM, engines[VLLM], SETTINGS[VLLM])
    if python is None:
        return ReceiptCheck(VLLM, note=describe_skipped_engine(VLLM, engines[VLLM]))
    expected_logits = trained.logits if expected_logits is None else expected_logits
    rank = None if adapter is None else read_plain_lora_rank(adapter)
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
    what = get_model_kind(trained) if adapter is None else "adapter"
    bound = PRECISE if saved_dtype == "float32" else ROUNDED
    divergence = compute_divergence(expected_logits, strip_vocabulary_padding(answer, expected_logits))
    return ReceiptCheck(VLLM, what, base_weights, saved_dtype, answer.version, divergence, bound)


def strip_vocabulary_padding(response: EngineResponse, expected_logits: Sequence[Tensor]) -> list[Tensor]:
    """Return an engine's logits, [S, V] for each prompt, without the columns beyond the vocabulary of
    `expected_logits`."""
    return [logits[:, : expected.shape[1]] for logits, expected in zip(response.logits, expected_logits, strict=True)]
