"""The checks of a receipt: each export on each base, in each engine there is, beside the model that was trained."""

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
from align.ops.divergence import pooled_divergence
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
"""Of the same numbers summed in fp32 by another loader."""
MERGED: Bound = ("kl", 1e-5)
"""Of a merge done and compared in fp32."""
ROUNDED: Bound = ("kl", 1e-2)
"""Of weights that lost bits when they were saved."""
SCORES: Bound = ("kl", 1e-3)
"""The same of scores, as choices: where two texts are as good, they moved by 0.09."""
GGUF: Bound = ("max_logprob", 0.02)
"""Of llama.cpp's f16 weights, activations and cache."""
ENGINE: Bound = ("kl", 1e-3)
"""Of llama.cpp's f16 on numbers that are known to be right."""
PRECISE: Bound = ("max_logprob", 1e-3)
"""Of another engine in fp32: the weights of base and adapter, and all that it computes."""

Engines = Mapping[str, str]
"""For each engine of `align.rollout.engine_process`, `auto`, `none` or the Python that has it."""
OLLAMA = "Ollama"
BEFORE_CAST = "merge-before-cast"
"""What a receipt calls the merge in fp32, before its weights are cast and saved."""
NO_BASE = "that base was left out, or does not lie beside the runs"
NO_SCORES = "its converter knows no such head of scores"
NO_POOLING = "its scores are not asked; it takes them of a merged model, by --runner pooling"
READS_GGUF = "it reads GGUF: export=gguf"
READS_NO_GGUF = "it reads no adapter in GGUF"
AS_MERGED = "it is asked of export=merged"


def adapter_checks(
    trained: Trained, folder: Path, dequantised: Path | None, kept: str, engines: Engines
) -> list[Check]:
    """An exported adapter on each base that somebody may put it on.

    Args:
        dequantised: the folder of that base, its weights in `kept`; None where it was not written.
    """
    base, bound = Path(trained.base.path), EXACT if kept == "float32" else rounded(trained)
    on_own = adapter_on(
        base, folder, trained.asked, trained.device, trained.dtype, quantised=trained.kind == "nf4"
    )  # fmt: skip
    found = [trained.beside(on_own, "adapter", trained.kind, name_of(trained.dtype), EXACT)]
    if trained.kind == "nf4":
        if dequantised is None:
            found.append(Check(TRANSFORMERS, "adapter", DEQUANTISED, kept, note=NO_BASE))
            found.append(Check(VLLM, note=NO_BASE))
        else:
            loaded = adapter_on(dequantised, folder, trained.asked, trained.device)
            found.append(trained.beside(loaded, "adapter", DEQUANTISED, kept, bound))
            found.append(vllm_check(trained, dequantised, folder, DEQUANTISED, kept, engines))
        found.append(on_original(trained, folder))
    else:
        found.append(vllm_check(trained, base, folder, "original", name_of(trained.dtype), engines))
    return unasked_last([*found, *trained.without, no_gguf(trained)])


def merged_checks(
    trained: Trained, folder: Path, into: str, kept: str, summed: Sequence[Tensor] | None, engines: Engines
) -> list[Check]:
    """A merged or whole model as it lies on disk and, where `summed` are its logits then, before it was cast to `kept`.

    Merged into the original weights a QLoRA adapter makes another model: it is held to what the adapter says on these,
    and how far that lies from what was trained is reported.
    """
    known, truth = expected_logits(trained, into)
    loaded = whole_model(folder, trained.asked, trained.device)
    bound = MERGED if kept == "float32" else rounded(trained)
    found = []
    for what, weights, logits, most in (
        (BEFORE_CAST, "float32", summed, MERGED),
        (whole_name(trained), kept, loaded, bound),
    ):
        if logits is not None:
            difference = pooled_divergence(truth, logits)
            shipped = what != BEFORE_CAST
            found.append(Check(TRANSFORMERS, what, into, weights, VERSION, difference, most, shipped=shipped))
    found.append(vllm_check(trained, folder, None, into, kept, engines, truth))
    return unasked_last([*found, *checked_as_loaded(trained, known, loaded, into, kept), no_gguf(trained)])


def rounded(trained: Trained) -> Bound:
    """What weights may lose when they are saved in fewer bits."""
    return SCORES if trained.asked.scores else ROUNDED


def whole_name(trained: Trained) -> str:
    """What a receipt calls it as one model."""
    return "model" if trained.adapter is None else "merged"


def no_gguf(trained: Trained) -> Check:
    """Why llama.cpp was not asked of an export for others."""
    return Check(LLAMA_CPP, note=NO_SCORES if trained.asked.scores else READS_GGUF)


def gguf_answer(
    trained: Trained, base: Path, adapter: Path | None, engines: Engines, precise: bool = False
) -> Answer | None:
    """llama.cpp on GGUF files, a base and an adapter or a whole model; None where it is not there.

    Args:
        precise: with its cache of keys and values in f32, and not in f16.

    Raises:
        InputError: it reads text otherwise than the model was trained to, or does not load them.
    """
    python = interpreter(LLAMA_CPP, engines[LLAMA_CPP], SETTINGS[LLAMA_CPP])
    if python is None:
        return None
    prompts = fixed_texts(trained.tokenizer, max(map(len, trained.rows)))
    answer = ask(
        LLAMA_CPP, python, SETTINGS[LLAMA_CPP], model=str(base), precise=precise,
        adapter=None if adapter is None else str(adapter),
        rows=[list(row) for row in trained.rows], texts=texts_of(trained.tokenizer, prompts),
    )  # fmt: skip
    check_reading(trained.tokenizer, prompts, answer)
    return answer


@dataclass(frozen=True, slots=True)
class InF32:
    """The same base and adapter, converted to f32.

    Attributes:
        answer: of llama.cpp on these, with its cache in f32.
        other: the first tensor of the exported files that is not theirs, rounded to f16; empty where all are.
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
    """Base and adapter, or a whole model, in llama.cpp; the variants in fewer bits are reported, and held to no bound.

    Args:
        first: `gguf_answer` on the base in f16.
        in_f32: the same in f32. It is asked for only where f16 misses its bound: models with large activations do so by
            llama.cpp's own rounding. Where f32 is exact, and the exported numbers are those of f32 but for their own
            rounding, that is what it was.
    """
    elsewhere = AS_MERGED if trained.adapter is None else READS_NO_GGUF
    not_run = [Check(OLLAMA, note="its Modelfile is not run"), Check(VLLM, note=elsewhere)]
    if first is None:
        checks = checked_as_loaded(trained, True, (), into, F16)
        return [*checks, Check(LLAMA_CPP, note=why_unasked(LLAMA_CPP, engines[LLAMA_CPP])), *not_run]
    known, truth = expected_logits(trained, into)
    adapter = None if trained.adapter is None else folder / ADAPTER
    what = whole_name(trained) if adapter is None else "adapter"

    def check(answer: Answer, weights: str, bound: Bound | None, note: str = "") -> Check:
        divergence = pooled_divergence(truth, without_padding(answer, truth))
        return Check(LLAMA_CPP, what, into, weights, answer.version, divergence, bound, note)

    found = [check(first, F16, GGUF)]
    if found[0].verdict == FAIL and (exact := in_f32()):
        if exact.other:
            found = [replace(found[0], note=f"{exact.other} is not what was converted")]
        else:
            rounded = f"{GGUF[0]} misses {GGUF[1]:g} by llama.cpp's rounding: the same numbers in f32 do not"
            in_f32_alone = replace(check(exact.answer, F32, PRECISE), shipped=False)
            found = [in_f32_alone, check(first, F16, ENGINE, rounded)]
    for weights, path in variants_in(folder).items():
        if weights != F16 and (answer := gguf_answer(trained, path, adapter, engines)):
            divergence = pooled_divergence(trained.logits, without_padding(answer, trained.logits))
            found.append(Check(LLAMA_CPP, what if known else "gap", into, weights, answer.version, divergence))
    loaded = without_padding(first, truth)
    return [*found, *checked_as_loaded(trained, known, loaded, into, F16, LLAMA_CPP, first.version), *not_run]


def unasked_last(checks: Sequence[Check]) -> list[Check]:
    return sorted(checks, key=lambda check: check.found is None and not check.what)


def expected_logits(trained: Trained, into: str) -> tuple[bool, Sequence[Tensor]]:
    """Whether these weights are what was trained, and the logits that an export on them must have."""
    if into in (trained.kind, DEQUANTISED):
        return True, trained.logits
    assert trained.adapter is not None, "a whole model is merged into nothing"
    return False, adapter_on(Path(trained.base.path), trained.adapter, trained.asked, trained.device, trained.dtype)


def checked_as_loaded(
    trained: Trained, known: bool, loaded: Sequence[Tensor], into: str, kept: str,
    engine: str = TRANSFORMERS, version: str = VERSION,
) -> list[Check]:  # fmt: skip
    """What is reported without a bound: an export on weights that were not trained, beside what was; the original base;
    no adapter."""
    gap = [] if known else [Check(engine, "gap", into, kept, version, pooled_divergence(trained.logits, loaded))]
    original = [on_original(trained, trained.adapter)] if trained.adapter and trained.kind == "nf4" else []
    return [*gap, *original, *trained.without]


def on_original(trained: Trained, adapter: Path) -> Check:
    """What most people will do with an adapter of QLoRA's. Reported, and not held to a bound: it is another model."""
    base = Path(trained.base.path)
    loaded = adapter_on(base, adapter, trained.asked, trained.device, trained.dtype)
    return trained.beside(loaded, "adapter", "original", name_of(trained.dtype), None)


def vllm_check(
    trained: Trained, model: Path, adapter: Path | None, base: str, kept: str, engines: Engines,
    truth: Sequence[Tensor] | None = None,
) -> Check:  # fmt: skip
    """vLLM on a folder with a model, and an adapter on it; its sums in fp32. It is not asked for scores."""
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
        VLLM, python, SETTINGS[VLLM], model=str(model), adapter=None if adapter is None else str(adapter),
        rank=None if rank is None else vllm_rank(rank),
        rows=[list(row) for row in trained.rows],
    )  # fmt: skip
    what, bound = whole_name(trained) if adapter is None else "adapter", PRECISE if kept == "float32" else ROUNDED
    return Check(
        VLLM, what, base, kept, answer.version, pooled_divergence(truth, without_padding(answer, truth)), bound
    )


def without_padding(answer: Answer, truth: Sequence[Tensor]) -> list[Tensor]:
    """Logits over the vocabulary that the trained model has: engines pad theirs."""
    return [logits[:, : wanted.shape[1]] for logits, wanted in zip(answer.logits, truth, strict=True)]
