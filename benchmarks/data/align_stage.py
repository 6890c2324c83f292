"""Run the whole data stage on a corpus, as an engine of `dedup.py`.

    python benchmarks/data/align_stage.py CORPUS OUTPUT

It reads rows, recognises their columns, filters, finds ids, duplicates and fingerprints, and publishes a data set,
which is more than the other engines do.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from align.__main__ import main

LENGTH_STEP = "{length: {least: 60, by: characters}}"


def run_stage(corpus: Path, output: Path) -> None:
    """Write the ids of the corpus's documents that the stage keeps."""
    with tempfile.TemporaryDirectory() as root:
        arguments = ["stage=data", f"stage.sources=[{corpus / 'corpus.jsonl'}]", f"stage.clean=[{LENGTH_STEP}]"]
        arguments += ["data.held_out=0", "data.on_bad_row=skip", "run.name=corpus", f"run.root={root}"]
        assert main(arguments) == 0
        shards = sorted((Path(root) / "data" / "corpus" / "artifact").glob("train-*.parquet"))
        rows = pa.concat_tables([pq.read_table(path, columns=["row"]) for path in shards])["row"].to_pylist()
    ids = [str(row - 1) for row in rows]  # rows are numbered from 1, documents from 0
    pq.write_table(pa.table({"id": ids}), output)


if __name__ == "__main__":
    run_stage(Path(sys.argv[1]), Path(sys.argv[2]))
