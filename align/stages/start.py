"""Where a stage starts from: an artifact, its base, its tokenizer, and the rows of `data=`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from align.config.root import Config
from align.config.settings import changed
from align.data.sources import DataSource, data_record
from align.data.template import use_template
from align.errors import InputError
from align.models.base import base_of, find_base
from align.models.load import load_tokenizer
from align.run import Artifact, Base, Input, Manifest, resolve
from align.run.lineage import Gone, ancestors

BASE = "base"
"""The reference to the model that `model=` names, as it is."""


class Start(NamedTuple):
    """What a stage starts from, and the configuration with the method that this belongs to."""

    artifact: Artifact
    base: Base
    config: Config


def start(config: Config, ref: str | None = None, field: str = "init") -> Start:
    """The artifact a stage starts from, its base, and the method to go on with.

    With `model=` given, `latest` means the newest on those weights; without, the newest of all, whose base is used.
    `base` is the model that `model=` names, as it is.

    Raises:
        MissingArtifact: nothing is there yet; the message names the command that makes it.
        InputError: `model=` contradicts the artifact.
    """
    ref = ref if ref is not None else str(getattr(config, field))
    wanted = find_base(config.model.path, config.model.revision).digest if config.model.path else None
    artifact = find(ref, config, field, wanted if ref.endswith(":latest") else None)
    base = base_of(artifact, field, config.model.path, config.model.revision)
    method = method_of(artifact, config.method.name, field)
    return Start(artifact, base, changed(config, method=changed(config.method, name=method)))


def find(ref: str, config: Config, field: str, base_digest: str | None = None) -> Artifact:
    """What a reference names: `base`, or what `align.run.resolve` finds.

    Raises:
        MissingArtifact: nothing is there yet; the message names the command that makes it.
    """
    if ref == BASE:
        return as_artifact(find_base(config.model.path, config.model.revision))
    return resolve(ref, Path(config.run.root).expanduser(), base_digest, field)


def as_artifact(base: Base) -> Artifact:
    """A model as it is, as something to start from."""
    return Artifact(BASE, Path(base.path), base.digest, base, whole=True)


def base_itself(artifact: Artifact) -> Artifact:
    """The base that an adapter was trained on, found anew where it lies by now, as what the adapter started from."""
    return as_artifact(base_of(artifact, "init"))


def method_of(artifact: Artifact, given: str, field: str) -> str:
    """The method to go on with: an adapter belongs to the precision of the base that it was trained on.

    Raises:
        InputError: `method=` contradicts the artifact.
    """
    config = artifact.manifest.config if artifact.manifest else {}
    trained = None if artifact.whole else config.get("method", {}).get("name")
    if given == "auto":
        return trained or "qlora"
    if trained not in (None, given):
        raise InputError(
            "method", given, f"{field}={artifact.ref} was trained with method={trained}",
            "Drop method=, or start from an artifact of that method.",
        )  # fmt: skip
    return given


def frozen_as(method: str) -> str:
    """How a base is kept that nothing trains: as its adapters know it, in the compute dtype beside a full policy."""
    return "lora" if method == "full" else method


def tokenizer_of(artifact: Artifact, base: Base, config: Config | None = None) -> Any:
    """The tokenizer and chat template that an artifact was trained with; the base's where it brings none.

    Args:
        config: whose `data.template` and `data.template_kwargs` count; None for the artifact's alone.

    Raises:
        InputError: there is no chat template and none was asked for.
    """
    tokenizer = own_tokenizer(artifact, base)
    data = config.data if config else None
    use_template(tokenizer, data and data.template, data and data.template_kwargs)
    return tokenizer


def own_tokenizer(artifact: Artifact, base: Base) -> Any:
    """The same as it stands, with a chat template or without."""
    own = (artifact.path / "tokenizer_config.json").is_file()
    return load_tokenizer(base, artifact.path if own else None)


def adapter_folder(artifact: Artifact) -> Path | None:
    """The artifact's adapter; None where it is a whole model, which is then the base itself."""
    return None if artifact.whole else artifact.path


def same_split(config: Config, artifact: Artifact) -> None:
    """Raise where what is held out of the data now was trained on before: the file is the same, the share is not.

    Raises:
        InputError: names the share that the run before had.
    """
    if config.data.name != "jsonl":
        return  # the corpus has parts of its own
    digest = data_record(source_of(config)).digest
    for manifest in behind(artifact, Path(config.run.root).expanduser()):
        if isinstance(manifest, Gone):
            print(f"{manifest.ref} is gone: nobody knows whether it was trained on what is held out of data.path now")
            continue
        trained = manifest.config["data"]
        same = manifest.inputs.get("data", Input("")).digest == digest
        if same and trained["held_out"] != config.data.held_out:
            raise InputError(
                "data.held_out", config.data.held_out,
                f"{manifest.ref} held out {trained['held_out']} of this file, learned the rest",
                f"Write data.held_out={trained['held_out']}, or give a file of its own to measure on.",
            )  # fmt: skip


def behind(artifact: Artifact, root: Path) -> Iterator[Manifest | Gone]:
    """The manifest of an artifact's run and of those that it came through; nothing of a bare folder."""
    return ancestors(artifact.manifest, root) if artifact.manifest else iter(())


def trained_in(artifact: Artifact) -> str | None:
    """The dtype that an artifact's run computed in; None where nobody wrote it down."""
    if artifact.manifest is None:
        return None
    given = artifact.manifest.config.get("dtype", "auto")
    return artifact.manifest.hardware.get("dtype") if given == "auto" else given


def data_behind(artifact: Artifact, root: Path) -> list[str]:
    """The names of the data that an artifact was trained on, each once, as other machines may know them. Of a run that
    is gone, that nobody knows."""
    found = []
    for manifest in behind(artifact, root):
        if isinstance(manifest, Gone):
            found.append(f"whatever {manifest.ref} was trained on: that run is gone")
            continue
        data, read = manifest.config["data"], manifest.inputs.get("data", Input(""))
        name = read.project or (Path(data["path"]).name if data.get("path") else data["name"])
        found.append(f"annotations {name}" if read.project else name)
    return list(dict.fromkeys(found))


def source_of(config: Config) -> DataSource:
    """Where the rows of `data=` come from."""
    data = config.data
    return DataSource(data.name, data.path, data.part, data.held_out, data.limit)


def label(base: Base, config: Config) -> str:
    """The readable part of a run's name: model and method."""
    name = Path(base.path).parent.name if Path(base.path).name == "artifact" else base.id.rstrip("/").rpartition("/")[2]
    return name if name.endswith(config.method.name) else f"{name}-{config.method.name}"
