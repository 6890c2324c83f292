"""Which base weights: the built-in model, a folder, or a hub id, with a digest of what was found. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from align.errors import CorruptFile, InputError, MissingArtifact
from align.files import user_path
from align.models.architectures import refuse
from align.models.smollm2 import HUB_ID, gguf_in_wheel, smollm2_folder, smollm2_snapshot
from align.run import Artifact, Base, file_digest, hub_snapshot, model_config, model_digest

FOLDER = Path(__file__).resolve().parent / "pocket_model"


def pocket_folder() -> Path:
    """The folder of the built-in model.

    Raises:
        CorruptFile: a file is missing or is not the one that was shipped.
    """
    manifest = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))
    for name, digest in manifest["sha256"].items():
        path = FOLDER / name
        if not path.is_file() or file_digest(path) != digest:
            raise CorruptFile("model", str(path), "is not the file that was shipped", "Install the package again.")
    return FOLDER


BUILT_IN = ("pocket", "smollm2")
"""Models inside installed packages, found anew on each machine wherever they lay when an artifact recorded them."""


def builtin_folder(name: str) -> Path:
    """The folder of a model that an installed package carries.

    Raises:
        InputError: no package with it is installed.
    """
    return pocket_folder() if name == "pocket" else smollm2_folder()


def find_base(path: str | None = None, revision: str | None = None) -> Base:
    """The base weights of a folder, a hub id or a built-in model; those of `pocket` where nothing is named.

    Raises:
        InputError: nothing is there, or what is there is not a model in safetensors.
    """
    name = path or "pocket"
    if name == "smollm2" and (revision is not None or gguf_in_wheel() is None):
        snapshot = smollm2_snapshot(revision)
        return base_in(snapshot, HUB_ID, snapshot.name)
    folder = user_path(name, "model.path")
    if revision is not None and (name in BUILT_IN or folder.is_dir()):
        problem = f"model.path={name} is a folder on this machine, which has no revisions"
        raise InputError("model.revision", revision, problem, "Drop it, or give a hub id as model.path.")
    if name in BUILT_IN:
        return base_in(builtin_folder(name), name)
    if folder.is_dir():
        return base_in(folder, name)
    if name.startswith((".", "/", "~")):
        raise InputError("model.path", name, "there is no such folder", "Give a folder with a model, or a hub id.")
    snapshot = hub_snapshot(name, revision, "model.path")
    return base_in(snapshot, name, revision=snapshot.name)


def named_base(base: Base) -> dict[str, str]:
    """The base as another machine may know it: `id`, `revision`, `digest`. What came from no hub has no revision, and
    is called by its folder's name: a path is nobody's business, and `models/mine` would pass for a repository."""
    known = base.revision or base.id in BUILT_IN
    name = Path(base.id).name.lstrip(".") or Path(base.path).resolve().name  # of `.` and `..` the folder's
    return {"id": base.id if known else name, "revision": base.revision or "", "digest": base.digest}


def base_in(folder: Path, id: str, revision: str | None = None) -> Base:
    """The base weights in a folder, which is known by its absolute path: a later command may run elsewhere.

    Raises:
        CorruptFile, InputError: it is no model that this package reads, see `align.run.weights`, or of an architecture
            that is refused.
    """
    refuse(model_config(folder, "model.path", id), id)
    return Base(id, str(folder.absolute()), revision, model_digest(folder, "model.path", id))


def base_of(artifact: Artifact, field: str, path: str | None = None, revision: str | None = None) -> Base:
    """The base that an artifact belongs to. The artifact knows it; a contradicting `model=` is the user's error.

    Raises:
        InputError: `model=` names other weights, or the recorded ones are gone or have changed.
    """
    recorded = artifact.base
    if artifact.whole and recorded is not None and path is None:
        return recorded
    if path is not None:
        given = find_base(path, revision)
        if recorded is not None and recorded.digest != given.digest:
            raise InputError(
                "model", path, f"{field}={artifact.ref} was trained on {recorded.id} ({recorded.digest[:12]})",
                "Drop model=, or choose an artifact of this base.",
            )  # fmt: skip
        return given
    if recorded is None:
        raise InputError(field, artifact.ref, "does not say which base it was trained on", "Add model.path=.")
    found = found_again(recorded, field, artifact.ref)
    if found.digest != recorded.digest:
        raise InputError(
            field, artifact.ref, f"its base {recorded.id} has changed since it was trained",
            "Restore those weights, or train again on these.",
        )  # fmt: skip
    return replace(recorded, path=found.path)


def found_again(recorded: Base, field: str, ref: str) -> Base:
    """The base of an artifact where it lies by now: a built-in model in its package, a folder where it was, a hub's
    model in the cache or on the hub, at its revision.

    Args:
        field, ref: what the user calls the artifact.

    Raises:
        MissingArtifact: it is gone; the message names the setting that says where it went.
    """
    if recorded.id in BUILT_IN:
        return find_base(recorded.id)
    if (folder := Path(recorded.path)).is_dir():
        return base_in(folder, recorded.id, recorded.revision)
    problem = f"its base {recorded.id} is not in {recorded.path} any more"
    if recorded.revision:
        try:
            return find_base(recorded.id, recorded.revision)
        except InputError as error:
            problem += f", and not to be had from the hub ({error.problem})"
    raise MissingArtifact(field, ref, problem, "Say where it lies by now: model=hub model.path=FOLDER.")


def loadable_name(base: Base) -> str:
    """By which libraries load a base on this machine: a hub's id, which goes with its revision; of any other its
    absolute path, for they look for `my-model` in the working folder and on the hub."""
    return base.id if base.revision else base.path
