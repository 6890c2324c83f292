"""Script that computes logprobs with vLLM. `align.rollout.engine_process` runs it in a separate process, whose Python
needs only `vllm`.

The request is JSON on standard input: `out`, a folder; `model`, a folder; `adapter`, another one or null, and its
maximum `rank`; `threads`; `rows`, the token ids of each prompt. The response is `answer.json` and `logits.npz` in the
folder `out`, with fp32 logprobs [S, V] for each row.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY = -1
"""Number of logprobs to request from vLLM in order to get those of the whole vocabulary."""


def main() -> None:
    request = json.load(sys.stdin)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; prompts are short, and are run one at a time
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    import vllm  # pyright: ignore[reportMissingImports]
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

    rows = request["rows"]
    options: dict[str, Any] = {}
    adapter = None
    if request["adapter"] is not None:
        options = {"enable_lora": True, "max_lora_rank": request["rank"], "max_loras": 1}
        adapter = LoRARequest("adapter", 1, request["adapter"])
    model = vllm.LLM(
        request["model"],
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,
        max_logprobs=VOCABULARY,
        max_model_len=max(map(len, rows)) + 1,
        **options,
    )
    sampling = vllm.SamplingParams(
        max_tokens=1,
        temperature=0.0,
        logprobs=VOCABULARY,
        prompt_logprobs=VOCABULARY,
        flat_logprobs=True,
        detokenize=False,
    )
    logits = {}
    for i, row in enumerate(rows):
        [output] = model.generate([{"prompt_token_ids": row}], sampling, lora_request=adapter, use_tqdm=False)
        positions = [*range(1, len(row))]
        logits[str(i)] = np.stack(
            [
                *(to_dense_logprobs(output.prompt_logprobs, at) for at in positions),
                to_dense_logprobs(output.outputs[0].logprobs, 0),
            ]
        )
    np.savez(Path(request["out"]) / "logits.npz", **logits)
    (Path(request["out"]) / "answer.json").write_text(json.dumps({"version": vllm.__version__}), encoding="utf-8")


def to_dense_logprobs(flat: Any, at: int) -> np.ndarray:
    """Convert vLLM's flat list of logprobs at position `at` to an fp32 array indexed by token id [V].

    vLLM lists the sampled token, and then all tokens by rank.
    """
    start = flat.start_indices[at]
    end = flat.end_indices[at]
    ids = np.array(flat.token_ids[start:end])
    logprobs = np.array(flat.logprobs[start:end], dtype=np.float32)
    logprobs_V = np.full(ids.max() + 1, -np.inf, dtype=np.float32)
    logprobs_V[ids] = logprobs
    return logprobs_V


if __name__ == "__main__":
    main()
