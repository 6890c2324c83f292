"""Digests of manifests that are held elsewhere: in the chained log of the aliases, and in the receipt of an export,
which a signature covers.

A user who may write a run's folder can change its figures and its manifest together, so that both agree again. They do
not agree with a digest that was written down before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from align.run.digests import file_digest
from align.run.manifest import FILE, Manifest


@dataclass(frozen=True, slots=True)
class HeldManifest:
    """The manifest of a run, as it was at one time.

    Attributes:
        content: digest of the weights that the run published or evaluated. A run that was made again with other
            weights is not compared.
        sha256: of the file `manifest.json`.
    """

    content: str
    sha256: str

    def as_json(self) -> dict[str, str]:
        return asdict(self)


def content_of(manifest: Manifest) -> str:
    """Return the digest of the weights that a run published, or that it evaluated; empty if it did neither."""
    evaluated = manifest.inputs.get("artifact") if manifest.stage == "eval" else None
    return manifest.digest or (evaluated.digest if evaluated else "")


def hold_manifest(folder: Path, manifest: Manifest) -> HeldManifest:
    """Return what is to be held of the manifest in a run's folder."""
    return HeldManifest(content_of(manifest), file_digest(folder / FILE))


def parse_held_manifests(value: Any) -> dict[str, HeldManifest] | None:
    """Rebuild `stage:name` → held manifest from its JSON form. Returns None if it is something else."""
    if not isinstance(value, Mapping):
        return None
    held: dict[str, HeldManifest] = {}
    for run, one in value.items():
        if not isinstance(one, Mapping) or {*one} != {"content", "sha256"}:
            return None
        if not all(isinstance(text, str) for text in one.values()):
            return None
        held[str(run)] = HeldManifest(one["content"], one["sha256"])
    return held
