"""The checks of a receipt: each export on each base, in each installed engine, compared with the trained model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from align.data.chat.fixed_prompts import fixed_texts
from align.export.adapter import rank_of
from align.export.engines import VERSION, adapter_on, whole_model
from align.export.gguf import ADAPTER, F16, F32, check_reading, texts_of, variants_in
from align.export.receipt_rows import FAIL, Bound, Check
from align.export.trained import Trained
from align.models.dequantised import DEQUANTISED
from align.models.load import name_of
from align.ops.divergence import compute_divergence
from align.rollout.engine_process import (
    LLAMA_CPP,
    RANKS,
    SETTINGS,
    TRANSFORMERS,
    VLLM,
    Answer,
    ask,
    interpreter,
    vllm_rank,
    why_unasked,
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
NO_BASE = "that base was left out, or does not lie beside the runs"
NO_SCORES = "its converter knows no such head of scores"
NO_POOLING = "its scores are not asked; it takes them of a merged model, by --runner pooling"
READS_GGUF = "it reads GGUF: export=gguf"
READS_NO_GGUF = "it reads no adapter in GGUF"
AS_MERGED = "it is asked of export=merged"


def adapter_checks(
    trained: Trained, folder: Path, dequantised: Path | None, kept: str, engines: Engines
) -> list[Check]:
    """Check an exported adapter on each base that it may be used on.

    Args:
        dequantised: folder of the dequantised base, with its weights in `kept`; None if it was not written.
        kept: dtype of that base.
    """
    base = Path(trained.base.path)
    is_nf4 = trained.kind == "nf4"
    logits = adapter_on(base, folder, trained.asked, trained.device, trained.dtype, quantised=is_nf4)
    checks = [trained.beside(logits, "adapter", trained.kind, name_of(trained.dtype), EXACT)]
    if not is_nf4:
        checks.append(vllm_check(trained, base, folder, "original", name_of(trained.dtype), engines))
    else:
        if dequantised is None:
            checks.append(Check(TRANSFORMERS, "adapter", DEQUANTISED, kept, note=NO_BASE))
            checks.append(Check(VLLM, note=NO_BASE))
        else:
            bound = EXACT if kept == "float32" else rounded(trained)
            logits = adapter_on(dequantised, folder, trained.asked, trained.device)
            checks.append(trained.beside(logits, "adapter", DEQUANTISED, kept, bound))
            checks.append(vllm_check(trained, dequantised, folder, DEQUANTISED, kept, engines))
        checks.append(on_original(trained, folder))
    return unasked_last([*checks, *trained.without, no_gguf(trained)])


def merged_checks(
    trained: Trained, folder: Path, into: str, kept: str, summed: Sequence[Tensor] | None, engines: Engines
) -> list[Check]:
    """Check a merged or whole model as it lies on disk and, given its logits `summed`, before the cast to `kept`.

    Merged into the original weights, a QLoRA adapter makes another model. It is compared with the adapter on these
    weights, and its difference from the trained model is reported.
    """
    as_trained, truth = expected_logits(trained, into)
    logits = whole_model(folder, trained.asked, trained.device)
    checks = []
    if summed is not None:
        divergence = compute_divergence(truth, summed)
        checks.append(Check(TRANSFORMERS, BEFORE_CAST, into, "float32", VERSION, divergence, MERGED, shipped=False))
    bound = MERGED if kept == "float32" else rounded(trained)
    divergence = compute_divergence(truth, logits)
    checks.append(Check(TRANSFORMERS, whole_name(trained), into, kept, VERSION, divergence, bound))
    checks.append(vllm_check(trained, folder, None, into, kept, engines, truth))
    return unasked_last([*checks, *checked_as_loaded(trained, as_trained, logits, into, kept), no_gguf(trained)])


def rounded(trained: Trained) -> Bound:
    """Return the bound for weights that were saved in fewer bits."""
    return SCORES if trained.asked.scores else ROUNDED


def whole_name(trained: Trained) -> str:
    """Return the receipt's name for an export as one model."""
    return "model" if trained.adapter is None else "merged"


def no_gguf(trained: Trained) -> Check:
    """Return a check that says why llama.cpp did not read this export."""
    return Check(LLAMA_CPP, note=NO_SCORES if trained.asked.scores else READS_GGUF)


def gguf_answer(
    trained: Trained, base: Path, adapter: Path | None, engines: Engines, precise: bool = False
) -> Answer | None:
    """Run llama.cpp on GGUF files, a base and an adapter or a whole model. Returns None if it is not installed.

    Args:
        precise: keep the cache of keys and values in f32 instead of f16.

    Raises:
        InputError: It tokenizes text otherwise than in training, or cannot load the files.
    """
    python = interpreter(LLAMA_CPP, engines[LLAMA_CPP], SETTINGS[LLAMA_CPP])
    if python is None:
        return None
    prompts = fixed_texts(trained.tokenizer, max(map(len, trained.rows)))
    answer = ask(
        LLAMA_CPP,
        python,
        SETTINGS[LLAMA_CPP],
        model=str(base),
        precise=precise,
        adapter=None if adapter is None else str(adapter),
        rows=[list(row) for row in trained.rows],
        texts=texts_of(trained.tokenizer, prompts),
    )
    check_reading(trained.tokenizer, prompts, answer)
    return answer


@dataclass(frozen=True, slots=True)
class InF32:
    """A measurement of the same base and adapter, converted to f32.

    Attributes:
        answer: llama.cpp's answer on the f32 files, with its cache in f32.
        other: name of the first tensor of the exported files that is not the rounded f32 tensor; empty if all are.
    """

    answer: Answer
    other: str


def gguf_checks(
    trained: Trained,
    folder: Path,
    into: str,
    engines: Engines,
    first: Answer | None,
    in_f32: Callable[[], InF32 | None],
) -> list[Check]:
    """Check base and adapter, or a whole model, in llama.cpp. Variants in fewer bits are reported without a bound.

    Args:
        first: `gguf_answer` on the base in f16; None if llama.cpp is not installed.
        in_f32: measure the f32 conversion. It is called only if f16 misses its bound, which models with large
            activations do by llama.cpp's own rounding. If f32 keeps its bound, and the exported tensors are its rounded
            ones, the export is right.
    """
    vllm_note = AS_MERGED if trained.adapter is None else READS_NO_GGUF
    not_run = [Check(OLLAMA, note="its Modelfile is not run"), Check(VLLM, note=vllm_note)]
    if first is None:
        checks = checked_as_loaded(trained, True, (), into, F16)
        return [*checks, Check(LLAMA_CPP, note=why_unasked(LLAMA_CPP, engines[LLAMA_CPP])), *not_run]
    as_trained, truth = expected_logits(trained, into)
    adapter = None if trained.adapter is None else folder / ADAPTER
    what = whole_name(trained) if adapter is None else "adapter"

    def check(answer: Answer, weights: str, bound: Bound | None, note: str = "") -> Check:
        divergence = compute_divergence(truth, without_padding(answer, truth))
        return Check(LLAMA_CPP, what, into, weights, answer.version, divergence, bound, note)

    checks = [check(first, F16, GGUF)]
    if checks[0].verdict == FAIL and (exact := in_f32()):
        if exact.other:
            checks = [replace(checks[0], note=f"{exact.other} is not what was converted")]
        else:
            note = f"{GGUF[0]} misses {GGUF[1]:g} by llama.cpp's rounding: the same numbers in f32 do not"
            f32_check = replace(check(exact.answer, F32, PRECISE), shipped=False)
            checks = [f32_check, check(first, F16, ENGINE, note)]
    for weights, path in variants_in(folder).items():
        if weights != F16 and (answer := gguf_answer(trained, path, adapter, engines)):
            divergence = compute_divergence(trained.logits, without_padding(answer, trained.logits))
            checks.append(Check(LLAMA_CPP, what if as_trained else "gap", into, weights, answer.version, divergence))
    logits = without_padding(first, truth)
    reported = checked_as_loaded(trained, as_trained, logits, into, F16, LLAMA_CPP, first.version)
    return [*checks, *reported, *not_run]


def unasked_last(checks: Sequence[Check]) -> list[Check]:
    return sorted(checks, key=lambda check: check.found is None and not check.what)


def expected_logits(trained: Trained, into: str) -> tuple[bool, Sequence[Tensor]]:
    """Return whether `into` are the weights of training, and the logits that an export on them must have."""
    if into in (trained.kind, DEQUANTISED):
        return True, trained.logits
    assert trained.adapter is not None, "a whole model is merged into nothing"
    return False, adapter_on(Path(trained.base.path), trained.adapter, trained.asked, trained.device, trained.dtype)


def checked_as_loaded(
    trained: Trained,
    as_trained: bool,
    logits: Sequence[Tensor],
    into: str,
    kept: str,
    engine: str = TRANSFORMERS,
    version: str = VERSION,
) -> list[Check]:
    """Return the checks without a bound: an export on other weights than the trained ones, an adapter on the original
    base, and the base alone.

    Args:
        as_trained: the export's weights are those of training.
        logits: those of the export.
    """
    checks = []
    if not as_trained:
        checks.append(Check(engine, "gap", into, kept, version, compute_divergence(trained.logits, logits)))
    if trained.adapter and trained.kind == "nf4":
        checks.append(on_original(trained, trained.adapter))
    return [*checks, *trained.without]


def on_original(trained: Trained, adapter: Path) -> Check:
    """Check a QLoRA adapter on the original base, which is how most people use it.

    It is another model than was trained, so the difference is reported without a bound.
    """
    base = Path(trained.base.path)
    logits = adapter_on(base, adapter, trained.asked, trained.device, trained.dtype)
    return trained.beside(logits, "adapter", "original", name_of(trained.dtype), None)


def vllm_check(
    trained: Trained,
    model: Path,
    adapter: Path | None,
    base: str,
    kept: str,
    engines: Engines,
    truth: Sequence[Tensor] | None = None,
) -> Check:
    """Check vLLM on a folder with a model, and an adapter on it, with fp32 sums. Reward models are not checked."""
    if trained.asked.scores:
        return Check(VLLM, note=NO_POOLING)
    python = interpreter(VLLM, engines[VLLM], SETTINGS[VLLM])
    if python is None:
        return Check(VLLM, note=why_unasked(VLLM, engines[VLLM]))
    truth = trained.logits if truth is None else truth
    rank = None if adapter is None else rank_of(adapter)
    if rank is not None and rank > RANKS[-1]:
        return Check(VLLM, note=f"it serves adapters of rank {RANKS[-1]} at most")
    answer = ask(
        VLLM,
        python,
        SETTINGS[VLLM],
        model=str(model),
        adapter=None if adapter is None else str(adapter),
        rank=None if rank is None else vllm_rank(rank),
        rows=[list(row) for row in trained.rows],
    )
    what = whole_name(trained) if adapter is None else "adapter"
    bound = PRECISE if kept == "float32" else ROUNDED
    divergence = compute_divergence(truth, without_padding(answer, truth))
    return Check(VLLM, what, base, kept, answer.version, divergence, bound)


def without_padding(answer: Answer, truth: Sequence[Tensor]) -> list[Tensor]:
    """Return an engine's logits over the trained model's vocabulary: engines pad theirs."""
    return [logits[:, : expected.shape[1]] for logits, expected in zip(answer.logits, truth, strict=True)]
