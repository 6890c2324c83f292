"""Checks of an adapter's folder before it is served: signature, format and base model. Imports no torch:
`align.models.adapters` checks their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from align.core.errors import AlignError, InputError, require
from align.models.base import read_trained_method
from align.report.figure_text import escape_unprintable
from align.run import Artifact, load_artifact, read_json_object
from align.run.receipt import RECEIPT
from align.run.signing import NotSigned, PublicKey, verify_signature
from align.run.stale import read_stale_mark
from align.run.weights import (
    ABOUT,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    PICKLES,
    TOKENIZER,
    adapter_digest,
    is_reward_adapter,
)
from align.serve import operator_log

FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, ABOUT, RECEIPT, *TOKENIZER)
"""Names of the files in an adapter's folder that are read if they exist."""
FIELD = "lora_path"
"""Field of a request to load an adapter that holds the path of its folder, as in vLLM."""
NF4 = "nf4-dequantised"
"""Value of `into` in an export's receipt if the adapter was trained with method=qlora, on an NF4 base."""


class NotLoadable(InputError):
    """An error for a folder that a running server may not load as an adapter.

    The message names no path but the requested one.
    """


@dataclass(frozen=True, slots=True)
class Origin:
    """The base model and the training method (`lora` or `qlora`) that an adapter's folder records.

    Attributes:
        base: digest of the base; None if no file records it.
        method: `qlora` if the base was quantised to NF4, else `lora`; None if no file records it.
    """

    base: str | None
    method: str | None


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Version:
    """An adapter's weights at one time, identified by a digest of their files.

    A request keeps its version when the name that it asked for gets another one.

    Attributes:
        digest: sha256 of the two files that the adapter is read from, hex.
        folder: the folder that holds them.
        is_reward_model: True for a reward model, which returns scores and no answers.
        hides_reasoning: True for a reward model that was trained on answers without their reasoning.
    """

    digest: str
    folder: Path
    is_reward_model: bool = False
    hides_reasoning: bool = False


def read_version(artifact: Artifact) -> Version:
    """Hash an adapter's weights, and return the digest with the folder and whether it is a reward model."""
    data = artifact.manifest.config.get("data", {}) if artifact.manifest else {}
    is_reward_model = is_reward_adapter(artifact.path)
    hides_reasoning = is_reward_model and data.get("reasoning") == "hide"
    return Version(adapter_digest(artifact.path), artifact.path.absolute(), is_reward_model, hides_reasoning)


def read_origin(artifact: Artifact) -> Origin:
    """Return the base and method that an adapter was trained with, from its run's manifest or from the files that
    stage=export wrote beside it.

    Raises:
        CorruptFile: one of these files is not a JSON object.
    """
    if artifact.base is not None:
        return Origin(artifact.base.digest, read_trained_method(artifact))
    content = {}
    remedy = "Export it again."
    for name in (ABOUT, RECEIPT):
        path = artifact.path / name
        content[name] = read_json_object(path, name, remedy) if path.is_file() else {}
    base = content[ABOUT].get("digest")
    base_kind = content[RECEIPT].get("into")
    method = ("qlora" if base_kind == NF4 else "lora") if isinstance(base_kind, str) else None
    return Origin(base if isinstance(base, str) and base else None, method)


def require_signature(folder: Path, signer: PublicKey | None, field: str, value: str) -> None:
    """Raise NotSigned unless the files in an adapter's folder have a valid signature by the key `signer`.

    Does nothing for `signer=None`.

    Args:
        field, value: field and value for error messages.

    Raises:
        NotSigned: the signature is missing or does not match the files.
    """
    if signer is not None:
        verify_signature(folder, signer, field, value)


def require_lora_adapter(folder: Path, field: str, value: str) -> None:
    """Raise InputError unless a folder has the file names and configuration of a LoRA adapter in safetensors.

    Args:
        field, value: field and value for error messages.

    Raises:
        InputError: it holds something else, or its configuration is not a JSON object.
    """
    remedy = "Name the folder of a LoRA adapter that PEFT or stage=export wrote."
    is_whole_model = (folder / CONFIG).is_file() and not (folder / ADAPTER_CONFIG).is_file()
    require(
        not is_whole_model, field, value, "is a whole model, and no adapter", "Serve it as model=hub model.path=FOLDER."
    )
    require((folder / ADAPTER_CONFIG).is_file(), field, value, f"holds no {ADAPTER_CONFIG}", remedy)
    stem = Path(ADAPTER_WEIGHTS).stem
    pickled = sorted(path.name for path in folder.glob(f"{stem}*") if path.suffix in PICKLES)
    problem = f"holds {', '.join(pickled)}, and only safetensors are read"
    require(not pickled, field, value, problem, "Save it with safe_serialization, and remove the pickle.")
    require((folder / ADAPTER_WEIGHTS).is_file(), field, value, f"holds no {ADAPTER_WEIGHTS}", remedy)
    try:
        kind = read_json_object(folder / ADAPTER_CONFIG, ADAPTER_CONFIG, remedy).get("peft_type")
    except InputError as error:  # its message names the absolute path
        raise InputError(field, value, f"its {ADAPTER_CONFIG} is no JSON object", remedy) from error
    require(kind == "LORA", field, value, f"its peft_type is {str(kind)[:40]!r}, and only LORA is read", remedy)


def resolve_folder(lora_path: str, roots: Sequence[Path]) -> Path:
    """Resolve the path in a request to load an adapter, or raise NotLoadable if it lies outside the allowed `roots`.

    Args:
        lora_path: an absolute path, or one relative to a root.
        roots: the folders from which adapters may be loaded.

    Raises:
        NotLoadable: the folder, or a file that would be read, does not lie under a root.
    """
    is_plain = bool(lora_path) and "\0" not in lora_path and ".." not in Path(lora_path).parts
    for root in roots if is_plain else ():
        try:
            top = root.resolve(strict=True)
            folder = (top / lora_path).resolve(strict=True)  # an absolute path replaces `top`
            adapter_folders = (folder, folder / "artifact")
            files = [path for inner in adapter_folders for name in FILES for path in inner.glob(name)]
            if folder.is_dir() and all(path.resolve(strict=True).is_relative_to(top) for path in (folder, *files)):
                return folder
        except (OSError, RuntimeError, ValueError):  # missing, unreadable, circular links, or a lone surrogate
            continue
    if not roots:
        problem = "cannot be loaded: this server loads no adapters while it runs"
        raise NotLoadable(FIELD, lora_path, problem, "Start it with stage.roots=[FOLDER].")
    raise NotLoadable(
        FIELD, lora_path, "is no folder under the roots of this server", "Name a folder under one of stage.roots."
    )


def find_loadable_version(
    lora_path: str, roots: Sequence[Path], base_digest: str, method: str, signer: PublicKey | None = None
) -> Version:
    """Check signature, format and base of the adapter that a load request names, and return its Version.

    Args:
        lora_path, roots: see `resolve_folder`.
        base_digest: digest of the served base.
        method: `qlora` if the served base is the dequantised NF4 one, `lora` if it is the plain one.
        signer: the key that must have signed the adapter; None if adapters need no signature.

    Raises:
        NotLoadable: it lies outside `roots`, is not signed, is not a LoRA adapter in safetensors, or records no base
            or another one. The command line may name an adapter without a record: the operator is trusted.
    """
    folder = resolve_folder(lora_path, roots)
    try:
        artifact = load_artifact(folder, lora_path)
        require_signature(artifact.path, signer, FIELD, lora_path)
        origin = read_origin(artifact)
        version = read_version(artifact)
    except NotSigned as error:
        raise NotLoadable(FIELD, lora_path, error.problem, error.remedy) from error
    except (AlignError, OSError) as error:  # its message holds paths of the server
        problem = "is no finished run or adapter, or its files are not those that were published"
        raise NotLoadable(FIELD, lora_path, problem, "Name a finished run or a folder with an adapter.") from error
    try:
        require_lora_adapter(artifact.path, FIELD, lora_path)
    except InputError as error:
        raise NotLoadable(FIELD, lora_path, error.problem, error.remedy) from error
    if origin.base is None or origin.method is None:
        problem = f"does not say on which {'base' if origin.base is None else 'precision of its base'} it was trained"
        raise NotLoadable(FIELD, lora_path, problem, "Start the server with it in stage.adapters.")
    if origin.base != base_digest:
        problem = f"was trained on base {origin.base[:12]}, and the served base is {base_digest[:12]}"
        raise NotLoadable(FIELD, lora_path, problem, "Load an adapter of the served base.")
    if origin.method != method:
        problem = f"was trained with method={origin.method}, and the base is served as method={method} loads it"
        raise NotLoadable(FIELD, lora_path, problem, f"Load an adapter of method={method}.")
    return version


def warn_if_stale(ref: str, folder: Path) -> None:
    """Log a warning if an artifact's run is marked as trained on data rows that were deleted later.

    Args:
        folder: the artifact's folder, inside its run's folder.
    """
    stale = read_stale_mark(folder.parent)
    if stale is not None:
        operator_log.warning("%s", escape_unprintable(f"{ref} is stale since {stale.since[:10]}, {stale.because}"))
