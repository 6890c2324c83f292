"""Two GGUF files of one model, in f32 and in f16: prints the first tensor that is not that of the first, rounded.

    python compare_gguf.py GGUF_PY F32 F16

`GGUF_PY` is the folder of llama.cpp's own reader. Run in a process of its own, which needs nothing of ours.
"""

from __future__ import annotations

import sys

import numpy as np


def main(reader: str, whole: str, rounded: str) -> None:
    sys.path.insert(0, reader)
    from gguf import GGUFReader  # pyright: ignore[reportMissingImports]

    wanted = {tensor.name: tensor.data for tensor in GGUFReader(whole).tensors}
    found = {tensor.name: tensor.data for tensor in GGUFReader(rounded).tensors}
    for name in sorted(wanted.keys() | found.keys()):
        if name not in wanted or name not in found or not same(wanted[name], found[name]):
            print(name)
            return


def same(whole: np.ndarray, rounded: np.ndarray) -> bool:
    """Bit by bit; vectors stay in f32."""
    if whole.dtype != np.float32 or rounded.dtype not in (np.float16, np.float32) or whole.shape != rounded.shape:
        return False
    return whole.astype(rounded.dtype).tobytes() == rounded.tobytes()


if __name__ == "__main__":
    main(*sys.argv[1:])
