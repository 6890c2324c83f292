"""Which rows of a file are trained on and which are measured on: one rule, by what a row asks, for every stage."""

from __future__ import annotations

import hashlib
from pathlib import Path

from align.errors import InputError
from align.run import Artifact, Input
from align.run.lineage import Gone, manifests_behind
from align.types import Conversation, Document


def question(document: Document) -> Conversation | None:
    """The conversation up to the user's last turn; None for plain text or where no user speaks."""
    if isinstance(document, str):
        return None
    messages = document.messages
    while messages and messages[-1].role != "user":
        messages = messages[:-1]
    return Conversation(messages, document.id) if messages else None


def share_of(document: Document) -> float:
    """A number in [0, 1) from the hash of what a document asks (or says)."""
    asked = question(document)
    if isinstance(document, str):
        content = document
    else:  # as messages were written when they had these two fields: a file keeps its split
        turns = [f"Message(role={m.role!r}, content={m.content!r})" for m in (asked or document).messages]
        content = f"({', '.join(turns)}{',' if len(turns) == 1 else ''})"
    return int(hashlib.sha256(content.encode()).hexdigest()[:8], 16) / 2**32


def side(found: list[Document], split: str, held_out: float) -> list[Document]:
    """The documents of `split`, `train` or `test`. Equal questions never stand on both sides. Where the share
    `held_out` is too small for a file, one question is held out all the same, and then nothing trains on it."""
    kept = held_back([share_of(d) for d in found], held_out)
    return [d for d, held in zip(found, kept, strict=True) if held == (split == "test")]


def held_back(shares: list[float], held_out: float) -> list[bool]:
    """Which rows of a file are measured on, by the shares of what all of them ask."""
    least = min(shares) if held_out > 0 and len(set(shares)) > 1 else -1.0
    return [share < held_out or share == least for share in shares]


def unasked(found: list[Document], test: list[Document], name: str) -> list[Document]:
    """The documents of a file whose questions no document of `test` asks; says how many were left out."""
    asked = {share_of(document) for document in test}
    kept = [document for document in found if share_of(document) not in asked]
    if len(kept) < len(found):
        print(f"{len(found) - len(kept)} rows of {name} ask what data.eval_path asks, and are left out of training")
    return kept


def same_split(artifact: Artifact, digest: str, held_out: float, root: Path, field: str = "data.held_out") -> None:
    """Raise where what is held out of a file now was trained on before: the file is the same, the share is not.

    Args:
        artifact: what is measured.
        digest: of the file that is measured on.
        held_out: the share of it that is; 1 for all of it.
        root: the folder of runs.
        field: what the user calls the share, or the file.

    Raises:
        InputError: names the share that the run before had.
    """
    for manifest in manifests_behind(artifact, root):
        if isinstance(manifest, Gone):
            print(f"{manifest.ref} is gone: nobody knows whether it was trained on what is held out of data.path now")
            continue
        trained = manifest.config["data"]
        kept = 0.0 if trained.get("eval_path") else trained["held_out"]
        if manifest.inputs.get("data", Input("")).digest == digest and kept != held_out:
            again = f"Write data.held_out={kept}, or give" if kept else "Give"
            problem = f"{manifest.ref} held out {kept} of this file, learned the rest"
            raise InputError(field, held_out, problem, f"{again} a file of its own to measure on: data.eval_path=FILE.")
