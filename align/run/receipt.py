"""The receipt of an export, read: whether the files beside it are those that it speaks of.

`align.export.receipt` writes it, and says what its rows mean.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align.errors import CorruptFile
from align.run.files import file_digest, read_json

RECEIPT = "receipt.json"
SCHEMA = 1


def checked_receipt(folder: Path) -> dict[str, Any]:
    """The receipt in a folder, its files found to be those that it speaks of.

    Raises:
        MissingArtifact, CorruptFile: it is not there; or a file is another, missing, or too many.
    """
    receipt = read_json(folder / RECEIPT, "Point at a folder that stage=export wrote.")
    remedy = "Export it again."
    rows = receipt.get("rows")
    whole = isinstance(receipt.get("files"), dict) and isinstance(rows, list) and all(isinstance(r, dict) for r in rows)
    if receipt.get("schema_version") != SCHEMA or not whole:
        raise CorruptFile(RECEIPT, folder.name, "is no receipt that this version reads", remedy)
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {RECEIPT}
    for name in sorted(there ^ receipt["files"].keys()):
        if name in there:
            raise CorruptFile("file", name, "is not of this export", "Remove it.")
        raise CorruptFile("file", name, "is missing", remedy)
    for name, digest in receipt["files"].items():
        if file_digest(folder / name) != digest:
            raise CorruptFile("file", name, "is not the file that the receipt speaks of (its sha256 differs)", remedy)
    return receipt
