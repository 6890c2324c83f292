"""Receipts of exports: the files of an export with their digests, and the measurements made on them.

`receipt.json` lies in the export and holds the SHA-256 of every file beside it. A signature is made after the receipt
and covers it. `align.export.receipt_rows` explains the rows.
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
    folder: Path, rows: Sequence[Mapping[str, Any]], prompts: Sequence[Sequence[int]], export_fields: Mapping[str, Any]
) -> None:
    """Write `receipt.json` into an export's folder, with the digests of all other files and the measurements in `rows`.

    Args:
        rows: measurements, one row per engine and base.
        prompts: token ids of the prompts, one list per prompt.
        export_fields: digests of the `artifact` and the `base`.
    """
    files = {
        str(path.relative_to(folder)): file_digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != RECEIPT
    }
    prompt_summary = {
        "number": len(prompts),
        "tokens": sum(map(len, prompts)),
        "digest": json_digest([list(p) for p in prompts]),
    }
    receipt = {"schema_version": SCHEMA, **export_fields, "prompts": prompt_summary, "rows": list(rows)}
    write_json(folder / RECEIPT, receipt | {"files": files})


def read_verified_receipt(folder: Path, link_name: str = "") -> dict[str, Any]:
    """Return the content of `receipt.json`, or raise CorruptFile if a file in the folder is changed, missing or not
    listed.

    Args:
        link_name: name of a link to another folder. A copy may hold that folder's files in place of the link.

    Raises:
        MissingArtifact, CorruptFile: The receipt is missing, or a file differs, is missing or was added.
        InputError: Another version wrote the receipt.
    """
    receipt = read_json(folder / RECEIPT, "Point at a folder that stage=export wrote.")
    remedy = "Export it again with stage=export resume=never."
    require_schema_version(receipt.get("schema_version"), SCHEMA, RECEIPT, folder.name, remedy)
    rows = receipt.get("rows")
    digests = receipt.get("files")
    if not (isinstance(digests, dict) and isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
        raise CorruptFile(RECEIPT, folder.name, "is no receipt of an export", remedy)
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {RECEIPT, SIGNATURE}
    names -= {name for name in names - digests.keys() if link_name and name.startswith(f"{link_name}/")}
    for name in sorted(names ^ digests.keys()):
        if name in names:
            raise CorruptFile("file", name, "is not of this export", "Remove it.")
        raise CorruptFile("file", name, "is missing", remedy)
    for name, digest in digests.items():
        if file_digest(folder / name) != digest:
            raise CorruptFile("file", name, "is not the file that the receipt lists (its sha256 differs)", remedy)
    return receipt
