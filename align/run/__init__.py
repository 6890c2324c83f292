"""A run's folder: identity, lock, manifest, atomic publication, and references to what earlier runs published.

A run's identity is the part of its configuration that its stage reads, and the digest of every input. The same identity
lands in the same folder: unfinished, it is continued; finished, it is returned. The folder's own file descriptor is the
lock, so no lock file is left behind.
"""

from align.run.artifacts import WEIGHTS, Artifact, load_artifact, resolve, verify_outputs
from align.run.digests import file_digest, files_digest, folder_digest, json_digest, lookup_digest
from align.run.files import (
    as_storage_error,
    is_out_of_memory,
    read_json,
    read_json_object,
    write_json,
    write_text,
)
from align.run.folder import Run
from align.run.hub import HUB, hub_config, hub_files, hub_snapshot
from align.run.manifest import Base, Input, Manifest, read_manifest
from align.run.weights import link_files, list_unhashed_files, model_config, model_digest, model_files

__all__ = [
    "HUB",
    "WEIGHTS",
    "Artifact",
    "Base",
    "Input",
    "Manifest",
    "Run",
    "as_storage_error",
    "file_digest",
    "files_digest",
    "folder_digest",
    "hub_config",
    "hub_files",
    "hub_snapshot",
    "is_out_of_memory",
    "json_digest",
    "link_files",
    "list_unhashed_files",
    "load_artifact",
    "lookup_digest",
    "model_config",
    "model_digest",
    "model_files",
    "read_json",
    "read_json_object",
    "read_manifest",
    "resolve",
    "verify_outputs",
    "write_json",
    "write_text",
]
