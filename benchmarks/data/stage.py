"""The whole stage on a corpus: `python benchmarks/data/stage.py CORPUS OUTPUT`, as `dedup.py` calls its engines.

It reads, recognises, filters, finds ids, duplicates and fingerprints, and publishes: more than the others do.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from align.__main__ import main

LEAST = "{length: {least: 60, by: characters}}"


def run(corpus: Path, output: Path) -> None:
    with tempfile.TemporaryDirectory() as root:
        words = [
            "stage=data", f"stage.sources=[{corpus / 'corpus.jsonl'}]", f"stage.clean=[{LEAST}]", "data.held_out=0",
            "data.on_bad_row=skip", "run.name=corpus", f"run.root={root}",
        ]  # fmt: skip
        assert main(words) == 0
        shards = sorted((Path(root) / "data" / "corpus" / "artifact").glob("train-*.parquet"))
        lines = pa.concat_tables([pq.read_table(path, columns=["row"]) for path in shards])["row"].to_pylist()
    pq.write_table(pa.table({"id": [str(line - 1) for line in lines]}), output)


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]))
