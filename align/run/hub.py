"""Downloads from the Hugging Face hub into its own cache, with errors that name a remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from align.core.errors import InputError
from align.run.files import as_storage_error

HUB = "hub:"
READ = ("README.md", "*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")


def hub_snapshot(repo: str, revision: str | None, field_name: str) -> Path:
    """Download a model's safetensors and text files from the hub if they are not cached, and return the local folder.

    Raises:
        InputError: The hub is offline, or the repository is missing or gated.
    """
    from huggingface_hub import snapshot_download

    with convert_hub_errors(repo, revision, field_name):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(READ)))


def hub_config(repo: str, revision: str | None, field_name: str) -> Path:
    """Download only `config.json` of a model from the hub if it is not cached, and return the folder that holds it.

    Raises:
        InputError: As `hub_snapshot`.
    """
    from huggingface_hub import hf_hub_download

    with convert_hub_errors(repo, revision, field_name):
        return Path(hf_hub_download(repo, "config.json", revision=revision)).parent


WHOLE = re.compile(
    r"(?P<repo>[^/:@]+/[^/:@]+)(?:@(?P<revision>[^/:]+))?(?::(?:(?P<subset>[^:]+):)?(?P<split>[\w.-]+))?"
)
"""Pattern of a reference to a whole split on the hub: `ORG/NAME[@REVISION]`, then `:SPLIT` or `:SUBSET:SPLIT`."""


@cache  # a branch may move between two calls: one process sees the same files
def hub_files(ref: str, field_name: str) -> list[Path]:
    """Return the local paths of the files that a `hub:` reference to a data set names, downloaded if not cached.

    Args:
        ref: one file, `hub:ORG/NAME/PATH/TO/FILE`; or a whole split, as `datasets.load_dataset` reads it:
            `hub:ORG/NAME` (train), `hub:ORG/NAME:SPLIT`, `hub:ORG/NAME:SUBSET:SPLIT`. NAME may be NAME@REVISION.

    Raises:
        InputError: The reference has none of these forms, the hub is offline, or the data set is missing or gated.
    """
    if match := WHOLE.fullmatch(ref.removeprefix(HUB)):
        return hub_split(match["repo"], match["revision"], match["subset"], match["split"] or "train", field_name)
    org, _, path = ref.removeprefix(HUB).partition("/")
    name, _, file = path.partition("/")
    name, _, revision = name.partition("@")
    if not (org and name and file):
        raise InputError(
            field_name, ref, "names no data set", "Write hub:ORG/NAME/FILE, or hub:ORG/NAME:SPLIT for a whole split."
        )
    from huggingface_hub import hf_hub_download

    with convert_hub_errors(f"{org}/{name}", revision or None, field_name):
        return [Path(hf_hub_download(f"{org}/{name}", file, repo_type="dataset", revision=revision or None))]


def hub_split(repo: str, revision: str | None, subset: str | None, split: str, field_name: str) -> list[Path]:
    """Return the Arrow files of a split, or raise InputError if the hub does not have the data set.

    `datasets` alone retries for 23 s if the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if not HF_HUB_OFFLINE:
        with convert_hub_errors(repo, revision, field_name):
            HfApi().dataset_info(repo, revision=revision, timeout=10)
    return split_files(repo, revision, subset, split, field_name)


def split_files(repo: str, revision: str | None, subset: str | None, split: str, field_name: str) -> list[Path]:
    """Load one split with `datasets.load_dataset` and return the paths of the Arrow files in its cache.

    Args:
        repo: id on the hub, or a folder that `datasets.load_dataset` accepts in its place.

    Raises:
        InputError: There is no such subset or split, or no file that `datasets` reads.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    remedy = "Write hub:ORG/NAME:SPLIT, or hub:ORG/NAME:SUBSET:SPLIT."
    try:
        data_set = load_dataset(repo, subset, split=split, revision=revision)
    except (DatasetsError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(field_name, f"{HUB}{repo}", f"cannot be loaded ({reason})", remedy) from error
    except OSError as error:
        raise unreachable_error(field_name, repo) from error
    return [Path(file["filename"]) for file in data_set.cache_files]


@contextmanager
def convert_hub_errors(repo: str, revision: str | None, field_name: str) -> Iterator[None]:
    """Convert exceptions of the hub's client in the block to an InputError with a remedy.

    A full disk becomes a StorageError.
    """
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise InputError(
            field_name, repo, "the hub gates this repository", "Accept its terms on the hub, then run `hf auth login`."
        ) from error
    except HFValidationError as error:
        raise InputError(
            field_name, repo, "is neither a folder here nor a hub id", "Give a folder, or an id like ORG/NAME."
        ) from error
    except RepositoryNotFoundError as error:
        problem = "the hub has no such repository, or it is private"
        raise InputError(field_name, repo, problem, "Check the id, or run `hf auth login`.") from error
    except RevisionNotFoundError as error:
        field = "model.revision" if field_name.startswith("model") else field_name
        raise InputError(
            field, revision, f"{repo} has no such revision", "Give a branch, a tag or a commit of it."
        ) from error
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):
            raise unreachable_error(field_name, repo) from error
        raise InputError(field_name, repo, "has no such file", "Look at its files on the hub.") from error
    except Exception as error:
        if not isinstance(error, OSError) and not type(error).__module__.startswith("httpx"):
            raise
        if disk_error := as_storage_error(error, str(HF_HUB_CACHE)):
            raise disk_error from error
        raise unreachable_error(field_name, repo) from error


def unreachable_error(field_name: str, repo: str) -> InputError:
    problem = "the hub cannot be reached and no copy is cached"
    remedy = "it where there is a network and give the folder or file as the path."
    if field_name == "model.path":
        return InputError(field_name, repo, f"is no folder here; {problem}", f"Check the path, or download {remedy}")
    return InputError(field_name, repo, problem, f"Download {remedy}")
