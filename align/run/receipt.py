"""The receipt of an export, written and read: which files it speaks of, and what was measured of them.

`receipt.json` lies in the export, with the sha256 of every file beside it, so that it speaks of these files and no
others. A signature is made after it, and covers it. `align.export.receipt_rows` says what its rows mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.core.errors import CorruptFile, require_schema_version
from align.run.digests import file_digest, json_digest
from align.run.files import read_json, write_json
from align.run.signing import SIGNATURE

RECEIPT = "receipt.json"
SCHEMA = 1


def write_receipt(
    folder: Path, rows: Sequence[Mapping[str, Any]], prompts: Sequence[Sequence[int]], about: Mapping[str, Any]
) -> None:
    """`receipt.json`, last of an export's files.

    Args:
        rows: what was measured, one engine on one base a row.
        prompts: token ids that were asked.
        about: the `artifact` and `base` that it speaks of, by digest.
    """
    files = {
        str(path.relative_to(folder)): file_digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != RECEIPT
    }
    prompted = {
        "number": len(prompts),
        "tokens": sum(map(len, prompts)),
        "digest": json_digest([list(p) for p in prompts]),
    }
    receipt = {"schema_version": SCHEMA, **about, "prompts": prompted, "rows": list(rows)}
    write_json(folder / RECEIPT, receipt | {"files": files})


def checked_receipt(folder: Path, beside: str = "") -> dict[str, Any]:
    """The receipt in a folder, its files found to be those that it speaks of.

    Args:
        beside: the name of a link to another folder, which a copy may have followed.

    Raises:
        MissingArtifact, CorruptFile: it is not there; or a file is another, missing, or too many.
        InputError: another version wrote it.
    """
    receipt = read_json(folder / RECEIPT, "Point at a folder that stage=export wrote.")
    remedy = "Export it again with stage=export resume=never."
    require_schema_version(receipt.get("schema_version"), SCHEMA, RECEIPT, folder.name, remedy)
    rows = receipt.get("rows")
    whole = isinstance(receipt.get("files"), dict) and isinstance(rows, list) and all(isinstance(r, dict) for r in rows)
    if not whole:
        raise CorruptFile(RECEIPT, folder.name, "is no receipt of an export", remedy)
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {RECEIPT, SIGNATURE}
    there -= {name for name in there - receipt["files"].keys() if beside and name.startswith(f"{beside}/")}
    for name in sorted(there ^ receipt["files"].keys()):
        if name in there:
            raise CorruptFile("file", name, "is not of this export", "Remove it.")
        raise CorruptFile("file", name, "is missing", remedy)
    for name, digest in receipt["files"].items():
        if file_digest(folder / name) != digest:
            raise CorruptFile("file", name, "is not the file that the receipt speaks of (its sha256 differs)", remedy)
    return receipt
