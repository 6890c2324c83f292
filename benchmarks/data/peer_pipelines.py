"""Deduplicate a corpus of `corpus.py` with Daft or datatrove, in the environment that `peers.sh` makes.

    python benchmarks/data/peer_pipelines.py daft|datatrove FOLDER OUTPUT

Both have the settings of align: word 3-shingles, 32 bands of 4 rows, the same filter, Parquet output, one core. Daft
has a `minhash` but no deduplication, so its candidates go through our `find_near`. datatrove drops all candidates.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

BANDS = 32
ROWS = 4
SHINGLE_WORDS = 3
MIN_CHARACTERS = 20


def deduplicate_with_daft(source: Path, output: Path) -> None:
    """Write the documents of a corpus's folder without near-duplicates to a Parquet file."""
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
        .where(length(daft.col("text")) >= MIN_CHARACTERS)
        .with_column(
            "signature", minhash(words, num_hashes=BANDS * ROWS, ngram_size=SHINGLE_WORDS, hash_function="xxhash3_64")
        )
        .to_arrow()
    )
    signature = rows["signature"].combine_chunks().flatten().to_numpy().reshape(len(rows), BANDS * ROWS)
    keys = hash_bands(np.ascontiguousarray(signature.T), BANDS)
    texts = rows["text"].combine_chunks()
    duplicates = find_near(
        np.arange(len(rows)),
        np.full(len(rows), 100),
        lambda band: np.ascontiguousarray(keys[:, band]),
        lambda indexes: build_shingles(texts.take(pa.array(indexes))),
    )
    keep = np.ones(len(rows), bool)
    keep[duplicates.dropped] = False
    pq.write_table(rows.select(["id", "text"]).filter(pa.array(keep)), output)


def deduplicate_with_datatrove(source: Path, output: Path) -> None:
    """Write the documents of a corpus's folder without near-duplicates to a Parquet file."""
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

    class BlankTokenizer(WordTokenizer):
        """A tokenizer that splits at blanks, similar to the other engines. datatrove's own use spaCy and are slower."""

        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        sent_tokenize = span_tokenize = None  # not called

    work = str(output.with_suffix(".work"))
    config = MinhashConfig(n_grams=SHINGLE_WORDS, num_buckets=BANDS, hashes_per_bucket=ROWS)

    def create_reader() -> list:
        return [
            JsonlReader(str(source), glob_pattern="corpus.jsonl"),
            LambdaFilter(lambda document: len(document.text) >= MIN_CHARACTERS),
        ]

    steps = [
        ([*create_reader(), MinhashDedupSignature(f"{work}/signatures", config, BlankTokenizer())], 1),
        ([MinhashDedupBuckets(f"{work}/signatures", f"{work}/buckets", config=config)], BANDS),
        ([MinhashDedupCluster(f"{work}/buckets", f"{work}/remove", config)], 1),
        ([*create_reader(), MinhashDedupFilter(f"{work}/remove"), ParquetWriter(f"{work}/kept")], 1),
    ]
    for number, (pipeline, tasks) in enumerate(steps):
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=f"{work}/logs/{number}").run()
    (shard,) = Path(f"{work}/kept").iterdir()
    shard.rename(output)


if __name__ == "__main__":
    os.environ["DO_NOT_TRACK"] = "1"  # Daft sends telemetry when it is imported
    name, source, output = sys.argv[1:]
    {"daft": deduplicate_with_daft, "datatrove": deduplicate_with_datatrove}[name](Path(source), Path(output))
