"""Compare an f16 GGUF file with the f32 file of the same model, and print the first tensor that is not its rounded
value.

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
    """Return whether an f32 tensor, rounded to the dtype of the second tensor (f16 or f32), equals it bit by bit.

    The second tensor is f32 if it is a vector, which the converter does not round.
    """
    if exact.dtype != np.float32 or rounded.dtype not in (np.float16, np.float32) or exact.shape != rounded.shape:
        return False
    return exact.astype(rounded.dtype).tobytes() == rounded.tobytes()


if __name__ == "__main__":
    main(*sys.argv[1:])
