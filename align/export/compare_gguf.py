"""Compare two GGUF files of one model, in f32 and f16, and print the first tensor that is not the rounded f32 one.

    python compare_gguf.py GGUF_PY F32 F16

`GGUF_PY` is the folder of llama.cpp's own reader. Runs in a process of its own, without align.
"""

from __future__ import annotations

import sys

import numpy as np


def main(reader: str, exact: str, rounded: str) -> None:
    sys.path.insert(0, reader)
    from gguf import GGUFReader  # pyright: ignore[reportMissingImports]

    exact_tensors = {tensor.name: tensor.data for tensor in GGUFReader(exact).tensors}
    rounded_tensors = {tensor.name: tensor.data for tensor in GGUFReader(rounded).tensors}
    for name in sorted(exact_tensors.keys() | rounded_tensors.keys()):
        if (
            name not in exact_tensors
            or name not in rounded_tensors
            or not equals_after_rounding(exact_tensors[name], rounded_tensors[name])
        ):
            print(name)
            return


def equals_after_rounding(exact: np.ndarray, rounded: np.ndarray) -> bool:
    """Return whether two tensors are equal bit by bit after rounding. Vectors stay in f32."""
    if exact.dtype != np.float32 or rounded.dtype not in (np.float16, np.float32) or exact.shape != rounded.shape:
        return False
    return exact.astype(rounded.dtype).tobytes() == rounded.tobytes()


if __name__ == "__main__":
    main(*sys.argv[1:])
