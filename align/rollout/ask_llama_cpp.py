"""Script that quantises a model or computes logits with llama.cpp. `align.rollout.engine_process` runs it in a separate
process, whose Python needs only `llama-cpp-python`.

The request is JSON on standard input: `out`, a folder; `threads`; and either `quantise`, [from, to, type], or `model`,
a GGUF file; `adapter`, another one; `precise`, for a key-value cache in f32 instead of f16; `rows`, the token ids of
each prompt; `texts` to be tokenised. The response is `answer.json` and `logits.npz` in the folder `out`, with fp32
logits [S, V] for each row.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np


def quantise(source: str, target: str, kind: str, threads: int) -> None:
    options: Any = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    options.nthread = threads
    options_pointer: Any = ctypes.byref(options)
    status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), options_pointer)
    if status:
        sys.exit(f"llama.cpp cannot make {kind} of it (status {status})")


def read_logits(request: dict[str, Any]) -> dict[str, Any]:
    rows = request["rows"]
    longest = max(map(len, rows), default=1)
    cache_type = llama_cpp.GGML_TYPE_F32 if request["precise"] else llama_cpp.GGML_TYPE_F16
    model = llama_cpp.Llama(
        request["model"],
        lora_path=request["adapter"],
        logits_all=True,
        n_ctx=max(512, longest),
        n_threads=request["threads"],
        n_threads_batch=request["threads"],
        type_k=cache_type,
        type_v=cache_type,
    )
    logits = {}
    for i, row in enumerate(rows):
        model.reset()
        model.eval(row)
        logits[str(i)] = np.array(model.scores[: len(row)])
    np.savez(Path(request["out"]) / "logits.npz", **logits)
    vocabulary: Any = llama_cpp.llama_model_get_vocab(model._model.model)
    return {
        "tokens": [model.tokenize(text.encode(), add_bos=False, special=True) for text in request["texts"]],
        "begins_with_bos": bool(llama_cpp.llama_vocab_get_add_bos(vocabulary)),
        "bos": model.token_bos(),
        "eos": model.token_eos(),
        "template": model.metadata.get("tokenizer.chat_template", ""),
    }


def main() -> None:
    request = json.load(sys.stdin)
    answer: dict[str, Any] = {"version": llama_cpp.__version__}
    if "quantise" in request:
        quantise(*request["quantise"], threads=request["threads"])
    else:
        answer |= read_logits(request)
    (Path(request["out"]) / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
