"""The peers' duplicates on a folder of `corpus.py`, in the environment that `peers.sh` makes.

    python benchmarks/data/peers.py daft|datatrove FOLDER OUTPUT

Both are told what ours does: word 3-shingles, 32 bands of 4 rows, the same filter, Parquet out, one core. Daft has a
`minhash` and nothing more, so its candidates go through our `find_near`. datatrove drops candidates as they are.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

BANDS, ROWS, WIDTH, SHORTEST = 32, 4, 3, 20


def with_daft(source: Path, output: Path) -> None:
    import daft
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from daft.functions import length, lower, minhash, regexp_replace, strip

    from align.data.dedup.near_duplicates import find_near
    from align.data.dedup.shingles import build_shingles, hash_bands

    daft.set_runner_native(num_threads=1)
    words = strip(regexp_replace(lower(daft.col("text")), r"[^\p{L}\p{N}]+", " "))
    rows = (
        daft.read_json(str(source / "corpus.jsonl"))
        .where(length(daft.col("text")) >= SHORTEST)
        .with_column("signature", minhash(words, num_hashes=BANDS * ROWS, ngram_size=WIDTH, hash_function="xxhash3_64"))
        .to_arrow()
    )
    signature = rows["signature"].combine_chunks().flatten().to_numpy().reshape(len(rows), BANDS * ROWS)
    keys = hash_bands(np.ascontiguousarray(signature.T), BANDS)
    texts = rows["text"].combine_chunks()
    found = find_near(np.arange(len(rows)), np.full(len(rows), 100), lambda band: np.ascontiguousarray(keys[:, band]),
                  lambda indexes: build_shingles(texts.take(pa.array(indexes))))  # fmt: skip
    keep = np.ones(len(rows), bool)
    keep[found.dropped] = False
    pq.write_table(rows.select(["id", "text"]).filter(pa.array(keep)), output)


def with_datatrove(source: Path, output: Path) -> None:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.filters import LambdaFilter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import ParquetWriter
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Blanks(WordTokenizer):
        """Its own tokenizers are spaCy's and slower. Parting at blanks is near to what the others do."""

        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        sent_tokenize = span_tokenize = None  # nobody asks

    work = str(output.with_suffix(".work"))
    config = MinhashConfig(n_grams=WIDTH, num_buckets=BANDS, hashes_per_bucket=ROWS)

    def documents() -> list:
        return [JsonlReader(str(source), glob_pattern="corpus.jsonl"), LambdaFilter(lambda d: len(d.text) >= SHORTEST)]

    steps = [
        ([*documents(), MinhashDedupSignature(f"{work}/signatures", config, Blanks())], 1),
        ([MinhashDedupBuckets(f"{work}/signatures", f"{work}/buckets", config=config)], BANDS),
        ([MinhashDedupCluster(f"{work}/buckets", f"{work}/remove", config)], 1),
        ([*documents(), MinhashDedupFilter(f"{work}/remove"), ParquetWriter(f"{work}/kept")], 1),
    ]
    for number, (pipeline, tasks) in enumerate(steps):
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=f"{work}/logs/{number}").run()
    (written,) = Path(f"{work}/kept").iterdir()
    written.rename(output)


if __name__ == "__main__":
    os.environ["DO_NOT_TRACK"] = "1"  # Daft calls home when it is imported
    name, source, output = sys.argv[1:]
    {"daft": with_daft, "datatrove": with_datatrove}[name](Path(source), Path(output))
